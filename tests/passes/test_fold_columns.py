"""Scales and shifts behind a layer, through what moves its columns. Oracle: ONNX Runtime on the network as it was."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import onnx
import pytest

from qconv.errors import Skipped
from qconv.ir.layers import channel_stats_of
from qconv.passes.fold_columns import fold_into_columns
from tests.support.folded import folded
from tests.support.libraries import MOVES_CODES, needs
from tests.support.models import ints, loaded, network, statistics
from tests.support.quantized import pictures, quantized

DRAWN = int(os.environ.get("QCONV_DRAWN_GRAPHS", "60"))
"""How many networks are drawn; more to search for faults."""

TOKENS, INPUTS, OUTPUTS = 6, 4, 8
LAYERS = {
    "MatMul": "a = MatMul(x, w)",
    "MatMul and bias": "a0 = MatMul(x, w) a = Add(a0, k)",
    "bias first": "a0 = MatMul(x, w) a = Add(k, a0)",
    "two biases": "a0 = MatMul(x, w) a1 = Add(a0, k) a = Add(a1, one)",
}
# what moves (2, TOKENS, OUTPUTS) about, and the axis of the columns then
MOVES = {
    "nothing": ("b = Identity(a)", 2),
    "joined": ("b = Reshape(a, flat)", 1),
    "parted": ("b = Reshape(a, four)", 3),
    "turned": ("b = Transpose<perm=[0,2,1]>(a)", 1),
    "turned to maps": ("b0 = Transpose<perm=[0,2,1]>(a) b1 = Unsqueeze(b0, last) b = Transpose<perm=[0,1,2,3]>(b1)", 1),
    "there and back": ("b0 = Transpose<perm=[2,0,1]>(a) b1 = Transpose<perm=[1,2,0]>(b0) b = Reshape(b1, flat)", 1),
    "unsqueezed": ("b = Unsqueeze(a, first)", 3),
    "heads": ("b = Reshape(a, heads)", None),
    "mixed": ("b = Reshape(a, mixed)", None),
}
AFFINES = {
    "norm": "c = BatchNormalization(b, gamma, beta, mean, var)",
    "scale": "c = Mul(b, g)",
    "scale first": "c = Mul(g, b)",
    "divided": "c = Div(b, g)",
    "scale and shift": "c0 = Mul(b, g) c = Add(c0, h)",
    "shift and scale": "c0 = Sub(b, h) c = Mul(c0, g)",
    "number": "c = Mul(b, half)",
}
ENDS = {
    "read": "y = Sigmoid(c)",
    "returned": "y = Identity(c)",
    "read twice": "d = Sigmoid(b) e = Sigmoid(c) y = Add(d, e)",
}


def drawn(seed: int) -> tuple[onnx.ModelProto, dict[str, str]]:
    rng = np.random.default_rng(seed)
    kinds = {
        what: str(rng.choice(list(of)))
        for what, of in (("layer", LAYERS), ("move", MOVES), ("affine", AFFINES), ("end", ENDS))
    }
    moves, axis = MOVES[kinds["move"]]
    axes = {"joined": 2, "there and back": 2, "parted": 4, "turned to maps": 4, "unsqueezed": 4, "heads": 4}.get(
        kinds["move"], 3
    )
    if axis is None or (kinds["affine"] == "norm" and axis != 1):
        kinds["affine"] = "number" if kinds["affine"] == "norm" else kinds["affine"]
    along = axes - 1 if axis is None else axis
    channels = {"heads": 4, "mixed": 6}.get(kinds["move"], OUTPUTS)
    shape = tuple(channels if i == along else 1 for i in range(axes))
    while rng.integers(2) and shape[0] == 1 and len(shape) > 1:
        shape = shape[1:]
    body = " ".join((LAYERS[kinds["layer"]], moves, AFFINES[kinds["affine"]], ENDS[kinds["end"]]))
    proto = network(
        body,
        x=(2, TOKENS, INPUTS),
        w=(INPUTS, OUTPUTS),
        k=(OUTPUTS,),
        one=0.3,
        half=0.5,
        g=rng.uniform(0.5, 2, shape).astype(np.float32) * rng.choice(np.float32([-1, 1]), shape),
        h=rng.standard_normal(shape).astype(np.float32),
        flat=ints(-1, OUTPUTS),
        four=ints(2, 2, 3, OUTPUTS),
        heads=ints(2, TOKENS, 2, 4),
        mixed=ints(2, OUTPUTS, TOKENS),
        last=ints(3),
        first=ints(1),
        **statistics(channels),
    )
    return proto, kinds


@pytest.mark.parametrize("seed", range(DRAWN))
def test_numbers_stay_and_scales_go(seed: int) -> None:
    proto, kinds = drawn(seed)
    found = Counter(node.op_type for node in folded(proto).nodes())
    known = MOVES[kinds["move"]][1] is not None or kinds["affine"] == "number"
    if known and kinds["end"] != "read twice":
        assert found["Mul"] + found["Div"] + found["BatchNormalization"] == 0
        shifted = kinds["affine"] in ("norm", "scale and shift", "shift and scale") or kinds["layer"] != "MatMul"
        assert found["Add"] + found["Sub"] == shifted
    elif not known:
        assert found["Mul"] == 1


@pytest.mark.filterwarnings("error")
def test_what_overflows_on_the_way_changes_nothing() -> None:
    """The Add in front of the scale could take it, and the one before that could not."""
    first = np.zeros((3, 5), np.float32)
    first[0, 0] = 1e38
    body = "a = MatMul(x, w) b = Add(a, k) c = Add(b, m) d = Mul(c, ten) y = Sigmoid(d)"
    proto = network(body, x=(1, 3, 4), w=(4, 5), k=first, m=(3, 5), ten=np.float32(10))
    model = loaded(proto)
    before = model.proto().SerializeToString()
    (skipped,) = fold_into_columns(model)
    assert isinstance(skipped, Skipped)
    assert "float32" in skipped.why
    assert model.proto().SerializeToString() == before
    folded(proto)


@pytest.mark.parametrize(
    ("added", "shape"),
    [("", ()), ("", (6, 1)), ("k = Add(v, kept)", ())],
    ids=["number", "by channel", "in front of what takes the shift"],
)
def test_statistics_on_the_way_are_of_what_is_there(added: str, shape: tuple[int, ...]) -> None:
    """The oracle is what a BatchNormalization tells of its result: its mean is beta."""
    known = statistics(6)
    rng = np.random.default_rng(1)
    gain, shift = (rng.uniform(1, 100, shape).astype(np.float32) for _ in range(2))
    body = f"""a = Conv(x, w) t = Reshape(a, flat) v = BatchNormalization(t, gamma, beta, mean, var) {added}
        m = Mul({"k" if added else "v"}, gain) n = Add(m, shift) y = Sigmoid(n)"""
    proto = network(
        body, x=(2, 4, 5, 5), w=(6, 4, 1, 1), flat=ints(2, 6, 25), kept=(1, 6, 25), gain=gain, shift=shift, **known
    )
    found = channel_stats_of(next(n for n in folded(proto).nodes() if n.op_type == "Reshape").outputs[0])
    assert found is not None
    wanted = known["beta"] * gain.reshape(-1) + (0 if added else shift.reshape(-1))
    np.testing.assert_allclose(found.mean, wanted, rtol=1e-6)


@needs("onnxruntime", "1.22", MOVES_CODES)
def test_nothing_of_a_levit_block_is_in_float() -> None:
    """MatMul, Reshape, BatchNormalization, Reshape; and behind it ConvNeXt's scale by channel."""
    body = """a = MatMul(x, w) b = Reshape(a, flat) c = BatchNormalization(b, gamma, beta, mean, var)
        d = Reshape(c, back) r = Relu(d) e = MatMul(r, v) f = Add(e, k) y = Mul(f, g)"""
    proto = network(
        body, x=(1, 6, 4), w=(4, 8), v=(8, 4), k=(4,), g=(4,), flat=ints(-1, 8), back=ints(1, 6, 8), **statistics(8)
    )
    result = quantized(proto, pictures((1, 6, 4))).check(25)
    assert result.audit.islands == ()


@needs("onnxruntime", "1.28", MOVES_CODES)
@pytest.mark.parametrize("node", ["Expand(c, n)", "Tile(c, n)"])
def test_expand_and_tile_move_codes(node: str) -> None:
    body = f"a = Conv(x, w) c = Relu(a) d = {node} y = Conv(d, v)"
    sizes = ints(2, 4, 6, 6) if "Expand" in node else ints(1, 1, 2, 2)
    result = quantized(network(body, x=(1, 3, 6, 6), w=(4, 3, 1, 1), v=(4, 4, 1, 1), n=sizes)).check(30)
    assert result.audit.islands == ()
    assert result.runs.count("QuantizeLinear") == 1
