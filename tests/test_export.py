"Explanations that leave: Neuronpedia's files, tables, data sets of the hub, and what is refused"
import gzip, io, json, re, threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import pandas as pd
import pytest
import requests
import yaml
from hub_server import Hub, send_json
from neuronpedia_server import Neuronpedia, stats
from saeexplainer.cards import code_span, model_card
from saeexplainer.cli import main
from saeexplainer.explanation_files import read_explanations
from saeexplainer.explainer import ExplainerCard
from saeexplainer.export import (
    BATCH, LONGEST, Exported, dataset_card, export, find, last_explainer, neuronpedia_rows, of_file, of_run,
    push_dataset, with_texts, write_dataset, write_file, write_neuronpedia,
)
from saeexplainer.files import read_table
from saeexplainer.presets import data_dir, load_preset
from saeexplainer.sources.neuronpedia import neuronpedia_export
from saeexplainer.store import RunStore

SHIPPED = data_dir()/'smollm2-135m'
ODD = ['a "quoted", text', 'two\nlines', '=1+1', 'ünï — 日本 🙂', "it's <b>bold</b> | `code`", 'ends here ']


def explained(texts, source='m/3-s', start=0):
    names = [f'{source}/{start + i}' for i in range(len(texts))]
    table = pd.DataFrame({'feature': names, 'explanation': texts}, dtype=object)
    return Exported(with_texts(table), 'mine', 'mine')


def by_feature(table):
    return dict(zip(table['feature'], table['explanation']))


# ---- Neuronpedia

class ImportServer:
    "What an instance of Neuronpedia takes: columns of its table of explanations, in files as its export has them"
    TEXTS = ('id', 'modelId', 'layer', 'index', 'authorId', 'description', 'explanationModelName')

    def __init__(self): self.rows = []

    def __enter__(self):
        owner = self
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_POST(self):
                body = self.rfile.read(int(self.headers['Content-Length']))
                send_json(self, dict(error=owner.why_not(self.path, body)))
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def why_not(self, path, body): # None: the file was taken
        found = re.fullmatch(r'/v1/([^/]+)/([^/]+)/explanations/batch-[0-9]+\.jsonl\.gz', path)
        if not found: return f'no such path: {path}'
        rows = [json.loads(line) for line in gzip.decompress(body).decode().splitlines()]
        if not 0 < len(rows) <= 1024: return f'{len(rows)} rows'
        indices = [row['index'] for row in rows]
        if indices != sorted(indices): return 'not in the order of the index as text'
        for row in rows:
            wrong = self.why_no_row(row, found[1], found[2])
            if wrong: return wrong
        self.rows += rows
        return None

    def why_no_row(self, row, model, layer):
        if set(row) != {*self.TEXTS, 'typeName'}: return f'columns {sorted(row)}'
        if not all(isinstance(row[name], str) and row[name] for name in self.TEXTS): return f'not a text: {row}'
        if not isinstance(row['typeName'], str | None): return 'typeName'
        if (row['modelId'], row['layer']) != (model, layer): return 'of another source than its path'
        if not row['index'].isdecimal(): return f"index {row['index']}"
        if not re.fullmatch('c[0-9a-z]{24}', row['id']): return f"id {row['id']}"
        if len(row['description'].encode()) > 20_000: return 'a text that is too long'
        if '\0' in row['description']: return 'a zero byte'
        return None


def test_an_instance_takes_every_batch(tmp_path):
    exported = explained([f'feature {i}' for i in range(2*BATCH + 5)])
    files = write_neuronpedia(exported, tmp_path)
    with ImportServer() as server:
        for file in files:
            url = f'{server.url}/v1/{file.relative_to(tmp_path)}'
            assert requests.post(url, data=file.read_bytes()).json() == dict(error=None)
    assert [file.name for file in files] == ['batch-0.jsonl.gz', 'batch-1.jsonl.gz', 'batch-2.jsonl.gz']
    assert len({row['id'] for row in server.rows}) == len(exported.table)


def test_an_instance_takes_what_the_shipped_explainer_says(tmp_path):
    [file] = write_neuronpedia(of_run(SHIPPED/'results'), tmp_path)
    with ImportServer() as server:
        url = f'{server.url}/v1/{file.relative_to(tmp_path)}'
        assert requests.post(url, data=file.read_bytes()).json() == dict(error=None)
    assert {row['typeName'] for row in server.rows} == {'saeexplainer'}
    assert {row['explanationModelName'] for row in server.rows} == {'smollm2-135m-instruct-dpo2'}


def test_batches_are_read_back_as_they_were(tmp_path):
    exported = explained(ODD*400)
    back = pd.concat([read_explanations(file) for file in write_neuronpedia(exported, tmp_path)])
    assert by_feature(back) == by_feature(exported.table)


