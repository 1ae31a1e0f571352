"Studies of a run: variants that are screened on held-out features, and arms that differ in one thing"
import json

import pandas as pd
import pytest
from tiny_lab import copy_of

from saeexplainer.ablations import arms_figure
from saeexplainer.evaluation.tables import screen_table
from saeexplainer.presets import diff, load_preset
from saeexplainer.results import Results
from saeexplainer.studies import (
    ARMS, RULE_SETS, SMALLER, SmallTraining, arm_preset, collect_arms, compare_rules, recorded_pairs, screen,
)

# ---- screening

VARIANTS = dict(
    sft={},
    paper=dict(reward='max'),
    worst=dict(negative='worst', dpo_loss='sigmoid_norm'),
    imitate=dict(dpo_loss='sft'))


@pytest.fixture(scope='module')
def screened(tiny_lab, finished_run, tmp_path_factory):
    "A run that is open, its held-out features, and the rows of each variant"
    folder = copy_of(finished_run, tmp_path_factory.mktemp('screening')/'run')
    with tiny_lab.in_use(), tiny_lab.run(folder) as run:
        held_out = run.splits['preference1'][-2:]
        rows = {name: screen(run, name, tiny_lab.preset(**fields), held_out, samples=2, n=2)
                for name, fields in VARIANTS.items()}
        yield run, held_out, rows


def test_a_variant_is_screened_once(screened, lab):
    run, held_out, rows = screened
    assert screen(run, 'paper', lab.preset(reward='max'), held_out, samples=2, n=2).equals(rows['paper'])


def test_another_variant_of_the_same_name_is_refused(screened, lab):
    run, held_out, _ = screened
    with pytest.raises(ValueError, match='holds another screening'):
        screen(run, 'paper', lab.preset(reward='mean'), held_out, samples=2, n=2)


def test_held_out_features_are_not_trained_on(screened):
    run, held_out, rows = screened
    trained = json.loads((run.folder/'screening'/'paper'/'explainer'/'training.json').read_text())
    assert trained['pairs'] <= 2
    assert set(rows['paper'].feature) == set(held_out)
    assert rows['paper'].groupby('feature').k.nunique().tolist() == [3, 3]


def test_variants_are_compared_with_sft(screened):
    table = screen_table(screened[2])
    assert list(table.index) == ['sft', 'paper', 'worst', 'imitate']
    assert table.loc['sft', 'greedy - sft'] == 0


# ---- arms

def test_an_arm_is_a_smaller_run():
    recorded = load_preset('smollm2-135m', size='full')
    changed = {line.split(':')[0] for line in diff(recorded, arm_preset('pool-6')).splitlines()}
    assert changed <= set(SMALLER)


@pytest.mark.parametrize('one, other, says', [
    ('pool-2', 'pool-10', 'n_candidates: 2 -> 10'),
    ('pool-6', 'peak-words', "label_model: 'claude' -> 'peak words'")])
def test_arms_differ_in_one_thing(one, other, says):
    assert diff(arm_preset(one), arm_preset(other)) == says


def test_arms_of_a_split_have_as_many_features():
    one, two = arm_preset('split-1'), arm_preset('split-2')
    assert one.n_sft + one.n_pref == two.n_sft + 2*two.n_pref
    assert two.new_features_in_round_2
    assert not one.new_features_in_round_2


def test_there_is_an_arm_for_each_layer():
    assert set(ARMS) >= {f'layer-{i}' for i in (3, 9, 15, 21, 27)}


METRICS = pd.DataFrame(
    [(stage, feature, metric, float(feature))
     for stage in ('sft', 'dpo1') for feature in range(4) for metric in ('generative', 'gap')],
    columns=['stage', 'feature', 'metric', 'value'])
PAIRS = pd.DataFrame(
    [(1, 0, 6., 2., None), (1, 1, 4., 1., None), (1, 2, None, None, 'unscored')],
    columns=['round', 'feature', 'chosen_score', 'rejected_score', 'dropped'])


