"One pass over a corpus: against a brute-force computation, killed and resumed, in bounded memory; words and labels"
import gc
import json
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from helpers import tiny_tokenizer
from reading_worlds import DOCS, HOW, make_target
from saeexplainer.features import Context
from saeexplainer.files import making
from saeexplainer.lm.hooks import residual_stream
from saeexplainer.presets import load_preset
from saeexplainer.saes import FeatureReader
from saeexplainer.sources.reading import (
    CorpusReading, add_document, build_features, contexts_of, document_windows, feature_table, load_reading,
    read_corpus, reading_settings, state_bytes, token_strings, word_at, word_before, word_label,
)
from saeexplainer.target import Target

AS_IDS = range(10**6) # instead of the strings of a vocabulary


@pytest.fixture(scope='module')
def target(tmp_path_factory): return make_target(tmp_path_factory.mktemp('sae'))


@pytest.fixture
def state(tmp_path): return tmp_path/'state.npz'


# ---- against a computation of everything at once

class Peak(NamedTuple):
    "A feature's strongest activation in a document, and what stands around it"
    value: float
    document: int
    ids: list
    values: np.ndarray
    at: int # its place in these


class Wanted(NamedTuple):
    fired: list # tokens on which each feature is active
    peaks: list # of each feature, the strongest first
    n_tokens: int


def encoded(target, text, window, first):
    "Activations of a document and its ids; first: what stands before each window"
    windows = document_windows(target.tokenizer(text, add_special_tokens=False)['input_ids'], window)
    rows = [torch.zeros(0, target.reader.n_features)]
    for part in windows:
        ids = torch.tensor([[*first, *part]])
        stream = residual_stream(target.model, ids, torch.ones_like(ids), 1, target.reader.hook)
        rows.append(target.reader.encode(stream)[0, len(first):])
    return torch.cat(rows).numpy(), sum(windows, [])


def peak_of(acts, ids, document):
    "The peak of a feature in a document that it fires in"
    peak = int(acts.argmax())
    start = max(0, min(peak - 20, len(acts) - 32))
    part = slice(start, start + 32)
    return Peak(acts[peak], document, ids[part], acts[part], peak - start)


def brute_force(target, n, window, first):
    "What a pass over `DOCS` should find, with every activation held at once"
    documents = [encoded(target, text, window, first) for _, text in DOCS]
    fired = []
    peaks = []
    for feature in range(target.reader.n_features):
        columns = [(acts[:, feature], ids, document) for document, (acts, ids) in enumerate(documents)]
        found = [peak_of(*column) for column in columns if column[0].max(initial=0) > 0]
        found.sort(key=lambda peak: (-peak.value, peak.document))
        fired.append(sum((acts != 0).sum() for acts, *_ in columns))
        peaks.append(found[:n])
    return Wanted(fired, peaks, sum(len(ids) for _, ids in documents))


def compare(reading, wanted):
    "Hold that numbers are those of `brute_force`; a value at a threshold may fall on either side"
    assert reading.documents == len(DOCS) == 16
    assert reading.n_tokens == wanted.n_tokens
    for feature, peaks in enumerate(wanted.peaks):
        assert abs(int(reading.fired[feature]) - wanted.fired[feature]) <= 1
        found = [context.values[context.peak] for context in contexts_of(reading, feature, AS_IDS)]
        assert np.allclose(found, [peak.value for peak in peaks], atol=1e-4)


def is_tied(peak, peaks): # near ties may change places
    return sum(abs(peak.value - other.value) < 1e-3 for other in peaks) > 1


def compare_contexts(reading, wanted):
    "Hold that contexts are those of `brute_force`; returns how many were compared"
    compared = 0
    for feature, peaks in enumerate(wanted.peaks):
        for context, peak in zip(contexts_of(reading, feature, AS_IDS), peaks):
            if is_tied(peak, peaks): continue
            compared += 1
            assert context.source == DOCS[peak.document][0]
            assert (list(context.tokens), context.peak) == (peak.ids, peak.at)
            assert np.allclose(context.values, peak.values, atol=.01)
    return compared


