"SFT on tiny real models: the loss sees the label and the feature, and a killed training ends as if it had not been"
import json
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from helpers import ARCHITECTURES, tiny_sae
from safetensors.torch import load_file
from trainings import WORDS, features, tiny_preset, train, train_on

from saeexplainer.explainer import CARD, Explainer, ExplainerCard
from saeexplainer.injection import explanation_prompt
from saeexplainer.saes import FeatureReader
from saeexplainer.sft import SFTResult, check_disjoint, sft_dataset, sft_trainer, train_sft
from saeexplainer.training import TrainingBar, claim, labels_only, last_checkpoint, one_device, quiet

LONG = dict(sft_epochs=60., sft_batch=12, lora_r=16, lora_alpha=32, lora_dropout=0.) # it learns its labels by heart


def trainer_of(preset, folder, trained, evaluated=None):
    "The trainer of labelled features, and its card"
    reader = FeatureReader.load(preset.sae)
    explainer = Explainer.from_preset(preset, reader)
    eval_rows = sft_dataset(evaluated, explainer.card) if evaluated else None
    rows = sft_dataset(trained, explainer.card)
    return sft_trainer(preset, rows, reader, explainer, folder, eval_rows, progress=False), explainer.card


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sft')
    tiny_preset(folder)
    return folder


def adapter(folder): return load_file(Path(folder)/'adapter_model.safetensors')

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def names(folder): return sorted(file.name for file in folder.iterdir())


# ---- what the loss sees

@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_loss_sees_the_label_alone_and_the_feature(tmp_path, arch):
    trainer, card = trainer_of(tiny_preset(tmp_path, arch), tmp_path/'c', features()[:4])
    trainer.args.bf16 = False
    tokenizer = trainer.processing_class
    batch = next(iter(trainer.get_train_dataloader()))
    prompt = explanation_prompt(tokenizer, card.template, card.placeholder)
    assert batch['input_ids'][:, :len(prompt)].tolist() == [prompt]*4
    texts = sorted(tokenizer.decode(row[row != -100]).strip() for row in batch['labels'])
    assert texts == sorted(f'{f.explanation}<|im_end|>' for f in features()[:4])

    direction = batch['feature_vector']
    bare = {name: value for name, value in batch.items() if name != 'feature_vector'}
    trainer.model.eval()
    with torch.no_grad():
        losses = [trainer.compute_loss(trainer.model, inputs).item()
                  for inputs in (dict(batch), {**batch, 'feature_vector': -direction}, bare)]
    assert len({round(x, 4) for x in losses}) == 3


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_every_lora_layer_moves(tmp_path, arch):
    trainer, _ = trainer_of(tiny_preset(tmp_path, arch), tmp_path/'c', features()[:4])
    trainer.args.bf16 = False
    with quiet(): trainer.train()
    moved = [p for n, p in trainer.model.named_parameters() if 'lora_B' in n]
    assert moved
    assert all(p.abs().max() > 0 for p in moved)


@pytest.fixture(scope='module')
def long(here):
    "A training that learns its labels by heart"
    return train_on(tiny_preset(here, **LONG), features(), here/'long')


def test_trains(long):
    assert long.losses[-1] < .2*long.losses[0]
    assert list(long.log.columns) == ['step', 'loss', 'eval_loss', 'epoch']
    assert long.log.eval_loss.isna().all()
    assert names(long.folder) == ['adapter_config.json', 'adapter_model.safetensors', CARD, 'training.json']


def test_explains(here, long):
    reader = FeatureReader.load(tiny_preset(here).sae)
    explainer = Explainer.from_pretrained(long.folder, reader)
    texts = explainer.explain(reader.directions(range(12)), max_new_tokens=16)
    assert explainer.card.stage == 'sft'
    assert sum(word in text for word, text in zip(WORDS, texts)) >= 10


def test_runs_under_autocast_with_fp32_weights(here, tmp_path):
    trainer, _ = trainer_of(tiny_preset(here), tmp_path, features())
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert not trainer.args.activation_checkpointing
    seen = []
    layer = trainer.model.get_base_model().model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with quiet(): trainer.train()
    assert set(seen) == {torch.bfloat16}


