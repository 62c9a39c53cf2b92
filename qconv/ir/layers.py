"""Layers with constant weights, all kinds in one form, to be scaled from either side.

A rewrite reads a node as a `Layer`, which is a value, scales it, and writes it back. The weights of Conv,
ConvTranspose, Gemm and MatMul lie differently in memory: only this module knows how. Products are computed in float64
and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.ir.edits import Refused, called, kind, title
from qconv.ir.graph import Model, Node, Value, array, attribute, drop_attribute, input_of, note, noted
from qconv.ir.normal import Normal

Float64 = NDArray[np.float64]
FLOAT_MAX = float(np.finfo(np.float32).max)
_MEANS, _MADE = "means", "made"

# Whether the weights begin with the input channels, (I, O/g, kH, kW), or not, (O, I/g, kH, kW). transB turns a Gemm's.
INPUTS_FIRST = {"Conv": False, "ConvTranspose": True, "Gemm": True, "MatMul": True}


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer with constant weights, all kinds in one form, with groups g, outputs o, inputs i and kernel positions k:

        out[g, o] = sum over i, k of weight[g, o, i, k] * in[g, i] + bias[g, o]

    weight: (G, O/G, I/G, K), bias: (O,). means: E[in], (I,), where its note says that (expected.py). made: what out is
    like, (O,), where BatchNormalization says that.
    """

    node: Node
    weight: NDArray[np.floating[Any]]
    bias: Float64
    means: Float64 | None = None
    made: Normal | None = None

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return int(self.weight.shape[0] * self.weight.shape[1])

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return int(self.weight.shape[0] * self.weight.shape[2])


def read_layer(node: Node) -> Layer:
    """The layer `node` stands for; alpha and beta of Gemm are in its weight and bias. Raises Refused."""
    stored = array(node.inputs[1])
    if stored is None:
        raise Refused(f"the weights of {called(node)} are computed")
    if stored.dtype.kind != "f" or (kind(node) in ("Gemm", "MatMul") and stored.ndim != 2):
        raise Refused(f"the weights of {called(node)} are not a float matrix")
    if attribute(node, "transA", 0):
        raise Refused(f"{called(node)} transposes its data")
    weight = _by_group(node, stored)
    bias = _read_bias(node, weight.shape[0] * weight.shape[1])
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    means = means_of(node)
    known = None if isinstance(means, str) else means
    return Layer(node, _product(weight, np.full((1, 1, 1, 1), alpha)), bias * beta, known, made_of(node.outputs[0]))


def means_of(node: Node) -> Float64 | str:
    """The note of a layer: the means of what it reads, (I,), or why they are not known."""
    found: Float64 | str | None = noted(node, _MEANS)
    return "it came about by folding" if found is None else found


def has_means(node: Node) -> bool:
    """Whether a layer has a note."""
    return noted(node, _MEANS) is not None


def note_means(node: Node, means: Float64 | str) -> None:
    """Give a layer its note."""
    note(node, _MEANS, means)


def made_of(value: Value) -> Normal | None:
    """The note of a tensor: what its channels are like, by BatchNormalization; None where there is none."""
    found: Normal | None = noted(value, _MADE)
    return found


def note_made(value: Value, found: Normal) -> None:
    """Give a tensor its note. Whoever scales or shifts the tensor does so with the note, too."""
    note(value, _MADE, found)


def move_made(value: Value, gain: Float64, shift: Float64) -> None:
    """Bring the note of a tensor, if it has one, up to date: it is gain * x + shift from now on, both (C,) or (1,)."""
    found = made_of(value)
    if found is not None:
        note_made(value, found.scaled(gain, shift))


def rows_of(node: Node, stored: NDArray[Any]) -> NDArray[Any]:
    """What is stored in the shape of a layer's weights as rows, one an output: (G, O/G, I/G * K)."""
    by_group = _by_group(node, stored)
    return by_group.reshape(*by_group.shape[:2], -1)


def stored_of(node: Node, rows: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """The reverse of `rows_of`; shape: that of the layer's weights."""
    area = int(np.prod(shape[2:]))
    return _as_stored(node, rows.reshape(*rows.shape[:2], -1, area), shape)


def _by_group(node: Node, stored: NDArray[Any]) -> NDArray[Any]:
    """(G, O/G, I/G, K)"""
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
    return INPUTS_FIRST[kind(node)] and not attribute(node, "transB", 0)


def _read_bias(node: Node, outputs: int) -> Float64:
    value = input_of(node, 2)
    if value is None:
        return np.zeros(outputs)
    numbers = array(value)
    if numbers is None:
        raise Refused(f"the bias of {called(node)} is computed")
    if numbers.size != 1 and numbers.shape not in ((outputs,), (1, outputs)):
        raise Refused(f"the bias of {called(node)} is not one number for each output")
    return np.broadcast_to(numbers.reshape(-1).astype(np.float64), (outputs,))


def _product(weight: NDArray[np.floating[Any]], gain: Float64) -> NDArray[np.floating[Any]]:
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
    weight = _product(layer.weight, gain.reshape(groups, -1, 1, 1))
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
    return replace(layer, weight=_product(layer.weight, gain.reshape(groups, 1, -1, 1)), bias=bias, means=means)


def check_finite(layer: Layer) -> None:
    """Raise Refused where float32 cannot hold the layer's numbers."""
    if not (np.isfinite(layer.weight).all() and np.all(np.abs(layer.bias) <= FLOAT_MAX)):
        raise Refused(f"{called(layer.node)} would get numbers that float32 does not have")


def write_layer(model: Model, layer: Layer) -> None:
    """Give the node the layer's weight and bias as constants of its own: the old ones may have other readers."""
    node = layer.node
    stored = array(node.inputs[1])
    assert stored is not None
    weight = _as_stored(node, layer.weight, stored.shape)
    if not np.array_equal(weight, stored):
        model.set_input(node, 1, model.constant(f"{title(node)}_weight", weight))
    if layer.bias.any() or input_of(node, 2) is not None:
        model.set_input(node, 2, model.constant(f"{title(node)}_bias", layer.bias.astype(stored.dtype)))
    if layer.means is not None:
        note_means(node, layer.means)
    if layer.made is not None:
        note_made(node.outputs[0], layer.made)
    drop_attribute(node, "alpha")
    drop_attribute(node, "beta")
