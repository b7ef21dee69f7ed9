"""Settings of near-duplicate detection that others have made known, and ours.

fineweb: FineWeb's (Penedo et al. 2024, arXiv:2406.17557, 3.4): 14 bands of 8 rows over 5 words, what shares a band is a
    near-duplicate, without a second look.
curator: NeMo Curator's defaults: 20 bands of 13 rows over 24 characters, aimed at a similarity of 0.8, no second look.
llama3: ours, since the paper gives none (arXiv:2407.21783, 3.1.1): 20 bands of 6 rows over 5 words find 0.75 with 0.98
    and 0.85 with 0.9999; of what they find only pairs whose shingle sets have a similarity of 0.75 or more count.
The words and characters are those of herdkern.dedup.minhash, not of the libraries: the settings are taken over, the
signatures are not the same.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "fineweb": {
        "num_bands": 14, "rows_per_band": 8, "ngram_size": 5, "ngram_unit": "word",
        "min_similarity": 0.75, "verify": "none",
    },
    "curator": {
        "num_bands": 20, "rows_per_band": 13, "ngram_size": 24, "ngram_unit": "char",
        "min_similarity": 0.8, "verify": "none",
    },
    "llama3": {
        "num_bands": 20, "rows_per_band": 6, "ngram_size": 5, "ngram_unit": "word",
        "min_similarity": 0.75, "verify": "exact",
    },
}  # fmt: skip
SIGNATURE_KEYS = ("num_bands", "rows_per_band", "ngram_size", "ngram_unit")


def preset(name: str) -> dict[str, Any]:
    """All settings of a preset by name, a new dict: keywords of MinHashConfig.

    Raises: ValueError for a name that is none.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: name must be one of {', '.join(PRESETS)}, got {name!r}")
    return dict(PRESETS[name])


def signature_preset(name: str) -> dict[str, Any]:
    """Those settings of a preset that make its signatures: keywords of `signatures` and `signature_spec`.

    Raises: ValueError for a name that is none.
    """
    values = preset(name)
    return {key: values[key] for key in SIGNATURE_KEYS}
