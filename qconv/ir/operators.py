"""How each operator is quantized. One line an operator; what a runtime cannot do is the target's business.

An operator that is not in the table stays float.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WeightedRule:
    """Multiplies its input with constant weights (input 1) and adds a bias (input 2).

    output_axis, input_axis: the weight's axes of output and of input channels. needs_output: the integer kernel can
    only write codes; where False the result may stay float, which costs nothing and keeps precision.
    """

    output_axis: int
    input_axis: int
    needs_output: bool = True


@dataclass(frozen=True, slots=True)
class ComputingRule:
    """Reads codes and writes codes, each tensor with parameters of its own. `data`: how many inputs are data."""

    data: int | None = 1
    # Behind the last layer with weights precision is worth more than the little time such an operator takes.
    float_in_tail: bool = False


@dataclass(frozen=True, slots=True)
class TransparentRule:
    """Hands codes on: the first input and all outputs share their parameters."""


@dataclass(frozen=True, slots=True)
class ConcatRule:
    """Concat: inputs that nothing else reads take the output's parameters, so that joining them is a copy."""


@dataclass(frozen=True, slots=True)
class IntegerDomainRule:
    """Works on the integer codes themselves, between QuantizeLinear and DequantizeLinear; parameters are shared."""


Rule = WeightedRule | ComputingRule | TransparentRule | ConcatRule | IntegerDomainRule

QUANTIZATION_RULES: dict[str, Rule] = {
    "Conv": WeightedRule(output_axis=0, input_axis=1),
    "ConvTranspose": WeightedRule(output_axis=1, input_axis=0),
    "Gemm": WeightedRule(output_axis=1, input_axis=0, needs_output=False),  # with transB the axes change places
    "MatMul": WeightedRule(output_axis=1, input_axis=0, needs_output=False),
    "Add": ComputingRule(data=2),
    "Mul": ComputingRule(data=2, float_in_tail=True),
    "AveragePool": ComputingRule(),
    "GlobalAveragePool": ComputingRule(),
    "Identity": ComputingRule(),  # see `apart`
    "LeakyRelu": ComputingRule(),
    "Sigmoid": ComputingRule(float_in_tail=True),
    "Softmax": ComputingRule(float_in_tail=True),
    "MaxPool": TransparentRule(),
    "ReduceMax": TransparentRule(),
    "Reshape": TransparentRule(),
    "Flatten": TransparentRule(),
    "Transpose": TransparentRule(),
    "Squeeze": TransparentRule(),
    "Unsqueeze": TransparentRule(),
    "Slice": TransparentRule(),
    "Split": TransparentRule(),
    "Gather": TransparentRule(),
    "Resize": TransparentRule(),
    "DepthToSpace": TransparentRule(),
    "Concat": ConcatRule(),
    "Relu": IntegerDomainRule(),
    "Clip": IntegerDomainRule(),
    "Pad": IntegerDomainRule(),
}

CLIPPING_ACTIVATIONS = frozenset({"Relu", "Clip"})
"""Operators that the quantizer behind the layer before can do by saturating."""

NON_NEGATIVE_OPS = frozenset({"Exp", "HardSigmoid", "Sigmoid", "Softmax"})
"""Operators whose results start at zero."""
