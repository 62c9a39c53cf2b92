"""This module builds the report page of each command: results become tiles, sentences and contact sheets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import qconv
from qconv.analysis.compare import ComparisonRun, compare_on_images
from qconv.auditing.audit import FileAudit, audit_file
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.data.images import encode_thumbnail
from qconv.errors import Change, Finding, QconvError, Skipped, format_bytes, format_count, format_shape
from qconv.ir.files import Source, file_bytes, read_proto
from qconv.report.contact_sheet import make_contact_sheet
from qconv.report.html import Page, PagePicture, Tile
from qconv.report.picture_comparison import compare_pictures
from qconv.report.tiles import (
    TIMING_NOISE,
    AccuracyScores,
    make_accuracy_tile,
    make_integers_tile,
    make_labels_tiles,
    make_size_tile,
    make_speed_tiles,
    make_warnings_tile,
)
from qconv.reporter import Reporter
from qconv.results.comparison import Comparison, Diagnosis, Sweep
from qconv.results.quantize import Audit, Report
from qconv.results.scores import SQNR, find_score
from qconv.results.training import GOOD_MATCH, SynthesisResult
from qconv.results.trials import Trial

if TYPE_CHECKING:  # it needs PyTorch
    from qconv.training.synthesize import SynthesizedImages

COMPARED_IMAGES, EFFECT_RUNS = 32, 300
"""Calibration pictures that layers are compared on, and runs for what single errors do at the outputs.

