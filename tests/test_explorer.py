"What the explorer shows, and that nothing in it runs"
import time
from dataclasses import replace
from html.parser import HTMLParser
import pytest, torch
from saeexplainer.explorer import FeatureExplorer, labels_said, search, searchable
from saeexplainer.show import escape, visible
from saeexplainer.features import Context, Explanation
from saeexplainer.pages import explanations_html, tokens_html
from saeexplainer.presets import load_preset
from saeexplainer.replies import Reply

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)>"\'><style>*{display:none}</style>\u202e\u200b\x00'

@pytest.fixture(scope='module')
def explorer(): return FeatureExplorer(feature=13)

def hostile(explorer):
    "Another explorer, one of whose features says bad things wherever it can"
    x = FeatureExplorer(feature=13, target=explorer.target)
    bad = replace(x.feature, explanation=HOSTILE, words=(HOSTILE,), explanations=(Explanation(HOSTILE, HOSTILE),), contexts=(Context(HOSTILE, (HOSTILE, ' x'), (3., 0.), 0),))
    x.features[x.features.index(x.feature)] = x.feature = x.known[13] = bad
    x.texts[13], x.drawn[13] = searchable(bad), {0: [HOSTILE]}
    return x

def elements(page):
    "Names of all elements of a page and of their attributes"
    seen = set()
    class Read(HTMLParser):
        def handle_starttag(self, tag, attrs): seen.update([tag, *(f'{tag}.{name}' for name, _ in attrs)])
    Read().feed(page)
    return seen

def widgets(view):
    "A widget and all below it"
    return [view, *(w for child in getattr(view, 'children', ()) for w in widgets(child))]

def of(view, kind, description=None): return next(w for w in widgets(view) if type(w).__name__ == kind and description in (None, w.description))

def shown(view): return ' '.join(w.value for w in widgets(view) if type(w).__name__ == 'HTML')

def test_nothing_that_is_shown_runs(explorer):
    safe, x = elements(explorer.to_html()), hostile(explorer)
    page = x.to_html(more=x.read(HOSTILE) + x.steer(HOSTILE, .25, n_tokens=4) + x.verify(HOSTILE, 1))
    assert elements(page) <= safe | {'b', 'i', 'p', 'p.class', 'span.title'} and not set('\u202e\u200b\x00') & set(page)

def test_no_widget_runs_it_either(explorer):
    x = hostile(explorer)
    view, usual = x.view, elements(shown(FeatureExplorer(feature=13, target=explorer.target).view))
    of(view, 'Textarea').value = HOSTILE
    of(view, 'Text', 'Search').value = HOSTILE[:8]
    for button in ('Continue', 'Draw four', 'Verify'): of(view, 'Button', button).click()
    page = shown(view)
    assert elements(page) <= usual | {'b', 'i', 'p', 'p.class', 'p.role', 'span.title'} and 'Of 6 texts' in page and not set('\u202e\u200b\x00') & set(page)
    assert not set('\u202e\u200b\x00') & set(''.join([*(label for label, _ in of(view, 'Select').options), *of(view, 'Combobox').options]))

def test_the_view_and_its_list_agree(explorer):
    x = FeatureExplorer(feature=3000, target=explorer.target) # not among the first two hundred
    view = x.view
    found, query, heading = of(view, 'Select'), of(view, 'Text', 'Search'), lambda: next(w.value for w in widgets(view) if '<h2>' in str(getattr(w, 'value', '')))
    assert x.feature.index == 3000 and '/3000<' in heading() and found.value is None and 'of' in found.description
    query.value = 'future' # moves to the first one that is found
    assert x.feature.index == found.value != 3000 and x.feature.index in search(x.texts, 'future')
    hits = search(x.texts, 'future') # which the buttons stay within
    for button, at in (('Next', 1), ('Next', 2), ('Previous', 1)):
        of(view, 'Button', button).click()
        assert x.feature.index == found.value == hits[at]
    of(view, 'Button', 'Random').click()
    assert x.feature.index in hits
    last = found.options[-1][1]
    found.value = last
    assert x.feature.index == last and f'/{last}<' in heading()
    query.value = f'future {last}'[:6] + ' ' # the same hits: the view stays
    assert x.feature.index == last == found.value
    of(view, 'Button', 'Next').click(); after = x.feature.index
    of(view, 'Button', 'Previous').click()
    assert after != last == x.feature.index == found.value
    of(view, 'Button', 'Random').click()
    assert f'/{x.feature.index}<' in heading()

def test_what_goes_wrong_is_a_line_and_leaves_no_old_colours(explorer):
    x = FeatureExplorer(feature=13, target=explorer.target)
    view = x.view
    text, coloured = of(view, 'Textarea'), next(w for w in widgets(view) if 'saex-read' in getattr(w, '_dom_classes', ()))
    text.value = 'the future'
    assert 'class="lit' in coloured.value and 'role="alert"' not in shown(view)
    text.value = 'word ' * 9000 # longer than the model's context
    assert 'role="alert"' in shown(view)
    of(view, 'Button', 'Next').click()
    assert 'lit' not in coloured.value and '/13<' not in shown(view)
    of(view, 'Text', 'Search').value = 'qqqqqq'
    assert 'nothing that was said of a feature holds all of' in shown(view)

