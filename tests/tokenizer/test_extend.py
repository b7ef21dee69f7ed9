"""Vocabulary extension: the guard corpus keeps its ids, other languages get shorter."""

import itertools
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdkern import cli
from herdkern.tokenizer import Tokenizer, WordCounts, extend_vocabulary, train_bpe

ENGLISH = [
    "the theatre is there, and another thing gathers in the weather",
    "we were where the other others went together",
]
GERMAN = ["der Wetterbericht weiß, dass das Wetter weiterhin nass ist", "die Straße ist weiß und nass"] * 3
RUSSIAN = ["погода сегодня хорошая, погода завтра плохая", "хорошая дорога и плохая погода"] * 3
SPECIALS = ("<|a|>", "<|b|>")


@pytest.fixture(scope="module")
def base():
    return train_bpe(ENGLISH * 20, 256 + 30 + 2, special_tokens=SPECIALS)


def test_ranks_specials_and_report(base):
    extended, report = extend_vocabulary(base, {"de": GERMAN, "ru": RUSSIAN}, 60, guard=ENGLISH)
    assert list(extended.mergeable_ranks)[:286] == list(base.mergeable_ranks)
    assert list(extended.mergeable_ranks.values()) == list(range(286 + 60))
    assert extended.special_tokens == {"<|a|>": 346, "<|b|>": 347}
    assert (report.num_kept, report.num_new, report.guard_unchanged) == (286, 60, 1)
    for name, texts in (("de", GERMAN), ("ru", RUSSIAN)):
        change = report.languages[name]
        assert change.num_chars == sum(map(len, texts))
        assert change.num_tokens_before == sum(len(base.encode_ordinary(text)) for text in texts)
        assert change.num_tokens_after == sum(len(extended.encode_ordinary(text)) for text in texts)
        assert change.after > 1.15 * change.before
        assert change.gain == pytest.approx(change.after / change.before - 1)
    assert "100.00 % unchanged" in str(report)
    for text in ENGLISH:
        assert extended.encode_ordinary(text) == base.encode_ordinary(text)


def test_without_the_veto_the_guard_changes(base):
    """The negative control: the same extension with everything tolerated."""
    texts = [*GERMAN, *["the gathering of weather reports"] * 3]
    extended, report = extend_vocabulary(base, texts, 60, guard=ENGLISH, guard_tolerance=1 << 40)
    assert report.num_vetoed == 0
    assert report.guard_unchanged < 1
    assert any(extended.encode_ordinary(text) != base.encode_ordinary(text) for text in ENGLISH)
    guarded, strict = extend_vocabulary(base, texts, 60, guard=ENGLISH)
    assert strict.guard_unchanged == 1
    assert guarded != extended


def test_keeping_fewer_ranks(base):
    extended, report = extend_vocabulary(base, RUSSIAN, 20, guard=ENGLISH, keep_ranks=270)
    kept = Tokenizer({token: rank for token, rank in base.mergeable_ranks.items() if rank < 270}, {})
    assert list(extended.mergeable_ranks)[:270] == list(kept.mergeable_ranks)
    assert report.num_kept == 270
    for text in ENGLISH:
        assert extended.encode_ordinary(text) == kept.encode_ordinary(text)


def extend_naively(base, counts, num_new, guard):
    """The definition: words as the tokenizer encodes them, all pairs counted anew for every merge."""
    tokens = list(base.mergeable_ranks)
    ids = dict(base.mergeable_ranks)
    cut = {word: base.encode_ordinary(word) for word in guard}
    vetoed = {word for word, symbols in cut.items() if len(symbols) > 1}
    vetoed |= {tokens[a] + tokens[b] for symbols in cut.values() for a, b in itertools.pairwise(symbols)}
    words = [(base.encode_ordinary(word), count) for word, count in counts.items()]
    while len(tokens) < len(base.mergeable_ranks) + num_new:
        pairs = Counter()
        for symbols, count in words:
            for pair in itertools.pairwise(symbols):
                if tokens[pair[0]] + tokens[pair[1]] not in vetoed:
                    pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None:
            break
        joined = tokens[best[0]] + tokens[best[1]]
        if joined not in ids:
            ids[joined] = len(tokens)
            tokens.append(joined)
        for symbols, _ in words:
            i = 0
            while i + 1 < len(symbols):
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = [ids[joined]]
                i += 1
    return ids


