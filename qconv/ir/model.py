"""Wraps an onnx-ir model in memory, and offers the reads and edits of the graph that all passes use.

Only this module builds or rewires onnx-ir objects. Every edit keeps three promises: names of inputs and outputs of
the model stay, new names are explicit and never taken, and a removed node leaves no use behind. Notes on nodes and
tensors are copied with the model but never saved. sympy, which onnx-ir imports for symbolic shapes, is imported on
first use only: it costs a third of a second and 30 MB.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray


@contextlib.contextmanager
def defer_import(name: str) -> Iterator[None]:
    """Inside, `import name` gives a stand-in, whose attributes are functions that import `name` when they are called.

    Afterwards it passes every attribute on, and `import name` means the library itself again.
    """
    if name in sys.modules:
        yield
        return
    stand_in = _LazyModule(name)
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]
        stand_in.__dict__["ready"] = True


class _LazyModule(ModuleType):
    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # the import system asks for some
            raise AttributeError(attribute)
        if self.__dict__.get("ready"):
            return getattr(importlib.import_module(self.__name__), attribute)
        return _make_lazy_function(self.__name__, attribute)


def _make_lazy_function(name: str, attribute: str) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(name), attribute)(*args, **options)

    return call


with defer_import("sympy"):
    import onnx_ir as ir

Node = ir.Node

Value = ir.Value

DataType = ir.DataType

BODY_TYPES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
"""Of attributes that hold bodies, as those of If and Loop."""

KEPT_OF_GRAPHS = ("inputs", "outputs", "doc_string", "opset_imports", "name", "metadata_props")

FLOAT_MAX = float(np.finfo(np.float32).max)


@dataclass(slots=True)
class Model:
    """A float network being turned into a quantized one.

    inner: the onnx-ir model. external: its weights come from a data file beside it. names: every name in use.
    """

    inner: ir.Model
    external: bool = False
    _names: dict[str, int] = field(default_factory=dict)
    _node_names: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in (*self.graph.inputs, *self.graph.initializers.values()):
            self._names[value.name or ""] = 1
        for node in self.graph.all_nodes():
            self._names.update((value.name or "", 1) for value in node.outputs)
            self._node_names[node.name or ""] = 1

    @property
    def graph(self) -> ir.Graph:
        """The main graph."""
        return self.inner.graph

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return int(self.graph.opset_imports.get("", 0))

    def nodes(self) -> list[Node]:
        """The nodes in order, as a list that stays put while the graph changes."""
        return list(self.graph)

    def fresh(self, wish: str) -> str:
        """A name that no tensor has yet: `wish` if it is free."""
        return _unused_name(wish, self._names)

    def fresh_node(self, wish: str) -> str:
        """A name that no node has yet: `wish` if it is free."""
        return _unused_name(wish, self._node_names)

    # -- reading ---------------------------------------------------------------------------------------------------

    def sole_reader(self, value: Value) -> Node | None:
        """The one node that reads `value`, or None where several do, none does, or the model returns it."""
        uses = value.uses()
        if len(uses) != 1 or value.is_graph_output():
            return None
        (use,) = uses
        return use.node if use.node.graph is self.graph else None

    def readers(self, value: Value) -> list[Node]:
        """The nodes that read `value`, each once, bodies of If and Loop included."""
        return list(dict.fromkeys(use.node for use in value.uses()))

    # -- writing ---------------------------------------------------------------------------------------------------

    def constant(self, wish: str, array: NDArray[Any], dtype: DataType | None = None) -> Value:
        """A new initializer. `dtype` names a type that numpy lacks; the codes must already fit into it."""
        name = self.fresh(wish)
        tensor = ir.Tensor(np.asarray(array, order="C"), dtype=dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def set_constant(self, value: Value, array: NDArray[Any]) -> None:
        """Give an initializer other numbers of the same shape; its name and type stay. Codes must fit into the type."""
        assert value.const_value is not None
        tensor = ir.Tensor(np.asarray(array, order="C"), dtype=value.const_value.dtype, name=value.name)
        value.const_value = tensor

    def build(
        self,
        op_type: str,
        inputs: Sequence[Value | None],
        *,
        name: str,
        attributes: Mapping[str, Any] | None = None,
        output: str | None = None,
        like: Value | None = None,
        dtype: DataType | None = None,
        count: int = 1,
    ) -> Node:
        """A node with `count` outputs, not yet in the graph. The outputs take type and shape of `like`."""
        results = [ir.Value(name=self.fresh(output or name)) for _ in range(count)]
        for result in results:
            if like is not None:
                if like.dtype is not None:
                    result.dtype = like.dtype
                result.shape = None if like.shape is None else like.shape.copy()
            if dtype is not None:
                result.dtype = dtype
        return ir.node(op_type, inputs, attributes=attributes, outputs=results, name=self.fresh_node(name))

    def insert_before(self, place: Node, *new: Node) -> None:
        """Put new nodes, in this order, in front of `place`."""
        self.graph.insert_before(place, new)

    def insert_after(self, place: Node, *new: Node) -> None:
        """Put new nodes, in this order, behind `place`."""
        self.graph.insert_after(place, new)

    def insert_first(self, *new: Node) -> None:
        """Put new nodes at the head of the graph, which read its inputs."""
        first = next(iter(self.graph), None)
        if first is None:
            self.graph.extend(new)
        else:
            self.graph.insert_before(first, new)

    def set_input(self, node: Node, index: int, value: Value | None) -> None:
        """Make `node` read `value` at `index`, lengthening its inputs where needed."""
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, value)

    def feed_readers(self, value: Value, wish: str, readers: Iterable[Node] | None = None) -> Value:
        """Let readers of `value`, or only those named, read a new float input of the model, of its rank."""
        new = ir.Value(name=self.fresh(wish), type=ir.TensorType(DataType.FLOAT))
        set_dims(new, None if value.shape is None else [None] * len(value.shape))  # bodies of Scan need to know ranks
        self.graph.inputs.append(new)
        self.redirect(value, new, readers=readers)
        return new

    def become(
        self, node: Node, op_type: str, inputs: Sequence[Value | None], attributes: Mapping[str, Any] | None = None
    ) -> None:
        """Make `node` another operator in place. Its name and its first output stay, so no reader notices."""
        node.op_type = op_type
        node.resize_outputs(1)
        node.resize_inputs(len(inputs))
        for index, value in enumerate(inputs):
            node.replace_input_with(index, value)
        node.attributes.clear()
        for key, plain in (attributes or {}).items():
            set_attribute(node, key, plain)

    def redirect(self, old: Value, new: Value, *, readers: Iterable[Node] | None = None) -> None:
        """Let the readers of `old` (or only those named) read `new`; what the model returns stays as it is."""
        chosen = None if readers is None else set(readers)
        for use in tuple(old.uses()):
            if chosen is None or use.node in chosen:
                use.node.replace_input_with(use.idx, new)

    def take_over(self, old: Value, new: Value) -> bool:
        """Let `new` stand for `old` everywhere. False, and nothing done, where the model returns both or cannot.

        A name that the model returns stays: `new` takes it and `old` gets another. Notes go with what they are about.
        """
        if not old.is_graph_output():
            _move_notes(old, new)
            self.redirect(old, new)
            return True
        if new.is_graph_output() or new.is_graph_input() or new.is_initializer() or new.producer() is None:
            return False
        _move_notes(old, new)
        name = old.name or ""
        old.name = self.fresh(f"{name}_before")
        new.name = name
        if old.dtype is not None:
            new.dtype = old.dtype
        if old.shape is not None:
            new.shape = old.shape.copy()
        self.redirect(old, new)
        for index, output in enumerate(self.graph.outputs):
            if output is old:
                self.graph.outputs[index] = new
        return True

    def remove(self, *nodes: Node) -> None:
        """Take nodes out whose outputs nobody reads any more."""
        self.graph.remove(nodes, safe=True)

    def bypass(self, node: Node) -> bool:
        """Remove a node that hands its first input on. Where a name must survive it stays, and False is returned."""
        source = node.inputs[0]
        if source is None or not self.take_over(node.outputs[0], source):
            return False
        self.remove(node)
        return True

    def remove_unread(self, nodes: Iterable[Node | None]) -> None:
        """Take those of the nodes out whose outputs nobody reads, and then those in front that wrote for them alone."""
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node is None or node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
                continue
            waiting += [value.producer() for value in node.inputs if value is not None]
            self.remove(node)

    def sweep(self) -> None:
        """Drop nodes and initializers that no output depends on."""
        for node in reversed(self.nodes()):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                self.graph.remove(node, safe=True)
        for name, value in tuple(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]

    # -- out -------------------------------------------------------------------------------------------------------

    def proto(self) -> onnx.ModelProto:
        """The model as protobuf; external tensors stay references.

        Inferred shapes of inner tensors are left out: every runtime infers them again, in small files they weigh, and
        to write them takes as long as the rest. So what has some is written one by one into a graph without.
        """
        graph, frame = self.graph, copy.copy(self.inner)
        values = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
        annotated = any("quant_parameter_tensor_names" in value.meta for value in values)  # onnx-ir alone writes these
        if not annotated:
            said: dict[str, Any] = {name: getattr(graph, name) for name in KEPT_OF_GRAPHS}
            frame.graph = ir.GraphView(nodes=(), **said)  # type: ignore[assignment] # of which it takes both
        proto = ir.to_proto(frame)
        del proto.graph.value_info[:]
        for value in () if annotated else graph.initializers.values():
            if value.const_value is not None:
                value.const_value.name = value.name
                ir.serde.serialize_tensor_into(proto.graph.initializer.add(), value.const_value)
        for node in () if annotated else graph:
            ir.serde.serialize_node_into(proto.graph.node.add(), node)
        return proto

    def copy(self) -> Model:
        """An independent copy that shares the (immutable) tensors."""
        return Model(self.inner.clone(), self.external)


def _unused_name(wish: str, taken: dict[str, int]) -> str:
    """`wish`, or `wish` with a number. taken: names in use, each with the last number that was tried behind it."""
    name = wish
    while name in taken:
        taken[wish] += 1
        name = f"{wish}_{taken[wish]}"
    taken[name] = 1
    return name


def constant_array(value: Value | None) -> NDArray[Any] | None:
    """The numbers of a constant, None for everything else."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def constant_scalar(value: Value | None) -> float | None:
    """The number of a constant with one element, None for everything else."""
    numbers = constant_array(value)
    return float(numbers.reshape(-1)[0]) if numbers is not None and numbers.size == 1 else None


