"saeexplainer.target: early exit and reading on five tiny architectures, and what bad input is told"
import copy
import math
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ARCHITECTURES, tiny_model, tiny_sae, tiny_tokenizer
from saeexplainer import target as target_module
from saeexplainer.lm.hooks import backbone, residual_hook, residual_stream
from saeexplainer.lm.sampling import pad
from saeexplainer.saes import FeatureReader
from saeexplainer.target import Target, distinct_texts, tokenise
from target_worlds import LONG, PROMPTS, TEXTS, lively, reader_at

SENTENCE = 'The cat sat on the mat and the dog lay by the fire.'
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
DEVICES = ['cpu', pytest.param('cuda', marks=NO_GPU)]


@pytest.fixture(scope='module')
def tokenizer(): return tiny_tokenizer()


@pytest.fixture(scope='module')
def lms(): return {arch: tiny_model(arch) for arch in ARCHITECTURES}


@pytest.fixture(scope='module')
def readers(tmp_path_factory):
    "An SAE for each place"
    return {place: reader_at(tmp_path_factory.mktemp('sae'), *place) for place in PLACES}


@pytest.fixture(scope='module')
def llama(lms, tokenizer, readers): return Target(lms['llama'], tokenizer, readers['resid_post', 2])


def encoded(target, ids):
    "All activations on the tokens of a text"
    place = dict(layer=target.reader.layer, hook=target.reader.hook)
    ids = torch.tensor([ids])
    stream = residual_stream(target.model, ids, torch.ones_like(ids), **place)
    return target.reader.encode(stream)[0]


def assert_close(found, wanted): np.testing.assert_allclose(found, wanted, atol=1e-4)


# ---- early exit

def hidden_states(model, ids):
    "What the model says of its own residual stream: before each layer, and behind the final norm"
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_early_exit_equals_hidden_states(lms, tokenizer, arch):
    model = lms[arch]
    ids = tokenizer(SENTENCE, return_tensors='pt').input_ids
    mask = torch.ones_like(ids)
    states = hidden_states(model, ids)
    for layer in range(4):
        assert torch.equal(residual_stream(model, ids, mask, layer, 'resid_pre'), states[layer])
    for layer in range(3):
        assert torch.equal(residual_stream(model, ids, mask, layer, 'resid_post'), states[layer+1])


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_last_layer_is_read_before_the_final_norm(lms, tokenizer, arch):
    model = lms[arch]
    ids = tokenizer('The cat sat on the mat.', return_tensors='pt').input_ids
    last = hidden_states(model, ids)[-1]
    stream = residual_stream(model, ids, torch.ones_like(ids), 3)
    body = backbone(model)
    norm = body.norm if hasattr(body, 'norm') else body.ln_f
    assert not torch.allclose(stream, last, atol=1e-3)
    assert torch.allclose(norm(stream), last, atol=1e-5)


PLACES = [(hook, layer) for layer in (0, 2, 3) for hook in ('resid_pre', 'resid_post')]


def largest(values): return values.abs().max().item()


def full_forward(model, row, hook, layer):
    "The residual stream of a row alone, from a forward pass of all layers and the head"
    seen = []
    with torch.no_grad(), residual_hook(model, layer, hook, seen.append):
        model(torch.tensor([row]))
    return seen[0][0]


@pytest.mark.parametrize('arch', ARCHITECTURES)
@pytest.mark.parametrize('left', (True, False))
@pytest.mark.parametrize('place', PLACES)
def test_padding_on_either_side(lms, tokenizer, arch, left, place, largest_error):
    "Every row of a padded batch, by early exit, against the full forward of that row alone"
    hook, layer = place
    rows = [text.ids for text in tokenise(tokenizer, [text for text in TEXTS if text])]
    batch = pad(rows, 0, left=left)
    together = residual_stream(lms[arch], **batch, layer=layer, hook=hook)
    for row, stream, mask in zip(rows, together, batch['attention_mask']):
        alone = full_forward(lms[arch], row, hook, layer)
        difference = stream[mask.bool()] - alone
        error = largest(difference)/max(1., largest(alone))
        assert largest_error('early exit in a padded batch, against the full forward', error) < 2e-5


@pytest.fixture
def ids(tokenizer): return tokenizer('The cat', return_tensors='pt').input_ids


