"""The commands that say which layer is to blame: compare and diagnose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qconv.cli.given import fields_of, made, preprocessing_of, require_pictures, without
from qconv.cli.options import (
    WIDTH,
    common_options,
    csv_option,
    pictures_option,
    preprocessing_options,
    report_option,
    stack,
)
from qconv.cli.putting_out import Wanted, check_report, typed
from qconv.config.recipe import Recipe
from qconv.signals import raise_exit_on_signals

COMPARED = 64

compare_options = stack(
    click.option(
        "--images", required=True, metavar="DIR|FILE", help="Pictures: a folder, or a file with one path a line."
    ),
    click.option(
        "--samples",
        default=COMPARED,
        show_default=True,
        metavar="N",
        type=click.IntRange(1),
        help="Pictures to use; all if fewer.",
    ),
    click.option("--seed", default=0, show_default=True, metavar="N", type=click.IntRange(0), help="Of their draw."),
    click.option("--glob", "pattern", metavar="PATTERN", help="Use only pictures whose name or path matches."),
    click.option("--batch", default=1, show_default=True, metavar="N", type=click.IntRange(1), help="Pictures a run."),
    csv_option,
    report_option,
    preprocessing_options,
    common_options,
)


@click.command(context_settings=WIDTH)
@click.argument("float_model", metavar="FLOAT")
@click.argument("model", metavar="QUANT")
@compare_options
def compare(
    float_model: str,
    model: str,
    images: str,
    samples: int,
    seed: int,
    pattern: str | None,
    batch: int,
    threads: int | None,
    csv: str | None,
    report: str | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> int:
    """Compare QUANT with FLOAT layer by layer: the error that each receives, adds, and causes at the outputs."""
    if "-" in (float_model, model):
        raise click.UsageError("models are read several times: name their files.")
    if "" in (float_model, model, images):
        raise click.UsageError("FLOAT, QUANT and --images need a name.")
    wanted = Wanted(as_json, quiet, csv)
    wanted.check(*map(Path, (float_model, model, images)))
    recipe = Recipe(
        calib=(images,),
        samples=samples,
        seed=seed,
        glob=pattern,
        batch=batch,
        threads=threads,
        preprocessing=preprocessing_of(options),
    )
    from qconv.analysis import compare as analysis_compare
    from qconv.ir.files import source_of
    from qconv.report import console as report_console
    from qconv.report import text

    sources = source_of(float_model), source_of(model)
    place = check_report(report, sources, [images], {"the table": csv})
    console = report_console.Console(quiet=quiet)
    told: list[str] = []

    def warn(text: str) -> None:
        told.append(text)
        console.warn(text)

    raise_exit_on_signals()
    try:
        seen = analysis_compare.compare_on_images(*sources, recipe, warn, console.progress)
    finally:
        console.close()
    if place is not None:
        from qconv import storage
        from qconv.report import html, pages

        storage.write_atomically(place, html.render_page(pages.make_compare_page(seen, *sources, typed(), told)))
    found = seen.compared
    rows = [row.as_dict() for row in found.worst_first]
    wanted.put(found.as_dict(), rows, lambda: text.format_comparison(found, verbose=verbose))
    return 0


NOT_DIAGNOSED = frozenset(
    {"output", "sweep", "stats", "save_stats", "save_layer_bits", "min_agreement", "min_sqnr"}
    | {"max_drop", "target_size", "candidate_bits", "tune_latency", "embed_preprocessing", "calib", "fallback"}
)
"""Options of `quantize` that say nothing on accuracy, search for an answer of their own, or come after it."""


@click.command(context_settings=WIDTH, params=without(NOT_DIAGNOSED))
@click.argument("model")
@pictures_option
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
    require_pictures(options["calib"], "a diagnosis scores on some of them")
    if "" in (model, *options["calib"], *images):
        raise click.UsageError("MODEL, --calib and --images need a name.")
    if model == "-":
        raise click.UsageError("a model from standard input can be read only once: name its file.")
    asked = fields_of({**dict.fromkeys(NOT_DIAGNOSED), "tune_latency": False, **options})
    made(asked)
    wanted = Wanted(as_json, quiet, csv)
    wanted.check(*map(Path, filter(None, (model, *options["calib"], *images, options["layer_bits"]))))
    from qconv.analysis import diagnose as clinic
    from qconv.ir.files import source_of
    from qconv.pipeline import quantize
    from qconv.report import console as report_console
    from qconv.report import text

    source = source_of(model)
    place = check_report(report, [source], [*options["calib"], *images, options["layer_bits"]], {"the table": csv})
    console = report_console.Console(quiet=quiet)
    listener = quantize.Listener(warn=console.warn, progress=console.progress)
    raise_exit_on_signals()
    try:
        seen = clinic.diagnose(clinic.DiagnosisRequest(source, asked, images, options["layer_bits"]), listener)
    finally:
        console.close()
    found = seen.diagnosis
    if place is not None:
        from qconv import storage
        from qconv.report import html, pages

        storage.write_atomically(place, html.render_page(pages.make_diagnosis_page(found, seen.looked, typed())))
    rows = [trial.as_dict() for trial in found.trials]
    wanted.put(found.as_dict(), rows, lambda: text.format_diagnosis(found, verbose=verbose))
    return 0
