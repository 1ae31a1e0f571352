"""Scoring texts for their features: early exit and encoder columns, against the whole model, and against the floor.

    python bench/scoring.py [--preset smollm2-135m] [--layers 9 21] [--texts 96] [--repeats 3] [--cpu-time]
                            [--json FILE]

The same texts in the same batches and dtype, taken in turns in one process, three ways: the whole model with its LM
head and the whole dictionary (what one writes first); `Target.max_acts`; and the truncated forward alone, which nothing
can be quicker than. At another layer than the SAE's own its activations mean nothing, but they cost the same. Recorded
are the ratios of median seconds, theirs to ours. What sorting by length and running each distinct text once add is
timed apart, on texts that are asked for by several features in random order. Fails where scores differ by more than
1e-4 of the largest activation (or of 1), or where a ratio is too small.
"""
import sys
import numpy as np
import torch
from record import finish, in_turns, model_options, row
from saeexplainer.lm.hooks import decoder_layers, residual_stream
from saeexplainer.lm.models import load_model
from saeexplainer.lm.sampling import batches, pad
from saeexplainer.presets import load_preset
from saeexplainer.saes import FeatureReader
from saeexplainer.target import Target, tokenise

SUBJECTS = ['The old river', 'A young doctor from the north', 'My neighbour', 'The national park',
            'Every winter the council', 'This function']
VERBS = ['carried letters and coal across', 'wrote a long report about', 'never agreed with',
         'was rebuilt in the year after', 'returns the first element of']
OBJECTS = ['the bridge.', 'the treaty that ended the war.', 'a set of rules which nobody had ever read in full.',
           'the list, unless it is empty or has been closed.']


def arguments():
    parser = model_options(__doc__)
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--layers', type=int, nargs='+', default=[9, 21])
    parser.add_argument('--least', type=float, nargs='+', default=[3., 1.5], help='of the ratio at each layer')
    parser.add_argument('--texts', type=int, default=96)
    parser.add_argument('--repeats', type=int, default=3)
    return parser.parse_args()


# ---- texts and features

def sentences(n): # -> texts of 10 to 30 words, all different
    parts = [f'{s} {v} {o}' for o in OBJECTS for v in VERBS for s in SUBJECTS]
    def text(i):
        chosen = [parts[(7*i + j*j) % len(parts)] for j in range(1 + i%2)]
        return ' '.join([f'Case {i}:', *chosen])
    return [text(i) for i in range(n)]

def busy_features(target, texts): # -> one feature for each text
    "Return features that fire on the longest texts, so that equal scores say something"
    _, _, batch = next(sorted_batches(target, texts))
    strongest = target.reader.encode(residual(target, batch))[:, 1:].amax((0, 1))
    chosen = strongest.topk(16).indices.tolist()
    return [chosen[i % 16] for i in range(len(texts))]

def shuffled_requests(texts, features): # -> (texts, features), each text three times
    "Return each text with its own feature and those of its two neighbours, in random order"
    def neighbours(k): return features[k:] + features[:k]
    asked = features + neighbours(1) + neighbours(2)
    order = np.random.default_rng(0).permutation(3*len(texts))
    return [(texts*3)[i] for i in order], [asked[i] for i in order]


# ---- the ways

def sorted_batches(target, texts): # what `Target` runs: yields (rows, tokens of all texts, batch)
    tokens = tokenise(target.tokenizer, texts, target.bos)
    for rows in batches([len(t.ids) for t in tokens], target.batch_size, target.max_tokens):
        yield rows, tokens, pad([tokens[i].ids for i in rows], target.pad_id, device=target.model.device)

def residual(target, batch): # -> (rows, seq, d)
    return residual_stream(target.model, **batch, layer=target.reader.layer, hook=target.reader.hook)

def hidden_state(target, batch): # of a whole forward pass -> (rows, seq, d)
    states = target.model(**batch, output_hidden_states=True, use_cache=False).hidden_states
    return states[target.reader.layer + (target.reader.hook == 'resid_post')]

