"""What readme.py and the site's tools share: a block of code, the outputs of a cell, and what a link looks like."""
import base64
import re

LINK = re.compile(r'(\]\(|(?:src|href)=")(?!#)([^)"\s]+)')
STYLE = re.compile(r'<style scoped>.*?</style>\s*', re.S)  # which pandas writes above a table
NOT_PLAIN = re.compile(r'[^ -Z^-~]')  # characters that end the text beside a picture, or need more than ASCII


def fenced(text, kind):
    "Return a block of code; whatever is in the text, the fence is longer"
    longest = max(map(len, re.findall('`+', text)), default=0)
    fence = '`'*max(3, 1 + longest)
    return f'{fence}{kind}\n{text.rstrip()}\n{fence}'


def picture(data, image, alt):
    "Write a figure to the file `image` and return its Markdown"
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(base64.b64decode(data))
    return f'![{NOT_PLAIN.sub("", alt)}]({image.parent.name}/{image.name})'


def output_markdown(output, image, literal, alt=''):
    "Return one output of a cell as Markdown; a figure is written to `image`, text is set by `literal`"
    if output['output_type'] == 'stream': return literal(''.join(output['text']))
    if output['output_type'] == 'error': return literal(f"{output['ename']}: {output['evalue']}")
    data = {kind: ''.join(value) for kind, value in output['data'].items()}
    if 'image/png' in data: return picture(data['image/png'], image, alt)
    if 'text/markdown' in data: return data['text/markdown']
    if 'text/html' in data: return f'<div>{STYLE.sub("", data["text/html"])}</div>'
    return literal(data['text/plain'])
