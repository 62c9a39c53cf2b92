"""What qconv knows of each ONNX operator: one row an operator, in the table `OPERATORS`.

A row says how the operator is quantized, and what it does to numbers and to channels. Whoever wants the operators of a
kind asks the table (`with_(homogeneous=True)`), so that a new operator is a new row here, and its function in
`training/onnx_ops` if networks that have it are to be trained. What a runtime cannot do is the target's business. An
operator that has no row, or no rule in it, stays float. Nothing but the standard library is imported before a function
of a row is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import Any


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


@dataclass(frozen=True, slots=True)
class SaturatingLineRule:
    """A line that ends at 0 and 1, where its codes end: what it reads, as steep as the line, plus a constant."""


Rule = WeightedRule | ComputingRule | TransparentRule | ConcatRule | IntegerDomainRule | SaturatingLineRule


class ChannelEffect(StrEnum):
    """What becomes of channels, one word for all operators that passes over channels treat alike."""

    LAYER = auto()
    """They are multiplied with weights and summed up."""
    SAME = auto()
    """Each number stays what it is."""
    SIGN = auto()
    """The sign may change."""
    RECTIFY = auto()
    """Nothing below zero is left."""
    CLIP = auto()
    SLOPE = auto()
    """Numbers below zero are multiplied by a constant of their channel."""
    FUNCTION = auto()
    """The row's `function`, of each number alone."""
    ADD = auto()
    """Of two tensors, or of one and a constant."""
    SUM = auto()
    """Of any number of tensors."""
    EXTREME = auto()
    """The larger, or the smaller, of several tensors."""
    SCALE = auto()
    """The product of two tensors, or of one and a constant."""
    NORMALIZE = auto()
    MEAN_OF_PLACES = auto()
    MAX_OF_PLACES = auto()
    REDUCE = auto()
    """Axes are summed up, or their maximum is taken."""
    REDUCE_MEAN = auto()
    RESIZE = auto()
    CONCAT = auto()
    SPLIT = auto()
    SLICE = auto()
    PAD = auto()
    FLATTEN = auto()
    """Places become features."""
    TO_SPACE = auto()
    """Channels become places."""
    TRANSPOSE = auto()
    CAST = auto()
    DEQUANTIZE = auto()


GetAttribute = Callable[[str, Any], Any]
"""A node's attribute by its name, or the default."""

Function = Callable[[Any], Any]
"""Of an array, element by element."""

Build = Callable[..., Any]
"""build(op_type, *inputs) adds an operator and returns its result; a number among the inputs is a constant."""


@dataclass(frozen=True, slots=True)
class Operator:
    """A row of the table.

    Attributes:
        rule: how it is quantized; None for operators that stay float.
        effect: what becomes of channels; None where passes over channels do not look through.
        clips: the quantizer behind the layer in front can do it by saturating.
        homogeneous: f(a x) = a f(x) for every a > 0, in each channel.
        moves_values: each number of the one result is one of the input's, or the greatest of some, so that a monotone
            function may as well be applied before (Resize by nearest neighbour only).
        rearranges: the result has the input's numbers, each once.
        absorbs_activation: a Relu or Clip behind it is done by the quantizer of its result, or can move on.
        averages: the result is the mean of places.
        hands_on_noise: the error of what it reads is about the error of its result.
        fused_behind_layer: ONNX Runtime makes one node of it with the float layer in front.
        gates: x is often multiplied by its result, as in SiLU. cutoff: up to which x the product is zero, None where
            there is no such x. nears_zero: it only comes near, as x * Sigmoid(x) does.
        gates_itself: it is such a product as a whole.
        output_range: what no result is beyond, whatever the input; None where nothing is known.
        function: what it does to each number alone.
        saturates: where `function` ends: within 0.001 of what it is further out. None where it rises for ever, or
            where the attributes make it fall.
        rewrite: (build, x, attribute) -> y, which makes of it, when a model is loaded, operators that do the same.
        has_kernel: ONNX Runtime has an integer kernel for it although qconv has no rule.
        made_of_others: in integers it is written as other operators; between quantizers ONNX Runtime leaves it float.
        remedy: what can be done where the lack of an integer kernel keeps it in float.
    """

    rule: Rule | None = None
    effect: ChannelEffect | None = None
    clips: bool = False
    homogeneous: bool = False
    moves_values: bool = False
    rearranges: bool = False
    absorbs_activation: bool = False
    averages: bool = False
    hands_on_noise: bool = False
    fused_behind_layer: bool = False
    gates: bool = False
    cutoff: Callable[[GetAttribute], float | None] | None = None
    nears_zero: bool = False
    gates_itself: bool = False
    output_range: tuple[float, float] | None = None
    function: Callable[[GetAttribute], Function] | None = None
    saturates: Callable[[GetAttribute], tuple[float, float] | None] | None = None
    rewrite: Callable[[Build, Any, GetAttribute], Any] | None = None
    has_kernel: bool = False
    made_of_others: bool = False
    remedy: str | None = None


