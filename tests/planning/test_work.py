"""The work of default runs is counted before it is done, and grows with the network alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qconv.errors import Skipped
from qconv.passes import noise_descent, noise_model
from qconv.planning import work
from qconv.results.quantize import Report
from tests.support.models import ints, loaded, network
from tests.support.runs import quantize_saved, write_samples

GRAPHS = int(os.environ.get("QCONV_GRAPHS", "10"))
"""Networks that are drawn."""

SAME = "pads=[1,1,1,1]"


def scaled(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_samples(tmp_path_factory.mktemp("samples"), (1, 3, 12, 12), 8)


def skipped(report: Report, step: str) -> list[str]:
    return [f.why for f in report.findings if isinstance(f, Skipped) and f.step == step]


Family = Callable[[np.random.Generator, int], onnx.ModelProto]


def flattened(rng: np.random.Generator, size: int) -> onnx.ModelProto:
    """Dense layers behind what exporters put between them and the last map."""
    channels, between = 4 * size, rng.choice(["t = Transpose<perm=[0,2,3,1]>(r)", "t = Identity(r)", "t = Sigmoid(r)"])
    body = f"a = Conv<{SAME}>(x, w) r = Relu(a) {between} f = Flatten(t) g = Gemm(f, v) h = Relu(g) y = Gemm(h, u)"
    weights = {"w": scaled(rng, channels, 3, 3, 3), "v": scaled(rng, 144 * channels, 16), "u": scaled(rng, 16, 4)}
    return network(body, ("N", 3, 12, 12), **weights)


def unrolled(rng: np.random.Generator, size: int) -> onnx.ModelProto:
    """Gates of a recurrent network, step by step, with weights of their own."""
    nodes = [f"a = Conv<{SAME}, strides=[3,3]>(x, w) r = Relu(a) f = Flatten(r) h0 = Gemm(f, v) c0 = Tanh(h0)"]
    weights: dict[str, NDArray] = {"w": scaled(rng, 4, 3, 3, 3), "v": scaled(rng, 64, 16)}
    for k in range(4 * size):
        nodes.append(f"z{k} = Concat<axis=1>(f, h{k})")
        for gate in "ifou":
            weights[f"{gate}w{k}"] = scaled(rng, 80, 16)
            nodes.append(f"{gate}g{k} = Gemm(z{k}, {gate}w{k})")
        nodes.append(f"i{k} = Sigmoid(ig{k}) j{k} = Sigmoid(fg{k}) o{k} = Sigmoid(og{k}) u{k} = Tanh(ug{k})")
        nodes.append(f"p{k} = Mul(j{k}, c{k}) q{k} = Mul(i{k}, u{k}) c{k + 1} = Add(p{k}, q{k})")
        nodes.append(f"s{k} = Tanh(c{k + 1}) h{k + 1} = Mul(o{k}, s{k})")
    return network(" ".join(nodes) + f" y = Gemm(h{4 * size}, e)", ("N", 3, 12, 12), e=scaled(rng, 16, 4), **weights)


def tree(rng: np.random.Generator, size: int) -> onnx.ModelProto:
    """Layers that branch, and whose ends are joined."""
    joined = rng.choice(["Concat<axis=1>", "Sum"])
    nodes, level = [f"c0 = Conv<{SAME}>(x, w0) r0 = Relu(c0)"], ["r0"]
    weights: dict[str, NDArray] = {"w0": scaled(rng, 4, 3, 3, 3)}
    for number in range(1, 8 * size):
        parent = level.pop(0)
        nodes.append(f"c{number} = Conv<{SAME}>({parent}, w{number}) r{number} = Relu(c{number})")
        weights[f"w{number}"] = scaled(rng, 4, 4, 3, 3)
        level += [f"r{number}"] * (2 if number % 2 else 1) + ([parent] if number % 2 else [])
    ends = list(dict.fromkeys(level))
    nodes.append(f"j = {joined}({', '.join(ends)}) y = Conv(j, u)")
    width = 4 * len(ends) if joined.startswith("Concat") else 4
    return network(" ".join(nodes), ("N", 3, 12, 12), u=scaled(rng, 4, width, 1, 1), **weights)


FAMILIES: list[Family] = [flattened, unrolled, tree]


class Counter:
    """Counts the weights that noise is evaluated of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.evaluated = 0
        self.descended: set[int] = set()
        exact, smooth = noise_model.WeightNoise.noise, noise_descent._SmoothWeights.at

        def counted_exact(term, u):
            self.evaluated += term.largest.size
            return exact(term, u)

        def counted_smooth(part, u):
            self.evaluated += sum(matrix.size for matrix in part.raised)
            self.descended |= {matrix.size for matrix in part.raised}
            return smooth(part, u)

        monkeypatch.setattr(noise_model.WeightNoise, "noise", counted_exact)
        monkeypatch.setattr(noise_descent._SmoothWeights, "at", counted_smooth)


