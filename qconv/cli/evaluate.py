"""`qconv evaluate` measures a model on labelled images and against another model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
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
    evaluate_gates,
    preprocessing_options,
)
from qconv.cli.recipe_options import raise_usage_errors
from qconv.config.choices import EVALUATE_GATES, check_run_options
from qconv.config.data_options import DataOptions, PreprocessingOptions
from qconv.reporter import Reporter

TABLE_SUFFIXES = (".csv", ".json", ".npz")


def print_schema(context: click.Context, option: click.Parameter, asked: bool) -> None:
    """Print what labels look like, and end."""
    if asked and not context.resilient_parsing:
        from qconv.data.label_files import SCHEMA

        click.echo(SCHEMA, nl=False)
        context.exit()


evaluate_options = combine_options(
    click.option(
        "--images",
        required=True,
        multiple=True,
        metavar="DIR|FILE",
        help="Pictures: a folder, with a folder a class inside for top-1 and top-5, or a file with one path a line; "
        "repeatable.",
    ),
    click.option(
        "--against",
        metavar="FLOAT",
        help="Also compare with this model: agreement, SQNR, flips and whether they are chance.",
    ),
    click.option(
        "--labels",
        metavar="FILE|DIR",
        help="Boxes (COCO JSON, YOLO, Pascal VOC) for mAP, which needs the extra qconv[detect], or masks (PNG) for "
        "mIoU: see --schema.",
    ),
    click.option(
        "--label-map", metavar="FILE.toml", help="Which class of the model each of these labels is: see --schema."
    ),
    click.option(
        "--schema",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=print_schema,
        help="Print what is expected of --labels and --label-map, and exit.",
    ),
    click.option(
        "--classes",
        metavar="FILE",
        help="The class folders, or the names of classes in --labels, in output order, one a line.  "
        "[default: classes.txt in the folder, or folder names]",
    ),
    click.option(
        "--label-offset", default=0, show_default=True, metavar="N", type=int, help="Added to the place in that list."
    ),
    click.option(
        "--save-predictions",
        metavar="OUT",
        help="Write what was said of each picture: a .csv, a .json of boxes as COCO's results, or a .npz with all "
        "outputs.",
    ),
    click.option("--samples", metavar="N", type=click.IntRange(1), help="Draw so many pictures.  [default: all]"),
    click.option("--seed", metavar="N", type=click.IntRange(0), help="Of that draw.  [default: 0]"),
    click.option("--glob", "pattern", metavar="PATTERN", help="Use only pictures whose name or path matches."),
    click.option("--batch", default=1, show_default=True, metavar="N", type=click.IntRange(1), help="Pictures a run."),
    evaluate_gates,
    csv_option,
    preprocessing_options,
    decode_option,
    common_options,
)


@dataclass(frozen=True, slots=True)
class EvaluateArguments:
    """The options of `evaluate`."""

    wanted: OutputOptions
    preprocessing: PreprocessingOptions
    task: str
    decode: str | None
    model: str
    images: tuple[str, ...]
    against: str | None
    labels: str | None
    label_map: str | None
    classes: str | None
    label_offset: int
    save_predictions: str | None
    samples: int | None
    seed: int | None
    pattern: str | None
    batch: int
    threads: int | None
    min_agreement: float | None
    min_boxes: float | None
    min_map: float | None
    min_miou: float | None
    min_sqnr: float | None
    min_top1: float | None

    @property
    def table(self) -> str | None:
        """The suffix of the file for predictions."""
        return None if self.save_predictions is None else Path(self.save_predictions).suffix.lower()

    def check(self) -> None:
        """Raise usage errors."""
        require_names(
            {
                "--images": self.images,
                "--against": self.against,
                "--labels": self.labels,
                "--label-map": self.label_map,
                "--classes": self.classes,
                "--save-predictions": self.save_predictions,
            }
        )
        if self.seed is not None and self.samples is None:
            raise click.UsageError("--seed is of the draw that --samples asks for; without it all pictures are used.")
        if self.label_map is not None and self.labels is None:
            raise click.UsageError("--label-map is of the labels that --labels names.")
        if "-" in (self.against, self.save_predictions):
            raise click.UsageError("only MODEL can be read from a pipe, and only --json can be written to one.")
        if self.table not in (None, *TABLE_SUFFIXES):
            known = " or ".join(TABLE_SUFFIXES)
            raise click.UsageError(f"{self.save_predictions} is no table: name a file that ends in {known}.")

    @property
    def data(self) -> DataOptions:
        """Which pictures are read, and how."""
        return DataOptions(
            self.images,
            self.samples,
            self.batch,
            self.seed or 0,
            self.pattern,
            self.preprocessing,
            self.task,
            self.decode,
        )


@click.command(context_settings=HELP_WIDTH, short_help="Measure a model on pictures, beside another.")
@click.argument("model")
@evaluate_options
def evaluate(**options: Any) -> int:
    """How often MODEL is right on labelled pictures, and how near it is to another model, with 95 % intervals."""
    given = make_arguments(EvaluateArguments, options)
    given.check()
    with raise_usage_errors():
        check_run_options(given.threads, given)
        data = given.data
    files = CommandFiles(
        (given.model,),
        (given.against, given.classes, given.labels, given.label_map, *given.images),
        {"the predictions": given.save_predictions},
    )
    return run_command(
        given.wanted, files, lambda reporter: _evaluate(given, data, files, reporter), imports="qconv.analysis.evaluate"
    )


def _evaluate(given: EvaluateArguments, data: DataOptions, files: CommandFiles, reporter: Reporter) -> CommandResult:
    from qconv import storage
    from qconv.analysis.evaluate import evaluate as run_evaluation
    from qconv.analysis.evaluation import EvaluationOptions
    from qconv.ir.files import source_of
    from qconv.report import text

    if given.save_predictions is not None:
        storage.check_output_path(Path(given.save_predictions))
        storage.refuse_overwriting_inputs(Path(given.save_predictions), files.read)
    with raise_usage_errors():
        request = EvaluationOptions(
            data,
            None if given.against is None else source_of(given.against),
            None if given.classes is None else Path(given.classes),
            given.label_offset,
            table=given.table,
            threads=given.threads,
            labels=None if given.labels is None else Path(given.labels),
            label_map=None if given.label_map is None else Path(given.label_map),
            **{name: getattr(given, name) for name in EVALUATE_GATES},
        )
    found = run_evaluation(source_of(given.model), request, reporter)
    if given.save_predictions is not None and given.table is not None and found.predictions is not None:
        table = found.predictions.as_table(given.table)
        storage.write_atomically(Path(given.save_predictions), table)
    show = print_to(lambda: text.format_evaluation(found, verbose=given.wanted.verbose))
    return CommandResult(found.as_dict(), show, found.rows(), gates=found.gates)
