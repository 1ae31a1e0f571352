"The command line: what it prints for people and for scripts, and what is kept of what it does"
import io, json, os, re, shlex, shutil, signal, subprocess, sys, time
from contextlib import redirect_stderr, redirect_stdout
import pandas as pd
import pytest
from rich.console import Console
import saeexplainer
from saeexplainer import cli
from saeexplainer.cli import main, marked, resolve, safe_text, show_lowest, show_summary, span
from saeexplainer.evaluation.tables import summary
from saeexplainer.presets import data_dir, load_preset, presets
from saeexplainer.report import next_steps
from saeexplainer.results import Results
from saeexplainer.store import RunStore
from saeexplainer.target import Target
from commands import ends, parsed, printed, printed_json
from helpers import SENTENCES, tiny_sae
from judged import judged_preset
from neuronpedia_server import Neuronpedia, activation, label, stats
from tiny_lab import make_lab
from writer_server import Server

SHIPPED = data_dir()/'smollm2-135m'/'results'


def in_folder(monkeypatch, folder):
    "Data and cache of a user who has neither"
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(folder/'data'))
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(folder/'cache'))


# ---- presets, settings and plans

def test_presets_json(capsys):
    assert 'gemma-2-9b-l20' in printed_json(capsys, 'presets')
    assert printed_json(capsys, 'presets', 'gemma-2-27b-l10')['n_sft'] == 40_000


@pytest.mark.parametrize('args, writer, evaluation_writer', [
    (['smollm2-135m', 'demo', (), 'openai', 'http://127.0.0.1:8080/v1', 'mine'], 'mine', 'mine'),
    (['gemma-2-9b-l20', None, (), 'local'], 'local', None),
    (['gemma-2-9b-l20', None, (), 'local', None, 'org/chat'], None, 'local:org/chat'),
    (['gemma-2-9b-l20', None, (), None, None, 'gpt-6'], 'gpt-6', None)])
def test_which_writer_is_meant(args, writer, evaluation_writer):
    preset = resolve(*args)
    if writer: assert preset.writer == writer
    if evaluation_writer: assert preset.evaluation_writer == evaluation_writer


def test_a_writer_at_a_server_writes_lists_unless_told_otherwise():
    preset = resolve('smollm2-135m', 'demo', (), 'openai', 'http://127.0.0.1:8080/v1', 'mine')
    assert preset.writer_url == 'http://127.0.0.1:8080/v1'
    assert preset.one_text('writer') is False
    assert resolve('smollm2-135m', None, ['text_form=one'], 'openai', None, 'mine').one_text('writer')


def test_prices_and_budgets_are_settings():
    preset = resolve('smollm2-135m', None, ['prices={mine: [.5, 2], other: [1, 1]}', 'budget_tokens=9000'])
    assert preset.prices == {'mine': (.5, 2.), 'other': (1., 1.)}
    assert preset.budget_tokens == 9000


def test_settings_that_are_no_yaml_are_text():
    settings = ['template={placeholder} means?', 'n_hints=0', 'seed=3', 'dpo_lr=[1e-5, 2e-5]']
    preset = resolve('smollm2-135m', settings=settings)
    assert preset.template == '{placeholder} means?'
    assert resolve('smollm2-135m', corpus='*.txt').corpus == '*.txt'


