"Excerpts sorted by what an explanation says: areas, replies that make no sense, and likelihoods of a tiny model"
import math
import warnings
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from judged import Scripted, context, feature, judging_contexts
from saeexplainer.evaluation.beyond import detection_values, reader_for, sheets_of
from saeexplainer.evaluation.detection import (
    REFERENCES, LikelihoodReader, ListReader, Sheet, auroc, balanced_accuracy, evidence, excerpt_text, said_numbers,
    load_references, save_references, simulation, token_activations,
)
from saeexplainer.evaluation.texts import Claim
from saeexplainer.features import Context
from saeexplainer.replies import Reply
from saeexplainer.writers.local import LocalWriter


@pytest.fixture(scope='module')
def writer(): return LocalWriter(tiny_model(n_layers=2), tiny_tokenizer())


def sheet_of(text='weather', index=3, contexts=None):
    return Sheet(Claim(index, text), tuple(judging_contexts('rain') if contexts is None else contexts))


# areas

def by_hand(scores, fires): # every pair of a firing and a silent excerpt
    pairs = [(a, b) for a, yes in zip(scores, fires) if yes for b, no in zip(scores, fires) if not no]
    return sum((a > b) + .5*(a == b) for a, b in pairs)/len(pairs)


@pytest.mark.parametrize('seed', range(5))
def test_the_area_is_the_share_of_pairs_in_order(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, 12)
    fires = rng.random(12) < .5
    assert auroc(scores, fires) == pytest.approx(by_hand(scores, fires))


@pytest.mark.parametrize('measure', [auroc, balanced_accuracy])
@pytest.mark.parametrize('fires', [[], [True, True], [False]])
def test_one_kind_of_excerpts_gives_no_value(measure, fires):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert math.isnan(measure([1.]*len(fires), fires))


def test_saying_that_all_fire_is_chance():
    assert balanced_accuracy([True]*4, [True, False, False, False]) == .5


# replies

@pytest.mark.parametrize('reply, numbers', [
    ('1, 3', {1, 3}),
    ('Excerpts 1 and 3.', {1, 3}),
    ('0', set()),
    ('0, 2', {2}),
    ('3\n3\n3', {3}),
    ('٣', {3}), # a digit of another script
])
def test_numbers_of_a_reply(reply, numbers):
    assert said_numbers(reply, 4) == numbers


@pytest.mark.parametrize('reply', ['', 'none', '5', '1, 99', '9'*10_000, '1 ' + '0'*5000, '²'])
def test_a_reply_that_makes_no_sense_is_no_answer(reply):
    assert said_numbers(reply, 4) is None


@pytest.mark.parametrize('reply', [Reply(), Reply('', 'cut'), Reply('<script>', 'ok'), Reply('9'*5000)])
def test_a_sheet_without_an_answer_is_unavailable(reply):
    class Writer:
        def write(self, requests, **_): return [reply for _ in requests]
    [reading] = ListReader(Writer()).read([sheet_of()])
    assert np.isnan(reading.scores).all()


def test_an_answer_is_put_back_into_the_order_of_the_sheet():
    class Finds:
        def write(self, requests, **_):
            lines = [request.prompt.splitlines() for request in requests]
            return [Reply(next(line.split('.')[0] for line in some if 'saw the rain' in line)) for some in lines]
    [reading] = ListReader(Finds()).read([sheet_of()])
    assert reading.scores.tolist() == [1, 0, 0, 0]


def test_excerpts_are_shown_in_an_order_that_depends_on_the_feature():
    contexts = [context(f'number {number}', 0, kind='fires') for number in range(8)]
    prompts = {ListReader(None).request(sheet_of(index=index, contexts=contexts)).prompt for index in range(5)}
    assert len(prompts) == 5


def test_an_explanation_with_braces_is_shown_as_it_is():
    assert '{n} and {excerpts}' in ListReader(None).request(sheet_of('{n} and {excerpts}')).prompt


def test_a_failed_request_is_an_error():
    class Fails:
        def write(self, requests, **_): return [Reply(outcome='failed', error='no network') for _ in requests]
    with pytest.raises(ConnectionError, match='1 of the requests had no network'):
        ListReader(Fails()).read([sheet_of()])


