"""This module holds the results of quantization-aware training and of image synthesis as data.

`FinetuneResult` has the history of training and the validation scores before and after it. `SynthesisResult` has, for
each BatchNormalization, how far the statistics of the synthesized images are from the stored ones, before and after.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

import qconv
from qconv.config.data_options import Preprocessing
from qconv.results.gates import Gate
from qconv.results.quantize import Audit, Verification
from qconv.results.scores import as_values

if TYPE_CHECKING:
    from qconv.training.options import FinetuneOptions, SynthesisOptions


@dataclass(frozen=True, slots=True)
class ValidationScore:
    """How near the quantized network is to its teacher on held-out images.

    Attributes:
        right: Share of the labels that it gets right, or of classes equal to the float network's; None without classes.
        distance: The loss of training.distillation.
    """

    right: float | None
    distance: float

    def is_better(self, than: ValidationScore, least: ValidationScore) -> bool:
        """Whether it is nearer than `than`, and right no less often than `least`."""
        return self.distance < than.distance and (self.right or 0.0) >= (least.right or 0.0)


@dataclass(frozen=True, slots=True)
class HistoryRow:
    """One round of training. loss: the mean over the round's steps."""

    step: int
    epoch: float
    loss: float
    mark: ValidationScore
    seconds: float


@dataclass(frozen=True, slots=True)
class ValidationResult:
    """One file on the held-out images, run by ONNX Runtime. top1: where labels are learned from."""

    mark: ValidationScore
    verify: Verification


@dataclass(slots=True)
class FinetuneResult:
    """Everything that one run did and measured. trained: whether the trained file was written, or the input."""

    model: str
    teacher: str
    output: str
    request: FinetuneOptions
    device: str
    torch: str
    words: str
    taught: int
    held: int
    steps: int
    resumed: int
    history: list[HistoryRow]
    before: ValidationResult
    float_bytes: int
    after: ValidationResult | None = None
    trained: bool = False
    audit: Audit = field(default_factory=lambda: Audit(0, 0, ()))
    bytes: int = 0
    gates: list[Gate] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_rss_mb: float | None = None

    @property
    def result(self) -> ValidationResult:
        """The scores of the file that was written."""
        return self.after if self.trained and self.after is not None else self.before

    @property
    def done(self) -> int:
        """The number of training steps."""
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
        """Return the object that `--json` prints."""
        return {
            "schema": 1,
            "version": qconv.__version__,
            "model": self.model,
            "teacher": self.teacher,
            "output": self.output,
            "options": self.request.as_dict(),
            "device": self.device,
            "torch": self.torch,
            "preprocessing": self.words or None,
            "pictures": {"taught": self.taught, "held": self.held},
            "steps": {"done": self.done, "planned": self.steps},
            "resumed_at": self.resumed or None,
            "stopped_early": self.done < self.steps,
            "trained": self.trained,
            "before": _validation_fields(self.before),
            "after": None if self.after is None else _validation_fields(self.after),
            "size": {"float": self.float_bytes, "quantized": self.bytes},
            "audit": self.audit.as_dict(),
            "gates": [g.as_dict() for g in self.gates],
            "history": self.rows,
            "warnings": self.warnings,
            "seconds": round(self.seconds, 3),
            "peak_rss_mb": self.peak_rss_mb,
        }


def _validation_fields(found: ValidationResult) -> dict[str, Any]:
    return {
        "right": found.mark.right,
        "distance": found.mark.distance,
        **as_values(found.verify.scores),
    }


GOOD_MATCH = 0.1
"""Distance of statistics up to which images count as like those of training: dozens of photographs come to 0.04."""

POOR_MATCH = 0.5
"""Distance from which on a single layer is warned of."""


@dataclass(frozen=True, slots=True)
class BatchNormMatch:
    """How far the statistics of one BatchNormalization's input were, and are, from the stored ones.

    Attributes:
        name, tensor: The node, and the tensor that it reads.
        channels: How many.
        before, after: The distance as in the loss of training.synthesize; 0 where equal.
    """

    name: str
    tensor: str
    channels: int
    before: float
    after: float

    def as_dict(self) -> dict[str, Any]:
        """Return the row of the table, JSON-ready."""
        return {
            "name": self.name,
            "tensor": self.tensor,
            "channels": self.channels,
            "before": self.before,
            "after": self.after,
        }


@dataclass(slots=True)
class SynthesisResult:
    """One set of synthesized images.

    Attributes:
        words: The preprocessing in words.
        options: Options that give it to other commands.
        piped: Whether the model came from a pipe.
        batch: Images in one run of the network.
        layers: In running order.
        loss: The mean distance of all layers, step by step.
    """

    model: str
    digest: str
    output: str
    request: SynthesisOptions
    preprocessing: Preprocessing
    words: str
    options: tuple[str, ...]
    piped: bool
    batch: int
    layers: tuple[BatchNormMatch, ...]
    loss: tuple[float, ...]
    torch: str
    device: str
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_rss_mb: float | None = None

    @property
    def before(self) -> float:
        """Mean distance of the layers at first."""
        return fmean(layer.before for layer in self.layers)

    @property
    def after(self) -> float:
        """Mean distance of the layers in the end."""
        return fmean(layer.after for layer in self.layers)

    @property
    def worst_first(self) -> list[BatchNormMatch]:
        """The layers, the farthest first."""
        return sorted(self.layers, key=lambda layer: -layer.after)

    def of_the_set(self) -> dict[str, Any]:
        """Return what is kept beside the images: nothing that another run of the same would change."""
        return {
            "schema": 1,
            "version": qconv.__version__,
            "model": self.digest,
            "pictures": self.request.count,
            "options": {"batch": self.batch, "iterations": self.request.steps, "seed": self.request.seed},
            "preprocessing": self.preprocessing.as_dict(),
            "distance": {"before": self.before, "after": self.after},
            "layers": [layer.as_dict() for layer in self.layers],
            "loss": list(self.loss),
            "warnings": self.warnings,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            **self.of_the_set(),
            "model": self.model,
            "output": self.output,
            "device": self.device,
            "torch": self.torch,
            "seconds": round(self.seconds, 3),
            "peak_rss_mb": self.peak_rss_mb,
        }
