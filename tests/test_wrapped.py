"""Models whose layers lie elsewhere than in most, as targets and as explainers

Gemma 3 with its vision part, Gemma 3n, Gemma 4, Llama 4, OPT, MPT and BLOOM.
"""
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
import trl
from peft import LoraConfig, get_peft_model
from helpers import PLACEHOLDER, SPECIALS, WRAPPED, save_wrapped, tiny_model, tiny_sae, tiny_tokenizer
from judged import judged_preset
from saeexplainer.explainer import Explainer, ExplainerCard
from saeexplainer.lm.hooks import backbone, decoder_layers, residual_hook, residual_stream, routers
from saeexplainer.lm.models import load_model
from saeexplainer.presets import AS_PAPER, load_preset
from saeexplainer.run import Run, execute
from saeexplainer.saes import FeatureReader
from saeexplainer.target import Target

TEXTS = ['The cat sat on the mat.', 'A national park']


class World:
    "A model as it is published, an SAE for it, and a preset that names both"
    def __init__(self, folder, arch):
        self.folder = folder
        self.model = str(folder/'model')
        self.whole = save_wrapped(folder/'model', arch)
        sae = str(tiny_sae(folder/'sae', 'standard'))
        self.reader = FeatureReader.load(sae)
        models = dict(explainer=self.model, target=self.model, sae=sae, layer=2)
        how = dict(device='cpu', dtype='float32', placeholder=PLACEHOLDER)
        self.preset = load_preset('smollm2-135m', **AS_PAPER, **models, **how)

    def load(self): return load_model(self.model, 'float32', 'cpu')


@pytest.fixture(scope='module', params=WRAPPED)
def world(request, tmp_path_factory): return World(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope='module')
def target(world): return Target.load(world.preset)


def ids_of(tokenizer, text):
    return torch.tensor([[1, *tokenizer(text, add_special_tokens=False)['input_ids']]])


# ---- as targets

def test_the_text_model_is_the_published_one(world):
    model, tokenizer = world.load()
    ids = ids_of(tokenizer, TEXTS[0])
    with torch.no_grad():
        found = model(input_ids=ids).logits
        wanted = world.whole(input_ids=ids).logits
    assert torch.allclose(found, wanted, atol=1e-5)
    assert len(decoder_layers(model)) == 4
    assert not any('vision' in name for name, _ in model.named_parameters())
    assert model.base_model is not model


def test_layers_are_found_in_what_was_loaded_as_a_whole(world):
    if 'Llama4' in type(world.whole).__name__: return
    assert len(decoder_layers(world.whole)) == 4
    assert backbone(world.whole) is not world.whole


def streams(target):
    "Of each text, the residual stream behind layer 2, and what the model says of it"
    for text in TEXTS:
        seen = []
        with torch.no_grad(), residual_hook(target.model, 2, 'resid_post', seen.append):
            out = target.model(ids_of(target.tokenizer, text), output_hidden_states=True)
        yield seen[0], out.hidden_states[3]


def test_target(world, target):
    wanted = []
    for stream, of_model in streams(target):
        if of_model.ndim == 3: assert torch.equal(of_model, stream)
        acts = world.reader.sae.encode(stream)[0, 1:, 3]
        wanted.append(acts.max().item())
    assert target.max_acts(TEXTS, 3).tolist() == pytest.approx(wanted, abs=1e-4)


def test_behind_a_layer_is_before_the_next(target):
    ids = ids_of(target.tokenizer, TEXTS[0])
    mask = torch.ones_like(ids)
    behind = residual_stream(target.model, ids, mask, 1, 'resid_post')
    assert torch.equal(behind, residual_stream(target.model, ids, mask, 2, 'resid_pre'))


def test_steering(world, target):
    ids = ids_of(target.tokenizer, TEXTS[0])
    stream = residual_stream(target.model, ids, torch.ones_like(ids), 2)
    feature = int(world.reader.encode(stream)[0, -1].argmax())
    prompts = ['The cat', 'I think that']
    found = target.steering_value(feature, .1, prompts)
    assert found.reached
    def generate(prompts, seeds):
        return target.generate(prompts, feature, found.value, max_new_tokens=5, seeds=seeds)
    first = generate(prompts[:1], [1])
    second = generate(prompts[1:], [2])
    assert generate(prompts, [1, 2]) == first + second


# ---- as explainers

def run(explainer, ids):
    "The residual stream behind layer 1, and logits"
    seen = []
    with torch.no_grad(), residual_hook(explainer.model, 1, 'resid_post', seen.append):
        logits = explainer.model(input_ids=ids).logits
    return seen[0], logits


