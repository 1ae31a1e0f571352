"The command line: what it prints for scripts, and one line for each mistake"
import json
import pytest
from saeexplainer.cli import main, marked, resolve, safe_text
from saeexplainer.presets import data_dir, load_preset
from saeexplainer.store import RunStore


def ends(capsys, *args):
    "Exit code and the one line on stderr"
    with pytest.raises(SystemExit) as e: main(list(args))
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and 'Traceback' not in lines[0]
    return e.value.code, lines[0]


def test_presets_json(capsys):
    main(['presets', '--json'])
    assert 'gemma-2-9b-l20' in json.loads(capsys.readouterr().out)
    main(['presets', 'gemma-2-27b-l10', '--json'])
    assert json.loads(capsys.readouterr().out)['n_sft'] == 40_000


@pytest.mark.parametrize('args, says', [
    (['presets', 'gemma-2-9b-l21'], 'gemma-2-9b-l20'),
    (['run', 'smollm2-135m', '--size', 'huge'], 'huge'),
    (['run', 'smollm2-135m', '-s', 'n_sft'], "'n_sft' is not a setting: write field=value"),
    (['run', 'smollm2-135m', '-s', 'nsft=3'], 'n_sft'),
    (['run', 'smollm2-135m', '-s', 'n_sft=many'], 'n_sft'),
    (['explain'], 'no feature given: name some, or use --random 5'),
    (['explain', 'smollm2-135m/9-res-4k'], 'write model/source/index'),
    (['explain', '999999'], 'there is no feature 999999: smollm2-135m/9-res-4k has features 0 to 4095'),
    (['explain', 'gemma-2-9b/21-gemmascope-res-16k/1'], 'no preset explains gemma-2-9b/21-gemmascope-res-16k: name your own first'),
    (['explain', 'smollm2-135m', 'gemma-2-9b/20-gemmascope-res-16k/1'], 'the preset explains smollm2-135m/9-res-4k: name its preset'),
    (['explain', 'gemma-2-9b-l21', '1'], 'did you mean gemma-2-9b-l20'),
    (['explain', 'smollm2-135m', '--all'], '--all needs --out'),
    (['explain', 'smollm2-135m', '5', '--all', '--out', 'a.jsonl'], '--all explains every feature'), (['explain', '5', '--out', 'a.jsonl'], '--out is the file of --all'),
    (['explain', '--direction', 'd.safetensors', '--verify', '5'], '--direction explains what its file holds'),
    (['features', 'smollm2-135m', '--corpus', 'c.txt'], 'features.parquet is there already: --corpus and --tokens read anew with --anew'),
    (['explain', 'gemma-2-9b/20-gemmascope-res-16k/1'], '`saeexplainer features gemma-2-9b-l20` makes it'),
    (['explain', '5', '--preset', 'gemma-2-9b-l20'], 'features.parquet'),
    (['run', 'smollm2-135m', '--writer', 'gpt-5.4-mini'], "--writer must be 'openai' or 'local', not 'gpt-5.4-mini'; the model's name goes behind --model"),
    (['run', 'smollm2-135m', '--writer', 'openai'], '--writer openai needs the name of the model at the server: --model NAME'),
    (['run', 'smollm2-135m', '--writer', 'local', '--base-url', 'http://127.0.0.1:1/v1'], '--base-url goes with --writer openai'),
    (['run', 'smollm2-135m', '--base-url', 'http://127.0.0.1:1/v1'], '--base-url needs a model at that server'), (['run', 'smollm2-135m', '--model', 'local'], 'local is no model at a server'),
    (['run', 'gemma-2-9b-l20', '--base-url', 'http://me:secret@127.0.0.1/v1'], 'writer_url must hold no password'), (['run', 'smollm2-135m', '-s', 'prices={m: [1]}'], 'prices must hold two numbers for each model'), (['run', 'smollm2-135m', '-s', 'budget_usd=0'], 'a budget must be more than 0'),
    (['run', 'smollm2-135m', '--writer', 'openai', '--model', 'm', '-s', 'budget_usd=3', '--root', '.'], "a budget in dollars needs a price: prices={'m': "),
    (['evaluate', 'no-such.csv'], 'no file no-such.csv'),
    (['report', 'no-such-run'], 'there is no run'),
    (['explain', '--random', '-2'], "Invalid value for '--random'"), (['features', '--random', '-2'], "Invalid value for '--random'"), (['explain', '5', '--verify', '-3'], "Invalid value for '--verify'"),
    (['explain', '--random', '2', '--seed', '-1'], "Invalid value for '--seed'"),
    (['explain', '8-5'], '8-5 is no range of features'), (['explain', '1-999999'], 'is a range of too many features'), (['explain', '99998,99999'], 'there is no feature 99998'),
    (['verify', '5,6', 'x'], "'5,6' is not one feature"), (['verify', '5', ' '], 'the explanation is empty'),
    (['run', 'smollm2-135m', '--name', '../x'], "--name must be a name that stays in --root, not '../x'"), (['run', 'smollm2-135m', '--name', 'a\0b'], '--name must be a name that stays'),
    (['run', 'smollm2-135m', '--like', '/x'], '--like must be a name that stays in --root'), (['run', 'smollm2-135m', '-s', 'name=../../evil'], 'names that stay in their folder'),
    (['explain', '5', '--verify', '2', '--writer', 'openai', '--model', 'm'], 'no key for m: set OPENAI_API_KEY in the environment, name a server of your own with --base-url'),
    (['run', 'smollm2-135m', '-s', 'placeholder=""'], 'preset field placeholder must not be empty'), (['run', 'smollm2-135m', '-s', 'preset=x'], 'did you mean base'),
    (['benchmark', 'no-such.csv', '--bench', 'bench-0'], "there is no bench 'bench-0': there is "),
    (['features', 'gpt2-small-l8', '--test-contexts', '--corpus', 'c.txt', '5'], '`saeexplainer features gpt2-small-l8` makes it'),
    (['no-such-command'], 'no-such-command')])
def test_one_line_per_mistake(capsys, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    code, line = ends(capsys, *args)
    assert code == 2 and says in line


def test_evaluate_needs_its_columns(capsys, tmp_path):
    (tmp_path/'mine.csv').write_text('id,text\n1,a\n')
    assert 'it needs feature and explanation' in ends(capsys, 'evaluate', str(tmp_path/'mine.csv'), '--root', str(tmp_path))[1]
    (tmp_path/'mine.csv').write_text('feature,explanation\nabc\x1b[2J,a\n')
    line = ends(capsys, 'evaluate', str(tmp_path/'mine.csv'), '--root', str(tmp_path))[1]
    assert "is no feature, which is an index or model/source/index" in line and '\x1b' not in line


def test_evaluate_leaves_training_runs_alone(capsys, tmp_path):
    (tmp_path/'mine.csv').write_text('feature,explanation\n5,a\n')
    with RunStore(tmp_path/'full'/'store.sqlite') as store: store.start('sft')
    (tmp_path/'full'/'preset.yaml').write_text(load_preset('smollm2-135m', size='full').to_yaml())
    assert 'full is a training run: choose another --name' in ends(capsys, 'evaluate', str(tmp_path/'mine.csv'), '--root', str(tmp_path), '--name', 'full')[1]


def test_features_of_another_sae_measure_nothing(capsys, tmp_path):
    import shutil
    home = data_dir()/'smollm2-135m'
    shutil.copy(home/'features.parquet', tmp_path)
    (tmp_path/'features.json').write_text(json.dumps(json.loads((home/'features.json').read_text()) | dict(sae_sha256='0'*64)))
    (tmp_path/'mine.csv').write_text('feature,explanation\n5,a\n')
    (tmp_path/'mine.yaml').write_text(f'base: smollm2-135m\nfeatures: {tmp_path}/features.parquet\nlabel_model: peak words\nbaseline_labels: []\n')
    explain = ['explain', 'mine.yaml', '--explainer', str(home/'explainer'/'sft'), '--verify', '1']
    for args in (['evaluate', 'mine.csv', '--preset', 'mine.yaml', '--root', 'runs'], [*explain, '5'], [*explain, '--all', '--out', 'all.jsonl']):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.chdir(tmp_path); main(args)
        assert 'was read from an SAE with hash 000000000000' in capsys.readouterr().err


def test_a_report_of_half_a_folder(capsys, tmp_path):
    (tmp_path/'half').mkdir()
    (tmp_path/'half'/'provenance.json').write_text((data_dir()/'smollm2-135m'/'results'/'provenance.json').read_text())
    assert 'has no table' in ends(capsys, 'report', str(tmp_path/'half'))[1]


def test_which_writer_is_meant():
    p = resolve('smollm2-135m', 'demo', (), 'openai', 'http://127.0.0.1:8080/v1', 'mine')
    assert (p.writer, p.evaluation_writer, p.writer_url, p.one_text('writer')) == ('mine', 'mine', 'http://127.0.0.1:8080/v1', False)
    assert resolve('gemma-2-9b-l20', None, (), 'local').writer == 'local' and resolve('gemma-2-9b-l20', None, (), 'local', None, 'org/chat').evaluation_writer == 'local:org/chat'
    assert resolve('gemma-2-9b-l20', None, (), None, None, 'gpt-6').writer == 'gpt-6' and resolve('smollm2-135m', None, ['text_form=one'], 'openai', None, 'mine').one_text('writer')
    p = resolve('smollm2-135m', None, ['prices={mine: [.5, 2], other: [1, 1]}', 'budget_tokens=9000'])
    assert p.prices == {'mine': (.5, 2.), 'other': (1., 1.)} and p.budget_tokens == 9000


def test_presets_table_has_memory_and_disk(capsys, monkeypatch):
    from saeexplainer import cli
    from rich.console import Console
    monkeypatch.setattr(cli, 'out', Console(width=200))
    main(['presets'])
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if 'gemma-2-9b-l20' in line)
    assert '42 GB' in row and '39 GB' in row and '10k/5k/300' in row and 'gemma-2-9b-it' in row and '20-gemmascope-res-16k' in row


