"Shared by the tests of what explanations are judged by: a tiny target, documents, and a data folder with a preset"
import json
import random
from pathlib import Path
from helpers import PLACEHOLDER, SENTENCES, tiny_model, tiny_sae, tiny_tokenizer
from saeexplainer.features import Context, Feature, FeatureId, save_features
from saeexplainer.presets import AS_PAPER
from saeexplainer.replies import Reply
from saeexplainer.saes import FeatureReader
from saeexplainer.target import Target

WORDS = ('cat', 'dog', 'mat', 'fire', 'sea', 'shells', 'rain', 'nation', 'park', 'large', 'area', 'land')
ALIVE = 16 # features of the table that have a label, of 20
THRESHOLD = (.01, .02) # of the SAE: most features fire on something


def tiny_target(folder, arch='llama', d_sae=40, tokenizer=None, model=None, **sae):
    "A random model and a random SAE of its layer 1"
    reader = FeatureReader.load(tiny_sae(folder, layer=1, d_sae=d_sae, threshold=THRESHOLD, **sae))
    return Target(model or tiny_model(arch, n_layers=3), tokenizer or tiny_tokenizer(), reader)


def running_text(number, sentences=20): # text of a document
    drawn = random.Random(number)
    return ' '.join(drawn.choice(SENTENCES) for _ in range(sentences))


def running_documents(n=12): # (source, text) of each
    return [(f'source {number % 2}', running_text(number)) for number in range(n)]


def context(text, peak, value=0., kind=''): # of words
    words = [f' {word}' for word in text.split()]
    values = [value if place == peak else 0. for place in range(len(words))]
    return Context('a book', tuple(words), tuple(values), peak, kind)


def judging_contexts(word): # two that fire, a hard and a random one
    return [
        context(f'they saw the {word} there', 3, 2., 'fires'),
        context(f'one more {word} is here', 2, 4., 'fires'),
        context(f'no {word} at all', 1, 0., 'hard'),
        context('something else is written here', 0, 0., 'random'),
    ]


def feature(index, word='rain', **fields):
    fields = dict(explanation=f"the word '{word}'", max_act=4., density=.01, words=(word,)) | fields
    fields = dict(contexts=[context(f'the {word} fell', 1, 4.)], test_contexts=judging_contexts(word)) | fields
    return Feature(FeatureId('tiny', '1-res', index), **fields)


def feature_row(index): # of the feature table
    word = WORDS[index % len(WORDS)]
    labelled = index < ALIVE
    return dict(
        index=index,
        density=.01,
        max_act=1.,
        status='ok' if labelled else 'unlabelled',
        words=[word],
        explanation=f"the word '{word}'" if labelled else None,
        contexts=[context(f'the {word} fell', 1, 4.)],
        test_contexts=judging_contexts(word),
    )


SMALL = dict(
    **AS_PAPER, baselines=[], device='cpu', dtype='float32', placeholder=PLACEHOLDER,
    n_sft=6, n_pref=2, n_test=3, n_output=0, n_candidates=2, n_texts=1, n_generative=2, n_activating=1, n_neutral=1,
    sft_batch=2, dpo_batch=1, sft_epochs=1., dpo_epochs=1., dpo_rounds=1, threshold=0., spread=0., margin=0.,
    explanation_tokens=6, text_tokens=8, batch_size=4,
)

def judged_preset(folder, **fields) -> Path:
    "Save a tiny model, its SAE, a feature table and running text; return the YAML preset that names them"
    model = folder/'model'
    data = folder/'data'
    tiny_model(n_layers=3).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    tiny_sae(data/'tiny'/'sae', d_sae=20, layer=1, model_name='tiny', threshold=THRESHOLD)
    save_features([feature_row(index) for index in range(20)], data/'tiny'/'features.parquet', 'tiny/1-res')
    texts = folder/'texts.jsonl'
    texts.write_text(''.join(json.dumps({'text': text}) + '\n' for _, text in running_documents()))
    places = dict(base='smollm2-135m', target=str(model), explainer=str(model), sae='tiny/sae', source='tiny/1-res',
                  features='tiny/features.parquet', layer=1, corpus=str(texts))
    lines = [f'{name}: {json.dumps(value)}\n' for name, value in (places | SMALL | fields).items()]
    file = folder/'tiny.yaml'
    file.write_text(''.join(lines))
    return file


class Scripted:
    "A writer that gives the same answer to everything, and counts what it is asked"
    def __init__(self, text):
        self.text = text
        self.asked = []

    def write(self, requests, **_):
        self.asked += requests
        return [Reply(self.text) for _ in requests]
