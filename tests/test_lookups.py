"Explanations that need no training: near tokens, probed tokens, neighbours' labels, and what is refused"
import math
import pytest
import torch
from helpers import ARCHITECTURES, WRAPPED, save_wrapped, tiny_model, tiny_tokenizer
from judged import context, judged_preset, running_documents, tiny_target
from saeexplainer.lm.hooks import decoder_layers, final_norm
from saeexplainer.lm.models import load_model
from saeexplainer.hints import TOKENS, WORDS
from saeexplainer.lookups import (
    IN_DICTIONARY, NEAREST, ONE_BY_ONE, Key, Means, check_dictionary, entries_of, keys_of, known_phrase,
    logit_lens, look_up, nearest_labels, neighbours_of, phrases_of, probe_vocabulary, random_labels,
    read_token_dictionary, spread, token_dictionary, token_phrase,
)
from saeexplainer.presets import CANDIDATE_LOOKUPS, LOOKUPS, load_preset
from saeexplainer.sources.reading import token_strings
from saeexplainer.target import Target, special_ids

DIRECTIONS = {0: torch.tensor([1., 0]), 1: torch.tensor([.9, .1]), 2: torch.tensor([0., 1])}


@pytest.fixture(scope='module')
def target(tmp_path_factory): return tiny_target(tmp_path_factory.mktemp('sae'))


@pytest.fixture(scope='module')
def preset(tmp_path_factory):
    folder = tmp_path_factory.mktemp('world')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SAEEXPLAINER_DATA', str(folder/'data'))
        patch.setenv('SAEEXPLAINER_CACHE', str(folder/'cache'))
        yield load_preset(judged_preset(folder))


# phrases

@pytest.mark.parametrize('tokens, phrase', [
    ([], ''),
    (['', ' ', '\n\t'], ''),
    (['\n', ' rain'], "the word 'rain'"),
    (['rain'], "'rain' inside a word"),
    (['('], "the word '('"),
    ([' Rain', ' rain', ' RAIN'], "the word 'Rain'"),
    ([' a', ' b', ' c', ' d'], "words such as 'a', 'b', 'c'"),
])
def test_phrases(tokens, phrase):
    assert token_phrase(tokens) == phrase


# the final norm, in every family

