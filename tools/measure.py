"""How the code reads, in numbers: `python tools/measure.py [--graph FILE.svg] [FILE or FOLDER ...]`

Without files, the package and its notebooks. The numbers are those of CONTRIBUTING.md. `--graph` draws which module
imports which, as a page of the docs shows it.
"""
import argparse
import ast
import json
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = 'saeexplainer'
COLUMNS = 120
COLORS = {'lm': '#cfe8fc', 'writers': '#fde7c0', 'sources': '#d6f0e2', 'evaluation': '#f3d9ea'}  # of a room


# --- one file

def code_lines(source):
    "Return the lines that are not empty and not only a comment"
    return [line for line in source.splitlines() if line.strip() and not line.strip().startswith('#')]


def docstrings(tree):
    "Return the docstrings of a module's functions and classes"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text]


def is_packed(node):
    "Return whether a node is `a, b = x, y`, and no swap"
    if not isinstance(node, ast.Assign): return False
    if not isinstance(node.targets[0], ast.Tuple) or not isinstance(node.value, ast.Tuple): return False
    names = [ast.unparse(part) for part in node.targets[0].elts]
    values = [ast.unparse(part) for part in node.value.elts]
    return sorted(names) != sorted(values)


def is_named_lambda(node):
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)


def measure(source):
    "Return the counts of one file"
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    lines = source.splitlines()
    said = docstrings(tree)
    return Counter(
        lines=len(code_lines(source)),
        nodes=len(nodes),
        all_lines=len(lines),
        long=sum(len(line) > COLUMNS for line in lines),
        lambdas=sum(is_named_lambda(node) for node in nodes),
        packed=sum(is_packed(node) for node in nodes),
        docstrings=len(said),
        questions=sum(bool(re.match(r'(What|Which|Whose|How|Whether)\b', text)) for text in said),
    )


# --- notebooks

def source_of(cell): return ''.join(cell['source'])


def is_exported(cell):
    return cell['cell_type'] == 'code' and bool(re.search(r'^#\|\s*exports?\b', source_of(cell), re.M))


def runs_something(cell):
    "Return whether a cell is not exported and does more than import"
    if cell['cell_type'] != 'code' or is_exported(cell): return False
    lines = [line for line in code_lines(source_of(cell)) if not re.match(r'\s*(import|from)\b', line)]
    return bool(lines)


def public_functions(cell):
    body = ast.parse(source_of(cell)).body
    return [node.name for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith('_')]


def lesson(cells):
    """Return how a notebook shows what it exports

    Counts of its functions and of those with an example before the next one, and the longest run of exported lines with
    nothing run.
    """
    counts = Counter(functions=0, shown=0)
    run = longest = 0
    waiting = []  # functions since the last cell that ran something
    for cell in cells:
        if is_exported(cell):
            names = public_functions(cell)
            counts['functions'] += len(names)
            waiting += names
            run += len(code_lines(source_of(cell)))
            longest = max(longest, run)
        elif runs_something(cell):
            text = source_of(cell)
            counts['shown'] += sum(bool(re.search(rf'\b{name}\b', text)) for name in waiting)
            waiting = []
            run = 0
    return counts, longest


# --- imports

def module_name(file, package):
    "Return 'lm.hooks' of its file; '' of the package itself"
    parts = file.relative_to(package).with_suffix('').parts
    return '.'.join(part for part in parts if part != '__init__')


def origin_of(node, module):
    "Return the module of the package from which an import takes its names, or None"
    if not isinstance(node, ast.ImportFrom): return None
    named = node.module or ''
    if node.level: return '.'.join([*module.split('.')[:-node.level], *named.split('.')]).strip('.')
    return named.removeprefix(PACKAGE).strip('.') if named.split('.')[0] == PACKAGE else None


def imported(tree, module, modules):
    "Return the modules of the package that a module imports, at its top or in a function"
    found = set()
    for node in ast.walk(tree):
        origin = origin_of(node, module)
        if origin is None: continue
        for name in node.names:
            full = f'{origin}.{name.name}'.strip('.')
            if full in modules: found.add(full)
            elif origin in modules: found.add(origin)
    return found - {module}


def is_door(tree):
    "Return whether a module is an old address, which defines nothing but `__getattr__`"
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds)] == ['__getattr__']


def without_getattr(tree):
    "Return a module without the function that answers for its old names"
    tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef) or node.name != '__getattr__']
    return tree


def import_graph(package=ROOT/PACKAGE):
    "Return module -> the modules that it imports; old addresses are left out"
    files = [file for file in sorted(package.rglob('*.py')) if file.name not in ('_modidx.py', '__main__.py')]
    modules = {module_name(file, package): file for file in files if module_name(file, package)}
    graph = {}
    for module, file in modules.items():
        tree = ast.parse(file.read_text(encoding='utf-8'))
        if is_door(tree) or file.name == '__init__.py': continue
        graph[module] = sorted(imported(without_getattr(tree), module, modules))
    return graph


