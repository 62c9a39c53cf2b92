"""Which trial is recommended: the smallest of those that are as good, and no float network under another name."""

from __future__ import annotations

import pytest

from qconv.analysis.recommendation import choose_trial, describe_cost
from qconv.results.float_share import FloatShare
from qconv.results.scores import BOXES, MAP, SQNR, LabelledScores, Score
from qconv.results.trials import Trial

FLOAT = 0.35
"""mAP of the float model."""


def by_labels(
    name: str, lost: float, spread: float, decibel: float, *, nodes: int = 0, size: int = 1000, work: float = 0.0
) -> Trial:
    """A trial that loses so much mAP, give or take."""
    own, before = Score(MAP, FLOAT - lost), Score(MAP, FLOAT)
    difference = Score(MAP, -lost, (-lost - spread, -lost + spread))
    told = LabelledScores("hand", 64, (own,), (before,), (difference,))
    found = own, Score(SQNR, decibel)
    share = FloatShare(nodes, 300, work, work)
    return Trial(name, (), scores=found, size=size, ranked_by=MAP, labelled=told, in_float=share)


def beside_float(name: str, value: float, decibel: float, nodes: int, work: float) -> Trial:
    """A trial that finds so many of the float model's boxes, give or take two points."""
    found = Score(BOXES, value, (value - 0.02, min(1.0, value + 0.02))), Score(SQNR, decibel)
    share = FloatShare(nodes, 300, work, work)
    return Trial(name, (), scores=found, size=1000, ranked_by=BOXES, in_float=share)


def test_what_is_no_better_than_chance_does_not_pay_for_float() -> None:
    """The interval of the small one reaches the large one's loss."""
    base = by_labels("base", 0.08, 0.01, 8)
    large = by_labels("large", 0.005, 0.01, 25, nodes=120, size=2500, work=0.4)
    for lost, taken in ((0.012, "small"), (0.03, "large")):
        small = by_labels("small", lost, 0.01, 12, nodes=4, size=1050, work=0.05)
        for others in ([small, large], [large, small]):
            assert choose_trial(base, others).name == taken


def test_nothing_is_better_than_a_remedy_that_brings_nothing() -> None:
    base = by_labels("base", 0.01, 0.02, 12)
    assert choose_trial(base, [by_labels("large", 0.0, 0.02, 30, nodes=100, work=0.4)]) is base


def test_the_smaller_file_and_then_less_work_in_float() -> None:
    base = by_labels("base", 0.1, 0.01, 5)
    first = by_labels("first", 0.0, 0.01, 20, nodes=4, size=2000, work=0.1)
    smaller = by_labels("smaller", 0.0, 0.01, 15, nodes=4, size=1500, work=0.3)
    lighter = by_labels("lighter", 0.0, 0.01, 14, nodes=4, size=1500, work=0.2)
    assert choose_trial(base, [first, smaller]) is smaller
    assert choose_trial(base, [first, smaller, lighter]) is lighter


def test_where_the_cost_is_the_same_decibels_decide() -> None:
    base = by_labels("base", 0.01, 0.02, 12)
    better = by_labels("better", 0.009, 0.02, 20, size=1004)
    assert choose_trial(base, [better]) is better


@pytest.mark.parametrize(("base", "taken"), [(0.99, "base"), (0.95, "few"), (0.5, "few")])
def test_a_float_network_is_no_remedy_where_another_is_good(base: float, taken: str) -> None:
    """Whatever its decibels are: 252 nodes in float are no quantization."""
    first = beside_float("base", base, 25, 3, 0.02)
    few, most = beside_float("few", 0.975, 22, 20, 0.1), beside_float("most", 1.0, 60, 252, 0.97)
    assert choose_trial(first, [few, most]).name == taken
    assert choose_trial(first, [most, few]).name == taken


def test_where_no_other_is_good_it_is_said_that_most_is_in_float() -> None:
    base, most = beside_float("base", 0.4, 5, 3, 0.02), beside_float("most", 1.0, 60, 252, 0.97)
    few = beside_float("few", 0.6, 9, 20, 0.1)
    assert choose_trial(base, [few, most]) is most
    told = describe_cost(most, 2000)
    assert told.startswith(" It leaves 252 of 300 nodes, 97% of the multiplications and 97% of the weights in float, ")
    assert "takes 1.0 kB, 0.50 of float." in told
    assert "That is most of the network, which is hardly quantized by this" in told
    assert "most of the network" not in describe_cost(few, 2000)


def test_decibels_alone() -> None:
    """Without a measure of the task half a decibel is what tells trials apart."""

    def trial(decibel: float, nodes: int) -> Trial:
        share = FloatShare(nodes, 300, 0.1, 0.1)
        return Trial(str(nodes), (), scores=(Score(SQNR, decibel),), size=1000, in_float=share)

    assert choose_trial(trial(10, 0), [trial(25, 9), trial(24.8, 2)]).name == "2"
    assert choose_trial(trial(10, 0), [trial(25, 9), trial(24, 2)]).name == "9"
