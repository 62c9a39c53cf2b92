"""Eligibility checks say why a node stays float, and how the weights of a quantized layer are specified.

There is one refusal function for each kind of operator rule. A weight spec has the bits, the granularity and the axes
of the scales. Of a residual Add, `find_shortcut_input` finds the shortcut: runtimes that fuse a layer with the Add
behind it keep the layer's own result in the accumulator and want a quantized tensor on the other side only. Where both
sides are layers, the projection is the one with fewer layers in front of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from qconv.config.choices import Scheme, WeightGranularity
from qconv.config.recipe import Recipe
from qconv.config.targets import Target
from qconv.errors import format_some
from qconv.ir.layers import layers_inside
from qconv.ir.model import (
    DataType,
    Model,
    Node,
    Value,
    attribute,
    clip_bounds,
    constant_array,
    constant_scalar,
    input_of,
    rank,
)
from qconv.ir.operators import (
    CLIPPING_ACTIVATIONS,
    QUANTIZATION_RULES,
    ComputingRule,
    ConcatRule,
    IntegerDomainRule,
    Rule,
    SaturatingLineRule,
    TransparentRule,
    WeightedRule,
)
from qconv.ir.rewriting import standard_op_type, title, uses_only_first_output
from qconv.planning.plan import LayerPlan, Plan
from qconv.planning.saturating_line import find_saturating_line
from qconv.quantizer import PerBlock, PerChannel, PerTensor, QuantSpec

NO_16_BIT_KERNEL = "codes of 16 bits have no integer kernel"

MANY_PRODUCTS = 4
"""From so many products of codes on a sum is rarely equal to that beside it."""

MOST_BINS = 64
"""Bins of a distribution that a detector takes the mean of; most have 16."""

MASK_MAGNITUDE = 1e6
"""Magnitude from which on a constant stands for infinity, as in the masks in front of a Softmax."""


def gives_places(node: Node) -> bool:
    """Whether a node is a MaxPool whose Indices are read."""
    return standard_op_type(node) == "MaxPool" and not uses_only_first_output(node)


def keep_places_float(nodes: Sequence[Node]) -> dict[str, str]:
    """Names of the nodes that must stay float so that few Indices of a MaxPool move, each with the reason.

    Numbers that differ become equal as codes, and of equal ones the first is taken. So nothing is rounded between the
    MaxPool and the layers before it; of sums in a row, as residual blocks have them, the last two are float.
    """
    found: dict[str, str] = {}
    for pool in filter(gives_places, nodes):
        waiting = [(pool, 2)]
        while waiting:
            reader, sums = waiting.pop()
            for value in reader.inputs:
                node = None if value is None else value.producer()
                if node is None or (node.name or "") in found or node.op_type == "DequantizeLinear":
                    continue
                found[node.name or ""] = f"the indices of MaxPool {pool.name} hang on what it writes"
                left = sums - _is_sum_of_tensors(node)
                if left and not _sums_many(node):
                    waiting.append((node, left))
    return found


def _sums_many(node: Node) -> bool:
    """Whether a node is a layer whose results have far more values than what it reads: no scale of each channel."""
    weight, rule = constant_array(input_of(node, 1)), QUANTIZATION_RULES.get(node.op_type)
    if weight is None or not isinstance(rule, WeightedRule):
        return False
    axis = orient_rule(node, rule).output_axis
    outputs = weight.shape[axis] if axis < weight.ndim else 1
    return int(weight.size // max(outputs, 1)) >= MANY_PRODUCTS


def _is_sum_of_tensors(node: Node) -> bool:
    return node.op_type in ("Add", "Sum") and not any(constant_array(value) is not None for value in node.inputs)


def explain_refusal(node: Node, rule: Rule) -> str | None:
    """Why a node with a rule stays float; None for a node that can run on codes."""
    return _BY_RULE[type(rule)](node)


HEAD_REASON = "behind the last layer with weights, where float keeps precision and costs little"
"""Why what makes boxes and scores of the last layers' results stays float."""


def takes_expectation(node: Node) -> bool:
    """Whether a layer only takes the mean of 0, 1, 2, ... by shares: the decoding of distributions (Li et al. 2020).

    Detectors write it as a 1x1 convolution behind a Softmax (arXiv 2006.04388). Its weights are not learned.
    """
    numbers, source = constant_array(input_of(node, 1)), node.inputs[0]
    if standard_op_type(node) not in ("Conv", "MatMul", "Gemm") or numbers is None or source is None:
        return False
    bins = numbers.reshape(-1)
    if not 2 <= bins.size <= MOST_BINS or not np.array_equal(bins, np.arange(bins.size)):
        return False
    made = source.producer()
    while made is not None and standard_op_type(made) in ("Reshape", "Transpose", "Squeeze", "Unsqueeze"):
        made = None if made.inputs[0] is None else made.inputs[0].producer()
    return made is not None and standard_op_type(made) == "Softmax"


