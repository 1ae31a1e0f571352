"""The paper's own presets from end to end, offline and tiny

sae-lens' registered loaders read files in the hub's layouts; the target is a base model, the explainer its instruct
twin, and the writer stands behind a server.
"""
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers import FAMILIES, SENTENCES, gemma_scope, llama_scope, res_jb, save_twin
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from tiny_lab import finish
from writer_server import Server, capable

from saeexplainer.cli import main
from saeexplainer.explainer import Explainer, ExplainerCard
from saeexplainer.features import save_features
from saeexplainer.injection import FeatureCollator
from saeexplainer.lm.hooks import residual_stream
from saeexplainer.lm.models import load_model, weights_sha256
from saeexplainer.lm.sampling import pad
from saeexplainer.presets import load_preset
from saeexplainer.run import Run, stage_functions
from saeexplainer.saes import FeatureReader
from saeexplainer.sources.reading import word_at
from saeexplainer.target import Target, check_model_name

pytestmark = [
    pytest.mark.filterwarnings(r'ignore:\sThis SAE has non-empty model_from_pretrained_kwargs'),
    pytest.mark.filterwarnings('ignore:fan_in_fan_out')]

KEY = 'sk-paper-0123456789'
SMALL = dict(
    n_sft=12, n_pref=4, n_test=4, n_output=2, n_candidates=3, n_texts=2, n_generative=2, n_activating=1, n_neutral=1,
    steering_kl=(.2,), steering_tokens=4, sft_epochs=1., sft_accumulation=1, sft_lr=.005,
    dpo_epochs=1., dpo_batch=2, dpo_accumulation=1, dpo_lr=(.001, .001), lora_r=4, lora_alpha=8,
    explanation_tokens=6, threshold=0., spread=0., margin=0., dtype='float32', device='cpu')
CASES = { # family: (preset, layers of the tiny model)
    'gemma2': ('gemma-2-9b-l20', 22),
    'llama': ('llama3.1-8b-l15', 17),
    'gpt2': ('gpt2-small-l8', 10)}
ELSEWHERE = { # models that these SAEs are not for
    'gemma2': 'google/gemma-2-27b',
    'llama': 'meta-llama/Llama-3.2-1B',
    'gpt2': 'openai-community/gpt2-medium'}
STAGES = ['sft', 'prefs1', 'dpo1', 'prefs2', 'dpo2', 'evaluate']
TRAINED = ['sft', 'dpo1', 'dpo2']


@dataclass
class World:
    "What a preset needs, made in a folder"
    family: str
    folder: Path
    arrays: dict # of the SAE, as fabricated
    scale: float # of the SAE's input: sqrt(d) / mean norm, for Llama Scope
    server: Server

    @property
    def n_layers(self): return CASES[self.family][1]

    @property
    def as_shipped(self):
        "The preset as the paper's models have it"
        return load_preset(CASES[self.family][0])

    @property
    def has_twin(self):
        "A base model is read and its instruct twin explains; GPT-2 does both, and has no oracle"
        return self.family != 'gpt2'

    @property
    def target_folder(self): return self.folder/'base'

    @property
    def explainer_folder(self): return self.folder/('twin' if self.has_twin else 'base')

    def preset(self, **fields):
        own = dict(target=str(self.target_folder), explainer=str(self.explainer_folder))
        if self.has_twin: own['ao_adapter'] = str(self.folder/'oracle')
        return load_preset(CASES[self.family][0], **{**SMALL, **own, **fields})

    @cached_property
    def reader(self): return FeatureReader.load(self.preset().sae)

    def formula(self, x): # (n, d) -> (n, features), by the kind's own definition
        arrays = {name: array.double() for name, array in self.arrays.items()}
        x = x.double()*self.scale
        if self.family == 'gpt2': # a standard SAE
            return ((x - arrays['b_dec']) @ arrays['W_enc'] + arrays['b_enc']).relu()
        pre = x @ arrays['W_enc'] + arrays['b_enc'] # a JumpReLU: b_dec is not subtracted
        threshold = arrays['threshold'] if self.family == 'gemma2' else .5*self.scale
        return pre.relu()*(pre > threshold)

    def slowly(self, target, text, bos=True): # (tokens without BOS, features): every layer is run, on one text
        tokenizer = target.tokenizer
        ids = tokenizer(text, add_special_tokens=False)['input_ids']
        assert not set(ids) & set(tokenizer.all_special_ids) # so all of them count
        batch = torch.tensor([[tokenizer.bos_token_id]*bos + ids])
        with torch.no_grad(): states = target.model(batch, output_hidden_states=True).hidden_states
        layer = self.as_shipped.layer
        state = states[layer if self.family == 'gpt2' else layer + 1]
        return self.formula(state[0])[int(bos):]


