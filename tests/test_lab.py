"The front door: names that load when they are used, and a lab on a tiny real model"
import os
import subprocess
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import tiny_sae

import saeexplainer as sx
from saeexplainer import explainer
from saeexplainer.evaluation.texts import Verified
from saeexplainer.features import Feature, FeatureId
from saeexplainer.lab import Features, KeptStore, Lab, ReadText, SteeredText, hits_table
from saeexplainer.metrics import evaluate
from saeexplainer.reranking import draw_candidates, rank_candidates
from saeexplainer.self_activation import known_maxima
from saeexplainer.steering import SteeringValue
from saeexplainer.store import RunStore
from saeexplainer.target import Reading

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\u202e'
NAMES = ['Explainer', 'FeatureExplorer', 'FeatureReader', 'Preset', 'Run', 'RunStore', 'Target', 'evaluate', 'load',
         'load_features', 'load_preset', 'verify']


def python(code): # what a process of its own prints
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def elements(html): # names of all elements of a page
    found = set()
    class Read(HTMLParser):
        def handle_starttag(self, tag, attrs): found.add(tag)
    Read().feed(html)
    return found


@pytest.fixture(scope='module')
def world(explained_lab):
    "A tiny lab with an explainer, whose data are those that are shipped"
    with explained_lab.in_use(): yield explained_lab


@pytest.fixture(scope='module')
def lab(world):
    with Lab(world.preset(), explainer=world.explainer) as lab: yield lab


# ---- the package

def test_the_package_is_imported_in_no_time():
    code = 'import time\nstart = time.process_time()\nimport saeexplainer\nprint(time.process_time() - start)'
    assert min(float(python(code)) for _ in range(3)) < .05


def test_nothing_heavy_is_imported_with_it():
    loaded = python('import sys, saeexplainer\nprint(*sys.modules)').split()
    assert not {'torch', 'pandas', 'numpy', 'transformers', 'pyarrow'} & set(loaded)


def test_its_names_are_listed_before_they_are_used():
    assert set(NAMES) <= set(python('import saeexplainer\nprint(*dir(saeexplainer))').split())


@pytest.mark.parametrize('name', NAMES)
def test_each_name_is_there(name):
    found = getattr(sx, name)
    assert found.__name__ == name
    assert found.__module__.startswith('saeexplainer.')


def test_names_can_be_imported_from_the_package():
    assert python('from saeexplainer import Preset, load_preset\nprint(Preset.__name__)') == 'Preset'


def test_modules_can_be_imported_from_the_package():
    assert explainer.Explainer is sx.Explainer


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'saeexplainer' has no attribute 'nothing'"): _ = sx.nothing


def test_the_version_is_that_of_the_settings():
    settings = ConfigParser(interpolation=None)
    settings.read(Path(__file__).parents[1]/'settings.ini', encoding='utf-8')
    assert sx.__version__ == settings['DEFAULT']['version']


# ---- what is loaded, and when

def test_a_lab_loads_nothing_at_first(world):
    for what in (world.preset(), str(world.file), world.file):
        lab = sx.load(what)
        assert lab.loaded == []
        assert lab.preset.name == 'tiny'


def test_parts_load_when_they_are_used(world):
    lab = sx.load(world.preset())
    assert lab.features[3].explanation.startswith('the word')
    assert lab.loaded == ['features']
    lab.read('a cat', 3)
    assert lab.loaded == ['features', 'reader', 'target']


def test_fields_of_the_preset_may_differ(world):
    assert sx.load(world.file, n_generative=7).preset.n_generative == 7


def test_a_model_and_an_sae(world):
    preset = world.preset()
    lab = sx.load((preset.target, world.sae), device='cpu', dtype='float32')
    assert lab.preset.layer == preset.layer
    read = lab.read('a cat', 3)
    np.testing.assert_allclose(read.values, sx.load(preset).read('a cat', 3).values, atol=1e-5)
    assert np.isnan(read.strongest) # no file of features knows it
    assert not read.share()


def test_a_model_and_an_sae_of_a_preset_are_that_preset():
    assert sx.load(('smollm2-135m-instruct', 'smollm2-135m/sae')).preset == sx.load_preset('smollm2-135m')


@pytest.mark.parametrize('what', [5, ('model', 'sae', 'more'), None])
def test_what_is_no_lab(what):
    with pytest.raises(ValueError, match='is no lab: give the name of a preset, a YAML file, a Preset'): sx.load(what)


