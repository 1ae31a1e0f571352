"saeexplainer.saes: equality with sae-lens over kinds and normalisations, and what bad input is told"
import json
import pytest, torch
from helpers import tiny_sae
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
