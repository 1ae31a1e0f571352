"An explainer of another family and width: its bridge is learned, kept, restored, refused where it does not fit"
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import PLACEHOLDER, tiny_model, tiny_sae, tiny_tokenizer
from hub_server import Hub
from safetensors.torch import load_file, save_file
from tiny_lab import SAE, make_lab, silent
from trainings import EVAL_WORDS, WORDS, features

from saeexplainer.bridge import BRIDGE, begin_bridge, context_texts, load_bridge, ridge_bridge, word_ends
from saeexplainer.bridge_study import (
    CHANCE, KEPT, OWN, ArmsStudy, draw_features, measure_arms, second_arms, second_features,
)
from saeexplainer.explainer import CARD, Explainer, ExplainerCard
from saeexplainer.features import load_features
from saeexplainer.injection import Bridge, Injector
from saeexplainer.joint import JointReader, JointTarget, joint_rows, target_presets, train_joint
from saeexplainer.layers_study import ALL, EACH, LayersStudy, measure_layers
from saeexplainer.lm.hooks import residual_hook
from saeexplainer.presets import AS_PAPER, load_preset
from saeexplainer.run import execute
from saeexplainer.saes import FeatureReader
from saeexplainer.sft import train_sft
from saeexplainer.training import Checkpoints

WIDTH = 96 # of the explainer; the target is 64 wide


def make_pair(folder):
    "A target with its SAE, and an explainer of another family and width"
    tiny_model('llama').save_pretrained(folder/'target')
    tiny_tokenizer().save_pretrained(folder/'target')
    tiny_model('gemma3', d=WIDTH, seed=1).save_pretrained(folder/'explainer')
    tiny_tokenizer().save_pretrained(folder/'explainer')
    tiny_sae(folder/'sae')


def preset_in(folder, **fields):
    names = dict(AS_PAPER, target=str(folder/'target'), explainer=str(folder/'explainer'), sae=str(folder/'sae'),
                 layer=2, device='cpu', placeholder=PLACEHOLDER, bridge='orthogonal', sft_lr=1e-2, sft_epochs=4.,
                 sft_batch=4, lora_dropout=0.)
    return load_preset('smollm2-135m', **names | fields)


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pair')
    make_pair(folder)
    return folder


@pytest.fixture(scope='module')
def reader(pair): return FeatureReader.load(str(pair/'sae'))


def train(folder, out, labelled=None, evaluated=False, **fields):
    preset = preset_in(folder, **fields)
    others = features(EVAL_WORDS, start=100) if evaluated else None
    return train_sft(preset, labelled or features(), FeatureReader.load(preset.sae), out, eval_features=others,
                     progress=False)


@pytest.fixture(scope='module')
def trained(pair): return train(pair, pair/'trained', sft_epochs=30.)


def bridge_in(folder): return load_bridge(Path(folder)/BRIDGE).weight


def adapter_in(folder): return load_file(Path(folder)/'adapter_model.safetensors')


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- Eq. 6 behind a bridge

def stream_behind(model, ids, **given):
    seen = []
    with torch.no_grad(), residual_hook(model, 1, 'resid_post', seen.append): model(input_ids=ids, **given)
    return seen[0]


def test_the_mapped_direction_is_injected():
    model = tiny_model('gemma3', d=WIDTH)
    weight = torch.randn(WIDTH, 64)
    directions = torch.randn(2, 64)
    ids = torch.tensor([[5, 9, 7, 8], [6, 8, 9, 7]])
    plain = stream_behind(model, ids)
    Injector(model, 9, bridge=Bridge(weight))
    found = stream_behind(model, ids, feature_vector=directions)
    wanted = plain.clone()
    for row, place in enumerate((1, 2)):
        h = plain[row, place]
        wanted[row, place] = h + h.norm()*F.normalize(weight @ directions[row], dim=0)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_bridge_of_one_is_no_bridge():
    model = tiny_model()
    ids = torch.tensor([[5, 9, 7]])
    direction = torch.randn(1, 64)
    injector = Injector(model, 9)
    without = stream_behind(model, ids, feature_vector=direction)
    injector.remove()
    Injector(model, 9, bridge=Bridge(torch.eye(64)))
    assert torch.allclose(stream_behind(model, ids, feature_vector=direction), without, atol=1e-6)


