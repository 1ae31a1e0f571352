"Code in forks of a process that has imported all it needs: it begins at once, and may be killed at any moment"
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

SERVER = '''
import gc, json, os, sys
import datasets, matplotlib.figure, pandas, peft, sae_lens, torch, transformers, trl
from saeexplainer import ablations, cli, dictionaries, dpo, metrics, prefs, remote, report, run, sft, target, writer

tests, stdout, stderr = sys.argv[1:]
sys.path.insert(0, tests)

def redirect(number, file): os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)

def attempt(code, threads):
    torch.set_num_threads(threads)
    redirect(1, stdout)
    redirect(2, stderr)
    try: exec(code, {})
    except SystemExit as e: return e.code or 0
    finally: sys.stdout.flush()
    return 0

gc.collect()
gc.freeze()
print('ready', flush=True)
for line in sys.stdin:
    child = os.fork() # this process has computed nothing yet
    if not child: os._exit(attempt(**json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
'''


class Forks:
    "A process to fork, one fork at a time"
    def __init__(self, process, stdout, stderr):
        self.process = process
        self.stdout = stdout # files of what the last one has printed
        self.stderr = stderr

    def start(self, code) -> int: # process id
        asked = dict(code=code, threads=torch.get_num_threads()) # as many as here, where it is compared
        self.process.stdin.write(json.dumps(asked) + '\n')
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def exit_code(self) -> int:
        "Wait for the end of the last one"
        return int(self.process.stdout.readline())

    def run(self, code) -> int: # exit code
        self.start(code)
        return self.exit_code()

    def printed(self) -> str:
        return self.stdout.read_text()

    def errors(self) -> str:
        "The end of what it has printed as errors"
        return self.stderr.read_text()[-2000:]


@contextmanager
def forks_in(folder):
    "Within, there is a process to fork"
    files = [folder/'stdout', folder/'stderr']
    command = [sys.executable, '-c', SERVER, Path(__file__).parent, *files]
    environment = os.environ | dict(OMP_NUM_THREADS='1')
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True, env=environment) as process:
        assert process.stdout.readline() == 'ready\n'
        yield Forks(process, *files)
        process.stdin.close()


def calling(arguments, data) -> str:
    "Code that calls the command, with a folder for what is shipped"
    return f'''
import os
os.environ['SAEEXPLAINER_DATA'] = {str(data)!r}
from saeexplainer.cli import main
main({arguments!r})
'''


def is_alive(pid:int) -> bool:
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return True


def kill(pid:int):
    "End a process as a power cut would; it may have ended"
    with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
