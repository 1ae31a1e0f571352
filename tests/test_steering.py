"Steering: generation on five tiny architectures, the search for a clamp, and what bad input is told"
import math
import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, tiny_model, tiny_tokenizer
from saeexplainer import steering as steering_module
from saeexplainer.lm.hooks import residual_hook
from saeexplainer.lm.sampling import pad, sample
from saeexplainer.steering import find_steering_values, steered_kls, steering
from saeexplainer.target import Target, tokenise
from target_worlds import PROMPTS, lively, reader_at

PLACES = [('resid_post', 2), ('resid_pre', 2), ('resid_post', 3)]


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


@pytest.fixture(scope='module')
def feature(llama): return lively(llama)[0]


def batch_of(prompts, tokenizer):
    "Prompts of one batch, padded on the left"
    return pad([prompt.ids for prompt in tokenise(tokenizer, prompts)], 0, left=True)


# ---- generation

def the_long_way(target, features, values, mask):
    "A hook that decodes the encoding with features changed, plus its error, at all tokens but padding"
    sae = target.reader.sae
    def change(resid):
        acts = sae.encode(resid)
        error = resid - sae.decode(acts)
        acts = acts.clone()
        for row, feature, value in zip(acts, features, values): row[:, feature] = value
        new = sae.decode(acts) + error
        is_prompt = len(mask[0]) == resid.shape[1]
        return torch.where(mask[..., None].bool(), new, resid) if is_prompt else new
    return residual_hook(target.model, target.reader.layer, target.reader.hook, change)


@pytest.mark.parametrize('arch', ARCHITECTURES)
@pytest.mark.parametrize('place', PLACES)
def test_steered_generation_equals_the_long_way(lms, tokenizer, readers, arch, place):
    target = Target(lms[arch], tokenizer, readers[place])
    features = lively(target, n=3)
    values = [20., -20., 0.]
    how = dict(max_new_tokens=12, seeds=[1, 2, 3])
    steered = target.generate(PROMPTS, features, values, **how)
    batch = batch_of(PROMPTS, tokenizer)
    assert 0 in batch['attention_mask'] # prompts differ in length
    with the_long_way(target, features, values, batch['attention_mask']):
        wanted = sample(target.model, tokenizer, **batch, temperature=.75, **how)
    assert steered == wanted
    assert steered != target.generate(PROMPTS, **how)


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_steered_logits_with_and_without_cache(lms, tokenizer, readers, arch):
    target = Target(lms[arch], tokenizer, readers['resid_post', 2])
    model = target.model
    batch = batch_of(PROMPTS, tokenizer)
    clamps = (target.reader, lively(target, n=3), [15., 15., 15.])
    greedy = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    with steering(model, *clamps, batch['attention_mask']):
        cached = model.generate(**batch, **greedy, output_logits=True, return_dict_in_generate=True)
    mask = torch.cat([batch['attention_mask'], torch.ones(3, 6, dtype=torch.long)], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), steering(model, *clamps, mask):
        again = dict(attention_mask=mask, position_ids=positions, use_cache=False)
        logits = model(cached.sequences, **again).logits
    for step in range(6):
        difference = cached.logits[step] - logits[:, step-7]
        assert difference.abs().max() < 2e-4


def count_hooks(model):
    hooks = [(layer._forward_hooks, layer._forward_pre_hooks) for layer in model.model.layers]
    return [len(behind) + len(before) for behind, before in hooks]


def test_a_row_is_its_own(llama):
    features = lively(llama, n=3)
    seeds = [5, 6, 7]
    together = llama.generate(PROMPTS, features, [9., 9., 9.], seeds=seeds, max_new_tokens=8)
    for text, prompt, feature, seed in zip(together, PROMPTS, features, seeds):
        assert llama.generate([prompt], feature, 9., seeds=[seed], max_new_tokens=8) == [text]
    small = Target(llama.model, llama.tokenizer, llama.reader, batch_size=2)
    assert small.generate(PROMPTS, features, 9., seeds=seeds, max_new_tokens=8) == together


def test_generation_leaves_no_hook(llama, feature):
    before = count_hooks(llama.model) # transformers leaves some of its own
    llama.generate(PROMPTS, feature, 9., max_new_tokens=2)
    assert count_hooks(llama.model) == before


def test_greedy_generation_needs_no_seeds(llama):
    first = llama.generate(PROMPTS, temperature=0, seeds=[1, 2, 3], max_new_tokens=5)
    assert llama.generate(PROMPTS, temperature=0, seeds=[4, 5, 6], max_new_tokens=5) == first


def test_default_seeds_are_the_same_each_time(llama):
    assert llama.generate(PROMPTS, max_new_tokens=5) == llama.generate(PROMPTS, max_new_tokens=5)


