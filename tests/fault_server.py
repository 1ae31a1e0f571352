"""A chat completions server on loopback that goes wrong by script, and logs what it was asked and what it said.

    with FaultServer(faults(.3, seed=0), log='log.jsonl') as server: # or an action, or a function (asked, n) -> action
        client = AsyncOpenAI(base_url=server.url, api_key='any')
        ...
    server.log.delivered(), server.log.cost({'small': (1., 10.)}), server.most, server.connections

`asked` is the request's body, `n` counts requests from 1. The server runs in a thread of its own, where the script is
called: it must not block. `python tests/fault_server.py --faults .3 --seed 0 --log FILE` is the same as a process: it
prints its URL, then serves until it is killed.

Actions
  ok                  a whole reply: JSON that fits the request's schema (from response_format, or spelt out in a
                      message), a sentence where there is none; `tag(prompt)` stands in each text: the prompt's '#12',
                      or a hash where it has none. The text depends on prompt, model and seed alone
  lost                429 (Retry-After), 500, 503, 408, 409; hang (no answer until the client goes away), cut (closed in
                      mid-body), reset and closed (TCP reset, or closed, before any answer), bad_body (status 200, a
                      proxy's error page)
  wrong               invalid_json (prose), fenced (right, in a fence between sentences), half_json (finish_reason
                      length), too_few, too_many, duplicates, empties (empty texts in a list), empty (no content at
                      all), refusal, filter (finish_reason content_filter), filter_400; what makes no sense for a
                      request (too_few of a choice, invalid_json of a sentence) is 'ok', and so it stands in the log
  stale               replayed (the response of an earlier request, of another prompt where there was one; 'ok' where
                      there was none), twice (the right response two times in one go on the connection)
  permanent           400, 401 (which repeats the key), 402, 403, 404, insufficient_quota (a 429)
  refused_parameter   never in a script: what `refuses` and `forms` of the server lead to

An entry of the log: number, time, prompt (first user message), attempt (at that prompt), action, status, whole (handed
over in full to a client that was still there; set before the last byte goes out: what a client has, the log has), id,
prompt_tokens, completion_tokens (as in the body's usage), model, parameters (all else that was sent), authorization. In
the file it is written when the request comes and again with its end; `read_log(file)` joins the two.
"""
import argparse, asyncio, hashlib, json, random, re, socket, struct, threading, time, uuid
from collections import Counter, deque
from http import HTTPStatus
from pathlib import Path
from writer_server import capable

LOST = ('429', '500', '503', '408', '409', 'hang', 'cut', 'reset', 'closed', 'bad_body')
WRONG = (
    'invalid_json', 'fenced', 'half_json', 'too_few', 'too_many', 'duplicates', 'empties', 'empty', 'refusal', 'filter',
    'filter_400')
STALE = ('replayed', 'twice')
PERMANENT = ('400', '401', '402', '403', '404', 'insufficient_quota')
ACTIONS = ('ok', *LOST, *WRONG, *STALE, *PERMANENT)


def faults(share, seed=0, kinds=LOST + WRONG + STALE):
    "A script: the a-th attempt at a prompt goes wrong with this probability, which depends on (seed, prompt, a) alone"
    attempts = Counter()
    def script(asked, n):
        prompt = prompt_of(asked)
        attempts[prompt] += 1
        rng = random.Random(f'{seed} {attempts[prompt]} {prompt}')
        return rng.choice(kinds) if rng.random() < share else 'ok'
    return script


# ---- the log

class Log(list):
    def delivered(self): return [entry for entry in self if entry['whole'] and entry['status'] == 200]

    def cost(self, prices):
        "Of what was delivered; prices: {model: (input, output)} per million tokens"
        def price(entry):
            per_input, per_output = prices[entry['model']]
            return entry['prompt_tokens']*per_input + entry['completion_tokens']*per_output
        return sum(price(entry)/1e6 for entry in self.delivered())


