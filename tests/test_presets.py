import dataclasses, re, time
import pandas as pd
import pytest
from saeexplainer.presets import Preset, data_dir, diff, field_help, load_preset, preset_table, presets

ALL = [(n, s) for n in presets() for s in (['full', 'demo'] if n == 'smollm2-135m' else ['full'])]


def message(call, *args, kind=ValueError, **kwargs):
    with pytest.raises(kind) as e: call(*args, **kwargs)
    assert '\n' not in str(e.value)
    return str(e.value)


def test_names_are_those_of_the_design():
    assert set(presets()) == {'gemma-2-9b-l20', 'gemma-2-9b-l31', 'llama3.1-8b-l15', 'llama3.1-8b-l25', 'gemma-2-27b-l10', 'gemma-2-27b-l22',
                              'gemma-2-9b-l4', 'gemma-2-9b-l12', 'gemma-2-9b-l29', 'gemma-2-9b-l37', 'gemma-2-27b-l34',
                              'gemma-2-2b-l12', 'gemma-3-270m-l12', 'gpt2-small-l8', 'smollm2-135m'}


@pytest.mark.parametrize('name,size', ALL)
def test_each_preset_is_whole_and_reads_back(name, size, tmp_path):
    p = load_preset(name, size=size)
    assert (p.name, p.size) == (name, size)
    file = tmp_path/'other.yaml'
    file.write_text(p.to_yaml())
    assert load_preset(file) == p == load_preset(str(file)) and diff(p, load_preset(file)) == ''
    assert re.search(r'l?\b(\d+)', p.source.split('/')[1])[1] == str(p.layer)


@pytest.mark.parametrize('name', [n for n in presets() if n != 'smollm2-135m'])
def test_values_of_appendix_b(name):
    p = load_preset(name)
    assert (p.sft_lr, p.sft_epochs, p.sft_warmup, p.sft_weight_decay) == (5e-5, 2.5, .03, .01)
    assert (p.lora_r, p.lora_alpha, p.lora_dropout) == (32, 64, .05)
    assert (p.n_candidates, p.n_texts, p.spread, p.margin, p.candidate_temperature, p.candidate_top_p) == (6, 4, .10, .15, .9, .9)
    assert (p.dpo_rounds, p.dpo_beta, p.dpo_lr, p.dpo_loss, p.dpo_sft_weight, p.reward) == (2, (.1, .15), (5e-6, 3e-6), 'sigmoid', 0, 'max')
    assert (p.n_test, p.n_generative, p.n_activating, p.n_neutral, p.success, p.n_controls) == (300, 10, 5, 5, .5, 2)
    assert p.evaluation_writer == 'gpt-5.4-mini' and p.steering_kl == (.25, .5, -.25, -.5) and p.injection_layer == 1
    assert p.sft_batch * p.sft_accumulation == 16 and p.dpo_batch * p.dpo_accumulation == 16


def test_table_1_and_4_of_the_paper():
    paper = data_dir()/'paper'
    one, four = pd.read_csv(paper/'table1.csv'), pd.read_csv(paper/'table4.csv')
    assert len(one) == 30 and not one.isna().any().any() and (one.high - one.low - one.gap).abs().max() < 1e-9
    assert set(zip(one.model, one.layer_slot, one.layer)) == set(zip(four.model, four.layer_slot, four.layer))
    features = {(row.model, row.layer): row.sae_features for row in four.itertuples()}
    for row in four.itertuples():
        p = load_preset(f'{row.model}-l{row.layer}')
        rounds = 1 + p.new_features_in_round_2
        assert p.n_sft + rounds*p.n_pref + p.n_test <= features[row.model, row.layer]


def test_public_saes_are_known_to_sae_lens():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    known = get_pretrained_saes_directory()
    for name in presets():
        p = load_preset(name)
        if ':' not in p.sae: continue
        release, sae_id = p.sae.split(':', 1)
        assert sae_id in known[release].saes_map, p.sae
        assert known[release].neuronpedia_id[sae_id] == p.source


def test_overrides_and_their_types():
    p = load_preset('smollm2-135m', size='full', sft_lr=1, dpo_lr=['1e-4', 5e-5], n_sft=12., threshold='2.5', layer=3)
    assert (p.sft_lr, p.dpo_lr, p.n_sft, p.threshold, p.layer) == (1., (1e-4, 5e-5), 12, 2.5, 3) and isinstance(p.n_sft, int)
    assert load_preset(p, seed=4) == dataclasses.replace(p, seed=4) != p
    with pytest.raises(dataclasses.FrozenInstanceError): p.seed = 1
    assert hash(p) == hash(load_preset(p))


