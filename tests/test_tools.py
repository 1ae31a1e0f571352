"""The checks of `make test` can fail: a tiny nbdev project is made true, then spoilt in each way they are there for."""
import base64, io, json, os, re, shutil, subprocess, sys, time
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
CORE = ['#| default_exp core', '#| export\ndef double(x): return 2*x', 'double(1.25)', 'print(f"{double(4.)} of {double(5)}")']
FIGURE = ['import matplotlib.pyplot as plt', 'plt.figure(figsize=(4, 3)); plt.plot([0, 1, 4, 9], "o"); plt.show()']
LIVE = [('import time\ntime.time()', 'live'), ('seen = "noise"\nassert seen\ntime.time_ns()', 'live'),
        '#| slow\nraise SystemError("a slow cell was run")', '#| eval: false\nraise SystemError("this cell was run")',
        'from pathlib import Path\n_ = Path("../made_here.txt").write_text("by a notebook")',
        'import os, tinylab\nassert Path(tinylab.__file__).parents[1] == Path("../..").resolve() and os.environ["IN_TEST"]']

def notebook(cells, title='# lab\n\n> a page'):
    "A notebook of code cells, as sources or (source, tag)"
    cells = [o if isinstance(o, tuple) else (o, None) for o in cells]
    code = [dict(cell_type='code', execution_count=None, id=f'cell{i}', metadata={'tags': [tag]} if tag else {}, outputs=[],
                 source=source.splitlines(True)) for i, (source, tag) in enumerate(cells)]
    head = dict(cell_type='markdown', id='title', metadata={}, source=title.splitlines(True))
    return dict(cells=[head, *code], metadata={}, nbformat=4, nbformat_minor=5)

def write(path, nb):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')

