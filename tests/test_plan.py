"What a run takes: numbers worked out by hand for a preset of a few features"
import json
from pathlib import Path
import pandas as pd
import pytest
from saeexplainer.plan import (
    A100, DRIVER_ROWS, cluster_hours, cluster_plan, cpu_hours, dollars, evaluated, evaluation_hours, hours,
    lengths_of, plan, stored_rows, work, worker_memory, writer_work,
)
from saeexplainer.presets import load_preset

ROOT = Path(__file__).parents[1]
LENGTHS = dict(prompt=10, label=5, explanation=4, text=20, distinct=.5)
SMALL = dict(n_sft=100, sft_epochs=2., n_pref=10, dpo_rounds=1, dpo_epochs=3., n_candidates=4, n_texts=2, n_test=5,
             n_output=2, n_generative=3, n_activating=1, n_neutral=1, n_controls=2, baselines=(), baseline_labels=())
STEERED = dict(steering_kl=(.5, -.5), steering_prompts=('I think',), steering_tokens=10)


def preset(**fields):
    "A preset of few features, whose writers are the target itself"
    return load_preset('smollm2-135m', **SMALL | STEERED | fields)


def jobs(**fields):
    "Tokens of each stage and kind"
    return work(preset(**fields), LENGTHS).groupby(['stage', 'kind']).tokens.sum().to_dict()


def test_tokens_of_training():
    found = jobs()
    assert found['sft', 'train'] == 100*2*(10 + 5)
    assert found['dpo1', 'train'] == pytest.approx(.8*10*3*2*(10 + 4))


def test_tokens_of_preferences():
    found = jobs()
    explanations = 10*4*4
    texts = 10*4*.5*2*20
    assert found['prefs1', 'write'] == explanations + texts
    assert found['prefs1', 'read'] == texts


def test_own_words_are_read_and_no_text_is_written():
    found = jobs(reward='self')
    assert found['prefs1', 'write'] == 10*4*4
    assert found['prefs1', 'read'] == 10*4*.5*2*4
    assert writer_work(preset(reward='self', writer='far'), LENGTHS).empty


def test_lookups_are_candidates_that_no_explainer_writes():
    found = jobs(candidate_lookups=['nearest token', 'nearest label'])
    assert found['prefs1', 'write'] - 10*4*4 == 10*(4*.5 + 5 + 1)*2*20
    asked = writer_work(preset(candidate_lookups=['nearest label'], writer='far', text_form='list'), LENGTHS)
    assert asked.requests.tolist() == [10*(4*.5 + 1)]


def test_a_server_writes_texts_elsewhere():
    assert jobs(writer='far')['prefs1', 'write'] == 10*4*4


def test_tokens_of_the_evaluation():
    assert evaluated(preset()) == 3 # labels, SFT, one round
    found = jobs()
    texts = 5*3*(3 + 1 + 1)*20
    searches = 2*(1 + 2)
    steered = searches*2*1*10
    judged = steered + searches*3*4
    assert found['evaluate', 'write'] == texts + steered
    assert found['evaluate', 'read'] == texts + searches*6*12*5 + judged


def test_the_best_candidate_is_sampled_for_test_features():
    more = jobs(baselines=('best',))['evaluate', 'read'] - jobs()['evaluate', 'read']
    texts_of_another = 5*5*20
    judged_of_another = 6*4
    assert more == pytest.approx(5*4*.5*2*20 + texts_of_another + judged_of_another)


def test_operations_are_those_of_a_pass_up_to_the_layer():
    rows = work(preset(), LENGTHS).set_index(['stage', 'kind'])
    parameters = .135e9
    assert rows.loc[('prefs1', 'read'), 'operations'].item() == pytest.approx(400*20/10*2*10/30*parameters)
    assert rows.loc[('sft', 'train'), 'operations'].item() == pytest.approx(3000*4*parameters)
    assert rows.loc[('dpo1', 'train'), 'operations'].item() == pytest.approx(.8*10*3*2*14*6*parameters)


def test_hours_on_a_card():
    an_hour = [312e12*.35*3600, 312e12*.08*3600]
    rows = pd.DataFrame(dict(stage='a', kind=['read', 'train'], tokens=1., operations=an_hour))
    assert hours(rows, 1.).to_dict() == {'a': pytest.approx(2.)}
    written = pd.DataFrame(dict(stage=['a'], kind=['write'], tokens=[64*3600.*250], operations=[0.]))
    assert A100.bytes_per_second*A100.writing == 250*2*1e9
    assert hours(written, 1.).to_dict() == {'a': pytest.approx(1.)}


def test_hours_on_two_cores():
    rows = pd.DataFrame(dict(stage=['a', 'b', 'a'], operations=[3600., 7200., 3600.]))
    assert cpu_hours(rows, rate=1.).to_dict() == {'a': 2., 'b': 2.}


def test_hours_of_an_evaluation_are_shared_by_explanations():
    whole = evaluation_hours(preset(), features=5, explanations=15)
    assert evaluation_hours(preset(), features=5, explanations=5) == pytest.approx(whole/3)