def test_published_rules_count_what_equals_a_threshold():
    assert load_preset('smollm2-135m', rules='published').pair_rule.inclusive is True
    assert load_preset('smollm2-135m').pair_rule.inclusive is False


@pytest.mark.parametrize('fields,says', [
    (dict(n_sft='many'), "preset field n_sft must be a whole number, not 'many'"),
    (dict(n_sft=1.5), 'preset field n_sft must be a whole number, not 1.5'),
    (dict(n_sft=True), 'preset field n_sft must be a whole number, not True'),
    (dict(n_sft=0), 'preset field n_sft must be more than 0, not 0'),
    (dict(sft_lr=float('nan')), 'preset field sft_lr must be a number, not nan'),
    (dict(dpo_lr=.1), 'preset field dpo_lr must be a list, each item a number, not 0.1'),
    (dict(dpo_lr=[1e-5]), 'dpo_beta and dpo_lr need one value for each of the 2 rounds'),
    (dict(swap_models='yes'), "preset field swap_models must be true or false, not 'yes'"),
    (dict(label_model=3), 'preset field label_model must be text or null, not 3'),
    (dict(threshold='low'), "threshold must be a number or 'auto', not 'low'"),
    (dict(template='no place for it'), 'template must contain {placeholder} exactly once'),
    (dict(reward='median'), "reward must be 'max' or 'mean', not 'median'"),
    (dict(n_candidates=1), 'n_candidates must be 2 or more'),
    (dict(n_output=301), 'n_output (301) cannot be more than n_test (300)'),
    (dict(dtype='int8'), "dtype must be 'bfloat16'"),
    (dict(steering_kl=[0]), 'steering_kl has a target of 0'),
    (dict(dpo_rounds=0), 'dpo_rounds must be 1 or more'),
    (dict(candidate_top_p=0.), 'top_p must be more than 0 and at most 1'),
    (dict(text_top_p=1.5), 'top_p must be more than 0 and at most 1'),
    (dict(n_controls=10), 'n_controls must be 1 to 9, not 10'),
    (dict(n_pref=0), 'preset field n_pref must be more than 0, not 0'),
    (dict(source='gemma'), "source must be 'model/source', not 'gemma'"),
    (dict(sft_rl=1e-4), "a preset has no field 'sft_rl': did you mean sft_lr"),
    (dict(zzzzzz=1), "a preset has no field 'zzzzzz': see `saeexplainer presets`"),
    (dict(size='demo'), "preset gemma-2-9b-l20 has no size 'demo': use full"),
    (dict(steering_temperature=-1), 'preset field steering_temperature must be 0 or more, not -1.0'),
    (dict(text_temperature=-.1), 'preset field text_temperature must be 0 or more, not -0.1'),
    (dict(candidate_temperature=1e-300), 'preset field candidate_temperature must be 1e-06 to 1e+06, not 1e-300'),
    (dict(text_temperature=1e-40), 'preset field text_temperature must be 0 or from 1e-06 to 1e+06, not 1e-40'),
    (dict(steering_temperature=1e300), 'preset field steering_temperature must be 0 or from 1e-06 to 1e+06, not 1e+300'),
    (dict(n_output=-1), 'preset field n_output must be 0 or more, not -1'),
    (dict(seed=-1), 'preset field seed must be 0 or more, not -1'),
    (dict(layer=-1), 'preset field layer must be 0 or more, not -1'),
    (dict(success=-1), 'preset field success must be more than 0 and at most 1, not -1.0'),
    (dict(success=0), 'preset field success must be more than 0 and at most 1, not 0.0'),
    (dict(lora_dropout=1), 'preset field lora_dropout must be at least 0 and less than 1, not 1.0'),
    (dict(sft_warmup=-.1), 'preset field sft_warmup must be at least 0 and less than 1, not -0.1'),
    (dict(spread=2), 'preset field spread must be 0 to 1, not 2.0'),
    (dict(margin=-.2), 'preset field margin must be 0 to 1, not -0.2'),
    (dict(dpo_sft_weight=-1), 'preset field dpo_sft_weight must be 0 or more, not -1.0'),
    (dict(steering_prompts=[]), 'steering_prompts must hold at least one prompt'),
    (dict(steering_prompts=['I think', ' ']), 'preset field steering_prompts must not be empty'),
    (dict(steering_kl=[]), 'steering_kl must hold at least one target'),
    (dict(dpo_lr=[-1, -1]), 'dpo_lr must hold numbers above 0, not (-1.0, -1.0)'),
    (dict(dpo_beta=[.1, 0]), 'dpo_beta must hold numbers above 0, not (0.1, 0.0)'),
    (dict(baselines=['best', 'best']), "baselines holds one of them twice: ('best', 'best')"),
    (dict(baselines=['nearest']), "baselines are 'autointerp', 'untrained', 'best', 'nearest token'"),
    (dict(baselines=['logit lens', 'logit lens']), 'baselines holds one of them twice'),
    (dict(rules='ours'), "rules must be 'paper' or 'published', not 'ours'"),
    (dict(negative='upper half'), "negative must be 'hard', 'lower half' or 'worst', not 'upper half'"),
    (dict(baseline_labels=['gpt-5', 'gpt-5']), 'baseline_labels holds one of them twice'),
    (dict(baseline_labels=['label']), 'baseline_labels are names of models'),
    (dict(baseline_labels=['dpo1']), 'baseline_labels are names of models'),
    (dict(baseline_labels=['sft']), 'baseline_labels are names of models'),
    (dict(sft_epochs=1e-9), 'is less than one row: there is nothing to train on'),
    (dict(dpo_epochs=1e-9), 'is less than one pair: there is nothing to train on'),
    (dict(max_length=1), 'max_length (1) must be more than explanation_tokens (64)'),
    (dict(placeholder=''), 'preset field placeholder must not be empty'),
    (dict(placeholder='  '), 'preset field placeholder must not be empty'),
    (dict(writer=''), 'preset field writer must not be empty'),
    (dict(writer='local:'), "a writer 'local:' lacks the name of its model"),
    (dict(label_model=''), 'preset field label_model must not be empty'),
    (dict(sae='a\0b'), 'preset field sae holds a NUL character'),
    (dict(template='half \ud83d of {placeholder}'), 'preset field template holds half a character'),
    (dict(name='../../evil'), 'name and size must be names that stay in their folder'),
    (dict(name='/evil'), 'name and size must be names that stay in their folder'),
    (dict(source='../..'), 'source must be a name that stays in its folder'),
    (dict(source='model/..'), 'source must be a name that stays in its folder'),
    (dict(n_sft=10**400), 'preset field n_sft must be a whole number'),
    (dict(sft_lr=10**400), 'preset field sft_lr must be a number'),
    (dict(n_sft=10**6000), 'preset field n_sft must be a whole number'),
    (dict(preset='smollm2-135m'), "a preset has no field 'preset': did you mean base"),
])
def test_bad_fields_get_one_line(fields, says):
    assert says in message(load_preset, 'gemma-2-9b-l20', **fields)


