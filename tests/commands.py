"Commands of the command line as a test gives them: what they print, and how they end"
import json
import pytest
import typer
from saeexplainer.cli import app, arguments, main


def printed(capsys, *args) -> str:
    "What a command writes on stdout"
    main(list(args))
    return capsys.readouterr().out


def printed_json(capsys, *args): return json.loads(printed(capsys, *args, '--json'))


def ends(capsys, *args) -> tuple:
    "(exit code, the one line on stderr)"
    with pytest.raises(SystemExit) as e: main(list(args))
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert 'Traceback' not in lines[0]
    return e.value.code, lines[0]


def parsed(words):
    "Read a command with its options, and do nothing; raises an error for one that does not exist"
    program, name, *options = words
    assert program == 'saeexplainer'
    command = typer.main.get_command(app).commands[name]
    return command.make_context(name, arguments([name, *options])[1:])
