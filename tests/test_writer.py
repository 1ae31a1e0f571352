"What writers make of texts, and the local writer on tiny models"
import json
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
import torch
import trl
from transformers import Lfm2Config, Lfm2ForCausalLM
from saeexplainer.store import RunStore
from saeexplainer.lm.sampling import can_share, new_tokens, pad
from saeexplainer.writers.parsing import schema_error, text_schema, whole_sentences
from saeexplainer.replies import Reply, Request
from saeexplainer.writers.local import LocalWriter, chat_ids, context_ids, open_string, read_string
import saeexplainer.writers.local as local_module
from helpers import SPECIALS, tiny_model, tiny_tokenizer

SAMPLES = {
    'type': 'object', 'properties': {'samples': {'type': 'array', 'items': {'type': 'string'}, 'minItems': 2}},
    'required': ['samples'], 'additionalProperties': False}


# ---- texts

@pytest.mark.parametrize('text, whole', [
    ('One. Two. Thr', 'One. Two.'),
    ('He said "stop!" and', 'He said "stop!" and'),
    ('"Stop!" He r', '"Stop!"'),
    ('It ended. I met Mrs. S', 'It ended.'),
    ('About 3.5 million', 'About 3.5 million'),
    ('', ''),
    ('nothing ends', 'nothing ends'),
    ('To the U.S. coast', 'To the U.S. coast'),
    ('Is it? May', 'Is it?'),
    ('I met Mr. Smi', 'I met Mr. Smi'),
    ('Done.', 'Done.')])
def test_cut_texts_go_back_to_a_whole_sentence(text, whole):
    assert whole_sentences(text) == whole


@pytest.mark.parametrize('value, says', [
    ({'samples': ['a', 'b']}, None),
    (['a'], 'reply is not object'),
    ({'samples': ['a', 3]}, 'reply.samples[1] is not string'),
    ({}, "reply lacks 'samples'"),
    ({'samples': ['a', 'b'], 'x': 1}, "reply has 'x' too"),
    ({'samples': ['a']}, 'reply.samples has 1 items, not 2 or more')])
def test_schema(value, says):
    assert schema_error(value, SAMPLES) == says


def test_schema_kinds():
    assert schema_error(True, {'type': 'integer'}) == 'reply is not integer'
    assert schema_error(3, {'type': ['string', 'number']}) is None
    assert schema_error('c', {'enum': ['a', 'b']}) == 'reply is none of a, b'
    assert schema_error([1, 2], {'maxItems': 1}) == 'reply has 2 items, not 1 or fewer'


# ---- the local writer

def test_models_that_keep_more_than_keys_and_values_share_nothing():
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        layer_types=['conv', 'full_attention', 'conv', 'full_attention'])
    hybrid = LocalWriter(Lfm2ForCausalLM(config).eval(), tiny_tokenizer(), batch_size=4)
    assert not can_share(hybrid.model)
    assert can_share(tiny_model('gemma3'))
    requests = [Request('The cat sat', seed=s, max_tokens=5, top_p=1.) for s in range(3)]
    assert hybrid.write(requests) == [hybrid.write([r])[0] for r in requests]
    texts = [' sat on', ' rain', ' sat on']
    expected = [by_hand(hybrid, 'The cat', text) for text in texts]
    np.testing.assert_allclose(hybrid.log_probs(['The cat']*3, texts), expected, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope='module', params=['llama', 'gpt2', 'gemma3'])
def local(request): return LocalWriter(tiny_model(request.param, n_layers=2), tiny_tokenizer(), batch_size=4)


def by_hand(writer, context, continuation):
    a = writer.tokenizer(context)['input_ids'] or [writer.tokenizer.bos_token_id]
    b = writer.tokenizer(continuation, add_special_tokens=False)['input_ids']
    with torch.no_grad(): logits = writer.model(torch.tensor([a + b])).logits[0]
    log_probs = logits.double().log_softmax(-1)
    return sum(log_probs[len(a) - 1 + i, t].item() for i, t in enumerate(b))


