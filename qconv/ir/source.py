"""The file as it comes: read and looked at with suspicion, before anything is made of it.

A file that is cut, damaged or no ONNX at all, that points outside its own folder, or that is already quantized ends
here, each in an error of its own. Nothing is changed yet.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message

from qconv.config.recipe import Recipe
from qconv.errors import QconvError
from qconv.ir.graph import ir
from qconv.runtime.session import Session

QUANTIZED_OPS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"}
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a float model comes from: a file, or bytes from standard input (then `path` is None)."""

    name: str
    path: Path | None
    data: bytes | None = None

    @property
    def runnable(self) -> str | bytes:
        """What ONNX Runtime is given to run the model as the user has it."""
        if self.path is None:
            assert self.data is not None
            return self.data
        return str(self.path)


def source_of(model: str) -> Source:
    """What the command line names: a file, or `-` for standard input, which is read here."""
    if model == "-":
        return Source("the model on standard input", None, sys.stdin.buffer.read())
    return Source(model, Path(model))


def read(source: Source) -> onnx.ModelProto:
    """The file as protobuf, external data left where it is. Raises QconvError if it is no ONNX file."""
    try:
        data = source.path.read_bytes() if source.path is not None else (source.data or b"")
    except FileNotFoundError:
        raise QconvError(f"{source.name} does not exist.", "check the path of the model.") from None
    except OSError as error:
        raise QconvError(f"{source.name} cannot be read: {error.strerror}.", "check the path and its rights.") from None
    if not data:
        raise QconvError(f"{source.name} is empty.", "export the model again.")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
        del data
        legible = all(isinstance(text, str) for text in _texts(proto))
    except (DecodeError, UnicodeDecodeError):
        raise not_onnx(source) from None
    standard = any(opset.domain in ("", "ai.onnx") for opset in proto.opset_import)
    # a file cut between two fields still parses
    if not (legible and proto.graph.node and proto.graph.output and standard):
        raise not_onnx(source)
    _check_external(proto, source)
    if not all(_is_whole(tensor) for tensor in tensors(proto.graph)):
        raise not_onnx(source)
    return proto


def _texts(message: Message) -> Iterator[str | bytes]:
    """Every text but those in tensors. One that is no UTF-8 comes as bytes or raises: protobuf decodes them lazily."""
    if isinstance(message, onnx.TensorProto):
        yield message.name
        return
    for field, found in message.ListFields():
        parts = [found] if isinstance(found, Message | str | bytes) else found
        if field.message_type is not None:
            for part in parts:
                yield from _texts(part)
        elif field.type == field.TYPE_STRING:
            yield from parts


# Width of every element type; texts have none.
_BITS = {int(t): t.bitwidth for t in ir.DataType if t not in (ir.DataType.UNDEFINED, ir.DataType.STRING)}
_NUMBERS = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data")


