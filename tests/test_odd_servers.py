"Servers that say odd things, or say them in odd ways; keys and addresses that cannot be used"
import json, time
from functools import partial
import pytest
from saeexplainer.replies import Request
from saeexplainer.store import RunStore
from saeexplainer.writers.budget import Budget, BudgetSpent
from saeexplainer.writers.errors import check_address, server_words, tokens_of
from saeexplainer.writers.keys import api_key
from saeexplainer.writers.openai import OpenAIWriter, listed_models
from saeexplainer.writers.parsing import text_schema
from fault_server import FaultServer, prompt_of
from servers import KEY, PRICES, drip, flooding, line_of, number_of, plant_key, requests, serving, writer_at
from writer_server import completion

HASTE = dict(patience=.3, tries=2)
LISTS = text_schema({'samples': 2})


@pytest.fixture(autouse=True)
def environment(monkeypatch): plant_key(monkeypatch)


@pytest.fixture
def serve():
    with serving(**HASTE) as start: yield start


@pytest.fixture
def flood():
    with flooding() as start: yield start


def attempts(store): return [outcome for outcome, in store.rows('SELECT outcome FROM attempts ORDER BY id')]


def outcomes(replies): return [reply.outcome for reply in replies]


def texts(replies): return [reply.text for reply in replies]


# ---- keys and addresses

@pytest.mark.parametrize('key, says', [
    (KEY + '\n', 'a line break'),
    (KEY + '\r', 'a line break'),
    (f'{KEY[:9]}\n{KEY[9:]}', 'a line break'),
    (f'Bearer {KEY}', 'a blank'),
    (KEY + 'é', 'characters'),
    (f'“{KEY}”', 'characters'),
    (f'\ufeff{KEY}', 'characters'),
    (KEY + '\x07', 'characters'),
    (f'"{KEY}"', 'quotes'),
    (f"'{KEY}'", 'quotes')])
def test_a_key_that_cannot_be_one_is_refused_before_anything_is_sent(serve, monkeypatch, key, says):
    server, writer = serve(lambda asked, n: 'fine')
    monkeypatch.setenv('OPENAI_API_KEY', key)
    for act in (partial(writer.write, requests(2)), partial(writer_at, server), api_key):
        line = line_of(ValueError, act)
        assert line.startswith(f'OPENAI_API_KEY holds {says}')
        assert KEY not in line
        assert KEY[:9] not in line
    assert not server.asked
    assert not writer.store.count('attempts')


