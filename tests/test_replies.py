"From a model's raw text to a reply: thinking, drafts, and text that costs time"
import json, random, time
import pytest
from saeexplainer.replies import Reply, Request
from saeexplainer.writers.parsing import longest_json, parse_reply, text_schema, texts_of, without_thinking

LIST = text_schema({'samples': 2})
CHOICES = ['A', 'B']
FORMS = [dict(), dict(choices=CHOICES), dict(schema=LIST)] # in which a reply may be asked for


def filled(form, draft, answer): return form.replace('{draft}', draft).replace('{answer}', answer)


def samples(text): # of a reply to LIST
    return json.loads(parse_reply(text, schema=LIST).text)['samples']


# ---- thinking

CLOSED = [
    '<think>\n{draft}\n</think>\n\n{answer}', '{draft}</think>{answer}', '<think></think>{answer}',
    '<think>a</think>{draft}<think>b</think> {answer}', '<THINK>{draft}</THINK>\n{answer}',
    '<thinking>{draft}</thinking>{answer}', '<seed:think>{draft}</seed:think>{answer}',
    '[THINK]{draft}[/THINK]{answer}', '◁think▷{draft}◁/think▷{answer}',
    '<|START_THINKING|>{draft}<|END_THINKING|><|START_RESPONSE|>{answer}<|END_RESPONSE|>',
    '<|channel>thought\n{draft}<channel|>{answer}',
    '<|channel|>analysis<|message|>{draft}<|end|><|start|>assistant<|channel|>final<|message|>{answer}<|return|>',
    '<|channel|>final<|message|>{answer}', 'analysis{draft}assistantfinal{answer}',
    '<|channel|>final <|constrain|>json<|message|>{answer}']

@pytest.mark.parametrize('form', CLOSED)
def test_what_stands_before_the_end_of_thinking_is_no_answer(form):
    plain = filled(form, 'Perhaps a dog. But no ...', 'A cat sat.')
    assert parse_reply(plain).text == 'A cat sat.'
    choice = filled(form, 'It could be {"choice": "A"}. But no ...', '{"choice": "B"}')
    assert parse_reply(choice, choices=CHOICES).text == 'B'
    assert parse_reply(filled(form, 'It is A.', 'B'), choices=CHOICES).text == 'B'
    draft = 'Maybe {"samples": ["a first draft", "of two texts"]}'
    assert samples(filled(form, draft, '{"samples": ["a cat", "a dog"]}')) == ['a cat', 'a dog']


OPENED = { # the mark that begins thoughts -> the one that ends them
    '<think >': '</think >', '< think>': '</think>', '<think time="3" src="a/b">': '</think>',
    '<mm:think>': '</mm:think>', '<scratchpad>': '</scratchpad>', '<reflection>': '</reflection>',
    '<reasoning>': '</reasoning>', '<|thought|>': '<|/thought|>', '<|begin_of_thought|>': '<|end_of_thought|>',
    '<|think_start|>': '<|think_end|>', '<|thinking|>': '<|answer|>', '<thought_process>': '</thought_process>',
    '<inner_monologue>': '</inner_monologue>', '<antThinking>': '</antThinking>', '<think>\n<think>': '</think>',
    '<thinking>Hm <reflection>': '</reflection> hm </thinking>', 'analysisWe need to see. ': 'assistantfinal',
    'analysis': 'assistantcommentaryHm.assistantfinal', 'Here is my thought process: ': '\nHere is my response: ',
    '<think>I shall end with "</think>". ': '</think>', '<think>Like ["a </think> b"]? ': '</think>'}
WRAPPED = [
    '<answer>{answer}</answer>', '<answer>{answer}', '{draft} <answer>{answer}</answer>',
    '<think>{draft}</think>\n<answer>\n{answer}\n</answer>', '<response>{answer}</response>',
    '<Final_Answer>{answer}</Final_Answer>\n', '<answer>{answer}</answer> I hope that this helps.',
    '<answer>{draft}</answer> No: <answer>{answer}</answer>',
    '<|begin_of_thought|>{draft}<|end_of_thought|><|begin_of_solution|>{answer}<|end_of_solution|>', '<think/>{answer}']
