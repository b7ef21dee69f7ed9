"""The emulator's mbarriers, bulk copies and wgmma: the layouts of operands are written down here a second time."""

import ctypes

import numpy as np
import pytest
import torch
from simt_build import controls

FAULTS = {
    "none": 0,
    "no wait for the copy": 1,
    "no wait for the product": 2,
    "odd bytes": 3,
    "bytes that never come": 4,
}
FAULTS |= {"no init": 5, "left operand in registers": 6}
SWIZZLES = {"none": 0, "128": 1, "64": 2, "32": 3}


def image(x, swizzle, mn_major):
    """(bytes as they lie in shared memory, how they are described) of x (mn, k), bf16 bits."""
    rows, depth = x.shape
    width = {"none": 8, "128": 64, "64": 32, "32": 16}[swizzle]  # numbers of a row of the layout
    turn = {"none": 8, "128": 1, "64": 2, "32": 4}[swizzle]  # neighbouring rows of an atom that are turned alike
    atom = 16 * width  # bytes of 8 rows
    out = np.zeros(rows * depth, np.uint16)
    for mn in range(rows):
        for k in range(depth):
            line, along = (k, mn) if mn_major else (mn, k)
            lines, length = (depth, rows) if mn_major else (rows, depth)
            chunk = along % width // 8 ^ (line % 8 // turn if swizzle != "none" else 0)
            byte = line % 8 * 2 * width + chunk * 16 + along % 8 * 2
            byte += line // 8 * atom + along // width * (lines // 8) * atom
            assert length % width == 0
            out[byte // 2] = x[mn, k]
    next_lines, next_width = atom, (depth if mn_major else rows) // 8 * atom
    if swizzle == "none":  # leading: the next 8 of k; stride: the next 8 of mn
        leading, stride = (next_lines, next_width) if mn_major else (next_width, next_lines)
    else:
        leading, stride = next_width, next_lines
    if mn_major:
        step = 2 * next_lines
    elif swizzle == "none":
        step = 2 * next_width
    else:
        step = 32
    return out, [2 * rows * depth, leading, stride, SWIZZLES[swizzle], int(mn_major), step]


def run(a_layout, b_layout, n=16, fault="none", depth=None):
    """(what is said, out, expected)"""
    depth = depth or 64
    a, b = (torch.randn(rows, depth).bfloat16() for rows in (64, n))
    bits = [np.ascontiguousarray(x.view(torch.int16).numpy().view(np.uint16)) for x in (a, b)]
    images, described = zip(image(bits[0], *a_layout), image(bits[1], *b_layout), strict=True)
    case = np.array([*described[0], *described[1], n, depth // 16, FAULTS[fault]], np.int32)
    out = np.zeros((64, n), np.float32)
    images = [np.ascontiguousarray(x) for x in images]
    run_product = controls().run_product
    run_product.restype = ctypes.c_char_p
    said = run_product(*(ctypes.c_void_p(x.ctypes.data) for x in (*images, bits[0], out, case))).decode()
    return said, torch.from_numpy(out), a.float() @ b.float().t()


@pytest.mark.parametrize("swizzle", ["128", "64", "32", "none"])
def test_layouts_of_operands(lane_order, swizzle):
    depth = {"128": 64, "64": 32, "32": 16, "none": 32}[swizzle]
    for a_layout, b_layout, n in (
        ((swizzle, False), (swizzle, False), 24),
        ((swizzle, True), (swizzle, True), 64),
        ((swizzle, False), (swizzle, True), 128),
    ):
        said, out, expected = run(a_layout, b_layout, n, depth=depth)
        assert said == ""
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


def test_left_operand_in_registers(lane_order):
    said, out, expected = run(("128", False), ("128", False), 32, "left operand in registers")
    assert said == ""
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no wait for the copy", "race: this thread reads what a bulk copy has written|has ended"),
        ("odd bytes", "a bulk copy must have a multiple of 16 bytes"),
        ("bytes that never come", "deadlock: 128 threads (the first is 0) wait at mbarrier"),
        ("no init", "an mbarrier must have been initialised"),
    ],
)
def test_faults_are_found_in_every_order(lane_order, fault, words):
    said, _, _ = run(("128", False), ("128", False), fault=fault)
    assert any(part in said for part in words.split("|")), said or "nothing was found"


def test_a_product_that_nobody_waits_for_is_not_there(lane_order):
    said, out, expected = run(("128", False), ("128", False), fault="no wait for the product")
    assert said == ""
    assert lane_order == "descending" or not torch.allclose(out, expected, atol=1e-2)