@torch.no_grad()
def whole_model(target, texts, features, state=hidden_state): # all layers and logits, the whole dictionary -> scores
    scores = np.zeros(len(texts), np.float32)
    for rows, tokens, batch in sorted_batches(target, texts):
        acts = target.reader.encode(state(target, batch)).cpu()
        for i, of_row in zip(rows, acts):
            counts = torch.from_numpy(tokens[i].counts)
            scores[i] = of_row[:len(tokens[i].ids), features[i]][counts].max()
    return scores

def floor(target, texts): # the truncated forward alone
    for _, _, batch in sorted_batches(target, texts): residual(target, batch)

def as_they_come(target, texts, features): # ours, but each request a row and batches in their order -> scores
    scores = np.zeros(len(texts), np.float32)
    tokens = tokenise(target.tokenizer, texts, target.bos)
    for i in range(0, len(texts), target.batch_size):
        part = tokens[i:i+target.batch_size]
        batch = pad([t.ids for t in part], target.pad_id, device=target.model.device)
        acts = target.reader.activations(residual(target, batch), features[i:i+len(part)]).cpu().numpy()
        for j, t in enumerate(part): scores[i+j] = acts[j, :len(t.ids)][t.counts].max()
    return scores


# ---- what is measured

def difference(scores, true): # -> the largest, relative to the largest activation or to 1
    return float(np.abs(scores - true).max()) / max(1., float(true.max()))

def early_exit(target, texts, features, least, args): # -> rows
    "Compare a target with the whole model and with the floor"
    ways = dict(plain=lambda: whole_model(target, texts, features),
                ours=lambda: target.max_acts(texts, features),
                floor=lambda: floor(target, texts))
    seconds, scores = in_turns(ways, args.repeats, args.clock)
    off = difference(scores['ours'], scores['plain'])
    layer = target.reader.layer
    n_layers = len(decoder_layers(target.model))
    n_tokens = sum(len(t.ids) for t in tokenise(target.tokenizer, texts, target.bos))
    speed = {name: n_tokens/spent for name, spent in seconds.items()}
    print(f'{len(texts)} texts, {n_tokens} tokens; layer {layer} of {n_layers}, {target.reader.n_features} features; '
          f'tokens/s: plain {speed["plain"]:.0f}, ours {speed["ours"]:.0f}, floor {speed["floor"]:.0f}; '
          f'largest difference {off:.1e} of the largest activation; '
          f'{(scores["plain"] > 0).mean():.0%} of the texts active')
    if off > 1e-4: sys.exit('the scores differ')
    what = f'scoring texts at layer {layer} of {n_layers}'
    gain = seconds['plain']/seconds['ours']
    return [row(what, 'full forward with LM head + full encode', gain, least, difference=off),
            row(what, 'bare truncated forward (the floor)', seconds['floor']/seconds['ours'], .85)]

def sorting(target, texts, features, args): # -> row
    "Compare a target with batches in the order of the requests"
    many, asked = shuffled_requests(texts, features)
    ways = dict(come=lambda: as_they_come(target, many, asked), ours=lambda: target.max_acts(many, asked))
    seconds, scores = in_turns(ways, args.repeats, args.clock)
    if difference(scores['ours'], scores['come']) > 1e-4: sys.exit('the scores differ')
    return row('sorting, and running each text once for its three features', 'batches in the order of the requests',
               seconds['come']/seconds['ours'], 1.)


def main():
    args = arguments()
    preset = load_preset(args.preset)
    model, tokenizer = load_model(preset.target, args.dtype, preset.device)
    texts = sentences(args.texts)
    rows = []
    for layer, least in zip(args.layers, args.least):
        reader = FeatureReader.load(preset.sae, model.device, hook=f'blocks.{layer}.hook_resid_post')
        target = Target(model, tokenizer, reader, preset.batch_size, preset.batch_tokens)
        features = busy_features(target, texts)
        rows += early_exit(target, texts, features, least, args)
        if layer == args.layers[0]: rows.append(sorting(target, texts, features, args))
    return finish(rows, args.json)


if __name__ == '__main__': sys.exit(main())
