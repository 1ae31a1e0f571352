"Servers that say odd things, say them in odd ways, or say too much; keys and addresses that cannot be used"
import gzip, json, os, resource, shutil, signal, socket, ssl, subprocess, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pytest
from fault_server import FaultServer
from saeexplainer.writers.budget import Budget, BudgetSpent
from saeexplainer.writers.errors import MOST_BYTES, api_key, check_address, server_words, tokens_of
from saeexplainer.writers.openai import OpenAIWriter, listed_models
from saeexplainer.replies import Request
from saeexplainer.writers.parsing import text_schema
from saeexplainer.store import RunStore
from writer_server import Server, completion, error

KEY = 'sk-planted-0123456789'
PRICES = {'small': (1., 10.)}
LISTS = text_schema({'samples': 2})


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    for name in ('OPENAI_BASE_URL', 'ALL_PROXY', 'HTTP_PROXY', 'HTTPS_PROXY', 'all_proxy', 'http_proxy', 'https_proxy'): monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve():
    servers = []
    def start(answer, **kw):
        servers.append(Server(answer))
        return servers[-1], writer_at(servers[-1], **kw)
    yield start
    for server in servers: server.shutdown(); server.server_close()


def writer_at(server, **kw): return OpenAIWriter('small', base_url=server.url, **{'timeout': 3., 'pause': .05, 'patience': .3, 'tries': 2, **kw})


def requests(n, start=0): return [Request(f'Write about #{i}.', seed=i) for i in range(start, start + n)]


def attempts(store): return [outcome for outcome, in store.rows('SELECT outcome FROM attempts ORDER BY id')]


# ---- keys and addresses

@pytest.mark.parametrize('key, says', [(KEY + '\n', 'a line break'), (KEY + '\r', 'a line break'), (f'{KEY[:9]}\n{KEY[9:]}', 'a line break'), (f'Bearer {KEY}', 'a blank'), (KEY + 'é', 'characters'),
                                       (f'“{KEY}”', 'characters'), (f'\ufeff{KEY}', 'characters'), (KEY + '\0'*0 + '\x07', 'characters'), (f'"{KEY}"', 'quotes'), (f"'{KEY}'", 'quotes')])
def test_a_key_that_cannot_be_one_is_refused_before_anything_is_sent(serve, monkeypatch, key, says):
    server, writer = serve(lambda asked, n: 'fine')
    monkeypatch.setenv('OPENAI_API_KEY', key)
    for ask in (lambda: writer.write(requests(2)), lambda: writer_at(server), api_key):
        with pytest.raises(ValueError, match=f'^OPENAI_API_KEY holds {says}') as e: ask()
        assert KEY not in str(e.value) and KEY[:9] not in str(e.value) and '\n' not in str(e.value)
    assert not server.asked and not writer.store.count('attempts')


