"A server in trouble, seen by a writer: trouble that passes, outages, and what no request can get around"
import asyncio, io, logging, time, traceback
from contextlib import redirect_stderr
import pytest
from saeexplainer.replies import Request
from saeexplainer.show import say
from saeexplainer.store import RunStore
from saeexplainer.writers.budget import BudgetSpent
from saeexplainer.writers.errors import retry_after
from saeexplainer.writers.openai import OpenAIWriter
from saeexplainer.writers.parsing import answers
from saeexplainer.writers.traffic import Traffic
from fault_server import FaultServer
from servers import KEY, PRICES, Outage, line_of, plant_key, requests, serving, writer_at
from writer_server import error

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def environment(monkeypatch): plant_key(monkeypatch)


@pytest.fixture
def serve():
    with serving(patience=.3) as start: yield start


def book(writer): return writer.store.accounts()[writer.name]['']


# ---- trouble that passes

@pytest.mark.parametrize('trouble', ['408', '409', '429', '500', '503', 'cut', 'reset', 'closed', 'bad_body', 'hang'])
def test_trouble_that_passes_is_tried_again(trouble):
    with FaultServer(lambda asked, n: trouble if n < 2 else 'ok') as server:
        reply, = writer_at(server, timeout=.5).write(requests(1))
        assert '#0' in reply.text
        assert reply.attempts == len(server.log) == 2


def test_retry_after_is_honoured(serve):
    busy = error(429, 'slow down', **{'Retry-After': 1})
    _, writer = serve(lambda asked, n: busy if n == 1 else 'fine')
    began = time.time()
    assert writer.write([Request('a')])[0].text == 'fine'
    assert 1 <= time.time() - began < 5


def test_a_retry_after_that_is_no_number_says_nothing():
    assert retry_after({'retry-after': 'soon'}) is None


def test_all_who_are_asked_to_wait_wait_together():
    said = []
    async def asked():
        traffic = Traffic(16, tries=8, pause=1., patience=600., say=said.append)
        for _ in range(16): assert traffic.wait(90., 'slow down')
        assert traffic.pauses.waited < 91
        assert not traffic.ending.error
        assert traffic.wait(120., 'slower')
        assert 119 < traffic.pauses.waited < 121 # a longer pause counts by what it adds
    asyncio.run(asked())
    assert said == ['slow down: next try in 90 s', 'slower: next try in 120 s']


def test_a_wait_that_is_too_long_stops_the_call(serve):
    busy = error(429, 'daily limit', **{'Retry-After': 43200})
    _, writer = serve(lambda asked, n: busy, patience=30)
    says = 'asks to wait .*daily limit.*43200 s more would be too long: run the same command again'
    with pytest.raises(ConnectionError, match=says): writer.write([Request('a')])


@pytest.mark.parametrize('status', [408, 502, 504, 524])
def test_what_a_gateway_gave_up_on_counts_at_its_most(serve, status):
    late = error(status, 'gateway time-out')
    _, writer = serve(lambda asked, n: late if n == 1 else 'fine', prices=PRICES)
    writer.write([Request('a')])
    assert book(writer)['perhaps_billed'] > 0
    assert writer.store.spent()[2] > writer.store.cost()


def test_what_a_server_says_does_not_drive_the_terminal(capfd):
    say('error 400: \x1b]0;owned\x07\x1b[2J')
    said = capfd.readouterr().err
    assert 'owned' in said
    assert not set('\x1b\x07') & set(said)


# ---- one request that always fails

POISON = '#7.'

@pytest.fixture(scope='module', params=[1, 4])
def poisoned(request):
    "(server, writer, replies, what was said) for twenty requests; the server fails at one of them"
    said = io.StringIO()
    with FaultServer(Outage('500', POISON)) as server, redirect_stderr(said):
        writer = writer_at(server, tries=3, concurrency=request.param)
        replies = writer.write(requests(20))
        yield server, writer, replies, said


def test_a_poisoned_request_fails_alone_and_blocks_nothing(poisoned):
    _, _, replies, said = poisoned
    assert [i for i, reply in enumerate(replies) if reply.outcome != 'ok'] == [7]
    assert replies[7].error.startswith('no reply in 3 tries (error 500')
    assert replies[7].attempts == 3
    assert 'in a row failed' not in said.getvalue()


def test_a_poisoned_request_is_asked_again_once(poisoned):
    "A failure is no answer, but the second one is remembered"
    server, writer, _, said = poisoned
    asked = len(server.log)
    def again(): return writer_at(server, store=writer.store, tries=3).write(requests(1, 7))[0]
    assert again().outcome == 'given up'
    assert len(server.log) == asked + 3
    assert again().cached
    assert len(server.log) == asked + 3
    assert book(writer)['outcomes'] == {'ok': 19, 'given up': 1}
    assert 'in a row failed' not in said.getvalue()


