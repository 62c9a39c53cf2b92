"""What the float passes are written with: an edit of one node, and the pass that tries it on every node.

An edit takes the model and a node. It returns what it changed, nothing where there was nothing to do, or raises
`Refused` before it has changed anything. `each_node` makes a pass of it, and a `Skipped` of every refusal.
"""

from __future__ import annotations

from collections.abc import Callable

from qconv.errors import Change, Finding, Skipped
from qconv.ir.graph import Model, Node, Value, attribute

Pass = Callable[[Model], list[Finding]]
Edit = Callable[[Model, Node], list[Change]]


class Refused(Exception):
    """Raised by an edit, before it has changed anything, with the reason why it cannot be done."""


def each_node(step: str, *op_types: str) -> Callable[[Edit], Pass]:
    """Make a pass out of an edit: try it on every node of these types, and record what it did or why it refused."""

    def as_pass(edit: Edit) -> Pass:
        def run(model: Model) -> list[Finding]:
            found: list[Finding] = []
            for node in model.nodes():
                if node.graph is None or kind(node) not in op_types:  # an earlier edit may have removed it
                    continue
                try:
                    found += edit(model, node)
                except Refused as reason:
                    found.append(Skipped(step, title(node), str(reason)))
            return found

        run.__name__, run.__doc__ = edit.__name__, edit.__doc__
        return run

    return as_pass


def kind(node: Node) -> str:
    """The type of a standard operator, nothing for those of other domains."""
    return node.op_type if node.domain == "" else ""


def title(node: Node) -> str:
    """The name, which loading gives to every node but those in bodies of If and Loop."""
    return node.name or node.outputs[0].name or ""


def called(node: Node) -> str:
    """A node as messages speak of it: `Conv conv1`."""
    return f"{node.op_type} {title(node)}"


def source(node: Node) -> Value:
    """The first input, which every operator here has."""
    value = node.inputs[0]
    assert value is not None
    return value


def reads_as_data(node: Node, value: Value, model: Model) -> bool:
    """Whether `node` reads `value` as its first input and nowhere else. Nodes in bodies of If and Loop do not count."""
    return node.graph is model.graph and [i for i, v in enumerate(node.inputs) if v is value] == [0]


def no_extra_outputs(node: Node) -> bool:
    """Whether only the first output is used."""
    return not any(value.uses() or value.is_graph_output() for value in node.outputs[1:])


def explicit_pads(node: Node, axes: int) -> list[int] | None:
    """Padding of a Conv or pool over `axes` spatial axes, all beginnings first; None for auto_pad=SAME."""
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto.startswith("SAME"):
        return None
    return [0] * (2 * axes) if auto == "VALID" else attribute(node, "pads") or [0] * (2 * axes)
