"The injection on five architectures, the explainer's folder, and what is refused"
import dataclasses
import json
import os
import shutil
from types import SimpleNamespace
import pytest
import torch
import torch.nn.functional as F
import yaml
from hub_server import Hub
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from helpers import ARCHITECTURES, PLACEHOLDER, tiny_model, tiny_sae, tiny_tokenizer
from saeexplainer.explainer import (
    CARD, SELFIE_ANSWER, Explainer, ExplainerCard, adapter_sha256, load_explainer, oracle_layers, oracle_note,
    save_adapter,
)
from saeexplainer.injection import (
    FeatureCollator, Injector, explanation_prompt, placeholder_id, prompt_messages, without_placeholder,
)
from saeexplainer.lm.hooks import decoder_layers
from saeexplainer.lm.models import load_model
from saeexplainer.lm.sampling import seed_for
from saeexplainer.presets import SELFIE, load_preset
from saeexplainer.saes import FeatureReader

TEMPLATE = 'Feature {placeholder} of the model. What does it mean?'
TOKENIZER = tiny_tokenizer()
PROMPT = explanation_prompt(TOKENIZER, TEMPLATE, PLACEHOLDER)
TOKEN = placeholder_id(TOKENIZER, PLACEHOLDER)
P = PROMPT.index(TOKEN)


def directions(n=3, d=64): return torch.randn(n, d, generator=torch.Generator().manual_seed(1))


def rows(n=3): return torch.tensor([PROMPT]*n)


def random_lora(r=4, **settings):
    return LoraConfig(r=r, target_modules='all-linear', task_type='CAUSAL_LM', init_lora_weights=False, **settings)


@torch.no_grad()
def hidden(model, **kw): # (layers+1, rows, seq, d)
    return torch.stack(model(rows(), output_hidden_states=True, use_cache=False, **kw).hidden_states)


@torch.no_grad()
def logits_of(model, vectors): return model(rows(), feature_vector=vectors).logits


def injected(h, vectors, coefficient=1.):
    "Eq. 6: a hidden state with a vector of its own norm added"
    return h + coefficient * h.norm(dim=-1, keepdim=True) * F.normalize(vectors, dim=-1)


def message(error):
    "The text of an error, which is one line"
    text = str(error.value)
    assert '\n' not in text
    return text


# ---- Eq. 6

@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_eq6_at_the_placeholder_and_nothing_before(arch):
    model = tiny_model(arch)
    vectors = directions()
    before = hidden(model)
    Injector(model, TOKEN)
    after = hidden(model, feature_vector=vectors)
    h = before[2, :, P]
    expected = h + h.norm(dim=-1, keepdim=True) * vectors / vectors.norm(dim=-1, keepdim=True)
    assert ((after[2, :, P] - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 1e-6
    assert torch.equal(before[:2], after[:2])
    assert torch.equal(before[:, :, :P], after[:, :, :P])
    assert (after[2, :, P+1:] == before[2, :, P+1:]).all()
    assert not torch.allclose(after[-1, :, P+1:], before[-1, :, P+1:], atol=1e-3)


@pytest.mark.parametrize('layer, coefficient', [(0, 1.), (2, .5)])
def test_layer_and_coefficient(layer, coefficient):
    model = tiny_model()
    vectors = directions()
    before = hidden(model)
    Injector(model, TOKEN, layer=layer, coefficient=coefficient)
    after = hidden(model, feature_vector=vectors)
    expected = injected(before[layer+1, :, P], vectors, coefficient)
    assert torch.allclose(after[layer+1, :, P], expected, atol=1e-6)
    assert torch.equal(before[:layer+1], after[:layer+1])


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_left_padding(arch):
    model = tiny_model(arch)
    vectors = directions()
    Injector(model, TOKEN)
    ids = F.pad(rows(), (6, 0), value=TOKENIZER.pad_token_id)
    mask = F.pad(torch.ones_like(rows()), (6, 0))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, position_ids=positions, feature_vector=vectors).logits[:, 6:]
    assert torch.allclose(logits_of(model, vectors), padded, atol=1e-4)


def generated_logits(model, ids, mask, **kw):
    "Logits of five generated steps"
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, suppress_tokens=[TOKEN],
        pad_token_id=0, return_dict_in_generate=True, output_logits=True, **kw)
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_generation_with_and_without_a_cache(arch):
    model = tiny_model(arch)
    injector = Injector(model, TOKEN)
    mask = torch.ones_like(rows())
    with injector.using(directions()): cached = generated_logits(model, rows(), mask)
    with injector.using(directions()): recomputed = generated_logits(model, rows(), mask, use_cache=False)
    assert torch.allclose(cached, recomputed, atol=1e-4)
    assert not torch.allclose(cached, generated_logits(model, rows(), mask), atol=1e-2)


