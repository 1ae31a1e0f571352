"saeexplainer.target: early exit, reading and steering on five tiny architectures, and what bad input is told"
import copy, math
import numpy as np, pandas as pd, pytest, torch
from helpers import ARCHITECTURES, tiny_model, tiny_sae, tiny_tokenizer
from saeexplainer import target as T, steering as S
from saeexplainer.lm import hooks, models
from saeexplainer.lm.models import weights_sha256
from saeexplainer.presets import load_preset
from saeexplainer.lm.sampling import sample
from saeexplainer.saes import FeatureReader
from saeexplainer.lm.sampling import pad
from saeexplainer.lm.hooks import residual_hook, residual_stream
from saeexplainer.steering import find_steering_values, steering
from saeexplainer.target import Target, distinct_texts, tokenise

TEXTS = ['The cat sat on the mat.', 'I think that rain', 'A', '', 'She sells sea shells by the sea shore, and the dog lay by the fire.']
PROMPTS = ['The explanation is simple:', 'I think', 'We']


@pytest.fixture(scope='module')
def tokenizer(): return tiny_tokenizer()


@pytest.fixture(scope='module')
def lms(): return {arch: tiny_model(arch) for arch in ARCHITECTURES}


@pytest.fixture(scope='module')
def readers(tmp_path_factory): # one for each place
    make = lambda hook, layer: FeatureReader.load(tiny_sae(tmp_path_factory.mktemp('sae'), hook=hook, layer=layer))
    return {(hook, layer): make(hook, layer) for hook in ('resid_post', 'resid_pre') for layer in (0, 2, 3)}


@pytest.fixture(scope='module')
def llama(lms, tokenizer, readers): return Target(lms['llama'], tokenizer, readers['resid_post', 2])


def lively(target, texts=TEXTS, n=4): # features that are active on these texts
    resid = lambda ids: residual_stream(target.model, **pad([ids], 0), layer=target.reader.layer, hook=target.reader.hook)
    acts = np.concatenate([target.reader.encode(resid(t.ids))[0, 1:] for t in tokenise(target.tokenizer, texts) if t.counts.any()])
    return [int(f) for f in acts.max(0).argsort()[::-1][:n]]


# ---- early exit

@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_early_exit_equals_hidden_states(lms, tokenizer, arch):
    model, ids = lms[arch], tokenizer('The cat sat on the mat and the dog lay by the fire.', return_tensors='pt').input_ids
    with torch.no_grad(): states = model(ids, output_hidden_states=True).hidden_states
    mask = torch.ones_like(ids)
    for layer in range(4):
        assert torch.equal(residual_stream(model, ids, mask, layer, 'resid_pre'), states[layer])
        if layer < 3: assert torch.equal(residual_stream(model, ids, mask, layer, 'resid_post'), states[layer+1])


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_last_layer_is_read_before_the_final_norm(lms, tokenizer, arch):
    model, ids = lms[arch], tokenizer('The cat sat on the mat.', return_tensors='pt').input_ids
    with torch.no_grad(): last = model(ids, output_hidden_states=True).hidden_states[-1]
    resid, body = residual_stream(model, ids, torch.ones_like(ids), 3), hooks.backbone(model)
    norm = body.norm if hasattr(body, 'norm') else body.ln_f
    assert not torch.allclose(resid, last, atol=1e-3) and torch.allclose(norm(resid), last, atol=1e-5)


@pytest.mark.parametrize('arch', ARCHITECTURES)
@pytest.mark.parametrize('left', (True, False))
@pytest.mark.parametrize('place', [('resid_pre', 0), ('resid_post', 0), ('resid_pre', 2), ('resid_post', 2), ('resid_pre', 3), ('resid_post', 3)])
def test_padding_on_either_side(lms, tokenizer, arch, left, place, largest_error):
    "Every row of a padded batch, by early exit, against the full forward of that row alone"
    (hook, layer), model = place, lms[arch]
    rows = [t.ids for t in tokenise(tokenizer, [t for t in TEXTS if t])]
    batch = pad(rows, 0, left=left)
    together = residual_stream(model, **batch, layer=layer, hook=hook)
    for i, row in enumerate(rows):
        seen = []
        with torch.no_grad(), residual_hook(model, layer, hook, seen.append): model(torch.tensor([row])) # all layers and the head
        difference = (together[i][batch['attention_mask'][i].bool()] - seen[0][0]).abs().max().item()
        assert largest_error('early exit in a padded batch, against the full forward', difference/max(1., seen[0].abs().max().item())) < 2e-5


def test_later_layers_are_not_run_and_no_hook_stays(lms, tokenizer):
    model, ran = tiny_model(), []
    handles = [layer.register_forward_hook(lambda m, a, o, i=i: ran.append(i)) for i, layer in enumerate(model.model.layers)]
    ids = tokenizer('The cat', return_tensors='pt').input_ids
    residual_stream(model, ids, torch.ones_like(ids), 1)
    assert ran == [0, 1]
    ran.clear(); residual_stream(model, ids, torch.ones_like(ids), 1, 'resid_pre')
    assert ran == [0]
    for h in handles: h.remove()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.layers)
    with pytest.raises(RuntimeError, match='mine'): # an error of the model's own is not swallowed, and leaves no hook either
        with residual_hook(model, 1, 'resid_post', lambda r: (_ for _ in ()).throw(RuntimeError('mine'))): model(ids)
    assert not model.model.layers[1]._forward_hooks


# ---- reading

