"One pass over a corpus: against a brute-force computation, killed and resumed, in bounded memory; corpora; words and labels"
import json, os, signal, subprocess, sys, time, tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd
import pytest, torch
from helpers import SENTENCES, tiny_model, tiny_sae, tiny_tokenizer
from saeexplainer.sources import reading as R
from saeexplainer.features import Context
from saeexplainer.presets import load_preset
from saeexplainer.sources.reading import CorpusReading, add_document, build_features, contexts_of, corpus_documents, document_windows, feature_table, load_reading, read_corpus, reading_settings, state_bytes, token_strings, word_at, word_before, word_label
from saeexplainer.saes import FeatureReader
from saeexplainer.lm.hooks import residual_stream
from saeexplainer.target import Target

FILES = Path(__file__).parent
DOCS = [(f's{i % 3}', ' '.join(SENTENCES[(i+j) % len(SENTENCES)] for j in range(1 + i % 4))) for i in range(14)] + [('s1', 'Too short.'), ('s2', 'x' * 700)]


def make_target(folder, arch='llama', architecture='jumprelu', d_sae=64, seed=0, **sae):
    return Target(tiny_model(arch, n_layers=3), tiny_tokenizer(), FeatureReader.load(tiny_sae(folder, architecture, layer=1, d_sae=d_sae, seed=seed, **sae)))


@pytest.fixture(scope='module')
def target(tmp_path_factory): return make_target(tmp_path_factory.mktemp('sae'))


def brute_force(target, docs, n, window, first): # per feature: fired, [(value, document, context tokens, context values, peak)]
    acts, ids = [], []
    for _, text in docs:
        windows = document_windows(target.tokenizer(text, add_special_tokens=False)['input_ids'], window)
        rows = [target.reader.encode(residual_stream(target.model, x := torch.tensor([[*first, *w]]), torch.ones_like(x), 1, target.reader.hook))[0, len(first):] for w in windows]
        acts.append(torch.cat(rows).numpy() if rows else np.zeros((0, target.reader.n_features))); ids.append(sum(windows, []))
    out = []
    for f in range(target.reader.n_features):
        found = []
        for d, (a, i) in enumerate(zip(acts, ids)):
            if not len(a) or a[:, f].max() <= 0: continue
            peak = int(a[:, f].argmax())
            part = slice(start := max(0, min(peak-20, len(a)-32)), start+32)
            found.append((a[peak, f], d, i[part], a[part, f], peak-start))
        out.append((sum(int((a[:, f] != 0).sum()) for a in acts), sorted(found, key=lambda x: (-x[0], x[1]))[:n]))
    return out, sum(map(len, ids))


KINDS = [dict(), dict(architecture='standard'), dict(architecture='gated'), dict(architecture='topk', k=4), dict(architecture='abstopk', k=4),
         dict(architecture='topk', k=4, rescale_acts_by_decoder_norm=True), dict(hook='resid_pre'), dict(arch='gemma2'), dict(arch='gpt2', metadata={'prepend_bos': False})]

@pytest.mark.parametrize('kind', KINDS, ids=lambda k: ' '.join(map(str, k.values())))
def test_equals_brute_force(kind, tmp_path):
    target = make_target(tmp_path, **kind)
    wanted, n_tokens = brute_force(target, DOCS, 5, 30, [1] if target.bos else [])
    reading = read_corpus(target, DOCS, tmp_path/'state.npz', n_top=5, window=30, batch_tokens=800, progress=False)
    names, compared = list(reading.sources), 0
    assert (reading.documents, reading.n_tokens) == (len(DOCS), n_tokens) == (16, sum(n for _, n in reading.sources.values()))
    for f, (fired, top) in enumerate(wanted):
        assert abs(int(reading.fired[f]) - fired) <= 1 # a value at the threshold may fall on either side
        got = contexts_of(reading, f, range(10**6))
        assert np.allclose([c.values[c.peak] for c in got], [t[0] for t in top], atol=1e-4)
        for c, (value, d, ids, values, peak) in zip(got, top):
            if sum(abs(value - t[0]) < 1e-3 for t in top) > 1: continue # near ties may change places
            compared += 1
            assert (c.source, list(c.tokens), c.peak) == (DOCS[d][0], ids, peak) and np.allclose(c.values, values, atol=.01)
    assert compared > 100


