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


NAMES = {"names": "{0: 'cat', 1: 'dog', 9: 'bird'}"}


def read(
    folder: Path,
    text: str,
    *,
    pictures: int = 1,
    output: np.ndarray = OUTPUT,
    reference: bool = True,
    metadata: dict[str, str] | None = None,
) -> list[Detections]:
    """What a file with this text makes of an output."""
    file = folder / "head.py"
    file.write_text(text)
    head = make_head(f"{file}:boxes", NetworkFacts({"y": output}, (32, 32), metadata or {}), pictures)
    return head.read({"y": output}, 0.1, reference=reference)


def test_rows_are_boxes_by_falling_score(tmp_path: Path) -> None:
    (found,) = read(tmp_path, ROWS)
    assert found.boxes.tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]
    assert found.scores.tolist() == [0.9, 0.2]
    assert found.classes.tolist() == [3, 7]


def test_each_picture_of_a_batch_comes_alone(tmp_path: Path) -> None:
    batch = np.concatenate([OUTPUT, OUTPUT + [1, 1, 1, 1, 0, 1]])
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
        ("def boxes(outputs):\n    return outputs['y']\n", "returned 1x2x6 of float64, which is not 6 numbers"),
        ("def boxes(outputs):\n    return outputs['y'][0, :, :5]\n", "returned 2x5 of float64, which is not 6"),
        ("def boxes(outputs):\n    return outputs['y'][0] > 0.5\n", "returned 2x6 of bool, which is not 6 numbers"),
        ("def boxes(outputs):\n    return outputs['y'][0].astype(str)\n", "returned 2x6 of <U"),
        ("def boxes(outputs):\n    return outputs['y'][0] * 1j\n", "returned 2x6 of complex128, which is not 6"),
        ("def boxes(outputs):\n    return [[1, 2, 3, 4, 0.5, None]]\n", "returned list, which is not 6 numbers"),
        ("def boxes(outputs):\n    return [['1', '2', '3', '4', '0.5', '6']]\n", "returned list, which is not 6"),
        ("def boxes(outputs):\n    return [[1, 2, 10**400, 4, 0.5, 6]]\n", "returned list, which is not 6 numbers"),
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


def returns(*rows: str) -> str:
    """A decoder that returns these rows of any output."""
    return f"from numpy import inf, nan\ndef boxes(outputs):\n    return [{', '.join(f'[{row}]' for row in rows)}]\n"


GOOD = "1, 2, 3, 4, 0.5, 1"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("1, 2, 3, 4, nan, 1", "score nan, which is not a finite number"),
        ("1, 2, 3, 4, -inf, 1", "score -inf, which is not a finite number"),
        ("1, nan, 3, 4, 0.5, 1", "box 1, nan, 3, 4, which is not of finite numbers"),
        ("1, 2, inf, 4, 0.5, 1", "box 1, 2, inf, 4, which is not of finite numbers"),
        ("1, 2, 3, 4, 0.5, nan", "class nan, which is not a finite number"),
        ("1, 2, 3, 4, 1.7, 1", "score 1.7, which is not from 0 to 1"),
        ("1, 2, 3, 4, -0.01, 1", "score -0.01, which is not from 0 to 1"),
        ("30, 2, 3, 4, 0.5, 1", "box 30, 2, 3, 4, which is not a left, top, right and bottom edge"),
        ("1, 20, 3, 4, 0.5, 1", "box 1, 20, 3, 4, which is not a left, top, right and bottom edge"),
        ("1, 2, 3, 4, 0.5, 1.5", "class 1.5, which is not a whole number"),
        ("1, 2, 3, 4, 0.5, -1", "class -1, which is not one of the model's 10, counted from 0"),
        ("1, 2, 3, 4, 0.5, 10", "class 10, which is not one of the model's 10, counted from 0"),
    ],
)
def test_a_row_that_is_no_box_is_told(tmp_path: Path, row: str, told: str) -> None:
    """With function, row and picture, the second of both. NAMES go up to 9."""
    batch = np.concatenate([OUTPUT, OUTPUT + 10])
    text = returns(GOOD).replace("    return", "    if outputs['y'].max() < 10: return []\n    return")
    read(tmp_path, text, pictures=2, output=batch, metadata=NAMES)
    with pytest.raises(QconvError) as caught:
        read(tmp_path, text.replace("]]", f"], [{row}]]"), pictures=2, output=batch, metadata=NAMES)
    assert (
        caught.value.message == f"--decode {tmp_path / 'head.py'}:boxes: row 1 of picture 1 of a batch has the {told}."
    )
    assert caught.value.hint


