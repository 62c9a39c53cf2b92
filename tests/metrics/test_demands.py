"""What can be demanded of which network, and what comes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from qconv.config.choices import DROP_MEASURES, EVALUATE_GATES, Drop
from qconv.config.data_options import DataOptions, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.config.tasks import Tasks
from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.ir.original import open_original
from qconv.metrics.demands import DROPS, GATES, check_gates, demanded_measures, require_boxes, require_measures
from qconv.metrics.network_outputs import NetworkOutputs, describe_outputs
from qconv.pipeline.quantize import quantize
from qconv.results.quantize import OutputScore, Verification
from qconv.results.scores import BOXES, FLOAT_MIOU, Metric, Score, value_of
from tests.support import labelled
from tests.support.models import ints, network

LETTERBOX = PreprocessingOptions("unit", resize="letterbox")


def described(proto: onnx.ModelProto, task: str = "auto") -> NetworkOutputs:
    """What the outputs of a network are, by a picture of noise."""
    session = open_original(Source("the test's model", None, proto.SerializeToString()), 1, Tasks(task))
    _, _, shape = session.inputs[0]
    pixels = np.random.default_rng(0).random([side or 1 for side in shape], np.float32)
    return describe_outputs(session, {"x": pixels}, session.run_all({"x": pixels}))


def classifier(classes: int = 5) -> onnx.ModelProto:
    body = "c = Conv(x, w) g = GlobalAveragePool(c) y = Flatten(g)"
    return network(body, ("N", 3, 8, 8), w=(classes, 3, 1, 1))


NETWORKS = {
    "detector": (labelled.detector(), {"boxes", "map"}),
    "segmenter": (labelled.segmenter(), {"agreement", "miou"}),
    "classifier": (classifier(), {"agreement"}),
    "one number": (classifier(1), set()),
    "picture": (network("y = Conv(x, w)", ("N", 3, 8, 8), w=(3, 3, 1, 1)), {"agreement", "miou"}),
}
"""Each with the measures that its outputs have; a task makes classes of the channels of a picture."""


@pytest.mark.parametrize("measure", ["agreement", "boxes", "map", "miou"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_network_does_not_have_cannot_be_demanded(name: str, measure: str) -> None:
    proto, known = NETWORKS[name]
    outputs = described(proto, "segment" if name == "picture" else "auto")
    for asked in (Recipe(**{f"min_{measure}": 0.5}), Recipe(max_drop=Drop(measure, 0.1))):
        if measure in known:
            require_measures(asked, outputs)
            continue
        with pytest.raises(QconvError, match=f"{measure} needs") as told:
            require_measures(asked, outputs)
        assert "--" in told.value.hint


def test_decibels_can_always_be_demanded() -> None:
    for proto, _ in NETWORKS.values():
        require_measures(Recipe(min_sqnr=20, max_drop=Drop("sqnr", 20)), described(proto))


def test_decibels_cannot_be_demanded_of_class_numbers() -> None:
    outputs = described(network("c = Conv(x, w) y = ArgMax<axis=1>(c)", ("N", 3, 8, 8), w=(4, 3, 1, 1)))
    require_measures(Recipe(min_agreement=0.5, min_miou=0.5, max_drop=Drop("miou", 0.1)), outputs)
    for asked in (Recipe(min_sqnr=20), Recipe(max_drop=Drop("sqnr", 20))):
        with pytest.raises(QconvError, match="sqnr needs an output of floats"):
            require_measures(asked, outputs)


DECODER = """
def decode(outputs):
    "As many boxes as the left upper pixel says."
    return [[10 * i, 4, 10 * i + 8, 14, 0.9, i] for i in range(int(outputs["y"].ravel()[0]))]
"""


@pytest.mark.parametrize(("name", "value"), [("min_boxes", 0.5), ("min_map", 0.5), ("max_drop", Drop("boxes", 0.1))])
def test_where_the_float_model_finds_nothing_boxes_cannot_be_demanded(tmp_path: Path, name: str, value: object) -> None:
    """Told before the work, in which the network's lack of layers would be told."""
    (tmp_path / "decoder.py").write_text(DECODER)
    ends = {"starts": ints(0, 0, 0), "ends": ints(1, 1, 1), "axes": ints(1, 2, 3)}
    proto = network("p = Slice(x, starts, ends, axes) y = Mul(p, gain)", ("N", 3, 32, 64), gain=np.float32(1), **ends)
    source = labelled.save(proto, tmp_path / "m.onnx")
    (tmp_path / "imgs").mkdir()
    for index in range(40):
        Image.new("RGB", (64, 32)).save(tmp_path / "imgs" / f"{index:02}.png")
    preprocessing, decode = PreprocessingOptions("raw", resize="exact"), f"{tmp_path / 'decoder.py'}:decode"
    data = DataOptions((str(tmp_path / "imgs"),), preprocessing=preprocessing, decode=decode)
    recipe = Recipe(threads=1, effort="fast", **{name: value})
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(QconvError, match=f"{option}.* needs boxes, and the float model shows none") as told:
        quantize(source, None, recipe, data)
    assert told.value.hint
    for index in range(40):
        Image.new("RGB", (64, 32), (1, 1, 1)).save(tmp_path / "imgs" / f"{index:02}.png")
    with pytest.raises(QconvError, match="nothing to quantize"):
        quantize(source, None, recipe, data)


