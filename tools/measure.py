"""How the code reads, in numbers: `python tools/measure.py [--graph FILE.svg] [FILE or FOLDER ...]`; without files, the package and its notebooks.

The numbers are those of CONTRIBUTING.md. `--graph` draws which module imports which, as a page of the docs shows it.
"""
import argparse, ast, json, re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = 'saeexplainer'
COLUMNS = 120


# --- one file

def code_lines(source): # lines that are not empty and not only a comment
    return [line for line in source.splitlines() if line.strip() and not line.strip().startswith('#')]

def docstrings(tree):
    "Docstrings of a module's functions and classes"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text]

def is_packed(node): # `a, b = x, y`, and no swap
    if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)):
        return False
    names = [ast.unparse(part) for part in node.targets[0].elts]
    values = [ast.unparse(part) for part in node.value.elts]
    return sorted(names) != sorted(values)

def is_named_lambda(node):
    return isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)

def measure(source):
    "Counts of one file"
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

def is_exported(cell): return cell['cell_type'] == 'code' and bool(re.search(r'^#\|\s*exports?\b', source_of(cell), re.M))

def runs_something(cell): # not only imports
    if cell['cell_type'] != 'code' or is_exported(cell): return False
    lines = [line for line in code_lines(source_of(cell)) if not re.match(r'\s*(import|from)\b', line)]
    return bool(lines)

def public_functions(cell):
    body = ast.parse(source_of(cell)).body
    return [node.name for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith('_')]

def lesson(cells):
    "Functions of a notebook, those with an example before the next one, and the longest run of exported lines with nothing run"
    functions = shown = run = longest = 0
    waiting = [] # functions since the last cell that ran something
    for cell in cells:
        if is_exported(cell):
            names = public_functions(cell)
            functions += len(names)
            waiting += names
            run += len(code_lines(source_of(cell)))
            longest = max(longest, run)
        elif runs_something(cell):
            text = source_of(cell)
            shown += sum(bool(re.search(rf'\b{name}\b', text)) for name in waiting)
            waiting = []
            run = 0
    return Counter(functions=functions, shown=shown), longest


# --- imports

def module_name(file, package): # 'lm.hooks'; '' of the package itself
    parts = file.relative_to(package).with_suffix('').parts
    return '.'.join(part for part in parts if part != '__init__')

def imported(tree, module, modules, everywhere=True):
    "Modules of the package that a module imports: at its top, or everywhere"
    found = set()
    for node in (ast.walk(tree) if everywhere else tree.body):
        if not isinstance(node, ast.ImportFrom): continue
        if node.level:
            base = module.split('.')[:-node.level]
            origin = '.'.join([*base, *(node.module or '').split('.')]).strip('.')
        elif (node.module or '').split('.')[0] == PACKAGE:
            origin = node.module.removeprefix(PACKAGE).strip('.')
        else: continue
        for name in node.names:
            full = f'{origin}.{name.name}'.strip('.')
            if full in modules: found.add(full)
            elif origin in modules: found.add(origin)
    return found - {module}

def is_door(tree): # an old address: it defines nothing but `__getattr__`
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds)] == ['__getattr__']

def import_graph(package=ROOT/PACKAGE):
    "Module -> the modules that it imports; old addresses are left out"
    files = [file for file in sorted(package.rglob('*.py')) if file.name not in ('_modidx.py', '__main__.py')]
    modules = {module_name(file, package): file for file in files if module_name(file, package)}
    graph = {}
    for module, file in modules.items():
        tree = ast.parse(file.read_text(encoding='utf-8'))
        if is_door(tree) or file.name == '__init__.py': continue
        tree.body = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == '__getattr__')]
        graph[module] = sorted(imported(tree, module, modules))
    return graph

def cycle(graph): # a list of modules that ends where it begins; None: there is none
    done = set()
    def visit(module, trail):
        if module in trail: return [*trail[trail.index(module):], module]
        if module in done: return None
        for other in graph.get(module, []):
            if found := visit(other, [*trail, module]): return found
        done.add(module)
        return None
    return next((found for module in graph if (found := visit(module, []))), None)