def clip_bounds(node: Node) -> tuple[float, float] | None:
    """The least and the largest number that a Relu or Clip lets through, infinite where open.

    None for other nodes, for bounds that are computed, and where the lower lies above the upper.
    """
    if node.domain != "" or node.op_type not in ("Relu", "Clip"):
        return None
    if node.op_type == "Relu":
        return 0.0, math.inf
    ends = []
    for index, open_end in ((1, -math.inf), (2, math.inf)):
        given = input_of(node, index)
        number = open_end if given is None else constant_scalar(given)
        if number is None:
            return None
        ends.append(open_end if abs(number) >= FLOAT_MAX else number)
    low, high = ends
    return (low, high) if low <= high else None


def input_of(node: Node, index: int) -> Value | None:
    """Input `index`, None where the node has no such input."""
    return node.inputs[index] if index < len(node.inputs) else None


def nodes_inside(node: Node) -> list[Node]:
    """The nodes in the bodies of a node (If, Loop, Scan), those of bodies inside them included."""
    return [inner for body in _node_bodies(node) for inner in body.all_nodes()]


def values_read_by(node: Node) -> list[Value]:
    """All tensors that a node reads, those that only its bodies (If, Loop) read included."""
    found = [value for value in node.inputs if value is not None]
    for body in _node_bodies(node):
        inner = list(body.all_nodes())
        made = {value for n in inner for value in n.outputs} | {
            v for b in (body, *(b for n in inner for b in _node_bodies(n))) for v in b.inputs
        }
        found += [value for n in inner for value in n.inputs if value is not None and value not in made]
        found += [value for value in body.outputs if value not in made]
    return list(dict.fromkeys(found))