def test_blanks_around_a_key_are_left_out(serve, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', f' {KEY}\t')
    server, writer = serve(lambda asked, n: f'fine {KEY}')
    assert texts(writer.write(requests(1))) == ['fine ***']
    assert server.keys == {f'Bearer {KEY}'}


@pytest.mark.parametrize('url, says', [
    ('localhost:9/v1', 'http://'),
    ('foo', 'http://'),
    ('ftp://127.0.0.1/v1', 'http://'),
    ('//127.0.0.1/v1', 'http://'),
    ('', 'http://'),
    (' ', 'http://'),
    ('http:/127.0.0.1/v1', 'http://'),
    ('http://127.0.0.1:99999/v1', 'port'),
    ('http://127.0.0.1:-1/v1', 'port'),
    ('http://127.0.0.1:0/v1', 'port'),
    ('http://127.0.0.1:80a/v1', 'port'),
    ('http://[::1/v1', 'host'),
    ('http://::1]:80/v1', 'host'),
    ('http:///v1', 'host'),
    ('http://:80/v1', 'host'),
    ('http://127.0.0.1 :80/v1', 'blank'),
    ('http://127.0.0.1/v1\nx', 'blank'),
    ('http://127.0.0.1/v1/chat/completions', '/chat/completions'),
    ('http://127.0.0.1/v1?key=secret', 'query'),
    ('http://127.0.0.1/v1#secret', 'query'),
    ('http://me:secret@127.0.0.1/v1', 'password'),
    ('https://secret@127.0.0.1/v1', 'password')])
def test_an_address_that_cannot_be_used_is_refused_at_once(url, says, monkeypatch):
    monkeypatch.setenv('OPENAI_BASE_URL', url)
    acts = [partial(check_address, url)]
    if url.strip(): acts.append(partial(OpenAIWriter, 'small'))
    for act in acts:
        began = time.monotonic()
        line = line_of(ValueError, act)
        assert time.monotonic() - began < 5
        _, is_none, why = line.partition(' is no address of a server: ')
        assert is_none
        assert '--base-url' in why
        assert says in why
        assert 'secret' not in line


@pytest.mark.parametrize('url', [
    'http://127.0.0.1:8000/v1', 'https://api.example/openai/v1/', ' http://127.0.0.1/v1\n', 'http://[::1]:8000/v1',
    'HTTP://localhost:65535', 'http://bücher.example/v1'])
def test_an_address_that_can_be_used_is_taken(url):
    assert check_address(url) == url.strip()
    assert OpenAIWriter('small', base_url=url).base_url == url.strip()


@pytest.mark.parametrize('proxy, says', [
    ('socks5://me:secret@127.0.0.1:9', 'ALL_PROXY names a SOCKS proxy: it needs the package socksio'),
    ('gopher://127.0.0.1', 'is the proxy in ALL_PROXY an address'),
    ('http://127.0.0.1:99999', 'is the proxy in ALL_PROXY an address'),
    ('http://[::1', 'is the proxy in ALL_PROXY an address')])
def test_a_proxy_that_cannot_be_used_is_one_line(monkeypatch, proxy, says):
    monkeypatch.setenv('ALL_PROXY', proxy)
    line = line_of(ValueError, OpenAIWriter, 'small', base_url='http://127.0.0.1:9/v1')
    assert says in line
    assert 'secret' not in line


def test_other_headers_that_cannot_be_sent_stop_at_once(serve, monkeypatch):
    monkeypatch.setenv('OPENAI_ORG_ID', 'org-1\n')
    server, writer = serve(lambda asked, n: 'fine')
    began = time.monotonic()
    says = 'no request can be sent to http://127.0.0.1:.*Illegal header'
    with pytest.raises(ValueError, match=says): writer.write(requests(3))
    assert time.monotonic() - began < 10
    assert not server.asked
    assert writer.store.spent()[1] == 0


# ---- the models of a server

def with_secrets(server): return server.url.replace('http://', 'http://me:secret@') + '?key=secret'


def test_the_models_of_a_server(flood):
    models = dict(data=[dict(id='small'), dict(id=None), 5, dict(id='large')])
    server = flood(lambda: [json.dumps(models).encode()])
    assert listed_models(with_secrets(server)) == ['small', 'large']


def assert_lists_nothing(server, says):
    began = time.monotonic()
    line = line_of((ValueError, ConnectionError), listed_models, with_secrets(server), seconds=1.)
    assert line.startswith(f'{server.url} {says}')
    assert 'secret' not in line
    assert time.monotonic() - began < 8


@pytest.mark.parametrize('status, body, says', [
    (401, b'{}', 'answers 401: a key is wanted'),
    (200, b'<html>', 'is no OpenAI-compatible server'),
    (200, b'{"data": "x"}', 'is no OpenAI-compatible server'),
    (200, b'['*100_000, 'is no OpenAI-compatible server'),
    (307, b'', 'answers 307')])
def test_a_server_that_lists_no_models(flood, status, body, says):
    assert_lists_nothing(flood(lambda: [body], status, Location='http://127.0.0.1:9/v1/models'), says)


def test_a_server_whose_list_never_ends(flood):
    assert_lists_nothing(flood(drip), 'does not answer')


def test_no_server_lists_no_models(flood):
    server = flood(drip)
    server.end()
    assert_lists_nothing(server, 'does not answer')


def test_a_server_that_lists_the_key(flood):
    "`doctor` shows what a server says it has"
    models = dict(data=[dict(id=f'Bearer {KEY}'), dict(id='a\nb' + 'y'*500)])
    server = flood(lambda: [json.dumps(models).encode()])
    assert listed_models(server.url) == ['Bearer ***', 'a b' + 'y'*77]


# ---- the server's words

FORM_ERROR = dict(detail=[dict(loc=['body', 'model'], msg='Field required', type='missing')])
SIGN_IN = b'<html><head><title>Sign in</title><style>x{}</style></head><body>lots</body></html>'
WORDS = [ # (body of an error, what a user reads)
    (dict(error=dict(message='quite wrong')), 'quite wrong'),
    (dict(error='model not loaded'), 'model not loaded'),
    (dict(detail='CUDA graph broke'), 'CUDA graph broke'),
    (dict(detail=dict(reason='no room')), 'no room'),
    (FORM_ERROR, 'body.model: Field required'),
    (dict(errors=['first', dict(message='second')]), 'first; second'),
    (dict(errors=[dict(detail='x y')]), 'x y'),
    (dict(message='plain'), 'plain'),
    (dict(object='error', message=dict(detail=[dict(msg='deep')])), 'deep'),
    ([dict(error=dict(message='in a list'))], 'in a list'),
    ('a string', 'a string'),
    (dict(fault=dict(faultstring='bad gate')), 'bad gate'),
    (dict(strange='thing'), '"strange": "thing"'),
    (b'404 page not here', '404 page not here'),
    (SIGN_IN, 'Sign in'),
    (b'', 'nothing more'),
    (dict(error=dict(message=None, msg='told otherwise')), 'told otherwise'),
    (dict(detail=[[[[[[[[['deep']]]]]]]]]), 'detail'),
    (dict(error=7), '7')]

@pytest.mark.parametrize('body, says', [*WORDS, (b'\xff\xfe\x00', 'error 400')])
def test_what_a_server_says_reaches_the_user(serve, body, says):
    server, writer = serve(lambda asked, n: (400, body, {}))
    assert says in line_of((ValueError, PermissionError), writer.write, requests(1))
    assert len(server.asked) == 1


@pytest.mark.parametrize('body, says', [*WORDS, (b'\xff\xfe\x00', 'error 500')])
def test_what_a_server_in_trouble_says_is_kept(serve, body, says):
    _, writer = serve(lambda asked, n: (500, body, {}))
    reply, = writer.write(requests(1))
    assert says in reply.error


def test_words_of_nothing():
    for nothing in ({}, None, []): assert server_words(nothing) == ('', '', '')


@pytest.mark.parametrize('loc', [['body', 'seed'], ['seed'], ['body', 'seed', 'int']])
@pytest.mark.parametrize('wrap', [
    lambda said: dict(detail=said),
    lambda said: dict(error=dict(message=dict(detail=said), type='invalid_request_error')),
    lambda said: dict(message=dict(detail=said)),
    lambda said: dict(error=said)])
def test_a_parameter_that_fastapi_forbids_is_dropped(serve, loc, wrap):
    said = [dict(type='extra_forbidden', loc=loc, msg='Extra inputs are not permitted', input=1)]
    _, writer = serve(lambda asked, n: (422, wrap(said), {}) if 'seed' in asked else 'fine')
    assert texts(writer.write(requests(2))) == ['fine']*2
    assert writer.dropped == ['seed']


def test_several_parameters_in_one_refusal(serve):
    def answer(asked, n):
        forbidden = [name for name in ('top_p', 'seed', 'response_format') if name in asked]
        if not forbidden: return '{"samples": ["a", "b"]}'
        said = dict(type='extra_forbidden', msg='Extra inputs are not permitted')
        return 422, dict(detail=[said | dict(loc=['body', name]) for name in forbidden]), {}
    _, writer = serve(answer)
    assert outcomes(writer.write(requests(1), schema=LISTS)) == ['ok']
    assert set(writer.dropped) == {'top_p', 'seed'}
    assert writer.form == 'prompt alone'


def test_a_context_that_is_too_short_rejects_the_prompt_alone(serve):
    long = dict(detail="This model's maximum context length is 512 tokens, the prompt has 900")
    _, writer = serve(lambda asked, n: (400, long, {}) if '#1.' in prompt_of(asked) else 'fine')
    assert outcomes(writer.write(requests(3))) == ['ok', 'rejected', 'ok']


@pytest.mark.parametrize('body, kind, says', [
    (dict(error=dict(message='Insufficient credits', code=402)), BudgetSpent, 'Insufficient credits'),
    (dict(error=dict(message='No auth', code='401')), PermissionError, 'No auth'),
    (dict(error='Unexpected endpoint or method.'), ConnectionError, 'Unexpected endpoint'),
    (dict(error=dict(message='Provider returned error'), choices=[]), ConnectionError, 'Provider returned error')])
def test_an_error_with_status_200_is_one(serve, body, kind, says):
    _, writer = serve(lambda asked, n: (200, body, {}), tries=8)
    with pytest.raises(kind, match=says) as e: writer.write(requests(4))
    assert 'ending in /v1' not in str(e.value)
    assert not writer.store.answered(writer.name)


@pytest.mark.parametrize('finish', [
    dict(finish_reason='error'),
    dict(finish_reason='error', error=dict(message='upstream died')),
    dict(finish_reason='stop', error=dict(code=502, message='upstream died'))])
def test_a_reply_that_ended_in_an_error_is_asked_for_again(serve, finish):
    broken = completion('half a te')
    broken['choices'][0] |= finish
    _, writer = serve(lambda asked, n: (200, broken, {}) if n == 1 else 'fine')
    reply, = writer.write(requests(1))
    assert reply.text == 'fine'
    assert reply.attempts == 2
    assert attempts(writer.store) == ['error', 'delivered']
    assert reply.prompt_tokens == 200 # it was billed


@pytest.mark.parametrize('body', [
    dict(detail='Not Found'),
    b'404 page not found',
    b'',
    dict(error=dict(code=404, message='File Not Found', type='not_found_error')),
    dict(error='Not Found')])
def test_a_missing_v1_is_not_a_missing_model(serve, body):
    _, writer = serve(lambda asked, n: (404, body, {}))
    says = 'has no chat completions .*is it the base URL of a server, ending in /v1?'
    with pytest.raises(ValueError, match=says) as e: writer.write(requests(1))
    assert 'no model' not in str(e.value)


@pytest.mark.parametrize('says', [
    'The model `small` does not exist',
    "model 'small' not found, try pulling it first"])
def test_a_missing_model_is_one(serve, says):
    _, writer = serve(lambda asked, n: (404, dict(error=dict(message=says)), {}))
    with pytest.raises(ValueError, match="has no model 'small'"): writer.write(requests(1))


# ---- redirects

@pytest.mark.parametrize('status', [300, 304, 305])
def test_a_status_of_the_three_hundreds_without_a_place_is_no_redirect(serve, status):
    body = b'' if status == 304 else dict(error=dict(message='choose one'))
    server, writer = serve(lambda asked, n: (status, body, {}))
    line = line_of(ValueError, writer.write, requests(4))
    said = 'nothing more' if status == 304 else 'choose one'
    assert f'answers with the status {status} and no reply (error {status}: {said}' in line
    assert 'redirect' not in line
    assert len(server.asked) == 1


@pytest.mark.parametrize('status', [301, 302, 303, 307, 308])
def test_redirects_are_not_followed_and_not_paid_for(serve, status):
    other, _ = serve(lambda asked, n: 'from somebody else')
    there = {'Location': f'{other.url}/chat/completions?token=secret'}
    server, writer = serve(lambda asked, n: (status, b'', there), budget=Budget(requests=50))
    says = f'answers with a redirect, which is not followed .*{other.server_port}'
    with pytest.raises(ValueError, match=says) as e: writer.write(requests(4))
    assert 'secret' not in str(e.value)
    assert not other.asked
    assert len(server.asked) == 1
    assert writer.store.count('attempts') == 1


@pytest.mark.parametrize('status', [301, 302, 303, 307, 308])
def test_a_redirect_to_the_server_itself_is_not_followed(serve, status):
    server, writer = serve(lambda asked, n: (status, b'', {'Location': server.url}))
    with pytest.raises(ValueError): writer.write(requests(4))
    assert len(server.asked) == 1


# ---- odd replies

def odd(**fields): return completion('fine') | fields


def message(value): return odd(choices=[dict(index=0, finish_reason='stop', message=value)])


UNREADABLE = dict(
    text=odd(choices='abc'), number=odd(choices=7), numbers=odd(choices=[5]), none=odd(choices=None),
    empty=odd(choices=[]), strings=odd(choices=['fine']), object=odd(choices=dict(message=dict(content='fine'))),
    list=message([]), string=message('fine'), null=message(None), whole_list=[completion('fine')], whole_string='fine',
    whole_null=None, deep=b'{"choices": ' + b'['*100_000 + b']'*100_000 + b'}', deeper=b'['*300_000, digits=b'9'*5000,
    latin=b'{"choices": "\xff"}', no_json=b'fine')

@pytest.mark.parametrize('name', UNREADABLE)
def test_an_odd_reply_ends_in_a_recorded_outcome(serve, name):
    odd_one = (200, UNREADABLE[name], {})
    server, writer = serve(lambda asked, n: odd_one if '#1.' in prompt_of(asked) else 'fine', patience=5.)
    replies = writer.write(requests(4))
    assert outcomes(replies) == ['ok', 'failed', 'ok', 'ok']
    assert replies[1].error.startswith('no reply in 2 tries (not the reply of a chat completions server')
    assert sorted(attempts(writer.store)) == ['delivered']*3 + ['unreadable']*2
    def again(asking): return writer_at(server, store=writer.store, **HASTE).write(asking)
    assert outcomes(again(requests(2, 1)))[0] == 'given up'
    asked = len(server.asked)
    assert all(reply.cached for reply in again(requests(4)))
    assert len(server.asked) == asked


@pytest.mark.parametrize('fields', [
    dict(id=['a', 1]),
    dict(id={}, created={}),
    dict(created={'a': 1}),
    dict(created='today'),
    dict(id=7, created=float('1e400')),
    dict(model={'name': 'x'}),
    dict(model=['x']),
    dict(model=None),
    dict(model='m'*10**6),
    dict(object=5),
    dict(service_tier=[])])
def test_odd_fields_that_are_not_needed_do_no_harm(serve, fields):
    _, writer = serve(lambda asked, n: (200, odd(**fields), {}))
    replies = writer.write(requests(3))
    assert outcomes(replies) == ['ok']*3
    assert texts(replies) == ['fine']*3
    assert len(writer.write(requests(1))[0].model) <= 200


@pytest.mark.parametrize('content, said', [
    ([dict(type='text', text=5), dict(type='text', text='fine')], 'fine'),
    ([dict(text=None), 'x', dict(text='fine')], 'fine'),
    (dict(text='x'), None),
    (5, None),
    ([[]], None),
    (True, None)])
def test_odd_contents(serve, content, said):
    _, writer = serve(lambda asked, n: (200, completion(content), {}))
    reply, = writer.write(requests(1))
    assert reply.text == said
    assert reply.outcome == ('ok' if said else 'empty')


def test_odd_refusals_and_finish_reasons(serve):
    bodies = [
        message(dict(content=None, refusal=dict(why='no'))),
        message(dict(content='fine', refusal=[])),
        odd(choices=[dict(finish_reason=['stop'], message=dict(content='fine'))])]
    _, writer = serve(lambda asked, n: (200, bodies[n - 1], {}), concurrency=1)
    assert outcomes(writer.write(requests(3))) == ['refused', 'ok', 'ok']


def test_thinking_is_asked_about_once_and_is_no_text(serve):
    thinking = (200, completion('<think>Hm, ships ...', finish='length'), {})
    def answer(asked, n):
        first = len(asked['messages']) == 1
        return thinking if first or '#1' in prompt_of(asked) else '<think>Ships.</think>A ship sails.'
    server, writer = serve(answer)
    good, bad = writer.write(requests(2))
    assert (good.text, good.attempts) == ('A ship sails.', 2)
    assert (bad.text, bad.attempts, bad.outcome) == (None, 2, 'unparsed')
    assert 'thinking that never ends' in bad.error
    assert server.asked[-1]['max_tokens'] == 128


# ---- odd ids

def with_id(text, name='chatcmpl-1'): return 200, completion(text) | dict(id=name, created=1_700_000_000), {}


def asked_number(asked) -> int: return number_of(prompt_of(asked))


def test_a_server_with_one_id_for_all_replies_can_be_used(serve):
    server, writer = serve(lambda asked, n: with_id(f'Text {asked_number(asked)}.'))
    assert texts(writer.write(requests(12))) == [f'Text {i}.' for i in range(12)]
    assert len(server.asked) == 12


def test_equal_texts_under_one_id_come_along(serve):
    _, writer = serve(lambda asked, n: with_id(f'Text {asked_number(asked)//3}.'))
    assert texts(writer.write(requests(12), stage='other')) == [f'Text {i//3}.' for i in range(12)]


@pytest.mark.parametrize('say', [lambda i: 'A', lambda i: 'AB'[i % 3 == 0]])
def test_choices_are_equal_of_themselves(serve, say):
    server, writer = serve(lambda asked, n: with_id(json.dumps(dict(choice=say(asked_number(asked))))))
    judged = [Request(f'Which is #{i}.', temperature=0., seed=i) for i in range(12)]
    assert texts(writer.write(judged, choices=['A', 'B'])) == [say(i) for i in range(12)]
    assert len(server.asked) <= 13


@pytest.mark.parametrize('form', [dict(), dict(schema=LISTS)])
def test_the_same_reply_to_every_request_is_none(serve, form):
    _, writer = serve(lambda asked, n: with_id('{"samples": ["a", "b"]}'))
    with pytest.raises(ConnectionError, match='the reply to another request'): writer.write(requests(12), **form)
    assert attempts(writer.store).count('delivered') == 1


def test_the_same_reply_to_the_same_request_is_as_it_should_be(serve):
    _, writer = serve(lambda asked, n: with_id('A cat.'))
    same = [Request('Name an animal.', temperature=0., seed=i) for i in range(4)]
    assert texts(writer.write(same)) == ['A cat.']*4


def test_a_choice_of_another_request_is_asked_for_again(serve):
    def answer(asked, n): return with_id('{"choice": "A"}', 'chatcmpl-1' if n % 4 == 3 else f'chatcmpl-{n}')
    server, writer = serve(answer, tries=8)
    asking = [Request(f'Which is #{i}.', temperature=0.) for i in range(12)]
    assert texts(writer.write(asking, choices=['A', 'B'])) == ['A']*12
    assert attempts(writer.store).count('replayed') == (len(server.asked) + 1)//4 > 0


def test_one_store_has_one_spender(tmp_path):
    with FaultServer(seconds=.02) as server:
        path = tmp_path/'s.sqlite'
        one, two = (writer_at(server, store=RunStore(path), budget=Budget(requests=30), **HASTE) for _ in range(2))
        replies = one.stream(requests(60))
        next(replies)
        says = 'another call is writing into this store'
        with pytest.raises(RuntimeError, match=says): two.write(requests(60, 60))
        with pytest.raises(BudgetSpent): list(replies)
        with pytest.raises(BudgetSpent): two.write(requests(60, 60)) # the same budget
        assert len(server.log) == 30
        two.ledger.budget = Budget(requests=40)
        with pytest.raises(BudgetSpent): two.write(requests(60, 60))
        assert len(server.log) == 40


# ---- what is billed

@pytest.mark.parametrize('usage', [
    None,
    [],
    'many',
    5,
    {},
    [1, 2],
    dict(prompt_tokens=100),
    dict(completion_tokens=10),
    dict(prompt_tokens=100, completion_tokens=None),
    dict(prompt_tokens=100, completion_tokens=0),
    dict(prompt_tokens=0, completion_tokens=10),
    dict(prompt_tokens=1.5, completion_tokens=10),
    dict(prompt_tokens=100, completion_tokens=-5),
    dict(prompt_tokens=-100, completion_tokens=-5),
    dict(prompt_tokens=10**30, completion_tokens=10),
    dict(prompt_tokens=100, completion_tokens=2**62),
    dict(prompt_tokens='many', completion_tokens=10),
    dict(prompt_tokens=True, completion_tokens=10),
    dict(prompt_tokens=[100], completion_tokens={}),
    dict(prompt_tokens=float('inf'), completion_tokens=float('nan'))])
def test_usage_that_is_missing_or_cannot_be_true_counts_at_its_most(serve, usage):
    _, writer = serve(lambda asked, n: (200, odd(usage=usage), {}), prices=PRICES)
    assert writer.write(requests(2))[0].outcome == 'ok'
    store = writer.store
    assert attempts(store) == ['delivered']*2
    (most_tokens, most_cost), = store.rows('SELECT sum(most_tokens), sum(most_cost) FROM attempts')
    assert store.cost() == 0
    assert store.spent(PRICES['small'])[1:] == (most_tokens, pytest.approx(most_cost))
    assert writer.ledger.tokens == most_tokens
    assert writer.ledger.usd == pytest.approx(most_cost)
    assert store.accounts()[writer.name]['']['perhaps_billed'] == pytest.approx(most_cost)


@pytest.mark.parametrize('usage', [
    dict(prompt_tokens='100', completion_tokens='10'),
    dict(prompt_tokens=100., completion_tokens=10.),
    dict(prompt_tokens=100, completion_tokens=10, more=[1])])
def test_usage_that_can_be_read_is_believed(serve, usage):
    _, writer = serve(lambda asked, n: (200, odd(usage=usage), {}), prices=PRICES)
    reply, = writer.write(requests(1))
    assert (reply.prompt_tokens, reply.completion_tokens) == (100, 10)
    assert reply.cost == pytest.approx(.0002)
    assert tokens_of(usage, 'fine') == (100, 10)


@pytest.mark.parametrize('usage', [dict(prompt_tokens=5), dict(prompt_tokens=-10**6, completion_tokens=-10**6)])
def test_a_budget_holds_where_usage_says_little(serve, usage):
    server, writer = serve(lambda asked, n: (200, odd(usage=usage), {}), prices=PRICES, budget=.01)
    with pytest.raises(BudgetSpent): writer.write(requests(400))
    assert 2 <= len(server.asked) < 16


def test_thinking_that_only_the_total_counts_is_paid():
    billed = dict(prompt_tokens=20, completion_tokens=5)
    assert tokens_of(billed | dict(total_tokens=2025), 'fine') == (20, 2005)
    assert tokens_of(billed | dict(total_tokens=10**12), 'fine') == (20, 5)
