"SFT on tiny real models: the loss sees the label and the feature, and a killed training ends as if it had not been"
import json, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from safetensors.torch import load_file
from helpers import ARCHITECTURES, PLACEHOLDER, tiny_model, tiny_sae, tiny_tokenizer
from saeexplainer.explainer import CARD, Explainer, ExplainerCard
from saeexplainer.injection import explanation_prompt
from saeexplainer.lm.models import load_model
from saeexplainer.presets import load_preset
from saeexplainer.saes import FeatureReader
from saeexplainer.sft import SFTResult, _sft_trainer, check_disjoint, sft_dataset, train_sft
from saeexplainer.training import claim, last_checkpoint, one_gpu, quiet

WORDS = 'cat dog mat fire sea shells rain nation park large area land'.split()


def features(words=WORDS, start=0):
    return [SimpleNamespace(id=SimpleNamespace(index=start+i), explanation=f"the word '{w}'") for i, w in enumerate(words)]


def tiny_preset(folder, arch='llama', **kw):
    "A preset whose model and SAE are made here, where they are not there yet"
    folder = Path(folder)
    if not (folder/'model').exists():
        tiny_model(arch).save_pretrained(folder/'model'); tiny_tokenizer().save_pretrained(folder/'model'); tiny_sae(folder/'sae')
    fields = dict(explainer=str(folder/'model'), target=str(folder/'model'), sae=str(folder/'sae'), layer=2, device='cpu', sft_lr=1e-2, sft_epochs=4., sft_batch=4)
    return load_preset('smollm2-135m', **{**fields, **kw})


def train(folder, out, evaluated=False, **kw): # as in a process of its own, see `test_killed_anywhere`
    preset = tiny_preset(folder, **kw)
    others = features('print hello state kept'.split(), start=100) if evaluated else None
    return train_sft(preset, features(), FeatureReader.load(preset.sae), out, eval_features=others, progress=False)


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    d = tmp_path_factory.mktemp('sft'); tiny_preset(d); return d


def adapter(folder): return load_file(Path(folder)/'adapter_model.safetensors')

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- what the loss sees

@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_loss_sees_the_label_alone_and_the_feature(tmp_path, arch):
    preset = tiny_preset(tmp_path, arch)
    reader = FeatureReader.load(preset.sae)
    card = ExplainerCard.from_preset(preset, reader)
    with quiet():
        trainer = _sft_trainer(preset, sft_dataset(features()[:4], card), None, reader, card, tmp_path/'c', progress=False)
        trainer.args.bf16 = False
    batch, tokenizer = next(iter(trainer.get_train_dataloader())), trainer.processing_class
    prompt = explanation_prompt(tokenizer, card.template, card.placeholder)
    assert batch['input_ids'][:, :len(prompt)].tolist() == [prompt]*4
    texts = sorted(tokenizer.decode(row[row != -100]).strip() for row in batch['labels'])
    assert texts == sorted(f'{f.explanation}<|im_end|>' for f in features()[:4])
    trainer.model.eval()
    with torch.no_grad():
        losses = [trainer.compute_loss(trainer.model, {**batch, 'feature_vector': v}).item() for v in (batch['feature_vector'], -batch['feature_vector'])]
        bare = trainer.compute_loss(trainer.model, {k: v for k, v in batch.items() if k != 'feature_vector'}).item()
    assert len({round(x, 4) for x in [*losses, bare]}) == 3
    with quiet(): trainer.train()
    gradients = [p for n, p in trainer.model.named_parameters() if 'lora_B' in n]
    assert gradients and all(p.abs().max() > 0 for p in gradients) # every LoRA layer has moved


def test_trains_and_explains(here, tmp_path):
    preset = tiny_preset(here, sft_epochs=60., sft_batch=12, lora_r=16, lora_alpha=32, lora_dropout=0.)
    reader = FeatureReader.load(preset.sae)
    result = train_sft(preset, features(), reader, tmp_path/'sft', progress=False)
    assert result.losses[-1] < .2*result.losses[0] and list(result.log.columns) == ['step', 'loss', 'eval_loss', 'epoch'] and result.log.eval_loss.isna().all()
    assert sorted(f.name for f in result.folder.iterdir()) == ['adapter_config.json', 'adapter_model.safetensors', CARD, 'training.json']
    e = Explainer.from_pretrained(result.folder, reader)
    said = e.explain(reader.directions(range(12)), max_new_tokens=16)
    assert e.card.stage == 'sft' and sum(w in text for w, text in zip(WORDS, said)) >= 10


