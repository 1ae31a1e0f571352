"Test contexts: excerpts of unread documents that a feature fires on, and others; into the feature table and out again"
import dataclasses
import json
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import tiny_tokenizer
from judged import ALIVE, feature_row, judged_preset, judging_contexts, running_documents, running_text, tiny_target
from saeexplainer.features import (
    FEATURES_SCHEMA, LENGTH, Context, card_of, features_file, load_features, replace_column, save_features,
)
from saeexplainer.files import write_json
from saeexplainer.presets import load_preset
from saeexplainer.sources.contexts import (
    LEVELS, WINDOW, ContextCounts, ContextPool, add_test_contexts, contexts_column, draw_contexts, excerpt_starts,
    interleaved, read_pool, some_windows, unread_documents,
)
from saeexplainer.sources.reading import token_strings

DOCS = running_documents(30)


@pytest.fixture(scope='module')
def target(tmp_path_factory): return tiny_target(tmp_path_factory.mktemp('sae'))


@pytest.fixture(scope='module')
def pool(target): return read_pool(target, DOCS, progress=False)


@pytest.fixture
def preset(tmp_path, monkeypatch):
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    return load_preset(judged_preset(tmp_path))


# reading

def test_excerpts_hold_what_the_target_reads(target, pool):
    "Every activation of some excerpts, against the whole window alone"
    source, text = DOCS[0]
    ids = target.tokenizer(text, add_special_tokens=False)['input_ids']
    window = some_windows(ids, 0)[0]
    stream = target.text_reader.batcher.residual_stream
    all_count = np.ones(len(window) + 1, bool)
    residuals = stream([dataclasses.replace(whole_tokens(target), ids=[1, *window], counts=all_count)])
    acts = target.reader.encode(residuals)[0, 1:]
    assert pool.sources[pool.source[0]] == source
    for number, start in enumerate(excerpt_starts(len(window))):
        part = slice(start, start + LENGTH)
        assert pool.tokens[number].tolist() == window[part]
        for feature in range(40):
            assert pool.values(feature, number) == pytest.approx(acts[part, feature].numpy(), abs=2e-3, rel=2e-3)


def whole_tokens(target): return target.text_reader.batcher.tokens(['a'])[0]


def test_a_pool_is_the_same_whatever_is_read_together(target, pool, monkeypatch):
    monkeypatch.setattr(target, 'max_tokens', 200)
    again = read_pool(target, DOCS[:4], progress=False)
    n = len(again.tokens)
    assert again.tokens.tolist() == pool.tokens[:n].tolist()
    assert again.document.tolist() == pool.document[:n].tolist()
    before = int((pool.excerpt < n).sum())
    assert abs(len(again.value) - before) <= before//500 # a value at the threshold


def test_reading_stops_behind_the_document_that_is_enough(target):
    assert set(read_pool(target, DOCS, 1, progress=False).document.tolist()) == {0}


def test_at_most_three_windows_of_a_document_in_their_order():
    ids = list(range(20*WINDOW))
    windows = some_windows(ids, 7)
    assert len(windows) == 3
    assert windows == sorted(windows)
    assert windows == some_windows(ids, 7)
    assert windows != some_windows(ids, 8)


@pytest.mark.parametrize('length', [0, 1, 62])
def test_a_short_document_has_no_window(length):
    assert some_windows(list(range(length)), 0) == []


@pytest.mark.parametrize('docs', [[], [('a', '')], [('a', 'Too short.')]*3])
def test_no_document_is_long_enough(target, docs):
    with pytest.raises(ValueError, match='no document .* has 63 tokens: there are no test contexts; choose another'):
        read_pool(target, docs, progress=False)


def test_a_model_that_reads_less_than_a_window(target, monkeypatch):
    monkeypatch.setattr(target.model.config, 'max_position_embeddings', 64)
    with pytest.raises(ValueError, match='the model reads 64 tokens, test contexts are read 127 at a time behind BOS'):
        read_pool(target, DOCS, progress=False)


