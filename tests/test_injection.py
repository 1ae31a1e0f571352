"The injection on five architectures, the explainer's folder, and what is refused"
import dataclasses, json, os, shutil
import pytest, torch, yaml
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from hub_server import Hub
from helpers import ARCHITECTURES, PLACEHOLDER, tiny_model, tiny_sae, tiny_tokenizer
from saeexplainer.explainer import (
    CARD, Explainer, ExplainerCard, adapter_sha256, oracle_layers, oracle_note, save_adapter,
)
from saeexplainer.injection import (
    FeatureCollator, Injector, explanation_prompt, placeholder_id, prompt_messages, without_placeholder,
)
from saeexplainer.lm.hooks import decoder_layers
from saeexplainer.presets import load_preset
from saeexplainer.saes import FeatureReader
from saeexplainer.lm.sampling import seed_for

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


# ---- Eq. 6

@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_eq6_at_the_placeholder_and_nothing_before(arch):
    model, v = tiny_model(arch), directions()
    before = hidden(model)
    Injector(model, TOKEN)
    after = hidden(model, feature_vector=v)
    h = before[2, :, P]
    expected = h + h.norm(dim=-1, keepdim=True) * v / v.norm(dim=-1, keepdim=True)
    assert ((after[2, :, P] - expected).norm(dim=-1) / expected.norm(dim=-1)).max() < 1e-6
    assert torch.equal(before[:2], after[:2])
    assert torch.equal(before[:, :, :P], after[:, :, :P])
    assert (after[2, :, P+1:] == before[2, :, P+1:]).all()
    assert not torch.allclose(after[-1, :, P+1:], before[-1, :, P+1:], atol=1e-3)


@pytest.mark.parametrize('layer,coefficient', [(0, 1.), (2, .5)])
def test_layer_and_coefficient(layer, coefficient):
    model, v = tiny_model(), directions()
    before = hidden(model)
    Injector(model, TOKEN, layer=layer, coefficient=coefficient)
    after, h = hidden(model, feature_vector=v), before[layer+1, :, P]
    expected = h + coefficient * h.norm(dim=-1, keepdim=True) * F.normalize(v, dim=-1)
    assert torch.allclose(after[layer+1, :, P], expected, atol=1e-6)
    assert torch.equal(before[:layer+1], after[:layer+1])


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_left_padding(arch):
    model, v, n = tiny_model(arch), directions(), 6
    Injector(model, TOKEN)
    ids, mask = F.pad(rows(), (n, 0), value=TOKENIZER.pad_token_id), F.pad(torch.ones_like(rows()), (n, 0))
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = model(rows(), feature_vector=v).logits
        padded = model(ids, attention_mask=mask, position_ids=position, feature_vector=v).logits[:, n:]
    assert torch.allclose(plain, padded, atol=1e-4)


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_kv_cache_and_mixed_padding(arch):
    "Logits of five generated steps: the same with a cache, without one, and in a batch of rows with different padding"
    model, v, pads = tiny_model(arch), directions(), (0, 2, 5)
    injector = Injector(model, TOKEN)
    def logits(ids, mask, **kw):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, suppress_tokens=[TOKEN],
            pad_token_id=0, return_dict_in_generate=True, output_logits=True, **kw)
        return torch.stack(out.logits, 1)
    one = torch.ones_like(rows())
    with injector.using(v): cached = logits(rows(), one)
    with injector.using(v): recomputed = logits(rows(), one, use_cache=False)
    ids = torch.stack([torch.tensor([0]*n + PROMPT) for n in (5, 5, 5)])
    mask = torch.stack([(torch.arange(ids.shape[1]) >= n).long() for n in (5, 5, 5)])
    words = TOKENIZER.encode('She sells sea shells by the sea shore.', add_special_tokens=False)
    for row, n in enumerate(pads): # longer prompts in some rows
        ids[row, n:5] = torch.tensor(words[:5-n])
        mask[row, n:5] = 1
    with injector.using(v): mixed = logits(ids, mask)
    for row, n in enumerate(pads):
        with injector.using(v[row:row+1]): alone = logits(ids[row:row+1, n:], mask[row:row+1, n:])
        assert torch.allclose(mixed[row], alone[0], atol=1e-4)
    assert torch.allclose(cached, recomputed, atol=1e-4)
    assert not torch.allclose(cached, logits(rows(), one), atol=1e-2)


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_gradient_checkpointing(arch):
    "Loss and gradients do not change, even where another forward pass lies between a forward and its backward"
    dropout = dict(resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.) if arch == 'gpt2' else {}
    model = get_peft_model(tiny_model(arch, **dropout), random_lora())
    Injector(model, TOKEN)
    v, found = directions(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.train().zero_grad()
        loss = model(rows(), labels=rows(), feature_vector=v, use_cache=False).loss
        with torch.no_grad(): model(rows(), feature_vector=-v, use_cache=False)
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6) and torch.allclose(found[0][1], found[1][1], atol=1e-5)
    assert found[0][1].abs().max() > 0


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_peft_on_and_off(arch):
    "The hooks stay under PEFT, whether they were there first or not; with the adapter off the model is the bare one"
    v, base = directions(), tiny_model(arch)
    injector = Injector(base, TOKEN)
    with torch.no_grad(): bare = base(rows(), feature_vector=v).logits
    model = get_peft_model(base, random_lora()).eval()
    with torch.no_grad():
        on = model(rows(), feature_vector=v).logits
        with model.disable_adapter(): off = model(rows(), feature_vector=v).logits
        injector.remove()
        later = Injector(model, TOKEN)
        assert torch.equal(model(rows(), feature_vector=v).logits, on)
    assert torch.allclose(off, bare, atol=1e-5) and not torch.allclose(on, bare, atol=1e-2)
    later.remove()
    assert model.get_base_model().base_model.injector is None