def test_runs_under_autocast_with_fp32_weights(here, tmp_path):
    preset = tiny_preset(here)
    reader = FeatureReader.load(preset.sae)
    card = ExplainerCard.from_preset(preset, reader)
    with quiet(): trainer = _sft_trainer(preset, sft_dataset(features(), card), None, reader, card, tmp_path, progress=False)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32} and not trainer.args.activation_checkpointing
    seen = []
    layer = trainer.model.get_base_model().model.layers[0].mlp.down_proj
    hook = layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with quiet(): trainer.train()
    assert set(seen) == {torch.bfloat16}


def test_same_seed_same_adapter(here, tmp_path):
    a, b, c = (train(here, tmp_path/name, seed=seed) for name, seed in (('a', 0), ('b', 0), ('c', 1)))
    assert a.losses == b.losses and same(adapter(a.folder), adapter(b.folder)) and not same(adapter(a.folder), adapter(c.folder))


def test_best_eval_loss_is_kept(here, tmp_path):
    "Labels of the eval set have words that the others have not: its loss rises in the end, and the result is from before"
    preset = tiny_preset(here, sft_epochs=60., sft_batch=12, lora_r=16, lora_alpha=32, lora_dropout=0.)
    reader, other = FeatureReader.load(preset.sae), features('print hello state kept natural simple model shore'.split(), start=100)
    result = train_sft(preset, features(), reader, tmp_path/'sft', eval_features=other, progress=False)
    evals = result.log.dropna(subset='eval_loss').eval_loss.tolist()
    assert len(evals) == 10 and min(evals) < evals[-1]
    card = ExplainerCard.load(result.folder)
    with quiet():
        trainer = _sft_trainer(preset, sft_dataset(features(), card), sft_dataset(other, card), reader, card, tmp_path/'c', progress=False)
        state = {k.replace('.weight', '.default.weight'): v.float() for k, v in adapter(result.folder).items()}
        trainer.model.load_state_dict(state, strict=False)
        found = trainer.evaluate()['eval_loss']
    assert abs(found - min(evals)) < abs(found - evals[-1]) and abs(found - min(evals)) < .02*min(evals)


# ---- killed and gone on

KILLED = '''
import os, sys
sys.path.insert(0, {tests!r})
import saeexplainer.sft as sft, saeexplainer.training as training
from test_sft import train
kind, step = {kind!r}, {step}
class Die(training.TrainerCallback):
    def on_step_end(self, args, state, control, **kw):
        if kind == 'step' and state.global_step == step: os.kill(os.getpid(), 9)
if kind == 'checkpoint': # after the trainer wrote it, before it is listed as complete
    def on_save(self, args, state, control, **kw):
        if state.global_step >= step: os.kill(os.getpid(), 9)
        write(self, args, state, control, **kw)
    write, training.Checkpoints.on_save = training.Checkpoints.on_save, on_save
if kind == 'finish': training.save_adapter = lambda *a, **kw: os.kill(os.getpid(), 9)
make = sft._sft_trainer
def with_death(*a, **kw):
    trainer = make(*a, **kw); trainer.add_callback(Die()); return trainer
sft._sft_trainer = with_death
train({folder!r}, {out!r}, **{more!r})
'''

def killed(folder, out, kind, step=0, **more): # a process that ends itself
    code = KILLED.format(tests=str(Path(__file__).parent), kind=kind, step=step, folder=str(folder), out=str(out), more=more)
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)

@pytest.fixture(scope='module')
def whole(here): return train(here, here/'whole')

@pytest.mark.parametrize('kind,step', [('step', 7), ('checkpoint', 2), ('finish', 0)])
def test_killed_anywhere(here, whole, tmp_path, kind, step):
    "kill -9, then the same call: losses and adapter are those of a training that was never killed"
    done = killed(here, tmp_path/'out', kind, step)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (tmp_path/'out'/CARD).exists()
    if kind == 'checkpoint': assert (tmp_path/'out'/'checkpoints'/f'checkpoint-{step}').exists()
    resumed = train(here, tmp_path/'out')
    assert resumed.losses == whole.losses and resumed.log.step.tolist() == list(range(1, 13))
    assert same(adapter(resumed.folder), adapter(whole.folder)) and not (tmp_path/'out'/'checkpoints').exists()


