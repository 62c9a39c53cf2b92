"""Networks that apply one weight several times: the codes are stored once, and are right for all readers.

The oracles are ONNX Runtime, which runs the float network, and the number of different weights that were written down.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qconv.quantization import shared_rounding
from qconv.quantization.input_moments import accumulate_moments
from qconv.quantization.layer_rounding import LayerSolver
from tests.support.models import network, statistics
from tests.support.runs import quantize_saved, write_samples

GRAPHS = int(os.environ.get("QCONV_GRAPHS", "10"))
"""Networks that are drawn."""

SAME = "pads=[1,1,1,1]"


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_samples(tmp_path_factory.mktemp("samples"), (1, 3, 12, 12), 16)


def count_kernels(proto: onnx.ModelProto) -> int:
    """How many tensors of weight codes there are."""
    return sum(tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1 for tensor in proto.graph.initializer)


def scaled(rng: np.random.Generator, *shape: int, gain: float = 1.0) -> NDArray[np.float32]:
    return (rng.standard_normal(shape) * gain * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)


Drawn = tuple[onnx.ModelProto, int]


def siamese(rng: np.random.Generator) -> Drawn:
    """One layer on a tensor and on what operators make of it, each with a bias of its own, joined or compared."""
    count, channels = int(rng.integers(2, 5)), int(rng.choice([8, 16]))
    views = rng.choice(["Identity", "Tanh", "Sigmoid", "Abs", "LeakyRelu"], count).tolist()
    joined = rng.choice(["Concat<axis=1>", "Sum", "Max"])
    nodes = [f"t = Conv<{SAME}>(x, v) r = Relu(t)"]
    constants = {"v": scaled(rng, channels, 3, 3, 3), "w": scaled(rng, channels, channels, 3, 3)}
    for k, view in enumerate(views):
        nodes.append(f"a{k} = {view}(r) c{k} = Conv<{SAME}>(a{k}, w, b{k}) d{k} = Relu(c{k})")
        constants[f"b{k}"] = scaled(rng, channels, 1, gain=0.1).reshape(-1)
    ends = ", ".join(f"d{k}" for k in range(count))
    width = channels * (count if joined.startswith("Concat") else 1)
    nodes.append(f"j = {joined}({ends}) y = Conv(j, u)")
    return network(" ".join(nodes), ("N", 3, 12, 12), u=scaled(rng, 16, width, 1, 1), **constants), 3


def recurrent(rng: np.random.Generator) -> Drawn:
    """One block applied many times, with a residual, a gate or nothing around it."""
    steps, channels, around = int(rng.integers(2, 7)), 8, rng.choice(["residual", "tanh", "plain", "context"])
    nodes = [f"t = Conv<{SAME}>(x, v) h0 = Relu(t)"]
    width = 2 * channels if around == "context" else channels
    gain = 0.3 if around == "residual" else 1.0
    constants = {"v": scaled(rng, channels, 3, 3, 3), "w": scaled(rng, channels, width, 3, 3)}
    constants["u"] = scaled(rng, channels, channels, 3, 3, gain=gain)
    for k in range(steps):
        source = f"h{k}"
        if around == "context":
            nodes.append(f"j{k} = Concat<axis=1>(h{k}, h0)")
            source = f"j{k}"
        nodes.append(f"a{k} = Conv<{SAME}>({source}, w, b) r{k} = Relu(a{k}) c{k} = Conv<{SAME}>(r{k}, u)")
        end = {"residual": f"Add(h{k}, c{k})", "plain": f"Relu(c{k})"}.get(around, f"Tanh(c{k})")
        nodes.append(f"h{k + 1} = {end}")
    nodes.append(f"y = Conv(h{steps}, q)")
    constants |= {"b": scaled(rng, channels, 1, gain=0.1).reshape(-1), "q": scaled(rng, 16, channels, 1, 1)}
    return network(" ".join(nodes), ("N", 3, 12, 12), **constants), 4


def heads(rng: np.random.Generator) -> Drawn:
    """A head on every level of a pyramid, its BatchNormalization, and at times its weight, written once a level."""
    levels, channels, copied = int(rng.integers(2, 4)), 8, bool(rng.integers(2))
    nodes = [f"t = Conv<{SAME}>(x, v) l0 = Relu(t)"]
    weight = scaled(rng, channels, channels, 3, 3)
    constants: dict[str, NDArray] = {"v": scaled(rng, channels, 3, 3, 3), "q": scaled(rng, 16, channels, 1, 1)}
    norm = statistics(channels)
    for k in range(levels):
        name = f"w{k}" if copied else "w"
        constants[name] = weight
        constants |= {f"{part}{k}": numbers for part, numbers in norm.items()}
        parts = ", ".join(f"{part}{k}" for part in ("gamma", "beta", "mean", "var"))
        nodes.append(f"c{k} = Conv<{SAME}>(l{k}, {name}) n{k} = BatchNormalization(c{k}, {parts}) r{k} = Relu(n{k})")
        nodes.append(f"y{k} = Conv(r{k}, q) l{k + 1} = MaxPool<kernel_shape=[2,2], strides=[2,2]>(l{k})")
    return network(" ".join(nodes), ("N", 3, 12, 12), [f"y{k}" for k in range(levels)], **constants), 3


def dense(rng: np.random.Generator) -> Drawn:
    """Gemm or MatMul, one matrix for all steps, written at times as its transpose."""
    steps, width, kind = int(rng.integers(2, 6)), 16, rng.choice(["Gemm", "Gemm<transB=1>", "MatMul"])
    nodes = [f"t = Conv<{SAME}>(x, v) r = Relu(t) p = GlobalAveragePool(r) h0 = Flatten(p)"]
    constants = {"v": scaled(rng, width, 3, 3, 3), "w": scaled(rng, width, width)}
    for k in range(steps):
        bias = f", b{k}" if kind != "MatMul" and rng.integers(2) else ""
        if bias:
            constants[f"b{k}"] = scaled(rng, width, 1, gain=0.1).reshape(-1)
        nodes.append(f"c{k} = {kind}(h{k}, w{bias}) h{k + 1} = Relu(c{k})")
    nodes.append(f"y = MatMul(h{steps}, q)")
    return network(" ".join(nodes), ("N", 3, 12, 12), q=scaled(rng, width, 10), **constants), 3


FAMILIES: list[Callable[[np.random.Generator], Drawn]] = [siamese, recurrent, heads, dense]


@pytest.mark.parametrize("seed", range(GRAPHS))
def test_each_weight_is_stored_once(seed: int, samples: str, tmp_path: Path) -> None:
    proto, weights = FAMILIES[seed % len(FAMILIES)](np.random.default_rng(seed))
    report, result = quantize_saved(proto, samples, tmp_path / "model.onnx")
    assert count_kernels(result) <= weights
    assert (report.verify.sqnr_db or 0) > 15
    assert not any("float outputs" in str(finding) for finding in report.findings)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Patches of even colours, 0 to 1, as pictures are smooth."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(8)
    for index in range(16):
        patches = rng.uniform(0, 1, (1, 3, 3, 3)).repeat(4, axis=2).repeat(4, axis=3)
        np.save(folder / f"{index:02}.npy", (patches + rng.uniform(0, 0.1, patches.shape)).astype(np.float32))
    return str(folder)


def test_a_layer_called_on_three_views_of_a_tensor(pictures: str, tmp_path: Path) -> None:
    """What a tensor, its Tanh and its Sigmoid become by one layer, side by side: a third of the bytes, and 41 dB."""
    rng = np.random.default_rng(47)
    views = "b = Tanh(t) c = Sigmoid(t) d = Conv<pads=[1,1,1,1]>(t, w, e) f = Conv<pads=[1,1,1,1]>(b, w, e)"
    ends = "g = Conv<pads=[1,1,1,1]>(c, w, e) h = Relu(d) i = Relu(f) j = Relu(g) k = Concat<axis=1>(h, i, j)"
    proto = network(
        f"a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, v) t = Relu(a) {views} {ends} y = Conv(k, u)",
        ("N", 3, 12, 12),
        v=scaled(rng, 64, 3, 3, 3),
        w=scaled(rng, 64, 64, 3, 3),
        e=scaled(rng, 64, 1, gain=0.1).reshape(-1),
        u=scaled(rng, 4, 192, 1, 1),
    )
    report, result = quantize_saved(proto, pictures, tmp_path / "model.onnx")
    assert result.ByteSize() < 0.35 * proto.ByteSize()
    assert (report.verify.sqnr_db or 0) > 41
    assert count_kernels(result) == 3


def update_block(steps: int, channels: int = 24) -> onnx.ModelProto:
    """x = x + Conv(Relu(Conv(x))), the same two layers at every step."""
    rng = np.random.default_rng(3)
    nodes = [f"t = Conv<{SAME}, strides=[2,2]>(x, v) h0 = Relu(t)"]
    for k in range(steps):
        nodes.append(f"a{k} = Conv<{SAME}>(h{k}, w, b) r{k} = Relu(a{k})")
        nodes.append(f"c{k} = Conv<{SAME}>(r{k}, u, e) h{k + 1} = Add(h{k}, c{k})")
    return network(
        " ".join(nodes) + f" y = Conv(h{steps}, q)",
        ("N", 3, 12, 12),
        v=scaled(rng, channels, 3, 3, 3),
        w=scaled(rng, channels, channels, 3, 3),
        b=scaled(rng, channels, 1, gain=0.1).reshape(-1),
        u=scaled(rng, channels, channels, 3, 3, gain=0.02),
        e=scaled(rng, channels, 1, gain=0.01).reshape(-1),
        q=scaled(rng, 16, channels, 1, 1),
    )


def test_a_block_of_twelve_steps_stays_small(samples: str, tmp_path: Path) -> None:
    """A third of its bytes are names, biases and quantizers, for 24 layers."""
    proto = update_block(12, channels=48)
    report, result = quantize_saved(proto, samples, tmp_path / "model.onnx")
    assert result.ByteSize() < 0.45 * proto.ByteSize()
    assert (report.verify.sqnr_db or 0) > 20  # the stream is rounded to 8 bits twelve times
    assert count_kernels(result) == 4


def test_shared_weights_are_looked_at_once(samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve steps take no more rows for the moments of their weights than one does, up to a row an image."""
    counted = []
    for steps in (1, 12):
        rows: list[int] = []

        def watched(pairs, *args, into=rows, **more):
            kept = list(pairs)
            into.append(sum(x.shape[1] for x, _ in kept))
            return accumulate_moments(kept, *args, **more)

        monkeypatch.setattr(shared_rounding, "accumulate_moments", watched)
        monkeypatch.setattr("qconv.quantization.layer_rounding.LEAST_ROWS", 512)
        quantize_saved(update_block(steps, channels=8), samples, tmp_path / "model.onnx", rounding="second-order")
        counted.append((len(rows), sum(rows)))
    assert counted[0] == (0, 0)  # nothing is shared
    assert counted[1][0] == 24
    assert counted[1][1] <= 2 * (512 + 12 * 16)


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_rows_of_shared_weights_are_held_out(
    batch: int, samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches of eight pictures are sixteen pieces, of which two are held out, as sixteen batches of one are."""
    held_out: list[int] = []
    choose = LayerSolver.choose_codes

    def watched(solver, nearest, readers, seen, *rest, **more):
        if len(readers) > 1:
            held_out.append(seen.kept[0].shape[1])
        return choose(solver, nearest, readers, seen, *rest, **more)

    monkeypatch.setattr(LayerSolver, "choose_codes", watched)
    proto = update_block(3, channels=8)
    quantize_saved(proto, samples, tmp_path / "model.onnx", rounding="second-order", batch=batch)
    assert len(held_out) == 2
    assert all(held_out)


def test_a_weight_of_one_number_is_not_shared(samples: str, tmp_path: Path) -> None:
    """Weights that were filled in are equal by chance."""
    filled = np.full((8, 8, 3, 3), 0.01, np.float32)
    body = f"a = Conv<{SAME}>(x, v) b = Conv<{SAME}>(a, w) c = Conv<{SAME}>(b, u) y = Conv(c, q)"
    proto = network(body, ("N", 3, 12, 12), v=(8, 3, 3, 3), w=filled, u=filled.copy(), q=(16, 8, 1, 1))
    _, result = quantize_saved(proto, samples, tmp_path / "model.onnx")
    assert count_kernels(result) == 4


def test_a_result_larger_than_the_float_model_is_said(samples: str, tmp_path: Path) -> None:
    proto = network(
        f"a = Conv<{SAME}>(x, w) b = Relu(a) y = Conv(b, u)", ("N", 3, 12, 12), w=(2, 3, 3, 3), u=(2, 2, 1, 1)
    )
    report, result = quantize_saved(proto, samples, tmp_path / "model.onnx")
    assert result.ByteSize() > proto.ByteSize()
    assert any("larger than the float one" in warning for warning in report.warnings)
    report, _ = quantize_saved(update_block(2), samples, tmp_path / "model.onnx")
    assert not any("larger than the float one" in warning for warning in report.warnings)
