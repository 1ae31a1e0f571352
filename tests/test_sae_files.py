"Files of SAEs: configurations of every age, weights and cards that are damaged, the cache of the hub"
import json
import os
from pathlib import Path
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from helpers import hub_file, tiny_sae
from saeexplainer.lm.models import weights_sha256
from saeexplainer.presets import load_preset
from saeexplainer.saes import FeatureReader

VERSION = '6.54.12' # of sae-lens, as it writes it


@pytest.fixture(scope='module')
def resid():
    torch.manual_seed(1)
    return 3*torch.randn(3, 6, 64) + .5


@pytest.fixture
def folder(tmp_path):
    "A JumpReLU SAE"
    return tiny_sae(tmp_path/'sae')


def edit(folder, **values):
    "Change entries of cfg.json; ...: the entry goes"
    file = folder/'cfg.json'
    cfg = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in cfg.items() if value is not ...}))


def spoil(folder, name, value):
    "Change one number of a tensor"
    file = folder/'sae_weights.safetensors'
    tensors = load_file(file)
    tensors[name].flatten()[3] = value
    save_file(tensors, file)


# ---- configurations that are wrong

@pytest.mark.parametrize('text', ['', '{"d_in": 6', '[]', 'null', '[1, 2]'])
def test_configurations_that_are_no_objects(folder, text):
    (folder/'cfg.json').write_text(text)
    with pytest.raises(ValueError) as raised: FeatureReader.load(folder)
    assert str(folder/'cfg.json') in str(raised.value)


@pytest.mark.parametrize('values, says', [
    (dict(d_in=...), 'd_in is None, not a number of dimensions'),
    (dict(d_in=True), 'd_in is True'),
    (dict(d_in=0), 'd_in is 0'),
    (dict(d_sae='512'), "d_sae is '512', not a number"),
    (dict(metadata=[1]), r'metadata is \[1\], not an object'),
    (dict(activation_fn_kwargs=3), 'activation_fn_kwargs is 3, not an object'),
    (dict(architecture='topk'), 'k is None, and a topk SAE needs one'),
    (dict(architecture='topk', k='16'), "k is '16', and a topk SAE needs one"),
    (dict(activation_fn='topk', activation_fn_kwargs={}), 'k is None, and a topk SAE needs one'),
    (dict(activation_fn='tanh-relu'),
     "activation function is 'tanh-relu', which sae-lens no longer has: it would be read as ReLU"),
    (dict(activation_fn_str='gelu'), "activation function is 'gelu'"),
])
def test_malformed_configurations(folder, values, says):
    edit(folder, **values)
    with pytest.raises(ValueError, match=says) as raised: FeatureReader.load(folder)
    assert str(folder/'cfg.json') in str(raised.value)
    assert '\n' not in str(raised.value)


def sparsify_folder(folder, name='layers.2', **fields):
    "An SAE as sparsify writes it, and its tensors"
    torch.manual_seed(0)
    tensors = {'encoder.weight': torch.randn(128, 64)/8, 'encoder.bias': .1*torch.randn(128),
               'W_dec': torch.randn(128, 64)/8, 'b_dec': .1*torch.randn(64)}
    (folder/name).mkdir(parents=True)
    save_file(tensors, folder/name/'sae.safetensors')
    own = dict(activation='topk', expansion_factor=2, normalize_decoder=True, num_latents=0, k=9, multi_topk=False,
               skip_connection=False, transcode=False, d_in=64)
    (folder/name/'cfg.json').write_text(json.dumps(own | fields))
    return folder/name, tensors


@pytest.mark.parametrize('name, place', [
    ('layers.2', (2, 'resid_post')), ('layers.5.mlp', (5, 'mlp.output')), ('h.3', (3, 'resid_post'))])
