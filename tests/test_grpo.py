"Online RL on tiny real models: the feature reaches drawing, policy and reference, and a killed training goes on"
import math
import re
import signal
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from forks import is_alive, kill
from helpers import ARCHITECTURES, PLACEHOLDER, WRAPPED, save_wrapped, tiny_model, tiny_sae, tiny_tokenizer
from safetensors.torch import load_file
from trainings import features, make_model, preset_in, train_on
from trl.trainer.utils import use_adapter

from saeexplainer.cli import next_command
from saeexplainer.explainer import Explainer, ExplainerCard
from saeexplainer.files import read_json
from saeexplainer.grpo import (
    GRPOResult, TextReward, grpo_rows, grpo_trainer, own_log_probs, step0_check, step_features, train_grpo, trl_reward,
)
from saeexplainer.injection import Injector, explanation_prompt
from saeexplainer.lm.models import load_model, weights_sha256
from saeexplainer.lm.sampling import seed_for
from saeexplainer.plan import LENGTHS, evaluated, work, writer_work
from saeexplainer.presets import load_preset, memory_parts, presets
from saeexplainer.replies import Reply
from saeexplainer.results import Results
from saeexplainer.run import execute
from saeexplainer.saes import FeatureReader
from saeexplainer.target import Target
from saeexplainer.training import labels_only, quiet

TOKENIZER = tiny_tokenizer()
TOKEN = TOKENIZER.convert_tokens_to_ids(PLACEHOLDER)
PROMPT = explanation_prompt(TOKENIZER, 'Feature {placeholder} is given. What is it?', PLACEHOLDER)
VOCABULARY = 512


# ---- features among the token ids

def directions(indices):
    "Directions of features, each with the seed of its index"
    drawn = [torch.randn(64, generator=torch.Generator().manual_seed(100 + int(i))) for i in indices]
    return torch.stack(drawn)


def carriers(indices):
    "Prompts, each with a feature in the place of its placeholder"
    return torch.tensor([[VOCABULARY + i if token == TOKEN else token for token in PROMPT] for i in indices])


@torch.no_grad()
def logits(model, ids, **kw): return model(input_ids=ids, **kw).logits


def check_carried(model):
    injector = Injector(model, TOKEN)
    injector.carry(directions)
    given = logits(model, torch.tensor([PROMPT]*2), feature_vector=directions([3, 7]))
    assert injector.first_id == VOCABULARY
    assert torch.equal(logits(model, carriers([3, 7])), given)
    assert not torch.allclose(logits(model, carriers([7, 3])), given, atol=1e-3)


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_a_carried_feature_is_injected_like_a_vector(arch): check_carried(tiny_model(arch))


@pytest.mark.parametrize('arch', WRAPPED)
def test_a_feature_is_carried_to_layers_that_lie_elsewhere(arch, tmp_path):
    save_wrapped(tmp_path, arch)
    model, _ = load_model(str(tmp_path), dtype='float32', device='cpu')
    check_carried(model)


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_rows_padded_on_the_left_carry_features_too(arch):
    "Also where positions are learned, and nobody says which ones the tokens have"
    model = tiny_model(arch)
    injector = Injector(model, TOKEN)
    injector.carry(directions)
    ids = F.pad(carriers([3, 7]), (6, 0), value=TOKENIZER.pad_token_id)
    mask = F.pad(torch.ones_like(carriers([3, 7])), (6, 0))
    padded = logits(model, ids, attention_mask=mask)[:, 6:]
    assert torch.allclose(padded, logits(model, carriers([3, 7])), atol=1e-4)


@pytest.fixture
def carrying():
    "A tiny model that features ride to"
    model = tiny_model()
    injector = Injector(model, TOKEN)
    injector.carry(directions)
    return model


def test_a_row_without_a_feature_is_an_error(carrying):
    ids = carriers([3, 7])
    ids[1] = torch.tensor(PROMPT)
    with pytest.raises(ValueError, match=r'every row needs exactly one feature among its ids, rows have \[1, 0\]'):
        logits(carrying, ids)


