"""What synthesized pictures are asked for, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import qconv
from qconv.config.choices import SYNTHESIS_STEPS
from qconv.config.preprocessing import Preprocessing, PreprocessingOptions

WELL = 0.1
"""Distance of statistics up to which pictures count as like those of training: dozens of photographs come to 0.04."""
FAR = 0.5
"""Distance from which on a single layer is told of."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """batch: pictures in one run of the network, None to choose by their size. steps: in which each picture moves."""

    preprocessing: PreprocessingOptions
    count: int = 128
    batch: int | None = None
    steps: int = SYNTHESIS_STEPS
    seed: int = 0
    threads: int | None = None
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Layer:
    """One BatchNormalization: how far the statistics of the tensor that it reads were, and are, from those stored.

    channels: how many. before, after: 0 where they are equal, see dream.py.
    """

    name: str
    tensor: str
    channels: int
    before: float
    after: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form, a row of the table."""
        return {
            "name": self.name,
            "tensor": self.tensor,
            "channels": self.channels,
            "before": self.before,
            "after": self.after,
        }


@dataclass(slots=True)
class Synthesized:
    """One set of pictures. words: how they are fed. options: that tell that to other commands.

    piped: whether the model came from a pipe. layers: in the order of running. loss: the mean distance of all layers,
    step by step. count, batch: pictures of the set, and of a run of the network.
    """

    model: str
    digest: str
    output: str
    wishes: Wishes
    preprocessing: Preprocessing
    words: str
    options: tuple[str, ...]
    piped: bool
    batch: int
    layers: tuple[Layer, ...]
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
    def worst_first(self) -> list[Layer]:
        """The layers, the farthest first."""
        return sorted(self.layers, key=lambda layer: -layer.after)

    def of_the_set(self) -> dict[str, Any]:
        """What is kept beside the pictures: nothing that another run of the same would have otherwise."""
        return {
            "schema": 1,
            "version": qconv.__version__,
            "model": self.digest,
            "pictures": self.wishes.count,
            "options": {"batch": self.batch, "iterations": self.wishes.steps, "seed": self.wishes.seed},
            "preprocessing": self.preprocessing.as_dict(),
            "distance": {"before": self.before, "after": self.after},
            "layers": [layer.as_dict() for layer in self.layers],
            "loss": list(self.loss),
            "warnings": self.warnings,
        }

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            **self.of_the_set(),
            "model": self.model,
            "output": self.output,
            "device": self.device,
            "torch": self.torch,
            "seconds": round(self.seconds, 3),
            "peak_rss_mb": self.peak_rss_mb,
        }
