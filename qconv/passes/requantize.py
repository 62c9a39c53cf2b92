"""This pass rounds a tensor twice where some of its readers want other bits than it has: they get a copy.

Of a network in which some nodes compute on 16 bits and others on 8, each tensor has the bits of the node that writes
it, and one copy for all readers of the other kind:

    16 bits -> Mul -> 16 bits -> 8 bits -> Conv

Few bits of activations are meant for the inputs of layers; so are the published figures. The stream of a residual
network is read by layers and by the next Add, and on its way through all Adds every rounding error stays to the end:

    x -> 8 bits -> Add                      x -> 8 bits -> few bits -> Conv

An Identity carries the second pair of quantizer and dequantizer; between codes of two types the file has no more than
the pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

from qconv.calibration.sketch import Sketch
from qconv.config.choices import WIDE_BITS
from qconv.errors import Change
from qconv.ir.model import Model, Node, Value, constant_array
from qconv.ir.operators import QUANTIZATION_RULES
from qconv.planning.plan import Plan, data_positions
from qconv.planning.planner import replan
from qconv.planning.widths import COPY, holds_16_bits

REPORT_STEP = "plan"
FULL_PRECISION_BITS = 8


def requantize_for_layers(model: Model, plan: Plan) -> dict[str, str]:
    """Give layers an Identity of their own where others read the same tensor of fewer than 8 bits.

    plan: for the model before. Returns the names of the tensors, each with the name of the Identity's output.
    """
    layers: dict[Value, list[Node]] = {}
    for layer in plan.layers:
        if layer.data is not None and layer.data not in plan.given:
            layers.setdefault(layer.data, []).append(layer.node)
    groups = plan.group_of()
    found: dict[str, str] = {}
    for value, readers in layers.items():
        spec, maker = plan.activations[value].spec, value.producer()
        if spec is None or spec.bits >= FULL_PRECISION_BITS or maker is None or len(groups[value]) > 1:
            continue
        if set(model.readers(value)) == set(readers) and not value.is_graph_output():
            continue
        found[value.name or ""] = _give_copy(model, value, readers, "few_bits")
    return found


def convert_between_widths(model: Model, plan: Plan) -> dict[str, str]:
    """Give readers that compute on 16 bits a copy of tensors with fewer, and the others one of tensors with 16.

    plan: for the model before. Constants that both kinds read become two. Returns the names of the tensors, each with
    the name of its copy.
    """
    found: dict[str, str] = {}
    for value, choice in plan.activations.items():
        wide = holds_16_bits(model, plan, value)
        readers = [node for node in model.readers(value) if node in plan.integer and node.op_type != COPY]
        others = [node for node in readers if (node in plan.on_16_bits) != wide]
        if others and choice.spec is not None and (wide or choice.spec.bits != WIDE_BITS):
            found[value.name or ""] = _give_copy(model, value, others, "8_bits" if wide else "16_bits")
    for value in plan.constants:
        readers = [node for node in model.readers(value) if node in plan.integer]
        wide_readers = [node for node in readers if node in plan.on_16_bits]
        numbers = constant_array(value)
        if numbers is None or not 0 < len(wide_readers) < len(readers):
            continue
        copy = model.constant(f"{value.name}_16_bits", numbers)
        for node in wide_readers:
            for index in data_positions(node, QUANTIZATION_RULES[node.op_type]):
                if node.inputs[index] is value:
                    model.set_input(node, index, copy)
    return found


def _give_copy(model: Model, value: Value, readers: list[Node], what: str) -> str:
    """Let some readers read an Identity of a tensor. Returns the name of its output."""
    copy, maker = model.build(COPY, [value], name=f"{value.name}_{what}", like=value), value.producer()
    if maker is None:
        model.insert_first(copy)
    else:
        model.insert_after(maker, copy)
    model.redirect(value, copy.outputs[0], readers=readers)
    return copy.outputs[0].name or ""


def describe_requantization(found: dict[str, str]) -> list[Change]:
    """The changes, for the report. found: tensors that were rounded to 8 bits, and to fewer for layers."""
    what = "rounded to 8 bits, and once more for the layers that read it"
    return [Change(REPORT_STEP, name, what, "tensors rounded to 8 bits, and once more for layers") for name in found]


def describe_conversion(found: dict[str, str]) -> list[Change]:
    """The changes, for the report. found: tensors that are converted between 8 and 16 bits."""
    what = "converted between 8 and 16 bits, once for all that read it so"
    return [Change(REPORT_STEP, name, what, "tensors converted between 8 and 16 bits") for name in found]


@dataclass(frozen=True, slots=True)
class CopiedReaders:
    """A plan of a network whose readers of unlike bits have copies. sketches: those of copies, too. changes: told."""

    plan: Plan
    sketches: Mapping[str, Sketch]
    changes: list[Change]


def give_readers_copies(model: Model, plan: Plan, sketches: Mapping[str, Sketch]) -> CopiedReaders:
    """Give readers that want other bits of a tensor a copy of it, in place.

    plan: of the model before. sketches: of its tensors; may be empty where nothing has been watched yet.
    """
    changes: list[Change] = []
    for give, describe in (
        (convert_between_widths, describe_conversion),
        (requantize_for_layers, describe_requantization),
    ):
        found = give(model, plan)
        if not found and not plan.on_16_bits:  # whose constants may be others now
            continue
        changes += describe(found)
        if sketches:
            sketches = {**sketches, **{copy: find_sketch(plan, name, sketches) for name, copy in found.items()}}
        plan = replan(plan, model)
    return CopiedReaders(plan, sketches, changes)


def find_sketch(plan: Plan, name: str, sketches: Mapping[str, Sketch]) -> Sketch:
    """The sketch of a quantized tensor; of one that only holds what others do, that of these together."""
    if name in sketches:
        return sketches[name]
    group = next(group for value, group in plan.group_of().items() if value.name == name)
    return reduce(Sketch.join, (sketches[value.name or ""] for value in group if value.name in sketches))