def test_a_row_with_two_features_is_an_error(carrying):
    ids = carriers([3, 7])
    ids[0, -1] = VOCABULARY + 5
    with pytest.raises(ValueError, match=r'rows have \[2, 1\]'): logits(carrying, ids)


def test_embeddings_carry_no_feature(carrying):
    with pytest.raises(ValueError, match='features ride in the token ids'):
        carrying(inputs_embeds=torch.randn(2, 4, 64))


def test_given_vectors_still_count(carrying):
    given = logits(carrying, torch.tensor([PROMPT]), feature_vector=directions([3]))
    assert torch.equal(given, logits(carrying, carriers([3])))


def test_a_feature_that_nobody_reads_is_an_error():
    "Without `carry`, whether vectors are given or not"
    model = tiny_model()
    injector = Injector(model, TOKEN)
    says = 'token 515 is beyond the vocabulary of 512'
    with pytest.raises(ValueError, match=says): logits(model, carriers([3]))
    with pytest.raises(ValueError, match=says): logits(model, carriers([3]), feature_vector=directions([3]))
    with pytest.raises(ValueError, match=says), injector.using(directions([3])): logits(model, carriers([3]))


def test_a_placeholder_without_its_direction_is_an_error_in_training():
    model = tiny_model().train()
    Injector(model, TOKEN)
    with pytest.raises(ValueError, match='a placeholder without its direction in training'):
        logits(model, torch.tensor([PROMPT]))
    assert logits(model.eval(), torch.tensor([PROMPT])).isfinite().all()


# ---- the features of each step

def test_all_features_come_before_any_comes_again():
    steps = step_features(range(10), steps=7, of_a_step=3, seed=1)
    assert all(len(set(step)) == 3 for step in steps)
    for start in (0, 3): assert len({feature for step in steps[start:start + 3] for feature in step}) == 9


def test_the_features_depend_on_the_seed():
    assert step_features(range(10), 7, 3, seed=1) != step_features(range(10), 7, 3, seed=2)


# ---- a previous stage

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "Folder with a model, an SAE and an explainer whose answers end"
    folder = tmp_path_factory.mktemp('grpo')
    make_model(folder)
    train_on(preset_in(folder, sft_lr=1e-2, sft_epochs=60., sft_batch=6), features(), folder/'sft')
    return folder


def grpo_run(folder, **fields):
    "A preset, its SAE, and the folder of the previous stage"
    own = dict(grpo_steps=4, grpo_group=4, grpo_features=2, grpo_lr=5e-3, grpo_temperature=.6,
               explanation_tokens=16, n_pref=8)
    preset = preset_in(folder, **own | fields)
    return preset, FeatureReader.load(preset.sae), folder/'sft'


def vowels(indices, texts):
    "A reward that every text has"
    return [sum(text.count(vowel) for vowel in 'aeiou')/(len(text) + 1) for text in texts]


def brevity(indices, texts):
    "A reward that is easy to learn"
    return [1 - len(text)/40 for text in texts]


def trainer_of(run, tmp_path, reward=vowels, prompts=None, **fields):
    preset, reader, sft = grpo_run(run, **fields)
    explainer = Explainer.from_pretrained(sft, reader=reader, trainable=True, device='cpu')
    rows = grpo_rows(prompts or range(6), preset)
    return grpo_trainer(preset, rows, reader, explainer, tmp_path/'checkpoints', reward, False, prompts)


# ---- before the first step

def test_policy_and_reference_see_the_feature(run, tmp_path):
    found = step0_check(trainer_of(run, tmp_path))
    assert found.off < 1e-4
    assert found.injected > .1
    assert found.reference == 0


def test_without_a_divergence_there_is_no_reference(run, tmp_path):
    trainer = trainer_of(run, tmp_path, grpo_beta=0.)
    assert step0_check(trainer).reference is None
    assert list(trainer.model.peft_config) == ['default']


