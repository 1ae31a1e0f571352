"""The paper's own presets from end to end, offline and tiny: sae-lens' registered loaders on files in the hub's layouts, a base model as the target, its
instruct twin as the explainer, and a writer behind a server"""
import json
from dataclasses import dataclass
from pathlib import Path
import numpy as np, pandas as pd
import pytest, torch
from helpers import FAMILIES, SENTENCES, gemma_scope, llama_scope, res_jb, save_twin
from writer_server import Server, capable
from saeexplainer.cli import main
from saeexplainer.features import save_features
from saeexplainer.explainer import Explainer, ExplainerCard
from saeexplainer.injection import FeatureCollator
from saeexplainer.lm.models import weights_sha256
from saeexplainer.presets import load_preset
from saeexplainer.sources.reading import word_at
from saeexplainer.run import Run, execute, stage_functions
from saeexplainer.saes import FeatureReader
from saeexplainer.lm.sampling import pad
from saeexplainer.lm.hooks import residual_stream
from saeexplainer.target import Target, check_model_name

pytestmark = pytest.mark.filterwarnings(r'ignore:\sThis SAE has non-empty model_from_pretrained_kwargs', 'ignore:fan_in_fan_out')
KEY = 'sk-paper-0123456789'
SMALL = dict(n_sft=12, n_pref=4, n_test=4, n_output=2, n_candidates=3, n_texts=2, n_generative=2, n_activating=1, n_neutral=1, steering_kl=(.2,), steering_tokens=4,
             sft_epochs=1., sft_accumulation=1, sft_lr=.005, dpo_epochs=1., dpo_batch=2, dpo_accumulation=1, dpo_lr=(.001, .001), lora_r=4, lora_alpha=8,
             explanation_tokens=6, threshold=0., spread=0., margin=0., dtype='float32', device='cpu')
CASES = {'gemma2': ('gemma-2-9b-l20', 22), 'llama': ('llama3.1-8b-l15', 17), 'gpt2': ('gpt2-small-l8', 10)} # family: (preset, layers of the tiny model)
ELSEWHERE = {'gemma2': 'google/gemma-2-27b', 'llama': 'meta-llama/Llama-3.2-1B', 'gpt2': 'openai-community/gpt2-medium'} # models that these SAEs are not for


@dataclass
class World:
    "What a preset needs, made in a folder"
    family: str
    folder: Path
    arrays: dict # of the SAE, as fabricated
    scale: float # of the SAE's input: sqrt(d) / mean norm, for Llama Scope
    server: Server

    @property
    def target_folder(self): return self.folder/'base'
    @property
    def explainer_folder(self): return self.folder/('base' if self.family == 'gpt2' else 'twin')

    def preset(self, **kw):
        oracle = {} if self.family == 'gpt2' else {'ao_adapter': str(self.folder/'oracle')}
        return load_preset(CASES[self.family][0], **{**SMALL, **oracle, 'target': str(self.target_folder), 'explainer': str(self.explainer_folder), **kw})

    def formula(self, x): # (n, d) -> (n, features), by the kind's own definition
        a = {k: v.double() for k, v in self.arrays.items()}
        x = x.double()*self.scale
        if self.family == 'gpt2': return ((x - a['b_dec']) @ a['W_enc'] + a['b_enc']).relu() # a standard SAE
        pre = x @ a['W_enc'] + a['b_enc'] # a JumpReLU: b_dec is not subtracted
        threshold = a['threshold'] if self.family == 'gemma2' else .5*self.scale
        return pre.relu()*(pre > threshold)

    def slowly(self, target, text, bos=True): # (tokens without BOS, features): every layer is run, on one text
        ids = target.tokenizer(text, add_special_tokens=False)['input_ids']
        assert not set(ids) & set(target.tokenizer.all_special_ids) # so all of them count
        with torch.no_grad(): states = target.model(torch.tensor([[target.tokenizer.bos_token_id]*bos + ids]), output_hidden_states=True).hidden_states
        layer = load_preset(CASES[self.family][0]).layer
        return self.formula(states[layer if self.family == 'gpt2' else layer + 1][0])[int(bos):]