# ---- what the worlds are made of

def make_sae(family, hub, patch): # (arrays, scale)
    "Write an SAE under the names that sae-lens' registry has"
    release, sae_id = load_preset(CASES[family][0]).sae.split(':')
    entry = get_pretrained_saes_directory()[release]
    where = (hub, entry.repo_id, entry.saes_map[sae_id])
    if family == 'gemma2': # the loader has the widths of the real files; the registry's overrides come last
        patch.setattr(entry, 'config_overrides', dict(d_in=64, d_sae=512))
        return gemma_scope(*where), 1.
    if family == 'gpt2': return res_jb(*where), 1.
    scale = entry.norm_scaling_factor[sae_id]
    return llama_scope(*where, layer=15, scale=scale), scale


def activations_of(target, sentence): # (tokens, features)
    tokenizer = target.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer(sentence, add_special_tokens=False)['input_ids']]
    x = residual_stream(target.model, **pad([ids], 0), layer=target.reader.layer, hook=target.reader.hook)
    return target.reader.encode(x)[0, 1:]


def row_of(feature, values, pieces):
    "A row of the feature table, or None where a feature fires on nothing or on no word"
    order = sorted(range(len(values)), key=lambda i: -values[i].max())
    strongest = order[:2]
    found = [word_at(pieces[i], int(values[i].argmax())) for i in strongest]
    words = list(dict.fromkeys(word for word in found if word))
    if not words or not values[order[0]].max() > 0: return None
    label = 'words such as ' + ', '.join(f"'{word}'" for word in words)
    said = [dict(text=label, model='gpt-4o-mini', type='oai_token-act-pair')]
    if feature % 2: said.append(dict(text=f'the word {words[0]}', model='gpt-5', type=''))
    contexts = [dict(source='test', tokens=pieces[i], values=values[i].tolist(), peak=int(values[i].argmax()))
                for i in strongest]
    return dict(index=feature, density=float(torch.cat(values).gt(0).float().mean()),
                max_act=float(values[order[0]].max()), status='ok', explanation=label, words=words,
                contexts=contexts, explanations=said)


def make_features(preset, file, n=40):
    """Write a feature table from sentences that the target has really read

    Each of n features has the words at its two strongest sentences as its label.
    """
    target, rows = Target.load(preset), []
    pieces = [target.activations([sentence], 0)[0].tokens for sentence in SENTENCES]
    activations = [activations_of(target, sentence) for sentence in SENTENCES]
    for feature in range(target.reader.n_features):
        row = row_of(feature, [columns[:, feature] for columns in activations], pieces)
        if row: rows.append(row)
        if len(rows) == n: break
    assert len(rows) == n
    save_features(rows, file)


def make_oracle(folder, model):
    "Write an adapter in the form of the public Activation Oracles"
    config = LoraConfig(r=64, lora_alpha=128, lora_dropout=.05, target_modules='all-linear', task_type='CAUSAL_LM',
                        init_lora_weights='gaussian')
    get_peft_model(load_model(str(model), device='cpu')[0], config).save_pretrained(folder)


def make_models(folder, family):
    n_layers = CASES[family][1]
    save_twin(folder/'base', family, n_layers=n_layers)
    if family == 'gpt2': return
    save_twin(folder/'twin', family, instruct=True, n_layers=n_layers, seed=1)
    make_oracle(folder/'oracle', folder/'twin')


