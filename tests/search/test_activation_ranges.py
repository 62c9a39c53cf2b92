"""Ranges set by what outputs lose: against closed forms, brute force and ONNX Runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.errors import Skipped
from qconv.ir.files import Source
from qconv.ir.model import Model
from qconv.ir.stepwise import NetworkTail, StepwiseRun
from qconv.pipeline.quantize import quantize
from qconv.planning.planner import make_plan
from qconv.quantizer import QuantParams, QuantSpec
from qconv.reporter import Reporter
from qconv.runtime.session import Session
from qconv.search.activation_ranges import (
    SEARCH_BUDGETS,
    RangeSearch,
    SearchBudget,
    SearchMemory,
    search_activation_ranges,
)
from qconv.search.loudest_images import PickedImages
from qconv.storage import ArrayStore
from tests.support.models import loaded, network

ONE = np.ones((1, 1, 1, 1), np.float32)
UINT8 = QuantSpec(8, signed=False, symmetric=False)
ALL = SearchBudget(few=2, many=64, loud=0, apart=0, far=64, loudest=0, near=0)


def heard(model: Model, pictures: Sequence[NDArray]) -> PickedImages:
    """The pictures with what the network says of them."""
    session, feeds = Session(model.proto().SerializeToString()), [{"x": x} for x in pictures]
    return PickedImages(feeds, [1.0] * len(feeds), [session.run(["y"], feed) for feed in feeds])


def factor(body: str, pictures: list[NDArray], top: float, looks: SearchBudget = ALL, **weights: NDArray) -> float:
    """What becomes of the range [0, top] of tensor b."""
    model = loaded(network(body, ("N", 1, 8, 8), **weights))
    plan = make_plan(model, Recipe(), TARGETS["ort-cpu"])
    chosen = {value: UINT8.from_range(-top, top) for value in plan.activations}
    for value in chosen:
        if value.name == "b":
            chosen[value] = UINT8.from_range(0, top)
    found = search_activation_ranges(model, plan, chosen, heard(model, pictures), looks, 1, Reporter())
    return found.ranges.get("b", (0.0, top))[1] / top


def spread(number: int, top: float) -> NDArray[np.float32]:
    x = np.random.default_rng(number).uniform(0, 1, (1, 1, 8, 8)).astype(np.float32)
    x[0, 0, 0, number % 8] = top
    return x


def test_what_the_network_makes_nothing_of_gets_no_codes() -> None:
    """Behind the Clip nothing is left above 2: the noise is least where the range of b ends there."""
    body = "a = Conv(x, w) b = Relu(a) c = Conv(b, v) y = Clip(c, low, high)"
    bounds = {"low": np.float32(0), "high": np.float32(2)}
    found = factor(body, [spread(n, 16.0) for n in range(8)], 16.0, w=ONE, v=ONE, **bounds)
    assert 2 <= 16 * found <= 2 / 0.75


def test_what_it_does_use_keeps_its_codes() -> None:
    body = "a = Conv(x, w) b = Relu(a) y = Conv(b, v)"
    pictures = [spread(n, 1.0) for n in range(8)]
    assert factor(body, pictures, 1.0, w=ONE, v=ONE) == 1
    assert factor(body, pictures, 0.4, w=ONE, v=ONE) == pytest.approx(2.5)  # where it ends


def test_ranges_that_would_take_too_long_are_left_as_they_are() -> None:
    """With nearly no share of the work one range of three is looked at, and what is left out is said."""
    model = loaded(
        network(
            "a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Relu(c) y = Conv(d, u)", ("N", 1, 6, 6), w=ONE, v=ONE, u=ONE
        )
    )
    plan = make_plan(model, Recipe(), TARGETS["ort-cpu"])
    chosen = {value: UINT8.from_range(0, 1) for value in plan.activations}
    images = heard(model, [np.ones((2, 1, 6, 6), np.float32)])
    for share, left in ((1e-9, len(chosen) - 1), (4.0, 0), (None, 0)):
        looks = SearchBudget(1, 1, 0, 0, 1, 0, 0, share)
        told = search_activation_ranges(model, plan, chosen, images, looks, 1, Reporter()).findings
        said = [finding.why for finding in told if isinstance(finding, Skipped)]
        assert said == (
            [f"{left} of {len(chosen)} ranges were not looked at, or it would take too long"] if left else []
        )


def test_a_second_search_measures_only_what_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ranges are found without a run. One that is another is tried anew, and its noise told by its step."""
    body = "a = Conv(x, w) b = Relu(a) c = Conv(b, v) y = Clip(c, low, high)"
    model = loaded(network(body, ("N", 1, 8, 8), w=ONE, v=ONE, low=np.float32(0), high=np.float32(2)))
    plan = make_plan(model, Recipe(), TARGETS["ort-cpu"])
    images, memory = heard(model, [spread(n, 16.0) for n in range(8)]), SearchMemory()
    runs: list[int] = []
    run = NetworkTail.run

    def count(self: NetworkTail, *args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(NetworkTail, "run", count)

    def search(top: float, memory: SearchMemory) -> RangeSearch:
        chosen = {value: UINT8.from_range(0, top if value.name == "b" else 16) for value in plan.activations}
        return search_activation_ranges(model, plan, chosen, images, ALL, 1, Reporter(), memory=memory)

    first = search(16.0, memory)
    assert first.ranges
    assert runs
    runs.clear()
    assert search(16.0, memory) == first
    assert not runs
    other, afresh = search(8.0, memory), search(8.0, SearchMemory())
    assert runs
    assert other.ranges == afresh.ranges
    untouched = [{v.name: n.noise for n in found.noises for v in n.members} for found in (other, afresh)]
    assert untouched[0]["x"] == pytest.approx(untouched[1]["x"])
    assert untouched[0]["b"] == pytest.approx(untouched[1]["b"], rel=0.5)


def test_one_picture_in_many_counts_as_one_of_them() -> None:
    """The picture that reaches far is tried, whatever the others say; all tried give the same."""
    body = "a = Conv(x, w) b = Relu(a) y = Conv(b, v)"
    pictures = [spread(n, 1.0) for n in range(63)] + [spread(63, 4.0)]
    blind = factor(body, pictures[:63], 4.0, w=ONE, v=ONE)
    assert blind < 0.32
    seen = factor(body, pictures, 4.0, SearchBudget(2, 64, 0, 0, 2, 0, 4), w=ONE, v=ONE)
    assert seen == factor(body, pictures, 4.0, ALL, w=ONE, v=ONE) > blind


@pytest.mark.parametrize(
    ("body", "rounded"),
    [
        ("a = Conv(x, w) b = Relu(a) y = Conv(b, v)", ["b"]),  # fed
        ("a = Conv(x, w) b = Relu(a) c = MaxPool<kernel_shape=[2,2]>(b) d = Conv(c, v) y = Add(d, c)", ["b", "c"]),
        ("a = Conv(x, w) b = Relu(a) d = Conv(b, v) y = Relu(d)", ["y"]),  # what the model returns
        ("a = Conv(x, w) b = Relu(a) d = Conv(b, v) y = Relu(d)", []),
    ],
)
def test_what_is_behind_runs_as_rounded_by_hand(body: str, rounded: list[str]) -> None:
    """Oracle: the network itself, with the tensors rounded in numpy and handed on."""
    model = loaded(network(body, ("N", 1, 8, 8), w=ONE, v=2 * ONE))
    x = np.random.default_rng(1).normal(size=(2, 1, 8, 8)).astype(np.float32)
    params = QuantSpec(4, signed=False, symmetric=False).from_range(0, 1.5)
    first = {value.name: value for node in model.nodes() for value in node.outputs}[(rounded or ["b"])[0]]
    with contextlib.closing(ArrayStore(10**9)) as store:
        walk = StepwiseRun(model, [{"x": x}], store, threads=1)
        walk.values_of(first)
        spec = params.spec if rounded else None
        behind = NetworkTail(
            walk.tail_model(list(model.graph.outputs)), ["y"], [rounded] if rounded else [], spec, threads=1
        )
        ((found,),) = behind.run([0], params if rounded else None)
    np.testing.assert_allclose(found, by_hand(body, x, rounded, params), atol=1e-5)


def test_groups_that_share_a_session_are_rounded_one_at_a_time() -> None:
    """Oracle: sessions with one group each. b is fed, y is what the model returns."""
    body = "a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Relu(c) y = Add(d, b)"
    model = loaded(network(body, ("N", 1, 8, 8), w=ONE, v=2 * ONE))
    xs = np.random.default_rng(1).normal(size=(3, 1, 1, 8, 8)).astype(np.float32)
    params = [UINT8.from_range(0, top) for top in (1.5, 3.0, 2.0)]
    groups = [["b"], ["c", "d"], ["y"]]
    b = next(value for node in model.nodes() for value in node.outputs if value.name == "b")
    with contextlib.closing(ArrayStore(10**9)) as store:
        walk = StepwiseRun(model, [{"x": x} for x in xs], store, threads=1)
        walk.values_of(b)
        outputs = list(model.graph.outputs)
        together = NetworkTail(walk.tail_model(outputs), ["y"], groups, UINT8, threads=1)
        seen = []
        for index, group in enumerate(groups):
            alone = NetworkTail(walk.tail_model(outputs), ["y"], [group], UINT8, threads=1)
            for (one,), (other,) in zip(
                alone.run(range(3), params[index]), together.run(range(3), params[index], index), strict=True
            ):
                np.testing.assert_array_equal(one, other)
                seen.append(one.tobytes())
    assert len(set(seen)) == 9


def by_hand(body: str, x: NDArray, rounded: list[str], params: QuantParams) -> NDArray:
    """Node after node by ONNX Runtime, each as a model of its own."""
    tensors = {"x": x, "w": ONE, "v": 2 * ONE}
    for step in [part.strip() for part in body.replace(") ", ")\n").split("\n")]:
        name, call = (side.strip() for side in step.split(" = "))
        operands = call[call.index("(") + 1 : -1].split(", ")
        inputs = {operand: tensors[operand] for operand in operands}
        fed = operands[0]
        proto = network(
            f"out = {call.replace(f'({fed}', '(x', 1)}",
            inputs[fed].shape,
            outputs=("out",),
            **{n: t for n, t in inputs.items() if n != fed},
        )
        (tensors[name],) = Session(proto.SerializeToString(), optimize=False).run_all({"x": inputs[fed]})
        if name in rounded:
            tensors[name] = params.fake_quantize(tensors[name])
    return tensors["y"]


def test_files_gain_from_it_and_say_so(tmp_path: Path) -> None:
    """From end to end: the outliers of b are nothing to y."""
    body = "a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Clip(c, low, high) y = Conv(d, v)"
    proto = network(body, (1, 1, 8, 8), w=ONE, v=ONE, low=np.float32(0), high=np.float32(2))
    for number in range(24):
        np.save(tmp_path / f"{number:02}.npy", spread(number, 40.0)[0])
    recipe, data = Recipe(threads=1, equalize=False), DataOptions((str(tmp_path),))
    found = {}
    for wanted in (True, False):
        report, _ = quantize(
            Source("m", None, proto.SerializeToString()), None, replace(recipe, tune_ranges=wanted), data
        )
        found[wanted] = report.verify.outputs[0].sqnr_db
        told = [finding for finding in report.findings if finding.step == "ranges"]
        assert bool(told) is wanted
    assert found[True] > found[False] + 6


def test_the_table_has_all_efforts() -> None:
    assert set(SEARCH_BUDGETS) == {"fast", "balanced", "best"}
    assert all(looks.far + looks.near <= looks.many for looks in SEARCH_BUDGETS.values())
