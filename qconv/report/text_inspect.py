"""This module formats what `inspect` found as text in 80 columns: a summary, what is remarkable, and the layers."""

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
from qconv.report.text import COLUMNS, format_columns, wrap_text

MOST_ROWS = 20
MOST_GROUPS = 8
MOST_PROBLEMS = 3
TITLE_WIDTH = 12
LEAST_NAME_WIDTH = 12


# -- a float model -----------------------------------------------------------------------------------------------------


def format_float_model(found: FloatModel, *, verbose: bool) -> str:
    """Format a float model: what it is, what a default run does, what its weights foretell, its layers."""
    lines = [
        wrap_text(
            f"{found.name}: float, {_format_bytes(found.bytes)}, opset {found.opset}{_format_producer(found.producer)}"
        ),
        "",
    ]
    lines += _format_inputs_outputs(found.inputs, found.outputs)
    lines.append(_wrap_titled("operators", _format_counts(found.operators, verbose=verbose)))
    where = "" if found.stored >= found.parameters else "; the file computes them"
    lines.append(_wrap_titled("parameters", f"{found.parameters:,} in {_format_bytes(found.stored)}{where}"))
    if found.norms:
        what = f"{found.folded} of {found.norms} fold into the layers beside them"
        if found.converted:
            what += f", {found.converted} become depthwise layers"
        stay = found.norms - found.folded - found.converted
        lines.append(_wrap_titled("batch norms", f"{what}, {stay} stay" if stay else what))
    if found.relu6:
        what = f"{found.relu6} Clip between 0 and 6: ranges are fixed there, and channels cannot be scaled past 6"
        lines.append(_wrap_titled("ReLU6", what))
    lines += _format_skipped(found.refused, verbose=verbose)
    lines += ["", *_format_default_run(found, verbose=verbose)]
    if found.troubles:
        lines += ["", "foretold by the weights:", *_format_problems(found.troubles, verbose=verbose)]
    elif found.layers:
        lines += ["", "foretold by the weights: no trouble"]
    if found.layers:
        cells = [_float_cells(row) for row in found.layers]
        shares = [row.share for row in found.layers]
        header = ("layer", "op", "weights", "share", "bits", "foretold")
        lines += ["", *_format_layers(header, "lllrlr", cells, shares, verbose)]
    return "\n".join(lines)


def _format_default_run(found: FloatModel, *, verbose: bool) -> list[str]:
    if not found.layers:
        return [wrap_text("A default run has nothing to quantize: no layer has constant weights.")]
    floats = sum(len(left.nodes) for left in found.left)
    absorbed = f" ({format_count(found.absorbed, 'activation')} absorbed)" if found.absorbed else ""
    what = (
        f"A default run for {found.target} puts {format_count(found.integer, 'operator')} into integers{absorbed} and "
    )
    lines = [wrap_text(f"{what}leaves {floats or 'none'} in float{':' if floats else '.'}")]
    shown = found.left if verbose else found.left[:MOST_GROUPS]
    lines += [_format_float_group(left, verbose=verbose) for left in shown]
    if any(end.shape is not None and None in end.shape[2:] for end in found.inputs):
        lines.append(
            wrap_text("Its input size is open: where it is known, more may stay float because that is faster.")
        )
    if len(shown) < len(found.left):
        lines.append(f"  and {len(found.left) - len(shown)} more reasons: -v shows all")
    return lines


def _format_float_group(left: FloatOperatorGroup, *, verbose: bool) -> str:
    return wrap_text(f"  {len(left.nodes)} {left.op}: {left.why} ({_join_some(left.nodes, verbose=verbose)})", 4)


def _format_skipped(refused: Sequence[Skipped], *, verbose: bool) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for skipped in refused:
        reasons.setdefault(skipped.why, []).append(skipped.where)
    shown = list(reasons.items()) if verbose else list(reasons.items())[:MOST_PROBLEMS]
    lines = [_wrap_titled("not folded", f"{_join_some(names, verbose=verbose)}: {why}") for why, names in shown]
    if len(shown) < len(reasons):
        lines.append(_wrap_titled("", f"and {len(reasons) - len(shown)} more reasons: -v shows all"))
    return lines


