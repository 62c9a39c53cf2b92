"""Defines `FloatShare`: how much of a network a recipe leaves in float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MOST = 0.5
"""Share of the work, or of the weights, from which on most of a network is in float."""


@dataclass(frozen=True, slots=True)
class FloatShare:
    """How much of a network stays in float.

    Attributes:
        nodes: That run in float, as the runtime has optimized the network.
        all_nodes: That run at all, but for conversions.
        work: Share of the multiplications of layers with constant weights.
        weights: Share of the weights of these that are stored as floats.
    """

    nodes: int
    all_nodes: int
    work: float
    weights: float

    @property
    def is_most(self) -> bool:
        """Whether that is most of the network."""
        return max(self.work, self.weights) > MOST

    @property
    def in_words(self) -> str:
        """The same as the end of a sentence."""
        nodes = f"{self.nodes} of {self.all_nodes} nodes"
        return f"{nodes}, {self.work:.0%} of the multiplications and {self.weights:.0%} of the weights"

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {"nodes": self.nodes, "all_nodes": self.all_nodes, "work": self.work, "weights": self.weights}
