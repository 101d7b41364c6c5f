import contextlib
import logging
import os
import py_compile
from pathlib import Path
from typing import Iterator

import pytest
from hypothesis import settings

from tests.simulation.scene import Scene
from tests.simulation.world import WAIVED
from tests.support import SCRIPT, Workplace

# A share of the examples in the fast run, all of them in CI: always the same ones, so that nobody's
# commit is drawn a fault of another's. `search` draws new ones.
settings.register_profile("quick", max_examples=30, derandomize=True)
settings.register_profile("thorough", max_examples=100, derandomize=True)
settings.register_profile("search", max_examples=300)
settings.load_profile("quick")


def pytest_sessionstart() -> None:
    """The bytecode that every start of the program uses: written once, before the workers begin."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        with contextlib.suppress(OSError):
            py_compile.compile(str(SCRIPT), quiet=1)


def pytest_runtest_teardown() -> None:
    """A run in this process has its log to itself; the next test may look at records."""
    logging.getLogger("merge_contacts").propagate = True


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def scene(folder: Path) -> Iterator[Scene]:
    """A scripted scene in simulated time, in a folder of its own."""
    yield Scene()
    WAIVED.clear()
