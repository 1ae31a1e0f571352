"The activation on an explanation's own words: hand-computed scores, lists that do not win, rounds of it that go on"
import math
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import tiny_tokenizer
from judged import context, feature, tiny_target

from saeexplainer.prefs import (
    add_lookups, build_preferences, candidate_rewards, choose_pairs, harmonic_mean, score_both_sides,
    score_named_words, score_own_words, split_verdicts, threshold_of,
)
from saeexplainer.presets import load_preset
from saeexplainer.reranking import Candidate, Ranked, distinct_texts, draw_candidates, rank_candidates
from saeexplainer.self_activation import (
    contrast, counted_quotes, own_words, piece_contrasts, pieces_of, rivals_of, self_score,
)
from saeexplainer.store import RunStore

nan = math.nan
LONG = 'rain '*600
ALL = dict.fromkeys(range(40), 2.) # strongest activations of the tiny target's features


@pytest.fixture(scope='module')
def target(tmp_path_factory): return tiny_target(tmp_path_factory.mktemp('sae'))


@pytest.fixture
def store(tmp_path):
    with RunStore(tmp_path/'store.sqlite') as store: yield store


# ---- what is read

@pytest.mark.parametrize('explanation, counted', [
    ("the word 'rain'", ['rain']),
    ("'rain', 'snow', 'hail', 'fog'", ['rain', 'snow', 'hail']),
    ("'rain snow hail fog'", ['rain snow hail']),
    ("'in the', 'middle of', 'it'", ['in the', 'middle']),
    ("'rain', 'rain', 'snow'", ['rain', 'snow']),
    ("'rain', 'rain snow', 'rain snow hail'", ['rain', 'rain snow']),
    ("'  ', 'rain'", ['rain']),
    ('words about rain', []),
    ('', []),
])
def test_three_quoted_words_count(explanation, counted):
    assert counted_quotes(explanation) == counted


def test_the_explanation_comes_first_then_quotes_as_in_running_text():
    assert pieces_of("the word 'rain'") == ["the word 'rain'", ' rain']


# ---- the score

@pytest.mark.parametrize('contrasts, score', [
    ([.8, .4], .6),
    ([.8, .4, 0.], .5),
    ([.8], .4),
    ([.8, nan], .4), # a quote that cannot be read does nothing
    ([-.1, -.1], -.1),
])
def test_text_and_quotes_are_halves(contrasts, score):
    assert self_score(contrasts) == pytest.approx(score)


@pytest.mark.parametrize('contrasts', [[], [nan], [nan, .5]])
def test_an_explanation_that_cannot_be_read_has_no_score(contrasts):
    assert math.isnan(self_score(contrasts))


def test_the_contrast_is_to_the_mean_of_the_others():
    assert contrast(.9, np.array([.1, .3])) == pytest.approx(.7)
    assert contrast(.9, np.array([])) == .9


def hand_computed(target, piece, feature, rivals):
    "The contrast of a piece, feature by feature"
    def share(index): return min(1., max(0., float(target.max_acts([piece], index)[0]))/ALL[index])
    others = [share(rival) for rival in rivals if rival != feature]
    return share(feature) - sum(others)/len(others)


@pytest.mark.parametrize('index', [3, 8, 21])
def test_the_score_of_a_tiny_model_is_the_one_by_hand(target, index):
    text = "words such as 'rain', 'sea' and 'cat'"
    rivals = [5, 8, 13]
    [own] = own_words(target, [(index, text)], ALL, rivals)
    by_hand = [hand_computed(target, piece, index, rivals) for piece in (text, ' rain', ' sea', ' cat')]
    assert own.contrasts == pytest.approx(by_hand, abs=1e-5)
    assert own.score == pytest.approx((by_hand[0] + sum(by_hand[1:])/3)/2, abs=1e-5)


def test_a_share_is_at_most_one(target):
    weak = ALL | {3: 1e-6}
    found = piece_contrasts(target, [(3, ' rain')], weak, [])
    assert found[0] in (0, 1)


def test_what_is_scored_beside_it_changes_nothing(target):
    asked = [(index, f"the word '{word}'") for index in (3, 8, 21) for word in ('rain', 'sea', 'mat', 'park')]
    together = own_words(target, asked, ALL, [5, 8, 13])
    alone = [own_words(target, [one], ALL, [5, 8, 13])[0] for one in asked]
    assert [one.score for one in together] == pytest.approx([one.score for one in alone], abs=1e-5)


