"""Weights, biases and constant operands become codes and the nodes that make numbers of them.

    codes -> DequantizeLinear [-> Reshape] -> layer                     where the layer runs on codes
    codes -> Cast [-> Sub zero] -> Mul scale [-> Reshape] -> layer      where the runtime is to compute floats at load

Scales of blocks are gathered for every element along their axis. The second form also keeps MatMul and Gemm from
becoming MatMulNBits, which rounds what it reads.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qconv.ir.model import DataType, Model, Node, Value, constant_array, dims, input_of
from qconv.ir.operators import QUANTIZATION_RULES
from qconv.planning.plan import Plan, data_positions
from qconv.quantization.dequantizers import DequantizerWriter
from qconv.quantization.layer import LayerParams
from qconv.quantizer import PerBlock, PerChannel, QuantParams


@dataclass(slots=True)
class ConstantWriter:
    """Writes what is constant of one model in place. Equal weights and operands are stored once."""

    made: DequantizerWriter
    plan: Plan
    _shared: dict[object, Value] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        """The model that is written to."""
        return self.made.model

    def operand(self, value: Value, chosen: QuantParams) -> None:
        """A constant operand of an integer operator."""
        numbers = constant_array(value)
        assert numbers is not None
        uses = [
            (node, index)
            for node in self.model.readers(value)
            if node in self.plan.integer
            for index in data_positions(node, QUANTIZATION_RULES[node.op_type])
            if node.inputs[index] is value  # a bound or a shape may be the same constant
        ]
        codes = chosen.quantize(numbers)
        key = (codes.shape, codes.tobytes(), chosen.scale.tobytes(), chosen.zero_point.tobytes())
        if key not in self._shared:
            stored = self.model.constant(f"{value.name}_codes", codes)
            node = self.made.dequantizer(stored, chosen, value.name or "", value)
            self.model.insert_first(node)
            self._shared[key] = node.outputs[0]
        for node, index in uses:
            self.model.set_input(node, index, self._shared[key])

    def layer(self, chosen: LayerParams) -> None:
        """Quantized weights, and the int32 bias, of one layer."""
        node = chosen.layer.node
        weight, bias = node.inputs[1], input_of(node, 2)
        assert weight is not None
        self.model.set_input(node, 1, self._weight(chosen, weight))
        if chosen.bias is None or (bias is not None and chosen.bias is constant_array(bias)):
            return  # nothing to add, or the float model's own bias
        name = (bias.name or "") if bias is not None and len(bias.uses()) == 1 else f"{node.name}_bias"
        if chosen.bias_params is None:
            self.model.set_input(node, 2, self.model.constant(name, chosen.bias.astype(np.float32)))
            return
        codes = self.model.constant(f"{name}_codes", chosen.bias_params.quantize(chosen.bias))
        dequantizer = self.made.dequantizer(codes, chosen.bias_params, name, codes)
        self.model.insert_first(dequantizer)
        self.model.set_input(node, 2, dequantizer.outputs[0])

    def _weight(self, chosen: LayerParams, weight: Value) -> Value:
        params, numbers = chosen.stored
        digest = hashlib.blake2b(np.ascontiguousarray(numbers).tobytes()).digest()
        key = (weight, params.spec, params.scale.tobytes(), params.zero_point.tobytes(), digest)
        if key in self._shared:
            return self._shared[key]
        name = weight.name or ""
        codes = self.model.constant(f"{name}_codes", numbers)
        if chosen.layer.at_load:
            result = self._computed(codes, params, name)
        else:
            dequantizer = self.made.dequantizer(codes, params, name, weight)
            self.model.insert_first(dequantizer)
            result = dequantizer.outputs[0]
        if chosen.layer.blocked and (chosen.layer.at_load or chosen.layer.node.op_type != "Gemm"):
            result = self._in_shape_of(weight, result)
        self._shared[key] = result
        return result

    def _in_shape_of(self, weight: Value, result: Value) -> Value:
        """Kernels of blocks were flattened; in between, Reshape keeps the optimizer from taking blocks for channels."""
        stored, maker = constant_array(weight), result.producer()
        assert stored is not None
        assert maker is not None
        shape = self.made.fixed("shape", np.asarray(stored.shape, np.int64))
        reshape = self.model.build("Reshape", [result, shape], name=f"{weight.name}_reshaped", like=weight)
        self.model.insert_after(maker, reshape)
        return reshape.outputs[0]

    def _computed(self, codes: Value, params: QuantParams, name: str) -> Value:
        """(codes - zero) * scale by operators that ONNX Runtime folds; a DequantizeLinear would run every time."""
        to_float = {"to": int(DataType.FLOAT)}
        steps = [self.model.build("Cast", [codes], name=f"{name}_cast", attributes=to_float, dtype=DataType.FLOAT)]
        spread: list[Node] = []
        parts = {"Mul": params.scale}
        if params.zero_point.any():
            parts = {"Sub": params.zero_point.astype(np.float32), **parts}
        for op_type, numbers in parts.items():
            part = self._part(numbers, params, [int(size or 0) for size in dims(codes) or ()], spread)
            steps.append(self.model.build(op_type, [steps[-1].outputs[0], part], name=f"{name}_{op_type}"))
        self.model.insert_first(*spread, *steps)
        return steps[-1].outputs[0]

    def _part(self, numbers: NDArray[np.generic], params: QuantParams, sizes: list[int], spread: list[Node]) -> Value:
        """A scale or zero point, to be broadcast to codes of these sizes. spread: gets what repeats those of blocks."""
        match params.spec.granularity:
            case PerChannel(axis):
                return self.made.fixed("scale", numbers.reshape([-1 if i == axis else 1 for i in range(len(sizes))]))
            case PerBlock(axis, size):
                stored = self.made.fixed("scale", numbers)
                blocks = self.made.fixed("blocks", np.arange(sizes[axis], dtype=np.int32) // size)
                attributes = {"axis": axis}
                gather = self.model.build("Gather", [stored, blocks], name=f"{stored.name}_each", attributes=attributes)
                spread.append(gather)
                return gather.outputs[0]
            case _:
                return self.made.fixed("scale", numbers.reshape([1] * len(sizes)))
