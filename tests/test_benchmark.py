"A tiny bench: methods are ranked, the same file gives the same digits, and wrong files get one line"
import json
import math
import os
from dataclasses import replace
import pandas as pd
import pytest
from judged import WORDS, feature, judged_preset
import saeexplainer.benchmark as B
from saeexplainer.benchmark import (
    CHANCE, FRONT, MEASURES, Bench, agreement_line, bench_folder, benchmark, blind_readings, built_in, completed,
    contexts_sha256, front_table, measure_built_in, ranking, ranking_table, read_right, with_missing,
)
from saeexplainer.cli import main
from saeexplainer.features import load_features
from saeexplainer.presets import LOOKUPS, load_preset
from saeexplainer.saes import FeatureReader

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


def test_methods_that_are_built_in(bench, tmp_path, monkeypatch):
    "Explained and measured once; resumed, the same table"
    monkeypatch.setattr(B, 'SHIPPED', ('untrained',)) # the others are trained
    table = measure_built_in(bench, tmp_path/'run', ('coverage', 'retrieval'), progress=False)
    assert set(table['stage']) == {'label', *LOOKUPS, 'autointerp', 'untrained'} # no feature here has peak words
    texts = pd.read_parquet(bench_folder(bench.name)/'explanations.parquet')
    assert texts.query("stage == 'label'")['text'].tolist() == list(MINE.values())
    again = measure_built_in(bench, tmp_path/'run', ('coverage', 'retrieval'), progress=False)
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    with pytest.raises(ValueError, match="the name 'label' is taken"):
        benchmark(bench, {'label': MINE}, tmp_path/'other', progress=False)
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
    assert list(table.columns) == [*FRONT, 'reading']


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
    ('feature,explanation\n11,rain\n', 'mine explains none of the 4 features of tiny-bench'),
    ('feature,explanation\n2,rain\n2,snow\n', '2'),
    ('feature,explanation\n2,rain\ntiny/1-res/2,snow\n', 'explains 2 more than once, as 2 and as tiny/1-res/2'),
])
def test_wrong_files_get_one_line(bench, mine, tmp_path, capsys, text, line):
    mine.write_text(text)
    assert line in fails(capsys, mine, '--bench', 'tiny-bench', '--root', tmp_path)


def test_wrong_options_get_one_line(bench, mine, tmp_path, capsys):
    options = ['--bench', 'tiny-bench', '--root', tmp_path]
    assert "there is no bench 'none'" in fails(capsys, mine, '--bench', 'none')
    assert 'two files have the same name' in fails(capsys, mine, mine, *options)
    assert 'no file' in fails(capsys, tmp_path/'other.csv', *options)
    assert '--name must be a name that stays in --root' in fails(capsys, mine, *options, '--name', '../x')
    control = mine.with_name('control.csv')
    mine.rename(control)
    assert "the stage 'control' is taken" in fails(capsys, control, *options)


def test_two_values_of_a_method_get_one_line():
    with pytest.raises(ValueError, match='feature 3 has two values of coverage by a: keep one of each'):
        completed(rows(('a', 3, 'coverage', .5), ('a', 3, 'coverage', .1)), [3], ['coverage'])
