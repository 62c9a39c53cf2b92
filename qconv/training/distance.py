"""How far what the quantized network says is from what the float one says: what training makes small.

    class scores     KL(p || q) = sum over classes of p log(p / q), p = softmax of the float network's scores
    probabilities    the same, p and q as they are
    numbers          sum (y - x)^2 / sum (y - mean y)^2

each on average over pictures and places. A network with several outputs is as far off as all of them together.

Source: Hinton et al. 2015, arXiv 1503.02531, at temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qconv.metrics.comparison import is_class_score

SMALLEST = 1e-8
"""Probability, and share of the variance, below which nothing is told apart."""


def kind_of(said: Tensor) -> str:
    """What an output holds, by what the float network says on some pictures: "scores", "probabilities", "numbers"."""
    if not said.dtype.is_floating_point or not is_class_score(tuple(said.shape)):
        return "numbers"
    sums = said.sum(dim=1)
    whole = bool((said >= 0).all()) and bool((sums - 1).abs().max() < 1e-3)
    return "probabilities" if whole else "scores"


def apart(kinds: Sequence[str], wanted: Sequence[Tensor], said: Sequence[Tensor]) -> Tensor:
    """A number. wanted, said: all outputs of the float and of the quantized network, (N, ...) each."""
    total = torch.zeros((), device=said[0].device)
    for kind, y, x in zip(kinds, wanted, said, strict=True):
        total = total + _KINDS[kind](y.float(), x.float())
    return total


def labelled(kind: str, said: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy. said: (N, C)."""
    logs = torch.log_softmax(said, dim=1) if kind == "scores" else torch.log(said.clamp_min(SMALLEST))
    return F.nll_loss(logs, labels)


def agreeing(kinds: Sequence[str], wanted: Sequence[Tensor], said: Sequence[Tensor]) -> tuple[int, int]:
    """At how many of how many places both say the same class; (0, 0) where no output tells classes."""
    equal = places = 0
    for kind, y, x in zip(kinds, wanted, said, strict=True):
        if kind != "numbers":
            same = y.argmax(dim=1) == x.argmax(dim=1)
            equal, places = equal + int(same.sum()), places + same.numel()
    return equal, places


def _of_scores(y: Tensor, x: Tensor) -> Tensor:
    p, q = torch.log_softmax(y, dim=1), torch.log_softmax(x, dim=1)
    return (p.exp() * (p - q)).sum(dim=1).mean()


def _of_probabilities(y: Tensor, x: Tensor) -> Tensor:
    p, q = torch.log(y.clamp_min(SMALLEST)), torch.log(x.clamp_min(SMALLEST))
    return (y * (p - q)).sum(dim=1).mean()


def _of_numbers(y: Tensor, x: Tensor) -> Tensor:
    spread = (y - y.mean()).square().sum() if y.numel() > 1 else y.square().sum()
    return (y - x).square().sum() / (spread + SMALLEST * y.numel())


_KINDS = {"scores": _of_scores, "probabilities": _of_probabilities, "numbers": _of_numbers}
