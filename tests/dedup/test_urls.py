import itertools
import random
import struct
from collections import defaultdict

import numpy as np
import pytest
import url_twin

from herdkern import _text
from herdkern.data.document import Document, read_documents, write_documents
from herdkern.dedup import UrlDedupConfig, canonical_url, dedup_urls
from herdkern.dedup.urls import native_rules, url_keys
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


ODD = rb"""{"text":"only a text"}
  {"id": "spaced", "text": "with spaces", "url": "http://h.org/%7eu", "meta": {"b": 1, "a": 2.50, "kept_id": 7}}
{"text":"escapes \u00e9 \/ \ud83d\ude00 \ud800 end","url":"http://h.org/\u0041?q=\u00fc","meta":{"kept_url":null}}

{"id":"","text":"","url":"HTTP://h.org/A?q=%C3%BC","kept_timestamp":"outside","timestamp":7}
{"id":"\u00fc-long-id-of-its-own","text":"x","url":"http://xn--bcher-kva.de/a;b","timestamp":-5}
{"id":"b","text":"xy","url":"https://b\u00fccher.de/a;b#c","timestamp":-5}
{"id":"c","text":"xy","url":"http://[2001:DB8::1]/v","timestamp":99999999999999999999}
{"id":"c","text":"xy","url":"http://[2001:db8::1]:80/v","timestamp":0}
{"id":"d","text":"x","url":5}"""


@pytest.mark.parametrize("num_partitions", [1, 5])
@pytest.mark.parametrize("ignored", [UrlDedupConfig().ignored_parameters, ("z[x]",)], ids=["native", "asked"])
def test_files_are_those_of_the_path_through_python(tmp_path, monkeypatch, num_partitions, ignored):
    documents, _ = planted_documents(5)
    random.Random(6).shuffle(documents)
    long = Document(id="long", text="x" * 9, url="http://h.org/" + "long/" * 200, timestamp=4)
    documents += [long, Document(id="shorter", text="x", url=long.url, timestamp=4)]
    inputs = shards_of(documents, tmp_path, [150, 0, len(documents)])
    inputs.append(tmp_path / "odd.jsonl")
    inputs[-1].write_bytes(b"\xef\xbb\xbf" + ODD)
    config = UrlDedupConfig(num_partitions=num_partitions, ignored_parameters=ignored)
    monkeypatch.setattr("herdkern.dedup.urls.BATCH_BYTES", 1 << 12)
    monkeypatch.setattr("herdkern.dedup.urls._CHUNK_DECISIONS", 7)
    with Run(tmp_path / "run") as run:
        result = dedup_urls(run, inputs, config)
    folder = tmp_path / "run/data/dedup_urls.newest.partition"
    for shard, path in enumerate(inputs):
        pieces = [folder / f"task-{shard:05d}" / f"part-{part:05d}" for part in range(num_partitions)]
        found = [tuple((piece / name).read_bytes() for name in ("records.bin", "names.bin")) for piece in pieces]
        assert found == url_twin.records(path, config, num_partitions)
    dropped = 0
    for task, (kept, gone) in zip(result.tasks, url_twin.dedup(inputs, tmp_path, config), strict=True):
        assert (task / "documents.jsonl.zst").read_bytes() == kept.read_bytes()
        assert (task / "dropped.jsonl.zst").read_bytes() == gone.read_bytes()
        dropped += sum(1 for _ in read_documents(gone))
    texts = [document.text for path in inputs for document in read_documents(path)]
    kept_texts = [d.text for path in result.files("documents.jsonl.zst") for d in read_documents(path)]
    assert result.counters == {
        "docs_in": len(texts),
        "docs_out": len(kept_texts),
        "bytes_in": sum(len(text.encode()) for text in texts),
        "bytes_out": sum(len(text.encode()) for text in kept_texts),
        "dropped": {"duplicate_url": dropped},
    }


def test_a_decision_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "drop"
    path.write_bytes(struct.pack("<qIIII", 5, 0, 3, 4, 0) + b"idurl"[:5])
    with pytest.raises(ValueError, match=r"drop is damaged: it ends within a decision"):
        _text.UrlDealer([str(path)], "in.jsonl", lambda line, number: line)


def test_a_bad_setting_is_named():
    with pytest.raises(ValueError, match="num_partitions must be at least 1, got 0"):
        UrlDedupConfig(num_partitions=0)


