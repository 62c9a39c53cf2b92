"""Second-order rounding from end to end: every kind of layer, better than nearest codes, within the kernels' limits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe, make_request
from qconv.ir.files import Source
from qconv.pipeline.quantize import quantize
from qconv.quantization import layer_rounding, saturation
from qconv.quantization.input_moments import InputMoments, accumulate_moments
from qconv.results.quantize import Report
from qconv.runtime.session import Session
from tests.support.models import network

SAME = "pads=[1,1,1,1]"
KINDS = {
    "conv": f"a = Conv<{SAME}>(x, w) b = Relu(a) c = Conv<{SAME}>(b, v) d = Relu(c) y = Conv(d, u)",
    "strides": f"a = Conv<{SAME}>(x, w) b = Relu(a) c = Conv<{SAME}, strides=[2,2]>(b, v) d = Relu(c) y = Conv(d, u)",
    "depthwise": f"a = Conv<{SAME}>(x, w) b = Relu(a) c = Conv<{SAME}, group=8>(b, d) e = Relu(c) y = Conv(e, u)",
    "groups": f"a = Conv<{SAME}>(x, w) b = Relu(a) c = Conv<{SAME}, group=2>(b, g) e = Relu(c) y = Conv(e, u)",
    "transposed": f"a = Conv<{SAME}>(x, w) b = Relu(a) c = ConvTranspose<strides=[2,2]>(b, t) e = Relu(c)"
    " y = Conv(e, u)",
    "residual": f"a = Conv<{SAME}>(x, w) b = Relu(a) c = Conv<{SAME}>(b, v) e = Add(b, c) y = Conv(e, u)",
    "gemm": f"a = Conv<{SAME}>(x, w) b = Relu(a) f = Flatten(b) h = Gemm(f, k) i = Relu(h) y = Gemm(i, l)",
    "matmul": f"a = Conv<{SAME}>(x, w) b = Relu(a) f = Flatten(b) h = MatMul(f, k) i = Relu(h) y = MatMul(i, l)",
}
WEIGHTS = {
    "w": (8, 3, 3, 3),
    "v": (8, 8, 3, 3),
    "u": (5, 8, 1, 1),
    "d": (8, 1, 3, 3),
    "g": (8, 4, 3, 3),
    "t": (8, 8, 3, 3),
    "k": (8 * 64, 12),
    "l": (12, 5),
}


def correlated(number: int) -> NDArray[np.float32]:
    """(3, 8, 8), smooth: neighbours are alike, as in pictures."""
    rng = np.random.default_rng(number)
    coarse = rng.normal(size=(3, 3, 3))
    return np.kron(coarse, np.ones((1, 3, 3)))[:, :8, :8].astype(np.float32) + 0.1 * rng.normal(size=(3, 8, 8)).astype(
        np.float32
    )


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("samples")
    for number in range(48):
        np.save(folder / f"{number:02}.npy", correlated(number))
    return str(folder)


def made(proto: onnx.ModelProto, samples: str, **options: object) -> tuple[Report, bytes]:
    request = make_request({"calib": (samples,), "threads": 1, "edge_bits": 3, **options})
    report, data = quantize(Source("m", None, proto.SerializeToString()), None, *request)
    assert data is not None
    return report, data


def sqnr(proto: onnx.ModelProto, data: bytes) -> float:
    """On pictures that nobody has seen."""
    sessions = Session(proto.SerializeToString()), Session(data)
    signal = noise = 0.0
    for number in range(1000, 1032):
        ref, got = (s.run_all({"x": correlated(number)[None]})[0].astype(np.float64) for s in sessions)
        signal, noise = signal + (ref**2).sum(), noise + ((ref - got) ** 2).sum()
    return 10 * math.log10(signal / noise)


def net(kind: str) -> onnx.ModelProto:
    body = KINDS[kind]
    return network(body, ("N", 3, 8, 8), **{n: s for n, s in WEIGHTS.items() if f", {n})" in body})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_gains(kind: str, samples: str) -> None:
    """3-bit weights; what is measured is other pictures' outputs, by ONNX Runtime."""
    proto = net(kind)
    report, second = made(proto, samples, weight_bits=3)
    rounded = {f.where for f in report.findings if f.step == "round" and "second order" in getattr(f, "what", "")}
    skipped = {f.where for f in report.findings if f.step == "round"} - rounded
    assert len(rounded) >= 2, skipped
    _, nearest = made(proto, samples, weight_bits=3, rounding="nearest")
    assert sqnr(proto, second) > sqnr(proto, nearest) + 1


