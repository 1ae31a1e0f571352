"""Explainer.sample, K candidates for many features, against plain batched `generate` on the same shapes.

    python bench/sampling.py [--preset smollm2-135m] [--features 16] [--k 6] [--tokens 24] [--repeats 3] [--json FILE]

Both draw with temperature .9 and top_p .9 from the same weights, in batches of the same size and prompt length, and exactly --tokens new tokens for each
row (no row may end before). Both kinds take turns in one process; the ratio is that of the medians. Fails where `sample` is below .9 of it.
"""
import argparse, statistics, sys, time
from pathlib import Path
import torch
from record import finish, row
from saeexplainer.explainer import Explainer, ExplainerCard
from saeexplainer.lm.models import load_model
from saeexplainer.presets import load_preset


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--preset', default='smollm2-135m'); p.add_argument('--features', type=int, default=16); p.add_argument('--k', type=int, default=6)
    p.add_argument('--tokens', type=int, default=24); p.add_argument('--batch', type=int, default=96); p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--json', type=Path, help='append the row here')
    p.add_argument('--cpu-time', action='store_true', help='count processor time instead of wall time, on a machine that does other work too')
    a = p.parse_args()
    clock = time.process_time if a.cpu_time else time.perf_counter
    preset = load_preset(a.preset)
    model, tokenizer = load_model(preset.explainer)
    d = model.config.get_text_config().hidden_size
    card = ExplainerCard(preset.explainer, preset.template, preset.placeholder, 1, 1., d, 'random directions', '0'*64, 9, preset.target, preset.source, chat_template=preset.chat_template)
    explainer = Explainer(model, tokenizer, card)
    model.generation_config.eos_token_id = explainer.placeholder_id # is never drawn: every row goes to its full length
    tokenizer.chat_template = None # its end of turn would end a row too
    directions, rows = torch.randn(a.features, d, generator=torch.Generator().manual_seed(0)), a.features * a.k
    ids = torch.tensor([explainer.prompt], device=model.device)

    def ours(): explainer.sample(directions, a.k, temperature=.9, top_p=.9, max_new_tokens=a.tokens, batch_size=a.batch)

    def plain():
        for i in range(0, rows, a.batch):
            batch = ids.repeat(min(a.batch, rows - i), 1)
            out = model.generate(batch, attention_mask=torch.ones_like(batch), do_sample=True, temperature=.9, top_p=.9, top_k=0, min_new_tokens=a.tokens,
                                 max_new_tokens=a.tokens, pad_token_id=tokenizer.pad_token_id)
            tokenizer.batch_decode(out[:, batch.shape[1]:], skip_special_tokens=True)

    times = {ours: [], plain: []}
    for i in range(a.repeats + 1): # the first round warms up
        for fn in (ours, plain) if i % 2 else (plain, ours):
            start = clock()
            with torch.no_grad(): fn()
            if i: times[fn].append(clock() - start)
    speed = {fn: rows * a.tokens / statistics.median(t) for fn, t in times.items()}
    print(f'{a.k} candidates of {a.features} features, {a.tokens} tokens each, batches of {a.batch}: {speed[ours]:.0f} tok/s, plain generate {speed[plain]:.0f} tok/s')
    return finish([row('sampling K candidates of many features', '`generate` on the same shapes', speed[ours]/speed[plain], .9)], a.json)


if __name__ == '__main__': sys.exit(main())
