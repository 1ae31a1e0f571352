"What the tests of a pass over a corpus read: documents, a tiny target, and a process that reads slowly"
import time
from pathlib import Path
import torch
from helpers import SENTENCES, tiny_model, tiny_sae, tiny_tokenizer
from saeexplainer.saes import FeatureReader
from saeexplainer.sources.reading import read_corpus
from saeexplainer.target import Target


def sentences(first, n):
    return ' '.join(SENTENCES[(first+j) % len(SENTENCES)] for j in range(n))


DOCS = [(f's{i % 3}', sentences(i, 1 + i % 4)) for i in range(14)] + [('s1', 'Too short.'), ('s2', 'x'*700)]
HOW = dict(n_top=5, window=30, batch_tokens=150, progress=False) # as `read_slowly` reads


def make_target(folder, arch='llama', architecture='jumprelu', d_sae=64, seed=0, **sae):
    "A tiny model with a tiny SAE at its second of three layers"
    reader = FeatureReader.load(tiny_sae(folder, architecture, layer=1, d_sae=d_sae, seed=seed, **sae))
    return Target(tiny_model(arch, n_layers=3), tiny_tokenizer(), reader)


def slowly(docs):
    "The documents with a pause before each, but for the last ones: they never come"
    for doc in docs[:-5]:
        yield doc
        time.sleep(.02)
    time.sleep(120)


def read_slowly(folder):
    "Read a corpus until somebody ends this process; its state is saved after every batch"
    torch.set_num_threads(1)
    folder = Path(folder)
    read_corpus(make_target(folder/'sae'), slowly(DOCS*3), folder/'state.npz', save_every=0, **HOW)
