"The closed loop at its smallest, on a tiny real model: its splits, its models, its paid writer and its report"
import dataclasses
import html
import re
import shlex
import sqlite3
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from fault_server import FaultServer
from helpers import tiny_model, tiny_tokenizer
from tiny_lab import STAGES, copy_of, finish, flip, keys_of, rows_of
from transformers import Trainer
from writer_server import capable

from saeexplainer.benchmark import Bench
from saeexplainer.cli import main
from saeexplainer.dpo import validation_features
from saeexplainer.explainer import Explainer
from saeexplainer.features import Explanation, Feature, FeatureId, load_features
from saeexplainer.metrics import evaluate
from saeexplainer.presets import load_preset
from saeexplainer.report import write_report
from saeexplainer.results import Results, check_measured, provenance
from saeexplainer.run import (
    check_target, disjoint_splits, execute, held_out, opening_lines, prefs_stage, taught_features, there_already,
)
from saeexplainer.sft import train_sft
from saeexplainer.target import Target
from saeexplainer.writers.budget import BudgetSpent

HINTED = str(Path(__file__).parents[1]/'data/smollm2-135m/hinted.yaml')
TABLES = ('marked sft_log dpo_log candidates pairs explanations metrics steering judgements texts '
          'features stages').split()


# ---- splits

@pytest.fixture
def two_rounds(lab, tmp_path):
    "A run that prefers on new features in its second round"
    with lab.run(tmp_path/'splits', new_features_in_round_2=True) as run: yield run


def test_splits_never_overlap(two_rounds):
    used = [i for part in two_rounds.splits.values() for i in part]
    assert len(used) == len(set(used))
    assert not set(two_rounds.preference_features(1)) & set(two_rounds.preference_features(2))


def test_splits_have_no_dead_feature(two_rounds):
    used = {i for part in two_rounds.splits.values() for i in part}
    assert {two_rounds.features[i].status for i in used} <= {'ok', 'unlabelled'}


def test_splits_that_labels_are_learned_from_have_labels(two_rounds):
    learned = [*two_rounds.splits['sft'], *two_rounds.splits['validation']]
    assert {two_rounds.features[i].status for i in learned} == {'ok'}


@pytest.fixture(scope='module')
def embedded():
    "Features of the embedded default, by index"
    return {feature.index: feature for feature in load_features(load_preset('smollm2-135m'))}


def test_a_bench_that_is_held_out_is_in_no_split(embedded):
    preset = load_preset('smollm2-135m', size='full')
    kept = set(Bench.load('bench-1').features)
    free = disjoint_splits(preset, embedded)
    held = disjoint_splits(replace(preset, hold_out='bench-1', n_pref=400), embedded)
    assert kept & set(free['preference1'])
    assert not kept & {i for part in held.values() for i in part}
    assert held['test'] == free['test']


@pytest.mark.parametrize('seed', range(4))
def test_every_seed_finds_the_features_of_the_shipped_recipe(embedded, seed):
    preset = load_preset(HINTED, seed=seed)
    sizes = {name: len(set(part)) for name, part in disjoint_splits(preset, embedded).items()}
    assert (sizes['test'], sizes['sft'], sizes['preference1']) == (preset.n_test, preset.n_sft, preset.n_pref)


@pytest.mark.parametrize('name, changed, line', [
    ('smollm2-135m', 'bench-0', "hold_out: there is no bench 'bench-0'"),
    ('gemma-2-9b-l20', 'bench-1', 'hold_out: bench-1 is of the features of smollm2-135m/9-res-4k, not of gemma'),
])
def test_a_bench_that_cannot_be_held_out_gets_one_line(name, changed, line):
    with pytest.raises(ValueError, match=line): held_out(load_preset(name, hold_out=changed))


def test_too_few_features(lab, tmp_path):
    wanted = r'4 test \+ 99 sft \+ 8 validation \+ 4 preference1 features are wanted'
    with lab.run(tmp_path/'many', n_sft=99) as run:
        with pytest.raises(ValueError, match=f'{wanted}, there are 37, 36 of them with a label'): _ = run.splits


