"""Build the documentation site from the notebooks: `python tools/site_pages.py [OUT]`; `nbdev_docs` does the same through Quarto, for those who have it.

nbdev's own processors clean the notebooks and link names; the API is read from the package; mkdocs makes the pages, strictly: a link or an anchor that leads nowhere is an error."""
import ast, dataclasses, importlib, inspect, logging, posixpath, re, shutil, sys, typing
from pathlib import Path

from fastcore.docments import docments
from nbdev import processors
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.process import NBProcessor

from nbmarkdown import LINK, output_markdown

PROCESSORS = 'strip_ansi hide_line filter_stream_ rm_header_dash clean_magics'.split()
ORDER = dict(
    parts=('files show presets plan features saes lm/models lm/hooks lm/chat lm/sampling target steering explainer training store replies writer writers/local writers/openai '
           'writers/asking writers/server writers/errors writers/budget writers/traffic writers/parsing sources/neuronpedia sources/corpus sources/reading sources/sae_training labels '
           'evaluation/texts evaluation/steering evaluation/judge evaluation/stats evaluation/tables run results report plots studies dictionaries '
           'selection verdicts measuring lab pages explorer doctor cli main saeexplainer').split(),
    recipes='your_own_sae writers paper_presets train_sae layer_saes second_writer build_features benchmarks'.split())
CARDS = {'data/smollm2-135m/README.md': 'data-embedded.md', 'data/paper/README.md': 'data-paper.md', 'CONTRIBUTING.md': 'contributing.md'}
cfg = get_config()
base, code = cfg.doc_host + cfg.doc_baseurl.rstrip('/') + '/', f'{cfg.git_url}/blob/{cfg.branch}/'

# --- the API of a module

def escaped(text): # a comment or a docstring, as a cell of a table: its code stays code, all else is no Markdown
    parts = re.split(r'(`[^`]*`)', ' '.join(str(text or '').split()))
    return ''.join(part if i % 2 else re.sub(r'([\\|*_{\[])', r'\\\1', part).replace('<', '&lt;') for i, part in enumerate(parts))

def shown_type(annotation):
    if annotation is inspect.Parameter.empty: return ''
    if typing.get_origin(annotation) is typing.Annotated: annotation = typing.get_args(annotation)[0]
    return f"`{re.sub(r'(?:[a-z_]+[.])+(?=[A-Z])', '', inspect.formatannotation(annotation))}`"

def params_of(thing): # [(name, inspect.Parameter)]; none for what Python itself constructs
    try: return [(n, p) for n, p in inspect.signature(thing).parameters.items() if n not in ('self', 'cls')]
    except (TypeError, ValueError): return []

