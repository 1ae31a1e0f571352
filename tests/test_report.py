"The page of a run: it opens by itself, nothing of it is taken for markup, its numbers have their n and their chance"
import html
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from commands import parsed

from saeexplainer.document import document, paragraph
from saeexplainer.evaluation.tables import BEYOND, METRICS, summary
from saeexplainer.presets import data_dir, load_preset
from saeexplainer.report import MEANINGS, comparisons, measured, next_steps, studies, write_report
from saeexplainer.results import Results, command_of, read_cases
from saeexplainer.show import code_span, escape

HOSTILE = '<img src=x onerror=alert(1)>`|*_[a](javascript:b)$x^2$ {: onclick=c }</script><script>d()</script>'
ANEW = 'writes it anew'


def shipped(): return data_dir()/'smollm2-135m'/'results'


@pytest.fixture
def folder(tmp_path):
    "Results, to be changed"
    return Path(shutil.copytree(shipped(), tmp_path/'results'))


def without_studies(to):
    "A copy of the results without studies, whose tables take long"
    folder = Path(shutil.copytree(shipped(), to/'results'))
    for name in ('arms', 'second_writer', 'screening'): (folder/f'{name}.parquet').unlink()
    return folder


@pytest.fixture
def small(tmp_path): return without_studies(tmp_path)


def page_of(folder): return (write_report(folder)/'index.html').read_text()


@pytest.fixture(scope='module')
def shipped_page(tmp_path_factory):
    "The page of the recorded run"
    folder = Path(shutil.copytree(shipped(), tmp_path_factory.mktemp('shipped')/'results'))
    return page_of(folder)


def change(file, **fields): file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def text_of(page):
    "What a reader sees of a page, on one line"
    return ' '.join(html.unescape(re.sub('<[^>]*>', ' ', page)).split())


# ---- the page opens by itself

VOID = {'meta', 'br'} # elements that are not closed
FETCHED = {'src', 'srcset', 'poster', 'data', 'action', 'background', 'srcdoc'}


class Elements(HTMLParser):
    "Elements and attributes of a page, and those that were left open"
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.open = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID: self.open.append(tag)

    def handle_startendtag(self, tag, attrs): self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_one_file(shipped_page):
    found = Elements(shipped_page).found
    assert not [tag for tag, _ in found if tag in ('script', 'link', 'iframe', 'object', 'embed', 'img', 'base')]
    assert not [attrs for _, attrs in found if FETCHED & set(attrs)]
    links = [value for _, attrs in found for name, value in attrs.items() if name.endswith('href')]
    assert [link for link in links if not link.startswith('#')] == []
    assert not re.search(r'url\((?!#)|@import', shipped_page)


def test_the_page_runs_nothing(shipped_page):
    found = Elements(shipped_page).found
    assert not [name for _, attrs in found for name in attrs if name.startswith('on')]
    policy = next(attrs for tag, attrs in found if attrs.get('http-equiv') == 'Content-Security-Policy')
    assert policy['content'].startswith("default-src 'none'")


def test_every_element_is_closed(shipped_page):
    assert Elements(shipped_page).open == []


def test_the_page_has_its_figure_inside(shipped_page):
    assert shipped_page.count('<svg role="img"') == 1
    assert '>chance</text>' in shipped_page or '<!-- chance -->' in shipped_page
    assert shipped_page.count('<svg class="curve"') == 5 # losses of three trainings, margins of two


def test_the_links_of_a_page_lead_somewhere(shipped_page):
    found = Elements(shipped_page).found
    names = {attrs['id'] for _, attrs in found if 'id' in attrs}
    links = {attrs['href'].removeprefix('#') for tag, attrs in found if tag == 'a'}
    assert links == {'metrics', 'differences', 'stages', 'failures', 'features', 'next', 'provenance'}
    assert links <= names


def test_the_same_tables_give_the_same_page(small, shipped_page):
    page = page_of(small)
    assert [part for part in page.split('<section') if part not in shipped_page] == [] # it lacks the studies alone


# ---- nothing is markup

@pytest.fixture(scope='module')
def hostile_page(tmp_path_factory):
    "A page whose preset, notes, examples, explanations and texts are hostile"
    folder = without_studies(tmp_path_factory.mktemp('hostile'))
    change(folder/'provenance.json', preset=HOSTILE, size=HOSTILE, notes=[HOSTILE], source=HOSTILE, given=HOSTILE)
    case = json.loads((folder/'examples.json').read_text())[0]
    case |= {'feature': HOSTILE, HOSTILE: HOSTILE}
    case['texts'] = {HOSTILE: {'pieces': [[HOSTILE, True], [HOSTILE, False]], 'score': 1.}}
    (folder/'examples.json').write_text(json.dumps([case]))
    for name in ('explanations', 'texts', 'marked'):
        table = pd.read_parquet(folder/f'{name}.parquet')
        table.assign(text=HOSTILE).to_parquet(folder/f'{name}.parquet')
    return page_of(folder)


