"What the writer is asked, which texts are shared, and what the target makes of them"
import dataclasses
import json
from types import SimpleNamespace
import numpy as np
import pytest
from saeexplainer import prefs
from saeexplainer.evaluation import texts as T
from saeexplainer.evaluation.texts import (
    KINDS, Claim, Place, TextRequests, claims_of, max_acts, neutral_subject, score_texts, verify, whole_characters,
    write_evaluation_texts,
)
from saeexplainer.presets import Sampling, TextCounts, load_preset
from saeexplainer.replies import Reply
from saeexplainer.store import RunStore


class Parrot:
    "A writer that repeats the prompt, or fills lists with what they are called"
    def __init__(self): self.prompts = []
    def write(self, requests, schema=None, **how):
        self.prompts += [request.prompt for request in requests]
        if schema is None: return [Reply(request.prompt) for request in requests]
        lists = {name: [f'{name} {i}' for i in range(one['minItems'])] for name, one in schema['properties'].items()}
        return [Reply(json.dumps(lists)) for _ in requests]


def target(scores): # text -> score
    return SimpleNamespace(scores=lambda texts, features: [scores(text) for text in texts])


@pytest.fixture
def store(tmp_path):
    with RunStore(tmp_path/'store.sqlite') as store: yield store


SMALL = load_preset('smollm2-135m', n_generative=2, n_activating=1, n_neutral=1)
CAPABLE = dataclasses.replace(SMALL, text_form='list')


# prompts

def test_evaluation_prompts_are_not_the_preference_prompt():
    texts = {prefs.ONE_TEXT, prefs.TEXT_LIST, T.GENERATIVE_ONE, T.GENERATIVE_LIST, T.ACTIVATING_ONE, T.CONTRAST_LIST,
             T.NEUTRAL_ONE}
    assert len(texts) == 7


@pytest.mark.parametrize('kind', ['generative', 'activating'])
@pytest.mark.parametrize('single', [True, False])
def test_braces_and_quotes_in_an_explanation_are_text(kind, single):
    how = dataclasses.replace(TextRequests.of(load_preset('gemma-2-9b-l20')), single=single)
    asked, = how.requests(Claim(7, 'LaTeX {braces} and "quotes"'), [Place(kind, 0)])
    assert '{braces} and "quotes"' in asked.request.prompt


def test_neutral_subjects_avoid_the_explanation():
    assert all('garden' not in neutral_subject("the word 'Garden'", seed) for seed in range(50))


def test_where_no_neutral_subject_is_left_any_will_do():
    assert neutral_subject(' '.join(T.SUBJECTS), 5) in T.SUBJECTS


@pytest.mark.parametrize('text, whole', [('a \ud83d', 'a ?'), ('\N{CLOUD} rain', '\N{CLOUD} rain')])
def test_half_characters_are_replaced(text, whole): assert whole_characters(text) == whole


# requests

HOW = TextRequests(TextCounts(2, 3, 1), Sampling(.5, .9, 20), seed=0, single=True)

def test_a_small_writer_is_asked_for_each_text():
    asked = HOW.requests(Claim(7, 'rain.'), HOW.places(KINDS))
    assert [one.places for one in asked] == [(place,) for place in HOW.places(KINDS)]
    assert len({one.request.seed for one in asked}) == 6
    assert {one.request.max_tokens for one in asked} == {20}


def test_a_capable_writer_has_room_for_all_texts():
    asked, = dataclasses.replace(HOW, single=False).requests(Claim(7, 'rain'), HOW.places(['activating', 'neutral']))
    assert len(asked.places) == 4
    assert asked.request.max_tokens == 2*20*4 + 64


def test_stages_that_say_the_same_ask_the_same():
    places = HOW.places(['generative'])
    first, other = (HOW.requests(Claim(7, 'rain', (stage,)), places) for stage in ('sft', 'dpo1'))
    assert [one.request for one in first] == [one.request for one in other]


@pytest.mark.parametrize('other', [Claim(8, 'rain'), Claim(7, 'snow')])
def test_other_claims_have_other_seeds(other):
    place = [Place('generative', 0)]
    assert HOW.requests(Claim(7, 'rain'), place)[0].request.seed != HOW.requests(other, place)[0].request.seed


# claims

def test_equal_explanations_are_one_claim():
    claims = claims_of({'sft': {7: 'ships', 8: 'rain'}, 'dpo1': {7: 'ships', 8: 'snow'}})
    assert claims == [Claim(7, 'ships', ('sft', 'dpo1')), Claim(8, 'rain', ('sft',)), Claim(8, 'snow', ('dpo1',))]


@pytest.mark.parametrize('text', ['', ' \n', None])
def test_an_empty_explanation_claims_nothing(text): assert claims_of({'sft': {7: text}}) == []


# texts in the store