@pytest.mark.parametrize("seed", range(GRAPHS))
def test_noise_is_evaluated_a_fixed_number_of_times(
    seed: int, samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each weight once a step of descent, and a few times to judge the result, whatever stands in front of it."""
    rng = np.random.default_rng(seed)
    proto = FAMILIES[seed % len(FAMILIES)](rng, int(rng.integers(1, 4)))
    weights = sum(np.prod(tensor.dims) for tensor in proto.graph.initializer)
    counter = Counter(monkeypatch)
    quantize_saved(proto, samples, tmp_path / "model.onnx", rounding="nearest", tune_ranges=False)
    assert counter.evaluated <= weights * (noise_descent.EVALUATIONS * len(noise_descent.ORDERS) + 20)


def test_what_cannot_be_scaled_is_not_descended(samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a Transpose no input of a dense layer can be scaled: its noise is one number."""
    rng = np.random.default_rng(0)
    behind = "t = Transpose<perm=[0,2,3,1]>(r) f = Flatten(t) y = Gemm(f, v)"
    body = f"a = Conv<{SAME}>(x, w) q = Relu(a) b = Conv<{SAME}>(q, u) r = Relu(b) {behind}"
    weights = {"w": scaled(rng, 8, 3, 3, 3), "u": scaled(rng, 8, 8, 3, 3), "v": scaled(rng, 144 * 8, 64)}
    proto = network(body, ("N", 3, 12, 12), **weights)
    counter = Counter(monkeypatch)
    quantize_saved(proto, samples, tmp_path / "model.onnx", rounding="nearest", tune_ranges=False)
    assert counter.descended == {8 * 8}  # not the dense layer's 144 * 8 * 64


@pytest.mark.parametrize(
    ("share", "step", "options"),
    [
        ("qconv.passes.equalize.EQUALIZATION_SHARE", "equalize", {"tune_ranges": False, "rounding": "nearest"}),
        ("qconv.quantization.sequential_rounding.ROUNDING_SHARE", "round", {"tune_ranges": False}),
    ],
)
def test_a_step_that_would_take_too_long_does_less_and_says_so(
    share: str, step: str, options: dict[str, object], samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nearly no share of the work the result is whole, the same each time, and tells what was left out."""
    proto = tree(np.random.default_rng(1), 1)
    usual, _ = quantize_saved(proto, samples, tmp_path / "model.onnx", **options)
    assert not any("too long" in why for why in skipped(usual, step))
    monkeypatch.setattr(share, 1e-9)
    report, content = quantize_saved(proto, samples, tmp_path / "model.onnx", **options)
    assert any("too long" in why for why in skipped(report, step))
    assert (report.verify.sqnr_db or 0) > 15
    assert quantize_saved(proto, samples, tmp_path / "model.onnx", **options)[1] == content


def test_the_best_effort_leaves_nothing_out(samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("qconv.passes.equalize.EQUALIZATION_SHARE", "qconv.quantization.sequential_rounding.ROUNDING_SHARE"):
        monkeypatch.setattr(name, 1e-9)
    report, _ = quantize_saved(tree(np.random.default_rng(1), 1), samples, tmp_path / "model.onnx", effort="best")
    assert not any("too long" in str(finding) for finding in report.findings)


def test_work_by_hand() -> None:
    """A Conv of 4 x 3 x 3 x 3 on 6 x 6 places with stride 2, and a Gemm of 36 x 5."""
    body = f"a = Conv<{SAME}, strides=[2,2]>(x, w) f = Flatten(a) y = Gemm(f, v)"
    model = loaded(network(body, (1, 3, 6, 6), w=(4, 3, 3, 3), v=(36, 5)))
    conv, gemm = (node for node in model.nodes() if node.op_type in ("Conv", "Gemm"))
    assert [work.count_rows(node) for node in (conv, gemm)] == [9, 1]
    assert work.multiplications([conv, gemm]) == 108 * 9 + 180
    assert work.quantization_work([conv, gemm], 10) == work.START_WORK + 108 * (90 + 3500) + 180 * (10 + 3500)


def test_rows_of_products_and_transposed_layers() -> None:
    """A product of matrices has a row for each place; a ConvTranspose for each place of its input."""
    body = "t = Transpose<perm=[0,2,3,1]>(x) r = Reshape(t, s) m = MatMul(r, v) y = ConvTranspose<strides=[2,2]>(x, w)"
    proto = network(body, (1, 3, 6, 6), ["m", "y"], s=ints(1, 36, 3), v=(3, 5), w=(3, 4, 2, 2))
    rows = {node.op_type: work.count_rows(node) for node in loaded(proto).nodes()}
    assert rows["MatMul"] == rows["ConvTranspose"] == 36


@pytest.mark.parametrize(
    ("sizes", "budget", "most"), [([5, 1, 3], 100, 5), ([5, 1, 3], 9, 5), ([5, 1, 3], 7, 3), ([9, 9], 4, 2), ([], 1, 1)]
)
def test_the_cap_on_sizes_by_hand(sizes: list[int], budget: float, most: int) -> None:
    """[5, 1, 3] capped at 3 are 7; two nines capped at 2 are 4."""
    assert work.largest_within(sizes, budget) == most
