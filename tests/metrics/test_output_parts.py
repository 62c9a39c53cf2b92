"""Outputs cut into parts, and noise over their own powers: by hand."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.decoding.head import OutputPart
from qconv.metrics.output_parts import (
    NO_PARTS,
    WORST_NOISE,
    find_parts,
    measure_output_noise,
    relative_noise,
    sum_errors,
)
from qconv.runtime.output_origins import Join, OutputOrigin
from qconv.runtime.outputs import ModelOutput

PARTS = {"y": (OutputPart("boxes", 1, 0, 1), OutputPart("scores", 1, 1))}


def test_noise_by_hand() -> None:
    """(1 - 2)^2 over powers of 1 + 4 and 4 + 4, and of whole numbers one of two: the sum over outputs.

    No number counts as worst; where float has none, nothing counts.
    """
    names, ref = ["y", "z"], [[np.float32([[1, 2]]), np.array([3, 4])]]

    def noise(got: list[list[object]], expected: list[list[object]] = ref) -> float:  # type: ignore[assignment]
        return measure_output_noise(NO_PARTS, names[: len(expected[0])], expected, got)  # type: ignore[arg-type]

    assert noise([[np.float32([[2, 2]]), np.array([3, 5])]]) == pytest.approx(1 / 40**0.5 + 1 / 2)
    assert noise(ref) == 0  # type: ignore[arg-type]
    assert noise([[np.float32([[np.nan, 2]]), np.array([3, 4])]]) == WORST_NOISE
    assert noise([[np.float32([[5, 1]])]], [[np.float32([[np.inf, 2]])]]) == pytest.approx(1 / 2)
    assert noise([[np.ones(2, np.float32)]], [[np.zeros(2, np.float32)]]) == 0  # nothing to compare with


def test_parts_count_by_their_own_power() -> None:
    """Boxes of 100 that are 1 off, scores of 0.1 that are half: 1 / (100 * 101) and 0.05^2 / (0.1 * 0.05)."""
    ref, got = np.float32([[[100.0], [0.1]]]), np.float32([[[101.0], [0.05]]])
    assert measure_output_noise(PARTS, ["y"], [[ref]], [[got]]) == pytest.approx(1 / 10100 + 0.5)
    whole = 1.0025 / (10000.01 * 10201.0025) ** 0.5
    assert measure_output_noise(NO_PARTS, ["y"], [[ref]], [[got]]) == pytest.approx(whole)


def test_silence_is_worse_than_being_unsure() -> None:
    """Scores that are gone are as bad as can be; those of another place than float's have 2 over 1."""
    ref = np.float32([[[1.0, 0.0]]])
    silent, elsewhere = np.zeros_like(ref), ref[..., ::-1]
    assert measure_output_noise(NO_PARTS, ["y"], [[ref]], [[silent]]) == WORST_NOISE
    assert measure_output_noise(NO_PARTS, ["y"], [[ref]], [[elsewhere]]) == 2


def test_boxes_count_as_far_as_there_is_an_object() -> None:
    """Two cells with scores of 0.8 * 0.5 and 0.1 * 0.2: the box of the second is 3 off, that of the first 1.

    Boxes: (0.4 * 1 + 0.02 * 9) over the root of (0.4 * 16 + 0.02 * 16) * (0.4 * 25 + 0.02 * 49).
    Scores: only the first cell's class moves, from 0.4 to 0.8 * 0.25.
    """
    scores = OutputPart("scores", 1, 2, 3, times=OutputPart("objectness", 1, 1, 2))
    parts = {"y": (OutputPart("boxes", 1, 0, 1, sure=scores), scores)}
    ref = np.float32([[[4, 4], [0.8, 0.1], [0.5, 0.2]]])
    got = np.float32([[[5, 7], [0.8, 0.1], [0.25, 0.2]]])
    sums = sum_errors(parts, ["y"], [ref], [got])
    assert sums == pytest.approx(np.array([[6.72, 0.58, 10.98], [0.1604, 0.04, 0.0404]]), rel=1e-5)
    assert relative_noise(sums) == pytest.approx(
        0.58 / (6.72 * 10.98) ** 0.5 + 0.04 / (0.1604 * 0.0404) ** 0.5, rel=1e-5
    )


def test_powers_add_up_over_batches() -> None:
    """A batch without any score lays little in the scale: 0.02 over powers of 0 + 1 and 0.01 + 1.21."""
    empty, full = np.float32([[[1.0], [0.0]]]), np.float32([[[1.0], [1.0]]])
    sums = sum(sum_errors(PARTS, ["y"], [ref], [ref + np.float32([[[0.0], [0.1]]])]) for ref in (empty, full))
    assert relative_noise(np.asarray(sums)) == pytest.approx(0.02 / 1.22**0.5, rel=1e-5)


def test_another_shape_has_no_errors_but_its_places() -> None:
    ref = np.ones((1, 2, 3), np.float32)
    assert sum_errors(PARTS, ["y", "z"], [ref, ref], [ref[:, :, :2], ref]).tolist() == [[0, 0, 0], [0, 0, 0], [6, 0, 6]]


BOXES = np.float32([[[1, 1], [5, 5], [2, 2]]])
MOVED = np.float32([[[2, 1], [9, 0], [2, 0]]])


