"""Block reconstruction: codes of weights, biases and scales of activations learned block by block on a few pictures.

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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qconv.blocks import End, ends
from qconv.findings import Change, Finding, Skipped
from qconv.graph import Model
from qconv.learnable import Learned
from qconv.recipe import Recipe
from qconv.sites import find_sites
from qconv.torchfake import Drop
from qconv.torchgraph import Network
from qconv.torchrun import determined

STEP = "reconstruct"
PICTURES = 512
"""Most that are looked at."""
STEPS = {"fast": 100, "balanced": 200, "best": 300}
"""Of each block, by effort."""
BATCH, SMALLEST_BATCH, NUMBERS = 32, 8, 2**22
"""Pictures a step, fewer where a block hands on more than so many numbers of them."""
RATES = {"weights": 1e-2, "activation_scales": 1e-3, "biases": 3e-3}
"""See learnable.py for what one means."""
DROPPED = 0.5
HELD = 1 / 8
"""Share of the pictures that a block is judged by."""
AT_ONCE = 32
"""Pictures of a run without gradients."""
Feeds = Sequence[Mapping[str, NDArray[Any]]]
Numbers = dict[str, Tensor]


def reconstruct(
    model: Model, original: Model, recipe: Recipe, feeds: Feeds, progress: Callable[[str, int, int], None]
) -> list[Finding]:
    """Learn the numbers of the quantized `model`, in place. original: the folded float network that it was made of.

    feeds: pictures as both networks take them. Raises QconvError for operators that PyTorch is not given.
    """
    with determined(recipe.threads):
        teacher = Network(original)
        batches = [teacher.on_arrays(batch) for batch in feeds]
        seen = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        sizes = _sizes(teacher, original, seen)
        learned = Learned(find_sites(model, recipe))
        rebuilt = _Rebuilt(Network(model), teacher, learned, recipe.seed, STEPS[recipe.effort])
        findings = rebuilt.run(ends(model, original, sizes), seen, lambda done, total: progress(STEP, done, total))
        learned.write(model)
        return findings


def _sizes(teacher: Network, original: Model, seen: Numbers) -> dict[str, int]:
    """Numbers a picture of every tensor of the float network."""
    names = [value.name or "" for node in original.nodes() for value in node.outputs if value.name]
    found = teacher.run({name: x[:1] for name, x in seen.items()}, names)
    return {name: tensor.numel() for name, tensor in found.items()}


@dataclass(frozen=True, slots=True)
class _Block:
    """given, wanted: names in the quantized network; exact_given, exact_wanted: of the float one, one for each."""

    given: tuple[str, ...]
    wanted: tuple[str, ...]
    exact_given: tuple[str, ...]
    exact_wanted: tuple[str, ...]


class _Rebuilt:
    """Both networks on their way from block to block."""

    def __init__(self, pupil: Network, teacher: Network, learned: Learned, seed: int, steps: int) -> None:
        self.pupil, self.teacher, self.learned, self.seed, self.steps = pupil, teacher, learned, seed, steps

    def run(self, found: Sequence[End], seen: Numbers, progress: Callable[[int, int], None]) -> list[Finding]:
        """All blocks, in order."""
        findings: list[Finding] = []
        here = found[0]
        exact = {name: seen[name] for name in here.names}
        rounded_all = dict(exact)
        names: dict[str, str] = {name: name for name in here.names}
        for index, end in enumerate(found[1:], 1):
            last = index == len(found) - 1
            wanted = {name for options in end.candidates for name in options}
            values = _in_pieces(self.teacher, {names[name]: exact[name] for name in here.names}, sorted(wanted))
            now = _in_pieces(self.pupil, {**rounded_all}, end.names, self.learned.given())
            chosen = {
                name: _nearest(values, options, now[name])
                for name, options in zip(end.names, end.candidates, strict=True)
            }
            target = {name: values[chosen[name]] for name in end.names}
            used = self.pupil.read(here.names, end.names)
            parameters = self._parameters(used)
            if parameters["weights"] or last:
                if parameters["weights"]:
                    findings.append(self._learn(index, end, exact, rounded_all, target, parameters))
                    now = _in_pieces(self.pupil, rounded_all, end.names, self.learned.given())
                here, names, exact, rounded_all = end, chosen, target, now
            progress(index, len(found) - 1)
        return findings

    def _parameters(self, used: frozenset[str]) -> dict[str, list[Tensor]]:
        return {kind: [tensor for name, tensor in self.learned.kinds[kind].items() if name in used] for kind in RATES}

    def _learn(
        self,
        index: int,
        end: End,
        exact: Numbers,
        rounded_all: Numbers,
        target: Numbers,
        parameters: dict[str, list[Tensor]],
    ) -> Finding:
        """Learn one block, and say what came of it."""
        count = len(next(iter(exact.values())))
        held = max(1, int(HELD * count))
        judged, taught = slice(0, held), np.arange(held if count > 1 else 0, count)
        rng = np.random.default_rng([self.seed, index])
        drop = Drop(DROPPED, torch.Generator().manual_seed(self.seed * 1009 + index))
        tensors = [tensor for kind in parameters.values() for tensor in kind]
        before = [tensor.detach().clone() for tensor in tensors]
        error = self._error(rounded_all, target, end, judged)
        size = sum(target[name][:1].numel() for name in end.names)
        batch = min(max(SMALLEST_BATCH, min(BATCH, NUMBERS // size)), len(taught))
        optimizer = torch.optim.Adam(
            [{"params": parameters[kind], "lr": 0.0, "rate": RATES[kind]} for kind in parameters if parameters[kind]]
        )
        norms = {name: target[name].square().mean() for name in end.names}
        for step in range(self.steps):
            chosen = torch.from_numpy(rng.choice(taught, batch, replace=False))
            given = {name: drop.mixed(rounded_all[name][chosen], exact[name][chosen]) for name in exact}
            said = self.pupil.run({**given, **self.learned.given()}, end.names, drop)
            loss = sum(
                ((said[name] - target[name][chosen]).square().mean() / norms[name] for name in end.names),
                start=torch.zeros(()),
            )
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * 0.5 * (1 + math.cos(math.pi * step / self.steps))
            optimizer.step()
            self.learned.hold()
        self.learned.fit_pairs()
        after = self._error(rounded_all, target, end, judged)
        where = end.names[0]
        if not after < error:
            with torch.no_grad():
                for tensor, old in zip(tensors, before, strict=True):
                    tensor.copy_(old)
            return Skipped(STEP, where, f"the error on pictures held back is {error:.3g}, and was {after:.3g} after it")
        what = f"the error on pictures held back fell from {error:.3g} to {after:.3g}"
        return Change(STEP, where, what, "block reconstructed")

    def _error(self, given: Numbers, target: Numbers, end: End, part: slice) -> float:
        now = _in_pieces(self.pupil, {n: x[part] for n, x in given.items()}, end.names, self.learned.given())
        return sum(_apart(target[name][part], now[name]) for name in end.names)


def _nearest(values: Numbers, options: Sequence[str], to: Tensor) -> str:
    """Which of some tensors of the float network a tensor of the quantized one stands for."""
    return min(options, key=lambda option: _apart(values[option], to))


def _apart(wanted: Tensor, said: Tensor) -> float:
    if wanted.shape != said.shape:
        return math.inf
    return float((wanted - said).square().sum() / wanted.square().sum().clamp_min(1e-30))


def _in_pieces(
    network: Network, given: Mapping[str, Tensor], wanted: Sequence[str], more: Mapping[str, Tensor] | None = None
) -> Numbers:
    """What a network makes of many pictures. more: given whole with each piece."""
    count = len(next(iter(given.values())))
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    with torch.no_grad():
        for start in range(0, count, AT_ONCE):
            part = {name: x[start : start + AT_ONCE] for name, x in given.items()}
            for name, value in network.run({**part, **(more or {})}, wanted).items():
                found[name].append(value)
    return {name: torch.cat(values) for name, values in found.items()}
