"The catalogue against sae-lens' own functions, and every one of its loaders on files as the hub has them"
import json, re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import gemma_scope, hub_file, llama_scope, random_arrays, res_jb, save_arrays
from huggingface_hub import constants
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import load_file

from saeexplainer.cli import main
from saeexplainer.catalogue import accepted, catalogue, entry_of, fields_for, find, preset_yaml, reasons
from saeexplainer.lm.places import PLACES, parse_hook
from saeexplainer.presets import Preset
from saeexplainer.saes import FeatureReader

pytestmark = [pytest.mark.filterwarnings('ignore:This loads the CLT layer'),
              pytest.mark.filterwarnings(r'ignore:\sThis SAE has non-empty model_from_pretrained_kwargs')]

SAME = { # modules of Gemma 3 -> places by other names
    'self_attn.o_proj.input': 'z',
    'pre_feedforward_layernorm.output': 'mlp_in',
    'post_feedforward_layernorm.output': 'mlp_out',
}


# ---- what is listed

def test_99_of_100_can_be_explained():
    entries = catalogue()
    counts = accepted(entries)
    assert counts['read'].sum() >= .99*len(entries)
    assert counts.to_numpy().sum() == len(entries)
    assert sum(reasons(entries).values()) == counts['refused'].sum()
    assert {place for _, place in counts.index[counts['read'] > 0]} <= set(PLACES)


def own_place(listed, sae): # by sae-lens' own functions, which ask no hub for these formats
    name = listed['conversion_func']
    if name == 'gemma_3':
        raw = loaders._infer_gemma_3_raw_cfg_dict(listed['repo_id'], sae['path'])
        return parse_hook(raw['hf_hook_point_in'])
    functions = dict(gemma_2=loaders.get_gemma_2_config_from_hf, qwen_scope=loaders.get_qwen_scope_config_from_hf,
                     gemma_2_transcoder=loaders.get_gemma_2_transcoder_config_from_hf,
                     goodfire=loaders.get_goodfire_config_from_hf, deepseek_r1=loaders.get_deepseek_r1_config_from_hf)
    if name not in functions: return None
    config = functions[name](listed['repo_id'], sae['path'], 'cpu')
    return None if config['hook_name'] == 'hook_embed' else parse_hook(config['hook_name'])


def test_places_are_those_of_sae_lens():
    from importlib.resources import files
    loader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)
    listed = yaml.load(files('sae_lens').joinpath('pretrained_saes.yaml').read_text(encoding='utf-8'), loader)
    ours = {entry.name: entry for entry in catalogue()}
    wrong, compared = [], 0
    for release, about in listed.items():
        for sae in about['saes']:
            place = own_place(about, sae)
            if place is None: continue
            compared += 1
            entry = ours[f"{release}:{sae['id']}"]
            if (entry.layer, entry.place) != (place.layer, SAME.get(place.name, place.name)): wrong.append(entry.name)
    assert wrong == []
    assert compared > 12_000


def test_every_release_makes_a_preset():
    of_release = {entry.release: entry for entry in catalogue() if not entry.refused}
    for entry in of_release.values():
        preset = Preset(name='mine', **fields_for(entry))
        assert preset.layer == entry.layer
        assert '/' in preset.target


def test_the_first_page_says_how_many():
    entries = catalogue()
    readme = (Path(__file__).parents[1]/'README.md').read_text(encoding='utf-8')
    read = accepted(entries)['read'].sum()
    assert f'{len(entries):,}' in readme
    assert f'{read:,} can be explained' in readme


ASKED_FOR = ( # by those who trace circuits, and by name in the papers of their publishers
    'gemma-scope-2-270m-pt-res:layer_12_width_16k_l0_medium',
    'gemma-scope-2-4b-it-res-all:layer_0_width_16k_l0_big',
    'gemma-scope-2-27b-it-transcoders-all:layer_0_width_16k_l0_big',
    'gemma-scope-2b-pt-transcoders:layer_12/width_16k/average_l0_6',
    'qwen-scope-3-1.7b-base-w32k-l50:layer14',
    'qwen-scope-3.5-27b-w80k-l50:layer30',
    'llama-3.1-8b-instruct-andyrdt:resid_post_layer_15_trainer_1',
    'goodfire-llama-3.3-70b-instruct:layer_50',
    'gpt-oss-20b-andyrdt:resid_post_layer_11_trainer_0',
    'mwhanna-qwen3-4b-transcoders:layer_18',
    'mntss-gemma-2-2b-2.5m-clt-as-per-layer:layer_12',
    'pythia-70m-deduped-mlp-sm:blocks.2.hook_mlp_out',
)