@pytest.mark.parametrize('hook, wanted', [('resid_post', [0, 1]), ('resid_pre', [0])])
def test_later_layers_are_not_run(ids, hook, wanted):
    model = tiny_model()
    ran = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    residual_stream(model, ids, torch.ones_like(ids), 1, hook)
    assert ran == wanted


def test_no_hook_stays(ids):
    model = tiny_model()
    for hook in ('resid_post', 'resid_pre'):
        residual_stream(model, ids, torch.ones_like(ids), 1, hook)
    assert not any(layer._forward_hooks for layer in model.model.layers)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


def test_an_error_in_a_hook_is_not_swallowed_and_leaves_no_hook(ids):
    model = tiny_model()
    def fail(resid): raise RuntimeError('mine')
    with pytest.raises(RuntimeError, match='mine'):
        with residual_hook(model, 1, 'resid_post', fail): model(ids)
    assert not model.model.layers[1]._forward_hooks


# ---- tokens

@pytest.mark.parametrize('text', ['The cat', ' two  spaces ', 'naïve 中文 🙂!', 'a\n\nb', ''])
def test_tokens_are_the_text(tokenizer, text):
    [tokens] = tokenise(tokenizer, [text])
    assert ''.join(tokens.strings) == text
    assert tokens.ids[0] == tokenizer.bos_token_id
    assert not tokens.counts[0]
    assert tokens.counts[1:].all()


def test_tokens_without_bos_all_count(tokenizer):
    assert tokenise(tokenizer, ['a'], bos=False)[0].counts.all()
    assert tokenise(tokenizer, []) == []


def test_bos_is_fed_once_even_if_the_tokenizer_adds_it():
    plain = tiny_tokenizer()
    adds = tiny_tokenizer(add_bos=True)
    assert adds('The cat')['input_ids'][0] == 1
    assert plain('The cat')['input_ids'][0] != 1
    [found] = tokenise(adds, ['The cat'])
    [wanted] = tokenise(plain, ['The cat'])
    assert found.ids == wanted.ids


# ---- activations

def stream_of(target, text):
    "The residual stream that an SAE reads, as the model itself gives it; only behind the last layer by early exit"
    tokens = target.tokenizer(text, add_special_tokens=False)['input_ids']
    ids = torch.tensor([[1, *tokens]])
    after = target.reader.hook == 'resid_post'
    layer = target.reader.layer
    if after and layer == 3: return residual_stream(target.model, ids, torch.ones_like(ids), 3)
    return hidden_states(target.model, ids)[layer + after]


@pytest.mark.parametrize('arch', ARCHITECTURES)
@pytest.mark.parametrize('place', [p for p in PLACES if p != ('resid_pre', 3)])
def test_activations_equal_sae_lens(lms, tokenizer, readers, arch, place, largest_error):
    target = Target(lms[arch], tokenizer, readers[place])
    for feature in lively(target):
        readings = target.activations(TEXTS, feature)
        for text, reading in zip(TEXTS, readings):
            acts = target.reader.sae.encode(stream_of(target, text))
            full = acts[0, 1:, feature].numpy()
            difference = np.abs(reading.values - full).max(initial=0)
            error = difference/max(1., full.max(initial=0))
            assert largest_error('early exit + one column', error) <= 1e-4
            assert ''.join(reading.tokens) == text
            assert reading.values.dtype == np.float32
        assert max(reading.max for reading in readings if len(reading.tokens)) > 0


def test_batch_and_order_do_not_matter(lms, tokenizer, readers):
    parts = (lms['gemma3'], tokenizer, readers['resid_post', 2])
    many = Target(*parts, batch_size=64)
    features = lively(many, n=5)
    wanted = many.max_acts(TEXTS, features)
    one_by_one = Target(*parts, batch_size=1)
    tight = Target(*parts, max_tokens=20)
    assert_close(one_by_one.max_acts(TEXTS, features), wanted)
    assert_close(tight.max_acts(TEXTS, features), wanted)
    backwards = many.max_acts(TEXTS[::-1], features[::-1])
    assert_close(backwards[::-1], wanted)
    readings = many.activations(TEXTS, features)
    assert_close([reading.max for reading in readings], wanted)


