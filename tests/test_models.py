"The embedded model's conversion, hashes and loading"
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from helpers import ARCHITECTURES, tiny_model, tiny_tokenizer
from saeexplainer.lm.hooks import backbone, decoder_layers
from saeexplainer.lm.models import (
    EMBEDDED, EMBEDDED_SHA256, cache_dir, embedded_model_dir, load_model, load_tokenizer, model_device, weights_sha256,
)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The folder of a tiny model, never changed"
    folder = tmp_path_factory.mktemp('whole')/'m'
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    "The folder of a tiny model, to be damaged"
    return shutil.copytree(whole, tmp_path/'m')


@pytest.fixture
def sharded(folder):
    "The same model in several files and their index"
    (folder/'model.safetensors').unlink()
    tiny_model().save_pretrained(folder, max_shard_size='100KB')
    return folder


def load(folder): return load_model(str(folder), 'float32', 'cpu')


def message(error):
    "The text of an error, which is one line"
    text = str(error.value)
    assert '\n' not in text
    return text


def edit_json(file, **values): file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_tensors(file, change):
    "Save the tensors that `change` makes of those in the file"
    save_file(change(load_file(file)), file, metadata={'format': 'pt'})


# ---- the embedded model

def test_the_embedded_model_is_the_model_of_record():
    assert weights_sha256(embedded_model_dir()) == EMBEDDED_SHA256


CONVERT_HALF = '''
    import time
    from types import SimpleNamespace
    from pathlib import Path
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from saeexplainer.lm.models import embedded_model_dir

    def write_half(folder):
        (Path(folder)/'model.safetensors').write_bytes(b'half of the weights')
        print('half is written', flush=True)
        time.sleep(600)

    AutoModelForCausalLM.from_pretrained = lambda *_, **__: SimpleNamespace(save_pretrained=write_half)
    AutoTokenizer.from_pretrained = lambda *_, **__: SimpleNamespace()
    embedded_model_dir()
'''


def test_a_conversion_that_is_cut_off_leaves_nothing(tmp_path):
    "Killed while it writes, the cache has no model that only looks whole"
    env = {**os.environ, 'SAEEXPLAINER_CACHE': str(tmp_path)}
    process = subprocess.Popen([sys.executable, '-c', textwrap.dedent(CONVERT_HALF)], env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == 'half is written\n'
    process.kill()
    assert process.wait() == -signal.SIGKILL # and no failure of its own
    process.stdout.close()
    assert list(tmp_path.glob(f'{EMBEDDED}-*'))
    assert not (tmp_path/EMBEDDED/'model.safetensors').exists()


def test_a_converted_model_can_be_read_by_others(tmp_path, monkeypatch):
    "A conversion from the start to the end; other users of a shared cache read what it wrote"
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    before = os.umask(0o022)
    try:
        converted = embedded_model_dir()
    finally:
        os.umask(before)
    assert converted.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in converted.iterdir()} == {0o644}


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_a_cache_that_is_closed_says_what_to_set(tmp_path, monkeypatch):
    (tmp_path/'cache').mkdir(mode=0o000)
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    with pytest.raises(PermissionError, match='set SAEEXPLAINER_CACHE to another folder'): embedded_model_dir()


# ---- hashes

def test_hash_depends_on_values_names_and_shapes(tmp_path):
    versions = [{'a': torch.ones(4)}, {'b': torch.ones(4)}, {'a': torch.ones(2, 2)}, {'a': torch.zeros(4)},
                {'a': torch.ones(4).half()}]
    hashes = set()
    for i, tensors in enumerate(versions):
        (tmp_path/str(i)).mkdir()
        save_file(tensors, tmp_path/str(i)/'x.safetensors')
        hashes.add(weights_sha256(tmp_path/str(i)))
    assert len(hashes) == len(versions)


def test_a_hash_needs_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match='no .safetensors file in'): weights_sha256(tmp_path)


# ---- loading

@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_loading_a_folder(arch, tmp_path):
    tiny_model(arch).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load(tmp_path)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.padding_side == 'left'
    assert len(decoder_layers(model)) == 4
    assert backbone(model) is not model
    if arch == 'gemma2': assert model.config._attn_implementation == 'eager'