@pytest.mark.parametrize('name', ASKED_FOR)
def test_a_run_on_a_listed_dictionary_is_planned_without_a_hub(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    main(['run', name, '--dry-run', '--root', str(tmp_path)])
    said = ' '.join(capsys.readouterr().out.split())
    assert entry_of(name).model in said
    assert name in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('words, least', [('gemma-2-2b transcoder', 26), ('qwen3-8b', 36), ('z gpt2', 12)])
def test_words_are_found(words, least):
    found = find(words)
    assert len(found) >= least
    assert find(f'{words} zebra') == []


def test_numbers_are_whole():
    names = [entry.name for entry in find('gemma-scope-2b-pt-res 12')]
    assert 'gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82' in names
    assert not any('l0_129' in name and 'layer_12' not in name for name in names)
    assert all(re.search(r'(?<!\d)12(?!\d)', name) for name in names)


def test_canonical_ones_and_the_residual_stream_come_first():
    found = find('gemma-2-2b 12')
    ranks = [('canonical' not in entry.name, not entry.place.startswith('resid')) for entry in found if entry.place]
    assert ranks == sorted(ranks)
    assert found[0].name == 'gemma-scope-2b-pt-res-canonical:layer_12/width_16k/canonical'


@pytest.mark.parametrize('name, begins', [
    ('gpt2-small-res-jb:blocks.8.hook_resid_pre', '# an SAE at resid_pre'),
    ('mwhanna-qwen3-4b-transcoders:layer_7', '# a transcoder at ')])
def test_a_preset_says_what_it_is_of(name, begins):
    assert preset_yaml(entry_of(name)).startswith(begins)


@pytest.mark.parametrize('name, says', [
    ('gemma-scope-2b-pt-rse:layer_1', "no release 'gemma-scope-2b-pt-rse': did you mean gemma-scope-2b-pt-res"),
    ('gemma-scope-2b-pt-transcoders:layer_1', "has no 'layer_1': did you mean"),
    ('', "no release ''"),
])
def test_what_is_not_listed(name, says):
    with pytest.raises(ValueError, match=says): entry_of(name)


# ---- every loader of sae-lens, on files as the hub has them

D, N = 64, 512
PLAIN = dict(W_enc=.1, W_dec=.1, b_enc=.1, b_dec=.1)


@dataclass
class Case:
    "A dictionary in a fabricated hub cache"
    name: str # release:id
    arrays: dict # W_enc (d, n), b_enc, W_dec, and what its kind has more
    subtracts: bool = False # b_dec, before encoding
    k: int|None = None

    def formula(self, x): # (rows, d) -> (rows, n), fp64, by the kind's own definition
        a = {name: array.double() for name, array in self.arrays.items()}
        x = x.double()*self.arrays.get('scale', 1.)
        if self.subtracts: x = x - a['b_dec']
        pre = x @ a['W_enc']
        if 'r_mag' in a:
            return (pre + a['b_gate'] > 0)*(pre*a['r_mag'].exp() + a['b_mag']).relu()
        pre = pre + a['b_enc']
        if 'threshold' in a: return pre.relu()*(pre > a['threshold'])
        if self.k is None: return pre.relu()
        best = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())


def where(hub, name):
    release, _, sae_id = name.partition(':')
    entry = get_pretrained_saes_directory()[release]
    return hub, entry.repo_id, str(entry.saes_map[sae_id])


def smaller(patch, name, **sizes):
    "Tell sae-lens that the files are small: some of its loaders have the real widths"
    entry = get_pretrained_saes_directory()[name.split(':')[0]]
    patch.setattr(entry, 'config_overrides', {**(entry.config_overrides or {}), 'd_in': D, 'd_sae': N, **sizes})


def with_threshold(arrays): return arrays | dict(threshold=arrays['threshold'].abs() + .5)


def pickled(tensors, place):
    hub, repo, path = place
    torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, hub_file(hub, repo, path))


def make_gemma_2(hub, patch, name):
    smaller(patch, name)
    return Case(name, gemma_scope(*where(hub, name)))