def _format_problems(troubles: Sequence[WeightProblem], *, verbose: bool) -> list[str]:
    """List problems kind by kind, those that nothing takes care of first; of each the worst layers."""
    groups: dict[tuple[str, str], list[WeightProblem]] = {}
    for trouble in troubles:
        groups.setdefault((trouble.kind, trouble.handled), []).append(trouble)
    lines = []
    for (kind, handled), group in sorted(groups.items(), key=lambda item: bool(item[0][1])):
        care = f"; {handled}" if handled else ""
        lines.append(wrap_text(f"  {kind} in {format_count(len(group), 'layer')}{care}", 4))
        ranked = sorted(group, key=lambda trouble: -(trouble.value or 0.0))
        for trouble in ranked if verbose else ranked[: 1 if handled else MOST_PROBLEMS]:
            channels = ", ".join(map(str, trouble.channels))
            more = ", ..." if trouble.count > len(trouble.channels) else ""
            which = f" (channel{'s' if trouble.count > 1 else ''} {channels}{more})" if channels and verbose else ""
            lines.append(wrap_text(f"    {_shorten_name(trouble.where, 60)}: {trouble.what}{which}", 6))
    return lines


def _float_cells(row: FloatLayerRow) -> tuple[str, ...]:
    if row.bits is None:
        codes = "float"
    else:
        codes = f"{row.bits} {row.granularity}" + (", in float" if row.runs == "float" else "")
    return row.name, row.op, format_shape(row.shape), f"{row.share:.1%}", codes, str(len(row.troubles) or "")


# -- a quantized one ---------------------------------------------------------------------------------------------------


def format_quantized_model(found: QuantizedModel, *, verbose: bool) -> str:
    """Format a quantized model: how it was made, kinds of layers, its size, its layers."""
    lines = [wrap_text(f"{found.name}: {found.format} ({found.meaning})"), ""]
    lines.append(
        _wrap_titled("file", f"{_format_bytes(found.bytes)}, opset {found.opset}{_format_producer(found.producer)}")
    )
    lines += _format_inputs_outputs(found.inputs, found.outputs)
    lines.append(_wrap_titled("operators", _format_counts(found.operators, verbose=verbose)))
    if found.recipe:
        lines.append(_wrap_titled("options", shlex.join(found.options) or "the defaults"))
        own = found.recipe.get("layer_bits")
        if isinstance(own, list) and own:
            lines.append(_wrap_titled("", f"and --layer-bits with {format_count(len(own), 'line')}: see --json"))
        if found.placed:
            some = f"{found.for_accuracy} of them for accuracy, others because that is faster"
            whys = {0: "because that is faster", found.placed: "for accuracy"}
            why = whys.get(found.for_accuracy, some)
            lines.append(_wrap_titled("placed", f"{format_count(found.placed, 'operator')} in float, {why}"))
    if found.preprocessing is not None:
        lines.append(_wrap_titled("pictures", _describe_preprocessing(found.preprocessing)))
    parts = {
        "codes": sum(row.codes_bytes for row in found.layers),
        "weights in float": sum(row.float_bytes for row in found.layers),
        "scales": sum(row.scales_bytes for row in found.layers),
        "biases": sum(row.bias_bytes for row in found.layers),
        "other constants": found.other_constants,
        "nodes and names": found.structure,
    }
    lines.append(
        _wrap_titled("size", ", ".join(f"{_format_bytes(size)} {what}" for what, size in parts.items() if size))
    )
    kinds = Counter(_describe_kind(row) for row in found.layers)
    for title, (kind, count) in zip(["layers", *[""] * len(kinds)], kinds.most_common(), strict=False):
        lines.append(_wrap_titled(title, f"{count} x {kind}"))
    if found.layers:
        cells = [_quantized_cells(row) for row in found.layers]
        header = ("layer", "op", "weights", "reads", "writes", "size", "share")
        lines += ["", *_format_layers(header, "lllllrr", cells, [row.share for row in found.layers], verbose)]
    else:
        lines += ["", "No layer has constant weights."]
    return "\n".join(lines)


