"Whole dictionaries and lone directions: every feature has a row, and a work that was killed goes on with its own rows"
import json
import pickle
import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from forks import calling, is_alive, kill
from safetensors.torch import load_file, save_file
from tiny_lab import N_FEATURES, NO_DIRECTION
from writer_server import Server, capable

from saeexplainer import dictionaries
from saeexplainer.cli import main
from saeexplainer.dictionaries import (
    Rows, _explained_with, _finish, _paid_store, _verdict, _verified_with, _Work, explain_dictionary, read_directions,
)
from saeexplainer.executor import PlainExecutor
from saeexplainer.evaluation.texts import Verified
from saeexplainer.explanation_files import read_explanations
from saeexplainer.explainer import Explainer, ExplainerCard, adapter_sha256
from saeexplainer.presets import Preset
from saeexplainer.replies import Reply, Request
from saeexplainer.saes import FeatureReader
from saeexplainer.target import Target

END = 'remove it, or choose another --out' # of most errors


@pytest.fixture
def lab(explained_lab):
    "A lab with an explainer; its data are those that are shipped while a test runs"
    with explained_lab.in_use(): yield explained_lab


def explain(lab, out, **kw):
    "Explain the dictionary of a lab"
    return explain_dictionary(lab.preset(), lab.explainer, out, progress=False, **kw)


def refused(says): # to be written behind `with`
    return pytest.raises(ValueError, match=says)


def begin(part, settings):
    "Begin a file of rows, and no more"
    Rows(part, settings).close()
    return part


def said_by_explainer(lab, indices):
    "What its explainer says of features, without a dictionary around it"
    reader = FeatureReader.load(lab.preset())
    explainer = Explainer.from_pretrained(lab.explainer, reader, device='cpu')
    return explainer.explain(reader.directions(indices), max_new_tokens=lab.preset().explanation_tokens)


# ---- what is written

@pytest.fixture(scope='module')
def explained(explained_lab, tmp_path_factory):
    "A dictionary, and what was said of it"
    out = tmp_path_factory.mktemp('explained')/'all.jsonl'
    with explained_lab.in_use(): return out, explain(explained_lab, out)


def rows_in(file): return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_feature_has_a_row(explained):
    out, _ = explained
    rows = rows_in(out)
    assert [row['index'] for row in rows] == list(range(N_FEATURES))
    assert [row['feature'] for row in rows][:2] == ['tiny/1-res/0', 'tiny/1-res/1']
    assert not list(out.parent.glob('*.part'))


def test_features_without_a_direction_are_dead(explained):
    out, done = explained
    dead = [row['index'] for row in rows_in(out) if row['error'] == 'no direction: a dead feature']
    assert dead == list(NO_DIRECTION)
    assert done['dead'] == 2
    assert done['explained'] + done['dead'] + done['empty'] == done['features'] == N_FEATURES


def test_a_row_holds_what_the_explainer_says(explained, lab):
    out, _ = explained
    assert (rows_in(out)[3]['explanation'] or '') == said_by_explainer(lab, [3])[0]


def test_a_dictionary_is_read_as_explanations(explained):
    out, done = explained
    read = read_explanations(out)
    assert read['explanation'].isna().sum() == done['dead'] + done['empty']
    assert read['feature'][5] == 'tiny/1-res/5'


def test_a_file_that_exists_is_not_written_over(explained, lab):
    out, _ = explained
    with refused('all.jsonl exists: remove it, or choose another --out'): explain(lab, out)


def test_another_ending_is_refused(lab, tmp_path):
    with refused(r"--out must end in .jsonl or .parquet, not 'all.txt'"): explain(lab, tmp_path/'all.txt')


@pytest.fixture(scope='module')
def verified(explained_lab, tmp_path_factory):
    "Rows of a dictionary whose explanations were verified, by index"
    out = tmp_path_factory.mktemp('verified')/'all.parquet'
    with explained_lab.in_use(): explain(explained_lab, out, n=2)
    return pd.read_parquet(out).set_index('index')


