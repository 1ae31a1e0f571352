"What a reader of contexts is shown, what is made of its answers, and the labels that were made so"
from types import SimpleNamespace
import pytest
from saeexplainer.labels import AUTOINTERP, CONTEXTS, autointerp, autointerp_prompt, marked_context, one_phrase
from saeexplainer.features import NO_PATTERN, Context, Explanation, labels_of, load_features, save_features
from saeexplainer.presets import data_dir, load_preset
from helpers import tiny_tokenizer
from saeexplainer.replies import Reply, Request
from writer_server import Server
from saeexplainer.writers.openai import OpenAIWriter


def context(text, peak, values=None):
    tokens = tuple(text.split('|'))
    return Context('test', tokens, tuple(values or [5. if i == peak else 0. for i in range(len(tokens))]), peak)


def feature(index, *contexts): return SimpleNamespace(index=index, contexts=contexts, max_act=10.)


@pytest.mark.parametrize('c, shown', [
    (context('The| cat| sat', 1), 'The «cat» sat'), (context('«x»| cat', 1), '«x» «cat»'), (context('a|  b', 1), 'a «b»'), (context('a|\n|b', 1), 'a«⏎»b'),
    (context('a| b| c', 1, [0., 4., 3.]), 'a «b c»'), (context('a| b| c', 1, [2.1, 4., 2.]), '«a b» c'), (context('x', 0), '«x»')])
def test_marks(c, shown): assert marked_context(c) == shown


def test_prompt_shows_strength_and_every_context():
    prompt = autointerp_prompt([context('the| cat', 1), context('a| dog', 1, [0., 2.])], max_act=10.)
    assert '\n50: the «cat»\n20: a «dog»\n' in prompt and prompt.endswith(NO_PATTERN)
    assert '\n100: the «cat»\n' in autointerp_prompt([context('the| cat', 1)])
    for unknown in (float('nan'), 0., float('inf')): assert '\n100: the «cat»\n' in autointerp_prompt([context('the| cat', 1)], unknown)
    assert '\n-100: ' in autointerp_prompt([context('the| cat', 1, [-2., -1.])]) # nothing fires
    assert "'cat', 'ships'" in autointerp_prompt([context('the| cat', 1), context('sh|ips', 1)], small=True) # whole words
    assert "'$'" in autointerp_prompt([context('a|$', 1)], small=True) # or what there is


@pytest.mark.parametrize('text, phrase', [
    ('', ''), ('\n \n', ''), ("- the word 'x'.", "the word 'x'"), ('1. "words of love"', 'words of love'), ("'a' or 'b'", "'a' or 'b'"), ('"a" or "b"', '"a" or "b"'),
    ('NO CLEAR PATTERN.', NO_PATTERN), ('ships\nBecause they', 'ships'), ('3-letter words', '3-letter words'), ('...', '')])
def test_one_phrase(text, phrase): assert one_phrase(text) == phrase


def test_a_server_is_asked_once_for_each_feature(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-test')
    many = [feature(i, *[context(f'the| w{i}', 1)]*12) for i in range(5)] + [feature(9)]
    def answer(asked, n): # the second feature's words are refused by an empty answer
        text = asked['messages'][-1]['content']
        assert text.count('«w') == CONTEXTS
        return '' if 'w1' in text else f"the word '{text.split('«')[2].split('»')[0]}'."
    with Server(answer) as server:
        said = autointerp(OpenAIWriter('reader', base_url=server.url, prices={'reader': (0., 0.)}), many)
    assert said == {0: "the word 'w0'", 1: '', 2: "the word 'w2'", 3: "the word 'w3'", 4: "the word 'w4'", 9: ''}
    assert {asked['messages'][-1]['content'] for asked in server.asked} == {autointerp_prompt(f.contexts[:CONTEXTS], 10.) for f in many[:5]}


def test_labels_beside_a_table(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    row = lambda i, label: dict(index=i, density=.1, max_act=1., status='ok' if label else 'unlabelled', explanation=label, words=[], contexts=[context('a| b', 1)],
                                explanations=[Explanation(label, 'words')] if label else [])
    file = save_features([row(0, 'zero'), row(1, None), row(2, 'two'), row(3, 'three')], tmp_path/'features.parquet')
    pq.write_table(pa.table(dict(index=[1, 2, 0], text=['one', NO_PATTERN, 'nought'], model=['reader']*3, type=['']*3)), tmp_path/'labels.parquet')
    load = lambda model: load_features(load_preset('gpt2-small-l8', features=str(file), label_model=model))
    assert [(f.explanation, f.status) for f in load('reader')] == [('nought', 'ok'), ('one', 'ok'), (None, 'unlabelled'), (None, 'unlabelled')]
    assert [f.explanation for f in load(None)] == ['zero', None, 'two', 'three'] # the table's own labels are the default
    assert labels_of(load(None), 'reader') == {0: 'nought', 1: 'one'} and Explanation(NO_PATTERN, 'reader') in load('reader')[2].explanations
    with pytest.raises(ValueError, match=r'has no labels of .gpt-5.: it has those of reader \(3\), words \(3\)'): load('gpt-5')


def test_shipped_labels():
    import hashlib, json
    import pandas as pd
    home = data_dir()/'smollm2-135m'
    table, card = pd.read_parquet(home/'labels.parquet'), json.loads((home/'labels.json').read_text())
    assert table['index'].is_unique and len(table) == card['features'] and (table.text == NO_PATTERN).sum() == card['no_pattern']
    assert card['prompt_sha256'] == hashlib.sha256(AUTOINTERP.encode()).hexdigest() # the prompt is the one that they were made with
    assert table.text.str.split().str.len().between(3, 15).all() and not table.text.str.contains(r'\.$|\n|, etc\b').any()
    check = pd.read_csv(home/'label_check.csv')
    assert len(check) == 200 and set(check.label_of) <= set(table['index'])


@pytest.mark.parametrize('small', [False, True])
def test_contexts_that_are_none(small):
    "Empty, with a peak beyond its end, or with fewer values than tokens: what is left is shown, and a feature with nothing else has no explanation"
    broken = [Context('s', (), (), 0), Context('s', ('a', 'b'), (0., 3.), 7), Context('s', ('a', 'b'), (3.,), 0), Context('s', ('a',), (3.,), -2)]
    asked = []
    def write(requests, **how):
        asked.extend(r.prompt for r in requests)
        return [Reply(text='ships') for _ in requests]
    said = autointerp(SimpleNamespace(write=write), [feature(1, *broken), feature(2, *broken, context('the| cat', 1))], small=small)
    assert said == {1: '', 2: 'ships'} and len(asked) == 1 and 'cat' in asked[0]


def test_control_tokens_in_contexts_are_text():
    "A feature of the end of a turn: its contexts do not end the turn in which they are shown"
    from saeexplainer.writers.local import chat_ids
    tokenizer = tiny_tokenizer()
    prompt = autointerp_prompt([Context('test', ('rain', '<|im_end|>', '<s>'), (0., 5., 0.), 1)])
    ids = chat_ids(tokenizer, Request(prompt))
    assert '«<|im_end|>»' in tokenizer.decode(ids) and [i for i in ids if i < 6] == [3, 4, 3]
