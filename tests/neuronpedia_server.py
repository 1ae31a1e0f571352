"Neuronpedia on 127.0.0.1: its store and its API, from Python dicts, with faults on request"
import gzip, hashlib, json, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

CUT, SHORT, STALL = 'cut', 'short', 'stall' # half a file, as stored; half of what Content-Length says; no answer until the server ends


class Neuronpedia:
    "A server for `with`; `faults[path]` is an iterable, one item per request: `CUT`, `SHORT`, `STALL`, (status, headers) or None"
    def __init__(self, files=None, # key -> rows (dicts, or lines as they are)
                 features=None, # 'model/source/index' -> what the API says
                 faults=None, page:int=1000, headers=None):
        self.files = {key: gzip_lines(rows) for key, rows in (files or {}).items()}
        self.features, self.faults, self.page, self.headers = features or {}, {k: iter(v) for k, v in (faults or {}).items()}, page, headers or {}
        self.log, self.ended = [], threading.Event() # (path, headers, time) of each request

    def __enter__(self):
        owner = self
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self): owner.answer(self)
            def log_message(self, *args): pass
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        return self

    def __exit__(self, *args): self.ended.set(); self.server.shutdown(); self.server.server_close()

    def asked(self, kind='.jsonl.gz') -> list: # paths, without the listings
        return [path for path, *_ in self.log if kind in path]

    def answer(self, request):
        path, query = unquote(urlsplit(request.path).path)[1:], {k: v[0] for k, v in parse_qs(urlsplit(request.path).query).items()}
        self.log.append((path, dict(request.headers), time.monotonic()))
        fault = next(self.faults.get(path, iter(())), None)
        if fault == STALL: self.ended.wait(60); return
        if isinstance(fault, tuple): return send(request, fault[0], b'{"error": "as asked for"}', fault[1])
        if not path: return send(request, 200, self.listing(**query))
        if path.startswith('api/feature/'):
            found = self.features.get(path.removeprefix('api/feature/'))
            return send(request, 404 if found is None else 200, json.dumps(dict(error='Feature not found') if found is None else found).encode(), self.headers)
        if path not in self.files: return send(request, 404, b'<Error><Code>NoSuchKey</Code></Error>')
        body = self.files[path]
        half = body[:len(body)//2]
        send(request, 200, body if fault is None else half, length=len(body) if fault == SHORT else None)

    def listing(self, prefix='', delimiter=None, **query) -> bytes: # one page, as S3 gives it
        assert query['list-type'] == '2'
        keys = sorted(k for k in self.files if k.startswith(prefix))
        if delimiter: keys = sorted({prefix + k[len(prefix):].split(delimiter)[0] + delimiter for k in keys})
        start = int(query.get('continuation-token', 'page/+0')[6:]) # tokens hold characters that need quoting
        shown, more = keys[start:start+self.page], start+self.page < len(keys)
        item = lambda k: (f'<CommonPrefixes><Prefix>{escape(k)}</Prefix></CommonPrefixes>' if delimiter else
                          f'<Contents><Key>{escape(k)}</Key><ETag>&quot;{hashlib.md5(self.files[k]).hexdigest()}&quot;</ETag></Contents>')
        token = f'<NextContinuationToken>page/+{start+self.page}</NextContinuationToken>' if more else ''
        return (f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>{str(more).lower()}</IsTruncated>'
                f'{token}{"".join(map(item, shown))}</ListBucketResult>').encode()


def send(request, status, body, headers=None, length=None):
    request.send_response(status)
    for name, value in {**(headers or {}), 'Content-Length': str(len(body) if length is None else length)}.items(): request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)


def gzip_lines(rows) -> bytes:
    return gzip.compress(''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows).encode(), mtime=0)


def stats(index, max_act=8., frac=.01): return dict(modelId='m', layer='s', index=str(index), maxActApprox=max_act, frac_nonzero=frac, pos_str=['a'], pos_values=[1.])

def label(index, text, model='gpt-4o-mini', **more):
    return dict(modelId='m', layer='s', index=str(index), description=text, explanationModelName=model, typeName='oai_token-act-pair', scores=[], **more)

def activation(index, peak=50, strength=8., n=100, word='w'):
    return dict(modelId='m', layer='s', index=str(index), tokens=[f' {word}{i}' for i in range(n)], values=[strength if i==peak else strength/10*(i%2) for i in range(n)],
                maxValue=strength, maxValueTokenIndex=peak)