def make_sae(family, hub, patch): # (arrays, scale), under the names that sae-lens' registry has
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    release, sae_id = load_preset(CASES[family][0]).sae.split(':')
    entry = get_pretrained_saes_directory()[release]
    where = (hub, entry.repo_id, entry.saes_map[sae_id])
    if family == 'gemma2':
        patch.setattr(entry, 'config_overrides', dict(d_in=64, d_sae=512)) # the loader has the widths of the real files; the registry's overrides come last
        return gemma_scope(*where), 1.
    if family == 'gpt2': return res_jb(*where), 1.
    return llama_scope(*where, layer=15, scale=entry.norm_scaling_factor[sae_id]), entry.norm_scaling_factor[sae_id]


def make_features(preset, file, n=40):
    "A feature table from sentences that the target has really read: n features, each with the words at its two strongest sentences as its label"
    target, rows = Target.load(preset), []
    pieces = [target.activations([s], 0)[0].tokens for s in SENTENCES]
    batch = [pad([[target.tokenizer.bos_token_id, *target.tokenizer(s, add_special_tokens=False)['input_ids']]], 0) for s in SENTENCES]
    acts = [target.reader.encode(residual_stream(target.model, **b, layer=target.reader.layer, hook=target.reader.hook))[0, 1:] for b in batch]
    for f in range(target.reader.n_features):
        values = [a[:, f] for a in acts]
        order = sorted(range(len(values)), key=lambda i: -values[i].max())
        words = list(dict.fromkeys(w for i in order[:2] if (w := word_at(pieces[i], int(values[i].argmax())))))
        if len(rows) == n or not values[order[0]].max() > 0 or not words: continue
        contexts = [dict(source='test', tokens=pieces[i], values=values[i].tolist(), peak=int(values[i].argmax())) for i in order[:2]]
        rows.append(dict(index=f, density=float(torch.cat(values).gt(0).float().mean()), max_act=float(values[order[0]].max()), status='ok',
                         explanation=(label := 'words such as ' + ', '.join(f"'{w}'" for w in words)), words=words, contexts=contexts,
                         explanations=[dict(text=label, model='gpt-4o-mini', type='oai_token-act-pair'), *([dict(text=f'the word {words[0]}', model='gpt-5', type='')] if f % 2 else [])]))
    assert len(rows) == n
    save_features(rows, file)


def make_oracle(folder, model): # an adapter in the form of the public Activation Oracles
    from peft import LoraConfig, get_peft_model
    from saeexplainer.lm.models import load_model
    config = LoraConfig(r=64, lora_alpha=128, lora_dropout=.05, target_modules='all-linear', task_type='CAUSAL_LM', init_lora_weights='gaussian')
    get_peft_model(load_model(str(model), device='cpu')[0], config).save_pretrained(folder)


@pytest.fixture(scope='module', params=list(CASES))
def world(request, tmp_path_factory):
    from huggingface_hub import constants
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    layers = CASES[family][1]
    with pytest.MonkeyPatch.context() as patch, Server(capable) as server:
        for name, value in (('HF_HUB_CACHE', str(folder/'hub')), ('HF_HUB_OFFLINE', True)): patch.setattr(constants, name, value)
        for name, value in dict(SAEEXPLAINER_DATA=str(folder/'data'), OPENAI_BASE_URL=server.url, OPENAI_API_KEY=KEY).items(): patch.setenv(name, value)
        save_twin(folder/'base', family, n_layers=layers)
        if family != 'gpt2':
            save_twin(folder/'twin', family, instruct=True, n_layers=layers, seed=1)
            make_oracle(folder/'oracle', folder/'twin')
        world = World(family, folder, *make_sae(family, folder/'hub', patch), server)
        make_features(world.preset(), folder/'data'/world.preset().name/'features.parquet')
        yield world


