"""Searching the clamps that reach given KLs, against the bisection of public implementations: one amplitude per forward pass, on whole numbers.

    python bench/kl_search.py [--preset smollm2-135m] [--features 16] [--cpu-time] [--json FILE]

Both reach for the preset's four KLs of each feature, over the same prompts and with the same measure; counted are forward passes of the model (early exits too) and the
distance of the KL that was reached, relative to the one that was wanted. Fails where ours does not need four times fewer passes, or where its misses are larger.
"""
import argparse, sys, time
from pathlib import Path
import numpy as np
from record import finish, in_turns, row
from saeexplainer.features import load_features
from saeexplainer.lm.hooks import backbone
from saeexplainer.presets import load_preset
from saeexplainer.steering import steered_kls
from saeexplainer.target import Target


def bisection(kl_at, wanted, sign, most=4096): # doubling, then halving the interval of whole numbers; the closer end
    low, high, kls = 0, 1, {0: 0.}
    kls[1] = kl_at(sign)
    while kls[high] < wanted and high < most: low, high = high, 2*high; kls[high] = kl_at(sign*high)
    while high - low > 1:
        middle = (low + high)//2
        kls[middle] = kl_at(sign*middle)
        low, high = (middle, high) if kls[middle] < wanted else (low, middle)
    return min((kls[low], kls[high]), key=lambda kl: abs(kl - wanted))


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--preset', default='smollm2-135m'); p.add_argument('--features', type=int, default=16)
    p.add_argument('--cpu-time', action='store_true', help="the process' own time instead of the wall's: for a busy machine")
    p.add_argument('--json', type=Path, help='append the rows here')
    a = p.parse_args()
    now, preset = time.process_time if a.cpu_time else time.perf_counter, load_preset(a.preset, size='full')
    target, passes = Target.load(preset), []
    backbone(target.model).register_forward_pre_hook(lambda *_: passes.append(1))
    alive = [f.index for f in load_features(preset) if f.status=='ok']
    features = np.random.default_rng(0).choice(alive, a.features, replace=False).tolist()
    kls = preset.steering_kl

    def counted(fn): # passes and KLs
        passes.clear(); target.search._kept.clear()
        return fn(), len(passes)
    def ours(): return [abs(v.kl) for f in features for v in target.steering_values(f, kls, preset.steering_prompts)]
    def theirs():
        clean = target.search.clean_run(preset.steering_prompts, 'raw')
        return [bisection(lambda v: steered_kls(target.model, target.reader, clean, f, [v])[0], abs(kl), 1 if kl > 0 else -1) for f in features for kl in kls]
    t, out = in_turns(dict(theirs=lambda: counted(theirs), ours=lambda: counted(ours)), 1, now)
    wanted = np.abs(np.tile(kls, a.features))
    miss = {name: np.abs(np.array(found) - wanted)/wanted for name, (found, _) in out.items()}
    for name, (_, n) in out.items():
        print(f'{name:7} {n/a.features:6.1f} passes and {t[name]/a.features:5.2f} s a feature; miss: mean {miss[name].mean():.3f}, largest {miss[name].max():.3f}, '
              f'within 5%: {(miss[name] <= .05).mean():.0%}')
    rows = [row('forward passes of a KL search', 'bisection, one amplitude a pass, whole numbers', out['theirs'][1]/out['ours'][1], 4.),
            row('miss of a KL search, mean', 'bisection, one amplitude a pass, whole numbers', miss['theirs'].mean()/miss['ours'].mean(), 1.),
            row('time of a KL search', 'bisection, one amplitude a pass, whole numbers', t['theirs']/t['ours'], 1.)]
    return finish(rows, a.json)


if __name__=='__main__': sys.exit(main())
