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

import saeexplainer.cli
from nbmarkdown import LINK, fenced, output_markdown
from site_api import CODE, api
from site_cli import command_line
from site_index import api_index
from site_nav import CHECKED_IN, COMMANDS, NAMES, boost, navigation, parts_by_group, title_of

PROCESSORS = 'strip_ansi hide_line filter_stream_ rm_header_dash clean_magics'.split()
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


def unfolded(text):
    "Return Markdown in which what a `<details>` folds is Markdown too, as it is in Jupyter"
    parts = CODE_BLOCK.split(text)
    for i in range(0, len(parts), 2): parts[i] = parts[i].replace('<details>', '<details markdown="1">')
    return ''.join(parts)


def prose(source, links):
    "Return the Markdown of a cell of text"
    return links(unfolded(spaced(PRIVATE_NAME.sub(r'\1', lookup().linkify(source)))))


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


def front_matter(source, page=''):
    "Return what the hooks and the search are told: which file a page is made from, and how much it counts"
    return f'---\nsource: {source}\nsearch: {{boost: {boost(page)}}}\n---\n\n'


def with_title(text, title, module):
    "Return a part's page under its title in words, and below it the module's name"
    head = f'# {title}\n\n`{cfg.lib_name}.{module}`\n{{ .module }}'
    return re.sub(r'^# .+$', lambda _: head, text, count=1, flags=re.M)


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
        found = self.to.get(notebook) or CHECKED_IN.get(file)
        if found: return found
        name = path.replace('.html', '.md')
        return name if name in (COMMANDS, NAMES, *self.to.values()) else None

    def copied(self, file):
        "Copy a picture of the repository to the site"
        (self.pages/file).parent.mkdir(exist_ok=True)
        shutil.copy(cfg.config_path/file, self.pages/file)
        return file

    def relative(self, where):
        return posixpath.relpath(where, posixpath.dirname(self.to.get(self.name, '')) or '.')


# --- all pages

def notebooks():
    "Return the notebooks: name within nbs/ -> file"
    files = [file for file in sorted(cfg.nbs_path.rglob('*.ipynb')) if '.ipynb_checkpoints' not in file.parts]
    return {file.relative_to(cfg.nbs_path).as_posix(): file for file in files}


def module_in(file):
    "Return the name of the module that a notebook exports to, or None"
    found = re.search(r'#\| default_exp ([a-z_.]+)', file.read_text(encoding='utf-8'))
    return found[1] if found else None


def page_name(name, file):
    "Return the path of a notebook's page: a module's page is called as the module is"
    last = (module_in(file) or '').split('.')[-1]
    return posixpath.join(posixpath.dirname(name), f'{last or Path(name).stem}.md')


def write_page(where, text):
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(text, encoding='utf-8')


def write_pages(files, to, pages):
    "Write the pages of the notebooks; return their titles in the navigation"
    titles = {}
    for name, file in files.items():
        text = page(file, pages/to[name], Links(name, to, pages))
        titles[name] = title_of(name.removesuffix('.ipynb'), re.search(r'^# (.+)$', text, re.M)[1])
        if name.startswith('parts/'): text = with_title(text, titles[name], module_in(file))
        source = file.relative_to(cfg.config_path).as_posix()
        write_page(pages/to[name], front_matter(source, to[name]) + text + '\n')
    return titles


def write_checked_in(to, pages):
    "Write the pages of files that are no notebooks"
    for file, where in CHECKED_IN.items():
        text = spaced((cfg.config_path/file).read_text(encoding='utf-8'))
        write_page(pages/where, front_matter(file, where) + Links(f'../{file}', to, pages)(text))


def modules_by_group(files):
    "Return the modules of the chapters and of each group of parts, in the order of the sidebar"
    modules = {name.removesuffix('.ipynb'): module_in(file) for name, file in files.items()}
    groups = {'Chapters': [name for name in modules if '/' not in name]} | parts_by_group(modules)
    found = {group: [modules[name] for name in names if modules[name]] for group, names in groups.items()}
    return {group: names for group, names in found.items() if names}


def write_reference(files, to, pages):
    "Write the pages that no file holds: commands and names"
    of_module = {module_in(file): to[name] for name, file in files.items()}
    write_page(pages/COMMANDS, front_matter('nbs/parts/cli.ipynb', COMMANDS) + command_line(saeexplainer.cli.app))
    write_page(pages/NAMES, front_matter('tools/site_index.py', NAMES) + api_index(modules_by_group(files), of_module))


# --- the site

def build_site(pages, out, nav):
    "Make the site from its Markdown"
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    settings = dict(docs_dir=str(pages), site_dir=str(cfg.config_path/out), nav=nav, strict=True)
    config = load_config(str(cfg.config_path/'mkdocs.yml'), **settings)
    config.extra['release'] = cfg.version
    build(config)


def main(out='_docs'):
    logging.basicConfig(format='%(message)s', level=logging.WARNING)
    pages = cfg.config_path/'_proc'
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir()
    files = notebooks()
    to = {name: page_name(name, file) for name, file in files.items()}
    titles = write_pages(files, to, pages)
    write_checked_in(to, pages)
    write_reference(files, to, pages)
    shutil.copytree(cfg.config_path/'tools/site_assets', pages/'assets')
    build_site(pages, out, navigation(titles, to))


if __name__ == '__main__': main(*sys.argv[1:])
