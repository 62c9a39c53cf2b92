"""This module makes the weights, scales and biases of a Q/DQ file trainable in PyTorch, and writes them back.

    weights q = clamp(round(w / s) + z, q_min, q_max)       w = s_0 v        s = s_0 exp(u)
    bias    b = b_0 + t

v is a weight in steps of the file, u the logarithm of how far a scale has moved, s_0 the scale in the file: one
learning rate fits all layers, though their weights may differ a thousandfold, as those do that BatchNormalization was
folded into.

One scale often stands for several quantizers by chance, because equal numbers are stored once. Before training each
group of quantizers that must agree gets a scale of its own. They must agree where integers pass from one to the other:
behind a quantizer up to its dequantizers, and across an operator that hands integers on (MaxPool, Reshape, Concat, ...)
where both sides have the same parameters now, since only then the runtime runs it on integers.

Where the file stores a bias in steps of s_x s_w, scales stay so large that it fits int32. Pairs of products may
overflow 16 bits on some CPUs: `fit_pairs` lets none be worse than in the file, unless it fits.

Sources: Esser et al. 2020, arXiv 1902.08153 (LSQ), whose gradients those of v and u are; Bhalgat et al. 2020, arXiv
2004.09576, for a zero that is not at the lowest code.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qconv.config.choices import Scheme
from qconv.config.recipe import Recipe
from qconv.errors import QconvError
from qconv.ir.model import DataType, Model, Node, Value, attribute, constant_array, input_of
from qconv.ir.operators import QUANTIZATION_RULES, ConcatRule, IntegerDomainRule, TransparentRule, WeightedRule
from qconv.ir.stored_weights import StoredWeights, constant_numbers, find_stored_weights, weight_bits_of
from qconv.quantization.layer import LARGEST_BIAS_CODE
from qconv.quantization.saturation import SMALLEST_WIDENING, worst_pair_ratio
from qconv.quantizer import broadcast_parameter
from qconv.training.onnx_ops import broadcast_tensor, round_straight_through

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ActivationSite:
    """Quantizers and dequantizers that share one scale, of shape () or (C,)."""

    scale: Value
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True, eq=False)
class WeightSite:
    """The weights of a layer, or of several that share them.

    Attributes:
        codes: The stored integer weights, (O, I/g, ...).
        scale: Their scale as stored.
        axis, block: The axis along which scales differ, and the block size; `broadcast_parameter` takes them.
        zero, low, high: Zero point and limits of the integers, broadcastable to them.
        bias: What the layers add, (O,): a float constant or the output of a dequantizer; None where nothing can be
        learned. input_scale: The scale of the integers that the layer reads; None where it reads floats.
    """

    nodes: tuple[Node, ...]
    codes: Value
    scale: Value
    axis: int
    block: int
    zero: Ints
    low: Ints
    high: Ints
    bits: int
    bias: Value | None
    input_scale: Value | None


@dataclass(frozen=True, slots=True)
class LearnableSites:
    """All parameters of a model that can be learned."""

    activations: tuple[ActivationSite, ...]
    weights: tuple[WeightSite, ...]


def find_sites(model: Model, recipe: Recipe | None) -> LearnableSites:
    """Prepare a quantized model for learning; it computes what it did. Returns what can be learned.

    Args:
        model: The quantized model, changed in place: groups of quantizers get a scale of their own.
        recipe: Of a file by qconv, which says how many bits weights have; else their type does.

    Raises:
        QconvError: The model has no quantizers.
    """
    activations = tuple(_separate_scales(model))
    weights = tuple(_find_weight_sites(model, recipe))
    if not weights:
        raise QconvError(
            "The model has no layer with stored codes between quantizers and dequantizers.",
            "pass a file that `qconv quantize` wrote; operators on codes (QOperator format) cannot be trained.",
        )
    return LearnableSites(activations, weights)


# -- activations -------------------------------------------------------------------------------------------------------


def _separate_scales(model: Model) -> Iterator[ActivationSite]:
    groups: dict[Node, set[Node]] = {}
    for node in model.nodes():
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and _is_computed(node.inputs[0]):
            groups[node] = {node}
    for node in groups:
        for other in _find_bound_quantizers(model, node):
            if other in groups and groups[other] is not groups[node] and _is_same_quantization(node, other):
                groups[node] |= groups[other]
                for member in groups[other]:
                    groups[member] = groups[node]
    order = {node: index for index, node in enumerate(model.nodes())}
    for group in dict.fromkeys(map(frozenset, groups.values())):
        nodes = tuple(sorted(group, key=order.__getitem__))
        yield ActivationSite(_make_own_scale(model, nodes, 1), nodes)


def _is_computed(value: Value | None) -> bool:
    return value is not None and constant_numbers(value) is None


def _find_bound_quantizers(model: Model, node: Node) -> Iterator[Node]:
    """Find the quantizers and dequantizers that a node's output reaches without being computed with."""
    queue = list(node.outputs)
    on_codes = node.op_type == "QuantizeLinear"
    while queue:
        for reader in model.readers(queue.pop()):
            if reader.op_type in ("QuantizeLinear", "DequantizeLinear"):
                yield reader
            elif on_codes or isinstance(
                QUANTIZATION_RULES.get(reader.op_type), TransparentRule | ConcatRule | IntegerDomainRule
            ):
                queue += reader.outputs


