"""What the commands that look at models print for people to read, in 80 columns where names are short."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from qconv.benchmark import Benchmark
from qconv.errors import counted, shaped

COLUMNS = 80


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
    inputs = ", ".join(f"{name} {shaped(shape)}" for name, shape in first.shapes.items())
    how = f"{counted(found.threads, 'thread')}, {counted(found.conditions.rounds, 'round')} in turns, input {inputs}, "
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
    return f"{words}, faster in {faster} of {counted(len(first), 'round')}"


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
