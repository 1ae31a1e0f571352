"Hints: the tokens that a direction is near to, in the prompt of an explainer, from training to use"
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import PLACEHOLDER
from judged import judged_preset
from trainings import WORDS as NAMED, features, tiny_preset, train_on

from saeexplainer.dpo import preference_dataset, preference_rows, train_dpo
from saeexplainer.explainer import CARD, Explainer, ExplainerCard, prompts_of
from saeexplainer.hints import (
    WORDS, Neighbour, TokenDictionary, dictionary_beside, feature_hints, hint_text, hint_words, place_of,
    with_hints,
)
from saeexplainer.lookups import dictionary_file, token_phrase
from saeexplainer.presets import AS_PAPER, HINTED_WORDS, load_preset
from saeexplainer.run import Run, execute, taught_features
from saeexplainer.saes import FeatureReader
from saeexplainer.sft import prompt_of

TEMPLATE = 'The feature {placeholder} is near to: {hints}. Which words?'
HINTED = dict(template=TEMPLATE, n_hints=2)


# ---- the dictionary's file

def test_a_saved_dictionary_is_loaded(tmp_path):
    dictionary = TokenDictionary((' rain', "'", '\n', '🌧'), torch.eye(4))
    dictionary.save(tmp_path/WORDS, dict(model='tiny'))
    assert [file.name for file in tmp_path.iterdir()] == [WORDS]
    loaded = TokenDictionary.load(tmp_path/WORDS, dict(model='tiny'))
    assert loaded.tokens == dictionary.tokens
    assert torch.equal(loaded.vectors, dictionary.vectors)


def test_a_dictionary_of_another_model(tmp_path):
    TokenDictionary((' rain',), torch.eye(1)).save(tmp_path/WORDS, dict(model='tiny'))
    with pytest.raises(ValueError, match='was made for the model tiny, not huge: delete it, and it is made anew'):
        TokenDictionary.load(tmp_path/WORDS, dict(model='huge'))


@pytest.mark.parametrize('content', [b'', b'not safetensors', b'\0'*64])
def test_a_broken_dictionary_gets_one_line(tmp_path, content):
    (tmp_path/WORDS).write_bytes(content)
    with pytest.raises(ValueError, match='is no dictionary of a model .*: delete it, and it is made anew') as error:
        TokenDictionary.load(tmp_path/WORDS, {})
    assert '\n' not in str(error.value)


def test_safetensors_of_something_else_get_one_line(tmp_path):
    from safetensors.torch import save_file
    save_file({'vectors': torch.eye(2)}, tmp_path/WORDS)
    with pytest.raises(ValueError, match='is no dictionary of a model'): TokenDictionary.load(tmp_path/WORDS, {})


def test_a_dictionary_in_eight_bits_as_earlier_versions_wrote_it_is_refused(tmp_path):
    from safetensors.torch import save_file
    old = {'vectors': torch.ones(2, 4, dtype=torch.int8)}
    save_file(old, tmp_path/WORDS, metadata=dict(width='4', tokens='[" rain", " sea"]'))
    with pytest.raises(ValueError, match='delete it, and it is made anew'): TokenDictionary.load(tmp_path/WORDS)


@pytest.mark.parametrize('width', [1, 16, 33])
def test_four_bits_keep_the_nearest_token(tmp_path, width):
    vectors = torch.nn.functional.normalize(torch.randn(50, width, generator=torch.Generator().manual_seed(0)), dim=1)
    dictionary = TokenDictionary(tuple(map(str, range(50))), vectors)
    dictionary.save(tmp_path/WORDS, {})
    loaded = TokenDictionary.load(tmp_path/WORDS)
    assert (loaded.vectors*vectors).sum(1).min() > .97
    if width == 1: return
    assert [row[0].token for row in loaded.nearest(vectors, k=1)] == list(dictionary.tokens)


