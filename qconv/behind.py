"""The rest of a network behind some tensors, as it runs where these alone are rounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.parts import HIGH, LOW, SCALE, ZERO, raw, round_within
from qconv.quant import QuantParams, QuantSpec
from qconv.runtime import Session
from qconv.walk import AT_ONCE, Part, each


class Behind:
    """part: what is run. outputs: of it. rounded: tensors that are fed to it or made in it. spec: of their codes.

    Scale and zero point are inputs of the model: one session serves for all that is tried out. Codes of fewer bits than
    their container are clipped in float before.
    """

    def __init__(
        self,
        part: Part,
        outputs: Sequence[str],
        rounded: Sequence[str],
        spec: QuantSpec | None = None,
        *,
        threads: int | None,
    ) -> None:
        self._part, self._outputs = part, list(outputs)
        passed = [name for name in outputs if name in part.held and name not in rounded]
        round_within(part.proto, rounded, passed, None if spec is None else spec.dtype)
        self._raw = frozenset((*rounded, *passed))
        self._session = Session(
            part.proto.SerializeToString(),
            name="a part of the model",
            threads=threads,
            at_once=AT_ONCE,
            integer_kernels=False,
        )

    def run(self, batches: Iterable[int], params: QuantParams | None = None) -> Iterator[list[NDArray[Any]]]:
        """The outputs of these batches, one after the other, with the tensors rounded like this."""
        own: dict[str, NDArray[Any]] = {}
        if params is not None:
            low, high = params.code_range()
            own = {LOW: low, HIGH: high, SCALE: params.scale, ZERO: params.zero_point}
            own = {name: np.asarray(numbers) for name, numbers in own.items()}
        return each(self._session, self._outputs, (self._feed(index) | own for index in batches))

    def _feed(self, index: int) -> dict[str, NDArray[Any]]:
        return {raw(name, self._raw): x for name, x in self._part.feed(index).items()}
