"""What `inspect` prints for people to read, in 80 columns: a summary, what is remarkable, and the layers."""

from __future__ import annotations

import shlex
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from qconv.analysis.inspect_float import FloatLayerRow, FloatModel, FloatOperatorGroup, TensorSignature
from qconv.analysis.inspect_quantized import QuantizedLayerRow, QuantizedModel
from qconv.analysis.weight_checks import WeightProblem
from qconv.config.serialization import format_number
from qconv.errors import Skipped, format_count, format_shape
from qconv.ir.stored_weights import TensorFormat
from qconv.report.printing import COLUMNS, columns, wrapped

MOST_ROWS = 20
MOST_GROUPS = 8
WORST = 3
TITLE = 12
LEAST_NAME = 12


# -- a float model -----------------------------------------------------------------------------------------------------


def float_model(found: FloatModel, *, verbose: bool) -> str:
    """What it is, what a default run does, what its weights foretell, its layers."""
    lines = [wrapped(f"{found.name}: float, {_bytes(found.bytes)}, opset {found.opset}{_by(found.producer)}"), ""]
    lines += _ends(found.inputs, found.outputs)
    lines.append(_titled("operators", _counts(found.operators, verbose=verbose)))
    where = "" if found.stored >= found.parameters else "; the file computes them"
    lines.append(_titled("parameters", f"{found.parameters:,} in {_bytes(found.stored)}{where}"))
    if found.norms:
        what = f"{found.folded} of {found.norms} fold into the layers beside them"
        if found.converted:
            what += f", {found.converted} become depthwise layers"
        stay = found.norms - found.folded - found.converted
        lines.append(_titled("batch norms", f"{what}, {stay} stay" if stay else what))
    if found.relu6:
        what = f"{found.relu6} Clip between 0 and 6: ranges are fixed there, and channels cannot be scaled past 6"
        lines.append(_titled("ReLU6", what))
    lines += _skipped(found.refused, verbose=verbose)
    lines += ["", *_default_run(found, verbose=verbose)]
    if found.troubles:
        lines += ["", "foretold by the weights:", *_troubles(found.troubles, verbose=verbose)]
    elif found.layers:
        lines += ["", "foretold by the weights: no trouble"]
    if found.layers:
        cells = [_float_cells(row) for row in found.layers]
        shares = [row.share for row in found.layers]
        header = ("layer", "op", "weights", "share", "bits", "foretold")
        lines += ["", *_table(header, "lllrlr", cells, shares, verbose)]
    return "\n".join(lines)


def _default_run(found: FloatModel, *, verbose: bool) -> list[str]:
    if not found.layers:
        return [wrapped("A default run has nothing to quantize: no layer has constant weights.")]
    floats = sum(len(left.nodes) for left in found.left)
    absorbed = f" ({format_count(found.absorbed, 'activation')} absorbed)" if found.absorbed else ""
    what = (
        f"A default run for {found.target} puts {format_count(found.integer, 'operator')} into integers{absorbed} and "
    )
    lines = [wrapped(f"{what}leaves {floats or 'none'} in float{':' if floats else '.'}")]
    shown = found.left if verbose else found.left[:MOST_GROUPS]
    lines += [_left(left, verbose=verbose) for left in shown]
    if any(end.shape is not None and None in end.shape[2:] for end in found.inputs):
        lines.append(wrapped("Its input size is open: where it is known, more may stay float because that is faster."))
    if len(shown) < len(found.left):
        lines.append(f"  and {len(found.left) - len(shown)} more reasons: -v shows all")
    return lines


def _left(left: FloatOperatorGroup, *, verbose: bool) -> str:
    return _hanging(f"  {len(left.nodes)} {left.op}: {left.why} ({_some(left.nodes, verbose=verbose)})", 4)


def _skipped(refused: Sequence[Skipped], *, verbose: bool) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for skipped in refused:
        reasons.setdefault(skipped.why, []).append(skipped.where)
    shown = list(reasons.items()) if verbose else list(reasons.items())[:WORST]
    lines = [_titled("not folded", f"{_some(names, verbose=verbose)}: {why}") for why, names in shown]
    if len(shown) < len(reasons):
        lines.append(_titled("", f"and {len(reasons) - len(shown)} more reasons: -v shows all"))
    return lines