PADS = (0, 2, 5) # of the rows


def padded_prompts():
    "Ids and mask of the prompt in rows with different padding: in two there are words before it"
    words = TOKENIZER.encode('She sells sea shells by the sea shore.', add_special_tokens=False)
    ids = torch.tensor([[0]*n + words[:5-n] + PROMPT for n in PADS])
    mask = torch.stack([(torch.arange(ids.shape[1]) >= n).long() for n in PADS])
    return ids, mask


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_generation_with_mixed_padding(arch):
    "Logits are the same as those of each row alone, without its padding"
    model = tiny_model(arch)
    vectors = directions()
    injector = Injector(model, TOKEN)
    ids, mask = padded_prompts()
    with injector.using(vectors): mixed = generated_logits(model, ids, mask)
    for row, n in enumerate(PADS):
        one = slice(row, row + 1)
        with injector.using(vectors[one]): alone = generated_logits(model, ids[one, n:], mask[one, n:])
        assert torch.allclose(mixed[row], alone[0], atol=1e-4)


def loss_and_gradients(model, vectors):
    "Of a step between whose forward and backward pass another forward pass lies"
    model.train().zero_grad()
    loss = model(rows(), labels=rows(), feature_vector=vectors, use_cache=False).loss
    with torch.no_grad(): model(rows(), feature_vector=-vectors, use_cache=False)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_gradient_checkpointing(arch):
    "Loss and gradients do not change"
    dropout = dict(resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.) if arch == 'gpt2' else {}
    model = get_peft_model(tiny_model(arch, **dropout), random_lora())
    Injector(model, TOKEN)
    loss, gradients = loss_and_gradients(model, directions())
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    loss_again, gradients_again = loss_and_gradients(model, directions())
    assert torch.allclose(loss, loss_again, atol=1e-6)
    assert torch.allclose(gradients, gradients_again, atol=1e-5)
    assert gradients.abs().max() > 0


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_peft_on_and_off(arch):
    "The hooks stay under PEFT, whether they were there first or not; with the adapter off the model is the bare one"
    vectors = directions()
    base = tiny_model(arch)
    injector = Injector(base, TOKEN)
    bare = logits_of(base, vectors)
    model = get_peft_model(base, random_lora()).eval()
    on = logits_of(model, vectors)
    with model.disable_adapter(): off = logits_of(model, vectors)
    injector.remove()
    later = Injector(model, TOKEN)
    assert torch.equal(logits_of(model, vectors), on)
    assert torch.allclose(off, bare, atol=1e-5)
    assert not torch.allclose(on, bare, atol=1e-2)
    later.remove()
    assert model.get_base_model().base_model.injector is None


def test_bf16_residual_stream():
    model = tiny_model().bfloat16()
    vectors = directions()
    before = hidden(model)
    Injector(model, TOKEN)
    after = hidden(model, feature_vector=vectors)
    assert after.dtype == torch.bfloat16
    assert torch.equal(before[:, :, :P], after[:, :, :P])
    assert torch.equal(after[2, :, P], injected(before[2, :, P].float(), vectors).bfloat16())


# ---- nothing is lost in silence

def without_one():
    "Rows of which the second has no placeholder"
    ids = rows()
    ids[1, P] = 7
    return ids


def with_one_twice():
    "Rows of which the third has two placeholders"
    ids = rows()
    ids[2, P+2] = TOKEN
    return ids


@pytest.fixture
def injecting():
    "A tiny model with an injector, which leaves nothing behind"
    model = tiny_model()
    yield SimpleNamespace(model=model, injector=Injector(model, TOKEN))
    with torch.no_grad(): assert torch.equal(model(without_one()).logits, tiny_model()(without_one()).logits)


@pytest.mark.parametrize('ids, n, says', [
    (without_one(), 3, r'every row needs exactly one placeholder, rows have \[1, 0, 1\]'),
    (with_one_twice(), 3, r'every row needs exactly one placeholder, rows have \[1, 1, 2\]'),
    (rows(), 2, '2 vectors for 3 rows'),
], ids=['none', 'two', 'vectors'])
def test_rows_that_do_not_fit_are_errors(injecting, ids, n, says):
    with pytest.raises(ValueError, match=says): injecting.model(ids, feature_vector=directions(n))


def test_a_vector_that_was_not_injected_is_an_error(injecting):
    with pytest.raises(ValueError, match='1 of 3 rows had no placeholder: their vectors were not injected'):
        with injecting.injector.using(directions()): injecting.model(without_one())


def test_embeddings_have_no_placeholder(injecting):
    with pytest.raises(ValueError, match='call the model with input_ids'):
        injecting.model(inputs_embeds=torch.randn(3, 4, 64), feature_vector=directions())


