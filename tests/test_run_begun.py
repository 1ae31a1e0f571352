"What a run was begun with: what would mix two runs is refused, a correction goes on, damage is named with its file"
import dataclasses
import json
import shutil
import sqlite3

import pyarrow.parquet as pq
import pytest
from helpers import tiny_sae
from safetensors.torch import load_file, save_file
from tiny_lab import SAE, TinyLab, copy_of, finish, flip

from saeexplainer.presets import Preset, load_preset
from saeexplainer.results import write_results
from saeexplainer.run import _MADE_WITH, _SUBJECT, Run, forget_empty_claim
from saeexplainer.store import RunStore
from saeexplainer.training import claim


def refused(says): # to be written behind `with`
    return pytest.raises(ValueError, match=says)


def begin(lab, folder, **fields):
    "Begin a run, and no more"
    with lab.run(folder, **fields) as run: run.store.start('sft')
    return folder


def forget(run, name):
    "Take a fact out of a store, as if an earlier version had made it"
    with run.store.transaction() as db: db.execute('DELETE FROM meta WHERE key LIKE ?', [name])


# ---- another preset

def test_a_changed_preset_is_refused(lab, finished_run):
    with refused(r"begun with another preset \(n_texts: 2 -> 3\): choose another --name"):
        Run(finished_run, lab.preset(n_texts=3))


def test_a_preset_that_fails_does_not_take_the_name(lab, tmp_path):
    with lab.run(tmp_path/'run', layer=0) as run:
        with refused('the preset says layer 0'): finish(run)
    begin(lab, tmp_path/'run')


def test_a_missing_key_is_said_before_anything_is_trained(lab, tmp_path):
    with lab.run(tmp_path/'run', writer='gpt-5.4-mini') as run:
        with pytest.raises(PermissionError, match='OPENAI_API_KEY'): finish(run)
        assert not run.store.begun()
    begin(lab, tmp_path/'run')


def test_a_run_that_is_refused_is_not_held(lab, tmp_path):
    begin(lab, tmp_path/'run')
    with refused('begun with another preset') as kept: Run(tmp_path/'run', lab.preset(layer=0))
    with lab.run(tmp_path/'run'): pass # `kept` holds the traceback, as a notebook does, but not the run
    assert kept.value


def test_one_process_at_a_time(lab, finished_run):
    with Run(finished_run, lab.preset()):
        with pytest.raises(RuntimeError, match='another process is working on'): Run(finished_run, lab.preset())


def test_a_run_of_another_version_says_so(lab, tmp_path):
    file = begin(lab, tmp_path/'old')/'preset.yaml'
    file.write_text(file.read_text() + 'dpo_length_normalised: true\n')
    says = ('was begun by another version of saeexplainer .*no field .dpo_length_normalised.*'
            'choose another --name')
    with refused(says): lab.run(tmp_path/'old')


# ---- corrections

def test_what_no_finished_stage_depends_on_may_change(lab, tmp_path):
    begin(lab, tmp_path/'run', evaluation_writer='local:/nope')
    with lab.run(tmp_path/'run', sft_lr=1e-4) as run:
        assert run.changed == dict(evaluation_writer=('local:/nope', 'local'), sft_lr=(6e-4, 1e-4))
    kept = load_preset(tmp_path/'run'/'preset.yaml')
    assert kept.evaluation_writer == 'local:/nope' # a look at it changes nothing


def test_a_claim_without_checkpoints_is_forgotten(lab, tmp_path):
    "What training is told may change; what its checkpoints were made with is their own affair"
    begin(lab, tmp_path/'run')
    with lab.run(tmp_path/'run', sft_lr=1e-4) as run:
        checkpoints = run.adapter('sft')/'checkpoints'
        claim(checkpoints, dict(sft_lr=6e-4))
        forget_empty_claim(run.adapter('sft'))
        assert not checkpoints.exists()


