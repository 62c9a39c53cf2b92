"""These classes hold the options of quantization-aware training and of image synthesis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconv.config.choices import SYNTHESIS_STEPS
from qconv.config.data_options import DataOptions, PreprocessingOptions
from qconv.ir.files import Source


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """The options of `finetune`.

    Attributes:
        data: The images and their preprocessing; its `batch` has no effect.
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
        min_agreement: Gate, a share.
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
    min_sqnr: float | None = None

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
    """The options of `synthesize`.

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
