"Names, splits, the file of features, and Neuronpedia: its bulk store and its API, on a server of our own"
import copy, dataclasses, itertools, json, math, os, pickle, signal, subprocess, sys, time, tracemalloc
from pathlib import Path
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import saeexplainer.features as F
import saeexplainer.sources.neuronpedia as N
from neuronpedia_server import CUT, SHORT, STALL, Neuronpedia, activation, label, stats
from saeexplainer.features import Context, Contexts, Explanation, FEATURES_SCHEMA, FeatureId, context_row, features_file, labels_of, load_features, save_features, split_features, strongest_contexts
from saeexplainer.sources.neuronpedia import label_row, neuronpedia_export, neuronpedia_feature, shard_table, stats_row
from saeexplainer.presets import load_preset


@pytest.mark.parametrize('text', ['', 'a/b', 'a/b/c', 'a/b/-1', 'a//3', 'a/b/1/2'])
def test_wrong_names(text):
    with pytest.raises(ValueError, match="is not a feature: write model/source/index, such as 'smollm2-135m/9-res-4k/123'"): FeatureId.parse(text)


def test_splits_depend_on_ids_sizes_and_seed_alone():
    ids = [FeatureId('m', 's', i) for i in range(200)]
    sizes = dict(test=20, preference=30, sft=100)
    a = split_features(ids, sizes, seed=3)
    assert a == split_features(list(reversed(ids)) + ids[:5], sizes, seed=3) != split_features(ids, sizes, seed=4)
    assert len(set(sum(a.values(), []))) == 150
    assert split_features(ids, dict(test=20), seed=3)['test'] == a['test'] # a smaller run tests on what the larger tests on
    with pytest.raises(ValueError, match='150 test \\+ 100 sft features are wanted, there are 200'): split_features(ids, dict(test=150, sft=100))
    for n in (-1, 1.5, True):
        with pytest.raises(ValueError, match=f'{n} features are wanted for a: it is a whole number from 0'): split_features(['a', 'b', 'c'], dict(a=n, b=1))


# the file

CONTEXT = Context('a book', ('The', ' national', ' park'), (0., 9.125, .5), 1)

def row(index, label=None, status='ok', said=(), **more):
    return dict(index=index, density=.01, max_act=8., status=status, explanation=label, words=[], explanations=list(said), contexts=[CONTEXT], **more)

def preset_with(file, **fields): return load_preset('gpt2-small-l8', features=str(file), **fields)


def test_where_features_are(tmp_path, monkeypatch):
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data')); monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    preset = load_preset('gpt2-small-l8')
    assert features_file(preset) == tmp_path/'cache/features/gpt2-small/8-res-jb/features.parquet'
    with pytest.raises(FileNotFoundError, match='there is no .*/cache/features/gpt2-small/8-res-jb/features.parquet: `saeexplainer features gpt2-small-l8` makes it'):
        load_features(preset)
    shipped = save_features([row(0)], tmp_path/'data/gpt2-small-l8/features.parquet')
    assert features_file(preset) == shipped
    given = save_features([row(0)], tmp_path/'given.parquet')
    assert features_file(preset_with(given)) == given
    assert features_file(preset_with('mine/features.parquet')) == tmp_path/'data/mine/features.parquet' # relative to data/
    monkeypatch.chdir(tmp_path)
    assert features_file(preset_with('given.parquet')).samefile(given)


def test_features_of_another_source_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path)); monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    preset = dataclasses.replace(load_preset('smollm2-135m'), name='mine')
    shipped = save_features([row(0)], tmp_path/'smollm2-135m/features.parquet', preset.source)
    assert features_file(preset) == features_file(load_preset('smollm2-135m')) == shipped # a preset of one's own on the same SAE
    other = load_preset(preset, source='smollm2-135m/5-res')
    assert features_file(other) == tmp_path/'cache/features/smollm2-135m/5-res/features.parquet'
    with pytest.raises(ValueError, match='holds features of smollm2-135m/9-res-4k, the preset explains smollm2-135m/5-res: set its field features'):
        load_features(load_preset(other, features=str(shipped)))


def test_broken_tables(tmp_path):
    (file := tmp_path/'features.parquet').write_text('not parquet')
    with pytest.raises(ValueError, match='is not a readable feature table'): load_features(preset_with(file))
    pq.write_table(pa.table({'index': [0], 'label': ['x']}), file)
    with pytest.raises(ValueError, match='is not a feature table: it lacks the columns density, max_act, status, explanation, words, contexts'): load_features(preset_with(file))
    with pytest.raises(ValueError, match="a feature's row lacks density, max_act"): save_features([dict(index=1)], tmp_path/'other.parquet')
    assert not (tmp_path/'other.parquet').exists()


def test_what_is_saved_is_loaded(tmp_path):
    said = [Explanation('parks', 'gpt-5', 'a'), dict(text='nations', model='gpt-4o-mini', type='b')]
    rows = [row(3, 'parks', said=said), row(7, None, 'dense')]
    for rows in (rows, iter(rows), pd.DataFrame([{**r, 'contexts': [c.row() for c in r['contexts']]} for r in rows])):
        file = save_features(rows, tmp_path/'deep'/'features.parquet')
        assert [f.name for f in file.parent.iterdir()] == ['features.parquet'] and pq.read_schema(file).equals(FEATURES_SCHEMA)
        a, b = load_features(preset_with(file))
        assert (str(a.id), a.explanation, a.status, a.max_act, a.words) == ('gpt2-small/8-res-jb/3', 'parks', 'ok', 8., ())
        assert a.explanations == (Explanation('parks', 'gpt-5', 'a'), Explanation('nations', 'gpt-4o-mini', 'b')) and a.contexts == (CONTEXT,)
        assert (b.explanation, b.status, b.explanations) == (None, 'dense', ())
    assert pq.ParquetFile(file).metadata.row_group(0).column(0).compression == 'ZSTD'


def test_a_file_without_explanations_still_loads(tmp_path):
    file = tmp_path/'features.parquet'
    pq.write_table(pa.Table.from_pylist([{**row(0, 'parks'), 'contexts': []}], FEATURES_SCHEMA).drop_columns('explanations'), file)
    [f] = load_features(preset_with(file))
    assert (f.explanation, f.explanations, len(f.contexts)) == ('parks', (), 0)
    assert load_features(preset_with(file, label_model='gpt-5')) == [f] # it has one label per feature, whoever made it


def test_half_precision_has_a_largest_number(tmp_path):
    [f] = load_features(preset_with(save_features([{**row(0, 'x'), 'contexts': [Context('t', ('a',), (1e6,), 0)]}], tmp_path/'f.parquet')))
    assert f.contexts[0].values == (65504.,)