def test_tokens_are_the_text(tokenizer):
    for text in ('The cat', ' two  spaces ', 'naïve 中文 🙂!', 'a\n\nb', ''):
        t = tokenise(tokenizer, [text])[0]
        assert ''.join(t.strings)==text and t.ids[0]==tokenizer.bos_token_id and not t.counts[0] and t.counts[1:].all()
    assert tokenise(tokenizer, []) == [] and tokenise(tokenizer, ['a'], bos=False)[0].counts.all()


def test_bos_is_fed_once_even_if_the_tokenizer_adds_it():
    plain, adds = tiny_tokenizer(), tiny_tokenizer(add_bos=True)
    assert adds('The cat')['input_ids'][0] == 1 != plain('The cat')['input_ids'][0]
    assert tokenise(adds, ['The cat'])[0].ids == tokenise(plain, ['The cat'])[0].ids


@pytest.mark.parametrize('arch', ARCHITECTURES)
@pytest.mark.parametrize('place', [('resid_post', 0), ('resid_post', 2), ('resid_pre', 2), ('resid_post', 3), ('resid_pre', 0)])
def test_activations_equal_sae_lens(lms, tokenizer, readers, arch, place, largest_error):
    target = Target(lms[arch], tokenizer, readers[place])
    hook, layer = place
    for f in lively(target):
        readings = target.activations(TEXTS, f)
        for text, reading in zip(TEXTS, readings):
            ids = torch.tensor([[1] + tokenizer(text, add_special_tokens=False)['input_ids']])
            with torch.no_grad(): states = target.model(ids, output_hidden_states=True).hidden_states
            if place==('resid_post', 3): x = residual_stream(target.model, ids, torch.ones_like(ids), 3) # tested above
            else: x = states[layer + (hook=='resid_post')]
            full = target.reader.sae.encode(x)[0, 1:, f].numpy()
            assert ''.join(reading.tokens)==text and reading.values.dtype==np.float32
            assert largest_error('early exit + one column', np.abs(reading.values - full).max(initial=0) / max(1., full.max(initial=0))) <= 1e-4
        assert max(r.max for r in readings if len(r.tokens)) > 0


def test_batch_and_order_do_not_matter(lms, tokenizer, readers):
    one, many = (Target(lms['gemma3'], tokenizer, readers['resid_post', 2], batch_size=n) for n in (1, 64))
    tight = Target(lms['gemma3'], tokenizer, readers['resid_post', 2], max_tokens=20)
    features = lively(many, n=5)
    wanted = many.max_acts(TEXTS, features)
    for other in (one, tight): np.testing.assert_allclose(other.max_acts(TEXTS, features), wanted, atol=1e-4)
    np.testing.assert_allclose(many.max_acts(TEXTS[::-1], features[::-1])[::-1], wanted, atol=1e-4)
    np.testing.assert_allclose([r.max for r in many.activations(TEXTS, features)], wanted, atol=1e-4)


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_a_table_of_activations_equals_those_of_each_feature(lms, tokenizer, readers, arch, largest_error):
    target = Target(lms[arch], tokenizer, readers['resid_post', 2])
    features = [*lively(target), 3, 500]
    table = target.max_act_table(TEXTS, features)
    wanted = np.stack([target.max_acts(TEXTS, feature) for feature in features], 1)
    assert table.shape == (len(TEXTS), 6)
    assert table.dtype == np.float32
    assert (np.isnan(table) == np.isnan(wanted)).all()
    assert largest_error('table of activations', float(np.nanmax(np.abs(table - wanted)))) < 1e-4


@pytest.mark.parametrize('architecture', ['standard', 'gated', 'topk', 'batchtopk'])
def test_a_table_with_every_kind_of_sae(lms, tokenizer, tmp_path, architecture):
    target = Target(lms['llama'], tokenizer, FeatureReader.load(tiny_sae(tmp_path, architecture)))
    features = lively(target)
    wanted = np.stack([target.max_acts(TEXTS, feature) for feature in features], 1)
    np.testing.assert_allclose(target.max_act_table(TEXTS, features), wanted, atol=1e-4)