@pytest.mark.parametrize('evaluated', [False, True])
def test_killed_between_training_and_saving(here, tmp_path, evaluated):
    "All steps of a fractional number of epochs are done and checkpointed: no step more, and the best checkpoint is the result"
    more = dict(sft_epochs=2.3, evaluated=evaluated)
    done = killed(here, tmp_path/'out', 'finish', **more)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    whole, resumed = (train(here, tmp_path/name, **more) for name in ('whole', 'out'))
    assert resumed.losses == whole.losses and resumed.log.step.tolist() == whole.log.step.tolist()
    assert same(adapter(resumed.folder), adapter(whole.folder))


def test_half_written_files(here, whole, tmp_path):
    "Checkpoints with a cut file, an empty folder, a broken list: what is whole is resumed from, the rest goes"
    killed(here, tmp_path/'out', 'step', 9)
    folder = tmp_path/'out'/'checkpoints'
    newest, older = sorted(folder.glob('checkpoint-*'), key=lambda c: -int(c.name.split('-')[1]))
    (newest/'optimizer.pt').write_bytes((newest/'optimizer.pt').read_bytes()[:100])
    (folder/'checkpoint-11').mkdir()
    assert last_checkpoint(folder) == str(older) and [c.name for c in folder.glob('checkpoint-*')] == [older.name]
    resumed = train(here, tmp_path/'out')
    assert resumed.losses == whole.losses and same(adapter(resumed.folder), adapter(whole.folder))


def test_finished_is_not_run_again(here, whole):
    start = time.time()
    again = train(here, whole.folder)
    assert again.losses == whole.losses and again.seconds == whole.seconds and time.time() - start < 5
    assert SFTResult.load(whole.folder).losses == whole.losses


def test_another_training_in_the_same_folder(here, whole, tmp_path):
    with pytest.raises(ValueError, match=r'holds a finished training \(sft_lr: 0.01 there, 0.02 here\): use another folder'): train(here, whole.folder, sft_lr=2e-2)
    claim(tmp_path/'checkpoints', dict(sft_lr=1.))
    with pytest.raises(ValueError, match=r'holds another training \(sft_lr: 1.0 there, 0.01 here\): use another folder'): train(here, tmp_path)


def test_labels_may_contain_the_placeholder(here, tmp_path):
    preset, labelled = tiny_preset(here, sft_epochs=1.), features()
    labelled[3].explanation = f"the token{preset.placeholder} and {preset.placeholder}, twice"
    result = train_sft(preset, labelled, FeatureReader.load(preset.sae), tmp_path/'out', progress=False)
    assert len(result.losses) and all(preset.placeholder not in row['completion'][0]['content'] for row in sft_dataset(labelled, ExplainerCard.from_preset(preset, FeatureReader.load(preset.sae))))


def test_one_gpu_is_used(tmp_path):
    from trl import SFTConfig
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True)
    assert one_gpu(args).n_gpu <= 1
    args._n_gpu = 4 # as on a machine with four
    assert one_gpu(args) is args and args.n_gpu == 1


# ---- what is refused

def test_features_without_label(here):
    card = ExplainerCard.from_preset(p := tiny_preset(here), FeatureReader.load(p.sae))
    for label in (None, '', '  '):
        with pytest.raises(ValueError, match='feature a/b/3 has no label to train on'): sft_dataset([SimpleNamespace(id='a/b/3', explanation=label)], card)
    with pytest.raises(ValueError, match='no features to train on'): sft_dataset([], card)


def test_splits_that_overlap(here, tmp_path):
    preset, fs = tiny_preset(here), features()
    reader = FeatureReader.load(preset.sae)
    for kw, what in ((dict(held_out=fs[3:5]), '2 held-out features'), (dict(held_out=[fs[3].id]), '1 held-out features'), (dict(eval_features=fs[:1]), '1 eval features')):
        with pytest.raises(ValueError, match=f'{what} are among the SFT features, for example .*: splits must be disjoint'):
            train_sft(preset, fs, reader, tmp_path/'sft', **kw)
    with pytest.raises(ValueError, match='held-out features are among the eval features'):
        train_sft(preset, fs[:4], reader, tmp_path/'sft', eval_features=fs[5:7], held_out=fs[6:])
    assert not (tmp_path/'sft').exists()
    check_disjoint(fs, features(start=50))