def test_label_model_chooses_the_label(tmp_path):
    a, b = Explanation('first', 'gpt-5'), Explanation('second', 'gpt-5')
    other = Explanation('other', 'gpt-4o-mini')
    rows = [row(0, 'other', said=[other, a, b]), row(1, None, 'unlabelled', [b]), row(2, 'other', said=[other]), row(3, None, 'dead', [a]),
            row(4, None, 'dense', [a]), row(5, None, 'incomplete', [a])]
    file = save_features(rows, tmp_path/'features.parquet')
    load = lambda model: [(f.explanation, f.status) for f in load_features(preset_with(file, label_model=model))]
    assert load(None) == [('other', 'ok'), (None, 'unlabelled'), ('other', 'ok'), (None, 'dead'), (None, 'dense'), (None, 'incomplete')]
    assert load('gpt-5') == [('first', 'ok'), ('second', 'ok'), (None, 'unlabelled'), (None, 'dead'), (None, 'dense'), (None, 'incomplete')]
    assert load('gpt-4o-mini')[:3] == [('other', 'ok'), (None, 'unlabelled'), ('other', 'ok')]
    with pytest.raises(ValueError, match=r"features.parquet has no labels of 'gpt-4': it has those of gpt-5 \(5\), gpt-4o-mini \(2\)"): load('gpt-4')
    assert labels_of(load_features(preset_with(file)), 'gpt-5') == {0: 'first', 1: 'second', 3: 'first', 4: 'first', 5: 'first'}


def test_words_at_the_peaks_stay_whatever_the_label(tmp_path):
    file = save_features([{**row(0, "the word 'x'", said=[Explanation("the word 'x'", 'words'), Explanation('y', 'gpt-5')]), 'words': ['x']}], tmp_path/'f.parquet')
    assert [load_features(preset_with(file, label_model=m))[0].words for m in (None, 'words', 'gpt-5')] == [('x',)]*3


def test_contexts_are_a_sequence():
    made = [Context('t', ('a', f'b{i}'), (0., float(i)), 1) for i in range(3)]
    contexts = Contexts(pa.array([None, [], [c.row() for c in made]], FEATURES_SCHEMA.field('contexts').type), 2)
    assert len(contexts) == 3 and list(contexts) == made and contexts == tuple(made) and tuple(made) == contexts and contexts != tuple(made[:2])
    assert contexts[0] == made[0] and contexts[-1] == made[2] and contexts[1:] == tuple(made[1:]) and contexts[::-1] == tuple(made[::-1])
    assert made[1] in contexts and hash(contexts) == hash(tuple(made)) and contexts.index(made[2]) == 2
    with pytest.raises(IndexError): contexts[3]
    assert [len(Contexts(contexts.column, i)) for i in (0, 1)] == [0, 0] and not Contexts(contexts.column, 0)
    assert pickle.loads(pickle.dumps(contexts)) == tuple(made) and len(pickle.dumps(Contexts(contexts.column, 1))) < 100 and copy.deepcopy(contexts) == contexts


def test_contexts_stay_in_arrow(tmp_path):
    n, k, length = 20_000, 16, 32
    offsets = lambda size, each: pa.array(np.arange(size+1, dtype=np.int32)*each)
    words = pa.DictionaryArray.from_arrays(pa.array(np.arange(n*k*length, dtype=np.int32) % 97), pa.array([f' word{i}' for i in range(97)])).dictionary_decode()
    struct = pa.StructArray.from_arrays([pa.array(['t']*(n*k)), pa.ListArray.from_arrays(offsets(n*k, length), words),
        pa.ListArray.from_arrays(offsets(n*k, length), pa.array(np.tile(np.float16(np.arange(length)), n*k))), pa.array(np.full(n*k, 31, np.int16))],
        fields=list(FEATURES_SCHEMA.field('contexts').type.value_type))
    columns = dict(index=range(n), density=[.1]*n, max_act=[31.]*n, status=['ok']*n, explanation=['x']*n, words=[[]]*n, explanations=[[dict(text='x', model='m', type='')]]*n)
    table = pa.table([*(pa.array(v, FEATURES_SCHEMA.field(c).type) for c, v in columns.items()), pa.ListArray.from_arrays(offsets(n, k), struct), pa.nulls(n, FEATURES_SCHEMA.field('test_contexts').type)], schema=FEATURES_SCHEMA)
    pq.write_table(table, file := tmp_path/'features.parquet', row_group_size=4096, compression='none')
    preset = preset_with(file)
    tracemalloc.start()
    features = load_features(preset)
    lazy, _ = tracemalloc.get_traced_memory()
    part = [tuple(f.contexts) for f in features[:50]]
    tuples = (tracemalloc.get_traced_memory()[0] - lazy)*n/len(part)
    tracemalloc.stop()
    assert len(features) == n and features[-1].contexts[15].values[31] == 31. and features[-1].contexts[15].tokens[-1] == f' word{(n*k*length-1) % 97}'
    assert lazy < 30e6 and tuples > 20*lazy, (lazy, tuples)


BROKEN = [(dict(index=[3, 3]), 'has feature 3 twice: keep one row of each'), (dict(index=[1, -1]), 'has a row whose index is -1'), (dict(index=[1, None]), 'float64|double in its column index|has a row whose index is None'),
          (dict(max_act=[8., math.inf]), 'the strongest activation of feature 1 is inf: it is a number from 0'), (dict(max_act=[8., -1.]), 'the strongest activation of feature 1 is -1.0'),
          (dict(status=['ok', 'good']), "the status of feature 1 is 'good': there are ok, unlabelled, dead, dense, incomplete"), (dict(explanation=[7, 8]), 'has int64 in its column explanation: it needs string'),
          (dict(max_act=['8', '9']), 'in its column max_act: it needs float'), (dict(words=['a', 'b']), 'in its column words: it needs list<'), (dict(contexts=[[dict(source='t')]]*2), 'in its column contexts'),
          *((dict(contexts=[[], [dict(source='t', tokens=['a', 'b'], values=[0., 1.], peak=0), dict(source='t', **bad)]]), 'a context of feature 1 has its peak outside its tokens, or not as many tokens as values')
            for bad in (dict(tokens=['a', 'b'], values=[0., 1.], peak=2), dict(tokens=['a', 'b'], values=[0., 1.], peak=-1), dict(tokens=[], values=[], peak=0), dict(tokens=['a'], values=[0., 1.], peak=0), dict(tokens=None, values=[1.], peak=0))),
          (dict(contexts=[[], [dict(source='t', tokens=['a', None], values=[0., 1.], peak=0)]]), 'feature 1 has contexts in which a token or a value is missing'),
          (dict(contexts=[[], [dict(source='t', tokens=['a', 'b'], values=[0., math.inf], peak=0)]]), 'a context of feature 1 has a value that is no number, or infinite'),
          (dict(contexts=[[], [None, dict(source='t', tokens=['a'], values=[1.], peak=0)]]), 'a context of feature 1 is missing'), (dict(words=[['a'], [None, 'b']]), 'one of the words of feature 1 is missing'),
          *((dict(contexts=[[], [dict(source='t', tokens=['a'], values=[1.], peak=0) | {name: None}]]), f'a context of feature 1 has no {name}') for name in ('tokens', 'values', 'peak')),
          *((dict(density=[.1, share]), f'feature 1: its density is {share}: it is a share from 0 to 1') for share in (1.5, -1., math.inf)), (dict(index=[1, 2**31]), 'has a row whose index is 2147483648')]

