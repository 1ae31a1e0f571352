"Writers: the local one on tiny models, the remote one against a real server on loopback"
import json, time
import numpy as np
import pytest
import torch
from saeexplainer.store import RunStore
from saeexplainer.sampling import new_tokens, pad
from saeexplainer.writer import (BudgetSpent, LocalWriter, OpenAIWriter, Reply, Request, chat_ids, schema_error, whole_sentences)
from helpers import tiny_model, tiny_tokenizer
from writer_server import Server, completion, error

SAMPLES = {'type': 'object', 'properties': {'samples': {'type': 'array', 'items': {'type': 'string'}, 'minItems': 2}}, 'required': ['samples'],
           'additionalProperties': False}
KEY = 'sk-secret-0123456789'
PRICES = {'small': (1., 10.)} # per million tokens


# ---- texts

@pytest.mark.parametrize('text,whole', [
    ('One. Two. Thr', 'One. Two.'), ('He said "stop!" and', 'He said "stop!" and'), ('"Stop!" He r', '"Stop!"'), ('It ended. I met Mrs. S', 'It ended.'), ('About 3.5 million', 'About 3.5 million'), ('', ''),
    ('nothing ends', 'nothing ends'), ('To the U.S. coast', 'To the U.S. coast'), ('Is it? May', 'Is it?'), ('I met Mr. Smi', 'I met Mr. Smi'), ('Done.', 'Done.')])
def test_cut_texts_go_back_to_a_whole_sentence(text, whole): assert whole_sentences(text) == whole


@pytest.mark.parametrize('value,says', [
    ({'samples': ['a', 'b']}, None), (['a'], 'reply is not object'), ({'samples': ['a', 3]}, 'reply.samples[1] is not string'), ({}, "reply lacks 'samples'"),
    ({'samples': ['a', 'b'], 'x': 1}, "reply has 'x' too"), ({'samples': ['a']}, 'reply.samples has 1 items, not 2 or more')])
def test_schema(value, says): assert schema_error(value, SAMPLES) == says


def test_schema_kinds():
    assert schema_error(True, {'type': 'integer'}) == 'reply is not integer' and schema_error(3, {'type': ['string', 'number']}) is None
    assert schema_error('c', {'enum': ['a', 'b']}) == 'reply is none of a, b' and schema_error([1, 2], {'maxItems': 1}) == 'reply has 2 items, not 1 or fewer'


# ---- the local writer

@pytest.fixture(scope='module', params=['llama', 'gpt2'])
def local(request): return LocalWriter(tiny_model(request.param, n_layers=2), tiny_tokenizer(), batch_size=4)


def by_hand(writer, context, continuation):
    a = writer.tokenizer(context)['input_ids'] or [writer.tokenizer.bos_token_id]
    b = writer.tokenizer(continuation, add_special_tokens=False)['input_ids']
    with torch.no_grad(): log_probs = writer.model(torch.tensor([a + b])).logits[0].double().log_softmax(-1)
    return sum(log_probs[len(a) - 1 + i, t].item() for i, t in enumerate(b))


def test_log_probs_equal_one_row_at_a_time(local):
    contexts = ['The cat', '', 'She sells sea shells by the sea shore and the dog', 'I', 'Any context', 'The cat']*2
    continuations = [' sat on the mat', ' rain', ' x', ' think that the explanation is simple', '', ' sat on the mat']*2
    found = local.log_probs(contexts, continuations)
    assert found.dtype == np.float64 and found[4] == 0
    np.testing.assert_allclose(found, [by_hand(local, *pair) for pair in zip(contexts, continuations)], rtol=1e-5, atol=1e-4)


def test_log_probs_take_token_ids_and_nothing_at_all(local):
    ids = local.tokenizer('The cat')['input_ids']
    np.testing.assert_allclose(local.log_probs([ids], [' sat']), local.log_probs(['The cat'], [' sat']))
    assert local.log_probs([], []).shape == (0,) and local.log_probs(['a', 'b'], ['', '']).tolist() == [0, 0]
    with pytest.raises(ValueError, match='2 contexts but 1 continuations'): local.log_probs(['a', 'b'], ['c'])


def test_log_probs_with_bos():
    writer = LocalWriter(tiny_model(n_layers=2), tiny_tokenizer(add_bos=True))
    np.testing.assert_allclose(writer.log_probs(['The cat', ''], [' sat', ' sat']), [by_hand(writer, c, ' sat') for c in ('The cat', '')], atol=1e-4)


