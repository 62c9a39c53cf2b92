"""What each runtime accepts: plain data. Sources: the notes on ONNX Runtime's fusions, measured on 1.19 to 1.32."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, NamedTuple

from qconv.errors import QconvError

LOWEST_OPSET = 13  # DequantizeLinear with a scale for each channel


class OpsetSupport(NamedTuple):
    """What carries an opset. ir_version: the lowest that may; runtime: the oldest ONNX Runtime that runs Q/DQ in it."""

    ir_version: int
    runtime: str


OPSETS: Mapping[int, OpsetSupport] = {
    13: OpsetSupport(7, "1.8"),
    14: OpsetSupport(7, "1.8"),
    15: OpsetSupport(8, "1.10"),
    16: OpsetSupport(8, "1.11"),
    17: OpsetSupport(8, "1.12"),
    18: OpsetSupport(8, "1.14"),
    19: OpsetSupport(9, "1.15"),
    20: OpsetSupport(9, "1.17"),
    21: OpsetSupport(10, "1.19"),
    22: OpsetSupport(10, "1.22"),
    23: OpsetSupport(11, "1.24"),  # 1.23 loads float networks in it, and loses a dequantizer of others
    24: OpsetSupport(11, "1.24"),
    25: OpsetSupport(12, "1.24"),
    26: OpsetSupport(13, "1.25"),
    27: OpsetSupport(13, "1.32"),
}
"""The opsets that results are written in. IR versions by onnx's own table of releases; runtimes as measured, which
`make compat` does again. Opset 28 has no quantizers in any runtime up to 1.32."""


def parse_runtime(version: str) -> tuple[int, int]:
    """The first two numbers of a version. Raises QconvError for what is none, as `1`."""
    found = re.fullmatch(r"(\d{1,4})\.(\d{1,4})(\.\d{1,4})?", version, re.ASCII)
    if found is None:
        raise QconvError(f"--needs {version} is no version of ONNX Runtime.", "write it as 1.23.")
    return int(found[1]), int(found[2])


HIGHEST_OPSET = max(OPSETS)

LOWERED_OPSET = 25
"""What is beyond the highest becomes this one where its operators allow: it has all their newer types, and more
runtimes load it."""


CostTable = Mapping[str, Mapping[int, tuple[float, float, float, float]]]


def read_cost_tables(text: str) -> dict[str, CostTable]:
    """The tables in `cost_table.json`, by the class of CPU that they were measured on."""
    costs: dict[str, dict[str, dict[str, Any]]] = json.loads(text)["costs"]
    return {
        cpu: {kind: {int(channels): tuple(line) for channels, line in lines.items()} for kind, lines in table.items()}
        for cpu, table in costs.items()
    }


def average_costs(tables: Collection[CostTable]) -> CostTable:
    """The mean of the costs in all tables that know them: nobody tells on which CPU a file will run."""
    found: dict[str, dict[int, tuple[float, float, float, float]]] = {}
    for kind in sorted({kind for table in tables for kind in table}):
        known = [table[kind] for table in tables if kind in table]
        for channels in sorted(set.intersection(*map(set, known))):
            f_us, f_ns, i_us, i_ns = (sum(c) / len(known) for c in zip(*(t[channels] for t in known), strict=True))
            found.setdefault(kind, {})[channels] = f_us, f_ns, i_us, i_ns
    return found


UP_TO_8_BITS = frozenset(range(2, 9))
ALL_BITS = UP_TO_8_BITS | {16}

CPU_COSTS = read_cost_tables(files("qconv.config").joinpath("cost_table.json").read_text("utf-8"))
"""The committed tables, by the class of CPU."""


PACKED_FORMS = frozenset({"int4", "int2", "bytes"})
"""How codes of fewer than 8 bits can be packed."""


@dataclass(frozen=True, slots=True)
class Target:
    """A runtime. Sets hold what it accepts; `why` says in one sentence why no more.

    float_ops: operators that have rules but no worthwhile integer kernel there, each with the reason.
    costs: what operators cost there, as in `cost_table.json`; None where layers are not placed by costs. cpu_costs: the
    same on each class of CPU.
    folds_constants: whether it computes what depends on constants alone once, when it loads a file. on_ort: whether
    ONNX Runtime's CPU provider, which every file is tried with, is what will run it.
    signed: activations are int8, not uint8. default_scheme: of activations. integer_bias: biases are int32 codes behind
    a dequantizer; else float. keeps_activations: Relu and Clip stay where they are, even where the quantizer behind
    them saturates at their bounds. inputs_only: quantizers stand in front of the layers that compute in integers,
    where this runtime looks for them, and of residual branches; else around every operator.
    moves_zero: codes of few bits are shifted in their bytes, so that zero is code 0 for every channel: its kernels want
    that, or are faster.
    candidate_activation_bits: what a tensor of a network with 8-bit activations may have in their place, 32 for float.
    fast_forms: whether what only ONNX Runtime's CPU provider was measured to run faster is written: codes padded with
    channels, operators between quantizer and dequantizer, negative scales. Other runtimes may not fuse around them.
    packed_forms: of `ir.packed_codes`, which it takes and gets right. why_packed: why no more.
    per_tensor_weight_ops: weights of these operators have one scale. saturates_int16_pairs: on x86 without VNNI it adds
    products in pairs of 16 bits.
    """

    name: str
    float_ops: Mapping[str, str] = field(default_factory=dict)
    costs: CostTable | None = None
    cpu_costs: Mapping[str, CostTable] = field(default_factory=dict)
    folds_constants: bool = False
    on_ort: bool = True
    signed: bool = False
    default_scheme: str = "asymmetric"
    integer_bias: bool = True
    keeps_activations: bool = False
    inputs_only: bool = False
    fast_forms: bool = False
    per_tensor_weight_ops: frozenset[str] = frozenset()
    moves_zero: bool = False
    saturates_int16_pairs: bool = True
    weight_bits: frozenset[int] = ALL_BITS
    activation_bits: frozenset[int] = ALL_BITS | {32}
    candidate_activation_bits: frozenset[int] = frozenset({8, 16, 32})
    activation_schemes: frozenset[str] = frozenset({"symmetric", "asymmetric"})
    weight_schemes: frozenset[str] = frozenset({"symmetric", "asymmetric"})
    granularities: frozenset[str] = frozenset({"per-tensor", "per-channel", "per-block"})
    packed_forms: frozenset[str] = PACKED_FORMS
    why_packed: str = ""
    takes_pixels: bool = True
    why: str = ""


NO_FAST_FORMS = {
    "HardSigmoid": "as an Add of codes read with another scale it was measured on ONNX Runtime's CPU provider alone",
    "Sub": "as an Add of codes read with the negated scale it was measured on ONNX Runtime's CPU provider alone",
    "SpaceToDepth": "as slices of codes it was measured on ONNX Runtime's CPU provider alone",
}
"""Operators that are written as others for `fast_forms` alone."""

TARGETS: dict[str, Target] = {
    "ort-cpu": Target(
        "ort-cpu",
        float_ops={"ConvTranspose": "ONNX Runtime's CPU provider has no integer ConvTranspose"},
        costs=average_costs(CPU_COSTS.values()),
        cpu_costs=CPU_COSTS,
        folds_constants=True,
        fast_forms=True,
        moves_zero=True,
        candidate_activation_bits=frozenset({8, 32}),
    ),
    "tensorrt": Target(
        "tensorrt",
        float_ops=NO_FAST_FORMS,
        on_ort=False,
        signed=True,
        default_scheme="symmetric",
        integer_bias=False,
        keeps_activations=True,
        inputs_only=True,
        per_tensor_weight_ops=frozenset({"ConvTranspose"}),
        saturates_int16_pairs=False,
        weight_bits=UP_TO_8_BITS,
        activation_bits=frozenset({8}),
        candidate_activation_bits=frozenset({8, 32}),
        activation_schemes=frozenset({"symmetric"}),
        weight_schemes=frozenset({"symmetric"}),
        granularities=frozenset({"per-tensor", "per-channel"}),
        packed_forms=frozenset(),
        why_packed="TensorRT takes int4 for blocks of weights alone: leave --pack out",
        takes_pixels=False,
        why="TensorRT takes int8 codes with zero point 0, one scale a tensor (a channel of weights), no uint8 input",
    ),
    "openvino": Target(
        "openvino",
        float_ops=NO_FAST_FORMS,
        on_ort=False,
        integer_bias=False,
        keeps_activations=True,
        inputs_only=True,
        weight_bits=UP_TO_8_BITS,
        activation_bits=UP_TO_8_BITS | {32},
        candidate_activation_bits=frozenset({8, 32}),
        granularities=frozenset({"per-tensor", "per-channel"}),
        packed_forms=frozenset({"int4"}),
        why_packed="OpenVINO gets packed codes right as int4 alone",
        why="OpenVINO's integer layers have 8 bits and one scale a tensor or, for weights, a channel",
    ),
    "generic": Target("generic", float_ops=NO_FAST_FORMS, keeps_activations=True),
}
