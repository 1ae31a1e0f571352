"""A chat completions server on loopback that goes wrong by script, and keeps a log of what it was asked and what it said.

    with FaultServer(faults(.3, seed=0), log='log.jsonl') as server: # or an action's name, or a function (asked, n) -> action
        client = AsyncOpenAI(base_url=server.url, api_key='any')
        ...
    server.log.delivered(), server.log.cost({'small': (1., 10.)}), server.most, server.connections

`asked` is the request's body, `n` counts requests from 1. The server runs in a thread of its own, where the script is called: it must not block.
`python tests/fault_server.py --faults .3 --seed 0 --log FILE` is the same as a process: it prints its URL, then serves until it is killed.

Actions
  ok                  a whole reply: JSON that fits the request's schema (from response_format, or spelt out in a message), a sentence where there is none;
                      `tag(prompt)` stands in each text: the prompt's '#12', or a hash where it has none. The text depends on prompt, model and seed alone
  lost                429 (Retry-After), 500, 503, 408, 409; hang (no answer until the client goes away), cut (closed in mid-body), reset and closed
                      (TCP reset, or closed, before any answer), bad_body (status 200, a proxy's error page)
  wrong               invalid_json (prose), fenced (right, in a fence between sentences), half_json (finish_reason length), too_few, too_many, duplicates,
                      empties (empty texts in a list), empty (no content at all), refusal, filter (finish_reason content_filter), filter_400;
                      what makes no sense for a request (too_few of a choice, invalid_json of a sentence) is 'ok', and so it stands in the log
  stale               replayed (the response of an earlier request, of another prompt where there was one; 'ok' where there was none),
                      twice (the right response two times in one go on the connection)
  permanent           400, 401 (which repeats the key), 402, 403, 404, insufficient_quota (a 429)
  refused_parameter   never in a script: what `refuses` and `forms` of the server lead to

refuses: parameters refused in OpenAI's words (a temperature of 1 is let through), also 'minItems' inside a schema. forms: kinds of response_format it has.
seconds: how long an answer takes, a number or a function of `asked`. content: who writes, a function of `asked` (`writer_server.capable`).

An entry of the log: number, time, prompt (first user message), attempt (at that prompt), action, status, whole (handed over in full to a client that was
still there; set before the last byte goes out: what a client has, the log has), id, prompt_tokens, completion_tokens (as in the body's usage), model,
parameters (all else that was sent), authorization. In the file it is written when the request comes and again with its end; `read_log(file)` joins the two.
"""
import argparse, asyncio, hashlib, json, random, re, socket, struct, threading, time, uuid
from collections import Counter, deque
from http import HTTPStatus
from pathlib import Path

LOST = ('429', '500', '503', '408', '409', 'hang', 'cut', 'reset', 'closed', 'bad_body')
WRONG = ('invalid_json', 'fenced', 'half_json', 'too_few', 'too_many', 'duplicates', 'empties', 'empty', 'refusal', 'filter', 'filter_400')
STALE = ('replayed', 'twice')
PERMANENT = ('400', '401', '402', '403', '404', 'insufficient_quota')
ACTIONS = ('ok', *LOST, *WRONG, *STALE, *PERMANENT)


def faults(share, seed=0, kinds=LOST + WRONG + STALE):
    "A script: the a-th attempt at a prompt goes wrong with this probability, which depends on (seed, prompt, a) alone"
    attempts = Counter()
    def script(asked, n):
        attempts[prompt := prompt_of(asked)] += 1
        rng = random.Random(f'{seed} {attempts[prompt]} {prompt}')
        return rng.choice(kinds) if rng.random() < share else 'ok'
    return script


# ---- the log

class Log(list):
    def delivered(self): return [e for e in self if e['whole'] and e['status'] == 200]
    def cost(self, prices): # {model: (input, output)} per million tokens; of what was delivered
        return sum((e['prompt_tokens']*prices[e['model']][0] + e['completion_tokens']*prices[e['model']][1])/1e6 for e in self.delivered())


def read_log(file) -> Log: # the last line about a request counts
    return Log({(e['time'], e['number']): e for e in map(json.loads, Path(file).read_text().splitlines())}.values())


# ---- what it says

def prompt_of(asked) -> str: return next((m['content'] for m in asked['messages'] if m['role'] == 'user'), '')


def digest(*parts) -> str: return hashlib.sha256(repr(parts).encode()).hexdigest()


