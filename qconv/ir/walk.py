"""A network run layer after layer on the same pictures, every node once.

Between two stops the tensors that are still to be read are held, for all pictures: a stop costs what lies since the
last one, not the whole network. What a stop needs is run as a small model of its own. Dequantizers are run anew by
whoever reads them, so that codes are held instead of floats four times as large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.ir.graph import Model, Node, Value, array, input_of, reads_of
from qconv.ir.parts import Proto, part
from qconv.quantizer import QuantParams, QuantSpec
from qconv.runtime.session import Session
from qconv.storage import ArrayStore, StoredArray, StoredArrays, prefetch

AT_ONCE = 2


@dataclass(frozen=True, slots=True)
class Part:
    """Some nodes as a model of their own.

    held: what it is fed, batch by batch. large: constants that it is fed as well. count: of batches.
    """

    proto: Proto
    held: Mapping[str, StoredArrays]
    large: Mapping[str, NDArray[Any]]
    count: int

    def feed(self, index: int) -> dict[str, NDArray[Any]]:
        """What to run it on, of one batch."""
        return {name: arrays[index] for name, arrays in self.held.items()} | dict(self.large)


class Walk:
    """Where a network stands. The model's weights may change in front of it, never behind.

    feeds: what each batch of pictures feeds to the model's inputs. store: where tensors are held in between. kept:
    tensors that are held to the end once they are there, such as outputs that `behind` will be asked for.
    """

    def __init__(
        self,
        model: Model,
        feeds: Sequence[Mapping[str, NDArray[Any]]],
        store: ArrayStore,
        *,
        threads: int | None,
        kept: Iterable[Value] = (),
    ) -> None:
        self._model, self._threads, self._count, self._store = model, threads, len(feeds), store
        self._kept = frozenset(kept)
        self._held: dict[Value, StoredArrays] = {
            value: StoredArrays([store.put(feed[value.name or ""]) for feed in feeds])
            for value in model.graph.inputs
            if array(value) is None and value.name in feeds[0]
        }
        self._done: set[Node] = set()

    def at(self, value: Value) -> StoredArrays:
        """The values of a tensor for every batch; they are there until the next call."""
        self._drop()
        if value not in self._held:
            self._run(self._missing(value), value)
        return self._held[value]

    def codes_at(self, value: Value) -> tuple[StoredArrays, QuantParams | None]:
        """Like `at`, but of a dequantized tensor the codes, and how they are dequantized; None for floats."""
        node = value.producer()
        scale, zero = (array(input_of(node, index)) for index in (1, 2)) if node is not None else (None, None)
        if node is None or not _is_cheap(node) or scale is None or zero is None or scale.ndim or node.inputs[0] is None:
            return self.at(value), None
        spec = QuantSpec(8 * zero.dtype.itemsize, zero.dtype.kind == "i", symmetric=False)
        return self.at(node.inputs[0]), QuantParams(spec, scale, zero)

    def _missing(self, *values: Value) -> list[Node]:
        """The nodes that must run for `values`, in order."""
        needed: set[Node] = set()
        queue = [*values]
        while queue:
            tensor = queue.pop()
            node = tensor.producer()
            if tensor in self._held or node is None or node in needed:
                continue
            needed.add(node)
            queue += reads_of(node)
        return [node for node in self._model.nodes() if node in needed]

    def _run(self, nodes: list[Node], value: Value) -> None:
        self._done |= {node for node in nodes if not _is_cheap(node)}
        made = {result for node in nodes for result in node.outputs}
        wanted = [
            result for result in made if result is value or (not _is_cheap_value(result) and self._is_read(result))
        ]
        wanted.sort(key=lambda result: result.name or "")
        own = self._part(nodes, wanted)
        session = Session(
            own.proto.SerializeToString(),
            name="a part of the model",
            threads=self._threads,
            at_once=AT_ONCE,
            integer_kernels=False,
        )
        names = [result.name or "" for result in wanted]
        feeds = (own.feed(index) for index in range(self._count))
        made_of: dict[Value, list[StoredArray]] = {result: [] for result in wanted}
        for found in each(session, names, feeds):
            for result, numbers in zip(wanted, found, strict=True):
                made_of[result].append(self._store.put(numbers))
        self._held |= {result: StoredArrays(held) for result, held in made_of.items()}

    def behind(self, outputs: Sequence[Value]) -> Part:
        """All that is still to be run for these of the model's outputs."""
        return self._part(self._missing(*outputs), outputs)

    def _part(self, nodes: Sequence[Node], outputs: Sequence[Value]) -> Part:
        made = {result for node in nodes for result in node.outputs}
        read = {tensor for node in nodes for tensor in reads_of(node)}.union(outputs) - made
        inputs = sorted((tensor for tensor in read if tensor in self._held), key=lambda tensor: tensor.name or "")
        large = {t.name or "": numbers for t in read - set(inputs) if (numbers := _large(t)) is not None}
        held = {tensor.name or "": self._held[tensor] for tensor in inputs}
        shapes = {name: _common(arrays) for name, arrays in held.items()} | {
            name: (numbers.dtype, numbers.shape) for name, numbers in large.items()
        }
        return Part(part(self._model, nodes, shapes, outputs), held, large, self._count)

    def _is_read(self, value: Value) -> bool:
        """Whether it is kept, or a node that has not run yet reads it, through dequantizers or itself."""
        if value in self._kept:
            return True
        for node in self._model.readers(value):
            if node.graph is not self._model.graph:
                return True
            if _is_cheap(node):
                if any(self._is_read(result) for result in node.outputs):
                    return True
            elif node not in self._done:
                return True
        return False

    def _drop(self) -> None:
        """Let go of what nobody will read any more."""
        for value in [value for value in self._held if not self._is_read(value)]:
            for held in self._held.pop(value).held:
                held.drop()


def each(session: Session, names: list[str], feeds: Iterator[dict[str, NDArray[Any]]]) -> Iterator[list[NDArray[Any]]]:
    """What the session says of one feed after the other, some of them at once."""
    for future in prefetch(lambda feed: session.run(names, feed), feeds, workers=session.at_once, depth=AT_ONCE + 1):
        yield future.result()


def _is_cheap(node: Node) -> bool:
    return node.op_type == "DequantizeLinear"


def _is_cheap_value(value: Value) -> bool:
    node = value.producer()
    return node is not None and _is_cheap(node)


LARGE = 2**25
"""Bytes from which on a constant is fed to a part instead of copied into it, and into the runtime's session again."""


def _large(value: Value) -> NDArray[Any] | None:
    numbers = array(value)
    return numbers if numbers is not None and numbers.nbytes >= LARGE else None


def _common(arrays: StoredArrays) -> tuple[np.dtype[Any], tuple[int | None, ...]]:
    """Type and shape of all of them, None where they differ."""
    sizes = zip(*(x.shape for x in arrays.held), strict=True)
    return arrays.held[0].dtype, tuple(size[0] if len(set(size)) == 1 else None for size in sizes)