def test_a_document_longer_than_a_batch(target, tmp_path):
    "It is encoded in parts, and still counts as one"
    wanted, n_tokens = brute_force(target, DOCS, 5, 30, [1])
    reading = read_corpus(target, DOCS, tmp_path/'state.npz', n_top=5, window=30, batch_tokens=100, progress=False)
    assert max(len(target.tokenizer(text)['input_ids']) for _, text in DOCS) > 300 and (reading.documents, reading.n_tokens) == (len(DOCS), n_tokens)
    for f, (fired, top) in enumerate(wanted):
        assert abs(int(reading.fired[f]) - fired) <= 1
        got = contexts_of(reading, f, range(10**6))
        assert np.allclose([c.values[c.peak] for c in got], [t[0] for t in top], atol=1e-4)
        kept = reading.document[f][reading.value[f] > 0]
        assert len(set(kept)) == len(kept)


def test_a_tokenizer_without_bos(tmp_path):
    target = make_target(tmp_path)
    target.tokenizer.bos_token = None
    wanted, n_tokens = brute_force(target, DOCS, 3, 30, [])
    reading = read_corpus(target, DOCS, tmp_path/'state.npz', n_top=3, window=30, progress=False)
    assert reading.n_tokens == n_tokens and reading.settings['bos'] is None
    assert np.allclose(reading.max_act, [top[0][0] if top else 0 for _, top in wanted], atol=1e-4)


def test_contexts_cross_windows_and_stay_in_their_document(target, tmp_path):
    reading = read_corpus(target, DOCS, tmp_path/'state.npz', n_top=3, window=16, progress=False)
    contexts = [c for f in range(64) for c in contexts_of(reading, f, token_strings(target.tokenizer))]
    assert max(len(c.tokens) for c in contexts)==32 and all(any(str(c) in text for _, text in DOCS) for c in contexts)


def test_equal_peaks_keep_the_earlier_document():
    reading = CorpusReading.empty(dict(n_features=1, n_top=2))
    for d, (value, at) in enumerate([(2., 0), (1., 3), (1., 1), (2., 2), (2., 4)]):
        acts = torch.zeros(20, 1); acts[at:at+2] = value
        reading.documents = d
        add_document(reading, acts, np.arange(20), f'd{d}')
    assert [(c.source, c.peak, c.values[c.peak]) for c in contexts_of(reading, 0, range(20))] == [('d0', 0, 2.), ('d3', 2, 2.)]


def same(a, b): # bit by bit
    for k, v in vars(a).items(): assert np.array_equal(v, vars(b)[k]) if isinstance(v, (np.ndarray, torch.Tensor)) else v==vars(b)[k], k


PASS = '''
import sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_reading import DOCS, make_target
from saeexplainer.sources import reading as R
def slow():
    for i, doc in enumerate(DOCS * 3):
        if i: time.sleep(.05)
        yield doc
R.read_corpus(make_target(Path({folder!r})/'sae'), slow(), Path({folder!r})/'state.npz', n_top=5, window=30, batch_tokens=150, save_every=0, progress=False)
'''

def test_killed_and_run_again_gives_the_same_bits(tmp_path):
    def start(folder): return subprocess.Popen([sys.executable, '-c', PASS.format(tests=str(FILES), folder=str(folder))], env={**os.environ, 'OMP_NUM_THREADS': '1'})
    target = make_target(tmp_path/'other')
    first, state = start(tmp_path), tmp_path/'state.npz'
    while not state.exists() and first.poll() is None: time.sleep(.01)
    time.sleep(.3)
    first.send_signal(signal.SIGKILL); first.wait()
    half = load_reading(state, {})
    assert not half.finished and 0 < half.documents < 3*len(DOCS)
    assert start(tmp_path).wait() == 0
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    try: whole = read_corpus(target, DOCS*3, tmp_path/'whole.npz', n_top=5, window=30, batch_tokens=150, progress=False)
    finally: torch.set_num_threads(threads)
    same(load_reading(state, {}), whole)