def test_a_few_large_dimensions_do_not_take_all_levels(tmp_path):
    vectors = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    vectors[:, :2] *= 40 # as in a residual stream
    units = torch.nn.functional.normalize(vectors, dim=1)
    TokenDictionary(tuple(map(str, range(50))), units).save(tmp_path/WORDS, {})
    loaded = TokenDictionary.load(tmp_path/WORDS).vectors
    small = torch.nn.functional.cosine_similarity(loaded[:, 2:], units[:, 2:])
    assert small.min() > .95


def test_a_dimension_that_is_always_zero(tmp_path):
    vectors = torch.eye(4)
    vectors[3, 3] = 0
    vectors[3, 0] = 1
    TokenDictionary(tuple('abcd'), vectors).save(tmp_path/WORDS, {})
    assert not TokenDictionary.load(tmp_path/WORDS).vectors[:, 3].any()


# ---- the words of a hint

@pytest.mark.parametrize('tokens, words', [
    ([' child', ' Child', 'CHILD', ' parent'], ['child', 'parent']),
    ([' child', 'ren'], ['child', 'ren']),
    ([' (', '2', ' the'], ['(', '2']),
    (['\n', ' ', ' rain'], ['rain']),
    ([], []),
])
def test_tokens_are_named_once(tokens, words):
    assert hint_words([Neighbour(token, .5) for token in tokens], most=2) == words


def test_hints_are_quoted_as_explanations_quote_words():
    assert token_phrase([' rain', ' sea']) == f"words such as {hint_text(['rain', 'sea'])}"


def test_words_far_behind_the_nearest_are_no_hints():
    near = [Neighbour(' sure', .5), Neighbour(' certain', .31), Neighbour(' not', .29)]
    assert hint_words(near, most=3) == ['sure', 'certain']
    assert hint_words([Neighbour(' away', -.1), Neighbour(' off', -.2)], most=3) == [] # nothing is near


@pytest.mark.parametrize('hints', [PLACEHOLDER, f'a{PLACEHOLDER}b', '{placeholder}', PLACEHOLDER.strip()*2])
def test_a_hint_brings_no_second_placeholder(hints):
    filled = with_hints(TEMPLATE, hints, PLACEHOLDER)
    assert filled.count('{placeholder}') == 1
    assert PLACEHOLDER.strip() not in filled
    assert '{hints}' not in filled


def test_a_template_without_hints_stays_as_it_is():
    assert with_hints('What is {placeholder}?', 'rain', PLACEHOLDER) == 'What is {placeholder}?'


def test_a_prompt_without_the_hints_of_its_feature_is_refused():
    card = SimpleNamespace(template=TEMPLATE, placeholder=PLACEHOLDER)
    assert 'near to: rain.' in prompt_of(card, {5: 'rain'}, 5)[0]['content']
    with pytest.raises(KeyError): prompt_of(card, {5: 'rain'}, 8)


@pytest.mark.parametrize('fields', [
    dict(n_hints=0), dict(template='{placeholder}?'), dict(template=TEMPLATE*2, n_hints=1),
])
def test_a_preset_whose_template_does_not_fit_is_refused(fields):
    with pytest.raises(ValueError, match='template must contain'): load_preset('smollm2-135m', **fields)


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match='n_hints must be 0 or more'): load_preset('smollm2-135m', n_hints=-1)


# ---- an explainer that has learned from hints

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp('hints')
    preset = tiny_preset(folder, **HINTED)
    reader = FeatureReader.load(preset.sae)
    near = reader.encoders(range(len(NAMED)))
    dictionary = TokenDictionary(tuple(f' {word}' for word in NAMED), torch.nn.functional.normalize(near, dim=1))
    dictionary.save(folder/WORDS, place_of(reader))
    trained = train_on(preset, features(), folder/'sft', dictionary=folder/WORDS)
    return SimpleNamespace(folder=folder, preset=preset, reader=reader, sft=trained.folder)


@pytest.fixture(scope='module')
def explainer(world): return Explainer.from_pretrained(world.sft, reader=world.reader)


def test_training_needs_the_dictionary(world, tmp_path, monkeypatch):
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'empty'))
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'empty'))
    with pytest.raises(FileNotFoundError, match="no dictionary yet, whose words .*: a run makes it before its stage"):
        train_on(world.preset, features(), tmp_path/'sft')