FIRST = [
    '{answer} <think>Is that ok?</think>', '{answer}\n<scratchpad>{draft}</scratchpad>\n',
    '<think>{draft}</think>{answer}<think>ok?</think>', '{answer}<think>{draft}</think><think></think>']
QUOTING = '{"samples": ["she wrote </think> on the <answer> board", "<think> begins assistantfinal"]}'
BETWEEN = [f'{begin}{{draft}}{end}{{answer}}' for begin, end in OPENED.items()]

@pytest.mark.parametrize('form', [*BETWEEN, *WRAPPED, *FIRST])
def test_thoughts_of_many_shapes_are_left_out(form):
    plain = filled(form, 'Perhaps a dog. But no ...', 'A cat sat.')
    assert parse_reply(plain) == Reply(text='A cat sat.', cut=False)
    choice = filled(form, 'It could be {"choice": "A"}. But no ...', '{"choice": "B"}')
    assert parse_reply(choice, choices=CHOICES).text == 'B'
    assert parse_reply(filled(form, 'It is A.', 'B'), choices=CHOICES).text == 'B'
    quoting = filled(form, 'Maybe {"samples": ["x </think> y", "z"]}', QUOTING)
    assert parse_reply(quoting, schema=LIST).text == QUOTING
    fenced = filled(form, 'Maybe.', f'```json\n{QUOTING}\n```')
    assert parse_reply(fenced, schema=LIST).text == QUOTING


@pytest.mark.parametrize('begin', [*OPENED, '<answer>a</answer><think>', '<think>a</think>b<mm:think >'])
@pytest.mark.parametrize('cut', [True, False])
@pytest.mark.parametrize('form', FORMS)
def test_thoughts_of_many_shapes_may_never_end(begin, cut, form):
    said = begin + 'Maybe {"samples": ["a", "b"]} and {"choice": "A"}. A'
    assert parse_reply(said, cut, **form).outcome == 'unparsed'


CUT = [
    ('A dog. No ', 'A cat sat.', dict()), ('{"choice": "A"}, no ', '{"choice": "B"}', dict(choices=CHOICES)),
    ('["x"] {"samples": ["c", "d"]}', QUOTING, dict(schema=LIST))]

@pytest.mark.parametrize('begin', OPENED)
@pytest.mark.parametrize('draft, answer, form', CUT)
def test_thoughts_that_are_cut_anywhere_are_no_answer(begin, draft, answer, form):
    whole = begin + draft + OPENED[begin] + answer
    for length in range(len(begin) + 1, len(whole) + 1):
        text = parse_reply(whole[:length], True, **form).text
        assert text is None or (answer.startswith(text) if not form else text in ('B', QUOTING)), whole[:length]


@pytest.mark.parametrize('text', ['<think', '</think', '<scratch', '<mm:thi', '[THI', '◁th', '<|channel'])
def test_a_reply_that_is_cut_within_its_first_mark_has_no_answer(text):
    assert parse_reply(text, True).outcome in ('unparsed', 'empty')


def test_what_stands_before_the_last_thoughts_is_no_answer_of_a_cut_reply():
    assert parse_reply('Let me see. <think>A cat?</think>', True).outcome == 'empty'
    assert parse_reply('{"choice": "A"} <think>ok?</think>', True, choices=CHOICES).outcome == 'empty'


@pytest.mark.parametrize('text', [
    'Maybe {"samples": ["a", "b"]}. No, rather', '{"samples": ["a", "b"]} Better: {"samples": ["c',
    'Maybe {"samples": ["a", "b"]} as in [1]', 'Maybe {"samples": ["a", "b"]}, or {"samples": ["c", "d"]}, but'])
def test_a_draft_in_a_cut_reply_is_no_answer(text):
    draft = Reply(outcome='unparsed', error='cut, and its JSON may be a draft', cut=True)
    assert parse_reply(text, True, schema=LIST) == draft
    assert parse_reply(text, False, schema=LIST).text


@pytest.mark.parametrize('text', [
    '{"samples": ["a", "b"]}\nThese texts are', '```json\n{"samples": ["a", "b"]}\n```\nThese',
    'Here they are: {"samples": ["a", "b"]}',
    '<think>Maybe {"samples": ["c", "d"]}. But</think>{"samples": ["a", "b"]}'])
