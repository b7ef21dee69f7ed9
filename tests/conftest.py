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
