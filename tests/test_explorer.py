"What the explorer shows, and that nothing in it runs"
import copy
import math
import re
import time
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from threading import Thread
import pytest
import torch
from helpers import tiny_model, tiny_sae, tiny_tokenizer
from saeexplainer.explainer import shipped_explainer
from saeexplainer.explorer import FeatureExplorer, labels_said, search, searchable
from saeexplainer.features import Context, Explanation, save_features
from saeexplainer.lab import Lab
from saeexplainer.pages import explanations_html, tokens_html, who_html
from saeexplainer.presets import data_dir, load_preset
from saeexplainer.replies import Reply
from saeexplainer.results import Results
from saeexplainer.saes import FeatureReader
from saeexplainer.show import escape, visible
from saeexplainer.target import Target

UNSEEN = '\u202e\u200b\x00' # what turns text around, has no width, or ends it
HOSTILE = f'<script>alert(1)</script><img src=x onerror=alert(2)>"\'><style>*{{display:none}}</style>{UNSEEN}'
ADDED = {'b', 'i', 'p', 'p.class', 'span.title'} # elements that hostile text may bring: of the explorer's own


@pytest.fixture(scope='module')
def explorer():
    "The shipped features and models, loaded; what they write is short"
    preset = load_preset('smollm2-135m', explanation_tokens=12, text_tokens=16)
    lab = Lab(preset)
    assert lab.explainer
    assert lab.writer
    return FeatureExplorer(lab, feature=13)


def another(explorer, feature=13, **parts):
    "An explorer of its own, of the same features and models; parts: of its lab, that are others"
    x = copy.copy(explorer)
    x.lab = copy.copy(explorer.lab)
    vars(x.lab).update(parts)
    for name in ('features', 'known', 'drawn', 'explained', 'texts'):
        setattr(x, name, copy.copy(getattr(explorer, name)))
    x.feature = x.of(feature)
    return x


class Saying:
    "A writer whose texts are given, over and over; None: one could not be written"
    def __init__(self, *texts): self.texts = texts

    def write(self, requests, *_, **__):
        texts = [self.texts[i % len(self.texts)] for i, _ in enumerate(requests)]
        return [Reply(error='empty', outcome='empty') if text is None else Reply(text=text) for text in texts]


@pytest.fixture
def hostile(explorer):
    "An explorer one of whose features says bad things wherever it can, and whose writer does"
    x = another(explorer, writer=Saying(HOSTILE))
    context = Context(HOSTILE, (HOSTILE, ' x'), (3., 0.), 0)
    said = (Explanation(HOSTILE, HOSTILE),)
    bad = replace(x.feature, explanation=HOSTILE, words=(HOSTILE,), explanations=said, contexts=(context,))
    x.features[x.features.index(x.feature)] = bad
    x.feature = bad
    x.known[13] = bad
    x.texts[13] = searchable(bad)
    x.drawn[13] = {0: [HOSTILE]}
    x.steer = partial(x.steer, n_tokens=4)
    return x


# ---- pages and widgets, as a test sees them

class Elements(HTMLParser):
    "Names of all elements of a page and of their attributes"
    def __init__(self):
        super().__init__()
        self.seen = set()

    def handle_starttag(self, tag, attrs):
        self.seen.update([tag, *(f'{tag}.{name}' for name, _ in attrs)])


def elements(page):
    parser = Elements()
    parser.feed(page)
    return parser.seen


def has_unseen(text): return bool(set(UNSEEN) & set(text))


def widgets(view):
    "A widget and all below it"
    below = [widget for child in getattr(view, 'children', ()) for widget in widgets(child)]
    return [view, *below]


def the(view, kind, description=None):
    "The first widget of a kind, or with a description"
    fits = (w for w in widgets(view) if type(w).__name__ == kind and description in (None, w.description))
    return next(fits)


def click(view, *names):
    for name in names: the(view, 'Button', name).click()


def coloured(view):
    "The widget that shows a text with colours"
    return next(w for w in widgets(view) if 'saex-read' in getattr(w, '_dom_classes', ()))


