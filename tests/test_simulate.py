"""Some lives in simulated time, and those that once went wrong."""

import subprocess
import sys

import pytest

from tests.support import ROOT


@pytest.mark.parametrize("options", [["--seeds", "24", "--start", "1"], ["--kept"]])
def test_lives_keep_every_promise(options: "list[str]") -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulate", *options], cwd=str(ROOT), capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
