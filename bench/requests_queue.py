"""A hundred thousand requests in one call of a writer: does memory stay flat?

    python bench/requests_queue.py [--requests 100000] [--concurrency 64] [--json FILE]

The server (tests/fault_server.py, a process of its own) answers at once, and a tenth of its attempts go wrong. Requests come from a generator, replies are let go of. The
ratio is the resident memory after a tenth of the requests to the largest of all readings after it: 1 is flat. Fails below .95; fails, too, where a request has no outcome.
"""
import argparse, os, subprocess, sys, tempfile, time
from pathlib import Path
from record import finish, row
from saeexplainer.store import RunStore
from saeexplainer.replies import Request
from saeexplainer.writers.openai import OpenAIWriter


def resident() -> float: # MB, now
    return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/1e6


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--requests', type=int, default=100_000); p.add_argument('--concurrency', type=int, default=64); p.add_argument('--json', type=Path, help='append the row here')
    a = p.parse_args()
    kinds = '429,500,closed,cut,bad_body,refusal' # those that cost no waiting
    with subprocess.Popen([sys.executable, Path(__file__).parents[1]/'tests'/'fault_server.py', '--faults', '.1', '--kinds', kinds], stdout=subprocess.PIPE, text=True) as server, \
            tempfile.TemporaryDirectory() as folder, RunStore(f'{folder}/store.sqlite') as store:
        try:
            writer = OpenAIWriter('small', base_url=server.stdout.readline().strip(), store=store, concurrency=a.concurrency)
            readings, began = [], time.perf_counter()
            for n, reply in enumerate(writer.stream((Request(f'Write about #{i}.', seed=i) for i in range(a.requests)), total=a.requests, progress=True), 1):
                if n % max(1, a.requests//20) == 0: readings.append(resident())
        finally: server.kill()
        seconds = time.perf_counter() - began
        book = store.accounts()[writer.name]['']
        size = Path(f'{folder}/store.sqlite').stat().st_size/1e6
    early, late = readings[1], max(readings[2:])
    print(f'{n:,} replies in {seconds:.0f} s ({n/seconds:.0f}/s), {sum(book["attempts"].values()):,} attempts; memory {early:.0f} MB after a tenth, {late:.0f} MB at most after it; store {size:.0f} MB')
    if sum(book['outcomes'].values()) != a.requests: raise SystemExit(f'{a.requests} requests, but {book["outcomes"]}')
    return finish([row(f'memory after a tenth of {a.requests:,} queued requests', 'the most after it', early/late, .95, megabytes=round(late), per_second=round(n/seconds))], a.json)


if __name__ == '__main__': sys.exit(main())
