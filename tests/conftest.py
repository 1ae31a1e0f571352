"""Set before anything is imported: no progress bars, no hub, no windows."""
import gc
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SETTINGS = dict(
    TQDM_DISABLE='1', HF_HUB_OFFLINE='1', HF_HUB_DISABLE_TELEMETRY='1', TOKENIZERS_PARALLELISM='false',
    WANDB_MODE='disabled', MPLBACKEND='agg',
    NEURONPEDIA_API='http://127.0.0.1:9', NEURONPEDIA_STORE='http://127.0.0.1:9')
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
if 'PYTEST_XDIST_WORKER' in os.environ: # workers share the cores: threads of each would wait for those of the others
    os.environ.setdefault('OMP_NUM_THREADS', '1')
for name in ('OPENAI_API_KEY', 'OPENAI_BASE_URL'):
    os.environ.pop(name, None) # no test asks a server that is not its own


# ---- what the grids of comparisons measured, printed at the end of a session

ERRORS: dict[str, float] = {}
COUNTS: dict[str, tuple[int, int]] = {}


@pytest.fixture
def largest_error():
    "(what, error) -> error; keeps the largest of each kind"
    def keep(what, error):
        ERRORS[what] = max(ERRORS.get(what, 0.), error)
        return error
    return keep


@pytest.fixture
def counted():
    "(what, n, of) adds up how many of how many"
    def add(what, n, of):
        n_before, of_before = COUNTS.get(what, (0, 0))
        COUNTS[what] = (n_before + n, of_before + of)
    return add


def pytest_terminal_summary(terminalreporter):
    if ERRORS: terminalreporter.section('largest errors, relative to max(1, the largest value)')
    for what, error in sorted(ERRORS.items()):
        terminalreporter.write_line(f'{error:8.1e}  {what}')
    for what, (n, of) in sorted(COUNTS.items()):
        terminalreporter.write_line(f'{n:,} of {of:,} {what}')


# ---- what `make test-fast` leaves out: whole runs, trainings, kills, real servers, builds

SLOW = {
    'test_cli', 'test_dictionaries', 'test_dpo', 'test_executor', 'test_explorer_browser', 'test_fuzz',
    'test_kills', 'test_leaks', 'test_llama_server', 'test_models', 'test_odd_servers', 'test_paper_presets',
    'test_ray', 'test_ray_runs', 'test_remote', 'test_run', 'test_run_begun', 'test_run_killed', 'test_run_like',
    'test_bridge', 'test_sft', 'test_site', 'test_studies', 'test_tools', 'test_training_workers', 'test_wheel'}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in SLOW: item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    "Whoever frees memory collects garbage, and would look at every object of every library each time"
    gc.collect()
    gc.freeze()


# ---- a tiny lab, and a run of it: made once

@pytest.fixture(scope='session')
def tiny_lab(tmp_path_factory):
    "Model, SAE, features and preset in a folder: to be read, not changed"
    from tiny_lab import make_lab # torch and the rest are imported where they are used
    return make_lab(tmp_path_factory.mktemp('lab'))


@pytest.fixture
def lab(tiny_lab):
    "The tiny lab; its data are those that are shipped while a test runs"
    with tiny_lab.in_use(): yield tiny_lab


@pytest.fixture(scope='session')
def finished_run(tiny_lab):
    "Folder of a run that nothing interrupted: to be read, not changed"
    from tiny_lab import finish
    with tiny_lab.in_use(), tiny_lab.run(tiny_lab.folder/'whole') as run:
        return finish(run).parent


@pytest.fixture(scope='session')
def explained_lab(tmp_path_factory):
    "A lab with an explainer, and features without a direction: to be read, not changed"
    from tiny_lab import make_explained_lab
    return make_explained_lab(tmp_path_factory.mktemp('explained'))


@pytest.fixture(scope='session')
def forks(tmp_path_factory):
    "A process that has imported all of the package, to run code in its forks"
    from forks import forks_in
    with forks_in(tmp_path_factory.mktemp('forks')) as forks: yield forks


# ---- a cluster of three nodes

@pytest.fixture(scope='session')
def ray_cluster():
    "Its nodes; see crews.py"
    if find_spec('ray') is None: pytest.skip("ray is not installed: pip install 'saeexplainer[ray]'")
    from crews import cluster
    with cluster() as nodes: yield nodes


# ---- a real server with a real model

@pytest.fixture(scope='session')
def llama_server(tmp_path_factory):
    "URL; see tools/llama_server.py"
    if find_spec('xllamacpp') is None: pytest.skip('xllamacpp is not installed: pip install xllamacpp')
    command = [sys.executable, Path(__file__).parents[1]/'tools'/'llama_server.py']
    errors = tmp_path_factory.mktemp('llama')/'stderr'
    with errors.open('w') as stderr, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True) as server:
        url = server.stdout.readline().strip()
        if not url: pytest.fail(f'llama_server.py did not start: {errors.read_text()}')
        yield url
        server.terminate()
