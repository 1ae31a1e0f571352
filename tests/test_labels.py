"What a reader of contexts is shown, what is made of its answers, and the labels that were made so"
import hashlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import tiny_tokenizer
from judged import feature as real_feature
from judged import running_text, tiny_target
from saeexplainer.features import NO_PATTERN, Context, Explanation, labels_of, load_features, save_features
from saeexplainer.labels import (
    AUTOINTERP, CONTEXTS, SILENT, SILENT_SHARE, autointerp, autointerp_prompt, contrastive_prompt, marked_context,
    one_phrase, silent_contexts,
)
from saeexplainer.presets import data_dir, load_preset
from saeexplainer.replies import Reply, Request
from saeexplainer.writers.local import chat_ids
from saeexplainer.writers.openai import OpenAIWriter
from writer_server import Server


def context(text, peak, values=None):
    tokens = tuple(text.split('|'))
    values = values or [5. if i == peak else 0. for i in range(len(tokens))]
    return Context('test', tokens, tuple(values), peak)


def feature(index, *contexts): return SimpleNamespace(index=index, contexts=contexts, max_act=10.)


@pytest.mark.parametrize('c, shown', [
    (context('The| cat| sat', 1), 'The «cat» sat'),
    (context('«x»| cat', 1), '«x» «cat»'),
    (context('a|  b', 1), 'a «b»'),
    (context('a|\n|b', 1), 'a«⏎»b'),
    (context('a| b| c', 1, [0., 4., 3.]), 'a «b c»'),
    (context('a| b| c', 1, [2.1, 4., 2.]), '«a b» c'),
    (context('x', 0), '«x»')])
def test_marks(c, shown): assert marked_context(c) == shown


def test_prompt_shows_strength_and_every_context():
    prompt = autointerp_prompt([context('the| cat', 1), context('a| dog', 1, [0., 2.])], max_act=10.)
    assert '\n50: the «cat»\n20: a «dog»\n' in prompt
    assert prompt.endswith(NO_PATTERN)
    assert '\n100: the «cat»\n' in autointerp_prompt([context('the| cat', 1)])


def test_the_short_prompt_shows_words():
    whole = [context('the| cat', 1), context('sh|ips', 1)]
    assert "'cat', 'ships'" in autointerp_prompt(whole, small=True)
    assert "'$'" in autointerp_prompt([context('a|$', 1)], small=True) # or what there is


@pytest.mark.parametrize('text, phrase', [
    ('', ''),
    ('\n \n', ''),
    ("- the word 'x'.", "the word 'x'"),
    ('1. "words of love"', 'words of love'),
    ("'a' or 'b'", "'a' or 'b'"),
    ('"a" or "b"', '"a" or "b"'),
    ('NO CLEAR PATTERN.', NO_PATTERN),
    ('ships\nBecause they', 'ships'),
    ('3-letter words', '3-letter words'),
    ('...', '')])
def test_one_phrase(text, phrase): assert one_phrase(text) == phrase