KINDS = [
    dict(),
    dict(architecture='standard'),
    dict(architecture='gated'),
    dict(architecture='topk', k=4),
    dict(architecture='abstopk', k=4),
    dict(architecture='topk', k=4, rescale_acts_by_decoder_norm=True),
    dict(hook='resid_pre'),
    dict(arch='gemma2'),
    dict(arch='gpt2', metadata={'prepend_bos': False}),
]


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: ' '.join(map(str, kind.values())))
def test_equals_brute_force(kind, tmp_path, state):
    target = make_target(tmp_path, **kind)
    wanted = brute_force(target, 5, 30, [1] if target.bos else [])
    reading = read_corpus(target, DOCS, state, n_top=5, window=30, batch_tokens=800, progress=False)
    compare(reading, wanted)
    assert sum(n for _, n in reading.sources.values()) == wanted.n_tokens
    assert compare_contexts(reading, wanted) > 100


def test_a_document_longer_than_a_batch(target, state):
    "It is encoded in parts, and still counts as one"
    reading = read_corpus(target, DOCS, state, n_top=5, window=30, batch_tokens=100, progress=False)
    assert max(len(target.tokenizer(text)['input_ids']) for _, text in DOCS) > 300
    compare(reading, brute_force(target, 5, 30, [1]))
    for documents, values in zip(reading.document, reading.value):
        kept = documents[values > 0]
        assert len(set(kept)) == len(kept)


def test_a_tokenizer_without_bos(tmp_path, state):
    target = make_target(tmp_path)
    target.tokenizer.bos_token = None
    wanted = brute_force(target, 3, 30, [])
    reading = read_corpus(target, DOCS, state, n_top=3, window=30, progress=False)
    assert reading.n_tokens == wanted.n_tokens
    assert reading.settings['bos'] is None
    strongest = [peaks[0].value if peaks else 0 for peaks in wanted.peaks]
    assert np.allclose(reading.max_act, strongest, atol=1e-4)


# ---- contexts

def test_contexts_cross_windows_and_stay_in_their_document(target, state):
    reading = read_corpus(target, DOCS, state, n_top=3, window=16, progress=False)
    vocabulary = token_strings(target.tokenizer)
    contexts = [context for feature in range(64) for context in contexts_of(reading, feature, vocabulary)]
    assert max(len(context.tokens) for context in contexts) == 32
    texts = [text for _, text in DOCS]
    for context in contexts:
        assert any(str(context) in text for text in texts)


def one_feature():
    "An empty reading of one feature that keeps two contexts"
    return CorpusReading.empty(dict(n_features=1, n_top=2))


def activity(**values):
    "Activations of one feature on twenty tokens; values: token_N -> activation"
    acts = torch.zeros(20, 1)
    for name, value in values.items(): acts[int(name.removeprefix('token_'))] = value
    return acts


def test_equal_peaks_keep_the_earlier_document():
    reading = one_feature()
    for document, (value, at) in enumerate([(2., 0), (1., 3), (1., 1), (2., 2), (2., 4)]):
        reading.documents = document
        acts = activity(**{f'token_{at}': value, f'token_{at+1}': value})
        add_document(reading, acts, np.arange(20), f'd{document}')
    contexts = contexts_of(reading, 0, range(20))
    found = [(context.source, context.peak, context.values[context.peak]) for context in contexts]
    assert found == [('d0', 0, 2.), ('d3', 2, 2.)]


