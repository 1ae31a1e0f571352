"""Steered generation by the rank-one clamp, against a hook that encodes and decodes the dictionary.

    python bench/steering.py [--preset smollm2-135m] [--rows 24] [--tokens 25] [--repeats 2] [--cpu-time] [--json FILE]

Greedy, in fp32, the same features and clamps both ways, with the preset's SAE and with a random dictionary of --large
features; both ways take turns in one process. Recorded are the ratios of median seconds, theirs to ours. Fails where a
token differs, or a ratio is too small.
"""
import sys
import numpy as np
import torch
from record import finish, in_turns, model_options, row
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from saeexplainer.lm.hooks import residual_stream
from saeexplainer.lm.models import load_model
from saeexplainer.lm.sampling import new_tokens, pad
from saeexplainer.presets import load_preset
from saeexplainer.saes import FeatureReader
from saeexplainer.steering import editing, steering
from saeexplainer.target import Target, tokenise

PROMPTS = ['The explanation is simple:', 'I think', 'We']


def arguments():
    parser = model_options(__doc__)
    parser.add_argument('--large', type=int, default=131_072, help='features of the random dictionary')
    parser.add_argument('--rows', type=int, default=24)
    parser.add_argument('--tokens', type=int, default=25)
    parser.add_argument('--repeats', type=int, default=2)
    return parser.parse_args()


def random_dictionary(reader, n, residuals): # residuals: (positions, d) -> `FeatureReader`
    "Return a reader with `n` random features for the same hook, as sparse as a real one would be"
    torch.manual_seed(0)
    device = residuals.device
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=reader.d_model, d_sae=n, device=str(device)))
    directions = torch.nn.functional.normalize(torch.randn(n, reader.d_model, device=device), dim=-1)
    sae.W_dec.data = directions
    sae.W_enc.data = directions.T.contiguous()
    sae.b_enc.data.zero_()
    sae.b_dec.data.zero_()
    some = (residuals @ directions[:2048].T).flatten()
    sae.threshold.data.fill_(torch.quantile(some, .999).item())
    sae.cfg.metadata.hook_name = reader.sae.cfg.metadata.hook_name
    return FeatureReader(sae.requires_grad_(False))

def whole_dictionary(reader, features, values): # -> edit of a residual stream
    "Encode, set the feature of each row, decode, and put the error back"
    rows = torch.arange(len(features))
    values = torch.tensor(values, dtype=torch.float32, device=reader.sae.W_dec.device)
    def edit(residual):
        acts = reader.sae.encode(residual)
        error = residual - reader.sae.decode(acts)
        acts[rows, :, features] = values[:, None]
        return reader.sae.decode(acts) + error
    return edit


def prompts_and_residuals(target, n): # -> (batch of `n` prompts, (positions, d))
    tokens = tokenise(target.tokenizer, [PROMPTS[i % 3] for i in range(n)], target.bos)
    batch = pad([t.ids for t in tokens], target.pad_id, left=True, device=target.model.device)
    stream = residual_stream(target.model, **batch, layer=target.reader.layer, hook=target.reader.hook)
    return batch, stream[batch['attention_mask'].bool()]

def compare(target, batch, size, least, args): # size: of the clamps -> row
    "Generate with one feature a row clamped, both ways"
    model = target.model
    reader = target.reader
    mask = batch['attention_mask']
    features = np.random.default_rng(0).choice(reader.n_features, args.rows, replace=False).tolist()
    values = [size*(-1)**i for i in range(args.rows)]
    def generate(): return new_tokens(model, target.tokenizer, **batch, temperature=0, max_new_tokens=args.tokens)
    def theirs():
        with editing(model, reader, whole_dictionary(reader, features, values), mask): return generate()
    def ours():
        with steering(model, reader, features, values, mask): return generate()

    seconds, texts = in_turns(dict(theirs=theirs, ours=ours), args.repeats, args.clock)
    n_tokens = sum(len(ids) for ids, _ in texts['ours'])
    same = sum(a == b for (a, _), (b, _) in zip(texts['ours'], texts['theirs']))
    print(f'{reader.n_features:,} features: {same} of {args.rows} rows have the same greedy tokens; '
          f'new tokens/s: dictionary {n_tokens/seconds["theirs"]:.0f}, ours {n_tokens/seconds["ours"]:.0f}')
    if same < args.rows: sys.exit('the tokens differ')
    return row(f'steered generation, {reader.n_features:,} features',
               'hook that encodes and decodes the dictionary, same greedy tokens',
               seconds['theirs']/seconds['ours'], least)


@torch.no_grad()
def main():
    args = arguments()
    preset = load_preset(args.preset)
    model, tokenizer = load_model(preset.target, 'float32', preset.device)
    target = Target(model, tokenizer, FeatureReader.load(preset, model.device))
    batch, residuals = prompts_and_residuals(target, args.rows)
    size = .3*residuals.norm(dim=-1).median().item()
    large = Target(model, tokenizer, random_dictionary(target.reader, args.large, residuals))
    return finish([compare(target, batch, size, 1., args), compare(large, batch, size, 1.5, args)], args.json)


if __name__ == '__main__': sys.exit(main())