def test_each_explanation_has_two_scores(verified):
    said = verified[verified['explanation'].notna()]
    assert len(said)
    assert said['scores'].map(len).eq(2).all()
    assert verified.loc[list(NO_DIRECTION), 'scores'].isna().all()


def test_fresh_stands_beside_what_was_verified(tmp_path):
    parts = [Rows(tmp_path/f'{name}.part', {}) for name in ('explained', 'verified')]
    parts[0].add([dict(index=0, explanation='rain', error=None), dict(index=1, explanation=None, error='empty')])
    parts[1].add([dict(index=0, texts=['a', None, 'b'], scores=[9., None, 1.], score=5., unmade=1, reached=1)])
    known = pd.DataFrame(dict(stage='all', texts=2, reached=[0, 1, 2], fresh=[.1, .5, .8]))
    for part in parts: part.close()
    _finish(tmp_path/'all.jsonl', parts, known)
    rows = [json.loads(line) for line in (tmp_path/'all.jsonl').read_text().splitlines()]
    assert rows[0]['fresh'] == .5
    assert 'fresh' not in rows[1]


def mean_of_known(scores): return np.nan if np.isnan(scores).all() else np.nanmean(scores)

def test_verified_scores_are_those_of_the_target(verified, lab):
    target = Target.load(lab.preset())
    for index, row in verified[verified['explanation'].notna()].iterrows():
        wanted = [np.nan if text is None else target.max_acts([text], index)[0] for text in row['texts']]
        np.testing.assert_allclose(np.array(row['scores'], float), wanted, atol=1e-3)
        np.testing.assert_allclose(row['score'], mean_of_known(wanted), atol=1e-3)
        assert row['reached'] == sum(score > .5*row['max_act'] for score in wanted)
    assert verified['fresh'].isna().all() # nothing is known of this preset


def verdict_on(texts, activations, max_act, lab):
    return _verdict(Verified(3, texts, np.array(activations)), max_act, lab.preset())


def test_texts_that_were_not_made_reach_nothing_known(lab):
    nothing = verdict_on([None, ''], [np.nan, np.nan], 2., lab)
    assert nothing['reached'] is None
    assert nothing['score'] is None
    assert nothing['unmade'] == 2


def test_no_text_is_no_miss(lab):
    assert verdict_on(['a', None], [.5, np.nan], 2., lab)['reached'] == 0


# ---- the best of several

@pytest.fixture(scope='module')
def chosen(explained_lab, tmp_path_factory):
    "Rows of a dictionary whose explanations are the best of several"
    out = tmp_path_factory.mktemp('chosen')/'all.jsonl'
    with explained_lab.in_use(): explain(explained_lab, out, candidates=3)
    return rows_in(out)


def test_the_best_of_its_candidates_explains_a_feature(chosen):
    for row in chosen:
        if row['index'] in NO_DIRECTION: continue
        scores = [-np.inf if score is None else score for score in row['candidate_scores']]
        assert len(scores) == len(row['candidates']) <= 4
        assert row['explanation'] == row['candidates'][scores.index(max(scores))]


def test_some_are_not_the_greedy_ones(chosen, explained):
    greedy = {row['index']: row['explanation'] for row in rows_in(explained[0])}
    alive = [row for row in chosen if row['index'] not in NO_DIRECTION]
    assert all(row['candidates'][0] == greedy[row['index']] for row in alive)
    assert any(row['explanation'] != greedy[row['index']] for row in alive)


def test_a_dead_feature_has_no_candidates(chosen):
    assert all(chosen[index].get('candidates') is None for index in NO_DIRECTION)


@pytest.mark.parametrize('before, now', [(2, 3), (2, 0), (0, 2)])
def test_another_number_of_candidates_is_refused(lab, tmp_path, monkeypatch, before, now):
    def stop(*_): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(dictionaries, '_finish', stop)
        with pytest.raises(KeyboardInterrupt): explain(lab, tmp_path/'all.jsonl', candidates=before)
    with refused(f'was begun with candidates {before}, not {now}'):
        explain(lab, tmp_path/'all.jsonl', candidates=now)


