"Cleaning, parts and balance of the corpus; fetching fails in one line"
import io
import tarfile
import zipfile
import pytest
from saeexplainer.sources.corpus import (
    SOURCES, Document, Source, balanced_cap, clean, documents, fetch, part_of, split_text,
)


def test_sources_have_names_licences_and_tiers():
    assert len({source.name for source in SOURCES}) == len(SOURCES)
    assert {source.tier for source in SOURCES} == {'A', 'A-'}
    assert all(source.licence for source in SOURCES)


def test_split_keeps_all_text():
    text = '\n\n'.join(f'paragraph {i} ' + 'x'*(i*37 % 400) for i in range(60))
    pieces = list(split_text(text, 500))
    assert '\n\n'.join(pieces) == text
    assert all(len(p) < 1500 for p in pieces)


def test_clean_is_idempotent():
    text = ' a \r\n\r\n\r\n\r\nb\t\n\x00c\u00a0d '
    assert clean(text) == 'a\n\nb\nc d'
    assert clean(clean(text)) == clean(text)


def test_documents_are_read_from_the_archive_once(tmp_path):
    paragraphs = ['x'*100, 'y'*100, 'x'*100, 'short']
    with zipfile.ZipFile(tmp_path/'some_texts-1.0-py3-none-any.whl', 'w') as archive:
        archive.writestr('a.txt', '\n\n'.join(paragraphs))
    def read(archive): return archive.read('a.txt').decode().split('\n\n')
    source = Source('some', 'pypi', 'some-texts', '1.0', 'A', 'none', read)
    assert documents(source, tmp_path) == [Document('some', 'x'*100), Document('some', 'y'*100)]


def test_npm_archives(tmp_path):
    info = tarfile.TarInfo('package/a.txt')
    info.size = 100
    with tarfile.open(tmp_path/'scope-name-2.0.tgz', 'w:gz') as archive:
        archive.addfile(info, io.BytesIO(b'z'*100))
    def read(archive): return [archive.extractfile('package/a.txt').read().decode()]
    source = Source('npm', 'npm', '@scope/name', '2.0', 'A', 'none', read)
    assert documents(source, tmp_path)[0].text == 'z'*100


def test_a_package_that_is_not_there(tmp_path):
    source = Source('none', 'pypi', 'saeexplainer-no-such-package', '9.9', 'A', 'none', None)
    with pytest.raises(RuntimeError, match='none: could not fetch saeexplainer-no-such-package==9.9'):
        fetch(source, tmp_path)


def test_parts_are_disjoint_and_only_tier_a_gives_contexts():
    docs = [Document('d', f'text {i}') for i in range(3000)]
    a = [part_of(doc, 'A') for doc in docs]
    minus = [part_of(doc, 'A-') for doc in docs]
    assert .27 < a.count('features')/3000 < .33
    assert 'features' not in minus
    assert [part == 'held-out' for part in a] == [part == 'held-out' for part in minus]


def test_too_little_text():
    with pytest.raises(ValueError, match='the sources hold 30 tokens, 40 are wanted'):
        balanced_cap({'a': 10, 'b': 20}, 40)


@pytest.mark.parametrize('total', [0, -3, None])
def test_a_number_of_tokens_that_is_none(total):
    with pytest.raises(ValueError, match=f'{total} tokens are wanted: it is a number from 1'):
        balanced_cap({'a': 10}, total)


def source_of(registry, read=None):
    "A source of a package named some"
    return Source('some', registry, 'some', '1.0', 'A', 'none', read)


@pytest.mark.parametrize('name, registry', [('some-1.0.whl', 'pypi'), ('some-1.0.tgz', 'npm')])
def test_packages_that_are_none(tmp_path, name, registry):
    (tmp_path/name).write_bytes(b'no archive')
    says = f'{name} is damaged, or no package: remove it, and it is fetched again'
    with pytest.raises(ValueError, match=says): fetch(source_of(registry), tmp_path)


def test_a_package_without_the_file_that_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path/'some-1.0.whl', 'w') as archive: archive.writestr('a.txt', 'x')
    [wikitext] = [source for source in SOURCES if source.name == 'wikitext']
    says = 'some-1.0.whl holds no file that ends in wikitext-2-raw-v1/validation.parquet'
    with pytest.raises(ValueError, match=says):
        documents(source_of('pypi', wikitext.read), tmp_path)
