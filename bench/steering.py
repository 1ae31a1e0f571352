"""Steered generation by the rank-one clamp, against a hook that encodes and decodes the dictionary.

    python bench/steering.py [--preset smollm2-135m] [--rows 24] [--tokens 25] [--repeats 2] [--cpu-time] [--json FILE]

Greedy, in fp32, the same features and clamps both ways, with the preset's SAE and with a random dictionary of --large features. Fails where a token differs, or a
ratio is too small.
"""
import argparse, sys, time
from pathlib import Path
import numpy as np, torch
from record import finish, in_turns, row
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from saeexplainer.lm.models import load_model
from saeexplainer.presets import load_preset
from saeexplainer.saes import FeatureReader
from saeexplainer.lm.sampling import new_tokens, pad
from saeexplainer.lm.hooks import residual_stream
from saeexplainer.steering import editing, steering
from saeexplainer.target import Target, tokenise

PROMPTS = ['The explanation is simple:', 'I think', 'We']


def random_dictionary(reader, n, resid): # (positions, d): as sparse as the real one would be
    torch.manual_seed(0)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=reader.d_model, d_sae=n, device=str(resid.device)))
    W = torch.nn.functional.normalize(torch.randn(n, reader.d_model, device=resid.device), dim=-1)
    sae.W_dec.data, sae.W_enc.data = W, W.T.contiguous()
    for p in (sae.b_enc, sae.b_dec): p.data.zero_()
    sae.threshold.data.fill_(torch.quantile((resid @ W[:2048].T).flatten(), .999).item())
    sae.cfg.metadata.hook_name = reader.sae.cfg.metadata.hook_name
    return FeatureReader(sae.requires_grad_(False))

def whole_dictionary(reader, features, values): # encode, set, decode, and the error back
    rows, values = torch.arange(len(features)), torch.tensor(values, dtype=torch.float32, device=reader.sae.W_dec.device)
    def edit(resid):
        acts = reader.sae.encode(resid)
        error = resid - reader.sae.decode(acts)
        acts[rows, :, features] = values[:, None]
        return reader.sae.decode(acts) + error
    return edit


@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--preset', default='smollm2-135m'); p.add_argument('--large', type=int, default=131_072)
    p.add_argument('--rows', type=int, default=24); p.add_argument('--tokens', type=int, default=25); p.add_argument('--repeats', type=int, default=2)
    p.add_argument('--cpu-time', action='store_true', help="the process' own time instead of the wall's: for a busy machine")
    p.add_argument('--json', type=Path, help='append the rows here')
    a = p.parse_args()
    now, preset, rows = time.process_time if a.cpu_time else time.perf_counter, load_preset(a.preset), []
    model, tokenizer = load_model(preset.target, 'float32', preset.device)
    small = Target(model, tokenizer, FeatureReader.load(preset, model.device))
    prompts = [PROMPTS[i % 3] for i in range(a.rows)]
    batch = pad([t.ids for t in tokenise(tokenizer, prompts, small.bos)], small.pad_id, left=True, device=model.device)
    resid = residual_stream(model, **batch, layer=small.reader.layer, hook=small.reader.hook)[batch['attention_mask'].bool()]
    for reader, least in ((small.reader, 1.), (random_dictionary(small.reader, a.large, resid), 1.5)):
        features = np.random.default_rng(0).choice(reader.n_features, a.rows, replace=False).tolist()
        values = [.3*resid.norm(dim=-1).median().item()*(-1)**i for i in range(a.rows)]
        generate = lambda: new_tokens(model, tokenizer, **batch, temperature=0, max_new_tokens=a.tokens)
        def ours():
            with steering(model, reader, features, values, batch['attention_mask']): return generate()
        def theirs():
            with editing(model, reader, whole_dictionary(reader, features, values), batch['attention_mask']): return generate()
        t, out = in_turns(dict(theirs=theirs, ours=ours), a.repeats, now)
        n = sum(len(ids) for ids, _ in out['ours'])
        same = sum(x == y for (x, _), (y, _) in zip(out['ours'], out['theirs']))
        print(f'{reader.n_features:,} features: {same} of {a.rows} rows have the same greedy tokens; new tokens/s: dictionary {n/t["theirs"]:.0f}, ours {n/t["ours"]:.0f}')
        if same < a.rows: sys.exit('the tokens differ')
        rows.append(row(f'steered generation, {reader.n_features:,} features', 'hook that encodes and decodes the dictionary, same greedy tokens', t['theirs']/t['ours'], least))
    return finish(rows, a.json)


if __name__=='__main__': sys.exit(main())
