"""A hook of mkdocs: formulas become MathML when the site is built, so that no page needs a script or a network to show them; a mean and its interval stay on one line of a table;
code is not searched, words are; each page links to the notebook that it is made from"""
import html, re
from math_core import LatexError, LatexToMathML

CONVERTER = LatexToMathML(fancy_error=False)

def mathml(latex, block):
    "Return one formula as MathML; the number that `\\tag` gives stands at the right"
    if '$$' in latex: raise ValueError(f'two formulas need an empty line between them: {latex.strip()}')
    number = re.search(r'\\tag\{(.*?)\}', latex)
    plain = re.sub(r'\\tag\{.*?\}', '', latex).strip()
    try: shown = CONVERTER.convert_with_local_state(plain, displaystyle=block)
    except LatexError as error: raise ValueError(f'no formula: {plain} ({error})') from None
    return f'<div class="formula"><div>{shown}</div><span>{f"({html.escape(number[1])})" if number else ""}</span></div>' if block else shown

def interval(cell): # '49.3 [45.9, 52.6], p 0.003': it may break before the p
    return re.sub(r'([-+]?[\d.]+) \[([-+]?[\d.]+), ([-+]?[\d.]+)\]', r'\1&nbsp;[\2,&nbsp;\3]', cell)

def on_page_markdown(text, page, config, **_):
    page.edit_url = f"{config['repo_url']}/blob/main/{page.meta['source']}"
    return text

def on_page_content(text, page, **_):
    text = re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', lambda m: mathml(html.unescape(m[3]), m[2] == '['), text, flags=re.S)
    if '$$' in re.sub(r'<code.*?</code>', '', text, flags=re.S): raise ValueError(f'{page.file.src_path}: a formula was not recognised as one')
    text = re.sub(r'<details class="quote"|<div class="highlight"', r'\g<0> data-search-exclude', text)
    return re.sub(r'<td[^>]*>[^<]*\[[^<]*</td>', lambda m: interval(m[0]), text)
