"The explorer in a real JupyterLab, in a real browser"
import json
import os
import socket
import subprocess
import sys
import time
from urllib.request import urlopen
import pytest
from playwright.sync_api import sync_playwright
from helpers import CHROMIUM, open_browser

SOURCE = 'from saeexplainer.explorer import FeatureExplorer\nFeatureExplorer(feature=13)'
CELL = dict(cell_type='code', id='a', execution_count=None, metadata={}, outputs=[], source=SOURCE)
KERNEL = {'kernelspec': dict(name='python3', display_name='python3', language='python')}
NOTEBOOK = dict(cells=[CELL], metadata=KERNEL, nbformat=4, nbformat_minor=5)
FOLDERS = ['JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTERLAB_SETTINGS_DIR',
           'JUPYTERLAB_WORKSPACES_DIR']
OPTIONS = [
    '--no-browser',
    '--allow-root',
    '--ip=127.0.0.1',
    '--IdentityProvider.token=',
    '--LabApp.news_url=',
    '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate',
]
KERNEL_IS_READY = '.jp-Notebook-ExecutionIndicator[data-status="idle"]' # keys that come before it may be lost
OTHER = 8 # a feature, some words of its label, and one that it fires on
LABEL = 'community settlement radio'
WORD = 'community'


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def wait_for(url, log):
    "Return when a server answers; raises `RuntimeError` with the end of its log"
    for _ in range(120):
        try:
            urlopen(url).read()
            return
        except OSError:
            time.sleep(.5)
    raise RuntimeError(log.read_text()[-2000:])


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "Address of a notebook that shows an explorer, in a JupyterLab on loopback"
    folder = tmp_path_factory.mktemp('lab')
    (folder/'look.ipynb').write_text(json.dumps(NOTEBOOK))
    url = f'http://127.0.0.1:{free_port()}'
    where = [f'--port={url.rsplit(":")[-1]}', f'--ServerApp.root_dir={folder}']
    env = os.environ | {name: str(folder/name.lower()) for name in FOLDERS}
    command = [sys.executable, '-m', 'jupyterlab', *OPTIONS, *where]
    with (folder/'log').open('w') as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as server:
        try:
            wait_for(f'{url}/api', folder/'log')
            yield f'{url}/lab/tree/look.ipynb?reset'
        finally:
            server.terminate()
            server.wait(20)


@pytest.fixture
def page(lab):
    "The notebook with its cell run"
    with sync_playwright() as playwright:
        browser = open_browser(playwright)
        page = browser.new_page(viewport=dict(width=1200, height=1300))
        page.goto(lab)
        page.locator(KERNEL_IS_READY).wait_for(timeout=120_000)
        page.locator('.jp-CodeCell').first.click(timeout=60_000)
        page.keyboard.press('Shift+Enter')
        page.locator('.saex h2', has_text='9-res-4k/13').wait_for(timeout=240_000)
        yield page
        browser.close()


def search_for(page, words):
    page.get_by_placeholder('words of an explanation').fill(words)
    page.keyboard.press('Enter')


def keep_picture(page, folder): # SCREENSHOT=figures/explorer.png keeps it for the docs
    file = os.environ.get('SCREENSHOT', str(folder/'explorer.png'))
    page.locator('.jp-Cell-outputArea').first.screenshot(path=file)


@pytest.mark.skipif(CHROMIUM is None, reason='no Chromium is installed: the explorer is not tried in a browser')
def test_explorer_in_jupyterlab(page, tmp_path):
    # another feature, by words of its label
    search_for(page, LABEL)
    page.locator('.saex h2', has_text=f'9-res-4k/{OTHER}').wait_for()
    # a text of one's own is coloured while it is typed, and stays text
    page.get_by_role('tab', name='Your text').click()
    typed = f'Our {WORD} is near the church. <b>{WORD}</b>'
    page.get_by_placeholder('Type a text').press_sequentially(typed)
    page.locator('.saex-read .lit').first.wait_for()
    page.locator('.saex-read').get_by_text('<b>').first.wait_for()
    assert page.locator('.saex-read .saex b').count() == 0
    keep_picture(page, tmp_path)
    # what cannot be found is said, and nothing is lost
    search_for(page, 'qqqqqq')
    page.get_by_role('alert').filter(has_text='qqqqqq').wait_for() # JupyterLab has alerts of its own
    assert page.locator('.saex h2', has_text=f'9-res-4k/{OTHER}').count() == 1