def test_by_labels_a_model_that_shows_nothing_has_a_precision(tmp_path: Path) -> None:
    """COCO counts boxes far below the score from which on they are shown."""
    unsure = tmp_path / "unsure.py"
    unsure.write_text("def decode(outputs):\n    return [[0, 0, 8, 8, 0.01, 0]]\n")
    proto = network("y = Conv(x, w)", (1, 3, 8, 8), w=(5, 3, 1, 1))
    session = open_original(Source("m", None, proto.SerializeToString()), 1, Tasks(decode=f"{unsure}:decode"))
    feeds = {"x": np.zeros((1, 3, 8, 8), np.float32)}
    said = session.run_all(feeds)
    outputs = describe_outputs(session, feeds, said)
    require_boxes(Recipe(min_map=0.5), outputs, [said], labelled=True)
    for asked, by_labels in ((Recipe(min_map=0.5), False), (Recipe(min_boxes=0.5), True)):
        with pytest.raises(QconvError, match=r"shows none above 0\."):
            require_boxes(asked, outputs, [said], labelled=by_labels)


def test_each_option_has_its_measure() -> None:
    assert set(GATES) == set(EVALUATE_GATES)
    assert set(DROPS) == set(DROP_MEASURES)
    asked = Recipe(min_boxes=0.9, min_miou=0.8, max_drop=Drop("boxes", 0.01))
    assert demanded_measures(asked) == {"--min-boxes": BOXES, "--min-miou": FLOAT_MIOU, "--max-drop boxes": BOXES}


@pytest.mark.parametrize(("option", "metric"), [("min_boxes", BOXES), ("min_miou", FLOAT_MIOU)])
def test_a_gate_holds_from_its_own_value_on(option: str, metric: Metric) -> None:
    """Also where the worst of two heads decides; and one without a number falls short."""
    for got, held in ((0.9, True), (0.89, False), (None, False)):
        found = Verification(1, (), heads=(OutputScore("y", (Score(metric, got),)),))
        assert [gate.held for gate in check_gates(found, Recipe(**{option: 0.9}))] == [held]


@pytest.mark.parametrize(
    ("make", "option", "metric"),
    [(labelled.detector, "min_boxes", BOXES), (labelled.segmenter, "min_miou", FLOAT_MIOU)],
)
def test_quantize_takes_them_of_the_written_file(
    tmp_path: Path, make: type[onnx.ModelProto], option: str, metric: Metric
) -> None:
    """In 16 bits nothing of it is lost, in 2 a lot."""
    source = labelled.save(make(), tmp_path / "m.onnx")
    data = DataOptions((str(labelled.pictures(tmp_path / "imgs")),), preprocessing=LETTERBOX)
    held = {}
    for bits in (16, 2):
        recipe = Recipe(
            threads=1, effort="fast", weight_bits=bits, edge_bits=bits, activation_bits=bits, **{option: 0.99}
        )
        report, _ = quantize(source, None, recipe, data)
        (gate,) = report.gates
        assert gate.name == option.replace("_", "-")
        assert gate.got == report.verify.value_of(metric)
        held[bits] = gate.held
    assert held == {16: True, 2: False}


def test_a_search_keeps_the_drop_of_boxes(tmp_path: Path) -> None:
    """What is chosen keeps it; measured, the next smaller point loses more."""
    source = labelled.save(labelled.detector(), tmp_path / "m.onnx")
    data = DataOptions((str(labelled.pictures(tmp_path / "imgs")),), preprocessing=LETTERBOX)
    drop = Drop("boxes", 0.1)
    recipe = Recipe(threads=1, effort="fast", activation_bits=16, edge_bits=2, max_drop=drop)
    report, _ = quantize(source, None, recipe, data)
    assert report.mixed is not None
    least = value_of(report.mixed.chosen.scores, BOXES)
    assert least is not None
    assert least >= 0.9
    assert report.verify.value_of(BOXES) == least
    for point in report.mixed.points:
        if point.size < report.mixed.chosen.size and point.scores:
            assert (value_of(point.scores, BOXES) or 0) < 0.9
