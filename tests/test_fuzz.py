"""Damaged input, five hundred seeded mutations of each kind

Each ends in the right result, or in one clear line that names the file; never in a traceback, never in another number.
What cannot be noticed is left out: a flipped bit inside a weight, where no card holds the hash of the weights, is
another weight.
"""
import csv
import functools
import io
import json
import math
import random
import ssl
from dataclasses import asdict
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from helpers import PLACEHOLDER, tiny_model, tiny_sae, tiny_tokenizer
from saeexplainer.explanation_files import read_explanations
from saeexplainer.explainer import Explainer, ExplainerCard, save_adapter
from saeexplainer.features import load_features, save_features
from saeexplainer.lm.models import load_model
from saeexplainer.presets import AS_PAPER, load_preset
from saeexplainer.replies import Request
from saeexplainer.saes import FeatureReader
from saeexplainer.store import RunStore
from saeexplainer.writers.openai import OpenAIWriter
from writer_server import Server, completion

N = 500
CLEAR = (ValueError, RuntimeError, OSError)  # what the command shows as one line
LFS_POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 15\n'
ODD = (None, [], {}, '', 'x', '512', -1, 10**30, 1e308, [[]], {'a': None}, ['x'])  # values of a wrong type or size


# ---- mutations

def damaged(data:bytes, rng) -> bytes: # -> bytes that cannot be a complete file of their kind
    "Cut off, emptied, replaced by git's pointer, or begun with rubbish"
    way = rng.randrange(4)
    if way == 0: return data[:rng.randrange(1, len(data))]
    if way == 1: return b''
    if way == 2: return LFS_POINTER
    return bytes(rng.randrange(256) for _ in range(8)) + data[8:]


def altered(value:dict, rng, fields=None) -> dict: # -> a copy
    "An object of which one field is missing or holds something odd"
    field = rng.choice(sorted(fields or value))
    if rng.random() < .3: return {k: v for k, v in value.items() if k != field}
    return value | {field: rng.choice(ODD)}


def altered_within(value, rng):
    "A copy of nested JSON of which one value, at any depth, is missing or something odd"
    if isinstance(value, dict) and value:
        field = rng.choice(sorted(value))
        if rng.random() < .4: return altered(value, rng, [field])
        return value | {field: altered_within(value[field], rng)}
    if isinstance(value, list) and value:
        return [altered_within(value[0], rng), *value[1:]]
    return rng.choice(ODD)


def difference(old:dict, new:dict) -> str:
    "The fields of `old` that `new` has otherwise"
    return ', '.join(f'{k}={new.get(k, "(none)")!r}'[:80] for k in old if new.get(k, 0) != old[k])


class Folder:
    "A folder of valid files, of which one is damaged at a time"
    def __init__(self, folder, fields=()): # fields: {file: its JSON fields that are altered}
        self.folder = folder
        self.fields = dict(fields)
        self.valid = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}

    def restore(self):
        for name, data in self.valid.items(): (self.folder/name).write_bytes(data)

    def damage(self, rng) -> tuple: # -> what was done, the file that an error must name
        "Damage one file's bytes, remove it, or alter a field of its JSON"
        self.restore()
        name = rng.choice(sorted(self.valid))
        if name in self.fields and rng.random() < .7: return self.alter(name, rng), None
        if rng.random() >= .1: return self.damage_bytes(name, rng)
        (self.folder/name).unlink()
        return f'no {name}', self.folder

    def alter(self, name, rng) -> str:
        old = json.loads(self.valid[name])
        new = altered(old, rng, self.fields[name])
        (self.folder/name).write_text(json.dumps(new), encoding='utf-8')
        return f'{name}: {difference(old, new)}'

    def damage_bytes(self, name, rng) -> tuple:
        data = damaged(self.valid[name], rng)
        (self.folder/name).write_bytes(data)
        whole_folder = name in ('chat_template.jinja', 'tokenizer.json')  # transformers reads them; the model is named
        return f'{name}: {len(data)} bytes, {data[:12]!r}', self.folder if whole_folder else self.folder/name


# ---- what becomes of them

class Unclear(Exception):
    "An error that is not one clear line"


