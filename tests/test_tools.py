"""The checks of `make test` can fail: a tiny nbdev project is made true, then spoilt in each way they are there for."""
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/'tools'))
from compare import cell_difference, figure_difference, text_difference

SETTINGS = '''[DEFAULT]
repo = tinylab
lib_name = tinylab
lib_path = tinylab
user = nobody
author = nobody
description = a tiny project
version = 0.0.1
min_python = 3.11
recursive = True
tst_flags = slow gpu api
allowed_cell_metadata_keys = tags
'''


# ---- a project

def notebook(cells, title='# lab\n\n> a page'):
    "A notebook of code cells, as sources or (source, tag)"
    code = []
    for i, cell in enumerate(cells):
        source, tag = cell if isinstance(cell, tuple) else (cell, None)
        metadata = {'tags': [tag]} if tag else {}
        code.append(dict(cell_type='code', execution_count=None, id=f'cell{i}', metadata=metadata, outputs=[],
                         source=source.splitlines(True)))
    head = dict(cell_type='markdown', id='title', metadata={}, source=title.splitlines(True))
    return dict(cells=[head, *code], metadata={}, nbformat=4, nbformat_minor=5)


NOTEBOOKS = {
    '00_core': notebook([
        '#| default_exp core',
        '#| export\ndef double(x): return 2*x',
        'double(1.25)',
        'print(f"{double(4.)} of {double(5)}")']),
    'parts/figure': notebook([
        'import matplotlib.pyplot as plt',
        'plt.figure(figsize=(4, 3)); plt.plot([0, 1, 4, 9], "o"); plt.show()']),
    'parts/live': notebook([
        ('import time\ntime.time()', 'live'),
        ('seen = "noise"\nassert seen\ntime.time_ns()', 'live'),
        '#| slow\nraise SystemError("a slow cell was run")',
        '#| eval: false\nraise SystemError("this cell was run")',
        'from pathlib import Path\n_ = Path("../made_here.txt").write_text("by a notebook")',
        'import os, tinylab\nassert Path(tinylab.__file__).parents[1] == Path("../..").resolve()\n'
        'assert os.environ["IN_TEST"]']),
    'index': notebook(
        ['#| hide\nsecret = 1', 'print("shown")', '#| echo: false\n1 + 1'],
        '# tinylab\n\n> a tiny project\n\n'
        'See [core](00_core.ipynb), [data](../data) and [elsewhere](https://example.org).')}


def read(path): return json.loads(path.read_text(encoding='utf-8'))


def write(path, nb):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def edit(path, change):
    "Write a notebook of which `change` has changed the cells, by their id"
    nb = read(path)
    change({cell['id']: cell for cell in nb['cells']})
    write(path, nb)


def tool(project, name, *args):
    "Run one of the project's tools; its exit code and what it said"
    unwanted = ('IN_TEST', 'PYTEST_CURRENT_TEST') # with the second, a kernel does not see what processes print
    env = {name: value for name, value in os.environ.items() if name not in unwanted}
    command = [sys.executable, f'tools/{name}.py', *args]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def check(project, *args): return tool(project, 'check_notebooks', *args)


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    "A project whose notebooks hold their outputs, and whose modules and README are exported"
    project = tmp_path_factory.mktemp('projects')/'tinylab'
    for name, nb in NOTEBOOKS.items(): write(project/f'nbs/{name}.ipynb', nb)
    shutil.copytree(ROOT/'tools', project/'tools', ignore=shutil.ignore_patterns('__pycache__'))
    (project/'settings.ini').write_text(SETTINGS)
    (project/'.gitignore').write_text('__pycache__/\nignored.txt\n')
    subprocess.run(['git', 'init', '-q'], cwd=project, check=True)
    export = Path(sys.executable).with_name('nbdev_export')
    subprocess.run([export], cwd=project, check=True, env={**os.environ, 'IN_TEST': ''})
    for name, *args in (['check_notebooks', '--update'], ['readme']):
        code, said = tool(project, name, *args)
        assert code == 0, said
    return project


@pytest.fixture
def project(original, tmp_path):
    "A copy to be spoilt"
    return Path(shutil.copytree(original, tmp_path/'tinylab'))


def contents(project):
    "The bytes of each file"
    files = [file for file in project.rglob('*') if file.is_file() and not {'.git', '__pycache__'} & set(file.parts)]
    return {file: file.read_bytes() for file in files}


# ---- notebooks that are as they should be