def test_other_directions_are_refused(run, tmp_path):
    trainer = trainer_of(run, tmp_path)
    drawer = trainer.rollout_func
    drawer.explainer.injector.carry(lambda indices: drawer.reader.directions([i + 1 for i in indices]))
    with pytest.raises(RuntimeError, match=r'log-probabilities of the trainer are off by .*: the feature does not'):
        step0_check(trainer)


def test_an_explainer_that_does_not_see_the_feature_is_refused(run, tmp_path):
    trainer = trainer_of(run, tmp_path)
    trainer.rollout_func.explainer.injector.coefficient = 0.
    with pytest.raises(RuntimeError, match='changes no log-probability'): step0_check(trainer)


def test_a_reference_that_is_not_the_previous_stage_is_refused(run, tmp_path):
    trainer = trainer_of(run, tmp_path)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if '.ref.' in name: p.mul_(2)
    with pytest.raises(RuntimeError, match='the reference is not the previous stage'): step0_check(trainer)


def test_a_training_that_does_not_carry_is_an_error(run, tmp_path):
    trainer = trainer_of(run, tmp_path)
    trainer.rollout_func.explainer.injector._directions = None
    with pytest.raises(ValueError, match='beyond the vocabulary'): trainer.train()


def log_probs_by_trl(trainer, feature, answer, adapter='default'):
    "As the trainer computes them, of one row"
    ids = torch.tensor([trainer.rollout_func.carrier(feature) + answer])
    with quiet(), labels_only(), torch.no_grad(), use_adapter(trainer.model, adapter):
        return trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, torch.ones_like(ids), logits_to_keep=len(answer))[0][0]


def test_the_reference_stays_the_previous_stage_while_the_policy_moves(run, tmp_path):
    trainer = trainer_of(run, tmp_path)
    drawer = trainer.rollout_func
    answer = drawer.draw([3], [1])[0]
    before = log_probs_by_trl(trainer, 3, answer)
    with quiet(), labels_only(): trainer.train()
    previous = Explainer.from_pretrained(run/'sft', reader=drawer.reader, trainable=True, device='cpu')
    previous.model.eval()
    own = own_log_probs(previous, previous.prompt, answer, drawer.reader.directions([3])[0], trainer.temperature)
    assert torch.allclose(log_probs_by_trl(trainer, 3, answer, 'ref'), own, atol=1e-4)
    assert torch.allclose(before, own, atol=1e-4)
    assert not torch.allclose(log_probs_by_trl(trainer, 3, answer), own, atol=1e-2)
    with previous.model.disable_adapter():
        base = own_log_probs(previous, previous.prompt, answer, drawer.reader.directions([3])[0], trainer.temperature)
    assert not torch.allclose(own, base, atol=1e-2)


# ---- drawing

def test_a_draw_depends_on_its_seed_alone(run, tmp_path):
    drawer = trainer_of(run, tmp_path).rollout_func
    wanted = drawer.draw([1, 2, 3, 3], [5, 6, 7, 8])
    drawer.batch_size = 1
    assert drawer.draw([1, 2, 3, 3], [5, 6, 7, 8]) == wanted
    assert drawer.draw([3], [7]) == wanted[2:3]


def test_a_draw_is_that_of_the_explainer(run, tmp_path):
    drawer = trainer_of(run, tmp_path, grpo_temperature=.8).rollout_func
    explainer = Explainer.from_pretrained(run/'sft', reader=drawer.reader, device='cpu')
    wanted = explainer.sample(drawer.reader.directions([1, 4]), 1, temperature=.8, top_p=1., seeds=[[5], [6]],
                              max_new_tokens=16)
    drawn = drawer.draw([1, 4], [5, 6])
    texts = explainer.tokenizer.batch_decode(drawn, skip_special_tokens=True)
    assert [[text.strip()] for text in texts] == wanted


