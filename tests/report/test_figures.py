import math
import xml.etree.ElementTree as ElementTree

import pytest

from herdkern.report.figures import Series, bars, compact, histogram, line_chart, thin, ticks


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234, "1.23k"), (5e6, "5M"), (2.5e9, "2.5G"), (0.25, "0.25"), (2e-5, "2.0e-5"), (-1500, "-1.5k")],
)
def test_compact(value, text):
    assert compact(value) == text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.13, 0.97), (-5, 12000), (3, 3), (1e-6, 3e-6)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 1 <= len(found) <= 11
    assert all(low - 1e-9 <= tick <= max(high, low + (abs(low) or 1)) + 1e-9 for tick in found)


def test_thin_keeps_range_and_mean():
    series = thin(Series(label="a", x=list(range(5000)), y=[1.0] * 5000), limit=100)
    assert len(series.x) == 100
    assert set(series.y) == {1.0}


@pytest.mark.parametrize("is_log_y", [False, True])
def test_line_chart_is_well_formed_and_inside_its_box(is_log_y):
    series = Series(label="<loss>", x=[1, 2, 3, 4], y=[10.0, math.nan, 0.5, math.inf])
    text = line_chart("a & b", [series], is_log_y=is_log_y, bands=[(2, 3, "<anneal>")], level=(4.0, "<base>"))
    root = ElementTree.fromstring(text)
    line = next(node for node in root if node.tag == "polyline")
    points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert len(points) == 2
    assert all(0 <= x <= 440 and 0 <= y <= 250 for x, y in points)


def test_line_chart_without_values_says_so():
    assert "No values" in line_chart("loss", [Series(label="a", x=[1], y=[math.nan])])


def test_histogram_draws_every_bin_and_checks_edges():
    root = ElementTree.fromstring(histogram("h", [0, 1, 2, 4], [3, 0, 9], x_title="<tokens>"))
    assert len([node for node in root if node.tag == "rect"]) == 3
    with pytest.raises(ValueError, match=r"histogram: edges must have 3 values, got 2"):
        histogram("h", [0, 1], [1, 2], x_title="x")


def test_bars_scale_to_the_longest_and_escape():
    html = bars([("<a>", 10, "10"), ("b", 5, "5")])
    assert "width:100.0%" in html
    assert "width:50.0%" in html
    assert "&lt;a&gt;" in html
