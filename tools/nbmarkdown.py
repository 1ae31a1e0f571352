"""What readme.py and site_pages.py share: the outputs of a cell as Markdown, and what a link looks like."""
import base64, re

LINK = re.compile(r'(\]\(|(?:src|href)=")(?!#)([^)"\s]+)')

def output_markdown(o, image, literal, alt=''):
    "One output of a cell; a figure is written to `image`, text is set by `literal`"
    if o['output_type'] == 'stream': return literal(''.join(o['text']))
    if o['output_type'] == 'error': return literal(f"{o['ename']}: {o['evalue']}")
    data = {k: ''.join(v) for k, v in o['data'].items()}
    if 'image/png' in data:
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(base64.b64decode(data['image/png']))
        return f"![{re.sub(r'[^ -Z^-~]', '', alt)}]({image.parent.name}/{image.name})"
    if 'text/markdown' in data: return data['text/markdown']
    if 'text/html' in data: return '<div>' + re.sub(r'<style scoped>.*?</style>\s*', '', data['text/html'], flags=re.S) + '</div>' # without pandas' style
    return literal(data['text/plain'])
