"How far a count of texts can be trusted, and whether samples that agree deserve trust"
from itertools import combinations
import numpy as np
import pandas as pd
import pytest
from saeexplainer.calibration import (
    FILE, calibration, calibration_of, calibration_table, content_words, fresh_share, predicts_reward, reached_counts,
    sample_agreement, signs_of_samples, write_calibration,
)
from saeexplainer.cli import beside_count
from saeexplainer.presets import data_dir, load_preset
from saeexplainer.results import Results
from saeexplainer.verdicts import Verdict

RESULTS = data_dir()/'smollm2-135m'/'results'


def counts(reached, texts=10, stage='m'):
    return pd.DataFrame(dict(stage=stage, feature=range(len(reached)), k=0, reached=reached, texts=texts))


def test_texts_that_were_not_made_are_no_misses():
    texts = pd.DataFrame(dict(stage='m', feature=1, k=0, score=[6., 4., np.nan]))
    found = reached_counts(texts, pd.Series({1: 10.}))
    assert found[['reached', 'texts']].values.tolist() == [[1, 2]]


@pytest.mark.parametrize('strongest', [np.nan, 0.])
def test_a_feature_whose_strongest_activation_is_unknown_is_left_out(strongest):
    texts = pd.DataFrame(dict(stage='m', feature=1, k=0, score=[6., 4.]))
    assert reached_counts(texts, pd.Series({1: strongest})).empty


def test_exactly_the_share_that_counts_is_no_success():
    texts = pd.DataFrame(dict(stage='m', feature=1, k=0, score=[5., 5.1]))
    assert reached_counts(texts, pd.Series({1: 10.}))['reached'].tolist() == [1]


@pytest.mark.parametrize('seen', [1, 2, 3])
def test_the_curve_is_the_mean_over_all_ways_to_divide_the_texts(seen):
    reached = [0, 1, 3, 4, 2, 4]
    shown = {x: [] for x in range(seen + 1)}
    for n in reached:
        texts = [1]*n + [0]*(4 - n)
        for chosen in combinations(range(4), seen):
            fresh = [texts[i] for i in range(4) if i not in chosen]
            shown[sum(texts[i] for i in chosen)].append(np.mean(fresh))
    found = calibration(counts(reached, 4), seen, n=10)
    assert found['fresh'].tolist() == pytest.approx([np.mean(shares) for shares in shown.values()])
    divisions = sum(map(len, shown.values()))/len(reached)
    assert found['explanations'].tolist() == pytest.approx([len(shares)/divisions for shares in shown.values()])


def test_a_count_that_nothing_showed_is_unknown():
    found = calibration(counts([0, 0, 0], 4), 2, n=10)
    assert found['fresh'].isna().tolist() == [False, True, True]


def test_explanations_with_too_few_texts_do_not_count():
    both = pd.concat([counts([4], 4), counts([2], 2)])
    assert calibration(both, 2, n=10)['explanations'].sum() == pytest.approx(1)
    with pytest.raises(ValueError, match='no explanation has more than 4 texts'): calibration(both, 4)
    with pytest.raises(ValueError, match='at least 1 text must be seen'): calibration(both, 0)


def test_intervals_are_over_features():
    rng = np.random.default_rng(0)
    once = counts(rng.binomial(10, rng.uniform(size=200)))
    repeated = pd.concat([once.assign(stage=stage) for stage in 'abcd']) # the same features, four times over
    one = calibration(once, 5, n=300)
    four = calibration(repeated, 5, n=300)
    assert four['low'].tolist() == pytest.approx(one['low'].tolist())
    assert four['high'].tolist() == pytest.approx(one['high'].tolist())


@pytest.mark.parametrize('seen', [1, 4, 9])
def test_a_count_is_believed_as_far_as_laplace_does(seen): # shares are uniform
    rng = np.random.default_rng(1)
    found = calibration(counts(rng.binomial(10, rng.uniform(size=40_000))), seen, n=10)
    assert found['fresh'].tolist() == pytest.approx([(x + 1)/(seen + 2) for x in range(seen + 1)], abs=.02)


# ---- the table

def test_the_stored_table_is_what_the_stored_texts_say(tmp_path):
    for name in ('provenance.json', 'texts.parquet', 'features.parquet'): (tmp_path/name).symlink_to(RESULTS/name)
    assert write_calibration(tmp_path).read_text() == (RESULTS/FILE).read_text()