def test_the_placeholder_is_never_drawn(run, tmp_path):
    drawer = trainer_of(run, tmp_path, grpo_temperature=1.9).rollout_func
    head = drawer.explainer.model.get_output_embeddings()
    with torch.no_grad(): head.weight[TOKEN] = 0 # a logit of 0, which is more than most have
    drawn = drawer.draw([1]*40, list(range(40)))
    assert len({token for ids in drawn for token in ids}) > 50
    assert TOKEN not in {token for ids in drawn for token in ids}


def test_every_explanation_of_a_step_has_its_own_seed(run, tmp_path):
    trainer = trainer_of(run, tmp_path)
    drawer = trainer.rollout_func
    found = drawer(['3', '3', '5', '5'], trainer)
    seeds = [seed_for(0, 'grpo', 0, feature, number) for feature, number in [(3, 0), (3, 1), (5, 0), (5, 1)]]
    assert found['completion_ids'] == drawer.draw([3, 3, 5, 5], seeds)
    trainer.state.global_step = 1
    assert drawer(['3', '3', '5', '5'], trainer)['completion_ids'] != found['completion_ids']


# ---- prompts that differ from feature to feature

def hinted(folder, arch, n=6):
    "Prompts of different lengths: words stand before the explainer's own"
    words = TOKENIZER.encode(' the rain and the sea and the land', add_special_tokens=False)
    return {feature: words[:feature] + PROMPT for feature in range(n)}


@pytest.mark.parametrize('arch', ['llama', 'gpt2'])
def test_prompts_of_different_lengths(tmp_path, arch):
    make_model(tmp_path, arch)
    train_on(preset_in(tmp_path, sft_epochs=2., sft_batch=4), features(), tmp_path/'sft')
    trainer = trainer_of(tmp_path, tmp_path, prompts=hinted(tmp_path, arch))
    found = step0_check(trainer, rows=6)
    assert found.off < 1e-4
    assert found.injected > 1e-3
    assert found.reference == 0


def test_a_prompt_without_a_place_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match='the prompt of feature 3 has 0 placeholders, not one'):
        trainer_of(run, tmp_path, prompts=hinted(run, 'llama') | {3: PROMPT[:2]})


# ---- rewards

def scored_step(trainer, indices):
    "What the trainer makes of a step's rows"
    rows = [dict(prompt=str(feature), feature=feature) for feature in indices for _ in range(trainer.num_generations)]
    trainer.model.train()
    with quiet(), labels_only(): return trainer._generate_and_score_completions(rows)


def test_unscorable_explanations_are_left_out_of_their_group(run, tmp_path):
    def every_second(indices, texts): return [None if i % 2 else float(i) for i in range(len(texts))]
    trainer = trainer_of(run, tmp_path, every_second)
    advantages = scored_step(trainer, [1, 2])['advantages']
    assert advantages.tolist() == [-1, 0, 1, 0, -1, 0, 1, 0]


def test_a_truncated_explanation_is_neither_scored_nor_learned_from(run, tmp_path):
    seen = []
    def constant(indices, texts):
        seen.extend(texts)
        return [1.]*len(texts)
    trainer = trainer_of(run, tmp_path, constant, explanation_tokens=2)
    step = scored_step(trainer, [1, 2])
    assert seen == []
    assert step['completion_mask'].sum() == 0


def test_copies_and_cut_ones_are_logged(run, tmp_path):
    logged = {}
    call = trl_reward(vowels, group=2, ends={0})
    found = call(None, ['aa', 'aa', 'bb', 'a'], [[1, 0], [1, 0], [2, 0], [3]], [7, 7, 9, 9],
                 log_metric=logged.__setitem__)
    assert found == [2/3, 2/3, 0, None]
    assert logged == dict(spread=0., distinct=.75, scored=.75)


@pytest.mark.parametrize('returned, says', [
    ([1.], 'the reward has returned 1 numbers for 2 texts'),
    ([1., math.inf], 'the reward has returned inf'),
])
def test_a_reward_that_is_no_reward(returned, says):
    call = trl_reward(lambda indices, texts: returned, group=2, ends={0})
    with pytest.raises(ValueError, match=says): call(None, ['a', 'b'], [[0], [0]], [7, 7], log_metric=print)


