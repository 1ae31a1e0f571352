"The documentation site: builds strictly, every page opens without an error or a network, and no page is wider than a phone"
import ast, functools, html, http.server, importlib, json, pkgutil, re, subprocess, sys, threading
from pathlib import Path
import pytest
from helpers import CHROMIUM, open_browser

ROOT = Path(__file__).parent.parent

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp('site')/'docs'
    done = subprocess.run([sys.executable, ROOT/'tools/site_pages.py', out], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out

@pytest.fixture(scope='module')
def url(site):
    quiet = type('Quiet', (http.server.SimpleHTTPRequestHandler,), dict(log_message=lambda *a: None))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()

def pages(site): return sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html') if p.name != '404.html')

def test_every_notebook_and_public_name_has_its_place(site):
    text = {p: (site/p).read_text() for p in pages(site)}
    home = text['index.html']
    assert all(f'href="{p}"' in home for p in text if p != 'index.html') # the sidebar
    anchors = set(re.findall(r' id="([^"]+)"', ''.join(text.values())))
    import saeexplainer
    for m in pkgutil.walk_packages(saeexplainer.__path__, 'saeexplainer.'):
        if m.ispkg or m.name.split('.')[-1].startswith('_'): continue
        module = importlib.import_module(m.name)
        own = [n for n in module.__all__ if getattr(getattr(module, n), '__module__', '') == m.name]
        lost = [n for n in own if callable(getattr(module, n)) and n.lower() not in anchors]
        assert not lost, f'{m.name}: {lost}'

def test_formulas_need_no_script(site):
    page = (site/'prefs.html').read_text()
    assert page.count('<math') > 10 and 'arithmatex' not in page
    assert all(f'<span>({n})</span>' in (site/f'{chapter}.html').read_text() for chapter, numbers in dict(injection=(5, 6), prefs=(7, 10), dpo=(11,), metrics=range(12, 19)).items() for n in numbers)

def test_letters_of_formulas_are_characters_of_their_own(site):
    "Browsers know no other `mathvariant` than `normal`: a script N must be another character than an N, in whatever font"
    formulas = {o: re.findall('<math.*?</math>', (site/f'{o}.html').read_text(encoding='utf-8'), flags=re.S) for o in ('sft', 'prefs', 'dpo', 'metrics')}
    assert not [m for page in formulas.values() for m in page if re.search('mathvariant="(?!normal)', m)]
    for page, letters in dict(sft='ℒ𝒟', prefs='ℱ𝒩', dpo='ℒ𝔼', metrics='𝟙𝒜𝒰𝒯').items():
        assert all(letter in ''.join(formulas[page]) for letter in letters), page

def test_the_font_of_formulas_is_of_the_site(site):
    assert (site/'assets/math.woff2').read_bytes()[:4] == b'wOF2' and (site/'assets/math.woff2').stat().st_size < 100_000
    assert 'SIL OPEN FONT LICENSE Version 1.1' in (site/'assets/math-font-license.txt').read_text(encoding='utf-8')

def test_no_page_shows_where_an_object_lay_in_memory(site):
    assert not [p for p in pages(site) if ' object at 0x' in (site/p).read_text()]

def test_a_formula_that_is_not_seen_as_one_stops_the_build():
    import sys; sys.path.insert(0, str(ROOT/'tools'))
    from types import SimpleNamespace
    from site_math import interval, on_page_content
    page = SimpleNamespace(file=SimpleNamespace(src_path='a.md'))
    with pytest.raises(ValueError, match='a.md: a formula was not recognised'): on_page_content(r'<p>$$\frac{1}{2}</p>', page)
    with pytest.raises(ValueError, match=r'no formula: \\foo'): on_page_content(r'<div class="arithmatex">\[\foo{1}\]</div>', page)
    with pytest.raises(ValueError, match='an empty line between them'): on_page_content(r'<div class="arithmatex">\[a$$ $$b\]</div>', page)
    assert on_page_content('<pre><code>echo $$</code></pre>', page) == '<pre><code>echo $$</code></pre>'
    assert interval('+5.0 [1.7, -8.1], p 0.003') == '+5.0&nbsp;[1.7,&nbsp;-8.1], p 0.003' and interval('array [1, 2]') == 'array [1, 2]'

def test_words_are_searched_and_code_is_not(site):
    entries = json.loads((site/'search/search_index.json').read_text(encoding='utf-8'))['docs']
    texts = [o['text'] for o in entries]
    assert not [o['location'] for o in entries if re.search(r'<pre><code>(import|from|def|class|with) ', o['text'])]
    assert any('hard negative' in o for o in texts) and sum(map(len, texts)) < 700_000
    boosted = {o['location'].partition('#')[0] for o in entries if o.get('boost', 1) > 1}
    assert boosted > {'index.html', 'glossary.html', 'recipes/your_own_sae.html'} and not any(o.startswith('parts/') for o in boosted)

def test_pages_lead_to_the_repository_and_to_their_notebooks(site):
    code = 'https://github.com/saeexplainer/saeexplainer'
    for page, source in {'metrics.html': 'nbs/04_metrics.ipynb', 'parts/store.html': 'nbs/parts/store.ipynb', 'contributing.html': 'CONTRIBUTING.md'}.items():
        text = (site/page).read_text(encoding='utf-8')
        assert f'href="{code}/blob/main/{source}"' in text and f'<a href="{code}" ' in text and (ROOT/source).is_file()

@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium is installed: the pages are not opened in a browser')
def test_pages_in_a_browser(site, url):
    from playwright.sync_api import sync_playwright
    wrong = []
    with sync_playwright() as p:
        browser = open_browser(p)
        page = browser.new_page(viewport=dict(width=390, height=800))
        page.on('console', lambda m: wrong.append((page.url, m.text)) if m.type == 'error' else None)
        page.on('pageerror', lambda e: wrong.append((page.url, str(e))))
        page.on('request', lambda r: wrong.append((page.url, r.url)) if not r.url.startswith((url, 'data:', 'blob:')) else None)
        for name in pages(site):
            page.goto(f'{url}/{name}')
            if (width := page.evaluate('document.documentElement.scrollWidth')) > 390: wrong.append((name, f'{width} px wide'))
        page.goto(f'{url}/index.html')
        page.locator('label[for=__search]').first.click()
        page.get_by_placeholder('Search').press_sequentially('hard negative') # the theme listens for keys
        page.locator('.md-search-result__item').first.wait_for(timeout=120_000) # the index is made in the page
        browser.close()
    assert not wrong, wrong[:10]

@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium is installed: the formulas are not looked at in a browser')
@pytest.mark.parametrize('width', [1400, 390])
def test_formulas_are_not_cut(site, url, width):
    "Each formula of chapter 4 in the site's own font looks the same where nothing may be cut"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = open_browser(p)
        page = browser.new_page(viewport=dict(width=width, height=900))
        page.goto(f'{url}/metrics.html')
        page.evaluate('document.fonts.ready')
        assert page.evaluate('[...document.fonts].some(f => f.family.includes("Saeexplainer Math") && f.status == "loaded")')
        formulas = page.locator('.formula').all()
        assert len(formulas) >= 7
        shown = [o.screenshot() for o in formulas]
        page.add_style_tag(content='.md-typeset .formula > div { overflow: visible !important }')
        assert shown == [o.screenshot() for o in formulas]
        browser.close()

def test_output_cannot_leave_its_block():
    "Text with fences of its own, and comments with braces, as the site's Markdown shows them"
    from markdown import markdown
    sys.path.insert(0, str(ROOT/'tools'))
    try: import site_pages
    finally: sys.path.pop(0)
    said = 'a\n```\n<img src=x onerror=alert(1)>\n```\n````'
    page = markdown(site_pages.literal(said), extensions=['pymdownx.superfences', 'attr_list'])
    assert '<img' not in page and html.escape('<img src=x onerror=alert(1)>', quote=False) in page.replace('<span class="p">', '').replace('</span>', '')
    assert site_pages.escaped("{folder: ''} of a|b, `x|y` <b>") == "\\{folder: ''} of a\\|b, `x|y` &lt;b>"


MODULES = [f for f in sorted(ROOT.glob('nbs/**/*.ipynb')) if '#| default_exp' in f.read_text(encoding='utf-8')]

@pytest.mark.parametrize('notebook', MODULES, ids=lambda f: f.stem)
def test_cells_with_imports_hold_nothing_else(notebook):
    "`nbdev_docs` executes the cells of a module's notebook that import something, and of the others only what is exported: what stands beside an import would fail there"
    imports = (ast.Import, ast.ImportFrom)
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or source.startswith('#| export'): continue
        tree = ast.parse(source)
        assert not any(isinstance(node, imports) for node in ast.walk(tree)) or all(isinstance(node, imports) for node in tree.body), source
