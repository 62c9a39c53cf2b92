"""What bits.py found, as Markdown: one row a run, then what others have published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.bench.cases import BY_NAME
from tests.bench.published import PUBLISHED, Published, beside
from tests.bench.variants import CEILING, GRANULARITIES, NAMES, PEERS, SETTINGS, VARIANTS, Peer, Variant

COLUMNS = (
    *("model", "weights", "setting", "variant", "agreement %", "SQNR dB", "top-1 % (float)", "drop", "p"),
    *("size", "seconds", "solving", "MB", "pictures", "published drop"),
)
LEGEND = (
    "Drop: points of top-1 against the float model, p by McNemar's paired test. Size: share of the float file's. "
    "Seconds and MB: of the whole command; solving: of these the seconds of equalizing and rounding. Pictures: to "
    "calibrate / to score. A32: activations in float. In []: without graph optimizations, as the standard defines the "
    "file. Published: the range of the drops below on ImageNet; beside resnet20 those of ResNet-18 and -50. "
    f"{CEILING}: weights as good as float, so what is lost is lost by activations."
)

Row = dict[str, Any]


def text(found: dict[str, Any]) -> str:
    rows = sorted(found["rows"], key=_place)
    notes = [*_ways(rows), *(f"{name} is skipped: {why}" for name, why in found.get("skipped", {}).items())]
    notes += [f"{' '.join(_place_names(row))} failed: {row['error']}" for row in rows if row["error"]]
    parts = [_markdown([COLUMNS, *map(_cells, rows)]), LEGEND, "\n".join(f"- {note}" for note in notes)]
    parts += [_published(rows), _origin(found, rows)]
    return "\n\n".join(part for part in parts if part)


def line(row: Row) -> str:
    """One row for a terminal, while the others are still measured."""
    names = " ".join(f"{name:18}" for name in _place_names(row))
    if row["error"]:
        return f"{names} {row['error']}"
    top1 = row["top1"]
    right = f"top-1 {top1['quantized']:.2f} of {top1['float']:.2f}  " if top1 else ""
    return (
        f"{names} {_number(row['agreement'], '.1f', 100)} % {_number(row['sqnr_db'], '.1f')} dB "
        f"{right}{row['seconds']:.1f} s {row['peak_rss_mb']:.0f} MB, scored in {row['scored_in']:.1f} s"
    )


def _place_names(row: Row) -> tuple[str, ...]:
    return row["model"], row["granularity"], row["setting"], row["variant"]


def _place(row: Row) -> tuple[Any, ...]:
    """In declared order; what is not declared comes last, by name."""
    model, granularity, bits, variant = _place_names(row)
    return (
        *_rank(model, list(BY_NAME)),
        *_rank(granularity, GRANULARITIES),
        *_rank(bits, [str(each) for each in SETTINGS]),
        *_rank(variant.split()[0], NAMES),
        variant,
        row["pictures"],
    )


def _rank(name: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)


def _cells(row: Row) -> list[str]:
    names = list(_place_names(row))
    entries = beside(row["model"], row["setting"], row["granularity"])
    last = [f"{row['pictures']} / {row['tests']}", drops(entries)]
    if row["error"]:
        return [*names, "failed", *["-"] * 8, *last]
    top1 = row["top1"]
    return [
        *names,
        _number(row["agreement"], ".1f", 100) + _in_brackets(row, "agreement", 100),
        _number(row["sqnr_db"], ".1f", none="same") + _in_brackets(row, "sqnr_db", 1),
        *((f"{top1['quantized']:.2f} ({top1['float']:.2f})", f"{drop(row):+.2f}") if top1 else ("-", "-")),
        f"{row['flips']['p_value']:.2g}" if top1 else "-",
        f"{row['ratio']:.3f}",
        f"{row['seconds']:.1f}",
        _number(row.get("solve_seconds"), ".1f"),
        _number(row["peak_rss_mb"], ".0f"),
        *last,
    ]


def _in_brackets(row: Row, key: str, factor: float) -> str:
    """The same without graph optimizations, where that was measured."""
    plain = row.get("reference")
    return f" [{_number(plain[key], '.1f', factor, none='same')}]" if plain else ""


def drop(row: Row) -> float:
    return float(row["top1"]["quantized"] - row["top1"]["float"])


def drops(entries: Sequence[Published]) -> str:
    """'-0.8 .. -0.1 (8)', or the one drop with its method."""
    known = sorted((entry.drop, entry.method) for entry in entries if entry.drop is not None)
    if not known:
        return "-"
    if len(known) == 1:
        return f"{known[0][0]:+.2f} {known[0][1]}"
    return f"{known[0][0]:+.2f} .. {known[-1][0]:+.2f} ({len(known)})"


def _ways(rows: Sequence[Row]) -> list[str]:
    shown = {row["variant"].split()[0] for row in rows}
    return [f"{way.name}: {way.what}{_how(way)}" for way in (*VARIANTS, *PEERS) if way.name in shown]


def _how(way: Variant | Peer) -> str:
    if isinstance(way, Peer):
        return f", {way.most} pictures of 224x224: it keeps all tensors of all pictures" if way.most else ""
    options = [
        f"`{' '.join(words)}`{when}" for words, when in ((way.options, ""), (way.pinned, " where known")) if words
    ]
    return f" ({', '.join(options)})" if options else ""


def _published(rows: Sequence[Row]) -> str:
    """Those of the settings that were measured, with qconv's drops beside."""
    lines = [("setting", "weights", "network", "source", "method", "top-1 % (float)", "drop", "ours")]
    own = {way.name for way in VARIANTS}
    good = [row for row in rows if row.get("top1") and row["variant"].split()[0] in own]
    for entry in PUBLISHED:
        ours = [row for row in good if entry in beside(row["model"], row["setting"], row["granularity"])]
        if not ours:
            continue
        before = "-" if entry.before is None else f"{entry.before:.2f}"
        lines.append(
            (
                *(entry.setting, entry.granularity, entry.network, entry.source, entry.method),
                *(f"{entry.quantized:.2f} ({before})", "-" if entry.drop is None else f"{entry.drop:+.2f}"),
                f"{ours[0]['model']}: " + ", ".join(f"{row['variant']} {drop(row):+.2f}" for row in ours),
            )
        )
    return "Published, on ImageNet:\n\n" + _markdown(lines) if len(lines) > 1 else ""


def _origin(found: dict[str, Any], rows: Sequence[Row]) -> str:
    known = found.get("environment", {})
    commits = dict.fromkeys(row["commit"] for row in rows if row.get("commit"))
    words = [f"{name} {value}" if name not in ("cpu", "nncf") else value for name, value in known.items()]
    return "; ".join([*words, *([f"qconv at {', '.join(commits)}"] if commits else [])])


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(lines[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(cells, widths, strict=True)] for cells in lines]
    rule = "|".join("-" * (width + 2) for width in widths)
    written = [f"| {' | '.join(cells)} |" for cells in padded]
    return "\n".join([written[0], f"|{rule}|", *written[1:]])


def _number(value: float | None, how: str, factor: float = 1, none: str = "-") -> str:
    return none if value is None else format(value * factor, how)
