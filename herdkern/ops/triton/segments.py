"""Which segment an index lies in: the search of kernels in a table of borders (of documents, of tensors)."""

import triton
import triton.language as tl


@triton.jit
def find_segment(borders_ptr, num_segments, index):
    """The last segment s with borders[s] <= index; borders: (num_segments + 1,) ascending, borders[0] = 0."""
    low = index * 0
    high = low + num_segments - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(borders_ptr + middle) <= index:
            low = middle
        else:
            high = middle - 1
    return low