def test_injector_where_it_cannot_be():
    model = tiny_model()
    with pytest.raises(ValueError, match='no layer 4 to inject after: the model has layers 0 to 3'):
        Injector(model, TOKEN, layer=4)
    injector = Injector(model, TOKEN)
    with pytest.raises(ValueError, match='has an injector already'): Injector(model, TOKEN)
    injector.remove()
    Injector(model, TOKEN)


# ---- the prompt

def test_placeholder_that_is_not_one_token():
    with pytest.raises(ValueError, match=r"the placeholder 'zebra!' is \d tokens here, not one"):
        explanation_prompt(TOKENIZER, TEMPLATE, 'zebra!')


@pytest.mark.parametrize('template, n', [('What is it?', 0), ('{placeholder} and {placeholder}', 2)])
def test_placeholder_missing_or_twice_in_the_template(template, n):
    with pytest.raises(ValueError, match=rf'exactly once, it has it {n} times'): prompt_messages(template, PLACEHOLDER)


def test_placeholder_that_the_text_contains():
    with pytest.raises(ValueError, match="the prompt has the placeholder token '<repo_name>' 2 times, not once"):
        explanation_prompt(TOKENIZER, f'{{placeholder}} {PLACEHOLDER}', PLACEHOLDER)


def test_placeholder_that_melts_away():
    assert placeholder_id(TOKENIZER, ' s') # one token by itself, but not before 'ea'
    with pytest.raises(ValueError, match="the placeholder token ' s' 0 times, not once"):
        explanation_prompt(TOKENIZER, 'The{placeholder}ea', ' s')


def test_tokenizer_without_chat_template():
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match='has no chat template: use an instruction-tuned explainer'):
        explanation_prompt(bare, TEMPLATE, PLACEHOLDER)


# ---- the collator

@pytest.fixture(scope='module')
def sae(tmp_path_factory): return tiny_sae(tmp_path_factory.mktemp('sae'))


@pytest.fixture(scope='module')
def reader(sae): return FeatureReader.load(sae)


@pytest.fixture(scope='module')
def collate_sft(reader): return FeatureCollator(DataCollatorForLanguageModeling(0), reader, TOKEN)


def test_collator_for_sft(reader, collate_sft):
    batch = collate_sft([dict(input_ids=PROMPT + [9]*i, labels=PROMPT + [9]*i, feature=i) for i in (3, 5)])
    assert torch.equal(batch['feature_vector'], reader.directions([3, 5]))


def test_collator_for_dpo(reader):
    collate = FeatureCollator(DataCollatorForPreference(0), reader, TOKEN, copies=2)
    batch = collate([dict(prompt_ids=PROMPT, chosen_ids=[9]*i, rejected_ids=[8]*i, feature=i) for i in (3, 5)])
    assert torch.equal(batch['feature_vector'], reader.directions([3, 5, 3, 5]))
    assert len(batch['input_ids']) == 4


def test_collator_of_a_row_without_placeholder(collate_sft):
    with pytest.raises(ValueError, match='exactly one placeholder'):
        collate_sft([dict(input_ids=[9, 9], labels=[9, 9], feature=1)])


# ---- the explainer

@pytest.fixture(scope='module')
def made(tmp_path_factory, sae, reader):
    "A preset on a tiny model and SAE, and a saved explainer with a random adapter"
    folder = tmp_path_factory.mktemp('explainer')
    tiny_model().save_pretrained(folder/'model')
    TOKENIZER.save_pretrained(folder/'model')
    preset = load_preset('smollm2-135m', explainer=str(folder/'model'), target=str(folder/'model'),
                         sae=str(sae), layer=2, device='cpu', template=TEMPLATE, n_hints=0)
    torch.manual_seed(0)
    tuned = get_peft_model(load_model(preset.explainer, device='cpu')[0], random_lora())
    save_adapter(tuned, ExplainerCard.from_preset(preset, reader, 'sft'), folder/'sft')
    return SimpleNamespace(preset=preset, reader=reader, saved=folder/'sft')


@pytest.fixture
def copied(made, tmp_path):
    "A copy of the saved explainer, to be damaged"
    return shutil.copytree(made.saved, tmp_path/'x')


def test_an_explainer_in_all_its_forms(made):
    "With its adapter merged or kept it says the same, and something else than the untrained one"
    merged = Explainer.from_pretrained(made.saved, made.reader)
    kept = Explainer.from_pretrained(made.saved, made.reader, trainable=True)
    untrained = Explainer.from_preset(made.preset, made.reader)
    assert merged.card.stage == 'sft'
    assert not hasattr(merged.model, 'peft_config')
    assert any(p.requires_grad for p in kept.model.parameters())
    vectors = made.reader.directions(range(5))
    said = merged.explain(vectors, max_new_tokens=5)
    assert said == kept.explain(vectors, max_new_tokens=5)
    assert said != untrained.explain(vectors, max_new_tokens=5)