# ---- who does the batches

class Backwards(PlainExecutor):
    "An executor whose last batch is done first; it notes what it was asked for"
    def __init__(self): self.asked = []

    def map(self, make_worker, batches):
        self.asked.append(make_worker.func.__name__)
        yield from reversed(list(super().map(make_worker, batches)))


def test_batches_may_come_in_any_order(lab, tmp_path):
    executor = Backwards()
    explain(lab, tmp_path/'in_order.jsonl', n=1, candidates=1)
    explain(lab, tmp_path/'backwards.jsonl', n=1, candidates=1, executor=executor)
    assert (tmp_path/'backwards.jsonl').read_text() == (tmp_path/'in_order.jsonl').read_text()
    assert executor.asked == ['_explaining', '_ranking', '_verifying']


def test_a_server_is_asked_by_this_process(lab, tmp_path, first):
    "One budget, and one store of replies"
    preset = replace(lab.preset(), evaluation_writer='small', writer_url=first.url)
    executor = Backwards()
    explain_dictionary(preset, lab.explainer, tmp_path/'all.jsonl', 1, progress=False, executor=executor)
    assert executor.asked == ['_explaining']
    assert first.asked


def test_a_dictionary_stays_in_its_process(lab):
    reader = FeatureReader.load(lab.preset())
    work = _Work(lab.preset(), lab.explainer, reader, n=0, known={}, progress=False)
    there = pickle.loads(pickle.dumps(work))
    assert there.reader is None
    assert there.dictionary().sha256 == reader.sha256
    assert work.dictionary() is reader


# ---- killed

def lines_of(part): return part.read_bytes().count(b'\n') if part.exists() else 0


def killed_in(part, forks, code):
    "Exit code of a work that was killed when a part of it had five lines"
    pid = forks.start(code)
    while is_alive(pid) and lines_of(part) < 5: time.sleep(.005)
    kill(pid)
    return forks.exit_code()


def test_killed_in_both_passes(lab, forks, tmp_path):
    explain(lab, tmp_path/'whole.jsonl', n=2)
    out = tmp_path/'killed.jsonl'
    arguments = ['explain', str(lab.file), '--all', '--out', str(out), '--verify', '2',
                 '--explainer', str(lab.explainer)]
    for part in ('explained', 'verified'):
        part = tmp_path/f'killed.jsonl.{part}.part'
        assert killed_in(part, forks, calling(arguments, lab.data)) == -signal.SIGKILL
        assert not out.exists()
    assert forks.run(calling([*arguments, '--json'], lab.data)) == 0, forks.errors()
    assert json.loads(forks.printed())['features'] == N_FEATURES
    assert out.read_text() == (tmp_path/'whole.jsonl').read_text()


def test_killed_in_all_three_passes(lab, forks, tmp_path):
    explain(lab, tmp_path/'whole.jsonl', n=1, candidates=2)
    out = tmp_path/'killed.jsonl'
    arguments = ['explain', str(lab.file), '--all', '--out', str(out), '--verify', '1', '--candidates', '2',
                 '--explainer', str(lab.explainer)]
    for part in ('explained', 'ranked', 'verified'):
        part = tmp_path/f'killed.jsonl.{part}.part'
        assert killed_in(part, forks, calling(arguments, lab.data)) == -signal.SIGKILL
        assert not out.exists()
    assert forks.run(calling([*arguments, '--json'], lab.data)) == 0, forks.errors()
    assert out.read_text() == (tmp_path/'whole.jsonl').read_text()
    assert not list(tmp_path.glob('*.part'))


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_killed_between_the_file_and_its_parts(lab, tmp_path, monkeypatch, kind):
    out = tmp_path/f'all.{kind}'
    parts = [tmp_path/f'all.{kind}.{part}.part' for part in ('explained', 'verified')]
    kept = {}
    unlink = Path.unlink
    def keep_parts(self, missing_ok=False): # as they are when the file is whole
        if self in parts: kept.setdefault(self.name, self.read_bytes())
        else: unlink(self, missing_ok)
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'unlink', keep_parts)
        done = explain(lab, out, n=2)
    assert out.exists()
    assert all(part.exists() for part in parts)
    whole = out.read_bytes()
    with refused('was begun with n 2, not 3'): explain(lab, out, n=3)
    assert explain(lab, out, n=2) == done
    assert out.read_bytes() == whole
    assert not list(tmp_path.glob('*.part'))
    with refused('exists: remove it'): explain(lab, out, n=2)
    # rows of another work, and the file is somebody else's
    parts[0].write_bytes(b''.join(kept[parts[0].name].splitlines(True)[:9]))
    with refused('exists, and is not what .* is part of'): explain(lab, out)
    assert parts[0].exists()
    assert out.read_bytes() == whole


