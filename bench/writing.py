"""LocalWriter against `generate` called per batch of 8 in the order of arrival, on the texts of a preference stage.

    python bench/writing.py [--preset smollm2-135m] [--texts 96] [--repeats 2] [--json FILE]

One text per request, from prompts of labels as `write_texts` asks for them: three seeds of each prompt, with the preset's limit, temperature, top-p, dtype and batch size. Counted are new
tokens up to the end of each text, without padding; all ways take turns in one process. The second row is what is gained by computing shared beginnings and equal prompts once, the
third `choices=` against the log-probability of each prompt with each choice by itself. Fails below 1.5 in the first and third, below .95 in the second.
"""
import argparse, random, sys
from pathlib import Path
import numpy as np
import torch
from record import finish, in_turns, row
import saeexplainer.writers.local as W
from saeexplainer.features import load_features
from saeexplainer.evaluation.judge import judge_prompt
from saeexplainer.lm.models import load_model
from saeexplainer.prefs import preference_prompt
from saeexplainer.presets import load_preset
from saeexplainer.lm.sampling import new_tokens
from saeexplainer.replies import Request
from saeexplainer.writers.local import LocalWriter, chat_ids


def plain(model, tokenizer, requests, size=8): # new tokens of each row
    counts, end = [], model.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end)
    for i in range(0, len(requests), size):
        part = requests[i:i+size]
        ids = [chat_ids(tokenizer, r) for r in part]
        longest = max(map(len, ids))
        batch = torch.tensor([[tokenizer.pad_token_id]*(longest - len(r)) + r for r in ids])
        mask = torch.tensor([[0]*(longest - len(r)) + [1]*len(r) for r in ids])
        out = model.generate(batch.to(model.device), attention_mask=mask.to(model.device), do_sample=True, temperature=part[0].temperature, top_p=part[0].top_p, top_k=0,
                             max_new_tokens=max(r.max_tokens for r in part), pad_token_id=tokenizer.pad_token_id)
        for r, said in zip(part, out[:, longest:].tolist()):
            stop = next((j + 1 for j, t in enumerate(said) if t in ends), len(said))
            counts.append(min(stop, r.max_tokens))
    return counts


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--preset', default='smollm2-135m'); p.add_argument('--texts', type=int, default=96); p.add_argument('--repeats', type=int, default=2)
    p.add_argument('--json', type=Path, help='append the rows here')
    a = p.parse_args()
    torch.manual_seed(0)
    preset = load_preset(a.preset, size='full')
    model, tokenizer = load_model(preset.target, preset.dtype)
    labels = [f.explanation for f in load_features(preset) if f.status == 'ok']
    random.Random(0).shuffle(labels)
    requests = [Request(preference_prompt(label), preset.text_tokens, preset.text_temperature, preset.text_top_p, seed=3*i + j) for i, label in enumerate(labels[:a.texts//3]) for j in range(3)]
    writer = LocalWriter(model, tokenizer, preset.batch_size)
    def ours(sharing=True):
        W.new_tokens = new_tokens if sharing else lambda *args, shared, **kw: new_tokens(*args, shared=None, **kw)
        return [r.completion_tokens for r in writer.write(requests)]
    ways = {'ours': ours, 'apart': lambda: ours(False), 'plain': lambda: plain(model, tokenizer, requests)}
    with torch.no_grad(): seconds, new = in_turns(ways, a.repeats)
    speed = {name: sum(new[name])/seconds[name] for name in ways}
    print(f'{a.texts} texts: {speed["ours"]:.0f} new tok/s ({np.mean(new["ours"]):.1f} a text), without sharing {speed["apart"]:.0f}, `generate` by 8 {speed["plain"]:.0f} ({np.mean(new["plain"]):.1f} a text)')
    sets = [[f'{label} and more' for label in labels[i:i+4]] for i in range(3)]
    asked, letters = [Request(judge_prompt(label, sets)) for label in labels[:24]], ['A', 'B', 'C']
    prompts = [chat_ids(tokenizer, r) for r in asked]
    alone = lambda: np.array([[writer.log_probs(prompts[i:i+24], [c]*len(prompts[i:i+24])) for c in letters] for i in range(0, len(prompts), 24)]).transpose(0, 2, 1).reshape(-1, 3)
    with torch.no_grad(): seconds, scores = in_turns({'ours': lambda: np.array([r.scores for r in writer.write(asked, choices=letters)]), 'alone': alone}, a.repeats)
    if not np.allclose(scores['ours'], scores['alone'], atol=.25): raise SystemExit(f'the scores differ by {np.abs(scores["ours"] - scores["alone"]).max():.2g}')
    return finish([row('writing texts, new tokens a second', '`generate` per batch of 8 in order of arrival', speed['ours']/speed['plain'], 1.5),
                   row('the same, beginnings and equal prompts computed once', 'each row by itself', speed['ours']/speed['apart'], .95),
                   row('three choices of a prompt', 'each choice by itself', seconds['alone']/seconds['ours'], 1.5)], a.json)


if __name__ == '__main__': sys.exit(main())