def test_the_home_folder_may_be_written_short(tmp_path, monkeypatch):
    from saeexplainer.lm.models import cache_dir
    monkeypatch.setenv('HOME', str(tmp_path))
    fields = dict(target='~/model', explainer='~/model', sae='~/sae', features='~/features.parquet', corpus='~/texts/*.txt', ao_adapter='~/oracle', writer='local:~/writer', evaluation_writer='local')
    p = load_preset('gemma-2-9b-l20', **fields)
    assert {k: getattr(p, k) for k in fields} == {k: v.replace('~', str(tmp_path)) for k, v in fields.items()}
    assert p.template == load_preset('gemma-2-9b-l20').template and load_preset('smollm2-135m', template='~{placeholder}').template == '~{placeholder}'
    monkeypatch.setenv('SAEEXPLAINER_DATA', '~/data')
    monkeypatch.setenv('SAEEXPLAINER_CACHE', '~/cache')
    assert data_dir() == tmp_path/'data' and cache_dir() == tmp_path/'cache'


@pytest.mark.parametrize('text, says', [
    ('base: [1]', 'unknown preset [1]'),
    ('base: smollm2-135m\nsize: [1]', 'has no size [1]'),
    ('base: smollm2-135m\nsize: {a: 1}', 'has no size'),
    ('size: [1]', 'lacks target'),
    ('preset: smollm2-135m', 'did you mean base, as in "base: smollm2-135m"?'),
    ('1: 2', 'has no field 1'),
    ('[1]: 2', 'is not YAML'),
    ('seed: ' + '1'*5000, 'is not YAML, or not a preset'),
    ('seed: 2024-13-45', 'is not YAML, or not a preset'),
    ('seed: ' + '['*5000, 'nested more than 20 deep'),
    ('a: &a [x, x]\nsteering_prompts: *a', 'it has the alias *a: write out what it stands for'),
    ('seed: ' + '1'*200_000, 'more than 100,000 characters'),
    ('\0', 'is not YAML')])
