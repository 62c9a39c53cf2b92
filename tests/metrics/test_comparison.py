"""The measures of a check, against numbers worked by hand. Models are small networks that ONNX Runtime runs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qconv.config.recipe import Recipe
from qconv.metrics.comparison import ComparisonAccumulator, verify
from qconv.metrics.demands import check_gates
from qconv.metrics.network_outputs import NetworkOutputs
from qconv.metrics.similarity import compute_sqnr_db, measure_error
from qconv.results.quantize import OutputScore, Verification
from qconv.runtime.outputs import ModelOutput
from qconv.runtime.session import Session
from tests.support.models import network
from tests.support.scores import scores


def session(body: str) -> Session:
    return Session(network(body, x=("N", 3), outputs=("y",)).SerializeToString(), threads=1)


def batch(*rows: list[float]) -> dict[str, np.ndarray]:
    return {"x": np.array(rows, np.float32)}


def test_signal_over_noise_in_decibel() -> None:
    """Powers of 100 to 1 are 20 dB, equal powers 0 dB, and no noise has no number."""
    assert compute_sqnr_db(100, 1) == pytest.approx(20)
    assert compute_sqnr_db(1, 1) == 0
    assert compute_sqnr_db(1, 0) is None


@pytest.mark.parametrize(("signal", "noise"), [(0.0, 1.0), (1.0, math.inf), (1e-320, 1e300)])
def test_no_signal_or_endless_noise_is_a_very_low_number(signal: float, noise: float) -> None:
    found = compute_sqnr_db(signal, noise)
    assert found is not None
    assert -7000 < found < -2500


def test_an_error_counts_where_the_reference_is_a_number() -> None:
    """1 + 4 of signal, and 1 of noise; what only the other loses has no bound."""
    ref = np.array([1, 2, np.nan, np.inf], np.float32)
    assert measure_error(ref, np.array([1, 3, 0, 0], np.float32)) == (5, 1)
    assert measure_error(ref, np.array([np.nan, 3, 0, 0], np.float32)) == (5, math.inf)
    assert measure_error(np.array([True, True]), np.array([True, False])) == (2, 1)


def test_scores_over_all_batches() -> None:
    """y = -x against y = x: the noise is (2x)^2, four times the signal, and every order is reversed."""
    found = verify(session("y = Identity(x)"), session("y = Neg(x)"), [batch([1, 2, 3], [4, 6, 5]), batch([9, 8, 7])])
    (score,) = found.outputs
    assert found.images == 3
    assert score.sqnr_db == pytest.approx(-10 * math.log10(4))
    assert score.agreement == 0


def test_agreement_counts_equal_classes() -> None:
    """|x| has the largest element where x has it in three of four rows."""
    rows = batch([1, 2, 3], [3, 1, 2], [-9, 1, 2], [0, 5, -1])
    (score,) = verify(session("y = Identity(x)"), session("y = Abs(x)"), [rows]).outputs
    assert score.agreement == 0.75


def test_numbers_that_the_float_model_does_not_have_are_not_held_against_the_other() -> None:
    """log(0) is -inf on both sides; what is left is equal."""
    (score,) = verify(session("y = Log(x)"), session("y = Log(x)"), [batch([0, 1, 2])]).outputs
    assert score.sqnr_db is None


def test_numbers_that_only_the_quantized_model_loses_are_the_worst() -> None:
    (score,) = verify(session("y = Identity(x)"), session("y = Log(x)"), [batch([0, 1, 2])]).outputs
    assert score.sqnr_db is not None
    assert score.sqnr_db < -2500


def test_a_segmenter_of_three_classes_has_an_agreement() -> None:
    """Half of the places change their class; a picture of three channels has none."""
    ref, got = np.zeros((1, 3, 2, 2), np.float32), np.zeros((1, 3, 2, 2), np.float32)
    ref[:, 1], got[:, 1, 0], got[:, 2, 1] = 1, 1, 1
    for task, agreement in (("segment", 0.5), ("auto", None)):
        comparison = ComparisonAccumulator.of(
            NetworkOutputs((ModelOutput("y", True, (1, 3, 2, 2), (1, 3, 2, 2), task=task),))
        )
        comparison.add([ref], [got])
        assert comparison.scores()[0].agreement == agreement


def test_classes_on_the_last_axis_are_counted_there() -> None:
    output = ModelOutput("y", True, (1, 2, 2, 5), (1, 2, 2, 3))
    ref, got = np.zeros((1, 2, 2, 5), np.float32), np.zeros((1, 2, 2, 5), np.float32)
    ref[..., 4], got[..., 4], got[0, 0, 0, 1] = 1, 1, 2
    comparison = ComparisonAccumulator.of(NetworkOutputs((output,)))
    comparison.add([ref], [got])
    assert comparison.scores()[0].agreement == 0.75


@pytest.mark.parametrize(("other", "agreement"), [("Neg", 1 / 3), ("Identity", 1.0)])
def test_whole_numbers_are_equal_or_not(other: str, agreement: float) -> None:
    """A decibel of class numbers means nothing: signs of 1, 0, -2 and of -1, 0, 2 agree in one of three."""
    cast = "y = Cast<to=7>(s)"
    found = verify(session(f"s = Sign(x) {cast}"), session(f"z = {other}(x) s = Sign(z) {cast}"), [batch([1, 0, -2])])
    (score,) = found.outputs
    assert score.sqnr_db is None
    assert score.agreement == pytest.approx(agreement)
    assert found.equal is (agreement == 1)


def test_what_cannot_be_compared_passes_no_gate() -> None:
    """Indices of what is above zero: another number of them on either side."""
    found = verify(session("y = NonZero(x)"), session("z = Relu(x) y = NonZero(z)"), [batch([-1, 2, 3])])
    (score,) = found.outputs
    assert (score.sqnr_db, score.agreement) == (None, None)
    assert "shape" in score.remark
    assert [gate.held for gate in check_gates(found, Recipe(min_sqnr=1.0))] == [False]


def verification(sqnr: float | None, agreement: float | None) -> Verification:
    return Verification(1, (OutputScore("y", scores(sqnr, agreement)),), None)


@pytest.mark.parametrize(
    ("measured", "held"),
    [((30.0, 0.99), [True, True]), ((29.9, 0.98), [False, False]), ((None, None), [False, True])],
)
def test_gates_hold_at_their_own_value(measured: tuple[float | None, float | None], held: list[bool]) -> None:
    """A gate on agreement where there is none falls short; equal outputs pass any SQNR."""
    gates = Recipe(min_agreement=0.99, min_sqnr=30.0)
    assert [gate.held for gate in check_gates(verification(*measured), gates)] == held


def test_the_interval_of_sqnr_is_that_of_the_bootstrap_over_pictures() -> None:
    rng = np.random.default_rng(0)
    comparison, rows = ComparisonAccumulator.of(NetworkOutputs((ModelOutput("y", True, (1, 10)),))), []
    for spread in np.exp(rng.normal(0, 1, 40)):
        ref = rng.standard_normal((1, 10)).astype(np.float32)
        got = ref + spread * rng.standard_normal((1, 10)).astype(np.float32)
        comparison.add([ref], [got])
        rows.append((np.sum(ref.astype(np.float64) ** 2), np.sum((ref.astype(np.float64) - got) ** 2)))
    (score,) = comparison.scores(spans=True)
    drawn = np.array(rows)[np.random.default_rng(1).integers(0, 40, (4000, 40))].sum(axis=1)
    expected = np.percentile(10 * np.log10(drawn[:, 0] / drawn[:, 1]), (2.5, 97.5))
    span = score.scores[0].interval
    assert span == pytest.approx(expected, abs=0.3)
    assert span is not None
    assert score.sqnr_db is not None
    assert span[0] < score.sqnr_db < span[1]
    assert comparison.scores()[0].scores[0].interval is None
