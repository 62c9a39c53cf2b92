"""Which layers are padded: those that take less time so by the table, averaged over CPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS, CostTable, average_costs
from qconv.planning.channel_padding import time_of_padded
from qconv.planning.operator_costs import look_up_cost
from qconv.planning.placement import PlacementProblem
from qconv.planning.planner import make_plan
from tests.support.models import loaded, network

ORT = TARGETS["ort-cpu"]
STEM = network("c = Conv<pads=[1,1,1,1]>(x, w) y = Conv(c, v)", x=(1, 3, 8, 8), w=(16, 3, 3, 3), v=(4, 16, 1, 1))
SHAPES = {"c": (1, 16, 8, 8), "y": (1, 4, 8, 8)}
WORK = 16 * 8 * 8 * 27 / 1000


def padded_by(**lines: tuple[float, float, float, float]) -> int:
    table: CostTable = {kind: {16: line} for kind, line in lines.items()}
    plan = make_plan(loaded(STEM), Recipe(), replace(ORT, costs=table))
    return plan.layers[0].padded


@pytest.mark.parametrize(
    ("line", "padded"),
    [
        ((0.0, 1.0, 0.0, 0.9), 4),
        ((0.0, 1.0, 0.0, 1.1), 0),
        ((0.0, 1.0, 0.2 * WORK, 0.9), 0),  # what the Pad takes is more than it spares on such a small map
    ],
)
def test_the_table_decides(line: tuple[float, float, float, float], padded: int) -> None:
    assert padded_by(pad3_3=line) == padded
    assert padded_by(pad7_3=line) == 0


def test_one_cpu_that_loses_much_is_worth_another_that_gains_little() -> None:
    gains, loses = ({"pad3_3": {16: (0.0, 1.0, 0.0, factor)}} for factor in (0.9, 1.3))
    table = average_costs([gains, loses])
    assert make_plan(loaded(STEM), Recipe(), replace(ORT, costs=table)).layers[0].padded == 0


def test_placement_counts_what_padding_spares() -> None:
    table: CostTable = {
        "pad3_3": {16: (0.0, 2.0, 0.0, 1.0)},
        "stem3": {16: (0.0, 5.0, 0.0, 4.0)},
        "switch": {16: (0.0,) * 4},
    }
    model = loaded(STEM)
    plan = make_plan(model, Recipe(), replace(ORT, costs=table))
    first = plan.layers[0].node
    alone = look_up_cost(first, SHAPES, table)
    assert alone is not None
    assert time_of_padded(plan.layers[0], SHAPES["c"], table) == 0.5
    cost = PlacementProblem.of(model, plan, SHAPES, table).costs[first]
    assert cost is not None
    assert (cost.float_us, cost.integer_us) == (alone.float_us, alone.integer_us / 2)
    assert time_of_padded(plan.layers[1], SHAPES["y"], table) == 1.0
