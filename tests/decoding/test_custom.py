"""`--decode FILE.py:FUNCTION`: what the function gets, and what whatever goes wrong in it is told as."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qconv.decoding.boxes import Detections
from qconv.decoding.custom import load_decoder, make_head
from qconv.decoding.head import NetworkFacts
from qconv.errors import QconvError

ROWS = "def boxes(outputs):\n    return outputs['y'][0]\n"
"""A decoder for a network that gives the rows themselves."""

OUTPUT = np.array([[[1, 2, 3, 4, 0.2, 7], [5, 6, 7, 8, 0.9, 3]]])


def read(folder: Path, text: str, *, pictures: int = 1, output: np.ndarray = OUTPUT) -> list[Detections]:
    """What a file with this text makes of an output."""
    file = folder / "head.py"
    file.write_text(text)
    head = make_head(f"{file}:boxes", NetworkFacts({"y": output}, (32, 32)), pictures)
    return head.read({"y": output}, 0.1)


def test_rows_are_boxes_by_falling_score(tmp_path: Path) -> None:
    (found,) = read(tmp_path, ROWS)
    assert found.boxes.tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]
    assert found.scores.tolist() == [0.9, 0.2]
    assert found.classes.tolist() == [3, 7]


def test_each_picture_of_a_batch_comes_alone(tmp_path: Path) -> None:
    batch = np.concatenate([OUTPUT, OUTPUT + 1])
    alone = ROWS.replace("return", "assert len(outputs['y']) == 1; return")
    found = read(tmp_path, alone, pictures=2, output=batch)
    assert [len(one) for one in found] == [2, 2]
    assert found[1].boxes[0].tolist() == [6, 7, 8, 9]


def test_outputs_of_one_picture_come_as_they_are(tmp_path: Path) -> None:
    """As those of torchvision do, without an axis for the batch."""
    (found,) = read(tmp_path, "def boxes(outputs):\n    return outputs['y']\n", output=OUTPUT[0])
    assert len(found) == 2


@pytest.mark.parametrize("nothing", ["[]", "numpy.zeros((0, 6))"])
def test_a_picture_may_have_no_box(tmp_path: Path, nothing: str) -> None:
    (found,) = read(tmp_path, f"import numpy\ndef boxes(outputs):\n    return {nothing}\n")
    assert len(found) == 0


def test_the_function_cannot_change_outputs(tmp_path: Path) -> None:
    before = OUTPUT.copy()
    read(tmp_path, "def boxes(outputs):\n    outputs['y'] *= 0\n    return outputs['y'][0]\n")
    assert np.array_equal(before, OUTPUT)


def test_what_it_prints_is_no_part_of_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read(tmp_path, f"print('loaded')\n{ROWS.replace('return', 'print(1); return')}")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "loaded" in shown.err


def test_files_beside_it_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "its_neighbour.py").write_text("def rows(outputs):\n    return outputs['y'][0]\n")
    (found,) = read(tmp_path, "from its_neighbour import rows as boxes\n")
    assert len(found) == 2


def test_the_file_runs_once_until_it_changes(tmp_path: Path) -> None:
    counted = "import pathlib\nseen = pathlib.Path(__file__).with_name('seen')\n"
    counted += "seen.write_text((seen.read_text() if seen.exists() else '') + 'x')\n"
    for text in (counted + ROWS, counted + ROWS, counted + ROWS + "\n"):
        file = tmp_path / "head.py"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        load_decoder(f"{file}:boxes")
    assert (tmp_path / "seen").read_text() == "xx"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import nothing_of_this_name\n", "does not load: ModuleNotFoundError: .* in line 1"),
        ("\n\ndef boxes(outputs:\n", "does not load: SyntaxError: .* in line 3"),
        ("raise SystemExit(3)\n", "does not load: SystemExit: 3 in line 1"),
        ("other = 1\n", "has no function 'boxes'"),
        ("boxes = 1\n", "has no function 'boxes'"),
        ("def boxes(outputs):\n    a = 0\n    return 1 / a\n", "failed: ZeroDivisionError: .* in line 3"),
        ("def boxes(outputs):\n    return outputs['x']\n", "failed: KeyError: 'x' in line 2"),
        ("def boxes():\n    return []\n", "failed: TypeError: .*positional argument"),
        ("import sys\ndef boxes(outputs):\n    sys.exit()\n", "failed: SystemExit in line 3"),
        ("def boxes(outputs):\n    return outputs['y']\n", "returned 1x2x6, which is not 6 numbers"),
        ("def boxes(outputs):\n    return outputs['y'][0, :, :5]\n", "returned 2x5, which is not 6 numbers"),
        ("def boxes(outputs):\n    return None\n", "returned NoneType, which is not 6 numbers"),
        ("def boxes(outputs):\n    return [[1, 2], [3]]\n", "returned list, which is not 6 numbers"),
        ("def boxes(outputs):\n    return 'boxes'\n", "returned str, which is not 6 numbers"),
    ],
)
def test_what_goes_wrong_is_told_with_file_and_function(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(QconvError, match=rf"--decode .*head.py:boxes:? .*{told}"):
        read(tmp_path, text)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(QconvError, match=r"none\.py cannot be read: No such file"):
        load_decoder(f"{tmp_path / 'none.py'}:boxes")


def test_a_batch_with_outputs_of_one_picture_is_told(tmp_path: Path) -> None:
    file = tmp_path / "head.py"
    file.write_text(ROWS)
    outputs = {"y": np.zeros((2, 3, 6)), "count": np.zeros(1)}
    head = make_head(f"{file}:boxes", NetworkFacts(outputs, (32, 32)), 2)
    with pytest.raises(QconvError, match="not all outputs have a part for each picture"):
        head.read(outputs, 0.1)
