"""Train what the shipped explainer is compared with, and record what each says of the features of bench-1

For a finished run of data/smollm2-135m/hinted.yaml (any `seed`), from its SFT adapter:

    imitate1, imitate2   the same pairs in the same rounds and steps, learned as SFT on the chosen explanation alone
    grpo                 online RL by the same reward, 60 steps of 64 explanations (`grpo_reward: words`)

and beside them what the run itself has: sft, dpo1, dpo2. None of them has seen a feature of bench-1.

    python tools/hinted_arms.py runs/hinted --seed 0 --out arms       # an hour and a half of one core; resumes
    python tools/hinted_arms.py --collect arms --to data/smollm2-135m/bench-1/arms.parquet
"""
import argparse
import dataclasses
import sys
from pathlib import Path

import pandas as pd

from saeexplainer.benchmark import Bench
from saeexplainer.dpo import train_dpo
from saeexplainer.explainer import Explainer
from saeexplainer.features import load_features
from saeexplainer.grpo import NamedWordsReward, train_grpo
from saeexplainer.presets import data_dir, load_preset
from saeexplainer.run import disjoint_splits
from saeexplainer.saes import FeatureReader
from saeexplainer.store import RunStore

ONLINE = dict(grpo_steps=60, grpo_reward='words', grpo_lr=2e-4)
IMITATE = dict(dpo_loss='sft', dpo_sft_weight=0.)


def train_imitation(preset, run, out, reader):
    "SFT on the chosen explanations of both rounds; return the folders"
    with RunStore(run/'store.sqlite') as store: pairs = {number: store.pairs(number) for number in (1, 2)}
    before, made = run/'explainer'/'sft', {}
    for number, of_round in pairs.items():
        imitate = dataclasses.replace(preset, **IMITATE)
        result = train_dpo(imitate, of_round, reader, before, out/f'imitate{number}', number)
        before = made[f'imitate{number}'] = result.folder
    return made


def train_online(preset, run, out, reader, features):
    "GRPO from the SFT adapter; return its folder"
    learned = [i for i in disjoint_splits(preset, features)['preference1'] if features[i].max_act]
    reward = NamedWordsReward({i: features[i].contexts for i in learned})
    online = dataclasses.replace(preset, **ONLINE)
    return train_grpo(online, learned, reader, run/'explainer'/'sft', out/'grpo', reward).folder


def said(folder, arm, seed, reader, preset, features):
    "What an explainer says of features, greedily"
    explainer = Explainer.from_pretrained(folder, reader)
    texts = explainer.explain(reader.directions(features), max_new_tokens=preset.explanation_tokens,
                              batch_size=preset.batch_size, progress=True, encoders=reader.encoders(features))
    return pd.DataFrame(dict(arm=arm, seed=seed, feature=features, text=texts))


def record(run, seed, out):
    "Train the arms of a run and write what all of them say, a file each"
    preset = load_preset(data_dir()/'smollm2-135m'/'hinted.yaml', size='full', seed=seed)
    reader = FeatureReader.load(preset)
    features = {feature.index: feature for feature in load_features(preset)}
    arms = {stage: run/'explainer'/stage for stage in ('sft', 'dpo1', 'dpo2')}
    arms |= train_imitation(preset, run, out, reader)
    arms['grpo'] = train_online(preset, run, out, reader, features)
    held_out = list(Bench.load('bench-1').features)
    for arm, folder in arms.items():
        file = out/f'{arm}-{seed}.parquet'
        if not file.exists(): said(folder, arm, seed, reader, preset, held_out).to_parquet(file)


def collect(folder, to):
    "Put the files of all seeds into one"
    parts = [pd.read_parquet(file) for file in sorted(folder.glob('*-*.parquet'))]
    table = pd.concat(parts, ignore_index=True).astype(dict(arm='string', text='string', seed='int16', feature='int16'))
    table.sort_values(['seed', 'arm', 'feature']).to_parquet(to, index=False, compression='zstd')
    print(table.groupby(['seed', 'arm']).size())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', nargs='?', type=Path, help='folder of a finished run of hinted.yaml')
    parser.add_argument('--seed', type=int, default=0, help='of that run')
    parser.add_argument('--out', type=Path, default=Path('arms'), help='where adapters and texts go')
    parser.add_argument('--collect', type=Path, help='folder of recorded texts')
    parser.add_argument('--to', type=Path, help='file of all of them')
    args = parser.parse_args()
    if args.collect: return collect(args.collect, args.to)
    if args.run is None: parser.error('name a run, or --collect')
    args.out.mkdir(parents=True, exist_ok=True)
    record(args.run, args.seed, args.out)


if __name__ == '__main__': sys.exit(main())