@pytest.mark.parametrize("options", [{"weight_granularity": "per-tensor"}, {"weight_granularity": "per-block"}])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_every_granularity_gains(options: dict[str, str], scheme: str, samples: str) -> None:
    proto = net("conv")
    options = {**options, "weight_scheme": scheme}
    if options["weight_granularity"] == "per-block":
        options["block_size"] = 4  # type: ignore[assignment]
    _, second = made(proto, samples, weight_bits=3, **options)
    _, nearest = made(proto, samples, weight_bits=3, rounding="nearest", **options)
    assert sqnr(proto, second) > sqnr(proto, nearest) + 1


def test_a_product_of_three_axes_gets_no_bias(samples: str) -> None:
    """A MatMul has none, and nothing to correct it with."""
    body = f"a = Conv<{SAME}>(x, w) b = Relu(a) r = Reshape(b, s) h = MatMul(r, m) i = Relu(h) y = MatMul(i, l)"
    shape = np.array([0, 8, 64], np.int64)
    proto = network(body, ("N", 3, 8, 8), w=(8, 3, 3, 3), s=shape, m=(64, 12), l=(12, 5))
    _, data = made(proto, samples, weight_bits=3)
    assert [len(n.input) for n in onnx.load_from_string(data).graph.node if n.op_type == "MatMul"] == [2, 2]
    _, nearest = made(proto, samples, weight_bits=3, rounding="nearest")
    assert sqnr(proto, data) > sqnr(proto, nearest)


def test_a_product_of_one_axis(samples: str) -> None:
    """Behind a Squeeze of a batch of one."""
    body = f"a = Conv<{SAME}>(x, w) b = Relu(a) g = GlobalAveragePool(b) f = Squeeze(g) y = MatMul(f, m)"
    proto = network(body, (1, 3, 8, 8), w=(8, 3, 3, 3), m=(8, 5))
    report, data = made(proto, samples, weight_bits=4)
    assert [f.where for f in report.findings if f.step == "round"] == ["a", "y"]
    assert sqnr(proto, data) > 10