def test_yaml_that_is_no_preset(tmp_path, text, says):
    (tmp_path/'bad.yaml').write_text(text)
    assert says in message(load_preset, tmp_path/'bad.yaml')


def test_a_folder_is_no_preset(tmp_path):
    (tmp_path/'folder.yaml').mkdir()
    assert 'is a folder, not a preset file' in message(load_preset, tmp_path/'folder.yaml')


def test_aliases_are_not_unfolded(tmp_path):
    "Nine lines that stand for a billion items"
    lines = ['a: &a [x, x, x, x, x, x, x, x, x]'] + [f'{b}: &{b} [{", ".join([f"*{a}"]*9)}]' for a, b in zip('abcdefgh', 'bcdefghi')]
    (tmp_path/'bomb.yaml').write_text('\n'.join([*lines, 'n_sft: *i']))
    begun = time.monotonic()
    assert 'alias' in message(load_preset, tmp_path/'bomb.yaml') and time.monotonic() - begun < 5
    nested = 'x'
    for _ in range(60): nested = [nested]*9
    for field in ('n_sft', 'steering_kl', 'prices', 'name'):
        assert len(message(load_preset, 'smollm2-135m', **{field: nested})) < 1000 and time.monotonic() - begun < 5


def test_a_preset_of_a_file_is_called_by_its_file(tmp_path):
    (tmp_path/'my own.yaml').write_text('base: smollm2-135m')
    p = load_preset(tmp_path/'my own.yaml')
    assert p.called == f"'{tmp_path}/my own.yaml'" == load_preset(p, seed=1).called and load_preset('smollm2-135m').called == 'smollm2-135m'
    assert p == load_preset('smollm2-135m', name='my own')


def test_unknown_presets_get_one_line():
    assert 'did you mean smollm2-135m' in message(load_preset, 'smollm-135m')
    assert 'see `saeexplainer presets`' in message(load_preset, 'qqq')
    assert 'did you mean demo' not in message(load_preset, 'smollm2-135m', size='tiny')
    assert 'demo' in message(load_preset, 'smollm2-135m', size='tiny')


def test_yaml_files(tmp_path):
    file = tmp_path/'mine.yaml'
    def read(text, **overrides):
        file.write_text(text)
        return load_preset(file, **overrides)
    p = read('base: smollm2-135m\nsize: full\nsft_lr: 5e-5\ndpo_lr: [1e-5, 2e-5]\n', seed=3)
    assert (p.name, p.size, p.n_sft, p.sft_lr, p.dpo_lr, p.seed) == ('mine', 'full', 2350, 5e-5, (1e-5, 2e-5), 3)
    assert read('base: smollm2-135m\nsft_lr: 5e-5', size='full').n_sft == 2350
    whole = load_preset('smollm2-135m', size='demo').to_yaml()
    assert read(whole, size='demo').size == 'demo' and "is of size 'demo' and names no preset" in message(read, whole, size='full')
    assert 'lacks target, explainer' in message(read, 'sft_lr: 1')
    assert f'{file} has no field \'lerning_rate\'' in message(read, 'base: smollm2-135m\nlerning_rate: 1')
    assert 'unknown preset' in message(read, 'base: nothing')
    assert 'is not YAML' in message(read, 'a: [1')
    assert 'must hold lines of the form' in message(read, '- a\n- b')
    assert 'must hold lines of the form' in message(read, '')
    assert message(load_preset, tmp_path/'none.yaml', kind=FileNotFoundError) == f'no preset file {tmp_path/"none.yaml"}'


def test_diff_names_each_changed_field():
    a = load_preset('smollm2-135m', size='full')
    assert diff(a, load_preset(a, sft_lr=1e-3, seed=1)).splitlines() == ['sft_lr: 0.0006 -> 0.001', 'seed: 0 -> 1']


def test_every_field_has_help_and_stands_in_the_table():
    assert all(field_help().values()) and set(field_help()) == {f.name for f in dataclasses.fields(Preset)}
    table = preset_table()
    assert set(table.index) | {'name', 'size'} == set(field_help()) and table.loc['n_sft', 'smollm2-135m (full)'] == 2350


@pytest.mark.parametrize('url, says', [('localhost:8000/v1', 'it begins with http:// or https://'), ('http://:80/v1', 'it names no host'), ('http://x:99999/v1', 'its port must be a number'), ('http://x/v1/chat/completions', 'it must be the base URL')])
def test_an_address_follows_the_rule_of_the_writer(url, says):
    with pytest.raises(ValueError, match=says): load_preset('smollm2-135m', writer_url=url)