@pytest.fixture(scope='module', params=list(CASES))
def world(request, tmp_path_factory):
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch, Server(capable) as server:
        patch.setattr(constants, 'HF_HUB_CACHE', str(folder/'hub'))
        patch.setattr(constants, 'HF_HUB_OFFLINE', True)
        patch.setenv('SAEEXPLAINER_DATA', str(folder/'data'))
        patch.setenv('OPENAI_BASE_URL', server.url)
        patch.setenv('OPENAI_API_KEY', KEY)
        make_models(folder, family)
        world = World(family, folder, *make_sae(family, folder/'hub', patch), server)
        make_features(world.preset(), folder/'data'/world.preset().name/'features.parquet')
        yield world


@dataclass
class Finished:
    "The whole loop through the preset, still open"
    run: Run
    asked: list # of the writer
    batches: list # (features, batch) that the trainers got

    @property
    def report(self): return self.run.folder/'report'

    @property
    def store(self): return self.run.store

    @property
    def made(self): return json.loads((self.report/'provenance.json').read_text())


@pytest.fixture(scope='module')
def finished(world):
    collate, batches = FeatureCollator.__call__, []
    def watched(self, rows):
        batch = collate(self, rows)
        batches.append(([row['feature'] for row in rows]*self.copies, batch))
        return batch
    with Run(world.folder/'runs'/'whole', world.preset(), progress=False) as run:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FeatureCollator, '__call__', watched)
            assert finish(run) == run.folder/'report'
        yield Finished(run, list(world.server.asked), batches)


# ---- the SAE

def test_own_loader(world):
    "The preset's own name of the SAE goes through sae-lens' registry and loader"
    reader = world.reader
    hook = 'resid_pre' if world.family == 'gpt2' else 'resid_post'
    assert (reader.layer, reader.hook) == (world.preset().layer, hook)
    assert (reader.d_model, reader.n_features) == (64, 512)
    wanted = world.arrays['W_dec'][[3, 500]]/world.scale
    assert torch.allclose(reader.directions([3, 500]), wanted)


def test_what_the_sae_says_of_itself(world):
    config = world.reader.sae.cfg
    assert config.metadata.neuronpedia_id == world.preset().source
    assert config.metadata.prepend_bos
    assert config.architecture() == ('standard' if world.family == 'gpt2' else 'jumprelu')
    assert config.normalize_activations == 'none'


def test_the_sae_computes_its_formula(world):
    x = 3*torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    if world.family == 'gpt2': x -= x.mean(-1, keepdim=True)
    found, wanted = world.reader.encode(x), world.formula(x).float()
    assert .02 < (wanted > 0).float().mean() < .9
    assert (found - wanted).abs().max() <= 1e-4*wanted.max()


def test_the_sae_knows_its_models(world):
    shipped = world.as_shipped
    for name in (shipped.target, shipped.explainer, str(world.target_folder)): check_model_name(name, world.reader)


FEATURES = [0, 7, 100, 511]
TEXTS = [SENTENCES[0], SENTENCES[4], 'A cat?']


@pytest.fixture(scope='module')
def target(world): return Target.load(world.preset())


def test_activations_the_long_way(world, target):
    "Early exit and one column against all layers and the formula on the fabricated arrays"
    for text in TEXTS:
        wanted = world.slowly(target, text)[:, FEATURES].T.float().numpy()
        readings = target.activations([text]*4, FEATURES)
        assert ''.join(readings[0].tokens) == text
        np.testing.assert_allclose([r.values for r in readings], wanted, atol=1e-4*max(1., wanted.max()))


def test_bos_is_read(world, target):
    for text in TEXTS:
        wanted = world.slowly(target, text)[:, FEATURES]
        without = world.slowly(target, text, bos=False)[:, FEATURES]
        assert (without - wanted).abs().max() > .01*wanted.max()


def test_a_padded_batch_the_long_way(world, target):
    found = target.max_acts(TEXTS*4, np.repeat(FEATURES, 3))
    wanted = [world.slowly(target, text)[:, feature].max() for feature in FEATURES for text in TEXTS]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


# ---- the loop

