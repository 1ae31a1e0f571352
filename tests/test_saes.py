"saeexplainer.saes: equality with sae-lens over kinds and normalisations, and features by any kind of index"
import json
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_sae
from saeexplainer.saes import NORMALISED, FeatureReader, check_directions, find_sae

KINDS = ('standard', 'jumprelu', 'gated', 'batchtopk', 'matryoshka_batchtopk', 'topk', 'abstopk', 'matching_pursuit')
NORMS = (*NORMALISED, 'expected_average_only_in')
CONFIGS = [(kind, norm, dict(apply_b_dec_to_input=b)) for kind in KINDS for norm in NORMS for b in (True, False)]
CONFIGS += [(kind, 'none', dict(rescale_acts_by_decoder_norm=True)) for kind in ('topk', 'abstopk')]


@pytest.fixture(scope='module')
def resid():
    torch.manual_seed(1)
    return 3*torch.randn(3, 6, 64) + .5


def read(folder, kind='jumprelu', **settings):
    "A tiny SAE, with the scale of its inputs where it needs one"
    folder = tiny_sae(folder/'sae', kind, **settings)
    if settings.get('normalize_activations') == 'expected_average_only_in':
        (folder/'activation_scaler.json').write_text(json.dumps({'scaling_factor': .25}))
    return FeatureReader.load(folder)


@pytest.fixture(scope='module')
def reader(tmp_path_factory):
    "A JumpReLU SAE that no test changes"
    return read(tmp_path_factory.mktemp('jumprelu'))


# ---- equal to sae-lens

def active_features(sae, resid):
    "For each row, the feature that is most often active in it but not on every token"
    rates = (sae.encode(resid) != 0).float().mean(1)
    return torch.where(rates < 1, rates, 0).argmax(-1)


def decoded(sae, resid, features, values):
    "The long way: encode, change the features, decode"
    acts = sae.encode(resid).clone()
    for row, feature, value in zip(acts, features, values): row[:, feature] = value
    return sae.decode(acts)


def error_of(sae, resid):
    "What the reconstruction leaves out"
    return resid - sae.decode(sae.encode(resid))


def worst(found, wanted): # largest difference, in units of the largest activation or of 1
    return ((found - wanted).abs().max()/max(1., wanted.abs().max())).item()


@pytest.mark.parametrize('kind, norm, cfg', CONFIGS)
def test_equals_sae_lens(tmp_path, resid, kind, norm, cfg, largest_error):
    reader = read(tmp_path, kind, normalize_activations=norm, **cfg)
    sae = reader.sae
    features = active_features(sae, resid)
    values = torch.tensor([5., -2., 0.])
    full = sae.encode(resid)
    assert (full != 0).any()
    assert torch.allclose(reader.encode(resid), full)
    wanted = torch.stack([row[:, feature] for row, feature in zip(full, features)])
    found = reader.activations(resid, features)
    assert found.dtype == torch.float32
    assert (wanted != 0).any()
    assert largest_error('activations, one feature a row', worst(found, wanted)) <= 1e-4
    spliced_wanted = decoded(sae, resid, features, values)
    clamped = reader.clamp(resid, features, values)
    spliced = reader.clamp(resid, features, values, spliced=True)
    # each decodes what it has encoded itself: sae-lens drops the rows' scale when it decodes
    assert largest_error('clamp', worst(clamped, error_of(sae, resid) + spliced_wanted)) <= 1e-4
    assert largest_error('clamp on the reconstruction', worst(spliced, spliced_wanted)) <= 1e-4


def near_ties(reader, resid, features):
    "Tokens so near a threshold that rounding may decide: excepted, and counted"
    sae = reader.sae
    if sae.cfg.architecture() != 'jumprelu':
        return torch.zeros(*resid.shape[:2], features.shape[1], dtype=torch.bool)
    columns = sae.W_enc[:, features].transpose(0, 1)
    pre = torch.bmm(sae.process_sae_in(resid), columns) + sae.b_enc[features][:, None]
    threshold = sae.threshold[features][:, None]
    return (pre - threshold).abs() <= 1e-5*threshold.abs()