@pytest.mark.parametrize('trainable', [False, True], ids=['merged', 'kept'])
def test_save_and_load(made, tmp_path, trainable):
    explainer = Explainer.from_pretrained(made.saved, made.reader, trainable=trainable)
    vectors = made.reader.directions(range(5))
    explainer.save(tmp_path)
    again = Explainer.from_pretrained(tmp_path, made.reader)
    assert again.explain(vectors, max_new_tokens=5) == explainer.explain(vectors, max_new_tokens=5)
    weights = [folder/'adapter_model.safetensors' for folder in (tmp_path, made.saved)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ['adapter_config.json', 'adapter_model.safetensors', CARD]


def test_adapter_is_small_and_names_no_path(made, tmp_path):
    tuned = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules='all-linear', task_type='CAUSAL_LM'))
    tuned.peft_config['default'].base_model_name_or_path = '/somewhere/on/this/machine'
    card = dataclasses.replace(ExplainerCard.from_preset(made.preset, made.reader), base_model='some/model')
    save_adapter(tuned, card, tmp_path)
    assert {t.dtype for t in load_file(tmp_path/'adapter_model.safetensors').values()} == {torch.bfloat16}
    assert json.loads((tmp_path/'adapter_config.json').read_text())['base_model_name_or_path'] == 'some/model'


def test_explainer_is_its_own_copy(made):
    target, _ = load_model(made.preset.target, device='cpu')
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    explainer = Explainer.from_pretrained(made.saved, made.reader)
    explainer.explain(made.reader.directions([1]), max_new_tokens=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    assert getattr(target.base_model, 'injector', None) is None


SAMPLING = dict(temperature=1., top_p=.95, max_new_tokens=6)


@pytest.fixture(scope='module')
def explainer(made):
    "The saved explainer, merged; never changed"
    return Explainer.from_pretrained(made.saved, made.reader)


def test_candidates_depend_on_their_seeds_alone(made, explainer):
    vectors = made.reader.directions(range(6))
    seeds = [[seed_for(0, 'round1', feature, j) for j in range(3)] for feature in range(6)]
    together = explainer.sample(vectors, 3, seeds=seeds, **SAMPLING)
    assert together == explainer.sample(vectors, 3, seeds=seeds, batch_size=4, **SAMPLING)
    assert [together[4]] == explainer.sample(vectors[4:5], 3, seeds=seeds[4:5], **SAMPLING)
    fewer = [own[:2] for own in seeds]
    assert [row[:2] for row in together] == explainer.sample(vectors, 2, seeds=fewer, **SAMPLING)
    assert all(PLACEHOLDER not in text for row in together for text in row)
    with pytest.raises(ValueError, match=r'seeds must be \(6, 3\)'): explainer.sample(vectors, 3, seeds=seeds[:5])


def test_candidates_of_one_seed(made, explainer):
    vectors = made.reader.directions(range(6))
    said = explainer.sample(vectors, 3, seed=1, **SAMPLING)
    assert said == explainer.sample(vectors, 3, seed=1, **SAMPLING)
    assert said != explainer.sample(vectors, 3, seed=2, **SAMPLING)


def test_one_vector_or_an_array_is_explained(made, explainer):
    vectors = made.reader.directions(range(2))
    assert explainer.explain(vectors[0], max_new_tokens=4) == explainer.explain(vectors[:1].numpy(), max_new_tokens=4)


def test_placeholder_is_never_generated(made):
    explainer = Explainer.from_preset(made.preset, made.reader)
    model = explainer.model
    head = model.get_output_embeddings()
    model.set_output_embeddings(torch.nn.Linear(head.in_features, head.out_features, dtype=head.weight.dtype))
    model.get_output_embeddings().bias.data[TOKEN] = 100. # would say nothing else
    ids = torch.tensor([explainer.prompt])
    with explainer.injector.using(directions(1)):
        new = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1]:]
    assert (new == TOKEN).all()
    # special tokens are not shown: of that one alone, nothing would be left
    assert explainer.explain(directions(1), max_new_tokens=8)[0]


@pytest.mark.parametrize('bad, says', [
    (torch.randn(2, 48), 'has 48 components, the residual stream has 64'),
    (torch.zeros(1, 64), 'direction 0 of 1 is zero'),
    (torch.full((1, 64), float('nan')), 'is not finite'),
    (torch.full((1, 64), float('inf')), 'is not finite'),
], ids=['width', 'zero', 'nan', 'inf'])
def test_bad_directions(made, bad, says):
    explainer = Explainer.from_pretrained(made.saved)
    with pytest.raises(ValueError, match=says): explainer.explain(bad)
    with pytest.raises(ValueError, match=says): explainer.sample(bad, 2)


