"""Write README.md from nbs/index.ipynb, with nbdev's own processors

`nbdev_readme` does the same through Quarto, which pip cannot install.
"""
import posixpath
import re
import shutil
import textwrap

from nbdev import processors
from nbdev.config import get_config
from nbdev.process import NBProcessor

from nbmarkdown import LINK, output_markdown

# links to the docs of symbols (`add_links`) come with the docs site
PROCESSORS = 'insert_warning strip_ansi hide_line filter_stream_ rm_header_dash rm_export clean_magics hide_'.split()
DIRECTIVE = re.compile(r'^#\|\s*([\w-]+)(?::\s*(.*))?\n?', re.M)
WIDTH = 96  # columns of a code block on a repository's page


def wrapped(line):
    "Return a line of output in lines that a page shows whole, the later ones indented"
    if len(line) <= WIDTH: return [line]
    indent = line[:len(line) - len(line.lstrip())]
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent + '    ', break_long_words=False,
                         break_on_hyphens=False, replace_whitespace=False)


def indented(text):
    "Return output as a block of code"
    return '\n'.join(f'    {part}'.rstrip() for line in text.rstrip().splitlines() for part in wrapped(line))


def links_from(folder):
    "Return a function that makes links which start from `folder` start from the root"
    def rewritten(match):
        if re.match('[a-z]+:|/', match[2]): return match[0]
        return match[1] + posixpath.normpath(posixpath.join(folder, match[2]))
    return lambda text: LINK.sub(rewritten, text)


def cell_markdown(cell, links, images):
    "Return the pieces of Markdown that a cell turns into; `links` rewrites the links of prose"
    if cell.cell_type != 'code': return [links(cell.source)]
    said = {name: (value or '').strip() for name, value in DIRECTIVE.findall(cell.source)}
    if said.get('include') == 'false': return []
    source = DIRECTIVE.sub('', cell.source).strip()
    pieces = [f'```python\n{source}\n```'] if source and said.get('echo') != 'false' else []
    if said.get('output') == 'false': return pieces
    for i, output in enumerate(cell.outputs):
        pieces.append(output_markdown(output, images/f'{cell.id}-{i}.png', indented))
    return pieces


def main():
    cfg = get_config()
    images = cfg.config_path/'index_files'
    shutil.rmtree(images, ignore_errors=True)
    notebook = cfg.nbs_path/cfg.readme_nb
    cells = NBProcessor(notebook, [getattr(processors, name) for name in PROCESSORS], process=True).nb.cells
    links = links_from(cfg.nbs_path.name)
    pieces = [piece.strip('\n') for cell in cells for piece in cell_markdown(cell, links, images)]
    (cfg.config_path/'README.md').write_text('\n\n'.join(pieces) + '\n', encoding='utf-8')


if __name__ == '__main__': main()
