"A tiny run whose baselines need no training, end to end, with the published rules; resumed; and what is refused early"
import pytest
from judged import judged_preset
from saeexplainer.hints import TOKENS, WORDS
from saeexplainer.metrics import evaluate
from saeexplainer.evaluation.tables import BEYOND
from saeexplainer.presets import LOOKUPS, SELFIE, load_preset
from saeexplainer.results import Results
from saeexplainer.run import Run, execute

WITHOUT_TRAINING = (*LOOKUPS, 'contrastive', SELFIE)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SAEEXPLAINER_DATA', str(folder/'data'))
        patch.setenv('SAEEXPLAINER_CACHE', str(folder/'cache'))
        fields = dict(baselines=list(WITHOUT_TRAINING), rules='published', negative='lower half', n_candidates=4)
        yield folder, judged_preset(folder, **fields)


def go(folder, preset):
    with Run(folder, preset, progress=False) as run:
        execute(run, say=lambda line: None)
        return run.store.explanations(), run.store.metrics()


@pytest.fixture(scope='module')
def finished(world):
    folder, file = world
    return folder/'runs'/'whole', *go(folder/'runs'/'whole', load_preset(file))


def measured_features(metrics, stage):
    rows = metrics[(metrics['stage'] == stage) & (metrics['metric'] == 'generative')]
    return set(rows['feature'])


def test_every_baseline_explains_every_test_feature(finished):
    _, explanations, metrics = finished
    for name in WITHOUT_TRAINING:
        assert (explanations['stage'] == name).sum() == 3
        assert measured_features(metrics, name) == measured_features(metrics, 'sft')


def test_labels_are_those_of_training_features(world, finished):
    folder, file = world
    with Run(finished[0], load_preset(file), progress=False) as run:
        known = {run.features[index].explanation for index in run.splits['sft']}
        assert set(run.splits['sft']).isdisjoint(run.splits['test'])
    texts = finished[1].query("stage in ('nearest label', 'random label')")['text']
    assert set(texts) <= known


def test_the_report_names_every_baseline(finished):
    folder = finished[0]
    text = (folder/'report'/'index.html').read_text()
    for name in WITHOUT_TRAINING: assert name in text
    Results(folder/'report') # can be read


@pytest.mark.parametrize('name', [TOKENS, WORDS])
def test_the_dictionaries_lie_in_the_cache(world, finished, name):
    assert (world[0]/'cache'/'features'/'tiny'/'1-res'/name).exists()


def test_a_finished_run_changes_nothing(world, finished):
    explanations, metrics = go(finished[0], load_preset(world[1]))
    assert explanations.equals(finished[1])
    assert metrics.equals(finished[2])


def test_measures_beyond_the_papers_on_a_run(world, finished):
    with Run(finished[0], load_preset(world[1]), progress=False) as run:
        rows = run.store.explanations('nearest label')
        texts = {'nearest label': dict(zip(rows['feature'].tolist(), rows['text']))}
        table = evaluate(run, texts, BEYOND, progress=False)
    assert set(table.loc['nearest label'].index) == set(BEYOND)


@pytest.mark.parametrize('field, value', [('rules', 'paper'), ('negative', 'hard'), ('baselines', ['untrained'])])
def test_what_was_measured_by_one_rule_is_not_mixed_with_another(world, finished, field, value):
    with pytest.raises(ValueError, match=field), Run(finished[0], load_preset(world[1], **{field: value})): pass


def test_a_run_that_has_no_text_for_its_lookup_does_not_begin(world, monkeypatch):
    folder, file = world
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(folder/'empty'))
    preset = load_preset(file, corpus=None)
    with pytest.raises(ValueError, match='a dictionary of the target needs running text'):
        go(folder/'runs'/'without', preset)
    with Run(folder/'runs'/'without', preset, progress=False) as run: assert not len(run.store.explanations())


def test_unknown_baselines_are_named(world):
    with pytest.raises(ValueError, match="baselines are 'autointerp', 'untrained', 'best', 'nearest token', .*guess"):
        load_preset(world[1], baselines=['guess'])


@pytest.mark.parametrize('name', WITHOUT_TRAINING)
def test_a_labelling_model_cannot_be_called_like_a_baseline(world, name):
    with pytest.raises(ValueError, match='baseline_labels'): load_preset(world[1], baseline_labels=[name])
