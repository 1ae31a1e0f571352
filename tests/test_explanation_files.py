"Files of explanations: each text stays with its feature, however its table was saved, or one line says why not"
import gzip
import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saeexplainer.explanation_files import read_explanations


def columns_of(file): return read_explanations(file).to_dict('list')


def written(file):
    "What is read of a file, by feature, or the one line that is said of it"
    try: return dict(zip(*columns_of(file).values()))
    except ValueError as error:
        assert str(file) in str(error)
        assert '\n' not in str(error)
        return str(error)


# ---- what is read

def test_a_table_of_numbers_and_texts(tmp_path):
    pd.DataFrame({'feature': [5], 'explanation': ['x']}).to_csv(tmp_path/'a.csv', index=False)
    assert columns_of(tmp_path/'a.csv') == {'feature': ['5'], 'explanation': ['x']}


def test_other_columns_are_passed_over(tmp_path):
    pd.DataFrame({'feature': [5], 'explanation': ['x'], 'score': [1.]}).to_parquet(tmp_path/'b.parquet')
    assert columns_of(tmp_path/'b.parquet') == {'feature': ['5'], 'explanation': ['x']}


def test_rows_as_neuronpedia_exports_them(tmp_path):
    row = dict(modelId='gemma-2-9b', layer='20-gemmascope-res-16k', index='5', description=' x ',
               explanationModelName='gpt-4o-mini')
    rows = [row, row | dict(index='6', description=None)]
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    (tmp_path/'batch-0.jsonl.gz').write_bytes(gzip.compress(text.encode()))
    source = 'gemma-2-9b/20-gemmascope-res-16k'
    assert columns_of(tmp_path/'batch-0.jsonl.gz') == {
        'feature': [f'{source}/5', f'{source}/6'], 'explanation': [' x ', None]}


def test_an_index_and_a_description_are_enough(tmp_path):
    (tmp_path/'bare.jsonl').write_text('{"index": 5, "description": "x"}\n')
    assert columns_of(tmp_path/'bare.jsonl') == {'feature': ['5'], 'explanation': ['x']}


def test_ends_of_lines_within_a_text_end_no_row(tmp_path):
    "As `explain --all` writes them"
    text = '{"feature": "5", "explanation": "a\u2028b\x85c"}\n'
    (tmp_path/'ends.jsonl').write_text(text, encoding='utf-8')
    assert columns_of(tmp_path/'ends.jsonl') == {'feature': ['5'], 'explanation': ['a\u2028b\x85c']}


@pytest.mark.parametrize('name, text, says', [
    ('c.jsonl', '{"feature": 1\n', 'is not a readable jsonl file'),
    ('d.jsonl', '{"id": 1}\n', 'has the columns id: it needs feature and explanation$'),
    ('f.xlsx', '', 'f.xlsx is a spreadsheet: save it as CSV'),
    ('e.txt', '', 'must be .csv, .tsv, .parquet, .json or .jsonl, all but .parquet also as .gz')])
def test_what_evaluate_cannot_read(tmp_path, name, text, says):
    (tmp_path/name).write_text(text)
    with pytest.raises(ValueError, match=says): read_explanations(tmp_path/name)


# ---- each text stays with its feature

FRAME = pd.DataFrame(dict(feature=[10, 20, 30, 40], explanation=['ten', 'twenty', None, 'forty'], score=1.))
RIGHT = {'10': 'ten', '20': 'twenty', '30': None, '40': 'forty'}
NEURONPEDIA = FRAME.rename(columns=dict(feature='index', explanation='description')).assign(modelId='m', layer='s')

def as_it_is(frame): return frame

def shuffled(frame): return frame.sample(frac=1, random_state=1)

def turned(frame): return frame.iloc[::-1]

def filtered(frame): return frame[frame.index != 1]

def indexed(frame): return frame.set_index(frame.columns[0])

def categories(frame): return frame.astype({frame.columns[0]: 'category'})

def floats(frame): return frame.astype({frame.columns[0]: float})


@pytest.mark.parametrize('change, n', [
    (as_it_is, 4), (shuffled, 4), (turned, 4), (filtered, 3), (indexed, 4), (categories, 4), (floats, 4)])
