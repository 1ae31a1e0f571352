"The embedded model's conversion, hashes and loading"
import json, os, signal, subprocess, sys
from pathlib import Path
import pytest, torch
from helpers import ARCHITECTURES, tiny_model, tiny_tokenizer
from saeexplainer.lm.hooks import backbone, decoder_layers
from saeexplainer.lm.models import EMBEDDED, EMBEDDED_SHA256, cache_dir, embedded_model_dir, load_model, load_tokenizer, model_device, weights_sha256


def test_the_embedded_model_is_the_model_of_record(): assert weights_sha256(embedded_model_dir()) == EMBEDDED_SHA256


def test_a_conversion_that_is_cut_off_leaves_nothing(tmp_path):
    "Killed while it writes, the cache has no model that only looks whole"
    env = {**os.environ, 'SAEEXPLAINER_CACHE': str(tmp_path)}
    code = 'from saeexplainer.models import embedded_model_dir; embedded_model_dir()'
    process = subprocess.Popen([sys.executable, '-c', code], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(f'{EMBEDDED}-*')): pass
    process.kill()
    assert process.wait() == -signal.SIGKILL # and no failure of its own
    assert not (tmp_path/EMBEDDED/'model.safetensors').exists()


def test_hash_depends_on_values_names_and_shapes(tmp_path):
    from safetensors.torch import save_file
    hashes = set()
    for i, tensors in enumerate(({'a': torch.ones(4)}, {'b': torch.ones(4)}, {'a': torch.ones(2, 2)}, {'a': torch.zeros(4)}, {'a': torch.ones(4).half()})):
        (tmp_path/str(i)).mkdir(); save_file(tensors, tmp_path/str(i)/'x.safetensors'); hashes.add(weights_sha256(tmp_path/str(i)))
    assert len(hashes) == 5
    with pytest.raises(FileNotFoundError, match='no .safetensors file in'): weights_sha256(tmp_path)


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_loading_a_folder(arch, tmp_path):
    tiny_model(arch).save_pretrained(tmp_path); tiny_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path), 'float32', 'cpu')
    assert not model.training and not any(p.requires_grad for p in model.parameters()) and tokenizer.padding_side == 'left'
    assert len(decoder_layers(model)) == 4 and backbone(model) is not model
    if arch=='gemma2': assert model.config._attn_implementation == 'eager'


def test_pickled_weights_are_not_read(tmp_path):
    model = tiny_model(); model.config.save_pretrained(tmp_path); tiny_tokenizer().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path/'pytorch_model.bin')
    with pytest.raises(OSError): load_model(str(tmp_path))


# ---- what is damaged or missing is said, and nothing random is loaded

@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path/'m')
    tiny_tokenizer().save_pretrained(tmp_path/'m')
    return tmp_path/'m'


def edit_json(file, **values): file.write_text(json.dumps(json.loads(file.read_text()) | values))


def drop(file, *parts): # tensors whose names contain one of the parts
    from safetensors.torch import load_file, save_file
    save_file({k: v for k, v in load_file(file).items() if not any(p in k for p in parts)}, file, metadata={'format': 'pt'})


@pytest.mark.parametrize('parts', [['layers.1.'], ['layers.3.mlp.up_proj'], ['embed_tokens'], ['lm_head'], ['model.norm']])
def test_missing_tensors_are_refused(folder, parts):
    drop(folder/'model.safetensors', *parts)
    with pytest.raises(ValueError, match=f"the checkpoint of '{folder}' lacks .*{parts[0]}.* which would be random"): load_model(str(folder), 'float32', 'cpu')


@pytest.mark.parametrize('arch', ['gemma2', 'gpt2'])
def test_tied_weights_are_not_missing(arch, tmp_path):
    from safetensors.torch import load_file
    tiny_model(arch).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert 'lm_head.weight' not in load_file(tmp_path/'model.safetensors')
    load_model(str(tmp_path), 'float32', 'cpu')