def test_replies_keep_the_order_whatever_the_batches(local):
    # top_p=1: the draw is by token, so that rounding in another batch cannot exchange two tokens of nearly equal rank
    requests = [Request('word '*(i % 5 + 1), max_tokens=8 + 4*(i % 2), seed=i, temperature=0. if i == 3 else 1., top_p=1., system='Be brief.' if i % 2 else None) for i in range(11)]
    together = local.write(requests)
    apart = [local.write([r])[0] for r in requests]
    assert together == apart and [r.prompt_tokens for r in together] == [len(chat_ids(local.tokenizer, r)) for r in requests]
    assert local.write([Request('word', seed=1)])[0].text != local.write([Request('word', seed=2)])[0].text
    assert local.write([]) == []


def test_equal_requests_are_asked_once(local):
    one, two, other = local.write([Request('word', seed=7), Request('word', seed=7), Request('word', seed=8)])
    assert (one.text, one.error) == (two.text, two.error) and (one.cached, two.cached, other.cached) == (False, True, False)


def test_new_tokens_end_at_the_end_token(local):
    rows = [chat_ids(local.tokenizer, Request(p)) for p in ('a', 'a b c')]
    greedy_tokens = lambda rows, n: new_tokens(local.model, local.tokenizer, **pad(rows, 0, left=True), max_new_tokens=n, temperature=0.)
    greedy = [ids for ids, _ in greedy_tokens(rows, 6)]
    try: # make a token that greedy decoding reaches the end token: the reply stops there, uncut
        local.model.generation_config.eos_token_id = [1, greedy[0][2]]
        (ids, cut), (_, _) = greedy_tokens(rows, 6)
        assert ids == greedy[0][:greedy[0].index(greedy[0][2]) + 1] and not cut
        assert greedy_tokens(rows[:1], len(ids) - 1) == [(ids[:-1], True)] if len(ids) > 1 else True
        assert greedy_tokens(rows[:1], len(ids)) == [(ids, False)] # the end token as the last one allowed
    finally: local.model.generation_config.eos_token_id = 2


def test_an_empty_reply_is_an_error():
    model = tiny_model(n_layers=2)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    model.lm_head.bias.data[2] = 100. # says nothing but the end token
    tokenizer = tiny_tokenizer()
    asked = len(chat_ids(tokenizer, Request('a')))
    assert LocalWriter(model, tokenizer).write([Request('a')]) == [Reply(error='empty', prompt_tokens=asked, completion_tokens=1, cost=0.)]


def test_json_from_a_model_that_knows_none_is_an_error(local):
    reply = local.write([Request('a', max_tokens=6)], schema=SAMPLES)[0]
    assert reply.text is None and reply.error in ('not JSON', 'cut before the JSON was complete', 'empty')


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
        assert [r.text for r in again] == [r.text for r in first[::-1]] and all(r.cached for r in again) and store.count('replies') == 3


def test_a_tokenizer_without_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match='has no chat template: take an instruction-tuned model as the writer'):
        LocalWriter(tiny_model(n_layers=2), tokenizer).write([Request('a')])


# ---- the server

@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    monkeypatch.delenv('OPENAI_BASE_URL', raising=False)
    servers = []
    def start(answer, **kw):
        servers.append(Server(answer))
        return servers[-1], OpenAIWriter('small', base_url=servers[-1].url, **{'tries': 3, **kw})
    yield start
    for server in servers: server.shutdown(); server.server_close()


def test_order_is_kept_and_requests_overlap(serve):
    def answer(asked, n):
        i = int(asked['messages'][-1]['content'])
        time.sleep(.3 if i % 4 == 0 else .05)
        return f'reply {i}'
    server, writer = serve(answer, concurrency=4)
    replies = writer.write([Request(str(i), seed=2**62 + i) for i in range(12)])
    assert [r.text for r in replies] == [f'reply {i}' for i in range(12)] and 2 <= server.most <= 4
    assert all(0 <= a['seed'] < 2**31 for a in server.asked) and server.keys == {f'Bearer {KEY}'}
    assert replies[0].sent == dict(max_tokens=64, temperature=.8, top_p=.95, seed=0, answered_by='small-2026')
    assert (replies[0].prompt_tokens, replies[0].completion_tokens, replies[0].cost) == (100, 10, None)


def test_system_turn(serve):
    server, writer = serve(lambda asked, n: 'fine')
    writer.write([Request('question', system='Be brief.')])
    assert server.asked[0]['messages'] == [dict(role='system', content='Be brief.'), dict(role='user', content='question')]


@pytest.mark.parametrize('trouble', [error(429, 'slow down'), error(500, 'oops'), error(503, 'busy'), 'hang up'])
def test_trouble_that_passes_is_tried_again(serve, trouble):
    server, writer = serve(lambda asked, n: trouble if n < 2 else 'fine')
    assert writer.write([Request('a')])[0].text == 'fine' and len(server.asked) == 2