def test_features_ride_in_the_ids_through_a_bridge():
    model = tiny_model('gemma3', d=WIDTH)
    known = torch.randn(10, 64)
    injector = Injector(model, 9, bridge=Bridge(torch.randn(WIDTH, 64)))
    by_hand = stream_behind(model, torch.tensor([[5, 9, 7]]), feature_vector=known[3:4])
    injector.carry(known.__getitem__)
    assert torch.equal(stream_behind(model, torch.tensor([[5, injector.first_id + 3, 7]])), by_hand)


def test_the_injector_takes_its_bridge_along():
    model = tiny_model('gemma3', d=WIDTH)
    before = {name for name, _ in model.named_parameters()}
    injector = Injector(model, 9, bridge=Bridge(torch.randn(WIDTH, 64)))
    assert {name for name, _ in model.named_parameters()} - before == {'model.bridge.weight'}
    injector.remove()
    assert {name for name, _ in model.named_parameters()} == before


# ---- how it begins

def test_words_end_at_the_same_characters_whatever_the_tokens():
    text = 'a cat, the dog-house and more'
    read = word_ends(tiny_tokenizer(), text)
    assert [text[:end].split()[-1] for end in sorted(read.ends)] == ['cat', 'the', 'dog', 'dog-house', 'and', 'more']


def test_ridge_sees_no_label(pair, tmp_path):
    "It is fitted on texts alone, and serves better than chance on words that it has not seen"
    preset = preset_in(pair)
    columns = ('cat dog mat fire sea '*9, 'rain park area land '*12, 'shells nation large '*15, 'print hello kept '*15)
    texts = [' '.join(words) for words in zip(*(column.split() for column in columns))]
    fit = ridge_bridge(preset, 2, texts)
    assert fit.bridge.weight.shape == (WIDTH, 64)
    assert fit.pairs > 100
    assert fit.cosine > .3


# ---- training

def test_lora_and_bridge_are_learned(pair, reader, trained):
    begun = begin_bridge(preset_in(pair), reader).weight
    assert trained.losses[-1] < .5*trained.losses[0]
    assert not torch.equal(bridge_in(trained.folder), begun)
    assert not any('bridge' in name for name in adapter_in(trained.folder))
    card = ExplainerCard.load(trained.folder)
    assert (card.bridge, card.d_model) == ('orthogonal', 64)
    assert len(card.bridge_sha256) == 64


def test_what_is_saved_says_the_same(pair, reader, trained):
    directions = reader.directions(range(12))
    explainer = Explainer.from_pretrained(trained.folder, reader, device='cpu')
    texts = explainer.explain(directions, max_new_tokens=12)
    assert sum(f.explanation.split("'")[1] in text for f, text in zip(features(), texts)) >= 8
    explainer.save(pair/'copy')
    again = Explainer.from_pretrained(pair/'copy', reader, device='cpu')
    assert again.explain(directions, max_new_tokens=12) == texts
    kept = Explainer.from_pretrained(trained.folder, reader, trainable=True, device='cpu')
    kept.save(pair/'kept')
    assert torch.equal(bridge_in(pair/'kept'), bridge_in(trained.folder))


class _Stop(Checkpoints):
    "Fail as soon as the first checkpoint is whole"
    def on_save(self, *args, **kwargs):
        super().on_save(*args, **kwargs)
        raise KeyboardInterrupt


@pytest.mark.parametrize('evaluated', [False, True])
def test_a_training_goes_on_where_it_stopped(pair, tmp_path, monkeypatch, evaluated):
    whole = train(pair, tmp_path/'whole', evaluated=evaluated)
    with monkeypatch.context() as patch:
        patch.setattr('saeexplainer.training.Checkpoints', _Stop)
        with pytest.raises(KeyboardInterrupt): train(pair, tmp_path/'halved', evaluated=evaluated)
    assert (next((tmp_path/'halved'/'checkpoints').glob('checkpoint-*'))/BRIDGE).exists()
    halved = train(pair, tmp_path/'halved', evaluated=evaluated)
    assert torch.equal(bridge_in(halved.folder), bridge_in(whole.folder))
    assert same(adapter_in(halved.folder), adapter_in(whole.folder))


def test_the_bridge_is_that_of_the_best_checkpoint(pair, tmp_path):
    "With a rate at which the eval loss rises again, the result is not the last bridge"
    best = train(pair, tmp_path/'best', evaluated=True, sft_epochs=12., sft_lr=5e-2)
    losses = best.log.dropna(subset='eval_loss')
    assert losses['eval_loss'].idxmin() != losses.index[-1]
    last = train(pair, tmp_path/'last', sft_epochs=12., sft_lr=5e-2)
    assert not torch.allclose(bridge_in(best.folder), bridge_in(last.folder), atol=1e-3)