@pytest.fixture(scope='module')
def finished(world):
    "The whole loop through the preset: its folder, what the writer was asked, and the batches that the trainers got"
    collate, batches_seen = FeatureCollator.__call__, []
    def watched(self, rows):
        batch = collate(self, rows)
        batches_seen.append(([r['feature'] for r in rows]*self.copies, batch))
        return batch
    with pytest.MonkeyPatch.context() as patch, Run(world.folder/'runs'/'whole', world.preset(), progress=False) as run:
        patch.setattr(FeatureCollator, '__call__', watched)
        report = execute(run, say=lambda line: None)
    assert report == world.folder/'runs'/'whole'/'report'
    return report.parent, list(world.server.asked), batches_seen


# ---- the SAE

def test_own_loader(world):
    "The preset's own name of the SAE goes through sae-lens' registry and loader"
    reader, a = FeatureReader.load(world.preset().sae), world.arrays
    hook = 'resid_pre' if world.family == 'gpt2' else 'resid_post'
    assert (reader.layer, reader.hook, reader.d_model, reader.n_features) == (world.preset().layer, hook, 64, 512)
    assert reader.sae.cfg.metadata.neuronpedia_id == world.preset().source and reader.sae.cfg.metadata.prepend_bos
    assert reader.sae.cfg.architecture() == ('standard' if world.family == 'gpt2' else 'jumprelu') and reader.sae.cfg.normalize_activations == 'none'
    assert torch.allclose(reader.directions([3, 500]), a['W_dec'][[3, 500]]/world.scale)
    x = 3*torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    if world.family == 'gpt2': x -= x.mean(-1, keepdim=True)
    found, wanted = reader.encode(x), world.formula(x).float()
    assert .02 < (wanted > 0).float().mean() < .9 and (found - wanted).abs().max() <= 1e-4*wanted.max()
    for name in (load_preset(world.preset().name).target, load_preset(world.preset().name).explainer, str(world.target_folder)): check_model_name(name, reader)


def test_activations_the_long_way(world):
    "Early exit and one column against all layers and the formula on the fabricated arrays; with BOS"
    target, features = Target.load(world.preset()), [0, 7, 100, 511]
    texts = [SENTENCES[0], SENTENCES[4], 'A cat?']
    for text in texts:
        wanted = world.slowly(target, text)[:, features].T.float().numpy()
        readings = target.activations([text]*4, features)
        assert ''.join(readings[0].tokens) == text
        np.testing.assert_allclose([r.values for r in readings], wanted, atol=1e-4*max(1., wanted.max()))
        without = world.slowly(target, text, bos=False)[:, features].T.float().numpy()
        assert np.abs(without - wanted).max() > .01*wanted.max() # so BOS was fed
    found = target.max_acts(texts*4, np.repeat(features, 3)) # a padded batch
    wanted = [world.slowly(target, text)[:, f].max() for f in features for text in texts]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


# ---- the loop

