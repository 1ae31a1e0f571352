"Labels for the attribution graphs of circuit-tracer: which node is which feature, what is filled in, what is refused"
import json
import pytest, torch
from peft import LoraConfig, get_peft_model
from helpers import PLACEHOLDER, tiny_model, tiny_sae, tiny_tokenizer
from saeexplainer.cli import main
from saeexplainer.explainer import Explainer, ExplainerCard, save_adapter
from saeexplainer.features import load_features
from saeexplainer.graphs import (
    Counts, Place, SourceName, check_graph_of, explained_labels, feature_of_node, label_graph, paired, places_in,
    presets_of, read_graph, unpaired, with_labels,
)
from saeexplainer.lm.models import load_model
from saeexplainer.presets import load_preset, presets
from saeexplainer.saes import FeatureReader
from saeexplainer.verdicts import Verdict


# ---- graphs as circuit-tracer writes them

def node(node_id, feature, layer, kind, clerp='', **more):
    position = int(node_id.rpartition('_')[2])
    return dict(node_id=node_id, feature=feature, layer=layer, ctx_idx=position, feature_type=kind, token_prob=0.,
                is_target_logit=False, run_idx=0, reverse_ctx_idx=0, jsNodeId=f'{node_id}-0', clerp=clerp,
                influence=.48267510533332825, activation=None) | more

def feature_node(layer, index, position=1, **more):
    return node(f'{layer}_{index}_{position}', paired(layer, index), str(layer), 'cross layer transcoder', **more)

def error_node(layer, position=1): return node(f'{layer}_-1_{position}', -1, str(layer), 'mlp reconstruction error')

def old_error_node(layer, position=1): # as before its issue 78
    return node(f'0_{layer}_{position}', -1, str(layer), 'mlp reconstruction error')

def token_node(position=1): return node(f'E_26865_{position}', position, 'E', 'embedding')

def logit_node(layer=27, position=1):
    return node(f'{layer}_22605_{position}', 22605, str(layer), 'logit', clerp='Output " Austin" (p=0.412)')

def graph_of(*nodes, scan='smollm2-135m', source_set='res-4k'):
    metadata = dict(slug='rain', scan=scan, transcoder_list=[], prompt='It is', prompt_tokens=['It', ' is'],
                    node_threshold=.8, schema_version=1)
    if source_set: metadata['feature_details'] = dict(neuronpedia_source_set=source_set)
    first, *others = [each['node_id'] for each in nodes] or ['']
    links = [dict(source=first, target=other, weight=-1.2345678901234567e-05) for other in others]
    qparams = dict(pinnedIds=[first], supernodes=[['ours', first]], linkType='both', clickedId='', sg_pos='')
    return dict(metadata=metadata, qParams=qparams, nodes=list(nodes), links=links)

def written(folder, graph):
    file = folder/'graph.json'
    file.write_text(json.dumps(graph))
    return file


# ---- which node is which feature

@pytest.mark.parametrize('place', [Place(0, 0), Place(0, 1), Place(25, 0), Place(25, 16_383), Place(63, 4_194_303)])
def test_a_number_stands_for_one_layer_and_index(place):
    assert unpaired(paired(place.layer, place.index)) == place


def test_numbers_are_those_of_circuit_tracer():
    assert [paired(0, 0), paired(1, 0), paired(0, 1), paired(2, 0), paired(0, 41)] == [0, 1, 2, 3, 902]


@pytest.mark.parametrize('other', [error_node(3), old_error_node(3), token_node(), logit_node()])
def test_nodes_that_are_no_feature(other):
    assert feature_of_node(other) is None


def test_the_name_of_a_node_says_its_feature():
    assert feature_of_node(feature_node(20, 15589)) == Place(20, 15589)
    assert feature_of_node(feature_node(20, 15589) | dict(feature=15589, layer=20)) == Place(20, 15589) # Neuronpedia's


def test_the_number_says_it_where_the_name_does_not():
    assert feature_of_node(feature_node(20, 15589) | dict(node_id='n_1')) == Place(20, 15589)
    assert feature_of_node(feature_node(20, 15589) | dict(node_id='n_1', layer='3')) is None


