"""Build the documentation site from the notebooks: `python tools/site_pages.py [OUT]`

`nbdev_docs` does the same through Quarto, for those who have it. nbdev's own processors clean the notebooks and link
names; the API is read from the package; mkdocs makes the pages, strictly: a link or an anchor that leads nowhere is an
error.
"""
import ast
import functools
import importlib
import logging
import posixpath
import re
import shutil
import sys
from pathlib import Path

from nbdev import processors
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.process import NBProcessor

from nbmarkdown import LINK, fenced, output_markdown
from site_api import CODE, api

PROCESSORS = 'strip_ansi hide_line filter_stream_ rm_header_dash clean_magics'.split()
ORDER = {  # of the pages on the site; those that are not named come last
    'parts': '''
        files show presets names catalogue plan features sparsify dictionary_learning saes
        lm/models lm/places lm/hooks lm/heads lm/chat lm/sampling
        target steering hints bridge explainer sharing training crew joint grpo store replies
        writer writers/local writers/openai writers/exchange writers/server writers/keys writers/errors
        writers/budget writers/traffic writers/parsing
        sources/neuronpedia sources/corpus sources/reading sources/contexts sources/sae_training
        sources/transcoder_training labels lookups self_activation reranking
        evaluation/texts evaluation/steering evaluation/judge evaluation/stats evaluation/tables
        evaluation/words evaluation/detection evaluation/retrieval evaluation/paraphrase evaluation/beyond
        evaluation/readings reading_sheets calibration
        executor run results report plots studies bridge_study dictionaries explanation_files selection verdicts
        measuring benchmark export cards graphs
        lab pages explorer doctor cli main saeexplainer'''.split(),
    'recipes': '''
        ranking your_own_sae writers paper_presets another_width train_sae layer_saes train_transcoder circuit_graph
        whole_model second_writer build_features benchmarks families'''.split()}
CARDS = {'data/smollm2-135m/README.md': 'data-embedded.md', 'data/smollm2-135m-mlp/README.md': 'data-mlp.md',
         'data/paper/README.md': 'data-paper.md', 'CONTRIBUTING.md': 'contributing.md'}
cfg = get_config()
BASE = cfg.doc_host + cfg.doc_baseurl.rstrip('/') + '/'
ITEM = re.compile(r'(\s*)([-*]|\d+\.) ')  # of a list
IN_LIST = re.compile(r'\s*([-*]|\d+\.) |\s{2,}')
CODE_BLOCK = re.compile(r'(^```.*?^```$)', re.M | re.S)
PRIVATE_NAME = re.compile(r'\[(`_[^`]*`)\]\([^)]*\)')  # with a link, and it has no page


@functools.cache
def lookup():
    "Return what nbdev knows of where names are described"
    return NbdevLookup()


# --- cells

def literal(text):
    "Return text of an output as Markdown"
    return fenced(text, '{ .text .output }') if text.strip() else ''


def spaced(text):
    "Return Markdown with an empty line before each list outside of code, which python-markdown wants"
    out = []
    in_code = False
    for line in text.split('\n'):
        in_code ^= line.lstrip().startswith('```')
        begins = ITEM.match(line) and not in_code and out and out[-1].strip() and not IN_LIST.match(out[-1])
        if begins: out.append('')
        out.append(line)
    return '\n'.join(out)


def prose(source, links):
    "Return the Markdown of a cell of text"
    return links(spaced(PRIVATE_NAME.sub(r'\1', lookup().linkify(source))))


def directives(cell):
    "Return what the lines `#| name: value` at the top of a cell say: name -> value"
    return {name.rstrip(':'): ' '.join(value) for name, value in (cell.directives_ or {}).items()}


def is_hidden(cell):
    "Return whether a cell is no part of the page"
    if cell.cell_type == 'raw' or not (cell.get('source') or '').strip(): return True
    said = directives(cell)
    return bool(said.keys() & {'hide', 'default_exp'}) or said.get('include') == 'false'


def public_names(source):
    "Return the functions and classes that a cell exports"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in ast.parse(source).body if isinstance(node, kinds) and not node.name.startswith('_')]


