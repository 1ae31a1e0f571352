"""A dictionary explained by workers on a Ray cluster: two against one, and one against this process.

    python bench/ray_workers.py [--preset smollm2-135m] [--features 200] [--batch 20] [--tokens 16] [--repeats 1]
                                [--json FILE]

The same batches of features, in float32, three ways: in this process, by one worker, by two; each with one thread. The
rates are those of the batches alone, from when all workers have loaded their models and made a first row. For the time
of a whole command, add the seconds until then, which are printed. The rows must be the same.
Recorded are the ratios of rates: two workers to one (fails below 1.7), one worker to this process (fails below .9). A
machine with less than two free cores fails.
"""
import os
os.environ['OMP_NUM_THREADS'] = '1' # before anything that computes is imported
import statistics, sys, tempfile, time
from functools import partial
from pathlib import Path
import torch
from record import finish, model_options, row
from saeexplainer.dictionaries import _explaining, _Work
from saeexplainer.executor import PlainExecutor, RayExecutor
from saeexplainer.explainer import shipped_explainer
from saeexplainer.presets import load_preset
from saeexplainer.saes import FeatureReader


def arguments():
    parser = model_options(__doc__)
    parser.add_argument('--features', type=int, default=200)
    parser.add_argument('--batch', type=int, default=20)
    parser.add_argument('--tokens', type=int, default=16, help='of an explanation, at most')
    parser.add_argument('--repeats', type=int, default=1)
    return parser.parse_args()


def batches_of(preset, args): # -> lists of features that have a direction
    "Return as many features as are wanted, in batches"
    weights = FeatureReader.load(preset).sae.W_dec
    alive = (weights != 0).any(-1).nonzero().flatten().tolist()[:args.features]
    return [alive[i:i + args.batch] for i in range(0, len(alive), args.batch)]

def started_together(folder, n_workers, work, batch): # -> worker
    "Make a worker, run it once, and wait until all are that far"
    worker = _explaining(work)
    worker(batch)
    (folder/str(os.getpid())).touch()
    while len(list(folder.iterdir())) < n_workers: time.sleep(.01)
    return worker

def rate(executor, n_workers, work, batches): # -> (features a second, seconds until all are ready, rows by feature)
    "Explain the batches; the time counts from when all workers are ready"
    began = time.time()
    rows = {}
    with executor, tempfile.TemporaryDirectory() as folder:
        make = partial(started_together, Path(folder), n_workers, work, batches[0][:2])
        for _, made in executor.map(make, batches): rows |= {one['index']: one['explanation'] for one in made}
        ended = time.time()
        ready = max(file.stat().st_mtime for file in Path(folder).iterdir())
    return len(rows)/(ended - ready), ready - began, rows


def main():
    args = arguments()
    torch.set_num_threads(1)
    preset = load_preset(args.preset, dtype='float32', device='cpu', explanation_tokens=args.tokens)
    work = _Work(preset, shipped_explainer(preset), None, n=0, known={}, progress=False)
    batches = batches_of(preset, args)
    rates = {name: [] for name in ('here', 'one', 'two')}
    for _ in range(args.repeats):
        ways = dict(here=(PlainExecutor(), 1), one=(RayExecutor(1), 1), two=(RayExecutor(2), 2))
        found = {}
        for name, (executor, n_workers) in ways.items():
            speed, until_ready, found[name] = rate(executor, n_workers, work, batches)
            rates[name].append(speed)
            print(f'{name:4}: {speed:.2f} features/s; ready after {until_ready:.0f} s')
        if not found['here'] == found['one'] == found['two']: sys.exit('the rows differ')
    here, one, two = (statistics.median(rates[name]) for name in ('here', 'one', 'two'))
    return finish([
        row('explaining a dictionary by two workers on Ray, of one thread each', 'by one of them', two/one, 1.7),
        row('explaining a dictionary by one worker on Ray', 'in this process, by one thread', one/here, .9)], args.json)


if __name__ == '__main__': sys.exit(main())
