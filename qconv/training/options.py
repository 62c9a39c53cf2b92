"""These classes hold the options of quantization-aware training and of image synthesis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconv.config.choices import SYNTHESIS_STEPS
from qconv.config.data_options import DataOptions
from qconv.config.preprocessing import PreprocessingOptions
from qconv.ir.files import Source


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """What is asked for. data: the pictures, and how they are fed; their `batch` has no effect.

    teacher: None to look for it beside the quantized file. rate: of learning, codes a step. holdout: None for a tenth.
    min_agreement, min_sqnr: gates, in dB the second.
    """

    data: DataOptions
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
    threads: int | None = None
    min_agreement: float | None = None
    min_sqnr: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """What shapes the result, JSON-ready."""
        return {
            "labels": self.labels,
            "epochs": self.epochs,
            "batch": self.batch,
            "learning_rate": self.rate,
            "augment": self.augment,
            "seed": self.data.seed,
        }


@dataclass(frozen=True, slots=True)
class SynthesisOptions:
    """batch: pictures in one run of the network, None to choose by their size. steps: in which each picture moves."""

    preprocessing: PreprocessingOptions
    count: int = 128
    batch: int | None = None
    steps: int = SYNTHESIS_STEPS
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