def read_log(file) -> Log:
    "The last line about a request counts"
    entries = [json.loads(line) for line in Path(file).read_text().splitlines()]
    return Log({(entry['time'], entry['number']): entry for entry in entries}.values())


# ---- what it says

def prompt_of(asked) -> str: return next((m['content'] for m in asked['messages'] if m['role'] == 'user'), '')


def digest(*parts) -> str: return hashlib.sha256(repr(parts).encode()).hexdigest()


def tag(prompt) -> str:
    "'#12' of 'Write about #12', or a hash"
    found = re.search(r'#\d+\b', prompt)
    return found[0] if found else '#' + digest(prompt)[:10]


def schema_of(asked):
    "From response_format, or spelt out in a message; None: plain text"
    form = asked.get('response_format') or {}
    if 'json_schema' in form: return form['json_schema']['schema']
    text = '\n'.join(m['content'] for m in asked['messages'])
    decoder = json.JSONDecoder()
    for start in re.finditer(r'\{', text):
        try: value, _ = decoder.raw_decode(text, start.start())
        except ValueError: continue
        if 'properties' in value: return value
    return {'type': 'object'} if form.get('type') == 'json_object' else None


WORDS = (
    'harbour', 'lantern', 'orchard', 'quiet', 'engine', 'river', 'letter', 'marble', 'winter', 'signal', 'copper',
    'garden', 'thunder', 'market', 'violin', 'shadow')

def text(asked, *where):
    prompt = prompt_of(asked)
    rng = random.Random(digest(prompt, asked.get('model'), asked.get('seed'), where))
    place = ''.join(f', {part}' for part in where)
    return f"Note {tag(prompt)}{place}: the {' '.join(rng.choices(WORDS, k=rng.randint(3, 8)))}."


CONSTANTS = {'integer': 3, 'number': .5, 'boolean': True, 'null': None}

def fill(schema, asked, *where):
    "A value that fits the schema"
    if 'enum' in schema:
        place = int(digest(prompt_of(asked), asked.get('seed'), where), 16)
        return schema['enum'][place % len(schema['enum'])]
    kind = schema.get('type', 'object')
    if kind == 'object':
        return {name: fill(part, asked, *where, name) for name, part in schema.get('properties', {}).items()}
    if kind == 'array':
        n = schema.get('minItems', schema.get('maxItems', 4))
        return [fill(schema['items'], asked, *where, j) for j in range(n)]
    return text(asked, *where) if kind == 'string' else CONSTANTS[kind]


def made_up(asked) -> str:
    schema = schema_of(asked)
    return text(asked) if schema is None else json.dumps(fill(schema, asked))


# ---- what is wrong with it

def with_duplicates(texts): return [texts[0], texts[0], texts[0].swapcase(), *texts][:len(texts)]


def with_empties(texts): return ['' if j % 2 else text for j, text in enumerate(texts)] if len(texts) > 1 else ['']


LISTS = {
    'too_few': lambda texts: texts[:-1],
    'too_many': lambda texts: texts + ['One more ' + text for text in texts[:2]],
    'duplicates': with_duplicates,
    'empties': with_empties}


def spoil_lists(action, content):
    "The JSON with its lists of texts spoilt; None: it holds none"
    value = json.loads(content)
    lists = {name: part for name, part in value.items() if isinstance(part, list) and part and isinstance(part[0], str)}
    spoilt = value | {name: LISTS[action](texts) for name, texts in lists.items()}
    return json.dumps(spoilt) if spoilt != value else None


def prose(content):
    words = re.sub(r'[^ .#a-zA-Z0-9]', '', content)[:60]
    return f'I thought about {words} for a while.'


