"""`qconv compare` compares a quantized model with its float model layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    decode_option,
    preprocessing_options,
    report_option,
)
from qconv.cli.recipe_options import raise_usage_errors
from qconv.config.choices import check_run_options
from qconv.config.data_options import DataOptions, PreprocessingOptions
from qconv.reporter import Reporter

COMPARED_IMAGES = 64

compare_options = combine_options(
    click.option(
        "--images",
        required=True,
        multiple=True,
        metavar="DIR|FILE",
        help="Pictures: a folder, or a file with one path a line; repeatable.",
    ),
    click.option(
        "--samples",
        default=COMPARED_IMAGES,
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
    decode_option,
    common_options,
)


@dataclass(frozen=True, slots=True)
class CompareArguments:
    """The options of `compare`."""

    wanted: OutputOptions
    preprocessing: PreprocessingOptions
    task: str
    decode: str | None
    float_model: str
    model: str
    images: tuple[str, ...]
    samples: int
    seed: int
    pattern: str | None
    batch: int
    threads: int | None


@click.command(context_settings=HELP_WIDTH, short_help="Find the layers that cost accuracy.")
@click.argument("float_model", metavar="FLOAT")
@click.argument("model", metavar="QUANT")
@compare_options
def compare(**options: Any) -> int:
    """Compare QUANT with FLOAT layer by layer: the error that each receives, adds, and causes at the outputs."""
    given = make_arguments(CompareArguments, options)
    models = given.float_model, given.model
    if "-" in models:
        raise click.UsageError("models are read several times: name their files.")
    require_names({"FLOAT": given.float_model, "QUANT": given.model, "--images": given.images})
    with raise_usage_errors():
        check_run_options(given.threads)
        data = DataOptions(
            given.images,
            given.samples,
            given.batch,
            given.seed,
            given.pattern,
            given.preprocessing,
            given.task,
            given.decode,
        )

    def work(reporter: Reporter) -> CommandResult:
        from qconv.analysis.compare import compare_on_images
        from qconv.ir.files import source_of
        from qconv.report import pages, text_compare

        sources = source_of(given.float_model), source_of(given.model)
        seen = compare_on_images(*sources, data, reporter, given.threads)
        found = seen.compared
        return CommandResult(
            found.as_dict(),
            print_to(lambda: text_compare.format_comparison(found, verbose=given.wanted.verbose)),
            [row.as_dict() for row in found.worst_first],
            lambda command: pages.make_compare_page(seen, *sources, command, reporter.warnings),
        )

    return run_command(given.wanted, CommandFiles(models, given.images), work, imports="qconv.analysis.compare")