@pytest.mark.parametrize('columns, says', BROKEN, ids=[says[:40] for _, says in BROKEN])
def test_a_table_that_others_wrote_is_checked(tmp_path, columns, says):
    plain = dict(index=[0, 1], density=[.1, .1], max_act=[8., 8.], status=['ok', 'ok'], explanation=['x', 'y'], words=[[], []], contexts=[[dict(source='t', tokens=['a'], values=[1.], peak=0)]]*2)
    pd.DataFrame(plain).to_parquet(tmp_path/'features.parquet')
    assert [f.explanation for f in load_features(preset_with(tmp_path/'features.parquet'))] == ['x', 'y']
    pd.DataFrame(plain | columns).to_parquet(tmp_path/'features.parquet')
    with pytest.raises(ValueError, match=says) as e: load_features(preset_with(tmp_path/'features.parquet'))
    assert 'features.parquet' in str(e.value) and '\n' not in str(e.value)


UNFIT = [(dict(index=1.9), "index is 1.9: it is a whole number from 0"), *((dict(index=i), "index is") for i in (-1, 2**31, True, '1', None, math.nan)),
         (dict(max_act=1e39), 'feature 1: its max_act is 1e.39: it is a number from 0 to 3.4e.38'), (dict(max_act=-1.), 'feature 1: its max_act is -1.0'), (dict(max_act='8'), "feature 1: its max_act is '8', not a number"),
         (dict(density=1.5), 'feature 1: its density is 1.5'), (dict(status='good'), "feature 1: its status is 'good': there are ok"), (dict(words='abc'), "feature 1: its words are 'abc', not a list"),
         (dict(words=[None]), 'feature 1: one of its words is missing'), (dict(words=[5]), r'feature 1 has \[5\] in its column words'), (dict(explanations=['a']), "feature 1 has .'a'. in its column explanations"),
         (dict(contexts='abc'), "feature 1: its contexts are 'abc', not a list"), (dict(contexts=[None]), 'feature 1: a context is None: it needs source, tokens, values and peak'),
         *((dict(contexts=[dict(source='t', tokens=['a'], values=[1.], peak=0) | bad]), 'feature 1: a context has') for bad in (dict(tokens='a'), dict(tokens=[1]), dict(values=None), dict(values=[math.nan]), dict(peak=None), dict(peak=.5))),
         *((dict(contexts=[bad]), 'feature 1: a context has') for bad in (Context('t', ('a',), (math.nan,), 0), Context('t', ('a',), (1.,), 3), Context('t', 'a', (1.,), 0)))]

@pytest.mark.parametrize('columns, says', UNFIT, ids=[str(columns)[:60] for columns, _ in UNFIT])
def test_a_row_that_could_not_be_read_again_is_not_written(tmp_path, columns, says):
    with pytest.raises(ValueError, match=says) as e: save_features([row(0), {**row(1), **columns}], tmp_path/'features.parquet')
    assert f'{tmp_path}/features.parquet cannot be written: ' in str(e.value) and '\n' not in str(e.value) and not list(tmp_path.iterdir())


def test_rows_are_written_once_and_what_is_missing_is_none(tmp_path):
    with pytest.raises(ValueError, match='feature 1 comes twice: keep one row of each'): save_features([row(1), row(1)], tmp_path/'features.parquet')
    unknown = {**row(2), 'index': np.float64(2), 'max_act': None, 'density': math.nan, 'words': None, 'contexts': math.nan, 'explanations': None}
    places = {**row(3), 'words': [' ', 'a'], 'contexts': [dict(source=None, tokens=['a'], values=[1.], peak=0)]}
    a, b = load_features(preset_with(save_features([unknown, places], tmp_path/'features.parquet')))
    assert (a.index, a.words, len(a.contexts), a.explanations) == (2, (), 0, ()) and math.isnan(a.max_act) and math.isnan(a.density)
    assert b.words == ('a',) and b.contexts[0].source == ''


def test_what_is_missing_in_a_table(tmp_path):
    "Blank labels are none, unknown activations are NaN, whoever is not named is unnamed"
    said = [[dict(text='a', model=None, type=None), dict(text=None, model='m', type='t'), dict(text='  ', model='m', type='t')], [], None]
    pd.DataFrame(dict(index=[0, 1, 2], density=[.1, None, .1], max_act=[8., np.nan, 1.], status='ok', explanation=['a', '  ', None], words=[[], [], None], explanations=said, contexts=[[], [], None])).to_parquet(tmp_path/'features.parquet')
    a, b, c = load_features(preset_with(tmp_path/'features.parquet'))
    assert [f.status for f in load_features(preset_with(save_features([row(0, 'a'), {**row(1, 'b'), 'max_act': 0.}], tmp_path/'silent.parquet')))] == ['ok', 'dead']
    assert a.explanations == (Explanation('a', 'unnamed'),) and (a.explanation, a.status) == ('a', 'ok')
    assert (b.explanation, b.status) == (c.explanation, c.status) == (None, 'unlabelled') and math.isnan(b.max_act) and math.isnan(b.density) and len(c.contexts) == 0


def test_labels_that_others_wrote(tmp_path, capsys):
    save_features([row(0, 'x', said=[Explanation('x', 'm')]), row(1)], tmp_path/'features.parquet')
    def labels(frame, model=None):
        pd.DataFrame(frame).to_parquet(tmp_path/'labels.parquet')
        return [f.explanations for f in load_features(preset_with(tmp_path/'features.parquet', label_model=model))]
    assert labels(dict(index=[0, 1], text=['a', 'b'], model='mine'), 'mine') == [(Explanation('x', 'm'), Explanation('a', 'mine')), (Explanation('b', 'mine'),)] # without type
    assert labels(dict(index=[0, 1, 1], text=['  ', None, 'b'], model=['mine', 'mine', None], type='t')) == [(Explanation('x', 'm'),), (Explanation('b', 'unnamed', 't'),)]
    with pytest.raises(ValueError, match='labels.parquet lacks the columns index, text, model: .*; it has feature, explanation'): labels(dict(feature=[0], explanation=['x']))
    with pytest.raises(ValueError, match='labels.parquet has int64 in its column text: it needs string'): labels(dict(index=[0], text=[7], model='m'))
    with pytest.raises(ValueError, match='labels.parquet has double in its column index: it needs int32'): labels(dict(index=[0, None], text=['a', 'b'], model='m'))
    assert labels(dict(index=[], text=[], model=[]))[0] == labels(dict(index=[0, 0], text=['x', 'x'], model='m'))[0] == (Explanation('x', 'm'),) # no label, and the same one again
    with pytest.raises(ValueError, match='labels.parquet has a label of feature -1'): labels(dict(index=[-1], text=['a'], model='m'))
    capsys.readouterr()
    assert labels(dict(index=[0, 7, 8], text=['a', 'b', 'c'], model='m'))[0][-1].text == 'a' and 'has labels of 2 features that it does not hold: they are left out' in capsys.readouterr().err
    (tmp_path/'labels.parquet').write_text('no')
    with pytest.raises(ValueError, match='labels.parquet is not a readable table of labels'): load_features(preset_with(tmp_path/'features.parquet'))
    with pytest.raises(ValueError, match='feature 1 has the explanation 7, not a text'): save_features([row(1, 7)], tmp_path/'other.parquet')
    with pytest.raises(ValueError, match='a context has 1 tokens, 1 values and its peak at 3'): save_features([{**row(1), 'contexts': [dict(source='t', tokens=['a'], values=[1.], peak=3)]}], tmp_path/'other.parquet')
    save_features([row(1, 'half \ud83d', said=[Explanation('half \ud83d', 'm')])], tmp_path/'half'/'features.parquet')
    assert load_features(preset_with(tmp_path/'half'/'features.parquet'))[0].explanation == 'half ?'


