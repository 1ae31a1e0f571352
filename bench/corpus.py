"""Reading all features of an SAE in one pass over a corpus, against its floor and two other ways to the same table.

    python bench/corpus.py [--corpus embedded] [--tokens 40000] [--repeats 2] [--cpu-time] [--json FILE]

(a) the pass as it runs;
(b) its floor: truncated forward and full encode of the same batches, nothing kept;
(c) one pass per feature, with one encoder column each: timed for one feature on a quarter of the batches, times all;
(d) all activations cached, dense, and the strongest documents of each feature sought in the cache.

(a) and (b) take turns in one process, then (c) and (d) are timed once. Recorded are the ratios of seconds, theirs to
those of (a), and on a CPU two ratios of memory; printed are tokens per second, and what the whole corpus would take.
Fails where (a) does not reach --least of (b), where the pass takes more memory than its formula allows over a forward
pass of the target, or where (d) finds other maxima.
"""
import resource, statistics, sys, tempfile, threading, time
from collections import namedtuple
from pathlib import Path
import numpy as np
import torch
from record import finish, model_options, row, timed
from saeexplainer.presets import load_preset
from saeexplainer.sources.reading import (
    CorpusReading, batch_bytes, corpus_documents, document_batches, read_corpus, reading_settings, state_bytes,
    window_residuals,
)
from saeexplainer.target import Target

WHAT = 'reading a corpus for all features in one pass'
Text = namedtuple('Text', 'docs batches ends') # documents; batches of windows; tokens up to the end of each document


def arguments():
    parser = model_options(__doc__)
    parser.add_argument('--corpus', default='embedded')
    parser.add_argument('--tokens', type=int, default=40_000)
    parser.add_argument('--repeats', type=int, default=2)
    parser.add_argument('--least', type=float, default=.7, help='the share of the floor that the pass must reach')
    return parser.parse_args()


def read_text(target, args, preset): # -> Text
    "Return a sample of all sources of a corpus, and the batches in which the pass reads it"
    docs = list(corpus_documents(args.corpus, preset.corpus_tokens, target.tokenizer))
    docs = [docs[i] for i in np.random.default_rng(0).permutation(len(docs))]
    reading = CorpusReading.empty(reading_settings(target, tokens=args.tokens))
    read = list(document_batches(docs, reading, target.tokenizer))
    batches = [[window for _, _, windows in batch for window in windows] for batch in read]
    sizes = [sum(map(len, windows)) for batch in read for _, _, windows in batch]
    ends = np.cumsum([size for size in sizes if size]).tolist()
    return Text(docs, batches, ends)

def tokens_in(batch): # of windows -> int
    return sum(map(len, batch))


# ---- the ways

def one_pass(target, text, tokens, folder): # (a) -> reading
    file = Path(tempfile.mkdtemp(dir=folder))/'reading.npz'
    return read_corpus(target, text.docs, file, tokens=tokens, progress=False)

def floor(target, batches): # (b)
    for windows in batches: target.reader.encode(window_residuals(target, windows))

def one_feature(target, batches): # (c)
    for windows in batches: target.reader.activations(window_residuals(target, windows)[None], [0])

def cache_everything(target, text): # (d) -> (maxima of the features, bytes of the cache)
    acts = torch.cat([target.reader.encode(window_residuals(target, windows)) for windows in text.batches])
    best = torch.stack([of_document.amax(0) for of_document in acts.tensor_split(text.ends[:-1])])
    return best.topk(min(32, len(best)), dim=0).values[0].cpu().numpy(), acts.nbytes


class Memory:
    "The largest resident size of this process within a `with`, over that at its beginning; Linux"
    def __enter__(self):
        self.before = self.now()
        self.most = 0
        self.open = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def now(self): # -> bytes
        return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()

    def watch(self):
        while self.open:
            self.most = max(self.most, self.now() - self.before)
            time.sleep(.002)

    def __exit__(self, *_):
        self.open = False
        self.thread.join()