# ---- files of features, through the command

def test_features_from_neuronpedia(capsys, tmp_path, monkeypatch):
    from neuronpedia_server import Neuronpedia, activation, label, stats
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data')); monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    rows = {'features': [stats(i) for i in (0, 1, 10)], 'explanations': [label(0, 'parks'), label(0, 'rivers', 'gpt-5'), label(1, 'rain')], 'activations': [activation(0), activation(10)]}
    files = {f'v1/gpt2-small/8-res-jb/{kind}/batch-0.jsonl.gz': part for kind, part in rows.items()}
    for features in (None, str(tmp_path/'mine'/'features.parquet')): # in the cache, or where the preset says
        where = tmp_path/'mine' if features else tmp_path/'cache'/'features'/'gpt2-small'/'8-res-jb'
        settings = ['-s', f'features={features}'] if features else []
        with Neuronpedia(files) as server:
            monkeypatch.setenv('NEURONPEDIA_STORE', server.url)
            main(['features', 'gpt2-small-l8', *settings, '--json'])
            printed = capsys.readouterr()
            assert json.loads(printed.out) == {'ok': 2, 'unlabelled': 1} and 'gpt-4o-mini' in printed.err and (where/'features.parquet').exists()
            asked = len(server.log)
            main(['features', 'gpt2-small-l8', '0', *settings, '--json']) # nothing is fetched twice
            assert json.loads(capsys.readouterr().out)[0]['explanation'] == 'parks' and len(server.log) == asked
            main(['features', 'gpt2-small-l8', '0', *settings, '-s', 'label_model=gpt-5', '--json'])
            assert json.loads(capsys.readouterr().out)[0]['explanation'] == 'rivers'
    assert 'is called features.parquet, not other.parquet' in ends(capsys, 'features', 'gpt2-small-l8', '-s', f'features={tmp_path}/other.parquet')[1]