def test_a_template_without_an_end_is_refused(run, tmp_path):
    preset, reader, sft = grpo_run(run)
    explainer = Explainer.from_pretrained(sft, reader=reader, trainable=True, device='cpu')
    explainer.model.generation_config.eos_token_id = []
    explainer.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match='neither the model nor its chat_template has a token that ends an answer'):
        grpo_trainer(preset, grpo_rows(range(6), preset), reader, explainer, tmp_path/'c', vowels)


# ---- a training

def test_the_reward_rises_and_the_divergence_begins_at_0(run, tmp_path):
    preset, reader, sft = grpo_run(run, grpo_steps=16, grpo_group=8)
    result = train_grpo(preset, range(6), reader, sft, tmp_path/'out', brevity, progress=False)
    assert result.log.step.tolist() == list(range(1, 17))
    assert sum(result.rewards[-4:])/4 > sum(result.rewards[:4])/4 + .05
    assert result.log.kl[0] < 1e-6
    assert result.log.kl.iloc[-1] > 1e-3
    assert result.log[['length', 'distinct', 'truncated', 'scored']].notna().all(axis=None)
    assert (result.features, result.step0.reference) == (6, 0)
    assert ExplainerCard.load(tmp_path/'out').stage == 'grpo'
    assert not (tmp_path/'out'/'checkpoints').exists()
    explainer = Explainer.from_pretrained(tmp_path/'out', reader=reader, device='cpu')
    assert len(explainer.explain(reader.directions([0, 1]), max_new_tokens=4)) == 2


@pytest.mark.parametrize('fields', [dict(grpo_loss='dapo'), dict(grpo_beta=0.)], ids=['dapo', 'no divergence'])
def test_other_losses(run, tmp_path, fields):
    preset, reader, sft = grpo_run(run, grpo_steps=2, **fields)
    result = train_grpo(preset, range(6), reader, sft, tmp_path/'out', vowels, progress=False)
    assert len(result.rewards) == 2
    assert result.log.kl.notna().all() == ('grpo_beta' not in fields)


def test_a_finished_training_is_not_done_again(run, tmp_path):
    preset, reader, sft = grpo_run(run, grpo_steps=1)
    result = train_grpo(preset, range(6), reader, sft, tmp_path/'out', vowels, progress=False)
    def never(indices, texts): raise AssertionError('asked again')
    again = train_grpo(preset, range(6), reader, sft, tmp_path/'out', never, progress=False)
    copied = train_grpo(preset, range(6), reader, sft, tmp_path/'copy', never, False, tmp_path/'out')
    assert again.rewards == copied.rewards == result.rewards
    assert GRPOResult.load(tmp_path/'out').step0 == result.step0
    with pytest.raises(ValueError, match='holds a finished training'):
        train_grpo(preset, range(6, 12), reader, sft, tmp_path/'out', vowels)


def test_another_sae_is_refused(run, tmp_path):
    preset, reader, sft = grpo_run(run)
    other = FeatureReader.load(tiny_sae(tmp_path/'sae', seed=5))
    with pytest.raises(ValueError, match='another SAE'):
        train_grpo(preset, range(6), other, sft, tmp_path/'out', vowels)


def test_too_few_features_are_refused(run, tmp_path):
    preset, reader, sft = grpo_run(run)
    with pytest.raises(ValueError, match='grpo_features is 2, but there are 1 features'):
        train_grpo(preset, [3], reader, sft, tmp_path/'out', vowels)


# ---- killed

TRAINING = '''
from pathlib import Path
from saeexplainer.grpo import train_grpo
from test_grpo import grpo_run, noted
preset, reader, sft = grpo_run(Path({run!r}), **{fields!r})
train_grpo(preset, range(6), reader, sft, Path({out!r}), noted({seen!r}), progress=False)
'''
LONG = dict(grpo_steps=12)