def test_a_card_that_is_none(tmp_path):
    save_features([row(0)], tmp_path/'features.parquet')
    for text in ('[1]', '{', ''):
        (tmp_path/'features.json').write_text(text)
        with pytest.raises(ValueError, match='features.json'): F.card_of(tmp_path/'features.parquet')


def test_an_sae_that_was_trained_again_is_noticed(tmp_path, monkeypatch):
    "Its features are those of the old one, also where nothing but the table is looked at"
    from helpers import tiny_sae
    from saeexplainer.explorer import FeatureExplorer
    from saeexplainer.saes import FeatureReader
    preset = preset_with(save_features([row(0, 'x')], tmp_path/'features.parquet'), sae=str(tiny_sae(tmp_path/'sae')))
    F.check_sae_of(preset) # no card: nothing is known of it
    (tmp_path/'features.json').write_text(json.dumps(dict(sae_sha256=FeatureReader.load(tmp_path/'sae').sha256)))
    F.check_sae_of(preset)
    tiny_sae(tmp_path/'sae', seed=1)
    for look in (lambda: F.check_sae_of(preset), lambda: FeatureExplorer(preset)):
        with pytest.raises(ValueError, match='features.parquet was read from an SAE with hash .*, this one has .*: make it again with `saeexplainer features PRESET --anew`'): look()
    F.check_sae_of(dataclasses.replace(preset, sae='no/such/folder'))


def test_dense_features_alone_are_explained():
    assert F.unused(dict(dense=256)) == F.unused(dict(dense=9, dead=1)) == '; dense features fire on more than 3% of the tokens, and no stage uses them'
    assert F.unused(dict(dense=256, unlabelled=1)) == F.unused(dict(dead=3)) == F.unused({}) == ''


# lines

@pytest.mark.parametrize('peak, n', [(0, 100), (5, 100), (20, 100), (50, 100), (87, 100), (88, 100), (99, 100), (0, 1), (3, 4), (31, 32), (32, 33)])
def test_contexts_are_cropped_around_the_peak(peak, n):
    whole = activation(1, peak, n=n)
    c = context_row(whole)
    assert len(c.tokens) == len(c.values) == min(n, 32) and c.tokens[c.peak] == f' w{peak}' and c.values[c.peak] == 8. == max(c.values)
    first = int(c.tokens[0][2:])
    assert c.tokens == tuple(whole['tokens'][first:first+32]) and c.values == tuple(whole['values'][first:first+32])
    assert c.peak == peak - first and (c.peak >= min(peak, 20) or n <= 32)


def test_of_each_text_the_strongest():
    rows = [activation(1, 50, 2., word='a'), activation(1, 50, 9., word='b'), activation(1, 50, 5., word='a'), activation(1, 50, 4., word='c')]
    assert [(c.tokens[0][1], c.values[c.peak]) for c in strongest_contexts(map(context_row, rows), 4)] == [('b', 9.), ('a', 5.), ('c', 4.)]
    table = shard_table([json.dumps(activation(1, 50, float(s), word=f'x{s}')) for s in np.random.default_rng(0).permutation(40) + 1], 'activations', 3)
    assert [c['values'][c['peak']] for c in table['found'][0].as_py()] == [40, 39, 38]


BAD = ['{"index": 1', 'null', '[]', '{}', *map(json.dumps, [dict(index=-1), dict(index=None), dict(index=True), dict(index='1.5'), dict(index=2**31)])]

@pytest.mark.parametrize('kind, more', [
    ('features', [dict(index=1), stats(1, None), stats(1, 'x'), stats(1, math.nan), stats(1, math.inf), stats(1, -1.), {**stats(1), 'frac_nonzero': 'x'}, stats(1, 1e39), stats(1, True), stats(1, 8., 1.5), stats(1, 8., -.1), {**stats(1), 'index': '1_0'}]),
    ('explanations', [dict(index=1), {**label(1, ''), 'description': 7}, label(1, 'x', 7), label(1, 0), label(1, []), label(1, False), label(1, math.nan), label(1, 'x', math.nan), label(1, 'x', ['m']), {**label(1, 'x'), 'typeName': 7}, {**label(1, 'x'), 'index': 'one'}]),
    ('activations', [dict(index=1, tokens=['a'], values=[1., 2.]), dict(index=1, tokens=[], values=[]), dict(index=1, tokens=[3], values=[1.]), dict(index=1, tokens=None, values=[1.]),
                     dict(index=1, tokens=['a'], values=[None]), dict(index=1, tokens=['a'], values=[math.nan]), dict(index=1, tokens=['a'], values=[10**400]), dict(index=1, tokens=['a'], values=[1e39]), dict(index=1, tokens='ab', values=[1., 2.]), dict(index=1, tokens=['a'], values='5'), dict(index=1, tokens=['a'], values=[True])])])
def test_malformed_lines_are_counted(kind, more):
    good = dict(features=stats, explanations=lambda i: label(i, 'x'), activations=activation)[kind](1)
    lines = [json.dumps(good), *BAD, '', ' \n', *map(json.dumps, more), b'\xff\xfe{', json.dumps({**good, 'index': 2}).encode()]
    table = shard_table(lines, kind)
    assert table['index'].to_pylist() == [1, 2]
    assert table.schema.metadata == {b'rows': str(len(lines)-2).encode(), b'bad': str(len(lines)-4).encode()}


def test_half_characters_cost_themselves(tmp_path):
    "JSON can spell half of an emoji, and no file can hold it"
    files = source()
    files[f'{AT}explanations/batch-0.jsonl.gz'][2]['description'] = 'cut \ud83d'
    files[f'{AT}explanations/batch-0.jsonl.gz'][3]['description'] = 'whole \U0001f600'
    cut, whole = (int(files[f'{AT}explanations/batch-0.jsonl.gz'][i]['index']) for i in (2, 3))
    files[f'{AT}activations/batch-0.jsonl.gz'][1]['tokens'][50] = '\udfff'
    files[f'{AT}activations/batch-0.jsonl.gz'].append('["deep", ' + '['*100_000)
    with Neuronpedia(files) as server: e = export(server, tmp_path)
    features = loaded(tmp_path)
    assert (features[cut].explanation, features[whole].explanation) == ('cut ?', 'whole \U0001f600') and features[0].contexts[0].tokens[20] == '?'
    assert (e.n_features, e.mended_rows, e.bad_rows) == (13, 2, 1) and "2 lines with half a character, read as '?'" in str(e)
    assert json.loads((tmp_path/'features.json').read_text())['mended_rows'] == 2