def tool(project, name, *args):
    "Run one of the project's tools; exit code and what it said"
    env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PYTEST_CURRENT_TEST')} # with the second, a kernel does not see what processes print
    done = subprocess.run([sys.executable, f'tools/{name}.py', *args], cwd=project, env=env, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr

def edit(path, change):
    nb = json.loads(path.read_text(encoding='utf-8'))
    change({o['id']: o for o in nb['cells']})
    write(path, nb)

@pytest.fixture(scope='module')
def original(tmp_path_factory):
    "A project whose notebooks hold their outputs, and whose modules and README are exported"
    project = tmp_path_factory.mktemp('projects')/'tinylab'
    for name, cells in {'00_core': CORE, 'parts/figure': FIGURE, 'parts/live': LIVE}.items():
        write(project/f'nbs/{name}.ipynb', notebook(cells))
    index = notebook(['#| hide\nsecret = 1', 'print("shown")', '#| echo: false\n1 + 1'],
                     '# tinylab\n\n> a tiny project\n\nSee [core](00_core.ipynb), [data](../data) and [elsewhere](https://example.org).')
    write(project/'nbs/index.ipynb', index)
    shutil.copytree(ROOT/'tools', project/'tools', ignore=shutil.ignore_patterns('__pycache__'))
    (project/'settings.ini').write_text(SETTINGS)
    (project/'.gitignore').write_text('__pycache__/\nignored.txt\n')
    subprocess.run(['git', 'init', '-q'], cwd=project, check=True)
    subprocess.run([Path(sys.executable).with_name('nbdev_export')], cwd=project, check=True, env={**os.environ, 'IN_TEST': ''})
    for name, *args in (['check_notebooks', '--update'], ['readme']):
        code, said = tool(project, name, *args)
        assert code == 0, said
    return project

@pytest.fixture
def project(original, tmp_path):
    "A copy to be spoilt"
    return Path(shutil.copytree(original, tmp_path/'tinylab'))

def contents(project):
    return {o: o.read_bytes() for o in project.rglob('*') if o.is_file() and not {'.git', '__pycache__'} & set(o.parts)}

def test_update_stores_outputs_and_clean_metadata(original):
    cells = json.loads((original/'nbs/00_core.ipynb').read_text())['cells']
    assert cells[3]['outputs'][0]['data']['text/plain'] == ['2.5'] and cells[4]['outputs'][0]['text'] == ['8.0 of 10\n']
    live = json.loads((original/'nbs/parts/live.ipynb').read_text())
    assert live['metadata']['kernelspec']['name'] == 'python3' and live['cells'][1]['metadata'] == {'tags': ['live']}
    assert [len(o.get('outputs', [])) for o in live['cells']] == [0, 1, 1, 0, 0, 0, 0]

def test_a_true_project_passes_and_stays_as_it_is(project):
    (project/'nbs/made_here.txt').unlink() # was written by the update, which runs in place
    before = contents(project)
    code, said = tool(project, 'check_notebooks')
    assert code == 0 and said.count('ok  ') == 4 and '4 notebooks in' in said, said
    for check in ('export', 'readme', 'clean'): assert tool(project, 'check_sync', check) == (0, 'in step\n')
    assert contents(project) == before

def test_a_second_update_changes_nothing(project):
    before = contents(project)
    assert tool(project, 'check_notebooks', '--update', 'nbs/00_core.ipynb', 'nbs/parts/figure.ipynb')[0] == 0
    assert contents(project) == before

def test_tampered_outputs_are_caught(project):
    edit(project/'nbs/00_core.ipynb', lambda o: o['cell2']['outputs'][0]['data'].update({'text/plain': ['2.51']}))
    def shift_a_dot(cells):
        data = cells['cell1']['outputs'][0]['data']
        figure = np.array(Image.open(io.BytesIO(base64.b64decode(data['image/png']))).convert('RGB'))
        dot = np.argwhere((figure != figure[:1, :1]).all(-1) & (figure[..., 2] > 120))[0]
        figure[dot[0]-1:dot[0]+9, dot[1]-5:dot[1]+6] = 255
        buffer = io.BytesIO()
        Image.fromarray(figure).save(buffer, 'PNG')
        data['image/png'] = base64.b64encode(buffer.getvalue()).decode()
    edit(project/'nbs/parts/figure.ipynb', shift_a_dot)
    edit(project/'nbs/parts/live.ipynb', lambda o: o['cell1'].update(source=['assert "noise" == "signal", "the live cell says no"']))
    code, said = tool(project, 'check_notebooks')
    assert code == 1
    assert "cell cell2: '2.51' is now '2.5'" in said
    assert 'cell cell1: figure differs in' in said
    assert 'FAILED   nbs/parts/live.ipynb' in said and 'the live cell says no' in said
    assert 'ok       nbs/index.ipynb' in said and '3 not good' in said

def test_a_notebook_that_hangs_dies_or_needs_an_ignored_file_is_caught(project):
    (project/'nbs/ignored.txt').write_text('not in a fresh clone')
    for name, source in {'hang': 'import time; time.sleep(1000)', 'die': 'import os, signal; os.kill(os.getpid(), signal.SIGSEGV)',
                         'need': 'open("ignored.txt").read()'}.items():
        write(project/f'nbs/{name}.ipynb', notebook([source]))
    code, said = tool(project, 'check_notebooks', 'nbs/die.ipynb', 'nbs/need.ipynb')
    assert code == 1 and 'died of SIGSEGV' in said and 'FileNotFoundError' in said
    start = time.time()
    code, said = tool(project, 'check_notebooks', 'nbs/hang.ipynb', '--timeout', '3')
    assert code == 1 and time.time() - start < 60 and 'stopped after 3 seconds' in said

def test_nothing_of_a_stopped_notebook_goes_on(project):
    write(project/'nbs/hang.ipynb', notebook(['import os, time\nopen("pid", "w").write(str(os.getpid()))\ntime.sleep(1000)']))
    code, said = tool(project, 'check_notebooks', '--update', 'nbs/hang.ipynb', '--timeout', '20')
    assert code == 1 and 'stopped after 20 seconds' in said
    state = subprocess.run(['ps', '-o', 'stat=', '-p', (project/'nbs/pid').read_text()], capture_output=True, text=True).stdout.strip()
    assert state[:1] in ('', 'Z') # gone, or dead and not yet counted so by the system

def test_a_cell_that_writes_to_stderr_is_caught(project):
    cells = ['import os, sys, warnings', 'print("from Python", file=sys.stderr)', 'warnings.warn("old name")', 'os.system("echo from a process >&2")', '1 + 1']
    write(project/'nbs/noisy.ipynb', notebook(cells))
    before = contents(project)
    for options in ([], ['--update']):
        code, said = tool(project, 'check_notebooks', 'nbs/noisy.ipynb', *options)
        assert code == 1 and 'FAILED   nbs/noisy.ipynb' in said, said
        for cell, words in dict(cell1='from Python', cell2='.*UserWarning: old name', cell3='from a process').items():
            assert re.search(f'cell {cell} writes to stderr: {words}', said), said
        assert 'cell4' not in said
    assert contents(project) == before

def test_cells_run_in_a_kernel_in_the_notebooks_folder(project):
    cells = ['from pathlib import Path\nfrom IPython import get_ipython', 'type(get_ipython()).__name__, Path.cwd().name',
             'import asyncio, time\nawait asyncio.sleep(.01, "awaited")', 'print("first")\ndisplay("second")\nprint("third")\ntime.sleep(1)\nprint("fourth")']
    write(project/'nbs/parts/kernel.ipynb', notebook(cells))
    code, said = tool(project, 'check_notebooks', '--update', 'nbs/parts/kernel.ipynb')
    assert code == 0, said
    outputs = [o['outputs'] for o in json.loads((project/'nbs/parts/kernel.ipynb').read_text())['cells'][1:]]
    assert outputs[1][0]['data']['text/plain'] == ["('ZMQInteractiveShell', 'parts')"] and outputs[2][0]['data']['text/plain'] == ["'awaited'"]
    assert [''.join(o.get('text') or o['data']['text/plain']) for o in outputs[3]] == ['first\n', "'second'", 'third\nfourth\n']

FIGURES = ['from saeexplainer.plots import Figure, style',
           'with style():\n    fig = Figure(figsize=(4, 3))\n    fig.subplots().plot([0, 1, 4, 9])\nfig', 'import matplotlib.pyplot as plt',
           'plt.figure(figsize=(2, 1))\nplt.plot([1, 2])\nplt.show()', 'fig',
           'from saeexplainer.ablations import stage_figure\nfrom saeexplainer.presets import data_dir\nfrom saeexplainer.report import Results',
           'results = Results(data_dir()/"smollm2-135m"/"results")\nstage_figure(results["metrics"], results.stages, results.chance)']

def test_a_figure_has_its_picture_before_pyplot_has_drawn(monkeypatch):
    "In a fresh kernel, as one of JupyterLab is; and the picture is the one that pyplot's printer draws"
    monkeypatch.delenv('MPLBACKEND', raising=False)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(o) for o in FIGURES])
    NotebookClient(nb, kernel_name='python3', timeout=300, startup_timeout=300).execute()
    kinds = [[sorted(o.get('data', o)) for o in cell.outputs] for cell in nb.cells]
    figure = [['image/png', 'text/plain']]
    assert kinds == [[], figure, [], figure, figure, [], figure]
    first, again = (nb.cells[i].outputs[0].data for i in (1, 4))
    assert first['text/plain'] == again['text/plain'] == '<Figure size 400x300 with 1 Axes>'
    assert figure_difference(first['image/png'], again['image/png']) is None

