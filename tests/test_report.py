"The page of a run: nothing of it is taken for markup, its numbers have their n and their chance, damage is named"
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from saeexplainer.evaluation.tables import summary
from saeexplainer.presets import data_dir, load_preset
from saeexplainer.report import comparisons, measured, studies, write_report
from saeexplainer.results import Results, command_of, read_cases
from saeexplainer.show import code_span, escape_markdown

HOSTILE = '<img src=x onerror=alert(1)>`|*_[a](javascript:b)$x^2$ {: onclick=c }'
ANEW = 'writes it anew'


def shipped(): return data_dir()/'smollm2-135m'/'results'


def shipped_page():
    "As it is in the package; test_cli holds that it is what is written today"
    return (shipped()/'report.md').read_text()


@pytest.fixture
def folder(tmp_path):
    "Results, to be changed"
    return Path(shutil.copytree(shipped(), tmp_path/'results'))


def change(file, **fields): file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# ---- the page

@pytest.fixture
def hostile_page(folder):
    "A page whose preset, notes and examples are hostile, without its provenance"
    change(folder/'provenance.json', preset=HOSTILE, size=HOSTILE, notes=[HOSTILE], sittings={HOSTILE: 2})
    case = json.loads((folder/'examples.json').read_text())[0]
    case |= {'feature': HOSTILE, HOSTILE: HOSTILE}
    case['texts'] = {HOSTILE: {'pieces': [[HOSTILE, True], [HOSTILE, False]], 'score': 1.}}
    (folder/'examples.json').write_text(json.dumps([case]))
    write_report(folder)
    return (folder/'report.md').read_text().split('## Provenance')[0]


def test_nothing_of_a_preset_or_a_feature_is_markup(hostile_page):
    assert '<img' not in hostile_page
    assert not re.search(r'(?<!\\)[${}]', hostile_page)
    assert '`<' not in hostile_page


def test_what_is_hostile_is_shown_all_the_same(hostile_page):
    assert hostile_page.count(escape_markdown(HOSTILE)) == 10


def test_names_stay_code_where_they_can():
    assert code_span('smollm2-135m/9-res-4k/5') == '`smollm2-135m/9-res-4k/5`'
    assert '`' not in code_span('a`b').replace('\\`', '')


def test_the_page_says_chance_and_shows_the_figure():
    assert '](stages.png)' in shipped_page()
    assert 'chance is 33.3%' in shipped_page()


def test_the_page_says_n():
    page = shipped_page()
    assert re.search(r'- output \(n = \d+-\d+\): ', page)
    for metric in ('generative', 'input', 'high', 'low', 'gap', r'names\_word', r'names\_other'):
        assert f'- {metric} (n = ' in page


def test_n_is_a_range_where_stages_differ():
    rows = [('a', feature, 'input', 1.) for feature in range(3)]
    rows += [('b', feature, 'input', 1.) for feature in range(4)]
    rows += [('a', 0, 'output', 1.), ('control', 0, 'output', 1.), ('control', 1, 'output', 1.)]
    metrics = pd.DataFrame(rows, columns=['stage', 'feature', 'metric', 'value'])
    assert measured(summary(metrics)) == {'input': '3-4', 'output': '1'}


@pytest.mark.parametrize('root, name, fields, says', [
    ('runs', 'smollm2-135m-demo', {}, 'saeexplainer run smollm2-135m --size demo'),
    ('runs', 'demo', {}, 'saeexplainer run smollm2-135m --size demo --name demo'),
    ('else where', 'demo', {}, "saeexplainer run smollm2-135m --size demo --name demo --root 'else where'"),
    ('runs', 'demo', dict(seed=3), 'saeexplainer run runs/demo/preset.yaml --name demo')])
def test_the_command_of_a_run_is_the_one_that_made_it(root, name, fields, says):
    run = SimpleNamespace(preset=load_preset('smollm2-135m', **fields), folder=Path(root)/name)
    assert command_of(run) == says


def p_values(page):
    "Cells of the table of screening whose column is one of p, row by row"
    table = page.split('## Screening')[1].split('##')[0].strip().splitlines()
    header, _, *rows = [line.strip('| ').split(' | ') for line in table]
    named = header[-len(rows[0]) + 1:] # the first column has no name
    columns = [i for i, name in enumerate(named, 1) if name.endswith(' p')]
    return [[row[i] for i in columns] for row in rows]


def test_p_is_shown_with_three_decimals():
    cells = [cell for row in p_values(shipped_page()) for cell in row]
    assert cells
    assert [cell for cell in cells if not re.fullmatch(r'-|&lt; 0\.001|[01]\.\d{3}', cell)] == []


# ---- damaged results

def one_line_of(read, file):
    "What is said where something cannot be read: one line that names the file"
    with pytest.raises((ValueError, FileNotFoundError)) as error: read()
    said = str(error.value)
    assert str(file) in said
    assert '\n' not in said
    return said


@pytest.mark.parametrize('name, text, says', [
    ('provenance.json', '{"preset": 1', 'is not JSON'),
    ('provenance.json', '[1]', 'not an object'),
    ('provenance.json', '{}', 'lacks preset'),
    ('examples.json', '{}', 'not a list'),
    ('metrics.parquet', 'PAR1', 'is not a Parquet file')])
def test_damaged_results_are_named(folder, name, text, says):
    (folder/name).write_text(text)
    with pytest.raises(ValueError, match=says) as error: write_report(folder)
    assert name in str(error.value)
    assert '\n' not in str(error.value)


def test_a_folder_without_results(tmp_path):
    with pytest.raises(ValueError, match='holds no results'): Results(tmp_path)


def rewrite(file, changed): changed(pd.read_parquet(file)).to_parquet(file)