def _troubles(troubles: Sequence[WeightProblem], *, verbose: bool) -> list[str]:
    """Kind by kind, those that nothing takes care of first; of each the worst layers."""
    groups: dict[tuple[str, str], list[WeightProblem]] = {}
    for trouble in troubles:
        groups.setdefault((trouble.kind, trouble.handled), []).append(trouble)
    lines = []
    for (kind, handled), group in sorted(groups.items(), key=lambda item: bool(item[0][1])):
        care = f"; {handled}" if handled else ""
        lines.append(_hanging(f"  {kind} in {format_count(len(group), 'layer')}{care}", 4))
        ranked = sorted(group, key=lambda trouble: -(trouble.value or 0.0))
        for trouble in ranked if verbose else ranked[: 1 if handled else WORST]:
            channels = ", ".join(map(str, trouble.channels))
            more = ", ..." if trouble.count > len(trouble.channels) else ""
            which = f" (channel{'s' if trouble.count > 1 else ''} {channels}{more})" if channels and verbose else ""
            lines.append(_hanging(f"    {_short(trouble.where, 60)}: {trouble.what}{which}", 6))
    return lines


def _float_cells(row: FloatLayerRow) -> tuple[str, ...]:
    if row.bits is None:
        codes = "float"
    else:
        codes = f"{row.bits} {row.granularity}" + (", in float" if row.runs == "float" else "")
    return row.name, row.op, format_shape(row.shape), f"{row.share:.1%}", codes, str(len(row.troubles) or "")


# -- a quantized one ---------------------------------------------------------------------------------------------------


def quantized_model(found: QuantizedModel, *, verbose: bool) -> str:
    """What it is and how it was made, kinds of layers, its size, its layers."""
    lines = [wrapped(f"{found.name}: {found.format} ({found.meaning})"), ""]
    lines.append(_titled("file", f"{_bytes(found.bytes)}, opset {found.opset}{_by(found.producer)}"))
    lines += _ends(found.inputs, found.outputs)
    lines.append(_titled("operators", _counts(found.operators, verbose=verbose)))
    if found.recipe:
        lines.append(_titled("options", shlex.join(found.options) or "the defaults"))
        own = found.recipe.get("layer_bits")
        if isinstance(own, list) and own:
            lines.append(_titled("", f"and --layer-bits with {format_count(len(own), 'line')}: see --json"))
        if found.placed:
            lines.append(
                _titled("placed", f"{format_count(found.placed, 'operator')} in float, because that is faster")
            )
    if found.preprocessing is not None:
        lines.append(_titled("pictures", _fed(found.preprocessing)))
    parts = {
        "codes": sum(row.codes_bytes for row in found.layers),
        "scales": sum(row.scales_bytes for row in found.layers),
        "biases": sum(row.bias_bytes for row in found.layers),
        "other constants": found.other_constants,
        "nodes and names": found.structure,
    }
    lines.append(_titled("size", ", ".join(f"{_bytes(size)} {what}" for what, size in parts.items() if size)))
    kinds = Counter(_kind(row) for row in found.layers)
    for title, (kind, count) in zip(["layers", *[""] * len(kinds)], kinds.most_common(), strict=False):
        lines.append(_titled(title, f"{count} x {kind}"))
    if found.layers:
        cells = [_quantized_cells(row) for row in found.layers]
        header = ("layer", "op", "weights", "reads", "writes", "size", "share")
        lines += ["", *_table(header, "lllllrr", cells, [row.share for row in found.layers], verbose)]
    else:
        lines += ["", "No layer has constant weights."]
    return "\n".join(lines)


def _kind(row: QuantizedLayerRow) -> str:
    bias = f"bias {row.bias}" if row.bias else "no bias"
    if row.scheme is None:
        return f"{row.op} in {row.type}, {bias}"
    size = f" of {row.block_size}" if row.block_size else ""
    held = "" if row.type.endswith(f"t{row.bits}") else f" in {row.type}"
    runs = "" if row.runs == "integer" else ", computed in float"
    return f"{row.op}: {row.bits} bits{held}, {row.scheme}, {row.granularity}{size}, {bias}{runs}"


