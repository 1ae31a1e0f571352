"The run's store: killed writers, concurrent readers, full disks, and what the rows mean"
import json, os, signal, sqlite3, subprocess, sys, textwrap, time
import numpy as np
import pytest
from saeexplainer.replies import Reply, Request
from saeexplainer.store import COLUMNS, KEYS, SCHEMA, SCHEMA_VERSION, RunStore


@pytest.fixture
def store(tmp_path):
    with RunStore(tmp_path/'run'/'store.sqlite') as s: yield s


def texts(n, stage='round1', **kw):
    return [dict(stage=stage, feature=f, k=0, kind='preference', j=j, text=f'text {j}', **kw) for f in range(n) for j in range(2)]


def start(code, *args): # a real process
    return subprocess.Popen([sys.executable, '-c', textwrap.dedent(code), *map(str, args)], stdout=subprocess.PIPE, text=True)


# ---- killed at any moment

WRITE = '''
    import sys
    from saeexplainer.store import RunStore
    store = RunStore(sys.argv[1])
    for f in range(10**6): # five rows a call, their scores in another
        key = lambda j: ('round1', f, 0, 'preference', j)
        if store.missing('texts', [key(0)]):
            store.put_texts([(*key(j), f'text {j} ' + 'x'*300, None, None) for j in range(5)])
        store.put_scores([(*key(j), f + j/10) for j in range(5)])
        print(f, flush=True)
'''


def test_kill_9_loses_no_row_and_doubles_none(tmp_path):
    path, said = tmp_path/'store.sqlite', -1
    for kill in range(3): # each time the next process goes on where the last one died
        process = start(WRITE, path)
        stop = said + 25 + 7*kill
        for line in process.stdout:
            said = int(line)
            if said >= stop: break
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        said = max([said, *map(int, process.stdout.read().split())])
        process.stdout.close()
        with RunStore(path) as store:
            t = store.texts()
            assert store.rows('PRAGMA integrity_check') == [('ok',)]
            assert not t.duplicated(KEYS['texts']).any()
            per_feature = t.groupby('feature').agg(rows=('j', 'size'), scored=('score', 'count'))
            assert (per_feature.rows == 5).all() and set(per_feature.scored) <= {0, 5} # a call is there as a whole or not at all
            done = t[t.feature <= said]
            assert len(done) == 5*(said + 1) and done.score.tolist() == pytest.approx([f + j/10 for f in range(said + 1) for j in range(5)])
            assert len(per_feature) <= said + 2 # at most one call that was not reported any more


def test_two_processes_read_while_one_writes(tmp_path):
    path = tmp_path/'store.sqlite'
    RunStore(path).close()
    read = '''
        import sys, time
        from saeexplainer.store import RunStore
        store, seen, grown = RunStore(sys.argv[1]), 0, 0
        while grown < 5:
            t = store.texts('round1')
            assert len(t) >= seen and len(t) % 5 == 0, (len(t), seen) # whole calls, never fewer than before
            seen, grown = len(t), grown + (len(t) > seen)
            time.sleep(.005)
        print(grown)
    '''
    writer, readers = start(WRITE, path), [start(read, path) for _ in range(2)]
    try: assert [r.communicate(timeout=240)[0] for r in readers] == ['5\n', '5\n']
    finally:
        for p in (writer, *readers): p.kill(); p.wait(); p.stdout.close()


def test_two_processes_write_the_same_rows(tmp_path):
    path = tmp_path/'store.sqlite' # does not exist: both make it
    code = '''
        import sys
        from saeexplainer.store import RunStore
        with RunStore(sys.argv[1]) as store: print(sum(store.put_metrics([('sft', f, 'input', 1.)]) for f in range(100)))
    '''
    both = [start(code, path) for _ in range(2)]
    new = [int(p.communicate(timeout=240)[0]) for p in both]
    assert sum(new) == 100 and RunStore(path).count('metrics') == 100


# ---- the file

