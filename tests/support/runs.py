"""Samples on disk, and runs of `quantize` on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from qconv.config.recipe import make_request
from qconv.pipeline.quantize import quantize
from qconv.results.quantize import Report


def write_samples(folder: Path, shape: Sequence[int], count: int, seed: int = 7) -> str:
    """Write normal numbers of this shape as .npy samples, one after the other from one seed. Returns the folder."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        np.save(folder / f"{index:02}.npy", rng.standard_normal(shape).astype(np.float32))
    return str(folder)


def quantize_saved(
    proto: onnx.ModelProto, samples: str, path: Path, **options: object
) -> tuple[Report, onnx.ModelProto]:
    """Quantize a network that is saved at `path`, with one thread, in memory. options: as on the command line."""
    onnx.save(proto, path)
    recipe, data = make_request({"calib": (samples,), "threads": 1} | options)
    report, content = quantize(path, None, recipe, data)
    assert content is not None
    return report, onnx.load_from_string(content)
