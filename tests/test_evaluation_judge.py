"Steered sets, verdicts and controls, with stubs in the place of models"
import dataclasses
import json
from types import SimpleNamespace
import pytest
from saeexplainer.evaluation.judge import (
    Case, Verdict, control_cases, judge, judge_cases, judge_controls, judge_locally, shuffled, verdicts_by_letter,
)
from saeexplainer.evaluation.steering import (
    calibrate, control_features, searches_for, steer, steered_sets, usable_targets,
)
from saeexplainer.evaluation.texts import Claim
from saeexplainer.presets import load_preset
from saeexplainer.replies import Reply
from saeexplainer.store import RunStore

PRESET = load_preset('smollm2-135m', size='demo', steering_kl=(.5, -.5), steering_prompts=('I think', 'We'),
                     batch_size=4)
CAPABLE = dataclasses.replace(PRESET, evaluation_writer='gpt-5.4-mini')
HOW = PRESET.steering
POOL = range(100)


class Stub:
    "A target whose texts name the feature that steers them; `missed`: (feature, kl) that the search does not reach"
    def __init__(self, missed=()):
        self.missed = missed
        self.searched = []
    def steering_values(self, feature, kls, prompts, reference):
        self.searched += [(feature, kl) for kl in kls]
        return [SimpleNamespace(value=10*kl, kl=kl, reached=(feature, kl) not in self.missed) for kl in kls]
    def generate(self, prompts, feature, **how): return [f'feature {one}' for one in feature]


class Hears:
    "A model to which an explanation is likely behind a text that holds it"
    def log_probs(self, contexts, wanted):
        return [10.*(text.strip() in context) - len(text) for context, text in zip(contexts, wanted)]


class Says:
    "A capable judge that always says the same"
    def __init__(self, text): self.text = text
    def write(self, requests, **how): return [Reply(self.text) for _ in requests]


@pytest.fixture
def store(tmp_path):
    with RunStore(tmp_path/'store.sqlite') as store: yield store


# clamps

def test_each_clamp_is_searched_once():
    searches = searches_for([7, 7], POOL, dataclasses.replace(HOW, kl=(.5, .5)), seed=0)
    assert [search.control for search in searches] == [0, 1, 2]


def test_the_first_condition_is_the_feature_itself():
    searches = searches_for([7], POOL, HOW, seed=0)
    assert [search.steered for search in searches[::2]] == [7, *control_features(7, POOL, 2, 0)]


def test_a_control_of_two_features_is_searched_once(store):
    target = Stub()
    assert calibrate(store, target, [3, 4], PRESET, [3, 4, 5]) == 2*3*2 # the pool is so small that all share it
    assert len(target.searched) == len(set(target.searched)) == 3*2


def test_a_missed_target_of_a_control_is_left_out(store):
    control = control_features(7, POOL, 2, PRESET.seed)[1]
    calibrate(store, Stub(missed=[(control, .5)]), [7], PRESET, POOL)
    assert usable_targets(store, [7], HOW) == {7: [-.5]}


def test_a_search_still_to_be_made_counts_as_missed(store): assert usable_targets(store, [7], HOW) == {7: []}


def test_sets_stand_behind_their_prompts(store):
    assert steer(store, Stub(), [7], PRESET, POOL) == 3*2*2
    own, *others = steered_sets(store, 7, HOW)
    assert own == ['I think feature 7', 'We feature 7']*2
    assert len(others) == 2


def test_without_a_usable_target_there_are_no_sets(store):
    steer(store, Stub(missed=[(7, .5), (7, -.5)]), [7], PRESET, POOL)
    assert steered_sets(store, 7, HOW) == []


# verdicts

CASE = Case(Claim(7, 'rain', ('sft', 'dpo1')), [['some rain'], ['sun'], ['fog']])


def test_the_order_depends_on_the_claim_alone():
    assert shuffled(CASE, 0).order == shuffled(dataclasses.replace(CASE, claim=Claim(7, 'rain')), 0).order


def test_orders_of_features_differ():
    orders = {tuple(shuffled(Case(Claim(feature, 'rain'), CASE.sets), 0).order) for feature in range(40)}
    assert len(orders) == 6