def test_a_product_whose_rows_are_places_is_sampled(samples: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reshape makes one long axis of pictures and places: 64 rows a picture."""
    few = {name: replace(effort, rows=1, most_rows=100) for name, effort in layer_rounding.ROUNDING_EFFORTS.items()}
    monkeypatch.setattr("qconv.quantization.layer_rounding.ROUNDING_EFFORTS", few)
    monkeypatch.setattr("qconv.quantization.layer_rounding.LEAST_ROWS", 1)
    seen: list[int] = []

    def counted(
        pairs: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]], share: int, *, means_alone: bool
    ) -> InputMoments:
        assert not means_alone
        kept = list(pairs)
        seen.append(sum(rows.shape[1] for _, rows in kept))
        return accumulate_moments(kept)

    monkeypatch.setattr("qconv.quantization.sequential_rounding.accumulate_moments", counted)
    body = f"a = Conv<{SAME}>(x, w) b = Relu(a) t = Transpose<perm=[0,2,3,1]>(b) r = Reshape(t, s) y = MatMul(r, m)"
    proto = network(body, ("N", 3, 8, 8), w=(8, 3, 3, 3), s=np.array([-1, 8], np.int64), m=(8, 5))
    made(proto, samples, weight_bits=4)
    assert len(seen) == 2
    assert all(27 <= rows <= 100 + 48 for rows in seen)


@pytest.mark.parametrize("batch", [8, 48])
def test_weights_are_solved_anew_whatever_the_batch(batch: int, samples: str) -> None:
    """Rows are kept apart picture by picture: as good as one picture at a time."""
    proto = net("conv")
    alone, together = (sqnr(proto, made(proto, samples, weight_bits=2, batch=size)[1]) for size in (1, batch))
    _, nearest = made(proto, samples, weight_bits=2, rounding="nearest")
    assert together > sqnr(proto, nearest) + 1
    assert abs(together - alone) < 0.4


@pytest.mark.parametrize("pictures", [2, 7])
def test_few_pictures_keep_one_apart(pictures: int, samples: str, tmp_path: Path) -> None:
    for number in range(pictures):
        (tmp_path / f"{number}.npy").symlink_to(Path(samples) / f"{number:02}.npy")
    proto = net("conv")
    _, second = made(proto, str(tmp_path), weight_bits=2)
    _, nearest = made(proto, str(tmp_path), weight_bits=2, rounding="nearest")
    assert sqnr(proto, second) > sqnr(proto, nearest) + 0.5


def test_a_large_bias_beside_tiny_weights_stays_what_it_is(samples: str) -> None:
    """Scales that are fitted to codes do not get so small that the bias leaves int32."""
    body = f"a = Conv<{SAME}>(x, w) b = Relu(a) c = Conv<{SAME}>(b, v, t) d = Relu(c) y = Conv(d, u)"
    v = np.random.default_rng(0).standard_normal((8, 8, 3, 3)).astype(np.float32)
    v[0] *= 2e-8
    bias = np.zeros(8, np.float32)
    bias[0] = 10
    proto = network(body, ("N", 3, 8, 8), w=(8, 3, 3, 3), v=v, t=bias, u=(5, 8, 1, 1))
    options = {"effort": "best", "equalize": False, "tune_ranges": False, "edge_bits": 8}
    for bits in (2, 3, 4):
        _, data = made(proto, samples, weight_bits=bits, **options)
        constants = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(data).graph.initializer}
        codes = [n.astype(np.int64) for n in constants.values() if n.dtype == np.int32]
        assert 2**28 < max(int(np.abs(n).max()) for n in codes) < 2**31 - 1


def test_numbers_whose_squares_float32_does_not_hold(samples: str, tmp_path: Path) -> None:
    for number in range(16):
        np.save(tmp_path / f"{number}.npy", correlated(number) * np.float32(1e25))
    report, _ = made(net("conv"), str(tmp_path), weight_bits=4, equalize=False, tune_ranges=False)
    said = [f.why for f in report.findings if f.step == "round"]  # type: ignore[union-attr]
    assert said == ["what it reads is too large for squares in float32"] * 3


@pytest.mark.parametrize("effort", ["balanced", "best"])
@pytest.mark.parametrize("options", [{}, {"target_size": 0.3}], ids=["", "searched"])
def test_a_network_with_outputs_in_front(options: dict[str, object], effort: str, samples: str) -> None:
    """A backbone that returns a map, and a head on it."""
    body = f"a = Conv<{SAME}>(x, w) b = Relu(a) h = Conv(b, u) c = Conv<{SAME}>(b, v) d = Relu(c) y = Conv(d, u)"
    used = {name: WEIGHTS[name] for name in "wvu"}
    proto = network(body, ("N", 3, 8, 8), ("b", "h", "y"), **used)
    report, _ = made(proto, samples, edge_bits=8, effort=effort, **options)
    assert all((output.sqnr_db or 99) > 12 for output in report.verify.outputs)


def test_biases_of_nearest_codes_take_back_what_the_layers_before_do(samples: str, tmp_path: Path) -> None:
    """Where others know the means of the float network alone. Codes stay what they are."""
    for number in range(31):  # of so few none is held back
        (tmp_path / f"{number}.npy").symlink_to(Path(samples) / f"{number:02}.npy")
    proto = net("residual")
    ref = Session(proto.SerializeToString())
    pictures = [{"x": correlated(number)[None]} for number in range(31)]
    expected = np.mean([ref.run_all(feed)[0] for feed in pictures], axis=0).mean(axis=(0, 2, 3))
    moved, codes = [], []
    for correction in ("measured", "sequential"):
        options = {"tune_ranges": False, "equalize": False, "rounding": "nearest", "activation_bits": 16}
        report, data = made(proto, str(tmp_path), weight_bits=2, edge_bits=2, bias_correction=correction, **options)
        got = Session(data)
        found = np.mean([got.run_all(feed)[0] for feed in pictures], axis=0).mean(axis=(0, 2, 3))
        moved.append(float(np.abs(found - expected).max()))
        kept = onnx.load_from_string(data).graph.initializer
        codes.append({t.name: numpy_helper.to_array(t).tolist() for t in kept if t.data_type == 3})
        assert any(f.step == "bias" for f in report.findings) is (correction == "sequential")
    assert codes[0] == codes[1]
    assert moved[1] < 0.3 * moved[0]


def test_large_layers_of_eight_bits_are_left_to_the_best_effort(samples: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {name: replace(effort, most_weights=100) for name, effort in layer_rounding.ROUNDING_EFFORTS.items()}
    monkeypatch.setattr("qconv.quantization.layer_rounding.ROUNDING_EFFORTS", small)
    report, _ = made(net("conv"), samples, edge_bits=8)
    said = {f.where for f in report.findings if f.step == "round" and "too large" in getattr(f, "why", "")}
    assert said == {"a", "c"}
    report, _ = made(net("conv"), samples, weight_bits=4)
    assert not [f for f in report.findings if "too large" in getattr(f, "why", "")]


def test_weights_alone_gain(samples: str) -> None:
    proto = net("conv")
    _, second = made(proto, samples, weight_bits=3, activation_bits=32)
    _, nearest = made(proto, samples, weight_bits=3, activation_bits=32, rounding="nearest")
    assert sqnr(proto, second) > sqnr(proto, nearest) + 3


def test_best_is_no_worse_than_balanced(samples: str) -> None:
    proto = net("conv")
    found = [sqnr(proto, made(proto, samples, weight_bits=3, effort=effort)[1]) for effort in ("balanced", "best")]
    assert found[1] > found[0] - 0.5


def test_no_pair_of_products_saturates(samples: str) -> None:
    """8-bit weights whatever the picture: codes of any activation, 0 to 255."""
    _, data = made(net("conv"), samples, saturation_safe=True)
    weights = [t for t in onnx.load_from_string(data).graph.initializer if t.dims and t.data_type == 3]
    assert len([t for t in weights if len(t.dims) == 4]) == 3
    for tensor in weights:
        if len(tensor.dims) == 4:
            assert saturation.worst_pair_ratio(numpy_helper.to_array(tensor), 0).max() <= 1


def test_the_same_bytes_again(samples: str) -> None:
    assert made(net("residual"), samples)[1] == made(net("residual"), samples)[1]


def test_shared_weights_are_rounded_together_and_say_so(samples: str) -> None:
    proto = network(
        f"a = Conv<{SAME}>(x, w) b = Conv<{SAME}>(x, w) c = Mul(a, b) y = Conv(c, u)",
        ("N", 3, 8, 8),
        w=(8, 3, 3, 3),
        u=(5, 8, 1, 1),
    )
    report, _ = made(proto, samples)
    said = {f.where: str(f) for f in report.findings if f.step == "round"}
    assert said.keys() == {"a", "b", "y"}
    assert said["a"].replace("'a'", "'b'") == said["b"]


def test_statistics_alone_leave_codes_nearest(samples: str, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(net("conv").SerializeToString())
    stats = tmp_path / "s.npz"
    quantize(file, None, Recipe(save_stats=str(stats), rounding="nearest"), DataOptions((samples,)))
    report, alone = quantize(file, None, Recipe(stats=str(stats)))
    assert [f for f in report.findings if f.step == "round" and "pass pictures" in f.why]  # type: ignore[union-attr]
    _, nearest = quantize(file, None, Recipe(stats=str(stats), rounding="nearest"))
    codes = [
        {t.name: t.raw_data for t in onnx.load_from_string(data or b"").graph.initializer} for data in (alone, nearest)
    ]
    assert codes[0] == codes[1]


def test_no_bias_correction_means_none(samples: str) -> None:
    """A layer without a bias gets none."""
    _, data = made(net("conv"), samples, bias_correction="none")
    convs = [node for node in onnx.load_from_string(data).graph.node if node.op_type == "Conv"]
    assert [len(node.input) for node in convs] == [2, 2, 2]
