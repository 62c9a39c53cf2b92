"""Runs a network layer after layer on the same images, every node once, and reruns its tail with trial parameters.

Between two stops the tensors that are still to be read are held for all images: a stop costs what lies since the last
one, not the whole network. What a stop needs runs as a small model of its own. Dequantizers are rerun by whoever
reads them, so that integers are held instead of floats four times as large; so is what makes sequences, which are no
arrays that could be held. `NetworkTail` is the rest of the network behind some tensors, where these alone are
quantized, or where one layer is replaced. `MovedOutputs` is all of it with errors put in, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.ir.files import total_weight_bytes
from qconv.ir.model import Model, Node, Value, constant_array, is_tensor, values_read_by
from qconv.ir.stored_weights import read_dequantizer
from qconv.ir.subgraph import (
    HIGH_INPUT,
    LOW_INPUT,
    SCALE_INPUT,
    SWITCH_INPUT,
    ZERO_POINT_INPUT,
    SubgraphProto,
    Tail,
    expose_inputs,
    extract_subgraph,
    find_tail,
    insert_fake_quantize,
    runnable_with_outputs,
    unrounded_name,
)
from qconv.quantizer import QuantParams, QuantSpec
from qconv.runtime.session import Session
from qconv.storage import ArrayStore, StoredArray, StoredArrays, prefetch

CONCURRENT_RUNS = 2


@dataclass(frozen=True, slots=True)
class SubModel:
    """Some nodes as a model of their own.

    held: its inputs, batch by batch. large: constants that are inputs as well. count: number of batches.
    """

    proto: SubgraphProto
    held: Mapping[str, StoredArrays]
    large: Mapping[str, NDArray[Any]]
    count: int

    def feed(self, index: int) -> dict[str, NDArray[Any]]:
        """The inputs of one batch."""
        return {name: arrays[index] for name, arrays in self.held.items()} | dict(self.large)


class StepwiseRun:
    """A network that is run node by node. Weights of nodes that have not run yet may change.

    feeds: what each batch of pictures feeds to the model's inputs. store: where tensors are held in between. kept:
    tensors that are held to the end once they are there, such as outputs that `tail_model` will be asked for.
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
            if constant_array(value) is None and value.name in feeds[0]
        }
        self._done: set[Node] = set()

    def values_of(self, value: Value) -> StoredArrays:
        """The values of a tensor for every batch, valid until the next call. Runs what they need."""
        self._drop()
        if value not in self._held:
            self._run(self._missing(value), value)
        return self._held[value]

    def replace_values(self, value: Value, numbers: Iterable[NDArray[Any]]) -> None:
        """Hold other numbers of a tensor from now on, that of the last `values_of`, batch by batch."""
        old = self._held[value]
        self._held[value] = StoredArrays([self._store.put(array) for array in numbers])
        for held in old.held:
            held.drop()

    def codes_of(self, value: Value) -> tuple[StoredArrays, QuantParams | None]:
        """Like `values_of`, but returns the codes of a dequantized tensor, with their parameters; None for floats."""
        found = read_dequantizer(value)
        params = None if found is None or found.at_load else found.tensor_params()
        if found is None or params is None:
            return self.values_of(value), None
        return self.values_of(found.codes), params

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
            queue += values_read_by(node)
        return [node for node in self._model.nodes() if node in needed]

    def _run(self, nodes: list[Node], value: Value) -> None:
        self._done |= {node for node in nodes if not _is_rerun(node)}
        made = {result for node in nodes if not _is_rerun(node) for result in node.outputs}
        wanted = [result for result in made | {value} if result is value or self._is_read(result)]
        wanted.sort(key=lambda result: result.name or "")
        own = self._part(nodes, wanted)
        session = Session(
            own.proto.SerializeToString(),
            name="a part of the model",
            threads=self._threads,
            at_once=CONCURRENT_RUNS,
            integer_kernels=False,
        )
        names = [result.name or "" for result in wanted]
        feeds = (own.feed(index) for index in range(self._count))
        made_of: dict[Value, list[StoredArray]] = {result: [] for result in wanted}
        for found in run_each(session, names, feeds):
            for result, numbers in zip(wanted, found, strict=True):
                made_of[result].append(self._store.put(numbers))
        self._held |= {result: StoredArrays(held) for result, held in made_of.items()}

    def tail_model(self, outputs: Sequence[Value]) -> SubModel:
        """The nodes that are still to be run for these outputs, as a model."""
        return self._part(self._missing(*outputs), outputs)

    def _part(self, nodes: Sequence[Node], outputs: Sequence[Value]) -> SubModel:
        made = {result for node in nodes for result in node.outputs}
        read = {tensor for node in nodes for tensor in values_read_by(node)}.union(outputs) - made
        inputs = sorted((tensor for tensor in read if tensor in self._held), key=lambda tensor: tensor.name or "")
        large = {t.name or "": numbers for t in read - set(inputs) if (numbers := _large_constant(t)) is not None}
        held = {tensor.name or "": self._held[tensor] for tensor in inputs}
        shapes = {name: _common_type_and_shape(arrays) for name, arrays in held.items()} | {
            name: (numbers.dtype, numbers.shape) for name, numbers in large.items()
        }
        return SubModel(extract_subgraph(self._model, nodes, shapes, outputs), held, large, self._count)

    def _is_read(self, value: Value) -> bool:
        """Whether a tensor is kept, or a node that has not run yet reads it, directly or through what is rerun."""
        if value in self._kept:
            return True
        for node in self._model.readers(value):
            if node.graph is not self._model.graph:
                return True
            if _is_rerun(node):
                if any(self._is_read(result) for result in node.outputs):
                    return True
            elif node not in self._done:
                return True
        return False

    def _drop(self) -> None:
        """Drop tensors that no node will read any more."""
        for value in [value for value in self._held if not self._is_read(value)]:
            for held in self._held.pop(value).held:
                held.drop()


