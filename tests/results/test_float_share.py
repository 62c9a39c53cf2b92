"""How much is in float, in words and in JSON."""

from __future__ import annotations

import pytest

from qconv.results.float_share import FloatShare


@pytest.mark.parametrize(("work", "weights", "most"), [(0.5, 0.5, False), (0.51, 0, True), (0, 0.51, True)])
def test_most_is_more_than_half_of_the_work_or_of_the_weights(work: float, weights: float, most: bool) -> None:
    share = FloatShare(3, 12, work, weights)
    assert share.is_most == most
    assert share.as_dict() == {"nodes": 3, "all_nodes": 12, "work": work, "weights": weights}


def test_in_words() -> None:
    told = "252 of 300 nodes, 97% of the multiplications and 4% of the weights"
    assert FloatShare(252, 300, 0.971, 0.042).in_words == told