def test_the_table_has_every_number_of_texts_and_every_method():
    table = pd.read_csv(RESULTS/FILE)
    assert sorted(table.query('stage == "all"')['texts'].unique()) == list(range(1, 10))
    assert set(table['stage']) - {'all'} == set(Results(RESULTS).stages)


def test_the_pooled_curve_rises():
    table = pd.read_csv(RESULTS/FILE).query('stage == "all"')
    for _, curve in table.groupby('texts'): assert curve['fresh'].is_monotonic_increasing


def test_one_text_each_makes_no_table():
    with pytest.raises(ValueError, match='none would be fresh'): calibration_table(counts([1, 0], 1))


def test_a_count_is_looked_up_in_the_curve_of_so_many_texts():
    table = pd.DataFrame(dict(stage='all', texts=[1, 1, 2, 2, 2], reached=[0, 1, 0, 1, 2], fresh=[.2, .7, .1, .5, .9]))
    assert fresh_share(table, 1, 1) == .7
    assert fresh_share(table, 1, 2) == .5
    assert fresh_share(table, 2, 8) == pytest.approx(.3) # between the points of the longest curve
    assert fresh_share(table, 8, 8) == .9


@pytest.mark.parametrize('reached, texts', [(0, 0), (-1, 4), (5, 4)])
def test_a_count_that_cannot_be_is_unknown(reached, texts):
    assert np.isnan(fresh_share(pd.read_csv(RESULTS/FILE), reached, texts))


@pytest.mark.parametrize('changes', [dict(success=.4), dict(evaluation_writer='gpt-5'), dict(target='other/model')])
def test_a_preset_that_was_changed_has_no_table(changes):
    assert calibration_of(load_preset('smollm2-135m', **changes)) is None


def test_a_preset_without_results_has_no_table():
    assert calibration_of(load_preset('gpt2-small-l8')) is None


def test_a_size_of_the_shipped_preset_has_the_table():
    assert calibration_of(load_preset('smollm2-135m', size='demo')) is not None


def test_the_command_says_what_a_count_is_worth():
    table = calibration_of(load_preset('smollm2-135m'))
    verdict = Verdict(3, 4, 0, 5., 4., None, [], [], fresh_share(table, 3, 4))
    assert beside_count(verdict) == '  on fresh texts such explanations reach it 70% of the time'


def test_the_command_says_nothing_where_nothing_is_known():
    assert beside_count(Verdict(3, 4, 0, 5., 4., None, [], [])) is None


# ---- agreement among samples

def test_small_words_and_case_do_not_count():
    assert content_words("The word 'Rain', in the RAIN") == {'rain'}


def test_agreement_is_the_mean_overlap_with_the_others():
    assert sample_agreement(['rain', 'rain snow', 'sea']).tolist() == pytest.approx([.25, .25, 0])


def test_samples_that_say_nothing_agree_in_nothing():
    assert sample_agreement(['', '']).tolist() == [0, 0]


def test_a_sign_may_tell_features_and_not_samples():
    rng = np.random.default_rng(0)
    feature = np.repeat(np.arange(60), 5)
    samples = pd.DataFrame(dict(feature=feature, sign=feature + rng.random(300), reward=feature + rng.random(300)))
    found = predicts_reward(samples, n=100)
    assert found['between'].mean > .99
    assert found['within'].low < 0 < found['within'].high
    assert found['gain'].low < 0 < found['gain'].high


def test_missing_values_are_left_out():
    samples = pd.DataFrame(dict(feature=[1, 1, 2, 2], sign=[1, 2, np.nan, 1], reward=[1, 2, 1, np.nan]))
    found = predicts_reward(samples, n=10)
    assert found['within'].mean == pytest.approx(1)
    assert found['within'].n == 1
    with pytest.raises(ValueError, match='no sample has both'): predicts_reward(samples.assign(sign=np.nan))


def test_stored_samples_have_both_signs_and_a_reward():
    samples = signs_of_samples(Results(RESULTS), 3)
    assert samples['feature'].nunique() == 300
    assert samples['agreement'].between(0, 1).all()
    with pytest.raises(ValueError, match='no samples of round 4'): signs_of_samples(Results(RESULTS), 4)
