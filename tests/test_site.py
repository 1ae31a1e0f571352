"The documentation site: builds strictly; every page opens without an error or a network, no wider than a phone"
import ast
import functools
import html
import http.server
import importlib
import inspect
import io
import json
import pkgutil
import re
import subprocess
import sys
import textwrap
import threading
import tokenize
from pathlib import Path
from types import SimpleNamespace
import pytest
from markdown import markdown
from playwright.sync_api import sync_playwright
from typer.testing import CliRunner
import saeexplainer
from fastcore.docments import docments
from helpers import CHROMIUM, open_browser
from saeexplainer import cli

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import site_api
import site_cli
import site_index
import site_nav
import site_pages
import site_search
from site_hooks import interval, on_page_content, without_strangers
from site_tables import is_number, readable

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
    ('changelog.html', 'CHANGELOG.md'),
    ('command_line.html', 'nbs/parts/cli.ipynb'),
])
def test_pages_lead_to_the_repository_and_to_their_notebooks(pages, page, source):
    assert f'href="{CODE}/blob/main/{source}"' in pages[page]
    assert f'<a href="{CODE}" ' in pages[page]
    assert (ROOT/source).is_file()


def test_the_header_has_the_version(pages):
    assert f'>{saeexplainer.__version__}</li>' in pages['index.html']


# ---- the sidebar

def titles_in(entries):
    "Titles of all pages in a part of the sidebar"
    for entry in entries:
        for title, inside in entry.items():
            if isinstance(inside, list): yield from titles_in(inside)
            else: yield title


PART_FILES = [file.relative_to(ROOT/'nbs').as_posix() for file in sorted(ROOT.glob('nbs/parts/**/*.ipynb'))]


@pytest.fixture
def sidebar():
    "A function that gives the sidebar of pages with these titles: section -> its entries"
    def of(titles):
        entries = site_nav.navigation(titles, {name: name.replace('.ipynb', '.md') for name in titles})
        return {title: inside for entry in entries for title, inside in entry.items()}
    return of


@pytest.mark.parametrize('name', [name for name in PART_FILES if '_' not in name or 'evaluation' in name])
def test_parts_have_titles_in_words_and_a_group(name):
    group, title = site_nav.group_of(name.removeprefix('parts/').removesuffix('.ipynb'))
    assert group != site_nav.OTHERS
    assert title != Path(name).stem


def test_the_page_of_a_part_has_its_title_and_its_module(pages):
    head = pages['parts/lm/hooks.html'].partition('<blockquote>')[0]
    assert '<h1 id="layers-and-their-hooks">Layers and their hooks' in head
    assert '<code>saeexplainer.lm.hooks</code>' in head


def test_guides_come_first_in_an_order_of_their_own(sidebar):
    guides = {'guide/faq.ipynb': 'FAQ', 'guide/new.ipynb': 'New', 'guide/quickstart.ipynb': 'Quickstart'}
    shown = sidebar(guides | {'how_right.ipynb': 'How right are they?', '00_injection.ipynb': 'Injecting'})
    assert list(shown)[:4] == ['Home', 'Start', 'How right are they?', 'Chapters']
    assert list(titles_in(shown['Start'])) == ['Quickstart', 'FAQ', 'New']


def test_a_site_without_guides_has_no_section_for_them(sidebar):
    assert 'Start' not in sidebar({'00_injection.ipynb': 'Injecting'})


def test_a_part_that_nobody_has_placed_comes_last(sidebar):
    groups = sidebar({'parts/lab.ipynb': 'The lab', 'parts/strange.ipynb': 'strange'})['Reference']
    assert groups[-1] == {site_nav.OTHERS: [{'strange': 'parts/strange.md'}]}


@pytest.mark.parametrize('name, heading, title', [
    ('recipes/your_own_sae', 'Recipe: your own SAE', 'Your own SAE'),
    ('04_metrics', 'Measuring explanations', '4. Measuring explanations'),
    ('parts/files', 'files', 'Files that are whole'),
    ('guide/faq', 'Questions', 'Questions'),
])
def test_titles_of_the_sidebar(name, heading, title):
    assert site_nav.title_of(name, heading) == title


# ---- the reference

COMMANDS = site_cli.commands_of(cli.app)
NAMES = [site_cli.name_of(command) for command in COMMANDS]


