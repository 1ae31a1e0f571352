"A tiny bench: methods are ranked, the same file gives the same digits, and wrong files get one line"
import json
import math
import os
from dataclasses import replace
import pandas as pd
import pytest
from judged import WORDS, Scripted, feature, judged_preset
from saeexplainer.benchmark import (
    BUILT_IN, CHANCE, MEASURES, RANKED, REFERENCES_FILE, Bench, agreement_line, bench_folder, bench_reader, benchmark,
    blind_readings, built_in, completed, contexts_sha256, front_table, keep_references, measure_built_in, ranking,
    ranking_table, read_right, with_missing,
)
from saeexplainer.cli import main
from saeexplainer.evaluation.detection import ListReader, save_references
from saeexplainer.features import load_features
from saeexplainer.presets import load_preset
from saeexplainer.run import Run
from saeexplainer.saes import FeatureReader
from saeexplainer.writers.local import Likelihoods

COLUMNS = ['stage', 'feature', 'metric', 'value']
WANTED = (2, 3, 5, 7)
MINE = {index: f"the word '{WORDS[index]}'" for index in WANTED}


@pytest.fixture(scope='module')
def bench(tmp_path_factory):
    "Frozen features of a tiny SAE in a data folder of their own"
    folder = tmp_path_factory.mktemp('world')
    kept = {name: os.environ.get(name) for name in ('SAEEXPLAINER_DATA', 'SAEEXPLAINER_CACHE')}
    os.environ |= {name: str(folder/name) for name in kept}
    file = judged_preset(folder)
    (folder/'data').rename(folder/'SAEEXPLAINER_DATA')
    preset = load_preset(file)
    features = {one.index: one for one in load_features(preset)}
    fields = dict(
        name='tiny-bench',
        preset=str(file),
        features=WANTED,
        settings=dict(n_generative=2),
        sae_sha256=FeatureReader.load(preset).sha256,
        contexts_sha256=contexts_sha256(features[index] for index in WANTED),
        chosen='by hand',
    )
    bench_folder('tiny-bench').mkdir(parents=True)
    (bench_folder('tiny-bench')/'bench.json').write_text(json.dumps(fields))
    labels = pd.DataFrame({'index': WANTED, 'text': list(MINE.values()), 'model': 'strong'})
    labels.to_parquet(bench_folder('tiny-bench')/'labels.parquet')
    yield Bench.load('tiny-bench')
    for name, value in kept.items():
        os.environ.pop(name)
        if value is not None: os.environ[name] = value


@pytest.fixture(scope='module')
def values(bench, tmp_path_factory):
    return benchmark(bench, {'mine': MINE}, tmp_path_factory.mktemp('mine'), progress=False)


# measuring

def test_every_measure_of_every_feature(values):
    assert set(values['metric']) <= set(MEASURES)
    assert {'generative', 'coverage', 'detection', 'retrieval'} <= set(values['metric'])
    assert set(values['feature']) == set(WANTED)
    assert set(values['stage']) == {'mine'}


def test_naming_the_words_covers_all(values):
    assert (values.query("metric == 'coverage'")['value'] == 1).all()


def test_the_same_again_gives_the_same_digits(bench, values, tmp_path):
    again = benchmark(bench, {'mine': MINE}, tmp_path/'again', progress=False)
    pd.testing.assert_frame_equal(again, values, check_exact=True)
    stored = benchmark(bench, {'mine': MINE}, tmp_path/'again', progress=False)
    pd.testing.assert_frame_equal(stored, values, check_exact=True)


@pytest.fixture
def kept(bench, tmp_path): # the file of what the reader has read behind its references
    with Run(tmp_path/'keeps', bench.resolved(), progress=False) as run: file = keep_references(run, bench)
    yield file
    file.unlink()


def test_references_lie_with_the_bench(bench, kept, tmp_path):
    assert kept == bench_folder(bench.name)/REFERENCES_FILE
    with Run(tmp_path/'run', bench.resolved(), progress=False) as run: reader = bench_reader(run, bench)
    assert len(reader.known) == len(WANTED)


