"DPO on tiny real models: the reference sees the feature, the loss starts at ln 2, a killed round goes on where it was"
import dataclasses
import math
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from forks import is_alive, kill
from helpers import PLACEHOLDER, tiny_sae
from safetensors.torch import load_file
from trainings import CONTRARY, PAIRS, tiny_run

from saeexplainer.dpo import (
    PATIENCE, DPOResult, _settings, divide_pairs, dpo_trainer, preference_dataset, step0_loss, train_dpo,
    validation_features,
)
from saeexplainer.explainer import Explainer, ExplainerCard
from saeexplainer.injection import explanation_prompt
from saeexplainer.saes import FeatureReader
from saeexplainer.training import claim

LN2 = math.log(2)


@pytest.fixture(scope='module')
def run(tmp_path_factory): return tmp_path_factory.mktemp('dpo')


def trainer_of(run, tmp_path, **fields):
    preset, reader, sft = tiny_run(run, **fields)
    explainer = Explainer.from_pretrained(sft, reader=reader, trainable=True, device='cpu')
    rows = preference_dataset(PAIRS, explainer.card)
    return explainer, dpo_trainer(preset, rows, reader, explainer, tmp_path/'checkpoints')


@pytest.mark.parametrize('normalised', (False, True))
@pytest.mark.parametrize('sft_weight', (0., .2))
def test_the_loss_starts_at_ln_2_exactly(run, tmp_path, normalised, sft_weight):
    loss = 'sigmoid_norm' if normalised else 'sigmoid'
    _, trainer = trainer_of(run, tmp_path, dpo_loss=loss, dpo_sft_weight=sft_weight)
    assert step0_loss(trainer, rows=8) == torch.tensor(LN2).item()
    assert trainer.loss_weights == ([1., sft_weight] if sft_weight else [1.]) # and the trainer is as it was
    assert not trainer._metrics['train']