def test_a_table_leaves_out_what_cannot_be_read(llama):
    table = llama.max_act_table(['The cat', '', 'rain '*600, '<|im_end|>'], [3, 5])
    assert np.isnan(table).all(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize('texts, features, shape', [([], [3], (0, 1)), (['The cat'], [], (1, 0)), ([], [], (0, 0)), (['A', 'A'], [3, 3], (2, 2))])
def test_tables_without_texts_or_features(llama, texts, features, shape):
    assert llama.max_act_table(texts, features).shape == shape


@pytest.mark.parametrize('texts, features, line', [
    (['a'], [512], 'there is no feature 512: this SAE has features 0 to 511'),
    (['a', None], [3], 'text 1 is no text but None'),
    ('a text', [3], 'one text .* was given for a list of texts'),
])
def test_wrong_tables_are_refused(llama, texts, features, line):
    with pytest.raises(ValueError, match=line): llama.max_act_table(texts, features)


def test_a_table_that_is_not_finite_is_refused(lms, tokenizer, tmp_path):
    reader = FeatureReader.load(tiny_sae(tmp_path))
    reader.sae.W_enc.data[:, 5] = math.nan
    reader.sae.threshold.data[5] = -1.
    with pytest.raises(ValueError, match="feature 5 is not finite where the residual stream is: are the SAE's weights damaged"):
        Target(lms['llama'], tokenizer, reader).max_act_table(['The cat'], [3, 5])


def test_texts_are_run_once(llama, monkeypatch):
    texts = ['The cat sat.', 'A', 'The cat sat.', 'The cat sat.', '', 'A']
    features = [*lively(llama, n=4), 3, 5]
    wanted = [llama.max_acts([t], f)[0] for t, f in zip(texts, features)]
    assert [sum(map(len, text.values())) for text in distinct_texts(tokenise(llama.tokenizer, texts), features)] == [3, 2]
    rows, stream = [], T.residual_stream
    monkeypatch.setattr(T, 'residual_stream', lambda model, input_ids, *a, **k: rows.append(len(input_ids)) or stream(model, input_ids, *a, **k))
    np.testing.assert_allclose(llama.max_acts(texts, features), wanted, atol=1e-4)
    assert sum(rows) == 2
    monkeypatch.setattr(T, 'FEATURES_AT_ONCE', 1) # one feature at a time
    np.testing.assert_allclose(llama.max_acts(texts, features), wanted, atol=1e-4)
    many = llama.activations(['The cat sat.']*512, range(512))
    x = residual_stream(llama.model, **pad([tokenise(llama.tokenizer, texts)[0].ids], 0), layer=2)
    np.testing.assert_allclose(np.stack([r.values for r in many], 1), llama.reader.encode(x)[0, 1:].numpy(), atol=1e-4)


@pytest.mark.parametrize('arch', ARCHITECTURES)
@pytest.mark.parametrize('hook', ('resid_post', 'resid_pre'))
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))])
def test_half_precision_model_read_in_fp32(tokenizer, readers, arch, hook, device, largest_error):
    model = tiny_model(arch).to(device, torch.bfloat16)
    reader = FeatureReader(copy.deepcopy(readers[hook, 2].sae).to(device))
    target, text = Target(model, tokenizer, reader), TEXTS[0]
    ids = torch.tensor([tokenise(tokenizer, [text])[0].ids], device=device)
    with torch.no_grad(): states = model(ids, output_hidden_states=True).hidden_states
    x = states[2 + (hook=='resid_post')]
    full = reader.sae.encode(x.float())[0, 1:] # the same bf16 residual stream, encoded in fp32
    assert x.dtype==torch.bfloat16 and (full > 0).any()
    found = torch.tensor(np.stack([r.values for r in target.activations([text]*512, range(512))], 1))
    assert largest_error('reading a bf16 model', ((found - full.cpu()).abs().max() / max(1., full.max())).item()) <= 1e-4


def test_empty_and_special_only_texts(llama):
    acts = llama.max_acts(['', 'The cat', '<|im_end|>'], 3)
    assert np.isnan(acts[[0, 2]]).all() and np.isfinite(acts[1]) and acts.dtype==np.float32
    empty = llama.activations([''], 3)[0]
    assert empty.tokens == [] and math.isnan(empty.max)
    assert llama.max_acts([], 3).shape == (0,) and llama.activations([], []) == []


def test_bos_and_special_tokens_never_count(llama):
    bos = residual_stream(llama.model, torch.tensor([[1]]), torch.ones(1, 1), 2)
    f = int(llama.reader.encode(bos)[0, 0].argmax()) # a feature that fires on BOS
    height = llama.reader.encode(bos)[0, 0, f].item()
    assert height > 0 and len(llama.activations(['A'], f)[0].tokens) == 1
    llama.reader.sae.W_enc.data[:, f] *= 1e3 # now BOS would win everywhere if it counted
    try:
        ids = torch.tensor([tokenise(llama.tokenizer, ['The cat<|im_end|> sat'])[0].ids])
        all_acts = llama.reader.encode(residual_stream(llama.model, ids, torch.ones_like(ids), 2))[0, :, f]
        reading = llama.activations(['The cat<|im_end|> sat'], f)[0]
        assert ''.join(reading.tokens)=='The cat sat' and len(reading.values) == len(ids[0]) - 2
        counted = [i for i, t in enumerate(ids[0].tolist()) if t not in (1, 4)]
        np.testing.assert_allclose(reading.values, all_acts[counted].numpy(), rtol=1e-4, atol=1e-3)
    finally: llama.reader.sae.W_enc.data[:, f] /= 1e3


def test_saes_trained_without_bos(lms, tokenizer, tmp_path):
    target = Target(lms['llama'], tokenizer, FeatureReader.load(tiny_sae(tmp_path, metadata={'prepend_bos': False})))
    assert not target.bos and len(target.activations(['A'], 1)[0].tokens) == 1


def test_reading_errors(llama):
    with pytest.raises(ValueError, match='2 texts and 3 features: one feature per text'): llama.max_acts(['a', 'b'], [1, 2, 3])
    with pytest.raises(ValueError, match='there is no feature 512: this SAE has features 0 to 511'): llama.max_acts(['a'], 512)
    with pytest.raises(ValueError, match=r'text 1 has \d+ tokens, the model reads 512: split it'): llama.max_acts(['a', 'z y '*600], 1)


