"The reference of the command line as a page, from what `saeexplainer COMMAND --help` is made of"
import enum
import inspect
import re
import typing
from dataclasses import dataclass
from pathlib import Path

from typer.main import get_command_name
from typer.models import ArgumentInfo, OptionInfo
from typer.utils import get_params_from_function

from nbmarkdown import fenced
from site_api import escaped

NAME = 'saeexplainer'
OPTION = re.compile(r'(?<![\w-])--[a-z][a-z-]*')
MARKUP = re.compile(r'\[/?[a-z]+\]')  # of rich, in what stands below a command's help
HEAD = '''# Command line

What `saeexplainer COMMAND --help` says, for all commands on one page. A command that fails says in one line what is
wrong, and ends with exit code 2; one that was interrupted ends with 130.
'''
GENERAL = '''## Options of every call { #options }

They stand before the command; `--debug` may stand behind it, too.
'''
COMPLETION = [('`--install-completion`', '', '', 'install completion of commands, options and presets for this shell'),
              ('`--show-completion`', '', '', 'show that script, to copy it'),
              ('`--help`, `-h`', '', '', 'show the help of the command, and exit')]


@dataclass(frozen=True)
class Given:
    "An argument or option of a command"
    name: str  # in Python
    info: ArgumentInfo | OptionInfo
    annotation: object

    @property
    def is_option(self): return isinstance(self.info, OptionInfo)

    @property
    def is_required(self): return self.info.default is ...

    @property
    def is_repeated(self): return 'list[' in str(self.annotation)

    @property
    def kind(self):
        "What one value is: `int` of `int`, `Optional[int]` and `list[int]`"
        kind = self.annotation
        while kinds := [one for one in typing.get_args(kind) if one is not type(None)]: kind = kinds[0]
        return kind

    @property
    def is_flag(self): return self.is_option and self.kind is bool

    @property
    def spelled(self):
        "How it is written: all names of an option, or the place of an argument"
        if self.is_option: return [*(self.info.param_decls or [f'--{self.name.replace("_", "-")}'])]
        return [self.info.metavar or self.name]


def given_by(command):
    "Return the arguments and options of a command's function"
    found = get_params_from_function(command).values()
    return [Given(one.name, one.default, one.annotation) for one in found if not one.default.hidden]


# --- in plain words

def limits(info):
    "Return the limits of a number in words"
    least = f'from {info.min}' if info.min is not None else ''
    most = f'up to {info.max}' if info.max is not None else ''
    return ' '.join([least, most]).strip()


def taken(given):
    "Return what an argument or option takes, in words; a flag takes nothing"
    if given.is_flag: return ''
    kind = given.kind
    if given.is_option and given.info.metavar: words = f'`{given.info.metavar}`'
    elif inspect.isclass(kind) and issubclass(kind, enum.Enum): words = ', '.join(f'`{one.value}`' for one in kind)
    else: words = {int: 'a number', float: 'a number', Path: 'a path'}.get(kind, 'text')
    number = f'{words} {limits(given.info)}'.strip().replace(' ', '&nbsp;')
    return f'{number}, repeatable' if given.is_repeated and given.is_option else number


def default_of(given):
    "Return the default of an argument or option; none that says nothing"
    default = given.info.default
    if given.is_required: return 'required'
    return '' if default is None or default is False or default == '' else f'`{default}`'


def meaning(text):
    "Return a help text as a cell of a table, the options in it as code"
    parts = re.split('(`[^`]*`)', text or '')
    for i in range(0, len(parts), 2): parts[i] = OPTION.sub(r'`\g<0>`', parts[i])
    return escaped(''.join(parts))


def row(given):
    "Return an argument or option as a row of a table"
    names = ', '.join(f'`{name}`' for name in given.spelled)
    return names, taken(given), default_of(given), meaning(given.info.help)


def table(first, rows):
    "Return a table without the columns that would be empty; `first` is the heading of its first column"
    head = [(first, 'takes', 'default', 'meaning'), ('---',)*4]
    used = [column for column in range(4) if any(line[column] for line in rows)]
    return '\n'.join('| ' + ' | '.join(line[column] for column in used) + ' |' for line in head + rows)


def usage(name, givens):
    "Return the line that says how a command is called"
    def place(given):
        text = given.spelled[0] + ('...' if given.is_repeated else '')
        return text if given.is_required else f'[{text}]'
    places = [place(given) for given in givens if not given.is_option]
    needed = [f'{given.spelled[0]} {given.info.metavar or given.name.upper()}'
              for given in givens if given.is_option and given.is_required]
    return ' '.join([NAME, name, *places, *needed, '[options]'])


def examples(epilog):
    "Return the commands that stand below a command's help"
    lines = [MARKUP.sub('', line).strip() for line in (epilog or '').split('\n')]
    return [line for line in lines if line.startswith(f'{NAME} ')]


# --- the page

def name_of(command):
    "Return how a command is called"
    return command.name or get_command_name(command.callback.__name__)


def help_of(command):
    "Return what a command says it does"
    return inspect.cleandoc(command.help or inspect.getdoc(command.callback) or '')


def section(command):
    "Return the section of a command: what it does, how it is called, what it takes, examples"
    name = name_of(command)
    givens = given_by(command.callback)
    parts = [f'## {NAME} {name} {{ #{name} }}', meaning(help_of(command)) + '.', fenced(usage(name, givens), 'text')]
    arguments = [row(given) for given in givens if not given.is_option]
    options = [row(given) for given in givens if given.is_option]
    if arguments: parts.append(table('argument', arguments))
    if options: parts.append(table('option', options))
    if shown := examples(command.epilog): parts.append(fenced('\n'.join(shown), 'sh'))
    return '\n\n'.join(parts)


def commands_of(app):
    "Return the commands of an application, in the order of its help"
    return [command for command in app.registered_commands if not command.hidden]


def overview(commands):
    "Return the table of all commands"
    rows = [(f'[`{name_of(command)}`](#{name_of(command)})', '', '', meaning(help_of(command))) for command in commands]
    return table('command', rows)


def command_line(app):
    "Return the reference of a typer application as Markdown"
    commands = commands_of(app)
    general = [row(given) for given in given_by(app.registered_callback.callback)] + COMPLETION
    parts = [HEAD, overview(commands), *(section(command) for command in commands), GENERAL, table('option', general)]
    return '\n\n'.join(parts)
