"""Whole networks in PyTorch, float and quantized, against ONNX Runtime; what a run needs; how quantizers learn."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from qconv.config.data_options import DataOptions
from tests.support.models import loaded, network, run

torch = pytest.importorskip("torch", reason="needs the extra: pip install 'qconv[torch]'")

from qconv.config.choices import NAMED_RECIPES, Scheme, WeightGranularity
from qconv.config.data_options import PRESETS, Layout, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.errors import QconvError
from qconv.ir.files import Source, read_proto
from qconv.ir.load import load
from qconv.pipeline.quantize import quantize
from qconv.runtime.session import Session
from qconv.training.network import TorchNetwork
from tests.support.torched import as_it_is, outputs

ROOT = Path(__file__).parents[2]
CIFAR = Path(__file__).parents[1] / "models" / "cifar_mobilenet.onnx"
DATA = Path(os.environ.get("QCONV_DATA") or ROOT.parent / "shared" / "data")
PICTURES = 4
Arrays = dict[str, NDArray[Any]]


def shared(name: str) -> Path:
    path = DATA / "models" / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"no {path.name}: set QCONV_DATA to the folder that has models/")
    return path


# -- what a run needs --------------------------------------------------------------------------------------------------

CHAIN = network("a = Conv(x, w) b = Relu(a) c = Conv(b, v) y = Sigmoid(c)", w=(4, 3, 3, 3), v=(2, 4, 1, 1))


def test_a_tensor_in_the_middle_stands_for_all_that_it_is_made_of() -> None:
    runner = TorchNetwork(loaded(CHAIN))
    x = torch.randn(2, 3, 6, 6)
    found = runner.run({"x": x}, ["b", "y"])
    again = runner.run({"b": found["b"]}, ["y", "b"])
    torch.testing.assert_close(again["y"], found["y"])
    assert again["b"] is found["b"]
    assert list(runner.run({"b": found["b"]})) == ["y"]


def test_what_is_not_needed_is_not_run() -> None:
    """The second convolution would refuse 4 channels of another number."""
    runner = TorchNetwork(loaded(CHAIN))
    assert set(runner.run({"x": torch.randn(1, 3, 4, 4), "b": torch.randn(1, 9, 2, 2)}, ["a"])) == {"a"}


def test_weights_can_be_given_or_replaced() -> None:
    runner = TorchNetwork(loaded(CHAIN))
    x, weight = torch.randn(1, 3, 4, 4), torch.randn(4, 3, 3, 3, requires_grad=True)
    expected = torch.nn.functional.conv2d(x, weight)
    found = runner.run({"x": x, "w": weight}, ["a"])["a"]
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert weight.grad is not None
    runner.constants["w"] = weight
    torch.testing.assert_close(runner.run({"x": x}, ["a"])["a"], expected)


def test_given_tensors_and_constants_can_be_wanted() -> None:
    runner = TorchNetwork(loaded(CHAIN))
    x = torch.randn(1, 3, 4, 4)
    found = runner.run({"x": x}, ["x", "w"])
    assert found["x"] is x
    assert found["w"] is runner.constants["w"]


def test_nothing_of_the_model_changes() -> None:
    model = loaded(CHAIN)
    before = model.proto().SerializeToString()
    runner = TorchNetwork(model)
    runner.constants["w"].mul_(2)
    assert model.proto().SerializeToString() == before


def test_operators_that_are_not_built_are_named_and_counted() -> None:
    model = loaded(network("a = Sin(x) b = Det(a) y = Sin(b)"))
    with pytest.raises(QconvError, match=r"cannot run 2 operators of this model in PyTorch: Det \(1\), Sin \(2\)\."):
        TorchNetwork(model)


def test_an_operator_of_another_domain_is_named_with_it() -> None:
    proto = network("y = Relu(x)")
    proto.graph.node[0].domain = "com.example"
    proto.opset_import.add(domain="com.example", version=1)
    with pytest.raises(QconvError, match=r"cannot run 1 operator of .*: com\.example\.Relu \(1\)"):
        TorchNetwork(as_it_is(proto))


def test_an_old_model_is_refused() -> None:
    with pytest.raises(QconvError, match="opset 12"):
        TorchNetwork(as_it_is(network("y = Relu(x)", opset=12)))


def test_an_operator_that_fails_is_named() -> None:
    with pytest.raises(QconvError, match=r"^Conv 'a' does not run in PyTorch: "):
        TorchNetwork(loaded(CHAIN)).run({"x": torch.randn(1, 5, 6, 6)})


# -- how quantizers learn ----------------------------------------------------------------------------------------------


def lsq(x: NDArray, scale: float, low: int, high: int) -> tuple[NDArray, NDArray]:
    """Slopes of the quantized value by x and by the scale: Esser et al. 2020, equations 3 and 5."""
    steps = x / scale
    inside = (steps > low) & (steps < high)
    return inside.astype(float), np.where(inside, np.rint(steps) - steps, np.clip(steps, low, high))


@pytest.mark.parametrize(("kind", "zero"), [("uint8", 0), ("uint8", 130), ("int8", 0), ("int8", -9), ("int16", 0)])
def test_a_scale_learns_by_the_equation_of_lsq(kind: str, zero: int) -> None:
    info = np.iinfo(kind)
    z = np.array(zero, kind)
    proto = network("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", ("N",), opset=21, s=0.5, z=z)
    scale, low, high = 0.37, info.min - zero, info.max - zero
    # around both ends in eighths of a step, and inside
    steps = np.concatenate([end + np.arange(-11, 11) / 8 + 1 / 16 for end in (low, high)] + [np.linspace(-3, 9, 20)])
    x = torch.tensor(steps * scale, dtype=torch.float32, requires_grad=True)
    s = torch.tensor(scale, requires_grad=True)
    y = TorchNetwork(as_it_is(proto)).run({"x": x, "s": s})["y"]
    by_x, by_scale = lsq(x.detach().double().numpy(), s.item(), low, high)
    assert 0 < by_x.sum() < len(steps)
    (found,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    np.testing.assert_allclose(found, by_x, atol=1e-5)
    for index in range(len(steps)):
        (found,) = torch.autograd.grad(y[index], s, retain_graph=True)
        assert found.item() == pytest.approx(by_scale[index], abs=0.01 if kind == "int16" else 1e-4)


def test_a_channel_learns_its_own_scale() -> None:
    body = "q = QuantizeLinear<axis=0>(x, s, z) y = DequantizeLinear<axis=0>(q, s, z)"
    proto = network(body, (3, 50), s=(3,), z=np.int8([0, 3, -5]))
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    s = torch.tensor([0.01, 0.02, 0.5], requires_grad=True)
    TorchNetwork(as_it_is(proto)).run({"x": x, "s": s})["y"].sum().backward()
    assert s.grad is not None
    for channel, zero in enumerate((0, 3, -5)):
        _, slopes = lsq(x[channel].double().numpy(), s[channel].item(), -128 - zero, 127 - zero)
        assert s.grad[channel].item() == pytest.approx(slopes.sum(), rel=1e-4)


def test_a_zero_point_learns_from_what_is_cut_off() -> None:
    """Inside it cancels out; outside the value is the last code less z, times s: its slope is -s."""
    proto = network("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", (5,), s=0.5, z=np.array(10, np.uint8))
    z = torch.tensor(10.0, requires_grad=True)
    y = TorchNetwork(as_it_is(proto)).run({"x": torch.tensor([-50.0, -3.0, 0.0, 7.7, 900.0]), "z": z})["y"]
    slopes = [torch.autograd.grad(value, z, retain_graph=True)[0].item() for value in y]
    assert slopes == [-0.5, 0.0, 0.0, 0.0, -0.5]


def test_codes_of_weights_learn_as_numbers() -> None:
    """A code moves its weight by the scale."""
    proto = network("w = DequantizeLinear(c, s) y = MatMul(x, w)", (1, 3), c=np.int8([[4], [-5], [6]]), s=0.5)
    codes = torch.tensor([[4.0], [-5.0], [6.0]], requires_grad=True)
    TorchNetwork(as_it_is(proto)).run({"x": torch.tensor([[1.0, 2.0, 3.0]]), "c": codes})["y"].sum().backward()
    assert codes.grad is not None
    assert codes.grad.flatten().tolist() == [0.5, 1.0, 1.5]


# -- float networks ----------------------------------------------------------------------------------------------------

REAL = (
    "resnet20_cifar10",
    "mobilenetv2_imagenet",
    "efficientnet_lite0_imagenet",
    "efficientnet_b0_binary",
    "kerascnn_cifar10",
    "rapidocr_cls_v2",
    "mnist",
    "ultraface_rfb320",
    "deeplabv3_257_mv_gpu",
)


@pytest.mark.parametrize("name", ["cifar_mobilenet", *REAL])
def test_float_networks_give_what_onnx_runtime_gives(name: str) -> None:
    path = CIFAR if name == "cifar_mobilenet" else shared(name)
    source = Source(path.name, path)
    session = Session(str(path), optimize=False, threads=1)
    rng = np.random.default_rng(0)
    feeds = {
        label: rng.standard_normal([1, *(d or 48 for d in shape[1:])]).astype(np.float32)
        for label, _, shape in session.inputs
    }
    found = outputs(TorchNetwork(load(read_proto(source), source)[0]), feeds)
    for label, expected in zip(session.outputs, session.run_all(feeds), strict=True):
        np.testing.assert_allclose(found[label], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_a_network_with_operators_of_its_own_is_refused_by_their_names() -> None:
    path = shared("superres_ppp_op18")
    source = Source(path.name, path)
    model, _ = load(read_proto(source), source)
    told = r"cannot run 2 operators .*: com\.microsoft\.extensions\.DecodeImage \(1\), .*\.EncodeImage \(1\)\.$"
    with pytest.raises(QconvError, match=told):
        TorchNetwork(model)


# -- quantized networks ------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "w8a8": {},
    "w4a4": {"weight_bits": 4, "activation_bits": 4},
    "w2a4": {"weight_bits": 2, "activation_bits": 4},
    "w8a16": {"activation_bits": 16},
    "w4a8 per block": {"weight_bits": 4, "weight_granularity": WeightGranularity.PER_BLOCK, "block_size": 16},
    "w4a8 packed": {"weight_bits": 4, "pack": True},
    "w3a8 asymmetric": {"weight_bits": 3, "weight_scheme": Scheme.ASYMMETRIC},
    "w8 alone": {"activation_bits": 32},
    "channels with bits of their own": NAMED_RECIPES["aciq-w4a4"],
    "pixels": {"embed_preprocessing": Layout.NCHW},
    "pixels, channels last": {"embed_preprocessing": Layout.NHWC},
    "tensorrt": {"target": "tensorrt"},
}


def preprocessed() -> NDArray[np.float32]:
    """The first pictures of the repository as its network takes them."""
    preset = PRESETS["imagenet"]
    return ((pixels() * preset.scale - as_channels(preset.mean)) / as_channels(preset.std)).astype(np.float32)


def as_channels(numbers: tuple[float, ...]) -> NDArray[Any]:
    return np.array(numbers).reshape(-1, 1, 1)


def pixels() -> NDArray[np.uint8]:
    files = sorted((ROOT / "calib_samples").glob("*.jpg"))[:: 100 // PICTURES][:PICTURES]
    read = [np.asarray(Image.open(file).convert("RGB").resize((32, 32))) for file in files]
    return np.stack(read).transpose(0, 3, 1, 2)


@cache
def quantized(path: Path, name: str) -> onnx.ModelProto:
    recipe, data = (
        Recipe(effort="fast", threads=1, **OPTIONS[name]),
        DataOptions((str(ROOT / "calib_samples"),), samples=8, preprocessing=PreprocessingOptions(preset="imagenet")),
    )
    _, made = quantize(str(path), None, recipe, data)
    assert made is not None
    return onnx.load_from_string(made)


def feeds_of(proto: onnx.ModelProto) -> Arrays:
    """Pictures; random numbers for networks of other sizes than the repository's own."""
    (value,) = proto.graph.input
    shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
    if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8:
        taken = pixels()
        return {value.name: taken if shape[1] == 3 else np.ascontiguousarray(taken.transpose(0, 2, 3, 1))}
    if shape[2] == 32:
        return {value.name: preprocessed()}
    return {value.name: np.random.default_rng(0).standard_normal((1, *shape[1:])).astype(np.float32)}


