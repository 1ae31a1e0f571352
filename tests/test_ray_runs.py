"Whole runs on a real cluster of three nodes: the store of one process, whoever made its rows"
import pandas as pd
import pytest
from judged import WORDS, judged_preset
from tiny_lab import copy_of
from saeexplainer.benchmark import MEASURES, Bench, benchmark, contexts_sha256, keep_references, measure_built_in
from saeexplainer.cli import main
from saeexplainer.executor import PlainExecutor, RayExecutor
from saeexplainer.features import load_features
from saeexplainer.measuring import EVALUATION_FILES
from saeexplainer.presets import bench_folder, load_preset
from saeexplainer.run import Run, execute
from saeexplainer.saes import FeatureReader
from saeexplainer.sources.reading import build_features
from saeexplainer.store import KEYS

TABLES = ('explanations', 'texts', 'pairs', 'steering', 'steered_texts', 'judgements', 'metrics')
REWARDS = {'texts': dict(reward='max'), 'own words': dict(reward='self')}
SIZES = dict(n_candidates=4, n_texts=2, n_pref=3, baselines=['best', 'autointerp', 'untrained'],
             n_output=2, steering_kl=[.01], steering_tokens=4)
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
    found = {name: getattr(store, name)() for name in TABLES}
    return {name: table.sort_values(KEYS[name]).reset_index(drop=True) for name, table in found.items()}


def assert_same(one, other):
    for name, table in one.items(): pd.testing.assert_frame_equal(other[name], table, check_exact=True)


def stopping(kind, batches, *args, at=''):
    "An executor of a kind, after some batches of which the driver ends; at: the end of a worker's name"
    class Stopping(kind):
        left = batches

        def map(self, make_worker, batches):
            counts = name_of(make_worker).endswith(at)
            for found in super().map(make_worker, batches):
                if counts and not self.left: raise KeyboardInterrupt
                self.left -= counts
                yield found
    return Stopping(*args)


def name_of(make_worker): return f'{make_worker.func.__module__}.{make_worker.func.__name__}'


@pytest.mark.parametrize('reward', REWARDS)
def test_the_store_is_that_of_one_process(tmp_path, preset_file, reward):
    preset = load_preset(preset_file, **REWARDS[reward])
    here = finished(tmp_path/'here', preset, PlainExecutor())
    there = finished(tmp_path/'there', preset, RayExecutor(2))
    assert len(here['texts']) > 20 and here['texts']['score'].notna().any()
    assert all(len(here[name]) for name in TABLES)
    assert_same(here, there)


@pytest.mark.parametrize('batches', [3])
def test_begun_in_one_process_and_ended_on_a_cluster(tmp_path, preset_file, batches):
    "And the other way round"
    preset = load_preset(preset_file, **REWARDS['texts'])
    whole = finished(tmp_path/'whole', preset, PlainExecutor())
    here = stopping(PlainExecutor, batches)
    there = stopping(RayExecutor, batches, 2)
    for name, first, then in (('a', here, RayExecutor(2)), ('b', there, PlainExecutor())):
        with pytest.raises(KeyboardInterrupt): finished(tmp_path/name, preset, first)
        assert_same(whole, finished(tmp_path/name, preset, then))


@pytest.fixture(scope='module')
def trained(tmp_path_factory, ray_cluster):
    "Folder of a run that was interrupted as its evaluation began, and its preset"
    folder = tmp_path_factory.mktemp('trained')
    with pytest.MonkeyPatch.context() as patch:
        for name in ('DATA', 'CACHE'): patch.setenv(f'SAEEXPLAINER_{name}', str(folder/name.lower()))
        preset = load_preset(judged_preset(folder, **SIZES), batch_size=2)
        stopped = stopping(PlainExecutor, 0, at='run._explaining_here')
        with pytest.raises(KeyboardInterrupt): finished(folder/'run', preset, stopped)
        yield folder/'run', preset


@pytest.fixture(scope='module')
def evaluated(trained, tmp_path_factory):
    "Tables of the run, ended in one process"
    folder, preset = trained
    return finished(copy_of(folder, tmp_path_factory.mktemp('evaluated')/'run'), preset, PlainExecutor())


