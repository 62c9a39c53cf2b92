"""Channel shuffles: the network gives the same numbers without them. Oracle: ONNX Runtime, its optimizations off."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qconv.ir.layers import channel_stats_of
from tests.support.folded import folded
from tests.support.libraries import MOVES_CODES, needs
from tests.support.models import ints, network, statistics
from tests.support.quantized import SAME, quantized

DRAWN = int(os.environ.get("QCONV_DRAWN_GRAPHS", "60"))
"""How many networks are drawn; more to search for faults."""

CHANNELS, SIDE = 12, 6

SHUFFLES = {
    "five axes": "s1 = Reshape(a, five) s2 = Transpose<perm=[0,2,1,3,4]>(s1) b = Reshape(s2, four)",
    "five axes, three groups": "s1 = Reshape(a, five3) s2 = Transpose<perm=[0,2,1,3,4]>(s1) b = Reshape(s2, four)",
    "three axes": "s1 = Reshape(a, three) s2 = Transpose<perm=[1,0,2]>(s1) b = Reshape(s2, four1)",
    "zeros and rest": "s1 = Reshape(a, rest) s2 = Transpose<perm=[0,2,1,3]>(s1) b = Reshape(s2, four0)",
    "through unsqueeze": """s0 = Unsqueeze(a, two) s1 = Reshape(s0, five) s2 = Transpose<perm=[0,2,1,3,4]>(s1)
        b = Reshape(s2, four)""",
    "twice": """s1 = Reshape(a, five) s2 = Transpose<perm=[0,2,1,3,4]>(s1) s3 = Reshape(s2, four)
        s4 = Reshape(s3, five) s5 = Transpose<perm=[0,2,1,3,4]>(s4) b = Reshape(s5, four)""",
    "there and back": """s1 = Reshape(a, five) s2 = Transpose<perm=[0,2,1,3,4]>(s1) s3 = Reshape(s2, four)
        s4 = Reshape(s3, back) s5 = Transpose<perm=[0,2,1,3,4]>(s4) b = Reshape(s5, four)""",
    "gather": "b = Gather<axis=1>(a, order)",
    "turned over": "b = Slice(a, minus, start, one, minus)",
    "width and height": "b = Transpose<perm=[0,1,3,2]>(a)",
    "channels and width": "s1 = Transpose<perm=[0,3,2,1]>(a) b = Reshape(s1, four)",
}
HALVES = {
    "halves": "c, d = Split<axis=1>(b)",
    "cuts": "c = Slice(b, zero, six, one) d = Slice(b, six, far, one)",
    "stack": "h1 = Reshape(b, halves) c = Gather<axis=1>(h1, zeroth) d = Gather<axis=1>(h1, first)",
    "squeezed": "h1 = Reshape(b, halves) h2, h3 = Split<axis=1>(h1) c = Squeeze(h2, one) d = Squeeze(h3, one)",
    "odd and even": "c = Slice(b, zero, far, one, two) d = Slice(b, one, far, one, two)",
}
"""What ShuffleNet V2 makes of the result: two halves."""
WRITERS = {
    "conv": f"a = Conv<{SAME}>(x, w, k)",
    "relu": f"p = Conv<{SAME}>(x, w, k) a = Relu(p)",
    "groups": f"p = Conv<{SAME}>(x, w, k) a = Conv<group=3>(p, w3)",
    "depthwise": f"p = Conv<{SAME}>(x, w, k) q = Conv<group=12, {SAME}>(p, dw, k) a = Clip(q, zero_f, six_f)",
    "joined": f"p = Conv<{SAME}>(x, v6) q = Conv<{SAME}>(x, u6) r = Relu(q) a = Concat<axis=1>(p, r)",
    "read by others": f"a = Conv<{SAME}>(x, w, k) z = Sigmoid(a)",
}
READERS = {
    "conv": f"y = Conv<{SAME}>(b, w2)",
    "two layers": f"e = Conv<{SAME}>(b, w2) f = Conv(b, p2) g = GlobalAveragePool(f) y = Add(e, g)",
    "depthwise": f"e = Conv<group=12, {SAME}>(b, dw, k) f = Relu(e) y = Conv<{SAME}>(f, w2)",
    "groups": "y = Conv<group=3>(b, w3)",
    "pooled": "e = GlobalAveragePool(b) f = Flatten(e) y = Gemm<transB=1>(f, m)",
    "flattened": "e = MaxPool<kernel_shape=[2,2], strides=[2,2]>(b) f = Flatten(e) y = Gemm<transB=1>(f, m9)",
    "returned": "y = LeakyRelu(b)",
    "itself": "y = Identity(b)",
    "product": "e = Sigmoid(b) y = Mul(b, e)",
}
HALF_READERS = {
    "unit": f"e = Conv(d, n6) f = Relu(e) g = Conv<group=6, {SAME}>(f, dw6) h = Conv(g, n6) y = Concat<axis=1>(c, h)",
    "layers": "e = Conv(c, n6) f = Conv(d, n6) y = Add(e, f)",
    "product": "e = Sigmoid(c) y = Mul(d, e)",
}
ALONE_IN_LAYERS = {"conv", "two layers", "depthwise", "pooled", "flattened"}


def shuffled(seed: int) -> tuple[onnx.ModelProto, dict[str, str]]:
    rng = np.random.default_rng(seed)
    drawn = {name: str(rng.choice(list(of))) for name, of in (("writer", WRITERS), ("shuffle", SHUFFLES))}
    batch: int | str = 1 if drawn["shuffle"] == "three axes" or rng.integers(2) else "N"
    body = f"{WRITERS[drawn['writer']]} {SHUFFLES[drawn['shuffle']]}"
    if rng.integers(2):
        drawn |= {"halves": str(rng.choice(list(HALVES))), "reader": str(rng.choice(list(HALF_READERS)))}
        body += f" {HALVES[drawn['halves']]} {HALF_READERS[drawn['reader']]}"
    else:
        drawn["reader"] = str(rng.choice(list(READERS)))
        body += f" {READERS[drawn['reader']]}"
    rest, open_batch = -1 if batch == "N" else 1, 0 if batch == "N" else 1
    proto = network(
        body,
        x=(batch, 3, SIDE, SIDE),
        outputs=("y", "z") if drawn["writer"] == "read by others" else ("y",),
        w=(12, 3, 3, 3),
        k=(12,),
        w2=(5, 12, 3, 3),
        p2=(5, 12, 1, 1),
        w3=(12, 4, 1, 1),
        dw=(12, 1, 3, 3),
        dw6=(6, 1, 3, 3),
        v6=(6, 3, 3, 3),
        u6=(6, 3, 3, 3),
        n6=(6, 6, 1, 1),
        m=(5, 12),
        m9=(5, 108),
        five=ints(rest, 2, 6, 6, 6),
        five3=ints(open_batch, 3, 4, 6, 6),
        back=ints(rest, 6, 2, 6, 6),
        four=ints(rest, 12, 6, 6),
        four1=ints(1, 12, 6, 6),
        four0=ints(open_batch, 12, 6, -1),
        three=ints(6, 2, 36),
        rest=ints(0, 3, 4, -1),
        halves=ints(rest, 2, 6, 6, 6),
        order=rng.permutation(12),
        zeroth=np.array(0),
        first=np.array(1),
        zero=ints(0),
        one=ints(1),
        two=ints(2),
        six=ints(6),
        far=ints(np.iinfo(np.int64).max),
        start=ints(-100),
        minus=ints(-1),
        zero_f=0.0,
        six_f=6.0,
    )
    return proto, drawn


@pytest.mark.parametrize("seed", range(DRAWN))
def test_numbers_stay_and_shuffles_go(seed: int) -> None:
    proto, drawn = shuffled(seed)
    found = Counter(node.op_type for node in folded(proto).nodes())
    if drawn["shuffle"] in ("width and height", "channels and width"):
        assert found["Transpose"] == 1
        return
    assert found["Transpose"] == 0
    moved = sum(found[op] for op in ("Gather", "Slice", "Split", "Reshape", "Squeeze", "Unsqueeze"))
    if "halves" not in drawn:
        alone = drawn["reader"] in ALONE_IN_LAYERS or drawn["writer"] in ("conv", "relu", "depthwise", "groups")
        assert moved == (0 if alone or drawn["shuffle"] == "there and back" else 1)
    else:
        assert moved <= 2


@needs("onnxruntime", "1.22", MOVES_CODES)
def test_shuffles_that_stay_move_codes() -> None:
    """A unit of ShuffleNet V2: nothing of it is in float."""
    unit = """s1 = Reshape(a, five) s2 = Transpose<perm=[0,2,1,3,4]>(s1) b = Reshape(s2, four) c, d = Split<axis=1>(b)
        e = Conv(d, n6) f = Relu(e) g = Conv<group=6, pads=[1,1,1,1]>(f, dw6) h = Conv(g, n6)
        j = Concat<axis=1>(c, h)"""
    shapes = {"w": (12, 3, 3, 3), "n6": (6, 6, 1, 1), "dw6": (6, 1, 3, 3), "v": (5, 12, 1, 1)}
    sizes = {"five": ints(0, 2, 6, 6, 6), "four": ints(0, 12, 6, 6)}
    body = f"p = Conv<{SAME}>(x, w) a = Relu(p) {unit} y = Conv(j, v)"
    result = quantized(network(body, x=(1, 3, 6, 6), **shapes, **sizes)).check(15)
    assert result.audit.float == 0
    assert result.runs.count("Gather") == 2
    assert not {"Reshape", "Split"} & set(result.runs)


@pytest.mark.parametrize("index", [ints(1, 3, 5), ints(0, 0, 2), ints(11, 4)], ids=str)
@pytest.mark.parametrize("layer_first", [True, False])
def test_a_shuffle_that_a_layer_reads_beside_a_selection(layer_first: bool, index: NDArray[np.int64]) -> None:
    """What moves for one reader may be gone when the other's turn comes."""
    readers = ["y = Conv(t, p)", "z = Gather<axis=1>(t, index)"]
    body = f"""a = Conv(x, w) b = Relu(a) q = Reshape(b, five) r = Transpose<perm=[0,2,1,3,4]>(q) t = Reshape(r, four)
        {" ".join(readers if layer_first else readers[::-1])}"""
    sizes = {"five": ints(0, 3, 4, 6, 6), "four": ints(0, 12, 6, 6), "index": index}
    folded(network(body, x=(1, 3, 6, 6), outputs=("y", "z"), w=(12, 3, 1, 1), p=(5, 12, 1, 1), **sizes))


