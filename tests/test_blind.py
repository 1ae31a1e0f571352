"Blind reading: what is on a sheet, what is refused, and whose the ratings are"
import csv
import json
import pandas as pd
import pytest
from saeexplainer.blind import (
    RANDOM_LABEL, drawn_features, feature_page, key_file, load_readings, random_labels, read_key, read_ratings,
    readings_file, sheet_rows, store_reading, write_sheet,
)
from saeexplainer.cli import main, methods_in
from saeexplainer.features import Context, Feature, FeatureId
from saeexplainer.files import read_table
from saeexplainer.presets import data_dir

METHODS = {
    'first method': {3: 'the word rain', 5: 'parks', 7: 'the sea'},
    'second method': {3: 'the word  rain', 5: '', 7: 'ships'},
    'third method': {3: 'snow', 5: 'forests', 7: 'ships'},
}


def feature(index, *texts, test_texts=()):
    contexts = tuple(Context('test', tuple(text.split('|')), (0., 8.), 1) for text in texts)
    tests = tuple(Context('test', tuple(text.split('|')), (0., 4.), 1, kind) for text, kind in test_texts)
    return Feature(FeatureId('tiny', '1-res', index), None, 10., .1, contexts, test_contexts=tests)


FEATURES = {3: feature(3, 'The| rain', 'A| storm'), 5: feature(5, 'the| park'), 7: feature(7, 'the| sea')}


@pytest.fixture
def folder(tmp_path):
    write_sheet(tmp_path/'one', METHODS, FEATURES, 3)
    return tmp_path/'one'


def rows_of(folder):
    with (folder/'ratings.csv').open(encoding='utf-8', newline='') as file: return list(csv.DictReader(file))


