"The fault server, seen by the plain openai client and by raw sockets"
import asyncio, json, os, signal, socket, subprocess, sys, time
from pathlib import Path
import openai
import pytest
from fault_server import ACTIONS, LOST, PERMANENT, STALE, WRONG, FaultServer, faults, prompt_of, read_log, tag
from writer_server import capable

TEXTS = {'type': 'array', 'items': {'type': 'string'}, 'minItems': 4, 'maxItems': 4}
LIST = {'type': 'object', 'properties': {'samples': TEXTS}, 'required': ['samples'], 'additionalProperties': False}
FORM = {'type': 'json_schema', 'json_schema': {'name': 'reply', 'strict': True, 'schema': LIST}}
ONE_OF = {'type': 'object', 'properties': {'choice': {'enum': ['A', 'B', 'C']}}}
CHOICE = {'type': 'json_schema', 'json_schema': {'name': 'reply', 'schema': ONE_OF}}


@pytest.fixture
def healthy():
    with FaultServer() as server: yield server


def client(server, timeout=5.):
    url = getattr(server, 'url', server)
    return openai.OpenAI(base_url=url, api_key='sk-1', max_retries=0, timeout=timeout)


def body(prompt, **more): return dict(model='small', messages=[dict(role='user', content=prompt)], **more)


def ask(server, prompt='Write about #7', form=FORM, timeout=5., **more):
    with client(server, timeout) as c: return c.chat.completions.create(**body(prompt, response_format=form, **more))


def content(reply): return reply.choices[0].message.content


def samples(reply): return json.loads(content(reply))['samples']


def actions(server): return [entry['action'] for entry in server.log]


def raw(server, prompt, times=1):
    "(all that comes back on one connection, read until it is silent; how that ends)"
    data = json.dumps(body(prompt)).encode()
    head = b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n' % len(data)
    with socket.create_connection(server.address, timeout=.3) as connection:
        connection.sendall((head + data)*times)
        got = b''
        try:
            while more := connection.recv(1 << 16): got += more
        except TimeoutError: return got, 'open'
        except ConnectionResetError: return got, 'reset'
        return got, 'closed'


# ---- whole replies

def test_whole_replies_fit_the_schema(healthy):
    replies = [ask(healthy, f'Write about #{i}') for i in range(3)]
    assert len({reply.id for reply in replies}) == 3
    for i, reply in enumerate(replies):
        texts = samples(reply)
        assert len(set(texts)) == 4
        assert all(f'#{i},' in text for text in texts)


def test_texts_depend_on_prompt_and_seed(healthy):
    first = samples(ask(healthy))
    assert samples(ask(healthy)) == first
    assert samples(ask(healthy, seed=1)) != first


def test_choices_plain_texts_and_spelt_out_schemas(healthy):
    assert json.loads(content(ask(healthy, form=CHOICE)))['choice'] in 'ABC'
    assert tag('rain') in content(ask(healthy, 'rain', form=openai.NOT_GIVEN))
    assert tag('rain') != tag('snow')
    asked = f'Answer in JSON: {json.dumps(LIST)}'
    assert len(samples(ask(healthy, asked, form={'type': 'json_object'}))) == 4


def test_the_list_of_models(healthy):
    assert client(healthy).models.list().data[0].id == 'small'
    assert healthy.connections > 0


def test_the_log_holds_what_was_asked_and_what_it_cost(healthy):
    prompts = [*(f'Write about #{i}' for i in range(3)), 'Write about #1', 'Write about #1']
    replies = [ask(healthy, prompt) for prompt in prompts]
    assert healthy.log[0]['parameters'] == {'response_format': FORM}
    assert healthy.log[0]['authorization'] == 'Bearer sk-1'
    assert [entry['attempt'] for entry in healthy.log] == [1, 1, 1, 2, 3]
    kept = [(entry['prompt_tokens'], entry['completion_tokens'], entry['id']) for entry in healthy.log]
    assert kept == [(r.usage.prompt_tokens, r.usage.completion_tokens, r.id) for r in replies]
    assert healthy.log.cost({'small': (1., 10.)}) > 0


