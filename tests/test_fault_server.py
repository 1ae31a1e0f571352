"The fault server, seen by the plain openai client and by raw sockets"
import asyncio, json, os, signal, socket, subprocess, sys, time
from pathlib import Path
import openai
import pytest
from fault_server import ACTIONS, LOST, PERMANENT, STALE, WRONG, FaultServer, faults, read_log, tag
from writer_server import capable

FORM = {'type': 'json_schema', 'json_schema': {'name': 'reply', 'strict': True, 'schema': {
    'type': 'object', 'properties': {'samples': {'type': 'array', 'items': {'type': 'string'}, 'minItems': 4, 'maxItems': 4}}, 'required': ['samples'], 'additionalProperties': False}}}
CHOICE = {'type': 'json_schema', 'json_schema': {'name': 'reply', 'schema': {'type': 'object', 'properties': {'choice': {'enum': ['A', 'B', 'C']}}}}}


def client(server, **kw): return openai.OpenAI(base_url=getattr(server, 'url', server), api_key='sk-1', max_retries=0, **{'timeout': 5, **kw})
def body(prompt, **kw): return dict(model='small', messages=[dict(role='user', content=prompt)], **kw)
def ask(server, prompt='Write about #7', form=FORM, **kw):
    with client(server) as c: return c.chat.completions.create(**body(prompt, response_format=form, **kw))
def samples(reply): return json.loads(reply.choices[0].message.content)['samples']


