"""Says what the outputs of a network are once they have been seen: its detections among them, by a decoder.

`runtime.outputs` decides output by output, from declared shapes and operators. A detector's outputs are read together,
and often have no declared shape: they are known from the first batch on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import LEAST_SCORE, Detections
from qconv.decoding.custom import make_head
from qconv.decoding.head import Head, NetworkFacts
from qconv.decoding.registry import find_head
from qconv.errors import QconvError, format_shape
from qconv.metrics.output_parts import Parts, find_parts
from qconv.runtime.output_origins import OutputOrigin
from qconv.runtime.outputs import ModelOutput
from qconv.runtime.session import Session

NO_DECODER_HINT = "pass a decoder of your own: --decode FILE.py:FUNCTION."


@dataclass(frozen=True, slots=True)
class NetworkOutputs:
    """All outputs of a network.

    head: reads detections from some of them; None where none does. parts: of outputs that hold more than one thing.
    """

    outputs: tuple[ModelOutput, ...]
    head: Head | None = None
    parts: Parts = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of the outputs, in order."""
        return [output.name for output in self.outputs]

    def by_name(self, arrays: Sequence[Any]) -> dict[str, Any]:
        """What a run has given, by the names of outputs."""
        return dict(zip(self.names, arrays, strict=True))

    def hear(self, arrays: Sequence[Any], *, reference: bool = False) -> BatchOutputs:
        """What a run on a batch has given, in the order of the outputs. reference: whether of the float model."""
        return BatchOutputs(self, arrays, reference)


@dataclass(slots=True)
class BatchOutputs:
    """What a model says of a batch, of which detections are read once, whoever asks for them.

    network: what the outputs are. arrays: in their order. reference: whether the model has put them out by which it is
    known what they are.
    """

    network: NetworkOutputs
    arrays: Sequence[Any]
    reference: bool = False
    _found: Sequence[Detections] | None = None

    @property
    def by_name(self) -> dict[str, Any]:
        """The arrays by the names of outputs."""
        return self.network.by_name(self.arrays)

    @property
    def detections(self) -> Sequence[Detections]:
        """What is detected in each picture, from LEAST_SCORE on; nothing where no output holds detections."""
        if self._found is None:
            head = self.network.head
            self._found = () if head is None else head.read(self.by_name, LEAST_SCORE, reference=self.reference)
        return self._found

    def of_picture(self, index: int) -> BatchOutputs:
        """The same of one picture of the batch, as a batch of one."""
        arrays = [array[index : index + 1] for array in self.arrays]
        return BatchOutputs(self.network, arrays, self.reference, self.detections[index : index + 1])


def describe_outputs(
    session: Session, feeds: Mapping[str, NDArray[Any]], arrays: Sequence[Any], names: Sequence[str] | None = None
) -> NetworkOutputs:
    """What the outputs of the float model are.

    Args:
        session: The float model's.
        feeds: One batch.
        arrays: What it says of that batch.
        names: Of the outputs that these are; None for all, in its own order.

    Raises:
        QconvError: The user says that the model is a detector, and no decoder knows its outputs; or the user's own
            decoder does not load.
    """
    known = {output.name: output for output in session.model_outputs}
    outputs = tuple(
        known[name].seen(array.shape) if isinstance(array, np.ndarray) else known[name]
        for name, array in zip(session.outputs if names is None else names, arrays, strict=True)
    )
    open_to = [o.name for o in outputs if o.task in ("auto", "detect")]
    seen = {o.name: a for o, a in zip(outputs, arrays, strict=True) if isinstance(a, np.ndarray)}
    head = _find_head(session, feeds, seen, open_to, {o.name: o.origin for o in outputs if o.origin is not None})
    if head is None:
        asked = [o for o in outputs if o.task == "detect"]
        if asked:
            shapes = ", ".join(f"{o.name} is {format_shape(o.shape)}" for o in asked)
            raise QconvError(
                f"--task detect: no decoder knows the outputs of {session.name}: {shapes}.", NO_DECODER_HINT
            )
        return NetworkOutputs(outputs, None, _find_all_parts(outputs, arrays, {}))
    why = f"{head.family}: {head.why}"
    read = set(head.outputs) & set(open_to)
    told = tuple(replace(o, detected=why) if o.name in read else o for o in outputs)
    return NetworkOutputs(told, head, _find_all_parts(told, arrays, head.parts))


def _find_all_parts(outputs: Sequence[ModelOutput], arrays: Sequence[Any], known: Parts) -> Parts:
    """The parts of all outputs that have some. known: those that a decoder tells."""
    found = {
        output.name: known.get(output.name) or find_parts(output, array)
        for output, array in zip(outputs, arrays, strict=True)
        if isinstance(array, np.ndarray)
    }
    return {name: parts for name, parts in found.items() if parts}


def _find_head(
    session: Session,
    feeds: Mapping[str, NDArray[Any]],
    seen: Mapping[str, NDArray[Any]],
    open_to: Sequence[str],
    origins: Mapping[str, OutputOrigin],
) -> Head | None:
    """The detections among outputs, by the user's own decoder or by one that is known. open_to: what may be some."""
    size, decode = _input_size(feeds), session.tasks.decode
    if decode is not None:
        if size is None:
            raise QconvError(f"--decode: the input of {session.name} is no picture.", "leave it out.")
        return make_head(decode, NetworkFacts(seen, size, session.metadata, origins), len(next(iter(feeds.values()))))
    found = {name: array for name, array in seen.items() if name in open_to}
    if not found or size is None:
        return None
    return find_head(NetworkFacts(found, size, session.metadata, origins))


def _input_size(feeds: Mapping[str, NDArray[Any]]) -> tuple[int, int] | None:
    """Height and width of the first input, in pixels; None where that is no picture."""
    shape = next((array.shape for array in feeds.values()), ())
    if len(shape) != 4:
        return None
    last = shape[3] in (1, 3) and shape[1] not in (1, 3)
    return (shape[1], shape[2]) if last else (shape[2], shape[3])
