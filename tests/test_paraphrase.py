"Explanations said in other words, and how much of a metric is kept"
import math
import numpy as np
import pandas as pd
import pytest
from judged import Scripted
from saeexplainer.evaluation.paraphrase import (
    REPHRASE, REPHRASE_SHORT, Changes, phrase_of, rephrase_request, rephrased, retention, retention_table,
    without_marks, without_quotes,
)
from saeexplainer.evaluation.stats import bootstrap_ci, ratio_ci
from saeexplainer.replies import Reply


# ---- without quotes

@pytest.mark.parametrize('text, bare', [
    ("the word 'size'", 'the word size'),
    ('"double" and `code`', 'double and code'),
    ('“curly”, ‘single’ and «French»', 'curly, single and French'),
    ("a country's size", "a country's size"),
    ("don't", "don't"),
    ("'s after a name", 's after a name'),
    ("''", ''),
    ('', ''),
    ("'ends.'", 'ends.'),
])
def test_marks_go_and_apostrophes_stay(text, bare):
    assert without_marks(text) == bare


@pytest.mark.parametrize('text, bare', [
    ("'star', 'astronomers' or 'comets'", 'star astronomers or comets'),
    ("'rain'/'snow'; 'hail'", 'rain snow hail'),
    ("- 'rain'\n- 'snow'", 'rain snow'),
    ("1. 'rain'\n2) 'snow'", 'rain snow'),
    ("'Europe-wide' name", 'Europe-wide name'),
    ('version 1.5', 'version 1.5'),
    ('1,000 years', '1,000 years'),
])
def test_lists_become_plain_words(text, bare):
    assert without_quotes(text) == bare


def test_taking_quotes_away_twice_changes_nothing():
    once = without_quotes("words, such as 'star', 'sun' or 'comets'")
    assert without_quotes(once) == once


# ---- in other words

@pytest.mark.parametrize('small, form', [(False, REPHRASE), (True, REPHRASE_SHORT)])
def test_a_request_holds_the_explanation_and_is_greedy(small, form):
    request = rephrase_request("the word '{rain}'", small, seed=4)
    assert request.prompt == form.format(explanation="the word '{rain}'")
    assert request.temperature == 0
    assert request.seed == 4


@pytest.mark.parametrize('reply, phrase', [
    (Reply('wet weather'), 'wet weather'),
    (Reply('In other words: wet weather.'), 'wet weather'),
    (Reply('"wet weather"\n\nThis is another line.'), 'wet weather'),
    (Reply("the word 'rain'"), 'the word rain'),
    (Reply(''), ''),
    (Reply(None, 'refused', 'refused'), ''),
])
def test_a_reply_is_one_phrase_without_marks(reply, phrase):
    assert phrase_of(reply) == phrase


def test_each_text_is_asked_once():
    writer = Scripted('wet weather')
    said = rephrased(writer, {3: 'rain', 5: 'rain', 7: 'snow', 9: ' '})
    assert said == {3: 'wet weather', 5: 'wet weather', 7: 'wet weather', 9: ''}
    assert len(writer.asked) == 2


def test_nothing_to_say_is_nothing_asked():
    writer = Scripted('wet weather')
    assert rephrased(writer, {}) == {}
    assert rephrased(writer, {3: ''}) == {3: ''}
    assert writer.asked == []


def test_a_failed_request_is_an_error():
    class Broken:
        def write(self, requests, **_): return [Reply(None, 'no route', 'failed') for _ in requests]
    with pytest.raises(ConnectionError, match='1 of the requests had no route'): rephrased(Broken(), {3: 'rain'})


def test_changes_are_counted():
    before = {1: "the word 'rain'", 2: 'snow or hail', 3: 'sun', 4: ''}
    after = {1: 'The word rain.', 2: 'frozen hail', 3: '', 4: ''}
    changes = Changes.of(before, after)
    assert changes == Changes(n=3, empty=1, same=1, words=(1 + 1/3)/2)
    assert str(changes) == '3 explanations: 1 came back the same, 1 empty; 67% of words kept'


def test_changes_of_nothing():
    changes = Changes.of({}, {})
    assert changes.n == 0
    assert math.isnan(changes.words)


# ---- retention

def test_the_interval_is_paired():
    "Features differ much, and each keeps half: the ratio has no width"
    values = np.random.default_rng(0).exponential(size=100)
    kept = retention(dict(enumerate(values)), dict(enumerate(values/2)))
    assert kept.mean == pytest.approx(.5)
    assert kept.low == pytest.approx(.5)
    assert kept.high == pytest.approx(.5)
    assert bootstrap_ci(values).high - bootstrap_ci(values).low > .1


def test_the_interval_holds_the_true_ratio():
    rng = np.random.default_rng(1)
    found = []
    for seed in range(40):
        before = rng.uniform(.2, 1., 200)
        after = before*rng.uniform(.2, .6, 200)
        kept = retention(dict(enumerate(before)), dict(enumerate(after)), seed=seed)
        found.append(kept.low <= .4 <= kept.high)
    assert sum(found) >= 33


def test_only_features_with_both_count():
    kept = retention({1: 1., 2: 1., 3: math.nan, 4: 5.}, {1: .5, 2: .5, 3: 1.})
    assert (kept.mean, kept.n, kept.missing) == (.5, 2, 1)


def test_what_is_at_chance_has_nothing_to_keep():
    assert math.isnan(retention({1: .5, 2: .5}, {1: .9, 2: .9}, chance=.5).mean)
    assert retention({1: .9, 2: .7}, {1: .7, 2: .6}, chance=.5).mean == pytest.approx(.5)


@pytest.mark.parametrize('before, after', [({}, {}), ({1: 1.}, {2: 1.}), ({1: math.nan}, {1: 1.}), ({1: 0.}, {1: 0.})])
def test_no_number_without_values(before, after):
    assert math.isnan(retention(before, after).mean)


def test_the_same_seed_gives_the_same_interval():
    above = np.linspace(0, 1, 30)
    below = np.linspace(1, 2, 30)[::-1]
    assert ratio_ci(above, below) == ratio_ci(above, below)
    assert ratio_ci(above, below) != ratio_ci(above, below, seed=1)


# ---- the table

def metrics_of(**stages): # stage -> {metric: values}
    rows = [(stage, feature, metric, value) for stage, metrics in stages.items()
            for metric, values in metrics.items() for feature, value in enumerate(values)]
    return pd.DataFrame(rows, columns=['stage', 'feature', 'metric', 'value'])


def test_a_row_for_each_metric_that_both_have():
    metrics = metrics_of(sft=dict(generative=[.8, .4], detection=[.9, .7], coverage=[1., 1.]),
                         other=dict(generative=[.4, .2], detection=[.7, .6]))
    table = retention_table(metrics, {'sft': ['other']}).set_index('metric')
    assert sorted(table.index) == ['detection', 'generative']
    assert table.loc['generative', ['before', 'after', 'kept']].tolist() == pytest.approx([.6, .3, .5])
    assert table.loc['detection', 'kept'] == pytest.approx(.5) # of what is above .5


def test_a_stage_that_was_not_measured():
    with pytest.raises(ValueError, match="there is no value of 'sft rephrased': measure it with `evaluate` first"):
        retention_table(metrics_of(sft=dict(generative=[.5])), {'sft': ['sft rephrased']})
