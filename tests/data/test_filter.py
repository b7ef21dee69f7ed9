import random

import pytest

from herdkern.data.document import Document, read_documents, write_documents
from herdkern.data.filter import FilterConfig, code_line_share, filter_shard, judge

WORDS = (
    "river hill town road house tree stone water bridge field garden mountain window morning evening winter summer "
    "letter story friend journey kitchen village market island harbour forest meadow valley cloud"
).split()


def prose(sentences=12, seed=1):
    """Sentences of random words that repeat no five in a row."""
    rng = random.Random(seed)
    lines = []
    for _ in range(sentences):
        words = [rng.choice((*WORDS, "the", "of", "and", "with")) for _ in range(14)]
        lines.append(" ".join(words).capitalize() + ".")
    return "\n".join(lines)


def verdict(text, source="web", lang="en", meta=None, **settings):
    return judge(Document(id="0", text=text, source=source, lang=lang, meta=meta or {}), FilterConfig(**settings))


def test_prose_passes_all_rules():
    for rules in (("gopher_quality",), ("gopher_repetition",), ("c4",), ("fineweb",), FilterConfig().rules):
        found = verdict(prose(), rules=rules)
        assert found.reason == "", (rules, found.counts)
        assert found.text == prose()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Too short, this one is.", "too_few_words"),
        ("the word of it and " * 30_000, "too_many_words"),
        ("a b c d e f g h i j the of and " * 10, "mean_word_length"),
        ("incomprehensibilities notwithstanding counterrevolutionaries the of and " * 20, "mean_word_length"),
        (prose() + " # " * 30, "symbols"),
        (prose() + "\nand so on..." * 9, "ellipsis_lines"),
        ("\n".join(f"- {line}" for line in prose().split("\n")), "bullet_lines"),
        (prose() + " 1234" * 60, "words_without_letters"),
        (" ".join(WORDS * 3), "no_stop_words"),
    ],
)
def test_gopher_quality(text, reason):
    assert verdict(text, rules=("gopher_quality",)).reason == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (prose(4) + ("\n" + prose(1, 5)) * 9, "duplicate_lines"),
        (prose(20) + ("\n\nTo the top and back.") * 14, "duplicate_paragraphs"),
        (prose(10) + "\n" + " of the" * 60, "top_2gram"),
        (prose(12) + "\n" + prose(12).replace("\n", " \n"), "duplicate_5gram"),
    ],
)
def test_gopher_repetition(text, reason):
    found = verdict(text, rules=("gopher_repetition",))
    assert found.reason.startswith(reason[:9]), found
    assert found.counts[found.reason] > 0.1


@pytest.mark.parametrize(
    ("extra", "reason"),
    [("\nLorem ipsum dolor sit amet.", "lorem_ipsum"), ("\nfunction f() { return 1; }.", "curly_bracket")],
)
def test_c4_pages(extra, reason):
    assert verdict(prose() + extra, rules=("c4",)).reason == reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a menu entry without an end", "no_terminal_punctuation"),
        ("this one breaks off...", "no_terminal_punctuation"),
        ("Two words.", "short_line"),
        ("Please enable JavaScript in your browser.", "javascript"),
        ("This site uses cookies to be better.", "policy"),
        ("a " + "x" * 1001 + " b c.", "long_word"),
    ],
)
def test_c4_lines(line, reason):
    found = verdict(f"{line}\n{prose()}\n{line}", rules=("c4",))
    assert found.reason == ""
    assert found.text == prose()
    assert found.counts["lines_removed"] == {reason: 2}


def test_c4_counts_sentences_after_removing_lines_and_citations():
    assert verdict(prose(3) + "\nno end" * 9, rules=("c4",)).reason == "too_few_sentences"
    assert "[12]" not in verdict(prose().replace(".", "[12].", 1), rules=("c4",)).text
    assert verdict("河流从山上流下来。" * 6, lang="zh", rules=("c4",)).reason == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\n".join(line.rstrip(".") for line in prose().split("\n")), "few_terminal_lines"),
        (prose(3) + "\nA short line.\nAnother." * 9, "short_lines"),
        (prose(9) + "\nThis line is long enough and comes twice, to be seen.\n" * 3, "repeated_lines"),
    ],
)
def test_fineweb(text, reason):
    assert verdict(text, rules=("fineweb",)).reason == reason