def run_each(
    session: Session, names: list[str], feeds: Iterator[dict[str, NDArray[Any]]]
) -> Iterator[list[NDArray[Any]]]:
    """Yield the outputs for each feed in order; some run at the same time."""
    for future in prefetch(
        lambda feed: session.run(names, feed), feeds, workers=session.at_once, depth=CONCURRENT_RUNS + 1
    ):
        yield future.result()


def _is_rerun(node: Node) -> bool:
    """Whether a node runs again for whoever reads it: a dequantizer, or what makes sequences of tensors."""
    return node.op_type == "DequantizeLinear" or not all(map(is_tensor, node.outputs))


LARGE_CONSTANT_BYTES = 2**25
"""Bytes from which on a constant is fed to a part instead of copied into it, and into the runtime's session again."""


def _large_constant(value: Value) -> NDArray[Any] | None:
    numbers = constant_array(value)
    return numbers if numbers is not None and numbers.nbytes >= LARGE_CONSTANT_BYTES else None


def _common_type_and_shape(arrays: StoredArrays) -> tuple[np.dtype[Any], tuple[int | None, ...]]:
    """Type and shape of all arrays, with None for dimensions that differ."""
    sizes = zip(*(x.shape for x in arrays.held), strict=True)
    return arrays.held[0].dtype, tuple(size[0] if len(set(size)) == 1 else None for size in sizes)


NO_INPUTS: Mapping[str, NDArray[Any]] = MappingProxyType({})


class NetworkTail:
    """The rest of a network, run with some tensors rounded or one layer replaced.

    part: the nodes to run.
    outputs: names of its outputs.
    groups: tensors, inputs of the part or computed in it, that are rounded together.
    spec: of their codes.
    opened: a node, and names for those of its inputs that `run` takes, by position.

    Scale and zero point are inputs of the model, so that one session serves all trials. Codes of fewer bits than their
    container are clipped in float before.
    """

    def __init__(
        self,
        part: SubModel,
        outputs: Sequence[str],
        groups: Sequence[Sequence[str]] = (),
        spec: QuantSpec | None = None,
        opened: tuple[str, Mapping[int, str]] = ("", MappingProxyType({})),
        *,
        threads: int | None,
    ) -> None:
        self._part, self._outputs = part, list(outputs)
        rounded = {name for group in groups for name in group}
        passed = [name for name in outputs if name in part.held and name not in rounded]
        insert_fake_quantize(part.proto, groups, passed, None if spec is None else spec.dtype)
        self._groups = len(groups)
        expose_inputs(part.proto, *opened)
        self._raw = rounded.union(passed)
        self._session = Session(
            part.proto.SerializeToString(),
            name="a part of the model",
            threads=threads,
            at_once=CONCURRENT_RUNS,
            integer_kernels=False,
        )

    def run(
        self,
        batches: Iterable[int],
        params: QuantParams | None = None,
        group: int = 0,
        fed: Mapping[str, NDArray[Any]] = NO_INPUTS,
    ) -> Iterator[list[NDArray[Any]]]:
        """Yield the outputs of these batches, with the tensors of a group rounded with `params`.

        fed: values of the inputs that were opened.
        """
        own = dict(fed)
        if self._groups > 1:
            own |= {SWITCH_INPUT.format(index): np.asarray(index == group) for index in range(self._groups)}
        if params is not None:
            low, high = params.code_range()
            numbers = {LOW_INPUT: low, HIGH_INPUT: high, SCALE_INPUT: params.scale, ZERO_POINT_INPUT: params.zero_point}
            own |= {name: np.asarray(number) for name, number in numbers.items()}
        return run_each(self._session, self._outputs, (self._feed(index) | own for index in batches))

    def _feed(self, index: int) -> dict[str, NDArray[Any]]:
        return {unrounded_name(name, self._raw): x for name, x in self._part.feed(index).items()}


