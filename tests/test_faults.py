"""A short part of faults.py, always the same: each fault, with one command; some damage."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"),
                    reason="faults.c is for Linux, and is built with gcc")
def test_programs_end_as_if_nothing_had_happened():
    done = subprocess.run([sys.executable, ROOT / "tests/faults.py", "--short"], text=True,
                          capture_output=True)
    *_, tried, held, failed = done.stdout.split("\nall ")[1].split("\n")[0].split()
    assert done.returncode == 0 and failed == "0", done.stdout + done.stderr[-2000:]
    assert int(tried) == int(held) == 11 + ("\ndisk, " in done.stdout) + 5 * 12
