import random
from collections import defaultdict

import pytest

from herdkern.data.document import Document, read_documents, write_documents
from herdkern.dedup import UrlDedupConfig, canonical_url, dedup_urls
from herdkern.engine import Run

SAME = [
    ["http://example.com/a", "HTTP://EXAMPLE.com/a", "http://example.com:80/a", "https://example.com:443/a"],
    ["http://example.com", "http://example.com/", "https://example.com/#top", "http://example.com./"],
    ["http://h.org/a/c", "http://h.org/a/./c", "http://h.org/a/b/../c", "http://h.org/a/c/", "http://h.org/a/c#x"],
    ["http://h.org/?a=1&b=2", "http://h.org/?b=2&a=1", "http://h.org/?b=2&utm_source=n&a=1", "https://h.org?a=1&b=2&FBCLID=9"],
    ["http://h.org/~u/x y", "http://h.org/%7Eu/x%20y", "http://h.org/%7eu/x%20y"],
    ["http://bücher.de/é", "http://xn--bcher-kva.de/%C3%A9", "http://xn--bcher-kva.de/%c3%a9"],
    ["http://h.org/p.jsp;jsessionid=AB12?q=1", "http://h.org/p.jsp?q=1", "http://h.org/p.jsp?q=1&PHPSESSID=77"],
    ["http://user:pw@h.org/z", "http://h.org/z"],
    ["http://[2001:DB8::1]:80/v", "http://[2001:db8::1]/v"],
]  # fmt: skip
NOT_WEB = [
    "",
    "mailto:a@b.c",
    "ftp://a/b",
    "urn:isbn:1",
    "/a/b",
    "//h/x",
    "http://",
    "http://h:99999/",
    "http://[::1/",
    "file:///x",
]


@pytest.mark.parametrize("urls", SAME, ids=lambda urls: urls[0])
def test_variants_of_one_address_are_one(urls):
    assert len({canonical_url(url) for url in urls}) == 1
    assert canonical_url(urls[0]) != ""


def test_different_pages_stay_different():
    assert len({canonical_url(urls[0]) for urls in SAME}) == len(SAME)
    assert canonical_url("http://h.org/a") != canonical_url("http://h.org/A")
    assert canonical_url("http://h.org/?q=") != canonical_url("http://h.org/")
    assert canonical_url("http://h.org:8080/") != canonical_url("http://h.org/")


@pytest.mark.parametrize("tracking", ["", "&utm_source=feed", "&gclid=1"])
def test_values_in_another_encoding_stay_apart(tracking):
    """Pages of sites whose addresses are in Latin-1 or GBK, with and without a parameter that does not count."""
    plain = ["http://h/?q=%E9", "http://h/?q=%E8", "http://h/?q=%C4%E3", "http://h/?q=%BA%C3"]
    forms = [canonical_url(url + tracking) for url in plain]
    assert forms == [canonical_url(url) for url in plain]
    assert len(set(forms)) == 4


def test_names_of_ignored_parameters_may_be_encoded():
    assert canonical_url("http://h/?a=1&%75tm_x=2&UTM_Y=3") == canonical_url("http://h/?a=1")


@pytest.mark.parametrize("url", NOT_WEB)
def test_what_is_no_web_address_has_no_form(url):
    assert canonical_url(url) == ""


def test_a_canonical_form_is_its_own():
    for url in (url for urls in SAME for url in urls):
        assert canonical_url(canonical_url(url)) == canonical_url(url)


def test_schemes_and_slashes_may_count():
    config = UrlDedupConfig(merge_schemes=False, merge_trailing_slash=False, ignored_parameters=())
    assert canonical_url("https://h.org/a", config) != canonical_url("http://h.org/a", config)
    assert canonical_url("http://h.org/a/", config) != canonical_url("http://h.org/a", config)
    assert canonical_url("http://h.org/?utm_source=1", config) == "http://h.org/?utm_source=1"


def planted_documents(seed):
    """Documents with planted variants of URLs; the winner of every class is known."""
    rng = random.Random(seed)
    documents, winners = [], {}
    for number, urls in enumerate(SAME * 20):
        version = f"v={number // len(SAME)}"
        best = None
        for i in range(rng.randint(1, 6)):
            url = rng.choice(urls)
            head, hash_mark, tail = url.partition("#")
            url = head + ("&" if "?" in head else "?") + version + hash_mark + tail
            document = Document(
                id=f"{number:04d}{i}{rng.randint(0, 9999):04d}",
                text="x" * rng.randint(1, 3),
                url=url,
                timestamp=rng.choice([0, 5, 5, 9]),
            )
            documents.append(document)
            order = (-document.timestamp, -len(document.text), document.id)
            if best is None or order < best[0]:
                best = (order, document.id)
        winners[best[1]] = number
    documents += [Document(id=f"n{i}", text="no url", url="") for i in range(5)]
    return documents, winners


def shards_of(documents, folder, sizes):
    paths, begin = [], 0
    for i, size in enumerate(sizes):
        paths.append(folder / f"in-{i}.jsonl.zst")
        write_documents(paths[-1], documents[begin : begin + size])
        begin += size
    assert begin >= len(documents)
    return paths


def ids_of(result):
    return sorted(d.id for path in result.files("documents.jsonl.zst") for d in read_documents(path))


def test_exactly_the_newest_of_each_class_survives(tmp_path):
    documents, winners = planted_documents(1)
    random.Random(2).shuffle(documents)
    inputs = shards_of(documents, tmp_path, [300, 0, 200, len(documents)])
    with Run(tmp_path / "run") as run:
        result = dedup_urls(run, inputs)
    assert ids_of(result) == sorted([*winners, *(f"n{i}" for i in range(5))])
    counters = result.counters
    assert counters["docs_in"] == len(documents)
    assert counters["docs_out"] == len(winners) + 5
    assert counters["dropped"] == {"duplicate_url": len(documents) - len(winners) - 5}
    groups = defaultdict(list)
    for path in result.files("dropped.jsonl.zst"):
        for document in read_documents(path):
            assert document.meta["reason"] == "duplicate_url"
            assert document.meta["kept_id"] in winners
            assert document.meta["kept_timestamp"] >= document.timestamp
            groups[document.meta["kept_id"]].append(document.url)
    assert all(canonical_url(url) == canonical_url(urls[0]) for urls in groups.values() for url in urls)


@pytest.mark.parametrize("num_partitions", [1, 3, 7])
def test_order_shards_and_partitions_do_not_matter(tmp_path, num_partitions):
    documents, winners = planted_documents(3)
    random.Random(num_partitions).shuffle(documents)
    inputs = shards_of(documents, tmp_path, [len(documents) // num_partitions + 1] * num_partitions)
    with Run(tmp_path / "run") as run:
        result = dedup_urls(run, inputs, UrlDedupConfig(num_partitions=num_partitions))
    assert ids_of(result) == sorted([*winners, *(f"n{i}" for i in range(5))])


def test_a_bad_setting_is_named():
    with pytest.raises(ValueError, match="num_partitions must be at least 1, got 0"):
        UrlDedupConfig(num_partitions=0)
