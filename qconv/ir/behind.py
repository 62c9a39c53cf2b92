"""The rest of a network behind some tensors, as it runs where these alone are rounded, or one layer is replaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.ir.parts import HIGH, LOW, SCALE, SWITCH, ZERO, open_inputs, raw, round_within
from qconv.ir.walk import AT_ONCE, Part, each
from qconv.quantizer import QuantParams, QuantSpec
from qconv.runtime.session import Session

NOTHING: Mapping[str, NDArray[Any]] = MappingProxyType({})


class Behind:
    """part: what is run. outputs: of it. groups: tensors that are fed to it or made in it, and are rounded together.
    spec: of their codes.

    opened: a node, and names for those of its inputs that `run` is handed, by their places.
    Scale and zero point are inputs of the model: one session serves for all that is tried out. Codes of fewer bits than
    their container are clipped in float before.
    """

    def __init__(
        self,
        part: Part,
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
        round_within(part.proto, groups, passed, None if spec is None else spec.dtype)
        self._groups = len(groups)
        open_inputs(part.proto, *opened)
        self._raw = rounded.union(passed)
        self._session = Session(
            part.proto.SerializeToString(),
            name="a part of the model",
            threads=threads,
            at_once=AT_ONCE,
            integer_kernels=False,
        )

    def run(
        self,
        batches: Iterable[int],
        params: QuantParams | None = None,
        group: int = 0,
        fed: Mapping[str, NDArray[Any]] = NOTHING,
    ) -> Iterator[list[NDArray[Any]]]:
        """The outputs of these batches, one after the other, with the tensors of a group rounded like this.

        fed: numbers for what was opened.
        """
        own = dict(fed)
        if self._groups > 1:
            own |= {SWITCH.format(index): np.asarray(index == group) for index in range(self._groups)}
        if params is not None:
            low, high = params.code_range()
            numbers = {LOW: low, HIGH: high, SCALE: params.scale, ZERO: params.zero_point}
            own |= {name: np.asarray(number) for name, number in numbers.items()}
        return each(self._session, self._outputs, (self._feed(index) | own for index in batches))

    def _feed(self, index: int) -> dict[str, NDArray[Any]]:
        return {raw(name, self._raw): x for name, x in self._part.feed(index).items()}


def up_to(most: int, outputs: Iterator[list[NDArray[Any]]]) -> list[list[NDArray[Any]]]:
    """The first of them, one at least, that go into so many bytes."""
    found: list[list[NDArray[Any]]] = []
    size = 0
    for arrays in outputs:
        found.append(arrays)
        size += sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
        if size >= most:
            break
    return found
