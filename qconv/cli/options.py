"""This module defines the options that commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from qconv.cli.option_types import NumbersType, ResizeType, SizeType, make_choice
from qconv.cli.task_option import JoinedOption, TaskType
from qconv.config.choices import (
    DEVICES,
    MOST_THREADS,
)
from qconv.config.data_options import AUTO, LETTERBOX_GREY, PRESETS, Color, Layout, LetterboxAlign, ResizeFilter
from qconv.errors import QconvError

HELP_WIDTH = {"max_content_width": 100}

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def combine_options(*options: Decorator) -> Decorator:
    """Several options as one decorator, in the order in which --help shows them."""

    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


preprocessing_options = combine_options(
    click.option(
        "--preprocess",
        type=click.Choice([AUTO, *PRESETS]),
        default=AUTO,
        show_default=True,
        help="How the network was fed in training; auto finds out.",
    ),
    click.option(
        "--scale", type=NumbersType(), help="Replaces the preset's: pixels are multiplied by it, for example 1/255."
    ),
    click.option(
        "--mean",
        type=NumbersType(),
        help="Replaces the preset's: subtracted after scaling; one number or one a channel.",
    ),
    click.option("--std", type=NumbersType(), help="Replaces the preset's: divided by at the end."),
    click.option("--color", type=make_choice(Color), help="Channel order."),
    click.option(
        "--layout", type=make_choice(Layout), help="Axis order of the model's input; read off its shape by default."
    ),
    click.option(
        "--resize", type=ResizeType(), default="auto", show_default=True, help="See `qconv manual preprocessing`."
    ),
    click.option(
        "--filter",
        "filter_",
        type=make_choice(ResizeFilter),
        help="For resizing.  [default: bilinear, or as the file tells]",
    ),
    click.option(
        "--letterbox-align",
        type=make_choice(LetterboxAlign),
        help="Where the picture lies in a letterbox.  [default: center, or as the file tells]",
    ),
    click.option(
        "--letterbox-fill",
        type=click.IntRange(0, 255),
        metavar="0..255",
        help=f"Grey level beside it.  [default: {LETTERBOX_GREY}, or as the file tells]",
    ),
    click.option("--size", type=SizeType(), help="Where the model leaves height and width open."),
    click.option(
        "--task",
        cls=JoinedOption,
        type=TaskType(),
        default="auto",
        show_default=True,
        help="What the outputs are, or one of them; repeatable; auto tells by the model.",
    ),
)

decode_option = click.option(
    "--decode",
    metavar="FILE.py:FUNCTION",
    help="Make boxes of the outputs by this function; the file's code is run: see `qconv manual detection`.",
)

output_options = combine_options(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the summary."),
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors (and what --json prints)."),
    click.option("-v", "--verbose", is_flag=True, help="Also print what the summary leaves out."),
)

csv_option = click.option(
    "--csv", metavar="FILE", help="Also write the table as CSV; '-' prints it instead of the summary."
)

device_option = click.option(
    "--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Where to compute."
)

report_option = click.option(
    "--report",
    metavar="FILE.html",
    help="Also write a page to look at, which opens offline; needs the extra qconv[report].",
)

common_options = combine_options(
    output_options,
    click.option(
        "--threads",
        type=click.IntRange(1, MOST_THREADS),
        metavar="N",
        help="Threads to compute with.  [default: all cores]",
    ),
)


def make_gate_options(by: str) -> Decorator:
    """The gates of a command. by: what mAP and mIoU are measured by there, but for the float model."""
    return combine_options(
        click.option(
            "--min-agreement", type=float, metavar="0..1", help="Gate: exit with status 3 below this agreement."
        ),
        click.option(
            "--min-boxes",
            type=float,
            metavar="0..1",
            help="Gate: exit with status 3 where a smaller share of the float model's boxes is found.",
        ),
        click.option(
            "--min-map",
            type=float,
            metavar="0..1",
            help=f"Gate: exit with status 3 below this mAP, {by}with the float model's boxes for labels (extra: "
            "detect).",
        ),
        click.option(
            "--min-miou",
            type=float,
            metavar="0..1",
            help=f"Gate: exit with status 3 below this mIoU, {by}with the float model's map.",
        ),
        click.option("--min-sqnr", type=float, metavar="DB", help="Gate: exit with status 3 below this SQNR."),
    )


finetune_gates = make_gate_options("")

evaluate_gates = combine_options(
    make_gate_options("by --labels or "),
    click.option(
        "--min-top1", type=float, metavar="0..1", help="Gate: exit with status 3 below this top-1 by class folders."
    ),
)

images_option = click.option(
    "--calib",
    multiple=True,
    metavar="DIR|FILE",
    help="Calibration pictures: a folder, or a file with one path a line; repeatable.",
)


def require_output(wanted: bool) -> None:
    """A shell can close standard output (`>&-`): better said before the work than after it."""
    if wanted and sys.stdout is None:
        raise QconvError("Standard output is closed.", "redirect it to a file.")


NO_STREAM = "a model from standard input can be read only once: name its file."


batch_option = click.option(
    "--batch", metavar="N", type=click.IntRange(1), help="Pictures a run.  [default: the model's own, or 1]"
)

size_option = click.option("--size", type=SizeType(), help="Of pictures, where a model leaves height and width open.")