def assert_reads_last_state(model):
    ids = torch.tensor([[1, 20, 30, 40]])
    seen = []
    handle = decoder_layers(model)[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad(): logits = model(input_ids=ids).logits
    handle.remove()
    last = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    with torch.no_grad(): own = model.get_output_embeddings()(final_norm(model)(last))
    assert own.argmax(-1).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_final_norm_and_head_give_the_logits(arch):
    assert_reads_last_state(tiny_model(arch, n_layers=2))


@pytest.mark.parametrize('arch', [arch for arch in WRAPPED if arch != 'gemma3n']) # its streams are merged first
def test_final_norm_of_models_whose_layers_lie_elsewhere(arch, tmp_path):
    save_wrapped(tmp_path, arch)
    model, _ = load_model(str(tmp_path), 'float32', 'cpu')
    assert_reads_last_state(model)


def test_final_norm_of_gemma_3n(tmp_path):
    whole = save_wrapped(tmp_path, 'gemma3n')
    assert final_norm(whole) is whole.model.norm


def test_a_model_without_a_known_norm():
    with pytest.raises(ValueError, match='Linear has no final norm that is known here'):
        final_norm(WithoutNorm())


class WithoutNorm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Linear(2, 2)

    @property
    def base_model(self): return self.model


# logit lens

@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_the_lens_finds_the_tokens_whose_logits_are_largest(arch, tmp_path):
    lens = tiny_target(tmp_path, arch)
    directions = lens.reader.directions([3, 5])
    vocabulary = token_strings(lens.tokenizer)
    with torch.no_grad(): logits = lens.model.get_output_embeddings()(final_norm(lens.model)(directions))
    logits[:, list(special_ids(lens.tokenizer))] = -torch.inf
    best = logits[:, :len(vocabulary)].argmax(1).tolist()
    assert [row[0] for row in logit_lens(lens, directions)] == [vocabulary[token] for token in best]


def test_the_lens_with_a_tokenizer_that_knows_more_than_the_model(target):
    "A padding token that the model never saw"
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({'additional_special_tokens': ['<never seen>']})
    wider = Target(tiny_model(n_layers=3, vocab=len(tokenizer) - 1), tokenizer, target.reader)
    [tokens] = logit_lens(wider, wider.reader.directions([3]))
    assert '<never seen>' not in tokens


def test_the_lens_gives_at_most_all_tokens(target):
    [tokens] = logit_lens(target, target.reader.directions([3]), k=10**6)
    assert len(tokens) == len(target.tokenizer) - len(special_ids(target.tokenizer))


# neighbours

def test_the_nearest_label_is_of_another_feature():
    labels = {0: 'rain', 1: 'snow', 2: 'years'}
    assert nearest_labels(DIRECTIONS, labels, [0, 1, 2]) == {0: 'snow', 1: 'rain', 2: 'snow'}


@pytest.mark.parametrize('labels', [{}, {0: 'rain'}])
def test_no_label_of_another_feature(labels):
    for lookup in (lambda: nearest_labels(DIRECTIONS, labels, [0]), lambda: random_labels(labels, [0])):
        with pytest.raises(ValueError, match='feature 0 needs the label of another feature, and there is none'):
            lookup()


def test_random_labels_depend_on_seed_and_feature_alone():
    labels = {feature: f'label {feature}' for feature in range(50)}
    some = random_labels(labels, [3, 5, 8])
    assert some == {feature: random_labels(labels, [feature])[feature] for feature in (8, 5, 3)}
    assert some != random_labels(labels, [3, 5, 8], seed=1)
    assert all(text != f'label {feature}' for feature, text in some.items())


def test_labels_for_nothing():
    assert nearest_labels(DIRECTIONS, {1: 'snow'}, []) == {}
    assert random_labels({1: 'snow'}, []) == {}


# the dictionary of tokens

def test_means_are_those_of_all_places_of_an_entry():
    rng = torch.Generator().manual_seed(0)
    places = torch.randint(5, (40,), generator=rng)
    residuals = torch.randn(40, 3, generator=rng)
    means = Means(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long))
    for part in (slice(15), slice(15, 40)): means.add(places[part], residuals[part])
    centred = means.centred()
    assert len(centred) == 4 # the last row is for what has no entry
    for place, mean in enumerate(centred):
        assert torch.allclose(mean, residuals[places == place].mean(0) - residuals.mean(0), atol=1e-6)


@pytest.mark.parametrize('tokens, names', [
    ([' rain', ' fell', '.'], [' rain', ' fell', '.']),
    ([' enc', 'roach', 'es', ','], [' encroaches', ' encroaches', ' encroaches', ',']),
    (['Don', "'", 't', ' go'], [" Don't", " Don't", " Don't", ' go']),
    ([' Mon', 'roe', ' mon', 'roe'], [' Monroe', ' Monroe', ' monroe', ' monroe']),
    ([' 19', '90', '\n'], [' 1990', ' 1990', '\n']),
])
def test_a_piece_is_known_by_its_word(tokens, names):
    keys = [key for key, _ in keys_of(tokens, whole_words=True)]
    assert [key.name for key in keys] == names
    assert [key.token for key in keys] == tokens


@pytest.mark.parametrize('tokens, before', [
    ([' open', ' source', ' code'], ['', 'open', 'source']),
    ([' The', ' enc', 'roach', 'es', ','], ['', 'the', 'the', 'the', 'encroaches']),
    (['Don', "'", 't', ' go', '.', '\n'], ['', '', '', "don't", 'go', '.']),
    ([' the', ' the', ' 19', '90'], ['', 'the', 'the', 'the']),
    ([], []),
])
def test_the_word_before(tokens, before):
    assert [key.before for _, key in keys_of(tokens, whole_words=True)] == before


def test_windows_come_from_all_over_the_corpus():
    windows = [[place]*10 for place in range(100)]
    taken = spread(windows, tokens=200)
    assert len(taken) == 20
    assert [window[0] for window in taken] == list(range(4, 100, 5))
    assert spread(windows, tokens=2000) == windows
    assert spread([], tokens=10) == []