def _is_same_quantization(one: Node, other: Node) -> bool:
    for index in (1, 2):
        a, b = (constant_numbers(input_of(node, index)) for node in (one, other))
        if (a is None) != (b is None) or (a is not None and b is not None and not np.array_equal(a, b)):
            return False
    return True


def _make_own_scale(model: Model, nodes: tuple[Node, ...], index: int) -> Value:
    """Return the scale (input `index`) that these nodes alone read; a copy where others read it as well."""
    value = nodes[0].inputs[index]
    assert value is not None
    readers = {reader for node in nodes if (v := node.inputs[index]) is not None for reader in model.readers(v)}
    if len({node.inputs[index] for node in nodes}) == 1 and readers <= set(nodes):
        return value
    numbers = constant_numbers(value)
    if numbers is None:
        raise QconvError(f"The scale of {nodes[0].name} is computed.", "pass a file that `qconv quantize` wrote.")
    own = model.constant(f"{nodes[0].outputs[0].name}_scale", numbers)
    for node in nodes:
        model.set_input(node, index, own)
    return own


# -- weights -----------------------------------------------------------------------------------------------------------


def _find_weight_sites(model: Model, recipe: Recipe | None) -> Iterator[WeightSite]:
    found: dict[Value, list[tuple[Node, StoredWeights]]] = {}
    for node in model.nodes():
        if isinstance(QUANTIZATION_RULES.get(node.op_type), WeightedRule):
            stored = find_stored_weights(model, node)
            if stored is not None and not stored.in_float and not stored.computed and stored.scale is not None:
                found.setdefault(stored.codes, []).append((node, stored))
    for codes, layers in found.items():
        nodes = tuple(node for node, _ in layers)
        node, stored = layers[0]
        numbers = constant_numbers(codes)
        made = stored.dequantizer
        assert numbers is not None
        assert made is not None
        reader = made.scale_reader
        index = next(i for i, v in enumerate(reader.inputs) if v is made.scale)
        scale = _make_own_scale(model, (reader,), index)
        by_channel = made.at_load and not made.block
        axis, block = stored.axis if by_channel else made.axis % max(numbers.ndim, 1), made.block
        whole = numbers.astype(np.int64)
        zero = broadcast_parameter(np.zeros(()) if stored.zero is None else stored.zero, whole.shape, axis, block)
        bits = weight_bits_of(node, stored, recipe)
        low, high = _find_code_limits(whole, zero.astype(np.int64), stored, bits, recipe)
        yield WeightSite(
            nodes, codes, scale, axis, block, zero.astype(np.int64), low, high, bits,
            _find_bias(model, nodes), _find_input_scale(node),
        )  # fmt: skip


