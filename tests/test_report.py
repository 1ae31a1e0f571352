"The page of a run: nothing of it is taken for markup, its numbers have their n and their chance, and what is damaged is named"
import json, re, shutil
from pathlib import Path
from types import SimpleNamespace
import pandas as pd
import pytest
from saeexplainer.evaluation.tables import summary
from saeexplainer.presets import data_dir, load_preset
from saeexplainer.report import measured, write_report
from saeexplainer.results import Results, command_of
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
