"Figures: one style, reproducible files, marks that keep their meaning"
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from saeexplainer.plots import (
    CHANCE, COLORS, CONTROLS, MARKS, NAMES, PANELS, WITH_INTERVALS, Figure, color, from_zero, interval_plot, key, named,
    ranking_figure, save_figure, scale_of, stage_figure, style,
)


@pytest.fixture
def axis():
    with style(): return Figure(figsize=(3, 2)).subplots()


def intervals(**stages): # DataFrame as `interval_plot` takes it
    return pd.DataFrame(stages, index=['mean', 'low', 'high']).T


def metrics_of(stages, n=5): # a constant value of each metric
    rows = [(stage, feature, metric, .5) for stage in stages for metric in PANELS for feature in range(n)]
    return pd.DataFrame(rows, columns=['stage', 'feature', 'metric', 'value'])


def test_every_method_has_a_colour_a_name_and_a_mark():
    assert set(COLORS) == set(NAMES) == set(MARKS)


def test_a_method_of_the_user_has_a_colour_and_keeps_its_name():
    assert named('mine') == 'mine'
    assert color('mine') not in COLORS.values()


def test_shares_are_drawn_in_per_cent():
    assert {metric: scale_of(metric) for metric in PANELS} == dict(generative=100, input=100, output=100, gap=1)


def test_the_style_ends_with_the_block():
    before = matplotlib.rcParams['font.size']
    with style(): assert matplotlib.rcParams['font.size'] == 9
    assert matplotlib.rcParams['font.size'] == before


def test_the_style_ends_with_an_error():
    before = dict(matplotlib.rcParams)
    with pytest.raises(KeyError), style(): raise KeyError('here')
    assert dict(matplotlib.rcParams) == before


def test_an_interval_is_a_line_and_a_mark(axis):
    interval_plot(axis, intervals(sft=(.5, .4, .6)), scale=100)
    line, mark = axis.lines
    assert line.get_xdata() == pytest.approx([40, 60])
    assert mark.get_xdata() == pytest.approx([50])
    assert [text.get_text() for text in axis.texts] == ['50.0']


def test_a_mean_that_is_not_known_leaves_its_row_empty(axis):
    interval_plot(axis, intervals(sft=(np.nan,)*3, dpo1=(.5, .4, .6)))
    assert [label.get_text() for label in axis.get_yticklabels()] == ['SFT', 'DPO 1']
    assert len(axis.lines) == 2
    assert axis.lines[1].get_ydata() == [1]


def test_the_stage_figure_has_a_panel_for_each_metric():
    fig = stage_figure(metrics_of(['label', 'sft']), ('label', 'sft'))
    assert [ax.get_xlabel() for ax in fig.axes] == list(PANELS.values())


def test_the_stage_figure_marks_chance_in_the_output_score_alone():
    fig = stage_figure(metrics_of(['sft']), ['sft'], chance=.25)
    marked = {ax.get_xlabel(): text.get_position()[0] for ax in fig.axes for text in ax.texts
              if text.get_text() == 'chance'}
    assert marked == {PANELS['output']: 25}


def test_a_stage_without_values_keeps_its_row():
    fig = stage_figure(metrics_of(['sft']), ('sft', 'dpo1'))
    assert len(fig.axes[0].get_yticks()) == 2


def told(fig): # texts of its keys
    return [text.get_text() for legend in fig.legends for text in legend.get_texts()]


def test_a_key_says_what_lines_and_marks_are():
    with style(): fig = Figure(figsize=(4, 2))
    key(fig, {'chance': CHANCE, 'the judge': CONTROLS})
    assert told(fig) == ['chance', 'the judge']
    dotted, star = fig.legends[0].get_lines()
    assert (dotted.get_linestyle(), star.get_marker()) == (':', '*')


@pytest.mark.parametrize('direction', ['x', 'y'])
def test_an_axis_begins_at_zero(axis, direction):
    axis.plot([7, 8], [7, 8])
    from_zero(axis, direction)
    assert getattr(axis, f'get_{direction}lim')()[0] == 0


def test_an_axis_shows_what_lies_below_zero(axis):
    axis.plot([-1, 8], [0, 0])
    from_zero(axis)
    assert axis.get_xlim()[0] <= -1


def test_the_figures_of_methods_name_their_dotted_lines():
    metrics = metrics_of(['sft', 'random label'])
    assert told(stage_figure(metrics, ['sft'])) == [WITH_INTERVALS, 'chance']
    assert told(ranking_figure(metrics, ['sft', 'random label'])) == [WITH_INTERVALS, 'chance: random label']
    assert told(ranking_figure(metrics, ['sft'])) == [WITH_INTERVALS]


def test_the_panels_of_stages_begin_at_zero():
    fig = stage_figure(metrics_of(['sft']), ['sft'])
    assert [ax.get_xlim()[0] for ax in fig.axes] == [0]*len(PANELS)


def test_pyplot_does_not_know_our_figures():
    before = plt.get_fignums()
    fig = stage_figure(metrics_of(['sft']), ['sft'])
    assert plt.get_fignums() == before
    assert fig._repr_png_().startswith(b'\x89PNG')


@pytest.mark.parametrize('ending', ['png', 'svg'])
def test_a_figure_that_is_drawn_again_has_the_same_bytes(tmp_path, ending):
    for folder in ('one', 'other'): save_figure(stage_figure(metrics_of(['sft']), ['sft']), 'stages', tmp_path/folder)
    assert (tmp_path/'one'/f'stages.{ending}').read_bytes() == (tmp_path/'other'/f'stages.{ending}').read_bytes()
