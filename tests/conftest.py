"""Settings for every test: new tensors are filled with NaN, so an output that a kernel forgets to write fails."""

import os
import sys

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores: more threads would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.path.exists("/dev/nvidia0"):  # Triton reads it when it is first imported, by whomever
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _deterministic_torch():
    torch = sys.modules.get("torch")  # the text wing's tests stay free of torch
    if torch is not None:
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """One torch thread: models too small to share are not slowed down by a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def worlds():
    """Gloo groups of processes by their number, `worlds(4)`, each started once for a file of tests."""
    from ranks import Ranks

    started = {}

    def of(size):
        if size not in started:
            started[size] = Ranks(size)
        return started[size]

    yield of
    for ranks in started.values():
        ranks.close()