@pytest.mark.parametrize('kind, norm, cfg', CONFIGS)
def test_many_features_of_a_row(tmp_path, kind, norm, cfg, largest_error, counted):
    torch.manual_seed(2)
    resid = 3*torch.randn(2, 40, 64) + .5
    reader = read(tmp_path, kind, normalize_activations=norm, **cfg)
    features = torch.stack([torch.randperm(512)[:100] for _ in resid])
    wanted = torch.stack([acts[:, row] for acts, row in zip(reader.sae.encode(resid), features)])
    found = reader.activations(resid, features)
    assert found.shape == (2, 40, 100)
    assert (wanted != 0).any()
    ties = near_ties(reader, resid, features)
    counted('values too near a threshold to compare', int(ties.sum()), ties.numel())
    assert ties.float().mean() < .001
    error = worst(found.masked_fill(ties, 0), wanted.masked_fill(ties, 0))
    assert largest_error('activations, 100 features a row', error) <= 1e-4


# ---- TopK: only tokens on which the features can be active are encoded

@pytest.fixture
def topk(tmp_path): return read(tmp_path, 'topk')


@pytest.fixture
def seen(topk, monkeypatch):
    "Tokens of each call of the SAE's own encoder"
    sizes = []
    encode = topk.sae.encode
    def watched(resid):
        sizes.append(len(resid))
        return encode(resid)
    monkeypatch.setattr(topk.sae, 'encode', watched)
    return sizes


def test_topk_encodes_few_tokens(topk, resid, seen):
    features = active_features(topk.sae, resid)
    wanted = torch.stack([row[:, f] for row, f in zip(topk.sae.encode(resid), features)])
    seen.clear()
    assert torch.allclose(topk.activations(resid, features), wanted, atol=1e-5)
    assert sum(seen) >= (wanted != 0).sum()
    assert sum(seen) < resid.shape[0]*resid.shape[1]


def test_topk_encodes_in_blocks(topk, resid, seen, monkeypatch):
    "Two tokens of 512 features in a block"
    features = active_features(topk.sae, resid)
    wanted = topk.activations(resid, features)
    monkeypatch.setattr('saeexplainer.saes.ENCODE_AT_ONCE', 1024)
    seen.clear()
    assert torch.allclose(topk.activations(resid, features), wanted, atol=1e-5)
    assert max(seen) == 2


def test_topk_encodes_nothing_for_features_that_cannot_be_active(topk, resid, seen):
    features = active_features(topk.sae, resid)
    topk.sae.b_enc.data[features] = -1e3
    seen.clear()
    assert not topk.activations(resid, features).any()
    assert seen == []


# ---- what is read

def test_one_index_for_all_rows_and_lists(reader, resid):
    assert torch.equal(reader.activations(resid, 5), reader.activations(resid, [5, 5, 5]))
    one = reader.clamp(resid, 5, 2.)
    assert torch.equal(reader.clamp(resid, torch.tensor([5]*3), [2., 2., 2.]), one)


def test_directions_are_those_of_the_decoder(reader):
    assert reader.directions(5).shape == (1, 64)
    assert torch.equal(reader.directions([7, 5])[0], reader.sae.W_dec[7])


def test_an_sae_has_a_place_and_sizes(reader):
    assert (reader.layer, reader.hook, reader.d_model, reader.n_features) == (2, 'resid_post', 64, 512)


def test_encoders_are_those_of_the_encoder(reader):
    assert torch.equal(reader.encoders([7, 5]), reader.sae.W_enc[:, [7, 5]].T)
    assert not reader.encoders(5).requires_grad
    with pytest.raises(ValueError, match='is no feature'): reader.encoders([0, .5])


def test_a_feature_without_an_encoder_has_its_decoders_direction(tmp_path):
    broken = read(tmp_path)
    before = broken.encoders([5])
    broken.sae.W_enc.data[:, 3] = 0
    broken.sae.W_enc.data[:, 4] = float('nan')
    assert torch.equal(broken.encoders([3, 4]), broken.directions([3, 4]))
    assert torch.equal(broken.encoders([5]), before)


def test_an_sae_without_an_encoder(tmp_path):
    pursuit = read(tmp_path, 'matching_pursuit')
    assert torch.equal(pursuit.encoders([5]), pursuit.directions([5]))


def test_directions_are_a_copy(reader):
    reader.directions([3]).zero_()
    assert reader.directions([3]).any()


def test_half_precision_files_and_inputs_are_read_in_fp32(tmp_path, resid):
    reader = read(tmp_path, dtype='bfloat16')
    half = resid.bfloat16()
    assert reader.sae.W_enc.dtype == torch.float32
    assert torch.equal(reader.activations(half, 5), reader.activations(half.float(), 5))
    assert reader.clamp(half, 5, 3.).dtype == torch.bfloat16


