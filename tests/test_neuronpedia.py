"Features of Neuronpedia: lines of its bulk store, exports, one feature of its API, all on a server of our own"
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import saeexplainer.features
from neuronpedia_server import CUT, SHORT, STALL, Neuronpedia, activation, label, stats
from saeexplainer.features import Explanation, FeatureId, features_file, labels_of, load_features
from saeexplainer.files import making
from saeexplainer.presets import load_preset
from saeexplainer.sources import neuronpedia
from saeexplainer.sources.neuronpedia import (
    context_row, label_row, neuronpedia_export, neuronpedia_feature, row_index, shard_table, stats_row,
    strongest_contexts,
)

ROOT = Path(__file__).parents[1]
NOBODY = 'http://127.0.0.1:9' # where no server listens


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "No long pauses, no proxy, no key, nothing remembered of the last call"
    for name in ('NEURONPEDIA_API_KEY', 'NEURONPEDIA_STORE', 'NEURONPEDIA_API'):
        monkeypatch.delenv(name, raising=False)
    for name in ('NO_PROXY', 'no_proxy'):
        monkeypatch.setenv(name, '127.0.0.1')
    monkeypatch.setattr(neuronpedia, 'PAUSE', .005)
    monkeypatch.setattr(neuronpedia._turns, 'free_at', 0.)


@pytest.fixture
def no_turns(monkeypatch):
    "Calls of the API need not wait for each other"
    monkeypatch.setattr(neuronpedia._turns, 'wait', lambda seconds: None)


# ---- lines

@pytest.mark.parametrize('peak, n', [
    (0, 100),
    (5, 100),
    (20, 100),
    (50, 100),
    (87, 100),
    (88, 100),
    (99, 100),
    (0, 1),
    (3, 4),
    (31, 32),
    (32, 33),
])
def test_contexts_are_cropped_around_the_peak(peak, n):
    whole = activation(1, peak, n=n)
    context = context_row(whole)
    first = int(context.tokens[0][2:])
    assert len(context.tokens) == len(context.values) == min(n, 32)
    assert context.tokens == tuple(whole['tokens'][first:first+32])
    assert context.values == tuple(whole['values'][first:first+32])
    assert context.peak == peak - first
    assert context.peak >= min(peak, 20) or n <= 32
    assert context.tokens[context.peak] == f' w{peak}'
    assert context.values[context.peak] == 8. == max(context.values)


def test_of_each_text_the_strongest():
    rows = [activation(1, 50, strength, word=word) for strength, word in ((2., 'a'), (9., 'b'), (5., 'a'), (4., 'c'))]
    found = strongest_contexts(map(context_row, rows), 4)
    assert [(c.tokens[0][1], c.values[c.peak]) for c in found] == [('b', 9.), ('a', 5.), ('c', 4.)]


def test_a_shard_keeps_the_strongest_of_many():
    strengths = np.random.default_rng(0).permutation(40) + 1
    lines = [json.dumps(activation(1, 50, float(strength), word=f'x{strength}')) for strength in strengths]
    table = shard_table(lines, 'activations', 3)
    assert [c['values'][c['peak']] for c in table['found'][0].as_py()] == [40, 39, 38]


def short(**changes):
    "A line of one token, with changes"
    return dict(index=1, tokens=['a'], values=[1.]) | changes


NO_FEATURES = [
    dict(index=1),
    stats(1, None),
    stats(1, 'x'),
    stats(1, math.nan),
    stats(1, math.inf),
    stats(1, -1.),
    stats(1, 1e39),
    stats(1, True),
    stats(1, 8., 1.5),
    stats(1, 8., -.1),
    stats(1, 8., 'x'),
    stats('1_0'),
]
NO_LABELS = [
    dict(index=1),
    label(1, 7),
    label(1, 0),
    label(1, []),
    label(1, False),
    label(1, math.nan),
    label(1, 'x', 7),
    label(1, 'x', math.nan),
    label(1, 'x', ['m']),
    label(1, 'x') | dict(typeName=7),
    label('one', 'x'),
]
NO_ACTIVATIONS = [
    short(values=[1., 2.]),
    short(tokens=[], values=[]),
    short(tokens=[3]),
    short(tokens=None),
    short(tokens='ab', values=[1., 2.]),
    short(values=[None]),
    short(values=[math.nan]),
    short(values=[10**400]),
    short(values=[1e39]),
    short(values='5'),
    short(values=[True]),
]
NO_INDEX = [dict(index=-1), dict(index=None), dict(index=True), dict(index='1.5'), dict(index=2**31)]
NO_ROWS = ['{"index": 1', 'null', '[]', '{}', *map(json.dumps, NO_INDEX)]
BLANK = ['', ' \n'] # not counted


