"""Small networks as users bring them, after public reports: each is quantized by default and scored on other pictures.

Oracle: ONNX Runtime's results of the float file, on pictures that calibration has not seen.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper
from PIL import Image

import qconv
from tests.support.models import ints, network
from tests.support.quantized import sqnr

SAME = "pads=[1,1,1,1]"
HALF = "pads=[1,1,1,1], strides=[2,2]"
FED = qconv.PreprocessingOptions(preset="unit", resize="exact")


def he(*shape: int, gain: float = 1.0) -> NDArray[np.float32]:
    """Weights that keep the size of what they meet (He et al. 2015)."""
    rng = np.random.default_rng(zlib.crc32(str(shape).encode()))
    return (rng.standard_normal(shape) * gain * np.sqrt(2 / max(1, int(np.prod(shape[1:]))))).astype(np.float32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `calib` and `other` of pictures with smooth areas and edges, 64x64."""
    place = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for folder, count in (("calib", 24), ("other", 8)):
        (place / folder).mkdir()
        for index in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(
                (64, 64), Image.Resampling.BICUBIC
            )
            pixels = np.asarray(coarse).astype(np.int16) + rng.integers(-12, 13, (64, 64, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(place / folder / f"{index}.png")
    return place


def session(model: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def decibels(place: Path, photos: Path, model: onnx.ModelProto, **options: object) -> dict[str, float]:
    """Quantize the model; the SQNR of each output over the other pictures."""
    path, out = place / "model.onnx", place / "out.onnx"
    path.write_bytes(model.SerializeToString())
    data = qconv.DataOptions((str(photos / "calib"),), preprocessing=FED)
    qconv.quantize(path, out, qconv.Recipe(threads=1, **options), data)  # type: ignore[arg-type]
    before, after = session(path), session(out)
    (fed,) = before.get_inputs()
    size = fed.shape[2:4]
    results: list[tuple[list[NDArray], list[NDArray]]] = []
    for photo in sorted((photos / "other").iterdir()):
        pixels = np.asarray(Image.open(photo).resize(size[::-1], Image.Resampling.BILINEAR), np.float32) / 255
        feeds = {fed.name: pixels.transpose(2, 0, 1)[None]}
        results.append((before.run(None, feeds), after.run(None, feeds)))
    return {
        output.name: sqnr(*(np.stack([one[which][index] for one in results]) for which in (0, 1)))
        for index, output in enumerate(before.get_outputs())
    }


def clips_of_every_form() -> onnx.ModelProto:
    """A lower bound alone, an upper alone, none, both from Constant nodes, a computed one, and bounds that cross."""
    return network(
        f"""
        lo = Constant<value_float: float = -0.5>()  hi = Constant<value_float: float = 0.75>()
        c1 = Conv<{HALF}>(x, w0)  t1 = Clip(c1, , one)
        c2 = Conv<{SAME}>(t1, w1)  t2 = Clip(c2, zero)
        c3 = Conv<{SAME}>(t2, w2)  t3 = Clip(c3)
        c4 = Conv<{SAME}>(t3, w3)  t4 = Clip(c4, lo, hi)
        top = ReduceMax<keepdims=0>(t4)  bound = Mul(top, half)
        c5 = Conv<{SAME}>(t4, w4)  t5 = Clip(c5, lo, bound)
        c6 = Conv<{SAME}>(t5, w5)  t6 = Clip(c6, two, one)
        s = Add(t5, t6)  y = Conv<{SAME}>(s, w6)
        """,
        x=(1, 3, 64, 64),
        **{f"w{index}": he(16, 3 if index == 0 else 16, 3, 3) for index in range(6)},
        w6=he(8, 16, 3, 3),
        zero=0.0,
        half=0.5,
        one=1.0,
        two=2.0,
    )


def concats_of_one() -> onnx.ModelProto:
    """A Concat of one tensor, of the same three times, and of what another has joined."""
    return network(
        f"""
        a = Conv<{HALF}>(x, w0)  b = Relu(a)  c = Conv<{HALF}>(b, w1)  d = Relu(c)
        t = Concat<axis=1>(d)  three = Concat<axis=1>(t, t, t)
        wide = Conv<{SAME}>(three, w2)  all = Concat<axis=1>(three, wide, three)
        e = Conv<{SAME}>(all, w3)  f = Relu(e)  g = Concat<axis=-3>(f)  y = Conv<{SAME}>(g, w4)
        """,
        x=(1, 3, 64, 64),
        w0=he(16, 3, 3, 3),
        w1=he(32, 16, 3, 3),
        w2=he(32, 96, 3, 3, gain=6.0),
        w3=he(16, 224, 3, 3),
        w4=he(8, 16, 3, 3),
    )


def functions_in_functions() -> onnx.ModelProto:
    """Functions of the model itself: a layer in one, called twice with weights as arguments, and one inside it."""
    proto = network(
        f"""
        a = Conv<{HALF}>(x, w0)  b = Relu(a)  c = Identity(b)  d = Identity(c)
        e, f, g = Split<axis=1, num_outputs=3>(d)  h = Concat<axis=1>(g, e, f)
        i = ReduceMean<keepdims=0>(h, axes)  y = Gemm<transB=1>(i, w3)
        """,
        x=(1, 3, 32, 32),
        opset=18,
        w0=he(16, 3, 3, 3),
        w1=he(16, 16, 3, 3),
        b1=he(16),
        w3=he(10, 16),
        axes=ints(-1, -2),
    )
    standard, own = helper.make_opsetid("", 18), helper.make_opsetid("of.the.model", 1)
    gate = [
        helper.make_node("HardSigmoid", ["t"], ["s"], alpha=1 / 6, beta=0.5),
        helper.make_node("Mul", ["t", "s"], ["u"]),
    ]
    block = [
        helper.make_node("Conv", ["t", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Gate", ["c"], ["u"], domain="of.the.model"),
    ]
    proto.functions.append(helper.make_function("of.the.model", "Gate", ["t"], ["u"], gate, [standard]))
    proto.functions.append(
        helper.make_function("of.the.model", "Block", ["t", "w", "b"], ["u"], block, [standard, own])
    )
    proto.opset_import.append(own)
    for node in proto.graph.node:
        if node.op_type == "Identity":
            node.op_type, node.domain = "Block", "of.the.model"
            node.input.extend(["w1", "b1"])
    return proto


def half_between_casts() -> onnx.ModelProto:
    """float16 inside, float32 outside and in one layer."""
    return network(
        f"""
        h = Cast<to=10>(x)  a = Conv<{HALF}>(h, w0, b0)  b = Relu(a)  c = Cast<to=1>(b)
        d = Conv<{SAME}>(c, w1)  e = Relu(d)  f = Cast<to=10>(e)
        g = Conv<{SAME}>(f, w2)  i = Clip(g, zero, top)  p = GlobalAveragePool(i)  q = Flatten(p)
        r = Gemm<transB=1>(q, w3)  y = Cast<to=1>(r)
        """,
        x=(1, 3, 32, 32),
        w0=he(16, 3, 3, 3).astype(np.float16),
        b0=he(16).astype(np.float16),
        w1=he(16, 16, 3, 3),
        w2=he(16, 16, 3, 3, gain=30.0).astype(np.float16),
        w3=he(10, 16).astype(np.float16),
        zero=np.array(0, np.float16),
        top=np.array(np.inf, np.float16),
    )


def products_of_every_form() -> onnx.ModelProto:
    """A constant on the left, a matrix for each head, four axes, transA, a C of one column, a computed C, a vector."""
    return network(
        """
        a = Conv<pads=[1,1,1,1], strides=[4,4]>(x, w0)  b = Relu(a)  c = Reshape(b, heads)
        d = MatMul(c, w1)  e = Relu(d)  f = MatMul(w2, e)  v = MatMul(f, w3)
        g = Relu(f)  h = Reshape(g, flat)  i = Gemm<transA=1, alpha=0.3, beta=2.0>(h, w4, column)
        y = Gemm<transB=1>(i, w5, half)  m = ReduceMean<axes=[0], keepdims=1>(i)  j = Relu(i)
        left = Gemm(w6, j, m)
        """,
        x=(1, 3, 32, 32),
        outputs=("left", "y", "v"),
        w0=he(32, 3, 3, 3),
        w1=he(1, 4, 64, 48),
        w2=he(1, 4, 16, 8),
        w3=he(48),
        w4=he(64, 20),
        w5=he(12, 20),
        w6=he(10, 48),
        column=he(48, 1),
        half=0.5,
        heads=ints(1, 4, 8, 64),
        flat=ints(64, 48),
    )


def weights_on_the_way() -> onnx.ModelProto:
    """Weights that are float16 and cast, transposed, reshaped, handed on, normalised, and a bias that is a product."""
    return network(
        f"""
        w0 = Cast<to=1>(h0)  b0 = Cast<to=1>(g0)  a = Conv<{HALF}>(x, w0, b0)  b = Relu(a)
        c1 = Cast<to=1>(h1)  w1 = Transpose<perm=[3,2,0,1]>(c1)  b1 = Mul(g1, tenth)
        c = Conv<{HALF}>(b, w1, b1)  d = Relu(c)
        i2 = Identity(h2)  w2 = Reshape(i2, shape)  e = Conv<{SAME}>(d, w2)  f = Relu(e)
        squares = Mul(h3, h3)  sums = ReduceSum<keepdims=1>(squares, axes)  norm = Sqrt(sums)  unit = Div(h3, norm)
        w3 = Mul(unit, size)  g = Conv<{SAME}>(f, w3)  h = Relu(g)
        p = GlobalAveragePool(h)  q = Flatten(p)  w4 = Transpose<perm=[1,0]>(h4)  r = MatMul(q, w4)  y = Add(g4, r)
        """,
        x=(1, 3, 64, 64),
        h0=he(16, 3, 3, 3).astype(np.float16),
        g0=he(16).astype(np.float16),
        h1=he(3, 3, 16, 32).astype(np.float16),
        g1=he(32),
        tenth=0.1,
        h2=he(16, 288),
        shape=ints(16, 32, 3, 3),
        h3=he(16, 16, 3, 3),
        axes=ints(1, 2, 3),
        size=np.abs(he(16, 1, 1, 1)) + np.float32(0.5),
        h4=he(10, 16),
        g4=he(10),
    )


CASES: dict[Callable[[], onnx.ModelProto], float] = {
    clips_of_every_form: 36.0,
    concats_of_one: 33.0,
    functions_in_functions: 42.0,
    half_between_casts: 53.0,
    products_of_every_form: 52.0,
    weights_on_the_way: 60.0,
}
"""Networks, and the least SQNR in dB of any output, whatever the table of costs leaves in float."""


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_a_network_of_a_user(build: Callable[[], onnx.ModelProto], photos: Path, tmp_path: Path) -> None:
    found = decibels(tmp_path, photos, build())
    assert min(found.values()) >= CASES[build], found
