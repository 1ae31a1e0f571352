"""Reading all features of an SAE in one pass over a corpus, against its floor and against two other ways to the same table.

    python bench/corpus.py [--corpus embedded] [--tokens 40000] [--repeats 2] [--cpu-time] [--json FILE]

(a) the pass as it runs; (b) its floor: truncated forward and full encode of the same batches, nothing kept; (c) one pass per feature, with one encoder
column each, timed for one and extrapolated to all; (d) all activations cached, dense, and the strongest documents of each feature sought in the cache.
(a) and (b) take turns in one process. Tokens per second, memory, and what the whole corpus would take. Fails where (a) does not reach --least of (b), where
the pass takes more memory than its formula allows over a forward pass of the target, or where (d) finds other maxima.
"""
import argparse, resource, statistics, sys, tempfile, threading, time
from pathlib import Path
import numpy as np, torch
from record import finish, row
from saeexplainer.presets import load_preset
from saeexplainer.sources.reading import CorpusReading, batch_bytes, corpus_documents, document_batches, read_corpus, reading_settings, state_bytes, window_residuals
from saeexplainer.target import Target


def floor(target, batches): # (b)
    for windows in batches: target.reader.encode(window_residuals(target, windows))

def one_feature(target, batches): # (c)
    for windows in batches: target.reader.activations(window_residuals(target, windows)[None], [0])

def cache_everything(target, batches, ends): # (d) ends of the documents -> (maxima of the features, bytes of the cache)
    acts = torch.cat([target.reader.encode(window_residuals(target, windows)) for windows in batches])
    best = torch.stack([part.amax(0) for part in acts.tensor_split(ends[:-1])])
    return best.topk(min(32, len(best)), dim=0).values[0].cpu().numpy(), acts.nbytes


class Memory: # largest resident size of this process so far, over that at its beginning; Linux
    def __enter__(self):
        self.now = lambda: int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()
        self.before, self.most, self.open = self.now(), 0, True
        self.thread = threading.Thread(target=self.watch); self.thread.start()
        return self
    def watch(self):
        while self.open: self.most = max(self.most, self.now() - self.before); time.sleep(.002)
    def __exit__(self, *_): self.open = False; self.thread.join()


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--preset', default='smollm2-135m'); p.add_argument('--corpus', default='embedded')
    p.add_argument('--tokens', type=int, default=40_000); p.add_argument('--repeats', type=int, default=2)
    p.add_argument('--least', type=float, default=.7, help='the share of the floor that the pass must reach')
    p.add_argument('--cpu-time', action='store_true', help="the process' own time instead of the wall's: for a busy machine")
    p.add_argument('--json', type=Path, help='append the rows here')
    a = p.parse_args()
    clock, preset = time.process_time if a.cpu_time else time.perf_counter, load_preset(a.preset)
    def timed(fn, *args):
        start = clock(); result = fn(*args)
        if torch.cuda.is_available(): torch.cuda.synchronize()
        return clock() - start, result

    target = Target.load(preset)
    docs, settings = list(corpus_documents(a.corpus, preset.corpus_tokens, target.tokenizer)), reading_settings(target, tokens=a.tokens)
    docs = [docs[i] for i in np.random.default_rng(0).permutation(len(docs))] # a sample of all sources
    read = list(document_batches(docs, CorpusReading.empty(settings), target.tokenizer))
    batches = [[w for _, _, windows in batch for w in windows] for batch in read]
    ends = np.cumsum([n for batch in read for _, _, windows in batch if (n := sum(map(len, windows)))]).tolist()
    n, F, largest = ends[-1], target.reader.n_features, max(sum(map(len, b)) for b in batches)

    with tempfile.TemporaryDirectory() as folder:
        one_pass = lambda name: read_corpus(target, docs, Path(folder)/f'{name}.npz', tokens=a.tokens, progress=False)
        with Memory() as memory:
            for windows in sorted(batches, key=len)[-3:]: window_residuals(target, windows)
            forward = memory.most # what the target itself needs
            reading = one_pass('memory')
        assert reading.n_tokens == n
        times = {'pass': [], 'floor': []}
        for i in range(a.repeats):
            times['pass'].append(timed(one_pass, i)[0]); times['floor'].append(timed(floor, target, batches)[0])
    seconds = {k: statistics.median(v) for k, v in times.items()}
    part = batches[:max(1, len(batches)//4)]
    seconds['feature'] = timed(one_feature, target, part)[0] * n/sum(len(w) for b in part for w in b)
    seconds['cache'], (maxima, cached) = timed(cache_everything, target, batches, ends)
    assert np.allclose(maxima, reading.max_act, rtol=1e-4, atol=1e-4), 'the cache holds other maxima'

    allowed = forward + state_bytes(F) + batch_bytes(F, largest)
    whole, hours = preset.corpus_tokens, lambda s: s/n * preset.corpus_tokens/3600
    print(f'{n:,} tokens in {len(ends)} documents of {a.corpus}; {F:,} features at layer {target.reader.layer}; to the whole corpus of {whole:,} tokens:')
    print(f'{"":28}{"tokens/s":>9}{"whole corpus":>15}{"memory for it":>16}')
    for name, s, size in (('(a) one pass', seconds['pass'], memory.most), ('(b) its floor', seconds['floor'], 0),
                          ('(c) a pass per feature', seconds['feature']*F, 0), ('(d) everything cached', seconds['cache'], cached/n*whole)):
        print(f'{name:28}{n/s:9,.3g}{hours(s):13,.1f} h' + (f'{size/1e9:13.2f} GB' if size else ''))
    rows = [row('reading a corpus for all features in one pass', 'truncated forward + full encode alone (the floor)', seconds['floor']/seconds['pass'], a.least),
            row('reading a corpus for all features in one pass', f'one pass for each of {F:,} features (extrapolated)', seconds['feature']*F/seconds['pass'], 100),
            row('reading a corpus for all features in one pass', 'caching all activations', seconds['cache']/seconds['pass'], .7)]
    if target.model.device.type == 'cpu': # what is measured is this process' memory
        rows += [row('memory of the pass: what its formula allows', 'its measured peak', allowed/max(memory.most, 1), 1),
                 row('memory of caching all activations, whole corpus', 'measured peak of the pass', cached/n*whole/max(memory.most, 1), 10)]
    return finish(rows, a.json)


if __name__=='__main__': sys.exit(main())