REPEATED = ['The cat sat.', 'A', 'The cat sat.', 'The cat sat.', '', 'A']


def test_distinct_texts_know_who_asks_for_them(llama):
    features = [*lively(llama), 3, 5]
    asked = distinct_texts(tokenise(llama.tokenizer, REPEATED), features)
    times = [sum(map(len, features.values())) for features in asked]
    assert times == [3, 2]


@pytest.mark.parametrize('at_once', [None, 1], ids=['features together', 'one feature at a time'])
def test_texts_are_run_once(llama, monkeypatch, at_once):
    features = [*lively(llama), 3, 5]
    wanted = [llama.max_acts([text], feature)[0] for text, feature in zip(REPEATED, features)]
    rows = []
    def counted(model, input_ids, *args, **kwargs):
        rows.append(len(input_ids))
        return residual_stream(model, input_ids, *args, **kwargs)
    monkeypatch.setattr(target_module, 'residual_stream', counted)
    if at_once: monkeypatch.setattr(target_module, 'FEATURES_AT_ONCE', at_once)
    assert_close(llama.max_acts(REPEATED, features), wanted)
    assert sum(rows) == 2


def test_all_features_of_a_text(llama, monkeypatch):
    monkeypatch.setattr(target_module, 'FEATURES_AT_ONCE', 1)
    readings = llama.activations(['The cat sat.']*512, range(512))
    [tokens] = tokenise(llama.tokenizer, ['The cat sat.'])
    wanted = encoded(llama, tokens.ids)[1:].numpy()
    assert_close(np.stack([reading.values for reading in readings], 1), wanted)


@pytest.mark.parametrize('arch', ARCHITECTURES)
@pytest.mark.parametrize('hook', ('resid_post', 'resid_pre'))
@pytest.mark.parametrize('device', DEVICES)
def test_half_precision_model_read_in_fp32(tokenizer, readers, arch, hook, device, largest_error):
    "The same bf16 residual stream, encoded in fp32"
    model = tiny_model(arch).to(device, torch.bfloat16)
    reader = FeatureReader(copy.deepcopy(readers[hook, 2].sae).to(device))
    [text] = tokenise(tokenizer, TEXTS[:1])
    states = hidden_states(model, torch.tensor([text.ids], device=device))
    stream = states[2 + (hook == 'resid_post')]
    assert stream.dtype == torch.bfloat16
    full = reader.sae.encode(stream.float())[0, 1:].cpu()
    assert (full > 0).any()
    target = Target(model, tokenizer, reader)
    readings = target.activations(TEXTS[:1]*512, range(512))
    found = torch.tensor(np.stack([reading.values for reading in readings], 1))
    error = largest(found - full)/max(1., largest(full))
    assert largest_error('reading a bf16 model', error) <= 1e-4


# ---- tokens that do not count

def test_empty_and_special_only_texts(llama):
    acts = llama.max_acts(['', 'The cat', '<|im_end|>'], 3)
    assert acts.dtype == np.float32
    assert np.isnan(acts[[0, 2]]).all()
    assert np.isfinite(acts[1])
    [empty] = llama.activations([''], 3)
    assert empty.tokens == []
    assert math.isnan(empty.max)


def test_no_texts(llama):
    assert llama.max_acts([], 3).shape == (0,)
    assert llama.activations([], []) == []
    assert llama.scores([], 3) == []


def test_bos_and_special_tokens_never_count(lms, tokenizer, tmp_path):
    "With a feature that BOS would win everywhere if it counted"
    target = Target(lms['llama'], tokenizer, reader_at(tmp_path))
    [on_bos] = encoded(target, [1])
    feature = int(on_bos.argmax())
    assert on_bos[feature] > 0
    assert len(target.activations(['A'], feature)[0].tokens) == 1
    target.reader.sae.W_enc.data[:, feature] *= 1e3
    text = 'The cat<|im_end|> sat'
    [tokens] = tokenise(tokenizer, [text])
    acts = encoded(target, tokens.ids)[:, feature]
    [reading] = target.activations([text], feature)
    assert ''.join(reading.tokens) == 'The cat sat'
    assert len(reading.values) == len(tokens.ids) - 2
    counted = [i for i, token in enumerate(tokens.ids) if token not in (1, 4)]
    np.testing.assert_allclose(reading.values, acts[counted].numpy(), rtol=1e-4, atol=1e-3)