def spoil(action, content, has_schema):
    "(content, finish_reason, message's other fields); None: makes no sense here"
    if action in (*LISTS, 'invalid_json', 'fenced') and not has_schema: return None
    if action in LISTS:
        spoilt = spoil_lists(action, content)
        return spoilt and (spoilt, 'stop', {})
    fenced = f'Here is the JSON that you asked for:\n```json\n{content}\n```\nI hope that this helps!'
    said = {
        'invalid_json': (prose(content), 'stop', {}),
        'fenced': (fenced, 'stop', {}),
        'half_json': (content[:len(content)//2], 'length', {}),
        'empty': ('', 'stop', {}),
        'refusal': (None, 'stop', dict(refusal="I'm sorry, but I can't help with that.")),
        'filter': ('', 'content_filter', {})}
    return said.get(action, (content, 'stop', {}))


# ---- errors

def error(message, kind='invalid_request_error', param=None, code=None):
    return dict(error=dict(message=message, type=kind, param=param, code=code))


BUSY = 'Rate limit reached for requests. Please try again in 50ms.'
NO_QUOTA = 'You exceeded your current quota, please check your plan and billing details.'
NO_MODEL = 'The model `{model}` does not exist or you do not have access to it.'
FILTERED = "The response was filtered due to the prompt triggering the content management policy."
ERRORS = { # action -> (status, body)
    '429': (429, error(BUSY, 'requests', code='rate_limit_exceeded')),
    '500': (500, error('The server had an error while processing your request. Sorry about that!', 'server_error')),
    '503': (503, error('The engine is currently overloaded, please try again later', 'server_error')),
    '408': (408, error('Request timed out.', 'timeout')),
    '409': (409, error('The resource was locked by another request.')),
    '400': (400, error('We could not parse the JSON body of your request.')),
    '401': (401, error('Incorrect API key provided: {key}.', code='invalid_api_key')),
    '402': (402, error('Insufficient balance', code='insufficient_balance')),
    '403': (403, error('You are not allowed to sample from this model', 'permission_error')),
    '404': (404, error(NO_MODEL, code='model_not_found')),
    'insufficient_quota': (429, error(NO_QUOTA, 'insufficient_quota', code='insufficient_quota')),
    'filter_400': (400, error(FILTERED, param='prompt', code='content_filter'))}
PAGE = b'<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>'


def refused_parameter(asked, refuses):
    "The error of the first parameter, by name, that the model does not take; a temperature of 1 is let through"
    for name in sorted(refuses & asked.keys()):
        if name == 'temperature':
            if asked[name] == 1: continue
            says = f"Unsupported value: 'temperature' does not support {asked[name]} with this model."
            says += ' Only the default (1) value is supported.'
            return error(says, param=name, code='unsupported_value')
        instead = " Use 'max_completion_tokens' instead." if name == 'max_tokens' else ''
        says = f"Unsupported parameter: '{name}' is not supported with this model.{instead}"
        return error(says, param=name, code='unsupported_parameter')
    return None


def refused_form(asked, refuses, forms):
    "The error of a response_format that the model does not have"
    form = asked.get('response_format')
    if not form or form['type'] == 'text': return None
    if form['type'] not in forms:
        says = f"Invalid parameter: 'response_format' of type '{form['type']}' is not supported with this model."
        return error(says, param='response_format')
    if form['type'] == 'json_object' and 'json' not in json.dumps(asked['messages']).lower():
        says = "'messages' must contain the word 'json' in some form, to use 'response_format' of type 'json_object'."
        return error(says, param='messages')
    if 'minItems' in refuses and '"minItems"' in json.dumps(form):
        name = form['json_schema']['name']
        says = f"Invalid schema for response_format '{name}': 'minItems' is not permitted."
        return error(says, param='response_format')
    return None


def response(status, body, headers=None) -> bytes:
    "body: a dict, or bytes of HTML"
    page = isinstance(body, bytes)
    data = body if page else json.dumps(body).encode()
    fields = {'Content-Type': 'text/html' if page else 'application/json', 'Content-Length': len(data)}
    lines = [f'{name}: {value}' for name, value in (fields | (headers or {})).items()]
    head = [f'HTTP/1.1 {status} {HTTPStatus(status).phrase}', *lines, '', '']
    return '\r\n'.join(head).encode() + data


# ---- the server

def always(value): return lambda *_: value


async def read_request(reader):
    "(method and path, headers, body)"
    first, *lines = (await reader.readuntil(b'\r\n\r\n')).decode('latin-1').split('\r\n')
    headers = {}
    for line in lines:
        name, _, value = line.partition(':')
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get('content-length', 0)))
    return first.rpartition(' ')[0], headers, body