def help_of(name):
    "What a command says of itself in a wide terminal"
    return CliRunner().invoke(cli.app, [name, '--help'], env=dict(COLUMNS='250')).output


@pytest.mark.parametrize('name', NAMES)
def test_the_reference_has_the_options_of_the_help(name):
    command = COMMANDS[NAMES.index(name)]
    options = [given for given in site_cli.given_by(command.callback) if given.is_option]
    shown = re.findall(r'^│[ *]*(--[a-z-]+)', help_of(name), re.M)
    assert [*(given.spelled[0] for given in options), '--help'] == shown


@pytest.mark.parametrize('name', NAMES)
def test_each_command_has_its_section_with_examples(pages, name):
    section = pages['command_line.html'].partition(f'<h2 id="{name}">')[2].partition('<h2')[0]
    text = re.sub('<[^>]+>', '', section)
    assert f'saeexplainer {name}' in text
    assert f'\nsaeexplainer {name}' in text or f'\n\nsaeexplainer {name}' in text


def rows_of(name):
    "Rows of the reference of a command: how a parameter is spelled -> what it takes, default, meaning"
    rows = map(site_cli.row, site_cli.given_by(COMMANDS[NAMES.index(name)].callback))
    return {row[0]: [cell.replace('&nbsp;', ' ') for cell in row[1:]] for row in rows}


@pytest.mark.parametrize('name, option, takes, default', [
    ('explain', '`--json`', '', ''),
    ('features', '`--seed`', 'from 0', '`0`'),
    ('verify', '`--texts`', 'from 1', '`10`'),
    ('run', '`--set`, `-s`', 'repeatable', ''),
])
def test_options_in_plain_words(name, option, takes, default):
    row = rows_of(name)[option]
    assert row[0].endswith(takes) and bool(row[0]) == bool(takes)
    assert row[1] == default


def test_the_reference_has_no_types_in_angle_brackets(pages):
    assert '&lt;' not in pages['command_line.html'].partition('<article')[2].partition('</article')[0]


def test_options_in_a_help_text_are_code():
    assert site_cli.meaning('as --verify does, in `--a --b`') == 'as `--verify` does, in `--a --b`'


def test_the_index_has_every_name_and_its_place(pages):
    "The build itself finds places that are not there"
    links = re.findall(r'<td><a href="([^"]+)"><code>(\w+)</code></a></td>', pages['api.html'])
    listed = {name for _, name in links}
    assert [name for module in modules() for name in own_names(module) if name not in listed] == []
    assert ('parts/explorer.html#featureexplorer', 'FeatureExplorer') in links


def test_the_index_gives_the_first_sentence():
    assert site_index.first_line('Return a_b; raise `ValueError`.\n\nMore.') == 'Return a\\_b'


# ---- comments of parameters

def functions():
    "Public functions and methods that are written in the package: (name, function)"
    for module in modules():
        things = {name: getattr(module, name) for name in own_names(module)}
        for name, thing in list(things.items()):
            methods = site_api.methods_of(thing).items()
            things |= {f'{name}.{own}': getattr(method, '__func__', method) for own, method in methods}
        for name, thing in things.items():
            is_written = inspect.isfunction(thing) and thing.__module__ == module.__name__
            if is_written: yield f'{module.__name__}.{name}', thing


def sharing_a_comment(function):
    "Parameters whose comment stands on a line that they share: it would be shown for the last of them only"
    source = textwrap.dedent(inspect.getsource(function))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    node = next(node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    lines = [argument.lineno for argument in arguments if argument.arg not in ('self', 'cls')]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT and 'noqa' not in token.string}
    described = docments(function, full=True)
    return [argument.arg for argument in arguments
            if lines.count(argument.lineno) > 1 and argument.lineno in comments
            and described.get(argument.arg, {}).get('docment')]


def test_a_comment_stands_at_its_own_parameter():
    shared = {name: sharing_a_comment(function) for name, function in functions()}
    assert {name: parameters for name, parameters in shared.items() if parameters} == {}


def test_a_comment_that_two_parameters_share_is_found():
    def two(a, b,  # of both
            c=None):  # alone
        return a, b, c
    assert sharing_a_comment(two) == ['b']


# ---- the search

@pytest.mark.parametrize('text, line', [
    ('Return the gap (Eq. 18). More.', 'Return the gap (Eq. 18)'),
    ('Eq. 6 at a token; raises nothing', 'Eq. 6 at a token'),
    ('One sentence.\n\nAnother paragraph.', 'One sentence')])
