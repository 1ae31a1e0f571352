"SIGKILL in each stage, and whenever chance has it: a run goes on, and ends as one that nothing interrupted"
import os
import random
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
from forks import calling, is_alive, kill
from tiny_lab import STAGES, keys_of, make_lab, rows_of, tables_compared

from saeexplainer.results import Results
from saeexplainer.store import RunStore

NEVER = float('inf')


def command(lab, folder):
    "Code that runs the lab in a folder"
    arguments = ['run', str(lab.file), '--root', str(folder.parent), '--name', folder.name, '--json']
    return calling(arguments, lab.data)


def ask(store, sql, *values):
    "The one row of a query to a store that may be in use; None where there is no store or no table yet"
    if not store.exists(): return None
    try:
        with closing(sqlite3.connect(f'file:{store}?mode=ro', uri=True)) as db:
            return db.execute(sql, values).fetchone()
    except sqlite3.OperationalError:
        return None


def row_count(store) -> int:
    "Rows of all tables that a run fills; 0 where there is none yet"
    counts = ' + '.join(f'(SELECT count(*) FROM "{table}")' for table, _ in tables_compared())
    found = ask(store, f'SELECT {counts}')
    return found[0] if found else 0


def is_begun(store, stage, rows_before) -> bool:
    "Whether a stage has written something, or has been at it for a while"
    progress = ask(store, 'SELECT started, finished FROM progress WHERE stage=?', stage)
    if progress is None: return False
    started, finished = progress
    if finished: return True
    if stage == 'sft' or stage.startswith('dpo'):
        return (store.parent/'explainer'/stage/'checkpoints').exists() or time.time() - started > 3
    return row_count(store) > rows_before + 2


def filled(row):
    "What is known of a row"
    return {name: value for name, value in row.items() if value is not None}


def assert_only_filled_in(before, after):
    "No row is lost or changed; a score that was not known may be known"
    for table, rows in before.items():
        for key, row in rows.items():
            assert filled(row).items() <= after[table][key].items(), (table, key)


# ---- in each stage

def killed_in(stage, forks, lab, folder) -> int: # exit code
    store = folder/'store.sqlite'
    before = rows_of(store)
    rows_before = row_count(store)
    pid = forks.start(command(lab, folder))
    while is_alive(pid) and not is_begun(store, stage, rows_before): time.sleep(.01)
    kill(pid)
    code = forks.exit_code()
    assert_only_filled_in(before, rows_of(store))
    return code


@pytest.fixture(scope='module')
def killed_everywhere(forks, tiny_lab, tmp_path_factory):
    "Folder of a run that was killed once in each stage, and then came to its end"
    folder = tmp_path_factory.mktemp('killed')/'everywhere'
    codes = [killed_in(stage, forks, tiny_lab, folder) for stage in STAGES]
    assert codes == [-signal.SIGKILL]*len(STAGES)
    assert forks.run(command(tiny_lab, folder)) == 0, forks.errors()
    return folder


def test_no_row_is_lost_and_none_is_there_twice(killed_everywhere, finished_run):
    killed = rows_of(killed_everywhere/'store.sqlite')
    whole = rows_of(finished_run/'store.sqlite')
    assert keys_of(killed) == keys_of(whole)


@pytest.mark.parametrize('table', ['explanations', 'pairs'])
def test_the_same_questions_got_the_same_answers(killed_everywhere, finished_run, table):
    killed = rows_of(killed_everywhere/'store.sqlite')
    assert killed[table] == rows_of(finished_run/'store.sqlite')[table]


def test_killed_in_every_stage_it_is_complete(killed_everywhere):
    with RunStore(killed_everywhere/'store.sqlite') as store:
        assert not len(store.unscored())
        assert [stage for stage in STAGES if not store.finished(stage)] == []


def test_the_report_says_how_many_sittings_there_were(killed_everywhere):
    report = killed_everywhere/'report'
    assert Results(report).made['sittings'] == dict.fromkeys(STAGES, 2)
    page = (report/'index.html').read_text()
    assert page.count(' since its last start, of 2') == len(STAGES)


# ---- at random moments

def killed_after(rows, seconds, forks, lab, folder) -> int: # exit code
    "One try, killed some seconds after it has written so many rows"
    store = folder/'store.sqlite'
    wanted = row_count(store) + rows
    pid = forks.start(command(lab, folder))
    while is_alive(pid) and row_count(store) < wanted: time.sleep(.02)
    if is_alive(pid) and rows < NEVER:
        time.sleep(seconds)
        kill(pid)
    return forks.exit_code()


def run_to_the_end(moments, forks, lab, folder) -> list[int]: # exit codes
    "Try until one is not killed"
    codes, before = [], {}
    for rows, seconds in [*moments, (NEVER, 0)]:
        codes.append(killed_after(rows, seconds, forks, lab, folder))
        after = rows_of(folder/'store.sqlite')
        assert_only_filled_in(before, after)
        before = after
        if codes[-1] == 0: break
    return codes