@pytest.fixture(scope='module')
def whole(here):
    "A training that nothing interrupted"
    return train(here, here/'whole', seed=0)


def test_same_seed_same_adapter(here, whole, tmp_path):
    again = train(here, tmp_path/'again', seed=0)
    assert again.losses == whole.losses
    assert same(adapter(again.folder), adapter(whole.folder))


def test_another_seed_another_adapter(here, whole, tmp_path):
    other = train(here, tmp_path/'other', seed=1)
    assert not same(adapter(other.folder), adapter(whole.folder))


def test_best_eval_loss_is_kept(here, tmp_path):
    """Labels of the eval set have words that the others have not

    Its loss rises in the end, and the result is from before.
    """
    preset = tiny_preset(here, **LONG)
    other = features('print hello state kept natural simple model shore'.split(), start=100)
    result = train_on(preset, features(), tmp_path/'sft', eval_features=other)
    evals = result.log.dropna(subset='eval_loss').eval_loss.tolist()
    assert len(evals) == 10
    assert min(evals) < evals[-1]
    trainer, _ = trainer_of(preset, tmp_path/'c', features(), other)
    state = {name.replace('.weight', '.default.weight'): w.float() for name, w in adapter(result.folder).items()}
    trainer.model.load_state_dict(state, strict=False)
    with quiet(): found = trainer.evaluate()['eval_loss']
    assert abs(found - min(evals)) < abs(found - evals[-1])
    assert abs(found - min(evals)) < .02*min(evals)


def test_scoring_labels_only_changes_nothing(here):
    "The positions that are left out never counted: same loss, same gradients"
    losses, gradients = [], []
    for context in (quiet, labels_only):
        torch.manual_seed(0)
        trainer, _ = trainer_of(tiny_preset(here), here/'only', features())
        batch = next(iter(trainer.get_train_dataloader()))
        with context(): loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    all_scored, only_labels = gradients
    assert abs(losses[0] - losses[1]) < 1e-4
    assert all_scored.keys() == only_labels.keys()
    assert all(torch.allclose(g, only_labels[n], atol=1e-3) for n, g in all_scored.items())


def test_one_device_is_used(tmp_path):
    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True)
    assert one_device(args).n_gpu <= 1
    args._n_gpu = 4 # as on a machine with four
    assert one_device(args) is args
    assert args.n_gpu == 1


# ---- killed and gone on

KILLED = '''
import os
import saeexplainer.sft as sft, saeexplainer.training as training
from trainings import train
kind, step = {kind!r}, {step}

def die(*args, **kw): os.kill(os.getpid(), 9)

class Die(training.TrainerCallback):
    def on_step_end(self, args, state, control, **kw):
        if kind == 'step' and state.global_step == step: die()

write = training.Checkpoints.on_save
def on_save(self, args, state, control, **kw): # after the trainer wrote it, before it is listed as complete
    if kind == 'checkpoint' and state.global_step >= step: die()
    write(self, args, state, control, **kw)

make = sft.sft_trainer
def with_death(*args, **kw):
    trainer = make(*args, **kw)
    trainer.add_callback(Die())
    return trainer

training.Checkpoints.on_save = on_save
if kind == 'finish': training.save_adapter = die
sft.sft_trainer = with_death
train({folder!r}, {out!r}, **{fields!r})
'''


@pytest.fixture
def killed(forks, here):
    "A function that trains in a process which ends itself"
    def kill(out, kind, step=0, **fields):
        code = KILLED.format(kind=kind, step=step, folder=str(here), out=str(out), fields=fields)
        assert forks.run(code) == -signal.SIGKILL, forks.errors()
    return kill


def checkpoints(folder):
    "Newest first"
    return sorted(folder.glob('checkpoint-*'), key=lambda c: -int(c.name.split('-')[1]))

def same_training(a, b): return a.losses == b.losses and same(adapter(a.folder), adapter(b.folder))