def test_known_references_change_no_digit(bench, kept, values, tmp_path):
    again = benchmark(bench, {'mine': MINE}, tmp_path/'run', progress=False)
    pd.testing.assert_frame_equal(again, values, check_exact=True)


def test_keeping_references_again_reads_nothing(bench, kept, tmp_path, monkeypatch):
    before = pd.read_parquet(kept)
    monkeypatch.setattr(Likelihoods, 'token_log_probs', None)
    with Run(tmp_path/'run', bench.resolved(), progress=False) as run: keep_references(run, bench)
    pd.testing.assert_frame_equal(pd.read_parquet(kept), before)


def test_references_of_another_reader_are_refused(bench, tmp_path):
    file = bench_folder(bench.name)/REFERENCES_FILE
    save_references({}, file, {'model': 'other'})
    with pytest.raises(ValueError, match='references.parquet was read with model other, not'):
        benchmark(bench, {'mine': MINE}, tmp_path/'run', progress=False)
    file.unlink()


def test_a_reader_that_is_asked_keeps_nothing(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, 'writer', lambda self, which: Scripted('1'))
    with Run(tmp_path/'run', bench.resolved(), progress=False) as run:
        assert isinstance(bench_reader(run, bench), ListReader)
        with pytest.raises(ValueError, match='the reader of tiny-bench is not a local one'): keep_references(run, bench)


def test_features_of_others_are_left_out(bench, tmp_path):
    found = benchmark(bench, {'mine': {2: 'rain', 9: 'snow'}}, tmp_path/'run', progress=False)
    assert set(found['feature']) == {2}


@pytest.mark.parametrize('methods, line', [
    ({}, 'there is no method to measure: give at least one'),
    ({'control': MINE}, "the name 'control' is taken by a method of tiny-bench: choose another"),
    ({'mine': {}}, 'mine explains none of the 4 features of tiny-bench'),
    ({'mine': {11: 'rain'}}, 'mine explains none of the 4 features of tiny-bench'),
    ({' ': MINE}, 'each stage has a name'),
    ({'mine': {2: 7}}, 'mine: the explanation of feature 2 is 7, not text'),
])
def test_wrong_methods_get_one_line(bench, tmp_path, methods, line):
    with pytest.raises(ValueError, match=line) as error: benchmark(bench, methods, tmp_path/'run', progress=False)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('changed, line', [
    ({'contexts_sha256': '0'*64}, r'the test contexts are not those of tiny-bench \(SHA-256 .*, not 000000000000\)'),
    ({'sae_sha256': '0'*64}, r'the SAE is not that of tiny-bench \(SHA-256 .*, not 000000000000\)'),
    ({'features': (2, 99)}, 'tiny-bench names feature 99, which the table of features does not hold'),
])
def test_what_is_not_the_bench_is_refused(bench, tmp_path, changed, line):
    with pytest.raises(ValueError, match=line):
        benchmark(replace(bench, **changed), {'mine': {2: 'rain'}}, tmp_path/'run', progress=False)


TRAINED = ('sft', 'dpo1', 'dpo2', 'hinted sft', 'hinted')
QUICK = [name for name in BUILT_IN if name not in TRAINED]
CHEAP = ('coverage', 'retrieval')


def test_methods_that_are_built_in(bench, tmp_path):
    "Explained and measured once; resumed, the same table"
    table = measure_built_in(bench, tmp_path/'run', CHEAP, progress=False, names=QUICK)
    assert table['stage'].unique().tolist() == QUICK
    texts = pd.read_parquet(bench_folder(bench.name)/'explanations.parquet')
    assert texts.query("stage == 'label'")['text'].tolist() == list(MINE.values())
    assert texts.query("stage == 'peak words'")['text'].tolist() == ['']*4 # no feature here has them
    again = measure_built_in(bench, tmp_path/'run', CHEAP, progress=False, names=QUICK)
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    with pytest.raises(ValueError, match="the name 'label' is taken"):
        benchmark(bench, {'label': MINE}, tmp_path/'other', progress=False)
    (bench_folder(bench.name)/'metrics.parquet').unlink()


