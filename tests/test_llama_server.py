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
def four(length): return form(samples=dict(type='array', items=dict(type='string', minLength=1, maxLength=length), minItems=4, maxItems=4))


def asks(url, *requests): # replies, in order; all under way at once, sixteen at most
    async def main():
        at_once = asyncio.Semaphore(16)
        async with openai.AsyncOpenAI(base_url=url, api_key='none', timeout=300) as client:
            async def one(prompt, kw):
                async with at_once: return await client.chat.completions.create(model=MODEL, messages=[dict(role='user', content=prompt)], **{'max_tokens': 200, **kw})
            return await asyncio.gather(*[one(prompt, kw) for prompt, kw in requests])
    return asyncio.run(main())


def test_lists_of_exactly_four(llama_server):
    replies = asks(llama_server, *[(f'Write short texts about the number {i}.', dict(response_format=four(5), temperature=.8, top_p=.95, seed=i)) for i in range(32)])
    texts = [json.loads(r.choices[0].message.content)['samples'] for r in replies]
    assert [len(t) for t in texts] == [4]*32 and all(isinstance(t, str) and 1 <= len(t) <= 5 for row in texts for t in row)
    assert {r.choices[0].finish_reason for r in replies} == {'stop'} and len({r.id for r in replies}) == 32 and {r.model for r in replies} == {MODEL}
    assert all(r.usage.prompt_tokens > 20 and 8 < r.usage.completion_tokens < 200 for r in replies) and len({str(t) for t in texts}) > 16


def test_a_choice(llama_server):
    requests = [(f'Which letter comes first? Question {i}.', dict(response_format=form(choice=dict(type='string', enum=['A', 'B', 'C'])), temperature=0)) for i in range(4)]
    assert all(json.loads(r.choices[0].message.content)['choice'] in 'ABC' for r in asks(llama_server, *requests))


def test_seeds_and_temperatures(llama_server):
    def alone(**kw): return asks(llama_server, ('Tell me about rain.', dict(max_tokens=16, temperature=1.2, top_p=.95) | kw))[0]
    a, again, other = alone(seed=1), alone(seed=1), alone(seed=2)
    text = lambda r: r.choices[0].message.content
    assert text(a) == text(again) != text(other) and a.choices[0].finish_reason == 'length' and a.usage.completion_tokens == 16
    assert text(alone(seed=1, temperature=0)) == text(alone(seed=2, temperature=0))


def test_a_prompt_that_is_too_long(llama_server):
    with pytest.raises(openai.BadRequestError, match='exceeds the available context size'): asks(llama_server, ('word '*1200, {}))
    [model] = openai.OpenAI(base_url=llama_server, api_key='none').models.list().data
    assert model.id == MODEL


def test_it_ends_when_told(): # a server of its own; nothing but the URL on stdout
    pytest.importorskip('xllamacpp')
    with subprocess.Popen([sys.executable, TOOL, '--slots', '1'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            [reply] = asks(server.stdout.readline().strip(), ('Count.', dict(max_tokens=4)))
            assert reply.usage.completion_tokens == 4
            server.send_signal(signal.SIGTERM)
            assert server.stdout.read() == '' and server.wait(20) == 0
        finally: server.kill()


def test_without_the_wheel():
    without = f"import sys, runpy, importlib.util as u; find = u.find_spec; u.find_spec = lambda n: None if n == 'xllamacpp' else find(n); sys.argv = ['x']; runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, '-c', without], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, '', 'xllamacpp is not installed: pip install xllamacpp\n')