def levels(graph):
    "Module -> how far above those that import nothing it stands"
    level = {}
    def of(module):
        if module not in level:
            level[module] = 1 + max([of(other) for other in graph[module]], default=-1)
        return level[module]
    for module in graph: of(module)
    return level

def middle(modules, place): # mean horizontal place
    known = [place[module][0] for module in modules if module in place]
    return sum(known)/max(1, len(known))

def reduced(graph):
    "The graph without imports that follow from others"
    above = {}
    def reach(module):
        if module not in above:
            above[module] = set(graph[module]).union(*(reach(other) for other in graph[module]))
        return above[module]
    return {module: [o for o in others if not any(o in reach(m) for m in others)] for module, others in graph.items()}

def draw(graph, file):
    "Write the import graph as a picture: modules in rows, each above what it imports; a line that follows from others is left out"
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({'svg.fonttype': 'none', 'svg.hashsalt': 'layout'})
    level = levels(graph)
    rows = {}
    for module in sorted(graph): rows.setdefault(level[module], []).append(module)
    place = {}
    for height, row in rows.items():
        for i, module in enumerate(sorted(row, key=lambda name: middle(graph[name], place))):
            place[module] = ((i + .5)/len(row), height)
    fig = Figure(figsize=(11, .62*len(rows) + .5), layout='none')
    ax = fig.add_axes((0, 0, 1, 1))
    for module, others in reduced(graph).items():
        for other in others:
            (x, y), (x2, y2) = place[module], place[other]
            ax.plot([x, x2], [y, y2], color='.75', lw=.5, zorder=1)
    for module, (x, y) in place.items():
        room = module.split('.')[0] if '.' in module else ''
        color = {'lm': '#cfe8fc', 'writers': '#fde7c0', 'sources': '#d6f0e2', 'evaluation': '#f3d9ea'}.get(room, '#f2f2f2')
        ax.text(x, y, module, ha='center', va='center', fontsize=7.5, zorder=2, bbox=dict(boxstyle='round,pad=.3', fc=color, ec='.6', lw=.6))
    ax.set(xlim=(0, 1), ylim=(-.6, len(rows) - .4))
    ax.axis('off')
    fig.savefig(file, metadata={'Date': None})


# --- the table

def table(files):
    "Print one line a file, and one for all"
    total = Counter()
    print(f'{"file":42} {"lines":>6} {"nodes/line":>10} {">120":>5} {"lambdas":>7} {"a, b = x, y":>11} {"What..":>6}')
    for file in files:
        one = measure(file.read_text(encoding='utf-8'))
        total += one
        if len(files) < 100: print(row(str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file), one))
    if len(files) > 1: print(row('all', total))

def row(name, c):
    return (f'{name[-42:]:42} {c["lines"]:6} {c["nodes"]/max(1, c["lines"]):10.1f} {c["long"]:5} {c["lambdas"]:7} {c["packed"]:11} {c["questions"]:6}')

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('files', nargs='*', type=Path, help='files or folders; default: the package and its notebooks')
    parser.add_argument('--graph', type=Path, help='where to write the import graph, as SVG')
    args = parser.parse_args(argv)
    if args.graph:
        draw(import_graph(), args.graph)
        return
    given = [path.resolve() for path in args.files] or [ROOT/PACKAGE]
    files = [file for path in given for file in ([path] if path.is_file() else sorted(path.rglob('*.py'))) if file.name != '_modidx.py']
    table(files)
    if args.files: return
    functions, longest = Counter(), {}
    for notebook in sorted((ROOT/'nbs').rglob('*.ipynb')):
        counts, longest[notebook.name] = lesson(json.loads(notebook.read_text(encoding='utf-8'))['cells'])
        functions += counts
    print(f'exported functions with an example before the next: {functions["shown"]} of {functions["functions"]}')
    worst = sorted(longest, key=longest.get, reverse=True)[:5]
    print('longest runs of exported lines with nothing run: ' + ', '.join(f'{name} {longest[name]}' for name in worst))
    print(f'cycle of imports: {cycle(import_graph()) or "none"}')

if __name__ == '__main__': main()
