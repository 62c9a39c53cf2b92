"""What each runtime accepts: plain data. Sources: the notes on ONNX Runtime's fusions, measured on 1.19 to 1.32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qconv.cost_table import COSTS

LOWEST_OPSET = 13  # DequantizeLinear with a scale for each channel

# The lowest IR version that may carry an opset, by onnx's own release table.
IR_VERSIONS: dict[int, int] = {
    13: 7,
    14: 7,
    15: 8,
    16: 8,
    17: 8,
    18: 8,
    19: 9,
    20: 9,
    21: 10,
    22: 10,
    23: 11,
    24: 11,
    25: 12,
}
# The oldest ONNX Runtime that loads an opset.
RUNTIMES: dict[int, str] = {
    13: "1.8", 14: "1.8", 15: "1.10", 16: "1.11", 17: "1.12", 18: "1.14", 19: "1.15", 20: "1.17", 21: "1.19",
    22: "1.22", 23: "1.26", 24: "1.26", 25: "1.26",
}  # fmt: skip


Table = Mapping[str, Mapping[int, tuple[float, float, float, float]]]


@dataclass(frozen=True, slots=True)
class Target:
    """A runtime. float_ops: operators that have rules but no worthwhile integer kernel there, each with the reason.

    costs: what operators cost there, as in `cost_table`; None where layers are not placed by costs. folds: whether it
    computes what depends on constants alone once, when it loads a file.
    """

    name: str
    float_ops: Mapping[str, str] = field(default_factory=dict)
    costs: Table | None = None
    folds: bool = False


TARGETS: dict[str, Target] = {
    "ort-cpu": Target(
        "ort-cpu",
        float_ops={"ConvTranspose": "ONNX Runtime's CPU provider has no integer ConvTranspose"},
        costs=COSTS,
        folds=True,
    ),
}