def test_update_stores_outputs(original):
    cells = read(original/'nbs/00_core.ipynb')['cells']
    assert cells[3]['outputs'][0]['data']['text/plain'] == ['2.5']
    assert cells[4]['outputs'][0]['text'] == ['8.0 of 10\n']


def test_update_runs_what_is_not_marked(original):
    cells = read(original/'nbs/parts/live.ipynb')['cells']
    assert [len(cell.get('outputs', [])) for cell in cells] == [0, 1, 1, 0, 0, 0, 0]


def test_update_stores_clean_metadata(original):
    live = read(original/'nbs/parts/live.ipynb')
    assert live['metadata']['kernelspec']['name'] == 'python3'
    assert live['cells'][1]['metadata'] == {'tags': ['live']}


def test_a_true_project_passes_and_stays_as_it_is(project):
    (project/'nbs/made_here.txt').unlink() # was written by the update, which runs in place
    before = contents(project)
    code, said = check(project)
    assert code == 0, said
    assert said.count('ok  ') == 4, said
    assert '4 notebooks in' in said, said
    for kind in ('export', 'readme', 'clean'): assert tool(project, 'check_sync', kind) == (0, 'in step\n')
    assert contents(project) == before


def test_a_second_update_changes_nothing(project):
    before = contents(project)
    code, said = check(project, '--update', 'nbs/00_core.ipynb', 'nbs/parts/figure.ipynb')
    assert code == 0, said
    assert contents(project) == before


KERNEL_CELLS = [
    'from pathlib import Path\nfrom IPython import get_ipython',
    'type(get_ipython()).__name__, Path.cwd().name',
    'import asyncio, time\nawait asyncio.sleep(.01, "awaited")',
    'print("first")\ndisplay("second")\nprint("third")\ntime.sleep(1)\nprint("fourth")']


def test_cells_run_in_a_kernel_in_the_notebooks_folder(project):
    file = project/'nbs/parts/kernel.ipynb'
    write(file, notebook(KERNEL_CELLS))
    code, said = check(project, '--update', 'nbs/parts/kernel.ipynb')
    assert code == 0, said
    _, where, awaited, printed = (cell['outputs'] for cell in read(file)['cells'][1:])
    assert where[0]['data']['text/plain'] == ["('ZMQInteractiveShell', 'parts')"]
    assert awaited[0]['data']['text/plain'] == ["'awaited'"]
    pieces = [''.join(output.get('text') or output['data']['text/plain']) for output in printed]
    assert pieces == ['first\n', "'second'", 'third\nfourth\n']


# ---- notebooks that are not

def tamper_with_a_number(cells): cells['cell2']['outputs'][0]['data']['text/plain'] = ['2.51']


def picture_of(data): return np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert('RGB'))


def png_of(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, 'PNG')
    return base64.b64encode(buffer.getvalue()).decode()


def shift_a_dot(cells):
    data = cells['cell1']['outputs'][0]['data']
    figure = picture_of(data['image/png'])
    is_blue = (figure != figure[:1, :1]).all(-1) & (figure[..., 2] > 120)
    y, x = np.argwhere(is_blue)[0]
    figure[y-1:y+9, x-5:x+6] = 255
    data['image/png'] = png_of(figure)


def let_the_live_cell_fail(cells): cells['cell1']['source'] = ['assert "noise" == "signal", "the live cell says no"']


def test_tampered_outputs_are_caught(project):
    edit(project/'nbs/00_core.ipynb', tamper_with_a_number)
    edit(project/'nbs/parts/figure.ipynb', shift_a_dot)
    edit(project/'nbs/parts/live.ipynb', let_the_live_cell_fail)
    code, said = check(project)
    assert code == 1
    assert "cell cell2: '2.51' is now '2.5'" in said
    assert 'cell cell1: figure differs in' in said
    assert 'FAILED   nbs/parts/live.ipynb' in said
    assert 'the live cell says no' in said
    assert 'ok       nbs/index.ipynb' in said
    assert '3 not good' in said


def test_a_notebook_that_dies_or_needs_an_ignored_file_is_caught(project):
    (project/'nbs/ignored.txt').write_text('not in a fresh clone')
    write(project/'nbs/die.ipynb', notebook(['import os, signal; os.kill(os.getpid(), signal.SIGSEGV)']))
    write(project/'nbs/need.ipynb', notebook(['open("ignored.txt").read()']))
    code, said = check(project, 'nbs/die.ipynb', 'nbs/need.ipynb')
    assert code == 1
    assert 'died of SIGSEGV' in said
    assert 'FileNotFoundError' in said