# -- what operators do to a number -------------------------------------------------------------------------------------


def _sigmoid(get: GetAttribute) -> Function:
    import numpy as np

    return lambda x: np.asarray((1 + np.tanh(x / 2)) / 2)


def _tanh(get: GetAttribute) -> Function:
    import numpy as np

    return np.tanh


def _hard_sigmoid(get: GetAttribute) -> Function:
    import numpy as np

    alpha, beta = get("alpha", 0.2), get("beta", 0.5)
    return lambda x: np.asarray(np.clip(alpha * x + beta, 0.0, 1.0))


def _hard_swish(get: GetAttribute) -> Function:
    import numpy as np

    return lambda x: x * np.clip(1 / 6 * x + 0.5, 0.0, 1.0)


def _leaky_relu(get: GetAttribute) -> Function:
    import numpy as np

    alpha = get("alpha", 0.01)
    return lambda x: np.where(x < 0, alpha * x, x)


def _swish(build: Build, x: Any, get: GetAttribute) -> Any:
    """x * Sigmoid(alpha x): opset 24; Ramachandran et al. 2017, arXiv 1710.05941."""
    alpha = get("alpha", 1.0)
    return build("Mul", x, build("Sigmoid", x if alpha == 1 else build("Mul", x, alpha)))


def _hard_sigmoid_cutoff(get: GetAttribute) -> float | None:
    """Up to where it is zero; None where it falls."""
    alpha, beta = float(get("alpha", 0.2)), float(get("beta", 0.5))
    return -beta / alpha if alpha > 0 else None


def _hard_sigmoid_ends(get: GetAttribute) -> tuple[float, float] | None:
    alpha, beta = get("alpha", 0.2), get("beta", 0.5)
    return (min(-beta / alpha, 0.0), max((1 - beta) / alpha, 0.0)) if alpha > 0 else None


# -- the table ---------------------------------------------------------------------------------------------------------

_FLATTEN = ChannelEffect.FLATTEN

