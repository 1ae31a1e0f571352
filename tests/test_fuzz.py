"""Damaged input, five hundred seeded mutations of each kind: the right result, or one clear line that names the file; never a traceback, never another number

What cannot be noticed is left out: a flipped bit inside a weight, where no card holds the hash of the weights, is another weight.
"""
import csv, io, json, math, random, shutil
from dataclasses import asdict
import pandas as pd
import pytest
import torch
from helpers import PLACEHOLDER, tiny_model, tiny_sae, tiny_tokenizer
from saeexplainer.presets import load_preset

N = 500
CLEAR = (ValueError, RuntimeError, OSError)  # what the command shows as one line
LFS_POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 15\n'
ODD = (None, [], {}, '', 'x', '512', -1, 10**30, 1e308, [[]], {'a': None}, ['x'])  # values of a wrong type or size


def mutations(kind):
    "N random generators, the same in every session"
    return [random.Random(f'{kind} {i}') for i in range(N)]


def damaged(data:bytes, rng) -> bytes: # -> bytes that cannot be a complete file of their kind
    "Cut off, emptied, replaced by git's pointer, or begun with rubbish"
    way = rng.randrange(4)
    if way == 0: return data[:rng.randrange(1, len(data))]
    if way == 1: return b''
    if way == 2: return LFS_POINTER
    return bytes(rng.randrange(256) for _ in range(8)) + data[8:]


def altered(value:dict, rng, fields=None, odd=ODD) -> dict: # -> a copy
    "An object of which one field is missing or holds something odd"
    field = rng.choice(sorted(fields or value))
    if rng.random() < .3: return {k: v for k, v in value.items() if k != field}
    return value | {field: rng.choice(odd)}


class Unclear(Exception):
    "An error that is not one clear line"


def outcome(load, file=None):
    "What `load` returns, or None where it ends in one clear line, which holds the name of the damaged file if one is given"
    try:
        return load()
    except CLEAR as error:
        line = str(error)
    if not line.strip(): raise Unclear('an error without a word')
    if '\n' in line: raise Unclear(f'more than one line: {line!r}')
    if file and str(file) not in line: raise Unclear(f'{file} is not named: {line}')


def fuzz(kind, mutate, load, right):
    "Every mutation ends in the right result or in a clear line; a tenth of them at least is refused, or nothing was tried"
    wrong, refused = [], 0
    for i, rng in enumerate(mutations(kind)):
        what, file = mutate(rng)
        try:
            got = outcome(load, file)
        except Exception as error:
            wrong.append(f'{i}: {what}: {type(error).__name__}: {str(error)[:200]}')
            continue
        refused += got is None
        if got is not None and not right(got):
            wrong.append(f'{i}: {what}: another result')
    assert not wrong, f'{len(wrong)} of {N}:\n' + '\n'.join(wrong[:20])
    assert refused > N//10, f'only {refused} of {N} mutations were refused'


class Folder:
    "A folder of valid files, of which one is damaged at a time"
    def __init__(self, folder):
        self.folder = folder
        self.valid = {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.is_file()}

    def restore(self):
        for name, data in self.valid.items(): (self.folder/name).write_bytes(data)

    def damage(self, rng, fields=(), odd=None): # fields: {file: its JSON fields that are altered}
        "Damage one file's bytes, remove it, or alter a field of its JSON; returns what was done, and the file that an error must name"
        self.restore()
        name = rng.choice(sorted(self.valid))
        file = self.folder/name
        if name in fields and rng.random() < .7:
            value = altered(json.loads(self.valid[name]), rng, fields[name], odd or ODD)
            file.write_text(json.dumps(value), encoding='utf-8')
            return f'{name}: ' + ', '.join(f'{k}={value.get(k, "(none)")!r}'[:80] for k in json.loads(self.valid[name]) if value.get(k, 0) != json.loads(self.valid[name])[k]), None
        if rng.random() < .1:
            file.unlink()
            return f'no {name}', self.folder
        data = damaged(self.valid[name], rng)
        file.write_bytes(data)
        whole_folder = name in ('chat_template.jinja', 'tokenizer.json')  # transformers reads them; the line names the model
        return f'{name}: {len(data)} bytes, {data[:12]!r}', self.folder if whole_folder else file


def test_sae_folders(tmp_path):
    from saeexplainer.saes import FeatureReader
    folder = tiny_sae(tmp_path/'sae', architecture='standard', d_sae=64, card={'model_sha256': 'abc'})
    valid, resid = Folder(folder), torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    read = lambda: FeatureReader.load(folder).activations(resid, [3, 5])
    want = read()
    cfg = ['d_in', 'd_sae', 'metadata', 'architecture', 'dtype', 'normalize_activations', 'apply_b_dec_to_input', 'reshape_activations']
    fuzz('sae', lambda rng: valid.damage(rng, {'cfg.json': cfg, 'card.json': ['model_sha256']}), read, lambda got: torch.equal(got, want))


