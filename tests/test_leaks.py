"No label of a test feature reaches a trainer; the evaluation asks with other words than the preferences"
import re

import pandas as pd
import pyarrow.parquet as pq
import pytest
import trl
from tiny_lab import finish, make_lab

from saeexplainer import prefs
from saeexplainer.evaluation import texts
from saeexplainer.features import labels_of, load_features
from saeexplainer.lm.models import load_tokenizer
from saeexplainer.presets import load_preset
from saeexplainer.results import Results
from saeexplainer.run import sft_stage

NO_BASELINES = dict(label_model=None, baseline_labels=())


def record_rows(patch, seen):
    "Have trl's trainers put all rows that they are given into `seen`"
    for trainer in (trl.SFTTrainer, trl.DPOTrainer):
        def init(self, *a, _init=trainer.__init__, **kw):
            for rows in (kw['train_dataset'], kw.get('eval_dataset')): seen.extend(rows or [])
            _init(self, *a, **kw)
        patch.setattr(trainer, '__init__', init)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A whole run in which every feature has a label of its own, and all rows that its trainers were given"
    lab = make_lab(tmp_path_factory.mktemp('leaks'))
    table = pq.read_table(lab.features).to_pandas()
    table.loc[table['index'] % 3 == 0, 'status'] = 'unlabelled'
    table['explanation'] = [f'label number {i}' if status == 'ok' else None
                            for i, status in zip(table['index'], table['status'])]
    table.to_parquet(lab.features)
    seen = []
    with pytest.MonkeyPatch.context() as patch, lab.in_use(), lab.run(lab.folder/'run', **NO_BASELINES) as run:
        record_rows(patch, seen)
        finish(run)
        yield run, seen


def test_test_features_reach_no_trainer(trained):
    run, seen = trained
    test = set(run.splits['test'])
    assert len(seen) >= 8 + 8 + 2
    assert not {row['feature'] for row in seen} & test


def test_labels_of_test_features_are_not_learned(trained):
    run, seen = trained
    tokenizer = load_tokenizer(run.preset.explainer)
    rows = [row[part] for row in seen for part in ('input_ids', 'chosen_ids', 'rejected_ids') if part in row]
    learned = ' / '.join(tokenizer.decode(ids, skip_special_tokens=True) for ids in rows)
    labels = {int(i) for i in re.findall(r'label number (\d+)', learned)}
    assert labels >= set(run.splits['sft']) # the look at what is learned is no empty look
    assert not labels & set(run.splits['test'])


def test_features_without_a_label(trained):
    "Tested, and used for preferences, as often as others; passed over where labels are learned; said in the report"
    run, _ = trained
    def status(split): return {run.features[i].status for i in run.splits[split]}
    assert status('test') == status('preference1') == {'ok', 'unlabelled'}
    assert status('sft') == status('validation') == {'ok'}
    n = sum(run.features[i].status == 'ok' for i in run.splits['test'])
    assert run.store.meta('notes') == [f'{n} of 4 test features have a label']
    assert len(run.store.explanations('label')) == n
    assert len(run.store.explanations('sft')) == 4


def test_no_test_feature_has_a_label(tmp_path):
    "The explainers are measured all the same, and the report says what it lacks"
    lab = make_lab(tmp_path, baselines=[])
    with lab.in_use():
        with lab.run(tmp_path/'run', **NO_BASELINES) as run: test = run.splits['test']
        table = pq.read_table(lab.features).to_pandas()
        table.loc[table['index'].isin(test), ['status', 'explanation']] = ['unlabelled', None]
        table.to_parquet(lab.features)
        with lab.run(tmp_path/'run', **NO_BASELINES) as run:
            assert run.splits['test'] == test
            report = finish(run)
    assert Results(report).stages == ['sft', 'dpo1', 'dpo2']
    assert '0 of 4 test features have a label' in (report/'index.html').read_text()


def test_a_leaking_split_is_refused(trained, monkeypatch):
    run, _ = trained
    leaking = dict(run.splits, sft=[*run.splits['sft'][1:], run.splits['test'][0]])
    monkeypatch.setitem(run.__dict__, 'splits', leaking)
    with pytest.raises(ValueError, match='1 held-out features are among the SFT features'): sft_stage(run)


def test_what_is_written_for_the_evaluation_was_asked_in_other_words(trained):
    "The prompts that the writer was really sent, by stage"
    run, _ = trained
    sent = run.store.rows("SELECT stage, json_extract(request, '$.prompt') FROM replies")
    asked = pd.DataFrame(sent, columns=['stage', 'prompt'])
    rounds = set(asked[asked.stage.str.startswith('round')].prompt)
    evaluation = set(asked[asked.stage.str.startswith('evaluate')].prompt)
    assert rounds
    assert evaluation
    assert not rounds & evaluation


FORMS = (texts.GENERATIVE_ONE, texts.GENERATIVE_LIST, texts.ACTIVATING_ONE, texts.CONTRAST_LIST)


def test_no_prompt_is_another_for_any_label(monkeypatch):
    monkeypatch.delenv('SAEEXPLAINER_DATA', raising=False)
    labels = list(labels_of(load_features(load_preset('smollm2-135m')), 'claude').values())[::30]
    preference = {prefs.preference_prompt(label, n) for label in labels for n in (None, 4)}
    sizes = dict(n=10, n_activating=5, n_neutral=5)
    evaluation = {form.format(explanation=label, **sizes) for label in labels for form in FORMS}
    assert len(preference) == 2*len(set(labels))
    assert not preference & evaluation