def test_features_that_never_fire(tmp_path):
    silent = tiny_target(tmp_path)
    silent.reader.sae.threshold.data.fill_(1e6)
    nothing = read_pool(silent, DOCS, progress=False)
    assert len(nothing.value) == 0
    drawn = draw_contexts(nothing, 3, 1., token_strings(silent.tokenizer))
    assert [context.kind for context in drawn] == ['random']*3


def test_an_sae_with_one_feature(tmp_path):
    single = tiny_target(tmp_path, d_sae=1)
    assert read_pool(single, DOCS, progress=False).n_features == 1


def test_a_tokenizer_without_bos(tmp_path):
    plain = tiny_target(tmp_path, 'gpt2', tokenizer=tiny_tokenizer(bos=None), metadata={'prepend_bos': False})
    assert len(read_pool(plain, DOCS[:3], progress=False).tokens) > 5


def test_a_very_large_activation_stays_finite(tmp_path):
    loud = tiny_target(tmp_path, 'llama')
    loud.reader.sae.W_enc.data.mul_(1e6)
    values = read_pool(loud, DOCS[:3], progress=False).value
    assert np.isfinite(values).all()


# drawing

def drawn_for(pool, target, feature):
    strongest = float(pool.strongest(feature)[1].max(initial=0))
    return draw_contexts(pool, feature, strongest, token_strings(target.tokenizer)), strongest


@pytest.fixture(scope='module')
def all_drawn(pool, target): # (contexts, strongest activation) of each feature that fires
    firing = [feature for feature in range(40) if len(pool.strongest(feature)[0])]
    return [drawn_for(pool, target, feature) for feature in firing]


def test_firing_contexts_are_above_the_lowest_level(all_drawn):
    for contexts, strongest in all_drawn:
        firing = [max(context.values) for context in contexts if context.kind == 'fires']
        assert len(firing) <= 6
        assert firing == sorted(firing)
        assert all(value >= .99*LEVELS[-1][0]*strongest for value in firing)


def test_other_contexts_do_not_fire(all_drawn):
    others = [context for contexts, _ in all_drawn for context in contexts if context.kind != 'fires']
    assert others
    assert not any(any(context.values) for context in others)


def test_a_hard_context_shares_the_token_of_a_peak(all_drawn):
    hard = 0
    for contexts, _ in all_drawn:
        peaks = {context.tokens[context.peak] for context in contexts if context.kind == 'fires'}
        for context in contexts:
            if context.kind != 'hard': continue
            hard += 1
            assert context.tokens[context.peak] in peaks
    assert hard


def test_no_document_twice(pool, target):
    "Texts are compared: each document has its own"
    for feature in range(40):
        contexts, strongest = drawn_for(pool, target, feature) if len(pool.strongest(feature)[0]) else ((), 0)
        assert len({str(context) for context in contexts}) == len(contexts)


def test_drawing_depends_on_feature_and_seed_alone(pool, target):
    vocabulary = token_strings(target.tokenizer)
    assert draw_contexts(pool, 3, 1., vocabulary) == draw_contexts(pool, 3, 1., vocabulary)
    assert draw_contexts(pool, 3, 1., vocabulary) != draw_contexts(pool, 3, 1., vocabulary, seed=1)


def one_feature_pool(n, fires): # n excerpts of a document each; fires: excerpt -> activation
    excerpts = sorted(fires)
    return ContextPool(
        tokens=np.arange(n*LENGTH, dtype=np.int32).reshape(n, LENGTH) % 7,
        document=np.arange(n, dtype=np.int32),
        source=np.zeros(n, np.int32),
        sources=('notes',),
        start=np.array([0, len(excerpts)]),
        excerpt=np.array(excerpts, np.int32),
        position=np.full(len(excerpts), 4, np.int8),
        value=np.array([fires[excerpt] for excerpt in excerpts], np.float16),
    )


def test_a_third_of_each_level():
    fires = dict(zip(range(30), [8.]*10 + [3.]*10 + [1.]*10))
    contexts = draw_contexts(one_feature_pool(60, fires), 0, 10., 'abcdefg')
    assert [max(context.values) for context in contexts[:6]] == [1, 1, 3, 3, 8, 8]