def test_one_feature_needs_no_export(capsys, tmp_path, monkeypatch):
    from neuronpedia_server import Neuronpedia
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data')); monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    answer = dict(modelId='gpt2-small', layer='8-res-jb', index='7', maxActApprox=5., frac_nonzero=.01, activations=[],
                  explanations=[dict(description='words about rain', explanationModelName='gpt-4o-mini', typeName='x')])
    with Neuronpedia(features={'gpt2-small/8-res-jb/7': answer}) as server:
        monkeypatch.setenv('NEURONPEDIA_API', server.url)
        main(['features', 'gpt2-small/8-res-jb/7', '--json'])
        [shown] = json.loads(capsys.readouterr().out)
        assert (shown['id'], shown['explanation'], shown['max_act']) == ('gpt2-small/8-res-jb/7', 'words about rain', 5.)
        assert 'Neuronpedia has no feature' in ends(capsys, 'features', 'gpt2-small/8-res-jb/8')[1]


def test_features_from_a_corpus(capsys, tmp_path, monkeypatch):
    from helpers import SENTENCES
    from test_run import make_preset
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    file = make_preset(tmp_path)
    (tmp_path/'text.txt').write_text('\n\n'.join(SENTENCES*3))
    main(['features', str(file), '--anew', '--corpus', str(tmp_path/'text.txt'), '--tokens', '200', '--json'])
    printed = capsys.readouterr()
    assert sum(json.loads(printed.out).values()) == 40 and '40 features read on' in printed.err
    card = json.loads((tmp_path/'data'/'tiny'/'features.json').read_text())
    assert card['corpus'].endswith('text.txt') and card['sae_sha256'] and card['status'] == json.loads(printed.out)


def test_version_and_help(capsys):
    import saeexplainer
    main(['--version'])
    assert capsys.readouterr().out.strip() == f'saeexplainer {saeexplainer.__version__}'
    for command in ('run', 'explain', 'evaluate', 'features', 'presets', 'report', 'doctor'):
        main([command, '--help'])
        assert f'saeexplainer {command}' in capsys.readouterr().out.split('Examples')[1]


def test_dry_run_needs_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(['run', 'gemma-2-9b-l20', '--dry-run', '--json'])
    plan = json.loads(capsys.readouterr().out)
    assert plan['features'] == {'sft': 10000, 'validation': 500, 'preferences': 5000, 'test': 300} and plan['machine'] == 'one A100' and plan['requests'] > 50_000 and not list(tmp_path.iterdir())
    main(['run', 'gemma-2-9b-l20', '--dry-run', '-s', 'target=org/unknown'])
    assert 'not known' in capsys.readouterr().out
    main(['run', 'gemma-2-9b-l20', '--dry-run', '--writer', 'openai', '--model', 'mine'])
    assert 'no price is known' in capsys.readouterr().out
    monkeypatch.setenv('OPENAI_BASE_URL', 'http://me:secret@127.0.0.1:9/v1?key=secret')
    main(['run', 'gemma-2-9b-l20', '--dry-run'])
    said = capsys.readouterr().out
    assert 'http://127.0.0.1:9/v1' in said.replace('\n', '') and 'secret' not in said


def test_settings_that_are_no_yaml_are_text():
    assert resolve('smollm2-135m', settings=['template={placeholder} means?', 'seed=3', 'dpo_lr=[1e-5, 2e-5]']).template == '{placeholder} means?'
    assert resolve('smollm2-135m', corpus='*.txt').corpus == '*.txt'


def test_explanations_are_measured_at_the_papers_counts(capsys, tmp_path):
    (tmp_path/'mine.csv').write_text('feature,explanation\n99999,x\n')
    with pytest.raises(SystemExit): main(['evaluate', str(tmp_path/'mine.csv'), '--preset', 'smollm2-135m', '--root', str(tmp_path)])
    assert 'explains no feature that can be measured' in capsys.readouterr().err
    assert load_preset(tmp_path/'mine/preset.yaml').n_generative == 10 # the folder has the name of the file


