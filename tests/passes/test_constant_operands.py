"""Constants beside features: coordinates of pixels in a Concat, or a plane that is added. They are scaled as well.

The oracle is the same network with the constant made as small as the features, and the weights behind made larger.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qconv.passes.equalize import apply_scales
from qconv.passes.scale_groups import find_scale_groups
from tests.support.models import ints, loaded, network, random_feeds, run
from tests.support.runs import quantize_saved, write_samples

GRAPHS = int(os.environ.get("QCONV_GRAPHS", "14"))
"""Networks that are drawn."""

SIDE, CHANNELS = 12, 8
SAME = "pads=[1,1,1,1]"

JOINS = {
    "behind": "j = Concat<axis=1>(r, k)",
    "in front": "j = Concat<axis=-3>(k, r)",
    "on both sides": "j = Concat<axis=1>(k, r, k)",
    "two": "j = Concat<axis=1>(r, k, m)",
    "expanded": "s = Shape<start=0, end=1>(r) t = Concat<axis=0>(s, rest) e = Expand(k, t) j = Concat<axis=1>(r, e)",
    "below": "j = Concat<axis=2>(r, rows)",
    "added": "j = Add(r, plane)",
    "subtracted": "j = Sub(plane, r)",
    "largest": "j = Max(r, plane)",
}


def scaled(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)


def coordinates() -> NDArray[np.float32]:
    """Row and column of each pixel, 0 to 1."""
    return (np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"))[None] / (SIDE - 1)).astype(
        np.float32
    )


def drawn(seed: int, by: float) -> onnx.ModelProto:
    """Features, a constant that is `by` times too large, and a layer that makes up for it."""
    rng = np.random.default_rng(seed)
    kind = sorted(JOINS)[seed % len(JOINS)]
    body = (
        f"a = Conv<{SAME}>(x, w0, b0) r = Relu(a) {JOINS[kind]} q = Conv<{SAME}>(j, w1, b1) f = Relu(q) y = Conv(f, u)"
    )
    along = {"behind": 2, "in front": 2, "expanded": 2, "on both sides": 4, "two": 3}.get(kind, 0)
    first = rng.standard_normal((CHANNELS, CHANNELS, 3, 3)) / np.sqrt(4.5 * CHANNELS)
    apart = scaled(rng, CHANNELS, 4, 3, 3)[:, :along] / by
    planes = rng.uniform(0.2, 1, (1, CHANNELS, SIDE, SIDE))
    weight = {
        "in front": [apart, first],
        "on both sides": [apart[:, :2], first, apart[:, 2:]],
    }.get(kind, [first, apart])
    constants = {
        "w0": scaled(rng, CHANNELS, 3, 3, 3),
        "b0": rng.standard_normal(CHANNELS) * 0.1,
        "k": coordinates() * by,
        "m": rng.uniform(-1, 1, (1, 1, SIDE, SIDE)) * by,
        "w1": np.concatenate(weight, axis=1),
        "b1": rng.standard_normal(CHANNELS) * 0.1,
        "u": scaled(rng, 4, CHANNELS, 1, 1),
        "rows": planes[:, :, :2],
        "plane": planes,
    }
    if not along:  # one channel of the features, and of the constant, is larger
        large = np.ones((CHANNELS, 1, 1, 1))
        large[3] = by
        constants["w0"] = constants["w0"] * large
        constants["b0"] = constants["b0"] * large.reshape(-1)
        constants["w1"] = constants["w1"] / large.reshape(1, -1, 1, 1)
        constants |= {name: constants[name] * large.reshape(1, -1, 1, 1) for name in ("rows", "plane")}
    arrays: dict[str, NDArray] = {name: np.asarray(x, np.float32) for name, x in constants.items()}
    arrays["rest"] = ints(2, SIDE, SIDE)
    read = {word.strip("),") for word in body.replace("(", " ").split()}
    return network(body, ("N", 3, SIDE, SIDE), **{name: x for name, x in arrays.items() if name in read})


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_samples(tmp_path_factory.mktemp("samples"), (1, 3, SIDE, SIDE), 24)


@pytest.mark.parametrize("seed", range(GRAPHS))
def test_a_large_constant_loses_as_little_as_a_small_one(seed: int, samples: str, tmp_path: Path) -> None:
    by = float(np.random.default_rng(seed).uniform(20, 200))
    small, large = (quantize_saved(drawn(seed, factor), samples, tmp_path / "model.onnx")[0] for factor in (1.0, by))
    assert (large.verify.sqnr_db or 0) > min((small.verify.sqnr_db or 0) - 6, 30)
    assert not any("float outputs" in str(finding) for finding in large.findings)


def test_coordinates_of_pixels(samples: str, tmp_path: Path) -> None:
    """0 to 95 beside features of about 1: 30 dB, as the coordinates take no codes from the features."""
    rng = np.random.default_rng(6)
    apart = scaled(rng, CHANNELS, 2, 3, 3) / 30
    behind = f"j = Concat<axis=1>(r, k) q = Conv<{SAME}>(j, w1) f = Relu(q) y = Conv(f, u)"
    proto = network(
        f"a = Conv<{SAME}>(x, w0) r = Relu(a) {behind}",
        ("N", 3, SIDE, SIDE),
        w0=scaled(rng, CHANNELS, 3, 3, 3),
        k=coordinates() * 95,
        w1=np.concatenate([scaled(rng, CHANNELS, CHANNELS, 3, 3), apart], axis=1),
        u=scaled(rng, 4, CHANNELS, 1, 1),
    )
    assert (quantize_saved(proto, samples, tmp_path / "model.onnx")[0].verify.sqnr_db or 0) > 30


@pytest.mark.parametrize("seed", range(len(JOINS)))
def test_any_scales_of_constants_change_nothing(seed: int) -> None:
    proto = drawn(seed, 1.0)
    model = loaded(proto)
    groups = find_scale_groups(model)
    assert len(groups.constants) == {"on both sides": 2, "two": 2}.get(sorted(JOINS)[seed], 1)
    scales = np.where(groups.fixed, 1.0, np.random.default_rng(seed).uniform(0.2, 5, groups.fixed.size))
    apply_scales(model, groups, scales)
    feeds = {name: x[:1] for name, x in random_feeds(proto).items()}
    np.testing.assert_allclose(run(model, feeds)["y"], run(proto, feeds)["y"], rtol=1e-3, atol=1e-5)
    assert any(np.any(scales[found.classes] != 1) for found in groups.constants)


@pytest.mark.parametrize(
    ("join", "more"),
    [
        ("j = Concat<axis=1>(r, e) z = Sigmoid(e)", {}),  # the repeated constant has another reader
        ("j = Add(r, plane)", {"plane": np.ones((8, 1, 1), np.float32)}),  # one number a channel
    ],
)
def test_what_cannot_be_divided_holds_its_channels(join: str, more: dict[str, NDArray]) -> None:
    width = 10 if "Concat" in join else 8
    repeat = "s = Shape<start=0, end=1>(r) t = Concat<axis=0>(s, rest) e = Expand(k, t) " if "Concat" in join else ""
    body = f"a = Conv<{SAME}>(x, w0) r = Relu(a) {repeat}{join} y = Conv(j, w1)"
    constants = {"k": coordinates(), "rest": ints(2, SIDE, SIDE)} if "Concat" in join else {}
    outputs = ["y", "z"] if "Concat" in join else ["y"]
    proto = network(body, ("N", 3, SIDE, SIDE), outputs, w0=(8, 3, 3, 3), w1=(4, width, 1, 1), **constants, **more)
    groups = find_scale_groups(loaded(proto))
    held = {value.name: bool(groups.fixed[classes].all()) for value, classes in groups.of.items()}
    assert held["r"]
