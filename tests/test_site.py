"The documentation site: builds strictly; every page opens without an error or a network, no wider than a phone"
import ast
import functools
import html
import http.server
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
import pytest
from markdown import markdown
from playwright.sync_api import sync_playwright
import saeexplainer
from helpers import CHROMIUM, open_browser

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import site_api
import site_pages
from site_math import interval, on_page_content

CODE = 'https://github.com/saeexplainer/saeexplainer'
NO_CHROMIUM = 'no Chromium is installed: the pages are not opened in a browser'


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The folder of the built site"
    out = tmp_path_factory.mktemp('site')/'docs'
    command = [sys.executable, ROOT/'tools/site_pages.py', out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope='module')
def pages(site):
    "The HTML of every page"
    files = sorted(file for file in site.rglob('*.html') if file.name != '404.html')
    return {file.relative_to(site).as_posix(): file.read_text(encoding='utf-8') for file in files}


@pytest.fixture(scope='module')
def entries(site):
    "What is searched"
    return json.loads((site/'search/search_index.json').read_text(encoding='utf-8'))['docs']


@pytest.fixture(scope='module')
def url(site):
    "The address of a server of the site"
    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[.02], daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@pytest.fixture(scope='module')
def browser():
    with sync_playwright() as playwright:
        browser = open_browser(playwright)
        yield browser
        browser.close()


# ---- what is on the pages

def test_every_page_is_in_the_sidebar(pages):
    home = pages['index.html']
    assert [name for name in pages if name != 'index.html' and f'href="{name}"' not in home] == []


def modules():
    "The modules of the package"
    for module in pkgutil.walk_packages(saeexplainer.__path__, 'saeexplainer.'):
        private = module.name.split('.')[-1].startswith('_')
        if not module.ispkg and not private: yield importlib.import_module(module.name)


def own_names(module):
    "The functions and classes that a module defines and exports"
    things = [(name, getattr(module, name)) for name in module.__all__]
    return [name for name, thing in things if getattr(thing, '__module__', '') == module.__name__ and callable(thing)]


def test_every_public_name_has_its_place(pages):
    anchors = set(re.findall(r' id="([^"]+)"', ''.join(pages.values())))
    names = [f'{module.__name__}.{name}' for module in modules() for name in own_names(module)]
    assert [name for name in names if name.split('.')[-1].lower() not in anchors] == []


def test_no_page_shows_where_an_object_lay_in_memory(pages):
    assert [name for name, text in pages.items() if ' at 0x' in text] == []


@pytest.mark.parametrize('page, source', [
    ('metrics.html', 'nbs/04_metrics.ipynb'),
    ('parts/store.html', 'nbs/parts/store.ipynb'),
    ('contributing.html', 'CONTRIBUTING.md'),
])
def test_pages_lead_to_the_repository_and_to_their_notebooks(pages, page, source):
    assert f'href="{CODE}/blob/main/{source}"' in pages[page]
    assert f'<a href="{CODE}" ' in pages[page]
    assert (ROOT/source).is_file()


def test_code_is_not_searched(entries):
    is_code = re.compile(r'<pre><code>(import|from|def|class|with) ')
    assert [entry['location'] for entry in entries if is_code.search(entry['text'])] == []


def test_words_are_searched(entries, pages):
    "Words, and neither code nor outputs: a page has a few thousand characters of them"
    texts = [entry['text'] for entry in entries]
    assert any('hard negative' in text for text in texts)
    assert sum(map(len, texts)) < 10_000*len(pages)


def test_ways_in_come_first_in_a_search(entries):
    boosted = {entry['location'].partition('#')[0] for entry in entries if entry.get('boost', 1) > 1}
    assert boosted > {'index.html', 'glossary.html', 'recipes/your_own_sae.html'}
    assert not any(page.startswith('parts/') for page in boosted)


# ---- formulas

def test_formulas_need_no_script(pages):
    assert pages['prefs.html'].count('<math') > 10
    assert 'arithmatex' not in pages['prefs.html']


@pytest.mark.parametrize('chapter, numbers', [
    ('injection', [5, 6]), ('prefs', [7, 10]), ('dpo', [11]), ('metrics', range(12, 19)),
])
def test_formulas_have_the_numbers_of_the_paper(pages, chapter, numbers):
    assert [number for number in numbers if f'<span>({number})</span>' not in pages[f'{chapter}.html']] == []


@pytest.mark.parametrize('chapter, letters', [('sft', 'ℒ𝒟'), ('prefs', 'ℱ𝒩'), ('dpo', 'ℒ𝔼'), ('metrics', '𝟙𝒜𝒰𝒯')])
def test_letters_of_formulas_are_characters_of_their_own(pages, chapter, letters):
    "Browsers know no `mathvariant` but `normal`: a script N must be another character than an N, in whatever font"
    formulas = re.findall('<math.*?</math>', pages[f'{chapter}.html'], flags=re.S)
    assert [formula for formula in formulas if re.search('mathvariant="(?!normal)', formula)] == []
    assert set(letters) <= set(''.join(formulas))


