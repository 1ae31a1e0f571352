"A whole dictionary and a pass over a corpus, killed over and over at moments that a seed draws: what comes out is what an uninterrupted call writes"
import json, os, subprocess, sys
import pyarrow.parquet as pq
import pytest
from helpers import SENTENCES
from test_dictionaries import world

# Libraries are imported once, and every attempt is a fork. It is killed when the disk changes for the n-th time, before or after the change; n is drawn.
HARNESS = '''
import os, random, signal, traceback
import torch
torch.set_num_threads(1)
import saeexplainer.cli, saeexplainer.metrics, saeexplainer.writer
from saeexplainer.dictionaries import explain_dictionary
from saeexplainer.presets import load_preset
from saeexplainer.sources.reading import build_features

def moment(left): # counts down
    left[0] -= 1
    if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)

def attempt(work, moments): # whether it came to its end
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        return status == 0
    left = [moments]
    def counted(change):
        def call(*args, **kw):
            moment(left)
            done = change(*args, **kw)
            moment(left)
            return done
        return call
    for name in ('fsync', 'replace', 'unlink'): setattr(os, name, counted(getattr(os, name)))
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def compare(work, seed, longest): # how often it was killed
    work('whole') # in this process, so that its forks find everything imported
    draw, kills = random.Random(seed), 0
    while not attempt(lambda: work('killed'), draw.randint(1, longest + kills)): kills += 1
    return kills
'''


@pytest.fixture(scope='module')
def done(world, tmp_path_factory):
    "Folder of what came out, and how often each work was killed"
    folder, file, _ = world
    out = tmp_path_factory.mktemp('kills')
    (out/'corpus').mkdir()
    for i in range(12): (out/'corpus'/f'{i:02}.txt').write_text(' '.join(SENTENCES[(i + j) % len(SENTENCES)] for j in range(2 + i % 4)))
    script = HARNESS + f'''
import json
out, preset = {str(out)!r}, load_preset({str(file)!r}, batch_tokens=150, corpus={str(out/"corpus")!r})
def explained(name): explain_dictionary(preset, {str(folder/"sft")!r}, f'{{out}}/explained/{{name}}.parquet', progress=False)
def verified(name): explain_dictionary(preset, {str(folder/"sft")!r}, f'{{out}}/verified/{{name}}.jsonl', n=2, progress=False)
def read(name): build_features(preset, out=f'{{out}}/{{name}}/features.parquet', save_every=0, progress=False)
print(json.dumps([compare(explained, 3, 16), compare(verified, 3, 16), compare(read, 4, 8)]))
'''
    made = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert made.returncode == 0, made.stderr
    return out, dict(zip(('explained', 'verified', 'read'), json.loads(made.stdout.splitlines()[-1])))


@pytest.mark.parametrize('work, kind', [('explained', 'parquet'), ('verified', 'jsonl')])
def test_a_whole_dictionary(done, work, kind):
    out, kills = done
    whole, killed = (out/work/f'{name}.{kind}' for name in ('whole', 'killed'))
    assert kills[work] >= 3 and {f.name for f in (out/work).iterdir()} == {whole.name, killed.name}
    if kind == 'jsonl': assert killed.read_bytes() == whole.read_bytes()
    else: assert pq.read_table(killed).equals(pq.read_table(whole))


def test_a_pass_over_a_corpus(done):
    out, kills = done
    whole, killed = (out/name for name in ('whole', 'killed'))
    assert kills['read'] >= 3 and {f.name for f in killed.iterdir()} == {f.name for f in whole.iterdir()} == {'features.parquet', 'features.json'}
    assert pq.read_table(killed/'features.parquet').equals(pq.read_table(whole/'features.parquet'))
    assert json.loads((killed/'features.json').read_text()) == json.loads((whole/'features.json').read_text())