@pytest.mark.parametrize('kind, good, bad', [
    ('features', stats(1), NO_FEATURES),
    ('explanations', label(1, 'x'), NO_LABELS),
    ('activations', activation(1), NO_ACTIVATIONS),
], ids=['features', 'explanations', 'activations'])
def test_malformed_lines_are_counted(kind, good, bad):
    malformed = [*NO_ROWS, *map(json.dumps, bad), b'\xff\xfe{']
    table = shard_table([json.dumps(good), *malformed, *BLANK, json.dumps(good | dict(index=2)).encode()], kind)
    assert table['index'].to_pylist() == [1, 2]
    assert table.schema.metadata == {b'rows': str(len(malformed) + 2).encode(), b'bad': str(len(malformed)).encode()}


def test_an_index_may_be_text():
    assert row_index(dict(index='7')) == 7
    assert row_index(dict(index=7)) == 7


@pytest.mark.parametrize('embedding', ['[0.1, 0.2]', [.1, .2], None, 'not even json'])
def test_a_label_is_read_whatever_its_embedding(embedding):
    wanted = Explanation('x', 'gpt-4o-mini', 'oai_token-act-pair')
    assert label_row(label(1, ' x ', embedding=embedding)) == wanted


@pytest.mark.parametrize('text', ['', '  ', None])
def test_a_blank_label_is_none(text):
    assert label_row(label(1, text)) is None


def test_a_label_of_nobody_is_unnamed():
    assert label_row(label(1, 'x', None)).model == 'unnamed'


def test_an_unknown_density_is_nan():
    assert math.isnan(stats_row(dict(index=1, maxActApprox=0, frac_nonzero=None))['density'])


# ---- a small source: features 0 to 12, of which 5 never fires

AT = 'v1/m/s/'
KEY = f'{AT}features/batch-0.jsonl.gz'
LABELS = f'{AT}explanations/batch-0.jsonl.gz'
ORDER = sorted(range(13), key=str) # of their indices as text


def batches(kind, *parts):
    "Files of a folder, by key"
    return {f'{AT}{kind}/batch-{i}.jsonl.gz': rows for i, rows in enumerate(parts)}


def source(**more):
    "Rows by key; more: of further files, by their names in the source"
    of_stats = [stats(i, 0. if i == 5 else 8. + i) for i in ORDER]
    labels = [label(i, f'label {i}') for i in ORDER]
    found = [[activation(i, 50, strength, word=f'{i}-{strength}-') for strength in (1., 8., 4., 0.)] for i in ORDER]
    files = batches('features', of_stats[:6], of_stats[6:7], of_stats[7:])
    files |= batches('explanations', labels[:9], labels[9:])
    files |= batches('activations', sum(found[:8], []), sum(found[8:], []))
    return files | {AT + name: rows for name, rows in more.items()}


def export(server, folder, **options):
    return neuronpedia_export('m', 's', folder=folder, store=server.url, **options)


def loaded(folder, **fields):
    "Features of an export, by index"
    preset = load_preset('gpt2-small-l8', features=str(folder/'features.parquet'), source='m/s', **fields)
    return {feature.index: feature for feature in load_features(preset)}


@pytest.fixture
def store():
    "A server with the small source"
    with Neuronpedia(source()) as server: yield server


# ---- exports

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "The small source, exported with two contexts each: folder, export, URL and files that were asked for"
    folder = tmp_path_factory.mktemp('exported')
    with pytest.MonkeyPatch.context() as patch, Neuronpedia(source()) as server:
        patch.setenv('NO_PROXY', '127.0.0.1')
        found = export(server, folder, n_contexts=2)
    return SimpleNamespace(folder=folder, export=found, url=server.url, asked=server.asked())


def test_each_file_is_fetched_once(exported):
    assert len(exported.asked) == 7
    assert len(set(exported.asked)) == 7


def test_every_feature_of_a_source_is_there(exported):
    features = loaded(exported.folder)
    assert list(features) == list(range(13))
    assert [feature.status for feature in features.values()] == ['ok']*5 + ['dead'] + ['ok']*7
    for i, feature in features.items():
        assert feature.explanation == (None if i == 5 else f'label {i}')
        assert feature.max_act == (0. if i == 5 else 8. + i)
        assert feature.density == .01


def test_the_strongest_contexts_are_kept_and_cropped(exported):
    for i, feature in loaded(exported.folder).items():
        peaks = [(context.values[context.peak], context.tokens[context.peak]) for context in feature.contexts]
        assert peaks == [(8., f' {i}-8.0-50'), (4., f' {i}-4.0-50')]
        assert [len(context.tokens) for context in feature.contexts] == [32, 32]