def _node_bodies(node: Node) -> list[ir.Graph]:
    found = []
    for held in node.attributes.values():
        if held.type == ir.AttributeType.GRAPH:
            found.append(held.value)
        elif held.type == ir.AttributeType.GRAPHS:
            found += held.value
    return found


def dims(value: Value) -> list[int | None] | None:
    """The shape with None for open dimensions; None where even the rank is unknown."""
    if value.shape is None:
        return None
    return [d if isinstance(d, int) and d >= 0 else None for d in value.shape]


def set_dims(value: Value, sizes: Sequence[int | None] | None) -> None:
    """Give `value` the shape that `dims` would return."""
    value.shape = None if sizes is None else ir.Shape(sizes)


def permute_dims(value: Value, source: Value, order: Sequence[int]) -> None:
    """Give `value` the axes of `source` in another order, names of open dimensions included."""
    if source.shape is not None:
        value.shape = ir.Shape([source.shape[axis] for axis in order])


def rank(value: Value) -> int | None:
    """The number of axes; None where it is not known."""
    return None if value.shape is None else len(value.shape)


def attribute(node: Node, name: str, default: Any = None) -> Any:
    """An attribute's plain Python value."""
    found = node.attributes.get(name)
    if found is None:
        return default
    plain = found.value
    return list(plain) if isinstance(plain, tuple) else plain


def set_attribute(node: Node, name: str, value: Any) -> None:
    """Give `node` an attribute, or another value for one it has."""
    node.attributes[name] = ir.convenience.convert_attribute(name, value)


def is_tensor(value: Value) -> bool:
    """Whether it holds one tensor, and no sequence of them; what nobody typed is taken for one."""
    return value.type is None or isinstance(value.type, ir.TensorType)


def set_note(about: Node | Value, key: str, what: object) -> None:
    """Attach a note to a node or a tensor. Copies of the model keep it; files do not."""
    about.meta[key] = what


def get_note(about: Node | Value, key: str) -> Any:
    """The note under this key; None without one."""
    return about.meta.get(key)


def drop_note(about: Node | Value, key: str) -> None:
    """Take a note away, if it is there."""
    about.meta.pop(key, None)


def _move_notes(old: Value, new: Value) -> None:
    """`new` stands for `old` from now on."""
    if old.meta:
        new.meta.clear()
        new.meta.update(old.meta)
        old.meta.clear()


def drop_attribute(node: Node, name: str) -> None:
    """Take an attribute away, if it is there."""
    node.attributes.pop(name, None)