def test_nothing_of_a_model_or_a_preset_is_markup(hostile_page):
    elements = Elements(hostile_page)
    assert elements.open == []
    assert not {'img', 'script'} & {tag for tag, _ in elements.found}
    assert not [name for _, attrs in elements.found for name in attrs if name.startswith('on')]


def test_what_is_hostile_is_shown_all_the_same(hostile_page):
    for place in ('<h1>', '<h3>', '<mark>', '<td>'): assert f'{place}{escape(HOSTILE)}' in hostile_page
    assert hostile_page.count(escape(HOSTILE)) > 300 # explanations and texts of 300 features


def test_names_stay_code_where_they_can():
    assert code_span('smollm2-135m/9-res-4k/5') == '`smollm2-135m/9-res-4k/5`'
    assert '`' not in code_span('a`b').replace('\\`', '')


def test_a_document_escapes_its_title():
    page = document(HOSTILE, paragraph(HOSTILE))
    assert '<img' not in page
    assert page.count(escape(HOSTILE)) == 3 # in its head, above its text and in it


# ---- numbers, and the words that explain them

def test_every_metric_has_its_words_before_its_numbers(shipped_page):
    numbers = shipped_page.index('>The numbers<')
    for metric in METRICS: assert 0 < shipped_page.index(f'<code>{metric}</code>') < numbers
    assert set(MEANINGS) == {*METRICS, *BEYOND}


def test_every_method_has_its_words_before_its_numbers(shipped_page):
    numbers = shipped_page.index('>The numbers<')
    for stage in [*Results(shipped()).stages, 'control']:
        assert 0 < shipped_page.index(f'<code>{stage}</code></th><td>') < numbers


def metrics_rows(page):
    "Rows of the table of metrics: name -> cells"
    table = page.split('>The numbers<')[1].split('</table>')[0]
    rows = re.findall('<tr><th scope="row">(.*?)</th>(.*?)</tr>', table)
    return {name: re.findall('<td>(.*?)</td>', cells) for name, cells in rows}


def test_the_page_says_chance(shipped_page):
    "As it was measured with explanations of other features, or as it is known"
    rows = metrics_rows(shipped_page)
    assert rows['chance'][:3] == ['0.9<br>[0.8, 0.9]', '17.7<br>[16.9, 18.5]', '33.3']
    assert rows['chance'][6] == rows['dpo2'][7] # of names_word: names_other


def test_chance_that_was_not_measured_is_said_in_words(small):
    (small/'chance.parquet').unlink()
    rows = metrics_rows(page_of(small))
    assert rows['chance'][:3] == ['near 0', 'below 50', '33.3']


def test_the_page_says_n_and_intervals(shipped_page):
    table = shipped_page.split('>The numbers<')[1].split('</table>')[0]
    heads = re.findall(r'<th scope="col" title="[^"]+">(\w+)<br>n = ([\d-]+)</th>', table)
    assert dict(heads) == measured(summary(Results(shipped())['metrics']))
    assert metrics_rows(shipped_page)['dpo2'][0] == '37.2<br>[32.9, 41.3]'


def test_the_page_says_what_was_found_first(shipped_page):
    found = re.search('<p class="lead">(.*?)</p>', shipped_page)[1]
    assert '<code>dpo2</code>, 37.2% [32.9, 41.3]' in found
    assert '2.4% [1.1, 3.9] for <code>untrained</code>' in found


def test_n_is_a_range_where_stages_differ():
    rows = [('a', feature, 'input', 1.) for feature in range(3)]
    rows += [('b', feature, 'input', 1.) for feature in range(4)]
    rows += [('a', 0, 'output', 1.), ('control', 0, 'output', 1.), ('control', 1, 'output', 1.)]
    metrics = pd.DataFrame(rows, columns=['stage', 'feature', 'metric', 'value'])
    assert measured(summary(metrics)) == {'input': '3-4', 'output': '1'}


def test_the_page_says_what_each_stage_did(shipped_page):
    part = text_of(shipped_page.split('<section id="stages">')[1].split('</section>')[0])
    assert '300 to test, 2,350 for SFT' in part
    assert '979 pairs of 1200 features' in part
    assert 'round 1 1200 979 220 1' in part # features, pairs, and why the others gave none
    assert 'no explanation set it off enough' in part
    assert '42 min 6 s since its last start, of 2' in part


