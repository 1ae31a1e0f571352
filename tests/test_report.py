"The page of a run: nothing of it is taken for markup, its numbers have their n and their chance, and what is damaged is named"
import json, re, shutil
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


@pytest.fixture
def folder(tmp_path): # of results, to change
    return Path(shutil.copytree(data_dir()/'smollm2-135m'/'results', tmp_path/'results'))


def change(file, **fields): file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_nothing_of_a_preset_or_a_feature_is_markup(folder):
    change(folder/'provenance.json', preset=HOSTILE, size=HOSTILE, notes=[HOSTILE], sittings={HOSTILE: 2})
    case = json.loads((folder/'examples.json').read_text())[0]
    case |= {'feature': HOSTILE, HOSTILE: HOSTILE}
    case['texts'] = {HOSTILE: {'pieces': [[HOSTILE, True], [HOSTILE, False]], 'score': 1.}}
    (folder/'examples.json').write_text(json.dumps([case]))
    write_report(folder)
    page = (folder/'report.md').read_text().split('## Provenance')[0]
    assert '<img' not in page and not re.search(r'(?<!\\)[${}]', page)
    assert page.count(escape_markdown(HOSTILE)) == 10 and '`<' not in page


def test_names_stay_code_where_they_can():
    assert code_span('smollm2-135m/9-res-4k/5') == '`smollm2-135m/9-res-4k/5`' and '`' not in code_span('a`b').replace('\\`', '')


def test_the_page_says_n_and_chance_and_shows_the_figure():
    page = (data_dir()/'smollm2-135m'/'results'/'report.md').read_text() # test_cli holds that it is what is written today
    assert '](stages.png)' in page and 'chance is 33.3%' in page and re.search(r'- output \(n = \d+-\d+\): ', page)
    for metric in ('generative', 'input', 'high', 'low', 'gap', r'names\_word', r'names\_other'): assert f'- {metric} (n = ' in page


def test_n_is_a_range_where_stages_differ():
    rows = [('a', f, 'input', 1.) for f in range(3)] + [('b', f, 'input', 1.) for f in range(4)] + [('a', 0, 'output', 1.), ('control', 0, 'output', 1.), ('control', 1, 'output', 1.)]
    assert measured(summary(pd.DataFrame(rows, columns=['stage', 'feature', 'metric', 'value']))) == {'input': '3-4', 'output': '1'}


@pytest.mark.parametrize('root, name, fields, says', [
    ('runs', 'smollm2-135m-demo', {}, 'saeexplainer run smollm2-135m --size demo'),
    ('runs', 'demo', {}, 'saeexplainer run smollm2-135m --size demo --name demo'),
    ('else where', 'demo', {}, "saeexplainer run smollm2-135m --size demo --name demo --root 'else where'"),
    ('runs', 'demo', dict(seed=3), 'saeexplainer run runs/demo/preset.yaml --name demo')])
def test_the_command_of_a_run_is_the_one_that_made_it(root, name, fields, says):
    assert command_of(SimpleNamespace(preset=load_preset('smollm2-135m', **fields), folder=Path(root)/name)) == says


@pytest.mark.parametrize('file, text, says', [
    ('provenance.json', '{"preset": 1', 'is not JSON'), ('provenance.json', '[1]', 'not an object'), ('provenance.json', '{}', 'lacks preset'), ('examples.json', '{}', 'not a list'),
    ('metrics.parquet', 'PAR1', 'is not a Parquet file')])
def test_damaged_results_are_named(folder, file, text, says):
    (folder/file).write_text(text)
    with pytest.raises(ValueError, match=says) as e: write_report(folder)
    assert file in str(e.value) and '\n' not in str(e.value)


def test_other_tables_are_listed(tmp_path):
    with pytest.raises(ValueError, match='holds no results'): Results(tmp_path)


def rewrite(file, change): change(pd.read_parquet(file)).to_parquet(file)


def says_one_line(read, file): # what is said of it
    with pytest.raises((ValueError, FileNotFoundError)) as e: read()
    assert str(file) in str(e.value) and '\n' not in str(e.value)
    return str(e.value)


READ = {'metrics': 'stage feature metric value', 'explanations': 'stage feature k text', 'steering': 'control', 'arms': 'arm stage feature metric value', 'second_writer': 'stage feature metric value',
        'screening': 'variant feature k text score'}

