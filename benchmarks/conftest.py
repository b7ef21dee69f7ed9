"""Lets `pytest benchmarks` collect bench_*.py; each runs our implementation alone under pytest-benchmark."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # where the scripts find harness.py


def pytest_collect_file(file_path, parent):
    named = parent.session.isinitpath(file_path)  # pytest collects by itself what the command line names
    if file_path.name.startswith("bench_") and file_path.suffix == ".py" and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None