@pytest.fixture
def corrected(lab, tmp_path):
    "A function that opens a run whose SFT was trained with a corrected learning rate"
    begin(lab, tmp_path/'corrected')
    def now(**fields): return lab.run(tmp_path/'corrected', **fields)
    with now(sft_lr=1e-4) as run:
        run.keep_preset()
        run.store.finish('sft')
    return now


def test_what_a_finished_stage_was_made_with_is_settled(corrected):
    with refused(r'\(sft_lr: 0.0001 -> 0.0006\)'): # another change beside it is not named
        corrected(evaluation_writer='local:/nope')


def test_fields_settle_with_the_rows_made_with_them(corrected):
    with corrected(sft_lr=1e-4, n_texts=3, dpo_rounds=1, n_test=5) as run:
        run.store.put_explanations([('round1', 1, 0, 'a')])
    with corrected(sft_lr=1e-4, n_texts=3) as run:
        run.store.put_texts([('round1', 1, 0, 'preference', 0, 'a text', None, None)])
    with refused(r'\(n_texts: 2 -> 3\)'): corrected(sft_lr=1e-4, n_texts=3)


def test_rounds_that_were_begun_stay(corrected):
    with corrected(sft_lr=1e-4, reward='max') as run:
        for stage in ('prefs1', 'dpo1', 'prefs2'):
            run.store.start(stage)
            run.store.finish(stage)
    with refused('dpo_rounds: 2 -> 1'): corrected(sft_lr=1e-4, dpo_rounds=1)
    with corrected(sft_lr=1e-4, dpo_lr=(2e-4, 5e-5)): pass # round 1 was made with the first of them
    with refused('dpo_lr'): corrected(sft_lr=1e-4, dpo_lr=(3e-4, 1e-4))


def fixed_fields():
    "Fields of a preset that a run cannot change at will"
    return {field.name for field in dataclasses.fields(Preset) if field.metadata['fixed']}


def test_every_field_is_one_that_something_depends_on():
    "A new field of the preset must be named in the table, or here"
    named = set(' '.join([_SUBJECT, *(fields for *_, fields in _MADE_WITH)]).split())
    free = {'size', 'swap_models', 'corpus', 'corpus_tokens'} # how a run is called and made, what features were read on
    by_round = {'dpo_beta', 'dpo_lr'}
    assert named | free | by_round == fixed_fields()
    assert not named & (free | by_round)


# ---- other inputs

@pytest.fixture
def own_lab(tiny_lab, tmp_path):
    "A lab whose files may be changed; its models are those of the tiny lab"
    own = TinyLab(tmp_path/'lab')
    shutil.copytree(tiny_lab.data, own.data)
    shutil.copy(tiny_lab.file, own.file)
    with own.in_use(): yield own


def without_label(table, index):
    "A feature table in which one feature has no label"
    one = table['index'] == index
    return table.assign(explanation=table['explanation'].where(~one), status=table['status'].where(~one, 'unlabelled'))


@pytest.fixture
def labelled(own_lab, tmp_path):
    "A run that was begun, its first test feature, and the table of its features"
    with own_lab.run(tmp_path/'run') as run: test = run.splits['test']
    begin(own_lab, tmp_path/'run')
    return tmp_path/'run', test, pq.read_table(own_lab.features).to_pandas()


def test_features_may_change_before_a_run_begins(own_lab, tmp_path):
    with own_lab.run(tmp_path/'run') as run: test = run.splits['test']
    table = pq.read_table(own_lab.features).to_pandas()
    table[table['index'] != test[0]].to_parquet(own_lab.features)
    with own_lab.run(tmp_path/'run') as run:
        assert test[0] not in run.splits['test']
        assert not run.store.begun()
    table.to_parquet(own_lab.features)
    with own_lab.run(tmp_path/'run') as run: assert run.splits['test'] == test


def splits(run): return run.splits

