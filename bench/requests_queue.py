"""A hundred thousand requests in one call of a writer: does memory stay flat?

    python bench/requests_queue.py [--requests 100000] [--concurrency 64] [--json FILE]

The server (tests/fault_server.py, a process of its own) answers at once, and a tenth of its attempts go wrong. Requests
come from a generator, replies are let go of. The ratio is the resident memory after a tenth of the requests to the
largest of all readings after it: 1 is flat. Fails below .95; fails, too, where a request has no outcome.
"""
import os, subprocess, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path
from record import finish, options, row
from saeexplainer.replies import Request
from saeexplainer.store import RunStore
from saeexplainer.writers.openai import OpenAIWriter

SERVER = Path(__file__).parents[1]/'tests'/'fault_server.py'
KINDS = '429,500,closed,cut,bad_body,refusal' # of faults: those that cost no waiting


def arguments():
    parser = options(__doc__)
    parser.add_argument('--requests', type=int, default=100_000)
    parser.add_argument('--concurrency', type=int, default=64)
    return parser.parse_args()


@contextmanager
def fault_server(): # -> its URL
    "A server that answers at once, and wrongly a tenth of the time"
    command = [sys.executable, SERVER, '--faults', '.1', '--kinds', KINDS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try: yield server.stdout.readline().strip()
        finally: server.kill()

def resident(): # -> MB, now; Linux
    "Return the memory of this process"
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages*os.sysconf('SC_PAGE_SIZE')/1e6

def memory_while_writing(writer, n): # -> 20 readings in MB
    "Ask for `n` texts; look at the memory after each twentieth of them"
    requests = (Request(f'Write about #{i}.', seed=i) for i in range(n))
    readings = []
    for done, _ in enumerate(writer.stream(requests, total=n, progress=True), 1):
        if done % max(1, n//20) == 0: readings.append(resident())
    return readings


def main():
    args = arguments()
    with (fault_server() as url, tempfile.TemporaryDirectory() as folder,
          RunStore(f'{folder}/store.sqlite') as store):
        writer = OpenAIWriter('small', base_url=url, store=store, concurrency=args.concurrency)
        began = time.perf_counter()
        readings = memory_while_writing(writer, args.requests)
        seconds = time.perf_counter() - began
        book = store.accounts()[writer.name]['']
        stored = Path(f'{folder}/store.sqlite').stat().st_size/1e6

    early = readings[1]
    late = max(readings[2:])
    per_second = args.requests/seconds
    print(f'{args.requests:,} replies in {seconds:.0f} s ({per_second:.0f}/s), '
          f'{sum(book["attempts"].values()):,} attempts; memory {early:.0f} MB after a tenth, '
          f'{late:.0f} MB at most after it; store {stored:.0f} MB')
    if sum(book['outcomes'].values()) != args.requests:
        raise SystemExit(f'{args.requests} requests, but {book["outcomes"]}')
    result = row(f'memory after a tenth of {args.requests:,} queued requests', 'the most after it', early/late, .95,
                 megabytes=round(late), per_second=round(per_second))
    return finish([result], args.json)


if __name__ == '__main__': sys.exit(main())
