"""Run one notebook top to bottom and write it, with its outputs, to another file: the process that check_notebooks.py starts per notebook.

Cells marked `#| eval: false`, and those with a flag of `tst_flags` in settings.ini that was not asked for, are not run and keep their outputs.
"""
import os, sys
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import extract_directives

KERNEL = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}

def skipped(cell, skip_flags):
    "Whether a cell is not run"
    directives = extract_directives(cell, remove=False)
    return directives.get('eval:', [''])[0].lower() == 'false' or bool(skip_flags & directives.keys()) or 'nbdev_export(' in cell.source

def run(source, target, flags=()):
    "Run notebook `source` in its own folder and write it to `target`; the traceback is printed and False returned where a cell fails"
    cfg = get_config()
    nb = read_nb(source)
    shell = CaptureShell(source, mpl_format='png')
    skip_flags = set(cfg.tst_flags.split()) - set(flags)
    for cell in nb.cells:
        if cell.cell_type != 'code' or skipped(cell, skip_flags): continue
        cell.outputs = []
        shell.cell(cell)
        if shell.exc:
            print(f'cell {cell.id}:\n{cell.source}\n\n{shell.prettytb(fname=source.name)}', file=sys.stderr)
            return False
        # warnings and progress bars name paths and times of this machine
        cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
    nb.metadata = {**nb.metadata, 'kernelspec': KERNEL}
    clean_nb(nb, allowed_cell_metadata_keys=cfg.allowed_cell_metadata_keys.split(), clean_ids=cfg.clean_ids)
    write_nb(nb, target)
    return True

if __name__ == '__main__':
    source, target, *flags = sys.argv[1:]
    source, target = Path(source).resolve(), Path(target).resolve()
    os.chdir(source.parent)
    sys.exit(not run(source, target, flags))