def test_every_stage(finished):
    assert list(stage_functions(finished.run.preset)) == STAGES
    assert [stage for stage in STAGES if not finished.store.finished(stage)] == []


def test_pairs_of_both_rounds(finished):
    pairs = finished.store.pairs()
    kept = pairs[pairs['dropped'].isna()]
    assert set(pairs['round']) == {1, 2}
    assert len(kept) >= 4
    assert (kept.chosen_score > kept.rejected_score).all()
    assert (kept.chosen != kept.rejected).all()


def test_every_text_was_written_and_scored(finished):
    "JSON lists, all parsed"
    texts = finished.store.texts()
    assert len(texts)
    assert texts['error'].isna().all()
    assert texts['score'].notna().all()


def test_as_many_texts_as_the_preset_says(finished):
    written = finished.store.texts().groupby('stage').size()
    distinct = finished.store.explanations(['round1']).drop_duplicates(['feature', 'text'])
    assert written['round1'] == 2*(distinct.text.str.strip() != '').sum()
    assert written['label'] == 4*(2 + 1 + 1)


def test_steering_reaches_its_kl(finished):
    reached = finished.store.steering()
    assert len(reached) == 2*3
    assert reached['reached'].mean() > .5


def test_every_explainer_explains_every_test_feature(world, finished):
    stages = [*TRAINED, 'ao'] if world.has_twin else TRAINED
    said = finished.store.explanations(stages)
    assert (said.groupby('stage').size() == 4).all()
    assert said['stage'].nunique() == len(stages)


def odd_features(run): return sum(index % 2 for index in run.splits['test']) # those that GPT-5 has explained too


def test_labels_of_other_explainers_where_there_are_some(world, finished):
    wanted = odd_features(finished.run) if world.has_twin else 0
    assert len(finished.store.explanations('gpt-5')) == wanted
    assert not len(finished.store.explanations('claude-4-5-sonnet'))