def tag(prompt) -> str: # '#12' of 'Write about #12', or a hash
    found = re.search(r'#\d+\b', prompt)
    return found[0] if found else '#' + digest(prompt)[:10]


def schema_of(asked): # from response_format, or spelt out in a message; None: plain text
    form = asked.get('response_format') or {}
    if 'json_schema' in form: return form['json_schema']['schema']
    text, decoder = '\n'.join(m['content'] for m in asked['messages']), json.JSONDecoder()
    for start in re.finditer(r'\{', text):
        try: value, _ = decoder.raw_decode(text, start.start())
        except ValueError: continue
        if 'properties' in value: return value
    return {'type': 'object'} if form.get('type') == 'json_object' else None


WORDS = 'harbour lantern orchard quiet engine river letter marble winter signal copper garden thunder market violin shadow'.split()

def text(asked, *where):
    prompt, rng = prompt_of(asked), random.Random(digest(prompt_of(asked), asked.get('model'), asked.get('seed'), where))
    return f"Note {tag(prompt)}{''.join(f', {w}' for w in where)}: the {' '.join(rng.choices(WORDS, k=rng.randint(3, 8)))}."


def fill(schema, asked, *where):
    "A value that fits the schema"
    if 'enum' in schema: return schema['enum'][int(digest(prompt_of(asked), asked.get('seed'), where), 16) % len(schema['enum'])]
    kind = schema.get('type', 'object')
    if kind == 'object': return {k: fill(s, asked, *where, k) for k, s in schema.get('properties', {}).items()}
    if kind == 'array': return [fill(schema['items'], asked, *where, j) for j in range(schema.get('minItems', schema.get('maxItems', 4)))]
    return {'integer': 3, 'number': .5, 'boolean': True, 'null': None}[kind] if kind != 'string' else text(asked, *where)


def made_up(asked) -> str:
    schema = schema_of(asked)
    return text(asked) if schema is None else json.dumps(fill(schema, asked))


LISTS = {'too_few': lambda texts: texts[:-1], 'too_many': lambda texts: texts + ['One more ' + t for t in texts[:2]],
         'duplicates': lambda texts: [texts[0], texts[0], texts[0].swapcase(), *texts][:len(texts)],
         'empties': lambda texts: ['' if j % 2 else t for j, t in enumerate(texts)] if len(texts) > 1 else ['']}