@pytest.mark.parametrize('index, text', [
    (3, ''),
    (3, ' \n'),
    (3, LONG),
    (99, "the word 'rain'"),
    (7, "the word 'sea'"),
])
def test_what_is_not_known_has_no_score(target, index, text):
    known = {index: strongest for index, strongest in ALL.items() if index != 7} # 99 is no feature of this target
    assert math.isnan(own_words(target, [(index, text)], known, [5])[0].score)


def test_nothing_asked_is_nothing_read(target):
    assert own_words(target, [], ALL, [5]) == []


def test_a_rival_whose_strongest_is_not_known_is_left_out(target):
    with_it = piece_contrasts(target, [(3, ' rain')], {3: 2., 5: 2., 8: nan}, [5, 8])
    without = piece_contrasts(target, [(3, ' rain')], {3: 2., 5: 2.}, [5])
    assert with_it.tolist() == without.tolist()


def test_a_tokenizer_without_bos(tmp_path):
    tokenizer = tiny_tokenizer(bos=None)
    plain = tiny_target(tmp_path, 'gpt2', tokenizer=tokenizer, metadata={'prepend_bos': False})
    assert not math.isnan(own_words(plain, [(3, "the word 'rain'")], ALL, [5])[0].score)


def test_thousands_of_candidates_take_few_passes(target, monkeypatch):
    passes = []
    batcher = target.text_reader.batcher
    read = batcher.residual_stream
    monkeypatch.setattr(batcher, 'residual_stream', lambda tokens: passes.append(len(tokens)) or read(tokens))
    words = ('rain', 'sea', 'mat', 'park', 'cat')
    asked = [(index, f"the word '{word}'") for index in range(40) for word in words]*10
    assert len(own_words(target, asked, ALL, [5, 8])) == 2000
    assert sum(passes) == 2*len(words) # each distinct piece once, for all features that ask
    assert len(passes) == 1


# ---- rivals

def test_rivals_depend_on_the_seed_alone():
    assert rivals_of([5, 3, 8], n=2) == rivals_of([8, 5, 3], n=2)
    assert sorted(rivals_of([5, 3, 8])) == [3, 5, 8]
    assert rivals_of(range(1000), 1) != rivals_of(range(1000), 2)
    assert rivals_of([]) == []


# ---- as a reward

class WordTarget:
    "A target whose features fire fully on texts with a word of theirs, and that counts what it reads"
    def __init__(self, words, passes=10**9):
        self.words = words # feature -> word
        self.passes = passes
        self.read = []

    def lists(self, batcher, texts, features, progress=False): # stands for `max_act_lists`
        self.passes -= 1
        if self.passes < 0: raise KeyboardInterrupt
        self.read += texts
        def activation(index, text): return 2.*(self.words.get(index, '-') in text)
        return [np.array([activation(index, text) for index in row]) for text, row in zip(texts, features)]


def reading(monkeypatch, words, **fields):
    target = WordTarget(words, **fields)
    target.text_reader = SimpleNamespace(batcher=None)
    monkeypatch.setattr('saeexplainer.self_activation.max_act_lists', target.lists)
    return target


WORDS = {1: 'rain', 2: 'sea', 3: 'cat', 4: 'mat', 5: 'park'}
KNOWN = dict.fromkeys(WORDS, 2.)
SELF = dict(reward='self', threshold='auto', n_texts=4)


def own_preset(**fields): return load_preset('smollm2-135m', **SELF | fields)


def put(store, texts, stage='round1'):
    store.put_explanations([(stage, index, k, text) for index, row in texts.items() for k, text in enumerate(row)])


def test_lists_of_triggers_do_not_win(store, monkeypatch):
    target = reading(monkeypatch, WORDS)
    triggers = "'sea', 'cat', 'mat', 'park', 'rain'"
    put(store, {1: [f'words such as {triggers}', 'sea cat mat park rain', "the word 'rain'", 'words'],
                2: ["the word 'sea'", f'words such as {triggers}', "'sea cat mat park rain'", 'sea cat mat park rain']})
    preset = own_preset()
    score_own_words(store, target, preset, KNOWN, list(WORDS))
    pairs = build_preferences(store, preset)
    assert pairs['chosen'].tolist() == ["the word 'rain'", "the word 'sea'"]