# ---- a LoRA that is kept

def test_a_new_bridge_for_a_kept_lora(pair, trained, tmp_path):
    made = train(pair, tmp_path/'second', lora_from=str(trained.folder), sft_epochs=8.)
    assert same(adapter_in(made.folder), adapter_in(trained.folder))
    assert not torch.equal(bridge_in(made.folder), bridge_in(trained.folder))
    assert made.losses[-1] < made.losses[0]


def test_a_lora_is_kept_with_its_prompt(pair, trained, tmp_path):
    asked_otherwise = dict(lora_from=str(trained.folder), template='What is {placeholder}?')
    with pytest.raises(ValueError, match="lora_from: .* was trained with template 'Feature"):
        train(pair, tmp_path/'other', **asked_otherwise)


def test_a_kept_lora_needs_a_bridge():
    with pytest.raises(ValueError, match='lora_from keeps a LoRA and learns the bridge alone: set bridge too'):
        load_preset('smollm2-135m', lora_from='somewhere')


def test_the_bridge_of_another_explainer(pair, trained, tmp_path):
    begun = dict(bridge=str(trained.folder/BRIDGE), lora_from=str(trained.folder))
    made = train(pair, tmp_path/'second', sft_epochs=1., sft_lr=1e-4, **begun)
    moved = (bridge_in(made.folder) - bridge_in(trained.folder)).abs().max()
    assert 0 < moved < .01
    settings = json.loads((made.folder/'training.json').read_text())['settings']
    assert {'lora_from', 'bridge_file'} <= settings.keys()


# ---- what is refused

def test_another_width_without_a_bridge(pair, reader):
    with pytest.raises(ValueError, match="take the target's own twin, or set bridge in the preset"):
        Explainer.from_preset(preset_in(pair, bridge=None), reader)


def test_a_bridge_to_another_width(pair, reader, tmp_path):
    save_file({'weight': torch.eye(5, 64)}, tmp_path/'odd.safetensors')
    with pytest.raises(ValueError, match='leads from width 64 to 5, the directions are 64 wide and the explainer 96'):
        Explainer.from_preset(preset_in(pair, bridge=str(tmp_path/'odd.safetensors')), reader)
    with pytest.raises(ValueError, match='the bridge makes directions 5 wide, the model is 96 wide'):
        Injector(tiny_model('gemma3', d=WIDTH), 9, bridge=Bridge(torch.eye(5, 64)))


@pytest.mark.parametrize('tensors', [dict(other=torch.eye(3)), dict(weight=torch.ones(3)),
                                     dict(weight=torch.full((3, 3), float('nan')))])
def test_what_is_no_bridge(tmp_path, tensors):
    save_file(tensors, tmp_path/'odd.safetensors')
    with pytest.raises(ValueError, match=r'odd\.safetensors is no bridge'): load_bridge(tmp_path/'odd.safetensors')


def damaged(folder): (folder/BRIDGE).write_bytes((folder/BRIDGE).read_bytes()[:-8])

def changed(folder): save_file({'weight': torch.zeros(WIDTH, 64)}, folder/BRIDGE)

def missing(folder): (folder/BRIDGE).unlink()


@pytest.mark.parametrize('fault', [damaged, changed, missing])
def test_an_explainer_whose_bridge_is_not_its_own(trained, reader, tmp_path, fault):
    shutil.copytree(trained.folder, tmp_path/'copy')
    fault(tmp_path/'copy')
    with pytest.raises((ValueError, FileNotFoundError), match=r'bridge\.safetensors'):
        Explainer.from_pretrained(tmp_path/'copy', reader, device='cpu')


def test_names_of_starts():
    with pytest.raises(ValueError, match='bridge must be one of ridge, orthogonal, random, identity, or a file'):
        load_preset('smollm2-135m', bridge='rigde')


# ---- whole runs

@pytest.fixture(scope='module')
def wide_lab(tmp_path_factory):
    "A tiny lab whose explainer is of another family and width"
    folder = tmp_path_factory.mktemp('wide')
    tiny_model('qwen3', d=WIDTH, n_layers=3, seed=1).save_pretrained(folder/'explainer')
    tiny_tokenizer().save_pretrained(folder/'explainer')
    return make_lab(folder, explainer=str(folder/'explainer'), bridge='orthogonal', grpo_steps=2, grpo_reward='self',
                    grpo_features=2, grpo_group=2)


