"""Run a command and print its status, times and peak memory as JSON: python -m tests.bench.spawn COMMAND ...

A process of its own because Linux counts the memory of whoever started a process as that process's peak. What a command
that fails said last is in "stderr".
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time

LAST = 10  # lines


def main(command: list[str]) -> None:
    with tempfile.TemporaryFile() as said:
        places = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0), (os.POSIX_SPAWN_DUP2, said.fileno(), 2)]
        start = time.perf_counter()
        child = os.posix_spawn(command[0], command, os.environ, file_actions=places)
        _, status, usage = os.wait4(child, 0)
        seconds = time.perf_counter() - start
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    code = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    cpu = usage.ru_utime + usage.ru_stime
    found = {"status": code, "seconds": seconds, "cpu_seconds": cpu, "rss_mb": peak}
    found["stderr"] = lines[-LAST:] if code else []
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
