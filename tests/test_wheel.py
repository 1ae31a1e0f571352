"The wheel, installed outside the checkout: it explains and verifies a feature, and names what it does not hold"
import os
import re
import subprocess
import sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']


def copy_checkout(source):
    "Clone the checkout, with what is changed and not committed"
    subprocess.run(['git', 'clone', '-q', '--no-hardlinks', str(ROOT), str(source)], check=True)
    changed = subprocess.run(['git', 'diff', 'HEAD', '--binary'], cwd=ROOT, capture_output=True, check=True).stdout
    if changed: subprocess.run(['git', 'apply'], input=changed, cwd=source, check=True)
    return source


def build_wheel(source, folder):
    command = [*PIP, 'wheel', str(source), '--no-deps', '--no-build-isolation', '-w', str(folder)]
    subprocess.run(command, check=True)
    [wheel] = folder.glob('*.whl')
    return wheel


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "A function that runs Python with the installed wheel, in a folder of its own"
    work = tmp_path_factory.mktemp('wheel')
    wheel = build_wheel(copy_checkout(work/'source'), work)
    assert wheel.stat().st_size < 27e6
    subprocess.run([*PIP, 'install', '--no-deps', '--target', str(work/'site'), str(wheel)], check=True)
    (work/'elsewhere').mkdir()
    env = {**os.environ, 'PYTHONPATH': str(work/'site')}
    env.pop('SAEEXPLAINER_DATA', None)
    def run(*args):
        done = subprocess.run([sys.executable, *args], cwd=work/'elsewhere', env=env, capture_output=True, text=True,
                              timeout=900)
        return done.returncode, done.stdout, done.stderr
    return run


def test_its_data_is_inside(installed):
    code, out, err = installed('-c', 'import saeexplainer.presets as p; print(p.data_dir()); print(p.__file__)')
    folder, file = out.split()
    assert code == 0, err
    assert Path(folder) == Path(file).parent/'data'


def test_type_checkers_take_its_annotations(installed):
    script = 'import saeexplainer.presets as p, pathlib; print((pathlib.Path(p.__file__).parent/"py.typed").exists())'
    assert installed('-c', script)[1] == 'True\n'


def test_links_of_its_description_work_anywhere(installed):
    script = 'from importlib.metadata import metadata; print(metadata("saeexplainer")["Description"])'
    code, out, err = installed('-c', script)
    assert code == 0, err
    links = re.findall(r'!?\[[^]]*]\(([^)\s]+)', out)
    assert any(link.endswith('example.png') for link in links)
    assert [link for link in links if not link.startswith(('https://', '#'))] == []
    pictures = re.findall(r'!\[[^]]*]\(([^)\s]+)', out)
    assert all(link.startswith('https://raw.githubusercontent.com/') for link in pictures)


def test_it_explains_and_verifies(installed):
    code, out, err = installed('-m', 'saeexplainer', 'explain', '5', '--verify', '4')
    assert code == 0, err
    assert out.startswith('smollm2-135m/9-res-4k/5 ')
    assert ' of 4 texts reach half of ' in out


def test_it_holds_a_bench_and_its_ranking(installed):
    code, out, err = installed('-m', 'saeexplainer', 'benchmark', '--json')
    assert code == 0, err
    assert '"random label"' in out


def test_a_report_that_is_not_inside_ends_without_a_traceback(installed):
    code, _, err = installed('-m', 'saeexplainer', 'report', 'nothing-here')
    assert code
    assert 'Traceback' not in err


RESULTS = '''
from saeexplainer.presets import data_dir
from saeexplainer.results import Results
Results(data_dir()/"smollm2-135m"/"results")
'''


def test_what_is_not_inside_is_named(installed):
    code, _, err = installed('-c', RESULTS)
    assert code
    assert 'of a checkout' in err.splitlines()[-1]


LAB = '''
import saeexplainer as sx
lab = sx.load('smollm2-135m')
print(lab.explain([5]))
print(sx.FeatureExplorer(lab, feature=5).own())
'''


def test_the_front_door_is_open(installed):
    code, out, err = installed('-c', LAB)
    assert code == 0, err
    explained, own = out.strip().splitlines()
    assert own in explained
