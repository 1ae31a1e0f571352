"The gallery: a fixed draw, the strictest reader counts, text is shown as it is written"
from dataclasses import replace
from pathlib import Path
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from saeexplainer.benchmark import Bench, blind_readings
from saeexplainer.gallery import exhibit_figure, exhibit_html, exhibits, verdict_counts


@pytest.fixture(scope='module')
def shown():
    return exhibits(Bench.load('bench-1'))


def test_the_draw_is_fixed_and_was_read(shown):
    features = [exhibit.feature.index for exhibit in shown]
    readings = blind_readings(Bench.load('bench-1'))
    assert features == sorted(set(features))
    assert set(features) <= set(readings[readings['method'] == 'hinted']['feature'])
    fewer = exhibits(Bench.load('bench-1'), 10)
    assert {exhibit.feature.index for exhibit in fewer} < set(features)


def test_more_than_were_read_are_refused():
    with pytest.raises(ValueError, match="121 features are wanted, readers have seen 120 by 'hinted'"):
        exhibits(Bench.load('bench-1'), 121)


@pytest.mark.parametrize('ratings, verdict', [((2, 2), 'right'), ((2, 1), 'partly'), ((0, 2), 'wrong')])
def test_the_strictest_reader_counts(shown, ratings, verdict):
    assert replace(shown[0], ratings=ratings).verdict == verdict


def test_misses_are_shown_too(shown):
    counts = verdict_counts(shown)
    assert list(counts) == ['right', 'partly', 'wrong']
    assert sum(counts.values()) == len(shown)
    assert counts['partly'] and counts['wrong']


def test_markup_in_an_explanation_is_no_markup(shown):
    page = exhibit_html(replace(shown[0], explanation='<script>alert(1)</script>'))
    assert '<script>' not in page
    assert '&lt;script&gt;' in page


def test_a_long_explanation_stays_in_the_picture(shown):
    exhibit = replace(shown[0], explanation='many words '*12)
    figure = exhibit_figure(exhibit)
    width = figure.get_size_inches()[0]*figure.dpi
    renderer = FigureCanvasAgg(figure).get_renderer()
    assert all(text.get_window_extent(renderer).x1 <= width for text in figure.axes[0].texts)


def test_the_first_page_is_short_and_counts_what_the_gallery_shows(shown):
    readme = (Path(__file__).parents[1]/'README.md').read_text(encoding='utf-8')
    counts = verdict_counts(shown)
    assert len(readme.split()) < 900
    assert '{right} of them right, {partly} partly, {wrong} wrong'.format(**counts) in readme
