"""NanoDet and PicoDet in other forms, and what is none."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.decoding.head import NetworkFacts
from qconv.decoding.nanodet import expect_bins, match
from tests.support.decoder_references import DecoderReference


def test_a_sure_bin_is_the_distance() -> None:
    """Logits of 50 at bins 0, 3, 7 and 1 of eight; even logits mean the middle, 3.5."""
    logits = np.zeros((2, 4, 8))
    logits[0, range(4), [0, 3, 7, 1]] = 50
    assert expect_bins(logits.reshape(2, 32)) == pytest.approx(np.array([[0, 3, 7, 1], [3.5] * 4]))


def test_nanodet_plus_measures_from_the_top_left_of_a_cell() -> None:
    """As get_single_level_center_priors of nanodet_plus_head.py makes them: column and row times the stride.

    The fifth cell of the grid of 4x4 for stride 16 of 64x64 is (0, 1); one bin of 16 pixels in each direction.
    """
    rows = np.full((1, 64 + 16 + 4 + 1, 2 + 32), -1.0)
    rows[..., :2] = 0.01
    rows[0, 64 + 4, :2] = [0.02, 0.9]
    rows[0, 64 + 4, 2:].reshape(4, 8)[:, 1] = 50
    head = match(NetworkFacts({"output": rows}, (64, 64)))
    assert head is not None
    assert head.family == "NanoDet-Plus"
    (found,) = head.read({"output": rows}, 0.5)
    assert found.boxes == pytest.approx(np.array([[0, 0, 16, 32]]))  # the left edge is cut off at 0
    assert found.classes.tolist() == [1]


def test_outputs_of_strides_may_stand_in_any_order() -> None:
    made = DecoderReference.load("picodet")
    names = list(made.outputs)
    mixed = {name: made.outputs[name] for name in (*names[4:], *names[:4])}
    head = match(NetworkFacts(mixed, made.size))
    assert head is not None
    assert head.outputs == tuple(names)


def test_names_of_classes_are_read() -> None:
    made = DecoderReference.load("picodet")
    metadata = {"character": "\n".join("abcdefghij")}
    head = match(NetworkFacts(made.outputs, made.size, metadata))
    assert head is not None
    assert head.names[1] == "b"


def test_other_rows_are_none() -> None:
    made = DecoderReference.load("nanodet").outputs["output"]
    assert match(NetworkFacts({"output": made}, (320, 320))) is None
    assert match(NetworkFacts({"output": made[..., 80:]}, (256, 320))) is None  # no classes
    assert match(NetworkFacts({"output": np.abs(made) / 100}, (256, 320))) is None  # no logits