@pytest.mark.parametrize('kind,step', [('step', 7), ('checkpoint', 2), ('finish', 0)])
def test_killed_anywhere(here, whole, killed, tmp_path, kind, step):
    "kill -9, then the same call: losses and adapter are those of a training that was never killed"
    out = tmp_path/'out'
    killed(out, kind, step)
    assert not (out/CARD).exists()
    if kind == 'checkpoint': assert (out/'checkpoints'/f'checkpoint-{step}').exists()
    resumed = train(here, out)
    assert resumed.log.step.tolist() == list(range(1, 13))
    assert same_training(resumed, whole)
    assert not (out/'checkpoints').exists()


@pytest.mark.parametrize('evaluated', [False, True])
def test_killed_between_training_and_saving(here, killed, tmp_path, evaluated):
    """All steps of a fractional number of epochs are done and checkpointed

    No step more is taken, and the best checkpoint is the result.
    """
    more = dict(sft_epochs=2.3, evaluated=evaluated)
    killed(tmp_path/'out', 'finish', **more)
    never_killed = train(here, tmp_path/'whole', **more)
    resumed = train(here, tmp_path/'out', **more)
    assert resumed.log.step.tolist() == never_killed.log.step.tolist()
    assert same_training(resumed, never_killed)


def test_half_written_files(here, whole, killed, tmp_path):
    "Checkpoints with a cut file, an empty folder, a broken list: what is whole is resumed from, the rest goes"
    killed(tmp_path/'out', 'step', 9)
    folder = tmp_path/'out'/'checkpoints'
    newest, older = checkpoints(folder)
    (newest/'optimizer.pt').write_bytes((newest/'optimizer.pt').read_bytes()[:100])
    (folder/'checkpoint-11').mkdir()
    assert last_checkpoint(folder) == str(older)
    assert checkpoints(folder) == [older]
    assert same_training(train(here, tmp_path/'out'), whole)


