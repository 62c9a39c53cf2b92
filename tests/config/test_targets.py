"""Files for other runtimes: what each accepts, read off the file; OpenVINO runs them where it is there.

Oracle of the results: ONNX Runtime with its optimizations off, which is what the standard says the file means.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from qconv.config.data_options import DataOptions, Layout, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.pipeline.quantize import quantize
from qconv.quantization.layer import compute_bias_correction
from qconv.results.quantize import Report
from tests.support.libraries import MOVES_CODES, needs
from tests.support.models import ints, network, run

CIFAR = Path(__file__).parents[1] / "models" / "cifar_mobilenet.onnx"
PHOTOS = Path(__file__).parents[2] / "calib_samples"
SAME = "pads=[1,1,1,1]"
RESIDUAL = f"""a = Conv<{SAME}>(x, w)  ar = Relu(a)
               b = Conv<{SAME}>(ar, k)  br = Relu(b)  c = Conv<{SAME}>(br, l)  s = Add(c, ar)  sr = Relu(s)
               d = Conv<{SAME}>(sr, m)  dr = Relu(d)  e = Conv<{SAME}>(dr, n)  p = Conv(sr, o)  t = Add(e, p)
               tr = Relu(t)  g = GlobalAveragePool(tr)  f = Flatten(g)  y = Gemm(f, q)"""
WEIGHTS: dict[str, Any] = {"w": (8, 3, 3, 3), "o": (8, 8, 1, 1), "q": (8, 10)}
WEIGHTS |= dict.fromkeys("klmn", (8, 8, 3, 3))
DENSE = f"""a = Conv<{SAME}>(x, w)  ar = Relu(a)  b = Conv<{SAME}>(ar, k)  br = Relu(b)  j = Concat<axis=1>(ar, br)
            p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(j)  y = Conv(p, z)"""


def residual() -> onnx.ModelProto:
    return network(RESIDUAL, ("N", 3, 8, 8), **WEIGHTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        level = np.random.default_rng(number).integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(level).save(place / f"{number}.png")
    return str(place)


def made(proto: onnx.ModelProto, folder: str, target: str, **options: Any) -> tuple[Report, File]:
    recipe, data = (
        Recipe(target=target, **{"threads": 1, **options}),
        DataOptions((folder,), preprocessing=PreprocessingOptions("unit")),
    )
    report, data = quantize(Source("the model", None, proto.SerializeToString()), None, recipe, data)
    assert data is not None
    return report, File(onnx.load_from_string(data))


class File:
    """A quantized file, and who is connected with whom."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        onnx.checker.check_model(proto, full_check=True)
        self.proto = proto
        self.writers = {name: node for node in proto.graph.node for name in node.output}
        self.constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}

    def node(self, name: str) -> onnx.NodeProto:
        return next(node for node in self.proto.graph.node if node.name == name)

    def all(self, op_type: str) -> list[onnx.NodeProto]:
        return [node for node in self.proto.graph.node if node.op_type == op_type]

    def before(self, node: onnx.NodeProto) -> list[str]:
        """The operator that writes each input; empty for a constant."""
        return [self.writers[name].op_type if name in self.writers else "" for name in node.input]

    def zero_points(self) -> Iterator[NDArray]:
        for node in (*self.all("QuantizeLinear"), *self.all("DequantizeLinear")):
            yield self.constants[node.input[2]]


# -- TensorRT ----------------------------------------------------------------------------------------------------------


def test_tensorrt_has_zero_points_of_zero_and_signed_codes(folder: str) -> None:
    _, file = made(residual(), folder, "tensorrt")
    zeros = list(file.zero_points())
    assert len(zeros) > 10
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)


def test_tensorrt_biases_are_float(folder: str) -> None:
    _, file = made(residual(), folder, "tensorrt")
    for node in (*file.all("Conv"), *file.all("Gemm")):
        assert file.before(node)[:2] == ["DequantizeLinear", "DequantizeLinear"]
        assert all(file.constants[name].dtype == np.float32 for name in node.input[2:])
    assert "int32" not in {array.dtype.name for array in file.constants.values()}


def test_tensorrt_keeps_its_activations(folder: str) -> None:
    """With codes on both sides of zero the quantizer does no ReLU's work."""
    _, file = made(residual(), folder, "tensorrt")
    assert {node.name for node in file.all("Relu")} == {"ar", "br", "sr", "dr", "tr"}


def test_tensorrt_quantizes_the_shortcut_alone(folder: str) -> None:
    """At `s` that is what goes around two layers; at `t`, where both are layers, the one of fewer layers."""
    _, file = made(residual(), folder, "tensorrt")
    assert file.before(file.node("s")) == ["Conv", "DequantizeLinear"]
    assert file.before(file.node("t")) == ["Conv", "DequantizeLinear"]
    assert file.writers[file.node("t").input[0]].name == "e"


