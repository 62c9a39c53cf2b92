"""What a run has found, as a page: numbers are put into tiles, and what they come to into one or two sentences."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import qconv
from qconv.analysis.compare import ComparisonRun, compare_on_images
from qconv.audit.audit import FileAudit, audit_file
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.errors import Change, Finding, QconvError, Skipped, format_bytes, format_count
from qconv.ir.files import Source, file_bytes, read_proto
from qconv.metrics.comparison import Interval, share_interval
from qconv.report.sheet import sheet
from qconv.report.shown import Page, Tile, Tone
from qconv.results.comparison import Comparison, Diagnosis, Sweep, Trial
from qconv.results.quantize import Audit, OutputScore, Report, Verification

COMPARED = 64
"""Calibration pictures that layers are compared on."""
AGREES, DIFFERS = 0.97, 0.9
NEAR_DB, FAR_DB = 20.0, 10.0
"""From the first on a result is good, below the second it is bad."""
NOISE = 0.05
"""Of a time: less is not called faster or slower."""
HALF = 0.5

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Scores:
    """How near two models are. images: that it was measured on; kind: what pictures they are."""

    images: int
    outputs: tuple[OutputScore, ...]
    kind: str = "pictures"

    @property
    def agreement(self) -> float | None:
        """The lowest output's; None where no output is a class score."""
        return min((o.agreement for o in self.outputs if o.agreement is not None), default=None)

    @property
    def sqnr_db(self) -> float | None:
        """The lowest output's, in dB; None where all outputs are equal."""
        return min((o.sqnr_db for o in self.outputs if o.sqnr_db is not None), default=None)

    @property
    def interval(self) -> Interval | None:
        """Of the agreement, at 95 %, with each picture taken for one draw."""
        return None if self.agreement is None else share_interval(round(self.agreement * self.images), self.images)


# -- a page of each command --------------------------------------------------------------------------------------------


def of_quantize(
    report: Report, source: Source, quantized: Source, recipe: Recipe, command: str, progress: Progress
) -> Page:
    """The page of a run of `quantize`, its layers compared on some of the calibration pictures.

    source, quantized: the float model, and what was written. command: that makes the page again. Where layers cannot be
    compared the page says why.
    """
    how = "no picture was looked at" if recipe.data_free else "--stats came alone"
    looked, without = None, f"There were no pictures to compare the layers on: {how}."
    if recipe.calib:
        few = replace(recipe, samples=min(recipe.samples, COMPARED))
        try:
            # what there is to warn of was told while quantizing
            looked = compare_on_images(source, quantized, few, lambda text: None, progress)
        except QconvError as error:
            without = f"The layers could not be compared: {error.message}"
    scores = Scores(report.verify.images, report.verify.outputs, "calibration pictures")
    page = _page(source.name, looked, scores, _by_target(report.audit, report.recipe), report.warnings)
    tiles = (size_tile(report.float_bytes, report.quantized_bytes), accuracy_tile(scores))
    fell = [gate for gate in report.gates if not gate.held]
    missed = [f"The gate --{gate.name} {gate.want:g} fell short." for gate in fell]
    return replace(
        page,
        subtitle=f"quantized for {report.recipe['target']}, by a recipe of {bits_of(recipe)}",
        tiles=(*tiles, *speed_tile(report.verify), *page.tiles),
        verdict=" ".join([*missed, _gains(report, scores), *_blame(page.compared)]),
        without=without,
        fed=report.preprocessing_words,
        command=command,
        recipe=json.dumps(report.recipe, indent=1),
        changes=changes_in(report.findings),
        skipped=tuple((f.where, f.why) for f in report.findings if isinstance(f, Skipped)),
    )


def of_compare(looked: ComparisonRun, source: Source, quantized: Source, command: str, warnings: Sequence[str]) -> Page:
    """The page of a run of `compare`. command: that makes the page again."""
    found = looked.compared
    scores = Scores(found.images, found.outputs)
    examined = _examined(quantized)
    recipe = {} if examined is None else examined.recipe
    audited = None if examined is None else _by_target(examined.audit, recipe)
    page = _page(quantized.name, looked, scores, audited, warnings)
    sizes = [file_bytes(read_proto(model), model) for model in (source, quantized)]
    return replace(
        page,
        subtitle=f"compared layer by layer with {source.name}",
        tiles=(size_tile(*sizes), accuracy_tile(scores), *page.tiles),
        verdict=" ".join([_as_good(scores), *_blame(found)]),
        command=command,
        recipe=json.dumps(recipe, indent=1) if recipe else "",
    )


