"""Import a library without one that it imports: the other one is imported when something of it is used.

onnx-ir imports sympy for arithmetic on symbolic shapes, of which nothing is done here: a third of a second and 30 MB
for every command.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def deferred(name: str) -> Iterator[None]:
    """Inside, `import name` gives a stand-in, whose attributes are functions that import `name` when they are called.

    Afterwards the stand-in passes every attribute on, and `import name` means the library itself again.
    """
    if name in sys.modules:
        yield
        return
    stand_in = _StandIn(name)
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]
        stand_in.__dict__["ready"] = True


class _StandIn(ModuleType):
    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # the import system asks for some
            raise AttributeError(attribute)
        if self.__dict__.get("ready"):
            return getattr(importlib.import_module(self.__name__), attribute)
        return _later(self.__name__, attribute)


def _later(name: str, attribute: str) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(name), attribute)(*args, **options)

    return call
