"""Cuts a line of documents so that every rank gets the mean number of tokens and the mean attention work.

Rank 0 takes a tokens from the left end of the line and b from the right end, with a + b the mean number of tokens; what
lies between is cut by the same rule for the other ranks. Segments lie on the line by their work per token, so that it
grows from left to right on average and moving tokens from the right end to the left lowers the work of the rank: a is
found by the rule of false position. Where no a fits, work is kept even and tokens are not. Each rank aims at the mean
of what is left, so that rounding does not add up.

A segment is a document, or half of one that is longer than a rank's share: its light half goes to the left, its heavy
half to the right (tried documents only: two equal ones on 16 ranks left one rank 2.3 times the mean of tokens).

`segments_and_cuts` runs csrc/common/context_plan.h where it is built; what follows it here is the same in NumPy and
plain Python, for installations without native code, and the twin that the tests compare with.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

try:
    from herdkern._ops import balanced_context_cuts as _native
except ImportError:  # not built, or built before there was one
    _native = None

_SLACK = 0.01  # of a rank's tokens and work: a cut moves this far to spare a document, and then nothing travels


@dataclass(frozen=True)
class Work:
    """Pairs of a query and a key that it sees. reach: keys that it sees at most, its own among them; 0 for no limit."""

    causal: bool
    reach: int

    def before(self, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        """The work of the first `position` queries of documents of these lengths, int64 arrays of one shape."""
        if not self.causal:
            return position * length
        if not self.reach:
            return position * (position + 1) // 2
        ramp = np.minimum(position, self.reach)
        return ramp * (ramp + 1) // 2 + (position - ramp) * self.reach


@dataclass(frozen=True)
class Segments:
    """Parts of documents side by side: (num_segments,) int64 each, and borders: (num_segments + 1,)."""

    document: np.ndarray
    offset: np.ndarray  # of the part in its document
    borders: np.ndarray


def segments_and_cuts(lengths: np.ndarray, num_ranks: int, align: int, work: Work) -> tuple[Segments, list[int]]:
    """Return the line of documents of these lengths, (num_docs,) int64, and its 2 * num_ranks + 1 cuts."""
    if _native is None:
        return segments_and_cuts_reference(lengths, num_ranks, align, work)
    *columns, cuts = _native(lengths, num_ranks, align, work.causal, work.reach)
    return Segments(*columns), cuts.tolist()


def segments_and_cuts_reference(
    lengths: np.ndarray, num_ranks: int, align: int, work: Work
) -> tuple[Segments, list[int]]:
    """What `segments_and_cuts` returns, without native code."""
    segments = by_work_per_token(lengths, num_ranks, align, causal=work.causal)
    return segments, balanced_cuts(Line(segments, lengths, work), num_ranks, align)


def in_batch_order(lengths: np.ndarray) -> Segments:
    """Return every document as it lies in the batch."""
    return Segments(np.arange(len(lengths)), np.zeros(len(lengths), np.int64), _cumulated(lengths))


def by_work_per_token(lengths: np.ndarray, num_ranks: int, align: int, *, causal: bool) -> Segments:
    """Return documents, and halves of long ones, light ones first. A half begins at a multiple of `align`."""
    document, offset, length = np.arange(len(lengths)), np.zeros(len(lengths), np.int64), lengths
    weight = lengths  # of a causal document with the same work per token
    long = np.flatnonzero(lengths >= max(lengths.sum() // num_ranks, 2 * align)) if causal and num_ranks > 1 else ()
    if len(long):
        rest = np.delete(document, long)
        half = (lengths[long] + align) // (2 * align) * align
        mirrored = long[::-1]  # of equal documents, the first has the outermost halves: they meet on one rank
        document = np.concatenate([rest, long, mirrored])
        offset = np.concatenate([offset[rest], offset[long], half[::-1]])
        length = np.concatenate([lengths[rest], half, (lengths[long] - half)[::-1]])
        weight = np.concatenate([lengths[rest], half, (lengths[long] + half)[::-1]])
    keys = np.sort(weight << 32 | np.arange(len(weight)))  # no two are equal: any sort gives this order
    order = keys & 0xFFFFFFFF
    return Segments(document[order], offset[order], _cumulated(length[order]))


def _cumulated(lengths: np.ndarray) -> np.ndarray:
    sums = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=sums[1:])
    return sums


class Line:
    """Segments with the work before each border; plain lists, which single look-ups read fastest."""

    def __init__(self, segments: Segments, lengths: np.ndarray, work: Work) -> None:
        self.causal, self.reach = work.causal, work.reach
        own = work.before(np.diff(segments.borders), lengths[segments.document])
        halves = np.flatnonzero(segments.offset)
        self.offsets = dict(zip(halves.tolist(), segments.offset[halves].tolist()))  # of the few that have one
        self.skipped: dict[int, int] = {}
        if self.offsets:
            begin, of_document = segments.offset[halves], lengths[segments.document[halves]]
            skipped = work.before(begin, of_document)
            own[halves] = work.before(begin + np.diff(segments.borders)[halves], of_document) - skipped
            self.skipped = dict(zip(halves.tolist(), skipped.tolist()))
        self.borders, self.work = segments.borders.tolist(), _cumulated(own).tolist()

    def work_until(self, at: float) -> int:
        """The work of all queries before token `at`."""
        if at >= self.borders[-1]:
            return self.work[-1]
        i = bisect_right(self.borders, at) - 1
        count = int(at) - self.borders[i]
        if not self.causal:
            return self.work[i] + count * (self.work[i + 1] - self.work[i]) // (self.borders[i + 1] - self.borders[i])
        before = self.work[i]
        if i in self.offsets:
            count += self.offsets[i]
            before -= self.skipped[i]
        if 0 < self.reach < count:
            return before + self.reach * (self.reach + 1) // 2 + (count - self.reach) * self.reach
        return before + count * (count + 1) // 2

    def token_after(self, work: float) -> float:
        """The token before which all queries together have this work."""
        if work >= self.work[-1]:
            return self.borders[-1]
        i = bisect_right(self.work, work) - 1
        left = work - self.work[i]
        if not self.causal:
            return self.borders[i] + left * (self.borders[i + 1] - self.borders[i]) / (self.work[i + 1] - self.work[i])
        left += self.skipped.get(i, 0)
        ramp = self.reach * (self.reach + 1) / 2
        position = self.reach + (left - ramp) / self.reach if 0 < ramp < left else (math.sqrt(8 * left + 1) - 1) / 2
        return self.borders[i] + position - self.offsets.get(i, 0)

    def place_for_cut(self, at: float, align: int, slack: tuple[float, float], low: int, high: int) -> int:
        """Where to cut near `at`, within [low, high]: between segments if that moves little, else at a multiple.

        slack: how many tokens and how much work a cut may move to spare a document.
        """
        i = min(bisect_right(self.borders, at), len(self.borders) - 1) - 1
        begin, end = self.borders[i], self.borders[i + 1]
        here = self.work_until(at)
        for border in (begin, end) if at - begin < end - at else (end, begin):
            moved = abs(border - at), abs(self.work_until(border) - here)
            if low <= border <= high and moved[0] <= slack[0] and moved[1] <= slack[1]:
                return border
        place = min(begin + round((at - begin) / align) * align, end)
        return min(max(place, low), high)


def balanced_cuts(line: Line, num_ranks: int, align: int) -> list[int]:
    """Return 2 * num_ranks + 1 cuts of the line; rank i gets the i-th range from the left and from the right.

    A cut inside a segment lies a multiple of `align` tokens after its start. The right cut is placed first: queries are
    heavy there, so it can miss by much, and the left cut makes up for that in tokens, or in work where that is uneven.
    """
    left, right = 0, line.borders[-1]
    before, after = 0, line.work[-1]
    lefts, rights = [left], [right]
    for ranks in range(num_ranks, 1, -1):
        tokens, work = (right - left) / ranks, (after - before) / ranks
        slack = _SLACK * tokens, _SLACK * work
        from_left, from_right = _shares(line, (left, before), (right, after), tokens, work)
        cut = line.place_for_cut(right - from_right, align, slack, left, right)
        kept, after = after, line.work_until(cut)
        kept -= after
        at = max(left, left + from_left + from_right - (right - cut))
        taken = line.work_until(at) - before
        wanted = min(max(taken, work - slack[1] - kept), work + slack[1] - kept)
        if wanted != taken:
            at = line.token_after(before + max(wanted, 0))
        right = cut
        left = line.place_for_cut(min(at, right), align, slack, left, right)
        before = line.work_until(left)
        lefts.append(left)
        rights.append(right)
    return [*lefts, left, *reversed(rights)]


def _shares(
    line: Line, left: tuple[int, int], right: tuple[int, int], tokens: float, work: float
) -> tuple[float, float]:
    """How many tokens a rank takes from the left and from the right end, to get `tokens` and `work` together.

    left, right: the ends of what is not cut yet, and the work before them.
    """
    (begin, before), (end, after) = left, right

    def surplus(taken: float) -> float:
        return line.work_until(begin + taken) - before + after - line.work_until(end - (tokens - taken)) - work

    low, high = 0.0, tokens
    over, under = float(surplus(low)), float(surplus(high))
    if over <= 0:  # so much of the right end has too little work: more of it
        return 0.0, end - line.token_after(after - work)
    if under >= 0:
        return line.token_after(before + work) - begin, 0.0
    while high - low > 1:
        middle = min(max(low + (high - low) * over / (over - under), low + 0.5), high - 0.5)
        found = surplus(middle)
        if abs(found) < _SLACK / 2 * work:
            return middle, tokens - middle
        if found > 0:  # the end that stays counts half: it will not stay for long
            low, over, under = middle, found, under / 2
        else:
            high, under, over = middle, found, over / 2
    return low, tokens - low