def test_settings_may_be_anything(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(['run', 'smollm2-135m', '--dry-run', '--json', '--size', 'demo', '-s', 'size=full'])
    assert json.loads(capsys.readouterr().out)['size'] == 'full'
    assert resolve('smollm2-135m', settings=['name=other']).name == 'other'


def test_nothing_drives_the_terminal():
    assert str(safe_text(('a\x1b[31mb', 'bold'), '\u202ec')) == 'a\ufffd[31mb\ufffdc' and str(marked([('a\x1b]0;x\x07', False)])) == 'a\ufffd]0;x\ufffd'


def test_the_shipped_results_give_the_shipped_report(tmp_path, capsys):
    import shutil
    shipped = data_dir()/'smollm2-135m'/'results'
    shutil.copytree(shipped, tmp_path/'results')
    for name in ('report.md', 'summary.csv'): (tmp_path/'results'/name).unlink()
    main(['report', str(tmp_path/'results'), '--out', str(tmp_path/'report')])
    assert 'generative' in capsys.readouterr().out and all((tmp_path/'report'/name).read_bytes() == (shipped/name).read_bytes() for name in ('report.md', 'summary.csv'))


def test_doctor(capsys, monkeypatch):
    monkeypatch.delenv('OPENAI_BASE_URL', raising=False); monkeypatch.setenv('OPENAI_API_KEY', 'sk-secret')
    main(['doctor', '--json'])
    said = capsys.readouterr().out
    assert all(row['well'] is not False for row in json.loads(said)) and 'sk-secret' not in said
    with pytest.raises(SystemExit) as e: main(['doctor', '--base-url', 'http://me:secret@127.0.0.1:9/v1?key=secret'])
    said = ' '.join(capsys.readouterr().out.split())
    assert e.value.code == 1 and 'does not answer' in said and 'secret' not in said
    with pytest.raises(SystemExit): main(['doctor', '--base-url', 'localhost:8000/v1'])
    assert 'localhost:8000/v1 is no address of a server: it begins with http:// or https://' in ' '.join(capsys.readouterr().out.split())


@pytest.mark.parametrize('exists', [True, False])
def test_doctor_says_where_the_data_is_to_come_from(tmp_path, capsys, monkeypatch, exists):
    if exists: (tmp_path/'data').mkdir()
    monkeypatch.delenv('OPENAI_BASE_URL', raising=False); monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    with pytest.raises(SystemExit): main(['doctor', '--json'])
    data = next(row for row in json.loads(capsys.readouterr().out) if row['what'] == 'data')
    assert data['well'] is False and 'the SAE is not there' in data['found'] and 'SAEEXPLAINER_DATA' in data['found'] and 'checkout' in data['found']


def test_interrupted_runs_keep_what_was_made(tmp_path):
    "Ctrl-C in a real process, while it trains; then the same command goes on with the same run"
    import os, re, signal, subprocess, sys, time
    args = ['run', 'smollm2-135m', '--size', 'demo', '--root', str(tmp_path), '--name', 'a b']
    env = {k: v for k, v in os.environ.items() if k != 'TQDM_DISABLE'} # the bar says when it trains
    command, log = [sys.executable, '-c', 'from saeexplainer.cli import main; main()', *args], tmp_path/'log'
    for begun in (False, True):
        p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log.open('w'), env=env, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # a shell's background jobs ignore it
        try:
            deadline = time.time() + 240
            while not re.search(r'sft:.* [1-9]\d*/', log.read_text()) and p.poll() is None and time.time() < deadline: time.sleep(.5)
            p.send_signal(signal.SIGINT)
            assert p.wait(60) == 130
        finally: p.kill()
        assert f"saeexplainer: interrupted; what was finished is kept, and the same command goes on from there: saeexplainer run smollm2-135m --size demo --root {tmp_path} --name 'a b'" in log.read_text()
        assert (tmp_path/'a b/preset.yaml').exists() and (tmp_path/'a b/store.sqlite').exists()
    with RunStore(tmp_path/'a b/store.sqlite') as store: assert json.loads(store.progress().set_index('stage').detail['sft'])['attempts'] == 2


def test_interrupted_looks_keep_nothing():
    from saeexplainer.cli import kept
    assert kept(['explain', '5']) == '; nothing was kept' and 'goes on' in kept(['explain', 'smollm2-135m', '--all', '--out', 'a.parquet'])

def test_without_what_is_shipped(capsys, tmp_path, monkeypatch): # as after an installation from a wheel
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'none')); monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    for args in (['explain', '5'], ['run', 'smollm2-135m', '--root', str(tmp_path/'runs')]):
        said = ends(capsys, *args)[1]
        assert f'there is no {tmp_path}/none either: all that is shipped lies in data/ of a checkout' in said, said


