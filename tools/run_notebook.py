"""Run one notebook in a Jupyter kernel and write it, with its outputs, to another file

check_notebooks.py starts this process for each notebook. Cells marked `#| eval: false`, and those with a flag of
`tst_flags` in settings.ini that was not asked for, are not run and keep their outputs. A cell that fails, or that
writes to stderr where a reader would see a red box, fails the notebook.
"""
import asyncio
import os
import signal
import sys
from pathlib import Path

# jsonschema, with which nbformat checks notebooks, builds the grammar of RFC 3987 when it is imported, where there is a
# package for that: four fifths of the time that this process needs to start, and no schema of a notebook asks for it
sys.modules.setdefault('rfc3987_syntax', None)
import nbformat
from fastcore.ansi import strip_ansi
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import extract_directives

WIDGET = 'application/vnd.jupyter.widget-view+json'
KERNEL = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}

# Processes that a cell starts write to file descriptor 2, which a thread of the kernel reads. A cell is not done before
# it has read all of it, up to a zero byte of our own.
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


# --- cells and their outputs

def skipped(cell, skip_flags):
    "Return whether a cell is not run"
    directives = extract_directives(cell, remove=False)
    if directives.get('eval:', [''])[0].lower() == 'false' or skip_flags & directives.keys(): return True
    return 'nbdev_export(' in cell.source


def stderr_of(cell):
    "Return what a cell wrote to stderr"
    return ''.join(o.text for o in cell.outputs if o.output_type == 'stream' and o.name == 'stderr')


def is_widget(output): return WIDGET in output.get('data', {}) and 'text/html' not in output.data


def same_stream(one, other): return one.output_type == other.output_type == 'stream' and one.name == other.name


def kept(outputs):
    """Return the outputs of a cell that outlive its kernel

    There are no widgets, which are progress bars, and each stream is in one piece, not in as many as time has it.
    """
    whole = []
    for output in outputs:
        if is_widget(output): continue
        if whole and same_stream(output, whole[-1]): whole[-1].text += output.text
        else: whole.append(output)
    return whole


# --- a notebook

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
            try:
                client.execute_cell(cell, index)
            except DeadKernelError:
                return [*wrong, f'cell {cell.id}: its kernel {kernel_end(client)}\n{cell.source}']
            except CellExecutionError as error:
                return [*wrong, f'cell {cell.id}: {strip_ansi(str(error))}']
            cell.outputs = kept(cell.outputs)
            if said := stderr_of(cell): wrong.append(f'cell {cell.id} writes to stderr: {said}')
    return wrong


def client_of(nb, folder):
    "Return what runs a notebook in `folder`"
    return NotebookClient(nb, kernel_name=KERNEL['name'], timeout=None, startup_timeout=300, iopub_timeout=60,
                          raise_on_iopub_timeout=True, store_widget_state=False, record_timing=False,
                          shutdown_kernel='immediate', resources={'metadata': {'path': str(folder)}})


def run(source, target, flags=()):
    "Run notebook `source` in its own folder and write it to `target`; print what went wrong, and return False"
    cfg = get_config()
    nb = nbformat.read(source, as_version=4)
    wrong = run_cells(client_of(nb, source.parent), set(cfg.tst_flags.split()) - set(flags))
    if wrong:
        print('\n'.join(wrong), file=sys.stderr)
        return False
    nb.metadata = nbformat.from_dict({**nb.metadata, 'kernelspec': KERNEL})
    clean_nb(nb, allowed_cell_metadata_keys=cfg.allowed_cell_metadata_keys.split(), clean_ids=cfg.clean_ids)
    nbformat.write(nb, target)
    return True


def main(source, target, *flags):
    source, target = (Path(name).resolve() for name in (source, target))
    os.chdir(source.parent)  # where nbdev looks for settings.ini
    return run(source, target, flags)


if __name__ == '__main__': sys.exit(not main(*sys.argv[1:]))
