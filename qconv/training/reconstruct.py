"""Block reconstruction: codes of weights and biases learned block by block on a few pictures.

    min ||y - y_q||^2 / ||y||^2        y, y_q: what the float and the quantized network hand on behind a block

A block reads what the quantized blocks before it hand on, as it will. Half of all roundings of activations are left
out, drawn anew at each step (QDrop): of what it reads, number by number, and inside. Codes begin as second-order
rounding left them, and move through straight-through gradients; some pictures are held back, and a block that is no
nearer on them stays as it was.

Sources: Li et al. 2021, arXiv 2102.05426 (BRECQ); Wei et al. 2022, arXiv 2203.05740 (QDrop). Theirs begin at weights
rounded to the nearest code and learn to which side each goes (AdaRound), in 20000 steps of each block; what
second-order rounding has found is a better place to begin, and takes hundreds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qconv.config.recipe import Recipe
from qconv.errors import Change, Finding, QconvError, Skipped, format_count
from qconv.ir.model import Model
from qconv.training.blocks import End, ends
from qconv.training.learnable import Learned
from qconv.training.sites import find_sites
from qconv.training.torchfake import Drop
from qconv.training.torchgraph import Network
from qconv.training.torchrun import determined

STEP = "reconstruct"
PICTURES, MOST_BYTES, KEPT = 512, 2**30, 5
"""Most pictures that are looked at: fewer where KEPT tensors of all of them, at the widest cut, take more than that."""
STEPS = {"fast": 100, "balanced": 200, "best": 300}
"""Of each block, by effort."""
BATCH, SMALLEST_BATCH, NUMBERS = 32, 8, 2**22
"""Pictures a step, fewer where a block hands on more than so many numbers of them."""
RATES = {"weights": 1e-2, "biases": 3e-3}
"""See learnable.py for what one means. Scales stay: ranges were chosen by the outputs already."""
DROPPED = 0.5
HELD = 1 / 8
"""Share of the pictures that a block is judged by."""
AT_ONCE = 32
"""Pictures of a run without gradients, where the network takes any number."""
NOTHING = 1e-30
Feeds = Sequence[Mapping[str, NDArray[Any]]]
Numbers = dict[str, Tensor]


def reconstruct(
    model: Model,
    original: Model,
    recipe: Recipe,
    feeds: Feeds,
    fixed: int | None,
    progress: Callable[[str, int, int], None],
) -> list[Finding]:
    """Learn codes and biases of the quantized `model`, in place. original: the folded float network it was made of.

    feeds: pictures as both networks take them. fixed: the batch that these are fixed to, None where they take any.
    Raises QconvError for operators that PyTorch is not given, and for too few pictures.
    """
    with determined(recipe.threads):
        teacher = Network(original)
        batches = [teacher.on_arrays(batch) for batch in feeds]
        seen = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        unit = fixed or 1
        sizes = _sizes(teacher, original, seen, fixed)
        found = ends(model, original, sizes)
        if len(found) == 1:
            return [Skipped(STEP, "all blocks", "no output holds a row of numbers for each picture")]
        widest = max(sum(sizes.get(name, 0) for name, *_ in end.candidates) for end in found)
        most = max(2 * unit, MOST_BYTES // max(1, 4 * KEPT * widest) // unit * unit)
        seen = {name: x[:most] for name, x in seen.items()}
        if len(next(iter(seen.values()))) < 2 * unit:
            fact = f"--rounding reconstruct with {format_count(unit, 'picture')}: some are kept apart to judge by."
            raise QconvError(fact, f"pass {2 * unit} pictures or more with --calib.")
        learned = Learned(find_sites(model, recipe))
        rebuilt = _Rebuilt(Network(model), teacher, learned, recipe.seed, STEPS[recipe.effort], fixed)
        findings = rebuilt.run(found, seen, lambda done, total: progress(STEP, done, total))
        learned.write(model)
        return findings


def _sizes(teacher: Network, original: Model, seen: Numbers, fixed: int | None) -> dict[str, int]:
    """Numbers a picture of those tensors of the float network that hold as many rows as there are pictures."""
    names = [value.name or "" for node in original.nodes() for value in node.outputs if value.name]
    rows = fixed or 2
    found = teacher.run({name: torch.cat([x, x])[:rows] for name, x in seen.items()}, names)
    return {
        name: tensor.numel() // rows
        for name, tensor in found.items()
        if tensor.is_floating_point() and tensor.ndim >= 2 and tensor.shape[0] == rows
    }


class _Rebuilt:
    """Both networks on their way from block to block."""

    def __init__(
        self, pupil: Network, teacher: Network, learned: Learned, seed: int, steps: int, fixed: int | None
    ) -> None:
        self.pupil, self.teacher, self.learned, self.seed, self.steps = pupil, teacher, learned, seed, steps
        self.fixed, self.at_once = fixed, fixed or AT_ONCE
        self.used: frozenset[str] = frozenset()  # by the block that is being learned
        for kind, tensors in learned.kinds.items():
            for tensor in tensors.values():
                tensor.requires_grad_(kind in RATES)

    def run(self, found: Sequence[End], seen: Numbers, progress: Callable[[int, int], None]) -> list[Finding]:
        """All blocks, in order."""
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
                names = {n: _nearest(values, c, said[n]) for n, c in zip(end.names, end.candidates, strict=True)}
                target = {name: values[names[name]] for name in end.names}
                findings.append(self._learn(index, end, exact, now, target, parameters))
                here, exact, now = end, target, self._said(now, end)
            progress(index, len(found) - 1)
        return findings

    def _parameters(self) -> dict[str, list[Tensor]]:
        kinds = self.learned.kinds
        return {kind: [tensor for name, tensor in kinds[kind].items() if name in self.used] for kind in RATES}

    def _learn(
        self, index: int, end: End, exact: Numbers, now: Numbers, target: Numbers, parameters: dict[str, list[Tensor]]
    ) -> Finding:
        """Learn one block, and say what came of it."""
        unit, count = self.fixed or 1, len(next(iter(exact.values())))
        held = max(1, int(HELD * count) // unit) * unit
        judged, taught = slice(0, held), np.arange(held, count)
        rng = np.random.default_rng([self.seed, index])
        drop = Drop(DROPPED, torch.Generator().manual_seed(self.seed * 1009 + index))
        before, error = self.learned.state(), self._error(now, target, end, judged)
        batch = self._batch(sum(target[name][0].numel() for name in end.names), len(taught))
        norms = {name: target[name].square().mean().clamp_min(NOTHING) for name in end.names}
        optimizer = torch.optim.Adam(
            [{"params": parameters[kind], "lr": 0.0, "rate": RATES[kind]} for kind in parameters if parameters[kind]]
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
                group["lr"] = group["rate"] * 0.5 * (1 + math.cos(math.pi * step / self.steps))
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
        """Pictures a step, in whole batches of the network's own. numbers: that the block hands on of each."""
        unit = self.fixed or 1
        wanted = min(max(SMALLEST_BATCH, min(BATCH, NUMBERS // max(1, numbers))), taught)
        return max(1, wanted // unit) * unit

    def _said(self, given: Numbers, end: End) -> Numbers:
        return self._in_pieces(self.pupil, given, end.names, self.learned.given(self.used))

    def _error(self, given: Numbers, target: Numbers, end: End, part: slice) -> float:
        said = self._said({name: x[part] for name, x in given.items()}, end)
        return sum(_apart(target[name][part], said[name]) for name in end.names)

    def _in_pieces(
        self,
        network: Network,
        given: Mapping[str, Tensor],
        wanted: Sequence[str],
        more: Mapping[str, Tensor] | None = None,
    ) -> Numbers:
        """What a network makes of many pictures. more: given whole with each piece."""
        found: dict[str, list[Tensor]] = {name: [] for name in wanted}
        with torch.no_grad():
            for start in range(0, len(next(iter(given.values()))), self.at_once):
                part = {name: x[start : start + self.at_once] for name, x in given.items()}
                for name, value in network.run({**part, **(more or {})}, wanted).items():
                    found[name].append(value)
        return {name: torch.cat(values) for name, values in found.items()}


def _nearest(values: Numbers, options: Sequence[str], to: Tensor) -> str:
    """Which of some tensors of the float network a tensor of the quantized one stands for."""
    return min(options, key=lambda option: _apart(values[option], to))


def _apart(wanted: Tensor, said: Tensor) -> float:
    if wanted.shape != said.shape:
        return math.inf
    return float((wanted - said).square().sum() / wanted.square().sum().clamp_min(NOTHING))
