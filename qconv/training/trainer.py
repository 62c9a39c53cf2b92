"""This module trains the weights, scales and biases of a quantized network, and resumes from a checkpoint.

Adam (Kingma and Ba 2015) has a learning rate for each kind of parameter, with a warm-up and a half cosine. Gradients
that are much longer than usual are shortened. All randomness follows from the seed and the step, so that a resumed run
is the same run.

After each round the network is validated on held-out images, and the best state is kept: the nearest of those that are
right no less often than at first. While rates are high integer weights go to and fro, and the network is often worse
than it was: what was learned shows as rates fall, so that patience begins in the second half. A run that diverges goes
back to the best state with lower rates.
"""

from __future__ import annotations

import io
import math
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qconv import storage
from qconv.reporter import Reporter
from qconv.results.training import HistoryRow, ValidationScore
from qconv.training.distillation import Distillation
from qconv.training.network import half_cosine

State = dict[str, NDArray[Any]]

BETAS = (0.9, 0.99)

WARM_UP = 0.05
"""Share of all steps in which rates rise."""

USUAL_LENGTH_DECAY, LONGEST_GRADIENT = 0.95, 3.0
"""Gradients are clipped to LONGEST_GRADIENT times their usual length, a running mean with this decay."""

MOST_ROUND_STEPS = 250
"""Most steps between two validations."""

FIRST_SHARE, PATIENCE_SHARE = 1 / 2, 1 / 4
"""Share of all steps in which no run is given up, and share without improvement after which it is."""

DIVERGED_FACTOR, RATE_CUT, MOST_RATE_CUTS = 4.0, 1 / 3, 3
"""Multiple of the first distance at which rates are multiplied by RATE_CUT, and how often that is done."""

SHORT_EPOCH = 32
"""Steps below which several epochs make a round."""


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """The schedule of a run.

    Attributes:
        epochs: Passes over the images.
        batch: Images a step.
        rates: Learning rates of the kinds in `LearnedParameters.kinds`.
        augment: Whether images are mirrored and shifted at random.
        seed: Of all draws.
    """

    epochs: int
    batch: int
    rates: Mapping[str, float]
    augment: bool = True
    seed: int = 0


