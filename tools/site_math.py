"""A hook of mkdocs: formulas become MathML when the site is built, so that no page needs a script or a network to show them"""
import html, re
from latex2mathml.converter import convert

def mathml(latex, block):
    "One formula; the number that `\\tag` gives stands at the right"
    number = re.search(r'\\tag\{(.*?)\}', latex)
    latex = re.sub(r'\\tag\{.*?\}|\\[bB]igg?(?=\\?[{}()\[\]|])', '', latex)
    latex = re.sub(r'\\arg(?![a-zA-Z])', r'\\mathrm{arg}', latex) # which the converter does not know
    shown = convert(latex.strip(), display='block' if block else 'inline')
    if unknown := re.search(r'>(\\[a-zA-Z]+)', shown): raise ValueError(f'{unknown[1]} in a formula is not known to the converter: {latex.strip()}')
    return f'<div class="formula">{shown}<span>{f"({html.escape(number[1])})" if number else ""}</span></div>' if block else shown

def on_page_content(text, **_):
    return re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', lambda m: mathml(html.unescape(m[3]), m[2] == '['), text, flags=re.S)
