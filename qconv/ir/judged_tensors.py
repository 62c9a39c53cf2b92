"""Finds the tensors that say how near two networks are: the outputs, or what these are selected from.

A network that keeps its best detections (TopK, NonMaxSuppression) gives them in an order, and sometimes in a number,
that the least error changes: row by row its outputs cannot be compared. What the selection reads can. So can the scores
behind an output of class numbers (ArgMax).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qconv.ir.model import Model, Node, Value, constant_array, is_tensor
from qconv.ir.rewriting import standard_op_type

SELECTING_OPS = frozenset({"TopK", "NonMaxSuppression", "ArgMax", "ArgMin", "NonZero", "Unique"})
"""Operators whose results are places."""

PICKING_OPS = frozenset({"Gather", "GatherElements", "GatherND", "Compress"})
"""Operators that take rows of their first input by places."""

LAYER_OPS = frozenset({"Conv", "ConvTranspose", "Gemm"})
"""Operators behind which no selection counts: a network goes on there."""


def find_judged_tensors(model: Model) -> list[Value]:
    """The tensors of floats that stand for the outputs, in the order of the outputs.

    An output that nothing selects stands for itself; one of integers without floats behind it, too.
    """
    found: dict[Value, None] = {}
    for output in model.graph.outputs:
        if is_tensor(output):
            search = _SelectionSearch()
            found |= dict.fromkeys(search.read if search.is_selected(output) and search.read else [_made_of(output)])
    return list(found)


def _made_of(output: Value) -> Value:
    """The tensor of floats that an output of whole numbers is made of, one by one, as by Cast; else the output."""
    value = output
    while value.dtype is not None and not value.dtype.is_floating_point():
        node = value.producer()
        read = [] if node is None else [v for v in node.inputs if v is not None and not v.is_initializer()]
        if len(read) != 1 or read[0].is_graph_input():
            return output
        value = read[0]
    return value


@dataclass(slots=True)
class _SelectionSearch:
    """Looks for selections in front of tensors. read: what they read. known: whether a tensor hangs on one."""

    read: list[Value] = field(default_factory=list)
    known: dict[Value, bool] = field(default_factory=dict)

    def is_selected(self, value: Value) -> bool:
        """Whether which numbers a tensor holds, or in which order, hangs on a selection behind the last layers."""
        if value not in self.known:
            self.known[value] = False
            self.known[value] = self._look(value.producer())
        return self.known[value]

    def _look(self, node: Node | None) -> bool:
        op_type = "" if node is None else standard_op_type(node)
        if node is None or op_type in LAYER_OPS:
            return False
        data = [v for v in node.inputs if v is not None and constant_array(v) is None]
        if op_type in SELECTING_OPS:
            for value in data if op_type == "NonMaxSuppression" else data[:1]:
                self._judge(value)
            return True
        selected = [self.is_selected(value) for value in data]
        if op_type in PICKING_OPS and len(data) == 2 and selected[1] and not selected[0]:
            self._judge(data[0])
        return any(selected)

    def _judge(self, value: Value) -> None:
        floats = is_tensor(value) and (value.dtype is None or value.dtype.is_floating_point())
        if not self.is_selected(value) and floats and value not in self.read:
            self.read.append(value)