def test_an_excerpt_is_one_line_however_it_is_written():
    odd = Context('a book', ('a', '\n', '\r\n', '\u2028', ' b'), (0., 1., 0., 0., 0.), 1)
    assert len(excerpt_text(odd).splitlines()) == 1
    assert '«⏎»' in excerpt_text(odd, marked=True)


# likelihoods

def test_likelihoods_are_those_of_each_token_alone(writer):
    text = ' The cat sat on the mat.'
    [together] = writer.token_log_probs([1, 2, 3], [text])
    assert together.sum() == pytest.approx(writer.log_probs([[1, 2, 3]], [text])[0])


def test_token_likelihoods_of_texts_that_are_read_together(writer):
    texts = ['The cat', '', 'She sells sea shells by the sea shore.', 'A national park']
    together = writer.token_log_probs([1, 2], texts)
    alone = [writer.token_log_probs([1, 2], [text])[0] for text in texts]
    for one, other in zip(together, alone): assert one == pytest.approx(other, abs=1e-5)


def test_more_texts_than_are_read_at_once(writer):
    texts = [f'The cat {number}' for number in range(40)]
    found = writer.token_log_probs([1, 2], texts)
    sums = [values.sum() for values in found]
    assert sums == pytest.approx(writer.log_probs([[1, 2]]*40, texts), abs=1e-4)


def test_an_empty_text_has_no_tokens(writer):
    assert writer.token_log_probs([1], [''])[0].shape == (0,)


def test_a_text_beyond_the_context_is_unavailable(writer):
    [long, short] = writer.token_log_probs([1], ['rain '*600, 'rain'])
    assert np.isnan(long).all()
    assert np.isfinite(short).all()


def test_nothing_to_score(writer):
    assert writer.token_log_probs([1], []) == []
    assert LikelihoodReader(writer).read([]) == []


def test_evidence_of_an_explanation_that_changes_nothing():
    assert evidence([0., 0.]) == pytest.approx(math.log(2))


def test_evidence_without_tokens_is_the_least():
    assert evidence([]) == -math.inf


def scores_of(writer, *sheets):
    return [reading.scores for reading in LikelihoodReader(writer).read(sheets)]


def test_half_of_the_excerpts_of_a_sheet_lie_above_its_median(writer):
    [scores] = scores_of(writer, sheet_of())
    assert (scores > 0).sum() == 2


def test_references_are_read_once(writer):
    reader = LikelihoodReader(writer)
    reader.read([sheet_of()])
    known = {key: id(values) for key, values in reader.known.items()}
    [again] = reader.read([sheet_of('snow')])
    assert {key: id(values) for key, values in reader.known.items()} == known
    assert len(again.scores) == 4


@pytest.fixture(scope='module')
def narrow(): return LocalWriter(tiny_model(n_layers=2).to(torch.bfloat16), tiny_tokenizer())


def mixed_sheets(): # equal excerpts and equal explanations among them, and excerpts of other lengths
    rain = judging_contexts('rain')
    longer = [*rain[:3], context('a very long story about the rain that never seems to end at all', 6)]
    return [
        sheet_of('weather'),
        sheet_of('weather', 4, judging_contexts('snow')),
        sheet_of('weather', 5, longer),
        sheet_of('land', 6, judging_contexts('park')*5),
        sheet_of('snow', 7),
    ]


def test_narrow_numbers_stay_narrow(narrow):
    "The model is not widened to float32, as `log_probs` does it"
    seen = []
    hook = narrow.model.register_forward_hook(lambda model, args, out: seen.append(out.logits.dtype))
    scores_of(narrow, sheet_of())
    hook.remove()
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize('which', ['writer', 'narrow'])
def test_a_sheet_has_the_same_scores_whatever_else_is_read(which, request):
    "Bit by bit, read alone, first, last or among others"
    model = request.getfixturevalue(which)
    sheets = mixed_sheets()
    alone = [scores_of(model, sheet)[0].tolist() for sheet in sheets]
    assert [scores.tolist() for scores in scores_of(model, *sheets)] == alone
    assert [scores.tolist() for scores in scores_of(model, *sheets[::-1])][::-1] == alone