def test_two_processes_do_not_write_one_file(lab, tmp_path):
    part = tmp_path/'all.jsonl.explained.part'
    rows = Rows(part, dict(a=1))
    says = 'another process is working on .*all.jsonl.explained.part: wait for it, or stop it'
    with pytest.raises(RuntimeError, match=says): explain(lab, tmp_path/'all.jsonl')
    rows.close()
    begin(part, dict(a=1))


# ---- rows of other settings

def test_other_settings_are_refused(lab, tmp_path):
    other = dict(preset='tiny', source='tiny/1-res', sae_sha256='abc', explainer='x')
    begin(tmp_path/'all.jsonl.explained.part', other)
    with refused(f"explained.part was begun with sae_sha256 'abc', not .*: {END}"):
        explain(lab, tmp_path/'all.jsonl')


KNOWN = {1: 2.} # largest activations, by feature

def settings_of(lab, n=2, known=KNOWN, **fields):
    "What the rows of a verified dictionary depend on; the fields are those of the preset that differ for its texts"
    explained_with = _explained_with(lab.preset(), lab.explainer, FeatureReader.load(lab.preset()))
    return explained_with | _verified_with(replace(lab.preset(), **fields), n, known)


OTHERS = dict(text_temperature=5., text_tokens=2, text_top_p=.5, success=.9, dtype='bfloat16', target='other',
              text_form='list', seed=1, evaluation_writer='local:x', sae_bos=False)

@pytest.mark.parametrize('field', OTHERS)
def test_verified_rows_of_other_settings_are_refused(lab, tmp_path, field):
    "Everything that texts and scores depend on"
    part = begin(tmp_path/'x.part', settings_of(lab))
    with refused(f'x.part was begun with .*: {END}'): Rows(part, settings_of(lab, **{field: OTHERS[field]}))


@pytest.mark.parametrize('n, known', [(3, KNOWN), (2, {1: 3.})])
def test_verified_rows_of_another_measure_are_refused(lab, tmp_path, n, known):
    part = begin(tmp_path/'x.part', settings_of(lab))
    with refused('was begun with (n|max_acts)'): Rows(part, settings_of(lab, n, known))


def test_what_no_row_depends_on_may_differ(lab, tmp_path):
    part = begin(tmp_path/'x.part', settings_of(lab))
    begin(part, settings_of(lab, batch_size=1, n_sft=9, writer_url='http://x/v1'))


def test_an_untrained_explainer_depends_on_the_preset(lab):
    reader = FeatureReader.load(lab.preset())
    bare = _explained_with(lab.preset(), 'untrained', reader)
    other = replace(lab.preset(), template='Feature {placeholder}?')
    assert bare['adapter_sha256'] is None
    assert _explained_with(other, 'untrained', reader) != bare


def test_what_an_earlier_version_did_not_write_down_is_taken_as_it_is(lab, tmp_path):
    part = begin(tmp_path/'old.part', dict(preset='tiny'))
    begin(part, settings_of(lab))


def test_a_part_whose_settings_are_cut_off(lab, tmp_path):
    (tmp_path/'x.part').write_text('{"sett\n')
    with refused('x.part does not say what it is part of'): Rows(tmp_path/'x.part', settings_of(lab))