def test_settings_may_be_anything(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = printed_json(capsys, 'run', 'smollm2-135m', '--dry-run', '--size', 'demo', '-s', 'size=full')
    assert plan['size'] == 'full'
    assert resolve('smollm2-135m', settings=['name=other']).name == 'other'


def test_a_plan_needs_nothing_and_leaves_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = printed_json(capsys, 'run', 'gemma-2-9b-l20', '--dry-run')
    assert plan['features'] == {'sft': 10000, 'validation': 500, 'preferences': 5000, 'test': 300}
    assert plan['machine'] == 'one A100'
    assert plan['requests'] > 50_000
    assert not list(tmp_path.iterdir())


def test_a_plan_with_workers(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, 'out', Console(width=200))
    arguments = ['run', 'gemma-2-9b-l20', '--dry-run', '--ray', '--workers', '8']
    plan = printed_json(capsys, *arguments)
    assert (plan['workers'], plan['workers_gb']) == (8, 8*plan['worker_gb'])
    said = printed(capsys, *arguments)
    for line in ('on 8 workers', 'their memory', 'their disk', 'the driver', 'about $'): assert line in said
    assert 'workers' not in printed(capsys, *arguments[:3])


@pytest.mark.parametrize('more, says', [
    (['-s', 'target=org/unknown'], 'not known'),
    (['-s', 'target=org/unknown', '--ray'], 'not known'),
    (['--writer', 'openai', '--model', 'mine'], 'no price is known')])
def test_a_plan_says_what_it_does_not_know(capsys, tmp_path, monkeypatch, more, says):
    monkeypatch.chdir(tmp_path)
    assert says in printed(capsys, 'run', 'gemma-2-9b-l20', '--dry-run', *more)


@pytest.mark.parametrize('fields, says', [
    ({}, None),
    ({'sae': 'none/sae'}, ['SAE: not found at none/sae or ']),
    ({'features': 'none.parquet', 'corpus': 'none.txt'}, ['corpus: not found at none.txt']),
    ({'features': 'none.parquet', 'corpus': 'none.txt', 'sae': 'none/sae'},
     ['SAE: not found at none/sae or ', '; corpus: not found at none.txt']),
    ({'features': 'none.parquet', 'corpus': 'org/texts'}, None), # of the hub
    ({'sae': 'gpt2-small-res-jb:blocks.8.hook_resid_pre'}, None)])
def test_a_plan_lacks_what_is_not_there(capsys, tmp_path, monkeypatch, fields, says):
    lab = make_lab(tmp_path, baselines=[], **fields)
    in_folder(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    command = ['run', str(lab.file), '--dry-run']
    if says is None:
        assert printed_json(capsys, *command)['target'] == str(lab.model)
        return
    code, line = ends(capsys, *command)
    assert code == 2
    for part in says: assert part in line


def test_a_plan_lacks_labels_of_another_model(capsys, monkeypatch):
    code, line = ends(capsys, 'run', 'smollm2-135m', '--dry-run', '-s', 'label_model=gpt-9')
    assert code == 2
    assert line.startswith('saeexplainer: labels: ')
    assert "has no labels of 'gpt-9': it has those of " in line


def test_a_plan_shows_an_address_without_its_secrets(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OPENAI_BASE_URL', 'http://me:secret@127.0.0.1:9/v1?key=secret')
    said = printed(capsys, 'run', 'gemma-2-9b-l20', '--dry-run')
    assert 'http://127.0.0.1:9/v1' in said.replace('\n', '')
    assert 'secret' not in said


def test_presets_table_has_memory_and_disk(capsys, monkeypatch):
    monkeypatch.setattr(cli, 'out', Console(width=200))
    row = next(line for line in printed(capsys, 'presets').splitlines() if 'gemma-2-9b-l20 ' in line)
    for cell in ('41 GB', '39 GB', '10k/5k/300', 'gemma-2-9b-it', '20-gemmascope-res-16k'): assert cell in row


@pytest.mark.parametrize('width', [60, 80, 140])
def test_the_table_of_presets_fits(capsys, monkeypatch, width):
    monkeypatch.setattr(cli, 'out', Console(width=width))
    lines = printed(capsys, 'presets').splitlines()
    names = [line.split()[0] for line in lines if line.strip() and line.split()[0] in presets()]
    assert sorted(names) == sorted(presets())
    assert names[0] == 'smollm2-135m'
    rows = [line for line in lines if line.startswith(' gemma-2-27b')]
    assert [row.split()[-4:] for row in rows] == [['66', 'GB', '117', 'GB']]*3
    assert max(map(len, rows)) <= width
    assert '\u2026' not in ''.join(lines)


def test_names_of_presets_are_completed():
    assert cli._complete('smo') == ['smollm2-135m', 'smollm2-135m-mlp', 'smollm2-135m-by-gemma']
    assert len(cli._complete('gemma-2-9b')) == 7


# ---- help, marks and lines

def test_version_and_help(capsys):
    assert printed(capsys, '--version').strip() == f'saeexplainer {saeexplainer.__version__}'
    for command in ('run', 'explain', 'evaluate', 'features', 'presets', 'preset', 'report', 'doctor'):
        _, examples = printed(capsys, command, '--help').split('Examples')
        assert f'saeexplainer {command}' in examples


COMMANDS = ('run', 'explain', 'verify', 'evaluate', 'benchmark', 'read-blind', 'export', 'label-graph', 'features',
            'presets', 'preset', 'report', 'doctor')

def test_all_commands_are_known():
    names = [command.name for command in cli.app.registered_commands]
    assert sorted(names) == sorted(COMMANDS)


@pytest.mark.parametrize('command', ['', *COMMANDS])
def test_help_speaks_of_files_names_and_numbers(capsys, command):
    "And not of Python's types, as in '<bool>' and '<int range> [x>=1]'"
    shown = printed(capsys, *command.split(), '-h')
    assert not re.search(r'<\w|[(]?\[x[<>]', shown)


@pytest.mark.parametrize('command, shown', [
    ('run', r'\{PRESET\}'),
    ('run', r'--workers +N '),
    ('run', r'--set +-s +FIELD=VALUE '),
    ('run', r'--json +print'),
    ('explain', r'\[FEATURE\]\.\.\.'),
    ('explain', r'--out +FILE '),
    ('evaluate', r'\{FILE\}'),
    ('evaluate', r'--root +FOLDER '),
    ('export', r'--to +FORMAT ')])
def test_what_stands_for_a_value_in_help(capsys, command, shown):
    assert re.search(shown, printed(capsys, command, '--help'))


def test_rows_of_a_table_are_whole_in_a_pipe():
    "Where COLUMNS does not say otherwise"
    environment = {name: value for name, value in os.environ.items() if name != 'COLUMNS'}
    command = [sys.executable, '-m', 'saeexplainer', 'presets']
    lines = subprocess.run(command, capture_output=True, text=True, env=environment).stdout.splitlines()
    row = next(line for line in lines if line.startswith(' gemma-2-9b-l20 '))
    assert row.split() == ('gemma-2-9b-l20 20-gemmascope-res-16k gemma-2-9b gemma-2-9b-it gpt-4o-mini '
                           '10k/5k/300 paper 41 GB 39 GB').split()


def test_nothing_drives_the_terminal():
    assert str(safe_text(('a\x1b[31mb', 'bold'), '\u202ec')) == 'a\ufffd[31mb\ufffdc'
    assert str(marked([('a\x1b]0;x\x07', False)])) == 'a\ufffd]0;x\ufffd'


@pytest.mark.parametrize('term, shown', [
    ('dumb', 'The [ship]'),
    ('xterm', 'The ship')])
def test_words_are_marked_where_styles_are_not_drawn(monkeypatch, term, shown):
    monkeypatch.setattr(cli, 'out', Console(force_terminal=True, _environ={'TERM': term}))
    assert marked([('The', False), (' ship', True)]).plain == shown


def test_lines_are_whole_in_a_pipe(capsys):
    lines = printed(capsys, 'features', '5', '8').splitlines()
    assert sum(line.startswith('smollm2-135m/9-res-4k/') for line in lines) == 2
    assert max(map(len, lines)) > 80


def test_times_are_in_minutes_where_they_are_short():
    assert span(.05, .2) == '3 to 12 min'
    assert span(.005) == '0.3 min'
    assert span(3., 12.) == '3.0 to 12.0 h'


# ---- reports and the doctor

def test_the_shipped_results_give_the_shipped_report(tmp_path, capsys):
    shutil.copytree(SHIPPED, tmp_path/'results')
    (tmp_path/'results'/'summary.csv').unlink()
    told = printed(capsys, 'report', str(tmp_path/'results'), '--out', str(tmp_path/'report'))
    assert 'generative' in told
    assert told.splitlines()[-1] == f"open {tmp_path/'report'/'index.html'}"
    assert (tmp_path/'report'/'summary.csv').read_bytes() == (SHIPPED/'summary.csv').read_bytes()
    assert not (tmp_path/'results'/'index.html').exists() # with --out, the folder stays as it was


def test_explanations_are_measured_at_the_papers_counts(capsys, tmp_path):
    mine = tmp_path/'mine.csv'
    mine.write_text('feature,explanation\n99999,x\n')
    with pytest.raises(SystemExit): main(['evaluate', str(mine), '--preset', 'smollm2-135m', '--root', str(tmp_path)])
    assert 'explains no feature that can be measured' in capsys.readouterr().err
    assert load_preset(tmp_path/'mine/preset.yaml').n_generative == 10 # the folder has the name of the file


@pytest.fixture
def examined(capsys, monkeypatch):
    "(exit code, what the doctor says in one line) for more arguments"
    monkeypatch.delenv('OPENAI_BASE_URL', raising=False)
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-secret')
    def doctor(*args):
        code = 0
        try: main(['doctor', *args])
        except SystemExit as e: code = e.code
        return code, ' '.join(capsys.readouterr().out.split())
    return doctor


def test_doctor(examined):
    code, said = examined('--json')
    assert code == 0
    assert all(row['well'] is not False for row in json.loads(said))
    assert 'sk-secret' not in said


def test_doctor_asks_the_server(examined):
    code, said = examined('--base-url', 'http://me:secret@127.0.0.1:9/v1?key=secret')
    assert code == 1
    assert 'does not answer' in said
    assert 'secret' not in said


def test_doctor_knows_what_is_no_address(examined):
    code, said = examined('--base-url', 'localhost:8000/v1')
    assert code
    assert 'localhost:8000/v1 is no address of a server: it begins with http:// or https://' in said


@pytest.mark.parametrize('exists', [True, False])
def test_doctor_says_where_the_data_is_to_come_from(tmp_path, examined, monkeypatch, exists):
    if exists: (tmp_path/'data').mkdir()
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    code, said = examined('--json')
    assert code
    data = next(row for row in json.loads(said) if row['what'] == 'data')
    assert data['well'] is False
    for part in ('the SAE is not there', 'SAEEXPLAINER_DATA', 'checkout'): assert part in data['found']


# ---- tables of features

EXPORT = {
    'features': [stats(i) for i in (0, 1, 10)],
    'explanations': [label(0, 'parks'), label(0, 'rivers', 'gpt-5'), label(1, 'rain')],
    'activations': [activation(0), activation(10)]}

@pytest.fixture
def neuronpedia(tmp_path, monkeypatch):
    in_folder(monkeypatch, tmp_path)
    files = {f'v1/gpt2-small/8-res-jb/{kind}/batch-0.jsonl.gz': rows for kind, rows in EXPORT.items()}
    with Neuronpedia(files) as server:
        monkeypatch.setenv('NEURONPEDIA_STORE', server.url)
        yield server


@pytest.mark.parametrize('place, settings', [
    ('cache/features/gpt2-small/8-res-jb', []),
    ('mine', ['-s', 'features={}/features.parquet'])], ids=['cache', 'preset'])
def test_features_from_neuronpedia(capsys, tmp_path, neuronpedia, place, settings):
    folder = tmp_path/place
    command = ['features', 'gpt2-small-l8', *(part.format(folder) for part in settings)]
    main([*command, '--json'])
    made = capsys.readouterr()
    assert json.loads(made.out) == {'ok': 2, 'unlabelled': 1}
    assert 'gpt-4o-mini' in made.err
    assert (folder/'features.parquet').exists()
    asked = len(neuronpedia.log)
    assert printed_json(capsys, *command, '0')[0]['explanation'] == 'parks'
    assert len(neuronpedia.log) == asked # nothing is fetched twice
    assert printed_json(capsys, *command, '0', '-s', 'label_model=gpt-5')[0]['explanation'] == 'rivers'


def test_a_table_of_features_has_one_name(capsys, tmp_path):
    _, line = ends(capsys, 'features', 'gpt2-small-l8', '-s', f'features={tmp_path}/other.parquet')
    assert 'is called features.parquet, not other.parquet' in line


def test_one_feature_needs_no_export(capsys, tmp_path, monkeypatch):
    in_folder(monkeypatch, tmp_path)
    label = dict(description='words about rain', explanationModelName='gpt-4o-mini', typeName='x')
    answer = dict(modelId='gpt2-small', layer='8-res-jb', index='7', maxActApprox=5., frac_nonzero=.01, activations=[],
                  explanations=[label])
    with Neuronpedia(features={'gpt2-small/8-res-jb/7': answer}) as server:
        monkeypatch.setenv('NEURONPEDIA_API', server.url)
        [shown] = printed_json(capsys, 'features', 'gpt2-small/8-res-jb/7')
        assert shown['id'] == 'gpt2-small/8-res-jb/7'
        assert shown['explanation'] == 'words about rain'
        assert shown['max_act'] == 5.
        assert 'Neuronpedia has no feature' in ends(capsys, 'features', 'gpt2-small/8-res-jb/8')[1]


def test_features_from_a_corpus(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    file = make_lab(tmp_path).file
    text = tmp_path/'text.txt'
    text.write_text('\n\n'.join(SENTENCES*3))
    main(['features', str(file), '--anew', '--corpus', str(text), '--tokens', '200', '--json'])
    made = capsys.readouterr()
    counts = json.loads(made.out)
    assert sum(counts.values()) == 40
    assert '40 features read on' in made.err
    card = json.loads((tmp_path/'data'/'tiny'/'features.json').read_text())
    assert card['corpus'].endswith('text.txt')
    assert card['sae_sha256']
    assert card['status'] == counts


@pytest.fixture
def read_anew(tmp_path, monkeypatch):
    "A preset whose labels are by a model that has yet to read the features, and the command that makes their file"
    file = judged_preset(tmp_path, label_model='claude')
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    tiny_sae(tmp_path/'data'/'tiny'/'sae', d_sae=20, layer=1, model_name='tiny', threshold=(1., 1.5))
    return 'features', str(file), '--anew'


def test_features_made_anew_wait_for_the_labels_of_their_reader(capsys, read_anew):
    main([*read_anew, '--json'])
    made = capsys.readouterr()
    assert json.loads(made.out)['ok'] > 0
    assert "has no labels of 'claude'" in made.err.splitlines()[-1]
    assert 'theirs go into labels.parquet beside it, or set label_model' in made.err.splitlines()[-1]


def test_features_without_the_labels_of_their_reader_are_refused_later(capsys, read_anew):
    main([*read_anew])
    capsys.readouterr()
    code, line = ends(capsys, *read_anew[:2])
    assert code == 2
    assert "has no labels of 'claude'" in line


# ---- a tiny model

@pytest.fixture(scope='module')
def tiny_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tiny')
    return folder, str(make_lab(folder, baselines=[]).file)


@pytest.fixture
def tiny(tiny_files, monkeypatch):
    "(folder, preset)"
    in_folder(monkeypatch, tiny_files[0])
    return tiny_files


FOUR = '{"sentences": ["a cat", "a dog", "the rain", "the sea"]}'

@pytest.fixture(params=[('', 0), ('I am sorry, I cannot help with that.', 0), (FOUR, 4)], ids=['nothing', 'no', 'four'])
def told(request):
    "(options of a writer that always says the same, how many texts that makes)"
    says, made = request.param
    with Server(lambda asked, n: says) as server:
        yield ['--writer', 'openai', '--base-url', server.url, '--model', 'm'], made


def assert_texts(verdict, made):
    assert verdict['texts'] == len(verdict['written']) == made
    assert verdict['unmade'] == 4 - made
    assert verdict['max_act'] == 1.
    if not made: assert verdict['reached'] is None


def test_texts_that_were_never_written_are_no_misses(tiny, capsys, told):
    writer, made = told
    command = ['verify', '3', 'the word cat', '--preset', tiny[1], '--texts', '4', *writer]
    verdict = printed_json(capsys, *command)
    line = printed(capsys, *command).splitlines()[1]
    assert_texts(verdict, made)
    if made:
        assert isinstance(verdict['reached'], int)
        assert 'of 4 texts reach half of 1.0; best' in line
        best = max(text['activation'] for text in verdict['written'])
        assert verdict['score'] == pytest.approx(best, abs=1e-3)
    else:
        assert verdict['score'] is None
        assert verdict['best'] is None
        assert '4 of 4 texts could not be written: nothing is known' in line


def test_verified_explanations_count_what_was_written(tiny, capsys, told):
    writer, made = told
    command = ['explain', tiny[1], '3', '--explainer', 'untrained', '--verify', '4', *writer]
    [explained] = printed_json(capsys, *command)
    assert_texts(explained, made)


# ---- the best of several

def test_the_best_candidate_is_printed_with_the_others(tiny, capsys):
    command = ['explain', tiny[1], '3', '5', '--explainer', 'untrained']
    greedy = printed_json(capsys, *command)
    best = printed_json(capsys, *command, '--candidates', '3')
    assert [set(row) for row in best] == [{'id', 'explanation', 'label', 'candidates'}]*2
    assert [row['candidates'][0]['text'] for row in best] == [row['explanation'] for row in greedy]
    for row in best:
        scores = [-1 if one['score'] is None else one['score'] for one in row['candidates']]
        assert row['explanation'] == row['candidates'][scores.index(max(scores))]['text']


def test_a_draw_has_candidates_too(tiny, capsys):
    shown = printed(capsys, 'explain', tiny[1], '--random', '2', '--explainer', 'untrained', '--candidates', '2')
    assert shown.count(' by its own words: ') + shown.count(' candidates is known') == 2


def test_what_is_verified_is_the_best(tiny, capsys):
    command = ['explain', tiny[1], '3', '--explainer', 'untrained', '--candidates', '3']
    [best] = printed_json(capsys, *command)
    [verified] = printed_json(capsys, *command, '--verify', '2')
    assert verified['explanation'] == best['explanation']
    assert verified['candidates'] == best['candidates']
    assert verified['texts'] + verified['unmade'] == 2


@pytest.fixture(scope='module')
def measured(tiny_files):
    "With one.csv measured: (folder of runs, function that writes rows into NAME.csv, what stdout and stderr said)"
    folder, preset = tiny_files
    def write(name, *rows):
        file = folder/f'{name}.csv'
        file.write_text('\n'.join(['feature,explanation', *rows, '']))
        return str(file)
    one = write('one', '3,the word cat', '5,the word rain')
    out = io.StringIO()
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        in_folder(patch, folder)
        main(['evaluate', one, '--preset', preset, '--root', str(folder/'runs')])
    return folder/'runs', write, (out.getvalue(), err.getvalue())


def test_evaluations_say_where_they_are(measured):
    runs, _, (out, err) = measured
    assert 'chance is 33.3%' in out
    assert f'{runs}/one/explanations.csv' in out
    assert '2 explanations and 2 labels beside them' in err
    assert all(len(line) <= 80 for line in out.splitlines() if '–' in line)


def test_evaluations_say_which_explanations_are_lowest(measured):
    runs, _, (out, _) = measured
    lines = out.splitlines()
    at = lines.index('lowest of one:')
    shown = [line.split(maxsplit=3) for line in lines[at+2:at+4]]
    each = pd.read_csv(runs/'one'/'explanations.csv').query("stage == 'one'")
    worst_first = each.sort_values(['generative', 'names_word'], kind='stable')
    assert [(int(feature), text) for feature, _, _, text in shown] == list(
        zip(worst_first['feature'], worst_first['explanation']))
    assert [share for _, share, _, _ in shown] == [f'{share:.0%}' for share in worst_first['generative']]
    n = load_preset(runs/'one'/'preset.yaml').n_generative
    assert f'is a share of {n} texts, uncertain by up to {98/n**.5:.0f} points either way' in lines[at+4]
    assert lines[at+4].endswith(f"Rows of label stand beside; {runs/'one'/'explanations.csv'} has all.")


@pytest.mark.parametrize('stages, said', [(['one', 'control'], 1), (['one'], 0)])
def test_tables_say_what_the_control_is(capsys, stages, said):
    rows = [dict(stage=stage, feature=3, metric='output', value=1.) for stage in stages]
    show_summary(summary(pd.DataFrame(rows)), 1/3)
    assert capsys.readouterr().out.count('  control: nobody: the judge of the output score, on cases whose') == said


def test_evaluations_have_the_coverage(measured):
    runs, _, (out, err) = measured
    each = pd.read_csv(runs/'one'/'explanations.csv').set_index(['stage', 'feature'])
    assert each['coverage'].to_dict() == {('one', 3): 1., ('one', 5): 0., ('label', 3): 0., ('label', 5): 0.}
    assert '  coverage: share of the strongest contexts' in out
    assert 'coverage leaves out' not in err
    assert ': 0row' not in err


def test_lines_of_the_lowest_are_as_long_as_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr(cli, 'out', Console(width=50, highlight=False))
    rows = [dict(stage='mine', feature=feature, explanation='word '*30, generative=feature/10, names_word=float('nan'))
            for feature in range(7)]
    show_lowest(pd.DataFrame(rows), 'mine', 10, 'explanations.csv')
    lines = [line for line in capsys.readouterr().out.splitlines() if 'word word' in line]
    assert [line.split()[0] for line in lines] == ['0', '1', '2', '3', '4']
    assert all(len(line) == 50 and line.endswith('…') for line in lines)
    assert [line.split()[1:3] for line in lines[:2]] == [['0%', '-'], ['10%', '-']]


def test_evaluations_keep_each_explanation_and_text(measured):
    runs, _, _ = measured
    each = pd.read_csv(runs/'one'/'explanations.csv')
    assert len(each) == 4
    assert each.columns[:4].tolist() == ['stage', 'feature', 'explanation', 'generative']
    assert each.query("stage == 'one'")['explanation'].tolist() == ['the word cat', 'the word rain']
    assert {'feature', 'kind', 'text', 'activation'} <= set(pd.read_csv(runs/'one'/'texts.csv'))


def test_evaluations_have_a_page(measured):
    runs, _, (out, _) = measured
    report = runs/'one'/'report'
    assert out.splitlines()[-1] == f"open {report/'index.html'}"
    page = (report/'index.html').read_text()
    assert '<code>one</code></th><td>the explanations of the file of this name' in page
    assert re.findall('<section id="([a-z]+)"', page) == ['metrics', 'differences', 'failures', 'features', 'next',
                                                           'provenance']
    for text in ('the word cat', 'the word rain'): assert f'<td>{text}</td>' in page
    assert '<mark>' in page or 'activation 0.0' in page


def test_an_evaluation_says_how_it_was_made(measured):
    runs, _, _ = measured
    made = Results(runs/'one'/'report').made
    assert made['given'].startswith('saeexplainer evaluate ')
    assert made['given'].endswith(f'--root {runs}')
    assert made['device'] == 'cpu'
    assert made['begun']


def test_the_commands_of_an_evaluations_page_are_there(measured):
    runs, _, _ = measured
    steps = next_steps(Results(runs/'one'/'report'))
    for step in steps:
        for line in step.code.splitlines(): parsed(shlex.split(line))
    assert any(' verify ' in step.code for step in steps)


def test_the_report_of_an_evaluation_is_made_from_its_tables(measured, capsys, tmp_path):
    runs, _, _ = measured
    told = printed(capsys, 'report', str(runs/'one'/'report'), '--out', str(tmp_path/'copy'))
    assert told.splitlines()[-1] == f"open {tmp_path/'copy'/'index.html'}"
    assert (tmp_path/'copy'/'index.html').read_text() == (runs/'one'/'report'/'index.html').read_text()


def test_the_report_of_an_evaluation_needs_no_model(measured, capsys, monkeypatch):
    def never(*_, **__): raise AssertionError('a model was loaded')
    runs, _, _ = measured
    monkeypatch.setattr(Target, 'load', never)
    marked_before = (runs/'one'/'report'/'marked.parquet').read_bytes()
    told = printed(capsys, 'report', 'one', '--root', str(runs))
    assert told.splitlines()[-1] == f"open {runs/'one'/'report'/'index.html'}"
    assert (runs/'one'/'report'/'marked.parquet').read_bytes() == marked_before


def test_a_second_file_is_measured_beside_the_first(measured, tiny, capsys):
    runs, write, _ = measured
    two = write('two', '3,words of the sea')
    found = printed_json(capsys, 'evaluate', two, '--preset', tiny[1], '--name', 'one', '--root', str(runs))
    assert {row['stage'] for row in found} >= {'one', 'two', 'label'}
    assert set(pd.read_csv(runs/'one'/'summary.csv')['stage']) >= {'one', 'two', 'label'}
    assert 'summary.csv' in printed(capsys, 'report', 'one', '--root', str(runs))


def test_an_edited_file_is_measured_beside_what_it_was(measured, tiny, capsys):
    runs, write, _ = measured
    one = write('one', '3,the word dog')
    for _ in range(2): # the second time nothing is new
        main(['evaluate', one, '--preset', tiny[1], '--root', str(runs)])
        assert 'was edited since it was measured: now it is one-2' in capsys.readouterr().err
    rows = pd.read_csv(runs/'one'/'explanations.csv')
    said = rows.set_index(['stage', 'feature'])['explanation']
    assert said['one', 3] == 'the word cat'
    assert said['one-2', 3] == 'the word dog'
    assert 'one-3' not in set(rows['stage'])


def test_a_run_without_results_has_no_report(tiny, tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    (tmp_path/'empty'/'preset.yaml').write_text(load_preset(tiny[1]).to_yaml())
    assert 'holds no results yet' in ends(capsys, 'report', 'empty', '--root', str(tmp_path))[1]


# ---- interrupted

def interrupt_training(args, log, number) -> int:
    "A signal to a real process, as soon as it trains; its exit code"
    command = [sys.executable, '-c', 'from saeexplainer.cli import main; main()', *args]
    env = {name: value for name, value in os.environ.items() if name != 'TQDM_DISABLE'} # the bar says when it trains
    def listen(): signal.signal(signal.SIGINT, signal.SIG_DFL) # a shell's background jobs ignore it
    with log.open('w') as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=env, preexec_fn=listen)
    try:
        deadline = time.time() + 240
        while not re.search(r'sft:.* [1-9]\d*/', log.read_text()) and time.time() < deadline:
            assert process.poll() is None
            time.sleep(.2)
        process.send_signal(number)
        return process.wait(60)
    finally: process.kill()


def test_interrupted_runs_keep_what_was_made(tiny, tmp_path):
    args = ['run', tiny[1], '--size', 'demo', '--root', str(tmp_path), '--name', 'a b', '-s', 'sft_epochs=2000']
    kept = 'what was finished is kept, and the same command goes on from there: ' + shlex.join(['saeexplainer', *args])
    ends = [(signal.SIGINT, 130, 'interrupted'), (signal.SIGTERM, 143, 'ended by SIGTERM')]
    for number, code, how in ends: # the same command goes on with the same run
        assert interrupt_training(args, tmp_path/'log', number) == code
        assert f'saeexplainer: {how}; {kept}' in (tmp_path/'log').read_text()
        assert (tmp_path/'a b'/'preset.yaml').exists()
        assert (tmp_path/'a b'/'store.sqlite').exists()
    with RunStore(tmp_path/'a b'/'store.sqlite') as store:
        detail = store.progress().set_index('stage').detail['sft']
    assert json.loads(detail)['attempts'] == 2
