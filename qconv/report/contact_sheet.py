"""This module makes a contact sheet: the network's input arrays as images again, by undoing the preprocessing.

    pixel = (value * std + mean) / scale      rounded, 0 to 255

Crops and borders are those that the network sees. Colours come out right whenever preprocessing does what it says; a
sheet cannot show whether training used the same. Ready-made samples are no pictures, and have no sheet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.data_options import Color, Layout, Preprocessing
from qconv.data.images import encode_thumbnail
from qconv.data.loader import Batch, DataLoader
from qconv.errors import QconvError, format_count
from qconv.report.html import PagePicture
from qconv.reporter import Reporter

SHEET_PICTURES = 12

NO_PICTURES = "The samples are ready-made arrays, fed as they are: there is no picture to show."


def undo_preprocessing(values: NDArray[Any], prep: Preprocessing) -> NDArray[np.uint8]:
    """Turn a network's input array back into the image that it was made of.

    Args:
        values: One image as it is fed, (C, H, W) or (H, W, C) as prep.layout says.
        prep: The preprocessing to undo.

    Returns:
        Pixels, (H, W, C), RGB or grey.
    """
    along = (-1, 1, 1) if prep.layout is Layout.NCHW else (-1,)
    mean, std = (np.reshape(numbers, along) for numbers in (prep.mean, prep.std))
    with np.errstate(invalid="ignore"):
        pixels = np.clip(np.rint((values.astype(np.float64) * std + mean) / prep.scale), 0, 255)
    pixels = np.nan_to_num(pixels).astype(np.uint8)
    if prep.layout is Layout.NCHW:
        pixels = pixels.transpose(1, 2, 0)
    return np.ascontiguousarray(pixels[:, :, ::-1] if prep.color is Color.BGR else pixels)


def make_contact_sheet(feed: DataLoader, count: int = SHEET_PICTURES) -> tuple[tuple[PagePicture, ...], str]:
    """Make thumbnails of the first `count` images and a caption. Images that cannot be read are left out."""
    prep = feed.preprocessing
    if prep is None:
        return (), NO_PICTURES
    names = [spec.name for spec in feed.inputs]
    fed = [(path, values[names[0]][0]) for path in feed.listing.paths[:count] for values in _read_batches(feed, path)]
    pictures = tuple(PagePicture(path.name, encode_thumbnail(undo_preprocessing(values, prep))) for path, values in fed)
    return pictures, _make_caption([values for _, values in fed], prep)


def _read_batches(feed: DataLoader, path: Path) -> Sequence[Batch]:
    one = replace(feed.over([path]), reporter=Reporter())
    with contextlib.suppress(QconvError):  # told already, when all were read
        return one.take(1, "report")
    return ()


def _make_caption(fed: Sequence[NDArray[Any]], prep: Preprocessing) -> str:
    if not fed:
        return "None of the first pictures could be read."
    numbers = np.concatenate([values.astype(np.float64).ravel() for values in fed])
    low, high, mean = numbers.min(), numbers.max(), numbers.mean()
    order = {"grey": "one grey channel", "rgb": "red, green, blue", "bgr": "blue, green, red"}[prep.color]
    return (
        f"The first {format_count(len(fed), 'picture')} as the network got them, with crop and borders, "
        "made pictures again "
        f"by undoing this preprocessing. As numbers, {order}: {low:.3g} to {high:.3g}, mean {mean:.3g}."
    )