@pytest.mark.parametrize('arch', ('llama', 'gpt2'))
def test_a_text_that_cannot_be_read_is_its_own_error(lms, tokenizer, readers, arch):
    "Too long for the context, or with a token beyond the vocabulary: the others are scored"
    target = Target(lms[arch], tokenizer, readers['resid_post', 2])
    texts = ['The cat', 'the cat sat on the mat and '*100, '', 'park', '<|im_end|>']
    alone = target.max_acts(['The cat', 'park'], 3).tolist()
    assert target.scores(texts, 3) == target.scores(pd.Series(texts, index=range(5, 10)), [3]*5) == [pytest.approx(alone[0]), 'too long', 'empty', pytest.approx(alone[1]), 'empty']
    assert target.scores([], 3) == [] and target.scores(texts[1:3], 3) == ['too long', 'empty']
    longest = 511 # and BOS
    fits = tokenizer.decode([tokenizer('a')['input_ids'][0]]*longest)
    assert len(tokenise(tokenizer, [fits])[0].ids) == 512 and isinstance(target.scores([fits], 3)[0], float) and target.scores([fits + 'a'], 3) == ['too long']
    more = tiny_tokenizer(); more.add_tokens(['<extra>'], special_tokens=True)
    while len(more) <= 512: more.add_tokens([f'<extra{len(more)}>'])
    last = [t for t, i in more.get_added_vocab().items() if i == 512][0]
    other = Target(lms[arch], more, readers['resid_post', 2])
    assert other.scores([f'The cat {last}', 'The cat'], 3) == ['unknown token', pytest.approx(alone[0])]
    with pytest.raises(ValueError, match='text 0 has token 512, the model knows 512'): other.max_acts([f'The cat {last}'], 3)


@pytest.mark.parametrize('dtype, cure', [('float16', 'in float16: use dtype bfloat16'), ('float32', 'in float32: are its weights damaged')])
@pytest.mark.parametrize('architecture', ('standard', 'jumprelu', 'topk'))
def test_a_stream_that_is_not_finite_is_an_error(tokenizer, tmp_path, dtype, cure, architecture):
    "Not a text without tokens (NaN), and not a feature that is silent (0, as TopK would have it)"
    model = tiny_model()
    model.model.embed_tokens.weight.data.mul_(1e6 if dtype == 'float16' else torch.inf)
    target = Target(model.to(getattr(torch, dtype)), tokenizer, FeatureReader.load(tiny_sae(tmp_path, architecture)))
    for read in (target.max_acts, target.scores, target.activations):
        with pytest.raises(ValueError, match=f'residual stream of .* at layer 2 is not finite {cure}'): read(['The cat', ''], 3)
    with pytest.raises(ValueError, match='is not finite'): target.steering_value(3, .1, PROMPTS)


def test_a_damaged_sae_is_an_error(lms, tokenizer, tmp_path):
    reader = FeatureReader.load(tiny_sae(tmp_path))
    reader.sae.W_enc.data[:, 7] = math.nan
    target = Target(lms['llama'], tokenizer, reader)
    with pytest.raises(ValueError, match="feature 7 is not finite where the residual stream is: are the SAE's weights damaged"): target.max_acts(['The cat'], 7)
    assert np.isfinite(target.max_acts(['The cat'], 8)).all()


@pytest.mark.parametrize('features', [1.7, '5', np.zeros(512, bool), [True, False], [1., 2.], None, [[1, 2], [3, 4]]], ids=str)
def test_what_is_no_feature_is_refused(llama, features):
    for read in (llama.max_acts, llama.activations, llama.scores):
        with pytest.raises(ValueError): read(['The cat', 'A'], features)


@pytest.mark.parametrize('texts', ['The cat', b'The cat', ['The cat', None], ['a', math.nan], [5], [['a', 'b']], ['half \ud83d emoji']], ids=str)
def test_what_is_no_list_of_texts_is_refused(llama, texts):
    for read in (llama.max_acts, llama.activations, llama.scores, lambda t, f: llama.generate(t), lambda t, f: llama.steering_value(f, .1, t)):
        with pytest.raises(ValueError, match='one text .* was given for a list of texts|is no text but|has half a character'): read(texts, 5)


def test_texts_and_features_of_pandas_and_numpy(llama):
    table = pd.DataFrame(dict(text=TEXTS, feature=[1, 2, 3, 4, 5])).iloc[[0, 2, 4]]
    wanted = llama.max_acts([TEXTS[i] for i in (0, 2, 4)], [1, 3, 5])
    for texts, features in ((table.text, table.feature), (table.text.to_numpy(), table.feature.to_numpy()), (tuple(table.text), torch.tensor([1, 3, 5])), (iter(table.text), (1, 3, 5))):
        np.testing.assert_array_equal(llama.max_acts(texts, features), wanted)
    assert [r.tokens for r in llama.activations(table.text, 3)] == [r.tokens for r in llama.activations(list(table.text), 3)]


def test_prompts_that_are_too_long(llama, lms, tokenizer, readers):
    for target in (llama, Target(lms['gpt2'], tokenizer, readers['resid_post', 2])):
        long = 'the cat sat on the mat and '*100
        with pytest.raises(ValueError, match=r'prompt 1 has \d+ tokens and 25 are to follow, the model reads 512'): target.generate(['We', long])
        with pytest.raises(ValueError, match=r'prompt 0 has \d+ tokens, the model reads 512'): target.steering_value(3, .1, [long])
        assert len(target.generate(['We'], max_new_tokens=511 - len(tokenizer('We')['input_ids']), temperature=0)) == 1
        with pytest.raises(ValueError, match='prompt 0 has'): target.generate(['We'], max_new_tokens=512)


def test_an_sae_with_bos_and_a_tokenizer_without(lms, tmp_path, capfd):
    nobos = tiny_tokenizer(); nobos.bos_token = None
    for bos, said in ((True, True), (False, False), (None, False)):
        Target(lms['llama'], nobos, FeatureReader.load(tiny_sae(tmp_path/str(bos), metadata={'prepend_bos': bos})))
        assert ('this tokenizer has no such token' in capfd.readouterr().err) == said


def test_progress(llama, capfd):
    llama.max_acts(TEXTS, 1); assert 'text' not in capfd.readouterr().err
    llama.max_acts(TEXTS, 1, progress=True); assert '4/4' in capfd.readouterr().err