def test_bf16_residual_stream():
    model, v = tiny_model().bfloat16(), directions()
    before = hidden(model)
    Injector(model, TOKEN)
    after = hidden(model, feature_vector=v)
    h = before[2, :, P].float()
    assert after.dtype == torch.bfloat16 and torch.equal(before[:, :, :P], after[:, :, :P])
    assert torch.equal(after[2, :, P], (h + h.norm(dim=-1, keepdim=True) * F.normalize(v, dim=-1)).bfloat16())


# ---- nothing is lost in silence

def test_lost_injections_are_errors():
    model, v = tiny_model(), directions()
    injector = Injector(model, TOKEN)
    without, twice = rows(), rows()
    without[1, P], twice[2, P+2] = 7, TOKEN
    with pytest.raises(ValueError, match=r'every row needs exactly one placeholder, rows have \[1, 0, 1\]'):
        model(without, feature_vector=v)
    with pytest.raises(ValueError, match=r'every row needs exactly one placeholder, rows have \[1, 1, 2\]'):
        model(twice, feature_vector=v)
    with pytest.raises(ValueError, match='2 vectors for 3 rows'): model(rows(), feature_vector=v[:2])
    with pytest.raises(ValueError, match='1 of 3 rows had no placeholder: their vectors were not injected'):
        with injector.using(v): model(without)
    with pytest.raises(ValueError, match='call the model with input_ids'):
        model(inputs_embeds=torch.randn(3, 4, 64), feature_vector=v)
    with torch.no_grad(): # nothing is left behind
        assert torch.equal(model(without).logits, tiny_model()(without).logits)


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

@pytest.mark.parametrize('template,n', [('What is it?', 0), ('{placeholder} and {placeholder}', 2)])
def test_placeholder_missing_or_twice_in_the_template(template, n):
    with pytest.raises(ValueError, match=rf'exactly once, it has it {n} times'): prompt_messages(template, PLACEHOLDER)

def test_placeholder_that_the_text_contains_or_that_melts_away():
    with pytest.raises(ValueError, match="the prompt has the placeholder token '<repo_name>' 2 times, not once"):
        explanation_prompt(TOKENIZER, f'{{placeholder}} {PLACEHOLDER}', PLACEHOLDER)
    assert placeholder_id(TOKENIZER, ' s') # one token by itself, but not before 'ea'
    with pytest.raises(ValueError, match="the placeholder token ' s' 0 times, not once"):
        explanation_prompt(TOKENIZER, 'The{placeholder}ea', ' s')

def test_tokenizer_without_chat_template():
    t = tiny_tokenizer()
    t.chat_template = None
    with pytest.raises(ValueError, match='has no chat template: use an instruction-tuned explainer'):
        explanation_prompt(t, TEMPLATE, PLACEHOLDER)


# ---- the collator

