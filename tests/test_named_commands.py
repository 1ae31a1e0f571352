"Commands that help, messages, README and pages name: each is one that exists, with options that it has"
import ast, json, re, shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.main

from saeexplainer.cli import app

ROOT = Path(__file__).parents[1]
GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands
BY_ITSELF = re.compile(r'`(?:\.venv/bin/)?saeexplainer ([^`]+)`', re.S)  # in backticks
IN_BLOCK = re.compile(r'^\s*(?:[$!%] ?)?(?:\.venv/bin/|\$\(BIN\)/)?saeexplainer (.+)$', re.M)  # a line of its own
IN_MESSAGE = re.compile(rf"\bsaeexplainer ((?:{'|'.join(COMMANDS)})(?: [^`;[]*)?)")
SHELL = re.compile(r'\s(?:[|>&<]|2>|#)\s?.*', re.S)  # what a shell does with it


@dataclass(frozen=True)
class Named:
    "A command, and where it stands"
    place: str
    line: str
    whole: bool = True  # it can be typed as it stands; prose may leave out what a command is about


def parsed(line: str, whole: bool = True) -> None:
    "Parse a command as the command line would; raises what typer raises"
    words = [re.sub('^N$', '1', word) for word in shlex.split(line)]
    if words[0].startswith('-'):
        GROUP.make_context('saeexplainer', words, resilient_parsing=True)
        return
    command = COMMANDS.get(words[0])
    if command is None: raise LookupError(f'there is no command {words[0]!r}')
    if len(words) == 1 and not whole: return
    try: command.make_context(words[0], [word for word in words[1:] if word not in ('--help', '-h')])
    except Exception as error:
        if whole or type(error).__name__ != 'MissingParameter': raise


def without_shell(line: str) -> str:
    "A command without pipes, comments and continued lines"
    return SHELL.sub('', line.replace('\\\n', ' ')).strip()


# ---- where they stand

def text_of(node) -> str:
    "A string of a source; X for what an f-string puts in"
    if isinstance(node, ast.Constant): return node.value if isinstance(node.value, str) else ''
    if isinstance(node, ast.JoinedStr): return ''.join(text_of(part) for part in node.values)
    return 'X'


def strings_of(source: str) -> list[str]:
    "Strings of a module, f-strings in one piece, without docstrings of one"
    tree = ast.parse(source)
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)} - {
        id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)}
    nodes = (node for node in ast.walk(tree) if isinstance(node, (ast.Constant, ast.JoinedStr)))
    return [text_of(node) for node in nodes if id(node) not in inner]


def in_source(file: Path) -> list[Named]:
    "Commands in the strings of a module"
    place = str(file.relative_to(ROOT))
    lines = []
    for text in strings_of(file.read_text(encoding='utf-8')):
        lines += BY_ITSELF.findall(text) + IN_MESSAGE.findall(BY_ITSELF.sub('', text))
    return [Named(place, line, ' ' in line) for line in lines]


def in_prose(place: str, text: str) -> list[Named]:
    "Commands in backticks, and on lines of their own in blocks of code"
    blocks = re.findall(r'^```.*?$(.*?)^```', text, re.M | re.S)
    rest = re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)
    found = [Named(place, line, False) for line in BY_ITSELF.findall(rest)]
    for block in blocks: found += [Named(place, line) for line in IN_BLOCK.findall(block.replace('\\\n', ' '))]
    return found


def in_notebook(file: Path) -> list[Named]:
    "Commands in the prose of a page, and in its shell cells"
    place = str(file.relative_to(ROOT))
    found = []
    for cell in json.loads(file.read_text(encoding='utf-8'))['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown': found += in_prose(place, text)
        else: found += [Named(place, line) for line in re.findall(r'^!saeexplainer (.+)$', text, re.M)]
    return found


def named() -> list[Named]:
    "All commands that a reader or a user meets"
    found = []
    for command in COMMANDS.values():
        lines = re.findall(r'\[b\]saeexplainer (.+?)\[/b\]', command.epilog or '')
        assert lines, f'{command.name} has no example'
        found += [Named(f'{command.name} --help', line) for line in lines]
    found += [Named('--help', line) for line in re.findall(r'\[b\]saeexplainer (.+?)\[/b\]', GROUP.epilog)]
    for file in sorted((ROOT/'saeexplainer').rglob('*.py')):
        if file.name != '_modidx.py': found += in_source(file)
    for file in sorted([*ROOT.glob('*.md'), *(ROOT/'data').rglob('*.md'), *(ROOT/'.github').rglob('*.md')]):
        found += in_prose(str(file.relative_to(ROOT)), file.read_text(encoding='utf-8'))
    for file in sorted((ROOT/'nbs').rglob('*.ipynb')): found += in_notebook(file)
    makefile = (ROOT/'Makefile').read_text(encoding='utf-8')
    found += [Named('Makefile', re.sub(r'\$\(\w+\)', '', line)) for line in IN_BLOCK.findall(makefile)]
    shortened = {Named(one.place, without_shell(one.line), one.whole) for one in found}
    return sorted(shortened, key=lambda one: (one.place, one.line))


NAMED = [one for one in named() if '...' not in one.line and '|' not in one.line]


# ---- tests

@pytest.mark.parametrize('one', NAMED, ids=[f'{one.place}: {one.line}' for one in NAMED])
def test_a_command_that_is_named_exists(one):
    try: parsed(one.line, one.whole)
    except Exception as error: pytest.fail(f'{one.place} names `saeexplainer {one.line}`: {error}')


def test_they_are_found():
    "In help, messages, README and pages"
    places = {one.place for one in NAMED}
    some = {'explain --help', 'saeexplainer/cli.py', 'saeexplainer/selection.py', 'README.md', 'Makefile',
            'nbs/recipes/your_own_sae.ipynb'}
    assert some <= places
    assert len(NAMED) > 100


@pytest.mark.parametrize('line, says', [
    ('expalin 5', "there is no command 'expalin'"),
    ('explain 5 --verfiy 10', 'verfiy'),
    ('explain --random many', 'valid integer'),
    ('evaluate', 'Missing parameter: file'),
    ('run --dry-run', 'Missing parameter: preset')])
def test_one_that_does_not_exist_is_noticed(line, says):
    with pytest.raises(Exception, match=says): parsed(line)


def test_prose_may_leave_out_what_a_command_is_about():
    parsed('run --dry-run', whole=False)
    with pytest.raises(Exception, match='dryrun'): parsed('run --dryrun', whole=False)
