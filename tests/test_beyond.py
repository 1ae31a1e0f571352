"Measures beyond the paper's on a tiny run: values, what is resumed, what is stored, and what is refused"
import dataclasses
import math
import pandas as pd
import pytest
from helpers import tiny_model, tiny_tokenizer
from judged import Scripted, feature, tiny_target
from saeexplainer.evaluation.beyond import TOGETHER, Instruments, Said, beyond_values
from saeexplainer.evaluation.detection import ListReader
from saeexplainer.evaluation.tables import BEYOND
from saeexplainer.measuring import values_table
from saeexplainer.metrics import Evaluation, evaluate
from saeexplainer.presets import load_preset
from saeexplainer.replies import Reply
from saeexplainer.store import RunStore
from saeexplainer.writers.local import LocalWriter

PRESET = load_preset('smollm2-135m', size='demo', n_generative=2, n_activating=1, n_neutral=1, text_tokens=6,
                     dtype='float32', batch_size=4)
TEXTS = {3: "the word 'rain'", 5: "words such as 'snow'", 8: ''}


@pytest.fixture(scope='module')
def machine(tmp_path_factory):
    model = tiny_model(n_layers=3)
    target = tiny_target(tmp_path_factory.mktemp('sae'), model=model)
    return target, LocalWriter(model, tiny_tokenizer())


FEATURES = [
    feature(3),
    feature(5, 'snow'),
    feature(8, 'park'),
    feature(9, test_contexts=()),
    feature(10, contexts=(), words=()),
    feature(11, max_act=0., status='dead', explanation=None),
    feature(12, max_act=math.nan),
    feature(13, max_act=None),
]


class Counting(Scripted):
    "Answers detection with numbers, and all else with a sentence"
    def write(self, requests, **_):
        self.asked += requests
        return [Reply('1, 2' if 'excerpts' in request.prompt else self.text) for request in requests]


@pytest.fixture
def run(machine, tmp_path):
    target, writer = machine
    with RunStore(tmp_path/'store.sqlite') as store:
        yield Evaluation(store, target, writer, writer, PRESET, FEATURES)


@pytest.fixture
def asked(run): # the same run with a writer that is asked, and counts
    writer = Counting('The rain fell on the park.')
    return dataclasses.replace(run, writer=writer, judge=writer), writer


def value(run, metric, index, stage='mine'):
    rows = run.store.metrics([stage])
    [found] = rows[(rows['metric'] == metric) & (rows['feature'] == index)]['value']
    return found


def test_groups_hold_every_measure_once():
    assert sorted(name for names in TOGETHER for name in names) == sorted(BEYOND)


def test_a_local_writer_measures_all(run):
    table = evaluate(run, {'mine': TEXTS}, BEYOND, progress=False)
    assert list(table.loc['mine'].index) == list(BEYOND)
    means = table['mean'].dropna()
    assert means.drop(('mine', 'simulation')).between(0, 1).all()
    assert -1 <= means['mine', 'simulation'] <= 1
    assert value(run, 'coverage', 3) == 1
    assert 0 <= value(run, 'detection', 3) <= 1


def test_an_empty_explanation_has_no_values(run):
    evaluate(run, {'mine': TEXTS}, BEYOND, progress=False)
    for metric in BEYOND: assert math.isnan(value(run, metric, 8))


def test_values_are_the_same_again_in_another_store(run, tmp_path):
    evaluate(run, {'mine': TEXTS}, BEYOND, progress=False)
    with RunStore(tmp_path/'other.sqlite') as store:
        evaluate(dataclasses.replace(run, store=store), {'mine': TEXTS}, BEYOND, progress=False)
        pd.testing.assert_frame_equal(store.metrics(), run.store.metrics())


def test_nothing_is_asked_twice(asked):
    run, writer = asked
    first = evaluate(run, {'mine': TEXTS}, BEYOND, progress=False)
    n = len(writer.asked)
    assert sum('excerpts' in request.prompt for request in writer.asked) == 2
    again = evaluate(run, {'mine': TEXTS}, BEYOND, progress=False)
    assert len(writer.asked) == n
    pd.testing.assert_frame_equal(first, again)


def test_another_measure_asks_for_no_detection_again(asked):
    run, writer = asked
    evaluate(run, {'mine': TEXTS}, ['detection'], progress=False)
    n = len(writer.asked)
    evaluate(run, {'mine': TEXTS}, ['balanced', 'detection', 'coverage', 'self_activation'], progress=False)
    assert len(writer.asked) == n


def test_another_method_costs_its_own_questions_alone(asked):
    run, writer = asked
    evaluate(run, {'mine': TEXTS}, ['detection'], progress=False)
    evaluate(run, {'mine': TEXTS, 'yours': {3: 'wet weather'}}, ['detection'], progress=False)
    assert len(writer.asked) == 3