class Trainer:
    """One training run, which can be resumed from its state."""

    def __init__(self, distillation: Distillation, schedule: TrainingSettings) -> None:
        self.distillation, self.schedule = distillation, schedule
        kinds = distillation.learned.kinds
        self.optimizer = torch.optim.Adam(
            [{"params": list(kinds[kind].values()), "lr": 0.0, "kind": kind} for kind in kinds if kinds[kind]],
            betas=BETAS,
        )
        self.steps_per_epoch = max(1, len(distillation.taught) // schedule.batch)
        self.steps = self.steps_per_epoch * schedule.epochs
        most = min(MOST_ROUND_STEPS, self.steps_per_epoch * -(-SHORT_EPOCH // self.steps_per_epoch))
        self.ends = np.linspace(0, self.steps, -(-self.steps // most) + 1).astype(int)[1:].tolist()
        self.step, self.mean_gradient_norm, self.seconds, self.best_step, self.cuts = 0, 0.0, 0.0, 0, 0
        self.history: list[HistoryRow] = []
        self.best: State = distillation.learned.state()
        self.initial_score = self.best_score = distillation.validate()

    @property
    def ended_early(self) -> bool:
        """Whether nothing better came for so long that the run is given up."""
        since = max(self.best_step, FIRST_SHARE * self.steps)
        return self.cuts > MOST_RATE_CUTS or self.step - since >= PATIENCE_SHARE * self.steps

    def run(self, progress: Callable[[int, int], None], keep: Callable[[], None]) -> None:
        """Train to the end of the schedule, or until the run is given up. keep: called after each round."""
        while self.step < self.steps and not self.ended_early:
            start, losses = time.perf_counter(), []
            end = next(end for end in self.ends if end > self.step)
            while self.step < end:
                losses.append(self._learn())
                self.step += 1
                progress(self.step, self.steps)
            self.distillation.learned.fit_pairs()
            score = self.distillation.validate()
            self._update_best(score)
            self.seconds += time.perf_counter() - start
            self.history.append(
                HistoryRow(self.step, self.step / self.steps_per_epoch, float(np.mean(losses)), score, self.seconds)
            )
            keep()

    def _update_best(self, score: ValidationScore) -> None:
        """Keep the current state if it is the best, or go back to the best one where training diverged."""
        if score.is_better(self.best_score, self.initial_score):
            self.best, self.best_score, self.best_step = self.distillation.learned.state(), score, self.step
        elif not score.distance < self._farthest:
            self.distillation.learned.restore(self.best)
            self.optimizer.state.clear()
            self.cuts, self.mean_gradient_norm = self.cuts + 1, 0.0

    @property
    def _farthest(self) -> float:
        """The distance from which on training diverges; labels may lead far from the float network."""
        return DIVERGED_FACTOR * self.initial_score.distance if self.distillation.labels is None else math.inf

    def _learn(self) -> float:
        distillation, schedule = self.distillation, self.schedule
        epoch, place = divmod(self.step, self.steps_per_epoch)
        order = np.random.default_rng([schedule.seed, 0, epoch]).permutation(distillation.taught)
        chosen = order[place * schedule.batch : (place + 1) * schedule.batch]
        rng = np.random.default_rng([schedule.seed, 1, self.step]) if schedule.augment else None
        self.optimizer.zero_grad()
        total = 0.0
        for part in distillation.parts(chosen, schedule.batch):
            loss = distillation.loss(part, rng)
            share = min(len(part), len(chosen)) / len(chosen)
            (loss * share).backward()
            total += float(loss.detach()) * share
        length = float(torch.nn.utils.clip_grad_norm_(list(distillation.learned.tensors), self._max_gradient_norm()))
        if not math.isfinite(length) or not math.isfinite(total):
            return total  # nothing is learned from that
        self.mean_gradient_norm = (
            length
            if not self.mean_gradient_norm
            else USUAL_LENGTH_DECAY * self.mean_gradient_norm
            + (1 - USUAL_LENGTH_DECAY) * min(length, self._max_gradient_norm())
        )
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rates[group["kind"]] * RATE_CUT**self.cuts * self._rate()
        self.optimizer.step()
        distillation.learned.hold()
        return total

    def _max_gradient_norm(self) -> float:
        return LONGEST_GRADIENT * self.mean_gradient_norm if self.mean_gradient_norm else math.inf

    def _rate(self) -> float:
        warm = max(1.0, WARM_UP * self.steps)
        return min(1.0, (self.step + 1) / warm) * half_cosine(self.step, self.steps)

    # -- what is kept --------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """Return all that a later run needs to resume, as arrays by name."""
        found: State = {f"now/{name}": array for name, array in self.distillation.learned.state().items()}
        found |= {f"best/{name}": array for name, array in self.best.items()}
        for index, tensor in enumerate(self.distillation.learned.tensors):
            for name, value in self.optimizer.state.get(tensor, {}).items():
                found[f"adam/{index}/{name}"] = value.detach().cpu().numpy().copy()
        counts = (self.step, self.best_step, self.cuts)
        found["run"] = np.array([*counts, self.mean_gradient_norm, self.seconds], np.float64)
        found["history"] = np.array([_encode_history_row(row) for row in self.history], np.float64).reshape(
            len(self.history), 6
        )
        found["marks"] = np.array([_encode_score(self.initial_score), _encode_score(self.best_score)], np.float64)
        return found

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Resume from what `state` gave. Raises ValueError or KeyError for anything else, and then changes nothing."""

        def below(prefix: str) -> State:
            return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}

        now, best = below("now/"), below("best/")
        for name, array in self.distillation.learned.state().items():
            if now[name].shape != array.shape or best[name].shape != array.shape:
                raise ValueError(name)
        step, best_step, cuts, mean_gradient_norm, seconds = (float(x) for x in state["run"])
        history = [_decode_history_row(row) for row in state["history"]]
        initial_score, best_score = (_decode_score(row) for row in state["marks"])
        self.distillation.learned.restore(now)
        self.best, self.history, self.initial_score, self.best_score = best, history, initial_score, best_score
        self.step, self.best_step, self.cuts, self.mean_gradient_norm, self.seconds = (
            int(step),
            int(best_step),
            int(cuts),
            mean_gradient_norm,
            seconds,
        )
        for index, tensor in enumerate(self.distillation.learned.tensors):
            kept = below(f"adam/{index}/")
            for name, array in kept.items():
                # the number of the step stays where Adam wants it
                place = tensor.device if array.ndim else "cpu"
                self.optimizer.state[tensor][name] = torch.from_numpy(np.array(array)).to(place)


def _encode_score(score: ValidationScore) -> tuple[float, float]:
    return (math.nan if score.right is None else score.right, score.distance)


def _decode_score(row: NDArray[np.float64]) -> ValidationScore:
    return ValidationScore(None if math.isnan(row[0]) else float(row[0]), float(row[1]))


def _encode_history_row(row: HistoryRow) -> tuple[float, ...]:
    return (row.step, row.epoch, row.loss, *_encode_score(row.mark), row.seconds)


def _decode_history_row(row: NDArray[np.float64]) -> HistoryRow:
    return HistoryRow(int(row[0]), float(row[1]), float(row[2]), _decode_score(row[3:5]), float(row[5]))


SAVE_EVERY_SECONDS = 20.0
"""Least seconds between two checkpoints."""


class TrainingCheckpoint:
    """The checkpoint of a run, a file beside its output, from which the same command resumes."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = out.with_name(f".{out.name}.training"), fingerprint
        self._last = time.perf_counter()

    def read_into(self, trainer: Trainer, reporter: Reporter) -> int:
        """Resume a run of the same options. Returns its step, 0 where there is no checkpoint of it."""
        if not self.path.exists():
            return 0
        try:
            with np.load(self.path, allow_pickle=False) as file:
                state = {name: file[name] for name in file.files}
            if str(state["fingerprint"]) != self.fingerprint:
                reporter.warn(f"{self.path} is of a run with other options or pictures: it is not used.")
                return 0
            trainer.restore(state)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            reporter.warn(f"{self.path} is damaged, and not used.")
            return 0
        return trainer.step

    def write(self, trainer: Trainer, *, now: bool = False) -> None:
        """Write the checkpoint, unless the last one is younger than SAVE_EVERY_SECONDS."""
        if now or time.perf_counter() - self._last >= SAVE_EVERY_SECONDS:
            content = io.BytesIO()
            np.savez(content, fingerprint=np.array(self.fingerprint), **trainer.state())  # type: ignore[arg-type]
            storage.write_atomically(self.path, content.getvalue())
            self._last = time.perf_counter()

    def forget(self) -> None:
        """Delete the checkpoint once the result is written."""
        self.path.unlink(missing_ok=True)