def _refuse_weighted(node: Node) -> str | None:
    weight, bias = input_of(node, 1), input_of(node, 2)
    numbers = constant_array(weight)
    if takes_expectation(node):
        return HEAD_REASON
    if numbers is None:
        if node.op_type == "MatMul":
            return None
        return "its weights are computed, not constant"
    if not numbers.size:
        return "its weights are empty"
    if bias is not None and constant_array(bias) is None:
        return "its bias is computed, not constant"
    if any(value is not None and value.dtype not in (DataType.FLOAT, None) for value in node.inputs[:3]):
        return "its data is not float32"
    if node.op_type == "MatMul" and weight is not None and rank(weight) != 2:
        return "its weight is no matrix"
    if node.op_type == "Gemm":
        if attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1:
            return "a Gemm with transA, alpha or beta has no integer kernel"
        if bias is not None and rank(bias) != 1:
            return "its third input is no bias vector"
    return None


def describe_inside(node: Node) -> str:
    """What layers the bodies of a node hold, in words that go on from a reason; empty where there are none."""
    inside = [title(layer) for layer in layers_inside(node)]
    return f", and layers in its bodies stay float with it: {format_some(inside)}" if inside else ""


def _refuse_computing(node: Node) -> str | None:
    for value in node.inputs[:2]:
        if value is not None and value.dtype not in (DataType.FLOAT, None):
            return "its data is not float"
        numbers = constant_array(value)
        if numbers is not None and node.op_type == "Sub" and value is node.inputs[1]:
            return "of a constant it would be an Add"
        if numbers is not None and np.abs(numbers).max(initial=0) >= MASK_MAGNITUDE:
            return "its constant is a mask that 8 bits cannot hold beside data"
    if node.op_type == "Identity" and node.outputs[0].is_graph_output():
        return "it returns what it reads"
    if node.op_type == "AveragePool":
        if any(step != 1 for step in attribute(node, "dilations", [])):
            return "a dilated AveragePool has no integer kernel"
        if attribute(node, "ceil_mode", 0) and attribute(node, "count_include_pad", 0):
            return "with ceil_mode and count_include_pad the integer AveragePool divides by other numbers"
    return None


def _refuse_transparent(node: Node) -> str | None:
    data = node.inputs[0]
    if data is None or data.dtype not in (DataType.FLOAT, None) or constant_array(data) is not None:
        return "its data is not float"
    if gives_places(node):
        return "its indices are read"
    if node.op_type == "Resize" and attribute(node, "mode", "nearest") != "nearest":
        return "ONNX Runtime resizes codes only by nearest neighbour"
    return None


def _refuse_joining(node: Node) -> str | None:
    return None if all(v is None or v.dtype in (DataType.FLOAT, None) for v in node.inputs) else "its data is not float"


def _refuse_on_codes(node: Node) -> str | None:
    data = node.inputs[0]
    if data is None or data.dtype not in (DataType.FLOAT, None):
        return "its data is not float"
    if node.op_type in CLIPPING_ACTIVATIONS and clip_bounds(node) is None:
        return "its bounds are computed, not constant"
    if node.op_type == "SpaceToDepth" and not _is_between_layers(node):
        return "its codes are fast as slices of 2x2 blocks between layers alone"
    if node.op_type == "Pad":
        fill = input_of(node, 2)
        if attribute(node, "mode", "constant") == "constant" and fill is not None and constant_scalar(fill) != 0:
            return "it pads with something else than zero"
    return None


def _is_between_layers(node: Node) -> bool:
    """Whether 2x2 blocks of what a convolution writes become channels that convolutions alone read.

    There ONNX Runtime keeps pixels together; on NCHW slices of single numbers take longer than the operator in float.
    """
    maker = None if node.inputs[0] is None else node.inputs[0].producer()
    if maker is not None and maker.op_type in CLIPPING_ACTIVATIONS and maker.inputs[0] is not None:
        maker = maker.inputs[0].producer()
    layered = maker is not None and maker.op_type == "Conv"
    readers = [use.node.op_type for use in node.outputs[0].uses()]
    return layered and attribute(node, "blocksize") == 2 and bool(readers) and set(readers) == {"Conv"}


def _refuse_line(node: Node) -> str | None:
    value = node.inputs[0]
    if value is None or value.dtype not in (DataType.FLOAT, None):
        return "its data is not float"
    if find_saturating_line(node) is None:
        return "its line does not rise"
    readers = [QUANTIZATION_RULES.get(use.node.op_type) for use in node.outputs[0].uses()]
    if not all(isinstance(rule, ComputingRule) for rule in readers):
        return "what reads it would have to take the parameters of its codes"
    return None