SCHEMES = ["http://", "https://", "HTTP://", "hTTps://", "http:/", "http:", "ftp://", "//", "", "http:///", "httpx://",
           " http://", "\thttp://", "http://\t"]  # fmt: skip
HOSTS = [
    "example.com", "EXAMPLE.Com", "h", "h.", "h..", "a..b", "a-b_c.d", "xn--bcher-kva.de", "bücher.de",
    "1.2.3.4", "0x7f.1", "[::1]", "user@h", "u:p@h", "", "-", ".h", "h:80", "h:443", "h:8080", "h:", "h:0",
    "h:080", "h:99999", "h:65535", "h:65536", "h:80a", "h%41", "x" * 70 + ".com", "h\\x", "h,x", "h!", " h",
    "h ", "ＨＯＳＴ.com",
]  # fmt: skip
PIECES = [
    "/", "//", "/.", "/..", "/./", "/../", "a", "B", "%41", "%7e", "%7E", "%2e", "%2E", "%2f", "%3F", "%25",
    "%2525", "%C3%A9", "%c3%a9", "é", "中", "~", "-", "_", ".", "!", "$", "&", "'", "(", ")", "*", "+", ",", ";",
    "=", ":", "@", "%20", " ", "%", "%4", "%zz", '"', "<", ">", "[", "]", "^", "`", "{", "|", "}", "\\", "%22",
    "%3C", "%5B", "%5D", "%7C", "%5C", "%23", "%00", "%0A", "\t", "\n", "\x7f", "\x00", "%7F", ";jsessionid=12",
    "index.html", "?", "#", "\u2003", "\xa0", "\u212a", "\ud800", "😀", "%F0%9F%98%80", "%E9", "..", ".hidden",
    "/...", "%2F", "%3b", "%3B",
]  # fmt: skip
FIELDS = [
    "=", "&", "&&", "a=1", "b=2", "a=", "=v", "utm_source=x", "UTM_Medium=y", "%75tm_x=1", "fbclid=1", "FBCLID",
    "fbclid", "ref_src", "sid=3", "PHPSESSID=2", "aspsessionidX=1", "a=2", "a=10", "A=1", "q=a+b", "q=a%20b",
    "q=%E9", "utm_=", "utm", "xutm_a=1", "\u0130=1", "mkt_to\u212a=1", "a;b=1", "x=%26%3D", *PIECES,
]  # fmt: skip
CONFIGS = [
    UrlDedupConfig(),
    UrlDedupConfig(merge_schemes=False, merge_trailing_slash=False, ignored_parameters=()),
    UrlDedupConfig(ignored_parameters=("a", "utm_*", "b")),
]


def torture_url(rng):
    url = rng.choice(SCHEMES if rng.random() < 0.2 else SCHEMES[:4])
    url += rng.choice(HOSTS if rng.random() < 0.4 else HOSTS[:7])
    if rng.random() < 0.8:
        url += "/" + "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 4)))
    if rng.random() < 0.6:
        url += "?" + "".join(rng.choice(FIELDS) + rng.choice(["", "&", "&"]) for _ in range(rng.randint(0, 5)))
    if rng.random() < 0.2:
        url += "#" + "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 3)))
    return url + rng.choice([" ", "\n", "\u3000", "\x1f", "\x85"]) if rng.random() < 0.05 else url


def torture(seed, number):
    """Share of the URLs that the native path takes; it agrees with canonical_url on each of these."""
    rng, taken = random.Random(seed), 0
    for config in CONFIGS:
        urls = [torture_url(rng) for _ in range(number)]
        for url, form in zip(urls, _text.canonicalise_urls(urls, native_rules(config)), strict=True):
            if form is not None:
                taken += 1
                assert form == canonical_url(url, config), repr(url)
    return taken / number / len(CONFIGS)


def test_the_native_path_equals_the_library_or_hands_back():
    assert torture(1, 4000) > 0.2


@pytest.mark.full
def test_the_native_path_equals_the_library_or_hands_back_at_length():
    for seed in range(10):
        assert torture(10 + seed, 100_000) > 0.2