def test_each_source_of_the_corpus_is_read(target):
    docs = [('a', 'The rain fell on the sea and the land. '*60), ('b', 'A cat sat on the mat by the fire. '*60)]
    words = read_token_dictionary(target, docs, tokens=600, progress=False, whole_words=True).tokens
    assert {' rain', ' cat'} <= {word.casefold() for word in words}


def test_a_word_that_looks_different_behind_another_has_a_second_entry():
    sea = Key(' sea', ' sea')
    the, at, first = (sea._replace(before=word) for word in ('the', 'at', ''))
    rows = [[sea, the]]*30 + [[sea, at]]*9
    assert list(entries_of(rows, least=1)) == [sea] # 'the' nearly always, 'at' too seldom
    assert list(entries_of([*rows, [sea, at]], least=1)) == [sea, at]
    assert list(entries_of([[sea, the]]*10 + [[sea, first]]*10, least=1)) == [sea, the]


def test_pieces_of_one_word_are_entries_of_their_own():
    keys = [key for key, _ in keys_of([' enc', 'roach', ' enc', 'roach'], whole_words=True)]
    assert entries_of([keys], least=2) == {Key(' enc', ' encroach'): 0, Key('roach', ' encroach'): 1}


def test_the_most_frequent_entries_come_first():
    keys = [Key(token, token) for token in 'abbccc']
    assert [key.token for key in entries_of([keys], least=2)] == ['c', 'b']


def test_a_dictionary_of_a_tiny_model(target):
    dictionary = read_token_dictionary(target, running_documents(), progress=False)
    assert len(dictionary.tokens) > 20
    assert torch.allclose(dictionary.vectors.norm(dim=1), torch.ones(len(dictionary.tokens)))
    [own] = dictionary.nearest(dictionary.vectors[3:4], k=1)
    assert own[0].token == dictionary.tokens[3]
    assert own[0].cosine == pytest.approx(1)


@pytest.mark.parametrize('docs', [[], [('a', '')], [('a', 'Too short.')]])
def test_a_corpus_without_tokens(target, docs):
    with pytest.raises(ValueError, match='no token comes 3 times in this corpus: choose a longer one'):
        read_token_dictionary(target, docs, progress=False)


@pytest.mark.parametrize('name', [TOKENS, WORDS])
def test_a_dictionary_is_made_once(preset, name):
    tiny = Target.load(preset)
    assert check_dictionary(preset, name) is None
    made = token_dictionary(preset, tiny, name, progress=False)
    file = check_dictionary(preset, name)
    assert file.name == name
    assert token_dictionary(preset, tiny, name, progress=False).tokens == made.tokens
    file.unlink()


def test_neither_dictionary_nor_corpus(preset):
    with pytest.raises(ValueError, match='a dictionary .* needs running text, and the preset tiny names no corpus'):
        check_dictionary(load_preset(preset, corpus=None), TOKENS)


# the vocabulary

def test_a_probe_is_what_the_token_does_alone(target):
    hits = probe_vocabulary(target, list(range(12)), progress=False)
    firing = [(feature, hit) for feature, found in hits.items() for hit in found]
    assert firing
    for feature, hit in firing[:20]:
        ids = target.tokenizer(hit.token, add_special_tokens=False)['input_ids']
        if len(ids) > 1: continue # half a character
        assert target.max_acts([hit.token], feature)[0] == pytest.approx(hit.activation, rel=2e-3, abs=2e-3)


def test_the_probe_gives_the_strongest_first(target):
    for found in probe_vocabulary(target, [3, 5], k=9, progress=False).values():
        values = [hit.activation for hit in found]
        assert values == sorted(values, reverse=True)
        assert all(value > 0 for value in values)


def test_a_feature_that_no_token_sets_off_has_no_hits(tmp_path):
    silent = tiny_target(tmp_path)
    silent.reader.sae.threshold.data.fill_(1e6)
    assert probe_vocabulary(silent, [3], progress=False) == {3: []}


def test_one_token_at_a_time(target, monkeypatch):
    monkeypatch.setattr(target, 'max_tokens', 1)
    assert probe_vocabulary(target, [3], k=1, progress=False).keys() == {3}