def test_no_gradient_reaches_the_sae(reader, resid):
    resid = resid.clone().requires_grad_()
    assert not reader.activations(resid, 5).requires_grad
    assert not reader.encode(resid).requires_grad
    assert not reader.directions(5).requires_grad


def test_scale_of_the_inputs_is_folded_in(tmp_path, resid):
    plain = FeatureReader.load(tiny_sae(tmp_path/'plain'))
    folded = read(tmp_path, normalize_activations='expected_average_only_in')
    assert (folded.encode(resid) - plain.encode(.25*resid)).abs().max() < 1e-4
    assert torch.allclose(folded.directions(3), plain.directions(3)/.25)


def test_a_scale_that_is_missing(tmp_path):
    folder = tiny_sae(tmp_path/'sae', normalize_activations='expected_average_only_in')
    with pytest.raises(ValueError, match='expected_average_only_in.*does not bring the factor: fold it'):
        FeatureReader.load(folder)


# ---- SAEs that are not read

def test_whitening_is_refused(tmp_path):
    with pytest.raises(ValueError, match='covariance_whitening'):
        read(tmp_path, normalize_activations='covariance_whitening')


def test_other_kinds_are_refused(tmp_path):
    says = "kind 'temporal' cannot be read one feature at a time; supported: standard, jumprelu"
    with pytest.raises(ValueError, match=says): read(tmp_path, 'temporal')


# ---- indices

def uses(reader, resid, features):
    "Calls that take features, by name"
    return {
        'directions': lambda: reader.directions(features),
        'activations': lambda: reader.activations(resid, features),
        'clamp': lambda: reader.clamp(resid, features, 1.)}.values()


@pytest.mark.parametrize('index', (-1, 512, 10**6))
def test_index_out_of_range(reader, resid, index):
    says = f'there is no feature {index}: this SAE has features 0 to 511'
    for use in uses(reader, resid, index):
        with pytest.raises(ValueError, match=says): use()
    with pytest.raises(ValueError, match=says): reader.directions([0, index])


NO_INDICES = [
    torch.zeros(512) > 1,
    np.zeros(512, bool),
    [True, False],
    [True, 2],
    [1, np.bool_(False)],
    (torch.tensor(True), torch.tensor(2)),
    True,
    1.7,
    [1., 2.],
    torch.ones(3),
    torch.tensor([1.], dtype=torch.bfloat16),
    np.float32(4),
    '5',
    ['5', '6'],
    b'5',
    None,
    [None],
    [3, None],
    np.array([1, 'a'], object),
    [2**70],
    np.array([2**63], np.uint64),
    [[1, 2], [3]],
    {3},
    {3: 1},
    (x for x in (1, 2)),
    pd.Series([1, None, 3], dtype='Int64'),
    np.ma.masked_array([1, 2, 3], [0, 1, 0]),
    np.ma.masked_array([1, 2]),
    np.array([1, 2], 'timedelta64[s]'),
    pd.to_timedelta([1, 2]),
    [np.timedelta64(3, 's')],
    np.array([1, 2], 'datetime64[s]'),
    torch.tensor([0, 3, 0]).to_sparse(),
    torch.tensor([[0, 3], [1, 0]]).to_sparse_csr(),
    torch.empty(3, device='meta', dtype=torch.long),
    torch.tensor([1 + 0j]),
]


@pytest.mark.parametrize('features', NO_INDICES, ids=lambda x: f'{type(x).__name__} {str(x)[:24]}'.replace('\n', ' '))
def test_what_is_no_index_is_refused(reader, resid, features):
    says = 'is no list of features|is no feature: features are named by whole numbers'
    for use in uses(reader, resid, features):
        with pytest.raises(ValueError, match=says) as raised: use()
        assert '\n' not in str(raised.value)


MASKS = [torch.zeros(512) > 1, np.zeros(512, bool), [True, False]]


TRUTHS = [[True, 2], [1, np.bool_(False)], (torch.tensor(True), torch.tensor(2))] # among indices


@pytest.mark.parametrize('features', TRUTHS, ids=str)
def test_truth_values_among_indices(reader, features):
    with pytest.raises(ValueError, match='is no list of features'): reader.directions(features)


def test_a_number_that_is_not_whole_is_no_feature(reader):
    half = torch.tensor([1.], dtype=torch.bfloat16)
    with pytest.raises(ValueError, match='is no feature'): reader.directions(half)


@pytest.mark.parametrize('mask', MASKS, ids=['torch', 'numpy', 'list'])
def test_a_mask_is_no_list_of_features(reader, mask):
    with pytest.raises(ValueError, match='a mask of True and False is no list of features'):
        reader.directions(mask)


