"""Do two runs of a notebook show the same? Numbers by tolerance, all other text exactly, figures by pixels."""
import base64
import io
import re

import numpy as np
from PIL import Image

NUMBER = re.compile(r'-?(?:\d+\.\d*|\.\d+|\d+(?=[eE][+-]?\d))(?:[eE][+-]?\d+)?|\d+')
RTOL = 1e-3  # of decimal numbers; whole numbers must agree exactly
ATOL = 1e-6
LEVELS = 64  # a pixel differs by more than 64 of 255 levels
SHARE = 1e-4  # a figure differs where more than one pixel in 10,000 does


# --- texts and figures

def same_number(one, other):
    if one.isdigit() and other.isdigit(): return one == other
    values = [float(one), float(other)]
    return abs(values[0] - values[1]) <= ATOL + RTOL*max(map(abs, values))


def same_line(one, other):
    "Return whether two lines differ only a little in decimal numbers, or in the white space that aligns them"
    words = [' '.join(NUMBER.sub('#', line).split()) for line in (one, other)]
    pairs = zip(NUMBER.findall(one), NUMBER.findall(other))
    return words[0] == words[1] and all(same_number(a, b) for a, b in pairs)


def text_difference(old, new):
    "Return what differs between two texts, or None"
    if old == new: return None
    lines = old.splitlines()
    lines_now = new.splitlines()
    for line, now in zip(lines, lines_now):
        if not same_line(line, now): return f'{line.strip()[:90]!r} is now {now.strip()[:90]!r}'
    return None if len(lines) == len(lines_now) else f'{len(lines)} lines are now {len(lines_now)}'


def size_of(image): return f'{image.size[0]} x {image.size[1]}'


def figure_difference(old, new):
    "Return what differs between two PNG images in base64, or None"
    old, new = (Image.open(io.BytesIO(base64.b64decode(data))).convert('RGB') for data in (old, new))
    if old.size != new.size: return f'figure of {size_of(old)} pixels is now {size_of(new)}'
    levels = np.abs(np.asarray(old, int) - np.asarray(new, int)).max(-1)
    share = (levels > LEVELS).mean()
    return f'figure differs in {share:.2%} of its pixels' if share > SHARE else None


# --- outputs and cells

def text_of(value):
    "Return a text that a notebook may hold in lines"
    return ''.join(value) if isinstance(value, list) else str(value)


def kind_difference(old, new):
    "Return what differs between the kinds of two outputs of a cell, or None"
    if old['output_type'] != new['output_type']: return f'{old["output_type"]} is now {new["output_type"]}'
    if old['output_type'] == 'error': return 'an error is stored'
    kinds, kinds_now = (sorted(output.get('data', [])) for output in (old, new))
    return None if kinds == kinds_now else f'{kinds} is now {kinds_now}'


def output_difference(old, new):
    "Return what differs between two outputs of a cell, or None"
    if why := kind_difference(old, new): return why
    if old['output_type'] == 'stream': return text_difference(text_of(old['text']), text_of(new['text']))
    for kind, value in old['data'].items():
        differ = figure_difference if kind == 'image/png' else text_difference
        if why := differ(text_of(value), text_of(new['data'][kind])): return why
    return None


def cell_difference(old, new):
    "Return what differs between the outputs of a cell in two runs, or None; of a cell tagged `live` only their kinds"
    if old['cell_type'] != 'code': return None
    differ = kind_difference if 'live' in old['metadata'].get('tags', []) else output_difference
    outputs = old['outputs']
    outputs_now = new['outputs']
    if len(outputs) != len(outputs_now): return f'{len(outputs)} outputs are now {len(outputs_now)}'
    return next((why for output, now in zip(outputs, outputs_now) if (why := differ(output, now))), None)