def test_one_method_measured_anew_leaves_the_others(bench, tmp_path):
    measure_built_in(bench, tmp_path/'one', CHEAP, progress=False, names=['nearest label', 'label'])
    table = measure_built_in(bench, tmp_path/'other', CHEAP, progress=False, names=['label'])
    assert table['stage'].unique().tolist() == ['label', 'nearest label']
    (bench_folder(bench.name)/'metrics.parquet').unlink()


# the file of a bench

def test_a_bench_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="there is no bench 'bench-0': there is"): Bench.load('bench-0')


@pytest.mark.parametrize('text, line', [
    ('not json', 'is not JSON'),
    ('[]', 'not an object'),
    ('{}', 'is no bench: it needs name, preset, features, settings, sae_sha256, contexts_sha256, chosen, and no more'),
    ('{"name": "x", "colour": "red"}', 'is no bench'),
])
def test_a_broken_bench_gets_one_line(bench, text, line):
    folder = bench_folder('broken')
    folder.mkdir(exist_ok=True)
    (folder/'bench.json').write_text(text)
    with pytest.raises(ValueError, match=line): Bench.load('broken')
    (folder/'bench.json').unlink()


def test_the_hash_changes_with_every_part_of_a_context():
    contexts = feature(3).test_contexts
    hashes = {contexts_sha256([feature(3, test_contexts=some)]) for some in (
        contexts,
        contexts[:3],
        contexts[::-1],
        [replace(contexts[0], kind='hard'), *contexts[1:]],
        [replace(contexts[0], peak=0), *contexts[1:]],
        [],
    )}
    assert len(hashes) == 6
    assert contexts_sha256([feature(4)]) != contexts_sha256([feature(3)])


# the ranking

def rows(*found): return pd.DataFrame(found, columns=COLUMNS)


def test_what_a_method_leaves_out_counts_as_nothing():
    found = rows(('a', 3, 'coverage', 1.), ('a', 3, 'detection', math.nan))
    filled = with_missing(found, [3, 5], ['coverage', 'detection'])
    assert dict(zip(zip(filled['feature'], filled['metric']), filled['value'])) == {
        (3, 'coverage'): 1, (3, 'detection'): .5, (5, 'coverage'): 0, (5, 'detection'): .5}


def test_what_nobody_could_have_measured_is_left_out():
    found = completed(rows(('a', 3, 'coverage', 1.), ('b', 5, 'coverage', math.nan)), [3, 5], ['coverage'])
    assert found.values.tolist() == [['a', 3, 'coverage', 1.], ['b', 3, 'coverage', 0.]]


def test_a_measure_that_was_not_taken_of_a_method_stays_out():
    found = completed(rows(('a', 3, 'coverage', 1.), ('a', 3, 'detection', .9), ('b', 3, 'coverage', .5)), [3])
    assert found[found['stage'] == 'b']['metric'].tolist() == ['coverage']
    assert ranking(found)['mean_place'].to_dict() == {'a': 1, 'b': 2}


def test_equal_methods_share_a_rank():
    table = ranking(rows(('a', 3, 'coverage', .5), ('b', 3, 'coverage', .5), ('c', 3, 'coverage', .1)), ['coverage'])
    assert table['rank'].to_dict() == {'a': 1, 'b': 1, 'c': 3}


def test_a_measure_without_values_ranks_nobody():
    found = rows(('a', 3, 'coverage', .2), ('b', 3, 'coverage', .5))
    assert list(ranking(found, ['coverage', 'detection']).index) == ['b', 'a']
    assert ranking_table(found, ['coverage', 'detection'])['detection'].tolist() == ['-', '-']


def test_nothing_measured_is_no_ranking():
    with pytest.raises(ValueError, match='nothing is known of coverage: there is no ranking'):
        ranking(rows(), ['coverage'])


def test_one_method_among_none_is_first(bench, values):
    compared = completed(pd.concat([built_in(bench), values]), bench.features)
    assert compared['value'].dtype == float
    assert ranking(compared)['rank'].tolist() == [1]


# the front page

