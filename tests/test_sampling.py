"Sampling: draws that depend on a row's seed alone, whatever the shortlist and the batch"
import functools, json
import pytest
import torch
from peft import LoraConfig, get_peft_model
from saeexplainer.lm.models import load_model
from saeexplainer.lm.sampling import (
    RowSampler, batches, end_ids, in_float32, new_tokens, pad, pad_rest, sample, seed_for, shared_prefix)
from helpers import ARCHITECTURES, tiny_model, tiny_tokenizer


@pytest.fixture(scope='module')
def tokenizer(): return tiny_tokenizer()


@pytest.fixture(scope='module')
def small(): return tiny_model(n_layers=2)


def padded(rows): return pad(rows, 0, left=True)


# ---- draws

@pytest.fixture(scope='module')
def scores():
    "Rows from peaked to flat"
    generator = torch.Generator().manual_seed(0)
    return torch.randn(300, 200, generator=generator) * torch.linspace(.05, 8, 300)[:, None]


def nucleus_sizes(scores, top_p):
    cumulative = scores.softmax(-1).sort(-1, descending=True)[0].cumsum(-1)
    return (cumulative < top_p).sum(-1) + 1


def test_some_nuclei_lie_inside_the_shortlist_and_some_do_not(scores):
    "Of two tokens, of sixteen times as many, or of neither: what the next test stands on"
    sizes = nucleus_sizes(scores, .9)
    assert (sizes <= 2).any()
    assert ((sizes > 2) & (sizes <= 32)).any()
    assert (sizes > 32).any()


@pytest.mark.parametrize('top_p', [.3, .9, .999])
def test_the_shortlist_does_not_change_a_draw(scores, top_p):
    def drawn(shortlist): return RowSampler(range(300), top_p=top_p, shortlist=shortlist)(None, scores).argmax(-1)
    tokens = drawn(200)
    assert torch.equal(drawn(2), tokens)
    ranks = (scores > scores.gather(1, tokens[:, None])).sum(-1)
    assert (ranks < nucleus_sizes(scores, top_p)).all() # never outside the nucleus


def test_a_draw_keeps_one_token():
    scores = RowSampler([1, 2], top_p=.5)(None, torch.zeros(2, 30))
    assert ((scores == 0).sum(-1) == 1).all()
    assert (scores == -torch.inf).sum() == 2*29


@pytest.mark.parametrize('wrong, says', [
    (dict(temperature=0), 'sampling needs more than 0'),
    (dict(temperature=1e-9), 'temperature is 1e-09: sampling needs 1e-06 or more'),
    (dict(top_p=0), r'must lie in \(0, 1\]'),
    (dict(top_p=1.1), 'must lie in')])
def test_values_that_mean_nothing_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says): RowSampler([0], **wrong)


# ---- rows of a model

THREE = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]

def test_rows_of_different_length_in_company_and_alone(small, tokenizer):
    seeds = [seed_for(0, i) for i in range(3)]
    together = new_tokens(small, tokenizer, **padded(THREE), seeds=seeds, max_new_tokens=6)
    for row, seed, found in zip(THREE, seeds, together):
        assert new_tokens(small, tokenizer, **padded([row]), seeds=[seed], max_new_tokens=6) == [found]
        ids, cut = found
        assert len(ids) == 6 or not cut


def test_texts_are_the_tokens_that_were_drawn(small, tokenizer):
    how = dict(seeds=[seed_for(0, i) for i in range(3)], max_new_tokens=6)
    rows = new_tokens(small, tokenizer, **padded(THREE), **how)
    texts = sample(small, tokenizer, **padded(THREE), **how)
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids, _ in rows]