@dataclass
class Begun:
    "A verified dictionary whose two parts hold five rows each; model and explainer are its own"
    folder: Path
    preset: Preset

    @property
    def explainer(self): return self.folder/'sft'

    def part(self, name): return self.folder/f'all.jsonl.{name}.part'

    def go_on(self, preset=None):
        preset = preset or self.preset
        return explain_dictionary(preset, self.explainer, self.folder/'all.jsonl', n=2, progress=False)


def keep_parts(out, parts, shares=None): "In place of what removes the parts of a finished dictionary"

def cut(part, rows):
    "Leave so many rows, as if the work had been killed after them"
    part.write_bytes(b''.join(part.read_bytes().splitlines(True)[:rows + 1]))


def begun_in(folder, lab, **fields):
    model = shutil.copytree(lab.model, folder/'model')
    explainer = shutil.copytree(lab.explainer, folder/'sft')
    replace(ExplainerCard.load(explainer), base_model=str(model)).save(explainer)
    begun = Begun(folder, replace(lab.preset(), target=str(model), explainer=str(model), **fields))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dictionaries, '_finish', keep_parts)
        begun.go_on()
    for part in ('explained', 'verified'): cut(begun.part(part), 5)
    return begun


@pytest.fixture
def begun(lab, tmp_path): return begun_in(tmp_path, lab)


def nudge(folder):
    "Put other weights under the same name"
    weights = load_file(folder/'model.safetensors')
    changed = {name: tensor*1.01 for name, tensor in weights.items()}
    save_file(changed, folder/'model.safetensors', metadata={'format': 'pt'})


def test_other_weights_do_not_go_on_with_the_rows_of_the_old_ones(begun):
    nudge(begun.folder/'model')
    with refused(f'explained.part was begun with base_sha256 .*: {END}'): begun.go_on()


def test_another_card_does_not_go_on_with_the_rows_of_the_old_one(begun):
    card = ExplainerCard.load(begun.explainer)
    others = dict(placeholder='<s>', layer=0, coefficient=2., template='Feature {placeholder}?')
    for field, value in others.items():
        replace(card, **{field: value}).save(begun.explainer)
        with refused(f'explained.part was begun with (injection_)?{field} '): begun.go_on()
    card.save(begun.explainer)
    assert begun.go_on()['features'] == N_FEATURES


def is_old(name): return not name.endswith('sha256') or name in ('sae_sha256', 'adapter_sha256')

def test_an_earlier_part_without_hashes_is_resumed(begun):
    for name in ('explained', 'verified'):
        first, *rows = begun.part(name).read_text().splitlines(True)
        settings = {name: value for name, value in json.loads(first)['settings'].items() if is_old(name)}
        begun.part(name).write_text(json.dumps({'settings': settings}) + '\n' + ''.join(rows))
    assert begun.go_on()['features'] == N_FEATURES


@pytest.mark.parametrize('name, key', [('target', 'target_sha256'), ('writer', 'writer_sha256')])
def test_the_weights_of_target_and_writer_are_part_of_the_verdicts(lab, tmp_path, name, key):
    "Also where every explanation is there already, and only texts and scores are left"
    for model in ('target', 'writer'): shutil.copytree(lab.model, tmp_path/model)
    preset = lab.preset(target=str(tmp_path/'target'), evaluation_writer=f"local:{tmp_path/'writer'}")
    before = _verified_with(preset, 2, {})
    nudge(tmp_path/name)
    after = _verified_with(preset, 2, {})
    assert {name for name in after if after[name] != before[name]} == {key}
    part = begin(tmp_path/'x.part', before)
    with refused(f"x.part was begun with {key} '{before[key]}', not '{after[key]}': remove it"): Rows(part, after)


@pytest.fixture
def first(monkeypatch):
    "The server of a writer, whose key is in the environment"
    monkeypatch.setenv('OPENAI_API_KEY', 'any')
    with Server(capable) as server: yield server


@pytest.fixture
def second():
    "Another server"
    with Server(capable) as server: yield server


