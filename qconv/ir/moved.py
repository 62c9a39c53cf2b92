"""What channels of the float network were scaled and lowered by, told in the file, so that its tensors can be compared.

    x' = (x - shift) / 2^(k / STEPS)        k whole, shift float32, one of each a channel

Equalization chooses scales of this form: two bytes a channel tell them exactly. Tensors that are scaled alike, such as
those of a residual stream, share one entry.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
KEY = "qconv.moved"
STEPS = 32
"""To an octave: a range is filled to within 2 %."""
KINDS: dict[str, np.dtype[Any]] = {"scales": np.dtype("<i2"), "shifts": np.dtype("<f4")}


def on_grid(u: Float64) -> Float64:
    """log s, rounded towards zero to what can be told."""
    found: Float64 = np.trunc(u * (STEPS / math.log(2))) * (math.log(2) / STEPS)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """What became of tensors, by their names: steps of scales (C,) whole, and shifts (C,). Neither is there for all."""

    scales: Mapping[str, NDArray[np.int16]]
    shifts: Mapping[str, NDArray[np.float32]]

    def __bool__(self) -> bool:
        return bool(self.scales or self.shifts)

    def scale_of(self, tensor: str, channels: int) -> Float64 | None:
        """What each channel was divided by, (C,); None where it was not."""
        steps = self.scales.get(tensor)
        return None if steps is None or steps.size != channels else np.exp2(steps / STEPS)

    def moved(self, tensor: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Values (N, C, ...) as the quantized network has them."""
        scale, shift = self._of(tensor, x)
        if shift is not None:
            x = x - shift
        return x if scale is None else np.asarray(x / scale, np.float32)

    def back(self, tensor: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Values of the quantized network as the float model has them."""
        scale, shift = self._of(tensor, x)
        if scale is not None:
            x = np.asarray(x * scale, np.float32)
        return x if shift is None else x + shift

    def _of(self, tensor: str, x: NDArray[np.float32]) -> tuple[Float64 | None, NDArray[np.float32] | None]:
        channels = x.shape[1] if x.ndim > 1 else 0
        axes = (1, -1, *(1,) * (x.ndim - 2))
        scale, shift = self.scale_of(tensor, channels), self.shifts.get(tensor)
        return (
            None if scale is None else scale.reshape(axes),
            None if shift is None or shift.size != channels else shift.reshape(axes),
        )


def tell(
    props: MutableMapping[str, str], scales: Mapping[str, Float64], shifts: Mapping[str, NDArray[np.float32]]
) -> None:
    """Write it among a model's metadata, beside what stands there. scales: log s of tensors' channels, on the grid."""
    known = read(props)
    steps = {name: np.rint(u * (STEPS / math.log(2))).astype(np.int16) for name, u in scales.items() if u.any()}
    moves = Moves({**known.scales, **steps}, {**known.shifts, **shifts})
    if moves:
        props[KEY] = base64.b64encode(zlib.compress(_packed(moves), 9)).decode()


def read(props: Mapping[str, str]) -> Moves:
    """What a file tells; nothing for files that tell nothing, or nothing legible."""
    try:
        return _unpacked(zlib.decompress(base64.b64decode(props[KEY], validate=True)))
    except (KeyError, ValueError, TypeError, zlib.error, binascii.Error):
        return Moves({}, {})


def _packed(moves: Moves) -> bytes:
    """A line of JSON, which tells for every tensor where its numbers lie among those behind it."""
    places: dict[bytes, int] = {}
    told: dict[str, dict[str, list[int]]] = {}
    data = b""
    kinds: dict[str, Mapping[str, NDArray[Any]]] = {"scales": moves.scales, "shifts": moves.shifts}
    for kind, numbers in kinds.items():
        for name, array in sorted(numbers.items()):
            raw = array.astype(KINDS[kind]).tobytes()
            if raw not in places:
                places[raw] = len(data)
                data += raw
            told.setdefault(kind, {})[name] = [places[raw], array.size]
    return json.dumps(told, separators=(",", ":")).encode() + b"\n" + data


def _unpacked(content: bytes) -> Moves:
    head, _, data = content.partition(b"\n")
    told = json.loads(head)
    return Moves(dict(_arrays(told, data, "scales")), dict(_arrays(told, data, "shifts")))


def _arrays(told: Mapping[str, Mapping[str, list[int]]], data: bytes, kind: str) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, (start, size) in told.get(kind, {}).items():
        yield name, np.frombuffer(data, KINDS[kind], size, start)