def test_a_full_disk_is_one_line_and_the_rows_before_it_stay(store):
    store.put_texts(texts(3))
    store._db.execute(f'PRAGMA max_page_count={store.rows("PRAGMA page_count")[0][0] + 2}')
    with pytest.raises(OSError) as e: store.put_explanations([('sft', f, 0, 'x'*2000) for f in range(100)])
    assert str(e.value) == f'cannot write the store {store.path}: database or disk is full'
    assert store.count('explanations') == 0 and store.count('texts') == 6 # nothing of the failed call
    store._db.execute('PRAGMA max_page_count=1000000')
    assert store.put_explanations([('sft', f, 0, 'x'*2000) for f in range(100)]) == 100


def test_a_limit_on_file_size_stops_the_process_with_one_line(tmp_path):
    code = '''
        import resource, signal, sys
        from saeexplainer.store import RunStore
        store = RunStore(sys.argv[1])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            for f in range(10**5): store.put_explanations([('sft', f, 0, 'x'*1000)])
        except OSError as e: print(f, e)
    '''
    said = start(code, tmp_path/'store.sqlite').communicate(timeout=240)[0]
    n, line = said.split(' ', 1)
    assert line.startswith('cannot write the store') and line.count('\n') == 1
    with RunStore(tmp_path/'store.sqlite') as store: # room again: everything before is there, and it goes on
        assert list(store.explanations().feature) == list(range(int(n))) and store.put_explanations([('sft', int(n), 0, 'x')]) == 1


@pytest.mark.parametrize('place', ['file/store.sqlite', 'folder'])
def test_a_path_that_cannot_be_written_is_one_line(tmp_path, place):
    (tmp_path/'file').write_text('x')
    (tmp_path/'folder').mkdir()
    with pytest.raises(OSError) as e: RunStore(tmp_path/place)
    why = {'file/store.sqlite': f'{tmp_path/"file"} is not a folder', 'folder': 'unable to open database file'}[place]
    assert str(e.value) == f'cannot open the store {tmp_path/place}: {why}'


def test_other_files_and_versions_are_refused(tmp_path):
    (tmp_path/'text').write_text('not a database '*100)
    with pytest.raises(ValueError, match=r'text is not a run store \(not an SQLite file\)'): RunStore(tmp_path/'text')
    with sqlite3.connect(tmp_path/'other') as db: db.execute('CREATE TABLE t (x)')
    with pytest.raises(ValueError, match=r'other is not a run store \(an SQLite file with other tables\)'): RunStore(tmp_path/'other')
    with sqlite3.connect(tmp_path/'newer') as db: db.execute(f'PRAGMA user_version={SCHEMA_VERSION + 1}')
    with pytest.raises(ValueError, match=f'newer has store version {SCHEMA_VERSION + 1}, this saeexplainer reads version {SCHEMA_VERSION}'): RunStore(tmp_path/'newer')


def test_wal_and_synchronous(store):
    assert store.rows('PRAGMA journal_mode') == [('wal',)] and store.rows('PRAGMA synchronous') == [(1,)]


# ---- rows

def test_the_first_row_stays(store):
    assert store.put_explanations([('sft', 1, 0, 'first'), ('sft', 1, 0, 'second')]) == 1
    assert store.put_explanations([dict(stage='sft', feature=1, k=0, text='third'), ('sft', 2, 0, 'new')]) == 1
    assert store.explanations('sft').text.tolist() == ['first', 'new']


def test_numpy_values_and_generators(store):
    store.put_steering((np.int64(1), np.int32(c), np.int64(9), np.float32(.25), np.float64(3), .24, np.bool_(True)) for c in range(3))
    store.put_judgements([dict(stage='sft', feature=np.int64(1), choice=2, true=np.int64(0), scores=dict(order=[1, 0], scores=[np.float32(.5), None]))])
    s, j = store.steering(1), store.judgements('sft')
    assert s.control.tolist() == [0, 1, 2] and s.reached.tolist() == [1, 1, 1] and str(s.kl.dtype) == 'float64'
    assert json.loads(j.scores[0]) == {'order': [1, 0], 'scores': [.5, None]} and j.true[0] == 0