def test_the_local_judge_takes_the_set_that_makes_the_explanation_likeliest():
    cases = [('rain', [['sun'], ['wind', 'some rain'], ['fog']]), ('a longer one', [['a longer one'], ['b']])]
    assert judge_locally(Hears(), cases) == [(1, [0., 10., 0.]), (0, [10., 0.])]


@pytest.mark.filterwarnings('ignore:invalid value')
@pytest.mark.parametrize('bad', [float('nan'), float('-inf')])
def test_scores_that_are_no_numbers_are_no_choice(bad):
    broken = SimpleNamespace(log_probs=lambda contexts, wanted: [bad]*len(contexts))
    assert judge_locally(broken, [('rain', [['a'], ['b']])])[0].choice is None


@pytest.mark.parametrize('reply, choice', [('B', 1), (' C ', 2), ('', None), ('D', None), ('AB', None), (None, None)])
def test_a_reply_that_is_no_letter_is_no_choice(reply, choice):
    (_, verdict), = verdicts_by_letter(Says(reply), [shuffled(CASE, 0)], 3)
    assert verdict == Verdict(choice)


def test_a_verdict_is_stored_under_every_stage_of_the_claim(store):
    judge_cases(store, Hears(), [CASE], PRESET)
    rows = store.judgements()
    assert rows['stage'].tolist() == ['dpo1', 'sft']
    assert (rows['choice'] == rows['true']).all()
    assert json.loads(rows['scores'][0])['order'] == shuffled(CASE, PRESET.seed).order


@pytest.mark.parametrize('preset, writer', [(PRESET, Hears()), (CAPABLE, Says('A'))])
def test_each_explanation_is_judged_once(store, preset, writer):
    steer(store, Stub(), [7], PRESET, POOL)
    said = {'sft': {7: 'feature 7', 8: 'no texts'}, 'dpo1': {7: 'feature 7'}}
    store.put_explanations([(stage, f, 0, text) for stage, texts in said.items() for f, text in texts.items()])
    assert judge(store, writer, said, preset) == 1
    assert judge(store, writer, said | {'dpo2': {7: 'feature 7'}}, preset) == 0
    assert store.judgements()['stage'].tolist() == ['dpo1', 'dpo2', 'sft']
    assert store.judgements()['choice'].nunique() == 1


# controls

LABELS = {7: 'ships', 8: 'rain', 9: 'a dog', 10: 'rain'}


@pytest.fixture
def labelled(store):
    store.put_texts([('label', feature, 0, 'generative', j, f'{text} {j}', None, None)
                     for feature, text in LABELS.items() for j in range(6)])
    return store


def test_controls_are_texts_written_from_other_labels(labelled):
    case, = control_cases(labelled, {'label': LABELS}, [8], HOW, seed=0)
    assert case.claim == Claim(8, 'rain', ('control',))
    assert case.sets[0] == ['rain 0', 'rain 1', 'rain 2', 'rain 3'] # as many as there are steered ones
    assert {texts[0] for texts in case.sets[1:]} == {'ships 0', 'a dog 0'} # feature 10 has the same label


def test_sets_of_controls_are_equally_long(labelled):
    labelled.put_texts([('label', 11, 0, 'generative', 0, 'snow', None, None)])
    case, = control_cases(labelled, {'label': LABELS | {11: 'snow'}}, [11], HOW, seed=0)
    assert [len(texts) for texts in case.sets] == [1, 1, 1]


def test_without_enough_other_labels_there_are_no_controls(labelled):
    assert control_cases(labelled, {'label': {7: 'ships', 8: 'rain', 10: 'rain'}}, [8], HOW, seed=0) == []


def test_without_labels_the_first_stage_gives_the_controls(store):
    store.put_texts([('mine', f, 0, 'generative', 0, text, None, None) for f, text in LABELS.items()])
    assert judge_controls(store, Hears(), {'mine': LABELS, 'label': {}}, [7, 9], PRESET) == 2
    assert judge_controls(store, Hears(), {'mine': LABELS, 'label': {}}, [7, 9], PRESET) == 0
    assert set(store.judgements()['stage']) == {'control'}
