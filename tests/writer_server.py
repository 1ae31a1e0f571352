"A chat completions server on loopback, and the replies of a capable writer and judge that need no model"
import hashlib, json, re, socket, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    "Answers as `answer(asked, n)` says: text, (status, body, headers) or 'hang up'; keeps what it was asked"
    daemon_threads = True

    def __init__(self, answer):
        self.answer = answer
        self.asked = []
        self.keys = set()
        self.now = self.most = 0 # requests under way
        self.lock = threading.Lock()
        super().__init__(('127.0.0.1', 0), Handler)
        poll = .02 # looked at often, so that it ends soon
        threading.Thread(target=self.serve_forever, args=[poll], daemon=True).start()

    @property
    def url(self): return f'http://127.0.0.1:{self.server_port}/v1'

    def begin(self, asked, key) -> int:
        "Write down a request; how many there have been"
        with self.lock:
            self.asked.append(asked)
            self.keys.add(key)
            self.now += 1
            self.most = max(self.most, self.now)
            return len(self.asked)

    def end(self):
        self.shutdown()
        self.server_close()

    def __enter__(self): return self
    def __exit__(self, *exc): self.end()


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        answer = self.answer_to(asked, self.server.begin(asked, self.headers['Authorization']))
        if answer == 'hang up':
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        status, body, headers = answer if isinstance(answer, tuple) else (200, completion(answer), {})
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {'Content-Type': 'application/json', 'Content-Length': len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def answer_to(self, asked, n):
        try:
            if self.path == '/v1/chat/completions': return self.server.answer(asked, n)
            return error(404, f'no {self.path} here')
        finally:
            with self.server.lock: self.server.now -= 1

    def log_message(self, *_): pass


def completion(text, finish='stop', **message):
    said = dict(role='assistant', content=text, **message)
    return dict(
        id='1', object='chat.completion', created=0, model='small-2026',
        usage=dict(prompt_tokens=100, completion_tokens=10, total_tokens=110),
        choices=[dict(index=0, finish_reason=finish, message=said)])


def error(status, text, param=None, code=None, **headers):
    return status, dict(error=dict(message=text, param=param, code=code)), headers


# ---- what a capable writer says

EXPLAINED = re.compile(
    r'(?:<report>|described like this:\s+|feature of a language model: )(.*?)'
    r'(?:</report>|\s+Write \w+ (?:texts|groups)|\s+The model then wrote)', re.S)
WANTED = {
    'samples': r'Write (\d+) texts',
    'sentences': r'Compose (\d+) new sentences',
    'activating': r'"activating": (\d+) ',
    'neutral': r'"neutral": (\d+) '}
OPENINGS = (
    'Yesterday', 'In the old town', 'After the meeting', 'On a cold morning', 'Nobody knew why', 'Near the harbour',
    'As the book says', 'Last summer')
ENDINGS = (
    'and the children laughed.', 'while it rained outside.', 'before the train left.',
    'and that was the end of it.', 'as everybody had hoped.', 'for the third time.')


def pick(options, *parts):
    "One of them, by the parts alone"
    return options[int(hashlib.sha256(repr(parts).encode()).hexdigest(), 16) % len(options)]


def mentions(explanation, text) -> tuple:
    "(whether it stands there as it is, how many of the words that it quotes do)"
    quoted = re.findall(r"'([^']+)'", explanation)
    found = [word for word in quoted if re.search(rf'(?<!\w){re.escape(word)}(?!\w)', text)]
    return explanation in text, len(found)


def judged(explanation, prompt, letters) -> str:
    "The set that mentions the explanation most; where several do equally, one of them"
    sets = dict(re.findall(r'^Set (\w):\n((?:- .*\n?)+)', prompt, re.M))
    if set(sets) != set(letters): raise ValueError(f'sets {sorted(sets)} for the letters {letters}')
    scores = {}
    for letter, lines in sets.items():
        each = [mentions(explanation, line) for line in lines.splitlines()]
        scores[letter] = tuple(map(sum, zip(*each)))
    return pick([letter for letter in letters if scores[letter] == max(scores.values())], prompt)


def sentence(explanation, kind, seed, j) -> str:
    "The explanation stands in it, unless it is a neutral one; different for each of up to 48 j"
    opening = pick(range(len(OPENINGS)), seed, kind, OPENINGS) + j
    ending = pick(range(len(ENDINGS)), seed, kind, ENDINGS) + j//len(OPENINGS)
    middle = 'a walk in the hills' if kind == 'neutral' else explanation
    return f'{OPENINGS[opening % len(OPENINGS)]} there was {middle} {ENDINGS[ending % len(ENDINGS)]}'


def capable(asked, n=0):
    """Texts that contain the explanation, as many as the prompt asks for; as a judge, the set that mentions it.

    Depends on what is asked alone."""
    prompt = asked['messages'][-1]['content']
    word = re.search('«(.*?)»', prompt)
    if word and 'response_format' not in asked: return f"the word '{word[1]}'" # autointerp
    form = asked['response_format']['json_schema']['schema']['properties']
    explained = EXPLAINED.search(prompt)
    if explained is None: return error(400, f'no explanation is found in: {prompt[:80]}')
    explanation = explained[1]
    if 'choice' in form: return json.dumps({'choice': judged(explanation, prompt, form['choice']['enum'])})
    wanted = {kind: int(re.search(WANTED[kind], prompt)[1]) for kind in form}
    seed = asked.get('seed')
    return json.dumps({kind: [sentence(explanation, kind, seed, j) for j in range(n)] for kind, n in wanted.items()})
