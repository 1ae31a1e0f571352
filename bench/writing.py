"""LocalWriter against `generate` called per batch of 8 in the order of arrival, on the texts of a preference stage.

    python bench/writing.py [--preset smollm2-135m] [--texts 96] [--repeats 2] [--cpu-time] [--json FILE]

One text per request, from prompts of labels as `write_texts` asks for them: three seeds of each prompt, with the
preset's limit, temperature, top-p, dtype and batch size. Counted are new tokens up to the end of each text, without
padding; all ways take turns in one process.

The first row is the ratio of new tokens a second, ours to theirs. The second is what is gained by computing shared
beginnings and equal prompts once. The third is the ratio of seconds for the log-probability of each prompt with each
choice by itself to those for `choices=`. Fails below 1.5 in the first and third, below .95 in the second; fails, too,
where the log-probabilities differ.
"""
import random, sys
from unittest.mock import patch
import numpy as np
import torch
from record import finish, in_turns, model_options, row
from saeexplainer.evaluation.judge import judge_prompt
from saeexplainer.features import load_features
from saeexplainer.lm.models import load_model
from saeexplainer.lm.sampling import new_tokens
from saeexplainer.prefs import preference_prompt
from saeexplainer.presets import load_preset
from saeexplainer.replies import Request
from saeexplainer.writers import local
from saeexplainer.writers.local import LocalWriter, chat_ids

BY = 8 # rows of a batch of plain `generate`
LETTERS = ['A', 'B', 'C'] # choices of a judge


def arguments():
    parser = model_options(__doc__)
    parser.add_argument('--texts', type=int, default=96)
    parser.add_argument('--repeats', type=int, default=2)
    return parser.parse_args()


# ---- requests

def shuffled_labels(preset): # -> texts
    labels = [f.explanation for f in load_features(preset) if f.status == 'ok']
    random.Random(0).shuffle(labels)
    return labels

def text_requests(labels, preset): # -> three `Request`s for each label
    limits = preset.text_tokens, preset.text_temperature, preset.text_top_p
    return [Request(preference_prompt(label), *limits, seed=3*i + j)
            for i, label in enumerate(labels) for j in range(3)]

def judge_requests(labels): # -> 24 `Request`s with a choice of three
    sets = [[f'{label} and more' for label in labels[i:i+4]] for i in range(3)]
    return [Request(judge_prompt(label, sets)) for label in labels[:24]]


# ---- writing, three ways; each returns the new tokens of each text

def ours(writer, requests):
    return [reply.completion_tokens for reply in writer.write(requests)]

def apart(writer, requests): # ours, but each row is computed by itself
    def unshared(*args, shared, **kwargs): return new_tokens(*args, shared=None, **kwargs)
    with patch.object(local, 'new_tokens', unshared): return ours(writer, requests)

def plain(writer, requests):
    counts = []
    for i in range(0, len(requests), BY): counts += plain_batch(writer.model, writer.tokenizer, requests[i:i+BY])
    return counts

def plain_batch(model, tokenizer, requests):
    prompts = [chat_ids(tokenizer, request) for request in requests]
    longest = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id]*(longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0]*(longest - len(prompt)) + [1]*len(prompt) for prompt in prompts])
    out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), do_sample=True, top_k=0,
                         temperature=requests[0].temperature, top_p=requests[0].top_p,
                         max_new_tokens=max(r.max_tokens for r in requests), pad_token_id=tokenizer.pad_token_id)
    texts = out[:, longest:].tolist()
    ends = end_tokens(model)
    return [min(up_to_end(text, ends), request.max_tokens) for request, text in zip(requests, texts)]

def end_tokens(model): # -> set of ids
    end = model.generation_config.eos_token_id
    return {end} if isinstance(end, int) else set(end)

def up_to_end(text, ends): # -> number of tokens
    return next((j + 1 for j, token in enumerate(text) if token in ends), len(text))


# ---- choosing, two ways; each returns log-probabilities, (requests, choices)

def together(writer, requests):
    return np.array([reply.scores for reply in writer.write(requests, choices=LETTERS)])

def alone(writer, requests):
    prompts = [chat_ids(writer.tokenizer, request) for request in requests]
    return np.array([writer.log_probs(prompts, [letter]*len(prompts)) for letter in LETTERS]).T


# ---- what is measured

def measure_texts(writer, requests, args): # -> rows
    ways = dict(ours=lambda: ours(writer, requests), apart=lambda: apart(writer, requests),
                plain=lambda: plain(writer, requests))
    seconds, new = in_turns(ways, args.repeats, args.clock)
    speed = {name: sum(new[name])/seconds[name] for name in ways}
    print(f'{args.texts} texts: {speed["ours"]:.0f} new tok/s ({np.mean(new["ours"]):.1f} a text), '
          f'without sharing {speed["apart"]:.0f}, '
          f'`generate` by {BY} {speed["plain"]:.0f} ({np.mean(new["plain"]):.1f} a text)')
    return [row('writing texts, new tokens a second', f'`generate` per batch of {BY} in order of arrival',
                speed['ours']/speed['plain'], 1.5),
            row('the same, beginnings and equal prompts computed once', 'each row by itself',
                speed['ours']/speed['apart'], .95)]

def measure_choices(writer, requests, args): # -> row
    ways = dict(ours=lambda: together(writer, requests), alone=lambda: alone(writer, requests))
    seconds, scores = in_turns(ways, args.repeats, args.clock)
    if not np.allclose(scores['ours'], scores['alone'], atol=.25):
        raise SystemExit(f'the scores differ by {np.abs(scores["ours"] - scores["alone"]).max():.2g}')
    return row('three choices of a prompt', 'each choice by itself', seconds['alone']/seconds['ours'], 1.5)


@torch.no_grad()
def main():
    args = arguments()
    torch.manual_seed(0)
    preset = load_preset(args.preset, size='full')
    writer = LocalWriter(*load_model(preset.target, preset.dtype), preset.batch_size)
    labels = shuffled_labels(preset)
    rows = measure_texts(writer, text_requests(labels[:args.texts//3], preset), args)
    rows.append(measure_choices(writer, judge_requests(labels), args))
    return finish(rows, args.json)


if __name__ == '__main__': sys.exit(main())
