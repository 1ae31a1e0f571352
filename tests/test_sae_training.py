"Training an SAE of our own: activations of several layers at once, resuming, export"
import json
from pathlib import Path
import numpy as np
import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from saeexplainer.files import hold, write_json
from saeexplainer.lm.hooks import residual_stream
from saeexplainer.presets import data_dir
from saeexplainer.saes import FeatureReader
from saeexplainer.sources.sae_training import (
    SAESettings, cache_residuals, export_sae, fed_bos, layer_residuals, reconstruction, text_windows, train_sae,
)

SIZES = dict(layer=1, features=64, steps=130, batch=32, context=8)
SETTINGS = SAESettings(k=4, **SIZES)
RECIPES = Path(__file__).parent.parent/'nbs'/'recipes'


def tokens(n, d=16):
    "n activations that are sums of few directions"
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(40, d, generator=g), dim=-1)
    picks = torch.randint(40, (n, 3), generator=g)
    return directions[picks].sum(1) + .01*torch.randn(n, d, generator=g)


def endless(acts, stop=None):
    "A function from the first token to an iterator without an end; stop: tokens after which it raises"
    seen = 0
    def start(at):
        nonlocal seen
        while True:
            for i in range(at % len(acts), len(acts), 64):
                seen += 64
                if stop and seen > stop: raise KeyboardInterrupt
                yield acts[i:i+64]
            at = 0
    return start


def steps_of(curve):
    lines = Path(curve).read_text().splitlines()
    return [json.loads(line)['step'] for line in lines]


# ---- activations

@pytest.fixture(scope='module')
def model(): return tiny_model(n_layers=4)

@pytest.fixture(scope='module')
def rows():
    texts = ['the cat sat on the mat '*9, 'a dog in the park '*9]
    return text_windows(tiny_tokenizer(), texts, size=7)

BOS = [None, tiny_tokenizer().bos_token_id]


def test_windows_have_the_size(rows):
    assert rows.shape[1] == 7
    assert text_windows(tiny_tokenizer(), [], 7).shape == (0, 7)


@pytest.mark.parametrize('bos', BOS)
def test_several_layers_in_one_pass_are_those_of_single_ones(model, rows, bos):
    found = layer_residuals(model, rows, [2, 0], bos)
    ids = rows if bos is None else torch.cat([torch.full((len(rows), 1), bos), rows], 1)
    for layer in (0, 2):
        alone = residual_stream(model, ids, torch.ones_like(ids), layer)
        assert torch.equal(found[layer], alone[:, bos is not None:])


@pytest.mark.parametrize('bos', BOS)
def test_activations_on_disk(model, rows, bos, tmp_path):
    "They are those of the model, are gone on with after a kill, and are not given for others"
    found = layer_residuals(model, rows, [2, 0], bos)
    cached = cache_residuals(model, rows, [0, 2], bos, tmp_path, batch=4, progress=False)
    assert np.allclose(cached[2], found[2].numpy(), atol=2e-3)
    done = json.loads((tmp_path/'done.json').read_text())
    write_json(done | dict(windows=4), tmp_path/'done.json', indent=None) # as after a kill
    again = cache_residuals(model, rows, [0, 2], bos, tmp_path, batch=4, progress=False)
    assert np.array_equal(again[0], cached[0])
    with pytest.raises(ValueError, match='holds other activations'):
        cache_residuals(model, rows.flip(0), [0, 2], bos, tmp_path, progress=False)


# ---- training and export

@pytest.fixture(scope='module')
def acts(): return tokens(32*300)

@pytest.fixture(scope='module')
def work(acts, tmp_path_factory):
    "A training that was killed between the two renames of a checkpoint, and gone on with"
    folder = tmp_path_factory.mktemp('sae')
    with pytest.raises(KeyboardInterrupt):
        train_sae(SETTINGS, 'tiny', 16, endless(acts, stop=32*150), folder)
    assert (folder/'last').exists()
    assert not (folder/'sae').exists()
    (folder/'begun').write_text(json.dumps(steps_of(folder/'curve.jsonl')))
    (folder/'last').rename(folder/'next')
    (folder/'old').mkdir()
    assert train_sae(SETTINGS, 'tiny', 16, endless(acts), folder) == folder/'sae'
    return folder


def test_training_goes_on_where_it_was_killed(work):
    begun = json.loads((work/'begun').read_text())
    steps = steps_of(work/'curve.jsonl')
    assert 100 <= max(begun) < 130
    assert steps[len(begun)] == 100
    assert steps[-1] == 120