def test_batches_are_read_back_as_a_source_of_neuronpedia(tmp_path):
    exported = explained(ODD)
    [file] = write_neuronpedia(exported, tmp_path/'out')
    key = f"v1/{file.relative_to(tmp_path/'out')}"
    features = {'v1/m/3-s/features/batch-0.jsonl.gz': [stats(i) for i in range(len(ODD))]}
    labels = {key: gzip.decompress(file.read_bytes()).decode().splitlines()}
    with Neuronpedia(labels | features) as server:
        made = neuronpedia_export('m', '3-s', folder=tmp_path/'in', store=server.url, n_contexts=0)
    rows = read_table(made.file).to_pylist()
    assert {f"m/3-s/{row['index']}": row['explanation'] for row in rows} == by_feature(exported.table)
    assert made.bad_rows == 0
    assert made.default == 'mine'


def test_the_same_explanations_have_the_same_bytes(tmp_path):
    exported = explained(ODD)
    [first] = write_neuronpedia(exported, tmp_path/'first')
    [second] = write_neuronpedia(exported, tmp_path/'second')
    assert first.read_bytes() == second.read_bytes()


def test_each_source_has_its_own_folder(tmp_path):
    both = pd.concat([explained(['a']).table, explained(['b'], 'm/4-s').table])
    files = write_neuronpedia(Exported(both, 'both', 'both'), tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        'm/3-s/explanations/batch-0.jsonl.gz', 'm/4-s/explanations/batch-0.jsonl.gz']


def test_batches_of_another_export_are_not_mixed_in(tmp_path):
    write_neuronpedia(explained(['a']*(BATCH + 1)), tmp_path)
    with pytest.raises(ValueError, match='batch-1.jsonl.gz is of another export: remove it'):
        write_neuronpedia(explained(['a']), tmp_path)


