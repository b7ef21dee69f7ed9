"""Keeps freed memory in the process for the next tensor, instead of asking the kernel for fresh pages every time.

A tensor on a CPU comes from malloc. glibc gives blocks above 32 MiB back to the kernel as soon as they are freed, and
the end of its heap too; the next step then pays for every page again (the kernel finds it, clears it, maps it), which
costs more than a kernel of ops that only moves memory. `reuse()` tells glibc to keep what it has and puts its heap on
huge pages where the kernel grants them on request. It holds for all of the process: torch's own results as well.

The price: resident memory stays at its highest level until `release()` or `stop_reuse()`. That level can lie above what
lives at once: an aligned block leaves a splinter beside it, and glibc (2.36) takes up to eight new places for one that
is made and freed again and again before it joins splinters and blocks. In a training step it was not measurable.
Source: glibc manual, "Malloc Tunable Parameters"; mallopt(3); madvise(2), MADV_HUGEPAGE.
"""

import ctypes
import functools
import os
import sys
import threading
import warnings

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4  # mallopt's parameters, malloc.h
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2 << 20
_state = {"active": False}


def reuse() -> bool:
    """Keep freed memory for the next allocation, in this process and its forked children; return whether it is so now.

    Works with glibc's malloc on Linux. Elsewhere (musl, macOS, Windows, jemalloc or another malloc in its place) it
    warns with the reason and does nothing. Calling it again changes nothing. Call it from the main thread: huge pages
    are only for that thread's heap.
    """
    reason = why_not()
    if reason is not None:
        warnings.warn(f"memory.reuse: freed memory is not kept: {reason}", stacklevel=2)
        return False
    if not _state["active"]:
        libc = _libc()
        libc.mallopt(_MMAP_MAX, 0)  # blocks of any size from the heap: M_MMAP_THRESHOLD ends at 32 MiB
        libc.mallopt(_TRIM_THRESHOLD, -1)  # and its end is never given back
        _state["active"] = True
        _reserve_huge_pages(libc)
    return True


def stop_reuse() -> None:
    """End what `reuse` began and give free memory back to the kernel.

    glibc cannot be told to adapt its thresholds again: they stay at 32 MiB (a block of its own) and 64 MiB (free end of
    the heap), which is where a process that trains has them anyway.
    """
    if _state["active"]:
        libc = _libc()
        libc.mallopt(_MMAP_MAX, 65536)
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 64 << 20)
        _state["active"] = False
        libc.malloc_trim(0)


def release() -> None:
    """Give free memory back to the kernel once, and go on as before: after a phase that needed more than the next."""
    if why_not() is None:
        libc = _libc()
        libc.malloc_trim(0)
        if _state["active"]:
            _reserve_huge_pages(libc)


def is_reused() -> bool:
    """Whether `reuse` is in force in this process."""
    return _state["active"]


@functools.cache
def why_not() -> str | None:
    """The reason why `reuse` can do nothing here, None if it can."""
    if sys.platform != "linux":
        return f"this needs Linux and glibc, got {sys.platform}"
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError as error:
        return f"this needs glibc: {error}"
    if not hasattr(libc, "gnu_get_libc_version"):
        return "this needs glibc, got another C library"
    used, own = (ctypes.cast(library.malloc, ctypes.c_void_p).value for library in (ctypes.CDLL(None), libc))
    return None if used == own else "another malloc is loaded in the place of glibc's and has settings of its own"


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL("libc.so.6", use_errno=True)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    return libc


def _reserve_huge_pages(libc: ctypes.CDLL) -> None:
    """Stretch the heap over addresses of half of the machine's memory, none of it touched, and ask for huge pages.

    A heap that grows bit by bit gets them bit by bit: the kernel asks anew for each piece. Where the addresses are not
    granted (limits) the heap grows as usual, on small pages. So it does under strict overcommit, where addresses count
    as memory: a fork would have to promise them a second time, and fail.
    """
    if threading.current_thread() is not threading.main_thread() or _is_overcommit_strict():
        return
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    start = libc.malloc(size)
    if start:
        begin, end = -(-start // _HUGE_PAGE) * _HUGE_PAGE, (start + size) // _HUGE_PAGE * _HUGE_PAGE
        libc.madvise(begin, end - begin, _MADV_HUGEPAGE)
        libc.free(start)


def _is_overcommit_strict() -> bool:
    try:
        with open("/proc/sys/vm/overcommit_memory") as file:
            return file.read().strip() == "2"
    except OSError:
        return False