# ---- one line for every error

def raised(make):
    "The error that `make` raises, with its traceback"
    with pytest.raises(BaseException) as e: make()
    return e.value


def test_damaged_files_are_named(tmp_path):
    import jinja2, sqlite3
    import pyarrow.parquet as pq
    from safetensors.torch import load_file
    from saeexplainer.cli import one_line
    weights, table, text, store = (tmp_path/name for name in ('w.safetensors', 't.parquet', 'x.json', 's.sqlite'))
    weights.write_bytes(b'version https://git-lfs.github.com/spec/v1\n')
    table.write_bytes(b'PAR1')
    text.write_text('{"a": ')
    with RunStore(store): pass
    def read_json():
        with open(text) as file: return json.load(file)
    def read_store():
        path = str(store)
        with open(path, 'r+b') as file: file.truncate(5000)
        return sqlite3.connect(path).execute('SELECT * FROM texts').fetchall()
    for make, says in ((lambda: load_file(str(weights)), f'{weights} is a pointer of git-lfs'), (lambda: pq.read_table(str(table)), 'Parquet'), (read_json, f'{text} is not JSON'),
                       (read_store, f'{store} is damaged'), (lambda: jinja2.Template('{{ a.b.c }}').render(), 'set chat_template in the preset'),
                       (lambda: jinja2.Template('{{ 1/0 }}').render(), 'the chat template cannot be rendered (ZeroDivisionError')):
        line = one_line(raised(make))
        assert says in line and 'bug' not in line and '\n' not in line, line