def test_an_sae_of_sparsify(tmp_path, name, place):
    folder, tensors = sparsify_folder(tmp_path, name)
    reader = FeatureReader.load(folder)
    assert reader.reads == place
    x = torch.randn(2, 7, 64)
    pre = (x - tensors['b_dec']) @ tensors['encoder.weight'].T + tensors['encoder.bias']
    best = pre.topk(9, dim=-1)
    wanted = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    assert torch.allclose(reader.activations(x, [3, 77]), wanted[[0, 1], :, [3, 77]], atol=1e-5)
    assert torch.equal(reader.directions(5), tensors['W_dec'][[5]])
    assert reader.sha256 == weights_sha256(folder, 'sae.safetensors')


@pytest.mark.parametrize('values, says', [
    (dict(transcode=True), 'transcode is True, and only its plain TopK SAEs can be read'),
    (dict(activation='groupmax'), "activation is 'groupmax', and only topk can be read"),
    (dict(k=0), 'k is 0, not a number above 0'),
    (dict(k=129), 'k is 129, more than its 128 features'),
    (dict(num_latents=100), r'encoder.weight is \(128, 64\), not \(100, 64\)'),
])
def test_what_of_sparsify_is_refused(tmp_path, values, says):
    folder, _ = sparsify_folder(tmp_path, **values)
    with pytest.raises(ValueError, match=says): FeatureReader.load(folder)


BARE = ('JumpReluAutoEncoder', 'MatryoshkaBatchTopKSAE') # with matrices instead of linear layers

def dictionary_learning_folder(folder, kind, **fields):
    "A dictionary as dictionary_learning writes it, and its tensors"
    torch.manual_seed(0)
    stored = {'encoder.weight': torch.randn(128, 64)/8, 'decoder.weight': torch.randn(64, 128)/8,
              'encoder.bias': .1*torch.randn(128), 'b_dec': .1*torch.randn(64)}
    if kind == 'AutoEncoder': stored['bias'] = stored.pop('b_dec')
    if kind in BARE: stored |= dict(W_enc=stored['encoder.weight'].T, W_dec=stored['decoder.weight'].T)
    if kind == 'AutoEncoderTopK': stored |= dict(k=torch.tensor(9), threshold=torch.tensor(.3))
    if kind in ('BatchTopKSAE', *BARE): stored['threshold'] = torch.tensor(.4)
    if kind == 'GatedAutoEncoder':
        stored |= {name: .1*torch.randn(128) for name in ('r_mag', 'gate_bias', 'mag_bias')}
        del stored['encoder.bias']
    trainer = dict(dict_class=kind, activation_dim=64, dict_size=128, k=9, layer=2, lm_name='org/tiny',
                   submodule_name='resid_post_layer_2')
    (folder/'config.json').write_text(json.dumps(dict(trainer=trainer | fields, buffer=dict(ctx_len=64))))
    linear = ('encoder.weight', 'decoder.weight')
    torch.save({name: x for name, x in stored.items() if kind not in BARE or name not in linear}, folder/'ae.pt')
    return stored


def encoded_there(kind, stored, x):
    "Activations by the formula of the published code"
    bias = stored.get('b_dec', stored.get('bias'))
    centred = x if kind in ('JumpReluAutoEncoder', 'AutoEncoderNew') else x - bias
    pre = centred @ stored['encoder.weight'].T
    if kind == 'GatedAutoEncoder':
        is_open = pre + stored['gate_bias'] > 0
        return is_open*torch.relu(stored['r_mag'].exp()*pre + stored['mag_bias'])
    acts = torch.relu(pre + stored['encoder.bias'])
    if kind == 'AutoEncoderTopK':
        best = acts.topk(9, dim=-1)
        return torch.zeros_like(acts).scatter(-1, best.indices, best.values)
    return acts*(acts > stored['threshold']) if 'threshold' in stored else acts


@pytest.mark.parametrize('kind', ['AutoEncoder', 'AutoEncoderNew', 'GatedAutoEncoder', 'JumpReluAutoEncoder',
                                  'BatchTopKSAE', 'MatryoshkaBatchTopKSAE', 'AutoEncoderTopK'])
