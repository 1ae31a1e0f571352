"""Reading dictionaries at every place of a layer, against the whole model, and against an SAE behind the layer.

    python bench/places.py [--preset smollm2-135m] [--layer 9] [--texts 96] [--repeats 3] [--cpu-time] [--json FILE]

A random dictionary of each kind stands at each place of one layer of the preset's target. The same texts in the same
batches are read three ways, in turns in one process: the whole model with its LM head and the whole dictionary;
`Target.max_acts`; and the forward pass that stops at the place, which nothing can be quicker than. Recorded are the
ratios of median seconds. What a place costs beside an SAE behind the same layer is recorded too. Fails where scores
differ by more than 1e-4 of the largest activation (or of 1), or where a ratio is too small.
"""
import sys

import torch
from record import finish, in_turns, model_options, row
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import JumpReLUTranscoder, JumpReLUTranscoderConfig
from scoring import busy_features, difference, floor, sentences, whole_model

from saeexplainer.lm.heads import written_by_heads
from saeexplainer.lm.hooks import decoder_layers, residual_hook
from saeexplainer.lm.models import load_model
from saeexplainer.presets import load_preset
from saeexplainer.saes import FeatureReader
from saeexplainer.target import Target

BEHIND = 'hook_resid_post'
HOOKS = ('hook_resid_mid', 'hook_attn_out', 'hook_mlp_out', 'attn.hook_z', 'mlp.hook_in', 'ln2.hook_normalized')
READ_BY_TRANSCODERS = ('mlp.hook_in', 'ln2.hook_normalized')
FEATURES = 4096


def arguments():
    parser = model_options(__doc__)
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--layer', type=int, default=9)
    parser.add_argument('--texts', type=int, default=96)
    parser.add_argument('--repeats', type=int, default=3)
    return parser.parse_args()


def reader_at(model, layer, hook): # -> FeatureReader
    "Return a reader of a random dictionary"
    torch.manual_seed(0)
    width = model.config.get_text_config().hidden_size
    if hook == 'attn.hook_z': width = len(written_by_heads(decoder_layers(model)[layer]))
    about = SAEMetadata(hook_name=f'blocks.{layer}.{hook}', hook_name_out=f'blocks.{layer}.hook_mlp_out')
    sizes = dict(d_in=width, d_sae=FEATURES, metadata=about, apply_b_dec_to_input=False)
    if hook in READ_BY_TRANSCODERS: sae = JumpReLUTranscoder(JumpReLUTranscoderConfig(**sizes, d_out=width))
    else: sae = JumpReLUSAE(JumpReLUSAEConfig(**sizes))
    with torch.no_grad():
        for weights in (sae.W_enc, sae.W_dec): weights.normal_(std=width**-.5)
        sae.threshold.fill_(.1)
    return FeatureReader(sae.eval().requires_grad_(False))


def passing(target, batch): # at the place, in a whole forward pass -> (rows, seq, d)
    seen = []
    with residual_hook(target.model, *target.reader.reads, seen.append): target.model(**batch, use_cache=False)
    return seen[0]


def measured(target, behind, texts, args): # -> rows
    "Compare reading at a place with the whole model, with the floor, and with an SAE behind the layer"
    features = busy_features(target, texts)
    ways = dict(plain=lambda: whole_model(target, texts, features, passing),
                ours=lambda: target.max_acts(texts, features),
                floor=lambda: floor(target, texts),
                behind=lambda: behind.max_acts(texts, features))
    seconds, scores = in_turns(ways, args.repeats, args.clock)
    if difference(scores['ours'], scores['plain']) > 1e-4: sys.exit('the scores differ')
    place = target.reader.hook
    what = f'reading {place} of layer {args.layer} of {len(decoder_layers(target.model))}'
    return [row(what, 'full forward with LM head + full encode', seconds['plain']/seconds['ours'], 3.),
            row(what, 'bare truncated forward (the floor)', seconds['floor']/seconds['ours'], .85),
            row(what, 'an SAE behind the same layer', seconds['behind']/seconds['ours'], 1/1.15)]


def main():
    args = arguments()
    preset = load_preset(args.preset)
    model, tokenizer = load_model(preset.target, args.dtype, preset.device)
    texts = sentences(args.texts)
    sizes = (preset.batch_size, preset.batch_tokens)
    behind = Target(model, tokenizer, reader_at(model, args.layer, BEHIND), *sizes)
    rows = []
    for hook in HOOKS:
        target = Target(model, tokenizer, reader_at(model, args.layer, hook), *sizes)
        rows += measured(target, behind, texts, args)
    return finish(rows, args.json)


if __name__ == '__main__': sys.exit(main())
