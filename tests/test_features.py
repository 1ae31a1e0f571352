"Names of features, splits, and the file of features: what is written, read, and refused"
import copy
import dataclasses
import json
import math
import pickle
import tracemalloc
from types import SimpleNamespace
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import tiny_sae
from saeexplainer.explorer import FeatureExplorer
from saeexplainer.features import (
    FEATURES_SCHEMA, Context, Contexts, Explanation, FeatureId, card_of, check_features_of, check_sae_of,
    features_file, labels_of, load_features, more_labels, save_features, split_features, unused,
)
from saeexplainer.presets import load_preset
from saeexplainer.saes import FeatureReader

CONTEXT = Context('a book', ('The', ' national', ' park'), (0., 9.125, .5), 1)
CONTEXTS_TYPE = FEATURES_SCHEMA.field('contexts').type


def row(index, label=None, status='ok', said=(), **more):
    "A feature as `save_features` takes it"
    numbers = dict(index=index, density=.01, max_act=8., status=status)
    return dict(numbers, explanation=label, words=[], explanations=list(said), contexts=[CONTEXT], **more)


def context_of(**changes):
    "A context as a file holds it"
    return dict(source='t', tokens=['a'], values=[1.], peak=0) | changes


def preset_with(file, **fields):
    "A preset whose features are in the file"
    return load_preset('gpt2-small-l8', features=str(file), **fields)


def saved(folder, rows):
    "A preset with a new file of these rows"
    return preset_with(save_features(rows, folder/'features.parquet'))


@pytest.fixture
def file(tmp_path): return tmp_path/'features.parquet'


# ---- names and splits

@pytest.mark.parametrize('text', ['', 'a/b', 'a/b/c', 'a/b/-1', 'a//3', 'a/b/1/2'])
def test_wrong_names(text):
    says = "is not a feature: write model/source/index, such as 'smollm2-135m/9-res-4k/123'"
    with pytest.raises(ValueError, match=says): FeatureId.parse(text)


IDS = [FeatureId('m', 's', i) for i in range(200)]
SIZES = dict(test=20, preference=30, sft=100)


def test_splits_depend_on_ids_sizes_and_seed_alone():
    parts = split_features(IDS, SIZES, seed=3)
    assert split_features(list(reversed(IDS)) + IDS[:5], SIZES, seed=3) == parts
    assert split_features(IDS, SIZES, seed=4) != parts


def test_no_feature_is_in_two_splits():
    parts = split_features(IDS, SIZES, seed=3)
    assert len(set(sum(parts.values(), []))) == 150


def test_a_smaller_run_tests_on_what_a_larger_one_tests_on():
    larger = split_features(IDS, SIZES, seed=3)
    assert split_features(IDS, dict(test=20), seed=3)['test'] == larger['test']


def test_more_features_than_there_are():
    with pytest.raises(ValueError, match='150 test \\+ 100 sft features are wanted, there are 200'):
        split_features(IDS, dict(test=150, sft=100))


@pytest.mark.parametrize('n', [-1, 1.5, True])
def test_sizes_of_splits_that_are_none(n):
    with pytest.raises(ValueError, match=f'{n} features are wanted for a: it is a whole number from 0'):
        split_features(['a', 'b', 'c'], dict(a=n, b=1))


# ---- where the file is

@pytest.fixture
def folders(tmp_path, monkeypatch):
    "The data and the cache lie in `tmp_path`"
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))


def test_features_that_nobody_made_are_looked_for_in_the_cache(tmp_path, folders):
    preset = load_preset('gpt2-small-l8')
    assert features_file(preset) == tmp_path/'cache/features/gpt2-small/8-res-jb/features.parquet'
    says = 'there is no .*/cache/features/gpt2-small/8-res-jb/features.parquet: `saeexplainer features gpt2-small-l8`'
    with pytest.raises(FileNotFoundError, match=f'{says} makes it'): load_features(preset)


def test_shipped_features_are_taken(tmp_path, folders):
    shipped = save_features([row(0)], tmp_path/'data/gpt2-small-l8/features.parquet')
    assert features_file(load_preset('gpt2-small-l8')) == shipped


