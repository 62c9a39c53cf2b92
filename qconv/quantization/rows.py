"""What became of every quantized tensor, as rows of the report."""

from __future__ import annotations

import numpy as np

from qconv.ir.model import Value, input_of
from qconv.planning.plan import Plan
from qconv.quantization.params import Params
from qconv.quantizer import PerBlock, PerChannel, QuantParams
from qconv.results.quantize import TensorRow


def tensor_rows(plan: Plan, params: Params) -> list[TensorRow]:
    """A row for every quantized tensor: activations in graph order, then weights and biases layer by layer."""
    rows = []
    for value, chosen in params.activations.items():
        rows.append(_row(_name(value), "activation", chosen, plan.activations[value].why))
    for layer in params.layers:
        node = layer.layer.node
        rows.append(_row(_name(node.inputs[1]), "weight", layer.stored[0], f"weights of {node.name}"))
        if layer.bias_params is not None:
            name = _name(input_of(node, 2)) or f"{node.name}_bias"
            rows.append(_row(name, "bias", layer.bias_params, f"bias of {node.name}, scale s_x * s_w"))
    return rows


def _name(value: Value | None) -> str:
    return "" if value is None else value.name or ""


def _row(name: str, kind: str, chosen: QuantParams, why: str) -> TensorRow:
    spec = chosen.spec
    granularity = {PerChannel: "per-channel", PerBlock: "per-block"}.get(type(spec.granularity), "per-tensor")
    scale, zero = (np.asarray(numbers).tolist() for numbers in (chosen.scale, chosen.zero_point))
    bits = spec.bits if chosen.bits is None else chosen.bits.tolist()
    return TensorRow(name, kind, bits, spec.symmetric, granularity, scale, zero, why)
