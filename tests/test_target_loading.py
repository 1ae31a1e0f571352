"Targets of presets: what is loaded, and which models and SAEs do not go together"
import sys
from types import SimpleNamespace
import numpy as np
import pytest
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from helpers import tiny_model, tiny_sae, tiny_tokenizer
from saeexplainer.features import load_features
from saeexplainer.lm.models import EMBEDDED, EMBEDDED_SHA256, weights_sha256
from saeexplainer.presets import load_preset, presets
from saeexplainer.saes import FeatureReader
from saeexplainer.target import Target, check_model_name, check_weights
from target_worlds import TEXTS, reader_at


@pytest.fixture(scope='module')
def model(): return tiny_model()


@pytest.fixture(scope='module')
def tokenizer(): return tiny_tokenizer()


@pytest.fixture
def preset(tmp_path, model, tokenizer):
    "A preset of a tiny model and its SAE, which knows the hash of the model's weights"
    folder = tmp_path/'model'
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sae = tiny_sae(tmp_path/'sae', model_name='tiny-llama', card={'model_sha256': weights_sha256(folder)})
    how = dict(layer=2, dtype='float32', device='cpu', batch_tokens=99)
    return load_preset('smollm2-135m', target=str(folder), sae=str(sae), **how)


def test_load(preset, model, tokenizer, tmp_path):
    loaded = Target.load(preset)
    assert (loaded.batch_size, loaded.max_tokens) == (preset.batch_size, 99)
    wanted = Target(model, tokenizer, reader_at(tmp_path/'same')).max_acts(TEXTS, 3)
    np.testing.assert_allclose(loaded.max_acts(TEXTS, 3), wanted, atol=1e-4)


def test_a_reader_that_is_loaded_already_is_taken(preset):
    reader = FeatureReader.load(preset)
    assert Target.load(preset, reader).reader is reader


# ---- models and SAEs that do not go together

def test_other_weights_are_refused(preset, tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path/'model')
    says = 'this SAE belongs to weights with hash .* its activations would mean something else'
    with pytest.raises(ValueError, match=says): Target.load(preset)


def test_other_embedded_weights_are_refused(tmp_path, monkeypatch):
    tiny_model(seed=1).save_pretrained(tmp_path/EMBEDDED)
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path))
    reader = FeatureReader.load(tiny_sae(tmp_path/'sae', card={'model_sha256': EMBEDDED_SHA256}))
    says = f"belongs to weights with hash {EMBEDDED_SHA256[:12]}, those of '{EMBEDDED}'"
    with pytest.raises(ValueError, match=says): check_weights(EMBEDDED, reader)


@pytest.mark.parametrize('fields, says', [
    (dict(layer=1), 'the preset says layer 1, its SAE .* reads layer 2'),
    (dict(target='org/gemma-9b'), "this SAE is for the model 'tiny-llama', not for 'org/gemma-9b'"),
])
def test_a_preset_that_says_something_else_than_its_sae(preset, fields, says):
    with pytest.raises(ValueError, match=says): Target.load(load_preset(preset, **fields))


@pytest.mark.parametrize('sae, says', [
    (dict(d_in=32), 'the SAE is 32 wide and the model 64: this SAE is for another model'),
    (dict(layer=4), 'the SAE reads layer 4, the model has layers 0 to 3'),
])
def test_saes_of_other_sizes_are_refused(tmp_path, model, tokenizer, sae, says):
    reader = reader_at(tmp_path, **sae)
    with pytest.raises(ValueError, match=says): Target(model, tokenizer, reader)


# ---- names of models

