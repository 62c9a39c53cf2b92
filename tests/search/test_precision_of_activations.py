"""Which activations get 16 bits or float, end to end: by `choose_division`, by `--max-drop`, and from a file again.

Oracle: of a network in which one tensor is loud by construction, that one, and counts by hand. Channel 0 of a lies near
200, which the bias of b takes back: over all of a a step of 8 bits is 0.8, and what channels say is about 1.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qconv.config.choices import Drop, LayerBits
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.config.serialization import read_layer_bits
from qconv.errors import QconvError
from qconv.report import console
from qconv.results.precision import PreciseShare
from qconv.results.quantize import Report
from qconv.runtime.session import Session
from tests.support.models import network
from tests.test_pipeline import quantized

CHAIN = "cdefghijklmnoy"
END = "pads=[0,0,0,1]"  # for a second tap of zeros: of two single taps in a row one layer would be made
BODY = f"a = Conv(x, w, high) b = Conv<{END}>(a, u, back) " + " ".join(
    f"{out} = Conv<{END}>({x}, v{out})" for x, out in zip("b" + CHAIN[:-1], CHAIN, strict=True)
)


def loud_network(channels: int, size: int) -> onnx.ModelProto:
    """Kernels that turn channels, so that all numbers stay near 1 but for those of a's channel 0."""
    rng = np.random.default_rng(channels)
    names = ["w", "u", *(f"v{out}" for out in CHAIN)]
    turns = {name: np.linalg.qr(rng.normal(size=(channels, channels)))[0].astype(np.float32) for name in names}
    high = np.zeros(channels, np.float32)
    high[0] = 200
    back = -turns["u"] @ high
    turns["w"] = turns["w"][:, :3] * np.float32(math.sqrt(channels / 3))
    known = {name: kernel[..., None, None] for name, kernel in turns.items()}
    known |= {name: np.concatenate([known[name], 0 * known[name]], axis=3) for name in names[1:]}
    return network(BODY, ("N", 3, size, size), high=high, back=back, **known)


NET = loud_network(4, 8)
PLAIN = {"equalize": False, "rounding": "nearest"}
ASKED = {**PLAIN, "target": "generic", "candidate_activation_bits": (8, 16)}
LEAST = Drop("sqnr", 20.0)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(tmp_path_factory.mktemp("samples"), 8)


def drawn(folder: Path, size: int) -> Path:
    for number in range(24):
        np.save(folder / f"{number:02}.npy", picture(number, size))
    return folder


def picture(number: int, size: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=(3, size, size)).astype(np.float32)


def run(samples: Path, net: onnx.ModelProto = NET, **options: Any) -> tuple[Report, onnx.ModelProto]:
    return quantized(net, Recipe(**options), DataOptions((str(samples),)))


def bits(report: Report, kind: str = "activation") -> dict[str, Any]:
    return {row.name: row.bits for row in report.tensors if row.kind == kind}


def wide(report: Report) -> set[str]:
    return {name for name, own in bits(report).items() if own == 16}


def measured(result: onnx.ModelProto, net: onnx.ModelProto = NET) -> float:
    """SQNR in dB on an image that nothing was chosen on."""
    x = picture(99, net.graph.input[0].type.tensor_type.shape.dim[2].dim_value)[None]
    ref, got = (
        Session(proto.SerializeToString(), threads=1, optimize=False).run_all({"x": x})[0].astype(np.float64)
        for proto in (net, result)
    )
    return 10 * math.log10(np.sum(ref**2) / np.sum((ref - got) ** 2))


def test_the_loud_tensor_gets_16_bits(samples: Path) -> None:
    """The layers around a are on 16 bits, so that x and b have them, too; c reads a copy of b: 3 tensors of 18."""
    report, result = run(samples, **ASKED)
    before, worse = run(samples, **{**ASKED, "candidate_activation_bits": (8,)})
    assert wide(report) == {"x", "a", "b"}
    assert bits(report).keys() == {"x", "a", "b", "b_8_bits", *CHAIN}
    assert (before.opset, report.opset) == (17, 21)
    assert before.precision is None
    assert measured(result) > max(20, measured(worse) + 10)
    assert report.precision is not None
    assert report.precision.share == PreciseShare(3, 18, (3 + 4 + 4) / (3 + 17 * 4))