def test_one_feature_and_value_for_all_prompts(llama):
    one = llama.generate(PROMPTS, 3, 2., max_new_tokens=4)
    in_lists = llama.generate(PROMPTS, [3], torch.tensor([2.]), max_new_tokens=4)
    assert in_lists == one
    one_each = llama.generate(PROMPTS, np.array([3, 3, 3]), (2, 2, 2), max_new_tokens=4)
    assert one_each == one


def test_no_prompts(llama):
    assert llama.generate([]) == []
    assert llama.generate([], seeds=[]) == []
    assert llama.generate([], 3, 1.) == []


# ---- what cannot be generated

@pytest.mark.parametrize('clamp', [dict(feature=1), dict(value=1.)], ids=str)
def test_steering_needs_a_feature_and_a_value(llama, clamp):
    with pytest.raises(ValueError, match='steering needs both a feature and a value'):
        llama.generate(PROMPTS, **clamp)


def test_as_many_seeds_as_prompts(llama):
    with pytest.raises(ValueError, match='3 prompts and 1 seeds'):
        llama.generate(PROMPTS, seeds=[1])


@pytest.mark.parametrize('features, values, says', [
    ([1, 2], 3., '3 prompts and 2 features'),
    (1, [1., 2.], '3 prompts and 2 values'),
    ([], 1., '3 prompts and 0 features'),
    ([[1], [2], [3]], 1., '3 prompts and 3 features'),
])
def test_one_or_as_many_as_prompts(llama, features, values, says):
    with pytest.raises(ValueError, match=f'{says}: one for all or one per prompt is needed'):
        llama.generate(PROMPTS, features, values)


def test_a_feature_that_the_sae_does_not_have(llama):
    with pytest.raises(ValueError, match='there is no feature 900'):
        llama.generate(PROMPTS, 900, 1.)


def test_an_empty_prompt_needs_bos(llama):
    without = tiny_tokenizer()
    without.bos_token = None
    with pytest.raises(ValueError, match='a prompt is empty and this model has no BOS token'):
        Target(llama.model, without, llama.reader).generate([''])


CONTEXT = 64 # tokens that the model reads
TOO_LONG = 'the cat sat on the mat and '*20


LIMITS = dict(llama='max_position_embeddings', gpt2='n_positions')


@pytest.fixture(scope='module', params=LIMITS)
def narrow(request, tokenizer, readers):
    "A target with a short context"
    arch = request.param
    model = tiny_model(arch, **{LIMITS[arch]: CONTEXT})
    return Target(model, tokenizer, readers['resid_post', 2])


def test_prompts_that_are_too_long(narrow):
    with pytest.raises(ValueError, match=r'prompt 1 has \d+ tokens and 25 are to follow, the model reads 64'):
        narrow.generate(['We', TOO_LONG])
    with pytest.raises(ValueError, match=r'prompt 0 has \d+ tokens, the model reads 64'):
        narrow.steering_value(3, .1, [TOO_LONG])


def test_a_continuation_may_fill_the_context(narrow, tokenizer):
    left = CONTEXT - 1 - len(tokenizer('We')['input_ids']) # of BOS and the prompt
    assert len(narrow.generate(['We'], max_new_tokens=left, temperature=0)) == 1
    with pytest.raises(ValueError, match='prompt 0 has'):
        narrow.generate(['We'], max_new_tokens=CONTEXT)


@pytest.mark.parametrize('clamp', [(), (3, 1.)], ids=['plain', 'steered'])
@pytest.mark.parametrize('settings, says', [
    (dict(max_new_tokens=math.nan), 'max_new_tokens is nan: it is a whole number above 0'),
    (dict(max_new_tokens='5'), "max_new_tokens is '5'"),
    (dict(max_new_tokens=0), 'max_new_tokens is 0'),
    (dict(max_new_tokens=2.5), 'max_new_tokens is 2.5'),
    (dict(temperature=math.nan), 'temperature is nan'),
    (dict(temperature='hot'), "temperature is 'hot'"),
    (dict(top_p='x'), "top_p is 'x': it must lie in"),
    (dict(seeds=[1.5, 2, 3]), 'a seed is 1.5: seeds are whole numbers'),
    (dict(reference='bogus'), "the reference is 'bogus': it is 'raw'"),
])
def test_settings_of_generation_that_mean_nothing(llama, settings, says, clamp):
    with pytest.raises(ValueError, match=says): llama.generate(PROMPTS, *clamp, **settings)


NO_CLAMPS = [
    math.nan,
    math.inf,
    -math.inf,
    1e39,
    10**400,
    'x',
    '5',
    [1., math.nan, 2.],
    [1., None, 2.],
    True,
    3 + 1j,
    np.ma.masked_array([1., 2., 3.], [0, 1, 0]),
    torch.tensor([1., math.inf, 2.]),
]