def exported(source, module):
    "Return the parts that an exported cell turns into: the API of its names, and its code folded; imports have none"
    names = public_names(source)
    if not names and not re.search(r'^(?!import |from ).+', source, re.M): return []
    path = f'{cfg.lib_name}/{module}.py'
    found = importlib.import_module(f'{cfg.lib_name}.{module}')
    code = '\n'.join(f'    {line}' for line in fenced(source, 'python').split('\n'))
    return [*(api(name, getattr(found, name), path) for name in names), '??? quote "Code"\n\n' + code]


def example(cell, source, figures, heading):
    "Return the parts that an example turns into: its code and its outputs; `figures` is the folder of their pictures"
    said = directives(cell)
    parts = [] if said.get('echo') == 'false' else [fenced(source, 'python')]
    if said.get('output') == 'false': return parts
    caption = said.get('fig-cap', heading)
    for i, output in enumerate(cell.get('outputs', [])):
        parts.append(output_markdown(output, figures/f'{cell.id}-{i}.png', literal, caption))
    return parts


# --- a page

def module_of(cells):
    "Return the name of the module that a notebook exports to, or None"
    said = [cell.directives_ or {} for cell in cells if cell.cell_type == 'code']
    return next((one['default_exp'][0] for one in said if 'default_exp' in one), None)


def page(file, to, links):
    "Return a notebook as Markdown; `to` is where it will be, `links` rewrites the links of its text"
    cells = NBProcessor(file, [getattr(processors, name) for name in PROCESSORS], process=True).nb.cells
    module = module_of(cells)
    figures = to.with_name(f'{to.stem}_files')
    parts = []
    heading = ''
    for cell in cells:
        if is_hidden(cell): continue
        source = cell.source.strip()
        if cell.cell_type == 'markdown':
            parts.append(prose(source, links))
            heading = ([heading] + re.findall(r'^#+ (.+)$', source, re.M))[-1]
        elif directives(cell).keys() & {'export', 'exports'}: parts += exported(source, module)
        else: parts += example(cell, source, figures, heading)
    return '\n\n'.join(part for part in parts if part)


def front_matter(source, name=''):
    "Return what the hook and the search are told: which file a page is made from, and that a way in counts most"
    boost = 1
    if name.startswith(('index', 'glossary')): boost = 2
    if name.startswith('recipes/'): boost = 4
    return f'---\nsource: {source}\nsearch: {{boost: {boost}}}\n---\n\n'


class Links:
    "Rewrites the links of one page of nbs/, or of a file of the repository, to pages of the site"

    def __init__(self, name, to, pages):
        self.name = name  # within nbs/
        self.to = to  # notebook -> page
        self.pages = pages  # the folder in which pages are made

    def __call__(self, text):
        parts = CODE_BLOCK.split(text)
        for i in range(0, len(parts), 2): parts[i] = LINK.sub(self.rewritten, parts[i])
        return ''.join(parts)

    def rewritten(self, match):
        target, mark, anchor = match[2].partition('#')
        return match[1] + self.target(target) + mark + anchor

    def target(self, link):
        "Return where a link leads from this page; mkdocs finds those that lead nowhere"
        if link.startswith(BASE): return self.relative(link.removeprefix(BASE).replace('.html', '.md') or 'index.md')
        if re.match(r'[a-z]+:', link): return link
        path = posixpath.normpath(posixpath.join(posixpath.dirname(self.name), link))
        if where := self.page_of(path): return self.relative(where)
        file = path.removeprefix('../')
        if not path.startswith('../') or not (cfg.config_path/file).exists(): return link
        return self.relative(self.copied(file)) if file.endswith(('.png', '.svg')) else CODE + file

    def page_of(self, path):
        "Return the page of a notebook, card or page, or None"
        file = path.removeprefix('../')  # from the root of the repository
        notebook = file.removeprefix('nbs/').replace('.html', '.ipynb')
        found = self.to.get(notebook) or CARDS.get(file)
        if found: return found
        name = path.replace('.html', '.md')
        return name if name in self.to.values() else None

    def copied(self, file):
        "Copy a picture of the repository to the site"
        (self.pages/file).parent.mkdir(exist_ok=True)
        shutil.copy(cfg.config_path/file, self.pages/file)
        return file

    def relative(self, where):
        return posixpath.relpath(where, posixpath.dirname(self.to.get(self.name, '')) or '.')