@pytest.fixture
def paid(lab, first, tmp_path):
    "A dictionary that was begun with the first server"
    return begun_in(tmp_path, lab, evaluation_writer='small', writer_url=first.url)


def test_another_server_does_not_go_on_with_the_texts_of_the_first(paid, first, second, monkeypatch):
    "By --base-url and by the environment"
    says = f"verified.part was begun with writer_url '{first.url}', not '{second.url}': {END}"
    with refused(says): paid.go_on(replace(paid.preset, writer_url=second.url))
    monkeypatch.setenv('OPENAI_BASE_URL', second.url)
    with refused(says): paid.go_on(replace(paid.preset, writer_url=None))


def test_what_was_paid_for_at_one_server_is_not_taken_for_the_others(paid, first, second):
    other = replace(paid.preset, writer_url=second.url)
    paid.part('verified').unlink()
    file = paid.folder/'all.jsonl.writer.sqlite'
    with _paid_store(file, paid.preset) as store: store.put_replies([('key', Request('x'), Reply('y'))])
    says = f'all.jsonl.writer.sqlite holds replies of a writer at {first.url}, not {second.url}: {END}'
    with refused(says): paid.go_on(other)


def test_the_same_server_goes_on_with_its_texts(paid, first, second, monkeypatch):
    "However its address is spelled"
    asked = len(first.asked)
    monkeypatch.setenv('OPENAI_BASE_URL', first.url + '/')
    assert paid.go_on(replace(paid.preset, writer_url=None))['features'] == N_FEATURES
    assert not second.asked
    assert len(first.asked) > asked


def test_a_retrained_explainer_does_not_go_on_with_anothers_rows(lab, tmp_path):
    explainer = shutil.copytree(lab.explainer, tmp_path/'sft')
    preset = lab.preset()
    settings = dict(
        preset='tiny', source='tiny/1-res', sae_sha256=FeatureReader.load(preset).sha256, explainer=str(explainer),
        explanation_tokens=preset.explanation_tokens, adapter_sha256=adapter_sha256(explainer))
    begin(tmp_path/'all.jsonl.explained.part', settings)
    weights = load_file(explainer/'adapter_model.safetensors')
    save_file({name: weight + 1 for name, weight in weights.items()}, explainer/'adapter_model.safetensors')
    with refused('was begun with adapter_sha256'):
        explain_dictionary(preset, explainer, tmp_path/'all.jsonl', progress=False)


# ---- damaged parts

@pytest.mark.parametrize('first_line', ['{"settings": {}}', '[]', '{"settings": []}'])
def test_a_part_that_does_not_say_what_it_is_part_of(tmp_path, first_line):
    (tmp_path/'x.part').write_text(first_line + '\n')
    with refused('x.part does not say what it is part of'): Rows(tmp_path/'x.part', dict(n=1))


@pytest.mark.parametrize('line', [b'null', b'5', b'{"index": 4', b'\xe9', b'', b'\0'])
def test_damaged_parts_name_their_file(tmp_path, line):
    (tmp_path/'x.part').write_bytes(b'{"settings": {"n": 1}}\n' + line + b'\n{"index": 4}\n')
    rows = Rows(tmp_path/'x.part', dict(n=1))
    with refused('x.part is damaged in line 2'): list(rows)
    rows.close()


@pytest.mark.parametrize('line', [
    '{"a": 1}',
    '{"index": "x"}',
    '{"index": [1]}',
    '{"index": null}',
    '{"index": true}',
    '{"index": 40}',
    '{"index": -1}',
    '{"index": 3, "explanation": 5}',
    '{"index": 0, "explanation": "twice"}'])
def test_rows_of_no_feature_are_damage(lab, tmp_path, line):
    lines = ['{"settings": {"preset": "tiny"}}', '{"index": 0, "explanation": "a", "error": null}', line]
    (tmp_path/'all.jsonl.explained.part').write_text(''.join(f'{line}\n' for line in lines))
    with refused('all.jsonl.explained.part is damaged in line 3 .feature .*: remove it'):
        explain(lab, tmp_path/'all.jsonl')


