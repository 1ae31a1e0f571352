"From candidates to pairs: Eq. 7-10 at their edges, and stages that go on where they were interrupted"
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import tiny_model, tiny_sae, tiny_tokenizer

from saeexplainer.explainer import Explainer
from saeexplainer.prefs import (
    Dropped, Pair, build_preferences, candidate_rewards, distinct_candidates, preference_prompt, sample_candidates,
    score_candidates, select_pair, threshold_of, write_texts,
)
from saeexplainer.presets import AS_PAPER, load_preset
from saeexplainer.replies import Reply
from saeexplainer.saes import FeatureReader
from saeexplainer.store import RunStore
from saeexplainer.target import Target
from saeexplainer.writers.local import LocalWriter
from saeexplainer.writers.parsing import text_schema

nan = math.nan


# ---- Eq. 8-10

def by_the_book(candidates, scores, threshold, spread, margin):
    "Eq. 8-10 once more, from index sets"
    ks = [k for k in range(len(scores)) if scores[k] == scores[k]]
    if not ks: return 'unscored'
    s_max, s_min = max(scores[k] for k in ks), min(scores[k] for k in ks)
    if s_max <= threshold: return 'below_threshold'
    if (s_max - s_min) / s_max <= spread: return 'low_spread'
    plus = [k for k in ks if scores[k] == s_max][0]
    others = [k for k in ks if candidates[k] != candidates[plus] and scores[k] < s_max]
    if not others: return 'low_spread'
    N = [k for k in others if (s_max - scores[k]) / s_max > margin]
    level = max(scores[k] for k in N) if N else min(scores[k] for k in others)
    return plus, [k for k in (N or others) if scores[k] == level][0]


def test_select_pair_agrees_with_eq_8_to_10_on_random_scores():
    rng, seen = random.Random(0), set()
    def score(): return rng.choice([nan, 0., 1., 8.5, 9., 10., round(rng.uniform(0, 12), 1)])
    for _ in range(3000):
        k = rng.randint(1, 7)
        texts = [rng.choice('abcdefgh') for _ in range(k)]
        shared = {t: score() for t in 'abcdefgh'}
        scores = [shared[t] for t in texts] if rng.random() < .5 else [score() for _ in texts]
        expected, got = by_the_book(texts, scores, 2., .1, .15), select_pair(texts, scores, 2.)
        if isinstance(expected, str):
            assert got == Dropped(expected)
            seen.add(expected)
        else:
            plus, minus = expected
            assert got == Pair(texts[plus], texts[minus], scores[plus], scores[minus])
            assert got.chosen != got.rejected
            assert got.chosen_score > got.rejected_score
            seen.add('pair')
    assert seen == {'pair', 'unscored', 'below_threshold', 'low_spread'}


@pytest.mark.parametrize('scores, expected', [
    ([10., 8.5, 2., 2.], ('a', 'c', 10., 2.)), # exactly 15% below is not clearly worse; of equals the first
    ([10., 8.4, 2., 0.], ('a', 'b', 10., 8.4)), # the best of the clearly worse
    ([10., 9., 8.9, 9.5], ('a', 'c', 10., 8.9)), # nothing clearly worse: the lowest of all
    ([nan, 3., nan, 9.], ('d', 'b', 9., 3.)), # unscored candidates are left out
    ([None, 3., 9., 9.], ('c', 'b', 9., 3.)), # None is unscored too; ties go to the first
    ([0., 0., 0., 5.], ('d', 'a', 5., 0.)),
])
def test_pairs_at_the_edges(scores, expected): assert select_pair('abcd', scores, threshold=1.) == Pair(*expected)


