"""One line from the flight recorders of all ranks: which rank left the common order of collectives, and where.

Records are aligned by (group, number in the group). Source: Llama 3 section 3.3.4; the causes are those of T15.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from herdkern.parallel.flight_ring import ENDED, WAITING, Ring

Kind = Literal["size", "skipped", "extra", "different", "gone", "absent", "unsent", "circle", "corrupt", "none"]
_CONTEXT = 64  # calls that are compared to find the same point in an earlier round


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What went wrong, who did it (empty: nobody can be named) and the line that says so."""

    kind: Kind
    ranks: tuple[int, ...]
    line: str


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A record in words. `what`: operation, dtype and number of elements (None: ranks may differ)."""

    seq: int
    op: str
    dtype: str
    numel: int
    free: bool
    place: str
    step: int
    state: int
    enqueued: int
    peer: int
    tag: int

    @property
    def what(self) -> tuple[str, str, int | None]:
        return self.op, self.dtype, None if self.free else self.numel

    @property
    def looks(self) -> tuple[Any, ...]:
        return *self.what, self.place

    def __str__(self) -> str:
        size = f" of {self.numel} {self.dtype}" if self.dtype else ""
        return f"{self.op} #{self.seq}{size} at {self.place}"


@dataclass(frozen=True, kw_only=True)
class _Group:
    """The collectives of one group: of each of its ranks that has a recorder, by number."""

    name: str
    ranks: tuple[int, ...]
    calls: dict[int, dict[int, _Call]]
    pairs: dict[tuple[int, int, str], dict[tuple[int, int], _Call]]  # (from, to, "send" | "recv") -> (tag, number)

    def __str__(self) -> str:
        return f"group {self.name} (ranks {_list(self.ranks)})"


def judge(rings: Mapping[int, Ring], gone: Mapping[int, str] | None = None) -> Verdict:
    """The verdict on a run that hangs or broke.

    rings: by rank, of the ranks that have one. gone: what became of ranks that are known not to run, as "was killed by
    SIGKILL" or "is stopped (SIGSTOP)".
    """
    gone = gone or {}
    groups = _groups(rings)
    found = [mismatch for group in groups if (mismatch := _mismatch(group)) is not None]
    found += [mismatch for group in groups if (mismatch := _unequal_pair(group)) is not None]
    if found:
        return min(found, key=lambda pair: pair[0])[1]
    waits = sorted((wait for group in groups for wait in _waits(group)), key=lambda wait: wait[0])
    if gone:
        return _of_gone(gone, waits)
    return _of_waits(rings, waits)


def _groups(rings: Mapping[int, Ring]) -> list[_Group]:
    groups: dict[tuple[str, tuple[int, ...]], _Group] = {}
    for rank, ring in rings.items():
        names = ring.names
        for record in ring.records.tolist():
            fields = dict(zip(ring.records.dtype.names or (), record))
            about = names.get(fields["group"])
            if about is None:
                continue
            key = (about["name"], tuple(about["ranks"]))
            if key not in groups:
                label = about["about"] if about["about"] not in ("", "undefined") else about["name"]
                groups[key] = _Group(name=label, ranks=key[1], calls={}, pairs={})
            words: dict[str, Any] = {word: str(names.get(fields[word], "?")) for word in ("op", "dtype", "place")}
            plain: dict[str, Any] = {
                word: fields[word] for word in ("seq", "numel", "step", "state", "enqueued", "peer", "tag")
            }
            call = _Call(free=bool(fields["free"]), **words, **plain)
            if call.peer < 0:
                groups[key].calls.setdefault(rank, {})[call.seq] = call
            else:
                other = key[1][call.peer]
                ends = (rank, other) if call.op == "send" else (other, rank)
                groups[key].pairs.setdefault((*ends, call.op), {})[call.tag, call.seq] = call
    return list(groups.values())


def _mismatch(group: _Group) -> tuple[int, Verdict] | None:
    """The first number at which ranks called different things; when, and the verdict."""
    if len(group.calls) < 2:
        return None
    first = max(min(calls) for calls in group.calls.values())
    for seq in range(first, max(max(calls) for calls in group.calls.values()) + 1):
        present = {rank: calls[seq] for rank, calls in group.calls.items() if seq in calls}
        if len({call.what for call in present.values()}) > 1:
            return min(call.enqueued for call in present.values()), _name_odd(group, seq, present)
    return None


def _name_odd(group: _Group, seq: int, present: dict[int, _Call]) -> Verdict:
    votes = Counter(call.what for call in present.values())
    (common, most), *others = votes.most_common()
    pasts = [{s: call for s, call in calls.items() if s < seq} for calls in group.calls.values()]
    past = max(pasts, key=len)  # all agree on it
    before = _same_point(past, seq)
    if others[0][1] == most:  # a tie: what was called at this point before is the usual call
        if before is None or votes.get(past[before].what) != most:
            sides = " and ".join(f"{_ranks(_who(present, what))} called {_one(present, what)}" for what in votes)
            return Verdict(kind="different", ranks=(), line=f"{sides} of {group}; nobody can say which was meant")
        common = past[before].what
    rank = next(rank for rank, call in present.items() if call.what != common)
    right, same = _who(present, common), _who(present, present[rank].what)
    one, usual = present[rank], present[right[0]]
    who, where = _ranks(same), f"of {group}, at {usual.place}"
    if one.op == usual.op and one.place == usual.place:
        what = ("numel", " elements") if one.numel != usual.numel else ("dtype", "")
        mine, theirs = f"{getattr(one, what[0])}{what[1]}", getattr(usual, what[0])
        line = f"{who} sent {mine} where {_ranks(right)} sent {theirs}, in {one.op} #{seq} {where}"
        return Verdict(kind="size", ranks=tuple(same), line=line)
    kind = _skipped_or_extra(past, before, one, usual)
    if kind == "skipped":
        line = f"{who} skipped {usual.op} #{seq} {where}; {'it is' if len(same) == 1 else 'they are'} in {one}"
    elif kind == "extra":
        line = f"{who} made a call too many, {one}, where {_ranks(right)} called {usual} of {group}"
    else:
        line = f"{who} called {one} where {_ranks(right)} called {usual} of {group}"
    return Verdict(kind=kind, ranks=tuple(same), line=line)


def _same_point(calls: dict[int, _Call], seq: int) -> int | None:
    """The earlier number whose calls before it are most like those before `seq`; None if there is none."""
    best, longest = None, 0
    for at in range(seq - 1, min(calls, default=seq), -1):
        length = 0
        while length < _CONTEXT and (a := calls.get(at - 1 - length)) and (b := calls.get(seq - 1 - length)):
            if a.looks != b.looks:
                break
            length += 1
        if at in calls and length > longest:
            best, longest = at, length
    return best


def _skipped_or_extra(past: dict[int, _Call], before: int | None, one: _Call, usual: _Call) -> Kind:
    """Whether `one` came after `usual` in an earlier round, or before it; else by their order in the code."""
    if before is not None:
        for distance in range(1, _CONTEXT):
            for at, kind in ((before + distance, "skipped"), (before - distance, "extra")):
                if at in past and past[at].looks == one.looks:
                    return kind  # type: ignore[return-value]
    (file, line), (usual_file, usual_line) = _split(one.place), _split(usual.place)
    if file == usual_file and line != usual_line:
        return "skipped" if line > usual_line else "extra"
    return "different"


def _split(place: str) -> tuple[str, int]:
    code, _, function = place.partition(" in ")
    file, _, line = code.rpartition(":")
    return f"{file} {function}", int(line) if line.isdigit() else 0


def _unequal_pair(group: _Group) -> tuple[int, Verdict] | None:
    """The first transfer of which one side sends another size than the other side expects."""
    found = []
    for (source, target, op), calls in group.pairs.items():
        expected = group.pairs.get((source, target, "recv"), {}) if op == "send" else {}
        for key, sent in calls.items():
            wanted = expected.get(key)
            if wanted is not None and (wanted.numel, wanted.dtype) != (sent.numel, sent.dtype):
                line = (
                    f"rank {source} sent {sent.numel} {sent.dtype} to rank {target}, at {sent.place}, which expects "
                    f"{wanted.numel} {wanted.dtype}, at {wanted.place} (group {group.name})"
                )
                found.append((sent.enqueued, Verdict(kind="size", ranks=(source,), line=line)))
    return min(found, key=lambda pair: pair[0]) if found else None


def _waits(group: _Group) -> list[tuple[int, _Group, _Call, tuple[int, ...], tuple[int, ...]]]:
    """(since, group, call, who waits in it, for whom) of everything that has not ended."""
    waits = []
    last = {rank: calls[max(calls)] for rank, calls in group.calls.items()}
    stuck = {rank: call for rank, call in last.items() if call.state == WAITING}
    if stuck:
        seq = max(call.seq for call in stuck.values())
        here = tuple(rank for rank, call in stuck.items() if call.seq == seq)
        missing = tuple(rank for rank in group.ranks if rank not in last or last[rank].seq < seq)
        since = min(stuck[rank].enqueued for rank in here)
        waits.append((since, group, stuck[here[0]], here, missing))
    for (source, target, op), calls in group.pairs.items():
        waiting, other = (target, source) if op == "recv" else (source, target)
        answered = group.pairs.get((source, target, "send" if op == "recv" else "recv"), {})
        for key, call in calls.items():
            if call.state == WAITING and key not in answered:
                waits.append((call.enqueued, group, call, (waiting,), (other,)))
    return waits


def _of_gone(gone: Mapping[int, str], waits: list[Any]) -> Verdict:
    line = "; ".join(f"rank {rank} {text}" for rank, text in sorted(gone.items()))
    for _, group, call, here, missing in waits:
        if set(missing) & set(gone):
            line += f"; {_ranks(here)} {'waits' if len(here) == 1 else 'wait'} in {call} of {group}"
            break
    return Verdict(kind="gone", ranks=tuple(sorted(gone)), line=line)


def _of_waits(rings: Mapping[int, Ring], waits: list[Any]) -> Verdict:
    held = {rank for _, _, _, here, _ in waits for rank in here}
    for _, group, call, here, missing in waits:
        free = [rank for rank in missing if rank not in held]
        if free:
            wait = f"{_ranks(here)} {'waits' if len(here) == 1 else 'wait'}"
            ahead = [rank for rank in free if rank in rings and rings[rank].step > call.step >= 0]
            if call.peer >= 0:
                verb = "sent what" if call.op == "recv" else "taken what"
                line = f"rank {free[0]} has not {verb} {wait} for in {call} of {group}; {_doing(rings, free[0])}"
                return Verdict(kind="unsent", ranks=tuple(free), line=line)
            if ahead:
                line = f"{_ranks(ahead)} skipped {call.op} #{call.seq} of {group}, at {call.place}"
                return Verdict(kind="skipped", ranks=tuple(ahead), line=f"{line}; {_doing(rings, ahead[0])}")
            who = f"{_ranks(free)} {'has' if len(free) == 1 else 'have'} not come to"
            line = f"{who} {call} of {group}, where {wait}; {_doing(rings, free[0])}"
            return Verdict(kind="absent", ranks=tuple(free), line=line)
    for _, group, call, here, missing in waits:
        if missing:  # each waits for another: who is in a later step has left the others behind
            ahead = [rank for rank in missing if rings[rank].step > call.step >= 0]
            skipped = ahead or list(missing)
            line = f"{_ranks(skipped)} skipped {call} of {group}, where {_list(here)} waits"
            return Verdict(kind="circle", ranks=tuple(skipped), line=f"{line}; {_doing(rings, skipped[0])}")
    return Verdict(kind="none", ranks=(), line="no rank left the order of the collectives, and none waits for another")


def _doing(rings: Mapping[int, Ring], rank: int) -> str:
    """What a rank does now, as far as its recorder knows."""
    ring = rings.get(rank)
    if ring is None or not len(ring.records):
        return f"rank {rank} has recorded nothing"
    record = ring.records[-1]
    state = "is in" if record["state"] != ENDED else "ended last"
    place, op = ring.name(record["place"]), ring.name(record["op"])
    return f"it {state} {op} of {int(record['numel'])} {ring.name(record['dtype'])} at {place}".replace(
        " of 0  at", " at"
    )


def _who(present: dict[int, _Call], what: tuple[Any, ...]) -> list[int]:
    return [rank for rank, call in present.items() if call.what == what]


def _one(present: dict[int, _Call], what: tuple[Any, ...]) -> _Call:
    return next(call for call in present.values() if call.what == what)


def _ranks(ranks: Any) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + _list(ranks)


def _list(ranks: Any) -> str:
    """0 1 2 5 as "0-2 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return " ".join(f"{a}" if a == b else f"{a} {b}" if b == a + 1 else f"{a}-{b}" for a, b in runs)