def noted(file):
    "The reward that every text has, which writes down what it was asked about"
    def reward(indices, texts):
        with open(file, 'a', encoding='utf-8') as seen: print([*zip(indices, texts)], file=seen)
        return vowels(indices, texts)
    return reward


def test_kill_9_in_the_middle_changes_nothing(run, forks, tmp_path):
    preset, reader, sft = grpo_run(run, **LONG)
    out = tmp_path/'killed'
    files = {name: tmp_path/f'{name}.txt' for name in ('killed', 'resumed', 'whole')}
    code = TRAINING.format(run=str(run), out=str(out), seen=str(files['killed']), fields=LONG)
    deadline = time.time() + 120
    pid = forks.start(code)
    while not list(out.glob('checkpoints/*-3/files.json')) and is_alive(pid) and time.time() < deadline:
        time.sleep(.01)
    kill(pid)
    assert forks.exit_code() == -signal.SIGKILL, forks.errors()
    assert not (out/'explainer.json').exists()
    resumed = train_grpo(preset, range(6), reader, sft, out, noted(files['resumed']), progress=False)
    whole = train_grpo(preset, range(6), reader, sft, tmp_path/'whole', noted(files['whole']), progress=False)

    seen = {name: file.read_text(encoding='utf-8').splitlines() for name, file in files.items()}
    assert len(seen['whole']) == 12
    assert 3 <= len(seen['killed']) < 12
    assert len(seen['resumed']) <= 12 - 3
    assert seen['killed'] == seen['whole'][:len(seen['killed'])]
    assert seen['resumed'] == seen['whole'][-len(seen['resumed']):] # the same features, the same explanations
    assert resumed.log.step.tolist() == whole.log.step.tolist() == list(range(1, 13))
    assert resumed.rewards == pytest.approx(whole.rewards, abs=1e-6)
    found = load_file(out/'adapter_model.safetensors')
    wanted = load_file(tmp_path/'whole'/'adapter_model.safetensors')
    for name in found: torch.testing.assert_close(found[name], wanted[name], atol=1e-3, rtol=1e-2)


# ---- in a run

@pytest.fixture(scope='module')
def online_run(tiny_lab, finished_run, tmp_path_factory):
    "Folder of a run with online RL behind its last round, and its lines"
    folder = tmp_path_factory.mktemp('online')/'run'
    fields = dict(grpo_steps=2, grpo_group=4, grpo_features=2, grpo_temperature=.5)
    lines = []
    with tiny_lab.in_use(), tiny_lab.run(folder, like=finished_run, **fields) as run:
        execute(run, say=lines.append)
    return folder, lines, fields


def test_online_rl_is_a_stage_behind_the_last_round(online_run):
    folder, lines, _ = online_run
    [line] = [line for line in lines if line.startswith('grpo')]
    assert re.search(r'grpo: 4 features, (reward [\d.]+ -> [\d.]+|no explanation had a reward)', line)
    assert ExplainerCard.load(folder/'explainer'/'grpo').stage == 'grpo'
    training = read_json(folder/'explainer'/'grpo'/'training.json')
    assert training['settings']['previous'] == weights_sha256(folder/'explainer'/'dpo2')
    assert training['settings']['reward']['n_texts'] == 2


def test_online_rl_is_evaluated_and_reported(online_run):
    folder, _, _ = online_run
    results = Results(folder/'report')
    assert results.stages == ['label', 'autointerp', 'untrained', 'sft', 'dpo1', 'dpo2', 'grpo', 'best']
    assert results['grpo_log'].step.tolist() == [1, 2]
    assert 'grpo - dpo2' in (folder/'report'/'index.html').read_text(encoding='utf-8')


def test_the_settings_of_online_rl_are_kept(tiny_lab, online_run):
    folder, _, fields = online_run
    with tiny_lab.in_use():
        with pytest.raises(ValueError, match='grpo_lr: .*choose another --name'):
            tiny_lab.run(folder, **fields, grpo_lr=1e-3).close()