def test_a_run_checks_widths_before_it_begins(wide_lab, tmp_path):
    with wide_lab.in_use(), wide_lab.run(tmp_path/'run', bridge=None) as run:
        with pytest.raises(ValueError, match=r'is 96 wide, the directions 64: .* or set bridge'): run.check()


@pytest.fixture(scope='module')
def wide_run(wide_lab):
    with wide_lab.in_use(), wide_lab.run(wide_lab.folder/'run') as run: execute(run, say=silent)
    return wide_lab.folder/'run'


def test_a_whole_run(wide_lab, wide_run):
    "SFT learns the bridge; preferences, DPO and GRPO train the LoRA behind it"
    explainers = wide_run/'explainer'
    stages = ['sft', 'dpo1', 'dpo2', 'grpo']
    weights = {stage: bridge_in(explainers/stage) for stage in stages}
    assert all(torch.equal(weights['sft'], weight) for weight in weights.values())
    adapters = [adapter_in(explainers/stage) for stage in ('sft', 'dpo1', 'dpo2')]
    assert not any(same(a, b) for a, b in zip(adapters, adapters[1:]))
    assert ExplainerCard.load(explainers/'grpo').stage == 'grpo'
    with wide_lab.in_use(), wide_lab.run(wide_run) as run:
        said = run.store.explanations()
        assert set(stages) <= set(said['stage'])
        assert execute(run, say=silent) # nothing is left to do
    assert (wide_run/'report'/'summary.csv').exists()


def test_a_lab_with_too_few_texts_for_a_ridge(wide_lab):
    with wide_lab.in_use():
        preset = wide_lab.preset(bridge='ridge')
        assert context_texts(load_features(preset)) == ['a cat']
        with pytest.raises(ValueError, match="too few words that both models read, 1: .* 'orthogonal'"):
            begin_bridge(preset, FeatureReader.load(preset))


# ---- the hub

def test_the_bridge_is_pushed_too(trained, reader, monkeypatch):
    with Hub(monkeypatch) as hub: Explainer.from_pretrained(trained.folder, reader).push_to_hub('me/mine')
    assert {BRIDGE, CARD, 'adapter_model.safetensors', 'README.md'} <= set(hub.files)
    assert 'bridge' in hub.files['README.md'].decode()


# ---- several dictionaries

def other_dictionary(lab, name='deep', **fields):
    "Write an SAE of another layer of the lab's target, its features and the YAML preset that names them"
    tiny_sae(lab.data/name/'sae', **dict(SAE, layer=2))
    shutil.copyfile(lab.features, lab.data/name/'features.parquet')
    file = lab.folder/f'{name}.yaml'
    own = dict(sae=f'{name}/sae', layer=2, features=f'{name}/features.parquet', source='tiny/2-res', **fields)
    lines = [f'{field}: {json.dumps(value)}\n' for field, value in own.items()]
    file.write_text(lab.file.read_text().replace('sae: ', '# sae: ').replace('layer: 1', '').replace('features: ', '# ')
                    .replace('source: ', '# ') + ''.join(lines))
    return file


@pytest.fixture(scope='module')
def joint_run(tmp_path_factory):
    "A run on two layers of one model"
    folder = tmp_path_factory.mktemp('joint')
    lab = make_lab(folder, bridge='identity', template='Layer {layer}: {placeholder}?', dpo_rounds=1, n_output=0,
                   baselines=[])
    file = other_dictionary(lab)
    lines = []
    with lab.in_use(), lab.run(folder/'run', targets=[str(file)]) as run: execute(run, say=lines.append)
    assert lines[-1].startswith('targets: generative accuracy deep ')
    return lab


def test_one_lora_and_a_bridge_for_each_layer(joint_run):
    folders = [joint_run.folder/'run'/'targets'/'explainers'/name for name in ('tiny', 'deep')]
    assert same(*map(adapter_in, folders))
    bridges = [bridge_in(folder) for folder in folders]
    assert all(weight.shape == (64, 64) for weight in bridges)
    assert not torch.equal(*bridges)
    cards = [ExplainerCard.load(folder) for folder in folders]
    assert [card.template for card in cards] == [f'Layer {layer}: {{placeholder}}?' for layer in (1, 2)]
    assert [card.sae_layer for card in cards] == [1, 2]


