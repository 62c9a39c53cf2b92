"""`qconv diagnose` finds out why a model loses accuracy, and tries remedies."""

from __future__ import annotations

from typing import Any

import click

from qconv.cli.command import CommandFiles, CommandResult, OutputOptions, print_to, require_names, run_command
from qconv.cli.options import HELP_WIDTH, images_option
from qconv.cli.recipe_file import given_options
from qconv.cli.recipe_options import require_images, select_options_without
from qconv.config.choices import GATE_OPTIONS
from qconv.reporter import Reporter

OPTIONS_NOT_DIAGNOSED = frozenset(
    {"output", "sweep", "stats", "save_stats", "save_recipe", "save_layer_bits", *GATE_OPTIONS}
    | {"max_drop", "target_size", "candidate_bits", "tune_latency", "embed_preprocessing", "calib", "fallback"}
)
"""Options of `quantize` that say nothing on accuracy, search for an answer of their own, or come after it."""


@click.command(
    context_settings=HELP_WIDTH,
    short_help="Find causes of a loss of accuracy, and remedies.",
    params=select_options_without(OPTIONS_NOT_DIAGNOSED),
)
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
    **options: Any,
) -> int:
    """Find out why MODEL loses accuracy when it is quantized with these options, and try what mends it."""
    wanted = OutputOptions.take(options)
    given = given_options(options)
    require_images(given.values["calib"], "a diagnosis scores on some of them")
    require_names({"MODEL": model, "--calib": given.values["calib"], "--images": images})
    if model == "-":
        raise click.UsageError("a model from standard input can be read only once: name its file.")
    asked = given.fields(**{**dict.fromkeys(OPTIONS_NOT_DIAGNOSED), "tune_latency": False})
    bits = given.layer_bits_file
    files = CommandFiles((model,), (*given.values["calib"], *images, bits, options["recipe"]))

    def work(reporter: Reporter) -> CommandResult:
        from qconv.analysis import diagnose as analysis
        from qconv.ir.files import source_of
        from qconv.report import pages, text

        seen = analysis.diagnose(analysis.DiagnosisRequest(source_of(model), asked, images, bits), reporter)
        found = seen.diagnosis
        return CommandResult(
            found.as_dict(),
            print_to(lambda: text.format_diagnosis(found, verbose=wanted.verbose)),
            [trial.as_dict() for trial in found.trials],
            lambda command: pages.make_diagnosis_page(found, seen.looked, command),
        )

    return run_command(wanted, files, work, imports="qconv.analysis.diagnose")
