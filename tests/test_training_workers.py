"Trainings by two processes on a real cluster take the steps of one; one that is killed goes on"
import os
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_grpo import grpo_run, vowels
from trainings import CONTRARY, PAIRS, features, make_model, preset_in, tiny_preset, tiny_run
from transformers import TrainerCallback

from saeexplainer import crew, dpo, grpo, sft, training
from saeexplainer.crew import train_by
from saeexplainer.executor import PlainExecutor, RayExecutor
from saeexplainer.presets import Schedule
from saeexplainer.saes import FeatureReader
from saeexplainer.sharing import is_first, wait_for_all

pytest.importorskip('ray', reason="ray is not installed: pip install 'saeexplainer[ray]'")

TRAINED = features()[:11] # no multiple of a step
VALIDATED = features('print hello state kept time word list code open read'.split(), start=100) # of a batch of 8
STEPS = Schedule(1e-4, 1., batch=2, accumulation=2)


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "A folder with a model, an SAE and an explainer whose answers end"
    folder = tmp_path_factory.mktemp('workers')
    make_model(folder)
    labels = preset_in(folder, sft_lr=1e-2, sft_epochs=40., sft_batch=6)
    sft.train_sft(labels, features(), FeatureReader.load(labels), folder/'sft', progress=False)
    return folder


def train_sft(folder, out, executor, progress=False, **fields):
    preset = tiny_preset(folder, **dict(sft_epochs=3., sft_accumulation=2, lora_dropout=0.) | fields)
    reader = FeatureReader.load(preset)
    return sft.train_sft(preset, TRAINED, reader, out, VALIDATED, progress=progress, executor=executor)


def train_dpo(folder, out, executor, pairs=PAIRS, **fields):
    own = dict(dpo_epochs=2., dpo_batch=3, dpo_accumulation=2, dpo_sft_weight=.2)
    preset, _, previous = tiny_run(folder, **own | fields)
    reader = FeatureReader.load(preset)
    return dpo.train_dpo(preset, pairs, reader, previous, out, progress=False, executor=executor)


def train_grpo(folder, out, executor, reward=vowels, **fields):
    preset, _, previous = grpo_run(folder, **dict(grpo_lr=2e-4) | fields)
    reader = FeatureReader.load(preset)
    return grpo.train_grpo(preset, range(6), reader, previous, out, reward, progress=False, executor=executor)


def adapter(folder): return load_file(Path(folder)/'adapter_model.safetensors')


def largest_differences(log, other):
    "In each column of two logs; processes count an epoch's batches, so that its fractions are others"
    assert log['step'].tolist() == other['step'].tolist()
    assert (log.isna() == other.isna()).all(axis=None)
    numbers = log.drop(columns='epoch', errors='ignore').astype(float)
    return (numbers - other[numbers.columns].astype(float)).abs().max().to_dict()


def assert_same_training(one, other, most=1e-3):
    too_much = {name: off for name, off in largest_differences(one.log, other.log).items() if off > most}
    assert too_much == {}
    ours, theirs = adapter(one.folder), adapter(other.folder)
    for name in ours: torch.testing.assert_close(ours[name], theirs[name], atol=most, rtol=1e-2)


# ---- the same steps: all cases in one crew

CASES = {
    'sft': (train_sft, {}),
    'sft, a batch is cut': (train_sft, dict(sft_accumulation=1)),
    'dpo': (train_dpo, {}),
    'dpo, a batch is cut': (train_dpo, dict(dpo_batch=6, dpo_accumulation=1)),
    'dpo, the best is kept': (train_dpo, dict(dpo_keep='best', pairs=CONTRARY, dpo_batch=2)),
    'grpo': (train_grpo, {}),
    'grpo, dapo': (train_grpo, dict(grpo_loss='dapo', grpo_features=4)),
}

@contextmanager
def in_float32():
    "Where a batch is cut, other sums are rounded: in bfloat16 more than what is compared here"
    with pytest.MonkeyPatch.context() as patch:
        for module in (sft, dpo): patch.setattr(module, 'trainer_settings', float32_settings)
        yield

def float32_settings(*args): return training.trainer_settings(*args) | dict(bf16=False)


class CaughtError(Exception):
    "Carries the job of a training that was to begin"

def catch(executor, job, *_): raise CaughtError(job)

def job_of(folder, out, train, fields):
    "What the processes would do for a training"
    with pytest.MonkeyPatch.context() as patch:
        for module in (sft, dpo, grpo): patch.setattr(module, 'train_by', catch)
        with pytest.raises(CaughtError) as caught: train(folder, out, RayExecutor(2), **fields)
    return caught.value.args[0]


def do_all(jobs, checkpoint, reward):
    for name, job in jobs.items():
        more = [reward] if isinstance(job, grpo._Training) else []
        with in_float32() if 'cut' in name else nullcontext(): job(None, *more)


RESULTS = {train_sft: sft.SFTResult, train_dpo: dpo.DPOResult, train_grpo: grpo.GRPOResult}

@pytest.fixture(scope='module')
def together(here, ray_cluster, tmp_path_factory):
    "Results of all cases, by two processes"
    folder = tmp_path_factory.mktemp('together')
    jobs = {name: job_of(here, folder/name, *case) for name, case in CASES.items()}
    train_by(RayExecutor(2), partial(do_all, jobs), folder, STEPS, 'all', vowels)
    return {name: RESULTS[train].load(folder/name) for name, (train, _) in CASES.items()}


