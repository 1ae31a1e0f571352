"Chat templates: where an answer begins and ends, what a text may not become, and templates that fail"
import re, sys
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
QUESTION = [dict(role='user', content='What does it mean?')]
TURNS = re.compile(r'<\|?[/\w｜▁]+\|?>|<\|\w+\|>')


def tokenizer_of(template, **how):
    "A tokenizer whose special tokens are those that the template writes, but for the tags of thinking"
    own = [t for t in dict.fromkeys(TURNS.findall(template)) if 'think' not in t and t not in SPECIALS]
    return tiny_tokenizer(vocab=900, specials=[*SPECIALS, *own], chat=template, **how)


@pytest.mark.parametrize('name', SHIPPED)
def test_templates_that_trl_ships(name):
    "What stands between the generation prompt and the answer is prompt, no thinking is left open, and the turn ends; or the template is refused"
    t = tokenizer_of((FOLDER/f'{name}.jinja').read_text(encoding='utf-8'))
    if name in LISTS:
        with pytest.raises(ValueError, match='chat_template of .* (does not write the content of an answer|fails)'): answer_ids(t, QUESTION, ['the word park'])
        return
    texts = ['the word park', "'words' of rain", '1990']
    prompt, said = answer_ids(t, QUESTION, texts)
    assert prompt == prompt_ids(t, QUESTION)
    begun = t.decode(prompt)
    assert begun.count('<think>') == begun.count('</think>') and 'What does it mean?' in begun
    for text, ids in zip(texts, said):
        ends = [i for i, token in enumerate(ids) if token in answer_ends(t)]
        assert bool(ends) == (name not in ENDLESS)
        assert t.decode(ids[:ends[0]] if ends else ids).strip() == text
        whole = render(t, [*QUESTION, dict(role='assistant', content=text)])
        assert t.decode(prompt + ids) == whole


def test_a_template_that_was_right_gives_what_it_gave():
    t = tiny_tokenizer()
    assert prompt_ids(t, QUESTION) == t.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    prompt, (ids,) = answer_ids(t, QUESTION, ['the word rain'])
    assert prompt + ids == t.apply_chat_template([*QUESTION, dict(role='assistant', content='the word rain')], return_dict=False)
    assert t.convert_ids_to_tokens(answer_ends(t)) == ['<|im_end|>'] # which is not its eos


def test_the_end_of_a_prompt_that_belongs_to_the_answer():
    "Behind 'assistant: ' the space is cut with what follows: the same prompt in training and in use"
    t = tiny_tokenizer(chat="{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% else %}\n{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
                       more_text=['assistant: the word', 'assistant: a word'])
    prompt, said = answer_ids(t, QUESTION, ['the word rain', 'a word', '12'])
    assert prompt == prompt_ids(t, QUESTION) and t.decode(prompt).endswith('assistant:')
    assert [t.decode(ids) for ids in said] == [' the word rain</s>', ' a word</s>', ' 12</s>']


@pytest.mark.parametrize('add_bos', [False, True])
def test_control_tokens_in_a_text_are_text(add_bos):
    t = tiny_tokenizer(add_bos=add_bos)
    for text in ('the token <|im_end|> at the end', '<s>', '</s> and <|im_start|>user', f'a{SPECIALS[-1]}b'):
        ids = encode(t, as_text(t, text))
        assert t.decode(ids) == text and not set(ids) & set(t.all_special_ids) and not set(ids) & set(range(len(SPECIALS)))
        assert t.decode(encode(t, as_text(t, text), add_special_tokens=True)) == ('<s>' if add_bos else '') + text
        prompt, (said,) = answer_ids(t, QUESTION, [text])
        assert t.decode(said) == f'{text}<|im_end|>\n' and [i for i in said if i < len(SPECIALS)] == [4]
        asked = prompt_ids(t, [dict(role='user', content=as_text(t, text))])
        assert text in t.decode(asked) and [i for i in asked if i < len(SPECIALS)] == [3, 4, 3] # the template's own
    assert as_text(t, 'no such token') == 'no such token'


def test_what_a_template_writes_is_a_control_token_too():
    t = tiny_tokenizer(chat=CHAT.replace('{% if add', '{# <think> #}{% if add'))
    t.add_tokens(['<think>', '<table>', '\n\n'])
    assert '<think>' in control_tokens(t) and '<table>' not in control_tokens(t) and '\n\n' not in control_tokens(t)
    ids = encode(t, as_text(t, 'the tag <think> of a block'))
    assert t.decode(ids) == 'the tag <think> of a block' and t.convert_tokens_to_ids('<think>') not in ids
    assert encode(t, as_text(t, 'a <table>')) == t.encode('a <table>', add_special_tokens=False)


@pytest.mark.parametrize('template, says', [
    ('{% for m in messages %}{{ m.role ', 'TemplateSyntaxError'), ("{{ raise_exception('A system message is required') }}", 'A system message is required'),
    ('{{ tools[0].name }}', 'UndefinedError'), ('{{ 1/0 }}', 'ZeroDivisionError'), ("{{ ''.__class__.__mro__ }}", 'SecurityError'), ("{{ messages[0]['content'] + 1 }}", 'TypeError'),
    ('{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}', 'TimeoutError: no end after 1 s')])
def test_templates_that_fail(template, says, monkeypatch):
    "One line that names chat_template, whatever is raised; and one that has no end is stopped"
    monkeypatch.setattr(chat, 'RENDER_SECONDS', 1.)
    t, traced = tiny_tokenizer(chat=template), sys.gettrace()
    for ask in (prompt_ids, lambda t, q: answer_ids(t, q, ['x']), lambda t, q: answer_ends(t)):
        with pytest.raises(ValueError, match='chat_template') as e: ask(t, QUESTION)
        assert says in str(e.value) and '\n' not in str(e.value) and sys.gettrace() is traced


def test_a_template_without_answers():
    t = tiny_tokenizer(chat="{{ messages[0]['content'] }}")
    assert t.decode(prompt_ids(t, QUESTION)) == QUESTION[0]['content'] and answer_ends(t) == []
    with pytest.raises(ValueError, match='chat_template of .* does not write the content of an answer as it is'): answer_ids(t, QUESTION, ['x'])


def test_a_template_that_puts_the_answer_in_the_place_of_the_question():
    "Examples, then the last message whoever said it: a writer of base models is asked so"
    t = tiny_tokenizer(chat="A river:\nThe Danube\n\n{{ messages[-1]['content'].rstrip('.: ') }}:{{ '\\n' }}")
    messages = [dict(role='user', content='A cat.')]
    assert t.decode(prompt_ids(t, messages)) == 'A river:\nThe Danube\n\nA cat:\n'
    with pytest.raises(ValueError, match='nothing can be trained with it'): answer_ids(t, messages, ['Tom'])
