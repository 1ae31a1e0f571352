"""Hooks of mkdocs: what is done to each page when the site is built.

Formulas become MathML and tables readable; a mean and its interval stay on one line of a table; code is not searched,
words are; each page links to the file that it is made from.
"""
import re

from mkdocs.plugins import event_priority

from site_math import with_formulas
from site_search import prepare
from site_tables import with_readable_tables

NOT_SEARCHED = re.compile(  # code, and tables that a cell shows
    r'<details(?= class="quote"|>)|<div class="(?:output )?highlight"|<table class="dataframe"|<div class="saex"')
STRANGER = re.compile(r'<img alt="([^"]*)" src="https?://[^"]*" ?/?>')
TABLE_CELL = re.compile(r'<td[^>]*>[^<]*\[[^<]*</td>')
P_VALUE = re.compile(r', p (&lt; )?([\d.]+)')
INTERVAL = re.compile(r'([-+]?[\d.]+) \[([-+]?[\d.]+), ([-+]?[\d.]+)\]')  # '49.3 [45.9, 52.6]'


def without_strangers(text):
    "Return HTML in which a picture of another server, such as a badge, is its own text: pages need no network"
    return STRANGER.sub(lambda match: f'<span class="badge">{match[1]}</span>', text)


def interval(cell):
    "Return a cell of a table in which '49.3 [45.9, 52.6], p 0.003' may break before the p, and only there"
    def p_value(match): return f", p&nbsp;{'&lt;&nbsp;' if match[1] else ''}{match[2]}"
    return P_VALUE.sub(p_value, INTERVAL.sub(r'\1&nbsp;[\2,&nbsp;\3]', cell))


def on_page_markdown(text, page, config, **_):
    "Give a page the link to the file that it is made from"
    page.edit_url = f"{config['repo_url']}/blob/main/{page.meta['source']}"
    return text


def on_page_content(text, page, **_):
    "Return the HTML of a page with its formulas, tables, intervals, and marks for the search"
    text = without_strangers(with_readable_tables(with_formulas(text, page.file.src_path)))
    text = NOT_SEARCHED.sub(r'\g<0> data-search-exclude', text)
    return TABLE_CELL.sub(lambda match: interval(match[0]), text)


@event_priority(-50)  # behind the search, which writes its index, and before it is copied for pages opened from disk
def on_post_build(config, **_):
    "Let the search find first what `WORDS` says"
    prepare(config['site_dir'])
