"""Plan and parameters become QuantizeLinear and DequantizeLinear nodes.

    layer -> QuantizeLinear [-> Clip on codes] -> DequantizeLinear -> every reader

One pair a tensor, however many read it: two quantizers on one tensor keep ONNX Runtime from using an integer kernel. An
Identity between two types of codes is a second pair alone. Codes of fewer than 8 bits live in 8-bit containers, a Clip
holds them to their range. A Relu or Clip behind a layer goes away where the codes saturate at its bounds, and otherwise
becomes a Clip on the codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qconv.errors import Change, Finding
from qconv.ir.model import (
    DataType,
    Model,
    Node,
    Value,
    clip_bounds,
    dims,
    rank,
    set_dims,
)
from qconv.ir.operators import QUANTIZATION_RULES, SATURATING_LINES, ComputingRule, TransparentRule, WeightedRule
from qconv.ir.rewriting import data_input
from qconv.ir.stored_weights import read_dequantizer
from qconv.planning.eligibility import gives_places
from qconv.planning.plan import Plan, data_inputs
from qconv.planning.saturating_line import find_saturating_line
from qconv.planning.widths import COPY
from qconv.quantization.code_attributes import axis_attribute, has_integer_clip_kernel, integer_clip_bounds
from qconv.quantization.dequantizers import DequantizerWriter
from qconv.quantization.emit_constants import ConstantWriter
from qconv.quantization.emit_on_codes import clip_of_codes, compute_on_codes, computes_on_codes, subtract_codes
from qconv.quantization.gelu_inputs import join_gelu_inputs
from qconv.quantization.parameters import Params
from qconv.quantizer import QuantParams, QuantSpec

FUSIBLE_RULES = (WeightedRule, ComputingRule)
"""Rules of the operators that have integer kernels in ONNX Runtime whose results differ from those of float."""


def emit(model: Model, plan: Plan, params: Params) -> list[Finding]:
    """Rewrite `model` in place into its quantized form."""
    writer = _QdqWriter(model, plan, params)
    constants = ConstantWriter(writer.made, plan)
    for layer in params.layers:
        constants.layer(layer)
    for value, chosen in params.constants.items():
        constants.operand(value, chosen)
    for value in list(model.graph.inputs):
        if value in params.activations:
            writer.tensor(value, None)
    for node in model.nodes():
        writer.node(node)
    if plan.target.on_ort:
        join_gelu_inputs(model)
    model.sweep()
    return writer.findings


class _QdqWriter:
    def __init__(self, model: Model, plan: Plan, params: Params) -> None:
        self.model, self.plan, self.params = model, plan, params
        self.codes: dict[Value, Value] = {}
        self.findings: list[Finding] = []
        self.made = DequantizerWriter(model)
        self._lines = {node: data_input(node) for node in plan.integer if node.op_type in SATURATING_LINES}

    def node(self, node: Node) -> None:
        """Quantize what one node of the float graph writes, and remove it where it is absorbed."""
        self._negate_second(node)
        if node in self.plan.absorbed:
            self._absorb(node)
        elif computes_on_codes(node, self.plan):
            self._on_codes(node)
        elif node in self._lines:
            self._add_to_codes(node)
        elif self._converts(node):
            self._quantize_again(node)
        else:
            for value in node.outputs:
                if value in self.plan.given and node.op_type == "DequantizeLinear":
                    self.codes[value] = data_input(node)
                elif value in self.params.activations:
                    self.tensor(value, node)

    def tensor(self, value: Value, producer: Node | None) -> None:
        """Quantize `value` where it is produced; the model's input has no producer."""
        readers = self._readers(value, producer)
        source, before = value, producer
        if producer is not None and self._must_stay_float(producer):
            before = self._copy(value, producer, value)
        elif producer is not None and self._moves_past_pool(producer):
            before = self._put_activation_behind(producer) or self._copy(value, producer, value)
        if before is not None and before is not producer:
            source = before.outputs[0]
        quantizer = self._quantizer(source, self.params.activations[value], before, wish=value.name or "")
        codes = self._hold_to_bits(quantizer, self.params.activations[value])
        everywhere = self.plan.reads is None and (producer in self.plan.integer or producer in self.plan.absorbed)
        self._publish(value, codes, readers, rename=everywhere)

    def _must_stay_float(self, producer: Node) -> bool:
        """Whether ONNX Runtime would make an integer kernel of a node that is float, with weights of its own rounding.

        It does so between a dequantizer and a quantizer, for any operator that it knows, and moves the quantizer up
        past what only moves or cuts values. A Sum of one tensor, which is a copy, keeps the quantizer away.
        """
        if producer in self.plan.integer or not self.plan.target.on_ort:
            return False
        if gives_places(producer):  # on codes it would give other places
            return True
        rule = QUANTIZATION_RULES.get(producer.op_type)
        if isinstance(rule, FUSIBLE_RULES):
            return any(v is not None and _is_dequantized(v) for v in producer.inputs)
        if rule is None:
            return False
        before = (value.producer() for value in data_inputs(producer, rule))
        return any(node is not None and self._must_stay_float(node) for node in before)

    def _copy(self, source: Value, behind: Node, value: Value) -> Node:
        """A Sum of one tensor, past which no quantizer moves, behind a node. value: what it stands for."""
        node = self.model.build("Sum", [source], name=f"{value.name}_as_float", like=value)
        self.model.insert_after(behind, node)
        return node

    def _moves_past_pool(self, producer: Node) -> bool:
        """Whether ONNX Runtime would take the quantizer of a float result to the front of a MaxPool.

        Behind a float layer its codes are NCHW, for which the kernel is some 30 times as slow as float.
        """
        node: Node | None = producer
        while node is not None and node not in self.plan.integer and self.plan.target.on_ort:
            if not isinstance(QUANTIZATION_RULES.get(node.op_type), TransparentRule):
                return False
            if node.op_type == "MaxPool":
                return True
            source = data_input(node)
            node = source.producer() if self.model.sole_reader(source) is node else None
        return False

    def _put_activation_behind(self, pool: Node) -> Node | None:
        """Exchange a MaxPool and the Relu or Clip in front of it, which keeps every number, and the quantizer behind.

        Mostly the quantizer then does the activation, too. None where nothing can be exchanged.
        """
        value = data_input(pool)
        activation = value.producer()
        if pool.op_type != "MaxPool" or activation is None or self.model.sole_reader(value) is not pool:
            return None
        if clip_bounds(activation) is None or activation in self.plan.integer or activation in self.plan.absorbed:
            return None
        result = pool.outputs[0]
        if len(self.model.readers(result)) != len(self._readers(result, pool)) or result.is_graph_output():
            return None
        self.model.set_input(pool, 0, data_input(activation))
        self.model.set_input(activation, 0, result)
        set_dims(activation.outputs[0], dims(result))
        self.model.insert_after(pool, activation)
        return activation

    def _absorb(self, activation: Node) -> None:
        """The quantizer behind a layer takes the place of the Relu or Clip that followed it."""
        result = activation.outputs[0]
        before = activation.inputs[0]
        assert before is not None
        chosen = self.params.activations[result]
        cannot = not self._saturates(chosen, activation) and not has_integer_clip_kernel(chosen)
        if self.plan.target.keeps_activations or cannot:
            self.tensor(result, activation)
            return
        readers = self._readers(result, activation)
        quantizer = self._quantizer(before, chosen, activation, wish=result.name or "")
        codes = self._hold_to_bits(quantizer, chosen)
        if self._saturates(chosen, activation):
            what = "absorbed by the quantizer behind its layer"
        else:
            what = "done on its codes"
            codes = self._clip_codes(codes, chosen, activation)
        where = self.plan.absorbed[activation].name or ""
        gone, summed_up = f"{activation.op_type} {activation.name} {what}", f"{activation.op_type} {what}"
        self.findings.append(Change("absorb", where, gone, summed_up))
        self._publish(result, codes, readers, rename=True)
        self.model.remove(activation)

    def _converts(self, node: Node) -> bool:
        """Whether a node is a copy that changes the type of codes: a quantizer behind a dequantizer does that alone."""
        codes, chosen = self.codes.get(data_input(node)), self.params.activations.get(node.outputs[0])
        if node.op_type != COPY or codes is None or chosen is None or chosen.bits is not None:
            return False
        return codes.dtype != DataType.from_numpy(chosen.spec.dtype)

    def _quantize_again(self, copy: Node) -> None:
        """A quantizer behind the dequantizer of what a copy reads takes the copy's place."""
        result, readers = copy.outputs[0], self._readers(copy.outputs[0], copy)
        chosen = self.params.activations[result]
        quantizer = self._quantizer(data_input(copy), chosen, copy, wish=result.name or "")
        self._publish(result, self._hold_to_bits(quantizer, chosen), readers, rename=True)
        self.model.remove(copy)

    def _on_codes(self, node: Node) -> None:
        result, source = node.outputs[0], node.inputs[0]
        assert source is not None
        chosen = self.params.activations[result]
        readers = self._readers(result, node)
        codes = compute_on_codes(self.made, node, self.codes[source], chosen)
        if codes is None:
            self.tensor(result, node)
            return
        what = f"{node.op_type} computed on codes"
        self.findings.append(Change("codes", node.name or "", what))
        self._publish(result, codes, readers, rename=True)
        self.model.remove(node)

    def _negate_second(self, node: Node) -> None:
        """Make an Add of a Sub in integers whose second input has codes of 8 bits with one scale."""
        second = node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type != "Sub" or node not in self.plan.integer or second not in self.codes:
            return
        dequantizer = read_dequantizer(second)
        chosen = None if dequantizer is None else dequantizer.tensor_params()
        if second is not None and chosen is not None and has_integer_clip_kernel(chosen):
            subtract_codes(self.made, node, self.codes[second], chosen)
            what = "Sub became an Add that reads codes with the negated scale"
            self.findings.append(Change("codes", node.name or "", what))

    def _add_to_codes(self, node: Node) -> None:
        """A line that saturates is a sum of its codes, read as steep as it is, and a constant."""
        source, result = self._lines[node], node.outputs[0]
        line, chosen = find_saturating_line(node), self.params.activations[source]
        assert line is not None
        before = self.made.dequantizer(self.codes[source], line.read(chosen), f"{result.name}_line", result)
        self.model.insert_before(node, before)
        if chosen.scale.ndim:
            before = self._copy(before.outputs[0], before, result)
        shift = self.model.constant(f"{result.name}_shift", np.array(line.shift, np.float32))
        own = QuantSpec(8, signed=False, symmetric=False).from_range(line.shift, line.shift)
        self.model.become(node, "Add", [before.outputs[0], shift])
        ConstantWriter(self.made, self.plan).operand(shift, own)
        self.tensor(result, node)

    def _readers(self, value: Value, producer: Node | None) -> list[Node]:
        """The readers of the dequantized value: all of them, or those that the plan has read codes."""
        readers = self.model.readers(value)
        if self.plan.reads is not None:
            wanted = self.plan.reads.get(value, [])
            return [node for node in readers if node in wanted]
        if producer is not None and (producer in self.plan.integer or producer in self.plan.absorbed):
            return readers
        return [node for node in readers if self._wants_codes(node)]

    def _wants_codes(self, node: Node) -> bool:
        return node in self.plan.integer or node in self.plan.absorbed

    def _quantizer(self, value: Value, chosen: QuantParams, behind: Node | None, *, wish: str) -> Node:
        """Insert a quantizer of `value` behind a node, or at the head of the graph (None)."""
        if chosen.bits is not None:
            behind = self._end_at_codes(value, chosen, behind, wish)
            value = behind.outputs[0]
        scale, zero = self.made.grid(chosen)
        name, attributes = f"{wish}_q", axis_attribute(chosen)
        node = self.model.build(
            "QuantizeLinear", [value, scale, zero], name=name, output=name, attributes=attributes, like=value
        )
        node.outputs[0].dtype = DataType.from_numpy(chosen.spec.dtype)
        self._place(behind, node)
        return node

    def _end_at_codes(self, value: Value, chosen: QuantParams, behind: Node | None, wish: str) -> Node:
        """Clip each channel at its last code, in float, as a Clip of codes has one limit for all channels.

        The lower ends are those of the container. It also keeps the runtime from fusing quantizers that its kernels
        cannot do.
        """
        axes = [-1 if axis == 1 else 1 for axis in range(rank(value) or 2)]
        limits = self.made.fixed("limit", chosen.code_range()[1].astype(np.float32).reshape(axes))
        node = self.model.build("Min", [value, limits], name=f"{wish}_limited", like=value)
        self._place(behind, node)
        return node

    def _place(self, producer: Node | None, node: Node) -> None:
        if producer is None:
            self.model.insert_first(node)
        else:
            self.model.insert_after(producer, node)

    def _hold_to_bits(self, quantizer: Node, chosen: QuantParams) -> Value:
        """Codes of fewer bits than their container are clipped to their range."""
        codes = quantizer.outputs[0]
        if chosen.spec.bits in (8, 16) or chosen.bits is not None:
            return codes
        return self._clip(codes, chosen, chosen.spec.qmin, chosen.spec.qmax)

    def _saturates(self, chosen: QuantParams, activation: Node) -> bool:
        """Whether the codes end where the Relu or Clip would cut, so that it has nothing left to do."""
        return all(map(np.array_equal, integer_clip_bounds(chosen, activation), chosen.limits))

    def _clip_codes(self, codes: Value, chosen: QuantParams, activation: Node) -> Value:
        low, high = integer_clip_bounds(chosen, activation)
        return self._clip(codes, chosen, int(low), int(high))

    def _clip(self, codes: Value, chosen: QuantParams, low: int, high: int) -> Value:
        node = clip_of_codes(self.made, codes, chosen, low, high)
        self._place(codes.producer(), node)
        return node.outputs[0]

    def _publish(self, value: Value, codes: Value, readers: Sequence[Node], *, rename: bool) -> None:
        """Dequantize `codes` for the readers of `value`; `rename`: also where the model returns it."""
        self.codes[value] = codes
        producer = codes.producer()
        assert producer is not None
        if not readers and not (rename and value.is_graph_output()):
            return
        chosen = self.params.activations[value]
        node = self.made.dequantizer(codes, chosen, value.name or "", value)
        self.model.insert_after(producer, node)
        if chosen.scale.ndim:  # a copy: the runtime's kernels for codes fail on a scale for each channel
            node = self._copy(node.outputs[0], node, value)
        if rename and value.is_graph_output():
            self._take_name(value, node.outputs[0])
        self.model.redirect(value, node.outputs[0], readers=readers)
        self.codes[node.outputs[0]] = codes  # readers of `value` now find the codes behind this tensor

    def _take_name(self, value: Value, result: Value) -> None:
        """The dequantized tensor is what the model returns under the old name."""
        name = value.name or ""
        value.name = self.model.fresh(f"{name}_float")
        result.name = name
        outputs = self.model.graph.outputs
        outputs[list(outputs).index(value)] = result


def _is_dequantized(value: Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"
