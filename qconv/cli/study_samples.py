"""`qconv study-samples` measures how many calibration images a model needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qconv.cli.command import (
    CommandFiles,
    CommandResult,
    OutputOptions,
    format_command_line,
    require_names,
    run_command,
)
from qconv.cli.options import HELP_WIDTH, images_option
from qconv.cli.quantize import require_streams
from qconv.cli.recipe_file import given_options
from qconv.cli.recipe_options import require_images, select_options_without
from qconv.config.choices import GATE_OPTIONS
from qconv.config.data_options import LABEL_OPTIONS
from qconv.reporter import Reporter

if TYPE_CHECKING:
    from qconv.results.sample_curve import SampleCurve


OPTIONS_NOT_STUDIED = frozenset(
    {"output", "report", "sweep", "save_recipe", "stats", "save_stats", "embed_preprocessing", "verbose"}
    | {*GATE_OPTIONS, "max_drop", "target_size", "candidate_bits", "candidate_activation_bits"}
    | {"save_layer_bits"}
    | {"effort", "rounding", "equalize", "calib", "fallback", *LABEL_OPTIONS}
)
"""Options of `quantize` that make no sense of a model that is not kept, or need pictures twice."""

ALWAYS_STUDIED = {"effort": "fast", "rounding": "nearest", "equalize": False, "tune_ranges": False}
"""How a study quantizes in any case."""

CHART_SUFFIXES = (".png", ".html")


@click.command(
    "study-samples",
    context_settings=HELP_WIDTH,
    short_help="Tell how many calibration pictures are enough.",
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
    **options: Any,
) -> int:
    """How many calibration pictures MODEL needs: its accuracy when quantized with 1, 2, 5, 10, ... of them."""
    wanted = OutputOptions.take(options)
    given = given_options(options, ALWAYS_STUDIED)
    calib = given.values["calib"]
    require_images(calib, "study-samples is about how many of them it takes")
    require_names({"--calib": calib, "--images": images, "--output": output})
    place = None if output is None else Path(output)
    if place is not None and place.suffix.lower() not in CHART_SUFFIXES:
        raise click.UsageError(f"{output} is no chart: name a file that ends in {' or '.join(CHART_SUFFIXES)}.")
    recipe, data = given.request(**{**dict.fromkeys(OPTIONS_NOT_STUDIED), "effort": "fast"})
    if recipe.tune_ranges:
        raise click.UsageError("--tune-ranges is not possible in a study: it would need all pictures again each time.")
    if recipe.tune_latency:
        raise click.UsageError("--tune-latency is not possible in a study: nothing is timed.")
    require_streams(model, None, wanted.as_json)
    if place is not None and place.suffix.lower() == ".html":
        from qconv.report.html import require_report_extra

        require_report_extra(f"A page such as {place}")
    files = CommandFiles((model,), (*calib, *images, options["recipe"]), {"the chart": output})

    def work(reporter: Reporter) -> CommandResult:
        from qconv.analysis import sample_study
        from qconv.ir.files import source_of
        from qconv.report.console import show_curve

        request = sample_study.StudyRequest(seeds, holdout, images)
        curve = sample_study.study_samples(source_of(model), recipe, data, request, reporter, place)
        if place is not None:
            _write_chart(curve, place)
        told = curve.as_dict()
        return CommandResult(told, lambda stream: show_curve(curve, stream, verbose=wanted.verbose), told["points"])

    return run_command(wanted, files, work, imports="qconv.analysis.sample_study")


def _write_chart(curve: SampleCurve, out: Path) -> None:
    from qconv.report import html, study_chart
    from qconv.storage import write_atomically

    if out.suffix.lower() == ".png":
        write_atomically(out, study_chart.render_png(curve))
    else:
        write_atomically(out, html.render_page(study_chart.make_study_page(curve, format_command_line())))
