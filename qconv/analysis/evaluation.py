"""Defines `EvaluationOptions`, what is to be measured, and `Evaluation`, what was: by labels, beside another model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qconv.config.choices import EVALUATE_GATES, check_run_options, option_name, require, take_types
from qconv.config.data_options import LABEL_OPTIONS, DataOptions
from qconv.data.dataset import LabelOptions
from qconv.data.label_files import LabelRequest
from qconv.ir.files import Source
from qconv.metrics.classification import LABELLED, Predictions
from qconv.metrics.demands import BY_LABELS, GATES
from qconv.metrics.similarity import difference_interval, mcnemar_p_value
from qconv.results.gates import Gate
from qconv.results.quantize import OutputFact, OutputScore, Verification
from qconv.results.scores import (
    AGREEMENT,
    COSINE,
    SQNR,
    TOP1,
    TOP5,
    LabelledScores,
    Score,
    as_intervals,
    as_values,
    by_rank,
    find_score,
    worst_scores,
)


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What is to be measured. Raises QconvError for values that cannot be.

    Attributes:
        data: The images and their preprocessing.
        against: The other model.
        classes, label_offset: Of labels, see data.dataset and data.label_files.
        table: What the predictions are for: ".csv", ".json", ".npz" (then all outputs are kept) or None.
        labels, label_map: Of boxes or masks, see data.label_files; None for the class folders of the images.
        min_agreement, min_boxes, min_map, min_miou, min_top1: Gates, shares.
        min_sqnr: Gate, in dB.
    """

    data: DataOptions
    against: Source | None = None
    classes: Path | None = None
    label_offset: int = 0
    table: str | None = None
    threads: int | None = None
    labels: Path | None = None
    label_map: Path | None = None
    min_agreement: float | None = None
    min_boxes: float | None = None
    min_map: float | None = None
    min_miou: float | None = None
    min_sqnr: float | None = None
    min_top1: float | None = None

    def __post_init__(self) -> None:
        take_types(self)
        check_run_options(self.threads, self)
        for name in LABEL_OPTIONS:  # labels of the images are meant wherever they are named
            if getattr(self.data, name) is not None:
                twice = getattr(self, name) is not None
                require(not twice, f"{option_name(name)} beside that of DataOptions", "leave one of them out.")
                object.__setattr__(self, name, getattr(self.data, name))
        alone = self.label_map is not None and self.labels is None
        require(not alone, "--label-map without --labels", "name the labels that it is of.")
        self._check_gates()

    def _check_gates(self) -> None:
        """Raise QconvError for gates on what is not going to be measured."""
        for name in EVALUATE_GATES:
            if getattr(self, name) is None or name == "min_top1" or self.against is not None:
                continue
            by_labels = GATES[name] in BY_LABELS
            known = by_labels and self.labels is not None
            beside = " and --labels" if by_labels else ""
            fix = f"pass {'labels, or ' if by_labels else ''}the float model with --against."
            require(known, f"{option_name(name)} {getattr(self, name):g} without --against{beside}", fix)

    @property
    def labelling(self) -> LabelOptions:
        """The options on class folders that the user gave."""
        return LabelOptions(self.label_offset, self.classes is not None or self.label_offset != 0)

    @property
    def label_request(self) -> LabelRequest | None:
        """What is asked for of labels of boxes or masks."""
        if self.labels is None:
            return None
        return LabelRequest(self.labels, self.label_map, self.classes, self.label_offset)


@dataclass(frozen=True, slots=True)
class Flips:
    """Images that only this model gets right (won), or only the other (lost)."""

    won: int
    lost: int
    count: int

    @property
    def p_value(self) -> float:
        """Of McNemar's exact test."""
        return mcnemar_p_value(self.won, self.lost)

    @property
    def difference(self) -> float:
        """This model's top-1 less the other's."""
        return (self.won - self.lost) / self.count


