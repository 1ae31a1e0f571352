"A writer behind a server: everything that a server can do wrong, on loopback"
import asyncio, json, os, signal, subprocess, sys, textwrap, threading, time, tracemalloc, traceback
from collections import Counter
from pathlib import Path
import pytest
from fault_server import FaultServer, error as failure, faults, read_log
from saeexplainer.show import say
from saeexplainer.writers.budget import Budget, Ledger
from saeexplainer.writers.errors import FORMS, bad_request, retry_after
from saeexplainer.writers.traffic import Traffic
from saeexplainer.replies import OUTCOMES, reply_key
from saeexplainer.writers.parsing import answers, text_schema
from saeexplainer.store import RunStore
from saeexplainer.replies import Request
from saeexplainer.writers.budget import BudgetSpent
from saeexplainer.writers.openai import OpenAIWriter
from writer_server import Server, completion, error

KEY = 'sk-planted-0123456789'
PRICES = {'small': (1., 10.)} # dollars per million tokens
LISTS = text_schema({'samples': 4})


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    monkeypatch.delenv('OPENAI_BASE_URL', raising=False)


@pytest.fixture
def serve():
    servers = []
    def start(answer, **kw):
        servers.append(Server(answer))
        return servers[-1], OpenAIWriter('small', base_url=servers[-1].url, **{'pause': .05, 'patience': .3, **kw})
    yield start
    for server in servers: server.shutdown(); server.server_close()


def writer_at(server, **kw): return OpenAIWriter('small', base_url=server.url, **{'timeout': 3., 'pause': .05, 'patience': 1., **kw})


def book(writer, stage=''): return writer.store.accounts()[writer.name][stage]


def requests(n, start=0): return [Request(f'Write about #{i}.', seed=i) for i in range(start, start + n)]


# ---- 2,000 requests, 64 at once, 30% of the attempts go wrong

@pytest.fixture(scope='module')
def storm(tmp_path_factory):
    folder = tmp_path_factory.mktemp('storm')
    with pytest.MonkeyPatch.context() as patch, FaultServer(faults(.3, seed=0), log=folder/'log.jsonl') as server:
        patch.setenv('OPENAI_API_KEY', KEY)
        writer = writer_at(server, prices=PRICES, concurrency=64, store=RunStore(folder/'store.sqlite'))
        yield server, writer, writer.write(requests(2000), schema=LISTS, stage='round1')


def test_every_request_ends_in_one_recorded_outcome(storm):
    server, writer, replies = storm
    stored = writer.store.replies([reply_key(writer.name, r, LISTS) for r in requests(2000)])
    assert len(replies) == len(stored) == writer.store.count('replies') == 2000 and [*stored.values()].count(None) == 0
    outcomes = Counter(r.outcome for r in replies)
    assert outcomes == book(writer, 'round1')['outcomes'] and set(outcomes) <= set(OUTCOMES) and outcomes['ok'] > 1700 and outcomes['refused'] > 20 and not outcomes['failed']
    assert all((r.text is None) == (r.outcome != 'ok') == (r.error is not None) for r in replies)


def test_order_is_kept_and_no_reply_is_anothers(storm):
    _, _, replies = storm
    for i, reply in enumerate(replies):
        texts = json.loads(reply.text)['samples'] if reply.text else []
        assert all(f'#{i}:' in t.lower() or f'#{i},' in t.lower() for t in texts), (i, reply)
        assert len({t.casefold() for t in texts}) == len(texts) == 4 - (reply.counts or {}).get('short', 0) or not texts


def test_costs_are_those_of_the_servers_log_and_lost_attempts_are_counted(storm):
    server, writer, replies = storm
    log, kept = server.log, book(writer, 'round1')
    assert writer.store.cost() == pytest.approx(log.cost(PRICES)) == pytest.approx(sum(r.cost or 0 for r in replies))
    assert sum(kept['attempts'].values()) == len(log) == sum(r.attempts for r in replies)
    actions = Counter(e['action'] for e in log)
    for kind, names in dict(timeout=['hang'], dropped=['cut', 'reset', 'closed'], unreadable=['bad_body'], replayed=['replayed'], **{k: [k] for k in ('408', '409', '429', '500', '503')}).items():
        assert kept['attempts'][kind] == sum(actions[n] for n in names) > 10, kind
    assert kept['prompt_tokens'] == sum(e['prompt_tokens'] for e in log.delivered()) and kept['perhaps_billed'] > 0
    assert kept['texts']['duplicate'] > 20 and kept['texts']['empty'] > 20 and kept['texts']['surplus'] > 20


def test_nothing_is_asked_again(storm):
    server, writer, replies = storm
    asked = len(server.log)
    again = writer_at(server, store=writer.store).write(requests(2000)[::-1], schema=LISTS)
    assert len(server.log) == asked and [r.text for r in again[::-1]] == [r.text for r in replies] and all(r.cached and r.cost == 0 for r in again)