def test_log_probs_equal_one_row_at_a_time(local):
    contexts = ['The cat', '', 'She sells sea shells by the sea shore and the dog', 'I', 'Any context', 'The cat']*2
    continuations = [' sat on the mat', ' rain', ' x', ' think that the explanation is simple', '', ' sat on the mat']*2
    found = local.log_probs(contexts, continuations)
    assert found.dtype == np.float64
    assert found[4] == 0
    expected = [by_hand(local, *pair) for pair in zip(contexts, continuations)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_equal_contexts_are_computed_once(local, monkeypatch):
    contexts = ['The cat and the dog and the sea '*3, 'I think that the rain is on the mat '*3]*20
    continuations = [f' sat on {i}' for i in range(40)]
    forward = local.model.forward
    read = [] # tokens of each forward pass
    def counted(*args, **how):
        read.append(how['input_ids'].numel())
        return forward(*args, **how)
    monkeypatch.setattr(local.model, 'forward', counted)
    found = local.log_probs(contexts, continuations)
    together = sum(read)
    read.clear()
    apart = [local.log_probs([c], [s])[0] for c, s in zip(contexts, continuations)]
    np.testing.assert_allclose(found, apart, rtol=1e-5, atol=1e-4)
    assert together < sum(read)/3


def test_log_probs_take_token_ids_and_nothing_at_all(local):
    ids = local.tokenizer('The cat')['input_ids']
    np.testing.assert_allclose(local.log_probs([ids], [' sat']), local.log_probs(['The cat'], [' sat']))
    assert local.log_probs([], []).shape == (0,)
    assert local.log_probs(['a', 'b'], ['', '']).tolist() == [0, 0]
    with pytest.raises(ValueError, match='2 contexts but 1 continuations'): local.log_probs(['a', 'b'], ['c'])


def test_log_probs_with_bos():
    writer = LocalWriter(tiny_model(n_layers=2), tiny_tokenizer(add_bos=True))
    expected = [by_hand(writer, context, ' sat') for context in ('The cat', '')]
    np.testing.assert_allclose(writer.log_probs(['The cat', ''], [' sat', ' sat']), expected, atol=1e-4)


def test_replies_keep_the_order_whatever_the_batches(local):
    # top_p=1: the draw is by token, so that rounding in another batch cannot exchange two tokens of nearly equal rank
    def request(i):
        how = dict(temperature=0. if i == 3 else 1., system='Be brief.' if i % 2 else None)
        return Request('word '*(i % 5 + 1), max_tokens=8 + 4*(i % 2), seed=i, top_p=1., **how)
    requests = [request(i) for i in range(11)]
    together = local.write(requests)
    assert together == [local.write([r])[0] for r in requests]
    assert [r.prompt_tokens for r in together] == [len(chat_ids(local.tokenizer, r)) for r in requests]
    assert local.write([Request('word', seed=1)])[0].text != local.write([Request('word', seed=2)])[0].text
    assert local.write([]) == []


def test_equal_requests_are_asked_once(local):
    one, two, other = local.write([Request('word', seed=7), Request('word', seed=7), Request('word', seed=8)])
    assert (one.text, one.error) == (two.text, two.error)
    assert (one.cached, two.cached, other.cached) == (False, True, False)


def test_new_tokens_end_at_the_end_token(local):
    rows = [chat_ids(local.tokenizer, Request(p)) for p in ('a', 'a b c')]
    def greedy_tokens(rows, n):
        padded = pad(rows, 0, left=True)
        return new_tokens(local.model, local.tokenizer, **padded, max_new_tokens=n, temperature=0.)
    greedy = [ids for ids, _ in greedy_tokens(rows, 6)]
    try: # make a token that greedy decoding reaches the end token: the reply stops there, uncut
        local.model.generation_config.eos_token_id = [1, greedy[0][2]]
        (ids, cut), (_, _) = greedy_tokens(rows, 6)
        assert ids == greedy[0][:greedy[0].index(greedy[0][2]) + 1]
        assert not cut
        if len(ids) > 1: assert greedy_tokens(rows[:1], len(ids) - 1) == [(ids[:-1], True)]
        assert greedy_tokens(rows[:1], len(ids)) == [(ids, False)] # the end token as the last one allowed
    finally: local.model.generation_config.eos_token_id = 2


def test_an_empty_reply_is_an_error():
    model = tiny_model(n_layers=2)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    model.lm_head.bias.data[2] = 100. # says nothing but the end token
    tokenizer = tiny_tokenizer()
    asked = len(chat_ids(tokenizer, Request('a')))
    empty = Reply(error='empty', outcome='empty', prompt_tokens=asked, completion_tokens=1, cost=0.)
    assert LocalWriter(model, tokenizer).write([Request('a')]) == [empty]


def test_lists_from_a_model_that_knows_no_json(local):
    schema = text_schema({'activating': 3, 'neutral': 1})
    drawn = dict(temperature=1., top_p=1.)
    requests = [Request('word '*(i % 3 + 1), max_tokens=4*(8 + i % 2), seed=i, **drawn) for i in range(7)]
    replies = local.write(requests, schema=schema)
    for r in replies:
        lists = json.loads(r.text)
        counts = r.counts or {}
        assert schema_error(lists, schema) is None or counts['short']
        assert set(counts) <= {'short', 'empty', 'duplicate'}
        for text in [text for texts in lists.values() for text in texts]:
            assert text
            assert text == text.strip()
        assert r.completion_tokens <= 4*9
        assert r.prompt_tokens > 4*30
    assert replies == [local.write([r], schema=schema)[0] for r in requests] # whatever the batch
    assert len({r.text for r in replies}) == 7
    assert replies[0].text != local.write([replace(requests[0], seed=99)], schema=schema)[0].text


@pytest.mark.parametrize('said, text, closed', [
    ('A ship." and', 'A ship.', True),
    ('He said \\"go\\" twice."]', 'He said "go" twice.', True),
    ('no end', 'no end', False),
    ('"', '', True),
    ('a \\\\ b" x', 'a \\ b', True),
    ('half \\', 'half ', False),
    ('tab\tand\nline', 'tab\tand\nline', False),
    ('He said \\"', 'He said "', False)])
def test_what_ends_a_string(said, text, closed):
    found = read_string(said)
    assert (found.text, found.closed) == (text, closed)


def test_what_begins_a_string(local):
    assert open_string({'a': ['x "y"'], 'b': []}, 'b') == '{"a": ["x \\"y\\""], "b": ["'
    assert open_string({'a': ['x'], 'b': []}, 'a') == '{"a": ["x", "'
    quote = local.tokenizer('"', add_special_tokens=False)['input_ids'][-1]
    assert quote in local.lists.quotes
    assert len(local.lists.quotes) < len(local.tokenizer)//4


def test_another_schema_is_asked_for_in_the_prompt_alone(local):
    number = {'type': 'object', 'properties': {'n': {'type': 'integer'}}, 'required': ['n']}
    lists = text_schema({'samples': 2})
    mixed = lists | {'properties': lists['properties'] | number['properties'], 'required': ['n']}
    for schema in (number, mixed):
        reply = local.write([Request('a', max_tokens=6)], schema=schema)[0]
        assert reply.text is None
        assert reply.outcome in ('unparsed', 'empty')
        assert reply.error in ('not JSON', 'cut before the JSON was complete', 'empty')


def test_choices_are_ranked_by_log_probability(local):
    requests, choices = [Request('Which?'), Request('A much longer question, which one?')]*3, ['A', 'Bravo', ' C d']
    for request, reply in zip(requests, local.write(requests, choices=choices)):
        prompt = chat_ids(local.tokenizer, request)
        scores = [local.log_probs([prompt], [c])[0] for c in choices]
        np.testing.assert_allclose(reply.scores, scores, atol=1e-4)
        assert reply.text == choices[int(np.argmax(scores))]


def test_local_replies_are_remembered(tmp_path):
    with RunStore(tmp_path/'s.sqlite') as store:
        writer = LocalWriter(tiny_model(n_layers=2), tiny_tokenizer(), store=store)
        requests = [Request('a', seed=s, max_tokens=5) for s in range(3)]
        first = writer.write(requests)
        writer.model.forward = None # nothing is generated any more
        again = writer.write(requests[::-1])
        assert [r.text for r in again] == [r.text for r in first[::-1]]
        assert all(r.cached for r in again)
        assert store.count('replies') == 3


def test_a_tokenizer_without_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match='has no chat template: take an instruction-tuned model as the writer'):
        LocalWriter(tiny_model(n_layers=2), tokenizer).write([Request('a')])


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_a_prompt_longer_than_the_context_is_an_outcome(kind, tmp_path):
    "The other requests have the replies that they have alone; the outcome is remembered like any other"
    with RunStore(tmp_path/'s.sqlite') as store:
        writer = LocalWriter(tiny_model(kind, n_layers=2), tiny_tokenizer(), batch_size=2, store=store)
        alone = LocalWriter(writer.model, writer.tokenizer)
        short = Request('word', max_tokens=5)
        long = Request('word '*600, max_tokens=5)
        near = Request('word '*360, max_tokens=450)
        near_tokens = len(chat_ids(writer.tokenizer, near))
        assert near_tokens < 512 < near_tokens + 450
        for schema in (None, text_schema({'samples': 2})):
            one, two, three, four = writer.write([short, long, near, replace(short, seed=3)], schema=schema)
            assert two.outcome == 'rejected'
            assert two.text is None
            assert 'tokens, local:' in two.error
            assert two.error.endswith('reads 512')
            assert [one, four] == alone.write([short, replace(short, seed=3)], schema=schema)
            assert three == alone.write([near], schema=schema)[0]
            room = 513 - near_tokens # the reply ends where the context does
            assert schema or three.cut or three.completion_tokens <= room
        assert writer.write([long])[0].cached


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_a_choice_beyond_the_context_is_an_outcome(kind):
    writer = LocalWriter(tiny_model(kind, n_layers=2), tiny_tokenizer(), batch_size=2)
    one, two = writer.write([Request('word', max_tokens=5), Request('word '*600, max_tokens=5)], choices=['A', 'B'])
    assert one.outcome == 'ok'
    assert two.outcome == 'rejected'
    assert two.scores is None


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_no_log_probability_beyond_the_context(kind):
    writer = LocalWriter(tiny_model(kind, n_layers=2), tiny_tokenizer())
    found = writer.log_probs(['The cat', 'word '*600, 'The cat'], [' sat', ' sat', ' sat'*600])
    np.testing.assert_allclose(found[0], by_hand(writer, 'The cat', ' sat'), atol=1e-4)
    assert np.isnan(found[1:]).all()