def test_retry_after_is_honoured(serve):
    server, writer = serve(lambda asked, n: error(429, 'slow down', **{'Retry-After': 2}) if n == 1 else 'fine')
    began = time.time()
    assert writer.write([Request('a')])[0].text == 'fine' and time.time() - began >= 2 # without the header the first pause is .5 s


def test_a_timeout_is_tried_again(serve):
    def answer(asked, n):
        if n == 1: time.sleep(2)
        return 'fine'
    server, writer = serve(answer, timeout=.7)
    assert writer.write([Request('a')])[0].text == 'fine' and len(server.asked) >= 2


def test_a_dead_writer_stops_the_run_but_keeps_what_came(serve, tmp_path):
    store = RunStore(tmp_path/'s.sqlite')
    up = [False]
    server, writer = serve(lambda asked, n: 'fine' if up[0] or asked['messages'][-1]['content'] == 'good' else error(503, f'overloaded {KEY}'), tries=2,
                           concurrency=2, store=store)
    with pytest.raises(ConnectionError) as e: writer.write([Request('good')] + [Request(f'bad {i}') for i in range(20)])
    assert 'gave no reply in 2 tries' in str(e.value) and 'overloaded' in str(e.value) and KEY not in str(e.value) and '\n' not in str(e.value)
    assert store.count('replies') == 1 and len(server.asked) < 12 # the others were not sent any more
    up[0], asked = True, len(server.asked)
    replies = writer.write([Request('good')] + [Request(f'bad {i}') for i in range(20)])
    assert [r.text for r in replies] == ['fine']*21 and len(server.asked) == asked + 20 and replies[0].cached
    assert KEY not in ''.join(map(str, store._rows('SELECT * FROM replies')))


def test_json_is_asked_for_and_checked(serve):
    texts = {'good': '{"samples": ["a", "b"]}', 'fenced': '```json\n{"samples": ["a", "b"]}\n```', 'prose': 'Sure: a, b', 'short': '{"samples": ["a"]}', 'none': ''}
    server, writer = serve(lambda asked, n: texts[asked['messages'][-1]['content']])
    replies = dict(zip(texts, writer.write([Request(name) for name in texts], schema=SAMPLES)))
    assert server.asked[0]['response_format']['json_schema']['schema'] == SAMPLES and server.asked[0]['response_format']['json_schema']['strict']
    assert json.loads(replies['good'].text) == json.loads(replies['fenced'].text) == {'samples': ['a', 'b']}
    assert all(replies[name].text is None for name in ('prose', 'short', 'none'))
    assert [replies[n].error for n in ('prose', 'short', 'none')] == ['not JSON',
        'not the JSON that was asked for: reply.samples has 1 items, not 2 or more', 'empty']


def test_choices(serve):
    texts = {'json': '{"choice": "B"}', 'plain': ' A.', 'both': 'A or B', 'other': '{"choice": "D"}'}
    server, writer = serve(lambda asked, n: texts[asked['messages'][-1]['content']])
    replies = writer.write([Request(name) for name in texts], choices=['A', 'B', 'C'])
    assert [r.text for r in replies] == ['B', 'A', None, None] and replies[2].error == 'none of the choices A, B, C'
    assert server.asked[0]['response_format']['json_schema']['schema']['properties']['choice']['enum'] == ['A', 'B', 'C']


def test_cut_and_refused_replies(serve):
    bodies = {'cut': completion('One sentence. And a', finish='length'), 'stump': completion('no sentence at', finish='length'),
              'json': completion('{"samples": ["a', finish='length'), 'filter': completion(None, finish='content_filter'), 'refusal': completion(None, refusal='I will not.')}
    server, writer = serve(lambda asked, n: (200, bodies[asked['messages'][-1]['content']], {}))
    cut, stump = writer.write([Request('cut'), Request('stump')])
    assert (cut.text, cut.cut, stump.text, stump.cut) == ('One sentence.', True, 'no sentence at', True)
    assert writer.write([Request('json')], schema=SAMPLES)[0].error == 'cut before the JSON was complete'
    assert [r.error for r in writer.write([Request('filter'), Request('refusal')])] == ['refused: content filter', 'refused: I will not.']