def test_sae_of_another_width(tmp_path, here):
    reader = FeatureReader.load(tiny_sae(tmp_path/'sae', d_in=48))
    with pytest.raises(ValueError, match="has hidden size 64, the SAE's directions have 48"):
        train_sft(tiny_preset(here), features(), reader, tmp_path/'out', progress=False)


def test_feature_out_of_range(tmp_path, here):
    preset = tiny_preset(here)
    with pytest.raises(ValueError, match='there is no feature 600: this SAE has features 0 to 511'):
        train_sft(preset, features(start=600), FeatureReader.load(preset.sae), tmp_path/'out', progress=False)


def test_scoring_labels_only_changes_nothing(here):
    "The positions that are left out never counted: same loss, same gradients"
    from saeexplainer.training import labels_only
    preset = tiny_preset(here); reader = FeatureReader.load(preset.sae)
    card = ExplainerCard.from_preset(preset, reader)
    found = []
    for context in (quiet, labels_only):
        torch.manual_seed(0)
        trainer = _sft_trainer(preset, sft_dataset(features(), card), None, reader, card, here/'only', False)
        trainer.model.eval() # no dropout
        batch = next(iter(trainer.get_train_dataloader()))
        with context(): loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}))
    (a, grads), (b, others) = found
    assert abs(a - b) < 1e-4 and grads.keys() == others.keys() and all(torch.allclose(g, others[n], atol=1e-3) for n, g in grads.items())


# ---- what the template puts around a label, and what a label may spell

def shipped(name): # a chat template of trl
    import trl
    return (Path(trl.__file__).parent/'chat_templates'/f'{name}.jinja').read_text(encoding='utf-8')

SPELT = 'the token <|im_end|> at the end'

def learned(here, tmp_path, template, label, **more): # what an explainer says that was trained on one label, to the limit of 48 tokens
    preset = tiny_preset(here, sft_epochs=60., sft_batch=12, lora_r=16, lora_alpha=32, lora_dropout=0., chat_template=template, **more)
    reader, labelled = FeatureReader.load(preset.sae), features()
    for f in labelled: f.explanation = label
    train_sft(preset, labelled, reader, tmp_path/'sft', progress=False)
    e = Explainer.from_pretrained(tmp_path/'sft', reader)
    return e, e.explain(reader.directions([1]), max_new_tokens=48)


@pytest.mark.parametrize('name', ['qwen3', 'qwen3_5_think', 'gptoss'])
def test_only_the_label_is_said(here, tmp_path, name):
    "Neither what the template puts before an answer, nor a second answer behind the end of its turn, which is not the tokenizer's eos"
    template = shipped(name)
    if name == 'gptoss': template = template.replace('<|return|>', '<|im_end|>')
    e, said = learned(here, tmp_path, template, 'the word nation')
    assert said == ['the word nation'] and e.tokenizer.eos_token == '</s>'
    shown = e.tokenizer.decode(e.prompt)
    assert shown.endswith({'qwen3': '</think>\n\n', 'qwen3_5_think': '</think>\n\n', 'gptoss': '<|message|>'}[name])


def test_a_control_token_in_a_label_is_text(here, tmp_path):
    e, said = learned(here, tmp_path, None, SPELT)
    assert said == [SPELT]


