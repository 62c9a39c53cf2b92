"""Pictures to learn from: all of them in memory, as the pixels that they are.

A network that normalises by itself takes pixels, its float model takes what they become; both are made of the same
pixels here, and mirrored and moved alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.preprocessing import Layout, Preprocessing
from qconv.data.images import InputSpec, layout_order
from qconv.data.loader import ModelWithData
from qconv.errors import QconvError, format_shape

MOST_IN_MEMORY = 2**31
"""Bytes of pixels; more go to a temporary file."""


@dataclass(frozen=True, slots=True)
class Album:
    """numbers: (N, ...), uint8 pixels in the float model's layout, or samples as they are. prep: how pixels become the
    float model's input; None for samples. order: the axes of a batch of pixels as the quantized model takes them; None
    where it takes what the float model does. paths: (N,), where each came from.
    """

    numbers: NDArray[Any]
    prep: Preprocessing | None
    order: tuple[int, ...] | None
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.numbers)


def read_album(
    own: ModelWithData,
    teacher: ModelWithData,
    warn: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> Album:
    """All pictures of two models that are fed with the same. Raises QconvError where they are fed otherwise."""
    feed = teacher.feed
    if len(feed.inputs) != 1:
        raise QconvError(
            f"{teacher.session.name} has {len(feed.inputs)} inputs, and training feeds one.",
            "quantization-aware training is for networks that read one picture.",
        )
    order = _order(own, teacher)
    feed.warn, feed.progress, feed.batch = warn, progress, 1
    # rows come one by one, whatever batch the model is fixed to
    (spec,) = feed.inputs
    feed.inputs = [InputSpec(spec.name, spec.dtype, (None, *spec.shape[1:]))]
    prep, paths = feed.preprocessing, feed.listing.paths
    if prep is not None:
        feed.take_pixels(prep.layout)
    numbers = None
    count = 0
    for batch in feed.all("read"):
        row = batch[spec.name]
        if numbers is None:
            numbers = _room((len(paths), *row.shape[1:]), row.dtype)
        if row.shape[1:] != numbers.shape[1:]:
            fact = f"samples differ in shape: {format_shape(row.shape[1:])} and {format_shape(numbers.shape[1:])}."
            raise QconvError(fact, "bring them to one shape.")
        numbers[count] = row[0]
        count += 1
    assert numbers is not None
    left = tuple(path for path in paths if path not in feed.lost)
    return Album(numbers[:count], prep, order, left)


def _order(own: ModelWithData, teacher: ModelWithData) -> tuple[int, ...] | None:
    mine, its = own.feed.preprocessing, teacher.feed.preprocessing
    if own.takes_the_same_as(teacher):
        return None
    pixels = mine is not None and mine.keeps_pixels and own.feed.inputs[0].dtype == np.uint8
    if pixels and mine is not None and its is not None:
        plain = replace(its.as_pixels(mine.layout), preset="", source="", embedded=None)
        if plain == replace(mine, preset="", source="", embedded=None):
            return layout_order(its.layout, Layout(mine.layout))
    raise QconvError(
        f"{own.session.name} and {teacher.session.name} are fed with different inputs: {own.words}, and "
        f"{teacher.words}.",
        "pass the float model that it was made from with --teacher, and no preprocessing options.",
    )


def _room(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size <= MOST_IN_MEMORY:
        return np.empty(shape, dtype)
    try:
        file = tempfile.TemporaryFile(prefix="qconv-")  # noqa: SIM115  # gone with the array
        file.truncate(size)
        return np.memmap(file, dtype, "r+", shape=shape)
    except OSError:
        raise QconvError(
            f"No space is left in {tempfile.gettempdir()} for {size / 2**30:.1f} GiB of pictures.",
            "set TMPDIR to a larger disk, or use fewer pictures with --samples.",
        ) from None
