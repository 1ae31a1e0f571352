"Chat templates: where an answer begins and ends, what a text may not become, and templates that fail"
import functools, re, sys
from contextlib import suppress
from pathlib import Path
import pytest
import trl
from saeexplainer.lm import chat
from saeexplainer.lm.chat import answer_ends, answer_ids, as_text, control_tokens, encode, prompt_ids, render
from helpers import CHAT, SPECIALS, tiny_tokenizer

FOLDER = Path(trl.__file__).parent/'chat_templates'
SHIPPED = sorted(f.stem for f in FOLDER.glob('*.jinja') if not f.stem.endswith('_training'))
LISTS = {'idefics3', 'smolvlm', 'llava_next'} # take lists of text and images
ENDLESS = {'glm4moe'} # its turns end where the next one begins
SOON = 1. # seconds after which a template has no end
QUESTION = [dict(role='user', content='What does it mean?')]
TURNS = re.compile(r'<\|?[/\w｜▁]+\|?>|<\|\w+\|>')


def tokenizer_of(template, **how):
    "A tokenizer whose special tokens are those that the template writes, but for the tags of thinking"
    own = [t for t in dict.fromkeys(TURNS.findall(template)) if 'think' not in t and t not in SPECIALS]
    return tiny_tokenizer(vocab=900, specials=[*SPECIALS, *own], chat=template, **how)


def assistant(text): return [*QUESTION, dict(role='assistant', content=text)]


@functools.cache
def shipped(name):
    t = tokenizer_of((FOLDER/f'{name}.jinja').read_text(encoding='utf-8'))
    with suppress(Exception): t.apply_chat_template(QUESTION, tokenize=False) # compiled while nobody watches the time
    return t


TEXTS = ['the word park', "'words' of rain", '1990']

@functools.cache
def answered(name): return answer_ids(shipped(name), QUESTION, TEXTS)


@pytest.mark.parametrize('name', [name for name in SHIPPED if name in LISTS])
def test_shipped_templates_of_lists_are_refused(name):
    says = 'chat_template of .* (does not write the content of an answer|fails)'
    with pytest.raises(ValueError, match=says): answer_ids(shipped(name), QUESTION, ['the word park'])


SINGLE = [name for name in SHIPPED if name not in LISTS]

@pytest.mark.parametrize('name', SINGLE)
def test_the_prompt_of_a_shipped_template_leaves_no_thinking_open(name):
    "What stands between the generation prompt and the answer is prompt"
    t = shipped(name)
    prompt, _ = answered(name)
    assert prompt == prompt_ids(t, QUESTION)
    begun = t.decode(prompt)
    assert begun.count('<think>') == begun.count('</think>')
    assert 'What does it mean?' in begun


@pytest.mark.parametrize('name', SINGLE)
def test_the_turn_of_a_shipped_template_ends(name):
    t = shipped(name)
    last = answer_ends(t)
    prompt, said = answered(name)
    for text, ids in zip(TEXTS, said):
        ends = [i for i, token in enumerate(ids) if token in last]
        assert bool(ends) == (name not in ENDLESS)
        assert t.decode(ids[:ends[0]] if ends else ids).strip() == text
        assert t.decode(prompt + ids) == render(t, assistant(text))


def test_a_template_that_was_right_gives_what_it_gave():
    t = tiny_tokenizer()
    assert prompt_ids(t, QUESTION) == t.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    prompt, (ids,) = answer_ids(t, QUESTION, ['the word rain'])
    assert prompt + ids == t.apply_chat_template(assistant('the word rain'), return_dict=False)
    assert t.convert_ids_to_tokens(answer_ends(t)) == ['<|im_end|>'] # which is not its eos


PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% else %}\n{% endif %}"
    '{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}')

def test_the_end_of_a_prompt_that_belongs_to_the_answer():
    "Behind 'assistant: ' the space is cut with what follows: the same prompt in training and in use"
    t = tiny_tokenizer(chat=PLAIN, more_text=['assistant: the word', 'assistant: a word'])
    prompt, said = answer_ids(t, QUESTION, ['the word rain', 'a word', '12'])
    assert prompt == prompt_ids(t, QUESTION)
    assert t.decode(prompt).endswith('assistant:')
    assert [t.decode(ids) for ids in said] == [' the word rain</s>', ' a word</s>', ' 12</s>']


# ---- what a text may not become

CONTROL = ['the token <|im_end|> at the end', '<s>', '</s> and <|im_start|>user', f'a{SPECIALS[-1]}b']