def test_an_empty_file_beside_a_part_is_not_finished(lab, tmp_path):
    part = tmp_path/'all.jsonl.explained.part'
    (tmp_path/'all.jsonl').write_text('')
    part.write_text('{"settings": {"preset": "tiny"}}\n')
    with refused('all.jsonl exists, and is not what .*explained.part is part of'): explain(lab, tmp_path/'all.jsonl')
    assert part.exists()


# ---- lone directions

def test_directions_of_no_sae_are_explained(lab, tmp_path, capsys):
    directions = FeatureReader.load(lab.preset()).sae.W_dec
    file = tmp_path/'d.safetensors'
    save_file({'truth': directions[3].clone(), 'probes': directions[4:6].clone()}, file)
    main(['explain', str(lab.file), '--direction', str(file), '--explainer', str(lab.explainer), '--json'])
    said = {row['direction']: row['explanation'] for row in json.loads(capsys.readouterr().out)}
    assert said == dict(zip(('probes[0]', 'probes[1]', 'truth'), said_by_explainer(lab, [4, 5, 3])))


@pytest.mark.parametrize('direction, says', [
    (torch.ones(3), 'a direction has 3 components, the residual stream has 64'),
    (torch.ones(2, 2, 64), r'x has the shape \(2, 2, 64\): directions are'),
    (torch.zeros(64), 'is zero')])
def test_what_is_no_direction(tmp_path, direction, says):
    save_file({'x': direction}, tmp_path/'x.safetensors')
    with refused(says): read_directions(tmp_path/'x.safetensors', 64)


def test_files_without_directions(tmp_path):
    (tmp_path/'text.safetensors').write_text('no')
    with refused('is not a safetensors file'): read_directions(tmp_path/'text.safetensors', 64)
    with pytest.raises(FileNotFoundError, match='no file'): read_directions(tmp_path/'none.safetensors', 64)


# ---- a dictionary is what `evaluate` reads

@pytest.fixture
def here(tmp_path, monkeypatch):
    "The working folder"
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_dictionary_can_be_evaluated(lab, here, capsys):
    rows = [dict(feature='tiny/1-res/1', explanation='cats'),
            dict(feature='tiny/1-res/2', explanation=None),
            dict(feature='tiny/1-res/3', explanation='dogs')]
    (here/'mine.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    main(['evaluate', 'mine.jsonl', '--preset', str(lab.file), '--json'])
    shown = capsys.readouterr()
    assert '1 of 3 rows have no explanation and are left out' in shown.err
    assert {row['stage'] for row in json.loads(shown.out)} >= {'mine', 'label'}


ONE_EACH = [part for name in ('output', 'generative', 'activating', 'neutral') for part in ('-s', f'n_{name}=1')]

def test_a_file_of_all_features_is_what_evaluate_reads(lab, here, capsys):
    "Dead features, and features that the table does not know, are left out and counted"
    main(['explain', str(lab.file), '--all', '--out', 'all.parquet', '--explainer', str(lab.explainer), '--json'])
    shown = capsys.readouterr()
    assert json.loads(shown.out)['features'] == N_FEATURES
    assert '2 of 40 features are dead: they fired on none of the texts' in shown.err
    main(['evaluate', 'all.parquet', '--preset', str(lab.file), '--json', *ONE_EACH])
    shown = capsys.readouterr()
    assert '2 of 38 features are left out: 2 dead (tiny/1-res/36, tiny/1-res/39)' in shown.err
    rows = {row['metric']: row for row in json.loads(shown.out) if row['stage'] == 'all'}
    assert rows['generative']['n'] > 20


def test_a_file_may_not_be_named_as_a_stage(lab, here, capsys):
    pd.DataFrame({'feature': ['tiny/1-res/1'], 'explanation': ['x']}).to_csv('label.csv', index=False)
    with pytest.raises(SystemExit): main(['evaluate', 'label.csv', '--preset', str(lab.file)])
    assert "the stage 'label' is taken" in capsys.readouterr().err