def test_a_dictionary_of_another_layer_is_refused(world, tmp_path):
    other = place_of(world.reader) | dict(place='resid_post of layer 7')
    TokenDictionary((' rain',), torch.ones(1, world.reader.d_model)).save(tmp_path/WORDS, other)
    with pytest.raises(ValueError, match='was made for the place resid_post of layer 7, not resid_post of layer 2'):
        train_on(world.preset, features(), tmp_path/'sft', dictionary=tmp_path/WORDS)


def test_a_dictionary_of_another_width_is_refused(world):
    dictionary = TokenDictionary((' rain',), torch.ones(1, 5))
    with pytest.raises(ValueError, match='the dictionary has the width 5, the directions 64: it was made for another'):
        feature_hints(dictionary, world.reader, [0], 2)


def test_the_folder_holds_its_dictionary(world):
    assert sorted(file.name for file in world.sft.iterdir()) == [
        'adapter_config.json', 'adapter_model.safetensors', CARD, 'training.json', WORDS]
    assert ExplainerCard.load(world.sft).n_hints == 2


def test_each_prompt_names_its_own_tokens(world, explainer):
    prompts = prompts_of(explainer, world.reader.encoders([0, 3]))
    texts = [explainer.tokenizer.decode(ids) for ids in prompts]
    assert f"near to: '{NAMED[0]}'" in texts[0]
    assert f"near to: '{NAMED[3]}'" in texts[1]
    assert all(ids.count(explainer.placeholder_id) == 1 for ids in prompts)


def test_rows_of_one_batch_do_not_mix(world, explainer):
    features = range(len(NAMED))
    def said(some):
        return explainer.explain(world.reader.directions(some), max_new_tokens=6, encoders=world.reader.encoders(some))
    assert said(features) == [text for one in features for text in said([one])]


def test_an_encoder_for_each_direction(world, explainer):
    with pytest.raises(ValueError, match='1 encoder directions for 2 directions: give one for each'):
        explainer.explain(world.reader.directions([0, 3]), encoders=world.reader.encoders([0]))


def test_an_encoder_that_is_not_finite_is_refused(world, explainer):
    damaged = torch.full_like(world.reader.encoders([0]), float('nan'))
    with pytest.raises(ValueError, match='is not finite'):
        explainer.explain(world.reader.directions([0]), encoders=damaged)


def test_a_direction_without_an_encoder_is_looked_up_itself(world, explainer):
    directions = world.reader.directions([1, 2])
    alone = explainer.explain(directions, max_new_tokens=6)
    assert alone == explainer.explain(directions, max_new_tokens=6, encoders=directions)
    assert explainer.sample(directions, 2) == explainer.sample(directions, 2, encoders=directions)


def test_a_hint_changes_what_is_said(world, explainer):
    [direction] = world.reader.encoders([0])
    other = replace(explainer.dictionary, vectors=explainer.dictionary.vectors.roll(5, 0))
    hinted = prompts_of(explainer, direction[None])
    mine, explainer.dictionary = explainer.dictionary, other
    changed = prompts_of(explainer, direction[None])
    explainer.dictionary = mine
    assert hinted != changed


def test_a_copy_explains_the_same(world, explainer, tmp_path):
    explainer.save(tmp_path/'copy')
    again = Explainer.from_pretrained(tmp_path/'copy', reader=world.reader)
    directions = world.reader.directions([1, 2])
    assert again.explain(directions, max_new_tokens=6) == explainer.explain(directions, max_new_tokens=6)


def test_stages_share_a_dictionary_above_them(world, explainer, tmp_path):
    explainer.save(tmp_path/'dpo2')
    (tmp_path/'dpo2'/WORDS).rename(tmp_path/WORDS)
    assert Explainer.from_pretrained(tmp_path/'dpo2').dictionary.tokens == explainer.dictionary.tokens


