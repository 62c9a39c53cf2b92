"""Gates scaled where they are loud. Oracle: ONNX Runtime on the float network as it was, on other images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.errors import Change, QconvError, Skipped
from qconv.ir.files import Source
from qconv.ir.metadata import read_equalization
from qconv.pipeline.quantize import quantize
from qconv.results.quantize import Report
from qconv.runtime.session import Session
from tests.support.models import network

RECIPE = Recipe(threads=1, equalize=False, tune_ranges=True, float_budget=0.0)
UNSEEN = 99


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=(3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(48):
        np.save(folder / f"{number:02}.npy", picture(number))
    return folder


def gated(octaves: int) -> onnx.ModelProto:
    """A SiLU whose channels reach from 1 to 2^octaves, and count alike at the output."""
    rng = np.random.default_rng(7)
    reach = np.float32(2.0) ** np.linspace(0, octaves, 8, dtype=np.float32)
    w = rng.normal(size=(8, 3, 3, 3)).astype(np.float32) * reach[:, None, None, None]
    v = rng.normal(size=(4, 8, 1, 1)).astype(np.float32) / reach[None, :, None, None]
    body = "c = Conv<pads=[1,1,1,1]>(x, w) g = Sigmoid(c) m = Mul(c, g) y = Conv(m, v)"
    return network(body, ("N", 3, 16, 16), w=w, v=v)


def made(proto: onnx.ModelProto, pictures: Path, recipe: Recipe) -> tuple[Report, bytes]:
    report, result = quantize(
        Source("m", None, proto.SerializeToString()), None, recipe, DataOptions((str(pictures),), samples=48)
    )
    assert result is not None
    return report, result


def run(model: bytes, *names: str) -> list[np.ndarray]:
    """What tensors of a model are on images that nothing was chosen on."""
    proto = onnx.ModelProto.FromString(model)
    known = {value.name for value in proto.graph.output}
    proto.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names if name not in known
    )
    feeds = {"x": np.stack([picture(UNSEEN + number) for number in range(4)])}
    return [np.asarray(found) for found in Session(proto.SerializeToString()).run(list(names), feeds)]


def sqnr(reference: np.ndarray, got: np.ndarray) -> float:
    return float(10 * np.log10(np.sum(reference**2) / np.sum((reference - got) ** 2)))


def count_layers(result: bytes) -> int:
    return sum(node.op_type == "Conv" for node in onnx.ModelProto.FromString(result).graph.node)


@pytest.mark.parametrize("target", ["ort-cpu", "openvino", "generic"])
def test_a_gate_of_unlike_channels_gains(pictures: Path, target: str) -> None:
    """7 octaves leave the smallest channel 1 bit of 8; scaled, all have the bits that their weights leave them."""
    proto = gated(7)
    (reference,) = run(proto.SerializeToString(), "y")
    recipe = replace(RECIPE, target=target)
    (_, before), (report, after) = (made(proto, pictures, replace(recipe, scale_gates=own)) for own in (False, True))
    assert sqnr(reference, *run(after, "y")) > sqnr(reference, *run(before, "y")) + 3
    assert (count_layers(before), count_layers(after)) == (2, 3)
    assert [one.step for one in report.findings if isinstance(one, Change)].count("gates") == 1
    assert report.audit.float == 0 or target != "ort-cpu"


def test_the_file_tells_by_what_channels_were_divided(pictures: Path) -> None:
    """Tensors of the file, taken back, are those of the float network; as they are, they are far from that."""
    proto = gated(7)
    _, result = made(proto, pictures, replace(RECIPE, scale_gates=True))
    told = read_equalization({entry.key: entry.value for entry in onnx.ModelProto.FromString(result).metadata_props})
    for name in ("c", "m"):
        (reference,), (got,) = run(proto.SerializeToString(), name), run(result, name)
        assert sqnr(reference, told.back(name, got)) > 25
        assert sqnr(reference, got) < 10


def test_alike_channels_stay_as_they_are(pictures: Path) -> None:
    proto = gated(0)
    report, result = made(proto, pictures, replace(RECIPE, scale_gates=True))
    assert count_layers(result) == 2
    assert [type(one) for one in report.findings if one.step == "gates"] == [Skipped]  # asked for: said


def test_a_gate_that_is_not_loud_stays_as_it_is(pictures: Path) -> None:
    """Its branch is a thousandth of what the other adds to the output."""
    proto = gated(7)
    graph = proto.graph
    graph.node[-1].output[0] = "s"
    rng = np.random.default_rng(3)
    graph.initializer.append(
        onnx.numpy_helper.from_array(np.float32(300) * rng.normal(size=(4, 3, 1, 1)).astype("f"), "u")
    )
    graph.node.append(onnx.helper.make_node("Conv", ["x", "u"], ["o"], name="o"))
    graph.node.append(onnx.helper.make_node("Add", ["s", "o"], ["y"], name="y"))
    _, result = made(proto, pictures, replace(RECIPE, scale_gates=True))
    assert count_layers(result) == 3


@pytest.mark.parametrize(
    "options", [{"tune_ranges": False}, {"effort": "fast"}, {"activation_bits": 16}, {"calibrator": "minmax"}]
)
def test_where_it_would_do_nothing_it_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(QconvError, match="--scale-gates"):
        Recipe(scale_gates=True, **options)  # type: ignore[arg-type]