def test_a_dictionary_of_dictionary_learning(tmp_path, capsys, kind):
    stored = dictionary_learning_folder(tmp_path, kind)
    reader = FeatureReader.load(tmp_path)
    assert 'ae.pt is a pickle: only tensors are taken from it' in capsys.readouterr().err
    assert reader.reads == (2, 'resid_post')
    x = torch.randn(2, 7, 64)
    wanted = encoded_there(kind, stored, x)
    assert torch.allclose(reader.encode(x), wanted, atol=1e-5)
    assert torch.allclose(reader.activations(x, [3, 77]), wanted[[0, 1], :, [3, 77]], atol=1e-5)
    assert torch.equal(reader.directions(5)[0], stored['decoder.weight'][:, 5])
    assert len(reader.sha256) == 64 and reader.sha256 == FeatureReader.load(tmp_path).sha256


@pytest.mark.parametrize('values, says', [
    (dict(dict_class='CrossCoder'), "dict_class is 'CrossCoder'; known are AutoEncoder,"),
    (dict(dict_size=100), r'W_enc or encoder.weight is \(64, 128\), not \(64, 100\)'),
    (dict(submodule_name='attention_out_layer_2'), "this SAE reads 'attention_out_layer_2'"),
    (dict(activation_dim=None), 'activation_dim is None, not a number above 0'),
])
def test_what_of_dictionary_learning_is_refused(tmp_path, values, says):
    dictionary_learning_folder(tmp_path, 'AutoEncoder', **values)
    with pytest.raises(ValueError, match=says): FeatureReader.load(tmp_path)


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Planted:
        def __reduce__(self): return (Path.touch, (tmp_path/'ran',))
    stored = dictionary_learning_folder(tmp_path, 'AutoEncoder')
    torch.save(stored | dict(more=Planted()), tmp_path/'ae.pt')
    with pytest.raises(ValueError, match='ae.pt is damaged, or holds more than tensors'): FeatureReader.load(tmp_path)
    assert not (tmp_path/'ran').exists()


@pytest.mark.parametrize('damage', [b'', b'not a pickle', None])
def test_a_damaged_pickle_is_one_line(tmp_path, damage):
    dictionary_learning_folder(tmp_path, 'AutoEncoder')
    file = tmp_path/'ae.pt'
    file.write_bytes(file.read_bytes()[:900] if damage is None else damage)
    with pytest.raises(ValueError, match='ae.pt is damaged, or holds more than tensors') as raised:
        FeatureReader.load(tmp_path)
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize('values, says', [
    (dict(normalize_activations='median'), "the SAE '{folder}' cannot be loaded: "),
    (dict(d_sae=400), "the SAE '{folder}' cannot be loaded: "),
    (dict(metadata={'sae_lens_version': 'new'}), "the SAE '{folder}' cannot be loaded: "),
    (dict(architecture='gated'), "the SAE '{folder}' cannot be loaded: "),
    (dict(apply_b_dec_to_input='x', dtype=5, sae_lens_version=5), "{folder}/cfg.json: apply_b_dec_to_input is 'x'"),
])
def test_what_sae_lens_refuses_is_one_line(folder, values, says):
    edit(folder, **values)
    with pytest.raises(ValueError, match=says.format(folder=folder)) as raised:
        FeatureReader.load(folder)
    assert '\n' not in str(raised.value)


def kwargs(value):
    "Metadata with keywords with which the model was loaded"
    return dict(metadata={'model_from_pretrained_kwargs': value})