def test_rewards_by_hand(store, monkeypatch):
    put(store, {1: ["the word 'rain'", "the words 'rain' and 'sea'", 'words', ' ']})
    score_own_words(store, reading(monkeypatch, WORDS), own_preset(), KNOWN, [1, 2, 3])
    rewards = candidate_rewards(store, own_preset())['reward']
    # the first: 1 on both; the second: the text also sets off one of two rivals, and so does its quote of "sea"
    assert rewards[:3].tolist() == pytest.approx([1., (.5 + (1. - .5)/2)/2, 0.])
    assert math.isnan(rewards[3])


def test_no_text_is_written_and_nothing_is_read_twice(store, monkeypatch):
    put(store, {1: ["the word 'rain'", "the word 'rain'", "the word 'sea'"]})
    target = reading(monkeypatch, WORDS)
    assert score_own_words(store, target, own_preset(), KNOWN, [2, 3]) == 2
    assert len(target.read) == len(set(target.read))
    assert score_own_words(store, target, own_preset(), KNOWN, [2, 3]) == 0
    assert not len(store.texts(kind='preference'))
    assert store.texts('round1', 'self')['text'].tolist() == ["the word 'rain'", ' rain', "the word 'sea'", ' sea']


def test_interrupted_it_ends_the_same(tmp_path, monkeypatch):
    candidates = {index: [f"the word '{word}'" for word in WORDS.values()] for index in WORDS}
    preset = own_preset(batch_size=1) # eight candidates at a time
    with RunStore(tmp_path/'whole.sqlite') as whole, RunStore(tmp_path/'broken.sqlite') as broken:
        for store in (whole, broken): put(store, candidates)
        score_own_words(whole, reading(monkeypatch, WORDS), preset, KNOWN, [1, 2])
        first = reading(monkeypatch, WORDS, passes=2)
        with pytest.raises(KeyboardInterrupt): score_own_words(broken, first, preset, KNOWN, [1, 2])
        assert len(broken.texts()) == 2*16 # two pieces of each candidate of two batches
        with pytest.raises(ValueError, match='round 1: 9 candidates have no score yet: score_own_words comes first'):
            build_preferences(broken, preset)
        assert score_own_words(broken, reading(monkeypatch, WORDS), preset, KNOWN, [1, 2]) == 9
        assert broken.texts().equals(whole.texts())
        assert build_preferences(broken, preset).equals(build_preferences(whole, preset))


def test_what_cannot_be_scored_is_recorded(store, target):
    put(store, {1: ["the word 'rain'", LONG], 2: ["the word 'sea'"]})
    score_own_words(store, target, own_preset(), {1: 2.}, [])
    rows = store.texts('round1', 'self')
    assert rows[rows.score.isna()]['error'].tolist() == ['not known']*3
    assert choose_pairs(store, own_preset())['dropped'].tolist()[1] == 'unscored'


def test_a_round_without_candidates_has_no_rewards(store):
    assert not len(candidate_rewards(store, own_preset()))
    assert not len(candidate_rewards(store, own_preset(reward='both')))


@pytest.mark.parametrize('reward, threshold', [('self', .25), ('both', .0625), ('self_both', .25), ('words', .25)])
def test_the_threshold_is_a_share(reward, threshold):
    strong = [SimpleNamespace(max_act=800.)]
    assert threshold_of(own_preset(reward=reward), strong) == threshold
    assert threshold_of(own_preset(reward=reward), []) == threshold
    assert threshold_of(own_preset(reward=reward, threshold=.4), strong) == .4


def test_halves_of_texts_say_nothing_of_it(store):
    with pytest.raises(ValueError, match="the reward 'self' is not made of texts alone"):
        split_verdicts(store.texts(), own_preset().pair_rule)


# ---- both sides

def rainy(index, max_act=4.): # four contexts, of which three peak on "rain"
    words = ('rain', 'rain', 'rain', 'sea')
    return feature(index, max_act=max_act, contexts=[context(f'the {word} fell', 1, 4.) for word in words])


def put_scores(store, scores, index=1): # candidate -> scores of its texts
    put(store, {index: [f"the word '{word}'" for word in scores]})
    rows = [('round1', index, k, 'preference', j, 'a text', None, score)
            for k, of_candidate in enumerate(scores.values()) for j, score in enumerate(of_candidate)]
    store.put_texts(rows)


BOTH = dict(reward='both', n_texts=2)