def fill(folder, name='filled.csv', delimiter=',', rating='2', **changes): # changes: row -> columns
    rows = [row | dict(rating=rating) | changes.get(row['row'], {}) for row in rows_of(folder)]
    file = folder/name
    with file.open('w', encoding='utf-8', newline='') as opened:
        writer = csv.DictWriter(opened, ['sheet', 'row', 'rating', 'note'], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return file


# ---- the sheet

def test_equal_texts_are_one_row():
    rows = sheet_rows(METHODS, [3])
    shared = next(row for row in rows if row.text == 'the word rain')
    assert shared.methods == ('first method', 'second method')
    assert len(rows) == 2


def test_an_empty_text_is_not_shown():
    empty = [row for row in sheet_rows(METHODS, [5]) if not row.text]
    assert [(row.row, row.methods) for row in empty] == [('', ('second method',))]


def test_rows_have_names_of_their_own():
    many = {f'm{i}': {3: f'text {i}'} for i in range(60)}
    names = [row.row for row in sheet_rows(many, [3])]
    assert len(set(names)) == 60
    assert names[25:28] == ['1z', '1aa', '1bb']


def test_the_order_depends_on_the_seed_alone():
    many = {f'm{i}': {3: f'text {i}'} for i in range(9)}
    backwards = dict(reversed(list(many.items())))
    assert [row.text for row in sheet_rows(many, [3], 1)] == [row.text for row in sheet_rows(backwards, [3], 1)]
    assert [row.text for row in sheet_rows(many, [3], 1)] != [row.text for row in sheet_rows(many, [3], 2)]


def test_a_feature_that_a_method_was_not_asked_about_is_not_drawn():
    methods = METHODS | {'fourth': {3: 'x', 5: 'y'}}
    assert sorted(drawn_features(methods, FEATURES, 2)) == [3, 5]
    with pytest.raises(ValueError, match='3 features are wanted, but 2 have excerpts and are explained by all of'):
        drawn_features(methods, FEATURES, 3)


def test_a_feature_without_excerpts_is_not_drawn():
    assert drawn_features({'m': {3: 'x', 9: 'y'}}, FEATURES | {9: feature(9)}, 1) == [3]


def test_features_drawn_are_those_of_the_seed():
    methods = {'m': {index: 'x' for index in range(50)}}
    features = {index: feature(index, 'a| b') for index in range(50)}
    assert drawn_features(methods, features, 9, 1) == drawn_features(methods, features, 9, 1)
    assert drawn_features(methods, features, 9, 1) != drawn_features(methods, features, 9, 2)


def test_a_sheet_names_no_method(folder):
    shown = (folder/'sheet.md').read_text() + (folder/'ratings.csv').read_text()
    assert not [method for method in METHODS if method in shown]


def test_key_and_readings_are_not_in_the_folder_of_the_reader(folder):
    assert sorted(file.name for file in folder.iterdir()) == ['ratings.csv', 'sheet.md']
    assert key_file(folder).exists()


def test_a_page_shows_strongest_contexts_and_test_contexts_that_fire():
    tests = [('weak| rain', 'fires'), ('hard| rain', 'hard'), ('no| thing', 'random')]
    tested = feature(3, 'The| rain', test_texts=tests)
    page = feature_page(1, tested, [])
    assert '- 80: The «rain»' in page
    assert '- 40: weak «rain»' in page
    assert 'hard' not in page
    assert 'thing' not in page


def test_only_so_many_of_the_strongest_contexts_are_shown():
    page = feature_page(1, FEATURES[3], [], strongest=1)
    assert 'rain' in page
    assert 'storm' not in page


def test_what_models_say_is_escaped():
    rows = sheet_rows({'m': {3: '<b>rain</b> **5**\x1b[2J'}}, [3])
    page = feature_page(1, feature(3, '<i>|\x1b[2J rain'), rows)
    assert '<b>' not in page
    assert '<i>' not in page
    assert '\x1b' not in page
    assert r'\*\*5\*\*' in page


def test_a_context_of_unknown_strength_has_no_number():
    unknown = Feature(FeatureId('tiny', '1-res', 3), None, float('nan'), .1, FEATURES[3].contexts)
    assert '- The «rain»' in feature_page(1, unknown, [])


def test_a_sheet_is_not_overwritten(folder):
    with pytest.raises(ValueError, match='has a sheet already: choose another folder'):
        write_sheet(folder, METHODS, FEATURES, 2)


def test_the_same_seed_gives_the_same_sheet(folder, tmp_path):
    again = write_sheet(tmp_path/'two', METHODS, FEATURES, 3)
    assert again == read_key(folder)
    assert (tmp_path/'two'/'sheet.md').read_text() == (folder/'sheet.md').read_text()


# ---- labels of other features

def test_a_random_label_is_of_another_feature():
    labels = {index: f'label {index}' for index in range(20)} | {20: 'no clear pattern', 21: None}
    drawn = random_labels(range(22), labels)
    assert all(drawn[index] != labels[index] for index in range(22))
    assert 'no clear pattern' not in drawn.values()
    assert drawn == random_labels(range(22), labels)
    assert drawn != random_labels(range(22), labels, seed=1)


def test_an_equal_label_of_another_feature_is_no_chance():
    with pytest.raises(ValueError, match='no other feature has a label that could stand in for that of 3'):
        random_labels([3], {3: 'rain', 5: 'rain'})


# ---- ratings

@pytest.mark.parametrize('delimiter', [',', ';', '\t'])
def test_ratings_are_read_as_a_spreadsheet_saves_them(folder, delimiter):
    file = fill(folder, delimiter=delimiter)
    assert set(read_ratings(file, read_key(folder)).values()) == {2}


@pytest.mark.parametrize('rating', ['3', '-1', '1.5', '2.0', 'right', 'nan', '٢'])
def test_anything_but_the_scale_is_refused(folder, rating):
    file = fill(folder, **{'2a': dict(rating=rating)})
    with pytest.raises(ValueError, match='row 2a: the rating is .*: it is 0 wrong, 1 partly, 2 right') as error:
        read_ratings(file, read_key(folder))
    assert '\n' not in str(error.value)


def test_a_row_without_a_rating_is_named(folder):
    with pytest.raises(ValueError, match='row 1a: there is no rating'):
        read_ratings(folder/'ratings.csv', read_key(folder))


def test_a_row_that_is_missing_is_named(folder):
    file = fill(folder)
    lines = file.read_text().splitlines()
    file.write_text('\n'.join(lines[:-1]) + '\n')
    last = rows_of(folder)[-1]['row']
    with pytest.raises(ValueError, match=f'row {last}: there is no rating'): read_ratings(file, read_key(folder))


def test_a_row_that_is_rated_twice_is_refused(folder):
    file = fill(folder, **{'1b': dict(row='1a')})
    with pytest.raises(ValueError, match='row 1a: it is rated twice'): read_ratings(file, read_key(folder))


def test_a_row_that_the_sheet_lacks_is_refused(folder):
    file = fill(folder, **{'1b': dict(row='9z\x1b')})
    with pytest.raises(ValueError, match='row 9z.: the sheet has no such row') as error:
        read_ratings(file, read_key(folder))
    assert '\x1b' not in str(error.value)


def test_ratings_of_another_sheet_are_refused(folder, tmp_path):
    write_sheet(tmp_path/'two', METHODS, FEATURES, 3, seed=1)
    with pytest.raises(ValueError, match='it is of the sheet sha256:.*, not of sha256:'):
        read_ratings(fill(tmp_path/'two'), read_key(folder))


def test_ratings_without_their_columns_are_refused(folder):
    file = folder/'bare.csv'
    file.write_text('row,rating\n1a,2\n')
    with pytest.raises(ValueError, match='bare.csv lacks sheet'): read_ratings(file, read_key(folder))


@pytest.mark.parametrize('name, says', [('nothing.csv', 'no file'), ('filled.txt', 'is no table')])
def test_ratings_that_are_no_table_are_refused(folder, name, says):
    fill(folder, 'filled.txt')
    with pytest.raises((ValueError, FileNotFoundError), match=says): read_ratings(folder/name, read_key(folder))


def test_a_sheet_that_was_changed_is_refused(folder):
    with (folder/'sheet.md').open('a') as file: file.write('more\n')
    with pytest.raises(ValueError, match='sheet.md is not the sheet that'): read_key(folder)


def test_a_key_that_is_none_is_refused(folder):
    key_file(folder).write_text('{"rows": [{"row": 1}]}')
    with pytest.raises(ValueError, match='is not the key of a sheet'): read_key(folder)


# ---- readings

def test_a_reading_is_stored_with_reader_time_and_sheet(folder):
    before = pd.Timestamp.now('UTC').floor('s')
    store_reading(folder, fill(folder), '  Ada ')
    stored = read_table(readings_file(folder)).to_pandas()
    assert set(stored['reader']) == {'Ada'}
    assert set(stored['sheet']) == {read_key(folder).sheet}
    assert before <= pd.Timestamp(stored['time'].iloc[0]) <= pd.Timestamp.now('UTC')


def test_a_rating_counts_for_each_method_that_said_the_text(folder):
    key = read_key(folder)
    shared = next(row.row for row in key.rows if row.methods == ('first method', 'second method'))
    readings = store_reading(folder, fill(folder, rating='0', **{shared: dict(rating='2')}), 'Ada')
    assert sorted(readings.loc[readings['rating'] == 2, 'method']) == ['first method', 'second method']


def test_an_empty_text_counts_as_wrong(folder):
    readings = store_reading(folder, fill(folder), 'Ada')
    empty = readings.query('method == "second method" and feature == 5')
    assert empty['rating'].tolist() == [0]
    assert len(readings) == 9


def test_two_readers_are_kept_side_by_side(folder):
    store_reading(folder, fill(folder), 'Ada')
    store_reading(folder, fill(folder, rating='1'), 'Ben')
    by_reader = load_readings(folder).query('row != ""').groupby('reader')['rating'].max()
    assert by_reader.to_dict() == {'Ada': 2, 'Ben': 1}


def test_a_reader_rates_a_sheet_once(folder):
    store_reading(folder, fill(folder), 'Ada')
    with pytest.raises(ValueError, match='Ada has rated this sheet already'): store_reading(folder, fill(folder), 'Ada')


@pytest.mark.parametrize('name', ['', ' ', 'a\x00b', 'a'*81])
def test_a_reader_needs_a_name(folder, name):
    with pytest.raises(ValueError, match='the reader needs a name'): store_reading(folder, fill(folder), name)


def test_what_is_refused_stores_nothing(folder):
    with pytest.raises(ValueError, match='row 1a'): store_reading(folder, folder/'ratings.csv', 'Ada')
    assert not readings_file(folder).exists()


def test_readings_of_another_sheet_are_refused(folder, tmp_path):
    write_sheet(tmp_path/'two', METHODS, FEATURES, 3, seed=1)
    store_reading(folder, fill(folder), 'Ada')
    readings_file(tmp_path/'two').write_bytes(readings_file(folder).read_bytes())
    with pytest.raises(ValueError, match='has ratings of another sheet'): load_readings(tmp_path/'two')


# ---- the command

def command(capsys, *args):
    main(['read-blind', *map(str, args)])
    return capsys.readouterr().out


@pytest.fixture
def mine(tmp_path):
    file = tmp_path/'mine.csv'
    file.write_text('feature,explanation\n5,the word is\n13,the future\n45,facts\n')
    return file


def test_the_command_makes_a_sheet_and_takes_it_back(capsys, tmp_path, mine):
    sheet = tmp_path/'sheets'/'one'
    said = command(capsys, sheet, mine, '--features', 3)
    assert 'explanations of 3 features by 2 methods' in said
    assert 'keep one.key.json from the reader' in said
    printed = command(capsys, sheet, '--ratings', fill(sheet, rating='1'), '--reader', 'Ada', '--json')
    methods = {row['method']: row for row in json.loads(printed)['methods']}
    assert set(methods) == {'mine', RANDOM_LABEL}
    assert methods['mine']['mean'] == 1
    assert methods['mine']['right'] == 0
    command(capsys, sheet, '--ratings', fill(sheet, rating='2'), '--reader', 'Ben')
    shown = command(capsys, sheet)
    assert 'Ada' in shown
    assert 'Ben' in shown


def test_fewer_than_sixty_are_all_taken(capsys, tmp_path, mine):
    said = command(capsys, tmp_path/'one', mine)
    assert said.startswith('all 3 features are taken that have excerpts and are explained by all methods')
    assert 'explanations of 3 features by 2 methods' in said
    assert {row.feature for row in read_key(tmp_path/'one').rows} == {5, 13, 45}


def test_of_more_than_sixty_as_many_are_drawn(capsys, tmp_path):
    said = command(capsys, tmp_path/'one', data_dir()/'smollm2-135m'/'results', '--methods', 'label,dpo2')
    assert 'are taken' not in said
    assert 'explanations of 60 features by 3 methods' in said


def test_results_are_read_by_the_names_of_their_methods(capsys, tmp_path):
    sheet = tmp_path/'one'
    command(capsys, sheet, data_dir()/'smollm2-135m'/'results', '--methods', 'label, dpo2', '--features', 5)
    methods = {method for row in read_key(sheet).rows for method in row.methods}
    assert methods == {'label', 'dpo2', RANDOM_LABEL}


def test_results_of_another_sae_are_refused():
    with pytest.raises(ValueError, match='explains features of smollm2-135m/9-res-4k; these are of tiny/1-res'):
        methods_in(data_dir()/'smollm2-135m'/'results', FEATURES.values())


@pytest.mark.parametrize('args, says', [
    (['one', '--ratings', 'r.csv'], '--ratings needs the name of who rated'),
    (['one', 'mine.csv', '--ratings', 'r.csv', '--reader', 'Ada'], 'not both'),
    (['one'], 'make a sheet first'),
    (['one', 'mine.csv', '--methods', 'yours', '--features', '2'], "there is no method 'yours': there are mine"),
    (['one', 'mine.csv', 'mine.csv'], "the name 'mine' is taken by another method"),
    (['one', 'mine.csv', '--features', '60'], '60 features are wanted, but 3 have excerpts'),
    (['one', 'no-such.csv'], 'no file no-such.csv'),
])
def test_faults_are_one_line(capsys, tmp_path, mine, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit): command(capsys, *args)
    line = capsys.readouterr().err.strip()
    assert says in line
    assert '\n' not in line