@pytest.mark.parametrize('name', READ)
def test_tables_that_a_page_cannot_be_made_of_are_named(folder, name):
    file = folder/f'{name}.parquet'
    whole, kept = file.read_bytes(), pd.read_parquet(file)
    texts = {column for column in READ[name].split() if not pd.api.types.is_numeric_dtype(kept[column])}
    def said(change):
        file.write_bytes(whole)
        rewrite(file, change)
        return says_one_line(lambda: Results(folder)[name], file)
    for column in READ[name].split():
        assert f'lacks {column} (its columns: ' in said(lambda t: t.drop(columns=column))
        assert f'its column {column} ' in said(lambda t: t.assign(**{column: [[1]]*len(t)}))
        other = range(len(kept)) if column in texts else kept[column].astype(str) + 'x'
        assert f'its column {column} ' in said(lambda t: t.assign(**{column: other})) and 'writes it anew' in said(lambda t: t.assign(**{column: other}))
        if column not in ('value', 'text', 'score', 'control'): assert f'its column {column} is empty' in said(lambda t: t.assign(**{column: [None, *kept[column][1:]]}))
    if name != 'steering': assert ' has two rows of ' in said(lambda t: pd.concat([t, t[:1]]))
    file.write_bytes(whole)
    rewrite(file, lambda t: t.set_index(READ[name].split()[0])) # as pandas keeps an index
    assert set(Results(folder)[name].columns) == set(kept.columns)


def test_metrics_of_no_stage_are_no_page(folder):
    rewrite(folder/'metrics.parquet', lambda t: t[:0])
    assert 'has no row of label' in says_one_line(lambda: write_report(folder), folder/'metrics.parquet')
    rewrite(folder/'screening.parquet', lambda t: t[t['variant'] != 'sft'])
    shutil.copy(data_dir()/'smollm2-135m'/'results'/'metrics.parquet', folder)
    for other in ('arms', 'second_writer'): (folder/f'{other}.parquet').unlink()
    assert 'has no row of the variant sft' in says_one_line(lambda: studies(Results(folder)), folder/'screening.parquet')
    assert comparisons(['label']) == comparisons([]) == []


@pytest.mark.parametrize('fields', [dict(preset=1), dict(evaluated=[]), dict(evaluated='sft'), dict(evaluated=[1]), dict(notes={}), dict(writers=[]), dict(writers={'m': []}), dict(writers={'m': {'s': {}}}),
                                    dict(writers={'m': {'s': dict(outcomes={'ok': 'x'}, attempts={}, prompt_tokens=0, completion_tokens=0, cost=0.)}}), dict(sittings=[1]), dict(sittings={'sft': 'x'})])
def test_an_odd_record_is_named(folder, fields):
    change(folder/'provenance.json', **fields)
    assert 'writes it anew' in says_one_line(lambda: Results(folder).check(), folder/'provenance.json')


CASE = dict(feature='m/s/1', accuracy={'sft': .5}, texts={'sft': dict(pieces=[['a', True]], score=1.)}, max_act=2., sft='x')

@pytest.mark.parametrize('case', [None, 1, 'x', [], {}, *({k: v for k, v in CASE.items() if k != name} for name in CASE if name != 'sft'), CASE | dict(feature=1), CASE | dict(accuracy=[]), CASE | dict(accuracy={'sft': 'x'}),
                                  CASE | dict(max_act='x'), CASE | dict(texts=[]), CASE | dict(texts={'sft': 1}), CASE | dict(texts={'sft': dict(pieces=[1], score=1.)}), CASE | dict(texts={'sft': dict(pieces=[], score='x')})])
def test_examples_that_cannot_be_shown_are_named(tmp_path, case):
    file = tmp_path/'examples.json'
    assert 'is missing' in says_one_line(lambda: read_cases(tmp_path), file)
    file.write_text(json.dumps([CASE]))
    assert read_cases(tmp_path) == [CASE]
    file.write_text(json.dumps([CASE, case]))
    assert ', example 2: ' in says_one_line(lambda: read_cases(tmp_path), file)


def test_p_is_shown_with_three_decimals():
    page = (data_dir()/'smollm2-135m'/'results'/'report.md').read_text().split('## Screening')[1]
    header, _, *rows = [line.strip('| ').split(' | ') for line in page.split('##')[0].strip().splitlines()]
    at = [i for i, name in enumerate(header[-len(rows[0]) + 1:], 1) if name.endswith(' p')]
    assert at and all(re.fullmatch(r'-|&lt; 0\.001|[01]\.\d{3}', row[i]) for row in rows for i in at)
