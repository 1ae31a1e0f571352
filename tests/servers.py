"What the tests of a writer behind a server share: the key, the requests, the writer, and servers that end in time"
import threading, time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    "A writer that is quick to lose its patience"
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


class Flood(BaseHTTPRequestHandler):
    "Sends what `server.parts()` yields, which may have no end"
    protocol_version = 'HTTP/1.1'

    def do_POST(self):
        self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.send_response(self.server.status)
        for name, value in self.server.headers.items(): self.send_header(name, value)
        self.end_headers()
        try:
            for part in self.server.parts(): self.wfile.write(part)
        except OSError: pass # the client had enough
        self.close_connection = True

    def do_GET(self): self.do_POST()
    def log_message(self, *_): pass


class FloodServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, parts, status, headers):
        self.parts = parts
        self.status = status
        self.headers = {'Content-Type': 'application/json', 'Connection': 'close'} | headers
        super().__init__(('127.0.0.1', 0), Flood)
        threading.Thread(target=self.serve_forever, args=[.02], daemon=True).start()

    @property
    def url(self): return f'http://127.0.0.1:{self.server_port}/v1'

    def end(self):
        self.shutdown()
        self.server_close()


@contextmanager
def flooding():
    "`start(parts, status, **headers)` -> a server that sends what `parts()` yields; they end with the block"
    servers = []
    def start(parts, status=200, **headers):
        servers.append(FloodServer(parts, status, headers))
        return servers[-1]
    try: yield start
    finally:
        for server in servers: server.end()


def drip():
    "A body that never ends, and comes in drops"
    while True:
        yield b' '
        time.sleep(.05)