def test_requests_of_a_server():
    asked = writer_work(preset(writer='far', evaluation_writer='far', n_output=2), LENGTHS).requests.to_dict()
    assert asked == {
        'texts for preferences': 10*4*.5,
        'generative accuracy': 5*3,
        'activating and neutral': 5*3,
        'judge': 2*(3 + 1)}


def test_a_request_for_each_text_where_one_is_wanted():
    one = writer_work(preset(evaluation_writer='far', text_form='one'), LENGTHS)
    assert one.loc['generative accuracy', 'requests'] == 5*3*3
    assert one.loc['generative accuracy', 'tokens_out'] == 5*3*3*20
    lists = writer_work(preset(evaluation_writer='far', text_form='list'), LENGTHS)
    assert lists.loc['generative accuracy', 'tokens_out'] == 5*3*(3*20 + 12)


def test_dollars_are_those_of_the_model_that_is_asked():
    priced = preset(writer='cheap', evaluation_writer='dear', prices={'cheap': (1, 2), 'dear': (10, 20)})
    asked = pd.DataFrame(dict(tokens_in=1e6, tokens_out=1e6), index=['texts for preferences', 'judge'])
    assert dollars(priced, asked) == 1 + 2 + 10 + 20


def test_what_is_not_known_is_none():
    unknown = preset(target='org/unknown', writer='far', prices={})
    found = plan(unknown)
    assert found['hours'] is found['stages'] is found['machine'] is found['memory_gb'] is None
    assert found['dollars'] is None
    assert found['requests'] > 0
    assert evaluation_hours(unknown, 5, 5) is None
    with pytest.raises(ValueError, match='the size of org/unknown is not known'): work(unknown)


def test_features_of_each_split():
    same = plan(preset())['features']
    assert same == {'sft': 100, 'validation': 8, 'preferences': 10, 'test': 5}
    new = preset(dpo_rounds=2, dpo_beta=(.1, .1), dpo_lr=(1e-5, 1e-5), new_features_in_round_2=True)
    assert plan(new)['features']['preferences'] == 20


def test_lengths_go_by_the_explainer():
    assert lengths_of(preset())['explanation'] < lengths_of(preset(explainer='org/unknown'))['explanation']


@pytest.mark.parametrize('name', ['autointerp', 'contrastive'])
def test_a_writer_that_reads_contexts_is_asked_once_a_feature(name):
    asked = writer_work(preset(evaluation_writer='far', baselines=(name,)), LENGTHS)
    assert asked.loc[name, 'requests'] == 5


# workers

def test_rows_of_preferences_are_candidates_and_texts_with_scores():
    found = stored_rows(preset(), LENGTHS)
    assert found['prefs1'] == 10*4 + 10*4*.5*2*6
    assert stored_rows(preset(reward='self'), LENGTHS)['prefs1'] == 10*4 + 10*4*.5*4


def test_rows_of_the_evaluation():
    explained = 5*3*(1 + 6*5)
    clamps = 2*3*2
    assert stored_rows(preset(), LENGTHS)['evaluate'] == explained + clamps*(1 + 1) + 2*(3 + 1)
    more = stored_rows(preset(baselines=['best']), LENGTHS)['evaluate']
    assert more > 5*4*(1 + .5*2*6) + explained # candidates of the test features


def test_workers_share_all_but_online_rl():
    stages = dict(sft=1., prefs1=4., dpo1=1., grpo=2., evaluate=4.)
    assert cluster_hours(stages, 1) == (6, 24)
    training = 2/(1 + 3*.8) # each further process is assumed to add 80% of the first one's speed
    assert cluster_hours(stages, 4) == pytest.approx(((2 + training + 2)/2, (2 + training + 2)*2))


def test_a_worker_holds_one_model():
    two = load_preset('gemma-2-9b-l20')
    large = load_preset('gemma-2-9b-l20', evaluation_writer='local:google/gemma-2-27b-it')
    assert worker_memory(two) < plan(two)['memory_gb'] - 15
    assert worker_memory(large) - worker_memory(two) > 2*(27 - 10)
    assert worker_memory(load_preset('gemma-2-9b-l20', evaluation_writer='local:org/unknown')) is None


def test_what_workers_bring_is_held_against_what_the_driver_takes():
    nine = load_preset('gemma-2-9b-l20')
    one, eight = (cluster_plan(nine, plan(nine), workers) for workers in (1, 8))
    assert eight['workers_rows'] == 8*one['workers_rows'] < DRIVER_ROWS == eight['driver_rows']
    assert eight['workers_gb'] == 8*one['worker_gb']
    assert eight['workers_disk_gb'] == (plan(nine)['disk_gb'], 8*plan(nine)['disk_gb'])
    assert eight['cluster_hours'][0] < one['cluster_hours'][0]


def test_the_driver_is_as_fast_as_it_was_measured():
    rows = json.loads((ROOT/'bench'/'results.json').read_text(encoding='utf-8'))
    [measured] = [row['per_second'] for row in rows if row['what'].startswith('memory of the driver')]
    assert DRIVER_ROWS == pytest.approx(measured, rel=.1)


def test_what_is_not_known_of_a_cluster():
    strange = load_preset('gemma-2-9b-l20', target='org/unknown')
    found = cluster_plan(strange, plan(strange), 8)
    assert [name for name, value in found.items() if value is not None] == ['workers', 'driver_rows']