def test_controls_need_features(lab, tmp_path):
    with lab.run(tmp_path/'run', n_controls=9) as run:
        few = dict(list(run.features.items())[:20])
        run.features.clear()
        run.features.update({i: f if i < 5 else dataclasses.replace(f, max_act=0.) for i, f in few.items()})
        with pytest.raises(ValueError, match='n_controls is 9, but only 5 features are alive'): check_target(run)


# ---- models

def test_target_is_bit_equal_before_during_and_after(lab, tmp_path, monkeypatch):
    "Training and sampling an explainer never touch the weights that judge"
    with lab.run(tmp_path/'bits') as run:
        def read(): return run.target.max_acts(['The cat sat on the mat.', 'A national park'], [0, 1])
        before, during, step = read(), [], Trainer.training_step
        def watched(self, *args, **kw):
            loss = step(self, *args, **kw)
            during.append(read())
            return loss
        monkeypatch.setattr(Trainer, 'training_step', watched)
        labelled = [run.features[i] for i in run.splits['sft']]
        train_sft(run.preset, labelled, run.reader, run.adapter('sft'), progress=False)
        run.explainer('sft').sample(run.reader.directions([0, 1]), 3, seed=1)
        assert len(during) >= 4
        for found in [*during, read()]: assert np.array_equal(before, found)


def test_two_models_take_turns(lab, finished_run, tmp_path, monkeypatch):
    loads, load_explainer, load_target = [], Explainer.from_pretrained, Target.load
    with lab.run(tmp_path/'turns', swap_models=True) as run:
        def explainer(*args, **kw):
            loads.append(('explainer', 'target' in vars(run.models)))
            return load_explainer(*args, **kw)
        def target(*args, **kw):
            loads.append(('target', False))
            return load_target(*args, **kw)
        monkeypatch.setattr(Explainer, 'from_pretrained', explainer)
        monkeypatch.setattr(Target, 'load', target)
        finish(run)
    assert loads.count(('target', False)) >= 3
    assert ('explainer', False) in loads
    assert ('explainer', True) not in loads
    turns, whole = rows_of(tmp_path/'turns'/'store.sqlite'), rows_of(finished_run/'store.sqlite')
    for table in ('explanations', 'pairs', 'texts', 'metrics'): assert turns[table] == whole[table]


# ---- what would fail, and when it is said

@pytest.fixture(scope='module')
def wrong_models(tmp_path_factory):
    "Folders of models that cannot be used, by what is wrong with them"
    folder = tmp_path_factory.mktemp('wrong')
    (folder/'empty').mkdir()
    tiny_model(n_layers=2).save_pretrained(folder/'bare')
    tiny_tokenizer(chat=None).save_pretrained(folder/'bare')
    for name, size in dict(narrow=dict(d=32), shallow=dict(n_layers=1)).items():
        tiny_model(**size).save_pretrained(folder/name)
        tiny_tokenizer().save_pretrained(folder/name)
    return {name: str(folder/name) for name in ('bare', 'empty', 'narrow', 'shallow')}


@pytest.mark.parametrize('field, value, said', [
    ('evaluation_writer', 'local:/nope', "evaluation_writer: there is no folder '/nope'"),
    ('writer', 'local:/nope/at/all', 'writer: there is no folder'),
    ('writer', 'local:{bare}', 'writer: .*has no chat template'),
    ('evaluation_writer', 'local:{empty}', 'holds no model: weights are read from .safetensors'),
    ('target', '{empty}', 'target: .*holds no model'),
    ('target', '{narrow}', 'the SAE is 64 wide and the model .* 32'),
    ('target', '{shallow}', 'the SAE reads layer 1, the model .* has layers 0 to 0'),
    ('steering_prompts', ('cat '*600,),
     'a prompt of steering_prompts and steering_tokens need .* tokens, the model .* reads 512'),
    ('ao_adapter', './nope', "ao_adapter: there is no folder './nope'")])
def test_what_would_fail_hours_later_is_said_before_anything_is_trained(
    lab, wrong_models, tmp_path, field, value, said):
    "The same name is free for the corrected command"
    if isinstance(value, str): value = value.format(**wrong_models)
    with lab.run(tmp_path/'run', **{field: value}) as run:
        with pytest.raises((ValueError, OSError), match=said) as refused: finish(run)
        assert '\n' not in str(refused.value)
        assert not run.store.begun()
    with lab.run(tmp_path/'run') as run: run.check()


