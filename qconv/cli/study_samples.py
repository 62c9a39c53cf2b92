"""`qconv study-samples` measures how many calibration images a model needs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qconv.cli.options import HELP_WIDTH, images_option
from qconv.cli.output import OutputOptions, format_command_line
from qconv.cli.quantize import (
    _require_streams,
)
from qconv.cli.recipe_options import make_request_of_options, require_images, select_options_without
from qconv.reporter import Reporter
from qconv.signals import raise_exit_on_signals

if TYPE_CHECKING:
    from qconv.results.sample_curve import SampleCurve


OPTIONS_NOT_STUDIED = frozenset(
    {"output", "report", "sweep", "stats", "save_stats", "embed_preprocessing", "min_agreement", "min_sqnr", "verbose"}
    | {
        "max_drop",
        "target_size",
        "candidate_bits",
        "save_layer_bits",
        "effort",
        "rounding",
        "equalize",
        "calib",
        "fallback",
    }
)
"""Options of `quantize` that make no sense of a model that is not kept, or need pictures twice."""

CHART_SUFFIXES = (".png", ".html")


@click.command(
    "study-samples",
    context_settings=HELP_WIDTH,
    params=select_options_without(OPTIONS_NOT_STUDIED),
)
@click.argument("model")
@images_option
@click.option(
    "-o",
    "--output",
    metavar="OUT",
    help="Also draw the curve: a .png picture, or a .html page, which needs qconv[report].",
)
@click.option(
    "--seeds",
    default=3,
    show_default=True,
    metavar="N",
    type=click.IntRange(1),
    help="Draws of each number of pictures.",
)
@click.option(
    "--holdout",
    metavar="N",
    type=click.IntRange(1),
    help="Pictures to score on.  [default: a fifth of the pictures, at most 64]",
)
@click.option(
    "--images", multiple=True, metavar="DIR|FILE", help="Take those from here, instead of holding back some of --calib."
)
@click.option("-v", "--verbose", is_flag=True, help="Also print every draw.")
def study_samples(
    model: str,
    output: str | None,
    seeds: int,
    holdout: int | None,
    images: tuple[str, ...],
    csv: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> int:
    """How many calibration pictures MODEL needs: its accuracy when quantized with 1, 2, 5, 10, ... of them."""
    require_images(options["calib"], "study-samples is about how many of them it takes")
    if "" in (output, *options["calib"], *images):
        raise click.UsageError("--calib, --images and --output need a name.")
    place = None if output is None else Path(output)
    if place is not None and place.suffix.lower() not in CHART_SUFFIXES:
        raise click.UsageError(f"{output} is no chart: name a file that ends in {' or '.join(CHART_SUFFIXES)}.")
    recipe, data = make_request_of_options({**dict.fromkeys(OPTIONS_NOT_STUDIED), **options, "effort": "fast"})
    wanted = OutputOptions(as_json, quiet, csv)
    files = [Path(name) for name in (model, *options["calib"], *images) if name != "-"]
    wanted.check(*files, written={"the chart": output})
    _require_streams(model, None, as_json)
    if place is not None and place.suffix.lower() == ".html":
        from qconv.report.html import require_report_extra

        require_report_extra(f"A page such as {place}")
    from qconv.analysis import sample_study
    from qconv.ir.files import source_of
    from qconv.report import console as report_console

    console = report_console.Console(quiet=quiet)
    reporter = Reporter(console.warn, console.progress)
    source = source_of(model)
    raise_exit_on_signals()
    try:
        curve = sample_study.study_samples(
            source, recipe, data, sample_study.StudyRequest(seeds, holdout, images), reporter, place
        )
    finally:
        console.close()
    if place is not None:
        _write_chart(curve, place)
    told = curve.as_dict()
    wanted.put_table(told["points"])
    if as_json:
        print(json.dumps(told, allow_nan=False))
    elif not quiet and csv != "-" and sys.stdout is not None:
        report_console.show_curve(curve, sys.stdout, verbose=verbose)
    return 0


def _write_chart(curve: SampleCurve, out: Path) -> None:
    from qconv.report import html, study_chart
    from qconv.storage import write_atomically

    if out.suffix.lower() == ".png":
        write_atomically(out, study_chart.render_png(study_chart.draw_chart(curve)))
    else:
        write_atomically(out, html.render_page(study_chart.make_study_page(curve, format_command_line())))
