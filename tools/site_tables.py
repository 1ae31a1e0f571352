"""Tables that cells show, as a reader expects them: text to the left, numbers to the right, no numbering of rows.

pandas writes them for a notebook, all to the right and numbered from 0.
"""
import html
import re
from dataclasses import dataclass
from html.parser import HTMLParser

TABLE = re.compile(r'<table[^>]*class="dataframe.*?</table>', re.S)
NUMBER = re.compile(r'''
    [<>~$]?\s*[-+−]?[\d.,]*\d[\d.,]*(e[-+]?\d+)?          # 12, +5.0, 1,234, < 0.001, 1e-4
    \s*(%|x|s|h|min|ms|[kMGT]?B|nats)?                    # with a unit
    (\s*\[.*\])?(,\s*p\s.*)?                              # an interval; a p value
    (\s*(of|to|\u2013|/)\s*[\d.,]+\s*(%|[kMGT]?B|h|min)?)?  # 6 of 10, 1 to 2
    ''', re.X)
NOTHING = {'', 'NaN', 'None', 'nan', '<NA>', '\u2013', '-', 'NaT'}
CODE = re.compile(r'`([^`<>]+)`')


@dataclass
class Cell:
    "A cell: `th` or `td`, its attributes, the HTML in it, and the first column that it stands in"
    tag: str
    attrs: dict
    inner: str = ''
    column: int = 0

    @property
    def text(self): return html.unescape(self.inner).strip()

    @property
    def width(self): return int(self.attrs.get('colspan', 1))

    @property
    def height(self): return int(self.attrs.get('rowspan', 1))

    def shown(self, side):
        "Return the cell to be shown at a side; what stands in backticks is code"
        kept = ''.join(f' {name}="{value}"' for name, value in self.attrs.items() if name in ('colspan', 'rowspan'))
        inner = CODE.sub(r'<code>\1</code>', self.inner.strip())
        return f'<{self.tag}{kept} class="{side}">{inner}</{self.tag}>'


class Reader(HTMLParser):
    "Takes a table apart into rows of cells, those of the head first"

    def __init__(self, text):
        super().__init__(convert_charrefs=False)
        self.rows = []
        self.head = 0  # rows of it
        self.in_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if self.in_cell: self.handle_data(self.get_starttag_text())
        elif tag == 'tr': self.rows.append([])
        elif tag in ('th', 'td'):
            self.rows[-1].append(Cell(tag, dict(attrs)))
            self.in_cell = True

    def handle_startendtag(self, tag, attrs): self.handle_data(self.get_starttag_text())

    def handle_endtag(self, tag):
        if tag in ('th', 'td'): self.in_cell = False
        elif tag == 'thead': self.head = len(self.rows)
        else: self.handle_data(f'</{tag}>')

    def handle_data(self, data):
        if self.in_cell: self.rows[-1][-1].inner += data

    def handle_entityref(self, name): self.handle_data(f'&{name};')
    def handle_charref(self, name): self.handle_data(f'&#{name};')


# --- columns

def place(rows):
    "Give each cell its column: one that is higher than a row takes its place in the rows below"
    taken = {}  # column -> rows in which it is taken still
    for row in rows:
        column = 0
        for cell in row:
            while taken.get(column, 0): column += 1
            cell.column = column
            for i in range(column, column + cell.width): taken[i] = cell.height
            column += cell.width
        taken = {column: left - 1 for column, left in taken.items()}


def one_head(rows, head):
    "Return rows and height of the head, in which names of the index stand above it and not in a row of their own"
    if head < 2 or not rows[head:]: return rows, head
    above, names = rows[head-2:head]
    index = sum(cell.tag == 'th' for cell in rows[head])
    is_plain = all(cell.width == 1 for cell in above)
    if not is_plain or any(cell.text for cell in names[index:]): return rows, head
    merged = [name if name.text else cell for cell, name in zip(above, names)]
    return [*rows[:head-2], merged, *rows[head:]], head - 1


def is_numbered(rows, head):
    "Return whether the first column only numbers the rows, and has no name"
    first = [row[0] for row in rows]
    if any(cell.width > 1 or cell.height > 1 or cell.column for cell in first): return False
    texts = [cell.text for cell in first]
    return not any(texts[:head]) and texts[head:] == [str(i) for i in range(len(rows) - head)]


def is_number(text):
    "Return whether a cell holds a number, perhaps with its unit and interval"
    return NUMBER.fullmatch(text.replace('\xa0', ' ').strip()) is not None


def is_numeric(texts):
    "Return whether a column holds numbers: what is there is one"
    there = [text for text in texts if text not in NOTHING]
    return bool(there) and all(is_number(text) for text in there)


def sides_of(rows, head):
    "Return the columns that hold numbers, and are shown at the right; where there are no rows, none"
    columns = {}
    for cell in (cell for row in rows[head:] for cell in row): columns.setdefault(cell.column, []).append(cell.text)
    return {column for column, texts in columns.items() if is_numeric(texts)}


# --- tables

def readable(table):
    "Return the HTML of a pandas table as a reader expects it"
    found = Reader(table)
    rows, head = one_head(found.rows, found.head)
    if not all(rows): return table
    if is_numbered(rows, head): rows = [row[1:] for row in rows]
    place(rows)
    right = sides_of(rows, head)
    def side(cell): return 'number' if cell.column in right else 'text'
    lines = [f"<tr>{''.join(cell.shown(side(cell)) for cell in row)}</tr>" for row in rows]
    top = '\n'.join(lines[:head])
    rest = '\n'.join(lines[head:])
    return f'<table class="dataframe">\n<thead>\n{top}\n</thead>\n<tbody>\n{rest}\n</tbody>\n</table>'


def with_readable_tables(text):
    "Return the HTML of a page, its pandas tables readable"
    return TABLE.sub(lambda match: readable(match[0]), text)