@pytest.mark.parametrize('name', CASES)
def test_two_processes_take_the_steps_of_one(here, together, tmp_path, name):
    train, fields = CASES[name]
    with in_float32() if 'cut' in name else nullcontext():
        alone = train(here, tmp_path/'alone', PlainExecutor(), **fields)
    assert_same_training(alone, together[name])
    assert not (together[name].folder/'checkpoints').exists()


def test_the_same_checkpoint_is_kept(together):
    kept = together['dpo, the best is kept']
    assert (kept.kept_step, kept.validation) == (1, 4)


# ---- a training from the outside

def test_a_reward_stays_with_the_driver(here, ray_cluster, tmp_path):
    asked = []
    def reward(indices, texts):
        asked.append(os.getpid())
        return vowels(indices, texts)
    together = train_grpo(here, tmp_path/'together', RayExecutor(2), reward, grpo_steps=2)
    alone = train_grpo(here, tmp_path/'alone', PlainExecutor(), grpo_steps=2)
    assert asked == [os.getpid()]*4 # two processes, two steps
    assert_same_training(alone, together)


LONG = dict(sft_epochs=10.)

@pytest.fixture(scope='module')
def whole(here, tmp_path_factory):
    return train_sft(here, tmp_path_factory.mktemp('whole')/'sft', PlainExecutor(), **LONG)


def die_behind_checkpoint(folder, step):
    while not list(folder.glob(f'checkpoint-{step}/files.json')): time.sleep(.001)
    os.kill(os.getpid(), signal.SIGKILL)

def deadly(job, places, checkpoint):
    "Train; the first time processes at these places die"
    marker = job.out.parent/f'begun {int(is_first())}'
    if is_first() in places and not marker.exists():
        marker.touch()
        threading.Thread(target=die_behind_checkpoint, args=(job.out/'checkpoints', 4), daemon=True).start()
    job(checkpoint)


@pytest.fixture
def dies(monkeypatch):
    "(True, False): both the first process and the other die"
    def choose(*places):
        def with_death(executor, job, *others): train_by(executor, partial(deadly, job, places), *others)
        monkeypatch.setattr(sft, 'train_by', with_death)
    return choose


def test_a_process_is_killed(here, ray_cluster, whole, dies, tmp_path, capsys):
    "The bar of the first one is seen here"
    dies(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TQDM_DISABLE', '0')
        together = train_sft(here, tmp_path/'sft', RayExecutor(2), progress=True, **LONG)
    assert_same_training(whole, together)
    said = capsys.readouterr()
    assert said.err.count('a worker died while sft was trained: all go on from the last checkpoint (1 of 3)\n') == 1
    assert '/20 [' in said.err # the bar
    assert said.out == ''


class StopError(Exception):
    "In place of a death"

class Stop(TrainerCallback):
    "Ends a training in its middle"
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 9: raise StopError


def noting(file, job, checkpoint):
    "Train, and note what was gone on from"
    if is_first(): file.write_text(Path(checkpoint).name)
    job(checkpoint)


def test_begun_alone_and_finished_by_two(here, ray_cluster, whole, tmp_path, monkeypatch):
    callbacks = sft.training_callbacks
    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(sft, 'training_callbacks', lambda *args: [*callbacks(*args), Stop()])
        train_sft(here, tmp_path/'sft', PlainExecutor(), **LONG)
    def noted(executor, job, *others): train_by(executor, partial(noting, tmp_path/'begun', job), *others)
    monkeypatch.setattr(sft, 'train_by', noted)
    together = train_sft(here, tmp_path/'sft', RayExecutor(2), **LONG)
    assert (tmp_path/'begun').read_text() == 'checkpoint-8'
    assert_same_training(whole, together)


def test_begun_by_two_and_finished_alone(here, ray_cluster, whole, dies, tmp_path, monkeypatch):
    monkeypatch.setattr(crew, '_MOST_DEATHS', 0)
    dies(True)
    says = '^workers died 1 times while sft was trained: is there memory for so many[?]$'
    with pytest.raises(RuntimeError, match=says): train_sft(here, tmp_path/'sft', RayExecutor(2), **LONG)
    begun = {file.name for file in (tmp_path/'sft'/'checkpoints').glob('checkpoint-*')}
    assert 'checkpoint-4' in begun
    assert_same_training(whole, train_sft(here, tmp_path/'sft', PlainExecutor(), **LONG))


# ---- errors

def refuse_in_one(checkpoint):
    if is_first(): wait_for_all()
    raise ValueError('this cannot be trained\non')


def test_an_error_of_one_process_is_raised_as_it_is(ray_cluster, tmp_path, capsys):
    "While the other waits for it; and the cluster has no room for a third"
    with pytest.raises(ValueError) as raised:
        train_by(RayExecutor(4), refuse_in_one, tmp_path, STEPS, 'sft')
    assert type(raised.value) is ValueError
    assert str(raised.value) == 'this cannot be trained\non'
    assert 'in refuse_in_one' in raised.value.__notes__[0]
    assert capsys.readouterr().err == 'sft is trained by 2 of 4 workers: the cluster has room for 2\n'


def test_a_folder_that_the_workers_do_not_see(ray_cluster, tmp_path):
    "It has a name in this process alone"
    number = os.open(tmp_path, os.O_RDONLY)
    here_alone = Path(f'/proc/self/fd/{number}')
    says = f'^not every worker sees {here_alone}: put it on a file system that the machines share$'
    with pytest.raises(ValueError, match=says): train_by(RayExecutor(1), print, here_alone, STEPS, 'sft')
    os.close(number)