def _quantized_cells(row: QuantizedLayerRow) -> tuple[str, ...]:
    weights = "float"
    if row.scheme is not None:
        size = f" {row.block_size}" if row.block_size else ""
        weights = f"{row.bits} {row.scheme[: -len('metric')]} {(row.granularity or '').removeprefix('per-')}{size}"
    return row.name, row.op, weights, _held(row.input), _held(row.output), _bytes(row.bytes), f"{row.share:.1%}"


def _held(tensor: TensorFormat) -> str:
    return "float" if tensor.bits == 32 else str(tensor)


def _fed(told: Mapping[str, Any]) -> str:
    """The preprocessing, as the file's metadata has it."""
    scale, size = told.get("scale"), told.get("size")
    factor = format_number(scale) if isinstance(scale, float) else str(scale)
    parts = [str(told.get("color") or "").upper(), f"(pixel x {factor} - {told.get('mean')}) / {told.get('std')}"]
    parts += [str(told.get("layout") or "").upper(), format_shape(size) if isinstance(size, list) else ""]
    return " ".join(filter(None, parts))


# -- for both ----------------------------------------------------------------------------------------------------------


def _ends(inputs: Iterable[TensorSignature], outputs: Iterable[TensorSignature]) -> list[str]:
    lines = []
    for title, ends in (("input", inputs), ("output", outputs)):
        for end in ends:
            shape = "shape unknown" if end.shape is None else format_shape(end.shape)
            lines.append(_titled(title, f"{end.name}, {end.type} {shape}"))
    return lines


def _counts(operators: Mapping[str, int], *, verbose: bool) -> str:
    named = [f"{count} {op}" for op, count in operators.items()]
    shown = named if verbose else named[:MOST_ROWS]
    return ", ".join(shown) + ("" if len(shown) == len(named) else f" and {len(named) - len(shown)} more types")


def _table(
    header: Sequence[str], sides: str, cells: Sequence[Sequence[str]], shares: Sequence[float], verbose: bool
) -> list[str]:
    """In graph order: all layers, or the largest where there are many; then names are cut so that lines fit."""
    if verbose:
        return [columns([header, *cells], sides)]
    chosen = sorted(sorted(range(len(cells)), key=lambda index: -shares[index])[:MOST_ROWS])
    rows = [header, *(cells[index] for index in chosen)]
    widths = (max(len(row[place]) for row in rows) for place in range(1, len(header)))
    room = max(COLUMNS - sum(2 + width for width in widths if width), LEAST_NAME)
    title = f"the {MOST_ROWS} largest of {len(cells)} layers (-v shows all, and whole names):"
    cut = columns([(_short(row[0], room), *row[1:]) for row in rows], sides)
    return [title, cut] if len(cells) > MOST_ROWS else [cut]


def _titled(title: str, text: str) -> str:
    return textwrap.fill(
        text,
        COLUMNS,
        initial_indent=title.ljust(TITLE) + "  ",
        subsequent_indent=" " * (TITLE + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _hanging(text: str, indent: int) -> str:
    return textwrap.fill(text, COLUMNS, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _some(names: Sequence[str], *, verbose: bool) -> str:
    shown = names if verbose else [_short(name, 40) for name in names[:WORST]]
    return ", ".join(shown) + ("" if len(shown) == len(names) else f" and {len(names) - len(shown)} more")


def _short(name: str, room: int) -> str:
    """The end of a long name, without the parts of a path that the next one repeats, as `conv/conv.0`."""
    if len(name) > room:
        parts = [part for part in name.split("/") if part]
        name = "..." + "/".join([part for part, after in pairwise(parts) if not after.startswith(part)] + parts[-1:])
    return name if len(name) <= room else f"...{name[3 - room :]}"


def _by(producer: str) -> str:
    return f", by {producer}" if producer else ""


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