def test_what_an_export_counts(exported):
    found = exported.export
    assert (found.n_features, found.labelled, found.dead, found.incomplete, found.bad_rows) == (13, 12, 1, 0, 0)
    assert (found.explainers, found.default) == ({'gpt-4o-mini': 13}, 'gpt-4o-mini')
    assert (found.absent, found.missing, found.skipped) == (0, (), ())


def test_an_export_says_what_it_found(exported):
    assert str(exported.export).splitlines() == [
        'm/s: 13 features, 12 (92.3%) with a label of gpt-4o-mini (most labels)',
        '  labels of gpt-4o-mini (13); 0 features have several',
        '  12 ok, 1 dead',
        f'  {exported.folder}/features.parquet']


def test_the_card_of_an_export(exported):
    card = json.loads((exported.folder/'features.json').read_text())
    assert card['store'] == f'{exported.url}/v1/m/s/'
    assert len(card['keys']) == 7
    assert card['rows'] == 13 + 13 + 52
    assert card['chosen'] == 'most labels'
    assert card['coverage'] == 12/13


def test_nothing_unfinished_is_left(exported):
    assert not list(exported.folder.rglob('*.part'))


def test_the_store_is_named_by_the_environment(tmp_path, monkeypatch, store):
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path))
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'none'))
    monkeypatch.setenv('NEURONPEDIA_STORE', store.url + '/')
    file = neuronpedia_export('m', 's').file
    assert file == tmp_path/'features/m/s/features.parquet'
    assert file == features_file(load_preset('gpt2-small-l8', source='m/s'))
    assert (file.parent/'shards').is_dir()


def test_a_long_listing_comes_in_pages(tmp_path):
    with Neuronpedia(source(), page=2) as server:
        assert export(server, tmp_path).n_features == 13
    assert len(server.asked()) == 7
    assert len(server.log) == 7 + 4


def test_without_contexts_activations_are_not_fetched(tmp_path, store):
    "Later, with contexts, only these are fetched"
    export(store, tmp_path, n_contexts=0)
    assert not store.asked('activations/')
    assert [len(feature.contexts) for feature in loaded(tmp_path).values()] == [0]*13
    export(store, tmp_path, n_contexts=2)
    assert len(store.asked()) == 7
    assert [len(feature.contexts) for feature in loaded(tmp_path).values()] == [2]*13


def test_finished_files_are_not_asked_again(tmp_path, store):
    "Shards with more contexts do not serve for fewer, or fewer for more"
    export(store, tmp_path)
    export(store, tmp_path)
    assert len(store.asked()) == 7
    export(store, tmp_path, n_contexts=1)
    assert len(store.asked('activations/')) == 4
    assert len(store.asked()) == 9


def test_files_that_changed_are_asked_again(tmp_path, store):
    export(store, tmp_path, n_contexts=1)
    with Neuronpedia(source(**{'explanations/batch-1.jsonl.gz': [label(9, 'new')]})) as server:
        export(server, tmp_path, n_contexts=1)
    assert server.asked() == [f'{AT}explanations/batch-1.jsonl.gz']
    features = loaded(tmp_path)
    assert features[9].explanation == 'new'
    assert features[8].status == 'unlabelled'


# ---- labels of several models

FIVE = [label(1, 'five one', 'gpt-5'), label(1, 'five two', 'gpt-5'), label(2, 'label 2')] # the last stands twice
BY_HAND = [label(3, 'by hand', None), label(4, '')]


@pytest.fixture
def several():
    "A server with labels of gpt-5 and of nobody, too"
    more = {'explanations-gpt-5/batch-0.jsonl.gz': FIVE, 'explanations/batch-2.jsonl.gz': BY_HAND}
    with Neuronpedia(source(**more)) as server: yield server


def test_labels_of_several_folders_are_gathered(tmp_path, several):
    found = export(several, tmp_path)
    assert found.explainers == {'gpt-4o-mini': 13, 'gpt-5': 1, 'unnamed': 1}
    assert (found.several, found.default) == (2, 'gpt-4o-mini')
    features = loaded(tmp_path)
    assert [said.text for said in features[1].explanations] == ['label 1', 'five one', 'five two']
    assert len(features[2].explanations) == 1


def test_the_label_of_another_model_is_chosen_when_features_are_loaded(tmp_path, several):
    export(several, tmp_path)
    features = loaded(tmp_path, label_model='gpt-5')
    assert features[1].explanation == 'five one'
    assert features[2].status == 'unlabelled'
    assert features[5].status == 'dead'
    assert labels_of(features.values(), 'unnamed') == {3: 'by hand'}


