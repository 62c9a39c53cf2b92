"""From statistics to scales and zero points for every decision of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qconv.calibrate import CALIBRATORS, Statistics
from qconv.errors import QconvError
from qconv.findings import Finding
from qconv.graph import Value, array
from qconv.plan import Plan
from qconv.quant import QuantParams
from qconv.weights import LayerParams, Source, quantize_layer


@dataclass(slots=True)
class Params:
    """Numbers for every decision of a Plan."""

    activations: dict[Value, QuantParams] = field(default_factory=dict)
    constants: dict[Value, QuantParams] = field(default_factory=dict)
    layers: list[LayerParams] = field(default_factory=list)


def choose_params(plan: Plan, statistics: Mapping[str, Statistics], calibrator: str) -> tuple[Params, list[Finding]]:
    """Parameters for all tensors of the plan. statistics: of every watched tensor, by its name."""
    if calibrator not in CALIBRATORS:
        raise QconvError(f"There is no calibrator {calibrator!r}.", f"use one of {', '.join(CALIBRATORS)}.")
    params = Params()
    findings: list[Finding] = []
    for value, group in plan.group_of().items():
        spec = plan.activations[value].spec
        assert spec is not None
        # tied tensors share the union of their ranges
        ranges = [CALIBRATORS[calibrator](statistics[v.name or ""], spec) for v in group if v.name in statistics]
        params.activations[value] = spec.from_range(min(low for low, _ in ranges), max(high for _, high in ranges))
    for value, spec in plan.constants.items():
        numbers = array(value)
        assert numbers is not None
        params.constants[value] = spec.from_range(numbers.min(initial=0), numbers.max(initial=0))
    for layer in plan.layers:
        source = None
        if layer.data is not None:
            source = Source(params.activations[layer.data], statistics.get(layer.data.name or ""))
        chosen, notes = quantize_layer(layer, source)
        params.layers.append(chosen)
        findings += notes
    return params, findings
