"saeexplainer.saes: equality with sae-lens over kinds and normalisations, and what bad input is told"
import json
import numpy as np, pandas as pd
import pytest, torch
from helpers import hub_file, tiny_sae
from saeexplainer.saes import NORMALISED, FeatureReader, check_directions, find_sae, parse_hook

KINDS = ('standard', 'jumprelu', 'gated', 'batchtopk', 'matryoshka_batchtopk', 'topk', 'abstopk', 'matching_pursuit')
CONFIGS = [(kind, norm, dict(apply_b_dec_to_input=b)) for kind in KINDS for norm in (*NORMALISED, 'expected_average_only_in') for b in (True, False)]
CONFIGS += [(kind, 'none', dict(rescale_acts_by_decoder_norm=True)) for kind in ('topk', 'abstopk')]


@pytest.fixture(scope='module')
def resid():
    torch.manual_seed(1)
    return 3*torch.randn(3, 6, 64) + .5


def read(tmp_path, kind='jumprelu', **kw):
    folder = tiny_sae(tmp_path/'sae', kind, **kw)
    if kw.get('normalize_activations')!='expected_average_only_in': return FeatureReader.load(folder)
    (folder/'activation_scaler.json').write_text(json.dumps({'scaling_factor': .25}))
    return FeatureReader.load(folder)


def active_features(sae, x): # for each row, the feature that is most often active in it but not on every token
    rates = (sae.encode(x) != 0).float().mean(1)
    return torch.where(rates < 1, rates, 0).argmax(-1)


def complete(sae, x, features, values): # the long way: decode with the feature changed, plus the reconstruction error
    acts = sae.encode(x)
    error = x - sae.decode(acts)
    changed = sae.encode(x).clone() # a second encode: sae-lens drops the rows' scale when it decodes
    for i, f in enumerate(features): changed[i, :, f] = values[i]
    return sae.decode(changed) + error


def worst(found, wanted): # largest difference, in units of the largest activation or of 1
    return ((found - wanted).abs().max() / max(1., wanted.abs().max())).item()


def near_ties(reader, resid, features): # tokens so near a threshold that rounding may decide: excepted, and counted
    sae = reader.sae
    if sae.cfg.architecture()!='jumprelu': return torch.zeros(*resid.shape[:2], features.shape[1], dtype=torch.bool)
    pre = torch.bmm(sae.process_sae_in(resid), sae.W_enc[:, features].transpose(0, 1)) + sae.b_enc[features][:, None]
    at = sae.threshold[features][:, None]
    return (pre - at).abs() <= 1e-5*at.abs()


@pytest.mark.parametrize('kind, norm, cfg', CONFIGS)
def test_equals_sae_lens(tmp_path, resid, kind, norm, cfg, largest_error):
    reader = read(tmp_path, kind, normalize_activations=norm, **cfg)
    features = active_features(reader.sae, resid)
    full = reader.sae.encode(resid)
    assert (full != 0).any() and torch.allclose(reader.encode(resid), full)
    wanted = torch.stack([full[i, :, f] for i, f in enumerate(features)])
    read_one = reader.activations(resid, features)
    assert read_one.dtype==torch.float32 and (wanted != 0).any()
    assert largest_error('activations, one feature a row', worst(read_one, wanted)) <= 1e-4
    values = torch.tensor([5., -2., 0.])
    clamped = reader.clamp(resid, features, values)
    assert largest_error('clamp', worst(clamped, complete(reader.sae, resid, features, values))) <= 1e-4
    spliced = reader.clamp(resid, features, values, spliced=True)
    changed = reader.sae.encode(resid).clone()
    for i, f in enumerate(features): changed[i, :, f] = values[i]
    assert largest_error('clamp on the reconstruction', worst(spliced, reader.sae.decode(changed))) <= 1e-4


@pytest.mark.parametrize('kind, norm, cfg', CONFIGS)
def test_many_features_of_a_row(tmp_path, kind, norm, cfg, largest_error, counted):
    torch.manual_seed(2)
    resid = 3*torch.randn(2, 40, 64) + .5
    reader = read(tmp_path, kind, normalize_activations=norm, **cfg)
    features = torch.stack([torch.randperm(512)[:100] for _ in resid])
    full = torch.stack([acts[:, f] for acts, f in zip(reader.sae.encode(resid), features)])
    found, ties = reader.activations(resid, features), near_ties(reader, resid, features)
    assert found.shape == (2, 40, 100) and (full != 0).any()
    counted('values too near a threshold to compare', int(ties.sum()), ties.numel())
    assert ties.float().mean() < .001
    assert largest_error('activations, 100 features a row', worst(found.masked_fill(ties, 0), full.masked_fill(ties, 0))) <= 1e-4


