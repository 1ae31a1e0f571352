"""Write README.md from nbs/index.ipynb, with nbdev's own processors; `nbdev_readme` does the same through Quarto, which pip cannot install."""
import posixpath, re, shutil, textwrap

from nbdev import processors
from nbdev.config import get_config
from nbdev.process import NBProcessor

from nbmarkdown import LINK, output_markdown

# links to the docs of symbols (`add_links`) come with the docs site
PROCESSORS = 'insert_warning strip_ansi hide_line filter_stream_ rm_header_dash rm_export clean_magics hide_'.split()
DIRECTIVE = re.compile(r'^#\|\s*([\w-]+)(?::\s*(.*))?\n?', re.M)

WIDTH = 96 # columns of a code block on a repository's page

def wrapped(line):
    "Return a line of output in lines that a page shows whole, the later ones indented"
    if len(line) <= WIDTH: return [line]
    indent = line[:len(line) - len(line.lstrip())]
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent + '    ', break_long_words=False, break_on_hyphens=False, replace_whitespace=False)

def indented(text): return '\n'.join(f'    {o}'.rstrip() for line in text.rstrip().splitlines() for o in wrapped(line))

def cell_markdown(cell, links, images):
    "The pieces of Markdown that a cell turns into; `links` rewrites the links of prose"
    if cell.cell_type != 'code': return [links(cell.source)]
    said = {k: (v or '').strip() for k, v in DIRECTIVE.findall(cell.source)}
    source = DIRECTIVE.sub('', cell.source).strip()
    if said.get('include') == 'false': return []
    code = [f'```python\n{source}\n```'] if source and said.get('echo') != 'false' else []
    if said.get('output') == 'false': return code
    return code + [output_markdown(o, images/f'{cell.id}-{i}.png', indented) for i, o in enumerate(cell.outputs)]

def main():
    cfg = get_config()
    images, folder = cfg.config_path/'index_files', cfg.nbs_path.name
    shutil.rmtree(images, ignore_errors=True)
    # a link in nbs/index.ipynb starts from nbs/, one in README.md from the root
    links = lambda text: LINK.sub(lambda m: m[0] if re.match('[a-z]+:|/', m[2]) else m[1] + posixpath.normpath(posixpath.join(folder, m[2])), text)
    nb = NBProcessor(cfg.nbs_path/cfg.readme_nb, [getattr(processors, o) for o in PROCESSORS], process=True).nb
    parts = [o for cell in nb.cells for o in cell_markdown(cell, links, images)]
    (cfg.config_path/'README.md').write_text('\n\n'.join(o.strip('\n') for o in parts) + '\n', encoding='utf-8')

if __name__ == '__main__': main()
