"""How each operator is quantized. One line an operator; what a runtime cannot do is the target's business.

An operator that is not in the table stays float.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Weighted:
    """Multiplies its input with constant weights (input 1) and adds a bias (input 2).

    output_axis, input_axis: the weight's axes of output and of input channels. needs_output: the integer kernel can
    only write codes; where False the result may stay float, which costs nothing and keeps precision.
    """

    output_axis: int
    input_axis: int
    needs_output: bool = True


@dataclass(frozen=True, slots=True)
class Computing:
    """Reads codes and writes codes, each tensor with parameters of its own. `data`: how many inputs are data."""

    data: int | None = 1
    # Behind the last layer with weights precision is worth more than the little time such an operator takes.
    float_in_tail: bool = False


@dataclass(frozen=True, slots=True)
class Transparent:
    """Hands codes on: the first input and all outputs share their parameters."""


@dataclass(frozen=True, slots=True)
class Joining:
    """Concat: inputs that nothing else reads take the output's parameters, so that joining them is a copy."""


@dataclass(frozen=True, slots=True)
class OnCodes:
    """Works on the integer codes themselves, between QuantizeLinear and DequantizeLinear; parameters are shared."""


Rule = Weighted | Computing | Transparent | Joining | OnCodes

RULES: dict[str, Rule] = {
    "Conv": Weighted(output_axis=0, input_axis=1),
    "ConvTranspose": Weighted(output_axis=1, input_axis=0),
    "Gemm": Weighted(output_axis=1, input_axis=0, needs_output=False),  # with transB the axes change places
    "MatMul": Weighted(output_axis=1, input_axis=0, needs_output=False),
    "Add": Computing(data=2),
    "Mul": Computing(data=2, float_in_tail=True),
    "AveragePool": Computing(),
    "GlobalAveragePool": Computing(),
    "Identity": Computing(),  # see `apart`
    "LeakyRelu": Computing(),
    "Sigmoid": Computing(float_in_tail=True),
    "Softmax": Computing(float_in_tail=True),
    "MaxPool": Transparent(),
    "ReduceMax": Transparent(),
    "Reshape": Transparent(),
    "Flatten": Transparent(),
    "Transpose": Transparent(),
    "Squeeze": Transparent(),
    "Unsqueeze": Transparent(),
    "Slice": Transparent(),
    "Split": Transparent(),
    "Gather": Transparent(),
    "Resize": Transparent(),
    "DepthToSpace": Transparent(),
    "Concat": Joining(),
    "Relu": OnCodes(),
    "Clip": OnCodes(),
    "Pad": OnCodes(),
}

ACTIVATIONS = frozenset({"Relu", "Clip"})
"""Operators that the quantizer behind the layer before can do by saturating."""

NEVER_NEGATIVE = frozenset({"Exp", "HardSigmoid", "Sigmoid", "Softmax"})
"""Operators whose results start at zero."""
