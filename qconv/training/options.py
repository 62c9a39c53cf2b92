"""These classes hold the options of quantization-aware training and of image synthesis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconv.config.choices import (
    DEVICES,
    SYNTHESIS_STEPS,
    check_run_options,
    require,
    require_range,
    take_types,
)
from qconv.config.data_options import DataOptions, PreprocessingOptions
from qconv.config.tasks import Tasks
from qconv.ir.files import Source

MOST_LEARNING_RATE = 100


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """The options of `finetune`. Raises QconvError for values that cannot be.

    Attributes:
        data: The images and their preprocessing; its `batch` is not for training.
        teacher: The float model; None to look for it beside the quantized file.
        labels: Whether classes by the images' folders are learned from.
        classes: A file of class names, in the order of the outputs.
        label_offset: Added to every label.
        epochs: Passes over the images.
        batch: Images a step.
        rate: Learning rate of weights, in integer steps.
        holdout: Images held out; None for a tenth.
        augment: Whether images are mirrored and shifted at random.
        device: One of choices.DEVICES.
        threads: Of this machine; None for all cores.
        min_agreement, min_boxes, min_map, min_miou: Gates, shares, see `metrics.demands`.
        min_sqnr: Gate, in dB.
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
    min_boxes: float | None = None
    min_map: float | None = None
    min_miou: float | None = None
    min_sqnr: float | None = None

    def __post_init__(self) -> None:
        take_types(self, {"rate": "--learning-rate"})
        for name in ("epochs", "batch", "holdout"):
            require_range(f"--{name}", getattr(self, name), 1)
        possible = 0 < self.rate <= MOST_LEARNING_RATE
        require(possible, f"--learning-rate {self.rate}", f"use more than 0, up to {MOST_LEARNING_RATE}.")
        require(self.device in DEVICES, f"--device {self.device}", f"use one of {', '.join(DEVICES)}.")
        check_run_options(self.threads, self)
        told = self.classes is None and not self.label_offset
        require(told or self.labels, "--classes or --label-offset without --labels", "ask for labels, or leave it out.")
        fact = f"DataOptions(batch={self.data.batch}) for training"
        require(self.data.batch == 1, fact, "leave it out: the pictures of a step are `batch` of finetune.")

    def as_dict(self) -> dict[str, Any]:
        """Return the options that shape the result, JSON-ready."""
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
    """The options of `synthesize`. Raises QconvError for values that cannot be.

    Attributes:
        preprocessing: What the user says of it.
        count: Images to make.
        batch: Images in one run of the network; None to choose by their size.
        steps: Optimization steps of each image.
        seed: Of the images that optimization starts from.
        threads: Of ONNX Runtime and PyTorch; None for all cores.
        device: One of choices.DEVICES.
    """

    preprocessing: PreprocessingOptions
    count: int = 128
    batch: int | None = None
    steps: int = SYNTHESIS_STEPS
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    task: str = "auto"

    def __post_init__(self) -> None:
        take_types(self, {"preprocessing": "preprocessing", "steps": "--iterations"})
        for told, value in (("--count", self.count), ("--batch", self.batch), ("--iterations", self.steps)):
            require_range(told, value, 1)
        require_range("--seed", self.seed, 0)
        check_run_options(self.threads)
        require(self.device in DEVICES, f"--device {self.device}", f"use one of {', '.join(DEVICES)}.")
        Tasks(self.task)