@pytest.mark.parametrize('kind, values, says', [
    ('jumprelu', kwargs([1]), r'model_from_pretrained_kwargs is \[1\], not an object'),
    ('jumprelu', kwargs({'center_writing_weights': 'false'}),
     "center_writing_weights is 'false', neither true nor false"),
    ('jumprelu', kwargs({'center_writing_weights': 1}), 'center_writing_weights is 1, neither true nor false'),
    ('jumprelu', dict(model_from_pretrained_kwargs='center'),
     "model_from_pretrained_kwargs is 'center', not an object"),
    ('jumprelu', dict(rescale_acts_by_decoder_norm=True),
     'rescale_acts_by_decoder_norm is true, which sae-lens does not do in a jumprelu SAE'),
    ('matching_pursuit', dict(residual_threshold='x'), "residual_threshold is 'x', not a number from 0"),
    ('matching_pursuit', dict(residual_threshold=float('nan')), 'residual_threshold is nan'),
    ('matching_pursuit', dict(residual_threshold=-1), 'residual_threshold is -1, not a number'),
    ('matching_pursuit', dict(max_iterations=0), 'max_iterations is 0, not a number of features'),
    ('matching_pursuit', dict(max_iterations=2.5), 'max_iterations is 2.5'),
    ('matching_pursuit', dict(stop_on_duplicate_support='no'),
     "stop_on_duplicate_support is 'no', neither true nor false"),
    ('topk', dict(k=513), 'k is 513, more than its 512 features'),
    ('topk', dict(k=True), 'k is True, and a topk SAE needs one'),
    ('topk', dict(k=16, activation_fn_kwargs={'k': 4}),
     'k is 16, and in its activation_fn_kwargs 4: only one of them can be right'),
    ('topk', dict(k=..., activation_fn_kwargs={'k': 4}),
     'k is 4 in its activation_fn_kwargs, and sae-lens reads 100: write it as k'),
])
def test_settings_that_mean_nothing(tmp_path, kind, values, says):
    folder = tiny_sae(tmp_path/'sae', kind)
    edit(folder, **values)
    with pytest.raises(ValueError, match=f'{folder}/cfg.json: {says}'):
        FeatureReader.load(folder)


@pytest.mark.parametrize('values, says', [
    (dict(architecture='nosuch'), "SAEs of kind 'nosuch' cannot be read"),
    (dict(architecture='batchtopk'), 'holds an SAE in training .batchtopk.: export it with sae-lens'),
    (dict(reshape_activations='hook_q'), 'reshapes its input'),
    (dict(normalize_activations='expected_average_only_in'), 'expects inputs normalised by'),
    (dict(metadata={'hook_name': 'hook_embed', 'sae_lens_version': VERSION}), "this SAE reads 'hook_embed'"),
    (dict(metadata={'prepend_bos': 'no', 'sae_lens_version': VERSION}), 'does not say where it reads'),
])
def test_what_is_wrong_names_the_sae(folder, values, says):
    edit(folder, **values)
    with pytest.raises(ValueError, match=f"the SAE '{folder}': .*{says}"):
        FeatureReader.load(folder)


@pytest.mark.parametrize('value', ['false', 0, 1, []])
def test_prepend_bos_is_true_or_false(tmp_path, value):
    folder = tiny_sae(tmp_path/'sae', metadata={'prepend_bos': value})
    says = 'prepend_bos .* neither true nor false: `sae_bos` in the preset says which'
    with pytest.raises(ValueError, match=says): FeatureReader.load(folder)
    assert FeatureReader.load(folder, bos=False).sae.cfg.metadata.prepend_bos is False


# ---- TopK that would be read as ReLU

def test_an_activation_function_that_sae_lens_passes_over(tmp_path):
    folder = tiny_sae(tmp_path/'sae', architecture='standard')
    edit(folder, activation_fn='topk', activation_fn_kwargs={'k': 4})
    with pytest.raises(ValueError, match='describes a topk SAE, which sae-lens reads as standard'):
        FeatureReader.load(folder)