RATED = [('Ada', 'a', 3, 2), ('Ada', CHANCE, 3, 0), ('Ben', 'a', 3, 1), ('Ben', CHANCE, 3, 0), ('Ada', 'other', 3, 2)]


def ratings(sheet='one', rated=RATED):
    "As `read-blind` stores them"
    found = [dict(sheet=sheet, reader=reader, time='2026-01-01', row=f'{feature}{method[0]}', feature=feature,
                  method=method, rating=rating) for reader, method, feature, rating in rated]
    return pd.DataFrame(found)


MEASURED = rows(
    (CHANCE, 3, 'generative', .9),
    (CHANCE, 3, 'detection', .5),
    ('a', 3, 'generative', .5),
    ('a', 3, 'coverage', 1.),
    ('b', 3, 'generative', .6),
    ('b', 5, 'generative', .2),
)


def test_the_front_page_shows_every_method_and_chance_last():
    "Whatever chance reached, and whoever was only read"
    table = front_table(MEASURED, ratings(), [3, 5])
    assert list(table.index) == ['a', 'b', 'other', f'{CHANCE} (chance)']
    assert list(table.columns) == [*RANKED, 'reading']


def test_what_was_not_measured_of_a_method_is_a_dash():
    table = front_table(MEASURED, ratings(), [3, 5])
    assert table.loc['b'].tolist() == ['40.0 [20.0, 60.0]', '-', '-', '-', '-']
    assert table.loc['other'].tolist() == ['-', '-', '-', '-', '100.0 [100.0, 100.0]']
    assert table.loc['a', 'reading'] == '50.0 [50.0, 50.0]'


def test_what_a_method_left_out_counts_on_the_front_page():
    assert front_table(MEASURED, ratings(), [3, 5]).loc['a', 'generative'].startswith('25.0 ')


def test_the_front_page_without_values_or_ratings(bench):
    assert front_table(built_in(bench), blind_readings(bench), bench.features).empty
    assert front_table(MEASURED, blind_readings(bench), [3, 5])['reading'].tolist() == ['-']*3
    assert front_table(MEASURED.head(0), ratings(), [3, 5]).index.tolist() == ['other', 'a', f'{CHANCE} (chance)']
    assert agreement_line(blind_readings(bench)) == ''


def test_rows_of_two_sheets_are_not_mixed_up(bench):
    "Two sheets number their rows alike; only one of them was read twice"
    other = ratings('two', [('Ada', 'a', 7, 0), ('Cem', 'a', 3, 0)])
    both = pd.concat([ratings(), other])
    both.to_parquet(bench_folder(bench.name)/'readings.parquet')
    found = blind_readings(bench)
    (bench_folder(bench.name)/'readings.parquet').unlink()
    assert set(found['row']) == {'one 3a', 'one 3o', 'one 3r', 'two 7a', 'two 3a'}
    assert agreement_line(found) == (
        'Reading: 2 features, 3 blind readers; two of them give the same rating to 50% of the explanations '
        '(weighted kappa 0.50).')


def test_one_reader_agrees_with_nobody():
    assert agreement_line(ratings(rated=RATED[:2])) == 'Reading: 1 feature, 1 blind reader.'
    assert read_right(ratings(rated=RATED[:1])) == {'a': '100.0 [100.0, 100.0]'}


# the command

def command(capsys, *args):
    main(['benchmark', *map(str, args)])
    return capsys.readouterr().out


def fails(capsys, *args):
    with pytest.raises(SystemExit): main(['benchmark', *map(str, args)])
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def mine(tmp_path):
    file = tmp_path/'mine.csv'
    file.write_text('feature,explanation\n' + ''.join(f"{index},the word '{WORDS[index]}'\n" for index in WANTED))
    return file


def test_a_file_is_ranked(bench, values, mine, tmp_path, capsys):
    options = ['--bench', 'tiny-bench', '--root', tmp_path]
    assert 'mine' in command(capsys, mine, *options)
    first = command(capsys, mine, *options, '--json')
    assert first == command(capsys, mine, *options, '--json', '--name', 'again')
    assert json.loads(first)[0]['coverage'] == 1