def _describe_kind(row: QuantizedLayerRow) -> str:
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
    return (
        row.name,
        row.op,
        weights,
        _describe_activation(row.input),
        _describe_activation(row.output),
        _format_bytes(row.bytes),
        f"{row.share:.1%}",
    )


def _describe_activation(tensor: TensorFormat) -> str:
    return "float" if tensor.bits == 32 else str(tensor)


def _describe_preprocessing(told: Mapping[str, Any]) -> str:
    """Describe the preprocessing as the file's metadata has it."""
    scale, size = told.get("scale"), told.get("size")
    factor = format_number(scale) if isinstance(scale, float) else str(scale)
    parts = [str(told.get("color") or "").upper(), f"(pixel x {factor} - {told.get('mean')}) / {told.get('std')}"]
    parts += [str(told.get("layout") or "").upper(), format_shape(size) if isinstance(size, list) else ""]
    return " ".join(filter(None, parts))


# -- for both ----------------------------------------------------------------------------------------------------------


def _format_inputs_outputs(inputs: Iterable[TensorSignature], outputs: Iterable[TensorSignature]) -> list[str]:
    lines = []
    for title, ends in (("input", inputs), ("output", outputs)):
        for end in ends:
            shape = "shape unknown" if end.shape is None else format_shape(end.shape)
            lines.append(_wrap_titled(title, f"{end.name}, {end.type} {shape}"))
    return lines


def _format_counts(operators: Mapping[str, int], *, verbose: bool) -> str:
    named = [f"{count} {op}" for op, count in operators.items()]
    shown = named if verbose else named[:MOST_ROWS]
    return ", ".join(shown) + ("" if len(shown) == len(named) else f" and {len(named) - len(shown)} more types")


def _format_layers(
    header: Sequence[str], sides: str, cells: Sequence[Sequence[str]], shares: Sequence[float], verbose: bool
) -> list[str]:
    """Lay out layers in graph order: all, or the largest where there are many, with names cut to fit the line."""
    if verbose:
        return [format_columns([header, *cells], sides)]
    chosen = sorted(sorted(range(len(cells)), key=lambda index: -shares[index])[:MOST_ROWS])
    rows = [header, *(cells[index] for index in chosen)]
    widths = (max(len(row[place]) for row in rows) for place in range(1, len(header)))
    room = max(COLUMNS - sum(2 + width for width in widths if width), LEAST_NAME_WIDTH)
    title = f"the {MOST_ROWS} largest of {len(cells)} layers (-v shows all, and whole names):"
    cut = format_columns([(_shorten_name(row[0], room), *row[1:]) for row in rows], sides)
    return [title, cut] if len(cells) > MOST_ROWS else [cut]


def _wrap_titled(title: str, text: str) -> str:
    return textwrap.fill(
        text,
        COLUMNS,
        initial_indent=title.ljust(TITLE_WIDTH) + "  ",
        subsequent_indent=" " * (TITLE_WIDTH + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _join_some(names: Sequence[str], *, verbose: bool) -> str:
    shown = names if verbose else [_shorten_name(name, 40) for name in names[:MOST_PROBLEMS]]
    return ", ".join(shown) + ("" if len(shown) == len(names) else f" and {len(names) - len(shown)} more")


def _shorten_name(name: str, room: int) -> str:
    """Return the end of a long name, without parts of the path that the next one repeats, as `conv/conv.0`."""
    if len(name) > room:
        parts = [part for part in name.split("/") if part]
        name = "..." + "/".join([part for part, after in pairwise(parts) if not after.startswith(part)] + parts[-1:])
    return name if len(name) <= room else f"...{name[3 - room :]}"


def _format_producer(producer: str) -> str:
    return f", by {producer}" if producer else ""


def _format_bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