@pytest.mark.parametrize('change, says', [
    (dict(sae_sha256='0'*64), 'another SAE: its weights have hash .* trained on .* with 000000000000'),
    (dict(sae_layer=3), 'the SAE reads layer 2, the explainer was trained for layer 3'),
    (dict(d_model=48), "the SAE's directions have width 64, the explainer reads width 48"),
    (dict(model_sha256='0'*64), 'other weights: .* the explainer was trained on 000000000000'),
    (dict(layer=9), 'there is no layer 9 to inject after'),
    (dict(placeholder='no such token'), 'tokens here, not one'),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else '')
def test_card_that_does_not_fit(made, tmp_path, change, says):
    Explainer.from_pretrained(made.saved).save(tmp_path)
    dataclasses.replace(ExplainerCard.load(tmp_path), **change).save(tmp_path)
    with pytest.raises(ValueError, match=says): Explainer.from_pretrained(tmp_path, made.reader)


def test_model_of_another_width(made, tmp_path):
    tiny_model(d=32).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has hidden size 32, the SAE's directions have 64"):
        Explainer.from_preset(dataclasses.replace(made.preset, explainer=str(tmp_path)), made.reader)


def test_folders_that_hold_no_explainer(tmp_path):
    with pytest.raises(FileNotFoundError, match=f'is no explainer: it has no {CARD}'):
        Explainer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match='no explainer at .*nowhere: give a folder or a hub id'):
        Explainer.from_pretrained(str(tmp_path/'nowhere'))


@pytest.mark.parametrize('text, says', [
    ('{"base_model": "x"', 'is not an explainer card'),
    ('{"base_model": "x", "colour": "red"}', "is not an explainer card.*'colour'"),
])
def test_files_that_are_no_card(tmp_path, text, says):
    (tmp_path/CARD).write_text(text)
    with pytest.raises(ValueError, match=says): Explainer.from_pretrained(tmp_path)


def test_a_card_without_its_adapter(made, tmp_path):
    ExplainerCard.load(made.saved).save(tmp_path)
    with pytest.raises(FileNotFoundError, match='its adapter is missing'): Explainer.from_pretrained(tmp_path)


def test_an_untrained_explainer_is_not_saved(made, tmp_path):
    with pytest.raises(ValueError, match='an untrained explainer has no adapter to save'):
        Explainer.from_preset(made.preset, made.reader).save(tmp_path)


def test_selfie_begins_the_answer(made):
    explainer = load_explainer(SELFIE, made.preset, made.reader)
    prompt = explainer.tokenizer.decode(explainer.prompt)
    assert prompt.endswith(SELFIE_ANSWER)
    assert f'Message:{made.preset.placeholder}<' in prompt
    assert explainer.prompt.count(explainer.placeholder_id) == 1


def test_selfie_says_something_else_than_the_untrained_explainer(made):
    vectors = made.reader.directions(range(5))
    said = load_explainer(SELFIE, made.preset, made.reader).explain(vectors, max_new_tokens=5)
    assert len(said) == 5
    assert not any(SELFIE_ANSWER in text for text in said)
    assert said != Explainer.from_preset(made.preset, made.reader).explain(vectors, max_new_tokens=5)


def test_chat_template_of_the_preset(made, tmp_path):
    bare = tiny_tokenizer()
    bare.chat_template = None
    tiny_model().save_pretrained(tmp_path)
    bare.save_pretrained(tmp_path)
    preset = dataclasses.replace(made.preset, explainer=str(tmp_path))
    with pytest.raises(ValueError, match='has no chat template'): Explainer.from_preset(preset, made.reader)
    preset = dataclasses.replace(preset, chat_template="{{ messages[0]['content'] }}")
    explainer = Explainer.from_preset(preset, made.reader)
    assert TOKENIZER.decode(explainer.prompt) == TEMPLATE.format(placeholder=PLACEHOLDER)


# ---- the hub

def test_push_to_hub(made, monkeypatch):
    with Hub(monkeypatch) as hub: Explainer.from_pretrained(made.saved).push_to_hub('me/mine')
    assert sorted(hub.files) == ['README.md', 'adapter_config.json', 'adapter_model.safetensors', CARD]
    assert hub.created == dict(type=None, name='mine', organization='me')


