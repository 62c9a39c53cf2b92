"""Input for networks that are run for the time they take, not for their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.errors import QconvError, format_shape
from qconv.runtime.runtime import Session

SEED = 0


def made_up(session: Session, batch: int | None, size: Sequence[int] | None) -> dict[str, NDArray[Any]]:
    """Something for every input: normal numbers, or any pixels. Raises QconvError where a shape stays open.

    batch: None for the model's own, or 1. size: height and width, where the model leaves them open.
    """
    rng = np.random.default_rng(SEED)
    return {
        name: _numbers(rng, dtype, _shape(session.name, name, shape, batch, size))
        for name, dtype, shape in session.inputs
    }


def _shape(
    model: str, name: str, shape: tuple[int | None, ...], batch: int | None, size: Sequence[int] | None
) -> tuple[int, ...]:
    wanted = list(shape)
    if wanted:
        if batch is not None and wanted[0] not in (None, batch):
            raise QconvError(f"{model} takes batches of {wanted[0]}, not {batch}.", "leave --batch out.")
        wanted[0] = wanted[0] or batch or 1
    if len(wanted) == 4:
        first = 1 if wanted[3] in (1, 3) and wanted[1] not in (1, 3) else 2
        sides = wanted[first : first + 2]
        if size is not None and any(side not in (None, want) for side, want in zip(sides, size, strict=True)):
            given, own = format_shape(tuple(size)), format_shape(tuple(sides))
            raise QconvError(f"{model} takes pictures of {own}, not {given}.", "leave --size out.")
        if size is not None:
            wanted[first : first + 2] = sides = list(size)
        channel = 3 if first == 1 else 1
        if wanted[channel] is None and None not in sides:
            wanted[channel] = 3
    if None in wanted:
        raise QconvError(
            f"Input {name!r} of {model} has the open shape {format_shape(shape)}.",
            "pass --size HxW, for example --size 224x224."
            if len(shape) == 4
            else "only batch and size of pictures can be left open.",
        )
    return tuple(side for side in wanted if side is not None)


def _numbers(rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if dtype.kind == "f":
        return rng.normal(size=shape).astype(dtype)
    highest = {"uint8": 255, "bool": 1}.get(dtype.name, 1)
    return rng.integers(0, highest, shape, endpoint=True).astype(dtype)