def completion_logps(model, batch, **kw):
    inputs = dict(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'])
    with torch.no_grad(): logits = model(**inputs, **kw).logits
    logp = logits[:, :-1].float().log_softmax(-1).gather(-1, batch['input_ids'][:, 1:, None])[..., 0]
    return (logp * batch['completion_mask'][:, 1:]).sum(1)


def test_the_reference_is_the_previous_stage_with_its_injection(run, tmp_path):
    explainer, trainer = trainer_of(run, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    directions = batch['feature_vector']
    with torch.autocast('cpu', enabled=False):
        reference = torch.cat(trainer.compute_ref_log_probs(trainer.model, dict(batch)))
    _, reader, sft = tiny_run(run)
    previous = Explainer.from_pretrained(sft, reader=reader, trainable=True, device='cpu').model.eval()
    with torch.autocast('cpu', torch.bfloat16):
        same = completion_logps(previous, batch, feature_vector=directions)
        no_injection = completion_logps(previous, batch)
        with previous.disable_adapter(): no_adapter = completion_logps(previous, batch, feature_vector=directions)
        other_feature = completion_logps(previous, batch, feature_vector=directions.roll(1, 0))
    off = (reference - same).abs().max()
    assert off < .1
    for other in (no_injection, no_adapter, other_feature): assert (reference - other).abs().max() > 5*off
    assert torch.equal(directions, reader.directions(range(4)).repeat(2, 1))


def test_a_reference_that_is_not_the_previous_stage_is_refused(run, tmp_path):
    _, trainer = trainer_of(run, tmp_path)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if '.ref.' in name: p.mul_(2)
    with pytest.raises(RuntimeError, match='not ln 2: the reference is not the previous stage'): step0_loss(trainer)


def test_rows_are_the_prompt_of_eq_5(run, tmp_path):
    explainer, trainer = trainer_of(run, tmp_path)
    row = trainer.train_dataset[3]
    prompt = explanation_prompt(explainer.tokenizer, explainer.card.template, PLACEHOLDER)
    assert row['prompt_ids'] == prompt
    assert row['feature'] == 3
    assert len(trainer.train_dataset) == 8
    assert explainer.tokenizer.decode(row['chosen_ids'], skip_special_tokens=True).strip() == 'words such as rain 3'
    assert explainer.tokenizer.convert_tokens_to_ids('<|im_end|>') in row['chosen_ids'] # it learns to stop


def test_no_pairs_is_an_error_that_says_so(run):
    preset, reader, sft = tiny_run(run)
    card = Explainer.from_pretrained(sft, device='cpu').card
    with pytest.raises(ValueError, match='no pairs to train on: every feature of this round was dropped'):
        preference_dataset(PAIRS[PAIRS.dropped.notna()], card)


def test_length_normalisation_keeps_eq_11_for_an_average_pair(run, tmp_path):
    preset, *_ = tiny_run(run)
    _, trainer = trainer_of(run, tmp_path, dpo_loss='sigmoid_norm')
    lengths = [len(row[c]) for row in trainer.train_dataset for c in ('chosen_ids', 'rejected_ids')]
    assert trainer.beta == pytest.approx(preset.dpo_beta[0] * sum(lengths)/len(lengths))
    assert trainer.loss_types == ['sigmoid_norm']


def test_two_rounds_learn_and_the_reference_stays(run, tmp_path):
    preset, reader, sft = tiny_run(run, dpo_epochs=4.)
    first = train_dpo(preset, PAIRS, reader, sft, tmp_path/'dpo1')
    assert first.step0_loss == torch.tensor(LN2).item()
    assert (first.round, first.pairs, len(first.log)) == (1, 8, 8)
    assert first.losses[0] == pytest.approx(LN2, abs=1e-4)
    assert first.losses[-1] < .6
    assert first.log.margin.iloc[-1] > .1
    assert first.log.accuracy.iloc[-1] == 1
    assert not (tmp_path/'dpo1'/'checkpoints').exists()
    explainer = Explainer.from_pretrained(tmp_path/'dpo1', reader=reader, device='cpu')
    assert explainer.card.stage == 'dpo1'
    assert len(explainer.explain(reader.directions([0, 1]), max_new_tokens=4)) == 2
    second = train_dpo(preset, PAIRS, reader, tmp_path/'dpo1', tmp_path/'dpo2', round=2)
    assert second.step0_loss == torch.tensor(LN2).item() # its reference is dpo1, not sft
    assert second.round == 2
    assert Explainer.from_pretrained(tmp_path/'dpo2', device='cpu').card.stage == 'dpo2'


def test_steps_left_over_from_the_last_log(run, tmp_path):
    """Beyond a hundred steps not every one is logged

    trl adds the margins of what is left over to the summary, which has no loss.
    """
    preset, reader, sft = tiny_run(run, dpo_epochs=101/8, dpo_batch=1)
    log = train_dpo(preset, PAIRS, reader, sft, tmp_path/'out').log
    assert log.step.tolist() == list(range(2, 101, 2))
    assert log.notna().all(axis=None)


def test_a_finished_round_is_not_trained_again(run, tmp_path):
    preset, reader, sft = tiny_run(run, dpo_epochs=1.)
    result = train_dpo(preset, PAIRS, reader, sft, tmp_path/'out')
    adapter = tmp_path/'out'/'adapter_model.safetensors'
    stamp = adapter.stat().st_mtime_ns
    again = train_dpo(preset, PAIRS, reader, sft, tmp_path/'out')
    assert again.losses == result.losses
    assert again.seconds == result.seconds
    assert adapter.stat().st_mtime_ns == stamp


def test_checkpoints_of_other_pairs_are_refused(run, tmp_path):
    preset, reader, sft = tiny_run(run)
    card = Explainer.from_pretrained(sft, device='cpu').card
    others = preference_dataset(PAIRS[:4], card)
    claim(tmp_path/'out'/'checkpoints', _settings(preset, card, others, sft, 1))
    with pytest.raises(ValueError, match='holds another training'):
        train_dpo(preset, PAIRS, reader, sft, tmp_path/'out')


def test_another_sae_is_refused(run, tmp_path):
    preset, reader, sft = tiny_run(run)
    other = FeatureReader.load(tiny_sae(tmp_path/'sae', seed=5))
    with pytest.raises(ValueError, match='another SAE'): train_dpo(preset, PAIRS, other, sft, tmp_path/'out')


ROUND = '''
from saeexplainer.dpo import train_dpo
from trainings import CONTRARY, PAIRS, tiny_run
preset, reader, sft = tiny_run({run!r}, **{fields!r})
train_dpo(preset, {pairs}, reader, sft, {out!r})
'''

def killed_after_a_checkpoint(forks, run, out, pairs='PAIRS', **fields):
    "Exit code of a round that was killed when its first checkpoint was complete"
    deadline = time.time() + 120
    pid = forks.start(ROUND.format(run=str(run), out=str(out), pairs=pairs, fields=fields))
    def is_waited_for(): return is_alive(pid) and time.time() < deadline
    while not list(out.glob('checkpoints/*/files.json')) and is_waited_for(): time.sleep(.01)
    kill(pid)
    return forks.exit_code()


def test_kill_9_in_the_middle_changes_nothing(run, forks, tmp_path):
    preset, reader, sft = tiny_run(run, dpo_epochs=6.)
    code = killed_after_a_checkpoint(forks, run, tmp_path/'killed', dpo_epochs=6.)
    assert code == -signal.SIGKILL, forks.errors()
    assert not (tmp_path/'killed'/'explainer.json').exists()
    resumed = train_dpo(preset, PAIRS, reader, sft, tmp_path/'killed')
    whole = train_dpo(preset, PAIRS, reader, sft, tmp_path/'whole')
    assert resumed.log.step.tolist() == whole.log.step.tolist() == list(range(1, 13)) # no step lost, none twice
    assert resumed.losses == pytest.approx(whole.losses, abs=1e-4)
    assert resumed.step0_loss == whole.step0_loss
    found = load_file(tmp_path/'killed'/'adapter_model.safetensors')
    wanted = load_file(tmp_path/'whole'/'adapter_model.safetensors')
    for name in found: torch.testing.assert_close(found[name], wanted[name], atol=1e-3, rtol=1e-2)


def test_killed_between_training_and_saving(run, tmp_path):
    "All steps are done and checkpointed, the explainer is not saved yet: the rest is done, no step more"
    preset, reader, sft = tiny_run(run, dpo_epochs=2.5)
    explainer = Explainer.from_pretrained(sft, reader=reader, trainable=True, device='cpu')
    rows = preference_dataset(PAIRS, explainer.card)
    trainer = dpo_trainer(preset, rows, reader, explainer, tmp_path/'out'/'checkpoints')
    claim(tmp_path/'out'/'checkpoints', _settings(preset, explainer.card, rows, sft, 1))
    trainer.train()
    steps = trainer.state.global_step
    result = train_dpo(preset, PAIRS, reader, sft, tmp_path/'out')
    assert len(result.log) == steps == 5
    trained = {n: p for n, p in explainer.model.named_parameters() if '.default.' in n}
    saved = Explainer.from_pretrained(tmp_path/'out', trainable=True, device='cpu').model
    for n, p in saved.named_parameters():
        if n not in trained: continue
        torch.testing.assert_close(p.float(), trained[n].detach().bfloat16().float())


# ---- the best checkpoint by validation pairs

BEST = dict(dpo_keep='best', dpo_epochs=20.)


def preset_of(run, **fields): return tiny_run(run, **fields)[0]


def test_validation_features_are_the_same_in_every_round():
    first = validation_features(range(1000), seed=3)
    second = validation_features(reversed(range(1000)), seed=3)
    assert first == second
    assert len(first) == 100


def test_validation_features_depend_on_the_seed():
    assert validation_features(range(100), seed=3) != validation_features(range(100), seed=4)


@pytest.mark.parametrize('features, held_out', [(100, 10), (30, 8), (9, 4), (1, 0)])
def test_a_tenth_is_held_out_and_never_more_than_half(features, held_out):
    assert len(validation_features(range(features), seed=0)) == held_out


def test_no_pair_is_both_trained_on_and_validated(run):
    division = divide_pairs(PAIRS, preset_of(run, **BEST))
    trained = division.training.dropna(subset='chosen').feature
    assert not set(trained) & set(division.validation.feature)
    assert len(trained) + len(division.validation) == 8


def test_all_pairs_are_trained_on_where_the_last_checkpoint_is_kept(run):
    division = divide_pairs(PAIRS, preset_of(run))
    assert len(division.training) == len(PAIRS)
    assert not len(division.validation)


def test_no_validation_pair_is_an_error_that_says_so(run):
    preset = preset_of(run, **BEST)
    held_out = PAIRS.feature.isin(validation_features(PAIRS.feature, preset.seed))
    dropped = PAIRS.assign(dropped=PAIRS.dropped.mask(held_out, 'low_spread'))
    with pytest.raises(ValueError, match='none of the 4 features that are held out has a pair'):
        divide_pairs(dropped, preset)


def test_what_was_trained_before_is_what_it_was(run):
    "Settings of a round that keeps its last checkpoint hold nothing of validation, so it is not trained again"
    preset, _, sft = tiny_run(run)
    card = ExplainerCard.load(sft)
    settings = _settings(preset, card, preference_dataset(PAIRS, card), sft, 1)
    assert not {'dpo_keep', 'validation'} & set(settings)


@pytest.fixture(scope='module')
def contrary(run):
    "A round whose validation pairs are against its training, and its folder"
    preset, reader, sft = tiny_run(run, **BEST)
    return train_dpo(preset, CONTRARY, reader, sft, run/'contrary', progress=False)


def test_the_best_checkpoint_is_kept_and_the_training_ends_early(contrary):
    evaluations = contrary.log.dropna(subset='eval_accuracy')
    order = evaluations.sort_values(['eval_accuracy', 'eval_margin'])
    assert contrary.kept_step == order.step.iloc[-1]
    assert (evaluations.step > contrary.kept_step).sum() == PATIENCE
    assert contrary.log.step.max() < 20


def test_the_numbers_of_pairs_are_said(contrary):
    assert contrary.validation == len(divide_pairs(CONTRARY, SimpleNamespace(dpo_keep='best', seed=0)).validation)
    assert contrary.pairs + contrary.validation == 8
    assert DPOResult.load(contrary.folder).kept_step == contrary.kept_step


def test_the_saved_adapter_is_that_of_the_kept_step(run, contrary, tmp_path):
    preset, reader, sft = tiny_run(run, **BEST)
    explainer = Explainer.from_pretrained(sft, reader=reader, trainable=True, device='cpu')
    division = divide_pairs(CONTRARY, preset)
    rows = [preference_dataset(pairs, explainer.card) for pairs in (division.training, division.validation)]
    trainer = dpo_trainer(preset, rows[0], reader, explainer, tmp_path/'checkpoints', validation=rows[1])
    trainer.model.load_adapter(contrary.folder, 'default')
    found = trainer.evaluate()['eval_rewards/margins']
    kept = contrary.log.dropna(subset='eval_margin').set_index('step').eval_margin
    assert found == pytest.approx(kept[contrary.kept_step], rel=.05)
    assert found != pytest.approx(kept.iloc[-1], rel=.05)


def test_kill_9_keeps_the_same_checkpoint(run, contrary, forks, tmp_path):
    preset, reader, sft = tiny_run(run, **BEST)
    code = killed_after_a_checkpoint(forks, run, tmp_path/'killed', 'CONTRARY', **BEST)
    assert code == -signal.SIGKILL, forks.errors()
    assert not (tmp_path/'killed'/'explainer.json').exists()
    resumed = train_dpo(preset, CONTRARY, reader, sft, tmp_path/'killed', progress=False)
    assert resumed.kept_step == contrary.kept_step
    assert resumed.log.step.tolist() == contrary.log.step.tolist()
    found = load_file(resumed.folder/'adapter_model.safetensors')
    wanted = load_file(contrary.folder/'adapter_model.safetensors')
    for name in found: torch.testing.assert_close(found[name], wanted[name], atol=1e-3, rtol=1e-2)


def test_killed_after_it_ended_early(run, contrary, tmp_path):
    "The training has ended, its explainer is not saved yet: no step is taken any more"
    preset, reader, sft = tiny_run(run, **BEST)
    explainer = Explainer.from_pretrained(sft, reader=reader, trainable=True, device='cpu')
    division = divide_pairs(CONTRARY, preset)
    rows, others = (preference_dataset(pairs, explainer.card) for pairs in (division.training, division.validation))
    checkpoints = tmp_path/'out'/'checkpoints'
    trainer = dpo_trainer(preset, rows, reader, explainer, checkpoints, progress=False, validation=others)
    claim(checkpoints, _settings(preset, explainer.card, rows, sft, 1, others))
    trainer.train()
    result = train_dpo(preset, CONTRARY, reader, sft, tmp_path/'out', progress=False)
    assert result.log.step.tolist() == contrary.log.step.tolist()
    assert result.kept_step == contrary.kept_step


def with_template(sft, to, template):
    "The previous stage again, with a chat template of its own"
    shutil.copytree(sft, to)
    dataclasses.replace(ExplainerCard.load(sft), chat_template=template).save(to)
    return to


def test_what_a_template_puts_before_an_answer_is_prompt(run, tmp_path):
    preset, reader, sft = tiny_run(run)
    template = (Path(trl.__file__).parent/'chat_templates'/'qwen3.jinja').read_text(encoding='utf-8')
    folder = with_template(sft, tmp_path/'qwen', template)
    explainer = Explainer.from_pretrained(folder, reader=reader, trainable=True, device='cpu')
    pairs = PAIRS.assign(chosen='the token <|im_end|> at the end')
    trainer = dpo_trainer(preset, preference_dataset(pairs, explainer.card), reader, explainer, tmp_path/'c')
    decode = explainer.tokenizer.decode
    end = explainer.tokenizer.convert_tokens_to_ids('<|im_end|>')
    for row in trainer.train_dataset:
        assert row['prompt_ids'] == explainer.prompt
        assert decode(row['prompt_ids']).endswith('<think>\n\n</think>\n\n')
        assert decode(row['chosen_ids']) == 'the token <|im_end|> at the end<|im_end|>\n'
        assert row['chosen_ids'].count(end) == 1
        assert decode(row['rejected_ids']) == 'a sea<|im_end|>\n'
    assert step0_loss(trainer) == torch.tensor(LN2).item()


def test_a_round_that_turns_nan(run, tmp_path):
    preset, reader, sft = tiny_run(run, dpo_lr=(1e300, 1e300))
    with pytest.raises(ValueError, match=r'the loss is nan after step \d+, with dpo_lr 1e\+300: take a lower one'):
        train_dpo(preset, PAIRS, reader, sft, tmp_path/'out', progress=False)
    assert not (tmp_path/'out'/'explainer.json').exists()
    assert not (tmp_path/'out'/'adapter_model.safetensors').exists()


@pytest.mark.parametrize('share, says', [(.5, 'is cut off or damaged'), (0, 'is empty')])
def test_a_previous_stage_that_is_damaged(run, tmp_path, share, says):
    preset, reader, sft = tiny_run(run)
    shutil.copytree(sft, tmp_path/'damaged')
    weights = tmp_path/'damaged'/'adapter_model.safetensors'
    data = weights.read_bytes()
    weights.write_bytes(data[:int(share*len(data))])
    with pytest.raises(ValueError, match=f'adapter_model.safetensors {says}'):
        train_dpo(preset, PAIRS, reader, tmp_path/'damaged', tmp_path/'out', progress=False)