@pytest.mark.parametrize('look', [finish, splits])
def test_features_that_change_under_a_run_are_refused(own_lab, labelled, look):
    folder, test, table = labelled
    without_label(table, test[0]).to_parquet(own_lab.features)
    changed = r"\(labelled: 36 -> 35; sha256: '.{12}' -> '.{12}'\)"
    says = rf'features.parquet has changed since .* was begun {changed}: put the old one back, or choose'
    with own_lab.run(folder) as run:
        with refused(says): look(run)


def test_the_same_features_in_another_file_are_no_change(own_lab, labelled):
    folder, test, table = labelled
    table.sort_index().to_parquet(own_lab.features)
    with own_lab.run(folder) as run: assert run.splits['test'] == test


def test_a_run_of_an_earlier_version_notes_its_features_now(own_lab, labelled):
    folder, test, _ = labelled
    with own_lab.run(folder) as run: forget(run, 'begun with %')
    with own_lab.run(folder) as run:
        assert run.splits['test'] == test
        assert run.store.meta('begun with features')['labelled'] == 36


def test_an_sae_that_changes_under_a_run_is_refused(own_lab, labelled):
    folder, *_ = labelled
    with own_lab.run(folder) as run:
        assert run.store.meta('begun with sae') is None
        assert run.reader
    tiny_sae(own_lab.sae, seed=5, **SAE)
    with own_lab.run(folder) as run:
        with refused('the SAE tiny/sae has changed since .* was begun'): run.check()


def doubled(weights): # the norms of a model
    return {name: weight*2 if name.endswith('norm.weight') else weight for name, weight in weights.items()}


def test_other_weights_under_the_same_name_are_refused(lab, tmp_path):
    "A model's folder that holds other weights than when the run was begun"
    model = shutil.copytree(lab.model, tmp_path/'model')
    with lab.run(tmp_path/'run', target=str(model)) as run:
        run.check()
        run.store.start('sft')
    file = model/'model.safetensors'
    save_file(doubled(load_file(file)), file, metadata={'format': 'pt'})
    with lab.run(tmp_path/'run', target=str(model)) as run:
        with refused('the model in .* has changed since .* was begun'): run.check()


# ---- damaged files

FILES = ['adapter_model.safetensors', 'adapter_config.json', 'explainer.json', 'training.json']

@pytest.mark.parametrize('name', FILES)
def test_a_flipped_bit_in_what_a_run_reads_back_is_seen(lab, finished_run, tmp_path, name):
    folder = copy_of(finished_run, tmp_path/'run')
    flip(folder/'explainer'/'sft'/name)
    says = f'{name} is not what stage sft has made .SHA-256 .{{12}}, not .{{12}}.: put it back from a copy'
    with lab.run(folder) as run:
        with refused(says): run.explainer('sft')
        with refused(says): write_results(run)
        run.explainer('dpo1')


@pytest.mark.parametrize('name', FILES)
def test_a_damaged_adapter_is_not_taken_over(lab, finished_run, tmp_path, name):
    folder = copy_of(finished_run, tmp_path/'run')
    flip(folder/'explainer'/'sft'/name)
    with lab.run(tmp_path/'twin', like=folder) as run:
        with refused(f'{name} is not what stage sft has made'): finish(run)


@pytest.mark.parametrize('name', FILES)
def test_a_missing_file_of_an_adapter_is_named(lab, finished_run, tmp_path, name):
    folder = copy_of(finished_run, tmp_path/'run')
    (folder/'explainer'/'sft'/name).unlink()
    with lab.run(folder) as run:
        with pytest.raises(FileNotFoundError, match=f'{name} is missing, which stage sft has made'):
            run.explainer('sft')


def damages(whole):
    "What may be left of a preset's file"
    cut = whole[:whole.index(b'n_candidates')]
    return [cut, b'', whole[:-1], b'name: [', whole.replace(b'sae: tiny', b'sae: \xff\xfe: tiny')]