def test_what_is_told_of_16_bits(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, _ = run(samples, **ASKED)
    console.show_report(report, sys.stdout, verbose=True)
    told = capsys.readouterr().out
    assert "activations: 3 of 18 tensors (15% of their elements) in 16 bits for accuracy: " in told
    assert "all in 16 bits" in told
    found = report.as_dict()["precision"]
    assert found["bits"] == 16
    assert found["share"] == {"count": 3, "of": 18, "elements": pytest.approx(11 / 71)}


@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
def test_the_loud_tensor_stays_float_where_16_bits_are_not_taken(samples: Path, target: str) -> None:
    """There quantizers stand in front of layers: only b reads a, so that b alone is in float, of 16 tensors one."""
    options = {**PLAIN, "target": target, "candidate_activation_bits": (8, 32), "float_budget": 0.07}
    report, result = run(samples, **options)
    assert bits(report).keys() == {"x", "b", *CHAIN[:-1]}
    assert report.precision is not None
    assert report.precision.share is not None
    assert (report.precision.share.count, report.precision.share.of) == (1, 16)
    assert measured(result) > 20
    unsaid, _ = run(samples, **{**options, "candidate_activation_bits": None})
    assert bits(unsaid) == bits(report)


@pytest.mark.parametrize(
    "options",
    [
        {"float_budget": 0.1},
        {"candidate_activation_bits": None},
        {"candidate_activation_bits": None, "float_budget": 0.0},
    ],
)
def test_nothing_has_more_bits_beyond_the_budget_or_unasked(samples: Path, options: dict[str, Any]) -> None:
    """The cheapest division takes 3 of 18 tensors, which is more than a tenth."""
    report, _ = run(samples, **{**ASKED, **options})
    assert set(bits(report).values()) == {8}
    assert report.opset == (17 if options.get("candidate_activation_bits", 8) is None else 21)


@pytest.mark.parametrize("target", ["generic", "ort-cpu"])
def test_a_drop_gives_the_loud_tensor_more_bits(tmp_path: Path, target: str) -> None:
    """A budget of nearly nothing keeps all in 8 bits. No bits of weights reach 20 dB then; the fewest tensors do.

    In float is a: x, which the Conv before reads, and b, which the one behind writes, are quantized for c at most.
    """
    size, channels = (8, 4) if target == "generic" else (16, 64)
    net, path = loud_network(channels, size), tmp_path / "found.toml"
    (tmp_path / "samples").mkdir()
    samples = drawn(tmp_path / "samples", size)
    options = {**(ASKED if target == "generic" else PLAIN), "target": target, "float_budget": 1e-6}
    whole = {"x", "a", "b", *CHAIN}
    assert bits(run(samples, net, **options)[0]) == dict.fromkeys(whole, 8)
    searched = {**options, "max_drop": LEAST, "candidate_bits": (5, 8), "save_layer_bits": str(path)}
    report, result = run(samples, net, **searched)
    assert measured(result, net) > 19.5
    assert 5 in bits(report, "weight").values()
    if target == "generic":
        assert wide(report) == {"x", "a", "b"}
    else:
        assert bits(report).keys() == whole - {"x", "a"}
    again, same = run(samples, net, **{**PLAIN, "target": target, "layer_bits": read_layer_bits(path)})
    for kind in ("activation", "weight"):
        assert bits(again, kind) == bits(report, kind)
    nodes = [[(node.op_type, node.name) for node in proto.graph.node] for proto in (same, result)]
    assert nodes[0] == nodes[1]
    assert again.precision is None  # nothing is chosen beside what is named


def test_where_no_division_holds_the_error_stays(samples: Path) -> None:
    for options in ({**ASKED, "float_budget": 1e-6}, {**ASKED, "candidate_activation_bits": None}):
        least = 90.0 if options["candidate_activation_bits"] else LEAST.value
        with pytest.raises(QconvError, match="No assignment keeps --max-drop") as caught:
            run(samples, **options, max_drop=Drop("sqnr", least))
        assert "--candidate-activation-bits" in caught.value.hint


def test_a_search_for_a_size_keeps_the_division(samples: Path) -> None:
    report, result = run(samples, **ASKED, target_size=0.2)
    assert wide(report) == {"x", "a", "b"}
    assert min(bits(report, "weight").values()) < 8
    assert measured(result) > 15


def test_a_division_is_saved_without_a_search(samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "found.toml"
    report, result = run(samples, **ASKED, save_layer_bits=str(path))
    assert dict(read_layer_bits(path)) == {"a": LayerBits(None, 16), "b": LayerBits(None, 16)}
    again, same = run(samples, **{**PLAIN, "target": "generic", "layer_bits": read_layer_bits(path)})
    assert bits(again) == bits(report)
    assert [node.name for node in same.graph.node] == [node.name for node in result.graph.node]


def test_without_a_division_the_bits_of_all_weights_are_saved(samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "found.toml"
    run(samples, **PLAIN, target="generic", save_layer_bits=str(path))
    assert dict(read_layer_bits(path)) == dict.fromkeys("ab" + CHAIN, LayerBits(8))
