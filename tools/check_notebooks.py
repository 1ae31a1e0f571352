"""Run notebooks top to bottom, each in a process of its own, and compare what they show with the outputs stored in them.

Without options they run in a scratch copy, and any failure or stale output fails the check. With `--update` they run in place and the new
outputs are stored, except where the stored one still says the same, so that a second update changes nothing.
"""
import argparse, json, os, signal, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path

import nbformat
from compare import cell_difference
from snapshot import ROOT, snapshot

RUNNER = Path(__file__).resolve().with_name('run_notebook.py')
RUNNING = set()  # processes, to be stopped with this one
BUDGET = 12*60 # seconds, all notebooks together on 2 cores
ENV = dict(IN_TEST='1', TQDM_DISABLE='1', HF_HUB_DISABLE_PROGRESS_BARS='1', HF_HUB_DISABLE_TELEMETRY='1', TOKENIZERS_PARALLELISM='false',
           WANDB_MODE='disabled', COLUMNS='120', LINES='40', MPLBACKEND='module://matplotlib_inline.backend_inline')

def notebooks(root):
    "All notebooks of the project, chapters first: they take longest"
    found = (o for o in (root/'nbs').rglob('*.ipynb') if not any(p[0] in '._' for p in o.relative_to(root).parts))
    return sorted(found, key=lambda o: (len(o.parts), o))

def run(path, root, target, args):
    "Run the notebook at `path` and write it to `target`; what went wrong, or None"
    own = f'{target}.jupyter' # the kernel has no settings and no history of the one who runs this
    env = {**os.environ, **ENV, 'PYTHONPATH': str(root), 'IPYTHONDIR': own, 'JUPYTER_DATA_DIR': own, 'JUPYTER_CONFIG_DIR': own}
    env.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1)//args.workers)))
    if not args.flags: env.setdefault('HF_HUB_OFFLINE', '1') # an unflagged cell must not need the network
    process = subprocess.Popen([sys.executable, '-P', RUNNER, path, target, *args.flags.split()], env=env, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    RUNNING.add(process)
    try: said, _ = process.communicate(timeout=args.timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f'stopped after {args.timeout:.0f} seconds: mark its long cells `#| slow`, or raise --timeout'
    finally: RUNNING.discard(process)
    if process.returncode < 0: return f'its process died of {signal.Signals(-process.returncode).name}\n{said[-2000:]}'
    if process.returncode: return said[-6000:]

def merge(old, new):
    "Put the stored outputs back into the cells of `new` where they still say the same; [(cell id, what differs)] of the others"
    stale = []
    for a, b in zip(old['cells'], new['cells'], strict=True):
        if a['cell_type'] != 'code': continue
        if why := cell_difference(a, b): stale.append((b['id'], why))
        elif 'live' not in b['metadata'].get('tags', []): b['outputs'] = a['outputs']
    return stale

def one(name, root, folder, args):
    "Run one notebook and print its report; whether it is good"
    path, target, start = root/name, Path(folder)/name.replace('/', '_'), time.time()
    old = json.loads(path.read_text(encoding='utf-8'))
    failure, stale = run(path, root, target, args), []
    if not failure:
        new = json.loads(target.read_text(encoding='utf-8'))
        stale = merge(old, new)
        if args.update: nbformat.write(nbformat.from_dict(new), path)
    verdict = 'FAILED' if failure else 'updated' if stale and args.update else 'STALE' if stale else 'ok'
    details = [failure] if failure else [f'           cell {o}: {why}' for o, why in stale]
    print('\n'.join([f'{time.time() - start:6.1f} s  {verdict:8} {name}'] + details), flush=True)
    return not failure and (args.update or not stale)

def main(args, root=ROOT):
    start = time.time()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) # so that the notebooks' processes and the scratch copy go too
    with (nullcontext(root) if args.update else snapshot(root)) as where, tempfile.TemporaryDirectory() as folder:
        paths = [where/Path(o).resolve().relative_to(root) for o in args.notebooks] or notebooks(where)
        names = [str(o.relative_to(where)) for o in paths]
        with ThreadPoolExecutor(args.workers) as pool:
            jobs = {pool.submit(one, o, where, folder, args): o for o in names}
            try: bad = [jobs[o] for o in as_completed(jobs) if not o.result()]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(RUNNING): os.killpg(process.pid, signal.SIGKILL)
    total = time.time() - start
    print(f'{len(names)} notebooks in {total:.0f} s' + (f', over the budget of {BUDGET} s' if total > BUDGET else ''))
    if bad: print(f'{len(bad)} not good: {", ".join(bad)}; after a look, `make notebooks NB=...` stores what they show now')
    return bool(bad)

def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('notebooks', nargs='*', help='default: all')
    parser.add_argument('--update', action='store_true', help='run in place and store the outputs')
    parser.add_argument('--flags', default='', help='also run cells with these flags, such as "slow"')
    parser.add_argument('--timeout', type=float, default=600, help='seconds per notebook')
    parser.add_argument('--workers', type=int, default=min(4, os.cpu_count() or 1), help='notebooks at a time; they share the cores')
    return parser.parse_args(argv)

if __name__ == '__main__': sys.exit(main(arguments()))
