"""Chooses the nodes to leave in float by latencies measured on this machine (--tune-latency).

Every node is timed twice by the runtime's own clock, in the float network and in the one that runs all it can in
integers. Four placements are then timed in turns as whole files: the cheapest by these times (`planning.placement`),
the cheapest by the committed table, all in integers, and all in float. The fastest is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qconv import storage
from qconv.auditing.audit import make_node_namer, profile_nodes
from qconv.calibration.sketch import Sketch
from qconv.config.data_options import Preprocessing
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.ir import files, subgraph
from qconv.ir.model import Model
from qconv.planning.operator_costs import NodeCost
from qconv.planning.placement import (
    infer_run_shapes,
    place_all_in_float,
    place_by_cost_table,
    place_by_measured_costs,
    select_cost_table,
)
from qconv.planning.planner import make_plan
from qconv.reporter import Reporter
from qconv.runtime.benchmark import Timing, TimingConditions, benchmark
from qconv.runtime.session import RUNTIME_VERSION, Session, make_random_inputs
from qconv.search.candidate import quantize_to_nearest

TIMING_ROUNDS = 12
FLOAT_MODEL, ALL_INTEGER, WEIGHTS_ONLY = "float", "all that can be in integers", "all in float with weights as codes"
BY_COST_TABLE, BY_NODE_TIMES = "by the cost table", "by times of single nodes"


@dataclass(frozen=True, slots=True)
class LatencyTuning:
    """The fastest placement. floats: nodes that stay float, with reasons. times: median ms of each placement."""

    floats: dict[str, str]
    choice: str
    times: dict[str, float]

    def in_words(self) -> str:
        """The choice in words, for the report."""
        others = ", ".join(f"{name} {ms:.3f} ms" for name, ms in self.times.items())
        return f"placed {self.choice}, the fastest here: {others}"


def tune_latency(
    folded: Model,
    recipe: Recipe,
    sketches: Mapping[str, Sketch],
    fed: Preprocessing | None,
    size: tuple[int, int] | None,
    reporter: Reporter,
) -> LatencyTuning:
    """Measure which placement is fastest on this machine.

    folded: the float network, which stays as it is. fed: its preprocessing, None for ready-made samples. size: height
    and width of the input, where the model may leave them open.
    """
    shapes = infer_run_shapes(folded, fed)
    target = TARGETS[recipe.target]
    whole = quantize_to_nearest(folded, recipe, sketches)
    measured = _measure_costs(folded, whole, recipe.threads, size)
    plan, table = make_plan(folded, recipe, target), select_cost_table(recipe, target)
    divisions: dict[str, dict[str, str]] = {
        ALL_INTEGER: {},
        WEIGHTS_ONLY: place_all_in_float(folded, plan, shapes, table),
        BY_COST_TABLE: place_by_cost_table(folded, plan, shapes, table),
        BY_NODE_TIMES: place_by_measured_costs(folded, plan, shapes, table, measured),
    }
    unlike: dict[str, dict[str, str]] = {}
    for name, floats in divisions.items():
        if all(set(floats) != set(other) for other in unlike.values()):
            unlike[name] = floats
    models = {
        FLOAT_MODEL: folded,
        **{n: quantize_to_nearest(folded, recipe, sketches, floats) for n, floats in unlike.items()},
    }
    timings = _time_models(models, TimingConditions(recipe.threads, None, size, TIMING_ROUNDS), reporter)
    fastest = min(unlike, key=lambda name: timings[name].ratio_to(timings[FLOAT_MODEL])[1])
    return LatencyTuning(unlike[fastest], fastest, {name: timing.median_ms for name, timing in timings.items()})


def _measure_costs(
    folded: Model, whole: Model, threads: int | None, size: tuple[int, int] | None
) -> dict[str, NodeCost]:
    """The measured costs of all nodes that ran under their own names in both networks."""
    floats, codes = (_measure_node_times(model, threads, size) for model in (folded, whole))
    return {name: NodeCost(floats[name], codes[name], measured=True) for name in floats.keys() & codes.keys()}


def _measure_node_times(model: Model, threads: int | None, size: tuple[int, int] | None) -> dict[str, float]:
    """The time of every node in a run in us, by its name in `model`."""
    with subgraph.runnable_with_outputs(model, ()) as runnable, storage.scratch_folder(0) as folder:
        session = Session(runnable, threads=threads, profile=folder / "profile")
        times = profile_nodes(session, make_random_inputs(session, None, size))
    original = make_node_namer(model)
    found: dict[str, float] = {}
    for name, us in times.items():
        found[original(name)] = found.get(original(name), 0.0) + us
    return found


def _time_models(models: Mapping[str, Model], conditions: TimingConditions, reporter: Reporter) -> dict[str, Timing]:
    with storage.scratch_folder(sum(2 * files.total_weight_bytes(model) for model in models.values())) as folder:
        paths = []
        for index, model in enumerate(models.values()):
            path = folder / f"{index}.onnx"
            _write_model(model, path)
            paths.append(str(path))
        found = benchmark(paths, conditions, version=RUNTIME_VERSION, reporter=reporter)
    return dict(zip(models, found.timings, strict=True))


def _write_model(model: Model, path: Path) -> None:
    with files.stage_model(model, path) as staged:
        staged.commit(path)
