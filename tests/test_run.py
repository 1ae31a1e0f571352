"The closed loop at its smallest, on a tiny real model: killed in each stage it ends complete, and it refuses what would mix two runs"
import dataclasses, json, os, random, shutil, signal, sqlite3, subprocess, sys, time
from pathlib import Path
from contextlib import suppress
import pandas as pd, pyarrow as pa, pyarrow.parquet as pq
import pytest
from helpers import PLACEHOLDER, tiny_model, tiny_sae, tiny_tokenizer
from saeexplainer.presets import load_preset
from saeexplainer.results import Results
from saeexplainer.run import Run, check_target, execute, stage_functions
from saeexplainer.store import KEYS, RunStore

WORDS = 'cat dog mat fire sea shells rain nation park large area land model feature word natural state hello range print'.split()
STAGES = ['sft', 'prefs1', 'dpo1', 'prefs2', 'dpo2', 'evaluate']
TABLES = 'sft_log dpo_log candidates pairs explanations metrics steering judgements texts features stages'.split()


def make_preset(folder, **kw):
    "A tiny model, its SAE, a feature table under data/tiny and the YAML preset that names them"
    model, data = folder/'model', folder/'data'
    tiny_model(n_layers=3).save_pretrained(model); tiny_tokenizer().save_pretrained(model)
    tiny_sae(data/'tiny'/'sae', d_sae=40, layer=1, model_name='tiny', threshold=(.01, .02))
    context = dict(source='test', tokens=['a', ' cat'], values=[0., 4.], peak=1)
    rows = [dict(index=i, density=.01, max_act=1., status='ok' if i < 36 else ('dead', 'dense', 'unlabelled', 'dead')[i-36], words=[WORDS[i % 20]],
                 explanation=f"the word '{WORDS[i % 20]}'" if i < 36 else None, contexts=[context]) for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), data/'tiny'/'features.parquet')
    fields = dict(base='smollm2-135m', target=str(model), explainer=str(model), sae='tiny/sae', features='tiny/features.parquet', source='tiny/1-res', layer=1,
                  baselines=['autointerp', 'untrained', 'best'], placeholder=PLACEHOLDER, device='cpu', dtype='float32', n_sft=8, n_pref=4, n_test=4, n_output=2, sft_batch=2, dpo_batch=1, sft_epochs=2., dpo_epochs=2., threshold=0., spread=0., margin=0.,
                  n_candidates=4, n_texts=2, n_generative=2, n_activating=2, n_neutral=2, explanation_tokens=6, text_tokens=8, steering_kl=[.01], steering_tokens=4, batch_size=4)
    file = folder/'tiny.yaml'
    file.write_text(''.join(f'{k}: {json.dumps(v)}\n' for k, v in (fields | kw).items()))
    return file


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world')
    os.environ['SAEEXPLAINER_DATA'] = str(folder/'data')
    yield folder, make_preset(folder)
    del os.environ['SAEEXPLAINER_DATA']


@pytest.fixture(scope='module')
def finished(world):
    "A run that nothing interrupted"
    folder, file = world
    with Run(folder/'runs'/'whole', load_preset(file), progress=False) as run:
        report = execute(run, say=lambda line: None)
    return folder/'runs'/'whole', report


def rows_of(store:Path) -> dict: # table -> {key: the other columns}
    if not store.exists(): return {}
    with sqlite3.connect(f'file:{store}?mode=ro', uri=True) as db:
        tables = {}
        for table, keys in KEYS.items():
            if table in ('progress', 'meta', 'replies'): continue
            frame = pd.read_sql_query(f'SELECT * FROM "{table}"', db)
            assert not frame.duplicated(keys).any()
            tables[table] = {tuple(r[keys]): {c: None if pd.isna(r[c]) else r[c] for c in frame.columns.difference(keys)} for _, r in frame.iterrows()}
        return tables


def begun(store:Path, stage:str, before:dict) -> bool: # the stage runs and has written something, or has been at it for a while
    try:
        with sqlite3.connect(f'file:{store}?mode=ro', uri=True) as db:
            row = db.execute('SELECT started, finished FROM progress WHERE stage=?', [stage]).fetchone()
            if not row or row[1]: return bool(row)
            written = sum(db.execute(f'SELECT count(*) FROM "{t}"').fetchone()[0] for t in before) - sum(map(len, before.values()))
    except sqlite3.OperationalError: return False
    if stage == 'sft' or stage.startswith('dpo'): return (store.parent/'explainer'/stage/'checkpoints').exists() or time.time() - row[0] > 3
    return written > 2


def test_killed_in_every_stage(world, finished):
    folder, file = world
    store = folder/'runs'/'killed'/'store.sqlite'
    command = [sys.executable, '-c', 'from saeexplainer.cli import main; main()', 'run', str(file), '--root', str(folder/'runs'), '--name', 'killed', '--json']
    kills = []
    for stage in STAGES:
        before = rows_of(store) or {t: {} for t in KEYS if t not in ('progress', 'meta', 'replies')}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not begun(store, stage, before): time.sleep(.01)
        process.send_signal(signal.SIGKILL); process.wait()
        kills.append(process.returncode)
        after = rows_of(store)
        for table, rows in before.items(): # a score may be filled in, nothing else changes
            for key, row in rows.items():
                assert {k: v for k, v in row.items() if v is not None} == {k: after[table][key][k] for k, v in row.items() if v is not None}
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert kills == [-signal.SIGKILL]*len(STAGES)
    killed, whole = rows_of(store), rows_of(finished[0]/'store.sqlite')
    assert {t: set(r) for t, r in killed.items()} == {t: set(r) for t, r in whole.items()} # no row lost, none twice
    assert killed['explanations'] == whole['explanations'] and killed['pairs'] == whole['pairs'] # and the same questions got the same answers
    with RunStore(store) as s: assert not len(s.unscored()) and all(s.finished(stage) for stage in STAGES)
    assert Results(store.parent/'report').made['sittings'] == dict.fromkeys(STAGES, 2) and "Seconds are those of a stage's last sitting: sft had 2, " in (store.parent/'report'/'report.md').read_text()


