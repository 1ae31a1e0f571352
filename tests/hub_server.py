"The Hugging Face hub on 127.0.0.1, as far as an upload speaks with it"
import base64, json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import huggingface_hub


class Hub:
    "A hub for `with`, which `HfApi()` asks meanwhile"
    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.files = {} # path -> what was uploaded
        self.created = None # what the repository was to be
        self.paths = [] # that were asked

    def __enter__(self):
        hub = self
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_POST(self):
                body = self.rfile.read(int(self.headers['Content-Length']))
                reply = hub.reply(self.path, body)
                if reply is None: return self.send_error(404)
                send_json(self, reply)
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        plain = huggingface_hub.HfApi
        self.monkeypatch.setattr(huggingface_hub, 'HfApi', lambda: plain(endpoint=self.url, token='hf_test'))
        self.monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def reply(self, path, body): # None: there is no such path
        self.paths.append(path)
        if path.endswith('/repos/create'):
            asked = json.loads(body)
            self.created = {name: asked.get(name) for name in ('type', 'name', 'organization')}
            return dict(url='http://127.0.0.1/me/mine', name='me/mine', id='1')
        if path.endswith('/validate-yaml'): return dict(errors=[], warnings=[])
        if '/preupload/' in path:
            paths = [file['path'] for file in json.loads(body)['files']]
            return dict(files=[dict(path=name, uploadMode='regular', shouldIgnore=False) for name in paths])
        if '/commit/' in path:
            self.keep(body.decode().splitlines())
            return dict(success=True, commitOid='0'*40, commitUrl='http://127.0.0.1/me/mine/commit/0',
                        hookOutput='', pullRequestUrl=None)
        return None

    def keep(self, lines): # of a commit
        for line in map(json.loads, lines):
            if line['key'] != 'file': continue
            file = line['value']
            self.files[file['path']] = base64.b64decode(file['content'])


def send_json(request, reply):
    body = json.dumps(reply).encode()
    request.send_response(200)
    request.send_header('Content-Type', 'application/json')
    request.send_header('Content-Length', str(len(body)))
    request.end_headers()
    request.wfile.write(body)