def test_a_file_that_is_named_is_taken(tmp_path, folders, monkeypatch):
    "Where the working directory has no such file, a name is relative to data/"
    given = save_features([row(0)], tmp_path/'given.parquet')
    assert features_file(preset_with(given)) == given
    assert features_file(preset_with('mine/features.parquet')) == tmp_path/'data/mine/features.parquet'
    monkeypatch.chdir(tmp_path)
    assert features_file(preset_with('given.parquet')).samefile(given)


def test_features_of_another_source_are_not_taken(tmp_path, folders):
    mine = dataclasses.replace(load_preset('smollm2-135m'), name='mine') # a preset of one's own on the same SAE
    shipped = save_features([row(0)], tmp_path/'data/smollm2-135m/features.parquet', mine.source)
    assert features_file(mine) == shipped
    assert features_file(load_preset('smollm2-135m')) == shipped
    other = load_preset(mine, source='smollm2-135m/5-res')
    assert features_file(other) == tmp_path/'cache/features/smollm2-135m/5-res/features.parquet'
    says = 'holds features of smollm2-135m/9-res-4k, the preset explains smollm2-135m/5-res: set its field features'
    with pytest.raises(ValueError, match=says):
        load_features(load_preset(other, features=str(shipped)))


# ---- written and read again

SAID = [Explanation('parks', 'gpt-5', 'a'), dict(text='nations', model='gpt-4o-mini', type='b')]
ROWS = [row(3, 'parks', said=SAID), row(7, None, 'dense')]


def frame(rows):
    "Rows as a DataFrame, whose contexts are dicts"
    contexts = [[context.row() for context in row['contexts']] for row in rows]
    return pd.DataFrame(rows).assign(contexts=contexts)


@pytest.mark.parametrize('form', [list, iter, frame], ids=['list', 'iterator', 'DataFrame'])
def test_what_is_saved_is_loaded(tmp_path, form):
    file = save_features(form(ROWS), tmp_path/'deep'/'features.parquet')
    first, second = load_features(preset_with(file))
    assert str(first.id) == 'gpt2-small/8-res-jb/3'
    assert (first.explanation, first.status, first.max_act, first.words) == ('parks', 'ok', 8., ())
    assert first.explanations == (Explanation('parks', 'gpt-5', 'a'), Explanation('nations', 'gpt-4o-mini', 'b'))
    assert first.contexts == (CONTEXT,)
    assert (second.explanation, second.status, second.explanations) == (None, 'dense', ())


@pytest.mark.parametrize('form', [list, iter, frame], ids=['list', 'iterator', 'DataFrame'])
def test_the_file_has_the_schema_and_lies_alone_in_its_folder(tmp_path, form):
    file = save_features(form(ROWS), tmp_path/'deep'/'features.parquet')
    assert [f.name for f in file.parent.iterdir()] == ['features.parquet']
    assert pq.read_schema(file).equals(FEATURES_SCHEMA)
    assert pq.ParquetFile(file).metadata.row_group(0).column(0).compression == 'ZSTD'


def test_a_file_without_explanations_still_loads(file):
    "It has one label per feature, whoever made it"
    table = pa.Table.from_pylist([{**row(0, 'parks'), 'contexts': []}], FEATURES_SCHEMA)
    pq.write_table(table.drop_columns('explanations'), file)
    [feature] = load_features(preset_with(file))
    assert (feature.explanation, feature.explanations, len(feature.contexts)) == ('parks', (), 0)
    assert load_features(preset_with(file, label_model='gpt-5')) == [feature]


def test_half_precision_has_a_largest_number(tmp_path):
    strong = Context('t', ('a',), (1e6,), 0)
    rows = [row(0, 'x') | dict(contexts=[strong])]
    [feature] = load_features(saved(tmp_path, rows))
    assert feature.contexts[0].values == (65504.,)


def test_words_at_the_peaks_stay_whatever_the_label(file):
    said = [Explanation("the word 'x'", 'words'), Explanation('y', 'gpt-5')]
    save_features([{**row(0, "the word 'x'", said=said), 'words': ['x']}], file)
    for model in (None, 'words', 'gpt-5'):
        [feature] = load_features(preset_with(file, label_model=model))
        assert feature.words == ('x',)


# ---- whose label counts

