"A cluster of three nodes on this machine; workers, and what may happen to them. Ray's processes import it too"
import os
import signal
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from saeexplainer.executor import _connect
from saeexplainer.lm.sampling import batches

ROOT = Path(__file__).parents[1]
STORE = dict(object_store_memory=100*2**20)
NODE = dict(STORE, num_cpus=1) # for one worker


@contextmanager
def nodes(n):
    "Within, there is a cluster of a head, which does no work, and so many nodes"
    from ray.cluster_utils import Cluster
    found = Cluster(initialize_head=True, head_node_args=dict(STORE, num_cpus=0, include_dashboard=False))
    for _ in range(n): found.add_node(**NODE)
    try:
        yield found
    finally:
        found.shutdown()


@contextmanager
def cluster():
    "Within, there is a cluster at RAY_ADDRESS, and this process is connected with it"
    import ray
    paths = [str(ROOT), str(ROOT/'tests'), os.environ.get('PYTHONPATH', '')]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join(paths)) # for the nodes and their workers
        patch.setenv('RAY_USAGE_STATS_ENABLED', '0')
        with nodes(2) as found:
            patch.setenv('RAY_ADDRESS', found.address)
            _connect(ray, n_workers=0)
            yield found
            ray.shutdown()


def kill_head(found):
    "Kill the processes of a cluster's head, as in a power cut"
    for kind in ('gcs_server', 'raylet'):
        for process in found.head_node.all_processes[kind]: process.process.kill()


# ---- workers

def squares(batch): return [number**2 for number in batch]
def make_squares(): return squares

def refuse(batch): raise ValueError(f'{batch[0]} is no number\nthat I know')
def make_refusing(): return refuse

def make_nothing(): raise FileNotFoundError('no model here')


class OddError(Exception):
    "An error that pickle cannot bring back"
    def __init__(self, code, reason): super().__init__(f'{reason} ({code})')

def be_odd(batch): raise OddError(7, 'no reason')
def make_odd(): return be_odd


def small(room, batch):
    "A worker with room for so many"
    if len(batch) > room: raise torch.OutOfMemoryError('no room')
    return squares(batch)

def make_small(room): return partial(small, room)


def read(room, batch):
    "A worker with room for so many rows at once; each item is that many rows. It says how many it has read at once"
    sizes = [len(part) for part in batches([1]*sum(batch), max_rows=8)]
    if max(sizes) > room: raise torch.OutOfMemoryError('no room')
    return [max(sizes)]*len(batch)

def make_reader(room): return partial(read, room)


def where(names, batch): return [(os.getcwd(), torch.get_num_threads(), *map(os.environ.get, names))]*len(batch)
def make_where(*names): return partial(where, names)


# ---- what may happen to them

def noted(folder, make):
    "Make a worker, and note the process in which it is"
    (folder/str(os.getpid())).touch()
    return make()


def deadly(item, worker, batch):
    "Do a batch, or die where it holds an item"
    if item in batch: os.kill(os.getpid(), signal.SIGKILL)
    return worker(batch)

def make_deadly(item, make): return partial(deadly, item, make())


def slowly(worker, seconds, batch):
    time.sleep(seconds)
    return worker(batch)

def make_slow(make, seconds=.05): return partial(slowly, make(), seconds)


def slow(kind, seconds):
    "Executors of a kind whose workers take that long for a batch"
    class Slow(kind):
        def map(self, make_worker, batches): return super().map(partial(make_slow, make_worker, seconds), batches)
    return Slow


def is_running(pid) -> bool: # neither gone nor a zombie
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    return False


def all_end(pids, seconds=20) -> bool: # whether they do, in this time
    end = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < end: time.sleep(.05)
    return not any(map(is_running, pids))


class Meddled:
    "An executor whose workers are noted in a folder; something happens when so many batches are done"
    def __init__(self, executor, folder, after, act):
        self.executor = executor
        self.folder = folder
        self.after = after
        self.act = act # of the process ids of the workers
        folder.mkdir()

    def map(self, make_worker, batches):
        found = self.executor.map(partial(noted, self.folder, make_worker), batches)
        for n_done, one in enumerate(found, 1):
            yield one
            if n_done == self.after: self.act(self.pids())

    def pids(self): return [int(file.name) for file in self.folder.iterdir()]


def kill_one(pids): os.kill(pids[0], signal.SIGKILL)
