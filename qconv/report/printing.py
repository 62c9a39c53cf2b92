"""What the commands that look at models print for people to read, in 80 columns where names are short."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from qconv.analysis.evaluate import Evaluation, MeasuredShare, OutputComparison
from qconv.audit.audit import FileAudit
from qconv.errors import format_count, format_shape
from qconv.metrics.comparison import SIGNIFICANT, Interval, difference_interval
from qconv.results.comparison import Comparison, LayerComparison
from qconv.results.quantize import FloatNode, group_float_nodes
from qconv.runtime.benchmark import Benchmark

COLUMNS = 80
SHOWN = 8
LAYERS = 20
NAMED = 3
HALF = 0.5


def audit(found: FileAudit, *, verbose: bool) -> str:
    """Counts and costs, then every float node with its rule, the dearest first."""
    own = found.audit
    lines = [wrapped(f"{found.name}: {found.format} ({found.meaning})"), ""]
    rows = [("", "nodes", "us a run", "share")]
    total, codes, floats = own.total_us or 0.0, own.spent("integer") or 0.0, own.spent("float") or 0.0
    rows.append(("integers", str(own.integer), f"{codes:.0f}", _share(codes, total)))
    rows.append(("float", str(own.float), f"{floats:.0f}", _share(floats, total)))
    rows.append(("converting", "", f"{total - codes - floats:.0f}", _share(total - codes - floats, total)))
    lines.append(columns(rows, "lrrr"))
    quantized = found.format != "float"  # of a float model it is no news
    for title, islands in (("float islands", own.islands if quantized else ()), ("in float by choice", own.placed)):
        if islands:
            lines += ["", f"{title}:", *_islands(islands, total, verbose=verbose)]
    if verbose:
        layers = sorted(own.layers, key=lambda layer: -(layer.us or 0.0))
        cells = [(f"{layer.us or 0.0:.1f}", layer.runs, layer.op, layer.node) for layer in layers]
        lines += ["", "nodes:", columns([("us", "runs in", "operator", "node"), *cells], "rlll")]
    if own.saturating:
        lines += ["", *_saturation(found)]
    lines += [
        "",
        wrapped(f"{format_count(found.threads, 'thread')}, ONNX Runtime {found.version}, {found.cpu.in_words()}."),
    ]
    return "\n".join(lines)


def _share(us: float | None, total: float) -> str:
    return f"{(us or 0.0) / total:.1%}" if total else ""


def _islands(islands: Sequence[FloatNode], total: float, *, verbose: bool) -> list[str]:
    """Those of one operator and one reason together, the dearest first."""
    ranked = group_float_nodes(islands)
    lines = []
    for group in ranked if verbose else ranked[:SHOWN]:
        first, us = group[0], sum(island.us or 0.0 for island in group)
        names = [island.node for island in group]
        more = "" if verbose or len(names) <= NAMED else f" and {len(names) - NAMED} more"
        where = ", ".join(names if verbose else names[:NAMED]) + more
        lines.append(_hanging(f"{_share(us, total):>6}  {len(group)} {first.op}: {where}"))
        others = "; others alike" if len({island.why for island in group}) > 1 else ""
        lines.append(_hanging(f"        [{first.rule}] {first.why}{others}"))
        if first.remedy is not None:
            lines.append(_hanging(f"        remedy: {first.remedy}"))
    if not verbose and len(ranked) > SHOWN:
        lines.append(f"        and {len(ranked) - SHOWN} more kinds: -v shows all")
    return lines


def _hanging(text: str) -> str:
    return textwrap.fill(
        text, COLUMNS, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )


def _saturation(found: FileAudit) -> list[str]:
    layers = sorted(found.audit.saturating, key=lambda layer: -layer.worst)
    where = "This CPU" if found.cpu.saturates else "A CPU without VNNI (this one has it)"
    if found.cpu.saturates is False and "vnni" not in found.cpu.features:
        where = "An x86 CPU without VNNI"
    what = f"{where} adds pairs of products in 16 bits. {format_count(len(layers), 'layer')} could saturate there:"
    rows = [
        (f"{layer.worst:.2f} x 16 bits", f"{layer.outputs} of {layer.channels} channels", layer.node)
        for layer in layers[:SHOWN]
    ]
    lines = [wrapped(what), columns(rows, "rrl")]
    if len(layers) > SHOWN:
        lines.append(f"  and {len(layers) - SHOWN} more")
    if found.widened:
        lines.append(
            wrapped(
                "qconv has widened weight scales until none did on the calibration pictures; --saturation-safe "
                "rules it out on any picture."
            )
        )
    return lines


def benchmark(found: Benchmark, *, verbose: bool) -> str:
    """A line a model, and what there is to know of the machine."""
    first = found.timings[0]
    rows = [("median ms", "p90 ms", "times the first (10..90 %)", "model")]
    for timing in found.timings:
        low, middle, high = timing.ratio_to(first)
        ratio = "" if timing is first else f"{middle:.3f} ({low:.3f} .. {high:.3f})"
        rows.append((f"{timing.median_ms:.3f}", f"{timing.p90_ms:.3f}", ratio, timing.path))
    if len(rows) == 2:
        rows = [(median, p90, "", path) for median, p90, _, path in rows]
    lines = [columns(rows, "rrll")]
    for other in found.timings[1:]:
        lines.append(f"{other.path}: {_verdict(first.medians, other.medians)}")
    inputs = ", ".join(f"{name} {format_shape(shape)}" for name, shape in first.shapes.items())
    how = f"{format_count(found.threads, 'thread')}, {format_count(found.conditions.rounds, 'round')} in turns, input {inputs}, "
    lines += ["", wrapped(f"{how}ONNX Runtime {found.version}."), wrapped(f"{found.cpu.in_words()}.")]
    if found.cpu.advice():
        lines.append(wrapped(f"Note: {found.cpu.advice()}."))
    if verbose:
        for timing in found.timings:
            medians = " ".join(f"{median:.3f}" for median in timing.medians)
            lines.append(f"{timing.path}, ms a round: {medians}")
    return "\n".join(lines)


def _verdict(first: Sequence[float], other: Sequence[float]) -> str:
    """The ratio in words, and whether the rounds are of one mind about it."""
    faster = sum(its < own for own, its in zip(first, other, strict=True))
    middle = sorted(own / its for own, its in zip(first, other, strict=True))[len(first) // 2]
    words = f"{middle:.2f} times as fast as the first"
    return f"{words}, faster in {faster} of {format_count(len(first), 'round')}"


def evaluation(found: Evaluation, *, verbose: bool) -> str:
    """Accuracy of both models, how near they are, and what of it is chance."""
    lines = [wrapped(f"{found.model}: {format_count(found.images, 'picture')}, labels by {found.labels}")]
    if not found.labels:
        lines = [wrapped(f"{found.model}: {format_count(found.images, 'picture')} without labels")]
    if found.words:
        lines.append(wrapped(found.words))
    rows = [("", "top-1 %", "(95 %)", "top-5 %", "(95 %)")]
    if found.other_top1 is not None:
        rows.append((_short(found.other or ""), *_percent(found.other_top1), *_percent(found.other_top5)))
    if found.top1 is not None:
        rows.append((_short(found.model), *_percent(found.top1), *_percent(found.top5)))
        lines += ["", columns(rows, "lrlrl")]
    if found.flips is not None:
        flips = found.flips
        span = difference_interval(flips.won, flips.lost, flips.count)
        chance = (
            "more than chance"
            if flips.p_value < SIGNIFICANT
            else f"no more than chance on {format_count(flips.count, 'picture')}"
        )
        what = f"difference {100 * flips.difference:+.2f} points {_range(span, 100, '+.2f')}: {flips.won} won, "
        lines.append(wrapped(f"{what}{flips.lost} lost, p = {flips.p_value:.2g} (McNemar), {chance}"))
    if found.outputs:
        lines += [
            "",
            columns(
                [("output", "SQNR dB", "(95 %)", "agreement %", "(95 %)", "cosine"), *map(_output, found.outputs)],
                "lrlrlr",
            ),
        ]
    if verbose:
        lines += [
            "",
            wrapped("Intervals: Wilson for shares, Agresti-Min for the difference, bootstrap over pictures for SQNR."),
        ]
    return "\n".join(lines)


def _output(found: OutputComparison) -> tuple[str, ...]:
    decibel = "equal" if found.sqnr_db is None else f"{found.sqnr_db:.2f}"
    cosine = "" if found.cosine is None else f"{found.cosine:.5f}"
    return found.name, decibel, _range(found.sqnr_interval, 1, ".1f"), *_percent(found.agreement), cosine


def _percent(share: MeasuredShare | None) -> tuple[str, str]:
    return ("-", "") if share is None else (f"{100 * share.value:.2f}", _range(share.interval, 100, ".1f"))


def _range(span: Interval | None, factor: float, how: str) -> str:
    return "" if span is None else f"({span[0] * factor:{how}} .. {span[1] * factor:{how}})"


def comparison(found: Comparison, *, verbose: bool) -> str:
    """The layers, those first that cost most at the outputs."""
    lines = [wrapped(f"{found.model} beside {found.float_model}: {format_count(found.images, 'picture')}")]
    lines += [wrapped(found.words)] if found.words else []
    got, sum_of = (_decibel(value) for value in (found.sqnr_db, found.predicted_db))
    told = f"SQNR of the outputs: {got} dB. The layers' own errors, each by itself and added up: {sum_of} dB, on "
    lines += ["", wrapped(f"{told}{format_count(found.predicted_on, 'picture')}."), ""]
    rows = found.worst_first if verbose else found.worst_first[:LAYERS]
    cells = [
        ("part of", "own", "as it", "", "codes", "beyond", ""),
        ("error", "dB", "runs dB", "cosine", "used", "range", "layer"),
    ]
    lines.append(columns([*cells, *map(_layer, rows)], "rrrrrrl"))
    if len(rows) < len(found.layers):
        lines.append(f"and {len(found.layers) - len(rows)} more: -v shows all")
    most = _most_of(found)
    lines += [""] + ([wrapped(most)] if most else [])
    if found.unmatched:
        names = ", ".join(found.unmatched[:NAMED])
        more = "" if len(found.unmatched) <= NAMED else f" and {len(found.unmatched) - NAMED} more"
        lines.append(wrapped(f"The float model has no tensor for {names}{more}: not compared."))
    return "\n".join(lines).rstrip()


def _layer(row: LayerComparison) -> tuple[str, ...]:
    values = row.values
    used, beyond = ("", "") if values is None else (f"{values.range_use:.0%}", f"{values.clipped:.2%}")
    share, cosine = (
        "" if number is None else f"{number:{how}}" for number, how in ((row.output_share, ".1%"), (row.cosine, ".4f"))
    )
    return share, _decibel(row.added_sqnr_db), _decibel(row.sqnr_db), cosine, used, beyond, _short(row.name)


def _decibel(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"


def _most_of(found: Comparison) -> str:
    """How few layers make half of the error."""
    total = 0.0
    for count, row in enumerate(found.worst_first, 1):
        total += row.output_share or 0.0
        if total >= HALF:
            verb = "makes" if count == 1 else "make"
            return (
                f"{count} of {format_count(len(found.layers), 'layer')} {verb} {total:.0%} of the error at the outputs."
            )
    return ""


def _short(path: str) -> str:
    """The end of a long path."""
    return path if len(path) <= 28 else f"...{path[-25:]}"


def columns(rows: Sequence[Sequence[str]], sides: str, gap: str = "  ") -> str:
    """A table. sides: `l` or `r` for each column."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(sides))]
    kept = [index for index, width in enumerate(widths) if width]
    lines = []
    for row in rows:
        cells = [row[i].ljust(widths[i]) if sides[i] == "l" else row[i].rjust(widths[i]) for i in kept]
        lines.append(gap.join(cells).rstrip())
    return "\n".join(lines)


def wrapped(text: str) -> str:
    """In lines of 80 columns."""
    return textwrap.fill(text, COLUMNS, break_long_words=False, break_on_hyphens=False)