def specials_of(ids) -> list: return [i for i in ids if i < len(SPECIALS)]


@pytest.fixture(scope='module', params=[False, True], ids=['no bos', 'bos'])
def tokenizer(request): return tiny_tokenizer(add_bos=request.param)


@pytest.mark.parametrize('text', CONTROL)
def test_control_tokens_in_a_text_are_text(tokenizer, text):
    ids = encode(tokenizer, as_text(tokenizer, text))
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert not specials_of(ids)
    begun = encode(tokenizer, as_text(tokenizer, text), add_special_tokens=True)
    bos = '<s>' if tokenizer('a')['input_ids'][0] == tokenizer.bos_token_id else ''
    assert tokenizer.decode(begun) == bos + text


@pytest.mark.parametrize('text', CONTROL)
def test_control_tokens_in_a_turn_are_the_templates_own(tokenizer, text):
    _, (said,) = answer_ids(tokenizer, QUESTION, [text])
    assert tokenizer.decode(said) == f'{text}<|im_end|>\n'
    assert specials_of(said) == [4]
    asked = prompt_ids(tokenizer, [dict(role='user', content=as_text(tokenizer, text))])
    assert text in tokenizer.decode(asked)
    assert specials_of(asked) == [3, 4, 3]


def test_a_text_without_control_tokens_stays_as_it_is(tokenizer):
    assert as_text(tokenizer, 'no such token') == 'no such token'


def test_what_a_template_writes_is_a_control_token_too():
    t = tiny_tokenizer(chat=CHAT.replace('{% if add', '{# <think> #}{% if add'))
    t.add_tokens(['<think>', '<table>', '\n\n'])
    assert '<think>' in control_tokens(t)
    assert '<table>' not in control_tokens(t)
    assert '\n\n' not in control_tokens(t)
    ids = encode(t, as_text(t, 'the tag <think> of a block'))
    assert t.decode(ids) == 'the tag <think> of a block'
    assert t.convert_tokens_to_ids('<think>') not in ids
    assert encode(t, as_text(t, 'a <table>')) == t.encode('a <table>', add_special_tokens=False)


# ---- templates that fail

def ask_answer(t, messages): return answer_ids(t, messages, ['x'])


def ask_ends(t, messages): return answer_ends(t)


@pytest.mark.parametrize('ask', [prompt_ids, ask_answer, ask_ends])
@pytest.mark.parametrize('template, says', [
    ('{% for m in messages %}{{ m.role ', 'TemplateSyntaxError'),
    ("{{ raise_exception('A system message is required') }}", 'A system message is required'),
    ('{{ tools[0].name }}', 'UndefinedError'),
    ('{{ 1/0 }}', 'ZeroDivisionError'),
    ("{{ ''.__class__.__mro__ }}", 'SecurityError'),
    ("{{ messages[0]['content'] + 1 }}", 'TypeError'),
    ('{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
     f'TimeoutError: no end after {SOON:.0f} s')])
def test_templates_that_fail(template, says, ask, monkeypatch):
    "One line that names chat_template, whatever is raised; and one that has no end is stopped"
    monkeypatch.setattr(chat, 'RENDER_SECONDS', SOON)
    t = tiny_tokenizer(chat=template)
    traced = sys.gettrace()
    with pytest.raises(ValueError, match='chat_template') as e: ask(t, QUESTION)
    assert says in str(e.value)
    assert '\n' not in str(e.value)
    assert sys.gettrace() is traced


def test_a_template_without_answers():
    t = tiny_tokenizer(chat="{{ messages[0]['content'] }}")
    assert t.decode(prompt_ids(t, QUESTION)) == QUESTION[0]['content']
    assert answer_ends(t) == []
    says = 'chat_template of .* does not write the content of an answer as it is'
    with pytest.raises(ValueError, match=says): answer_ids(t, QUESTION, ['x'])


def test_a_template_that_puts_the_answer_in_the_place_of_the_question():
    "Examples, then the last message whoever said it: a writer of base models is asked so"
    t = tiny_tokenizer(chat="A river:\nThe Danube\n\n{{ messages[-1]['content'].rstrip('.: ') }}:{{ '\\n' }}")
    messages = [dict(role='user', content='A cat.')]
    assert t.decode(prompt_ids(t, messages)) == 'A river:\nThe Danube\n\nA cat:\n'
    with pytest.raises(ValueError, match='nothing can be trained with it'): answer_ids(t, messages, ['Tom'])