OTHER_LAYER = r'another preset \(layer: 1 -> 0\)'

@pytest.mark.parametrize('n', range(5))
def test_a_damaged_preset_file_is_written_anew(lab, tmp_path, n):
    "The copy in the store counts"
    file = begin(lab, tmp_path/'run')/'preset.yaml'
    whole = file.read_bytes()
    file.write_bytes(damages(whole)[n])
    with lab.run(tmp_path/'run'): pass
    assert file.read_bytes() == whole
    file.write_bytes(damages(whole)[n])
    with refused(OTHER_LAYER): lab.run(tmp_path/'run', layer=0)


def test_a_preset_file_that_is_gone_or_edited_is_not_what_counts(lab, tmp_path):
    file = begin(lab, tmp_path/'run')/'preset.yaml'
    whole = file.read_bytes()
    file.unlink()
    with refused(OTHER_LAYER): lab.run(tmp_path/'run', layer=0)
    file.write_bytes(whole.replace(b'layer: 1', b'layer: 0')) # edited by hand
    with refused(OTHER_LAYER): lab.run(tmp_path/'run', layer=0)


def test_a_damaged_preset_file_without_a_copy_is_named(lab, tmp_path):
    "As in runs of earlier versions"
    file = begin(lab, tmp_path/'run')/'preset.yaml'
    whole = file.read_bytes()
    with lab.run(tmp_path/'run') as run: forget(run, 'preset')
    file.write_bytes(damages(whole)[0])
    with RunStore(tmp_path/'run'/'store.sqlite') as store, store.transaction() as db:
        db.execute("DELETE FROM meta WHERE key='preset'")
    with refused('preset.yaml is damaged or cut off: put it back from a copy, or choose another --name'):
        lab.run(tmp_path/'run')
    file.write_bytes(whole)
    with lab.run(tmp_path/'run') as run: assert run.store.meta('preset')['layer'] == 1


def test_a_preset_in_another_encoding_is_read_and_written_anew(lab, tmp_path):
    template = 'Über {placeholder}?'
    file = begin(lab, tmp_path/'run', template=template)/'preset.yaml'
    with lab.run(tmp_path/'run', template=template) as run: forget(run, 'preset')
    file.write_bytes(file.read_text(encoding='utf-8').encode('latin-1')) # as earlier versions did there
    with lab.run(tmp_path/'run', template=template): pass
    assert template in file.read_text(encoding='utf-8')


def test_a_missing_store_beside_adapters_is_noticed(lab, finished_run, tmp_path):
    folder = copy_of(finished_run, tmp_path/'run')
    for file in folder.glob('store.sqlite*'): file.unlink()
    with refused('store.sqlite is empty or missing, but .*explainer/dpo1 is there'): Run(folder, lab.preset())


def test_an_empty_store_beside_adapters_is_noticed(lab, finished_run, tmp_path):
    folder = copy_of(finished_run, tmp_path/'run')
    for file in folder.glob('store.sqlite*'): file.unlink()
    RunStore(tmp_path/'empty'/'store.sqlite').close() # a store without rows, as earlier versions put there
    shutil.copy(tmp_path/'empty'/'store.sqlite', folder)
    says = (r'holds adapters \(dpo1, dpo2, sft\), but its store is empty: '
            'store.sqlite and store.sqlite-wal belong together')
    with refused(says): Run(folder, lab.preset())


def test_a_store_that_is_older_than_its_adapters_is_noticed(lab, finished_run, tmp_path):
    "As one that was copied without its -wal"
    folder = copy_of(finished_run, tmp_path/'run')
    with sqlite3.connect(folder/'store.sqlite') as db:
        db.execute("DELETE FROM progress WHERE stage IN ('dpo2', 'evaluate')")
    with refused(r'holds adapters \(dpo2\) of stages that store.sqlite has not begun: it is older than they are'):
        Run(folder, lab.preset())