def test_a_finished_pass_reads_nothing(target, tmp_path):
    done = read_corpus(target, DOCS, tmp_path/'state.npz', progress=False)
    same(read_corpus(target, iter(()), tmp_path/'state.npz', progress=False), done)


def test_the_state_of_something_else_is_refused(target, tmp_path):
    read_corpus(target, DOCS, tmp_path/'state.npz', progress=False)
    with pytest.raises(ValueError, match='state.npz was read with sae .*delete it to read anew'):
        read_corpus(make_target(tmp_path/'other', seed=1), DOCS, tmp_path/'state.npz', progress=False)
    with pytest.raises(ValueError, match='was read with window 127, now it is 64'): read_corpus(target, DOCS, tmp_path/'state.npz', window=64, progress=False)
    with pytest.raises(ValueError, match='was read with tokens None, now it is 10'): read_corpus(target, DOCS, tmp_path/'state.npz', tokens=10, progress=False)
    (tmp_path/'broken.npz').write_bytes(b'PK')
    with pytest.raises(ValueError, match='is not the state of a reading .*delete it'): read_corpus(target, DOCS, tmp_path/'broken.npz', progress=False)


def test_another_corpus_is_refused(target, tmp_path):
    def stopped(docs, n):
        yield from docs[:n]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): read_corpus(target, stopped(DOCS, 9), tmp_path/'state.npz', batch_tokens=100, save_every=0, progress=False)
    for other in (DOCS[1:], DOCS[:2]):
        with pytest.raises(ValueError, match='documents of this corpus are not those that were read before'):
            read_corpus(target, other, tmp_path/'state.npz', batch_tokens=100, progress=False)
    assert read_corpus(target, DOCS, tmp_path/'state.npz', batch_tokens=100, progress=False).documents == len(DOCS)


def test_tokens_end_the_pass_with_a_document(target, tmp_path):
    whole = read_corpus(target, DOCS, tmp_path/'whole.npz', progress=False)
    part = read_corpus(target, DOCS, tmp_path/'part.npz', tokens=200, batch_tokens=10**4, progress=False)
    sizes = np.cumsum([sum(map(len, document_windows(target.tokenizer(text)['input_ids']))) for _, text in DOCS])
    assert part.n_tokens == sizes[sizes >= 200][0] < whole.n_tokens


def test_nothing_to_read(target, tmp_path):
    for docs in ([], [('s', 'Hi.')]):
        with pytest.raises(ValueError, match=r'the corpus has no document of 16 tokens or more'): read_corpus(target, docs, tmp_path/'state.npz', progress=False)


def test_memory_is_what_the_formula_says(target, tmp_path, monkeypatch):
    sizes, encode = [], target.reader.encode
    monkeypatch.setattr(target.reader, 'encode', lambda x: (sizes.append(len(x)), encode(x))[1])
    def peak(n): # of what numpy and Python allocate
        tracemalloc.start()
        reading = read_corpus(target, (DOCS[i % 14] for i in range(n)), tmp_path/f'{n}.npz', n_top=8, batch_tokens=300, progress=False)
        used = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
        assert sum(a.nbytes for a in vars(reading).values() if isinstance(a, np.ndarray)) == state_bytes(64, 8)
        return used
    peak(14)
    short, long = peak(50), peak(500)
    assert long < short + state_bytes(64, 8)/4 and max(sizes) <= 300 # ten times the text, no more memory
    assert read_corpus(target, DOCS, tmp_path/'longest.npz', batch_tokens=1, progress=False).documents == len(DOCS) # a long document is a batch of its own