def test_forms_of_a_line():
    assert N.row_index(dict(index='7')) == N.row_index(dict(index=7)) == 7
    for embedding in ('[0.1, 0.2]', [.1, .2], None, 'not even json'): assert label_row(label(1, ' x ', embedding=embedding)) == Explanation('x', 'gpt-4o-mini', 'oai_token-act-pair')
    assert label_row(label(1, '')) is label_row(label(1, '  ')) is label_row(label(1, None)) is None
    assert label_row(label(1, 'x', None)).model == 'unnamed'
    assert math.isnan(stats_row(dict(index=1, maxActApprox=0, frac_nonzero=None))['density'])


# the store

@pytest.fixture(autouse=True)
def quick(monkeypatch): # no long pauses, no proxy, no key, nothing remembered of the last call
    for name in ('NEURONPEDIA_API_KEY', 'NEURONPEDIA_STORE', 'NEURONPEDIA_API'): monkeypatch.delenv(name, raising=False)
    for name in ('NO_PROXY', 'no_proxy'): monkeypatch.setenv(name, '127.0.0.1')
    monkeypatch.setattr(N, 'PAUSE', .005); monkeypatch.setattr(N._turns, 'free_at', 0.)


AT = 'v1/m/s/'
def source(**more): # a small source: features 0 to 12, in the order of their indices as text
    order = sorted(range(13), key=str)
    files = {f'{AT}features/batch-{i}.jsonl.gz': [stats(j, 0. if j == 5 else 8. + j) for j in part] for i, part in enumerate((order[:6], order[6:7], order[7:]))}
    files |= {f'{AT}explanations/batch-0.jsonl.gz': [label(j, f'label {j}') for j in order[:9]], f'{AT}explanations/batch-1.jsonl.gz': [label(j, f'label {j}') for j in order[9:]]}
    files |= {f'{AT}activations/batch-{i}.jsonl.gz': [activation(j, 50, s, word=f'{j}-{s}-') for j in part for s in (1., 8., 4., 0.)] for i, part in enumerate((order[:8], order[8:]))}
    return files | {AT + k: v for k, v in more.items()}

def export(server, folder, **kw): return neuronpedia_export('m', 's', folder=folder, store=server.url, **kw)
def loaded(folder, **fields): return {f.index: f for f in load_features(preset_with(folder/'features.parquet', source='m/s', **fields))}


def test_export_of_a_source(tmp_path):
    with Neuronpedia(source()) as server:
        e = export(server, tmp_path, n_contexts=2)
        assert len(server.asked()) == len(set(server.asked())) == 7
    features = loaded(tmp_path)
    assert list(features) == list(range(13)) and [f.status for f in features.values()] == ['ok']*5 + ['dead'] + ['ok']*7
    assert all(f.explanation == (None if i == 5 else f'label {i}') and f.max_act == (0. if i == 5 else 8. + i) and f.density == .01 for i, f in features.items())
    for i, f in features.items():
        assert [(c.values[c.peak], c.tokens[c.peak]) for c in f.contexts] == [(8., f' {i}-8.0-50'), (4., f' {i}-4.0-50')] and all(len(c.tokens) == 32 for c in f.contexts)
    assert (e.n_features, e.labelled, e.dead, e.incomplete, e.bad_rows, e.explainers, e.default, e.absent, e.missing, e.skipped) == (
        13, 12, 1, 0, 0, {'gpt-4o-mini': 13}, 'gpt-4o-mini', 0, (), ())
    assert str(e).splitlines() == ['m/s: 13 features, 12 (92.3%) with a label of gpt-4o-mini (most labels)', '  labels of gpt-4o-mini (13); 0 features have several', '  12 ok, 1 dead',
                                   f'  {tmp_path}/features.parquet']
    card = json.loads((tmp_path/'features.json').read_text())
    assert card['store'] == f'{server.url}/v1/m/s/' and len(card['keys']) == 7 and card['rows'] == 13+13+52 and card['chosen'] == 'most labels' and card['coverage'] == 12/13
    assert not list(tmp_path.rglob('*.part'))


def test_numbers_that_no_table_holds_are_counted(tmp_path):
    files = source()
    part = files[f'{AT}features/batch-0.jsonl.gz']
    for i, change in enumerate((dict(maxActApprox=1e39), dict(maxActApprox=-2.), dict(frac_nonzero=7.))): part[i] |= change
    damaged = [int(part[i]['index']) for i in range(3)]
    with Neuronpedia(files) as server:
        e = export(server, tmp_path)
        features = loaded(tmp_path)
        assert e.bad_rows == 3 and all(features[i].status == 'incomplete' and math.isnan(features[i].max_act) for i in damaged)
        shard = tmp_path/'shards'/'features'/'batch-1.parquet' # as an earlier version wrote it
        table = pq.read_table(shard)
        [index] = table['index'].to_pylist()
        pq.write_table(pa.Table.from_pylist([dict(index=index, found=dict(max_act=1e39, density=.1))], table.schema), shard)
        again = export(server, tmp_path)
        assert again.bad_rows == 4 and loaded(tmp_path)[index].status == 'incomplete'
        shard.write_bytes(b'XXXX' + shard.read_bytes()[4:]) # damaged where pyarrow does not look: it is fetched again
        assert export(server, tmp_path).bad_rows == 3


def test_a_long_listing_comes_in_pages(tmp_path):
    with Neuronpedia(source(), page=2) as server:
        assert export(server, tmp_path).n_features == 13
        assert len(server.asked()) == 7 and len(server.log) == 7 + 4


def test_without_contexts_activations_are_not_fetched(tmp_path):
    with Neuronpedia(source()) as server:
        export(server, tmp_path, n_contexts=0)
        assert not server.asked('activations/') and all(len(f.contexts) == 0 for f in loaded(tmp_path).values())
        export(server, tmp_path, n_contexts=2) # later, with contexts: only these are fetched
        assert len(server.asked()) == 7 and [len(f.contexts) for f in loaded(tmp_path).values()] == [2]*13


def test_finished_files_are_not_asked_again_unless_they_changed(tmp_path):
    with Neuronpedia(source()) as server:
        export(server, tmp_path); export(server, tmp_path)
        assert len(server.asked()) == 7
        export(server, tmp_path, n_contexts=1) # shards with more contexts do not serve for fewer, or fewer for more
        assert len(server.asked('activations/')) == 4 and len(server.asked()) == 9
    with Neuronpedia(source(**{'explanations/batch-1.jsonl.gz': [label(9, 'new')]})) as server:
        export(server, tmp_path, n_contexts=1)
        assert server.asked() == [f'{AT}explanations/batch-1.jsonl.gz'] and loaded(tmp_path)[9].explanation == 'new' and loaded(tmp_path)[8].status == 'unlabelled'


