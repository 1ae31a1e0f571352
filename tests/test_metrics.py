"Edge cases of the metrics and of the stages behind them"
import json
import math
from types import SimpleNamespace
import numpy as np
import pandas as pd
import pytest
from helpers import tiny_model, tiny_sae, tiny_tokenizer
from saeexplainer.evaluation.judge import judge_locally
from saeexplainer.evaluation.steering import control_features, steer
from saeexplainer.evaluation.stats import bootstrap_ci, sign_flip
from saeexplainer.evaluation.tables import agreement, compare, stage_table, summary
from saeexplainer.evaluation.texts import Claim, claims_of, verify
from saeexplainer.metrics import (
    Evaluation, discriminative_gap, evaluate, generative_accuracy, input_score, mean_activation, names_word,
    output_score, repeats,
)
from saeexplainer.presets import load_preset
from saeexplainer.replies import Reply
from saeexplainer.saes import FeatureReader
from saeexplainer.store import RunStore
from saeexplainer.target import Target
from saeexplainer.writers.local import LocalWriter

nan = math.nan


# pure functions

def test_all_comparisons_are_strict():
    assert generative_accuracy([[5., 5.0001]], [10.]).tolist() == [.5]
    half, whole = (np.array(x, dtype=np.float32) for x in ([[5.]], [10.]))
    assert generative_accuracy(half, whole).tolist() == [0.]
    assert input_score([[1., 2.]], [[2., 1.]]).tolist() == [0.]
    assert discriminative_gap([[1., 2.]], [[2., 1.]]).tolist() == [0.]


def test_a_text_at_the_threshold_counts_by_the_published_rules():
    assert generative_accuracy([[5., 4.9, 5.1, nan]], [10.], inclusive=True).tolist() == [2/3]
    assert generative_accuracy([[5., 4.9, 5.1, nan]], [10.]).tolist() == [1/3]


@pytest.mark.parametrize('feature_max', [0., nan, -1.])
def test_published_rules_score_no_dead_feature(feature_max):
    assert np.isnan(generative_accuracy([[0.]], [feature_max], inclusive=True)).all()


def test_texts_that_could_not_be_made_are_left_out():
    assert generative_accuracy([[nan, 9., nan]], [10.]).tolist() == [1.]
    assert mean_activation([[nan, 4.], [None, 2.]]).tolist() == [4., 2.]
    assert input_score([[nan, 3.]], [[2., nan]]).tolist() == [1.]


@pytest.mark.parametrize('value', [
    generative_accuracy([[nan, nan]], [10.]), generative_accuracy(np.empty((1, 0)), [10.]),
    generative_accuracy([[1.]], [0.]), generative_accuracy([[1.]], [nan]), mean_activation([[nan]]),
    input_score([[nan]], [[1.]]), input_score([[1.]], [[nan]]), discriminative_gap([[1.]], [[nan]]),
    output_score([None], [0]), output_score([nan], [0])])
def test_nothing_to_go_by_is_nan_and_never_zero(value):
    assert value.shape == (1,)
    assert np.isnan(value[0])


def test_one_value_per_feature_without_warnings(recwarn):
    acts = np.where(np.random.default_rng(0).random((7, 5)) < .3, nan, 1.)
    for value in (generative_accuracy(acts, np.ones(7)), mean_activation(acts), input_score(acts, acts[:, :2]),
                  discriminative_gap(acts, acts)):
        assert value.shape == (7,)
    assert mean_activation(np.empty((0, 4))).shape == (0,)
    assert not recwarn.list


@pytest.mark.parametrize('call, line', [
    (lambda: generative_accuracy([1., 2.], [1.]), r'max_acts must have the shape \(n_features, n_texts\), not \(2,\)'),
    (lambda: generative_accuracy([[1.], [2.]], [1.]), 'feature_max must hold one value for each of the 2 features'),
    (lambda: input_score([[1.]], [[1.], [2.]]), 'activating has 1 features, neutral 2'),
    (lambda: discriminative_gap([[1.]], [[1.], [2.]]), 'high has 1 features, low 2'),
    (lambda: output_score([0, 1], [0]), '2 choices came with 1 right answers')])