@pytest.fixture
def labelled(file):
    "A file whose features have labels of gpt-5, of gpt-4o-mini, or of both"
    first = Explanation('first', 'gpt-5')
    second = Explanation('second', 'gpt-5')
    other = Explanation('other', 'gpt-4o-mini')
    return save_features([
        row(0, 'other', said=[other, first, second]),
        row(1, None, 'unlabelled', [second]),
        row(2, 'other', said=[other]),
        row(3, None, 'dead', [first]),
        row(4, None, 'dense', [first]),
        row(5, None, 'incomplete', [first]),
    ], file)


UNUSED = [(None, 'dead'), (None, 'dense'), (None, 'incomplete')] # a label does not change these


@pytest.mark.parametrize('model, wanted', [
    (None, [('other', 'ok'), (None, 'unlabelled'), ('other', 'ok')]),
    ('gpt-5', [('first', 'ok'), ('second', 'ok'), (None, 'unlabelled')]),
    ('gpt-4o-mini', [('other', 'ok'), (None, 'unlabelled'), ('other', 'ok')]),
])
def test_label_model_chooses_the_label(labelled, model, wanted):
    features = load_features(preset_with(labelled, label_model=model))
    assert [(feature.explanation, feature.status) for feature in features] == wanted + UNUSED


def test_a_label_model_that_labelled_nothing(labelled):
    says = r"features.parquet has no labels of 'gpt-4': it has those of gpt-5 \(5\), gpt-4o-mini \(2\)"
    with pytest.raises(ValueError, match=says):
        load_features(preset_with(labelled, label_model='gpt-4'))


def test_labels_of_a_model_are_those_of_all_features(labelled):
    features = load_features(preset_with(labelled))
    assert labels_of(features, 'gpt-5') == {0: 'first', 1: 'second', 3: 'first', 4: 'first', 5: 'first'}


# ---- contexts

MADE = (
    Context('t', ('a', 'b0'), (0., 0.), 1),
    Context('t', ('a', 'b1'), (0., 1.), 1),
    Context('t', ('a', 'b2'), (0., 2.), 1))


@pytest.fixture(scope='module')
def column():
    "Contexts of three features: missing, none, and those of `MADE`"
    return pa.array([None, [], [context.row() for context in MADE]], CONTEXTS_TYPE)


@pytest.fixture
def contexts(column): return Contexts(column, 2)


def test_contexts_are_equal_to_a_tuple(contexts):
    assert len(contexts) == 3
    assert list(contexts) == list(MADE)
    assert contexts == MADE
    assert MADE == contexts
    assert contexts != MADE[:2]
    assert hash(contexts) == hash(MADE)


def test_contexts_are_indexed_as_a_tuple_is(contexts):
    assert contexts[0] == MADE[0]
    assert contexts[-1] == MADE[2]
    assert contexts[1:] == MADE[1:]
    assert contexts[::-1] == MADE[::-1]
    assert contexts.index(MADE[2]) == 2
    assert MADE[1] in contexts
    with pytest.raises(IndexError): contexts[3]


def test_a_feature_without_contexts_has_an_empty_sequence(column):
    assert [len(Contexts(column, i)) for i in (0, 1)] == [0, 0]
    assert not Contexts(column, 0)


def test_a_copy_of_contexts_holds_them_alone(column, contexts):
    assert pickle.loads(pickle.dumps(contexts)) == MADE
    assert len(pickle.dumps(Contexts(column, 1))) < 100
    assert copy.deepcopy(contexts) == contexts


N = 5_000
PER_FEATURE = 16 # contexts
LENGTH = 32 # tokens


def lists(values, each):
    "An array of lists of `each` values"
    begins = np.arange(0, len(values) + 1, each, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(begins), values)


def many_contexts():
    "A column of `N` features with `PER_FEATURE` contexts of `LENGTH` tokens, made without Python objects"
    n = N*PER_FEATURE
    known = pa.array([f' word{i}' for i in range(97)])
    which = np.arange(n*LENGTH, dtype=np.int32) % 97
    tokens = pa.DictionaryArray.from_arrays(pa.array(which), known)
    values = pa.array(np.tile(np.float16(np.arange(LENGTH)), n))
    peaks = pa.array(np.full(n, LENGTH - 1, np.int16))
    parts = [
        pa.array(['t']*n),
        lists(tokens.dictionary_decode(), LENGTH),
        lists(values, LENGTH),
        peaks]
    contexts = pa.StructArray.from_arrays(parts, fields=list(CONTEXTS_TYPE.value_type))
    return lists(contexts, PER_FEATURE)


