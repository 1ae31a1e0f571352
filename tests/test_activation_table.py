"A table of activations: every feature on every text, each text read once"
import math
import numpy as np
import pytest
from helpers import ARCHITECTURES, tiny_model, tiny_sae, tiny_tokenizer
from saeexplainer.saes import FeatureReader
from saeexplainer.target import Target
from target_worlds import TEXTS, lively, reader_at


@pytest.fixture(scope='module')
def tokenizer(): return tiny_tokenizer()


@pytest.fixture(scope='module')
def lms(): return {arch: tiny_model(arch) for arch in ARCHITECTURES}


@pytest.fixture(scope='module')
def reader(tmp_path_factory): return reader_at(tmp_path_factory.mktemp('sae'))


@pytest.fixture(scope='module')
def llama(lms, tokenizer, reader): return Target(lms['llama'], tokenizer, reader)


@pytest.mark.parametrize('arch', ARCHITECTURES)
def test_a_table_of_activations_equals_those_of_each_feature(lms, tokenizer, reader, arch, largest_error):
    target = Target(lms[arch], tokenizer, reader)
    features = [*lively(target), 3, 500]
    table = target.max_act_table(TEXTS, features)
    wanted = np.stack([target.max_acts(TEXTS, feature) for feature in features], 1)
    assert table.shape == (len(TEXTS), 6)
    assert table.dtype == np.float32
    assert (np.isnan(table) == np.isnan(wanted)).all()
    assert largest_error('table of activations', float(np.nanmax(np.abs(table - wanted)))) < 1e-4


@pytest.mark.parametrize('architecture', ['standard', 'gated', 'topk', 'batchtopk'])
def test_a_table_with_every_kind_of_sae(lms, tokenizer, tmp_path, architecture):
    target = Target(lms['llama'], tokenizer, FeatureReader.load(tiny_sae(tmp_path, architecture)))
    features = lively(target)
    wanted = np.stack([target.max_acts(TEXTS, feature) for feature in features], 1)
    np.testing.assert_allclose(target.max_act_table(TEXTS, features), wanted, atol=1e-4)


def test_a_table_leaves_out_what_cannot_be_read(llama):
    table = llama.max_act_table(['The cat', '', 'rain '*600, '<|im_end|>'], [3, 5])
    assert np.isnan(table).all(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize('texts, features, shape', [
    ([], [3], (0, 1)),
    (['The cat'], [], (1, 0)),
    ([], [], (0, 0)),
    (['A', 'A'], [3, 3], (2, 2)),
])
def test_tables_without_texts_or_features(llama, texts, features, shape):
    assert llama.max_act_table(texts, features).shape == shape


@pytest.mark.parametrize('texts, features, line', [
    (['a'], [512], 'there is no feature 512: this SAE has features 0 to 511'),
    (['a', None], [3], 'text 1 is no text but None'),
    ('a text', [3], 'one text .* was given for a list of texts'),
])
def test_wrong_tables_are_refused(llama, texts, features, line):
    with pytest.raises(ValueError, match=line): llama.max_act_table(texts, features)


def test_a_table_that_is_not_finite_is_refused(lms, tokenizer, tmp_path):
    reader = FeatureReader.load(tiny_sae(tmp_path))
    reader.sae.W_enc.data[:, 5] = math.nan
    reader.sae.threshold.data[5] = -1.
    with pytest.raises(ValueError, match='feature 5 is not finite where the residual stream is'):
        Target(lms['llama'], tokenizer, reader).max_act_table(['The cat'], [3, 5])
