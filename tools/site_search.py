"What a search finds: the pages that `WORDS` names come first, and a method is found by its own name"
import json
from pathlib import Path

from site_nav import NAMES, WORDS

INDEX = NAMES.replace('.md', '.html#')  # sections of the page of all names, which has nothing of its own to find


def way_in(places, locations):
    "Return the first of some places that the site has, or None"
    return next((place for place in places if place in locations), None)


def ways_in(locations):
    "Return what is looked for at each place where it is found first: location -> words; raise `ValueError` without one"
    found = {}
    for words, places in WORDS.items():
        place = way_in(places, locations)
        if place is None: raise ValueError(f'a search for {words!r} leads nowhere: {", ".join(places)}')
        found.setdefault(place, []).append(words)
    return found


def last_name(entry):
    "Return the part of a dotted name that a reader may look for alone: `draw` of `FeatureExplorer.draw`"
    whole, dot, last = entry['title'].replace('<code>', '').replace('</code>', '').rpartition('.')
    return last if dot and whole.isidentifier() and last.isidentifier() else ''


def prepared(index):
    "Return the index of the search with what is looked for; such words are searched, and not shown"
    index['docs'] = [entry for entry in index['docs'] if not entry['location'].startswith(INDEX)]
    found = ways_in({entry['location'] for entry in index['docs']})
    for entry in index['docs']:
        if entry['location'] in found: entry['tags'] = found[entry['location']]
        if last := last_name(entry): entry['text'] += f'<p hidden>{last}</p>'
    return index


def prepare(site):
    "Prepare the index of a site that is built"
    file = Path(site)/'search/search_index.json'
    index = prepared(json.loads(file.read_text(encoding='utf-8')))
    file.write_text(json.dumps(index, separators=(',', ':')), encoding='utf-8')