def test_a_template_that_ends_nothing_is_said(here, tmp_path, capsys):
    preset = tiny_preset(here, sft_epochs=1., chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    train_sft(preset, features(), FeatureReader.load(preset.sae), tmp_path/'sft', progress=False)
    assert capsys.readouterr().err.count('the chat_template puts no end token behind an answer') == 1


@pytest.mark.parametrize('template, says', [("{{ messages[0]['content'] }}", 'does not write the content of an answer as it is'), ('{{ 1/0 }}', 'ZeroDivisionError'), ('{% for', 'TemplateSyntaxError')])
def test_a_template_that_cannot_be_trained_with(here, tmp_path, template, says):
    preset = tiny_preset(here, chat_template=template)
    with pytest.raises(ValueError, match=f'chat_template.*{says}'): train_sft(preset, features(), FeatureReader.load(preset.sae), tmp_path/'sft', progress=False)


def test_a_prompt_that_fills_a_row(here, tmp_path):
    preset = tiny_preset(here, max_length=9, explanation_tokens=4)
    with pytest.raises(ValueError, match=r'the prompt has \d+ tokens and max_length is 9: nothing is left'): train_sft(preset, features(), FeatureReader.load(preset.sae), tmp_path/'sft', progress=False)


@pytest.mark.parametrize('arch', ['gpt2', 'llama'])
def test_a_label_longer_than_the_model(tmp_path, arch):
    preset, long = tiny_preset(tmp_path, arch, sft_epochs=1.), features()
    long[2].explanation = 'rain '*1500
    result = train_sft(preset, long, FeatureReader.load(preset.sae), tmp_path/'sft', progress=False)
    assert all(l == l for l in result.losses) and preset.max_length > 512


# ---- trainings that fail

def test_a_training_that_turns_nan(here, tmp_path):
    "It stops with a line that names the learning rate, and leaves no adapter"
    for _ in range(2): # and when it is begun again
        with pytest.raises(ValueError, match=r'the loss is nan after step \d+, with sft_lr 1e\+300: take a lower one'): train(here, tmp_path/'sft', sft_lr=1e300)
    assert not (tmp_path/'sft'/CARD).exists() and not (tmp_path/'sft'/'adapter_model.safetensors').exists()
    with pytest.raises(ValueError, match='numbers that are not finite|the loss is'): train(here, tmp_path/'one', sft_lr=1e300, sft_epochs=1/3, sft_warmup=0.) # one step: its loss is from before


FULL = '''
import resource, sys
sys.path.insert(0, {tests!r})
from test_sft import train
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try: train({folder!r}, {out!r})
except OSError as e: print('OSError:', e)
'''

@pytest.mark.parametrize('limit', [3_000, 20_000, 60_000, 100_000, 150_000])
def test_a_full_disk(here, whole, tmp_path, limit):
    "Wherever in a checkpoint it happens: one line; and with room again the training ends as if nothing had been"
    code = FULL.format(tests=str(Path(__file__).parent), limit=limit, folder=str(here), out=str(tmp_path/'out'))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    said = done.stdout.strip().splitlines()
    assert done.returncode == 0 and len(said) == 1 and said[0].startswith('OSError:'), done.stdout + done.stderr[-1000:]
    assert 'could not be written' in said[0] and 'is the disk full?' in said[0] and str(tmp_path/'out') in said[0]
    assert not (tmp_path/'out'/CARD).exists()
    resumed = train(here, tmp_path/'out')
    assert resumed.losses == whole.losses and same(adapter(resumed.folder), adapter(whole.folder))


def test_a_checkpoint_with_a_turned_byte_is_passed_over(here, whole, tmp_path):
    killed(here, tmp_path/'out', 'step', 9)
    folder = tmp_path/'out'/'checkpoints'
    newest, older = sorted(folder.glob('checkpoint-*'), key=lambda c: -int(c.name.split('-')[1]))
    data = bytearray((newest/'optimizer.pt').read_bytes())
    data[len(data)//2] ^= 64
    (newest/'optimizer.pt').write_bytes(data)
    listed = json.loads((older/'files.json').read_text())
    (older/'files.json').write_text(json.dumps({name: size for name, (size, _) in listed.items()})) # as it was written by earlier versions
    assert last_checkpoint(folder) == str(older) and not newest.exists()
    resumed = train(here, tmp_path/'out')
    assert resumed.losses == whole.losses and same(adapter(resumed.folder), adapter(whole.folder))


@pytest.mark.parametrize('content', ['', '[1]', '{"settings": {}, "log": [', '{}', '{"settings": {}, "log": [], "seconds": "1"}'])
def test_a_damaged_log(here, whole, tmp_path, content):
    import shutil
    shutil.copytree(whole.folder, tmp_path/'sft')
    (tmp_path/'sft'/'training.json').write_text(content)
    for load in (lambda: train(here, tmp_path/'sft'), lambda: SFTResult.load(tmp_path/'sft')):
        with pytest.raises(ValueError, match='training.json') as e: load()
        assert '\n' not in str(e.value)
    (tmp_path/'c').mkdir()
    (tmp_path/'c'/'settings.json').write_text('{"lr"')
    (tmp_path/'c'/'checkpoint-1').mkdir()
    with pytest.raises(ValueError, match='settings.json is not JSON'): claim(tmp_path/'c', dict(lr=1))
    assert (tmp_path/'c'/'checkpoint-1').exists() # nothing is thrown away