@pytest.fixture
def large(file):
    "A preset with a file of several row groups"
    same = dict(density=.1, max_act=31., status='ok', explanation='x', words=[])
    same['explanations'] = [dict(text='x', model='m', type='')]
    values = dict(index=range(N)) | {name: [value]*N for name, value in same.items()}
    columns = [pa.array(column, FEATURES_SCHEMA.field(name).type) for name, column in values.items()]
    nothing = pa.nulls(N, FEATURES_SCHEMA.field('test_contexts').type)
    table = pa.table([*columns, many_contexts(), nothing], schema=FEATURES_SCHEMA)
    pq.write_table(table, file, row_group_size=1024, compression='none')
    return preset_with(file)


def test_contexts_stay_in_arrow(large):
    "Loaded, they take a twentieth of what they would as tuples"
    tracemalloc.start()
    features = load_features(large)
    lazy, _ = tracemalloc.get_traced_memory()
    kept = [tuple(feature.contexts) for feature in features[:50]]
    tuples = (tracemalloc.get_traced_memory()[0] - lazy)*N/len(kept)
    tracemalloc.stop()
    assert len(features) == N
    last = features[-1].contexts[PER_FEATURE - 1]
    assert last.values[LENGTH - 1] == 31.
    assert last.tokens[-1] == f' word{(N*PER_FEATURE*LENGTH - 1) % 97}'
    assert lazy < 1500*N, lazy
    assert tuples > 20*lazy, (lazy, tuples)


# ---- tables that others wrote

def test_what_is_no_table_of_features(file):
    file.write_text('not parquet')
    with pytest.raises(ValueError, match='is not a readable feature table'):
        load_features(preset_with(file))
    pq.write_table(pa.table({'index': [0], 'label': ['x']}), file)
    says = 'is not a feature table: it lacks the columns density, max_act, status, explanation, words, contexts'
    with pytest.raises(ValueError, match=says): load_features(preset_with(file))


def second(**context):
    "Contexts of a second feature: one that is right, and this one"
    right = context_of(tokens=['a', 'b'], values=[0., 1.])
    return dict(contexts=[[], [right, context_of(**context)]])


def alone(**context):
    "Contexts of a second feature, which has this one alone"
    return dict(contexts=[[], [context_of(**context)]])


SHAPE = 'a context of feature 1 has its peak outside its tokens, or not as many tokens as values'
BROKEN = [
    (dict(index=[3, 3]), 'has feature 3 twice: keep one row of each'),
    (dict(index=[1, -1]), 'has a row whose index is -1'),
    (dict(index=[1, None]), 'float64|double in its column index|has a row whose index is None'),
    (dict(index=[1, 2**31]), 'has a row whose index is 2147483648'),
    (dict(density=[.1, 1.5]), 'feature 1: its density is 1.5: it is a share from 0 to 1'),
    (dict(density=[.1, -1.]), 'feature 1: its density is -1.0: it is a share from 0 to 1'),
    (dict(density=[.1, math.inf]), 'feature 1: its density is inf: it is a share from 0 to 1'),
    (dict(max_act=[8., math.inf]), 'the strongest activation of feature 1 is inf: it is a number from 0'),
    (dict(max_act=[8., -1.]), 'the strongest activation of feature 1 is -1.0'),
    (dict(max_act=['8', '9']), 'in its column max_act: it needs float'),
    (dict(status=['ok', 'good']),
     "the status of feature 1 is 'good': there are ok, unlabelled, dead, dense, incomplete"),
    (dict(explanation=[7, 8]), 'has int64 in its column explanation: it needs string'),
    (dict(words=['a', 'b']), 'in its column words: it needs list<'),
    (dict(words=[['a'], [None, 'b']]), 'one of the words of feature 1 is missing'),
    (dict(contexts=[[dict(source='t')]]*2), 'in its column contexts'),
    (dict(contexts=[[], [None, context_of()]]), 'a context of feature 1 is missing'),
    (second(tokens=['a', 'b'], values=[0., 1.], peak=2), SHAPE),
    (second(tokens=['a', 'b'], values=[0., 1.], peak=-1), SHAPE),
    (second(tokens=[], values=[]), SHAPE),
    (second(tokens=['a'], values=[0., 1.]), SHAPE),
    (second(tokens=None, values=[1.]), SHAPE),
    (alone(tokens=['a', None], values=[0., 1.]), 'feature 1 has contexts in which a token or a value is missing'),
    (alone(tokens=['a', 'b'], values=[0., math.inf]),
     'a context of feature 1 has a value that is no number, or infinite'),
    (alone(tokens=None), 'a context of feature 1 has no tokens'),
    (alone(values=None), 'a context of feature 1 has no values'),
    (alone(peak=None), 'a context of feature 1 has no peak'),
]


