"""Where pages stand in the navigation, what they are called there, and which of them a search shows first.

Notebooks are named by their path within nbs/, without the ending.
"""
from pathlib import Path

START = 'quickstart first_look teach install howto gallery faq'.split()  # of guide/
HOW_RIGHT = 'how_right'
RECIPES = '''
    your_own_sae writers paper_presets another_width explain_gemma train_sae layer_saes train_transcoder circuit_graph
    whole_model second_writer build_features ranking benchmarks families'''.split()
PARTS = {  # group -> notebook of parts/ -> its title in words
    'The front door': {
        'lab': 'The lab',
        'presets': 'Presets',
        'saeexplainer': 'The package and its first names',
        'doctor': 'What a machine has',
        'cli': 'The code of the command line',
        'main': 'python -m saeexplainer',
    },
    'Dictionaries and features': {
        'features': 'Features and their file',
        'names': 'How features are named',
        'selection': 'Which features are meant',
        'saes': 'Reading a dictionary',
        'catalogue': 'All dictionaries of sae-lens',
        'dictionary_learning': 'Folders of dictionary_learning',
        'sparsify': 'Folders of sparsify',
        'sources/neuronpedia': 'Features of Neuronpedia',
        'sources/corpus': 'A corpus',
        'sources/reading': 'Features read from a corpus',
        'sources/contexts': 'Excerpts to judge by',
        'sources/sae_training': 'Training an SAE',
        'sources/transcoder_training': 'Training a transcoder',
    },
    'Models': {
        'lm/models': 'Loading a model',
        'lm/places': 'Places in a layer',
        'lm/hooks': 'Layers and their hooks',
        'lm/heads': 'What heads write',
        'lm/chat': 'Chat templates',
        'lm/sampling': 'Sampling',
        'target': 'The target model',
        'steering': 'Steering',
        'models': 'Former address: models',
    },
    'The explainer': {
        'explainer': 'The explainer and its folder',
        'hints': 'Hints in the prompt',
        'reranking': 'The best of several explanations',
        'self_activation': 'What an explanation\'s own words set off',
        'dictionaries': 'Whole dictionaries, and directions',
        'bridge': 'A bridge between two models',
        'joint': 'One explainer for several dictionaries',
        'training': 'What all trainings share',
        'grpo': 'Online RL',
        'labels': 'Labels by a reader of texts',
        'lookups': 'Lookups that need no training',
    },
    'Preferences and writers': {
        'writer': 'The writer of a preset',
        'replies': 'Requests and replies',
        'writers/local': 'A writer in this process',
        'writers/openai': 'A writer at a server',
        'writers/server': 'What a server takes',
        'writers/exchange': 'One request, from first to last',
        'writers/keys': 'Keys',
        'writers/budget': 'What may be spent',
        'writers/traffic': 'When requests are sent',
        'writers/errors': 'What servers say is wrong',
        'writers/parsing': 'What a reply carries',
        'remote': 'Former address: remote',
    },
    'Measuring': {
        'verdicts': 'Verdicts of the target',
        'explanation_files': 'Files of explanations',
        'measuring': 'Explanations from anywhere',
        'evaluation/texts': 'Texts to measure by',
        'evaluation/steering': 'Texts of a steered target',
        'evaluation/judge': 'The judge',
        'evaluation/stats': 'Intervals and differences',
        'evaluation/tables': 'Tables of means',
        'evaluation/beyond': 'Measures beyond the paper',
        'evaluation/words': 'Words that are named',
        'evaluation/detection': 'Detection by a reader',
        'evaluation/retrieval': 'Retrieval of the feature',
        'evaluation/paraphrase': 'In other words',
        'calibration': 'How far a count can be trusted',
        'reading_sheets': 'Blind reading: the sheet',
        'evaluation/readings': 'Blind reading: what it says',
        'benchmark': 'The ranking of methods',
        'studies': 'Studies beside a run',
        'bridge_study': 'A study of bridges',
        'layers_study': 'A study of five layers',
    },
    'Running at scale': {
        'run': 'A run and its stages',
        'plan': 'What a run will take',
        'store': 'The store of a run',
        'files': 'Files that are whole',
        'executor': 'Workers on a Ray cluster',
        'sharing': 'A training shared by processes',
        'crew': 'A training on a cluster',
    },
    'Looking and sharing': {
        'explorer': 'The explorer',
        'gallery': 'Features on show',
        'pages': 'A feature as a page',
        'show': 'Text that is safe to show',
        'plots': 'Figures',
        'results': 'Results of a finished run',
        'document': 'A page that needs nothing else',
        'report': 'The report',
        'export': 'Formats of others',
        'cards': 'Cards for the hub',
        'graphs': 'Attribution graphs in words',
    },
}
OTHERS = 'More'  # the group of parts that none names
CHECKED_IN = {  # file of the repository -> page
    'data/smollm2-135m/README.md': 'data-embedded.md', 'data/smollm2-135m-mlp/README.md': 'data-mlp.md',
    'data/paper/README.md': 'data-paper.md', 'CHANGELOG.md': 'changelog.md', 'CONTRIBUTING.md': 'contributing.md'}