def test_both_sides_by_hand(store):
    put_scores(store, {'rain': [4., 0.], 'sea': [8., 8.], 'cat': [4., 4.]})
    preset = own_preset(**BOTH)
    assert score_both_sides(store, preset, {1: rainy(1)}) == 3
    assert score_both_sides(store, preset, {1: rainy(1)}) == 0
    assert store.texts('round1', 'both')['score'].tolist() == [.5, .75, 1., .25, 1., 0.]
    assert candidate_rewards(store, preset)['reward'].tolist() == pytest.approx([.6, .4, 0.])
    assert build_preferences(store, preset)['chosen'].tolist() == ["the word 'rain'"]


def test_both_sides_of_own_words_by_hand(store, monkeypatch):
    preset = own_preset(reward='self_both')
    put(store, {1: ["the word 'rain'", "the word 'sea'", "'rain' or 'snow'"]})
    with pytest.raises(ValueError, match='round 1: 3 candidates have no score yet: score_own_words comes first'):
        score_both_sides(store, preset, {1: rainy(1)})
    score_own_words(store, reading(monkeypatch, WORDS), preset, KNOWN, [2])
    own = candidate_rewards(store, own_preset())['reward'].tolist()
    with pytest.raises(ValueError, match="3 candidates have no score by 'self_both' yet"):
        build_preferences(store, preset)
    assert score_both_sides(store, preset, {1: rainy(1)}) == 3
    named = store.texts('round1', 'self_both').query('j == 1')['score'].tolist()
    expected = [harmonic_mean([max(0, activation), share]) for activation, share in zip(own, named)]
    assert candidate_rewards(store, preset)['reward'].tolist() == pytest.approx(expected)
    assert expected[0] > expected[1] == 0


def test_a_text_that_was_not_scored_does_not_count(store):
    put_scores(store, {'rain': [4., 2.]})
    store.put_explanations([('round1', 1, 1, "the word 'sea'")])
    store.put_texts([('round1', 1, 1, 'preference', j, None, 'empty', None) for j in range(2)])
    score_both_sides(store, own_preset(**BOTH), {1: rainy(1)})
    rewards = candidate_rewards(store, own_preset(**BOTH))['reward']
    assert rewards[0] == pytest.approx(.75)
    assert math.isnan(rewards[1])


@pytest.mark.parametrize('fields', [dict(max_act=None), dict(max_act=0.), dict(contexts=[])])
def test_a_side_that_is_not_known_leaves_no_reward(store, fields):
    put_scores(store, {'rain': [4., 0.]})
    score_both_sides(store, own_preset(**BOTH), {1: feature(1, **fields)})
    assert choose_pairs(store, own_preset(**BOTH))['dropped'].tolist() == ['unscored']


def test_both_sides_need_all_scores(store):
    put_scores(store, {'rain': [4.]})
    with pytest.raises(ValueError, match='round 1: 1 of 2 texts are not written yet'):
        score_both_sides(store, own_preset(**BOTH), {1: rainy(1)})
    store.put_texts([('round1', 1, 0, 'preference', 1, 'a text', None, None)])
    with pytest.raises(ValueError, match='round 1: 1 texts have no score yet'):
        score_both_sides(store, own_preset(**BOTH), {1: rainy(1)})
    store.put_scores([('round1', 1, 0, 'preference', 1, 3.)])
    with pytest.raises(ValueError, match="round 1: 1 candidates have no score by 'both' yet"):
        build_preferences(store, own_preset(**BOTH))


@pytest.mark.parametrize('reward, expected', [('max', [4., 8.]), ('mean', [2., 7.])])
def test_the_papers_rewards_look_at_written_texts_alone(store, monkeypatch, reward, expected):
    put_scores(store, {'rain': [4., 0.], 'sea': [8., 6.]})
    score_both_sides(store, own_preset(**BOTH), {1: rainy(1)})
    score_own_words(store, reading(monkeypatch, WORDS), own_preset(), KNOWN, [2])
    preset = load_preset('smollm2-135m', reward=reward, n_texts=2)
    assert candidate_rewards(store, preset)['reward'].tolist() == expected
    assert len(build_preferences(store, preset, threshold=1.)) == 1


@pytest.mark.parametrize('shares, mean', [([.5, .5], .5), ([1., .5], 2/3), ([0., 1.], 0.)])
def test_the_harmonic_mean(shares, mean):
    assert harmonic_mean(shares) == pytest.approx(mean)


@pytest.mark.parametrize('shares', [[], [nan, .5], [.5, nan]])
def test_the_harmonic_mean_of_what_is_not_known(shares):
    assert math.isnan(harmonic_mean(shares))


# ---- lookups as candidates