@pytest.mark.parametrize('columns, says', BROKEN, ids=[says[:40] for _, says in BROKEN])
def test_a_table_that_others_wrote_is_checked(file, columns, says):
    same = dict(density=.1, max_act=8., status='ok', words=[], contexts=[context_of()])
    right = dict(index=[0, 1], explanation=['x', 'y'])
    right |= {name: [value]*2 for name, value in same.items()}
    pd.DataFrame(right).to_parquet(file)
    assert [feature.explanation for feature in load_features(preset_with(file))] == ['x', 'y']
    pd.DataFrame(right | columns).to_parquet(file)
    with pytest.raises(ValueError, match=says) as raised: load_features(preset_with(file))
    assert 'features.parquet' in str(raised.value)
    assert '\n' not in str(raised.value)


def test_what_is_missing_in_a_table(file):
    "Blank labels are none, unknown activations are NaN, whoever is not named is unnamed"
    labels = [
        dict(text='a', model=None, type=None),
        dict(text=None, model='m', type='t'),
        dict(text='  ', model='m', type='t')]
    columns = dict(
        index=[0, 1, 2],
        density=[.1, None, .1],
        max_act=[8., np.nan, 1.],
        explanation=['a', '  ', None],
        words=[[], [], None],
        explanations=[labels, [], None],
        contexts=[[], [], None])
    pd.DataFrame(columns).assign(status='ok').to_parquet(file)
    whole, blank, missing = load_features(preset_with(file))
    assert whole.explanations == (Explanation('a', 'unnamed'),)
    assert (whole.explanation, whole.status) == ('a', 'ok')
    assert (blank.explanation, blank.status) == (None, 'unlabelled')
    assert (missing.explanation, missing.status) == (None, 'unlabelled')
    assert math.isnan(blank.max_act)
    assert math.isnan(blank.density)
    assert len(missing.contexts) == 0


def test_a_feature_that_never_fires_is_dead(tmp_path):
    rows = [row(0, 'a'), row(1, 'b') | dict(max_act=0.)]
    features = load_features(saved(tmp_path, rows))
    assert [feature.status for feature in features] == ['ok', 'dead']


# ---- rows that are not written

UNFIT = [
    (dict(index=1.9), 'index is 1.9: it is a whole number from 0'),
    (dict(index=-1), 'index is'),
    (dict(index=2**31), 'index is'),
    (dict(index=True), 'index is'),
    (dict(index='1'), 'index is'),
    (dict(index=None), 'index is'),
    (dict(index=math.nan), 'index is'),
    (dict(max_act=1e39), 'feature 1: its max_act is 1e.39: it is a number from 0 to 3.4e.38'),
    (dict(max_act=-1.), 'feature 1: its max_act is -1.0'),
    (dict(max_act='8'), "feature 1: its max_act is '8', not a number"),
    (dict(density=1.5), 'feature 1: its density is 1.5'),
    (dict(status='good'), "feature 1: its status is 'good': there are ok"),
    (dict(words='abc'), "feature 1: its words are 'abc', not a list"),
    (dict(words=[None]), 'feature 1: one of its words is missing'),
    (dict(words=[5]), r'feature 1 has \[5\] in its column words'),
    (dict(explanations=['a']), "feature 1 has .'a'. in its column explanations"),
    (dict(contexts='abc'), "feature 1: its contexts are 'abc', not a list"),
    (dict(contexts=[None]), 'feature 1: a context is None: it needs source, tokens, values and peak'),
    (dict(contexts=[context_of(tokens='a')]), 'feature 1: a context has'),
    (dict(contexts=[context_of(tokens=[1])]), 'feature 1: a context has'),
    (dict(contexts=[context_of(values=None)]), 'feature 1: a context has'),
    (dict(contexts=[context_of(values=[math.nan])]), 'feature 1: a context has'),
    (dict(contexts=[context_of(peak=None)]), 'feature 1: a context has'),
    (dict(contexts=[context_of(peak=.5)]), 'feature 1: a context has'),
    (dict(contexts=[Context('t', ('a',), (math.nan,), 0)]), 'feature 1: a context has'),
    (dict(contexts=[Context('t', ('a',), (1.,), 3)]), 'feature 1: a context has'),
    (dict(contexts=[context_of(peak=3)]), 'a context has 1 tokens, 1 values and its peak at 3'),
    (dict(contexts=[Context('t', 'a', (1.,), 0)]), 'feature 1: a context has'),
    (dict(explanation=7), 'feature 1 has the explanation 7, not a text'),
]