def test_a_kernel_goes_on_to_show_figures_after_a_first_one_in_style(monkeypatch):
    monkeypatch.delenv('MPLBACKEND', raising=False)
    cells = ['import matplotlib.pyplot as plt\nfrom saeexplainer.plots import style', 'with style(): plt.plot([1, 2])\nNone', 'plt.plot([2, 1])\nNone']
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(o) for o in cells])
    NotebookClient(nb, kernel_name='python3', timeout=300, startup_timeout=300).execute()
    assert [[sorted(o.data) for o in cell.outputs] for cell in nb.cells[1:]] == [[['image/png', 'text/plain']]]*2

def test_a_module_out_of_sync_is_caught(project):
    edit(project/'nbs/00_core.ipynb', lambda o: o['cell1'].update(source=['#| export\n', 'def double(x): return x + x']))
    (project/'tinylab/gone.py').write_text('# the notebook of this module was deleted\n')
    code, said = tool(project, 'check_sync', 'export')
    assert code == 1 and 'tinylab/core.py: differs' in said and '+def double(x): return x + x' in said and 'tinylab/gone.py: left over' in said

def test_an_index_that_is_not_exported_is_caught(project):
    edit(project/'nbs/00_core.ipynb', lambda o: o['cell1'].update(source=['#| export\n', 'def triple(x): return 3*x']))
    (project/'tinylab/_modidx.py').unlink()
    code, said = tool(project, 'check_sync', 'export')
    assert code == 1 and 'tinylab/_modidx.py: missing' in said

