"""The course of training, with validation scores that are written down beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra: pip install 'qconv[torch]'")

from qconv.results.training import ValidationScore
from qconv.training.trainer import DIVERGED_FACTOR, MOST_RATE_CUTS, RATE_CUT, Trainer, TrainingSettings


class Learned:
    """One number."""

    def __init__(self) -> None:
        self.number = torch.zeros(1, requires_grad=True)
        self.kinds = {"weights": {"w": self.number}}

    @property
    def tensors(self) -> Iterator[torch.Tensor]:
        yield self.number

    def state(self) -> dict[str, Any]:
        return {"weights/w": self.number.detach().numpy().copy()}

    def restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.number.copy_(torch.from_numpy(np.array(state["weights/w"])))

    def hold(self) -> None:
        pass

    def fit_pairs(self) -> None:
        pass


class ScriptedDistillation:
    """Its loss falls as the number grows; its validation scores are given."""

    def __init__(self, distances: Sequence[float], rights: Sequence[float] | None = None) -> None:
        self.learned, self.taught = Learned(), np.arange(32)
        self.scores = iter(
            ValidationScore(right, d) for d, right in zip(distances, rights or [0.5] * len(distances), strict=True)
        )
        self.slope = 1.0
        self.labels = None

    def parts(self, chosen: np.ndarray, most: int) -> Iterator[np.ndarray]:
        yield chosen

    def loss(self, part: np.ndarray, rng: Any) -> torch.Tensor:
        return -self.slope * self.learned.number.sum()

    def validate(self) -> ValidationScore:
        return next(self.scores)


def trained(distances: Sequence[float], rights: Sequence[float] | None = None, **more: Any) -> Trainer:
    """A run of a round of 32 steps for each validation score but the first."""
    distillation: Any = ScriptedDistillation(distances, rights)
    schedule = {"epochs": 32 * (len(distances) - 1), "batch": 32, "rates": {"weights": 0.1}, "augment": False, **more}
    trainer = Trainer(distillation, TrainingSettings(**schedule))  # type: ignore[arg-type]
    trainer.run(lambda done, total: None, lambda: None)
    return trainer


def test_what_is_worse_while_rates_are_high_is_waited_for() -> None:
    found = trained([1.0, 1.5, 3.0, 2.0, 1.5, 1.1, 0.9, 0.8])
    assert (found.step, found.best_step, found.cuts) == (7 * 32, 7 * 32, 0)
    assert found.best_score.distance == 0.8
    assert found.best["weights/w"] == found.distillation.learned.number.detach().numpy()


def test_it_ends_where_the_second_half_brings_nothing() -> None:
    found = trained([1.0, *[1.5] * 8])
    assert found.ended_early
    assert (found.step, found.best_step) == (6 * 32, 0)
    found = trained([1.0, 1.5, 1.5, 1.5, 1.5, 0.9, 1.5, 1.5, 1.5])
    assert (found.step, found.best_step) == (7 * 32, 5 * 32)


def test_it_goes_back_where_it_runs_away() -> None:
    found = trained([1.0, 0.9, DIVERGED_FACTOR, 0.8, *[1.5] * 4])
    assert found.cuts == 1
    assert found.best_step == 3 * 32
    # all steps but those of the lost round count, and behind it at a third of the rate
    whole = trained([1.0, 0.9, 1.5, 0.8, *[1.5] * 4])
    assert found.distillation.learned.number.item() < whole.distillation.learned.number.item()


def test_it_is_given_up_where_it_runs_away_again_and_again() -> None:
    found = trained([1.0, *[DIVERGED_FACTOR] * 20])
    assert found.cuts == MOST_RATE_CUTS + 1
    assert found.step == (MOST_RATE_CUTS + 1) * 32
    assert found.distillation.learned.number.item() == 0
    assert 0 < RATE_CUT < 1


def test_what_is_right_less_often_is_not_better() -> None:
    found = trained([1.0, 0.5, 0.9, 0.6, 0.7, 0.8], [0.5, 0.4, 0.5, 0.4, 0.6, 0.9])
    assert (found.best_step, found.best_score) == (4 * 32, ValidationScore(0.6, 0.7))


def test_rates_rise_and_fall() -> None:
    """Adam moves by the rate where the gradient is always the same: their sum is the way."""
    found = trained(np.linspace(1, 0.1, 33), epochs=1000)
    rates = [min(1, (k + 1) / 50) * 0.5 * (1 + np.cos(np.pi * k / 1000)) for k in range(1000)]
    assert found.distillation.learned.number.item() == pytest.approx(0.1 * sum(rates), rel=1e-3)


def test_gradients_that_are_no_numbers_are_left_out() -> None:
    distillation: Any = ScriptedDistillation([1.0, 1.0])
    distillation.slope = float("nan")
    trainer = Trainer(distillation, TrainingSettings(32, 32, {"weights": 0.1}, augment=False))
    trainer.run(lambda done, total: None, lambda: None)
    assert distillation.learned.number.item() == 0
