"""Reads and writes what a quantized file carries about itself: recipe, preprocessing, versions and equalization.

It also decides which opset, IR version and runtime a result needs, and finds by its hash the float model (the
teacher) that a quantized file was made from. Equalization is recorded so that tensors can be compared with those of
the float model:

    x' = (x - shift) / 2^(k / SCALE_STEPS)        k whole, shift float32, one of each a channel

Equalization chooses scales of this form: two bytes a channel store them exactly. Tensors that are scaled alike, such
as those of a residual stream, share one entry. Nothing that differs from run to run is written.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import math
import zlib
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.choices import WeightGranularity
from qconv.config.preprocessing import Preprocessing
from qconv.config.recipe import Recipe
from qconv.config.targets import IR_VERSIONS, LOWEST_OPSET, OLDEST_RUNTIMES
from qconv.errors import QconvError
from qconv.ir.files import Source, external_data_files, hash_model, metadata_of, read_proto
from qconv.ir.model import Model

# Which opset and IR version a result needs, what runs it, and what it carries about itself.


PLACED_KEY = "qconv.placed"

FLOAT_MODEL_KEY = "qconv.float"
"""Where a file tells the hash of the float model that it was made from."""

NEW_TYPES_OPSET = 21  # int4, int16 and blocks


def needed_opset(recipe: Recipe, own: int) -> int:
    """The lowest opset that holds a model of opset `own` and the recipe's types, or the one that the recipe names."""
    new_types = (
        recipe.pack
        or 16 in {*recipe.bits_of_weights, *recipe.bits_of_activations, recipe.edge_bits}
        or recipe.weight_granularity is WeightGranularity.PER_BLOCK
    )
    needed = max(own, NEW_TYPES_OPSET if new_types else LOWEST_OPSET)
    if recipe.opset is None:
        return needed
    if recipe.opset < needed:
        what = "the model's own opset" if needed == own else "what these types need"
        raise QconvError(
            f"--opset {recipe.opset} is below {what} ({needed}).", f"pass --opset {needed} or leave it out."
        )
    if recipe.opset not in IR_VERSIONS:
        raise QconvError(f"--opset {recipe.opset} is not known.", f"use {LOWEST_OPSET} to {max(IR_VERSIONS)}.")
    return recipe.opset


def needed_runtime(model: Model, recipe: Recipe) -> str:
    """The oldest ONNX Runtime that runs the file right."""
    version = OLDEST_RUNTIMES.get(model.opset, OLDEST_RUNTIMES[max(OLDEST_RUNTIMES)])
    in_integers = (bits for bits in recipe.bits_of_weights if recipe.activation_bits < 32 and not recipe.packs(bits))
    if any(map(recipe.has_zero_points, in_integers)):
        version = "1.28"  # earlier ones refuse per-channel zero points that differ
    return f"onnxruntime >= {version}"


def set_ir_version(model: Model) -> None:
    """The lowest that its opset may be in."""
    model.inner.ir_version = IR_VERSIONS.get(model.opset, max(IR_VERSIONS.values()))


def write_metadata(
    model: Model,
    version: str,
    recipe: Mapping[str, Any],
    preprocessing: Preprocessing | None,
    placed: Collection[str] = (),
    made_from: str = "",
) -> None:
    """Recipe, preprocessing and version travel in the file; nothing that differs from run to run does.

    recipe: as its `as_dict` gives it. placed: names of nodes that are in float because that is faster. made_from: hash
    of the float model.
    """
    set_ir_version(model)
    carried = {"qconv.version": version, "qconv.recipe": json.dumps(recipe, sort_keys=True)}
    if preprocessing is not None:
        carried["qconv.preprocessing"] = json.dumps(preprocessing.as_dict(), sort_keys=True)
    if made_from:
        carried[FLOAT_MODEL_KEY] = made_from
    if placed:
        carried[PLACED_KEY] = json.dumps(sorted(placed))
    model.inner.metadata_props.update(carried)


def read_placed_nodes(model: Model) -> frozenset[str]:
    """The nodes that a file by qconv says it left in float on purpose; none for other files."""
    with contextlib.suppress(ValueError):
        names = json.loads(model.inner.metadata_props.get(PLACED_KEY, "[]"))
        if isinstance(names, list):
            return frozenset(map(str, names))
    return frozenset()


def read_recipe(model: Model) -> dict[str, Any]:
    """The recipe that a file by qconv was made with; empty for other files."""
    with contextlib.suppress(KeyError, ValueError):
        found = json.loads(model.inner.metadata_props["qconv.recipe"])
        return found if isinstance(found, dict) else {}
    return {}


