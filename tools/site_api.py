"""What a module exports, as Markdown: for each name a heading, its source, signature, docstring and parameters."""
import dataclasses
import inspect
import re
import typing

from fastcore.docments import docments
from nbdev.config import get_config

from nbmarkdown import fenced

cfg = get_config()
CODE = f'{cfg.git_url}/blob/{cfg.branch}/'  # where a file of the repository is shown
EMPTY = inspect.Parameter.empty
STARS = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}
LONGEST_DEFAULT = 120  # characters, in a table
LONGEST_ARGUMENT = 30  # in a signature
HEAD = [('parameter', 'type', 'default', 'meaning'), ('---',)*4]


def escaped(text):
    "Return a comment or a docstring as a cell of a table: its code stays code, all else is no Markdown"
    parts = re.split(r'(`[^`]*`)', ' '.join(str(text or '').split()))
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r'([\\|*_{\[])', r'\\\1', parts[i]).replace('<', '&lt;')
    return ''.join(parts)


# --- parameters

def shown_type(annotation):
    "Return a type as code, without the modules of its classes"
    if annotation is EMPTY: return ''
    if typing.get_origin(annotation) is typing.Annotated: annotation = typing.get_args(annotation)[0]
    text = inspect.formatannotation(annotation)
    return f"`{re.sub(r'(?:[a-z_]+[.])+(?=[A-Z])', '', text)}`"


def shown_default(parameter):
    "Return a default as code; none that is a function, or that one makes"
    text = repr(parameter.default)
    if parameter.default is EMPTY or 'factory' in text or ' at 0x' in text: return ''
    return f'`{text}`' if len(text) < LONGEST_DEFAULT else '…'


def params_of(thing):
    "Return the parameters of a function or class: name -> inspect.Parameter; none for what Python itself constructs"
    try:
        found = inspect.signature(thing).parameters
    except (TypeError, ValueError):
        return {}
    return {name: parameter for name, parameter in found.items() if name not in ('self', 'cls')}


def is_made_elsewhere(thing):
    "Return whether a class has the constructor of another library, which documents it"
    if not inspect.isclass(thing): return False
    return getattr(thing.__init__, '__module__', '').split('.')[0] not in ('', cfg.lib_name)


def field_help(thing):
    "Return what the fields of a dataclass say of themselves: name -> text or None"
    if not dataclasses.is_dataclass(thing): return {}
    return {field.name: field.metadata.get('help') for field in dataclasses.fields(thing)}


def option_help(parameter):
    "Return what the command line says of a parameter, or None"
    notes = getattr(parameter.annotation, '__metadata__', ())
    return next((note.help for note in notes if getattr(note, 'help', None)), None)


def parameter_rows(thing, params, said):
    "Return a row for each parameter: name, type, default, what it is"
    fields = field_help(thing)
    rows = []
    for name, parameter in params.items():
        about = fields.get(name) or said.get(name, {}).get('docment') or option_help(parameter)
        stars = STARS.get(parameter.kind, '')
        rows.append((f'`{stars}{name}`', shown_type(parameter.annotation), shown_default(parameter), escaped(about)))
    return rows


def return_rows(said):
    "Return the row of what is returned; none where nothing is said of it"
    returned = said.get('return') or {}
    annotation = returned.get('anno', EMPTY)
    if not returned.get('docment') and annotation in (None, EMPTY): return []
    return [('**returns**', shown_type(annotation), '', escaped(returned.get('docment')))]


def parameters(thing):
    "Return the table of parameters, without the columns that would be empty"
    if is_made_elsewhere(thing): return ''
    params = params_of(thing)
    said = docments(thing, full=True) if params or not inspect.isclass(thing) else {}
    rows = parameter_rows(thing, params, said) + return_rows(said)
    if not rows: return ''
    used = [column for column in range(4) if column == 0 or any(row[column] for row in rows)]
    return '\n'.join('| ' + ' | '.join(row[column] for column in used) + ' |' for row in HEAD + rows)


# --- names

def argument(parameter):
    "Return a parameter as it stands in a signature"
    name = STARS.get(parameter.kind, '') + parameter.name
    if parameter.default is EMPTY: return name
    default = repr(parameter.default)
    return f'{name}=…' if len(default) > LONGEST_ARGUMENT else f'{name}={default}'


def signature(name, thing):
    "Return how a function or class is called"
    return f'{name}({", ".join(argument(parameter) for parameter in params_of(thing).values())})'


def is_public_method(name, member):
    "Return whether a member of a class has a place on its page"
    if name.startswith('_') or not inspect.getdoc(member): return False
    return inspect.isfunction(member) or isinstance(member, (classmethod, staticmethod, property))


def methods_of(thing):
    "Return the public methods of a class and of its private bases in the same module: name -> method"
    if not inspect.isclass(thing): return {}
    members = {}
    for kind in reversed(thing.__mro__):
        own = kind is thing or kind.__name__.startswith('_')
        if own and kind.__module__ == thing.__module__: members.update(vars(kind))
    return {name: member for name, member in members.items() if is_public_method(name, member)}


def api(name, thing, path, level=3):
    "Return heading, source link, signature, docstring and parameters of one public name; of a class also its methods"
    is_property = isinstance(thing, property)
    thing = thing.fget if is_property else getattr(thing, '__func__', thing)
    line = inspect.getsourcelines(thing)[1]
    parts = [f'{"#"*level} `{name}` {{ #{name.lower()} .api }}',
             f'[source]({CODE}{path}#L{line}){{ .source }}',
             fenced(name if is_property else signature(name, thing), 'python'),
             escaped(inspect.getdoc(thing)),
             '' if is_property else parameters(thing)]
    parts += [api(f'{name}.{own}', method, path, level + 1) for own, method in methods_of(thing).items()]
    return '\n\n'.join(part for part in parts if part)