def test_suppressed_tokens_are_never_drawn(small, tokenizer):
    def drawn(**how):
        rows = new_tokens(small, tokenizer, **padded([[5, 6]]*8), seeds=range(8), max_new_tokens=8, **how)
        return {token for ids, _ in rows for token in ids}
    free = drawn()
    banned = sorted(free)[:len(free)//2]
    assert banned
    assert not drawn(suppress=banned) & set(banned)


@pytest.mark.parametrize('n', [0, 1])
def test_a_seed_for_every_row(small, tokenizer, n):
    how = dict(seeds=[1]) if n else {}
    with pytest.raises(ValueError, match=f'2 rows need 2 seeds, got {n}'):
        sample(small, tokenizer, **pad([[5], [6]], 0), **how)


def test_batches_hold_every_row_once():
    lengths = [3, 50, 7, 7, 120, 1, 9]
    groups = batches(lengths, max_rows=3, max_tokens=100)
    assert sorted(i for group in groups for i in group) == list(range(7))
    assert [4] in groups # too long for company
    for group in groups:
        assert len(group) <= 3
        assert len(group) == 1 or len(group)*max(lengths[i] for i in group) <= 100


# ---- what a model would like of generation

LIKES = [
    dict(repetition_penalty=5., no_repeat_ngram_size=1, temperature=.1, top_k=1),
    dict(num_beams=3),
    dict(num_beams=3, num_return_sequences=3),
    dict(prompt_lookup_num_tokens=3),
    dict(stop_strings=['a']),
    dict(min_length=40),
    dict(min_new_tokens=40),
    dict(bad_words_ids=[[5], [6, 7]]),
    dict(suppress_tokens=list(range(300))),
    dict(begin_suppress_tokens=list(range(300))),
    dict(forced_bos_token_id=3),
    dict(forced_eos_token_id=3),
    dict(sequence_bias=[[[5], 10.]]),
    dict(exponential_decay_length_penalty=[1, 5.]),
    dict(guidance_scale=3.),
    dict(penalty_alpha=.6, top_k=4),
    dict(max_time=1e-4),
    dict(max_length=4),
    dict(return_dict_in_generate=True),
    dict(num_beams='x'),
    dict(bos_token_id='x')]

def drawn_and_greedy(model, tokenizer):
    batch = padded([[5, 6], [7, 8, 9]])
    drawn = new_tokens(model, tokenizer, **batch, seeds=range(2), max_new_tokens=8)
    return drawn, new_tokens(model, tokenizer, **batch, temperature=0, max_new_tokens=8)


@pytest.fixture(scope='module')
def wanted(small, tokenizer): return drawn_and_greedy(small, tokenizer)


@pytest.fixture(scope='module')
def saved(small, tokenizer, tmp_path_factory):
    "(a folder with a model, its generation_config.json as it was saved)"
    folder = tmp_path_factory.mktemp('model')
    small.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, json.loads((folder/'generation_config.json').read_text())


@pytest.mark.parametrize('likes', LIKES, ids=lambda likes: next(iter(likes)))
def test_what_a_model_would_like_of_generation_does_not_count(likes, tokenizer, wanted):
    model = tiny_model(n_layers=2)
    model.generation_config.update(**likes)
    kept = model.generation_config.to_dict()
    assert drawn_and_greedy(model, tokenizer) == wanted
    assert model.generation_config.to_dict() == kept


@pytest.mark.parametrize('likes', LIKES, ids=lambda likes: next(iter(likes)))
def test_what_a_file_would_like_of_generation_does_not_count(likes, tokenizer, wanted, saved):
    folder, config = saved
    (folder/'generation_config.json').write_text(json.dumps(config | likes))
    model, _ = load_model(str(folder), 'float32', 'cpu')
    assert drawn_and_greedy(model, tokenizer) == wanted


def test_what_a_model_with_an_adapter_would_like_does_not_count(small, tokenizer):
    adapter = LoraConfig(r=4, target_modules=['q_proj'], init_lora_weights=False, task_type='CAUSAL_LM')
    def drawn(model): return new_tokens(model, tokenizer, **padded([[5, 6]]*2), seeds=range(2), max_new_tokens=8)
    def adapted(**likes):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(n_layers=2), adapter)
        model.generation_config.update(**likes)
        return drawn(model)
    plain = adapted()
    assert adapted(num_beams=3) == plain
    assert adapted(min_length=20) == plain
    assert drawn(small) != plain


# ---- where rows end

@pytest.mark.parametrize('ends', ['</s>', 2.5, 2., [[2]], [2, 'x'], [2, None], 512, [2, 9999], -1, True, {'a': 2}])
def test_end_tokens_that_are_none(ends, tokenizer):
    model = tiny_model(n_layers=2)
    model.generation_config.eos_token_id = ends
    says = 'eos_token_id is .*, not a token id from 0 to 511 or a list of them: mend its generation_config.json'
    with pytest.raises(ValueError, match=says) as e: end_ids(model, tokenizer)
    assert '\n' not in str(e.value)
    (_, cut), = new_tokens(model, tokenizer, **pad([[5, 6]], 0), temperature=0, max_new_tokens=3, ends=[])
    assert cut # whoever says where rows end is not asked


def test_a_turn_ends_where_the_template_ends_it(small, tokenizer):
    assert tokenizer.convert_ids_to_tokens(end_ids(small, tokenizer)) == ['</s>', '<|im_end|>']


def test_a_reply_is_whole_when_its_turn_ends(tokenizer):
    model = tiny_model(n_layers=2)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    model.lm_head.bias.data[4] = 100. # says nothing but <|im_end|>
    found = new_tokens(model, tokenizer, **pad([[5, 6]], 0), temperature=0, max_new_tokens=8)
    assert found == [([4], False)]