# Words of one run of letters, so that no pattern cuts them again.
WORD = st.text("abcd", min_size=1, max_size=10).map(str.encode)


@settings(max_examples=150, deadline=None)
@given(
    base_counts=st.dictionaries(WORD, st.integers(1, 9), max_size=10),
    by_hand=st.lists(WORD, max_size=4),
    counts=st.dictionaries(WORD, st.integers(1, 9), min_size=1, max_size=15),
    guard=st.dictionaries(WORD, st.just(1), max_size=6),
    num_new=st.integers(0, 20),
)
def test_naive_twin(base_counts, by_hand, counts, guard, num_new):
    """Some ranks are put in by hand, so that no merge of lower ranks makes them."""
    trained = train_bpe(base_counts, 256 + 8, special_tokens=())
    tokens = dict.fromkeys([*trained.mergeable_ranks, *by_hand])
    base = Tokenizer({token: rank for rank, token in enumerate(tokens)}, {})
    words = WordCounts().add_words(counts)
    extended, report = extend_vocabulary(base, words, num_new, guard=WordCounts().add_words(guard))
    assert extended.mergeable_ranks == extend_naively(base, counts, num_new, guard)
    assert report.guard_unchanged == 1
    for word in guard:
        assert extended.encode_ordinary(word) == base.encode_ordinary(word)


def test_language_weights(base):
    """A small language gets more of the new tokens when sizes are smoothed or it is weighted."""
    languages = {"de": GERMAN * 50, "ru": RUSSIAN}

    def russian_gain(weights):
        _, report = extend_vocabulary(base, languages, 40, guard=ENGLISH, language_weights=weights)
        return report.languages["ru"].gain

    assert russian_gain(None) < russian_gain(0.3) <= russian_gain({"de": 0.0, "ru": 1.0})
    assert russian_gain({"de": 1.0, "ru": 1.0}) == russian_gain(1.0) == russian_gain(None)
    with pytest.raises(ValueError, match=r"of the languages \['de', 'ru'\], got \['de'\]"):
        russian_gain({"de": 1.0})
    with pytest.raises(ValueError, match="must keep counts in"):
        russian_gain({"de": 1.0, "ru": -1.0})


def test_counts_and_files(base, tmp_path):
    WordCounts().add(GERMAN).save(tmp_path / "de")
    WordCounts().add(ENGLISH).save(tmp_path / "en")
    from_files = extend_vocabulary(base, {"de": tmp_path / "de"}, 30, guard=tmp_path / "en", num_threads=2)
    calls = []
    progress = lambda done, wanted: calls.append((done, wanted))  # noqa: E731
    from_texts = extend_vocabulary(base, {"de": GERMAN}, 30, guard=ENGLISH, progress=progress)
    assert from_files == from_texts
    assert calls[-1] == (30, 30)