@pytest.mark.parametrize('number', [None, -1, 1.5, True, 'x', 2**70])
def test_a_number_that_is_none_says_nothing(number):
    assert feature_of_node(feature_node(20, 5) | dict(node_id='n_1', feature=number)) is None


# ---- labels of a table

def test_labels_of_the_table_are_filled_in(tmp_path):
    known = {feature.index: feature.explanation for feature in load_features(load_preset('smollm2-135m'))}
    file = written(tmp_path, graph_of(feature_node(9, 5), feature_node(9, 13), feature_node(8, 5), token_node(),
                                      error_node(9), logit_node()))
    counts = label_graph(file, tmp_path/'out.json', ['smollm2-135m'])
    assert counts == Counts(labelled=2, kept=0, unknown=1, others=3)
    labels = [each['clerp'] for each in read_graph(tmp_path/'out.json')['nodes']]
    assert labels == [known[5], known[13], '', '', '', 'Output " Austin" (p=0.412)']


def test_the_built_in_preset_of_the_source_set_is_found(tmp_path):
    file = written(tmp_path, graph_of(feature_node(9, 5)))
    assert label_graph(file, tmp_path/'out.json').labelled == 1


def test_nothing_but_the_labels_is_touched(tmp_path):
    graph = graph_of(feature_node(9, 5), feature_node(9, 13, more_of_theirs={'a': [1, None]}), token_node())
    label_graph(written(tmp_path, graph), tmp_path/'out.json')
    back = read_graph(tmp_path/'out.json')
    for each in back['nodes']: each['clerp'] = ''
    assert back == graph
    assert list(back['nodes'][0]) == list(graph['nodes'][0])


def test_labels_that_are_there_are_kept_unless_replaced():
    graph = graph_of(feature_node(9, 5, clerp='mine'), feature_node(9, 13, clerp='mine too'))
    labels = {Place(9, 5): 'theirs'}
    assert with_labels(graph, labels).counts == Counts(labelled=0, kept=2, unknown=0, others=0)
    replaced = with_labels(graph, labels, replace=True)
    assert replaced.counts == Counts(labelled=1, kept=1, unknown=0, others=0)
    assert [each['clerp'] for each in replaced.graph['nodes']] == ['theirs', 'mine too']


def test_a_label_stands_on_one_line():
    labelled = with_labels(graph_of(feature_node(9, 5)), {Place(9, 5): ' two\nlines\t\0 '})
    assert labelled.graph['nodes'][0]['clerp'] == 'two lines'


def test_a_feature_is_asked_for_once():
    graph = graph_of(feature_node(9, 5, 1), feature_node(9, 5, 2), feature_node(9, 13), feature_node(8, 6))
    assert places_in(graph, load_preset('smollm2-135m')) == [5, 13]


def unlabelled():
    "Features of the shipped table without a label: one with contexts, and one that never fired"
    features = list(load_features(load_preset('smollm2-135m')))
    bare = [feature for feature in features if not feature.explanation]
    silent = next(feature.index for feature in bare if not feature.contexts)
    return next(feature.index for feature in bare if feature.contexts), silent


def test_words_at_the_peaks_stand_in_where_asked(tmp_path):
    fires, silent = unlabelled()
    file = written(tmp_path, graph_of(feature_node(9, 5), feature_node(9, fires), feature_node(9, silent)))
    assert label_graph(file, tmp_path/'without.json') == Counts(labelled=1, kept=0, unknown=2, others=0)
    assert label_graph(file, tmp_path/'with.json', peaks=True) == Counts(labelled=2, kept=0, unknown=1, others=0)
    with_label, by_peaks, _ = read_graph(tmp_path/'with.json')['nodes']
    assert with_label == read_graph(tmp_path/'without.json')['nodes'][0]
    assert by_peaks['clerp'].startswith('the word')


# ---- verdicts