@pytest.mark.parametrize('put,row,says', [
    ('put_explanations', dict(stage='sft', feature=1, k=0), 'NOT NULL constraint failed: explanations.text'),
    ('put_explanations', dict(stage='sft', feature=1, text='x'), 'NOT NULL constraint failed: explanations.k'),
    ('put_explanations', dict(stage='sft', feature='seven', k=0, text='x'), 'cannot store TEXT value in INT column explanations.feature'),
    ('put_explanations', dict(stage='sft', feature=1, k=0, txt='x'), "explanations has no column 'txt': it has stage, feature, k, text"),
    ('put_explanations', ('sft', 1, 0), 'a row of explanations has 4 values (stage, feature, k, text), not 3'),
    ('put_texts', dict(stage='sft', feature=1, k=0, kind='a', j=0), 'text IS NOT NULL OR error IS NOT NULL'),
    ('put_pairs', dict(round=1, feature=1), 'CHECK constraint failed'),
    ('put_pairs', dict(round=1, feature=1, chosen='a', rejected='a', chosen_score=2., rejected_score=1.), 'CHECK constraint failed'),
    ('put_pairs', dict(round=1, feature=1, chosen='a', rejected='b', chosen_score=1., rejected_score=2.), 'CHECK constraint failed'),
])
def test_wrong_rows_are_refused_and_nothing_of_the_call_stays(store, put, row, says):
    good = {'put_explanations': ('sft', 5, 0, 'good'), 'put_texts': ('sft', 5, 0, 'a', 0, 'good', None, None), 'put_pairs': (1, 5, 'a', 'b', 2., 1., None)}[put]
    with pytest.raises(ValueError) as e: getattr(store, put)([good, row])
    assert says in str(e.value) and '\n' not in str(e.value)
    assert store.count(put.removeprefix('put_')) == 0 and getattr(store, put)([good]) == 1


def test_views_filter_and_keep_their_types(store):
    store.put_texts(texts(3) + texts(2, 'label'))
    store.put_texts([('round1', 9, 0, 'neutral', 0, None, 'not JSON', None)])
    assert len(store.texts()) == 11 and len(store.texts(['round1', 'label'], ['preference'])) == 10 and len(store.texts('round1', 'neutral')) == 1
    assert store.texts('round1', 'neutral').text[0] is None and store.texts('label').error.tolist() == [None]*4
    empty = store.texts('nothing')
    assert len(empty) == 0 and list(empty.columns) == list(COLUMNS['texts']) and str(empty.score.dtype) == 'float64' and str(empty.feature.dtype) == 'int64'
    assert str(store.texts().score.dtype) == 'float64'


def test_missing_keys_come_back_in_their_order(store):
    store.put_explanations([('round1', 3, 1, 'x')])
    assert store.missing('explanations', [('round1', np.int64(f), k) for f in (4, 3) for k in (0, 1)]) == [('round1', 4, 0), ('round1', 4, 1), ('round1', 3, 0)]


# ---- scores

def test_each_text_is_scored_once(store):
    store.put_texts(texts(2))
    key = ('round1', 0, 0, 'preference', 0)
    assert store.put_scores([(*key, 1.5)]) == 1 and store.put_scores([(*key, 2.5)]) == 0
    assert store.put_scores([dict(zip([*KEYS['texts'], 'score'], (*key, 3.5)))]) == 0 and store.texts().score[0] == 1.5
    assert store.put_scores([('round1', 0, 0, 'preference', 1, 0.)]) == 1 and len(store.unscored('round1')) == 2 # 0 is a score


def test_a_text_without_tokens_is_told_from_one_that_waits(store):
    store.put_texts(texts(1) + [('round1', 1, 0, 'preference', 0, None, 'not JSON', None)])
    assert len(store.unscored()) == 2 # the unparsed one does not wait
    assert store.put_scores([('round1', 0, 0, 'preference', 0, np.float32('nan'))]) == 1
    t = store.texts()
    assert t.error.tolist() == ['empty', None, 'not JSON'] and t.score.isna().all() and store.unscored().j.tolist() == [1]
    assert store.put_scores([('round1', 0, 0, 'preference', 0, 4.), ('round1', 1, 0, 'preference', 0, 4.)]) == 0 # neither is scored later


def test_why_a_text_has_no_score(store):
    store.put_texts(texts(2))
    assert store.put_scores([('round1', 0, 0, 'preference', 0, 'too long'), ('round1', 0, 0, 'preference', 1, 2.)]) == 2
    t = store.texts()
    assert t.error.tolist() == ['too long', None, None, None] and t.score.notna().tolist() == [False, True, False, False] and len(store.unscored()) == 2
    assert store.put_scores([('round1', 0, 0, 'preference', 0, 4.), ('round1', 0, 0, 'preference', 1, 'empty')]) == 0 # neither is written over