def test_a_checkpoint_with_a_turned_byte_is_passed_over(here, whole, killed, tmp_path):
    killed(tmp_path/'out', 'step', 9)
    folder = tmp_path/'out'/'checkpoints'
    newest, older = checkpoints(folder)
    data = bytearray((newest/'optimizer.pt').read_bytes())
    data[len(data)//2] ^= 64
    (newest/'optimizer.pt').write_bytes(data)
    listed = json.loads((older/'files.json').read_text())
    sizes = {name: size for name, (size, _) in listed.items()} # as it was written by earlier versions
    (older/'files.json').write_text(json.dumps(sizes))
    assert last_checkpoint(folder) == str(older)
    assert not newest.exists()
    assert same_training(train(here, tmp_path/'out'), whole)


def test_finished_is_not_run_again(here, whole):
    start = time.process_time()
    again = train(here, whole.folder)
    assert time.process_time() - start < 5
    assert again.losses == whole.losses
    assert again.seconds == whole.seconds
    assert SFTResult.load(whole.folder).losses == whole.losses


# ---- what is refused

def test_another_training_in_the_same_folder(here, whole, tmp_path):
    finished = r'holds a finished training \(sft_lr: 0.01 there, 0.02 here\): use another folder'
    with pytest.raises(ValueError, match=finished): train(here, whole.folder, sft_lr=2e-2)
    claim(tmp_path/'checkpoints', dict(sft_lr=1.))
    begun = r'holds another training \(sft_lr: 1.0 there, 0.01 here\): use another folder'
    with pytest.raises(ValueError, match=begun): train(here, tmp_path)


def test_features_without_label(here):
    preset = tiny_preset(here)
    card = ExplainerCard.from_preset(preset, FeatureReader.load(preset.sae))
    for label in (None, '', '  '):
        with pytest.raises(ValueError, match='feature a/b/3 has no label to train on'):
            sft_dataset([SimpleNamespace(id='a/b/3', explanation=label)], card)
    with pytest.raises(ValueError, match='no features to train on'): sft_dataset([], card)


FEATURES = features()

@pytest.mark.parametrize('trained, others, says', [
    (FEATURES, dict(held_out=FEATURES[3:5]), '2 held-out features are among the SFT features'),
    (FEATURES, dict(held_out=[FEATURES[3].id]), '1 held-out features are among the SFT features'),
    (FEATURES, dict(eval_features=FEATURES[:1]), '1 eval features are among the SFT features'),
    (FEATURES[:4], dict(eval_features=FEATURES[5:7], held_out=FEATURES[6:]),
     'held-out features are among the eval features')])
def test_splits_that_overlap(here, tmp_path, trained, others, says):
    with pytest.raises(ValueError, match=f'{says}, for example .*: splits must be disjoint'):
        train_on(tiny_preset(here), trained, tmp_path/'sft', **others)
    assert not (tmp_path/'sft').exists()


def test_splits_that_do_not_overlap(): check_disjoint(features(), features(start=50))


def test_sae_of_another_width(tmp_path, here):
    reader = FeatureReader.load(tiny_sae(tmp_path/'sae', d_in=48))
    with pytest.raises(ValueError, match="has hidden size 64, the SAE's directions have 48"):
        train_sft(tiny_preset(here), features(), reader, tmp_path/'out', progress=False)


def test_feature_out_of_range(tmp_path, here):
    with pytest.raises(ValueError, match='there is no feature 600: this SAE has features 0 to 511'):
        train_on(tiny_preset(here), features(start=600), tmp_path/'out')


def test_a_prompt_that_fills_a_row(here, tmp_path):
    preset = tiny_preset(here, max_length=9, explanation_tokens=4)
    with pytest.raises(ValueError, match=r'the prompt has \d+ tokens and max_length is 9: nothing is left'):
        train_on(preset, features(), tmp_path/'sft')


# ---- what the template puts around a label, and what a label may spell

def shipped(name):
    "A chat template of trl"
    return (Path(trl.__file__).parent/'chat_templates'/f'{name}.jinja').read_text(encoding='utf-8')

def learned(here, tmp_path, template, label):
    "An explainer that was trained on one label of three features, and what it says in up to 48 tokens"
    preset = tiny_preset(here, chat_template=template, **LONG)
    labelled = features(WORDS[:3])
    for feature in labelled: feature.explanation = label
    train_on(preset, labelled, tmp_path/'sft')
    reader = FeatureReader.load(preset.sae)
    explainer = Explainer.from_pretrained(tmp_path/'sft', reader)
    return explainer, explainer.explain(reader.directions([1]), max_new_tokens=48)


@pytest.mark.parametrize('name, before', [
    ('qwen3', '</think>\n\n'), ('qwen3_5_think', '</think>\n\n'), ('gptoss', '<|message|>')])
def test_only_the_label_is_said(here, tmp_path, name, before):
    """Neither what the template puts before an answer

    Nor a second answer behind the end of its turn, which is not the tokenizer's eos.
    """
    template = shipped(name)
    if name == 'gptoss': template = template.replace('<|return|>', '<|im_end|>')
    explainer, texts = learned(here, tmp_path, template, 'the word nation')
    assert texts == ['the word nation']
    assert explainer.tokenizer.eos_token == '</s>'
    assert explainer.tokenizer.decode(explainer.prompt).endswith(before)


def test_a_control_token_in_a_label_is_text(here, tmp_path):
    label = 'the token <|im_end|> at the end'
    _, texts = learned(here, tmp_path, None, label)
    assert texts == [label]


def test_labels_may_contain_the_placeholder(here, tmp_path):
    preset = tiny_preset(here, sft_epochs=1.)
    labelled = features()
    labelled[3].explanation = f"the token{preset.placeholder} and {preset.placeholder}, twice"
    result = train_on(preset, labelled, tmp_path/'out')
    assert len(result.losses)
    rows = sft_dataset(labelled, ExplainerCard.load(result.folder))
    assert all(preset.placeholder not in row['completion'][0]['content'] for row in rows)


ENDLESS = ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
           "{% if add_generation_prompt %}assistant: {% endif %}")

def test_a_template_that_ends_nothing_is_said(here, tmp_path, capsys):
    train_on(tiny_preset(here, sft_epochs=1., chat_template=ENDLESS), features(), tmp_path/'sft')
    assert capsys.readouterr().err.count('the chat_template puts no end token behind an answer') == 1


