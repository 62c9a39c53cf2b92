"""Families of odd networks, drawn from seeds: every command ends well on each, and results are near float.

Oracles: ONNX Runtime on both files; the number of graphs of a family is QCONV_GRAPHS, 3 unless that is set.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.support.families import FAMILIES
from tests.support.grown import Case, run_commands

GRAPHS = int(os.environ.get("QCONV_GRAPHS", "3"))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_command_ends_well(family: Callable[[int], Case]) -> None:
    wrong = {seed: run_commands(family(seed), diagnose=seed % 4 == 1).wrong for seed in range(GRAPHS)}
    assert {seed: found for seed, found in wrong.items() if found} == {}