def test_the_explainer_that_is_asked_for(tmp_path, several):
    found = export(several, tmp_path, explainer='gpt-5')
    assert (found.default, found.labelled) == ('gpt-5', 1)
    assert '(asked for)' in str(found)
    assert loaded(tmp_path)[1].explanation == 'five one'


def test_unknown_explainer_is_said_before_the_rest_is_fetched(tmp_path, store):
    with pytest.raises(ValueError, match=r"m/s has no labels of 'gpt-6': it has those of gpt-4o-mini \(13\)"):
        export(store, tmp_path, explainer='gpt-6')
    assert len(store.asked('explanations/')) == 2
    assert len(store.asked()) == 2


# ---- what is missing or damaged in a source

def test_a_missing_batch_is_said(tmp_path):
    files = source()
    [lost] = [int(row['index']) for row in files.pop(f'{AT}features/batch-1.jsonl.gz')]
    with Neuronpedia(files) as server: found = export(server, tmp_path)
    assert (found.incomplete, found.missing) == (1, ('features/batch-1.jsonl.gz',))
    assert '1 incomplete' in str(found)
    assert 'missing: features/batch-1.jsonl.gz' in str(found)
    feature = loaded(tmp_path)[lost]
    assert (feature.status, feature.explanation) == ('incomplete', None)
    assert feature.explanations[0].text == f'label {lost}'
    assert math.isnan(feature.max_act)
    assert len(feature.contexts) == 3
    assert loaded(tmp_path, label_model='gpt-4o-mini')[lost].status == 'incomplete'


def test_gaps_and_other_files(tmp_path):
    files = {KEY: [stats(3), '{"index": 4, "maxAct', stats(9)]}
    files |= {f'{AT}features/README.md': ['x'], f'{AT}logits/batch-0.jsonl.gz': ['x']}
    with Neuronpedia(files) as server: found = export(server, tmp_path)
    assert (found.n_features, found.absent, found.rows, found.bad_rows) == (2, 8, 3, 1)
    assert (found.default, found.missing, len(found.skipped)) == (None, ('explanations/',), 2)
    assert len(server.asked()) == 1
    assert '0 (0.0%) with a label' in str(found)
    assert 'labels of nobody' in str(found)
    assert '8 indices without any row; 1 malformed of 3 lines; 2 files of other kinds' in str(found)
    assert [feature.status for feature in loaded(tmp_path).values()] == ['unlabelled', 'unlabelled']


def test_half_characters_cost_themselves(tmp_path):
    "JSON can spell half of an emoji, and no file can hold it"
    files = source()
    files[LABELS][2]['description'] = 'cut \ud83d'
    files[LABELS][3]['description'] = 'whole \U0001f600'
    activations = files[f'{AT}activations/batch-0.jsonl.gz']
    activations[1]['tokens'][50] = '\udfff'
    activations.append('["deep", ' + '['*100_000)
    with Neuronpedia(files) as server: found = export(server, tmp_path)
    features = loaded(tmp_path)
    assert features[ORDER[2]].explanation == 'cut ?'
    assert features[ORDER[3]].explanation == 'whole \U0001f600'
    assert features[0].contexts[0].tokens[20] == '?'
    assert (found.n_features, found.mended_rows, found.bad_rows) == (13, 2, 1)
    assert "2 lines with half a character, read as '?'" in str(found)
    assert json.loads((tmp_path/'features.json').read_text())['mended_rows'] == 2


def test_numbers_that_no_table_holds_are_counted(tmp_path):
    files = source()
    for row, change in zip(files[KEY], (dict(maxActApprox=1e39), dict(maxActApprox=-2.), dict(frac_nonzero=7.))):
        row |= change
    with Neuronpedia(files) as server: assert export(server, tmp_path).bad_rows == 3
    features = loaded(tmp_path)
    for index in ORDER[:3]:
        assert features[index].status == 'incomplete'
        assert math.isnan(features[index].max_act)


def test_shards_of_an_earlier_version_may_hold_such_numbers(tmp_path, store):
    assert export(store, tmp_path).bad_rows == 0
    shard = tmp_path/'shards'/'features'/'batch-1.parquet'
    table = pq.read_table(shard)
    [index] = table['index'].to_pylist()
    damaged = dict(index=index, found=dict(max_act=1e39, density=.1))
    pq.write_table(pa.Table.from_pylist([damaged], table.schema), shard)
    assert export(store, tmp_path).bad_rows == 1
    assert loaded(tmp_path)[index].status == 'incomplete'