def test_a_folder_without_its_dictionary_gets_one_line(world, explainer, tmp_path):
    explainer.save(tmp_path/'a'/'sft')
    (tmp_path/'a'/'sft'/WORDS).unlink()
    with pytest.raises(FileNotFoundError, match=f'has no {WORDS}, whose words the explainer needs'):
        Explainer.from_pretrained(tmp_path/'a'/'sft')


def test_another_dictionary_gets_one_line(world, explainer, tmp_path):
    explainer.save(tmp_path/'sft')
    TokenDictionary((' rain',), torch.ones(1, world.reader.d_model)).save(tmp_path/'sft'/WORDS, {})
    with pytest.raises(ValueError, match='is not the dictionary that the explainer was trained with'):
        Explainer.from_pretrained(tmp_path/'sft')


def test_a_card_with_hints_needs_a_dictionary(world, explainer):
    with pytest.raises(ValueError, match='the card asks for 2 hints: give the dictionary'):
        Explainer(explainer.model, explainer.tokenizer, explainer.card)


# ---- DPO

PAIRS = [dict(feature=index, chosen=f"the word '{word}'", rejected='a sea') for index, word in enumerate(NAMED[:8])]


def test_pairs_stand_behind_the_prompts_of_their_features(world, explainer):
    hints = feature_hints(explainer.dictionary, world.reader, range(8), 2)
    rows = preference_rows(preference_dataset(PAIRS, explainer.card, hints), explainer, 256)
    assert list(rows['prompt_ids']) == prompts_of(explainer, world.reader.encoders(range(8)))


def test_a_round_goes_on_with_the_hints(world, tmp_path):
    preset = replace(world.preset, dpo_epochs=1., dpo_batch=4)
    result = train_dpo(preset, PAIRS, world.reader, world.sft, tmp_path/'dpo1', progress=False)
    assert result.step0_loss == pytest.approx(.6931, abs=1e-3)
    trained = Explainer.from_pretrained(result.folder, reader=world.reader)
    assert trained.card.n_hints == 2
    assert trained.dictionary is not None


# ---- a whole run

ONLINE = dict(grpo_steps=2, grpo_reward='self', grpo_features=2, grpo_group=2)

def test_a_run_with_hints(tmp_path, monkeypatch):
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    fields = dict(HINTED, **ONLINE, reward='self', n_candidates=8, baselines=['untrained'])
    preset = load_preset(judged_preset(tmp_path, **fields))
    with Run(tmp_path/'run', preset, progress=False) as run:
        execute(run, say=lambda line: None)
        explained = set(run.store.explanations()['stage'])
    assert {'untrained', 'sft', 'dpo1', 'grpo'} <= explained
    for stage in ('dpo1', 'grpo'):
        folder = tmp_path/'run'/'explainer'/stage
        card = json.loads((folder/CARD).read_text())
        assert dictionary_beside(folder, card['dictionary_sha256']).parent == folder


def test_a_run_that_learns_the_hints_that_are_right(tmp_path, monkeypatch):
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    preset = load_preset(judged_preset(tmp_path, **HINTED, sft_labels=HINTED_WORDS))
    with Run(tmp_path/'run', preset, progress=False) as run:
        file = dictionary_file(preset, run.target, WORDS, progress=False)
        taught = taught_features(run, 'sft', file)
        hints = feature_hints(TokenDictionary.load(file), run.reader, run.splits['sft'], preset.n_hints)
        assert taught
        for feature in taught:
            word = run.features[feature.index].words[0]
            assert feature.explanation == f"the word '{word}'" # it stands at the only peak, a hint or not
        assert set(hints) == set(run.splits['sft'])
        execute(run, say=lambda line: None)
        assert 'sft' in set(run.store.explanations()['stage'])


def test_labels_of_hints_need_hints():
    run = SimpleNamespace(preset=load_preset('smollm2-135m', **AS_PAPER | dict(sft_labels=HINTED_WORDS)),
                          features={}, splits=dict(sft=[]))
    with pytest.raises(ValueError, match='hinted words are words of hints: set n_hints above 0, or sft_labels to null'):
        taught_features(run, 'sft')
