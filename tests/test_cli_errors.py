"The command line: one line for each mistake, and for every error"
import json, os, shutil, signal, socket, sqlite3, subprocess, sys
import jinja2
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from saeexplainer import cli
from saeexplainer.cli import kept, main, one_line
from saeexplainer.presets import data_dir, load_preset
from saeexplainer.sources import neuronpedia
from saeexplainer.store import RunStore
from commands import ends, printed_json

pytestmark = pytest.mark.slow
HERE = 'http://127.0.0.1:1/v1'


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "No test waits for a Neuronpedia that is not there"
    monkeypatch.setattr(neuronpedia, 'PAUSE', .01)


# ---- mistakes

@pytest.mark.parametrize('args, says', [
    (['presets', 'gemma-2-9b-l21'], 'gemma-2-9b-l20'),
    (['presets', '--find', 'zebra'], "sae-lens lists nothing with 'zebra' in it"),
    (['preset', 'new', 'gemma-scope-2b-pt-rse:x'], 'did you mean gemma-scope-2b-pt-res'),
    (['preset', 'new', 'temporal-sae-gemma-2-2b:blocks.12.hook_resid_post'], 'cannot be explained: a temporal SAE'),
    (['run', 'smollm2-135m', '--size', 'huge'], 'huge'),
    (['run', 'smollm2-135m', '-s', 'n_sft'], "'n_sft' is not a setting: write field=value"),
    (['run', 'smollm2-135m', '-s', 'nsft=3'], 'n_sft'),
    (['run', 'smollm2-135m', '-s', 'n_sft=many'], 'n_sft'),
    (['explain'], 'no feature given: name some, or use --random 5'),
    (['explain', 'smollm2-135m/9-res-4k'], 'write model/source/index'),
    (['explain', '999999'], 'there is no feature 999999: smollm2-135m/9-res-4k has features 0 to 4095'),
    (['explain', 'gemma-2-9b/99-gemmascope-res-16k/1'],
     'no preset explains gemma-2-9b/99-gemmascope-res-16k: name your own first'),
    (['explain', 'gemma-2-9b/21-gemmascope-res-16k/1'],
     '`saeexplainer features gemma-scope-9b-pt-res-canonical:layer_21/width_16k/canonical` makes it'),
    (['explain', 'smollm2-135m', 'gemma-2-9b/20-gemmascope-res-16k/1'],
     'the preset explains smollm2-135m/9-res-4k: name its preset'),
    (['explain', 'gemma-2-9b-l21', '1'], 'did you mean gemma-2-9b-l20'),
    (['explain', 'smollm2-135m', '--all'], '--all needs --out'),
    (['explain', 'smollm2-135m', '5', '--all', '--out', 'a.jsonl'], '--all explains every feature'),
    (['explain', '5', '--out', 'a.jsonl'], '--out is the file of --all'),
    (['explain', '--direction', 'd.safetensors', '--verify', '5'], '--direction explains what its file holds'),
    (['explain', '--direction', 'd.safetensors', '--candidates', '5'], '--candidates has no feature to choose by'),
    (['explain', '5', '--candidates', '-1'], 'candidates'),
    (['features', 'smollm2-135m', '--corpus', 'c.txt'],
     'features.parquet is there already: --corpus and --tokens read anew with --anew'),
    (['explain', 'gemma-2-9b/20-gemmascope-res-16k/1'], '`saeexplainer features gemma-2-9b-l20` makes it'),
    (['explain', '5', '--preset', 'gemma-2-9b-l20'], 'features.parquet'),
    (['run', 'smollm2-135m', '--writer', 'gpt-5.4-mini'],
     "--writer must be 'openai' or 'local', not 'gpt-5.4-mini'; the model's name goes behind --model"),
    (['run', 'smollm2-135m', '--writer', 'openai'],
     '--writer openai needs the name of the model at the server: --model NAME'),
    (['run', 'smollm2-135m', '--writer', 'local', '--base-url', HERE], '--base-url goes with --writer openai'),
    (['run', 'smollm2-135m', '--base-url', HERE], '--base-url needs a model at that server'),
    (['run', 'smollm2-135m', '--model', 'local'], 'local is no model at a server'),
    (['run', 'gemma-2-9b-l20', '--base-url', 'http://me:secret@127.0.0.1/v1'], 'writer_url must hold no password'),
    (['run', 'smollm2-135m', '-s', 'prices={m: [1]}'], 'prices must hold two numbers for each model'),
    (['run', 'smollm2-135m', '-s', 'budget_usd=0'], 'a budget must be more than 0'),
    (['run', 'smollm2-135m', '--writer', 'openai', '--model', 'm', '-s', 'budget_usd=3', '--root', '.'],
     "a budget in dollars needs a price: prices={'m': "),
    (['evaluate', 'no-such.csv'], 'no file no-such.csv'),
    (['benchmark', 'no-such.csv'], 'no file no-such.csv'),
    (['benchmark', '--bench', 'bench-0'], "there is no bench 'bench-0': there is "),
    (['features', 'gpt2-small-l8', '--test-contexts', '--corpus', 'c.txt', '5'],
     '`saeexplainer features gpt2-small-l8` makes it'),
    (['features', 'gpt2-small-l8', '5', '--unchecked'], '--unchecked is for --test-contexts, which is not given'),
    (['report', 'no-such-run'], 'there is no run'),
    (['explain', '--random', '-2'], "Invalid value for '--random'"),
    (['features', '--random', '-2'], "Invalid value for '--random'"),
    (['explain', '5', '--verify', '-3'], "Invalid value for '--verify'"),
    (['explain', '--random', '2', '--seed', '-1'], "Invalid value for '--seed'"),
    (['explain', '8-5'], '8-5 is no range of features'),
    (['explain', '1-999999'], 'is a range of too many features'),
    (['explain', '99998,99999'], 'there is no feature 99998'),
    (['verify', '5,6', 'x'], "'5,6' is not one feature"),
    (['verify', '5', ' '], 'the explanation is empty'),
    (['verify', 'the word is', '5'], "'the word is' is no feature: the feature comes first, as in "
                                     "`saeexplainer verify 5 'the word is'`"),
    (['verify', 'rain', 'smollm2-135m/9-res-4k/5'], "'rain' is no feature: the feature comes first"),
    (['verify', '99999', '5'], 'there is no feature 99999'), # an explanation may be a number
    (['explain', '--', '-1'], "'-1' is not a feature: an index is a whole number, 0 to 4095; in full it is "
                              'model/source/index, such as smollm2-135m/9-res-4k/5'),
    (['explain', '1.5'], "'1.5' is not a feature: an index is a whole number, 0 to 4095"),
    (['evaluate', 'mine.xlsx'], 'no file mine.xlsx'),
    (['run', 'smollm2-135m', '--name', '../x'], "--name must be a name that stays in --root, not '../x'"),
    (['run', 'smollm2-135m', '--name', 'a\0b'], '--name must be a name that stays'),
    (['run', 'smollm2-135m', '--like', '/x'], '--like must be a name that stays in --root'),
    (['run', 'smollm2-135m', '-s', 'name=../../evil'], 'names that stay in their folder'),
    (['explain', '5', '--verify', '2', '--writer', 'openai', '--model', 'm'],
     'no key for m: set OPENAI_API_KEY in the environment, name a server of your own with --base-url'),
    (['run', 'smollm2-135m', '-s', 'placeholder=""'], 'preset field placeholder must not be empty'),
    (['run', 'smollm2-135m', '-s', 'preset=x'], 'did you mean base'),
    (['no-such-command'], 'no-such-command')])
