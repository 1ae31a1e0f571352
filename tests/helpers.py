"Tiny real models, SAEs and a tokenizer, all made here: nothing is fetched"
import json, shutil
from pathlib import Path
import torch

ARCHITECTURES = ('llama', 'gemma2', 'gemma3', 'qwen3', 'gpt2')
PLACEHOLDER = '<repo_name>' # a single reserved token, as in SmolLM2's vocabulary
SPECIALS = ['<pad>', '<s>', '</s>', '<|im_start|>', '<|im_end|>', PLACEHOLDER] # ids 0 to 5
SENTENCES = ['The cat sat on the mat and the dog lay by the fire.', 'She sells sea shells by the sea shore.',
             'What does this feature of the model mean? It means the word nation.',
             'I think that the explanation is simple: words about rain.',
             'A national park is a large area of land which is kept in its natural state.', 'for i in range(10): print(i, "hello")']
CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tiny_tokenizer(vocab=512, add_bos=False, specials=SPECIALS, bos='<s>', eos='</s>', pad='<pad>', chat=CHAT, more_text=()):
    "Byte-level BPE of at most `vocab` tokens with a chat template; any text can be encoded; pads on the left"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator([*SENTENCES, *more_text], trainers.BpeTrainer(vocab_size=vocab, special_tokens=list(specials), show_progress=False,
                                                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if add_bos: t.post_processor = processors.TemplateProcessing(single=f'{bos} $A', special_tokens=[(bos, t.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=chat, padding_side='left')


def tiny_model(arch='llama', d=64, n_layers=4, vocab=512, seed=0, **kw):
    "A random causal LM of a real architecture, fp32, eval(); ids of pad, bos and eos as in `tiny_tokenizer`"
    import transformers as T
    torch.manual_seed(seed)
    c = dict(vocab_size=vocab, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=.1)
    s = dict(hidden_size=d, num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=2, intermediate_size=2*d, head_dim=d//4,
             max_position_embeddings=512)
    kinds = [('sliding_attention', 'full_attention')[i%2] for i in range(n_layers)]
    windows = dict(sliding_window=8, query_pre_attn_scalar=d//4, layer_types=kinds)
    if arch=='llama': m = T.LlamaForCausalLM(T.LlamaConfig(**{**c, **s, **kw}))
    elif arch=='qwen3': m = T.Qwen3ForCausalLM(T.Qwen3Config(**{**c, **s, **kw}))
    elif arch=='gemma2': m = T.Gemma2ForCausalLM(T.Gemma2Config(**{**c, **s, **windows, 'attn_implementation': 'eager', **kw}))
    elif arch=='gemma3': m = T.Gemma3ForCausalLM(T.Gemma3TextConfig(**{**c, **s, **windows, **kw}))
    elif arch=='gpt2': m = T.GPT2LMHeadModel(T.GPT2Config(**{**c, **dict(n_embd=d, n_layer=n_layers, n_head=4, n_positions=512), **kw}))
    else: raise ValueError(f'no tiny model for {arch}')
    return m.eval()


WRAPPED = ('gemma3', 'gemma3n', 'gemma4', 'llama4', 'opt', 'mpt', 'bloom')

def save_wrapped(folder, arch, vocab=512, seed=0):
    "Save a tiny model of a kind whose layers lie elsewhere: Gemma 3 and 4 and Llama 4 as they are published, with a part that reads pictures"
    import transformers as T
    torch.manual_seed(seed)
    ids = dict(vocab_size=vocab, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    text = dict(ids, initializer_range=.1, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, head_dim=16, max_position_embeddings=512)
    kinds = dict(sliding_window=16, layer_types=['sliding_attention', 'full_attention']*2)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    pictures = dict(image_token_index=7, boi_token_index=8, eoi_token_index=9)
    per_layer = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=vocab, num_kv_shared_layers=0)
    if arch == 'gemma3':
        m = T.Gemma3ForConditionalGeneration(T.Gemma3Config(text_config=text | kinds | dict(query_pre_attn_scalar=16), vision_config=vision, mm_tokens_per_image=4, **pictures))
    elif arch == 'gemma3n': # its vision part needs another library
        m = T.Gemma3nForCausalLM(T.Gemma3nTextConfig(**text | kinds | per_layer | dict(altup_num_inputs=2, laurel_rank=8, activation_sparsity_pattern=[0.]*4, intermediate_size=[128]*4)))
    elif arch == 'gemma4':
        sight = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
        m = T.Gemma4ForConditionalGeneration(T.Gemma4Config(text_config=text | kinds | per_layer | dict(global_head_dim=16), vision_config=sight, audio_config=None))
    elif arch == 'llama4':
        sight = vision | dict(intermediate_size=128, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)
        m = T.Llama4ForConditionalGeneration(T.Llama4Config(text_config=text | dict(intermediate_size_mlp=128, num_local_experts=2, attn_temperature_tuning=False), vision_config=sight, **pictures))
    elif arch == 'opt': m = T.OPTForCausalLM(T.OPTConfig(**ids, hidden_size=64, num_hidden_layers=4, ffn_dim=128, num_attention_heads=4, max_position_embeddings=512, word_embed_proj_dim=64, dropout=0., init_std=.1))
    elif arch == 'mpt': m = T.MptForCausalLM(T.MptConfig(**ids, d_model=64, n_heads=4, n_layers=4, max_seq_len=1024, initializer_range=.1))
    elif arch == 'bloom': m = T.BloomForCausalLM(T.BloomConfig(**ids, hidden_size=64, n_layer=4, n_head=4, initializer_range=.1))
    m.eval().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return m


def tiny_sae(folder, architecture='jumprelu', d_in=64, d_sae=512, layer=2, hook='resid_post', seed=0, card=None, model_name=None,
             metadata=None, threshold=(.1, .6), **cfg):
    "Write a random SAE of sae-lens to `folder` (cfg.json, sae_weights.safetensors, card.json if given); returns the folder as a `Path`"
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata
    torch.manual_seed(seed)
    folder, trained = Path(folder), architecture in ('batchtopk', 'matryoshka_batchtopk')
    sae_class, cfg_class = (sae_lens.registry.get_sae_training_class if trained else sae_lens.registry.get_sae_class)(architecture)
    if architecture=='matryoshka_batchtopk': cfg = {'matryoshka_widths': [d_sae//4, d_sae], **cfg}
    if 'topk' in architecture: cfg = {'k': 16, **cfg}
    if 'transcoder' in architecture: cfg = {'d_out': d_in, 'apply_b_dec_to_input': False, **cfg}
    about = SAEMetadata(model_name=model_name, hook_name=f'blocks.{layer}.hook_{hook}', **(metadata or {}))
    sae = sae_class(cfg_class(d_in=d_in, d_sae=d_sae, metadata=about, **cfg))
    with torch.no_grad():
        for name, p in sae.named_parameters():
            if name in ('W_enc', 'W_dec'): p.normal_(std=d_in**-.5)
            elif name=='threshold': p.uniform_(*threshold)
            else: p.normal_(std=.1)
        if trained: sae.topk_threshold.fill_(sum(threshold)/2)
    (sae.save_inference_model if trained else sae.save_model)(folder)
    if card is not None: (folder/'card.json').write_text(json.dumps(card))
    return folder


# ---- models and SAEs of the paper, tiny: vocabulary, turns and files as the real ones have them

GEMMA_CHAT = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
              "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
LLAMA_CHAT = ("{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: rain<|eot_id|>' }}{% for m in messages %}"
              "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
FAMILIES = { # keywords of `tiny_tokenizer`, then what the instruct twin has instead, and the tokens at which it stops
    'gemma2': (dict(specials=['<pad>', '<eos>', '<bos>', '<start_of_turn>', '<end_of_turn>'], bos='<bos>', eos='<eos>', add_bos=True), dict(chat=GEMMA_CHAT),
               ['<eos>', '<end_of_turn>']),
    'llama': (dict(specials=['<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'], bos='<|begin_of_text|>',
                   eos='<|end_of_text|>', pad=None, add_bos=True), dict(chat=LLAMA_CHAT, eos='<|eot_id|>'), ['<|end_of_text|>', '<|eot_id|>']),
    'gpt2': (dict(specials=['<|endoftext|>'], bos='<|endoftext|>', eos='<|endoftext|>', pad=None), {}, ['<|endoftext|>'])}


def save_twin(folder, family, instruct=False, n_layers=4, d=64, seed=0):
    "A tiny base model of a family of the paper, or its instruct twin, with its tokenizer, saved to `folder`; ' ?' is one token, as in the real vocabularies"
    base, own, ends = FAMILIES[family]
    tokenizer = tiny_tokenizer(**{**base, 'chat': None, **(own if instruct else {})}, more_text=['by ? is ? of ? the ? word ?'])
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model = tiny_model(family, d, n_layers, vocab=len(tokenizer), seed=seed, **ids)
    if instruct: model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(e) for e in ends]
    model.save_pretrained(folder); tokenizer.save_pretrained(folder)
    return folder


def hub_file(hub, repo, path): # where a file of a repository lies in a hub cache, ready to be written
    commit, root = '0'*40, Path(hub)/('models--' + repo.replace('/', '--'))
    (root/'refs').mkdir(parents=True, exist_ok=True); (root/'refs'/'main').write_text(commit)
    file = root/'snapshots'/commit/path
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _arrays(seed, d, n, **scales): # random fp32 tensors by name
    g = torch.Generator().manual_seed(seed)
    shapes = dict(W_enc=(d, n), W_dec=(n, d), b_enc=(n,), b_dec=(d,), threshold=(n,))
    return {k: s*torch.randn(*shapes[k], generator=g) for k, s in scales.items()}


def gemma_scope(hub, repo, folder, d=64, n=512, seed=0): # arrays
    "`params.npz` as Gemma Scope has it"
    import numpy as np
    a = _arrays(seed, d, n, W_enc=.1, W_dec=.1, b_enc=.1, b_dec=.1, threshold=3.)
    a['threshold'] = a['threshold'].abs() + .5
    with open(hub_file(hub, repo, f'{folder}/params.npz'), 'wb') as f: np.savez(f, **{k: v.numpy() for k, v in a.items()})
    return a


def llama_scope(hub, repo, folder, layer, scale, d=64, n=512, seed=0): # arrays; scale: sqrt(d) / mean norm, which the registry repeats
    "`hyperparams.json` and weights as Llama Scope has them"
    from safetensors.torch import save_file
    a = _arrays(seed, d, n, W_enc=.1, W_dec=.1, b_enc=.1, b_dec=.1)
    norm, hook = d**.5/scale, f'blocks.{layer}.hook_resid_post'
    hyper = dict(d_model=d, d_sae=n, jump_relu_threshold=.5, hook_point_in=hook, hook_point_out=hook, dataset_average_activation_norm={'in': norm, 'out': norm})
    hub_file(hub, repo, f'{folder}/hyperparams.json').write_text(json.dumps(hyper))
    names = {'encoder.weight': a['W_enc'].T, 'decoder.weight': a['W_dec'].T, 'encoder.bias': a['b_enc'], 'decoder.bias': a['b_dec']}
    save_file({k: v.contiguous() for k, v in names.items()}, hub_file(hub, repo, f'{folder}/checkpoints/final.safetensors'))
    return a


def res_jb(hub, repo, hook, d=64, n=512, seed=0, centred=True): # arrays; centred: no encoder column reads the mean over the residual stream
    "`cfg.json` as an SAE of 2024 has it, and weights"
    from safetensors.torch import save_file
    a = _arrays(seed, d, n, W_enc=.1, W_dec=.1, b_enc=.1, b_dec=.1)
    if centred:
        for k, dim in (('W_enc', 0), ('W_dec', 1), ('b_dec', 0)): a[k] -= a[k].mean(dim, keepdim=True)
    cfg = dict(model_name='gpt2-small', hook_point=hook, hook_point_layer=int(hook.split('.')[1]), hook_point_head_index=None, d_in=d, d_sae=n, expansion_factor=n//d,
               dataset_path='Skylion007/openwebtext', is_dataset_tokenized=False, context_size=128, dtype='torch.float32', device='mps', seed=42, b_dec_init_method='geometric_median')
    hub_file(hub, repo, f'{hook}/cfg.json').write_text(json.dumps(cfg))
    save_file({k: v.contiguous() for k, v in a.items()}, hub_file(hub, repo, f'{hook}/sae_weights.safetensors'))
    return a


CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome') # None: not installed

def open_browser(playwright):
    "The Chromium that is installed, without a screen and without connections of its own"
    return playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--disable-quic', '--disable-background-networking', '--disable-component-update', '--disable-sync'])
