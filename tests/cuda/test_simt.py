"""The emulator of tests/cuda/simt finds what it is there to find: each control has one fault, and a twin without it."""

import ctypes

import numpy as np
import pytest
from simt_build import controls, emulator, set_order

THREADS = 64
X = np.arange(4 * THREADS, dtype=np.float32) + 1


def address(x):
    return ctypes.c_void_p(x.ctypes.data)


def run(name, number=0, x=X):
    """(what the emulator says, out)"""
    out = np.zeros(THREADS, np.float32)
    said = controls().run_control(name.encode(), address(x), address(out), number).decode()
    return said, out


@pytest.mark.parametrize("distance", [1, -1, 33])
def test_sound_kernels_run_in_every_order(lane_order, distance):
    said, out = run("neighbour", distance)
    assert said == ""
    assert np.array_equal(out, np.roll(X[:THREADS], -distance))
    for name, expected in {
        "within warp": X[np.arange(THREADS) ^ 1],
        "handed over": np.concatenate([X[:32][::-1], np.zeros(32)]),
        "copied": X[4 * ((np.arange(THREADS) + 1) % THREADS)],
        "two meetings": np.repeat([120.0, 376.0] * 2, 16),
    }.items():
        said, out = run(name)
        assert said == "", name
        assert np.array_equal(out, expected), name
    x = X[:THREADS].copy()
    for _ in range(3):
        x = x + np.roll(x, -33)
    assert np.array_equal(run("rounds", 3)[1], x)
    assert run("counted")[1].view(np.int32)[0] == THREADS


@pytest.mark.parametrize(
    ("name", "number", "fault"),
    [
        ("neighbour without barrier", 1, "race: |reads what nothing has written"),
        ("neighbour without barrier", -1, "race: |reads what nothing has written"),
        ("rounds without second barrier", 3, "race: "),
        ("within warp without sync", 0, "race: |reads what nothing has written"),
        ("handed over without wait", 0, "race: |reads what nothing has written"),
        ("counted without atomic", 0, "race: "),
        ("divergent sites", 0, "divergent barrier: this thread is at __syncthreads at controls.cu:"),
        ("missing lane", 0, "deadlock: 31 threads (the first is 0) wait at __shfl_xor_sync; 33 have ended|names it"),
        ("ended lane", 0, "the mask names lane 5, which has ended|other lanes' mask names it"),
        ("lonely barrier", 0, "deadlock: 32 threads (the first is 0) wait at named barrier 1 at controls.cu:"),
        ("copied without wait", 0, "race: |reads what nothing has written"),
        ("shared end", 64, "out of bounds: |beyond the 256 bytes of dynamic shared memory"),
        ("shared end", 70, "out of bounds: |beyond the 256 bytes of dynamic shared memory"),
        ("wide load", 1, "an access of 16 bytes must be aligned"),
        ("too many threads", 0, "a block must have 1 to 1024 threads, got 2048"),
        ("too much shared", 0, "dynamic shared memory must be at most 232448 bytes, got 307200"),
    ],
)
def test_faults_are_found_in_every_order(lane_order, name, number, fault):
    if (lane_order, name) == ("descending", "copied without wait"):
        pytest.skip("copies come at once in this order, so there is nothing to find")
    said, _ = run(name, number)
    assert any(part in said for part in fault.split("|")), said or "nothing was found"


@pytest.mark.parametrize(("index", "is_inside"), [(0, True), (255, True), (256, False), (-1, False), (100_000, False)])
def test_global_memory_outside_of_declared_arrays_is_not_touched(index, is_inside):
    around = np.ones(300_000, np.float32)
    x, out = around[100_000:100_256], np.zeros(1, np.float32)
    try:
        for array in (x, out):
            emulator().simt_declare(address(array), ctypes.c_size_t(array.nbytes))
        said = controls().run_control(b"global index", address(x), address(out), index).decode()
    finally:
        emulator().simt_forget_declared()
    assert (said == "") == is_inside, said
    if not is_inside:
        assert "out of bounds: this thread reads 4 bytes" in said
        assert "thread (" in said


def test_blocks_on_two_os_threads(lane_order):
    set_order(lane_order, seed=7, num_threads=2)
    for _ in range(3):
        said, out = run("many", 1)
        assert said == ""
        assert np.array_equal(out, np.roll(X[:THREADS], -1))
        assert any(part in run("many without barrier", 1)[0] for part in ("race: ", "reads what nothing has written"))