`compare` takes more of both: a page that comes with a run is to take no longer than the run.
"""

HALF_OF_ERROR = 0.5


# -- a page of each command --------------------------------------------------------------------------------------------


def make_quantize_page(
    report: Report,
    source: Source,
    quantized: Source,
    recipe: Recipe,
    data: DataOptions,
    command: str,
    reporter: Reporter,
) -> Page:
    """Build the page of a run of `quantize`, with layers compared on some of the calibration images.

    Where layers cannot be compared, the page says why.

    Args:
        report: The result.
        source: The float model.
        quantized: The file that was written.
        recipe: Of the run.
        command: Makes the page again.
        reporter: Hears of progress and warnings.
    """
    how = "no picture was looked at" if recipe.data_free else "--stats came alone"
    looked, without = None, f"There were no pictures to compare the layers on: {how}."
    if data.paths:
        few = replace(data, samples=min(data.samples or COMPARED_IMAGES, COMPARED_IMAGES))
        try:
            # what there is to warn of was told while quantizing
            looked = compare_on_images(
                source, quantized, few, reporter.without_warnings(), recipe.threads, effect_runs=EFFECT_RUNS
            )
        except QconvError as error:
            without = f"The layers could not be compared: {error.message}"
    scores = AccuracyScores(report.verify.images, report.verify.compared, report.verify.kind_of_images)
    page = _make_page(source.name, looked, scores, _audit_for_target(report.audit, report.recipe), report.warnings)
    labelled = () if report.verify.labelled is None else make_labels_tiles(report.verify.labelled)
    tiles = (make_size_tile(report.float_bytes, report.quantized_bytes), *labelled, make_accuracy_tile(scores))
    missed = [gate.as_error for gate in report.gates if not gate.held]
    return replace(
        page,
        subtitle=f"quantized for {report.recipe['target']}, by a recipe of {describe_bits(recipe)}",
        tiles=(*tiles, *make_speed_tiles(report.verify), *page.tiles),
        verdict=" ".join([*missed, _describe_gains(report, scores), *_describe_worst_layers(page.compared)]),
        without=without,
        fed=report.preprocessing_words,
        command=command,
        recipe=json.dumps(report.recipe, indent=1),
        changes=count_changes(report.findings),
        skipped=tuple((f.where, f.why) for f in report.findings if isinstance(f, Skipped)),
        precision=None if report.precision is None or len(report.precision.points) < 2 else report.precision,
    )


def make_compare_page(
    looked: ComparisonRun, source: Source, quantized: Source, command: str, warnings: Sequence[str]
) -> Page:
    """Build the page of a run of `compare`. command: makes the page again."""
    found = looked.compared
    scores = AccuracyScores(found.images, found.outputs)
    examined = _audit_if_possible(quantized)
    recipe = {} if examined is None else examined.recipe
    audited = None if examined is None else _audit_for_target(examined.audit, recipe)
    page = _make_page(quantized.name, looked, scores, audited, warnings)
    sizes = [file_bytes(read_proto(model), model) for model in (source, quantized)]
    return replace(
        page,
        subtitle=f"compared layer by layer with {source.name}",
        tiles=(make_size_tile(*sizes), make_accuracy_tile(scores), *page.tiles),
        verdict=" ".join([_describe_accuracy(scores), *_describe_worst_layers(found)]),
        command=command,
        recipe=json.dumps(recipe, indent=1) if recipe else "",
    )


def make_diagnosis_page(found: Diagnosis, looked: ComparisonRun | None, command: str) -> Page:
    """Build the page of a diagnosis.

    Args:
        found: The diagnosis.
        looked: The recipe as it was asked for, layer by layer; None where it was not compared.
        command: Makes the page again.
    """
    scores = AccuracyScores(found.pictures, () if looked is None else looked.compared.outputs)
    first = found.trials[0]
    mended = found.best.rank > first.rank
    named = f"with {found.best.name}" if found.best != first else "no remedy is better"
    page = _make_page(found.model, looked, scores, None, found.warnings)
    return replace(
        page,
        subtitle=f"diagnosed on {format_count(found.pictures, 'picture')}",
        tiles=(
            Tile("as it was asked for", _format_trial(first), _format_noise(first)),
            Tile(
                "at best",
                _format_trial(found.best),
                f"{named}{_format_noise(found.best, '; ')}",
                "good" if mended else "plain",
            ),
            Tile("causes", str(len(found.causes)), "by evidence in the numbers"),
            *page.tiles,
        ),
        verdict=found.conclusion,
        command=command,
        diagnosis=found,
    )


def make_sweep_page(found: Sweep, command: str, warnings: Sequence[str]) -> Page:
    """Build the page of a sweep over recipes. command: makes the page again."""
    good = [trial for trial, best in zip(found.trials, found.best, strict=True) if best]
    page = _make_page(found.model, None, AccuracyScores(found.pictures, ()), None, warnings)
    kept = f"{len(good)} of {format_count(len(found.trials), 'recipe')} are beaten by no other"
    near = max(good, key=lambda trial: trial.rank, default=None)
    least = min(good, key=lambda trial: trial.size, default=None)
    told = "" if near is None or least is None else f": {near.name} is the most accurate, {least.name} the smallest"
    ends = [(label, trial) for label, trial in (("most accurate", near), ("smallest", least)) if trial is not None]
    return replace(
        page,
        subtitle=f"quantized in {len(found.trials)} ways, measured on {format_count(found.pictures, 'picture')}",
        tiles=(
            *(
                Tile(label, t.name, f"{_format_trial(t)}{_format_noise(t, ', ')}, {format_bytes(t.size)}", "good")
                for label, t in ends
            ),
            Tile(
                "float model",
                format_bytes(found.float_bytes),
                "" if found.float_ms is None else f"{found.float_ms:.2f} ms",
            ),
            *page.tiles,
        ),
        verdict=f"{kept}{told}.",
        command=command,
        sweep=found,
    )


def _format_trial(trial: Trial) -> str:
    if trial.failed:
        return "failed"
    score = None if trial.ranked_by is None else find_score(trial.scores, trial.ranked_by)
    if score is not None and score.value is not None:
        return score.in_words()
    if trial.equal:
        return "equal"
    return "not compared" if trial.sqnr_db is None else SQNR.format(trial.sqnr_db)


def _format_noise(trial: Trial, before: str = "") -> str:
    """SQNR, where a trial is ranked by another measure."""
    told = trial.lost is not None and trial.sqnr_db is not None
    return f"{before}{SQNR.label} {SQNR.format(trial.sqnr_db)}" if told else ""


def _audit_for_target(audited: Audit, recipe: Mapping[str, Any]) -> Audit | None:
    """Return the audit; None where another runtime decides what runs in integers."""
    target = TARGETS.get(str(recipe.get("target")))
    return audited if target is None or target.on_ort else None


def _make_page(
    name: str, looked: ComparisonRun | None, scores: AccuracyScores, audited: Audit | None, warnings: Sequence[str]
) -> Page:
    """Build the parts that pages have in common."""
    tiles = [] if audited is None else [make_integers_tile(audited)]
    pictures, caption = ((), "") if looked is None else make_contact_sheet(looked.fed.feed)
    return Page(
        title=PurePath(name).name,
        subtitle="",
        tiles=(*tiles, make_warnings_tile(warnings)),
        verdict=_describe_accuracy(scores),
        version=qconv.__version__,
        warnings=tuple(warnings),
        compared=None if looked is None else looked.compared,
        shown=() if looked is None else compare_pictures(looked.fed, looked.quantized),
        audit=audited,
        fed="" if looked is None else looked.compared.words,
        contact=pictures,
        caption=caption,
    )


def _audit_if_possible(quantized: Source) -> FileAudit | None:
    try:
        return audit_file(quantized, threads=1, batch=None, size=None)
    except QconvError:  # made-up input need not suit it, as pictures do
        return None


# -- sentences ---------------------------------------------------------------------------------------------------------


def describe_bits(recipe: Recipe) -> str:
    """Describe the bits of a recipe, as `8-bit weights and activations`."""
    if recipe.searches or recipe.layer_bits:
        return "bits layer by layer"
    if recipe.weight_bits == recipe.activation_bits:
        return f"{recipe.weight_bits}-bit weights and activations"
    values = "float" if recipe.activation_bits == 32 else f"{recipe.activation_bits}-bit"
    return f"{recipe.weight_bits}-bit weights and {values} activations"


def count_changes(findings: Iterable[Finding]) -> tuple[tuple[str, str, int], ...]:
    """Count changes as a summary does: (step, what, how often), the most frequent first."""
    kinds = Counter((f.step, f.kind or f.what) for f in findings if isinstance(f, Change))
    return tuple((step, what, count) for (step, what), count in kinds.most_common())


def _describe_gains(report: Report, scores: AccuracyScores) -> str:
    checked = report.verify
    slowdown = None if checked.slowdown_range is None else checked.slowdown
    parts = [f"takes {report.ratio:.0%} of the float model's space"]
    if slowdown is not None and slowdown < 1 - TIMING_NOISE:
        parts.append(f"ran {checked.speed_in_words} as fast here")
    elif slowdown is not None:
        slower = f"took {checked.slowdown_in_words} as long here"
        parts.append("ran no faster here" if slowdown <= 1 + TIMING_NOISE else slower)
    return f"It {' and '.join(parts)}. {_describe_accuracy(scores)}"


def _describe_accuracy(scores: AccuracyScores) -> str:
    if not scores.images:
        return "How accurate it is was not measured."
    share, decibel = scores.share, scores.decibel
    if share is not None:
        return f"On {scores.images} {scores.kind}: {share.in_words(share.metric.sentence)}."
    if decibel is None:
        return "Its outputs are those of the float model."
    return f"The error in its outputs lies {decibel.in_words('{}')} below them, on {scores.images} {scores.kind}."


def _describe_worst_layers(compared: Comparison | None) -> list[str]:
    """Describe how few layers make half of the error, and the first of them."""
    total = 0.0
    for count, row in enumerate(() if compared is None else compared.worst_first, 1):
        total += row.output_share or 0.0
        if compared is not None and total >= HALF_OF_ERROR:
            worst = compared.worst_first[0]
            verb = "makes" if count == 1 else "make"
            what = f"{count} of {format_count(len(compared.layers), 'layer')} {verb} half of what error is left"
            return [f"{what}; most, {worst.output_share or 0.0:.0%}, comes from {worst.name}."]
    return []


# -- synthesized pictures ----------------------------------------------------------------------------------------------

SYNTHESIS_PICTURES = 48
"""Synthesized images on the page, evenly taken from all."""


def make_synthesis_page(made: SynthesizedImages, command: str) -> Page:
    """Build the page of a run of `synthesize`. command: makes the page again."""
    found, count = made.found, len(made.pixels)
    shown = sorted({index * count // min(SYNTHESIS_PICTURES, count) for index in range(min(SYNTHESIS_PICTURES, count))})
    digits = max(3, len(str(count - 1)))
    near = found.after <= GOOD_MATCH
    size = format_shape(found.preprocessing.size)
    return Page(
        title=PurePath(found.model).name,
        subtitle=f"{format_count(count, 'picture')}, made from what {_describe_layers(found)} of it "
        "remember of training",
        tiles=(
            Tile("pictures", str(count), f"{size}, in {format_count(found.request.steps, 'step')} each"),
            Tile(
                "distance of statistics",
                f"{found.after:.3f}",
                f"{found.before:.3f} at first; dozens of photographs come to 0.04",
                "good" if near else "bad",
            ),
            Tile("the farthest layer", f"{found.worst_first[0].after:.3f}", found.worst_first[0].name),
            Tile(
                "warnings",
                str(len(found.warnings)),
                "read them below" if found.warnings else "nothing looked odd",
                "bad" if found.warnings else "good",
            ),
        ),
        verdict=f"By mean and deviation of what {_describe_layers(found)} read, the network "
        f"{'hardly tells' if near else 'can tell'} these pictures from those that it was trained on.",
        version=qconv.__version__,
        warnings=tuple(found.warnings),
        fed=found.words,
        contact=tuple(PagePicture(f"{index:0{digits}}.png", encode_thumbnail(made.pixels[index])) for index in shown),
        caption=f"{format_count(len(shown), 'picture')} of {count}, made out of discs by gradients "
        "through the network.",
        command=command,
        synthesis=found,
    )


def _describe_layers(found: SynthesisResult) -> str:
    return format_count(len(found.layers), "BatchNormalization")