def test_a_notebook_that_hangs_is_caught(project):
    write(project/'nbs/hang.ipynb', notebook(['import time; time.sleep(1000)']))
    start = time.time()
    code, said = check(project, 'nbs/hang.ipynb', '--timeout', '3')
    assert code == 1
    assert 'stopped after 3 seconds' in said
    assert time.time() - start < 60


def test_nothing_of_a_stopped_notebook_goes_on(project):
    source = 'import os, time\nopen("pid", "w").write(str(os.getpid()))\ntime.sleep(1000)'
    write(project/'nbs/hang.ipynb', notebook([source]))
    code, said = check(project, '--update', 'nbs/hang.ipynb', '--timeout', '20')
    assert code == 1
    assert 'stopped after 20 seconds' in said
    command = ['ps', '-o', 'stat=', '-p', (project/'nbs/pid').read_text()]
    state = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    assert state[:1] in ('', 'Z') # gone, or dead and not yet counted so by the system


NOISY_CELLS = ['import os, sys, warnings', 'print("from Python", file=sys.stderr)', 'warnings.warn("old name")',
               'os.system("echo from a process >&2")', '1 + 1']
NOISE = {'cell1': 'from Python', 'cell2': '.*UserWarning: old name', 'cell3': 'from a process'}


@pytest.mark.parametrize('options', [[], ['--update']], ids=['check', 'update'])
def test_a_cell_that_writes_to_stderr_is_caught(project, options):
    write(project/'nbs/noisy.ipynb', notebook(NOISY_CELLS))
    before = contents(project)
    code, said = check(project, 'nbs/noisy.ipynb', *options)
    assert code == 1, said
    assert 'FAILED   nbs/noisy.ipynb' in said, said
    for cell, words in NOISE.items(): assert re.search(f'cell {cell} writes to stderr: {words}', said), said
    assert 'cell4' not in said
    assert contents(project) == before


# ---- figures in a fresh kernel, as one of JupyterLab is

@pytest.fixture
def outputs_in_kernel(monkeypatch):
    "A function that runs cells and returns the outputs of each"
    def run(sources):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
        NotebookClient(nb, kernel_name='python3', timeout=300, startup_timeout=300).execute()
        return [cell.outputs for cell in nb.cells]
    monkeypatch.delenv('MPLBACKEND', raising=False)
    return run


def kinds_of(outputs): return [sorted(output.get('data', output)) for output in outputs]


FIGURE = [['image/png', 'text/plain']] # one output, in two kinds
FIGURE_CELLS = [
    'from saeexplainer.plots import Figure, style',
    'with style():\n    fig = Figure(figsize=(4, 3))\n    fig.subplots().plot([0, 1, 4, 9])\nfig',
    'import matplotlib.pyplot as plt',
    'plt.figure(figsize=(2, 1))\nplt.plot([1, 2])\nplt.show()',
    'fig',
    'from saeexplainer.ablations import stage_figure\nfrom saeexplainer.presets import data_dir\n'
    'from saeexplainer.report import Results',
    'results = Results(data_dir()/"smollm2-135m"/"results")\n'
    'stage_figure(results["metrics"], results.stages, results.chance)']


def test_a_figure_has_its_picture_before_pyplot_has_drawn(outputs_in_kernel):
    "And the picture is the one that pyplot's printer draws"
    outputs = outputs_in_kernel(FIGURE_CELLS)
    assert [kinds_of(one) for one in outputs] == [[], FIGURE, [], FIGURE, FIGURE, [], FIGURE]
    first, again = (outputs[cell][0].data for cell in (1, 4))
    assert first['text/plain'] == '<Figure size 400x300 with 1 Axes>'
    assert again['text/plain'] == '<Figure size 400x300 with 1 Axes>'
    assert figure_difference(first['image/png'], again['image/png']) is None


def test_a_kernel_goes_on_to_show_figures_after_a_first_one_in_style(outputs_in_kernel):
    outputs = outputs_in_kernel([
        'import matplotlib.pyplot as plt\nfrom saeexplainer.plots import style',
        'with style(): plt.plot([1, 2])\nNone',
        'plt.plot([2, 1])\nNone'])
    assert [kinds_of(one) for one in outputs[1:]] == [FIGURE, FIGURE]


# ---- what is generated

