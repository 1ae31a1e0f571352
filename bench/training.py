"""A training step of the explainer with the injection, against the same step without it.

    python bench/training.py [--preset smollm2-135m] [--batch 8] [--repeats 12] [--json FILE]

One step is trl's: forward, completion-only loss, backward and optimizer, LoRA on all linear layers. Both kinds take
turns in one process, on the same batch; the ratio is that of the medians. Fails where the injection costs more than 3%.
"""
import argparse, statistics, sys, tempfile, time
from pathlib import Path
from types import SimpleNamespace
import torch
from record import finish, row
from saeexplainer.explainer import Explainer
from saeexplainer.injection import Injector
from saeexplainer.presets import load_preset
from saeexplainer.sft import sft_dataset, sft_trainer
from saeexplainer.training import labels_only


class Directions: # stands for an SAE: random unit vectors of the model's width
    layer = 9
    sha256 = '0'*64

    def __init__(self, d_model): self.d_model = d_model

    def directions(self, features):
        return torch.randn(len(features), self.d_model, generator=torch.Generator().manual_seed(0))


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--preset', default='smollm2-135m')
    p.add_argument('--width', type=int, default=576, help="the explainer's hidden size")
    p.add_argument('--batch', type=int, default=8)
    p.add_argument('--repeats', type=int, default=12)
    p.add_argument('--json', type=Path, help='append the row here')
    p.add_argument('--cpu-time', action='store_true',
                   help='count processor time instead of wall time, on a machine that does other work too')
    return p.parse_args()


def make_trainer(name, width, batch): # on `batch` features with the same label
    preset = load_preset(name, sft_batch=batch, sft_accumulation=1)
    reader = Directions(width)
    label = "words such as 'pass', 'passing', 'passed'"
    features = [SimpleNamespace(id=SimpleNamespace(index=i), explanation=label) for i in range(batch)]
    explainer = Explainer.from_preset(preset, reader)
    rows = sft_dataset(features, explainer.card)
    with tempfile.TemporaryDirectory() as folder:
        trainer = sft_trainer(preset, rows, reader, explainer, folder, progress=False)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer_and_scheduler(100)
    return trainer, explainer.card


def timed_step(trainer, batch, clock): # seconds
    start = clock()
    with labels_only(): trainer.training_step(trainer.model, dict(batch)) # as train_sft runs it
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    if batch['input_ids'].is_cuda: torch.cuda.synchronize()
    return clock() - start


def main():
    a = arguments()
    clock = time.process_time if a.cpu_time else time.perf_counter
    trainer, card = make_trainer(a.preset, a.width, a.batch)
    injected = next(iter(trainer.get_train_dataloader()))
    bare = {name: value for name, value in injected.items() if name != 'feature_vector'}
    batches = {'with injection': injected, 'without': bare}
    body = trainer.model.get_base_model().base_model
    token = trainer.data_collator.placeholder_id
    times = {name: [] for name in batches}
    for i in range(a.repeats + 1): # the first round warms up
        for name in sorted(batches, reverse=i % 2):
            if body.injector: body.injector.remove()
            if name == 'with injection': Injector(trainer.model, token, card.layer, card.coefficient)
            seconds = timed_step(trainer, batches[name], clock)
            if i: times[name].append(seconds)
    tokens = injected['attention_mask'].sum().item()
    with_injection = statistics.median(times['with injection'])
    without = statistics.median(times['without'])
    print(f'training step, batch {a.batch}, {tokens} tokens: {with_injection:.3f} s with injection '
          f'({tokens/with_injection:.0f} tok/s), {without:.3f} s without')
    result = row('training step with the injection', 'the same step without it', without/with_injection, .97)
    return finish([result], a.json)


if __name__ == '__main__': sys.exit(main())