def test_config_of_another_model_is_refused(folder):
    edit_json(folder/'config.json', num_hidden_layers=6)
    with pytest.raises(ValueError, match='lacks model.layers.4.input_layernorm.weight and 17 more tensors'): load_model(str(folder), 'float32', 'cpu')
    edit_json(folder/'config.json', num_hidden_layers=3)
    with pytest.raises(ValueError, match='has a layer 3 .*, its config.json wants layers 0 to 2 only'): load_model(str(folder), 'float32', 'cpu')
    edit_json(folder/'config.json', num_hidden_layers=4, vocab_size=600)
    with pytest.raises(ValueError, match=r'lm_head.weight of shape \(512, 64\), its config.json wants \(600, 64\)'): load_model(str(folder), 'float32', 'cpu')


LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 15\n'
FILES = ['config.json', 'generation_config.json', 'tokenizer_config.json', 'tokenizer.json', 'model.safetensors']


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b'', lambda b: b'[1]', lambda b: b'null', lambda b: b'\xff\xfe', lambda b: b'\xef\xbb\xbf' + b, lambda b: LFS])
def test_damaged_files_are_named(folder, name, damage):
    (folder/name).write_bytes(damage((folder/name).read_bytes()))
    with pytest.raises(ValueError) as e: load_model(str(folder), 'float32', 'cpu')
    assert str(folder/name) in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('values', [dict(hidden_size='64'), dict(hidden_size=None), dict(model_type='nosuch'), dict(num_attention_heads=3), dict(dtype='float99'), dict(rope_parameters=5)])
def test_malformed_configs_are_one_line(folder, values):
    edit_json(folder/'config.json', **values)
    with pytest.raises((ValueError, OSError)) as e: load_model(str(folder), 'float32', 'cpu')
    assert str(folder) in str(e.value) and '\n' not in str(e.value)


def test_shards(folder):
    model, shards = tiny_model(), lambda: sorted(folder.glob('model-*.safetensors'))
    (folder/'model.safetensors').unlink()
    model.save_pretrained(folder, max_shard_size='100KB')
    loaded = load_model(str(folder), 'float32', 'cpu')[0]
    assert len(shards()) > 3 and all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    whole = shards()[1].read_bytes()
    shards()[1].write_bytes(whole[:500])
    with pytest.raises(ValueError, match=f'{shards()[1].name} is cut off or damaged'): load_model(str(folder), 'float32', 'cpu')
    gone = shards()[1].name
    shards()[1].unlink()
    with pytest.raises(FileNotFoundError, match=f'{gone} is missing, and model.safetensors.index.json names it'): load_model(str(folder), 'float32', 'cpu')
    (folder/'model.safetensors.index.json').write_text('{}')
    with pytest.raises(ValueError, match='model.safetensors.index.json has no weight_map'): load_model(str(folder), 'float32', 'cpu')


@pytest.mark.parametrize('name', ['/no/such', './nowhere', '~/nowhere', 'two words', '', 'a/b/c', 'a\0b'])
def test_folders_that_do_not_exist(name):
    for load in (load_model, load_tokenizer):
        with pytest.raises(FileNotFoundError, match='no model in .*give a folder with config.json and safetensors, or a hub id'): load(name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match='is no folder of a model: there is no config.json in it'): load_model(str(tmp_path))


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(FileNotFoundError, match="the model 'no/such' is no folder here and cannot be had from the hub") as e: load_model('no/such')
    assert '\n' not in str(e.value)


def test_home_directory_in_a_path(folder, monkeypatch):
    monkeypatch.setenv('HOME', str(folder.parent))
    assert load_model('~/m', 'float32', 'cpu')[0].config.name_or_path == str(folder)
    monkeypatch.setenv('SAEEXPLAINER_CACHE', '~/cache')
    assert cache_dir() == folder.parent/'cache'


