"The explorer in a real JupyterLab, in a real browser"
import json, os, socket, subprocess, sys, time
from urllib.request import urlopen
import pytest
from helpers import CHROMIUM, open_browser

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab on loopback, with a notebook that shows an explorer"
    folder = tmp_path_factory.mktemp('lab')
    cell = dict(cell_type='code', id='a', execution_count=None, metadata={}, outputs=[], source='from saeexplainer.explorer import FeatureExplorer\nFeatureExplorer(feature=13)')
    (folder/'look.ipynb').write_text(json.dumps(dict(cells=[cell], metadata={'kernelspec': dict(name='python3', display_name='python3', language='python')}, nbformat=4, nbformat_minor=5)))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = os.environ | dict(JUPYTER_CONFIG_DIR=str(folder/'config'), JUPYTER_DATA_DIR=str(folder/'data'), JUPYTER_RUNTIME_DIR=str(folder/'runtime'), JUPYTERLAB_SETTINGS_DIR=str(folder/'settings'),
                            JUPYTERLAB_WORKSPACES_DIR=str(folder/'workspaces'))
    log = open(folder/'log', 'w')
    server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--IdentityProvider.token=', f'--ServerApp.root_dir={folder}',
                               '--LabApp.news_url=', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate'], env=env, stdout=log, stderr=log)
    try:
        for _ in range(120):
            try: urlopen(f'http://127.0.0.1:{port}/api').read(); break
            except OSError: time.sleep(.5)
        else: raise RuntimeError((folder/'log').read_text()[-2000:])
        yield f'http://127.0.0.1:{port}/lab/tree/look.ipynb?reset'
    finally:
        server.terminate(); server.wait(20); log.close()

@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium is installed: the explorer is not tried in a browser')
def test_explorer_in_jupyterlab(lab, tmp_path):
    other, label, word = 8, 'community settlement radio', 'community'
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = open_browser(p)
        page = browser.new_page(viewport=dict(width=1200, height=1300))
        page.goto(lab)
        page.locator('.jp-CodeCell').first.click(timeout=60_000)
        page.keyboard.press('Shift+Enter')
        page.locator('.saex h2', has_text='9-res-4k/13').wait_for(timeout=120_000)
        # another feature, by words of its label
        page.get_by_placeholder('words of an explanation').fill(label)
        page.keyboard.press('Enter')
        page.locator('.saex h2', has_text=f'9-res-4k/{other}').wait_for()
        # a text of one's own is coloured while it is typed, and stays text
        page.get_by_role('tab', name='Your text').click()
        page.get_by_placeholder('Type a text').press_sequentially(f'Our {word} is near the church. <b>{word}</b>')
        page.locator('.saex-read .lit').first.wait_for()
        page.locator('.saex-read').get_by_text('<b>').first.wait_for()
        assert page.locator('.saex-read .saex b').count() == 0
        page.locator('.jp-Cell-outputArea').first.screenshot(path=os.environ.get('SCREENSHOT', str(tmp_path/'explorer.png'))) # SCREENSHOT=figures/explorer.png keeps it for the docs
        # what cannot be found is said, and nothing is lost
        page.get_by_placeholder('words of an explanation').fill('qqqqqq')
        page.keyboard.press('Enter')
        page.get_by_role('alert').wait_for()
        assert page.locator('.saex h2', has_text=f'9-res-4k/{other}').count() == 1
        browser.close()