@pytest.mark.parametrize('columns, says', UNFIT, ids=[str(columns)[:60] for columns, _ in UNFIT])
def test_a_row_that_could_not_be_read_again_is_not_written(tmp_path, file, columns, says):
    rows = [row(0), {**row(1), **columns}]
    with pytest.raises(ValueError, match=says) as raised: save_features(rows, file)
    assert f'{tmp_path}/features.parquet cannot be written: ' in str(raised.value)
    assert '\n' not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_row_without_its_columns_is_not_written(file):
    with pytest.raises(ValueError, match="a feature's row lacks density, max_act"):
        save_features([dict(index=1)], file)
    assert not file.exists()


def test_no_feature_is_written_twice(file):
    with pytest.raises(ValueError, match='feature 1 comes twice: keep one row of each'):
        save_features([row(1), row(1)], file)


def test_what_pandas_leaves_empty_is_written_as_missing(tmp_path):
    empty = dict(index=np.float64(2), max_act=None, density=math.nan, words=None, contexts=math.nan, explanations=None)
    blank = dict(words=[' ', 'a'], contexts=[context_of(source=None)])
    rows = [row(2) | empty, row(3) | blank]
    unknown, known = load_features(saved(tmp_path, rows))
    assert unknown.index == 2
    assert (unknown.words, len(unknown.contexts), unknown.explanations) == ((), 0, ())
    assert math.isnan(unknown.max_act)
    assert math.isnan(unknown.density)
    assert known.words == ('a',)
    assert known.contexts[0].source == ''


def test_half_an_emoji_is_written_as_a_question_mark(tmp_path):
    half = 'half \ud83d'
    rows = [row(1, half, said=[Explanation(half, 'm')])]
    [feature] = load_features(saved(tmp_path, rows))
    assert feature.explanation == 'half ?'


# ---- labels in a file beside the features

@pytest.fixture
def with_labels(tmp_path, file):
    "A function: of a table of labels, the explanations of both features of a file"
    save_features([row(0, 'x', said=[Explanation('x', 'm')]), row(1)], file)
    def explanations(frame, model=None):
        pd.DataFrame(frame).to_parquet(tmp_path/'labels.parquet')
        return [feature.explanations for feature in load_features(preset_with(file, label_model=model))]
    return explanations


def test_labels_that_others_wrote_are_added(with_labels):
    without_type = dict(index=[0, 1], text=['a', 'b'], model='mine')
    first, other = with_labels(without_type, 'mine')
    assert first == (Explanation('x', 'm'), Explanation('a', 'mine'))
    assert other == (Explanation('b', 'mine'),)


def test_blank_labels_are_none_and_an_unknown_author_is_unnamed(with_labels):
    columns = dict(index=[0, 1, 1], text=['  ', None, 'b'], model=['mine', 'mine', None], type='t')
    first, other = with_labels(columns)
    assert first == (Explanation('x', 'm'),)
    assert other == (Explanation('b', 'unnamed', 't'),)


def test_an_empty_table_and_a_label_that_is_there_already_add_nothing(with_labels):
    known = (Explanation('x', 'm'),)
    empty = dict(index=[], text=[], model=[])
    assert with_labels(empty)[0] == known
    again = dict(index=[0, 0], text=['x', 'x'], model='m')
    assert with_labels(again)[0] == known


