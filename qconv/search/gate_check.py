"""Checks on fitted images whether a candidate holds the gates that its result will have to hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.data.loader import DataLoader
from qconv.ir.model import Model
from qconv.ir.subgraph import runnable_with_outputs
from qconv.metrics.by_labels import Labels
from qconv.metrics.comparison import ReferenceOutputs, collect_reference_outputs
from qconv.metrics.demands import check_gates
from qconv.reporter import Reporter
from qconv.runtime.session import Session
from qconv.search.candidate import SCORED_BYTES


@dataclass(slots=True)
class GateCheck:
    """The gates of a recipe, on the images of `feed`. Those that the float model itself misses are no reason to spend.

    original: the user's own model. labels: of the images; None without any.
    """

    recipe: Recipe
    original: Session
    feed: DataLoader
    labels: Labels | None
    reporter: Reporter
    _scored: ReferenceOutputs | None = field(default=None, init=False)

    def holds(self, model: Model) -> bool:
        """Whether a quantized model holds all gates that the float one does. Runs that, too, the first time."""
        if self._scored is None:
            self._scored = collect_reference_outputs(
                self.original,
                self.feed,
                "float",
                most_bytes=SCORED_BYTES,
                reporter=self.reporter,
                labels=self.labels,
            )
        with runnable_with_outputs(model, ()) as runnable:
            on_ort = TARGETS[self.recipe.target].on_ort
            session = Session(runnable, name="the quantized model", threads=self.recipe.threads, optimize=on_ort)
            gates = check_gates(self._scored.score(session), self.recipe)
            return all(gate.held or gate.float_held is False for gate in gates)