def test_excerpts_of_two_sheets_are_known_by_sheet(narrow):
    reader = LikelihoodReader(narrow)
    reader.read(mixed_sheets())
    assert len(reader.known) == 4 # the first and the last have the same excerpts


@pytest.mark.parametrize('more', range(-12, 13, 2))
def test_a_context_that_is_just_too_long_for_one_of_the_prompts(writer, more):
    "The references have prompts of different lengths: one may fit where the other does not"
    prompts = [len(LikelihoodReader(writer).prompt(reference)) for reference in REFERENCES]
    size = 512 - max(prompts) + more
    long = Context('a book', (' a',)*size, (0.,)*size, 0, 'random')
    [scores] = scores_of(writer, sheet_of(contexts=[*judging_contexts('rain'), long]))
    fits = np.isfinite(scores).all()
    assert fits or np.isnan(scores).all()


def test_a_very_long_explanation_is_unavailable_and_no_other(writer):
    long, short = scores_of(writer, sheet_of('rain '*700), sheet_of('rain', index=4))
    assert np.isnan(long).all()
    assert np.isfinite(short).all()


@pytest.mark.parametrize('text', ['<|im_end|>', '</s><s>', '\ud83d'.encode('utf-8', 'replace').decode(), '🌧'*50])
def test_odd_explanations_are_read(writer, text):
    [scores] = scores_of(writer, sheet_of(text))
    assert np.isfinite(scores).all()


# references in a file

@pytest.fixture
def kept(narrow, tmp_path): # a file of references, and the reader that has read them
    reader = LikelihoodReader(narrow)
    reader.read(mixed_sheets())
    save_references(reader.known, tmp_path/'references.parquet', reader.about)
    return tmp_path/'references.parquet', reader


def test_known_references_give_the_same_digits(narrow, kept, monkeypatch):
    file, reader = kept
    again = LikelihoodReader(narrow, known=load_references(file, reader.about))
    expected = [reading.scores.tolist() for reading in reader.read(mixed_sheets())]
    asked = []
    read = narrow.token_log_probs
    monkeypatch.setattr(narrow, 'token_log_probs', lambda *args: asked.append(1) or read(*args))
    assert [reading.scores.tolist() for reading in again.read(mixed_sheets())] == expected
    assert len(asked) == len(mixed_sheets()) # no reference was read


def test_an_excerpt_beyond_the_context_is_kept_as_such(narrow, tmp_path):
    long = Context('a book', (' a',)*520, (0.,)*520, 0, 'random')
    reader = LikelihoodReader(narrow)
    sheet = sheet_of(contexts=[*judging_contexts('rain'), long])
    reader.read([sheet])
    save_references(reader.known, tmp_path/'references.parquet', reader.about)
    [found] = load_references(tmp_path/'references.parquet', reader.about).values()
    assert [np.isnan(values).any() for values in found] == [False]*4 + [True]


def test_nothing_known_can_be_kept(tmp_path):
    save_references({}, tmp_path/'references.parquet', {})
    assert load_references(tmp_path/'references.parquet', {}) == {}


@pytest.mark.parametrize('about', ['model', 'dtype', 'prompts'])
def test_references_of_another_reader_are_refused(kept, about):
    file, reader = kept
    line = f'references.parquet was read with {about} .*, not other: delete it, and the references are read anew'
    with pytest.raises(ValueError, match=line): load_references(file, reader.about | {about: 'other'})


def test_readers_differ_in_what_they_say_of_themselves(writer, narrow):
    wide = LikelihoodReader(writer).about
    assert wide['dtype'] == 'torch.float32'
    assert LikelihoodReader(narrow).about == wide | {'dtype': 'torch.bfloat16'} # a model that no folder holds


def test_a_saved_model_is_known_by_its_weights(tmp_path):
    hashes = set()
    for seed in range(2):
        model = tiny_model(n_layers=1)
        torch.nn.init.constant_(model.lm_head.weight, seed)
        model.save_pretrained(tmp_path/str(seed))
        model.name_or_path = str(tmp_path/str(seed))
        hashes.add(LikelihoodReader(LocalWriter(model, tiny_tokenizer())).about['model'])
    assert len(hashes) == 2
    assert {len(found) for found in hashes} == {64}