def spoil(action, content, has_schema): # (content, finish_reason, message's other fields); None: makes no sense here
    if action in LISTS:
        value = json.loads(content) if has_schema else {}
        spoilt = value | {k: LISTS[action](v) for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], str)}
        return (json.dumps(spoilt), 'stop', {}) if spoilt != value else None
    if action in ('invalid_json', 'fenced') and not has_schema: return None
    if action == 'invalid_json': return f'I thought about {re.sub(r"[^ .#a-zA-Z0-9]", "", content)[:60]} for a while.', 'stop', {}
    if action == 'fenced': return f'Here is the JSON that you asked for:\n```json\n{content}\n```\nI hope that this helps!', 'stop', {}
    if action == 'half_json': return content[:len(content)//2], 'length', {}
    if action == 'empty': return '', 'stop', {}
    if action == 'refusal': return None, 'stop', dict(refusal="I'm sorry, but I can't help with that.")
    return ('', 'content_filter', {}) if action == 'filter' else (content, 'stop', {})


def error(message, kind='invalid_request_error', param=None, code=None): return dict(error=dict(message=message, type=kind, param=param, code=code))

ERRORS = { # action -> (status, body)
    '429': (429, error('Rate limit reached for requests. Please try again in 50ms.', 'requests', code='rate_limit_exceeded')),
    '500': (500, error('The server had an error while processing your request. Sorry about that!', 'server_error')),
    '503': (503, error('The engine is currently overloaded, please try again later', 'server_error')),
    '408': (408, error('Request timed out.', 'timeout')), '409': (409, error('The resource was locked by another request.')),
    '400': (400, error('We could not parse the JSON body of your request.')),
    '401': (401, error('Incorrect API key provided: {key}.', code='invalid_api_key')),
    '402': (402, error('Insufficient balance', code='insufficient_balance')),
    '403': (403, error('You are not allowed to sample from this model', 'permission_error')),
    '404': (404, error('The model `{model}` does not exist or you do not have access to it.', code='model_not_found')),
    'insufficient_quota': (429, error('You exceeded your current quota, please check your plan and billing details.', 'insufficient_quota', code='insufficient_quota')),
    'filter_400': (400, error("The response was filtered due to the prompt triggering the content management policy.", param='prompt', code='content_filter'))}


def refused(asked, refuses, forms): # the body of a 400; None: all is well
    form = asked.get('response_format')
    for name in sorted(refuses & asked.keys()):
        if name == 'temperature':
            if asked[name] == 1: continue
            return error(f"Unsupported value: 'temperature' does not support {asked[name]} with this model. Only the default (1) value is supported.", param=name, code='unsupported_value')
        instead = " Use 'max_completion_tokens' instead." if name == 'max_tokens' else ''
        return error(f"Unsupported parameter: '{name}' is not supported with this model.{instead}", param=name, code='unsupported_parameter')
    if not form or form['type'] == 'text': return None
    if form['type'] not in forms: return error(f"Invalid parameter: 'response_format' of type '{form['type']}' is not supported with this model.", param='response_format')
    if form['type'] == 'json_object' and 'json' not in json.dumps(asked['messages']).lower():
        return error("'messages' must contain the word 'json' in some form, to use 'response_format' of type 'json_object'.", param='messages')
    if 'minItems' in refuses and '"minItems"' in json.dumps(form):
        return error(f"Invalid schema for response_format '{form['json_schema']['name']}': 'minItems' is not permitted.", param='response_format')


def response(status, body, headers=None) -> bytes: # body: a dict, or bytes of HTML
    page = isinstance(body, bytes)
    data = body if page else json.dumps(body).encode()
    lines = {'Content-Type': 'text/html' if page else 'application/json', 'Content-Length': len(data), **(headers or {})}
    return '\r\n'.join([f'HTTP/1.1 {status} {HTTPStatus(status).phrase}', *(f'{k}: {v}' for k, v in lines.items()), '', '']).encode() + data


# ---- the server

class FaultServer:
    def __init__(self, script='ok', content=made_up, refuses=(), forms=('json_schema', 'json_object'), seconds=0., retry_after=.05, log=None, port=0):
        self.script, self.content, self.refuses, self.forms = script if callable(script) else lambda *_: script, content, set(refuses), set(forms)
        self.seconds, self.retry_after = seconds if callable(seconds) else lambda _: seconds, retry_after
        self.log, self.file, self.attempts, self.sent = Log(), open(log, 'ab', buffering=0) if log else None, Counter(), deque(maxlen=100)
        self.now = self.most = self.connections = 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = self._call(asyncio.start_server(self._connection, '127.0.0.1', port, backlog=1024))

    @property
    def url(self): return f'http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1'
    def __enter__(self): return self
    def __exit__(self, *exc): self.close()
    def _call(self, job): return asyncio.run_coroutine_threadsafe(job, self.loop).result()

    def close(self):
        async def end():
            self.server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for t in tasks: t.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._call(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        if self.file: self.file.close()

    async def _connection(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b'\r\n\r\n')).decode('latin-1').split('\r\n')
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(':') for line in head[1:])}
                body = await reader.readexactly(int(headers.get('content-length', 0)))
                method, path, _ = head[0].split()
                if (method, path) == ('POST', '/v1/chat/completions'):
                    self.now += 1
                    self.most = max(self.most, self.now)
                    try: stays = await self._chat(json.loads(body), headers.get('authorization'), reader, writer)
                    finally: self.now -= 1
                    if not stays: break
                elif (method, path) == ('GET', '/v1/models'): writer.write(response(200, dict(object='list', data=[dict(id='small', object='model', created=0, owned_by='tests')])))
                else: writer.write(response(404, error(f'Invalid URL ({method} {path})')))
        except (asyncio.IncompleteReadError, ConnectionError): pass # the client went away
        except asyncio.CancelledError: pass # the server closes
        finally: writer.close()

    def _write_down(self, entry):
        if self.file: self.file.write(json.dumps(entry).encode() + b'\n')

    async def _chat(self, asked, key, reader, writer) -> bool: # whether the connection goes on
        prompt = prompt_of(asked)
        self.attempts[prompt] += 1
        entry = dict(number=len(self.log) + 1, time=time.time(), prompt=prompt, attempt=self.attempts[prompt], action=None, status=None, whole=False, id=None, prompt_tokens=0,
                     completion_tokens=0, model=asked.get('model'), parameters={k: v for k, v in asked.items() if k not in ('messages', 'model')}, authorization=key)
        self.log.append(entry)
        data = self._decide(asked, entry)
        self._write_down(entry)
        if (seconds := self.seconds(asked)): await asyncio.sleep(seconds)
        action = entry['action']
        if action == 'hang': await reader.read(1)
        if action == 'reset': writer.get_extra_info('socket').setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        if action in ('hang', 'reset', 'closed') or reader.at_eof() or writer.transport.is_closing(): return False
        if action == 'cut':
            body = data.index(b'\r\n\r\n') + 4
            writer.write(data[:(body + len(data))//2])
            return False
        entry['whole'] = True
        self._write_down(entry)
        if entry['status'] == 200 and entry['id'] and action not in STALE: self.sent.append((entry, data))
        writer.write(data*2 if action == 'twice' else data)
        await writer.drain()
        return True

    def _decide(self, asked, entry) -> bytes: # the response; fills in the entry's action, status, id and tokens
        if body := refused(asked, self.refuses, self.forms):
            entry.update(action='refused_parameter', status=400)
            return response(400, body)
        try:
            action = self.script(asked, entry['number'])
            if action not in ACTIONS: raise ValueError(f'no action {action!r}')
            content = self.content(asked)
            if not isinstance(content, str): raise ValueError(f'no text: {content}')
        except Exception as e:
            entry.update(action='broken script', status=400)
            return response(400, error(f'the script of this server raised {e!r}'))
        if action == 'replayed':
            others = [s for s in self.sent if s[0]['prompt'] != entry['prompt']] or [*self.sent]
            if others:
                earlier, data = others[0] # long enough ago for the client to have read it
                entry.update(action=action, status=200, **{k: earlier[k] for k in ('id', 'prompt_tokens', 'completion_tokens')})
                return data
            action = 'ok'
        if action in ('hang', 'reset', 'closed'):
            entry.update(action=action)
            return b''
        if action == 'bad_body':
            entry.update(action=action, status=200)
            return response(200, b'<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>')
        if action in ERRORS:
            status, body = ERRORS[action]
            entry.update(action=action, status=status)
            message = body['error']['message'].format(key=(entry['authorization'] or '').removeprefix('Bearer '), model=entry['model'])
            wait = {'Retry-After': self.retry_after, 'retry-after-ms': round(1000*self.retry_after)} if action == '429' else {}
            return response(status, dict(error=body['error'] | dict(message=message)), wait)
        said = spoil(action, content, schema_of(asked) is not None)
        if said is None: action, said = 'ok', (content, 'stop', {})
        content, finish, more = said
        usage = dict(prompt_tokens=8 + len(entry['prompt'])//4 + int(digest(entry['prompt'])[:2], 16) % 7, completion_tokens=1 + len(content or '')//4)
        entry.update(action=action, status=200, id='chatcmpl-' + uuid.uuid4().hex, **usage)
        return response(200, dict(id=entry['id'], object='chat.completion', created=int(entry['time']), model=f"{entry['model']}-2026", usage=usage | dict(total_tokens=sum(usage.values())),
                                  choices=[dict(index=0, finish_reason=finish, logprobs=None, message=dict(role='assistant', content=content, refusal=None) | more)]))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description='A chat completions server on loopback that goes wrong by script')
    p.add_argument('--faults', type=float, default=0., help='share of attempts that go wrong')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--kinds', default=','.join(LOST + WRONG + STALE), help='actions that go wrong, with commas')
    p.add_argument('--refuses', default='', help='parameters to refuse, with commas')
    p.add_argument('--forms', default='json_schema,json_object')
    p.add_argument('--seconds', type=float, default=0., help='how long an answer takes')
    p.add_argument('--log', help='JSON lines, appended')
    p.add_argument('--port', type=int, default=0)
    p.add_argument('--capable', action='store_true', help='texts of writer_server.capable')
    a = p.parse_args()
    if a.capable: from writer_server import capable
    split = lambda names: tuple(n for n in names.split(',') if n)
    server = FaultServer(faults(a.faults, a.seed, split(a.kinds)), capable if a.capable else made_up, split(a.refuses), split(a.forms), a.seconds, log=a.log, port=a.port)
    print(server.url, flush=True)
    server.thread.join()
