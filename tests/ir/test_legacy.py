"""Models of opsets 1 to 12, drawn at random, against a twin of opset 13 that is written beside them, step by step."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qconv.errors import QconvError
from qconv.ir import legacy
from qconv.ir.files import Source
from qconv.ir.load import load
from qconv.ir.original import open_original
from qconv.runtime.session import Session

DRAWS = int(os.environ.get("QCONV_DRAWS", "60"))
SAMPLE = (2, 4, 8, 8)


@dataclass
class Pair:
    """An old model and its twin, which grow node by node. shape: of the current tensor without its batch."""

    opset: int
    rng: np.random.Generator
    old: list[onnx.NodeProto] = field(default_factory=list)
    new: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)
    twins: dict[str, NDArray[Any]] = field(default_factory=dict)
    shape: tuple[int, ...] = SAMPLE[1:]
    name: str = "x"
    steps: list[str] = field(default_factory=list)

    def number(self, *shape: int, low: float = -1.0) -> NDArray[np.float32]:
        return self.rng.uniform(low, 1.5, shape).astype(np.float32)

    def fresh(self) -> str:
        return f"t{len(self.old)}_{len(self.new)}"

    def emit(
        self,
        op: str,
        own: dict[str, Any],
        newer: dict[str, Any] | None = None,
        constants: tuple[NDArray[Any], ...] = (),
        twins: tuple[NDArray[Any], ...] | None = None,
        op_of_twin: str | None = None,
    ) -> None:
        """Add a node on both sides; attributes are those of the old one unless the twin has others."""
        y = self.fresh()
        names = [f"{y}_c{i}" for i in range(len(constants))]
        self.constants |= dict(zip(names, constants, strict=True))
        its = constants if twins is None else twins
        others = [f"{y}_c{i}" for i in range(len(its))]
        self.twins |= dict(zip(others, its, strict=True))
        stale = {"consumed_inputs": [0] * (1 + len(names))} if self.opset < 6 and op in CONSUMING else {}
        self.old.append(helper.make_node(op, [self.name, *names], [y], **own, **stale))
        newer = own if newer is None else newer
        self.new.append(helper.make_node(op_of_twin or op, [self.name, *others], [y], **newer))
        self.name = y

    def old_proto(self, ir_version: int) -> onnx.ModelProto:
        return self._proto(self.old, self.constants, self.opset, ir_version)

    def new_proto(self) -> onnx.ModelProto:
        return self._proto(self.new, self.twins, 13, 8)

    def _proto(self, nodes: list[Any], constants: dict[str, Any], opset: int, version: int) -> onnx.ModelProto:
        tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, SAMPLE)]
        if version < 4:
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
        outputs = [helper.make_tensor_value_info(self.name, TensorProto.FLOAT, None)]
        graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=version)


CONSUMING = frozenset({"Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "Tanh", "Clip", "Elu", "LeakyRelu", "Abs", "Max"})


def conv(pair: Pair) -> None:
    c, out = pair.shape[0], int(pair.rng.integers(2, 6))
    w = pair.number(out, c, 3, 3) / np.float32(3 * np.sqrt(c))
    pair.emit("Conv", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, constants=(w, pair.number(out)))
    pair.shape = (out, *pair.shape[1:])


def arithmetic(pair: Pair) -> None:
    """A second operand that has some of the axes of the first, wherever they stand."""
    op = str(pair.rng.choice(["Add", "Sub", "Mul", "Div"]))
    full = (SAMPLE[0], *pair.shape)
    first = int(pair.rng.integers(0, len(full)))
    size = int(pair.rng.integers(0, len(full) - first + 1))
    if pair.opset >= 7:
        size = len(full) - first
    part = full[first : first + size]
    low = 0.5 if op == "Div" else -1.0
    numbers = np.asarray(pair.number(*part, low=low), np.float32).reshape(part)
    twin = numbers.reshape(*part, *(1,) * (len(full) - first - size)) if size else numbers
    attributes: dict[str, Any] = {}
    if pair.opset < 7:
        suffix = first + size == len(full) and bool(pair.rng.integers(0, 2))
        attributes = {} if part == full else {"broadcast": 1} | ({} if suffix or not size else {"axis": first})
        numbers = numbers if size else numbers.reshape(1)
    pair.emit(op, attributes, {}, (numbers,), (twin,))


def power(pair: Pair) -> None:
    c = pair.shape[0]
    exponent = pair.rng.integers(1, 3, c).astype(np.float32)
    wide = exponent.reshape(c, *(1,) * (len(pair.shape) - 1))
    old = {"broadcast": 1, "axis": 1} if pair.opset < 7 else {}
    pair.emit("Pow", old, {}, (exponent if old else wide,), (wide,))
    pair.emit("Tanh", {})


def batch_normalization(pair: Pair) -> None:
    each = pair.opset < 9 and bool(pair.rng.integers(0, 2))
    shape = pair.shape if each else pair.shape[:1]
    scale, bias, mean = (pair.number(*shape) for _ in range(3))
    var = pair.number(*shape, low=0.3)
    own: dict[str, Any] = {"epsilon": 1e-3} | ({"spatial": 0} if each else {})
    if pair.opset < 7:
        own["is_test"] = 1
    if pair.opset < 6:
        own["consumed_inputs"] = [0, 0, 0, 1, 1]
    if not each:
        pair.emit("BatchNormalization", own, {"epsilon": 1e-3}, (scale, bias, mean, var))
        return
    y = pair.fresh()
    gain = (scale / np.sqrt(var + 1e-3)).astype(np.float32)
    names = [f"{y}_c{i}" for i in range(4)]
    pair.constants |= dict(zip(names, (scale, bias, mean, var), strict=True))
    pair.twins |= {f"{y}_gain": gain, f"{y}_shift": bias - mean * gain}
    pair.old.append(helper.make_node("BatchNormalization", [pair.name, *names], [y], **own))
    pair.new.append(helper.make_node("Mul", [pair.name, f"{y}_gain"], [f"{y}_g"]))
    pair.new.append(helper.make_node("Add", [f"{y}_g", f"{y}_shift"], [y]))
    pair.name = y


def activation(pair: Pair) -> None:
    op = str(pair.rng.choice(["Relu", "Sigmoid", "Tanh", "Elu", "LeakyRelu", "Abs"]))
    pair.emit(op, {"alpha": 0.2} if op in ("Elu", "LeakyRelu") else {})


def clip(pair: Pair) -> None:
    bounds = (np.float32(-0.4), np.float32(0.8))
    if pair.opset < 11:
        pair.emit("Clip", {"min": float(bounds[0]), "max": float(bounds[1])}, {}, (), bounds)
    else:
        pair.emit("Clip", {}, constants=bounds)


def slopes(pair: Pair) -> None:
    c = pair.shape[0]
    slope = pair.number(c, low=0.1)
    wide = slope.reshape(c, *(1,) * (len(pair.shape) - 1))
    pair.emit("PRelu", {}, constants=(slope if pair.opset < 7 else wide,), twins=(wide,))


def dropout(pair: Pair) -> None:
    if pair.opset < 12:
        pair.emit("Dropout", {"ratio": 0.4} | ({"is_test": 1} if pair.opset < 7 else {}), {}, (), (), "Identity")


def upsample(pair: Pair) -> None:
    if len(pair.shape) != 3 or pair.shape[1] > 8:
        return
    factor = float(pair.rng.choice([1.5, 2.0]))
    mode = str(pair.rng.choice(["nearest", "linear"]))
    scales = np.array([1, 1, factor, factor], np.float32)
    roi = np.zeros(0, np.float32)
    place = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", "mode": mode}
    if pair.opset < 7:
        mode = "nearest" if mode == "nearest" else "bilinear"
        if mode == "bilinear":
            return  # the mode has another name there, which onnx's converter refuses
        pair.emit(
            "Upsample",
            {"height_scale": factor, "width_scale": factor, "mode": mode},
            place,
            (),
            (roi, scales),
            "Resize",
        )
    elif pair.opset < 9:
        pair.emit("Upsample", {"scales": scales.tolist(), "mode": mode}, place, (), (roi, scales), "Resize")
    elif pair.opset < 11:
        op = "Upsample" if pair.opset == 9 else "Resize"
        pair.emit(op, {"mode": mode}, place, (scales,), (roi, scales), "Resize")
    else:
        pair.emit("Resize", place, constants=(roi, scales))
    pair.shape = (pair.shape[0], *(int(side * factor) for side in pair.shape[1:]))


def pad(pair: Pair) -> None:
    if len(pair.shape) != 3:
        return
    widths = np.array([0, 0, 1, 0, 0, 0, 2, 1], np.int64)
    name = "paddings" if pair.opset < 2 else "pads"
    if pair.opset < 11:
        pair.emit("Pad", {name: widths.tolist()}, {}, (), (widths,))
    else:
        pair.emit("Pad", {}, constants=(widths,))
    pair.shape = (pair.shape[0], pair.shape[1] + 3, pair.shape[2] + 1)


def casts(pair: Pair) -> None:
    pair.emit("Cast", {"to": "DOUBLE" if pair.opset < 6 else TensorProto.DOUBLE}, {"to": TensorProto.DOUBLE})
    pair.emit("Cast", {"to": "FLOAT" if pair.opset < 6 else TensorProto.FLOAT}, {"to": TensorProto.FLOAT})


def doubled(pair: Pair) -> None:
    y = pair.fresh()
    pair.old.append(helper.make_node("Concat", [pair.name] * 2, [y], **({} if pair.opset < 4 else {"axis": 1})))
    pair.new.append(helper.make_node("Concat", [pair.name] * 2, [y], axis=1))
    pair.name, pair.shape = y, (2 * pair.shape[0], *pair.shape[1:])


def flat(pair: Pair) -> None:
    shape = np.array([0, -1], np.int64)
    if pair.opset < 5:
        pair.emit("Reshape", {"shape": shape.tolist()}, {}, (), (shape,))
    else:
        pair.emit("Reshape", {}, constants=(shape,))
    features = int(np.prod(pair.shape))
    w, b = pair.number(5, features) / np.float32(np.sqrt(features)), pair.number(5)
    old: dict[str, Any] = {"transB": 1} | ({"broadcast": 1} if pair.opset < 7 else {})
    pair.emit("Gemm", old, {"transB": 1}, (w, b))
    pair.shape = (5,)


STEPS = (arithmetic, batch_normalization, activation, clip, slopes, dropout, upsample, pad, casts, doubled, power, conv)


def draw(seed: int) -> Pair:
    rng = np.random.default_rng(seed)
    pair = Pair(int(rng.integers(1, 13)), rng)
    conv(pair)
    for index in rng.permutation(len(STEPS))[: rng.integers(2, 6)]:
        STEPS[index](pair)
        pair.steps.append(STEPS[index].__name__)
    if rng.integers(0, 2):
        flat(pair)
    return pair


def outputs(session: Session) -> NDArray[Any]:
    x = np.random.default_rng(1).uniform(-1, 1, SAMPLE).astype(np.float32)
    (found,) = session.run_all({"x": x})
    return found


@pytest.mark.parametrize("seed", range(DRAWS))
def test_old_models_compute_what_they_did(seed: int) -> None:
    """Both what is loaded, and what stands for the user's own model."""
    pair = draw(seed)
    said = f"opset {pair.opset}: {' '.join(pair.steps)}"
    proto = pair.old_proto(3 if seed % 2 else 7)
    expected = outputs(Session(pair.new_proto().SerializeToString(), optimize=False))
    source = Source("old.onnx", None, proto.SerializeToString())
    model, changes = load(onnx.ModelProto.FromString(proto.SerializeToString()), source)
    got = outputs(Session(model.proto().SerializeToString(), optimize=False))
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5, err_msg=said)
    np.testing.assert_allclose(outputs(open_original(source, 1)), expected, rtol=2e-4, atol=2e-5, err_msg=said)
    assert any(change.what == f"opset {pair.opset} raised to 13" for change in changes), said


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("factor", [0.4, 0.7, 1.25, 3.0])
def test_resizing_takes_the_places_that_it_took(mode: str, factor: float) -> None:
    """ONNX Runtime's own kernel of opset 10 is the oracle."""
    pair = Pair(10, np.random.default_rng(0))
    pair.emit("Resize", {"mode": mode}, constants=(np.array([1, 1, factor, factor], np.float32),))
    proto = pair.old_proto(7)
    expected = outputs(Session(proto.SerializeToString(), optimize=False))
    got = load(proto, Source("old.onnx", None, b""))[0].proto()
    np.testing.assert_allclose(outputs(Session(got.SerializeToString(), optimize=False)), expected, atol=1e-6)


def test_what_cannot_be_raised_names_the_oldest_opset_that_works() -> None:
    pair = Pair(1, np.random.default_rng(0))
    pair.emit("Crop", {"border": [1, 1, 1, 1]})
    pair.emit("Mul", {"broadcast": 1, "axis": 1}, constants=(np.ones(4, np.float32),))
    source = Source("old.onnx", None, pair.old_proto(3).SerializeToString())
    with pytest.raises(QconvError) as caught:
        open_original(source, 1)
    told, _, why = caught.value.message.partition(": ")
    assert told == "old.onnx uses opset 1, and onnx cannot raise it to 13"
    assert why in ("it does not know the operator Crop.", "it does not know one of its operators.")
    assert caught.value.hint == "export the model again at opset 13 or later, the oldest that needs no raising."


def test_newer_models_are_left_alone() -> None:
    proto = Pair(13, np.random.default_rng(0)).new_proto()
    before = proto.SerializeToString()
    legacy.modernize(proto)
    assert proto.SerializeToString() == before
    assert legacy.find_resizing(proto) == []