def test_a_topk_without_a_version(tmp_path, resid):
    folder = tiny_sae(tmp_path/'sae', 'topk', k=4)
    wanted = FeatureReader.load(folder).encode(resid)
    edit(folder, metadata={'hook_name': 'blocks.2.hook_resid_post'}, activation_fn_kwargs={})
    assert torch.equal(FeatureReader.load(folder).encode(resid), wanted)


@pytest.mark.parametrize('architecture', (None, ..., 'standard'), ids=str)
def test_a_topk_that_does_not_say_so_is_not_read_as_relu(tmp_path, architecture):
    folder = tiny_sae(tmp_path/'sae', 'topk', k=4)
    edit(folder, metadata={'hook_name': 'blocks.2.hook_resid_post'}, activation_fn_kwargs={}, architecture=architecture)
    says = f'{folder}/cfg.json: k is 4, and a standard SAE has none: name its architecture'
    with pytest.raises(ValueError, match=says): FeatureReader.load(folder)


# ---- configurations of 2024

OF_2024 = dict(d_in=64, d_sae=512, dtype='float32', hook_name='blocks.2.hook_resid_post', architecture='jumprelu')


@pytest.mark.parametrize('values', [
    {},
    dict(activation_fn='relu'),
    dict(activation_fn_str='relu', activation_fn_kwargs={}),
    dict(activation_fn_kwargs=None, metadata=None),
])
def test_configurations_of_2024(folder, resid, values):
    wanted = FeatureReader.load(folder).encode(resid)
    (folder/'cfg.json').write_text(json.dumps(OF_2024 | values))
    assert torch.equal(FeatureReader.load(folder).encode(resid), wanted)


def test_a_configuration_of_2024_without_a_place(folder):
    (folder/'cfg.json').write_text(json.dumps(OF_2024 | dict(hook_name=None)))
    says = 'this SAE does not say where it reads .its metadata has no hook_name.*`sae_hook: blocks.6.hook_resid_post`'
    with pytest.raises(ValueError, match=says): FeatureReader.load(folder)
    assert FeatureReader.load(folder, hook='blocks.6.hook_resid_post').layer == 6


# ---- metadata

ABOUT = dict(hook_name='blocks.1.hook_resid_pre', model_name='tiny', prepend_bos=False)
ABOUT['model_from_pretrained_kwargs'] = {'center_writing_weights': True}


@pytest.mark.parametrize('version', [{}, dict(sae_lens_version=None), dict(sae_lens_version='5.9.0')], ids=str)
def test_metadata_without_a_version_counts(folder, version, resid):
    "sae-lens takes a configuration without a version for one of before 6, and drops its metadata"
    edit(folder, metadata=ABOUT | dict(sae_lens_version=VERSION))
    wanted = FeatureReader.load(folder)
    edit(folder, metadata=ABOUT | version)
    reader = FeatureReader.load(folder)
    about = reader.sae.cfg.metadata
    assert (reader.layer, reader.hook, about.model_name, about.prepend_bos) == (1, 'resid_pre', 'tiny', False)
    assert torch.equal(reader.encode(resid), wanted.encode(resid))
    assert not torch.equal(reader.encode(resid + 1), reader.sae.encode(resid + 1)) # the mean is taken off


@pytest.mark.parametrize('metadata, layer', [
    ({'hook_name': 'model.layers.1'}, 1),
    ({'hf_hook_name': 'model.layers.3.output'}, 3),
])
def test_modules_as_hook_names(folder, metadata, layer):
    edit(folder, metadata=metadata | {'sae_lens_version': VERSION})
    reader = FeatureReader.load(folder)
    assert (reader.layer, reader.hook) == (layer, 'resid_post')


@pytest.fixture
def elsewhere(tmp_path):
    "An SAE that says it reads something else than it does"
    return tiny_sae(tmp_path/'sae', hook='mlp_out', model_name='wrong', metadata={'prepend_bos': True})


