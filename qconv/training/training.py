"""Quantization-aware training: the quantized network itself is run, and its weights, scales and biases are learned.

Adam (Kingma and Ba 2015) with a rate of its own for each kind of what is learned, which rises over the first steps and
falls along a half cosine. Gradients that are much longer than usual are shortened. Everything that is drawn follows
from the seed and the number of the step, so that a run that was stopped goes on as if it never had been.

After each round the network is looked at on pictures that it does not learn from. The best state is kept: the nearest
of those that are right no less often than the network was at first. While rates are high codes go to and fro, and the
network is often worse than it was: what was learned shows as rates fall, so that patience begins in the second half.
Only where it runs away training goes back to the best state, with lower rates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qconv.results.training import HistoryRow, ValidationScore
from qconv.training.lesson import Lesson

State = dict[str, NDArray[Any]]
BETAS = (0.9, 0.99)
WARM_UP = 0.05
"""Share of all steps in which rates rise."""
USUAL, LONGEST = 0.95, 3.0
"""Gradients are shortened to LONGEST times their usual length, a running mean that keeps so much of itself."""
ROUND = 250
"""Most steps between two looks at the pictures held back."""
FIRST_PART, PATIENCE = 1 / 2, 1 / 4
"""Shares of all steps before which none is given up, and without anything better after which it is."""
AWAY, CUT, MOST_CUTS = 4.0, 1 / 3, 3
"""Times the first distance from which on rates are multiplied by CUT, and how often that is done."""
SHORT_EPOCH = 32
"""Steps below which several epochs make a round."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """rates: of the kinds in `Learned.kinds`. batch: pictures a step. augment: mirrored and moved at random."""

    epochs: int
    batch: int
    rates: Mapping[str, float]
    augment: bool = True
    seed: int = 0


class Trainer:
    """One run of training, which can be taken up where it was left."""

    def __init__(self, lesson: Lesson, schedule: Schedule) -> None:
        self.lesson, self.schedule = lesson, schedule
        kinds = lesson.learned.kinds
        self.optimizer = torch.optim.Adam(
            [{"params": list(kinds[kind].values()), "lr": 0.0, "kind": kind} for kind in kinds if kinds[kind]],
            betas=BETAS,
        )
        self.each = max(1, len(lesson.taught) // schedule.batch)  # steps an epoch
        self.steps = self.each * schedule.epochs
        most = min(ROUND, self.each * -(-SHORT_EPOCH // self.each))
        self.ends = np.linspace(0, self.steps, -(-self.steps // most) + 1).astype(int)[1:].tolist()
        self.step, self.usual, self.seconds, self.best_step, self.cuts = 0, 0.0, 0.0, 0, 0
        self.history: list[HistoryRow] = []
        self.best: State = lesson.learned.state()
        self.first_mark = self.best_mark = lesson.mark()

    @property
    def ended_early(self) -> bool:
        """Whether nothing better came for so long that it is given up."""
        since = max(self.best_step, FIRST_PART * self.steps)
        return self.cuts > MOST_CUTS or self.step - since >= PATIENCE * self.steps

    def run(self, progress: Callable[[int, int], None], keep: Callable[[], None]) -> None:
        """To the end of the schedule, or until it is given up. keep: called after each round."""
        while self.step < self.steps and not self.ended_early:
            start, losses = time.perf_counter(), []
            end = next(end for end in self.ends if end > self.step)
            while self.step < end:
                losses.append(self._learn())
                self.step += 1
                progress(self.step, self.steps)
            self.lesson.learned.fit_pairs()
            mark = self.lesson.mark()
            self._weigh(mark)
            self.seconds += time.perf_counter() - start
            self.history.append(
                HistoryRow(self.step, self.step / self.each, float(np.mean(losses)), mark, self.seconds)
            )
            keep()

    def _weigh(self, mark: ValidationScore) -> None:
        """Keep the state of now, or go back to the best one."""
        if mark.is_better(self.best_mark, self.first_mark):
            self.best, self.best_mark, self.best_step = self.lesson.learned.state(), mark, self.step
        elif not mark.distance < self._farthest:
            self.lesson.learned.restore(self.best)
            self.optimizer.state.clear()
            self.cuts, self.usual = self.cuts + 1, 0.0

    @property
    def _farthest(self) -> float:
        """The distance from which on it runs away; labels may lead far from the float network."""
        return AWAY * self.first_mark.distance if self.lesson.labels is None else math.inf

    def _learn(self) -> float:
        lesson, schedule = self.lesson, self.schedule
        epoch, place = divmod(self.step, self.each)
        order = np.random.default_rng([schedule.seed, 0, epoch]).permutation(lesson.taught)
        chosen = order[place * schedule.batch : (place + 1) * schedule.batch]
        rng = np.random.default_rng([schedule.seed, 1, self.step]) if schedule.augment else None
        self.optimizer.zero_grad()
        total = 0.0
        for part in lesson.parts(chosen, schedule.batch):
            loss = lesson.loss(part, rng)
            share = min(len(part), len(chosen)) / len(chosen)
            (loss * share).backward()
            total += float(loss.detach()) * share
        length = float(torch.nn.utils.clip_grad_norm_(list(lesson.learned.tensors), self._longest()))
        if not math.isfinite(length) or not math.isfinite(total):
            return total  # nothing is learned from that
        self.usual = length if not self.usual else USUAL * self.usual + (1 - USUAL) * min(length, self._longest())
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rates[group["kind"]] * CUT**self.cuts * self._rate()
        self.optimizer.step()
        lesson.learned.hold()
        return total

    def _longest(self) -> float:
        return LONGEST * self.usual if self.usual else math.inf

    def _rate(self) -> float:
        warm = max(1.0, WARM_UP * self.steps)
        return min(1.0, (self.step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))

    # -- what is kept --------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """All that a later run needs to go on."""
        found: State = {f"now/{name}": array for name, array in self.lesson.learned.state().items()}
        found |= {f"best/{name}": array for name, array in self.best.items()}
        for index, tensor in enumerate(self.lesson.learned.tensors):
            for name, value in self.optimizer.state.get(tensor, {}).items():
                found[f"adam/{index}/{name}"] = value.detach().cpu().numpy().copy()
        counts = (self.step, self.best_step, self.cuts)
        found["run"] = np.array([*counts, self.usual, self.seconds], np.float64)
        found["history"] = np.array([_numbers(row) for row in self.history], np.float64).reshape(len(self.history), 6)
        found["marks"] = np.array([_mark(self.first_mark), _mark(self.best_mark)], np.float64)
        return found

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """What `state` gave. Raises ValueError or KeyError for anything else, and then changes nothing."""

        def below(prefix: str) -> State:
            return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}

        now, best = below("now/"), below("best/")
        for name, array in self.lesson.learned.state().items():
            if now[name].shape != array.shape or best[name].shape != array.shape:
                raise ValueError(name)
        step, best_step, cuts, usual, seconds = (float(x) for x in state["run"])
        history = [_round(row) for row in state["history"]]
        first_mark, best_mark = (_read_mark(row) for row in state["marks"])
        self.lesson.learned.restore(now)
        self.best, self.history, self.first_mark, self.best_mark = best, history, first_mark, best_mark
        self.step, self.best_step, self.cuts, self.usual, self.seconds = (
            int(step),
            int(best_step),
            int(cuts),
            usual,
            seconds,
        )
        for index, tensor in enumerate(self.lesson.learned.tensors):
            kept = below(f"adam/{index}/")
            for name, array in kept.items():
                # the number of the step stays where Adam wants it
                place = tensor.device if array.ndim else "cpu"
                self.optimizer.state[tensor][name] = torch.from_numpy(np.array(array)).to(place)


def _mark(mark: ValidationScore) -> tuple[float, float]:
    return (math.nan if mark.right is None else mark.right, mark.distance)


def _read_mark(row: NDArray[np.float64]) -> ValidationScore:
    return ValidationScore(None if math.isnan(row[0]) else float(row[0]), float(row[1]))


def _numbers(row: HistoryRow) -> tuple[float, ...]:
    return (row.step, row.epoch, row.loss, *_mark(row.mark), row.seconds)


def _round(row: NDArray[np.float64]) -> HistoryRow:
    return HistoryRow(int(row[0]), float(row[1]), float(row[2]), _read_mark(row[3:5]), float(row[5]))