def test_without_names_any_class_may_be(tmp_path: Path) -> None:
    (found,) = read(tmp_path, returns("1, 2, 3, 4, 0.5, 10"))
    assert found.classes.tolist() == [10]
    with pytest.raises(QconvError, match="the class -3, which is not a whole number from 0 on"):
        read(tmp_path, returns("1, 2, 3, 4, 0.5, -3"))


@pytest.mark.parametrize(
    "row",
    [
        "1, 2, 3, 4, 1, 9",
        "1, 2, 3, 4, 1.0004, 9",
        "-20, -7, 90, 80.5, 0.5, 9.0",
        "3, 4, 3, 4, 0.5, 8.9999",
    ],
)
def test_what_a_box_may_be(tmp_path: Path, row: str) -> None:
    """Sure of it, by rounding more than that, partly outside of the picture, or of no area."""
    (found,) = read(tmp_path, returns(row), metadata=NAMES)
    assert found.classes.tolist() == [9]
    assert found.boxes.tolist() == [[float(edge) for edge in row.split(",")[:4]]]


def test_padding_is_no_box(tmp_path: Path) -> None:
    """Rows that fill a table up have a score of 0, and whatever stands beside it."""
    (found,) = read(
        tmp_path, returns(GOOD, "0, 0, 0, 0, 0, -1", "nan, 0, 0, 0, 0, nan", "9, 9, 1, 1, 0.1, 77"), metadata=NAMES
    )
    assert len(found) == 1


@pytest.mark.parametrize(
    "row", ["nan, 2, 3, 4, 0.9, 1", "1, 2, 3, inf, 0.9, 1", "1, 2, 3, 4, nan, 1", "1, 2, 3, 4, 0.9, inf"]
)
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_numbers_that_the_network_breaks_are_no_boxes(tmp_path: Path, row: str, broken: float) -> None:
    """Where an output holds one, the function is not to blame."""
    output = OUTPUT.copy()
    output[0, 0, 0] = broken
    (found,) = read(tmp_path, returns(GOOD, row), output=output)
    assert found.scores.tolist() == [0.5]
    with pytest.raises(QconvError, match=r"the score 1\.7"):
        read(tmp_path, returns("1, 2, 3, 4, 1.7, 1"), output=output)


def test_a_poor_file_is_measured_as_it_is(tmp_path: Path) -> None:
    """A quantized file may put out anything: a score of 2.5 where one scale is of pixels and scores."""
    rows = ("1, 2, 3, 4, 2.5, 1", "30, 2, 3, 4, 0.5, 77", "nan, 2, 3, 4, 0.9, 1", "1, 2, 3, 4, 0.9, nan")
    (found,) = read(tmp_path, returns(*rows), reference=False, metadata=NAMES)
    assert found.scores.tolist() == [2.5, 0.5]


def test_tables_of_objects_and_tensors_are_numbers(tmp_path: Path) -> None:
    (found,) = read(tmp_path, "import numpy\ndef boxes(outputs):\n    return outputs['y'][0].astype(object)\n")
    assert len(found) == 2
    pytest.importorskip("torch")
    text = "import torch\ndef boxes(outputs):\n    return torch.tensor(outputs['y'][0])\n"
    assert len(read(tmp_path, text)[0]) == 2
    with pytest.raises(QconvError, match="returned Tensor, which is not 6 numbers"):
        read(tmp_path, text.replace("[0])", "[0], requires_grad=True)"))
