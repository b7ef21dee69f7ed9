"""The S-curve of a banding: how likely two documents of a given similarity are to be compared, as a table and a chart.

Source: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from herdkern.dedup.clusters import match_probability
from herdkern.engine import atomic_file

SIMILARITIES = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
_STYLE = (  # of a chart that stands alone; on a page the report's own holds
    ".line{fill:none;stroke-width:2}.c1{stroke:#2f6db5}.c2{stroke:#d2691e}.c3{stroke:#2e8b64}.c4{stroke:#8b5bb0}"
    ".grid{stroke:#8884}.band{fill:#8882}.tick,.axis{fill:#777;font:11px sans-serif}"
    ".name{font:12px sans-serif;stroke-width:.6}"
)


def similarity_at(probability: float, *, num_bands: int, rows_per_band: int) -> float:
    """The Jaccard similarity of documents that are compared with this probability.

    Raises: ValueError unless 0 < probability < 1.
    """
    if not 0.0 < probability < 1.0:
        raise ValueError(f"similarity_at: probability must lie in (0, 1), got {probability}")
    return (1.0 - (1.0 - probability) ** (1.0 / num_bands)) ** (1.0 / rows_per_band)


def curve_text(*, num_bands: int, rows_per_band: int) -> str:
    """The S-curve as lines of text: a table of similarities and where the curve is at 1, 50 and 99 %."""
    marks = [similarity_at(p, num_bands=num_bands, rows_per_band=rows_per_band) for p in (0.01, 0.5, 0.99)]
    lines = [
        f"{num_bands} bands x {rows_per_band} rows: compared with 1 % at similarity {marks[0]:.3f}, 50 % at "
        f"{marks[1]:.3f}, 99 % at {marks[2]:.3f}"
    ]
    for similarity in SIMILARITIES:
        share = match_probability(similarity, num_bands=num_bands, rows_per_band=rows_per_band)
        lines.append(f"  {similarity:.2f}  {share:8.4f}  {'#' * round(40 * share)}")
    return "\n".join(lines)


def measured_curve(
    similarity: NDArray[np.float64], is_candidate: NDArray[np.bool_], *, width: float = 0.05
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """(mean similarity, share of candidates, number of pairs) of pairs in steps of `width`, empty ones left out.

    similarity: float64 (num_pairs,), exact.  is_candidate: bool (num_pairs,), whether they share a band.
    """
    step = np.minimum((similarity / width).astype(np.int64), round(1 / width) - 1)
    count = np.bincount(step)
    used = count > 0
    means = np.bincount(step, weights=similarity)[used] / count[used]
    shares = np.bincount(step, weights=is_candidate.astype(np.float64))[used] / count[used]
    return means, shares, count[used]


def curve_svg(
    settings: Sequence[tuple[int, int]],
    *,
    measured: tuple[Sequence[float], Sequence[float]] | None = None,
    threshold: float | None = None,
) -> str:
    """An SVG of the S-curves of up to four (num_bands, rows_per_band), for a page that has the report's style.

    measured: (similarities, shares) to draw beside them.  threshold: a similarity to mark.
    Raises: ValueError for no setting or more than four.
    """
    from herdkern.report.figures import Series, line_chart

    if not 1 <= len(settings) <= 4:
        raise ValueError(f"curve_svg: settings must be 1 to 4 pairs (num_bands, rows_per_band), got {len(settings)}")
    x = [i / 200 for i in range(201)]
    series = [
        Series(
            label=f"{num_bands} x {rows}",
            x=x,
            y=[match_probability(s, num_bands=num_bands, rows_per_band=rows) for s in x],
            colour=f"c{i + 1}",
        )
        for i, (num_bands, rows) in enumerate(settings)
    ]
    if measured is not None:
        series.append(Series(label="measured", x=measured[0], y=measured[1], colour="c5"))
    bands = [(threshold, 1.0, "near-duplicates")] if threshold is not None else []
    return line_chart(
        "Probability that two documents are compared", series, x_title="Jaccard similarity", from_zero=True, bands=bands
    )


def write_curve(path: Path | str, settings: Sequence[tuple[int, int]], *, threshold: float | None = None) -> None:
    """Write `curve_svg` as a file that stands by itself. Raises: ValueError as curve_svg; OSError."""
    chart = curve_svg(settings, threshold=threshold)
    head = chart[chart.index("<svg ") + 5 : chart.index(">")]
    body = chart[chart.index(">") + 1 : chart.index("</svg>")]
    names = "".join(
        f'<text class="name c{i + 1}" x="70" y="{34 + 16 * i}">{num_bands} bands x {rows} rows</text>'
        for i, (num_bands, rows) in enumerate(settings)
    )
    with atomic_file(path, "w") as f:
        f.write(f'<svg xmlns="http://www.w3.org/2000/svg" {head}><style>{_STYLE}</style>{body}{names}</svg>\n')
