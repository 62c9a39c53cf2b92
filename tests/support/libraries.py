"""What the installed libraries can do: a test of something that older ones lack states the version that it needs."""

from __future__ import annotations

import inspect
import re
from importlib.metadata import version

import pytest
from click.testing import CliRunner

MOVES_CODES = "older ones compute Flatten, Slice, ReduceMax or Resize between integer layers in float here and there"
ZERO_POINTS = "older ones refuse weights whose channels have zero points of their own"


def has(library: str, least: str) -> bool:
    """Whether the installed library is at least of this version."""
    found, wanted = ([int(part) for part in re.findall(r"\d+", text)[:3]] for text in (version(library), least))
    return found >= wanted


def needs(library: str, least: str, why: str) -> pytest.MarkDecorator:
    """The mark of a test that takes a library of this version, and what for."""
    return pytest.mark.skipif(not has(library, least), reason=reason(library, least, why))


def skip_without(library: str, least: str, why: str) -> None:
    """The same inside of a test."""
    if not has(library, least):
        pytest.skip(reason(library, least, why))


def reason(library: str, least: str, why: str) -> str:
    return f"needs {library} >= {least}: {why}"


def runner() -> CliRunner:
    """click's, with standard output by itself: before 8.2 it takes a word for that."""
    apart = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
    return CliRunner(**apart)