def test_activations_beyond_fp16_stay_finite():
    reading = one_feature()
    add_document(reading, activity(token_4=1e6, token_5=9e4), np.full(20, 3), 'd')
    reading.fired = np.array([2])
    reading.n_tokens = 1000
    values = contexts_of(reading, 0, ['x']*10)[0].values
    assert values[4] == reading.max_act[0] == 1e6
    assert values[5] == 65504
    [row] = feature_table(reading, tiny_tokenizer(), progress=False)
    assert np.isfinite(row['contexts'][0]['values']).all()


# ---- a pass that stops

def same(first, second):
    "Hold that two readings are equal bit by bit"
    for name, value in vars(first).items():
        other = vars(second)[name]
        is_array = isinstance(value, (np.ndarray, torch.Tensor))
        assert np.array_equal(value, other) if is_array else value == other, name


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def kill_half_way(folder):
    "Let another process read, and end it by force at no particular moment after its first batch"
    code = f'from reading_worlds import read_slowly; read_slowly({str(folder)!r})'
    process = subprocess.Popen([sys.executable, '-c', code], cwd=Path(__file__).parent)
    while not (folder/'state.npz').exists() and process.poll() is None:
        time.sleep(.01)
    time.sleep(.2)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_and_run_again_gives_the_same_bits(tmp_path, state, one_thread):
    kill_half_way(tmp_path)
    half = load_reading(state, {})
    assert not half.finished
    assert 0 < half.documents < 3*len(DOCS)
    target = make_target(tmp_path/'sae')
    read_corpus(target, DOCS*3, state, **HOW)
    whole = read_corpus(target, DOCS*3, tmp_path/'whole.npz', **HOW)
    same(load_reading(state, {}), whole)


def test_a_finished_pass_reads_nothing(target, state):
    done = read_corpus(target, DOCS, state, progress=False)
    same(read_corpus(target, iter(()), state, progress=False), done)


def test_the_state_of_something_else_is_refused(target, tmp_path, state):
    read_corpus(target, DOCS, state, progress=False)
    with pytest.raises(ValueError, match='state.npz was read with sae .*delete it to read anew'):
        read_corpus(make_target(tmp_path/'other', seed=1), DOCS, state, progress=False)
    with pytest.raises(ValueError, match='was read with window 127, now it is 64'):
        read_corpus(target, DOCS, state, window=64, progress=False)
    with pytest.raises(ValueError, match='was read with tokens None, now it is 10'):
        read_corpus(target, DOCS, state, tokens=10, progress=False)


def test_a_damaged_state_is_refused(target, state):
    state.write_bytes(b'PK')
    with pytest.raises(ValueError, match='is not the state of a reading .*delete it'):
        read_corpus(target, DOCS, state, progress=False)


def stopped(docs):
    "The documents, then a key that is pressed"
    yield from docs
    raise KeyboardInterrupt


def test_another_corpus_is_refused(target, state):
    with pytest.raises(KeyboardInterrupt):
        read_corpus(target, stopped(DOCS[:9]), state, batch_tokens=100, save_every=0, progress=False)
    for other in (DOCS[1:], DOCS[:2]):
        with pytest.raises(ValueError, match='documents of this corpus are not those that were read before'):
            read_corpus(target, other, state, batch_tokens=100, progress=False)
    assert read_corpus(target, DOCS, state, batch_tokens=100, progress=False).documents == len(DOCS)


def test_tokens_end_the_pass_with_a_document(target, tmp_path):
    whole = read_corpus(target, DOCS, tmp_path/'whole.npz', progress=False)
    part = read_corpus(target, DOCS, tmp_path/'part.npz', tokens=200, batch_tokens=10**4, progress=False)
    windows = [document_windows(target.tokenizer(text)['input_ids']) for _, text in DOCS]
    sizes = np.cumsum([sum(map(len, of_document)) for of_document in windows])
    assert part.n_tokens == sizes[sizes >= 200][0]
    assert part.n_tokens < whole.n_tokens


