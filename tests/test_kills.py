"A whole dictionary and a pass over a corpus, killed over and over at moments that a seed draws: nothing is lost"
import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from helpers import SENTENCES

# Libraries are imported once, and every attempt is a fork. It is killed when the disk changes for the n-th time,
# before or after the change; n is drawn.
HARNESS = '''
import gc, json, os, random, signal, sys, traceback
import torch
torch.set_num_threads(1)
import saeexplainer.cli, saeexplainer.metrics, saeexplainer.writer
from saeexplainer.dictionaries import explain_dictionary
from saeexplainer.presets import load_preset
from saeexplainer.sources.reading import build_features

preset_file, explainer, out = sys.argv[1:]
preset = load_preset(preset_file, batch_size=4, batch_tokens=150, corpus=f'{out}/corpus') # many small changes

def explained(name):
    explain_dictionary(preset, explainer, f'{out}/explained/{name}.parquet', progress=False)

def verified(name):
    explain_dictionary(preset, explainer, f'{out}/verified/{name}.jsonl', n=2, progress=False)

def read(name):
    build_features(preset, out=f'{out}/{name}/features.parquet', save_every=0, progress=False)

class Moments: # counts changes of the disk down, to a kill
    def __init__(self, left):
        self.left = left

    def one_less(self):
        self.left -= 1
        if self.left == 0: os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, change):
        def call(*args, **kw):
            self.one_less()
            done = change(*args, **kw)
            self.one_less()
            return done
        return call

def attempt(work, moments): # whether it came to its end
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        return status == 0
    left = Moments(moments)
    for name in ('fsync', 'replace', 'unlink'): setattr(os, name, left.counted(getattr(os, name)))
    try:
        work('killed')
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def compare(work, seed, longest): # how often it was killed
    work('whole') # in this process, so that its forks find everything imported
    gc.collect()
    gc.freeze()
    draw, kills = random.Random(seed), 0
    while not attempt(work, draw.randint(1, longest + kills)): kills += 1
    return kills

print(json.dumps(dict(
    explained=compare(explained, 3, 16), verified=compare(verified, 3, 16), read=compare(read, 4, 8))))
'''


def write_corpus(folder):
    "Twelve files, each of a few sentences"
    folder.mkdir()
    for i in range(12):
        sentences = [SENTENCES[(i + j) % len(SENTENCES)] for j in range(2 + i % 4)]
        (folder/f'{i:02}.txt').write_text(' '.join(sentences))


@pytest.fixture(scope='module')
def done(explained_lab, tmp_path_factory):
    "Folder of what came out, and how often each work was killed"
    out = tmp_path_factory.mktemp('kills')
    write_corpus(out/'corpus')
    environment = os.environ | dict(OMP_NUM_THREADS='1', SAEEXPLAINER_DATA=str(explained_lab.data))
    command = [sys.executable, '-c', HARNESS, explained_lab.file, explained_lab.explainer, out]
    made = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert made.returncode == 0, made.stderr
    return out, json.loads(made.stdout.splitlines()[-1])


def names_in(folder): return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize('work', ['explained', 'verified', 'read'])
def test_each_work_was_killed(done, work):
    _, kills = done
    assert kills[work] >= 3


def test_a_dictionary_without_texts(done):
    folder = done[0]/'explained'
    assert names_in(folder) == {'whole.parquet', 'killed.parquet'}
    assert pq.read_table(folder/'killed.parquet').equals(pq.read_table(folder/'whole.parquet'))


def test_a_dictionary_with_texts(done):
    folder = done[0]/'verified'
    assert names_in(folder) == {'whole.jsonl', 'killed.jsonl'}
    assert (folder/'killed.jsonl').read_bytes() == (folder/'whole.jsonl').read_bytes()


def test_a_pass_over_a_corpus(done):
    whole, killed = (done[0]/name for name in ('whole', 'killed'))
    assert names_in(killed) == names_in(whole) == {'features.parquet', 'features.json'}
    assert pq.read_table(killed/'features.parquet').equals(pq.read_table(whole/'features.parquet'))
    assert json.loads((killed/'features.json').read_text()) == json.loads((whole/'features.json').read_text())
