"What the tests of a writer behind a server share: the key, the requests, the writer, and servers that end in time"
from contextlib import contextmanager
import pytest
from saeexplainer.replies import Request
from saeexplainer.writers.openai import OpenAIWriter
from fault_server import prompt_of
from writer_server import Server

KEY = 'sk-planted-0123456789'
PRICES = {'small': (1., 10.)} # dollars per million tokens
ELSEWHERE = ('OPENAI_BASE_URL', 'ALL_PROXY', 'HTTP_PROXY', 'HTTPS_PROXY', 'all_proxy', 'http_proxy', 'https_proxy')


def plant_key(monkeypatch):
    "The key in the environment, and nothing there that leads a request elsewhere"
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    for name in ELSEWHERE: monkeypatch.delenv(name, raising=False)


def writer_at(server, **how):
    return OpenAIWriter('small', base_url=server.url, **{'timeout': 3., 'pause': .05, 'patience': 1.} | how)


@contextmanager
def serving(**how):
    "`start(answer, **more)` -> a server that answers so, and a writer that asks it; the servers end with the block"
    servers = []
    def start(answer, **more):
        server = Server(answer)
        servers.append(server)
        return server, writer_at(server, **how | more)
    try: yield start
    finally:
        for server in servers: server.end()


class Outage:
    "The script of a server that is in trouble while `on`: with every request, or with those that hold `part`"
    def __init__(self, trouble, part='', on=True):
        self.trouble = trouble
        self.part = part
        self.on = on

    def __call__(self, asked, n):
        return self.trouble if self.on and self.part in prompt_of(asked) else 'ok'


def requests(n, start=0): return [Request(f'Write about #{i}.', seed=i) for i in range(start, start + n)]


def number_of(prompt) -> int: return int(prompt.rstrip('.').split('#')[1])


def line_of(kind, act, *args, **how) -> str:
    "The one line of the error that a call ends in"
    with pytest.raises(kind) as e: act(*args, **how)
    assert '\n' not in str(e.value)
    return str(e.value)