@pytest.mark.parametrize('name', ['config.json', 'tokenizer_config.json'])
def test_code_of_a_model_is_never_run(folder, name, monkeypatch):
    "Nor is it asked whether it may: 'y' is what `yes` would answer"
    import io
    (folder/'evil.py').write_text(f"open({str(folder/'ran')!r}, 'w')\nclass C: pass\n")
    kinds = {'AutoConfig': 'evil.C', 'AutoModelForCausalLM': 'evil.C'} if name == 'config.json' else {'AutoTokenizer': ['evil.C', None]}
    edit_json(folder/name, auto_map=kinds, **({'model_type': 'evil'} if name == 'config.json' else {'tokenizer_class': 'EvilTokenizer'}))
    monkeypatch.setattr(sys, 'stdin', io.StringIO('y\n'*20))
    with pytest.raises(ValueError, match='needs code of its own, which is not run here') as e: load_model(str(folder), 'float32', 'cpu')
    assert '\n' not in str(e.value) and not (folder/'ran').exists()


@pytest.mark.parametrize('device, message', [('cuda', 'device cuda: torch sees 0 CUDA GPUs here: take device auto or cpu'), ('cuda:3', 'device cuda:3: torch sees'), ('gpu', "device 'gpu' is not known")])
def test_devices_that_are_not_there(device, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    with pytest.raises(ValueError, match=message): model_device(device)
    assert model_device('cpu').type == model_device(torch.device('cpu')).type == 'cpu'


def test_float16_that_overflows_is_refused(folder):
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder/'model.safetensors')
    tensors['model.layers.2.mlp.down_proj.weight'] *= 3e5
    save_file(tensors, folder/'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ValueError, match='is not finite in float16: use dtype bfloat16'): load_model(str(folder), 'float16', 'cpu')
    load_model(str(folder), 'bfloat16', 'cpu')


def test_a_converted_model_can_be_read_by_others(tmp_path, monkeypatch):
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    before = os.umask(0o022)
    try: folder = embedded_model_dir()
    finally: os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o755 and {f.stat().st_mode & 0o777 for f in folder.iterdir()} == {0o644}


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_a_cache_that_is_closed_says_what_to_set(tmp_path, monkeypatch):
    (tmp_path/'cache').mkdir(mode=0o000)
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    with pytest.raises(PermissionError, match='set SAEEXPLAINER_CACHE to another folder'): embedded_model_dir()


@pytest.mark.parametrize('dtype', ['bogus', 'None', 'auto', '', 'int8', 'nn', 'float8_e4m3fn', 5, torch.int8, ['float32']], ids=str)
def test_types_of_weights_that_are_not_known(folder, dtype):
    with pytest.raises(ValueError, match='dtype .* is not known: it is float32, bfloat16, float16, float64'): load_model(str(folder), dtype, 'cpu')


def test_types_of_weights(folder):
    for dtype, wanted in (('half', torch.float16), ('torch.bfloat16', torch.bfloat16), (torch.float64, torch.float64), (None, torch.float32)): assert load_model(str(folder), dtype, 'cpu')[0].dtype == wanted


@pytest.mark.parametrize('name', [None, 5, ['a'], b'x', {}])
def test_names_that_are_none(name):
    for load in (load_model, load_tokenizer):
        with pytest.raises(FileNotFoundError, match='no model in .*give a folder with config.json and safetensors, or a hub id'): load(name)


def test_weights_that_may_not_be_read(folder, monkeypatch):
    access, closed = os.access, str(folder/'model.safetensors')
    monkeypatch.setattr(os, 'access', lambda file, mode: str(file) != closed and access(file, mode))
    for use in (lambda: load_model(str(folder), 'float32', 'cpu'), lambda: weights_sha256(folder)):
        with pytest.raises(PermissionError, match=f'{closed} may not be read by this user') as e: use()
        assert '\n' not in str(e.value)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_weights_that_are_closed(folder):
    os.chmod(folder/'model.safetensors', 0)
    with pytest.raises(PermissionError, match='model.safetensors may not be read by this user'): load_model(str(folder), 'float32', 'cpu')


def test_weights_that_are_a_folder(folder):
    (folder/'model.safetensors').unlink()
    (folder/'model.safetensors').mkdir()
    with pytest.raises(IsADirectoryError, match='model.safetensors is a folder, not a file'): load_model(str(folder), 'float32', 'cpu')


INDEXES = [(lambda i: {'weight_map': i['weight_map']}, 'has no metadata'), (lambda i: i | {'metadata': []}, 'has no metadata'), (lambda i: i | {'weight_map': []}, 'has no weight_map'), (lambda i: i | {'weight_map': {}}, 'has no weight_map'),
           *((lambda i, shard=shard: i | {'weight_map': i['weight_map'] | {'lm_head.weight': shard}}, 'lm_head.weight is in .*, not in a file beside it') for shard in (5, None, ['a'], '', '../m/model.safetensors', '/etc/passwd'))]

@pytest.mark.parametrize('change, says', INDEXES)
def test_damaged_indexes(folder, change, says):
    (folder/'model.safetensors').unlink()
    tiny_model().save_pretrained(folder, max_shard_size='100KB')
    file = folder/'model.safetensors.index.json'
    whole = file.read_text()
    file.write_text(json.dumps(change(json.loads(whole))))
    with pytest.raises(ValueError, match=f'{file}.*{says}') as e: load_model(str(folder), 'float32', 'cpu')
    assert '\n' not in str(e.value)
    file.write_text('\ufeff' + whole, encoding='utf-8')
    with pytest.raises(ValueError, match=f'{file} begins with a byte-order mark'): load_model(str(folder), 'float32', 'cpu')


@pytest.mark.parametrize('name, content, says', [
    *(('added_tokens.json', content, says) for content, says in ((b'{', 'is not JSON'), (b'[1]', 'not an object'), (b'{"<a>": "x"}', "<a> is 'x', not a token id"), (b'\xff', 'is not JSON'), (b'\xef\xbb\xbf{}', 'byte-order mark'))),
    ('special_tokens_map.json', b'{"pad_token": 5}', 'pad_token is 5, not a token'), ('special_tokens_map.json', b'{"additional_special_tokens": 5}', 'additional_special_tokens is 5, not a token'),
    ('chat_template.jinja', b'\xff\xfe\xff', 'is not UTF-8')])
def test_damaged_files_of_a_tokenizer_are_named(folder, name, content, says):
    (folder/name).write_bytes(content)
    with pytest.raises(ValueError, match=f'{folder/name}.*{says}') as e: load_model(str(folder), 'float32', 'cpu')
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('content, says', [(b'\xff', 'is not UTF-8'), (b'', 'is empty: fetch it again'), (b'three words here\n', "merge 1 is 'three words here', not two tokens"), (b'#version: 0.2\na b\nc\n', "merge 2 is 'c'")])
def test_damaged_merges_are_named(folder, content, says):
    "Of a tokenizer without tokenizer.json"
    made = json.loads((folder/'tokenizer.json').read_text())['model']
    (folder/'tokenizer.json').unlink()
    (folder/'vocab.json').write_text(json.dumps(made['vocab']))
    (folder/'merges.txt').write_text('#version: 0.2\n' + ''.join(f'{" ".join(pair)}\n' for pair in made['merges']), encoding='utf-8')
    edit_json(folder/'tokenizer_config.json', tokenizer_class='GPT2Tokenizer')
    assert load_model(str(folder), 'float32', 'cpu')[1]('the cat').input_ids == tiny_tokenizer()('the cat').input_ids
    (folder/'merges.txt').write_bytes(content)
    with pytest.raises(ValueError, match=f"{folder/'merges.txt'}.*{says}"): load_model(str(folder), 'float32', 'cpu')


def test_a_chat_template_with_a_byte_order_mark(folder):
    file = folder/'chat_template.jinja'
    file.write_bytes(b'\xef\xbb\xbf' + file.read_bytes())
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match='chat_template.jinja. begins with a byte-order mark'): load(str(folder))


def test_a_config_that_asks_for_tuples(folder):
    edit_json(folder/'config.json', return_dict=False)
    model = load_model(str(folder), 'float32', 'cpu')[0]
    assert backbone(model)(input_ids=torch.tensor([[5, 6]])).last_hidden_state.shape == (1, 2, 64)