def test_metrics_of_each_layer(joint_run):
    with joint_run.in_use(), joint_run.run(joint_run.folder/'run', targets=[str(joint_run.folder/'deep.yaml')]) as run:
        assert execute(run, say=silent) # nothing is left to do
    assert (joint_run.folder/'run'/'targets'/'deep'/'report'/'summary.csv').exists()


def test_one_explainer_beside_one_each(joint_run, tmp_path):
    with joint_run.in_use():
        presets = [load_preset(file) for file in (joint_run.file, joint_run.folder/'deep.yaml')]
        study = LayersStudy(tmp_path, presets, n_train=8, n_test=3)
        together = study.train_all()
        alone = [study.train_each(preset) for preset in presets]
        measured = measure_layers(study)
        assert study.train_all() == together # finished
    assert same(*map(adapter_in, together)) and not same(*map(adapter_in, alone))
    assert [(folder/BRIDGE).exists() for folder in (*together, *alone)] == [True, True, False, False]
    counts = measured[measured['metric'] == 'generative'].groupby(['layer', 'stage']).size()
    assert {layer for layer, _ in counts.index} == {1, 2} and {ALL, EACH} < {stage for _, stage in counts.index}
    assert set(counts) == {3}
    assert (tmp_path/'layers.parquet').exists() and (tmp_path/'layers_metrics.parquet').exists()


def test_a_second_dictionary_by_its_bridge_alone(joint_run, tmp_path):
    shuffled = f'{KEPT}, shuffled'
    with joint_run.in_use():
        one, two = [load_preset(file) for file in (joint_run.file, joint_run.folder/'deep.yaml')]
        first = ArmsStudy(tmp_path/'first', {'twin': one}, draw_features(one, 8, 3, 'a draw')).train('twin')
        study = ArmsStudy(tmp_path/'second', second_arms(two, first), second_features(two, n_train=8, n_test=3))
        kept, own = [study.train(arm) for arm in (KEPT, OWN)]
        measured = measure_arms(study, 'deep', controls=[shuffled])
        assert study.train(KEPT) == kept # finished
    assert same(adapter_in(kept), adapter_in(first)) and not same(adapter_in(own), adapter_in(first))
    assert not torch.equal(bridge_in(kept), torch.eye(64))
    assert set(measured['stage']) == {KEPT, OWN, shuffled, CHANCE, 'label'}
    assert set(measured.groupby(['stage', 'metric']).size()) == {3}
    assert {file.name for file in study.root.glob('*.parquet')} == {'deep.parquet', 'deep_metrics.parquet'}


def test_batches_are_balanced(pair, tmp_path):
    "As many rows of one dictionary as of the other in each, and all of the larger one in an epoch"
    tiny_sae(tmp_path/'narrow', layer=1, d_sae=20)
    presets = [preset_in(pair, name='wide'), preset_in(pair, name='narrow', sae=str(tmp_path/'narrow'), layer=1)]
    readers = [FeatureReader.load(preset.sae) for preset in presets]
    labelled = [features(), features(WORDS[:5])]
    targets = [JointTarget(*parts) for parts in zip(presets, readers, labelled)]
    numbers = joint_rows(targets, JointReader(readers))['feature']
    of_first = [number < readers[0].n_features for number in numbers]
    assert all(sum(of_first[start:start + 4]) == 2 for start in range(0, len(numbers), 4))
    assert sorted(set(numbers)) == [*range(12), *range(readers[0].n_features, readers[0].n_features + 5)]


def test_a_joint_explainer_is_its_parts(pair, tmp_path):
    "What is cut out says the same of a direction as the whole does of the side by side one"
    presets = [preset_in(pair, name=name) for name in ('one', 'two')]
    reader = FeatureReader.load(presets[0].sae)
    targets = [JointTarget(presets[0], reader, features()[:6]), JointTarget(presets[1], reader, features()[6:])]
    folders = train_joint(targets, tmp_path, progress=False)
    whole = Explainer.from_pretrained(tmp_path/'joint', device='cpu')
    side_by_side = JointReader([reader, reader])
    for place, folder in enumerate(folders):
        numbers = [side_by_side.number(place, feature) for feature in range(4)]
        part = Explainer.from_pretrained(folder, reader, device='cpu')
        said = part.explain(reader.directions(range(4)), max_new_tokens=8)
        assert said == whole.explain(side_by_side.directions(numbers), max_new_tokens=8)
    assert train_joint(targets, tmp_path, progress=False) == folders # finished


