"""The list of tiles: every score is visited once and none outside of its document; the device makes the same list."""

import ctypes
from functools import cache

import numpy as np
import pytest
from simt_build import build, emulated_module, set_order

UNBOUNDED = 1 << 40
MASKS = {
    "causal": (UNBOUNDED, 0),
    "full": (UNBOUNDED, UNBOUNDED),
    "window": (7, 0),
    "both sides": (3, 5),
    "self": (0, 0),
}
CUTS = [(16, 8, False), (16, 8, True), (5, 3, False), (4, 64, True), (1, 1, False), (64, 16, True)]


@cache
def checks():
    library = ctypes.CDLL(str(build("libtiles.so") / "libtiles.so"))
    library.check_tiles.restype = ctypes.c_char_p
    library.capacity_of.restype = ctypes.c_int64
    return library


def borders(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def packing(rng, longest=40):
    """cu_q, cu_k of up to eight documents; some are empty, some have keys alone or more keys than queries."""
    num_docs = int(rng.integers(0, 9))
    q = rng.integers(0, longest, num_docs) * (rng.random(num_docs) < 0.85)
    k = np.where(rng.random(num_docs) < 0.6, q, rng.integers(0, longest, num_docs))
    return borders(q), borders(k)


def address(x):
    return ctypes.c_void_p(x.ctypes.data)


def check(cu_q, cu_k, window, cut, listed=None):
    """What is wrong with the cut, or with its list (num_tiles, 2)."""
    given = [ctypes.c_void_p(0), ctypes.c_int64(0)]
    if listed is not None:
        given = [address(listed), ctypes.c_int64(len(listed))]
    left, right = map(ctypes.c_int64, window)
    said = checks().check_tiles(address(cu_q), address(cu_k), ctypes.c_int64(len(cu_q) - 1), left, right, *cut, *given)
    return said.decode()


def device_list(cu_q, cu_k, window, cut):
    """The list that the kernel makes, (num_tiles, 2); what lies behind its end and around it stays as it was."""
    module, num_docs = emulated_module(), len(cu_q) - 1
    capacity = module.tile_capacity(int((cu_k if cut[2] else cu_q)[-1]), num_docs, cut[0])
    tiles = np.full((capacity + 8, 2), -7, np.int32)
    count, first = np.full(3, -7, np.int32), np.full(num_docs + 3, -7, np.int32)
    given = [w if w < UNBOUNDED else -1 for w in window]
    pointers = [x.ctypes.data for x in (cu_q, cu_k)], [tiles.ctypes.data, count[1:].ctypes.data, first[1:].ctypes.data]
    module.tile_list(pointers[0], num_docs, capacity, given, [*map(int, cut)], pointers[1], 0)
    assert (tiles[count[1] :] == -7).all()
    assert (count[[0, 2]] == -7).all()
    assert (first[[0, -1]] == -7).all()
    return tiles[: count[1]]


def random_packings(count, seed):
    rng = np.random.default_rng(seed)
    masks = list(MASKS.values())
    for i in range(count):
        size = (int(rng.integers(1, 20)), int(rng.integers(1, 12)), bool(rng.integers(2)))
        yield *packing(rng), masks[i % len(masks)], size if i % 3 else CUTS[i % len(CUTS)]


def test_every_visible_score_lies_in_one_tile():
    for case in random_packings(200, 0):
        assert check(*case) == "", case


@pytest.mark.full
def test_every_visible_score_lies_in_one_tile_of_10000_packings():
    for case in random_packings(10_000, 1):
        assert check(*case) == "", case


@pytest.mark.full
def test_the_device_makes_the_same_list_for_2000_packings():
    for i, case in enumerate(random_packings(2000, 2)):
        set_order(("ascending", "descending", "random")[i % 3], seed=i)
        assert check(*case, device_list(*case)) == "", case
    set_order("ascending")


@pytest.mark.parametrize("mask", MASKS)
def test_the_device_makes_the_same_list(lane_order, mask):
    rng = np.random.default_rng(3)
    for cut in CUTS[:4]:
        case = *packing(rng), MASKS[mask], cut
        assert check(*case, device_list(*case)) == "", case


def test_a_list_of_a_thousand_threads(lane_order):
    lengths = np.random.default_rng(4).integers(0, 9, 2500)  # more documents than threads, more tiles too
    cu = borders(lengths)
    case = cu, cu, MASKS["causal"], (3, 2, False)
    assert check(*case, device_list(*case)) == ""


def test_no_documents_make_an_empty_list():
    empty = np.zeros(1, np.int32)
    assert len(device_list(empty, empty, MASKS["full"], (16, 8, False))) == 0


def test_a_wrong_list_is_found():
    cu = borders([40, 3, 60])
    case = cu, cu, MASKS["causal"], (16, 8, False)
    listed = device_list(*case)
    assert check(*case, listed) == ""
    assert "entry 0 is tile" in check(*case, np.ascontiguousarray(listed[::-1]))
    assert "the list's count is wrong" in check(*case, listed[:-1].copy())


def describe(q_len, k_len, window, cut, begin):
    out = np.zeros(5, np.int64)
    lengths, window = map(ctypes.c_int64, (q_len, k_len)), map(ctypes.c_int64, window)
    checks().describe_tile(*lengths, *window, *cut, ctypes.c_int64(begin), address(out))
    return out.tolist()


def test_documents_of_two_billion_rows():
    n = 2**31 - 1
    last = (n - 1) // 128 * 128
    assert describe(n, n, MASKS["causal"], (128, 64, False), last) == [0, n, 2**25, 8 * 22 + 8, 2**24]
    assert describe(n, n, MASKS["causal"], (128, 64, True), last) == [last, n, 2, 2, 2**24]
    assert describe(n, n, MASKS["full"], (1, 1, False), n - 1) == [0, n, n, 8 * 27 + 15, n]
    assert describe(n, n, (4096, 0), (128, 64, False), last)[:3] == [last - 4096, n, 66]
    assert describe(1, n, MASKS["causal"], (128, 64, False), 0)[:3] == [0, n, 2**25]
    for total, num_docs, size, capacity in [
        (n, 1, 128, 2**24),
        (n, n, 128, n),
        (2**33, 2**20, 64, 2**27 + 2**20 - 2**14),
    ]:
        assert checks().capacity_of(*map(ctypes.c_int64, (total, num_docs, size))) == capacity
