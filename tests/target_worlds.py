"What tests of reading and of steering a target share: texts, SAEs for several places, features that are active"
import numpy as np
from helpers import tiny_sae
from saeexplainer.lm.hooks import residual_stream
from saeexplainer.lm.sampling import pad
from saeexplainer.saes import FeatureReader
from saeexplainer.target import tokenise

LONG = 'She sells sea shells by the sea shore, and the dog lay by the fire.'
TEXTS = ['The cat sat on the mat.', 'I think that rain', 'A', '', LONG]
PROMPTS = ['The explanation is simple:', 'I think', 'We']


def reader_at(folder, hook='resid_post', layer=2, **sae):
    "A tiny SAE for a place of the residual stream"
    return FeatureReader.load(tiny_sae(folder, hook=hook, layer=layer, **sae))


def lively(target, n=4):
    "Features that are active on `TEXTS`, the strongest first"
    strongest = []
    for text in tokenise(target.tokenizer, TEXTS):
        if not text.counts.any(): continue
        place = dict(layer=target.reader.layer, hook=target.reader.hook)
        acts = target.reader.encode(residual_stream(target.model, **pad([text.ids], 0), **place))
        strongest.append(acts[0, 1:].max(0).values.numpy())
    return [int(feature) for feature in np.max(strongest, 0).argsort()[::-1][:n]]
