"""This module prints the summary of a run in 80 columns, with colour and progress only where a person is looking."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from qconv.config.targets import TARGETS
from qconv.errors import Change, Skipped, format_bytes, format_count, printable
from qconv.report.text import describe_difference, format_columns, wrap_text
from qconv.results.precision import FOR_ACCURACY, PrecisionReport
from qconv.results.scores import DECIBEL, FLOAT_MAP, LabelledScores, Metric, Score, by_rank, format_value

if TYPE_CHECKING:  # what is here alone is not imported for the summary of a run
    import rich.console
    import rich.progress

    from qconv.results.quantize import FloatNode, MixedPrecision, OutputScore, Report
    from qconv.results.sample_curve import SampleCurve, Spread

MOST_LINES = 8
"""Of changes, and of what was left alone; one more where that is all."""

OWN_TITLES = {"pack": "packed", "tune": "tuned"}
"""Steps whose changes have lines of their own, which no number of other changes hides."""

TITLE_WIDTH = 12


class Console:
    """Messages on stderr while a run lasts: warnings, and a progress bar where stderr is a terminal.

    rich is imported where it has something to draw: into a pipe nothing is drawn.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        # FORCE_COLOR, which CI systems set, makes rich take a log for a terminal
        self._watched = sys.stderr is not None and sys.stderr.isatty()
        self._console: rich.console.Console | None = None
        self._bar: rich.progress.Progress | None = None
        self._tasks: dict[str, rich.progress.TaskID] = {}

    def warn(self, text: str) -> None:
        """Print a warning."""
        if self._quiet:
            return
        if self._watched or os.environ.get("FORCE_COLOR"):
            from rich.markup import escape

            self._drawn.print(f"[yellow]Warning:[/] {escape(printable(text))}", soft_wrap=True, emoji=False)
        else:
            print(f"Warning: {printable(text)}", file=sys.stderr, flush=True)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Move the progress bar of `stage`, where stderr is a terminal."""
        if self._quiet or not self._watched:
            return
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress

            columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, console=self._drawn, transient=True)
            self._bar.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total)
        self._bar.update(self._tasks[stage], completed=done)

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def _drawn(self) -> rich.console.Console:
        if self._console is None:
            from rich.console import Console as RichConsole

            self._console = RichConsole(stderr=True, highlight=False)
        return self._console


def show_report(report: Report, stream: TextIO, *, verbose: bool) -> None:
    """Print the summary of `quantize`. verbose: also every finding and tensor."""
    lines = [(name, printable(text)) for name, text in _summary_lines(report)]
    if stream.isatty():
        short = {printable(gate.in_words) for gate in report.gates if not gate.held}
        _draw_summary(lines, short, stream)
    else:
        print(format_columns([(name.ljust(TITLE_WIDTH), text) for name, text in lines], "ll"), file=stream)
    if verbose:
        _print_details(report, stream)


def _draw_summary(lines: list[tuple[str, str]], red: set[str], stream: TextIO) -> None:
    """Print (title, text) on a terminal, some of the texts in red."""
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in lines:
        table.add_row(name, Text(text, style="red" if text in red else ""))
    RichConsole(file=stream, highlight=False).print(table)


def show_curve(curve: SampleCurve, stream: TextIO, *, verbose: bool) -> None:
    """Print the table of a sample study and the sentences that explain it, in 80 columns. verbose: also every draw."""
    metrics = curve.metrics
    heads = (text for metric in metrics for text in (metric.heading, "(worst .. best)"))
    rows = [("pictures", *heads, "seconds")]
    for count in curve.counts:
        cells = (text for metric in metrics for text in _spread_cells(metric, curve.spread(metric, count)))
        rows.append((str(count), *cells, f"{curve.seconds[count]:.1f}"))
    print(format_columns(rows, f"r{'rl' * len(metrics)}r"), file=stream)
    if verbose:
        print(file=stream)
    for point in curve.points if verbose else ():
        scores = (f"{m.label} {format_value(m, point.value_of(m))} {m.sign}".rstrip() for m in metrics)
        print(f"{format_count(point.pictures, 'picture')}, draw {point.seed}: {', '.join(scores)}", file=stream)
    print(file=stream)
    for text in (curve.in_words(), _capitalize(curve.how())):
        print(wrap_text(text), file=stream)


def _spread_cells(metric: Metric, spread: Spread | None) -> tuple[str, str]:
    if spread is None:
        return "-", ""
    worst, middle, best = (format_value(metric, value) for value in spread)
    return middle, f"({worst} .. {best})"


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def _summary_lines(report: Report) -> list[tuple[str, str]]:
    """Compose the summary as (title, text)."""
    size = f"{format_bytes(report.float_bytes)} -> {format_bytes(report.quantized_bytes)}, {report.ratio:.2f} of float"
    lines = [
        ("written", "to standard output" if report.output == "-" else report.output),
        ("size", size),
        ("accuracy", _format_accuracy(report)),
    ]
    if report.verify.labelled is not None:
        lines += [("", text) for text in _describe_labels(report.verify.labelled)]
    several = len(report.verify.outputs) > 1
    lines += [("", _format_score(o)) for o in report.verify.outputs if several or o.parts]
    if report.verify.speed_in_words:
        lines.append(("speed here", f"{report.verify.speed_in_words} the float model's, timed while checking"))
    lines += [("outputs" if not index else "", o.in_words) for index, o in enumerate(report.outputs)]
    if report.preprocessing_words:
        lines.append(("pictures", report.preprocessing_words))
    lines += [("changed", text) for text in _first(_change_lines(report))]
    changes = [found for found in report.findings if isinstance(found, Change)]
    lines += [(title, c.what) for step, title in OWN_TITLES.items() for c in changes if c.step == step]
    lines += _mixed_precision_lines(report.mixed)
    lines += _precise_activation_lines(report.precision)
    lines += _execution_lines(report)
    lines += [("left alone", text) for text in _skipped_lines(report)]
    lines.append(("needs", f"{report.needs} (opset {report.opset}, IR {report.ir_version})"))
    lines += [("gate", gate.in_words) for gate in report.gates]
    memory = "" if report.peak_rss_mb is None else f", peak memory {report.peak_rss_mb:.0f} MB"
    lines.append(("took", f"{report.time['total']:.1f} s{memory}"))
    return lines


def _describe_labels(found: LabelledScores) -> Iterator[str]:
    """Whether a difference by labels is chance, and where these come from."""
    for score in found.differences[:1]:
        if score.value is not None:
            on = format_count(found.pictures, "picture")
            yield f"{describe_difference(score)}; {on} with labels by {found.words}"


def _mixed_precision_lines(found: MixedPrecision | None) -> list[tuple[str, str]]:
    """Describe what a search for bits chose, and the points of the curve that were tried."""
    if found is None:
        return []
    chosen = found.chosen
    kinds = [f"{'float' if bits == '32' else f'{bits} bits'} x {layers}" for bits, layers in chosen.bits.items()]
    lines = [("bits", f"weights {chosen.size:.3f} of float by {found.demand}; layers: {', '.join(kinds)}")]
    lines.append(("", f"chosen on {format_count(found.pictures, 'picture')}:"))
    for point in found.points:
        if point.verified:
            told = ", ".join(_format_measured(score, point.modelled_sqnr_db) for score in point.scores)
            lines.append(("", f"size {point.size:.3f}: {told}{'; taken' if point.chosen else ''}"))
    return lines


def _precise_activation_lines(found: PrecisionReport | None) -> list[tuple[str, str]]:
    """Describe the activations with more than 8 bits, where their share was bounded."""
    if found is None or found.share is None:
        return []
    count, of = found.share.count, format_count(found.share.of, "tensor")
    if not count:
        return [("bits", "activations: all in 8 bits")]
    told = f"{count} of {of} ({found.share.elements:.0%} of their elements) {found.kind}"
    return [("bits", f"activations: {told} for {FOR_ACCURACY}: {found.gained_db:.1f} dB")]


def _format_measured(score: Score, modelled_sqnr_db: float | None) -> str:
    """A score of a point; that of the noise with what the model made of it."""
    if score.unit != DECIBEL:
        return score.in_words()
    got, model = (format_value(score.metric, decibel) for decibel in (score.value, modelled_sqnr_db))
    return f"{score.metric.label} {got} {score.unit} (weights alone by the model: {model})"


def _execution_lines(report: Report) -> list[tuple[str, str]]:
    """Describe what runs in integers, and why the rest does not."""
    own, target = report.audit, report.recipe["target"]
    told = f"{format_count(own.integer, 'node')} in integers, {own.float} in float"
    if not TARGETS[target].on_ort:
        return [("runs", f"as {target} decides; ONNX Runtime's CPU provider would run {told}")]
    lines = [("runs", told)]
    lines += [("float", text) for text in _placed_node_lines(own.placed)]
    return lines + [("float", text) for text in _float_node_lines(own.islands)]


def _format_accuracy(report: Report) -> str:
    checked = report.verify
    if report.recipe.get("data_free"):
        return "not measured: no picture was looked at (`qconv evaluate` measures on some)"
    if not checked.images:
        return "not measured: --stats came without pictures (pass --calib as well)"
    parts = [] if checked.labelled is None else [checked.labelled.in_words]
    left_out = () if checked.labelled is None else (FLOAT_MAP,)  # two kinds of mAP in a line are confusing
    told = [score for score in by_rank(checked.scores) if score.value is not None and score.metric not in left_out]
    parts += [score.in_words(score.metric.sentence) for score in told]
    if not any(score.unit == DECIBEL and score.value is not None for score in checked.scores):
        if checked.equal:
            parts.append("outputs equal")
        elif not parts:
            parts.append("outputs cannot be compared")
    return f"{', '.join(parts)} ({checked.images} {checked.kind_of_images})"


def _format_score(output: OutputScore) -> str:
    measured = [score for score in output.scores if score.value is not None]
    if output.remark and not any(score.unit == DECIBEL for score in measured):
        return f"{output.name}: {output.remark}"
    if all(score.shows_no_difference for score in output.scores):
        return f"{output.name}: equal"
    told = [part.in_words for part in output.parts] or [score.in_words(score.metric.brief) for score in measured]
    return f"{output.name}: {', '.join(told)}"


def _change_lines(report: Report) -> list[str]:
    """Describe changes, one line a kind, with how often it was made."""
    kinds: Counter[str] = Counter()
    for found in report.findings:
        if isinstance(found, Change) and found.step not in OWN_TITLES:
            kinds[found.kind or found.what] += 1
    return [f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.most_common()]


def _first(lines: list[str]) -> list[str]:
    """The first lines, and how many more there are."""
    more = len(lines) - MOST_LINES
    return lines if more <= 1 else [*lines[:MOST_LINES], f"and {more} more kinds, which -v tells"]


def _float_node_lines(islands: tuple[FloatNode, ...]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for island in islands:
        reasons.setdefault(island.why, []).append(island.node)
    return [f"{_join_some(nodes)}: {why}" for why, nodes in reasons.items()]


def _placed_node_lines(placed: tuple[FloatNode, ...]) -> list[str]:
    """Describe the nodes in float by choice: a line for those that are faster, and one for those for accuracy."""
    kinds: dict[str, list[str]] = {}
    for node in placed:
        precise, _, gain = node.why.partition(f"{FOR_ACCURACY}: ")
        kinds.setdefault(gain if not precise else "", []).append(node.node)
    lines = []
    for gain, nodes in kinds.items():
        told = f"{FOR_ACCURACY}: {_join_some(nodes)}: {gain}" if gain else f"faster: {_join_some(nodes)}"
        lines.append(f"{told}, the weights among them are codes all the same")
    return lines


def _precision_lines(found: PrecisionReport | None) -> list[str]:
    """Describe the curve of time and noise, a line a point."""
    if found is None:
        return []
    title = "precision".ljust(TITLE_WIDTH)
    by_time = found.share is None
    cost = "times over that of all integers" if by_time else "reads and writes over those of all in 8 bits"
    lines = [f"{title}divisions, their {cost}; all {found.kind} {found.float_time:.3f}:"]
    for point in found.points:
        measured = "" if point.measured_db is None else f", measured {point.measured_db:.1f}"
        nodes = f"{format_count(point.nodes, 'more node')} {found.kind}"
        told = f"{'time' if by_time else 'traffic'} {point.time:.3f}, {nodes}, {point.corrected_db:.1f} dB"
        own = f" (by noises alone {point.predicted_db:.1f}{measured})"
        lines.append(f"{title}{told}{own}{'; taken' if point.chosen else ''}")
    return lines


def _skipped_lines(report: Report) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for found in report.findings:
        if isinstance(found, Skipped):
            reasons.setdefault(found.why, []).append(found.where)
    return _first([f"{_join_some(places)}: {why}" for why, places in reasons.items()])


def _join_some(names: list[str]) -> str:
    shown = ", ".join(names[:2])
    return shown if len(names) <= 2 else f"{shown} and {len(names) - 2} more"


def _print_details(report: Report, stream: TextIO) -> None:
    for found in report.findings:
        text = f"{found.what}" if isinstance(found, Change) else f"left alone: {found.why}"
        print(printable(f"{found.step:<12}  {found.where}: {text}"), file=stream)
    for line in _precision_lines(report.precision):
        print(line, file=stream)
    for tensor in report.tensors:
        bits = f"{min(tensor.bits)} to {max(tensor.bits)}" if isinstance(tensor.bits, list) else tensor.bits
        text = f"{tensor.kind:<12}  {tensor.name}: {bits} bits, {tensor.granularity}, {_format_range(tensor)}"
        print(printable(text), file=stream)


def _format_range(tensor: Any) -> str:
    scale = tensor.scale
    if isinstance(scale, list):
        return f"scales of shape {len(scale)}"
    return f"scale {scale:.6g}, zero point {tensor.zero_point}"