def test_a_shard_that_is_damaged_at_its_head_is_fetched_again(tmp_path, store):
    "pyarrow does not look there"
    export(store, tmp_path)
    shard = tmp_path/'shards'/'features'/'batch-1.parquet'
    shard.write_bytes(b'XXXX' + shard.read_bytes()[4:])
    assert export(store, tmp_path).bad_rows == 0
    assert store.asked()[7:] == [f'{AT}features/batch-1.jsonl.gz']


# ---- names

@pytest.mark.parametrize('name', ['../x', '..', '', ' '])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    for model, source_name in ((name, 's'), ('m', name)):
        with pytest.raises(ValueError, match='is no model or source of Neuronpedia'):
            neuronpedia_export(model, source_name, folder=tmp_path, store=NOBODY)


@pytest.mark.parametrize('model, name, says', [
    ('gemma-2-9b', '4-gemmascope-res-16',
     "on Neuronpedia gemma-2-9b has no source '4-gemmascope-res-16': did you mean 4-gemmascope-res-16k"),
    ('gemma2-9b', '4-gemmascope-res-16k', "on Neuronpedia there is no model 'gemma2-9b': did you mean gemma-2-9b?"),
])
def test_the_nearest_names_are_said_where_a_source_is_unknown(tmp_path, model, name, says):
    names = [f'{i}-gemmascope-res-16k' for i in range(20)] + ['20-gemmascope-res-131k']
    files = {f'v1/gemma-2-9b/{known}/features/batch-0.jsonl.gz': [stats(0)] for known in names}
    with Neuronpedia(files, page=3) as server:
        with pytest.raises(ValueError, match=says):
            neuronpedia_export(model, name, store=server.url, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_store_without_sources(tmp_path):
    with Neuronpedia() as server:
        with pytest.raises(ValueError, match='has no sources at all: set NEURONPEDIA_STORE'):
            export(server, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- a store that fails

def test_busy_and_failing_stores_are_asked_again(tmp_path):
    faults = {KEY: [(429, {'Retry-After': '1'})], LABELS: [(500, {}), (503, {})], '': [(502, {})]}
    with Neuronpedia(source(), faults=faults) as server: assert export(server, tmp_path).n_features == 13
    first, second = (at for path, _, at in server.log if path == KEY)
    assert second - first >= 1.
    assert len(server.asked()) == 7 + 3


@pytest.mark.parametrize('fault', [CUT, SHORT])
def test_a_file_that_breaks_off_once(tmp_path, fault):
    with Neuronpedia(source(), faults={KEY: [fault]}) as server: assert export(server, tmp_path).n_features == 13
    assert server.asked().count(KEY) == 2


@pytest.mark.parametrize('fault', [CUT, SHORT, (404, {}), (500, {})], ids=str)
def test_a_file_that_stays_broken_holds_up_no_other(tmp_path, fault):
    says = f'{KEY}.*; all other files that were read are kept in {tmp_path}/shards'
    with Neuronpedia(source(), faults={KEY: itertools.repeat(fault)}) as server:
        with pytest.raises(ConnectionError, match=says): export(server, tmp_path)
    assert set(server.asked()) == set(source())
    assert not (tmp_path/'features.parquet').exists()
    assert len(list(tmp_path.rglob('*.parquet'))) == 6
    with Neuronpedia(source()) as server: assert export(server, tmp_path).labelled == 12
    assert server.asked() == [KEY]


def test_a_store_that_fails_throughout_is_soon_given_up(tmp_path):
    with Neuronpedia(source(), faults={key: itertools.repeat((500, {})) for key in source()}) as server:
        with pytest.raises(ConnectionError, match='too many 500 error responses'):
            export(server, tmp_path)
    assert len(set(server.asked())) == 3


def test_without_a_network_the_export_ends(tmp_path):
    with Neuronpedia() as server: pass # it has ended
    with pytest.raises(ConnectionError, match='cannot be read: .*Connection refused'):
        export(server, tmp_path)


def test_an_export_is_found_where_it_stood_before():
    assert saeexplainer.features.neuronpedia_export is neuronpedia_export


# ---- exports that were killed, and several at once

def begin_export(folder, server):
    "Another process that exports the small source"
    call = f'neuronpedia_export("m", "s", folder={str(folder)!r})'
    code = f'from saeexplainer.sources.neuronpedia import neuronpedia_export; {call}'
    return subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'NEURONPEDIA_STORE': server.url}, cwd=ROOT)