def of_diagnosis(found: Diagnosis, looked: ComparisonRun | None, command: str) -> Page:
    """The page of a diagnosis. looked: the recipe as it was asked for, layer by layer; None where it was not."""
    scores = Scores(found.pictures, () if looked is None else looked.compared.outputs)
    first = found.trials[0]
    mended = found.best.accuracy_db > first.accuracy_db
    named = f"with {found.best.name}" if found.best != first else "no remedy is better"
    page = _page(found.model, looked, scores, None, found.warnings)
    return replace(
        page,
        subtitle=f"diagnosed on {format_count(found.pictures, 'picture')}",
        tiles=(
            Tile("as it was asked for", _got(first), _agreeing(first)),
            Tile("at best", _got(found.best), f"{named}{_agreeing(found.best, '; ')}", "good" if mended else "plain"),
            Tile("causes", str(len(found.causes)), "by evidence in the numbers"),
            *page.tiles,
        ),
        verdict=found.conclusion,
        command=command,
        diagnosis=found,
    )


def of_sweep(found: Sweep, command: str, warnings: Sequence[str]) -> Page:
    """The page of several recipes side by side."""
    good = [trial for trial, best in zip(found.trials, found.best, strict=True) if best]
    page = _page(found.model, None, Scores(found.pictures, ()), None, warnings)
    kept = f"{len(good)} of {format_count(len(found.trials), 'recipe')} are beaten by no other"
    near = max(good, key=lambda trial: trial.accuracy_db, default=None)
    least = min(good, key=lambda trial: trial.size, default=None)
    told = "" if near is None or least is None else f": {near.name} is the most accurate, {least.name} the smallest"
    ends = [(label, trial) for label, trial in (("most accurate", near), ("smallest", least)) if trial is not None]
    return replace(
        page,
        subtitle=f"quantized in {len(found.trials)} ways, measured on {format_count(found.pictures, 'picture')}",
        tiles=(
            *(
                Tile(label, t.name, f"{_got(t)}{_agreeing(t, ', ')}, {format_bytes(t.size)}", "good")
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


def _got(trial: Trial) -> str:
    if trial.failed:
        return "failed"
    if trial.sqnr_db is not None:
        return f"{trial.sqnr_db:.1f} dB"
    return "equal" if trial.equal or trial.agreement is None else f"{trial.agreement:.1%} equal"


def _agreeing(trial: Trial, before: str = "") -> str:
    return "" if trial.agreement is None else f"{before}agrees on {trial.agreement:.1%}"


def _by_target(audited: Audit, recipe: Mapping[str, Any]) -> Audit | None:
    """None where another runtime decides what runs in integers."""
    target = TARGETS.get(str(recipe.get("target")))
    return audited if target is None or target.on_ort else None


def _page(
    name: str, looked: ComparisonRun | None, scores: Scores, audited: Audit | None, warnings: Sequence[str]
) -> Page:
    """What pages have in common."""
    tiles = [] if audited is None else [integers_tile(audited)]
    pictures, caption = ((), "") if looked is None else sheet(looked.fed.feed)
    return Page(
        title=PurePath(name).name,
        subtitle="",
        tiles=(*tiles, warnings_tile(warnings)),
        verdict=_as_good(scores),
        version=qconv.__version__,
        warnings=tuple(warnings),
        compared=None if looked is None else looked.compared,
        audit=audited,
        fed="" if looked is None else looked.compared.words,
        contact=pictures,
        caption=caption,
    )


def _examined(quantized: Source) -> FileAudit | None:
    try:
        return audit_file(quantized, threads=1, batch=None, size=None)
    except QconvError:  # made-up input need not suit it, as pictures do
        return None


# -- tiles -------------------------------------------------------------------------------------------------------------


def size_tile(float_bytes: int, quantized_bytes: int) -> Tile:
    """How much smaller the file is."""
    ratio = float_bytes / max(1, quantized_bytes)
    value = f"{ratio:.1f}\u00d7 smaller" if ratio > 1 else f"{1 / ratio:.1f}\u00d7 larger"
    return Tile(
        "size", value, f"{format_bytes(float_bytes)} to {format_bytes(quantized_bytes)}", "good" if ratio > 1 else "bad"
    )


def accuracy_tile(scores: Scores) -> Tile:
    """Agreement with its interval, and SQNR; the latter alone where no output is a class score."""
    agreement, decibel, span = scores.agreement, scores.sqnr_db, scores.interval
    if not scores.images:
        return Tile("accuracy", "not measured", "no pictures were given")
    told = "outputs are equal" if decibel is None else f"SQNR {decibel:.1f} dB{_span_of(scores)}"
    on = f"on {scores.images} {scores.kind}"
    if agreement is None or span is None:
        tone = _tone(decibel, NEAR_DB, FAR_DB)
        return Tile(
            "accuracy",
            "equal" if decibel is None else f"{decibel:.1f} dB",
            f"SQNR of the outputs{_span_of(scores)}, {on}",
            tone,
        )
    chance = f"95%: {100 * span[0]:.0f} to {100 * span[1]:.0f}%"
    return Tile("agreement", f"{agreement:.1%}", f"{on} ({chance}); {told}", _tone(agreement, AGREES, DIFFERS))


def _span_of(scores: Scores) -> str:
    worst = [output for output in scores.outputs if output.sqnr_db == scores.sqnr_db]
    span = worst[0].sqnr_interval if worst else None
    return "" if span is None else f" (95%: {span[0]:.1f} to {span[1]:.1f})"


def speed_tile(checked: Verification) -> tuple[Tile, ...]:
    """Time of a run over the float model's, where it was measured."""
    slowdown, spread = checked.slowdown, checked.slowdown_range
    if not slowdown:
        return ()
    value = f"{1 / slowdown:.2f}\u00d7 as fast"
    most = "" if spread is None else f"; 8 of 10 runs {1 / spread[1]:.2f} to {1 / spread[0]:.2f}\u00d7"
    note = f"as the float model, timed while checking{most}"
    return (Tile("speed here", value, note, _tone(-slowdown, NOISE - 1, -1 - NOISE)),)


def integers_tile(audited: Audit) -> Tile:
    """Share of the nodes, and of the time, in integers."""
    nodes = audited.integer + audited.float
    spent = "" if not audited.total_us else f", {(audited.spent('integer') or 0.0) / audited.total_us:.0%} of the time"
    note = f"{audited.integer} of {format_count(nodes, 'node')}{spent}"
    value = f"{audited.integer / nodes:.0%}" if nodes else "none"
    return Tile("in integers", value, note, "good" if nodes and not audited.float else "plain")


def warnings_tile(warnings: Sequence[str]) -> Tile:
    """How many there are."""
    note = "read them below" if warnings else "nothing looked odd"
    return Tile("warnings", str(len(warnings)), note, "bad" if warnings else "good")


def _tone(value: float | None, good: float, bad: float) -> Tone:
    if value is None or value >= good:
        return "good"
    return "bad" if value < bad else "plain"


# -- sentences ---------------------------------------------------------------------------------------------------------


def bits_of(recipe: Recipe) -> str:
    """`8-bit weights and activations`."""
    if recipe.searches or recipe.layer_bits:
        return "bits layer by layer"
    if recipe.weight_bits == recipe.activation_bits:
        return f"{recipe.weight_bits}-bit weights and activations"
    values = "float" if recipe.activation_bits == 32 else f"{recipe.activation_bits}-bit"
    return f"{recipe.weight_bits}-bit weights and {values} activations"


def changes_in(findings: Iterable[Finding]) -> tuple[tuple[str, str, int], ...]:
    """(step, what, how often), as a summary counts them, the most frequent first."""
    kinds = Counter((f.step, f.kind or f.what) for f in findings if isinstance(f, Change))
    return tuple((step, what, count) for (step, what), count in kinds.most_common())


def _gains(report: Report, scores: Scores) -> str:
    slowdown = report.verify.slowdown
    parts = [f"takes {report.ratio:.0%} of the float model's space"]
    if slowdown is not None and slowdown < 1 - NOISE:
        parts.append(f"ran {1 / slowdown:.2f} times as fast here")
    elif slowdown is not None:
        parts.append("ran no faster here" if slowdown <= 1 + NOISE else f"took {slowdown:.2f} times as long here")
    return f"It {' and '.join(parts)}. {_as_good(scores)}"


def _as_good(scores: Scores) -> str:
    if not scores.images:
        return "How accurate it is was not measured."
    agreement, decibel = scores.agreement, scores.sqnr_db
    if agreement is not None:
        return f"It says the same as the float model on {agreement:.1%} of {scores.images} {scores.kind}."
    if decibel is None:
        return "Its outputs are those of the float model."
    return f"The error in its outputs lies {decibel:.1f} dB below them, on {scores.images} {scores.kind}."


def _blame(compared: Comparison | None) -> list[str]:
    """How few layers make half of the error, and the first of them."""
    total = 0.0
    for count, row in enumerate(() if compared is None else compared.worst_first, 1):
        total += row.output_share or 0.0
        if compared is not None and total >= HALF:
            worst = compared.worst_first[0]
            verb = "makes" if count == 1 else "make"
            what = f"{count} of {format_count(len(compared.layers), 'layer')} {verb} half of what error is left"
            return [f"{what}; most, {worst.output_share or 0.0:.0%}, comes from {worst.name}."]
    return []
