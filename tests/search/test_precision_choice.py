"""What stays in float for accuracy: the rule on curves made up, and the run of a network with one loud tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from qconv.analysis.inspect_quantized import inspect_quantized
from qconv.auditing.audit import audit_file
from qconv.config.choices import Drop
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.errors import Change
from qconv.ir.files import Source
from qconv.pipeline.quantize import quantize
from qconv.planning.precision_curve import Division, PrecisionCurve
from qconv.report.text_inspect import format_quantized_model
from qconv.results.quantize import Report
from qconv.runtime.session import Session
from qconv.search.precision_choice import MOST_MEASURED, CurveSearch
from tests.support.loud import SHAPE, loud, write_samples

# -- the rule, on curves made up ---------------------------------------------------------------------------------------


def search_of(
    points: Sequence[tuple[float, float]], predicted: Sequence[float] = (), float_time: float = 9.0
) -> CurveSearch:
    """points: (time, SQNR in dB as it would be measured). predicted: in dB; as it is measured where there is none."""
    noises = [10 ** (-decibel / 10) for decibel in predicted or [decibel for _, decibel in points]]
    curve = tuple(Division(frozenset(), time, noise) for (time, _), noise in zip(points, noises, strict=True))
    found = {time: 10 ** (-decibel / 10) for time, decibel in points}
    return CurveSearch(PrecisionCurve(curve, float_time), lambda point: found[point.time])


@pytest.mark.parametrize(("decibel", "poor"), [(21.99, True), (22.0, False), (35.0, False)])
def test_outputs_of_22_db_are_good_enough(decibel: float, poor: bool) -> None:
    search = search_of([(1.0, decibel), (1.05, 50.0)])
    assert search.is_poor is poor
    assert search.choose(0.1) == (1 if poor else 0)
    assert set(search.measured) == ({0, 1} if poor else {0})  # no more than has to be


@pytest.mark.parametrize("count", [2, 3, 8, 17])
def test_the_fastest_that_has_24_db_is_found(count: int) -> None:
    for enough in range(1, count):
        points = [(1 + index / 1000, 25.0 + index if index >= enough else 10 + index / 10) for index in range(count)]
        search = search_of(points)
        assert search.choose(0.1) == enough
        assert set(search.measured) == {0, enough, count - 1}  # as predictions are right


@pytest.mark.parametrize(("decibel", "chosen"), [(23.79, 2), (23.81, 1)])
def test_no_more_than_24_db_count(decibel: float, chosen: int) -> None:
    """At 0.2 dB for a percent, 23.8 dB are worth as much as 24 a percent later, and 40 dB no more than 24."""
    assert search_of([(1.0, 10), (1.01, decibel), (1.02, 24.0), (1.03, 40)]).choose(0.1) == chosen


def test_the_most_accurate_is_taken_where_none_has_enough() -> None:
    assert search_of([(1.0, 10), (1.01, 14), (1.02, 18), (1.03, 23)]).choose(0.1) == 3
    assert search_of([(1.0, 10), (1.01, 22), (1.02, 21)]).choose(0.1) == 1  # of those that were measured


@pytest.mark.parametrize(
    ("budget", "float_time", "chosen"),
    [
        (0.1, 9.0, 2),
        (0.25, 9.0, 4),
        (0.05, 9.0, 1),
        (0.04, 9.0, 0),
        (1.0, 1.15, 3),  # no slower than float
        (1.0, 1.02, 0),
        (1.0, 0.7, 0),  # float is faster than the fastest
    ],
)
def test_time_is_spent_up_to_the_budget(budget: float, float_time: float, chosen: int) -> None:
    points = [(1.0, 10.0), (1.05, 13.0), (1.1, 16.0), (1.15, 19.0), (1.2, 22.0)]
    search = search_of(points, float_time=float_time)
    assert search.choose(budget) == chosen
    assert all(index <= chosen for index in search.measured)


def test_a_budget_is_over_the_fastest() -> None:
    """Which need not be all in integers: its time may be 0.8 of that."""
    points = [(0.8, 10.0), (0.89, 13.0), (0.91, 16.0), (1.0, 30.0)]
    assert search_of(points).choose(0.1) == 1


def test_what_is_faster_and_better_is_no_expense() -> None:
    """The first point is the division by times alone, which may leave in integers what would gain too little time."""
    assert search_of([(1.0, 10.0), (0.97, 15.0), (1.2, 30.0)], float_time=0.9).choose(0.1) == 1


@pytest.mark.parametrize(
    ("time", "decibel", "chosen"), [(1.05, 11.49, 0), (1.05, 11.51, 1), (0.9, 10.49, 0), (0.9, 10.51, 1)]
)
def test_half_a_db_has_to_be_gained_beyond_what_time_is_worth(time: float, decibel: float, chosen: int) -> None:
    """5 % of the time are worth 1 dB; none is taken only for being faster."""
    assert search_of([(1.0, 10.0), (time, decibel)]).choose(0.1) == chosen


@pytest.mark.parametrize(("budget", "chosen"), [(0.1, 0), (0.5, 1), (1.0, 1)])
def test_a_larger_budget_pays_more_for_the_same(budget: float, chosen: int) -> None:
    """All of it is worth 2 dB: 10 % of the time are 2, 0.4 or 0.2 dB of it."""
    assert search_of([(1.0, 10.0), (1.09, 12.0)]).choose(budget) == chosen


def test_a_wrong_curve_is_not_looked_at_without_end() -> None:
    """All points promise what none of them holds."""
    points = [(1 + index / 1000, 10.0) for index in range(40)]
    search = search_of(points, predicted=[10.0, *np.linspace(20, 23, 39)])
    assert search.choose(0.1) == 0
    assert len(search.measured) <= MOST_MEASURED + 2


def test_what_is_predicted_to_gain_nothing_is_looked_at_once() -> None:
    search = search_of([(1.0, 5.0), (1.02, 19.0), (1.2, 30.0)], predicted=(5.0, 5.1, 30.0))
    assert search.choose(0.1) == 1
    assert set(search.measured) == {0, 1}


def test_predictions_alone_choose_nothing() -> None:
    search = search_of([(1.0, 12.0), (1.02, 12.5), (1.05, 26.0)], predicted=(10, 40, 41))
    assert search.choose(0.1) == 2


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_gates_ask_for_the_first_that_holds(count: int) -> None:
    """Oracle: a look at one after the other. Without any, more would be spent for nothing."""
    for start in range(count):
        for first in range(count + 1):
            search = search_of([(1 + index / 10, 10.0 + index) for index in range(count)])
            tried: list[Division] = []

            def holds(
                point: Division, search: CurveSearch = search, tried: list[Division] = tried, first: int = first
            ) -> bool:
                tried.append(point)
                return search.points.index(point) >= first

            # where none does, the most accurate one, which may yet: weights are only rounded to the nearest here
            expected = next((index for index in range(start, count) if index >= first), count - 1)
            assert search.find_holding(start, holds) == expected
            assert len(tried) <= 2 + math.ceil(math.log2(count - start)) + 1
            assert start == expected or expected in search.measured


def test_corrections_lie_between_those_that_were_measured() -> None:
    """By hand: off by 2 dB at 1.0 and by -1 at 1.2, thus by 0.5 at 1.1; by -0.5 at 1.3, and right at the end."""
    points = [(1.0, 12.0), (1.1, 99.0), (1.2, 19.0), (1.3, 99.0), (1.4, 99.0)]
    search = search_of(points, predicted=(10, 14, 20, 24, 30))
    assert search.corrected() == pytest.approx([10, 14, 20, 24, 30])
    search.find_holding(2, lambda point: True)
    assert search.is_poor
    search.measured[2] = 10**-1.9
    assert search.corrected() == pytest.approx([12, 14.5, 19, 23.5, 30], abs=1e-6)


def test_what_was_measured_is_told_as_it_was() -> None:
    search = search_of([(1.0, 12.0), (1.1, 25.0), (1.2, 40.0)], predicted=(10, 24, 25), float_time=1.5)
    found = search.report(search.choose(0.15), 16, apart=True)
    assert [point.measured_db for point in found.points[:2]] == pytest.approx([12, 25])
    assert [point.corrected_db for point in found.points[:2]] == pytest.approx([12, 25])
    assert found.points[2].measured_db is None
    assert [point.predicted_db for point in found.points] == pytest.approx([10, 24, 25])
    assert [point.chosen for point in found.points] == [False, True, False]
    assert (found.float_time, found.pictures, found.apart) == (1.5, 16, True)
    assert found.gained_db == pytest.approx(13)
    assert found.spent == pytest.approx(0.1)


# -- a network with one loud tensor ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("loud") / "samples")


RECIPE = Recipe(threads=1, effort="fast", equalize=False, tune_ranges=True)


def run_on(proto: onnx.ModelProto, samples: Path, recipe: Recipe = RECIPE) -> tuple[Report, bytes]:
    source = Source("m", None, proto.SerializeToString())
    report, result = quantize(source, None, recipe, DataOptions((str(samples),)))
    assert result is not None
    return report, result


def sqnr_apart(proto: onnx.ModelProto, result: bytes) -> float:
    """On images that nobody has seen."""
    x = np.random.default_rng(99).normal(size=(4, *SHAPE)).astype(np.float32)
    (want,), (got,) = (Session(data, threads=1).run(["y"], {"x": x}) for data in (proto.SerializeToString(), result))
    return float(10 * np.log10(np.sum(want**2) / np.sum((want - got) ** 2)))


@pytest.fixture(scope="module")
def mended(samples: Path) -> tuple[Report, bytes]:
    return run_on(loud(120.0), samples)


def test_the_nodes_around_a_loud_tensor_stay_in_float(mended: tuple[Report, bytes], samples: Path) -> None:
    """In 8 bits b has steps of nearly 0.5, as much as what its channels differ by: its writer and its reader."""
    report, result = mended
    plain, all_integers = run_on(loud(120.0), samples, replace(RECIPE, float_budget=0.0))
    assert {node.node for node in report.audit.placed} == {"a", "c"}
    assert plain.audit.placed == ()
    before, after = (sqnr_apart(loud(120.0), data) for data in (all_integers, result))
    assert before < 20
    assert after > before + 10
    assert report.precision is not None
    points = report.precision.points
    assert points[0].measured_db == pytest.approx(before, abs=1.5)
    assert report.precision.chosen.measured_db == pytest.approx(after, abs=1.5)
    assert report.precision.chosen.nodes == 2
    assert not report.precision.apart  # all of so few pictures are chosen on
    (told,) = (found for found in report.findings if isinstance(found, Change) and found.step == "precision")
    assert told.kind == "division for accuracy"


def test_nothing_is_spent_where_nothing_may_be(samples: Path) -> None:
    report, _ = run_on(loud(120.0), samples, replace(RECIPE, float_budget=0.0))
    assert report.precision is None
    assert not [found for found in report.findings if found.step == "precision"]


def test_networks_above_20_db_stay_as_times_have_them(samples: Path) -> None:
    report, result = run_on(loud(20.0), samples)
    assert sqnr_apart(loud(20.0), result) > 20
    assert report.audit.placed == ()
    assert report.precision is not None
    (point,) = report.precision.points  # no curve is looked for
    assert point.chosen
    assert point.nodes == 0
    assert point.measured_db is not None
    assert point.measured_db > 20


def test_other_targets_have_no_times_to_weigh(samples: Path) -> None:
    report, _ = run_on(loud(120.0), samples, replace(RECIPE, target="generic"))
    assert report.precision is None


def test_the_file_says_why(mended: tuple[Report, bytes], tmp_path: Path) -> None:
    """From its metadata, which audit reads; the activation that a has absorbed is among the names."""
    report, result = mended
    carried = {entry.key: entry.value for entry in onnx.load_from_string(result).metadata_props}
    ((why, names),) = json.loads(carried["qconv.placed"]).items()
    assert names == ["a", "b", "c"]
    assert report.precision is not None
    assert why == f"accuracy: {report.precision.gained_db:.1f} dB for {report.precision.spent:.0%} of the time"
    path = tmp_path / "q.onnx"
    path.write_bytes(result)
    told = format_quantized_model(inspect_quantized(Source("q", path)), verbose=False)
    assert "3 operators in float, for accuracy\n" in told
    audited = audit_file(Source("q", path), threads=1, batch=None, size=None).audit
    assert {node.node: (node.why, node.rule) for node in audited.placed} == {
        "a": (why, "placed"),
        "c": (why, "placed"),
    }


def test_the_same_run_says_the_same(mended: tuple[Report, bytes], samples: Path) -> None:
    report, result = run_on(loud(120.0), samples)
    assert result == mended[1]
    assert report.precision == mended[0].precision
    assert report.findings == mended[0].findings


def test_what_a_selection_reads_is_measured_in_the_quantized_network(samples: Path) -> None:
    """The Relu that NonZero reads is absorbed there: the tensor has another name."""
    proto = loud(120.0, "s = Relu(y) z = NonZero(s)", "z")
    report, _ = run_on(proto, samples)
    assert report.precision is not None
    assert report.precision.chosen.measured_db is not None
    assert {node.node for node in report.audit.placed} >= {"a", "c"}


def test_sizes_that_the_model_leaves_open_are_those_of_the_samples(samples: Path) -> None:
    """With the sizes written down, the same nodes stay in float."""
    proto = loud(120.0)
    for side in proto.graph.input[0].type.tensor_type.shape.dim[2:]:
        side.dim_param = "side"
    del proto.graph.value_info[:]
    report, _ = run_on(proto, samples)
    assert {node.node for node in report.audit.placed} == {"a", "c"}


def test_a_drop_that_activations_keep_is_told_as_for_accuracy(samples: Path) -> None:
    """Divisions are carried out before one is taken: the reason is that of the one that was."""
    recipe = replace(RECIPE, max_drop=Drop("sqnr", 25.0), candidate_bits=(8,))
    report, result = run_on(loud(120.0), samples, recipe)
    carried = {entry.key: entry.value for entry in onnx.load_from_string(result).metadata_props}
    assert report.precision is not None
    assert [*json.loads(carried["qconv.placed"])] == [f"accuracy: {report.precision.in_words}"]
    assert {node.why for node in report.audit.placed} == {f"accuracy: {report.precision.in_words}"}