def test_a_verdict_stands_behind_the_label_and_in_a_field():
    graph = graph_of(feature_node(9, 5, 1), feature_node(9, 5, 2), feature_node(9, 13), token_node())
    judged = Verdict(reached=3, texts=4, unmade=1, max_act=70., score=50., best='It is.', pieces=[], written=[])
    labels = {Place(9, 5): "the word 'is'", Place(9, 13): 'rain'}
    found = with_labels(graph, labels, verdicts={Place(9, 5): judged})
    assert found.counts == Counts(labelled=3, kept=0, unknown=0, others=1, judged=2)
    first, second, other, token = found.graph['nodes']
    assert first['clerp'] == second['clerp'] == "the word 'is' [3/4]"
    assert first['verdict'] == dict(reached=3, texts=4, unmade=1, fresh=None, score=50., max_act=70., best='It is.')
    assert other['clerp'] == 'rain' and 'verdict' not in other and 'verdict' not in token


def test_a_verdict_that_says_nothing_is_not_written_as_none_reached():
    unread = Verdict(reached=None, texts=0, unmade=4, max_act=70., score=None, best=None, pieces=[], written=[])
    found = with_labels(graph_of(feature_node(9, 5)), {Place(9, 5): 'rain'}, verdicts={Place(9, 5): unread})
    [node] = found.graph['nodes']
    assert node['clerp'] == 'rain'
    assert node['verdict']['reached'] is None and node['verdict']['unmade'] == 4


def test_a_new_label_takes_the_old_verdict_away():
    graph = graph_of(feature_node(9, 5, clerp='mine [1/4]', verdict=dict(reached=1, texts=4)))
    [node] = with_labels(graph, {Place(9, 5): 'theirs'}, replace=True).graph['nodes']
    assert node['clerp'] == 'theirs' and 'verdict' not in node


def test_labels_that_are_kept_are_not_judged():
    graph = graph_of(feature_node(9, 5, clerp='mine'))
    judged = Verdict(reached=3, texts=4, unmade=0, max_act=70., score=50., best='It is.', pieces=[], written=[])
    found = with_labels(graph, {Place(9, 5): 'theirs'}, verdicts={Place(9, 5): judged})
    assert found.counts.judged == 0
    assert found.graph == graph


def test_peaks_complete_a_table_and_no_explainer(tmp_path, capsys):
    with pytest.raises(SystemExit): main(['label-graph', str(written(tmp_path, graph_of())), '--peaks', '--explain'])
    assert '--peaks completes the labels of a table' in capsys.readouterr().err


# ---- whose features they are

def test_every_built_in_source_names_its_layer():
    for preset in map(load_preset, presets()): assert SourceName.of(preset).layer == preset.layer


def test_a_graph_of_another_model_or_dictionary_is_refused():
    preset = load_preset('smollm2-135m')
    check_graph_of(graph_of(), preset)
    with pytest.raises(ValueError, match='the graph is of gemma-2-2b, the preset explains smollm2-135m/9-res-4k'):
        check_graph_of(graph_of(scan='gemma-2-2b'), preset)
    with pytest.raises(ValueError, match='the features of the graph are of transcoder-16k, the preset explains'):
        check_graph_of(graph_of(source_set='transcoder-16k'), preset)


def test_a_scan_of_another_name_may_be_said_to_mean_the_model(tmp_path, capsys):
    graph = graph_of(feature_node(9, 5), scan='custom-123', source_set=None)
    file = written(tmp_path, graph)
    counts = label_graph(file, tmp_path/'out.json', ['smollm2-135m'], scan='custom-123')
    assert counts.labelled == 1
    said = 'graph.json does not say which dictionary its features are of: taken to be smollm2-135m/9-res-4k'
    assert said in capsys.readouterr().err


def test_a_graph_that_names_no_dictionary_needs_a_preset():
    with pytest.raises(ValueError, match=r'no built-in preset is sure .*\(the graph names no source set\): name one'):
        presets_of(graph_of(source_set=None))


def test_all_layers_of_a_source_set():
    found = presets_of(graph_of(scan='gemma-2-9b', source_set='gemmascope-res-16k'))
    assert {SourceName.of(preset).source_set for preset in found} == {'gemmascope-res-16k'}
    assert len({preset.layer for preset in found}) == len(found) > 1


def test_two_presets_of_a_layer():
    with pytest.raises(ValueError, match='smollm2-135m and smollm2-135m explain the same layer: give one'):
        presets_of(graph_of(), ['smollm2-135m', 'smollm2-135m'])


