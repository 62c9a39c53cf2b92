"""What quantization-aware training is asked for, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import qconv
from qconv.config.recipe import Recipe
from qconv.ir.source import Source
from qconv.results.report import Audit, Gate, Verification


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is asked for. recipe: names the pictures (its `calib`), how they are fed, threads and gates.

    teacher: None to look for it beside the quantized file. rate: of learning, codes a step. holdout: None for a tenth.
    """

    recipe: Recipe
    teacher: Source | None = None
    labels: bool = False
    classes: Path | None = None
    label_offset: int = 0
    epochs: int = 20
    batch: int = 64
    rate: float = 4e-3
    holdout: int | None = None
    augment: bool = True
    device: str = "auto"

    def as_dict(self) -> dict[str, Any]:
        """What shapes the result, JSON-ready."""
        return {
            "labels": self.labels,
            "epochs": self.epochs,
            "batch": self.batch,
            "learning_rate": self.rate,
            "augment": self.augment,
            "seed": self.recipe.seed,
        }


@dataclass(frozen=True, slots=True)
class Mark:
    """How near the quantized network is on pictures held back.

    right: share of labels that it gets right, or of classes that are the float network's; None where no output tells
    classes. distance: see distance.py.
    """

    right: float | None
    distance: float

    def is_better(self, than: Mark, least: Mark) -> bool:
        """Whether it is nearer than one mark, and right no less often than another."""
        return self.distance < than.distance and (self.right or 0.0) >= (least.right or 0.0)


@dataclass(frozen=True, slots=True)
class Round:
    """A row of the history. loss: on average over the round's steps."""

    step: int
    epoch: float
    loss: float
    mark: Mark
    seconds: float


@dataclass(frozen=True, slots=True)
class Judged:
    """One file on the pictures held back, run by ONNX Runtime. top1: where labels are learned from."""

    mark: Mark
    verify: Verification


@dataclass(slots=True)
class Finetuned:
    """What one run did and measured. trained: whether the file is the trained one, or the input as it was."""

    model: str
    teacher: str
    output: str
    wishes: Wishes
    device: str
    torch: str
    words: str
    taught: int
    held: int
    steps: int
    resumed: int
    history: list[Round]
    before: Judged
    float_bytes: int
    after: Judged | None = None
    trained: bool = False
    audit: Audit = field(default_factory=lambda: Audit(0, 0, ()))
    bytes: int = 0
    gates: list[Gate] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_rss_mb: float | None = None

    @property
    def result(self) -> Judged:
        """Of the file that was written."""
        return self.after if self.trained and self.after is not None else self.before

    @property
    def done(self) -> int:
        """Steps of training."""
        return self.history[-1].step if self.history else 0

    @property
    def holds(self) -> bool:
        """Whether every gate held."""
        return all(gate.held for gate in self.gates)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The history, as `--csv` writes it."""
        return [
            {
                "step": r.step,
                "epoch": r.epoch,
                "loss": r.loss,
                "held_distance": r.mark.distance,
                "held_right": r.mark.right,
                "seconds": round(r.seconds, 3),
            }
            for r in self.history
        ]

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "schema": 1,
            "version": qconv.__version__,
            "model": self.model,
            "teacher": self.teacher,
            "output": self.output,
            "options": self.wishes.as_dict(),
            "device": self.device,
            "torch": self.torch,
            "preprocessing": self.words or None,
            "pictures": {"taught": self.taught, "held": self.held},
            "steps": {"done": self.done, "planned": self.steps},
            "resumed_at": self.resumed or None,
            "stopped_early": self.done < self.steps,
            "trained": self.trained,
            "before": _told(self.before),
            "after": None if self.after is None else _told(self.after),
            "size": {"float": self.float_bytes, "quantized": self.bytes},
            "audit": self.audit.as_dict(),
            "gates": [{"name": g.name, "want": g.want, "got": g.got, "held": g.held} for g in self.gates],
            "history": self.rows,
            "warnings": self.warnings,
            "seconds": round(self.seconds, 3),
            "peak_rss_mb": self.peak_rss_mb,
        }


def _told(found: Judged) -> dict[str, Any]:
    return {
        "right": found.mark.right,
        "distance": found.mark.distance,
        "agreement": found.verify.agreement,
        "sqnr_db": found.verify.sqnr_db,
    }