def raw(server, prompt, times=1): # all that comes back on one connection, read until it is silent
    data = json.dumps(body(prompt)).encode()
    with socket.create_connection(server.server.sockets[0].getsockname(), timeout=.3) as s:
        s.sendall((b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n' % len(data) + data)*times)
        got = b''
        try:
            while more := s.recv(1 << 16): got += more
            return got, 'closed'
        except TimeoutError: return got, 'open'
        except ConnectionResetError: return got, 'reset'


def test_whole_replies_fit_what_was_asked():
    with FaultServer() as server:
        replies = [ask(server, f'Write about #{i}') for i in range(3)]
        assert [len(set(samples(r))) for r in replies] == [4]*3 and all(f'#{i},' in t for i, r in enumerate(replies) for t in samples(r))
        assert len({r.id for r in replies}) == 3 and samples(ask(server, 'Write about #1')) == samples(replies[1]) != samples(ask(server, 'Write about #1', seed=1))
        assert json.loads(ask(server, form=CHOICE).choices[0].message.content)['choice'] in 'ABC'
        assert tag('rain') in ask(server, 'rain', form=openai.NOT_GIVEN).choices[0].message.content and tag('rain') != tag('snow')
        asked = f"Answer in JSON: {json.dumps(FORM['json_schema']['schema'])}"
        assert len(samples(ask(server, asked, form={'type': 'json_object'}))) == 4
        assert client(server).models.list().data[0].id == 'small' and server.connections > 0 and server.log[0]['parameters'] == {'response_format': FORM}
        assert [e['attempt'] for e in server.log[:5]] == [1, 1, 1, 2, 3] and server.log[0]['authorization'] == 'Bearer sk-1'
        assert [(e['prompt_tokens'], e['completion_tokens'], e['id']) for e in server.log[:3]] == [(r.usage.prompt_tokens, r.usage.completion_tokens, r.id) for r in replies]
        usage = [ask(server, p).usage for p in ('a', 'a longer prompt')]
        assert usage[0].prompt_tokens != usage[1].prompt_tokens and server.log.cost({'small': (1., 10.)}) > 0


@pytest.mark.parametrize('action,error,status', [
    ('429', openai.RateLimitError, 429), ('500', openai.InternalServerError, 500), ('503', openai.InternalServerError, 503), ('408', openai.APIStatusError, 408),
    ('409', openai.ConflictError, 409), ('400', openai.BadRequestError, 400), ('401', openai.AuthenticationError, 401), ('402', openai.APIStatusError, 402),
    ('403', openai.PermissionDeniedError, 403), ('404', openai.NotFoundError, 404), ('insufficient_quota', openai.RateLimitError, 429), ('filter_400', openai.BadRequestError, 400),
    ('hang', openai.APITimeoutError, None), ('cut', openai.APIConnectionError, 200), ('reset', openai.APIConnectionError, None), ('closed', openai.APIConnectionError, None)])
def test_errors(action, error, status):
    with FaultServer(action) as server, client(server, timeout=.3) as c:
        with pytest.raises(error) as e: c.chat.completions.create(**body('Write about #7', response_format=FORM))
        if status and action != 'cut': assert e.value.status_code == status
        if action == '429': assert (e.value.response.headers['retry-after'], e.value.response.headers['retry-after-ms'], e.value.code) == ('0.05', '50', 'rate_limit_exceeded')
        if action in ('insufficient_quota', 'filter_400'): assert e.value.code == action.replace('filter_400', 'content_filter')
        if action == '401': assert 'sk-1' in str(e.value)
        [entry] = server.log
        assert (entry['action'], entry['status'], entry['whole']) == (action, status, status is not None and action != 'cut') and not server.log.delivered()


def test_broken_connections_on_a_raw_socket():
    with FaultServer(lambda asked, n: asked['messages'][0]['content']) as server:
        assert raw(server, 'hang') == (b'', 'open') and raw(server, 'reset') == (b'', 'reset') and raw(server, 'closed') == (b'', 'closed')
        got, end = raw(server, 'cut')
        head, _, half = got.partition(b'\r\n\r\n')
        assert end == 'closed' and int(head.rsplit(b' ', 1)[1]) > len(half) > 0
        (got, end), n = raw(server, 'twice'), len(server.log)
        assert end == 'open' and got[:len(got)//2] == got[len(got)//2:] and n == 5
        assert raw(server, 'ok', times=3)[0].count(b'HTTP/1.1 200 OK') == 3


@pytest.mark.parametrize('action', [*WRONG[:-1], 'bad_body'])
def test_wrong_contents(action):
    with FaultServer(action) as server:
        reply = ask(server)
        if action == 'bad_body': assert isinstance(reply, str) and '<html>' in reply; return
        content, finish, refusal = reply.choices[0].message.content, reply.choices[0].finish_reason, reply.choices[0].message.refusal
        if action == 'invalid_json': assert '{' not in content and '[' not in content
        elif action == 'fenced': assert content.count('```') == 2 and len(json.loads(content.split('```')[1].removeprefix('json'))['samples']) == 4
        elif action == 'half_json': assert content.startswith('{"samples": ["') and not content.endswith('}') and finish == 'length'
        elif action == 'empty': assert content == ''
        elif action == 'refusal': assert content is None and refusal
        elif action == 'filter': assert finish == 'content_filter'
        else:
            texts = samples(reply)
            assert len(texts) == {'too_few': 3, 'too_many': 6}.get(action, 4)
            if action == 'duplicates': assert texts[0] == texts[1] != texts[2] and len({t.casefold() for t in texts[:3]}) == 1
            if action == 'empties': assert [bool(t) for t in texts] == [True, False]*2
        assert server.log[0]['action'] == action and len(server.log.delivered()) == 1
        ask(server, form=CHOICE)
        assert server.log[1]['action'] == ('ok' if action in ('too_few', 'too_many', 'duplicates', 'empties') else action)


def test_replayed():
    with FaultServer(lambda asked, n: 'ok' if n in (2, 3) else 'replayed') as server:
        a, b, c, d = [ask(server, p) for p in ('#1', '#2', '#3', '#3')]
        assert len({a.id, b.id, c.id}) == 3 and d.id == a.id and '#1,' in samples(d)[0] and d.usage == a.usage # the oldest of another prompt
        assert [e['action'] for e in server.log] == ['ok', 'ok', 'ok', 'replayed']


@pytest.mark.parametrize('name,value,says', [
    ('max_tokens', 9, "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."),
    ('temperature', .8, "Unsupported value: 'temperature' does not support 0.8 with this model."), ('seed', 1, "Unsupported parameter: 'seed' is not supported with this model."),
    ('response_format', FORM, "Unsupported parameter: 'response_format' is not supported with this model."), ('minItems', None, "'minItems' is not permitted.")])
def test_refused_parameters(name, value, says):
    with FaultServer(refuses={name}) as server, client(server) as c:
        with pytest.raises(openai.BadRequestError) as e: c.chat.completions.create(**body('x', **({'response_format': FORM} if value is None else {name: value})))
        assert says in e.value.message and e.value.param == (name if value else 'response_format')
        if value: assert e.value.code == ('unsupported_value' if name == 'temperature' else 'unsupported_parameter')
        c.chat.completions.create(**body('x', max_completion_tokens=9))
        assert [e['action'] for e in server.log] == ['refused_parameter', 'ok']


def test_forms():
    with FaultServer(forms={'json_object'}) as server:
        with pytest.raises(openai.BadRequestError, match="'response_format' of type 'json_schema' is not supported"): ask(server)
        with pytest.raises(openai.BadRequestError, match='must contain the word'): ask(server, form={'type': 'json_object'})
        assert json.loads(ask(server, 'JSON please', form={'type': 'json_object'}).choices[0].message.content) == {}


def test_faults_depend_on_seed_prompt_and_attempt_alone():
    asked = [body(f'#{i}') for i in range(50)]
    def seen(seed, order):
        script = faults(.3, seed)
        return {(asked[i]['messages'][0]['content'], a): script(asked[i], 0) for a in range(5) for i in order}
    assert seen(0, range(50)) == seen(0, range(49, -1, -1)) != seen(1, range(50))
    drawn = list(seen(0, range(50)).values())
    assert .2 < sum(a != 'ok' for a in drawn)/len(drawn) < .4 and set(drawn) <= {'ok', *LOST, *WRONG, *STALE} and len(set(drawn)) > 15
    assert {'ok', *LOST, *WRONG, *STALE, *PERMANENT} == set(ACTIONS)


def test_many_at_once():
    async def main(server):
        async with openai.AsyncOpenAI(base_url=server.url, api_key='x', max_retries=0) as c:
            return await asyncio.gather(*[c.chat.completions.create(**body(f'Write about #{i}', response_format=FORM)) for i in range(64)])
    with FaultServer(seconds=.3) as server:
        start = time.time()
        replies = asyncio.run(main(server))
        assert all(f'#{i},' in t for i, r in enumerate(replies) for t in samples(r)) and server.most == server.connections == 64 and time.time() - start < 10


def test_a_client_that_left_got_nothing():
    with FaultServer(seconds=.3) as server, client(server, timeout=.1) as c:
        with pytest.raises(openai.APITimeoutError): c.chat.completions.create(**body('x'))
        time.sleep(.4)
        assert len(server.log) == 1 and not server.log[0]['whole']


def test_other_writers_and_scripts_that_raise():
    with FaultServer('too_few', content=capable) as server:
        assert samples(ask(server, "<report>words about rain</report> Write 4 texts"))[2].count('words about rain') == 1 and len(server.log.delivered()) == 1
    with FaultServer(lambda asked, n: 'nonsense') as server:
        with pytest.raises(openai.BadRequestError, match='the script of this server raised'): ask(server)


def test_a_process_and_its_log_after_kill_9(tmp_path):
    log, command = tmp_path/'log.jsonl', [sys.executable, Path(__file__).with_name('fault_server.py'), '--faults', '.5', '--kinds', '500,too_few', '--log']
    ids = []
    for _ in range(2): # the second goes on in the same file
        with subprocess.Popen([*command, log], stdout=subprocess.PIPE, text=True) as server:
            url = server.stdout.readline().strip()
            for i in range(8):
                try: ids.append(ask(url, f'#{i}').id)
                except openai.InternalServerError: ids.append(None)
            os.kill(server.pid, signal.SIGKILL)
    found = read_log(log)
    assert [e['id'] for e in found] == ids and None in ids and {e['action'] for e in found} == {'ok', '500', 'too_few'} and all(e['whole'] for e in found)
    assert len(found.delivered()) == sum(i is not None for i in ids) and [e['action'] for e in found[:8]] == [e['action'] for e in found[8:]]
