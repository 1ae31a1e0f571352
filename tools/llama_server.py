"""llama.cpp's server with the embedded model: OpenAI-compatible, a real model, grammar included, no key and no network.

Prints its URL once it is ready and goes on until SIGTERM or Ctrl-C. Needs the wheel of llama.cpp's server: pip install
xllamacpp
"""
import argparse
import os
import signal
import sys
from importlib.util import find_spec

# threads that spin ('active') are faster on an idle machine, many times slower beside another busy process
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
from saeexplainer.lm.models import embedded_gguf

ALIAS = 'smollm2-135m'
STOP = {signal.SIGTERM, signal.SIGINT}


def serve(port, slots, threads, context):
    "Return the running server; it stops with the object"
    import xllamacpp
    p = xllamacpp.CommonParams()
    p.model.path = str(embedded_gguf())
    p.model_alias = {ALIAS}
    p.hostnames = ['127.0.0.1']
    p.port = port
    p.n_parallel = slots
    p.n_ctx = slots*context
    p.cpuparams.n_threads = threads
    p.cpuparams_batch.n_threads = threads
    p.n_threads_http = slots + 4  # a thread per connection
    p.cache_prompt = False  # a seed gives the same text, whatever was asked before
    p.cache_ram_mib = 0
    p.n_gpu_layers = 0
    p.ui = False
    p.verbosity = 1
    return xllamacpp.Server(p)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--port', type=int, default=0, help='0: any that is free')
    parser.add_argument('--slots', type=int, default=16, help='requests answered at once; more wait')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--context', type=int, default=1024,
                        help='tokens of prompt and answer, per slot; a multiple of 256')
    return parser.parse_args()


def main(args):
    "Serve until a signal comes"
    if find_spec('xllamacpp') is None:
        print('xllamacpp is not installed: pip install xllamacpp', file=sys.stderr)
        sys.exit(2)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)  # before the server starts its threads
    server = serve(args.port, args.slots, args.threads, args.context)
    print(f'{server.listening_address}/v1', flush=True)
    signal.sigwait(STOP)


if __name__ == '__main__': main(arguments())