def test_what_a_run_lacks_is_noted(world, finished):
    if not world.has_twin: return
    odd = odd_features(finished.run)
    grid = ', '.join(str(world.n_layers*percent//100) for percent in (25, 50, 75))
    notes = [f'{odd} of 4 test features have a label by gpt-5',
             '0 of 4 test features have a label by claude-4-5-sonnet',
             f'ao: layer {finished.run.preset.layer} is off the grid that the oracle was trained on (layers {grid})']
    assert finished.store.meta('notes') == notes[odd == 4:]
    page = (finished.report/'index.html').read_text()
    assert 'is off the grid that the oracle was trained on' in page


def test_the_files_of_the_report(finished):
    tables = {f'{name}.parquet' for name in 'metrics pairs candidates judgements steering'.split()}
    pages = {'index.html', 'summary.csv', 'provenance.json', 'examples.json', 'stages.png'}
    assert tables | pages <= {file.name for file in finished.report.iterdir()}


@pytest.fixture
def summary(finished): return pd.read_csv(finished.report/'summary.csv').set_index(['stage', 'metric'])


def test_the_judge_finds_the_texts_that_were_written_from_an_explanation(summary):
    assert summary.loc[('control', 'output'), 'mean'] == 1


@pytest.mark.parametrize('stage', ['label', *TRAINED])
def test_what_was_not_said_is_counted_and_not_measured(summary, stage):
    "An explainer of random weights may say nothing of a feature"
    of_stage = summary.loc[stage].loc[['generative', 'input', 'high', 'low', 'gap']]
    assert (of_stage['n'] + of_stage['empty'] == 4).all()
    assert (of_stage['mean'].notna() == (of_stage['n'] > 0)).all()


def test_labels_are_measured(summary): assert summary.loc['label', 'mean'].notna().all()


# ---- where it comes from

def test_provenance_names_preset_and_sae(world, finished):
    made, shipped = finished.made, world.as_shipped
    assert made['preset'] == shipped.name
    assert made['sae'] == shipped.sae
    assert made['sae_sha256'] == world.reader.sha256
    assert made['source'] == shipped.source


def test_provenance_names_the_models(world, finished):
    made = finished.made
    assert made['target'] == str(world.target_folder)
    assert made['explainer'] == str(world.explainer_folder)
    assert made['writer'] == 'gpt-5.4-mini'
    assert 'n_sft: 10000 -> 12' in made['changes'] or 'n_sft: 20000 -> 12' in made['changes']


def test_a_base_model_is_read_and_its_twin_explains(world, finished):
    base, twin = weights_sha256(world.target_folder), weights_sha256(world.explainer_folder)
    assert (base != twin) == world.has_twin
    assert finished.run.target.model.config.name_or_path == str(world.target_folder)
    assert finished.run.explainer('dpo2').model.config.name_or_path == str(world.explainer_folder)


@pytest.mark.parametrize('stage', TRAINED)
def test_a_card_names_what_its_explainer_was_made_with(world, finished, stage):
    card, made = ExplainerCard.load(finished.run.folder/'explainer'/stage), finished.made
    assert card.stage == stage
    assert (card.sae, card.sae_sha256) == (made['sae'], world.reader.sha256)
    assert (card.sae_layer, card.placeholder) == (world.preset().layer, ' ?')
    assert (card.target, card.base_model) == (made['target'], made['explainer'])
    assert card.model_sha256 == weights_sha256(world.explainer_folder)


def test_each_stage_has_weights_of_its_own(finished):
    assert len({weights_sha256(finished.run.folder/'explainer'/stage) for stage in TRAINED}) == 3


# ---- what was scored, trained on and asked

def test_scores_the_long_way(world, finished):
    "What stands in the store is the activation of the base model on the writer's text"
    texts = finished.store.texts().drop_duplicates(['feature', 'text']).iloc[::3]
    assert len(texts) > 15
    assert set(texts.kind) == {'preference', 'generative', 'activating', 'neutral'}
    wanted = [world.slowly(finished.run.target, row.text)[:, row.feature].max() for row in texts.itertuples()]
    np.testing.assert_allclose(texts.score, wanted, rtol=1e-4, atol=1e-4)


def test_the_chosen_explanation_has_the_largest_reward(finished):
    "Eq. 7"
    rewards = finished.store.texts('round1').groupby(['feature', 'k']).score.max()
    said = finished.store.explanations('round1').set_index(['feature', 'k']).text
    for pair in finished.store.pairs(1).dropna(subset='chosen').itertuples():
        of_feature = rewards[pair.feature]
        assert pair.chosen_score == of_feature.max()
        assert pair.chosen == said[pair.feature][of_feature.idxmax()]


@pytest.fixture(scope='module')
def sft_explainer(finished): return finished.run.explainer('sft')


def ends_of(world, tokenizer): return [tokenizer.convert_tokens_to_ids(end) for end in FAMILIES[world.family][2]]


def test_the_explainer_stops_at_the_ends_of_its_family(world, sft_explainer):
    configured = sft_explainer.model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    assert set(ends_of(world, sft_explainer.tokenizer)) == set(configured)


def test_the_prompt_has_one_bos_at_most_and_one_placeholder(world, sft_explainer):
    tokenizer, prompt = sft_explainer.tokenizer, sft_explainer.prompt
    assert prompt.count(tokenizer.bos_token_id) == (1 if world.has_twin else 0)
    assert prompt.count(tokenizer.encode(' ?', add_special_tokens=False)[0]) == 1


def test_every_feature_of_the_training_splits_is_trained_on(finished):
    trained = {feature for features, _ in finished.batches for feature in features}
    splits = finished.run.splits
    assert trained == {i for name in ('sft', 'validation', 'preference1') for i in splits[name]}


def test_each_row_carries_its_own_direction(world, finished):
    for features, batch in finished.batches:
        assert torch.allclose(batch['feature_vector'], world.arrays['W_dec'][features]/world.scale)


def rows_of_batches(batches): # (token ids, labels or None) of each row, without its padding
    for _, batch in batches:
        for i, mask in enumerate(batch['attention_mask'].bool()):
            labels = batch['labels'][i][mask] if 'labels' in batch else None
            yield batch['input_ids'][i][mask].tolist(), labels


def test_rows_are_the_prompt_and_an_answer_that_ends(world, finished, sft_explainer):
    "The prompt is that which the explainer is asked with; the model's end of turn is learned"
    prompt, ends = sft_explainer.prompt, ends_of(world, sft_explainer.tokenizer)
    for ids, _ in rows_of_batches(finished.batches):
        assert ids[:len(prompt)] == prompt
        assert set(ends) & set(ids[len(prompt):])


def test_the_answer_alone_is_learned(finished, sft_explainer):
    n = len(sft_explainer.prompt)
    for ids, labels in rows_of_batches(finished.batches):
        if labels is None: continue
        assert (labels[:n] == -100).all()
        assert labels[n:].tolist() == ids[n:]


def form_of(asked): return asked['response_format']['json_schema']['schema']['properties']


def test_what_the_writer_is_asked(world, finished):
    forms = {'+'.join(form_of(asked)) for asked in finished.asked}
    assert forms == {'samples', 'sentences', 'activating+neutral', 'choice'}
    assert world.server.keys == {f'Bearer {KEY}'}
    assert {asked['model'] for asked in finished.asked} == {'gpt-5.4-mini'}


def test_texts_are_drawn_and_verdicts_are_not(finished):
    texts = [asked for asked in finished.asked if 'choice' not in form_of(asked)]
    verdicts = [asked for asked in finished.asked if 'choice' in form_of(asked)]
    assert {(asked['temperature'], asked['top_p']) for asked in texts} == {(.8, .95)}
    assert {asked['temperature'] for asked in verdicts} == {0}


def test_a_finished_run_asks_nothing_more(world, finished):
    asked = len(world.server.asked)
    assert finished.store.count('replies') == len(finished.asked)
    assert finish(finished.run) == finished.report
    assert len(world.server.asked) == asked


def test_untrained_explainer(world):
    "The twin with the injection: another direction, other logits from the placeholder on, and equal ones before"
    explainer = Explainer.from_preset(world.preset(), world.reader)
    ids = torch.tensor([explainer.prompt]*2)
    directions = world.reader.directions([1, 2])
    with torch.no_grad(), explainer.injector.using(directions): one, other = explainer.model(input_ids=ids).logits
    difference = (one - other).abs()
    at = explainer.prompt.index(explainer.placeholder_id)
    assert difference[:at].max() < 1e-5
    assert difference[at:].max() > 1e-3


# ---- what does not belong together

def test_another_layer_is_refused(world):
    preset = world.preset(layer=world.preset().layer + 1)
    says = f"the preset says layer {preset.layer}, its SAE '.*' reads layer {preset.layer - 1}"
    with pytest.raises(ValueError, match=says): Target.load(preset)


def test_another_width_is_refused(world):
    folder = str(save_twin(world.folder/'narrow', world.family, n_layers=world.preset().layer + 1, d=32))
    with pytest.raises(ValueError, match='the SAE is 64 wide and the model 32: this SAE is for another model'):
        Target.load(world.preset(target=folder))
    says = "has hidden size 32, the SAE's directions have 64: take the target's own twin"
    with pytest.raises(ValueError, match=says): Explainer.from_preset(world.preset(explainer=folder), world.reader)


def test_too_few_layers_are_refused(world):
    folder = save_twin(world.folder/'shallow', world.family, n_layers=3)
    says = f'the SAE reads layer {world.preset().layer}, the model has layers 0 to 2'
    with pytest.raises(ValueError, match=says): Target.load(world.preset(target=str(folder)))


def test_another_model_is_refused(world):
    other = ELSEWHERE[world.family]
    with pytest.raises(ValueError, match=f"this SAE is for the model '.*', not for '{other}'"):
        Target.load(world.preset(target=other))


# ---- the command, on one of them

def only(family): return pytest.mark.parametrize('world', [family], indirect=True, scope='module')


def as_yaml(value):
    "On one line, as it is given to --set"
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


def settings_of(world):
    "Options of the command that make a run small"
    fields = dict(SMALL, target=str(world.target_folder), explainer=str(world.explainer_folder), dpo_rounds=1,
                  n_output=1)
    return [part for name, value in fields.items() for part in ('--set', f'{name}={as_yaml(value)}')]


@pytest.fixture(scope='module')
def runs(world): return world.folder/'runs'


@pytest.fixture
def commanded(world, runs, capsys):
    "Folder of a run by the command, and what it printed the first time"
    printed = runs/'command.txt'
    if not printed.exists():
        main(['run', 'gemma-2-9b-l20', '--name', 'command', *settings_of(world), '--root', str(runs)])
        printed.write_text(capsys.readouterr().out)
    return runs/'command', printed.read_text()


@only('gemma2')
@pytest.mark.parametrize('says', [
    'gemma-2-9b-l20 (full): 40 features',
    'prefs1: ',
    ' pairs of 4 features',
    'step-0 loss 0.6931',
    'generative',
    'gemma-2-9b/20-gemmascope-res-16k/'])
def test_command_says_what_it_does(commanded, says): assert says in commanded[1]


@only('gemma2')
def test_command_keeps_its_preset(world, commanded):
    oracle = world.as_shipped.ao_adapter
    wanted = world.preset(dpo_rounds=1, n_output=1, ao_adapter=oracle)
    assert load_preset(commanded[0]/'preset.yaml') == wanted
    page = (commanded[0]/'report'/'index.html').read_text()
    assert 'ao: not measured' in page # the public oracle cannot be had here


@only('gemma2')
def test_command_writes_a_report(world, commanded, runs, capsys):
    copy = world.folder/'copy'
    main(['report', 'command', '--root', str(runs), '--out', str(copy)])
    assert (copy/'index.html').exists()
    assert 'control' in capsys.readouterr().out


@only('gemma2')
def test_command_explains_as_the_run_did(commanded, capsys):
    folder, _ = commanded
    explanations = pd.read_parquet(folder/'report'/'explanations.parquet')
    said = explanations.query('stage == "dpo1"').iloc[0]
    feature = f'gemma-2-9b/20-gemmascope-res-16k/{said.feature}'
    explainer = str(folder/'explainer'/'dpo1')
    main(['explain', feature, '--preset', 'gemma-2-9b-l20', '--explainer', explainer, '--json'])
    [answer] = json.loads(capsys.readouterr().out)
    assert answer['explanation'].startswith(said.text)
    assert answer['label'].startswith('words such as')


@only('gemma2')
def test_command_refuses_another_layer(world, runs, capsys):
    settings = [*settings_of(world), '--set', 'layer=21', '--root', str(runs)]
    with pytest.raises(SystemExit): main(['run', 'gemma-2-9b-l20', '--name', 'wrong', *settings])
    assert 'the preset says layer 21' in capsys.readouterr().err


@only('gpt2')
def test_stream_is_centred_where_the_sae_was_trained_so(world):
    """res-jb SAEs were trained on GPT-2 with `center_writing_weights`: on x - mean(x)

    sae-lens' registry says so (SAELens #279).
    """
    release, sae_id = 'gpt2-small-res-jb', 'blocks.7.hook_resid_pre'
    repo = 'jbloom/GPT2-Small-SAEs-Reformatted'
    arrays = res_jb(world.folder/'hub', repo, sae_id, seed=5, centred=False)
    target = Target.load(world.preset(sae=f'{release}:{sae_id}', layer=7))
    assert target.reader.sae.cfg.metadata.model_from_pretrained_kwargs == {'center_writing_weights': True}
    ids = torch.tensor([[target.tokenizer.bos_token_id, *target.tokenizer(SENTENCES[0])['input_ids']]])
    with torch.no_grad(): x = target.model(ids, output_hidden_states=True).hidden_states[7][0, 1:]
    centred = x - x.mean(-1, keepdim=True)
    wanted = ((centred - arrays['b_dec']) @ arrays['W_enc'] + arrays['b_enc']).relu()
    features = [1, 2, 3, 4]
    found = [reading.values for reading in target.activations([SENTENCES[0]]*4, features)]
    np.testing.assert_allclose(found, wanted[:, features].T, atol=1e-4)
