"""This pass stores float constants of a quantized model smaller without losing a bit.

Equal constants are stored once. A large one with at most 256 different values (the anchor boxes of a detector, a mask)
becomes a table and one byte an element, table[codes], which ONNX Runtime computes once when it loads the file.

onnx-ir's DeduplicateInitializersPass does not serve: it does not say which constants it merged, which the report lists,
and merges integers as well, so that layers share weights and scales that the audit and `compare` tell apart by name.
"""

from __future__ import annotations

import numpy as np

from qconv.errors import Change, Finding, format_count
from qconv.ir.model import DataType, Model, Value, constant_array

LEAST_BYTES = 4096  # below, the two nodes cost as much as they save
MOST_TABLE_VALUES = 256


def compress_constants(model: Model) -> list[Finding]:
    """Rewrite the large float constants of a quantized model in place. Returns a finding for each."""
    return [*_deduplicate_constants(model), *_replace_by_tables(model)]


def _float_constants(model: Model) -> list[tuple[Value, np.ndarray]]:
    """Find the float32 initializers of LEAST_BYTES and more that the model does not return, with their numbers."""
    found = []
    for value in list(model.graph.initializers.values()):
        if value.dtype == DataType.FLOAT and value.const_value is not None and value.const_value.nbytes >= LEAST_BYTES:
            numbers = constant_array(value)
            if numbers is not None and not value.is_graph_output():
                found.append((value, numbers))
    return found


def _deduplicate_constants(model: Model) -> list[Finding]:
    """Let readers of equal constants read the first of them."""
    first: dict[tuple[tuple[int, ...], bytes], Value] = {}
    findings: list[Finding] = []
    for value, numbers in _float_constants(model):
        kept = first.setdefault((numbers.shape, numbers.tobytes()), value)
        if kept is not value:
            model.redirect(value, kept)
            findings.append(
                Change("shrink", value.name or "", f"equal to {kept.name}, stored once", "equal constants stored once")
            )
    model.sweep()
    return findings


def _replace_by_tables(model: Model) -> list[Finding]:
    """Replace constants of few values by a Gather from a table, codes in uint8."""
    findings: list[Finding] = []
    for value, numbers in _float_constants(model):
        # compared as bits: -0.0 is not 0.0, and NaN keeps its payload
        table, codes = np.unique(numbers.view(np.uint32), return_inverse=True)
        if len(table) > MOST_TABLE_VALUES:
            continue
        name = value.name or ""
        readers = model.readers(value)
        entries = model.constant(f"{name}_table", table.view(np.float32))
        stored = model.constant(f"{name}_codes", codes.reshape(numbers.shape).astype(np.uint8))
        to_index = {"to": int(DataType.INT32)}
        index = model.build(
            "Cast", [stored], name=f"{name}_index", attributes=to_index, like=stored, dtype=DataType.INT32
        )
        gather = model.build("Gather", [entries, index.outputs[0]], name=f"{name}_values", like=value)
        model.insert_first(index, gather)
        model.redirect(value, gather.outputs[0], readers=readers)
        stored_as = f"stored as {format_count(len(table), 'value')} and one byte an element"
        findings.append(Change("shrink", name, stored_as, "constants of few values stored in one byte an element"))
    model.sweep()
    return findings
