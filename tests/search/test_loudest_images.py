"""Which images a search measures on: by hand, and against ONNX Runtime's outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qconv.config.data_options import DataOptions
from qconv.data.loader import DataLoader
from qconv.decoding.head import OutputPart
from qconv.metrics.output_parts import NO_PARTS
from qconv.reporter import Reporter
from qconv.runtime.session import Session
from qconv.search.loudest_images import measure_loudness, pick_batches, pick_images
from tests.support.models import loaded, network

ONE = np.ones((1, 1, 1, 1), np.float32)


def test_those_that_are_picked_stand_for_all() -> None:
    picked = pick_batches(7, [4, 1, 4], 2)
    assert list(picked) == [4, 1, 0, 3]  # 0 and 3 of 0, 2, 3, 5, 6
    assert picked[1] == picked[4] == 1
    assert sum(picked.values()) == 7
    assert pick_batches(2, [0, 1], 4) == {0: 1.0, 1: 1.0}
    assert sum(pick_batches(9, [], 3).values()) == 9


def test_an_image_is_loud_where_any_part_of_its_outputs_is() -> None:
    """Boxes of 100 in all three images; the second has all the scores."""
    parts = {"y": (OutputPart("boxes", 1, 0, 1), OutputPart("scores", 1, 1))}
    outputs = [[np.float32([[100, score]])] for score in (0, 0.5, 0)]
    assert measure_loudness(parts, ["y"], outputs) == pytest.approx([1 / 3, 1, 1 / 3])
    whole = measure_loudness(NO_PARTS, ["y"], outputs)
    assert whole[1] == pytest.approx(10000.25 / 30000.25)
    assert measure_loudness(NO_PARTS, ["y"], [[np.zeros((1, 2), np.float32)]]) == [0]


def test_the_loudest_image_comes_first_with_what_float_says(tmp_path: Path) -> None:
    xs = [np.full((1, 8, 8), level, np.float32) for level in (0.1, 0.2, 0.9, 0.3, 0.4)]
    for index, x in enumerate(xs):
        np.save(tmp_path / f"{index}.npy", x)
    model = loaded(network("a = Conv(x, w) y = Relu(a)", ("N", 1, 8, 8), w=2 * ONE))
    session = Session(model.proto().SerializeToString())
    feed = DataLoader.of(session, DataOptions((str(tmp_path),)), Reporter())
    found = pick_images(model, ["a"], feed, (1, 2), 1, NO_PARTS)
    levels = [float(batch["x"].max()) for batch in found.feeds]
    assert levels[0] == pytest.approx(0.9)
    assert len(levels) == 3
    assert found.weights == [1, 2, 2]
    for level, clean in zip(levels, found.clean, strict=True):
        assert clean[0] == pytest.approx(np.full((1, 1, 8, 8), 2 * level))