def about(value):
    return pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value


def assert_same_rows(found, wanted):
    assert keys_of(found) == keys_of(wanted) # no row lost, none twice
    for table, rows in wanted.items():
        for key, row in rows.items():
            for column, value in row.items():
                assert found[table][key][column] == about(value), (table, key, column)


def assert_same_results(report:Path, wanted:Path):
    for table in ('metrics', 'pairs', 'candidates', 'judgements'):
        pd.testing.assert_frame_equal(Results(report)[table], Results(wanted)[table], rtol=1e-3)


@pytest.mark.parametrize('seed', [int(os.environ.get('KILLS_SEED', 0))])
def test_killed_at_random_moments(forks, tiny_lab, finished_run, tmp_path, seed):
    "SIGKILL whenever chance has it, again and again: the tables are those of a run that nothing interrupted"
    rng = random.Random(seed)
    whole = finished_run/'store.sqlite'
    share = row_count(whole)//8 # counted in rows, not in seconds: machines differ from one minute to the next
    moments = [(rng.uniform(0, share), rng.uniform(0, .2)) for _ in range(12)]
    codes = run_to_the_end(moments, forks, tiny_lab, tmp_path/'random')
    assert codes[-1] == 0, forks.errors()
    assert set(codes) == {0, -signal.SIGKILL}
    assert codes.count(-signal.SIGKILL) >= 3
    assert_same_rows(rows_of(tmp_path/'random'/'store.sqlite'), rows_of(whole))
    assert_same_results(tmp_path/'random'/'report', finished_run/'report')


# ---- while candidates are scored by their own words, lookups among them

@pytest.fixture(scope='module')
def own_words(tmp_path_factory):
    fields = dict(reward='self', threshold=-.5, candidate_lookups=['vocabulary probe', 'nearest label'],
                  dpo_rounds=1, baselines=[], n_output=0, batch_size=1)
    return make_lab(tmp_path_factory.mktemp('own'), **fields)


@pytest.fixture(scope='module')
def runs(own_words, forks, tmp_path_factory):
    "Folder of a whole run, and of one that was killed when it had scored some candidates"
    folder = tmp_path_factory.mktemp('runs')
    assert forks.run(command(own_words, folder/'whole')) == 0, forks.errors()
    store = folder/'killed'/'store.sqlite'
    pid = forks.start(command(own_words, folder/'killed'))
    while is_alive(pid) and not (ask(store, 'SELECT count(*) FROM texts') or [0])[0]: time.sleep(.001)
    kill(pid)
    assert forks.exit_code() == -signal.SIGKILL
    return folder


def first_round(folder): # its rows
    rows = rows_of(folder/'store.sqlite')
    return {table: {key: row for key, row in rows[table].items() if 'round1' in key or table == 'pairs'}
            for table in ('explanations', 'texts', 'pairs')}


@pytest.fixture(scope='module')
def sittings(own_words, forks, runs):
    "Rows of the first round when it was killed, and at the end"
    before = first_round(runs/'killed')
    assert forks.run(command(own_words, runs/'killed')) == 0, forks.errors()
    return before, first_round(runs/'killed')


def test_a_round_of_own_words_goes_on(sittings, runs):
    before, after = sittings
    assert before['texts']
    assert before['texts'].items() <= after['texts'].items()
    assert after == first_round(runs/'whole')


def test_a_round_of_own_words_has_no_written_text(runs):
    rows = first_round(runs/'whole')
    assert {kind for _, _, _, kind, _ in rows['texts']} == {'self'}
    assert any(row['dropped'] is None for row in rows['pairs'].values())


def test_lookups_are_candidates_behind_the_sampled_ones(own_words, runs):
    places = {k for _, _, k in first_round(runs/'whole')['explanations']}
    assert places & {own_words.preset().n_candidates, own_words.preset().n_candidates + 1}


@pytest.mark.parametrize('fields', [dict(candidate_lookups=[]), dict(reward='mean')])
def test_a_begun_round_is_not_mixed_with_another(own_words, runs, fields):
    refused = pytest.raises(ValueError, match=next(iter(fields)))
    with own_words.in_use(), refused, own_words.run(runs/'whole', **fields): pass


def test_without_written_texts_no_writer_is_needed(own_words, tmp_path):
    with own_words.in_use(), own_words.run(tmp_path/'self', writer='far') as run: run.check()


def test_with_written_texts_a_writer_is_needed(own_words, tmp_path):
    with own_words.in_use(), own_words.run(tmp_path/'mean', writer='far', reward='mean') as run:
        with pytest.raises(PermissionError, match='no key'): run.check()
