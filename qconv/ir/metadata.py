"""Reads and writes what a quantized file carries about itself: recipe, preprocessing, versions and equalization.

Every `qconv.*` key of a file's metadata is named here, and read here alone. A file comes from anybody: what is odd in
it (no JSON, another type, numbers that cannot be) is read as if it were not there, and `describe_odd_metadata` says so
for whoever can warn. Nothing is unpacked beyond MOST_UNPACKED_BYTES. It is also decided here which opset, IR version
and runtime a result needs. Equalization is recorded so that tensors can be compared with those of the float model:

    x' = (x - shift) / 2^(k / SCALE_STEPS)        k whole, shift float32, one of each a channel

Equalization chooses scales of this form: two bytes a channel store them exactly. Tensors that are scaled alike, such
as those of a residual stream, share one entry. Nothing that differs from run to run is written.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.data_options import LETTERBOX_OPTIONS, PRESETS, Color, Preprocessing, PreprocessingOptions
from qconv.config.targets import HIGHEST_OPSET, OPSETS
from qconv.errors import QconvError
from qconv.ir.model import Model

VERSION_KEY = "qconv.version"
"""The version of qconv that wrote the file."""
RECIPE_KEY = "qconv.recipe"
"""`Recipe.as_dict()` as JSON."""
PREPROCESSING_KEY = "qconv.preprocessing"
"""`Preprocessing.as_dict()` as JSON."""
PLACED_KEY = "qconv.placed"
"""Names of the nodes in float by choice, lists by reason, as a JSON object; in older files one list, of faster ones."""
FLOAT_MODEL_KEY = "qconv.float"
"""The hash of the float model that the file was made from."""
EQUALIZATION_KEY = "qconv.moved"
"""An EqualizationRecord: zlib in base64."""
FINETUNING_KEY = "qconv.finetune"
"""How a file was trained, as a JSON object. It is for people: nothing reads it."""

MOST_UNPACKED_BYTES = 1 << 26
"""A record of equalization that unpacks to more is odd: it would be one of ten million channels."""
MOST_PIXELS = 1 << 26
"""Of a picture that a file may ask for: a float32 array of 800 MB."""
MOST_QUOTED = 160
"""Characters of an odd entry that a warning repeats."""
MOST_OCTAVES = 120
"""Scales of channels up to here leave float32 numbers float32 numbers."""
VERSION_PATTERN = re.compile(r"[0-9A-Za-z.+_-]{1,64}")


class OddMetadataError(QconvError):
    """An entry of a file's metadata that is not what qconv writes there."""

    def __init__(self, key: str, why: str) -> None:
        fix = f"write the file again, or remove {key} from its metadata."
        super().__init__(f"the file's metadata {key} is odd: {why}.", fix)
        self.key, self.why = key, why


def describe_odd_metadata(props: Mapping[str, str]) -> list[str]:
    """A sentence for every `qconv.*` entry that is not what qconv writes there, and is ignored by all readers."""
    found = []
    for read in (_parse_version, _parse_recipe, _parse_preprocessing, _parse_placed, _parse_equalization):
        try:
            read(props)
        except OddMetadataError as error:
            found.append(f"the file's metadata {error.key} is odd, and ignored: {error.why}.")
    return found


def _parse_json(props: Mapping[str, str], key: str, kind: type[Any]) -> Any:
    """The JSON of an entry, an empty `kind` where there is none. Raises OddMetadataError for all but a `kind`."""
    if key not in props:
        return kind()
    try:
        found = json.loads(props[key])
        # a lone surrogate is JSON, and nothing can print it
        found = json.loads(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, TypeError, RecursionError):
        raise OddMetadataError(key, "it is no JSON") from None
    if not isinstance(found, kind):
        raise OddMetadataError(key, f"it holds {_JSON_NAMES.get(type(found), 'a number')}, not {_JSON_NAMES[kind]}")
    return found


_JSON_NAMES: dict[type[Any], str] = {dict: "an object", list: "a list", str: "a text", type(None): "null"}


def read_version(props: Mapping[str, str]) -> str | None:
    """The version of qconv that wrote the file; None for files by others."""
    try:
        return _parse_version(props)
    except OddMetadataError:
        return None


def _parse_version(props: Mapping[str, str]) -> str | None:
    found = props.get(VERSION_KEY)
    if found is not None and not VERSION_PATTERN.fullmatch(found):
        raise OddMetadataError(VERSION_KEY, "it is no version")
    return found


def set_ir_version(model: Model) -> None:
    """The lowest that its opset may be in."""
    model.inner.ir_version = OPSETS.get(model.opset, OPSETS[HIGHEST_OPSET]).ir_version