def make_gemma_2_transcoder(hub, patch, name):
    smaller(patch, name, d_out=D)
    return Case(name, gemma_scope(*where(hub, name)))


def make_gemma_3(hub, patch, name, affine=False):
    arrays = with_threshold(random_arrays(0, D, N, **PLAIN, threshold=3.))
    hub, repo, folder = where(hub, name)
    stored = {key.replace('W_', 'w_'): array for key, array in arrays.items()}
    if affine: stored['affine_skip_connection'] = .1*torch.randn(D, D)
    save_arrays(stored, hub_file(hub, repo, f'{folder}/params.safetensors'))
    raw = loaders._infer_gemma_3_raw_cfg_dict(repo, folder)
    hub_file(hub, repo, f'{folder}/config.json').write_text(json.dumps(raw | dict(affine_connection=affine)))
    return Case(name, arrays)


def make_mwhanna(hub, patch, name):
    arrays = random_arrays(0, D, N, **PLAIN)
    hub, repo, path = where(hub, name)
    save_arrays(arrays | dict(W_enc=arrays['W_enc'].T), hub_file(hub, repo, path))
    own = dict(d_model=dict(value=D), d_feature=dict(value=N), batch_size=dict(value=64))
    hub_file(hub, repo, 'wandb-config.yaml').write_text(yaml.safe_dump(own))
    hub_file(hub, repo, 'config.yaml').write_text(yaml.safe_dump(dict(model_name='Qwen/Qwen3-4B')))
    return Case(name, arrays)


def make_mntss(hub, patch, name):
    arrays = random_arrays(0, D, N, **PLAIN)
    hub, repo, layer = where(hub, name)
    parts = torch.randn(N, 26, D, generator=torch.Generator().manual_seed(1))
    arrays['W_dec'] = parts.sum(1)
    encoder = dict(W_enc=arrays['W_enc'].T, b_enc=arrays['b_enc'], b_dec=arrays['b_dec'])
    save_arrays({f'{key}_{layer}': array for key, array in encoder.items()},
                hub_file(hub, repo, f'W_enc_{layer}.safetensors'))
    save_arrays({f'W_dec_{layer}': parts}, hub_file(hub, repo, f'W_dec_{layer}.safetensors'))
    own = dict(model_name='google/gemma-2-2b', feature_input_hook='hook_resid_mid', feature_output_hook='hook_mlp_out')
    hub_file(hub, repo, 'config.yaml').write_text(yaml.safe_dump(own))
    return Case(name, arrays)


def make_llama_scope(hub, patch, name, hook):
    hub, repo, folder = where(hub, name)
    layer = entry_of(name).layer
    release, _, sae_id = name.partition(':')
    scale = get_pretrained_saes_directory()[release].norm_scaling_factor[sae_id]
    arrays = llama_scope(hub, repo, folder, layer, scale)
    file = hub_file(hub, repo, f'{folder}/hyperparams.json')
    file.write_text(file.read_text().replace('hook_resid_post', hook))
    return Case(name, arrays | dict(threshold=torch.tensor(.5*scale), scale=torch.tensor(scale)))