def test_topk_encodes_only_tokens_on_which_the_feature_can_be_active(tmp_path, resid, monkeypatch):
    reader = read(tmp_path, 'topk')
    features = active_features(reader.sae, resid)
    wanted, encode, seen = reader.activations(resid, features), reader.sae.encode, []
    monkeypatch.setattr(reader.sae, 'encode', lambda x: seen.append(len(x)) or encode(x))
    assert torch.equal(reader.activations(resid, features), wanted)
    assert (wanted != 0).sum() <= sum(seen) < resid.shape[0]*resid.shape[1]
    monkeypatch.setattr('saeexplainer.saes.ENCODE_AT_ONCE', 1024) # two tokens of 512 features in a block
    seen.clear()
    assert torch.allclose(reader.activations(resid, features), wanted, atol=1e-5) and max(seen) == 2
    reader.sae.b_enc.data[features] = -1e3
    seen.clear()
    assert not reader.activations(resid, features).any() and seen == []


def test_one_index_for_all_rows_and_lists(tmp_path, resid):
    reader = read(tmp_path)
    assert torch.equal(reader.activations(resid, 5), reader.activations(resid, [5, 5, 5]))
    assert torch.equal(reader.clamp(resid, 5, 2.), reader.clamp(resid, torch.tensor([5]*3), [2., 2., 2.]))
    assert reader.directions(5).shape == (1, 64) and torch.equal(reader.directions([7, 5])[0], reader.sae.W_dec[7])
    assert (reader.layer, reader.hook, reader.d_model, reader.n_features) == (2, 'resid_post', 64, 512)


def test_directions_are_a_copy(tmp_path):
    reader = read(tmp_path)
    reader.directions([3]).zero_()
    assert reader.directions([3]).any()


def test_half_precision_files_and_inputs_are_read_in_fp32(tmp_path, resid):
    reader = read(tmp_path, dtype='bfloat16')
    assert reader.sae.W_enc.dtype==torch.float32
    half = resid.bfloat16()
    assert torch.equal(reader.activations(half, 5), reader.activations(half.float(), 5))
    assert reader.clamp(half, 5, 3.).dtype==torch.bfloat16


def test_no_gradient_reaches_the_sae(tmp_path, resid):
    reader = read(tmp_path)
    x = resid.clone().requires_grad_()
    assert not reader.activations(x, 5).requires_grad and not reader.encode(x).requires_grad and not reader.directions(5).requires_grad


def test_scale_of_the_inputs_is_folded_in(tmp_path, resid):
    folder = tiny_sae(tmp_path/'sae', normalize_activations='expected_average_only_in')
    with pytest.raises(ValueError, match='expected_average_only_in.*does not bring the factor: fold it'): FeatureReader.load(folder)
    (folder/'activation_scaler.json').write_text(json.dumps({'scaling_factor': .25}))
    plain = FeatureReader.load(tiny_sae(tmp_path/'plain'))
    folded = FeatureReader.load(folder)
    assert (folded.encode(resid) - plain.encode(.25*resid)).abs().max() < 1e-4
    assert torch.allclose(folded.directions(3), plain.directions(3)/.25)


def test_whitening_is_refused(tmp_path):
    with pytest.raises(ValueError, match='covariance_whitening'): read(tmp_path, normalize_activations='covariance_whitening')


@pytest.mark.parametrize('kind', ('transcoder', 'skip_transcoder', 'jumprelu_transcoder', 'temporal'))
def test_other_kinds_are_refused(tmp_path, kind):
    with pytest.raises(ValueError, match=f"kind '{kind}' cannot be read one feature at a time; supported: standard, jumprelu"):
        read(tmp_path, kind)


def test_training_checkpoint_is_refused(tmp_path):
    folder = tiny_sae(tmp_path/'sae')
    cfg = json.loads((folder/'cfg.json').read_text())
    (folder/'cfg.json').write_text(json.dumps({**cfg, 'architecture': 'batchtopk'}))
    with pytest.raises(ValueError, match='an SAE in training .batchtopk.: export it with sae-lens'): FeatureReader.load(folder)