def test_longer_prompts_have_more_tokens(healthy):
    short, long = (ask(healthy, prompt).usage for prompt in ('a', 'a longer prompt'))
    assert short.prompt_tokens != long.prompt_tokens


# ---- errors

@pytest.mark.parametrize('action, error, status', [
    ('429', openai.RateLimitError, 429),
    ('500', openai.InternalServerError, 500),
    ('503', openai.InternalServerError, 503),
    ('408', openai.APIStatusError, 408),
    ('409', openai.ConflictError, 409),
    ('400', openai.BadRequestError, 400),
    ('401', openai.AuthenticationError, 401),
    ('402', openai.APIStatusError, 402),
    ('403', openai.PermissionDeniedError, 403),
    ('404', openai.NotFoundError, 404),
    ('insufficient_quota', openai.RateLimitError, 429),
    ('filter_400', openai.BadRequestError, 400),
    ('hang', openai.APITimeoutError, None),
    ('cut', openai.APIConnectionError, 200),
    ('reset', openai.APIConnectionError, None),
    ('closed', openai.APIConnectionError, None)])
def test_errors(action, error, status):
    with FaultServer(action) as server:
        with pytest.raises(error) as e: ask(server, timeout=.3)
        if status and action != 'cut': assert e.value.status_code == status
        [entry] = server.log
        assert entry['action'] == action
        assert entry['status'] == status
        assert entry['whole'] == (status is not None and action != 'cut')
        assert not server.log.delivered()


@pytest.mark.parametrize('action, code', [
    ('429', 'rate_limit_exceeded'),
    ('insufficient_quota', 'insufficient_quota'),
    ('filter_400', 'content_filter')])
def test_errors_have_the_code_of_openai(action, code):
    with FaultServer(action) as server, pytest.raises(openai.APIStatusError) as e: ask(server)
    assert e.value.code == code


def test_a_busy_server_says_when_to_come_back():
    with FaultServer('429') as server, pytest.raises(openai.RateLimitError) as e: ask(server)
    headers = e.value.response.headers
    assert headers['retry-after'] == '0.05'
    assert headers['retry-after-ms'] == '50'


def test_a_refused_key_is_repeated():
    with FaultServer('401') as server, pytest.raises(openai.AuthenticationError, match='sk-1'): ask(server)


# ---- broken connections

@pytest.fixture
def obedient():
    "Does what the prompt says"
    with FaultServer(lambda asked, n: prompt_of(asked)) as server: yield server


def test_answers_that_never_come(obedient):
    assert raw(obedient, 'hang') == (b'', 'open')
    assert raw(obedient, 'reset') == (b'', 'reset')
    assert raw(obedient, 'closed') == (b'', 'closed')


def test_an_answer_that_is_cut(obedient):
    got, end = raw(obedient, 'cut')
    head, _, half = got.partition(b'\r\n\r\n')
    promised = int(head.rsplit(b' ', 1)[1])
    assert end == 'closed'
    assert promised > len(half) > 0


