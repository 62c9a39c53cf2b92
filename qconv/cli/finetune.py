"""`qconv finetune`: quantization-aware training from the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    decode_option,
    device_option,
    finetune_gates,
    preprocessing_options,
)
from qconv.cli.recipe_options import raise_usage_errors
from qconv.config.choices import GATE_OPTIONS, check_run_options
from qconv.config.data_options import DataOptions, PreprocessingOptions
from qconv.errors import QconvError, format_count, require_torch
from qconv.reporter import Reporter

if TYPE_CHECKING:
    from qconv.results.training import FinetuneResult, HistoryRow, ValidationResult

finetune_options = combine_options(
    click.option(
        "--images",
        required=True,
        multiple=True,
        metavar="DIR|FILE",
        help="Pictures to learn from, a tenth of which is held back: a folder, or a file with one path a line; "
        "repeatable.",
    ),
    click.option(
        "-o", "--output", metavar="OUT", help="Result.  [default: QUANT with .qat.onnx in the place of .onnx]"
    ),
    click.option(
        "--teacher",
        metavar="FLOAT",
        help="The float model that QUANT was made from.  [default: found beside QUANT by its hash]",
    ),
    click.option(
        "--labels", is_flag=True, help="Learn from the pictures' class folders as well, as `evaluate` finds them."
    ),
    click.option("--classes", metavar="FILE", help="For --labels: the class folders in output order, one a line."),
    click.option(
        "--label-offset", default=0, show_default=True, metavar="N", type=int, help="Added to the place in that list."
    ),
    click.option(
        "--epochs",
        default=20,
        show_default=True,
        metavar="N",
        type=click.IntRange(1),
        help="Times that each picture is seen.",
    ),
    click.option(
        "--batch",
        default=64,
        show_default=True,
        metavar="N",
        type=click.IntRange(1),
        help="Pictures that a step learns from.",
    ),
    click.option(
        "--learning-rate",
        default=4e-3,
        show_default=True,
        metavar="R",
        type=click.FloatRange(0, 100, min_open=True),
        help="How far a step moves a weight, in codes, before rates fall.",
    ),
    click.option(
        "--holdout",
        metavar="N",
        type=click.IntRange(1),
        help="Pictures held back.  [default: a tenth, at least 32 or a quarter, at most 2000]",
    ),
    click.option(
        "--augment/--no-augment", default=True, show_default=True, help="Mirror, move and mix pictures at random."
    ),
    device_option,
    click.option("--samples", metavar="N", type=click.IntRange(1), help="Draw so many pictures.  [default: all]"),
    click.option(
        "--seed", default=0, show_default=True, metavar="N", type=click.IntRange(0), help="Of all that is drawn."
    ),
    click.option("--glob", "pattern", metavar="PATTERN", help="Use only pictures whose name or path matches."),
    finetune_gates,
    csv_option,
    preprocessing_options,
    decode_option,
    common_options,
)


@dataclass(frozen=True, slots=True)
class FinetuneArguments:
    """The options of `finetune`."""

    wanted: OutputOptions
    preprocessing: PreprocessingOptions
    task: str
    decode: str | None
    quant: str
    images: tuple[str, ...]
    output: str | None
    teacher: str | None
    labels: bool
    classes: str | None
    label_offset: int
    learning_rate: float
    pattern: str | None
    samples: int | None
    seed: int
    min_agreement: float | None
    min_boxes: float | None
    min_map: float | None
    min_miou: float | None
    min_sqnr: float | None
    threads: int | None
    epochs: int
    batch: int
    holdout: int | None
    augment: bool
    device: str

    def check(self) -> None:
        """Raise usage errors."""
        require_names(
            {
                "QUANT": self.quant,
                "--images": self.images,
                "--output": self.output,
                "--teacher": self.teacher,
                "--classes": self.classes,
            }
        )
        if "-" in (self.quant, self.output, self.teacher):
            raise click.UsageError("training reads its files several times: name them.")
        if not self.labels and (self.classes is not None or self.label_offset):
            raise click.UsageError("--classes and --label-offset are for --labels.")
        with raise_usage_errors():
            check_run_options(self.threads, self)

    @property
    def data(self) -> DataOptions:
        """Which pictures are read, and how."""
        return DataOptions(
            self.images, self.samples, 1, self.seed, self.pattern, self.preprocessing, self.task, self.decode
        )


@click.command(context_settings=HELP_WIDTH, short_help="Train a quantized model; needs qconv[torch].")
@click.argument("quant")
@finetune_options
def finetune(**options: Any) -> int:
    """Train QUANT, a file that `quantize` wrote, to say what its float model says of the pictures in --images.

    No labels are needed. The result has the structure of QUANT, and is never worse on the pictures held back: where
    training brings nothing, it is QUANT itself. The same command goes on where it was killed. Needs qconv[torch].
    """
    given = make_arguments(FinetuneArguments, options)
    given.check()
    with raise_usage_errors():
        data = given.data
    out = _default_output(given.quant) if given.output is None else Path(given.output)
    files = CommandFiles((given.quant,), (given.teacher, given.classes, *given.images), {"the output": str(out)})
    return run_command(given.wanted, files, lambda reporter: _finetune(given, data, out, reporter))


def _finetune(given: FinetuneArguments, data: DataOptions, out: Path, reporter: Reporter) -> CommandResult:
    require_torch("qconv finetune")
    from qconv.ir.files import source_of
    from qconv.training import finetune as training
    from qconv.training import options as training_options

    request = training_options.FinetuneOptions(
        data,
        None if given.teacher is None else source_of(given.teacher),
        given.labels,
        None if given.classes is None else Path(given.classes),
        given.label_offset,
        given.epochs,
        given.batch,
        given.learning_rate,
        given.holdout,
        given.augment,
        given.device,
        given.threads,
        **{name: getattr(given, name) for name in GATE_OPTIONS},
    )
    found = training.finetune(source_of(given.quant), out, request, reporter)
    show = print_to(lambda: _format_result(found, verbose=given.wanted.verbose))
    return CommandResult(found.as_dict(), show, found.rows, gates=found.gates)


def _default_output(quant: str) -> Path:
    """QUANT as it is named, with `.qat` in front of its suffix."""
    path = Path(quant)
    if not path.name:
        raise QconvError(f"{quant} is no model.", "name a quantized ONNX file.")
    return path.with_name(f"{path.stem if path.suffix.lower() == '.onnx' else path.name}.qat.onnx")


def _format_result(found: FinetuneResult, *, verbose: bool) -> str:
    """What training brought on the pictures held back."""
    from qconv.report.text import format_columns, wrap_text

    judged = [found.before] if found.after is None else [found.before, found.after]
    own = found.audit
    lines = [
        wrap_text(f"{found.model}, taught by {found.teacher} on {format_count(found.taught, 'picture')}"),
        "",
        format_columns(
            [("", "before", "after")[: len(judged) + 1], *_result_rows(judged, labels=found.request.labels)],
            "lrr"[: len(judged) + 1],
        ),
        "",
        wrap_text(
            f"On {format_count(found.held, 'picture')} held back, by ONNX Runtime. {_describe_steps(found)}, "
            f"{found.seconds:.0f} seconds on {found.device}."
        ),
    ]
    if verbose and found.history:
        lines += [
            "",
            format_columns(
                [("step", "epoch", "loss", "right", "distance", "s"), *map(_history_row, found.history)], "rrrrrr"
            ),
        ]
    runs = f"{format_count(own.integer, 'node')} in integers, {own.float} in float"
    lines += ["", wrap_text(f"{found.output}: {found.bytes / 1e6:.2f} MB, {runs}.")]
    if not found.trained:
        lines.append(wrap_text(f"Training brought nothing better: {found.output} is {found.model} as it was."))
    return "\n".join(lines)


def _result_rows(judged: Sequence[ValidationResult], *, labels: bool) -> Iterator[tuple[str, ...]]:
    """Top-1 where there are labels, what the task is judged by, SQNR, and the distance."""
    from qconv.results.scores import SHARE, TOP1, by_rank, value_of, worst_scores

    if labels:
        yield (TOP1.label, *(TOP1.format(one.mark.right, 2) for one in judged))
    for score in by_rank(worst_scores(one.verify.scores for one in judged)):
        metric, digits = score.metric, 2 if score.unit == SHARE else 1
        yield (metric.label, *(metric.format(value_of(one.verify.scores, metric), digits) for one in judged))
    yield ("distance", *(f"{one.mark.distance:.4g}" for one in judged))


def _describe_steps(found: FinetuneResult) -> str:
    end = f", given up after {found.done} of {found.steps}" if found.done < found.steps else ""
    resumed = f" (from step {found.resumed} in this run)" if found.resumed else ""
    return f"{format_count(found.done, 'step')}{end}{resumed}"


def _history_row(row: HistoryRow) -> tuple[str, ...]:
    right = "" if row.mark.right is None else f"{row.mark.right:.2%}"
    return (
        f"{row.step}",
        f"{row.epoch:.1f}",
        f"{row.loss:.4g}",
        right,
        f"{row.mark.distance:.4g}",
        f"{row.seconds:.0f}",
    )