def test_home_directory_in_a_path(folder, monkeypatch):
    monkeypatch.setenv('HOME', str(folder.parent))
    assert load('~/m')[0].config.name_or_path == str(folder)
    monkeypatch.setenv('SAEEXPLAINER_CACHE', '~/cache')
    assert cache_dir() == folder.parent/'cache'


@pytest.mark.parametrize('dtype, wanted', [
    ('half', torch.float16), ('torch.bfloat16', torch.bfloat16), (torch.float64, torch.float64), (None, torch.float32),
], ids=str)
def test_types_of_weights(folder, dtype, wanted):
    assert load_model(str(folder), dtype, 'cpu')[0].dtype == wanted


@pytest.mark.parametrize('dtype', ['bogus', 'None', 'auto', '', 'int8', 'nn', 'float8_e4m3fn', 5, torch.int8,
                                   ['float32']], ids=str)
def test_types_of_weights_that_are_not_known(folder, dtype):
    with pytest.raises(ValueError, match='dtype .* is not known: it is float32, bfloat16, float16, float64'):
        load_model(str(folder), dtype, 'cpu')


def test_float16_that_overflows_is_refused(folder):
    def enlarged(tensors): return tensors | {name: 3e5*tensors[name]}
    name = 'model.layers.2.mlp.down_proj.weight'
    edit_tensors(folder/'model.safetensors', enlarged)
    with pytest.raises(ValueError, match='is not finite in float16: use dtype bfloat16'):
        load_model(str(folder), 'float16', 'cpu')
    load_model(str(folder), 'bfloat16', 'cpu')