def test_an_equation_does_not_end_a_sentence(text, line):
    assert site_index.first_line(text) == line


def test_code_is_not_searched(entries):
    assert [entry['location'] for entry in entries if '<pre>' in entry['text']] == []


def test_words_are_searched(entries, pages):
    "Words, and neither code nor outputs: a page has a few thousand characters of them"
    texts = [entry['text'] for entry in entries]
    assert any('hard negative' in text for text in texts)
    assert sum(map(len, texts)) < 10_000*len(pages)


def test_ways_in_come_first_in_a_search(entries):
    boosted = {entry['location'].partition('#')[0] for entry in entries if entry.get('boost', 1) > 1}
    assert boosted > {'index.html', 'glossary.html', 'recipes/your_own_sae.html'}
    assert not any(page.startswith('parts/') for page in boosted)


def test_guides_count_most():
    assert site_nav.boost('guide/faq.md') > max(map(site_nav.boost, ['index.md', 'recipes/writers.md', 'parts/run.md']))


def test_a_guide_takes_over_the_words_that_lead_to_it():
    places = site_nav.WORDS['install']
    assert site_search.way_in(places, {'index.html'}) == 'index.html'
    assert site_search.way_in(places, {'index.html', 'guide/install.html'}) == 'guide/install.html'


def test_words_that_lead_nowhere_stop_the_build():
    lost = "a search for 'quickstart' leads nowhere: guide/quickstart.html, index.html"
    with pytest.raises(ValueError, match=lost): site_search.ways_in(set())


def test_the_index_of_names_is_not_searched(entries):
    assert [entry['location'] for entry in entries if entry['location'].startswith('api.html')] == ['api.html']


# ---- tables

HEAD = '<thead><tr style="text-align: right;"><th></th><th>what</th><th>ratio</th></tr></thead>'
ROWS = ('<tbody><tr><th>0</th><td>`a` &lt; b</td><td>4.02</td></tr>'
        '<tr><th>1</th><td>12</td><td>NaN</td></tr></tbody>')


def dataframe(inside):
    return f'<table border="1" class="dataframe">{inside}</table>'


def test_text_stands_left_and_numbers_right_and_rows_are_not_numbered():
    assert readable(dataframe(HEAD + ROWS)).split('\n') == [
        '<table class="dataframe">', '<thead>',
        '<tr><th class="text">what</th><th class="number">ratio</th></tr>', '</thead>', '<tbody>',
        '<tr><td class="text"><code>a</code> &lt; b</td><td class="number">4.02</td></tr>',
        '<tr><td class="text">12</td><td class="number">NaN</td></tr>', '</tbody>', '</table>']


def test_an_index_that_says_something_stays():
    shown = readable(dataframe(HEAD + ROWS.replace('<th>1</th>', '<th>7</th>')))
    assert '<th class="number">7</th>' in shown


def test_the_name_of_an_index_stands_above_it():
    names = '<tr><th>stage</th><th></th><th></th></tr></thead>'
    shown = readable(dataframe(HEAD.replace('</thead>', names) + ROWS))
    assert '<tr><th class="number">stage</th><th class="text">what</th><th class="number">ratio</th></tr>' in shown


def test_rows_of_a_group_keep_their_columns():
    rows = ('<tbody><tr><th rowspan="2" valign="top">one</th><th>sft</th><td>1.0</td></tr>'
            '<tr><th>dpo</th><td>2.0</td></tr></tbody>')
    shown = readable(dataframe('<thead><tr><th></th><th></th><th>gap</th></tr></thead>' + rows))
    assert '<tr><th rowspan="2" class="text">one</th><th class="text">sft</th><td class="number">1.0</td></tr>' in shown
    assert '<tr><th class="text">dpo</th><td class="number">2.0</td></tr>' in shown


INTERVAL = '49.3\xa0[45.9, 52.6], p 0.003'


@pytest.mark.parametrize('text', ['12', '+5.0', '1,234', '< 0.001', '93%', INTERVAL, '6 of 10', '2.5 GB'])
def test_numbers(text):
    assert is_number(text)


@pytest.mark.parametrize('text', ['dpo1', '5 words', 'layer 9', '33.0.0rc1', '', '3 of the texts'])
def test_what_is_no_number(text):
    assert not is_number(text)


