"""Gates opened for scales of channels. Oracle: ONNX Runtime on the float network as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qconv.calibration.observer import ChannelRanges
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.ir.model import Model
from qconv.passes.fold import run_float_passes
from qconv.passes.scale_gates import choose_gate_scales, close_gates, find_scalable_gates, open_gates, scale_gates
from qconv.planning.planner import make_plan
from tests.support.models import loaded, network, random_feeds, run
from tests.support.quantized import quantized

SAME = "pads=[1,1,1,1]"
DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "models"
W = {"w": (8, 3, 3, 3), "b": (8,)}
FIRST = f"c = Conv<{SAME}>(x, w, b)"
KINDS: dict[str, onnx.ModelProto] = {
    "SiLU": network(f"{FIRST} g = Sigmoid(c) m = Mul(c, g) y = Conv(m, v)", **W, v=(4, 8, 1, 1)),
    "other order": network(f"{FIRST} g = Sigmoid(c) m = Mul(g, c) y = Conv(m, v)", **W, v=(4, 8, 1, 1)),
    "HardSwish": network(
        f"{FIRST} g = HardSigmoid<alpha=0.16666667>(c) m = Mul(c, g) y = Conv(m, v)", **W, v=(4, 8, 1, 1)
    ),
    "depthwise and pool": network(
        f"{FIRST} g = Sigmoid(c) m = Mul(c, g) d = Conv<group=8, {SAME}>(m, u) p = MaxPool<kernel_shape=[2,2]>(m) "
        "e = Conv(p, v) f = GlobalAveragePool(d) h = Conv(f, v) y = Add(e, h)",
        **W,
        u=(8, 1, 3, 3),
        v=(4, 8, 1, 1),
    ),
    "joined": network(
        f"{FIRST} g = Sigmoid(c) m = Mul(c, g) d = Conv(x, k) j = Concat<axis=1>(m, d) y = Conv(j, v)",
        **W,
        k=(2, 3, 1, 1),
        v=(4, 10, 1, 1),
    ),
    "a sum of two": network(
        f"{FIRST} g = Sigmoid(c) m = Mul(c, g) d = Conv(m, u) h = Sigmoid(d) n = Mul(d, h) s = Add(m, n) "
        "y = Conv(s, v)",
        **W,
        u=(8, 8, 1, 1),
        v=(4, 8, 1, 1),
    ),
}
HELD = {
    "returned": network(
        f"{FIRST} g = Sigmoid(c) m = Mul(c, g) y = Conv(m, v)", outputs=("y", "m"), **W, v=(4, 8, 1, 1)
    ),
    "read elsewhere": network(
        f"{FIRST} g = Sigmoid(c) m = Mul(c, g) d = Add(m, c) y = Conv(d, v)", **W, v=(4, 8, 1, 1)
    ),
    "a reader without weights": network(
        f"{FIRST} g = Sigmoid(c) m = Mul(c, g) t = Tanh(m) y = Conv(t, v)", **W, v=(4, 8, 1, 1)
    ),
    "the gate of another": network(
        f"{FIRST} d = Conv<{SAME}>(x, w, b) g = Sigmoid(d) m = Mul(c, g) y = Conv(m, v)", **W, v=(4, 8, 1, 1)
    ),
}


def folded(proto: onnx.ModelProto) -> Model:
    model = loaded(proto)
    run_float_passes(model)
    return model


def farthest(proto: onnx.ModelProto, model: Model) -> float:
    """The largest difference of any output, over the largest magnitude of that output."""
    feeds = random_feeds(proto)
    before, after = run(proto, feeds), run(model, feeds)
    return max(float(np.abs(before[name] - after[name]).max() / np.abs(before[name]).max()) for name in before)


def scaled(model: Model, *, whole: bool = False) -> int:
    """Scale every gate that can be by random numbers from 1/16 to 16. Returns how many there were.

    whole: by powers of two, which change no bit.
    """
    rng = np.random.default_rng(0)
    opened = open_gates(model, [gate.data.name or "" for gate in find_scalable_gates(model)])
    sizes = {name: layer.outputs[0].shape for name, layer in opened.items()}
    logs = {name: rng.uniform(-4, 4, int(shape[1])) for name, shape in sizes.items() if shape is not None}
    scale_gates(model, opened, {name: 2.0 ** (np.rint(own) if whole else own) for name, own in logs.items()})
    return len(opened)


@pytest.mark.parametrize("kind", KINDS)
def test_any_scales_leave_the_float_network_as_it_is(kind: str) -> None:
    model = folded(KINDS[kind])
    assert scaled(model) == (2 if kind == "a sum of two" else 1)
    assert farthest(KINDS[kind], model) <= 1e-6


@pytest.mark.parametrize("kind", HELD)
def test_gates_whose_scale_something_holds_are_not_found(kind: str) -> None:
    assert find_scalable_gates(folded(HELD[kind])) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_opened_in_vain_is_closed_again(kind: str) -> None:
    model = folded(KINDS[kind])
    before = [node.name for node in model.nodes()]
    close_gates(model, open_gates(model, [gate.data.name or "" for gate in find_scalable_gates(model)]))
    assert [node.name for node in model.nodes()] == before
    assert farthest(KINDS[kind], model) <= 1e-6


def unlike(seed: int) -> onnx.ModelProto:
    """A SiLU whose channels reach from 1 to 64, and count alike at the output."""
    rng = np.random.default_rng(seed)
    reach = np.float32(2.0) ** np.arange(0, 7, dtype=np.float32)
    w = rng.normal(size=(7, 3, 3, 3)).astype(np.float32) * reach[:, None, None, None]
    v = rng.normal(size=(4, 7, 1, 1)).astype(np.float32) / reach[None, :, None, None]
    return network(f"c = Conv<{SAME}>(x, w) g = Sigmoid(c) m = Mul(c, g) y = Conv(m, v)", x=(2, 3, 8, 8), w=w, v=v)


def watch(proto: onnx.ModelProto) -> dict[str, ChannelRanges]:
    """What channels of x, c and m do on random pictures."""
    seen = onnx.ModelProto.FromString(proto.SerializeToString())
    seen.graph.output.extend([onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "cm"])
    feeds = [random_feeds(proto, seed) for seed in range(4)]
    found = {}
    for name in "xcm":
        values = np.concatenate([feed["x"] if name == "x" else run(seen, feed)[name] for feed in feeds])
        low, high, mean, spread = (of(values, axis=(0, 2, 3)) for of in (np.min, np.max, np.mean, np.var))
        low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
        found[name] = ChannelRanges(low, high, low, high, low, mean, spread)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_chosen_scales_take_noise_away_where_channels_are_unlike(seed: int) -> None:
    """In the file, run by ONNX Runtime. 7 channels an octave apart leave the smallest ones 2 bits of 8."""
    proto = unlike(seed)
    model = folded(proto)
    opened = open_gates(model, ["c"])
    plan = make_plan(model, Recipe(), TARGETS["ort-cpu"])
    scales = choose_gate_scales(model, plan, opened, watch(proto))
    assert scales["c"][-1] > 4 * scales["c"][0]
    scale_gates(model, opened, scales)
    assert farthest(proto, model) <= 1e-6
    feeds = [random_feeds(proto, seed) for seed in range(4)]
    after = quantized(model.proto(), feeds)
    assert after.sqnr() > quantized(proto, feeds).sqnr() + 3
    assert "Conv" not in after.islands


def test_alike_channels_are_left_alone() -> None:
    """Nothing is gained where every channel fills its range."""
    proto = network(
        f"c = Conv<{SAME}>(x, w) g = Sigmoid(c) m = Mul(c, g) y = Conv(m, v)",
        x=(2, 3, 8, 8),
        w=np.tile(np.random.default_rng(0).normal(size=(1, 3, 3, 3)).astype(np.float32), (4, 1, 1, 1)),
        v=np.ones((1, 4, 1, 1), np.float32),
    )
    model = folded(proto)
    opened = open_gates(model, ["c"])
    plan = make_plan(model, Recipe(), TARGETS["ort-cpu"])
    assert choose_gate_scales(model, plan, opened, watch(proto)) == {}


@pytest.mark.parametrize("name", ["yolox_nano", "efficientnet_b0_binary"])
def test_real_networks_stay_what_they_are(name: str) -> None:
    """By powers of two: with others YOLOX-Nano moves as far, 6e-6, as by the last bit of its input, 4e-6."""
    path = DATA / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    proto = onnx.load(path)
    shape = [d.dim_value or 1 for d in proto.graph.input[0].type.tensor_type.shape.dim]
    model = loaded(proto)
    run_float_passes(model)
    before = model.copy()
    assert scaled(model, whole=True) > 30
    x = np.random.default_rng(0).normal(size=(1, *shape[1:])).astype(np.float32)
    (expected,), (got,) = (list(run(one, {proto.graph.input[0].name: x}).values()) for one in (before, model))
    assert np.abs(expected - got).max() / np.abs(expected).max() <= 1e-6