# ---- steering

def the_long_way(target, features, values, mask): # decode(encode with the feature changed) + error, at all tokens but padding
    sae = target.reader.sae
    def change(resid):
        acts = sae.encode(resid); error = resid - sae.decode(acts); acts = acts.clone()
        for i, (f, v) in enumerate(zip(features, values)): acts[i, :, f] = v
        new = sae.decode(acts) + error
        return torch.where(mask[..., None].bool(), new, resid) if len(mask[0])==resid.shape[1] else new
    return residual_hook(target.model, target.reader.layer, target.reader.hook, change)


@pytest.mark.parametrize('arch', ARCHITECTURES)
@pytest.mark.parametrize('place', [('resid_post', 2), ('resid_pre', 2), ('resid_post', 3)])
def test_steered_generation_equals_the_long_way(lms, tokenizer, readers, arch, place):
    target = Target(lms[arch], tokenizer, readers[place])
    features, values = lively(target, n=3), [20., -20., 0.]
    steered = target.generate(PROMPTS, features, values, max_new_tokens=12, seeds=[1, 2, 3])
    batch = pad([t.ids for t in tokenise(tokenizer, PROMPTS)], 0, left=True)
    assert 0 in batch['attention_mask'] # prompts differ in length
    with the_long_way(target, features, values, batch['attention_mask']):
        wanted = sample(target.model, tokenizer, **batch, seeds=[1, 2, 3], max_new_tokens=12, temperature=.75)
    assert steered == wanted
    assert steered != target.generate(PROMPTS, max_new_tokens=12, seeds=[1, 2, 3])


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_steered_logits_with_and_without_cache(lms, tokenizer, readers, arch):
    target = Target(lms[arch], tokenizer, readers['resid_post', 2])
    batch, f = pad([t.ids for t in tokenise(tokenizer, PROMPTS)], 0, left=True), lively(target, n=3)
    with steering(target.model, target.reader, f, [15., 15., 15.], batch['attention_mask']):
        out = target.model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True,
                                    return_dict_in_generate=True)
    longer = torch.cat([batch['attention_mask'], torch.ones(3, 6, dtype=torch.long)], 1) # all of it once more, without a cache
    with torch.no_grad(), steering(target.model, target.reader, f, [15., 15., 15.], longer):
        logits = target.model(out.sequences, attention_mask=longer, position_ids=(longer.cumsum(-1)-1).clamp(min=0), use_cache=False).logits
    for step in range(6): assert (out.logits[step] - logits[:, -7+step]).abs().max() < 2e-4


def test_a_row_is_its_own(llama):
    f = lively(llama, n=3)
    hooks = lambda: [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in llama.model.model.layers]
    before = hooks() # transformers leaves some of its own
    together = llama.generate(PROMPTS, f, [9., 9., 9.], seeds=[5, 6, 7], max_new_tokens=8)
    assert together == [llama.generate([p], i, 9., seeds=[s], max_new_tokens=8)[0] for p, i, s in zip(PROMPTS, f, [5, 6, 7])]
    small = Target(llama.model, llama.tokenizer, llama.reader, batch_size=2)
    assert small.generate(PROMPTS, f, 9., seeds=[5, 6, 7], max_new_tokens=8) == together
    assert llama.generate([], seeds=[]) == []
    assert hooks() == before


def test_greedy_and_default_seeds(llama):
    greedy = lambda seeds: llama.generate(PROMPTS, temperature=0, seeds=seeds, max_new_tokens=5)
    assert greedy([1, 2, 3]) == greedy([4, 5, 6])
    assert llama.generate(PROMPTS, max_new_tokens=5) == llama.generate(PROMPTS, max_new_tokens=5)


def test_generation_errors(llama, lms):
    for kw in (dict(feature=1), dict(value=1.)):
        with pytest.raises(ValueError, match='steering needs both a feature and a value'): llama.generate(PROMPTS, **kw)
    with pytest.raises(ValueError, match='3 prompts and 1 seeds'): llama.generate(PROMPTS, seeds=[1])
    with pytest.raises(ValueError, match='there is no feature 900'): llama.generate(PROMPTS, 900, 1.)
    nobos = tiny_tokenizer(); nobos.bos_token = None
    with pytest.raises(ValueError, match='a prompt is empty and this model has no BOS token'):
        Target(lms['llama'], nobos, llama.reader).generate([''])


# ---- the search for a clamp

def slow_kl(target, f, value, reference): # each prompt alone, without padding; the SAE's way: encode, change, decode
    sae, kls = target.reader.sae, []
    def edit(resid, change):
        acts = sae.encode(resid); back = 0 if reference=='sae' else resid - sae.decode(acts)
        acts = sae.encode(resid).clone()
        if change: acts[..., f] = value
        return sae.decode(acts) + back
    for row in tokenise(target.tokenizer, PROMPTS):
        clean, steered = ([], [])
        for change, out in ((False, clean), (True, steered)):
            with torch.no_grad(), residual_hook(target.model, target.reader.layer, target.reader.hook, lambda r: edit(r, change)):
                out.append(target.model(**pad([row.ids], 0)).logits[0, 1:].log_softmax(-1)) # without BOS
        kls.append((clean[0].exp() * (clean[0] - steered[0])).sum(-1).mean().item())
    return sum(kls)/len(kls)