DATA = {'Embedded model, SAE, labels': 'data-embedded.md', 'Its transcoder': 'data-mlp.md',
        "The paper's numbers": 'data-paper.md'}
COMMANDS = 'command_line.md'
NAMES = 'api.md'

# --- search

WORDS = {  # what is looked for -> where a reader would go: the first of these that the site has
    'quickstart': ['guide/quickstart.html', 'index.html'],
    'first steps': ['guide/quickstart.html', 'index.html'],
    'install': ['guide/install.html', 'index.html'],
    'pip': ['guide/install.html', 'index.html'],
    'requirements': ['guide/install.html', 'index.html'],
    'colab binder': ['guide/first_look.html', 'guide/quickstart.html', 'index.html'],
    'howto': ['guide/howto.html', 'index.html'],
    'gallery': ['guide/gallery.html', 'parts/explorer.html'],
    'troubleshooting': ['guide/faq.html', 'parts/doctor.html'],
    'faq': ['guide/faq.html', 'index.html'],
    'accuracy': ['how_right.html', 'metrics.html'],
    'citation': ['index.html#cite', 'index.html'],
    'bibtex': ['index.html#cite', 'index.html'],
    'own SAE': ['recipes/your_own_sae.html'],
    'verify': ['command_line.html#verify'],
    'evaluate csv': ['command_line.html#evaluate'],
    'steering': ['parts/steering.html'],
    'FeatureExplorer': ['parts/explorer.html#featureexplorer'],
    'command line': ['command_line.html'],
    'API': ['api.html'],
    'Lab': ['parts/lab.html'],
    'load': ['parts/lab.html'],
    'SAELens': ['recipes/your_own_sae.html'],
    'gemma': ['recipes/paper_presets.html'],
    'llama': ['recipes/paper_presets.html'],
    'score': ['metrics.html'],
    'licence license': ['index.html#cite', 'index.html'],
    'Excel': ['guide/howto.html#measure-my-csv', 'command_line.html#evaluate'],
    'duration': ['guide/install.html#how-long', 'guide/install.html', 'index.html'],
    'release': ['changelog.html'],
}
BOOSTS = {'guide/': 8, 'recipes/': 4, 'command_line': 4, 'how_right': 4, 'index': 2, 'glossary': 2, 'parts/cli': .5,
          'parts/remote': .1, 'parts/models': .1}


def boost(page):
    "Return how much a page counts in a search, beside 1 for most of them"
    return next((much for begin, much in BOOSTS.items() if page.startswith(begin)), 1)


# --- titles

def group_of(name):
    "Return the group of a notebook of parts/, and its title in words, or None"
    for group, titles in PARTS.items():
        if name in titles: return group, titles[name]
    return OTHERS, None


def title_of(name, heading):
    "Return what a page is called in the navigation; `heading` is what its notebook calls itself"
    folder, _, rest = name.partition('/')
    if folder == 'parts': return group_of(rest)[1] or heading
    if folder == 'recipes':
        short = heading.removeprefix('Recipe: ')
        return short[0].upper() + short[1:]
    number = Path(name).name.split('_')[0]
    return f'{int(number)}. {heading}' if number.isdigit() else heading


# --- the sidebar

def arranged(folder, order, names):
    "Return the notebooks of a folder: those that `order` names, then the others"
    there = [name for name in names if name.startswith(f'{folder}/')]
    named = [f'{folder}/{name}' for name in order]
    return [name for name in named if name in there] + [name for name in there if name not in named]


def parts_by_group(names):
    "Return the notebooks of parts/ by group; no group is empty"
    groups = {group: [f'parts/{name}' for name in titles] for group, titles in PARTS.items()}
    named = {name for group in groups.values() for name in group}
    groups[OTHERS] = [name for name in names if name.startswith('parts/') and name not in named]
    there = {group: [name for name in group_names if name in names] for group, group_names in groups.items()}
    return {group: group_names for group, group_names in there.items() if group_names}


def section(title, entries):
    "Return a section of the sidebar; none where it would be empty"
    return [{title: entries}] if entries else []


def navigation(titles, to):
    "Return the sidebar as mkdocs takes it; `titles` and `to` have the title and the page of each notebook"
    files = {name.removesuffix('.ipynb'): {title: to[name]} for name, title in titles.items()}
    def entries(names): return [files[name] for name in names if name in files]
    chapters = [name for name in files if '/' not in name and name[0].isdigit()]
    groups = [{group: entries(found)} for group, found in parts_by_group(files).items()]
    return [{'Home': 'index.md'},
            *section('Start', entries(arranged('guide', START, files))),
            *entries([HOW_RIGHT]),
            *section('Chapters', entries(chapters)),
            *section('Recipes', entries(arranged('recipes', RECIPES, files))),
            *section('Reference', [{'Command line': COMMANDS}, {'API index': NAMES}, *groups]),
            *section('Data', [{title: page} for title, page in DATA.items()]),
            *entries(['glossary']),
            {'Changelog': 'changelog.md'},
            {'Contributing': 'contributing.md'}]
