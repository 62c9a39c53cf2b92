"""Small terms of the noise model."""

from __future__ import annotations

import numpy as np

from qconv.passes.noise_model import ActivationNoise, WeightNoise


def codes(ranges: list[float], gains: list[float]) -> ActivationNoise:
    """A tensor of classes 0 .. n-1 without negative values."""
    classes = np.arange(len(ranges))
    return ActivationNoise(classes, np.zeros(len(ranges)), np.float64(ranges), np.float64(gains), 255.0)


def weights(
    largest: list[list[float]], powers: list[float], *, whole: bool = False, gains: list[float] | None = None
) -> WeightNoise:
    """A layer from classes 0 .. I-1 to classes I .. I+O-1."""
    matrix = np.float64([largest])
    outputs, inputs = matrix.shape[1:]
    return WeightNoise(
        np.arange(inputs), np.arange(inputs, inputs + outputs), matrix, np.float64(powers),
        np.float64(gains or [1.0] * outputs), 127.0, whole,
    )  # fmt: skip