def test_a_text_that_is_too_long_is_refused(tmp_path):
    neuronpedia_rows(explained(['é'*(LONGEST//2)]))
    with pytest.raises(ValueError, match='explanation of m/3-s/0 has 20,002 bytes: Neuronpedia takes up to 20,000'):
        write_neuronpedia(explained(['é'*(LONGEST//2 + 1)]), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- tables and files

@pytest.mark.parametrize('suffix', ['.csv', '.parquet'])
def test_a_table_is_read_back_as_it_was(tmp_path, suffix):
    exported = explained(ODD)
    assert by_feature(read_explanations(write_file(exported, tmp_path/f'all{suffix}'))) == by_feature(exported.table)


def test_what_cannot_be_stored_leaves_the_text():
    table = explained(['half \ud83d', 'zero \0byte', ' \n', None, float('nan'), 'nan']).table
    assert table['explanation'].tolist() == ['half ?', 'zero byte']


def test_features_stand_in_the_order_of_their_numbers():
    assert explained(['a', 'b', 'c'], start=9).table['feature'].tolist() == ['m/3-s/9', 'm/3-s/10', 'm/3-s/11']


def test_a_file_must_say_whose_features_it_explains(tmp_path):
    (tmp_path/'mine.csv').write_text('feature,explanation\nm/3-s/5,a\n7,b\n')
    with pytest.raises(ValueError, match='names features by index alone, such as 7: give the preset'):
        of_file(tmp_path/'mine.csv')
    assert by_feature(of_file(tmp_path/'mine.csv', 'm/3-s').table) == {'m/3-s/5': 'a', 'm/3-s/7': 'b'}


def test_a_file_without_a_text_is_refused(tmp_path):
    (tmp_path/'mine.csv').write_text('feature,explanation\nm/3-s/5,\n')
    with pytest.raises(ValueError, match='holds no explanation: none of its 1 rows has a text'):
        of_file(tmp_path/'mine.csv')


# ---- runs

STAGES = {'label': 'a label', 'round1': 'a candidate', 'sft': 'early', 'dpo1': 'late'}

@pytest.fixture
def run(tmp_path): # a run of two features, whose second has no text at its last stage
    folder = tmp_path/'demo'
    with RunStore(folder/'store.sqlite') as store:
        store.put_explanations([(stage, 5, 0, text) for stage, text in STAGES.items()])
        store.put_explanations([('round1', 5, 1, 'another candidate'), ('dpo1', 7, 0, '')])
        store.put_metrics([('dpo1', 5, 'generative', .75), ('dpo1', 7, 'generative', .25), ('sft', 5, 'input', 1.)])
        store.note('begun with sae', dict(sha256='ab'*32))
    preset = load_preset('smollm2-135m', size='demo', dpo_rounds=1)
    (folder/'preset.yaml').write_text(preset.to_yaml())
    return folder


def test_the_last_explainer_of_a_run_speaks(run):
    exported = of_run(run)
    assert exported.method == 'dpo1'
    assert exported.left_out == 1
    assert exported.made['sae_sha256'] == 'ab'*32
    assert exported.table.to_dict('records') == [
        dict(feature='smollm2-135m/9-res-4k/5', explanation='late', generative=.75)]


def test_another_stage_of_a_run(run):
    exported = of_run(run, 'sft')
    assert by_feature(exported.table) == {'smollm2-135m/9-res-4k/5': 'early'}
    assert list(exported.table.columns) == ['feature', 'explanation', 'input']


def test_labels_are_not_said_to_be_an_explainers(run):
    exported = of_run(run, 'label')
    assert exported.made['explainer'] is None
    assert neuronpedia_rows(exported)[0]['typeName'] is None
    assert neuronpedia_rows(exported)[0]['explanationModelName'] == 'label'


def test_a_stage_that_a_run_does_not_have(run):
    with pytest.raises(ValueError, match='demo has no explanations of dpo2: it has '): of_run(run, 'dpo2')


def test_candidates_alone_are_no_explanations(tmp_path):
    with RunStore(tmp_path/'store.sqlite') as store: store.put_explanations([('round1', 5, 0, 'a candidate')])
    (tmp_path/'preset.yaml').write_text(load_preset('smollm2-135m', size='demo').to_yaml())
    with pytest.raises(ValueError, match='has no explanations of an explainer: it has round1'): of_run(tmp_path)


def test_the_last_of_many_rounds():
    assert last_explainer(['dpo9', 'sft', 'dpo10', 'best']) == 'dpo10'
    assert last_explainer(['untrained', 'sft', 'best']) == 'sft'


def test_the_shipped_run_has_its_metrics():
    exported = of_run(SHIPPED/'results')
    published = pd.read_csv(SHIPPED/'results'/'summary.csv', index_col=['stage', 'metric'])
    assert exported.means.loc[('dpo2', 'generative'), 'mean'] == published.loc[('dpo2', 'generative'), 'mean']
    assert exported.table['generative'].mean() == pytest.approx(published.loc[('dpo2', 'generative'), 'mean'])


def test_what_is_meant_by_a_name(run, tmp_path):
    assert find('demo', tmp_path).name == 'demo'
    assert find(str(run), tmp_path/'elsewhere').name == 'demo'
    with pytest.raises(ValueError, match='is a run and knows its preset'): find('demo', tmp_path, source='m/3-s')
    with pytest.raises(ValueError, match='there is no run .*nobody, and no file or results nobody'):
        find('nobody', tmp_path)
    (tmp_path/'mine.csv').write_text('feature,explanation\nm/3-s/5,a\n')
    with pytest.raises(ValueError, match='is a file, which has no stages'):
        find(str(tmp_path/'mine.csv'), tmp_path, stage='dpo1')


# ---- the hub

def header_of(readme):
    _, header, text = readme.split('---\n', 2)
    return yaml.safe_load(header), text


def test_a_data_set_is_loaded_by_datasets(tmp_path):
    from datasets import load_dataset
    exported = of_run(SHIPPED/'results')
    write_dataset(exported, tmp_path/'set', 'me/mine')
    rows = load_dataset(str(tmp_path/'set'), split='train', cache_dir=str(tmp_path/'cache'))
    assert rows['explanation'][:] == exported.table['explanation'].tolist()
    assert 'generative' in rows.column_names


def test_the_card_of_a_data_set():
    header, text = header_of(dataset_card(of_run(SHIPPED/'results'), 'me/mine'))
    sae = json.loads((SHIPPED/'results'/'provenance.json').read_text())['sae_sha256']
    assert header['license'] == 'apache-2.0'
    assert header['saeexplainer']['sae_sha256'] == sae
    assert header['saeexplainer']['base_model'] == 'HuggingFaceTB/SmolLM2-135M-Instruct'
    assert sae in text
    assert "load_dataset('me/mine', split='train')" in text
    assert re.search(r'\| generative \| [0-9.]+ \[[0-9.]+, [0-9.]+\] \| 300 \|', text)


def test_a_card_without_a_run_names_no_licence_that_it_does_not_know():
    header, text = header_of(dataset_card(explained(['a']), 'me/mine'))
    assert header['license'] == 'other'
    assert 'None were measured' in text
    assert header_of(dataset_card(explained(['a']), 'me/mine', 'mit'))[0]['license'] == 'mit'


def test_names_of_others_do_not_leave_their_place_in_a_card():
    assert code_span('a`b|c\n# head') == "`a'b¦c # head`"


def test_folders_of_this_machine_are_not_named_in_a_card(tmp_path):
    made = dict(explainer=f'{tmp_path}/model', sae=f'{tmp_path}/sae', target=f'{tmp_path}/model')
    card = dataset_card(replace(explained(['a']), made=made), 'me/mine')
    assert str(tmp_path) not in card
    assert '| SAE | `sae` |' in card


def test_a_data_set_is_pushed(monkeypatch):
    exported = explained(ODD)
    with Hub(monkeypatch) as hub: url = push_dataset(exported, 'me/mine', private=True)
    assert hub.created == dict(type='dataset', name='mine', organization='me')
    assert sorted(hub.files) == ['README.md', 'explanations.parquet']
    assert by_feature(pd.read_parquet(io.BytesIO(hub.files['explanations.parquet']))) == by_feature(exported.table)
    assert url.startswith('http')


def test_a_name_that_is_none_reaches_no_server():
    with pytest.raises(ValueError, match="--repo must be owner/name, not 'mine'"):
        push_dataset(explained(['a']), 'mine')


def test_the_card_of_the_shipped_explainer():
    adapter = SHIPPED/'explainer'/'dpo2'
    card = ExplainerCard.load(adapter)
    header, text = header_of(model_card(card, 'me/mine', adapter))
    assert header['base_model'] == 'HuggingFaceTB/SmolLM2-135M-Instruct'
    assert header['license'] == 'apache-2.0'
    assert card.sae_sha256 in text
    assert '| pairs of a preferred and a rejected explanation | `1057` |' in text
    assert re.search(r'\| generative \| [0-9.]+ \[[0-9.]+, [0-9.]+\] \| 300 \|', text)


def test_the_card_of_an_explainer_with_hints_asks_with_encoders():
    card = ExplainerCard.load(SHIPPED/'explainer'/'hinted')
    _, text = header_of(model_card(card, 'me/mine'))
    assert 'explainer.explain(directions, encoders=encoders)' in text
    assert f'| words near the direction in its prompt | `{card.n_hints}` |' in text
    assert card.dictionary_sha256 in text
    _, without = header_of(model_card(ExplainerCard.load(SHIPPED/'explainer'/'dpo2'), 'me/mine'))
    assert 'explainer.explain(directions) #' in without
    assert 'dictionary' not in without


def test_the_card_of_an_adapter_alone():
    _, text = header_of(model_card(ExplainerCard.load(SHIPPED/'explainer'/'dpo2'), 'me/mine'))
    assert 'No record of its training lies beside it' in text
    assert 'None were measured' in text


# ---- the command

def test_export_by_the_command(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(['export', 'demo', '--to', 'csv', '--root', str(tmp_path), '--json'])
    assert json.loads(capsys.readouterr().out) == dict(explanations=1, left_out=1, written=['demo-dpo1.csv'])
    assert by_feature(read_explanations('demo-dpo1.csv')) == {'smollm2-135m/9-res-4k/5': 'late'}


def test_a_data_set_by_the_command(run, tmp_path, monkeypatch):
    with Hub(monkeypatch) as hub: main(['export', str(run), '--to', 'hub', '--repo', 'me/mine', '--license', 'mit'])
    assert header_of(hub.files['README.md'].decode())[0]['license'] == 'mit'


@pytest.mark.parametrize('args, says', [
    (['--to', 'xml'], "--to must be neuronpedia, csv, parquet or hub, not 'xml'"),
    (['--to', 'csv', '--repo', 'me/mine'], '--repo, --private and --license go with --to hub'),
    (['--to', 'csv', '--out', 'a.parquet'], '--to csv needs an --out that ends in .csv, not a.parquet'),
    (['--to', 'hub', '--private'], '--private needs --repo, and no --out'),
    (['--to', 'hub', '--repo', 'a/b/c'], "--repo must be owner/name, not 'a/b/c'"),
    (['--to', 'csv', '--stage', 'dpo7'], 'has no explanations of dpo7: it has '),
    (['--to', 'csv', '--preset', 'smollm2-135m'], 'is a run and knows its preset')])
def test_one_line_for_what_cannot_be_exported(run, tmp_path, monkeypatch, capsys, args, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended: main(['export', str(run), *args])
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert len(lines) == 1
    assert says in lines[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ['demo']


def test_an_export_does_not_write_over_its_file(tmp_path):
    (tmp_path/'mine.csv').write_text('feature,explanation\nm/3-s/5,a\n')
    with pytest.raises(ValueError, match='is what is exported: choose another --out'):
        export(of_file(tmp_path/'mine.csv'), 'csv', tmp_path/'mine.csv')
