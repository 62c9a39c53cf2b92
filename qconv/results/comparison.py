"""This module holds the results of `compare`, `diagnose` and `sweep` as data: layer errors, causes, measured recipes.

`Comparison` is behind `compare --json` and the charts of a report; `Diagnosis` lists causes of lost accuracy and the
trials of remedies; `Sweep` lists recipes on the same images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qconv.results.quantize import OutputScore
from qconv.results.scores import SQNR, value_of, worst_scores
from qconv.results.trials import Trial, name_ranking, pareto_mask


@dataclass(frozen=True, slots=True)
class HistogramBars:
    """A histogram of values. edges: ascending, one more than counts."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ValueStatistics:
    """Statistics of float values and of the integers that represent them.

    Of weights with several scales all is in units of each one's own step, so that integers are whole numbers.

    Attributes:
        bits: Of the integers.
        low, high: The range that the integers reach.
        clipped: Share of the values beyond it.
        range_use: Share of the integers that occur.
        bars: Histogram of the values, unrounded.
    """

    bits: int
    low: float
    high: float
    clipped: float
    range_use: float
    bars: HistogramBars


@dataclass(frozen=True, slots=True)
class LayerComparison:
    """A node of the quantized file, compared with the tensor of the float model that it stands for.

    Attributes:
        name, op, tensor: The node, its operator and its output; of what is rounded a second time, for readers that want
            other bits, "NODE in 8 bits" and Convert.
        sqnr_db: SQNR as the layer runs in the quantized network, with the error that it receives; None where equal.
        added_sqnr_db: SQNR of its own error, when fed with the float model's tensors; None where equal.
        cosine: Cosine similarity as the layer runs.
        output_share: Its own error's share of the error at the outputs, which add up to 1; None where not measured.
        values: Statistics of the tensor; None where it stays float.
        weights: Statistics of the weights; None for nodes without integer weights.
        input: Whether it is an input of the model and no node.
    """

    name: str
    op: str
    tensor: str
    sqnr_db: float | None
    added_sqnr_db: float | None
    cosine: float | None
    output_share: float | None
    values: ValueStatistics | None = None
    weights: ValueStatistics | None = None
    input: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the row that `--json` prints."""
        values, weights = self.values, self.weights
        return {
            "name": self.name,
            "op": self.op,
            "tensor": self.tensor,
            "sqnr_db": self.sqnr_db,
            "added_sqnr_db": self.added_sqnr_db,
            "cosine": self.cosine,
            "output_share": self.output_share,
            "range_use": None if values is None else values.range_use,
            "clipped": None if values is None else values.clipped,
            "bits": None if values is None else values.bits,
            "weight_bits": None if weights is None else weights.bits,
            "weight_range_use": None if weights is None else weights.range_use,
            "weight_clipped": None if weights is None else weights.clipped,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models compared on the same images.

    Attributes:
        float_model, model: Names of the files.
        images: How many were compared.
        words: The preprocessing in words.
        layers: In running order.
        unmatched: Nodes for which the float model has no tensor.
        inside: Layers in bodies of If, Loop and Scan, which stay float and are not compared.
        outputs: Scores of the outputs, as measured.
        predicted_db: SQNR of the outputs if the layers' own errors were independent, and the network linear near the
            float values.
        predicted_on: Images that `predicted_db` is measured on.
    """

    float_model: str
    model: str
    images: int
    words: str
    layers: tuple[LayerComparison, ...]
    unmatched: tuple[str, ...]
    outputs: tuple[OutputScore, ...]
    predicted_db: float | None
    predicted_on: int
    inside: tuple[str, ...] = ()

    @property
    def sqnr_db(self) -> float | None:
        """The lowest output's, in dB; None where all outputs are equal."""
        return value_of(worst_scores(output.scores for output in self.outputs), SQNR)

    @property
    def worst_first(self) -> tuple[LayerComparison, ...]:
        """The layers by their share of the error at the outputs, or by their own error where not measured."""

        def badness(row: LayerComparison) -> tuple[float, float]:
            own = float("-inf") if row.added_sqnr_db is None else -row.added_sqnr_db
            return row.output_share or 0.0, own

        return tuple(sorted(self.layers, key=badness, reverse=True))

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            "schema": 1,
            "float": self.float_model,
            "model": self.model,
            "images": self.images,
            "preprocessing": self.words or None,
            "layers": [row.as_dict() for row in self.worst_first],
            "unmatched": list(self.unmatched),
            "inside": list(self.inside),
            "outputs": [output.as_dict() for output in self.outputs],
            "sqnr_db": self.sqnr_db,
            "predicted_sqnr_db": self.predicted_db,
            "predicted_on": self.predicted_on,
        }