def shown(view):
    "All HTML of a view"
    return ' '.join(w.value for w in widgets(view) if type(w).__name__ == 'HTML')


def heading(view):
    return next(w.value for w in widgets(view) if '<h2>' in str(getattr(w, 'value', '')))


# ---- nothing runs

def test_nothing_that_is_shown_runs(explorer, hostile):
    answers = hostile.read(HOSTILE) + hostile.steer(HOSTILE, .25) + hostile.verify(HOSTILE, 1)
    page = hostile.to_html(more=answers)
    assert elements(page) <= elements(explorer.to_html()) | ADDED
    assert not has_unseen(page)


def test_no_widget_runs_it_either(explorer, hostile):
    view = hostile.view
    usual = elements(shown(another(explorer).view))
    the(view, 'Textarea').value = HOSTILE
    the(view, 'Text', 'Search').value = HOSTILE[:8]
    click(view, 'Continue', 'Draw four', 'Verify')
    page = shown(view)
    assert 'Of 6 texts' in page
    assert elements(page) <= usual | ADDED | {'p.role'}
    assert not has_unseen(page)
    assert not has_unseen(''.join(label for label, _ in the(view, 'Select').options))
    assert not has_unseen(''.join(the(view, 'Combobox').options))


def test_unseen_characters_leave_a_sign(tmp_path):
    (tmp_path/'a.html').write_text(escape('a\ud800b'), encoding='utf-8')
    assert visible('a\u202eb\x07c\ufeffd\U000e0041') == 'a\ufffdb\ufffdc\ufffdd\ufffd'
    assert visible('क्\u200dष\n\t') == 'क्\u200dष\n\t'


# ---- search and the list

@pytest.fixture
def far(explorer):
    "An explorer of a feature that is not among the first two hundred"
    return another(explorer, feature=3000)


def test_a_feature_that_the_list_does_not_hold_is_shown(far):
    assert '/3000<' in heading(far.view)
    assert the(far.view, 'Select').value is None
    assert 'of' in the(far.view, 'Select').description


def test_a_search_moves_to_the_first_that_is_found(far):
    found = the(far.view, 'Select')
    the(far.view, 'Text', 'Search').value = 'future'
    assert far.feature.index != 3000
    assert far.feature.index == found.value
    assert far.feature.index in search(far.texts, 'future')


def test_the_buttons_stay_within_what_is_found(far):
    view = far.view
    the(view, 'Text', 'Search').value = 'future'
    hits = search(far.texts, 'future')
    for button, at in (('Next', 1), ('Next', 2), ('Previous', 1)):
        click(view, button)
        assert far.feature.index == hits[at]
        assert the(view, 'Select').value == hits[at]
    click(view, 'Random')
    assert far.feature.index in hits
    assert f'/{far.feature.index}<' in heading(view)


def test_the_view_goes_to_what_is_picked_and_stays_there(far):
    "Another search with the same hits does not move it, and from the last one the buttons go round"
    view = far.view
    found = the(view, 'Select')
    query = the(view, 'Text', 'Search')
    query.value = 'future'
    last = found.options[-1][1]
    found.value = last
    assert far.feature.index == last
    assert f'/{last}<' in heading(view)
    query.value = f'future {last}'[:6] + ' '
    assert far.feature.index == last == found.value
    click(view, 'Next')
    assert far.feature.index != last
    click(view, 'Previous')
    assert far.feature.index == last == found.value


def test_search_by_number_and_by_what_is_said(explorer):
    assert search(explorer.texts, '13')[0] == 13
    assert len(search(explorer.texts, '2014')) > 1
    assert 13 in search(explorer.texts, 'FUTURE the')
    assert len(search(explorer.texts, '')) == len(explorer.features)


@pytest.mark.parametrize('words', ['qqqq', '9'*5000])
def test_search_that_finds_nothing(explorer, words):
    assert search(explorer.texts, words) == []


def last_word(text): return text.split()[-1].strip("'.,")