def test_the_next_command_uses_what_online_rl_has_trained(tiny_lab, online_run):
    folder, _, fields = online_run
    assert str(folder/'explainer'/'grpo') in next_command(tiny_lab.preset(**fields), folder)


class EchoWriter:
    "A writer whose texts are the explanations that it is asked about, or nothing for one that says so"
    def write(self, requests, **how):
        said = [request.prompt.removeprefix('Write one sentence that contains ') for request in requests]
        return [Reply(error='refused') if 'nothing' in text else Reply(text=text) for text in said]


def test_the_reward_by_texts_is_a_share_of_the_strongest_activation(tiny_lab):
    texts = ['the cat sat on the mat', 'rain', '', 'nothing']
    with tiny_lab.in_use():
        preset = tiny_lab.preset(text_form='one')
        target = Target.load(preset, FeatureReader.load(preset.sae))
    largest = target.scores([f'{text}.' for text in texts[:2]], [3, 3])
    assert max(largest) > 0
    reward = TextReward(EchoWriter(), target, {3: 2*max(largest)}, preset)
    assert reward([3]*4, texts) == [*(pytest.approx(score/max(largest)/2) for score in largest), 0, None]
    strong = TextReward(EchoWriter(), target, {3: max(largest)/2}, preset)
    assert max(strong([3]*2, texts[:2])) == 1


# ---- presets and plans

@pytest.mark.parametrize('fields, says', [
    (dict(grpo_loss='grpo'), "grpo_loss must be 'dr_grpo' or 'dapo', not 'grpo'"),
    (dict(grpo_reward='luck'), "grpo_reward must be 'texts' or 'self' or 'words', not 'luck'"),
    (dict(grpo_group=1), 'grpo_group must be 2 or more'),
    (dict(grpo_steps=1, n_pref=4), r'grpo_features \(8\) cannot be more than n_pref \(4\)'),
    (dict(grpo_steps=-1), 'preset field grpo_steps must be 0 or more'),
    (dict(grpo_temperature=0.), 'preset field grpo_temperature must be'),
])
def test_a_preset_that_cannot_be(fields, says):
    with pytest.raises(ValueError, match=says): load_preset('smollm2-135m', **fields)


def test_no_preset_asks_for_online_rl():
    assert all(load_preset(name).grpo_steps == 0 for name in presets())


def test_a_stage_is_no_name_of_a_label_model():
    with pytest.raises(ValueError, match='a stage of the run is called like one of'):
        load_preset('smollm2-135m', baseline_labels=('grpo',))


def test_a_plan_reckons_with_what_is_drawn():
    without = load_preset('smollm2-135m')
    preset = load_preset('smollm2-135m', grpo_steps=10, grpo_group=4, grpo_features=3)
    of_stage = work(preset).groupby(['stage', 'kind'])['tokens'].sum()['grpo']
    small = LENGTHS['small']
    assert of_stage['train'] == 120*(small['prompt'] + small['explanation'])
    assert of_stage['read'] == pytest.approx(120*small['distinct']*without.n_texts*small['text'])
    assert 'grpo' not in set(work(without)['stage'])
    assert evaluated(preset) == evaluated(without) + 1


def test_a_plan_counts_the_requests_of_the_reward():
    fields = dict(writer='gpt-5.4-mini', text_form='list')
    without = writer_work(load_preset('smollm2-135m', **fields)).requests['texts for preferences']
    online = load_preset('smollm2-135m', **fields, grpo_steps=10, grpo_group=4, grpo_features=3)
    more = writer_work(online).requests['texts for preferences'] - without
    assert more == pytest.approx(120*LENGTHS['small']['distinct'])


def test_online_rl_needs_both_models_at_once():
    preset = load_preset('gemma-2-27b-l22')
    assert preset.swap_models
    at_once = memory_parts(replace(preset, grpo_steps=10))
    assert at_once['models'] > memory_parts(preset)['models']