@pytest.fixture(scope='module')
def pairless(tiny_lab, tmp_path_factory):
    "Folder of a run whose threshold was too high for any pair"
    folder = tmp_path_factory.mktemp('pairless')/'none'
    says = r'round 1: none of 4 features gave a pair \(4 below_threshold: no explanation set it off enough\)'
    with tiny_lab.in_use(), tiny_lab.run(folder, threshold=1e9, sft_epochs=.5) as run:
        with pytest.raises(ValueError, match=says): finish(run)
        assert not len(run.store.pairs()) # no finished stage depends on the threshold
    return folder


def test_the_threshold_can_be_lowered_where_there_was_no_pair(lab, pairless, tmp_path):
    folder = copy_of(pairless, tmp_path/'run')
    with lab.run(folder, threshold=1e9, sft_epochs=.5) as run: # as earlier versions kept it
        run.store.put_pairs([(1, f, None, None, None, None, 'below_threshold') for f in run.splits['preference1']])
    with lab.run(folder, sft_epochs=.5) as run:
        assert run.changed == dict(threshold=(1e9, 0.))
        run.keep_preset() # as `execute` does
        assert ' pairs of 4 features, threshold 0.00' in prefs_stage(run, 1)
        assert run.store.pairs().dropped.isna().any()


def test_what_its_training_was_made_with_cannot_be_changed(lab, pairless):
    says = (r'begun with another preset \(sft_epochs: 0.5 -> 2.0\): choose another --name; '
            '`--like none` takes over what is the same')
    with pytest.raises(ValueError, match=says): lab.run(pairless, threshold=1e9)


# ---- a paid writer with a budget

KEY = 'sk-planted-0123456789'
PRICES = {'small': (1., 10.)}
PAID = dict(writer='small', evaluation_writer='small', prices=PRICES, writer_concurrency=4)
TROUBLE = {3: '429', 5: 'cut', 9: '503', 11: 'fenced', 14: 'bad_body', 17: 'closed'}


@dataclass
class Paid:
    "A run that nothing stopped, and one that budgets, an outage and a time-out did"
    whole: Path
    requests: int # of the first
    stopped: Path
    log: list # of the second's server, over all its sittings

    @property
    def made(self): return Results(self.stopped/'report').made


def trouble(asked, n): return TROUBLE.get(n, 'ok')


def stop_and_go_on(lab, folder, server):
    "Stop a run by two budgets, and let it end without one"
    for budget in (6, 20):
        with lab.run(folder, writer_url=server.url, budget_requests=budget, **PAID) as run:
            says = f'the budget of {budget} requests: {budget} were sent; raise it'
            with pytest.raises(BudgetSpent, match=says): finish(run)
            assert len(server.log) == budget
    with lab.run(folder, writer_url=server.url, **PAID) as run: finish(run)


@pytest.fixture(scope='module')
def paid(tiny_lab, tmp_path_factory):
    folder = tmp_path_factory.mktemp('paid')
    with pytest.MonkeyPatch.context() as patch, tiny_lab.in_use():
        patch.setenv('OPENAI_API_KEY', KEY)
        patch.delenv('OPENAI_BASE_URL', raising=False)
        with FaultServer(content=capable) as server:
            with tiny_lab.run(folder/'whole', writer_url=server.url, **PAID) as run: finish(run)
            requests = len(server.log)
        # another URL and other budgets: the same run
        with FaultServer(trouble, content=capable, refuses=('max_tokens', 'top_p')) as server:
            stop_and_go_on(tiny_lab, folder/'stopped', server)
            return Paid(folder/'whole', requests, folder/'stopped', server.log)


def test_a_run_that_a_budget_stopped_ends_with_the_rows_of_one_that_nothing_stopped(paid):
    stopped, whole = rows_of(paid.stopped/'store.sqlite'), rows_of(paid.whole/'store.sqlite')
    assert keys_of(stopped, without=['attempts']) == keys_of(whole, without=['attempts'])
    assert stopped['explanations'] == whole['explanations']


def test_no_reply_is_paid_twice(paid):
    assert sum(entry['action'] in ('ok', 'fenced') for entry in paid.log) == paid.requests


