"""A hook of mkdocs: what is done to each page when the site is built.

Formulas become MathML, so that no page needs a script or a network to show them; a mean and its interval stay on one
line of a table; code is not searched, words are; each page links to the notebook that it is made from.
"""
import html
import re

from math_core import LatexError, LatexToMathML

CONVERTER = LatexToMathML(fancy_error=False)
NUMBER = re.compile(r'\\tag\{(.*?)\}')
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
CODE = re.compile(r'<code.*?</code>', re.S)
NOT_SEARCHED = re.compile(  # code, and tables that a cell shows
    r'<details(?= class="quote"|>)|<div class="highlight"|<table border="1" class="dataframe"')
TABLE_CELL = re.compile(r'<td[^>]*>[^<]*\[[^<]*</td>')
INTERVAL = re.compile(r'([-+]?[\d.]+) \[([-+]?[\d.]+), ([-+]?[\d.]+)\]')  # '49.3 [45.9, 52.6]'


def mathml(latex, block):
    "Return one formula as MathML; the number that `\\tag` gives stands at the right"
    if '$$' in latex: raise ValueError(f'two formulas need an empty line between them: {latex.strip()}')
    plain = NUMBER.sub('', latex).strip()
    try:
        shown = CONVERTER.convert_with_local_state(plain, displaystyle=block)
    except LatexError as error:
        raise ValueError(f'no formula: {plain} ({error})') from None
    if not block: return shown
    number = NUMBER.search(latex)
    label = f'({html.escape(number[1])})' if number else ''
    return f'<div class="formula"><div>{shown}</div><span>{label}</span></div>'


def interval(cell):
    "Return a cell of a table in which '49.3 [45.9, 52.6], p 0.003' may break before the p, and only there"
    return INTERVAL.sub(r'\1&nbsp;[\2,&nbsp;\3]', cell)


def on_page_markdown(text, page, config, **_):
    "Give a page the link to its notebook"
    page.edit_url = f"{config['repo_url']}/blob/main/{page.meta['source']}"
    return text


def on_page_content(text, page, **_):
    "Return the HTML of a page with its formulas, intervals, and marks for the search"
    text = FORMULA.sub(lambda match: mathml(html.unescape(match[3]), match[2] == '['), text)
    if '$$' in CODE.sub('', text): raise ValueError(f'{page.file.src_path}: a formula was not recognised as one')
    text = NOT_SEARCHED.sub(r'\g<0> data-search-exclude', text)
    return TABLE_CELL.sub(lambda match: interval(match[0]), text)