def test_one_line_per_mistake(capsys, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    code, line = ends(capsys, *args)
    assert code == 2
    assert says in line


def csv_of(folder, text) -> str:
    "A file of explanations"
    file = folder/'mine.csv'
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize('text, says', [
    ('id,text\n1,a\n', 'mine.csv has the columns id, text: it needs feature and explanation'),
    ('Feature,What\n1,a\n', 'mine.csv has the columns Feature, What: it needs feature and explanation'),
    ('5,the word is\n8,rain\n', 'has the columns 5, the word is: it needs feature and explanation; '
                                'the first row must name the columns, as in feature,explanation'),
    ('smollm2-135m/9-res-4k/5,rain\n8,snow\n', 'the first row must name the columns'),
    ('feature,explanation\nabc\x1b[2J,a\n', 'is no feature, which is an index or model/source/index')])
def test_evaluate_needs_its_columns(capsys, tmp_path, text, says):
    _, line = ends(capsys, 'evaluate', csv_of(tmp_path, text), '--root', str(tmp_path))
    assert says in line
    assert '\x1b' not in line


def test_evaluate_leaves_training_runs_alone(capsys, tmp_path):
    with RunStore(tmp_path/'full'/'store.sqlite') as store: store.start('sft')
    (tmp_path/'full'/'preset.yaml').write_text(load_preset('smollm2-135m', size='full').to_yaml())
    mine = csv_of(tmp_path, 'feature,explanation\n5,a\n')
    _, line = ends(capsys, 'evaluate', mine, '--root', str(tmp_path), '--name', 'full')
    assert 'full is a training run: choose another --name' in line


def test_another_size_is_one_word(capsys, tmp_path):
    mine = csv_of(tmp_path, 'feature,explanation\n99999,x\n')
    with RunStore(tmp_path/'mine'/'store.sqlite'): pass
    (tmp_path/'mine'/'preset.yaml').write_text(load_preset('smollm2-135m', size='demo').to_yaml())
    _, line = ends(capsys, 'evaluate', mine, '--preset', 'smollm2-135m', '--root', str(tmp_path))
    begun = 'was begun with smollm2-135m at size demo, not smollm2-135m at size full'
    assert line.endswith(f'{begun}: choose another --name, or --size demo')


@pytest.fixture
def mismatched(tmp_path, monkeypatch):
    "A folder with a preset whose feature table was read from another SAE"
    monkeypatch.chdir(tmp_path)
    home = data_dir()/'smollm2-135m'
    shutil.copy(home/'features.parquet', tmp_path)
    card = json.loads((home/'features.json').read_text())
    (tmp_path/'features.json').write_text(json.dumps(card | dict(sae_sha256='0'*64)))
    fields = dict(base='smollm2-135m', features=f'{tmp_path}/features.parquet', label_model='peak words')
    lines = [*(f'{name}: {value}\n' for name, value in fields.items()), 'baseline_labels: []\n']
    (tmp_path/'mine.yaml').write_text(''.join(lines))
    csv_of(tmp_path, 'feature,explanation\n5,a\n')


EXPLAIN = ['explain', 'mine.yaml', '--explainer', str(data_dir()/'smollm2-135m'/'explainer'/'sft'), '--verify', '1']

@pytest.mark.parametrize('args', [
    ['evaluate', 'mine.csv', '--preset', 'mine.yaml', '--root', 'runs'],
    [*EXPLAIN, '5'],
    [*EXPLAIN, '--all', '--out', 'all.jsonl']], ids=['evaluate', 'explain', 'explain all'])
def test_features_of_another_sae_measure_nothing(capsys, mismatched, args):
    with pytest.raises(SystemExit): main(args)
    assert 'was read from an SAE with hash 000000000000' in capsys.readouterr().err


def test_a_report_of_half_a_folder(capsys, tmp_path):
    shutil.copy(data_dir()/'smollm2-135m'/'results'/'provenance.json', tmp_path)
    assert 'has no table' in ends(capsys, 'report', str(tmp_path))[1]


@pytest.mark.parametrize('args', [['explain', '5'], ['run', 'smollm2-135m', '--root', 'runs']])
def test_without_what_is_shipped(capsys, tmp_path, monkeypatch, args):
    "As after an installation from a wheel"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'none'))
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    _, line = ends(capsys, *args)
    assert f'there is no {tmp_path}/none either: all that is shipped lies in data/ of a checkout' in line