def test_what_it_cost_is_in_the_report(paid):
    assert paid.made['writer_cost'] == pytest.approx(paid.log.cost(PRICES))
    page = (paid.stopped/'report'/'index.html').read_text()
    assert '<summary>Writers</summary>' in page
    assert ' / round1</th>' in page


def test_the_report_counts_attempts_and_outcomes(paid):
    [book] = paid.made['writers'].values()
    assert sum(n for entry in book.values() for n in entry['attempts'].values()) == len(paid.log)
    assert set(book) == {'round1', 'round2', 'round3', 'autointerp', 'evaluate: generative',
                         'evaluate: activating, neutral', 'judge'}
    for entry in book.values(): assert entry['outcomes'].keys() == {'ok'}


def test_the_report_says_what_the_server_did_not_take(paid):
    asked = {'dropped': ['max_tokens', 'top_p'], 'form': 'schema with counts'}
    assert paid.made['asked_without'] == {'http://127.0.0.1:small': asked}


def test_the_key_is_nowhere(paid):
    for file in paid.stopped.rglob('*'):
        if file.is_file(): assert KEY.encode() not in file.read_bytes(), file


# ---- the report

@pytest.fixture(scope='module')
def report(finished_run): return finished_run/'report'


def test_the_files_of_a_report(report):
    pages = {'index.html', 'summary.csv', 'provenance.json', 'examples.json', 'stages.png'}
    assert pages | {f'{table}.parquet' for table in TABLES} == {file.name for file in report.iterdir()}


def test_a_report_says_how_it_was_made(report):
    made = Results(report).made
    assert made['seed'] == 0
    assert made['versions']['torch']
    assert set(made['seconds']) == set(STAGES)
    assert made['sittings'] == dict.fromkeys(STAGES, 1)
    assert made['like'] is None


def test_a_report_has_every_stage(report):
    results = Results(report)
    assert results.stages == ['label', 'autointerp', 'untrained', 'sft', 'dpo1', 'dpo2', 'best']
    assert results.stages == list(results.said.columns)
    summary = pd.read_csv(report/'summary.csv')
    assert set(summary.stage) == {*results.stages, 'control'}
    assert (summary.low <= summary['mean'] + 1e-9).all()


def test_the_best_candidate_is_the_targets_choice(report):
    results = Results(report)
    candidates = results['candidates']
    assert list(candidates.columns) == ['round', 'feature', 'k', 'text', 'reward']
    assert len(candidates) == 3*4*4
    rewarded = candidates[candidates['round'] == 3].dropna(subset='reward')
    for feature, rows in rewarded.groupby('feature'):
        assert results.said.loc[feature, 'best'] == rows.loc[rows.reward.idxmax(), 'text']


def test_results_that_are_not_there(report):
    with pytest.raises(FileNotFoundError, match="has no table 'x': it has candidates"): Results(report)['x']
    with pytest.raises(ValueError, match='holds no results'): Results(report.parent)


@pytest.fixture(scope='module')
def tables(report, tmp_path_factory):
    "A folder with the tables of a report and a page made of them: no run, no store, no models"
    folder = tmp_path_factory.mktemp('tables')
    kept = [*(f'{table}.parquet' for table in TABLES), 'provenance.json', 'examples.json']
    for name in kept: (folder/name).write_bytes((report/name).read_bytes())
    write_report(folder)
    return folder


def test_the_report_is_computed_from_its_tables(report, tables):
    for name in ('index.html', 'summary.csv', 'stages.png'):
        assert (tables/name).read_bytes() == (report/name).read_bytes(), name


def test_the_page_compares_stages(tables):
    page = (tables/'index.html').read_text()
    for part in ('>Differences and repeats<', '<th scope="row">dpo2 - sft</th>', '<th scope="row">untrained</th>'):
        assert part in page


# ---- what its page tells to do next

@pytest.fixture(scope='module')
def reported(tiny_lab, finished_run, tmp_path_factory):
    "A copy of the run whose report was written by its command, in a folder from which commands are given"
    home = tmp_path_factory.mktemp('home')
    copy_of(finished_run, home/'runs'/'mine')
    with pytest.MonkeyPatch.context() as patch, tiny_lab.in_use():
        patch.chdir(home)
        main(['report', 'mine'])
    return home