@pytest.mark.parametrize('content', [b'', b'not parquet', b'PAR1'*20])
def test_a_broken_file_of_references_gets_one_line(tmp_path, content):
    (tmp_path/'references.parquet').write_bytes(content)
    with pytest.raises(ValueError, match='references.parquet holds no references') as error:
        load_references(tmp_path/'references.parquet', {})
    assert '\n' not in str(error.value)


def test_another_table_holds_no_references(tmp_path):
    pd.DataFrame({'feature': [3]}).to_parquet(tmp_path/'references.parquet')
    with pytest.raises(ValueError, match='holds no references'): load_references(tmp_path/'references.parquet', {})


# simulation

def test_simulation_is_the_correlation_over_all_tokens():
    gains = [[.1, 2., -.3], [.5, .4]]
    activations = [[0., 8., 1.], [0., 0.]]
    expected = np.corrcoef([.1, 2., -.3, .5, .4], [0., 8., 1., 0., 0.])[0, 1]
    assert simulation(gains, activations) == pytest.approx(expected)


@pytest.mark.parametrize('gains, activations', [
    ([], []),
    ([[]], [[]]),
    ([[1.]], [[1.]]),
    ([[1., 2.]], [[0., 0.]]), # never fires
    ([[1., 1.]], [[0., 3.]]), # the explanation changes nothing
    ([[math.nan, 1.]], [[0., 3.]]),
    ([[1., 2., 3.]], [[0., 3.]]), # cut into other tokens
])
def test_a_simulation_without_anything_that_varies(gains, activations):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert math.isnan(simulation(gains, activations))


def test_excerpts_that_are_cut_in_two_ways_are_left_out():
    assert simulation([[0., 1.], [5., 5., 5.]], [[0., 1.], [9., 0.]]) == pytest.approx(1)


def test_a_token_has_the_strongest_activation_of_its_characters():
    whole = context('the rain fell', 1, 8.)
    tokens = tiny_tokenizer().encode(str(whole), add_special_tokens=False)
    found = token_activations(tiny_tokenizer(), whole)
    assert len(found) == len(tokens)
    assert found.max() == 8


@pytest.mark.parametrize('tokens', [('r', 'ain', '\n', '\n'), ('☃', '🌧', ' é'), ('', ' a'), ('\ufffd', '\ufffd')])
def test_tokens_of_another_tokenizer_are_found_by_their_characters(tokens):
    odd = Context('a book', tokens, tuple(map(float, range(len(tokens)))), len(tokens) - 1)
    found = token_activations(tiny_tokenizer(), odd)
    assert len(found) == len(tiny_tokenizer().encode(str(odd), add_special_tokens=False))
    assert found.max() == len(tokens) - 1


def test_a_reading_simulates(writer):
    [reading] = LikelihoodReader(writer).read([sheet_of()])
    assert -1 <= reading.simulation <= 1


def test_an_answer_in_numbers_simulates_nothing():
    [reading] = ListReader(Scripted('1')).read([sheet_of()])
    assert math.isnan(reading.simulation)


# sheets

@pytest.mark.parametrize('contexts', [
    (),
    [context('it rains', 1, 2., 'fires')],
    [context('nothing', 0, 0., 'random')],
])
def test_a_feature_without_both_kinds_gets_no_sheet(contexts):
    assert sheets_of({3: 'rain'}, {3: feature(3, test_contexts=contexts)}) == []


def test_a_reader_of_nonsense_gives_no_values():
    found = detection_values(ListReader(Scripted('I do not know')), {3: 'rain'}, {3: feature(3)})
    assert math.isnan(found['detection'][3])
    assert math.isnan(found['balanced'][3])
    assert math.isnan(found['simulation'][3])


def test_readers_by_the_kind_of_writer(writer):
    assert isinstance(reader_for(writer), LikelihoodReader)
    assert isinstance(reader_for(Scripted('1')), ListReader)


@pytest.mark.parametrize('measure', [auroc, balanced_accuracy])
def test_as_many_scores_as_excerpts(measure):
    with pytest.raises(ValueError, match='3 scores of 2 excerpts: one for each'): measure([1, 0, 1], [True, False])


def test_a_score_that_is_not_a_number_gives_no_area():
    assert math.isnan(auroc([math.nan, 1.], [True, False]))