def outcome(load, file=None):
    "The result of `load`; None where it ends in one clear line, which holds the name of the damaged file if given"
    try:
        return load()
    except CLEAR as error:
        line = str(error)
    if not line.strip(): raise Unclear('an error without a word')
    if '\n' in line: raise Unclear(f'more than one line: {line!r}')
    if file and str(file) not in line: raise Unclear(f'{file} is not named: {line}')


def refusals(kind, mutate, load, right) -> int:
    "Try N mutations, the same in every session, of which none may end otherwise; how many were refused"
    wrong = []
    refused = 0
    for i in range(N):
        what, file = mutate(random.Random(f'{kind} {i}'))
        try:
            got = outcome(load, file)
        except Exception as error:
            wrong.append(f'{i}: {what}: {type(error).__name__}: {str(error)[:200]}')
            continue
        if got is None: refused += 1
        elif not right(got): wrong.append(f'{i}: {what}: another result: {str(got)[:200]}')
    assert not wrong, f'{len(wrong)} of {N}:\n' + '\n'.join(wrong[:20])
    return refused


def fuzz(kind, mutate, load, right):
    "Every mutation ends in the right result or in a clear line; a tenth at least is refused, or nothing was tried"
    refused = refusals(kind, mutate, load, right)
    assert refused > N//10, f'only {refused} of {N} mutations were refused'


# ---- SAEs, models, adapters

SAE_FIELDS = {
    'cfg.json': ['d_in', 'd_sae', 'metadata', 'architecture', 'dtype', 'normalize_activations', 'apply_b_dec_to_input',
                 'reshape_activations'],
    'card.json': ['model_sha256']}
MODEL_FIELDS = {
    'config.json': ['architectures', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
                    'num_key_value_heads', 'vocab_size', 'model_type', 'head_dim']}
ADAPTER_FIELDS = {
    'explainer.json': ['base_model', 'template', 'layer', 'd_model', 'sae_sha256', 'sae_layer', 'model_sha256',
                       'chat_template', 'versions'],
    'adapter_config.json': ['peft_type', 'target_modules', 'r', 'task_type']}


def save_tiny(folder, n_layers):
    "A tiny model with its tokenizer, in `folder`"
    tokenizer = tiny_tokenizer()
    tiny_model(d=16, n_layers=n_layers, vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_sae_folders(tmp_path):
    folder = tiny_sae(tmp_path/'sae', architecture='standard', d_sae=64, card={'model_sha256': 'abc'})
    resid = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    def read(): return FeatureReader.load(folder).activations(resid, [3, 5])
    want = read()
    fuzz('sae', Folder(folder, SAE_FIELDS).damage, read, lambda got: torch.equal(got, want))


def test_model_folders(tmp_path):
    folder = save_tiny(tmp_path/'model', n_layers=1)
    def logits():
        model, tokenizer = load_model(str(folder), 'float32', 'cpu')
        return model(**tokenizer('The cat sat', return_tensors='pt')).logits
    want = logits()
    fuzz('model', Folder(folder, MODEL_FIELDS).damage, logits, lambda got: torch.equal(got, want))


@pytest.fixture
def reader(tmp_path): return FeatureReader.load(tiny_sae(tmp_path/'sae', d_in=16, d_sae=32))


@pytest.fixture
def adapter(tmp_path, reader):
    "Folder of a tiny explainer"
    base = save_tiny(tmp_path/'model', n_layers=2)
    preset = load_preset('smollm2-135m', **AS_PAPER, explainer=str(base), placeholder=PLACEHOLDER)
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=8, target_modules='all-linear', task_type='CAUSAL_LM', init_lora_weights=False)
    model = get_peft_model(load_model(preset.explainer, 'float32', 'cpu')[0], lora)
    save_adapter(model, ExplainerCard.from_preset(preset, reader, 'sft'), tmp_path/'adapter')
    return tmp_path/'adapter'


def test_adapters(adapter, reader):
    directions = reader.directions([3, 5])
    def explain():
        explainer = Explainer.from_pretrained(adapter, reader=reader, dtype='float32')
        return explainer.explain(directions, max_new_tokens=5)
    want = explain()
    fuzz('adapter', Folder(adapter, ADAPTER_FIELDS).damage, explain, lambda got: got == want)


