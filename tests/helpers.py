"Tiny real models, SAEs and a tokenizer, all made here: nothing is fetched"
import json
import shutil
from pathlib import Path

import numpy as np
import sae_lens
import torch
import transformers
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ARCHITECTURES = ('llama', 'gemma2', 'gemma3', 'qwen3', 'gpt2')
PLACEHOLDER = '<repo_name>' # a single reserved token, as in SmolLM2's vocabulary
SPECIALS = ['<pad>', '<s>', '</s>', '<|im_start|>', '<|im_end|>', PLACEHOLDER] # ids 0 to 5
SENTENCES = [
    'The cat sat on the mat and the dog lay by the fire.',
    'She sells sea shells by the sea shore.',
    'What does this feature of the model mean? It means the word nation.',
    'I think that the explanation is simple: words about rain.',
    'A national park is a large area of land which is kept in its natural state.',
    'for i in range(10): print(i, "hello")']
CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


# ---- models

def tiny_tokenizer(vocab=512, add_bos=False, specials=SPECIALS, bos='<s>', eos='</s>', pad='<pad>', chat=CHAT,
                   more_text=()):
    "Byte-level BPE of at most `vocab` tokens with a chat template; any text can be encoded; pads on the left"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=list(specials), show_progress=False,
                                  initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*SENTENCES, *more_text], trainer)
    if add_bos:
        special = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f'{bos} $A', special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad,
                                   chat_template=chat, padding_side='left')


def special_ids(vocab): # as in `tiny_tokenizer`
    return dict(vocab_size=vocab, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def tiny_model(arch='llama', d=64, n_layers=4, vocab=512, seed=0, **fields):
    "A random causal LM of a real architecture, fp32, eval(); ids of pad, bos and eos as in `tiny_tokenizer`"
    torch.manual_seed(seed)
    common = dict(special_ids(vocab), initializer_range=.1)
    sizes = dict(hidden_size=d, num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=2*d, head_dim=d//4, max_position_embeddings=512)
    kinds = [('sliding_attention', 'full_attention')[i % 2] for i in range(n_layers)]
    windows = dict(sliding_window=8, query_pre_attn_scalar=d//4, layer_types=kinds)
    families = { # by name: transformers imports what is asked for
        'llama': ('LlamaForCausalLM', 'LlamaConfig', sizes),
        'qwen3': ('Qwen3ForCausalLM', 'Qwen3Config', sizes),
        'gemma2': ('Gemma2ForCausalLM', 'Gemma2Config', sizes | windows | dict(attn_implementation='eager')),
        'gemma3': ('Gemma3ForCausalLM', 'Gemma3TextConfig', sizes | windows),
        'gpt2': ('GPT2LMHeadModel', 'GPT2Config', dict(n_embd=d, n_layer=n_layers, n_head=4, n_positions=512))}
    if arch not in families: raise ValueError(f'no tiny model for {arch}')
    model_class, config_class, own = families[arch]
    config = getattr(transformers, config_class)(**common | own | fields)
    return getattr(transformers, model_class)(config).eval()


# ---- models whose layers lie elsewhere

WRAPPED = ('gemma3', 'gemma3n', 'gemma4', 'llama4', 'opt', 'mpt', 'bloom')
KINDS = dict(sliding_window=16, layer_types=['sliding_attention', 'full_attention']*2)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)
PICTURES = dict(image_token_index=7, boi_token_index=8, eoi_token_index=9)


def text_config(vocab):
    return dict(special_ids(vocab), initializer_range=.1, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, intermediate_size=128, head_dim=16, max_position_embeddings=512)


def per_layer(vocab):
    return dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=vocab, num_kv_shared_layers=0)


def wrapped_gemma3(vocab):
    config = transformers.Gemma3Config(
        text_config=text_config(vocab) | KINDS | dict(query_pre_attn_scalar=16), vision_config=VISION,
        mm_tokens_per_image=4, **PICTURES)
    return transformers.Gemma3ForConditionalGeneration(config)


def wrapped_gemma3n(vocab): # its vision part needs another library
    own = dict(altup_num_inputs=2, laurel_rank=8, activation_sparsity_pattern=[0.]*4, intermediate_size=[128]*4)
    config = transformers.Gemma3nTextConfig(**text_config(vocab) | KINDS | per_layer(vocab) | own)
    return transformers.Gemma3nForCausalLM(config)


def wrapped_gemma4(vocab):
    sight = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=2, head_dim=16)
    text = text_config(vocab) | KINDS | per_layer(vocab) | dict(global_head_dim=16)
    config = transformers.Gemma4Config(text_config=text, vision_config=sight, audio_config=None)
    return transformers.Gemma4ForConditionalGeneration(config)


