"Servers that say too much, or what is secret; and processes that die between a reply and its place in the store"
import gzip, json, os, resource, shutil, signal, ssl, subprocess, time
import pytest
from saeexplainer.store import RunStore
from saeexplainer.writers.errors import MOST_BYTES
from saeexplainer.writers.openai import OpenAIWriter
from saeexplainer.writers.parsing import text_schema
from fault_server import FaultServer
from servers import KEY, PRICES, drip, flooding, plant_key, requests, serving, writer_at
from writer_server import Server, completion, error

pytestmark = pytest.mark.slow
HASTE = dict(patience=.3, tries=2)
LISTS = text_schema({'samples': 2})
MUCH = f'a reply of more than {MOST_BYTES//10**6} MB'


@pytest.fixture(autouse=True)
def environment(monkeypatch): plant_key(monkeypatch)


@pytest.fixture
def serve():
    with serving(**HASTE) as start: yield start


@pytest.fixture
def flood():
    with flooding() as start: yield start


# ---- too much

def peak(act) -> float:
    "MB that this process grows by"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    act()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024


def test_a_body_without_end_is_an_outcome(flood):
    def endless():
        while True: yield b' '*10**6
    writer = writer_at(flood(endless), timeout=20., prices=PRICES, **HASTE)
    assert peak(lambda: writer.write(requests(1))) < 100
    reply, = writer.write(requests(1))
    assert (reply.outcome, reply.error, reply.attempts) == ('unparsed', MUCH, 1)
    assert reply.cached
    (most,), = writer.store.rows('SELECT sum(most_tokens) FROM attempts')
    assert writer.store.spent(PRICES['small'])[1] == most


def packed_server(flood, packed):
    return flood(lambda: [packed], **{'Content-Encoding': 'gzip', 'Content-Length': str(len(packed))})


def test_a_small_body_that_unpacks_to_a_large_one(flood):
    packed = gzip.compress(b' '*400_000_000)
    assert len(packed) < 500_000
    writer = writer_at(packed_server(flood, packed), timeout=20., **HASTE)
    assert peak(lambda: writer.write(requests(1))) < 200
    assert writer.write(requests(1))[0].error == MUCH


def test_a_body_that_unpacks_to_a_reply(flood):
    packed = gzip.compress(json.dumps(completion('fine')).encode())
    assert writer_at(packed_server(flood, packed), **HASTE).write(requests(1))[0].text == 'fine'


def test_an_error_without_end_is_the_error(flood):
    def endless():
        yield b'{"detail": "no such thing'
        while True: yield b'!'*10**6
    writer = writer_at(flood(endless, status=400), timeout=20., **HASTE)
    with pytest.raises(ValueError, match='error 400: .*no such thing!'): writer.write(requests(1))


def test_a_drip_ends_with_the_timeout(flood):
    began = time.monotonic()
    reply, = writer_at(flood(drip), **HASTE | dict(timeout=.5)).write(requests(1))
    assert time.monotonic() - began < 10
    assert reply.outcome == 'failed'
    assert 'no reply in 0.5 s' in reply.error


@pytest.mark.parametrize('status', [200, 400])
@pytest.mark.parametrize('body', [
    b'<title>'*500_000,
    b'<'*3_500_000,
    b'{"a":'*600_000,
    json.dumps(dict(detail=[['x'*100]*20]*1500)).encode(),
    json.dumps(dict(error='e'*3_500_000)).encode()], ids=['titles', 'marks', 'objects', 'list', 'letters'])
def test_a_long_error_costs_little(flood, body, status):
    writer = writer_at(flood(lambda: [body], status), patience=.3, tries=8)
    began = time.process_time()
    with pytest.raises((ValueError, ConnectionError)) as e: writer.write(requests(1))
    assert time.process_time() - began < 8 # four times
    assert len(str(e.value)) < 700


@pytest.mark.parametrize('form', [dict(), dict(schema=LISTS), dict(choices=['A', 'B'])])
def test_a_text_far_beyond_what_was_asked_for_is_no_text(serve, form):
    server, writer = serve(lambda asked, n: 'A very long story. '*20_000)
    reply, = writer.write(requests(1), **form)
    assert reply.outcome == 'unparsed'
    assert reply.text is None
    assert reply.error == 'a text of 380,000 characters, where 64 tokens were asked for'
    assert len(server.asked) == 1
    path = writer.store.path
    assert os.path.getsize(path) + os.path.getsize(f'{path}-wal') < 300_000