_BY_RULE = {
    WeightedRule: _refuse_weighted,
    ComputingRule: _refuse_computing,
    TransparentRule: _refuse_transparent,
    ConcatRule: _refuse_joining,
    IntegerDomainRule: _refuse_on_codes,
    SaturatingLineRule: _refuse_line,
}


def explain_dequantized_layer(layer: LayerPlan, plan: Plan, recipe: Recipe) -> str | None:
    """Why a layer with quantized weights runs in float all the same; None where it runs in integers."""
    if layer.data is None:
        return "only weights are quantized"
    read = plan.activations.get(layer.data)
    if read is not None and read.spec is not None and read.spec.bits == 16:
        return NO_16_BIT_KERNEL
    if layer.weight.bits == 16:
        return "weights of 16 bits have no integer kernel"
    if layer.blocked:
        return "weights with a scale for each block have no integer kernel"
    return None


def computes_at_load(node: Node, recipe: Recipe, target: Target) -> bool:
    """Whether the runtime makes float weights once, where it would do so at every run, or round activations, too.

    ONNX Runtime makes MatMulNBits of dequantized weights of a MatMul, or of a Gemm that is one.
    """
    product = may_become_nbits(node)
    if product and recipe.allow_matmul_nbits:
        return False
    return target.folds_constants or (product and target.on_ort)


def may_become_nbits(node: Node) -> bool:
    """Whether ONNX Runtime makes MatMulNBits of such a layer where its weights are dequantized at every run."""
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0))


def orient_rule(node: Node, rule: WeightedRule) -> WeightedRule:
    """The rule with the axes of this node: transB of a Gemm swaps them."""
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        return WeightedRule(rule.input_axis, rule.output_axis, rule.needs_output)
    return rule


def make_weight_spec(node: Node, rule: WeightedRule, recipe: Recipe, target: Target, least: int) -> QuantSpec:
    """Specify a layer's weights.

    rule: as `orient_rule` returns it. least: bits where no glob gives the layer its own.
    """
    bits = recipe.bits_of(node.name or "").weights or max(recipe.weight_bits, least)
    symmetric = recipe.scheme_of_weights(bits) is Scheme.SYMMETRIC
    match recipe.weight_granularity:
        case WeightGranularity.PER_TENSOR:
            return QuantSpec(bits, True, symmetric, PerTensor())
        case WeightGranularity.PER_CHANNEL if node.op_type in target.per_tensor_weight_ops or _has_grouped_outputs(
            node
        ):
            return QuantSpec(bits, True, symmetric, PerTensor())
        case WeightGranularity.PER_CHANNEL:
            return QuantSpec(bits, True, symmetric, PerChannel(rule.output_axis))
        case WeightGranularity.PER_BLOCK:
            weight = constant_array(node.inputs[1])
            channels = recipe.block_size if weight is None else weight.shape[rule.input_axis]
            size = min(recipe.block_size, channels) * _kernel_area(node)
            return QuantSpec(bits, True, symmetric, PerBlock(rule.input_axis, size))


def _has_grouped_outputs(node: Node) -> bool:
    """Whether the weights' output axis covers one group only: then outputs cannot have scales of their own."""
    return node.op_type == "ConvTranspose" and attribute(node, "group", 1) > 1


def _kernel_area(node: Node) -> int:
    """Elements of one input channel along the flattened axis 1 of the weights: kH * kW for a Conv, else 1."""
    weight = constant_array(input_of(node, 1))
    return int(np.prod(weight.shape[2:])) if node.op_type == "Conv" and weight is not None else 1


def find_shortcut_input(model: Model, add: Node, sides: Sequence[Value], layers: Collection[Node]) -> Value | None:
    """The shortcut of a residual Add: the input that is not the layer it can be fused into; None where there is none.

    sides: its inputs that are no constants. layers: all nodes with weights.
    """
    if len(sides) != 2 or sides[0] is sides[1]:
        return None
    fusible = [side.producer() in layers and model.sole_reader(side) is add for side in sides]
    if not any(fusible):
        return None
    if all(fusible):
        return min(sides, key=lambda side: _layer_depth(model, side, layers))
    return sides[fusible.index(False)]


def _layer_depth(model: Model, value: Value, layers: Collection[Node]) -> int:
    """The number of layers with weights on the longest way to a tensor."""
    found: dict[Node, int] = {}
    for node in model.nodes():
        before = (source.producer() for source in node.inputs if source is not None)
        found[node] = (node in layers) + max((found[n] for n in before if n in found), default=0)
        if node is value.producer():
            return found[node]
    return 0