def test_every_byte_and_escape_at_every_place_equals_the_library():
    places = [
        "http://h{}",
        "http://h{}x/",
        "http://h/{}",
        "http://h/a{}b/",
        "http://h/?{}",
        "http://h/?a{}=1&b",
        "http://h/?a={}&a=0",
    ]
    texts = [chr(c) for c in range(256)] + [f"%{c:02x}" for c in range(256)] + [f"%{c:02X}" for c in range(256)]
    urls = [place.format(text) for place in places for text in texts]
    for config in CONFIGS:
        forms = _text.canonicalise_urls(urls, native_rules(config))
        for url, form in zip(urls, forms, strict=True):
            assert form is None or form == canonical_url(url, config), repr(url)
        assert sum(form is not None for form in forms) > len(urls) // 2


def test_keys_are_those_of_the_canonical_form():
    rng = random.Random(4)
    urls = [torture_url(rng) for _ in range(3000)] + ["", "no url", *NOT_WEB, *itertools.chain(*SAME)]
    forms = [canonical_url(url) for url in urls]
    for config in (UrlDedupConfig(), UrlDedupConfig(ignored_parameters=(*UrlDedupConfig().ignored_parameters, "z[x]"))):
        keys, is_web = url_keys(urls, config, num_threads=2)
        assert is_web.tolist() == [bool(form) for form in forms]
        by_form = {form: tuple(key) for form, key in zip(forms, keys.tolist(), strict=True) if form}
        assert all(by_form[form] == tuple(key) for form, key in zip(forms, keys.tolist(), strict=True) if form)
        assert len(set(by_form.values())) == len(by_form)


def test_keys_of_similar_urls_differ_in_half_of_their_bits():
    urls = [f"http://h.org/{'x' * (i % 60)}{i}" for i in range(20_000)]
    keys, _ = url_keys(urls)
    assert len({tuple(key) for key in keys.tolist()}) == len(urls)
    bits = np.unpackbits((keys[1:] ^ keys[:-1]).view(np.uint8), axis=1)
    share = bits.mean(axis=0)
    assert abs(share - 0.5).max() < 5 * 0.5 / len(share) ** 0.5 / (len(urls) / len(share)) ** 0.5


def test_slashes_alone_are_the_root():
    assert canonical_url("http://h//") == canonical_url("http://h/") == "http://h/"
    assert canonical_url("http://h///?a=1") == "http://h/?a=1"


def real_urls(rng, number):
    """Addresses as they stand in crawls: (class, URL); a class has the variants that one page is met by."""
    words = [
        "news",
        "Artikel",
        "2024",
        "index.html",
        "caf%C3%A9",
        "wiki",
        "Straße",
        "view.php",
        "p",
        "über-uns",
        "tag",
        "a_b",
        "x.y",
    ]
    found = []
    for page in range(number):
        host = f"{rng.choice(['www.', '', 'm.'])}site{rng.randrange(number // 20 + 1)}.{rng.choice(['com', 'co.uk'])}"
        path = "/".join(rng.choice(words) for _ in range(rng.randint(0, 4))) + f"/{page}"
        query = [
            f"{rng.choice('abcdq')}={rng.choice(words)}{rng.randrange(99)}"
            for _ in range(rng.choice([0, 0, 0, 1, 2, 3]))
        ]
        query.sort()
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            fields = [*query, *rng.choice([[], [], ["utm_source=feed"], ["fbclid=Iw" + str(rng.random())]])]
            rng.shuffle(fields)
            scheme, name = rng.choice(["http", "https", "HTTP"]), rng.choice([host, host, host.upper()])
            port = rng.choice(["", "", "", ":443" if scheme == "https" else ":80"])
            end = rng.choice(["", "", "/", "#top", "#"])
            url = f"{scheme}://{name}{port}/{path}"
            if end == "/":
                url += "/"
            url += "?" * bool(fields) + "&".join(fields) + (end if "#" in end else "")
            found.append((page, url))
    return found


