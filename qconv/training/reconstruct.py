"""This module reconstructs blocks: it learns integer weights and biases block by block on a few images.

    min ||y - y_q||^2 / ||y||^2        y, y_q: outputs of a block in the float and in the quantized network

A block lies between two places where one quantized tensor is all that goes on; wide middles of bottlenecks stay
inside. It reads what the quantized blocks before it hand on. Half of all activation roundings are dropped at each step
(QDrop). Learning starts from second-order rounding with straight-through gradients, not from AdaRound; a block that is
no better on held-out images stays as it was.

Sources: Li et al. 2021, arXiv 2102.05426 (BRECQ); Wei et al. 2022, arXiv 2203.05740 (QDrop).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qconv.config.recipe import Recipe
from qconv.errors import Change, Finding, QconvError, Skipped, format_count
from qconv.ir.model import Model, Node, Value, constant_array
from qconv.ir.tensor_matching import find_comparison_points
from qconv.reporter import Reporter
from qconv.training.network import QuantDrop, TorchNetwork, half_cosine, run_deterministically
from qconv.training.trainable import LearnedParameters, find_sites

WIDER_FACTOR, NEAR_CUTS = 2, 4
"""A cut is inside a bottleneck where NEAR_CUTS on both sides have one that carries WIDER_FACTOR times less."""


@dataclass(frozen=True, slots=True)
class BlockBoundary:
    """A place where a block begins or ends.

    Attributes:
        names: Tensors of the quantized network that all hold the same values; several only at the network's own ends.
        candidates: For each, tensors of the float network that it may stand for.
    """

    names: tuple[str, ...]
    candidates: tuple[tuple[str, ...], ...]


def find_block_boundaries(quantized: Model, original: Model, sizes: Mapping[str, int]) -> list[BlockBoundary]:
    """Find the network's inputs, all places where it can be cut, and its outputs.

    Args:
        quantized: The quantized model.
        original: The folded float network that it was made of.
        sizes: Values per image of the float network's tensors with one row per image, by name: others are no
        boundaries.
    """
    by_codes = {point.codes: point for point in find_comparison_points(quantized, original) if point.codes is not None}
    found = []
    for point in (by_codes[codes] for codes in _find_cut_points(quantized) if codes in by_codes):
        names = tuple(value.name or "" for value in point.values)
        candidates = tuple(value.name or "" for value in point.candidates if value.name in sizes)
        if candidates:
            found.append((BlockBoundary(names, (candidates,) * len(names)), sizes[candidates[0]]))
    inputs = tuple(value.name or "" for value in original.graph.inputs if constant_array(value) is None)
    outputs = tuple(value.name or "" for value in original.graph.outputs if value.name in sizes)
    last = [BlockBoundary(outputs, tuple((name,) for name in outputs))] if outputs else []
    return [BlockBoundary(inputs, tuple((name,) for name in inputs)), *_drop_bottleneck_middles(found), *last]


def _find_cut_points(model: Model) -> Iterator[Value]:
    """Find integer tensors that are all that later nodes read of earlier ones, the network's inputs included."""
    nodes = model.nodes()
    last: dict[Value, int] = {}
    for index, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None and constant_array(value) is None:
                last[value] = index
    last |= dict.fromkeys(model.graph.outputs, len(nodes))
    live = {value for value in model.graph.inputs if constant_array(value) is None}
    computed = set(live)
    for index, node in enumerate(nodes):
        if computed.isdisjoint(value for value in node.inputs if value is not None):
            continue  # dequantizers of weights
        computed.update(node.outputs)
        live = {value for value in (*live, *node.outputs) if last.get(value, -1) > index}
        if len(live) == 1 and all(map(_is_dequantizer, model.readers(next(iter(live))))):
            yield next(iter(live))


def _is_dequantizer(node: Node) -> bool:
    return node.op_type == "DequantizeLinear"


def _drop_bottleneck_middles(found: list[tuple[BlockBoundary, int]]) -> list[BlockBoundary]:
    sizes = [size for _, size in found]
    kept = []
    for index, (end, size) in enumerate(found):
        before, behind = sizes[max(0, index - NEAR_CUTS) : index], sizes[index + 1 : index + 1 + NEAR_CUTS]
        if not (min(before, default=size) * WIDER_FACTOR < size and min(behind, default=size) * WIDER_FACTOR < size):
            kept.append(end)
    return kept


STEP = "reconstruct"

MOST_IMAGES, MOST_BYTES, KEPT_TENSORS = 512, 2**30, 5
"""Most images; fewer where KEPT_TENSORS of them all, at the widest cut, would take more than MOST_BYTES."""

STEPS_BY_EFFORT = {"fast": 100, "balanced": 200, "best": 300}
"""Optimization steps of each block, by effort."""