@pytest.mark.parametrize('text, line', [
    ('', 'mine.csv'),
    ('a,b\n1,2\n', 'mine.csv'),
    ('feature,explanation\n', 'holds no explanation'),
    ('feature,explanation\n11,rain\n', 'mine explains none of the 4 features of tiny-bench, which `saeexplainer '
                                       'benchmark --bench tiny-bench --features` lists: `saeexplainer evaluate '),
    ('feature,explanation\n2,rain\n2,snow\n', '2'),
    ('feature,explanation\n2,rain\ntiny/1-res/2,snow\n', 'explains 2 more than once, as 2 and as tiny/1-res/2'),
])
def test_wrong_files_get_one_line(bench, mine, tmp_path, capsys, text, line):
    mine.write_text(text)
    assert line in fails(capsys, mine, '--bench', 'tiny-bench', '--root', tmp_path)


def test_the_features_of_a_bench_are_listed(bench, capsys):
    assert command(capsys, '--bench', 'tiny-bench', '--features').split() == [f'tiny/1-res/{index}' for index in WANTED]
    listed = json.loads(command(capsys, '--bench', 'tiny-bench', '--features', '--json'))
    assert listed == [f'tiny/1-res/{index}' for index in WANTED]


def test_wrong_options_get_one_line(bench, mine, tmp_path, capsys):
    options = ['--bench', 'tiny-bench', '--root', tmp_path]
    assert "there is no bench 'none'" in fails(capsys, mine, '--bench', 'none')
    assert 'two files have the same name' in fails(capsys, mine, mine, *options)
    assert 'no file' in fails(capsys, tmp_path/'other.csv', *options)
    assert '--name must be a name that stays in --root' in fails(capsys, mine, *options, '--name', '../x')
    control = mine.with_name('control.csv')
    mine.rename(control)
    assert "the stage 'control' is taken" in fails(capsys, control, *options)


def test_without_files_the_built_in_methods_are_ranked(bench, tmp_path, capsys):
    file = bench_folder('tiny-bench')/'metrics.parquet'
    kept = file.read_bytes() if file.exists() else None
    file.unlink(missing_ok=True)
    line = fails(capsys, '--bench', 'tiny-bench')
    assert 'nothing was measured on tiny-bench yet: --built-in measures its methods' in line
    rows(('label', 2, 'coverage', 1.), ('random label', 2, 'coverage', 0.)).to_parquet(file)
    order = json.loads(command(capsys, '--bench', 'tiny-bench', '--json'))
    assert [row['method'] for row in order] == ['label', 'random label']
    file.unlink()
    if kept: file.write_bytes(kept)


def test_built_in_methods_are_measured_alone(bench, mine, capsys):
    line = fails(capsys, mine, '--bench', 'tiny-bench', '--built-in')
    assert '--built-in measures the methods that are built in: give no files with it' in line


def test_explanations_of_a_bench_can_be_read_blindly(bench, tmp_path, capsys):
    folder = bench_folder('tiny-bench')
    file = folder/'explanations.parquet'
    file.unlink(missing_ok=True)
    sheet = tmp_path/'sheet'
    options = ['read-blind', sheet, folder, '--preset', bench.preset, '--features', '2']
    with pytest.raises(SystemExit): main([*map(str, options)])
    assert '`saeexplainer benchmark --built-in` makes them' in capsys.readouterr().err
    said = {'mine': MINE, 'random label': {index: f'rain {index}' for index in WANTED}}
    explained = [(method, index, text) for method, texts in said.items() for index, text in texts.items()]
    pd.DataFrame(explained, columns=['stage', 'feature', 'text']).to_parquet(file)
    main([*map(str, options)])
    assert 'by 2 methods' in capsys.readouterr().out
    assert 'rain' in (sheet/'sheet.md').read_text()
    file.unlink()


def test_two_values_of_a_method_get_one_line():
    with pytest.raises(ValueError, match='feature 3 has two values of coverage at a: keep one of each'):
        completed(rows(('a', 3, 'coverage', .5), ('a', 3, 'coverage', .1)), [3], ['coverage'])