def wrapped_llama4(vocab):
    own = dict(intermediate_size_mlp=128, num_local_experts=2, attn_temperature_tuning=False)
    sight = dict(intermediate_size=128, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)
    config = transformers.Llama4Config(text_config=text_config(vocab) | own, vision_config=VISION | sight, **PICTURES)
    return transformers.Llama4ForConditionalGeneration(config)


def wrapped_opt(vocab):
    config = transformers.OPTConfig(
        **special_ids(vocab), hidden_size=64, num_hidden_layers=4, ffn_dim=128, num_attention_heads=4,
        max_position_embeddings=512, word_embed_proj_dim=64, dropout=0., init_std=.1)
    return transformers.OPTForCausalLM(config)


def wrapped_mpt(vocab):
    config = transformers.MptConfig(**special_ids(vocab), d_model=64, n_heads=4, n_layers=4, max_seq_len=1024,
                                    initializer_range=.1)
    return transformers.MptForCausalLM(config)


def wrapped_bloom(vocab):
    config = transformers.BloomConfig(**special_ids(vocab), hidden_size=64, n_layer=4, n_head=4, initializer_range=.1)
    return transformers.BloomForCausalLM(config)


MAKERS = dict(zip(WRAPPED, (wrapped_gemma3, wrapped_gemma3n, wrapped_gemma4, wrapped_llama4, wrapped_opt, wrapped_mpt,
                            wrapped_bloom)))

def save_wrapped(folder, arch, vocab=512, seed=0):
    """Save a tiny model of a kind whose layers lie elsewhere

    Gemma 3 and 4 and Llama 4 are as they are published, with a part that reads pictures.
    """
    torch.manual_seed(seed)
    model = MAKERS[arch](vocab)
    model.eval().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


# ---- SAEs

