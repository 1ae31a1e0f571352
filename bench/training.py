"""A training step of the explainer with the injection, against the same step without it.

    python bench/training.py [--preset smollm2-135m] [--batch 8] [--repeats 12] [--cpu-time] [--json FILE]

One step is trl's: forward, completion-only loss, backward and optimizer, LoRA on all linear layers. Both kinds take
turns in one process, on the same batch. Recorded is the ratio of median seconds, without the injection to with it.
Fails where the injection costs more than 3%.
"""
import statistics, sys, tempfile
from types import SimpleNamespace
import torch
from record import finish, model_options, row, timed
from saeexplainer.explainer import Explainer
from saeexplainer.injection import Injector
from saeexplainer.presets import load_preset
from saeexplainer.sft import sft_dataset, sft_trainer
from saeexplainer.training import labels_only


class Directions:
    "Stands for an SAE: random vectors of the model's width"
    layer = 9
    sha256 = '0'*64

    def __init__(self, d_model): self.d_model = d_model

    def directions(self, features):
        return torch.randn(len(features), self.d_model, generator=torch.Generator().manual_seed(0))


def arguments():
    parser = model_options(__doc__)
    parser.add_argument('--width', type=int, default=576, help="the explainer's hidden size")
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--repeats', type=int, default=12)
    return parser.parse_args()


def make_trainer(name, width, batch): # -> (trainer, card of its explainer)
    "Return what `train_sft` trains with, on `batch` features with the same label"
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


def step(trainer, batch):
    "Train one step, as train_sft runs it"
    with labels_only(): trainer.training_step(trainer.model, dict(batch))
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def main():
    args = arguments()
    trainer, card = make_trainer(args.preset, args.width, args.batch)
    injected = next(iter(trainer.get_train_dataloader()))
    bare = {name: value for name, value in injected.items() if name != 'feature_vector'}
    batches = {'with injection': injected, 'without': bare}
    body = trainer.model.get_base_model().base_model
    token = trainer.data_collator.placeholder_id
    times = {name: [] for name in batches}
    for i in range(args.repeats + 1): # the first round warms up
        for name in sorted(batches, reverse=i % 2):
            if body.injector: body.injector.remove()
            if name == 'with injection': Injector(trainer.model, token, card.layer, card.coefficient)
            seconds, _ = timed(lambda name=name: step(trainer, batches[name]), args.clock)
            if i: times[name].append(seconds)
    tokens = injected['attention_mask'].sum().item()
    with_injection = statistics.median(times['with injection'])
    without = statistics.median(times['without'])
    print(f'training step, batch {args.batch}, {tokens} tokens: {with_injection:.3f} s with injection '
          f'({tokens/with_injection:.0f} tok/s), {without:.3f} s without')
    result = row('training step with the injection', 'the same step without it', without/with_injection, .97)
    return finish([result], args.json)


if __name__ == '__main__': sys.exit(main())
