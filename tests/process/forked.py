"""Run the script in a fork of a process that has imported its packages already: in half the CPU.

What runs is the same as from a shell, in a process of its own; only the imports are shared.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, List, Mapping, Sequence

# The module for the patterns that it compiles; what runs is executed again.
IMPORTED = ["dotenv", "ratelimit", "requests", "sqlite3", "ssl", "subprocess", "merge_contacts"]
# What Python reads before any program starts can't be set in a fork.
READ_AT_START = ("PYTHON", "LC_", "LANG", "TZ")

context: Any = multiprocessing.get_context("forkserver") if os.name != "nt" else None
if context:
    context.set_forkserver_preload(IMPORTED)


def can_fork(extra: Mapping[str, str]) -> bool:
    return context is not None and not any(name.startswith(READ_AT_START) for name in extra)


def _run(argv: List[str], folder: str, environment: Mapping[str, str], out: str, err: str) -> None:
    """Become the program: `argv` is `-m MODULE …` or `SCRIPT …`."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate((os.devnull, out, err)):
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0, encoding="utf-8")
    sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


def run(argv: Sequence[str], folder: str, environment: Mapping[str, str], timeout: float) -> Any:
    """Run to the end: return exit code (negative for a signal), stdout, stderr, and whether the
    process was still running after `timeout` seconds and was ended by SIGABRT."""
    with tempfile.TemporaryDirectory() as scratch:
        streams = [Path(scratch, name) for name in ("out", "err")]
        for path in streams:
            path.touch()
        process = context.Process(
            target=_run, args=(list(argv), folder, dict(environment), *map(str, streams))
        )
        process.start()
        process.join(timeout)
        late = process.exitcode is None
        if late:
            os.kill(process.pid, signal.SIGABRT)
            process.join()
        return (process.exitcode, *(path.read_text(encoding="utf-8") for path in streams), late)