def test_depthwise_layers_take_the_order_on() -> None:
    """W D x[order] = W' D' x: the weights of both are in another order, and nothing is left of the shuffle."""
    body = f"a = Conv(x, w) b = Gather<axis=1>(a, order) e = Conv<group=12, {SAME}>(b, dw) y = Conv(e, p)"
    order = np.random.default_rng(0).permutation(12)
    weights = {"w": (12, 3, 1, 1), "dw": (12, 1, 3, 3), "p": (5, 12, 1, 1)}
    model = folded(network(f"{body} z = Sigmoid(a)", outputs=("y", "z"), order=order, **weights))
    assert Counter(node.op_type for node in model.nodes()) == {"Conv": 3, "Sigmoid": 1}
    held = next(value for value in model.graph.initializers.values() if list(value.shape or ()) == [12, 1, 3, 3])
    own = next(
        onnx.numpy_helper.to_array(t) for t in network(body, order=order, **weights).graph.initializer if t.name == "dw"
    )
    assert held.const_value is not None
    np.testing.assert_array_equal(held.const_value.numpy()[order], own)


def test_statistics_keep_the_order_of_the_channels() -> None:
    """What a BatchNormalization behind the shuffle knows goes to the layer in front, whose order is another."""
    body = """a = Conv<group=2>(x, w) p = Reshape(a, five) q = Transpose<perm=[0,2,1,3,4]>(p) b = Reshape(q, four)
        n = BatchNormalization(b, gamma, beta, mean, var) r = Relu(n) y = Conv(r, v)"""
    sizes = {"five": ints(2, 2, 3, 6, 6), "four": ints(2, 6, 6, 6)}
    known = statistics(6)
    proto = network(body, x=(2, 4, 6, 6), w=(6, 2, 1, 1), v=(4, 6, 1, 1), **sizes, **known)
    layer = folded(proto).nodes()[0]
    assert layer.op_type == "Conv"
    found = channel_stats_of(layer.outputs[0])
    assert found is not None
    order = np.arange(6).reshape(2, 3).T.reshape(-1)
    np.testing.assert_allclose(found.mean[order], known["beta"], rtol=1e-5)  # it has taken the BatchNormalization in