@pytest.mark.parametrize('texts, scores, threshold, reason', [
    ('abc', [5., 1., 0.], 5., 'below_threshold'), # equal to the threshold is not above it
    ('abc', [0., 0., 0.], 0., 'below_threshold'),
    ('abc', [0., 0., 0.], -1., 'low_spread'), # no division by zero
    ('abc', [10., 9.5, 9.], 5., 'low_spread'), # exactly 10%
    ('aaa', [10., 10., 10.], 5., 'low_spread'), # one text, K times
    ('aab', [10., 1., 10.], 5., 'low_spread'), # the only other text is as good
    ('abc', [nan, 10., nan], 5., 'low_spread'), # one scored candidate has no spread
    ('abc', [nan, 1., nan], 5., 'below_threshold'), # and the threshold comes first
    ('abc', [nan, None, nan], 5., 'unscored'),
    ('', [], 5., 'unscored'),
])
def test_reasons_at_the_edges(texts, scores, threshold, reason):
    assert select_pair(texts, scores, threshold) == Dropped(reason)


def test_a_copy_of_the_chosen_text_is_never_rejected():
    assert select_pair(['a', 'a', 'b', 'c'], [10., 5., 9.5, 4.], threshold=1.) == Pair('a', 'c', 10., 4.)


def test_arrays_are_as_good_as_lists():
    assert select_pair(np.array(['a', 'b']), np.array([4, 1], dtype=np.float32), threshold=1) == Pair('a', 'b', 4., 1.)


@pytest.mark.parametrize('scores, expected', [
    ([10., 8., 7., 2., 1., 0.], ('a', 'd', 10., 2.)), # clearly worse are all; the best of the last three
    ([10., 8., 7., 2., 1.], ('a', 'd', 10., 2.)), # of five the last two
    ([10., 9.9, 9.8, 9.7, 9.6, 8.9], ('a', 'f', 10., 8.9)), # none is clearly worse: the worst
    ([nan, 10., 2., None, 1., nan], ('b', 'e', 10., 1.)), # of three the last
    ([5., 5., 5., 5., 5., 1.], ('a', 'f', 5., 1.)),
    ([0., 1., 2., 7., 8., 10.], ('f', 'c', 10., 2.)),
])
def test_the_rejected_one_is_of_the_lower_half(scores, expected):
    texts = 'abcdef'[:len(scores)]
    assert select_pair(texts, scores, threshold=1., negative='lower half') == Pair(*expected)


def test_a_lower_half_of_one_candidate_is_empty():
    assert select_pair('ab', [nan, 5.], 1., spread=0., negative='lower half') == Dropped('low_spread')


def test_copies_of_the_chosen_text_are_not_rejected_in_the_lower_half():
    assert select_pair('abaa', [10., 9., 1., 0.], 1., negative='lower half') == Dropped('low_spread')


@pytest.mark.parametrize('negative', ['hard', 'lower half', 'worst'])
def test_with_two_candidates_all_rules_are_one(negative):
    assert select_pair('ab', [1., 9.], 1., negative=negative) == Pair('b', 'a', 9., 1.)


def test_the_lower_half_agrees_with_hard_where_all_clearly_worse_are_in_it():
    rng = random.Random(1)
    for _ in range(500):
        scores = [rng.choice([0., 1., 5., 9., 10.]) for _ in range(6)]
        lower = select_pair('abcdef', scores, 1., negative='lower half')
        if isinstance(lower, Dropped): continue
        ranked = sorted(scores, reverse=True)
        assert lower.rejected_score in ranked[3:]
        assert lower.chosen_score == ranked[0]


@pytest.mark.parametrize('inclusive, found', [(False, Dropped('below_threshold')), (True, Pair('a', 'c', 5., 0.))])
def test_a_score_at_the_threshold(inclusive, found):
    "Published code keeps such a feature; the paper's equation does not"
    assert select_pair('abc', [5., 4.9, 0.], 5., margin=.99, inclusive=inclusive) == found


def test_inclusive_or_not_nothing_active_makes_no_pair():
    assert select_pair('abc', [0., 0., 0.], 0., inclusive=True) == Dropped('low_spread')


