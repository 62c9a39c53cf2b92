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

from qconv.decoding.head import Head, NetworkFacts
from qconv.decoding.registry import find_head
from qconv.errors import QconvError, format_shape
from qconv.metrics.output_parts import Parts, find_parts
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
        QconvError: The user says that the model is a detector, and no decoder knows its outputs.
    """
    known = {output.name: output for output in session.model_outputs}
    outputs = tuple(
        known[name].seen(array.shape) if isinstance(array, np.ndarray) else known[name]
        for name, array in zip(session.outputs if names is None else names, arrays, strict=True)
    )
    open_to = [o for o in outputs if o.task in ("auto", "detect")]
    seen = {o.name: a for o, a in zip(outputs, arrays, strict=True) if o in open_to and isinstance(a, np.ndarray)}
    size = _input_size(feeds)
    head = None
    if seen and size is not None:
        origins = {o.name: o.origin for o in outputs if o.origin is not None}
        head = find_head(NetworkFacts(seen, size, session.metadata, origins))
    if head is None:
        asked = [o for o in outputs if o.task == "detect"]
        if asked:
            shapes = ", ".join(f"{o.name} is {format_shape(o.shape)}" for o in asked)
            raise QconvError(
                f"--task detect: no decoder knows the outputs of {session.name}: {shapes}.", NO_DECODER_HINT
            )
        return NetworkOutputs(outputs, None, _find_all_parts(outputs, arrays, {}))
    why = f"{head.family}: {head.why}"
    told = tuple(replace(o, detected=why) if o.name in head.outputs else o for o in outputs)
    return NetworkOutputs(told, head, _find_all_parts(told, arrays, head.parts))


def _find_all_parts(outputs: Sequence[ModelOutput], arrays: Sequence[Any], known: Parts) -> Parts:
    """The parts of all outputs that have some. known: those that a decoder tells."""
    found = {
        output.name: known.get(output.name) or find_parts(output, array)
        for output, array in zip(outputs, arrays, strict=True)
        if isinstance(array, np.ndarray)
    }
    return {name: parts for name, parts in found.items() if len(parts) > 1}


def _input_size(feeds: Mapping[str, NDArray[Any]]) -> tuple[int, int] | None:
    """Height and width of the first input, in pixels; None where that is no picture."""
    shape = next((array.shape for array in feeds.values()), ())
    if len(shape) != 4:
        return None
    last = shape[3] in (1, 3) and shape[1] not in (1, 3)
    return (shape[1], shape[2]) if last else (shape[2], shape[3])