def told_elsewhere(explorer):
    "A feature one of whose texts ends in a long word that its label does not hold: (index, word)"
    for index, feature in explorer.known.items():
        for text in (said.text for said in feature.explanations):
            word = last_word(text)
            if len(word) > 5 and word.casefold() not in (feature.explanation or '').casefold(): return index, word


def test_a_search_shows_the_text_that_it_found(explorer):
    view = another(explorer).view
    index, word = told_elsewhere(explorer)
    the(view, 'Text', 'Search').value = word
    line = next(label for label, i in the(view, 'Select').options if i == index)
    assert word.casefold() in line.casefold()
    assert '—' in line


def test_clicks_take_turns(explorer):
    x = another(explorer)
    view = x.view
    hits = search(x.texts, '')
    begun = hits.index(13)
    def click_ten_times():
        for _ in range(10): click(view, 'Next')
    threads = [Thread(target=click_ten_times) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert x.feature.index == hits[begun + 40]
    assert f'/{x.feature.index}<' in shown(view)
    assert the(view, 'Select').value in (None, x.feature.index)


# ---- what a view shows

def test_what_goes_wrong_is_a_line_and_leaves_no_old_colours(explorer):
    view = another(explorer).view
    text = the(view, 'Textarea')
    text.value = 'the future'
    assert 'class="lit' in coloured(view).value
    assert 'role="alert"' not in shown(view)
    text.value = 'word ' * 9000 # longer than the model's context
    assert 'role="alert"' in shown(view)
    click(view, 'Next')
    assert 'lit' not in coloured(view).value
    assert '/13<' not in shown(view)


def test_a_search_for_nothing_is_a_line(explorer):
    view = another(explorer).view
    the(view, 'Text', 'Search').value = 'qqqqqq'
    assert 'nothing that was said of a feature holds all of' in shown(view)


def test_nothing_moves_and_nothing_is_cut_off(explorer):
    "The room of six lines is kept"
    view = another(explorer).view
    assert the(view, 'Select').style.description_width == 'initial'
    assert the(view, 'FloatSlider').tooltip
    assert sum(w.layout.min_height is not None for w in widgets(view) if type(w).__name__ == 'HTML') == 6
    assert 'Colour: the activation as a share' in shown(view)


def rows_of(view): # boxes whose widgets stand side by side
    return [w.children for w in widgets(view) if type(w).__name__ == 'HBox']


@pytest.mark.parametrize('name', ['Explain', 'Draw four', 'Verify', 'Continue'])
def test_a_button_has_its_status_beside_it_and_says_what_it_does(explorer, name):
    [row] = [row for row in rows_of(another(explorer).view) if name in [w.description for w in row]]
    assert [w.layout.min_height is not None for w in row][-1]
    assert type(row[-1]).__name__ == 'HTML'
    assert next(w for w in row if w.description == name).tooltip


def test_what_a_button_does_is_said_beside_it(explorer):
    x = another(explorer)
    view = x.view
    def fail(*_, **__): raise ValueError('nothing is drawn today')
    x.draw = fail
    click(view, 'Draw four')
    [row] = [row for row in rows_of(view) if 'Draw four' in [w.description for w in row]]
    assert 'nothing is drawn today' in row[-1].value
    others = [row[-1].value for row in rows_of(view) if 'Verify' in [w.description for w in row]]
    assert others == ['']


def test_the_colours_are_explained_once_above_all_tabs(explorer):
    view = another(explorer).view
    kinds = [type(w).__name__ for w in view.children]
    [legend] = [i for i, w in enumerate(view.children) if 'Colour: the activation' in str(getattr(w, 'value', ''))]
    assert legend == kinds.index('Tab') - 1


def test_whoever_said_something_is_explained(explorer):
    "In the order of the table: labels, stages of the run, what is made here"
    x = another(explorer)
    x.drawn = {x.feature.index: {0: ['rain']}}
    x.explained = {x.feature.index: 'rain'}
    assert all(' title="' in who_html(who) for who in x.said())


def test_depth_of_colour():
    page = tokens_html(['a', 'b', 'c', 'd'], [0., 5., 20., math.nan], 10.)
    assert page.count('class="lit"') == 1
    assert page.count('class="lit strong"') == 1
    assert '--a:1.00' in page
    assert '--a:0.50' in page
    assert 'lit' not in tokens_html(['a'], [1.], math.nan)


def own_time(): # not that of other work on the machine
    return time.process_time()/torch.get_num_threads()


def test_a_typed_text_is_coloured_in_half_a_second(explorer):
    text = 'The future of the town, as we see it from here, is better than its past. '*4
    seconds = []
    for _ in range(3):
        begun = own_time()
        page = explorer.read(text)
        seconds.append(own_time() - begun)
    assert min(seconds) < .5
    assert 'class="lit' in page


def test_page_of_a_feature(explorer, tmp_path):
    page = explorer.to_html(tmp_path/'13.html')
    assert (tmp_path/'13.html').read_text() == page
    assert 'src=' not in page
    assert 'http' not in page


# ---- labels and explanations

def test_all_labels_are_told_and_the_trained_one_first(explorer):
    said = (Explanation('a', 'mini'), Explanation('b', 'mini'), Explanation('c', 'other'))
    feature = replace(explorer.feature, explanation='b', explanations=said)
    assert labels_said(feature) == {'label (mini)': 'b', 'label (mini, 2)': 'a', 'label (other)': 'c'}
    assert labels_said(replace(feature, explanation='d'))['label'] == 'd'


def test_texts_of_none_are_no_trouble(explorer):
    feature = replace(explorer.feature, explanations=(Explanation(None, 'mini'),), explanation=None)
    assert searchable(feature, [None])
    assert labels_said(feature) == {'label (mini)': None}
    assert explanations_html({'a': None, 'b': math.nan, 'c': ' '}).count('<i>nothing</i>') == 3


def test_explain_is_what_the_command_says(explorer):
    x = another(explorer, feature=468) # no run explained it
    assert all(who.startswith('label') for who in x.said())
    click(x.view, 'Explain')
    reader = x.target.reader
    [greedy] = x.explainer.explain(
        reader.directions([468]), max_new_tokens=x.preset.explanation_tokens, encoders=reader.encoders([468]))
    assert x.said()['explained here'] == greedy
    assert x.own() == greedy
    assert escape(greedy) in shown(x.view)
    assert greedy in the(x.view, 'Combobox').options
    assert 468 in search(x.texts, greedy)


def test_what_the_last_explainer_of_a_run_said_is_its_own(explorer):
    "It is not asked again"
    x = another(explorer)
    shipped = Results(shipped_explainer(x.preset).parents[1]/'results').said['dpo2']
    x.feature = x.of(int(shipped.index[0]))
    assert x.own() == shipped.iloc[0]
    assert x.feature.index not in x.explained


def test_draw_is_seeded_and_kept(explorer):
    x = another(explorer)
    first = x.draw(2, seed=3)
    assert len(first) == 2
    assert x.said()['drawn, seed 3, 1'] == first[0]
    assert x.draw(2, seed=3) == first


# ---- explanations put to the test

def test_verify_says_what_it_tests(explorer):
    x = another(explorer, writer=Saying('The future is near.'))
    view = x.view
    claim = the(view, 'Combobox')
    assert claim.placeholder.startswith('empty: the explainer')
    click(view, 'Verify') # nothing is written in the field
    assert f'“{escape(x.own())}” (' in shown(view)
    assert 'DPO 2' in shown(view).split('texts written from')[1].split('</p>')[0]
    claim.value = 'the word rain'
    click(view, 'Verify')
    assert '“the word rain” (your own)' in shown(view)


def test_verify_asks_the_writer_of_the_preset(explorer):
    verdict = another(explorer).verify('the word rain', 2)
    assert 'Of 2 texts written from “the word rain”' in verdict
    assert re.search(r'on fresh texts such explanations reach it \d+% of the time', verdict)


def test_texts_that_were_not_written_are_no_misses(explorer):
    verdict = another(explorer, writer=Saying(None)).verify('the word rain', 2)
    assert 'None of the 2 texts from' in verdict
    assert ' reach ' not in verdict


def test_texts_that_were_not_written_are_told_beside_those_that_were(explorer):
    verdict = another(explorer, writer=Saying(None, 'The future is near.')).verify('the word rain', 2)
    assert 'Of 1 texts written from' in verdict
    assert '1 more could not be written' in verdict


# ---- what is refused

def test_one_line_for_what_cannot_be_shown(explorer, tmp_path):
    with pytest.raises(ValueError, match='there is no feature 99999 that fires: smollm2-135m/9-res-4k has'):
        FeatureExplorer(feature=99999)
    with pytest.raises(ValueError, match='write model/source/index'):
        FeatureExplorer(explorer.lab, feature='a/b')
    with pytest.raises(ValueError, match='holds no results'):
        FeatureExplorer(explorer.lab, results=tmp_path)
    with pytest.raises(ValueError, match='nothing to verify'): explorer.verify(' ')


def test_a_feature_of_another_source_is_refused(explorer):
    other = 'gemma-2-9b/20-gemmascope-res-16k'
    says = f'{other}/8 is a feature of {other}, the preset smollm2-135m explains smollm2-135m/9-res-4k: name the preset'
    with pytest.raises(ValueError, match=says): explorer.of(f'{other}/8')
    with pytest.raises(ValueError, match=says):
        FeatureExplorer(explorer.lab, feature=f'{other}/8')


def test_a_feature_has_a_number_and_a_name(explorer):
    assert explorer.of('smollm2-135m/9-res-4k/8') is explorer.of(8)


@pytest.mark.parametrize('name', [True, 8., -8, '8.0', '9'*5000], ids=lambda name: str(name)[:8])
def test_what_names_no_feature(explorer, name):
    with pytest.raises(ValueError, match='is not a feature'): explorer.of(name)


@pytest.mark.parametrize('kl', [math.nan, math.inf])
def test_steering_by_no_number(explorer, kl):
    with pytest.raises(ValueError, match=f'the steering is {kl} nats'):
        explorer.steer('The', kl)


def test_draws_that_mean_nothing(explorer):
    with pytest.raises(ValueError, match='0 explanations cannot be drawn'): explorer.draw(0)
    with pytest.raises(ValueError, match='temperature is nan'):
        explorer.draw(1, temperature=math.nan)


def test_results_of_another_sae_are_not_shown(explorer):
    preset = load_preset('smollm2-135m', sae='/elsewhere/sae')
    x = FeatureExplorer(preset, feature=13, target=explorer.target)
    assert x.of_runs == {}
    assert [who for who in x.said() if not who.startswith('label')] == []
    with pytest.raises(ValueError, match='explains features of'):
        FeatureExplorer(preset, results=data_dir()/'smollm2-135m'/'results')


@pytest.fixture
def other_target(tmp_path):
    return Target(tiny_model(), tiny_tokenizer(), FeatureReader.load(tiny_sae(tmp_path/'sae')))


def test_a_target_with_another_sae_is_refused(other_target):
    with pytest.raises(ValueError, match='features.parquet was read from an SAE with hash .*, this one has'):
        FeatureExplorer(feature=13, target=other_target)


@pytest.fixture
def three(tmp_path):
    "A preset with three features, the first of which never fires, whatever its status says"
    same = dict(density=.1, status='ok', explanation='x', words=[], contexts=[])
    rows = [dict(same, index=i, max_act=float(i != 3)) for i in (3, 5, 512)]
    file = save_features(rows, tmp_path/'features.parquet')
    return load_preset('smollm2-135m', features=str(file), label_model=None)


def test_a_target_with_a_smaller_sae_is_refused(three, other_target):
    says = 'features.parquet has a feature 512, the SAE has features 0 to 511: it is the file of another SAE'
    with pytest.raises(ValueError, match=says): FeatureExplorer(three, target=other_target)


def test_a_feature_that_never_fires_is_not_shown(three):
    with pytest.raises(ValueError, match='there is no feature 3 that fires'):
        FeatureExplorer(three, feature=3)