def test_bad_input_is_refused_in_one_line(call, line):
    with pytest.raises(ValueError, match=line) as e: call()
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('explanation, words, named', [
    ("the word 'National'", ['national'], True), ('nationality', ['national'], False), ('', ['a'], False),
    ('a national-park', ['national'], True), ('STRASSE', ['Straße'], True), ("don't", ["don't"], True),
    ('don', ["don't"], False), ('c++ code', ['C++'], True), ('c code', ['C++'], False),
    ('New  York', ['new york'], True), ('words', ['pass'], False), ('words', [], False)])
def test_names_word(explanation, words, named): assert names_word(explanation, words) is named


def test_only_the_first_words_count():
    assert names_word('x '*19 + 'national', ['national'])
    assert not names_word('x '*20 + 'national', ['national'])


# stages on a tiny model

PRESET = dict(size='demo', n_generative=3, n_activating=2, n_neutral=2, text_tokens=6, steering_tokens=4,
              steering_kl=(.3,), n_output=3, n_test=6, dtype='float32')
EXPLANATIONS = {'label': {3: "the word 'rain'", 5: "words such as 'cat', 'dog'", 8: "the word 'park'"},
                'sft': {3: 'weather', 5: "words such as 'cat', 'dog'", 8: ''},
                'dpo1': {3: 'the word Rain', 5: 'animals', 8: 'the sea'}}


@pytest.fixture(scope='module')
def machine(tmp_path_factory):
    "A target, a local writer and features on a tiny random model"
    model = tiny_model()
    tokenizer = tiny_tokenizer()
    reader = FeatureReader.load(tiny_sae(tmp_path_factory.mktemp('sae')))
    words = {3: ('rain',), 5: ('cat', 'dog'), 8: ('park',)}
    features = [SimpleNamespace(id=SimpleNamespace(index=i), max_act=0. if i == 11 else 2., words=words.get(i, ()))
                for i in range(12)]
    target = Target(model, tokenizer, reader)
    return SimpleNamespace(target=target, writer=LocalWriter(model, tokenizer), features=features)


@pytest.fixture
def store(tmp_path):
    with RunStore(tmp_path/'store.sqlite') as store: yield store


def evaluation(machine, store, writer=None, judge=None, **preset):
    preset = load_preset('smollm2-135m', **PRESET | preset)
    writer = writer or machine.writer
    return Evaluation(store, machine.target, writer, judge or machine.writer, preset, machine.features)


def dump(store):
    tables = ('explanations', 'texts', 'steering', 'steered_texts', 'judgements', 'metrics')
    return {table: store.table(table) for table in tables}


def same(a, b): # the judge's scores to rounding: other batches, other last digits
    def exact(frame): return frame.drop(columns='scores', errors='ignore')
    for t in a: pd.testing.assert_frame_equal(exact(a[t]), exact(b[t]))
    for x, y in zip(a['judgements'].scores, b['judgements'].scores):
        x, y = (json.loads(scores) for scores in (x, y))
        assert x['order'] == y['order']
        assert x['scores'] == pytest.approx(y['scores'], abs=1e-3)


class Scripted:
    "A writer with answers of its own, in the place of a capable one"
    def __init__(self, answer):
        self.answer = answer
        self.requests = []
    def write(self, requests, schema=None, choices=None, stage='', progress=False):
        self.requests += [(r, schema, choices) for r in requests]
        return [Reply(text=self.answer(r, schema, choices)) for r in requests]


class Dies(Exception): pass

class Mortal:
    "A writer or target that dies when the calls that it shares with others are used up"
    def __init__(self, inner, clock):
        self.inner = inner
        self.clock = clock
    def __getattr__(self, name):
        method = getattr(self.inner, name)
        if not callable(method): return method
        def call(*args, **kw):
            self.clock['left'] -= 1
            if self.clock['left'] < 0: raise Dies
            return method(*args, **kw)
        return call