def test_default_batches_hold_half_a_gigabyte_of_activations(target):
    wide = replace_features(target.reader, 131_072)
    assert reading_settings(target)['batch_tokens'] == target.max_tokens == 4096
    assert reading_settings(Target(target.model, target.tokenizer, wide))['batch_tokens'] == 1024


def replace_features(reader, n): # a reader that says it has n features
    other = FeatureReader(reader.sae, reader.card, reader.sha256); other.n_features = n
    return other


def test_table_marks_and_keeps_every_feature(target, tmp_path):
    reading = read_corpus(target, DOCS, tmp_path/'state.npz', progress=False)
    table = pd.DataFrame(feature_table(reading, target.tokenizer, dense=.2, n_contexts=3, progress=False))
    assert list(table) == ['index', 'density', 'max_act', 'status', 'explanation', 'words', 'explanations', 'contexts']
    assert len(table) == 64 and set(table.status) <= {'ok', 'dead', 'dense', 'unlabelled'} and max(map(len, table.contexts)) == 3
    assert (table.status[table.density > .2] == 'dense').all() and table.explanation[table.status != 'ok'].isna().all()
    for r in table.itertuples():
        assert r.explanations == ([dict(text=r.explanation, model='peak words', type='words')] if r.status=='ok' else [])
        assert (r.status=='dead') == (r.density==0) and (not r.contexts or abs(r.contexts[0]['values'][r.contexts[0]['peak']] - r.max_act) < 1e-2)


def test_activations_beyond_fp16_stay_finite():
    reading = CorpusReading.empty(dict(n_features=1, n_top=2))
    acts = torch.zeros(20, 1); acts[4], acts[5] = 1e6, 9e4
    add_document(reading, acts, np.full(20, 3), 'd')
    reading.fired, reading.n_tokens = np.array([2]), 1000
    c = contexts_of(reading, 0, ['x']*10)[0]
    assert c.values[4] == reading.max_act[0] == 1e6 and c.values[5] == 65504
    assert np.isfinite(next(feature_table(reading, tiny_tokenizer(), progress=False))['contexts'][0]['values']).all()


def test_text_files(tmp_path):
    for name, text in (('b.txt', 'second'), ('a.md', 'first'), ('sub/c.txt', 'third'), ('no.py', 'x = 1')):
        (tmp_path/name).parent.mkdir(exist_ok=True); (tmp_path/name).write_text(text)
    assert list(corpus_documents(str(tmp_path))) == [('a.md', 'first'), ('b.txt', 'second'), ('c.txt', 'third')]
    assert list(corpus_documents(str(tmp_path/'b.txt'))) == [('b.txt', 'second')] == list(corpus_documents(f'{tmp_path}/b*'))
    (tmp_path/'long.txt').write_text('\n\n'.join(['word ' * 300] * 20 + ['x' * 90_000]))
    pieces = [text for _, text in corpus_documents(str(tmp_path/'long.txt'))]
    assert 5000 <= min(map(len, pieces[:4])) and max(map(len, pieces)) == 20_000 # a paragraph without end is cut too
    (tmp_path/'binary.txt').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='binary.txt is not UTF-8 text'): list(corpus_documents(str(tmp_path/'binary.txt')))


def test_dataset_files(tmp_path):
    import gzip
    rows = pd.DataFrame(dict(id=['a', 'b'], text=['first text', 'second text']))
    rows.to_json(tmp_path/'rows.jsonl', orient='records', lines=True); rows.to_parquet(tmp_path/'rows.parquet')
    (tmp_path/'rows.jsonl.gz').write_bytes(gzip.compress((tmp_path/'rows.jsonl').read_bytes()))
    rows[['text']].assign(n=1).rename(columns={'text': 'body'}).to_csv(tmp_path/'rows.csv', index=False)
    for name in ('rows.jsonl', 'rows.parquet', 'rows.jsonl.gz', 'rows.csv'):
        assert list(corpus_documents(str(tmp_path/name))) == [(name, 'first text'), (name, 'second text')]


