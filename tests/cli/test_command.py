"""Tables as CSV: as the csv module of Python reads them, and in every command that has a table."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from qconv.cli.command import format_csv
from qconv.cli.main import cli
from tests.support.libraries import runner

CIFAR = Path(__file__).parents[1] / "models" / "cifar_mobilenet.onnx"


def test_cells() -> None:
    rows = [{"name": 'a,"b"', "shape": [8, 3, 3], "ends": [1, 2.5], "none": None, "yes": True}, {"more": {"a": 1}}]
    first, second = csv.DictReader(io.StringIO(format_csv(rows)))
    assert first == {"name": 'a,"b"', "shape": "8x3x3", "ends": "1 2.5", "none": "", "yes": "true", "more": ""}
    assert second["more"] == "a=1"


@pytest.mark.parametrize(
    ("words", "table"), [(("inspect",), "layers"), (("audit",), "layers"), (("benchmark", "--rounds", "1"), "models")]
)
def test_the_table_is_that_of_json(words: tuple[str, ...], table: str, tmp_path: Path) -> None:
    place = tmp_path / "table.csv"
    done = runner().invoke(cli, [*words, str(CIFAR), "--json", "--csv", str(place)], standalone_mode=False)
    assert done.exception is None
    found, rows = json.loads(done.stdout)[table], list(csv.DictReader(io.StringIO(place.read_text())))
    assert len(rows) == len(found) > 0
    assert set(rows[0]) == set(found[0])