@pytest.mark.parametrize('arch', ('llama', 'gemma2', 'gpt2'))
@pytest.mark.parametrize('reference', ('raw', 'sae'))
def test_steering_values_have_the_kl_they_say(lms, tokenizer, readers, arch, reference):
    target = Target(lms[arch], tokenizer, readers['resid_post', 2])
    for f in lively(target, n=2):
        for kl, found in zip((.1, .2, -.1, -.2), target.steering_values(f, [.1, .2, -.1, -.2], PROMPTS, reference=reference)):
            assert slow_kl(target, f, found.value, reference) == pytest.approx(found.kl, rel=.01, abs=1e-4)
            assert found.reached == (abs(found.kl - abs(kl)) <= .05*abs(kl)) and found.reached and (found.value < 0) == (kl < 0)
            alone = target.steering_value(f, kl, PROMPTS, reference=reference)
            assert alone.reached and alone.value == pytest.approx(found.value, rel=.06)


def test_clean_references_differ(llama):
    f = lively(llama)[0]
    assert slow_kl(llama, f, 5., 'raw') != pytest.approx(slow_kl(llama, f, 5., 'sae'), rel=.01)
    texts = [llama.generate(PROMPTS, *steered, reference=r, temperature=0, max_new_tokens=8) for steered in ((), (f, 9.)) for r in ('raw', 'sae')]
    assert len(set(map(tuple, texts))) == 4
    with residual_hook(llama.model, 2, 'resid_post', llama.reader.reconstruct):
        ids = tokenise(llama.tokenizer, PROMPTS[:1])[0].ids
        assert sample(llama.model, llama.tokenizer, **pad([ids], 0), temperature=0, max_new_tokens=8) == texts[1][:1]


def test_several_clamps_and_targets_share_forward_passes(llama):
    ran, f = [], lively(llama)[0]
    handle = llama.model.register_forward_pre_hook(lambda *a: ran.append(1))
    try:
        llama.search._kept.clear()
        llama.steering_values(f, [.1, .2, -.1, -.2], PROMPTS); together = len(ran)
        ran.clear(); llama.steering_values(f, [.1], PROMPTS); one = len(ran)
    finally: handle.remove()
    assert one <= 4 and together <= 9


def test_logits_in_blocks_are_the_same(llama, monkeypatch):
    clean, f = llama.search.clean_run(PROMPTS, 'raw'), lively(llama)[0]
    values = [-5., 1., 3., 8.]
    whole = S.steered_kls(llama.model, llama.reader, clean, f, values)
    monkeypatch.setattr(S, 'LOGITS_AT_ONCE', 1)
    assert S.steered_kls(llama.model, llama.reader, clean, f, values) == pytest.approx(whole, rel=1e-3, abs=1e-6)


def test_steering_that_cannot_reach_its_kl_says_so(llama):
    found = llama.steering_value(lively(llama)[0], 50., PROMPTS)
    assert not found.reached and 0 < found.kl < 50
    with pytest.raises(ValueError, match='the KL to reach is 0'): llama.steering_value(1, 0., PROMPTS)
    with pytest.raises(ValueError, match='there is no feature 512'): llama.steering_value(512, .1, PROMPTS)


def test_dead_feature_cannot_steer(lms, tokenizer, tmp_path):
    target = Target(lms['llama'], tokenizer, FeatureReader.load(tiny_sae(tmp_path)))
    target.reader.sae.W_dec.data[9] = 0
    with pytest.raises(ValueError, match=r'is zero \(a dead feature\)'): target.steering_value(9, .1, PROMPTS)


@pytest.mark.parametrize('curve, target', [(lambda v: v*v, .25), (lambda v: v*v, 1e-3), (lambda v: 1e-6*v*v, .5), (lambda v: 1e4*v*v, .5),
                                           (lambda v: abs(v), .25), (lambda v: min(v**4, 9.), .25),
                                           (lambda v: math.nan if abs(v) > .6 else v*v, .25),
                                           (lambda v: math.inf if abs(v) > .6 else v*v, .25),
                                           (lambda v: .01 if abs(v) < 3 else (abs(v)-3)**2, .25)])
@pytest.mark.parametrize('step', (1., -1.))
def test_search(curve, target, step):
    found = find_steering_values(lambda values: [curve(v) for v in values], [target], step=step)[0]
    assert found.reached and abs(found.kl - target) <= .05*target and found.kl == curve(found.value) and found.value*step > 0


@pytest.mark.parametrize('curve', [lambda v: 0., lambda v: .2, lambda v: 3., lambda v: math.nan, lambda v: 0. if abs(v) < 2.1 else 9.])
def test_search_that_misses(curve):
    found = find_steering_values(lambda values: [curve(v) for v in values], [.5])[0]
    assert not found.reached and (found.kl == curve(found.value) or math.isnan(found.kl))


def test_search_starts_at_the_base():
    curve = lambda values: [(v-10)**2 for v in values]
    assert find_steering_values(curve, [.25], base=10.)[0].value == pytest.approx(10.5, abs=.02)


def test_targets_are_searched_together():
    passes = []
    curve = lambda values: passes.append(len(values)) or [v*v*(1 + .1*math.sin(9*v)) for v in values]
    found = find_steering_values(curve, [.1, .25, .5, 1.])
    assert all(f.reached for f in found) and len(passes) <= 5 and sorted(f.value for f in found) == [f.value for f in found]


# ---- loading

@pytest.fixture
def preset(tmp_path, lms, tokenizer):
    lms['llama'].save_pretrained(tmp_path/'model'); tokenizer.save_pretrained(tmp_path/'model')
    card = {'model_sha256': weights_sha256(tmp_path/'model')}
    sae = tiny_sae(tmp_path/'sae', model_name='tiny-llama', card=card)
    return load_preset('smollm2-135m', target=str(tmp_path/'model'), sae=str(sae), layer=2, dtype='float32', device='cpu', batch_tokens=99)