@pytest.fixture
def proposing(monkeypatch):
    "Lookups that say what a table says; calls are counted"
    calls = []
    tokens = ["the word 'sea'", "the word 'rain'", '', "the word 'sea'", 'fog']
    said = {'nearest token': tokens, 'nearest label': ['wet']}
    def phrases(name, preset, target, features, labels, progress):
        calls.append((name, list(features)))
        return {feature: said[name] for feature in features}
    monkeypatch.setattr('saeexplainer.prefs.phrases_of', phrases)
    return calls


def looking(**fields):
    return load_preset('smollm2-135m', n_candidates=2, candidate_lookups=['nearest token', 'nearest label'], **fields)


def test_lookups_join_the_candidates_once(store, proposing):
    put(store, {1: ["the word 'rain'", 'rain'], 2: ['fog', 'fog']})
    assert add_lookups(store, None, looking(), [1, 2], {}) == 2
    rows = store.explanations('round1').query('k >= 2')[['feature', 'k', 'text']].values.tolist()
    assert rows == [[1, 2, "the word 'sea'"], [1, 6, 'fog'], [1, 7, 'wet'],
                    [2, 2, "the word 'sea'"], [2, 3, "the word 'rain'"], [2, 7, 'wet']]
    assert add_lookups(store, None, looking(), [1, 2], {}) == 0
    assert proposing == [('nearest token', [1, 2]), ('nearest label', [1, 2])]


def test_lookups_that_were_not_noted_are_not_there_twice(store, proposing, monkeypatch):
    put(store, {1: ["the word 'rain'", 'rain']})
    def killed(*_): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(store, 'note', killed)
        with pytest.raises(KeyboardInterrupt): add_lookups(store, None, looking(), [1], {})
    before = store.explanations()
    assert add_lookups(store, None, looking(), [1], {}) == 1
    assert store.explanations().equals(before)


def test_without_lookups_nothing_is_asked(store, proposing):
    put(store, {1: ['rain', 'sea']})
    assert add_lookups(store, None, load_preset('smollm2-135m'), [1], {}) == 0
    assert not proposing


# ---- as a choice among explanations

def test_the_best_is_the_first_of_equals():
    assert Ranked([Candidate('a', .2), Candidate('b', .5), Candidate('c', .5)]).best.text == 'b'
    assert Ranked([Candidate('a', None), Candidate('b', None)]).best.text == 'a'
    assert Ranked([Candidate('a', None), Candidate('b', -.1)]).best.text == 'b'


def test_candidates_differ():
    assert distinct_texts(['', 'a', 'b', 'a', ' ']) == ['a', 'b']
    assert distinct_texts(['', ' ']) == ['']


def test_fewer_than_none_are_refused():
    with pytest.raises(ValueError, match='-1 candidates cannot be drawn'):
        draw_candidates(None, None, [3], load_preset('smollm2-135m'), -1)


def test_ranks_are_scores_of_own_words(target):
    preset = load_preset('smollm2-135m')
    said = ["the word 'rain'", "the word 'cat'", '']
    ranked = rank_candidates(preset, target, ALL, {3: said, 99: said})
    scores = [one.score for one in own_words(target, [(3, text) for text in said], ALL, rivals_of(ALL, preset.seed))]
    assert [one.score for one in ranked[3].candidates[:2]] == pytest.approx(scores[:2], abs=1e-4)
    assert ranked[3].candidates[2].score is None
    assert ranked[99].best.text == said[0] # nothing is known of it


# ---- the words that are named

def test_named_words_by_hand(store):
    preset = own_preset(reward='words')
    texts = ["the word 'rain'", "words such as 'rain', 'sea'", "words such as 'rain', 'fog'", "the word 'fog'"]
    put(store, {1: texts})
    with pytest.raises(ValueError, match="round 1: 4 candidates have no score by 'words' yet"):
        build_preferences(store, preset)
    assert score_named_words(store, preset, {1: rainy(1)}) == 4
    assert score_named_words(store, preset, {1: rainy(1)}) == 0
    assert candidate_rewards(store, preset)['reward'].tolist() == pytest.approx([.75, 1., .3, 0.])
    assert build_preferences(store, preset)['chosen'].tolist() == [texts[1]]


def test_a_feature_without_contexts_has_no_reward_of_words(store):
    preset = own_preset(reward='words')
    put(store, {1: ["the word 'rain'", "the word 'sea'"]})
    score_named_words(store, preset, {1: feature(1, contexts=[])})
    assert choose_pairs(store, preset)['dropped'].tolist() == ['unscored']
