"""Is what is generated in step with its notebooks? `check_sync.py export | readme | clean`: redo it in a scratch copy, report what changes."""
import difflib, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

from snapshot import ROOT, changed, snapshot

def export(copy):
    "nbdev_export from nothing, so that modules whose notebook is gone show up too"
    cfg = ConfigParser(interpolation=None)
    cfg.read(copy/'settings.ini', encoding='utf-8')
    for o in (copy/cfg['DEFAULT']['lib_path']).rglob('*.py'):
        if o.name != '__init__.py': o.unlink()
    command(copy, 'nbdev_export')

def readme(copy): command(copy, 'python', 'tools/readme.py')

def clean(copy): command(copy, 'nbdev_clean')

def command(copy, name, *args): subprocess.run([Path(sys.executable).with_name(name), *args], cwd=copy, check=True)

CHECKS = {'export': (export, 'make export'), 'readme': (readme, 'make export'), 'clean': (clean, 'make clean-nbs')}

def diff(old, new, name, lines=12):
    "The first lines of a diff of two text files"
    old, new = (o.read_text(encoding='utf-8').splitlines() for o in (old, new))
    return '\n'.join(list(difflib.unified_diff(old, new, name, f'{name} (redone)', lineterm='', n=1))[:lines])

def main(name, root=ROOT):
    redo, remedy = CHECKS[name]
    with snapshot(root) as copy:
        redo(copy)
        bad = changed(root, copy)
        for o, what in bad:
            print(f'{o}: {what}')
            if what == 'differs' and Path(o).suffix != '.png': print(diff(root/o, copy/o, o))
    print(f'{len(bad)} files out of step; `{remedy}` mends it' if bad else 'in step')
    return bool(bad)

if __name__ == '__main__': sys.exit(main(sys.argv[1]))
