"""A division into 8 bits, 16 and float: carried out, said in a recipe, and redone from that.

Oracle: plans and files made in the other of two ways, and the closed form of what a rounding adds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qconv.calibration.observer import export_observed_model, observe
from qconv.calibration.sketch import Sketch, SketchBuilder, SketchContents, TensorView, make_histogram
from qconv.config.choices import LayerBits
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.config.serialization import format_layer_bits, read_layer_bits
from qconv.config.targets import TARGETS
from qconv.ir.files import Source
from qconv.ir.model import Model
from qconv.ir.subgraph import runnable_with_outputs
from qconv.passes.requantize import give_readers_copies
from qconv.pipeline.quantize import quantize
from qconv.planning.plan import Plan
from qconv.planning.planner import make_plan
from qconv.results.quantize import Report
from qconv.runtime.session import Session
from qconv.search.candidate import FoldedNetwork, build_quantized_model, round_to_nearest
from qconv.search.division import divide, with_division
from tests.support.models import loaded, network

V = (4, 4, 1, 1)
GENERIC = Recipe(target="generic", effort="fast", threads=1, equalize=False)
BODY = """
a = Conv(x, w) g = Sigmoid(a) s = Mul(a, g) b = Conv(s, v) r = Relu(b)
c = Conv(r, v) d = Concat<axis=1>(c, s) e = Conv(d, u) y = Conv(e, z)
"""
NET = network(BODY, (1, 3, 8, 8), w=(4, 3, 1, 1), v=V, u=(4, 8, 1, 1), z=(4, 4, 1, 3))
WIDE, FLOATS = ("a", "g", "s"), ("c", "e")


def told(names: tuple[str, ...]) -> dict[str, str]:
    return dict.fromkeys(names, "told so")


def as_words(plan: Plan) -> dict[str, Any]:
    """All that a plan says, but for reasons."""
    return {
        "bits": {value.name: choice.spec for value, choice in plan.activations.items()},
        "layers": [(layer.node.name, layer.weight, layer.data and layer.data.name) for layer in plan.layers],
        "integer": {node.name for node in plan.integer},
        "wide": {node.name for node in plan.on_16_bits},
        "absorbed": {one.name: other.name for one, other in plan.absorbed.items()},
        "ties": [[value.name for value in group] for group in plan.ties],
        "kept": set(plan.kept),
    }


def test_a_recipe_redoes_a_division() -> None:
    """By names in the plan, and by lines of the recipe, through a file: the same plan."""
    plans = []
    for recipe, floats, wide in (
        (GENERIC, told(FLOATS), told(WIDE)),
        (with_division(GENERIC, WIDE, FLOATS), None, None),
    ):
        model = loaded(NET)
        plan = make_plan(model, recipe, TARGETS["generic"], floats, wide)
        plans.append(as_words(give_readers_copies(model, plan, {}).plan))
    assert plans[0] == plans[1]
    assert plans[0]["wide"] == set(WIDE)
    assert plans[0]["integer"] == {"a", "g", "s", "b", "d", "y", "s_8_bits"}
    assert plans[0]["layers"][2] == ("c", plans[0]["layers"][1][1], None)  # codes of 8 bits, read in float


def test_a_division_is_written_and_read_back(tmp_path: Path) -> None:
    recipe = with_division(GENERIC, WIDE, FLOATS)
    assert recipe.high_precision is None  # nothing more is chosen
    (tmp_path / "found.toml").write_text(format_layer_bits(recipe.layer_bits), "utf-8")
    assert read_layer_bits(tmp_path / "found.toml") == recipe.layer_bits


def test_weights_keep_their_bits_in_a_division() -> None:
    own = Recipe(target="generic", layer_bits=(("[ab]", LayerBits(4, 6)), ("*", LayerBits(5))))
    found = with_division(own, "a", "b")
    assert [found.bits_of(name) for name in "abc"] == [LayerBits(4, 16), LayerBits(4, 32), LayerBits(5)]


def quantized(folder: Path, **options: Any) -> tuple[Report, bytes]:
    recipe = Recipe(**{"target": "generic", "effort": "fast", "threads": 1, **options})
    report, data = quantize(
        Source("m", None, NET.SerializeToString()), None, recipe, DataOptions((str(folder),), samples=16)
    )
    assert data is not None
    return report, data


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    for number in range(16):
        drawn = np.random.default_rng(number).normal(size=(3, 8, 8)).astype(np.float32)
        np.save(folder / f"{number:02}.npy", drawn)
    return folder


def test_the_run_gives_what_the_recipe_says(samples: Path) -> None:
    division = with_division(GENERIC, ("a", "g", "s", "b"), ()).layer_bits
    report, _ = quantized(samples, layer_bits=division)
    bits = {row.name: row.bits for row in report.tensors if row.kind == "activation"}
    narrow = {"s_8_bits", "r_8_bits", "c", "d", "e", "y"}
    assert bits == dict.fromkeys(("x", "a", "g", "s", "r"), 16) | dict.fromkeys(narrow, 8)
    assert report.opset == 21
    assert {finding.where for finding in report.findings if "between 8 and 16" in str(finding)} == {"s", "r"}
    assert not [warning for warning in report.warnings if "--layer-bits" in warning]


def test_more_bits_are_nearer_to_float(samples: Path) -> None:
    some = with_division(GENERIC, ("a", "g", "s"), ()).layer_bits
    runs = [quantized(samples, **options)[0] for options in ({}, {"layer_bits": some}, {"activation_bits": 16})]
    least, middle, most = (run.verify.sqnr_db or 0.0 for run in runs)
    assert least + 0.5 < middle < most - 3


@pytest.mark.parametrize("effort", ["balanced", "best"])
def test_ranges_and_rounding_take_a_division(effort: str, samples: Path) -> None:
    """The searches for ranges and codes, layer after layer, see a network with copies."""
    division = with_division(GENERIC, ("a", "g"), ("e",)).layer_bits
    report, _ = quantized(samples, layer_bits=division, effort=effort)
    assert (report.verify.sqnr_db or 0.0) > 25


def test_a_network_is_divided_from_what_is_known_of_it(samples: Path) -> None:
    """d only holds what a and b do, so that nobody has watched it: its copy's range is that of both, 255 steps."""
    body = "a = Conv(x, w) b = Conv(x, z) d = Concat<axis=1>(a, b) t = Sigmoid(d) y = Conv(t, u)"
    model = loaded(network(body, (1, 3, 8, 8), w=(4, 3, 1, 1), z=(4, 3, 1, 1), u=(4, 8, 1, 1)))
    recipe = replace(GENERIC, calibrator="minmax")
    whole = make_plan(model, recipe, TARGETS["generic"])
    drawn = [np.load(path)[None] for path in sorted(samples.iterdir())]
    sketches = watched(whole, model, drawn)
    assert "d" not in sketches
    before = [node.name for node in model.nodes()]
    folded = FoldedNetwork(model, whole, sketches, {"a": (-1.0, 1.0), "y": (-9.0, 9.0)})
    found = divide(folded, floats={}, wide=told(("a", "b", "d")))
    assert found.set_ranges == {"y": (-9.0, 9.0)}  # a has other bits now
    assert [node.name for node in model.nodes()] == before
    params = round_to_nearest(found, recipe).params
    copy = next(params.activations[value] for value in params.activations if value.name == "d_8_bits")
    seen = np.concatenate([run(model, {"x": x}, "a", "b") for x in drawn])
    assert copy.scale == pytest.approx((seen.max() - seen.min()) / 255)
    written = build_quantized_model(found, recipe, params)
    assert "d_8_bits_q" in {node.name for node in written.nodes()}