OPERATORS: Mapping[str, Operator] = {
    # layers with weights
    "Conv": Operator(WeightedRule(0, 1), ChannelEffect.LAYER, absorbs_activation=True),
    "ConvTranspose": Operator(WeightedRule(1, 0), ChannelEffect.LAYER, absorbs_activation=True),
    # with transB the axes change places
    "Gemm": Operator(WeightedRule(1, 0, needs_output=False), ChannelEffect.LAYER, absorbs_activation=True),
    "MatMul": Operator(WeightedRule(1, 0, needs_output=False), ChannelEffect.LAYER, absorbs_activation=True),
    # arithmetic
    "Add": Operator(ComputingRule(data=2), ChannelEffect.ADD, absorbs_activation=True, hands_on_noise=True),
    "Mul": Operator(ComputingRule(data=2, float_in_tail=True), ChannelEffect.SCALE, absorbs_activation=True),
    "Sub": Operator(
        ComputingRule(data=2),
        ChannelEffect.ADD,
        absorbs_activation=True,
        hands_on_noise=True,
        made_of_others=True,
        remedy="it is an Add of what is read with the negated scale: qconv quantize writes it so",
    ),
    "Div": Operator(
        effect=ChannelEffect.SCALE, remedy="by a constant it would be a Mul, which has one: qconv quantize writes it so"
    ),
    "Sum": Operator(effect=ChannelEffect.SUM),
    "Max": Operator(effect=ChannelEffect.EXTREME),
    "Min": Operator(effect=ChannelEffect.EXTREME),
    "Neg": Operator(effect=ChannelEffect.SIGN, homogeneous=True),
    "Abs": Operator(effect=ChannelEffect.SIGN, homogeneous=True),
    "BatchNormalization": Operator(
        effect=ChannelEffect.NORMALIZE,
        absorbs_activation=True,
        remedy="fold it into the layer before: qconv quantize does",
    ),
    # pools
    "AveragePool": Operator(
        ComputingRule(), ChannelEffect.MEAN_OF_PLACES, homogeneous=True, absorbs_activation=True, averages=True
    ),
    "GlobalAveragePool": Operator(
        ComputingRule(), ChannelEffect.MEAN_OF_PLACES, homogeneous=True, absorbs_activation=True, averages=True
    ),
    "ReduceMean": Operator(
        effect=ChannelEffect.REDUCE_MEAN,
        remedy="over height and width alone it would be a GlobalAveragePool: qconv quantize writes it so",
    ),
    # activations
    "Identity": Operator(ComputingRule(), ChannelEffect.SAME, homogeneous=True, rearranges=True),  # see `requantize`
    "LeakyRelu": Operator(
        ComputingRule(),
        ChannelEffect.FUNCTION,
        homogeneous=True,
        hands_on_noise=True,
        fused_behind_layer=True,
        function=_leaky_relu,
    ),
    "Sigmoid": Operator(
        ComputingRule(float_in_tail=True),
        ChannelEffect.FUNCTION,
        fused_behind_layer=True,
        gates=True,
        nears_zero=True,
        output_range=(0.0, 1.0),
        function=_sigmoid,
        saturates=lambda get: (-8.0, 8.0),
    ),
    "Softmax": Operator(ComputingRule(float_in_tail=True), output_range=(0.0, 1.0), has_kernel=True),
    "Exp": Operator(output_range=(0.0, math.inf)),
    "Tanh": Operator(
        effect=ChannelEffect.FUNCTION,
        fused_behind_layer=True,
        gates=True,
        output_range=(-1.0, 1.0),
        function=_tanh,
        saturates=lambda get: (-4.0, 4.0),
    ),
    "HardSigmoid": Operator(
        SaturatingLineRule(),
        effect=ChannelEffect.FUNCTION,
        fused_behind_layer=True,
        gates=True,
        cutoff=_hard_sigmoid_cutoff,
        output_range=(0.0, 1.0),
        function=_hard_sigmoid,
        saturates=_hard_sigmoid_ends,
    ),
    "HardSwish": Operator(
        effect=ChannelEffect.FUNCTION, gates_itself=True, cutoff=lambda get: -3.0, function=_hard_swish
    ),
    "Mish": Operator(gates_itself=True),
    "Swish": Operator(gates_itself=True, rewrite=_swish),
    "Gelu": Operator(gates_itself=True),
    "PRelu": Operator(
        effect=ChannelEffect.SLOPE,
        hands_on_noise=True,
        remedy="with a slope for each channel of a map it is a sum with a depthwise layer: qconv quantize rewrites it",
    ),
    # operators that move values
    "MaxPool": Operator(
        TransparentRule(), ChannelEffect.MAX_OF_PLACES, homogeneous=True, moves_values=True, absorbs_activation=True
    ),
    "ReduceMax": Operator(TransparentRule(), ChannelEffect.REDUCE),
    "Reshape": Operator(TransparentRule(), _FLATTEN, moves_values=True, rearranges=True, absorbs_activation=True),
    "Flatten": Operator(TransparentRule(), _FLATTEN, moves_values=True, rearranges=True, absorbs_activation=True),
    "Transpose": Operator(
        TransparentRule(), ChannelEffect.TRANSPOSE, moves_values=True, rearranges=True, absorbs_activation=True
    ),
    "Squeeze": Operator(TransparentRule(), _FLATTEN, moves_values=True, rearranges=True, absorbs_activation=True),
    "Unsqueeze": Operator(TransparentRule(), moves_values=True, rearranges=True, absorbs_activation=True),
    "Slice": Operator(TransparentRule(), ChannelEffect.SLICE, moves_values=True, absorbs_activation=True),
    "Split": Operator(TransparentRule(), ChannelEffect.SPLIT),
    "Gather": Operator(TransparentRule()),
    "Expand": Operator(TransparentRule(), moves_values=True, absorbs_activation=True),
    "Tile": Operator(TransparentRule(), moves_values=True, absorbs_activation=True),
    "Resize": Operator(TransparentRule(), ChannelEffect.RESIZE, moves_values=True, absorbs_activation=True),
    "DepthToSpace": Operator(TransparentRule(), ChannelEffect.TO_SPACE, moves_values=True, absorbs_activation=True),
    "Concat": Operator(ConcatRule(), ChannelEffect.CONCAT, moves_values=True, absorbs_activation=True),
    "GlobalMaxPool": Operator(effect=ChannelEffect.MAX_OF_PLACES, homogeneous=True),
    "ReduceSum": Operator(effect=ChannelEffect.REDUCE),
    "Dropout": Operator(effect=ChannelEffect.SAME),
    # operators that work on the integers themselves
    "Relu": Operator(
        IntegerDomainRule(),
        ChannelEffect.RECTIFY,
        clips=True,
        homogeneous=True,
        hands_on_noise=True,
        fused_behind_layer=True,
    ),
    "Clip": Operator(IntegerDomainRule(), ChannelEffect.CLIP, clips=True, hands_on_noise=True, fused_behind_layer=True),
    "Pad": Operator(IntegerDomainRule(), ChannelEffect.PAD),
    "SpaceToDepth": Operator(
        IntegerDomainRule(),
        made_of_others=True,
        remedy="between layers it is four slices of the codes, joined: qconv quantize writes it so",
    ),
    # others
    "Cast": Operator(effect=ChannelEffect.CAST),
    "DequantizeLinear": Operator(effect=ChannelEffect.DEQUANTIZE),
    "Where": Operator(has_kernel=True),
}

UNKNOWN_OPERATOR = Operator()
"""The row of every other operator."""


def operator(op_type: str) -> Operator:
    """The row of an operator; that of the unknown one where it has none."""
    return OPERATORS.get(op_type, UNKNOWN_OPERATOR)


def with_(**wanted: object) -> frozenset[str]:
    """The operators whose rows have these values: `with_(homogeneous=True)`."""
    rows = OPERATORS.items()
    return frozenset(name for name, row in rows if all(getattr(row, part) == value for part, value in wanted.items()))


QUANTIZATION_RULES: dict[str, Rule] = {name: row.rule for name, row in OPERATORS.items() if row.rule is not None}

SATURATING_LINES = frozenset(name for name, rule in QUANTIZATION_RULES.items() if isinstance(rule, SaturatingLineRule))
"""Operators that become a sum of codes and a constant."""

CLIPPING_ACTIVATIONS = with_(clips=True)
"""Operators that the quantizer behind the layer before can do by saturating."""