def test_evaluate_from_end_to_end(machine, store):
    run = evaluation(machine, store)
    table = evaluate(run, EXPLANATIONS, progress=False)
    assert {'n', 'mean', 'low', 'high', 'unavailable', 'failures', 'empty'} == set(table.columns)
    assert list(table.index.get_level_values(0).unique()) == ['label', 'sft', 'dpo1', 'control']
    assert table.loc[('sft', 'generative'), 'unavailable'] >= 1
    assert table.loc[('sft', 'generative'), 'empty'] == 1 # nothing is said of feature 8
    assert not len(store.texts('sft', 'generative').query('feature == 8'))
    assert pd.isna(value(store, 'sft', 8, 'output'))
    assert pd.isna(value(store, 'sft', 8, 'names_word'))
    assert [value(store, stage, 3, 'names_word') for stage in ('label', 'dpo1', 'sft')] == [1, 1, 0]
    assert value(store, 'sft', 3, 'names_other') == 0
    before = dump(store)
    assert evaluate(run, EXPLANATIONS, progress=False).equals(table)
    same(before, dump(store))
    assert '-' not in stage_table(table).loc['label', ['generative', 'gap']].tolist()


def value(store, stage, feature, metric):
    rows = store.metrics(stage)
    return rows[(rows.feature == feature) & (rows.metric == metric)].value.item()


def test_values_are_those_of_the_pure_functions(machine, store):
    run = evaluation(machine, store)
    evaluate(run, EXPLANATIONS, progress=False)
    texts = store.texts('dpo1')
    for f in (3, 5, 8):
        read = {kind: machine.target.max_acts(rows.text.fillna('').tolist(), f)[None]
                for kind, rows in texts[texts.feature == f].groupby('kind')}
        accuracy = generative_accuracy(read['generative'], [2.]).item()
        assert value(store, 'dpo1', f, 'generative') == pytest.approx(accuracy, nan_ok=True)
        gap = discriminative_gap(read['activating'], read['neutral']).item()
        assert value(store, 'dpo1', f, 'gap') == pytest.approx(gap, abs=1e-4, nan_ok=True)


def test_equal_explanations_have_equal_values_whenever_they_come(machine, store):
    run = evaluation(machine, store)
    evaluate(run, {'sft': {3: 'rain', 5: 'cats'}}, progress=False)
    asked = len(store.texts())
    later = {'dpo1': {3: 'rain', 5: 'dogs'}, 'again': {3: 'rain', 5: 'cats'}} # and without the stage 'sft'
    evaluate(run, later, progress=False)
    evaluate(run, {'sft': {3: 'rain', 5: 'cats'}, 'late': {3: 'rain'}}, progress=False)
    assert asked == 2*7
    assert len(store.texts().drop_duplicates(['feature', 'kind', 'j', 'text'])) <= 3*7 # only the dogs are new
    wide = store.metrics().pivot(index=['feature', 'metric'], columns='stage', values='value')
    of3 = wide.loc[3].drop(index=['missed_kl'])
    for stage in ('dpo1', 'again', 'late'): pd.testing.assert_series_equal(of3[stage], of3.sft, check_names=False)
    pd.testing.assert_series_equal(wide.loc[5].again, wide.loc[5].sft, check_names=False)


