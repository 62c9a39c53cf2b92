"""Finds the tensors that say how near two networks are: the outputs, or what these are selected from.

A network that keeps its best detections (TopK, NonMaxSuppression) gives them in an order, and sometimes in a number,
that the least error changes: row by row its outputs cannot be compared. What the selection reads can. So can the scores
behind an output of class numbers (ArgMax). Boxes that are selected by scores count as far as these say that there is an
object: those of all other places are never seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from qconv.ir.model import Model, Node, Value, attribute, constant_array, dims, input_of, is_tensor, rank
from qconv.ir.rewriting import standard_op_type

SELECTING_OPS = frozenset({"TopK", "NonMaxSuppression", "ArgMax", "ArgMin", "NonZero", "Unique"})
"""Operators whose results are places."""

PICKING_OPS = frozenset({"Gather", "GatherElements", "GatherND", "Compress"})
"""Operators that take rows of their first input by places."""

LAYER_OPS = frozenset({"Conv", "ConvTranspose", "Gemm"})
"""Operators behind which no selection counts: a network goes on there."""


@dataclass(frozen=True, slots=True)
class SelectedBy:
    """What selects the places of a tensor.

    scores: of these places. axis: of the tensor, along which places lie. classes_first: how scores of all classes lie
    in one row, class by class or place by place; None where that is not known.
    """

    scores: Value
    axis: int
    classes_first: bool | None = None


def find_judged_tensors(model: Model) -> list[Value]:
    """The tensors of floats that stand for the outputs, in the order of the outputs.

    An output that nothing selects stands for itself; one of integers without floats behind it, too.
    """
    return list(find_selections(model))


def find_selections(model: Model) -> dict[Value, SelectedBy | None]:
    """The same tensors, each with what selects its places; None for those that no scores select, and for scores."""
    found: dict[Value, SelectedBy | None] = {}
    for output in model.graph.outputs:
        if is_tensor(output):
            search = _SelectionSearch()
            judged = search.read if search.is_selected(output) and search.read else {_made_of(output): None}
            found |= {value: found.get(value) or selected for value, selected in judged.items()}
    return found


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

    read: dict[Value, SelectedBy | None] = field(default_factory=dict)
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
        if op_type == "NonMaxSuppression":
            self._judge(data[0], SelectedBy(data[1], 1, classes_first=True) if len(data) > 1 else None)
            for value in data[1:]:
                self._judge(value)
            return True
        if op_type in SELECTING_OPS:
            self._judge(data[0])
            return True
        selected = [self.is_selected(value) for value in data]
        if op_type in PICKING_OPS and len(data) == 2 and selected[1] and not selected[0]:
            self._judge(data[0], self._selected_by(data[1], _picked_axis(node)))
        return any(selected)

    def _judge(self, value: Value, selected: SelectedBy | None = None) -> None:
        floats = is_tensor(value) and (value.dtype is None or value.dtype.is_floating_point())
        if self.is_selected(value) or not floats:
            return
        if selected is not None and value in _computed_from(selected.scores):
            selected = None  # scores say themselves how much they are
        if self.read.get(value) is None:
            self.read[value] = selected

    def _selected_by(self, places: Value, axis: int | None) -> SelectedBy | None:
        """The scores by which places are selected: what a TopK reads, or a NonMaxSuppression as its scores.

        Of a row of all places and classes, the place is the remainder by their number if classes lie behind each other,
        and else the quotient by the number of classes.
        """
        passed: set[str] = set()
        for node in _nodes_behind(places) if axis is not None else ():
            op_type = standard_op_type(node)
            at = {"TopK": 0, "NonMaxSuppression": 1}.get(op_type)
            scores = None if at is None else input_of(node, at)
            if scores is not None and axis is not None and not self.is_selected(scores):
                told = {frozenset({"Mod"}): True, frozenset({"Div"}): False}.get(frozenset(passed & {"Mod", "Div"}))
                return SelectedBy(scores, axis, True if op_type == "NonMaxSuppression" else told)
            passed.add(op_type)
        return None


def _nodes_behind(value: Value) -> Iterator[Node]:
    """Yield the nodes that a tensor is computed by, the nearest first, as far as the last layers."""
    waiting, seen = [value], {value}
    while waiting:
        node = waiting.pop(0).producer()
        if node is None or standard_op_type(node) in LAYER_OPS:
            continue
        yield node
        new = [read for read in node.inputs if read is not None and read not in seen]
        seen.update(new)
        waiting += new


def _computed_from(value: Value) -> set[Value]:
    """A tensor, and all that it is computed from behind the last layers."""
    return {value}.union(*([v for v in node.inputs if v is not None] for node in _nodes_behind(value)))


def _picked_axis(node: Node) -> int | None:
    """The axis of its first input along which a node picks; None where that is not known."""
    if node.op_type == "GatherND":
        shape = None if (places := input_of(node, 1)) is None else dims(places)
        depth = shape[-1] if shape else None
        return None if depth is None else int(attribute(node, "batch_dims", 0)) + depth - 1
    axis: int | None = attribute(node, "axis", None if node.op_type == "Compress" else 0)
    whole = None if (read := input_of(node, 0)) is None else rank(read)
    return axis if axis is None or axis >= 0 or whole is None else axis + whole