def run(model: Model, feeds: dict[str, Any], *names: str) -> Any:
    """Tensors of a network, side by side."""
    with runnable_with_outputs(model, names) as runnable:
        session = Session(runnable, threads=1)
    return np.concatenate(session.run(list(names), feeds), axis=1)


def watched(plan: Plan, model: Model, drawn: list[Any]) -> dict[str, Sketch]:
    observers = plan.observers(SketchContents.ALL)
    with export_observed_model(model, observers) as runnable:
        return observe(Session(runnable, threads=1), observers, [{"x": x} for x in drawn])


def test_joined_sketches_are_those_of_both_tensors_together() -> None:
    """Extremes, pictures and bins of what a Concat holds, against those of its numbers."""
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(2, 50)).astype(np.float32), rng.normal(3, 1, (3, 50)).astype(np.float32)) for _ in "ab"]
    built = SketchBuilder(SketchContents.BINS), SketchBuilder(SketchContents.BINS)
    for key, pair in enumerate(pairs):
        for builder, x in zip(built, pair, strict=True):
            builder.add(TensorView(x.min(axis=1), x.max(axis=1), np.zeros(0, np.float32), 0, x), key)
    one, other = (builder.sketch() for builder in built)
    both = one.join(other)
    together = np.concatenate([np.concatenate(pair) for pair in pairs])
    assert (both.low, both.high) == (together.min(), together.max())
    expected = [[min(a.min(), b.min()), max(a.max(), b.max())] for a, b in pairs]
    np.testing.assert_array_equal(both.pictures, np.float32(expected))
    np.testing.assert_array_equal(both.histogram().counts, make_histogram(together).counts)
    assert both.lows.shape == (1,)


def test_no_copies_are_given_where_none_is_wanted() -> None:
    model = loaded(NET)
    plan = make_plan(model, GENERIC, TARGETS["generic"])
    found = give_readers_copies(model, plan, {})
    assert (found.plan, found.changes) == (plan, [])
