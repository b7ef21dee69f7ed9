import subprocess
import sys

import pytest

from herdkern.data.document import Document, read_documents, write_documents
from herdkern.data.language import LanguageConfig, detect_language, language_shard

SENTENCES = {
    "en": "The river runs down from the hills and through the town to the sea.",
    "de": "Der Fluss fließt von den Hügeln herab und durch die Stadt bis zum Meer.",
    "fr": "La rivière descend des collines et traverse la ville jusqu'à la mer.",
    "es": "El río baja de las colinas y atraviesa la ciudad hasta llegar al mar.",
    "it": "Il fiume scende dalle colline e attraversa la città fino al mare.",
    "pt": "O rio desce das colinas e atravessa a cidade até chegar ao mar.",
    "nl": "De rivier stroomt van de heuvels door de stad naar de zee.",
    "sv": "Floden rinner från kullarna genom staden och ut i havet.",
    "pl": "Rzeka spływa ze wzgórz i płynie przez miasto aż do morza.",
    "ru": "Река течёт с холмов через город и впадает в море.",
    "uk": "Річка тече з пагорбів через місто і впадає в море.",
    "el": "Το ποτάμι κατεβαίνει από τους λόφους και περνά μέσα από την πόλη.",
    "ar": "ينحدر النهر من التلال ويمر عبر المدينة حتى يصل إلى البحر.",
    "he": "הנהר יורד מן הגבעות ועובר דרך העיר עד שהוא מגיע לים.",
    "hi": "नदी पहाड़ियों से नीचे उतरती है और शहर से होकर समुद्र तक जाती है।",
    "zh": "河流从山上流下来，穿过城市，一直流到大海。从前有很多人住在河边。",
    "ja": "川は丘から流れ下り、町を通って海へと注いでいます。",
    "ko": "강은 언덕에서 흘러내려 도시를 지나 바다로 흘러갑니다.",
    "th": "แม่น้ำไหลลงมาจากเนินเขาผ่านเมืองไปสู่ทะเลกว้างใหญ่",
    "tr": "Nehir tepelerden aşağı iner ve şehrin içinden geçerek denize ulaşır.",
    "vi": "Dòng sông chảy từ những ngọn đồi xuống, qua thành phố và ra biển.",
}


@pytest.mark.parametrize("lang", SENTENCES)
@pytest.mark.parametrize("times", [1, 100], ids=["short", "long"])
def test_language_of_a_sentence(lang, times):
    found, score = detect_language(f"{SENTENCES[lang]}\n" * times)
    assert found == lang
    assert 0.5 < score <= 1.0


@pytest.mark.parametrize(
    "text", ["", "ok", "12345 67890 " * 50, "https://example.com/a/b/c " * 30, "== -> {} [] ;; " * 99]
)
def test_too_little_to_tell(text):
    assert detect_language(text) == ("und", 0.0)


def test_parts_in_different_languages_are_mixed():
    parts = [(SENTENCES[lang] + " ") * 40 for lang in ("en", "ru", "fr", "zh", "hi")]
    assert detect_language("\n".join(parts))[0] == "mixed"


def test_addresses_and_formulas_do_not_count():
    noise = "https://www.example.com/the/and/of/with $\\text{the and of with}$ <span class='the'> "
    assert detect_language((noise + SENTENCES["de"] + "\n") * 20)[0] == "de"


def test_stage(tmp_path):
    documents = [
        Document(id=str(i), text=text, source=source)
        for i, (text, source) in enumerate(
            [(SENTENCES["en"], "web"), (SENTENCES["de"], "web"), ("def f(): pass", "code"), ("", "web")]
        )
    ]
    write_documents(tmp_path / "in.jsonl.zst", documents)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        counters = language_shard([tmp_path / "in.jsonl.zst"], tmp_path / name, LanguageConfig(languages=("en",)))
    assert (counters["docs_in"], counters["docs_out"], counters["dropped"]) == (4, 2, {"language": 2})
    assert counters["languages"] == {"de": 1, "en": 1, "und": 2}
    kept = list(read_documents(tmp_path / "one" / "documents.jsonl.zst"))
    assert [(d.lang, d.source) for d in kept] == [("en", "web"), ("und", "code")]
    dropped = list(read_documents(tmp_path / "one" / "dropped.jsonl.zst"))
    assert [d.meta["reason"] for d in dropped] == ["language", "language"]
    for name in ("documents.jsonl.zst", "dropped.jsonl.zst"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_all_languages_are_kept_when_none_is_asked_for(tmp_path):
    write_documents(tmp_path / "in.jsonl", [Document(id="1", text=SENTENCES["th"])])
    assert language_shard([tmp_path / "in.jsonl"], tmp_path, LanguageConfig())["docs_out"] == 1


NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from herdkern.data.language import detect_language
print(detect_language("The river runs down from the hills and through the town.")[0])
"""


def test_no_download():
    done = subprocess.run([sys.executable, "-c", NO_NETWORK], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "en"
