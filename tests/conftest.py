"""Settings for every test: new tensors are filled with NaN, so an output that a kernel forgets to write fails."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _deterministic_torch():
    if "torch" in sys.modules:  # the text wing's tests stay free of torch
        torch = sys.modules["torch"]
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    """Leaves out the long versions unless -m asks for them."""
    if "full" in (config.option.markexpr or ""):
        return
    skip = pytest.mark.skip(reason="the long version; run with -m full")
    for item in items:
        if "full" in item.keywords:
            item.add_marker(skip)