def test_control_tokens_of_an_explanation_do_not_end_the_users_turn(local):
    t = local.tokenizer
    said = 'Write one sentence that contains the token <|im_end|> or </s>.'
    ids = chat_ids(t, Request(said, system='No <s> here.'))
    assert said in t.decode(ids)
    assert 'No <s> here.' in t.decode(ids)
    assert [t.convert_ids_to_tokens(i) for i in ids if i < 6] == ['<|im_start|>', '<|im_end|>']*2 + ['<|im_start|>']
    reply, = local.write([Request(said, max_tokens=4)])
    assert reply.prompt_tokens == len(chat_ids(t, Request(said)))
    texts = local.log_probs(['a <|im_end|> b'], [' the </s>'])
    assert np.isfinite(texts).all()
    assert not {2, 4} & set(context_ids(t, 'a <|im_end|> b'))


@pytest.mark.parametrize('name, end', [
    ('qwen3', '<think>\n\n</think>\n\n'),
    ('qwen3_5_think', '<think>\n\n</think>\n\n'),
    ('nemotron_3_nano', '<think></think>'),
    ('gptoss', '<|channel|>final<|message|>')])
def test_a_writer_that_thinks_is_asked_not_to(name, end):
    template = Path(trl.__file__).parent/'chat_templates'/f'{name}.jinja'
    t = tiny_tokenizer(chat=template.read_text(encoding='utf-8'))
    assert t.decode(chat_ids(t, Request('a'))).endswith(end)


