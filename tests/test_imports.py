"""What importing loads: no torch in the text wing, the report and the command line. Seen in sys.modules, not timed."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "matplotlib", "pyarrow", "transformers", "tyro", "scipy")


def loaded_after(code: str) -> set[str]:
    """The heavy packages in sys.modules after `code` ran in a fresh interpreter."""
    probe = f"{code}\nimport sys, json\nprint('\\n' + json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_herdkern_loads_nothing_but_itself():
    code = "import sys; before = set(sys.modules); import herdkern; assert set(sys.modules) - before == {'herdkern'}"
    assert loaded_after(code) == set()


@pytest.mark.parametrize("name", ["engine", "data", "dedup", "tokenizer", "report", "cli", "recipes"])
def test_text_wing_loads_without_torch(name):
    assert "torch" not in loaded_after(f"import herdkern.{name}")


@pytest.mark.parametrize("module", ["data.document", "data.extract", "data.pack", "dedup.minhash", "report.sections"])
def test_text_modules_load_without_torch(module):
    assert "torch" not in loaded_after(f"import herdkern.{module}")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], []])
def test_top_level_help_loads_no_heavy_package(arguments):
    assert loaded_after(f"import herdkern.cli; herdkern.cli.main({arguments!r})") == set()


@pytest.mark.parametrize(
    "arguments", [["run", "demo", "--help"], ["run", "llama3-405b", "--dry-run"], ["report", "--help"]]
)
def test_settings_and_plans_load_no_torch(arguments):
    code = f"import herdkern.cli\ntry: herdkern.cli.main({arguments!r})\nexcept SystemExit: pass"
    assert "torch" not in loaded_after(code)
