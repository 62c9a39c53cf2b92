"""Weights, scales and biases of a Q/DQ file as PyTorch learns them, and back into the file.

    codes   q = clamp(round(w / s) + z, q_min, q_max)       w = s_0 v        s = s_0 exp(u)
    bias    b = b_0 + t

v is a weight in codes of the file, u the logarithm of how far a scale has moved, s_0 the scale in the file: one
learning rate means the same to layers whose weights differ a thousandfold, as those do that BatchNormalization was
folded into, and to layers of other bits. Gradients of v and u are those of LSQ (see torchmath.py).

Where the file stores a bias in steps of s_x s_w, scales stay so large that it fits (see weights.py). Pairs of products
may overflow 16 bits on some CPUs (see saturation.py): `fit_pairs` lets none be worse than in the file, unless it fits.

Sources: Esser et al. 2020, arXiv 1902.08153 (LSQ); Bhalgat et al. 2020, arXiv 2004.09576, for activations whose zero is
not at the lowest code.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qconv.ir.model import Model, Value, attribute
from qconv.ir.stored_weights import constant_numbers
from qconv.quantization.layer import LARGEST_BIAS_CODE
from qconv.quantization.overflow import SMALLEST_WIDENING, worst_pair_ratio
from qconv.training.sites import Sites, WeightSite
from qconv.training.torchmath import rounded

FURTHEST = float(np.log(8.0))
"""So far may a scale move from that in the file."""
TYPICAL_CODE = 16
"""Of what a layer reads: a bias is learned in steps of what the largest weight makes of it."""


class _Weights:
    """Those of one site. v: (O, I/g, ...); u: as the scale; t: (O,), None where no bias is learned."""

    def __init__(self, site: WeightSite, device: torch.device) -> None:
        codes, scale = _numbers(site.codes), _numbers(site.scale).astype(np.float32)
        self.site = site
        self.scale_in_file = _tensor(scale, device)
        self.zero, self.low, self.high = (_tensor(numbers, device) for numbers in (site.zero, site.low, site.high))
        self.v = _tensor(codes.astype(np.int64) - site.zero, device)
        self.u = torch.zeros_like(self.scale_in_file)
        self.t: Tensor | None = None
        if site.bias is not None:
            own = bias_of(site.bias)
            step = scale.reshape(-1) if scale.size == own.size else np.full(own.size, scale.max())
            typical = 1.0 if site.input_scale is None else TYPICAL_CODE * float(_numbers(site.input_scale).mean())
            self.bias_in_file = _tensor(own, device)
            reach = max(1, int(np.maximum(site.high - site.zero, site.zero - site.low).max()))
            self.unit = _tensor((step * reach * typical).reshape(own.shape), device)
            self.t = torch.zeros_like(self.bias_in_file)

    def bias(self) -> Tensor | None:
        """(O,)"""
        return None if self.t is None else self.bias_in_file + self.t * self.unit

    def scale(self, read: Tensor | None) -> Tensor:
        """As it is stored. read: the scale of what the layer reads, None where no bias is stored in steps of both."""
        scale, bias = self.scale_in_file * torch.exp(self.u), self.bias()
        if bias is None or read is None or bias_parts(self.site) is None:
            return scale
        least = bias.detach().abs() / (LARGEST_BIAS_CODE * read.detach())
        return torch.maximum(scale, least.reshape(scale.shape) if scale.numel() == least.numel() else least.max())

    def stored_bias(self, bias: Tensor, scale: Tensor, read: Tensor | None) -> dict[str, Tensor]:
        """A bias as the file has it, by the names of its parts: a float constant, or codes and their steps."""
        parts = bias_parts(self.site)
        if parts is None:
            return {_name(self.site.bias): bias}
        step = _numbers(parts[1])
        steps = (scale * read).reshape(step.shape) if read is not None else _tensor(step, bias.device)
        return {_name(parts[0]): rounded(bias / steps), _name(parts[1]): steps}

    def fit_pairs(self) -> None:
        """Widen scales until no output has a pair of products that is worse than its worst one in the file, or fits."""
        axis = pairs_axis(self.site)
        if axis is None:
            return
        before = worst_pair_ratio(_numbers(self.site.codes), axis)
        limit = np.maximum(before if self.u.numel() == before.size else before.max(), 1.0)
        while True:
            worst = worst_pair_ratio(self.codes().cpu().numpy().astype(np.int8), axis)
            gain = np.where(worst > limit, np.maximum(worst / limit, SMALLEST_WIDENING), 1.0)
            if gain.max() == 1:
                return
            step = gain.reshape(self.u.shape) if gain.size == self.u.numel() else gain.max()
            self.u += torch.from_numpy(np.log(np.asarray(step, np.float32))).to(self.u.device)

    def codes(self) -> Tensor:
        """As they are stored, but floats."""
        site, move, axes = self.site, torch.exp(-self.u), self.v.ndim
        if move.numel() == 1:
            move = move.reshape([1] * axes)
        elif site.block:
            move = move.repeat_interleave(site.block, dim=site.axis).narrow(site.axis, 0, self.v.shape[site.axis])
        elif move.ndim < axes:
            move = move.reshape([-1 if i == site.axis else 1 for i in range(axes)])
        return torch.clamp(rounded(self.v * move) + self.zero, self.low, self.high)


class Learned:
    """All that is learned of a model. kinds: what has a learning rate of its own, and its tensors by name."""

    def __init__(self, sites: Sites, device: str = "cpu") -> None:
        place = torch.device(device)
        self._scales = {site.scale: _tensor(_numbers(site.scale), place) for site in sites.activations}
        self._moves = {value: torch.zeros_like(scale) for value, scale in self._scales.items()}
        self._weights = [_Weights(site, place) for site in sites.weights]
        self.kinds: dict[str, dict[str, Tensor]] = {
            "weights": {_name(w.site.codes): w.v for w in self._weights},
            "weight_scales": {_name(w.site.scale): w.u for w in self._weights},
            "activation_scales": {_name(value): u for value, u in self._moves.items()},
            "biases": {_name(w.site.bias): w.t for w in self._weights if w.t is not None},
        }
        for tensor in self.tensors:
            tensor.requires_grad_()

    @property
    def tensors(self) -> Iterator[Tensor]:
        """Everything that is learned."""
        for tensors in self.kinds.values():
            yield from tensors.values()

    def given(self, used: Container[str] | None = None) -> dict[str, Tensor]:
        """What stands for the file's constants in `Network.run`, by name. used: names to do without all others."""
        found = {_name(v): self._scale(v) for v in self._scales if used is None or _name(v) in used}
        for weights in self._weights:
            if used is not None and _name(weights.site.codes) not in used:
                continue
            read = self._read_by(weights.site)
            scale, bias = weights.scale(read), weights.bias()
            found[_name(weights.site.scale)] = scale
            found[_name(weights.site.codes)] = weights.codes()
            if bias is not None:
                found |= weights.stored_bias(bias, scale, read)
        return found

    def hold(self) -> None:
        """Bring scales back that have moved too far."""
        with torch.no_grad():
            for tensor in (*self._moves.values(), *(weights.u for weights in self._weights)):
                tensor.clamp_(-FURTHEST, FURTHEST)

    def fit_pairs(self) -> None:
        """Widen scales until no layer has a worse pair of products than in the file; for each state that is kept."""
        with torch.no_grad():
            for weights in self._weights:
                weights.fit_pairs()

    def _scale(self, value: Value) -> Tensor:
        return self._scales[value] * torch.exp(self._moves[value])

    def _read_by(self, site: WeightSite) -> Tensor | None:
        return self._scale(site.input_scale) if site.input_scale in self._scales else None

    # -- back into the file ----------------------------------------------------------------------------------------

    def write(self, model: Model) -> None:
        """Put the numbers of now into the model, which is the one that `sites` are of."""
        with torch.no_grad():
            given = {name: tensor.cpu().numpy() for name, tensor in self.given().items()}
        for value in self._scales:
            model.set_constant(value, given[_name(value)])
        for weights in self._weights:
            site, parts = weights.site, bias_parts(weights.site)
            bias = [] if site.bias is None else [*(parts or [site.bias])]
            for value in (site.scale, site.codes, *bias):
                numbers = given[_name(value)]
                whole = numbers if _numbers(value).dtype == np.float32 else np.rint(numbers.astype(np.float64))
                model.set_constant(value, whole.astype(_numbers(value).dtype))

    # -- what is kept --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, NDArray[np.float32]]:
        """All that was learned, by kinds and names."""
        return {
            f"{kind}/{name}": tensor.detach().cpu().numpy().copy()
            for kind, tensors in self.kinds.items()
            for name, tensor in tensors.items()
        }

    def restore(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """What `state` gave."""
        with torch.no_grad():
            for kind, tensors in self.kinds.items():
                for name, tensor in tensors.items():
                    tensor.copy_(torch.from_numpy(np.array(state[f"{kind}/{name}"])))


def bias_parts(site: WeightSite) -> tuple[Value, Value] | None:
    """Codes and steps of a bias that is stored so."""
    node = None if site.bias is None else site.bias.producer()
    if node is None:
        return None
    codes, step = node.inputs[:2]
    assert codes is not None
    assert step is not None
    return codes, step


def pairs_axis(site: WeightSite) -> int | None:
    """Where the outputs lie, for 8-bit weights whose products a kernel may add in pairs; None for others."""
    node, codes = site.nodes[0], _numbers(site.codes)
    if site.bits != 8 or codes.dtype != np.int8 or site.block or site.input_scale is None or site.zero.any():
        return None
    if node.op_type == "Conv":
        groups = attribute(node, "group", 1)
        return None if groups > 1 and codes.shape[:2] == (groups, 1) else 0
    if node.op_type in ("Gemm", "MatMul") and codes.ndim == 2:
        return 0 if attribute(node, "transB", 0) else 1
    return None


def bias_of(value: Value) -> NDArray[np.float32]:
    """What a layer adds, as it is stored."""
    node = value.producer()
    if node is None:
        return _numbers(value).astype(np.float32)
    codes, scale = (_numbers(part) for part in node.inputs[:2])
    return np.asarray(codes.astype(np.float32) * scale, np.float32)


def _numbers(value: Value | None) -> NDArray[Any]:
    found = constant_numbers(value)
    assert found is not None
    return found


def _tensor(numbers: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(numbers, np.float32)).to(device)


def _name(value: Value | None) -> str:
    assert value is not None
    return value.name or ""