def steps_of(home, language):
    "Code of the steps of a page, as a reader copies it"
    page = (home/'runs'/'mine'/'report'/'index.html').read_text()
    return [html.unescape(code) for code in re.findall(f'<code class="{language}">(.*?)</code>', page, re.S)]


def test_every_command_of_the_page_works(reported, lab, monkeypatch, capsys):
    monkeypatch.chdir(reported)
    commands = [line for code in steps_of(reported, 'shell') for line in code.splitlines()]
    assert [shlex.split(command)[1] for command in commands] == ['explain', 'verify', 'export', 'evaluate', 'report']
    for command in commands: main(shlex.split(command)[1:])
    assert (reported/'runs'/'mine-edited'/'report'/'index.html').exists()
    assert capsys.readouterr().out.splitlines()[-1] == 'open runs/mine/report/index.html'


def test_the_code_of_the_page_works(reported, lab, monkeypatch):
    pushed = []
    def push(explainer, repo): pushed.append((explainer.card.stage, repo))
    monkeypatch.chdir(reported)
    monkeypatch.setattr(Explainer, 'push_to_hub', push)
    codes = steps_of(reported, 'python')
    assert ['FeatureExplorer(' in code for code in codes] == [True, False]
    for code in codes: exec(code, {})
    assert pushed == [('dpo2', 'OWNER/mine-dpo2')]


# ---- what a run prints

def test_a_run_explains_its_words_first(lab, tmp_path):
    with lab.run(tmp_path/'mine') as run: lines = opening_lines(run)
    assert lines[0].startswith('tiny (demo): 40 features, 4 to test, 8 for SFT, 8 to validate SFT, ')
    assert ', 4 for the pairs of DPO' in lines[0]
    named = [name for line in lines[1:] for name in line.split(':')[0].strip().split(', ')]
    assert sorted(named) == sorted(STAGES)
    assert '  dpo1, dpo2: training on those pairs (DPO)' in lines


def test_a_resumed_run_says_how_much_was_there(lab, finished_run, tmp_path):
    store = copy_of(finished_run, tmp_path/'mine')/'store.sqlite'
    with closing(sqlite3.connect(store)) as db:
        db.execute("DELETE FROM texts WHERE stage='round1' AND j=1")
        db.execute("DELETE FROM texts WHERE kind='neutral'")
        db.execute("UPDATE texts SET score=NULL WHERE kind='activating'")
        db.execute('UPDATE progress SET finished=NULL')
        db.commit()
    with lab.run(tmp_path/'mine') as run:
        of_round = there_already(run, 'prefs1')
        of_evaluation = there_already(run, 'evaluate')
    n = len(run.preset.baselines) + 1 + 3 # methods: baselines, label, explainers
    asked = n*4*6 # texts of four features, two of each kind
    assert re.fullmatch(r'prefs1 goes on, there are 16 of 16 candidates, (\d+) of (\d+) texts, \1 of \2 texts read',
                        of_round)
    there, wanted = map(int, re.search(r'(\d+) of (\d+) texts,', of_round).groups())
    assert 2*there == wanted
    assert of_evaluation == (f'evaluate goes on, there are {n*4} of {n*4} explanations, {2*asked//3} of {asked} texts, '
                             f'{asked//3} of {asked} texts read')


def test_a_stage_that_has_not_begun_says_nothing(lab, tmp_path):
    with lab.run(tmp_path/'mine') as run: assert {there_already(run, stage) for stage in STAGES} == {''}


def test_from_changed_tables_comes_a_changed_report(report, tables, tmp_path):
    folder = copy_of(tables, tmp_path/'changed')
    metrics = pd.read_parquet(folder/'metrics.parquet')
    metrics.assign(value=metrics.value + 1).to_parquet(folder/'metrics.parquet')
    write_report(folder)
    assert (folder/'summary.csv').read_bytes() != (report/'summary.csv').read_bytes()


def test_a_damaged_table_of_results_names_its_file(report, tmp_path):
    folder = copy_of(report, tmp_path/'report')
    write_report(folder)
    flip(folder/'metrics.parquet', 60) # in the first page
    with pytest.raises(ValueError, match='metrics.parquet is not a Parquet file, or it is damaged .*checksum'):
        _ = Results(folder)['metrics']
    (folder/'provenance.json').write_text((folder/'provenance.json').read_text()[:90])
    with pytest.raises(ValueError, match='provenance.json is not JSON'): Results(folder)