def kill_when_asked(process, server, key):
    "End a process by force as soon as the server was asked for a file"
    deadline = time.monotonic() + 60
    while key not in server.asked() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_export_goes_on(tmp_path, store):
    stuck = f'{AT}activations/batch-1.jsonl.gz'
    with Neuronpedia(source(), faults={stuck: [STALL]}) as server:
        kill_when_asked(begin_export(tmp_path, server), server, stuck)
        assert len(server.asked()) == 7
        assert len(list(tmp_path.rglob('*.parquet'))) == 6
        assert not (tmp_path/'features.parquet').exists()
        assert export(server, tmp_path).n_features == 13
        assert server.asked()[7:] == [stuck]
    whole = export(store, tmp_path/'whole').file
    assert pq.read_table(tmp_path/'features.parquet').equals(pq.read_table(whole))


def test_one_export_at_a_time(tmp_path, store):
    with making(tmp_path/'features.parquet'):
        says = 'another process is working on .*features.parquet: wait for it, or stop it'
        with pytest.raises(RuntimeError, match=says): export(store, tmp_path)
    assert export(store, tmp_path).n_features == 13
    assert {file.name for file in tmp_path.iterdir()} == {'features.parquet', 'features.json', 'shards'}


def test_what_a_full_disk_and_a_kill_left_is_mended(tmp_path, store):
    export(store, tmp_path)
    shard = next((tmp_path/'shards'/'features').iterdir())
    shard.write_bytes(shard.read_bytes()[:50])
    (shard.parent/'batch-7.parquet.01234567.part').touch()
    assert export(store, tmp_path).n_features == 13
    assert len(store.asked()) == 8
    assert not list(tmp_path.rglob('*.part'))


# ---- what is no store

def bucket(*parts):
    return f'<ListBucketResult>{"".join(parts)}</ListBucketResult>'.encode()


class Page(Neuronpedia):
    "A page where a listing is expected"
    def listing(self, **query): return b'<html><p>Welcome'


def test_what_is_no_store_is_said(tmp_path):
    with Page() as server:
        with pytest.raises(ValueError, match='is not the store: it does not list its files as S3 does'):
            export(server, tmp_path)


class Endless(Neuronpedia):
    "Listings without an end: the same page again, ever new ones, or empty ones"
    kind = 'same'
    pages = 0

    def listing(self, prefix='', **query):
        self.pages += 1
        item = f'<Contents><Key>{prefix}features/batch-{self.pages}.jsonl.gz</Key></Contents>'
        token = 't' if self.kind == 'same' else f't{self.pages}'
        next_page = f'<NextContinuationToken>{token}</NextContinuationToken>'
        return bucket('' if self.kind == 'empty' else item, next_page)


