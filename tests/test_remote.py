"A writer behind a server: outcomes, costs and budgets, what is asked again and what is not"
import asyncio, json, signal, subprocess, sys, threading, time
from collections import Counter
from pathlib import Path
import pytest
from saeexplainer.replies import OUTCOMES, Request, reply_key
from saeexplainer.store import RunStore
from saeexplainer.writers.budget import Budget, BudgetSpent
from saeexplainer.writers.errors import FORMS, bad_request
from saeexplainer.writers.openai import OpenAIWriter
from saeexplainer.writers.parsing import answers, text_schema
from fault_server import FaultServer, faults, prompt_of
from servers import KEY, PRICES, line_of, number_of, plant_key, requests, serving, writer_at
from writer_server import completion, error

LISTS = text_schema({'samples': 4})


@pytest.fixture(autouse=True)
def environment(monkeypatch): plant_key(monkeypatch)


@pytest.fixture
def serve():
    with serving(patience=.3) as start: yield start


def book(writer, stage=''): return writer.store.accounts()[writer.name][stage]


def texts_of(reply) -> list: return json.loads(reply.text)['samples'] if reply.text else []


# ---- 2,000 requests, 64 at once, 30% of the attempts go wrong

@pytest.fixture(scope='module')
def storm(tmp_path_factory):
    "(server, writer, replies)"
    folder = tmp_path_factory.mktemp('storm')
    with pytest.MonkeyPatch.context() as patch, FaultServer(faults(.3, seed=0), log=folder/'log.jsonl') as server:
        plant_key(patch)
        store = RunStore(folder/'store.sqlite')
        writer = writer_at(server, prices=PRICES, concurrency=64, store=store, timeout=6.) # 64 on a busy machine
        yield server, writer, writer.write(requests(2000), schema=LISTS, stage='round1')


def test_every_request_is_stored(storm):
    _, writer, replies = storm
    stored = writer.store.replies([reply_key(writer.name, request, LISTS) for request in requests(2000)])
    assert len(replies) == len(stored) == 2000
    assert writer.store.count('replies') == 2000
    assert None not in stored.values()


def test_every_request_ends_in_one_recorded_outcome(storm):
    _, writer, replies = storm
    outcomes = Counter(reply.outcome for reply in replies)
    assert outcomes == book(writer, 'round1')['outcomes']
    assert set(outcomes) <= set(OUTCOMES)
    assert outcomes['ok'] > 1700
    assert outcomes['refused'] > 20
    assert not outcomes['failed']
    for reply in replies:
        assert (reply.text is None) == (reply.outcome != 'ok')
        assert (reply.error is None) == (reply.outcome == 'ok')


def test_order_is_kept_and_no_reply_is_anothers(storm):
    _, _, replies = storm
    for i, reply in enumerate(replies):
        texts = [text.casefold() for text in texts_of(reply)]
        assert all(f'#{i}:' in text or f'#{i},' in text for text in texts), (i, reply)
        if texts:
            short = (reply.counts or {}).get('short', 0)
            assert len(set(texts)) == len(texts) == 4 - short


LOST_AS = { # kinds of attempts in the store -> actions of the server
    'timeout': ['hang'], 'dropped': ['cut', 'reset', 'closed'], 'unreadable': ['bad_body'], 'replayed': ['replayed'],
    '408': ['408'], '409': ['409'], '429': ['429'], '500': ['500'], '503': ['503']}

def test_costs_are_those_of_the_servers_log(storm):
    server, writer, replies = storm
    assert writer.store.cost() == pytest.approx(server.log.cost(PRICES))
    assert writer.store.cost() == pytest.approx(sum(reply.cost or 0 for reply in replies))
    billed = sum(entry['prompt_tokens'] for entry in server.log.delivered())
    assert book(writer, 'round1')['prompt_tokens'] == billed
    assert book(writer, 'round1')['perhaps_billed'] > 0