@pytest.mark.parametrize('read, sql, says', [
    (provenance, 'UPDATE progress SET started=9e999', 'notes inf as the time when its first stage began'),
    (check_measured, "DELETE FROM explanations WHERE stage='dpo2'", 'by dpo2, but not its explanation'),
    (check_measured, 'UPDATE metrics SET feature=feature+1000', 'which tiny/1-res does not have'),
    (check_measured, "DELETE FROM metrics WHERE stage='sft'",
     'has no metrics of sft, but its evaluation is marked as finished')])
def test_an_evaluation_without_its_rows_is_no_report(lab, finished_run, tmp_path, read, sql, says):
    folder = copy_of(finished_run, tmp_path/'whole')
    with lab.run(folder) as run:
        check_measured(run)
        with run.store.transaction() as db: db.execute(sql)
        with pytest.raises(ValueError, match=says) as error: read(run)
        assert str(run.store.path) in str(error.value)


def test_a_run_can_be_evaluated_as_it_is(lab, tmp_path):
    mine = {1: 'the word dog', 2: 'the word mat'}
    with lab.run(tmp_path/'run') as run:
        table = evaluate(run, {'mine': mine}, metrics=('generative',), progress=False)
    assert table.loc[('mine', 'generative'), 'n'] == 2


# ---- the best checkpoint by validation pairs

@pytest.fixture(scope='module')
def validated_run(tiny_lab, finished_run, tmp_path_factory):
    "Folder of a run that keeps the best checkpoint of each round, and its lines"
    folder = tmp_path_factory.mktemp('validated')/'run'
    lines = []
    with tiny_lab.in_use(), tiny_lab.run(folder, like=finished_run, dpo_keep='best') as run:
        execute(run, say=lines.append)
    return folder, lines


def test_a_run_says_how_many_pairs_chose_its_checkpoint(validated_run):
    _, lines = validated_run
    rounds = [line for line in lines if line.startswith('dpo')]
    assert len(rounds) == 2
    for line in rounds: assert re.search(r'step \d+ kept by [12] validation pairs', line)


def test_the_log_of_a_run_has_the_accuracy_of_validation_pairs(validated_run):
    folder, _ = validated_run
    log = Results(folder/'report')['dpo_log']
    evaluated = log.dropna(subset='eval_accuracy')
    assert evaluated['round'].unique().tolist() == [1, 2]
    assert evaluated['eval_accuracy'].between(0, 1).all()


def test_validation_features_are_preference_features(lab, validated_run):
    folder, _ = validated_run
    with lab.run(folder, dpo_keep='best') as run:
        held_out = set(validation_features(run.preference_features(1), run.preset.seed))
        assert held_out <= set(run.splits['preference1'])
        assert not held_out & set(run.splits['test'])


# ---- what SFT learns

def told(index, *pairs): # a feature, and (model, text) of what is said of it
    said = tuple(Explanation(text, model, 'words') for model, text in pairs)
    return Feature(FeatureId('tiny', '1-res', index), 'the label', 2., .01, explanations=said)


def taught(by, *features):
    by_index = {feature.index: feature for feature in features}
    run = SimpleNamespace(preset=SimpleNamespace(sft_labels=by), features=by_index, splits={'sft': list(by_index)})
    return [(feature.index, feature.explanation) for feature in taught_features(run, 'sft')]


def test_sft_learns_what_the_preset_says():
    features = told(3, ('mine', 'rain'), ('peak words', 'sea')), told(5, ('mine', 'fog')), told(8)
    assert taught(None, *features) == [(3, 'the label'), (5, 'the label'), (8, 'the label')]
    assert taught('peak words', *features) == [(3, 'sea')]
    assert taught('mine', *features) == [(3, 'rain'), (5, 'fog')]
    assert taught('mine') == []


def test_explanations_that_nobody_gave():
    with pytest.raises(ValueError, match="sft_labels: 'guess' has explained none of the 1 features"):
        taught('guess', told(3, ('mine', 'rain')))
