"""Is what is generated in step with its notebooks? `check_sync.py export | readme | clean`

It is made anew in a scratch copy, and what changes there is reported.
"""
import difflib
import subprocess
import sys
from configparser import ConfigParser
from itertools import islice
from pathlib import Path

from snapshot import ROOT, changed, snapshot


def command(copy, name, *args):
    "Run a command of this environment in the copy"
    subprocess.run([Path(sys.executable).with_name(name), *args], cwd=copy, check=True)


def export(copy):
    "Export the modules from nothing, so that one whose notebook is gone shows up too"
    cfg = ConfigParser(interpolation=None)
    cfg.read(copy/'settings.ini', encoding='utf-8')
    for file in (copy/cfg['DEFAULT']['lib_path']).rglob('*.py'):
        if file.name != '__init__.py': file.unlink()
    command(copy, 'nbdev_export')


def readme(copy): command(copy, 'python', 'tools/readme.py')


def clean(copy): command(copy, 'nbdev_clean')


CHECKS = {'export': (export, 'make export'), 'readme': (readme, 'make export'), 'clean': (clean, 'make clean-nbs')}


def diff(old, new, name, lines=12):
    "Return the first lines of a diff of two text files"
    old, new = (file.read_text(encoding='utf-8').splitlines() for file in (old, new))
    return '\n'.join(islice(difflib.unified_diff(old, new, name, f'{name} (redone)', lineterm='', n=1), lines))


def main(name, root=ROOT):
    "Redo one kind of file and print what differs; return whether something does"
    redo, remedy = CHECKS[name]
    with snapshot(root) as copy:
        redo(copy)
        bad = changed(root, copy)
        for file, what in bad:
            print(f'{file}: {what}')
            if what == 'differs' and Path(file).suffix != '.png': print(diff(root/file, copy/file, file))
    print(f'{len(bad)} files out of step; `{remedy}` mends it' if bad else 'in step')
    return bool(bad)


if __name__ == '__main__': sys.exit(main(sys.argv[1]))
