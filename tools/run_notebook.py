"""Run one notebook in a Jupyter kernel and write it, with its outputs, to another file: the process that check_notebooks.py starts per notebook.

Cells marked `#| eval: false`, and those with a flag of `tst_flags` in settings.ini that was not asked for, are not run and keep their outputs.
A cell that fails, or that writes to stderr where a reader would see a red box, fails the notebook.
"""
import asyncio, os, signal, sys
from pathlib import Path

import nbformat
from fastcore.ansi import strip_ansi
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import extract_directives

WIDGET = 'application/vnd.jupyter.widget-view+json'
KERNEL = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}

# Processes that a cell starts write to file descriptor 2, which a thread of the kernel reads. A cell is not done before it has read all of it,
# up to a zero byte of our own.
SETTLE = """
def _settle(*_, os=__import__('os'), sys=__import__('sys'), threading=__import__('threading')):
    arrived = threading.Event()
    write = sys.stderr.write
    def write_up_to_mark(text):
        if text.replace('\\0', ''): write(text.replace('\\0', ''))
        if '\\0' in text: arrived.set()
    sys.stderr.write = write_up_to_mark
    os.write(2, b'\\0')
    arrived.wait(10)
    del sys.stderr.write
get_ipython().events.register('post_run_cell', _settle)
del _settle
"""

def skipped(cell, skip_flags):
    "Return whether a cell is not run"
    directives = extract_directives(cell, remove=False)
    return directives.get('eval:', [''])[0].lower() == 'false' or bool(skip_flags & directives.keys()) or 'nbdev_export(' in cell.source

def stderr_of(cell):
    "Return what a cell wrote to stderr"
    return ''.join(o.text for o in cell.outputs if o.output_type == 'stream' and o.name == 'stderr')

def kept(outputs):
    "Return the outputs of a cell that outlive its kernel: no widgets, which are progress bars, and each stream in one piece, not in as many as time has it"
    whole = []
    for output in outputs:
        if WIDGET in output.get('data', {}) and 'text/html' not in output.data: continue
        same = whole and output.output_type == whole[-1].output_type == 'stream' and output.name == whole[-1].name
        if same: whole[-1].text += output.text
        else: whole.append(output)
    return whole

def kernel_end(client):
    "Return in words how a dead kernel ended"
    code = asyncio.run(client.km.provisioner.poll()) or 0
    return f'died of {signal.Signals(-code).name}' if code < 0 else f'ended with exit code {code}'

def run_cells(client, skip_flags):
    "Run the cells of `client.nb` in their order until one fails; return what went wrong, a text each"
    wrong = []
    with client.setup_kernel():
        client.kc.execute(SETTLE, silent=True, store_history=False)
        for index, cell in enumerate(client.nb.cells):
            if cell.cell_type != 'code' or skipped(cell, skip_flags): continue
            try: client.execute_cell(cell, index)
            except DeadKernelError: return [*wrong, f'cell {cell.id}: its kernel {kernel_end(client)}\n{cell.source}']
            except CellExecutionError as error: return [*wrong, f'cell {cell.id}: {strip_ansi(str(error))}']
            cell.outputs = kept(cell.outputs)
            if said := stderr_of(cell): wrong.append(f'cell {cell.id} writes to stderr: {said}')
    return wrong

def run(source, target, flags=()):
    "Run notebook `source` in its own folder and write it to `target`; where something goes wrong, print it and return False"
    cfg = get_config()
    nb = nbformat.read(source, as_version=4)
    client = NotebookClient(nb, kernel_name=KERNEL['name'], timeout=None, startup_timeout=300, iopub_timeout=60, raise_on_iopub_timeout=True,
                            store_widget_state=False, record_timing=False, shutdown_kernel='immediate',
                            resources={'metadata': {'path': str(source.parent)}})
    wrong = run_cells(client, set(cfg.tst_flags.split()) - set(flags))
    if wrong:
        print('\n'.join(wrong), file=sys.stderr)
        return False
    nb.metadata = nbformat.from_dict({**nb.metadata, 'kernelspec': KERNEL})
    clean_nb(nb, allowed_cell_metadata_keys=cfg.allowed_cell_metadata_keys.split(), clean_ids=cfg.clean_ids)
    nbformat.write(nb, target)
    return True

if __name__ == '__main__':
    source, target, *flags = sys.argv[1:]
    source, target = Path(source).resolve(), Path(target).resolve()
    os.chdir(source.parent) # where nbdev looks for settings.ini
    sys.exit(not run(source, target, flags))
