"""Reads layers with constant weights in one form, scales their inputs or outputs, and writes them back.

    out[g, o] = sum over i, k of weight[g, o, i, k] * in[g, i] + bias[g, o]

Weights of Conv, ConvTranspose, Gemm and MatMul lie differently in memory: only this module knows how. Products are
computed in float64 and rounded once. The notes on input means and channel statistics are read and kept true here.

Nodes that scale and shift each channel are read as y = gain * x + shift. For BatchNormalization gain = gamma /
sqrt(var + eps) and shift = beta - mean * gain, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.ir.channel_stats import ChannelDistribution
from qconv.ir.model import (
    Model,
    Node,
    Value,
    attribute,
    constant_array,
    drop_attribute,
    drop_note,
    get_note,
    input_of,
    nodes_inside,
    set_note,
)
from qconv.ir.operators import QUANTIZATION_RULES, WeightedRule
from qconv.ir.rewriting import EditRefused, data_input, describe_node, standard_op_type, title

Float64 = NDArray[np.float64]

FLOAT_MAX = float(np.finfo(np.float32).max)

_MEANS_NOTE, _STATS_NOTE = "means", "made"

INPUTS_FIRST = {
    name: rule.input_axis == 0 for name, rule in QUANTIZATION_RULES.items() if isinstance(rule, WeightedRule)
}
"""Whether the weights begin with the input channels, (I, O/g, kH, kW), or not, (O, I/g, kH, kW). transB turns a
Gemm's."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer with constant weights, all kinds in one form, with groups g, outputs o, inputs i and kernel positions k:

        out[g, o] = sum over i, k of weight[g, o, i, k] * in[g, i] + bias[g, o]

    weight: (G, O/G, I/G, K), bias: (O,). means: E[in], (I,), where its note says that (`input_means_of`). made: what
    out is like, (O,), where BatchNormalization says that.
    """

    node: Node
    weight: NDArray[np.floating[Any]]
    bias: Float64
    means: Float64 | None = None
    made: ChannelDistribution | None = None

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return int(self.weight.shape[0] * self.weight.shape[1])

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return int(self.weight.shape[0] * self.weight.shape[2])


def read_layer(node: Node) -> Layer:
    """The layer `node` stands for; alpha and beta of Gemm are in its weight and bias. Raises EditRefused."""
    stored = constant_array(node.inputs[1])
    if stored is None:
        raise EditRefused(f"the weights of {describe_node(node)} are computed")
    if stored.dtype.kind != "f" or (standard_op_type(node) in ("Gemm", "MatMul") and stored.ndim != 2):
        raise EditRefused(f"the weights of {describe_node(node)} are not a float matrix")
    if not stored.size:
        raise EditRefused(f"the weights of {describe_node(node)} are empty")
    if attribute(node, "transA", 0):
        raise EditRefused(f"{describe_node(node)} transposes its data")
    weight = _by_group(node, stored)
    bias = _read_bias(node, weight.shape[0] * weight.shape[1])
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    means = input_means_of(node)
    known = None if isinstance(means, str) else means
    return Layer(
        node, _scale_weight(weight, np.full((1, 1, 1, 1), alpha)), bias * beta, known, channel_stats_of(node.outputs[0])
    )


def layers_inside(node: Node) -> list[Node]:
    """The layers in the bodies of a node (If, Loop, Scan), which stay float as they are."""
    return [inner for inner in nodes_inside(node) if standard_op_type(inner) in INPUTS_FIRST]


def input_means_of(node: Node) -> Float64 | str:
    """The noted means of a layer's input, (I,), or why they are not known."""
    found: Float64 | str | None = get_note(node, _MEANS_NOTE)
    return "it came about by folding" if found is None else found


def has_input_means(node: Node) -> bool:
    """Whether a layer has a note of its input means."""
    return get_note(node, _MEANS_NOTE) is not None


def set_input_means(node: Node, means: Float64 | str) -> None:
    """Note the means of a layer's input, or why they are not known."""
    set_note(node, _MEANS_NOTE, means)


def channel_stats_of(value: Value) -> ChannelDistribution | None:
    """The noted distribution of a tensor's channels, from BatchNormalization; None without a note."""
    found: ChannelDistribution | None = get_note(value, _STATS_NOTE)
    return found


def set_channel_stats(value: Value, found: ChannelDistribution) -> None:
    """Note the distribution of a tensor. A pass that scales or shifts the tensor must transform the note, too."""
    set_note(value, _STATS_NOTE, found)