def test_a_stage_with_failures_keeps_the_rest_and_asks_for_them_once_more(tmp_path):
    outage = Outage('500', '#7.')
    with FaultServer(outage) as server, RunStore(tmp_path/'s.sqlite') as store:
        def stage(got):
            writer = writer_at(server, store=store, tries=2)
            for i, _ in answers(writer, enumerate(requests(20)), stage='s'): got.append(i)
        got = []
        says = '1 of the requests had no reply in 2 tries .*: run the same command again'
        with pytest.raises(ConnectionError, match=says): stage(got)
        assert got == [i for i in range(20) if i != 7]
        outage.on = False
        asked = len(server.log)
        got = []
        stage(got)
        assert got == list(range(20))
        assert len(server.log) == asked + 1


# ---- outages

@pytest.mark.parametrize('concurrency', [1, 16])
def test_the_last_request_of_a_stage_outlives_an_outage(concurrency):
    "A server that answers nobody says nothing of the request"
    outage = Outage('503')
    with FaultServer(outage) as server:
        how = dict(tries=2, concurrency=concurrency, patience=.3)
        first = writer_at(server, **how)
        assert first.write(requests(1))[0].outcome == 'failed'
        def again(): return writer_at(server, store=first.store, **how).write(requests(1))[0]
        assert again().outcome == 'failed'
        outage.on = False
        assert again().outcome == 'ok'


@pytest.mark.parametrize('trouble', ['hang', 'reset', 'closed', 'cut', '500', '408', '503', 'bad_body'])
def test_a_lone_last_request_outlives_an_outage_of_any_kind(tmp_path, trouble):
    outage = Outage(trouble, on=False)
    with FaultServer(outage) as server, RunStore(tmp_path/'s.sqlite') as store:
        def outcomes(n):
            writer = writer_at(server, store=store, timeout=.3, patience=.3, tries=2)
            return [reply.outcome for reply in writer.write(requests(n))]
        assert outcomes(3) == ['ok']*3
        outage.on = True
        for _ in range(3): assert outcomes(4) == ['ok']*3 + ['failed']
        outage.on = False
        assert outcomes(4) == ['ok']*4


@pytest.mark.parametrize('trouble', ['hang', 'reset', '500'])
def test_a_lone_request_that_is_itself_the_trouble_is_given_up(tmp_path, trouble):
    with FaultServer(Outage(trouble, '#3')) as server, RunStore(tmp_path/'s.sqlite') as store:
        def outcomes(n):
            writer = writer_at(server, store=store, timeout=.3, patience=.3, tries=2)
            return [reply.outcome for reply in writer.write(requests(n))]
        assert outcomes(3) == ['ok']*3
        assert outcomes(4)[3] == 'failed'
        assert outcomes(4)[3] == 'given up' # a small question has an answer
        asked = len(server.log)
        assert outcomes(4)[3] == 'given up'
        assert len(server.log) == asked == store.count('attempts')


class OutageInTime:
    "Of two seconds, from the 60th request on"
    began = ended = 0.

    def __call__(self, asked, n):
        if n == 60:
            self.began = time.time()
            self.ended = self.began + 2.
        return '503' if time.time() < self.ended else 'ok'


def test_an_outage_pauses_and_then_costs_nothing(capsys):
    outage = OutageInTime()
    with FaultServer(outage, seconds=.01) as server:
        replies = writer_at(server, concurrency=8, tries=3, pause=.2, patience=30).write(requests(200))
    assert all(reply.outcome == 'ok' for reply in replies) # though all under way failed more than three times
    said = capsys.readouterr().err
    assert 'error 503: The engine is currently overloaded' in said
    assert 'requests in a row failed: next try in ' in said
    tried = [entry['time'] for entry in server.log if outage.began + 1. < entry['time'] < outage.ended]
    assert len(tried) <= 6 # one at a time, in growing pauses


def test_an_outage_that_lasts_stops_cleanly_and_the_same_command_goes_on(tmp_path):
    outage = Outage('500', on=False)
    def act(asked, n):
        if n == 50: outage.on = True
        return outage(asked, n)
    with FaultServer(act) as server, RunStore(tmp_path/'s.sqlite') as store:
        writer = writer_at(server, store=store, concurrency=8, tries=3, patience=.5)
        says = line_of(ConnectionError, writer.write, requests(200))
        assert 'requests in a row failed; waited ' in says
        assert 'run the same command again when it is back' in says
        assert 40 < store.count('replies') < 60
        outage.on = False
        asked = len(server.log)
        replies = writer_at(server, store=store).write(requests(200))
        assert all(reply.text for reply in replies)
        assert len(server.log) == asked + 200 - sum(reply.cached for reply in replies)


