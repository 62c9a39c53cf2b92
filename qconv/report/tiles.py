"""This module builds the tiles of report pages: one number each, what it is of, and whether it is good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qconv.analysis.remedies import ENOUGH, POOR
from qconv.errors import format_bytes, format_count
from qconv.report.html import Tile, Tone
from qconv.report.text import describe_difference
from qconv.results.quantize import Audit, OutputScore, Verification
from qconv.results.scores import DECIBEL, SHARE, LabelledScores, Score, worst_scores

TIMING_NOISE = 0.05
"""Share of a time: a smaller difference is not called faster or slower."""


@dataclass(frozen=True, slots=True)
class AccuracyScores:
    """How near two models are. images: how many it was measured on; kind: what images these are.

    outputs: each, and what is read from several together.
    """

    images: int
    outputs: tuple[OutputScore, ...]
    kind: str = "pictures"

    @property
    def share(self) -> Score | None:
        """The worst output's first share, such as agreement or boxes that are found; None where no output has one."""
        return self._first(SHARE)

    @property
    def decibel(self) -> Score | None:
        """The worst output's first score in dB; None where all outputs are equal, or are no numbers with noise."""
        return self._first(DECIBEL)

    @property
    def equal(self) -> bool:
        """Whether something was compared, and nothing differs."""
        compared = [output for output in self.outputs if output.scores]
        return bool(compared) and all(output.equal for output in compared)

    def _first(self, unit: str) -> Score | None:
        found = worst_scores(output.scores for output in self.outputs)
        return next((score for score in found if score.unit == unit and score.value is not None), None)


def make_size_tile(float_bytes: int, quantized_bytes: int) -> Tile:
    """Build the tile of how much smaller the file is."""
    ratio = float_bytes / max(1, quantized_bytes)
    value = f"{ratio:.1f}\u00d7 smaller" if ratio > 1 else f"{1 / ratio:.1f}\u00d7 larger"
    return Tile(
        "size", value, f"{format_bytes(float_bytes)} to {format_bytes(quantized_bytes)}", "good" if ratio > 1 else "bad"
    )


def make_accuracy_tile(scores: AccuracyScores) -> Tile:
    """A share with its interval, and the score in dB; the latter alone where no output has a share."""
    share, decibel = scores.share, scores.decibel
    if not scores.images:
        return Tile("accuracy", "not measured", "no pictures were given")
    on = f"on {scores.images} {scores.kind}"
    if share is None or share.value is None:
        if decibel is None:
            if not scores.equal:
                return Tile("accuracy", "not compared", f"no output could be, {on}")
            return Tile("accuracy", "equal", f"SQNR of the outputs, {on}", "good")
        span = f"{decibel.metric.label} of the outputs{_format_span(decibel)}, {on}"
        return Tile("accuracy", decibel.in_words("{}"), span, _choose_score_tone(decibel))
    told = [f"{on}{_format_span(share, 0)}"]
    if decibel is not None:
        told.append(f"{decibel.in_words()}{_format_span(decibel)}")
    elif scores.equal:
        told.append("outputs are equal")
    return Tile(share.metric.label, share.in_words("{}"), "; ".join(told), _choose_score_tone(share))


def make_labels_tiles(found: LabelledScores) -> tuple[Tile, ...]:
    """Build the tile of what the task is judged by, where labels tell it."""
    if found.pair is None or found.lost is None:
        return ()
    before, after = (found.metric.format(value, 2) for value in found.pair)
    note = f"the float model has {before}; {describe_difference(found.differences[0])}"
    return (Tile(f"{found.metric.label} by labels", after, note, _choose_tone(-found.lost, -ENOUGH[1], -POOR[1])),)


def _format_span(score: Score, digits: int = 1) -> str:
    if score.interval is None:
        return ""
    low, high = score.interval
    sign = "%" if score.unit == SHARE else ""
    return f" (95%: {score.metric.number(low, digits)} to {score.metric.number(high, digits)}{sign})"


def _choose_score_tone(score: Score) -> Tone:
    metric, value = score.metric, score.value
    if value is None or metric.good is None or metric.poor is None:
        return "plain"
    sign = 1 if metric.higher_is_better else -1
    return _choose_tone(sign * value, sign * metric.good, sign * metric.poor)


def make_speed_tiles(checked: Verification) -> tuple[Tile, ...]:
    """Build the tile of the time of a run over the float model's, where it was measured."""
    slowdown, spread = checked.slowdown, checked.slowdown_range
    if not slowdown or spread is None:
        return ()
    value = f"{1 / slowdown:.2f}\u00d7 as fast"
    note = f"as the float model, timed while checking; 8 of 10 runs {1 / spread[1]:.2f} to {1 / spread[0]:.2f}\u00d7"
    return (Tile("speed here", value, note, _choose_tone(-slowdown, TIMING_NOISE - 1, -1 - TIMING_NOISE)),)


def make_integers_tile(audited: Audit) -> Tile:
    """Build the tile of the share of nodes, and of time, in integers."""
    nodes = audited.integer + audited.float
    spent = "" if not audited.total_us else f", {(audited.spent('integer') or 0.0) / audited.total_us:.0%} of the time"
    note = f"{audited.integer} of {format_count(nodes, 'node')}{spent}"
    value = f"{audited.integer / nodes:.0%}" if nodes else "none"
    return Tile("in integers", value, note, "good" if nodes and not audited.float else "plain")


def make_warnings_tile(warnings: Sequence[str]) -> Tile:
    """Build the tile of how many warnings there are."""
    note = "read them below" if warnings else "nothing looked odd"
    return Tile("warnings", str(len(warnings)), note, "bad" if warnings else "good")


def _choose_tone(value: float | None, good: float, bad: float) -> Tone:
    if value is None or value >= good:
        return "good"
    return "bad" if value < bad else "plain"