LARGEST_BATCH, SMALLEST_BATCH, NUMBERS_PER_BATCH = 32, 8, 2**22
"""Images a step, fewer where a block's output has more than NUMBERS_PER_BATCH values."""

LEARNING_RATES = {"weights": 1e-2, "biases": 3e-3}
"""In the units of `trainable`. Scales are not learned: ranges were chosen by the outputs already."""

DROP_PROBABILITY = 0.5

HELD_OUT_SHARE = 1 / 8
"""Share of the images that a block is validated on."""

INFERENCE_BATCH = 32
"""Images per run without gradients, where the network takes any number."""

LEAST_NORM = 1e-30

Feeds = Sequence[Mapping[str, NDArray[Any]]]

TensorsByName = dict[str, Tensor]


def reconstruct_blocks(
    model: Model,
    original: Model,
    recipe: Recipe,
    feeds: Feeds,
    fixed: int | None,
    seed: int,
    reporter: Reporter,
) -> list[Finding]:
    """Learn integer weights and biases of the quantized `model`, in place.

    Args:
        model: The quantized model.
        original: The folded float network that it was made of.
        recipe: How it was quantized.
        feeds: Images as both networks take them.
        fixed: The batch size that the networks are fixed to; None where they take any.
        reporter: Hears of progress and warnings.

    Raises:
        QconvError: PyTorch does not run an operator, or there are too few images.
    """
    with run_deterministically(recipe.threads):
        teacher = TorchNetwork(original)
        batches = [teacher.on_arrays(batch) for batch in feeds]
        seen = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        unit = fixed or 1
        sizes = _measure_sizes(teacher, original, seen, fixed)
        found = find_block_boundaries(model, original, sizes)
        if len(found) == 1:
            return [Skipped(STEP, "all blocks", "no output holds a row of numbers for each picture")]
        widest = max(sum(sizes.get(name, 0) for name, *_ in end.candidates) for end in found)
        most = max(2 * unit, MOST_BYTES // max(1, 4 * KEPT_TENSORS * widest) // unit * unit)
        seen = {name: x[:most] for name, x in seen.items()}
        if len(next(iter(seen.values()))) < 2 * unit:
            fact = f"--rounding reconstruct with {format_count(unit, 'picture')}: some are kept apart to judge by."
            raise QconvError(fact, f"pass {2 * unit} pictures or more with --calib.")
        learned = LearnedParameters(find_sites(model, recipe))
        rebuilt = _BlockReconstruction(
            TorchNetwork(model), teacher, learned, seed, STEPS_BY_EFFORT[recipe.effort], fixed
        )
        findings = rebuilt.run(found, seen, lambda done, total: reporter.progress(STEP, done, total))
        learned.write(model)
        return findings


def _measure_sizes(teacher: TorchNetwork, original: Model, seen: TensorsByName, fixed: int | None) -> dict[str, int]:
    """Measure the values per image of those float tensors that have one row per image."""
    names = [value.name or "" for node in original.nodes() for value in node.outputs if value.name]
    rows = fixed or 2
    found = teacher.run({name: torch.cat([x, x])[:rows] for name, x in seen.items()}, names)
    return {
        name: tensor.numel() // rows
        for name, tensor in found.items()
        if tensor.is_floating_point() and tensor.ndim >= 2 and tensor.shape[0] == rows
    }


class _BlockReconstruction:
    """Both networks, reconstructed block by block."""

    def __init__(
        self,
        pupil: TorchNetwork,
        teacher: TorchNetwork,
        learned: LearnedParameters,
        seed: int,
        steps: int,
        fixed: int | None,
    ) -> None:
        self.pupil, self.teacher, self.learned, self.seed, self.steps = pupil, teacher, learned, seed, steps
        self.fixed, self.at_once = fixed, fixed or INFERENCE_BATCH
        self.used: frozenset[str] = frozenset()  # by the block that is being learned
        for kind, tensors in learned.kinds.items():
            for tensor in tensors.values():
                tensor.requires_grad_(kind in LEARNING_RATES)

    def run(
        self, found: Sequence[BlockBoundary], seen: TensorsByName, progress: Callable[[int, int], None]
    ) -> list[Finding]:
        """Reconstruct all blocks, in order."""
        findings: list[Finding] = []
        here = found[0]
        names = {name: name for name in here.names}
        exact = {name: seen[name] for name in here.names}
        now = dict(exact)
        for index, end in enumerate(found[1:], 1):
            self.used = self.pupil.read(here.names, end.names)
            parameters = self._parameters()
            if parameters["weights"]:
                options = sorted({name for candidates in end.candidates for name in candidates})
                values = self._in_pieces(self.teacher, {names[name]: exact[name] for name in here.names}, options)
                said = self._said(now, end)
                names = {n: _nearest_tensor(values, c, said[n]) for n, c in zip(end.names, end.candidates, strict=True)}
                target = {name: values[names[name]] for name in end.names}
                findings.append(self._learn(index, end, exact, now, target, parameters))
                here, exact, now = end, target, self._said(now, end)
            progress(index, len(found) - 1)
        return findings

    def _parameters(self) -> dict[str, list[Tensor]]:
        kinds = self.learned.kinds
        return {kind: [tensor for name, tensor in kinds[kind].items() if name in self.used] for kind in LEARNING_RATES}

    def _learn(
        self,
        index: int,
        end: BlockBoundary,
        exact: TensorsByName,
        now: TensorsByName,
        target: TensorsByName,
        parameters: dict[str, list[Tensor]],
    ) -> Finding:
        """Learn one block. Returns what came of it as findings."""
        unit, count = self.fixed or 1, len(next(iter(exact.values())))
        held = max(1, int(HELD_OUT_SHARE * count) // unit) * unit
        judged, taught = slice(0, held), np.arange(held, count)
        rng = np.random.default_rng([self.seed, index])
        drop = QuantDrop(DROP_PROBABILITY, torch.Generator().manual_seed(self.seed * 1009 + index))
        before, error = self.learned.state(), self._error(now, target, end, judged)
        batch = self._batch(sum(target[name][0].numel() for name in end.names), len(taught))
        norms = {name: target[name].square().mean().clamp_min(LEAST_NORM) for name in end.names}
        optimizer = torch.optim.Adam(
            [
                {"params": parameters[kind], "lr": 0.0, "rate": LEARNING_RATES[kind]}
                for kind in parameters
                if parameters[kind]
            ]
        )
        for step in range(self.steps):
            optimizer.zero_grad()
            drawn = rng.choice(taught, batch, replace=False)
            for part in np.split(drawn, batch // (self.fixed or batch)):
                chosen = torch.from_numpy(part)
                given = {name: drop.mixed(now[name][chosen], exact[name][chosen]) for name in exact}
                said = self.pupil.run({**given, **self.learned.given(self.used)}, end.names, drop)
                losses = [(said[name] - target[name][chosen]).square().mean() / norms[name] for name in end.names]
                (torch.stack(losses).sum() * (len(part) / batch)).backward()
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * half_cosine(step, self.steps)
            optimizer.step()
            self.learned.hold()
        learned = self.learned.state()
        self.learned.fit_pairs()
        fits = all(np.array_equal(array, learned[name]) for name, array in self.learned.state().items())
        after = self._error(now, target, end, judged)
        if fits and after < error:
            what = f"the error on pictures held back fell from {error:.3g} to {after:.3g}"
            return Change(STEP, end.names[0], what, "block reconstructed")
        self.learned.restore(before)
        why = f"the error on pictures held back is {error:.3g}, and was {after:.3g} after it"
        return Skipped(STEP, end.names[0], why if fits else "pairs of 8-bit products would be beyond 16 bits after it")

    def _batch(self, numbers: int, taught: int) -> int:
        """Choose the images a step, in whole batches of the network. numbers: values per image at the block's end."""
        unit = self.fixed or 1
        wanted = min(max(SMALLEST_BATCH, min(LARGEST_BATCH, NUMBERS_PER_BATCH // max(1, numbers))), taught)
        return max(1, wanted // unit) * unit

    def _said(self, given: TensorsByName, end: BlockBoundary) -> TensorsByName:
        return self._in_pieces(self.pupil, given, end.names, self.learned.given(self.used))

    def _error(self, given: TensorsByName, target: TensorsByName, end: BlockBoundary, part: slice) -> float:
        said = self._said({name: x[part] for name, x in given.items()}, end)
        return sum(_relative_error(target[name][part], said[name]) for name in end.names)

    def _in_pieces(
        self,
        network: TorchNetwork,
        given: Mapping[str, Tensor],
        wanted: Sequence[str],
        more: Mapping[str, Tensor] | None = None,
    ) -> TensorsByName:
        """Run a network on many images in batches. more: values that are given whole with each batch."""
        found: dict[str, list[Tensor]] = {name: [] for name in wanted}
        with torch.no_grad():
            for start in range(0, len(next(iter(given.values()))), self.at_once):
                part = {name: x[start : start + self.at_once] for name, x in given.items()}
                for name, value in network.run({**part, **(more or {})}, wanted).items():
                    found[name].append(value)
        return {name: torch.cat(values) for name, values in found.items()}


def _nearest_tensor(values: TensorsByName, options: Sequence[str], to: Tensor) -> str:
    """Choose the tensor of the float network that is nearest to `to`, one of the quantized network."""
    return min(options, key=lambda option: _relative_error(values[option], to))


def _relative_error(wanted: Tensor, said: Tensor) -> float:
    if wanted.shape != said.shape:
        return math.inf
    return float((wanted - said).square().sum() / wanted.square().sum().clamp_min(LEAST_NORM))