MOST_TAILS, TAIL_BYTES = 12, 2**29
"""Parts of the float network that are held ready to measure what errors do, and bytes of their weights, about."""


@dataclass(slots=True)
class MovedOutputs:
    """The float network with inputs for errors. What lies in front of an error runs once a batch.

    whole: all of it. tails: what changes with each input; several have one. found: the tensors of the last batch.
    """

    model: Model
    results: list[str]
    whole: Session
    tails: dict[str, Tail]
    threads: int | None
    sessions: dict[int, Session] = field(default_factory=dict)
    found: dict[str, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: Model, inputs: Sequence[str], results: Sequence[str], *, name: str, threads: int | None
    ) -> MovedOutputs:
        """inputs: those for errors, in the order of the network. results: names of outputs, each computed by a node."""
        weights = total_weight_bytes(model)
        each = -(-len(inputs) // max(1, min(MOST_TAILS, TAIL_BYTES // max(1, weights))))
        tails: dict[str, Tail] = {}
        for start in range(0, len(inputs), each) if weights < TAIL_BYTES else ():
            some = inputs[start : start + each]
            tails |= dict.fromkeys(some, find_tail(model, some, results))
        tails = {name: tail for name, tail in tails.items() if tail.feedable}
        fed = {value.name for value in model.graph.inputs}
        read = (value.name or "" for tail in tails.values() for value in tail.reads)
        wanted = dict.fromkeys([*results, *(name for name in read if name not in fed)])
        with runnable_with_outputs(model, wanted) as runnable:
            whole = Session(runnable, name=name, threads=threads)
        return cls(model, list(results), whole, tails, threads)

    def start(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run a batch without errors. Returns the results."""
        names = list(dict.fromkeys([*self.results, *self.whole.outputs]))
        self.found = {**feeds, **dict(zip(names, self.whole.run(names, feeds), strict=True))}
        return [self.found[name] for name in self.results]

    def by(self, name: str, error: NDArray[Any]) -> list[NDArray[Any]]:
        """The results of the same batch with one error."""
        tail = self.tails.get(name)
        feeds = {**self.found, name: error}
        if tail is None:
            known = {own for own, _, _ in self.whole.inputs}
            return self.whole.run(self.results, {own: array for own, array in feeds.items() if own in known})
        if not tail.outputs:
            return [self.found[result] for result in self.results]
        if id(tail) not in self.sessions:
            part = tail.extract(self.model, self.found).SerializeToString()
            self.sessions[id(tail)] = Session(part, name=self.whole.name, threads=self.threads)
        got = self.sessions[id(tail)].run(
            tail.outputs, {value.name or "": feeds[value.name or ""] for value in tail.reads}
        )
        moved = dict(zip(tail.outputs, got, strict=True))
        return [moved[result] if result in moved else self.found[result] for result in self.results]


def collect_up_to(most: int, outputs: Iterator[list[NDArray[Any]]]) -> list[list[NDArray[Any]]]:
    """Collect the first outputs, one at least, up to `most` bytes."""
    found: list[list[NDArray[Any]]] = []
    size = 0
    for arrays in outputs:
        found.append(arrays)
        size += sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
        if size >= most:
            break
    return found