def test_the_pushed_readme_says_what_it_was_made_with(made, monkeypatch):
    explainer = Explainer.from_pretrained(made.saved)
    with Hub(monkeypatch) as hub: explainer.push_to_hub('me/mine')
    _, header, text = hub.files['README.md'].decode().split('---\n', 2)
    assert yaml.safe_load(header)['library_name'] == 'peft'
    assert yaml.safe_load(header)['license'] == 'other'
    assert 'base_model' not in yaml.safe_load(header) # a folder, which the hub does not know
    assert explainer.card.sae_sha256 in text
    assert "Explainer.from_pretrained('me/mine')" in text
    assert 'None were measured' in text


# ---- Activation Oracles

@pytest.fixture(scope='module')
def oracle_preset(made, tmp_path_factory):
    "A preset with a model of eight layers to whose tokenizer ' ?' is one token, as to the real ones"
    folder = tmp_path_factory.mktemp('oracle_model')
    tokenizer = tiny_tokenizer(vocab=500)
    tokenizer.add_tokens([' ?'])
    tiny_model(n_layers=8).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_preset(made.preset, explainer=str(folder), dtype='float32')


@pytest.fixture(scope='module')
def oracle(made, oracle_preset, tmp_path_factory):
    "A tiny adapter in the form that oracles have: PEFT's files alone, r 64, alpha 128, all linear layers"
    folder = tmp_path_factory.mktemp('oracle')
    torch.manual_seed(0)
    config = random_lora(r=64, lora_alpha=128, lora_dropout=.05)
    get_peft_model(load_model(oracle_preset.explainer, device='cpu')[0], config).save_pretrained(folder)
    return Explainer.from_oracle(folder, oracle_preset, made.reader)


def residual_after(layer, model, ids):
    "What a layer returns for `ids`"
    seen = []
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(out))
    model(ids)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def test_the_prompt_of_an_oracle(oracle):
    shown = oracle.tokenizer.decode(oracle.prompt)
    assert 'Layer: 2\n ? \nCan you explain to me what this concept means?' in shown
    assert oracle.prompt.count(oracle.placeholder_id) == 1


def test_an_oracle_explains(oracle, made):
    vectors = made.reader.directions([3, 4])
    said = oracle.explain(vectors, max_new_tokens=6)
    assert said == oracle.explain(vectors, max_new_tokens=6)
    assert said[0] != said[1]


def test_the_adapter_of_an_oracle_is_in_it(oracle, oracle_preset):
    state = dict(oracle.model.named_parameters())
    bare = load_model(oracle_preset.explainer, device='cpu')[0]
    assert any(not torch.equal(state[name], parameter) for name, parameter in bare.named_parameters())


def test_an_oracle_injects_after_layer_1(oracle, made):
    vectors = made.reader.directions([3, 4])
    layer = decoder_layers(oracle.model)[1]
    ids = torch.tensor([oracle.prompt]*2)
    with oracle.injector.using(vectors): after = residual_after(layer, oracle.model, ids)
    before = residual_after(layer, oracle.model, ids)
    at = oracle.prompt.index(oracle.placeholder_id)
    h = before[:, at]
    wanted = h + h.norm(dim=-1, keepdim=True) * vectors / vectors.norm(dim=-1, keepdim=True)
    assert (after[:, at] - wanted).abs().max() < 1e-4
    assert torch.equal(after[:, :at], before[:, :at])


def test_layers_that_an_oracle_was_trained_on(oracle_preset):
    assert oracle_layers(8) == [2, 4, 6]
    assert oracle_note(oracle_preset, 2) is None
    says = 'ao: layer 3 is off the grid that the oracle was trained on (layers 2, 4, 6)'
    assert oracle_note(oracle_preset, 3) == says


def test_a_folder_without_an_oracle(oracle_preset, made, tmp_path):
    with pytest.raises(FileNotFoundError, match='has no adapter_model.safetensors: it is not a PEFT adapter'):
        Explainer.from_oracle(tmp_path, oracle_preset, made.reader)


# ---- who may read it, and where it lies

def test_an_adapter_can_be_read_by_others(made, tmp_path):
    "What the umask allows, although safetensors closes what it writes"
    before = os.umask(0o022)
    try:
        Explainer.from_pretrained(made.saved, trainable=True).save(tmp_path)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o644}


def test_home_directory_in_an_explainers_path(made, monkeypatch):
    monkeypatch.setenv('HOME', str(made.saved.parent))
    assert Explainer.from_pretrained('~/sft').card.stage == 'sft'


# ---- adapters that do not fit, and files that are damaged

def renamed(tensors):
    return {name.replace('model.model.', 'model.language_model.model.'): tensor for name, tensor in tensors.items()}


def half(tensors): return dict(list(tensors.items())[1::2])