def _find_code_limits(
    codes: Ints, zero: Ints, stored: StoredWeights, bits: int, recipe: Recipe | None
) -> tuple[Ints, Ints]:
    """Find the least and the largest integer that each weight may take, broadcastable to the stored integers.

    They are those of its bits: by the recipe of a file by qconv, else by the type. Where the zero point was moved to 0
    the file does not say where the range ends: then it is a window of 2^b values around those that there are.
    """
    signed = not stored.type.startswith("u")
    whole = int(DataType.__members__[stored.type.upper()].bitwidth)
    container = (-(1 << (whole - 1)), (1 << (whole - 1)) - 1) if signed else (0, (1 << whole) - 1)
    if recipe is not None and recipe.allocates_weights:
        own = _reduce_by_scale(np.abs(codes - zero), stored, _largest_code_of_bits)
        return zero - own, zero + own
    middle = 0 if signed else 1 << (whole - 1)
    moved = recipe is not None and recipe.moves_zero(bits) and recipe.scheme_of_weights(bits) is Scheme.ASYMMETRIC
    if moved:
        least = _reduce_by_scale(codes, stored, lambda rows: rows.min(axis=1))
        most = _reduce_by_scale(codes, stored, lambda rows: rows.max(axis=1))
        low = np.minimum(least - ((1 << bits) - 1 - (most - least)) // 2, 0)
        low = np.maximum(low, np.maximum(1 - (1 << bits), container[0]))
        return low, np.minimum(low + (1 << bits) - 1, container[1])
    if np.all(zero == middle):
        half = (1 << (bits - 1)) - 1
        deeper = int(codes.min(initial=0) - middle < -half)
        return np.maximum(zero - half - deeper, container[0]), np.minimum(zero + half, container[1])
    ends = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    return np.full(zero.shape, ends[0]), np.full(zero.shape, ends[1])


def _largest_code_of_bits(rows: Ints) -> Ints:
    """Return the largest integer of the bits that each row takes. rows: distances from zero."""
    most = np.maximum(rows.max(axis=1), 1)
    return np.array([(1 << int(reach).bit_length()) - 1 for reach in most])


def _reduce_by_scale(codes: Ints, stored: StoredWeights, what: Callable[[Ints], Ints]) -> Ints:
    """Reduce the integers of each scale by `what`, broadcastable to the integers; blocks count together."""
    if stored.scale is None or stored.scale.size == 1 or stored.block:
        return what(codes.reshape(1, -1)).reshape((1,) * codes.ndim)
    rows = np.moveaxis(codes, stored.axis, 0).reshape(codes.shape[stored.axis], -1)
    return broadcast_parameter(what(rows), codes.shape, stored.axis)


def _find_bias(model: Model, nodes: tuple[Node, ...]) -> Value | None:
    """Find what the layers of these nodes add; None where they differ or it cannot be learned."""
    value = input_of(nodes[0], 2)
    if len(nodes) > 1 or value is None or nodes[0].op_type == "MatMul" or len(value.uses()) > 1:
        return None
    node = value.producer()
    if node is None:
        return value if constant_array(value) is not None else None
    if node.op_type != "DequantizeLinear" or _is_computed(node.inputs[0]):
        return None
    _make_own_scale(model, (node,), 1)
    return value


def _find_input_scale(node: Node) -> Value | None:
    """Find the scale of the integers that a layer reads; None where it reads floats."""
    value = node.inputs[0]
    before = None if value is None else value.producer()
    return before.inputs[1] if before is not None and before.op_type == "DequantizeLinear" else None


LARGEST_LOG_SCALE = float(np.log(8.0))
"""Largest move of a scale from that in the file, as a logarithm."""

TYPICAL_CODE = 16
"""Typical integer input of a layer: a bias is learned in units of the largest weight times it."""


class _LearnedWeights:
    """The parameters of one site. v: (O, I/g, ...); u: as the scale; t: (O,), None where no bias is learned."""

    def __init__(self, site: WeightSite, device: torch.device) -> None:
        codes, scale = _read_numbers(site.codes), _read_numbers(site.scale).astype(np.float32)
        self.site = site
        self.scale_in_file = _to_tensor(scale, device)
        self.zero, self.low, self.high = (_to_tensor(numbers, device) for numbers in (site.zero, site.low, site.high))
        self.v = _to_tensor(codes.astype(np.int64) - site.zero, device)
        self.u = torch.zeros_like(self.scale_in_file)
        self.t: Tensor | None = None
        if site.bias is not None:
            own = read_bias(site.bias)
            step = scale.reshape(-1) if scale.size == own.size else np.full(own.size, scale.max())
            typical = 1.0 if site.input_scale is None else TYPICAL_CODE * float(_read_numbers(site.input_scale).mean())
            self.bias_in_file = _to_tensor(own, device)
            reach = max(1, int(np.maximum(site.high - site.zero, site.zero - site.low).max()))
            self.unit = _to_tensor((step * reach * typical).reshape(own.shape), device)
            self.t = torch.zeros_like(self.bias_in_file)

    def bias(self) -> Tensor | None:
        """Return the current bias, (O,)."""
        return None if self.t is None else self.bias_in_file + self.t * self.unit

    def scale(self, read: Tensor | None) -> Tensor:
        """Return the current scale as it is stored. read: the input's scale, None where no bias is stored in steps of
        both.
        """
        scale, bias = self.scale_in_file * torch.exp(self.u), self.bias()
        if bias is None or read is None or find_stored_bias(self.site) is None:
            return scale
        least = bias.detach().abs() / (LARGEST_BIAS_CODE * read.detach())
        return torch.maximum(scale, least.reshape(scale.shape) if scale.numel() == least.numel() else least.max())

    def stored_bias(self, bias: Tensor, scale: Tensor, read: Tensor | None) -> dict[str, Tensor]:
        """Return the parts of a bias as the file stores it, by name: a float constant, or integers and their step."""
        parts = find_stored_bias(self.site)
        if parts is None:
            return {_name_of(self.site.bias): bias}
        step = _read_numbers(parts[1])
        steps = (scale * read).reshape(step.shape) if read is not None else _to_tensor(step, bias.device)
        return {_name_of(parts[0]): round_straight_through(bias / steps), _name_of(parts[1]): steps}

    def fit_pairs(self) -> None:
        """Widen scales until no output has a worse pair of products than its worst in the file, unless it fits 16
        bits.
        """
        axis = find_pairs_axis(self.site)
        if axis is None:
            return
        before = worst_pair_ratio(_read_numbers(self.site.codes), axis)
        limit = np.maximum(before if self.u.numel() == before.size else before.max(), 1.0)
        while True:
            worst = worst_pair_ratio(self.codes().cpu().numpy().astype(np.int8), axis)
            gain = np.where(worst > limit, np.maximum(worst / limit, SMALLEST_WIDENING), 1.0)
            if gain.max() == 1:
                return
            step = gain.reshape(self.u.shape) if gain.size == self.u.numel() else gain.max()
            self.u += torch.from_numpy(np.log(np.asarray(step, np.float32))).to(self.u.device)

    def codes(self) -> Tensor:
        """Return the current weights as stored integers, in floats."""
        move = broadcast_tensor(torch.exp(-self.u), self.v, self.site.axis, self.site.block)
        return torch.clamp(round_straight_through(self.v * move) + self.zero, self.low, self.high)


class LearnedParameters:
    """All learned parameters of a model. kinds: tensors by name, for each kind with a learning rate of its own."""

    def __init__(self, sites: LearnableSites, device: str = "cpu") -> None:
        place = torch.device(device)
        self._scales = {site.scale: _to_tensor(_read_numbers(site.scale), place) for site in sites.activations}
        self._moves = {value: torch.zeros_like(scale) for value, scale in self._scales.items()}
        self._weights = [_LearnedWeights(site, place) for site in sites.weights]
        self.kinds: dict[str, dict[str, Tensor]] = {
            "weights": {_name_of(w.site.codes): w.v for w in self._weights},
            "weight_scales": {_name_of(w.site.scale): w.u for w in self._weights},
            "activation_scales": {_name_of(value): u for value, u in self._moves.items()},
            "biases": {_name_of(w.site.bias): w.t for w in self._weights if w.t is not None},
        }
        for tensor in self.tensors:
            tensor.requires_grad_()

    @property
    def tensors(self) -> Iterator[Tensor]:
        """Return all learned tensors."""
        for tensors in self.kinds.values():
            yield from tensors.values()

    def given(self, used: Container[str] | None = None) -> dict[str, Tensor]:
        """Return the values that stand for the file's constants in `TorchNetwork.run`, by name.

        Args:
            used: Names to compute; None for all.
        """
        found = {_name_of(v): self._scale(v) for v in self._scales if used is None or _name_of(v) in used}
        for weights in self._weights:
            if used is not None and _name_of(weights.site.codes) not in used:
                continue
            read = self._read_by(weights.site)
            scale, bias = weights.scale(read), weights.bias()
            found[_name_of(weights.site.scale)] = scale
            found[_name_of(weights.site.codes)] = weights.codes()
            if bias is not None:
                found |= weights.stored_bias(bias, scale, read)
        return found

    def hold(self) -> None:
        """Bring back scales that have moved further than LARGEST_LOG_SCALE."""
        with torch.no_grad():
            for tensor in (*self._moves.values(), *(weights.u for weights in self._weights)):
                tensor.clamp_(-LARGEST_LOG_SCALE, LARGEST_LOG_SCALE)

    def fit_pairs(self) -> None:
        """Widen scales until no layer has a worse pair of products than in the file, for each state that is kept."""
        with torch.no_grad():
            for weights in self._weights:
                weights.fit_pairs()

    def _scale(self, value: Value) -> Tensor:
        return self._scales[value] * torch.exp(self._moves[value])

    def _read_by(self, site: WeightSite) -> Tensor | None:
        return self._scale(site.input_scale) if site.input_scale in self._scales else None

    # -- back into the file ----------------------------------------------------------------------------------------

    def write(self, model: Model) -> None:
        """Write the current values into the model, the one that the sites are of."""
        with torch.no_grad():
            given = {name: tensor.cpu().numpy() for name, tensor in self.given().items()}
        for value in self._scales:
            model.set_constant(value, given[_name_of(value)])
        for weights in self._weights:
            site, parts = weights.site, find_stored_bias(weights.site)
            bias = [] if site.bias is None else [*(parts or [site.bias])]
            for value in (site.scale, site.codes, *bias):
                numbers = given[_name_of(value)]
                whole = numbers if _read_numbers(value).dtype == np.float32 else np.rint(numbers.astype(np.float64))
                model.set_constant(value, whole.astype(_read_numbers(value).dtype))

    # -- what is kept --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Return all learned values, by kind and name."""
        return {
            f"{kind}/{name}": tensor.detach().cpu().numpy().copy()
            for kind, tensors in self.kinds.items()
            for name, tensor in tensors.items()
        }

    def restore(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Restore what `state` gave."""
        with torch.no_grad():
            for kind, tensors in self.kinds.items():
                for name, tensor in tensors.items():
                    tensor.copy_(torch.from_numpy(np.array(state[f"{kind}/{name}"])))


def find_stored_bias(site: WeightSite) -> tuple[Value, Value] | None:
    """Find the integers and the step of a bias that is stored as integers; None for a float bias."""
    node = None if site.bias is None else site.bias.producer()
    if node is None:
        return None
    codes, step = node.inputs[:2]
    assert codes is not None
    assert step is not None
    return codes, step


def find_pairs_axis(site: WeightSite) -> int | None:
    """Find the axis of outputs of 8-bit weights whose products a kernel may add in pairs; None for others."""
    node, codes = site.nodes[0], _read_numbers(site.codes)
    if site.bits != 8 or codes.dtype != np.int8 or site.block or site.input_scale is None or site.zero.any():
        return None
    if node.op_type == "Conv":
        groups = attribute(node, "group", 1)
        return None if groups > 1 and codes.shape[:2] == (groups, 1) else 0
    if node.op_type in ("Gemm", "MatMul") and codes.ndim == 2:
        return 0 if attribute(node, "transB", 0) else 1
    return None


def read_bias(value: Value) -> NDArray[np.float32]:
    """Read a bias as float values, (O,), however it is stored."""
    node = value.producer()
    if node is None:
        return _read_numbers(value).astype(np.float32)
    codes, scale = (_read_numbers(part) for part in node.inputs[:2])
    return np.asarray(codes.astype(np.float32) * scale, np.float32)


def _read_numbers(value: Value | None) -> NDArray[Any]:
    found = constant_numbers(value)
    assert found is not None
    return found


def _to_tensor(numbers: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(numbers, np.float32)).to(device)


def _name_of(value: Value | None) -> str:
    assert value is not None
    return value.name or ""
