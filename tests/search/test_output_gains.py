"""Corrected gains, taken where they help: by a trial of its own, and end to end. Oracle: ONNX Runtime's float run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.errors import Change, Skipped
from qconv.ir.files import Source
from qconv.metrics.output_parts import NO_PARTS
from qconv.pipeline.quantize import quantize
from qconv.reporter import Reporter
from qconv.runtime.session import Session
from qconv.search import output_gains
from qconv.search.candidate import FoldedNetwork
from qconv.search.loudest_images import PickedImages
from qconv.search.output_gains import MOST_IMAGES, STEP, GainTrial
from qconv.search.output_noise import OutputNoise
from tests.quantization.test_gain_correction import BODY, CLIPPED, images, noise, solved
from tests.support.models import network


def trial_of(folded: FoldedNetwork, count: int = 12) -> GainTrial:
    session, apart = Session(folded.model.proto().SerializeToString()), images(200)
    clean = [session.run(["y"], feed) for feed in apart]
    return GainTrial(images(0, count), OutputNoise(["y"], PickedImages(apart, [1.0] * 12, clean, apart=True), NO_PARTS))


def test_a_network_that_loses_much_takes_what_helps() -> None:
    folded, recipe, found = solved(BODY, CLIPPED)
    before = noise(folded, recipe, found)
    trial_of(folded).correct(found, folded, recipe, Reporter())
    told = found.findings[-1]
    assert isinstance(told, Change)
    assert told.step == STEP
    assert "3 layers" in told.where
    assert noise(folded, recipe, found) < 0.6 * before


def test_what_does_not_help_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    folded, recipe, found = solved(BODY, CLIPPED)
    kept = list(found.params.layers)

    def worse(*_: Any) -> tuple[list[Any], int]:
        return [replace(layer, weight=layer.weight.with_scale(2 * layer.weight.scale)) for layer in kept], len(kept)

    monkeypatch.setattr(output_gains, "correct_gains", worse)
    trial_of(folded).correct(found, folded, recipe, Reporter())
    assert isinstance(found.findings[-1], Skipped)
    assert found.params.layers == kept


def test_a_network_that_loses_little_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    folded, recipe, found = solved(BODY, {})

    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(output_gains, "correct_gains", never)
    told = list(found.findings)
    trial_of(folded).correct(found, folded, recipe, Reporter())
    assert found.findings == told


@pytest.mark.parametrize(("count", "expected"), [(5, 5), (16, 16), (40, 16), (64, 16)])
def test_images_are_taken_evenly(count: int, expected: int) -> None:
    folded, _, _ = solved(BODY, {})
    trial = trial_of(folded, count)
    assert len(trial.some_feeds) == expected
    assert trial.some_feeds[0] is trial.feeds[0]
    assert MOST_IMAGES == 16


def picture(number: int) -> NDArray[np.float32]:
    return np.random.default_rng(number).normal(size=(3, 12, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("pictures")
    for number in range(64):
        np.save(folder / f"{number:02}.npy", picture(number))
    return str(folder)


def gated_network() -> bytes:
    """Layers behind SiLU gates, and the mean of each channel: what goes the same way in all places adds up."""
    rng, sizes = np.random.default_rng(5), (3, 16, 16, 16, 16, 4)
    layers, weights = [], {}
    for number, (fed, made) in enumerate(itertools.pairwise(sizes)):
        weights[f"w{number}"] = rng.normal(0, (2 / (9 * fed)) ** 0.5, (made, fed, 3, 3)).astype(np.float32)
        source = "x" if number == 0 else f"m{number - 1}"
        layers.append(f"c{number} = Conv<pads=[1,1,1,1]>({source}, w{number})")
        layers.append(f"s{number} = Sigmoid(c{number}) m{number} = Mul(c{number}, s{number})")
    body = " ".join([*layers[:-1], "y = GlobalAveragePool(c4)"])
    return bytes(network(body, ("N", 3, 12, 12), **weights).SerializeToString())


def sqnr(reference: bytes, got: bytes, numbers: Sequence[int]) -> float:
    feed = {"x": np.stack([picture(number) for number in numbers])}
    a, b = (Session(model).run(["y"], feed)[0] for model in (reference, got))
    return float(10 * np.log10(np.sum(a**2) / np.sum((a - b) ** 2)))


def test_a_run_takes_them_and_says_so(pictures: str) -> None:
    """Weights of 3 bits that are rounded to the nearest: their channels have another spread behind them."""
    float_model, found = gated_network(), {}
    for bias in ("measured", "none"):
        recipe = Recipe(threads=1, weight_bits=3, rounding="nearest", float_budget=0.0, bias_correction=bias)
        report, result = quantize(Source("m", None, float_model), None, recipe, DataOptions((pictures,), samples=64))
        assert result is not None
        told = [finding for finding in report.findings if isinstance(finding, Change) and finding.step == STEP]
        assert len(told) == (bias == "measured")
        assert ("gains" in report.time) == (bias == "measured")
        found[bias] = sqnr(float_model, result, range(500, 532))
    assert found["measured"] > found["none"] + 1
