"Sampling: draws that depend on a row's seed alone, whatever the shortlist and the batch"
import functools, json
import pytest
import torch
from saeexplainer.lm.models import load_model
from saeexplainer.lm.sampling import RowSampler, batches, end_ids, in_float32, new_tokens, pad, pad_rest, sample, seed_for, shared_prefix
from helpers import ARCHITECTURES, tiny_model, tiny_tokenizer


@pytest.mark.parametrize('top_p', [.3, .9, .999])
def test_the_shortlist_does_not_change_a_draw(top_p):
    "Rows from peaked to flat: some nuclei lie inside the shortlist, some inside sixteen times as many, some in neither"
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, 200, generator=generator) * torch.linspace(.05, 8, 300)[:, None]
    p = scores.softmax(-1).sort(-1, descending=True)[0].cumsum(-1)
    sizes = (p < top_p).sum(-1) + 1
    if top_p == .9: assert (sizes <= 2).any() and ((sizes > 2) & (sizes <= 32)).any() and (sizes > 32).any()
    drawn = [RowSampler(range(300), top_p=top_p, shortlist=n)(None, scores).argmax(-1) for n in (2, 200)]
    assert torch.equal(*drawn)
    ranks = (scores > scores.gather(1, drawn[0][:, None])).sum(-1)
    assert (ranks < sizes).all() # never outside the nucleus


def test_a_draw_keeps_one_token():
    scores = RowSampler([1, 2], top_p=.5)(None, torch.zeros(2, 30))
    assert ((scores == 0).sum(-1) == 1).all() and (scores == -torch.inf).sum() == 2*29


@pytest.mark.parametrize('wrong,says', [(dict(temperature=0), 'sampling needs more than 0'), (dict(temperature=1e-9), 'temperature is 1e-09: sampling needs 1e-06 or more'),
                                        (dict(top_p=0), r'must lie in \(0, 1\]'), (dict(top_p=1.1), 'must lie in')])
def test_values_that_mean_nothing_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says): RowSampler([0], **wrong)


def test_rows_of_different_length_in_company_and_alone():
    model, tokenizer = tiny_model(n_layers=2), tiny_tokenizer()
    rows, seeds = [[5, 6, 7, 8, 9], [10], [11, 12, 13]], [seed_for(0, i) for i in range(3)]
    together = new_tokens(model, tokenizer, **pad(rows, 0, left=True), seeds=seeds, max_new_tokens=6)
    alone = [new_tokens(model, tokenizer, **pad([row], 0, left=True), seeds=[seed], max_new_tokens=6)[0] for row, seed in zip(rows, seeds)]
    assert together == alone and all(len(ids) == 6 or not cut for ids, cut in together)
    texts = sample(model, tokenizer, **pad(rows, 0, left=True), seeds=seeds, max_new_tokens=6)
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids, _ in together]


