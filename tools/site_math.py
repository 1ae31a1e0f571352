"Formulas become MathML when the site is built, so that no page needs a script or a network to show them"
import html
import re

from math_core import LatexError, LatexToMathML

CONVERTER = LatexToMathML(fancy_error=False)
NUMBER = re.compile(r'\\tag\{(.*?)\}')
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
CODE = re.compile(r'<code.*?</code>', re.S)


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


def with_formulas(text, name):
    "Return the HTML of a page with its formulas as MathML; raise `ValueError` where one was not seen as a formula"
    text = FORMULA.sub(lambda match: mathml(html.unescape(match[3]), match[2] == '['), text)
    if '$$' in CODE.sub('', text): raise ValueError(f'{name}: a formula was not recognised as one')
    return text