def forget_channel_stats(value: Value) -> None:
    """Drop the note of a tensor whose channels are others from now on."""
    drop_note(value, _STATS_NOTE)


def forget_input_means(node: Node) -> None:
    """Drop the note of a layer whose input channels are others from now on."""
    drop_note(node, _MEANS_NOTE)


def transform_channel_stats(value: Value, gain: Float64, shift: Float64) -> None:
    """Update the note of a tensor, if it has one, to that of gain * x + shift. gain, shift: (C,) or (1,)."""
    found = channel_stats_of(value)
    if found is not None:
        set_channel_stats(value, found.scaled(gain, shift))


def weight_rows_of(node: Node, stored: NDArray[Any]) -> NDArray[Any]:
    """Arrange an array of the shape of a layer's weights as rows, one an output: (G, O/G, I/G * K)."""
    by_group = _by_group(node, stored)
    return by_group.reshape(*by_group.shape[:2], -1)


def weights_from_rows(node: Node, rows: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """The reverse of `weight_rows_of`. shape: of the layer's weights."""
    area = int(np.prod(shape[2:]))
    return _as_stored(node, rows.reshape(*rows.shape[:2], -1, area), shape)


def _by_group(node: Node, stored: NDArray[Any]) -> NDArray[Any]:
    """Arrange weights as (G, O/G, I/G, K)."""
    groups = attribute(node, "group", 1)
    first, second = stored.shape[:2]
    found = stored.reshape(groups, first // groups, second, -1)
    return found.swapaxes(1, 2) if _inputs_first(node) else found


def _as_stored(node: Node, by_group: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    return (by_group.swapaxes(1, 2) if _inputs_first(node) else by_group).reshape(tuple(shape))


def weight_of(node: Node) -> Value:
    """The second input, which every layer has."""
    value = node.inputs[1]
    assert value is not None
    return value


def _inputs_first(node: Node) -> bool:
    return INPUTS_FIRST[standard_op_type(node)] and not attribute(node, "transB", 0)


def _read_bias(node: Node, outputs: int) -> Float64:
    value = input_of(node, 2)
    if value is None:
        return np.zeros(outputs)
    numbers = constant_array(value)
    if numbers is None:
        raise EditRefused(f"the bias of {describe_node(node)} is computed")
    if numbers.size != 1 and numbers.shape not in ((outputs,), (1, outputs)):
        raise EditRefused(f"the bias of {describe_node(node)} is not one number for each output")
    return np.broadcast_to(numbers.reshape(-1).astype(np.float64), (outputs,))


def _scale_weight(weight: NDArray[np.floating[Any]], gain: Float64) -> NDArray[np.floating[Any]]:
    """weight * gain, computed in float64 a piece at a time, so that large weights need no large float64 copy."""
    if np.all(gain == 1):
        return weight
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        out = np.empty(weight.shape, weight.dtype)
        np.multiply(weight, gain, out=out, dtype=np.float64, casting="same_kind")
    return out


def scale_outputs(layer: Layer, gain: Float64, shift: Float64) -> Layer:
    """The layer followed by gain * out + shift, both (O,) or (1,)."""
    gain = np.broadcast_to(gain, (layer.outputs,))
    groups = layer.weight.shape[0]
    weight = _scale_weight(layer.weight, gain.reshape(groups, -1, 1, 1))
    made = None if layer.made is None else layer.made.scaled(gain, shift)
    return replace(layer, weight=weight, bias=layer.bias * gain + shift, made=made)


def scale_inputs(layer: Layer, gain: Float64, shift: Float64) -> Layer:
    """The layer reading gain * in + shift, both (I,) or (1,); right with a shift only where nothing is padded."""
    groups = layer.weight.shape[0]
    gain = np.broadcast_to(gain, (layer.inputs,)).reshape(groups, -1)
    shift = np.broadcast_to(shift, (layer.inputs,)).reshape(groups, -1)
    bias, means = layer.bias, layer.means
    if shift.any():
        bias = bias + np.einsum("goik,gi->go", layer.weight, shift, dtype=np.float64).reshape(-1)
    if means is not None:  # of what is read from now on; where the gain is zero the weights are, too
        nothing = np.zeros(layer.inputs)
        means = np.divide(means - shift.reshape(-1), gain.reshape(-1), out=nothing, where=gain.reshape(-1) != 0)
    return replace(layer, weight=_scale_weight(layer.weight, gain.reshape(groups, 1, -1, 1)), bias=bias, means=means)


def check_finite(layer: Layer) -> None:
    """Raise EditRefused where float32 cannot hold the layer's numbers."""
    if not (np.isfinite(layer.weight).all() and np.all(np.abs(layer.bias) <= FLOAT_MAX)):
        raise EditRefused(f"{describe_node(layer.node)} would get numbers that float32 does not have")


def write_layer(model: Model, layer: Layer) -> None:
    """Give the node the layer's weight and bias as constants of its own: the old ones may have other readers."""
    node = layer.node
    stored = constant_array(node.inputs[1])
    assert stored is not None
    weight = _as_stored(node, layer.weight, stored.shape)
    if not np.array_equal(weight, stored):
        model.set_input(node, 1, model.constant(f"{title(node)}_weight", weight))
    if layer.bias.any() or input_of(node, 2) is not None:
        model.set_input(node, 2, model.constant(f"{title(node)}_bias", layer.bias.astype(stored.dtype)))
    if layer.means is not None:
        set_input_means(node, layer.means)
    if layer.made is not None:
        set_channel_stats(node.outputs[0], layer.made)
    drop_attribute(node, "alpha")
    drop_attribute(node, "beta")


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """y = gain * x + shift, both float64 of shape (C,) or (1,)."""

    gain: Float64
    shift: Float64


# (operator, index of the constant c) -> gain and shift
AFFINE_OPS: dict[tuple[str, int], Callable[[Float64], tuple[Float64, Float64]]] = {
    ("Mul", 0): lambda c: (c, 0 * c),
    ("Mul", 1): lambda c: (c, 0 * c),
    ("Add", 0): lambda c: (np.ones_like(c), c),
    ("Add", 1): lambda c: (np.ones_like(c), c),
    ("Sub", 0): lambda c: (-np.ones_like(c), c),
    ("Sub", 1): lambda c: (np.ones_like(c), -c),
    ("Div", 1): lambda c: (1 / c, 0 * c),
}


def affine_data_input(node: Node) -> Value | None:
    """The input that is scaled and shifted: the first of BatchNormalization, the one beside a float constant else."""
    if standard_op_type(node) == "BatchNormalization":
        return data_input(node)
    values = [constant_array(value) for value in node.inputs]
    constants = [index for index, numbers in enumerate(values) if numbers is not None and numbers.dtype.kind == "f"]
    return node.inputs[1 - constants[0]] if len(constants) == 1 else None


def read_affine(node: Node, axes: int | None, axis: int = 1) -> Affine:
    """The scale and shift that `node` applies to data of `axes` axes, channels along `axis`. Raises EditRefused."""
    if standard_op_type(node) == "BatchNormalization":
        gain, shift = _read_batchnorm(node)
    else:
        index = 0 if constant_array(node.inputs[0]) is not None else 1
        if (node.op_type, index) not in AFFINE_OPS:
            raise EditRefused("it divides a constant by the data")
        constant = constant_array(node.inputs[index])
        assert constant is not None
        with np.errstate(divide="ignore", invalid="ignore"):
            gain, shift = AFFINE_OPS[node.op_type, index](
                _constant_per_channel(constant, axes, axis).astype(np.float64)
            )
    if not (np.isfinite(gain).all() and np.isfinite(shift).all()):
        raise EditRefused("its scale or shift is not finite")
    return Affine(gain, shift)


def _read_batchnorm(node: Node) -> tuple[Float64, Float64]:
    if attribute(node, "training_mode", 0) or any(value.name for value in node.outputs[1:]):
        raise EditRefused("it runs in training mode")
    numbers = [constant_array(value) for value in node.inputs[1:5]]
    if any(n is None for n in numbers):
        raise EditRefused("its scale, shift or statistics are computed")
    gamma, beta, mean, var = (n.astype(np.float64) for n in numbers if n is not None)
    deviation2 = var + attribute(node, "epsilon", 1e-5)
    if not np.all(deviation2 > 0):
        raise EditRefused("its variance is negative, zero or not a number")
    gain = gamma / np.sqrt(deviation2)  # (C,)
    return gain, beta - mean * gain


def _constant_per_channel(constant: NDArray[Any], axes: int | None, axis: int) -> NDArray[Any]:
    """A constant that is broadcast against `axes` axes as (1,) or, if it varies along `axis` alone, as (C,)."""
    if constant.size == 1 and constant.ndim <= (1 if axes is None else axes):
        return constant.reshape(1)
    if axes is None:
        raise EditRefused("the rank of its data is not known")
    shape = (1,) * (axes - constant.ndim) + constant.shape
    if len(shape) != axes or axis >= axes or constant.size != shape[axis]:
        raise EditRefused("its constant is neither one number nor one for each channel")
    return constant.reshape(-1)
