"""How the weights of a layer become codes: bits, granularity and the axes along which scales go."""

from __future__ import annotations

import numpy as np

from qconv.config.choices import Scheme, WeightGranularity
from qconv.config.recipe import Recipe
from qconv.config.targets import Target
from qconv.ir.model import Node, attribute, constant_array, input_of
from qconv.ir.operators import WeightedRule
from qconv.quantizer import PerBlock, PerChannel, PerTensor, QuantSpec


def oriented(node: Node, rule: WeightedRule) -> WeightedRule:
    """The rule with the axes of this very node: Gemm's transB swaps them."""
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        return WeightedRule(rule.input_axis, rule.output_axis, rule.needs_output)
    return rule


def weight_spec(node: Node, rule: WeightedRule, recipe: Recipe, target: Target, least: int) -> QuantSpec:
    """Of a layer's weights. rule: as `oriented`. least: bits that it has where none are asked for by its name."""
    bits = recipe.bits_of(node.name or "").weights or max(recipe.weight_bits, least)
    symmetric = recipe.scheme_of_weights(bits) is Scheme.SYMMETRIC
    match recipe.weight_granularity:
        case WeightGranularity.PER_TENSOR:
            return QuantSpec(bits, True, symmetric, PerTensor())
        case WeightGranularity.PER_CHANNEL if node.op_type in target.whole_kernels or _repeats(node):
            return QuantSpec(bits, True, symmetric, PerTensor())
        case WeightGranularity.PER_CHANNEL:
            return QuantSpec(bits, True, symmetric, PerChannel(rule.output_axis))
        case WeightGranularity.PER_BLOCK:
            weight = constant_array(node.inputs[1])
            channels = recipe.block_size if weight is None else weight.shape[rule.input_axis]
            size = min(recipe.block_size, channels) * _kernel_area(node)
            return QuantSpec(bits, True, symmetric, PerBlock(rule.input_axis, size))


def _repeats(node: Node) -> bool:
    """Whether the weights' axis of outputs holds those of one group alone: then no output has a scale of its own."""
    return node.op_type == "ConvTranspose" and attribute(node, "group", 1) > 1


def _kernel_area(node: Node) -> int:
    """Elements that one input channel takes along the flattened axis 1 of a Conv's weights: kH * kW, else 1."""
    weight = constant_array(input_of(node, 1))
    return int(np.prod(weight.shape[2:])) if node.op_type == "Conv" and weight is not None else 1
