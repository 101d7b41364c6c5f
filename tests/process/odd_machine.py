"""Run the script on a machine whose disk breaks: `odd_machine.py disk=FILE:N merge_contacts.py …`.

The N-th commit to the database FILE, and every later one, fails.
"""

import runpy
import sqlite3
import sys
from typing import Any

FILE, _, NUMBER = sys.argv[1].partition("=")[2].rpartition(":")
commits = 0
connect = sqlite3.connect


class Connection(sqlite3.Connection):
    path = ""

    def execute(self, statement: str, *args: Any) -> Any:
        global commits
        if statement == "COMMIT" and FILE in self.path:
            commits += 1
            if commits >= int(NUMBER):
                raise sqlite3.OperationalError("disk I/O error")
        return super().execute(statement, *args)


def connect_oddly(database: str, *args: Any, **options: Any) -> Any:
    connection = connect(database, *args, factory=Connection, **options)
    connection.path = database
    return connection


sqlite3.connect = connect_oddly  # type: ignore[assignment]
sys.argv = sys.argv[2:]
runpy.run_module("merge_contacts", run_name="__main__", alter_sys=True)
