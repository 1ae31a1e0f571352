"What blind readings say: agreement, tables of methods, correlation with metrics"
import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from saeexplainer.evaluation.readings import (
    by_explanation, method_table, metric_correlations, rank_correlation, reading_agreement, weighted_kappa,
)


def textbook_kappa(first, second, n=3):
    "Cohen's kappa from the table of both ratings, as textbooks write it"
    table = np.zeros((n, n))
    for one, other in zip(first, second): table[one, other] += 1
    table /= table.sum()
    weights = np.abs(np.arange(n)[:, None] - np.arange(n)[None, :])/(n - 1)
    expected = np.outer(table.sum(1), table.sum(0))
    return 1 - (weights*table).sum()/(weights*expected).sum()


@pytest.mark.parametrize('seed', range(5))
def test_kappa_is_that_of_textbooks(seed):
    rng = np.random.default_rng(seed)
    first = rng.integers(3, size=50)
    second = np.where(rng.random(50) < .6, first, rng.integers(3, size=50))
    assert weighted_kappa(first, second) == pytest.approx(textbook_kappa(first, second))


def test_kappa_of_readers_who_never_differ_is_unknown_if_all_is_the_same():
    assert np.isnan(weighted_kappa([1, 1], [1, 1]))
    assert np.isnan(weighted_kappa([], []))


def test_kappa_needs_ratings_of_the_same_things():
    with pytest.raises(ValueError, match='2 ratings and 3'): weighted_kappa([1, 2], [1, 2, 0])


def readings(rows): return pd.DataFrame(rows, columns=['reader', 'row', 'feature', 'method', 'rating'])


def test_a_text_of_two_methods_counts_once_in_the_agreement():
    found, = reading_agreement(readings([
        ('Ada', '1a', 3, 'x', 2), ('Ada', '1a', 3, 'y', 2), ('Ada', '1b', 3, 'z', 0),
        ('Ben', '1a', 3, 'x', 2), ('Ben', '1a', 3, 'y', 2), ('Ben', '1b', 3, 'z', 1)]))
    assert (found.rows, found.equal) == (2, .5)


def test_texts_that_were_not_shown_do_not_count_in_the_agreement():
    found, = reading_agreement(readings([(who, row, 3, 'x', 0) for who in ('Ada', 'Ben') for row in ('', '1a')]))
    assert found.rows == 1


def test_one_reader_agrees_with_nobody():
    assert reading_agreement(readings([('Ada', '1a', 3, 'x', 2)])) == []


def test_three_readers_are_three_pairs():
    rows = readings([(who, f'{n}a', n, 'x', n % 3) for who in ('Ada', 'Ben', 'Cy') for n in range(6)])
    assert [(pair.first, pair.second, pair.kappa) for pair in reading_agreement(rows)] == [
        ('Ada', 'Ben', 1), ('Ada', 'Cy', 1), ('Ben', 'Cy', 1)]


def test_the_rating_of_an_explanation_is_the_mean_of_its_readers():
    found = by_explanation(readings([('Ada', '1a', 3, 'x', 2), ('Ben', '1a', 3, 'x', 1)]))
    assert found[['rating', 'right']].iloc[0].tolist() == [1.5, .5]


def test_the_best_method_comes_first_and_chance_last():
    rows = [('Ada', f'{n}{m}', n, m, rating) for n in range(8)
            for m, rating in (('bad', 0), ('random label', 1), ('good', 2 - n % 2))]
    table = method_table(readings(rows))
    assert table.index.tolist() == ['good', 'bad', 'random label']
    assert table.loc['good', ['features', 'right', 'mean']].tolist() == [8, .5, 1.5]
    assert table.loc['good', 'low'] < 1.5 < table.loc['good', 'high']
    assert table.loc['bad', ['low', 'high']].tolist() == [0, 0]


@pytest.fixture(scope='module')
def measured():
    rng = np.random.default_rng(0)
    rows = []
    for method, level in (('a', 0), ('b', 1), ('c', 2)):
        for number in range(30):
            within = rng.random()
            rating = min(2, int(level/2 + 1.5*within))
            rows.append((method, number, rating, level + rng.random(), within))
    return pd.DataFrame(rows, columns=['method', 'feature', 'rating', 'ranks methods', 'ranks features'])


@pytest.fixture(scope='module')
def correlations(measured):
    read = measured.assign(reader='Ada')[['reader', 'feature', 'method', 'rating']]
    metrics = measured.rename(columns={'method': 'stage'}).melt(
        ['stage', 'feature'], ['ranks methods', 'ranks features'], 'metric', 'value')
    metrics.loc[0, 'value'] = np.nan
    return metric_correlations(read, metrics)


def test_pairs_without_a_value_are_left_out(correlations):
    assert correlations['pairs'].to_dict() == {'ranks methods': 89, 'ranks features': 90}


def test_the_pooled_correlation_is_that_of_scipy(correlations, measured):
    expected = spearmanr(measured['ranks features'], measured['rating']).statistic
    assert correlations.loc['ranks features', 'pooled'] == pytest.approx(expected)


def test_within_methods_is_the_mean_of_their_correlations(correlations, measured):
    expected = [spearmanr(part['ranks features'], part['rating']).statistic for _, part in measured.groupby('method')]
    assert correlations.loc['ranks features', 'within'] == pytest.approx(np.mean(expected))
    assert correlations.loc['ranks features', 'n_within'] == 3


def test_a_metric_may_rank_methods_and_no_explanation(correlations):
    assert correlations.loc['ranks methods', 'methods'] == pytest.approx(1)
    assert abs(correlations.loc['ranks methods', 'within']) < .3


def test_a_method_whose_values_are_all_equal_has_no_correlation():
    read = pd.DataFrame(dict(reader='Ada', feature=[1, 2], method='a', rating=[0, 2]))
    metrics = pd.DataFrame(dict(stage='a', feature=[1, 2], metric='gap', value=[1., 1.]))
    found = metric_correlations(read, metrics).loc['gap']
    assert found['n_within'] == 0
    assert np.isnan(found['within'])
    assert np.isnan(rank_correlation([1, 1], [0, 2]))