@pytest.mark.parametrize('hook', ('mlp_out', 'attn_out'))
def test_other_places_are_refused(tmp_path, hook):
    with pytest.raises(ValueError, match=f'this SAE reads .blocks.2.hook_{hook}.: only SAEs on the residual stream'):
        read(tmp_path, hook=hook)


def test_hook_names():
    assert parse_hook('blocks.12.hook_resid_pre') == (12, 'resid_pre')
    for name in (None, '', 'hook_embed', 'blocks.1.attn.hook_z', 'xblocks.1.hook_resid_post'):
        with pytest.raises(ValueError, match='only SAEs on the residual stream'): parse_hook(name)


@pytest.mark.parametrize('index', (-1, 512, 10**6))
def test_index_out_of_range(tmp_path, resid, index):
    reader = read(tmp_path)
    for use in (lambda: reader.directions([0, index]), lambda: reader.activations(resid, index), lambda: reader.clamp(resid, index, 1.)):
        with pytest.raises(ValueError, match=f'there is no feature {index}: this SAE has features 0 to 511'): use()


def test_wrong_widths(tmp_path):
    reader = read(tmp_path)
    for use in (lambda x: reader.activations(x, 1), lambda x: reader.encode(x), lambda x: reader.clamp(x, 1, 1.)):
        with pytest.raises(ValueError, match='this SAE reads vectors of width 64, got 32: is it for another model'):
            use(torch.ones(1, 2, 32))
    with pytest.raises(ValueError, match='3 rows and 2 features'): reader.activations(torch.ones(3, 2, 64), [1, 2])


def test_bad_directions(tmp_path):
    reader = read(tmp_path)
    reader.sae.W_dec.data[7], reader.sae.W_dec.data[8, 3] = 0., torch.nan
    with pytest.raises(ValueError, match=r'direction 1 of 2 is zero \(a dead feature\)'): reader.directions([6, 7])
    with pytest.raises(ValueError, match='direction 0 of 1 is not finite'): reader.directions(8)
    with pytest.raises(ValueError, match='direction 0 of 1 is not finite'): check_directions([1., float('inf')], 2)
    with pytest.raises(ValueError, match='a direction has 3 components, the residual stream has 2'): check_directions(torch.ones(3), 2)


def test_where_it_comes_from(tmp_path, monkeypatch):
    folder = tiny_sae(tmp_path/'data'/'model'/'sae', card={'model_sha256': 'abc'})
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    assert find_sae('model/sae') == find_sae(folder) == folder
    assert find_sae('release:a:b') == ('release', 'a:b') and find_sae(('release', 'id')) == ('release', 'id')
    with pytest.raises(FileNotFoundError, match="no SAE in 'model/other'.*a hub SAE is written 'release:sae_id'"):
        FeatureReader.load('model/other')
    assert FeatureReader.load('model/sae').card == {'model_sha256': 'abc'}


def test_identity_of_the_weights(tmp_path):
    a, b, c = (FeatureReader.load(tiny_sae(tmp_path/n, seed=s)) for n, s in (('a', 0), ('b', 0), ('c', 1)))
    assert a.sha256 == b.sha256 != c.sha256 and a.card == {}
    assert FeatureReader(a.sae).sha256 == a.sha256 # in memory as in the file, where the file is fp32


def test_release_from_the_hub(tmp_path, monkeypatch, resid):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    repo, commit = tmp_path/'hub'/'models--acme--tiny-saes', '0'*40
    (repo/'refs').mkdir(parents=True); (repo/'refs'/'main').write_text(commit)
    folder = tiny_sae(repo/'snapshots'/commit/'layer_2', layer=2)
    local = FeatureReader.load(folder)
    for source in ('acme/tiny-saes:layer_2', ('acme/tiny-saes', 'layer_2')):
        hub = FeatureReader.load(source)
        assert torch.equal(hub.encode(resid), local.encode(resid)) and (hub.sha256, hub.card, hub.layer) == (local.sha256, {}, 2)
    with pytest.raises(ValueError, match='Release nothing not found'): FeatureReader.load('nothing:here')