def own_settings(architecture, d_in, d_sae):
    "What an architecture needs beside its widths"
    own = {}
    if architecture == 'matryoshka_batchtopk': own |= dict(matryoshka_widths=[d_sae//4, d_sae])
    if 'topk' in architecture: own |= dict(k=16)
    if 'transcoder' in architecture: own |= dict(d_out=d_in, apply_b_dec_to_input=False)
    return own


def fill_sae(sae, d_in, threshold):
    "Put random weights into an SAE"
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            if name in ('W_enc', 'W_dec'): weight.normal_(std=d_in**-.5)
            elif name == 'threshold': weight.uniform_(*threshold)
            else: weight.normal_(std=.1)


def tiny_sae( # noqa: PLR0913 (each of them is another field of what an SAE says of itself)
    folder, architecture='jumprelu', d_in=64, d_sae=512, layer=2, hook='resid_post', seed=0, card=None,
    model_name=None, metadata=None, threshold=(.1, .6), **cfg):
    "Write a random SAE of sae-lens (cfg.json, sae_weights.safetensors, card.json if given); return its folder"
    torch.manual_seed(seed)
    folder = Path(folder)
    is_trained = architecture in ('batchtopk', 'matryoshka_batchtopk')
    registry = sae_lens.registry
    get_class = registry.get_sae_training_class if is_trained else registry.get_sae_class
    sae_class, config_class = get_class(architecture)
    about = SAEMetadata(model_name=model_name, hook_name=f'blocks.{layer}.hook_{hook}', **(metadata or {}))
    config = dict(d_in=d_in, d_sae=d_sae, metadata=about) | own_settings(architecture, d_in, d_sae) | cfg
    sae = sae_class(config_class(**config))
    fill_sae(sae, d_in, threshold)
    if is_trained:
        sae.topk_threshold.fill_(sum(threshold)/2)
        sae.save_inference_model(folder)
    else:
        sae.save_model(folder)
    if card is not None: (folder/'card.json').write_text(json.dumps(card))
    return folder


# ---- models and SAEs of the paper, tiny: vocabulary, turns and files as the real ones have them

GEMMA_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
LLAMA_CHAT = (
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: rain<|eot_id|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
GEMMA_SPECIALS = ['<pad>', '<eos>', '<bos>', '<start_of_turn>', '<end_of_turn>']
LLAMA_SPECIALS = ['<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>']
FAMILIES = { # keywords of `tiny_tokenizer`, then what the instruct twin has instead, and the tokens at which it stops
    'gemma2': (
        dict(specials=GEMMA_SPECIALS, bos='<bos>', eos='<eos>', add_bos=True),
        dict(chat=GEMMA_CHAT),
        ['<eos>', '<end_of_turn>']),
    'llama': (
        dict(specials=LLAMA_SPECIALS, bos='<|begin_of_text|>', eos='<|end_of_text|>', pad=None, add_bos=True),
        dict(chat=LLAMA_CHAT, eos='<|eot_id|>'),
        ['<|end_of_text|>', '<|eot_id|>']),
    'gpt2': (
        dict(specials=['<|endoftext|>'], bos='<|endoftext|>', eos='<|endoftext|>', pad=None),
        {},
        ['<|endoftext|>'])}


def save_twin(folder, family, instruct=False, n_layers=4, d=64, seed=0):
    """Save a tiny base model of a family of the paper, or its instruct twin, with its tokenizer

    ' ?' is one token, as in the real vocabularies.
    """
    base, own, ends = FAMILIES[family]
    fields = {**base, 'chat': None, **(own if instruct else {})}
    tokenizer = tiny_tokenizer(**fields, more_text=['by ? is ? of ? the ? word ?'])
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
               eos_token_id=tokenizer.eos_token_id)
    model = tiny_model(family, d, n_layers, vocab=len(tokenizer), seed=seed, **ids)
    if instruct: model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(end) for end in ends]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def hub_file(hub, repo, path):
    "Where a file of a repository lies in a hub cache, ready to be written"
    commit, root = '0'*40, Path(hub)/('models--' + repo.replace('/', '--'))
    (root/'refs').mkdir(parents=True, exist_ok=True)
    (root/'refs'/'main').write_text(commit)
    file = root/'snapshots'/commit/path
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def random_arrays(seed, d, n, **scales):
    "Random fp32 tensors by name"
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(W_enc=(d, n), W_dec=(n, d), b_enc=(n,), b_dec=(d,), threshold=(n,))
    return {name: scale*torch.randn(*shapes[name], generator=generator) for name, scale in scales.items()}


def save_arrays(arrays, file): save_file({name: array.contiguous() for name, array in arrays.items()}, file)


def gemma_scope(hub, repo, folder, d=64, n=512, seed=0): # arrays
    "`params.npz` as Gemma Scope has it"
    arrays = random_arrays(seed, d, n, W_enc=.1, W_dec=.1, b_enc=.1, b_dec=.1, threshold=3.)
    arrays['threshold'] = arrays['threshold'].abs() + .5
    with open(hub_file(hub, repo, f'{folder}/params.npz'), 'wb') as file:
        np.savez(file, **{name: array.numpy() for name, array in arrays.items()})
    return arrays


def llama_scope(hub, repo, folder, layer, scale, d=64, n=512, seed=0): # arrays
    """`hyperparams.json` and weights as Llama Scope has them

    The scale is sqrt(d) / mean norm, which the registry repeats.
    """
    arrays = random_arrays(seed, d, n, W_enc=.1, W_dec=.1, b_enc=.1, b_dec=.1)
    norm, hook = d**.5/scale, f'blocks.{layer}.hook_resid_post'
    hyper = dict(d_model=d, d_sae=n, jump_relu_threshold=.5, hook_point_in=hook, hook_point_out=hook,
                 dataset_average_activation_norm={'in': norm, 'out': norm})
    hub_file(hub, repo, f'{folder}/hyperparams.json').write_text(json.dumps(hyper))
    named = {'encoder.weight': arrays['W_enc'].T, 'decoder.weight': arrays['W_dec'].T,
             'encoder.bias': arrays['b_enc'], 'decoder.bias': arrays['b_dec']}
    save_arrays(named, hub_file(hub, repo, f'{folder}/checkpoints/final.safetensors'))
    return arrays


def res_jb(hub, repo, folder, d=64, n=512, seed=0, centred=True, hook=None): # arrays; hook: default the folder's name
    """`cfg.json` as an SAE of 2024 has it, and weights

    Where it is centred, no encoder column reads the mean over the residual stream.
    """
    arrays = random_arrays(seed, d, n, W_enc=.1, W_dec=.1, b_enc=.1, b_dec=.1)
    if centred:
        for name, dim in (('W_enc', 0), ('W_dec', 1), ('b_dec', 0)):
            arrays[name] -= arrays[name].mean(dim, keepdim=True)
    cfg = dict(
        model_name='gpt2-small', hook_point=hook or folder, hook_point_layer=int((hook or folder).split('.')[1]),
        hook_point_head_index=None, d_in=d, d_sae=n, expansion_factor=n//d,
        dataset_path='Skylion007/openwebtext', is_dataset_tokenized=False, context_size=128,
        dtype='torch.float32', device='mps', seed=42, b_dec_init_method='geometric_median')
    hub_file(hub, repo, f'{folder}/cfg.json').write_text(json.dumps(cfg))
    save_arrays(arrays, hub_file(hub, repo, f'{folder}/sae_weights.safetensors'))
    return arrays


# ---- a browser

CHROMIUM = ( # None: not installed
    shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome'))
QUIET = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--disable-background-networking',
         '--disable-component-update', '--disable-sync']

def open_browser(playwright):
    "The Chromium that is installed, without a screen and without connections of its own"
    return playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
