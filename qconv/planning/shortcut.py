"""Which input of a residual Add is the shortcut.

Runtimes that fuse a layer with the Add behind it want codes on the other side alone: the layer's own result stays in
its accumulator. Where both sides are layers, the projection is the one with fewer layers behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qconv.ir.model import Model, Node, Value


def shortcut(model: Model, add: Node, sides: Sequence[Value], layers: Collection[Node]) -> Value | None:
    """The input of `add` that is not the output of the layer that it can be fused into; None where there is none.

    sides: its inputs that are no constants. layers: all nodes with weights.
    """
    if len(sides) != 2 or sides[0] is sides[1]:
        return None
    fusible = [side.producer() in layers and model.sole_reader(side) is add for side in sides]
    if not any(fusible):
        return None
    if all(fusible):
        return min(sides, key=lambda side: _depth(model, side, layers))
    return sides[fusible.index(False)]


def _depth(model: Model, value: Value, layers: Collection[Node]) -> int:
    """Layers with weights on the longest way to a tensor."""
    found: dict[Node, int] = {}
    for node in model.nodes():
        before = (source.producer() for source in node.inputs if source is not None)
        found[node] = (node in layers) + max((found[n] for n in before if n in found), default=0)
        if node is value.producer():
            return found[node]
    return 0
