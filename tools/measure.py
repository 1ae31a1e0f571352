"""How the code reads, in numbers: `python tools/measure.py [--graph FILE.svg] [FILE or FOLDER ...]`

Without files, it measures the package and its notebooks.
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
    if not isinstance(node, ast.Assign): return False
    target = node.targets[0]
    if not (isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)): return False
    names = [ast.unparse(part) for part in target.elts]
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

def is_exported(cell):
    is_code = cell['cell_type'] == 'code'
    return is_code and bool(re.search(r'^#\|\s*exports?\b', source_of(cell), re.M))

def runs_something(cell): # not only imports
    if cell['cell_type'] != 'code' or is_exported(cell): return False
    lines = [line for line in code_lines(source_of(cell)) if not re.match(r'\s*(import|from)\b', line)]
    return bool(lines)

def public_names(cell, kinds=(ast.FunctionDef, ast.ClassDef)): # that a cell defines
    body = ast.parse(source_of(cell)).body
    return [node.name for node in body if isinstance(node, kinds) and not node.name.startswith('_')]

def commands(cell): # function -> the word that a command line calls it by, as in `@app.command('run')`
    found = re.findall(r"@app\.command\('([\w-]+)'.*?\bdef (\w+)", source_of(cell), re.S)
    return {function: word for word, function in found}

def shown_by(cell): # text of its outputs
    lines = []
    for output in cell.get('outputs', ()):
        lines += output.get('text', ())
        lines += output.get('data', {}).get('text/plain', ())
    return ''.join(lines)

def is_example(cell, name, word): # word: of a command; None: it is no command
    if not runs_something(cell): return False
    text = source_of(cell)
    by_word = word and re.search(rf"""['"]{word}\b""", text)
    return bool(by_word or re.search(rf'\b{name}\b', text + shown_by(cell)))

def without_example(cells):
    "Functions and classes that no cell uses or shows before the next but one of the cells that export such"
    late = []
    exporting = [i for i, cell in enumerate(cells) if is_exported(cell) and public_names(cell)]
    for place, start in enumerate(exporting):
        after_next = exporting[place + 2] if place + 2 < len(exporting) else len(cells)
        words = commands(cells[start])
        for name in public_names(cells[start]):
            following = cells[start + 1:after_next]
            if not any(is_example(cell, name, words.get(name)) for cell in following): late.append(name)
    return late

def lesson(cells):
    "Counts of functions, and of those with an example before the next one; the longest run of exported lines"
    functions = shown = run = longest = 0
    waiting = [] # functions since the last cell that ran something
    for cell in cells:
        if is_exported(cell):
            names = public_names(cell, ast.FunctionDef)
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

def is_door_of(node): # the function that keeps an old address
    return isinstance(node, ast.FunctionDef) and node.name == '__getattr__'

def import_graph(package=ROOT/PACKAGE):
    "Module -> the modules that it imports; old addresses are left out"
    files = [file for file in sorted(package.rglob('*.py')) if file.name not in ('_modidx.py', '__main__.py')]
    modules = {module_name(file, package): file for file in files if module_name(file, package)}
    graph = {}
    for module, file in modules.items():
        tree = ast.parse(file.read_text(encoding='utf-8'))
        if is_door(tree) or file.name == '__init__.py': continue
        tree.body = [node for node in tree.body if not is_door_of(node)]
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
    left = {}
    for module, others in graph.items():
        left[module] = [other for other in others if not any(other in reach(near) for near in others)]
    return left

def places(graph):
    "Module -> where it stands in the picture: its place in a row, and the row's height"
    level = levels(graph)
    rows = {}
    for module in sorted(graph): rows.setdefault(level[module], []).append(module)
    place = {}
    for height, row in rows.items():
        ordered = sorted(row, key=lambda name: middle(graph[name], place))
        for i, module in enumerate(ordered): place[module] = ((i + .5)/len(row), height)
    return place, len(rows)

ROOMS = {'lm': '#cfe8fc', 'writers': '#fde7c0', 'sources': '#d6f0e2', 'evaluation': '#f3d9ea'} # and their colours

def draw(graph, file):
    "Write the graph as a picture: modules in rows, above what they import; lines that follow from others are left out"
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({'svg.fonttype': 'none', 'svg.hashsalt': 'layout'})
    place, n_rows = places(graph)
    fig = Figure(figsize=(11, .62*n_rows + .5), layout='none')
    ax = fig.add_axes((0, 0, 1, 1))
    for module, others in reduced(graph).items():
        for other in others:
            (x, y), (x2, y2) = place[module], place[other]
            ax.plot([x, x2], [y, y2], color='.75', lw=.5, zorder=1)
    for module, (x, y) in place.items():
        room = module.split('.')[0] if '.' in module else ''
        box = dict(boxstyle='round,pad=.3', fc=ROOMS.get(room, '#f2f2f2'), ec='.6', lw=.6)
        ax.text(x, y, module, ha='center', va='center', fontsize=7.5, zorder=2, bbox=box)
    ax.set(xlim=(0, 1), ylim=(-.6, n_rows - .4))
    ax.axis('off')
    fig.savefig(file, metadata={'Date': None})


# --- the table

HEAD = f'{"file":42} {"lines":>6} {"nodes/line":>10} {">120":>5} {"lambdas":>7} {"a, b = x, y":>11} {"What..":>6}'

def row(name, counts):
    density = counts['nodes']/max(1, counts['lines'])
    cells = [f'{name[-42:]:42}', f'{counts["lines"]:6}', f'{density:10.1f}', f'{counts["long"]:5}']
    cells += [f'{counts["lambdas"]:7}', f'{counts["packed"]:11}', f'{counts["questions"]:6}']
    return ' '.join(cells)

def table(files):
    "Print one line a file, and one for all"
    total = Counter()
    print(HEAD)
    for file in files:
        one = measure(file.read_text(encoding='utf-8'))
        total += one
        name = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
        if len(files) < 100: print(row(str(name), one))
    if len(files) > 1: print(row('all', total))

def pages():
    "Print what the notebooks run of what they export"
    total = Counter()
    longest = {}
    late = 0
    for notebook in sorted((ROOT/'nbs').rglob('*.ipynb')):
        cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
        counts, longest[notebook.name] = lesson(cells)
        total += counts
        late += len(without_example(cells))
    print(f'exported functions with an example before the next: {total["shown"]} of {total["functions"]}')
    print(f'exported functions and classes without an example before the next but one: {late}')
    worst = sorted(longest, key=longest.get, reverse=True)[:5]
    runs = ', '.join(f'{name} {longest[name]}' for name in worst)
    print(f'longest runs of exported lines with nothing run: {runs}')

def python_files(paths):
    "Files, and those of folders; nbdev's index is left out"
    found = []
    for path in paths: found += [path] if path.is_file() else sorted(path.rglob('*.py'))
    return [file for file in found if file.name != '_modidx.py']

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('files', nargs='*', type=Path, help='files or folders; default: the package and its notebooks')
    parser.add_argument('--graph', type=Path, help='where to write the import graph, as SVG')
    args = parser.parse_args(argv)
    if args.graph:
        draw(import_graph(), args.graph)
        return
    table(python_files([path.resolve() for path in args.files] or [ROOT/PACKAGE]))
    if args.files: return
    pages()
    print(f'cycle of imports: {cycle(import_graph()) or "none"}')

if __name__ == '__main__': main()