def test_a_missing_batch_is_said(tmp_path):
    files = source()
    lost = [int(r['index']) for r in files.pop(f'{AT}features/batch-1.jsonl.gz')]
    with Neuronpedia(files) as server: e = export(server, tmp_path)
    [f] = [f for i, f in loaded(tmp_path).items() if i in lost]
    assert (f.status, f.explanation, f.explanations[0].text) == ('incomplete', None, f'label {f.index}') and math.isnan(f.max_act) and len(f.contexts) == 3
    assert e.incomplete == 1 and e.missing == ('features/batch-1.jsonl.gz',) and '1 incomplete' in str(e) and 'missing: features/batch-1.jsonl.gz' in str(e)
    assert loaded(tmp_path, label_model='gpt-4o-mini')[f.index].status == 'incomplete'


def test_gaps_and_other_files(tmp_path):
    files = {f'{AT}features/batch-0.jsonl.gz': [stats(3), '{"index": 4, "maxAct', stats(9)], f'{AT}features/README.md': ['x'], f'{AT}logits/batch-0.jsonl.gz': ['x']}
    with Neuronpedia(files) as server: e = export(server, tmp_path)
    assert (e.n_features, e.absent, e.rows, e.bad_rows, e.default, e.missing) == (2, 8, 3, 1, None, ('explanations/',)) and len(e.skipped) == 2 and len(server.asked()) == 1
    assert '0 (0.0%) with a label' in str(e) and 'labels of nobody' in str(e) and '8 indices without any row; 1 malformed of 3 lines; 2 files of other kinds' in str(e)
    assert [f.status for f in loaded(tmp_path).values()] == ['unlabelled', 'unlabelled']


def test_several_folders_and_models(tmp_path):
    more = {'explanations-gpt-5/batch-0.jsonl.gz': [label(1, 'five one', 'gpt-5'), label(1, 'five two', 'gpt-5'), label(2, 'label 2')], # the last one is in explanations/ too
            'explanations/batch-2.jsonl.gz': [label(3, 'by hand', None), label(4, '')]}
    with Neuronpedia(source(**more)) as server:
        e = export(server, tmp_path)
        assert e.explainers == {'gpt-4o-mini': 13, 'gpt-5': 1, 'unnamed': 1} and e.several == 2 and e.default == 'gpt-4o-mini'
        assert [x.text for x in loaded(tmp_path)[1].explanations] == ['label 1', 'five one', 'five two'] and len(loaded(tmp_path)[2].explanations) == 1
        five = loaded(tmp_path, label_model='gpt-5')
        assert five[1].explanation == 'five one' and five[2].status == 'unlabelled' and five[5].status == 'dead' and labels_of(five.values(), 'unnamed') == {3: 'by hand'}
        e = export(server, tmp_path/'other', explainer='gpt-5')
        assert e.default == 'gpt-5' and e.labelled == 1 and loaded(tmp_path/'other')[1].explanation == 'five one' and '(asked for)' in str(e)


def test_unknown_explainer_is_said_before_the_rest_is_fetched(tmp_path):
    with Neuronpedia(source()) as server:
        with pytest.raises(ValueError, match=r"m/s has no labels of 'gpt-6': it has those of gpt-4o-mini \(13\)"): export(server, tmp_path, explainer='gpt-6')
        assert len(server.asked('explanations/')) == len(server.asked()) == 2


def test_names_that_lead_elsewhere_are_refused(tmp_path):
    for name in ('../x', '..', '', ' '):
        for model, source in ((name, 's'), ('m', name)):
            with pytest.raises(ValueError, match='is no model or source of Neuronpedia'): neuronpedia_export(model, source, folder=tmp_path, store='http://127.0.0.1:9')


def test_unknown_source(tmp_path):
    files = {f'v1/gemma-2-9b/{name}/features/batch-0.jsonl.gz': [stats(0)] for name in [f'{i}-gemmascope-res-16k' for i in range(20)] + ['20-gemmascope-res-131k']}
    with Neuronpedia(files, page=3) as server:
        with pytest.raises(ValueError, match="on Neuronpedia gemma-2-9b has no source '4-gemmascope-res-16': did you mean 4-gemmascope-res-16k"):
            neuronpedia_export('gemma-2-9b', '4-gemmascope-res-16', store=server.url, folder=tmp_path)
        with pytest.raises(ValueError, match="on Neuronpedia there is no model 'gemma2-9b': did you mean gemma-2-9b?"):
            neuronpedia_export('gemma2-9b', '4-gemmascope-res-16k', store=server.url, folder=tmp_path)
    with Neuronpedia() as server:
        with pytest.raises(ValueError, match='has no sources at all: set NEURONPEDIA_STORE'): export(server, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_store_is_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path)); monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'none'))
    with Neuronpedia(source()) as server:
        monkeypatch.setenv('NEURONPEDIA_STORE', server.url + '/')
        e = neuronpedia_export('m', 's')
    assert e.file == tmp_path/'features/m/s/features.parquet' == features_file(load_preset('gpt2-small-l8', source='m/s')) and (e.file.parent/'shards').is_dir()


KEY = f'{AT}features/batch-0.jsonl.gz'

def test_busy_and_failing_stores_are_asked_again(tmp_path):
    faults = {KEY: [(429, {'Retry-After': '1'})], f'{AT}explanations/batch-0.jsonl.gz': [(500, {}), (503, {})], '': [(502, {})]}
    with Neuronpedia(source(), faults=faults) as server:
        assert export(server, tmp_path).n_features == 13
        first, second = (t for path, _, t in server.log if path == KEY)
        assert second - first >= 1. and len(server.asked()) == 7 + 3


@pytest.mark.parametrize('fault', [CUT, SHORT])
def test_a_file_that_breaks_off_once(tmp_path, fault):
    with Neuronpedia(source(), faults={KEY: [fault]}) as server:
        assert export(server, tmp_path).n_features == 13 and server.asked().count(KEY) == 2


@pytest.mark.parametrize('fault', [CUT, SHORT, (404, {}), (500, {})])
def test_a_file_that_stays_broken_holds_up_no_other(tmp_path, fault):
    with Neuronpedia(source(), faults={KEY: itertools.repeat(fault)}) as server:
        with pytest.raises(ConnectionError, match=f'{KEY}.*; all other files that were read are kept in {tmp_path}/shards'): export(server, tmp_path)
        assert set(server.asked()) == {k for k in source()} and not (tmp_path/'features.parquet').exists() and len(list(tmp_path.rglob('*.parquet'))) == 6
    with Neuronpedia(source()) as server:
        assert export(server, tmp_path).labelled == 12 and server.asked() == [KEY]


def test_without_a_network_the_export_ends_soon(tmp_path):
    faults = {k: itertools.repeat((500, {})) for k in source()}
    with Neuronpedia(source(), faults=faults) as server:
        with pytest.raises(ConnectionError, match='too many 500 error responses'): export(server, tmp_path)
        assert len(set(server.asked())) == 3
    with pytest.raises(ConnectionError, match='cannot be read: .*Connection refused'): export(server, tmp_path)


def test_what_is_no_store_is_said(tmp_path):
    class Page(Neuronpedia):
        def listing(self, **query): return b'<html><p>Welcome'
    with Page() as server:
        with pytest.raises(ValueError, match='is not the store: it does not list its files as S3 does'): export(server, tmp_path)