def test_a_score_needs_its_text(store):
    store.put_texts(texts(1))
    with pytest.raises(ValueError, match=r"no text \('round1', 7, 0, 'preference', 0\) to score"):
        store.put_scores([('round1', 0, 0, 'preference', 0, 1.), ('round1', 7, 0, 'preference', 0, 1.)])
    assert len(store.unscored()) == 2 # nothing of the call


# ---- stages, facts, replies, preferences

def test_stages(store):
    store.start('sft')
    assert not store.finished('sft')
    store.start('sft'); time.sleep(.02); store.finish('sft', loss=np.float32(1.5))
    p = store.progress().iloc[0]
    assert store.finished('sft') and .02 <= p.seconds < 10 and p.started <= p.finished and json.loads(p.detail) == {'attempts': 2, 'loss': 1.5}
    store.start('sft'); store.finish('sft', loss=9)
    assert json.loads(store.progress().detail[0]) == {'attempts': 2, 'loss': 1.5} # a finished stage stays as it was


def test_facts_are_written_once(store):
    store.put_meta(template='a {placeholder}', versions={'torch': '2.13'}, beta=(.1, .15))
    store.put_meta(template='a {placeholder}', beta=[.1, .15])
    assert store.meta('versions') == {'torch': '2.13'} and store.meta('beta') == [.1, .15] and store.meta('none', 3) == 3
    with pytest.raises(ValueError, match="has template 'a {placeholder}', not 'b': give the run another name"): store.put_meta(template='b')


def test_replies_are_kept_once_and_only_a_failed_one_is_replaced(store):
    ask = Request('x', seed=3)
    store.put_replies([('a', ask, Reply('y', cost=.25, scores=(1., 2.), sent={'seed': 3})), ('b', ask, Reply(error='no reply', outcome='failed')), ('c', ask, Reply(error='empty', outcome='empty'))], 'w', 's')
    store.put_replies([('a', ask, Reply('other'))], 'w', 's')
    assert store.replies(['a', 'b', 'c', 'd']) == {'a': Reply('y', cost=.25, scores=(1., 2.), sent={'seed': 3}), 'c': Reply(error='empty', outcome='empty')}
    store.put_replies([('b', ask, Reply('at last'))], 'w', 's')
    assert store.replies(['b'])['b'].text == 'at last' and store.count('replies') == 3
    assert store.accounts()['w']['s']['outcomes'] == {'ok': 2, 'empty': 1}


def test_attempts_are_on_record_before_and_after(store):
    a, b, c, d = (store.begin_attempt(k, 'w', 's', 1000, .01) for k in 'abcd')
    store.end_attempt(a, 'delivered', .5, 100, 10, .002)
    store.end_attempt(b, '429', .1, 0, 0, 0.)
    store.end_attempt(c, 'timeout', 9.)
    assert store.spent() == (4, 110 + 2*1000, pytest.approx(.022)) and store.cost() == .002 and store.answered('w') and not store.answered('v')
    assert store.forget_attempts() == 1 and store.forget_attempts() == 0
    book = store.accounts()['w']['s']
    assert book['attempts'] == {'delivered': 1, '429': 1, 'timeout': 1, 'killed': 1} and book['perhaps_billed'] == .02 and (book['prompt_tokens'], book['cost']) == (100, .002)


def test_a_store_of_version_1_is_brought_forward(tmp_path):
    old = sqlite3.connect(tmp_path/'old.sqlite')
    for s in SCHEMA.split(';')[:-1]:
        if 'TABLE attempts' not in s: old.execute(s.replace(', writer TEXT, stage TEXT) STRICT', ') STRICT') if 'TABLE replies' in s else s)
    old.execute('INSERT INTO replies VALUES (?, ?, ?)', ['old', '{}', json.dumps(dict(text='y', error=None, prompt_tokens=10, completion_tokens=2, cost=.5, cached=False, cut=False, scores=None, sent=None))])
    old.execute("INSERT INTO metrics VALUES ('sft', 1, 'input', 1.)"); old.execute('PRAGMA user_version=1'); old.commit(); old.close()
    for _ in range(2):
        with RunStore(tmp_path/'old.sqlite') as store:
            assert store.count('metrics') == 1 and store.spent() == (1, 12, .5) and store.replies(['old'])['old'].text == 'y' and store.replies(['old'])['old'].outcome == 'ok' and store.rows('PRAGMA user_version') == [(2,)]
            store.put_replies([('a', Request('x'), Reply('y'))], 'w', 's')