def test_explanations_stay_with_their_features(tmp_path, change, n):
    "However a table was filtered, sorted or shuffled before it was written"
    change(FRAME).to_parquet(tmp_path/'x.parquet')
    found = written(tmp_path/'x.parquet')
    assert found == {name: RIGHT[name] for name in found}
    assert len(found) == n
    change(NEURONPEDIA).to_parquet(tmp_path/'n.parquet')
    assert written(tmp_path/'n.parquet') == {f'm/s/{name}': text for name, text in found.items()}


@pytest.mark.parametrize('name, lines', [('x.json', False), ('x.jsonl', True)])
def test_explanations_in_json_stay_with_their_features(tmp_path, name, lines):
    shuffled(FRAME).to_json(tmp_path/name, orient='records', lines=lines)
    assert written(tmp_path/name) == RIGHT


TEXTS = [
    ('feature,explanation\n5,"a, b"\n6,\n', 'utf-8'),
    ('Feature;Explanation\r\n5;a, b\r\n6;\r\n;\r\n;\r\n', 'utf-8-sig'),
    ('FEATURE\texplanation \n5\ta, b\n6\t\n', 'utf-16'),
    ('\n  \n,,\nfeature,explanation\n5,"a, b"\n6,""\n', 'utf-8'),
    ('feature,explanation\r5,"a, b"\r6,\r', 'utf-8'),
    ('feature,explanation,note\n5,"a, b"\n6\n', 'utf-8'),
    ('sep=;\nexplanation;feature;note\na, b;5;x\n;6\n', 'utf-8'),
    ('feature,explanation,,\n5.0,"a, b",,\n006,,,\n,,,\n', 'utf-8'),
    ('"feature","explanation"\n" 5 ","a, b"\n\n6,"  "\n', 'utf-8')]

@pytest.mark.parametrize('text, encoding', TEXTS)
def test_tables_as_spreadsheets_save_them(tmp_path, text, encoding):
    for name in ('x.csv', 'X.CSV', 'x.tsv', 'x.csv.gz'):
        data = text.encode(encoding)
        (tmp_path/name).write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
        assert written(tmp_path/name) == {'5': 'a, b', '6': None}, name


def test_the_windows_encoding_is_read_and_said(tmp_path, capsys):
    text = 'the word \u201cis\u201d \u2013 caf\u00e9'
    (tmp_path/'x.csv').write_bytes(f'feature,explanation\n5,{text}\n'.encode('cp1252'))
    assert written(tmp_path/'x.csv') == {'5': text}
    assert 'x.csv is not UTF-8: it is read as Windows-1252' in capsys.readouterr().err


def test_missing_texts_as_python_spells_them(tmp_path):
    (tmp_path/'x.csv').write_text('feature,explanation\n5,nan\n6,NaN\n7,<NA>\n8,the word NaN\n')
    assert written(tmp_path/'x.csv') == {'5': None, '6': None, '7': None, '8': 'the word NaN'}


@pytest.mark.parametrize('name, text', [
    ('list.jsonl', '\n[{"feature": 5, "explanation": "a"},\n {"feature": 6, "explanation": null}]'),
    ('lines.json', '\ufeff{"feature": 5, "explanation": "a"}\n{"feature": "6"  , "explanation": ""}\n')])
def test_lists_and_lines_of_json_are_told_apart(tmp_path, name, text):
    "Whatever the ending says"
    (tmp_path/name).write_text(text, encoding='utf-8')
    assert written(tmp_path/name) == {'5': 'a', '6': None}


def test_half_characters_are_said(tmp_path, capsys):
    (tmp_path/'half.jsonl').write_text('{"feature": 5, "explanation": "half \\ud83d emoji"}\n'
                                       '{"feature": 6, "explanation": "whole \\ud83d\\ude00"}\n')
    assert written(tmp_path/'half.jsonl') == {'5': 'half ? emoji', '6': 'whole \U0001f600'}
    says = "half.jsonl: 1 lines held half characters, which are read as '?'"
    assert says in capsys.readouterr().err


# ---- what would lose something is refused

