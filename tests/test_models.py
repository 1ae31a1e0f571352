"The embedded model's conversion, hashes and loading"
import os, signal, subprocess, sys
from pathlib import Path
import pytest, torch
from helpers import ARCHITECTURES, tiny_model, tiny_tokenizer
from saeexplainer.models import EMBEDDED, EMBEDDED_SHA256, backbone, decoder_layers, embedded_model_dir, load_model, weights_sha256


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
