"""Ranges that a Concat shares with what it reads. Oracle: closed forms, and what a float network returns."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from qconv.calibration.range_estimators import Range
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.errors import Change
from qconv.ir.model import Value
from qconv.planning.plan import Decision, Plan
from qconv.planning.planner import make_plan
from qconv.quantization import parameters
from qconv.quantization.parameters import MOST_WIDENED_TO_JOIN, choose_activation_params
from qconv.quantizer import QuantParams, QuantSpec
from tests.support.models import loaded, network
from tests.support.quantized import Quantized, pictures, quantized

SPEC = QuantSpec(8, signed=False, symmetric=False)
WIDE = QuantSpec(16, signed=False, symmetric=False)
W, V = (4, 3, 1, 1), (4, 4, 1, 1)
JOINED = """c = Conv(x, w) d = Conv(x, w) e = Conv(d, v) a = Concat<axis=1>(c, d) y = Conv(a, u)"""


def planned(body: str, **weights: tuple[int, ...]) -> Plan:
    model = loaded(network(body, outputs=("y", "e") if "e = " in body else ("y",), **weights))
    return make_plan(model, Recipe(), TARGETS["ort-cpu"])


def chosen(plan: Plan, ranges: Mapping[str, Range]) -> dict[str, QuantParams]:
    """The parameters of a plan where the calibrator finds these ranges, and -1 to 1 for all others."""
    known = {value.name or "": ranges.get(value.name or "", (-1.0, 1.0)) for value in plan.activations}
    params, _ = choose_activation_params(plan, {}, Recipe(), known)
    return {value.name or "": found for value, found in params.activations.items()}


def told(plan: Plan, ranges: Mapping[str, Range]) -> list[str]:
    """The Concats of which it is said that they copy codes."""
    known = {value.name or "": ranges.get(value.name or "", (-1.0, 1.0)) for value in plan.activations}
    _, findings = choose_activation_params(plan, {}, Recipe(), known)
    return [found.where for found in findings if isinstance(found, Change) and "copies codes" in found.what]


def pair(ranges: Mapping[str, Range]) -> dict[str, QuantParams]:
    """c and a are tied; d has another reader."""
    plan = planned(JOINED, w=W, v=V, u=(4, 8, 1, 1))
    assert [{value.name for value in group} for group in plan.ties] == [{"c", "a"}]
    return chosen(plan, {**ranges, "c": ranges["a"]})


def same(one: QuantParams, other: QuantParams) -> bool:
    return bool(one.scale == other.scale and one.zero_point == other.zero_point)


@pytest.mark.parametrize(
    ("own", "result"),
    [
        ((-1.0, 1.0), (-1.2, 1.2)),
        ((-1.2, 1.2), (-1.0, 1.0)),
        ((0.0, 1.0), (-0.2, 1.04)),
        ((-1.0, 0.9), (-0.9, 1.0)),
        ((-1.0, 1.0), (-1.0, 1.0)),
    ],
)
def test_near_ranges_are_shared(own: Range, result: Range) -> None:
    found = pair({"d": own, "a": result})
    plan = planned(JOINED, w=W, v=V, u=(4, 8, 1, 1))
    assert told(plan, {"d": own, "a": result, "c": result}) == ["a"]
    union = SPEC.from_range(min(own[0], result[0]), max(own[1], result[1]))
    assert all(same(found[name], union) for name in "cda")


@pytest.mark.parametrize(
    ("own", "result"),
    [
        ((-1.0, 1.0), (-1.3, 1.3)),
        ((-1.3, 1.3), (-1.0, 1.0)),
        ((0.0, 1.0), (-1.0, 0.0)),  # the union has twice the steps of either
        ((-1.0, 0.7), (-0.4, 1.3)),
    ],
)
def test_far_ranges_stay_apart(own: Range, result: Range) -> None:
    assert not told(planned(JOINED, w=W, v=V, u=(4, 8, 1, 1)), {"d": own, "a": result, "c": result})
    found = pair({"d": own, "a": result})
    assert same(found["d"], SPEC.from_range(*own))
    assert same(found["a"], SPEC.from_range(*result))
    assert same(found["c"], found["a"])


@pytest.mark.parametrize("member", ["d", "c", "a"])
def test_what_is_given_stays(member: str) -> None:
    """So does what is to be joined with it."""
    plan = planned(JOINED, w=W, v=V, u=(4, 8, 1, 1))
    before = {value.name or "": SPEC.from_range(-1.1, 1.1) for value in plan.activations if value.name in ("c", "a")}
    fixed = SPEC.from_range(-1.0, 1.05)
    plan.given[of(plan, member)] = fixed
    found = chosen(plan, {"d": (-1.0, 1.0), "c": (-1.1, 1.1), "a": (-1.1, 1.1)})
    expected = {**before, "d": SPEC.from_range(-1.0, 1.0), member: fixed}
    assert all(same(found[name], params) for name, params in expected.items())


def test_codes_of_other_bits_stay() -> None:
    plan = planned(JOINED, w=W, v=V, u=(4, 8, 1, 1))
    plan.activations[of(plan, "d")] = Decision(WIDE, "a test wants it")
    found = chosen(plan, {"d": (-1.0, 1.0), "c": (-1.1, 1.1), "a": (-1.1, 1.1)})
    assert same(found["d"], WIDE.from_range(-1.0, 1.0))
    assert same(found["a"], SPEC.from_range(-1.1, 1.1))


def test_tied_tensors_without_a_concat_keep_what_is_set() -> None:
    plan = planned("c = Conv(x, w) m = MaxPool<kernel_shape=[2,2]>(c) y = Conv(m, v)", w=W, v=V)
    found = chosen(plan, {"c": (-1.0, 1.0), "m": (-1.1, 1.1)})
    assert same(found["c"], SPEC.from_range(-1.0, 1.0))
    assert same(found["m"], SPEC.from_range(-1.1, 1.1))


def test_a_concat_in_float_shares_nothing() -> None:
    plan = planned(JOINED, w=W, v=V, u=(4, 8, 1, 1))
    plan.integer -= {node for node in plan.integer if node.op_type == "Concat"}
    found = chosen(plan, {"d": (-1.0, 1.0), "c": (-1.1, 1.1), "a": (-1.1, 1.1)})
    assert not same(found["d"], found["a"])


def of(plan: Plan, name: str) -> Value:
    return next(value for value in plan.activations if value.name == name)


# -- chains ------------------------------------------------------------------------------------------------------------

BLOCKS = 6


def chain(backwards: bool) -> Plan:
    """Each Concat joins the one before, which a Conv reads, too, with what that Conv makes of it."""
    order = "c{0}, j{0}" if backwards else "j{0}, c{0}"
    nodes = [f"c{n} = Conv(j{n}, w{n}) j{n + 1} = Concat<axis=1>({order.format(n)})" for n in range(BLOCKS)]
    body = f"j0 = Conv(x, v) {' '.join(nodes)} y = Conv(j{BLOCKS}, u)"
    weights = {f"w{n}": (2, 4 + 2 * n, 1, 1) for n in range(BLOCKS)}
    return planned(body, v=W, u=(2, 4 + 2 * BLOCKS, 1, 1), **weights)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_chain_grows_no_further_than_the_limit_from_its_smallest_step(backwards: bool) -> None:
    """1, 1.2, 1.44 and so on: of neighbours each step is near, of the first only that of the second."""
    plan = chain(backwards)
    ends = {f"{kind}{n + (kind == 'c')}": 1.2**n for n in range(BLOCKS + 1) for kind in "jc"}
    ends |= {f"c{n}": 1.2 ** (n + 1) for n in range(BLOCKS)}
    found = chosen(plan, {name: (-end, end) for name, end in ends.items()})
    steps = [float(found[f"j{n}"].scale) for n in range(BLOCKS + 1)]
    assert [same(found[f"j{n}"], found[f"j{n + 1}"]) for n in range(BLOCKS)] == [n % 2 == 0 for n in range(BLOCKS)]
    assert steps[0] == pytest.approx(1.2 * float(SPEC.from_range(-1, 1).scale), rel=0.01)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_whole_chain_of_near_ranges_shares_one(backwards: bool) -> None:
    """The first range is the widest: a set that has grown by it goes on growing."""
    plan = chain(backwards)
    ends = {"j0": 1.1}
    for n in range(BLOCKS):
        ends |= dict.fromkeys((f"c{n}", f"j{n + 1}"), 1.05 if n % 2 else 1.0)
    found = chosen(plan, {name: (-end, end) for name, end in ends.items()})
    assert len({float(found[name].scale) for name in ends}) == 1
    assert same(found["j0"], SPEC.from_range(-1.1, 1.1))


@pytest.mark.parametrize("seed", range(20))
def test_no_step_grows_beyond_the_limit_and_no_range_shrinks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    plan = chain(bool(seed % 2))
    groups = {group: (-rng.uniform(0.8, 1.2), rng.uniform(0.8, 1.2)) for group in set(plan.group_of().values())}
    own = {value.name or "": ends for group, ends in groups.items() for value in group}
    found = chosen(plan, own)
    for name, (low, high) in own.items():
        reached = tuple(map(float, found[name].code_range()))
        step = float(SPEC.from_range(low, high).scale)
        assert float(found[name].scale) <= MOST_WIDENED_TO_JOIN * step * (1 + 1e-6)
        assert reached[0] <= low + step
        assert reached[1] >= high - step
    for group in groups:
        assert all(same(found[group[0].name or ""], found[value.name or ""]) for value in group)


def dense() -> Quantized:
    """A chain whose ranges grow by a sixth from end to end; it returns the channels that go through all of it."""
    nodes = [f"s{n} = Conv(j{n}, w{n}) j{n + 1} = Concat<axis=1>(j{n}, s{n})" for n in range(BLOCKS)]
    weights = {f"w{n}": (1.03 + 0.03 * n) * first_of(4 + 4 * n) for n in range(BLOCKS)}
    body = f"j0 = Conv(x, v) {' '.join(nodes)} y = Conv(j{BLOCKS}, eye)"
    proto = network(body, ("N", 3, 8, 8), v=first_of(3), eye=first_of(4 + 4 * BLOCKS), **weights)
    return quantized(proto, pictures((4, 3, 8, 8), low=-3, high=3))


def first_of(inputs: int) -> NDArray[np.float32]:
    """Weights of a 1x1 layer that hand on the first four channels."""
    return np.eye(4, inputs, dtype=np.float32)[:, :, None, None]


def test_a_chain_that_copies_codes_makes_less_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = dense().check()
    assert len({found.scale.item() for name, found in activations(shared) if name[0] in "js"}) == 1
    monkeypatch.setattr(parameters, "MOST_WIDENED_TO_JOIN", 0.0)
    apart = dense()
    assert len({found.scale.item() for name, found in activations(apart) if name[0] in "js"}) == BLOCKS + 1
    assert shared.sqnr() > apart.sqnr() + 1


def activations(result: Quantized) -> list[tuple[str, QuantParams]]:
    return [(value.name or "", found) for value, found in result.params.activations.items()]


@pytest.mark.parametrize("activation", ["Relu(d)", "Clip(d, zero, six)"])
def test_a_range_stays_within_what_an_absorbed_activation_cuts_off(activation: str) -> None:
    """A wider one would leave the activation, and the layer in front of it, in float."""
    body = f"c = Conv(x, w) d = Conv(x, w) f = {activation} e = Conv(f, v) a = Concat<axis=1>(c, f) y = Conv(a, u)"
    plan = planned(body, w=W, v=V, u=(4, 8, 1, 1), zero=0.0, six=6.0)  # type: ignore[arg-type]
    apart = chosen(plan, {"f": (0.0, 6.0), "a": (-0.5, 6.0), "c": (-0.5, 6.0)})
    assert not same(apart["f"], apart["a"])
    joined = chosen(plan, {"f": (0.0, 5.0), "a": (0.0, 5.5), "c": (0.0, 5.5)})
    assert same(joined["f"], joined["a"])