def test_lost_attempts_are_counted_by_kind(storm):
    server, writer, replies = storm
    kept = book(writer, 'round1')['attempts']
    assert sum(kept.values()) == len(server.log) == sum(reply.attempts for reply in replies)
    actions = Counter(entry['action'] for entry in server.log)
    for kind, names in LOST_AS.items():
        assert kept[kind] == sum(actions[name] for name in names), kind
        assert kept[kind] > 10, kind


def test_texts_that_are_of_no_use_are_counted(storm):
    _, writer, _ = storm
    texts = book(writer, 'round1')['texts']
    assert texts['duplicate'] > 20
    assert texts['empty'] > 20
    assert texts['surplus'] > 20


def test_nothing_is_asked_again(storm):
    server, writer, replies = storm
    asked = len(server.log)
    again = writer_at(server, store=writer.store).write(requests(2000)[::-1], schema=LISTS)
    assert len(server.log) == asked
    assert [reply.text for reply in again[::-1]] == [reply.text for reply in replies]
    assert all(reply.cached for reply in again)
    assert all(reply.cost == 0 for reply in again)


def test_the_key_is_nowhere(storm):
    server, writer, replies = storm
    assert all(entry['authorization'] == f'Bearer {KEY}' for entry in server.log) # it was really used
    files = list(Path(writer.store.path).parent.glob('store*'))
    assert files
    for file in files: assert KEY.encode() not in file.read_bytes()
    assert KEY not in repr(writer)
    assert KEY not in str(vars(writer))
    assert KEY not in repr(replies)
    assert KEY not in json.dumps(writer.store.accounts())


# ---- killed in the middle

CLIENT = '''
import json, sys
from saeexplainer.writers.parsing import text_schema
from saeexplainer.store import RunStore
from saeexplainer.replies import Request
from saeexplainer.writers.budget import Budget
from saeexplainer.writers.openai import OpenAIWriter
url, path, n, limit = sys.argv[1:]
how = dict(concurrency=32, timeout=3., pause=.05, budget=Budget(requests=int(limit) or None))
writer = OpenAIWriter('small', base_url=url, store=RunStore(path), **how)
requests = [Request(f'Write about #{i}.', seed=i) for i in range(int(n))]
print(json.dumps([r.outcome for r in writer.write(requests, schema=text_schema({'samples': 4}))]))
'''