def test_collator_for_sft_and_dpo(tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    reader = FeatureReader.load(tiny_sae(tmp_path))
    collate_sft = FeatureCollator(DataCollatorForLanguageModeling(0), reader, TOKEN)
    sft = collate_sft([dict(input_ids=PROMPT + [9]*i, labels=PROMPT + [9]*i, feature=i) for i in (3, 5)])
    assert torch.equal(sft['feature_vector'], reader.directions([3, 5]))
    collate = FeatureCollator(DataCollatorForPreference(0), reader, TOKEN, copies=2)
    dpo = collate([dict(prompt_ids=PROMPT, chosen_ids=[9]*i, rejected_ids=[8]*i, feature=i) for i in (3, 5)])
    assert torch.equal(dpo['feature_vector'], reader.directions([3, 5, 3, 5]))
    assert len(dpo['input_ids']) == 4
    with pytest.raises(ValueError, match='exactly one placeholder'):
        collate_sft([dict(input_ids=[9, 9], labels=[9, 9], feature=1)])


# ---- the explainer

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A preset on a tiny model and SAE, and a saved explainer with a random adapter"
    d = tmp_path_factory.mktemp('explainer')
    tiny_model().save_pretrained(d/'model')
    TOKENIZER.save_pretrained(d/'model')
    reader = FeatureReader.load(tiny_sae(d/'sae'))
    preset = load_preset('smollm2-135m', explainer=str(d/'model'), target=str(d/'model'), sae=str(d/'sae'), layer=2,
                         device='cpu', template=TEMPLATE)
    torch.manual_seed(0)
    from saeexplainer.lm.models import load_model
    tuned = get_peft_model(load_model(preset.explainer, device='cpu')[0], random_lora())
    save_adapter(tuned, ExplainerCard.from_preset(preset, reader, 'sft'), d/'sft')
    return preset, reader, d


def test_save_and_load(made, tmp_path):
    preset, reader, d = made
    merged = Explainer.from_pretrained(d/'sft', reader)
    kept = Explainer.from_pretrained(d/'sft', reader, trainable=True)
    untrained = Explainer.from_preset(preset, reader)
    v = reader.directions(range(5))
    assert merged.card.stage == 'sft'
    assert not hasattr(merged.model, 'peft_config')
    assert any(p.requires_grad for p in kept.model.parameters())
    wanted = merged.explain(v, max_new_tokens=5)
    assert wanted == kept.explain(v, max_new_tokens=5) != untrained.explain(v, max_new_tokens=5)
    for e, name in ((merged, 'a'), (kept, 'b')):
        e.save(tmp_path/name)
        assert Explainer.from_pretrained(tmp_path/name, reader).explain(v, max_new_tokens=5) == wanted
        weights = [folder/'adapter_model.safetensors' for folder in (tmp_path/name, d/'sft')]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    names = sorted(f.name for f in (tmp_path/'a').iterdir())
    assert names == ['adapter_config.json', 'adapter_model.safetensors', CARD]


def test_adapter_is_small_and_names_no_path(made, tmp_path):
    from safetensors.torch import load_file
    preset, reader, d = made
    tuned = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules='all-linear', task_type='CAUSAL_LM'))
    tuned.peft_config['default'].base_model_name_or_path = '/somewhere/on/this/machine'
    card = dataclasses.replace(ExplainerCard.from_preset(preset, reader), base_model='some/model')
    save_adapter(tuned, card, tmp_path)
    assert {t.dtype for t in load_file(tmp_path/'adapter_model.safetensors').values()} == {torch.bfloat16}
    assert json.loads((tmp_path/'adapter_config.json').read_text())['base_model_name_or_path'] == 'some/model'


def test_explainer_is_its_own_copy(made):
    from saeexplainer.lm.models import load_model
    preset, reader, d = made
    target, _ = load_model(preset.target, device='cpu')
    state = {k: t.clone() for k, t in target.state_dict().items()}
    Explainer.from_pretrained(d/'sft', reader).explain(reader.directions([1]), max_new_tokens=3)
    assert all(torch.equal(t, state[k]) for k, t in target.state_dict().items())
    assert getattr(target.base_model, 'injector', None) is None