def test_metadata_can_be_overridden(tmp_path):
    from saeexplainer.presets import load_preset
    folder = tiny_sae(tmp_path/'sae', hook='mlp_out', model_name='wrong', metadata={'prepend_bos': True})
    reader = FeatureReader.load(folder, hook='blocks.1.hook_resid_pre', bos=False, model='tiny')
    about = reader.sae.cfg.metadata
    assert (reader.layer, reader.hook, about.prepend_bos, about.model_name) == (1, 'resid_pre', False, 'tiny')
    preset = load_preset('smollm2-135m', sae=str(folder), layer=1, sae_hook='blocks.1.hook_resid_pre', sae_bos=False, sae_model='tiny')
    of_preset = FeatureReader.load(preset)
    assert (of_preset.layer, of_preset.hook, of_preset.sae.cfg.metadata) == (1, 'resid_pre', about)
    with pytest.raises(ValueError, match='the preset says layer 2, its SAE .* reads layer 1'): FeatureReader.load(load_preset(preset, layer=2))
    with pytest.raises(ValueError, match="this SAE reads 'layer 1': only SAEs on the residual stream"): FeatureReader.load(folder, hook='layer 1')


# ---- indices

NO_INDICES = [torch.zeros(512) > 1, np.zeros(512, bool), [True, False], True, 1.7, [1., 2.], torch.ones(3), np.float32(4), '5', ['5', '6'], None, [None], [3, None], np.array([1, 'a'], object), [2**70], {3}]


@pytest.mark.parametrize('features', NO_INDICES, ids=lambda x: str(x).replace('\n', ' ')[:30])
def test_what_is_no_index_is_refused(tmp_path, resid, features):
    reader = read(tmp_path)
    for use in (lambda: reader.directions(features), lambda: reader.activations(resid, features), lambda: reader.clamp(resid, features, 1.)):
        with pytest.raises(ValueError, match='a mask of True and False is no list of features|is no feature: features are named by whole numbers'): use()


def test_every_kind_of_index(tmp_path):
    reader = read(tmp_path)
    table = pd.DataFrame(dict(feature=range(10, 20), density=np.linspace(0, 1, 10)))
    some = table[table.density > .7]
    wanted = reader.sae.W_dec[17:20]
    for features in (some.feature, some.feature.astype('Int64'), some.feature.astype(object), some.feature.tolist(), some.feature.to_numpy(), range(17, 20), (17, 18, 19),
                     pd.Index(some.feature), torch.tensor([17, 18, 19]), np.array([17, 18, 19], np.int32), [np.int64(17), torch.tensor(18), 19]):
        assert torch.equal(reader.directions(features), wanted)
    assert reader.directions([]).shape == (0, 64)


# ---- files

def edit(folder, **values): # of cfg.json; ...: the entry goes
    cfg = json.loads((folder/'cfg.json').read_text()) | values
    (folder/'cfg.json').write_text(json.dumps({k: v for k, v in cfg.items() if v is not ...}))


@pytest.mark.parametrize('values, message', [
    (dict(d_in=...), 'd_in is None, not a number of dimensions'), (dict(d_sae='512'), "d_sae is '512', not a number"), (dict(d_in=True), 'd_in is True'), (dict(d_in=0), 'd_in is 0'),
    (dict(metadata=[1]), r'metadata is \[1\], not an object'), (dict(activation_fn_kwargs=3), 'activation_fn_kwargs is 3, not an object'),
    (dict(architecture='topk'), 'k is None, and a topk SAE needs one'), (dict(architecture='topk', k='16'), "k is '16', and a topk SAE needs one"),
    (dict(activation_fn='tanh-relu'), "activation function is 'tanh-relu', which sae-lens no longer has: it would be read as ReLU"),
    (dict(activation_fn_str='gelu'), "activation function is 'gelu'"), (dict(activation_fn='topk', activation_fn_kwargs={}), 'k is None, and a topk SAE needs one'),
    (dict(num_latents=512, expansion_factor=8), 'is of an SAE of sparsify, whose format is not read')])
def test_malformed_configurations(tmp_path, values, message):
    edit(folder := tiny_sae(tmp_path/'sae'), **values)
    with pytest.raises(ValueError, match=message) as e: FeatureReader.load(folder)
    assert str(folder/'cfg.json') in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('text', ['', '{"d_in": 6', '[]', 'null', '[1, 2]'])
