"A run like another takes over what is the same, and makes what differs"
import pytest
from tiny_lab import finish, rows_of

from saeexplainer import dpo, sft
from saeexplainer.lm.models import weights_sha256
from saeexplainer.run import execute
from saeexplainer.target import Target
from saeexplainer.writers.local import Generator

MAKERS = [(sft, 'sft_trainer'), (dpo, 'dpo_trainer'), (Target, 'steering_values'), (Target, 'generate'),
          (Generator, '_continue')]


def never(*_, **__): raise AssertionError('made again')


@pytest.fixture(scope='module')
def twin(tiny_lab, finished_run, tmp_path_factory):
    "Folder of a run with the same preset, in which nothing may be trained or written, and what it said"
    folder = tmp_path_factory.mktemp('twin')/'twin'
    said = []
    with pytest.MonkeyPatch.context() as patch, tiny_lab.in_use():
        for owner, name in MAKERS: patch.setattr(owner, name, never)
        with tiny_lab.run(folder, like=finished_run) as run: execute(run, say=said.append)
    return folder, said


def test_nothing_is_made_again(twin):
    _, said = twin
    assert sum('taken over from whole' in line for line in said) == 3


def test_what_was_taken_over_is_noted(twin, lab):
    folder, _ = twin
    with lab.run(folder) as run:
        assert run.store.meta('like').startswith('whole: ')
        assert run.store.meta('like').endswith('its steered texts')
        assert run.store.accounts() == {}


@pytest.mark.parametrize('table', ['explanations', 'pairs', 'texts', 'metrics', 'steering', 'steered_texts'])
def test_its_rows_are_the_same(twin, finished_run, table):
    folder, _ = twin
    assert rows_of(folder/'store.sqlite')[table] == rows_of(finished_run/'store.sqlite')[table]


def adapter_hash(folder, stage): return weights_sha256(folder/'explainer'/stage, 'adapter_model.safetensors')


def test_what_differs_is_made(lab, finished_run, tmp_path):
    other = dict(dpo_lr=(1e-2, 1e-2), steering_tokens=3)
    with lab.run(tmp_path/'cousin', like=finished_run, **other) as run: finish(run)
    assert adapter_hash(tmp_path/'cousin', 'sft') == adapter_hash(finished_run, 'sft')
    assert adapter_hash(tmp_path/'cousin', 'dpo1') != adapter_hash(finished_run, 'dpo1')
    with lab.run(tmp_path/'cousin', **other) as run: assert 'steered' not in run.store.meta('like')


def test_a_run_that_is_not_there(lab, tmp_path):
    with lab.run(tmp_path/'lost', like=tmp_path/'nobody') as run:
        with pytest.raises(ValueError, match='there is no run .* to take anything over from'): finish(run)
    with lab.run(tmp_path/'lost', n_pref=3): pass # the name is still free