@pytest.mark.parametrize('device, says', [
    ('cuda', 'device cuda: torch sees 0 CUDA GPUs here: take device auto or cpu'),
    ('cuda:3', 'device cuda:3: torch sees'),
    ('gpu', "device 'gpu' is not known"),
])
def test_devices_that_are_not_there(device, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    with pytest.raises(ValueError, match=says): model_device(device)


@pytest.mark.parametrize('device', ['cpu', torch.device('cpu')], ids=repr)
def test_a_device_by_its_name_or_as_torch_has_it(device):
    assert model_device(device).type == 'cpu'


@pytest.mark.parametrize('arch', ['gemma2', 'gpt2'])
def test_tied_weights_are_not_missing(arch, tmp_path):
    tiny_model(arch).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert 'lm_head.weight' not in load_file(tmp_path/'model.safetensors')
    load(tmp_path)


def test_a_config_that_asks_for_tuples(folder):
    edit_json(folder/'config.json', return_dict=False)
    model, _ = load(folder)
    assert backbone(model)(input_ids=torch.tensor([[5, 6]])).last_hidden_state.shape == (1, 2, 64)


# ---- models that are not there

NO_MODEL = 'no model in .*give a folder with config.json and safetensors, or a hub id'


@pytest.mark.parametrize('load_one', [load_model, load_tokenizer])
@pytest.mark.parametrize('name', ['/no/such', './nowhere', '~/nowhere', 'two words', '', 'a/b/c', 'a\0b',
                                  None, 5, ['a'], b'x', {}])
def test_names_of_no_model(load_one, name):
    with pytest.raises(FileNotFoundError, match=NO_MODEL): load_one(name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match='is no folder of a model: there is no config.json in it'):
        load_model(str(tmp_path))


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(FileNotFoundError) as error: load_model('no/such')
    assert "the model 'no/such' is no folder here and cannot be had from the hub" in message(error)


# ---- what is damaged or missing is said, and nothing random is loaded

@pytest.mark.parametrize('part', ['layers.1.', 'layers.3.mlp.up_proj', 'embed_tokens', 'lm_head', 'model.norm'])
def test_missing_tensors_are_refused(folder, part):
    def without_part(tensors): return {name: tensor for name, tensor in tensors.items() if part not in name}
    edit_tensors(folder/'model.safetensors', without_part)
    with pytest.raises(ValueError, match=f"the checkpoint of '{folder}' lacks .*{part}.* which would be random"):
        load(folder)


@pytest.mark.parametrize('values, says', [
    (dict(num_hidden_layers=6), 'lacks model.layers.4.input_layernorm.weight and 17 more tensors'),
    (dict(num_hidden_layers=3), 'has a layer 3 .*, its config.json wants layers 0 to 2 only'),
    (dict(vocab_size=600), r'lm_head.weight of shape \(512, 64\), its config.json wants \(600, 64\)'),
])
def test_config_of_another_model_is_refused(folder, values, says):
    edit_json(folder/'config.json', **values)
    with pytest.raises(ValueError, match=says): load(folder)


@pytest.mark.parametrize('values', [
    dict(hidden_size='64'),
    dict(hidden_size=None),
    dict(model_type='nosuch'),
    dict(num_attention_heads=3),
    dict(dtype='float99'),
    dict(rope_parameters=5),
], ids=str)
def test_malformed_configs_are_one_line(folder, values):
    edit_json(folder/'config.json', **values)
    with pytest.raises((ValueError, OSError)) as error: load(folder)
    assert str(folder) in message(error)


LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 15\n'
FILES = ['config.json', 'generation_config.json', 'tokenizer_config.json', 'tokenizer.json', 'model.safetensors']


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('damage', [
    lambda data: data[:len(data)//2],
    lambda data: b'',
    lambda data: b'[1]',
    lambda data: b'null',
    lambda data: b'\xff\xfe',
    lambda data: b'\xef\xbb\xbf' + data,
    lambda data: LFS,
], ids=['half', 'empty', 'list', 'null', 'no-text', 'mark', 'pointer'])
def test_damaged_files_are_named(folder, name, damage):
    (folder/name).write_bytes(damage((folder/name).read_bytes()))
    with pytest.raises(ValueError) as error: load(folder)
    assert str(folder/name) in message(error)


@pytest.mark.parametrize('name, content, says', [
    ('added_tokens.json', b'{', 'is not JSON'),
    ('added_tokens.json', b'[1]', 'not an object'),
    ('added_tokens.json', b'{"<a>": "x"}', "<a> is 'x', not a token id"),
    ('added_tokens.json', b'\xff', 'is not JSON'),
    ('added_tokens.json', b'\xef\xbb\xbf{}', 'byte-order mark'),
    ('special_tokens_map.json', b'{"pad_token": 5}', 'pad_token is 5, not a token'),
    ('special_tokens_map.json', b'{"additional_special_tokens": 5}', 'additional_special_tokens is 5, not a token'),
    ('chat_template.jinja', b'\xff\xfe\xff', 'is not UTF-8'),
])
def test_damaged_files_of_a_tokenizer_are_named(folder, name, content, says):
    (folder/name).write_bytes(content)
    with pytest.raises(ValueError, match=f'{folder/name}.*{says}') as error: load(folder)
    message(error)


@pytest.mark.parametrize('load_one', [load_model, load_tokenizer])
def test_a_chat_template_with_a_byte_order_mark(folder, load_one):
    file = folder/'chat_template.jinja'
    file.write_bytes(b'\xef\xbb\xbf' + file.read_bytes())
    with pytest.raises(ValueError, match='chat_template.jinja. begins with a byte-order mark'): load_one(str(folder))


@pytest.fixture
def with_merges(folder):
    "A model whose tokenizer has vocab.json and merges.txt, and no tokenizer.json"
    made = json.loads((folder/'tokenizer.json').read_text())['model']
    (folder/'tokenizer.json').unlink()
    (folder/'vocab.json').write_text(json.dumps(made['vocab']))
    lines = ['#version: 0.2', *(' '.join(pair) for pair in made['merges'])]
    (folder/'merges.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    edit_json(folder/'tokenizer_config.json', tokenizer_class='GPT2Tokenizer')
    return folder


def test_a_tokenizer_of_merges(with_merges):
    assert load(with_merges)[1]('the cat').input_ids == tiny_tokenizer()('the cat').input_ids


@pytest.mark.parametrize('content, says', [
    (b'\xff', 'is not UTF-8'),
    (b'', 'is empty: fetch it again'),
    (b'three words here\n', "merge 1 is 'three words here', not two tokens"),
    (b'#version: 0.2\na b\nc\n', "merge 2 is 'c'"),
])
def test_damaged_merges_are_named(with_merges, content, says):
    file = with_merges/'merges.txt'
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f'{file}.*{says}'): load(with_merges)


# ---- weights

def shards_of(folder): return sorted(folder.glob('model-*.safetensors'))


def test_shards(sharded):
    loaded = load(sharded)[0].state_dict()
    want = tiny_model().state_dict()
    assert len(shards_of(sharded)) > 3
    assert all(torch.equal(tensor, want[name]) for name, tensor in loaded.items())


def test_a_shard_that_is_cut_off_is_named(sharded):
    shard = shards_of(sharded)[1]
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises(ValueError, match=f'{shard.name} is cut off or damaged'): load(sharded)


def test_a_shard_that_is_missing_is_named(sharded):
    shard = shards_of(sharded)[1]
    shard.unlink()
    says = f'{shard.name} is missing, and model.safetensors.index.json names it'
    with pytest.raises(FileNotFoundError, match=says): load(sharded)


def other_shard(shard): return lambda index: index | {'weight_map': index['weight_map'] | {'lm_head.weight': shard}}


NOT_BESIDE = 'lm_head.weight is in .*, not in a file beside it'


@pytest.mark.parametrize('change, says', [
    (lambda index: {}, 'has no weight_map'),
    (lambda index: {'weight_map': index['weight_map']}, 'has no metadata'),
    (lambda index: index | {'metadata': []}, 'has no metadata'),
    (lambda index: index | {'weight_map': []}, 'has no weight_map'),
    (lambda index: index | {'weight_map': {}}, 'has no weight_map'),
    (other_shard(5), NOT_BESIDE),
    (other_shard(None), NOT_BESIDE),
    (other_shard(['a']), NOT_BESIDE),
    (other_shard(''), NOT_BESIDE),
    (other_shard('../m/model.safetensors'), NOT_BESIDE),
    (other_shard('/etc/passwd'), NOT_BESIDE),
])
def test_damaged_indexes(sharded, change, says):
    file = sharded/'model.safetensors.index.json'
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=f'{file}.*{says}') as error: load(sharded)
    message(error)


def test_an_index_with_a_byte_order_mark(sharded):
    file = sharded/'model.safetensors.index.json'
    file.write_text('\ufeff' + file.read_text(), encoding='utf-8')
    with pytest.raises(ValueError, match=f'{file} begins with a byte-order mark'): load(sharded)


def test_pickled_weights_are_not_read(tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path/'pytorch_model.bin')
    with pytest.raises(OSError): load_model(str(tmp_path))


@pytest.mark.parametrize('use', [load, weights_sha256])
def test_weights_that_may_not_be_read(folder, use, monkeypatch):
    access = os.access
    closed = str(folder/'model.safetensors')
    monkeypatch.setattr(os, 'access', lambda file, mode: str(file) != closed and access(file, mode))
    with pytest.raises(PermissionError) as error: use(folder)
    assert f'{closed} may not be read by this user' in message(error)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_weights_that_are_closed(folder):
    os.chmod(folder/'model.safetensors', 0)
    with pytest.raises(PermissionError, match='model.safetensors may not be read by this user'): load(folder)


def test_weights_that_are_a_folder(folder):
    (folder/'model.safetensors').unlink()
    (folder/'model.safetensors').mkdir()
    with pytest.raises(IsADirectoryError, match='model.safetensors is a folder, not a file'): load(folder)


# ---- code of a model

EVIL_MODEL = dict(auto_map={'AutoConfig': 'evil.C', 'AutoModelForCausalLM': 'evil.C'}, model_type='evil')
EVIL_TOKENIZER = dict(auto_map={'AutoTokenizer': ['evil.C', None]}, tokenizer_class='EvilTokenizer')


@pytest.mark.parametrize('name, values', [
    ('config.json', EVIL_MODEL), ('tokenizer_config.json', EVIL_TOKENIZER),
], ids=['model', 'tokenizer'])
def test_code_of_a_model_is_never_run(folder, name, values, monkeypatch):
    "Nor is it asked whether it may: 'y' is what `yes` would answer"
    (folder/'evil.py').write_text(f"open({str(folder/'ran')!r}, 'w')\nclass C: pass\n")
    edit_json(folder/name, **values)
    monkeypatch.setattr(sys, 'stdin', io.StringIO('y\n'*20))
    with pytest.raises(ValueError) as error: load(folder)
    assert 'needs code of its own, which is not run here' in message(error)
    assert not (folder/'ran').exists()