def test_a_level_that_has_too_few_is_filled_from_the_others():
    contexts = draw_contexts(one_feature_pool(60, {5: 8., **dict.fromkeys(range(10, 20), 3.)}), 0, 10., 'abcdefg')
    assert [max(context.values) for context in contexts[:6]] == [3, 3, 3, 3, 3, 8]


def test_weak_excerpts_are_neither_firing_nor_silent():
    contexts = draw_contexts(one_feature_pool(5, dict.fromkeys(range(5), .5)), 0, 10., 'abcdefg')
    assert contexts == []


@pytest.mark.parametrize('counts', [ContextCounts(0, 0, 0), ContextCounts(1, 1, 1), ContextCounts(100, 100, 100)])
def test_never_more_than_asked(counts):
    contexts = draw_contexts(one_feature_pool(20, {3: 9., 4: 8.}), 0, 10., 'abcdefg', counts)
    for kind in ('fires', 'hard', 'random'):
        assert sum(context.kind == kind for context in contexts) <= getattr(counts, kind)


@pytest.mark.parametrize('fires', range(12))
def test_levels_add_up(fires):
    assert sum(ContextCounts(fires=fires).at_level(level) for level in range(3)) == fires


def test_a_feature_of_which_nothing_is_known_has_no_contexts(pool, target):
    max_acts = {0: None, 1: float('nan'), 2: 0.}
    column = contexts_column(pool, max_acts, token_strings(target.tokenizer), progress=False)
    assert column.to_pylist() == [[], [], []]


# documents

def test_groups_in_turn():
    assert interleaved([]) == []
    assert interleaved([[], ['a'], ['b', 'c']]) == ['a', 'b', 'c']


def test_documents_that_were_read_are_passed_over(tmp_path):
    file = tmp_path/'texts.jsonl'
    file.write_text(''.join(json.dumps({'text': f'text {number}'}) + '\n' for number in range(5)))
    assert [text for _, text in unread_documents(str(file), 3)] == ['text 3', 'text 4']
    assert list(unread_documents(str(file), 9)) == []


# the feature table

def test_contexts_are_saved_and_loaded(tmp_path):
    rows = [feature_row(3), feature_row(5)]
    file = save_features(rows, tmp_path/'features.parquet')
    loaded = load_features(load_preset('gpt2-small-l8', features=str(file)))
    assert [tuple(feature.test_contexts) for feature in loaded] == [tuple(row['test_contexts']) for row in rows]
    assert loaded[0].test_contexts[2].kind == 'hard'
    assert loaded[0].contexts[0].kind == ''


def test_a_table_without_the_column_loads(tmp_path):
    file = save_features([feature_row(3)], tmp_path/'features.parquet')
    pq.write_table(pq.read_table(file).drop_columns('test_contexts'), file)
    [feature] = load_features(load_preset('gpt2-small-l8', features=str(file)))
    assert tuple(feature.test_contexts) == ()
    assert len(feature.contexts) == 1


def test_rows_without_test_contexts_are_saved(tmp_path):
    row = feature_row(3)
    del row['test_contexts']
    [feature] = load_features(load_preset('gpt2-small-l8', features=str(save_features([row], tmp_path/'f.parquet'))))
    assert tuple(feature.test_contexts) == ()


def test_a_broken_test_context_names_its_feature(tmp_path):
    row = feature_row(3) | {'test_contexts': [dict(source='a', tokens=['b'], values=[1.], peak=4, kind='fires')]}
    with pytest.raises(ValueError, match='feature 3: a context has 1 tokens, 1 values and its peak at 4'):
        save_features([row], tmp_path/'features.parquet')


def test_a_broken_test_context_of_a_file_names_its_feature(tmp_path):
    file = save_features([feature_row(3)], tmp_path/'features.parquet')
    wrong = [[dict(source='a', tokens=['b'], values=[np.float16(1)], peak=4, kind='fires')]]
    replace_column(file, 'test_contexts', pa.array(wrong, FEATURES_SCHEMA.field('test_contexts').type))
    with pytest.raises(ValueError, match='a context of feature 3 has its peak outside its tokens'):
        load_features(load_preset('gpt2-small-l8', features=str(file)))


