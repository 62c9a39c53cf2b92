"""PRelu in the spellings of converters. Oracles: ONNX Runtime on the network as it was, and PRelu itself."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import onnx
import pytest

from qconv.errors import Change
from qconv.ir.model import Model, constant_array
from qconv.passes.fold import run_float_passes
from tests.support.models import Constant, loaded, network, random_feeds, run
from tests.support.quantized import SAME, quantized

DRAWN = int(os.environ.get("QCONV_DRAWN_GRAPHS", "60"))
"""How many networks are drawn; more to search for faults."""

SPELLINGS = {
    "itself": "b = PRelu(a, s)",
    "minus": "p = Relu(a) g = Neg(a) q = Relu(g) m = Mul(q, s) b = Sub(p, m)",
    "plus": "p = Relu(a) g = Neg(a) q = Relu(g) m = Mul(minus, q) b = Add(p, m)",
    "negated after": "p = Relu(a) g = Neg(a) q = Relu(g) h = Neg(q) m = Mul(h, s) b = Add(m, p)",
    "times minus one": "p = Relu(a) g = Mul(a, less) q = Relu(g) m = Mul(q, minus) b = Add(p, m)",
    "absolute": "p = Relu(a) g = Abs(a) q = Sub(a, g) h = Mul(q, half) m = Mul(h, s) b = Add(p, m)",
    "absolute, slope first": "p = Relu(a) g = Abs(a) q = Sub(a, g) h = Mul(q, s) m = Mul(h, half) b = Add(m, p)",
    "absolute, divided": "p = Relu(a) g = Abs(a) q = Sub(a, g) h = Div(q, two) m = Mul(s, h) b = Add(p, m)",
    "both halves": """g = Abs(a) p = Add(a, g) q = Sub(a, g) h = Mul(p, half) i = Mul(q, half) m = Mul(s, i)
        b = Add(h, m)""",
    "extremes": "p = Max(a, none) q = Min(a, none) m = Mul(q, s) b = Add(p, m)",
    "clips": "p = Max(none, a) g = Neg(a) q = Max(g, none) m = Mul(q, minus) b = Add(p, m)",
    "where": "m = Mul(a, s) t = Greater(a, none) b = Where(t, a, m)",
    "where not": "m = Mul(s, a) t = Less(a, none) b = Where(t, m, a)",
    "greatest": "m = Mul(a, s) b = Max(a, m)",
}
LOOKALIKES = {
    "shifted": "p = Relu(a) g = Neg(a) h = Add(g, half) q = Relu(h) m = Mul(q, s) b = Sub(p, m)",
    "another": f"p = Relu(a) d = Conv<{SAME}>(a, v) g = Neg(d) q = Relu(g) m = Mul(q, s) b = Sub(p, m)",
    "scaled": "p = Relu(a) k = Mul(p, two) g = Neg(a) q = Relu(g) m = Mul(q, s) b = Sub(k, m)",
    "absolute value": "p = Relu(a) g = Neg(a) q = Relu(g) b = Add(p, q)",
}
CHANNELS = 6


def sloped(seed: int) -> tuple[onnx.ModelProto, str, Constant]:
    """A network with one spelling of a PRelu of `s` between two layers, and what else reads its parts."""
    rng = np.random.default_rng(seed)
    kind = list(SPELLINGS)[seed % len(SPELLINGS)]
    count = int(rng.choice([1, CHANNELS]))
    shape: tuple[int, ...] = (count, 1, 1) if count > 1 or rng.integers(2) else (1,)
    if kind != "itself" and len(shape) == 3 and rng.integers(2):
        shape = (1, *shape)
    most = 1.0 if kind == "greatest" else 1.5
    s = rng.uniform(-0.5, most, shape).astype(np.float32)
    before = f"a = Conv<{SAME}>(x, w, k)" if rng.integers(3) else f"c = Conv<{SAME}>(x, w, k) a = Add(c, c)"
    proto = network(
        f"{before} {SPELLINGS[kind]} y = Conv<{SAME}>(b, v)",
        x=(1, 3, 9, 9),
        w=(CHANNELS, 3, 3, 3),
        k=(CHANNELS,),
        v=(CHANNELS, CHANNELS, 3, 3),
        s=s,
        minus=-s,
        less=-1.0,
        half=0.5,
        two=2.0,
        none=0.0,
    )
    return proto, kind, s


def folded(proto: onnx.ModelProto, **options: bool) -> Model:
    model = loaded(proto)
    run_float_passes(model, **options)
    for seed in range(2):
        feeds = random_feeds(proto, seed)
        before, after = run(proto, feeds), run(model, feeds)
        for name, numbers in before.items():
            np.testing.assert_allclose(after[name], numbers, rtol=0, atol=1e-5 * np.abs(numbers).max())
    onnx.checker.check_model(model.proto(), full_check=True)
    assert not [finding for finding in run_float_passes(model, **options) if isinstance(finding, Change)]
    return model


@pytest.mark.parametrize("seed", range(DRAWN))
def test_spellings_are_recognised(seed: int) -> None:
    proto, _, s = sloped(seed)
    assert isinstance(s, np.ndarray)
    model = folded(proto)
    found = Counter(node.op_type for node in model.nodes()) - Counter(["Conv", "Conv", "Add"])
    assert found == {"LeakyRelu" if s.size == 1 else "PRelu": 1}
    (node,) = (node for node in model.nodes() if node.op_type in ("PRelu", "LeakyRelu"))
    held = node.attributes["alpha"].value if s.size == 1 else constant_array(node.inputs[1])
    np.testing.assert_allclose(np.reshape(held, -1), s.reshape(-1), rtol=1e-6)


@pytest.mark.parametrize("seed", range(DRAWN))
def test_they_run_in_integers(seed: int) -> None:
    """PRelu itself has no integer kernel: a LeakyRelu has, and a sum with a depthwise layer."""
    proto, kind, _ = sloped(seed)
    result = quantized(proto).check(20)
    assert result.audit.islands == (), kind


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_what_is_no_prelu_is_left_alone(kind: str) -> None:
    proto = network(
        f"a = Conv<{SAME}>(x, w) {LOOKALIKES[kind]} y = Conv(b, u)",
        x=(1, 3, 6, 6), w=(4, 3, 3, 3), v=(4, 4, 3, 3), u=(4, 4, 1, 1), s=0.25, half=0.5, two=2.0,
    )  # fmt: skip
    assert not {"PRelu", "LeakyRelu"} & {node.op_type for node in folded(proto).nodes()}


def test_zero_slopes_are_a_relu() -> None:
    for body in ("b = PRelu(a, none)", "b = Max(a, none)", "g = Abs(a) h = Add(a, g) b = Mul(h, half)"):
        proto = network(f"a = Conv(x, w) {body} y = Conv(b, u)", w=(4, 3, 1, 1), u=(4, 4, 1, 1), none=0.0, half=0.5)
        kinds = [node.op_type for node in folded(proto).nodes()]
        assert kinds == ["Conv", "Relu", "Conv"] or "Mul(h, half)" in body


def test_other_readers_keep_their_parts() -> None:
    body = "p = Relu(a) g = Neg(a) q = Relu(g) m = Mul(q, s) b = Sub(p, m) y = Conv(b, u) z = Sigmoid(q)"
    proto = network(f"a = Conv(x, w) {body}", outputs=("y", "z"), w=(4, 3, 1, 1), u=(4, 4, 1, 1), s=0.25)
    assert Counter(node.op_type for node in folded(proto).nodes()) == {
        "Conv": 2, "LeakyRelu": 1, "Neg": 1, "Relu": 1, "Sigmoid": 1,
    }  # fmt: skip


@pytest.mark.parametrize(("x", "shape"), [((2, 3), (3,)), ((1, 3, 4, 4), (3, 4, 4)), ((1, 3, 4, 4), (4,))])
def test_slopes_of_places_stay(x: tuple[int, ...], shape: tuple[int, ...]) -> None:
    proto = network("y = PRelu(x, s)", x=x, s=shape)
    assert [node.op_type for node in folded(proto, for_ort=True).nodes()] == ["PRelu"]


def test_other_runtimes_get_the_prelu() -> None:
    proto = network(
        f"a = Conv<{SAME}>(x, w) b = PRelu(a, s) y = Conv(b, u)", w=(4, 3, 3, 3), s=(4, 1, 1), u=(4, 4, 1, 1)
    )
    for target, kept in (("ort-cpu", 0), ("tensorrt", 1), ("openvino", 1), ("generic", 1)):
        assert quantized(proto, target=target).wiring.count("PRelu") == kept