def test_every_stage_and_report(world, finished):
    folder = finished[0]
    with Run(folder, world.preset(), progress=False) as run:
        assert all(run.store.finished(s) for s in stage_functions(run.preset)) and list(stage_functions(run.preset)) == ['sft', 'prefs1', 'dpo1', 'prefs2', 'dpo2', 'evaluate']
        pairs, texts = run.store.pairs(), run.store.texts()
        assert set(pairs['round']) == {1, 2} and pairs['dropped'].isna().sum() >= 4
        kept = pairs[pairs['dropped'].isna()]
        assert (kept.chosen_score > kept.rejected_score).all() and (kept.chosen != kept.rejected).all()
        assert len(texts) and texts['error'].isna().all() and texts['score'].notna().all() # JSON lists, all parsed
        written = texts.groupby('stage').size()
        distinct = run.store.explanations(['round1']).drop_duplicates(['feature', 'text'])
        assert written['round1'] == 2*(distinct.text.str.strip() != '').sum() and written['label'] == 4*(2 + 1 + 1)
        reached = run.store.steering()
        assert len(reached) == 2*3 and reached['reached'].mean() > .5
        oracle = [] if world.family == 'gpt2' else ['ao']
        said = run.store.explanations(['sft', 'dpo1', 'dpo2', *oracle])
        assert (said.groupby('stage').size() == 4).all() and said['stage'].nunique() == 3 + len(oracle)
        odd = sum(i % 2 for i in run.splits['test'])
        assert len(run.store.explanations('gpt-5')) == (odd if oracle else 0) and not len(run.store.explanations('claude-4-5-sonnet'))
        notes = [f'{odd} of 4 test features have a label by gpt-5', '0 of 4 test features have a label by claude-4-5-sonnet']
        n_layers, layer = CASES[world.family][1], run.preset.layer
        grid = ', '.join(str(n_layers*p//100) for p in (25, 50, 75))
        if oracle: assert run.store.meta('notes') == notes[odd == 4:] + [f'ao: layer {layer} is off the grid that the oracle was trained on (layers {grid})']
    names = {p.name for p in (folder/'report').iterdir()}
    assert {'report.md', 'summary.csv', 'provenance.json', 'examples.json', 'metrics.parquet', 'pairs.parquet', 'candidates.parquet', 'judgements.parquet', 'steering.parquet', 'stages.png'} <= names
    summary = pd.read_csv(folder/'report'/'summary.csv').set_index(['stage', 'metric'])
    assert summary.loc[('control', 'output'), 'mean'] == 1 # the judge finds the texts that were written from an explanation
    for stage in ('label', 'sft', 'dpo1', 'dpo2'): # an explainer of random weights may say nothing of a feature: counted, not measured
        of_stage = summary.loc[stage].loc[['generative', 'input', 'high', 'low', 'gap']]
        assert (of_stage['n'] + of_stage['empty'] == 4).all() and (of_stage['mean'].notna() == (of_stage['n'] > 0)).all()
    assert summary.loc['label', 'mean'].notna().all()
    if world.family != 'gpt2': assert 'is off the grid that the oracle was trained on' in (folder/'report'/'report.md').read_text()


def test_provenance(world, finished):
    folder, preset = finished[0], world.preset()
    reader = FeatureReader.load(preset.sae)
    made = json.loads((folder/'report'/'provenance.json').read_text())
    assert (made['preset'], made['sae'], made['sae_sha256'], made['source']) == (preset.name, load_preset(preset.name).sae, reader.sha256, load_preset(preset.name).source)
    assert (made['target'], made['explainer'], made['writer']) == (str(world.target_folder), str(world.explainer_folder), 'gpt-5.4-mini')
    assert 'n_sft: 10000 -> 12' in made['changes'] or 'n_sft: 20000 -> 12' in made['changes']
    base, twin = weights_sha256(world.target_folder), weights_sha256(world.explainer_folder)
    assert (base == twin) == (world.family == 'gpt2') # a base model is read, its instruct twin explains
    cards = [ExplainerCard.load(folder/'explainer'/stage) for stage in ('sft', 'dpo1', 'dpo2')]
    for card in cards:
        assert (card.sae, card.sae_sha256, card.sae_layer, card.placeholder) == (made['sae'], reader.sha256, preset.layer, ' ?')
        assert (card.target, card.base_model, card.model_sha256) == (made['target'], made['explainer'], twin)
    assert len({weights_sha256(folder/'explainer'/c.stage) for c in cards}) == 3
    with Run(folder, preset, progress=False) as run: assert run.target.model.config.name_or_path == made['target'] and run.explainer('dpo2').model.config.name_or_path == made['explainer']


def test_scores_the_long_way(world, finished):
    "What stands in the store is the activation of the base model on the writer's text"
    with Run(finished[0], world.preset(), progress=False) as run:
        texts = run.store.texts().drop_duplicates(['feature', 'text']).iloc[::3]
        assert len(texts) > 15 and set(texts.kind) == {'preference', 'generative', 'activating', 'neutral'}
        np.testing.assert_allclose(texts.score, [world.slowly(run.target, t.text)[:, t.feature].max() for t in texts.itertuples()], rtol=1e-4, atol=1e-4)
        every = run.store.texts('round1').groupby(['feature', 'k']).score.max() # Eq. 7
        said = run.store.explanations('round1').set_index(['feature', 'k']).text
        for p in run.store.pairs(1).dropna(subset='chosen').itertuples():
            assert p.chosen_score == every[p.feature].max() and said[p.feature][every[p.feature].idxmax()] == p.chosen


def test_what_is_trained_on(world, finished):
    "Rows begin with the prompt that the explainer is asked with, one BOS at most; each carries its own feature's direction; the model's end of turn is learned"
    with Run(finished[0], world.preset(), progress=False) as run:
        explainer, splits = run.explainer('sft'), run.splits
        tokenizer, prompt = explainer.tokenizer, explainer.prompt
        ends = [tokenizer.convert_tokens_to_ids(e) for e in FAMILIES[world.family][2]]
        configured = explainer.model.generation_config.eos_token_id
        assert set(ends) == set(configured if isinstance(configured, list) else [configured])
    assert prompt.count(tokenizer.bos_token_id) == (world.family != 'gpt2') and prompt.count(tokenizer.encode(' ?', add_special_tokens=False)[0]) == 1
    assert {f for features, _ in finished[2] for f in features} == {i for name in ('sft', 'validation', 'preference1') for i in splits[name]}
    for features, batch in finished[2]:
        assert torch.allclose(batch['feature_vector'], world.arrays['W_dec'][features]/world.scale)
        for i, (ids, mask) in enumerate(zip(batch['input_ids'], batch['attention_mask'])):
            ids = ids[mask.bool()].tolist()
            completion = ids[len(prompt):]
            assert ids[:len(prompt)] == prompt and any(e in completion for e in ends)
            if 'labels' in batch:
                learned = batch['labels'][i][mask.bool()]
                assert (learned[:len(prompt)] == -100).all() and learned[len(prompt):].tolist() == completion


def test_what_the_writer_is_asked(world, finished):
    folder, asked, _ = finished
    forms = [a['response_format']['json_schema']['schema']['properties'] for a in asked]
    assert {'+'.join(f) for f in forms} == {'samples', 'sentences', 'activating+neutral', 'choice'} and world.server.keys == {f'Bearer {KEY}'}
    assert {a['model'] for a in asked} == {'gpt-5.4-mini'}
    texts, judge = [a for a, f in zip(asked, forms) if 'choice' not in f], [a for a, f in zip(asked, forms) if 'choice' in f]
    assert {(a['temperature'], a['top_p']) for a in texts} == {(.8, .95)} and {a['temperature'] for a in judge} == {0}
    with Run(folder, world.preset(), progress=False) as run:
        assert run.store.count('replies') == len(asked)
        assert execute(run, say=lambda line: None) == folder/'report' # all of it is done
    assert world.server.asked == asked


def test_untrained_explainer(world):
    "The twin with the injection: another direction, other logits from the placeholder on, and equal ones before"
    reader = FeatureReader.load(world.preset().sae)
    explainer = Explainer.from_preset(world.preset(), reader)
    ids = torch.tensor([explainer.prompt]*2)
    with torch.no_grad(), explainer.injector.using(reader.directions([1, 2])): a, b = explainer.model(input_ids=ids).logits
    at = explainer.prompt.index(explainer.placeholder_id)
    assert (a[:at] - b[:at]).abs().max() < 1e-5 < 1e-3 < (a[at:] - b[at:]).abs().max()


# ---- what does not belong together

def test_another_layer_is_refused(world):
    preset = world.preset(layer=world.preset().layer + 1)
    with pytest.raises(ValueError, match=f"the preset says layer {preset.layer}, its SAE '.*' reads layer {preset.layer - 1}"): Target.load(preset)


def test_another_width_is_refused(world):
    folder = save_twin(world.folder/'narrow', world.family, n_layers=world.preset().layer + 1, d=32)
    with pytest.raises(ValueError, match='the SAE is 64 wide and the model 32: this SAE is for another model'): Target.load(world.preset(target=str(folder)))
    with pytest.raises(ValueError, match="has hidden size 32, the SAE's directions have 64: take the target's own twin"):
        Explainer.from_preset(world.preset(explainer=str(folder)), FeatureReader.load(world.preset().sae))


def test_too_few_layers_are_refused(world):
    folder = save_twin(world.folder/'shallow', world.family, n_layers=3)
    with pytest.raises(ValueError, match=f'the SAE reads layer {world.preset().layer}, the model has layers 0 to 2'): Target.load(world.preset(target=str(folder)))


def test_another_model_is_refused(world):
    with pytest.raises(ValueError, match=f"this SAE is for the model '.*', not for '{ELSEWHERE[world.family]}'"): Target.load(world.preset(target=ELSEWHERE[world.family]))


# ---- the command, on one of them

def only(family): return pytest.mark.parametrize('world', [family], indirect=True)


@only('gemma2')
def test_command(world, capsys):
    import yaml
    fields = {**SMALL, 'target': str(world.target_folder), 'explainer': str(world.explainer_folder), 'dpo_rounds': 1, 'n_output': 1}
    settings = [x for k, v in fields.items() for x in ('--set', f'{k}={yaml.safe_dump(list(v) if isinstance(v, tuple) else v, default_flow_style=True).splitlines()[0]}')]
    root = ['--root', str(world.folder/'runs')]
    main(['run', 'gemma-2-9b-l20', '--name', 'command', *settings, *root])
    printed = capsys.readouterr().out
    for said in ('gemma-2-9b-l20 (full): 40 features', 'prefs1: ', ' pairs of 4 features', 'step-0 loss 0.6931', 'generative', 'gemma-2-9b/20-gemmascope-res-16k/'): assert said in printed
    folder = world.folder/'runs'/'command'
    preset = world.preset(dpo_rounds=1, n_output=1, ao_adapter=load_preset('gemma-2-9b-l20').ao_adapter)
    assert load_preset(folder/'preset.yaml') == preset
    assert 'ao: not measured' in (folder/'report'/'report.md').read_text() # the public oracle cannot be had here
    main(['report', 'command', *root, '--out', str(world.folder/'copy')])
    assert (world.folder/'copy'/'report.md').exists() and 'control' in capsys.readouterr().out
    said = pd.read_parquet(folder/'report'/'explanations.parquet').query('stage == "dpo1"').iloc[0]
    main(['explain', f'gemma-2-9b/20-gemmascope-res-16k/{said.feature}', '--preset', 'gemma-2-9b-l20', '--explainer', str(folder/'explainer'/'dpo1'), '--json'])
    answer = json.loads(capsys.readouterr().out)[0]
    assert answer['explanation'].startswith(said.text) and answer['label'].startswith('words such as')
    with pytest.raises(SystemExit): main(['run', 'gemma-2-9b-l20', '--name', 'wrong', *settings, '--set', 'layer=21', *root])
    assert 'the preset says layer 21' in capsys.readouterr().err


@only('gpt2')
def test_stream_is_centred_where_the_sae_was_trained_so(world):
    "res-jb SAEs were trained on GPT-2 with `center_writing_weights`: on x - mean(x), as sae-lens' registry says (SAELens #279)"
    release, sae_id = 'gpt2-small-res-jb', 'blocks.7.hook_resid_pre'
    a = res_jb(world.folder/'hub', 'jbloom/GPT2-Small-SAEs-Reformatted', sae_id, seed=5, centred=False)
    target = Target.load(world.preset(sae=f'{release}:{sae_id}', layer=7))
    assert target.reader.sae.cfg.metadata.model_from_pretrained_kwargs == {'center_writing_weights': True}
    ids = torch.tensor([[target.tokenizer.bos_token_id, *target.tokenizer(SENTENCES[0])['input_ids']]])
    with torch.no_grad(): x = target.model(ids, output_hidden_states=True).hidden_states[7][0, 1:]
    wanted = ((x - x.mean(-1, keepdim=True) - a['b_dec']) @ a['W_enc'] + a['b_enc']).relu()
    features = [1, 2, 3, 4]
    np.testing.assert_allclose([r.values for r in target.activations([SENTENCES[0]]*4, features)], wanted[:, features].T, atol=1e-4)