def test_preferences_are_what_trl_trains_on(store):
    from trl.data_utils import is_conversational, maybe_apply_chat_template
    from helpers import tiny_tokenizer
    with pytest.raises(ValueError, match='has no template or placeholder: write them with put_meta'): store.export_preferences()
    store.put_meta(template='What is {placeholder} {here}?', placeholder='<repo_name>')
    assert len(store.export_preferences()) == 0
    store.put_pairs([(1, 7, 'ships', 'boats', 3., 1., None), (1, 8, None, None, None, None, 'low_spread'), (2, 7, 'fleets', 'ships', 4., 2., None)])
    d = store.export_preferences()
    assert d['round'] == [1, 2] and store.export_preferences(2)['chosen_score'] == [4.] and d['feature'] == [7, 7]
    assert is_conversational(d[0]) and d[0]['prompt'] == [dict(role='user', content='What is <repo_name> {here}?')]
    assert d[0]['chosen'] == [dict(role='assistant', content='ships')] and d[0]['rejected'] == [dict(role='assistant', content='boats')]
    flat = maybe_apply_chat_template({k: d[0][k] for k in ('prompt', 'chosen', 'rejected')}, tiny_tokenizer())
    assert flat['prompt'].endswith('<|im_start|>assistant\n') and flat['chosen'] == 'ships<|im_end|>\n'


def test_threads_share_a_store(store):
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(8) as pool: new = list(pool.map(lambda i: store.put_metrics([('sft', i % 50, 'input', 1.)]), range(200)))
    assert sum(new) == 50 == store.count('metrics')


# ---- damage

def grown(path, n=400): # a store of some pages, closed
    with RunStore(path) as store:
        store.put_texts(texts(n))
        store.put_replies([(f'key {i}', Request('x'*200, seed=i), Reply('y'*200)) for i in range(n)], 'w', 's')
    return path


def reads(path): # everything, as a resumed run would
    with RunStore(path) as store: return [len(store.table(t)) for t in KEYS], len(store.replies([f'key {i}' for i in range(400)])), store.accounts()


@pytest.mark.parametrize('share', [.02, .3, .5, .9, .999])
def test_a_store_that_was_cut_off_says_so(tmp_path, share):
    path = grown(tmp_path/'store.sqlite')
    size = path.stat().st_size
    os.truncate(path, int(share*size))
    with pytest.raises(ValueError) as e: RunStore(path)
    assert str(e.value) == f'the store {path} is damaged ({int(share*size):,} of its {size:,} bytes are there): put back a copy of it, or begin under another name'