def test_suppressed_tokens_are_never_drawn():
    model, tokenizer = tiny_model(n_layers=2), tiny_tokenizer()
    batch = pad([[5, 6]]*8, 0, left=True)
    free = {t for ids, _ in new_tokens(model, tokenizer, **batch, seeds=range(8), max_new_tokens=8) for t in ids}
    banned = sorted(free)[:len(free)//2]
    kept = {t for ids, _ in new_tokens(model, tokenizer, **batch, seeds=range(8), max_new_tokens=8, suppress=banned) for t in ids}
    assert banned and not kept & set(banned)


LIKES = [dict(repetition_penalty=5., no_repeat_ngram_size=1, temperature=.1, top_k=1), dict(num_beams=3), dict(num_beams=3, num_return_sequences=3), dict(prompt_lookup_num_tokens=3),
         dict(stop_strings=['a']), dict(min_length=40), dict(min_new_tokens=40), dict(bad_words_ids=[[5], [6, 7]]), dict(suppress_tokens=list(range(300))), dict(begin_suppress_tokens=list(range(300))),
         dict(forced_bos_token_id=3), dict(forced_eos_token_id=3), dict(sequence_bias=[[[5], 10.]]), dict(exponential_decay_length_penalty=[1, 5.]), dict(guidance_scale=3.), dict(penalty_alpha=.6, top_k=4),
         dict(max_time=1e-4), dict(max_length=4), dict(return_dict_in_generate=True), dict(num_beams='x'), dict(bos_token_id='x')]

@pytest.mark.parametrize('likes', LIKES, ids=lambda likes: next(iter(likes)))
def test_what_a_model_would_like_of_generation_does_not_count(likes, tmp_path):
    tokenizer, batch = tiny_tokenizer(), pad([[5, 6], [7, 8, 9]], 0, left=True)
    def told(model): return [new_tokens(model, tokenizer, **batch, seeds=range(2), max_new_tokens=8), new_tokens(model, tokenizer, **batch, temperature=0, max_new_tokens=8)]
    wanted, model = told(tiny_model(n_layers=2)), tiny_model(n_layers=2)
    model.generation_config.update(**likes)
    kept = model.generation_config.to_dict()
    assert told(model) == wanted and model.generation_config.to_dict() == kept
    tiny_model(n_layers=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path/'generation_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | likes))
    assert told(load_model(str(tmp_path), 'float32', 'cpu')[0]) == wanted


def test_what_a_model_with_an_adapter_would_like_does_not_count():
    from peft import LoraConfig, get_peft_model
    def told(**likes):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(n_layers=2), LoraConfig(r=4, target_modules=['q_proj'], init_lora_weights=False, task_type='CAUSAL_LM'))
        model.generation_config.update(**likes)
        return new_tokens(model, tiny_tokenizer(), **pad([[5, 6]]*2, 0, left=True), seeds=range(2), max_new_tokens=8)
    assert told() == told(num_beams=3) == told(min_length=20) != new_tokens(tiny_model(n_layers=2), tiny_tokenizer(), **pad([[5, 6]]*2, 0, left=True), seeds=range(2), max_new_tokens=8)


@pytest.mark.parametrize('ends', ['</s>', 2.5, 2., [[2]], [2, 'x'], [2, None], 512, [2, 9999], -1, True, {'a': 2}])
def test_end_tokens_that_are_none(ends):
    model, tokenizer = tiny_model(n_layers=2), tiny_tokenizer()
    model.generation_config.eos_token_id = ends
    with pytest.raises(ValueError, match='eos_token_id is .*, not a token id from 0 to 511 or a list of them: mend its generation_config.json') as e: end_ids(model, tokenizer)
    assert '\n' not in str(e.value)
    assert new_tokens(model, tokenizer, **pad([[5, 6]], 0), temperature=0, max_new_tokens=3, ends=[])[0][1] # whoever says where rows end is not asked


def test_a_seed_for_every_row():
    model, tokenizer = tiny_model(n_layers=2), tiny_tokenizer()
    with pytest.raises(ValueError, match='2 rows need 2 seeds, got 1'): sample(model, tokenizer, **pad([[5], [6]], 0), seeds=[1])
    with pytest.raises(ValueError, match='2 rows need 2 seeds, got 0'): sample(model, tokenizer, **pad([[5], [6]], 0))


def test_batches_hold_every_row_once():
    lengths = [3, 50, 7, 7, 120, 1, 9]
    groups = batches(lengths, max_rows=3, max_tokens=100)
    assert sorted(i for g in groups for i in g) == list(range(7)) and [4] in groups
    assert all(len(g) <= 3 and (len(g) == 1 or len(g)*max(lengths[i] for i in g) <= 100) for g in groups)


@pytest.mark.parametrize('kind, more', [*((a, {}) for a in ARCHITECTURES), ('gemma2', dict(sliding_window=40)), ('gemma3', dict(sliding_window=40))])
def test_a_shared_beginning_changes_nothing(kind, more):
    model, tokenizer = tiny_model(kind, n_layers=3, **more), tiny_tokenizer()
    start, rng = list(range(10, 22)), torch.Generator().manual_seed(0)
    rows = [start + torch.randint(3, 200, (n,), generator=rng).tolist() for n in (1, 9, 4, 4, 2)]
    rows[3][12] = rows[2][12] + 1
    common = shared_prefix(model, rows, more=12)
    window = getattr(model.config.get_text_config(), 'sliding_window', None)
    assert common == (12 if window is None or window >= 21 + 12 else 0)
    how = dict(seeds=[5, 6, 7, 8, 9], max_new_tokens=12, temperature=1.)
    apart = new_tokens(model, tokenizer, **pad(rows, 0, left=True), **how)
    assert new_tokens(model, tokenizer, **pad_rest(rows, common, 0), **how, shared=common) == apart
    twice = lambda x: x*2 if isinstance(x, list) else x
    more, read, forward = {k: twice(v) for k, v in how.items()} | {'seeds': [5, 6, 7, 8, 9, 5, 6, 7, 8, 10]}, [], model.forward
    model.forward = functools.wraps(forward)(lambda *a, **k: read.append(k['input_ids'].numel()) or forward(*a, **k))
    again = new_tokens(model, tokenizer, **pad_rest(rows*2, common, 0), **more, shared=common)
    assert again[:5] == apart and again[5:9] == apart[:4] and again[9] != apart[4] and max(read) <= 5*(21 - common) # equal rows are computed once
    assert shared_prefix(model, rows, more=10**6) == (0 if window else 12) and shared_prefix(model, rows[:1], 4) == 0 and shared_prefix(model, [start, start], 4) == (11 if window is None or window >= 16 else 0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_sixteen_bits_in_company_and_alone(dtype):
    "Draws of a model whose weights have 16 bits: they are computed in 32, and the weights are what they were"
    model, tokenizer = tiny_model(n_layers=3, d=128).to(dtype), tiny_tokenizer()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    rows, how = [list(range(6, 6 + n)) for n in (3, 9, 30, 4, 17, 8)], dict(max_new_tokens=24)
    together = new_tokens(model, tokenizer, **pad(rows, 0, left=True), seeds=range(6), **how)
    assert together == [new_tokens(model, tokenizer, **pad([row], 0, left=True), seeds=[i], **how)[0] for i, row in enumerate(rows)]
    assert together == new_tokens(tiny_model(n_layers=3, d=128).to(dtype).float(), tokenizer, **pad(rows, 0, left=True), seeds=range(6), **how)
    assert all(torch.equal(p, before[n]) and p.dtype == before[n].dtype for n, p in model.state_dict().items())
    with pytest.raises(RuntimeError):
        with in_float32(model):
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            raise RuntimeError('in the middle')
    assert {p.dtype for p in model.parameters()} == {dtype} and model.lm_head.weight.dtype == dtype


def test_tied_weights_stay_tied():
    model = tiny_model(tie_word_embeddings=True).bfloat16()
    with in_float32(model): assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr() and model.lm_head.weight.dtype == torch.bfloat16


def test_a_turn_ends_where_the_template_ends_it():
    "The tokenizer's eos is </s>, turns end in <|im_end|>"
    model, tokenizer = tiny_model(n_layers=2), tiny_tokenizer()
    assert tokenizer.convert_ids_to_tokens(end_ids(model, tokenizer)) == ['</s>', '<|im_end|>']
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    model.lm_head.bias.data[4] = 100. # says nothing but <|im_end|>
    assert new_tokens(model, tokenizer, **pad([[5, 6]], 0), temperature=0, max_new_tokens=8) == [([4], False)]
    tokenizer.chat_template = None
    assert end_ids(model, tokenizer) == [2]
    tokenizer.chat_template = '{{ 1/0 }}' # of a model that is not asked in turns
    assert end_ids(model, tokenizer) == [2]


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_what_does_not_fit_into_the_context(kind):
    model, tokenizer = tiny_model(kind, n_layers=2), tiny_tokenizer()
    full = pad([[7]*500], 0)
    assert len(new_tokens(model, tokenizer, **full, temperature=0, max_new_tokens=13, ends=[])[0][0]) == 13 # the last one is not read
    with pytest.raises(ValueError, match='500 tokens and 14 new ones are more than the 512'): new_tokens(model, tokenizer, **full, temperature=0, max_new_tokens=14)
    with pytest.raises(ValueError, match='token 600 is not in the embedding'): new_tokens(model, tokenizer, **pad([[600]], 0), temperature=0)
