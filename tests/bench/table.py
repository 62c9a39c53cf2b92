"""The results as text, at most 150 columns wide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLUMNS = (
    *("model", "agree % q|p", "SQNR q|p", "top-1 f|q|p", "p", "int/float ops q|p", "ms f|p|q", "q/p (10-90 %)"),
    *("f/q", "2 threads q/p", "f/q", "size q|p", ""),
)
LEGEND = "f: float, q: qconv, p: the peer (quant_pre_process + quantize_static); column p: McNemar, float against qconv"


def text(results: dict[str, Any]) -> str:
    """The table, what is behind its marks, the peer's failures, costs and refusals."""
    rows = [_row(name, found) for name, found in results["cases"].items()]
    parts = [grid([COLUMNS, *rows]) + f"\n{LEGEND}"]
    parts.append(_section("Missed", _missed(results)))
    parts.append(_section("The peer on the files as they are", _peer_errors(results)))
    if any("reference" in f.get("qconv", {}) or "reference" in f["peer"] for f in results["cases"].values()):
        parts.append("Without graph optimizations\n" + grid(_reference_rows(results)))
    if any(found.get("cost") for found in results["cases"].values()):
        parts.append("Whole commands, median of interleaved rounds\n" + grid(_cost_rows(results)))
    parts.append(_section("Float arithmetic left in qconv's files", _islands(results)))
    for refusal in results.get("refusals", []):
        held = "held" if refusal["held"] else "MISSED"
        parts.append(f"{held}: {refusal['what']}, status {refusal['status']}: {' / '.join(refusal['stderr'])}")
    return "\n\n".join(part for part in parts if part)


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Rows below a heading. A row with fewer cells says something in place of the last ones."""
    whole = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in whole) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * min(150, sum(widths) + 2 * len(widths)), *lines[1:]])


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {line}"[:150] for line in lines)]) if lines else ""


def _row(name: str, found: dict[str, Any]) -> list[str]:
    sides = [found.get("qconv", {}), found.get("peer", {})]
    scores = [side.get("accuracy", {}) for side in sides]
    times, two = found.get("latency", {}), found.get("latency of 2 threads", {})
    ms = times.get("median_ms", {})
    return [
        name,
        _pair(*(_number(s.get("agreement"), 100, ".1f") for s in scores)),
        _pair(*(_number(s.get("sqnr_db"), 1, ".1f", "same" if s else "-") for s in scores)),
        _top1(scores),
        _number((scores[0].get("flips") or {}).get("p_value"), 1, ".2f"),
        _pair(*(_counts(side.get("coverage")) for side in sides)),
        _pair(*(_number(ms.get(key), 1, "#.3g") for key in ("float", "peer", "qconv"))) if ms else "-",
        _spread(times.get("qconv/peer")),
        _number((times.get("float/qconv") or [None, None])[1], 1, ".2f"),
        _number((two.get("qconv/peer") or [None, None])[1], 1, ".2f"),
        _number((two.get("float/qconv") or [None, None])[1], 1, ".2f"),
        _pair(*(_number(side.get("size_ratio"), 1, ".3f") for side in sides)),
        _verdict(found.get("marks")),
    ]


def _pair(*cells: str) -> str:
    return "|".join(cells)


def _number(value: float | None, factor: float, how: str, none: str = "-") -> str:
    return none if value is None else format(value * factor, how)


def _top1(scores: list[dict[str, Any]]) -> str:
    known = [s["top1"] for s in scores if s.get("top1")]
    if not known:
        return "-"
    quantized = ((s.get("top1") or {}).get("quantized") for s in scores)
    return _pair(f"{known[0]['float']:.2f}", *(_number(q, 1, ".2f") for q in quantized))


def _counts(coverage: dict[str, Any] | None) -> str:
    if coverage is None:
        return "-"
    return f"{sum(coverage['integer'].values())}/{sum(coverage['float'].values())}"


def _spread(ratio: list[float] | None) -> str:
    return "-" if ratio is None else f"{ratio[1]:.2f} ({ratio[0]:.2f}-{ratio[2]:.2f})"


def _verdict(marks: list[dict[str, Any]] | None) -> str:
    if marks is None:
        return ""
    return "held" if all(mark["held"] for mark in marks) else "MISSED"


def _missed(results: dict[str, Any]) -> list[str]:
    lines = []
    for name, found in results["cases"].items():
        for mark in found.get("marks", []):
            if not mark["held"]:
                got, want = (f"{v:.4f}" if isinstance(v, float) else str(v) for v in (mark["got"], mark["want"]))
                lines.append(f"{name}: {mark['what']}: {got}, wanted {want}")
        own = found.get("qconv", {})
        if own.get("status"):
            lines.extend(f"    {line}" for line in own["stderr"])
    return lines


def _peer_errors(results: dict[str, Any]) -> list[str]:
    lines = []
    for name, found in results["cases"].items():
        peer = found.get("peer", {})
        if peer.get("error"):
            instead = f"given {peer['input']} ({peer['how']})" if peer["input"] else "nothing worked"
            lines.append(f"{name}: {instead}; {peer['error']}")
            lines.extend(f"    {failure}" for failure in peer["failed"])
        if peer.get("shipped_error"):
            lines.append(f"{name} as shipped: {peer['shipped_error']}")
    return lines


def _reference_rows(results: dict[str, Any]) -> list[list[str]]:
    rows = [["model", "agree % q|p", "SQNR dB q|p", "top-1 f|q|p"]]
    for name, found in results["cases"].items():
        scores = [side.get("reference", {}) for side in (found.get("qconv", {}), found.get("peer", {}))]
        agreement = _pair(*(_number(s.get("agreement"), 100, ".2f") for s in scores))
        sqnr = _pair(*(_number(s.get("sqnr_db"), 1, ".2f", "same" if s else "-") for s in scores))
        rows.append([name, agreement, sqnr, _top1(scores)])
    return rows


def _cost_rows(results: dict[str, Any]) -> list[list[str]]:
    rows = [["model", "pictures", "s q|bare|p", "most", "", "MB q|bare|p", "most", ""]]
    for name, found in results["cases"].items():
        for count, costs in found.get("cost", {}).items():
            sides = [costs[key] or {} for key in ("qconv", "bare", "peer")]
            row = [name, count]
            for key, limit in (("seconds", "time"), ("rss_mb", "memory")):
                row.append(_pair(*(_number(s.get(key), 1, ".2f" if key == "seconds" else ".0f") for s in sides)))
                held = costs.get(limit)
                row.append(f"{held['most']:.2f}" if held else "-")
                row.append("-" if not held else "held" if held["held"] else "MISSED")
            rows.append(row)
    return rows


def _islands(results: dict[str, Any]) -> list[str]:
    lines = []
    for name, found in results["cases"].items():
        for title, part in ((name, found.get("qconv", {})), (f"{name} as shipped", found.get("shipped", {}))):
            left = part.get("coverage", {}).get("float", {})
            if left:
                lines.append(f"{title}: " + ", ".join(f"{count} {op}" for op, count in sorted(left.items())))
    return lines