def test_readme(project):
    readme = (project/'README.md').read_text()
    assert readme.startswith('# tinylab\n') and 'secret' not in readme and '1 + 1' not in readme
    assert '```python\nprint("shown")\n```\n\n    shown\n\n    2\n' in readme
    assert '[core](nbs/00_core.ipynb), [data](data) and [elsewhere](https://example.org)' in readme
    (project/'README.md').write_text(readme + 'edited by hand\n')
    code, said = tool(project, 'check_sync', 'readme')
    assert code == 1 and '-edited by hand' in said

def test_an_unclean_notebook_is_caught(project):
    edit(project/'nbs/00_core.ipynb', lambda o: o['cell1'].update(execution_count=7))
    code, said = tool(project, 'check_sync', 'clean')
    assert code == 1 and 'nbs/00_core.ipynb: differs' in said and 'make clean-nbs' in said

@pytest.mark.parametrize('old, new, same', [
    ('loss 1.2345', 'loss 1.2349', True), ('loss 1.2345', 'loss 1.2445', False), ('loss 1.2', 'cost 1.2', False),
    ('1800 rows', '1801 rows', False), ('1e-9', '3e-9', True), ('1.0e-3', '1.1e-3', False), ('-0.00', '0.00', True), ('-0.5', '0.5', False),
    ('a  1.0', 'a 1.0', True), ('nan', '1.0', False), ('one\ntwo', 'one', False), ('2.13.0', '2.13.1', False)])
def test_numbers_by_tolerance_text_exactly(old, new, same): assert (text_difference(old, new) is None) == same

def test_figures_by_pixels():
    def png(change=None, size=(300, 200)):
        figure = np.full((size[1], size[0], 3), 255, np.uint8)
        figure[50:150, 100:102] = 0
        if change: change(figure)
        buffer = io.BytesIO()
        Image.fromarray(figure).save(buffer, 'PNG')
        return base64.b64encode(buffer.getvalue()).decode()
    def fainter(figure): figure[50:150, 100:102] = 40
    def shorter(figure): figure[50:55, 100:102] = 255
    assert figure_difference(png(), png(fainter)) is None
    assert 'differs in' in figure_difference(png(), png(shorter))
    assert '301 x 200' in figure_difference(png(), png(size=(301, 200)))

def test_kinds_and_numbers_of_outputs():
    def cell(*outputs, tags=()): return dict(cell_type='code', metadata={'tags': list(tags)}, outputs=list(outputs))
    said, shown = dict(output_type='stream', text=['a']), dict(output_type='execute_result', data={'text/plain': ['a']})
    assert cell_difference(cell(said), cell(said)) is None
    assert cell_difference(cell(said), cell()) == '1 outputs are now 0'
    assert cell_difference(cell(said), cell(shown)) == 'stream is now execute_result'
    other = dict(output_type='stream', text=['b'])
    assert cell_difference(cell(said), cell(other)) == "'a' is now 'b'" and cell_difference(cell(said, tags=['live']), cell(other, tags=['live'])) is None
    assert cell_difference(cell(said, tags=['live']), cell(tags=['live'])) == '1 outputs are now 0'
    figure = dict(output_type='execute_result', data={'text/plain': ['a'], 'image/png': ''})
    assert cell_difference(cell(shown, tags=['live']), cell(figure, tags=['live'])) == "['text/plain'] is now ['image/png', 'text/plain']"
