"Places in a decoder layer: by every name, in every family, read by dictionaries of every kind, and steered"
import numpy as np
import pytest
import torch
from helpers import ARCHITECTURES, save_wrapped, tiny_model, tiny_sae, tiny_tokenizer
from judged import THRESHOLD, judged_preset
from saeexplainer.explainer import ExplainerCard
from saeexplainer.lm.heads import load_written_by_heads, written_by_heads
from saeexplainer.lm.hooks import decoder_layers, residual_hook, residual_stream
from saeexplainer.lm.places import PLACES, Place, is_of_heads, late_norm, parse_hook, spot_of
from saeexplainer.lm.sampling import pad, sample
from saeexplainer.presets import load_preset
from saeexplainer.run import Run, execute
from saeexplainer.saes import FULL_ENCODE, ONE_COLUMN, TRANSCODERS, FeatureReader, load_sae
from saeexplainer.target import Target, tokenise
from target_worlds import PROMPTS, TEXTS, lively

IDS = torch.tensor([[1, 9, 12, 40, 77], [1, 33, 8, 5, 60]])
WHOLE = torch.ones_like(IDS)


# ---- names

@pytest.mark.parametrize('name, place', [
    ('blocks.12.hook_resid_pre', (12, 'resid_pre')),
    ('blocks.12.hook_resid_mid', (12, 'resid_mid')),
    ('blocks.7.hook_attn_out', (7, 'attn_out')),
    ('blocks.7.hook_mlp_out', (7, 'mlp_out')),
    ('blocks.7.attn.hook_z', (7, 'z')),
    ('blocks.7.ln2.hook_normalized', (7, 'mlp_normalized')),
    ('blocks.7.mlp.hook_in', (7, 'mlp_in')),
    ('blocks.7.hook_mlp_in', (7, 'resid_mid')),
    ('model.layers.2', (2, 'resid_post')),
    ('model.language_model.layers.11', (11, 'resid_post')),
    ('transformer.h.3', (3, 'resid_post')),
    ('gpt_neox.layers.5.output', (5, 'resid_post')),
    ('model.layers.0.input', (0, 'resid_pre')),
    ('model.layers.2.mlp', (2, 'mlp.output')),
    ('model.layers.2.self_attn.o_proj.input', (2, 'self_attn.o_proj.input')),
    ('model.layers.3.post_feedforward_layernorm.output', (3, 'post_feedforward_layernorm.output')),
])
def test_hook_names_and_modules(name, place):
    assert parse_hook(name) == Place(*place)


@pytest.mark.parametrize('name', [
    None, '', 'hook_embed', 'blocks.1.attn.hook_q', 'xblocks.1.hook_resid_post', 'vision_tower.encoder.layers.1',
    'encoder.layers.2', 'model.layers.2..mlp', 'model.layers.mlp', 5,
])
def test_hooks_that_are_in_no_layer(name):
    with pytest.raises(ValueError, match='known are blocks.N.*`sae_hook: blocks.6.hook_resid_post`'): parse_hook(name)


# ---- families

