"No label of a test feature reaches a trainer; the evaluation asks with other words than the preferences"
import re
import pandas as pd, pytest
from saeexplainer import prefs
from saeexplainer.evaluation import texts as metrics
from saeexplainer.features import labels_of, load_features
from saeexplainer.lm.models import load_tokenizer
from saeexplainer.presets import load_preset
from saeexplainer.run import Run, execute
from test_run import make_preset


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A whole run in which every feature has a label of its own, and all rows that its trainers were given"
    import trl, pyarrow.parquet as pq
    folder = tmp_path_factory.mktemp('leaks')
    file = make_preset(folder)
    table = pq.read_table(folder/'data'/'tiny'/'features.parquet').to_pandas()
    table.loc[table['index'] % 3 == 0, 'status'] = 'unlabelled'
    table['explanation'] = [f'label number {i}' if s == 'ok' else None for i, s in zip(table['index'], table['status'])]
    table.to_parquet(folder/'data'/'tiny'/'features.parquet')
    seen, patch = [], pytest.MonkeyPatch()
    patch.setenv('SAEEXPLAINER_DATA', str(folder/'data'))
    for trainer in (trl.SFTTrainer, trl.DPOTrainer):
        def init(self, *a, _init=trainer.__init__, **kw):
            for rows in (kw['train_dataset'], kw.get('eval_dataset')): seen.extend(rows or [])
            _init(self, *a, **kw)
        patch.setattr(trainer, '__init__', init)
    preset = load_preset(file, label_model=None, baseline_labels=())
    with Run(folder/'run', preset, progress=False) as run:
        execute(run, say=lambda line: None)
        yield run, seen
    patch.undo()


def test_test_features_reach_no_trainer(trained):
    run, seen = trained
    test = set(run.splits['test'])
    assert len(seen) >= 8 + 8 + 2 and not {row['feature'] for row in seen} & test
    tokenizer = load_tokenizer(run.preset.explainer)
    rows = [row[part] for row in seen for part in ('input_ids', 'chosen_ids', 'rejected_ids') if part in row]
    learned = ' / '.join(tokenizer.decode(ids, skip_special_tokens=True) for ids in rows)
    labels = {int(i) for i in re.findall(r'label number (\d+)', learned)}
    assert labels >= set(run.splits['sft']) # the look at what is learned is no empty look
    assert not labels & test


def test_features_without_a_label(trained):
    "Tested, and used for preferences, as often as others; passed over where labels are learned; said in the report"
    run, _ = trained
    status = lambda split: {run.features[i].status for i in run.splits[split]}
    assert status('test') == status('preference1') == {'ok', 'unlabelled'} and status('sft') == status('validation') == {'ok'}
    n = sum(run.features[i].status == 'ok' for i in run.splits['test'])
    assert run.store.meta('notes') == [f'{n} of 4 test features have a label'] and len(run.store.explanations('label')) == n and len(run.store.explanations('sft')) == 4


def test_no_test_feature_has_a_label(tmp_path, monkeypatch):
    "The explainers are measured all the same, and the report says what it lacks"
    import pyarrow.parquet as pq
    from saeexplainer.results import Results
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    preset, features = load_preset(make_preset(tmp_path), label_model=None, baseline_labels=(), baselines=()), tmp_path/'data'/'tiny'/'features.parquet'
    with Run(tmp_path/'run', preset, progress=False) as run: test = run.splits['test']
    table = pq.read_table(features).to_pandas()
    table.loc[table['index'].isin(test), ['status', 'explanation']] = ['unlabelled', None]
    table.to_parquet(features)
    with Run(tmp_path/'run', preset, progress=False) as run:
        assert run.splits['test'] == test
        report = execute(run, say=lambda line: None)
    assert Results(report).stages == ['sft', 'dpo1', 'dpo2'] and '0 of 4 test features have a label' in (report/'report.md').read_text()


def test_a_leaking_split_is_refused(trained, monkeypatch):
    run, _ = trained
    leaking = dict(run.splits, sft=[*run.splits['sft'][1:], run.splits['test'][0]])
    monkeypatch.setitem(run.__dict__, 'splits', leaking)
    from saeexplainer.run import sft_stage
    with pytest.raises(ValueError, match='1 held-out features are among the SFT features'): sft_stage(run)


def test_what_is_written_for_the_evaluation_was_asked_in_other_words(trained):
    "The prompts that the writer was really sent, by stage"
    run, _ = trained
    asked = pd.DataFrame(run.store.rows("SELECT stage, json_extract(request, '$.prompt') FROM replies"), columns=['stage', 'prompt'])
    rounds, evaluation = (asked[asked.stage.str.startswith(part)].prompt for part in ('round', 'evaluate'))
    assert len(rounds) and len(evaluation) and not set(rounds) & set(evaluation)


def test_no_prompt_is_another_for_any_label(monkeypatch):
    monkeypatch.delenv('SAEEXPLAINER_DATA', raising=False)
    said = list(labels_of(load_features(load_preset('smollm2-135m')), 'claude').values())[::30]
    preference = {prefs.preference_prompt(e, n) for e in said for n in (None, 4)}
    evaluation = {form.format(explanation=e, n=10, n_activating=5, n_neutral=5) for e in said
                  for form in (metrics.GENERATIVE_ONE, metrics.GENERATIVE_LIST, metrics.ACTIVATING_ONE, metrics.CONTRAST_LIST)}
    assert len(preference) == 2*len(set(said)) and not preference & evaluation
