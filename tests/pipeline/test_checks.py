"""What the summary warns of: tensors that pictures make odd, and names of nodes that have none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qconv import Recipe
from qconv.auditing.audit import PlannedReasons, audit
from qconv.config.data_options import DataOptions
from qconv.config.targets import TARGETS
from qconv.pipeline.checks import advise, find_tensors_of_pictures, warn_of_all_float, warn_of_result
from qconv.pipeline.quantize import quantize
from qconv.reporter import Reporter
from qconv.results.quantize import Audit, FloatNode, OutputScore, Verification
from qconv.results.scores import (
    BOXES,
    FLOAT_MIOU,
    KEYPOINT_DISTANCE,
    NEAREST,
    PCK,
    PICTURE_COSINE,
    SQNR,
    Metric,
    Score,
)
from qconv.runtime.session import Session
from tests.support.models import ints, loaded, network

STATE = """s = Shape(x) n = Slice(s, start, end, first) k = Concat<axis=0>(n, rest) z = ConstantOfShape(k)
           c = Conv<pads=[1,1,1,1]>(x, w) a = Add(c, z) h = Conv<pads=[1,1,1,1]>(z, v) b = Add(a, h) y = Conv(b, v)"""
CONSTANTS = {"start": ints(0), "end": ints(1), "first": ints(0), "rest": ints(4, 6, 6)}


def recurrent() -> onnx.ModelProto:
    """The zero state is made of the batch, as exporters of LSTMs write it."""
    return network(STATE, ("N", 3, 6, 6), w=(4, 3, 3, 3), v=(4, 4, 3, 3), **CONSTANTS)


def test_what_depends_on_the_shape_alone_is_not_of_pictures() -> None:
    found = find_tensors_of_pictures(loaded(recurrent()))
    assert {"x", "c", "a", "b", "y"} <= found
    assert not found & {"s", "n", "k", "z", "h"}


@pytest.mark.parametrize("dead", [False, True])
def test_a_zero_state_is_not_blamed_on_the_pictures(tmp_path: Path, dead: bool) -> None:
    """What pictures leave at zero is."""
    rng = np.random.default_rng(0)
    for index in range(4):
        sample = rng.normal(size=(3, 6, 6)).astype(np.float32)
        np.save(tmp_path / f"{index}.npy", sample * np.float32(not dead))
    source = tmp_path / "net.onnx"
    source.write_bytes(recurrent().SerializeToString())
    report, _ = quantize(source, None, Recipe(threads=1, equalize=False), DataOptions((str(tmp_path),), glob="*.npy"))
    warned = [text for text in report.warnings if "is zero everywhere" in text]
    assert bool(warned) == dead
    assert not any("'z'" in text for text in warned)


def test_nodes_without_names_are_called_by_operator_and_output(tmp_path: Path) -> None:
    model = loaded(network("r = Relu(x) t = Tanh(r) y = Conv(t, w)", (1, 3, 6, 6), w=(4, 3, 3, 3)))
    for node in model.nodes():
        node.name = ""
    optimized = tmp_path / "optimized.onnx"
    Session(model.proto().SerializeToString(), threads=1, optimize=False, save_optimized=optimized)
    found = audit(optimized, model, PlannedReasons())
    assert [island.node for island in found.islands] == ["Relu of r", "Tanh of t", "Conv of y"]


@pytest.mark.parametrize(
    ("metric", "kept", "lost"),
    [(BOXES, 0.96, 0.94), (FLOAT_MIOU, 0.96, 0.94), (PCK, 0.96, 0.94), (NEAREST, 0.96, 0.94)]
    + [(PICTURE_COSINE, 0.96, 0.94), (KEYPOINT_DISTANCE, 0.04, 0.06)],
    ids=lambda found: getattr(found, "name", None),
)
def test_five_points_of_what_a_task_is_judged_by_are_worth_a_warning(metric: Metric, kept: float, lost: float) -> None:
    """However good the decibels are."""
    for value, warned in ((kept, False), (lost, True)):
        heard = Reporter()
        checked = Verification(8, (OutputScore("y", (Score(SQNR, 40.0), Score(metric, value))),))
        warn_of_result(checked, (2, 1), advise("balanced"), heard)
        assert len(heard.warnings) == warned
        assert all(metric.label in text and "`qconv diagnose`" in text for text in heard.warnings)


def test_a_result_without_integers_is_worth_a_warning_where_accuracy_made_it_so() -> None:
    faster = FloatNode("stem", "Conv", "faster in float: 5 us against 9 by the cost table", rule="placed")
    precise = FloatNode("head", "Conv", "accuracy: 6.2 dB for 4% of the time", rule="placed")
    both, here = (faster, precise), TARGETS["ort-cpu"]
    cases = ((0, both, here, 1), (1, both, here, 0), (0, (faster,), here, 0), (0, both, TARGETS["tensorrt"], 0))
    for integer, placed, target, warned in cases:  # ONNX Runtime runs files for other targets in float anyway
        heard = Reporter()
        warn_of_all_float(Audit(integer, len(placed), (), placed), target, heard)
        assert len(heard.warnings) == warned
        assert all("--float-budget 0" in text for text in heard.warnings)
