"""`qconv diagnose` finds out why a model loses accuracy, and tries remedies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qconv.cli.options import (
    HELP_WIDTH,
    images_option,
)
from qconv.cli.output import OutputOptions, check_report_path, format_command_line
from qconv.cli.recipe_options import (
    collect_fields,
    make_request_of_fields,
    require_images,
    select_options_without,
)
from qconv.reporter import Reporter
from qconv.signals import raise_exit_on_signals

OPTIONS_NOT_DIAGNOSED = frozenset(
    {"output", "sweep", "stats", "save_stats", "save_layer_bits", "min_agreement", "min_sqnr"}
    | {"max_drop", "target_size", "candidate_bits", "tune_latency", "embed_preprocessing", "calib", "fallback"}
)
"""Options of `quantize` that say nothing on accuracy, search for an answer of their own, or come after it."""


@click.command(context_settings=HELP_WIDTH, params=select_options_without(OPTIONS_NOT_DIAGNOSED))
@click.argument("model")
@images_option
@click.option(
    "--images",
    multiple=True,
    metavar="DIR|FILE",
    help="Pictures to score on.  [default: a fifth of --calib, at most 64, which are then not calibrated with]",
)
def diagnose(
    model: str,
    images: tuple[str, ...],
    csv: str | None,
    report: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> int:
    """Find out why MODEL loses accuracy when it is quantized with these options, and try what mends it."""
    require_images(options["calib"], "a diagnosis scores on some of them")
    if "" in (model, *options["calib"], *images):
        raise click.UsageError("MODEL, --calib and --images need a name.")
    if model == "-":
        raise click.UsageError("a model from standard input can be read only once: name its file.")
    asked = collect_fields({**dict.fromkeys(OPTIONS_NOT_DIAGNOSED), "tune_latency": False, **options})
    make_request_of_fields(asked)
    wanted = OutputOptions(as_json, quiet, csv)
    wanted.check(*map(Path, filter(None, (model, *options["calib"], *images, options["layer_bits"]))))
    from qconv.analysis import diagnose as clinic
    from qconv.ir.files import source_of
    from qconv.report import console as report_console
    from qconv.report import text

    source = source_of(model)
    place = check_report_path(report, [source], [*options["calib"], *images, options["layer_bits"]], {"the table": csv})
    console = report_console.Console(quiet=quiet)
    reporter = Reporter(console.warn, console.progress)
    raise_exit_on_signals()
    try:
        seen = clinic.diagnose(clinic.DiagnosisRequest(source, asked, images, options["layer_bits"]), reporter)
    finally:
        console.close()
    found = seen.diagnosis
    if place is not None:
        from qconv import storage
        from qconv.report import html, pages

        storage.write_atomically(
            place, html.render_page(pages.make_diagnosis_page(found, seen.looked, format_command_line()))
        )
    rows = [trial.as_dict() for trial in found.trials]
    wanted.put(found.as_dict(), rows, lambda: text.format_diagnosis(found, verbose=verbose))
    return 0