def test_the_nearest_preset_is_named():
    with pytest.raises(ValueError, match='did you mean smollm2-135m'): sx.load('smollm2')


def test_features_of_another_sae_are_refused(world, tmp_path):
    other = sx.FeatureReader.load(tiny_sae(tmp_path/'sae', d_sae=20, layer=1))
    with pytest.raises(ValueError, match='it is the file of another SAE'): Lab(world.preset(), reader=other)


# ---- what can be asked

def test_features_are_named_by_index(lab):
    assert len(lab.features) == 40
    assert lab.features[5].index == 5
    assert lab.index_of('tiny/1-res/5') == lab.index_of(5) == lab.index_of(FeatureId('tiny', '1-res', 5)) == 5


def test_a_feature_that_does_not_exist(lab):
    with pytest.raises(KeyError, match='there is no feature 99: tiny/1-res has features 0 to 39'): lab.features[99]
    assert 99 not in lab.features
    assert lab.features.get(99) is None


def test_a_feature_of_another_sae(lab):
    with pytest.raises(ValueError, match='the preset explains tiny/1-res: name its preset'):
        lab.read('a', 'gpt2-small/8-res-jb/7')
    with pytest.raises(ValueError, match='is not a feature'): lab.read('a', True)


def test_explanations_are_those_of_the_explainer(lab):
    texts = lab.explain([5, 'tiny/1-res/13'])
    one = lab.explainer.explain(lab.reader.directions([5, 13]), max_new_tokens=lab.preset.explanation_tokens)
    assert texts == dict(zip((5, 13), one))
    assert lab.explain(5) == {5: one[0]}


def test_a_dead_feature_is_not_explained(lab):
    with pytest.raises(ValueError, match='is zero'): lab.explain(7)


def test_the_best_of_several_explanations(lab):
    drawn = draw_candidates(lab.explainer, lab.reader, [5, 13], lab.preset, 3)
    known = known_maxima(lab.features.values())
    ranked = rank_candidates(lab.preset, lab.target, known, dict(zip([5, 13], drawn)))
    assert lab.explain([5, 'tiny/1-res/13'], candidates=3) == {i: one.best.text for i, one in ranked.items()}
    assert lab.explain(5, candidates=3) == {5: ranked[5].best.text} # whatever is explained beside it


def test_candidates_are_counted_from_none(lab):
    assert lab.explain(5, candidates=0) == lab.explain(5)
    with pytest.raises(ValueError, match='-2 candidates cannot be drawn'): lab.explain(5, candidates=-2)


def test_what_is_read_is_what_the_target_reads(lab):
    read = lab.read('the cat sat', 5)
    [reading] = lab.target.activations(['the cat sat'], 5)
    assert ''.join(read.tokens) == 'the cat sat'
    np.testing.assert_array_equal(read.values, reading.values)
    assert read.strongest == lab.features[5].max_act


def test_hits_are_those_of_the_metric(lab):
    table = lab.verify({5: 'the word cat', 'tiny/1-res/6': 'rain'}, n=3)
    assert table.columns.tolist() == ['feature', 'text', 'activation', 'hit', 'fresh']
    assert table['fresh'].isna().all() # nothing is known of this preset
    assert table['feature'].tolist() == [5]*3 + [6]*3
    for row in table.itertuples():
        if not isinstance(row.text, str): continue
        [read] = lab.target.max_acts([row.text], row.feature)
        assert row.activation == pytest.approx(read, abs=1e-4)
    made = table[table['activation'].notna()]
    assert (made['hit'] == (made['activation'] > .5)).all() # the strongest activation of each is 1
    assert table['hit'].isna().equals(table['activation'].isna())


def test_fresh_is_that_of_the_count():
    known = pd.DataFrame(dict(stage='all', texts=2, reached=[0, 1, 2], fresh=[.1, .5, .8]))
    checked = [Verified(5, ['rain', 'sun', None], np.array([9., 1., np.nan])), Verified(6, ['sea'], np.array([1.]))]
    table = hits_table(checked, {5: 10., 6: np.nan}, .5, known)
    assert table['fresh'].tolist()[:3] == [.5]*3
    assert np.isnan(table['fresh'].tolist()[3])


def test_an_empty_explanation_has_no_texts(lab):
    assert lab.verify({5: ' '}, n=2)['text'].isna().all()


