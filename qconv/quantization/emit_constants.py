"""Weights, biases and constant operands become codes and the nodes that make numbers of them.

codes -> DequantizeLinear [-> Reshape] -> layer                 where the layer runs on codes, or takes blocks
codes -> Cast [-> Sub zero] -> Mul scale -> layer               where the runtime is to compute floats at load
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from qconv.ir.model import DataType, Model, Value, constant_array, input_of, rank
from qconv.ir.operators import QUANTIZATION_RULES
from qconv.planning.plan import Plan, data_positions
from qconv.quantization.dequantizers import DequantizerWriter
from qconv.quantization.layer import LayerParams
from qconv.quantizer import PerChannel, QuantParams


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
            self._shared[key] = self._computed(codes, params, name, weight)
            return self._shared[key]
        dequantizer = self.made.dequantizer(codes, params, name, weight)
        self.model.insert_first(dequantizer)
        result = dequantizer.outputs[0]
        stored = constant_array(weight)
        if stored is not None and chosen.layer.blocked and chosen.layer.node.op_type != "Gemm":
            # kernels of blocks were flattened; in between, Reshape keeps the optimizer from taking blocks for channels
            shape = self.made.fixed("shape", np.asarray(stored.shape, np.int64))
            reshape = self.model.build("Reshape", [result, shape], name=f"{name}_reshaped", like=weight)
            self.model.insert_after(dequantizer, reshape)
            result = reshape.outputs[0]
        self._shared[key] = result
        return result

    def _computed(self, codes: Value, params: QuantParams, name: str, like: Value) -> Value:
        """(codes - zero) * scale by operators that ONNX Runtime folds; a DequantizeLinear would run every time."""
        axes = [1] * (rank(like) or 1)
        if isinstance(params.spec.granularity, PerChannel):
            axes[params.spec.granularity.axis] = -1
        to_float = {"to": int(DataType.FLOAT)}
        steps = [
            self.model.build("Cast", [codes], name=f"{name}_cast", attributes=to_float, like=like, dtype=DataType.FLOAT)
        ]
        if params.zero_point.any():
            zero = self.made.fixed("zero", params.zero_point.astype(np.float32).reshape(axes))
            steps.append(self.model.build("Sub", [steps[-1].outputs[0], zero], name=f"{name}_shifted", like=like))
        scale = self.made.fixed("scale", params.scale.reshape(axes))
        steps.append(self.model.build("Mul", [steps[-1].outputs[0], scale], name=f"{name}_scaled", like=like))
        self.model.insert_first(*steps)
        return steps[-1].outputs[0]
