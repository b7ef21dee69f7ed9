"""The allocation policy: what is freed is there again, bounded; off is off. It is of a process, so each has its own."""

import json
import subprocess
import sys

import pytest

from herdkern import memory

needs_glibc = pytest.mark.skipif(memory.why_not() is not None, reason=str(memory.why_not()))

START = """
import json, resource, sys
import torch
from herdkern import memory
torch.set_num_threads(1)

def faults(mib):
    "pages that a fresh tensor of so many MiB costs"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(mib << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20  # MiB
"""


def in_a_process(body):
    done = subprocess.run([sys.executable, "-c", START + body], capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout)


@needs_glibc
def test_freed_memory_is_there_again():
    got = in_a_process("""
faults(100)
fresh = faults(100)
returned = memory.reuse(), memory.reuse()
# a hole fits exactly after some rounds: three or six, by where the loader put the libraries (eight at most, memory.py)
rounds = [[faults(mib) for mib in (100, 60, 33, 5)] for _ in range(12)]
print(json.dumps({"fresh": fresh, "reused": sum(rounds[8:], []), "returned": returned}))
""")
    assert got["returned"] == [True, True]
    assert got["fresh"] > 40  # huge pages or small ones
    assert all(pages <= 8 for pages in got["reused"])


@needs_glibc
def test_it_ends_and_gives_back():
    got = in_a_process("""
memory.reuse()
faults(300)
kept = resident()
memory.release()
released = resident()
faults(300)
again = resident()
memory.stop_reuse()
print(json.dumps({"kept": kept, "released": released, "again": again, "stopped": resident(),
                  "faults": [faults(100), faults(100)], "active": memory.is_reused()}))
""")
    assert got["kept"] - got["released"] > 250
    assert got["again"] - got["stopped"] > 250
    assert not got["active"]
    assert min(got["faults"]) > 40


@needs_glibc
def test_memory_is_bounded_when_shapes_change():
    """200 steps of tensors of random sizes that live in nested order, as in training: what stays does not grow."""
    got = in_a_process("""
import random
memory.reuse()
base, draw, highest, living = resident(), random.Random(0), [], 0
for step in range(200):
    some = []
    for _ in range(40):
        size = draw.randrange(64, 1 << draw.choice([12, 19, 23]))
        some.append(torch.empty(size, dtype=torch.uint8).fill_(1))
        if draw.random() < 0.3:
            some.pop(draw.randrange(len(some)))
    living = max(living, sum(x.numel() for x in some) >> 20)
    while some:
        some.pop()
    highest.append(resident() - base)
print(json.dumps({"living": living, "first": max(highest[:50]), "last": max(highest)}))
""")
    assert got["last"] <= 1.5 * got["living"] + 16
    assert got["last"] <= 1.1 * got["first"] + 16


def test_nothing_happens_at_import():
    got = in_a_process("""
import herdkern.ops, herdkern.model.transformer, herdkern.train.trainer
print(json.dumps(memory.is_reused()))
""")
    assert got is False


@pytest.mark.parametrize(
    ("platform", "reason"), [("darwin", "needs Linux and glibc, got darwin"), ("win32", "needs Linux and glibc")]
)
def test_elsewhere_it_says_so_and_does_nothing(monkeypatch, platform, reason):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(memory, "why_not", memory.why_not.__wrapped__)
    monkeypatch.setattr(memory, "_libc", lambda: pytest.fail("the C library was touched"))
    with pytest.warns(UserWarning, match=reason):
        assert memory.reuse() is False
    memory.stop_reuse()
    memory.release()
    assert not memory.is_reused()


def test_another_malloc_is_seen(monkeypatch):
    class Library:
        def __init__(self, name):
            self.malloc = memory.ctypes.c_void_p(1 if name else 2)
            self.gnu_get_libc_version = None

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", Library)
    assert "another malloc" in memory.why_not.__wrapped__()


@needs_glibc
def test_no_addresses_are_reserved_where_they_count_as_memory():
    """Under strict overcommit a process that holds half of the machine's memory as addresses could not fork."""
    got = in_a_process("""
def reserved():
    return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmData"))  # MiB

memory._is_overcommit_strict = lambda: True
before = reserved()
memory.reuse()
grown = reserved() - before
rounds = [faults(20) for _ in range(20)]  # each freed place is a little too small for the next, until glibc joins some
print(json.dumps({"grown": grown, "again": rounds[-1]}))
""")
    assert got["grown"] < 300
    assert got["again"] <= 8