def test_a_server_is_asked_once_for_each_feature(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-test')
    many = [feature(i, *[context(f'the| w{i}', 1)]*12) for i in range(5)] + [feature(9)]
    def answer(asked, n): # the second feature's words are refused by an empty answer
        text = asked['messages'][-1]['content']
        assert text.count('«w') == CONTEXTS
        if 'w1' in text: return ''
        word = text.split('«')[2].split('»')[0]
        return f"the word '{word}'."
    with Server(answer) as server:
        found = autointerp(OpenAIWriter('reader', base_url=server.url, prices={'reader': (0., 0.)}), many)
    assert found == {0: "the word 'w0'", 1: '', 2: "the word 'w2'", 3: "the word 'w3'", 4: "the word 'w4'", 9: ''}
    prompts = {asked['messages'][-1]['content'] for asked in server.asked}
    assert prompts == {autointerp_prompt(f.contexts[:CONTEXTS], 10.) for f in many[:5]}


def table_row(index, label): # of a table of features whose own labels are words
    own = [Explanation(label, 'words')] if label else []
    return dict(index=index, density=.1, max_act=1., status='ok' if label else 'unlabelled', explanation=label,
                words=[], contexts=[context('a| b', 1)], explanations=own)


def test_labels_beside_a_table(tmp_path):
    rows = [table_row(0, 'zero'), table_row(1, None), table_row(2, 'two'), table_row(3, 'three')]
    file = save_features(rows, tmp_path/'features.parquet')
    labels = dict(index=[1, 2, 0], text=['one', NO_PATTERN, 'nought'], model=['reader']*3, type=['']*3)
    pq.write_table(pa.table(labels), tmp_path/'labels.parquet')
    def load(model): return load_features(load_preset('gpt2-small-l8', features=str(file), label_model=model))
    by_reader = [(f.explanation, f.status) for f in load('reader')]
    assert by_reader == [('nought', 'ok'), ('one', 'ok'), (None, 'unlabelled'), (None, 'unlabelled')]
    assert [f.explanation for f in load(None)] == ['zero', None, 'two', 'three'] # its own labels are the default
    assert labels_of(load(None), 'reader') == {0: 'nought', 1: 'one'}
    assert Explanation(NO_PATTERN, 'reader') in load('reader')[2].explanations
    with pytest.raises(ValueError, match=r'has no labels of .gpt-5.: it has those of reader \(3\), words \(3\)'):
        load('gpt-5')


def test_shipped_labels():
    home = data_dir()/'smollm2-135m'
    table = pd.read_parquet(home/'labels.parquet')
    card = json.loads((home/'labels.json').read_text())
    assert table['index'].is_unique
    assert len(table) == card['features']
    assert (table.text == NO_PATTERN).sum() == card['no_pattern']
    assert card['prompt_sha256'] == hashlib.sha256(AUTOINTERP.encode()).hexdigest() # the prompt that was used
    assert table.text.str.split().str.len().between(3, 15).all()
    assert not table.text.str.contains(r'\.$|\n|, etc\b').any()
    check = pd.read_csv(home/'label_check.csv')
    assert len(check) == 200
    assert set(check.label_of) <= set(table['index'])


@pytest.mark.parametrize('small', [False, True])
def test_contexts_that_are_none(small):
    """Empty, with a peak beyond its end, or with fewer values than tokens

    What is left is shown, and a feature with nothing else has no explanation.
    """
    broken = [Context('s', (), (), 0), Context('s', ('a', 'b'), (0., 3.), 7),
              Context('s', ('a', 'b'), (3.,), 0), Context('s', ('a',), (3.,), -2)]
    asked = []
    def write(requests, **how):
        asked.extend(request.prompt for request in requests)
        return [Reply(text='ships') for _ in requests]
    features = [feature(1, *broken), feature(2, *broken, context('the| cat', 1))]
    assert autointerp(SimpleNamespace(write=write), features, small=small) == {1: '', 2: 'ships'}
    assert len(asked) == 1
    assert 'cat' in asked[0]


def test_control_tokens_in_contexts_are_text():
    "A feature of the end of a turn: its contexts do not end the turn in which they are shown"
    tokenizer = tiny_tokenizer()
    prompt = autointerp_prompt([Context('test', ('rain', '<|im_end|>', '<s>'), (0., 5., 0.), 1)])
    ids = chat_ids(tokenizer, Request(prompt))
    assert '«<|im_end|>»' in tokenizer.decode(ids)
    assert [i for i in ids if i < 6] == [3, 4, 3]


@pytest.mark.parametrize('unknown', [float('nan'), 0., float('inf')])
def test_an_unknown_maximum_is_the_strongest_of_what_is_shown(unknown):
    assert '\n100: the «cat»\n' in autointerp_prompt([context('the| cat', 1)], unknown)


def test_contexts_on_which_nothing_fires():
    assert '\n-100: ' in autointerp_prompt([context('the| cat', 1, [-2., -1.])])


# contexts without the feature

def test_a_contrastive_prompt_shows_both():
    prompt = contrastive_prompt([context('the| cat', 1)], [context('no| cat\n|!', 0)], max_act=10.)
    fires, silent = prompt.split('it stays silent')
    assert '\n50: the «cat»\n' in fires
    assert '\nno cat⏎!\n' in silent
    assert prompt.endswith(NO_PATTERN)


def test_the_short_form_names_other_words():
    silent = [context('the| cat', 1), context('a| dog', 1), context('my| dog', 1)]
    prompt = contrastive_prompt([context('the| cat', 1)], silent, small=True)
    assert "Words: 'cat' (unlike 'dog')\n" in prompt


@pytest.mark.parametrize('small', [False, True])
def test_nothing_to_contrast_with(small):
    fires = [context('the| cat', 1)]
    assert contrastive_prompt(fires, [], 10., small) == autointerp_prompt(fires, 10., small)


def test_the_same_words_alone_are_no_contrast_for_a_small_writer():
    fires = [context('the| cat', 1)]
    assert contrastive_prompt(fires, [context('a| cat', 1)], small=True) == autointerp_prompt(fires, small=True)


def test_a_contrastive_reader_is_shown_what_was_found(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-test')
    many = [feature(i, context(f'the| w{i}', 1)) for i in range(2)]
    with Server(lambda asked, n: 'ships') as server:
        writer = OpenAIWriter('reader', base_url=server.url, prices={'reader': (0., 0.)})
        autointerp(writer, many, silent={0: [context('a| dog', 1)]})
    prompts = {asked['messages'][-1]['content'] for asked in server.asked}
    with_contrast = contrastive_prompt(many[0].contexts, [context('a| dog', 1)], 10.)
    assert prompts == {with_contrast, autointerp_prompt(many[1].contexts, 10.)}


@pytest.fixture(scope='module')
def target(tmp_path_factory): return tiny_target(tmp_path_factory.mktemp('sae'))


def sentences(index): # contexts of a feature, from running text
    words = [f' {word}' for word in running_text(index, sentences=4).split()]
    return [context('|'.join(words[place:place + 8]), 4) for place in range(0, 32, 8)]


@pytest.fixture(scope='module')
def others(): return [real_feature(index, contexts=sentences(index)) for index in range(20, 32)]


@pytest.fixture(scope='module')
def asked(target): # with the strongest activation that each has on running text
    known = {}
    for index in range(8):
        known[index] = float(target.max_acts([running_text(number, 2) for number in range(9)], index).max())
    return [real_feature(index, max_act=max_act, contexts=sentences(index)) for index, max_act in known.items()]


def test_silent_contexts_are_silent_when_read(target, asked, others):
    found = silent_contexts(target, asked, others)
    assert any(found.values())
    for one in asked:
        texts = [str(context) for context in found[one.index]]
        assert (target.max_acts(texts, one.index) <= SILENT_SHARE*one.max_act).all()


def test_each_feature_has_its_own_few(target, asked, others):
    found = silent_contexts(target, asked, others)
    assert list(found) == [one.index for one in asked]
    assert max(map(len, found.values())) <= SILENT
    for contexts in found.values(): assert len({str(context) for context in contexts}) == len(contexts)


def test_what_is_drawn_depends_on_seed_and_feature_alone(target, asked, others):
    found = silent_contexts(target, asked, others)
    assert silent_contexts(target, asked[:2], others) == {one.index: found[one.index] for one in asked[:2]}
    assert silent_contexts(target, asked, others, seed=1) != found


def test_contexts_that_judge_are_never_shown(target, asked, others):
    "Nor texts that hold one of them, or are held by one"
    every = [context for other in others for context in other.contexts]
    judged = [replace(one, test_contexts=every) for one in asked]
    assert silent_contexts(target, judged, others) == {one.index: [] for one in asked}


def test_own_contexts_are_no_contrast(target, others):
    dead = [replace(other, max_act=math.inf) for other in others[:1]]
    assert silent_contexts(target, dead, dead) == {dead[0].index: []}


def test_nothing_to_draw_from(target, asked):
    assert silent_contexts(target, asked[:1], []) == {asked[0].index: []}
    assert silent_contexts(target, [], []) == {}