REFUSED = {
    'bare.csv': ('feature,explanation\n5,the word has, as a verb\n6,b, c\n',
                 "line 2 has 3 fields, the header 2: a text that holds ',' must stand in quotes"),
    'some.csv': ('feature,explanation\n5,a\n6,b, c\n', 'line 3 has 3 fields'),
    'open.csv': ('feature,explanation\n5,"a\n6,b\n', 'are the quotes of a text closed, and doubled inside it'),
    'empty.csv': ('', 'it is empty'),
    'names.csv': ('id,text\n5,a\n', 'has the columns id, text: it needs feature and explanation'),
    'blank.csv': ('feature,explanation\n5,a\n,b\n', "row 2: '' is no feature"),
    'part.csv': ('feature,explanation\n1.7,a\n',
                 "row 1: '1.7' is no feature, which is an index or model/source/index"),
    'minus.csv': ('feature,explanation\n-1,a\n', "'-1' is no feature"),
    'true.jsonl': ('{"feature": true, "explanation": "a"}', "'True' is no feature"),
    'number.jsonl': ('{"feature": 5, "explanation": 7}', 'row 1: the explanation is 7, not a text'),
    'list.json': ('[1, 2]', 'holds 1, not a row with names'),
    'object.json': ('{"5": "a"}', 'has the columns 5: it needs feature and explanation'),
    'cut.json': ('[{"feature": 5,', 'line 1 is not JSON'),
    'deep.json': ('['*100_000, 'it is nested too deeply'),
    'x.parquet': ('PAR1', 'is not a readable parquet file'),
    'x.jsonl.gz': ('no', 'is not a readable jsonl file'),
    'twice.csv': ('feature,explanation\n5,a\n5.0,b\n', 'explains 5 more than once: keep one'),
    'two_names.csv': ('feature,explanation\n5,a\nsmollm2-135m/9-res-4k/5,b\n',
                      'explains 5 more than once, as 5 and as smollm2-135m/9-res-4k/5'),
    'names_twice.csv': ('feature,explanation,explanation\n5,a,b\n', "line 1 names two columns 'explanation'"),
    'nearly.csv': ('\nfeature,explanation,Explanation\n5,a,b\n', "line 2 names two columns 'Explanation'"),
    'nameless.csv': ('feature,explanation,,\n5,a,,b\n', 'line 2 has a text in one of the 2 columns without a name'),
    'twice.jsonl': ('{"feature": 5, "explanation": "a", "explanation": "b"}', "it names 'explanation' twice"),
    'zero.csv': ('feature,explanation\n5,a\n6,b\0c\n', 'line 3 holds a zero byte'),
    'open_name.csv': ('feature,"explanation\n5,a\n',
                      'line 1: a quote opens in the name of a column and does not close'),
    'long_open.csv': ('sep=,\nfeature,explanation\n5,a\n6,"b\n7,c\n8,d\n', 'line 4: unexpected end of data'),
    'lines.csv': ('feature,explanation\n5,"a\nb"\n6,b,c\n', 'line 4 has 3 fields'),
    'json.csv': ('[{"feature": 5, "explanation": "a"}]', 'it is JSON: give it the ending .jsonl'),
    'sheet.csv': ('PK\x03\x04xl', 'it is a zip file or a spreadsheet, not text'),
    'pages.jsonl': ('PAR1', 'it is a Parquet file, not text'),
    'wide.csv': ('\0'.join('feature,explanation\n5,a\n') + '\0',
                 'it is no text, or UTF-16 without its mark: save it as UTF-8'),
    'header.csv': ('feature,explanation\n', 'holds no explanation'),
    'none.jsonl': ('', 'holds no explanation'),
    'zeros.csv': ('feature,explanation\nm/s/5,a\n m/s/005,b\n', 'explains m/s/5 more than once')}

@pytest.mark.parametrize('name', REFUSED)
def test_tables_that_would_lose_something_are_refused(tmp_path, name):
    text, says = REFUSED[name]
    (tmp_path/name).write_text(text)
    assert says in written(tmp_path/name)


def test_a_row_without_a_feature_is_named(tmp_path):
    (tmp_path/'x.jsonl').write_text('{"feature": 5, "explanation": "a"}\n{"explanation": "b"}\n')
    says = 'x.jsonl, row 2, has the columns explanation: it needs feature and explanation'
    assert says in written(tmp_path/'x.jsonl')


def test_two_columns_of_one_name_in_a_parquet_file(tmp_path):
    columns = [pa.array([5]), pa.array(['a']), pa.array(['b'])]
    table = pa.table(columns, names=['feature', 'explanation', 'explanation'])
    pq.write_table(table, tmp_path/'x.parquet')
    assert "it has two columns 'explanation'" in written(tmp_path/'x.parquet')