def write_metadata(
    model: Model,
    version: str,
    recipe: Mapping[str, Any],
    preprocessing: Preprocessing | None,
    placed: Mapping[str, str] = MappingProxyType({}),
    made_from: str = "",
) -> None:
    """Recipe, preprocessing and version travel in the file; nothing that differs from run to run does.

    recipe: as its `as_dict` gives it. placed: nodes in float by choice, and why. made_from: the float model's hash.
    """
    set_ir_version(model)
    carried = {VERSION_KEY: version, RECIPE_KEY: json.dumps(recipe, sort_keys=True)}
    if preprocessing is not None:
        carried[PREPROCESSING_KEY] = json.dumps(preprocessing.as_dict(), sort_keys=True)
    if made_from:
        carried[FLOAT_MODEL_KEY] = made_from
    if placed:
        by_reason: dict[str, list[str]] = {}
        for name, why in sorted(placed.items()):
            by_reason.setdefault(why, []).append(name)
        carried[PLACED_KEY] = json.dumps(by_reason, sort_keys=True)
    model.inner.metadata_props.update(carried)


def write_finetuning(model: Model, how: Mapping[str, Any]) -> None:
    """Write how a file was trained among its metadata."""
    model.inner.metadata_props[FINETUNING_KEY] = json.dumps(how, sort_keys=True)


def read_placed_nodes(props: Mapping[str, str]) -> dict[str, str]:
    """The nodes that a file by qconv says it left in float on purpose, each with the reason; none for other files."""
    try:
        return _parse_placed(props)
    except OddMetadataError:
        return {}


