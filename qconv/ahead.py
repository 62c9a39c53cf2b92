"""Work done ahead of the one who wants it, in threads, and handed over in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
WORKER = "qconv-ahead"
"""What the names of the threads begin with."""


def ahead(work: Callable[[T], R], items: Iterable[T], *, workers: int, depth: int) -> Generator[Future[R], None, None]:
    """Yield the futures of work(item) in order, at most `depth` of them submitted and not yet taken.

    items is read in the caller's own thread. Closing the generator stops the threads, and closes items, which may have
    threads of its own. Where an error has left it to the garbage collector, that can happen in one of these threads,
    which cannot wait for itself.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix=WORKER)
    try:
        pending: deque[Future[R]] = deque()
        for item in items:
            if len(pending) == depth:
                yield pending.popleft()
            pending.append(pool.submit(work, item))
        while pending:
            yield pending.popleft()
    finally:
        pool.shutdown(wait=not threading.current_thread().name.startswith(WORKER), cancel_futures=True)
        if isinstance(items, Generator):
            items.close()
