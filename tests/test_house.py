"How the code is laid out: imports go down only, what is public is described, a page runs what it exports"
import dataclasses, importlib, inspect, json, sys
from pathlib import Path
import pytest
from fastcore.docments import docments

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import measure

MODULES = sorted(measure.import_graph())
PAGES = [path for path in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in path.parts]
NOTEBOOKS = sorted(path.relative_to(ROOT/'nbs').as_posix() for path in PAGES)
MOST_NODES = 12 # a line
MOST_LINES = 50 # exported in a row without a cell that runs something
LONG = { # what is one class, in one cell
    '00_injection.ipynb': 59, # `Injector`: its hooks, and what they share
    'parts/executor.ipynb': 54, # `RayExecutor`
    'parts/explainer.ipynb': 55, # `ExplainerCard`: a field a line
    'parts/lab.ipynb': 59, # `Lab`: what can be asked of a feature
    'parts/presets.ipynb': 264, # the fields of a run, each with its help
    'parts/saes.ipynb': 64, # `FeatureReader`: what the rest of the project asks of a dictionary
    'parts/target.ipynb': 54, # the doors of `Target`
}
NO_EXAMPLE = { # notebook -> what takes too long for its page
    'parts/run.ipynb': ['sft_stage'], # it trains: the page runs a whole run further down
    'parts/benchmark.ipynb': ['measure_built_in'], # hours
    'parts/bridge_study.ipynb': ['greedy_texts', 'measure_study', 'measure_texts', 'measure_arms'], # hours
    'parts/layers_study.ipynb': ['measure_layers'], # an hour: tests/test_bridge.py has a small one
    'parts/joint.ipynb': ['train_joint'], # minutes: it trains
}


def test_imports_go_down_only():
    assert measure.cycle(measure.import_graph()) is None


@pytest.mark.parametrize('module', MODULES)
def test_no_module_is_dense(module):
    "As many AST nodes a line as the densest of the libraries that read well"
    file = ROOT/'saeexplainer'/Path(*module.split('.')).with_suffix('.py')
    if not file.exists(): file = file.with_suffix('')/'__init__.py'
    counts = measure.measure(file.read_text(encoding='utf-8'))
    assert counts['nodes']/max(1, counts['lines']) < MOST_NODES
    assert counts['lambdas'] == 0


def test_a_cycle_is_found():
    assert measure.cycle({'a': ['b'], 'b': ['c'], 'c': ['a'], 'd': []}) == ['a', 'b', 'c', 'a']


def is_defined_in(thing, module):
    if getattr(thing, '__module__', None) != module.__name__: return False
    return inspect.isfunction(thing) or inspect.isclass(thing)


def public(module):
    "Functions and classes that a module defines and exports"
    found = importlib.import_module(f'saeexplainer.{module}')
    things = [(name, getattr(found, name)) for name in getattr(found, '__all__', ())]
    return [(name, thing) for name, thing in things if is_defined_in(thing, found)]


def overrides(kind, name): # a method that another library defines, and describes
    bases = kind.__mro__[1:-1]
    return any(name in vars(base) and not base.__module__.startswith('saeexplainer') for base in bases)


def methods(kind):
    "Public methods of a class, and its `__init__` where it is written"
    for name, member in vars(kind).items():
        method = getattr(member, '__func__', member)
        if not inspect.isfunction(method): continue
        if method.__module__ != kind.__module__ or overrides(kind, name): continue
        is_written = name == '__init__' and not dataclasses.is_dataclass(kind)
        if is_written or not name.startswith('_'): yield name, method


def functions(module):
    "Public functions and methods of a module: (name, function)"
    for name, thing in public(module):
        if inspect.isfunction(thing): yield name, thing
        else: yield from ((f'{name}.{method}', function) for method, function in methods(thing))


def is_named(parameter): # neither `self` nor `*args`
    if parameter.name in ('self', 'cls'): return False
    return parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)


def undescribed(name, function):
    "Parameters without type or comment, and a return without a type"
    described = docments(function, full=True)
    signature = inspect.signature(function)
    lost = []
    for parameter in filter(is_named, signature.parameters.values()):
        has_comment = described.get(parameter.name, {}).get('docment')
        if parameter.annotation is parameter.empty and not has_comment: lost.append(f'{name}({parameter.name})')
    source = inspect.getsource(function)
    gives = 'return ' in source or 'yield' in source
    if gives and not name.endswith('__init__') and signature.return_annotation is inspect.Signature.empty:
        lost.append(f'{name} -> ?')
    return lost


@pytest.mark.parametrize('module', MODULES)
def test_every_parameter_and_return_is_described(module):
    assert [line for name, function in functions(module) for line in undescribed(name, function)] == []


@pytest.mark.parametrize('module', MODULES)
def test_every_public_name_says_what_it_is(module):
    assert [name for name, thing in public(module) if not inspect.getdoc(thing)] == []


def cells_of(notebook):
    return json.loads((ROOT/'nbs'/notebook).read_text(encoding='utf-8'))['cells']


@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_a_page_runs_what_it_exports(notebook):
    _, longest = measure.lesson(cells_of(notebook))
    assert longest <= LONG.get(notebook, MOST_LINES)


@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_an_example_follows_before_the_next_export_but_one(notebook):
    excused = NO_EXAMPLE.get(notebook, [])
    assert [name for name in measure.without_example(cells_of(notebook)) if name not in excused] == []


def code(*lines, outputs=()):
    return dict(cell_type='code', source=[f'{line}\n' for line in lines], outputs=list(outputs))


EXPORTS = [code('#| export', f'def {name}(): return 1') for name in ('first', 'second', 'third')]


def test_an_example_may_come_behind_the_next_export():
    cells = [*EXPORTS[:2], code('assert first() == second()'), EXPORTS[2], code('third()')]
    assert measure.without_example(cells) == []


def test_an_example_behind_the_next_export_but_one_is_too_late():
    cells = [*EXPORTS, code('assert first() == second() == third()')]
    assert measure.without_example(cells) == ['first']


def test_an_import_is_no_example():
    assert measure.without_example([EXPORTS[0], code('from package import first')]) == ['first']


def test_a_record_in_an_output_is_an_example():
    record = code('#| export', 'class Interval: pass')
    shown = dict(data={'text/plain': ['Interval(low=1, high=2)']})
    assert measure.without_example([record, code('bounds()', outputs=[shown])]) == []


def test_a_command_is_called_by_its_word():
    command = code('#| export', "@app.command('report')", 'def report_command(): pass')
    assert measure.without_example([command, code("run('report demo')")]) == []


def test_what_is_shipped_stays_quick_to_clone():
    assert sum(file.stat().st_size for file in (ROOT/'data').rglob('*') if file.is_file()) < 50e6
