"Studies beside the recorded run: screening and arms"
import json
from types import SimpleNamespace
import numpy as np
import pandas as pd
import pytest
from saeexplainer import studies
from saeexplainer.ablations import arms_figure
from saeexplainer.evaluation.tables import screen_table
from saeexplainer.evaluation.texts import Verified
from saeexplainer.files import read_json, read_table, write_json, write_table
from saeexplainer.plots import PANELS
from saeexplainer.presets import load_preset
from saeexplainer.store import RunStore
from saeexplainer.studies import (
    ARMS, VARIANTS, Explained, arm_preset, collect_arms, collect_screening, run_arms, screen, screen_row,
)


# screening

RAIN = Explained(7, 0, 'words about rain')


@pytest.fixture
def run(tmp_path):
    "What a screening reads of a run that has screened `sft` already"
    with RunStore(tmp_path/'store.sqlite') as store:
        folder = tmp_path/'screening'/'sft'
        folder.mkdir(parents=True)
        write_json(dict(changes='', held_out=[7], samples=3, n=6), folder/'screen.json')
        write_table(pd.DataFrame([dict(vars(RAIN), score=.5, reached=1)]), folder/'screen.parquet')
        yield SimpleNamespace(folder=tmp_path, store=store, preset=load_preset('smollm2-135m'),
                              trained=lambda stage: tmp_path/stage)


def test_the_score_is_a_share_of_the_strongest_activation():
    row = screen_row(RAIN, Verified(7, ['a', 'b'], np.array([8., 2.])), max_act=10., success=.5)
    assert row == dict(feature=7, k=0, text='words about rain', score=.5, reached=1)


def test_texts_that_were_not_made_are_left_out_of_the_score():
    row = screen_row(RAIN, Verified(7, ['a', None], np.array([8., np.nan])), max_act=10., success=.5)
    assert row['score'] == .8


@pytest.mark.parametrize('text, scores', [('rain', [np.nan]), (' ', [3.])])
def test_without_a_text_to_judge_by_there_is_no_score(text, scores):
    row = screen_row(Explained(7, 0, text), Verified(7, ['a'], np.array(scores)), max_act=10., success=.5)
    assert np.isnan(row['score'])


def test_a_finished_screening_is_read_back(run):
    assert screen(run, 'sft', run.preset, [7])['score'].tolist() == [.5]


@pytest.mark.parametrize('changed, line', [
    (dict(n=2), 'n: 6 there, 2 here'), (dict(samples=1), 'samples: 3 there, 1 here')])
def test_a_screening_with_other_settings_is_refused(run, changed, line):
    with pytest.raises(ValueError, match=f'holds another screening .{line}'):
        screen(run, 'sft', run.preset, [7], **changed)


def test_a_screening_of_another_variant_is_refused(run):
    with pytest.raises(ValueError, match='holds another screening .changes'):
        screen(run, 'sft', load_preset('smollm2-135m', reward='max', negative='hard'), [7])


def test_a_screening_is_collected_with_what_made_it(run, tmp_path):
    run.store.put_texts([('round1', 7, 0, 'preference', 0, 'It rains.', None, 2.5)])
    collect_screening(run, ['sft'], tmp_path)
    assert read_table(tmp_path/'screening.parquet').to_pandas()['variant'].tolist() == ['sft']
    assert read_table(tmp_path/'screening_scores.parquet').to_pandas()['score'].tolist() == [2.5]
    made = json.loads((tmp_path/'screening.json').read_text())
    assert made['variants'] == {'sft': dict(changes='', held_out=[7], samples=3, n=6, pairs=None, seconds=None)}


def test_variants_are_presets():
    for changes in VARIANTS.values(): load_preset('smollm2-135m', **changes)


def test_a_variant_is_compared_on_the_features_that_both_have():
    def rows(*scores):
        return pd.DataFrame([dict(feature=f, k=0, text='a b', score=score) for f, score in enumerate(scores)])
    table = screen_table({'sft': rows(.1, .2, np.nan), 'fast': rows(.2, .3, .9)})
    assert table.loc['fast', 'greedy - sft'] == pytest.approx(10)


# arms