# What channels of the float network were scaled and lowered by, told in the file, so that its tensors can be compared.
#
#     x' = (x - shift) / 2^(k / STEPS)        k whole, shift float32, one of each a channel
#
# Equalization chooses scales of this form: two bytes a channel tell them exactly. Tensors that are scaled alike, such
# as those of a residual stream, share one entry.


Float64 = NDArray[np.float64]

EQUALIZATION_KEY = "qconv.moved"

SCALE_STEPS = 32
"""To an octave: a range is filled to within 2 %."""

RECORD_TYPES: dict[str, np.dtype[Any]] = {"scales": np.dtype("<i2"), "shifts": np.dtype("<f4")}


def round_log_scale(u: Float64) -> Float64:
    """log s, rounded towards zero to what can be told."""
    found: Float64 = np.trunc(u * (SCALE_STEPS / math.log(2))) * (math.log(2) / SCALE_STEPS)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class EqualizationRecord:
    """What became of tensors, by their names: steps of scales (C,) whole, and shifts (C,). Neither is there for all."""

    scales: Mapping[str, NDArray[np.int16]]
    shifts: Mapping[str, NDArray[np.float32]]

    def __bool__(self) -> bool:
        return bool(self.scales or self.shifts)

    def scale_of(self, tensor: str, channels: int) -> Float64 | None:
        """What each channel was divided by, (C,); None where it was not."""
        steps = self.scales.get(tensor)
        return None if steps is None or steps.size != channels else np.exp2(steps / SCALE_STEPS)

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


def write_equalization(
    props: MutableMapping[str, str], scales: Mapping[str, Float64], shifts: Mapping[str, NDArray[np.float32]]
) -> None:
    """Write it among a model's metadata, beside what stands there. scales: log s of tensors' channels, on the grid."""
    known = read_equalization(props)
    steps = {name: np.rint(u * (SCALE_STEPS / math.log(2))).astype(np.int16) for name, u in scales.items() if u.any()}
    moves = EqualizationRecord({**known.scales, **steps}, {**known.shifts, **shifts})
    if moves:
        props[EQUALIZATION_KEY] = base64.b64encode(zlib.compress(_pack_record(moves), 9)).decode()


def read_equalization(props: Mapping[str, str]) -> EqualizationRecord:
    """What a file tells; nothing for files that tell nothing, or nothing legible."""
    try:
        return _unpack_record(zlib.decompress(base64.b64decode(props[EQUALIZATION_KEY], validate=True)))
    except (KeyError, ValueError, TypeError, zlib.error, binascii.Error):
        return EqualizationRecord({}, {})


def _pack_record(moves: EqualizationRecord) -> bytes:
    """A line of JSON, which tells for every tensor where its numbers lie among those behind it."""
    places: dict[bytes, int] = {}
    told: dict[str, dict[str, list[int]]] = {}
    data = b""
    kinds: dict[str, Mapping[str, NDArray[Any]]] = {"scales": moves.scales, "shifts": moves.shifts}
    for kind, numbers in kinds.items():
        for name, array in sorted(numbers.items()):
            raw = array.astype(RECORD_TYPES[kind]).tobytes()
            if raw not in places:
                places[raw] = len(data)
                data += raw
            told.setdefault(kind, {})[name] = [places[raw], array.size]
    return json.dumps(told, separators=(",", ":")).encode() + b"\n" + data


def _unpack_record(content: bytes) -> EqualizationRecord:
    head, _, data = content.partition(b"\n")
    told = json.loads(head)
    return EqualizationRecord(dict(_unpack_arrays(told, data, "scales")), dict(_unpack_arrays(told, data, "shifts")))


def _unpack_arrays(
    told: Mapping[str, Mapping[str, list[int]]], data: bytes, kind: str
) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, (start, size) in told.get(kind, {}).items():
        yield name, np.frombuffer(data, RECORD_TYPES[kind], size, start)


# The float model that a quantized file was made from.


MOST_FILES_TRIED = 64
"""Files beside the quantized one that are looked at."""


def find_teacher(source: Source) -> Source:
    """The float model that a file was made from, by its hash, among those beside it."""
    hint = "pass the float model with --teacher FLOAT."
    wanted = metadata_of(read_proto(source)).get(FLOAT_MODEL_KEY)
    if wanted is None or source.path is None:
        raise QconvError(f"{source.name} does not say which float model it was made from.", hint)
    folder = source.path.resolve().parent
    stem = source.path.name.split(".")[0]
    beside = sorted(folder.glob("*.onnx"), key=lambda path: (not path.name.startswith(stem), path.name))
    for path in beside[:MOST_FILES_TRIED]:
        own = Source(str(source.path.parent / path.name), source.path.parent / path.name)
        with contextlib.suppress(QconvError):
            if hash_model(own, external_data_files(read_proto(own), own)) == wanted:
                return own
    raise QconvError(f"The float model that {source.name} was made from is not beside it.", hint)