def test_parameters_that_a_model_refuses_are_dropped_and_recorded(serve):
    def answer(asked, n):
        if 'max_tokens' in asked: return error(400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.", 'max_tokens')
        if 'temperature' in asked: return error(400, "Unsupported value: 'temperature' does not support 0.8 with this model.")
        return 'fine'
    server, writer = serve(answer, concurrency=1)
    with pytest.warns(UserWarning, match='small does not accept') as warned: replies = writer.write([Request('a'), Request('b'), Request('c')])
    assert [r.text for r in replies] == ['fine']*3 and len(warned) == 2
    assert replies[0].sent == dict(top_p=.95, seed=0, answered_by='small-2026') and len(server.asked) == 5 # two refusals, then remembered


def test_a_refused_prompt_is_that_requests_error(serve):
    server, writer = serve(lambda asked, n: error(400, f'flagged\nby policy {KEY}') if asked['messages'][-1]['content'] == 'bad' else 'fine')
    bad, good = writer.write([Request('bad'), Request('good')])
    assert (bad.text, good.text) == (None, 'fine') and bad.error == 'refused: flagged by policy ***'


@pytest.mark.parametrize('answer,kind,says', [
    (error(401, f'Incorrect API key provided: {KEY}'), PermissionError, 'refuses the key in OPENAI_API_KEY'),
    (error(404, 'no such model'), ValueError, "has no model 'small' (error 404)"),
    (error(429, 'quota', code='insufficient_quota'), BudgetSpent, 'has no quota left'),
    ((200, {'hello': 1}, {}), ConnectionError, 'does not answer as a chat completions server does')])
def test_a_writer_that_cannot_be_used_is_one_line(serve, answer, kind, says):
    server, writer = serve(lambda asked, n: answer, tries=1)
    with pytest.raises(kind) as e: writer.write([Request('a')])
    assert says in str(e.value) and KEY not in str(e.value) and '\n' not in str(e.value)


def test_nobody_listens(serve):
    server, writer = serve(lambda asked, n: 'fine', tries=2)
    server.shutdown(); server.server_close()
    with pytest.raises(ConnectionError, match='gave no reply in 2 tries'): writer.write([Request('a')])


def test_budget_stops_before_it_is_passed(serve, tmp_path):
    store = RunStore(tmp_path/'s.sqlite')
    server, writer = serve(lambda asked, n: 'fine', budget=.0012, prices=PRICES, concurrency=1, store=store) # .0002 a reply
    with pytest.raises(BudgetSpent) as e: writer.write([Request(str(i), max_tokens=10) for i in range(20)])
    assert 'the budget of 0.0012 is used up' in str(e.value) and 'raise the budget' in str(e.value) and '\n' not in str(e.value)
    assert .0008 < store.cost() < .0012 + 1e-9 and writer.purse.spent == pytest.approx(store.cost()) and writer.purse.reserved == pytest.approx(0)
    paid = len(server.asked)
    server, more = serve(lambda asked, n: 'fine', budget=.0012, prices=PRICES, store=store)
    assert more.purse.spent == pytest.approx(store.cost()) # what the store's replies cost counts in a new process too
    _, writer2 = serve(lambda asked, n: 'fine', prices=PRICES)
    writer2.store, writer2.client, writer2.name = store, writer.client, writer.name
    replies = writer2.write([Request(str(i), max_tokens=10) for i in range(20)])
    assert sum(r.cached for r in replies) == paid == sum(r.cost == 0 for r in replies) and [r.cost for r in replies if not r.cached] == [.0002]*(20 - paid)


def test_a_budget_needs_a_price(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    with pytest.raises(ValueError, match="a budget needs a price: prices={'small': "): OpenAIWriter('small', budget=1.)


def test_no_key(monkeypatch):
    for name in ('OPENAI_API_KEY', 'OPENAI_BASE_URL', 'MY_KEY'): monkeypatch.delenv(name, raising=False)
    with pytest.raises(PermissionError) as e: OpenAIWriter('gpt-5.4-mini')
    assert str(e.value) == 'no key: set OPENAI_API_KEY in the environment, or name a server of your own with base_url'
    with pytest.raises(PermissionError, match='set MY_KEY'): OpenAIWriter('gpt-5.4-mini', key_env='MY_KEY')
    assert OpenAIWriter('mine', base_url='http://127.0.0.1:9/v1').where == 'http://127.0.0.1' # a server of one's own needs none


def test_the_key_is_in_no_repr(serve):
    server, writer = serve(lambda asked, n: 'fine')
    assert KEY not in repr(writer) and KEY not in str(vars(writer)) and KEY not in repr(writer.write([Request('a')]))


def test_ctrl_c_while_a_batch_is_under_way(serve, tmp_path):
    store = RunStore(tmp_path/'s.sqlite')
    server, writer = serve(lambda asked, n: time.sleep(.1) or 'fine', concurrency=2, store=store)
    answers = writer._answer([Request(str(i)) for i in range(40)], None, None)
    next(answers)
    answers.close() # what an exception in the consumer does
    assert len(server.asked) <= 6