def test_depth_of_colour():
    page = tokens_html(['a', 'b', 'c', 'd'], [0., 5., 20., float('nan')], 10.)
    assert page.count('class="lit"') == 1 and page.count('class="lit strong"') == 1 and '--a:1.00' in page and '--a:0.50' in page
    assert 'lit' not in tokens_html(['a'], [1.], float('nan'))

def test_unseen_characters_leave_a_sign(tmp_path):
    (tmp_path/'a.html').write_text(escape('a\ud800b'), encoding='utf-8')
    assert visible('a\u202eb\x07c\ufeffd\U000e0041') == 'a\ufffdb\ufffdc\ufffdd\ufffd' and visible('क्\u200dष\n\t') == 'क्\u200dष\n\t'

def test_search(explorer):
    assert search(explorer.texts, '13')[0] == 13 and len(search(explorer.texts, '2014')) > 1 # by number, and by what is said
    assert 13 in search(explorer.texts, 'FUTURE the') and not search(explorer.texts, 'qqqq') and len(search(explorer.texts, '')) == len(explorer.features)

def test_all_labels_are_told_and_the_trained_one_first(explorer):
    f = replace(explorer.feature, explanation='b', explanations=tuple(Explanation(t, m) for t, m in (('a', 'mini'), ('b', 'mini'), ('c', 'other'))))
    assert labels_said(f) == {'label (mini)': 'b', 'label (mini, 2)': 'a', 'label (other)': 'c'}
    assert labels_said(replace(f, explanation='d'))['label'] == 'd'

def test_a_typed_text_is_coloured_in_half_a_second(explorer):
    text, seconds = 'The future of the town, as we see it from here, is better than its past. '*4, []
    for _ in range(3):
        start = time.process_time()/torch.get_num_threads(); page = explorer.read(text) # its own time, not that of other work on the machine
        seconds.append(time.process_time()/torch.get_num_threads() - start)
    assert min(seconds) < .5 and 'class="lit' in page

def test_one_line_for_what_cannot_be_shown(explorer, tmp_path):
    with pytest.raises(ValueError, match='there is no feature 99999 that fires: smollm2-135m/9-res-4k has'): FeatureExplorer(feature=99999)
    with pytest.raises(ValueError, match='write model/source/index'): FeatureExplorer(feature='a/b')
    with pytest.raises(ValueError, match='holds no results'): FeatureExplorer(results=tmp_path)
    with pytest.raises(ValueError, match='nothing to verify'): explorer.verify(' ')

def test_a_feature_of_another_source_is_refused(explorer):
    for make in (explorer.of, lambda name: FeatureExplorer(feature=name)):
        with pytest.raises(ValueError, match='gemma-2-9b/20-gemmascope-res-16k/8 is a feature of gemma-2-9b/20-gemmascope-res-16k, the preset smollm2-135m explains smollm2-135m/9-res-4k: name the preset'):
            make('gemma-2-9b/20-gemmascope-res-16k/8')
    assert explorer.of('smollm2-135m/9-res-4k/8') is explorer.of(8)
    for name in (True, 8., -8, '8.0'):
        with pytest.raises(ValueError, match='is not a feature'): explorer.of(name)

def test_explain_is_what_the_command_says(explorer):
    from saeexplainer.explainer import shipped_explainer
    from saeexplainer.results import Results
    x = FeatureExplorer(feature=468, target=explorer.target) # no run explained it
    assert all(who.startswith('label') for who in x.said())
    view = x.view
    of(view, 'Button', 'Explain').click()
    greedy = x.explainer.explain(x.target.reader.directions([468]), max_new_tokens=x.preset.explanation_tokens)[0]
    assert x.said()['explained here'] == greedy and escape(greedy) in shown(view) and greedy in of(view, 'Combobox').options
    assert 468 in search(x.texts, greedy) and x.own() == greedy
    shipped = Results(shipped_explainer(x.preset).parents[1]/'results').said['dpo2']
    x.feature = x.of(int(shipped.index[0]))
    assert x.own() == shipped.iloc[0] and x.feature.index not in x.explained # a run's last explainer has said it already

def test_verify_says_what_it_tests(explorer):
    x = FeatureExplorer(feature=13, target=explorer.target)
    view = x.view
    assert of(view, 'Combobox').placeholder.startswith('empty: the explainer')
    of(view, 'Button', 'Verify').click() # nothing is written in the field
    assert f'“{escape(x.own())}” (' in shown(view) and 'DPO 2' in shown(view).split('texts written from')[1].split('</p>')[0]
    of(view, 'Combobox').value = 'the word rain'
    of(view, 'Button', 'Verify').click()
    assert '“the word rain” (your own)' in shown(view)