def test_command_line(base, tmp_path, capsys):
    base.save(tmp_path / "base")
    (tmp_path / "german.txt").write_text("\n".join(GERMAN))
    (tmp_path / "english.txt").write_text("\n".join(ENGLISH))
    WordCounts().add(RUSSIAN).save(tmp_path / "russian.counts")
    inputs = [str(tmp_path / "german.txt"), str(tmp_path / "russian.counts")]
    options = ["--base", str(tmp_path / "base"), "--guard", str(tmp_path / "english.txt"), "--num-new", "40"]
    assert cli.main(["tokenizer", "extend", *inputs, *options, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "100.00 % unchanged" in printed
    assert "russian.counts: " in printed
    assert Tokenizer.load(tmp_path / "out").n_vocab == base.n_vocab + 40


def test_bad_arguments_are_refused(base):
    gap = Tokenizer({token: rank + (rank > 280) for token, rank in base.mergeable_ranks.items()}, {})
    with pytest.raises(ValueError, match="ranks without gaps"):
        extend_vocabulary(gap, GERMAN, 5, guard=ENGLISH)
    extend_vocabulary(gap, GERMAN, 5, guard=ENGLISH, keep_ranks=281)
    with pytest.raises(ValueError, match="keep every single byte, got 100"):
        extend_vocabulary(base, GERMAN, 5, guard=ENGLISH, keep_ranks=100)
    with pytest.raises(ValueError, match="num_new must not be negative, got -1"):
        extend_vocabulary(base, GERMAN, -1, guard=ENGLISH)
    with pytest.raises(TypeError, match=r"unknown keywords \['keep_rank'\]"):
        extend_vocabulary(base, GERMAN, 5, guard=ENGLISH, keep_rank=270)


def multilingual(num_chars):
    """(texts by language, English texts) of the evaluation folder."""
    from herdkern.data.document import read_documents

    folder = Path(os.environ.get("HERDKERN_DATA", ""), "multilingual", "libreoffice_help")
    if not folder.is_dir():
        pytest.skip("needs HERDKERN_DATA (multilingual/libreoffice_help)")
    texts = defaultdict(list)
    for path in sorted(folder.glob("*.jsonl*")):
        name, size = path.name.split(".")[0], 0
        for document in read_documents(path):
            if size < num_chars:
                texts[name].append(document.text)
                size += len(document.text)
    english = texts.pop("en-us")
    return texts, english


def test_evener_weights(base):
    """The language that gained least gains more, and its weight is the greatest."""
    languages = {"de": GERMAN * 3, "ru": RUSSIAN}
    _, first = extend_vocabulary(base, languages, 40, guard=ENGLISH)
    weights = first.evener_weights()
    _, second = extend_vocabulary(base, languages, 40, guard=ENGLISH, language_weights=weights)
    least = min(first.languages, key=lambda name: first.languages[name].gain)
    assert max(weights, key=weights.__getitem__) == least == "ru"
    assert second.languages[least].gain > first.languages[least].gain
    assert first.evener_weights({"de": 1.0, "ru": 2.0})["ru"] == weights["ru"] == 64
    assert first.evener_weights({"de": 1.0, "ru": 2.0})["de"] == pytest.approx(weights["de"] / 2)


# 2,000 tokens are not enough for thirty languages, most of which share English's letters: they go to those of which
# the old vocabulary makes most tokens.
NEEDIEST = ["dz", "el", "ja", "km", "ko", "vi", "zh-cn", "zh-tw"]


@pytest.mark.parametrize(
    ("num_new", "names", "rounds"),
    [
        pytest.param(2_000, NEEDIEST, 0, id="2000"),
        pytest.param(8_000, None, 2, marks=pytest.mark.full, id="8000"),
        pytest.param(28_000, None, 0, marks=pytest.mark.full, id="28000"),
    ],
)
def test_cl100k_on_real_text(cl100k_ranks, num_new, names, rounds):
    """Every included language gets 15 % more characters into a token; English keeps its ids."""
    texts, english = multilingual(200_000)
    languages = {name: WordCounts().add(texts[name]) for name in names or sorted(texts)}
    assert len(languages) == (8 if names else 30)
    base = Tokenizer(cl100k_ranks, {})
    guard, weights = WordCounts().add(english), None
    extended, report = extend_vocabulary(base, languages, num_new, guard=guard, language_weights=0.3)
    for _ in range(rounds):
        weights = report.evener_weights(weights)
        extended, report = extend_vocabulary(base, languages, num_new, guard=guard, language_weights=weights)
    print(report)
    assert (report.num_kept, report.num_new) == (100_000, num_new)
    kept = Tokenizer({token: rank for token, rank in cl100k_ranks.items() if rank < 100_000}, {})
    ours, theirs = extended.encode_to_numpy(english), kept.encode_to_numpy(english)
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs))
    for name in languages:
        size = sum(map(len, texts[name]))
        before, after = (size / t.encode_to_numpy(texts[name])[1][-1] for t in (kept, extended))
        assert after >= 1.15 * before, f"{name}: {before:.3f} -> {after:.3f} characters per token"
