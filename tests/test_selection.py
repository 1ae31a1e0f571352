"Which features are meant: names, lists, ranges, and a draw at random; which of them can be measured"
import re
from dataclasses import replace
import pytest

from saeexplainer.cli import left_out
from saeexplainer.features import Context, Feature, FeatureId
from saeexplainer.measuring import beside_labels, measurable, not_covered
from saeexplainer.names import check_names, feature_of, listed, preset_and_names
from saeexplainer.presets import load_preset
from saeexplainer.selection import chosen_features

PRESET = load_preset('smollm2-135m')
FEATURES = [Feature(FeatureId('smollm2-135m', '9-res-4k', i), 'x', 1., .1, status='dead' if i == 2 else 'ok')
            for i in range(5)]


def test_dead_features_are_not_explained():
    with pytest.raises(ValueError, match='feature 2 is dead'): chosen_features(PRESET, ['2'], 0, 0, FEATURES)


def test_a_draw_at_random_is_repeated_and_leaves_out_the_dead():
    drawn = chosen_features(PRESET, ['3'], 3, 7, FEATURES)
    assert drawn == chosen_features(PRESET, ['3'], 3, 7, FEATURES)
    assert drawn[0].index == 3
    assert 2 not in [f.index for f in drawn]


def test_the_draw_of_a_seed_stays_as_it_was():
    assert [f.index for f in chosen_features(PRESET, [], 3, 0, FEATURES)] == [3, 0, 1]


@pytest.mark.parametrize('preset, name', [
    ('smollm2-135m', '4095'),
    ('gpt2-small-l8', '24575'),
    ('llama3.1-8b-l15', '32767'),
    ('gemma-2-27b-l10', '131071')])
def test_the_last_feature_has_a_name(preset, name):
    "Whether `k` is 1,000 or 1,024 in the name of its source"
    check_names(load_preset(preset), [name])


@pytest.mark.parametrize('preset, name, last', [
    ('smollm2-135m', '4096', 4095),
    ('gpt2-small-l8', 'gpt2-small/8-res-jb/24576', 24575)])
def test_a_feature_that_a_built_in_source_cannot_have(preset, name, last):
    with pytest.raises(ValueError, match=f'features 0 to {last}'): check_names(load_preset(preset), [name])


def test_a_source_of_ones_own_may_be_called_otherwise():
    check_names(load_preset('smollm2-135m', source='mine/9-res-4k'), ['4096'])


def test_a_feature_of_another_preset():
    with pytest.raises(ValueError, match='is a feature of gpt2-small/8-res-jb, the preset explains'):
        feature_of(PRESET, 'gpt2-small/8-res-jb/7')


@pytest.mark.parametrize('name', ['-1', '1.5', 'rain'])
def test_what_is_no_index(name):
    says = rf"'{re.escape(name)}' is not a feature: an index is a whole number, 0 to 4095; in full it is "
    with pytest.raises(ValueError, match=says): feature_of(PRESET, name)
    own = load_preset('smollm2-135m', source='mine/res')
    with pytest.raises(ValueError, match='an index is a whole number, 0 or more; in full'): feature_of(own, name)


@pytest.mark.parametrize('name, says', [
    ('-1', "'smollm2-135m/9-res-4k/123'; an index is a whole number, 0 or more$"),
    ('a/b/1.5', "'smollm2-135m/9-res-4k/123'; an index is a whole number, 0 or more$"),
    ('a/b', "'smollm2-135m/9-res-4k/123'$")])
def test_what_is_no_name(name, says):
    with pytest.raises(ValueError, match=says): FeatureId.parse(name)


@pytest.mark.parametrize('names, says', [
    (['0', '1'], ''),
    (['0', '2'], '1 of 2 features are left out: 1 dead (2)'),
    (['2', '9', 'other/x/1'], '3 of 3 features are left out: 1 dead (2); 2 unknown (9, other/x/1)'),
    ([str(i) for i in range(3, 12)], '7 of 9 features are left out: 7 unknown (5, 6, 7, 8, 9 ...)')])
def test_which_features_are_left_out(names, says):
    assert left_out(names, FEATURES) == says


@pytest.mark.parametrize('names, preset, left', [
    (['-1', '1.5'], 'smollm2-135m', ['-1', '1.5']),
    (['5', '6'], 'smollm2-135m', ['5', '6']),
    (None, 'smollm2-135m', []),
    (['gemma-2-9b-l20', '5'], 'gemma-2-9b-l20', ['5']),
    (['mine.yaml'], 'mine.yaml', []),
    (['gpt2-small/8-res-jb/7'], 'gpt2-small-l8', ['gpt2-small/8-res-jb/7']),
    (['gemma-2-9b-l20', '5-6'], 'gemma-2-9b-l20', ['5', '6']),
    (['5,8'], 'smollm2-135m', ['5', '8'])])
def test_which_preset_is_meant(names, preset, left):
    assert preset_and_names(names) == (preset, left)


def test_the_option_names_the_preset():
    assert preset_and_names(['7'], 'gpt2-small-l8') == ('gpt2-small-l8', ['7'])


def test_lists_and_ranges_of_features():
    assert listed(['5,8', '10-12', '3 4']) == ['5', '8', '10', '11', '12', '3', '4']
    assert listed(['a/b/1', 'mine.yaml']) == ['a/b/1', 'mine.yaml']
    assert listed(None) == []


@pytest.mark.parametrize('name, says', [
    ('8-5', 'write the smaller index first'),
    ('0-100000', 'a range of too many features')])
def test_ranges_that_are_none(name, says):
    with pytest.raises(ValueError, match=says): listed([name])


def test_what_can_be_measured():
    assert measurable(['0', 'smollm2-135m/9-res-4k/1', '2', '9'], FEATURES) == [True, True, False, False]


def test_labels_stand_beside():
    assert beside_labels('mine', FEATURES[:1], ['y']) == {'mine': {0: 'y'}, 'label': {0: 'x'}}


def test_features_without_a_word_at_a_peak_have_no_coverage():
    with_word = Context('test', ['a', ' cat'], [0., 4.], 1)
    without = Context('test', ['a', ' .'], [0., 4.], 1)
    features = [replace(FEATURES[0], contexts=contexts) for contexts in ([with_word], [without], [])]
    assert not_covered(features[:1]) == ''
    assert not_covered(features).startswith('coverage leaves out 2 of 3 features')