def test_corpora_as_they_are_brought(tmp_path):
    right = ['first text, with a comma', 'second text']
    rows = [dict(text=text, title='t', n=1) for text in right]
    files = {'list.json': json.dumps(rows), 'strings.json': json.dumps(right), 'lines.json': '\n'.join(map(json.dumps, rows)), 'semicolon.csv': 'text;n\n' + ';1\n'.join(right) + ';1\n;\n',
             'tab.tsv': 'n\ttext\n' + ''.join(f'1\t{text}\n' for text in right), 'UPPER.CSV': 'Title,text\na,"first text, with a comma"\nb,second text\n', 'rows[1].jsonl': '\n'.join(map(json.dumps, rows))}
    for name, text in files.items():
        for encoding in ('utf-8', 'utf-8-sig', 'utf-16'):
            (tmp_path/name).write_text(text, encoding=encoding)
            assert [text for _, text in corpus_documents(str(tmp_path/name))] == right, (name, encoding)
    (tmp_path/'half.jsonl').write_text('{"text": "half \\ud83d"}\n')
    assert list(corpus_documents(str(tmp_path/'half.jsonl'))) == [('half.jsonl', 'half ?')]
    for name, encoding in (('mark.txt', 'utf-8-sig'), ('wide.txt', 'utf-16'), ('notes [1].txt', 'utf-8'), ('LOUD.TXT', 'utf-8')):
        (tmp_path/'texts').mkdir(exist_ok=True)
        (tmp_path/'texts'/name).write_text('text\nof a file', encoding=encoding)
        assert list(corpus_documents(str(tmp_path/'texts'/name))) == [(name, 'text\nof a file')]
    assert len(list(corpus_documents(str(tmp_path/'texts')))) == 4
    for name in ('page.html', 'PAGE.HTM', 'paper.pdf'):
        (tmp_path/name).write_text('<p>no')
        with pytest.raises(ValueError, match=f'{name} is no plain text: take the text out of it first'): list(corpus_documents(str(tmp_path/name)))
    (tmp_path/'bare.csv').write_text('text\nfirst text, with a comma\n')
    with pytest.raises(ValueError, match="bare.csv is not a readable csv file: line 2 has 2 fields, the header 1: a text that holds ',' must stand in quotes"): list(corpus_documents(str(tmp_path/'bare.csv')))


def test_a_dataset_does_not_say_where_its_text_is(tmp_path):
    file = tmp_path/'rows.jsonl'
    file.write_text('{"title": "a", "body": "b", "n": 1}\n')
    with pytest.raises(ValueError, match=r"has no column 'text', and 2 of its columns \(title, body, n\) hold text: name the one to read 'text'"): list(corpus_documents(str(file)))
    file.write_text('{"n": 1}\n')
    with pytest.raises(ValueError, match=r"no column 'text', and none of its columns \(n\) hold text"): list(corpus_documents(str(file)))
    file.write_text('{"n": ')
    with pytest.raises(ValueError, match='rows.jsonl is not a readable jsonl file: line 1 is not JSON'): list(corpus_documents(str(file)))


def test_rows_without_text_are_counted(tmp_path, capsys):
    file = tmp_path/'rows.jsonl'
    file.write_text('{"text": "a"}\n{"text": NaN}\n{"text": null}\n{"id": 7}\n{"text": ""}\n{"text": "b"}\n')
    assert [text for _, text in corpus_documents(str(file))] == ['a', 'b']
    assert capsys.readouterr().err == f'{file}: 4 of 6 rows have no text and are left out, the first of them row 2\n'
    file.write_text('{"id": "x", "body": null}\n{"id": 5, "text": "b"}\n') # what the first row lacks
    assert [text for _, text in corpus_documents(str(file))] == ['b']
    file.write_text('{"id": "x", "body": null}\n{"id": "y", "body": "b"}\n')
    with pytest.raises(ValueError, match=r"2 of its columns \(id, body\) hold text: name the one to read 'text'"): list(corpus_documents(str(file)))
    for value in ('["a", "b"]', '5', '{"a": "b"}', 'true'):
        file.write_text('{"text": "a"}\n{"text": %s}\n' % value)
        with pytest.raises(ValueError, match='rows.jsonl, row 2: its text is .*, not a text'): list(corpus_documents(str(file)))
    pd.DataFrame(dict(text=[b'a'])).to_parquet(tmp_path/'bytes.parquet')
    with pytest.raises(ValueError, match="bytes.parquet, row 1: its text is b'a', not a text"): list(corpus_documents(str(tmp_path/'bytes.parquet')))


