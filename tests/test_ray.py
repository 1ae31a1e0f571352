"A dictionary explained on a real cluster of three nodes: workers, nodes and drivers die, and the file is the same"
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from crews import (
    NODE, ROOT, Meddled, all_end, is_running, kill_head, kill_one, make_deadly, make_squares, nodes, noted,
)
from forks import calling, kill
from tiny_lab import NO_DIRECTION

ray = pytest.importorskip('ray', reason="ray is not installed: pip install 'saeexplainer[ray]'")

from saeexplainer.cli import main
from saeexplainer.dictionaries import explain_dictionary
from saeexplainer.executor import PlainExecutor, RayExecutor

BATCH = 2 # features: twenty batches


@pytest.fixture
def lab(explained_lab, ray_cluster):
    "A lab with an explainer, and a cluster"
    with explained_lab.in_use(): yield explained_lab


def explain(lab, out, executor, **kw):
    "Explain the dictionary of a lab in small batches"
    preset = lab.preset(batch_size=BATCH)
    return explain_dictionary(preset, lab.explainer, out, progress=False, executor=executor, **kw)


@pytest.fixture(scope='module')
def whole(explained_lab, tmp_path_factory):
    "Text of the file of one process"
    out = tmp_path_factory.mktemp('whole')/'all.jsonl'
    with explained_lab.in_use(): explain(explained_lab, out, PlainExecutor())
    return out.read_text()


def rows_of(text): return [json.loads(line) for line in text.splitlines()]

def rows_in(part): return rows_of(part.read_text())[1:] # without the line of its settings


# ---- the same file

def test_the_file_is_that_of_one_process(lab, tmp_path):
    "Explained, chosen among candidates, and verified"
    for name, executor in dict(here=PlainExecutor(), there=RayExecutor()).items():
        out = tmp_path/f'{name}.jsonl'
        explain_dictionary(lab.preset(), lab.explainer, out, 1, progress=False, candidates=1, executor=executor)
    assert (tmp_path/'there.jsonl').read_text() == (tmp_path/'here.jsonl').read_text()
    assert not list(tmp_path.glob('*.part'))


def stop(pids): raise KeyboardInterrupt

@pytest.mark.parametrize('first, then', [(PlainExecutor(), RayExecutor), (None, PlainExecutor)])
def test_begun_here_and_ended_there(lab, whole, tmp_path, first, then):
    "And the other way round"
    out = tmp_path/'all.jsonl'
    stopped = Meddled(first or RayExecutor(2), tmp_path/'pids', 5, stop)
    with pytest.raises(KeyboardInterrupt): explain(lab, out, stopped)
    assert len(rows_in(tmp_path/'all.jsonl.explained.part')) == 5*BATCH + len(NO_DIRECTION)
    assert first or all_end(stopped.pids())
    explain(lab, out, then())
    assert out.read_text() == whole


# ---- workers and nodes die

def test_a_worker_is_killed(lab, whole, tmp_path, capsys):
    killed = Meddled(RayExecutor(1), tmp_path/'pids', 4, kill_one)
    explain(lab, tmp_path/'all.jsonl', killed)
    assert (tmp_path/'all.jsonl').read_text() == whole
    assert len(killed.pids()) == 2
    said = capsys.readouterr()
    assert re.fullmatch(r'a worker died at the batch from \d+ on\n', said.err)
    assert said.out == ''


def test_a_node_is_removed(lab, whole, tmp_path, ray_cluster):
    "With one of two workers, as in a power cut; another node comes"
    def replace_node(pids):
        ray_cluster.remove_node(ray_cluster.worker_nodes.copy().pop(), allow_graceful=False)
        ray_cluster.add_node(**NODE)
    removed = Meddled(RayExecutor(2), tmp_path/'pids', 3, replace_node)
    explain(lab, tmp_path/'all.jsonl', removed)
    assert (tmp_path/'all.jsonl').read_text() == whole


def test_a_batch_that_always_kills_its_worker_is_set_aside(ray_cluster, capsys):
    pairs = [[i, i + 1] for i in range(0, 40, 2)]
    done = []
    says = r'^1 batch was set aside, since 3 workers died at each \(from 4 on\): all others are done$'
    with pytest.raises(RuntimeError, match=says):
        for batch, rows in RayExecutor(2).map(partial(make_deadly, 5, make_squares), pairs):
            done.append(batch[0])
            assert rows == [i**2 for i in batch]
    assert sorted(done) == [i for i, _ in pairs if i != 4]
    assert capsys.readouterr().err.count('a worker died') <= 4 # the first time another batch may be blamed


def test_workers_that_die_while_they_load(ray_cluster):
    says = '3 workers died one after the other while they loaded: is there memory for so many?'
    with pytest.raises(RuntimeError, match=says): list(RayExecutor().map(partial(os._exit, 1), [[1]]))


# ---- the driver ends

def test_workers_end_where_nobody_asks_for_more(ray_cluster, tmp_path):
    with closing(RayExecutor(2).map(partial(noted, tmp_path, make_squares), [[1], [2], [3]])) as found: next(found)
    assert all_end(int(file.name) for file in tmp_path.iterdir())


def all_are_free(n_cpus, seconds=20) -> bool:
    end = time.monotonic() + seconds
    while ray.available_resources().get('CPU', 0) < n_cpus and time.monotonic() < end: time.sleep(.1)
    return ray.available_resources().get('CPU', 0) == n_cpus