def test_a_kind_may_be_missing():
    row = judging_contexts('rain')[0].row()
    del row['kind']
    assert Context.from_row(row).kind == ''
    assert Context.from_row(row | {'kind': None}).kind == ''


def test_replacing_a_column_leaves_the_others(tmp_path):
    file = save_features([feature_row(3), feature_row(5)], tmp_path/'features.parquet', 'tiny/1-res')
    before = pq.read_table(file)
    replace_column(file, 'density', pa.array([.5, .25]))
    after = pq.read_table(file)
    assert after['density'].to_pylist() == [.5, .25]
    assert after.drop_columns('density').equals(before.drop_columns('density'))
    assert after.schema.metadata[b'source'] == b'tiny/1-res'
    assert [path.name for path in tmp_path.iterdir()] == ['features.parquet']


@pytest.mark.parametrize('name, values, line', [
    ('density', [.5], 'has 2 rows, and the column density has 1: one value for each'),
    ('colour', [1, 2], "a feature table has no column 'colour': it has index, density"),
])
def test_a_column_that_does_not_fit(tmp_path, name, values, line):
    file = save_features([feature_row(3), feature_row(5)], tmp_path/'features.parquet')
    before = file.read_bytes()
    with pytest.raises(ValueError, match=line): replace_column(file, name, pa.array(values))
    assert file.read_bytes() == before


def test_a_table_gets_its_test_contexts(preset):
    file = features_file(preset)
    write_json({'corpus': preset.corpus, 'documents': 2}, file.with_suffix('.json'))
    line = add_test_contexts(preset, progress=False)
    assert line.startswith('test contexts of 20 features from <')
    features = load_features(preset)
    kinds = {context.kind for feature in features for context in feature.test_contexts}
    assert {'fires', 'hard'} <= kinds <= {'fires', 'hard', 'random'}
    assert sum(feature.status == 'ok' for feature in features) == ALIVE
    assert card_of(file)['test_contexts']['documents'] == 10 # of 12
    assert card_of(file)['documents'] == 2
    assert not list(file.parent.glob('*.lock'))


def test_test_contexts_are_the_same_again(preset):
    file = features_file(preset)
    add_test_contexts(preset, progress=False)
    first = file.read_bytes()
    add_test_contexts(preset, progress=False)
    assert file.read_bytes() == first


def test_a_corpus_that_was_read_to_its_end(preset):
    write_json({'corpus': preset.corpus, 'documents': 12}, features_file(preset).with_suffix('.json'))
    with pytest.raises(ValueError, match='no document that was not read for the features'):
        add_test_contexts(preset, progress=False)


def test_a_table_of_another_sae(preset):
    file = features_file(preset)
    write_json({'sae_sha256': 'f'*64}, file.with_suffix('.json'))
    before = file.read_bytes()
    with pytest.raises(ValueError, match='was read from an SAE with hash ffffffffffff'):
        add_test_contexts(preset, progress=False)
    assert file.read_bytes() == before


def test_a_table_that_is_none_is_refused_before_reading(preset):
    features_file(preset).write_text('not parquet')
    with pytest.raises(ValueError, match='is not a readable feature table'): add_test_contexts(preset, progress=False)


def test_no_table_and_no_corpus(preset):
    with pytest.raises(ValueError, match='the preset tiny names no corpus: say which to read'):
        add_test_contexts(load_preset(preset, corpus=None), progress=False)
    features_file(preset).unlink()
    with pytest.raises(FileNotFoundError, match='no .*features.parquet: `saeexplainer features tiny` makes it'):
        add_test_contexts(preset, progress=False)


def test_firing_contexts_are_of_the_corpus(preset):
    add_test_contexts(preset, progress=False)
    texts = [running_text(number) for number in range(12)]
    firing = [context for feature in load_features(preset) for context in feature.test_contexts]
    assert all(any(str(context) in text for text in texts) for context in firing)