# --- the site

def notebooks():
    "Return the notebooks: name within nbs/ -> file"
    files = [file for file in sorted(cfg.nbs_path.rglob('*.ipynb')) if '.ipynb_checkpoints' not in file.parts]
    return {file.relative_to(cfg.nbs_path).as_posix(): file for file in files}


def page_name(name, file):
    "Return the path of a notebook's page: a module's page is called as the module is"
    modules = [module.split('.')[-1] for module in re.findall(r'#\| default_exp ([a-z_.]+)', file.read_text())]
    return posixpath.join(posixpath.dirname(name), f'{[*modules, Path(name).stem][0]}.md')


def write_page(where, text):
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(text, encoding='utf-8')


def write_pages(files, to, pages):
    "Write the pages of the notebooks; return their titles"
    titles = {}
    for name, file in files.items():
        text = page(file, pages/to[name], Links(name, to, pages))
        titles[name] = re.search(r'^# (.+)$', text, re.M)[1]
        source = file.relative_to(cfg.config_path).as_posix()
        write_page(pages/to[name], front_matter(source, name) + text + '\n')
    return titles


def write_cards(to, pages):
    "Write the pages of files that are no notebooks"
    for card, where in CARDS.items():
        text = spaced((cfg.config_path/card).read_text(encoding='utf-8'))
        write_page(pages/where, front_matter(card) + Links(f'../{card}', to, pages)(text))


def in_order(folder, files):
    "Return the notebooks of a folder, those that `ORDER` names first"
    named = [f'{folder}/{name}.ipynb' for name in ORDER[folder]]
    others = [name for name in files if name.startswith(f'{folder}/') and name not in named]
    return [name for name in named + others if name in files]


def entries_of(names, titles, to):
    "Return entries of the navigation; pages of a folder within `parts/` stand together"
    entries = []
    rooms = {}
    for name in names:
        entry = {titles[name]: to[name]}
        if name.count('/') != 2:
            entries.append(entry)
            continue
        room = name.split('/')[1]
        if room not in rooms:
            rooms[room] = []
            entries.append({room: rooms[room]})
        rooms[room].append(entry)
    return entries


def navigation(files, titles, to):
    "Return the sidebar, as mkdocs takes it"
    chapters = [name for name in files if '/' not in name and name[0].isdigit()]
    data = [{'Embedded model, SAE, labels': 'data-embedded.md'}, {'Its transcoder': 'data-mlp.md'},
            {"The paper's numbers": 'data-paper.md'}]
    return [{'Home': 'index.md'},
            {'Chapters': entries_of(chapters, titles, to)},
            {'Parts': entries_of(in_order('parts', files), titles, to)},
            {'Recipes': entries_of(in_order('recipes', files), titles, to)},
            {'Data': data},
            {'Glossary': 'glossary.md'},
            {'Contributing': 'contributing.md'}]


def build_site(pages, out, nav):
    "Make the site from its Markdown"
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    settings = dict(docs_dir=str(pages), site_dir=str(cfg.config_path/out), nav=nav, strict=True)
    build(load_config(str(cfg.config_path/'mkdocs.yml'), **settings))


def main(out='_docs'):
    logging.basicConfig(format='%(message)s', level=logging.WARNING)
    pages = cfg.config_path/'_proc'
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir()
    files = notebooks()
    to = {name: page_name(name, file) for name, file in files.items()}
    titles = write_pages(files, to, pages)
    write_cards(to, pages)
    shutil.copytree(cfg.config_path/'tools/site_assets', pages/'assets')
    build_site(pages, out, navigation(files, titles, to))


if __name__ == '__main__': main(*sys.argv[1:])
