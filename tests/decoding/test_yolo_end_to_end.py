from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qconv.decoding import yolo_end_to_end
from qconv.decoding.head import NetworkFacts
from tests.support.decoder_references import DecoderReference


def rows_of(*, unsorted: bool = False, halves: bool = False, shares: bool = False) -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = np.zeros((1, 300, 6), np.float32)
    rows[..., :4] = rng.uniform(0, 1 if shares else 320, (1, 300, 4))
    rows[..., 4] = np.sort(rng.random(300))[:: 1 if unsorted else -1]
    rows[..., 5] = rng.integers(0, 80, 300) + (0.5 if halves else 0)
    return rows


def test_falling_scores_and_whole_numbers_tell() -> None:
    assert yolo_end_to_end.match(NetworkFacts({"a": rows_of()}, (320, 320))) is not None


@pytest.mark.parametrize("odd", ["unsorted", "halves", "shares"])
def test_others_are_not_known(odd: str) -> None:
    assert yolo_end_to_end.match(NetworkFacts({"a": rows_of(**{odd: True})}, (320, 320))) is None


def test_too_many_rows_and_rows_of_zeros_are_not_known_without_the_file() -> None:
    many = np.tile(rows_of()[:, :1], (1, 1001, 1))
    assert yolo_end_to_end.match(NetworkFacts({"a": many}, (320, 320))) is None
    assert yolo_end_to_end.match(NetworkFacts({"a": np.zeros((1, 300, 6), np.float32)}, (320, 320))) is None


def test_an_output_with_suppression_inside_is_known_by_its_file_even_if_nothing_was_found() -> None:
    """Ultralytics' exporter with nms=True: rows of zeros behind the last box, and end2end False."""
    metadata = {"task": "detect", "names": "{0: 'a', 1: 'b'}", "end2end": "False", "args": "{'nms': True}"}
    rows = np.zeros((1, 300, 6), np.float32)
    head = yolo_end_to_end.match(NetworkFacts({"output0": rows}, (320, 320), metadata))
    assert head is not None
    assert len(head.read({"output0": rows}, 0.001)[0]) == 0


def test_boxes_are_taken_as_they_stand() -> None:
    rows = rows_of()
    head = yolo_end_to_end.match(NetworkFacts({"a": rows}, (320, 320)))
    assert head is not None
    (found,) = head.read({"a": rows}, 0.5)
    above = rows[0, rows[0, :, 4] > 0.5]
    assert np.array_equal(found.boxes, above[:, :4])
    assert found.classes.tolist() == above[:, 5].tolist()


def test_scores_of_a_quantized_file_are_sorted_again() -> None:
    rows = rows_of()
    head = yolo_end_to_end.match(NetworkFacts({"a": rows}, (320, 320)))
    assert head is not None
    (found,) = head.read({"a": rows[:, ::-1]}, 0.5)
    assert (np.diff(found.scores) <= 0).all()


@pytest.mark.parametrize("name", ["yolo26n-seg", "yolo26n-pose", "yolo26n-obb"])
def test_a_file_that_says_another_task_is_not_read(name: str) -> None:
    reference = DecoderReference.load(name)
    other = "pose" if name != "yolo26n-pose" else "segment"
    metadata = reference.metadata | {"task": other, "kpt_shape": "[1, 2]"}
    assert yolo_end_to_end.match(replace(reference, metadata=metadata).facts) is None