def test_an_answer_in_a_cut_reply_is_one(text):
    assert parse_reply(text, True, schema=LIST).text == '{"samples": ["a", "b"]}'


@pytest.mark.parametrize('begin', [
    '<think>', '<thinking>\n', '[THINK]', '◁think▷', '<|START_THINKING|>', '<|channel>thought\n',
    '<|channel|>analysis<|message|>', '<think>a</think>b<think>', 'The answer is <think>'])
@pytest.mark.parametrize('cut', [True, False])
@pytest.mark.parametrize('form', FORMS)
def test_thinking_that_never_ends_is_an_outcome_and_no_text(begin, cut, form):
    found = parse_reply(begin + 'Maybe {"samples": ["a", "b"]} and {"choice": "A"}.', cut, **form)
    assert found == Reply(outcome='unparsed', error='thinking that never ends, without an answer', cut=cut)


def test_thoughts_without_an_answer_are_empty():
    assert parse_reply('<think>Nothing comes to mind.</think>\n ').outcome == 'empty'


@pytest.mark.parametrize('text', [
    'I think, therefore <b>I am</b>.', 'An analysis of the final assistant.', 'analysis: it rains', 'a < b > c',
    'the [1] note', '<|im_end|> ends a turn', 'thought and channel', 'analysis of the assistantfinal exam.',
    'The tag "<think>" opens it.', 'It ends with `</think>`.', "the tokens '<think>' and '</think>'",
    'She wrote (“</think>”).', 'x < think y', 'put it between <answer> and </answer> tags.',
    'In XML, <answer> is a tag.', '<reason>Bad</reason>', 'analysis-based', '<b>think</b>',
    '"She wrote </think> here"', 'a list [1] or {2}', '<think about it'])
def test_texts_without_marks_stay_as_they_are(text):
    assert without_thinking(text) == text
    assert parse_reply(text).text == text


def test_marks_inside_json_are_part_of_its_texts():
    said = json.dumps({'samples': ['It ends with </think> here.', '<think> begins it.']})
    assert parse_reply(said, schema=LIST).text == said
    read_again = texts_of(Reply(said), {'samples': 2}) # as from a store
    assert read_again['samples'][1] == ('<think> begins it.', None)


WORDS = (
    'the a analysis assistantfinal think thought final answer <b> </b> [1] {x} "said" it\'s — reasoning: é 你好 \n '
    '``` # * <br/> a<b (think) /think').split(' ')
MARKS = ['<think>', '</think>', '</answer>', '<answer>', '[THINK]', '<|channel|>final<|message|>', '</mm:think >']
AROUND = [
    '{}', '```json\n{}\n```', 'Sure! {}', '<think>hm</think>{}', '<think>hm ["x</think>"]</think>\n{}\n',
    '{} <think>ok</think>', 'assistantfinal{}', 'analysisWe need. assistantfinal{}', '<answer>{}</answer>']

def test_marks_that_lists_quote_stay_whatever_stands_around_them():
    for seed in range(200):
        rng = random.Random(seed)
        plain = 'So ' + ' '.join(rng.choices(WORDS, k=20)).strip()
        assert parse_reply(plain) == Reply(text=plain, cut=False), seed
        texts = [f'{i} ' + ' '.join(' '.join(rng.choices([*WORDS, *MARKS], k=6)).split()) for i in range(2)]
        for form in AROUND:
            said = form.replace('{}', json.dumps({'samples': texts}))
            assert samples(said) == texts, said


# ---- which JSON of several

@pytest.mark.parametrize('text, choice', [
    ('{"choice": "A"} or rather {"choice": "B"}', 'B'),
    ('{"choice":   "A"} or rather {"choice": "B"}', 'B'),
    ('{"choice": "A", "why": "it is so long"} or rather {"choice": "B"}', 'B'),
    ('{"choice": "B"} as in [1, 2, 3, 4, 5]', 'B'),
    ('{"choice": "B"}, not {"choice": "Z"} and not {"chosen": "A"}', 'B')])
def test_the_last_choice_counts(text, choice):
    assert parse_reply(text, choices=CHOICES).text == choice