def test_a_finished_training_reads_nothing(work):
    assert train_sae(SETTINGS, 'tiny', 16, None, work) == work/'sae'


def test_another_training_in_the_same_folder(work, acts):
    with pytest.raises(ValueError, match=r'holds another training \(k: 4 there, 8 here\)'):
        train_sae(SAESettings(k=8, **SIZES), 'tiny', 16, endless(acts), work)


def test_an_export_replaces_nothing_unasked(work, acts, tmp_path):
    found = export_sae(work/'sae', 4, acts[:2000], tmp_path/'out')
    weights = (tmp_path/'out'/'sae_weights.safetensors').read_bytes()
    with pytest.raises(ValueError, match='out holds an SAE already: choose another folder, or give replace=True'):
        export_sae(work/'sae', 8, acts[:2000], tmp_path/'out')
    assert (tmp_path/'out'/'sae_weights.safetensors').read_bytes() == weights
    assert export_sae(work/'sae', 4, acts[:2000], tmp_path/'out', replace=True) == found


def test_an_export_has_the_threshold_of_real_text(work, acts, tmp_path):
    found = export_sae(work/'sae', 4, acts[:2000], tmp_path/'out')
    reader = FeatureReader.load(tmp_path/'out')
    measured = reconstruction(reader, acts[2000:4000])
    assert abs(found['l0_set'] - 4) < .05
    assert abs(measured['l0'] - 4) < .4
    assert measured['fvu'] < .8
    assert (reader.n_features, reader.layer) == (64, 1)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    "Folders of a model whose tokenizer has a BOS token, and of one whose tokenizer has none"
    folders = {name: tmp_path_factory.mktemp(name) for name in ('with', 'without')}
    model = tiny_model(n_layers=2)
    for name, folder in folders.items():
        tokenizer = tiny_tokenizer()
        if name == 'without': tokenizer.bos_token = None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


@pytest.mark.parametrize('bos, fed', [(True, True), (0, True), (None, False), (False, False)])
def test_whether_bos_is_fed_is_what_was_asked_for(bos, fed):
    assert fed_bos('tiny', bos) is fed


@pytest.mark.parametrize('name, fed', [('with', True), ('without', False)])
def test_a_tokenizer_without_bos_feeds_none(models, name, fed):
    assert fed_bos(str(models[name]), True) is fed


@pytest.mark.parametrize('name, fed', [('with', True), ('without', False)])
def test_an_sae_says_whether_it_was_trained_with_bos(models, acts, tmp_path, name, fed):
    "In its metadata as `train_sae` writes it, and as readers take it"
    short = SAESettings(layer=1, features=64, k=4, steps=12, batch=32, context=8)
    trained = train_sae(short, str(models[name]), 16, endless(acts), tmp_path/'sae')
    assert json.loads((trained/'cfg.json').read_text())['metadata']['prepend_bos'] is fed


def test_one_training_at_a_time_in_a_folder(tmp_path):
    held = hold(tmp_path/'.lock', tmp_path)
    with pytest.raises(RuntimeError, match='another process is working on'):
        train_sae(SETTINGS, 'tiny', 16, None, tmp_path)
    held.release()


# ---- recipes

def code_of(recipe):
    "Its code cells"
    notebook = json.loads((RECIPES/f'{recipe}.ipynb').read_text(encoding='utf-8'))
    return [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']


REPLACING = ['train_sae', 'layer_saes', 'explain_gemma', 'another_width', 'build_features', 'second_writer']

@pytest.mark.parametrize('name', REPLACING)
def test_run_all_of_the_recipes_replaces_nothing_that_is_shipped(name):
    "In JupyterLab no cell is skipped: where a recipe writes to data/, a constant that is False stands before it"
    cells = code_of(name)
    assert sum(cell.count('REPLACE_SHIPPED = False') for cell in cells) == 1
    assert sum(cell.count('REPLACE_SHIPPED') for cell in cells) == 2


def test_the_recipe_trains_outside_of_the_shipped_data():
    train = next(cell for cell in code_of('train_sae') if 'REPLACE_SHIPPED = False' in cell)
    made = dict(EMBEDDED='x', SAESettings=SAESettings, Path=Path, data_dir=data_dir)
    exec(train, made)
    assert data_dir().resolve() not in Path(made['home']).resolve().parents