def test_the_column_that_is_read_is_said(tmp_path, capsys):
    file = tmp_path/'rows.csv'
    file.write_text('id,body\n1,first text\n2,second text\n')
    assert [text for _, text in corpus_documents(str(file))] == ['first text', 'second text']
    assert capsys.readouterr().err == f"{file} has no column 'text': its column 'body' is read\n"
    file.write_text(',0\n0,first text\n1,second text\n') # as pandas writes what has no names
    assert [text for _, text in corpus_documents(str(file))] == ['first text', 'second text']
    file.write_text('TEXT;title\nfirst text;a\n')
    assert [text for _, text in corpus_documents(str(file))] == ['first text']
    for text in ('1,hello\n2,bye\n', 'The cat sat.\nThe dog lay by the fire.\n', 'She sells sea shells by the shore\nand more\n', 'x,1.5\ny,2.5\n'): # its first row would be lost
        file.write_text(text)
        with pytest.raises(ValueError, match='rows.csv has no line with the names of its columns: it begins with'): list(corpus_documents(str(file)))


def test_what_is_no_text_is_refused(tmp_path):
    import gzip
    cut = gzip.compress(b'{"text": "hello"}\n'*1000)[:-9]
    for name, data, says in (('a.xlsx', b'PK\x03\x04', 'is no plain text: take the text out of it first'), ('a.csv', b'PK\x03\x04', 'it is a zip file or a spreadsheet, not text'),
                             ('a.txt', b'PK\x03\x04', 'is no plain text: it is a zip file'), ('b.txt', gzip.compress(b'hello'), 'it is a gzipped file'), ('c.txt', 'hello'.encode('utf-16-le'), 'UTF-16 without its mark'),
                             ('d.txt', 'hello'.encode('utf-16')[:-1], 'is not UTF-8 text: it has the mark of UTF-16, and is damaged or cut off'), ('a.jsonl.gz', cut, 'ended before the end-of-stream'),
                             ('a.jsonl.zst', b'x', 'is no plain text'), ('a.ndjson', b'{"text": "a"}', 'is no plain text: take the text out of it first, into .txt or .jsonl')):
        (tmp_path/name).write_bytes(data)
        with pytest.raises(ValueError, match=says) as e: list(corpus_documents(str(tmp_path/name)))
        assert str(tmp_path/name) in str(e.value) and '\n' not in str(e.value)


def test_tables_in_a_folder_are_said(tmp_path, capsys):
    (tmp_path/'sub').mkdir()
    for name in ('a.txt', 'b.jsonl', 'sub/c.csv.gz'): (tmp_path/name).write_text('text')
    assert [text for _, text in corpus_documents(str(tmp_path))] == ['text'] and '2 tables in this folder are not read: name them, or a glob of them' in capsys.readouterr().err
    assert [text for _, text in corpus_documents(f'{tmp_path}/[as]*')] == ['text'] # a folder that fits a glob is no dataset
    with pytest.raises(ValueError, match='the name of the corpus is empty'): list(corpus_documents(' '))