# ---- tables of features and of labels

NUMBERS = ('index', 'density', 'max_act')


def feature_row(index):
    context = dict(source='s', tokens=['a', ' cat', ' sat'], values=[0., 3., 1.], peak=1)
    text = f'the word {index}'
    return dict(index=index, density=.1, max_act=3., status='ok', explanation=text, words=[f'w{index}'],
                explanations=[dict(text=text, model='m', type='t')], contexts=[context])


ROWS = [feature_row(i) for i in range(8)]
LABELS = pd.DataFrame([dict(index=i, text=f'the word {i}', model='mine', type='t') for i in range(8)])


def with_odd_column(frame, rng) -> tuple: # -> frame, name of the column
    "A table that lacks a column or has something odd in all of it, but no other number"
    column = rng.choice(list(frame))
    if rng.random() < .4: return frame.drop(columns=column), column
    odd = (None, 'x', []) if column in NUMBERS else (None, 5, 1.5, [], 'x\udc3d')
    return frame.assign(**{column: pd.Series([rng.choice(odd)]*len(frame), dtype=object)}), column


def is_number_of(value, want): return math.isnan(value) or value == want


def is_feature_of(feature, want): # feature: as it is read from a damaged table
    return (is_number_of(feature.max_act, want.max_act) and is_number_of(feature.density, want.density)
            and feature.explanation in (want.explanation, None))


def same_numbers(got, want):
    "Features that are there are as they were; those of which a row was damaged may be missing"
    kept = {feature.index: feature for feature in want}
    return all(feature.index in kept and is_feature_of(feature, kept[feature.index]) for feature in got)


@pytest.mark.parametrize('name', ['features', 'labels'])
def test_tables(tmp_path, name):
    save_features(ROWS, tmp_path/'features.parquet', 'a/b')
    LABELS.to_parquet(tmp_path/'labels.parquet')
    preset = load_preset('smollm2-135m', source='a/b', features=str(tmp_path/'features.parquet'), label_model='mine',
                         baseline_labels=())
    want = load_features(preset)
    valid = Folder(tmp_path)
    frame = LABELS if name == 'labels' else pd.DataFrame(ROWS)
    file = tmp_path/f'{name}.parquet'
    def mutate(rng):
        valid.restore()
        if rng.random() < .4: return valid.damage_bytes(file.name, rng)
        odd, column = with_odd_column(frame, rng)
        try:
            odd.to_parquet(file)
        except Exception:
            return 'cannot be written', None  # such a file does not exist
        return f'{column}: {list(odd.get(column, []))[:1]}', None
    fuzz(name, mutate, lambda: load_features(preset), lambda got: same_numbers(got, want))


# ---- explanations in files

TEXTS = {i: f'the word "{i}", as in\u2028"ä, b"' for i in (5, 8, 13, 21, 34)}
FRAME = pd.DataFrame(dict(feature=list(TEXTS), explanation=list(TEXTS.values())))


def as_csv(frame, rng):
    out = io.StringIO()
    separator = rng.choice(',,;\t')
    frame.to_csv(out, index=False, quoting=csv.QUOTE_ALL, sep=separator, lineterminator=rng.choice(['\n', '\r\n']))
    return out.getvalue().encode(rng.choice(['utf-8', 'utf-8-sig'])), '.csv'


def as_lines(frame, rng):
    lines = [json.dumps(row, ensure_ascii=rng.random() < .5) for row in frame.to_dict('records')]
    return ''.join(f'{line}\n' for line in lines).encode(), '.jsonl'


def as_parquet(frame, rng):
    out = io.BytesIO()
    frame.to_parquet(out)
    return out.getvalue(), '.parquet'


def odd_frame(rng):
    "Explanations in a table as people have it: some of them, or other columns"
    frame = FRAME.sample(frac=rng.choice([.6, 1]), random_state=rng.randrange(9999))  # its index is not 0 to n-1
    if rng.random() < .3: frame = frame.rename(columns=str.title)
    if rng.random() < .3: frame = frame.rename(columns=lambda c: c + ' ')
    if rng.random() < .3: frame = frame.assign(note=5)
    if rng.random() < .2: frame = pd.concat([frame, frame[:1]])  # explained twice
    if rng.random() < .2: frame = frame.drop(columns=rng.choice(list(frame)))
    return frame


