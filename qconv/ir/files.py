"""Reads ONNX files with suspicion, and writes finished models, checked, with their external data.

A file that is cut, damaged or no ONNX at all, that points outside its own folder, or that is already quantized is
refused with an error of its own before anything is changed. A written model is staged beside its place and checked by
onnx before it is moved there. Its data file is named by its content, so that model and data of two runs never mix.
`hash_model` covers the model's bytes and its data files.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message

from qconv.errors import QconvError
from qconv.ir.metadata import FLOAT_MODEL_KEY, VERSION_KEY, read_preprocessing
from qconv.ir.model import DataType, Model, ir
from qconv.ir.node_order import sort_nodes
from qconv.storage import check_output_path, convert_os_errors, locked_folder, sync_file, sync_folder, temporary_path

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


def read_proto(source: Source) -> onnx.ModelProto:
    """The file as protobuf, its nodes in order, external data left where it is.

    Raises QconvError if it is no ONNX file, or nodes wait for each other.
    """
    proto = parse_proto(source)
    sort_nodes(proto, source.name)
    return proto


def parse_proto(source: Source) -> onnx.ModelProto:
    """The file as protobuf, its nodes as they stand, external data left where it is.

    Raises QconvError if it is no ONNX file.
    """
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
        legible = all(isinstance(text, str) for text in _iter_texts(proto))
    except (DecodeError, UnicodeDecodeError):
        raise not_onnx_error(source) from None
    standard = any(opset.domain in ("", "ai.onnx") for opset in proto.opset_import)
    # a file cut between two fields still parses
    if not (legible and proto.graph.node and proto.graph.output and standard):
        raise not_onnx_error(source)
    _check_external(proto, source)
    if not all(_is_complete(tensor) for tensor in iter_tensors(proto.graph)):
        raise not_onnx_error(source)
    return proto


def _iter_texts(message: Message) -> Iterator[str | bytes]:
    """Every text. One that is no UTF-8 comes as bytes or raises: protobuf decodes them lazily."""
    if isinstance(message, onnx.TensorProto):  # by name: a list of its fields would copy its numbers
        yield from (message.name, message.doc_string)
        for entry in (*message.external_data, *message.metadata_props):
            yield from (entry.key, entry.value)
        return
    for field, found in message.ListFields():
        parts = [found] if isinstance(found, Message | str | bytes) else found
        if field.message_type is not None:
            for part in parts:
                yield from _iter_texts(part)
        elif field.type == field.TYPE_STRING:
            yield from parts


# Width of every element type; texts have none.
_BITS_OF_TYPE = {int(t): t.bitwidth for t in ir.DataType if t not in (ir.DataType.UNDEFINED, ir.DataType.STRING)}

_NUMBER_FIELDS = ("float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data")


def _expected_bytes(tensor: onnx.TensorProto) -> int:
    return int(-(-prod(tensor.dims) * _BITS_OF_TYPE[tensor.data_type] // 8))


def _is_complete(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor holds as many numbers as its shape says. Nothing is said of external ones."""
    if min(tensor.dims, default=0) < 0 or tensor.data_type not in {*_BITS_OF_TYPE, onnx.TensorProto.STRING}:
        return False
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return True
    stored = sum(len(getattr(tensor, numbers)) for numbers in _NUMBER_FIELDS)
    if tensor.data_type == onnx.TensorProto.STRING:
        return bool(stored == prod(tensor.dims))
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data) == _expected_bytes(tensor)
    if tensor.data_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128):
        return bool(stored == 2 * prod(tensor.dims))
    return bool(stored == (_expected_bytes(tensor) if _BITS_OF_TYPE[tensor.data_type] < 8 else prod(tensor.dims)))


def not_onnx_error(source: Source) -> QconvError:
    """The error for a file that is something else, or broken."""
    return QconvError(
        f"{source.name} is not an ONNX model, or it is damaged.",
        "export it again, or copy it again if it was cut short.",
    )


