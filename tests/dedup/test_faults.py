"""Disks that fail and shards that are damaged: dedup ends as it should or says what failed, and goes on from there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fault_injector
import pytest

DRIVER = Path(__file__).with_name("fault_driver.py")
CALLS = ["ENOSPC", "ENOSPC once", "EIO", "EACCES", "short"]
DAMAGE = ["truncated", "flipped"]
WRITE_INPUTS = f"""import pathlib, sys
sys.path.insert(0, {str(DRIVER.parent)!r})
import pipeline
pipeline.write_inputs(pathlib.Path(sys.argv[1]), 2, num_files=12, num_chars=3000)"""

pytestmark = pytest.mark.skipif(bool(fault_injector.why_not()), reason=fault_injector.why_not() or "possible")


def drive(tmp_path, *wanted):
    """What fault_driver.py reports, by fault."""
    with fault_injector.work_folder(tmp_path) as work:
        environment = {**os.environ, **fault_injector.build(work)}
        subprocess.run([sys.executable, "-c", WRITE_INPUTS, str(work / "in")], check=True, env=environment)
        (work / "work").mkdir()
        command = [sys.executable, str(DRIVER), str(work / "work"), str(work / "in"), "1", *wanted]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        return work, json.loads(done.stdout)["reports"]


def check(report, work):
    """One point: the same output or an error that names a path; nothing finished is lost; the next run ends well."""
    assert report["hits"], report
    if report["error"] is None:
        assert report["identical"] or "moment" in report, report
    else:
        assert str(work) in report["error"], report
    assert not report.get("damaged"), report
    assert report["resume_error"] is None, report
    assert report["resume_identical"], report


def check_calls(work, fault, reports):
    for report in reports:
        check(report, work)
        assert report["journal_kept"], report
    failed = [report for report in reports if report["error"]]
    assert failed if fault != "short" else len(failed) < len(reports)


def check_damage(work, reports):
    for report in reports:
        check(report, work)
        assert not report["wrong"], report  # no damage has travelled into another file
        if report["moment"] == "input":
            assert report["error"], report
            assert Path(report["place"]).name in report["error"], report
        if report["moment"] == "finished":
            assert report["error"] is None, report
            assert report["identical"], report


def test_a_few_faults_of_each_kind(tmp_path):
    work, reports = drive(tmp_path, "ENOSPC:3", "EIO:3", "short:3", "truncated:3", "flipped:3")
    for fault in ("ENOSPC", "EIO", "short"):
        check_calls(work, fault, reports[fault])
    for how in DAMAGE:
        check_damage(work, reports[how])


@pytest.mark.full
@pytest.mark.parametrize("fault", CALLS)
def test_sixty_calls_that_fail(tmp_path, fault):
    work, reports = drive(tmp_path, f"{fault}:60")
    assert len(reports[fault]) == 60
    check_calls(work, fault, reports[fault])


@pytest.mark.full
@pytest.mark.parametrize("how", DAMAGE)
def test_sixty_damaged_files(tmp_path, how):
    work, reports = drive(tmp_path, f"{how}:60")
    assert len(reports[how]) == 60
    check_damage(work, reports[how])


def test_the_injector_fails_the_call_it_is_told_to(tmp_path):
    """The control: without a fault a copy is whole, with one it is not, and the path of the call is known."""
    environment = {**os.environ, **fault_injector.build(tmp_path)}
    (tmp_path / "work").mkdir()
    code = (
        "import errno, os, sys, fault_injector as fi\n"
        "from pathlib import Path\n"
        "faults, folder = fi.Faults(os.environ[fi.CONTROL]), Path(sys.argv[1])\n"
        "faults.arm(folder, fi.WRITE)\n"
        "(folder / 'a').write_bytes(b'abcd')\n"
        "(folder.parent / 'elsewhere').write_bytes(b'abcd')\n"
        "assert faults.count == 1, faults.count\n"
        "for action, wanted in ((fi.FAIL, b''), (fi.SHORT, b'ab')):\n"
        "    faults.arm(folder, fi.WRITE, action=action, error=errno.EIO, nth=2)\n"
        "    for name, left in (('b', b'abcd'), ('c', wanted), ('d', b'abcd')):\n"
        "        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)\n"
        "        try:\n"
        "            os.write(descriptor, b'abcd')\n"
        "        except OSError as e:\n"
        "            assert (action, name, e.errno) == (fi.FAIL, 'c', errno.EIO)\n"
        "        os.close(descriptor)\n"
        "        assert (folder / name).read_bytes() == left, (action, name)\n"
        "    assert (faults.hits, faults.place) == (1, str(folder / 'c'))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "work")], check=True, env=environment)