def test_saes_trained_without_bos(lms, tokenizer, tmp_path):
    reader = reader_at(tmp_path, metadata={'prepend_bos': False})
    target = Target(lms['llama'], tokenizer, reader)
    assert not target.bos
    assert len(target.activations(['A'], 1)[0].tokens) == 1


@pytest.mark.parametrize('bos, warned', [(True, True), (False, False), (None, False)])
def test_an_sae_with_bos_and_a_tokenizer_without(lms, tmp_path, capfd, bos, warned):
    without = tiny_tokenizer()
    without.bos_token = None
    Target(lms['llama'], without, reader_at(tmp_path, metadata={'prepend_bos': bos}))
    assert ('this tokenizer has no such token' in capfd.readouterr().err) == warned


# ---- texts that cannot be read

TOO_LONG = 'the cat sat on the mat and '*100


def test_a_text_that_is_too_long(llama):
    with pytest.raises(ValueError, match=r'text 1 has \d+ tokens, the model reads 512: split it'):
        llama.max_acts(['a', 'z y '*600], 1)


@pytest.mark.parametrize('arch', ('llama', 'gpt2'))
def test_a_text_that_cannot_be_read_is_its_own_error(lms, tokenizer, readers, arch):
    "The others are scored"
    target = Target(lms[arch], tokenizer, readers['resid_post', 2])
    texts = ['The cat', TOO_LONG, '', 'park', '<|im_end|>']
    first, last = target.max_acts(['The cat', 'park'], 3).tolist()
    wanted = [pytest.approx(first), 'too long', 'empty', pytest.approx(last), 'empty']
    assert target.scores(texts, 3) == wanted
    column = pd.Series(texts, index=range(5, 10))
    assert target.scores(column, [3]*5) == wanted
    assert target.scores(texts[1:3], 3) == ['too long', 'empty']


@pytest.mark.parametrize('arch', ('llama', 'gpt2'))
def test_a_text_may_fill_the_context(lms, tokenizer, readers, arch):
    target = Target(lms[arch], tokenizer, readers['resid_post', 2])
    [letter] = tokenizer('a')['input_ids']
    fits = tokenizer.decode([letter]*511)
    [tokens] = tokenise(tokenizer, [fits])
    assert len(tokens.ids) == 512 # with BOS
    [score] = target.scores([fits], 3)
    assert isinstance(score, float)
    assert target.scores([fits + 'a'], 3) == ['too long']


def larger_tokenizer():
    "A tokenizer with a token that the tiny models do not know, and that token"
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(['<extra>'], special_tokens=True)
    while len(tokenizer) <= 512:
        tokenizer.add_tokens([f'<extra{len(tokenizer)}>'])
    [unknown] = [token for token, i in tokenizer.get_added_vocab().items() if i == 512]
    return tokenizer, unknown


@pytest.mark.parametrize('arch', ('llama', 'gpt2'))
def test_a_token_beyond_the_vocabulary_is_its_own_error(lms, tokenizer, readers, arch):
    reader = readers['resid_post', 2]
    [alone] = Target(lms[arch], tokenizer, reader).max_acts(['The cat'], 3)
    larger, unknown = larger_tokenizer()
    target = Target(lms[arch], larger, reader)
    scores = target.scores([f'The cat {unknown}', 'The cat'], 3)
    assert scores == ['unknown token', pytest.approx(float(alone))]
    with pytest.raises(ValueError, match='text 0 has token 512, the model knows 512'):
        target.max_acts([f'The cat {unknown}'], 3)


@pytest.mark.parametrize('dtype, scale, cure', [
    ('float16', 1e6, 'in float16: use dtype bfloat16'),
    ('float32', math.inf, 'in float32: are its weights damaged'),
])
@pytest.mark.parametrize('architecture', ('standard', 'jumprelu', 'topk'))
def test_a_stream_that_is_not_finite_is_an_error(tokenizer, tmp_path, dtype, scale, cure, architecture):
    "Not a text without tokens (NaN), and not a feature that is silent (0, as TopK would have it)"
    model = tiny_model()
    model.model.embed_tokens.weight.data.mul_(scale)
    reader = FeatureReader.load(tiny_sae(tmp_path, architecture))
    target = Target(model.to(getattr(torch, dtype)), tokenizer, reader)
    for read in (target.max_acts, target.scores, target.activations):
        with pytest.raises(ValueError, match=f'residual stream of .* at layer 2 is not finite {cure}'):
            read(['The cat', ''], 3)
    with pytest.raises(ValueError, match='is not finite'): target.steering_value(3, .1, PROMPTS)