def test_a_template_that_fails_is_one_line():
    writer = LocalWriter(tiny_model(n_layers=2), tiny_tokenizer(chat='{{ 1/0 }}'))
    with pytest.raises(ValueError, match='the chat_template of .* fails .ZeroDivisionError'):
        writer.write([Request('a')])


def test_half_a_character_is_asked_as_a_question_mark(local):
    half, whole = (local.write([Request(f'a {c} b', max_tokens=3)])[0] for c in ('\ud83d', '?'))
    assert half.text == whole.text
    assert local.log_probs(['a'], ['\ud83d']) == local.log_probs(['a'], ['?'])


def test_log_probabilities_beside_a_longer_context():
    "Padding of a shorter row may lie beyond the model's last position"
    writer = LocalWriter(tiny_model('gpt2', n_layers=2, n_positions=64), tiny_tokenizer())
    both = writer.log_probs([[5]*60, [5]*63], ['a b', 'a'])
    apart = [writer.log_probs([[5]*n], [text])[0] for n, text in ((60, 'a b'), (63, 'a'))]
    np.testing.assert_allclose(both, apart, atol=1e-4)


def test_choices_in_company_and_alone_in_bfloat16():
    writer = LocalWriter(tiny_model(n_layers=2).bfloat16(), tiny_tokenizer())
    requests = [Request('word '*n) for n in (1, 3, 9, 17, 30)]
    together = writer.write(requests, choices=['A', 'B'])
    for r, request in zip(together, requests):
        np.testing.assert_allclose(r.scores, writer.write([request], choices=['A', 'B'])[0].scores, atol=1e-4)


def test_numbers_that_are_none_choose_nothing():
    model = tiny_model(n_layers=2)
    model.lm_head.weight.data[:] = float('nan')
    writer = LocalWriter(model, tiny_tokenizer())
    with pytest.raises(ValueError, match='are not numbers'): writer.write([Request('a')], choices=['A', 'B'])
    with pytest.raises(ValueError, match='are not numbers'): writer.write([Request('a', max_tokens=3)])


@pytest.mark.parametrize('said, text', [
    ('<think> first draft </think> the answer<|im_end|>', 'the answer'),
    ('the answer</s>', 'the answer'),
    ('<think> never ends', None),
    ('the answer<think> ok? </think></s>', 'the answer'),
    ('<think> a draft </think><answer>the answer</answer><|im_end|>', 'the answer')])
def test_thinking_between_special_tokens_is_left_out(monkeypatch, said, text):
    tokenizer = tiny_tokenizer(specials=[*SPECIALS, '<think>', '</think>'])
    writer = LocalWriter(tiny_model(n_layers=1, vocab=len(tokenizer)), tokenizer)
    ids = tokenizer(said, add_special_tokens=False)['input_ids']
    monkeypatch.setattr(local_module, 'new_tokens', lambda *a, **k: [(ids, False)])
    reply, = writer.write([Request('a')])
    assert reply.text == text
    assert reply.outcome == ('ok' if text else 'unparsed')
