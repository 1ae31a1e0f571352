"""Set before anything is imported: no progress bars, no hub, no windows."""
import os, subprocess, sys
from importlib.util import find_spec
from pathlib import Path

for name, value in dict(TQDM_DISABLE='1', HF_HUB_OFFLINE='1', HF_HUB_DISABLE_TELEMETRY='1', TOKENIZERS_PARALLELISM='false',
                        WANDB_MODE='disabled', MPLBACKEND='agg', NEURONPEDIA_API='http://127.0.0.1:9', NEURONPEDIA_STORE='http://127.0.0.1:9').items():
    os.environ.setdefault(name, value)
for name in ('OPENAI_API_KEY', 'OPENAI_BASE_URL'): os.environ.pop(name, None) # no test asks a server that is not its own


# ---- what the grids of comparisons measured, printed at the end of a session
import pytest

ERRORS, COUNTS = {}, {}


@pytest.fixture
def largest_error(): # (what, error) -> error; keeps the largest of each kind
    def keep(what, error):
        ERRORS[what] = max(ERRORS.get(what, 0.), error)
        return error
    return keep


@pytest.fixture
def counted(): # (what, n, of)
    def add(what, n, of): COUNTS[what] = tuple(a + b for a, b in zip(COUNTS.get(what, (0, 0)), (n, of)))
    return add


def pytest_terminal_summary(terminalreporter):
    if ERRORS: terminalreporter.section('largest errors, relative to max(1, the largest value)')
    for what, error in sorted(ERRORS.items()): terminalreporter.write_line(f'{error:8.1e}  {what}')
    for what, (n, of) in sorted(COUNTS.items()): terminalreporter.write_line(f'{n:,} of {of:,} {what}')


# ---- what `make test-fast` leaves out: whole runs, trainings, kills, real servers, builds

SLOW = {'test_cli', 'test_dictionaries', 'test_dpo', 'test_explorer_browser', 'test_fuzz', 'test_kills', 'test_leaks',
        'test_llama_server', 'test_models', 'test_odd_servers', 'test_paper_presets', 'test_remote', 'test_run',
        'test_sft', 'test_site', 'test_tools', 'test_wheel'}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in SLOW: item.add_marker(pytest.mark.slow)


# ---- a real server with a real model

@pytest.fixture(scope='session')
def llama_server(tmp_path_factory): # URL; see tools/llama_server.py
    if find_spec('xllamacpp') is None: pytest.skip('xllamacpp is not installed: pip install xllamacpp')
    tool, errors = Path(__file__).parents[1]/'tools'/'llama_server.py', tmp_path_factory.mktemp('llama')/'stderr'
    with errors.open('w') as stderr, subprocess.Popen([sys.executable, tool], stdout=subprocess.PIPE, stderr=stderr, text=True) as server:
        url = server.stdout.readline().strip()
        if not url: pytest.fail(f'{tool.name} did not start: {errors.read_text()}')
        yield url
        server.terminate()
