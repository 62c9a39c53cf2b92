"""Each decoder finds what its family's own program finds, in every file of references."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.decoding.boxes import Detections
from qconv.decoding.registry import find_head
from tests.support.decoder_references import NAMES, DecoderReference, differences

TOLD_BY_FILE_ALONE = {"yolo11n-pose2"}
"""Four keypoints of two numbers: nothing but the file says so."""

MOST_PIXELS = {"ssd_object_detection": 0.02}
"""By which boxes may differ where that is more than 0.001: its configurations say 0.3333 where qconv says a third."""

EVERY = pytest.mark.parametrize("name", NAMES)


def test_there_are_references() -> None:
    assert len(NAMES) >= 37


@EVERY
def test_what_is_found_is_what_the_program_of_the_family_finds(name: str) -> None:
    reference = DecoderReference.load(name)
    assert reference.head.size == reference.size
    assert sum(len(found["scores"]) for found in reference.published) >= 3
    apart = differences(reference)
    assert apart.pop("scores") < 1e-5
    assert apart.pop("masks", 0.0) == 0
    assert all(pixels < MOST_PIXELS.get(name, 1e-3) for pixels in apart.values()), apart


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TOLD_BY_FILE_ALONE])
def test_shapes_and_numbers_tell_where_the_file_does_not(name: str) -> None:
    reference = DecoderReference.load(name)
    head, without = reference.head, find_head(reference.without_metadata().facts)
    assert without is not None
    assert (without.family, without.outputs, without.parts) == (head.family, head.outputs, head.parts)
    assert without.names == {}


@EVERY
def test_parts_cover_all_rows_of_an_output_once(name: str) -> None:
    reference = DecoderReference.load(name)
    for output, parts in reference.head.parts.items():
        seen = np.zeros(reference.outputs[output].shape, int)
        for part in parts:
            for rows in (part, part.times):
                if rows is not None:
                    rows.of(seen)[...] += 1
        assert (seen == 1).all(), [part.name for part in parts]


def read_filled(name: str, value: float) -> list[Detections]:
    """What is found where all numbers of all outputs are this one."""
    reference = DecoderReference.load(name)
    filled = {output: np.full_like(array, value) for output, array in reference.outputs.items()}
    found = reference.head.read(filled, 0.001)
    assert len(found) == len(reference.published)
    return found


@EVERY
def test_nothing_is_found_in_outputs_that_are_no_numbers(name: str) -> None:
    assert [len(found) for found in read_filled(name, np.nan)] == [0] * len(DecoderReference.load(name).published)


@EVERY
@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e30, 0.0])
def test_a_head_reads_any_numbers(name: str, value: float) -> None:
    """A quantized file that is broken gives what it gives; boxes that are none are left out."""
    for found in read_filled(name, value):
        assert np.isfinite(found.boxes).all()
        assert not np.isnan(found.scores).any()