def test_as_many_scores_as_candidates():
    with pytest.raises(ValueError, match='3 candidates came with 2 scores: one score each'):
        select_pair('abc', [1., 2.], 1.)


# ---- prompts, replies, threshold

def test_prompts_take_any_explanation():
    for text in ('braces {n} {explanation}', 'a "quoted" word', '50% of $x$'):
        assert text in preference_prompt(text)
        assert text in preference_prompt(text, 4)


def test_prompts_for_several_texts_ask_for_json():
    assert '4 strings' in preference_prompt('x', 4)
    assert 'JSON' not in preference_prompt('x')


def test_threshold():
    features = [SimpleNamespace(max_act=a) for a in (4., 8., 12., 0., None)]
    assert threshold_of(load_preset('gemma-2-9b-l20'), features) == 10.
    assert threshold_of(load_preset('smollm2-135m', reward='max'), features) == 2.
    mean = load_preset('smollm2-135m', reward='mean', n_texts=4)
    assert threshold_of(mean, features) == .5 # one text at the threshold is enough
    with pytest.raises(ValueError, match="threshold 'auto' needs SFT features with a max_act above 0"):
        threshold_of(load_preset('smollm2-135m'), [SimpleNamespace(max_act=0.)])


# ---- stages

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp('prefs')
    model = folder/'model'
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    preset = load_preset(
        'smollm2-135m', **AS_PAPER, target=str(model), explainer=str(model),
        sae=str(tiny_sae(folder/'sae')), layer=2,
        n_candidates=3, n_texts=2, explanation_tokens=4, text_tokens=6, batch_size=4, device='cpu', dtype='float32')
    reader = FeatureReader.load(preset.sae)
    return preset, reader, Explainer.from_preset(preset, reader), Target(tiny_model(seed=3), tiny_tokenizer(), reader)


@pytest.fixture
def store(tmp_path):
    with RunStore(tmp_path/'store.sqlite') as s: yield s


class Scripted:
    "A writer that answers from a function of the request, and may break down after some calls"
    def __init__(self, answer, calls=10**9, size=64):
        self.answer = answer
        self.calls = calls
        self.size = size
        self.requests = []

    def stream(self, requests, schema=None, total=None, **_):
        requests = list(requests)
        for i in range(0, len(requests), self.size): yield from self.write(requests[i:i+self.size], schema)

    def write(self, requests, schema=None, **_):
        if len(self.requests) >= self.calls: raise ConnectionError('the writer is gone')
        self.requests.append((requests, schema))
        return [reply if isinstance(reply := self.answer(r), Reply) else Reply(reply) for r in requests]


def everything(store, world, features, writer, nth=1):
    "All stages of the n-th round; its pairs"
    preset, reader, explainer, target = world
    sample_candidates(store, explainer, reader, features, preset, nth)
    write_texts(store, writer, preset, nth)
    score_candidates(store, target, preset, nth)
    return build_preferences(store, preset, nth, threshold=.01)


def test_the_whole_way_with_the_local_writer(world, store):
    preset, reader, explainer, target = world
    writer = LocalWriter(target.model, target.tokenizer)
    pairs = everything(store, world, [3, 5, 8, 11], writer)
    assert pairs['feature'].tolist() == [3, 5, 8, 11]
    assert (pairs['dropped'].isna() == pairs['chosen'].notna()).all()
    texts = store.texts('round1', 'preference')
    assert len(texts) == len(distinct_candidates(store, 1)) * preset.n_texts
    row = texts[texts['text'].notna()].iloc[0]
    again = target.max_acts([row['text']], [row['feature']])[0] # Eq. 7, read once more
    assert row['score'] == pytest.approx(again, abs=1e-5)
    assert everything(store, world, [3, 5, 8, 11], writer).equals(pairs)


