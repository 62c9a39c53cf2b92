"""Run a command and print its status, wall time and peak memory as JSON: python -m tests.bench.spawn COMMAND ...

A process of its own because Linux counts the memory of whoever started a process as that process's peak.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main(command: list[str]) -> None:
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    start = time.perf_counter()
    child = os.posix_spawn(command[0], command, os.environ, file_actions=quiet)
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - start
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(json.dumps({"status": os.waitstatus_to_exitcode(status), "seconds": seconds, "rss_mb": peak}))


if __name__ == "__main__":
    main(sys.argv[1:])