def client(server, path, n, limit=0):
    "A process that asks for `n` replies and prints their outcomes"
    command = [sys.executable, '-c', CLIENT, server.url, str(path), str(n), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_after(n, process, server):
    "Once the server has been asked `n` times"
    while len(server.log) < n:
        assert process.poll() is None
        time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(.2) # what was under way has come to its end


def test_kill_9_and_the_same_command(tmp_path):
    path = tmp_path/'s.sqlite'
    with FaultServer(faults(.3, seed=1), seconds=.1) as server:
        kill_after(250, client(server, path, 400), server)
        with RunStore(path) as store:
            kept = {json.loads(request)['prompt'] for request, in store.rows('SELECT request FROM replies')}
        assert 100 < len(kept) < 400
        asked = [entry['prompt'] for entry in server.log]
        out, _ = client(server, path, 400).communicate(timeout=120)
        assert len(json.loads(out)) == 400
        later = {entry['prompt'] for entry in server.log[len(asked):]}
    assert not kept & later # no stored reply is asked again
    assert len(later & set(asked)) <= 32 # what was under way
    with RunStore(path) as store:
        killed = store.accounts()['http://127.0.0.1:small']['']['attempts'].get('killed', 0)
        assert store.count('replies') == 400
        assert killed <= 32
        assert 0 <= store.count('attempts') - len(server.log) <= killed # some were written down, but not sent any more


def test_a_budget_of_requests_is_never_passed_and_goes_on(tmp_path):
    path = tmp_path/'s.sqlite'
    with FaultServer(faults(.3, seed=2)) as server:
        for limit in (50, 120):
            _, said = client(server, path, 200, limit).communicate(timeout=60)
            spent = f'BudgetSpent: the budget of {limit} requests: {limit} were sent; raise it and run the same command'
            assert f'{spent} again' in said
            assert len(server.log) == limit
        out, _ = client(server, path, 200).communicate(timeout=60)
        assert len(json.loads(out)) == 200
    answered = Counter(entry['prompt'] for entry in server.log if entry['action'] == 'ok')
    assert max(answered.values()) == 1 # a whole reply is asked for once, over three processes


# ---- budgets

def share_used(server, budget) -> float:
    "How much of a budget the log of a server accounts for"
    if budget.usd: return server.log.cost(PRICES)/budget.usd
    return sum(entry['prompt_tokens'] + entry['completion_tokens'] for entry in server.log.delivered())/budget.tokens


@pytest.mark.parametrize('budget', [Budget(usd=.02), Budget(tokens=3000)])
def test_a_budget_of_dollars_or_tokens_holds_for_what_is_under_way_too(tmp_path, budget):
    with FaultServer(seconds=.05) as server, RunStore(tmp_path/'s.sqlite') as store:
        for _ in range(2):
            writer = writer_at(server, budget=budget, prices=PRICES, concurrency=16, store=store)
            says = line_of(BudgetSpent, writer.write, requests(400))
            assert 'the budget of' in says
            assert 'raise it and run the same command again' in says
            assert .6 < share_used(server, budget) <= 1 # what requests under way give back is used
        assert writer.ledger.held == 0
        assert store.count('replies') == len(server.log.delivered()) # what was paid is kept


def test_lost_attempts_count_at_their_most():
    with FaultServer(lambda asked, n: 'hang' if n == 1 else 'ok') as server:
        writer = writer_at(server, prices=PRICES, timeout=.3, budget=Budget(usd=1.))
        reply, = writer.write(requests(1))
    assert reply.attempts == 2
    assert writer.store.cost() == pytest.approx(reply.cost)
    assert writer.store.spent()[2] > writer.store.cost()
    assert book(writer)['attempts'] == {'delivered': 1, 'timeout': 1}
    assert book(writer)['perhaps_billed'] == pytest.approx(writer.ledger.usd - reply.cost)


def test_a_budget_in_dollars_needs_a_price():
    with pytest.raises(ValueError, match="a budget in dollars needs a price: prices={'small': "):
        OpenAIWriter('small', budget=1.)


def test_a_budget_in_dollars_or_tokens_needs_a_limit_of_tokens():
    says = "takes no limit of tokens for 'small': a budget in dollars or tokens cannot be kept"
    with FaultServer(refuses=('max_tokens', 'max_completion_tokens')) as server:
        with pytest.raises(ValueError, match=says): writer_at(server, budget=1., prices=PRICES).write(requests(2))
        assert writer_at(server, budget=Budget(requests=9)).write(requests(2))[1].text


def test_the_estimate_comes_before_the_rest(capsys):
    with FaultServer(seconds=.02) as server:
        poor = writer_at(server, budget=.004, prices=PRICES)
        with pytest.raises(BudgetSpent): poor.write(requests(100), stage='round1')
        said = capsys.readouterr().err
        assert 'round1: about 92 requests, ' in said
        assert '(from the first replies); more than the budget has left ($0.004: ' in said
        assert 'it will stop there' in said
        writer_at(server, prices=PRICES).write(requests(100, 100), progress=True)
        said = capsys.readouterr().err
        assert 'about 92 requests' in said
        assert 'budget' not in said
        assert ' requests, ' in said


def test_what_was_spent_before_a_price_was_known_counts():
    with FaultServer() as server:
        writer = writer_at(server)
        writer.write(requests(50))
        priced = writer_at(server, store=writer.store, prices=PRICES, budget=9.)
        assert priced.ledger.usd == pytest.approx(server.log.cost(PRICES))


def test_a_budget_that_ends_between_two_rungs_keeps_what_is_there(tmp_path):
    with FaultServer(lambda asked, n: 'too_few' if n == 1 else 'ok') as server, RunStore(tmp_path/'s.sqlite') as store:
        poor = writer_at(server, budget=Budget(requests=1), store=store)
        with pytest.raises(BudgetSpent): poor.write(requests(2), schema=LISTS)
        assert store.count('replies') == 1
        first, _ = writer_at(server, store=store).write(requests(2), schema=LISTS)
        assert first.cached
        assert first.counts == {'short': 1}
        assert len(server.log) == 2


def test_usage_of_nothing_counts_at_its_most(serve):
    nothing = completion('fine') | dict(usage=dict(prompt_tokens=0, completion_tokens=0, total_tokens=0))
    server, writer = serve(lambda asked, n: (200, nothing, {}), budget=Budget(tokens=2000))
    with pytest.raises(BudgetSpent): writer.write(requests(40))
    assert 2 <= len(server.asked) <= 12


# ---- memory

def test_requests_are_read_no_further_ahead_than_needed():
    read = []
    def counted():
        for request in requests(400):
            read.append(request)
            yield request
    with FaultServer() as server:
        writer = writer_at(server, concurrency=4)
        ahead = [len(read) - i for i, _ in enumerate(writer.stream(counted(), total=400))]
    assert len(ahead) == 400
    assert max(ahead) <= 16*4 + 1


def test_a_slow_consumer_slows_the_reading_and_an_early_end_is_clean():
    with FaultServer() as server:
        writer = writer_at(server, concurrency=4)
        replies = writer.stream(requests(1000))
        for _ in range(3): next(replies)
        time.sleep(.5)
        assert len(server.log) <= 16*4 + 4
        replies.close()
        asked = len(server.log)
        time.sleep(.2)
        assert len(server.log) == asked
        assert writer.store.count('replies') == asked
        assert 'writer' not in [thread.name for thread in threading.enumerate()]


# ---- the ladder

LADDER = { # what happens to the attempts at each request
    1: ['fenced'],
    2: ['invalid_json', 'ok'],
    3: ['invalid_json', 'invalid_json'],
    4: ['too_few', 'ok'],
    5: ['too_many'],
    6: ['duplicates', 'ok'],
    7: ['empties', 'ok'],
    8: ['empty', 'ok'],
    9: ['half_json', 'ok'],
    10: ['half_json', 'half_json'],
    11: ['empty', 'empty'],
    12: ['invalid_json', 'too_few', 'ok']}
NO_TEXTS = { # those that have none in the end, and why
    3: ('unparsed', 'not JSON'),
    10: ('unparsed', 'cut before the JSON was complete'),
    11: ('empty', 'empty')}

@pytest.fixture(scope='module')
def climbed():
    "(replies by number, the server's log)"
    left = {i: iter(attempts) for i, attempts in LADDER.items()}
    with FaultServer(lambda asked, n: next(left[number_of(prompt_of(asked))])) as server:
        replies = writer_at(server, concurrency=1).write(requests(12, 1), schema=LISTS)
    return dict(enumerate(replies, 1)), server.log


def test_each_rung_is_tried_as_often_as_needed(climbed):
    _, log = climbed
    asked = Counter(number_of(entry['prompt']) for entry in log)
    assert asked == {i: len(attempts) for i, attempts in LADDER.items()}


def test_the_ladder_leads_to_whole_lists(climbed):
    replies, _ = climbed
    assert {i for i, reply in replies.items() if len(texts_of(reply)) == 4} == set(LADDER) - set(NO_TEXTS)
    assert {i: (replies[i].outcome, replies[i].error) for i in NO_TEXTS} == NO_TEXTS


def test_the_ladder_counts_what_it_left_out(climbed):
    replies, _ = climbed
    counts = {i: reply.counts for i, reply in replies.items() if reply.counts}
    assert counts == {5: {'surplus': 2}, 6: {'duplicate': 3}, 7: {'empty': 2}}


def test_a_reply_that_was_cut_gets_room_for_twice_as_much(climbed):
    _, log = climbed
    [again] = [entry for entry in log if number_of(entry['prompt']) == 9 and entry['attempt'] == 2]
    assert again['parameters']['max_tokens'] == 128


def test_asking_again_shows_what_came(serve):
    says = ['Sure: a, b', '{"samples": ["a", "a", "b"]}', '```json\n{"samples": ["B", "c", "d"]}\n```']
    server, writer = serve(lambda asked, n: says[n - 1])
    reply, = writer.write([Request('list')], schema=LISTS)
    assert texts_of(reply) == ['a', 'b', 'c', 'd']
    assert reply.counts == {'duplicate': 2}
    assert reply.attempts == 3
    assert (reply.prompt_tokens, reply.completion_tokens) == (300, 30)
    _, second, third = server.asked
    assert [turn['role'] for turn in second['messages']] == ['user', 'assistant', 'user']
    assert second['messages'][1]['content'] == 'Sure: a, b'
    assert 'not JSON' in second['messages'][2]['content']
    assert third['messages'][2]['content'].startswith('Some are missing. Write 2 more for "samples"')
    assert third['response_format']['json_schema']['schema']['properties']['samples']['minItems'] == 2
    assert len({asked['seed'] for asked in server.asked}) == 3


def test_choices(serve):
    says = {'json': ['{"choice": "B"}'], 'plain': [' A.'], 'both': ['A or B', '{"choice": "A"}'],
            'other': ['{"choice": "D"}', 'D']}
    server, writer = serve(lambda asked, n: says[prompt_of(asked)].pop(0))
    replies = writer.write([Request(name) for name in says], choices=['A', 'B', 'C'])
    assert [reply.text for reply in replies] == ['B', 'A', 'A', None]
    assert replies[3].error == 'none of the choices A, B, C'
    assert replies[3].outcome == 'unparsed'
    schema = server.asked[0]['response_format']['json_schema']['schema']
    assert schema['properties']['choice']['enum'] == ['A', 'B', 'C']


TOO_LONG = ("This model's maximum context length is 8192 tokens. However, you requested 9000 tokens "
            '(8936 in the messages, 64 in max_tokens)')

def test_refusals_filters_and_prompts_that_are_too_long_are_outcomes_of_their_own(serve):
    bodies = {
        'refusal': (200, completion(None, refusal=f'I will not say {KEY}.'), {}),
        'filter': (200, completion(None, finish='content_filter'), {}),
        'policy': error(400, f'flagged\nby policy {KEY}', code='content_filter'),
        'long': error(400, TOO_LONG, code='context_length_exceeded'),
        'good': (200, completion('fine'), {})}
    server, writer = serve(lambda asked, n: bodies[prompt_of(asked)])
    replies = dict(zip(bodies, writer.write([Request(name) for name in bodies], stage='s')))
    outcomes = {name: reply.outcome for name, reply in replies.items()}
    assert outcomes == dict(refusal='refused', filter='refused', policy='refused', long='rejected', good='ok')
    assert len(server.asked) == 5
    assert replies['refusal'].error == 'refused: I will not say ***.'
    assert replies['policy'].error == 'refused: error 400: flagged by policy ***'
    assert replies['filter'].error == 'refused: content filter'
    assert book(writer, 's')['outcomes'] == {'ok': 1, 'refused': 3, 'rejected': 1}
    assert not writer.dropped


def test_cut_plain_texts_and_strange_characters(serve):
    bodies = {
        'cut': completion('One sentence. And a', finish='length'),
        'stump': completion('no sentence at', finish='length'),
        'half': completion('a \ud83d half\0'),
        'none': completion(' \n ')}
    _, writer = serve(lambda asked, n: (200, bodies[prompt_of(asked)], {}))
    cut, stump, half, none = writer.write([Request(name) for name in bodies])
    assert (cut.text, cut.cut) == ('One sentence.', True)
    assert (stump.text, stump.cut) == ('no sentence at', True)
    assert half.text == 'a ? half'
    assert none.outcome == 'empty'


# ---- what a model refuses

SPELT_OUT = ('Answer with JSON like {"type": "object", "properties": {"samples": '
             '{"type": "array", "items": {"type": "string"}, "minItems": 4}}}. ')

def refusals(server) -> int: return sum(entry['action'] == 'refused_parameter' for entry in server.log)


@pytest.mark.parametrize('refuses, forms, dropped, form', [
    (('max_tokens', 'temperature', 'top_p', 'seed'), ('json_schema',),
     {'max_tokens', 'temperature', 'top_p', 'seed'}, 'schema with counts'),
    (('minItems',), ('json_schema', 'json_object'), set(), 'schema'),
    ((), ('json_object',), set(), 'JSON mode'),
    (('response_format',), (), set(), 'prompt alone')])
def test_parameters_are_dropped_once_per_model_and_remembered(tmp_path, refuses, forms, dropped, form):
    asking = [Request(f'{SPELT_OUT}Write about #{i}.', seed=i) for i in range(40)]
    with FaultServer(refuses=refuses, forms=forms) as server, RunStore(tmp_path/'s.sqlite') as store:
        writer = writer_at(server, store=store, concurrency=32)
        replies = writer.write(asking, schema=LISTS, stage='a')
        assert all(len(texts_of(reply)) == 4 for reply in replies)
        assert (set(writer.dropped), writer.form) == (dropped, form)
        refused = refusals(server)
        assert refused == len(dropped) + FORMS.index(form)
        assert not dropped & set(replies[-1].sent)
        assert ('max_completion_tokens' in replies[-1].sent) == ('max_tokens' in dropped)
        again = writer_at(server, store=store) # another process knows
        again.write([Request('Another about #99.')])
        assert refusals(server) == refused
        assert (set(again.dropped), again.form) == (dropped, form)
        known = dict(dropped=writer.dropped, form=form) if refused else None
        assert store.meta(f'writer {writer.name}') == known


@pytest.mark.parametrize('message, code, param, sent, verdict', [
    ("Unsupported value: 'temperature' does not support 0.8 with this model. Only the default (1) value is supported.",
     'unsupported_value', 'temperature', ('temperature', 'seed'), 'temperature'),
    ('Unrecognized request argument supplied: seed', None, None, ('temperature', 'seed'), 'seed'),
    ("extra fields not permitted: 'top_p'", None, None, ('top_p',), 'top_p'),
    ("Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.",
     None, 'response_format', ('response_format',), 'response_format'),
    ('`temperature` and `top_p` cannot both be specified for this model. Please use only one.',
     None, None, ('temperature', 'top_p'), 'top_p'),
    ('Your account has exceeded its monthly usage limit', None, None, ('seed',), 'bad'),
    ('Your organization has been flagged for review', None, None, ('seed',), 'bad'),
    ('temperature 1.2 exceeds the maximum of 1.0', None, None, ('temperature',), 'bad'),
    ('failed to parse grammar', None, None, ('response_format',), 'response_format'),
    ('failed to parse grammar', None, None, ('seed',), 'bad'),
    ("max_tokens is too large: 5000. This model's maximum context length is 4096 tokens",
     None, 'max_tokens', ('max_tokens',), 'rejected'),
    ('the request exceeds the available context size, try increasing it',
     'exceed_context_size_error', None, ('max_tokens',), 'rejected'),
    ('Invalid prompt: your prompt was flagged as potentially violating our usage policy',
     'invalid_prompt', None, (), 'refused'),
    ('We could not parse the JSON body', None, None, ('seed',), 'bad')])
def test_what_a_400_means(message, code, param, sent, verdict):
    assert bad_request(message, code, param, dict.fromkeys(sent)) == verdict


# ---- replies that are somebody else's, or look like it

def test_replies_to_others_are_not_taken_for_ones_own():
    def act(asked, n):
        if n % 3 == 0: return 'twice'
        return 'replayed' if n % 10 == 0 else 'ok'
    with FaultServer(act) as server: replies = writer_at(server, concurrency=16).write(requests(200))
    for i, reply in enumerate(replies): assert f'#{i}:' in reply.text


def test_a_server_with_few_ids_is_believed(serve):
    def answer(asked, n):
        return 200, completion(f'fine {n}') | dict(id=f'chatcmpl-{n//2 % 9}', created=int(time.time())), {}
    server, writer = serve(answer)
    replies = writer.write([Request(str(i)) for i in range(60)])
    assert all(reply.outcome == 'ok' for reply in replies)
    assert len(server.asked) == 60


def test_a_server_whose_ids_are_all_the_same_is_believed(serve):
    server, writer = serve(lambda asked, n: 'fine')
    assert [reply.text for reply in writer.write([Request(str(i)) for i in range(30)])] == ['fine']*30
    assert len(server.asked) == 30


# ---- small things

def test_a_reply_in_parts(serve):
    greeting = [{'type': 'text', 'text': 'Hello '}, {'type': 'text', 'text': 'there.'}]
    contents = [greeting, [{'type': 'image'}]]
    _, writer = serve(lambda asked, n: (200, completion(contents[n - 1]), {}), concurrency=1)
    whole, none = writer.write([Request('a'), Request('b')])
    assert whole.text == 'Hello there.'
    assert none.outcome == 'empty'


def test_half_characters_are_stored_and_sent(serve, tmp_path):
    bodies = [
        completion('no json \ud83d here'), completion('{"samples": ["a \\ud83d", "b", "c", "d"]}'),
        completion(None, refusal='I \ud83d no')]
    store = RunStore(tmp_path/'s.sqlite')
    _, writer = serve(lambda asked, n: (200, bodies[n - 1], {}), concurrency=1, store=store)
    first, second = writer.write([Request('a'), Request('b')], schema=LISTS)
    assert texts_of(first)[0] == 'a ?'
    assert second.error == 'refused: I ? no'
    assert store.put_texts([('s', 1, 0, 'k', 0, None, second.error, None)]) == 1


def test_two_calls_at_once_into_one_store_are_refused(serve):
    _, writer = serve(lambda asked, n: 'fine')
    one = writer.stream(requests(50))
    next(one)
    with pytest.raises(RuntimeError, match='another call is writing into this store'): writer.write(requests(1))
    one.close()
    assert writer.write(requests(1))[0].text == 'fine'


def test_what_is_sent(serve):
    server, writer = serve(lambda asked, n: 'fine')
    writer.write([Request('question', system='Be brief.', seed=2**62)])
    [asked] = server.asked
    assert asked['messages'] == [dict(role='system', content='Be brief.'), dict(role='user', content='question')]
    assert server.keys == {f'Bearer {KEY}'}


def test_what_is_kept_of_a_reply(serve):
    _, writer = serve(lambda asked, n: 'fine', prices=PRICES)
    reply, = writer.write([Request('question', system='Be brief.', seed=2**62)])
    assert reply.sent == dict(max_tokens=64, temperature=.8, top_p=.95, seed=0)
    assert reply.model == 'small-2026'
    assert reply.attempts == 1
    assert (reply.prompt_tokens, reply.completion_tokens) == (100, 10)
    assert reply.cost == pytest.approx(.0002)
    assert reply.seconds > 0


def test_equal_requests_are_asked_once():
    with FaultServer(seconds=.05) as server:
        replies = writer_at(server).write(requests(5)*3)
        assert len(server.log) == 5
    assert sum(reply.cached for reply in replies) == 10
    texts = [reply.text for reply in replies]
    assert texts == texts[:5]*3
    assert sum(reply.cost or 0 for reply in replies[5:]) == 0


def test_a_call_inside_a_running_event_loop(serve):
    "As in a notebook"
    _, writer = serve(lambda asked, n: 'fine')
    async def cell(): return writer.write([Request('a')])
    assert asyncio.run(cell())[0].text == 'fine'


def test_an_error_in_the_requests_themselves_ends_the_call(serve):
    _, writer = serve(lambda asked, n: 'fine')
    def broken():
        yield Request('a')
        raise KeyError('b')
    with pytest.raises(KeyError): list(writer.stream(broken()))
    assert writer.write([Request('c')])[0].text == 'fine'


def test_answers_pair_things_with_replies():
    with FaultServer(faults(.2, seed=5)) as server:
        writer = writer_at(server, concurrency=8)
        got = list(answers(writer, enumerate(requests(100)), {'samples': 4}, stage='s'))
    assert [i for i, _ in got] == list(range(100))
    for i, reply in got: assert not reply.text or f'#{i}' in reply.text.lower()


# ---- a real server: llama.cpp with the embedded model

def llama_requests() -> list:
    prompt = 'Write two short texts about the number {}, as JSON.'
    asking = [Request(prompt.format(i), max_tokens=96, seed=i) for i in range(24)]
    return [*asking, Request('word '*1500)]


def short_texts() -> dict:
    "A schema of two texts; the grammar keeps them short, so that a small model comes to an end"
    schema = text_schema({'samples': 2})
    schema['properties']['samples']['items']['maxLength'] = 24
    return schema


@pytest.fixture(scope='module')
def llama(llama_server, tmp_path_factory):
    "(writer, replies to `llama_requests`), sixteen at once"
    with RunStore(tmp_path_factory.mktemp('llama')/'s.sqlite') as store:
        writer = OpenAIWriter('smollm2-135m', base_url=llama_server, concurrency=16, store=store)
        yield writer, writer.write(llama_requests(), schema=short_texts(), stage='lists')


def test_llama_cpp_writes_lists_by_grammar(llama):
    writer, replies = llama
    outcomes = Counter(reply.outcome for reply in replies)
    assert outcomes['ok'] >= 16
    assert set(outcomes) <= {'ok', 'unparsed', 'empty', 'rejected'}
    for reply in replies:
        if not reply.text: continue
        assert len(texts_of(reply)) == 2 - (reply.counts or {}).get('short', 0)
        assert reply.model == 'smollm2-135m'
        assert reply.prompt_tokens > 20
        assert reply.sent['seed'] is not None
    kept = book(writer, 'lists')
    assert sum(kept['outcomes'].values()) == 25
    assert kept['completion_tokens'] > 24*5
    assert writer.form == 'schema with counts'


def test_llama_cpp_rejects_a_prompt_that_is_too_long(llama):
    _, replies = llama
    assert replies[-1].outcome == 'rejected'
    assert 'exceeds the available context size' in replies[-1].error


def test_llama_cpp_chooses(llama):
    writer, _ = llama
    asking = [Request(f'Which letter? {i}', max_tokens=24, seed=i) for i in range(6)]
    letters = writer.write(asking, choices=['A', 'B', 'C'], stage='letters')
    assert {reply.text for reply in letters if reply.outcome == 'ok'} <= set('ABC')
    assert sum(reply.outcome == 'ok' for reply in letters) >= 4
    assert sum(book(writer, 'letters')['outcomes'].values()) == 6


def test_llama_cpp_is_asked_nothing_twice(llama, llama_server):
    writer, replies = llama
    sent = writer.store.count('attempts')
    other = OpenAIWriter('smollm2-135m', base_url=llama_server, store=writer.store)
    again = other.write(llama_requests(), schema=short_texts())
    assert writer.store.count('attempts') == sent
    assert [reply.text for reply in again] == [reply.text for reply in replies]