def test_model_folders(tmp_path):
    from saeexplainer.lm.models import load_model
    folder, tokenizer = tmp_path/'model', tiny_tokenizer()
    tiny_model(d=16, n_layers=1, vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    valid = Folder(folder)
    def logits():
        model, tok = load_model(str(folder), 'float32', 'cpu')
        return model(**tok('The cat sat', return_tensors='pt')).logits
    want = logits()
    fields = ['architectures', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'vocab_size', 'model_type', 'head_dim']
    fuzz('model', lambda rng: valid.damage(rng, {'config.json': fields}), logits, lambda got: torch.equal(got, want))


@pytest.fixture
def adapter(tmp_path):
    "Folder of a tiny explainer, and the reader of its SAE"
    from peft import LoraConfig, get_peft_model
    from saeexplainer.explainer import ExplainerCard, save_adapter
    from saeexplainer.lm.models import load_model
    from saeexplainer.saes import FeatureReader
    tokenizer = tiny_tokenizer()
    tiny_model(d=16, n_layers=2, vocab=len(tokenizer)).save_pretrained(tmp_path/'model')
    tokenizer.save_pretrained(tmp_path/'model')
    reader = FeatureReader.load(tiny_sae(tmp_path/'sae', d_in=16, d_sae=32))
    preset = load_preset('smollm2-135m', explainer=str(tmp_path/'model'), placeholder=PLACEHOLDER)
    torch.manual_seed(0)
    model = get_peft_model(load_model(preset.explainer, 'float32', 'cpu')[0], LoraConfig(r=8, lora_alpha=8, target_modules='all-linear', task_type='CAUSAL_LM', init_lora_weights=False))
    save_adapter(model, ExplainerCard.from_preset(preset, reader, 'sft'), tmp_path/'adapter')
    return tmp_path/'adapter', reader


def test_adapters(adapter):
    from saeexplainer.explainer import Explainer
    folder, reader = adapter
    valid, directions = Folder(folder), reader.directions([3, 5])
    say = lambda: Explainer.from_pretrained(folder, reader=reader, dtype='float32').explain(directions, max_new_tokens=5)
    want = say()
    fields = {'explainer.json': ['base_model', 'template', 'layer', 'd_model', 'sae_sha256', 'sae_layer', 'model_sha256', 'chat_template', 'versions'],
              'adapter_config.json': ['peft_type', 'target_modules', 'r', 'task_type']}
    fuzz('adapter', lambda rng: valid.damage(rng, fields), say, lambda got: got == want)


def feature_row(i, **changed):
    context = dict(source='s', tokens=['a', ' cat', ' sat'], values=[0., 3., 1.], peak=1)
    return dict(index=i, density=.1, max_act=3., status='ok', explanation=f'the word {i}', words=[f'w{i}'],
                explanations=[dict(text=f'the word {i}', model='m', type='t')], contexts=[context]) | changed


def same_numbers(got, want):
    "Features that are there are as they were; those of which a row was damaged may be missing"
    kept = {f.index: f for f in want}
    return all(f.index in kept and (math.isnan(f.max_act) or f.max_act == kept[f.index].max_act) and (math.isnan(f.density) or f.density == kept[f.index].density)
               and f.explanation in (kept[f.index].explanation, None) for f in got)


@pytest.mark.parametrize('name', ['features', 'labels'])
def test_tables(tmp_path, name):
    from saeexplainer.features import load_features, save_features
    rows = [feature_row(i) for i in range(8)]
    save_features(rows, tmp_path/'features.parquet', 'a/b')
    labels = pd.DataFrame([dict(index=i, text=f'the word {i}', model='mine', type='t') for i in range(8)])
    labels.to_parquet(tmp_path/'labels.parquet')
    preset = load_preset('smollm2-135m', source='a/b', features=str(tmp_path/'features.parquet'), label_model='mine', baseline_labels=())
    valid, want = Folder(tmp_path), load_features(preset)
    file, column = tmp_path/f'{name}.parquet', list(labels if name == 'labels' else rows[0])
    def mutate(rng):
        valid.restore()
        if rng.random() < .4:
            data = damaged(valid.valid[file.name], rng)
            file.write_bytes(data)
            return f'{len(data)} bytes, {data[:8]!r}', file
        frame = labels if name == 'labels' else pd.DataFrame(rows)
        field = rng.choice(column)
        odd = (None, 'x', []) if field in ('index', 'density', 'max_act') else (None, 5, 1.5, [], 'x\udc3d')  # not another number
        if rng.random() < .4:
            frame = frame.drop(columns=field)
        else:
            frame = frame.assign(**{field: pd.Series([rng.choice(odd)]*len(frame), dtype=object)})
        try: frame.to_parquet(file)
        except Exception: return 'cannot be written', None  # such a file does not exist
        return f'{field}: {list(frame.get(field, []))[:1]}', None
    fuzz(name, mutate, lambda: load_features(preset), lambda got: same_numbers(got, want))


TEXTS = {i: f'the word "{i}", as in\u2028"ä, b"' for i in (5, 8, 13, 21, 34)}
FRAME = pd.DataFrame(dict(feature=list(TEXTS), explanation=list(TEXTS.values())))


def as_csv(frame, rng):
    out = io.StringIO()
    frame.to_csv(out, index=False, quoting=csv.QUOTE_ALL, sep=rng.choice(',,;\t'), lineterminator=rng.choice(['\n', '\r\n']))
    return out.getvalue().encode(rng.choice(['utf-8', 'utf-8-sig'])), '.csv'


def as_lines(frame, rng):
    return ''.join(json.dumps(row, ensure_ascii=rng.random() < .5) + '\n' for row in frame.to_dict('records')).encode(), '.jsonl'


def as_parquet(frame, rng):
    out = io.BytesIO()
    frame.to_parquet(out)
    return out.getvalue(), '.parquet'


def test_explanations(tmp_path):
    from saeexplainer.dictionaries import read_explanations
    files = []
    def mutate(rng):
        frame = FRAME.sample(frac=rng.choice([.6, 1]), random_state=rng.randrange(9999))  # its index is not 0 to n-1
        if rng.random() < .3: frame = frame.rename(columns=str.title)
        if rng.random() < .3: frame = frame.rename(columns=lambda c: c + ' ')
        if rng.random() < .3: frame = frame.assign(note=5)
        if rng.random() < .2: frame = pd.concat([frame, frame[:1]])  # explained twice
        if rng.random() < .2: frame = frame.drop(columns=rng.choice(list(frame)))
        data, kind = rng.choice([as_csv, as_lines, as_parquet])(frame, rng)
        way = rng.random()
        if way < .3: data = damaged(data, rng)
        elif way < .4 and kind != '.parquet': data += b'\n\n'
        elif way < .5 and kind == '.csv': data = data.replace(b'"', b'')  # bare commas
        files[:] = [tmp_path/f'mine{kind}']
        files[0].write_bytes(data)
        return f'{kind} {data[:120]!r}', files[0]
    def right(got):
        return all(text is None or text.replace('"', '') == TEXTS[int(f)].replace('"', '') for f, text in zip(got['feature'], got['explanation']))
    fuzz('explanations', mutate, lambda: read_explanations(files[0]), right)


def test_presets(tmp_path):
    file = tmp_path/'mine.yaml'
    valid = dict(base='smollm2-135m', n_sft=8, sft_lr=1e-3, dpo_lr=[1e-5, 1e-6], placeholder='<repo_name>', template='Say {placeholder}.', writer='local', layer=9,
                 steering_kl=[.25], prices={'m': [1., 2.]})
    file.write_text(json.dumps(valid), encoding='utf-8')
    want = asdict(load_preset(file))
    touched = []
    def mutate(rng):
        touched[:] = list(valid)
        data = json.dumps(valid).encode()
        if rng.random() < .4:
            data = damaged(data, rng)
        else:
            fields = rng.sample(sorted(valid), 2)
            touched[:] = fields
            data = json.dumps(altered(altered(valid, rng, fields[:1]), rng, fields[1:])).encode()
        file.write_bytes(data)
        return data[:200], None
    def right(got):
        if 'base' in touched: return True  # another preset to start from
        return all(value == want[name] for name, value in asdict(got).items() if name not in touched)
    fuzz('preset', mutate, lambda: load_preset(file), right)


def altered_within(value, rng):
    "A copy of nested JSON of which one value, at any depth, is missing or something odd"
    if isinstance(value, dict) and value:
        field = rng.choice(sorted(value))
        if rng.random() < .4: return altered(value, rng, [field])
        return value | {field: altered_within(value[field], rng)}
    if isinstance(value, list) and value:
        return [altered_within(value[0], rng), *value[1:]]
    return rng.choice(ODD)


def test_server_replies(tmp_path, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-a-key-of-this-test')
    from saeexplainer.replies import Request
    from saeexplainer.store import RunStore
    from saeexplainer.writers.openai import OpenAIWriter
    from writer_server import Server, completion
    bodies, store, asked = [], RunStore(tmp_path/'store.sqlite'), iter(range(N))
    with Server(lambda *_: (200, bodies[0], {})) as server:
        writer = OpenAIWriter('m', base_url=server.url, store=store, prices={'m': (1., 10.)}, pause=.001, patience=.05, tries=1, timeout=5)
        def mutate(rng):
            valid = completion(f'a text about rain {rng.random()}')
            body = altered_within(valid, rng) if rng.random() < .8 else damaged(json.dumps(valid).encode(), rng)
            bodies[:] = [body]
            return str(body)[:300]
        def right(reply):
            if reply.outcome != 'ok': return not reply.text
            content = bodies[0]['choices'][0]['message']['content']
            return reply.text == (content if isinstance(content, str) else None)
        def ask():
            return writer.write([Request(f'question {next(asked)}', max_tokens=50)])[0]
        wrong = []
        for i, rng in enumerate(mutations('reply')):
            what = mutate(rng)
            try:
                reply = outcome(ask)
                if reply is not None and not right(reply): wrong.append(f'{i}: {what}: {reply}')
            except Exception as error: wrong.append(f'{i}: {what}: {type(error).__name__}: {str(error)[:120]}')
    assert not wrong, f'{len(wrong)} of {N}:\n' + '\n'.join(wrong[:20])
    assert store.table('attempts')['outcome'].notna().all()
    assert all(x >= 0 for x in store.spent((1., 10.)))