def _check_external(proto: onnx.ModelProto, source: Source) -> None:
    """External data paths come from a stranger: refuse any that leave the model's folder, or that is not there."""
    for tensor in iter_tensors(proto.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            try:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                _check_data_file(tensor, entries, source)
            except (ValueError, KeyError, OSError):  # no number, no element type, no path that any system could have
                raise not_onnx_error(source) from None


def external_data_files(proto: onnx.ModelProto, source: Source) -> set[Path]:
    """The files beside the model that hold its weights."""
    external = [t for t in iter_tensors(proto.graph) if t.data_location == onnx.TensorProto.EXTERNAL]
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
    offset, length = int(entries.get("offset", 0)), int(entries.get("length", _expected_bytes(tensor)))
    if offset < 0 or length != _expected_bytes(tensor):
        raise not_onnx_error(source)
    if offset + length > target.stat().st_size:
        raise QconvError(
            f"The external data file {location} is shorter than {source.name} says.",
            "copy or export both files again.",
        )


def iter_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
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
                yield from iter_tensors(body)


def declared_opset(proto: onnx.ModelProto) -> int:
    """The version of the standard operators that the file asks for."""
    return next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)


def file_bytes(proto: onnx.ModelProto, source: Source) -> int:
    """Size of the model as the user has it, data files included. `proto` as `read` gave it."""
    if source.path is None:
        return len(source.data or b"")
    folder = source.path.resolve().parent
    locations = {entry.value for t in iter_tensors(proto.graph) for entry in t.external_data if entry.key == "location"}
    return sum(path.stat().st_size for path in (source.path, *(folder / location for location in locations)))


def _find_quantized_node(proto: onnx.ModelProto, *, of_constants: bool) -> Any:
    """The first node that tells, or None. qconv's own Cast of weights, codes of up to two bytes, does, or BitShift.

    of_constants: whether nodes that read constants alone count, such as a DequantizeLinear of weights. Of a file by
    qconv they do: it was made from another one.
    """
    own = VERSION_KEY in metadata_of(proto)
    codes = {tensor.name: tensor.data_type for tensor in proto.graph.initializer if own}
    constant = {"", *(tensor.name for tensor in proto.graph.initializer)}
    for node in proto.graph.node:
        if constant.issuperset(node.input) and not any(attr.type in _BODIES for attr in node.attribute):
            constant.update(node.output)
            if not (of_constants or own):
                continue
        if node.op_type in QUANTIZED_OPS or node.op_type.startswith("QLinear"):
            return node
        if codes.get(next(iter(node.input), "")) in _CODE_TYPES.get(node.op_type, ()):
            return node
    return None


_CODE_TYPES = {"Cast": {DataType.INT8, DataType.INT16, DataType.INT4, DataType.INT2}, "BitShift": {DataType.UINT8}}
"""What qconv's own operators read that unpack codes, or make floats of them once."""

_BODIES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def metadata_of(proto: onnx.ModelProto) -> dict[str, str]:
    """What the file says about itself."""
    return {entry.key: entry.value for entry in proto.metadata_props}


def find_carried_size(sources: Iterable[Source]) -> tuple[int, int] | None:
    """Height and width that the first file by qconv among these was made with, and leaves open; None without one."""
    for source in sources:
        with contextlib.suppress(QconvError):  # it is told of where the file is run
            proto = read_proto(source)
            carried = read_preprocessing(metadata_of(proto))
            sides = proto.graph.input[0].type.tensor_type.shape.dim[1:] if proto.graph.input else ()
            if carried is not None and any(side.dim_value < 1 for side in sides):
                return carried.size
    return None


def holds_codes(proto: onnx.ModelProto) -> bool:
    """Whether it holds quantized operators, be it of constants alone."""
    return _find_quantized_node(proto, of_constants=True) is not None


def is_quantized(proto: onnx.ModelProto) -> bool:
    """Whether it is quantized: activations are, or the weights of all its layers.

    A network of which some weights are stored as codes is float: they are constants that loading computes.
    """
    if _find_quantized_node(proto, of_constants=False) is not None:
        return True
    return holds_codes(proto) and not _has_float_weights(proto)


def _has_float_weights(proto: onnx.ModelProto) -> bool:
    """Whether a layer has constant weights that no codes stand for."""
    floats = {"", *(tensor.name for tensor in proto.graph.initializer)}
    for node in proto.graph.node:
        if node.op_type not in QUANTIZED_OPS and floats.issuperset(node.input):
            floats.update(node.output)
    return any(len(n.input) > 1 and n.input[1] in floats for n in proto.graph.node if n.op_type in _LAYERS)