def test_failures_are_counted(small):
    metrics = pd.read_parquet(small/'metrics.parquet')
    is_lost = (metrics['metric'] == 'unparsed_generative') & (metrics['stage'] == 'sft')
    metrics.loc[is_lost, 'value'] = 2.
    metrics.to_parquet(small/'metrics.parquet')
    part = page_of(small).split('<section id="failures">')[1].split('</section>')[0]
    assert 'texts for <code>generative</code> that were not written' in part
    assert '<th scope="row">sft</th><td>7</td><td>600</td>' in part # strengths that were missed, then texts


def test_every_feature_is_there_with_its_marked_text(shipped_page):
    part = shipped_page.split('<section id="features">')[1].split('</section>')[0]
    assert part.count('<details>') == 300
    one = part.split('<b>smollm2-135m/9-res-4k/142</b>')[1].split('</details>')[0]
    assert one.count('<tr><th scope="row">') == 8 # methods
    assert 'insert a<mark> table</mark> with different content' in one


def test_texts_are_shown_where_nothing_says_which_words_fired(small):
    (small/'marked.parquet').unlink()
    page = page_of(small)
    one = page.split('<b>smollm2-135m/9-res-4k/142</b>')[1].split('</details>')[0]
    assert 'insert a table with different content' in one


def test_the_page_says_where_it_comes_from(shipped_page):
    part = text_of(shipped_page.split('<section id="provenance">')[1].split('</section>')[0])
    for fact in ('saeexplainer run smollm2-135m --size full', '41374af23bb6', 'torch 2.13.0+cpu', 'seed 0',
                 'dpo1 1424.4'):
        assert fact in part


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
    table = page.split('<summary>Screening</summary>')[1].split('</table>')[0]
    head, body = table.split('</thead>')
    columns = [i for i, name in enumerate(re.findall('<th scope="col">(.*?)</th>', head)) if name.endswith(' p')]
    rows = [re.findall('<td>(.*?)</td>', row) for row in body.split('</tr>') if '<td>' in row]
    return [[row[i] for i in columns] for row in rows]


def test_p_is_shown_with_three_decimals(shipped_page):
    cells = [cell for row in p_values(shipped_page) for cell in row]
    assert cells
    assert [cell for cell in cells if not re.fullmatch(r'-|&lt; 0\.001|[01]\.\d{3}', cell)] == []


# ---- what next

OF_A_RUN = dict(run='runs/a b', called='runs/a b/preset.yaml', explainers=['sft', 'dpo1'])
OF_AN_EVALUATION = dict(run='runs/mine', called='smollm2-135m', given='saeexplainer evaluate mine.csv --size demo')


@pytest.mark.parametrize('made', [
    {},
    OF_A_RUN,
    OF_A_RUN | dict(run='/tmp/elsewhere/mine', called='smollm2-135m'),
    OF_AN_EVALUATION])
def test_every_command_of_a_page_is_one(folder, made):
    "test_run runs them"
    change(folder/'provenance.json', **made)
    steps = next_steps(Results(folder))
    commands = [line for step in steps if step.language == 'shell' for line in step.code.splitlines()]
    assert len(commands) >= 3
    for command in commands: parsed(shlex.split(command))
    for step in steps:
        if step.language == 'python': compile(step.code, step.what, 'exec')


def test_a_command_that_is_none_is_found():
    with pytest.raises(Exception, match='No such option'): parsed(['saeexplainer', 'report', 'demo', '--rot', 'runs'])
    with pytest.raises(KeyError): parsed(['saeexplainer', 'reports', 'demo'])


def test_what_comes_next_has_the_names_of_its_run(folder):
    change(folder/'provenance.json', **OF_A_RUN)
    codes = [step.code for step in next_steps(Results(folder))]
    assert codes[0].startswith('saeexplainer explain ')
    assert codes[0].endswith(" --explainer 'runs/a b/explainer/dpo1' --verify 10")
    assert "FeatureExplorer('runs/a b/preset.yaml', results='runs/a b/report'" in codes[2]
    assert "push_to_hub('OWNER/a-b-dpo1')" in codes[4]


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
    'marked': ['stage', 'feature', 'piece', 'text', 'lit', 'score'],
    'metrics': ['stage', 'feature', 'metric', 'value'],
    'explanations': ['stage', 'feature', 'k', 'text'],
    'steering': ['control'],
    'arms': ['arm', 'stage', 'feature', 'metric', 'value'],
    'second_writer': ['stage', 'feature', 'metric', 'value'],
    'screening': ['variant', 'feature', 'k', 'text', 'score']}
COLUMNS = [(name, column) for name, columns in READ.items() for column in columns]
MAY_BE_EMPTY = ('value', 'text', 'score', 'control', 'lit')


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