def test_an_answer_that_comes_twice(obedient):
    got, end = raw(obedient, 'twice')
    assert end == 'open'
    assert got[:len(got)//2] == got[len(got)//2:]
    assert len(obedient.log) == 1


def test_one_connection_carries_several_requests(obedient):
    got, _ = raw(obedient, 'ok', times=3)
    assert got.count(b'HTTP/1.1 200 OK') == 3


# ---- wrong contents

@pytest.mark.parametrize('action', [*WRONG[:-1], 'bad_body'])
def test_wrong_contents_are_delivered_and_logged(action):
    with FaultServer(action) as server:
        ask(server)
        assert server.log[0]['action'] == action
        assert len(server.log.delivered()) == 1


@pytest.mark.parametrize('action', [*WRONG[:-1], 'bad_body'])
def test_a_choice_cannot_be_spoilt_like_a_list(action):
    with FaultServer(action) as server:
        ask(server, form=CHOICE)
        of_lists = action in ('too_few', 'too_many', 'duplicates', 'empties')
        assert actions(server) == ['ok' if of_lists else action]


def spoilt(action):
    "The first choice of a reply to FORM"
    with FaultServer(action) as server: return ask(server).choices[0]


def test_an_error_page_is_no_json():
    with FaultServer('bad_body') as server: reply = ask(server)
    assert isinstance(reply, str)
    assert '<html>' in reply


def test_invalid_json_is_prose():
    said = spoilt('invalid_json').message.content
    assert '{' not in said
    assert '[' not in said


def test_fenced_json_is_whole():
    said = spoilt('fenced').message.content
    assert said.count('```') == 2
    assert len(json.loads(said.split('```')[1].removeprefix('json'))['samples']) == 4


def test_half_json_ends_for_its_length():
    choice = spoilt('half_json')
    assert choice.message.content.startswith('{"samples": ["')
    assert not choice.message.content.endswith('}')
    assert choice.finish_reason == 'length'


def test_contents_that_are_missing():
    assert spoilt('empty').message.content == ''
    assert spoilt('filter').finish_reason == 'content_filter'
    refusal = spoilt('refusal').message
    assert refusal.content is None
    assert refusal.refusal


@pytest.mark.parametrize('action, n', [('too_few', 3), ('too_many', 6), ('duplicates', 4), ('empties', 4)])
def test_lists_that_are_spoilt(action, n):
    texts = json.loads(spoilt(action).message.content)['samples']
    assert len(texts) == n
    if action == 'duplicates':
        assert texts[0] == texts[1] != texts[2]
        assert len({text.casefold() for text in texts[:3]}) == 1
    if action == 'empties': assert [bool(text) for text in texts] == [True, False]*2


def test_replayed_replies_are_the_oldest_of_another_prompt():
    with FaultServer(lambda asked, n: 'ok' if n in (2, 3) else 'replayed') as server:
        *others, last = [ask(server, prompt) for prompt in ('#1', '#2', '#3', '#3')]
        assert len({reply.id for reply in others}) == 3
        assert last.id == others[0].id
        assert last.usage == others[0].usage
        assert '#1,' in samples(last)[0]
        assert actions(server) == ['ok', 'ok', 'ok', 'replayed']


# ---- what a model refuses

UNSUPPORTED = "Unsupported parameter: '{}' is not supported with this model."

@pytest.mark.parametrize('name, value, says', [
    ('max_tokens', 9, UNSUPPORTED.format('max_tokens') + " Use 'max_completion_tokens' instead."),
    ('temperature', .8, "Unsupported value: 'temperature' does not support 0.8 with this model."),
    ('seed', 1, UNSUPPORTED.format('seed')),
    ('response_format', FORM, UNSUPPORTED.format('response_format'))])
def test_refused_parameters(name, value, says):
    with FaultServer(refuses={name}) as server, client(server) as c:
        with pytest.raises(openai.BadRequestError) as e: c.chat.completions.create(**body('x', **{name: value}))
        assert says in e.value.message
        assert e.value.param == name
        assert e.value.code == ('unsupported_value' if name == 'temperature' else 'unsupported_parameter')
        c.chat.completions.create(**body('x', max_completion_tokens=9))
        assert actions(server) == ['refused_parameter', 'ok']


def test_a_refused_count_inside_a_schema():
    with FaultServer(refuses={'minItems'}) as server:
        with pytest.raises(openai.BadRequestError, match="'minItems' is not permitted.") as e: ask(server)
        assert e.value.param == 'response_format'
        ask(server, form=openai.NOT_GIVEN, max_completion_tokens=9)
        assert actions(server) == ['refused_parameter', 'ok']


def test_forms_that_a_server_lacks():
    json_mode = {'type': 'json_object'}
    with FaultServer(forms={'json_object'}) as server:
        says = "'response_format' of type 'json_schema' is not supported"
        with pytest.raises(openai.BadRequestError, match=says): ask(server)
        with pytest.raises(openai.BadRequestError, match='must contain the word'): ask(server, form=json_mode)
        assert json.loads(content(ask(server, 'JSON please', form=json_mode))) == {}


# ---- scripts

def test_faults_depend_on_seed_prompt_and_attempt_alone():
    asked = [body(f'#{i}') for i in range(50)]
    def seen(seed, order):
        script = faults(.3, seed)
        return {(prompt_of(asked[i]), attempt): script(asked[i], 0) for attempt in range(5) for i in order}
    forwards = seen(0, range(50))
    assert seen(0, range(49, -1, -1)) == forwards
    assert seen(1, range(50)) != forwards
    drawn = list(forwards.values())
    assert .2 < sum(action != 'ok' for action in drawn)/len(drawn) < .4
    assert set(drawn) <= {'ok', *LOST, *WRONG, *STALE}
    assert len(set(drawn)) > 15


def test_every_action_has_a_kind():
    assert {'ok', *LOST, *WRONG, *STALE, *PERMANENT} == set(ACTIONS)


def test_many_at_once():
    asked = [body(f'Write about #{i}', response_format=FORM) for i in range(64)]
    async def main(server):
        async with openai.AsyncOpenAI(base_url=server.url, api_key='x', max_retries=0) as c:
            return await asyncio.gather(*[c.chat.completions.create(**one) for one in asked])
    with FaultServer(seconds=.3) as server:
        start = time.time()
        replies = asyncio.run(main(server))
        assert time.time() - start < 10
        assert server.most == 64
        assert server.connections == 64
    for i, reply in enumerate(replies): assert all(f'#{i},' in text for text in samples(reply))


def test_a_client_that_left_got_nothing():
    with FaultServer(seconds=.3) as server:
        with pytest.raises(openai.APITimeoutError): ask(server, timeout=.1)
        time.sleep(.4)
        [entry] = server.log
        assert not entry['whole']


def test_another_writer_is_spoilt_the_same():
    with FaultServer('too_few', content=capable) as server:
        texts = samples(ask(server, '<report>words about rain</report> Write 4 texts'))
        assert texts[2].count('words about rain') == 1
        assert len(server.log.delivered()) == 1


def test_a_script_that_raises_is_told():
    with FaultServer(lambda asked, n: 'nonsense') as server:
        with pytest.raises(openai.BadRequestError, match='the script of this server raised'): ask(server)


# ---- as a process

SERVER = Path(__file__).with_name('fault_server.py')

def ids_until_killed(log, prompts) -> list:
    "Ids of the replies of a server that is killed after them; None: an error"
    command = [sys.executable, SERVER, '--faults', '.5', '--kinds', '500,too_few', '--log', log]
    ids = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        url = server.stdout.readline().strip()
        for prompt in prompts:
            try: ids.append(ask(url, prompt).id)
            except openai.InternalServerError: ids.append(None)
        os.kill(server.pid, signal.SIGKILL)
    return ids


def test_a_log_outlives_two_killed_processes(tmp_path):
    log = tmp_path/'log.jsonl'
    prompts = [f'#{i}' for i in range(8)]
    ids = ids_until_killed(log, prompts) + ids_until_killed(log, prompts) # the second goes on in the same file
    found = read_log(log)
    assert None in ids
    assert [entry['id'] for entry in found] == ids
    assert {entry['action'] for entry in found} == {'ok', '500', 'too_few'}
    assert all(entry['whole'] for entry in found)
    assert len(found.delivered()) == sum(i is not None for i in ids)
    said = [entry['action'] for entry in found]
    assert said[:8] == said[8:]