def test_the_home_folder_may_be_written_short(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    plan = printed_json(capsys, 'run', 'smollm2-135m', '--dry-run', '--root=~/runs')
    assert plan['run'] == str(tmp_path/'runs'/'smollm2-135m-demo')
    assert f'{tmp_path}/x' in ends(capsys, 'explain', '5', '--explainer=~/x')[1]


@pytest.mark.parametrize('more, says', [
    ('source: tiny/1-res\n', '`saeexplainer features mine.yaml` makes it'),
    ('', 'train one with saeexplainer run mine.yaml')])
def test_messages_name_the_file_of_a_preset(tmp_path, monkeypatch, capsys, more, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    (tmp_path/'mine.yaml').write_text(f'base: smollm2-135m\n{more}')
    assert says in ends(capsys, 'explain', 'mine.yaml', '3')[1]


# ---- errors

def line_for(make, *args) -> str:
    "The line for the error that `make` raises"
    with pytest.raises(BaseException) as e: make(*args)
    line = one_line(e.value)
    assert 'bug' not in line
    assert '\n' not in line
    return line


def test_weights_that_git_lfs_has_not_fetched_are_named(tmp_path):
    file = tmp_path/'w.safetensors'
    file.write_bytes(b'version https://git-lfs.github.com/spec/v1\n')
    assert f'{file} is a pointer of git-lfs' in line_for(load_file, str(file))


def test_a_damaged_table_is_named(tmp_path):
    file = tmp_path/'t.parquet'
    file.write_bytes(b'PAR1')
    assert 'Parquet' in line_for(pq.read_table, str(file))


def test_a_file_that_is_no_json_is_named(tmp_path):
    path = tmp_path/'x.json'
    path.write_text('{"a": ')
    def read():
        with open(path) as file: return json.load(file)
    assert f'{path} is not JSON' in line_for(read)


def test_a_damaged_store_is_named(tmp_path):
    path = str(tmp_path/'s.sqlite')
    with RunStore(path): pass
    os.truncate(path, 5000)
    def read(path): return sqlite3.connect(path).execute('SELECT * FROM texts').fetchall()
    assert f'{path} is damaged' in line_for(read, path)


@pytest.mark.parametrize('template, says', [
    ('{{ a.b.c }}', 'set chat_template in the preset'),
    ('{{ 1/0 }}', 'the chat template cannot be rendered (ZeroDivisionError')])
def test_a_chat_template_that_fails_is_named(template, says):
    assert says in line_for(jinja2.Template(template).render)


BUG = 'this is a bug of saeexplainer; please report it at https://github.com/saeexplainer/saeexplainer/issues'

@pytest.mark.parametrize('error, says', [
    (MemoryError(), 'not enough memory'),
    (RecursionError('maximum recursion depth'), 'nested too deeply'),
    (ImportError('No module named x'), 'a package is missing'),
    (OSError(28, 'No space left on device', '/x/y'), "No space left on device: '/x/y'"),
    (Exception('No space left on device (os error 28)'), 'is the disk full?'),
    (RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 0'), 'is the disk full?'),
    (ExceptionGroup('several', [ValueError('one\nof them')]), 'one of them'),
    (ValueError(), 'this is a bug'),
    (UnicodeDecodeError('utf-8', b'\xff', 0, 1, 'x'), 'is not UTF-8'),
    (KeyError('peft_type'), f"KeyError: 'peft_type': {BUG}")])
@pytest.mark.parametrize('debug', [False, True])
@pytest.mark.parametrize('at', ['beginning', 'end'])
def test_every_error_is_one_line(capsys, monkeypatch, error, says, debug, at):
    def fails(*args, **more): raise error
    monkeypatch.setattr(cli, 'resolve', fails)
    flag = ['--debug'] if debug else []
    args = [*flag, 'presets', 'x'] if at == 'beginning' else ['presets', 'x', *flag]
    with pytest.raises(SystemExit) as e: main(args)
    assert e.value.code == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert line.startswith('saeexplainer: ')
    assert says in line
    assert ('Traceback' in ''.join(before)) == debug
    assert bool(before) == debug


@pytest.mark.parametrize('path, named', [
    ('/nonexistent', True),
    ('/elsewhere', False)])
def test_a_cache_that_cannot_be_written_names_its_variable(monkeypatch, path, named):
    monkeypatch.setenv('SAEEXPLAINER_CACHE', '/nonexistent/.cache/saeexplainer')
    line = one_line(PermissionError(13, 'Permission denied', path))
    assert line.endswith('set SAEEXPLAINER_CACHE to a folder that can be read and written') == named
    assert ('SAEEXPLAINER_CACHE' in line) == named


# ---- processes

@pytest.mark.parametrize('module', ['saeexplainer', 'saeexplainer.cli'])
def test_it_runs_as_a_module(module):
    command = [sys.executable, '-m', module, 'presets', 'no-such']
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 2
    assert said.stderr == "saeexplainer: unknown preset 'no-such': see `saeexplainer presets`\n"


AN_ERROR = '''
import sys
from saeexplainer.cli import main
try: main(sys.argv[1:])
except SystemExit: print(sorted({'torch', 'transformers', 'pandas', 'numpy', 'pyarrow'} & set(sys.modules)))
'''

@pytest.mark.parametrize('command', [
    'presets nix', 'run nix', 'run smollm2-135m --workers 2', 'run smollm2-135m --like nix', 'report nix',
    'explain nix', 'explain 5 --json true', 'explain 4096', 'explain', 'explain 5 --out x', 'explain --direction nix',
    'explain gpt2-small/8-res-jb/5 smollm2-135m/9-res-4k/5', 'features 5,4096', 'features 5 --unchecked',
    'verify 4096 x', 'verify 5 x --writer openai', 'evaluate nix.csv', 'evaluate bad.csv', 'evaluate semicolons.csv',
    'benchmark nix.csv', 'benchmark --built-in x.csv', 'label-graph nix.json', 'label-graph bad.csv --preset nix'])
def test_an_error_is_told_before_libraries_are_loaded(tmp_path, command):
    "Else each costs seconds"
    (tmp_path/'bad.csv').write_text('a,b\n1,2\n')
    (tmp_path/'semicolons.csv').write_text('feature;explanation\nfive;the word\n')
    process = [sys.executable, '-c', AN_ERROR, *command.split()]
    ended = subprocess.run(process, capture_output=True, text=True, cwd=tmp_path)
    assert ended.stderr.startswith('saeexplainer: ')
    assert ended.stdout == '[]\n'


def test_sigterm_says_what_is_kept():
    "While a command waits for a server"
    with socket.create_server(('127.0.0.1', 0)) as server:
        server.settimeout(240)
        url = f'http://127.0.0.1:{server.getsockname()[1]}/v1'
        command = [sys.executable, '-m', 'saeexplainer', 'doctor', '--base-url', url]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = server.accept()
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=60)[1]
            connection.close()
    assert process.returncode == 143
    assert said.splitlines()[-1] == 'saeexplainer: ended by SIGTERM; nothing was kept'


def test_interrupted_looks_keep_nothing():
    assert kept(['explain', '5']) == '; nothing was kept'
    assert 'goes on' in kept(['explain', 'smollm2-135m', '--all', '--out', 'a.parquet'])