@pytest.mark.parametrize('kind', ['same', 'new', 'empty'])
def test_a_listing_without_an_end(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(neuronpedia, 'MOST_FILES', 1000)
    with Endless() as server:
        server.kind = kind
        with pytest.raises(ValueError, match='is not the store: its list of files under v1/m/s/ does not end'):
            export(server, tmp_path)
    assert server.pages <= 12


class Strange(Neuronpedia):
    "A listing of names that are none, too"
    names = (f'<Key>{KEY}</Key>', '<Key>v1</Key>', '<Key>../../etc/passwd</Key>')
    def listing(self, **query): return bucket(*(f'<Contents>{name}</Contents>' for name in self.names))


def test_a_listing_of_strange_names(tmp_path):
    with Strange({KEY: [stats(0)]}) as server:
        assert export(server, tmp_path).keys == ('v1/m/s/features/batch-0.jsonl.gz',)
        server.names = ('<Size>3</Size>',)
        with pytest.raises(ValueError, match='is not the store: it does not name its files as S3 does'):
            export(server, tmp_path)


class Slow(Neuronpedia):
    "A body of which a piece comes every now and then"
    piece = b' '
    pause = .01

    def answer(self, request):
        request.send_response(200)
        request.end_headers()
        self.log.append((request.path, {}, 0.))
        while not self.ended.is_set():
            try: request.wfile.write(self.piece)
            except OSError: return
            self.ended.wait(self.pause)


@pytest.mark.parametrize('piece, pause, timeout, says', [
    (b' ', .01, .2, 'its answer does not come to an end'),
    (b' '*2**20, 0., 60, 'its answer is larger than 67 MB'),
], ids=['drips', 'swells'])
def test_answers_without_an_end(monkeypatch, no_turns, tmp_path, piece, pause, timeout, says):
    monkeypatch.setattr(neuronpedia, 'TIMEOUT', (1, timeout))
    with Slow() as server:
        server.piece = piece
        server.pause = pause
        with pytest.raises(ConnectionError, match=f'cannot be read: {says}'):
            neuronpedia_feature('m/s/7', api=server.url)
        with pytest.raises(ConnectionError, match=f'cannot be read: {says}'):
            export(server, tmp_path)


@pytest.fixture
def one_long_line(monkeypatch):
    "A server with a line that is too long; its pieces are malformed lines"
    monkeypatch.setattr(neuronpedia, 'LONGEST_LINE', 4000)
    files = source()
    files[KEY].insert(1, '{"index": "' + 'x'*9000 + '"}')
    with Neuronpedia(files) as server: yield server


def test_a_line_without_an_end_costs_itself(monkeypatch, tmp_path, one_long_line):
    monkeypatch.setattr(neuronpedia, 'MOST_LINES', 50)
    found = export(one_long_line, tmp_path, n_contexts=0)
    assert (found.n_features, found.bad_rows, found.rows) == (13, 3, 29)


def test_a_file_without_an_end_is_given_up(monkeypatch, tmp_path, one_long_line):
    monkeypatch.setattr(neuronpedia, 'MOST_LINES', 8)
    with pytest.raises(ConnectionError, match='features/batch-0.jsonl.gz: it does not come to an end'):
        export(one_long_line, tmp_path, n_contexts=0)


def test_who_is_asked_for_too_much_patience_does_not_wait():
    patient = neuronpedia._Patient()
    assert patient.get_retry_after(SimpleNamespace(headers={'Retry-After': '86400'})) == 120.
    assert patient.get_retry_after(SimpleNamespace(headers={})) is None


# ---- the API

OF_TWO = [
    dict(description='', explanationModelName='x'),
    dict(description='parks', explanationModelName='gpt-5', typeName='t', scores=[]),
    dict(description='nations', explanationModelName='gpt-4o-mini', typeName='t'),
]
FOUND = [activation(7, 3, 2.), activation(7, 60, 8.5, word='b'), activation(7, 60, 0., word='c')]
NUMBERS = dict(maxActApprox=8.5, frac_nonzero=.002, source=dict(saelensRelease='r'))
ANSWER = dict(modelId='m', layer='s', index='7', **NUMBERS, explanations=OF_TWO, activations=FOUND)
PATH = 'api/feature/m/s/7'


def answering(answer=ANSWER, **options):
    "A server whose API knows one feature, m/s/7"
    return Neuronpedia(features={'m/s/7': answer}, **options)


@pytest.fixture
def api(monkeypatch, no_turns):
    "A server whose API the environment names: feature 8 has no label, and 9 never fires"
    features = {'m/s/7': ANSWER, 'm/s/8': ANSWER | dict(explanations=[]), 'm/s/9': ANSWER | dict(maxActApprox=0)}
    with Neuronpedia(features=features) as server:
        monkeypatch.setenv('NEURONPEDIA_API', server.url)
        yield server


def test_one_feature(api):
    feature = neuronpedia_feature('m/s/7')
    assert (feature.id, feature.explanation, feature.status) == (FeatureId('m', 's', 7), 'parks', 'ok')
    assert (feature.max_act, feature.density) == (8.5, .002)
    assert [said.model for said in feature.explanations] == ['gpt-5', 'gpt-4o-mini']
    assert [context.values[context.peak] for context in feature.contexts] == [8.5, 2.]
    assert feature.contexts[0].tokens[20] == ' b60'


def test_one_feature_with_the_label_of_a_model(api):
    assert neuronpedia_feature('m/s/7', label_model='gpt-4o-mini').explanation == 'nations'
    other = neuronpedia_feature('m/s/7', label_model='claude')
    assert (other.explanation, other.status, len(other.explanations)) == (None, 'unlabelled', 2)


def test_one_feature_that_has_no_label_or_never_fires(api):
    assert neuronpedia_feature(FeatureId('m', 's', 8)).status == 'unlabelled'
    assert neuronpedia_feature('m/s/9').status == 'dead'


def test_one_feature_with_fewer_contexts(api):
    assert len(neuronpedia_feature('m/s/7', n_contexts=1).contexts) == 1


def test_a_feature_that_neuronpedia_does_not_have(api):
    with pytest.raises(ValueError, match='Neuronpedia has no feature m/s/10'):
        neuronpedia_feature('m/s/10')


def test_without_a_key_none_is_sent(api):
    neuronpedia_feature('m/s/7')
    [(_, headers, _)] = api.log
    assert 'x-api-key' not in {name.lower() for name in headers}


def test_what_is_malformed_in_an_answer_is_left_out(capsys):
    "As in the bulk files: one null does not hide a feature"
    no_activations = [dict(index='7', tokens=['a'], values=[None]), dict(index='7', tokens=None, values=[1.])]
    no_labels = [dict(description=7), dict(description='x', explanationModelName=7)]
    said = [*no_labels, *OF_TWO, dict(description='half \ud83d')]
    with answering(ANSWER | dict(activations=no_activations + FOUND, explanations=said)) as server:
        feature = neuronpedia_feature('m/s/7', api=server.url)
    assert feature.explanation == 'parks'
    assert feature.explanations[-1] == Explanation('half ?', 'unnamed')
    assert len(feature.contexts) == 2
    assert capsys.readouterr().err.splitlines() == [
        '2 of 6 explanations of m/s/7 are malformed and left out',
        '2 of 5 activations of m/s/7 are malformed and left out']


@pytest.mark.parametrize('answer', [
    [],
    'x',
    dict(index='7'),
    ANSWER | dict(maxActApprox=1e39),
    ANSWER | dict(maxActApprox=-1),
    ANSWER | dict(frac_nonzero=1.5),
    ANSWER | dict(activations=[dict(tokens=['a'], values=[])]),
])
def test_answers_that_are_no_feature(answer):
    with answering(answer) as server:
        with pytest.raises(ValueError, match='/api/feature/m/s/7 does not describe a feature'):
            neuronpedia_feature('m/s/7', api=server.url)


def test_calls_keep_their_distance(monkeypatch):
    "With a key a smaller one"
    with answering() as server:
        for _ in range(2): neuronpedia_feature('m/s/7', api=server.url)
        monkeypatch.setenv('NEURONPEDIA_API_KEY', 'sk-secret')
        monkeypatch.setattr(neuronpedia._turns, 'free_at', 0.)
        for _ in range(2): neuronpedia_feature('m/s/7', api=server.url)
    first, second, third, fourth = (at for *_, at in server.log)
    assert second - first >= .99
    assert .19 <= fourth - third < .9
    assert [headers.get('x-api-key') for _, headers, _ in server.log] == [None, None, 'sk-secret', 'sk-secret']


def test_after_the_last_call_of_an_allowance_the_next_one_waits():
    with answering(headers={'x-limit-remaining': '0'}) as server: neuronpedia_feature('m/s/7', api=server.url)
    assert neuronpedia._turns.free_at > time.monotonic() + 50


def test_a_busy_api_is_asked_again(monkeypatch):
    "After a pause, after the second that it wants, after a longer pause"
    monkeypatch.setattr(neuronpedia, 'PAUSE', .1)
    faults = [(500, {}), (429, {'Retry-After': '1', 'x-limit-remaining': '0'}), (429, {})]
    with answering(faults={PATH: faults}) as server:
        assert neuronpedia_feature('m/s/7', api=server.url).explanation == 'parks'
    first, second, third, fourth = (at for *_, at in server.log)
    assert .1 <= second - first < .9
    assert third - second >= 1.
    assert .4 <= fourth - third < .9


FAULTS = [(429, {}), (500, {}), (302, {'Location': '/api/feature/m/s/8'}), (401, {}), STALL]


@pytest.mark.parametrize('fault', FAULTS, ids=str)
def test_the_key_stands_in_no_error(fault, monkeypatch, caplog):
    "Redirections are not followed"
    caplog.set_level(0)
    monkeypatch.setenv('NEURONPEDIA_API_KEY', 'sk-secret')
    monkeypatch.setattr(neuronpedia, 'TIMEOUT', (1, .05))
    features = {'m/s/7': ANSWER, 'm/s/8': ANSWER}
    with Neuronpedia(features=features, faults={PATH: itertools.repeat(fault)}) as server:
        with pytest.raises(ConnectionError, match='/api/feature/m/s/7 cannot be read') as raised:
            neuronpedia_feature('m/s/7', api=server.url)
    assert server.log[0][1]['x-api-key'] == 'sk-secret' # it was sent
    error = raised.value
    assert 'sk-secret' not in f'{error!r} {error} {vars(error)} {caplog.text}'
    assert error.__context__ is None
    assert error.__cause__ is None


@pytest.mark.parametrize('key', ['sk-secret\nx', 'sk secret', 'sk-sécret'])
def test_a_key_that_is_none_is_not_shown(key, monkeypatch):
    monkeypatch.setenv('NEURONPEDIA_API_KEY', key)
    with pytest.raises(ValueError, match='NEURONPEDIA_API_KEY holds characters that no key has') as raised:
        neuronpedia_feature('m/s/7', api=NOBODY)
    assert key not in str(raised.value)
    assert 'cret' not in str(raised.value)