def odd_bytes(data, kind, rng):
    "The bytes of a file of that kind: damaged, or written in another way, or as they are"
    way = rng.random()
    if way < .3: return damaged(data, rng)
    if way < .4 and kind != '.parquet': return data + b'\n\n'
    if .4 <= way < .5 and kind == '.csv': return data.replace(b'"', b'')  # bare commas
    return data


def is_text_of(text, feature):
    return text is None or text.replace('"', '') == TEXTS[int(feature)].replace('"', '')


def test_explanations(tmp_path):
    written = []
    def mutate(rng):
        data, kind = rng.choice([as_csv, as_lines, as_parquet])(odd_frame(rng), rng)
        data = odd_bytes(data, kind, rng)
        written[:] = [tmp_path/f'mine{kind}']
        written[0].write_bytes(data)
        return f'{kind} {data[:120]!r}', written[0]
    def right(got): return all(is_text_of(text, feature) for feature, text in zip(got['feature'], got['explanation']))
    fuzz('explanations', mutate, lambda: read_explanations(written[0]), right)


# ---- presets

PRESET = dict(base='smollm2-135m', n_sft=8, sft_lr=1e-3, dpo_lr=[1e-5, 1e-6], placeholder='<repo_name>',
              template='Say {placeholder}.', n_hints=0, writer='local', layer=9, steering_kl=[.25],
              prices={'m': [1., 2.]})


class PresetFile:
    "A preset of which the bytes or two fields are damaged at a time"
    def __init__(self, folder):
        self.file = folder/'mine.yaml'
        self.file.write_text(json.dumps(PRESET), encoding='utf-8')
        self.want = asdict(self.load())
        self.touched = ()

    def load(self): return load_preset(self.file)

    def damage(self, rng):
        if rng.random() < .4:
            self.touched = list(PRESET)
            data = damaged(json.dumps(PRESET).encode(), rng)
        else:
            self.touched = rng.sample(sorted(PRESET), 2)
            first, second = self.touched
            data = json.dumps(altered(altered(PRESET, rng, [first]), rng, [second])).encode()
        self.file.write_bytes(data)
        return data[:200], None

    def right(self, got):
        if 'base' in self.touched: return True  # another preset to start from
        return all(value == self.want[name] for name, value in asdict(got).items() if name not in self.touched)


def test_presets(tmp_path):
    preset = PresetFile(tmp_path)
    fuzz('preset', preset.damage, preset.load, preset.right)


# ---- replies of servers

class OddReplies:
    "The body of one reply after the other, and whether a writer makes of it what it should"
    body = None # of the reply that comes next

    def answer(self, *_): return 200, self.body, {}

    def mutate(self, rng):
        valid = completion(f'a text about rain {rng.random()}')
        odd = rng.random() < .8
        self.body = altered_within(valid, rng) if odd else damaged(json.dumps(valid).encode(), rng)
        return str(self.body)[:300], None

    def right(self, reply):
        if reply.outcome != 'ok': return not reply.text
        content = self.body['choices'][0]['message']['content']
        return reply.text == (content if isinstance(content, str) else None)


@pytest.fixture
def one_ssl_context(monkeypatch):
    "Certificates are read once, not for each client: on loopback that takes longer than all else"
    monkeypatch.setattr(ssl, 'create_default_context', functools.cache(ssl.create_default_context))


@pytest.mark.usefixtures('one_ssl_context')
def test_server_replies(tmp_path, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-a-key-of-this-test')
    store = RunStore(tmp_path/'store.sqlite')
    number = iter(range(N))
    replies = OddReplies()
    with Server(replies.answer) as server:
        writer = OpenAIWriter('m', base_url=server.url, store=store, prices={'m': (1., 10.)}, pause=.001, patience=.05,
                              tries=1, timeout=5)
        def ask(): return writer.write([Request(f'question {next(number)}', max_tokens=50)])[0]
        refusals('reply', replies.mutate, ask, replies.right)
    assert store.table('attempts')['outcome'].notna().all()
    assert all(spent >= 0 for spent in store.spent((1., 10.)))
    store.close()
