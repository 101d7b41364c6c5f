"""Run the script and kill it (SIGKILL) at its n-th durable write: `killer.py N before|after …`.

A durable write is a flush to the disk, a rename, or a commit of the savepoint.
"""

import os
import runpy
import signal
import sqlite3
import sys
import threading
from typing import Any, Callable

WANTED, STAGE = int(sys.argv[1]), sys.argv[2]
lock = threading.Lock()
count = 0


def counted(work: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        global count
        with lock:
            count += 1
            here = count == WANTED
        if here and STAGE == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = work(*args, **options)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


class Connection(sqlite3.Connection):
    def execute(self, statement: str, *args: Any) -> Any:
        plain = super().execute
        return (counted(plain) if statement == "COMMIT" else plain)(statement, *args)


connect = sqlite3.connect


def connect_counted(*args: Any, **options: Any) -> Any:
    return connect(*args, factory=Connection, **options)


os.fsync = counted(os.fsync)  # type: ignore[assignment]
os.replace = counted(os.replace)  # type: ignore[assignment]
sqlite3.connect = connect_counted  # type: ignore[assignment]
sys.argv = sys.argv[3:]
runpy.run_module("merge_contacts", run_name="__main__", alter_sys=True)