def test_texts_that_were_not_written_are_no_misses(explorer):
    class Silent:
        def __init__(self, *said): self.said = said
        def write(self, requests, *_, **__): return [Reply(text=said) if said else Reply(error='empty', outcome='empty') for said in self.said]
    x = FeatureExplorer(feature=13, target=explorer.target)
    x.lab.writer = Silent(None, None)
    assert 'None of the 2 texts from' in x.verify('the word rain', 2) and ' reach ' not in x.verify('the word rain', 2)
    x.lab.writer = Silent(None, 'The future is near.')
    assert 'Of 1 texts written from' in x.verify('the word rain', 2) and '1 more could not be written' in x.verify('the word rain', 2)

def test_a_search_shows_the_text_that_it_found(explorer):
    x = FeatureExplorer(feature=13, target=explorer.target)
    index, text = next((i, e.text) for i, f in x.known.items() for e in f.explanations
                       if (word := e.text.split()[-1].strip("'.,").casefold()) and len(word) > 5 and word not in (f.explanation or '').casefold())
    of(x.view, 'Text', 'Search').value = word = text.split()[-1].strip("'.,")
    line = next(label for label, i in of(x.view, 'Select').options if i == index)
    assert word.casefold() in line.casefold() and '—' in line

def test_nothing_moves_and_nothing_is_cut_off(explorer):
    view = FeatureExplorer(feature=13, target=explorer.target).view
    assert of(view, 'Select').style.description_width == 'initial' and of(view, 'FloatSlider').tooltip
    assert sum(w.layout.min_height is not None for w in widgets(view) if type(w).__name__ == 'HTML') == 5 # lines whose room is kept
    assert 'Colour: the activation as a share' in shown(view)

def test_texts_of_none_are_no_trouble(explorer):
    f = replace(explorer.feature, explanations=(Explanation(None, 'mini'),), explanation=None)
    assert searchable(f, [None]) and labels_said(f) == {'label (mini)': None}
    assert explanations_html({'a': None, 'b': float('nan'), 'c': ' '}).count('<i>nothing</i>') == 3

def test_results_of_another_sae_are_not_shown(explorer):
    preset = load_preset('smollm2-135m', sae='/elsewhere/sae')
    x = FeatureExplorer(preset, feature=13, target=explorer.target)
    assert x.told is None and not [who for who in x.said() if not who.startswith('label')]
    from saeexplainer.presets import data_dir
    with pytest.raises(ValueError, match='explains features of'): FeatureExplorer(preset, results=data_dir()/'smollm2-135m'/'results')

def test_a_target_with_another_sae_is_refused(explorer, tmp_path):
    from helpers import tiny_model, tiny_sae, tiny_tokenizer
    from saeexplainer.features import save_features
    from saeexplainer.saes import FeatureReader
    from saeexplainer.target import Target
    other = Target(tiny_model(), tiny_tokenizer(), FeatureReader.load(tiny_sae(tmp_path/'sae')))
    with pytest.raises(ValueError, match='features.parquet was read from an SAE with hash .*, this one has'): FeatureExplorer(feature=13, target=other)
    rows = [dict(index=i, density=.1, max_act=float(i != 3), status='ok', explanation='x', words=[], contexts=[]) for i in (3, 5, 512)]
    preset = load_preset('smollm2-135m', features=str(save_features(rows, tmp_path/'features.parquet')), label_model=None)
    with pytest.raises(ValueError, match='features.parquet has a feature 512, the SAE has features 0 to 511: it is the file of another SAE'): FeatureExplorer(preset, target=other)
    with pytest.raises(ValueError, match='there is no feature 3 that fires'): FeatureExplorer(preset, feature=3) # its strongest activation is 0, whatever its status says

def test_clicks_take_turns(explorer):
    from threading import Thread
    x = FeatureExplorer(feature=13, target=explorer.target)
    view = x.view
    query, found, hits = of(view, 'Text', 'Search'), of(view, 'Select'), search(x.texts, '')
    begun = hits.index(13)
    clicks = [Thread(target=lambda: [of(view, 'Button', 'Next').click() for _ in range(10)]) for _ in range(4)]
    for thread in clicks: thread.start()
    for thread in clicks: thread.join()
    assert x.feature.index == hits[begun + 40] and f'/{x.feature.index}<' in shown(view) and found.value in (None, x.feature.index)

def test_numbers_that_mean_nothing_are_refused(explorer):
    for call, says in ((lambda: explorer.steer('The', float('nan')), 'the steering is nan nats'), (lambda: explorer.steer('The', float('inf')), 'the steering is inf nats'),
                       (lambda: explorer.draw(0), '0 explanations cannot be drawn'), (lambda: explorer.draw(1, temperature=float('nan')), 'temperature is nan'), (lambda: explorer.of('9'*5000), 'is not a feature')):
        with pytest.raises(ValueError, match=says): call()
    assert search(explorer.texts, '9'*5000) == []

def test_draw_is_seeded_and_kept(explorer):
    first = explorer.draw(2, seed=3)
    assert first == explorer.draw(2, seed=3) and len(first) == 2
    assert explorer.said()['drawn, seed 3, 1'] == first[0]

def test_page_of_a_feature(explorer, tmp_path):
    page = explorer.to_html(tmp_path/'13.html')
    assert (tmp_path/'13.html').read_text() == page and 'src=' not in page and 'http' not in page