@pytest.mark.parametrize('worker', ['steering._searching', None])
def test_an_evaluation_begun_on_a_cluster_and_ended_in_one_process(tmp_path, trained, evaluated, worker):
    "And the other way round"
    folder = copy_of(trained[0], tmp_path/'run')
    first, then = stopping(RayExecutor, 1, 2, at=worker or ''), PlainExecutor()
    if worker is None: first, then = stopping(PlainExecutor, 1, at='steering._writing'), RayExecutor(2)
    with pytest.raises(KeyboardInterrupt): finished(folder, trained[1], first)
    assert_same(evaluated, finished(folder, trained[1], then))


def test_the_features_of_a_corpus_are_those_of_one_process(tmp_path, preset_file):
    "File for file; documents come back in another order than they were given out"
    preset = load_preset(preset_file, batch_size=1, batch_tokens=60)
    here, there = tmp_path/'here'/'features.parquet', tmp_path/'there'/'features.parquet'
    build_features(preset, progress=False, out=here)
    with RayExecutor(2) as executor: build_features(preset, progress=False, out=there, executor=executor)
    assert len(pd.read_parquet(here)) == 20
    assert there.read_bytes() == here.read_bytes()
    assert there.with_suffix('.json').read_bytes() == here.with_suffix('.json').read_bytes()


# ---- the commands that measure

def files_of(folder): return {file: (folder/file).read_text() for file in EVALUATION_FILES}

def test_the_tables_of_an_evaluation_are_those_of_one_process(tmp_path, preset_file, capsys):
    explained = pd.DataFrame({'feature': range(6), 'explanation': [f"the word '{word}'" for word in WORDS[:6]]})
    explained.to_csv(tmp_path/'mine.csv', index=False)
    arguments = ['evaluate', str(tmp_path/'mine.csv'), '--preset', str(preset_file), '-s', 'batch_size=2']
    main([*arguments, '--root', str(tmp_path/'here')])
    main([*arguments, '--root', str(tmp_path/'there'), '--ray', '--workers', '2'])
    here = files_of(tmp_path/'here'/'mine')
    assert here == files_of(tmp_path/'there'/'mine')
    assert len(here['texts.csv'].splitlines()) > 6*4
    assert 'output' in here['explanations.csv']


@pytest.fixture
def bench(preset_file):
    "Frozen features of the preset, and labels of a strong reader"
    wanted = (2, 3, 5, 7)
    preset = load_preset(preset_file)
    features = {one.index: one for one in load_features(preset)}
    folder = bench_folder('tiny-bench')
    folder.mkdir(parents=True)
    labels = pd.DataFrame({'index': wanted, 'text': [f"the word '{WORDS[index]}'" for index in wanted]})
    labels.to_parquet(folder/'labels.parquet')
    return Bench('tiny-bench', str(preset_file), wanted, dict(n_generative=2, batch_size=8),
                 FeatureReader.load(preset).sha256, contexts_sha256(features[index] for index in wanted), 'by hand')


def test_the_values_of_a_bench_are_those_of_one_process(tmp_path, bench):
    "With references that were read before, and without"
    mine = {'mine': {index: WORDS[index] for index in bench.features}}
    whole = benchmark(bench, mine, tmp_path/'here', progress=False)
    with RayExecutor(2) as executor:
        there = benchmark(bench, mine, tmp_path/'there', progress=False, executor=executor)
        with Run(tmp_path/'keeps', bench.resolved(), progress=False) as run: keep_references(run, bench)
        known = benchmark(bench, mine, tmp_path/'known', progress=False, executor=executor)
    for found in (there, known): pd.testing.assert_frame_equal(found, whole, check_exact=True)
    assert set(whole['metric']) == set(MEASURES)
    assert whole.query("metric == 'detection'")['value'].notna().all()


def test_built_in_methods_measured_by_workers(tmp_path, bench):
    names = ['label', 'autointerp', 'untrained']
    whole = measure_built_in(bench, tmp_path/'here', progress=False, names=names)
    for file in ('metrics.parquet', 'explanations.parquet'): (bench_folder(bench.name)/file).unlink()
    with RayExecutor(2) as executor:
        found = measure_built_in(bench, tmp_path/'there', progress=False, names=names, executor=executor)
    pd.testing.assert_frame_equal(found, whole, check_exact=True)
    assert set(whole['stage']) == set(names)


def test_a_bench_without_files_has_nothing_for_workers(capsys):
    with pytest.raises(SystemExit): main(['benchmark', '--ray'])
    assert capsys.readouterr().err == 'saeexplainer: --ray measures: give a file, or --built-in\n'
