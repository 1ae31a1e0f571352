"A chat completions server on loopback, and the replies of a capable writer and judge that need no model"
import hashlib, json, re, socket, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    "Answers as `answer(asked, n)` says: text, (status, body, headers) or 'hang up'; keeps what it was asked"
    daemon_threads = True
    def __init__(self, answer):
        self.answer, self.asked, self.keys, self.now, self.most, self.lock = answer, [], set(), 0, 0, threading.Lock()
        super().__init__(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.serve_forever, args=[.02], daemon=True).start() # looked at often, so that it ends soon
    @property
    def url(self): return f'http://127.0.0.1:{self.server_port}/v1'
    def __enter__(self): return self
    def __exit__(self, *exc): self.shutdown(); self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        with self.server.lock:
            self.server.asked.append(asked)
            n = len(self.server.asked)
            self.server.keys.add(self.headers['Authorization'])
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try: answer = self.server.answer(asked, n) if self.path == '/v1/chat/completions' else error(404, f'no {self.path} here')
        finally:
            with self.server.lock: self.server.now -= 1
        if answer == 'hang up':
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        status, body, headers = answer if isinstance(answer, tuple) else (200, completion(answer), {})
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for k, v in {'Content-Type': 'application/json', 'Content-Length': len(data), **headers}.items(): self.send_header(k, str(v))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *_): pass


def completion(text, finish='stop', **message):
    return dict(id='1', object='chat.completion', created=0, model='small-2026', usage=dict(prompt_tokens=100, completion_tokens=10, total_tokens=110),
                choices=[dict(index=0, finish_reason=finish, message=dict(role='assistant', content=text, **message))])


def error(status, text, param=None, code=None, **headers): return status, dict(error=dict(message=text, param=param, code=code)), headers


# ---- what a capable writer says

EXPLAINED = re.compile(r'(?:<report>|described like this:\s+|feature of a language model: )(.*?)(?:</report>|\s+Write \w+ (?:texts|groups)|\s+The model then wrote)', re.S)
WANTED = {'samples': r'Write (\d+) texts', 'sentences': r'Compose (\d+) new sentences', 'activating': r'"activating": (\d+) ', 'neutral': r'"neutral": (\d+) '}
OPENINGS = ('Yesterday', 'In the old town', 'After the meeting', 'On a cold morning', 'Nobody knew why', 'Near the harbour', 'As the book says', 'Last summer')
ENDINGS = ('and the children laughed.', 'while it rained outside.', 'before the train left.', 'and that was the end of it.', 'as everybody had hoped.', 'for the third time.')


def pick(options, *parts): # one of them, by the parts alone
    return options[int(hashlib.sha256(repr(parts).encode()).hexdigest(), 16) % len(options)]


def mentions(explanation, text) -> tuple: # (stands there as it is, how many of the words that it quotes do)
    words = re.findall(r"'([^']+)'", explanation)
    return explanation in text, sum(bool(re.search(rf'(?<!\w){re.escape(w)}(?!\w)', text)) for w in words)


def judged(explanation, prompt, letters) -> str: # the set that mentions the explanation most; where several do equally, one of them
    sets = dict(re.findall(r'^Set (\w):\n((?:- .*\n?)+)', prompt, re.M))
    if set(sets) != set(letters): raise ValueError(f'sets {sorted(sets)} for the letters {letters}')
    score = {k: tuple(map(sum, zip(*(mentions(explanation, line) for line in v.splitlines())))) for k, v in sets.items()}
    return pick([k for k in letters if score[k] == max(score.values())], prompt)


def sentence(explanation, kind, seed, j) -> str: # the explanation stands in it, unless it is a neutral one; different for each of up to 48 j
    opening, ending = (pick(range(len(options)), seed, kind, options) for options in (OPENINGS, ENDINGS))
    return (f"{OPENINGS[(opening + j) % len(OPENINGS)]} there was {'a walk in the hills' if kind == 'neutral' else explanation} "
            f"{ENDINGS[(ending + j//len(OPENINGS)) % len(ENDINGS)]}")


def capable(asked, n=0):
    "Texts that contain the explanation, as many as the prompt asks for; as a judge, the set that mentions it. Depends on what is asked alone"
    prompt = asked['messages'][-1]['content']
    if (word := re.search('«(.*?)»', prompt)) and 'response_format' not in asked: return f"the word '{word[1]}'" # autointerp
    form = asked['response_format']['json_schema']['schema']['properties']
    explanation, seed = EXPLAINED.search(prompt), asked.get('seed')
    if explanation is None: return error(400, f'no explanation is found in: {prompt[:80]}')
    if 'choice' in form: return json.dumps({'choice': judged(explanation[1], prompt, form['choice']['enum'])})
    return json.dumps({kind: [sentence(explanation[1], kind, seed, j) for j in range(int(re.search(WANTED[kind], prompt)[1]))] for kind in form})
