"""The process that holds one model of a benchmark and times it on request. `benchmark` starts it.

    python -P -m qconv.runtime.benchmark_worker

It reads lines of JSON and answers each with one: first {"model", "name", "threads", "batch", "size"}, then numbers of
runs. It ends when its input does, so none is left behind when the parent dies.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

from numpy.typing import NDArray

from qconv.errors import QconvError
from qconv.runtime.session import Session, make_random_inputs


def serve() -> None:
    """Answer until the parent closes our input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C goes to the parent, who then ends us
    request = json.loads(sys.stdin.readline())
    try:
        session = Session(request["model"], name=request["name"], threads=request["threads"], alone=True)
        feeds = make_random_inputs(session, request["batch"], request["size"])
        session.run_all(feeds)
    except QconvError as error:
        _write_answer({"error": [error.message, error.hint]})
        return
    except MemoryError:
        _write_answer(
            {"error": [f"{request['name']} does not fit into memory with this input.", "try a smaller --batch."]}
        )
        return
    _write_answer({"shapes": {name: list(array.shape) for name, array in feeds.items()}})
    for line in sys.stdin:
        _write_answer(time_runs(session, feeds, int(line)))


def time_runs(session: Session, feeds: dict[str, NDArray[Any]], runs: int) -> list[float]:
    """The times of `runs` runs in ms, after one that is not counted: caches hold another model by then."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        session.run_all(feeds)
        times.append(1000 * (time.perf_counter() - start))
    return times[1:]


def _write_answer(thing: Any) -> None:
    print(json.dumps(thing), flush=True)


if __name__ == "__main__":
    try:
        serve()
    except BrokenPipeError:  # the parent is gone
        os._exit(1)
