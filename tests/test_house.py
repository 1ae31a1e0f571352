"How the code is laid out: imports go down only, what is public is described, a page runs what it exports"
import dataclasses, importlib, inspect, json, sys
from pathlib import Path
import pytest
from fastcore.docments import docments

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import measure

MODULES = sorted(measure.import_graph())
NOTEBOOKS = sorted(path.relative_to(ROOT/'nbs').as_posix() for path in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in path.parts)
TO_DO = set() # modules that are not rebuilt yet
MOST_LINES = 50 # exported in a row without a cell that runs something
LONG = {'parts/presets.ipynb': 190} # one dataclass: the fields of a run, each with its help


def test_imports_go_down_only():
    assert measure.cycle(measure.import_graph()) is None


def test_a_cycle_is_found():
    assert measure.cycle({'a': ['b'], 'b': ['c'], 'c': ['a'], 'd': []}) == ['a', 'b', 'c', 'a']


def public(module):
    "Functions and classes that a module defines and exports"
    found = importlib.import_module(f'saeexplainer.{module}')
    things = [(name, getattr(found, name)) for name in getattr(found, '__all__', ())]
    return [(name, thing) for name, thing in things if getattr(thing, '__module__', None) == found.__name__ and (inspect.isfunction(thing) or inspect.isclass(thing))]


def overrides(kind, name): # a method that another library defines, and describes
    return any(name in vars(base) and not base.__module__.startswith('saeexplainer') for base in kind.__mro__[1:-1])


def methods(kind):
    "Public methods of a class, and its `__init__` where it is written"
    for name, member in vars(kind).items():
        method = getattr(member, '__func__', member)
        if not inspect.isfunction(method) or method.__module__ != kind.__module__ or overrides(kind, name): continue
        written = name == '__init__' and not dataclasses.is_dataclass(kind)
        if written or not name.startswith('_'): yield name, method


def functions(module):
    "Public functions and methods of a module: (name, function)"
    for name, thing in public(module):
        if inspect.isfunction(thing): yield name, thing
        else: yield from ((f'{name}.{method}', function) for method, function in methods(thing))


def undescribed(name, function):
    "Parameters without type or comment, and a return without a type"
    said = docments(function, full=True)
    signature = inspect.signature(function)
    named = [p for p in signature.parameters.values() if p.name not in ('self', 'cls') and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    lost = [f'{name}({p.name})' for p in named if p.annotation is p.empty and not said.get(p.name, {}).get('docment')]
    gives = 'return ' in inspect.getsource(function) or 'yield' in inspect.getsource(function)
    if gives and not name.endswith('__init__') and signature.return_annotation is inspect.Signature.empty:
        lost.append(f'{name} -> ?')
    return lost


@pytest.mark.parametrize('module', [m for m in MODULES if m not in TO_DO])
def test_every_parameter_and_return_is_described(module):
    assert [line for name, function in functions(module) for line in undescribed(name, function)] == []


@pytest.mark.parametrize('module', [m for m in MODULES if m not in TO_DO])
def test_every_public_name_says_what_it_is(module):
    assert [name for name, thing in public(module) if not inspect.getdoc(thing)] == []


@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_a_page_runs_what_it_exports(notebook):
    cells = json.loads((ROOT/'nbs'/notebook).read_text(encoding='utf-8'))['cells']
    module = next((measure.source_of(c).split('default_exp ')[1].split()[0] for c in cells if 'default_exp ' in measure.source_of(c)), None)
    if module in TO_DO: pytest.skip('not rebuilt yet')
    assert measure.lesson(cells)[1] <= LONG.get(notebook, MOST_LINES)