@pytest.mark.parametrize('error, says', [
    (MemoryError(), 'not enough memory'), (RecursionError('maximum recursion depth'), 'nested too deeply'), (ImportError('No module named x'), 'a package is missing'),
    (OSError(28, 'No space left on device', '/x/y'), "No space left on device: '/x/y'"), (Exception('No space left on device (os error 28)'), 'is the disk full?'),
    (RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 0'), 'is the disk full?'),
    (ExceptionGroup('several', [ValueError('one\nof them')]), 'one of them'), (ValueError(), 'this is a bug'), (UnicodeDecodeError('utf-8', b'\xff', 0, 1, 'x'), 'is not UTF-8'),
    (KeyError('peft_type'), "KeyError: 'peft_type': this is a bug of saeexplainer; please report it at https://github.com/saeexplainer/saeexplainer/issues")])
@pytest.mark.parametrize('debug', [[], ['--debug']])
def test_every_error_is_one_line(capsys, monkeypatch, error, says, debug):
    from saeexplainer import cli
    def fails(*args, **more): raise error
    monkeypatch.setattr(cli, 'resolve', fails)
    for args in ([*debug, 'presets', 'x'], ['presets', 'x', *debug]):
        with pytest.raises(SystemExit) as e: main(args)
        said = capsys.readouterr().err.splitlines()
        assert e.value.code == 2 and says in said[-1] and said[-1].startswith('saeexplainer: ')
        assert (len(said) == 1) == (not debug) and ('Traceback' in said[0] or 'Traceback' in ''.join(said)) == bool(debug)


def test_a_cache_that_cannot_be_written_names_its_variable(monkeypatch):
    from saeexplainer.cli import one_line
    monkeypatch.setenv('SAEEXPLAINER_CACHE', '/nonexistent/.cache/saeexplainer')
    assert one_line(PermissionError(13, 'Permission denied', '/nonexistent')).endswith('set SAEEXPLAINER_CACHE to a folder that can be read and written')
    assert 'SAEEXPLAINER_CACHE' not in one_line(PermissionError(13, 'Permission denied', '/elsewhere'))


def test_it_runs_as_a_module():
    import subprocess, sys
    for module in ('saeexplainer', 'saeexplainer.cli'):
        said = subprocess.run([sys.executable, '-m', module, 'presets', 'no-such'], capture_output=True, text=True)
        assert said.returncode == 2 and said.stderr == "saeexplainer: unknown preset 'no-such': see `saeexplainer presets`\n"


def test_an_error_loads_no_model_library():
    import subprocess, sys
    code = "import sys\nfrom saeexplainer.cli import main\ntry: main(['presets', 'nix'])\nexcept SystemExit: print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == 'False\n'


def test_sigterm_says_what_is_kept():
    import signal, subprocess, sys, time
    p = subprocess.Popen([sys.executable, '-m', 'saeexplainer', 'explain', '--random', '400'], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(5) # it is loading
    p.send_signal(signal.SIGTERM)
    said = p.communicate(timeout=60)[1]
    assert p.returncode == 143 and said.splitlines()[-1] == 'saeexplainer: ended by SIGTERM; nothing was kept'


def test_the_home_folder_may_be_written_short(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('HOME', str(tmp_path))
    main(['run', 'smollm2-135m', '--dry-run', '--json', '--root=~/runs'])
    assert json.loads(capsys.readouterr().out)['run'] == str(tmp_path/'runs'/'smollm2-135m-demo')
    assert f'{tmp_path}/x' in ends(capsys, 'explain', '5', '--explainer=~/x')[1]


def test_messages_name_the_file_of_a_preset(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    (tmp_path/'mine.yaml').write_text('base: smollm2-135m\nsource: tiny/1-res\n')
    assert '`saeexplainer features mine.yaml` makes it' in ends(capsys, 'explain', 'mine.yaml', '3')[1]
    (tmp_path/'mine.yaml').write_text('base: smollm2-135m\n')
    assert 'train one with saeexplainer run mine.yaml' in ends(capsys, 'explain', 'mine.yaml', '3')[1]


# ---- lists, tables and marks

@pytest.mark.parametrize('width', [60, 80, 140])
def test_the_table_of_presets_fits(capsys, monkeypatch, width):
    from rich.console import Console
    from saeexplainer import cli
    from saeexplainer.presets import presets
    monkeypatch.setattr(cli, 'out', Console(width=width))
    main(['presets'])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line.strip() and line.split()[0] in presets()]
    assert sorted(names) == sorted(presets()) and names[0] == 'smollm2-135m' and all(len(line) <= width for line in lines)


def test_words_are_marked_where_styles_are_not_drawn(monkeypatch):
    from rich.console import Console
    from saeexplainer import cli
    pieces = [('The', False), (' ship', True)]
    for term, shown in (('dumb', 'The [ship]'), ('xterm', 'The ship')):
        monkeypatch.setattr(cli, 'out', Console(force_terminal=True, _environ={'TERM': term}))
        assert marked(pieces).plain == shown


def test_lines_are_whole_in_a_pipe(capsys):
    main(['features', '5', '8'])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith('smollm2-135m/9-res-4k/')]) == 2 and max(map(len, lines)) > 80


def test_flags_take_no_value_in_help(capsys):
    for args in (['-h'], ['explain', '-h'], ['run', '--help']):
        main(args)
        assert '<bool>' not in capsys.readouterr().out


def test_names_of_presets_are_completed():
    from saeexplainer.cli import _complete
    assert _complete('smo') == ['smollm2-135m'] and len(_complete('gemma-2-9b')) == 6


def test_times_are_in_minutes_where_they_are_short():
    from saeexplainer.cli import span
    assert (span(.05, .2), span(.005), span(3., 12.)) == ('3 to 12 min', '0.3 min', '3.0 to 12.0 h')


# ---- explanations of one's own, on a tiny model

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    from test_run import make_preset
    folder = tmp_path_factory.mktemp('tiny')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SAEEXPLAINER_DATA', str(folder/'data')); patch.setenv('SAEEXPLAINER_CACHE', str(folder/'cache'))
        yield folder, str(make_preset(folder, baselines=[]))


@pytest.mark.parametrize('says, made', [('', 0), ("I am sorry, I cannot help with that.", 0), ('{"sentences": ["a cat", "a dog", "the rain", "the sea"]}', 4)])
def test_texts_that_were_never_written_are_no_misses(tiny, capsys, says, made):
    from writer_server import Server
    with Server(lambda asked, n: says) as server:
        args = ['--writer', 'openai', '--base-url', server.url, '--model', 'm']
        main(['verify', '3', 'the word cat', '--preset', tiny[1], '--texts', '4', '--json', *args])
        verdict = json.loads(capsys.readouterr().out)
        main(['verify', '3', 'the word cat', '--preset', tiny[1], '--texts', '4', *args])
        line = capsys.readouterr().out.splitlines()[1]
        main(['explain', tiny[1], '3', '--explainer', 'untrained', '--verify', '4', '--json', *args])
        [explained] = json.loads(capsys.readouterr().out)
    for found in (verdict, explained): assert (found['texts'], found['unmade'], found['max_act'], len(found['written'])) == (made, 4 - made, 1., made)
    if made: assert isinstance(verdict['reached'], int) and 'of 4 texts reach half of 1.0; best' in line and verdict['score'] == pytest.approx(max(t['activation'] for t in verdict['written']), abs=1e-3)
    else: assert verdict['reached'] is explained['reached'] is verdict['score'] is verdict['best'] is None and '4 of 4 texts could not be written: nothing is known' in line


def test_evaluations_say_where_they_are_and_what_helps(tiny, capsys):
    import pandas as pd
    folder, preset = tiny
    root = ['--root', str(folder/'runs')]
    (folder/'one.csv').write_text('feature,explanation\n3,the word cat\n5,the word rain\n')
    (folder/'two.csv').write_text('feature,explanation\n3,words of the sea\n')
    main(['evaluate', str(folder/'one.csv'), '--preset', preset, *root])
    said = capsys.readouterr()
    assert 'chance is 33.3%' in said.out and f"{folder/'runs'/'one'}/explanations.csv" in said.out and '2 explanations and 2 labels beside them' in said.err
    assert all(len(line) <= 80 for line in said.out.splitlines() if '–' in line)
    each = pd.read_csv(folder/'runs'/'one'/'explanations.csv')
    assert len(each) == 4 and each.columns[:4].tolist() == ['stage', 'feature', 'explanation', 'generative'] and each.query("stage == 'one'")['explanation'].tolist() == ['the word cat', 'the word rain']
    assert {'feature', 'kind', 'text', 'activation'} <= set(pd.read_csv(folder/'runs'/'one'/'texts.csv'))
    main(['evaluate', str(folder/'two.csv'), '--preset', preset, '--name', 'one', '--json', *root]) # beside it
    assert {row['stage'] for row in json.loads(capsys.readouterr().out)} >= {'one', 'two', 'label'}
    assert set(pd.read_csv(folder/'runs'/'one'/'summary.csv')['stage']) >= {'one', 'two', 'label'}
    main(['report', 'one', *root])
    assert 'summary.csv' in capsys.readouterr().out
    (folder/'one.csv').write_text('feature,explanation\n3,the word dog\n')
    line = ends(capsys, 'evaluate', str(folder/'one.csv'), '--preset', preset, *root)[1]
    assert "has measured another explanation of feature 3: 'the word cat', not 'the word dog': choose another --name, or give the file another name" in line
    (folder/'runs'/'empty').mkdir(); (folder/'runs'/'empty'/'preset.yaml').write_text(load_preset(preset).to_yaml())
    assert 'holds no results yet' in ends(capsys, 'report', 'empty', *root)[1]


def test_another_size_is_one_word(tmp_path, capsys):
    (tmp_path/'mine.csv').write_text('feature,explanation\n99999,x\n')
    args = ['evaluate', str(tmp_path/'mine.csv'), '--preset', 'smollm2-135m', '--root', str(tmp_path)]
    with RunStore(tmp_path/'mine'/'store.sqlite'): pass
    (tmp_path/'mine'/'preset.yaml').write_text(load_preset('smollm2-135m', size='demo').to_yaml())
    assert ends(capsys, *args)[1].endswith('was begun with smollm2-135m at size demo, not smollm2-135m at size full: choose another --name, or --size demo')
