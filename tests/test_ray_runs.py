"Whole runs on a real cluster of three nodes: the store of one process, whoever made its rows"
import pandas as pd
import pytest
from judged import judged_preset
from saeexplainer.executor import PlainExecutor, RayExecutor
from saeexplainer.presets import load_preset
from saeexplainer.run import Run, execute
from saeexplainer.sources.reading import build_features

REWARDS = {'texts': dict(reward='max'), 'own words': dict(reward='self')}
SIZES = dict(n_candidates=4, n_texts=2, n_pref=3, baselines=['best'])
SHARED = dict( # trainings that two processes share to the bit: no dropout, and a whole batch for each
    lora_dropout=0., sft_batch=1, sft_accumulation=2, dpo_batch=1, dpo_accumulation=2)


@pytest.fixture
def preset_file(tmp_path, monkeypatch, ray_cluster):
    "A preset, beside a cluster"
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    return judged_preset(tmp_path, **SIZES | SHARED)


def finished(folder, preset, executor):
    "Tables of the store of a run"
    with executor, Run(folder, preset, progress=False, executor=executor) as run:
        execute(run, say=lambda line: None)
        return tables(run.store)


def tables(store):
    found = dict(explanations=store.explanations(), texts=store.texts(), pairs=store.pairs())
    return {name: table.sort_values(list(table.columns[:5])).reset_index(drop=True) for name, table in found.items()}


def assert_same(one, other):
    for name, table in one.items(): pd.testing.assert_frame_equal(other[name], table, check_exact=True)


def stopping(kind, batches, *args):
    "An executor of a kind, after some batches of which the driver ends"
    class Stopping(kind):
        left = batches

        def map(self, make_worker, batches):
            for found in super().map(make_worker, batches):
                if not self.left: raise KeyboardInterrupt
                self.left -= 1
                yield found
    return Stopping(*args)


@pytest.mark.parametrize('reward', REWARDS)
def test_the_store_is_that_of_one_process(tmp_path, preset_file, reward):
    preset = load_preset(preset_file, **REWARDS[reward])
    here = finished(tmp_path/'here', preset, PlainExecutor())
    there = finished(tmp_path/'there', preset, RayExecutor(2))
    assert len(here['texts']) > 20 and here['texts']['score'].notna().any()
    assert_same(here, there)


@pytest.mark.parametrize('batches', [1, 3])
def test_begun_in_one_process_and_ended_on_a_cluster(tmp_path, preset_file, batches):
    "And the other way round"
    preset = load_preset(preset_file, **REWARDS['texts'])
    whole = finished(tmp_path/'whole', preset, PlainExecutor())
    here = stopping(PlainExecutor, batches)
    there = stopping(RayExecutor, batches, 2)
    for name, first, then in (('a', here, RayExecutor(2)), ('b', there, PlainExecutor())):
        with pytest.raises(KeyboardInterrupt): finished(tmp_path/name, preset, first)
        assert_same(whole, finished(tmp_path/name, preset, then))


def test_the_features_of_a_corpus_are_those_of_one_process(tmp_path, preset_file):
    "File for file; documents come back in another order than they were given out"
    preset = load_preset(preset_file, batch_size=1, batch_tokens=60)
    here, there = tmp_path/'here'/'features.parquet', tmp_path/'there'/'features.parquet'
    build_features(preset, progress=False, out=here)
    with RayExecutor(2) as executor: build_features(preset, progress=False, out=there, executor=executor)
    assert len(pd.read_parquet(here)) == 20
    assert there.read_bytes() == here.read_bytes()
    assert there.with_suffix('.json').read_bytes() == here.with_suffix('.json').read_bytes()
