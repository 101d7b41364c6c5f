"""Run the script on a machine that behaves oddly: `odd_machine.py ODDITY merge_contacts.py ...`.

`clock=SECONDS` sets the wall clock forward by that much (back, where it is negative).
`disk=FILE:N` lets the N-th commit to the database FILE, and every later one, fail as a broken disk does.
`kill=N:before|after` kills the process (SIGKILL) at the N-th commit that stores the request of a merge.
"""

import os
import runpy
import signal
import sqlite3
import sys
import time
from typing import Any

what, _, detail = sys.argv[1].partition("=")
commits = intents = 0
real_time, connect = time.time, sqlite3.connect


class Connection(sqlite3.Connection):
    path = ""
    has_intent = False

    def executemany(self, statement: str, rows: Any) -> Any:
        rows = list(rows)
        self.has_intent = self.has_intent or any("requested" in row[:6] for row in rows)
        return super().executemany(statement, rows)

    def execute(self, statement: str, *args: Any) -> Any:
        global commits, intents
        if statement != "COMMIT":
            return super().execute(statement, *args)
        name, _, number = detail.rpartition(":")
        if what == "disk" and name in self.path:
            commits += 1
            if commits >= int(number):
                raise sqlite3.OperationalError("disk I/O error")
        is_wanted = False
        if what == "kill" and self.has_intent:
            intents += 1
            is_wanted = intents == int(name)
        self.has_intent = False
        if is_wanted and number == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = super().execute(statement, *args)
        if is_wanted:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def connect_oddly(database: str, *args: Any, **options: Any) -> Any:
    connection = connect(database, *args, factory=Connection, **options)
    connection.path = database
    return connection


if what == "clock":
    time.time = lambda: real_time() + float(detail)
sqlite3.connect = connect_oddly  # type: ignore[assignment]
sys.argv = sys.argv[2:]
runpy.run_module("merge_contacts", run_name="__main__", alter_sys=True)