@dataclass(frozen=True, slots=True)
class Cause:
    """Something that can cost accuracy.

    Attributes:
        kind: A short name that stays the same, such as `channel-imbalance`.
        where: Nodes or tensors, the worst first.
        what: The evidence in words, with its numbers.
        share: Their share of the error at the outputs; None where not measured.
        handled: What of the recipe takes care of it already; empty where nothing does.
        harmless: Whether it costs nothing on these images.
    """

    kind: str
    where: tuple[str, ...]
    what: str
    share: float | None = None
    handled: str = ""
    harmless: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the row that `--json` prints."""
        return {
            "kind": self.kind,
            "where": list(self.where),
            "what": self.what,
            "output_share": self.share,
            "handled": self.handled or None,
        }


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What costs accuracy, and what mends it.

    Attributes:
        pictures: Images that trials are measured on.
        given: Images that were there for it, of which others did not fit into memory.
        unseen: Whether none of them was calibrated with.
        causes: What was found.
        trials: The recipe as it was asked for, then one remedy after the other.
        best: The trial that `recommended` comes to.
        recommended: The whole command line.
        conclusion: The result in one or two sentences.
        float_ms: Time of one run of the float model; None where nothing was timed.
        float_bytes: Of the float model's files.
    """

    model: str
    pictures: int
    unseen: bool
    causes: tuple[Cause, ...]
    trials: tuple[Trial, ...]
    best: Trial
    recommended: str
    conclusion: str
    float_ms: float | None = None
    float_bytes: int = 0
    given: int = 0
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            "schema": 1,
            "model": self.model,
            "pictures": self.pictures,
            "pictures_given": self.given,
            "unseen": self.unseen,
            "float_ms": self.float_ms,
            "float_size": self.float_bytes,
            "causes": [cause.as_dict() for cause in self.causes],
            "ranked_by": name_ranking(self.trials),
            "ladder": [trial.as_dict() for trial in self.trials],
            "best": self.best.name,
            "best_size": self.best.size,
            "best_in_float": None if self.best.in_float is None else self.best.in_float.as_dict(),
            "conclusion": self.conclusion,
            "recommended": self.recommended,
            "warnings": self.warnings,
        }


@dataclass(frozen=True, slots=True)
class Sweep:
    """Several recipes measured on the same images.

    outputs: the files, in the order of the trials. given: images that were there, of which others did not fit into
    memory.
    """

    model: str
    float_bytes: int
    float_ms: float | None
    pictures: int
    unseen: bool
    trials: tuple[Trial, ...]
    outputs: tuple[str, ...]
    given: int = 0

    @property
    def best(self) -> tuple[bool, ...]:
        """Which trials no other dominates in accuracy, size and latency."""
        return pareto_mask(self.trials)

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        rows = zip(self.trials, self.outputs, self.best, strict=True)
        return {
            "schema": 1,
            "model": self.model,
            "float": {"size": self.float_bytes, "ms": self.float_ms},
            "pictures": self.pictures,
            "pictures_given": self.given,
            "unseen": self.unseen,
            "ranked_by": name_ranking(self.trials),
            "recipes": [
                {**trial.as_dict(), "output": None if trial.failed else out, "non_dominated": best}
                for trial, out, best in rows
            ],
        }