def test_a_second_run_asks_nothing_and_seeds_differ(world, store):
    preset, reader, explainer, target = world
    writer = Scripted(lambda r: 'rain in ' + r.prompt[-5:])
    everything(store, world, [1, 2], writer)
    requests = [r for batch, _ in writer.requests for r in batch]
    assert len({r.seed for r in requests}) == len(requests)
    again = Scripted(lambda r: 'x')
    assert write_texts(store, again, preset) == 0
    assert not again.requests
    assert score_candidates(store, target, preset) == 0
    everything(store, world, [1, 2], again, nth=2)
    seeds = {r.seed for batch, _ in again.requests for r in batch}
    assert not seeds & {r.seed for r in requests} # round 2 asks other questions


def test_interrupted_anywhere_it_ends_the_same(world, tmp_path):
    preset, reader, explainer, target = world
    features = [1, 2, 4, 7, 9]
    def answer(request): return f'rain and sea {request.seed % 97}'
    with RunStore(tmp_path/'whole.sqlite') as whole:
        expected = everything(whole, world, features, Scripted(answer))
        reference = whole.explanations(), whole.texts()
    with RunStore(tmp_path/'broken.sqlite') as store:
        sample_candidates(store, explainer, reader, features[:2], preset) # stopped after some features
        sample_candidates(store, explainer, reader, features, preset)
        with pytest.raises(ConnectionError): # stopped after two batches
            write_texts(store, Scripted(answer, calls=2, size=5), preset)
        assert 0 < len(store.texts()) < len(reference[1])
        score_candidates(store, target, preset) # some scores, out of order
        write_texts(store, Scripted(answer), preset)
        score_candidates(store, target, preset)
        assert build_preferences(store, preset, threshold=.01).equals(expected)
        assert store.explanations().equals(reference[0])
        pd.testing.assert_frame_equal(store.texts(), reference[1], rtol=1e-4)


def put(store, texts, stage='round1'):
    store.put_explanations([(stage, f, k, t) for f, row in texts.items() for k, t in enumerate(row)])


def test_copies_share_texts_and_rewards_and_blank_candidates_get_none(world, store):
    preset, _, _, target = world
    put(store, {1: ['rain', 'sea', 'rain'], 2: ['', '  ', 'rain']})
    assert distinct_candidates(store, 1).values.tolist() == [[1, 0, 'rain'], [1, 1, 'sea'], [2, 2, 'rain']]
    writer = Scripted(lambda r: 'it rains')
    assert write_texts(store, writer, preset) == 3*preset.n_texts
    score_candidates(store, target, preset)
    rewards = candidate_rewards(store, preset)
    assert rewards['reward'].isna().tolist() == [False, False, False, True, True, False]
    assert rewards['reward'][0] == rewards['reward'][2]
    assert build_preferences(store, preset, threshold=0.)['dropped'].tolist() == ['low_spread']*2


@pytest.mark.parametrize('reward, expected', [('max', [3., 2.]), ('mean', [1.5, 2.])])
def test_reward_is_the_maximum_or_the_mean_over_the_texts(store, reward, expected):
    put(store, {1: ['rain', 'sea']})
    scores = ((0, 0, 0.), (0, 1, 3.), (1, 0, 2.), (1, 1, None))
    store.put_texts([('round1', 1, k, 'preference', j, 't', None, s) for k, j, s in scores])
    preset = load_preset('smollm2-135m', reward=reward)
    assert candidate_rewards(store, preset)['reward'].tolist() == expected


def test_json_writer_one_request_per_candidate(world, store):
    preset, _, _, target = world
    preset = load_preset(preset, writer='some-model')
    put(store, {1: ['rain', 'sea', 'fog']})
    rainy = json.dumps(dict(samples=['it rains', 'rainy days']))
    replies = {'rain': rainy, 'sea': 'Sorry.', 'fog': '{"samples": ["in the fog"]}'}
    writer = Scripted(lambda r: next(v for k, v in replies.items() if f'\n{k}\n' in r.prompt))
    assert write_texts(store, writer, preset) == 6
    assert len(writer.requests) == 1
    assert writer.requests[0][1] == text_schema({'samples': 2})
    texts = store.texts('round1', 'preference')
    assert texts['text'].tolist() == ['it rains', 'rainy days', None, None, 'in the fog', None]
    assert texts['error'].tolist() == [None, None, *['not JSON']*2, None, '1 of 2 texts in the reply']
    score_candidates(store, target, preset)
    assert candidate_rewards(store, preset)['reward'].isna().tolist() == [False, True, False]
    assert write_texts(store, writer, preset) == 0 # a text that could not be parsed is not asked again