def test_a_killed_export_goes_on(tmp_path):
    stuck = f'{AT}activations/batch-1.jsonl.gz'
    call = f'from saeexplainer.features import neuronpedia_export as e; e("m", "s", folder={str(tmp_path)!r})'
    with Neuronpedia(source(), faults={stuck: [STALL]}) as server:
        process = subprocess.Popen([sys.executable, '-c', call], env={**os.environ, 'NEURONPEDIA_STORE': server.url}, cwd=Path(F.__file__).parent.parent)
        deadline = time.monotonic() + 60
        while stuck not in server.asked() and process.poll() is None and time.monotonic() < deadline: time.sleep(.02)
        process.send_signal(signal.SIGKILL); process.wait()
        assert len(server.asked()) == 7 and len(list(tmp_path.rglob('*.parquet'))) == 6 and not (tmp_path/'features.parquet').exists()
        assert export(server, tmp_path).n_features == 13
        assert server.asked()[7:] == [stuck]
    with Neuronpedia(source()) as server: export(server, tmp_path/'whole')
    assert pq.read_table(tmp_path/'features.parquet').equals(pq.read_table(tmp_path/'whole/features.parquet'))


def test_one_export_at_a_time(tmp_path):
    from saeexplainer.files import making
    with Neuronpedia(source()) as server:
        with making(tmp_path/'features.parquet'):
            with pytest.raises(RuntimeError, match='another process is working on .*features.parquet: wait for it, or stop it'): export(server, tmp_path)
        assert export(server, tmp_path).n_features == 13 and {f.name for f in tmp_path.iterdir()} == {'features.parquet', 'features.json', 'shards'}
        shard = next((tmp_path/'shards'/'features').iterdir())
        shard.write_bytes(shard.read_bytes()[:50]) # a disk that was full
        (shard.parent/'batch-7.parquet.01234567.part').touch() # of an export that was killed
        assert export(server, tmp_path).n_features == 13 and len(server.asked()) == 8 and not list(tmp_path.rglob('*.part'))


class Endless(Neuronpedia):
    "Listings without an end, answers that drip or swell"
    kind, pages = 'same', 0
    def listing(self, prefix='', **query):
        self.pages += 1
        item = f'<Contents><Key>{prefix}features/batch-{self.pages}.jsonl.gz</Key></Contents>'
        token = dict(same='t', new=f't{self.pages}', empty=f't{self.pages}')[self.kind]
        return f'<ListBucketResult>{"" if self.kind == "empty" else item}<NextContinuationToken>{token}</NextContinuationToken></ListBucketResult>'.encode()