def test_labels_of_features_that_the_file_does_not_hold_are_left_out(with_labels, capsys):
    found = with_labels(dict(index=[0, 7, 8], text=['a', 'b', 'c'], model='m'))
    assert found[0][-1].text == 'a'
    assert 'has labels of 2 features that it does not hold: they are left out' in capsys.readouterr().err


@pytest.mark.parametrize('columns, says', [
    (dict(feature=[0], explanation=['x']), 'lacks the columns index, text, model: .*; it has feature, explanation'),
    (dict(index=[0], text=[7], model='m'), 'has int64 in its column text: it needs string'),
    (dict(index=[0, None], text=['a', 'b'], model='m'), 'has double in its column index: it needs int32'),
    (dict(index=[-1], text=['a'], model='m'), 'has a label of feature -1'),
])
def test_what_is_no_table_of_labels(with_labels, columns, says):
    with pytest.raises(ValueError, match=f'labels.parquet {says}'): with_labels(columns)


def test_labels_that_cannot_be_read(tmp_path, file):
    save_features([row(0)], file)
    (tmp_path/'labels.parquet').write_text('no')
    with pytest.raises(ValueError, match='labels.parquet is not a readable table of labels'):
        load_features(preset_with(file))


def test_an_index_of_pandas_is_no_column(tmp_path, file):
    "pandas writes a range as a note"
    labels = pd.DataFrame({'text': ['a', 'b'], 'model': 'm'}, index=pd.RangeIndex(2, name='index'))
    labels.to_parquet(tmp_path/'labels.parquet')
    with pytest.raises(ValueError, match=r'labels.parquet lacks the columns index.*save it behind reset_index\(\)'):
        more_labels(file)
    labels.reset_index().to_parquet(tmp_path/'labels.parquet')
    assert set(more_labels(file)) == {0, 1}


# ---- the SAE that the features are of

@pytest.mark.parametrize('text', ['[1]', '{', ''])
def test_a_card_that_is_none(tmp_path, file, text):
    save_features([row(0)], file)
    (tmp_path/'features.json').write_text(text)
    with pytest.raises(ValueError, match='features.json'): card_of(file)


@pytest.fixture
def trained_again(tmp_path, file):
    "A preset whose features were read from an SAE that is another one now"
    tiny_sae(tmp_path/'sae')
    save_features([row(0, 'x')], file)
    preset = preset_with(file, sae=str(tmp_path/'sae'))
    check_sae_of(preset) # no card: nothing is known of it
    card = dict(sae_sha256=FeatureReader.load(tmp_path/'sae').sha256)
    (tmp_path/'features.json').write_text(json.dumps(card))
    check_sae_of(preset)
    tiny_sae(tmp_path/'sae', seed=1)
    return preset


@pytest.mark.parametrize('look', [check_sae_of, FeatureExplorer])
def test_an_sae_that_was_trained_again_is_noticed(trained_again, look):
    "Its features are those of the old one, also where nothing but the table is looked at"
    says = 'features.parquet was read from an SAE with hash .*, this one has .*: make it again'
    with pytest.raises(ValueError, match=f'{says} with `saeexplainer features PRESET --anew`'):
        look(trained_again)


def test_an_sae_that_is_not_here_is_not_compared(trained_again):
    check_sae_of(dataclasses.replace(trained_again, sae='no/such/folder'))


def test_a_feature_that_the_sae_does_not_have_names_the_file(file):
    pd.DataFrame({'index': [0, 40]}).to_parquet(file)
    check_features_of(file, SimpleNamespace(sha256='a', n_features=41))
    with pytest.raises(ValueError, match='features.parquet has a feature 40, the SAE has features 0 to 39'):
        check_features_of(file, SimpleNamespace(sha256='a', n_features=40))


# ---- what is said of features that no stage uses

@pytest.mark.parametrize('counts', [dict(dense=256), dict(dense=9, dead=1)])
def test_a_file_of_dense_features_explains_why_it_is_of_no_use(counts):
    assert unused(counts) == '; dense features fire on more than 3% of the tokens, and no stage uses them'


@pytest.mark.parametrize('counts', [dict(dense=256, unlabelled=1), dict(dead=3), {}])
def test_other_files_need_no_such_words(counts):
    assert unused(counts) == ''
