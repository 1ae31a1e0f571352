"The run's store: killed writers, concurrent readers, full disks, and what the rows mean"
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import pytest
from trl.data_utils import is_conversational, maybe_apply_chat_template
from helpers import tiny_tokenizer
from saeexplainer.replies import Reply, Request
from saeexplainer.store import COLUMNS, KEYS, SCHEMA, SCHEMA_VERSION, RunStore


@pytest.fixture
def path(tmp_path):
    "Where a store may be made"
    return tmp_path/'store.sqlite'


@pytest.fixture
def store(tmp_path):
    with RunStore(tmp_path/'run'/'store.sqlite') as store: yield store


def key(feature, j): return ('round1', feature, 0, 'preference', j)


def texts(n, stage='round1'):
    "Rows of two texts for each of `n` features"
    return [dict(stage=stage, feature=feature, k=0, kind='preference', j=j, text=f'text {j}')
            for feature in range(n) for j in range(2)]


def many_explanations(): return [('sft', feature, 0, 'x'*2000) for feature in range(100)]


def message(error):
    "The text of an error, which is one line"
    text = str(error.value)
    assert '\n' not in text
    return text


def start(code, *args):
    "Run `code` in a process of its own"
    command = [sys.executable, '-c', textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def output_of(process): return process.communicate(timeout=240)[0]


# ---- killed at any moment

WRITE = '''
    import sys
    from saeexplainer.store import RunStore
    store = RunStore(sys.argv[1])
    for feature in range(10**6): # five rows a call, their scores in another
        key = lambda j: ('round1', feature, 0, 'preference', j)
        if store.missing('texts', [key(0)]):
            store.put_texts([(*key(j), f'text {j} ' + 'x'*300, None, None) for j in range(5)])
        store.put_scores([(*key(j), feature + j/10) for j in range(5)])
        print(feature, flush=True)
'''

READ = '''
    import sys, time
    from saeexplainer.store import RunStore
    store, seen, grown = RunStore(sys.argv[1]), 0, 0
    while grown < 5:
        found = len(store.texts('round1'))
        assert found >= seen and found % 5 == 0, (found, seen) # whole calls, never fewer than before
        grown += found > seen
        seen = found
        time.sleep(.005)
    print(grown)
'''


def write_until_killed(path, stop):
    "Let a process write until it has reported feature `stop`, kill it, and return the last feature that it reported"
    process = start(WRITE, path)
    said = -1
    for line in process.stdout:
        said = int(line)
        if said >= stop: break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    said = max([said, *map(int, process.stdout.read().split())])
    process.stdout.close()
    return said


def check_rows_up_to(store, said):
    "All that was reported is there, once; of the rest there is at most one call, whole"
    found = store.texts()
    assert store.rows('PRAGMA integrity_check') == [('ok',)]
    assert not found.duplicated(KEYS['texts']).any()
    per_feature = found.groupby('feature').agg(rows=('j', 'size'), scored=('score', 'count'))
    assert (per_feature.rows == 5).all()
    assert set(per_feature.scored) <= {0, 5}
    assert len(per_feature) <= said + 2
    reported = found[found.feature <= said]
    assert len(reported) == 5*(said + 1)
    assert reported.score.tolist() == pytest.approx([feature + j/10 for feature in range(said + 1) for j in range(5)])


def test_kill_9_loses_no_row_and_doubles_none(path):
    "Each time the next process goes on where the last one died"
    said = -1
    for kill in range(3):
        said = write_until_killed(path, stop=said + 25 + 7*kill)
        with RunStore(path) as store: check_rows_up_to(store, said)


def test_two_processes_read_while_one_writes(path):
    RunStore(path).close()
    writer = start(WRITE, path)
    readers = [start(READ, path) for _ in range(2)]
    try:
        assert [output_of(reader) for reader in readers] == ['5\n', '5\n']
    finally:
        for process in (writer, *readers):
            process.kill()
            process.wait()
            process.stdout.close()


def test_two_processes_make_a_store_and_write_the_same_rows(path):
    code = '''
        import sys
        from saeexplainer.store import RunStore
        with RunStore(sys.argv[1]) as store:
            print(sum(store.put_metrics([('sft', feature, 'input', 1.)]) for feature in range(100)))
    '''
    both = [start(code, path) for _ in range(2)]
    assert sum(int(output_of(process)) for process in both) == 100
    with RunStore(path) as store: assert store.count('metrics') == 100


def test_threads_share_a_store(store):
    def put(i): return store.put_metrics([('sft', i % 50, 'input', 1.)])
    with ThreadPoolExecutor(8) as pool: new = list(pool.map(put, range(200)))
    assert sum(new) == 50
    assert store.count('metrics') == 50


# ---- the file

def test_a_full_disk_is_one_line_and_the_rows_before_it_stay(store):
    store.put_texts(texts(3))
    [[pages]] = store.rows('PRAGMA page_count')
    store._db.execute(f'PRAGMA max_page_count={pages + 2}')
    with pytest.raises(OSError) as error: store.put_explanations(many_explanations())
    assert str(error.value) == f'cannot write the store {store.path}: database or disk is full'
    assert store.count('explanations') == 0 # nothing of the failed call
    assert store.count('texts') == 6
    store._db.execute('PRAGMA max_page_count=1000000')
    assert store.put_explanations(many_explanations()) == 100


def test_a_limit_on_file_size_stops_the_process_with_one_line(path):
    "Where there is room again, everything before is there, and it goes on"
    code = '''
        import resource, signal, sys
        from saeexplainer.store import RunStore
        store = RunStore(sys.argv[1])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            for feature in range(10**5): store.put_explanations([('sft', feature, 0, 'x'*1000)])
        except OSError as error: print(feature, error)
    '''
    number, line = output_of(start(code, path)).split(' ', 1)
    assert line.startswith('cannot write the store')
    assert line.count('\n') == 1
    with RunStore(path) as store:
        assert list(store.explanations().feature) == list(range(int(number)))
        assert store.put_explanations([('sft', int(number), 0, 'x')]) == 1


@pytest.mark.parametrize('place', ['file/store.sqlite', 'folder'])
def test_a_path_that_cannot_be_written_is_one_line(tmp_path, place):
    (tmp_path/'file').write_text('x')
    (tmp_path/'folder').mkdir()
    reasons = {'file/store.sqlite': f'{tmp_path/"file"} is not a folder', 'folder': 'unable to open database file'}
    with pytest.raises(OSError) as error: RunStore(tmp_path/place)
    assert str(error.value) == f'cannot open the store {tmp_path/place}: {reasons[place]}'


def test_a_text_is_refused(tmp_path):
    (tmp_path/'text').write_text('not a database '*100)
    with pytest.raises(ValueError, match=r'text is not a run store \(not an SQLite file\)'):
        RunStore(tmp_path/'text')


def test_another_database_is_refused(tmp_path):
    with sqlite3.connect(tmp_path/'other') as db: db.execute('CREATE TABLE t (x)')
    with pytest.raises(ValueError, match=r'other is not a run store \(an SQLite file with other tables\)'):
        RunStore(tmp_path/'other')


def test_a_newer_version_is_refused(tmp_path):
    newer = SCHEMA_VERSION + 1
    with sqlite3.connect(tmp_path/'newer') as db: db.execute(f'PRAGMA user_version={newer}')
    says = f'newer has store version {newer}, this saeexplainer reads version {SCHEMA_VERSION}'
    with pytest.raises(ValueError, match=says): RunStore(tmp_path/'newer')


def test_wal_and_synchronous(store):
    assert store.rows('PRAGMA journal_mode') == [('wal',)]
    assert store.rows('PRAGMA synchronous') == [(1,)]


OLD_REPLY = dict(text='y', error=None, prompt_tokens=10, completion_tokens=2, cost=.5, cached=False, cut=False,
                 scores=None, sent=None)


def make_version_1(path):
    "A store as version 1 made it, with a reply and a metric"
    schema = SCHEMA.replace(', writer TEXT, stage TEXT) STRICT', ') STRICT')
    db = sqlite3.connect(path)
    for statement in schema.split(';')[:-1]:
        if 'TABLE attempts' not in statement: db.execute(statement)
    db.execute('INSERT INTO replies VALUES (?, ?, ?)', ['old', '{}', json.dumps(OLD_REPLY)])
    db.execute("INSERT INTO metrics VALUES ('sft', 1, 'input', 1.)")
    db.execute('PRAGMA user_version=1')
    db.commit()
    db.close()


def test_a_store_of_version_1_is_brought_forward(path):
    make_version_1(path)
    for _ in range(2):
        with RunStore(path) as store:
            assert store.count('metrics') == 1
            assert store.spent() == (1, 12, .5)
            old = store.replies(['old'])['old']
            assert old.text == 'y'
            assert old.outcome == 'ok'
            assert store.rows('PRAGMA user_version') == [(2,)]
            store.put_replies([('a', Request('x'), Reply('y'))], 'w', 's')


# ---- rows

def test_the_first_row_stays(store):
    assert store.put_explanations([('sft', 1, 0, 'first'), ('sft', 1, 0, 'second')]) == 1
    third = dict(stage='sft', feature=1, k=0, text='third')
    assert store.put_explanations([third, ('sft', 2, 0, 'new')]) == 1
    assert store.explanations('sft').text.tolist() == ['first', 'new']


def test_numpy_values_and_generators(store):
    rest = (np.int64(9), np.float32(.25), np.float64(3), .24, np.bool_(True))
    store.put_steering((np.int64(1), np.int32(control), *rest) for control in range(3))
    steering = store.steering(1)
    assert steering.control.tolist() == [0, 1, 2]
    assert steering.reached.tolist() == [1, 1, 1]
    assert str(steering.kl.dtype) == 'float64'


def test_numpy_values_in_a_dict(store):
    scores = dict(order=[1, 0], scores=[np.float32(.5), None])
    store.put_judgements([dict(stage='sft', feature=np.int64(1), choice=2, true=np.int64(0), scores=scores)])
    judgements = store.judgements('sft')
    assert json.loads(judgements.scores[0]) == {'order': [1, 0], 'scores': [.5, None]}
    assert judgements.true[0] == 0


GOOD = {'put_explanations': ('sft', 5, 0, 'good'),
        'put_texts': ('sft', 5, 0, 'a', 0, 'good', None, None),
        'put_pairs': (1, 5, 'a', 'b', 2., 1., None)}


def pair(chosen, rejected, chosen_score, rejected_score):
    return dict(round=1, feature=1, chosen=chosen, rejected=rejected, chosen_score=chosen_score,
                rejected_score=rejected_score)


@pytest.mark.parametrize('put, row, says', [
    ('put_explanations', dict(stage='sft', feature=1, k=0), 'NOT NULL constraint failed: explanations.text'),
    ('put_explanations', dict(stage='sft', feature=1, text='x'), 'NOT NULL constraint failed: explanations.k'),
    ('put_explanations', dict(stage='sft', feature='seven', k=0, text='x'),
     'cannot store TEXT value in INT column explanations.feature'),
    ('put_explanations', dict(stage='sft', feature=1, k=0, txt='x'),
     "explanations has no column 'txt': it has stage, feature, k, text"),
    ('put_explanations', ('sft', 1, 0), 'a row of explanations has 4 values (stage, feature, k, text), not 3'),
    ('put_texts', dict(stage='sft', feature=1, k=0, kind='a', j=0), 'text IS NOT NULL OR error IS NOT NULL'),
    ('put_pairs', dict(round=1, feature=1), 'CHECK constraint failed'),
    ('put_pairs', pair('a', 'a', 2., 1.), 'CHECK constraint failed'),
    ('put_pairs', pair('a', 'b', 1., 2.), 'CHECK constraint failed'),
])
def test_wrong_rows_are_refused_and_nothing_of_the_call_stays(store, put, row, says):
    put_rows = getattr(store, put)
    with pytest.raises(ValueError) as error: put_rows([GOOD[put], row])
    assert says in message(error)
    assert store.count(put.removeprefix('put_')) == 0
    assert put_rows([GOOD[put]]) == 1


@pytest.fixture
def three_kinds(store):
    "A store with texts of two stages, and one that could not be parsed"
    store.put_texts(texts(3) + texts(2, 'label'))
    store.put_texts([('round1', 9, 0, 'neutral', 0, None, 'not JSON', None)])
    return store


def test_views_filter(three_kinds):
    assert len(three_kinds.texts()) == 11
    assert len(three_kinds.texts(['round1', 'label'], ['preference'])) == 10
    assert len(three_kinds.texts('round1', 'neutral')) == 1


def test_what_is_missing_is_none(three_kinds):
    assert three_kinds.texts('round1', 'neutral').text[0] is None
    assert three_kinds.texts('label').error.tolist() == [None]*4


def test_empty_views_keep_their_types(three_kinds):
    empty = three_kinds.texts('nothing')
    assert len(empty) == 0
    assert list(empty.columns) == list(COLUMNS['texts'])
    assert str(empty.score.dtype) == 'float64'
    assert str(empty.feature.dtype) == 'int64'
    assert str(three_kinds.texts().score.dtype) == 'float64'


def test_missing_keys_come_back_in_their_order(store):
    store.put_explanations([('round1', 3, 1, 'x')])
    asked = [('round1', np.int64(feature), k) for feature in (4, 3) for k in (0, 1)]
    assert store.missing('explanations', asked) == [('round1', 4, 0), ('round1', 4, 1), ('round1', 3, 0)]


# ---- scores

def test_each_text_is_scored_once(store):
    store.put_texts(texts(2))
    assert store.put_scores([(*key(0, 0), 1.5)]) == 1
    assert store.put_scores([(*key(0, 0), 2.5)]) == 0
    assert store.put_scores([dict(zip([*KEYS['texts'], 'score'], (*key(0, 0), 3.5)))]) == 0
    assert store.texts().score[0] == 1.5


def test_zero_is_a_score(store):
    store.put_texts(texts(2))
    assert store.put_scores([(*key(0, 0), 1.5), (*key(0, 1), 0.)]) == 2
    assert len(store.unscored('round1')) == 2


def test_a_text_without_tokens_is_told_from_one_that_waits(store):
    store.put_texts([*texts(1), (*key(1, 0), None, 'not JSON', None)])
    assert len(store.unscored()) == 2 # the unparsed one does not wait
    assert store.put_scores([(*key(0, 0), np.float32('nan'))]) == 1
    found = store.texts()
    assert found.error.tolist() == ['empty', None, 'not JSON']
    assert found.score.isna().all()
    assert store.unscored().j.tolist() == [1]
    assert store.put_scores([(*key(0, 0), 4.), (*key(1, 0), 4.)]) == 0 # neither is scored later


def test_why_a_text_has_no_score(store):
    store.put_texts(texts(2))
    assert store.put_scores([(*key(0, 0), 'too long'), (*key(0, 1), 2.)]) == 2
    found = store.texts()
    assert found.error.tolist() == ['too long', None, None, None]
    assert found.score.notna().tolist() == [False, True, False, False]
    assert len(store.unscored()) == 2
    assert store.put_scores([(*key(0, 0), 4.), (*key(0, 1), 'empty')]) == 0 # neither is written over


def test_a_score_needs_its_text(store):
    store.put_texts(texts(1))
    with pytest.raises(ValueError, match=r"no text \('round1', 7, 0, 'preference', 0\) to score"):
        store.put_scores([(*key(0, 0), 1.), (*key(7, 0), 1.)])
    assert len(store.unscored()) == 2 # nothing of the call


# ---- stages and facts

def test_stages(store):
    store.start('sft')
    assert not store.finished('sft')
    store.start('sft')
    time.sleep(.02)
    store.finish('sft', loss=np.float32(1.5))
    assert store.finished('sft')
    stage = store.progress().iloc[0]
    assert .02 <= stage.seconds < 10
    assert stage.started <= stage.finished
    assert json.loads(stage.detail) == {'attempts': 2, 'loss': 1.5}


def test_a_finished_stage_stays_as_it_was(store):
    store.start('sft')
    store.finish('sft', loss=1.5)
    store.start('sft')
    store.finish('sft', loss=9)
    assert json.loads(store.progress().detail[0]) == {'attempts': 1, 'loss': 1.5}


def test_details_of_a_stage(store):
    assert store.detail('sft') == {}
    store.start('sft')
    assert store.detail('sft') == {'attempts': 1}


@pytest.mark.parametrize('value', ['x', '[1]', None])
def test_damaged_details_of_a_stage_are_named(store, value):
    store.start('sft')
    with store.transaction() as db: db.execute('UPDATE progress SET detail=?', [value])
    with pytest.raises(ValueError, match='store.sqlite is damaged .what it notes of stage sft is'):
        store.detail('sft')


def test_a_clock_that_is_set_back_gives_no_negative_duration(store, monkeypatch):
    store.start('sft')
    yesterday = time.time() - 86_400
    monkeypatch.setattr(time, 'time', lambda: yesterday)
    store.finish('sft')
    stage = store.progress().iloc[0]
    assert 0 <= stage.seconds < 60
    assert stage.finished >= stage.started


def test_a_finished_stage_is_in_the_main_file(path, tmp_path):
    with RunStore(path) as store:
        store.start('sft')
        store.put_explanations([('sft', 1, 0, 'ships')])
        store.finish('sft')
        (tmp_path/'copy.sqlite').write_bytes(path.read_bytes()) # without its -wal
    with RunStore(tmp_path/'copy.sqlite') as copy:
        assert copy.finished('sft')
        assert copy.count('explanations') == 1


def test_facts_are_written_once(store):
    store.put_meta(template='a {placeholder}', versions={'torch': '2.13'}, beta=(.1, .15))
    store.put_meta(template='a {placeholder}', beta=[.1, .15])
    assert store.meta('versions') == {'torch': '2.13'}
    assert store.meta('beta') == [.1, .15]
    assert store.meta('none', 3) == 3
    with pytest.raises(ValueError, match="has template 'a {placeholder}', not 'b': give the run another name"):
        store.put_meta(template='b')


@pytest.mark.parametrize('value, kind, says', [
    ('{x', None, "its fact 'a' is not JSON: '{x'"),
    ('[1]', dict, "its fact 'a' is [1], not an object"),
    ('"x"', list, """its fact 'a' is "x", not a list"""),
    ('1', str, "its fact 'a' is 1, not a text"),
    ('['*10**5, None, 'is not JSON'),
])
def test_facts_that_are_damaged_are_named(store, value, kind, says):
    with store.transaction() as db: db.execute('INSERT INTO meta VALUES (?, ?)', ['a', value])
    with pytest.raises(ValueError) as error: store.meta('a', kind=kind)
    assert says in str(error.value)
    assert str(store.path) in str(error.value)
    assert len(str(error.value)) < 300
    assert store.meta('b', 5, kind=dict) == 5


# ---- replies and attempts

def test_replies_are_kept_once_and_only_a_failed_one_is_replaced(store):
    ask = Request('x', seed=3)
    good = Reply('y', cost=.25, scores=(1., 2.), sent={'seed': 3})
    failed = Reply(error='no reply', outcome='failed')
    empty = Reply(error='empty', outcome='empty')
    store.put_replies([('a', ask, good), ('b', ask, failed), ('c', ask, empty)], 'w', 's')
    store.put_replies([('a', ask, Reply('other'))], 'w', 's')
    assert store.replies(['a', 'b', 'c', 'd']) == {'a': good, 'c': empty}
    store.put_replies([('b', ask, Reply('at last'))], 'w', 's')
    assert store.replies(['b'])['b'].text == 'at last'
    assert store.count('replies') == 3
    assert store.accounts()['w']['s']['outcomes'] == {'ok': 2, 'empty': 1}


def test_attempts_are_on_record_before_and_after(store):
    delivered, refused, late, _ = (store.begin_attempt(k, 'w', 's', 1000, .01) for k in 'abcd')
    store.end_attempt(delivered, 'delivered', .5, 100, 10, .002)
    store.end_attempt(refused, '429', .1, 0, 0, 0.)
    store.end_attempt(late, 'timeout', 9.)
    assert store.spent() == (4, 110 + 2*1000, pytest.approx(.022))
    assert store.cost() == .002
    assert store.answered('w')
    assert not store.answered('v')
    assert store.forget_attempts() == 1
    assert store.forget_attempts() == 0
    book = store.accounts()['w']['s']
    assert book['attempts'] == {'delivered': 1, '429': 1, 'timeout': 1, 'killed': 1}
    assert book['perhaps_billed'] == .02
    assert (book['prompt_tokens'], book['cost']) == (100, .002)


def test_an_attempt_ends_with_its_reply(store):
    attempt = store.begin_attempt('a', 'w', 's', 900, .01)
    store.put_replies([('a', Request('x'), Reply('y'))], 'w', 's', (attempt, 'delivered', .5, 100, 10, .002))
    assert store.spent() == (1, 110, .002)
    assert store.answered('w')


def test_an_attempt_does_not_end_without_its_reply(store):
    store.end_attempt(store.begin_attempt('a', 'w', 's', 900, .01), 'delivered', .5, 100, 10, .002)
    attempt = store.begin_attempt('b', 'w', 's', 900, .01)
    too_large = (attempt, 'delivered', .5, 10**30, 10, .002)
    with pytest.raises(ValueError):
        store.put_replies([('b', Request('x'), Reply('y', cost=1.))], 'w', 's', too_large)
    assert not store.replies(['b'])
    assert store.accounts()['w']['s']['attempts'] == {'delivered': 1, 'under way': 1}


def test_a_part_of_the_usage_that_is_missing_counts_at_its_most(store):
    for name, tokens in {'0': (100, None), '1': (None, 10), '2': (None, None)}.items():
        store.end_attempt(store.begin_attempt(name, 'w', 's', 900, .01), 'delivered', .1, *tokens)
    assert store.spent() == (3, 2700, pytest.approx(.03))
    assert store.accounts()['w']['s']['perhaps_billed'] == pytest.approx(.03)


def test_who_was_answered_after_a_request(store):
    lost, other = (store.begin_attempt(k, 'w', 's', 9, 0.) for k in 'ab')
    store.end_attempt(lost, '500', .1, 0, 0, 0.)
    assert not store.answered_after('a', 'w')
    store.end_attempt(other, 'delivered', .1, 1, 1, 0.)
    assert store.answered_after('a', 'w')
    assert not store.answered_after('b', 'w')
    assert not store.answered_after('a', 'v')


def test_a_reply_of_another_version_is_named(store):
    store.put_replies([('k', Request('x'), Reply('y'))])
    with store.transaction() as db: db.execute('UPDATE replies SET reply=?', ['{"outcome": "ok", "colour": 1}'])
    with pytest.raises(ValueError, match='store.sqlite holds a reply of another version'): store.replies(['k'])


def test_a_reply_that_is_damaged_is_named(store):
    says = r'store.sqlite.*the reply k is \[\], not an object'
    with pytest.raises(ValueError, match=says): store._reply('k', '[]')


def test_numbers_that_sqlite_cannot_hold_are_refused(store):
    attempt = store.begin_attempt('a', 'w', 's', 1, 1.)
    with pytest.raises(ValueError, match='the store refuses the row: Python int too large'):
        store.end_attempt(attempt, 'delivered', .1, 10**30, 1)
    with pytest.raises(ValueError, match='the store refuses the row'):
        store.put_metrics([('sft', 1, 'input', object())])


# ---- preferences

TEMPLATE = dict(template='What is {placeholder} {here}?', placeholder='<repo_name>')


@pytest.fixture
def preferences(store):
    "A store with pairs of two rounds, and a feature without one"
    store.put_meta(**TEMPLATE)
    store.put_pairs([(1, 7, 'ships', 'boats', 3., 1., None),
                     (1, 8, None, None, None, None, 'low_spread'),
                     (2, 7, 'fleets', 'ships', 4., 2., None)])
    return store


def test_preferences_need_a_template(store):
    with pytest.raises(ValueError, match='has no template or placeholder: write them with put_meta'):
        store.export_preferences()
    store.put_meta(**TEMPLATE)
    assert len(store.export_preferences()) == 0


def test_preferences_of_all_rounds_or_of_one(preferences):
    pairs = preferences.export_preferences()
    assert pairs['round'] == [1, 2]
    assert pairs['feature'] == [7, 7]
    assert preferences.export_preferences(2)['chosen_score'] == [4.]


def test_preferences_are_what_trl_trains_on(preferences):
    pair = preferences.export_preferences()[0]
    assert is_conversational(pair)
    assert pair['prompt'] == [dict(role='user', content='What is <repo_name> {here}?')]
    assert pair['chosen'] == [dict(role='assistant', content='ships')]
    assert pair['rejected'] == [dict(role='assistant', content='boats')]
    flat = maybe_apply_chat_template({k: pair[k] for k in ('prompt', 'chosen', 'rejected')}, tiny_tokenizer())
    assert flat['prompt'].endswith('<|im_start|>assistant\n')
    assert flat['chosen'] == 'ships<|im_end|>\n'


# ---- damage

N_GROWN = 400 # features and replies of a store of some pages


@pytest.fixture(scope='module')
def grown_bytes(tmp_path_factory):
    "The file of a store of some pages, closed"
    path = tmp_path_factory.mktemp('grown')/'store.sqlite'
    with RunStore(path) as store:
        store.put_texts(texts(N_GROWN))
        replies = [(f'key {i}', Request('x'*200, seed=i), Reply('y'*200)) for i in range(N_GROWN)]
        store.put_replies(replies, 'w', 's')
    return path.read_bytes()


@pytest.fixture
def grown(path, grown_bytes):
    "A store of some pages, to be damaged"
    path.write_bytes(grown_bytes)
    return path


def read_all(path):
    "Read everything, as a resumed run would"
    with RunStore(path) as store:
        for table in KEYS: store.table(table)
        store.replies([f'key {i}' for i in range(N_GROWN)])
        store.accounts()


@pytest.mark.parametrize('share', [.02, .3, .5, .9, .999])
def test_a_store_that_was_cut_off_says_so(grown, share):
    size = grown.stat().st_size
    left = int(share*size)
    os.truncate(grown, left)
    with pytest.raises(ValueError) as error: RunStore(grown)
    assert str(error.value) == (f'the store {grown} is damaged ({left:,} of its {size:,} bytes are there): '
                                'put back a copy of it, or begin under another name')


def test_damaged_pages_are_one_line_that_names_the_file(tmp_path, grown_bytes):
    rng = np.random.default_rng(0)
    seen = 0
    for i in range(40):
        path = tmp_path/f'{i}.sqlite'
        damaged = bytearray(grown_bytes)
        page = int(rng.integers(1, len(damaged)//4096))*4096
        damaged[page:page + 64] = rng.bytes(64) # the head of a page
        path.write_bytes(damaged)
        try:
            read_all(path)
        except (ValueError, OSError) as error:
            seen += 1
            assert str(path) in str(error)
            assert '\n' not in str(error)
    assert seen > 35 # the others hit what is not read


def test_a_key_that_has_changed_is_noticed(grown):
    data = grown.read_bytes()
    grown.write_bytes(data.replace(b'key 123', b'key 1#3', 1))
    with pytest.raises(ValueError, match='store.sqlite is damaged '): RunStore(grown)


def test_damage_found_while_it_is_read_or_written_names_the_file(grown):
    with RunStore(grown) as store:
        with open(grown, 'r+b') as file:
            file.seek(4096)
            file.write(os.urandom(grown.stat().st_size - 4096))
        store._db.execute('PRAGMA shrink_memory') # what it has read before
        says = f'the store {grown}: '
        with pytest.raises(OSError, match=says): store.texts()
        with pytest.raises(OSError, match=says): store.accounts()
        with pytest.raises(OSError, match=says): store.put_texts(texts(900))
        with pytest.raises(OSError, match=says): store.put_replies([('new', Request('x'), Reply('y'))])


# ---- half of a store

@pytest.fixture
def left_behind(path):
    "A store whose process was killed with rows in the -wal"
    code = '''
        import os, signal, sys
        from saeexplainer.store import RunStore
        RunStore(sys.argv[1]).put_explanations([('sft', 1, 0, 'ships')])
        os.kill(os.getpid(), signal.SIGKILL)
    '''
    output_of(start(code, path))
    assert path.stat().st_size
    assert path.with_name('store.sqlite-wal').stat().st_size
    return path


def test_the_wal_without_its_store_is_noticed_and_kept(left_behind):
    wal = left_behind.with_name('store.sqlite-wal')
    main = left_behind.read_bytes()
    size = wal.stat().st_size
    says = f'{wal} is there, but not store.sqlite that it belongs to: copy both'
    left_behind.unlink()
    with pytest.raises(ValueError, match=says): RunStore(left_behind)
    left_behind.touch()
    with pytest.raises(ValueError, match=says): RunStore(left_behind)
    assert wal.stat().st_size == size
    left_behind.write_bytes(main)
    with RunStore(left_behind) as store: assert store.count('explanations') == 1 # nothing was lost by it


@pytest.mark.parametrize('lost', [['-wal'], ['', '-wal']], ids=['rows', 'all'])
def test_an_empty_store_beside_adapters_is_not_begun_anew(left_behind, lost):
    adapter = left_behind.with_name('explainer')/'sft'
    adapter.mkdir(parents=True)
    (adapter/'adapter_config.json').write_text('{}')
    for part in lost: left_behind.with_name(f'store.sqlite{part}').unlink()
    says = 'store.sqlite is empty or missing, but .*explainer/sft is there: put the store back'
    for _ in range(2):
        with pytest.raises(ValueError, match=says): RunStore(left_behind)
    assert left_behind.exists() == ('' not in lost)


# ---- tables that are not the store's own

TEXT_METRICS = 'DROP TABLE metrics; CREATE TABLE metrics (stage TEXT, feature INT, metric TEXT, value TEXT)'
NO_NUMBER = """
    DROP TABLE metrics;
    CREATE TABLE metrics (stage TEXT, feature INT, metric TEXT, value REAL);
    INSERT INTO metrics VALUES ('sft', 1, 'gap', 'x')
"""


def change_tables(path, sql):
    "Make a store and change its tables behind its back"
    RunStore(path).close()
    with sqlite3.connect(path) as db: db.executescript(sql)


@pytest.mark.parametrize('sql, says', [
    ('DROP TABLE texts', 'it has no table texts'),
    ('ALTER TABLE metrics DROP COLUMN value', 'its table metrics lacks value'),
    ('ALTER TABLE meta RENAME COLUMN value TO fact', 'its table meta lacks value'),
    ('ALTER TABLE pairs ADD COLUMN note TEXT', 'its table pairs has the columns '),
    (TEXT_METRICS, 'its table metrics has TEXT in column value, not REAL'),
])
def test_other_tables_are_named(path, sql, says):
    change_tables(path, sql)
    with pytest.raises(ValueError) as error: RunStore(path)
    assert says in message(error)
    assert str(path) in message(error)


def test_values_that_are_no_numbers_are_named(path):
    change_tables(path, NO_NUMBER)
    says = 'store.sqlite is damaged .column value of its table metrics does not hold numbers alone'
    with RunStore(path) as store, pytest.raises(ValueError, match=says): store.metrics()