def every_tensor(proto: onnx.ModelProto, feeds: Arrays) -> Arrays:
    """All that ONNX Runtime computes, node by node, and what it was fed."""
    tapped = onnx.ModelProto.FromString(proto.SerializeToString())
    known = {value.name for value in proto.graph.output}
    names = [name for node in proto.graph.node for name in node.output if name not in known]
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = Session(tapped.SerializeToString(), optimize=False, threads=1)
    return {**feeds, **dict(zip(session.outputs, session.run_all(feeds), strict=True))}


def check_nodes(proto: onnx.ModelProto) -> None:
    """Each node alone, fed with what ONNX Runtime computed: codes are the same, all else is within rounding errors."""
    known = every_tensor(proto, feeds_of(proto))
    runner = TorchNetwork(as_it_is(proto))
    given = runner.on_arrays(known)
    quantizers = 0
    for node in proto.graph.node:
        reads = {name: given[name] for name in node.input if name in given}
        for name, found in runner.run(reads, list(node.output)).items():
            expected = known[name]
            whole = expected.dtype != np.float32
            quantizers += node.op_type == "QuantizeLinear"
            room = 0.0 if whole else 1e-5 * float(np.abs(expected).max())
            np.testing.assert_allclose(found, expected.astype(np.float32), rtol=0, atol=room, err_msg=node.name)
    if any(node.op_type == "QuantizeLinear" for node in proto.graph.node):
        assert quantizers > 0