@pytest.mark.parametrize('features, line', [([40], '0 to 39'), ([-1], '0 to 39'), (['rain'], 'rain')])
def test_what_is_no_feature_is_refused(target, features, line):
    with pytest.raises((ValueError, IndexError), match=line): probe_vocabulary(target, features, progress=False)


# all of them

@pytest.mark.parametrize('name', LOOKUPS)
def test_lookups_explain_every_feature_asked(preset, name):
    tiny = Target.load(preset)
    labels = {9: "the word 'sea'", 10: "the word 'rain'"}
    texts = look_up(name, preset, tiny, [3, 5, 7], labels, progress=False)
    assert list(texts) == [3, 5, 7]
    assert all(isinstance(text, str) for text in texts.values())
    assert texts == look_up(name, preset, tiny, [3, 5, 7], labels, progress=False)
    assert look_up(name, preset, tiny, [], labels, progress=False) == {}


@pytest.mark.parametrize('name', ['nearest label', 'random label'])
def test_lookups_that_need_labels(preset, target, name):
    with pytest.raises(ValueError, match=f"the lookup '{name}' needs labels of other features, and there are none"):
        look_up(name, preset, target, [3], {})


@pytest.mark.parametrize('features', [[3], []])
def test_an_unknown_lookup(preset, target, features):
    says = "unknown lookup 'guess': choose from nearest token, nearest word, nearest words, vocab"
    with pytest.raises(ValueError, match=says):
        look_up('guess', preset, target, features, {})


def test_a_tokenizer_without_bos(tmp_path):
    tokenizer = tiny_tokenizer(bos=None)
    plain = tiny_target(tmp_path, 'gpt2', tokenizer=tokenizer, metadata={'prepend_bos': False})
    assert len(logit_lens(plain, plain.reader.directions([3]))[0]) == 3
    assert not math.isnan(sum(hit.activation for hit in probe_vocabulary(plain, [3], progress=False)[3]))
    assert len(read_token_dictionary(plain, running_documents(), progress=False).tokens) > 20


def test_words_are_looked_up_by_the_encoder_and_tokens_by_the_decoder(preset):
    tiny = Target.load(preset)
    by = {'nearest words': tiny.reader.encoders([3]), 'nearest token': tiny.reader.directions([3])}
    for name, directions in by.items():
        dictionary = token_dictionary(preset, tiny, IN_DICTIONARY[name], progress=False)
        assert neighbours_of(name, preset, tiny, [3], k=4, progress=False) == dictionary.nearest(directions, k=4)


# as labels

RAINED = [context('it rained here', 1, 2.)]*2 + [context('the sea was calm', 1, 2.)]*3

@pytest.mark.parametrize('hints, phrase', [
    (['rain', 'snow', 'Sea'], "words such as 'rain', 'Sea'"), # in their order, as they are written
    (['sea', 'snow'], "the word 'sea'"),
    (['snow', 'fog'], "the word 'sea'"), # three peaks of five
    ([], "the word 'sea'"),
])
def test_what_can_be_known_from_hints(hints, phrase):
    assert known_phrase(hints, RAINED) == phrase


def test_where_nothing_can_be_known_nothing_is_said():
    words = [context(f'a {word} here', 1, 2.) for word in ('rain', 'snow', 'fog', 'sea')]
    assert known_phrase(['wind'], words) == ''
    assert known_phrase(['wind'], []) == ''


def test_a_label_of_hints_is_short():
    forms = ['rains', 'rained', 'raining', 'rainy', 'rainfall', 'rain']
    assert known_phrase(forms, RAINED) == "words such as 'rains', 'rained', 'raining', 'rainy', 'rainfall'"


# as candidates

@pytest.mark.parametrize('name', CANDIDATE_LOOKUPS)
def test_each_feature_has_as_many_phrases(preset, name):
    tiny = Target.load(preset)
    labels = {9: "the word 'sea'"}
    found = phrases_of(name, preset, tiny, [3, 5], labels, progress=False)
    assert [len(phrases) for phrases in found.values()] == [NEAREST if name in ONE_BY_ONE else 1]*2
    assert found[3][0] == look_up(name, preset, tiny, [3], labels, progress=False)[3]
    assert phrases_of(name, preset, tiny, [], labels, progress=False) == {}