def parameters(thing):
    "The table of parameters: name, type, default, what it is; none of a constructor that another library documents"
    if inspect.isclass(thing) and getattr(thing.__init__, '__module__', '').split('.')[0] not in ('', cfg.lib_name): return ''
    fields = {f.name: f for f in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else {}
    params, rows = params_of(thing), []
    said = docments(thing, full=True) if params or not inspect.isclass(thing) else {}
    for name, p in params:
        option = next((m.help for m in getattr(p.annotation, '__metadata__', ()) if getattr(m, 'help', None)), None) # of the command line
        about = (fields[name].metadata.get('help') if name in fields else None) or said.get(name, {}).get('docment') or option or ''
        default = '' if p.default is p.empty or 'factory' in repr(p.default) else f'`{p.default!r}`' if len(repr(p.default)) < 120 else '…'
        star = {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '')
        rows.append((f'`{star}{name}`', shown_type(p.annotation), default, escaped(about)))
    returns = said.get('return') or {}
    if returns.get('docment') or returns.get('anno') not in (None, inspect.Parameter.empty):
        rows.append(('**returns**', shown_type(returns.get('anno', inspect.Parameter.empty)), '', escaped(returns.get('docment'))))
    if not rows: return ''
    used = [c for c in range(4) if c == 0 or any(r[c] for r in rows)]
    return '\n'.join('| ' + ' | '.join(r[c] for c in used) + ' |' for r in [('parameter', 'type', 'default', ' '), ('---',)*4, *rows])

def signature(name, thing):
    text = ', '.join(('*' if p.kind is p.VAR_POSITIONAL else '**' if p.kind is p.VAR_KEYWORD else '') + p.name + ('' if p.default is p.empty else '=…' if len(repr(p.default)) > 30 else f'={p.default!r}')
                     for _, p in params_of(thing))
    return f'{name}({text})'

def api(name, thing, path, level=3):
    "Heading, source link, signature, docstring and parameters of one public name; a class with its public methods"
    is_property = isinstance(thing, property)
    thing = thing.fget if is_property else getattr(thing, '__func__', thing)
    line = inspect.getsourcelines(thing)[1]
    parts = [f'{"#"*level} `{name}` {{ #{name.lower()} .api }}', f'[source]({code}{path}#L{line}){{ .source }}', fenced(name if is_property else signature(name, thing), 'python'), escaped(inspect.getdoc(thing))]
    if not is_property: parts.append(parameters(thing))
    if inspect.isclass(thing):
        own = {n: m for c in reversed(thing.__mro__) if c.__module__ == thing.__module__ and (c is thing or c.__name__.startswith('_')) for n, m in vars(c).items()}
        for n, m in own.items():
            if not n.startswith('_') and (inspect.isfunction(m) or isinstance(m, (classmethod, staticmethod, property))) and inspect.getdoc(m): parts.append(api(f'{name}.{n}', m, path, level + 1))
    return '\n\n'.join(p for p in parts if p)

# --- pages

def fenced(text, kind): # whatever is in the text, the fence is longer
    fence = '`'*max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
    return f'{fence}{kind}\n{text.rstrip()}\n{fence}'

def literal(text): return fenced(text, '{ .text .output }') if text.strip() else ''

def spaced(text): # python-markdown wants an empty line before a list, and outside of code only
    out, fence = [], False
    for line in text.split('\n'):
        fence ^= line.lstrip().startswith('```')
        item = re.match(r'(\s*)([-*]|\d+\.) ', line)
        if item and not fence and out and out[-1].strip() and not re.match(r'\s*([-*]|\d+\.) |\s{2,}', out[-1]): out.append('')
        out.append(line)
    return '\n'.join(out)

def public_names(source): return [n.name for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not n.name.startswith('_')]

def page(file, to, links):
    "A notebook as Markdown"
    nb = NBProcessor(file, [getattr(processors, p) for p in PROCESSORS], process=True).nb
    name = next((c.directives_['default_exp'][0] for c in nb.cells if c.cell_type == 'code' and 'default_exp' in (c.directives_ or {})), None)
    module, path = (importlib.import_module(f'{cfg.lib_name}.{name}'), f'{cfg.lib_name}/{name}.py') if name else (None, None)
    parts, heading = [], ''
    for cell in nb.cells:
        source, said = (cell.get('source') or '').strip(), {k.rstrip(':'): ' '.join(v) for k, v in (cell.directives_ or {}).items()}
        if cell.cell_type == 'raw' or not source or said.keys() & {'hide', 'default_exp'} or said.get('include') == 'false': continue
        if cell.cell_type == 'markdown':
            if found := re.findall(r'^#+ (.+)$', source, re.M): heading = found[-1]
            parts.append(links(spaced(re.sub(r'\[(`_[^`]*`)\]\([^)]*\)', r'\1', lookup.linkify(source))))) # private names have no page
        elif said.keys() & {'export', 'exports'}:
            names = public_names(source)
            parts += [api(n, getattr(module, n), path) for n in names]
            if not names and not re.search(r'^(?!import |from ).+', source, re.M): continue # imports alone
            parts.append('??? quote "Code"\n\n' + '\n'.join('    ' + line for line in fenced(source, 'python').split('\n')))
        else:
            if said.get('echo') != 'false': parts.append(fenced(source, 'python'))
            if said.get('output') != 'false': parts += [output_markdown(o, to.with_name(f'{to.stem}_files')/f'{cell.id}-{i}.png', literal, said.get('fig-cap', heading)) for i, o in enumerate(cell.get('outputs', []))]
    return '\n\n'.join(p for p in parts if p)

def front_matter(source, name=''):
    "What the hook and the search are told of a page: the file it is made from, and that a way in counts more than a part"
    boost = 4 if name.startswith('recipes/') else 2 if name.startswith(('index', 'glossary')) else 1
    return f'---\nsource: {source}\nsearch: {{boost: {boost}}}\n---\n\n'

def entries_of(names, titles, to): # of the navigation; pages of a folder within `parts/` stand together
    entries, rooms = [], {}
    for name in names:
        room = name.split('/')[1] if name.count('/') == 2 else None
        if room and room not in rooms:
            rooms[room] = []
            entries.append({room: rooms[room]})
        (rooms[room] if room else entries).append({titles[name]: to[name]})
    return entries

def main(out='_docs'):
    logging.basicConfig(format='%(message)s', level=logging.WARNING)
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    pages = cfg.config_path/'_proc'
    shutil.rmtree(pages, ignore_errors=True); pages.mkdir()
    files = {f.relative_to(cfg.nbs_path).as_posix(): f for f in sorted(cfg.nbs_path.rglob('*.ipynb')) if '.ipynb_checkpoints' not in f.parts}
    exp = lambda f: next((m.split('.')[-1] for m in re.findall(r'#\| default_exp ([a-z_.]+)', f.read_text())), None)
    global lookup
    lookup = NbdevLookup()
    to = {name: posixpath.join(posixpath.dirname(name), f'{exp(f) or Path(name).stem}.md') for name, f in files.items()}

    def links_from(name): # rewrites links of a page of nbs/ (or of a file of the repository) to pages of the site
        folder = posixpath.dirname(name)
        def one(m):
            target, mark, anchor = m[2].partition('#')
            if target.startswith(base): where = target.removeprefix(base).replace('.html', '.md') or 'index.md'
            elif re.match(r'[a-z]+:', target): return m[0]
            else:
                path = posixpath.normpath(posixpath.join(folder, target))
                there = path.removeprefix('../') # from the root of the repository
                where = to.get(there.removeprefix('nbs/').replace('.html', '.ipynb')) or CARDS.get(there) or next((w for w in to.values() if w == path.replace('.html', '.md')), None)
                if where is None and path.startswith('../') and (cfg.config_path/there).exists():
                    if not there.endswith(('.png', '.svg')): return m[1] + code + there + mark + anchor
                    where = there
                    (pages/where).parent.mkdir(exist_ok=True)
                    shutil.copy(cfg.config_path/there, pages/where)
                if where is None: return m[0] # mkdocs finds that it leads nowhere
            return m[1] + posixpath.relpath(where, posixpath.dirname(to.get(name, ''))  or '.') + mark + anchor
        return lambda text: ''.join(part if i % 2 else LINK.sub(one, part) for i, part in enumerate(re.split(r'(^```.*?^```$)', text, flags=re.M | re.S))) # not in code

    titles = {}
    for name, f in files.items():
        text = page(f, pages/to[name], links_from(name))
        titles[name] = re.search(r'^# (.+)$', text, re.M)[1]
        (pages/to[name]).parent.mkdir(parents=True, exist_ok=True)
        (pages/to[name]).write_text(front_matter(f.relative_to(cfg.config_path).as_posix(), name) + text + '\n', encoding='utf-8')
    for card, where in CARDS.items():
        (pages/where).write_text(front_matter(card) + links_from(f'../{card}')(spaced((cfg.config_path/card).read_text(encoding='utf-8'))), encoding='utf-8')

    rest = lambda folder: [f'{folder}/{n}.ipynb' for n in ORDER[folder]] + [n for n in files if n.startswith(f'{folder}/') and n.removeprefix(f'{folder}/').removesuffix('.ipynb') not in ORDER[folder]]
    of = lambda names: entries_of(names, titles, to)
    nav = [{'Home': 'index.md'}, {'Chapters': of([n for n in files if '/' not in n and n[0].isdigit()])}, {'Parts': of([n for n in rest('parts') if n in files])},
           {'Recipes': of([n for n in rest('recipes') if n in files])}, {'Data': [{'Embedded model, SAE, labels': 'data-embedded.md'}, {"The paper's numbers": 'data-paper.md'}]},
           {'Glossary': 'glossary.md'}, {'Contributing': 'contributing.md'}]
    shutil.copytree(cfg.config_path/'tools/site_assets', pages/'assets')
    build(load_config(str(cfg.config_path/'mkdocs.yml'), docs_dir=str(pages), site_dir=str(cfg.config_path/out), nav=nav, strict=True))

if __name__ == '__main__': main(*sys.argv[1:])