@pytest.mark.parametrize('preset, requests', [(SMALL, 8), (CAPABLE, 4)])
def test_each_claim_is_written_once(store, preset, requests):
    writer = Parrot()
    explanations = {'sft': {7: 'ships', 8: 'rain'}, 'dpo1': {7: 'ships'}}
    assert write_evaluation_texts(store, writer, explanations, preset) == 2*4
    assert len(writer.prompts) == requests
    assert len(store.texts()) == 3*4


@pytest.mark.parametrize('preset', [SMALL, CAPABLE])
def test_a_later_stage_gets_the_texts_that_are_there(store, preset):
    store.put_explanations([('sft', 7, 0, 'ships')])
    write_evaluation_texts(store, Parrot(), {'sft': {7: 'ships'}}, preset)
    later = Parrot()
    assert write_evaluation_texts(store, later, {'dpo1': {7: 'ships'}}, preset) == 0
    assert later.prompts == []
    assert store.texts('dpo1')['text'].tolist() == store.texts('sft')['text'].tolist()


def test_a_stage_that_said_something_else_shares_nothing(store):
    store.put_explanations([('sft', 7, 0, 'boats')])
    write_evaluation_texts(store, Parrot(), {'sft': {7: 'boats'}}, SMALL)
    assert write_evaluation_texts(store, Parrot(), {'dpo1': {7: 'ships'}}, SMALL) == 4


def test_only_the_kinds_that_are_asked_for_are_written(store):
    write_evaluation_texts(store, Parrot(), {'sft': {7: 'ships'}}, SMALL, kinds=['generative'])
    assert set(store.texts()['kind']) == {'generative'}


def test_an_error_stands_in_the_place_of_a_text(store):
    refused = Reply(error='refused', outcome='refused')
    silent = SimpleNamespace(write=lambda requests, **how: [refused for _ in requests])
    write_evaluation_texts(store, silent, {'sft': {7: 'ships'}}, CAPABLE)
    assert store.texts()['error'].tolist() == ['refused']*4


# scores

@pytest.fixture
def written(store):
    write_evaluation_texts(store, Parrot(), {'sft': {7: 'ships', 8: 'rain'}, 'dpo1': {7: 'ships'}}, SMALL)
    return store


def test_a_text_is_read_once_for_all_its_stages(written):
    read = []
    def scores(text):
        read.append(text)
        return 1.
    assert score_texts(written, target(scores), SMALL) == 12
    assert len(read) == len(written.texts().drop_duplicates(['feature', 'text']))
    assert score_texts(written, target(scores), SMALL) == 0


def test_only_the_stages_that_are_asked_for_are_read(written):
    score_texts(written, target(len), SMALL, stages=['dpo1'])
    assert written.texts('sft')['score'].isna().all()
    assert written.texts('dpo1')['score'].notna().all()


def test_a_text_that_cannot_be_read_says_why(written):
    score_texts(written, target(lambda text: 'too long'), SMALL)
    assert set(written.texts()['error']) == {'too long'}
    assert np.isnan(max_acts(written, 'sft', 'generative', [7], 2)).all()


def test_rows_are_in_the_order_of_the_features(written):
    score_texts(written, target(lambda text: float('rain' in text)), SMALL)
    acts = max_acts(written, 'sft', 'generative', [8, 9, 7], 3)
    np.testing.assert_array_equal(acts, [[1, 1, np.nan], [np.nan]*3, [0, 0, np.nan]])


# without a store

@pytest.mark.parametrize('preset', [SMALL, CAPABLE])
def test_verify_has_texts_written_and_read(preset):
    one, empty, other = verify(target(len), Parrot(), [(7, 'ships'), (8, ' '), (7, 'rain')], preset, n=3)
    assert (one.feature, one.made, other.made) == (7, 3, 3)
    assert one.scores.tolist() == [len(text) for text in one.texts]
    assert (empty.texts, empty.made, empty.best) == ([None]*3, 0, None)


def test_verify_asks_with_seeds_of_its_own(store):
    seeds = {'evaluation': set(), 'verify': set()}
    def writer(name):
        def write(requests, **how):
            seeds[name] |= {request.seed for request in requests}
            return [Reply('a text') for _ in requests]
        return SimpleNamespace(write=write)
    write_evaluation_texts(store, writer('evaluation'), {'sft': {7: 'ships'}}, SMALL, kinds=['generative'])
    verify(target(len), writer('verify'), [(7, 'ships')], SMALL, n=2)
    assert len(seeds['verify']) == 2
    assert not seeds['verify'] & seeds['evaluation']


def test_a_text_that_verify_cannot_read_is_no_miss():
    found, = verify(target(lambda text: 'too long'), Parrot(), [(7, 'ships')], SMALL, n=2)
    assert (found.made, found.best, found.reached(0.)) == (0, None, 0)
