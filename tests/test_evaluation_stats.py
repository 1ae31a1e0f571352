"Intervals, p values, and the tables that are made of them"
import math
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from saeexplainer.evaluation.stats import bootstrap_ci, sign_flip
from saeexplainer.evaluation.tables import METRICS, agreement, compare, p_text, stage_table, summary

nan = math.nan


def metrics_of(*rows): # (stage, feature, metric, value)
    return pd.DataFrame(rows, columns=['stage', 'feature', 'metric', 'value'])


# how sure a mean is

@pytest.fixture
def many(): return np.random.default_rng(0).normal(size=1500) # 10,000 resamples of these do not fit into one piece


def test_bootstrap_in_pieces_is_the_bootstrap(many):
    ci = bootstrap_ci(many)
    half = 1.96*many.std()/len(many)**.5
    assert abs(ci.mean - ci.low - half) < .1*half
    assert abs(ci.high - ci.mean - half) < .1*half


def test_missing_values_are_left_out_and_counted(many):
    whole = bootstrap_ci(many)
    gaps = bootstrap_ci([*many, nan, nan])
    assert tuple(gaps) == tuple(whole)
    assert (gaps.mean, gaps.n, gaps.missing) == (whole.mean, 1500, 2)


@pytest.mark.parametrize('values, bounds', [([.5]*9, (.5, .5)), ([3], (3., 3.))])
def test_bootstrap_of_constants(values, bounds): assert tuple(bootstrap_ci(values)) == bounds


def test_bootstrap_of_nothing():
    ci = bootstrap_ci([nan, nan])
    assert all(map(math.isnan, ci))
    assert ci.missing == 2


def test_a_level_in_per_cent_is_refused():
    with pytest.raises(ValueError, match='level must lie between 0 and 1, not 95'): bootstrap_ci([1.], level=95)


@pytest.mark.parametrize('n', [2, 60, 1500])
def test_the_interval_is_that_of_scipy(n):
    values = np.random.default_rng(n).normal(size=n)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method='percentile', batch=4_000_000//n,
                             rng=np.random.default_rng(0)).confidence_interval
    assert tuple(bootstrap_ci(values)) == pytest.approx(tuple(theirs), rel=1e-12)


# whether two differ

def test_p_is_near_that_of_all_flips():
    few = np.random.default_rng(3).normal(.3, 1, size=10)
    theirs = stats.permutation_test((few,), np.mean, permutation_type='samples', vectorized=True).pvalue
    assert abs(sign_flip(few) - theirs) < .015


def test_p_of_many_is_drawn_in_pieces(many): assert 0 < sign_flip(many) <= 1


def test_p_depends_on_the_seed_alone(many):
    assert sign_flip(many[:100]) == sign_flip([*many[:100], nan])
    assert sign_flip(many[:100]) != sign_flip(many[:100], seed=1)


def test_p_of_nothing_is_nan(): assert math.isnan(sign_flip([nan]))


@pytest.mark.parametrize('p, text', [(nan, '-'), (0., '< 0.001'), (.00049, '< 0.001'), (.0005, '0.001'), (1., '1.000')])
def test_p_text(p, text): assert p_text(p) == text


# tables

def test_comparisons_are_over_features_with_both_values():
    table = compare(metrics_of(('a', 1, 'gap', 1.), ('a', 2, 'gap', nan), ('a', 3, 'gap', 2.),
                               ('b', 1, 'gap', 3.), ('b', 2, 'gap', 9.), ('b', 3, 'gap', 4.)), [('b', 'a')])
    assert table.loc[('b', 'a', 'gap'), ['n', 'difference', 'low', 'high']].tolist() == [2, 2, 2, 2]


def test_a_stage_that_lacks_a_metric_is_not_compared():
    assert not len(compare(metrics_of(('a', 1, 'gap', 1.), ('b', 1, 'input', 1.)), [('b', 'a'), ('b', 'c')]))


def test_the_summary_counts_failures_of_its_metric():
    rows = metrics_of(('a', 1, 'gap', 1.), ('a', 2, 'gap', nan), ('a', 2, 'unparsed_contrast', 4.),
                      ('a', 1, 'empty', 0.), ('a', 2, 'empty', 1.))
    assert summary(rows).loc[('a', 'gap'), ['n', 'unavailable', 'failures', 'empty']].tolist() == [1, 1, 4, 1]


def test_the_summary_keeps_the_order_that_is_asked_for():
    rows = metrics_of(*[(stage, 1, metric, 1.) for stage in 'ab' for metric in ('gap', 'generative')])
    index = summary(rows, ['b', 'a']).index.tolist()
    assert index == [('b', 'generative'), ('b', 'gap'), ('a', 'generative'), ('a', 'gap')]


def test_a_summary_of_nothing_has_its_columns():
    table = summary(metrics_of())
    assert not len(table)
    assert list(table.columns) == ['n', 'mean', 'low', 'high', 'unavailable', 'failures', 'empty']


def test_shares_are_shown_in_per_cent_and_activations_as_they_are():
    rows = metrics_of(('a', 1, 'input', 1.), ('a', 1, 'gap', 1.5), ('b', 1, 'input', nan), ('b', 1, 'gap', 2.))
    table = stage_table(summary(rows))
    assert table.loc['a'].tolist() == ['100.0 [100.0, 100.0]', '1.50 [1.50, 1.50]']
    assert table.loc['b', 'input'] == '-'


def test_writers_agree_with_themselves():
    rows = metrics_of(*[(stage, feature, metric, feature + 10.*(stage == 'b')) for stage in 'ab'
                        for feature in range(4) for metric in METRICS])
    table = agreement(rows, rows, ['a', 'b'])
    assert list(table.index) == list(METRICS)
    assert (table[['values', 'within', 'same_order', 'pairs', 'tau']] == [8, 1., 1, 1, 1.]).all(axis=None)


def test_orders_that_are_turned_round_have_tau_of_minus_one():
    means = dict(a=1., b=2., c=3.)
    rows = metrics_of(*[(stage, feature, 'gap', mean) for stage, mean in means.items() for feature in (1, 2)])
    turned = rows.assign(value=-rows.value)
    assert agreement(rows, turned, list('abc')).loc['gap', 'tau'] == -1


def test_one_method_has_no_order():
    rows = metrics_of(('a', 1, 'gap', 1.), ('a', 2, 'gap', 2.))
    assert math.isnan(agreement(rows, rows, ['a']).loc['gap', 'tau'])


def test_a_constant_has_no_rank_correlation():
    rows = metrics_of(*[('a', f, 'gap', 1.) for f in range(4)])
    assert math.isnan(agreement(rows, rows, ['a']).loc['gap', 'within'])