READ = {
    'metrics': ['stage', 'feature', 'metric', 'value'],
    'explanations': ['stage', 'feature', 'k', 'text'],
    'steering': ['control'],
    'arms': ['arm', 'stage', 'feature', 'metric', 'value'],
    'second_writer': ['stage', 'feature', 'metric', 'value'],
    'screening': ['variant', 'feature', 'k', 'text', 'score']}
COLUMNS = [(name, column) for name, columns in READ.items() for column in columns]
MAY_BE_EMPTY = ('value', 'text', 'score', 'control')


def said_of(folder, name, table):
    "What is said of results in which a table is another one"
    file = folder/f'{name}.parquet'
    table.to_parquet(file)
    def read(): return Results(folder)[name]
    return one_line_of(read, file)


def table_of(folder, name): return pd.read_parquet(folder/f'{name}.parquet')


@pytest.mark.parametrize('name, column', COLUMNS)
def test_a_table_without_a_column_is_named(folder, name, column):
    without = table_of(folder, name).drop(columns=column)
    assert f'lacks {column} (its columns: ' in said_of(folder, name, without)


def of_another_kind(values):
    "Numbers in place of texts, and texts in place of numbers"
    if not pd.api.types.is_numeric_dtype(values): return range(len(values))
    return values.astype(str) + 'x'


@pytest.mark.parametrize('name, column', COLUMNS)
def test_a_column_of_another_kind_is_named(folder, name, column):
    table = table_of(folder, name)
    lists = table.assign(**{column: [[1]]*len(table)})
    assert f'its column {column} ' in said_of(folder, name, lists)
    other = table.assign(**{column: of_another_kind(table[column])})
    said = said_of(folder, name, other)
    assert f'its column {column} ' in said
    assert ANEW in said


@pytest.mark.parametrize('name, column', [(name, column) for name, column in COLUMNS if column not in MAY_BE_EMPTY])
def test_an_empty_cell_is_named(folder, name, column):
    table = table_of(folder, name)
    empty = table.assign(**{column: [None, *table[column][1:]]})
    assert f'its column {column} is empty' in said_of(folder, name, empty)


@pytest.mark.parametrize('name', [name for name in READ if name != 'steering'])
def test_a_row_that_is_there_twice_is_named(folder, name):
    table = table_of(folder, name)
    assert ' has two rows of ' in said_of(folder, name, pd.concat([table, table[:1]]))


@pytest.mark.parametrize('name', READ)
def test_an_index_is_read_as_a_column(folder, name):
    "As pandas keeps it"
    table = table_of(folder, name)
    table.set_index(READ[name][0]).to_parquet(folder/f'{name}.parquet')
    assert set(Results(folder)[name].columns) == set(table.columns)


def test_metrics_of_no_stage_are_no_page(folder):
    def first_rows(table): return table[:0]
    def write(): write_report(folder)
    rewrite(folder/'metrics.parquet', first_rows)
    assert 'has no row of label' in one_line_of(write, folder/'metrics.parquet')


def test_screening_without_sft_is_no_study(folder):
    def without_sft(table): return table[table['variant'] != 'sft']
    def read(): return studies(Results(folder))
    rewrite(folder/'screening.parquet', without_sft)
    for other in ('arms', 'second_writer'): (folder/f'{other}.parquet').unlink()
    assert 'has no row of the variant sft' in one_line_of(read, folder/'screening.parquet')


def test_one_stage_is_compared_with_nothing():
    assert comparisons(['label']) == []
    assert comparisons([]) == []


COUNTED = dict(outcomes={'ok': 'x'}, attempts={}, prompt_tokens=0, completion_tokens=0, cost=0.)

@pytest.mark.parametrize('fields', [
    dict(preset=1),
    dict(evaluated=[]),
    dict(evaluated='sft'),
    dict(evaluated=[1]),
    dict(notes={}),
    dict(writers=[]),
    dict(writers={'m': []}),
    dict(writers={'m': {'s': {}}}),
    dict(writers={'m': {'s': COUNTED}}),
    dict(sittings=[1]),
    dict(sittings={'sft': 'x'})])
def test_an_odd_record_is_named(folder, fields):
    def read(): Results(folder).check()
    change(folder/'provenance.json', **fields)
    assert ANEW in one_line_of(read, folder/'provenance.json')


# ---- examples

CASE = dict(feature='m/s/1', accuracy={'sft': .5}, texts={'sft': dict(pieces=[['a', True]], score=1.)},
            max_act=2., sft='x')


def without(name): return {key: value for key, value in CASE.items() if key != name}


def test_examples_that_are_missing_are_named(tmp_path):
    def read(): read_cases(tmp_path)
    assert 'is missing' in one_line_of(read, tmp_path/'examples.json')


def test_an_example_is_read(tmp_path):
    (tmp_path/'examples.json').write_text(json.dumps([CASE]))
    assert read_cases(tmp_path) == [CASE]


@pytest.mark.parametrize('case', [
    None,
    1,
    'x',
    [],
    {},
    without('feature'),
    without('accuracy'),
    without('texts'),
    without('max_act'),
    CASE | dict(feature=1),
    CASE | dict(accuracy=[]),
    CASE | dict(accuracy={'sft': 'x'}),
    CASE | dict(max_act='x'),
    CASE | dict(texts=[]),
    CASE | dict(texts={'sft': 1}),
    CASE | dict(texts={'sft': dict(pieces=[1], score=1.)}),
    CASE | dict(texts={'sft': dict(pieces=[], score='x')})])
def test_examples_that_cannot_be_shown_are_named(tmp_path, case):
    def read(): read_cases(tmp_path)
    (tmp_path/'examples.json').write_text(json.dumps([CASE, case]))
    assert ', example 2: ' in one_line_of(read, tmp_path/'examples.json')