def more_models(arch, **fields):
    "Families that the other tests have no tiny model of"
    import transformers
    torch.manual_seed(0)
    sizes = dict(vocab_size=512, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
                 initializer_range=.1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    names = {
        'gpt_neox': ('GPTNeoXForCausalLM', 'GPTNeoXConfig', dict(use_parallel_residual=False)),
        'olmo2': ('Olmo2ForCausalLM', 'Olmo2Config', {}),
        'glm4': ('Glm4ForCausalLM', 'Glm4Config', dict(num_key_value_heads=2, head_dim=16)),
        'mistral': ('MistralForCausalLM', 'MistralConfig', dict(num_key_value_heads=2)),
        'qwen2': ('Qwen2ForCausalLM', 'Qwen2Config', dict(num_key_value_heads=2)),
        'gpt_oss': ('GptOssForCausalLM', 'GptOssConfig',
                    dict(num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1)),
        'opt': ('OPTForCausalLM', 'OPTConfig', dict(ffn_dim=128, word_embed_proj_dim=64, init_std=.1)),
        'bloom': ('BloomForCausalLM', 'BloomConfig', dict(n_layer=4, n_head=4)),
        'mpt': ('MptForCausalLM', 'MptConfig', dict(d_model=64, n_layers=4, n_heads=4)),
    }
    model, config, own = names[arch]
    return getattr(transformers, model)(getattr(transformers, config)(**sizes | own | fields)).eval()


MORE = ('gpt_neox', 'olmo2', 'glm4', 'mistral', 'qwen2', 'gpt_oss', 'opt', 'bloom', 'mpt')
NEXT_TO = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(scope='module')
def lms():
    return {arch: tiny_model(arch) for arch in ARCHITECTURES} | {arch: more_models(arch) for arch in MORE}


def passing(model, name, layer=2):
    "What passes at a place in a whole forward pass"
    seen = []
    with torch.no_grad(), residual_hook(model, layer, name, seen.append): model(input_ids=IDS, attention_mask=WHOLE)
    return seen[0].reshape(*IDS.shape, -1)


@pytest.mark.parametrize('arch', (*ARCHITECTURES, *MORE))
def test_a_layer_adds_what_its_parts_give(lms, arch):
    model = lms[arch]
    middle = passing(model, 'resid_pre') + passing(model, 'attn_out')
    assert torch.allclose(middle, passing(model, 'resid_mid'), **NEXT_TO)
    assert torch.allclose(middle + passing(model, 'mlp_out'), passing(model, 'resid_post'), **NEXT_TO)


@pytest.mark.parametrize('arch', (*ARCHITECTURES, *MORE))
def test_what_the_heads_gather_is_projected(lms, arch):
    model = lms[arch]
    layer = decoder_layers(model)[2]
    projection = spot_of(layer, 'z').module
    written = projection(passing(model, 'z').float())
    gain = getattr(layer, 'post_feedforward_layernorm', None) or getattr(layer, 'post_self_attn_layernorm', None)
    if gain is None: assert torch.allclose(written, passing(model, 'attn_out'), **NEXT_TO)
    else: assert written.shape == passing(model, 'attn_out').shape


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_the_norm_without_its_weights(lms, arch):
    plain = passing(lms[arch], 'mlp_normalized')
    assert torch.allclose(plain.pow(2).mean(-1), torch.ones(IDS.shape), atol=1e-2)
    stream = passing(lms[arch], 'resid_mid')
    if arch == 'gpt2': stream = stream - stream.mean(-1, keepdim=True)
    assert torch.allclose(torch.cosine_similarity(plain, stream, dim=-1), torch.ones(IDS.shape), atol=1e-4)


@pytest.mark.parametrize('arch', ARCHITECTURES)
@pytest.mark.parametrize('name', PLACES)
def test_early_exit_reads_the_same(lms, arch, name):
    model = lms[arch]
    ran = []
    handle = decoder_layers(model)[3].register_forward_pre_hook(lambda *_: ran.append(True))
    early = residual_stream(model, IDS, WHOLE, 2, name)
    handle.remove()
    assert not ran
    assert torch.equal(early.reshape(*IDS.shape, -1), passing(model, name))


@pytest.mark.parametrize('arch', ARCHITECTURES)
@pytest.mark.parametrize('name', [name for name in PLACES if name != 'mlp_normalized'])
def test_what_is_put_in_its_place_reaches_the_logits(lms, arch, name):
    model = lms[arch]
    before = passing(model, 'resid_post', 3)
    with residual_hook(model, 2, name, lambda x: x + 1e-2*torch.randn_like(x)): after = passing(model, 'resid_post', 3)
    with residual_hook(model, 2, name, torch.clone): same = passing(model, 'resid_post', 3)
    assert not torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(before, same, **NEXT_TO)


def test_what_is_added_between_attention_and_mlp_stays_in_the_stream(lms):
    moved = torch.full((64,), .5)
    with residual_hook(lms['llama'], 2, 'resid_mid', lambda x: x + moved): after = passing(lms['llama'], 'resid_mid')
    assert torch.allclose(after, passing(lms['llama'], 'resid_mid') + moved, **NEXT_TO)


def test_a_norm_cannot_be_changed(lms):
    with pytest.raises(ValueError, match='can be read, not changed'):
        with residual_hook(lms['llama'], 2, 'mlp_normalized', torch.clone): passing(lms['llama'], 'resid_post')


def test_a_place_that_a_model_does_not_have(lms):
    with pytest.raises(ValueError, match="LlamaDecoderLayer has no place 'cross_attn.output'.*it has self_attn, mlp"):
        residual_stream(lms['llama'], IDS, WHOLE, 2, 'cross_attn.output')


# ---- dictionaries

@pytest.fixture(scope='module')
def tokenizer(): return tiny_tokenizer()


HOOKS = ('hook_resid_pre', 'hook_resid_mid', 'hook_resid_post', 'hook_attn_out', 'hook_mlp_out', 'attn.hook_z',
         'mlp.hook_in', 'ln2.hook_normalized')


def dictionary_at(folder, kind, hook, layer=2, about=(), **own):
    "A tiny dictionary that reads at a place; a transcoder writes behind the MLP"
    metadata = dict(hook_name_out=f'blocks.{layer}.hook_mlp_out') if kind in TRANSCODERS else {}
    if hook == 'attn.hook_z': own['reshape_activations'] = 'hook_z'
    about = metadata | dict(about)
    folder = tiny_sae(folder, kind, metadata=about, hook=hook.removeprefix('hook_'), layer=layer, **own)
    if not hook.startswith('hook_'): # `tiny_sae` writes hook_ in front
        file = folder/'cfg.json'
        file.write_text(file.read_text().replace(f'.hook_{hook}', f'.{hook}'))
    return FeatureReader.load(folder)


@pytest.mark.parametrize('kind', (*ONE_COLUMN, *FULL_ENCODE))
@pytest.mark.parametrize('hook', HOOKS)
@pytest.mark.parametrize('arch', ('llama', 'gemma2', 'gpt2'))
def test_a_feature_equals_the_encode_of_sae_lens( # noqa: PLR0913
        lms, tokenizer, tmp_path, arch, hook, kind, largest_error):
    reader = dictionary_at(tmp_path/'sae', kind, hook)
    target = Target(lms[arch], tokenizer, reader)
    texts = [text for text in TEXTS if text]
    wanted = np.stack([whole_encode(target, text) for text in texts]) # (texts, features)
    features = lively(target)
    found = target.max_act_table(texts, features)
    assert wanted[:, features].max() > 0
    assert largest_error(f'activations at {hook}', relative(found, wanted[:, features])) < 1e-4


def relative(found, wanted):
    "Largest difference, relative to max(1, the largest value)"
    found, wanted = torch.as_tensor(found), torch.as_tensor(wanted)
    return ((found - wanted).abs().max()/wanted.abs().max().clamp(min=1.)).item()


def whole_encode(target, text):
    "Largest activations on a text, by a whole forward pass and sae-lens' own encode"
    [tokens] = tokenise(target.tokenizer, [text])
    seen = []
    with torch.no_grad(), residual_hook(target.model, *target.reader.reads, seen.append):
        target.model(**pad([tokens.ids], 0))
    acts = target.reader.sae.encode(seen[0].float().reshape(1, len(tokens.ids), -1))
    return acts[0][torch.tensor(tokens.counts)].max(0).values.numpy()


@pytest.mark.parametrize('kind', TRANSCODERS)
def test_clamping_a_transcoder_is_rank_one_where_it_writes(tmp_path, kind, largest_error):
    reader = dictionary_at(tmp_path/'sae', kind, 'mlp.hook_in')
    torch.manual_seed(0)
    read, written = torch.randn(3, 5, 64), torch.randn(3, 5, 64)
    sae = reader.sae
    acts = sae.encode(read)
    changed = acts.clone()
    changed[..., 7] = 4.
    miss = written - sae.decode(acts)
    clamped = reader.clamp(read, 7, [4.]*3, written=written)
    assert largest_error('clamp where a transcoder writes', relative(clamped, sae.decode(changed) + miss)) < 1e-4
    spliced = sae(read) + sae.decode(changed) - sae.decode(acts)
    assert relative(reader.clamp(read, 7, [4.]*3, True, written), spliced) < 1e-4


def the_long_way(target, features, values, mask):
    "A hook where the dictionary writes: what it writes with features changed, less what it writes, is added"
    sae = target.reader.sae
    read = []
    def keep(x): read[:] = [x]
    def change(written):
        acts = sae.encode(read[0])
        changed = acts.clone()
        for row, feature, value in zip(changed, features, values): row[:, feature] = value
        new = written + sae.decode(changed) - sae.decode(acts)
        is_prompt = len(mask[0]) == written.shape[1]
        return torch.where(mask[..., None].bool(), new, written) if is_prompt else new
    return residual_hook(target.model, *target.reader.reads, keep), residual_hook(
        target.model, *target.reader.writes, change)


@pytest.mark.parametrize('arch', ('llama', 'gemma3', 'gpt2'))
@pytest.mark.parametrize('kind, hook', [
    ('jumprelu', 'hook_resid_mid'), ('standard', 'hook_attn_out'), ('topk', 'hook_mlp_out'), ('gated', 'attn.hook_z'),
    ('transcoder', 'mlp.hook_in'), ('jumprelu_skip_transcoder', 'ln2.hook_normalized'),
    ('skip_transcoder', 'hook_resid_mid'),
])
def test_steered_generation_equals_the_long_way(lms, tokenizer, tmp_path, arch, kind, hook):
    target = Target(lms[arch], tokenizer, dictionary_at(tmp_path/'sae', kind, hook))
    features, values = lively(target, n=3), [20., -20., 0.]
    how = dict(max_new_tokens=8, seeds=[1, 2, 3])
    batch = pad([prompt.ids for prompt in tokenise(tokenizer, PROMPTS)], 0, left=True)
    read, write = the_long_way(target, features, values, batch['attention_mask'])
    with read, write: wanted = sample(target.model, tokenizer, **batch, temperature=.75, **how)
    assert target.generate(PROMPTS, features, values, **how) == wanted
    assert wanted != target.generate(PROMPTS, **how)


@pytest.mark.parametrize('kind, hook', [('transcoder', 'mlp.hook_in'), ('standard', 'hook_mlp_out')])
def test_a_clamp_for_a_kl_is_found_where_it_writes(lms, tokenizer, tmp_path, kind, hook):
    target = Target(lms['llama'], tokenizer, dictionary_at(tmp_path/'sae', kind, hook))
    found = target.steering_value(lively(target)[0], .3, PROMPTS)
    assert found.reached
    assert found.kl == pytest.approx(.3, rel=.05)


@pytest.mark.parametrize('hook, centred', [('hook_mlp_out', True), ('hook_attn_out', True), ('attn.hook_z', False)])
def test_a_mean_is_taken_off_where_the_stream_is_centred(tmp_path, hook, centred):
    about = dict(model_from_pretrained_kwargs=dict(center_writing_weights=True))
    reader = dictionary_at(tmp_path/'sae', 'standard', hook, about=about)
    x = torch.randn(2, 5, 64) + 1
    given = x - x.mean(-1, keepdim=True) if centred else x
    assert torch.allclose(reader.encode(x), reader.sae.encode(given), atol=1e-5)
    assert torch.allclose(reader.activations(x, 7), reader.sae.encode(given)[..., 7], atol=1e-5)


def test_a_transcoder_says_where_it_writes(tmp_path):
    folder = tiny_sae(tmp_path/'sae', 'transcoder')
    with pytest.raises(ValueError, match='does not say where it writes'): FeatureReader.load(folder)


def test_the_module_of_the_model_comes_before_the_hook(tmp_path):
    about = dict(hf_hook_name='model.layers.2.pre_feedforward_layernorm.output',
                 hf_hook_name_out='model.layers.2.post_feedforward_layernorm.output')
    reader = dictionary_at(tmp_path/'sae', 'jumprelu_transcoder', 'hook_mlp_in', about=about)
    assert reader.reads == (2, 'pre_feedforward_layernorm.output')
    assert reader.writes == (2, 'post_feedforward_layernorm.output')
    said = FeatureReader.load(tmp_path/'sae', hook='blocks.1.mlp.hook_in')
    assert said.reads == (1, 'mlp_in')


def save(model, folder):
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize('arch', ('llama', 'gemma2', 'gpt2', 'olmo2', 'glm4'))
def test_directions_of_heads_are_what_a_clamp_adds_to_the_stream(lms, tmp_path, arch, largest_error):
    model = lms[arch]
    reader = dictionary_at(tmp_path/'sae', 'jumprelu', 'attn.hook_z')
    reader = FeatureReader.load(tmp_path/'sae', target=save(model, tmp_path/'model'))
    [direction] = reader.directions(7)
    layer = decoder_layers(model)[2]
    projection = spot_of(layer, 'z').module
    zero = torch.zeros(1, 64)
    added = projection(reader.sae.W_dec[7][None]) - projection(zero)
    norm = late_norm(layer)
    if norm is not None: added = norm(added)
    cosine = torch.cosine_similarity(added[0], direction, dim=0).item()
    assert largest_error('1 - cosine, direction of heads', 1 - cosine) < 1e-5
    if norm is None: assert torch.allclose(added[0], direction, atol=1e-5)


def test_another_projection_of_the_same_name_is_not_of_heads():
    assert is_of_heads(parse_hook('transformer.h.2.attn.c_proj.input'))
    assert not is_of_heads(parse_hook('transformer.h.2.mlp.c_proj.input'))


def test_directions_of_heads_need_their_model(tmp_path):
    reader = dictionary_at(tmp_path/'sae', 'jumprelu', 'attn.hook_z')
    with pytest.raises(ValueError, match='their projection is not known: FeatureReader.load'): reader.directions(7)


def test_a_model_in_shards_and_with_eyes(lms, tmp_path):
    folder = tmp_path/'model'
    model = save_wrapped(folder, 'gemma3')
    model.save_pretrained(folder, max_shard_size='100KB')
    (folder/'model.safetensors').unlink(missing_ok=True)
    assert (folder/'model.safetensors.index.json').exists()
    assert torch.equal(load_written_by_heads(str(folder), 2), written_by_heads(decoder_layers(model)[2]))


def test_a_model_without_the_place_is_refused(lms, tokenizer, tmp_path):
    reader = FeatureReader.load(tiny_sae(tmp_path/'sae'), hook='model.layers.2.cross_attn.output')
    with pytest.raises(ValueError, match="no place 'cross_attn.output'"): Target(lms['llama'], tokenizer, reader)
    neox = more_models('gpt_neox', use_parallel_residual=True)
    between = dictionary_at(tmp_path/'mid', 'jumprelu', 'hook_resid_mid')
    with pytest.raises(ValueError, match='has no place between attention and MLP'): Target(neox, tokenizer, between)


def test_heads_of_another_width_are_refused(tokenizer, tmp_path):
    reader = dictionary_at(tmp_path/'sae', 'jumprelu', 'attn.hook_z')
    wide = tiny_model('llama', head_dim=32)
    with pytest.raises(ValueError, match='the SAE is 64 wide and the model 128'): Target(wide, tokenizer, reader)


# ---- a whole run

WHOLE_RUN = dict(
    n_hints=2, template='Feature {placeholder}, near to {hints}, means', reward='max', n_candidates=4,
    n_texts=3, n_pref=3, n_output=2, steering_kl=[.2], steering_tokens=4, steering_prompts=['We', 'I think'])

@pytest.mark.parametrize('kind, hook', [
    ('jumprelu_transcoder', 'mlp.hook_in'), ('jumprelu', 'attn.hook_z'), ('jumprelu', 'hook_attn_out'),
    ('skip_transcoder', 'ln2.hook_normalized')])
def test_a_whole_run_on_another_dictionary(tmp_path, monkeypatch, kind, hook):
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    monkeypatch.setenv('SAEEXPLAINER_CACHE', str(tmp_path/'cache'))
    file = judged_preset(tmp_path, **WHOLE_RUN)
    dictionary_at(tmp_path/'data'/'tiny'/'sae', kind, hook, layer=1, d_sae=20, threshold=THRESHOLD)
    with Run(tmp_path/'run', load_preset(file), progress=False) as run:
        execute(run, say=lambda line: None)
        assert run.reader.reads == parse_hook(f'blocks.1.{hook}')
        assert {'sft', 'dpo1'} <= set(run.store.explanations()['stage'])
        steered = run.store.rows('SELECT DISTINCT feature FROM steering WHERE value != 0')
        assert len(steered) >= 1
    assert list((tmp_path/'run'/'report').iterdir())


def test_the_direction_along_which_a_transcoder_reads(tmp_path, monkeypatch):
    monkeypatch.setenv('SAEEXPLAINER_DATA', str(tmp_path/'data'))
    file = judged_preset(tmp_path, direction='encoder')
    dictionary_at(tmp_path/'data'/'tiny'/'sae', 'transcoder', 'mlp.hook_in', layer=1, d_sae=20)
    reads, writes = (FeatureReader.load(load_preset(file, direction=name)) for name in ('encoder', 'decoder'))
    assert torch.equal(reads.directions([3, 5]), reads.sae.W_enc[:, [3, 5]].T)
    assert torch.equal(writes.directions([3, 5]), writes.sae.W_dec[[3, 5]])
    card = ExplainerCard.from_preset(load_preset(file), reads)
    card.check_reader(reads)
    with pytest.raises(ValueError, match="reads encoder directions, the preset says decoder"):
        card.check_reader(writes)
    with pytest.raises(ValueError, match="direction must be 'decoder' or 'encoder', not 'both'"):
        load_preset(file, direction='both')


def test_heads_come_side_by_side(tmp_path):
    reader = dictionary_at(tmp_path/'sae', 'jumprelu', 'attn.hook_z')
    assert load_sae(tmp_path/'sae').hook_z_reshaping_mode is False
    assert reader.encode(torch.randn(2, 3, 64)).shape == (2, 3, 512)
