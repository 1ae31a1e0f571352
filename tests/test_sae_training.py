"Training an SAE of our own: activations of several layers at once, resuming, export"
import json
import numpy as np, pytest, torch
from helpers import tiny_model, tiny_tokenizer
from saeexplainer.sources.sae_training import *
from saeexplainer.sources.sae_training import _write
from saeexplainer.saes import FeatureReader
from saeexplainer.lm.hooks import residual_stream

SETTINGS = SAESettings(layer=1, features=64, k=4, steps=130, batch=32, context=8)


def tokens(n, d=16): # n activations that are sums of few directions
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(40, d, generator=g), dim=-1)
    picks = torch.randint(40, (n, 3), generator=g)
    return W[picks].sum(1) + .01*torch.randn(n, d, generator=g)


def endless(acts, stop=None): # first token -> iterator; raises after `stop` tokens in all
    seen = [0]
    def start(at):
        while True:
            for i in range(at % len(acts), len(acts), 64):
                seen[0] += 64
                if stop and seen[0] > stop: raise KeyboardInterrupt
                yield acts[i:i+64]
            at = 0
    return start


def test_several_layers_in_one_pass_are_those_of_single_ones(tmp_path):
    model, tokenizer = tiny_model(n_layers=4), tiny_tokenizer()
    rows = text_windows(tokenizer, ['the cat sat on the mat '*9, 'a dog in the park '*9], size=7)
    assert rows.shape[1] == 7 and text_windows(tokenizer, [], 7).shape == (0, 7)
    for bos in (None, tokenizer.bos_token_id):
        found = layer_residuals(model, rows, [2, 0], bos)
        ids = rows if bos is None else torch.cat([torch.full((len(rows), 1), bos), rows], 1)
        for layer in (0, 2): assert torch.equal(found[layer], residual_stream(model, ids, torch.ones_like(ids), layer)[:, bos is not None:])
    cached = cache_residuals(model, rows, [0, 2], bos, tmp_path, batch=4, progress=False)
    assert np.allclose(cached[2], found[2].numpy(), atol=2e-3)
    before = json.loads((tmp_path/'done.json').read_text())
    _write(tmp_path/'done.json', before | dict(windows=4)) # as after a kill: the rest is read again, to the same
    assert np.array_equal(cache_residuals(model, rows, [0, 2], bos, tmp_path, batch=4, progress=False)[0], cached[0])
    with pytest.raises(ValueError, match='holds other activations'): cache_residuals(model, rows.flip(0), [0, 2], bos, tmp_path, progress=False)


def test_training_goes_on_where_it_was_killed(tmp_path):
    acts = tokens(32*300)
    with pytest.raises(KeyboardInterrupt): train_sae(SETTINGS, 'tiny', 16, endless(acts, stop=32*150), tmp_path)
    assert (tmp_path/'last').exists() and not (tmp_path/'sae').exists()
    begun = [json.loads(line)['step'] for line in open(tmp_path/'curve.jsonl')]
    (tmp_path/'last').rename(tmp_path/'next'); (tmp_path/'old').mkdir() # as a kill between the two renames of a checkpoint leaves it
    trained = train_sae(SETTINGS, 'tiny', 16, endless(acts), tmp_path)
    steps = [json.loads(line)['step'] for line in open(tmp_path/'curve.jsonl')]
    assert 100 <= max(begun) < 130 and steps[len(begun)] == 100 and steps[-1] == 120
    assert train_sae(SETTINGS, 'tiny', 16, None, tmp_path) == trained # finished: nothing is read
    with pytest.raises(ValueError, match=r'holds another training \(k: 4 there, 8 here\)'): train_sae(SAESettings(layer=1, features=64, k=8, steps=130, batch=32, context=8), 'tiny', 16, endless(acts), tmp_path)
    found = export_sae(trained, 4, acts[:2000], tmp_path/'out')
    weights = (tmp_path/'out'/'sae_weights.safetensors').read_bytes()
    with pytest.raises(ValueError, match='out holds an SAE already: choose another folder, or give replace=True'): export_sae(trained, 8, acts[:2000], tmp_path/'out')
    assert (tmp_path/'out'/'sae_weights.safetensors').read_bytes() == weights
    assert export_sae(trained, 4, acts[:2000], tmp_path/'out', replace=True) == found
    reader = FeatureReader.load(tmp_path/'out')
    measured = reconstruction(reader, acts[2000:4000])
    assert abs(found['l0_set'] - 4) < .05 and abs(measured['l0'] - 4) < .4 and measured['fvu'] < .8 and (reader.n_features, reader.layer) == (64, 1)


def test_an_sae_says_whether_it_was_trained_with_bos(tmp_path):
    "In its metadata as `train_sae` writes it, and as readers take it"
    with_bos, without = tiny_tokenizer(), tiny_tokenizer()
    without.bos_token = None
    for name, tokenizer in (('with', with_bos), ('without', without)):
        tiny_model(n_layers=2).save_pretrained(tmp_path/name)
        tokenizer.save_pretrained(tmp_path/name)
    for model, bos, wanted in (('tiny', True, True), ('tiny', 0, True), ('tiny', None, False), ('tiny', False, False), (str(tmp_path/'with'), True, True), (str(tmp_path/'without'), True, False)):
        assert fed_bos(model, bos) is wanted
    short = SAESettings(layer=1, features=64, k=4, steps=12, batch=32, context=8)
    for name, wanted in (('with', True), ('without', False)):
        trained = train_sae(short, str(tmp_path/name), 16, endless(tokens(32*300)), tmp_path/f'{name}-sae')
        assert json.loads((trained/'cfg.json').read_text())['metadata']['prepend_bos'] is wanted


def test_one_training_at_a_time_in_a_folder(tmp_path):
    from saeexplainer.files import hold
    held = hold(tmp_path/'.lock', tmp_path)
    with pytest.raises(RuntimeError, match='another process is working on'): train_sae(SETTINGS, 'tiny', 16, None, tmp_path)
    held.release()


def test_run_all_of_the_recipes_replaces_nothing_that_is_shipped():
    "In JupyterLab no cell is skipped: where a recipe writes to data/, a constant that is False stands before it"
    from pathlib import Path
    recipes = Path(__file__).parent.parent/'nbs'/'recipes'
    for name in ('train_sae', 'layer_saes', 'build_features', 'second_writer'):
        cells = [''.join(c['source']) for c in json.loads((recipes/f'{name}.ipynb').read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
        assert sum(c.count('REPLACE_SHIPPED = False') for c in cells) == 1 and sum(c.count('REPLACE_SHIPPED') for c in cells) == 2, name
    from saeexplainer.presets import data_dir
    train = next(''.join(c['source']) for c in json.loads((recipes/'train_sae.ipynb').read_text(encoding='utf-8'))['cells'] if 'REPLACE_SHIPPED = False' in ''.join(c['source']))
    made = dict(EMBEDDED='x', SAESettings=SAESettings, Path=Path, data_dir=data_dir)
    exec(train, made)
    assert data_dir().resolve() not in Path(made['home']).resolve().parents
