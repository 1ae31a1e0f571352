"""Scoring texts: early exit + one encoder column, against a full forward (with LM head) + full `sae.encode` on the same texts.

    python bench/scoring.py [--sae FOLDER] [--texts 96] [--repeats 3] [--cpu-time]

Prints the ratio of the two times (same batches, fp32, taken in turns) and the largest difference between the two sets of scores.
Fails where they differ by more than 1e-4 of the largest activation (or of 1), or where the ratio is below --least.
"""
import argparse, statistics, sys, time
import numpy as np, torch
from saeexplainer.models import EMBEDDED, load_model
from saeexplainer.saes import FeatureReader
from saeexplainer.sampling import batches
from saeexplainer.sampling import pad
from saeexplainer.target import Target, residual_stream, tokenise

SUBJECTS = ['The old river', 'A young doctor from the north', 'My neighbour', 'The national park', 'Every winter the council',
            'This function']
VERBS = ['carried letters and coal across', 'wrote a long report about', 'never agreed with', 'was rebuilt in the year after',
         'returns the first element of']
OBJECTS = ['the bridge.', 'the treaty that ended the war.', 'a set of rules which nobody had ever read in full.',
           'the list, unless it is empty or has been closed.']


def sentences(n): # 10 to 30 words each
    parts = [f'{s} {v} {o}' for o in OBJECTS for v in VERBS for s in SUBJECTS]
    return [' '.join(parts[(7*i + j*j) % len(parts)] for j in range(1 + i%2)) for i in range(n)]


@torch.no_grad()
def plain_way(target, texts, features): # hidden_states of the whole model, the whole dictionary
    tokens, out = tokenise(target.tokenizer, texts), np.zeros(len(texts), np.float32)
    for rows in batches([len(t.ids) for t in tokens], target.batch_size, target.max_tokens):
        states = target.model(**pad([tokens[i].ids for i in rows], target.pad_id), output_hidden_states=True, use_cache=False).hidden_states
        acts = target.reader.sae.encode(states[target.reader.layer + (target.reader.hook=='resid_post')])
        for i, row in zip(rows, acts): out[i] = row[:len(tokens[i].ids), features[i]][torch.from_numpy(tokens[i].counts)].max()
    return out


def clock(now, fn, *args):
    start = now()
    result = fn(*args)
    return now() - start, result


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--sae', default='smollm2-135m/sae', help='SAE of the embedded model: a folder, absolute or relative to data/')
    p.add_argument('--texts', type=int, default=96); p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--least', type=float, default=3., help='the ratio that must be reached')
    p.add_argument('--cpu-time', action='store_true', help="the process' own time instead of the wall's: for a busy machine")
    a = p.parse_args()
    now = time.process_time if a.cpu_time else time.perf_counter
    target = Target(*load_model(EMBEDDED, 'float32', 'cpu'), FeatureReader.load(a.sae))
    texts = sentences(a.texts)
    reader, first = target.reader, pad([tokenise(target.tokenizer, texts)[0].ids], 0)
    busy = reader.encode(residual_stream(target.model, **first, layer=reader.layer, hook=reader.hook))[0, 1:].amax(0)
    features = busy.topk(16).indices.tolist() # features that fire, so that equality says something
    features = [features[i % 16] for i in range(len(texts))]
    times, tokens = {'plain': [], 'early exit': []}, sum(len(t.ids) for t in tokenise(target.tokenizer, texts))
    for _ in range(a.repeats + 1): # the first round warms up
        for name, fn, args in (('plain', plain_way, (target, texts, features)), ('early exit', target.max_acts, (texts, features))):
            seconds, scores = clock(now, fn, *args)
            times[name].append(seconds)
            if name=='plain': wanted = scores
    difference = float(np.abs(scores - wanted).max()) / max(1., float(wanted.max()))
    plain, early = (statistics.median(times[name][1:]) for name in times)
    print(f'{len(texts)} texts, {tokens} tokens; layer {reader.layer} of {target.model.config.num_hidden_layers}, {reader.n_features} features')
    print(f'full forward + full encode    {plain:6.2f} s  {tokens/plain:6.0f} tokens/s')
    print(f'early exit + one column       {early:6.2f} s  {tokens/early:6.0f} tokens/s')
    print(f'ratio {plain/early:.2f} (at least {a.least:g}), largest difference {difference:.1e} of the largest activation (at most 1e-4), '
          f'{(wanted > 0).mean():.0%} of the texts active')
    return 0 if plain/early >= a.least and difference <= 1e-4 else 1


if __name__=='__main__': sys.exit(main())