@pytest.mark.parametrize('text', [
    '{"samples": ["a draft", "of two"]} Better: {"samples": ["a", "b"]}',
    '{"samples": ["...", "..."]}\n{"samples": ["a", "b"]}',
    '{"samples": ["a", "b"]} has the form {"samples": ["..."]}',
    '{"samples": ["a"]} or {"samples": ["a", "b", "c", "d"]}',
    '```json\n{"samples": ["a", "b"]}\n``` and [1, 2, 3, 4, 5, 6, 7, 8, 9]'])
def test_the_last_list_that_fits_counts(text):
    assert samples(text) == ['a', 'b']


# ---- what costs time

@pytest.mark.parametrize('text', [
    '['*200_000, '{"a":'*40_000, '[1,'*70_000, '["'*100_000, '{'*200_000, ('['*900 + 'x ')*220, '['*900 + '1,'*100_000,
    '["' + 'a'*200_000, '[' + '["a", '*30_000, '["\\'*70_000, '['*100_000 + ']'*100_000, 'a.' + ' '*200_000 + 'b',
    'word.'*40_000, '<think>'*30_000, '</think>'*25_000, 'analysis'*25_000, '<|channel|>final'*12_000,
    '<think><reflection></reflection>'*8_000, '<think'*40_000, '<' + 'a-'*90_000, '<a_'*50_000,
    '<think ' + 'a=b '*50_000, '<answer>'*25_000, '<think>"[{'*20_000, '<answer></answer>a'*12_000,
    'analysisWe' + 'assistantfinal'*15_000, '< '*80_000, '['*900 + '9'*200_000, ('[' + '9'*5_000 + ' ')*40])
def test_long_nonsense_is_read_in_well_under_a_second(text):
    began = time.process_time()
    parse_reply(text, False, schema=LIST)
    parse_reply(text, True, choices=CHOICES)
    parse_reply(text, True)
    assert time.process_time() - began < 3 # three times; it was a minute and more
    assert longest_json('['*200_000) is None


def test_a_number_of_more_digits_than_python_reads_is_no_json():
    digits = '[' + '9'*5000 + ']'
    assert longest_json(f'{digits} and {{"samples": ["a", "b"]}}') == {'samples': ['a', 'b']}
    assert parse_reply(digits, schema=LIST).error == 'not JSON'
    assert parse_reply('['*500 + digits, schema=LIST).error == 'not JSON'


@pytest.mark.parametrize('text', [
    "I'm sorry, but I cannot help with that.", 'I am sorry, but I can’t assist with this request',
    'I cannot write such a text.', 'As an AI language model, I do not'])
def test_a_refusal_in_plain_text_is_no_text(text):
    found = parse_reply(text)
    assert found.outcome == 'refused'
    assert found.text is None


@pytest.mark.parametrize('text', [
    "I'm sorry that I missed the party.", "I am sorry, I can't find my keys", 'I cannot believe it rained.',
    'The nurse said: I cannot help'])
def test_what_only_sounds_like_a_refusal_is_a_text(text):
    assert parse_reply(text) == Reply(text=text, cut=False)


def test_a_zero_byte_that_json_spells_is_left_out():
    assert samples('{"samples": ["a\\u0000b", "c"]}') == ['ab', 'c']


# ---- what may be asked

NAN = float('nan')
INF = float('inf')
WRONG = dict(
    temperature=(NAN, INF, -1, 1e-40, 1e-300, 1e300, 10**400, 'warm', None, True), top_p=(0, -1, 1.01, NAN, None),
    max_tokens=(0, -1, 1.5, NAN, None), seed=(.5, 2**64, None), prompt=(None,), system=(5,))

@pytest.mark.parametrize('name, value', [(name, value) for name, values in WRONG.items() for value in values])
def test_a_request_that_cannot_be_meant_is_refused(name, value):
    with pytest.raises(ValueError, match='^a request: ') as e: Request(**dict(prompt='Say yes.') | {name: value})
    assert name in str(e.value)
    assert '\n' not in str(e.value)
    assert len(str(e.value)) < 200


@pytest.mark.parametrize('right', [
    dict(temperature=0), dict(temperature=1e-6), dict(temperature=2), dict(top_p=1), dict(max_tokens=1), dict(seed=-1),
    dict(seed=2**63 - 1), dict(system='')])
def test_requests_at_the_ends_of_the_ranges(right):
    Request('Say yes.', **right)
