"Words at the peaks of a feature, and whether an explanation names them"
import math
from types import SimpleNamespace
import pytest
from judged import context
from saeexplainer.evaluation.words import akin, coverage, named_words, names_word, peak_units
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


# forms of words, and too many of them

@pytest.mark.parametrize('word, other', [
    ('raise', 'raise'), ('raise', 'raises'), ('raising', 'raised'), ('spent', 'spending'), ('(', '('),
])
def test_forms_of_one_word(word, other):
    assert akin(word, other)
    assert akin(other, word)


@pytest.mark.parametrize('word, other', [
    ('win', 'winning'), ('rain', 'rail'), ('sea', 'seas'), ('inter', 'international'), ('', 'a'), ('state', 'plate'),
])
def test_words_that_are_not_taken_for_forms_of_one(word, other):
    assert not akin(word, other)
    assert not akin(other, word)


def test_what_stands_at_the_peaks():
    comma = SimpleNamespace(tokens=('rain', ',', ' enc', 'roach'), peak=1)
    piece = SimpleNamespace(tokens=('rain', ',', ' Enc', 'roach'), peak=3)
    assert peak_units([comma, piece, piece]) == {',': 1, 'encroach': 2}


COMMA = Context('a book', ('so', ',', ' it'), (0., 1., 0.), 1)
SKY = [*[context('it rained here', 1)]*2, context('the snow fell', 1), COMMA]

@pytest.mark.parametrize('explanation, covered, wrong', [
    ("the word 'rain'", .5, 0),
    ("words such as 'rains', 'raining', 'Snow'", .75, 0),
    ("words such as 'rain', 'sea', 'fog'", .5, 2),
    ("words such as 'rain', 'rain', 'sea', 'sea'", .5, 1), # each is counted once
    ("the word ','", .25, 0),
    ("rain and snow", 0., 0), # nothing is quoted
    ('', 0., 0),
    ("the word 'rain's'", .5, 0), # an apostrophe ends no quote
])
def test_what_is_named_and_what_is_wrong(explanation, covered, wrong):
    named = named_words(explanation, SKY)
    assert (named.covered, named.wrong) == (covered, wrong)


def test_without_contexts_nothing_is_known_to_be_covered():
    assert math.isnan(named_words("the word 'rain'", []).covered)