def test_what_an_interruption_leaves_is_kept(asked, monkeypatch):
    run, writer = asked
    read = ListReader.read
    def breaks(self, sheets, progress=False):
        if sheets[0].claim.text == 'wet weather': raise KeyboardInterrupt
        return read(self, sheets, progress)
    monkeypatch.setattr(ListReader, 'read', breaks)
    stages = {'mine': TEXTS, 'yours': {3: 'wet weather'}}
    with pytest.raises(KeyboardInterrupt): evaluate(run, stages, ['coverage', 'detection'], progress=False)
    assert len(writer.asked) == 2
    assert value(run, 'coverage', 3, 'yours') == 0
    monkeypatch.undo()
    evaluate(run, stages, ['coverage', 'detection'], progress=False)
    assert len(writer.asked) == 3


@pytest.mark.parametrize('nonsense', ['', 'none', '99', '9'*5000, '<b>1'*1000])
def test_a_writer_of_nonsense_is_recorded_as_unavailable(run, nonsense):
    writer = Scripted(nonsense)
    table = evaluate(dataclasses.replace(run, writer=writer, judge=writer), {'mine': TEXTS}, BEYOND, progress=False)
    if nonsense.startswith('<'): return # of many numbers all are 1
    assert table.loc[('mine', 'detection'), 'unavailable'] == 3
    assert math.isnan(value(run, 'detection', 3))


@pytest.mark.parametrize('index, metrics', [
    (9, ['detection', 'balanced', 'simulation']), # no test contexts
    (10, ['coverage']), # no contexts
    (11, ['retrieval', 'retrieval_5', 'self_activation']), # never fires
    (12, ['retrieval', 'self_activation']), # its strongest activation is not known
    (13, ['retrieval', 'self_activation']),
])
def test_what_a_feature_lacks_is_unavailable(run, index, metrics):
    evaluate(run, {'mine': {3: 'rain', index: 'rain'}}, BEYOND, progress=False)
    for metric in metrics:
        assert math.isnan(value(run, metric, index)), metric
        assert not math.isnan(value(run, metric, 3)), metric


def test_one_feature_is_first_of_itself(run):
    evaluate(run, {'mine': {3: 'rain'}}, ['retrieval'], progress=False)
    assert value(run, 'retrieval', 3) == 1


def test_no_explanations_at_all(run):
    assert len(evaluate(run, {'mine': {}}, BEYOND, progress=False)) == 0


def test_a_very_long_explanation_is_unavailable_where_it_must_be_read(run):
    evaluate(run, {'mine': {3: 'rain '*700, 5: 'snow'}}, ['coverage', 'detection', 'self_activation'], progress=False)
    assert value(run, 'coverage', 3) == 1
    assert math.isnan(value(run, 'detection', 3))
    assert math.isnan(value(run, 'self_activation', 3))
    assert not math.isnan(value(run, 'detection', 5))


def test_retrieval_looks_among_those_that_compete(run):
    evaluate(run, {'mine': TEXTS}, ['retrieval'], progress=False, competing=[3, 5, 8, 9, 10, 11, 12, 13])
    assert value(run, 'retrieval', 3) in (0, 1)


@pytest.mark.parametrize('competing, line', [
    ([3, 5, 8, 99], "feature 99 competes, but it is not among the run's features"),
    ([3, 5], 'feature 8 is explained, but it is not among those that compete'),
    ([], 'feature 3 is explained, but it is not among those that compete'),
    ('all', 'all'),
])
def test_wrong_competitors_are_refused(run, competing, line):
    with pytest.raises(ValueError, match=line) as error:
        evaluate(run, {'mine': TEXTS}, ['retrieval'], progress=False, competing=competing)
    assert '\n' not in str(error.value)
    assert not len(run.store.explanations())


def test_places_among_different_features_are_not_mixed(run):
    evaluate(run, {'mine': TEXTS}, ['retrieval'], progress=False)
    with pytest.raises(ValueError, match=r"competing: '3 features .*' -> '4 features .*'\): use another store"):
        evaluate(run, {'mine': TEXTS | {9: 'land'}}, ['retrieval'], progress=False)
    evaluate(run, {'mine': TEXTS | {9: 'land'}}, ['coverage'], progress=False) # depends on no others
    evaluate(run, {'mine': TEXTS}, ['retrieval'], progress=False, competing=[8, 5, 3]) # the same in another order


def test_another_reader_can_be_given(run):
    reader = ListReader(Scripted('1'))
    evaluate(run, {'mine': {3: 'rain'}}, ['detection', 'balanced', 'simulation'], progress=False, reader=reader)
    assert len(reader.writer.asked) == 1
    assert math.isnan(value(run, 'simulation', 3)) # it answers with lists
    assert 0 <= value(run, 'balanced', 3) <= 1


def test_an_unknown_measure(run):
    with pytest.raises(ValueError, match="unknown metric 'recall': choose from generative, .*self_activation"):
        evaluate(run, {'mine': TEXTS}, ['recall'], progress=False)


def test_measures_stand_in_the_table_of_values(run):
    evaluate(run, {'mine': TEXTS}, ['generative', *BEYOND], progress=False)
    table = values_table(run.store)
    assert list(table.columns[3:]) == ['generative', *BEYOND]
    assert len(table) == 3


def test_only_what_is_asked_for_is_computed():
    reader = ListReader(Scripted('1'))
    found = beyond_values(Instruments(PRESET, reader=reader), [Said(FEATURES[0], 'rain')], {3: 4.}, ['coverage'])
    assert found == {'coverage': {3: 1.}}
    assert reader.writer.asked == []