def test_blanks_around_a_key_are_left_out(serve, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', f' {KEY}\t')
    server, writer = serve(lambda asked, n: f'fine {KEY}')
    assert writer.write(requests(1))[0].text == 'fine ***' and server.keys == {f'Bearer {KEY}'}


@pytest.mark.parametrize('url, says', [
    ('localhost:9/v1', 'http://'), ('foo', 'http://'), ('ftp://127.0.0.1/v1', 'http://'), ('//127.0.0.1/v1', 'http://'), ('', 'http://'), (' ', 'http://'), ('http:/127.0.0.1/v1', 'http://'),
    ('http://127.0.0.1:99999/v1', 'port'), ('http://127.0.0.1:-1/v1', 'port'), ('http://127.0.0.1:0/v1', 'port'), ('http://127.0.0.1:80a/v1', 'port'), ('http://[::1/v1', 'host'), ('http://::1]:80/v1', 'host'),
    ('http:///v1', 'host'), ('http://:80/v1', 'host'), ('http://127.0.0.1 :80/v1', 'blank'), ('http://127.0.0.1/v1\nx', 'blank'), ('http://127.0.0.1/v1/chat/completions', '/chat/completions'),
    ('http://127.0.0.1/v1?key=secret', 'query'), ('http://127.0.0.1/v1#secret', 'query'), ('http://me:secret@127.0.0.1/v1', 'password'), ('https://secret@127.0.0.1/v1', 'password')])
def test_an_address_that_cannot_be_used_is_refused_at_once(url, says, monkeypatch):
    asks = [lambda: check_address(url)]
    if url.strip(): asks += [lambda: OpenAIWriter('small')] if url else []
    monkeypatch.setenv('OPENAI_BASE_URL', url)
    for ask in asks:
        began = time.monotonic()
        with pytest.raises(ValueError, match='is no address of a server: .*--base-url') as e: ask()
        assert says in str(e.value).partition(' is no address')[2] and 'secret' not in str(e.value) and '\n' not in str(e.value) and time.monotonic() - began < 5


@pytest.mark.parametrize('url', ['http://127.0.0.1:8000/v1', 'https://api.example/openai/v1/', ' http://127.0.0.1/v1\n', 'http://[::1]:8000/v1', 'HTTP://localhost:65535', 'http://bücher.example/v1'])
def test_an_address_that_can_be_used_is_taken(url): assert OpenAIWriter('small', base_url=url).base_url == check_address(url) == url.strip()


@pytest.mark.parametrize('proxy, says', [('socks5://me:secret@127.0.0.1:9', 'ALL_PROXY names a SOCKS proxy: it needs the package socksio'), ('gopher://127.0.0.1', 'is the proxy in ALL_PROXY an address'),
                                         ('http://127.0.0.1:99999', 'is the proxy in ALL_PROXY an address'), ('http://[::1', 'is the proxy in ALL_PROXY an address')])
def test_a_proxy_that_cannot_be_used_is_one_line(monkeypatch, proxy, says):
    monkeypatch.setenv('ALL_PROXY', proxy)
    with pytest.raises(ValueError, match=says) as e: OpenAIWriter('small', base_url='http://127.0.0.1:9/v1')
    assert 'secret' not in str(e.value) and '\n' not in str(e.value)


def test_other_headers_that_cannot_be_sent_stop_at_once(serve, monkeypatch):
    monkeypatch.setenv('OPENAI_ORG_ID', 'org-1\n')
    server, writer = serve(lambda asked, n: 'fine')
    began = time.monotonic()
    with pytest.raises(ValueError, match='no request can be sent to http://127.0.0.1:.*Illegal header'): writer.write(requests(3))
    assert not server.asked and writer.store.spent()[1] == 0 and time.monotonic() - began < 10


@pytest.mark.parametrize('answer, says', [((200, dict(data=[dict(id='small'), dict(id=None), 5, dict(id='large')])), None), ((401, {}), 'answers 401: a key is wanted'), ((200, b'<html>'), 'is no OpenAI-compatible server'), ((200, dict(data='x')), 'is no OpenAI-compatible server'),
    ((200, b'['*100_000), 'is no OpenAI-compatible server'), ((307, b''), 'answers 307'), ('drip', 'does not answer'), (None, 'does not answer')])
def test_the_models_of_a_server(flood, answer, says):
    def drip():
        while True: yield b' '; time.sleep(.05)
    parts = drip if answer in ('drip', None) else lambda: [answer[1] if isinstance(answer[1], bytes) else json.dumps(answer[1]).encode()]
    server = flood(parts, answer[0] if isinstance(answer, tuple) else 200, Location='http://127.0.0.1:9/v1/models')
    if answer is None: server.shutdown(); server.server_close()
    url = server.url.replace('http://', 'http://me:secret@') + '?key=secret'
    if says is None: assert listed_models(url) == ['small', 'large']
    else:
        began = time.monotonic()
        with pytest.raises((ValueError, ConnectionError), match=f'^{server.url} {says}') as e: listed_models(url, seconds=1.)
        assert 'secret' not in str(e.value) and '\n' not in str(e.value) and time.monotonic() - began < 8


# ---- the server's words

@pytest.mark.parametrize('body, says', [
    (dict(error=dict(message='quite wrong')), 'quite wrong'), (dict(error='model not loaded'), 'model not loaded'), (dict(detail='CUDA graph broke'), 'CUDA graph broke'), (dict(detail=dict(reason='no room')), 'no room'),
    (dict(detail=[dict(loc=['body', 'model'], msg='Field required', type='missing')]), 'body.model: Field required'), (dict(errors=['first', dict(message='second')]), 'first; second'), (dict(errors=[dict(detail='x y')]), 'x y'),
    (dict(message='plain'), 'plain'), (dict(object='error', message=dict(detail=[dict(msg='deep')])), 'deep'), ([dict(error=dict(message='in a list'))], 'in a list'), ('a string', 'a string'), (dict(fault=dict(faultstring='bad gate')), 'bad gate'),
    (dict(strange='thing'), '"strange": "thing"'), (b'404 page not here', '404 page not here'), (b'<html><head><title>Sign in</title><style>x{}</style></head><body>lots</body></html>', 'Sign in'), (b'', 'nothing more'),
    (dict(error=dict(message=None, msg='told otherwise')), 'told otherwise'), (dict(detail=[[[[[[[[['deep']]]]]]]]]), 'detail'), (dict(error=7), '7'), (b'\xff\xfe\x00', 'error 400')])
@pytest.mark.parametrize('status', [400, 500])
def test_what_a_server_says_reaches_the_user(serve, body, says, status):
    server, writer = serve(lambda asked, n: (status, body, {}))
    if status == 500: assert says.replace('400', '500') in writer.write(requests(1))[0].error
    else:
        with pytest.raises((ValueError, PermissionError)) as e: writer.write(requests(1))
        assert says.replace('400', str(status)) in str(e.value) and '\n' not in str(e.value) and len(server.asked) == 1


@pytest.mark.parametrize('loc', [['body', 'seed'], ['seed'], ['body', 'seed', 'int']])
@pytest.mark.parametrize('wrap', [lambda said: dict(detail=said), lambda said: dict(error=dict(message=dict(detail=said), type='invalid_request_error')), lambda said: dict(message=dict(detail=said)), lambda said: dict(error=said)])
def test_a_parameter_that_fastapi_forbids_is_dropped(serve, loc, wrap, status=422):
    said = [dict(type='extra_forbidden', loc=loc, msg='Extra inputs are not permitted', input=1)]
    server, writer = serve(lambda asked, n: (status, wrap(said), {}) if 'seed' in asked else 'fine')
    assert [r.text for r in writer.write(requests(2))] == ['fine']*2 and writer.dropped == ['seed']


def test_several_parameters_in_one_refusal(serve):
    said = lambda asked: [dict(type='extra_forbidden', loc=['body', name], msg='Extra inputs are not permitted') for name in ('top_p', 'seed', 'response_format') if name in asked]
    server, writer = serve(lambda asked, n: (422, dict(detail=said(asked)), {}) if said(asked) else '{"samples": ["a", "b"]}')
    assert writer.write(requests(1), schema=LISTS)[0].outcome == 'ok' and set(writer.dropped) == {'top_p', 'seed'} and writer.form == 'prompt alone'


def test_a_context_that_is_too_short_rejects_the_prompt_alone(serve):
    long = (400, dict(detail="This model's maximum context length is 512 tokens, the prompt has 900"), {})
    server, writer = serve(lambda asked, n: long if '#1.' in asked['messages'][0]['content'] else 'fine')
    assert [r.outcome for r in writer.write(requests(3))] == ['ok', 'rejected', 'ok']


@pytest.mark.parametrize('body, kind, says', [
    (dict(error=dict(message='Insufficient credits', code=402)), BudgetSpent, 'Insufficient credits'), (dict(error=dict(message='No auth', code='401')), PermissionError, 'No auth'),
    (dict(error='Unexpected endpoint or method.'), ConnectionError, 'Unexpected endpoint'), (dict(error=dict(message='Provider returned error'), choices=[]), ConnectionError, 'Provider returned error')])
def test_an_error_with_status_200_is_one(serve, body, kind, says):
    server, writer = serve(lambda asked, n: (200, body, {}), tries=8)
    with pytest.raises(kind, match=says) as e: writer.write(requests(4))
    assert 'ending in /v1' not in str(e.value) and not writer.store.answered(writer.name)


@pytest.mark.parametrize('finish', [dict(finish_reason='error'), dict(finish_reason='error', error=dict(message='upstream died')), dict(finish_reason='stop', error=dict(code=502, message='upstream died'))])
def test_a_reply_that_ended_in_an_error_is_asked_for_again(serve, finish):
    def broken(): body = completion('half a te'); body['choices'][0] |= finish; return body
    server, writer = serve(lambda asked, n: (200, broken(), {}) if n == 1 else 'fine')
    reply, = writer.write(requests(1))
    assert reply.text == 'fine' and reply.attempts == 2 and attempts(writer.store) == ['error', 'delivered']
    assert reply.prompt_tokens == 200 # it was billed


@pytest.mark.parametrize('body', [dict(detail='Not Found'), b'404 page not found', b'', dict(error=dict(code=404, message='File Not Found', type='not_found_error')), dict(error='Not Found')])
def test_a_missing_v1_is_not_a_missing_model(serve, body):
    server, writer = serve(lambda asked, n: (404, body, {}))
    with pytest.raises(ValueError, match='has no chat completions .*is it the base URL of a server, ending in /v1?') as e: writer.write(requests(1))
    assert 'no model' not in str(e.value)
    for says in ('The model `small` does not exist', "model 'small' not found, try pulling it first"):
        server, writer = serve(lambda asked, n: (404, dict(error=dict(message=says)), {}))
        with pytest.raises(ValueError, match="has no model 'small'"): writer.write(requests(1))


# ---- odd replies

def deep(n): return b'{"choices": ' + b'['*n + b']'*n + b'}'

def odd(**fields): return completion('fine') | fields

def message(value): return odd(choices=[dict(index=0, finish_reason='stop', message=value)])

UNREADABLE = dict(text=odd(choices='abc'), number=odd(choices=7), numbers=odd(choices=[5]), none=odd(choices=None), empty=odd(choices=[]), strings=odd(choices=['fine']), object=odd(choices=dict(message=dict(content='fine'))),
                  list=message([]), string=message('fine'), null=message(None), whole_list=[completion('fine')], whole_string='fine', whole_null=None, deep=deep(100_000), deeper=b'['*300_000, digits=b'9'*5000, latin=b'{"choices": "\xff"}', no_json=b'fine')

@pytest.mark.parametrize('name', UNREADABLE)
def test_an_odd_reply_ends_in_a_recorded_outcome(serve, name):
    server, writer = serve(lambda asked, n: (200, UNREADABLE[name], {}) if '#1.' in asked['messages'][0]['content'] else 'fine', patience=5.)
    replies = writer.write(requests(4))
    assert [r.outcome for r in replies] == ['ok', 'failed', 'ok', 'ok'] and replies[1].error.startswith('no reply in 2 tries (not the reply of a chat completions server')
    assert sorted(attempts(writer.store)) == ['delivered']*3 + ['unreadable']*2
    assert writer_at(server, store=writer.store).write(requests(2, 1))[0].outcome == 'given up'
    again = len(server.asked)
    assert [r.cached for r in writer_at(server, store=writer.store).write(requests(4))] == [True]*4 and len(server.asked) == again


@pytest.mark.parametrize('fields', [dict(id=['a', 1]), dict(id={}, created={}), dict(created={'a': 1}), dict(created='today'), dict(id=7, created=float('1e400')), dict(model={'name': 'x'}), dict(model=['x']), dict(model=None), dict(model='m'*10**6), dict(object=5), dict(service_tier=[])])
def test_odd_fields_that_are_not_needed_do_no_harm(serve, fields):
    server, writer = serve(lambda asked, n: (200, odd(**fields), {}))
    assert [(r.outcome, r.text) for r in writer.write(requests(3))] == [('ok', 'fine')]*3 and len(writer.write(requests(1))[0].model) <= 200


@pytest.mark.parametrize('content, said', [([dict(type='text', text=5), dict(type='text', text='fine')], 'fine'), ([dict(text=None), 'x', dict(text='fine')], 'fine'), (dict(text='x'), None), (5, None), ([[]], None), (True, None)])
def test_odd_contents(serve, content, said):
    server, writer = serve(lambda asked, n: (200, completion(content), {}))
    reply, = writer.write(requests(1))
    assert (reply.text, reply.outcome) == (said, 'ok' if said else 'empty')


def test_odd_refusals_and_finish_reasons(serve):
    bodies = [message(dict(content=None, refusal=dict(why='no'))), message(dict(content='fine', refusal=[])), odd(choices=[dict(finish_reason=['stop'], message=dict(content='fine'))])]
    server, writer = serve(lambda asked, n: (200, bodies[n - 1], {}), concurrency=1)
    assert [r.outcome for r in writer.write(requests(3))] == ['refused', 'ok', 'ok']


def test_thinking_is_asked_about_once_and_is_no_text(serve):
    server, writer = serve(lambda asked, n: (200, completion('<think>Hm, ships ...', finish='length'), {}) if len(asked['messages']) == 1 or '#1' in asked['messages'][0]['content'] else '<think>Ships.</think>A ship sails.')
    good, bad = writer.write(requests(2))
    assert good.text == 'A ship sails.' and good.attempts == 2 and (bad.outcome, bad.text, bad.attempts) == ('unparsed', None, 2) and 'thinking that never ends' in bad.error
    assert server.asked[-1]['max_tokens'] == 128


# ---- what is billed

ODD_USAGE = [None, [], 'many', 5, {}, [1, 2], dict(prompt_tokens=100), dict(completion_tokens=10), dict(prompt_tokens=100, completion_tokens=None), dict(prompt_tokens=100, completion_tokens=0), dict(prompt_tokens=0, completion_tokens=10),
             dict(prompt_tokens=1.5, completion_tokens=10), dict(prompt_tokens=100, completion_tokens=-5), dict(prompt_tokens=-100, completion_tokens=-5), dict(prompt_tokens=10**30, completion_tokens=10), dict(prompt_tokens=100, completion_tokens=2**62),
             dict(prompt_tokens='many', completion_tokens=10), dict(prompt_tokens=True, completion_tokens=10), dict(prompt_tokens=[100], completion_tokens={}), dict(prompt_tokens=float('inf'), completion_tokens=float('nan'))]

@pytest.mark.parametrize('usage', ODD_USAGE)
def test_usage_that_is_missing_or_cannot_be_true_counts_at_its_most(serve, usage):
    server, writer = serve(lambda asked, n: (200, odd(usage=usage), {}), prices=PRICES)
    assert writer.write(requests(2))[0].outcome == 'ok' and writer.store.count('attempts') == 2
    most, = writer.store.rows('SELECT sum(most_tokens), sum(most_cost) FROM attempts')
    assert writer.store.spent(PRICES['small'])[1:] == (most[0], pytest.approx(most[1])) and (writer.ledger.tokens, writer.ledger.usd) == (most[0], pytest.approx(most[1])) and writer.store.cost() == 0
    assert attempts(writer.store) == ['delivered']*2 and writer.store.accounts()[writer.name]['']['perhaps_billed'] == pytest.approx(most[1])


@pytest.mark.parametrize('usage', [dict(prompt_tokens='100', completion_tokens='10'), dict(prompt_tokens=100., completion_tokens=10.), dict(prompt_tokens=100, completion_tokens=10, more=[1])])
def test_usage_that_can_be_read_is_believed(serve, usage):
    server, writer = serve(lambda asked, n: (200, odd(usage=usage), {}), prices=PRICES)
    reply, = writer.write(requests(1))
    assert (reply.prompt_tokens, reply.completion_tokens, reply.cost) == (100, 10, pytest.approx(.0002)) and tokens_of(usage, 'fine') == (100, 10)


@pytest.mark.parametrize('usage', [dict(prompt_tokens=5), dict(prompt_tokens=-10**6, completion_tokens=-10**6)])
def test_a_budget_holds_where_usage_says_little(serve, usage):
    server, writer = serve(lambda asked, n: (200, odd(usage=usage), {}), prices=PRICES, budget=.01)
    with pytest.raises(BudgetSpent): writer.write(requests(400))
    assert 2 <= len(server.asked) < 16


def with_one_id(text): return (200, completion(text) | dict(id='chatcmpl-1', created=1_700_000_000), {})


def number(asked): return asked['messages'][0]['content'].strip('.').split('#')[1]


def test_a_server_with_one_id_for_all_replies_can_be_used(serve):
    server, writer = serve(lambda asked, n: with_one_id(f'Text {number(asked)}.'))
    assert [r.text for r in writer.write(requests(12))] == [f'Text {i}.' for i in range(12)] and len(server.asked) == 12
    server, writer = serve(lambda asked, n: with_one_id(f'Text {int(number(asked))//3}.')) # equal texts come along
    assert [r.text for r in writer.write(requests(12), stage='other')] == [f'Text {i//3}.' for i in range(12)]


@pytest.mark.parametrize('say', [lambda i: 'A', lambda i: 'AB'[i % 3 == 0]])
def test_choices_are_equal_of_themselves(serve, say):
    server, writer = serve(lambda asked, n: with_one_id(json.dumps(dict(choice=say(int(number(asked)))))))
    judged = [Request(f'Which is #{i}.', temperature=0., seed=i) for i in range(12)]
    assert [r.text for r in writer.write(judged, choices=['A', 'B'])] == [say(i) for i in range(12)] and len(server.asked) <= 13


def test_the_same_reply_to_every_request_is_none(serve):
    for how in (dict(), dict(schema=LISTS)):
        server, writer = serve(lambda asked, n: with_one_id('{"samples": ["a", "b"]}'))
        with pytest.raises(ConnectionError, match='the reply to another request'): writer.write(requests(12), **how)
        assert attempts(writer.store).count('delivered') == 1
    server, writer = serve(lambda asked, n: with_one_id('A cat.'))
    same = [Request('Name an animal.', temperature=0., seed=i) for i in range(4)]
    assert [r.text for r in writer.write(same)] == ['A cat.']*4 # as it should be


def test_a_choice_of_another_request_is_asked_for_again(serve):
    said = []
    def answer(asked, n):
        if n % 4 == 3: return said[0]
        said.append((200, completion('{"choice": "A"}') | dict(id=f'chatcmpl-{n}', created=1_700_000_000), {}))
        return said[-1]
    server, writer = serve(answer, tries=8)
    replies = writer.write([Request(f'Which is #{i}.', temperature=0.) for i in range(12)], choices=['A', 'B'])
    assert [r.text for r in replies] == ['A']*12 and attempts(writer.store).count('replayed') == (len(server.asked) + 1)//4 > 0


@pytest.mark.parametrize('status', [300, 304, 305])
def test_a_status_of_the_three_hundreds_without_a_place_is_no_redirect(serve, status):
    body = b'' if status == 304 else dict(error=dict(message='choose one'))
    server, writer = serve(lambda asked, n: (status, body, {}))
    with pytest.raises(ValueError, match=f'answers with the status {status} and no reply \\(error {status}: {"nothing more" if status == 304 else "choose one"}\\)') as e: writer.write(requests(4))
    assert 'redirect' not in str(e.value) and len(server.asked) == 1 and '\n' not in str(e.value)


@pytest.mark.parametrize('status', [301, 302, 303, 307, 308])
def test_redirects_are_not_followed_and_not_paid_for(serve, status):
    other, _ = serve(lambda asked, n: 'from somebody else')
    server, writer = serve(lambda asked, n: (status, b'', {'Location': f'{other.url}/chat/completions?token=secret'}), budget=Budget(requests=50))
    with pytest.raises(ValueError, match=f'answers with a redirect, which is not followed .*{other.server_port}') as e: writer.write(requests(4))
    assert not other.asked and len(server.asked) == 1 == writer.store.count('attempts') and 'secret' not in str(e.value)
    server, writer = serve(lambda asked, n: (status, b'', {'Location': server.url})) # to itself
    with pytest.raises(ValueError): writer.write(requests(4))
    assert len(server.asked) == 1


def test_one_store_has_one_spender(tmp_path):
    with FaultServer(seconds=.02) as server:
        one, two = (writer_at(server, store=RunStore(tmp_path/'s.sqlite'), budget=Budget(requests=30)) for _ in range(2))
        replies = one.stream(requests(60))
        next(replies)
        with pytest.raises(RuntimeError, match='another call is writing into this store'): two.write(requests(60, 60))
        with pytest.raises(BudgetSpent): list(replies)
        with pytest.raises(BudgetSpent): two.write(requests(60, 60)) # the same budget
        assert len(server.log) == 30
        two.ledger.budget = Budget(requests=40)
        with pytest.raises(BudgetSpent): two.write(requests(60, 60))
        assert len(server.log) == 40


# ---- outages

@pytest.mark.parametrize('trouble', ['hang', 'reset', 'closed', 'cut', '500', '408', '503', 'bad_body'])
def test_a_lone_last_request_outlives_an_outage_of_any_kind(tmp_path, trouble):
    up = [True]
    with FaultServer(lambda asked, n: 'ok' if up[0] else trouble) as server, RunStore(tmp_path/'s.sqlite') as store:
        stage = lambda: [r.outcome for r in writer_at(server, store=store, timeout=.3).write(requests(4))]
        assert [r.outcome for r in writer_at(server, store=store).write(requests(3))] == ['ok']*3
        up[0] = False
        for _ in range(3): assert stage() == ['ok']*3 + ['failed']
        up[0] = True
        assert stage() == ['ok']*4


@pytest.mark.parametrize('trouble', ['hang', 'reset', '500'])
def test_a_lone_request_that_is_itself_the_trouble_is_given_up(tmp_path, trouble):
    with FaultServer(lambda asked, n: trouble if '#3' in asked['messages'][0]['content'] else 'ok') as server, RunStore(tmp_path/'s.sqlite') as store:
        stage = lambda: [r.outcome for r in writer_at(server, store=store, timeout=.3).write(requests(4))]
        assert [r.outcome for r in writer_at(server, store=store).write(requests(3))] == ['ok']*3
        assert stage()[3] == 'failed' and stage()[3] == 'given up' # a small question has an answer
        asked = len(server.log)
        assert stage()[3] == 'given up' and len(server.log) == asked == store.count('attempts')


# ---- too much

def peak(act) -> float: # MB that this process grows by
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    act()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024


class Flood(BaseHTTPRequestHandler):
    "A body of `server.size` bytes, or of drops that never end"
    protocol_version = 'HTTP/1.1'
    def do_POST(self):
        self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.send_response(self.server.status)
        for k, v in self.server.headers.items(): self.send_header(k, v)
        self.end_headers()
        try:
            for part in self.server.parts(): self.wfile.write(part)
        except OSError: pass
        self.close_connection = True
    def do_GET(self): self.do_POST()
    def log_message(self, *_): pass


@pytest.fixture
def flood():
    servers = []
    def start(parts, status=200, **headers):
        server = ThreadingHTTPServer(('127.0.0.1', 0), Flood)
        server.daemon_threads, server.parts, server.status, server.headers = True, parts, status, {'Content-Type': 'application/json', 'Connection': 'close'} | headers
        server.url = f'http://127.0.0.1:{server.server_port}/v1'
        threading.Thread(target=server.serve_forever, args=[.02], daemon=True).start()
        servers.append(server)
        return server
    yield start
    for server in servers: server.shutdown(); server.server_close()


def test_a_body_without_end_is_an_outcome(flood):
    def endless():
        while True: yield b' '*10**6
    writer = writer_at(flood(endless), timeout=20., prices=PRICES)
    assert peak(lambda: writer.write(requests(1))) < 100
    reply, = writer.write(requests(1))
    assert (reply.outcome, reply.error, reply.attempts) == ('unparsed', f'a reply of more than {MOST_BYTES//10**6} MB', 1) and reply.cached
    assert writer.store.spent(PRICES['small'])[1] == writer.store.rows('SELECT sum(most_tokens) FROM attempts')[0][0]


def test_a_small_body_that_unpacks_to_a_large_one(flood):
    packed = gzip.compress(b' '*400_000_000)
    assert len(packed) < 500_000
    writer = writer_at(flood(lambda: [packed], **{'Content-Encoding': 'gzip', 'Content-Length': str(len(packed))}), timeout=20.)
    assert peak(lambda: writer.write(requests(1))) < 200
    assert writer.write(requests(1))[0].error == f'a reply of more than {MOST_BYTES//10**6} MB'
    whole = gzip.compress(json.dumps(completion('fine')).encode())
    writer = writer_at(flood(lambda: [whole], **{'Content-Encoding': 'gzip', 'Content-Length': str(len(whole))}))
    assert writer.write(requests(1))[0].text == 'fine'


def test_an_error_without_end_is_the_error(flood):
    def endless():
        yield b'{"detail": "no such thing'
        while True: yield b'!'*10**6
    with pytest.raises(ValueError, match='error 400: .*no such thing!'): writer_at(flood(endless, status=400), timeout=20.).write(requests(1))


def test_a_drip_ends_with_the_timeout(flood):
    def drip():
        while True: yield b' '; time.sleep(.05)
    began = time.monotonic()
    reply, = writer_at(flood(drip), timeout=.5).write(requests(1))
    assert reply.outcome == 'failed' and 'no reply in 0.5 s' in reply.error and time.monotonic() - began < 10


@pytest.mark.parametrize('status', [200, 400])
@pytest.mark.parametrize('body', [b'<title>'*500_000, b'<'*3_500_000, b'{"a":'*600_000, json.dumps(dict(detail=[['x'*100]*20]*1500)).encode(), json.dumps(dict(error='e'*3_500_000)).encode()])
def test_a_long_error_costs_little(flood, body, status):
    began = time.process_time()
    with pytest.raises((ValueError, ConnectionError)) as e: writer_at(flood(lambda: [body], status), tries=8).write(requests(1))
    assert time.process_time() - began < 8 and len(str(e.value)) < 700 # four times


@pytest.mark.parametrize('form', [dict(), dict(schema=LISTS), dict(choices=['A', 'B'])])
def test_a_text_far_beyond_what_was_asked_for_is_no_text(serve, form):
    server, writer = serve(lambda asked, n: 'A very long story. '*20_000)
    reply, = writer.write(requests(1), **form)
    assert (reply.outcome, reply.text, reply.error) == ('unparsed', None, 'a text of 380,000 characters, where 64 tokens were asked for') and len(server.asked) == 1
    assert os.path.getsize(writer.store.path) + os.path.getsize(f'{writer.store.path}-wal') < 300_000
    server, writer = serve(lambda asked, n: 'A long story. '*1000) # what many tokens may be
    assert len(writer.write(requests(1))[0].text) == 13_999


# ---- secrets

@pytest.mark.parametrize('spell', [lambda key: ''.join(f'\\u{ord(c):04x}' for c in key), lambda key: '\\u0073' + key[1:], lambda key: key.replace('-', '\\u002D')])
def test_a_key_in_json_escapes_is_hidden(serve, spell, tmp_path):
    server, writer = serve(lambda asked, n: '{"samples": ["it is %s", "b"]}' % spell(KEY) if n == 1 else '{"%s": 1, "samples": ["a", "b"]}' % spell(KEY), store=RunStore(tmp_path/'s.sqlite'), concurrency=1)
    first, second = writer.write(requests(2), schema=LISTS)
    assert json.loads(first.text)['samples'] == ['it is ***', 'b'] and second.outcome == 'unparsed' and '***' in second.error
    assert all(KEY.encode() not in f.read_bytes() for f in tmp_path.iterdir())


@pytest.mark.parametrize('key, says, shown', [('abc', 'wrong key abc, and abcd', 'wrong key ***, and abcd'), ('x', 'the key x is wrong, x!', 'the key *** is wrong, ***!'), ('test', 'wrong key: test', 'wrong key: ***'),
    (KEY, f'{KEY[:8]} {KEY[8:]} is wrong', '*** is wrong'), (KEY, f'{KEY[:8]}\n    {KEY[8:12]}\n{KEY[12:]} is wrong', '*** is wrong'), ('a"b\\c-0123456789abcdef', 'a"b\\c-0123456789abcdef', '***')])
def test_a_key_in_an_error_is_hidden(serve, monkeypatch, key, says, shown):
    monkeypatch.setenv('OPENAI_API_KEY', key)
    server, writer = serve(lambda asked, n: error(401, says))
    with pytest.raises(PermissionError) as e: writer.write(requests(1))
    assert f'error 401: {shown})' in str(e.value)


def test_a_certificate_that_is_not_trusted_is_named(tmp_path):
    if not shutil.which('openssl'): pytest.skip('no openssl here')
    subprocess.run(f'openssl req -x509 -newkey rsa:2048 -nodes -keyout {tmp_path}/key.pem -out {tmp_path}/cert.pem -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1'.split(), check=True, capture_output=True)
    server = Server(lambda asked, n: 'fine')
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path/'cert.pem', tmp_path/'key.pem')
    server.socket = context.wrap_socket(server.socket, server_side=True)
    try:
        with pytest.raises(ConnectionError, match='the certificate of https://127.0.0.1:.* is not trusted .*certificate verify failed'):
            OpenAIWriter('small', base_url=server.url.replace('http', 'https'), pause=.05).write(requests(2))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('SSL_CERT_FILE', str(tmp_path/'cert.pem'))
            assert OpenAIWriter('small', base_url=server.url.replace('http', 'https')).write(requests(1))[0].text == 'fine'
    finally: server.shutdown(); server.server_close()


