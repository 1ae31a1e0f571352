"Neuronpedia on 127.0.0.1: its store and its API, from Python dicts, with faults on request"
import gzip
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

CUT = 'cut'     # half a file, as stored
SHORT = 'short' # half of what Content-Length says
STALL = 'stall' # no answer until the server ends

API = 'api/feature/'
XML = '<?xml version="1.0" encoding="UTF-8"?>'
OF_S3 = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


class Neuronpedia:
    "A server for `with`; `faults[path]` has one item per request: `CUT`, `SHORT`, `STALL`, (status, headers) or None"

    def __init__(
        self,
        files=None,    # key -> rows (dicts, or lines as they are)
        features=None, # 'model/source/index' -> what the API says
        faults=None,   # path -> an iterable
        page=1000,     # keys in a page of a listing
        headers=None,  # of every answer of the API
    ):
        self.files = {key: gzip_lines(rows) for key, rows in (files or {}).items()}
        self.features = features or {}
        self.faults = {path: iter(of_path) for path, of_path in (faults or {}).items()}
        self.page = page
        self.headers = headers or {}
        self.log = [] # (path, headers, time) of each request
        self.ended = threading.Event()

    def __enter__(self):
        owner = self
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self): owner.answer(self)
            def log_message(self, *args): pass
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        return self

    def __exit__(self, *args):
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()

    def asked(self, kind='.jsonl.gz') -> list: # paths, without the listings
        return [path for path, *_ in self.log if kind in path]

    def answer(self, request):
        address = urlsplit(request.path)
        path = unquote(address.path)[1:]
        self.log.append((path, dict(request.headers), time.monotonic()))
        fault = next(self.faults.get(path, iter(())), None)
        if fault == STALL:
            self.ended.wait(60)
        elif isinstance(fault, tuple):
            status, headers = fault
            send(request, status, b'{"error": "as asked for"}', headers)
        elif path.startswith(API):
            self.send_feature(request, path.removeprefix(API))
        elif path:
            self.send_file(request, path, fault)
        else:
            query = {name: values[0] for name, values in parse_qs(address.query).items()}
            send(request, 200, self.listing(**query))

    def send_feature(self, request, name):
        found = self.features.get(name)
        status, said = (404, dict(error='Feature not found')) if found is None else (200, found)
        send(request, status, json.dumps(said).encode(), self.headers)

    def send_file(self, request, key, fault):
        if key not in self.files: return send(request, 404, b'<Error><Code>NoSuchKey</Code></Error>')
        whole = self.files[key]
        body = whole if fault is None else whole[:len(whole)//2]
        send(request, 200, body, length=len(whole if fault == SHORT else body))

    def listing(self, prefix='', delimiter=None, **query) -> bytes: # one page, as S3 gives it
        assert query['list-type'] == '2'
        names = sorted(key for key in self.files if key.startswith(prefix))
        if delimiter: names = sorted({prefix + name[len(prefix):].split(delimiter)[0] + delimiter for name in names})
        start = int(query.get('continuation-token', 'page/+0')[6:]) # tokens hold characters that need quoting
        end = start + self.page
        more = end < len(names)
        parts = [
            f'{XML}<ListBucketResult {OF_S3}><IsTruncated>{str(more).lower()}</IsTruncated>',
            f'<NextContinuationToken>page/+{end}</NextContinuationToken>' if more else '',
            *map(folder_item if delimiter else self.file_item, names[start:end]),
            '</ListBucketResult>']
        return ''.join(parts).encode()

    def file_item(self, key):
        tag = hashlib.md5(self.files[key]).hexdigest()
        return f'<Contents><Key>{escape(key)}</Key><ETag>&quot;{tag}&quot;</ETag></Contents>'


def folder_item(name):
    return f'<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>'


def send(request, status, body, headers=None, length=None):
    request.send_response(status)
    length = len(body) if length is None else length
    for name, value in {**(headers or {}), 'Content-Length': str(length)}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)


def gzip_lines(rows) -> bytes:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return gzip.compress(''.join(f'{line}\n' for line in lines).encode(), mtime=0)


# ---- rows of the bulk files

def stats(index, max_act=8., frac=.01):
    numbers = dict(maxActApprox=max_act, frac_nonzero=frac)
    return dict(modelId='m', layer='s', index=str(index), **numbers, pos_str=['a'], pos_values=[1.])


def label(index, text, model='gpt-4o-mini', **more):
    said = dict(description=text, explanationModelName=model, typeName='oai_token-act-pair', scores=[])
    return dict(modelId='m', layer='s', index=str(index), **said, **more)


def activation(index, peak=50, strength=8., n=100, word='w'):
    "A context of `n` tokens; every other one has a tenth of the strength"
    values = [strength if i == peak else strength/10*(i % 2) for i in range(n)]
    tokens = [f' {word}{i}' for i in range(n)]
    found = dict(tokens=tokens, values=values, maxValue=strength, maxValueTokenIndex=peak)
    return dict(modelId='m', layer='s', index=str(index), **found)