def with_another(tensors):
    name, tensor = next(iter(tensors.items()))
    return {**tensors, name.replace('layers.0', 'layers.9'): tensor.clone()}


def narrower(tensors): return {name: tensor[:, :32].contiguous() for name, tensor in tensors.items()}


def not_finite(tensors): return {name: tensor * float('nan') for name, tensor in tensors.items()}


@pytest.mark.parametrize('change, says', [
    (renamed, r'does not fit .*: \d+ of its tensors are missing, \d+ are for no layer'),
    (half, r'does not fit .*: \d+ of its tensors are missing, 0 are for no layer'),
    (lambda tensors: {}, r'does not fit .*: \d+ of its tensors are missing'),
    (with_another, 'does not fit .*: 0 of its tensors are missing, 1 are for no layer'),
    (narrower, 'does not fit .*size mismatch'),
    (not_finite, r'adapter_model.safetensors has numbers that are not finite'),
], ids=['renamed', 'half of it', 'nothing', 'more', 'another width', 'not finite'])
@pytest.mark.parametrize('way', ['merged', 'trainable', 'oracle'])
def test_an_adapter_that_does_not_fit_is_refused(made, copied, change, says, way):
    file = copied/'adapter_model.safetensors'
    save_file(change(load_file(file)), file, metadata={'format': 'pt'})
    preset = dataclasses.replace(made.preset, placeholder=PLACEHOLDER)
    with pytest.raises(ValueError, match=says) as error:
        if way == 'oracle': Explainer.from_oracle(copied, preset, made.reader)
        else: Explainer.from_pretrained(copied, made.reader, trainable=way == 'trainable')
    assert len(message(error)) < 600


POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 15\n'


@pytest.mark.parametrize('name, content, says', [
    ('adapter_model.safetensors', POINTER, 'run `git lfs pull`'),
    ('adapter_model.safetensors', b'', 'is empty'),
    ('adapter_config.json', b'{}', 'has the peft_type None'),
    ('adapter_config.json', b'{"peft_type": "NOSUCH"}', "has the peft_type 'NOSUCH'"),
    ('adapter_config.json', b'[]', 'holds'),
    ('adapter_config.json', b'{"peft_type": "LORA", "r"', 'is not JSON'),
    ('adapter_config.json', b'{"peft_type": "LORA", "r": "four"}', 'does not fit'),
    (CARD, b'[]', 'is not an explainer card'),
    (CARD, b'', 'is not an explainer card'),
    (CARD, b'\xff\xfe', 'is not an explainer card'),
])
def test_damaged_files_of_an_explainer(made, copied, name, content, says):
    (copied/name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as error: Explainer.from_pretrained(copied, made.reader)
    assert str(copied) in message(error)
    if name == 'adapter_model.safetensors':
        with pytest.raises(ValueError, match=says): adapter_sha256(copied)


@pytest.mark.parametrize('change, says', [
    (dict(layer='1'), "layer is '1', not int"),
    (dict(coefficient='big'), "coefficient is 'big', not float"),
    (dict(layer=True), 'layer is True, not int'),
    (dict(template=None), 'template is None, not str'),
    (dict(chat_template=5), 'chat_template is 5'),
    (dict(versions=[]), r'versions is \[\], not dict'),
    (dict(explanation_tokens='64'), "explanation_tokens is '64'"),
    (dict(coefficient=float('nan')), 'coefficient of the injection is nan'),
])
def test_a_card_of_other_types(copied, change, says):
    file = copied/CARD
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=says): Explainer.from_pretrained(copied)


def test_a_whole_number_is_a_number_on_a_card(made, tmp_path):
    card = ExplainerCard.load(made.saved)
    dataclasses.replace(card, coefficient=1).save(tmp_path)
    assert ExplainerCard.load(tmp_path) == card


def test_an_older_card_has_no_length_of_explanations(made, tmp_path):
    older = json.loads((made.saved/CARD).read_text())
    del older['explanation_tokens']
    (tmp_path/CARD).write_text(json.dumps(older))
    card = ExplainerCard.load(tmp_path)
    assert card.explanation_tokens is None
    card.save(tmp_path)
    assert json.loads((tmp_path/CARD).read_text()) == older


def test_the_length_of_explanations_does_not_make_another_training(made):
    card = ExplainerCard.load(made.saved)
    assert card.explanation_tokens == made.preset.explanation_tokens
    fields = dataclasses.asdict(card)
    not_compared = ('versions', 'explanation_tokens', 'n_hints', 'dictionary_sha256', 'direction', 'bridge',
                    'bridge_sha256') # what it has not
    rest = {name: value for name, value in fields.items() if name not in not_compared}
    assert card.settings() == rest
    assert dataclasses.replace(card, explanation_tokens=None).settings() == rest


