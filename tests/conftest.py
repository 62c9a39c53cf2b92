"""--tenth: a tenth of the tests, always the same ones, and those marked `always`.

For a second set of libraries, for which there is no time to run them all.
"""

from __future__ import annotations

import signal
import zlib

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job that a shell runs behind the scenes
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests send it to processes that inherit this


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tenth", action="store_true", help="run a tenth of the tests, by their names, and one a command")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "always: belongs to every tenth of the tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--tenth"):
        return
    chosen = [item for item in items if item.get_closest_marker("always") or zlib.crc32(item.nodeid.encode()) % 10 == 0]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen
