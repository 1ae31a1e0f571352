"Batches in this process and on a cluster: the same rows, the same errors"
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from crews import (
    make_nothing, make_odd, make_reader, make_refusing, make_small, make_squares, make_where, noted,
)

from judged import tiny_target

from saeexplainer.executor import PlainExecutor, RayExecutor, _connect, _first_done, _Seat
from saeexplainer.writers.local import LocalWriter

N_WORKERS = 2


@pytest.fixture(params=['plain', 'ray'])
def executor(request):
    if request.param == 'plain': return PlainExecutor()
    request.getfixturevalue('ray_cluster')
    return RayExecutor(N_WORKERS)


def rows_by_batch(found): return {tuple(batch): rows for batch, rows in found}


def test_each_batch_comes_with_its_rows(executor):
    found = rows_by_batch(executor.map(make_squares, [[1, 2], [3], [4, 5]]))
    assert found == {(1, 2): [1, 4], (3,): [9], (4, 5): [16, 25]}


def test_without_a_batch_no_worker_is_made(executor):
    assert list(executor.map(make_nothing, [])) == []


def test_an_error_of_the_worker_is_raised_as_it_is(executor):
    with pytest.raises(ValueError) as raised: list(executor.map(make_refusing, [[3], [4]]))
    assert type(raised.value) is ValueError
    assert str(raised.value) in ('3 is no number\nthat I know', '4 is no number\nthat I know')


def test_an_error_while_a_worker_is_made_is_raised_as_it_is(executor):
    with pytest.raises(FileNotFoundError) as raised: list(executor.map(make_nothing, [[3]]))
    assert str(raised.value) == 'no model here'


def test_a_batch_is_halved_where_memory_ran_out(executor, capsys):
    found = list(executor.map(partial(make_small, 2), [[1, 2, 3], [4]]))
    assert rows_by_batch(found) == {(1, 2, 3): [1, 4, 9], (4,): [16]}
    said = 'out of GPU memory: the batch of 3 from 1 on was done again, in halves\n'
    assert capsys.readouterr().err == said


def test_it_is_halved_once(executor):
    with pytest.raises(torch.OutOfMemoryError, match='no room'):
        list(executor.map(partial(make_small, 2), [[1, 2, 3, 4, 5]]))


@pytest.mark.parametrize('batch', [[1]*10, [8]])
def test_what_a_worker_reads_at_once_is_halved_too(executor, batch):
    "It reads eight rows at once, and there is room for four: half of the batch is still too much"
    [(_, rows)] = executor.map(partial(make_reader, 4), [batch])
    assert rows == [4]*len(batch)


TEXTS = ('The rain fell on the park', 'a cat', 'the sea shells', 'No fire', 'a large dog', 'rain', 'the nation',
         'one mat', 'a park', 'sea')

def read_texts(target, batch): return target.scores(batch, [3]*len(batch))

def continue_texts(target, batch):
    return target.generate(batch, feature=3, value=2., max_new_tokens=3, seeds=[len(text) for text in batch])

def judge_texts(target, batch):
    writer = LocalWriter(target.model, target.tokenizer, target.batch_size)
    return writer.log_probs(batch, [' rain']*len(batch)).tolist()

@pytest.mark.parametrize('work', [read_texts, continue_texts, judge_texts])
def test_models_take_half_as_much_at_once(tmp_path, capsys, work):
    "Eight rows at once are too many; so are the five of half of the batch"
    target = tiny_target(tmp_path)
    target = replace(target, batch_size=8)
    whole = work(target, TEXTS)
    def check(module, args):
        if len(args[0]) > 4: raise torch.OutOfMemoryError('no room')
    target.model.get_input_embeddings().register_forward_pre_hook(check)
    with pytest.raises(torch.OutOfMemoryError): work(target, TEXTS[:5])
    [(_, rows)] = PlainExecutor().map(partial(partial, work, target), [TEXTS])
    assert rows == whole or rows == pytest.approx(whole, rel=1e-5)
    assert 'was done again, in halves' in capsys.readouterr().err


