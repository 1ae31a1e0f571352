"""What the driver of a cluster carries at most: rows a second into its store, and does its memory stay flat?

    python bench/driver.py [--features 100000] [--workers 200] [--json FILE]

The driver is the real one: `sample_candidates`, and a run's store on this disk. The workers are a simulation: each has
two batches in flight, and answers at once, in random order, with K texts for each feature. What is measured is the rate
at which rows are stored; a real cluster is slower wherever its workers are. A row that is lost, or there twice, ends
the script. The ratio is the resident memory after a tenth of the features to the largest of all readings after it: 1 is
flat. Fails below .95. The list of features itself takes some 100 bytes for each, and is there from the beginning.
"""
import random, sys, tempfile, time
from itertools import islice
from pathlib import Path
from record import finish, options, row
from requests_queue import resident
from saeexplainer.prefs import sample_candidates
from saeexplainer.presets import load_preset
from saeexplainer.store import RunStore

STAGE = 'round1'


class SimulatedCluster:
    "Workers that answer at once, in any order"
    def __init__(self, workers, k):
        self.room = 2*workers # batches in flight
        self.k = k

    def map(self, make_worker, batches):
        rng = random.Random(0)
        batches = iter(batches)
        flying = list(islice(batches, self.room))
        while flying:
            place = rng.randrange(len(flying))
            flying[place], flying[-1] = flying[-1], flying[place]
            batch = flying.pop()
            yield batch, [(STAGE, feature, k, f'the word {feature}') for feature in batch for k in range(self.k)]
            flying += islice(batches, 1)


class Watched:
    "A store that notes the memory after each twentieth of the features"
    def __init__(self, store, features, k):
        self.store = store
        self.every = max(1, features*k//20)
        self.rows = 0
        self.readings = []

    def __getattr__(self, name): return getattr(self.store, name)

    def put_explanations(self, rows):
        before = self.rows//self.every
        self.store.put_explanations(rows)
        self.rows += len(rows)
        if self.rows//self.every > before: self.readings.append(resident())


def arguments():
    parser = options(__doc__)
    parser.add_argument('--features', type=int, default=100_000)
    parser.add_argument('--workers', type=int, default=200)
    return parser.parse_args()

def main():
    args = arguments()
    preset = load_preset('smollm2-135m')
    k = preset.n_candidates
    with tempfile.TemporaryDirectory() as folder, RunStore(f'{folder}/store.sqlite') as store:
        watched = Watched(store, args.features, k)
        cluster = SimulatedCluster(args.workers, k)
        began = time.perf_counter()
        sample_candidates(watched, None, None, range(args.features), preset, progress=True, executor=cluster)
        seconds = time.perf_counter() - began
        [(stored, distinct)] = store.rows('SELECT count(*), count(DISTINCT feature*100 + k) FROM explanations')
        megabytes = Path(f'{folder}/store.sqlite').stat().st_size/1e6
    if not stored == distinct == args.features*k: sys.exit(f'{stored} rows, {distinct} of them distinct')
    first, *later = watched.readings[1:]
    print(f'{stored:,} rows of {args.features:,} features from {args.workers} simulated workers in {seconds:.0f} s: '
          f'{stored/seconds:,.0f} rows/s, {megabytes:.0f} MB on disk; '
          f'memory {first:.0f} MB, later at most {max(later):.0f}')
    what = f'memory of the driver after a tenth of {args.features:,} features'
    result = row(what, 'its largest later', first/max(later), .95, per_second=round(stored/seconds))
    return finish([result], args.json)


if __name__ == '__main__': sys.exit(main())
