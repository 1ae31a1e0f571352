"""llama.cpp's server with the embedded model: an OpenAI-compatible server with a real model, grammar included, that needs no key and no network.

Prints its URL once it is ready and goes on until SIGTERM or Ctrl-C. Needs the wheel of llama.cpp's server: pip install xllamacpp
"""
import argparse, os, signal, sys
from importlib.util import find_spec

os.environ.setdefault('OMP_WAIT_POLICY', 'passive') # threads that spin are faster on an idle machine ('active'), many times slower beside another busy process
from saeexplainer.lm.models import embedded_gguf

ALIAS = 'smollm2-135m'

def serve(port, slots, threads, context):
    "The running server; it stops with the object"
    import xllamacpp
    p = xllamacpp.CommonParams()
    p.model.path, p.model_alias, p.hostnames, p.port = str(embedded_gguf()), {ALIAS}, ['127.0.0.1'], port
    p.n_parallel, p.n_ctx = slots, slots*context
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
    p.n_threads_http = slots + 4 # a thread per connection
    p.cache_prompt, p.cache_ram_mib = False, 0 # a seed gives the same text, whatever was asked before
    p.n_gpu_layers, p.ui, p.verbosity = 0, False, 1
    return xllamacpp.Server(p)

if __name__ == '__main__':
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('--port', type=int, default=0, help='0: any that is free')
    a.add_argument('--slots', type=int, default=16, help='requests answered at once; more wait')
    a.add_argument('--threads', type=int, default=2)
    a.add_argument('--context', type=int, default=1024, help='tokens of prompt and answer, per slot; a multiple of 256')
    a = a.parse_args()
    if find_spec('xllamacpp') is None:
        print('xllamacpp is not installed: pip install xllamacpp', file=sys.stderr)
        sys.exit(2)
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop) # before the server starts its threads
    server = serve(a.port, a.slots, a.threads, a.context)
    print(f'{server.listening_address}/v1', flush=True)
    signal.sigwait(stop)
