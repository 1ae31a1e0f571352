"""Searching the clamps that reach given KLs, against the bisection of public implementations.

    python bench/kl_search.py [--preset smollm2-135m] [--features 16] [--cpu-time] [--json FILE]

Theirs tries one amplitude a forward pass, on whole numbers. Both reach for the preset's four KLs of each feature, over
the same prompts and with the same measure. Counted are forward passes of the model (early exits too) and the distance
of the KL that was reached, relative to the one that was wanted. Recorded are the ratios of passes, of mean distances
and of seconds, theirs to ours. Fails where ours does not need four times fewer passes, or where its misses are larger.
"""
import sys
import numpy as np
from record import finish, in_turns, model_options, row
from saeexplainer.features import load_features
from saeexplainer.lm.hooks import backbone
from saeexplainer.presets import load_preset
from saeexplainer.steering import steered_kls
from saeexplainer.target import Target

BISECTION = 'bisection, one amplitude a pass, whole numbers'


def arguments():
    parser = model_options(__doc__)
    parser.add_argument('--features', type=int, default=16)
    return parser.parse_args()


def bisection(kl_at, wanted, sign, most=4096): # -> the KL that was reached
    "Double a whole number, then halve the interval; the end whose KL is closer to the wanted one"
    kls = {0: 0.}
    def measure(amplitude): # -> KL
        kls[amplitude] = kl_at(sign*amplitude)
        return kls[amplitude]
    low = 0
    high = 1
    while measure(high) < wanted and high < most:
        low = high
        high *= 2
    while high - low > 1:
        middle = (low + high)//2
        if measure(middle) < wanted: low = middle
        else: high = middle
    return min((kls[low], kls[high]), key=lambda kl: abs(kl - wanted))


def by_bisection(target, features, preset): # -> KLs
    clean = target.search.clean_run(preset.steering_prompts, 'raw')
    def reached(feature, wanted): # -> KL
        def kl_at(value): return steered_kls(target.model, target.reader, clean, feature, [value])[0]
        return bisection(kl_at, abs(wanted), 1 if wanted > 0 else -1)
    return [reached(feature, wanted) for feature in features for wanted in preset.steering_kl]

def by_our_search(target, features, preset): # -> KLs
    found = [target.steering_values(feature, preset.steering_kl, preset.steering_prompts) for feature in features]
    return [abs(clamp.kl) for clamps in found for clamp in clamps]


def main():
    args = arguments()
    preset = load_preset(args.preset, size='full')
    target = Target.load(preset)
    alive = [f.index for f in load_features(preset) if f.status == 'ok']
    features = np.random.default_rng(0).choice(alive, args.features, replace=False).tolist()

    passes = []
    backbone(target.model).register_forward_pre_hook(lambda *_: passes.append(1))
    def counted(search): # -> (KLs, passes)
        passes.clear()
        target.search._kept.clear()
        return search(target, features, preset), len(passes)
    ways = dict(theirs=lambda: counted(by_bisection), ours=lambda: counted(by_our_search))
    seconds, found = in_turns(ways, 1, args.clock)

    wanted = np.abs(np.tile(preset.steering_kl, args.features))
    needed = {name: n for name, (_, n) in found.items()}
    miss = {name: np.abs(np.array(kls) - wanted)/wanted for name, (kls, _) in found.items()}
    for name in ways:
        print(f'{name:7} {needed[name]/args.features:6.1f} passes and {seconds[name]/args.features:5.2f} s a feature; '
              f'miss: mean {miss[name].mean():.3f}, largest {miss[name].max():.3f}, '
              f'within 5%: {(miss[name] <= .05).mean():.0%}')
    return finish([
        row('forward passes of a KL search', BISECTION, needed['theirs']/needed['ours'], 4.),
        row('miss of a KL search, mean', BISECTION, miss['theirs'].mean()/miss['ours'].mean(), 1.),
        row('time of a KL search', BISECTION, seconds['theirs']/seconds['ours'], 1.),
    ], args.json)


if __name__ == '__main__': sys.exit(main())
