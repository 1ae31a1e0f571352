"Trainings on a tiny model: what the tests of SFT and DPO train on, here or in a fork that is killed"
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from helpers import tiny_model, tiny_sae, tiny_tokenizer
from peft import LoraConfig, get_peft_model

from saeexplainer.dpo import validation_features
from saeexplainer.explainer import Explainer, save_adapter
from saeexplainer.presets import AS_PAPER, load_preset
from saeexplainer.saes import FeatureReader
from saeexplainer.sft import train_sft

WORDS = 'cat dog mat fire sea shells rain nation park large area land'.split()
EVAL_WORDS = 'print hello state kept'.split()


def features(words=WORDS, start=0):
    "Features with a label each"
    return [SimpleNamespace(id=SimpleNamespace(index=start + i), explanation=f"the word '{word}'")
            for i, word in enumerate(words)]


def make_model(folder, arch='llama'):
    "Write a model and an SAE, where they are not there yet"
    if (folder/'model').exists(): return
    tiny_model(arch).save_pretrained(folder/'model')
    tiny_tokenizer().save_pretrained(folder/'model')
    tiny_sae(folder/'sae')


def preset_in(folder, **fields):
    names = dict(AS_PAPER, target=str(folder/'model'), explainer=str(folder/'model'), sae=str(folder/'sae'),
                 layer=2, device='cpu')
    return load_preset('smollm2-135m', **names | fields)


# ---- SFT

def tiny_preset(folder, arch='llama', **fields):
    "A preset whose model and SAE are made here, where they are not there yet"
    make_model(Path(folder), arch)
    return preset_in(Path(folder), **dict(sft_lr=1e-2, sft_epochs=4., sft_batch=4) | fields)


def train_on(preset, labelled, out, **kw):
    return train_sft(preset, labelled, FeatureReader.load(preset.sae), out, progress=False, **kw)


def train(folder, out, evaluated=False, **fields):
    "Train on all words, with an eval set if wanted; the fields are those of the preset that differ"
    others = features(EVAL_WORDS, start=100) if evaluated else None
    return train_on(tiny_preset(folder, **fields), features(), out, eval_features=others)


# ---- DPO

PAIRS = pd.DataFrame(
    [dict(round=1, feature=i, chosen=f'words such as rain {i}', rejected='a sea', chosen_score=2., rejected_score=1.)
     for i in range(8)]
    + [dict(round=1, feature=9, dropped='low_spread')])

_HELD_OUT = PAIRS.feature.isin(validation_features(PAIRS.feature, seed=0))
CONTRARY = PAIRS.assign( # validation pairs that say the opposite
    chosen=PAIRS.chosen.mask(_HELD_OUT, PAIRS.rejected),
    rejected=PAIRS.rejected.mask(_HELD_OUT, PAIRS.chosen))


def tiny_run(folder, **fields):
    "A preset, its SAE, and the folder of a previous stage, whose adapter is random; made where they are not there yet"
    folder = Path(folder)
    make_model(folder)
    own = dict(dpo_epochs=2., dpo_batch=4, dpo_lr=(1e-2, 1e-2), dpo_loss='sigmoid', dpo_sft_weight=0.)
    preset = preset_in(folder, **own | fields)
    reader = FeatureReader.load(preset.sae)
    if not (folder/'sft').exists():
        explainer = Explainer.from_preset(preset, reader)
        torch.manual_seed(1)
        lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=.05, target_modules='all-linear', init_lora_weights=False)
        save_adapter(get_peft_model(explainer.model, lora), explainer.card, folder/'sft')
    return preset, reader, folder/'sft'
