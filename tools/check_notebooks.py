"""Run notebooks, each in a process of its own, and compare what they show with the outputs stored in them.

Without options they run in a scratch copy, and any failure or stale output fails the check. With `--update` they run in
place and the new outputs are stored, except where the stored one still says the same, so that a second update changes
nothing.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from compare import cell_difference
from snapshot import ROOT, snapshot

RUNNER = Path(__file__).resolve().with_name('run_notebook.py')
RUNNING = set()  # processes, to be stopped with this one
BUDGET = 12*60  # seconds, all notebooks together on 2 cores
ENV = dict(IN_TEST='1', TQDM_DISABLE='1', HF_HUB_DISABLE_PROGRESS_BARS='1', HF_HUB_DISABLE_TELEMETRY='1',
           TOKENIZERS_PARALLELISM='false', WANDB_MODE='disabled', COLUMNS='120', LINES='40',
           MPLBACKEND='module://matplotlib_inline.backend_inline')
CORES = os.cpu_count() or 1


# --- one notebook

def environment(root, own, args):
    "Return the environment of a notebook: no settings and no history of the one who runs it, which lie in `own`"
    env = {**os.environ, **ENV, 'PYTHONPATH': str(root)}
    env.update(IPYTHONDIR=own, JUPYTER_DATA_DIR=own, JUPYTER_CONFIG_DIR=own)
    env.setdefault('OMP_NUM_THREADS', str(max(1, CORES//args.workers)))
    if not args.flags: env.setdefault('HF_HUB_OFFLINE', '1')  # an unflagged cell must not need the network
    return env


def run(path, root, target, args):
    "Run the notebook at `path` and write it to `target`; return what went wrong, or None"
    command = [sys.executable, '-P', RUNNER, path, target, *args.flags.split()]
    env = environment(root, f'{target}.jupyter', args)
    process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)
    RUNNING.add(process)
    try:
        said, _ = process.communicate(timeout=args.timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f'stopped after {args.timeout:.0f} seconds: mark its long cells `#| slow`, or raise --timeout'
    finally:
        RUNNING.discard(process)
    if process.returncode < 0:
        return f'its process died of {signal.Signals(-process.returncode).name}\n{said[-2000:]}'
    return said[-6000:] if process.returncode else None


def merge(old, new):
    """Put the stored outputs back into the cells of `new` where they still say the same

    Return (cell id, what differs) of the others.
    """
    stale = []
    for before, after in zip(old['cells'], new['cells'], strict=True):
        if before['cell_type'] != 'code': continue
        if why := cell_difference(before, after): stale.append((after['id'], why))
        elif 'live' not in after['metadata'].get('tags', []): after['outputs'] = before['outputs']
    return stale


def read(path): return json.loads(path.read_text(encoding='utf-8'))


def write(nb, path):
    "Write a notebook as nbformat and nbdev do; to import nbformat takes a second"
    path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


@dataclass
class Report:
    "What became of a notebook"
    failure: str|None = None
    stale: tuple|list = ()  # (cell id, what differs)
    updated: bool = False  # whether what differs was stored

    @property
    def good(self): return not self.failure and (self.updated or not self.stale)

    @property
    def verdict(self):
        if self.failure: return 'FAILED'
        if not self.stale: return 'ok'
        return 'updated' if self.updated else 'STALE'

    @property
    def details(self):
        if self.failure: return [self.failure]
        return [f'           cell {cell}: {why}' for cell, why in self.stale]


def checked(path, root, target, args):
    "Run one notebook, compare it, and store what it shows if that was asked for"
    old = read(path)
    if failure := run(path, root, target, args): return Report(failure)
    new = read(target)
    stale = merge(old, new)
    if args.update: write(new, path)
    return Report(None, stale, args.update)


def one(name, root, folder, args):
    "Check one notebook and print its report; return whether it is good"
    start = time.time()
    report = checked(root/name, root, Path(folder)/name.replace('/', '_'), args)
    head = f'{time.time() - start:6.1f} s  {report.verdict:8} {name}'
    print('\n'.join([head, *report.details]), flush=True)
    return report.good


# --- all of them

def notebooks(root):
    "Return all notebooks of the project, chapters first: they take longest"
    hidden = ('.', '_')
    found = [path for path in (root/'nbs').rglob('*.ipynb')
             if not any(part.startswith(hidden) for part in path.relative_to(root).parts)]
    return sorted(found, key=lambda path: (len(path.parts), path))


def check_all(names, root, folder, args):
    "Check notebooks, several at a time; return the names of those that are not good"
    with ThreadPoolExecutor(args.workers) as pool:
        jobs = {pool.submit(one, name, root, folder, args): name for name in names}
        try:
            return [jobs[job] for job in as_completed(jobs) if not job.result()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING): os.killpg(process.pid, signal.SIGKILL)


def stop(*_): sys.exit(143)


def main(args, root=ROOT):
    "Check the notebooks and say how it went; return whether something is wrong"
    start = time.time()
    signal.signal(signal.SIGTERM, stop)  # so that the notebooks' processes and the scratch copy go too
    with (nullcontext(root) if args.update else snapshot(root)) as where, tempfile.TemporaryDirectory() as folder:
        paths = [where/Path(path).resolve().relative_to(root) for path in args.notebooks] or notebooks(where)
        names = [str(path.relative_to(where)) for path in paths]
        bad = check_all(names, where, folder, args)
    total = time.time() - start
    over = f', over the budget of {BUDGET} s' if total > BUDGET else ''
    print(f'{len(names)} notebooks in {total:.0f} s{over}')
    if bad:
        print(f'{len(bad)} not good: {", ".join(bad)}; after a look, `make notebooks NB=...` stores what they show now')
    return bool(bad)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('notebooks', nargs='*', help='default: all')
    parser.add_argument('--update', action='store_true', help='run in place and store the outputs')
    parser.add_argument('--flags', default='', help='also run cells with these flags, such as "slow"')
    parser.add_argument('--timeout', type=float, default=600, help='seconds per notebook')
    parser.add_argument('--workers', type=int, default=min(4, CORES), help='notebooks at a time; they share the cores')
    return parser.parse_args(argv)


if __name__ == '__main__': sys.exit(main(arguments()))