def test_candidates_depend_on_their_seeds_alone(made):
    preset, reader, d = made
    e, v = Explainer.from_pretrained(d/'sft', reader), reader.directions(range(6))
    kw = dict(temperature=1., top_p=.95, max_new_tokens=6)
    seeds = [[seed_for(0, 'round1', f, j) for j in range(3)] for f in range(6)]
    together = e.sample(v, 3, seeds=seeds, **kw)
    assert together == e.sample(v, 3, seeds=seeds, batch_size=4, **kw)
    assert [together[4]] == e.sample(v[4:5], 3, seeds=seeds[4:5], **kw)
    assert [row[:2] for row in together] == e.sample(v, 2, seeds=[s[:2] for s in seeds], **kw)
    assert e.sample(v, 3, seed=1, **kw) == e.sample(v, 3, seed=1, **kw) != e.sample(v, 3, seed=2, **kw)
    assert all(PLACEHOLDER not in text for row in together for text in row)
    assert e.explain(v[0], max_new_tokens=4) == e.explain(v[:1].numpy(), max_new_tokens=4) # one vector, an array
    with pytest.raises(ValueError, match=r'seeds must be \(6, 3\)'): e.sample(v, 3, seeds=seeds[:5])


def test_placeholder_is_never_generated(made):
    preset, reader, d = made
    e = Explainer.from_preset(preset, reader)
    head = e.model.get_output_embeddings()
    e.model.set_output_embeddings(torch.nn.Linear(head.in_features, head.out_features, dtype=head.weight.dtype))
    e.model.get_output_embeddings().bias.data[TOKEN] = 100. # would say nothing else
    ids = torch.tensor([e.prompt])
    with e.injector.using(directions(1)):
        new = e.model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1]:]
    assert (new == TOKEN).all()
    # special tokens are not shown: of that one alone, nothing would be left
    assert e.explain(directions(1), max_new_tokens=8)[0]


@pytest.mark.parametrize('bad,message', [
    (torch.randn(2, 48), 'has 48 components, the residual stream has 64'),
    (torch.zeros(1, 64), 'direction 0 of 1 is zero'),
    (torch.full((1, 64), float('nan')), 'is not finite'), (torch.full((1, 64), float('inf')), 'is not finite')])
def test_bad_directions(made, bad, message):
    preset, reader, d = made
    e = Explainer.from_pretrained(d/'sft')
    with pytest.raises(ValueError, match=message): e.explain(bad)
    with pytest.raises(ValueError, match=message): e.sample(bad, 2)


@pytest.mark.parametrize('change,message', [
    (dict(sae_sha256='0'*64), 'another SAE: its weights have hash .* trained on .* with 000000000000'),
    (dict(sae_layer=3), 'the SAE reads layer 2, the explainer was trained for layer 3'),
    (dict(d_model=48), "the SAE's directions have width 64, the explainer reads width 48"),
    (dict(model_sha256='0'*64), 'other weights: .* the explainer was trained on 000000000000'),
    (dict(layer=9), 'there is no layer 9 to inject after'),
    (dict(placeholder='no such token'), 'tokens here, not one')])
def test_card_that_does_not_fit(made, tmp_path, change, message):
    preset, reader, d = made
    Explainer.from_pretrained(d/'sft').save(tmp_path)
    dataclasses.replace(ExplainerCard.load(tmp_path), **change).save(tmp_path)
    with pytest.raises(ValueError, match=message): Explainer.from_pretrained(tmp_path, reader)


def test_model_of_another_width(made, tmp_path):
    preset, reader, d = made
    tiny_model(d=32).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has hidden size 32, the SAE's directions have 64"):
        Explainer.from_preset(dataclasses.replace(preset, explainer=str(tmp_path)), reader)


def test_folders_that_hold_no_explainer(made, tmp_path):
    preset, reader, d = made
    with pytest.raises(FileNotFoundError, match=f'is no explainer: it has no {CARD}'):
        Explainer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match='no explainer at .*nowhere: give a folder or a hub id'):
        Explainer.from_pretrained(str(tmp_path/'nowhere'))
    (tmp_path/CARD).write_text('{"base_model": "x"')
    with pytest.raises(ValueError, match='is not an explainer card'): Explainer.from_pretrained(tmp_path)
    (tmp_path/CARD).write_text('{"base_model": "x", "colour": "red"}')
    with pytest.raises(ValueError, match="is not an explainer card.*'colour'"): Explainer.from_pretrained(tmp_path)
    Explainer.from_pretrained(d/'sft').card.save(tmp_path)
    with pytest.raises(FileNotFoundError, match='its adapter is missing'): Explainer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match='an untrained explainer has no adapter to save'):
        Explainer.from_preset(preset, reader).save(tmp_path)