def test_evaluation_that_dies_anywhere_ends_the_same(machine, store, tmp_path):
    def mortal(other, calls):
        clock = {'left': calls}
        run = evaluation(machine, other, Mortal(machine.writer, clock), Mortal(machine.writer, clock), batch_size=16)
        run.target = Mortal(machine.target, clock)
        return run, clock
    run, clock = mortal(store, 1000)
    evaluate(run, EXPLANATIONS, progress=False)
    whole = dump(store)
    total = 1000 - clock['left']
    for calls in range(1, total, total//5):
        with RunStore(tmp_path/f'{calls}.sqlite') as other:
            with pytest.raises(Dies): evaluate(mortal(other, calls)[0], EXPLANATIONS, progress=False)
            evaluate(evaluation(machine, other, batch_size=16), EXPLANATIONS, progress=False)
            same(whole, dump(other))


def test_steering_draws_controls_per_feature_and_is_made_once(machine, store):
    run = evaluation(machine, store, steering_kl=(.3, -.2))
    assert steer(store, machine.target, [3, 5], run.preset, range(12)) > 0
    rows = store.steering()
    assert len(rows) == 2*3*2
    assert not rows.duplicated(['feature', 'steered', 'kl_target']).any()
    assert (rows[rows.control == 0].steered == rows[rows.control == 0].feature).all()
    assert rows[rows.feature == 3].steered.unique().tolist() == [3, *control_features(3, range(12), 2, run.preset.seed)]
    before = dump(store)
    assert steer(store, machine.target, [5, 3], run.preset, range(12)) == 0
    same(before, dump(store))


def test_a_missed_kl_target_is_left_out_and_counted(machine, store):
    run = evaluation(machine, store, steering_kl=(.3, 1e6))
    table = evaluate(run, EXPLANATIONS, progress=False)
    missed = store.steering().query('kl_target == 1e6')
    assert len(missed) == 9
    assert not missed.reached.any()
    assert missed.kl.notna().all()
    assert set(store.steered_texts().kl_target) <= {.3}
    assert table.loc[('label', 'output'), 'failures'] >= 3


def test_no_kl_target_left_no_output_score(machine, store):
    table = evaluate(evaluation(machine, store, steering_kl=(1e6,)), EXPLANATIONS, progress=False)
    assert not len(store.steered_texts())
    assert set(store.judgements().stage) <= {'control'}
    assert table.loc[('dpo1', 'output'), ['n', 'unavailable']].tolist() == [0, 3]
    assert math.isnan(table.loc[('dpo1', 'output'), 'mean'])


def test_steering_needs_enough_live_features(machine, store):
    with pytest.raises(ValueError, match='2 control features are wanted, but only 1 other features are alive'):
        steer(store, machine.target, [3], evaluation(machine, store).preset, [3, 4])


def test_the_local_judge_takes_the_set_that_makes_the_explanation_likeliest(machine, store):
    evaluate(evaluation(machine, store), EXPLANATIONS, progress=False)
    verdicts = store.judgements()
    assert set(verdicts.stage) == {'label', 'sft', 'dpo1', 'control'}
    assert verdicts.true.isin([0, 1, 2]).all()
    for row in verdicts.itertuples():
        scores = json.loads(row.scores)
        assert row.choice == int(np.argmax(scores['scores']))
        assert scores['order'].index(0) == row.true
    (choice, scores), = judge_locally(machine.writer, [("the word 'rain'", [['a b'], ['c d', 'e']])])
    assert len(scores) == 2
    assert choice == int(np.argmax(scores))


# a capable writer and judge

def lists(request, schema, choices):
    if choices: return choices[0]
    return json.dumps({name: [f'{name} {i} of the cat.' for i in range(5)] for name in schema['properties']})


def test_a_capable_writer_is_asked_once_per_explanation(machine, store):
    writer = Scripted(lists)
    run = evaluation(machine, store, writer, writer, evaluation_writer='gpt-5.4-mini')
    evaluate(run, EXPLANATIONS, progress=False)
    prompts = [request.prompt for request, schema, _ in writer.requests if schema]
    assert len(prompts) == len(set(prompts)) == 2*7 # 7 explanations that differ, E.3 and E.4 each
    assert len(store.texts('dpo1')) == 3*(3 + 2 + 2)
    assert not store.texts().error.notna().any()
    judged = [choices for _, _, choices in writer.requests if choices]
    assert all(choices == ['A', 'B', 'C'] for choices in judged)
    assert len(judged) == len(store.judgements()) - 1 # two stages say the same of feature 5
    assert (store.judgements().choice == 0).all() # A each time,
    assert store.judgements().true.nunique() > 1 # the order varies


def test_replies_that_are_no_json_and_no_letter_are_counted(machine, store):
    writer = Scripted(lambda r, s, c: 'the second one' if c else 'Here you are: ...')
    run = evaluation(machine, store, writer, writer, evaluation_writer='gpt-5.4-mini')
    table = evaluate(run, EXPLANATIONS, progress=False)
    assert store.texts().text.isna().all()
    assert (store.texts().error == 'not JSON').all()
    assert table.loc[('label', 'generative'), ['n', 'unavailable', 'failures']].tolist() == [0, 3, 9]
    assert table.loc[('label', 'gap'), 'failures'] == 12
    assert table.loc[('label', 'output'), 'n'] == 0
    asked = len(writer.requests)
    evaluate(run, EXPLANATIONS, progress=False)
    assert len(writer.requests) == asked # an unparsed reply is a result, not something to ask again


def test_controls_have_a_known_answer(machine, store):
    words = {3: 'rain', 5: 'cats', 8: 'parks'}
    def knows(request, schema, choices): # writes its subject into every text, and finds it again
        question, _, sets = request.prompt.partition('\n\nThe model then wrote')
        subject = next(word for word in words.values() if word in question)
        if choices: return next((one[0] for one in sets.split('Set ')[1:] if subject in one.split('Which set')[0]), 'A')
        return json.dumps({name: [f'{subject} {name} {i}' for i in range(5)] for name in schema['properties']})
    writer = Scripted(knows)
    run = evaluation(machine, store, writer, writer, evaluation_writer='gpt-5.4-mini')
    table = evaluate(run, {'label': words}, progress=False)
    assert table.loc[('control', 'output'), ['n', 'mean']].tolist() == [3, 1]


# what evaluate refuses

@pytest.mark.parametrize('explanations, metrics, line', [
    (EXPLANATIONS, ('accuracy',), "unknown metric 'accuracy': choose from generative"),
    ({'control': {3: 'x'}}, ('gap',), "a stage cannot be called 'control'"),
    ({'sft': {99: 'x'}}, ('gap',), 'feature 99 is explained, but it is not among')])
def test_evaluate_refuses(machine, store, explanations, metrics, line):
    with pytest.raises(ValueError, match=line): evaluate(evaluation(machine, store), explanations, metrics)
    assert not len(store.explanations()) # of what is refused, nothing is kept


def test_evaluate_refuses_another_explanation_under_the_same_name(machine, store):
    store.put_explanations([('sft', 3, 0, 'cats')])
    with pytest.raises(ValueError, match="another explanation of feature 3 at stage sft: 'cats', not 'x'"):
        evaluate(evaluation(machine, store), {'sft': {3: 'x', 4: 'y'}})
    assert len(store.explanations()) == 1


@pytest.mark.parametrize('texts, line', [
    ({3: 'cats', '3': 'dogs'}, 'mine: feature 3 is explained twice: keep one explanation of each feature'),
    ({3.5: 'cats'}, 'mine: 3.5 is no feature'), ({True: 'cats'}, 'mine: True is no feature'),
    ({'smollm2/9/3': 'cats'}, "mine: 'smollm2/9/3' is no feature"),
    ({3: 5}, 'mine: the explanation of feature 3 is 5, not text')])
def test_evaluate_refuses_what_names_no_single_feature(machine, store, texts, line):
    run = evaluation(machine, store)
    with pytest.raises(ValueError, match=line): evaluate(run, {'mine': texts}, progress=False)
    assert not len(store.explanations())


def test_missing_and_half_characters_are_no_trouble(machine, store):
    odd = {np.int64(3): nan, 5: None, 8: 'cats \ud83d'}
    table = evaluate(evaluation(machine, store), {'mine': odd}, metrics=('generative',), progress=False)
    assert store.explanations('mine').text.tolist() == ['', '', 'cats ?']
    assert table.loc[('mine', 'generative'), ['n', 'empty']].tolist() == [1, 2]
    checked, = verify(machine.target, machine.writer, [(8, 'cats \ud83d')], load_preset('smollm2-135m', **PRESET), 2)
    assert checked.made == 2


def test_one_store_holds_values_of_one_kind(machine, store):
    mine = {'mine': {3: 'rain', 5: 'cats'}}
    both = ('generative', 'gap')
    evaluate(evaluation(machine, store), mine, metrics=('generative',), progress=False)
    other = evaluation(machine, store, n_activating=4, batch_size=3) # nothing was made with these
    evaluate(other, mine, metrics=both, progress=False)
    before = store.metrics()
    for name, value in dict(success=.1, text_temperature=.1, n_activating=5).items():
        changed = evaluation(machine, store, **{name: value})
        with pytest.raises(ValueError, match=f'evaluated with other settings .{name}: .* -> .*: use another store'):
            evaluate(changed, mine, metrics=both, progress=False)
    assert store.metrics().equals(before)


def test_texts_that_could_not_be_made_are_no_misses(machine):
    "Nothing can be said of an explanation whose texts a writer did not write"
    silent = Scripted(lambda r, schema, choices: '' if 'rain' in r.prompt else 'We saw rain and cats.')
    preset = load_preset('smollm2-135m', **PRESET)
    none, some = verify(machine.target, silent, [(3, 'rain'), (5, 'cats')], preset, 2)
    assert (none.made, some.made) == (0, 2)
    assert none.best is None
    assert np.isnan(none.scores).all()


def test_no_feature_has_a_label(machine, store):
    table = evaluate(evaluation(machine, store), {'mine': EXPLANATIONS['label'], 'label': {}}, progress=False)
    assert ('control', 'output') in table.index
    assert 'label' not in table.index.get_level_values(0)
    assert set(store.explanations().stage) == {'mine'}


def test_a_call_tells_of_its_own_features_alone(machine, store):
    run = evaluation(machine, store)
    texts = EXPLANATIONS['sft']
    assert len(texts) > 1
    evaluate(run, {'a': texts}, metrics=('generative',), progress=False)
    first = next(iter(texts))
    table = evaluate(run, {'a': {first: texts[first]}}, metrics=('generative',), progress=False)
    assert table.loc[('a', 'generative'), 'n'] == 1


def test_of_other_metrics_nothing_is_written_and_nothing_fails(machine, store):
    run = evaluation(machine, store)
    evaluate(run, EXPLANATIONS, metrics=('generative', 'names_word'), progress=False)
    assert set(store.texts().kind) == {'generative'}
    assert set(store.metrics().metric) == {'generative', 'names_word', 'unparsed_generative', 'empty'}
    failures = evaluate(run, EXPLANATIONS, progress=False).loc[('sft', 'gap'), 'failures']
    read = store.texts('sft')
    contrast = read.kind.isin(['activating', 'neutral']) & (read.feature != 8)
    unwritten = read[contrast & read.error.notna()] # the random model ends some of its turns at once
    assert failures == unwritten.feature.nunique()


def test_other_metrics_can_be_added_later(machine, store):
    table = evaluate(evaluation(machine, store), EXPLANATIONS, metrics=('generative', 'gap'), progress=False)
    assert set(table.index.get_level_values(1)) == {'generative', 'gap'}
    assert not len(store.steering())
    full = evaluate(evaluation(machine, store), EXPLANATIONS, progress=False)
    assert full.loc[('sft', 'gap'), 'mean'] == pytest.approx(table.loc[('sft', 'gap'), 'mean'])
    assert ('sft', 'output') in full.index


def test_of_an_empty_explanation_nothing_is_written(machine):
    preset = load_preset('smollm2-135m', **PRESET)
    empty, full = verify(machine.target, machine.writer, [(3, ' '), (5, 'rain')], preset, 2)
    assert empty.texts == [None, None]
    assert np.isnan(empty.scores).all()
    assert (empty.best, empty.reached(-1.)) == (None, 0)
    assert full.texts[0] is not None


def test_an_overlong_text_is_counted_and_the_others_are_measured(machine, store):
    long = 'it rains '*599 + 'it rains'
    def lengthy(request, schema, choices): # the first text of each list that is to activate is too long
        if choices: return choices[0]
        lists = {name: [f'a cat {j}' for j in range(one['minItems'])] for name, one in schema['properties'].items()}
        return json.dumps({name: texts if name == 'neutral' else [long, *texts[1:]] for name, texts in lists.items()})
    writer = Scripted(lengthy)
    run = evaluation(machine, store, writer, writer, evaluation_writer='capable')
    table = evaluate(run, {'label': EXPLANATIONS['label']}, progress=False)
    texts = store.texts('label')
    assert (texts.text == long).sum() == 6
    assert (texts.error[texts.text == long] == 'too long').all()
    assert texts.score[texts.text != long].notna().all()
    assert table.loc[('label', 'generative'), 'failures'] == 3
    assert table.loc[('label', 'gap'), ['failures', 'n']].tolist() == [3, 3]
    found, = verify(machine.target, writer, [(3, 'rain')], run.preset, 2)
    assert found.texts == [long, 'a cat 1']
    assert np.isnan(found.scores).tolist() == [True, False]
    assert found.best == 1


@pytest.mark.parametrize('texts, line', [
    ({3: ['cats']}, r"mine: the explanation of feature 3 is \['cats'\], not text"),
    ({math.inf: 'cats'}, 'mine: inf is no feature'),
    ({'1_1': 'cats'}, "mine: '1_1' is no feature"),
    ({3: 'cats', 3.5: 'dogs'}, 'mine: 3.5 is no feature'),
    ({-1: 'cats'}, 'feature -1 is explained, but it is not among'),
    (['cats'], r"mine: explanations are {feature: text}, not \['cats'\]"),
    ({3: 'cats', '3 ': 'dogs'}, 'mine: feature 3 is explained twice'),
    ({np.float64(3): 'cats', '3': 'dogs'}, 'mine: feature 3 is explained twice')])
def test_evaluate_refuses_odd_explanations(machine, store, texts, line):
    with pytest.raises(ValueError, match=line):
        evaluate(evaluation(machine, store), {'mine': texts}, progress=False)


@pytest.mark.parametrize('explanations', [[], {'': {3: 'cats'}}, {5: {3: 'cats'}}, {None: {3: 'cats'}}])
def test_evaluate_refuses_stages_without_a_name(machine, store, explanations):
    with pytest.raises(ValueError, match='explanations are {stage: {feature: text}}, and each stage has a name'):
        evaluate(evaluation(machine, store), explanations, progress=False)


@pytest.mark.parametrize('explanations', [{}, {'mine': {}}])
def test_nothing_explained_is_an_empty_table(machine, store, explanations):
    table = evaluate(evaluation(machine, store), explanations, progress=False)
    assert len(table) == 0 == len(stage_table(table))
    assert 'mean' in table.columns


def test_empty_explanations_have_no_values(machine, store):
    table = evaluate(evaluation(machine, store), {'mine': {3: ' ', 5: pd.NA}}, progress=False)
    assert (table.n == 0).all()
    assert (table.unavailable == 2).all()
    assert table['mean'].isna().all()
    assert (stage_table(table) == '-').all().all()


def test_an_overlong_explanation_is_counted(machine, store):
    how = dict(metrics=('generative', 'gap'), progress=False)
    table = evaluate(evaluation(machine, store), {'mine': {3: 'rain '*3000}}, **how)
    assert table.loc[('mine', 'generative'), ['n', 'unavailable', 'failures']].tolist() == [0, 1, 3]


def test_a_value_that_is_there_twice_is_refused():
    columns = ['stage', 'feature', 'metric', 'value']
    rows = pd.DataFrame([('a', 1, 'gap', 1.), ('a', 1, 'gap', 2.), ('b', 1, 'gap', 1.)], columns=columns)
    for call in (lambda: summary(rows), lambda: compare(rows, [('a', 'b')]), lambda: agreement(rows[1:], rows, ['a'])):
        with pytest.raises(ValueError, match='feature 1 has two values of gap at a: keep one of each'): call()


@pytest.mark.parametrize('call', [
    lambda: generative_accuracy([[math.inf]], [1.]), lambda: bootstrap_ci([1., math.inf]),
    lambda: sign_flip([1., math.inf]), lambda: discriminative_gap([[1.]], [[-math.inf]])])
def test_infinite_values_are_refused(call):
    with pytest.raises(ValueError, match='infinite'): call()


def test_a_feature_without_a_finite_maximum_has_no_accuracy():
    assert np.isnan(generative_accuracy([[1.]], [math.inf])).all()


def test_an_interval_needs_resamples():
    with pytest.raises(ValueError, match='at least 1 resample'): bootstrap_ci([1., 2.], n=0)


def test_words_are_compared_without_the_space_around_them():
    assert names_word('a black cat', [' cat'])
    assert not names_word('a black cat', ['', ' '])


def test_what_is_no_text_is_no_claim():
    assert repeats({1: None, 2: math.nan, 3: 'a'})['features'] == 1
    assert claims_of({'a': {1: math.nan, 2: None, 3: 'x'}}) == [Claim(3, 'x', ('a',))]