SAME = [
    ('google/gemma-2-9b', 'gemma-2-9b'),
    ('google/gemma-2-9b-it', 'gemma-2-9b'),
    ('org/Gemma-2-9B', 'gemma-2-9b'),
    ('me/gemma2-9b', 'gemma-2-9b'),
    ('google/gemma-3-4b-pt', 'google/gemma-3-4b-it'),
    ('openai-community/gpt2', 'gpt2-small'),
    ('gpt2', 'https://huggingface.co/gpt2'),
    ('meta-llama/Meta-Llama-3.1-8B', 'meta-llama/Llama-3.1-8B-Instruct'),
    ('mistralai/Mistral-7B-v0.1', 'mistral-7b'),
    ('mistralai/Mistral-7B-Instruct-v0.1', 'mistral-7b'),
    ('roneneldan/TinyStories-1Layer-21M', 'tiny-stories-1L-21M'),
    ('roneneldan/TinyStories-33M', 'tiny-stories-33M'),
    ('Qwen/Qwen3-8B-Base', 'qwen3-8b'),
    ('Qwen/Qwen2.5-1.5B-Instruct', 'qwen2.5-1.5b'),
    ('Qwen/Qwen2-1.5B', 'Qwen2-1_5B'),
    ('EleutherAI/pythia-70m-deduped', 'https://huggingface.co/EleutherAI/pythia-70m-deduped'),
    ('smollm2-135m-instruct', 'SmolLM2-135M'),
    ('me/Smol-LM2-135M', 'SmolLM2-135M'),
]
OTHERS = [
    ('EleutherAI/pythia-70m', 'pythia-70m-deduped'),
    ('EleutherAI/pythia-70m-deduped', 'pythia-70m'),
    ('EleutherAI/pythia-160m-seed1', 'pythia-160m'),
    ('mistralai/Mistral-7B-v0.3', 'mistral-7b'),
    ('gpt2-medium', 'gpt2-small'),
    ('gpt2-medium', 'gpt2'),
    ('distilgpt2', 'gpt2'),
    ('google/gemma-2-2b', 'gemma-2-9b'),
    ('google/gemma-2b', 'gemma-2-2b'),
    ('google/codegemma-7b', 'google/gemma-7b'),
    ('me/gemma-29b', 'gemma-2-9b'),
    ('me/it', 'gemma-2-9b'),
    ('me/it', 'instruct'),
    ('me/model', 'it'),
    ('meta-llama/Llama-3.1-8B', 'meta-llama/Llama-3.2-8B'),
    ('meta-llama/Llama-3-18B', 'Llama-3.1-8B'),
    ('roneneldan/TinyStories-Instruct-33M', 'tiny-stories-33M'),
    ('roneneldan/TinyStories-33M', 'tiny-stories-instruct-33M'),
    ('Qwen/Qwen2.5-15B', 'qwen2.5-1.5b'),
    ('facebook/opt-1.3b', 'opt-13b'),
    ('microsoft/phi-1.5', 'microsoft/phi-1'),
]
UNSURE = [
    ('unsloth/gemma-2-9b-bnb-4bit', 'gemma-2-9b'),
    ('me/gemma-2-9b-medicine', 'gemma-2-9b'),
    ('google/gemma-2-9b', 'me/gemma-2-9b-tuned'),
]
WARNING = 'its activations mean something only if their weights are the same'


def reader_of(model):
    "What `check_model_name` asks of a reader: the name of the SAE's model"
    return SimpleNamespace(sae=SimpleNamespace(cfg=SimpleNamespace(metadata=SimpleNamespace(model_name=model))))


def test_the_name_is_that_of_the_saes_metadata(tmp_path):
    reader = FeatureReader.load(tiny_sae(tmp_path/'sae', model_name='gemma-2-9b'))
    check_model_name('google/gemma-2-9b', reader)
    with pytest.raises(ValueError, match="this SAE is for the model 'gemma-2-9b'"):
        check_model_name('google/gemma-2-2b', reader)


@pytest.mark.parametrize('name, known', SAME)
def test_names_of_the_same_model(name, known, capfd):
    check_model_name(name, reader_of(known))
    assert WARNING not in capfd.readouterr().err


@pytest.mark.parametrize('name, known', UNSURE)
def test_names_of_what_may_be_the_same_model(name, known, capfd):
    check_model_name(name, reader_of(known))
    assert WARNING in capfd.readouterr().err


@pytest.mark.parametrize('name, known', OTHERS)
def test_names_of_other_models(name, known, capfd):
    says = f"this SAE is for the model '{known}', not for '{name}'.*`sae_model: {name}`"
    with pytest.raises(ValueError, match=says): check_model_name(name, reader_of(known))
    assert WARNING not in capfd.readouterr().err


def test_presets_go_with_their_saes(capfd):
    "Nothing is refused or said of the models that the presets name"
    releases = get_pretrained_saes_directory()
    released = [preset for preset in map(load_preset, presets()) if preset.sae.split(':')[0] in releases]
    assert len(released) > 5
    for preset in released:
        reader = reader_of(releases[preset.sae.split(':')[0]].model)
        check_model_name(preset.target, reader)
        if preset.bridge is None: check_model_name(preset.explainer, reader)
    assert capfd.readouterr().err == ''


# ---- weights in eight bits, layers on several devices

def strongest(**settings):
    "Activations of features of the embedded model on the contexts that set them off most"
    preset = load_preset('smollm2-135m', **settings)
    chosen = [feature for feature in load_features(preset) if feature.contexts][:40]
    texts = [str(feature.contexts[0]) for feature in chosen]
    return Target.load(preset).max_acts(texts, [feature.index for feature in chosen])


def test_a_target_in_eight_bits_reads_nearly_the_same():
    pytest.importorskip('torchao', reason='torchao is not installed')
    as_published = strongest()
    in_eight_bits = strongest(int8_target=True)
    assert not (as_published == in_eight_bits).all()
    assert abs(in_eight_bits/as_published - 1).max() < .1


def test_eight_bits_need_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchao.quantization', None)
    with pytest.raises(ValueError, match=r"torchao: pip install 'saeexplainer\[quantised\]'"):
        Target.load(load_preset('smollm2-135m', int8_target=True))


def test_a_target_that_is_spread_reads_the_same():
    assert (strongest() == strongest(spread_target=True)).all()
