"""Explainer.sample, K candidates for many features, against plain `generate`; and what drawing in float32 costs a CPU.

    python bench/sampling.py [--preset smollm2-135m] [--features 16] [--k 6] [--tokens 24] [--repeats 3] [--cpu-time]
                             [--json FILE]

All ways draw with temperature .9 and top_p .9, in batches of the same size and prompt length, and exactly --tokens new
tokens for each row (no row may end before). They take turns in one process.

The first row is for float32 weights (bfloat16 on a GPU): `sample` and plain batched `generate` on the same shapes.
Recorded is the ratio of median seconds, `generate` to `sample`. Fails below .9.

The second row is for a CPU and bfloat16 weights, which `sample` holds in float32 while a batch is generated, so that a
row's text does not depend on its batch. The same call is timed as it is and with the weights left in bfloat16. Recorded
is the ratio of median seconds, bfloat16 to float32: a price, below 1 where a processor multiplies bfloat16 in hardware.
Fails below .25.
"""
import sys
from contextlib import nullcontext
from unittest.mock import patch
import torch
from record import finish, in_turns, model_options, row
from saeexplainer.explainer import Explainer, ExplainerCard
from saeexplainer.lm import sampling
from saeexplainer.lm.models import load_model
from saeexplainer.presets import load_preset

DRAW = dict(temperature=.9, top_p=.9)


def arguments():
    parser = model_options(__doc__)
    parser.add_argument('--features', type=int, default=16)
    parser.add_argument('--k', type=int, default=6, help='candidates of a feature')
    parser.add_argument('--tokens', type=int, default=24)
    parser.add_argument('--batch', type=int, default=96)
    parser.add_argument('--repeats', type=int, default=3)
    return parser.parse_args()


def endless_explainer(preset, dtype=None): # None: the default of the device -> `Explainer`
    "Return an explainer without adapter whose texts all go to their full length"
    model, tokenizer = load_model(preset.explainer, dtype)
    width = model.config.get_text_config().hidden_size
    card = ExplainerCard(preset.explainer, preset.template, preset.placeholder, layer=1, coefficient=1., d_model=width,
                         sae='random directions', sae_sha256='0'*64, sae_layer=9, target=preset.target,
                         source=preset.source, chat_template=preset.chat_template)
    explainer = Explainer(model, tokenizer, card)
    model.generation_config.eos_token_id = explainer.placeholder_id # is never drawn
    tokenizer.chat_template = None # its end of turn would end a row too
    return explainer

def candidates(explainer, args):
    "Draw K explanations of each of many directions"
    width = explainer.card.d_model
    directions = torch.randn(args.features, width, generator=torch.Generator().manual_seed(0))
    explainer.sample(directions, args.k, **DRAW, max_new_tokens=args.tokens, batch_size=args.batch)

def generated(explainer, args):
    "Generate as many texts from the same prompt, without directions"
    model = explainer.model
    tokenizer = explainer.tokenizer
    ids = torch.tensor([explainer.prompt], device=model.device)
    rows = args.features*args.k
    for i in range(0, rows, args.batch):
        batch = ids.repeat(min(args.batch, rows - i), 1)
        out = model.generate(batch, attention_mask=torch.ones_like(batch), do_sample=True, **DRAW, top_k=0,
                             min_new_tokens=args.tokens, max_new_tokens=args.tokens,
                             pad_token_id=tokenizer.pad_token_id)
        tokenizer.batch_decode(out[:, batch.shape[1]:], skip_special_tokens=True)


def compare(ours, theirs, args): # functions without arguments -> (tokens/s, tokens/s)
    seconds, _ = in_turns(dict(theirs=theirs, ours=ours), args.repeats, args.clock)
    tokens = args.features*args.k*args.tokens
    return tokens/seconds['ours'], tokens/seconds['theirs']

def against_generate(preset, args): # -> row
    explainer = endless_explainer(preset)
    ours, plain = compare(lambda: candidates(explainer, args), lambda: generated(explainer, args), args)
    print(f'{args.k} candidates of {args.features} features, {args.tokens} tokens each, batches of {args.batch}: '
          f'{ours:.0f} tok/s, plain generate {plain:.0f} tok/s')
    return row('sampling K candidates of many features', '`generate` on the same shapes', ours/plain, .9)

def float32_against_bfloat16(preset, args): # -> row
    explainer = endless_explainer(preset, 'bfloat16')
    def as_they_are():
        with patch.object(sampling, 'in_float32', nullcontext): candidates(explainer, args)
    wide, narrow = compare(lambda: candidates(explainer, args), as_they_are, args)
    print(f'the same from bfloat16 weights: drawn in float32 {wide:.0f} tok/s, in bfloat16 {narrow:.0f} tok/s')
    return row('sampling from bfloat16 weights on a CPU, in float32', 'the same draws in bfloat16', wide/narrow, .25)


@torch.no_grad()
def main():
    args = arguments()
    preset = load_preset(args.preset)
    rows = [against_generate(preset, args)]
    if not torch.cuda.is_available(): rows.append(float32_against_bfloat16(preset, args))
    return finish(rows, args.json)


if __name__ == '__main__': sys.exit(main())
