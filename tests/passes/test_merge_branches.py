"""The oracle is ONNX Runtime: it runs the model before and after, its own optimizations off."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qconv.data_free.propagation import propagate_stats
from qconv.errors import Change, Skipped
from qconv.ir.channel_stats import ChannelDistribution
from qconv.ir.layers import input_means_of
from qconv.ir.model import Model, attribute, constant_array
from qconv.passes.fold import run_float_passes
from qconv.planning.work import count_weights
from tests.passes.test_fold import folded
from tests.support.models import loaded, network, op_types, statistics

BN, NORM = "BatchNormalization", "gamma, beta, mean, var"
X = (2, 4, 6, 6)
SAME = "pads=[1,1,1,1]"
K3, K1, D3, D1 = (4, 4, 3, 3), (4, 4, 1, 1), (4, 1, 3, 3), (4, 1, 1, 1)
NORMED = statistics(4)


def normed(*layers: str) -> str:
    """Each layer, which reads x, with a BatchNormalization behind it: branches n0, n1 and so on."""
    lines = [f"k{i} = {layer} n{i} = {BN}(k{i}, {NORM})" for i, layer in enumerate(layers)]
    return " ".join(lines)


C3, C1 = f"Conv<{SAME}>(x, w)", "Conv(x, u)"
DW3, DW1 = f"Conv<{SAME}, group=4>(x, d)", "Conv<group=4>(x, e)"

MERGED = {
    # the blocks that papers train
    "RepVGG": (network(f"{normed(C3, C1)} i = {BN}(x, {NORM}) a = Add(n0, n1) s = Add(a, i) y = Relu(s)",
                       X, w=K3, u=K1, **NORMED), "Conv Relu"),
    "RepVGG at stride 2": (
        network("a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w, b) c = Conv<strides=[2,2]>(x, u, v) y = Add(a, c)",
                X, w=(5, 4, 3, 3), u=(5, 4, 1, 1), b=(5,), v=(5,)), "Conv"),
    "MobileOne": (
        network(f"{normed(DW3, DW3, DW3, DW1)} i = {BN}(x, {NORM}) z = Add(i, o) a = Add(n3, z) b = Add(a, n0)"
                " c = Add(b, n1) s = Add(c, n2) y = Relu(s)", X, d=D3, e=D1, o=0.0, **NORMED), "Conv Relu"),
    "RepViT": (
        network(f"{normed(DW3)} c = Conv<group=4>(x, e, f) a = Add(n0, c) s = Add(a, x) y = {BN}(s, {NORM})",
                X, d=D3, e=D1, f=(4,), **NORMED), "Conv"),
    "FastViT": (
        network(f"{normed(DW3, DW1)} i = {BN}(x, {NORM}) a = Add(n0, n1) m = Add(a, i) j = {BN}(x, {NORM})"
                " s = Sub(m, j) g = Mul(k, s) y = Add(x, g)", X, d=D3, e=D1, k=(4, 1, 1), **NORMED), "Conv"),
    "ACNet": (
        network(f"{normed('Conv<pads=[1,0,1,0]>(x, v)', 'Conv<pads=[0,1,0,1]>(x, h)', C3)} a = Add(n0, n1)"
                " y = Add(a, n2)", X, v=(4, 4, 3, 1), h=(4, 4, 1, 3), w=K3, **NORMED), "Conv"),
    # kinds of sums
    "sum of three": (network(f"a = {C3} b = {C1} y = Sum(a, x, b)", X, w=K3, u=K1), "Conv"),
    "difference": (network(f"a = {C3} b = {C1} y = Sub(b, a)", X, w=K3, u=K1), "Conv"),
    "minus the layer": (network(f"a = {C3} y = Sub(x, a)", X, w=K3), "Conv"),
    "negated": (network(f"a = {C3} n = Neg(a) y = Add(n, x)", X, w=K3), "Conv"),
    "difference of differences": (
        network(f"a = {C3} b = {C1} s = Sub(a, b) c = {C1} y = Sub(c, s)", X, w=K3, u=K1), "Conv"),
    "scaled by one number": (network(f"a = {C3} m = Mul(x, half) y = Add(a, m)", X, w=K3, half=0.5), "Conv"),
    "scaled by channel": (network(f"a = {C3} m = Div(x, k) y = Add(m, a)", X, w=K3, k=(4, 1, 1)), "Conv"),
    "constant minus x": (network(f"a = {C3} m = Sub(k, x) y = Add(m, a)", X, w=K3, k=(1, 4, 1, 1)), "Conv"),
    "scale and shift": (network(f"a = {C3} m = Mul(x, k) n = Add(m, l) y = Add(n, a)", X, w=K3, k=(4, 1, 1), l=2.0),
                        "Conv"),
    "another term between": (
        network(f"a = {C3} z = Sigmoid(x) s = Sub(a, z) b = {C1} t = Add(s, b) q = Tanh(x) y = Sub(t, q)",
                X, w=K3, u=K1), "Conv Sigmoid Tanh Sub Sub"),
    "two inputs": (
        network(f"z = Sigmoid(x) a = {C3} b = Conv(z, u) c = {C1} d = Conv(z, t) s = Add(a, b) r = Add(c, d)"
                " y = Add(s, r)", X, w=K3, u=K1, t=K1), "Sigmoid Conv Conv Add"),
    "x behind an activation": (network(f"z = Relu(x) a = Conv<{SAME}>(z, w) y = Add(z, a)", X, w=K3), "Relu Conv"),
    # kernels, pads, dilations, groups, axes
    "x among many large weights": (network(f"a = {C3} y = Add(a, x)", (1, 32, 6, 6), w=(32, 32, 3, 3)), "Conv"),
    "1 place, x added": (network(f"a = {C1} y = Add(a, x)", X, u=K1), "Conv"),
    "dilated 3x3 and 1x1": (
        network(f"a = Conv<pads=[2,2,2,2], dilations=[2,2]>(x, w) b = {C1} y = Add(a, b)", X, w=K3, u=K1), "Conv"),
    "dilated 3 in a plain 5": (
        network("a = Conv<pads=[2,2,2,2]>(x, w) b = Conv<pads=[2,2,2,2], dilations=[2,2]>(x, u) y = Add(a, b)",
                X, w=(4, 4, 5, 5), u=K3), "Conv"),
    "1x1 with a dilation of its own": (
        network(f"a = {C3} b = Conv<dilations=[3,3]>(x, u) y = Add(a, b)", X, w=K3, u=K1), "Conv"),
    "uneven pads": (
        network("a = Conv<pads=[0,1,2,1]>(x, w) b = Conv(x, u) y = Add(a, b)", X, w=K3, u=K1), "Conv"),
    "even kernel": (network("a = Conv<pads=[1,0,0,1]>(x, w) y = Add(a, x)", X, w=(4, 4, 2, 2)), "Conv"),
    "3x3 and 5x5": (network(f"a = {C3} b = Conv<pads=[2,2,2,2]>(x, u) y = Add(a, b)", X, w=K3, u=(4, 4, 5, 5)), "Conv"),
    "depthwise 3 in depthwise 7": (
        network(f"a = {DW3} b = Conv<pads=[3,3,3,3], group=4>(x, u) y = Add(a, b)", X, d=D3, u=(4, 1, 7, 7)), "Conv"),
    "SAME": (network(f'a = Conv<auto_pad="SAME_UPPER">(x, w) b = {C1} y = Add(a, b)', X, w=(4, 4, 4, 3), u=K1), "Conv"),
    "SAME at stride 2": (
        network('a = Conv<auto_pad="SAME_LOWER", strides=[2,2]>(x, w) b = Conv<strides=[2,2]>(x, u) y = Add(a, b)',
                X, w=K3, u=K1), "Conv"),
    "pads that an even size leaves over": (
        network("a = Conv<pads=[0,0,1,1], strides=[2,2]>(x, w) b = Conv<strides=[2,2]>(x, u) y = Add(a, b)",
                X, w=K3, u=K1), "Conv"),
    "VALID": (network('a = Conv<auto_pad="VALID">(x, w) b = Conv(x, u) y = Add(a, b)', X, w=K3, u=K3), "Conv"),
    "groups and dense": (network(f"a = {C3} b = Conv<group=2>(x, u) y = Add(a, b)", X, w=K3, u=(4, 2, 1, 1)), "Conv"),
    "2 and 4 groups": (
        network(f"a = Conv<{SAME}, group=2>(x, w) b = {DW1} y = Add(a, b)", X, w=(4, 2, 3, 3), e=D1), "Conv"),
    "x into groups": (network(f"a = Conv<{SAME}, group=2>(x, w) y = Add(a, x)", X, w=(4, 2, 3, 3)), "Conv"),
    "two outputs a group": (
        network(f"a = Conv<{SAME}, group=4>(x, w) b = Conv<group=4>(x, u) y = Add(a, b)",
                X, w=(8, 1, 3, 3), u=(8, 1, 1, 1)), "Conv"),
    "1 axis": (network("a = Conv<pads=[1,1]>(x, w) b = Conv(x, u) c = Add(a, b) y = Add(c, x)",
                       (2, 4, 9), w=(4, 4, 3), u=(4, 4, 1)), "Conv"),
    "3 axes": (network("a = Conv<pads=[1,1,1,1,1,1]>(x, w) b = Conv(x, u) y = Add(a, b)",
                       (1, 2, 4, 4, 4), w=(2, 2, 3, 3, 3), u=(2, 2, 1, 1, 1)), "Conv"),
    "open sizes": (network(f"a = {C3} b = {C1} y = Add(a, b)", ("N", 4, "H", "W"), w=K3, u=K1), "Conv"),
    "Gemms": (network("a = Gemm(x, w, b) c = Gemm<transB=1, alpha=0.5>(x, u) s = Add(a, c) y = Mul(s, half)",
                      (3, 5), w=(5, 4), u=(4, 5), b=(4,), half=0.5), "Gemm"),
    "x and a Gemm": (network("a = Gemm<transB=1>(x, w) y = Sub(x, a)", (3, 5), w=(5, 5)), "Gemm"),
}  # fmt: skip


@pytest.mark.parametrize("case", MERGED)
def test_merged_exactly(case: str) -> None:
    proto, expected = MERGED[case]
    model, findings = folded(proto)
    assert op_types(model) == expected
    assert any(isinstance(finding, Change) and finding.step == "merge" for finding in findings)


def test_the_largest_kernel_keeps_its_name() -> None:
    """And its weights are the sum, worked out by hand: 1 in the middle from x, 2 from the 1x1."""
    ones = np.ones((1, 1, 3, 3), np.float32)
    proto = network(f"one = Conv(x, u) three = Conv<{SAME}>(x, w, b) s = Add(one, three) y = Sub(s, x)", (1, 1, 4, 4),
                    u=2 * ones[:, :, :1, :1], w=ones, b=np.float32([5]))  # fmt: skip
    model, findings = folded(proto)
    (conv,) = model.nodes()
    assert conv.name == "three"
    numbers = constant_array(conv.inputs[1])
    assert numbers is not None
    assert numbers.tolist() == [[[[1, 1, 1], [1, 2, 1], [1, 1, 1]]]]
    assert Change("merge", "three", "Conv one and tensor x merged into it", "parallel branches merged into Conv") in [
        Change(f.step, f.where, f.what.replace(", ", " and "), f.kind) for f in findings if isinstance(f, Change)
    ]


SMALL = np.random.default_rng(0).normal(0, 0.01, (32, 32, 3, 3)).astype(np.float32)
REFUSED = {
    "other strides": (
        network("a = Conv<strides=[2,2]>(x, w) b = Conv<strides=[1,2]>(x, w) y = Add(a, b)", (2, 4, 1, 6), w=K1),
        "Conv b has other strides than Conv a"),
    "open sizes that pads leave over": (
        network("a = Conv<pads=[0,0,1,1], strides=[2,2]>(x, w) b = Conv<strides=[2,2]>(x, u) y = Add(a, b)",
                ("N", 4, "H", "W"), w=K3, u=K1),
        "Conv b pads to another size than Conv a"),
    "SAME of an open size": (
        network('a = Conv<auto_pad="SAME_LOWER", strides=[2,2]>(x, w) b = Conv<strides=[2,2]>(x, u) y = Add(a, b)',
                ("N", 4, "H", "W"), w=K3, u=K1),
        "Conv a pads as its input's size asks for (auto_pad), which is open"),
    "other dilations": (
        network(f"a = {C3} b = Conv<pads=[2,2,2,2], dilations=[2,2]>(x, u) y = Add(a, b)", X, w=K3, u=K3),
        "Conv b has other dilations than Conv a"),
    "x between the taps": (
        network("a = Conv<pads=[1,1,1,1], dilations=[2,2]>(x, w) y = Add(a, x)", X, w=(4, 4, 2, 2)),
        "tensor x and Conv a take fewer multiplications apart"),
    "x among many small weights": (
        network(f"a = {C3} y = Add(a, x)", (1, 32, 6, 6), w=SMALL),
        "tensor x as one tap of Conv a would leave too few of 8 bits for the other weights"),
    "columns and rows": (
        network("a = Conv<pads=[1,0,1,0]>(x, v) b = Conv<pads=[0,1,0,1]>(x, h) y = Add(a, b)",
                X, v=(4, 4, 3, 1), h=(4, 4, 1, 3)),
        "Conv b and Conv a take fewer multiplications apart"),
    "depthwise beside dense": (
        network(f"a = {C1} b = {DW3} y = Add(a, b)", X, u=K1, d=D3),
        "Conv a and Conv b take fewer multiplications apart"),
    "returned": (
        network(f"a = {C3} b = {C1} y = Add(a, b)", X, outputs=("y", "b"), w=K3, u=K1),
        "the model returns the output of Conv b"),
    "another reader": (
        network(f"a = {C3} b = {C1} s = Add(a, b) r = Relu(b) y = Mul(s, r)", X, w=K3, u=K1),
        "something else reads the output of Conv b"),
    "more channels": (
        network(f"a = {C3} b = Conv(x, u) y = Add(a, b)", X, w=K3, u=(1, 4, 1, 1)),
        "Conv b has another number of channels than Conv a"),
    "computed weights": (
        network(f"t = ReduceMean<keepdims=0>(x) w = Mul(v, t) a = {C3} b = {C1} y = Add(a, b)", X, v=K3, u=K1),
        "the weights of Conv a are computed"),
    "too large": (
        network(f"a = {C3} b = {C3} y = Add(a, b)", X, w=np.full(K3, 3e38, np.float32)),
        "Conv a would get numbers that float32 does not have"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case: str) -> None:
    proto, why = REFUSED[case]
    model = loaded(proto)
    before = op_types(model)
    findings = run_float_passes(model)
    place = next(node.output[0] for node in proto.graph.node if node.op_type == "Add")
    assert Skipped("merge", place, why) in findings
    assert op_types(model) == before


SILENT = {
    "an activation between": f"a = {C3} r = Relu(a) b = Conv<{SAME}>(r, w) y = Add(x, b)",
    "two inputs": f"z = Sigmoid(x) a = {C3} b = Conv(z, u) y = Add(a, b)",
    "no layer": "m = Mul(x, k) y = Add(m, x)",
    "behind each other": f"a = {C3} r = Relu(a) b = Conv(r, u) y = Add(a, b)",
    "products": f"a = {C3} y = Mul(a, x)",
    "a constant": f"a = {C3} y = Add(a, k)",
}


@pytest.mark.parametrize("case", SILENT)
def test_no_candidate_is_no_finding(case: str) -> None:
    """Neither residuals around an activation nor what reads other tensors are spoken of."""
    body = SILENT[case]
    used = {name: x for name, x in {"w": K3, "u": K1, "k": (6, 6)}.items() if f" {name})" in body}
    findings = folded(network(body, X, **used))[1]
    assert not [finding for finding in findings if finding.step == "merge"]


# -- drawn at random ---------------------------------------------------------------------------------------------------


def drawn(seed: int) -> onnx.ModelProto:
    """A sum of branches of one tensor, some of them behind each other in the tree, each with its own kernel."""
    rng = np.random.default_rng(seed)
    channels, dilation = 2 * int(rng.integers(1, 4)), int(rng.integers(1, 3))
    lines, terms, constants = [], ["x"] if rng.random() < 0.5 else [], {}
    for index in range(int(rng.integers(2, 5))):
        size, groups = int(rng.choice([1, 3, 5])), int(rng.choice([1, 2, channels]))
        own = 1 if rng.random() < 0.3 else dilation
        begin = [int(rng.integers(0, own * (size - 1) + 1)) for _ in range(2)]
        pads = [*begin, *(own * (size - 1) - pad for pad in begin)]
        form = f"pads={pads}, group={groups}, dilations=[{own},{own}]".replace(" ", "")
        constants |= {f"w{index}": (channels, channels // groups, size, size), f"b{index}": (channels,)}
        lines.append(f"c{index} = Conv<{form}>(x, w{index}, b{index})")
        terms.append(f"c{index}")
        if rng.random() < 0.4:
            constants[f"k{index}"] = (channels, 1, 1)
            lines.append(f"m{index} = Mul(c{index}, k{index})")
            terms[-1] = f"m{index}"
    count = 0
    while len(terms) > 1:
        one, other = (terms.pop(int(rng.integers(len(terms)))) for _ in range(2))
        count += 1
        name = f"s{count}" if terms else "y"
        lines.append(f"{name} = {rng.choice(['Add', 'Sub'])}({one}, {other})")
        terms.append(name)
    return network(" ".join(lines), (1, channels, 7, 8), **constants)


@pytest.mark.parametrize("seed", range(60))
def test_sums_drawn_at_random_stay(seed: int) -> None:
    """And never get more multiplications: all maps have as many places, so that weights tell."""
    proto = drawn(seed)
    model, _ = folded(proto)
    assert weights_of(model) <= weights_of(loaded(proto))


def weights_of(model: Model) -> int:
    return sum(count_weights(node) for node in model.nodes() if node.op_type == "Conv")


def test_all_equal_kernels_become_one() -> None:
    """As many as there are: 5 branches in a tree."""
    body = f"{normed(*[C3] * 5)} a = Add(n0, n1) b = Sub(n2, n3) c = Sub(a, b) y = Add(n4, c)"
    model, _ = folded(network(body, X, w=K3, **NORMED))
    assert op_types(model) == "Conv"
    assert attribute(model.nodes()[0], "pads") == [1, 1, 1, 1]


# -- statistics --------------------------------------------------------------------------------------------------------


def distributions(body: str, **constants: object) -> tuple[ChannelDistribution, ChannelDistribution]:
    """Of the tensor s in a network: what follows for it before branches are merged, and for their layer."""
    proto = network(body, X, **constants, **NORMED)  # type: ignore[arg-type]
    found = []
    for merged in (False, True):
        model = loaded(proto)
        with pytest.MonkeyPatch.context() as patch:
            if not merged:
                patch.setattr("qconv.passes.fold.FLOAT_PASSES", [p for p in passes() if p.__name__ != "merge_branches"])
            run_float_passes(model)
        known = {value.name: seen for value, seen in propagate_stats(model, {}).items()}
        (reader,) = (node for node in model.nodes() if node.op_type == "Sigmoid")
        assert reader.inputs[0] is not None
        assert (reader.inputs[0].producer().op_type == "Conv") == merged  # type: ignore[union-attr]
        found.append(known[reader.inputs[0].name])
    return found[0], found[1]


def passes() -> tuple:
    from qconv.passes.fold import FLOAT_PASSES

    return FLOAT_PASSES


STATISTICS = {
    "norms": f"{normed(C3, C1)} s = Sub(n0, n1) y = Sigmoid(s)",
    "x, too": f"i = {BN}(x, {NORM}) r = Relu(i) c = Conv<{SAME}>(r, w) n = {BN}(c, {NORM})"
    " s = Add(n, r) y = Sigmoid(s)",
}


@pytest.mark.parametrize("case", STATISTICS)
def test_statistics_are_those_of_the_sum(case: str) -> None:
    """Data-free quantization is told the same of a sum, merged or not."""
    body = STATISTICS[case]
    before, after = distributions(body, **{n: k for n, k in {"w": K3, "u": K1}.items() if f", {n})" in body})
    np.testing.assert_allclose(after.mean, before.mean, rtol=1e-6)
    assert before.std is not None
    assert after.std is not None
    np.testing.assert_allclose(after.std, before.std, rtol=1e-6)


def test_statistics_that_were_measured_of_the_sum_count() -> None:
    """RepViT normalises the sum: its mean and deviation are beta and gamma, whatever the branches were."""
    norm = {f"{n}2": 3 * v if n != "var" else v for n, v in statistics(4).items()}
    body = f"{normed(C3)} t = Add(n0, x) s = {BN}(t, gamma2, beta2, mean2, var2) y = Sigmoid(s)"
    model = loaded(network(body, X, w=K3, **NORMED, **norm))
    run_float_passes(model)
    assert op_types(model) == "Conv Sigmoid"
    known = propagate_stats(model, {})[model.nodes()[0].outputs[0]]
    assert isinstance(known, ChannelDistribution)
    np.testing.assert_allclose(known.mean, norm["beta2"], rtol=1e-5)


def test_input_means_stay_those_of_what_is_read() -> None:
    """By hand: behind BatchNormalization and Relu, as of the Conv alone."""
    body = f"i = {BN}(x, {NORM}) r = Relu(i) {{}} y = Sigmoid(s)"
    found = []
    for branches in (f"s = Conv<{SAME}>(r, w)", f"c = Conv<{SAME}>(r, w) a = Conv(r, u) s = Add(a, c)"):
        used = {n: k for n, k in {"w": K3, "u": K1}.items() if f", {n})" in branches}
        model = loaded(network(body.format(branches), X, **used, **NORMED))
        run_float_passes(model)
        found.append(input_means_of(next(n for n in model.nodes() if attribute(n, "group", 1) == 1)))
    np.testing.assert_array_equal(*found)
