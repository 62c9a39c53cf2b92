"""This module formats results of the other commands as text in 80 columns: audit, benchmark, evaluation, trials."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from rich.cells import cell_len

from qconv.errors import format_count, format_shape, format_some
from qconv.metrics.similarity import SIGNIFICANT, difference_interval
from qconv.results.quantize import FloatNode, group_float_nodes
from qconv.results.scores import (
    BOXES,
    DECIBEL,
    FLOAT_MIOU,
    PART_SQNR,
    SHARE,
    SQNR,
    Interval,
    Metric,
    Score,
    find_score,
    metrics_of,
    shown_metrics,
    value_of,
)
from qconv.results.trials import Trial, find_ranking, list_trial_metrics

if TYPE_CHECKING:  # these bring most of the program
    from qconv.analysis.evaluation import Evaluation
    from qconv.auditing.audit import FileAudit
    from qconv.results.comparison import Cause, Diagnosis, Sweep
    from qconv.runtime.benchmark import Benchmark

COLUMNS = 80

MOST_GROUPS = 8

MOST_NAMED = 3


def format_audit(found: FileAudit, *, verbose: bool) -> str:
    """Format an audit: counts and costs, then every float node with its rule, the dearest first."""
    own = found.audit
    lines = [wrap_text(f"{found.name}: {found.format} ({found.meaning})"), ""]
    rows = [("", "nodes", "us a run", "share")]
    total, codes, floats = own.total_us or 0.0, own.spent("integer") or 0.0, own.spent("float") or 0.0
    rows.append(("integers", str(own.integer), f"{codes:.0f}", _format_time_share(codes, total)))
    rows.append(("float", str(own.float), f"{floats:.0f}", _format_time_share(floats, total)))
    rows.append(("converting", "", f"{total - codes - floats:.0f}", _format_time_share(total - codes - floats, total)))
    lines.append(format_columns(rows, "lrrr"))
    quantized = found.format != "float"  # of a float model it is no news
    kinds = (("float islands", own.islands if quantized else ()), ("in float by choice", own.placed))
    for title, islands in (*kinds, ("slow in integers", own.slow), ("on codes", own.on_codes)):
        if islands:
            lines += ["", f"{title}:", *_format_float_nodes(islands, total, verbose=verbose)]
    if verbose:
        layers = sorted(own.layers, key=lambda layer: -(layer.us or 0.0))
        cells = [(f"{layer.us or 0.0:.1f}", layer.runs, layer.op, layer.node) for layer in layers]
        lines += ["", "nodes:", format_columns([("us", "runs in", "operator", "node"), *cells], "rlll")]
    if own.saturating:
        lines += ["", *_format_saturation(found)]
    where = f"{format_count(found.threads, 'thread')}, ONNX Runtime {found.version}, {found.cpu.in_words()}."
    lines += ["", wrap_text(where)]
    return "\n".join(lines)


def _format_time_share(us: float | None, total: float) -> str:
    return f"{(us or 0.0) / total:.1%}" if total else ""


def _format_float_nodes(islands: Sequence[FloatNode], total: float, *, verbose: bool) -> list[str]:
    """List float nodes, those of one operator and one reason together, the dearest first."""
    ranked = group_float_nodes(islands)
    lines = []
    for group in ranked if verbose else ranked[:MOST_GROUPS]:
        first, us = group[0], sum(island.us or 0.0 for island in group)
        names = [island.node for island in group]
        where = format_some(names, len(names) if verbose else MOST_NAMED)
        lines.append(wrap_text(f"{_format_time_share(us, total):>6}  {len(group)} {first.op}: {where}", 8))
        others = "; others alike" if len({island.why for island in group}) > 1 else ""
        lines.append(wrap_text(f"        [{first.rule}] {first.why}{others}", 8))
        if first.remedy is not None:
            lines.append(wrap_text(f"        remedy: {first.remedy}", 8))
    if not verbose and len(ranked) > MOST_GROUPS:
        lines.append(f"        and {len(ranked) - MOST_GROUPS} more kinds: -v shows all")
    return lines


def _format_saturation(found: FileAudit) -> list[str]:
    layers = sorted(found.audit.saturating, key=lambda layer: -layer.worst)
    where = "This CPU" if found.cpu.saturates else "A CPU without VNNI (this one has it)"
    if found.cpu.saturates is False and "vnni" not in found.cpu.features:
        where = "An x86 CPU without VNNI"
    what = f"{where} adds pairs of products in 16 bits. {format_count(len(layers), 'layer')} could saturate there:"
    rows = [
        (f"{layer.worst:.2f} x 16 bits", f"{layer.outputs} of {layer.channels} channels", layer.node)
        for layer in layers[:MOST_GROUPS]
    ]
    lines = [wrap_text(what), format_columns(rows, "rrl")]
    if len(layers) > MOST_GROUPS:
        lines.append(f"  and {len(layers) - MOST_GROUPS} more")
    if found.widened:
        lines.append(
            wrap_text(
                "qconv has widened weight scales until none did on the calibration pictures; --saturation-safe "
                "rules it out on any picture."
            )
        )
    return lines


def format_benchmark(found: Benchmark, *, verbose: bool) -> str:
    """Format a benchmark: a line a model, and the machine."""
    first = found.timings[0]
    rows = [("median ms", "p90 ms", "times the first (10..90 %)", "model")]
    for timing in found.timings:
        low, middle, high = timing.ratio_to(first)
        ratio = "" if timing is first else f"{middle:.3f} ({low:.3f} .. {high:.3f})"
        rows.append((f"{timing.median_ms:.3f}", f"{timing.p90_ms:.3f}", ratio, timing.path))
    if len(rows) == 2:
        rows = [(median, p90, "", path) for median, p90, _, path in rows]
    lines = [format_columns(rows, "rrll")]
    for other in found.timings[1:]:
        lines.append(f"{other.path}: {_compare_times(first.medians, other.medians)}")
    inputs = ", ".join(f"{name} {format_shape(shape)}" for name, shape in first.shapes.items())
    how = (
        f"{format_count(found.threads, 'thread')}, {format_count(found.conditions.rounds, 'round')} in "
        f"turns, input {inputs}, "
    )
    lines += ["", wrap_text(f"{how}ONNX Runtime {found.version}."), wrap_text(f"{found.cpu.in_words()}.")]
    if found.cpu.advice():
        lines.append(wrap_text(f"Note: {found.cpu.advice()}."))
    if verbose:
        for timing in found.timings:
            medians = " ".join(f"{median:.3f}" for median in timing.medians)
            lines.append(f"{timing.path}, ms a round: {medians}")
    return "\n".join(lines)


def _compare_times(first: Sequence[float], other: Sequence[float]) -> str:
    """Describe the ratio of times, and in how many rounds it was faster."""
    faster = sum(its < own for own, its in zip(first, other, strict=True))
    middle = sorted(own / its for own, its in zip(first, other, strict=True))[len(first) // 2]
    words = f"{middle:.2f} times as fast as the first"
    return f"{words}, faster in {faster} of {format_count(len(first), 'round')}"


def format_evaluation(found: Evaluation, *, verbose: bool) -> str:
    """Format an evaluation: accuracy of both models, how near they are, and whether a difference is chance."""
    lines = [wrap_text(f"{found.model}: {format_count(found.images, 'picture')}, labels by {found.labels}")]
    if not found.labels:
        lines = [wrap_text(f"{found.model}: {format_count(found.images, 'picture')} without labels")]
    if found.words:
        lines.append(wrap_text(found.words))
    lines += [wrap_text(fact.in_words) for fact in found.holds]
    metrics = metrics_of([found.labelled, found.other_labelled])
    rows = [("", *_score_heads(metrics))]
    for model, scores in ((found.other, found.other_labelled), (found.model, found.labelled)):
        if scores:
            rows.append((shorten_path(model or ""), *_score_cells(metrics, scores)))
    if len(rows) > 1:
        lines += ["", format_columns(rows, "l" + "rl" * len(metrics))]
    if found.flips is not None:
        flips = found.flips
        span = difference_interval(flips.won, flips.lost, flips.count)
        chance = (
            "more than chance"
            if flips.p_value < SIGNIFICANT
            else f"no more than chance on {format_count(flips.count, 'picture')}"
        )
        what = (
            f"difference {100 * flips.difference:+.2f} points {_format_interval(span, 100, '+.2f')}: {flips.won} won, "
        )
        lines.append(wrap_text(f"{what}{flips.lost} lost, p = {flips.p_value:.2g} (McNemar), {chance}"))
    lines += [wrap_text(describe_difference(score)) for score in found.differences if score.value is not None]
    if found.compared:
        metrics = shown_metrics(output.scores for output in found.compared)
        rows = [("output", *_score_heads(metrics))]
        rows += [(output.name, *_score_cells(metrics, output.scores)) for output in found.outputs]
        rows += [(f"boxes of {head.name}", *_score_cells(metrics, head.scores)) for head in found.heads]
        lines += ["", format_columns(rows, "l" + "rl" * len(metrics))]
    if found.gates:
        lines += ["", *(wrap_text(f"gate {gate.in_words}") for gate in found.gates)]
    if verbose:
        lines += [
            "",
            wrap_text(
                "Intervals: Wilson for shares of pictures, Agresti-Min for the difference of two, and for all else the "
                "bootstrap over pictures, which draws the same ones for both models."
            ),
        ]
    return "\n".join(lines)


def describe_difference(score: Score) -> str:
    """By how much a measure by labels is above the other model's, and whether that is chance."""
    span = score.interval
    chance = ""
    if span is not None:
        chance = ", no more than chance" if span[0] <= 0 <= span[1] else ", more than chance"
    points = f"{100 * (score.value or 0.0):+.2f} points {_format_interval(span, 100, '+.2f')}".rstrip()
    return f"difference of {score.metric.label} {points}{chance}"