@pytest.mark.parametrize('explanations, says', [
    (['the word cat'], 'explanations are {feature: text}'),
    ({5: None}, 'the explanation of feature 5 is None, not a text')])
def test_what_is_no_explanation(lab, explanations, says):
    with pytest.raises(ValueError, match=says): lab.verify(explanations)


def test_steering_is_beside_the_model_as_it_is(lab):
    text = lab.steer('a cat', 5, .01, n_tokens=3)
    assert text.plain == lab.steer('a cat', 5, 0, n_tokens=3).plain
    assert list(text.texts()) == ['as it is', 'steered, +0.01']
    assert text.clamp is lab.clamp(5, .01) # searched for once


def test_a_kl_that_is_no_number(lab):
    with pytest.raises(ValueError, match='the steering is nan nats'): lab.steer('a cat', 5, float('nan'))


# ---- measuring

def test_what_is_measured_is_what_evaluate_measures(world, tmp_path):
    with Lab(world.preset(), folder=tmp_path/'kept') as lab:
        table = lab.evaluate({'mine': {5: 'the word cat', 6: 'rain'}}, progress=False)
        assert set(table.index.get_level_values(0)) >= {'mine', 'label'}
        assert set(table.loc['mine'].index) >= {'generative', 'input', 'output'}
        again = lab.evaluate({'mine': {5: 'the word cat', 6: 'rain'}}, progress=False)
    pd.testing.assert_frame_equal(table, again)
    written = sorted(file.name for file in (tmp_path/'kept').glob('*.csv'))
    assert written == ['explanations.csv', 'summary.csv', 'texts.csv']


def test_evaluate_takes_a_lab(world):
    with Lab(world.preset()) as lab:
        table = evaluate(lab, {'mine': {5: 'the word cat'}}, ['generative'], progress=False)
    assert table.loc[('mine', 'generative'), 'n'] == 1


def test_a_training_run_is_left_alone(world, tmp_path):
    with RunStore(tmp_path/'store.sqlite') as store: store.start('sft')
    lab = Lab(world.preset(), folder=tmp_path)
    with pytest.raises(ValueError, match='is a training run'): lab.evaluate({'mine': {5: 'x'}})


def test_a_temporary_store_is_removed():
    kept = KeptStore(None)
    file = kept.open().path
    assert kept.open().path == file
    kept.close()
    assert not os.path.exists(os.path.dirname(file))


# ---- what is shown

def test_a_lab_says_what_it_is(world):
    lab = sx.load(world.preset())
    assert repr(lab) == 'Lab of tiny: features of tiny/1-res; loaded: nothing yet'
    assert elements(lab._repr_html_()) == {'style', 'div', 'table', 'tr', 'th', 'td'}


def test_nothing_that_is_shown_runs():
    feature = Feature(FeatureId(HOSTILE, HOSTILE, 5), HOSTILE, 5., .01)
    read = ReadText(5, Reading([HOSTILE], np.array([4.])), 5.)
    steered = SteeredText(5, HOSTILE, .5, HOSTILE, HOSTILE, SteeringValue(8., .4, False))
    for shown in (feature, Features(HOSTILE, [feature]), read, steered):
        html = shown._repr_html_()
        assert elements(html) <= {'style', 'div', 'table', 'tr', 'th', 'td', 'span', 'p', 'b', 'h2', 'h3'}
        assert not {'\x1b', '\u202e'} & set(html + repr(shown).replace(HOSTILE, ''))


def test_a_text_without_tokens_is_shown(lab):
    assert 'largest nan' in repr(lab.read('', 5))


def test_texts_do_not_drive_a_terminal():
    read = ReadText(5, Reading([HOSTILE], np.array([4.])), 5.)
    steered = SteeredText(5, HOSTILE, 0, HOSTILE, None, None)
    assert '\x1b' not in repr(read) + repr(steered)


# ---- directions and indices

def test_indices_are_no_directions(lab):
    with pytest.raises(ValueError, match=r'reader.directions\(\[5, 13\]\)'): lab.explainer.explain([5, 13])


# ---- the explorer of a lab

def test_an_explorer_of_a_lab(world):
    lab = Lab(world.preset(), explainer=world.explainer)
    explorer = sx.FeatureExplorer(lab, feature=5)
    assert explorer.explain() == lab.explain(5)[5]
    assert explorer.lab is lab
