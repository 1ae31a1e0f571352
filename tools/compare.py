"""Do two runs of a notebook show the same? Numbers by tolerance, all other text exactly, figures by pixels."""
import base64, io, re

import numpy as np
from PIL import Image

NUMBER = re.compile(r'-?(?:\d+\.\d*|\.\d+|\d+(?=[eE][+-]?\d))(?:[eE][+-]?\d+)?|\d+')
RTOL, ATOL = 1e-3, 1e-6      # of decimal numbers; whole numbers must agree exactly
LEVELS, SHARE = 64, 1e-4     # a pixel differs by more than 64 of 255 levels; a figure where more than one pixel in 10,000 does

def text_difference(old, new):
    "What differs between two texts, or None"
    if old == new: return None
    for a, b in zip(old.splitlines(), new.splitlines()):
        if not _same_line(a, b): return f'{a.strip()[:90]!r} is now {b.strip()[:90]!r}'
    if len(old.splitlines()) != len(new.splitlines()): return f'{len(old.splitlines())} lines are now {len(new.splitlines())}'

def _same_line(a, b):
    "Whether two lines are equal but for small differences of decimal numbers, and for the white space that aligns them"
    words = [' '.join(NUMBER.sub('#', o).split()) for o in (a, b)]
    return words[0] == words[1] and all(_same_number(x, y) for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)))

def _same_number(x, y):
    if x.isdigit() and y.isdigit(): return x == y
    return abs(float(x) - float(y)) <= ATOL + RTOL*max(abs(float(x)), abs(float(y)))

def figure_difference(old, new):
    "What differs between two PNG images in base64, or None"
    old, new = (Image.open(io.BytesIO(base64.b64decode(o))).convert('RGB') for o in (old, new))
    if old.size != new.size: return f'figure of {old.size[0]} x {old.size[1]} pixels is now {new.size[0]} x {new.size[1]}'
    levels = np.abs(np.asarray(old, int) - np.asarray(new, int)).max(-1)
    share = (levels > LEVELS).mean()
    if share > SHARE: return f'figure differs in {share:.2%} of its pixels'

def kind_difference(old, new):
    "What differs between the kinds of two outputs of a cell, or None"
    if old['output_type'] != new['output_type']: return f'{old["output_type"]} is now {new["output_type"]}'
    if old['output_type'] == 'error': return 'an error is stored'
    kinds = [sorted(o.get('data', [])) for o in (old, new)]
    if kinds[0] != kinds[1]: return f'{kinds[0]} is now {kinds[1]}'

def output_difference(old, new):
    "What differs between two outputs of a cell, or None"
    if why := kind_difference(old, new): return why
    if old['output_type'] == 'stream': return text_difference(_text(old['text']), _text(new['text']))
    old, new = old['data'], new['data']
    for kind in old:
        differ = figure_difference if kind == 'image/png' else text_difference
        if why := differ(_text(old[kind]), _text(new[kind])): return why

def cell_difference(old, new):
    "What differs between the outputs of a cell in two runs, or None; a cell tagged `live` is held to their kinds only"
    if old['cell_type'] != 'code': return None
    differ = kind_difference if 'live' in old['metadata'].get('tags', []) else output_difference
    old, new = old['outputs'], new['outputs']
    if len(old) != len(new): return f'{len(old)} outputs are now {len(new)}'
    return next((why for a, b in zip(old, new) if (why := differ(a, b))), None)

def _text(o): return o if isinstance(o, str) else ''.join(o) if isinstance(o, list) else str(o)
