"All that a run needs, made in a folder: a tiny model, its SAE, a table of its features and the preset that names them"
import json
import shutil
import sqlite3
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import PLACEHOLDER, tiny_model, tiny_sae, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from saeexplainer.explainer import ExplainerCard, save_adapter
from saeexplainer.lm.models import load_model
from saeexplainer.presets import AS_PAPER, Preset, load_preset
from saeexplainer.run import Run, execute
from saeexplainer.saes import FeatureReader
from saeexplainer.store import KEYS

WORDS = ('cat dog mat fire sea shells rain nation park large '
         'area land model feature word natural state hello range print').split()
N_FEATURES = 40
WITHOUT_LABEL = {36: 'dead', 37: 'dense', 38: 'unlabelled', 39: 'dead'}
NO_DIRECTION = (7, 33) # features of a lab with an explainer whose direction is zero
SAE = dict(d_sae=N_FEATURES, layer=1, model_name='tiny', threshold=(.01, .02))
STAGES = ['sft', 'prefs1', 'dpo1', 'prefs2', 'dpo2', 'evaluate']
SMALL = dict( # fields of a preset with which a whole run takes seconds
    n_sft=8, n_pref=4, n_test=4, n_candidates=4, n_texts=2, n_generative=2, n_activating=2, n_neutral=2, n_output=2,
    sft_batch=4, sft_epochs=2., dpo_batch=2, dpo_epochs=2., threshold=0., spread=0., margin=0.,
    explanation_tokens=6, text_tokens=8, steering_kl=[.01], steering_tokens=4,
    batch_size=8, device='cpu', dtype='float32')


@dataclass(frozen=True)
class TinyLab:
    "A folder with all that a run needs"
    folder: Path

    @property
    def file(self) -> Path:
        "The preset, as YAML"
        return self.folder/'tiny.yaml'

    @property
    def data(self) -> Path:
        "What stands for data/ of the package"
        return self.folder/'data'

    @property
    def model(self) -> Path: return self.folder/'model'

    @property
    def sae(self) -> Path: return self.data/'tiny'/'sae'

    @property
    def features(self) -> Path: return self.data/'tiny'/'features.parquet'

    @property
    def explainer(self) -> Path:
        "A random adapter, where the lab was made with one"
        return self.folder/'sft'

    def preset(self, **fields) -> Preset: return load_preset(self.file, **fields)

    def run(self, folder:Path, like:Path|None=None, **fields) -> Run:
        "Open a run; the fields are those of the preset that differ"
        return Run(folder, self.preset(**fields), like=like, progress=False)

    @contextmanager
    def in_use(self):
        "Within, its data are those that are shipped"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('SAEEXPLAINER_DATA', str(self.data))
            yield self


def silent(line): pass

def finish(run) -> Path: # the folder of its report
    "Execute a run without a word"
    return execute(run, say=silent)


def feature_row(index):
    "A row of a feature table"
    word = WORDS[index % len(WORDS)]
    status = WITHOUT_LABEL.get(index, 'ok')
    context = dict(source='test', tokens=['a', ' cat'], values=[0., 4.], peak=1)
    return dict(index=index, density=.01, max_act=1., status=status, words=[word],
                explanation=f"the word '{word}'" if status == 'ok' else None, contexts=[context])


def make_lab(folder, **fields) -> TinyLab:
    "Write a lab into a folder; the fields are those of its preset that differ"
    lab = TinyLab(Path(folder))
    tiny_model(n_layers=3).save_pretrained(lab.model)
    tiny_tokenizer().save_pretrained(lab.model)
    tiny_sae(lab.sae, **SAE)
    pq.write_table(pa.Table.from_pylist([feature_row(i) for i in range(N_FEATURES)]), lab.features)
    names = dict(AS_PAPER, base='smollm2-135m', target=str(lab.model), explainer=str(lab.model),
                 sae='tiny/sae', layer=1, features='tiny/features.parquet', source='tiny/1-res',
                 placeholder=PLACEHOLDER, baselines=['autointerp', 'untrained', 'best'])
    lines = [f'{name}: {json.dumps(value)}\n' for name, value in (names | SMALL | fields).items()]
    lab.file.write_text(''.join(lines))
    return lab


def make_explained_lab(folder) -> TinyLab:
    "Write a lab with an explainer, whose adapter is random, and an SAE that has no direction for some features"
    lab = make_lab(folder)
    weights = load_file(lab.sae/'sae_weights.safetensors')
    weights['W_dec'][list(NO_DIRECTION)] = 0
    save_file(weights, lab.sae/'sae_weights.safetensors')
    lora = LoraConfig(r=4, target_modules='all-linear', task_type='CAUSAL_LM', init_lora_weights=False)
    with lab.in_use():
        card = ExplainerCard.from_preset(lab.preset(), FeatureReader.load(lab.preset()), 'sft')
        torch.manual_seed(0)
        model, _ = load_model(lab.preset().explainer, device='cpu')
        save_adapter(get_peft_model(model, lora), card, lab.explainer)
    return lab


# ---- what a run leaves, to be compared and damaged

UNCOMPARED = ('progress', 'meta', 'replies') # tables of a store: clocks, notes, and what a server was asked


def tables_compared():
    "Tables of a store: (name, columns of its key)"
    return [(table, keys) for table, keys in KEYS.items() if table not in UNCOMPARED]


def table_rows(db, table, keys) -> dict: # key -> the other columns
    "Read a table, in which no key may stand twice"
    cursor = db.execute(f'SELECT * FROM "{table}"')
    names = [column for column, *_ in cursor.description]
    rows = [dict(zip(names, values)) for values in cursor]
    found = {tuple(row.pop(name) for name in keys): row for row in rows}
    assert len(found) == len(rows)
    return found


def rows_of(store:Path) -> dict: # table -> {key: the other columns}
    "Read a store that may be in use"
    if not store.exists(): return {}
    with closing(sqlite3.connect(f'file:{store}?mode=ro', uri=True)) as db:
        return {table: table_rows(db, table, keys) for table, keys in tables_compared()}


def keys_of(rows, without=()):
    "Table -> keys of its rows"
    return {table: set(of_table) for table, of_table in rows.items() if table not in without}


def copy_of(folder, to) -> Path:
    "Copy a finished run, or its report, to change it"
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns('.lock')))


def flip(file, place=-5):
    "Change one bit of one byte"
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)
