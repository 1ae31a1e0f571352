"""A training step of the explainer with the injection, against the same step without it.

    python bench/training.py [--preset smollm2-135m] [--batch 8] [--repeats 12] [--json FILE]

One step is trl's: forward, completion-only loss, backward and optimizer, LoRA on all linear layers. Both kinds take turns in one process, on the same
batch; the ratio is that of the medians. Fails where the injection costs more than 3%.
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
    def __init__(self, d_model):
        self.d_model, self.layer, self.sha256 = d_model, 9, '0'*64
    def directions(self, features): return torch.randn(len(features), self.d_model, generator=torch.Generator().manual_seed(0))


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--preset', default='smollm2-135m'); p.add_argument('--width', type=int, default=576, help="the explainer's hidden size")
    p.add_argument('--batch', type=int, default=8); p.add_argument('--repeats', type=int, default=12)
    p.add_argument('--json', type=Path, help='append the row here')
    p.add_argument('--cpu-time', action='store_true', help='count processor time instead of wall time, on a machine that does other work too')
    a = p.parse_args()
    clock = time.process_time if a.cpu_time else time.perf_counter
    preset, reader = load_preset(a.preset, sft_batch=a.batch, sft_accumulation=1), Directions(a.width)
    features = [SimpleNamespace(id=SimpleNamespace(index=i), explanation="words such as 'pass', 'passing', 'passed'") for i in range(a.batch)]
    explainer = Explainer.from_preset(preset, reader)
    card = explainer.card
    with tempfile.TemporaryDirectory() as folder:
        trainer = sft_trainer(preset, sft_dataset(features, card), reader, explainer, folder, progress=False)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer_and_scheduler(100)
    injected = next(iter(trainer.get_train_dataloader()))
    batches = {'with injection': injected, 'without': {k: v for k, v in injected.items() if k != 'feature_vector'}}
    body, token = trainer.model.get_base_model().base_model, trainer.data_collator.placeholder_id
    times = {name: [] for name in batches}
    for i in range(a.repeats + 1): # the first round warms up
        for name in sorted(batches, reverse=i % 2):
            if body.injector: body.injector.remove()
            if name == 'with injection': Injector(trainer.model, token, card.layer, card.coefficient)
            start = clock()
            with labels_only(): trainer.training_step(trainer.model, dict(batches[name])) # as train_sft runs it
            trainer.optimizer.step(); trainer.optimizer.zero_grad()
            if injected['input_ids'].is_cuda: torch.cuda.synchronize()
            if i: times[name].append(clock() - start)
    medians, tokens = {name: statistics.median(t) for name, t in times.items()}, injected['attention_mask'].sum().item()
    print(f"training step, batch {a.batch}, {tokens} tokens: {medians['with injection']:.3f} s with injection ({tokens/medians['with injection']:.0f} tok/s), "
          f"{medians['without']:.3f} s without")
    return finish([row('training step with the injection', 'the same step without it', medians['without']/medians['with injection'], .97)], a.json)


if __name__ == '__main__': sys.exit(main())