def test_no_such_corpus():
    for spec in ('no-such-file.txt', '/no/folder/*.txt', 'rows.jsonl', 'folder/rows.jsonl', 'embeded'):
        with pytest.raises(FileNotFoundError, match="no corpus .*: it is 'embedded', a text file"): list(corpus_documents(spec))
    with pytest.raises(ValueError, match='cannot read the dataset no-user/no-such-set:part:test: '): list(corpus_documents('no-user/no-such-set:part:test')) # offline


def test_build_features(target, tmp_path, monkeypatch):
    import pyarrow.parquet as pq
    for i, (_, text) in enumerate(DOCS): (tmp_path/f'{i:02}.txt').write_text(text)
    monkeypatch.setattr(Target, 'load', classmethod(lambda cls, preset: target))
    out, preset = tmp_path/'out'/'features.parquet', load_preset('smollm2-135m')
    line = build_features(preset, progress=False, corpus=f'{tmp_path}/*.txt', tokens=300, out=out)
    table, card = pq.read_table(out).to_pandas(), json.loads((out.parent/'features.json').read_text())
    assert [p.name for p in sorted(out.parent.iterdir())] == ['features.json', 'features.parquet'] # no state is left
    assert len(table) == card['features'] == sum(card['status'].values()) == 64 and card['sae_sha256'] == target.reader.sha256
    assert card['tokens'] == sum(s['tokens'] for s in card['sources']) >= 300 and card['made_by'] == 'saeexplainer features smollm2-135m'
    assert line.startswith('64 features read on ') and str(out) in line
    from saeexplainer.files import making
    with making(out):
        with pytest.raises(RuntimeError, match='another process is working on .*features.parquet: wait for it, or stop it'): build_features(preset, progress=False, corpus=f'{tmp_path}/*.txt', out=out)
    with pytest.raises(ValueError, match='the preset mine names no corpus: say which to read'): build_features(replace(preset, name='mine', corpus=None))


def test_token_strings_keep_the_blank_in_front():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.BPE(vocab={'\u2581': 0, 'a': 1, 'b': 2, '\u2581b': 3, '\u2581a': 4}, merges=[('\u2581', 'b'), ('\u2581', 'a')]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=t)
    assert tokenizer.decode([3]) == 'b' and token_strings(tokenizer) == [' ', 'a', 'b', ' b', ' a']
    tiny = tiny_tokenizer()
    assert token_strings(tiny) == [tiny.decode([i]) for i in range(len(tiny))]


def test_whole_words():
    tokens = (' re', 'used', '\n', 'don', "'", 't', ' 3', '.', '14', '—', 'naïve')
    assert [word_at(tokens, i) for i in (0, 1, 2, 4, 7, 9, 10)] == ['reused', 'reused', None, "don't", '3.14', None, 'naïve']
    assert word_before((' such', ' a', ' mess'), 2) == 'a' and word_before(('mess',), 0) is None


def context(words, peak): return Context('t', tuple(' ' + w for w in words), tuple(float(i==peak) for i in range(len(words))), peak)


def test_labels():
    corpus = Counter(dict(the=5000, of=3000, a=2000, river=3, bank=4))
    assert word_label([context(['the', w], 1) for w in ['river', 'River', 'river', 'bank']], corpus) == ("the word 'river'", ('river',))
    assert word_label([context(['the', w], 1) for w in ['river', 'bank', 'bank', 'river']], corpus)[0] == "words such as 'river', 'bank'"
    assert word_label([context(['of', w], 1) for w in 'abcdefghijklmnop'], Counter({'of': 10**6} | {c: 10 for c in 'abcdefghijklmnop'})) == (None, ()) # nothing in common
    assert word_label([context([f'x{i}', 'the'], 1) for i in range(6)], corpus) == (None, ()) # only a common word
    label = word_label([context(['such', w], 1) for w in 'abcdefgh'], Counter({'the': 10**5, 'such': 9}))
    assert label == ("what follows the word 'such'", ('such',))
    assert word_label([Context('t', ('a', ' cat'), (0., 0.), 1)], corpus) == word_label([], corpus) == (None, ()) # nothing fires