def cycle(graph):
    "Return a list of modules that ends where it begins, or None"
    done = set()
    def visit(module, trail):
        if module in trail: return [*trail[trail.index(module):], module]
        if module in done: return None
        for other in graph.get(module, []):
            if found := visit(other, [*trail, module]): return found
        done.add(module)
        return None
    return next((found for module in graph if (found := visit(module, []))), None)


# --- the picture of imports

def levels(graph):
    "Return module -> how far above those that import nothing it stands"
    level = {}
    def of(module):
        if module not in level:
            level[module] = 1 + max([of(other) for other in graph[module]], default=-1)
        return level[module]
    for module in graph: of(module)
    return level


def reduced(graph):
    "Return the graph without imports that follow from others"
    above = {}
    def reach(module):
        if module not in above:
            above[module] = set(graph[module]).union(*(reach(other) for other in graph[module]))
        return above[module]
    def follows(other, others): return any(other in reach(one) for one in others)
    return {module: [one for one in others if not follows(one, others)] for module, others in graph.items()}


def middle(modules, place):
    "Return the mean horizontal place"
    known = [place[module][0] for module in modules if module in place]
    return sum(known)/max(1, len(known))


def places(graph):
    "Return module -> (x, y): in rows, each above what it imports"
    level = levels(graph)
    rows = {}
    for module in sorted(graph): rows.setdefault(level[module], []).append(module)
    place = {}
    for height, row in rows.items():
        ordered = sorted(row, key=lambda module: middle(graph[module], place))
        for i, module in enumerate(ordered): place[module] = ((i + .5)/len(row), height)
    return place


def draw(graph, file):
    "Write the import graph as a picture; a line that follows from others is left out"
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({'svg.fonttype': 'none', 'svg.hashsalt': 'layout'})
    place = places(graph)
    n_rows = 1 + max(y for _, y in place.values())
    fig = Figure(figsize=(11, .62*n_rows + .5), layout='none')
    ax = fig.add_axes((0, 0, 1, 1))
    for module, others in reduced(graph).items():
        for other in others:
            ax.plot(*zip(place[module], place[other]), color='.75', lw=.5, zorder=1)
    for module, (x, y) in place.items():
        room = module.split('.')[0] if '.' in module else ''
        box = dict(boxstyle='round,pad=.3', fc=COLORS.get(room, '#f2f2f2'), ec='.6', lw=.6)
        ax.text(x, y, module, ha='center', va='center', fontsize=7.5, zorder=2, bbox=box)
    ax.set(xlim=(0, 1), ylim=(-.6, n_rows - .4))
    ax.axis('off')
    fig.savefig(file, metadata={'Date': None})


# --- the table

def row(name, c):
    "Return one line of the table"
    density = c['nodes']/max(1, c['lines'])
    return (f'{name[-42:]:42} {c["lines"]:6} {density:10.1f} {c["long"]:5} {c["lambdas"]:7} {c["packed"]:11} '
            f'{c["questions"]:6}')


def table(files):
    "Print one line a file, and one for all"
    total = Counter()
    print(f'{"file":42} {"lines":>6} {"nodes/line":>10} {">120":>5} {"lambdas":>7} {"a, b = x, y":>11} {"What..":>6}')
    for file in files:
        one = measure(file.read_text(encoding='utf-8'))
        total += one
        if len(files) < 100: print(row(str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file), one))
    if len(files) > 1: print(row('all', total))


def lessons():
    "Print how the notebooks show what they export"
    counts = Counter()
    longest = {}
    for notebook in sorted((ROOT/'nbs').rglob('*.ipynb')):
        own, longest[notebook.name] = lesson(json.loads(notebook.read_text(encoding='utf-8'))['cells'])
        counts += own
    worst = sorted(longest, key=longest.get, reverse=True)[:5]
    print(f'exported functions with an example before the next: {counts["shown"]} of {counts["functions"]}')
    print('longest runs of exported lines with nothing run: ' + ', '.join(f'{name} {longest[name]}' for name in worst))


def files_in(path):
    "Return a file, or the files of a folder"
    found = [path] if path.is_file() else sorted(path.rglob('*.py'))
    return [file for file in found if file.name != '_modidx.py']


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('files', nargs='*', type=Path, help='files or folders; default: the package and its notebooks')
    parser.add_argument('--graph', type=Path, help='where to write the import graph, as SVG')
    args = parser.parse_args(argv)
    if args.graph:
        draw(import_graph(), args.graph)
        return
    given = [path.resolve() for path in args.files] or [ROOT/PACKAGE]
    table([file for path in given for file in files_in(path)])
    if args.files: return
    lessons()
    print(f'cycle of imports: {cycle(import_graph()) or "none"}')


if __name__ == '__main__': main()