# ---- an explainer says them

@pytest.fixture(scope='module')
def tiny(tmp_path_factory): # preset, folder of an explainer
    folder = tmp_path_factory.mktemp('tiny')
    tiny_model().save_pretrained(folder/'model')
    tiny_tokenizer().save_pretrained(folder/'model')
    tiny_sae(folder/'sae')
    preset = load_preset(
        'smollm2-135m', explainer=str(folder/'model'), target=str(folder/'model'), sae=str(folder/'sae'), layer=2,
        device='cpu', template='Feature {placeholder}?', n_hints=0, placeholder=PLACEHOLDER, source='tiny/2-res-tiny',
        explanation_tokens=5)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules='all-linear', task_type='CAUSAL_LM', init_lora_weights=False)
    tuned = get_peft_model(load_model(preset.explainer, device='cpu')[0], lora)
    card = ExplainerCard.from_preset(preset, FeatureReader.load(preset), 'sft')
    save_adapter(tuned, card, folder/'sft')
    (folder/'tiny.yaml').write_text(preset.to_yaml())
    return preset, folder


def test_an_explainer_says_what_it_says_elsewhere(tiny):
    preset, folder = tiny
    reader = FeatureReader.load(preset)
    said = Explainer.from_pretrained(folder/'sft', reader).explain(reader.directions([3, 7]), max_new_tokens=5)
    assert explained_labels(preset, [3, 7, 512], folder/'sft') == dict(zip([3, 7], said))


def test_explained_by_the_command(tiny, tmp_path, capsys):
    _, folder = tiny
    graph = graph_of(feature_node(2, 3), feature_node(2, 512), token_node(), scan='tiny', source_set='res-tiny')
    file = written(tmp_path, graph)
    main(['label-graph', str(file), '--preset', str(folder/'tiny.yaml'), '--explain', '--explainer',
          str(folder/'sft'), '--json'])
    told = json.loads(capsys.readouterr().out)
    assert told == dict(labelled=1, kept=0, unknown=1, others=1, judged=0, file=str(tmp_path/'graph.labelled.json'))
    assert read_graph(told['file'])['nodes'][0]['clerp']


# ---- what is no graph

@pytest.mark.parametrize('wrong, says', [
    ({}, 'it lacks metadata, nodes, links'),
    (graph_of() | dict(metadata=dict(slug='x')), 'its metadata has no scan'),
    (graph_of() | dict(metadata=[]), 'its metadata has no scan'),
    (graph_of() | dict(nodes={}), 'its nodes are no list'),
    (graph_of() | dict(nodes=[feature_node(9, 5), 7]), 'node 1 is no object'),
    (graph_of() | dict(nodes=[dict(node_id='9_5_1')]), 'node 0 lacks feature, layer, ctx_idx, feature_type'),
    (graph_of(feature_node(9, 5) | dict(clerp=5)), 'node 0 has a clerp that is no text'),
    (graph_of(feature_node(9, 5) | dict(feature_type=None)), 'node 0 has a feature_type that is no text')])
def test_one_line_for_what_is_no_graph(tmp_path, capsys, wrong, says):
    file = written(tmp_path, wrong)
    with pytest.raises(SystemExit) as ended: main(['label-graph', str(file)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert len(lines) == 1
    assert f'graph.json is no attribution graph of circuit-tracer: {says}' in lines[0]
    assert not (tmp_path/'graph.labelled.json').exists()


@pytest.mark.parametrize('content, says', [
    (b'PK\x03\x04', 'is not JSON, or not all of it'), (b'[]', 'holds [], not an object'),
    (b'{"nodes": [', 'is not JSON, or not all of it')])
def test_one_line_for_what_is_no_json(tmp_path, content, says):
    (tmp_path/'graph.json').write_bytes(content)
    with pytest.raises(ValueError) as error: read_graph(tmp_path/'graph.json')
    assert says in str(error.value)


def test_an_explainer_needs_to_be_asked(tmp_path, capsys):
    with pytest.raises(SystemExit): main(['label-graph', str(written(tmp_path, graph_of())), '--explainer', 'ao'])
    assert '--explainer goes with --explain' in capsys.readouterr().err