def test_held_out_features_are_not_learned(pair, tmp_path):
    reader = FeatureReader.load(str(pair/'sae'))
    target = JointTarget(preset_in(pair), reader, features())
    with pytest.raises(ValueError, match='1 held-out features are among the SFT features'):
        train_joint([target], tmp_path, held_out=features()[3:4])


@pytest.mark.parametrize('fields, says', [
    (dict(targets=['x.yaml'], bridge=None), 'each dictionary gets a bridge of its own: set bridge too'),
    (dict(targets=['x.yaml'], n_hints=1, template='{placeholder} {hints}'), 'set n_hints to 0'),
    (dict(targets=['x.yaml'], sft_from='x'), 'leave no room'),
    (dict(sft_from='x', lora_from='x'), 'leave lora_from out')])
def test_what_does_not_go_together(pair, fields, says):
    with pytest.raises(ValueError, match=says): preset_in(pair, **fields)


def test_all_but_the_dictionary_is_as_in_the_first_preset(joint_run):
    with joint_run.in_use():
        preset = joint_run.preset(targets=[str(joint_run.folder/'deep.yaml')], budget_requests=7, n_test=3,
                                  evaluation_writer='local')
        [other] = target_presets(preset)
    assert (other.budget_requests, other.n_test, other.evaluation_writer) == (7, 3, 'local')
    assert (other.sae, other.layer, other.source) == ('deep/sae', 2, 'tiny/2-res')


def test_a_dictionary_without_features_is_missed_before_anything_begins(joint_run, tmp_path):
    lost = joint_run.folder/'lost.yaml'
    lost.write_text((joint_run.folder/'deep.yaml').read_text().replace('deep/features', 'lost/features'))
    with joint_run.in_use(), joint_run.run(tmp_path/'run', targets=[str(lost)]) as run:
        with pytest.raises(FileNotFoundError, match='there are no features of lost yet: `saeexplainer features'):
            run.check()


def test_parts_of_an_older_training_are_not_taken(pair, tmp_path):
    reader = FeatureReader.load(str(pair/'sae'))
    def teach(**fields):
        presets = [preset_in(pair, name=name, sft_epochs=1., **fields) for name in ('one', 'two')]
        targets = [JointTarget(preset, reader, features()[:4]) for preset in presets]
        return train_joint(targets, tmp_path, progress=False)
    before = adapter_in(teach()[0])
    shutil.rmtree(tmp_path/'joint') # as the error says where a setting has changed
    assert not same(adapter_in(teach(sft_lr=2e-2)[0]), before)


# ---- an explainer in the place of SFT

def test_a_given_explainer_may_lack_its_log(wide_lab, wide_run, tmp_path):
    "As one that was saved or pushed does"
    with wide_lab.in_use():
        reader = FeatureReader.load(wide_lab.preset())
        Explainer.from_pretrained(wide_run/'explainer'/'sft', reader).save(tmp_path/'saved')
        fields = dict(sft_from=str(tmp_path/'saved'), dpo_rounds=0, grpo_steps=0)
        with wide_lab.run(tmp_path/'run', **fields) as run: execute(run, say=silent)
    assert (tmp_path/'run'/'report'/'summary.csv').exists()


def test_a_given_explainer_of_another_model(wide_lab, wide_run, tmp_path):
    given = dict(sft_from=str(wide_run/'explainer'/'sft'), explainer=str(wide_lab.model), bridge=None)
    with wide_lab.in_use(), wide_lab.run(tmp_path/'run', **given) as run:
        with pytest.raises(ValueError, match='is an adapter of .*explainer, the preset says .*model: set explainer'):
            execute(run, say=silent)


def test_a_run_begins_with_a_given_explainer(wide_lab, wide_run, tmp_path):
    given = str(wide_run/'explainer'/'sft')
    fields = dict(sft_from=given, dpo_rounds=0, grpo_steps=0)
    with wide_lab.in_use(), wide_lab.run(tmp_path/'run', **fields) as run:
        lines = []
        execute(run, say=lines.append)
        assert same(adapter_in(run.trained('sft')), adapter_in(given))
    assert any(line.startswith(f'sft: the explainer of {given} (stage sft)') for line in lines)


def test_a_given_explainer_of_another_dictionary(joint_run, tmp_path):
    of_deep = str(joint_run.folder/'run'/'targets'/'explainers'/'deep')
    with joint_run.in_use(), joint_run.run(tmp_path/'run', sft_from=of_deep) as run:
        with pytest.raises(ValueError, match='the SAE reads layer 1, the explainer was trained for layer 2'):
            execute(run, say=silent)