@pytest.mark.parametrize('value', NO_CLAMPS, ids=lambda value: str(value)[:20])
def test_clamps_that_are_no_numbers(llama, value):
    says = 'a feature is clamped to .*: a clamp is a number, and finite'
    with pytest.raises(ValueError, match=says) as raised: llama.generate(PROMPTS, 3, value)
    assert '\n' not in str(raised.value)
    with pytest.raises(ValueError, match=says) as raised:
        steering(llama.model, llama.reader, [3]*3, value, torch.ones(3, 2))
    assert '\n' not in str(raised.value)


# ---- the search for a clamp

def rewritten(target, reference, feature=None, value=None):
    "A function of the residual stream: encode, change a feature, decode; with the SAE's error for 'raw'"
    sae = target.reader.sae
    def edit(resid):
        acts = sae.encode(resid)
        error = 0 if reference == 'sae' else resid - sae.decode(acts)
        acts = sae.encode(resid).clone() # a second encode: sae-lens drops the rows' scale when it decodes
        if feature is not None: acts[..., feature] = value
        return sae.decode(acts) + error
    return edit


def log_probs(target, edit):
    "Log-probabilities of next tokens of each prompt alone, without padding and without those behind BOS"
    found = []
    for row in tokenise(target.tokenizer, PROMPTS):
        place = (target.reader.layer, target.reader.hook)
        with torch.no_grad(), residual_hook(target.model, *place, edit):
            logits = target.model(**pad([row.ids], 0)).logits
        found.append(logits[0, 1:].log_softmax(-1))
    return found


def mean_kl(clean, steered): # of log-probabilities, over tokens
    kls = (clean.exp()*(clean - steered)).sum(-1)
    return kls.mean().item()


def slow_kl(target, reference):
    "A function: of a feature and a value, the KL from the reference as a mean over prompts"
    clean = log_probs(target, rewritten(target, reference))
    def kl(feature, value):
        steered = log_probs(target, rewritten(target, reference, feature, value))
        kls = [mean_kl(*of_prompt) for of_prompt in zip(clean, steered)]
        return sum(kls)/len(kls)
    return kl


@pytest.mark.parametrize('arch', ('llama', 'gemma2', 'gpt2'))
@pytest.mark.parametrize('reference', ('raw', 'sae'))
def test_steering_values_have_the_kl_they_say(lms, tokenizer, readers, arch, reference):
    target = Target(lms[arch], tokenizer, readers['resid_post', 2])
    measure = slow_kl(target, reference)
    kls = [.1, .2, -.1, -.2]
    for feature in lively(target, n=2):
        for kl, found in zip(kls, target.steering_values(feature, kls, PROMPTS, reference=reference)):
            assert found.reached
            assert abs(found.kl - abs(kl)) <= .05*abs(kl)
            assert (found.value < 0) == (kl < 0)
            assert measure(feature, found.value) == pytest.approx(found.kl, rel=.01, abs=1e-4)
            alone = target.steering_value(feature, kl, PROMPTS, reference=reference)
            assert alone.reached
            assert alone.value == pytest.approx(found.value, rel=.06)


def test_the_kl_depends_on_the_reference(llama, feature):
    raw = slow_kl(llama, 'raw')(feature, 5.)
    reconstructed = slow_kl(llama, 'sae')(feature, 5.)
    assert raw != pytest.approx(reconstructed, rel=.01)


def test_texts_depend_on_the_reference(llama, feature):
    "Without steering, 'sae' is the model on the reconstruction"
    how = dict(temperature=0, max_new_tokens=8)
    ways = [(clamp, reference) for clamp in ((), (feature, 9.)) for reference in ('raw', 'sae')]
    texts = [llama.generate(PROMPTS, *clamp, reference=reference, **how) for clamp, reference in ways]
    assert len(set(map(tuple, texts))) == 4
    [first] = tokenise(llama.tokenizer, PROMPTS[:1])
    with residual_hook(llama.model, 2, 'resid_post', llama.reader.reconstruct):
        reconstructed = sample(llama.model, llama.tokenizer, **pad([first.ids], 0), **how)
    assert reconstructed == texts[1][:1]


@pytest.fixture
def passes(llama):
    "One entry for each forward pass of the model"
    ran = []
    handle = llama.model.register_forward_pre_hook(lambda *_: ran.append(1))
    yield ran
    handle.remove()


def test_several_clamps_and_targets_share_forward_passes(llama, feature, passes):
    llama.search._kept.clear()
    llama.steering_values(feature, [.1, .2, -.1, -.2], PROMPTS)
    assert len(passes) <= 9
    passes.clear()
    llama.steering_values(feature, [.1], PROMPTS)
    assert len(passes) <= 4