def test_explainer(world):
    "Eq. 6 at the placeholder, nothing before it"
    explainer = Explainer.from_preset(world.preset, world.reader)
    directions = world.reader.directions([1, 2])
    ids = torch.tensor([explainer.prompt]*2)
    at = explainer.prompt.index(explainer.placeholder_id)
    with explainer.injector.using(directions): injected, logits = run(explainer, ids)
    explainer.injector.remove()
    plain, plain_logits = run(explainer, ids)
    wanted = plain.clone()
    length = plain[:, at].norm(dim=-1, keepdim=True)
    wanted[:, at] += length*F.normalize(directions, dim=-1)
    assert torch.allclose(injected, wanted, atol=1e-5)
    assert torch.allclose(logits[:, :at], plain_logits[:, :at], atol=1e-5)
    moved = (logits - plain_logits)[:, at:]
    assert moved.abs().max() > .01


@pytest.fixture
def trained(world):
    "An explainer with adapters, not trained yet"
    model, tokenizer = world.load()
    config = LoraConfig(r=4, lora_alpha=4, target_modules='all-linear', task_type='CAUSAL_LM',
                        exclude_modules=routers(model) or None)
    card = ExplainerCard.from_preset(world.preset, world.reader, 'sft')
    return Explainer(get_peft_model(model, config), tokenizer, card)


def one_step(explainer, loss):
    loss.backward()
    parameters = [parameter for parameter in explainer.model.parameters() if parameter.requires_grad]
    torch.optim.SGD(parameters, lr=1.).step()


def logits_of(explainer, directions, ids):
    with torch.no_grad(), explainer.injector.using(directions):
        return explainer.model.eval()(input_ids=ids).logits


def test_training_and_saving(world, trained):
    "The direction reaches the model in training, and what is saved and merged says the same"
    directions = world.reader.directions([1, 2])
    ids = torch.tensor([trained.prompt + [30, 31]]*2)
    out = trained.model.train()(input_ids=ids, labels=ids, feature_vector=directions)
    others = trained.model(input_ids=ids, labels=ids, feature_vector=directions[[1, 0]])
    assert torch.allclose(out.logits[0], others.logits[1], atol=1e-5)
    assert (out.logits[0] - others.logits[0]).abs().max() > .01
    one_step(trained, out.loss)
    trained.model.eval()
    trained.save(world.folder/'explainer')
    how = dict(dtype='float32', device='cpu')
    merged = Explainer.from_pretrained(world.folder/'explainer', world.reader, **how)
    kept = Explainer.from_pretrained(world.folder/'explainer', world.reader, trainable=True, **how)
    logits = [logits_of(explainer, directions, ids) for explainer in (merged, kept)]
    assert torch.allclose(*logits, atol=1e-3)
    assert merged.explain(directions, max_new_tokens=5) == kept.explain(directions, max_new_tokens=5)


# ---- whole runs

def save_gemma3_with_eyes(folder): save_wrapped(folder, 'gemma3')

def save_qwen3_with_its_template(folder):
    template = (Path(trl.__file__).parent/'chat_templates'/'qwen3.jinja').read_text(encoding='utf-8')
    tokenizer = tiny_tokenizer(chat=template, specials=(*SPECIALS, '<think>', '</think>'))
    tokenizer.save_pretrained(folder)
    tiny_model('qwen3', n_layers=3, vocab=len(tokenizer)).save_pretrained(folder)


@pytest.mark.parametrize('save', [save_gemma3_with_eyes, save_qwen3_with_its_template])
def test_a_whole_run(tmp_path, monkeypatch, save):
    "SFT, preferences, DPO, metrics with steering, report; target, explainer and writer are one model"
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    file = judged_preset(tmp_path, reward='max', n_candidates=4, n_texts=3, n_pref=3, n_output=2, steering_kl=[.2],
                         steering_tokens=4, steering_prompts=['We', 'I think'])
    save(tmp_path/'model')
    with Run(tmp_path/'run', load_preset(file), progress=False) as run:
        execute(run, say=lambda line: None)
        said = run.store.explanations()
        steered = run.store.rows('SELECT DISTINCT feature FROM steering WHERE value != 0')
    assert {'sft', 'dpo1'} <= set(said['stage'])
    assert not said['text'].str.contains('think>').any()
    assert len(steered) >= 1
    assert list((tmp_path/'run'/'report').iterdir())
