"""Models whose layers lie elsewhere than in most (Gemma 3 with its vision part, Gemma 3n, Gemma 4, Llama 4, OPT, MPT, BLOOM), as targets and as explainers"""
import pytest, torch
import torch.nn.functional as F
from helpers import PLACEHOLDER, WRAPPED, save_wrapped, tiny_sae
from saeexplainer.explainer import Explainer, ExplainerCard
from saeexplainer.lm.hooks import backbone, decoder_layers, routers
from saeexplainer.lm.models import load_model
from saeexplainer.presets import load_preset
from saeexplainer.saes import FeatureReader
from saeexplainer.lm.hooks import residual_hook, residual_stream
from saeexplainer.target import Target

TEXTS = ['The cat sat on the mat.', 'A national park']


class World:
    def __init__(self, folder, arch):
        self.whole = save_wrapped(folder/'model', arch)
        sae = tiny_sae(folder/'sae', 'standard')
        self.reader = FeatureReader.load(sae)
        self.folder = folder
        self.preset = load_preset('smollm2-135m', explainer=str(folder/'model'), target=str(folder/'model'), sae=str(sae), layer=2, device='cpu', dtype='float32', placeholder=PLACEHOLDER)


@pytest.fixture(scope='module', params=WRAPPED)
def world(request, tmp_path_factory): return World(tmp_path_factory.mktemp(request.param), request.param)


def ids_of(tokenizer, text): return torch.tensor([[1, *tokenizer(text, add_special_tokens=False)['input_ids']]])


def test_the_text_model_is_the_published_one(world):
    model, tokenizer = load_model(str(world.folder/'model'), 'float32', 'cpu')
    ids = ids_of(tokenizer, TEXTS[0])
    with torch.no_grad(): assert torch.allclose(model(input_ids=ids).logits, world.whole(input_ids=ids).logits, atol=1e-5)
    assert len(decoder_layers(model)) == 4 and not any('vision' in name for name, _ in model.named_parameters()) and model.base_model is not model
    if 'Llama4' not in type(world.whole).__name__: assert len(decoder_layers(world.whole)) == 4 and backbone(world.whole) is not world.whole # loaded as a whole, too


def test_target(world):
    target = Target.load(world.preset)
    states = []
    for text in TEXTS:
        with torch.no_grad(), residual_hook(target.model, 2, 'resid_post', states.append): out = target.model(ids_of(target.tokenizer, text), output_hidden_states=True)
        if out.hidden_states[3].ndim == 3: assert torch.equal(out.hidden_states[3], states[-1])
    wanted = [world.reader.sae.encode(s)[0, 1:, 3].max().item() for s in states]
    assert target.max_acts(TEXTS, 3).tolist() == pytest.approx(wanted, abs=1e-4)
    ids = ids_of(target.tokenizer, TEXTS[0])
    after, before = (residual_stream(target.model, ids, torch.ones_like(ids), layer, hook) for layer, hook in ((1, 'resid_post'), (2, 'resid_pre')))
    assert torch.equal(after, before)


def test_steering(world):
    target = Target.load(world.preset)
    stream = residual_stream(target.model, ids := ids_of(target.tokenizer, TEXTS[0]), torch.ones_like(ids), 2)
    feature = int(world.reader.encode(stream)[0, -1].argmax())
    prompts = ['The cat', 'I think that']
    found = target.steering_value(feature, .1, prompts)
    assert found.reached
    together = target.generate(prompts, feature, found.value, max_new_tokens=5, seeds=[1, 2])
    assert together == [target.generate([p], feature, found.value, max_new_tokens=5, seeds=[s])[0] for p, s in zip(prompts, (1, 2))]


def test_explainer(world):
    "Eq. 6 at the placeholder, nothing before it"
    explainer, directions = Explainer.from_preset(world.preset, world.reader), world.reader.directions([1, 2])
    ids, at = torch.tensor([explainer.prompt]*2), explainer.prompt.index(explainer.placeholder_id)
    with_vectors, plain = [], []
    with torch.no_grad(), residual_hook(explainer.model, 1, 'resid_post', with_vectors.append), explainer.injector.using(directions): a = explainer.model(input_ids=ids).logits
    explainer.injector.remove()
    with torch.no_grad(), residual_hook(explainer.model, 1, 'resid_post', plain.append): b = explainer.model(input_ids=ids).logits
    wanted = plain[0].clone()
    wanted[:, at] += wanted[:, at].norm(dim=-1, keepdim=True)*F.normalize(directions, dim=-1)
    assert torch.allclose(with_vectors[0], wanted, atol=1e-5)
    assert torch.allclose(a[:, :at], b[:, :at], atol=1e-5) and (a[:, at:] - b[:, at:]).abs().max() > .01


def test_training_and_saving(world):
    "The direction reaches the model in training, and what is saved and merged says the same"
    from peft import LoraConfig, get_peft_model
    model, tokenizer = load_model(str(world.folder/'model'), 'float32', 'cpu')
    config = LoraConfig(r=4, lora_alpha=4, target_modules='all-linear', task_type='CAUSAL_LM', exclude_modules=routers(model) or None)
    explainer = Explainer(get_peft_model(model, config), tokenizer, ExplainerCard.from_preset(world.preset, world.reader, 'sft'))
    directions, ids = world.reader.directions([1, 2]), torch.tensor([explainer.prompt + [30, 31]]*2)
    out = explainer.model.train()(input_ids=ids, labels=ids, feature_vector=directions)
    others = explainer.model(input_ids=ids, labels=ids, feature_vector=directions[[1, 0]])
    assert torch.allclose(out.logits[0], others.logits[1], atol=1e-5) and (out.logits[0] - others.logits[0]).abs().max() > .01
    out.loss.backward()
    step = torch.optim.SGD([p for p in explainer.model.parameters() if p.requires_grad], lr=1.)
    step.step()
    explainer.model.eval()
    explainer.save(world.folder/'explainer')
    merged, kept = (Explainer.from_pretrained(world.folder/'explainer', world.reader, trainable=t, dtype='float32', device='cpu') for t in (False, True))
    logits = []
    for e in (merged, kept):
        with torch.no_grad(), e.injector.using(directions): logits.append(e.model.eval()(input_ids=ids).logits)
    assert torch.allclose(*logits, atol=1e-3)
    assert merged.explain(directions, max_new_tokens=5) == kept.explain(directions, max_new_tokens=5)