def test_load(preset, llama):
    loaded = Target.load(preset)
    assert (loaded.batch_size, loaded.max_tokens) == (preset.batch_size, 99) and Target.load(preset, loaded.reader).reader is loaded.reader
    np.testing.assert_allclose(loaded.max_acts(TEXTS, 3), llama.max_acts(TEXTS, 3), atol=1e-4)


def test_other_weights_are_refused(preset, tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path/'model')
    with pytest.raises(ValueError, match='this SAE belongs to weights with hash .* its activations would mean something else'):
        Target.load(preset)


def test_other_embedded_weights_are_refused(tmp_path, monkeypatch):
    (tmp_path/models.EMBEDDED).mkdir()
    tiny_model(seed=1).save_pretrained(tmp_path/models.EMBEDDED)
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path))
    reader = FeatureReader.load(tiny_sae(tmp_path/'sae', card={'model_sha256': models.EMBEDDED_SHA256}))
    with pytest.raises(ValueError, match=f"belongs to weights with hash {models.EMBEDDED_SHA256[:12]}, those of '{models.EMBEDDED}'"):
        T.check_weights(models.EMBEDDED, reader)


def test_saes_of_other_models_are_refused(preset, tmp_path, lms, tokenizer):
    other = lambda **kw: load_preset(preset, **kw)
    with pytest.raises(ValueError, match='the preset says layer 1, its SAE .* reads layer 2'): Target.load(other(layer=1))
    with pytest.raises(ValueError, match="this SAE is for the model 'tiny-llama', not for 'org/gemma-9b'"):
        Target.load(other(target='org/gemma-9b'))
    wide, deep = (FeatureReader.load(tiny_sae(tmp_path/n, **kw)) for n, kw in (('wide', dict(d_in=32)), ('deep', dict(layer=4))))
    with pytest.raises(ValueError, match='the SAE is 32 wide and the model 64: this SAE is for another model'):
        Target(lms['llama'], tokenizer, wide)
    with pytest.raises(ValueError, match='the SAE reads layer 4, the model has layers 0 to 3'): Target(lms['llama'], tokenizer, deep)


def test_names_that_go_together(tmp_path):
    reader = FeatureReader.load(tiny_sae(tmp_path/'sae', model_name='gemma-2-9b'))
    for name in ('google/gemma-2-9b', 'google/gemma-2-9b-it', 'org/Gemma-2-9B'): T.check_model_name(name, reader)


SAME = [('google/gemma-2-9b-it', 'gemma-2-9b'), ('openai-community/gpt2', 'gpt2-small'), ('gpt2', 'https://huggingface.co/gpt2'), ('meta-llama/Meta-Llama-3.1-8B', 'meta-llama/Llama-3.1-8B-Instruct'),
        ('mistralai/Mistral-7B-v0.1', 'mistral-7b'), ('mistralai/Mistral-7B-Instruct-v0.1', 'mistral-7b'), ('roneneldan/TinyStories-1Layer-21M', 'tiny-stories-1L-21M'), ('Qwen/Qwen3-8B-Base', 'qwen3-8b'),
        ('EleutherAI/pythia-70m-deduped', 'https://huggingface.co/EleutherAI/pythia-70m-deduped'), ('google/gemma-3-4b-pt', 'google/gemma-3-4b-it'), ('smollm2-135m-instruct', 'SmolLM2-135M'),
        ('Qwen/Qwen2.5-1.5B-Instruct', 'qwen2.5-1.5b'), ('Qwen/Qwen2-1.5B', 'Qwen2-1_5B'), ('me/Smol-LM2-135M', 'SmolLM2-135M'), ('roneneldan/TinyStories-33M', 'tiny-stories-33M'), ('me/gemma2-9b', 'gemma-2-9b')]
OTHERS = [('EleutherAI/pythia-70m', 'pythia-70m-deduped'), ('EleutherAI/pythia-70m-deduped', 'pythia-70m'), ('mistralai/Mistral-7B-v0.3', 'mistral-7b'), ('gpt2-medium', 'gpt2-small'), ('gpt2-medium', 'gpt2'),
          ('distilgpt2', 'gpt2'), ('google/gemma-2-2b', 'gemma-2-9b'), ('meta-llama/Llama-3.1-8B', 'meta-llama/Llama-3.2-8B'), ('me/it', 'gemma-2-9b'), ('EleutherAI/pythia-160m-seed1', 'pythia-160m'),
          ('roneneldan/TinyStories-Instruct-33M', 'tiny-stories-33M'), ('roneneldan/TinyStories-33M', 'tiny-stories-instruct-33M'), ('Qwen/Qwen2.5-15B', 'qwen2.5-1.5b'), ('facebook/opt-1.3b', 'opt-13b'),
          ('me/gemma-29b', 'gemma-2-9b'), ('meta-llama/Llama-3-18B', 'Llama-3.1-8B'), ('microsoft/phi-1.5', 'microsoft/phi-1'), ('google/codegemma-7b', 'google/gemma-7b'), ('google/gemma-2b', 'gemma-2-2b'),
          ('me/it', 'instruct'), ('me/model', 'it')]
UNSURE = [('unsloth/gemma-2-9b-bnb-4bit', 'gemma-2-9b'), ('me/gemma-2-9b-medicine', 'gemma-2-9b'), ('google/gemma-2-9b', 'me/gemma-2-9b-tuned')]


