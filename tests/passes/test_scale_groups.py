"""The oracle is ONNX Runtime: whatever scales the free classes get, the outputs stay the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qconv.ir.model import Model
from qconv.passes.equalize import apply_scales
from qconv.passes.fold import run_float_passes
from qconv.passes.scale_groups import ScaleGroups, _DisjointClasses, find_scale_groups
from qconv.planning.plan import DisjointSets
from tests.support.models import ints, loaded, network, random_feeds, run

FOUR = {"w": (4, 3, 1, 1), "b": (4,), "u": (2, 4, 1, 1)}
# name -> the network, and how many classes nothing holds in place
KINDS: dict[str, tuple[onnx.ModelProto, int]] = {
    "chain": (
        network("c = Conv(x, w, b) r = Relu(c) y = Conv(r, v)", w=(5, 3, 3, 3), b=(5,), v=(2, 5, 1, 1)),
        5,
    ),
    "residual": (
        network(
            "c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, v, e) q = Relu(d)"
            " f = Conv(q, u) a = Add(r, f) p = Relu(a) g = GlobalAveragePool(p) h = Flatten(g) y = Gemm(h, z)",
            **{"w": (4, 3, 3, 3), "b": (4,), "v": (6, 4, 3, 3), "e": (6,), "u": (4, 6, 1, 1), "z": (4, 2)},
        ),
        10,  # the stream of 4 and the 6 inside the branch
    ),
    "depthwise": (
        network(
            "c = Conv(x, w, b) r = Relu(c) d = Conv<group=4>(r, v, e) q = Relu(d) y = Conv(q, u)",
            w=(4, 3, 1, 1), b=(4,), v=(4, 1, 3, 3), e=(4,), u=(2, 4, 1, 1),
        ),
        8,
    ),
    "grouped": (
        network(
            "c = Conv(x, w, b) r = Relu(c) d = Conv<group=2>(r, v, e) q = Relu(d) y = Conv<group=2>(q, u)",
            w=(4, 3, 1, 1), b=(4,), v=(6, 2, 3, 3), e=(6,), u=(2, 3, 1, 1),
        ),
        10,
    ),
    "concat": (
        network(
            "c = Conv(x, w) d = Conv(x, v) r = Relu(c) k = Concat<axis=1>(r, d) m = MaxPool<kernel_shape=[2,2]>(k)"
            " y = Conv(m, u)",
            w=(2, 3, 1, 1), v=(3, 3, 1, 1), u=(2, 5, 1, 1),
        ),
        5,
    ),
    "split and slice": (
        network(
            "c = Conv(x, w) s, t = Split<axis=1>(c, parts) a = Add(s, t) k = Slice(a, begin, end, one)"
            " y = Conv(k, u)",
            opset=17, w=(6, 3, 1, 1), parts=ints(3, 3), begin=ints(1), end=ints(3), one=ints(1), u=(2, 2, 1, 1),
        ),
        3,  # three pairs of channels, one of which nobody reads
    ),
    "channels padded": (
        network(
            "c = Conv(x, w) p = Pad(c, pads) d = Conv(x, v) a = Add(p, d) y = Conv(a, u)",
            w=(2, 3, 1, 1), pads=ints(0, 1, 0, 0, 0, 1, 0, 0), v=(4, 3, 1, 1), u=(2, 4, 1, 1),
        ),
        4,
    ),
    "leaky": (
        network(
            "c = Conv(x, w, b) r = LeakyRelu<alpha=0.1>(c) d = Conv(r, v, e) q = PRelu(d, slope) y = Conv(q, u)",
            w=(4, 3, 1, 1), b=(4,), v=(5, 4, 1, 1), e=(5,), slope=(5, 1, 1), u=(2, 5, 1, 1),
        ),
        9,
    ),
    "Gemm": (
        network(
            "f = Flatten(x) c = Gemm(f, w, b) r = Relu(c) d = Gemm<transB=1>(r, v, e) q = Relu(d) y = MatMul(q, u)",
            w=(108, 7), b=(7,), v=(5, 7), e=(5,), u=(5, 2),
        ),
        12,
    ),
    "flattened maps": (
        network("c = Conv(x, w, b) r = Relu(c) f = Flatten(r) y = Gemm(f, v)", w=(4, 3, 3, 3), b=(4,), v=(64, 2)),
        4,
    ),
    "transposed": (
        network(
            "c = Conv(x, w, b) r = Relu(c) d = ConvTranspose<strides=[2,2], group=2>(r, v, e) q = Relu(d)"
            " y = Conv(q, u)",
            w=(4, 3, 1, 1), b=(4,), v=(4, 3, 2, 2), e=(6,), u=(2, 6, 1, 1),
        ),
        10,
    ),
    "gate": (
        network(
            "c = Conv(x, w, b) r = Relu(c) g = GlobalAveragePool(r) s = Conv(g, v, e) t = Sigmoid(s) m = Mul(r, t)"
            " y = Conv(m, u)",
            w=(4, 3, 1, 1), b=(4,), v=(4, 4, 1, 1), e=(4,), u=(2, 4, 1, 1),
        ),
        4,
    ),
    "resized": (
        network(
            'c = Conv(x, w, b) r = Resize<mode="linear">(c, , scales) k = ReduceMean<axes=[2,3], keepdims=1>(r)'
            " y = Conv(k, u)",
            w=(4, 3, 1, 1), b=(4,), scales=np.float32([1, 1, 2, 2]), u=(2, 4, 1, 1),
        ),
        4,
    ),
    "depth to space": (
        network(
            "c = Conv(x, w, b) d = DepthToSpace<blocksize=2>(c) y = Conv(d, u)",
            w=(8, 3, 1, 1), b=(8,), u=(2, 2, 1, 1),
        ),
        2,
    ),
    # what no factor goes through
    "SiLU": (network("c = Conv(x, w, b) s = Sigmoid(c) m = Mul(c, s) y = Conv(m, u)", **FOUR), 0),
    "HardSwish": (network("c = Conv(x, w, b) m = HardSwish(c) y = Conv(m, u)", **FOUR), 0),
    "square": (network("c = Conv(x, w, b) m = Mul(c, c) y = Conv(m, u)", **FOUR), 0),
    "returned": (network("c = Conv(x, w, b) r = Relu(c) y = Conv(r, u)", outputs=("y", "r"), **FOUR), 0),
    "input added": (
        network("c = Conv(x, w, b) r = Relu(c) a = Add(r, x) y = Conv(a, u)", w=(3, 3, 1, 1), b=(3,), u=(2, 3, 1, 1)),
        0,
    ),
    "padded with ones": (
        network(
            "c = Conv(x, w, b) p = Pad(c, pads, one) y = Conv(p, u)",
            pads=ints(0, 0, 1, 1, 0, 0, 1, 1), one=1.0, **FOUR,
        ),
        0,
    ),
    "shuffled": (
        network(
            "c = Conv(x, w, b) r = Relu(c) k = Reshape(r, apart) t = Transpose<perm=[0,2,1,3,4]>(k)"
            " m = Reshape(t, back) y = Conv(m, u)",
            apart=ints(2, 2, 2, 6, 6), back=ints(2, 4, 6, 6), **FOUR,
        ),
        4,  # the shuffle went into the weights
    ),
    "mixed with places": (
        network(
            "c = Conv(x, w, b) k = Transpose<perm=[0,2,1,3]>(c) m = Reshape(k, back) y = Conv(m, u)",
            back=ints(2, 4, 6, 6), **FOUR,
        ),
        0,
    ),
}  # fmt: skip


def drawn(groups: ScaleGroups) -> np.ndarray:
    """Scales from 1/4 to 4 for all classes that are free, Clips aside."""
    rng = np.random.default_rng(0)
    s = np.where(groups.fixed, 1.0, 4.0 ** rng.uniform(-1, 1, groups.fixed.size))
    for limit in groups.limits:
        s[groups.of[limit.value]] = 1.0
    return s


def scaled(proto: onnx.ModelProto) -> tuple[Model, ScaleGroups]:
    model = loaded(proto)
    run_float_passes(model)
    groups = find_scale_groups(model)
    apply_scales(model, groups, drawn(groups))
    return model, groups


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_changes_no_output(kind: str) -> None:
    proto, free = KINDS[kind]
    model, groups = scaled(proto)
    assert int((~groups.fixed).sum()) == free
    feeds = random_feeds(proto)
    before, after = run(proto, feeds), run(model, feeds)
    for name, expected in before.items():
        np.testing.assert_allclose(after[name], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_scaling_changes_weights() -> None:
    """Else the test above would prove nothing."""
    proto, _ = KINDS["residual"]
    model, _ = scaled(proto)
    untouched = loaded(proto)
    run_float_passes(untouched)
    for now, then in zip(model.nodes(), untouched.nodes(), strict=True):
        if now.op_type == "Conv":
            a, b = (node.inputs[1].const_value.numpy() for node in (now, then))  # type: ignore[union-attr]
            assert not np.allclose(a, b)


def test_a_stream_is_one_component_over_its_blocks() -> None:
    """By hand: c, r, f, a, p, g and h carry the stream; d and q are inside the branch; the input and y are outside."""
    model = loaded(KINDS["residual"][0])
    run_float_passes(model)
    groups = find_scale_groups(model)
    of = {value.name: classes.tolist() for value, classes in groups.of.items()}
    assert of["c"] == of["r"] == of["f"] == of["a"] == of["p"] == of["g"] == of["h"]
    assert of["d"] == of["q"]
    assert set(of["c"]).isdisjoint(of["d"])
    assert len(set(groups.component[of["c"]])) == 1
    assert groups.fixed[of["y"]].all()


def test_a_depthwise_layer_parts_its_input_from_its_output() -> None:
    model = loaded(KINDS["depthwise"][0])
    groups = find_scale_groups(model)
    of = {value.name: set(classes.tolist()) for value, classes in groups.of.items()}
    assert of["r"].isdisjoint(of["d"])


def test_what_holds_a_component_is_told() -> None:
    model = loaded(KINDS["HardSwish"][0])
    groups = find_scale_groups(model)
    assert "HardSwish hands no factor on" in groups.reasons.values()


def test_the_bounds_of_a_clip_are_limits() -> None:
    proto = network(
        "c = Conv(x, w, b) r = Clip(c, low, high) y = Conv(r, u)",
        w=(4, 3, 1, 1), b=(4,), low=0.0, high=6.0, u=(2, 4, 1, 1),
    )  # fmt: skip
    groups = find_scale_groups(loaded(proto))
    (limit,) = groups.limits
    assert (limit.value.name, limit.low, limit.high) == ("r", 0.0, 6.0)


def test_a_tensor_that_a_body_reads_stays() -> None:
    proto = network("c = Conv(x, w, b) r = Relu(c) y = Conv(r, u)", w=(4, 3, 1, 1), b=(4,), u=(2, 4, 1, 1))
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["r"], ["i"])], "body", [], [onnx.ValueInfoProto(name="i")]
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    proto.graph.node.append(onnx.helper.make_node("If", ["yes"], ["z"], name="z", then_branch=body, else_branch=body))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [2, 4, 6, 6]))
    groups = find_scale_groups(loaded(proto))
    assert all(groups.fixed[classes].all() for value, classes in groups.of.items() if value.name == "r")


@pytest.mark.parametrize("seed", range(20))
def test_whole_arrays_are_joined_like_one_class_after_the_other(seed: int) -> None:
    """Against plain union-find: pairs, stars and chains, with classes fixed and added in between."""
    rng = np.random.default_rng(seed)
    arrays, plain, fixed = _DisjointClasses(), DisjointSets[int](), set[int]()
    for step in range(12):
        arrays.make_sets(int(rng.integers(1, 12)))
        size = int(rng.integers(1, 8))
        these, those = rng.integers(0, arrays.count, (2, size))
        if step % 3 == 0:
            these = these[:1]
        elif step % 3 == 1:
            these = np.minimum(those + 1, arrays.count - 1)
        arrays.union(these, those)
        for one, other in zip(np.broadcast_to(these, those.shape).tolist(), those.tolist(), strict=True):
            plain.union(one, other)
        if step % 4 == 0:
            arrays.fix(those[:1], f"why {step}")
            fixed.add(int(those[0]))
    every = np.arange(arrays.count)
    expected = np.array([plain.root(one) for one in every.tolist()])
    roots = arrays.roots(every)
    np.testing.assert_array_equal(roots, [every[expected == root].min() for root in expected])
    held = [bool(fixed & set(every[expected == root].tolist())) for root in expected]
    np.testing.assert_array_equal(arrays.why_fixed(every) > 0, held)


def test_the_first_reason_of_a_set_stays() -> None:
    classes = _DisjointClasses()
    classes.make_sets(4)
    classes.fix(np.array([1]), "one")
    classes.fix(np.array([2]), "two")
    classes.fix(np.array([1]), "later")
    classes.union(np.array([2, 0]), np.array([1, 3]))  # the reason of what is joined to comes first
    assert [classes.whys[why] for why in classes.why_fixed(np.arange(4))] == ["", "two", "two", ""]