def test_a_damaged_sae_is_an_error(lms, tokenizer, tmp_path):
    target = Target(lms['llama'], tokenizer, reader_at(tmp_path))
    target.reader.sae.W_enc.data[:, 7] = math.nan
    says = "feature 7 is not finite where the residual stream is: are the SAE's weights damaged"
    with pytest.raises(ValueError, match=says): target.max_acts(['The cat'], 7)
    assert np.isfinite(target.max_acts(['The cat'], 8)).all()


# ---- texts and features in any form

@pytest.fixture(scope='module')
def table():
    "Three of the texts, each with a feature"
    whole = pd.DataFrame(dict(text=TEXTS, feature=range(1, 6)))
    return whole.iloc[[0, 2, 4]]


FORMS = {
    'columns': lambda table: (table.text, table.feature),
    'arrays': lambda table: (table.text.to_numpy(), table.feature.to_numpy()),
    'tuple and tensor': lambda table: (tuple(table.text), torch.tensor(table.feature.tolist())),
    'iterator and tuple': lambda table: (iter(table.text), tuple(table.feature.tolist())),
}


@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
def test_texts_and_features_of_pandas_and_numpy(llama, table, form):
    wanted = llama.max_acts([TEXTS[0], 'A', LONG], [1, 3, 5])
    np.testing.assert_array_equal(llama.max_acts(*form(table)), wanted)


def test_readings_of_a_column_are_those_of_a_list(llama, table):
    of_column = llama.activations(table.text, 3)
    of_list = llama.activations(list(table.text), 3)
    assert [reading.tokens for reading in of_column] == [reading.tokens for reading in of_list]


NO_TEXTS = [
    'The cat',
    b'The cat',
    ['The cat', None],
    ['a', math.nan],
    [5],
    [['a', 'b']],
    ['half \ud83d emoji'],
]


@pytest.mark.parametrize('texts', NO_TEXTS, ids=str)
def test_what_is_no_list_of_texts_is_refused(llama, texts):
    says = 'one text .* was given for a list of texts|is no text but|has half a character'
    for read in (llama.max_acts, llama.activations, llama.scores):
        with pytest.raises(ValueError, match=says): read(texts, 5)
    with pytest.raises(ValueError, match=says): llama.generate(texts)
    with pytest.raises(ValueError, match=says): llama.steering_value(5, .1, texts)


NO_FEATURES = [
    1.7,
    '5',
    np.zeros(512, bool),
    [True, False],
    [1., 2.],
    None,
    [[1, 2], [3, 4]],
]


@pytest.mark.parametrize('features', NO_FEATURES, ids=str)
def test_what_is_no_feature_is_refused(llama, features):
    for read in (llama.max_acts, llama.activations, llama.scores):
        with pytest.raises(ValueError): read(['The cat', 'A'], features)


def test_a_feature_that_the_sae_does_not_have(llama):
    with pytest.raises(ValueError, match='there is no feature 512: this SAE has features 0 to 511'):
        llama.max_acts(['a'], 512)


@pytest.mark.parametrize('features', [[1], [1, 2, 3], [], [[1], [2]]], ids=str)
def test_as_many_features_as_texts(llama, features):
    says = f'2 texts and {len(features)} features: one feature per text is needed'
    for read in (llama.scores, llama.max_acts, llama.activations):
        with pytest.raises(ValueError, match=says): read(['a cat', 'a dog'], features)


def test_none_is_no_list_of_texts(llama):
    for read in (llama.scores, llama.max_acts, llama.activations):
        with pytest.raises(ValueError, match='None is no list of texts'): read(None, 3)


def test_progress(llama, capfd):
    llama.max_acts(TEXTS, 1)
    assert 'text' not in capfd.readouterr().err
    llama.max_acts(TEXTS, 1, progress=True)
    assert '4/4' in capfd.readouterr().err