def check_million(tmp_path, number, max_memory):
    rng = random.Random(7)
    found = real_urls(rng, number)
    rng.shuffle(found)
    documents, best = [], {}
    for i, (page, url) in enumerate(found):
        document = Document(
            id=f"{rng.getrandbits(64):016x}", text="x" * rng.randint(0, 2), url=url, timestamp=rng.choice([0, 3, 3, 8])
        )
        documents.append(document)
        order = (-document.timestamp, -len(document.text), document.id)
        if page not in best or order < best[page][0]:
            best[page] = (order, i)
    wanted = {documents[i].id for _, i in best.values()}
    results = []
    for shards in (1, 4):
        folder = tmp_path / str(shards)
        folder.mkdir()
        inputs = shards_of(documents, folder, [len(documents) // shards + 1] * shards)
        documents.reverse()
        with Run(folder / "run") as run:
            result = dedup_urls(run, inputs, UrlDedupConfig(max_memory=max_memory, num_partitions=2))
        assert set(ids_of(result)) == wanted
        assert result.counters["docs_out"] == len(best) == len(wanted)
        results.append(ids_of(result))
    assert results[0] == results[1]
    share = np.mean(
        [form is not None for form in _text.canonicalise_urls([u for _, u in found], native_rules(UrlDedupConfig()))]
    )
    assert share > 0.95


def test_real_shaped_urls_leave_one_of_each_class_and_it_is_the_newest(tmp_path):
    check_million(tmp_path, 3000, 1 << 30)


@pytest.mark.full
def test_a_million_real_shaped_urls_leave_one_of_each_class_and_it_is_the_newest(tmp_path):
    check_million(tmp_path, 650_000, 8 << 20)  # the tables are filled in several passes


def records_file(folder, records, names=b"", shard=0):
    part = folder / f"shard-{shard}"
    part.mkdir(parents=True, exist_ok=True)
    (part / "records.bin").write_bytes(records.tobytes())
    (part / "names.bin").write_bytes(names)
    return str(part / "records.bin"), str(part / "names.bin")


def test_passes_and_a_small_table_find_the_same_winners(tmp_path):
    from herdkern.dedup.urls import RECORD

    rng = np.random.default_rng(2)
    number = 30_000
    records = np.zeros(number, RECORD)
    classes = rng.integers(0, 12_000, number)
    records["low"], records["high"] = rng.integers(0, 1 << 63, (2, 12_000), dtype=np.uint64)[:, classes]
    records["timestamp"], records["length"] = rng.integers(-3, 3, number), rng.integers(0, 3, number)
    records["id_prefix"] = rng.permutation(number)
    order = np.lexsort((records["id_prefix"], -records["length"].astype(np.int64), -records["timestamp"], classes))
    first = order[np.append(True, np.diff(classes[order]) != 0)]
    wanted = np.zeros(12_000, np.int64)
    wanted[classes[first]] = first
    paths = records_file(tmp_path, records)
    for num_parts in (1, 5):
        winners = np.arange(number)
        for part in range(num_parts):
            table = _text.UrlTable([(*paths, 0, number)], number, part, part + 1, num_parts)
            for begin in range(0, number, 7000):
                table.add(records[begin : begin + 7000].view(np.uint8), begin)
            found = table.find(records.view(np.uint8), 0)
            winners = np.where(found != np.arange(number), found, winners)
        np.testing.assert_array_equal(winners, wanted[classes])
    table = _text.UrlTable([(*paths, 0, number)], number, 0, 1, 1)
    assert table.table_bytes() <= 24 * number


def test_a_table_names_the_file_that_it_cannot_read(tmp_path):
    from herdkern.dedup.urls import RECORD

    records = np.zeros(2, RECORD)  # one key, and ids of which only names.bin knows more
    paths = records_file(tmp_path, records)
    table = _text.UrlTable([(*paths, 0, 2)], 2, 0, 1, 1)
    with pytest.raises(RuntimeError, match=r"cannot read .*names\.bin: it is too short"):
        table.add(records.view(np.uint8), 0)
    table = _text.UrlTable([(str(tmp_path / "gone"), paths[1], 0, 2)], 2, 0, 1, 1)
    with pytest.raises(RuntimeError, match=r"cannot read .*gone: No such file"):
        table.add(records.view(np.uint8), 0)
    with pytest.raises(ValueError, match="records must be whole records of 48 bytes, got 5"):
        table.add(np.zeros(5, np.uint8), 0)


def test_long_ids_decide_beyond_their_first_bytes(tmp_path):
    documents = [Document(id=f"same-first-bytes-{i}", text="x", url="http://h/") for i in (3, 1, 2)]
    with Run(tmp_path / "run") as run:
        result = dedup_urls(run, shards_of(documents, tmp_path, [1, 1, 1]))
    assert ids_of(result) == ["same-first-bytes-1"]


@pytest.mark.parametrize(("name", "value"), [("max_memory", 5), ("num_partitions", 300)])
def test_bad_limits_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at .* got {value}"):
        UrlDedupConfig(**{name: value})