def test_tensorrt_quantizes_no_output(folder: str) -> None:
    """Not the last layer's, which is fused with nothing, and every tensor once."""
    _, file = made(residual(), folder, "tensorrt")
    assert file.writers["y"].op_type == "Gemm"
    sources = [node.input[0] for node in file.all("QuantizeLinear")]
    assert len(sources) == len(set(sources))
    assert set(sources) == {"x", "ar", "br", "sr", "dr", "p", "tr", "f"}


def test_tensorrt_joins_tensors_of_one_scale(folder: str) -> None:
    weights = {"w": (4, 3, 3, 3), "k": (4, 4, 3, 3), "z": (5, 8, 1, 1)}
    _, file = made(network(DENSE, ("N", 3, 8, 8), **weights), folder, "tensorrt")
    scales = {node.input[0]: file.constants[node.input[1]] for node in file.all("QuantizeLinear")}
    assert set(scales) == {"x", "ar", "p"}
    assert scales["ar"] != scales["x"]


def test_tensorrt_has_one_scale_for_a_transposed_convolution(folder: str) -> None:
    body = f"c = Conv<{SAME}>(x, w)  r = Relu(c)  y = ConvTranspose<strides=[2,2]>(r, t)"
    _, file = made(network(body, ("N", 3, 8, 8), w=(4, 3, 3, 3), t=(4, 2, 2, 2)), folder, "tensorrt")
    (node,) = file.all("ConvTranspose")
    weight = file.writers[node.input[1]]
    assert file.constants[weight.input[1]].ndim == 0


@pytest.mark.parametrize("target", ["openvino", "generic", "tensorrt"])
@pytest.mark.parametrize("body", ["ConvTranspose<strides=[2,2]>", "ConvTranspose<strides=[2,2], group=2>"])
def test_transposed_convolutions_are_quantized(body: str, target: str, folder: str) -> None:
    """ONNX Runtime's CPU provider has no kernel for them; the others have."""
    outputs = 2 if "group" in body else 4
    proto = network(
        f"c = Conv<{SAME}>(x, w)  r = Relu(c)  y = {body}(r, t)",
        ("N", 3, 8, 8),
        w=(4, 3, 3, 3),
        t=(4, outputs, 3, 3),
    )
    report, file = made(proto, folder, target)
    (node,) = file.all("ConvTranspose")
    assert file.before(node)[:2] == ["DequantizeLinear", "DequantizeLinear"]
    assert report.verify.sqnr_db is not None
    assert report.verify.sqnr_db > 30


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"activation_scheme": "asymmetric"}, "--activation-scheme asymmetric with --target tensorrt"),
        ({"weight_scheme": "asymmetric"}, "--weight-scheme asymmetric with --target tensorrt"),
        ({"activation_bits": 6}, "--activation-bits 6"),
        ({"weight_bits": 16}, "--weight-bits 16"),
        ({"edge_bits": 16}, "--edge-bits 16"),
        ({"weight_granularity": "per-block"}, "--weight-granularity per-block"),
        ({"weight_bits": 4, "pack": True}, "--pack with"),
        ({"embed_preprocessing": Layout.NCHW}, "--embed-preprocessing nchw"),
        ({"saturation_safe": True}, "--saturation-safe with"),
        ({"tune_latency": True}, "--tune-latency with"),
    ],
)
def test_what_tensorrt_would_reject_is_refused_first(options: dict[str, Any], fact: str) -> None:
    with pytest.raises(QconvError, match=fact):
        Recipe(target="tensorrt", **options)


@pytest.mark.parametrize(("groups", "stride"), [(1, 2), (2, 2), (1, 1), (2, 3)])
def test_the_mean_of_a_transposed_convolution(groups: int, stride: int) -> None:
    """ONNX Runtime on one number a channel: inside, the outputs' mean is what the bias is to take back."""
    rng = np.random.default_rng(groups + stride)
    error = rng.standard_normal((4, 3, 4, 4)).astype(np.float32)
    mean = rng.standard_normal(4)
    proto = network(f"y = ConvTranspose<strides=[{stride},{stride}], group={groups}>(x, t)", (1, 4, 12, 12), t=error)
    x = np.broadcast_to(mean.astype(np.float32).reshape(1, 4, 1, 1), (1, 4, 12, 12))
    (y,) = run(proto, {"x": np.ascontiguousarray(x)}).values()
    inside = y[0, :, 6 : 6 + 4 * stride, 6 : 6 + 4 * stride].mean(axis=(1, 2))
    found = compute_bias_correction(error, mean, groups=groups, output_axis=1) / stride**2
    np.testing.assert_allclose(found, inside, rtol=1e-4, atol=1e-5)


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_stays_near_the_float_network(target: str, folder: str) -> None:
    report, file = made(residual(), folder, target)
    assert report.recipe["target"] == target
    assert report.verify.sqnr_db is not None
    assert report.verify.sqnr_db > 20
    assert (report.verify.slowdown is None) is not TARGETS[target].on_ort
    assert file.proto.graph.output[0].name == "y"