def test_configurations_that_are_no_objects(tmp_path, text):
    folder = tiny_sae(tmp_path/'sae')
    (folder/'cfg.json').write_text(text)
    with pytest.raises(ValueError) as e: FeatureReader.load(folder)
    assert str(folder/'cfg.json') in str(e.value)


@pytest.mark.parametrize('values', [dict(normalize_activations='median'), dict(d_sae=400), dict(apply_b_dec_to_input='x', dtype=5, sae_lens_version=5), dict(metadata={'sae_lens_version': 'new'}), dict(architecture='gated')])
def test_what_sae_lens_refuses_is_one_line(tmp_path, values):
    edit(folder := tiny_sae(tmp_path/'sae'), **values)
    says = f"{folder}/cfg.json: apply_b_dec_to_input is 'x'" if 'apply_b_dec_to_input' in values else f"the SAE '{folder}' cannot be loaded: "
    with pytest.raises(ValueError, match=says) as e: FeatureReader.load(folder)
    assert '\n' not in str(e.value)


def old(folder, **values): # a cfg.json of 2024
    (folder/'cfg.json').write_text(json.dumps(dict(d_in=64, d_sae=512, dtype='float32', hook_name='blocks.2.hook_resid_post', architecture='jumprelu') | values))
    return folder


def test_configurations_of_2024(tmp_path, resid):
    folder = tiny_sae(tmp_path/'sae')
    wanted = FeatureReader.load(folder).encode(resid)
    for values in ({}, dict(activation_fn='relu'), dict(activation_fn_str='relu', activation_fn_kwargs={}), dict(activation_fn_kwargs=None, metadata=None)):
        assert torch.equal(FeatureReader.load(old(folder, **values)).encode(resid), wanted)
    with pytest.raises(ValueError, match='this SAE does not say where it reads .its metadata has no hook_name.*`sae_hook: blocks.6.hook_resid_post`'): FeatureReader.load(old(folder, hook_name=None))
    assert FeatureReader.load(old(folder, hook_name=None), hook='blocks.6.hook_resid_post').layer == 6