# ---- trouble that does not pass

@pytest.mark.parametrize('action, kind, says', [
    ('401', PermissionError, "refuses the key in OPENAI_API_KEY for the model 'small'"),
    ('403', PermissionError, "refuses the key in OPENAI_API_KEY for the model 'small'"),
    ('404', ValueError, "has no model 'small' for the key in OPENAI_API_KEY"),
    ('400', ValueError, "does not take this request to the model 'small'"),
    ('402', BudgetSpent, 'has nothing left'),
    ('insufficient_quota', BudgetSpent, 'has nothing left')])
def test_what_no_request_can_get_around_stops_at_once(action, kind, says, capfd):
    with FaultServer(lambda asked, n: action if n > 1 else 'ok') as server:
        writer = writer_at(server, concurrency=1)
        with pytest.raises(kind) as e: writer.write(requests(50))
        line = str(e.value)
        assert says in line
        assert server.url in line
        assert '\n' not in line
        assert len(server.log) == 2
        assert writer.store.count('replies') == 1
        assert ('***' in line) == (action == '401')
        for shown in (*traceback.format_exception(e.value), repr(vars(e.value)), repr(e.value.__context__)):
            assert KEY not in shown
        assert KEY not in ''.join(capfd.readouterr())


def test_the_key_is_in_no_log(caplog):
    for name in ('openai', 'httpx', 'httpx2', 'httpcore', 'httpcore2', 'asyncio'):
        logging.getLogger(name).setLevel(logging.DEBUG)
    with FaultServer(lambda asked, n: ('ok', '500', '401')[n - 1]) as server, caplog.at_level(0):
        with pytest.raises(PermissionError): writer_at(server, concurrency=1).write(requests(3))
    assert caplog.text
    assert KEY not in caplog.text


def test_a_server_that_speaks_another_protocol(serve):
    server, writer = serve(lambda asked, n: (200, {'hello': 1}, {}))
    says = 'not the reply of a chat completions server.*: is it the URL of a chat completions server, ending in /v1?'
    with pytest.raises(ConnectionError, match=says): writer.write(requests(30))
    assert len(server.asked) < 12 # at once, though many were waiting


def test_no_server(serve):
    server, writer = serve(lambda asked, n: 'fine')
    server.end()
    with pytest.raises(ConnectionError, match='gives no reply for the model'): writer.write([Request('b')])


def test_no_key(monkeypatch):
    for name in ('OPENAI_API_KEY', 'MY_KEY'): monkeypatch.delenv(name, raising=False)
    says = 'no key: set OPENAI_API_KEY in the environment, or name a server of your own with base_url'
    assert line_of(PermissionError, OpenAIWriter, 'gpt-5.4-mini') == says
    with pytest.raises(PermissionError, match='set MY_KEY'): OpenAIWriter('gpt-5.4-mini', key_env='MY_KEY')


def test_a_server_of_ones_own_needs_no_key(monkeypatch):
    monkeypatch.delenv('OPENAI_API_KEY')
    writer = OpenAIWriter('mine', base_url='http://user:secret@127.0.0.1:9/v1')
    assert writer.where == 'http://127.0.0.1:9/v1'


def test_a_server_that_turns_everything_down_is_not_believed(serve):
    flagged = error(400, 'Your prompt was flagged by our content policy', code='content_filter')
    server, writer = serve(lambda asked, n: flagged)
    with pytest.raises(ValueError, match="turns down every request to the model 'small'"):
        writer.write([Request(str(i)) for i in range(100)])
    assert len(server.asked) < 30


def test_a_loop_that_cannot_start_is_an_error(serve, monkeypatch):
    _, writer = serve(lambda asked, n: 'fine')
    def refuse(job, **_):
        job.close()
        raise OSError(24, 'Too many open files')
    with monkeypatch.context() as patch:
        patch.setattr(asyncio, 'run', refuse)
        with pytest.raises(OSError, match='Too many open files'): writer.write([Request('a')])
    assert writer.write([Request('a')])[0].text == 'fine'


def test_a_key_that_is_a_word_leaves_texts_alone(serve, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'test')
    wrong = error(401, 'wrong key: test')
    _, writer = serve(lambda asked, n: 'The latest test was a contest.' if n == 1 else wrong)
    assert writer.write([Request('a')])[0].text == 'The latest test was a contest.'
    with pytest.raises(PermissionError, match=r'wrong key: \*\*\*'): writer.write([Request('b')])