def make_r1_distill(hub, patch, name):
    arrays = with_threshold(random_arrays(0, D, N, **PLAIN, threshold=.5))
    hub, repo, folder = where(hub, name)
    layer = entry_of(name).layer
    own = dict(d_model=D, expansion_factor=N//D, hook_point_in=f'blocks.{layer}.hook_resid_post')
    hub_file(hub, repo, f'{folder}/config.json').write_text(json.dumps(own))
    save_arrays({'encoder.weight': arrays['W_enc'].T, 'decoder.weight': arrays['W_dec'].T,
                 'encoder.bias': arrays['b_enc'], 'decoder.bias': arrays['b_dec'],
                 'log_jumprelu_threshold': arrays['threshold'].log()},
                hub_file(hub, repo, f'{folder}/sae_weights.safetensors'))
    release, _, sae_id = name.partition(':')
    scale = get_pretrained_saes_directory()[release].norm_scaling_factor[sae_id]
    return Case(name, arrays | dict(scale=torch.tensor(scale)))


def make_dictionary_learning(hub, patch, name, dict_class):
    hub, repo, folder = where(hub, name)
    arrays = random_arrays(0, D, N, **PLAIN)
    stored = {'encoder.weight': arrays['W_enc'].T, 'decoder.weight': arrays['W_dec'].T,
              'encoder.bias': arrays['b_enc'], 'b_dec': arrays['b_dec']}
    case = Case(name, arrays, subtracts=True)
    if dict_class == 'AutoEncoderTopK':
        case.k = 20
        stored |= dict(k=torch.tensor(20), threshold=torch.tensor(.3)) # which its encode does not use
    if dict_class in ('BatchTopKSAE', 'JumpReluAutoEncoder'):
        case.subtracts = dict_class == 'BatchTopKSAE'
        stored['threshold'] = torch.tensor(.6)
        arrays['threshold'] = torch.full((N,), .6)
    if dict_class == 'GatedAutoEncoder':
        more = {key: .1*torch.randn(N, generator=torch.Generator().manual_seed(i))
                for i, key in enumerate(('r_mag', 'gate_bias', 'mag_bias'))}
        del stored['encoder.bias'], stored['b_dec']
        stored |= more | dict(decoder_bias=arrays['b_dec'])
        arrays |= dict(r_mag=more['r_mag'], b_gate=more['gate_bias'], b_mag=more['mag_bias'])
    pickled(stored, (hub, repo, f'{folder}/ae.pt'))
    layer = entry_of(name).layer
    trainer = dict(layer=layer, dict_class=dict_class, k=20, activation_dim=D, dict_size=N, lm_name='google/gemma-2-2b')
    hub_file(hub, repo, f'{folder}/config.json').write_text(json.dumps(dict(trainer=trainer, buffer=dict(ctx_len=64))))
    return case


def make_qwen_scope(hub, patch, name):
    smaller(patch, name, activation_fn_kwargs=dict(k=20))
    arrays = random_arrays(0, D, N, **PLAIN)
    pickled(arrays | dict(W_enc=arrays['W_enc'].T, W_dec=arrays['W_dec'].T), where(hub, name))
    return Case(name, arrays, k=20)


def make_linear_layers(hub, patch, name, suffix=''):
    smaller(patch, name)
    arrays = random_arrays(0, D, N, **PLAIN)
    pickled({f'encoder{suffix}.weight': arrays['W_enc'].T, f'decoder{suffix}.weight': arrays['W_dec'].T,
             f'encoder{suffix}.bias': arrays['b_enc'], f'decoder{suffix}.bias': arrays['b_dec']}, where(hub, name))
    return Case(name, arrays)


def make_hook_z(hub, patch, name):
    arrays = random_arrays(0, D, N, **PLAIN)
    hub, repo, path = where(hub, name)
    pickled(arrays, (hub, repo, path))
    layer = entry_of(name).layer
    own = dict(act_size=D, dict_size=N, act_name=f'blocks.{layer}.attn.hook_z')
    hub_file(hub, repo, path.split('.pt')[0] + '_cfg.json').write_text(json.dumps(own))
    return Case(name, arrays, subtracts=True)


def make_sae_lens(hub, patch, name):
    hub, repo, folder = where(hub, name)
    arrays = res_jb(hub, repo, folder, centred=False, hook=name.partition(':')[2])
    return Case(name, arrays, subtracts=True)


CASES = {
    'gemma-scope-2b-pt-mlp-canonical:layer_12/width_16k/canonical': (make_gemma_2, {}),
    'gemma-scope-2b-pt-att-canonical:layer_12/width_16k/canonical': (make_gemma_2, {}),
    'gemma-scope-2b-pt-transcoders:layer_0/width_16k/average_l0_76': (make_gemma_2_transcoder, {}),
    'gemma-scope-2-4b-pt-res:layer_17_width_16k_l0_big': (make_gemma_3, {}),
    'gemma-scope-2-4b-pt-att:layer_17_width_16k_l0_big': (make_gemma_3, {}),
    'gemma-scope-2-4b-pt-mlp:layer_17_width_16k_l0_big': (make_gemma_3, {}),
    'gemma-scope-2-4b-pt-transcoders:transcoder/layer_17_width_16k_l0_big': (make_gemma_3, {}),
    'gemma-scope-2-4b-pt-transcoders-all:layer_0_width_16k_l0_big_affine': (make_gemma_3, dict(affine=True)),
    'mwhanna-qwen3-4b-transcoders:layer_7': (make_mwhanna, {}),
    'mntss-gemma-2-2b-2.5m-clt-as-per-layer:layer_3': (make_mntss, {}),
    'llama_scope_lxm_8x:l3m_8x': (make_llama_scope, dict(hook='hook_mlp_out')),
    'llama_scope_lxa_8x:l3a_8x': (make_llama_scope, dict(hook='hook_attn_out')),
    'llama_scope_r1_distill:l0r_800m_slimpajama': (make_r1_distill, {}),
    'sae_bench_pythia70m_sweep_gated_ctx128_0730:blocks.3.hook_resid_post__trainer_0':
        (make_dictionary_learning, dict(dict_class='GatedAutoEncoder')),
    'sae_bench_gemma-2-2b_topk_width-2pow12_date-1109:blocks.12.hook_resid_post__trainer_0':
        (make_dictionary_learning, dict(dict_class='AutoEncoderTopK')),
    'llama-3.1-8b-instruct-andyrdt:resid_post_layer_3_trainer_1':
        (make_dictionary_learning, dict(dict_class='BatchTopKSAE')),
    'gpt-oss-20b-andyrdt:resid_post_layer_3_trainer_0':
        (make_dictionary_learning, dict(dict_class='JumpReluAutoEncoder')),
    'qwen-scope-3-1.7b-base-w32k-l50:layer0': (make_qwen_scope, {}),
    'goodfire-llama-3.1-8b-instruct:layer_19': (make_linear_layers, dict(suffix='_linear')),
    'deepseek-r1-distill-llama-8b-qresearch:blocks.19.hook_resid_post': (make_linear_layers, {}),
    'gpt2-small-hook-z-kk:blocks.0.hook_z': (make_hook_z, {}),
    'gpt2-small-resid-mid-v5-32k:blocks.0.hook_resid_mid': (make_sae_lens, {}),
    'pythia-70m-deduped-mlp-sm:blocks.2.hook_mlp_out': (make_sae_lens, {}),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    def shapes(repo, filename): # which sae-lens asks the server for
        return {name: list(tensor.shape) for name, tensor in load_file(hub_file(tmp_path, repo, filename)).items()}
    monkeypatch.setattr(loaders, 'get_safetensors_tensor_shapes', shapes)
    return tmp_path


def test_there_is_a_case_for_every_loader():
    formats = {get_pretrained_saes_directory()[name.split(':')[0]].conversion_func for name in CASES}
    listed = {about.conversion_func for about in get_pretrained_saes_directory().values()}
    assert listed - formats == {'temporal'}


@pytest.mark.parametrize('name', CASES)
def test_a_dictionary_of_the_hub_is_read_as_its_formula_says(hub, monkeypatch, name, largest_error):
    make, more = CASES[name]
    case = make(hub, monkeypatch, name, **more)
    reader = FeatureReader.load(name)
    entry = entry_of(name)
    assert reader.layer == entry.layer
    assert SAME.get(reader.hook, reader.hook) == entry.place
    assert (entry.kind == 'SAE') == (reader.reads == reader.writes)
    x = 3*torch.randn(4, 25, D, generator=torch.Generator().manual_seed(1))
    wanted = case.formula(x)
    assert .005 < (wanted > 0).float().mean() < .9
    found = reader.activations(x, np.tile([3, 77, 500], (4, 1)))
    off = (found - wanted[..., [3, 77, 500]]).abs().max()/max(1., wanted.max())
    assert largest_error('a dictionary of the hub', off.item()) < 1e-4
    whole = (reader.encode(x) - wanted).abs().max()/max(1., wanted.max())
    assert whole < 1e-4
    if entry.place != 'z':
        written = reader.directions([3, 500])*case.arrays.get('scale', 1.)
        assert torch.allclose(written, case.arrays['W_dec'][[3, 500]], atol=1e-5)


def test_weights_of_a_pickle_are_loaded_without_its_code(hub, monkeypatch, capsys):
    name = 'qwen-scope-3-1.7b-base-w32k-l50:layer0'
    make_qwen_scope(hub, monkeypatch, name)
    class Evil:
        def __reduce__(self): return (print, ('code of a pickle was run',))
    torch.save(dict(W_enc=Evil()), hub_file(*where(hub, name)))
    says = f"the SAE '{name}' cannot be loaded.*[Ww]eights.only"
    with pytest.raises(ValueError, match=says): FeatureReader.load(name)
    assert 'is published as a pickle: only tensors are taken from it' in capsys.readouterr().err