# ---- killed between a reply and its place in the store

def test_kill_9_at_any_commit_leaves_no_reply_paid_and_lost(tmp_path):
    with FaultServer() as server:
        for dies_at in range(2, 24, 3):
            path = tmp_path/f'{dies_at}.sqlite'
            if not (child := os.fork()):
                try:
                    store, left = RunStore(path), [dies_at]
                    def count(statement):
                        if statement.startswith('BEGIN'): left[0] -= 1
                        if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
                    store._db.set_trace_callback(count)
                    writer_at(server, store=store, concurrency=1).write(requests(12))
                finally: os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            with RunStore(path) as store: assert store.count('replies') == attempts(store).count('delivered')


def test_words_of_nothing(): assert server_words({}) == server_words(None) == server_words([]) == ('', '', '')


def test_thinking_that_only_the_total_counts_is_paid():
    assert tokens_of(dict(prompt_tokens=20, completion_tokens=5, total_tokens=2025), 'fine') == (20, 2005)
    assert tokens_of(dict(prompt_tokens=20, completion_tokens=5, total_tokens=10**12), 'fine') == (20, 5)


def test_a_server_that_lists_the_key(flood):
    "`doctor` shows what a server says it has"
    names = json.dumps(dict(data=[dict(id=f'Bearer {KEY}'), dict(id='a\nb' + 'y'*500)])).encode()
    assert listed_models(flood(lambda: [names], 200).url) == ['Bearer ***', 'a b' + 'y'*77]