def test_batches_are_taken_as_they_are_done(executor):
    taken = []
    def batches():
        for i in range(30):
            taken.append(i)
            yield [i]
    ahead = [len(taken) - n for n, _ in enumerate(executor.map(make_squares, batches()), 1)]
    most = 2*N_WORKERS if isinstance(executor, RayExecutor) else 0
    assert len(ahead) == 30
    assert max(ahead) <= most


def process(batch): return [os.getpid()]*len(batch)
def make_process(): return process


def test_a_process_is_used_again(ray_cluster):
    with RayExecutor() as executor:
        [(_, first)], [(_, second)] = (list(executor.map(make_process, [[1]])) for _ in range(2))
    assert first == second != [os.getpid()]


def test_it_works_once_more(executor):
    for _ in range(2): assert rows_by_batch(executor.map(make_squares, [[2]])) == {(2,): [4]}


# ---- on a cluster alone

class Waiting:
    "In place of ray: nothing is done at first"
    def __init__(self): self.found = [[]]*12 + [['reference']]

    def wait(self, references, timeout=None): return self.found.pop(0), []


@pytest.mark.parametrize('loading, said', [
    ('reference', 'still waiting for a worker: it loads, or the cluster has no room for one\n'),
    (None, '')])
def test_a_long_wait_for_a_worker_is_said(capsys, loading, said):
    seats = dict(reference=_Seat(None, loading, deaths=0))
    assert _first_done(Waiting(), seats, check_head=list) == 'reference'
    assert capsys.readouterr().err == said


def test_an_error_that_cannot_travel_says_the_same(ray_cluster):
    with pytest.raises(RuntimeError, match=r'^OddError: no reason \(7\)'): list(RayExecutor().map(make_odd, [[1]]))


def test_the_workers_traceback_is_a_note(ray_cluster):
    with pytest.raises(ValueError) as raised: list(RayExecutor().map(make_refusing, [[3]]))
    assert 'in refuse' in raised.value.__notes__[0]


def test_a_worker_has_the_folder_and_the_settings_of_the_driver_and_one_thread(ray_cluster, monkeypatch, tmp_path):
    monkeypatch.setenv('SAEEXPLAINER_DATA', 'here')
    monkeypatch.setenv('OPENAI_API_KEY', 'secret')
    monkeypatch.chdir(tmp_path)
    [(_, rows)] = RayExecutor().map(partial(make_where, 'SAEEXPLAINER_DATA', 'OPENAI_API_KEY'), [[1]])
    assert rows == [(str(tmp_path), 1, 'here', None)]


def test_no_more_workers_than_batches(ray_cluster, tmp_path):
    list(RayExecutor(4).map(partial(noted, tmp_path, make_squares), [[1]]))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('numbers, says', [
    (dict(workers=0), '0 workers do nothing: it is 1 or more'),
    (dict(gpus_per_worker=-1), '-1 GPUs per worker: it is 0 or more')])
def test_other_numbers_are_refused(numbers, says):
    with pytest.raises(ValueError, match=says): RayExecutor(**numbers)


def test_ray_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    says = r"^a cluster needs ray: pip install 'saeexplainer\[ray\]'$"
    with pytest.raises(ValueError, match=says): RayExecutor()


def test_a_cluster_that_does_not_answer(monkeypatch):
    monkeypatch.setenv('RAY_ADDRESS', '127.0.0.1:1')
    says = '^no Ray cluster answers at RAY_ADDRESS, which is 127.0.0.1:1 .*: `ray start --head` begins one$'
    with pytest.raises(ValueError, match=says): _connect(ray=None, n_workers=1)


def test_ray_is_not_imported_before_it_is_used():
    code = "import saeexplainer.dictionaries, sys; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0