def test_explanations_are_as_long_as_the_card_says(made):
    explainer = Explainer.from_pretrained(made.saved, made.reader)
    vectors = made.reader.directions([1, 2])
    explainer.card = dataclasses.replace(explainer.card, explanation_tokens=3)
    assert explainer.explain(vectors) == explainer.explain(vectors, max_new_tokens=3)
    assert explainer.sample(vectors, 2) == explainer.sample(vectors, 2, max_new_tokens=3)
    explainer.card = dataclasses.replace(explainer.card, explanation_tokens=None)
    assert explainer.explain(vectors) == explainer.explain(vectors, max_new_tokens=64)


# ---- what is asked of it

@pytest.mark.parametrize('indices', [[5, 13], range(2), 5, torch.tensor([5, 13]), (5,)])
def test_indices_are_no_directions(explainer, indices):
    shown = torch.atleast_1d(torch.as_tensor(indices)).tolist()
    says = f'give it reader.directions({shown})'
    with pytest.raises(ValueError) as error: explainer.explain(indices)
    assert says in message(error)
    with pytest.raises(ValueError) as error: explainer.sample(indices, 2)
    assert says in message(error)


@pytest.mark.parametrize('blank', ['', ' ', '\n'])
def test_placeholder_of_nothing(blank):
    refusal = 'the placeholder is .*, which is no token: choose a reserved token'
    with pytest.raises(ValueError, match=refusal): placeholder_id(TOKENIZER, blank)
    with pytest.raises(ValueError, match=refusal): prompt_messages(TEMPLATE, blank)
    with pytest.raises(ValueError, match=refusal): without_placeholder('a label', blank)


def test_placeholder_that_the_model_does_not_know(made, tmp_path):
    "Added to the tokenizer, not to the embedding"
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(['<here>', *(f'<filler{i}>' for i in range(600))])
    tokenizer.add_tokens(['<place>'])
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    preset = dataclasses.replace(made.preset, explainer=str(tmp_path), placeholder='<place>')
    refusal = 'token .* is not in the embedding of .*, which has 512 rows: it was added to the tokenizer'
    with pytest.raises(ValueError, match=refusal): Explainer.from_preset(preset, made.reader)


def test_a_prompt_longer_than_the_model(made):
    explainer = Explainer.from_pretrained(made.saved)
    refusal = 'more than the 512 that .* reads: shorten the prompt, or ask for fewer tokens'
    with pytest.raises(ValueError, match=refusal):
        explainer.explain(made.reader.directions([1]), max_new_tokens=600)


# ---- what changes an adapter and no length

def flip_a_bit(data): return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def enlarge_alpha(data): return data.replace(b'"lora_alpha": ', b'"lora_alpha": 9')


@pytest.mark.parametrize('name, change', [
    ('adapter_model.safetensors', flip_a_bit), ('adapter_config.json', enlarge_alpha),
])
def test_a_byte_of_an_adapter_that_flips_is_noticed(copied, name, change):
    data = (copied/name).read_bytes()
    assert change(data) != data
    (copied/name).write_bytes(change(data))
    with pytest.raises(ValueError, match='is not what was saved there'): Explainer.from_pretrained(copied)


@pytest.mark.parametrize('settings, says', [
    (dict(lora_alpha=float('nan')), 'the lora_alpha nan, not a number above 0'),
    (dict(lora_alpha=float('inf')), 'the lora_alpha inf'),
    (dict(lora_alpha=0), 'the lora_alpha 0'),
    (dict(lora_alpha=-8), 'the lora_alpha -8'),
    (dict(lora_alpha='16'), "the lora_alpha '16'"),
    (dict(lora_alpha=True), 'the lora_alpha True'),
    (dict(lora_alpha=None), 'the lora_alpha None'),
    (dict(r=0), 'the r 0, not a number above 0'),
    (dict(r=-4), 'the r -4'),
    (dict(r=4.), 'the r 4.0'),
    (dict(r=10**9), 'the r 1000000000, and its tensors have the rank 4'),
    (dict(use_rslora='false'), "the use_rslora 'false', neither true nor false"),
    (dict(use_dora=1), 'the use_dora 1'),
    (dict(alpha_pattern={'q_proj': float('nan')}), 'scales the adapter of .*q_proj by nan, not by a number above 0'),
    (dict(alpha_pattern={'q_proj': 0}), 'by 0.0, not by a number above 0'),
])
@pytest.mark.parametrize('trainable', [True, False])
def test_settings_that_would_make_an_adapter_nothing(made, copied, settings, says, trainable):
    file = copied/'adapter_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=f'{file}.*{says}') as error:
        Explainer.from_pretrained(copied, made.reader, trainable=trainable)
    message(error)
