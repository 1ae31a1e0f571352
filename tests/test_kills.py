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
from saeexplainer.reading import build_features

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
    assert attempt(lambda: work('whole'), 0)
    draw, kills = random.Random(seed), 0
    while not attempt(lambda: work('killed'), draw.randint(1, longest)): kills += 1
    return kills
'''


def kills_of(work:str, seed:int, longest:int) -> int:
    "Do `work`, an expression of `name`, once in peace and once in processes that are killed"
    done = subprocess.run([sys.executable, '-c', f'{HARNESS}\nprint(compare(lambda name: {work}, {seed}, {longest}))'], capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('n, kind', [(0, 'parquet'), (2, 'jsonl')], ids=['explained', 'verified'])
def test_a_whole_dictionary(world, tmp_path, n, kind):
    folder, file, _ = world
    kills = kills_of(f'explain_dictionary(load_preset({str(file)!r}), {str(folder/"sft")!r}, {str(tmp_path)!r} + f"/{{name}}.{kind}", n={n}, progress=False)', seed=3, longest=16)
    assert kills >= 3
    whole, killed = (tmp_path/f'{name}.{kind}' for name in ('whole', 'killed'))
    assert {f.name for f in tmp_path.iterdir()} == {whole.name, killed.name}
    if kind == 'jsonl': assert killed.read_bytes() == whole.read_bytes()
    else: assert pq.read_table(killed).equals(pq.read_table(whole))


def test_a_pass_over_a_corpus(world, tmp_path):
    _, file, _ = world
    (tmp_path/'corpus').mkdir()
    for i in range(12): (tmp_path/'corpus'/f'{i:02}.txt').write_text(' '.join(SENTENCES[(i + j) % len(SENTENCES)] for j in range(2 + i % 4)))
    preset = f'load_preset({str(file)!r}, batch_tokens=150, corpus={str(tmp_path/"corpus")!r})'
    kills = kills_of(f'build_features({preset}, out={str(tmp_path)!r} + f"/{{name}}/features.parquet", save_every=0, progress=False)', seed=4, longest=8)
    assert kills >= 3
    whole, killed = (tmp_path/name for name in ('whole', 'killed'))
    assert {f.name for f in killed.iterdir()} == {f.name for f in whole.iterdir()} == {'features.parquet', 'features.json'}
    assert pq.read_table(killed/'features.parquet').equals(pq.read_table(whole/'features.parquet'))
    assert json.loads((killed/'features.json').read_text()) == json.loads((whole/'features.json').read_text())
