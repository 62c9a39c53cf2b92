"""Networks whose channels are scaled far apart, and scaled back by the layers behind, which changes nothing.

The oracle is the network before its channels were scaled: its quantized form loses as little.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qconv import compare
from qconv.errors import Skipped
from qconv.ir.metadata import read_equalization
from qconv.results.quantize import Report
from tests.support.models import network
from tests.support.runs import quantize_saved, write_samples

GRAPHS = int(os.environ.get("QCONV_GRAPHS", "12"))
"""Networks that are drawn."""

CHANNELS = 12
SAME = "pads=[1,1,1,1]"

BODIES = {
    "chain": f"a = Conv<{SAME}>(x, w0, b0) r = ACT q = Conv<{SAME}>(r, w1, b1) s = Relu(q) y = Conv(s, u)",
    "pool": f"a = Conv<{SAME}>(x, w0, b0) p = ACT r = MaxPool<kernel_shape=[2,2], strides=[2,2]>(p)"
    f" q = Conv<{SAME}>(r, w1, b1) s = Relu(q) y = Conv(s, u)",
    "depthwise": f"a = Conv<{SAME}>(x, w0, b0) p = ACT d = Conv<{SAME}, group=12>(p, wd, b0) r = Relu(d)"
    f" q = Conv<{SAME}>(r, w1, b1) s = Relu(q) y = Conv(s, u)",
    "residual": f"a = Conv<{SAME}>(x, w0, b0) p = ACT i = Conv<{SAME}>(p, w1, b1) j = Relu(i)"
    f" k = Conv<{SAME}>(j, w2, b0) r = Add(p, k) q = Conv<{SAME}>(r, w1, b1) s = Relu(q) y = Conv(s, u)",
    "concat": f"a = Conv<{SAME}>(x, w0, b0) p = ACT e = Conv<{SAME}>(x, we, b1) f = Relu(e)"
    f" r = Concat<axis=1>(p, f) q = Conv<{SAME}>(r, w3, b1) s = Relu(q) y = Conv(s, u)",
}
"""ACT: the activation of the tensor whose channels are scaled; w0 and b0 write it, w1 and w3 read it."""

ACTIVATIONS = ["Relu(a)", "LeakyRelu<alpha=0.1>(a)", "PRelu(a, slope)", "Abs(a)", "Identity(a)"]


def scaled(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)


def drawn(seed: int, by: NDArray[np.float64]) -> onnx.ModelProto:
    """A network whose channels are multiplied by `by` (CHANNELS,) in one place; the same but for that for all `by`."""
    rng = np.random.default_rng(seed)
    kind, activation = sorted(BODIES)[seed % len(BODIES)], ACTIVATIONS[int(rng.integers(len(ACTIVATIONS)))]
    c = CHANNELS
    up, down = by.reshape(-1, 1, 1, 1), by.reshape(1, -1, 1, 1)
    more = np.concatenate([by, np.ones(c)]).reshape(1, -1, 1, 1)
    constants: dict[str, NDArray] = {
        "w0": scaled(rng, c, 3, 3, 3) * up,
        "b0": rng.standard_normal(c) * 0.2 * by,
        "w1": scaled(rng, c, c, 3, 3) / down,
        "b1": rng.standard_normal(c) * 0.1,
        "w2": scaled(rng, c, c, 3, 3) * up,
        "w3": scaled(rng, c, 2 * c, 3, 3) / more,
        "we": scaled(rng, c, 3, 3, 3),
        "wd": scaled(rng, c, 1, 3, 3),
        "u": scaled(rng, 4, c, 1, 1),
        "slope": np.full((c, 1, 1), 0.2),
    }
    body = BODIES[kind].replace("ACT", activation)
    used = {name: x.astype(np.float32) for name, x in constants.items() if f"{name})" in body or f"{name}," in body}
    return network(body, ("N", 3, 12, 12), **used)


def far_apart(rng: np.random.Generator) -> NDArray[np.float64]:
    """One to three channels thousands to a hundred million times as large, or as small, as the others."""
    by = np.exp(rng.normal(0, 0.3, CHANNELS))
    for channel in rng.permutation(CHANNELS)[: rng.integers(1, 4)]:
        by[channel] *= 10.0 ** (rng.uniform(3.5, 8) * rng.choice([-1, 1]))
    return by


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_samples(tmp_path_factory.mktemp("samples"), (1, 3, 12, 12), 32)


def skipped(report: Report) -> list[str]:
    return [f.why for f in report.findings if isinstance(f, Skipped) and f.step == "equalize"]


@pytest.mark.parametrize("seed", range(GRAPHS))
def test_channels_far_apart_lose_as_little_as_others(seed: int, samples: str, tmp_path: Path) -> None:
    by = far_apart(np.random.default_rng(seed))
    near, _ = quantize_saved(drawn(seed, np.ones(CHANNELS)), samples, tmp_path / "near.onnx")
    far, _ = quantize_saved(drawn(seed, by), samples, tmp_path / "far.onnx")
    assert (far.verify.sqnr_db or 0) > min((near.verify.sqnr_db or 0) - 6, 30)
    assert not any("float outputs" in why for why in skipped(far))


def test_tiny_and_huge_weights(samples: str, tmp_path: Path) -> None:
    """A channel of zeros, a denormal one, one of 1e-30 and one of 1e6: those that count are brought near."""
    by = np.ones(CHANNELS)
    by[1:4] = 1e-42, 1e-30, 1e6
    proto = drawn(0, np.where(by == 1e-42, 1, by))
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    numbers = onnx.numpy_helper.to_array(weights["w0"]).copy()
    numbers[0], numbers[1] = 0, numbers[1] * np.float32(1e-42)
    weights["w0"].CopyFrom(onnx.numpy_helper.from_array(numbers, "w0"))
    report, result = quantize_saved(proto, samples, tmp_path / "model.onnx")
    assert (report.verify.sqnr_db or 0) > 30
    scale = read_equalization({entry.key: entry.value for entry in result.metadata_props}).scale_of("a", CHANNELS)
    assert scale is not None
    assert 1e-32 < scale[2] < 1e-28
    assert 1e4 < scale[3] < 1e8


def test_the_record_joins_both_scalings(samples: str, tmp_path: Path) -> None:
    """`compare` scales the float model's tensors by what is recorded: they agree with the codes' then."""
    by = np.ones(CHANNELS)
    by[5] = 1e5
    _, result = quantize_saved(drawn(0, by), samples, tmp_path / "model.onnx")
    onnx.save(result, tmp_path / "quantized.onnx")
    found = compare(tmp_path / "model.onnx", tmp_path / "quantized.onnx", samples)
    assert len(found.layers) > 3
    assert all((layer.sqnr_db or 99) > 25 for layer in found.layers)


def test_what_stays_apart_is_said(samples: str, tmp_path: Path) -> None:
    """The network returns the tensor, so that nothing may scale it."""
    by = np.ones(CHANNELS)
    by[5] = 1e5
    proto = drawn(0, by)
    proto.graph.output.append(onnx.helper.make_tensor_value_info("r", 1, ["N", CHANNELS, 12, 12]))
    report, _ = quantize_saved(proto, samples, tmp_path / "model.onnx")
    assert any("stay apart" in why and "own input or output" in why for why in skipped(report))


def test_channels_that_are_near_are_left_to_the_noise_model(samples: str, tmp_path: Path) -> None:
    """A hundredfold is ordinary, and so is a channel of nothing: no byte changes for these."""
    for factor in (100.0, 0.0):
        by = np.ones(CHANNELS)
        by[3] = factor or 1.0
        proto = drawn(0, by)
        if not factor:
            for name in ("w0", "b0"):
                tensor = next(t for t in proto.graph.initializer if t.name == name)
                numbers = onnx.numpy_helper.to_array(tensor).copy()
                numbers[3] = 0
                tensor.CopyFrom(onnx.numpy_helper.from_array(numbers, name))
        report, _ = quantize_saved(proto, samples, tmp_path / "model.onnx")
        assert not any("far from the others" in str(finding) for finding in report.findings)