@pytest.mark.parametrize("target", ["openvino", "generic"])
def test_pixels_go_in_where_the_target_takes_them(target: str, folder: str) -> None:
    _, file = made(residual(), folder, target, embed_preprocessing=Layout.NCHW)
    assert file.proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_generic_is_plain(folder: str) -> None:
    """Q and DQ around every operator, int32 biases, activations still there: and no trick of one runtime's."""
    _, file = made(residual(), folder, "generic")
    assert {node.name for node in file.all("Relu")} == {"ar", "br", "sr", "dr", "tr"}
    assert file.before(file.node("s")) == ["DequantizeLinear", "DequantizeLinear"]
    assert not file.all("Cast")
    for node in file.all("Conv"):
        assert all(kind == "DequantizeLinear" for kind in file.before(node))


@needs("onnxruntime", "1.22", MOVES_CODES)
def test_generic_runs_in_integers_all_the_same(folder: str) -> None:
    report, _ = made(residual(), folder, "generic")
    assert report.audit.float == 0


def test_weights_alone_for_openvino_stay_behind_a_dequantizer(folder: str) -> None:
    _, file = made(residual(), folder, "openvino", activation_bits=32)
    assert [file.before(node)[1] for node in file.all("Conv")] == ["DequantizeLinear"] * 6
    assert not file.all("Cast")


# -- OpenVINO ----------------------------------------------------------------------------------------------------------


def by_openvino(proto: onnx.ModelProto, x: NDArray) -> tuple[NDArray, list[str]]:
    """The first output, and the precision of every convolution as it ran."""
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed (extra `bench`)")
    core = openvino.Core()
    model = core.read_model(model=proto.SerializeToString())
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = next(iter(compiled(x).values()))
    ran = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    kinds = [info["runtimePrecision"].astype(str) for info in ran if info["layerType"].astype(str) == "Convolution"]
    return result, kinds


def photos() -> NDArray[np.float32]:
    """(N, 3, 32, 32), as `imagenet` has it."""
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    pictures = (Image.open(path).convert("RGB").resize((32, 32)) for path in sorted(PHOTOS.glob("*.jpg")))
    return np.stack([((np.asarray(p) / np.float32(255) - mean) / std).transpose(2, 0, 1) for p in pictures])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("target", ["openvino", "generic"])
def test_openvino_runs_the_file_in_integers_and_agrees(target: str) -> None:
    """As near to what the file means as ONNX Runtime's own integer kernels are, give or take."""
    recipe, data = (
        Recipe(target=target),
        DataOptions((str(PHOTOS),), preprocessing=PreprocessingOptions("imagenet", resize="exact")),
    )
    _, data = quantize(CIFAR, None, recipe, data)
    assert data is not None
    proto, x = onnx.load_from_string(data), photos()
    got, kinds = by_openvino(proto, x)
    assert kinds == ["u8"] * len(kinds)
    assert len(kinds) == 22
    (want,) = run(proto, {"input": x}).values()
    assert 10 * np.log10(np.sum(want**2) / np.sum((got - want) ** 2)) > 32
    second, first = np.sort(want, axis=1)[:, -2:].T
    clear = first - second > 0.15  # the rest is a toss-up
    assert clear.mean() > 0.8
    assert np.all(got[clear].argmax(1) == want[clear].argmax(1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openvino_differs_by_few_codes(folder: str) -> None:
    """Two layers and a join behind them: each may round another way once."""
    body = f"c = Conv<{SAME}>(x, w)  r = Relu(c)  d = Conv<{SAME}>(r, k)  s = Add(d, r)  y = Reshape(s, t)"
    weights = {"w": (8, 3, 3, 3), "k": (8, 8, 3, 3), "t": ints(-1, 512)}
    _, file = made(network(body, ("N", 3, 8, 8), **weights), folder, "generic")
    x = np.random.default_rng(0).random((4, 3, 8, 8)).astype(np.float32)
    got, _ = by_openvino(file.proto, x)
    (want,) = run(file.proto, {"x": x}).values()
    step = file.constants[file.all("QuantizeLinear")[-1].input[1]]
    assert np.abs(got - want).max() <= 3.01 * step
