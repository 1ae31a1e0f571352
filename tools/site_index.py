"The index of the API as a page: all public names by module, each with the first line of what it says of itself"
import importlib
import inspect
import re

from nbdev.config import get_config

from site_api import escaped

cfg = get_config()
HEAD = '''# API index

Every function and class of the package with the first line of what it says of itself; methods stand on the page of
their class. {n} names in {n_modules} modules, in the order of the sidebar.
'''
FIRST = '''## At the door {{ #door }}

`from saeexplainer import {names}`
'''


def is_thing(found):
    "Return whether a name stands for a function, cached or not, or a class"
    return inspect.isfunction(inspect.unwrap(found)) or inspect.isclass(found)


def exported(module):
    "Return what a module exports: name -> thing"
    return {name: getattr(module, name) for name in getattr(module, '__all__', ())}


def first_line(text):
    "Return the first sentence of a docstring, as a cell of a table"
    paragraph = ' '.join((text or '').split('\n\n')[0].split())
    return escaped(re.split(r'(?<=[.;])(?<!Eq\.) ', paragraph)[0].rstrip('.;'))


def table_of(things, pages):
    "Return names as a table; each leads to its place on the page of its module"
    def row(name, thing):
        module = thing.__module__.removeprefix(f'{cfg.lib_name}.')
        return f'| [`{name}`]({pages[module]}#{name.lower()}) | {first_line(inspect.getdoc(thing))} |'
    return '\n'.join(['| name | what it is |', '| --- | --- |', *(row(*item) for item in things.items())])


def module_parts(name, pages):
    "Return the section of a module, and how many names it has"
    module = importlib.import_module(f'{cfg.lib_name}.{name}')
    found = exported(module)
    own = {name: thing for name, thing in found.items() if is_thing(thing) and thing.__module__ == module.__name__}
    constants = [name for name, thing in found.items() if not callable(thing) and name.isupper()]
    if not own: return [], 0
    heading = f'### [`{name}`]({pages[name]}) {{ #{name.replace(".", "-")} }}'
    parts = [heading, first_line(module.__doc__), table_of(own, pages)]
    if constants: parts.append('Constants: ' + ', '.join(f'`{constant}`' for constant in constants))
    return parts, len(own)


def api_index(groups, pages):
    "Return the index as Markdown: `groups` has the modules of each group, `pages` the page of each module"
    package = importlib.import_module(cfg.lib_name)
    door = {name: thing for name, thing in exported(package).items() if is_thing(thing)}
    parts = [FIRST.format(names=', '.join(door)), table_of(door, pages)]
    counts = []
    for group, modules in groups.items():
        sections = [module_parts(module, pages) for module in modules]
        counts += [count for _, count in sections if count]
        parts += [f'## {group}', *(part for section, _ in sections for part in section)]
    return '\n\n'.join([HEAD.format(n=f'{sum(counts):,}', n_modules=len(counts)), *parts])