def lines_of(part): return part.read_bytes().count(b'\n') if part.exists() else 0

def test_the_driver_is_killed_and_the_same_command_goes_on(lab, whole, forks, tmp_path):
    out = tmp_path/'all.jsonl'
    part = tmp_path/'all.jsonl.explained.part'
    arguments = ['explain', str(lab.file), '--all', '--out', str(out), '--explainer', str(lab.explainer),
                 '-s', f'batch_size={BATCH}', '--ray']
    at = f'import os\nos.environ["RAY_ADDRESS"] = {os.environ["RAY_ADDRESS"]!r}\n'
    pid = forks.start(at + calling(arguments, lab.data))
    while is_running(pid) and lines_of(part) < 6: time.sleep(.002)
    kill(pid)
    assert forks.exit_code() == -signal.SIGKILL
    assert not out.exists()
    assert all_are_free(2) # its worker ended with it
    main([*arguments, '--json'])
    assert out.read_text() == whole


IMPATIENT = '''
import os
from crews import slow
from saeexplainer import executor
executor._GLANCE, executor._HEAD_PATIENCE = 1, 3
executor.RayExecutor = slow(executor.RayExecutor, .5)
os.environ['RAY_ADDRESS'] = {address!r}
'''

def test_the_head_is_killed_and_the_same_command_goes_on_with_another(lab, whole, tmp_path):
    "Batches take longer than the head is waited for"
    out = tmp_path/'all.jsonl'
    part = tmp_path/'all.jsonl.explained.part'
    arguments = ['explain', str(lab.file), '--all', '--out', str(out), '--explainer', str(lab.explainer),
                 '-s', f'batch_size={BATCH}', '--ray']
    with nodes(1) as first:
        address = first.address
        code = IMPATIENT.format(address=address) + calling(arguments, lab.data)
        with subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True) as driver:
            while driver.poll() is None and lines_of(part) < 4: time.sleep(.01)
            kill_head(first)
            said = driver.stderr.read()
    assert driver.returncode == 2
    assert 'Traceback' not in said
    assert said.splitlines()[-1] == (
        f'saeexplainer: the head of the Ray cluster at {address} does not answer any more: what was done is kept, '
        'and the same command goes on when there is a cluster again')
    assert not out.exists()
    assert len(rows_in(part)) > len(NO_DIRECTION)
    main([*arguments, '--json']) # on the cluster of the other tests
    assert out.read_text() == whole


DRIVER = '''
import sys
from functools import partial
from pathlib import Path
from crews import make_slow, make_squares, noted
from saeexplainer.executor import RayExecutor

make = partial(make_slow, partial(noted, Path(sys.argv[1]), make_squares))
with RayExecutor() as executor:
    for batch, _ in executor.map(make, [[i] for i in range(999)]): print(batch, flush=True)
'''

@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGINT])
def test_a_cluster_of_its_own_ends_with_the_driver(ray_cluster, tmp_path, number):
    paths = os.pathsep.join([str(ROOT), str(ROOT/'tests')])
    environment = {name: value for name, value in os.environ.items() if name != 'RAY_ADDRESS'} | dict(PYTHONPATH=paths)
    command = [sys.executable, '-c', DRIVER, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as driver:
        assert driver.stdout.readline()
        started = children(driver.pid)
        driver.send_signal(number)
        driver.wait(60)
    workers = [int(file.name) for file in tmp_path.iterdir()]
    assert started
    assert workers
    assert all_end(started + workers)


def children(pid) -> list[int]:
    found = []
    for file in Path('/proc').glob('[0-9]*/stat'):
        try: parent = int(file.read_text().rpartition(')')[2].split()[1])
        except (FileNotFoundError, ProcessLookupError): continue
        if parent == pid: found.append(int(file.parent.name))
    return found


# ---- the command

def test_an_error_of_a_worker_is_one_line(lab, tmp_path, capsys, monkeypatch):
    "A file that the driver does not read"
    (tmp_path/'broken').mkdir()
    for file in lab.explainer.iterdir(): (tmp_path/'broken'/file.name).write_bytes(file.read_bytes())
    (tmp_path/'broken'/'adapter_config.json').write_text('{}')
    arguments = ['explain', str(lab.file), '--all', '--out', str(tmp_path/'x.jsonl'),
                 '--explainer', str(tmp_path/'broken')]
    said = []
    for more in ([], ['--ray']):
        with pytest.raises(SystemExit): main([*arguments, *more])
        said.append(capsys.readouterr().err.splitlines()[-1])
    assert said[0] == said[1]


@pytest.mark.parametrize('options, says', [
    (['--all', '--out', 'x.jsonl', '--workers', '2'], '--workers are those of a Ray cluster: give --ray too'),
    (['--all', '--out', 'x.jsonl', '--gpus-per-worker', '1'],
     '--gpus-per-worker is for workers of a Ray cluster: give --ray too'),
    (['5', '--ray'], '--ray is for --all: some features are explained in this process')])
def test_options_that_do_not_fit_together(explained_lab, capsys, options, says):
    with explained_lab.in_use(), pytest.raises(SystemExit): main(['explain', str(explained_lab.file), *options])
    assert capsys.readouterr().err == f'saeexplainer: {says}\n'
