"""Which loss an output is trained by: the divergence of classes, or squared errors of what holds none."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the extra: pip install 'qconv[torch]'")

from qconv.runtime.outputs import ModelOutput
from qconv.training.distillation import choose_loss


@pytest.mark.parametrize(
    ("shape", "task", "loss"),
    [
        ((2, 10), "auto", "scores"),
        ((2, 5, 4, 4), "auto", "scores"),
        ((2, 10), "embed", "numbers"),
        ((2, 10), "keypoints", "numbers"),
        ((2, 17, 4, 4), "keypoints", "numbers"),
        ((2, 1, 4, 4), "segment", "numbers"),  # foreground or not: one number for each place
    ],
)
def test_the_loss_follows_what_an_output_holds(shape: tuple[int, ...], task: str, loss: str) -> None:
    said = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert choose_loss(ModelOutput("y", True, shape, task=task), said) == loss