# ---- what is measured

def measure_memory(target, text, tokens, folder): # -> (reading, bytes of a forward pass, bytes of (a))
    "Look at this process while it runs the longest batches, and then the whole pass"
    with Memory() as memory:
        for windows in sorted(text.batches, key=len)[-3:]: window_residuals(target, windows)
        forward = memory.most # what the target itself needs
        reading = one_pass(target, text, tokens, folder)
    assert reading.n_tokens == text.ends[-1]
    return reading, forward, memory.most

def measure_pass(target, text, args, folder): # -> (seconds of (a), of (b))
    passes = []
    floors = []
    for _ in range(args.repeats):
        passes.append(timed(lambda: one_pass(target, text, args.tokens, folder), args.clock)[0])
        floors.append(timed(lambda: floor(target, text.batches), args.clock)[0])
    return statistics.median(passes), statistics.median(floors)

def measure_feature(target, text, clock): # -> seconds of (c) for one feature and the whole text
    some = text.batches[:max(1, len(text.batches)//4)]
    seconds, _ = timed(lambda: one_feature(target, some), clock)
    return seconds * text.ends[-1]/sum(map(tokens_in, some))

def measure_cache(target, text, clock, true): # true: maxima -> (seconds of (d), bytes of the cache)
    seconds, (maxima, cached) = timed(lambda: cache_everything(target, text), clock)
    assert np.allclose(maxima, true, rtol=1e-4, atol=1e-4), 'the cache holds other maxima'
    return seconds, cached

def show(seconds, memory, n, whole): # seconds and bytes of each way; tokens that were read, and of the whole corpus
    "Print a table of the four ways"
    print(f'{"":28}{"tokens/s":>9}{"whole corpus":>15}{"memory for it":>16}')
    for name, spent in seconds.items():
        size = f'{memory[name]/1e9:13.2f} GB' if name in memory else ''
        print(f'{name:28}{n/spent:9,.3g}{spent/n*whole/3600:13,.1f} h{size}')


def main():
    args = arguments()
    preset = load_preset(args.preset)
    target = Target.load(preset)
    text = read_text(target, args, preset)
    n = text.ends[-1]
    n_features = target.reader.n_features
    whole = preset.corpus_tokens

    with tempfile.TemporaryDirectory() as folder:
        reading, forward, peak = measure_memory(target, text, args.tokens, folder)
        ours, its_floor = measure_pass(target, text, args, folder)
    all_features = measure_feature(target, text, args.clock)*n_features
    cache, cached = measure_cache(target, text, args.clock, reading.max_act)
    cached_whole = cached/n*whole

    print(f'{n:,} tokens in {len(text.ends)} documents of {args.corpus}; {n_features:,} features at layer '
          f'{target.reader.layer}; to the whole corpus of {whole:,} tokens:')
    seconds = {'(a) one pass': ours, '(b) its floor': its_floor, '(c) a pass per feature': all_features,
               '(d) everything cached': cache}
    show(seconds, {'(a) one pass': peak, '(d) everything cached': cached_whole}, n, whole)

    rows = [row(WHAT, 'truncated forward + full encode alone (the floor)', its_floor/ours, args.least),
            row(WHAT, f'one pass for each of {n_features:,} features (extrapolated)', all_features/ours, 100),
            row(WHAT, 'caching all activations', cache/ours, .7)]
    if target.model.device.type == 'cpu': # what is measured is this process' memory
        largest = max(map(tokens_in, text.batches))
        allowed = forward + state_bytes(n_features) + batch_bytes(n_features, largest)
        rows += [row('memory of the pass: what its formula allows', 'its measured peak', allowed/max(peak, 1), 1),
                 row('memory of caching all activations, whole corpus', 'measured peak of the pass',
                     cached_whole/max(peak, 1), 10)]
    return finish(rows, args.json)


if __name__ == '__main__': sys.exit(main())
