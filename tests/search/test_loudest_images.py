"""Which images a search measures on: by hand, and against ONNX Runtime's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qconv.config.data_options import DataOptions
from qconv.data.loader import DataLoader
from qconv.decoding.head import OutputPart
from qconv.metrics.output_parts import NO_PARTS, Parts
from qconv.reporter import Reporter
from qconv.runtime.session import Session
from qconv.search.loudest_images import HeardOutputs, PickedImages, pick_batches, pick_images
from tests.support.models import loaded, network

ONE = np.ones((1, 1, 1, 1), np.float32)


def test_those_that_are_picked_stand_for_all() -> None:
    picked = pick_batches(7, [4, 1, 4], 2)
    assert list(picked) == [4, 1, 0, 3]  # 0 and 3 of 0, 2, 3, 5, 6
    assert picked[1] == picked[4] == 1
    assert sum(picked.values()) == 7
    assert pick_batches(2, [0, 1], 4) == {0: 1.0, 1: 1.0}
    assert sum(pick_batches(9, [], 3).values()) == 9


def loudness(parts: Parts, outputs: Sequence[Sequence[NDArray]]) -> NDArray:
    heard = HeardOutputs(["y"], parts)
    for found in outputs:
        heard.hear(found, 1)
    return heard.loudness


def test_an_image_is_loud_where_any_part_of_its_outputs_is() -> None:
    """Boxes of 100 in all three images; the second has all the scores."""
    parts = {"y": (OutputPart("boxes", 1, 0, 1), OutputPart("scores", 1, 1))}
    outputs = [[np.float32([[100, score]])] for score in (0, 0.5, 0)]
    assert loudness(parts, outputs) == pytest.approx([1 / 3, 1, 1 / 3])
    whole = loudness(NO_PARTS, outputs)
    assert whole[1] == pytest.approx(10000.25 / 30000.25)
    assert loudness(NO_PARTS, [[np.zeros((1, 2), np.float32)]]) == [0]


def picked(
    folder: Path, levels: Sequence[float], counts: tuple[int, int, int], side: int = 8, parts: Parts = NO_PARTS
) -> tuple[PickedImages, PickedImages]:
    """Of pictures of one level each; the network doubles them."""
    for index, level in enumerate(levels):
        np.save(folder / f"{index:02}.npy", np.full((1, side, side), level, np.float32))
    model = loaded(network("a = Conv(x, w) y = Relu(a)", ("N", 1, side, side), w=2 * ONE))
    session = Session(model.proto().SerializeToString())
    feed = DataLoader.of(session, DataOptions((str(folder),)), Reporter())
    return pick_images(model, feed, counts, 1, HeardOutputs(["a"], parts))


def levels_of(images: PickedImages) -> list[float]:
    return [round(float(batch["x"].max()), 4) for batch in images.feeds]


def test_the_loudest_image_comes_first_with_what_float_says(tmp_path: Path) -> None:
    found, apart = picked(tmp_path, (0.1, 0.2, 0.9, 0.3, 0.4), (1, 2, 0), 80)
    levels = levels_of(found)
    assert levels[0] == pytest.approx(0.9)
    assert len(levels) == 3
    assert apart is found  # hardly any are left
    assert not found.apart
    assert not found.few_numbers  # 6400 of an image
    assert found.weights == [1, 2, 2]
    for level, clean in zip(levels, found.clean, strict=True):
        assert clean[0] == pytest.approx(np.full((1, 1, 80, 80), 2 * level))


def test_the_next_loudest_are_set_apart_and_others_evenly_by_their_loudness(tmp_path: Path) -> None:
    """By hand: of 14 the two loudest and two others are picked; the loudest that is left, and four others are apart.

    The three loudest are stood for by two that are picked, and by one apart; the other eleven by four.
    """
    levels = [0.2 + 0.03 * n for n in range(14)]
    found, apart = picked(tmp_path, levels, (2, 2, 5), 80)
    left = sorted(set(np.round(levels, 4)) - set(levels_of(found)), reverse=True)
    assert len(left) == 10
    assert levels_of(found)[:2] == pytest.approx([0.59, 0.56])
    assert list(found.weights) == [1, 1, 6, 6]
    assert levels_of(apart) == pytest.approx([left[0], *left[1:9:2]])
    assert apart.apart
    assert list(apart.weights) == [3, *[11 / 4] * 4]
    assert apart.clean[1][0] == pytest.approx(np.full((1, 1, 80, 80), 2 * left[1]))


def test_every_third_of_the_loudest_is_set_apart_where_outputs_have_parts(tmp_path: Path) -> None:
    """By hand: the third loudest of three that make nearly all of the power is apart, and stands for them."""
    levels = [0.9, 0.8, 0.7] + [0.01 * n for n in range(20)]
    found, apart = picked(tmp_path, levels, (2, 2, 6), 80, {"a": (OutputPart("boxes", 1),)})
    assert levels_of(found)[:2] == pytest.approx([0.9, 0.8])
    assert list(found.weights) == [1.5, 1.5, 10, 10]
    assert levels_of(apart)[0] == pytest.approx(0.7)
    assert list(apart.weights) == [3, *[4] * 5]
    power = [float(np.dot(side.weights, np.square(levels_of(side)))) for side in (found, apart)]
    assert power == pytest.approx([float(np.square(levels).sum())] * 2, rel=0.35)


def test_where_outputs_are_few_numbers_all_others_are_set_apart_too(tmp_path: Path) -> None:
    levels = [0.05 * (1 + n) for n in range(12)]
    found, apart = picked(tmp_path, levels, (2, 3, 3))
    assert found.few_numbers
    assert sorted(levels_of(found) + levels_of(apart)) == pytest.approx(levels)
    assert len(found.feeds) == 5
    assert sum(found.weights) == pytest.approx(12)
    assert sum(apart.weights) == pytest.approx(12)