@pytest.mark.parametrize('damage, message', [(lambda b: b[:len(b)//2], 'is cut off or damaged'), (lambda b: b'', 'is empty: fetch it again'),
                                             (lambda b: b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 15\n', 'is a pointer of git-lfs.*git lfs pull')])
def test_damaged_weights(tmp_path, damage, message):
    folder = tiny_sae(tmp_path/'sae')
    file = folder/'sae_weights.safetensors'
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f'{file} {message}'): FeatureReader.load(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match='no sae_weights.safetensors: its weights are missing'): FeatureReader.load(folder)


def test_damaged_card_and_scaler(tmp_path):
    folder = tiny_sae(tmp_path/'sae', normalize_activations='expected_average_only_in')
    for text, message in (('{"scal', 'activation_scaler.json is not JSON'), ('{}', 'scaling_factor is None, not a number above 0'), ('{"scaling_factor": "2"}', "scaling_factor is '2'")):
        (folder/'activation_scaler.json').write_text(text)
        with pytest.raises(ValueError, match=message): FeatureReader.load(folder)
    (folder/'activation_scaler.json').write_text('{"scaling_factor": 2}')
    for text, message in (('{"model', 'card.json is not JSON'), ('[1]', r'card.json holds \[1\], not an object'), ('{"model_sha256": 5}', 'model_sha256 is 5, not a hash')):
        (folder/'card.json').write_text(text)
        with pytest.raises(ValueError, match=message): FeatureReader.load(folder)


def test_damaged_files_in_the_hub_cache(tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    folder = tiny_sae(hub_file(tmp_path/'hub', 'acme/tiny-saes', 'layer_2/cfg.json').parent)
    edit(folder, activation_fn='tanh-relu')
    with pytest.raises(ValueError, match="cfg.json: its activation function is 'tanh-relu'"): FeatureReader.load('acme/tiny-saes:layer_2')
    edit(folder, activation_fn=...)
    (folder/'sae_weights.safetensors').write_bytes(b'')
    with pytest.raises(ValueError, match='sae_weights.safetensors is empty: fetch it again'): FeatureReader.load('acme/tiny-saes:layer_2')
    (folder/'cfg.json').write_text('{"d_in": ')
    with pytest.raises(ValueError, match='cfg.json is not JSON'): FeatureReader.load('acme/tiny-saes:layer_2')
    for source in ('gpt2-small-res-jb:nowhere', 'two words:x'):
        with pytest.raises(ValueError) as e: FeatureReader.load(source)
        assert '\n' not in str(e.value)


def test_modules_as_hook_names(tmp_path):
    for name, wanted in {'model.layers.2': (2, 'resid_post'), 'model.language_model.layers.11': (11, 'resid_post'), 'transformer.h.3': (3, 'resid_post'), 'gpt_neox.layers.5.output': (5, 'resid_post'),
                         'model.layers.0.input': (0, 'resid_pre')}.items(): assert parse_hook(name) == wanted
    for name in ('model.layers.2.mlp', 'model.layers.2.self_attn.o_proj.input', 'model.layers.3.post_feedforward_layernorm.output', 'vision_tower.encoder.layers.1', 'encoder.layers.2', 5):
        with pytest.raises(ValueError, match='only SAEs on the residual stream.*`sae_hook: blocks.6.hook_resid_post`'): parse_hook(name)
    folder = tiny_sae(tmp_path/'sae')
    edit(folder, metadata={'hook_name': 'model.layers.1', 'sae_lens_version': '6.54.12'})
    assert (FeatureReader.load(folder).layer, FeatureReader.load(folder).hook) == (1, 'resid_post')
    edit(folder, metadata={'hf_hook_name': 'model.layers.3.output', 'sae_lens_version': '6.54.12'})
    assert FeatureReader.load(folder).layer == 3


@pytest.mark.parametrize('value', ['false', 0, 1, []])
def test_prepend_bos_is_true_or_false(tmp_path, value):
    folder = tiny_sae(tmp_path/'sae', metadata={'prepend_bos': value})
    with pytest.raises(ValueError, match="prepend_bos .* neither true nor false: `sae_bos` in the preset says which"): FeatureReader.load(folder)
    assert FeatureReader.load(folder, bos=False).sae.cfg.metadata.prepend_bos is False


def test_home_directory_in_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    folder = tiny_sae(tmp_path/'sae')
    assert find_sae('~/sae') == folder and FeatureReader.load('~/sae').layer == 2


def test_truth_values_among_indices_and_topk_that_would_be_relu(tmp_path):
    reader = FeatureReader.load(tiny_sae(tmp_path/'a', architecture='standard'))
    for features in ([True, 2], [1, np.bool_(False)], (torch.tensor(True), torch.tensor(2))):
        with pytest.raises(ValueError, match='is no list of features'): reader.directions(features)
    with pytest.raises(ValueError, match='is no feature'): reader.directions(torch.tensor([1.], dtype=torch.bfloat16))
    cfg = json.loads((tmp_path/'a'/'cfg.json').read_text())
    (tmp_path/'a'/'cfg.json').write_text(json.dumps(cfg | dict(activation_fn='topk', activation_fn_kwargs={'k': 4})))
    with pytest.raises(ValueError, match='describes a topk SAE, which sae-lens reads as standard'): FeatureReader.load(tmp_path/'a')


# ---- what sae-lens passes over

ABOUT = dict(hook_name='blocks.1.hook_resid_pre', model_name='tiny', prepend_bos=False, model_from_pretrained_kwargs={'center_writing_weights': True})


@pytest.mark.parametrize('version', [{}, dict(sae_lens_version=None), dict(sae_lens_version='5.9.0')])
def test_metadata_without_a_version_counts(tmp_path, version, resid):
    "sae-lens takes a configuration without a version for one of before 6, and drops its metadata"
    folder = tiny_sae(tmp_path/'sae')
    edit(folder, metadata=ABOUT | dict(sae_lens_version='6.54.12'))
    wanted = FeatureReader.load(folder)
    edit(folder, metadata=ABOUT | version)
    reader = FeatureReader.load(folder)
    about = reader.sae.cfg.metadata
    assert (reader.layer, reader.hook, about.model_name, about.prepend_bos) == (1, 'resid_pre', 'tiny', False)
    assert torch.equal(reader.encode(resid), wanted.encode(resid))
    assert not torch.equal(reader.encode(resid + 1), reader.sae.encode(resid + 1)) # the mean is taken off


def test_metadata_without_a_version_counts_in_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    folder = tiny_sae(hub_file(tmp_path/'hub', 'acme/tiny-saes', 'layer_2/cfg.json').parent)
    edit(folder, metadata=ABOUT)
    reader = FeatureReader.load('acme/tiny-saes:layer_2')
    assert (reader.layer, reader.hook, reader.sae.cfg.metadata.prepend_bos) == (1, 'resid_pre', False)
    spoil(folder, 'threshold', torch.nan)
    with pytest.raises(ValueError, match=f'{folder}/sae_weights.safetensors: threshold is not finite'): FeatureReader.load('acme/tiny-saes:layer_2')


def spoil(folder, name, value): # one number of a tensor
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder/'sae_weights.safetensors')
    tensors[name].flatten()[3] = value
    save_file(tensors, folder/'sae_weights.safetensors')


@pytest.mark.parametrize('kind, names', [('jumprelu', ['threshold', 'W_enc', 'b_enc', 'W_dec', 'b_dec']), ('gated', ['r_mag', 'b_gate', 'b_mag']), ('topk', ['b_enc']), ('matching_pursuit', ['W_dec'])])
def test_numbers_that_are_not_finite_are_refused(tmp_path, kind, names):
    for name in names:
        for value in (torch.nan, torch.inf, -torch.inf):
            spoil(folder := tiny_sae(tmp_path/'sae', kind), name, value)
            with pytest.raises(ValueError, match=f'{folder}/sae_weights.safetensors: {name} is not finite'): FeatureReader.load(folder)


@pytest.mark.parametrize('text', ['Infinity', 'NaN', '-Infinity', '1e400', '0', '-2', 'true', '1e39', '1' + '0'*400])
def test_scaling_factors_that_are_no_factors(tmp_path, text):
    folder = tiny_sae(tmp_path/'sae', normalize_activations='expected_average_only_in')
    (folder/'activation_scaler.json').write_text('{"scaling_factor": %s}' % text)
    with pytest.raises(ValueError, match=f'{folder}/activation_scaler.json: scaling_factor is .*, not a number above 0'): FeatureReader.load(folder)


def test_a_scaling_factor_that_the_weights_cannot_take_up(tmp_path):
    folder = tiny_sae(tmp_path/'sae', normalize_activations='expected_average_only_in')
    (folder/'activation_scaler.json').write_text('{"scaling_factor": 1e-42}')
    with pytest.raises(ValueError, match=f'{folder}/activation_scaler.json: with scaling_factor 1e-42 (b|W)_dec is not finite'): FeatureReader.load(folder)


@pytest.mark.parametrize('kind, values, says', [
    ('jumprelu', dict(metadata={'model_from_pretrained_kwargs': [1]}), r'model_from_pretrained_kwargs is \[1\], not an object'),
    ('jumprelu', dict(model_from_pretrained_kwargs='center'), "model_from_pretrained_kwargs is 'center', not an object"),
    ('jumprelu', dict(metadata={'model_from_pretrained_kwargs': {'center_writing_weights': 'false'}}), "center_writing_weights is 'false', neither true nor false"),
    ('jumprelu', dict(metadata={'model_from_pretrained_kwargs': {'center_writing_weights': 1}}), 'center_writing_weights is 1, neither true nor false'),
    ('jumprelu', dict(rescale_acts_by_decoder_norm=True), 'rescale_acts_by_decoder_norm is true, which sae-lens does not do in a jumprelu SAE'),
    ('matching_pursuit', dict(residual_threshold='x'), "residual_threshold is 'x', not a number from 0"), ('matching_pursuit', dict(residual_threshold=float('nan')), 'residual_threshold is nan'),
    ('matching_pursuit', dict(residual_threshold=-1), 'residual_threshold is -1, not a number'), ('matching_pursuit', dict(max_iterations=0), 'max_iterations is 0, not a number of features'),
    ('matching_pursuit', dict(max_iterations=2.5), 'max_iterations is 2.5'), ('matching_pursuit', dict(stop_on_duplicate_support='no'), "stop_on_duplicate_support is 'no', neither true nor false"),
    ('topk', dict(k=513), 'k is 513, more than its 512 features'), ('topk', dict(k=True), 'k is True, and a topk SAE needs one'),
    ('topk', dict(k=16, activation_fn_kwargs={'k': 4}), 'k is 16, and in its activation_fn_kwargs 4: only one of them can be right'),
    ('topk', dict(k=..., activation_fn_kwargs={'k': 4}), 'k is 4 in its activation_fn_kwargs, and sae-lens reads 100: write it as k')])
def test_settings_that_mean_nothing(tmp_path, kind, values, says):
    edit(folder := tiny_sae(tmp_path/'sae', kind), **values)
    with pytest.raises(ValueError, match=f'{folder}/cfg.json: {says}'): FeatureReader.load(folder)


@pytest.mark.parametrize('features', [
    np.ma.masked_array([1, 2, 3], [0, 1, 0]), np.ma.masked_array([1, 2]), np.array([1, 2], 'timedelta64[s]'), pd.to_timedelta([1, 2]), [np.timedelta64(3, 's')], np.array([1, 2], 'datetime64[s]'),
    torch.tensor([0, 3, 0]).to_sparse(), torch.tensor([[0, 3], [1, 0]]).to_sparse_csr(), torch.empty(3, device='meta', dtype=torch.long), torch.tensor([1 + 0j]), np.array([2**63], np.uint64), [[1, 2], [3]],
    pd.Series([1, None, 3], dtype='Int64'), {3: 1}, b'5', (x for x in (1, 2))], ids=lambda f: type(f).__name__)
def test_arrays_that_are_no_indices(tmp_path, resid, features):
    reader = read(tmp_path)
    for use in (lambda: reader.directions(features), lambda: reader.activations(resid, features), lambda: reader.clamp(resid, features, 1.)):
        with pytest.raises(ValueError, match='is no list of features|is no feature: features are named by whole numbers') as e: use()
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('source', [None, 5, b'x', {}, True, (), ['a'], ('a', 'b', 'c'), ('a', None), ('', 'x')], ids=str)
def test_what_names_no_sae(source):
    for use in (find_sae, FeatureReader.load):
        with pytest.raises(ValueError, match='names no SAE'): use(source)


@pytest.mark.parametrize('source', ['', ':', 'a:', ':x', '  :x', '.'])
def test_texts_that_name_no_sae(source):
    for use in (find_sae, FeatureReader.load):
        with pytest.raises(FileNotFoundError, match='no SAE in .*a hub SAE is written'): use(source)


def test_weights_that_may_not_be_read(tmp_path, monkeypatch):
    import os
    folder = tiny_sae(tmp_path/'sae')
    access, closed = os.access, str(folder/'sae_weights.safetensors')
    with monkeypatch.context() as patch:
        patch.setattr(os, 'access', lambda file, mode: str(file) != closed and access(file, mode))
        with pytest.raises(PermissionError, match=f'{closed} may not be read by this user'): FeatureReader.load(folder)
    (folder/'sae_weights.safetensors').unlink()
    (folder/'sae_weights.safetensors').mkdir()
    with pytest.raises(IsADirectoryError, match=f'{closed} is a folder, not a file'): FeatureReader.load(folder)


def test_a_topk_that_does_not_say_so_is_not_read_as_relu(tmp_path, resid):
    folder = tiny_sae(tmp_path/'sae', 'topk', k=4)
    wanted = FeatureReader.load(folder).encode(resid)
    about = {'hook_name': 'blocks.2.hook_resid_post'}
    edit(folder, metadata=about, activation_fn_kwargs={}) # of no version
    assert torch.equal(FeatureReader.load(folder).encode(resid), wanted)
    for architecture in (None, ..., 'standard'):
        edit(folder, architecture=architecture)
        with pytest.raises(ValueError, match=f'{folder}/cfg.json: k is 4, and a standard SAE has none: name its architecture'): FeatureReader.load(folder)


@pytest.mark.parametrize('values, says', [(dict(architecture='nosuch'), "SAEs of kind 'nosuch' cannot be read"), (dict(architecture='batchtopk'), 'holds an SAE in training'), (dict(reshape_activations='hook_q'), 'reshapes its input'),
                                          (dict(normalize_activations='expected_average_only_in'), 'expects inputs normalised by'), (dict(metadata={'hook_name': 'hook_embed', 'sae_lens_version': '6.54.12'}), "this SAE reads 'hook_embed'"),
                                          (dict(metadata={'prepend_bos': 'no', 'sae_lens_version': '6.54.12'}), 'does not say where it reads')])
def test_what_is_wrong_names_the_sae(tmp_path, values, says):
    edit(folder := tiny_sae(tmp_path/'sae'), **values)
    with pytest.raises(ValueError, match=f"the SAE '{folder}': .*{says}"): FeatureReader.load(folder)
