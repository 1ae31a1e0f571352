"Corpora as they are brought: text files, tables, datasets, and what is said of those that cannot be read"
import gzip
import json
import pandas as pd
import pytest
from saeexplainer.sources.reading import corpus_documents


def documents(name):
    "All (source, text) of a corpus"
    return list(corpus_documents(str(name)))


def texts(name):
    return [text for _, text in documents(name)]


@pytest.fixture
def rows(tmp_path): return tmp_path/'rows.jsonl'


# ---- text

def test_text_files(tmp_path):
    (tmp_path/'sub').mkdir()
    for name, text in (('b.txt', 'second'), ('a.md', 'first'), ('sub/c.txt', 'third'), ('no.py', 'x = 1')):
        (tmp_path/name).write_text(text)
    assert documents(tmp_path) == [('a.md', 'first'), ('b.txt', 'second'), ('c.txt', 'third')]
    assert documents(tmp_path/'b.txt') == [('b.txt', 'second')]
    assert documents(f'{tmp_path}/b*') == [('b.txt', 'second')]


def test_a_long_text_comes_in_pieces(tmp_path):
    "A paragraph without end is cut too"
    (tmp_path/'long.txt').write_text('\n\n'.join(['word ' * 300] * 20 + ['x' * 90_000]))
    sizes = [len(text) for text in texts(tmp_path/'long.txt')]
    assert min(sizes[:4]) >= 5000
    assert max(sizes) == 20_000


ENCODINGS = {'mark.txt': 'utf-8-sig', 'wide.txt': 'utf-16', 'notes [1].txt': 'utf-8', 'LOUD.TXT': 'utf-8'}


def test_texts_of_any_name_and_encoding(tmp_path):
    for name, encoding in ENCODINGS.items():
        (tmp_path/name).write_text('text\nof a file', encoding=encoding)
        assert documents(tmp_path/name) == [(name, 'text\nof a file')]
    assert len(documents(tmp_path)) == 4


# ---- tables

NAMES = ['rows.jsonl', 'rows.parquet', 'rows.jsonl.gz', 'rows.csv']


@pytest.mark.parametrize('name', NAMES)
def test_dataset_files(tmp_path, rows, name):
    table = pd.DataFrame(dict(id=['a', 'b'], text=['first text', 'second text']))
    table.to_json(rows, orient='records', lines=True)
    table.to_parquet(tmp_path/'rows.parquet')
    (tmp_path/'rows.jsonl.gz').write_bytes(gzip.compress(rows.read_bytes()))
    table[['text']].assign(n=1).rename(columns={'text': 'body'}).to_csv(tmp_path/'rows.csv', index=False)
    assert documents(tmp_path/name) == [(name, 'first text'), (name, 'second text')]


RIGHT = ['first text, with a comma', 'second text']
OBJECTS = [dict(text=text, title='t', n=1) for text in RIGHT]
LINES = '\n'.join(map(json.dumps, OBJECTS))
TABLES = {
    'list.json': json.dumps(OBJECTS),
    'strings.json': json.dumps(RIGHT),
    'lines.json': LINES,
    'rows[1].jsonl': LINES,
    'semicolon.csv': 'text;n\n' + ';1\n'.join(RIGHT) + ';1\n;\n',
    'tab.tsv': 'n\ttext\n' + ''.join(f'1\t{text}\n' for text in RIGHT),
    'UPPER.CSV': 'Title,text\na,"first text, with a comma"\nb,second text\n',
}


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
@pytest.mark.parametrize('name', TABLES)
def test_tables_of_every_form_and_encoding(tmp_path, name, encoding):
    (tmp_path/name).write_text(TABLES[name], encoding=encoding)
    assert texts(tmp_path/name) == RIGHT


def test_half_a_character_is_read_as_a_question_mark(rows):
    rows.write_text('{"text": "half \\ud83d"}\n')
    assert documents(rows) == [('rows.jsonl', 'half ?')]


# ---- the column that holds the text

@pytest.mark.parametrize('line, says', [
    ('{"title": "a", "body": "b", "n": 1}\n',
     r"has no column 'text', and 2 of its columns \(title, body, n\) hold text: name the one to read 'text'"),
    ('{"n": 1}\n', r"no column 'text', and none of its columns \(n\) hold text"),
    ('{"n": ', 'rows.jsonl is not a readable jsonl file: line 1 is not JSON'),
])
def test_a_dataset_does_not_say_where_its_text_is(rows, line, says):
    rows.write_text(line)
    with pytest.raises(ValueError, match=says): documents(rows)


def test_the_column_that_is_read_is_said(tmp_path, capsys):
    file = tmp_path/'rows.csv'
    file.write_text('id,body\n1,first text\n2,second text\n')
    assert texts(file) == ['first text', 'second text']
    assert capsys.readouterr().err == f"{file} has no column 'text': its column 'body' is read\n"


@pytest.mark.parametrize('written, wanted', [
    (',0\n0,first text\n1,second text\n', ['first text', 'second text']), # as pandas writes what has no names
    ('TEXT;title\nfirst text;a\n', ['first text']),
])
def test_other_names_of_the_column(tmp_path, written, wanted):
    (tmp_path/'rows.csv').write_text(written)
    assert texts(tmp_path/'rows.csv') == wanted