def test_metadata_can_be_overridden(elsewhere):
    reader = FeatureReader.load(elsewhere, hook='blocks.1.hook_resid_pre', bos=False, model='tiny')
    about = reader.sae.cfg.metadata
    assert (reader.layer, reader.hook, about.prepend_bos, about.model_name) == (1, 'resid_pre', False, 'tiny')
    with pytest.raises(ValueError, match="this SAE reads 'layer 1': known are blocks.N"):
        FeatureReader.load(elsewhere, hook='layer 1')


def test_metadata_can_be_overridden_by_a_preset(elsewhere):
    fields = dict(layer=1, sae_hook='blocks.1.hook_resid_pre', sae_bos=False, sae_model='tiny')
    preset = load_preset('smollm2-135m', sae=str(elsewhere), **fields)
    reader = FeatureReader.load(preset)
    about = reader.sae.cfg.metadata
    assert (reader.layer, reader.hook, about.prepend_bos, about.model_name) == (1, 'resid_pre', False, 'tiny')
    with pytest.raises(ValueError, match='the preset says layer 2, its SAE .* reads layer 1'):
        FeatureReader.load(load_preset(preset, layer=2))


# ---- damaged files

POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 15\n'


@pytest.mark.parametrize('damage, says', [
    (lambda data: data[:len(data)//2], 'is cut off or damaged'),
    (lambda data: b'', 'is empty: fetch it again'),
    (lambda data: POINTER, 'is a pointer of git-lfs.*git lfs pull'),
], ids=['half', 'empty', 'pointer'])
def test_damaged_weights(folder, damage, says):
    file = folder/'sae_weights.safetensors'
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f'{file} {says}'): FeatureReader.load(folder)


def test_missing_weights(folder):
    (folder/'sae_weights.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='no sae_weights.safetensors: its weights are missing'):
        FeatureReader.load(folder)


def test_weights_that_may_not_be_read(folder, monkeypatch):
    closed = str(folder/'sae_weights.safetensors')
    access = os.access
    def allowed(file, mode): return str(file) != closed and access(file, mode)
    monkeypatch.setattr(os, 'access', allowed)
    with pytest.raises(PermissionError, match=f'{closed} may not be read by this user'):
        FeatureReader.load(folder)


def test_weights_that_are_a_folder(folder):
    file = folder/'sae_weights.safetensors'
    file.unlink()
    file.mkdir()
    with pytest.raises(IsADirectoryError, match=f'{file} is a folder, not a file'):
        FeatureReader.load(folder)


TENSORS = {
    'jumprelu': ['threshold', 'W_enc', 'b_enc', 'W_dec', 'b_dec'],
    'gated': ['r_mag', 'b_gate', 'b_mag'],
    'topk': ['b_enc'],
    'matching_pursuit': ['W_dec'],
}


@pytest.mark.parametrize('kind, name', [(kind, name) for kind, names in TENSORS.items() for name in names])
@pytest.mark.parametrize('value', (torch.nan, torch.inf, -torch.inf))
def test_numbers_that_are_not_finite_are_refused(tmp_path, kind, name, value):
    folder = tiny_sae(tmp_path/'sae', kind)
    spoil(folder, name, value)
    with pytest.raises(ValueError, match=f'{folder}/sae_weights.safetensors: {name} is not finite'):
        FeatureReader.load(folder)


@pytest.fixture
def scaled(tmp_path):
    "An SAE whose inputs have a scale"
    folder = tiny_sae(tmp_path/'sae', normalize_activations='expected_average_only_in')
    (folder/'activation_scaler.json').write_text('{"scaling_factor": 2}')
    return folder


@pytest.mark.parametrize('text, says', [
    ('{"scal', 'activation_scaler.json is not JSON'),
    ('{}', 'scaling_factor is None, not a number above 0'),
    ('{"scaling_factor": "2"}', "scaling_factor is '2'"),
])
def test_damaged_scales(scaled, text, says):
    (scaled/'activation_scaler.json').write_text(text)
    with pytest.raises(ValueError, match=says): FeatureReader.load(scaled)


NO_FACTORS = ['Infinity', 'NaN', '-Infinity', '1e400', '0', '-2', 'true', '1e39', '1' + '0'*400]


@pytest.mark.parametrize('text', NO_FACTORS, ids=lambda text: text[:8])
def test_scaling_factors_that_are_no_factors(scaled, text):
    (scaled/'activation_scaler.json').write_text(f'{{"scaling_factor": {text}}}')
    says = f'{scaled}/activation_scaler.json: scaling_factor is .*, not a number above 0'
    with pytest.raises(ValueError, match=says): FeatureReader.load(scaled)


def test_a_scaling_factor_that_the_weights_cannot_take_up(scaled):
    (scaled/'activation_scaler.json').write_text('{"scaling_factor": 1e-42}')
    says = f'{scaled}/activation_scaler.json: with scaling_factor 1e-42 (b|W)_dec is not finite'
    with pytest.raises(ValueError, match=says): FeatureReader.load(scaled)


@pytest.mark.parametrize('text, says', [
    ('{"model', 'card.json is not JSON'),
    ('[1]', r'card.json holds \[1\], not an object'),
    ('{"model_sha256": 5}', 'model_sha256 is 5, not a hash'),
])
def test_damaged_cards(scaled, text, says):
    (scaled/'card.json').write_text(text)
    with pytest.raises(ValueError, match=says): FeatureReader.load(scaled)


# ---- the cache of the hub

HUB = 'acme/tiny-saes:layer_2'


@pytest.fixture
def cached(tmp_path, monkeypatch):
    "Folder of an SAE in a cache of the hub, without a network"
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path/'hub'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    return tiny_sae(hub_file(tmp_path/'hub', 'acme/tiny-saes', 'layer_2/cfg.json').parent)


@pytest.mark.parametrize('source', [HUB, tuple(HUB.split(':'))], ids=str)
def test_release_from_the_hub(cached, resid, source):
    local = FeatureReader.load(cached)
    hub = FeatureReader.load(source)
    assert torch.equal(hub.encode(resid), local.encode(resid))
    assert (hub.sha256, hub.card, hub.layer) == (local.sha256, {}, 2)


def test_a_release_that_is_nowhere(cached):
    with pytest.raises(ValueError, match='Release nothing not found'):
        FeatureReader.load('nothing:here')


@pytest.mark.parametrize('source', ['gpt2-small-res-jb:nowhere', 'two words:x'])
def test_what_the_hub_does_not_have_is_one_line(cached, source):
    with pytest.raises(ValueError) as raised: FeatureReader.load(source)
    assert '\n' not in str(raised.value)


def test_an_unknown_activation_function_in_the_hub_cache(cached):
    edit(cached, activation_fn='tanh-relu')
    with pytest.raises(ValueError, match="cfg.json: its activation function is 'tanh-relu'"):
        FeatureReader.load(HUB)


def test_damaged_files_in_the_hub_cache(cached):
    (cached/'sae_weights.safetensors').write_bytes(b'')
    with pytest.raises(ValueError, match='sae_weights.safetensors is empty: fetch it again'):
        FeatureReader.load(HUB)
    (cached/'cfg.json').write_text('{"d_in": ')
    with pytest.raises(ValueError, match='cfg.json is not JSON'): FeatureReader.load(HUB)


def test_metadata_without_a_version_counts_in_the_hub(cached):
    edit(cached, metadata=ABOUT)
    reader = FeatureReader.load(HUB)
    assert (reader.layer, reader.hook, reader.sae.cfg.metadata.prepend_bos) == (1, 'resid_pre', False)


def test_numbers_that_are_not_finite_are_refused_in_the_hub_cache(cached):
    spoil(cached, 'threshold', torch.nan)
    with pytest.raises(ValueError, match=f'{cached}/sae_weights.safetensors: threshold is not finite'):
        FeatureReader.load(HUB)