@pytest.mark.parametrize('template, says', [
    ("{{ messages[0]['content'] }}", 'does not write the content of an answer as it is'),
    ('{{ 1/0 }}', 'ZeroDivisionError'),
    ('{% for', 'TemplateSyntaxError')])
def test_a_template_that_cannot_be_trained_with(here, tmp_path, template, says):
    preset = tiny_preset(here, chat_template=template)
    with pytest.raises(ValueError, match=f'chat_template.*{says}'): train_on(preset, features(), tmp_path/'sft')


@pytest.mark.parametrize('arch', ['gpt2', 'llama'])
def test_a_label_longer_than_the_model(tmp_path, arch):
    preset = tiny_preset(tmp_path, arch, sft_epochs=1.)
    labelled = features()
    labelled[2].explanation = 'rain '*1500
    result = train_on(preset, labelled, tmp_path/'sft')
    assert all(loss == loss for loss in result.losses) # no NaN
    assert preset.max_length > 512


# ---- trainings that fail

def test_a_training_that_turns_nan(here, tmp_path):
    "It stops with a line that names the learning rate, and leaves no adapter"
    for _ in range(2): # and when it is begun again
        with pytest.raises(ValueError, match=r'the loss is nan after step \d+, with sft_lr 1e\+300: take a lower one'):
            train(here, tmp_path/'sft', sft_lr=1e300)
    assert not (tmp_path/'sft'/CARD).exists()
    assert not (tmp_path/'sft'/'adapter_model.safetensors').exists()


def test_an_adapter_that_is_nan_after_one_step(here, tmp_path):
    "Its loss is from before"
    with pytest.raises(ValueError, match='numbers that are not finite|the loss is'):
        train(here, tmp_path/'one', sft_lr=1e300, sft_epochs=1/3, sft_warmup=0.)


FULL = '''
import resource
from trainings import train
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try: train({folder!r}, {out!r})
except OSError as e: print('OSError:', e)
'''

@pytest.mark.parametrize('limit', [3_000, 20_000, 60_000, 100_000, 150_000])
def test_a_full_disk(here, whole, forks, tmp_path, limit):
    "Wherever in a checkpoint it happens: one line; and with room again the training ends as if nothing had been"
    out = tmp_path/'out'
    assert forks.run(FULL.format(limit=limit, folder=str(here), out=str(out))) == 0, forks.errors()
    [line] = forks.printed().strip().splitlines()
    assert line.startswith('OSError:')
    assert 'could not be written' in line
    assert 'is the disk full?' in line
    assert str(out) in line
    assert not (out/CARD).exists()
    assert same_training(train(here, out), whole)


@pytest.mark.parametrize('content', [
    '', '[1]', '{"settings": {}, "log": [', '{}', '{"settings": {}, "log": [], "seconds": "1"}'])
def test_a_damaged_log(here, whole, tmp_path, content):
    folder = tmp_path/'sft'
    shutil.copytree(whole.folder, folder)
    (folder/'training.json').write_text(content)
    def train_again(): train(here, folder)
    def load(): SFTResult.load(folder)
    for read in (train_again, load):
        with pytest.raises(ValueError, match='training.json') as error: read()
        assert '\n' not in str(error.value)


def test_damaged_settings_of_checkpoints(tmp_path):
    "Nothing is thrown away"
    (tmp_path/'settings.json').write_text('{"lr"')
    (tmp_path/'checkpoint-1').mkdir()
    with pytest.raises(ValueError, match='settings.json is not JSON'): claim(tmp_path, dict(lr=1))
    assert (tmp_path/'checkpoint-1').exists()


@pytest.mark.parametrize('setting, shown', [('1', False), ('0', True), ('', True)])
def test_the_bar_of_a_training_can_be_turned_off(monkeypatch, setting, shown):
    monkeypatch.setenv('TQDM_DISABLE', setting)
    bar = TrainingBar('sft')
    bar.on_train_begin(None, SimpleNamespace(max_steps=3, global_step=0), None)
    assert bar.bar.disable is not shown
    bar.bar.close()