@pytest.mark.parametrize('kind', ['same', 'new', 'empty'])
def test_a_listing_without_an_end(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(N, 'MOST_FILES', 1000)
    with Endless() as server:
        server.kind = kind
        with pytest.raises(ValueError, match='is not the store: its list of files under v1/m/s/ does not end'): export(server, tmp_path)
        assert server.pages <= 12


def test_a_listing_of_strange_names(tmp_path):
    class Strange(Neuronpedia):
        names = '<Key>v1/m/s/features/batch-0.jsonl.gz</Key>', '<Key>v1</Key>', '<Key>../../etc/passwd</Key>'
        def listing(self, **query): return f'<ListBucketResult>{"".join(f"<Contents>{n}</Contents>" for n in self.names)}</ListBucketResult>'.encode()
    with Strange({f'{AT}features/batch-0.jsonl.gz': [stats(0)]}) as server:
        assert export(server, tmp_path).keys == ('v1/m/s/features/batch-0.jsonl.gz',)
        server.names = ('<Size>3</Size>',)
        with pytest.raises(ValueError, match='is not the store: it does not name its files as S3 does'): export(server, tmp_path)


class Slow(Neuronpedia):
    "A body of which a piece comes every now and then"
    def answer(self, request):
        request.send_response(200)
        request.end_headers()
        self.log.append((request.path, {}, 0.))
        while not self.ended.is_set():
            try: request.wfile.write(self.piece)
            except OSError: return
            self.ended.wait(self.pause)


@pytest.mark.parametrize('piece, pause, says', [(b' ', .01, 'its answer does not come to an end'), (b' '*2**20, 0., 'its answer is larger than 67 MB')])
def test_answers_without_an_end(monkeypatch, tmp_path, piece, pause, says):
    monkeypatch.setattr(N, 'TIMEOUT', (1, .2)); monkeypatch.setattr(N._turns, 'wait', lambda s: None)
    if not pause: monkeypatch.setattr(N, 'TIMEOUT', (1, 60))
    with Slow() as server:
        server.piece, server.pause = piece, pause
        for ask in (lambda: neuronpedia_feature('m/s/7', api=server.url), lambda: export(server, tmp_path)):
            with pytest.raises(ConnectionError, match=f'cannot be read: {says}'): ask()


def test_files_without_an_end(monkeypatch, tmp_path):
    monkeypatch.setattr(N, 'LONGEST_LINE', 4000); monkeypatch.setattr(N, 'MOST_LINES', 50)
    files = source()
    files[f'{AT}features/batch-0.jsonl.gz'].insert(1, '{"index": "' + 'x'*9000 + '"}')
    with Neuronpedia(files) as server:
        e = export(server, tmp_path/'long', n_contexts=0)
        assert (e.n_features, e.bad_rows, e.rows) == (13, 3, 29) # the pieces of a line that is too long are malformed
        monkeypatch.setattr(N, 'MOST_LINES', 8)
        with pytest.raises(ConnectionError, match='features/batch-0.jsonl.gz: it does not come to an end'): export(server, tmp_path/'many', n_contexts=0)


def test_who_is_asked_for_too_much_patience_does_not_wait(monkeypatch):
    response = type('Response', (), dict(headers={'Retry-After': '86400'}))
    assert N._Patient().get_retry_after(response) == 120. and N._Patient().get_retry_after(type('Response', (), dict(headers={}))) is None


# the API

ANSWER = dict(modelId='m', layer='s', index='7', maxActApprox=8.5, frac_nonzero=.002, source=dict(saelensRelease='r'),
              explanations=[dict(description='', explanationModelName='x'), dict(description='parks', explanationModelName='gpt-5', typeName='t', scores=[]),
                            dict(description='nations', explanationModelName='gpt-4o-mini', typeName='t')],
              activations=[activation(7, 3, 2.), activation(7, 60, 8.5, word='b'), activation(7, 60, 0., word='c')])

def test_one_feature(monkeypatch):
    with Neuronpedia(features={'m/s/7': ANSWER, 'm/s/8': {**ANSWER, 'explanations': []}, 'm/s/9': {**ANSWER, 'maxActApprox': 0}}) as server:
        monkeypatch.setenv('NEURONPEDIA_API', server.url); monkeypatch.setattr(N._turns, 'wait', lambda s: None)
        f = neuronpedia_feature('m/s/7')
        assert (f.id, f.explanation, f.max_act, f.density, f.status) == (FeatureId('m', 's', 7), 'parks', 8.5, .002, 'ok')
        assert [e.model for e in f.explanations] == ['gpt-5', 'gpt-4o-mini'] and [c.values[c.peak] for c in f.contexts] == [8.5, 2.] and f.contexts[0].tokens[20] == ' b60'
        assert neuronpedia_feature('m/s/7', label_model='gpt-4o-mini').explanation == 'nations'
        other = neuronpedia_feature('m/s/7', label_model='claude')
        assert (other.explanation, other.status, len(other.explanations)) == (None, 'unlabelled', 2)
        assert neuronpedia_feature(FeatureId('m', 's', 8)).status == 'unlabelled' and neuronpedia_feature('m/s/9').status == 'dead'
        assert len(neuronpedia_feature('m/s/7', n_contexts=1).contexts) == 1
        with pytest.raises(ValueError, match='Neuronpedia has no feature m/s/10'): neuronpedia_feature('m/s/10')
        assert not any('x-api-key' in {k.lower() for k in headers} for _, headers, _ in server.log)


def test_what_is_malformed_in_an_answer_is_left_out(monkeypatch, capsys):
    "As in the bulk files: one null does not hide a feature"
    bad = [dict(index='7', tokens=['a'], values=[None]), dict(index='7', tokens=None, values=[1.])]
    answer = {**ANSWER, 'activations': [*bad, *ANSWER['activations']], 'explanations': [dict(description=7), dict(description='x', explanationModelName=7), *ANSWER['explanations'], dict(description='half \ud83d')]}
    with Neuronpedia(features={'m/s/7': answer}) as server: f = neuronpedia_feature('m/s/7', api=server.url)
    assert f.explanation == 'parks' and len(f.contexts) == 2 and f.explanations[-1] == Explanation('half ?', 'unnamed')
    assert capsys.readouterr().err.splitlines() == ['2 of 6 explanations of m/s/7 are malformed and left out', '2 of 5 activations of m/s/7 are malformed and left out']


@pytest.mark.parametrize('answer', [[], 'x', dict(index='7'), {**ANSWER, 'maxActApprox': 1e39}, {**ANSWER, 'maxActApprox': -1}, {**ANSWER, 'frac_nonzero': 1.5}, {**ANSWER, 'activations': [dict(tokens=['a'], values=[])]}])
def test_answers_that_are_no_feature(answer, monkeypatch):
    with Neuronpedia(features={'m/s/7': answer}) as server:
        with pytest.raises(ValueError, match='/api/feature/m/s/7 does not describe a feature'): neuronpedia_feature('m/s/7', api=server.url)


def test_calls_keep_their_distance(monkeypatch):
    with Neuronpedia(features={'m/s/7': ANSWER}) as server:
        for _ in range(2): neuronpedia_feature('m/s/7', api=server.url)
        monkeypatch.setenv('NEURONPEDIA_API_KEY', 'sk-secret'); monkeypatch.setattr(N._turns, 'free_at', 0.)
        for _ in range(2): neuronpedia_feature('m/s/7', api=server.url)
        a, b, c, d = (t for *_, t in server.log)
        assert b - a >= .99 and .19 <= d - c < .9 and [h.get('x-api-key') for _, h, _ in server.log] == [None, None, 'sk-secret', 'sk-secret']
    with Neuronpedia(features={'m/s/7': ANSWER}, headers={'x-limit-remaining': '0'}) as server:
        monkeypatch.setattr(N._turns, 'free_at', 0.)
        neuronpedia_feature('m/s/7', api=server.url)
        assert N._turns.free_at > time.monotonic() + 50 # the next call waits


def test_a_busy_api_is_asked_again(monkeypatch):
    monkeypatch.setattr(N, 'PAUSE', .1)
    faults = [(500, {}), (429, {'Retry-After': '1', 'x-limit-remaining': '0'}), (429, {})] # after a pause, after the second that it wants, after a longer pause
    with Neuronpedia(features={'m/s/7': ANSWER}, faults={'api/feature/m/s/7': faults}) as server:
        assert neuronpedia_feature('m/s/7', api=server.url).explanation == 'parks'
        a, b, c, d = (t for *_, t in server.log)
        assert .1 <= b - a < .9 and c - b >= 1. and .4 <= d - c < .9


@pytest.mark.parametrize('fault', [(429, {}), (500, {}), (302, {'Location': '/api/feature/m/s/8'}), (401, {}), STALL])
def test_the_key_stands_in_no_error(fault, monkeypatch, caplog):
    caplog.set_level(0)
    monkeypatch.setenv('NEURONPEDIA_API_KEY', 'sk-secret'); monkeypatch.setattr(N, 'TIMEOUT', (1, .05))
    with Neuronpedia(features={'m/s/7': ANSWER, 'm/s/8': ANSWER}, faults={'api/feature/m/s/7': itertools.repeat(fault)}) as server: # redirections are not followed
        with pytest.raises(ConnectionError, match='/api/feature/m/s/7 cannot be read') as e: neuronpedia_feature('m/s/7', api=server.url)
        assert server.log[0][1]['x-api-key'] == 'sk-secret' # it was sent
    assert 'sk-secret' not in f'{e.value!r} {e.value} {vars(e.value)} {caplog.text}' and e.value.__context__ is None and e.value.__cause__ is None


@pytest.mark.parametrize('key', ['sk-secret\nx', 'sk secret', 'sk-sécret'])
def test_a_key_that_is_none_is_not_shown(key, monkeypatch):
    monkeypatch.setenv('NEURONPEDIA_API_KEY', key)
    with pytest.raises(ValueError, match='NEURONPEDIA_API_KEY holds characters that no key has') as e: neuronpedia_feature('m/s/7', api='http://127.0.0.1:9')
    assert 's' + key[1:] not in str(e.value) and 'cret' not in str(e.value)


def test_an_index_of_pandas_is_no_column(tmp_path):
    import pandas as pd
    from saeexplainer.features import more_labels
    labels = pd.DataFrame({'text': ['a', 'b'], 'model': 'm'}, index=pd.RangeIndex(2, name='index'))
    labels.to_parquet(tmp_path/'labels.parquet') # pandas writes a range as a note
    with pytest.raises(ValueError, match=r'labels.parquet lacks the columns index.*save it behind reset_index\(\)'): more_labels(tmp_path/'features.parquet')
    labels.reset_index().to_parquet(tmp_path/'labels.parquet')
    assert set(more_labels(tmp_path/'features.parquet')) == {0, 1}


def test_a_feature_that_the_sae_does_not_have_names_the_file(tmp_path):
    import pandas as pd
    from types import SimpleNamespace
    from saeexplainer.features import check_features_of
    pd.DataFrame({'index': [0, 40]}).to_parquet(tmp_path/'features.parquet')
    check_features_of(tmp_path/'features.parquet', SimpleNamespace(sha256='a', n_features=41))
    with pytest.raises(ValueError, match='features.parquet has a feature 40, the SAE has features 0 to 39'): check_features_of(tmp_path/'features.parquet', SimpleNamespace(sha256='a', n_features=40))
