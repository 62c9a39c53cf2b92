"""`qconv synthesize`: pictures from what a float model remembers of its training."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qconv.cli.command import (
    CommandFiles,
    CommandResult,
    OutputOptions,
    make_arguments,
    print_to,
    require_names,
    run_command,
)
from qconv.cli.options import (
    HELP_WIDTH,
    combine_options,
    common_options,
    csv_option,
    device_option,
    preprocessing_options,
    report_option,
)
from qconv.config.choices import SYNTHESIS_STEPS
from qconv.config.data_options import PreprocessingOptions
from qconv.errors import format_count, format_shape, require_torch
from qconv.reporter import Reporter

if TYPE_CHECKING:
    from qconv.results.training import BatchNormMatch, SynthesisResult

MOST_LAYERS = 5
"""Layers in the summary, the farthest first."""

synthesize_options = combine_options(
    click.option(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="Folder for the pictures: a new one, or one with such pictures, which are replaced.",
    ),
    click.option(
        "-n",
        "--count",
        default=128,
        show_default=True,
        metavar="N",
        type=click.IntRange(1),
        help="How many pictures to make.",
    ),
    click.option(
        "--iterations",
        default=SYNTHESIS_STEPS,
        show_default=True,
        metavar="N",
        type=click.IntRange(1),
        help="Steps in which each picture is made.",
    ),
    click.option(
        "--batch",
        metavar="N",
        type=click.IntRange(1),
        help="Pictures a run, which take memory.  [default: 16 of 224x224, at most 64]",
    ),
    click.option(
        "--seed", default=0, show_default=True, metavar="N", type=click.IntRange(0), help="Of what pictures begin with."
    ),
    device_option,
    csv_option,
    report_option,
    preprocessing_options,
    common_options,
)


@dataclass(frozen=True, slots=True)
class SynthesizeArguments:
    """The options of `synthesize`."""

    wanted: OutputOptions
    preprocessing: PreprocessingOptions
    task: str
    model: str
    output: str
    count: int
    iterations: int
    batch: int | None
    seed: int
    device: str
    threads: int | None


@click.command(context_settings=HELP_WIDTH, short_help="Make pictures from a model; needs qconv[torch].")
@click.argument("model")
@synthesize_options
def synthesize(**options: Any) -> int:
    """Make pictures for --calib from MODEL alone: its BatchNormalizations take them for those of training.

    Each is a PNG to look at, with what the network gets of it beside it as .npy. Needs qconv[torch].
    """
    given = make_arguments(SynthesizeArguments, options)
    require_names({"MODEL": given.model, "--output": given.output})
    if given.output == "-":
        raise click.UsageError("pictures go into a folder: name it.")
    from qconv.storage import refuse_path_inside

    for path, what in ((given.wanted.report, "The page"), (given.wanted.csv, "The table")):
        if path not in (None, "-"):
            refuse_path_inside(Path(given.output), Path(path), what)
    files = CommandFiles((given.model,), writes={"the folder of pictures": given.output})
    return run_command(given.wanted, files, lambda reporter: _synthesize(given, reporter))


def _synthesize(given: SynthesizeArguments, reporter: Reporter) -> CommandResult:
    require_torch("qconv synthesize")
    from qconv.ir.files import source_of
    from qconv.report import pages
    from qconv.training import options as training_options
    from qconv.training import synthesize as synthesis

    request = training_options.SynthesisOptions(
        given.preprocessing,
        given.count,
        given.batch,
        given.iterations,
        given.seed,
        given.threads,
        given.device,
        given.task,
    )
    made = synthesis.synthesize(source_of(given.model), Path(given.output), request, reporter)
    return CommandResult(
        made.found.as_dict(),
        print_to(lambda: _format_result(made.found, verbose=given.wanted.verbose)),
        [layer.as_dict() for layer in made.found.layers],
        lambda command: pages.make_synthesis_page(made, command),
    )


def _format_result(found: SynthesisResult, *, verbose: bool) -> str:
    """How near the statistics came, and what to do with the pictures."""
    from qconv.report.text import format_columns, wrap_text

    rows = found.worst_first if verbose else found.worst_first[:MOST_LAYERS]
    layers = format_count(len(found.layers), "BatchNormalization")
    command = ["qconv", "quantize", "-" if found.piped else found.model, "--calib", found.output, *found.options]
    lines = [
        wrap_text(
            f"{found.output}: {format_count(found.request.count, 'picture')} of "
            f"{format_shape(found.preprocessing.size)}, "
            f"by {found.model}"
        ),
        wrap_text(found.words),
        "",
        format_columns(
            [
                ("distance of statistics", "at first", "now"),
                (f"{layers}, on average", f"{found.before:.3f}", f"{found.after:.3f}"),
                *(("  " + _shorten_name(row), f"{row.before:.3f}", f"{row.after:.3f}") for row in rows),
            ],
            "lrr",
        ),
    ]
    if len(rows) < len(found.layers):
        lines.append(f"  and {len(found.layers) - len(rows)} nearer ones: -v shows all")
    lines += [
        "",
        wrap_text(
            f"{format_count(found.request.steps, 'step')} in batches of {found.batch}, {found.seconds:.0f} seconds on "
            f"{found.device}. 0 is equal; dozens of photographs come to 0.04 or less."
        ),
        "",
        shlex.join(command),
    ]
    return "\n".join(lines)


def _shorten_name(layer: BatchNormMatch) -> str:
    """The end of a long name."""
    return layer.name if len(layer.name) <= 44 else f"...{layer.name[-41:]}"