@pytest.mark.parametrize('template', [None, '{{ 1/0 }}'])
def test_a_model_that_is_not_asked_in_turns_ends_with_its_eos(small, template):
    assert end_ids(small, tiny_tokenizer(chat=template)) == [2]


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_what_does_not_fit_into_the_context(kind, tokenizer):
    model = tiny_model(kind, n_layers=2)
    def greedy(row, n, **how):
        return new_tokens(model, tokenizer, **pad([row], 0), temperature=0, max_new_tokens=n, **how)
    full = [7]*500
    (ids, _), = greedy(full, 13, ends=[])
    assert len(ids) == 13 # the last one is not read
    with pytest.raises(ValueError, match='500 tokens and 14 new ones are more than the 512'): greedy(full, 14)
    with pytest.raises(ValueError, match='token 600 is not in the embedding'): greedy([600], 20)


# ---- a beginning that rows share

START = list(range(10, 22))

@pytest.fixture(scope='module', params=[
    *((kind, {}) for kind in ARCHITECTURES),
    ('gemma2', dict(sliding_window=40)),
    ('gemma3', dict(sliding_window=40))], ids=str)
def sharing(request):
    "(model, rows with twelve tokens in common, sliding window)"
    kind, more = request.param
    model = tiny_model(kind, n_layers=3, **more)
    generator = torch.Generator().manual_seed(0)
    rows = [START + torch.randint(3, 200, (n,), generator=generator).tolist() for n in (1, 9, 4, 4, 2)]
    rows[3][12] = rows[2][12] + 1
    return model, rows, getattr(model.config.get_text_config(), 'sliding_window', None)


def test_how_much_rows_can_share(sharing):
    model, rows, window = sharing
    assert shared_prefix(model, rows, more=12) == (12 if window is None or window >= 21 + 12 else 0)
    assert shared_prefix(model, rows, more=10**6) == (0 if window else 12)
    assert shared_prefix(model, rows[:1], 4) == 0
    assert shared_prefix(model, [START, START], 4) == (11 if window is None or window >= 16 else 0)


def test_a_shared_beginning_changes_nothing(sharing, tokenizer):
    model, rows, _ = sharing
    common = shared_prefix(model, rows, more=12)
    how = dict(seeds=[5, 6, 7, 8, 9], max_new_tokens=12, temperature=1.)
    apart = new_tokens(model, tokenizer, **padded(rows), **how)
    assert new_tokens(model, tokenizer, **pad_rest(rows, common, 0), **how, shared=common) == apart


def test_equal_rows_are_computed_once(sharing, tokenizer, monkeypatch):
    model, rows, _ = sharing
    common = shared_prefix(model, rows, more=12)
    how = dict(max_new_tokens=12, temperature=1.)
    apart = new_tokens(model, tokenizer, **padded(rows), seeds=[5, 6, 7, 8, 9], **how)
    forward = model.forward
    read = [] # tokens of each forward pass
    @functools.wraps(forward)
    def counted(*args, **more):
        read.append(more['input_ids'].numel())
        return forward(*args, **more)
    monkeypatch.setattr(model, 'forward', counted)
    seeds = [5, 6, 7, 8, 9, 5, 6, 7, 8, 10]
    again = new_tokens(model, tokenizer, **pad_rest(rows*2, common, 0), seeds=seeds, **how, shared=common)
    assert again[:5] == apart
    assert again[5:9] == apart[:4]
    assert again[9] != apart[4]
    assert max(read) <= 5*(21 - common)


# ---- sixteen bits

@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def half(request): return tiny_model(n_layers=3, d=128).to(request.param)


def test_sixteen_bits_in_company_and_alone(half, tokenizer):
    "Draws of a model whose weights have 16 bits are computed in 32"
    rows = [list(range(6, 6 + n)) for n in (3, 9, 30, 4, 17, 8)]
    together = new_tokens(half, tokenizer, **padded(rows), seeds=range(6), max_new_tokens=24)
    for i, row in enumerate(rows):
        assert new_tokens(half, tokenizer, **padded([row]), seeds=[i], max_new_tokens=24) == [together[i]]
    assert together == new_tokens(half.float(), tokenizer, **padded(rows), seeds=range(6), max_new_tokens=24)


def test_weights_of_sixteen_bits_are_what_they_were(half, tokenizer):
    before = {name: weights.clone() for name, weights in half.state_dict().items()}
    new_tokens(half, tokenizer, **padded(THREE), seeds=range(3), max_new_tokens=4)
    for name, weights in half.state_dict().items():
        assert weights.dtype == before[name].dtype
        assert torch.equal(weights, before[name])


def test_weights_have_sixteen_bits_again_after_an_error(half):
    dtype = half.dtype
    with pytest.raises(RuntimeError, match='in the middle'):
        with in_float32(half):
            assert {weights.dtype for weights in half.parameters()} == {torch.float32}
            raise RuntimeError('in the middle')
    assert {weights.dtype for weights in half.parameters()} == {dtype}
    assert half.lm_head.weight.dtype == dtype


def test_tied_weights_stay_tied():
    model = tiny_model(tie_word_embeddings=True).bfloat16()
    def tied(): return model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    with in_float32(model): assert tied()
    assert tied()
    assert model.lm_head.weight.dtype == torch.bfloat16