@pytest.mark.parametrize('docs', [[], [('s', 'Hi.')]], ids=['no document', 'a short one'])
def test_nothing_to_read(target, state, docs):
    with pytest.raises(ValueError, match=r'the corpus has no document of 16 tokens or more'):
        read_corpus(target, docs, state, progress=False)


# ---- memory

N_TOP = 16 # contexts of a feature, where memory is measured


def peak_memory(target, n, state):
    "Bytes that numpy and Python allocate at most during a pass over n documents"
    docs = (DOCS[i % 14] for i in range(n))
    gc.collect()
    tracemalloc.start()
    reading = read_corpus(target, docs, state, n_top=N_TOP, batch_tokens=300, progress=False)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    arrays = [value for value in vars(reading).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == state_bytes(64, N_TOP)
    return used


def test_ten_times_the_text_takes_no_more_memory(target, tmp_path):
    peak_memory(target, 14, tmp_path/'first.npz') # what is made once
    small = peak_memory(target, 30, tmp_path/'small.npz')
    large = peak_memory(target, 300, tmp_path/'large.npz')
    assert large < small + state_bytes(64, N_TOP)/4


def test_no_batch_is_larger_than_it_may_be(target, state, monkeypatch):
    sizes = []
    encode = target.reader.encode
    def watched(stream):
        sizes.append(len(stream))
        return encode(stream)
    monkeypatch.setattr(target.reader, 'encode', watched)
    read_corpus(target, DOCS[:14]*3, state, n_top=8, batch_tokens=300, progress=False)
    assert 0 < max(sizes) <= 300


def test_a_long_document_is_a_batch_of_its_own(target, state):
    assert read_corpus(target, DOCS, state, batch_tokens=1, progress=False).documents == len(DOCS)


def test_default_batches_hold_half_a_gigabyte_of_activations(target):
    assert reading_settings(target)['batch_tokens'] == target.max_tokens == 4096
    wide = FeatureReader(target.reader.sae, target.reader.card, target.reader.sha256)
    wide.n_features = 131_072
    assert reading_settings(Target(target.model, target.tokenizer, wide))['batch_tokens'] == 1024


# ---- the table of features

@pytest.fixture(scope='module')
def table(target, tmp_path_factory):
    reading = read_corpus(target, DOCS, tmp_path_factory.mktemp('table')/'state.npz', progress=False)
    return pd.DataFrame(feature_table(reading, target.tokenizer, dense=.2, n_contexts=3, progress=False))


def test_table_keeps_every_feature(table):
    assert list(table) == ['index', 'density', 'max_act', 'status', 'explanation', 'words', 'explanations', 'contexts']
    assert len(table) == 64
    assert max(map(len, table.contexts)) == 3


def test_table_marks_what_cannot_be_explained(table):
    assert set(table.status) <= {'ok', 'dead', 'dense', 'unlabelled'}
    assert (table.status[table.density > .2] == 'dense').all()
    assert ((table.status == 'dead') == (table.density == 0)).all()
    assert table.explanation[table.status != 'ok'].isna().all()


def test_table_says_who_labelled(table):
    for feature in table.itertuples():
        said = dict(text=feature.explanation, model='peak words', type='words')
        assert feature.explanations == ([said] if feature.status == 'ok' else [])


def test_the_first_context_has_the_strongest_activation(table):
    for feature in table.itertuples():
        for context in feature.contexts[:1]:
            assert abs(context['values'][context['peak']] - feature.max_act) < 1e-2


@pytest.fixture
def corpus(tmp_path, monkeypatch, target):
    "A glob of text files; `build_features` reads them with the tiny target"
    monkeypatch.setattr(Target, 'load', classmethod(lambda cls, preset: target))
    for i, (_, text) in enumerate(DOCS): (tmp_path/f'{i:02}.txt').write_text(text)
    return f'{tmp_path}/*.txt'


def test_build_features(target, tmp_path, corpus):
    out = tmp_path/'out'/'features.parquet'
    line = build_features(load_preset('smollm2-135m'), progress=False, corpus=corpus, tokens=300, out=out)
    assert line.startswith('64 features read on ')
    assert str(out) in line
    assert [file.name for file in sorted(out.parent.iterdir())] == ['features.json', 'features.parquet'] # no state
    card = json.loads((out.parent/'features.json').read_text())
    assert pq.read_metadata(out).num_rows == card['features'] == sum(card['status'].values()) == 64
    assert card['sae_sha256'] == target.reader.sha256
    assert card['tokens'] == sum(source['tokens'] for source in card['sources'])
    assert card['tokens'] >= 300
    assert card['made_by'] == 'saeexplainer features smollm2-135m'


def test_one_process_builds_a_file(tmp_path, corpus):
    out = tmp_path/'features.parquet'
    says = 'another process is working on .*features.parquet: wait for it, or stop it'
    with making(out):
        with pytest.raises(RuntimeError, match=says):
            build_features(load_preset('smollm2-135m'), progress=False, corpus=corpus, out=out)


def test_a_preset_without_a_corpus():
    with pytest.raises(ValueError, match='the preset mine names no corpus: say which to read'):
        build_features(replace(load_preset('smollm2-135m'), name='mine', corpus=None))


# ---- words and labels

def test_token_strings_keep_the_blank_in_front():
    merges = [('\u2581', 'b'), ('\u2581', 'a')]
    vocabulary = {'\u2581': 0, 'a': 1, 'b': 2, '\u2581b': 3, '\u2581a': 4}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    assert tokenizer.decode([3]) == 'b'
    assert token_strings(tokenizer) == [' ', 'a', 'b', ' b', ' a']


def test_token_strings_of_bytes_are_what_is_decoded():
    tiny = tiny_tokenizer()
    assert token_strings(tiny) == [tiny.decode([i]) for i in range(len(tiny))]


def test_whole_words():
    tokens = (' re', 'used', '\n', 'don', "'", 't', ' 3', '.', '14', '—', 'naïve')
    words = {0: 'reused', 1: 'reused', 2: None, 4: "don't", 7: '3.14', 9: None, 10: 'naïve'}
    assert {at: word_at(tokens, at) for at in words} == words


def test_the_word_before():
    assert word_before((' such', ' a', ' mess'), 2) == 'a'
    assert word_before(('mess',), 0) is None


CORPUS = Counter(the=5000, of=3000, a=2000, river=3, bank=4)


def after(first, *words):
    "Contexts of two words, whose second is the peak"
    return [Context('t', (f' {first}', f' {word}'), (0., 1.), 1) for word in words]


def test_label_of_one_word():
    label = word_label(after('the', 'river', 'River', 'river', 'bank'), CORPUS)
    assert label == ("the word 'river'", ('river',))


def test_label_of_several_words():
    label, _ = word_label(after('the', 'river', 'bank', 'bank', 'river'), CORPUS)
    assert label == "words such as 'river', 'bank'"


def test_label_of_what_follows_a_word():
    label = word_label(after('such', *'abcdefgh'), Counter({'the': 10**5, 'such': 9}))
    assert label == ("what follows the word 'such'", ('such',))


LETTERS = 'abcdefghijklmnop'


def test_words_with_nothing_in_common_have_no_label():
    counts = Counter({'of': 10**6} | dict.fromkeys(LETTERS, 10))
    assert word_label(after('of', *LETTERS), counts) == (None, ())


def test_a_common_word_is_no_label():
    contexts = [after(f'x{i}', 'the')[0] for i in range(6)]
    assert word_label(contexts, CORPUS) == (None, ())


SILENT = Context('t', ('a', ' cat'), (0., 0.), 1)


@pytest.mark.parametrize('contexts', [[SILENT], []], ids=['silent', 'none'])
def test_without_activations_there_is_no_label(contexts):
    assert word_label(contexts, CORPUS) == (None, ())
