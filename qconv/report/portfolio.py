"""The page of synthesized pictures: a sheet of them, how near their statistics came, and the loss, step by step."""

from __future__ import annotations

from pathlib import PurePath

import qconv
from qconv.errors import format_count, format_shape
from qconv.report.plot import thumbnail
from qconv.report.shown import Page, Picture, Tile
from qconv.results.training import GOOD_MATCH, SynthesisResult
from qconv.training.synthesize import SynthesizedImages

PICTURES = 48
"""On the page, evenly taken from all."""


def of_synthesis(made: SynthesizedImages, command: str) -> Page:
    """The page of a run of `synthesize`. command: that makes it again."""
    found, count = made.found, len(made.pixels)
    shown = sorted({index * count // min(PICTURES, count) for index in range(min(PICTURES, count))})
    digits = max(3, len(str(count - 1)))
    near = found.after <= GOOD_MATCH
    size = format_shape(found.preprocessing.size)
    return Page(
        title=PurePath(found.model).name,
        subtitle=f"{format_count(count, 'picture')}, made from what {_layers(found)} of it remember of training",
        tiles=(
            Tile("pictures", str(count), f"{size}, in {format_count(found.wishes.steps, 'step')} each"),
            Tile(
                "distance of statistics",
                f"{found.after:.3f}",
                f"{found.before:.3f} at first; dozens of photographs come to 0.04",
                "good" if near else "bad",
            ),
            Tile("the farthest layer", f"{found.worst_first[0].after:.3f}", found.worst_first[0].name),
            Tile(
                "warnings",
                str(len(found.warnings)),
                "read them below" if found.warnings else "nothing looked odd",
                "bad" if found.warnings else "good",
            ),
        ),
        verdict=f"By mean and deviation of what {_layers(found)} read, the network "
        f"{'hardly tells' if near else 'can tell'} these pictures from those that it was trained on.",
        version=qconv.__version__,
        warnings=tuple(found.warnings),
        fed=found.words,
        contact=tuple(Picture(f"{index:0{digits}}.png", thumbnail(made.pixels[index])) for index in shown),
        caption=f"{format_count(len(shown), 'picture')} of {count}, made out of discs by gradients through the network.",
        command=command,
        synthesis=found,
    )


def _layers(found: SynthesisResult) -> str:
    return format_count(len(found.layers), "BatchNormalization")
