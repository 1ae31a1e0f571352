"Tiny real models, SAEs and a tokenizer, all made here: nothing is fetched"
import json
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


def tiny_tokenizer(vocab=512, add_bos=False):
    "Byte-level BPE of at most `vocab` tokens with a chat template; any text can be encoded; pads on the left"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=vocab, special_tokens=SPECIALS, show_progress=False,
                                                         initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if add_bos: t.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>', eos_token='</s>', pad_token='<pad>', chat_template=CHAT,
                                   padding_side='left')


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
