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
        async with openai.AsyncOpenAI(base_url=url, api_key='none', max_retries=0, timeout=120) as client:
            async def one(prompt, kw):
                async with at_once: return await client.chat.completions.create(model=MODEL, messages=[dict(role='user', content=prompt)], **{'max_tokens': 120, **kw})
            return await asyncio.gather(*[one(prompt, kw) for prompt, kw in requests])
    return asyncio.run(main())


def test_lists_of_exactly_four(llama_server):
    replies = asks(llama_server, *[(f'Write short texts about the number {i}.', dict(response_format=four(12), temperature=.8, top_p=.95, seed=i)) for i in range(32)])
    texts = [json.loads(r.choices[0].message.content)['samples'] for r in replies]
    assert [len(t) for t in texts] == [4]*32 and all(isinstance(t, str) and 1 <= len(t) <= 12 for row in texts for t in row)
    assert {r.choices[0].finish_reason for r in replies} == {'stop'} and len({r.id for r in replies}) == 32 and {r.model for r in replies} == {MODEL}
    assert all(r.usage.prompt_tokens > 20 and 8 < r.usage.completion_tokens < 120 for r in replies) and len({str(t) for t in texts}) > 16


def test_a_choice(llama_server):
    requests = [(f'Which letter comes first? Question {i}.', dict(response_format=form(choice=dict(type='string', enum=['A', 'B', 'C'])), max_tokens=24)) for i in range(4)]
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


def test_it_ends_when_told(llama_server): # a server of its own, with one slot; nothing but the URL on stdout
    with subprocess.Popen([sys.executable, TOOL, '--slots', '1', '--context', '256'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        url = server.stdout.readline().strip()
        [reply] = asks(url, ('Count to three.', dict(max_tokens=4)))
        assert reply.usage.completion_tokens == 4
        server.send_signal(signal.SIGTERM)
        assert server.stdout.read() == '' and server.wait(20) == 0


def test_without_the_wheel(): # -S: no site-packages
    hidden = f"import sys; sys.modules['xllamacpp'] = None; import runpy; sys.argv = ['x']; runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, '-c', hidden], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == 'xllamacpp is not installed: pip install xllamacpp' and done.stdout == ''