@pytest.mark.parametrize(
    ("scores", "places", "classes_first"),
    [
        ([[[0.9, 0.1], [0.0, 0.0], [0.25, 0.2]]], None, None),  # (N, M, C), as boxes are laid out
        ([[0.9, 0.0, 0.25]], 1, None),  # (N, M)
        ([[[0.9, 0.0, 0.1], [0.1, 0.0, 0.25]]], 1, None),  # (N, C, M)
        ([[[0.9, 0.1], [0.0, 0.0], [0.25, 0.2]]], 1, None),  # (N, M, C)
        ([[[0.9, 0.0, 0.0], [0.1, 0.0, 0.0], [0.1, 0.0, 0.25]]], 1, True),  # as many classes as places
        ([[[0.9, 0.1, 0.1], [0.0, 0.0, 0.0], [0.0, 0.0, 0.25]]], 1, False),
        ([[0.1, 0.9, 0.0, 0.0, 0.25, 0.2]], 1, False),  # (N, M * C)
        ([[0.1, 0.0, 0.25, 0.9, 0.0, 0.2]], 1, True),  # (N, C * M)
    ],
)
@pytest.mark.parametrize("form", ["scores", "logits", "masked"])
def test_scores_of_another_tensor_say_how_much_boxes_count(
    scores: list[object], places: int | None, classes_first: bool | None, form: str
) -> None:
    """Of three places one shows nothing: 0.9 * 1 + 0.25 * 4 of noise, over powers with the same weights."""
    source = OutputPart("scores", 2 if places is None else -1, tensor="s", places=places, classes_first=classes_first)
    parts = {"b": (OutputPart("boxes", 2, sure=source),)}
    said = np.array(scores)
    if form == "logits":
        with np.errstate(divide="ignore"):
            said = np.log(said / (1 - said))
    elif form == "masked":
        said = np.where(said > 0, said, -1)
    found = sum_errors(parts, ["s", "b"], [said, BOXES], [said, MOVED])[1]
    assert found == pytest.approx([0.9 * 2 + 0.25 * 8, 0.9 * 1 + 0.25 * 4, 0.9 * 5 + 0.25 * 4])
    assert sum_errors(parts, ["b"], [BOXES], [MOVED], {"s": said})[0] == pytest.approx(found)


ALIKE = [2 + 50 + 8, 1 + 41 + 4, 5 + 81 + 4]
"""Signal, noise and signal of the other side, where each place counts as 1."""


@pytest.mark.parametrize(
    "scores", [[[0.9, 0.1]], [[0.1, 0.9, 0.0, 0.0, 0.25, 0.2]], [[[0.1, 0.2]]], [[[[0.1] * 3]]], [0.5]]
)
def test_scores_of_an_unknown_layout_count_for_nothing(scores: list[object]) -> None:
    parts = {"b": (OutputPart("boxes", sure=OutputPart("scores", tensor="s", places=1)),)}
    said = np.array(scores)
    assert sum_errors(parts, ["s", "b"], [said, BOXES], [said, MOVED])[1] == pytest.approx(ALIKE)
    assert sum_errors(parts, ["b"], [BOXES], [MOVED])[0] == pytest.approx(ALIKE)  # nor those that nobody tells


@pytest.mark.parametrize(
    ("scores", "weighed"),
    [
        ([0.9, 0.0, 0.25], True),
        ([[0.9, 0.0, 0.25]], True),
        ([[0.9, 0.0, 0.1], [0.1, 0.0, 0.25]], True),
        ([[[0.9, 0.0, 0.1], [0.1, 0.0, 0.25]]], True),
        ([[[0.9], [0.0], [0.25]], [[0.9], [0.0], [0.25]]], False),  # of two pictures, boxes in one row
    ],
)
def test_boxes_without_an_axis_of_pictures(scores: list[object], weighed: bool) -> None:
    parts = {"b": (OutputPart("boxes", sure=OutputPart("scores", tensor="s", places=0)),)}
    said = np.array(scores)
    found = sum_errors(parts, ["s", "b"], [said, BOXES[0]], [said, MOVED[0]])[1]
    assert found == pytest.approx([0.9 * 2 + 0.25 * 8, 0.9 * 1 + 0.25 * 4, 0.9 * 5 + 0.25 * 4] if weighed else ALIKE)


def test_what_the_last_concat_joins_are_parts() -> None:
    output = ModelOutput("y", True, (1, 5, 7), (1, 3, 32, 32), OutputOrigin(join=Join(1, (4, 1))))
    parts = find_parts(output, np.ones((1, 5, 7), np.float32))
    assert [(part.name, part.axis, part.start, part.stop) for part in parts] == [
        ("0 to 3", 1, 0, 4),
        ("4 to 4", 1, 4, 5),
    ]
    assert find_parts(output, np.ones((1, 6, 7), np.float32)) == ()  # another shape than was inferred


def test_rows_with_hundredfold_powers_are_parts() -> None:
    """Amplitudes 10 and 1 differ by 100 in power; 10 and 2 by 25."""
    output = ModelOutput("y", True, (1, 3, 50), (1, 3, 32, 32))
    rows = np.float32([1, 10, 1])[None, :, None] * np.ones((1, 3, 50), np.float32)
    assert [(part.name, part.rows) for part in find_parts(output, rows)] == [("large", (1,)), ("small", (0, 2))]
    assert find_parts(output, np.maximum(rows, 2)) == ()
    assert find_parts(output, rows[..., :0]) == ()
    assert find_parts(output, np.minimum(rows, np.float32([0, 10, 0])[None, :, None])) == ()  # nothing is no part


def test_classes_are_one_thing() -> None:
    scores = np.float32([[1000.0, 1.0, 1.0]])
    assert find_parts(ModelOutput("y", True, (1, 3), (1, 3, 32, 32), task="classify"), scores) == ()