class FaultServer:
    """script: an action, or a function (asked, n) -> action
    content: who writes, a function of `asked` (`writer_server.capable`)
    refuses: parameters refused in OpenAI's words (a temperature of 1 is let through), also 'minItems' inside a schema
    forms: kinds of response_format it has
    seconds: how long an answer takes"""
    def __init__(
        self, script='ok', content=made_up, refuses=(), forms=('json_schema', 'json_object'), seconds=0., log=None,
        port=0):
        self.script = script if callable(script) else always(script)
        self.content = content
        self.refuses = set(refuses)
        self.forms = forms
        self.seconds = seconds
        self.log = Log()
        self.file = open(log, 'ab', buffering=0) if log else None
        self.attempts = Counter() # at each prompt
        self.sent = deque(maxlen=100) # (entry, response)
        self.now = self.most = self.connections = 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = self._call(asyncio.start_server(self._connection, '127.0.0.1', port, backlog=1024))

    @property
    def address(self) -> tuple: return self.server.sockets[0].getsockname()

    @property
    def url(self): return f'http://127.0.0.1:{self.address[1]}/v1'

    def __enter__(self): return self
    def __exit__(self, *exc): self.close()

    def _call(self, job): return asyncio.run_coroutine_threadsafe(job, self.loop).result()

    def close(self):
        async def end():
            self.server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks: task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._call(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        if self.file: self.file.close()

    async def _connection(self, reader, writer):
        self.connections += 1
        try:
            while await self._exchange(reader, writer): pass
        except (asyncio.IncompleteReadError, ConnectionError): pass # the client went away
        except asyncio.CancelledError: pass # the server closes
        finally: writer.close()

    async def _exchange(self, reader, writer) -> bool:
        "One request and its answer; whether the connection stays"
        what, headers, body = await read_request(reader)
        if what == 'POST /v1/chat/completions':
            self.now += 1
            self.most = max(self.most, self.now)
            try: return await self._chat(json.loads(body), headers.get('authorization'), reader, writer)
            finally: self.now -= 1
        if what == 'GET /v1/models':
            models = [dict(id='small', object='model', created=0, owned_by='tests')]
            writer.write(response(200, dict(object='list', data=models)))
        else: writer.write(response(404, error(f'Invalid URL ({what})')))
        return True

    def _write_down(self, entry):
        if self.file: self.file.write(json.dumps(entry).encode() + b'\n')

    def _entry(self, asked, key) -> dict:
        "A new line of the log"
        prompt = prompt_of(asked)
        self.attempts[prompt] += 1
        parameters = {name: value for name, value in asked.items() if name not in ('messages', 'model')}
        entry = dict(
            number=len(self.log) + 1, time=time.time(), prompt=prompt, attempt=self.attempts[prompt], action=None,
            status=None, whole=False, id=None, prompt_tokens=0, completion_tokens=0, model=asked.get('model'),
            parameters=parameters, authorization=key)
        self.log.append(entry)
        return entry

    async def _chat(self, asked, key, reader, writer) -> bool:
        "Answer one request; whether the connection stays"
        entry = self._entry(asked, key)
        data = self._decide(asked, entry)
        self._write_down(entry)
        if self.seconds: await asyncio.sleep(self.seconds)
        action = entry['action']
        if action == 'hang': await reader.read(1)
        if action == 'reset':
            at_once = struct.pack('ii', 1, 0)
            writer.get_extra_info('socket').setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
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

    def _decide(self, asked, entry) -> bytes:
        "The response; fills in the entry's action, status, id and tokens"
        body = refused_parameter(asked, self.refuses) or refused_form(asked, self.refuses, self.forms)
        if body:
            entry.update(action='refused_parameter', status=400)
            return response(400, body)
        try:
            action = self._action(asked, entry)
            content = self.content(asked)
            if not isinstance(content, str): raise ValueError(f'no text: {content}')
        except Exception as e:
            entry.update(action='broken script', status=400)
            return response(400, error(f'the script of this server raised {e!r}'))
        if action == 'replayed':
            earlier = self._earlier(entry)
            if earlier: return earlier
            action = 'ok'
        entry.update(action=action)
        if action in ('hang', 'reset', 'closed'): return b''
        if action == 'bad_body':
            entry.update(status=200)
            return response(200, PAGE)
        if action in ERRORS: return self._failure(entry)
        return self._reply(asked, entry, content)

    def _action(self, asked, entry):
        action = self.script(asked, entry['number'])
        if action not in ACTIONS: raise ValueError(f'no action {action!r}')
        return action

    def _earlier(self, entry):
        "An earlier response, long enough ago for the client to have read it; None: there is none"
        others = [sent for sent in self.sent if sent[0]['prompt'] != entry['prompt']] or [*self.sent]
        if not others: return None
        first, data = others[0]
        told = {name: first[name] for name in ('id', 'prompt_tokens', 'completion_tokens')}
        entry.update(action='replayed', status=200, **told)
        return data

    def _failure(self, entry) -> bytes:
        status, body = ERRORS[entry['action']]
        entry.update(status=status)
        key = (entry['authorization'] or '').removeprefix('Bearer ')
        message = body['error']['message'].format(key=key, model=entry['model'])
        wait = {'Retry-After': .05, 'retry-after-ms': 50} if entry['action'] == '429' else {}
        return response(status, dict(error=body['error'] | dict(message=message)), wait)

    def _reply(self, asked, entry, content) -> bytes:
        said = spoil(entry['action'], content, schema_of(asked) is not None)
        if said is None: entry.update(action='ok')
        content, finish, more = said or (content, 'stop', {})
        prompt = entry['prompt']
        usage = dict(
            prompt_tokens=8 + len(prompt)//4 + int(digest(prompt)[:2], 16) % 7,
            completion_tokens=1 + len(content or '')//4)
        entry.update(status=200, id='chatcmpl-' + uuid.uuid4().hex, **usage)
        message = dict(role='assistant', content=content, refusal=None) | more
        return response(200, dict(
            id=entry['id'], object='chat.completion', created=int(entry['time']), model=f"{entry['model']}-2026",
            usage=usage | dict(total_tokens=sum(usage.values())),
            choices=[dict(index=0, finish_reason=finish, logprobs=None, message=message)]))


def names(text) -> tuple: return tuple(name for name in text.split(',') if name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    option = parser.add_argument
    option('--faults', type=float, default=0., help='share of attempts that go wrong')
    option('--seed', type=int, default=0)
    option('--kinds', type=names, default=LOST + WRONG + STALE, help='actions that go wrong, with commas')
    option('--refuses', type=names, default=(), help='parameters to refuse, with commas')
    option('--forms', type=names, default=('json_schema', 'json_object'))
    option('--seconds', type=float, default=0., help='how long an answer takes')
    option('--log', help='JSON lines, appended')
    option('--port', type=int, default=0)
    option('--capable', action='store_true', help='texts of writer_server.capable')
    a = parser.parse_args()
    server = FaultServer(
        faults(a.faults, a.seed, a.kinds), capable if a.capable else made_up, a.refuses, a.forms, a.seconds, a.log,
        a.port)
    print(server.url, flush=True)
    server.thread.join()


if __name__ == '__main__': main()
