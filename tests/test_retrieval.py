"Which feature texts belong to: places, ties, texts that cannot be read, and the words of an explanation itself"
import math
import numpy as np
import pytest
from helpers import tiny_tokenizer
from judged import tiny_target
from saeexplainer.evaluation.retrieval import (
    activation_shares, place_of_own, quoted, retrieval_places, self_activation, top,
)

TEXTS = ['The cat sat on the mat.', 'She sells sea shells', 'A national park']
LONG = 'rain '*600


@pytest.fixture(scope='module')
def target(tmp_path_factory): return tiny_target(tmp_path_factory.mktemp('sae'))


@pytest.mark.parametrize('seed', range(4))
def test_the_place_is_one_and_the_number_of_larger_means(seed):
    shares = np.random.default_rng(seed).random((4, 9))
    means = shares.mean(0)
    for own in range(9): assert place_of_own(shares, own) == 1 + (means > means[own]).sum()


def test_of_equals_each_gets_the_mean_place():
    assert place_of_own(np.ones((2, 5)), 3) == 3


def test_the_only_feature_is_first():
    assert place_of_own(np.zeros((3, 1)), 0) == 1


def test_texts_that_cannot_be_read_are_left_out():
    shares = np.array([[.1, .9], [np.nan, np.nan], [.9, .2]])
    assert place_of_own(shares, 1) == place_of_own(shares[[0, 2]], 1)


@pytest.mark.parametrize('shares', [np.zeros((0, 3)), np.full((2, 3), np.nan)])
def test_no_text_gives_no_place(shares):
    assert math.isnan(place_of_own(shares, 1))


def test_shares_are_activations_over_the_strongest(target):
    shares = activation_shares(target, TEXTS, {3: 2., 7: 4.})
    wanted = np.stack([target.max_acts(TEXTS, 3)/2, target.max_acts(TEXTS, 7)/4], 1)
    assert shares == pytest.approx(wanted, abs=1e-5)


def test_places_of_features_by_their_texts(target):
    table = target.max_act_table(TEXTS, list(range(40)))
    strongest = dict(enumerate(table.max(0) + .5))
    own = int((table[0]/list(strongest.values())).argmax())
    assert retrieval_places(target, {own: TEXTS[:1]}, strongest)[own] == 1


@pytest.mark.parametrize('texts', [[], [None], ['', None], [LONG]])
def test_a_feature_without_a_text_has_no_place(target, texts):
    places = retrieval_places(target, {3: texts, 5: TEXTS}, {3: 1., 5: 1., 8: 1.})
    assert math.isnan(places[3])
    assert 1 <= places[5] <= 3


def test_no_features_at_all(target):
    assert retrieval_places(target, {}, {3: 1.}) == {}
    assert self_activation(target, {}, {3: 1.}) == {}


def test_a_text_of_two_features_is_read_once(target, monkeypatch):
    read = []
    table = target.max_act_table
    def counting(texts, *rest):
        read.extend(texts)
        return table(texts, *rest)
    monkeypatch.setattr(target, 'max_act_table', counting)
    retrieval_places(target, {3: TEXTS, 5: TEXTS}, {3: 1., 5: 1.})
    assert read == TEXTS


def test_top_keeps_what_is_unavailable():
    found = top({3: 1., 5: 6., 8: math.nan}, 5)
    assert (found[3], found[5]) == (1, 0)
    assert math.isnan(found[8])


@pytest.mark.parametrize('explanation, quotes', [
    ("the word 'rain'", ['rain']),
    ("words such as 'can't', 'won't'", ["can't", "won't"]),
    ('“rain” and ‘snow’', ['rain', 'snow']),
    ("'rain', 'rain'", ['rain']),
    ("the dogs' bowls and the cats' beds", []),
    ("''", []),
    ("'", []),
    ('', []),
])
def test_what_stands_between_quotation_marks(explanation, quotes):
    assert quoted(explanation) == quotes


def test_self_activation_is_at_most_one(target):
    assert self_activation(target, {3: "the word 'rain'"}, {3: 1e-6})[3] in (0, 1)


def test_self_activation_takes_the_best_of_words_and_quotes(target):
    explanation = "the words 'cat' and 'sea'"
    acts = target.max_acts([explanation, ' cat', ' sea'], 3)
    assert self_activation(target, {3: explanation}, {3: 50.})[3] == pytest.approx(max(acts)/50)


@pytest.mark.parametrize('explanation', ['', ' \n', LONG])
def test_an_explanation_that_cannot_be_read_is_unavailable(target, explanation):
    assert math.isnan(self_activation(target, {3: explanation}, {3: 1.})[3])


def test_a_tokenizer_without_bos(tmp_path):
    tokenizer = tiny_tokenizer(bos=None)
    target = tiny_target(tmp_path, 'gpt2', tokenizer=tokenizer, metadata={'prepend_bos': False})
    assert set(retrieval_places(target, {3: TEXTS}, {3: 1., 4: 1.})) == {3}


@pytest.mark.parametrize('strongest', [0., math.nan, -1.])
def test_a_feature_that_never_fires_does_not_compete(target, strongest):
    with pytest.raises(ValueError, match='the strongest activation of feature 4 is not known'):
        retrieval_places(target, {3: TEXTS}, {3: 1., 4: strongest})


def test_a_feature_without_a_known_activation_is_refused(target):
    unknown = 'the strongest activation of feature 7 is not known'
    with pytest.raises(ValueError, match=unknown): retrieval_places(target, {7: TEXTS}, {3: 1.})
    with pytest.raises(ValueError, match=unknown): self_activation(target, {7: 'a'}, {3: 1.})