def test_tables_of_cells_are_readable(pages):
    tables = re.findall('<table[^>]*class="dataframe.*?</table>', ''.join(pages.values()), re.S)
    assert len(tables) > 150
    assert [table for table in tables if re.search('style=|`[^`<>]+`', table)] == []


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
    assert interval('+5.0 [1.7, -8.1], p 0.003') == '+5.0&nbsp;[1.7,&nbsp;-8.1], p&nbsp;0.003'
    assert interval('+5.0 [1, 8], p &lt; 0.001') == '+5.0&nbsp;[1,&nbsp;8], p&nbsp;&lt;&nbsp;0.001'
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
    page.add_style_tag(content='.md-typeset .formula > div { background: none !important }')  # the mark of scrolling
    shown = [formula.screenshot() for formula in formulas]
    page.add_style_tag(content='.md-typeset .formula > div { overflow: visible !important }')
    assert shown == [formula.screenshot() for formula in formulas]
    page.close()


@pytest.fixture
def from_disk(site, browser):
    "A page of the site that is opened as a file; it finds no server"
    page = browser.new_page(viewport=dict(width=1400, height=900))
    asked = []
    page.on('request', lambda request: asked.append(request.url))
    page.goto((site/'index.html').as_uri())
    yield page
    page.close()
    assert [url for url in asked if not url.startswith(('file:', 'data:', 'blob:'))] == []


def first_found(page, words):
    "The page that a search shows first, with the anchor of the first section where that has the words"
    box = page.get_by_placeholder('Search')
    box.fill('')
    box.press_sequentially(words)
    terms = re.compile(re.escape(words.split()[0]), re.I)
    page.locator('.md-search-result__item').filter(has_text=terms).first.wait_for(timeout=120_000)
    page.wait_for_timeout(300)  # each letter is a search of its own
    links = page.locator('.md-search-result__item').first.locator(':scope > .md-search-result__link')
    return [re.sub(r'^.*?/docs/|\?h=[^#]*', '', link.get_attribute('href')) for link in links.all()]


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_a_search_from_disk_shows_first_where_a_reader_would_go(entries, from_disk):
    locations = {entry['location'] for entry in entries}
    wrong = {}
    for words, places in site_nav.WORDS.items():
        found = first_found(from_disk, words)
        if site_search.way_in(places, locations) not in found: wrong[words] = found
    assert wrong == {}


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_words_that_lead_to_a_page_are_not_shown(from_disk):
    assert first_found(from_disk, 'quickstart')
    tags = from_disk.locator('.md-search-result .md-tags')
    assert tags.count() and not tags.first.is_visible()


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_a_method_is_found_by_its_own_name(from_disk):
    assert 'parts/explorer.html#featureexplorer.to_html' in first_found(from_disk, 'to_html')


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
@pytest.mark.parametrize('width', [1400, 390])
def test_no_column_of_a_table_is_lost(url, browser, width):
    "A table that is wider than the page can be scrolled to its last column"
    page = browser.new_page(viewport=dict(width=width, height=900))
    page.goto(f'{url}/metrics.html')
    tables = page.locator('table.dataframe').all()
    wide = [table for table in tables if table.evaluate('table => table.scrollWidth > table.clientWidth')]
    assert wide
    for table in wide:
        table.evaluate('table => { table.scrollLeft = table.scrollWidth }')
        right = 'element => element.getBoundingClientRect().right'
        last = table.locator('th, td').last.evaluate(right)
        assert last <= table.evaluate(right) + 1 <= width
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


def test_what_is_folded_is_markdown_too():
    text = site_pages.unfolded('1. Why?\n\n<details><summary>A hint</summary>\n\nIt is *this*.\n\n</details>')
    shown = markdown(text, extensions=['md_in_html'])
    assert '<p>It is <em>this</em>.</p>' in shown
    assert 'markdown=' not in shown


def test_folds_in_code_are_code():
    assert site_pages.unfolded('```\n<details>\n```') == '```\n<details>\n```'


def test_a_badge_asks_no_other_server():
    shown = markdown('[![Binder](https://mybinder.org/badge.svg)](https://mybinder.org/x) ![a figure](figures/a.png)')
    assert without_strangers(shown) == ('<p><a href="https://mybinder.org/x"><span class="badge">Binder</span></a> '
                                        '<img alt="a figure" src="figures/a.png" /></p>')


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