def test_the_font_of_formulas_is_of_the_site(site):
    font = (site/'assets/math.woff2').read_bytes()
    assert font[:4] == b'wOF2'
    assert len(font) < 100_000
    terms = (site/'assets/math-font-license.txt').read_text(encoding='utf-8')
    assert 'SIL OPEN FONT LICENSE Version 1.1' in terms


@pytest.mark.parametrize('text, says', [
    (r'<p>$$\frac{1}{2}</p>', 'a.md: a formula was not recognised'),
    (r'<div class="arithmatex">\[\foo{1}\]</div>', r'no formula: \\foo'),
    (r'<div class="arithmatex">\[a$$ $$b\]</div>', 'an empty line between them'),
])
def test_a_formula_that_is_not_seen_as_one_stops_the_build(text, says):
    page = SimpleNamespace(file=SimpleNamespace(src_path='a.md'))
    with pytest.raises(ValueError, match=says): on_page_content(text, page)


def test_dollars_in_code_are_no_formula():
    page = SimpleNamespace(file=SimpleNamespace(src_path='a.md'))
    assert on_page_content('<pre><code>echo $$</code></pre>', page) == '<pre><code>echo $$</code></pre>'


def test_a_mean_and_its_interval_stay_on_one_line():
    assert interval('+5.0 [1.7, -8.1], p 0.003') == '+5.0&nbsp;[1.7,&nbsp;-8.1], p 0.003'
    assert interval('array [1, 2]') == 'array [1, 2]'


# ---- in a browser

@pytest.fixture
def phone(browser):
    "A page of the size of a phone"
    page = browser.new_page(viewport=dict(width=390, height=800))
    yield page
    page.close()


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_pages_open_on_a_phone_without_errors(pages, url, phone):
    "Without another server, and no wider than it is"
    wrong = []
    def on_console(said):
        if said.type == 'error': wrong.append((phone.url, said.text))
    def on_request(request):
        if not request.url.startswith((url, 'data:', 'blob:')): wrong.append((phone.url, request.url))
    phone.on('console', on_console)
    phone.on('pageerror', lambda error: wrong.append((phone.url, str(error))))
    phone.on('request', on_request)
    for name in pages:
        phone.goto(f'{url}/{name}')
        width = phone.evaluate('document.documentElement.scrollWidth')
        if width > 390: wrong.append((name, f'{width} px wide'))
    search(phone, url)
    assert wrong == []


def search(page, url):
    "Look for words, and wait until they are found"
    page.goto(f'{url}/index.html')
    page.locator('label[for=__search]').first.click()
    page.get_by_placeholder('Search').press_sequentially('hard negative') # the theme listens for keys
    page.locator('.md-search-result__item').first.wait_for(timeout=120_000) # the index is made in the page


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
@pytest.mark.parametrize('width', [1400, 390])
def test_formulas_are_not_cut(url, browser, width):
    "Each formula of chapter 4 in the site's own font looks the same where nothing may be cut"
    page = browser.new_page(viewport=dict(width=width, height=900))
    page.goto(f'{url}/metrics.html')
    page.evaluate('document.fonts.ready')
    is_loaded = 'font.family.includes("Saeexplainer Math") && font.status == "loaded"'
    assert page.evaluate(f'[...document.fonts].some(font => {is_loaded})')
    formulas = page.locator('.formula').all()
    assert len(formulas) >= 7
    shown = [formula.screenshot() for formula in formulas]
    page.add_style_tag(content='.md-typeset .formula > div { overflow: visible !important }')
    assert shown == [formula.screenshot() for formula in formulas]
    page.close()


# ---- Markdown

def test_output_cannot_leave_its_block():
    "Text with fences of its own is shown as it is by the site's Markdown"
    picture = '<img src=x onerror=alert(1)>'
    said = f'a\n```\n{picture}\n```\n````'
    page = markdown(site_pages.literal(said), extensions=['pymdownx.superfences', 'attr_list'])
    assert '<img' not in page
    assert html.escape(picture, quote=False) in page.replace('<span class="p">', '').replace('</span>', '')


def test_comments_with_braces_are_no_markdown():
    shown = "\\{folder: ''} of a\\|b, `x|y` &lt;b>"
    assert site_api.escaped("{folder: ''} of a|b, `x|y` <b>") == shown


# ---- notebooks

NOTEBOOKS = [file for file in sorted(ROOT.glob('nbs/**/*.ipynb'))
             if '#| default_exp' in file.read_text(encoding='utf-8')]
IMPORTS = (ast.Import, ast.ImportFrom)


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda file: file.stem)
def test_cells_with_imports_hold_nothing_else(notebook):
    """`nbdev_docs` executes the cells of a module's notebook that import something

    Of the others it executes what is exported, so what stands beside an import would fail there.
    """
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or source.startswith('#| export'): continue
        tree = ast.parse(source)
        if not any(isinstance(node, IMPORTS) for node in ast.walk(tree)): continue
        assert all(isinstance(node, IMPORTS) for node in tree.body), source
