"saeexplainer.dictionaries: whole dictionaries and lone directions, killed half-way, and files that cannot be read"
import json, os, signal, subprocess, sys, time
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import save_file
from helpers import tiny_sae
from test_run import make_preset
from saeexplainer.cli import main
from saeexplainer.dictionaries import Rows, explain_dictionary, read_directions, read_explanations
from saeexplainer.explainer import Explainer, ExplainerCard, save_adapter
from saeexplainer.lm.models import load_model
from saeexplainer.presets import load_preset
from saeexplainer.saes import FeatureReader


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A tiny preset, its SAE with two dead features, and an explainer with a random adapter"
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    folder = tmp_path_factory.mktemp('dictionaries')
    os.environ['SAEEXPLAINER_DATA'] = str(folder/'data')
    file = make_preset(folder)
    weights = load_file(sae := folder/'data'/'tiny'/'sae'/'sae_weights.safetensors')
    weights['W_dec'][[7, 33]] = 0
    save_file(weights, sae)
    preset = load_preset(file)
    torch.manual_seed(0)
    tuned = get_peft_model(load_model(preset.explainer, device='cpu')[0], LoraConfig(r=4, target_modules='all-linear', task_type='CAUSAL_LM', init_lora_weights=False))
    save_adapter(tuned, ExplainerCard.from_preset(preset, FeatureReader.load(preset), 'sft'), folder/'sft')
    yield folder, file, preset
    del os.environ['SAEEXPLAINER_DATA']


def test_every_feature_has_a_row(world, tmp_path):
    folder, _, preset = world
    done = explain_dictionary(preset, folder/'sft', tmp_path/'all.jsonl', progress=False)
    rows = [json.loads(line) for line in (tmp_path/'all.jsonl').read_text().splitlines()]
    assert [r['index'] for r in rows] == list(range(40)) and [r['feature'] for r in rows][:2] == ['tiny/1-res/0', 'tiny/1-res/1']
    assert [r['index'] for r in rows if r['error'] == 'no direction: a dead feature'] == [7, 33] and done['dead'] == 2
    assert done['explained'] + done['dead'] + done['empty'] == done['features'] == 40
    reader = FeatureReader.load(preset)
    one = Explainer.from_pretrained(folder/'sft', reader, device='cpu').explain(reader.directions([3]), max_new_tokens=preset.explanation_tokens)[0]
    assert (rows[3]['explanation'] or '') == one and not list(tmp_path.glob('*.part'))
    read = read_explanations(tmp_path/'all.jsonl')
    assert read['explanation'].isna().sum() == done['dead'] + done['empty'] and read['feature'][5] == 'tiny/1-res/5'
    with pytest.raises(ValueError, match='all.jsonl exists: remove it, or choose another --out'): explain_dictionary(preset, folder/'sft', tmp_path/'all.jsonl')


def test_verified_scores_are_those_of_the_target(world, tmp_path):
    from saeexplainer.target import Target
    folder, _, preset = world
    explain_dictionary(preset, folder/'sft', tmp_path/'all.parquet', n=2, progress=False)
    table, target = pd.read_parquet(tmp_path/'all.parquet').set_index('index'), Target.load(preset)
    said = table[table['explanation'].notna()]
    assert len(said) and said['scores'].map(len).eq(2).all() and table.loc[[7, 33], 'scores'].isna().all()
    for index, row in said.iterrows():
        wanted = [np.nan if t is None else target.max_acts([t], index)[0] for t in row['texts']]
        np.testing.assert_allclose(np.array(row['scores'], float), wanted, atol=1e-3)
        np.testing.assert_allclose(row['score'], np.nanmean(wanted) if not np.isnan(wanted).all() else np.nan, atol=1e-3)
        assert row['reached'] == sum(w > .5*row['max_act'] for w in wanted)


