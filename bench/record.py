"The rows of a benchmark: printed, appended to a JSON file where one is given, and held against what they must reach"
import json, statistics, time
import torch
from saeexplainer.results import git_commit


def row(what, against, value, least, **more): return dict(what=what, against=against, value=round(float(value), 4), least=least, **more)

def finish(rows, file=None) -> int: # exit code: 1 where a row misses its least value
    for r in rows: print(f"{'ok  ' if r['value'] >= r['least'] else 'MISS'} {r['value']:7.3g}  (at least {r['least']:g})  {r['what']} / {r['against']}")
    machine = dict(device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu', threads=torch.get_num_threads(), torch=torch.__version__, commit=git_commit())
    rows = [r | machine for r in rows]
    if file: file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else []) + rows, indent=1) + '\n')
    return 0 if all(r['value'] >= r['least'] for r in rows) else 1

def in_turns(ways, repeats, now=time.perf_counter): # {name: function} -> ({name: median seconds}, {name: latest result}); a first round warms up
    seconds, results = {name: [] for name in ways}, {}
    for _ in range(repeats + 1):
        for name, fn in ways.items():
            start = now(); results[name] = fn()
            if torch.cuda.is_available(): torch.cuda.synchronize()
            seconds[name].append(now() - start)
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}, results