def test_a_text_that_many_tokens_may_be_is_one(serve):
    _, writer = serve(lambda asked, n: 'A long story. '*1000)
    assert len(writer.write(requests(1))[0].text) == 13_999


# ---- secrets

@pytest.mark.parametrize('spell', [
    lambda key: ''.join(f'\\u{ord(c):04x}' for c in key),
    lambda key: '\\u0073' + key[1:],
    lambda key: key.replace('-', '\\u002D')])
def test_a_key_in_json_escapes_is_hidden(serve, spell, tmp_path):
    key = spell(KEY)
    says = [f'{{"samples": ["it is {key}", "b"]}}', f'{{"{key}": 1, "samples": ["a", "b"]}}']
    store = RunStore(tmp_path/'s.sqlite')
    _, writer = serve(lambda asked, n: says[min(n, 2) - 1], store=store, concurrency=1)
    first, second = writer.write(requests(2), schema=LISTS)
    assert json.loads(first.text)['samples'] == ['it is ***', 'b']
    assert second.outcome == 'unparsed'
    assert '***' in second.error
    for file in tmp_path.iterdir(): assert KEY.encode() not in file.read_bytes()


@pytest.mark.parametrize('key, says, shown', [
    ('abc', 'wrong key abc, and abcd', 'wrong key ***, and abcd'),
    ('x', 'the key x is wrong, x!', 'the key *** is wrong, ***!'),
    ('test', 'wrong key: test', 'wrong key: ***'),
    (KEY, f'{KEY[:8]} {KEY[8:]} is wrong', '*** is wrong'),
    (KEY, f'{KEY[:8]}\n    {KEY[8:12]}\n{KEY[12:]} is wrong', '*** is wrong'),
    ('a"b\\c-0123456789abcdef', 'a"b\\c-0123456789abcdef', '***')])
def test_a_key_in_an_error_is_hidden(serve, monkeypatch, key, says, shown):
    monkeypatch.setenv('OPENAI_API_KEY', key)
    _, writer = serve(lambda asked, n: error(401, says))
    with pytest.raises(PermissionError) as e: writer.write(requests(1))
    assert f'error 401: {shown})' in str(e.value)


@pytest.fixture
def certified(tmp_path):
    "(an HTTPS server, the certificate that it signed itself)"
    if not shutil.which('openssl'): pytest.skip('no openssl here')
    key = tmp_path/'key.pem'
    certificate = tmp_path/'cert.pem'
    names = ['-subj', '/CN=localhost', '-addext', 'subjectAltName=IP:127.0.0.1']
    command = ['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-keyout', key, '-out', certificate, *names]
    subprocess.run([*command, '-days', '2'], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with Server(lambda asked, n: 'fine') as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        yield server, certificate


def test_a_certificate_that_is_not_trusted_is_named(certified, monkeypatch):
    server, certificate = certified
    url = server.url.replace('http', 'https')
    says = 'the certificate of https://127.0.0.1:.* is not trusted .*certificate verify failed'
    with pytest.raises(ConnectionError, match=says):
        OpenAIWriter('small', base_url=url, pause=.05).write(requests(2))
    monkeypatch.setenv('SSL_CERT_FILE', str(certificate))
    assert OpenAIWriter('small', base_url=url).write(requests(1))[0].text == 'fine'


# ---- killed between a reply and its place in the store

def write_and_die(server, path, commit):
    "In a process of its own, which kills itself at this commit"
    store = RunStore(path)
    left = [commit]
    def count(statement):
        if statement.startswith('BEGIN'): left[0] -= 1
        if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
    store._db.set_trace_callback(count)
    writer_at(server, store=store, concurrency=1, **HASTE).write(requests(12))


@pytest.mark.parametrize('commit', range(2, 24, 3))
def test_kill_9_at_any_commit_leaves_no_reply_paid_and_lost(tmp_path, commit):
    path = tmp_path/'s.sqlite'
    with FaultServer() as server:
        child = os.fork()
        if child == 0:
            try: write_and_die(server, path, commit)
            finally: os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with RunStore(path) as store:
        delivered, = store.rows("SELECT count(*) FROM attempts WHERE outcome = 'delivered'")
        assert store.count('replies') == delivered[0]
