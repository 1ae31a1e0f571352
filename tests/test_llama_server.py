"llama.cpp's server with the embedded model, seen by the plain openai client"
import asyncio, json, signal, subprocess, sys
from pathlib import Path
import openai
import pytest

TOOL = Path(__file__).parents[1]/'tools'/'llama_server.py'
MODEL = 'smollm2-135m'


def form(**properties):
    schema = dict(type='object', properties=properties, required=list(properties), additionalProperties=False)
    return dict(type='json_schema', json_schema=dict(name='reply', strict=True, schema=schema))


def four(length):
    "The form of a list of four texts of at most so many characters"
    text = dict(type='string', minLength=1, maxLength=length)
    return form(samples=dict(type='array', items=text, minItems=4, maxItems=4))


def asks(url, *requests) -> list:
    "Replies to (prompt, options) in order; all under way at once, sixteen at most"
    async def main():
        at_once = asyncio.Semaphore(16)
        async with openai.AsyncOpenAI(base_url=url, api_key='none', timeout=300) as client:
            async def one(prompt, how):
                messages = [dict(role='user', content=prompt)]
                how = dict(max_tokens=200) | how
                async with at_once: return await client.chat.completions.create(model=MODEL, messages=messages, **how)
            return await asyncio.gather(*[one(prompt, how) for prompt, how in requests])
    return asyncio.run(main())


def content(reply): return reply.choices[0].message.content


@pytest.fixture(scope='module')
def lists(llama_server):
    "32 replies of four texts each"
    how = dict(response_format=four(5), temperature=.8, top_p=.95)
    return asks(llama_server, *[(f'Write short texts about the number {i}.', how | dict(seed=i)) for i in range(32)])


def test_lists_of_exactly_four(lists):
    found = [json.loads(content(reply))['samples'] for reply in lists]
    assert len({str(texts) for texts in found}) > 16
    for texts in found:
        assert len(texts) == 4
        assert all(isinstance(text, str) for text in texts)
        assert all(1 <= len(text) <= 5 for text in texts)


def test_what_comes_with_a_reply(lists):
    assert len(lists) == len({reply.id for reply in lists}) == 32
    for reply in lists:
        assert reply.model == MODEL
        assert reply.choices[0].finish_reason == 'stop'
        assert reply.usage.prompt_tokens > 20
        assert 8 < reply.usage.completion_tokens < 200


def test_a_choice(llama_server):
    how = dict(response_format=form(choice=dict(type='string', enum=['A', 'B', 'C'])), temperature=0)
    replies = asks(llama_server, *[(f'Which letter comes first? Question {i}.', how) for i in range(4)])
    for reply in replies: assert json.loads(content(reply))['choice'] in 'ABC'


def about_rain(url, **how):
    reply, = asks(url, ('Tell me about rain.', dict(max_tokens=16, temperature=1.2, top_p=.95) | how))
    return reply


def test_a_seed_gives_the_same_text_again(llama_server):
    first = about_rain(llama_server, seed=1)
    assert first.choices[0].finish_reason == 'length'
    assert first.usage.completion_tokens == 16
    assert content(about_rain(llama_server, seed=1)) == content(first)
    assert content(about_rain(llama_server, seed=2)) != content(first)


def test_a_temperature_of_0_needs_no_seed(llama_server):
    one, two = (content(about_rain(llama_server, seed=seed, temperature=0)) for seed in (1, 2))
    assert one == two


def test_a_prompt_that_is_too_long(llama_server):
    with pytest.raises(openai.BadRequestError, match='exceeds the available context size'):
        asks(llama_server, ('word '*1200, {}))


def test_the_list_of_models(llama_server):
    [model] = openai.OpenAI(base_url=llama_server, api_key='none').models.list().data
    assert model.id == MODEL


def test_it_ends_when_told():
    "A server of its own; nothing but the URL on stdout"
    pytest.importorskip('xllamacpp')
    command = [sys.executable, TOOL, '--slots', '1']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            reply = about_rain(server.stdout.readline().strip(), temperature=0)
            assert reply.usage.completion_tokens == 16
            server.send_signal(signal.SIGTERM)
            assert server.stdout.read() == ''
            assert server.wait(20) == 0
        finally: server.kill()


WITHOUT = f'''
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == 'xllamacpp' else find(name)
sys.argv = ['x']
runpy.run_path({str(TOOL)!r}, run_name='__main__')
'''

def test_without_the_wheel():
    done = subprocess.run([sys.executable, '-c', WITHOUT], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ''
    assert done.stderr == 'xllamacpp is not installed: pip install xllamacpp\n'
