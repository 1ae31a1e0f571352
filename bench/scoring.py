"""Scoring texts for their features: early exit + encoder columns, against the full forward and full encode, and against the floor.

    python bench/scoring.py [--preset smollm2-135m] [--layers 9 21] [--texts 96] [--repeats 3] [--cpu-time] [--json FILE]

The same texts in the same batches and dtype, taken in turns in one process, three ways: the whole model with its LM head and the whole dictionary (what one writes
first); `Target.max_acts`; and the truncated forward alone, which nothing can be quicker than. At another layer than the SAE's own its activations mean nothing, but
they cost the same. What sorting by length and running each distinct text once add is timed apart, on texts that are asked for by several features in random order.
Fails where scores differ by more than 1e-4 of the largest activation (or of 1), or where a ratio is too small.
"""
import argparse, sys, time
from pathlib import Path
import numpy as np, torch
from record import finish, in_turns, row
from saeexplainer.lm.hooks import decoder_layers
from saeexplainer.lm.models import load_model
from saeexplainer.presets import load_preset
from saeexplainer.saes import FeatureReader
from saeexplainer.lm.sampling import batches, pad
from saeexplainer.lm.hooks import residual_stream
from saeexplainer.target import Target, tokenise

SUBJECTS = ['The old river', 'A young doctor from the north', 'My neighbour', 'The national park', 'Every winter the council',
            'This function']
VERBS = ['carried letters and coal across', 'wrote a long report about', 'never agreed with', 'was rebuilt in the year after',
         'returns the first element of']
OBJECTS = ['the bridge.', 'the treaty that ended the war.', 'a set of rules which nobody had ever read in full.',
           'the list, unless it is empty or has been closed.']


def sentences(n): # 10 to 30 words each, all different
    parts = [f'{s} {v} {o}' for o in OBJECTS for v in VERBS for s in SUBJECTS]
    return [' '.join([f'Case {i}:', *(parts[(7*i + j*j) % len(parts)] for j in range(1 + i%2))]) for i in range(n)]


def sorted_batches(target, texts): # what `Target` runs: (rows, batch)
    tokens = tokenise(target.tokenizer, texts, target.bos)
    for rows in batches([len(t.ids) for t in tokens], target.batch_size, target.max_tokens):
        yield rows, tokens, pad([tokens[i].ids for i in rows], target.pad_id, device=target.model.device)

@torch.no_grad()
def plain_way(target, texts, features): # all layers, all logits, the whole dictionary
    out, reader = np.zeros(len(texts), np.float32), target.reader
    for rows, tokens, batch in sorted_batches(target, texts):
        states = target.model(**batch, output_hidden_states=True, use_cache=False).hidden_states
        acts = reader.encode(states[reader.layer + (reader.hook=='resid_post')]).cpu()
        for i, acts_i in zip(rows, acts): out[i] = acts_i[:len(tokens[i].ids), features[i]][torch.from_numpy(tokens[i].counts)].max()
    return out

def floor(target, texts): # the truncated forward alone
    for _, _, batch in sorted_batches(target, texts): residual_stream(target.model, **batch, layer=target.reader.layer, hook=target.reader.hook)

def as_they_come(target, texts, features): # early exit and one column, but batches in the order of the requests, every request a row
    out, tokens = np.zeros(len(texts), np.float32), tokenise(target.tokenizer, texts, target.bos)
    for i in range(0, len(texts), target.batch_size):
        part = tokens[i:i+target.batch_size]
        batch = pad([t.ids for t in part], target.pad_id, device=target.model.device)
        acts = target.reader.activations(residual_stream(target.model, **batch, layer=target.reader.layer, hook=target.reader.hook), features[i:i+len(part)]).cpu().numpy()
        for j, t in enumerate(part): out[i+j] = acts[j, :len(t.ids)][t.counts].max()
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--preset', default='smollm2-135m'); p.add_argument('--dtype', default='float32')
    p.add_argument('--layers', type=int, nargs='+', default=[9, 21]); p.add_argument('--least', type=float, nargs='+', default=[3., 1.5])
    p.add_argument('--texts', type=int, default=96); p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--cpu-time', action='store_true', help="the process' own time instead of the wall's: for a busy machine")
    p.add_argument('--json', type=Path, help='append the rows here')
    a = p.parse_args()
    now, preset, rows = time.process_time if a.cpu_time else time.perf_counter, load_preset(a.preset), []
    model, tokenizer = load_model(preset.target, a.dtype, preset.device)
    texts, n_layers = sentences(a.texts), len(decoder_layers(model))
    for layer, least in zip(a.layers, a.least):
        reader = FeatureReader.load(preset.sae, model.device, hook=f'blocks.{layer}.hook_resid_post')
        target = Target(model, tokenizer, reader, preset.batch_size, preset.batch_tokens)
        rows_, tokens, batch = next(sorted_batches(target, texts))
        busy = reader.encode(residual_stream(model, **batch, layer=layer, hook=reader.hook))[:, 1:].amax((0, 1))
        features = [busy.topk(16).indices.tolist()[i % 16] for i in range(len(texts))] # that fire, so that equality says something
        t, out = in_turns(dict(plain=lambda: plain_way(target, texts, features), ours=lambda: target.max_acts(texts, features), floor=lambda: floor(target, texts)), a.repeats, now)
        difference = float(np.abs(out['ours'] - out['plain']).max()) / max(1., float(out['plain'].max()))
        n = sum(map(len, (x.ids for x in tokens)))
        print(f'{len(texts)} texts, {n} tokens; layer {layer} of {n_layers}, {reader.n_features} features; tokens/s: plain {n/t["plain"]:.0f}, ours {n/t["ours"]:.0f}, '
              f'floor {n/t["floor"]:.0f}; largest difference {difference:.1e} of the largest activation; {(out["plain"] > 0).mean():.0%} of the texts active')
        if difference > 1e-4: sys.exit('the scores differ')
        rows += [row(f'scoring texts at layer {layer} of {n_layers}', 'full forward with LM head + full encode', t['plain']/t['ours'], least, difference=difference),
                 row(f'scoring texts at layer {layer} of {n_layers}', 'bare truncated forward (the floor)', t['floor']/t['ours'], .85)]
        if layer==a.layers[0]:
            order = np.random.default_rng(0).permutation(3*len(texts))
            many, for_many = [(texts*3)[i] for i in order], [(features + features[1:] + features[:1] + features[2:] + features[:2])[i] for i in order]
            t, out = in_turns(dict(come=lambda: as_they_come(target, many, for_many), ours=lambda: target.max_acts(many, for_many)), a.repeats, now)
            assert np.abs(out['ours'] - out['come']).max() <= 1e-4*max(1., out['come'].max())
            rows.append(row('sorting, and running each text once for its three features', 'batches in the order of the requests', t['come']/t['ours'], 1.))
    return finish(rows, a.json)


if __name__=='__main__': sys.exit(main())