@dataclass(slots=True)
class Evaluation:
    """What was measured.

    Attributes:
        model, other: Names of the model and of the other one.
        images: How many.
        words: How they are fed.
        labels: Where labels come from; empty without any.
        holds: What the outputs are.
        labelled, other_labelled: By labels, of either model; nothing without labels.
        flips: Of classes.
        differences: By how much each measure by boxes or masks is above the other model's, on the same pictures.
        outputs: How near each is to the other model's.
        heads: The same of what is read from several outputs together, as detections are.
        predictions: What was said of each picture.
        gates: Demands, and whether they hold.
    """

    model: str
    images: int
    words: str
    labels: str
    holds: tuple[OutputFact, ...]
    labelled: tuple[Score, ...] = ()
    other: str | None = None
    other_labelled: tuple[Score, ...] = ()
    flips: Flips | None = None
    differences: tuple[Score, ...] = ()
    outputs: tuple[OutputScore, ...] = ()
    heads: tuple[OutputScore, ...] = ()
    predictions: Predictions | None = None
    gates: list[Gate] = field(default_factory=list)

    @property
    def top1(self) -> Score | None:
        """Of this model, by labels."""
        return find_score(self.labelled, TOP1)

    @property
    def top5(self) -> Score | None:
        """Of this model, by labels, where there are more than five classes."""
        return find_score(self.labelled, TOP5)

    @property
    def compared(self) -> tuple[OutputScore, ...]:
        """All that was compared with the other model."""
        return (*self.outputs, *self.heads)

    @property
    def held(self) -> bool:
        """Whether every gate held."""
        return all(gate.held for gate in self.gates)

    @property
    def as_verification(self) -> Verification:
        """The same as checks of a written file have it; the other model in the place of the float one."""
        labelled = None
        if self.labelled:
            labelled = LabelledScores(self.labels, self.images, self.labelled, self.other_labelled, self.differences)
        return Verification(self.images, self.outputs, heads=self.heads, labelled=labelled)

    @property
    def worst(self) -> tuple[Score, ...]:
        """The worst of all outputs, by metric."""
        return worst_scores(output.scores for output in self.compared)

    def rows(self) -> list[dict[str, Any]]:
        """The table that `--csv` writes: a row a measure, with its 95 % interval where it has one."""
        found: list[dict[str, Any]] = []

        def add(score: Score, model: str | None, output: str, name: str = "") -> None:
            low, high = score.interval or (None, None)
            named = {"measure": name or score.name, "model": model, "output": output}
            found.append({**named, "value": score.value, "low": low, "high": high})

        for model, scores in ((self.model, self.labelled), (self.other, self.other_labelled)):
            for score in scores:
                add(score, model, "")
        for score in self.differences:
            add(score, self.model, "", f"{score.name}_difference")
        for output in self.compared:
            for score in by_rank(output.scores):
                add(score, self.model, output.name)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        against = None
        if self.other is not None:
            flips = self.flips
            against = {
                "model": self.other,
                **as_values(self.other_labelled, told=tuple(LABELLED)),
                **as_values(self.worst, told=(SQNR, AGREEMENT, COSINE)),
                "flips": flips and {"won": flips.won, "lost": flips.lost, "p_value": flips.p_value},
                "differences": as_values(self.differences, told=()),
                "outputs": _as_rows(self.outputs, (SQNR, COSINE, AGREEMENT)),
                "heads": _as_rows(self.heads, ()),
            }
        return {
            "schema": 1,
            "model": self.model,
            "images": self.images,
            "outputs": [fact.as_dict() for fact in self.holds],
            **as_values(self.labelled, told=tuple(LABELLED)),
            "against": against,
            "intervals": self._intervals(),
            "labels": self.labels or None,
            "gates": [gate.as_dict() for gate in self.gates],
            "preprocessing": self.words or None,
        }

    def _intervals(self) -> dict[str, list[float] | None]:
        """Of every score that can have one, at 95 %."""
        spans = as_intervals(self.labelled, told=tuple(LABELLED))
        its = as_intervals(self.other_labelled, told=tuple(LABELLED))
        spans |= {f"against_{name}": span for name, span in its.items()}
        spans |= as_intervals(self.worst)
        spans |= {f"{name}_difference": span for name, span in as_intervals(self.differences, told=()).items()}
        flips = self.flips
        moved = None if flips is None else difference_interval(flips.won, flips.lost, flips.count)
        return {**spans, "top1_difference": None if moved is None else list(moved)}


def _as_rows(outputs: Sequence[OutputScore], told: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [{"name": o.name, "kind": o.kind, **as_values(o.scores, told=told)} for o in outputs]