def test_an_error_of_the_writer_is_recorded_as_one(world, store):
    preset, _, _, target = world
    put(store, {1: ['rain', 'sea', 'fog']})
    write_texts(store, Scripted(lambda r: Reply(error='empty') if 'sea' in r.prompt else 'it rains'), preset)
    texts = store.texts('round1', 'preference')
    assert texts['error'].tolist() == [None, None, 'empty', 'empty', None, None]
    assert texts['text'].isna().sum() == 2
    score_candidates(store, target, preset)
    assert candidate_rewards(store, preset)['reward'].isna().tolist() == [False, True, False]


def test_pairs_are_not_built_too_early(world, store):
    preset, _, _, target = world
    put(store, {1: ['rain', 'sea', 'fog']})
    with pytest.raises(ValueError, match='round 1: 6 of 6 texts are not written yet: write_texts comes first'):
        build_preferences(store, preset, threshold=1.)
    write_texts(store, Scripted(lambda r: 'it rains'), preset)
    with pytest.raises(ValueError, match='round 1: 6 texts have no score yet: score_candidates comes first'):
        build_preferences(store, preset, threshold=1.)
    assert not len(store.pairs())


def test_a_feature_that_does_not_exist_is_refused(world, store):
    preset, reader, explainer, _ = world
    with pytest.raises(ValueError, match='there is no feature 9999'):
        sample_candidates(store, explainer, reader, [9999], preset)


def test_an_overlong_text_is_recorded_and_the_round_ends(world, store):
    "A writer that ignores max_tokens: its text has an error, the others have scores, a run stuck on it goes on"
    preset, _, _, target = world
    put(store, {1: ['rain', 'sea', 'fog']})
    def answer(request):
        if 'sea' in request.prompt and request.seed % 2: return 'it rains ' + 'and rains '*600
        return f'it rains {request.seed % 7}'
    write_texts(store, Scripted(answer), preset)
    store.put_texts([('round1', 2, 0, 'preference', 0, 'it rains '*600, None, None),
                     ('round1', 2, 0, 'preference', 1, 'it rains', None, None)])
    score_candidates(store, target, preset)
    texts = store.texts('round1')
    long = texts['text'].str.len() > 2000
    assert long.sum() >= 1
    assert (texts['error'][long] == 'too long').all()
    assert texts['score'][long].isna().all()
    assert texts['score'][~long].notna().all()
    assert texts['error'][~long].isna().all()
    assert not len(store.unscored('round1'))
    assert score_candidates(store, target, preset) == 0
    lost = long[texts.feature == 1].groupby(texts.k).all()
    assert candidate_rewards(store, preset)['reward'].notna().sum() == 3 - sum(lost)


def test_what_float16_cannot_hold_ends_the_stage_and_nothing_is_stored(world, store):
    preset, reader, _, _ = world
    model = tiny_model()
    model.model.embed_tokens.weight.data.mul_(1e6)
    put(store, {1: ['rain', 'sea', 'fog']})
    write_texts(store, Scripted(lambda r: 'it rains'), preset)
    target = Target(model.half(), tiny_tokenizer(), reader)
    with pytest.raises(ValueError, match='is not finite in float16: use dtype bfloat16'):
        score_candidates(store, target, preset)
    assert len(store.unscored('round1')) == 6
    assert store.texts('round1')['error'].isna().all()