def _parse_placed(props: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    older = props.get(PLACED_KEY, "").lstrip().startswith("[")
    lists = _parse_json(props, PLACED_KEY, list if older else dict)
    for why, names in [("faster in float", lists)] if older else lists.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise OddMetadataError(PLACED_KEY, "it holds other things than names")
        found |= dict.fromkeys(names, why)
    return found


def read_recipe(props: Mapping[str, str]) -> dict[str, Any]:
    """The recipe that a file by qconv was made with; empty for other files.

    It is as the file has it, of any types: `recipe_from_dict` makes a Recipe of it, or refuses it.
    """
    try:
        return _parse_recipe(props)
    except OddMetadataError:
        return {}


def _parse_recipe(props: Mapping[str, str]) -> dict[str, Any]:
    return dict(_parse_json(props, RECIPE_KEY, dict))


# -- how images are fed ------------------------------------------------------------------------------------------------


def read_preprocessing_dict(props: Mapping[str, str]) -> dict[str, Any] | None:
    """The preprocessing as the file has it, of any types; None where it has none, or no JSON object."""
    try:
        return _parse_json(props, PREPROCESSING_KEY, dict) or None
    except OddMetadataError:
        return None


def read_preprocessing(props: Mapping[str, str]) -> PreprocessingOptions | None:
    """How another run of qconv says that this file is fed; None where none wrote it, or nothing legible."""
    try:
        found = _parse_preprocessing(props)
    except OddMetadataError:
        return None
    return None if found is None else found[0]


def read_float_preprocessing(props: Mapping[str, str]) -> PreprocessingOptions | None:
    """The same for the float network that the file was made from, which may be fed other than the file itself."""
    try:
        found = _parse_preprocessing(props)
    except OddMetadataError:
        return None
    return None if found is None else found[1]


def _parse_preprocessing(props: Mapping[str, str]) -> tuple[PreprocessingOptions, PreprocessingOptions] | None:
    """How the file is fed, and how the float network is that it was made from."""
    known = _parse_json(props, PREPROCESSING_KEY, dict)
    if PREPROCESSING_KEY not in props:
        return None
    inside = known.get("embedded") or {}
    if not isinstance(inside, dict):
        raise OddMetadataError(PREPROCESSING_KEY, "`embedded` is no object")
    return _make_options(known), _make_options({**known, **inside})


def _make_options(known: Mapping[str, Any]) -> PreprocessingOptions:
    try:
        options = PreprocessingOptions(
            preset=known["preset"],
            scale=known["scale"],
            mean=tuple(known["mean"]),
            std=tuple(known["std"]),
            color=known["color"],
            layout=known["layout"],
            resize=known["resize"],
            filter=known["filter"],
            size=tuple(known["size"]),
            **{name: known.get(name) for name in LETTERBOX_OPTIONS},
        )
    except KeyError as error:
        raise OddMetadataError(PREPROCESSING_KEY, f"it lacks {error}") from None
    except QconvError as error:  # speaks of options, which nobody typed
        raise OddMetadataError(PREPROCESSING_KEY, error.message.replace("--", "").rstrip(".")[:MOST_QUOTED]) from None
    except (TypeError, ValueError, LookupError, ArithmeticError):
        raise OddMetadataError(PREPROCESSING_KEY, "it holds something of another type") from None
    _check_options(options)
    return options


def _check_options(options: PreprocessingOptions) -> None:
    """Raise OddMetadataError for what no `Preprocessing` is, although options may be so."""
    channels = 1 if options.color is Color.GREY else 3
    for name in ("mean", "std"):
        if len(getattr(options, name)) not in (1, channels):
            raise OddMetadataError(PREPROCESSING_KEY, f"{name} has another number of values than there are channels")
    if options.color is None or options.layout is None or options.scale is None:
        raise OddMetadataError(PREPROCESSING_KEY, "color, layout or scale is null")
    if options.preset not in PRESETS:
        raise OddMetadataError(PREPROCESSING_KEY, f"the preset {options.preset} is unknown")
    size = options.size or (0, 0)
    if math.prod(size) > MOST_PIXELS:
        raise OddMetadataError(PREPROCESSING_KEY, f"pictures of {size[0]}x{size[1]} pixels are not possible")
    if isinstance(options.resize, int) and options.resize**2 > MOST_PIXELS:
        raise OddMetadataError(PREPROCESSING_KEY, f"resize {str(options.resize)[:40]} is not possible")


# -- what channels of the float network were scaled and lowered by -----------------------------------------------------

Float64 = NDArray[np.float64]

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
    """Add to what a model's metadata tell that tensors were lowered by shifts, and scaled then, as they are by now.

    scales: log s of tensors' channels, on the grid.
    """
    known = read_equalization(props)
    steps, lowered = dict(known.scales), dict(known.shifts)
    for name, shift in shifts.items():
        scale, before = known.scale_of(name, shift.size), lowered.get(name)
        moved = shift if scale is None else shift * scale
        together = moved if before is None or before.size != moved.size else before + moved
        lowered[name] = np.asarray(together, np.float32)
    for name, u in scales.items():
        more, done = np.rint(u * (SCALE_STEPS / math.log(2))).astype(np.int16), steps.get(name)
        steps[name] = more if done is None or done.size != more.size else done + more
    record = EqualizationRecord({name: own for name, own in steps.items() if own.any()}, lowered)
    if record:
        props[EQUALIZATION_KEY] = base64.b64encode(zlib.compress(_pack_record(record), 9)).decode()
    else:
        props.pop(EQUALIZATION_KEY, None)


def forget_equalization(props: MutableMapping[str, str]) -> None:
    """Drop what is told of channels: it is of another float network."""
    props.pop(EQUALIZATION_KEY, None)


def read_equalization(props: Mapping[str, str]) -> EqualizationRecord:
    """What a file tells; nothing for files that tell nothing, or nothing legible."""
    try:
        return _parse_equalization(props)
    except OddMetadataError:
        return EqualizationRecord({}, {})


def _parse_equalization(props: Mapping[str, str]) -> EqualizationRecord:
    if EQUALIZATION_KEY not in props:
        return EqualizationRecord({}, {})
    try:
        packed = base64.b64decode(props[EQUALIZATION_KEY], validate=True)
        stream = zlib.decompressobj()
        content = stream.decompress(packed, MOST_UNPACKED_BYTES)
        if stream.unconsumed_tail or not stream.eof:
            why = f"it unpacks to more than {MOST_UNPACKED_BYTES >> 20} MiB" if stream.unconsumed_tail else "it is cut"
            raise OddMetadataError(EQUALIZATION_KEY, why)
        return _unpack_record(content)
    except (ValueError, TypeError, RecursionError, zlib.error, binascii.Error):
        raise OddMetadataError(EQUALIZATION_KEY, "it is no record of equalization") from None


def _pack_record(record: EqualizationRecord) -> bytes:
    """A line of JSON, which tells for every tensor where its numbers lie among those behind it."""
    places: dict[bytes, int] = {}
    told: dict[str, dict[str, list[int]]] = {}
    data = b""
    kinds: dict[str, Mapping[str, NDArray[Any]]] = {"scales": record.scales, "shifts": record.shifts}
    for kind, numbers in kinds.items():
        for name, array in sorted(numbers.items()):
            raw = array.astype(RECORD_TYPES[kind]).tobytes()
            if raw not in places:
                places[raw] = len(data)
                data += raw
            told.setdefault(kind, {})[name] = [places[raw], array.size]
    return json.dumps(told, separators=(",", ":")).encode() + b"\n" + data


def _unpack_record(content: bytes) -> EqualizationRecord:
    """Raises ValueError or TypeError for what `_pack_record` did not write."""
    head, _, data = content.partition(b"\n")
    told = json.loads(head)
    scales, shifts = (dict(_unpack_arrays(told, data, kind)) for kind in ("scales", "shifts"))
    if any(np.abs(steps.astype(np.int64)).max(initial=0) > MOST_OCTAVES * SCALE_STEPS for steps in scales.values()):
        raise ValueError("scales")
    if not all(np.isfinite(shift).all() for shift in shifts.values()):
        raise ValueError("shifts")
    return EqualizationRecord(scales, shifts)


def _unpack_arrays(told: Any, data: bytes, kind: str) -> Iterator[tuple[str, NDArray[Any]]]:
    found = told.get(kind, {}) if isinstance(told, dict) else None
    if not isinstance(found, dict):
        raise TypeError("no object")
    for name, place in found.items():
        start, size = place
        item = np.dtype(RECORD_TYPES[kind])
        if type(start) is not int or type(size) is not int or min(start, size) < 0:
            raise ValueError("no place")
        if start + size * item.itemsize > len(data):
            raise ValueError("beyond the end")
        yield name, np.frombuffer(data, item, size, start)