def test_logits_in_blocks_are_the_same(llama, feature, monkeypatch):
    clean = llama.search.clean_run(PROMPTS, 'raw')
    values = [-5., 1., 3., 8.]
    whole = steered_kls(llama.model, llama.reader, clean, feature, values)
    monkeypatch.setattr(steering_module, 'LOGITS_AT_ONCE', 1)
    in_blocks = steered_kls(llama.model, llama.reader, clean, feature, values)
    assert in_blocks == pytest.approx(whole, rel=1e-3, abs=1e-6)


def test_steering_that_cannot_reach_its_kl_says_so(llama, feature):
    found = llama.steering_value(feature, 50., PROMPTS)
    assert not found.reached
    assert 0 < found.kl < 50


def test_dead_feature_cannot_steer(lms, tokenizer, tmp_path):
    target = Target(lms['llama'], tokenizer, reader_at(tmp_path))
    target.reader.sae.W_dec.data[9] = 0
    with pytest.raises(ValueError, match=r'is zero \(a dead feature\)'):
        target.steering_value(9, .1, PROMPTS)


# ---- the search alone, on curves

CURVES = [
    (lambda v: v*v, .25),
    (lambda v: v*v, 1e-3),
    (lambda v: 1e-6*v*v, .5),
    (lambda v: 1e4*v*v, .5),
    (lambda v: abs(v), .25),
    (lambda v: min(v**4, 9.), .25),
    (lambda v: math.nan if abs(v) > .6 else v*v, .25),
    (lambda v: math.inf if abs(v) > .6 else v*v, .25),
    (lambda v: .01 if abs(v) < 3 else (abs(v)-3)**2, .25),
]


def each(curve):
    "A function of several values"
    return lambda values: [curve(v) for v in values]


@pytest.mark.parametrize('curve, target', CURVES)
@pytest.mark.parametrize('step', (1., -1.))
def test_search(curve, target, step):
    [found] = find_steering_values(each(curve), [target], step=step)
    assert found.reached
    assert abs(found.kl - target) <= .05*target
    assert found.kl == curve(found.value)
    assert found.value*step > 0


MISSES = [
    lambda v: 0.,
    lambda v: .2,
    lambda v: 3.,
    lambda v: math.nan,
    lambda v: 0. if abs(v) < 2.1 else 9.,
]


@pytest.mark.parametrize('curve', MISSES)
def test_search_that_misses(curve):
    [found] = find_steering_values(each(curve), [.5])
    assert not found.reached
    assert found.kl == curve(found.value) or math.isnan(found.kl)


def test_search_starts_at_the_base():
    [found] = find_steering_values(each(lambda v: (v-10)**2), [.25], base=10.)
    assert found.value == pytest.approx(10.5, abs=.02)


def test_targets_are_searched_together():
    passes = []
    def wavy(values):
        passes.append(len(values))
        return [v*v*(1 + .1*math.sin(9*v)) for v in values]
    found = find_steering_values(wavy, [.1, .25, .5, 1.])
    assert all(value.reached for value in found)
    assert len(passes) <= 5
    assert sorted(value.value for value in found) == [value.value for value in found]


# ---- searches that mean nothing

@pytest.mark.parametrize('kl', [math.nan, math.inf, -math.inf, 0, 0., '1', None, True])
def test_kls_that_cannot_be_reached(llama, kl):
    says = 'the KL to reach is .*: it must be positive, or negative for a negative clamp'
    with pytest.raises(ValueError, match=says): llama.steering_value(3, kl, PROMPTS)
    with pytest.raises(ValueError, match=says): llama.steering_values(3, [.5, kl], PROMPTS)
    with pytest.raises(ValueError, match=says): find_steering_values(each(lambda v: .5), [kl])


def test_a_kl_of_nothing_is_said(llama):
    with pytest.raises(ValueError, match='the KL to reach is 0'):
        llama.steering_value(1, 0., PROMPTS)


@pytest.mark.parametrize('tolerance', [math.nan, 0, -.1, math.inf, '5%'])
def test_tolerances_that_are_none(llama, tolerance):
    with pytest.raises(ValueError, match='the tolerance of a KL is .*: it lies between 0 and 1'):
        llama.steering_value(3, .5, PROMPTS, tolerance=tolerance)


@pytest.mark.parametrize('feature, prompts, more, says', [
    (512, PROMPTS, {}, 'there is no feature 512'),
    ([3, 4], PROMPTS, {}, '2 features were given'),
    (3, [], {}, 'no prompts were given: a KL is measured on at least one'),
    (3, PROMPTS, dict(reference='bogus'), "the reference is 'bogus'"),
])
def test_a_search_for_nothing(llama, feature, prompts, more, says):
    with pytest.raises(ValueError, match=says):
        llama.steering_value(feature, .5, prompts, **more)