def replace_export(project, line):
    "Write another line into the exported cell, without an export"
    def change(cells): cells['cell1']['source'] = ['#| export\n', line]
    edit(project/'nbs/00_core.ipynb', change)


def test_a_module_out_of_sync_is_caught(project):
    replace_export(project, 'def double(x): return x + x')
    (project/'tinylab/gone.py').write_text('# the notebook of this module was deleted\n')
    code, said = tool(project, 'check_sync', 'export')
    assert code == 1
    assert 'tinylab/core.py: differs' in said
    assert '+def double(x): return x + x' in said
    assert 'tinylab/gone.py: left over' in said


def test_an_index_that_is_not_exported_is_caught(project):
    replace_export(project, 'def triple(x): return 3*x')
    (project/'tinylab/_modidx.py').unlink()
    code, said = tool(project, 'check_sync', 'export')
    assert code == 1
    assert 'tinylab/_modidx.py: missing' in said


def test_a_readme_is_the_page_without_what_is_hidden(original):
    readme = (original/'README.md').read_text()
    assert readme.startswith('# tinylab\n')
    assert 'secret' not in readme
    assert '1 + 1' not in readme
    assert '```python\nprint("shown")\n```\n\n    shown\n\n    2\n' in readme
    assert '[core](nbs/00_core.ipynb), [data](data) and [elsewhere](https://example.org)' in readme


def test_a_readme_that_was_edited_by_hand_is_caught(project):
    file = project/'README.md'
    file.write_text(file.read_text() + 'edited by hand\n')
    code, said = tool(project, 'check_sync', 'readme')
    assert code == 1
    assert '-edited by hand' in said


def test_an_unclean_notebook_is_caught(project):
    def change(cells): cells['cell1']['execution_count'] = 7
    edit(project/'nbs/00_core.ipynb', change)
    code, said = tool(project, 'check_sync', 'clean')
    assert code == 1
    assert 'nbs/00_core.ipynb: differs' in said
    assert 'make clean-nbs' in said


# ---- comparisons

@pytest.mark.parametrize('old, new, same', [
    ('loss 1.2345', 'loss 1.2349', True),
    ('loss 1.2345', 'loss 1.2445', False),
    ('loss 1.2', 'cost 1.2', False),
    ('1800 rows', '1801 rows', False),
    ('1e-9', '3e-9', True),
    ('1.0e-3', '1.1e-3', False),
    ('-0.00', '0.00', True),
    ('-0.5', '0.5', False),
    ('a  1.0', 'a 1.0', True),
    ('nan', '1.0', False),
    ('one\ntwo', 'one', False),
    ('2.13.0', '2.13.1', False),
])
def test_numbers_by_tolerance_text_exactly(old, new, same): assert (text_difference(old, new) is None) == same


def line_figure(width=300, length=100, grey=0):
    "A picture of a line, as a notebook holds it"
    picture = np.full((200, width, 3), 255, np.uint8)
    picture[150 - length:150, 100:102] = grey
    return png_of(picture)


def test_a_figure_may_be_a_little_fainter():
    assert figure_difference(line_figure(), line_figure(grey=40)) is None


def test_a_line_that_is_shorter_is_another_figure():
    assert 'differs in' in figure_difference(line_figure(), line_figure(length=95))


def test_a_figure_of_another_size_is_another_figure():
    assert '301 x 200' in figure_difference(line_figure(), line_figure(width=301))


def cell(*outputs, tags=()): return dict(cell_type='code', metadata={'tags': list(tags)}, outputs=list(outputs))


def live(*outputs): return cell(*outputs, tags=['live'])


SAID = dict(output_type='stream', text=['a'])
OTHER = dict(output_type='stream', text=['b'])
SHOWN = dict(output_type='execute_result', data={'text/plain': ['a']})
DRAWN = dict(output_type='execute_result', data={'text/plain': ['a'], 'image/png': ''})


@pytest.mark.parametrize('old, new, difference', [
    (cell(SAID), cell(SAID), None),
    (cell(SAID), cell(), '1 outputs are now 0'),
    (cell(SAID), cell(SHOWN), 'stream is now execute_result'),
    (cell(SAID), cell(OTHER), "'a' is now 'b'"),
    (live(SAID), live(OTHER), None),
    (live(SAID), live(), '1 outputs are now 0'),
    (live(SHOWN), live(DRAWN), "['text/plain'] is now ['image/png', 'text/plain']"),
])
def test_kinds_and_numbers_of_outputs(old, new, difference): assert cell_difference(old, new) == difference
