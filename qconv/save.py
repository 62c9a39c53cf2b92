"""A file appears whole or not at all: written into a hidden folder beside its place, checked there, synced, renamed.

A kill leaves at most that hidden folder, and the next run for the same output removes it: a living run holds a lock on
its folder, which the system lets go when the process ends, however it ends. Where weights go into a data file, it is
named by its content, so that the model and the data of two runs never mix.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from filelock import BaseFileLock, FileLock, Timeout

from qconv.errors import QconvError
from qconv.ir.graph import Model, Node, ir, tensor_proto
from qconv.ir.source import tensors
from qconv.signals import takes

PROTOBUF_LIMIT = 2**31 - 2**20
SUFFIX = ".qconv-tmp"
ASIDE = ".old"
"""Behind the name of a folder that was moved aside."""
TRIES = 8
"""Locks that are asked for before it is taken that the file system has none."""


@dataclass(slots=True)
class Staged:
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
        before = _data_files(out)
        with explained(out):
            if self.data is not None:
                os.replace(self.data, out.parent / self.data.name)
            os.replace(self.path, out)
            sync_folder(out.parent)
            for stale in before - {out.parent / self.data.name if self.data is not None else None}:
                stale.unlink(missing_ok=True)


@contextlib.contextmanager
def staged(model: Model, out: Path | None) -> Iterator[Staged]:
    """Write `model` into a hidden folder beside `out` (None: among the system's temporary files); gone at the end."""
    if out is not None:
        check_place(out)
    place = out or _temporary()
    with locked_folder(place) as folder:
        path = folder / place.name
        with explained(place):
            data = _write(model, path, allow_external=out is not None)
        yield Staged(folder, path, data)


def write_whole(out: Path, data: bytes) -> None:
    """Write a file that is no model; it appears whole or not at all."""
    check_place(out)
    with locked_folder(out) as folder, explained(out):
        path = folder / out.name
        path.write_bytes(data)
        sync(path)
        os.replace(path, out)
        sync_folder(out.parent)


@contextlib.contextmanager
def locked_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, of this run alone, removed at the end; those of killed runs go first."""
    remove_stale(out)
    folder, lock = _taken_folder(out)
    try:
        yield folder
    finally:
        _remove(folder, lock)


@takes
def _taken_folder(out: Path) -> tuple[Path, BaseFileLock]:
    """A new folder and the lock on it.

    Another run may see the folder in the instant before it is locked, take it for a stale one and remove it: then the
    next one is tried. Not every file system has locks: without them stale folders stay. A lock that is refused time and
    again is no other run's work: filelock takes some ways to say that there are none for a lock that is held.
    """
    tries = 0
    while True:
        tries += 1
        with explained(out):
            folder = Path(tempfile.mkdtemp(suffix=SUFFIX, prefix=f".{out.name}.", dir=out.parent))
        lock = _lock_of(folder, out)
        if (_is_ours(lock) or tries >= TRIES) and folder.exists():
            return folder, lock
        _remove(folder, lock)


def _lock_of(folder: Path, out: Path) -> BaseFileLock:
    """Its file lies in the folder, under a name that neither the output nor its data file has."""
    return FileLock(folder / f"{out.name}.lock")


def _is_ours(lock: BaseFileLock) -> bool:
    """Lock a new folder. False where another run did before, or has removed the folder already."""
    try:
        lock.acquire(blocking=False)
    except (OSError, NotImplementedError) as error:
        return not isinstance(error, Timeout | FileNotFoundError)
    return True


def _remove(folder: Path, lock: BaseFileLock) -> None:
    """Remove a folder and let its lock go. Where a file that is open cannot be removed, the lock has to go first."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        lock.release()
    if os.name == "nt":
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def scratch(size: int) -> Iterator[Path]:
    """A folder among the system's temporary files with room for `size` bytes. Raises QconvError where there is none."""
    with explained(_temporary()), tempfile.TemporaryDirectory(prefix="qconv-", ignore_cleanup_errors=True) as folder:
        if shutil.disk_usage(folder).free < size:
            place = tempfile.gettempdir()
            raise QconvError(f"No space is left in {place} to check the result.", "free some, or set TMPDIR.")
        yield Path(folder)


def check_place(out: Path) -> None:
    """Raise QconvError where no file can be written at `out`; remove what killed runs left there."""
    with explained(out):
        _check_place(out)
    remove_stale(out)


def refuse_what_is_read(out: Path, read: Iterable[str | Path]) -> None:
    """Raise QconvError where `out` is one of the files that are read."""
    if out.is_file() and any(Path(name).is_file() and out.samefile(name) for name in read):
        raise QconvError(f"{out} is read, and would be written over.", "choose another name.")


def _check_place(out: Path) -> None:
    if not out.parent.is_dir():
        raise QconvError(f"The folder {out.parent} does not exist.", "create it, or choose another output.")
    if out.is_dir():
        raise QconvError(f"{out} is a folder.", "name a file as the output.")
    if out.exists() and not out.is_file():
        raise QconvError(f"{out} is a device or a pipe, which cannot be replaced.", "name a file as the output.")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise QconvError(f"The folder {out.parent} cannot be written to.", "choose another output.")


def remove_stale(out: Path) -> None:
    """Remove the folders beside `out` that no living process holds a lock on."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*{SUFFIX}"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        lock = _lock_of(folder, out)
        with contextlib.suppress(OSError, NotImplementedError):
            lock.acquire(blocking=False)
            try:
                _bring_back(folder, out)
            finally:
                _remove(folder, lock)


def _temporary() -> Path:
    """Where a model is written that has no place of its own."""
    return Path(tempfile.gettempdir()) / "qconv.onnx"


def check(staged: Staged) -> None:
    """onnx's own checker on the written file. Raises QconvError where it does not accept it."""
    try:
        onnx.checker.check_model(staged.path)
    except (UnicodeEncodeError, TypeError):  # a place whose name is not UTF-8
        onnx.checker.check_model(onnx.load(staged.path))
    except onnx.checker.ValidationError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise QconvError(
            f"onnx's checker does not accept the result: {reason}", "check the float model with onnx.checker first."
        ) from None


def total_bytes(model: Model) -> int:
    """Size of all weights."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


@dataclass(frozen=True, slots=True)
class Pooling:
    """A tensor (N, C, H, W) of which the network returns maximum and mean of each channel, (N, C, 1, 1).

    stride: also every stride-th pixel in both directions is returned, None for none.
    """

    name: str
    stride: int | None = None

    def nodes(self) -> list[onnx.NodeProto]:
        """What the network is to compute. The runtime keeps large tensors in a layout of its own, in which it can pool
        them; to be returned whole they must be brought into the usual one, which costs as much as a layer."""
        made: list[tuple[str, dict[str, Any]]] = [("GlobalMaxPool", {}), ("GlobalAveragePool", {})]
        if self.stride is not None:
            made.append(("MaxPool", {"kernel_shape": [1, 1], "strides": [self.stride, self.stride]}))
        return [
            onnx.helper.make_node(op_type, [self.name], [result], **attributes)
            for (op_type, attributes), result in zip(made, pooled_names(self.name), strict=False)
        ]


def pooled_names(name: str) -> tuple[str, str, str]:
    """What `runnable` calls maximum and mean of each channel of a tensor, and the sample of its pixels."""
    return f"{name}/channel_max", f"{name}/channel_mean", f"{name}/sample"


@contextlib.contextmanager
def runnable(model: Model, outputs: Iterable[str], poolings: Iterable[Pooling] = ()) -> Iterator[str | bytes]:
    """The model with `outputs` returned as well, as ONNX Runtime takes it: bytes, or a path where they are too many.

    poolings: tensors that are returned in part, under `pooled_names`.
    """
    wanted = set(outputs) - {value.name for value in model.graph.outputs}
    produced = [value for node in model.graph for value in node.outputs]
    extra = [ir.serde.serialize_value(value) for value in produced if value.name in wanted]
    pools = [node for pooling in poolings for node in pooling.nodes()]
    extra += [onnx.helper.make_tensor_value_info(n.output[0], onnx.TensorProto.FLOAT, None) for n in pools]
    if total_bytes(model) < PROTOBUF_LIMIT:
        proto = _whole(model)
        proto.graph.node.extend(pools)
        proto.graph.output.extend(extra)
        data = proto.SerializeToString()
        del proto  # as large as all weights
        yield data
        return
    with locked_folder(_temporary()) as folder:
        path = folder / "model.onnx"
        ir.save(model.inner, path, external_data="model.data")
        proto = onnx.load(path, load_external_data=False)
        proto.graph.node.extend(pools)
        proto.graph.output.extend(extra)
        path.write_bytes(proto.SerializeToString())
        yield str(path)


def moments_of(model: Model, tensors: Iterable[str]) -> bytes | None:
    """The part of the model that leads to `tensors` (N, C, H, W), as ONNX Runtime takes it.

    It returns the mean of each channel and the mean of its square, (N, C, 1, 1), tensor by tensor; nothing else. None
    where the part holds bodies (If, Loop), or more than one protobuf can.
    """
    wanted = list(tensors)
    nodes = _leading_to(model, set(wanted))
    read = [value for node in nodes for value in node.inputs if value is not None and value.is_initializer()]
    weights = list({value.name: value for value in read}.values())
    kinds = {attribute.type for node in nodes for attribute in node.attributes.values()}
    bodies = kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}
    if bodies or sum(value.const_value.nbytes for value in weights if value.const_value) >= PROTOBUF_LIMIT:
        return None
    protos, results = [ir.serde.serialize_node(node) for node in nodes], []
    for name in wanted:
        for op_type, inputs, result in (
            ("GlobalAveragePool", [name], f"{name}/mean"),
            ("Mul", [name, name], f"{name}/square"),
            ("GlobalAveragePool", [f"{name}/square"], f"{name}/mean_square"),
        ):
            protos.append(onnx.helper.make_node(op_type, inputs, [result]))
        results += [f"{name}/mean", f"{name}/mean_square"]
    graph = onnx.helper.make_graph(
        protos,
        "moments",
        [ir.serde.serialize_value(value) for value in model.graph.inputs],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in results],
        [tensor_proto(value) for value in weights],
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.graph.opset_imports.items()]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.inner.ir_version)
    data: bytes = proto.SerializeToString()
    return data


def _leading_to(model: Model, tensors: set[str]) -> list[Node]:
    """The nodes that `tensors` depend on, in order."""
    needed, found = set(tensors), []
    for node in reversed(model.nodes()):
        if any(value.name in needed for value in node.outputs):
            found.append(node)
            needed.update(value.name for value in node.inputs if value is not None and value.name)
    return found[::-1]


def _whole(model: Model) -> onnx.ModelProto:
    """The model as protobuf, external tensors read into it."""
    if model.external:
        ir.external_data.load_to_model(model.inner)
    return model.proto()


def _write(model: Model, path: Path, *, allow_external: bool) -> Path | None:
    large = total_bytes(model) >= PROTOBUF_LIMIT
    if large and not allow_external:
        raise QconvError("The result is too large for one file.", "name an output with -o; a data file goes beside it.")
    if not (large or (model.external and allow_external)):
        path.write_bytes(_whole(model).SerializeToString(deterministic=True))
        sync(path)
        return None
    plain = path.with_name(f"{path.name}.data")
    ir.save(model.inner, path, external_data=plain.name)
    if not plain.stat().st_size:  # nothing was large enough for it
        plain.unlink()
        sync(path)
        return None
    with plain.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    data = path.with_name(f"{path.name}.{digest}.data")
    plain.rename(data)
    proto = onnx.load(path, load_external_data=False)
    for tensor in tensors(proto.graph):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data.name
    path.write_bytes(proto.SerializeToString(deterministic=True))
    sync(data)
    sync(path)
    return data


def _data_files(out: Path) -> set[Path]:
    """Data files of our naming that the model now at `out` has."""
    pattern = f"{glob.escape(out.name)}.{'[0-9a-f]' * 8}.data"
    return set(out.parent.glob(pattern)) if out.exists() else set()


def sync(path: Path) -> None:
    """Have a file on the disk."""
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs what may be written to
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    # not every file system can sync a folder; the rename is atomic all the same
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def explained(out: Path) -> Iterator[None]:
    """What the system refuses becomes a QconvError about the output."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise QconvError(f"No space is left for {out}.", "free some, or choose another output.") from None
        raise QconvError(f"{out} cannot be written: {error.strerror}.", "choose another output.") from None


def _bring_back(folder: Path, out: Path) -> None:
    """A folder that a killed run had moved aside (see folders.py), and put nothing in its place."""
    old = folder / f"{out.name}{ASIDE}"
    if old.is_dir() and not out.exists():
        old.rename(out)