def test_the_key_is_nowhere(storm):
    server, writer, replies = storm
    assert all(e['authorization'] == f'Bearer {KEY}' for e in server.log) # it was really used
    files = [f for f in Path(writer.store.path).parent.iterdir() if f.name.startswith('store')]
    assert files and all(KEY.encode() not in f.read_bytes() for f in files)
    assert KEY not in repr(writer) + str(vars(writer)) + repr(replies) + json.dumps(writer.store.accounts())


# ---- killed in the middle

CLIENT = '''
import json, sys
from saeexplainer.writers.parsing import text_schema
from saeexplainer.store import RunStore
from saeexplainer.replies import Request
from saeexplainer.writers.budget import Budget
from saeexplainer.writers.openai import OpenAIWriter
url, store, n, limit = sys.argv[1:]
writer = OpenAIWriter('small', base_url=url, store=RunStore(store), concurrency=32, timeout=3., pause=.05, budget=Budget(requests=int(limit) or None))
replies = writer.write([Request(f'Write about #{i}.', seed=i) for i in range(int(n))], schema=text_schema({'samples': 4}))
print(json.dumps([r.outcome for r in replies]))
'''

def client(server, store, n, limit=0, **kw): return subprocess.Popen([sys.executable, '-c', CLIENT, server.url, str(store), str(n), str(limit)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)


def test_kill_9_and_the_same_command(tmp_path):
    with FaultServer(faults(.3, seed=1), seconds=.1) as server:
        first = client(server, tmp_path/'s.sqlite', 600)
        while len(server.log) < 300: time.sleep(.02); assert first.poll() is None
        first.send_signal(signal.SIGKILL); first.wait()
        time.sleep(.2)
        with RunStore(tmp_path/'s.sqlite') as store: kept = {json.loads(r)['prompt'] for r, in store.rows('SELECT request FROM replies')}
        asked, before = len(server.log), Counter(e['prompt'] for e in server.log)
        assert 100 < len(kept) < 600
        out, err = client(server, tmp_path/'s.sqlite', 600).communicate(timeout=120)
        outcomes = json.loads(out)
        later = Counter(e['prompt'] for e in server.log[asked:])
        assert len(outcomes) == 600 and not kept & set(later) # no stored reply is asked again
        assert len(set(later) & set(before)) <= 32 # what was under way
        with RunStore(tmp_path/'s.sqlite') as store:
            killed = store.accounts()['http://127.0.0.1:small']['']['attempts'].get('killed', 0)
            assert store.count('replies') == 600 and killed <= 32
            assert 0 <= store.count('attempts') - len(server.log) <= killed # some were written down, but not sent any more


def test_a_budget_of_requests_is_never_passed_and_goes_on(tmp_path):
    with FaultServer(faults(.3, seed=2)) as server:
        for limit in (50, 120):
            out, err = client(server, tmp_path/'s.sqlite', 200, limit).communicate(timeout=60)
            assert f'BudgetSpent: the budget of {limit} requests: {limit} were sent; raise it and run the same command again' in err and len(server.log) == limit
        out, err = client(server, tmp_path/'s.sqlite', 200).communicate(timeout=60)
        assert len(json.loads(out)) == 200
        answered = Counter(e['prompt'] for e in server.log if e['action'] == 'ok')
        assert max(answered.values()) == 1 # a whole reply is asked for once, over three processes


# ---- budgets

@pytest.mark.parametrize('budget', [Budget(usd=.02), Budget(tokens=3000)])
def test_a_budget_of_dollars_or_tokens_holds_for_what_is_under_way_too(tmp_path, budget):
    with FaultServer(seconds=.05) as server, RunStore(tmp_path/'s.sqlite') as store:
        for _ in range(2):
            writer = writer_at(server, budget=budget, prices=PRICES, concurrency=16, store=store)
            with pytest.raises(BudgetSpent) as e: writer.write(requests(400))
            assert 'the budget of' in str(e.value) and 'raise it and run the same command again' in str(e.value) and '\n' not in str(e.value)
            used = server.log.cost(PRICES)/.02 if budget.usd else sum(e['prompt_tokens'] + e['completion_tokens'] for e in server.log.delivered())/3000
            assert .6 < used <= 1 # to the end of it, and not beyond: what requests under way give back is used
        assert writer.ledger.held == 0 and store.count('replies') == len(server.log.delivered()) # what was paid is kept


def test_lost_attempts_count_at_their_most(tmp_path):
    with FaultServer(lambda asked, n: 'hang' if n == 1 else 'ok') as server:
        writer = writer_at(server, prices=PRICES, timeout=.3, budget=Budget(usd=1.))
        reply, = writer.write(requests(1))
        assert reply.attempts == 2 and writer.store.spent()[2] > writer.store.cost() == pytest.approx(reply.cost)
        assert book(writer)['attempts'] == {'delivered': 1, 'timeout': 1} and book(writer)['perhaps_billed'] == pytest.approx(writer.ledger.usd - reply.cost)


def test_a_budget_needs_a_price_and_a_limit_of_tokens():
    with pytest.raises(ValueError, match="a budget in dollars needs a price: prices={'small': "): OpenAIWriter('small', budget=1.)
    with FaultServer(refuses=('max_tokens', 'max_completion_tokens')) as server:
        with pytest.raises(ValueError, match="takes no limit of tokens for 'small': a budget in dollars or tokens cannot be kept"):
            writer_at(server, budget=1., prices=PRICES).write(requests(2))
        assert writer_at(server, budget=Budget(requests=9)).write(requests(2))[1].text


def test_the_estimate_comes_before_the_rest(capsys):
    with FaultServer(seconds=.02) as server:
        with pytest.raises(BudgetSpent): writer_at(server, budget=.004, prices=PRICES).write(requests(100), stage='round1')
        said = capsys.readouterr().err
        assert 'round1: about 92 requests, ' in said and '(from the first replies); more than the budget has left ($0.004: ' in said and 'it will stop there' in said
        writer_at(server, prices=PRICES).write(requests(100, 100), progress=True)
        assert 'about 92 requests' in (said := capsys.readouterr().err) and 'budget' not in said and ' requests, ' in said


# ---- memory

def test_requests_are_read_no_further_ahead_than_needed():
    read, most = [0], 0
    def many():
        for r in requests(1500): read[0] += 1; yield r
    with FaultServer() as server:
        writer = writer_at(server, concurrency=4)
        for i, reply in enumerate(writer.stream(many(), total=1500)): most = max(most, read[0] - i)
    assert i == 1499 and most <= 16*4 + 1


def test_a_slow_consumer_slows_the_reading_and_an_early_end_is_clean():
    with FaultServer() as server:
        writer = writer_at(server, concurrency=4)
        replies = writer.stream(requests(1000))
        for _ in range(3): next(replies)
        time.sleep(.5)
        assert len(server.log) <= 16*4 + 4
        replies.close()
        asked = len(server.log)
        time.sleep(.2)
        assert len(server.log) == asked == writer.store.count('replies') and 'writer' not in [t.name for t in threading.enumerate()]


# ---- the ladder

def test_the_ladder_rung_by_rung():
    script = {1: ['fenced'], 2: ['invalid_json', 'ok'], 3: ['invalid_json', 'invalid_json'], 4: ['too_few', 'ok'], 5: ['too_many'], 6: ['duplicates', 'ok'], 7: ['empties', 'ok'],
              8: ['empty', 'ok'], 9: ['half_json', 'ok'], 10: ['half_json', 'half_json'], 11: ['empty', 'empty'], 12: ['invalid_json', 'too_few', 'ok']}
    def act(asked, n):
        i = int(asked['messages'][0]['content'].split('#')[1].rstrip('.'))
        return script[i].pop(0)
    with FaultServer(act) as server:
        replies = dict(enumerate(writer_at(server, concurrency=1).write(requests(12, 1), schema=LISTS), 1))
        asked = Counter(int(e['prompt'].split('#')[1].rstrip('.')) for e in server.log)
    texts = {i: json.loads(r.text)['samples'] if r.text else None for i, r in replies.items()}
    assert {i for i, t in texts.items() if t and len(t) == 4} == {1, 2, 4, 5, 6, 7, 8, 9, 12} and asked == {1: 1, 2: 2, 3: 2, 4: 2, 5: 1, 6: 2, 7: 2, 8: 2, 9: 2, 10: 2, 11: 2, 12: 3}
    assert [(replies[i].outcome, replies[i].error) for i in (3, 10, 11)] == [('unparsed', 'not JSON'), ('unparsed', 'cut before the JSON was complete'), ('empty', 'empty')]
    assert {i: r.counts for i, r in replies.items() if r.counts} == {5: {'surplus': 2}, 6: {'duplicate': 3}, 7: {'empty': 2}}
    half = next(e for e in server.log if e['prompt'].endswith('#9.') and e['attempt'] == 2)
    assert half['parameters']['max_tokens'] == 128 # it was cut: it gets room for twice as much


def test_asking_again_shows_what_came(serve):
    server, writer = serve(lambda asked, n: ['Sure: a, b', '{"samples": ["a", "a", "b"]}', '```json\n{"samples": ["B", "c", "d"]}\n```'][n - 1])
    reply, = writer.write([Request('list')], schema=LISTS)
    assert json.loads(reply.text) == {'samples': ['a', 'b', 'c', 'd']} and reply.counts == {'duplicate': 2} and reply.attempts == 3
    assert [m['role'] for m in server.asked[1]['messages']] == ['user', 'assistant', 'user'] and server.asked[1]['messages'][1]['content'] == 'Sure: a, b'
    assert 'not JSON' in server.asked[1]['messages'][2]['content']
    assert server.asked[2]['messages'][2]['content'].startswith('Some are missing. Write 2 more for "samples"')
    assert server.asked[2]['response_format']['json_schema']['schema']['properties']['samples']['minItems'] == 2
    assert len({a['seed'] for a in server.asked}) == 3 and (reply.prompt_tokens, reply.completion_tokens) == (300, 30)


def test_choices(serve):
    texts = {'json': ['{"choice": "B"}'], 'plain': [' A.'], 'both': ['A or B', '{"choice": "A"}'], 'other': ['{"choice": "D"}', 'D']}
    server, writer = serve(lambda asked, n: texts[asked['messages'][0]['content']].pop(0))
    replies = writer.write([Request(name) for name in texts], choices=['A', 'B', 'C'])
    assert [r.text for r in replies] == ['B', 'A', 'A', None] and replies[3].error == 'none of the choices A, B, C' and replies[3].outcome == 'unparsed'
    assert server.asked[0]['response_format']['json_schema']['schema']['properties']['choice']['enum'] == ['A', 'B', 'C']


def test_refusals_filters_and_prompts_that_are_too_long_are_outcomes_of_their_own(serve):
    long = error(400, "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens (8936 in the messages, 64 in max_tokens)", code='context_length_exceeded')
    bodies = {'refusal': (200, completion(None, refusal=f'I will not say {KEY}.'), {}), 'filter': (200, completion(None, finish='content_filter'), {}),
              'policy': error(400, f'flagged\nby policy {KEY}', code='content_filter'), 'long': long, 'good': (200, completion('fine'), {})}
    server, writer = serve(lambda asked, n: bodies[asked['messages'][0]['content']])
    replies = dict(zip(bodies, writer.write([Request(name) for name in bodies], stage='s')))
    assert {k: r.outcome for k, r in replies.items()} == dict(refusal='refused', filter='refused', policy='refused', long='rejected', good='ok') and len(server.asked) == 5
    assert replies['refusal'].error == 'refused: I will not say ***.' and replies['policy'].error == 'refused: error 400: flagged by policy ***' and replies['filter'].error == 'refused: content filter'
    assert book(writer, 's')['outcomes'] == {'ok': 1, 'refused': 3, 'rejected': 1} and not writer.dropped


def test_cut_plain_texts_and_strange_characters(serve):
    bodies = {'cut': completion('One sentence. And a', finish='length'), 'stump': completion('no sentence at', finish='length'), 'half': completion('a \ud83d half\0'), 'none': completion(' \n ')}
    server, writer = serve(lambda asked, n: (200, bodies[asked['messages'][0]['content']], {}))
    cut, stump, half, none = writer.write([Request(n) for n in bodies])
    assert (cut.text, cut.cut, stump.text, stump.cut, half.text, none.outcome) == ('One sentence.', True, 'no sentence at', True, 'a ? half', 'empty')


# ---- what a model refuses

@pytest.mark.parametrize('refuses, forms, dropped, form', [
    (('max_tokens', 'temperature', 'top_p', 'seed'), ('json_schema',), {'max_tokens', 'temperature', 'top_p', 'seed'}, 'schema with counts'),
    (('minItems',), ('json_schema', 'json_object'), set(), 'schema'), ((), ('json_object',), set(), 'JSON mode'), (('response_format',), (), set(), 'prompt alone')])
def test_parameters_are_dropped_once_per_model_and_remembered(tmp_path, refuses, forms, dropped, form):
    say = 'Answer with JSON like {"type": "object", "properties": {"samples": {"type": "array", "items": {"type": "string"}, "minItems": 4}}}. '
    asking = [Request(f'{say}Write about #{i}.', seed=i) for i in range(40)]
    with FaultServer(refuses=refuses, forms=forms) as server, RunStore(tmp_path/'s.sqlite') as store:
        writer = writer_at(server, store=store, concurrency=32)
        replies = writer.write(asking, schema=LISTS, stage='a')
        assert all(len(json.loads(r.text)['samples']) == 4 for r in replies) and set(writer.dropped) == dropped and writer.form == form
        refusals = sum(e['action'] == 'refused_parameter' for e in server.log)
        assert refusals == len(dropped) + FORMS.index(form) and not dropped & set(replies[-1].sent) and ('max_completion_tokens' in replies[-1].sent) == ('max_tokens' in dropped)
        again = writer_at(server, store=store) # another process knows
        again.write([Request('Another about #99.')])
        assert sum(e['action'] == 'refused_parameter' for e in server.log) == refusals and set(again.dropped) == dropped and again.form == form
        assert store.meta(f'writer {writer.name}') == (dict(dropped=writer.dropped, form=form) if refusals else None)


@pytest.mark.parametrize('message, code, param, sent, verdict', [
    ("Unsupported value: 'temperature' does not support 0.8 with this model. Only the default (1) value is supported.", 'unsupported_value', 'temperature', ('temperature', 'seed'), 'temperature'),
    ('Unrecognized request argument supplied: seed', None, None, ('temperature', 'seed'), 'seed'), ("extra fields not permitted: 'top_p'", None, None, ('top_p',), 'top_p'),
    ("Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.", None, 'response_format', ('response_format',), 'response_format'),
    ('`temperature` and `top_p` cannot both be specified for this model. Please use only one.', None, None, ('temperature', 'top_p'), 'top_p'),
    ('Your account has exceeded its monthly usage limit', None, None, ('seed',), 'bad'), ('Your organization has been flagged for review', None, None, ('seed',), 'bad'),
    ('temperature 1.2 exceeds the maximum of 1.0', None, None, ('temperature',), 'bad'),
    ('failed to parse grammar', None, None, ('response_format',), 'response_format'), ('failed to parse grammar', None, None, ('seed',), 'bad'),
    ("max_tokens is too large: 5000. This model's maximum context length is 4096 tokens", None, 'max_tokens', ('max_tokens',), 'rejected'),
    ('the request exceeds the available context size, try increasing it', 'exceed_context_size_error', None, ('max_tokens',), 'rejected'),
    ('Invalid prompt: your prompt was flagged as potentially violating our usage policy', 'invalid_prompt', None, (), 'refused'), ('We could not parse the JSON body', None, None, ('seed',), 'bad')])
def test_what_a_400_means(message, code, param, sent, verdict): assert bad_request(message, code, param, dict.fromkeys(sent)) == verdict


# ---- trouble that passes

@pytest.mark.parametrize('trouble', ['408', '409', '429', '500', '503', 'cut', 'reset', 'closed', 'bad_body', 'hang'])
def test_trouble_that_passes_is_tried_again(trouble):
    with FaultServer(lambda asked, n: trouble if n < 2 else 'ok') as server:
        reply, = writer_at(server, timeout=.5).write(requests(1))
        assert '#0' in reply.text and reply.attempts == len(server.log) == 2


def test_retry_after_is_honoured(serve):
    server, writer = serve(lambda asked, n: error(429, 'slow down', **{'Retry-After': 2}) if n == 1 else 'fine')
    began = time.time()
    assert writer.write([Request('a')])[0].text == 'fine' and 2 <= time.time() - began < 6
    assert retry_after({'retry-after': 'soon'}) is None


def test_all_who_are_asked_to_wait_wait_together():
    said = []
    async def asked():
        traffic = Traffic(16, tries=8, pause=1., patience=600., say=said.append)
        assert all(traffic.wait(90., 'slow down') for _ in range(16)) and traffic.waited < 91 and not traffic.stopped
        assert traffic.wait(120., 'slower') and 119 < traffic.waited < 121 # a longer pause counts by what it adds
    asyncio.run(asked())
    assert said == ['slow down: next try in 90 s', 'slower: next try in 120 s']


def test_what_a_server_says_does_not_drive_the_terminal(capfd):
    say('error 400: \x1b]0;owned\x07\x1b[2J')
    assert 'owned' in (said := capfd.readouterr().err) and not set('\x1b\x07') & set(said)


@pytest.mark.parametrize('concurrency', [1, 4])
def test_a_poisoned_request_fails_alone_and_blocks_nothing(concurrency, capsys):
    with FaultServer(lambda asked, n: '500' if '#7.' in asked['messages'][0]['content'] else 'ok') as server:
        writer = writer_at(server, tries=3, concurrency=concurrency)
        replies = writer.write(requests(20))
        assert [i for i, r in enumerate(replies) if r.outcome != 'ok'] == [7] and replies[7].error.startswith('no reply in 3 tries (error 500') and replies[7].attempts == 3
        asked = len(server.log)
        alone, = writer_at(server, store=writer.store, tries=3).write(requests(8)[7:]) # a failure is no answer: it is asked again, once
        assert alone.outcome == 'given up' and len(server.log) == asked + 3
        assert writer_at(server, store=writer.store, tries=3).write(requests(8)[7:])[0].cached and len(server.log) == asked + 3
        assert book(writer)['outcomes'] == {'ok': 19, 'given up': 1} and 'in a row failed' not in capsys.readouterr().err


@pytest.mark.parametrize('concurrency', [1, 16])
def test_the_last_request_of_a_stage_outlives_an_outage(concurrency):
    up = [False]
    with FaultServer(lambda asked, n: 'ok' if up[0] else '503') as server:
        first = writer_at(server, tries=2, concurrency=concurrency)
        again = lambda: writer_at(server, store=first.store, tries=2, concurrency=concurrency).write(requests(1))[0]
        assert first.write(requests(1))[0].outcome == 'failed' and again().outcome == 'failed' # the server answers nobody: that says nothing of the request
        up[0] = True
        assert again().outcome == 'ok'


def test_a_stage_with_failures_keeps_the_rest_and_asks_for_them_once_more(tmp_path):
    up = [False]
    with FaultServer(lambda asked, n: '500' if not up[0] and '#7.' in asked['messages'][0]['content'] else 'ok') as server, RunStore(tmp_path/'s.sqlite') as store:
        stage = lambda got: got.extend(i for i, _ in answers(writer_at(server, store=store, tries=2), enumerate(requests(20)), stage='s'))
        got = []
        with pytest.raises(ConnectionError, match='1 of the requests had no reply in 2 tries .*: run the same command again'): stage(got)
        assert got == [i for i in range(20) if i != 7]
        up[0], got, asked = True, [], len(server.log)
        stage(got)
        assert got == list(range(20)) and len(server.log) == asked + 1


def test_an_outage_pauses_and_then_costs_nothing(capsys):
    down = [0, 0]
    def act(asked, n):
        if n == 60: down[:] = time.time(), time.time() + 2.
        return '503' if time.time() < down[1] else 'ok'
    with FaultServer(act, seconds=.01) as server:
        replies = writer_at(server, concurrency=8, tries=3, pause=.2, patience=30).write(requests(200))
    assert all(r.outcome == 'ok' for r in replies) # though every request under way failed more than three times
    said = capsys.readouterr().err
    assert 'error 503: The engine is currently overloaded' in said and 'requests in a row failed: next try in ' in said
    tried = [e['time'] for e in server.log if down[0] + 1. < e['time'] < down[1]]
    assert len(tried) <= 6 # one at a time, in growing pauses


def test_an_outage_that_lasts_stops_cleanly_and_the_same_command_goes_on(tmp_path):
    up = [True]
    def act(asked, n):
        if n == 50: up[0] = False
        return 'ok' if up[0] else '500'
    with FaultServer(act) as server, RunStore(tmp_path/'s.sqlite') as store:
        with pytest.raises(ConnectionError) as e: writer_at(server, store=store, concurrency=8, tries=3, patience=.5).write(requests(200))
        assert 'requests in a row failed; waited ' in str(e.value) and 'run the same command again when it is back' in str(e.value) and '\n' not in str(e.value)
        assert 40 < store.count('replies') < 60
        up[0], asked = True, len(server.log)
        replies = writer_at(server, store=store).write(requests(200))
        assert all(r.text for r in replies) and len(server.log) == asked + 200 - sum(r.cached for r in replies)


def test_replies_to_others_are_not_taken_for_ones_own():
    with FaultServer(lambda asked, n: 'twice' if n % 3 == 0 else 'replayed' if n % 10 == 0 else 'ok') as server:
        replies = writer_at(server, concurrency=16).write(requests(200))
        assert all(f'#{i}:' in r.text for i, r in enumerate(replies))


def test_a_server_with_few_ids_is_believed(serve):
    import random
    server, writer = serve(lambda asked, n: (200, completion(f'fine {n}') | dict(id=f'chatcmpl-{random.randrange(9)}', created=int(time.time())), {}))
    replies = writer.write([Request(str(i)) for i in range(60)])
    assert all(r.outcome == 'ok' for r in replies) and len(server.asked) == 60


def test_a_server_whose_ids_are_all_the_same_is_believed(serve):
    server, writer = serve(lambda asked, n: 'fine')
    assert [r.text for r in writer.write([Request(str(i)) for i in range(30)])] == ['fine']*30 and len(server.asked) == 30


@pytest.mark.parametrize('status', [408, 502, 504, 524])
def test_what_a_gateway_gave_up_on_counts_at_its_most(serve, status):
    server, writer = serve(lambda asked, n: error(status, 'gateway time-out') if n == 1 else 'fine', prices=PRICES)
    writer.write([Request('a')])
    assert book(writer)['perhaps_billed'] > 0 and writer.store.spent()[2] > writer.store.cost()


def test_a_wait_that_is_too_long_stops_the_call(serve):
    server, writer = serve(lambda asked, n: error(429, 'daily limit', **{'Retry-After': 43200}), patience=30)
    with pytest.raises(ConnectionError, match='asks to wait .*daily limit.*43200 s more would be too long: run the same command again'): writer.write([Request('a')])


# ---- trouble that does not

@pytest.mark.parametrize('action, kind, says', [
    ('401', PermissionError, "refuses the key in OPENAI_API_KEY for the model 'small'"), ('403', PermissionError, "refuses the key in OPENAI_API_KEY for the model 'small'"),
    ('404', ValueError, "has no model 'small' for the key in OPENAI_API_KEY"), ('400', ValueError, "does not take this request to the model 'small'"),
    ('402', BudgetSpent, 'has nothing left'), ('insufficient_quota', BudgetSpent, 'has nothing left')])
def test_what_no_request_can_get_around_stops_at_once(action, kind, says, capfd):
    with FaultServer(lambda asked, n: action if n > 1 else 'ok') as server:
        writer = writer_at(server, concurrency=1)
        with pytest.raises(kind) as e: writer.write(requests(50))
        assert says in str(e.value) and server.url in str(e.value) and '\n' not in str(e.value) and len(server.log) == 2 and writer.store.count('replies') == 1
        shown = ''.join(traceback.format_exception(e.value)) + repr(vars(e.value)) + repr(e.value.__context__) + ''.join(capfd.readouterr())
        assert KEY not in shown and ('***' in str(e.value)) == (action == '401')


def test_the_key_is_in_no_log(caplog, monkeypatch):
    import logging
    for name in ('openai', 'httpx', 'httpx2', 'httpcore', 'httpcore2', 'asyncio'): logging.getLogger(name).setLevel(logging.DEBUG)
    with FaultServer(lambda asked, n: ('ok', '500', '401')[n - 1]) as server, caplog.at_level(0):
        with pytest.raises(PermissionError): writer_at(server, concurrency=1).write(requests(3))
    assert caplog.text and KEY not in caplog.text


def test_no_server_and_none_that_speaks_the_protocol(serve):
    server, writer = serve(lambda asked, n: (200, {'hello': 1}, {}))
    with pytest.raises(ConnectionError, match='not the reply of a chat completions server.*: is it the URL of a chat completions server, ending in /v1?'): writer.write(requests(30))
    assert len(server.asked) < 12 # at once, though many were waiting
    server.shutdown(); server.server_close()
    with pytest.raises(ConnectionError, match='gives no reply for the model'): writer.write([Request('b')])


def test_no_key(monkeypatch):
    for name in ('OPENAI_API_KEY', 'MY_KEY'): monkeypatch.delenv(name, raising=False)
    with pytest.raises(PermissionError) as e: OpenAIWriter('gpt-5.4-mini')
    assert str(e.value) == 'no key: set OPENAI_API_KEY in the environment, or name a server of your own with base_url'
    with pytest.raises(PermissionError, match='set MY_KEY'): OpenAIWriter('gpt-5.4-mini', key_env='MY_KEY')
    assert OpenAIWriter('mine', base_url='http://user:secret@127.0.0.1:9/v1').where == 'http://127.0.0.1:9/v1' # a server of one's own needs none


def test_a_server_that_turns_everything_down_is_not_believed(serve):
    server, writer = serve(lambda asked, n: error(400, 'Your prompt was flagged by our content policy', code='content_filter'))
    with pytest.raises(ValueError, match="turns down every request to the model 'small'"): writer.write([Request(str(i)) for i in range(100)])
    assert len(server.asked) < 30


def test_a_loop_that_cannot_start_is_an_error(serve, monkeypatch):
    import asyncio
    server, writer = serve(lambda asked, n: 'fine')
    def refuse(job, **_): job.close(); raise OSError(24, 'Too many open files')
    with monkeypatch.context() as patch:
        patch.setattr(asyncio, 'run', refuse)
        with pytest.raises(OSError, match='Too many open files'): writer.write([Request('a')])
    assert writer.write([Request('a')])[0].text == 'fine'


# ---- small things

def test_a_key_that_is_a_word_leaves_texts_alone(serve, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'test')
    server, writer = serve(lambda asked, n: 'The latest test was a contest.' if n == 1 else error(401, 'wrong key: test'))
    assert writer.write([Request('a')])[0].text == 'The latest test was a contest.'
    with pytest.raises(PermissionError, match=r'wrong key: \*\*\*'): writer.write([Request('b')])


def test_a_reply_in_parts(serve):
    bodies = [completion([{'type': 'text', 'text': 'Hello '}, {'type': 'text', 'text': 'there.'}]), completion([{'type': 'image'}])]
    server, writer = serve(lambda asked, n: (200, bodies[n - 1], {}), concurrency=1)
    whole, none = writer.write([Request('a'), Request('b')])
    assert whole.text == 'Hello there.' and none.outcome == 'empty'


def test_half_characters_are_stored_and_sent(serve, tmp_path):
    says = ['no json \ud83d here', '{"samples": ["a \\ud83d", "b", "c", "d"]}', completion(None, refusal='I \ud83d no')]
    server, writer = serve(lambda asked, n: (200, says[n - 1] if n == 3 else completion(says[n - 1]), {}), concurrency=1, store=RunStore(tmp_path/'s.sqlite'))
    first, second = writer.write([Request('a'), Request('b')], schema=LISTS)
    assert json.loads(first.text)['samples'][0] == 'a ?' and second.error == 'refused: I ? no' and writer.store.put_texts([('s', 1, 0, 'k', 0, None, second.error, None)]) == 1


def test_two_calls_at_once_into_one_store_are_refused(serve):
    server, writer = serve(lambda asked, n: 'fine')
    one = writer.stream(requests(50))
    next(one)
    with pytest.raises(RuntimeError, match='another call is writing into this store'): writer.write(requests(1))
    one.close()
    assert writer.write(requests(1))[0].text == 'fine'


def test_what_was_spent_before_a_price_was_known_counts():
    with FaultServer() as server:
        writer = writer_at(server)
        writer.write(requests(50))
        priced = writer_at(server, store=writer.store, prices=PRICES, budget=9.)
        assert priced.ledger.usd == pytest.approx(server.log.cost(PRICES))


def test_a_budget_that_ends_between_two_rungs_keeps_what_is_there(tmp_path):
    with FaultServer(lambda asked, n: 'too_few' if n == 1 else 'ok') as server, RunStore(tmp_path/'s.sqlite') as store:
        with pytest.raises(BudgetSpent): writer_at(server, budget=Budget(requests=1), store=store).write(requests(2), schema=LISTS)
        assert store.count('replies') == 1
        replies = writer_at(server, store=store).write(requests(2), schema=LISTS)
        assert replies[0].cached and replies[0].counts == {'short': 1} and len(server.log) == 2


def test_usage_of_nothing_counts_at_its_most(serve):
    nothing = completion('fine') | dict(usage=dict(prompt_tokens=0, completion_tokens=0, total_tokens=0))
    server, writer = serve(lambda asked, n: (200, nothing, {}), budget=Budget(tokens=2000))
    with pytest.raises(BudgetSpent): writer.write(requests(40))
    assert 2 <= len(server.asked) <= 12


def test_what_is_sent_and_what_is_kept(serve):
    server, writer = serve(lambda asked, n: 'fine', prices=PRICES)
    reply, = writer.write([Request('question', system='Be brief.', seed=2**62)])
    assert server.asked[0]['messages'] == [dict(role='system', content='Be brief.'), dict(role='user', content='question')] and server.keys == {f'Bearer {KEY}'}
    assert reply.sent == dict(max_tokens=64, temperature=.8, top_p=.95, seed=0) and reply.model == 'small-2026' and reply.attempts == 1
    assert (reply.prompt_tokens, reply.completion_tokens, reply.cost) == (100, 10, pytest.approx(.0002)) and reply.seconds > 0


def test_equal_requests_are_asked_once():
    with FaultServer(seconds=.05) as server:
        replies = writer_at(server).write(requests(5)*3)
        assert len(server.log) == 5 and sum(r.cached for r in replies) == 10 and [r.text for r in replies] == [r.text for r in replies[:5]]*3
        assert sum(r.cost or 0 for r in replies[5:]) == 0


def test_a_call_inside_a_running_event_loop(serve): # as in a notebook
    import asyncio
    server, writer = serve(lambda asked, n: 'fine')
    async def cell(): return writer.write([Request('a')])
    assert asyncio.run(cell())[0].text == 'fine'


def test_an_error_in_the_requests_themselves_ends_the_call(serve):
    server, writer = serve(lambda asked, n: 'fine')
    def broken(): yield Request('a'); raise KeyError('b')
    with pytest.raises(KeyError): list(writer.stream(broken()))
    assert writer.write([Request('c')])[0].text == 'fine'


def test_answers_pair_things_with_replies():
    with FaultServer(faults(.2, seed=5)) as server:
        got = list(answers(writer_at(server, concurrency=8), ((i, r) for i, r in enumerate(requests(100))), {'samples': 4}, stage='s'))
    assert [i for i, _ in got] == list(range(100)) and all(f'#{i}' in r.text.lower() for i, r in got if r.text)


# ---- a real server: llama.cpp with the embedded model

def test_llama_cpp(llama_server, tmp_path):
    "Lists by grammar, sixteen at once, choices, a prompt that is too long, and nothing asked twice"
    short = text_schema({'samples': 2})
    short['properties']['samples']['items']['maxLength'] = 24 # the grammar's; so that a small model comes to an end
    asking = [Request(f'Write two short texts about the number {i}, as JSON.', max_tokens=96, seed=i) for i in range(24)]
    with RunStore(tmp_path/'s.sqlite') as store:
        writer = OpenAIWriter('smollm2-135m', base_url=llama_server, concurrency=16, store=store)
        replies = writer.write([*asking, Request('word '*1500)], schema=short, stage='lists')
        outcomes = Counter(r.outcome for r in replies)
        assert replies[-1].outcome == 'rejected' and 'exceeds the available context size' in replies[-1].error and outcomes['ok'] >= 16 and set(outcomes) <= {'ok', 'unparsed', 'empty', 'rejected'}
        for r in replies:
            if r.text: assert len(json.loads(r.text)['samples']) == 2 - (r.counts or {}).get('short', 0) and r.model == 'smollm2-135m' and r.prompt_tokens > 20 and r.sent['seed'] is not None
        letters = writer.write([Request(f'Which letter? {i}', max_tokens=24, seed=i) for i in range(6)], choices=['A', 'B', 'C'], stage='letters')
        assert {r.text for r in letters if r.outcome == 'ok'} <= set('ABC') and sum(r.outcome == 'ok' for r in letters) >= 4
        kept, sent = store.accounts()[writer.name], store.count('attempts')
        assert sum(kept['lists']['outcomes'].values()) == 25 and sum(kept['letters']['outcomes'].values()) == 6 and kept['lists']['completion_tokens'] > 24*5 and writer.form == 'schema with counts'
        again = OpenAIWriter('smollm2-135m', base_url=llama_server, store=store).write([*asking, Request('word '*1500)], schema=short)
        assert store.count('attempts') == sent and [r.text for r in again] == [r.text for r in replies]
