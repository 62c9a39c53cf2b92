"""Whole runs on networks with channels of very unequal size; the oracle is the float network in ONNX Runtime."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe, make_request
from qconv.errors import Change, QconvError
from qconv.ir.files import Source
from qconv.ir.metadata import read_equalization, write_equalization
from qconv.pipeline import quantize as pipeline_quantize
from qconv.pipeline.quantize import quantize
from qconv.results.quantize import Report
from qconv.runtime.session import Session
from tests.support.models import network

SIZES = np.float32(2.0) ** np.linspace(-4, 4, 8, dtype=np.float32)  # of channels, far apart


def unequal(activation: str = "Relu", **more: Any) -> onnx.ModelProto:
    """Conv -> activation -> depthwise Conv -> Conv, whose channels are scaled apart and back."""
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 3, 3, 3), (4, 8, 1, 1)))
    return network(
        f"c = Conv<pads=[1,1,1,1]>(x, w, b) r = {activation} d = Conv<group=8, pads=[1,1,1,1]>(r, v, e) q = Relu(d)"
        " k = Conv(q, u) g = GlobalAveragePool(k) y = Flatten(g)",
        x=("N", 3, 8, 8),
        w=first * SIZES.reshape(-1, 1, 1, 1),
        b=rng.standard_normal(8).astype(np.float32) * SIZES,
        v=rng.uniform(0.1, 1, (8, 1, 3, 3)).astype(np.float32) / SIZES.reshape(-1, 1, 1, 1),
        e=rng.standard_normal(8).astype(np.float32),
        u=second,
        **more,
    )


@pytest.fixture
def samples(tmp_path: Path) -> str:
    folder = tmp_path / "samples"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for index in range(40):
        np.save(folder / f"{index:02}.npy", rng.standard_normal((1, 3, 8, 8)).astype(np.float32))
    return str(folder)


def quantized(proto: onnx.ModelProto, samples: str, **options: Any) -> Report:
    path = Path(samples).parent / "model.onnx"
    onnx.save(proto, path)
    report, _ = pipeline_quantize.quantize(
        path,
        path.with_suffix(".out.onnx"),
        *make_request({"calib": (samples,), "equalize": True, "rounding": "nearest"} | options),
    )
    return report


def steps(report: Report, kind: type) -> list[Any]:
    return [f for f in report.findings if isinstance(f, kind) and f.step == "equalize"]


@pytest.mark.parametrize("granularity", ["per-channel", "per-tensor"])
def test_unequal_channels_lose_less(samples: str, granularity: str) -> None:
    proto = unequal("Relu(c)")
    without = quantized(proto, samples, weight_granularity=granularity, equalize=False)
    scaled = quantized(proto, samples, weight_granularity=granularity)
    assert not steps(without, Change)
    assert steps(scaled, Change)
    gain = (scaled.verify.sqnr_db or 0) - (without.verify.sqnr_db or 0)
    assert gain > (3 if granularity == "per-tensor" else 0)


@pytest.mark.parametrize("activation", ["LeakyRelu<alpha=0.2>(c)", "PRelu(c, slope)", "Clip(c, zero, high)"])
def test_all_activations_that_hand_factors_on(samples: str, activation: str) -> None:
    """A Clip whose bound is far above all values is a Relu."""
    constants = {"slope": np.full((8, 1, 1), 0.1, np.float32), "zero": 0.0, "high": 1e6}
    used = {name: value for name, value in constants.items() if name in activation}
    assert steps(quantized(unequal(activation, **used), samples, weight_granularity="per-tensor"), Change)


def test_channels_of_a_clip_that_binds_keep_their_scale(samples: str) -> None:
    """Its bound cuts all channels: only the tensor behind the depthwise layer may move."""
    report = quantized(
        unequal("Clip(c, zero, high)", zero=0.0, high=0.02), samples, weight_granularity="per-tensor", keep_float=("c",)
    )
    assert {change.where for change in steps(report, Change)} <= {"d", "k"}


def test_statistics_cannot_be_watched_again() -> None:
    with pytest.raises(QconvError, match="--equalize with --stats"):
        Recipe(stats="s.npz", equalize=True)


def test_saved_statistics_are_of_the_network_as_it_is(samples: str, tmp_path: Path) -> None:
    """The file is the same, whether the network was equalized afterwards or not."""
    files = [tmp_path / "one.qstats", tmp_path / "two.qstats"]
    for equalize, file in zip((True, False), files, strict=True):
        quantized(unequal("Relu(c)"), samples, save_stats=str(file), equalize=equalize)
    first, second = (file.read_bytes() for file in files)
    assert first == second


def test_the_same_bytes_again(samples: str) -> None:
    path = Path(samples).parent / "model.onnx"
    onnx.save(unequal("Relu(c)"), path)
    made = []
    for name in ("one.onnx", "two.onnx"):
        pipeline_quantize.quantize(
            path, path.with_name(name), Recipe(equalize=True, weight_granularity="per-tensor"), DataOptions((samples,))
        )
        made.append(path.with_name(name).read_bytes())
    assert made[0] == made[1]


def test_only_what_is_done_now_is_told(samples: str) -> None:
    """A float network may carry what was done to the channels of another one that it was made from."""
    model, made = Path(samples).parent / "model.onnx", []
    for told in ({}, {"c": np.full(8, math.log(2)), "d": np.full(8, math.log(2))}):
        proto, carried = unequal("Relu(c)"), dict[str, str]()
        write_equalization(carried, told, {})
        onnx.helper.set_model_props(proto, carried)
        onnx.save(proto, model)
        out = model.with_name("out.onnx")
        pipeline_quantize.quantize(model, out, *make_request({"calib": (samples,), "weight_granularity": "per-tensor"}))
        found = read_equalization({entry.key: entry.value for entry in onnx.load(out).metadata_props})
        made.append({name: steps.tolist() for name, steps in found.scales.items()})
    assert made[0] == made[1]
    assert "c" in made[0]


def test_channels_are_lowered_by_what_all_pictures_show(tmp_path: Path) -> None:
    """One dark picture among 96 bright ones, drawn behind those that channels are watched on, and not held back."""
    rng = np.random.default_rng(0)
    for index in range(97):
        low, high = (0.0, 0.5) if index == 51 else (4.0, 5.0)
        np.save(tmp_path / f"{index:02}.npy", rng.uniform(low, high, (3, 6, 6)).astype(np.float32))
    w, v = (np.abs(rng.standard_normal(shape)).astype(np.float32) + 0.2 for shape in ((4, 3, 1, 1), (5, 4, 1, 1)))
    proto = network("a = Conv(x, w, b) r = Relu(a) y = Conv(r, v)", ("N", 3, 6, 6), w=w, v=v, b=np.zeros(4, np.float32))
    dark = rng.uniform(0, 0.5, (1, 3, 6, 6)).astype(np.float32)
    (ref,) = Session(proto.SerializeToString()).run_all({"x": dark})

    def made() -> tuple[bool, float]:
        """Whether channels are lowered, and how well a dark picture does, in dB."""
        report, data = quantize(
            Source("m", None, proto.SerializeToString()), None, Recipe(), DataOptions((str(tmp_path),))
        )
        (got,) = Session(data or b"").run_all({"x": dark})
        lowered = [f for f in report.findings if f.step == "equalize" and "high channels" in getattr(f, "what", "")]
        return bool(lowered), 10 * np.log10(np.square(ref).sum() / np.square(ref - got).sum())

    lowered, sqnr = made()
    assert not lowered
    assert sqnr > 15
    (tmp_path / "51.npy").unlink()
    lowered, sqnr = made()
    assert lowered