def test_chat_template_of_the_preset(made, tmp_path):
    preset, reader, d = made
    bare = tiny_tokenizer()
    bare.chat_template = None
    tiny_model().save_pretrained(tmp_path)
    bare.save_pretrained(tmp_path)
    preset = dataclasses.replace(preset, explainer=str(tmp_path))
    with pytest.raises(ValueError, match='has no chat template'): Explainer.from_preset(preset, reader)
    preset = dataclasses.replace(preset, chat_template="{{ messages[0]['content'] }}")
    e = Explainer.from_preset(preset, reader)
    assert TOKENIZER.decode(e.prompt) == TEMPLATE.format(placeholder=PLACEHOLDER)


def test_push_to_hub(made, monkeypatch):
    with Hub(monkeypatch) as hub: Explainer.from_pretrained(made[2]/'sft').push_to_hub('me/mine')
    assert sorted(hub.files) == ['README.md', 'adapter_config.json', 'adapter_model.safetensors', CARD]
    assert hub.created == dict(type=None, name='mine', organization='me')


def test_the_pushed_readme_says_what_it_was_made_with(made, monkeypatch):
    explainer = Explainer.from_pretrained(made[2]/'sft')
    with Hub(monkeypatch) as hub: explainer.push_to_hub('me/mine')
    _, header, text = hub.files['README.md'].decode().split('---\n', 2)
    assert yaml.safe_load(header)['library_name'] == 'peft'
    assert yaml.safe_load(header)['license'] == 'other'
    assert 'base_model' not in yaml.safe_load(header) # a folder, which the hub does not know
    assert explainer.card.sae_sha256 in text
    assert "Explainer.from_pretrained('me/mine')" in text
    assert 'None were measured' in text


# ---- Activation Oracles

def test_oracle(made, tmp_path):
    "A tiny adapter in the form that oracles have: PEFT's files alone, r 64, alpha 128, all linear layers"
    from saeexplainer.lm.models import load_model
    preset, reader, _ = made
    tokenizer = tiny_tokenizer(vocab=500)
    tokenizer.add_tokens([' ?'])
    tiny_model(n_layers=8).save_pretrained(tmp_path/'model')
    tokenizer.save_pretrained(tmp_path/'model')
    preset = load_preset(preset, explainer=str(tmp_path/'model'), dtype='float32')
    torch.manual_seed(0)
    config = random_lora(r=64, lora_alpha=128, lora_dropout=.05)
    get_peft_model(load_model(preset.explainer, device='cpu')[0], config).save_pretrained(tmp_path/'oracle')
    oracle, v = Explainer.from_oracle(tmp_path/'oracle', preset, reader), reader.directions([3, 4])
    shown = oracle.tokenizer.decode(oracle.prompt)
    assert 'Layer: 2\n ? \nCan you explain to me what this concept means?' in shown
    assert oracle.prompt.count(oracle.placeholder_id) == 1
    said = oracle.explain(v, max_new_tokens=6)
    assert said == oracle.explain(v, max_new_tokens=6) and said[0] != said[1]
    state = {n: p.clone() for n, p in oracle.model.named_parameters()}
    bare = load_model(preset.explainer, device='cpu')[0]
    assert any(not torch.equal(state[n], p) for n, p in bare.named_parameters()) # the adapter is in it
    layer1 = decoder_layers(oracle.model)[1]
    seen, plain = [], []
    handle = layer1.register_forward_hook(lambda m, a, out: seen.append(out))
    with oracle.injector.using(v): oracle.model(torch.tensor([oracle.prompt]*2))
    handle.remove()
    handle = layer1.register_forward_hook(lambda m, a, out: plain.append(out))
    oracle.model(torch.tensor([oracle.prompt]*2))
    handle.remove()
    after, before = (x[0] if isinstance(x, tuple) else x for x in (seen[0], plain[0]))
    at = oracle.prompt.index(oracle.placeholder_id)
    wanted = before[:, at] + before[:, at].norm(dim=-1, keepdim=True) * v / v.norm(dim=-1, keepdim=True)
    assert (after[:, at] - wanted).abs().max() < 1e-4
    assert torch.equal(after[:, :at], before[:, :at])
    assert oracle_note(preset, 2) is None
    assert oracle_layers(8) == [2, 4, 6]
    assert oracle_note(preset, 3) == 'ao: layer 3 is off the grid that the oracle was trained on (layers 2, 4, 6)'
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='has no adapter_model.safetensors: it is not a PEFT adapter'):
        Explainer.from_oracle(tmp_path/'empty', preset, reader)