@pytest.mark.parametrize('kind, name, known', [(k, *pair) for k, pairs in dict(same=SAME, others=OTHERS, unsure=UNSURE).items() for pair in pairs])
def test_names_of_models(tmp_path, kind, name, known, capfd):
    reader = FeatureReader.load(tiny_sae(tmp_path, model_name=known))
    if kind == 'others':
        with pytest.raises(ValueError, match=f"this SAE is for the model '{known}', not for '{name}'.*`sae_model: {name}`"): T.check_model_name(name, reader)
    else: T.check_model_name(name, reader)
    assert ('its activations mean something only if their weights are the same' in capfd.readouterr().err) == (kind == 'unsure')


def test_presets_go_with_their_saes(capfd):
    "Nothing is refused or said of the models that the presets name"
    from types import SimpleNamespace as N
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    from saeexplainer.presets import presets
    releases, seen = get_pretrained_saes_directory(), 0
    for name in presets():
        p = load_preset(name)
        if (release := p.sae.split(':')[0]) not in releases: continue
        reader = N(sae=N(cfg=N(metadata=N(model_name=releases[release].model))))
        for model in (p.target, p.explainer): T.check_model_name(model, reader)
        seen += 1
    assert seen > 5 and capfd.readouterr().err == ''


# ---- values that are none

NO_CLAMPS = [math.nan, math.inf, -math.inf, 1e39, 10**400, 'x', '5', [1., math.nan, 2.], [1., None, 2.], True, 3 + 1j, np.ma.masked_array([1., 2., 3.], [0, 1, 0]), torch.tensor([1., math.inf, 2.])]

@pytest.mark.parametrize('value', NO_CLAMPS, ids=lambda v: str(v)[:20])
def test_clamps_that_are_no_numbers(llama, value):
    for steer in (lambda: llama.generate(PROMPTS, 3, value), lambda: steering(llama.model, llama.reader, [3]*3, value, torch.ones(3, 2))):
        with pytest.raises(ValueError, match='a feature is clamped to .*: a clamp is a number, and finite') as e: steer()
        assert '\n' not in str(e.value)


def test_one_or_as_many_as_prompts(llama):
    for features, values, says in (([1, 2], 3., '3 prompts and 2 features'), (1, [1., 2.], '3 prompts and 2 values'), ([], 1., '3 prompts and 0 features'), ([[1], [2], [3]], 1., '3 prompts and 3 features')):
        with pytest.raises(ValueError, match=f'{says}: one for all or one per prompt is needed'): llama.generate(PROMPTS, features, values)
    one = llama.generate(PROMPTS, 3, 2., max_new_tokens=4)
    assert one == llama.generate(PROMPTS, [3], torch.tensor([2.]), max_new_tokens=4) == llama.generate(PROMPTS, np.array([3, 3, 3]), (2, 2, 2), max_new_tokens=4)
    assert llama.generate([]) == llama.generate([], 3, 1.) == []


@pytest.mark.parametrize('settings, says', [
    (dict(max_new_tokens=math.nan), 'max_new_tokens is nan: it is a whole number above 0'), (dict(max_new_tokens='5'), "max_new_tokens is '5'"), (dict(max_new_tokens=0), 'max_new_tokens is 0'), (dict(max_new_tokens=2.5), 'max_new_tokens is 2.5'),
    (dict(temperature=math.nan), 'temperature is nan'), (dict(temperature='hot'), "temperature is 'hot'"), (dict(top_p='x'), "top_p is 'x': it must lie in"), (dict(seeds=[1.5, 2, 3]), 'a seed is 1.5: seeds are whole numbers'),
    (dict(reference='bogus'), "the reference is 'bogus': it is 'raw'")])
def test_settings_of_generation_that_mean_nothing(llama, settings, says):
    for how in ((), (3, 1.)):
        with pytest.raises(ValueError, match=says): llama.generate(PROMPTS, *how, **settings)


@pytest.mark.parametrize('features', [[1], [1, 2, 3], [], [[1], [2]]], ids=str)
def test_as_many_features_as_texts(llama, features):
    for read in (llama.scores, llama.max_acts, llama.activations):
        with pytest.raises(ValueError, match=f'2 texts and {len(features)} features: one feature per text is needed'): read(['a cat', 'a dog'], features)
        with pytest.raises(ValueError, match='None is no list of texts'): read(None, 3)


@pytest.mark.parametrize('kl', [math.nan, math.inf, -math.inf, 0, 0., '1', None, True])
def test_kls_that_cannot_be_reached(llama, kl):
    for search in (lambda: llama.steering_value(3, kl, PROMPTS), lambda: llama.steering_values(3, [.5, kl], PROMPTS), lambda: find_steering_values(lambda v: [.5]*len(v), [kl])):
        with pytest.raises(ValueError, match='the KL to reach is .*: it must be positive, or negative for a negative clamp'): search()


def test_a_search_for_nothing(llama):
    for tolerance in (math.nan, 0, -.1, math.inf, '5%'):
        with pytest.raises(ValueError, match='the tolerance of a KL is .*: it lies between 0 and 1'): llama.steering_value(3, .5, PROMPTS, tolerance=tolerance)
    with pytest.raises(ValueError, match='no prompts were given: a KL is measured on at least one'): llama.steering_value(3, .5, [])
    with pytest.raises(ValueError, match='2 features were given'): llama.steering_value([3, 4], .5, PROMPTS)
    with pytest.raises(ValueError, match="the reference is 'bogus'"): llama.steering_value(3, .5, PROMPTS, reference='bogus')