def test_technical_pages_keep_lines_and_braces():
    text = prose() + "\n\ndef f(x): return {x}\n\n    indented = call(x)"
    assert verdict(text, meta={"code_share": 0.6}).text == text
    assert verdict(text, meta={"formulas": 3}).reason == ""
    assert verdict(text, meta={"code_share": 0.0}).reason == "curly_bracket"


def test_code_line_share_tells_code_from_prose():
    code = "import os\n\n\ndef f(a, b):\n    return a + b\n\n\nclass C:\n    x = 1\n"
    assert code_line_share(code) > 0.8
    assert code_line_share(prose()) == 0.0
    assert code_line_share("") == 0.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def f(a, b):\n    return {a: b}\n" * 9, ""),
        ("x = 1", "too_few_words"),
        ("a = [" + "1, " * 500 + "]\n" + "b = 2\n" * 99, "long_code_line"),
        (("y = " + "abc + " * 30 + "z\n") * 9, "mean_code_line"),
        ("0x00, 0x01, 0x02, 0x03,\n" * 20, "few_letters"),
    ],
)
def test_code_has_rules_of_its_own(text, reason):
    assert verdict(text, source="code").reason == reason


def test_licences_need_only_length():
    assert verdict("SHALL {NOT} " * 60, source="licence").reason == ""
    assert verdict("MIT", source="licence").reason == "too_few_words"


def test_config_is_checked():
    with pytest.raises(ValueError, match="rules must be of"):
        FilterConfig(rules=("gopher",))
    with pytest.raises(ValueError, match="3 and max_duplicate_ngrams 6"):
        FilterConfig(max_top_ngrams=(0.1,))


def test_stage_stores_reason_and_measurements(tmp_path):
    texts = [prose(), "short", prose() + "\nno end", "Lorem ipsum. " + prose()]
    documents = [Document(id=str(i), text=text, source="web", lang="en") for i, text in enumerate(texts)]
    write_documents(tmp_path / "in.jsonl.zst", documents)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        counters = filter_shard([tmp_path / "in.jsonl.zst"], tmp_path / name, FilterConfig())
    assert (counters["docs_in"], counters["docs_out"]) == (4, 2)
    assert counters["dropped"] == {"lorem_ipsum": 1, "too_few_words": 1}
    assert counters["lines_removed"] == {"no_terminal_punctuation": 1}
    assert [d.text for d in read_documents(tmp_path / "one" / "documents.jsonl.zst")] == [prose(), prose()]
    dropped = list(read_documents(tmp_path / "one" / "dropped.jsonl.zst"))
    assert [(d.id, d.meta["reason"]) for d in dropped] == [("1", "too_few_words"), ("3", "lorem_ipsum")]
    assert dropped[0].meta["counts"]["words"] == 1
    assert dropped[0].text == "short"
    for name in ("documents.jsonl.zst", "dropped.jsonl.zst"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_text_in_scripts_without_spaces_is_judged_by_its_characters():
    sentences = ["今天我们去公园散步，看到了很多花。", "孩子们在草地上奔跑，老人们聊天。", "天空很蓝，阳光温暖。"]
    sentences += ["这样的日子让人非常快乐。", "我们还吃了冰淇淋，喝了茶。", "晚上大家一起回家做饭。"]
    verdict = judge(Document(id="0", text="".join(sentences), lang="zh", source="web"), FilterConfig())
    assert (verdict.reason, verdict.counts["sentences"]) == ("", 6)
    thai = "วันนี้เราไปเดินเล่นที่สวนสาธารณะ และเห็นดอกไม้สวยงามมากมาย เด็กๆ วิ่งเล่นบนสนามหญ้า ผู้ใหญ่นั่งคุยกันใต้ต้นไม้"
    assert judge(Document(id="0", text=thai, lang="th", source="web"), FilterConfig()).reason == ""


def test_a_long_line_of_open_brackets_is_read_once():
    assert code_line_share("f(" * 1_000_000) == 0.0  # in square time this would take hours
    assert code_line_share("print(a(b)\nfoo(x) -> int\nplain words") == pytest.approx(2 / 3)
