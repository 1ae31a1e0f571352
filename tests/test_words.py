"Words at the peaks of a feature, and whether an explanation names them"
import math
import pytest
from judged import context
from saeexplainer.evaluation.words import coverage, names_word
from saeexplainer.features import Context


def test_coverage_is_the_share_of_contexts_whose_word_is_named():
    contexts = [context('the rain fell', 1), context('wet snow fell', 1)]
    assert coverage('words such as rain', contexts) == .5


def test_coverage_knows_the_whole_word_at_a_part_of_it():
    parted = Context('a book', ('The', ' nat', 'ional', ' park'), (0., 0., 3., 0.), 2)
    assert coverage("the word 'national'", [parted]) == 1


def test_a_peak_without_a_word_is_left_out():
    stop = Context('a book', ('rain', '.', '\n'), (0., 4., 0.), 1)
    assert coverage('rain', [stop, context('rain fell', 0)]) == 1


@pytest.mark.parametrize('contexts', [
    [],
    [Context('a book', ('rain', '.'), (0., 4.), 1)],
    [Context('a book', ('',), (4.,), 0)],
])
def test_coverage_without_a_word_is_unavailable(contexts):
    assert math.isnan(coverage('rain', contexts))


@pytest.mark.parametrize('explanation', ['', ' ', 'snow', 'rainy days', 'x '*20 + 'rain'])
def test_what_names_no_word_covers_nothing(explanation):
    assert coverage(explanation, [context('the rain fell', 1)]) == 0


@pytest.mark.parametrize('words', [[''], [' ', '\n'], ()])
def test_blank_words_are_never_named(words):
    assert names_word('any text at all', words) is False


@pytest.mark.parametrize('word', ['C++', '$x', '(a|b)', '[', '\\d'])
def test_a_word_is_no_pattern(word):
    assert names_word(f'code with {word} in it', [word]) is True
    assert names_word('code with 7 a b x C', [word]) is False