def _bytes_said(tensor: onnx.TensorProto) -> int:
    return int(-(-prod(tensor.dims) * _BITS[tensor.data_type] // 8))


def _is_whole(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor holds as many numbers as its shape says. Nothing is said of external ones."""
    if min(tensor.dims, default=0) < 0 or tensor.data_type not in {*_BITS, onnx.TensorProto.STRING}:
        return False
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return True
    stored = sum(len(getattr(tensor, numbers)) for numbers in _NUMBERS)
    if tensor.data_type == onnx.TensorProto.STRING:
        return bool(stored == prod(tensor.dims))
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data) == _bytes_said(tensor)
    if tensor.data_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128):
        return bool(stored == 2 * prod(tensor.dims))
    return bool(stored == (_bytes_said(tensor) if _BITS[tensor.data_type] < 8 else prod(tensor.dims)))


def not_onnx(source: Source) -> QconvError:
    """The error for a file that is something else, or broken."""
    return QconvError(
        f"{source.name} is not an ONNX model, or it is damaged.",
        "export it again, or copy it again if it was cut short.",
    )


def _check_external(proto: onnx.ModelProto, source: Source) -> None:
    """External data paths come from a stranger: refuse any that leave the model's folder, or that is not there."""
    for tensor in tensors(proto.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            try:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                _check_data_file(tensor, entries, source)
            except (ValueError, KeyError, OSError):  # no number, no element type, no path that any system could have
                raise not_onnx(source) from None


def data_files(proto: onnx.ModelProto, source: Source) -> set[Path]:
    """The files beside the model that hold its weights."""
    external = [t for t in tensors(proto.graph) if t.data_location == onnx.TensorProto.EXTERNAL]
    found = {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}
    return set() if source.path is None else {source.path.resolve().parent / location for location in found}


def _check_data_file(tensor: onnx.TensorProto, entries: dict[str, str], source: Source) -> None:
    location = entries.get("location", "")
    if source.path is None:
        raise QconvError(
            f"The model on standard input keeps weights in another file ({location}).",
            "pass the path of the model instead of '-'.",
        )
    folder = source.path.resolve().parent
    target = (folder / location).resolve()
    if PurePosixPath(location).is_absolute() or not location or not target.is_relative_to(folder):
        raise QconvError(
            f"{source.name} points to external data outside its own folder: {location!r}.",
            "do not trust this file; put the data file beside the model and save it again.",
        )
    if not target.is_file():
        raise QconvError(
            f"{source.name} needs the external data file {location}, which is missing.", "put it beside the model."
        )
    offset, length = int(entries.get("offset", 0)), int(entries.get("length", _bytes_said(tensor)))
    if offset < 0 or length != _bytes_said(tensor):
        raise not_onnx(source)
    if offset + length > target.stat().st_size:
        raise QconvError(
            f"The external data file {location} is shorter than {source.name} says.",
            "copy or export both files again.",
        )


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All tensors of a graph: initializers and attributes, those of its bodies included."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attr in node.attribute:
            if attr.HasField("t"):
                yield attr.t
            yield from attr.tensors
            for body in (*([attr.g] if attr.HasField("g") else []), *attr.graphs):
                yield from tensors(body)


def own_opset(proto: onnx.ModelProto) -> int:
    """The version of the standard operators that the file asks for."""
    return next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)


def file_bytes(proto: onnx.ModelProto, source: Source) -> int:
    """Size of the model as the user has it, data files included. `proto` as `read` gave it."""
    if source.path is None:
        return len(source.data or b"")
    folder = source.path.resolve().parent
    locations = {entry.value for t in tensors(proto.graph) for entry in t.external_data if entry.key == "location"}
    return sum(path.stat().st_size for path in (source.path, *(folder / location for location in locations)))


def _quantized_node(proto: onnx.ModelProto) -> Any:
    """The first node that tells, or None. qconv's own Cast of weights, codes of one or two bytes, does."""
    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.INT16) if "qconv.version" in metadata(proto) else ()
    codes = {tensor.name for tensor in proto.graph.initializer if tensor.data_type in kinds}
    for node in proto.graph.node:
        if node.op_type in QUANTIZED_OPS or node.op_type.startswith("QLinear"):
            return node
        if node.op_type == "Cast" and node.input[0] in codes:
            return node
    return None


def metadata(proto: onnx.ModelProto) -> dict[str, str]:
    """What the file says about itself."""
    return {entry.key: entry.value for entry in proto.metadata_props}


def is_quantized(proto: onnx.ModelProto) -> bool:
    """Whether it holds quantized operators."""
    return _quantized_node(proto) is not None


def refuse_quantized(proto: onnx.ModelProto, name: str) -> None:
    """Raise if the model already holds quantized operators."""
    found = _quantized_node(proto)
    if found is not None:
        raise QconvError(
            f"{name} is already quantized (it has {found.op_type} nodes).",
            "start from the float model it was made from.",
        )


def original(source: Source, recipe: Recipe) -> Session:
    """The user's own model, as it is."""
    return Session(source.runnable, name=source.name, threads=recipe.threads)