def test_damaged_pages_are_one_line_that_names_the_file(tmp_path):
    whole, rng, seen = grown(tmp_path/'whole.sqlite').read_bytes(), np.random.default_rng(0), 0
    for i in range(40):
        path, bad = tmp_path/f'{i}.sqlite', bytearray(whole)
        page = int(rng.integers(1, len(whole)//4096))*4096
        bad[page:page + 64] = rng.bytes(64) # the head of a page
        path.write_bytes(bad)
        try: reads(path)
        except (ValueError, OSError) as e:
            seen += 1
            assert str(path) in str(e) and '\n' not in str(e)
    assert seen > 35 # the others hit what is not read


def test_a_key_that_has_changed_is_noticed(tmp_path):
    path = grown(tmp_path/'store.sqlite')
    data = path.read_bytes()
    path.write_bytes(data.replace(b'key 123', b'key 1#3', 1))
    with pytest.raises(ValueError, match='store.sqlite is damaged '): RunStore(path)


def test_damage_found_while_it_is_read_or_written_names_the_file(tmp_path):
    path = grown(tmp_path/'store.sqlite')
    with RunStore(path) as store:
        with open(path, 'r+b') as file:
            file.seek(4096)
            file.write(os.urandom(path.stat().st_size - 4096))
        store._db.execute('PRAGMA shrink_memory') # what it has read before
        for act in (store.texts, store.accounts, lambda: store.put_texts(texts(900)), lambda: store.put_replies([('new', Request('x'), Reply('y'))])):
            with pytest.raises(OSError, match=f'the store {path}: '): act()


def test_numbers_that_sqlite_cannot_hold_are_refused(store):
    with pytest.raises(ValueError, match='the store refuses the row: Python int too large'): store.end_attempt(store.begin_attempt('a', 'w', 's', 1, 1.), 'delivered', .1, 10**30, 1)
    with pytest.raises(ValueError, match='the store refuses the row'): store.put_metrics([('sft', 1, 'input', object())])


# ---- half of a store

def left_behind(path): # a process that is killed with rows in the -wal
    code = '''
        import os, signal, sys
        from saeexplainer.store import RunStore
        RunStore(sys.argv[1]).put_explanations([('sft', 1, 0, 'ships')])
        os.kill(os.getpid(), signal.SIGKILL)
    '''
    start(code, path).communicate(timeout=240)
    assert path.stat().st_size and path.with_name(path.name + '-wal').stat().st_size


def test_the_wal_without_its_store_is_noticed_and_kept(tmp_path):
    path, wal = tmp_path/'store.sqlite', tmp_path/'store.sqlite-wal'
    left_behind(path)
    main, size = path.read_bytes(), wal.stat().st_size
    for lost in (path.unlink, path.touch):
        lost()
        with pytest.raises(ValueError, match=f'{wal} is there, but not store.sqlite that it belongs to: copy both'): RunStore(path)
    assert wal.stat().st_size == size
    path.write_bytes(main)
    with RunStore(path) as store: assert store.count('explanations') == 1 # nothing was lost by it


@pytest.mark.parametrize('lost', ['-wal', ''])
def test_an_empty_store_beside_adapters_is_not_begun_anew(tmp_path, lost):
    path = tmp_path/'store.sqlite'
    left_behind(path)
    (tmp_path/'explainer/sft').mkdir(parents=True)
    (tmp_path/'explainer/sft/adapter_config.json').write_text('{}')
    for part in {'-wal': ['-wal'], '': ['', '-wal']}[lost]: (tmp_path/f'store.sqlite{part}').unlink()
    for _ in range(2):
        with pytest.raises(ValueError, match='store.sqlite is empty or missing, but .*explainer/sft is there: put the store back'): RunStore(path)
    assert path.exists() == (lost == '-wal')


def test_a_finished_stage_is_in_the_main_file(tmp_path):
    with RunStore(tmp_path/'store.sqlite') as store:
        store.start('sft')
        store.put_explanations([('sft', 1, 0, 'ships')])
        store.finish('sft')
        (tmp_path/'copy.sqlite').write_bytes(store.path.read_bytes()) # without its -wal
    with RunStore(tmp_path/'copy.sqlite') as copy: assert copy.finished('sft') and copy.count('explanations') == 1


def test_a_clock_that_is_set_back(store, monkeypatch):
    store.start('sft')
    now = time.time()
    monkeypatch.setattr(time, 'time', lambda: now - 86_400)
    store.finish('sft')
    p = store.progress().iloc[0]
    assert 0 <= p.seconds < 60 and p.finished >= p.started


# ---- the end of an attempt and its reply

def test_an_attempt_ends_with_its_reply_or_not_at_all(store):
    store.put_replies([('a', Request('x'), Reply('y'))], 'w', 's', (store.begin_attempt('a', 'w', 's', 900, .01), 'delivered', .5, 100, 10, .002))
    assert store.spent() == (1, 110, .002) and store.answered('w')
    two = store.begin_attempt('b', 'w', 's', 900, .01)
    with pytest.raises(ValueError): store.put_replies([('b', Request('x'), Reply('y', cost=1.))], 'w', 's', (two, 'delivered', .5, 10**30, 10, .002))
    assert not store.replies(['b']) and store.accounts()['w']['s']['attempts'] == {'delivered': 1, 'under way': 1}


def test_a_part_of_the_usage_that_is_missing_counts_at_its_most(store):
    for i, tokens in enumerate([(100, None), (None, 10), (None, None)]):
        store.end_attempt(store.begin_attempt(f'{i}', 'w', 's', 900, .01), 'delivered', .1, *tokens)
    assert store.spent() == (3, 2700, pytest.approx(.03)) and store.accounts()['w']['s']['perhaps_billed'] == pytest.approx(.03)


def test_who_was_answered_after_a_request(store):
    lost, other = (store.begin_attempt(k, 'w', 's', 9, 0.) for k in 'ab')
    store.end_attempt(lost, '500', .1, 0, 0, 0.)
    assert not store.answered_after('a', 'w')
    store.end_attempt(other, 'delivered', .1, 1, 1, 0.)
    assert store.answered_after('a', 'w') and not store.answered_after('b', 'w') and not store.answered_after('a', 'v')


def test_a_clock_that_is_set_back_gives_no_negative_duration(tmp_path, monkeypatch):
    from saeexplainer import store as module
    with RunStore(tmp_path/'store.sqlite') as store:
        store.start('sft')
        now = module.time.time()
        monkeypatch.setattr(module.time, 'time', lambda: now - 86_400)
        store.finish('sft')
        assert 0 <= store.progress().seconds.item() < 60


# ---- tables and facts that are not the store's own

@pytest.mark.parametrize('sql, says', [
    ('DROP TABLE texts', 'it has no table texts'), ('ALTER TABLE metrics DROP COLUMN value', 'its table metrics lacks value'), ('ALTER TABLE meta RENAME COLUMN value TO fact', 'its table meta lacks value'),
    ('ALTER TABLE pairs ADD COLUMN note TEXT', 'its table pairs has the columns '), ('DROP TABLE metrics; CREATE TABLE metrics (stage TEXT, feature INT, metric TEXT, value TEXT)', 'its table metrics has TEXT in column value, not REAL')])
def test_other_tables_are_named(tmp_path, sql, says):
    RunStore(file := tmp_path/'store.sqlite').close()
    with sqlite3.connect(file) as db: db.executescript(sql)
    with pytest.raises(ValueError) as e: RunStore(file)
    assert str(file) in str(e.value) and says in str(e.value) and '\n' not in str(e.value)


def test_values_that_are_no_numbers_are_named(tmp_path):
    RunStore(file := tmp_path/'store.sqlite').close()
    with sqlite3.connect(file) as db: db.executescript("DROP TABLE metrics; CREATE TABLE metrics (stage TEXT, feature INT, metric TEXT, value REAL); INSERT INTO metrics VALUES ('sft', 1, 'gap', 'x')")
    with RunStore(file) as store, pytest.raises(ValueError, match='store.sqlite is damaged .column value of its table metrics does not hold numbers alone'): store.metrics()


@pytest.mark.parametrize('value, kind, says', [('{x', None, "its fact 'a' is not JSON: '{x'"), ('[1]', dict, "its fact 'a' is [1], not an object"), ('"x"', list, """its fact 'a' is "x", not a list"""), ('1', str, "its fact 'a' is 1, not a text"), ('['*10**5, None, 'is not JSON')])
def test_facts_that_are_damaged_are_named(store, value, kind, says):
    with store.transaction() as db: db.execute('INSERT INTO meta VALUES (?, ?)', ['a', value])
    with pytest.raises(ValueError) as e: store.meta('a', kind=kind)
    assert says in str(e.value) and str(store.path) in str(e.value) and len(str(e.value)) < 300
    assert store.meta('b', 5, kind=dict) == 5


def test_details_of_a_stage(store):
    assert store.detail('sft') == {}
    store.start('sft')
    assert store.detail('sft') == {'attempts': 1}
    for value in ('x', '[1]', None):
        with store.transaction() as db: db.execute('UPDATE progress SET detail=?', [value])
        with pytest.raises(ValueError, match='store.sqlite is damaged .what it notes of stage sft is'): store.detail('sft')


def test_replies_that_are_damaged_or_of_another_version_are_named(store):
    store.put_replies([('k', Request('x'), Reply('y'))])
    for reply, says in (('{"outcome": "ok", "colour": 1}', 'holds a reply of another version'), ('[]', 'the reply k is \\[\\], not an object')):
        with store.transaction() as db: db.execute('UPDATE replies SET reply=?', [reply])
        with pytest.raises(ValueError, match='store.sqlite') as e: store.replies(['k']) or store._reply('k', reply)
