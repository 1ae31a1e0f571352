"Test contexts from the texts that Neuronpedia lists: drawn without the model, or read with it"
import json
import random
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from judged import judged_preset, running_text
from neuronpedia_server import Neuronpedia, activation, label, stats
from saeexplainer.cli import main
from saeexplainer.features import card_of, features_file, load_features
from saeexplainer.presets import load_preset
from saeexplainer.sources import contexts, neuronpedia
from saeexplainer.sources.contexts import (
    ContextCounts, add_test_contexts, draw_listed, listed_pool, same_word, silent_excerpts,
)
from saeexplainer.sources.neuronpedia import listed_texts, neuronpedia_export
from saeexplainer.target import Target

N_FEATURES = 8
KEY = 'v1/tiny/1-res/activations/batch-{}.jsonl.gz'


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ('NO_PROXY', 'no_proxy'): monkeypatch.setenv(name, '127.0.0.1')
    monkeypatch.setattr(neuronpedia, 'PAUSE', .005)


def words_of(number, n=40): # tokens of a text
    words = running_text(number, 30).split()[:n]
    words[::10] = [f'n{number}']*len(words[::10]) # no stretch of 32 is in another text
    return [f' {word}' for word in words]


def listed_line(feature, number, strength, word): # a line of activations/, on which the feature fires on `word`
    tokens = words_of(number)
    places = [place for place, token in enumerate(tokens) if token == f' {word}'] or [len(tokens)//2]
    values = [0.]*len(tokens)
    values[places[0]] = strength
    return dict(index=str(feature), tokens=tokens, values=values, dataSource='pile')


def silent_line(feature, number):
    tokens = words_of(number)
    return dict(index=str(feature), tokens=tokens, values=[0.]*len(tokens))


def lines_of(feature): # 30 texts of its own on which it fires, from 8 down, and three on which it is silent
    firing = [listed_line(feature, 100*feature + rank, 8.*.9**rank, 'the') for rank in range(30)]
    return firing + [silent_line(feature, 100*feature + 50 + rank) for rank in range(3)]


def source_of(lines=lines_of): # files of a store
    half = N_FEATURES//2
    prefix = 'v1/tiny/1-res'
    return {
        f'{prefix}/features/batch-0.jsonl.gz': [stats(index, 8.) for index in range(N_FEATURES)],
        f'{prefix}/explanations/batch-0.jsonl.gz': [label(index, f'word {index}') for index in range(N_FEATURES)],
        KEY.format(0): [line for index in range(half) for line in lines(index)],
        KEY.format(1): [line for index in range(half, N_FEATURES) for line in lines(index)],
    }


@pytest.fixture
def store(monkeypatch):
    with Neuronpedia(source_of()) as server:
        monkeypatch.setenv('NEURONPEDIA_STORE', server.url)
        yield server


@pytest.fixture
def preset(tmp_path, monkeypatch, store):
    "A preset whose features were exported from the store"
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    neuronpedia_export('tiny', '1-res', folder=tmp_path/'export')
    given = load_preset(judged_preset(tmp_path))
    return load_preset(given, corpus=None, label_model=None, features=str(tmp_path/'export'/'features.parquet'))


@pytest.fixture
def texts(store, tmp_path): # what the store lists, as a pool
    return listed_pool(listed_texts('tiny', '1-res', tmp_path))


def kinds_of(drawn): return [context.kind for context in drawn]


def of_kind(features, kind):
    return [(feature, context) for feature in features for context in feature.test_contexts if context.kind == kind]


# ---- shards

def test_what_is_kept_apart_is_weaker_than_the_strongest(store, tmp_path):
    row = pa.concat_tables(listed_texts('tiny', '1-res', tmp_path)).to_pylist()[0]
    weakest = min(max(context['values']) for context in row['found'])
    assert len(row['found']) == 16
    assert len(row['others']) == neuronpedia.OTHERS
    assert all(max(context['values']) < weakest for context in row['others'])


def test_what_is_kept_apart_spans_all_strengths(store, tmp_path):
    row = pa.concat_tables(listed_texts('tiny', '1-res', tmp_path)).to_pylist()[0]
    values = [max(context['values']) for context in row['others']]
    assert values[0] == pytest.approx(8.*.9**16, rel=1e-3)
    assert values[-1] == pytest.approx(8.*.9**29, rel=1e-3)


def test_a_text_has_one_hash_whatever_feature_lists_it():
    rows = [neuronpedia.listed_row(listed_line(feature, 5, 3., 'the')) for feature in (1, 2)]
    assert rows[0].text == rows[1].text != neuronpedia.listed_row(listed_line(1, 6, 3., 'the')).text


def test_one_text_is_not_both_kept_and_apart():
    "Two peaks in the same text give two contexts"
    early = activation(1, peak=10, strength=9.)
    late = activation(1, peak=90, strength=2.)
    table = neuronpedia.shard_table(map(json.dumps, [early, late]), 'activations', 1)
    assert len(table['found'][0]) == 1
    assert len(table['others'][0]) == 0


def test_a_feature_with_very_many_texts_keeps_its_strongest(monkeypatch):
    monkeypatch.setattr(neuronpedia, 'MOST_LISTED', 20)
    strengths = random.Random(0).sample(range(1, 201), 200)
    lines = [json.dumps(activation(1, 50, float(strength), word=f'x{strength}')) for strength in strengths]
    [row] = neuronpedia.shard_table(lines, 'activations', 3).to_pylist()
    assert [max(context['values']) for context in row['found']] == [200, 199, 198]
    assert len(row['others']) == neuronpedia.OTHERS
    assert len(row['texts']) == 200


def test_a_feature_with_silent_texts_alone_is_no_feature(tmp_path):
    files = source_of() | {KEY.format(2): [silent_line(77, 1)]}
    with Neuronpedia(files) as server:
        made = neuronpedia_export('tiny', '1-res', folder=tmp_path, store=server.url)
    assert made.n_features == N_FEATURES


def test_shards_of_an_earlier_version_are_fetched_again(store, tmp_path):
    listed_texts('tiny', '1-res', tmp_path)
    shard = tmp_path/'shards'/'activations'/'batch-0.parquet'
    table = pq.read_table(shard)
    notes = table.schema.metadata | {b'contexts': b'16'}
    pq.write_table(table.select(['index', 'found']).replace_schema_metadata(notes), shard)
    store.log.clear()
    assert 'others' in listed_texts('tiny', '1-res', tmp_path)[0].column_names
    assert store.asked() == [KEY.format(0)]


def test_what_an_export_read_is_not_fetched_again(preset, store):
    store.log.clear()
    add_test_contexts(preset, progress=False, check=False)
    assert store.asked() == []


# ---- drawing

def test_firing_contexts_are_none_that_the_table_keeps(preset):
    add_test_contexts(preset, progress=False, check=False)
    features = load_features(preset)
    firing = of_kind(features, 'fires')
    assert len(firing) == 6*N_FEATURES
    kept = {(feature.index, context.tokens) for feature in features for context in feature.contexts}
    assert not any((feature.index, context.tokens) in kept for feature, context in firing)


def test_firing_contexts_are_above_the_lowest_level(preset):
    add_test_contexts(preset, progress=False, check=False)
    strengths = [context.values[context.peak] for _, context in of_kind(load_features(preset), 'fires')]
    assert min(strengths) >= .1*8
    assert max(strengths) < 8*.9**15


def test_unchecked_hard_contexts_are_listed_as_silent(texts):
    for feature in range(N_FEATURES):
        contexts_of = draw_listed(texts, {feature: 8.}, progress=False)[feature]
        silent = {str_of(texts, excerpt) for excerpt in texts.silent[feature]}
        assert all(str(context) in silent for context in contexts_of if context.kind == 'hard')


def str_of(texts, excerpt): return ''.join(texts.vocabulary[token] for token in texts.pool.tokens[excerpt])


def test_assumed_silent_texts_lack_the_words_at_the_peaks(texts):
    for feature in range(N_FEATURES):
        _, assumed = silent_excerpts(texts, feature).random
        for excerpt in assumed:
            words = {same_word(texts.vocabulary[token]) for token in texts.pool.tokens[excerpt]}
            assert 'the' not in words


def test_a_text_on_which_a_feature_fires_is_never_silent(texts):
    for feature in range(N_FEATURES):
        silent = silent_excerpts(texts, feature, hard=True)
        firing = set(texts.firing[feature].tolist())
        for group in (silent.hard, *silent.random):
            assert not firing & set(texts.pool.document[group].tolist())


def test_a_text_that_two_features_list_is_silent_for_neither(store, tmp_path):
    shared = [listed_line(feature, 7, .5, 'the') for feature in (0, 1)]
    files = source_of() | {KEY.format(2): shared}
    with Neuronpedia(files) as server:
        both = listed_pool(listed_texts('tiny', '1-res', tmp_path, store=server.url))
    number = set(both.firing[0].tolist()) & set(both.firing[1].tolist())
    assert number
    for feature in (0, 1):
        silent = silent_excerpts(both, feature, hard=True)
        assert not number & set(both.pool.document[silent.hard].tolist())


def test_known_silent_texts_come_first(texts):
    for feature in range(N_FEATURES):
        drawn = draw_listed(texts, {feature: 8.}, ContextCounts(0, 0, 3), progress=False)[feature]
        known = {str_of(texts, excerpt) for excerpt in texts.silent[feature]}
        assert {str(context) for context in drawn} == known


@pytest.mark.parametrize('max_act', [None, float('nan'), 0.])
def test_a_feature_of_which_nothing_is_known_has_none(texts, max_act):
    assert draw_listed(texts, {0: max_act}, progress=False) == {0: []}


def test_a_feature_that_the_store_does_not_list_has_none(texts):
    assert draw_listed(texts, {999: 8.}, progress=False) == {999: []}


def test_no_document_twice(texts):
    drawn = draw_listed(texts, dict.fromkeys(range(N_FEATURES), 8.), hard=True, progress=False)
    for contexts_of in drawn.values():
        assert len({str(context) for context in contexts_of}) == len(contexts_of)


# ---- reading

def test_the_target_is_silent_on_what_was_checked(preset):
    add_test_contexts(preset, progress=False)
    features = load_features(preset)
    silent = of_kind(features, 'hard') + of_kind(features, 'random')
    target = Target.load(preset)
    assert silent
    read = target.max_acts([str(context) for _, context in silent], [feature.index for feature, _ in silent])
    assert read.tolist() == [0.]*len(silent)


def test_checked_hard_contexts_hold_the_word(preset):
    add_test_contexts(preset, progress=False)
    hard = of_kind(load_features(preset), 'hard')
    assert hard
    for feature, context in hard:
        peaks = {fires.tokens[fires.peak] for fires in feature.test_contexts if fires.kind == 'fires'}
        assert context.tokens[context.peak] in peaks


def test_never_more_than_are_wanted(preset):
    add_test_contexts(preset, progress=False)
    for feature in load_features(preset):
        kinds = kinds_of(feature.test_contexts)
        assert kinds.count('fires') <= 6
        assert kinds.count('hard') <= 3
        assert kinds.count('random') <= 3


def test_what_cannot_be_read_is_dropped():
    class Unreadable:
        def scores(self, texts, features, progress): return ['too long']*len(texts)
    given = {3: [contexts.Context('a', ('b',), (0.,), 0, 'random'), contexts.Context('a', ('b',), (1.,), 0, 'fires')]}
    assert kinds_of(contexts.read_silent(Unreadable(), given, progress=False)[3]) == ['fires']


# ---- the table

@pytest.mark.parametrize('check', [True, False])
def test_the_same_again(preset, check):
    file = features_file(preset)
    add_test_contexts(preset, progress=False, check=check)
    first = file.read_bytes()
    add_test_contexts(preset, progress=False, check=check)
    assert file.read_bytes() == first


@pytest.mark.parametrize('check, silent', [
    (True, 'read with '),
    (False, 'listed as silent, or assumed of texts without its words'),
])
def test_the_card_says_how_silence_is_known(preset, check, silent):
    line = add_test_contexts(preset, progress=False, check=check)
    facts = card_of(features_file(preset))['test_contexts']
    assert line.startswith(f'test contexts of {N_FEATURES} features from <')
    assert facts['corpus'] == 'Neuronpedia'
    assert facts['silent'].startswith(silent)
    assert card_of(features_file(preset))['made_by'] == 'neuronpedia_export'


def test_a_corpus_can_be_read_instead(preset, tmp_path):
    add_test_contexts(preset, corpus=str(tmp_path/'texts.jsonl'), progress=False)
    assert card_of(features_file(preset))['test_contexts']['corpus'].endswith('texts.jsonl')


def test_contexts_of_a_corpus_are_always_read(preset, tmp_path):
    with pytest.raises(ValueError, match='a corpus is read with the target: only contexts of Neuronpedia are drawn'):
        add_test_contexts(preset, corpus=str(tmp_path/'texts.jsonl'), progress=False, check=False)


@pytest.mark.parametrize('lines, says', [
    (lambda feature: [], 'Neuronpedia lists no text of 32 tokens beside those that explanations are written from'),
    (lambda feature: [activation(feature, 3, n=20)], 'Neuronpedia lists no text of 32 tokens beside those'),
])
def test_nothing_is_listed_that_is_long_enough(tmp_path, lines, says):
    with Neuronpedia(source_of(lines)) as server, pytest.raises(ValueError, match=says):
        listed_pool(listed_texts('tiny', '1-res', tmp_path, store=server.url))


def test_a_source_without_activations(tmp_path):
    files = {key: rows for key, rows in source_of().items() if 'activations' not in key}
    with Neuronpedia(files) as server, pytest.raises(ValueError, match='lists no activations of tiny/1-res: name a'):
        listed_texts('tiny', '1-res', tmp_path, store=server.url)


def test_a_store_that_cannot_be_reached_leaves_the_table(preset, monkeypatch):
    monkeypatch.setenv('NEURONPEDIA_STORE', 'http://127.0.0.1:9')
    before = features_file(preset).read_bytes()
    with pytest.raises(ConnectionError, match='cannot be read'): add_test_contexts(preset, progress=False, check=False)
    assert features_file(preset).read_bytes() == before


# ---- the command

def test_the_command_draws_without_the_target(preset, tmp_path, capsys):
    file = tmp_path/'listed.yaml'
    file.write_text(f'base: smollm2-135m\nsource: tiny/1-res\nfeatures: {preset.features}\ncorpus: null\n'
                    'label_model: null\n'
                    'target: no-such-model\n')
    main(['features', str(file), '--test-contexts', '--unchecked'])
    assert f'test contexts of {N_FEATURES} features' in capsys.readouterr().err