COLUMN = pd.DataFrame(dict(feature=range(10, 20))).iloc[7:].feature # with an index of its own
INDICES = [
    COLUMN,
    COLUMN.astype('Int64'),
    COLUMN.astype(object),
    COLUMN.tolist(),
    COLUMN.to_numpy(),
    pd.Index(COLUMN),
    range(17, 20),
    (17, 18, 19),
    torch.tensor([17, 18, 19]),
    np.array([17, 18, 19], np.int32),
    [np.int64(17), torch.tensor(18), 19],
]


@pytest.mark.parametrize('features', INDICES, ids=lambda x: f'{type(x).__name__} {getattr(x, "dtype", "")}')
def test_every_kind_of_index(reader, features):
    assert torch.equal(reader.directions(features), reader.sae.W_dec[17:20])


def test_no_features(reader):
    assert reader.directions([]).shape == (0, 64)


# ---- inputs and directions that are wrong

def test_wrong_widths(reader):
    narrow = torch.ones(1, 2, 32)
    says = 'this SAE reads vectors of width 64, got 32: is it for another model'
    with pytest.raises(ValueError, match=says): reader.activations(narrow, 1)
    with pytest.raises(ValueError, match=says): reader.encode(narrow)
    with pytest.raises(ValueError, match=says): reader.clamp(narrow, 1, 1.)


def test_as_many_features_as_rows(reader):
    with pytest.raises(ValueError, match='3 rows and 2 features'):
        reader.activations(torch.ones(3, 2, 64), [1, 2])


def test_directions_of_dead_and_damaged_features(tmp_path):
    reader = read(tmp_path)
    reader.sae.W_dec.data[7] = 0.
    reader.sae.W_dec.data[8, 3] = torch.nan
    with pytest.raises(ValueError, match=r'direction 1 of 2 is zero \(a dead feature\)'):
        reader.directions([6, 7])
    with pytest.raises(ValueError, match='direction 0 of 1 is not finite'): reader.directions(8)


@pytest.mark.parametrize('directions, says', [
    ([1., float('inf')], 'direction 0 of 1 is not finite'),
    (torch.ones(3), 'a direction has 3 components, the residual stream has 2'),
])
def test_directions_that_are_none(directions, says):
    with pytest.raises(ValueError, match=says): check_directions(directions, 2)


# ---- names of SAEs

NO_NAMES = [None, 5, b'x', {}, True, (), ['a'], ('a', 'b', 'c'), ('a', None), ('', 'x')]


@pytest.mark.parametrize('source', NO_NAMES, ids=str)
@pytest.mark.parametrize('use', [find_sae, FeatureReader.load])
def test_what_names_no_sae(source, use):
    with pytest.raises(ValueError, match='names no SAE'): use(source)


@pytest.mark.parametrize('source', ['', ':', 'a:', ':x', '  :x', '.'])
@pytest.mark.parametrize('use', [find_sae, FeatureReader.load])
def test_texts_that_name_no_sae(source, use):
    with pytest.raises(FileNotFoundError, match='no SAE in .*a hub SAE is written'): use(source)


def test_where_it_comes_from(tmp_path, monkeypatch):
    folder = tiny_sae(tmp_path/'data'/'model'/'sae', card={'model_sha256': 'abc'})
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    assert find_sae('model/sae') == folder
    assert find_sae(folder) == folder
    assert FeatureReader.load('model/sae').card == {'model_sha256': 'abc'}
    with pytest.raises(FileNotFoundError, match="no SAE in 'model/other'.*a hub SAE is written 'release:sae_id'"):
        FeatureReader.load('model/other')


def test_names_of_the_hub():
    assert find_sae('release:a:b') == ('release', 'a:b')
    assert find_sae(('release', 'id')) == ('release', 'id')


def test_home_directory_in_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    folder = tiny_sae(tmp_path/'sae')
    assert find_sae('~/sae') == folder
    assert FeatureReader.load('~/sae').layer == 2


def test_identity_of_the_weights(tmp_path):
    first, same, other = (FeatureReader.load(tiny_sae(tmp_path/f'{i}', seed=seed)) for i, seed in enumerate((0, 0, 1)))
    assert first.card == {}
    assert first.sha256 == same.sha256
    assert first.sha256 != other.sha256
    assert FeatureReader(first.sae).sha256 == first.sha256 # in memory as in the file, where the file is fp32