@pytest.mark.parametrize('text', [
    '1,hello\n2,bye\n',
    'The cat sat.\nThe dog lay by the fire.\n',
    'She sells sea shells by the shore\nand more\n',
    'x,1.5\ny,2.5\n',
])
def test_a_table_without_names_of_columns_is_refused(tmp_path, text):
    "Its first row would be lost"
    (tmp_path/'rows.csv').write_text(text)
    with pytest.raises(ValueError, match='rows.csv has no line with the names of its columns: it begins with'):
        documents(tmp_path/'rows.csv')


# ---- rows without text

def test_rows_without_text_are_counted(rows, capsys):
    without = ['{"text": NaN}', '{"text": null}', '{"id": 7}', '{"text": ""}']
    rows.write_text('\n'.join(['{"text": "a"}', *without, '{"text": "b"}', '']))
    assert texts(rows) == ['a', 'b']
    said = f'{rows}: 4 of 6 rows have no text and are left out, the first of them row 2\n'
    assert capsys.readouterr().err == said


def test_the_first_row_may_lack_what_the_others_have(rows):
    rows.write_text('{"id": "x", "body": null}\n{"id": 5, "text": "b"}\n')
    assert texts(rows) == ['b']


def test_two_columns_may_hold_the_text_though_one_is_empty_at_first(rows):
    rows.write_text('{"id": "x", "body": null}\n{"id": "y", "body": "b"}\n')
    with pytest.raises(ValueError, match=r"2 of its columns \(id, body\) hold text: name the one to read 'text'"):
        documents(rows)


@pytest.mark.parametrize('value', ['["a", "b"]', '5', '{"a": "b"}', 'true'])
def test_a_value_that_is_no_text(rows, value):
    rows.write_text(f'{{"text": "a"}}\n{{"text": {value}}}\n')
    with pytest.raises(ValueError, match='rows.jsonl, row 2: its text is .*, not a text'):
        documents(rows)


def test_bytes_are_no_text(tmp_path):
    pd.DataFrame(dict(text=[b'a'])).to_parquet(tmp_path/'bytes.parquet')
    with pytest.raises(ValueError, match="bytes.parquet, row 1: its text is b'a', not a text"):
        documents(tmp_path/'bytes.parquet')


# ---- what is no text

CUT = gzip.compress(b'{"text": "hello"}\n'*1000)[:-9]


@pytest.mark.parametrize('name, data, says', [
    ('page.html', b'<p>no', 'page.html is no plain text: take the text out of it first'),
    ('PAGE.HTM', b'<p>no', 'PAGE.HTM is no plain text: take the text out of it first'),
    ('paper.pdf', b'<p>no', 'paper.pdf is no plain text: take the text out of it first'),
    ('a.xlsx', b'PK\x03\x04', 'is no plain text: take the text out of it first'),
    ('a.csv', b'PK\x03\x04', 'it is a zip file or a spreadsheet, not text'),
    ('a.txt', b'PK\x03\x04', 'is no plain text: it is a zip file'),
    ('b.txt', gzip.compress(b'hello'), 'it is a gzipped file'),
    ('binary.txt', b'\xff\xfe\x00', 'binary.txt is not UTF-8 text'),
    ('c.txt', 'hello'.encode('utf-16-le'), 'UTF-16 without its mark'),
    ('d.txt', 'hello'.encode('utf-16')[:-1],
     'is not UTF-8 text: it has the mark of UTF-16, and is damaged or cut off'),
    ('a.jsonl.gz', CUT, 'ended before the end-of-stream'),
    ('a.jsonl.zst', b'x', 'is no plain text'),
    ('a.ndjson', b'{"text": "a"}', 'is no plain text: take the text out of it first, into .txt or .jsonl'),
    ('bare.csv', b'text\nfirst text, with a comma\n',
     'bare.csv is not a readable csv file: line 2 has 2 fields, the header 1:'
     " a text that holds ',' must stand in quotes"),
], ids=lambda value: value if isinstance(value, str) and len(value) < 12 else '')
def test_what_is_no_text_is_refused(tmp_path, name, data, says):
    (tmp_path/name).write_bytes(data)
    with pytest.raises(ValueError, match=says) as raised: documents(tmp_path/name)
    assert str(tmp_path/name) in str(raised.value)
    assert '\n' not in str(raised.value)


# ---- names of corpora

def test_tables_in_a_folder_are_said(tmp_path, capsys):
    (tmp_path/'sub').mkdir()
    for name in ('a.txt', 'b.jsonl', 'sub/c.csv.gz'): (tmp_path/name).write_text('text')
    assert texts(tmp_path) == ['text']
    said = '2 tables in this folder are not read: name them, or a glob of them'
    assert said in capsys.readouterr().err
    assert texts(f'{tmp_path}/[as]*') == ['text'] # a folder that fits a glob is no dataset


@pytest.mark.parametrize('name', ['no-such-file.txt', '/no/folder/*.txt', 'rows.jsonl', 'folder/rows.jsonl', 'embeded'])
def test_no_such_corpus(name):
    with pytest.raises(FileNotFoundError, match="no corpus .*: it is 'embedded', a text file"):
        documents(name)


def test_a_dataset_of_the_hub_that_cannot_be_read(): # offline
    with pytest.raises(ValueError, match='cannot read the dataset no-user/no-such-set:part:test: '):
        documents('no-user/no-such-set:part:test')


def test_an_empty_name():
    with pytest.raises(ValueError, match='the name of the corpus is empty'): documents(' ')
