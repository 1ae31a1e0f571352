"Names, splits, firings, contexts and labels"
from collections import Counter
from pathlib import Path
import numpy as np
import pytest, torch
from helpers import SENTENCES, tiny_model, tiny_sae, tiny_tokenizer
from saeexplainer.features import (Context, FeatureId, Firings, context_at, document_windows, feature_table, load_features, record_firings, split_features, strongest,
                                   word_at, word_before, word_label)
from saeexplainer.presets import load_preset
from saeexplainer.saes import FeatureReader
from saeexplainer.target import Target


@pytest.mark.parametrize('text', ['', 'a/b', 'a/b/c', 'a/b/-1', 'a//3', 'a/b/1/2'])
def test_wrong_names(text):
    with pytest.raises(ValueError, match="is not a feature: write model/source/index, such as 'smollm2-135m/9-res-4k/123'"): FeatureId.parse(text)


def test_splits_depend_on_ids_sizes_and_seed_alone():
    ids = [FeatureId('m', 's', i) for i in range(200)]
    sizes = dict(test=20, preference=30, sft=100)
    a = split_features(ids, sizes, seed=3)
    assert a == split_features(list(reversed(ids)) + ids[:5], sizes, seed=3) != split_features(ids, sizes, seed=4)
    assert len(set(sum(a.values(), []))) == 150
    assert split_features(ids, dict(test=20), seed=3)['test'] == a['test'] # a smaller run tests on what the larger tests on
    with pytest.raises(ValueError, match='150 test \\+ 100 sft features are wanted, there are 200'): split_features(ids, dict(test=150, sft=100))


@pytest.fixture(scope='module')
def target(tmp_path_factory):
    folder = tiny_sae(tmp_path_factory.mktemp('sae'), layer=1, d_sae=64)
    return Target(tiny_model(n_layers=3), tiny_tokenizer(), FeatureReader.load(folder))


@pytest.fixture(scope='module')
def read(target, tmp_path_factory): # documents, firings
    ids = target.tokenizer(SENTENCES, add_special_tokens=False)['input_ids']
    ids = [d*3 for d in ids]
    return ids, Firings.load(record_firings(target, ids, tmp_path_factory.mktemp('shards'), shard=4, batch_size=3, progress=False), 64)


def test_firings_are_what_the_target_reads(target, read):
    ids, firings = read
    windows = document_windows(ids)
    assert len(firings.tokens) == sum(len(w) for _, w in windows)
    at = 0
    for document, window in windows:
        text_ids = torch.tensor([[target.tokenizer.bos_token_id, *window]])
        from saeexplainer.target import residual_stream
        acts = target.reader.encode(residual_stream(target.model, text_ids, torch.ones_like(text_ids), 1))[0, 1:].numpy()
        for feature in (0, 17, 63):
            where, value = firings.of(feature)
            dense = np.zeros(len(firings.tokens), np.float32); dense[where] = value
            assert np.allclose(dense[at:at+len(window)], acts[:, feature], atol=1e-4)
        assert (firings.document[at:at+len(window)] == document).all()
        at += len(window)


def test_reading_resumes_at_the_first_missing_shard(target, read, tmp_path):
    ids, firings = read
    files = record_firings(target, ids, tmp_path, shard=4, progress=False)
    kept = files[0].stat().st_mtime_ns
    files[1].unlink()
    again = Firings.load(record_firings(target, ids, tmp_path, shard=4, progress=False), 64)
    assert files[0].stat().st_mtime_ns == kept
    assert np.array_equal(again.position, firings.position) and np.allclose(again.value, firings.value, atol=1e-4)


def test_contexts(target, read):
    ids, firings = read
    vocabulary = [target.tokenizer.decode([i]) for i in range(len(target.tokenizer))]
    feature = int(np.argmax(np.diff(firings.start)))
    best = strongest(firings, feature, 16)
    documents = [int(firings.document[p]) for p, _ in best]
    assert len(set(documents)) == len(documents) and [v for _, v in best] == sorted((v for _, v in best), reverse=True)
    assert best[0][1] == firings.of(feature)[1].max()
    c = context_at(firings, feature, best[0][0], vocabulary, [str(i) for i in range(len(ids))])
    assert len(c.tokens) == len(c.values) <= 32 and c.values[c.peak] == best[0][1] == max(c.values) and c.source == str(documents[0])


def test_table_marks_and_keeps_every_feature(target, read):
    table = feature_table(read[1], target.tokenizer, ['test']*len(read[0]), dense=.2, progress=False)
    assert len(table) == 64 and set(table.status) <= {'ok', 'dead', 'dense', 'unlabelled'}
    assert (table.status[table.density > .2] == 'dense').all() and table.explanation[table.status != 'ok'].isna().all()
    assert table.explanation[table.status == 'ok'].notna().all()


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


def test_missing_and_broken_tables(tmp_path, monkeypatch):
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path))
    preset = load_preset('smollm2-135m')
    with pytest.raises(FileNotFoundError, match='has no features.parquet: put one with index, density'): load_features(preset)
    (tmp_path/'smollm2-135m').mkdir(); (tmp_path/'smollm2-135m'/'features.parquet').write_text('not parquet')
    with pytest.raises(ValueError, match='is not a readable feature table'): load_features(preset)