_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def refuse_quantized(proto: onnx.ModelProto, name: str) -> None:
    """Raise if activations are quantized already; weights alone are constants that loading computes."""
    found = _find_quantized_node(proto, of_constants=False)
    if found is not None:
        kind = f"{found.op_type} nodes{' of codes' if found.op_type == 'Cast' else ''}"
        raise QconvError(
            f"{name} is already quantized (it has {kind}).",
            "start from the float model it was made from.",
        )


PROTOBUF_LIMIT = 2**31 - 2**20


@dataclass(slots=True)
class StagedModel:
    """A finished file that is not yet in its place. data: its data file, None where it has none."""

    folder: Path
    path: Path
    data: Path | None

    @property
    def size(self) -> int:
        """Bytes of model and data together."""
        return sum(p.stat().st_size for p in (self.path, self.data) if p is not None)

    def commit(self, out: Path) -> None:
        """Put the file in its place: data first, model last."""
        before = _existing_data_files(out)
        with convert_os_errors(out):
            if self.data is not None:
                os.replace(self.data, out.parent / self.data.name)
            os.replace(self.path, out)
            sync_folder(out.parent)
            for stale in before - {out.parent / self.data.name if self.data is not None else None}:
                stale.unlink(missing_ok=True)


@contextlib.contextmanager
def stage_model(model: Model, out: Path | None) -> Iterator[StagedModel]:
    """Write `model` into a hidden folder beside `out` (None: among the system's temporary files); gone at the end."""
    if out is not None:
        check_output_path(out)
    place = out or temporary_path()
    with locked_folder(place) as folder:
        path = folder / place.name
        with convert_os_errors(place):
            data = _write(model, path, allow_external=out is not None)
        yield StagedModel(folder, path, data)


def check_staged_model(staged: StagedModel) -> None:
    """onnx's own checker on the written file. Raises QconvError where it does not accept it."""
    try:
        onnx.checker.check_model(staged.path)
    except (UnicodeEncodeError, TypeError):  # a place whose name is not UTF-8
        onnx.checker.check_model(onnx.load(staged.path))
    except onnx.checker.ValidationError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise QconvError(
            f"onnx's checker does not accept the result: {reason}",
            "the float model passed the same check, so this is a fault of qconv: please report it.",
        ) from None


def total_weight_bytes(model: Model) -> int:
    """Size of all weights."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def full_proto(model: Model) -> onnx.ModelProto:
    """The model as protobuf, external tensors read into it."""
    if model.external:
        ir.external_data.load_to_model(model.inner)
    return model.proto()


def _write(model: Model, path: Path, *, allow_external: bool) -> Path | None:
    large = total_weight_bytes(model) >= PROTOBUF_LIMIT
    if large and not allow_external:
        raise QconvError("The result is too large for one file.", "name an output with -o; a data file goes beside it.")
    if not (large or (model.external and allow_external)):
        path.write_bytes(full_proto(model).SerializeToString(deterministic=True))
        sync_file(path)
        return None
    plain = path.with_name(f"{path.name}.data")
    ir.save(model.inner, path, external_data=plain.name)
    if not plain.stat().st_size:  # nothing was large enough for it
        plain.unlink()
        sync_file(path)
        return None
    with plain.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    data = path.with_name(f"{path.name}.{digest}.data")
    plain.rename(data)
    proto = onnx.load(path, load_external_data=False)
    for tensor in iter_tensors(proto.graph):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data.name
    path.write_bytes(proto.SerializeToString(deterministic=True))
    sync_file(data)
    sync_file(path)
    return data


def _existing_data_files(out: Path) -> set[Path]:
    """Data files of our naming that the model now at `out` has."""
    pattern = f"{glob.escape(out.name)}.{'[0-9a-f]' * 8}.data"
    return set(out.parent.glob(pattern)) if out.exists() else set()


def hash_model(source: Source, data: Iterable[Path]) -> str:
    """The hash of a model's bytes, those of its data files included."""
    found = hashlib.sha256((source.data or b"") if source.path is None else source.path.read_bytes())
    for path in sorted(data):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


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
