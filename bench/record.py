"What the benchmarks share: options, ways that take turns, and rows that are printed, recorded and held to a minimum"
import argparse, json, statistics, time
from pathlib import Path
import torch
from saeexplainer.results import git_commit


def options(doc): # of a script -> parser
    "Return a parser that is described by the first line of a text, with the option that all scripts have"
    parser = argparse.ArgumentParser(description=doc.split('\n')[0])
    parser.add_argument('--json', type=Path, help='append the rows here')
    return parser

def model_options(doc): # of a script -> parser
    "Return a parser for a script that runs a model of a preset; `clock` is the function that tells the time"
    parser = options(doc)
    parser.add_argument('--preset', default='smollm2-135m')
    parser.add_argument('--cpu-time', dest='clock', action='store_const', const=time.process_time,
                        default=time.perf_counter, help="the process' own time, not the wall's: for a busy machine")
    return parser


def timed(fn, clock): # function without arguments -> (seconds, result)
    "Run a function to its end, on a GPU too"
    start = clock()
    result = fn()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return clock() - start, result

def in_turns(ways, repeats, clock): # {name: function} -> ({name: median seconds}, {name: latest result})
    "Time several ways to the same result, in turns; a first round warms up, and every other round runs backwards"
    seconds = {name: [] for name in ways}
    results = {}
    names = list(ways)
    for i in range(repeats + 1):
        for name in reversed(names) if i % 2 else names:
            spent, results[name] = timed(ways[name], clock)
            if i: seconds[name].append(spent)
    return {name: statistics.median(spent) for name, spent in seconds.items()}, results


def row(what, against, value, least, **more): # -> dict
    "Return a row of the results: a ratio, what it compares, and what it must reach"
    return dict(what=what, against=against, value=round(float(value), 4), least=least, **more)

def machine(): # -> dict
    "Return on what, and with which code, a row was measured"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'
    return dict(device=device, threads=torch.get_num_threads(), torch=torch.__version__, commit=git_commit())

def finish(rows, file=None): # -> exit code: 1 where a row misses its least value
    "Print the rows, and append them to a JSON file where one is given"
    for r in rows:
        verdict = 'ok  ' if r['value'] >= r['least'] else 'MISS'
        print(f"{verdict} {r['value']:7.3g}  (at least {r['least']:g})  {r['what']} / {r['against']}")
    if file:
        before = json.loads(file.read_text()) if file.exists() else []
        after = before + [r | machine() for r in rows]
        file.write_text(json.dumps(after, indent=1) + '\n')
    return int(any(r['value'] < r['least'] for r in rows))
