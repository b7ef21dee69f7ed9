import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from herdkern.dedup.clusters import match_probability
from herdkern.dedup.curve import curve_svg, curve_text, measured_curve, similarity_at, write_curve
from herdkern.dedup.minhash import signature_spec, signatures
from herdkern.dedup.presets import PRESETS, preset, signature_preset


def test_presets_make_signatures():
    assert {name: (p["num_bands"], p["rows_per_band"]) for name, p in PRESETS.items()} == {
        "fineweb": (14, 8),
        "curator": (20, 13),
        "llama3": (20, 6),
    }
    specs = {signature_spec(**signature_preset(name)) for name in PRESETS}
    assert len(specs) == 3
    for name in PRESETS:
        signed = signatures(["one text of a few words " * 5], **signature_preset(name))
        assert signed.shape == (1, PRESETS[name]["num_bands"] * PRESETS[name]["rows_per_band"])
    changed = preset("llama3")
    changed["num_bands"] = 1
    assert preset("llama3")["num_bands"] == 20
    with pytest.raises(ValueError, match="name must be one of fineweb, curator, llama3, got 'c4'"):
        preset("c4")


def test_the_curve_and_its_inverse():
    for probability in (0.01, 0.5, 0.99):
        similarity = similarity_at(probability, num_bands=14, rows_per_band=8)
        assert match_probability(similarity, num_bands=14, rows_per_band=8) == pytest.approx(probability)
    with pytest.raises(ValueError, match=r"probability must lie in \(0, 1\), got 1.0"):
        similarity_at(1.0, num_bands=14, rows_per_band=8)
    lines = curve_text(num_bands=20, rows_per_band=6).splitlines()
    assert lines[0] == ("20 bands x 6 rows: compared with 1 % at similarity 0.282, 50 % at 0.569, 99 % at 0.768")
    assert [line.split()[:2] for line in lines if line.startswith("  0.75")] == [["0.75", "0.9802"]]


def test_measured_shares():
    similarity = np.array([0.0, 0.01, 0.52, 0.54, 1.0])
    means, shares, counts = measured_curve(similarity, np.array([0, 0, 1, 0, 1], dtype=bool))
    assert counts.tolist() == [2, 2, 1]
    assert means.tolist() == pytest.approx([0.005, 0.53, 1.0])
    assert shares.tolist() == [0, 0.5, 1]


def test_charts(tmp_path):
    chart = curve_svg([(14, 8), (20, 6)], measured=([0.5, 0.9], [0.1, 0.9]), threshold=0.75)
    assert chart.count("<polyline") == 3
    assert "near-duplicates" in chart
    write_curve(tmp_path / "curve.svg", [(14, 8), (20, 13)], threshold=0.8)
    root = ElementTree.parse(tmp_path / "curve.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "20 bands x 13 rows" in (tmp_path / "curve.svg").read_text()
    with pytest.raises(ValueError, match="settings must be 1 to 4 pairs"):
        curve_svg([])