@pytest.fixture
def reports(tmp_path):
    "Folder of two finished arms, as far as they are collected"
    for i, name in enumerate(('pool-2', 'pool-6')):
        folder = tmp_path/name/'report'
        folder.mkdir(parents=True)
        write_json(dict(preset='smollm2-135m', seed=i), folder/'provenance.json')
        metrics = pd.DataFrame([dict(stage='sft', feature=7, metric='gap', value=float(i))])
        write_table(metrics, folder/'metrics.parquet')
        pairs = pd.DataFrame([(1, 7, 4., 2., None), (1, 8, 8., 2., None), (1, 9, None, None, 'low_spread')],
                             columns=['round', 'feature', 'chosen_score', 'rejected_score', 'dropped'])
        write_table(pairs, folder/'pairs.parquet')
    return tmp_path


def test_every_arm_but_the_layers_has_a_preset():
    for name in ARMS:
        if not name.startswith('layer-'): arm_preset(name)


def test_a_layer_without_its_sae_is_named(tmp_path):
    with pytest.raises((ValueError, OSError), match='layer9'): arm_preset('layer-9', tmp_path)


def test_arms_are_collected_with_their_pairs(reports):
    collect_arms(['pool-2', 'pool-6'], reports, reports)
    assert read_table(reports/'arms.parquet').to_pandas()['arm'].tolist() == ['pool-2', 'pool-6']
    assert read_json(reports/'arms.json')['pool-6'] == dict(
        preset='smollm2-135m', seed=1, pairs=[dict(round=1, pairs=2, chosen=6., rejected=2.)])


def test_arms_that_were_collected_before_stay(reports):
    for name in ('pool-2', 'pool-6'): collect_arms([name], reports, reports)
    assert read_table(reports/'arms.parquet').to_pandas()['value'].tolist() == [0., 1.]
    assert list(read_json(reports/'arms.json')) == ['pool-2', 'pool-6']


def test_an_arm_that_is_collected_again_is_replaced(reports):
    for _ in range(2): collect_arms(['pool-2'], reports, reports)
    assert len(read_table(reports/'arms.parquet').to_pandas()) == 1


@pytest.mark.parametrize('like, taken', [(None, None), ('whole', 'whole')])
def test_each_arm_is_a_run_of_its_own(tmp_path, monkeypatch, like, taken):
    begun = []
    class Begun:
        def __init__(self, folder, preset, like): begun.append((folder.name, preset.n_candidates, like and like.name))
        def __enter__(self): return self
        def __exit__(self, *_): pass
    monkeypatch.setattr(studies, 'Run', Begun)
    monkeypatch.setattr(studies, 'execute', lambda run, say: say('done'))
    lines = []
    run_arms(['pool-2', 'pool-10'], tmp_path, like, lines.append)
    assert begun == [('pool-2', 2, taken), ('pool-10', 10, taken)]
    assert lines == ['pool-2:', 'done', 'pool-10:', 'done']


# the figure

@pytest.fixture
def arms():
    rows = [(arm, stage, feature, metric, .5) for arm in ('pool-2', 'pool-6') for stage in ('sft', 'dpo1')
            for metric in PANELS for feature in range(4)]
    return pd.DataFrame(rows, columns=['arm', 'stage', 'feature', 'metric', 'value'])


def test_arms_stand_from_left_to_right(arms):
    fig = arms_figure(arms, {'pool-6': '6', 'pool-2': '2'}, 'candidates', stages=('sft', 'dpo1'))
    for ax in fig.axes: assert [label.get_text() for label in ax.get_xticklabels()] == ['6', '2']


def test_the_arms_figure_draws_the_panels_it_is_asked_for(arms):
    fig = arms_figure(arms, {'pool-2': '2'}, 'candidates', panels=('input', 'gap'))
    assert [ax.get_title() for ax in fig.axes] == [PANELS['input'], PANELS['gap']]


def test_all_panels_of_arms_begin_at_zero(arms):
    fig = arms_figure(arms, {'pool-2': '2'}, 'candidates', stages=('sft', 'dpo1'))
    assert [ax.get_ylim()[0] for ax in fig.axes] == [0]*len(fig.axes)


def test_the_arms_figure_has_a_title(arms):
    fig = arms_figure(arms, {'pool-2': '2'}, 'candidates', title='By the pool')
    assert fig.get_suptitle().startswith('By the pool; ')


def test_the_legend_names_stages_and_chance(arms):
    fig = arms_figure(arms, {'pool-2': '2'}, 'candidates', stages=('sft', 'dpo1'))
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ['SFT', 'DPO 1', 'chance']


def test_without_the_output_score_there_is_no_chance(arms):
    fig = arms_figure(arms, {'pool-2': '2'}, 'candidates', stages=('sft',), panels=('gap',))
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ['SFT']