def test_the_lock_empties_no_file(lab, tmp_path):
    (tmp_path/'run').mkdir()
    precious = tmp_path/'precious'
    precious.write_text('all of it')
    (tmp_path/'run'/'.lock').symlink_to(precious)
    try: Run(tmp_path/'run', lab.preset()).close()
    except (OSError, RuntimeError): pass # or it is refused
    assert precious.read_text() == 'all of it'


def fact_in(store, key):
    "A fact about a run, as JSON"
    with sqlite3.connect(store) as db:
        [text] = db.execute('SELECT value FROM meta WHERE key=?', [key]).fetchone()
    return json.loads(text)


def put_fact(store, key, text):
    with sqlite3.connect(store) as db: db.execute('INSERT OR REPLACE INTO meta VALUES (?, ?)', [key, text])


def said_of(lab, folder):
    "The error of a run whose facts are odd: one line that names its store"
    with pytest.raises(ValueError) as error, lab.run(folder) as run:
        assert run.features
        run.trained('sft')
    said = str(error.value)
    assert str(folder/'store.sqlite') in said
    assert '\n' not in said
    assert 'MISSING' not in said
    return said


@pytest.mark.parametrize('key, text, says', [
    ('preset', '{x', "its fact 'preset' is not JSON"),
    ('preset', '[1]', "its fact 'preset' is [1], not an object"),
    ('preset', '{"seed": 0}', "its fact 'preset' lacks name"),
    ('begun with features', '"x"', """its fact 'begun with features' is "x", not an object"""),
    ('files sft', '[1]', "its fact 'files sft' is [1], not an object")])
def test_odd_facts_of_a_run_are_named(lab, tmp_path, key, text, says):
    store = begin(lab, tmp_path/'odd')/'store.sqlite'
    put_fact(store, key, text)
    assert says in said_of(lab, tmp_path/'odd')


def test_an_odd_field_of_the_preset_in_the_store_is_named(lab, tmp_path):
    store = begin(lab, tmp_path/'odd')/'store.sqlite'
    put_fact(store, 'preset', json.dumps(fact_in(store, 'preset') | dict(dpo_beta=3)))
    assert "its fact 'preset' has dpo_beta 3, not a list" in said_of(lab, tmp_path/'odd')


# ---- evaluations

def test_an_evaluation_is_no_run(lab, tmp_path):
    with lab.run(tmp_path/'mine') as run:
        run.store.put_explanations([('mine', 1, 0, 'the word dog')])
        with refused('holds an evaluation, not a run: choose another --name'): finish(run)


def test_an_evaluation_may_change_what_nothing_was_made_with(lab, tmp_path):
    with lab.run(tmp_path/'mine') as run: run.store.put_explanations([('mine', 1, 0, 'the word dog')])
    with lab.run(tmp_path/'mine', n_sft=9, n_test=3, baselines=()): pass


def test_texts_settle_the_settings_of_an_evaluation(lab, tmp_path):
    with lab.run(tmp_path/'mine') as run: run.store.put_explanations([('mine', 1, 0, 'the word dog')])
    with RunStore(tmp_path/'mine'/'store.sqlite') as store:
        store.put_texts([('mine', 1, 0, 'generative', 0, 'a dog', None, 1.)])
    with refused(r'\(text_temperature: 0.8 -> 5.0\)'): lab.run(tmp_path/'mine', text_temperature=5.)


def test_metrics_settle_the_settings_of_an_evaluation(lab, tmp_path):
    with lab.run(tmp_path/'mine') as run: run.store.put_explanations([('mine', 1, 0, 'the word dog')])
    with lab.run(tmp_path/'mine', success=.4) as run: run.store.put_metrics([('mine', 1, 'generative', 1.)])
    with refused(r'\(success: 0.4 -> 0.5\)'): lab.run(tmp_path/'mine')