def test_an_adapter_can_be_read_by_others(made, tmp_path):
    "What the umask allows, although safetensors closes what it writes"
    before = os.umask(0o022)
    try: Explainer.from_pretrained(made[2]/'sft', trainable=True).save(tmp_path/'x')
    finally: os.umask(before)
    assert {f.stat().st_mode & 0o777 for f in (tmp_path/'x').iterdir()} == {0o644}


def test_home_directory_in_an_explainers_path(made, monkeypatch):
    monkeypatch.setenv('HOME', str(made[2]))
    assert Explainer.from_pretrained('~/sft').card.stage == 'sft'


# ---- adapters that do not fit, and files that are damaged

def changed(d, to, how): # a copy of the saved explainer whose tensors are changed
    from safetensors.torch import load_file, save_file
    shutil.copytree(d/'sft', to)
    save_file(how(load_file(to/'adapter_model.safetensors')), to/'adapter_model.safetensors', metadata={'format': 'pt'})
    return to

def renamed(s): return {k.replace('model.model.', 'model.language_model.model.'): t for k, t in s.items()}

def half(s): return {k: t for i, (k, t) in enumerate(s.items()) if i % 2}

def with_another(s): return {**s, next(iter(s)).replace('layers.0', 'layers.9'): next(iter(s.values())).clone()}

MISFITS = {
    'renamed': (renamed, r'does not fit .*: \d+ of its tensors are missing, \d+ are for no layer'),
    'half of it': (half, r'does not fit .*: \d+ of its tensors are missing, 0 are for no layer'),
    'nothing': (lambda s: {}, r'does not fit .*: \d+ of its tensors are missing'),
    'more': (with_another, 'does not fit .*: 0 of its tensors are missing, 1 are for no layer'),
    'another width': (lambda s: {k: t[:, :32].contiguous() for k, t in s.items()}, 'does not fit .*size mismatch'),
    'not finite': (lambda s: {k: t * float('nan') for k, t in s.items()},
                   r'adapter_model.safetensors has numbers that are not finite'),
}