def check_quantizers(proto: onnx.ModelProto) -> None:
    """From quantizer to quantizer: what is computed in between moves few codes, and those by one."""
    known = every_tensor(proto, feeds_of(proto))
    runner = TorchNetwork(as_it_is(proto))
    constants = {tensor.name for tensor in proto.graph.initializer}
    read = [n.output[0] for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in constants]
    written = [node.output[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    inputs = [value.name for value in proto.graph.input]
    found = runner.run(runner.on_arrays({name: known[name] for name in (*inputs, *read)}), written)
    for name, codes in found.items():
        moved = np.abs(codes.numpy() - known[name].astype(np.float32))
        assert moved.max() <= 1, name
        assert np.mean(moved) < 0.003, name


def check_outputs(proto: onnx.ModelProto) -> None:
    """As users run it: optimized, in integers.

    In the root mean square it is as near as ONNX Runtime without optimizations, to a code of 8 bits. A single number
    may be as far off again: one between two codes falls to either side here, too, on its way through all layers.
    """
    feeds = feeds_of(proto)
    session = Session(proto.SerializeToString(), threads=1)
    found, plain = outputs(TorchNetwork(as_it_is(proto)), feeds), run(proto, feeds)
    for name, expected in zip(session.outputs, session.run_all(feeds), strict=True):
        code, own, other = np.ptp(expected) / 255, found[name] - expected, plain[name] - expected
        assert np.sqrt(np.mean(own**2)) <= np.sqrt(np.mean(other**2)) + code
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2 * np.abs(other).max() + code)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_node_of_a_quantized_network_gives_what_onnx_runtime_gives(name: str) -> None:
    check_nodes(quantized(CIFAR, name))


@pytest.mark.parametrize("name", OPTIONS)
def test_codes_are_those_of_onnx_runtime(name: str) -> None:
    check_quantizers(quantized(CIFAR, name))


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_are_those_that_users_get(name: str) -> None:
    check_outputs(quantized(CIFAR, name))


@pytest.mark.parametrize("options", ["w8a8", "w4a4"])
@pytest.mark.parametrize("name", ["resnet20_cifar10", "mobilenetv2_imagenet"])
def test_real_networks_that_are_quantized(name: str, options: str) -> None:
    proto = quantized(shared(name), options)
    check_nodes(proto)
    check_quantizers(proto)
    check_outputs(proto)