TRIES = """
import os, signal, sys, time
import datasets, matplotlib.figure, pandas, peft, sae_lens, transformers, trl
from saeexplainer import ablations, cli, dictionaries, dpo, metrics, prefs, remote, report, run, sft, target, writer

def attempt():
    os.dup2(2, 1)
    try: cli.main(sys.argv[1:])
    except SystemExit as e: return e.code or 0
    return 0

print('ready', flush=True)
for line in sys.stdin: # a try each
    child = os.fork() # of a process that has imported all it needs and computed nothing yet
    if not child: os._exit(attempt())
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def assert_same_rows(found, wanted):
    assert {t: set(rows) for t, rows in found.items()} == {t: set(rows) for t, rows in wanted.items()} # no row lost, none twice
    for table, rows in wanted.items():
        for key, row in rows.items():
            for column, value in row.items():
                assert found[table][key][column] == (pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value), (table, key, column)


def alive(pid:int) -> bool:
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return True


def row_count(store:Path) -> int: # over all tables that a run fills; 0 where there is none yet
    try: return sum(map(len, rows_of(store).values()))
    except (sqlite3.OperationalError, pd.errors.DatabaseError): return 0


def attempt(tries:subprocess.Popen, store:Path, rows:float, seconds:float) -> int: # exit code of a try, killed some seconds after it has written so many rows
    wanted = row_count(store) + rows
    tries.stdin.write('\n')
    tries.stdin.flush()
    pid = int(tries.stdout.readline())
    while alive(pid) and row_count(store) < wanted: time.sleep(.02)
    if alive(pid) and rows < float('inf'):
        time.sleep(seconds)
        with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
    return int(tries.stdout.readline())


@pytest.mark.parametrize('seed', [int(os.environ.get('KILLS_SEED', 0))])
def test_killed_at_random_moments(world, finished, seed):
    "SIGKILL whenever chance has it, again and again: the tables are those of a run that nothing interrupted"
    folder, file = world
    rng, name = random.Random(seed), f'random-{seed}'
    store = folder/'runs'/name/'store.sqlite'
    share = row_count(finished[0]/'store.sqlite')//8 # counted in rows, not in seconds: machines differ from one minute to the next
    moments = [(rng.uniform(0, share), rng.uniform(0, .2)) for _ in range(12)] + [(float('inf'), 0)]
    command = [sys.executable, '-c', TRIES, 'run', str(file), '--root', str(folder/'runs'), '--name', name, '--json']
    environment = os.environ | dict(OMP_NUM_THREADS='1')
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as tries:
        assert tries.stdout.readline() == 'ready\n'
        codes, before = [], {}
        for rows, seconds in moments:
            if codes and codes[-1] == 0: break
            codes.append(attempt(tries, store, rows, seconds))
            after = rows_of(store)
            for table, rows in before.items(): # a score may be filled in, nothing else changes
                for key, row in rows.items(): assert {k: v for k, v in row.items() if v is not None}.items() <= after[table][key].items()
            before = after
        tries.stdin.close()
    assert codes[-1] == 0
    assert set(codes) == {0, -signal.SIGKILL}
    assert codes.count(-signal.SIGKILL) >= 3
    assert_same_rows(rows_of(store), rows_of(finished[0]/'store.sqlite'))
    for table in ('metrics', 'pairs', 'candidates', 'judgements'):
        pd.testing.assert_frame_equal(Results(store.parent/'report')[table], Results(finished[1])[table], rtol=1e-3)


def test_splits_never_overlap(world):
    with Run(world[0]/'runs'/'splits', load_preset(world[1], new_features_in_round_2=True), progress=False) as run:
        used = [i for part in run.splits.values() for i in part]
        assert len(used) == len(set(used)) and all(run.features[i].status in ('ok', 'unlabelled') for i in used)
        assert all(run.features[i].status == 'ok' for name in ('sft', 'validation') for i in run.splits[name])
        assert not set(run.preference_features(1)) & set(run.preference_features(2))


def test_target_is_bit_equal_before_during_and_after(world, finished):
    "Training and sampling an explainer never touch the weights that judge"
    import numpy as np
    from saeexplainer.sft import train_sft
    preset = load_preset(world[1])
    with Run(world[0]/'runs'/'bits', preset, progress=False) as run:
        texts, features = ['The cat sat on the mat.', 'A national park'], list(range(2))
        read = lambda: run.target.max_acts(texts, features)
        before = read()
        during = []
        from transformers import TrainerCallback, Trainer
        step = Trainer.training_step
        def watched(self, *args, **kw):
            loss = step(self, *args, **kw); during.append(read()); return loss
        Trainer.training_step = watched
        try: train_sft(preset, [run.features[i] for i in run.splits['sft']], run.reader, run.adapter('sft'), progress=False)
        finally: Trainer.training_step = step
        explainer = run.explainer('sft'); explainer.sample(run.reader.directions([0, 1]), 3, seed=1)
        assert len(during) >= 4 and all(np.array_equal(before, d) for d in [*during, read()])


def test_a_changed_preset_is_refused(world, finished):
    with pytest.raises(ValueError, match=r"begun with another preset \(n_texts: 2 -> 3\): choose another --name"):
        Run(finished[0], load_preset(world[1], n_texts=3))


def test_a_refused_first_attempt_does_not_take_the_name(world):
    folder = world[0]/'runs'/'again'
    with Run(folder, load_preset(world[1], layer=0), progress=False) as run:
        with pytest.raises(ValueError, match='the preset says layer 0'): execute(run, say=lambda line: None)
    with Run(folder, load_preset(world[1], writer='gpt-5.4-mini'), progress=False) as run: # no key: said before anything is trained
        with pytest.raises(PermissionError, match='OPENAI_API_KEY'): execute(run, say=lambda line: None)
        assert not run.store.begun()
    with Run(folder, load_preset(world[1]), progress=False) as run: run.store.start('sft')
    with pytest.raises(ValueError, match='begun with another preset') as refused: Run(folder, load_preset(world[1], layer=0))
    with Run(folder, load_preset(world[1]), progress=False): pass # `refused` holds the traceback, as a notebook does, but not the run
    assert refused.value


def test_a_paid_writer_with_a_budget(world, monkeypatch):
    "Stopped by the budget, in an outage and by a time-out, a run ends with the rows of one that nothing stopped; what it cost is in its report, and the key is nowhere"
    from fault_server import FaultServer
    from saeexplainer.writers.budget import BudgetSpent
    from writer_server import capable
    monkeypatch.setenv('OPENAI_API_KEY', key := 'sk-planted-0123456789')
    monkeypatch.delenv('OPENAI_BASE_URL', raising=False)
    settings = dict(writer='small', evaluation_writer='small', prices={'small': (1., 10.)}, writer_concurrency=4)
    quiet = lambda folder, **kw: Run(world[0]/'runs'/folder, load_preset(world[1], **settings, **kw), progress=False)
    with FaultServer(content=capable) as server, quiet('paid', writer_url=server.url) as run: execute(run, say=lambda line: None)
    paid = len(server.log)
    trouble = {3: '429', 5: 'cut', 9: '503', 11: 'fenced', 14: 'bad_body', 17: 'closed'}
    with FaultServer(lambda asked, n: trouble.get(n, 'ok'), content=capable, refuses=('max_tokens', 'top_p')) as server: # another URL, other budgets: the same run
        for budget in (6, 20, None):
            with quiet('stopped', writer_url=server.url, budget_requests=budget) as run:
                if budget is None: report = execute(run, say=lambda line: None); break
                with pytest.raises(BudgetSpent, match=f'the budget of {budget} requests: {budget} were sent; raise it'): execute(run, say=lambda line: None)
                assert len(server.log) == budget
    stopped, whole = (rows_of(world[0]/'runs'/name/'store.sqlite') for name in ('stopped', 'paid'))
    assert {t: set(r) for t, r in stopped.items() if t != 'attempts'} == {t: set(r) for t, r in whole.items() if t != 'attempts'} and stopped['explanations'] == whole['explanations']
    made, text = json.loads((report/'provenance.json').read_text()), (report/'report.md').read_text()
    book, = made['writers'].values()
    assert made['writer_cost'] == pytest.approx(server.log.cost({'small': (1., 10.)})) and sum(n for b in book.values() for n in b['attempts'].values()) == len(server.log)
    assert set(book) == {'round1', 'round2', 'round3', 'autointerp', 'evaluate: generative', 'evaluate: activating, neutral', 'judge'} and all(b['outcomes'].keys() == {'ok'} for b in book.values())
    assert made['asked_without'] == {'http://127.0.0.1:small': {'dropped': ['max_tokens', 'top_p'], 'form': 'schema with counts'}} and '## Writers' in text and 'round1' in text
    assert sum(e['action'] == 'ok' or e['action'] == 'fenced' for e in server.log) == paid # no reply was paid twice
    for file in (world[0]/'runs'/'stopped').rglob('*'): assert not file.is_file() or key.encode() not in file.read_bytes(), file


def test_two_models_take_turns(world, finished, monkeypatch):
    from saeexplainer.explainer import Explainer
    from saeexplainer.target import Target
    loads, from_pretrained, load = [], Explainer.from_pretrained, Target.load
    with Run(world[0]/'runs'/'turns', load_preset(world[1], swap_models=True), progress=False) as run:
        monkeypatch.setattr(Explainer, 'from_pretrained', lambda *a, **k: loads.append(('explainer', 'target' in vars(run.models))) or from_pretrained(*a, **k))
        monkeypatch.setattr(Target, 'load', lambda *a, **k: loads.append(('target', False)) or load(*a, **k))
        execute(run, say=lambda line: None)
    assert loads.count(('target', False)) >= 3 and ('explainer', False) in loads and ('explainer', True) not in loads
    turns, whole = rows_of(world[0]/'runs'/'turns'/'store.sqlite'), rows_of(finished[0]/'store.sqlite')
    assert all(turns[t] == whole[t] for t in ('explanations', 'pairs', 'texts', 'metrics'))


def test_one_process_at_a_time(world, finished):
    with Run(finished[0], load_preset(world[1])):
        with pytest.raises(RuntimeError, match='another process is working on'): Run(finished[0], load_preset(world[1]))


def test_too_few_features(world):
    with Run(world[0]/'runs'/'many', load_preset(world[1], n_sft=99), progress=False) as run:
        with pytest.raises(ValueError, match=r'4 test \+ 99 sft \+ 8 validation \+ 4 preference1 features are wanted, there are 37, 36 of them with a label'): run.splits


def test_no_pair_is_an_error_and_the_threshold_can_be_lowered(world):
    from saeexplainer.run import prefs_stage
    folder = world[0]/'runs'/'none'
    with Run(folder, load_preset(world[1], threshold=1e9, sft_epochs=.5), progress=False) as run:
        with pytest.raises(ValueError, match=r'round 1: none of 4 features gave a pair \(4 below_threshold\)'): execute(run, say=lambda line: None)
        assert not len(run.store.pairs()) # no finished stage depends on the threshold
        run.store.put_pairs([(1, f, None, None, None, None, 'below_threshold') for f in run.splits['preference1']]) # as earlier versions kept it
    with Run(folder, load_preset(world[1], sft_epochs=.5), progress=False) as run:
        assert run.changed == dict(threshold=(1e9, 0.))
        run.keep_preset() # as `execute` does
        assert ' pairs of 4 features, threshold 0.00' in prefs_stage(run, 1)
        assert run.store.pairs().dropped.isna().any()
    with pytest.raises(ValueError, match=r'begun with another preset \(sft_epochs: 0.5 -> 2.0\): choose another --name; `--like none` takes over what is the same'):
        Run(folder, load_preset(world[1]))


def test_a_correction_goes_on_where_nothing_depends_on_it(world):
    from saeexplainer.run import forget_empty_claim
    from saeexplainer.training import claim
    folder, now = world[0]/'runs'/'corrected', lambda **fields: Run(folder, load_preset(world[1], **fields), progress=False)
    with now(evaluation_writer='local:/nope') as run: run.store.start('sft')
    with now(sft_lr=1e-4) as run: # SFT has not ended, so what it is told may change; that of its checkpoints is its own affair
        assert run.changed == dict(evaluation_writer=('local:/nope', 'local'), sft_lr=(6e-4, 1e-4))
        assert load_preset(folder/'preset.yaml').evaluation_writer == 'local:/nope' # a look at it changes nothing
        claim(run.adapter('sft')/'checkpoints', dict(sft_lr=6e-4))
        forget_empty_claim(run.adapter('sft'))
        assert not (run.adapter('sft')/'checkpoints').exists()
        run.keep_preset()
        run.store.finish('sft')
    with pytest.raises(ValueError, match=r'\(sft_lr: 0.0001 -> 0.0006\)'): now() # another change beside it is not named
    with now(sft_lr=1e-4, n_texts=3, dpo_rounds=1, n_test=5) as run: run.store.put_explanations([('round1', 1, 0, 'a')])
    with now(sft_lr=1e-4, n_texts=3) as run: run.store.put_texts([('round1', 1, 0, 'preference', 0, 'a text', None, None)])
    with pytest.raises(ValueError, match=r'\(n_texts: 2 -> 3\)'): now(sft_lr=1e-4, n_texts=3)
    with now(sft_lr=1e-4, reward='max') as run:
        for stage in ('prefs1', 'dpo1', 'prefs2'): run.store.start(stage); run.store.finish(stage)
    with pytest.raises(ValueError, match='dpo_rounds: 2 -> 1'): now(sft_lr=1e-4, dpo_rounds=1)
    with now(sft_lr=1e-4, dpo_lr=(2e-4, 5e-5)): pass # round 1 was made with the first of them
    with pytest.raises(ValueError, match='dpo_lr'): now(sft_lr=1e-4, dpo_lr=(3e-4, 1e-4))


def test_every_field_is_one_that_something_depends_on():
    "A new field of the preset must be named in the table, or here"
    from saeexplainer.presets import Preset
    from saeexplainer.run import _MADE_WITH, _SUBJECT
    named = set(' '.join([_SUBJECT, *(fields for *_, fields in _MADE_WITH)]).split())
    free = {'size', 'swap_models', 'corpus', 'corpus_tokens'} # how a run is called, how it is run, and what its features were read on before it
    by_round = {'dpo_beta', 'dpo_lr'}
    fixed = {f.name for f in dataclasses.fields(Preset) if f.metadata['fixed']}
    assert named | free | by_round == fixed and not named & (free | by_round)


@pytest.mark.parametrize('fields, said', [
    (dict(evaluation_writer='local:/nope'), "evaluation_writer: there is no folder '/nope'"),
    (dict(writer='local:/nope/at/all'), 'writer: there is no folder'),
    (dict(writer='local:{bare}'), 'writer: .*has no chat template'),
    (dict(evaluation_writer='local:{empty}'), 'holds no model: weights are read from .safetensors'),
    (dict(target='{empty}'), 'target: .*holds no model'),
    (dict(target='{narrow}'), 'the SAE is 64 wide and the model .* 32'),
    (dict(target='{shallow}'), 'the SAE reads layer 1, the model .* has layers 0 to 0'),
    (dict(steering_prompts=('cat '*600,)), 'a prompt of steering_prompts and steering_tokens need .* tokens, the model .* reads 512'),
    (dict(ao_adapter='./nope'), "ao_adapter: there is no folder './nope'")])
def test_what_would_fail_hours_later_is_said_before_anything_is_trained(world, tmp_path, fields, said):
    "The same name is free for the corrected command"
    folders = {name: str(tmp_path/name) for name in ('bare', 'empty', 'narrow', 'shallow')}
    (tmp_path/'empty').mkdir()
    tiny_model(n_layers=2).save_pretrained(folders['bare'])
    tiny_tokenizer(chat=None).save_pretrained(folders['bare'])
    for name, size in dict(narrow=dict(d=32), shallow=dict(n_layers=1)).items():
        tiny_model(**size).save_pretrained(folders[name])
        tiny_tokenizer().save_pretrained(folders[name])
    with Run(tmp_path/'run', load_preset(world[1], **{k: v.format(**folders) if isinstance(v, str) else v for k, v in fields.items()}), progress=False) as run:
        with pytest.raises((ValueError, OSError), match=said) as refused: execute(run, say=lambda line: None)
        assert '\n' not in str(refused.value) and not run.store.begun()
    with Run(tmp_path/'run', load_preset(world[1]), progress=False) as run: run.check()


def test_controls_need_features(world, tmp_path):
    with Run(tmp_path/'run', load_preset(world[1], n_controls=9), progress=False) as run:
        few = dict(list(run.features.items())[:20])
        run.features.clear()
        run.features.update({i: f if i < 5 else dataclasses.replace(f, max_act=0.) for i, f in few.items()})
        with pytest.raises(ValueError, match='n_controls is 9, but only 5 features are alive'): check_target(run)


def test_features_that_change_under_a_run_are_refused(world, tmp_path, monkeypatch):
    shutil.copytree(world[0]/'data', tmp_path/'data')
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    file, here = tmp_path/'data'/'tiny'/'features.parquet', lambda: Run(tmp_path/'run', load_preset(world[1]), progress=False)
    with here() as run: test = run.splits['test']
    table = pq.read_table(file).to_pandas()
    write = lambda kept: kept.to_parquet(file)
    write(table[table['index'] != test[0]]) # nothing has begun: it is another table, no more
    with here() as run: assert test[0] not in run.splits['test'] and not run.store.begun()
    write(table)
    with here() as run:
        assert run.splits['test'] == test
        run.store.start('sft')
    write(table.assign(explanation=table['explanation'].where(table['index'] != test[0]), status=table['status'].where(table['index'] != test[0], 'unlabelled')))
    for look in (lambda run: execute(run, say=lambda line: None), lambda run: run.splits):
        with here() as run, pytest.raises(ValueError, match=r"features.parquet has changed since .* was begun \(labelled: 36 -> 35; sha256: '.{12}' -> '.{12}'\): put the old one back, or choose"): look(run)
    write(table.sort_index()) # the same features in another file
    with here() as run:
        assert run.splits['test'] == test
        with run.store.transaction() as db: db.execute("DELETE FROM meta WHERE key LIKE 'begun with %'") # begun by an earlier version
    with here() as run: assert run.splits['test'] == test and run.store.meta('begun with features')['labelled'] == 36
    with here() as run: assert run.store.meta('begun with sae') is None and run.reader
    tiny_sae(tmp_path/'data'/'tiny'/'sae', d_sae=40, layer=1, model_name='tiny', threshold=(.01, .02), seed=5)
    with here() as run, pytest.raises(ValueError, match='the SAE tiny/sae has changed since .* was begun'): run.check()


def copy_of(run, folder): # a finished run that may be damaged
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns('.lock'))
    return folder


def flip(file, place=-5): # one bit of one byte
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize('name', ['adapter_model.safetensors', 'adapter_config.json', 'explainer.json', 'training.json'])
def test_a_flipped_bit_in_what_a_run_reads_back_is_seen(world, finished, tmp_path, name):
    from saeexplainer.results import write_results
    folder = copy_of(finished[0], tmp_path/'run')
    flip(folder/'explainer'/'sft'/name)
    with Run(folder, load_preset(world[1]), progress=False) as run:
        said = f'{name} is not what stage sft has made .SHA-256 .{{12}}, not .{{12}}.: put it back from a copy'
        with pytest.raises(ValueError, match=said): run.explainer('sft')
        with pytest.raises(ValueError, match=said): write_results(run)
        run.explainer('dpo1')
    with Run(tmp_path/'twin', load_preset(world[1]), progress=False, like=folder) as run: # nor is it taken over
        with pytest.raises(ValueError, match=f'{name} is not what stage sft has made'): execute(run, say=lambda line: None)
    (folder/'explainer'/'sft'/name).unlink()
    with Run(folder, load_preset(world[1]), progress=False) as run:
        with pytest.raises(FileNotFoundError, match=f'{name} is missing, which stage sft has made'): run.explainer('sft')


def test_a_damaged_table_of_results_names_its_file(finished, tmp_path):
    from saeexplainer.report import write_report
    report = copy_of(finished[1], tmp_path/'report')
    write_report(report)
    flip(report/'metrics.parquet', 60) # in the first page
    with pytest.raises(ValueError, match='metrics.parquet is not a Parquet file, or it is damaged .*checksum'): Results(report)['metrics']
    (report/'provenance.json').write_text((report/'provenance.json').read_text()[:90])
    with pytest.raises(ValueError, match='provenance.json is not JSON'): Results(report)


def test_a_damaged_preset_file(world, tmp_path):
    "The copy in the store counts; without one, as in runs of earlier versions, the line says what is wrong"
    folder, file = tmp_path/'run', tmp_path/'run'/'preset.yaml'
    here = lambda **fields: Run(folder, load_preset(world[1], **fields), progress=False)
    with here() as run: run.store.start('sft')
    whole = file.read_bytes()
    cut = whole[:whole.index(b'n_candidates')]
    for damaged in (cut, b'', whole[:-1], b'name: [', whole.replace(b'sae: tiny', b'sae: \xff\xfe: tiny')):
        file.write_bytes(damaged)
        with here(): pass
        assert file.read_bytes() == whole
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r'another preset \(layer: 1 -> 0\)'): here(layer=0)
    file.unlink()
    with pytest.raises(ValueError, match=r'another preset \(layer: 1 -> 0\)'): here(layer=0)
    file.write_bytes(whole.replace(b'layer: 1', b'layer: 0')) # edited by hand
    with pytest.raises(ValueError, match=r'another preset \(layer: 1 -> 0\)'): here(layer=0)
    with here() as run:
        with run.store.transaction() as db: db.execute("DELETE FROM meta WHERE key='preset'")
    file.write_bytes(cut)
    with RunStore(folder/'store.sqlite') as store, store.transaction() as db: db.execute("DELETE FROM meta WHERE key='preset'")
    with pytest.raises(ValueError, match='preset.yaml is damaged or cut off: put it back from a copy, or choose another --name'): here()
    file.write_bytes(whole)
    with here() as run: assert run.store.meta('preset')['layer'] == 1
    template = 'Über {placeholder}?'
    with Run(tmp_path/'de', load_preset(world[1], template=template), progress=False) as run:
        run.store.start('sft')
        with run.store.transaction() as db: db.execute("DELETE FROM meta WHERE key='preset'")
    (tmp_path/'de'/'preset.yaml').write_bytes((tmp_path/'de'/'preset.yaml').read_text(encoding='utf-8').encode('latin-1')) # as earlier versions did there
    with Run(tmp_path/'de', load_preset(world[1], template=template), progress=False): pass
    assert template in (tmp_path/'de'/'preset.yaml').read_text(encoding='utf-8')


def test_an_empty_store_beside_adapters_is_noticed(world, finished, tmp_path):
    folder = copy_of(finished[0], tmp_path/'run')
    for file in folder.glob('store.sqlite*'): file.unlink()
    with pytest.raises(ValueError, match='store.sqlite is empty or missing, but .*explainer/dpo1 is there'): Run(folder, load_preset(world[1]))
    RunStore(tmp_path/'empty'/'store.sqlite').close() # a store without rows, as earlier versions put there
    shutil.copy(tmp_path/'empty'/'store.sqlite', folder)
    with pytest.raises(ValueError, match=r'holds adapters \(dpo1, dpo2, sft\), but its store is empty: store.sqlite and store.sqlite-wal belong together'): Run(folder, load_preset(world[1]))


def test_a_store_that_is_older_than_its_adapters_is_noticed(world, finished, tmp_path):
    "As one that was copied without its -wal"
    folder = copy_of(finished[0], tmp_path/'run')
    with sqlite3.connect(folder/'store.sqlite') as db: db.execute("DELETE FROM progress WHERE stage IN ('dpo2', 'evaluate')")
    with pytest.raises(ValueError, match=r'holds adapters \(dpo2\) of stages that store.sqlite has not begun: it is older than they are'): Run(folder, load_preset(world[1]))


def test_the_lock_empties_no_file(world, tmp_path):
    (tmp_path/'run').mkdir()
    precious = tmp_path/'precious'
    precious.write_text('all of it')
    (tmp_path/'run'/'.lock').symlink_to(precious)
    try: Run(tmp_path/'run', load_preset(world[1])).close()
    except (OSError, RuntimeError): pass # or it is refused
    assert precious.read_text() == 'all of it'


def test_an_evaluation_is_no_run_and_a_run_no_evaluation(world, tmp_path):
    with Run(tmp_path/'ev', load_preset(world[1]), progress=False) as run:
        run.store.put_explanations([('mine', 1, 0, 'the word dog')])
        with pytest.raises(ValueError, match='holds an evaluation, not a run: choose another --name'): execute(run, say=lambda line: None)
    with Run(tmp_path/'ev', load_preset(world[1], n_sft=9, n_test=3, baselines=()), progress=False): pass # nothing of it was made with these
    with RunStore(tmp_path/'ev'/'store.sqlite') as store: store.put_texts([('mine', 1, 0, 'generative', 0, 'a dog', None, 1.)])
    with pytest.raises(ValueError, match=r"\(text_temperature: 0.8 -> 5.0\)"): Run(tmp_path/'ev', load_preset(world[1], text_temperature=5.))
    with Run(tmp_path/'ev', load_preset(world[1], success=.4), progress=False) as run: run.store.put_metrics([('mine', 1, 'generative', 1.)])
    with pytest.raises(ValueError, match=r"\(success: 0.4 -> 0.5\)"): Run(tmp_path/'ev', load_preset(world[1]))


def test_a_run_can_be_evaluated_as_it_is(world, finished, tmp_path):
    from saeexplainer.metrics import evaluate
    with Run(tmp_path/'run', load_preset(world[1]), progress=False) as run:
        table = evaluate(run, {'mine': {1: 'the word dog', 2: 'the word mat'}}, metrics=('generative',), progress=False)
    assert table.loc[('mine', 'generative'), 'n'] == 2


def test_report(finished):
    folder, report = finished
    names = {p.name for p in report.iterdir()}
    assert {'report.md', 'summary.csv', 'provenance.json', 'examples.json', 'stages.png'} | {f'{t}.parquet' for t in TABLES} == names
    results = Results(report)
    made = results.made
    assert made['seed'] == 0 and made['versions']['torch'] and set(made['seconds']) == set(STAGES) and made['sittings'] == dict.fromkeys(STAGES, 1) and made['like'] is None
    assert results.stages == ['label', 'autointerp', 'untrained', 'sft', 'dpo1', 'dpo2', 'best'] == list(results.said.columns)
    summary = pd.read_csv(report/'summary.csv')
    assert set(summary.stage) == {*results.stages, 'control'} and (summary.low <= summary['mean'] + 1e-9).all()
    candidates = results['candidates']
    assert list(candidates.columns) == ['round', 'feature', 'k', 'text', 'reward'] and len(candidates) == 3*4*4
    best = candidates[candidates['round'] == 3].dropna(subset='reward')
    for f, rows in best.groupby('feature'): assert results.said.loc[f, 'best'] == rows.loc[rows.reward.idxmax(), 'text'] # the target's choice
    with pytest.raises(FileNotFoundError, match="has no table 'x': it has candidates"): results['x']
    with pytest.raises(ValueError, match='holds no results'): Results(folder)


def test_the_report_is_computed_from_its_tables(finished, tmp_path):
    "Without the run, its store and its models; and from changed tables comes a changed report"
    import shutil
    from saeexplainer.report import write_report
    for name in [*(f'{t}.parquet' for t in TABLES), 'provenance.json', 'examples.json']: shutil.copy(finished[1]/name, tmp_path)
    write_report(tmp_path)
    for name in ('report.md', 'summary.csv', 'stages.png'): assert (tmp_path/name).read_bytes() == (finished[1]/name).read_bytes(), name
    page = (tmp_path/'report.md').read_text()
    assert '## Differences' in page and '| dpo2 - sft |' in page and '## Repeats' in page and '| untrained |' in page
    metrics = pd.read_parquet(tmp_path/'metrics.parquet')
    metrics.assign(value=metrics.value + 1).to_parquet(tmp_path/'metrics.parquet')
    write_report(tmp_path)
    assert (tmp_path/'summary.csv').read_bytes() != (finished[1]/'summary.csv').read_bytes()


def test_a_run_like_another_takes_over_what_is_the_same(world, finished, monkeypatch):
    "Adapters, replies and steering where the settings are equal: nothing of it is made again; what differs is"
    from saeexplainer import dpo, sft
    from saeexplainer.lm.models import weights_sha256
    from saeexplainer.target import Target
    from saeexplainer.writers.local import Generator
    def never(*_, **__): raise AssertionError('made again')
    like = dict(like=finished[0], progress=False)
    with monkeypatch.context() as m:
        for owner, name in ((sft, 'sft_trainer'), (dpo, 'dpo_trainer'), (Target, 'steering_values'), (Target, 'generate')): m.setattr(owner, name, never)
        m.setattr(Generator, '_continue', never)
        said = []
        with Run(world[0]/'runs'/'twin', load_preset(world[1]), **like) as run: execute(run, say=said.append)
        assert run.preset and sum('taken over from whole' in line for line in said) == 3
    with Run(world[0]/'runs'/'twin', load_preset(world[1]), progress=False) as run:
        assert run.store.meta('like').startswith('whole: ') and run.store.meta('like').endswith('its steered texts') and run.store.accounts() == {}
    twin, whole = (rows_of(folder/'store.sqlite') for folder in (world[0]/'runs'/'twin', finished[0]))
    assert all(twin[t] == whole[t] for t in ('explanations', 'pairs', 'texts', 'metrics', 'steering', 'steered_texts'))
    same = lambda folder, stage: weights_sha256(folder/'explainer'/stage, 'adapter_model.safetensors')
    with Run(world[0]/'runs'/'cousin', load_preset(world[1], dpo_lr=(1e-2, 1e-2), steering_tokens=3), **like) as run: execute(run, say=lambda line: None)
    assert same(world[0]/'runs'/'cousin', 'sft') == same(finished[0], 'sft') and same(world[0]/'runs'/'cousin', 'dpo1') != same(finished[0], 'dpo1')
    with Run(world[0]/'runs'/'cousin', load_preset(world[1], dpo_lr=(1e-2, 1e-2), steering_tokens=3), progress=False) as run: assert 'steered' not in run.store.meta('like')
    with Run(world[0]/'runs'/'lost', load_preset(world[1]), progress=False, like=world[0]/'runs'/'nobody') as run:
        with pytest.raises(ValueError, match='there is no run .* to take anything over from'): execute(run, say=lambda line: None)
    with Run(world[0]/'runs'/'lost', load_preset(world[1], n_pref=3), progress=False): pass # the name is still free


def test_a_run_of_another_version_says_so(world):
    folder = world[0]/'runs'/'old'
    with Run(folder, load_preset(world[1]), progress=False) as run: run.store.start('sft')
    (folder/'preset.yaml').write_text((folder/'preset.yaml').read_text() + 'dpo_length_normalised: true\n')
    with pytest.raises(ValueError, match='was begun by another version of saeexplainer .*no field .dpo_length_normalised.*choose another --name'): Run(folder, load_preset(world[1]), progress=False)


def test_screening_keeps_held_out_features_out(world, finished):
    from saeexplainer.evaluation.tables import screen_table
    from saeexplainer.studies import screen
    with Run(finished[0], load_preset(world[1]), progress=False) as run:
        held_out = run.splits['preference1'][-2:]
        rows = {name: screen(run, name, load_preset(world[1], **kw), held_out, samples=2, n=2)
                for name, kw in dict(sft={}, paper=dict(reward='max'), worst=dict(negative='worst', dpo_loss='sigmoid_norm'), imitate=dict(dpo_loss='sft')).items()}
        trained = json.loads((run.folder/'screening'/'paper'/'explainer'/'training.json').read_text())
        assert screen(run, 'paper', load_preset(world[1], reward='max'), held_out, samples=2, n=2).equals(rows['paper']) # kept
        with pytest.raises(ValueError, match='holds another screening'): screen(run, 'paper', load_preset(world[1], reward='mean'), held_out, samples=2, n=2)
    assert trained['pairs'] <= 2 and set(rows['paper'].feature) == set(held_out) and rows['paper'].groupby('feature').k.nunique().tolist() == [3, 3]
    table = screen_table(rows)
    assert list(table.index) == ['sft', 'paper', 'worst', 'imitate'] and table.loc['sft', 'greedy - sft'] == 0


def test_arms_are_smaller_runs_that_differ_in_one_thing(tmp_path):
    from saeexplainer.ablations import arms_figure
    from saeexplainer.studies import ARMS, SMALLER, arm_preset, collect_arms
    from saeexplainer.presets import diff
    recorded = load_preset('smollm2-135m', size='full')
    assert {line.split(':')[0] for line in diff(recorded, arm_preset('pool-6')).splitlines()} <= set(SMALLER)
    assert diff(arm_preset('pool-2'), arm_preset('pool-10')) == 'n_candidates: 2 -> 10'
    one, two = arm_preset('split-1'), arm_preset('split-2')
    assert one.n_sft + one.n_pref == two.n_sft + 2*two.n_pref and two.new_features_in_round_2 and not one.new_features_in_round_2
    assert set(ARMS) >= {f'layer-{i}' for i in (3, 9, 15, 21, 27)}
    assert diff(arm_preset('pool-6'), arm_preset('peak-words')) == "label_model: 'claude' -> 'peak words'"
    for arm in ('a', 'b'):
        (tmp_path/arm/'report').mkdir(parents=True)
        (tmp_path/arm/'report'/'provenance.json').write_text(json.dumps(dict(command=arm)))
        pd.DataFrame([(s, f, m, float(f)) for s in ('sft', 'dpo1') for f in range(4) for m in ('generative', 'gap')], columns=['stage', 'feature', 'metric', 'value']).to_parquet(tmp_path/arm/'report'/'metrics.parquet')
        pd.DataFrame([(1, 0, 6., 2., None), (1, 1, 4., 1., None), (1, 2, None, None, 'unscored')], columns=['round', 'feature', 'chosen_score', 'rejected_score', 'dropped']).to_parquet(tmp_path/arm/'report'/'pairs.parquet')
    collect_arms(['a', 'b'], tmp_path, tmp_path)
    arms = pd.read_parquet(tmp_path/'arms.parquet')
    assert len(arms) == 2*16 and json.loads((tmp_path/'arms.json').read_text())['b'] == dict(command='b', pairs=[dict(round=1, pairs=2, chosen=5., rejected=1.5)])
    (tmp_path/'a'/'report'/'provenance.json').write_text(json.dumps(dict(command='again')))
    collect_arms(['a'], tmp_path, tmp_path) # one is collected again, the other stays
    assert len(pd.read_parquet(tmp_path/'arms.parquet')) == 2*16 and {name: made['command'] for name, made in json.loads((tmp_path/'arms.json').read_text()).items()} == dict(a='again', b='b')
    fig = arms_figure(arms, dict(a='2', b='6'), 'K', stages=('sft', 'dpo1'), panels=('generative', 'gap'))
    assert [ax.get_title() for ax in fig.axes] == ['generative accuracy (%)', 'gap H - L (activation)'] and fig.axes[0].get_lines()[0].get_ydata().tolist() == [150., 150.]


def test_other_weights_under_the_same_name_are_refused(world, finished, tmp_path):
    "A model's folder that holds other weights than when the run was begun"
    from safetensors.torch import load_file, save_file
    preset = load_preset(world[1])
    folder = tmp_path/'model'
    shutil.copytree(preset.target, folder)
    preset = dataclasses.replace(preset, target=str(folder))
    with Run(tmp_path/'run', preset, progress=False) as run:
        run.check()
        run.store.start('sft')
    file = folder/'model.safetensors'
    save_file({k: v*2 if k.endswith('norm.weight') else v for k, v in load_file(file).items()}, file, metadata={'format': 'pt'})
    with Run(tmp_path/'run', preset, progress=False) as run:
        with pytest.raises(ValueError, match='the model in .* has changed since .* was begun'): run.check()


@pytest.mark.parametrize('key, value, says', [
    ('preset', '{x', "its fact 'preset' is not JSON"), ('preset', '[1]', "its fact 'preset' is [1], not an object"), ('preset', '{"seed": 0}', "its fact 'preset' lacks name"),
    ('preset', 3, "its fact 'preset' has dpo_beta 3, not a list"), ('begun with features', '"x"', """its fact 'begun with features' is "x", not an object"""), ('files sft', '[1]', "its fact 'files sft' is [1], not an object")])
def test_odd_facts_of_a_run_are_named(world, tmp_path, key, value, says):
    preset = load_preset(world[1])
    with Run(tmp_path/'odd', preset, progress=False) as run: run.store.start('sft')
    if value == 3: value = json.dumps(json.loads(sqlite3.connect(tmp_path/'odd'/'store.sqlite').execute("SELECT value FROM meta WHERE key='preset'").fetchone()[0]) | dict(dpo_beta=3))
    with sqlite3.connect(tmp_path/'odd'/'store.sqlite') as db: db.execute('INSERT OR REPLACE INTO meta VALUES (?, ?)', [key, value])
    with pytest.raises(ValueError) as e:
        with Run(tmp_path/'odd', preset, progress=False) as run: run.features and run.trained('sft')
    assert says in str(e.value) and str(tmp_path/'odd'/'store.sqlite') in str(e.value) and '\n' not in str(e.value) and 'MISSING' not in str(e.value)


def test_an_evaluation_without_its_rows_is_no_report(world, finished, tmp_path):
    from saeexplainer.results import check_measured, provenance
    shutil.copytree(finished[0], tmp_path/'whole')
    with Run(tmp_path/'whole', load_preset(world[1]), progress=False) as run:
        check_measured(run)
        for sql, says in (("UPDATE progress SET started=9e999", 'notes inf as the time when its first stage began'), ("DELETE FROM explanations WHERE stage='dpo2'", 'by dpo2, but not its explanation'),
                          ("UPDATE metrics SET feature=feature+1000", 'which tiny/1-res does not have'), ("DELETE FROM metrics WHERE stage='sft'", 'has no metrics of sft, but its evaluation is marked as finished')):
            with run.store.transaction() as db: db.execute(sql)
            with pytest.raises(ValueError, match=says) as e: (provenance if 'time' in says else check_measured)(run)
            assert str(run.store.path) in str(e.value)