@pytest.fixture
def collected(tmp_path):
    "A folder with two arms, and what was collected of them"
    for arm in ('a', 'b'):
        report = tmp_path/arm/'report'
        report.mkdir(parents=True)
        (report/'provenance.json').write_text(json.dumps(dict(command=arm)))
        METRICS.to_parquet(report/'metrics.parquet')
        PAIRS.to_parquet(report/'pairs.parquet')
    collect_arms(['a', 'b'], tmp_path, tmp_path)
    return tmp_path


def commands(folder):
    "Arm -> the command that made it"
    made = json.loads((folder/'arms.json').read_text())
    return {name: arm['command'] for name, arm in made.items()}


def test_arms_are_collected(collected):
    assert len(pd.read_parquet(collected/'arms.parquet')) == 2*16
    pairs = [dict(round=1, pairs=2, chosen=5., rejected=1.5)]
    assert json.loads((collected/'arms.json').read_text())['b'] == dict(command='b', pairs=pairs)


def test_one_arm_is_collected_again_and_the_other_stays(collected):
    (collected/'a'/'report'/'provenance.json').write_text(json.dumps(dict(command='again')))
    collect_arms(['a'], collected, collected)
    assert len(pd.read_parquet(collected/'arms.parquet')) == 2*16
    assert commands(collected) == dict(a='again', b='b')


def test_arms_are_drawn(collected):
    arms = pd.read_parquet(collected/'arms.parquet')
    figure = arms_figure(arms, dict(a='2', b='6'), 'K', stages=('sft', 'dpo1'), panels=('generative', 'gap'))
    assert [ax.get_title() for ax in figure.axes] == ['generative accuracy (%)', 'gap H - L (activation)']
    assert figure.axes[0].get_lines()[0].get_ydata().tolist() == [150., 150.]


# ---- the paper's rule and the published one

def test_pairs_of_recorded_candidates_are_those_of_the_run(tiny_lab, finished_run):
    results = Results(finished_run/'report')
    with tiny_lab.in_use(): preset = tiny_lab.preset()
    wanted = results['pairs'].query('round == 1').set_index('feature')
    found = recorded_pairs(results, preset, round=1).set_index('feature').reindex(columns=wanted.columns)
    for column in ('chosen', 'rejected', 'dropped'):
        assert found[column].fillna('').to_dict() == wanted[column].fillna('').to_dict()


@pytest.fixture(scope='module')
def compared(tiny_lab, finished_run, tmp_path_factory):
    "Folder with what a comparison of rules has written"
    folder = tmp_path_factory.mktemp('rules')
    size = SmallTraining(features=2, judged=1, texts=2)
    with tiny_lab.in_use():
        compare_rules(Results(finished_run/'report'), tiny_lab.preset(), finished_run/'explainer'/'sft',
                      folder, folder/'work', size)
    return folder


def test_every_rule_and_reward_has_its_pairs(compared):
    pairs = pd.read_parquet(compared/'rules_pairs.parquet')
    assert set(pairs['rule']) == set(RULE_SETS)
    assert pairs.groupby(['rule', 'reward', 'round']).size().unique().tolist() == [4]


def test_both_trainings_begin_with_the_same_explainer_and_are_judged_alike(compared):
    rows = pd.read_parquet(compared/'rules_training.parquet')
    assert rows['rule'].tolist() == ['sft', 'paper', 'published']
    assert rows['feature'].nunique() == 1
    margins = rows.set_index('rule')[['margin paper', 'margin published']]
    assert margins.drop('sft').notna().all(axis=None)


def test_what_made_a_comparison_is_written_down(compared):
    made = json.loads((compared/'rules.json').read_text())
    for training in made['trainings'].values():
        assert training['pairs'] == training['validation'] == 1
        assert training['kept_step'] in {row['step'] for row in training['evaluations']}