@pytest.mark.parametrize('what', MISFITS)
@pytest.mark.parametrize('way', ['merged', 'trainable', 'oracle'])
def test_an_adapter_that_does_not_fit_is_refused(made, tmp_path, what, way):
    preset, reader, d = made
    how, says = MISFITS[what]
    folder = changed(d, tmp_path/'x', how)
    with pytest.raises(ValueError, match=says) as e:
        if way == 'oracle': Explainer.from_oracle(folder, dataclasses.replace(preset, placeholder=PLACEHOLDER), reader)
        else: Explainer.from_pretrained(folder, reader, trainable=way == 'trainable')
    assert '\n' not in str(e.value) and len(str(e.value)) < 600


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
def test_damaged_files_of_an_explainer(made, tmp_path, name, content, says):
    preset, reader, d = made
    shutil.copytree(d/'sft', tmp_path/'x')
    (tmp_path/'x'/name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as e: Explainer.from_pretrained(tmp_path/'x', reader)
    assert str(tmp_path/'x') in str(e.value) and '\n' not in str(e.value)
    if name == 'adapter_model.safetensors':
        with pytest.raises(ValueError, match=says): adapter_sha256(tmp_path/'x')


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
def test_a_card_of_other_types(made, tmp_path, change, says):
    preset, reader, d = made
    shutil.copytree(d/'sft', tmp_path/'x')
    (tmp_path/'x'/CARD).write_text(json.dumps(json.loads((d/'sft'/CARD).read_text()) | change))
    with pytest.raises(ValueError, match=says): Explainer.from_pretrained(tmp_path/'x')
    whole = ExplainerCard.load(d/'sft')
    dataclasses.replace(whole, coefficient=1).save(tmp_path/'x') # a whole number is a number
    assert ExplainerCard.load(tmp_path/'x') == whole


def test_an_older_card_has_no_length_of_explanations(made, tmp_path):
    preset, reader, d = made
    new = ExplainerCard.load(d/'sft')
    assert new.explanation_tokens == preset.explanation_tokens
    older = json.loads((d/'sft'/CARD).read_text())
    del older['explanation_tokens']
    (tmp_path/CARD).write_text(json.dumps(older))
    card = ExplainerCard.load(tmp_path)
    assert card.explanation_tokens is None
    card.save(tmp_path)
    assert json.loads((tmp_path/CARD).read_text()) == older


def test_the_length_of_explanations_does_not_make_another_training(made):
    preset, reader, d = made
    card = ExplainerCard.load(d/'sft')
    before = {k: v for k, v in dataclasses.asdict(card).items() if k not in ('versions', 'explanation_tokens')}
    assert card.settings() == dataclasses.replace(card, explanation_tokens=None).settings() == before


def test_explanations_are_as_long_as_the_card_says(made):
    preset, reader, d = made
    e, v = Explainer.from_pretrained(d/'sft', reader), reader.directions([1, 2])
    e.card = dataclasses.replace(e.card, explanation_tokens=3)
    assert e.explain(v) == e.explain(v, max_new_tokens=3)
    assert e.sample(v, 2) == e.sample(v, 2, max_new_tokens=3)
    e.card = dataclasses.replace(e.card, explanation_tokens=None)
    assert e.explain(v) == e.explain(v, max_new_tokens=64)


@pytest.mark.parametrize('indices', [[5, 13], range(2), 5, torch.tensor([5, 13]), (5,)])
def test_indices_are_no_directions(made, indices):
    preset, reader, d = made
    e = Explainer.from_preset(preset, reader)
    shown = torch.atleast_1d(torch.as_tensor(indices)).tolist()
    for asked in (lambda: e.explain(indices), lambda: e.sample(indices, 2)):
        with pytest.raises(ValueError) as error: asked()
        assert f'give it reader.directions({shown})' in str(error.value)
        assert '\n' not in str(error.value)


def test_placeholder_of_nothing():
    refusal = 'the placeholder is .*, which is no token: choose a reserved token'
    for blank in ('', ' ', '\n'):
        with pytest.raises(ValueError, match=refusal): placeholder_id(TOKENIZER, blank)
        with pytest.raises(ValueError, match=refusal): prompt_messages(TEMPLATE, blank)
        with pytest.raises(ValueError, match=refusal): without_placeholder('a label', blank)


def test_placeholder_that_the_model_does_not_know(made, tmp_path):
    "Added to the tokenizer, not to the embedding"
    preset, reader, d = made
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(['<here>', *(f'<filler{i}>' for i in range(600))])
    tokenizer.add_tokens(['<place>'])
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    refusal = 'token .* is not in the embedding of .*, which has 512 rows: it was added to the tokenizer'
    with pytest.raises(ValueError, match=refusal):
        Explainer.from_preset(dataclasses.replace(preset, explainer=str(tmp_path), placeholder='<place>'), reader)


def test_a_prompt_longer_than_the_model(made):
    preset, reader, d = made
    e = Explainer.from_pretrained(d/'sft')
    refusal = 'more than the 512 that .* reads: shorten the prompt, or ask for fewer tokens'
    with pytest.raises(ValueError, match=refusal):
        e.explain(reader.directions([1]), max_new_tokens=600)


@pytest.mark.parametrize('name', ['adapter_model.safetensors', 'adapter_config.json'])
def test_a_byte_of_an_adapter_that_flips_is_noticed(made, tmp_path, name):
    shutil.copytree(made[2]/'sft', tmp_path/'x')
    file = tmp_path/'x'/name
    data = file.read_bytes()
    if name.endswith('safetensors'): changed = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    else: changed = data.replace(b'"lora_alpha": ', b'"lora_alpha": 9')
    assert changed != data
    file.write_bytes(changed)
    with pytest.raises(ValueError, match='is not what was saved there'): Explainer.from_pretrained(tmp_path/'x')


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
def test_settings_that_would_make_an_adapter_nothing(made, tmp_path, settings, says, trainable):
    preset, reader, d = made
    shutil.copytree(d/'sft', tmp_path/'x')
    file = tmp_path/'x'/'adapter_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ValueError, match=f'{file}.*{says}') as e:
        Explainer.from_pretrained(tmp_path/'x', reader, trainable=trainable)
    assert '\n' not in str(e.value)