def _score_heads(metrics: Sequence[Metric]) -> list[str]:
    """The head of each metric's column, and of its interval's."""
    return [head for metric in metrics for head in (metric.heading, "(95 %)" if metric.has_interval else "")]


def _score_cells(metrics: Sequence[Metric], scores: Sequence[Score]) -> list[str]:
    """The value of each metric, and its interval."""
    found = []
    for metric in metrics:
        score = find_score(scores, metric)
        if score is None:
            found += ["-", ""]
        elif score.value is None:
            found += ["equal" if metric.equal is None else "", ""]
        else:
            found += [metric.number(score.value, 2), _format_interval(score.interval, metric.factor, ".1f")]
    return found


def _format_interval(span: Interval | None, factor: float, how: str) -> str:
    return "" if span is None else f"({span[0] * factor:{how}} .. {span[1] * factor:{how}})"


def shorten_path(path: str) -> str:
    """Return the end of a long path."""
    return path if len(path) <= 28 else f"...{path[-25:]}"


def format_columns(rows: Sequence[Sequence[str]], sides: str) -> str:
    """Lay out a table without lines, two blanks between columns, as wide as its cells: in a pipe as on a terminal.

    Args:
        rows: Cells, the header's first. A column without any text is left out.
        sides: `l` or `r` for each column, where its cells are flush.
    """
    kept = [index for index in range(len(sides)) if any(row[index] for row in rows)]
    cells = [[row[index].expandtabs() for index in kept] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        blanks = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        flush = zip(row, blanks, kept, strict=True)
        told = (blank + cell if sides[index] == "r" else cell + blank for cell, blank, index in flush)
        lines.append("  ".join(told).rstrip())
    return "\n".join(lines)


def wrap_text(text: str, indent: int = 0) -> str:
    """Wrap text at 80 columns, all lines but the first indented. Words are never broken: they may be paths."""
    return textwrap.fill(text, COLUMNS, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


MOST_CAUSE_NODES = 2

LEAST_ERROR_SHARE = 0.01

INDENT = "  "

MOST_OF_A_HEAD, SPLIT_AT = 7, 5
"""Letters of a word above a column of trials, and of its first part where it has more."""


def format_diagnosis(found: Diagnosis, *, verbose: bool) -> str:
    """Format a diagnosis: causes, trials, and the command to type."""
    lines = [wrap_text(f"{found.model}: {_describe_scoring(found)}"), ""]
    open_ones = [cause for cause in found.causes if not (cause.handled or cause.harmless)]
    handled = [cause for cause in found.causes if cause.handled]
    harmless = [cause for cause in found.causes if cause.harmless]
    groups = (("causes:", open_ones), ("taken care of already:", handled), ("also seen:", harmless))
    for title, causes in groups:
        if causes:
            lines += [title, *(line for cause in causes for line in _format_cause(cause, verbose=verbose)), ""]
    if not open_ones:
        lines += ["causes: none that nothing takes care of", ""]
    lines.append(format_trials(found.trials, found.float_ms, found.trials[0]))
    lines += ["", wrap_text(found.conclusion), "", "recommended:", _format_command(found.recommended)]
    return "\n".join(lines)


def format_sweep(found: Sweep, *, verbose: bool) -> str:
    """Format a sweep: the recipes with what each costs; those that no other one dominates are marked."""
    lines = [wrap_text(f"{found.model}: {_describe_scoring(found)}"), ""]
    marks = ["*" if best else "" for best in found.best]
    lines.append(format_trials(found.trials, found.float_ms, None, marks))
    lines += [
        "",
        wrap_text("* no other recipe is as good in accuracy, size and time, and better in one of them."),
    ]
    written = [out for trial, out in zip(found.trials, found.outputs, strict=True) if not trial.failed]
    lines += ["", *(written if verbose else [_describe_written(written)])]
    return "\n".join(lines)


def _describe_written(written: Sequence[str]) -> str:
    more = f" and {len(written) - 1} more beside it" if len(written) > 1 else ""
    return f"written: {written[0]}{more}"


def _describe_scoring(found: Diagnosis | Sweep) -> str:
    trials, on = found.trials, format_count(found.pictures, "picture")
    if found.pictures < found.given:
        on = f"{found.pictures} of {found.given} pictures (more of them, with outputs, do not fit into memory)"
    how = "none of them calibrated with" if found.unseen else "calibrated with, too"
    ranking, labelled = find_ranking(trials), next((t.labelled for t in trials if t.labelled is not None), None)
    if ranking is None:
        return f"scored on {on}, {how}"
    before = None if labelled is None else labelled.float_scores[0].value
    own = "" if before is None else f", of which the float model has {ranking.format(before, 2)}"
    ties = ", and of equal ones by SQNR" if any(trial.sqnr_db is not None for trial in trials) else ""
    ranked = f"ranked by {describe_metric(ranking)}{own}{ties}"
    return f"scored on {on}, {how}; {ranked}"


def describe_metric(metric: Metric) -> str:
    """What a task is judged by, in words."""
    words = {BOXES: "the share of the float model's boxes that is found", FLOAT_MIOU: "mIoU with the float model's map"}
    return words.get(metric, f"{metric.label} by labels" if metric.by_labels else metric.label)


def _format_cause(cause: Cause, *, verbose: bool) -> Iterator[str]:
    share = "" if cause.share is None else f", {_format_error_share(cause.share)} of the error at the outputs"
    yield wrap_text(f"{INDENT}{cause.kind}{share}", 4)
    yield wrap_text(f"    {cause.what}", 4)
    names = cause.where if verbose else cause.where[:MOST_CAUSE_NODES]
    more = "" if len(names) == len(cause.where) else f" and {len(cause.where) - len(names)} more"
    yield wrap_text(f"    where: {', '.join(names)}{more}", 6)
    if cause.handled:
        yield wrap_text(f"    {cause.handled}", 4)


def _format_error_share(share: float) -> str:
    return "under 1%" if share < LEAST_ERROR_SHARE else f"{share:.0%}"


def format_trials(
    trials: Sequence[Trial], float_ms: float | None, first: Trial | None, marks: Sequence[str] | None = None
) -> str:
    """Lay out a table of trials, a row each.

    Args:
        trials: The trials; failed ones are listed below.
        float_ms: Time of the float model; None for no column of times.
        first: The trial that gains are counted from; None for no such column.
        marks: In front of each row.
    """
    timed = float_ms is not None
    columns = _score_columns(trials, first)
    tops = [*(top for top, _, _ in columns), ("size", "kB"), ("time of", "float's") if timed else ("", "")]
    head = [("", *(top[line] for top in tops), ("", "recipe")[line]) for line in (0, 1)]
    rows = []
    failures = []
    for trial, mark in zip(trials, marks or [""] * len(trials), strict=True):
        if trial.failed:
            failures.append(wrap_text(f"{trial.name} failed: {trial.failed}", 2))
            continue
        ratio = "" if trial.ratio is None or not timed else f"{trial.ratio[1]:.2f}"
        cells = [cell(trial) for _, _, cell in columns]
        rows.append((mark, *cells, f"{trial.size / 1e3:.0f}", ratio, trial.name))
    sides = "".join(side for _, side, _ in columns)
    lines = [format_columns([*head, *rows], f"r{sides}rrl")]
    told = [wrap_text(f"{trial.name}: {trial.typed}", 2) for trial in trials if trial.options]
    if told and first is not None:
        lines += ["", "options:", *told]
    return "\n".join([*lines, *failures])


_Column = tuple[tuple[str, str], str, Callable[[Trial], str]]
"""Two lines of a head, `l` or `r`, and the cell of a trial."""


def _score_columns(trials: Sequence[Trial], first: Trial | None) -> list[_Column]:
    """Values of each metric; behind decibels the gain over `first`, and behind shares their interval."""
    found: list[_Column] = []
    metrics = list_trial_metrics(trials)
    if PART_SQNR in metrics:  # which breaks ties; what mixes all parts tells less
        metrics = tuple(metric for metric in metrics if metric != SQNR)
    last = [metric for metric in metrics if metric.unit == DECIBEL][-1:]  # of parts, where there are some
    for metric in metrics:
        found.append((_split_head(metric), "r", partial(format_trial_value, metric)))
        if metric in last and first is not None:
            found.append((("gain", DECIBEL), "r", partial(format_trial_gain, metric, first)))
        if any(_format_trial_interval(metric, trial) for trial in trials):
            found.append((("", "(95 %)"), "l", partial(_format_trial_interval, metric)))
    return found


def _split_head(metric: Metric) -> tuple[str, str]:
    """A label in two lines: its unit in the second, and of a long word what does not go into the first."""
    if len(metric.label) <= MOST_OF_A_HEAD:
        return metric.label, metric.sign
    return f"{metric.label[:SPLIT_AT]}-", f"{metric.label[SPLIT_AT:]} {metric.sign}".rstrip()


def format_trial_value(metric: Metric, trial: Trial) -> str:
    """A value without its unit, and a word where nothing differs."""
    value = value_of(trial.scores, metric)
    if value is None:
        return "equal" if metric.equal is None and trial.equal else ""
    return metric.number(value)


def _format_trial_interval(metric: Metric, trial: Trial) -> str:
    score = find_score(trial.scores, metric)
    span = None if score is None or metric.unit != SHARE else score.interval
    return "" if span is None else f"({100 * span[0]:.0f}..{100 * span[1]:.0f})"


def format_trial_gain(metric: Metric, first: Trial, trial: Trial) -> str:
    """By how much a value is above that of the first trial; empty for that one."""
    before, after = value_of(first.scores, metric), value_of(trial.scores, metric)
    if first is trial or before is None or after is None:
        return ""
    return f"{round(after - before, 1) + 0.0:+.1f}"  # no -0.0


def _format_command(text: str) -> str:
    """Wrap a command to be pasted: words stay whole, and lines but the last end in a backslash."""
    lines = [""]
    for word in map(shlex.quote, shlex.split(text)):
        if lines[-1] and len(lines[-1]) + len(word) > COLUMNS - 3:
            lines.append(" " * 4)
        lines[-1] += f" {word}" if lines[-1].strip() else word
    return " \\\n".join(lines)