def test_killed_in_both_passes(world, tmp_path, monkeypatch):
    folder, file, preset = world
    explain_dictionary(preset, folder/'sft', tmp_path/'whole.jsonl', n=2, progress=False)
    out = tmp_path/'killed.jsonl'
    command = [sys.executable, '-c', 'from saeexplainer.cli import main; main()', 'explain', str(file), '--all', '--out', str(out), '--verify', '2', '--explainer', str(folder/'sft')]
    for part in ('explained', 'verified'):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        lines = lambda: (p.read_bytes().count(b'\n') if (p := tmp_path/f'killed.jsonl.{part}.part').exists() else 0)
        while process.poll() is None and lines() < 5: time.sleep(.005)
        process.send_signal(signal.SIGKILL); process.wait()
        assert process.returncode == -signal.SIGKILL and not out.exists()
    done = subprocess.run([*command, '--json'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)['features'] == 40 and out.read_text() == (tmp_path/'whole.jsonl').read_text()


def test_other_settings_are_refused(world, tmp_path):
    folder, _, preset = world
    rows = Rows(tmp_path/'all.jsonl.explained.part', dict(preset='tiny', source='tiny/1-res', sae_sha256='abc', explainer='x')); rows.close()
    with pytest.raises(ValueError, match=r"explained.part was begun with sae_sha256 'abc', not .*: remove it, or choose another --out"):
        explain_dictionary(preset, folder/'sft', tmp_path/'all.jsonl')
    with pytest.raises(ValueError, match=r"--out must end in .jsonl or .parquet, not 'all.txt'"): explain_dictionary(preset, folder/'sft', tmp_path/'all.txt')


def test_verified_rows_of_other_settings_are_refused(world, tmp_path):
    "Everything that texts and scores depend on; what an earlier version did not write down is taken as it is"
    from dataclasses import replace
    from saeexplainer.dictionaries import _explained_with, _verified_with
    folder, _, preset = world
    reader = FeatureReader.load(preset)
    said, known = _explained_with(preset, folder/'sft', reader), {1: 2.}
    Rows(tmp_path/'x.part', said | _verified_with(preset, 2, known)).close()
    for field, value in dict(text_temperature=5., text_tokens=2, text_top_p=.5, success=.9, dtype='bfloat16', target='other', text_form='list', seed=1, evaluation_writer='local:x', sae_bos=False).items():
        with pytest.raises(ValueError, match='x.part was begun with .*: remove it, or choose another --out'): Rows(tmp_path/'x.part', said | _verified_with(replace(preset, **{field: value}), 2, known))
    for n, acts in ((3, known), (2, {1: 3.})):
        with pytest.raises(ValueError, match='was begun with (n|max_acts)'): Rows(tmp_path/'x.part', said | _verified_with(preset, n, acts))
    Rows(tmp_path/'x.part', said | _verified_with(replace(preset, batch_size=1, n_sft=9, writer_url='http://x/v1'), 2, known)).close() # nothing that a row depends on
    bare = _explained_with(preset, 'untrained', reader)
    assert bare['adapter_sha256'] is None and _explained_with(replace(preset, template='Feature {placeholder}?'), 'untrained', reader) != bare
    Rows(tmp_path/'old.part', dict(preset='tiny')).close()
    Rows(tmp_path/'old.part', said).close()
    (tmp_path/'x.part').write_text('{"sett\n')
    with pytest.raises(ValueError, match='x.part does not say what it is part of'): Rows(tmp_path/'x.part', said)


def cut(file, rows): # as if the work had been killed after so many
    file.write_bytes(b''.join(file.read_bytes().splitlines(True)[:rows + 1]))


def begun(world, tmp_path, monkeypatch, **fields): # (preset whose models and explainer lie in tmp_path, explainer, a function that writes all.jsonl); its parts are kept
    "A dictionary whose parts hold five rows each"
    import shutil
    from dataclasses import replace
    from saeexplainer import dictionaries
    folder, _, preset = world
    model = shutil.copytree(folder/'model', tmp_path/'model')
    explainer = shutil.copytree(folder/'sft', tmp_path/'sft')
    card = ExplainerCard.load(explainer)
    replace(card, base_model=str(model)).save(explainer)
    preset = replace(preset, target=str(model), explainer=str(model), **fields)
    make = lambda preset=preset: explain_dictionary(preset, explainer, tmp_path/'all.jsonl', n=2, progress=False)
    with monkeypatch.context() as m:
        m.setattr(dictionaries, '_finish', lambda out, parts: None)
        make()
    for part in ('explained', 'verified'): cut(tmp_path/f'all.jsonl.{part}.part', 5)
    return preset, explainer, make


def nudge(folder): # other weights under the same name
    from safetensors.torch import load_file
    weights = load_file(folder/'model.safetensors')
    save_file({name: tensor*1.01 for name, tensor in weights.items()}, folder/'model.safetensors', metadata={'format': 'pt'})


def test_other_weights_do_not_go_on_with_the_rows_of_the_old_ones(world, tmp_path, monkeypatch):
    import shutil
    from dataclasses import replace
    preset, explainer, make = begun(world, tmp_path, monkeypatch)
    nudge(tmp_path/'model')
    with pytest.raises(ValueError, match='explained.part was begun with base_sha256 .*: remove it, or choose another --out'): make()
    shutil.copytree(world[0]/'model', tmp_path/'model', dirs_exist_ok=True)
    for field, value in dict(placeholder='<s>', layer=0, coefficient=2., template='Feature {placeholder}?').items():
        card = ExplainerCard.load(explainer)
        replace(card, **{field: value}).save(explainer)
        with pytest.raises(ValueError, match=f'explained.part was begun with (injection_)?{field} '): make()
        card.save(explainer)
    assert make()['features'] == 40


def test_an_earlier_part_without_hashes_is_resumed(world, tmp_path, monkeypatch):
    preset, explainer, make = begun(world, tmp_path, monkeypatch)
    for part in ('explained', 'verified'):
        first, *rows = (tmp_path/f'all.jsonl.{part}.part').read_text().splitlines(True)
        old = {k: v for k, v in json.loads(first)['settings'].items() if not k.endswith('sha256') or k in ('sae_sha256', 'adapter_sha256')}
        (tmp_path/f'all.jsonl.{part}.part').write_text(json.dumps({'settings': old}) + '\n' + ''.join(rows))
    assert make()['features'] == 40


def test_the_weights_of_target_and_writer_are_part_of_the_verdicts(world, tmp_path, monkeypatch):
    "Also where every explanation is there already, and only texts and scores are left"
    import shutil
    from dataclasses import replace
    from saeexplainer.dictionaries import _verified_with
    folder, _, preset = world
    for name in ('target', 'other'): shutil.copytree(folder/'model', tmp_path/name)
    preset = replace(preset, target=str(tmp_path/'target'), evaluation_writer=f"local:{tmp_path/'other'}")
    before = _verified_with(preset, 2, {})
    for name, key in (('target', 'target_sha256'), ('other', 'writer_sha256')):
        nudge(tmp_path/name)
        after = _verified_with(preset, 2, {})
        assert {k for k in after if after[k] != before[k]} == {key}
        Rows(tmp_path/f'{name}.part', before).close()
        with pytest.raises(ValueError, match=f"{name}.part was begun with {key} '{before[key]}', not '{after[key]}': remove it"): Rows(tmp_path/f'{name}.part', after)
        before = after


def test_another_server_does_not_go_on_with_the_texts_of_the_first(world, tmp_path, monkeypatch):
    "By --base-url and by the environment; what was paid for is not taken for the other's"
    from dataclasses import replace
    from writer_server import Server, capable
    from saeexplainer.dictionaries import _paid_store
    from saeexplainer.replies import Reply, Request
    monkeypatch.setenv('OPENAI_API_KEY', 'any')
    with Server(capable) as first, Server(capable) as second:
        preset, _, make = begun(world, tmp_path, monkeypatch, evaluation_writer='small', writer_url=first.url)
        part, asked = tmp_path/'all.jsonl.verified.part', len(first.asked)
        other = replace(preset, writer_url=second.url)
        says = f"verified.part was begun with writer_url '{first.url}', not '{second.url}': remove it, or choose another --out"
        with pytest.raises(ValueError, match=says): make(other)
        monkeypatch.setenv('OPENAI_BASE_URL', second.url)
        with pytest.raises(ValueError, match=says): make(replace(preset, writer_url=None))
        kept = part.read_bytes()
        part.unlink()
        with _paid_store(tmp_path/'all.jsonl.writer.sqlite', preset) as store: store.put_replies([('key', Request('x'), Reply('y'))])
        with pytest.raises(ValueError, match=f'all.jsonl.writer.sqlite holds replies of a writer at {first.url}, not {second.url}: remove it, or choose another --out'): make(other)
        part.write_bytes(kept)
        monkeypatch.setenv('OPENAI_BASE_URL', first.url + '/')
        assert make(replace(preset, writer_url=None))['features'] == 40 and not second.asked and len(first.asked) > asked


def test_killed_between_the_file_and_its_parts(world, tmp_path, monkeypatch):
    folder, _, preset = world
    for kind in ('jsonl', 'parquet'):
        out, parts = tmp_path/f'all.{kind}', [tmp_path/f'all.{kind}.{part}.part' for part in ('explained', 'verified')]
        kept = {}
        unlink = type(out).unlink
        with monkeypatch.context() as m: # the parts as they are when the file is whole
            m.setattr(type(out), 'unlink', lambda self, missing_ok=False: kept.setdefault(self.name, self.read_bytes()) and False if self in parts else unlink(self, missing_ok))
            done = explain_dictionary(preset, folder/'sft', out, n=2, progress=False)
        assert out.exists() and all(part.exists() for part in parts)
        whole = out.read_bytes()
        with pytest.raises(ValueError, match='was begun with n 2, not 3'): explain_dictionary(preset, folder/'sft', out, n=3, progress=False)
        assert explain_dictionary(preset, folder/'sft', out, n=2, progress=False) == done and out.read_bytes() == whole and not list(tmp_path.glob('*.part'))
        with pytest.raises(ValueError, match='exists: remove it'): explain_dictionary(preset, folder/'sft', out, n=2, progress=False)
        parts[0].write_bytes(b''.join(kept[parts[0].name].splitlines(True)[:9])) # rows of another work, and the file is somebody else's
        with pytest.raises(ValueError, match='exists, and is not what .* is part of'): explain_dictionary(preset, folder/'sft', out, progress=False)
        assert parts[0].exists() and out.read_bytes() == whole
        parts[0].unlink()


def test_texts_that_were_not_made_reach_nothing_known(world):
    "No text is no miss"
    from saeexplainer.dictionaries import _verdict
    from saeexplainer.evaluation.texts import Verified
    preset = world[2]
    none = _verdict(Verified(3, [None, ''], np.array([np.nan, np.nan])), 2., preset)
    assert none['reached'] is None and none['score'] is None and none['unmade'] == 2
    assert _verdict(Verified(3, ['a', None], np.array([.5, np.nan])), 2., preset)['reached'] == 0


def test_two_processes_do_not_write_one_file(world, tmp_path):
    folder, file, preset = world
    settings = dict(a=1)
    rows = Rows(tmp_path/'all.jsonl.explained.part', settings)
    with pytest.raises(RuntimeError, match='another process is working on .*all.jsonl.explained.part: wait for it, or stop it'): explain_dictionary(preset, folder/'sft', tmp_path/'all.jsonl', progress=False)
    rows.close()
    Rows(tmp_path/'all.jsonl.explained.part', settings).close()


def test_directions_of_no_sae(world, tmp_path, capsys):
    folder, file, preset = world
    W = FeatureReader.load(preset).sae.W_dec
    save_file({'truth': W[3].clone(), 'probes': W[4:6].clone()}, tmp_path/'d.safetensors')
    main(['explain', str(file), '--direction', str(tmp_path/'d.safetensors'), '--explainer', str(folder/'sft'), '--json'])
    said = {r['direction']: r['explanation'] for r in json.loads(capsys.readouterr().out)}
    reader = FeatureReader.load(preset)
    wanted = Explainer.from_pretrained(folder/'sft', reader, device='cpu').explain(reader.directions([4, 5, 3]), max_new_tokens=preset.explanation_tokens)
    assert said == dict(zip(('probes[0]', 'probes[1]', 'truth'), wanted))
    save_file({'x': torch.ones(3)}, tmp_path/'narrow.safetensors'); save_file({'x': torch.ones(2, 2, 64)}, tmp_path/'cube.safetensors')
    save_file({'x': torch.zeros(64)}, tmp_path/'zero.safetensors'); (tmp_path/'text.safetensors').write_text('no')
    for name, says in (('narrow', 'a direction has 3 components, the residual stream has 64'), ('cube', r'x has the shape \(2, 2, 64\): directions are'),
                       ('zero', 'is zero'), ('text', 'is not a safetensors file')):
        with pytest.raises(ValueError, match=says): read_directions(tmp_path/f'{name}.safetensors', 64)
    with pytest.raises(FileNotFoundError, match='no file'): read_directions(tmp_path/'none.safetensors', 64)


def test_what_evaluate_reads(world, tmp_path):
    pd.DataFrame({'feature': [5], 'explanation': ['x']}).to_csv(tmp_path/'a.csv', index=False)
    pd.DataFrame({'feature': [5], 'explanation': ['x'], 'score': [1.]}).to_parquet(tmp_path/'b.parquet')
    for name in ('a.csv', 'b.parquet'): assert read_explanations(tmp_path/name).to_dict('list') == {'feature': ['5'], 'explanation': ['x']}
    import gzip
    row = dict(modelId='gemma-2-9b', layer='20-gemmascope-res-16k', index='5', description=' x ', explanationModelName='gpt-4o-mini') # as Neuronpedia exports it
    (tmp_path/'batch-0.jsonl.gz').write_bytes(gzip.compress((json.dumps(row) + '\n' + json.dumps(row | dict(index='6', description=None)) + '\n').encode()))
    assert read_explanations(tmp_path/'batch-0.jsonl.gz').to_dict('list') == {'feature': ['gemma-2-9b/20-gemmascope-res-16k/5', 'gemma-2-9b/20-gemmascope-res-16k/6'], 'explanation': [' x ', None]}
    (tmp_path/'bare.jsonl').write_text('{"index": 5, "description": "x"}\n')
    assert read_explanations(tmp_path/'bare.jsonl').to_dict('list') == {'feature': ['5'], 'explanation': ['x']}
    (tmp_path/'ends.jsonl').write_text('{"feature": "5", "explanation": "a\u2028b\x85c"}\n', encoding='utf-8') # as `explain --all` writes them
    assert read_explanations(tmp_path/'ends.jsonl').to_dict('list') == {'feature': ['5'], 'explanation': ['a\u2028b\x85c']}
    (tmp_path/'c.jsonl').write_text('{"feature": 1\n'); (tmp_path/'d.jsonl').write_text('{"id": 1}\n'); (tmp_path/'e.txt').write_text('')
    for name, says in (('c.jsonl', 'is not a readable jsonl file'), ('d.jsonl', 'has the columns id: it needs feature and explanation'), ('e.txt', 'must be .csv, .tsv, .parquet, .json or .jsonl, all but .parquet also as .gz')):
        with pytest.raises(ValueError, match=says): read_explanations(tmp_path/name)


def written(file): # what is read of a file, or what is said of it
    try: return dict(zip(*read_explanations(file).to_dict('list').values()))
    except ValueError as e:
        assert str(file) in str(e) and '\n' not in str(e)
        return str(e)


def test_explanations_stay_with_their_features(tmp_path):
    "However a table was filtered, sorted or shuffled before it was written"
    frame = pd.DataFrame(dict(feature=[10, 20, 30, 40], explanation=['ten', 'twenty', None, 'forty'], score=1.))
    right = {'10': 'ten', '20': 'twenty', '30': None, '40': 'forty'}
    neuronpedia = frame.rename(columns=dict(feature='index', explanation='description')).assign(modelId='m', layer='s')
    for i, change in enumerate((lambda f: f, lambda f: f.sample(frac=1, random_state=1), lambda f: f.iloc[::-1], lambda f: f[f.index != 1], lambda f: f.set_index(f.columns[0]),
                                lambda f: f.astype({f.columns[0]: 'category'}), lambda f: f.astype({f.columns[0]: float}))):
        change(frame).to_parquet(tmp_path/'x.parquet')
        found = written(tmp_path/'x.parquet')
        assert found == {name: right[name] for name in found} and len(found) == (3 if i == 3 else 4)
        change(neuronpedia).to_parquet(tmp_path/'n.parquet')
        assert written(tmp_path/'n.parquet') == {f'm/s/{name}': text for name, text in found.items()}
    for name, save in (('x.json', dict(orient='records')), ('x.jsonl', dict(orient='records', lines=True))):
        frame.sample(frac=1, random_state=1).to_json(tmp_path/name, **save)
        assert written(tmp_path/name) == right


TEXTS = [('feature,explanation\n5,"a, b"\n6,\n', 'utf-8'), ('Feature;Explanation\r\n5;a, b\r\n6;\r\n;\r\n;\r\n', 'utf-8-sig'), ('FEATURE\texplanation \n5\ta, b\n6\t\n', 'utf-16'),
         ('\n  \n,,\nfeature,explanation\n5,"a, b"\n6,""\n', 'utf-8'), ('feature,explanation\r5,"a, b"\r6,\r', 'utf-8'), ('feature,explanation,note\n5,"a, b"\n6\n', 'utf-8'),
         ('sep=;\nexplanation;feature;note\na, b;5;x\n;6\n', 'utf-8'), ('feature,explanation,,\n5.0,"a, b",,\n006,,,\n,,,\n', 'utf-8'), ('"feature","explanation"\n" 5 ","a, b"\n\n6,"  "\n', 'utf-8')]

@pytest.mark.parametrize('text, encoding', TEXTS)
def test_tables_as_spreadsheets_save_them(tmp_path, text, encoding):
    import gzip
    for name in ('x.csv', 'X.CSV', 'x.tsv', 'x.csv.gz'):
        data = text.encode(encoding)
        (tmp_path/name).write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
        assert written(tmp_path/name) == {'5': 'a, b', '6': None}, name


def test_the_windows_encoding_is_read_and_said(tmp_path, capsys):
    (tmp_path/'x.csv').write_bytes('feature,explanation\n5,the word \u201cis\u201d \u2013 caf\u00e9\n'.encode('cp1252'))
    assert written(tmp_path/'x.csv') == {'5': 'the word \u201cis\u201d \u2013 caf\u00e9'} and 'x.csv is not UTF-8: it is read as Windows-1252' in capsys.readouterr().err


REFUSED = {'bare.csv': ('feature,explanation\n5,the word has, as a verb\n6,b, c\n', "line 2 has 3 fields, the header 2: a text that holds ',' must stand in quotes"),
           'some.csv': ('feature,explanation\n5,a\n6,b, c\n', 'line 3 has 3 fields'), 'open.csv': ('feature,explanation\n5,"a\n6,b\n', 'are the quotes of a text closed, and doubled inside it'),
           'empty.csv': ('', 'it is empty'), 'names.csv': ('id,text\n5,a\n', 'has the columns id, text: it needs feature and explanation'), 'blank.csv': ('feature,explanation\n5,a\n,b\n', "row 2: '' is no feature"),
           'part.csv': ('feature,explanation\n1.7,a\n', "row 1: '1.7' is no feature, which is an index or model/source/index"), 'minus.csv': ('feature,explanation\n-1,a\n', "'-1' is no feature"),
           'true.jsonl': ('{"feature": true, "explanation": "a"}', "'True' is no feature"), 'number.jsonl': ('{"feature": 5, "explanation": 7}', 'row 1: the explanation is 7, not a text'),
           'list.json': ('[1, 2]', 'holds 1, not a row with names'), 'object.json': ('{"5": "a"}', 'has the columns 5: it needs feature and explanation'), 'cut.json': ('[{"feature": 5,', 'line 1 is not JSON'),
           'deep.json': ('['*100_000, 'it is nested too deeply'), 'x.parquet': ('PAR1', 'is not a readable parquet file'), 'x.jsonl.gz': ('no', 'is not a readable jsonl file'),
           'twice.csv': ('feature,explanation\n5,a\n5.0,b\n', 'explains 5 more than once: keep one'), 'two_names.csv': ('feature,explanation\n5,a\nsmollm2-135m/9-res-4k/5,b\n', 'explains 5 more than once, as 5 and as smollm2-135m/9-res-4k/5'),
           'names_twice.csv': ('feature,explanation,explanation\n5,a,b\n', "line 1 names two columns 'explanation'"), 'nearly.csv': ('\nfeature,explanation,Explanation\n5,a,b\n', "line 2 names two columns 'Explanation'"),
           'nameless.csv': ('feature,explanation,,\n5,a,,b\n', 'line 2 has a text in one of the 2 columns without a name'), 'twice.jsonl': ('{"feature": 5, "explanation": "a", "explanation": "b"}', "it names 'explanation' twice"),
           'zero.csv': ('feature,explanation\n5,a\n6,b\0c\n', 'line 3 holds a zero byte'), 'open_name.csv': ('feature,"explanation\n5,a\n', 'line 1: a quote opens in the name of a column and does not close'),
           'long_open.csv': ('sep=,\nfeature,explanation\n5,a\n6,"b\n7,c\n8,d\n', 'line 4: unexpected end of data'), 'lines.csv': ('feature,explanation\n5,"a\nb"\n6,b,c\n', 'line 4 has 3 fields'),
           'json.csv': ('[{"feature": 5, "explanation": "a"}]', 'it is JSON: give it the ending .jsonl'), 'sheet.csv': ('PK\x03\x04xl', 'it is a zip file or a spreadsheet, not text'), 'pages.jsonl': ('PAR1', 'it is a Parquet file, not text'),
           'wide.csv': ('\0'.join('feature,explanation\n5,a\n') + '\0', 'it is no text, or UTF-16 without its mark: save it as UTF-8'), 'header.csv': ('feature,explanation\n', 'holds no explanation'), 'none.jsonl': ('', 'holds no explanation'),
           'zeros.csv': ('feature,explanation\nm/s/5,a\n m/s/005,b\n', 'explains m/s/5 more than once')}

@pytest.mark.parametrize('name', REFUSED)
def test_tables_that_would_lose_something_are_refused(tmp_path, name):
    text, says = REFUSED[name]
    (tmp_path/name).write_text(text)
    assert says in written(tmp_path/name)


def test_missing_texts_as_python_spells_them(tmp_path):
    (tmp_path/'x.csv').write_text('feature,explanation\n5,nan\n6,NaN\n7,<NA>\n8,the word NaN\n')
    assert written(tmp_path/'x.csv') == {'5': None, '6': None, '7': None, '8': 'the word NaN'}
    (tmp_path/'x.jsonl').write_text('{"feature": 5, "explanation": "a"}\n{"explanation": "b"}\n')
    assert 'x.jsonl, row 2, has the columns explanation: it needs feature and explanation' in written(tmp_path/'x.jsonl')


def test_two_columns_of_one_name_in_a_parquet_file(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.table([pa.array([5]), pa.array(['a']), pa.array(['b'])], names=['feature', 'explanation', 'explanation']), tmp_path/'x.parquet')
    assert "it has two columns 'explanation'" in written(tmp_path/'x.parquet')


def test_lists_and_half_characters_in_json(tmp_path, capsys):
    (tmp_path/'list.jsonl').write_text('\n[{"feature": 5, "explanation": "a"},\n {"feature": 6, "explanation": null}]')
    (tmp_path/'lines.json').write_text('\ufeff{"feature": 5, "explanation": "a"}\n{"feature": "6"  , "explanation": ""}\n', encoding='utf-8')
    for name in ('list.jsonl', 'lines.json'): assert written(tmp_path/name) == {'5': 'a', '6': None}
    (tmp_path/'half.jsonl').write_text('{"feature": 5, "explanation": "half \\ud83d emoji"}\n{"feature": 6, "explanation": "whole \\ud83d\\ude00"}\n')
    assert written(tmp_path/'half.jsonl') == {'5': 'half ? emoji', '6': 'whole \U0001f600'} and "half.jsonl: 1 lines held half characters, which are read as '?'" in capsys.readouterr().err


def test_a_dictionary_can_be_evaluated(world, tmp_path, capsys, monkeypatch):
    folder, file, preset = world
    monkeypatch.chdir(tmp_path)
    rows = [dict(feature='tiny/1-res/1', explanation='cats'), dict(feature='tiny/1-res/2', explanation=None), dict(feature='tiny/1-res/3', explanation='dogs')]
    (tmp_path/'mine.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    main(['evaluate', 'mine.jsonl', '--preset', str(file), '--json'])
    shown = capsys.readouterr()
    assert '1 of 3 rows have no explanation and are left out' in shown.err
    assert {r['stage'] for r in json.loads(shown.out)} >= {'mine', 'label'}


def test_a_file_of_all_features_is_what_evaluate_reads(world, tmp_path, capsys, monkeypatch):
    "Dead features, and features that the table does not know, are left out and counted"
    folder, file, preset = world
    monkeypatch.chdir(tmp_path)
    main(['explain', str(file), '--all', '--out', 'all.parquet', '--explainer', str(folder/'sft'), '--json'])
    shown = capsys.readouterr()
    assert json.loads(shown.out)['features'] == 40 and '2 of 40 features are dead: they fired on none of the texts' in shown.err
    main(['evaluate', 'all.parquet', '--preset', str(file), '--json', '-s', 'n_output=1', '-s', 'n_generative=1', '-s', 'n_activating=1', '-s', 'n_neutral=1'])
    shown = capsys.readouterr()
    assert 'are dead or unknown and are left out' in shown.err
    rows = {r['metric']: r for r in json.loads(shown.out) if r['stage'] == 'all'}
    assert rows['generative']['n'] > 20
    pd.DataFrame({'feature': ['tiny/1-res/1'], 'explanation': ['x']}).to_csv('label.csv', index=False)
    with pytest.raises(SystemExit): main(['evaluate', 'label.csv', '--preset', str(file)])
    assert "the stage 'label' is taken" in capsys.readouterr().err


def test_a_retrained_explainer_does_not_go_on_with_anothers_rows(world, tmp_path):
    import shutil
    from safetensors.torch import load_file
    folder, _, preset = world
    shutil.copytree(folder/'sft', tmp_path/'sft')
    rows = Rows(tmp_path/'all.jsonl.explained.part', {}); rows.close()
    explain_dictionary(preset, tmp_path/'sft', tmp_path/'one.jsonl', progress=False)
    (tmp_path/'all.jsonl.explained.part').unlink()
    from saeexplainer.explainer import adapter_sha256
    settings = dict(preset='tiny', source='tiny/1-res', sae_sha256=FeatureReader.load(preset).sha256, explainer=str(tmp_path/'sft'),
                    explanation_tokens=preset.explanation_tokens, adapter_sha256=adapter_sha256(tmp_path/'sft'))
    Rows(tmp_path/'all.jsonl.explained.part', settings).close()
    weights = load_file(tmp_path/'sft'/'adapter_model.safetensors')
    save_file({k: w + 1 for k, w in weights.items()}, tmp_path/'sft'/'adapter_model.safetensors')
    with pytest.raises(ValueError, match='was begun with adapter_sha256'): explain_dictionary(preset, tmp_path/'sft', tmp_path/'all.jsonl', progress=False)


def test_damaged_parts_name_their_file(tmp_path):
    file = tmp_path/'x.part'
    for begins in ('{"settings": {}}', '[]', '{"settings": []}'):
        file.write_text(begins + '\n')
        with pytest.raises(ValueError, match='x.part does not say what it is part of'): Rows(file, dict(n=1))
    for line in (b'null', b'5', b'{"index": 4', b'\xe9', b'', b'\0'):
        file.write_bytes(b'{"settings": {"n": 1}}\n' + line + b'\n{"index": 4}\n')
        rows = Rows(file, dict(n=1))
        with pytest.raises(ValueError, match='x.part is damaged in line 2'): list(rows)
        rows.close()


@pytest.mark.parametrize('line', ['{"a": 1}', '{"index": "x"}', '{"index": [1]}', '{"index": null}', '{"index": true}', '{"index": 40}', '{"index": -1}', '{"index": 3, "explanation": 5}', '{"index": 0, "explanation": "twice"}'])
def test_rows_of_no_feature_are_damage(world, tmp_path, line):
    folder, _, preset = world
    part = tmp_path/'all.jsonl.explained.part'
    part.write_text('{"settings": {"preset": "tiny"}}\n{"index": 0, "explanation": "a", "error": null}\n' + line + '\n')
    with pytest.raises(ValueError, match='all.jsonl.explained.part is damaged in line 3 .feature .*: remove it'): explain_dictionary(preset, folder/'sft', tmp_path/'all.jsonl', progress=False)


def test_an_empty_file_beside_a_part_is_not_finished(world, tmp_path):
    folder, _, preset = world
    (tmp_path/'all.jsonl').write_text('')
    (tmp_path/'all.jsonl.explained.part').write_text('{"settings": {"preset": "tiny"}}\n')
    with pytest.raises(ValueError, match='all.jsonl exists, and is not what .*explained.part is part of'): explain_dictionary(preset, folder/'sft', tmp_path/'all.jsonl', progress=False)
    assert (tmp_path/'all.jsonl.explained.part').exists()
