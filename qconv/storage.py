"""Writes files and folders atomically, spills arrays to temporary files, and prefetches work in threads.

A file appears whole or not at all: it is written into a hidden folder beside its place, synced, and renamed. A kill
leaves at most that hidden folder, which the next run for the same output removes: a living run holds a lock on its
folder, and the system releases the lock when the process ends, however it ends. A result folder replaces an earlier
result only. `ArrayStore` holds arrays in memory up to a limit and in temporary files beyond it. `prefetch` yields
results in order. Of an .npz archive, which anybody may have written, nothing is unpacked before its size is known.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import math
import os
import shutil
import tempfile
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from filelock import BaseFileLock, FileLock, Timeout
from numpy.typing import NDArray

from qconv.config.choices import PICTURE_SUFFIXES, SAMPLE_SUFFIXES
from qconv.errors import QconvError, format_bytes
from qconv.signals import uninterrupted

STAGING_SUFFIX = ".qconv-tmp"

BACKUP_SUFFIX = ".old"
"""Suffix of a folder that was moved aside."""

MOST_LIST_BYTES = 2**26
"""A file that is larger is no list of pictures."""

TRIES = 8
"""Locks that are asked for before it is taken that the file system has none."""


def write_atomically(out: Path, data: bytes) -> None:
    """Write a file that is no model; it appears whole or not at all."""
    check_output_path(out)
    with locked_folder(out) as folder, convert_os_errors(out):
        path = folder / out.name
        path.write_bytes(data)
        sync_file(path)
        os.replace(path, out)
        sync_folder(out.parent)


@contextlib.contextmanager
@uninterrupted
def locked_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, of this run alone, removed at the end; those of killed runs go first."""
    remove_stale_folders(out)
    folder, lock = _taken_folder(out)
    try:
        yield folder
    finally:
        _remove(folder, lock)


def _taken_folder(out: Path) -> tuple[Path, BaseFileLock]:
    """A new folder and the lock on it.

    Another run may see the folder in the instant before it is locked, take it for a stale one and remove it: then the
    next one is tried. Not every file system has locks: without them stale folders stay. A lock that is refused time and
    again is no other run's work: filelock takes some ways to say that there are none for a lock that is held.
    """
    tries = 0
    while True:
        tries += 1
        with convert_os_errors(out):
            folder = Path(tempfile.mkdtemp(suffix=STAGING_SUFFIX, prefix=f".{out.name}.", dir=out.parent))
        lock = _lock_of(folder, out)
        if (_acquire_lock(lock) or tries >= TRIES) and folder.exists():
            return folder, lock
        _remove(folder, lock)


def _lock_of(folder: Path, out: Path) -> BaseFileLock:
    """Its file lies in the folder, under a name that neither the output nor its data file has."""
    return FileLock(folder / f"{out.name}.lock")


def _acquire_lock(lock: BaseFileLock) -> bool:
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
def scratch_folder(size: int) -> Iterator[Path]:
    """A folder among the system's temporary files with room for `size` bytes. Raises QconvError where there is none."""
    with (
        convert_os_errors(temporary_path()),
        tempfile.TemporaryDirectory(prefix="qconv-", ignore_cleanup_errors=True) as folder,
    ):
        if shutil.disk_usage(folder).free < size:
            place = tempfile.gettempdir()
            raise QconvError(f"No space is left in {place} to check the result.", "free some, or set TMPDIR.")
        yield Path(folder)


def check_output_path(out: Path) -> None:
    """Raise QconvError where no file can be written at `out`; remove what killed runs left there."""
    with convert_os_errors(out):
        _check_writable(out)
    remove_stale_folders(out)


def refuse_overwriting_inputs(out: Path, read: Iterable[str | Path]) -> None:
    """Raise QconvError where `out` is one of the files that are read, or one of the pictures in a folder that is."""
    if not out.is_file():
        return
    for path in map(Path, read):
        if path.is_file() and out.samefile(path):
            raise QconvError(f"{out} is read, and would be written over.", "choose another name.")
        if out.suffix.lower() not in PICTURE_SUFFIXES | SAMPLE_SUFFIXES:
            continue
        inside = path.is_dir() and out.resolve().is_relative_to(path.resolve())
        if inside or (path.is_file() and _lists(path, out)):
            fact = f"{out} is among the pictures of {path}, which are read, and would be written over."
            raise QconvError(fact, "choose another name, or another folder.")


def _lists(file: Path, out: Path) -> bool:
    """Whether a file is a text that names `out` in a line, relative to its own folder."""
    if file.stat().st_size > MOST_LIST_BYTES:
        return False
    lines = file.read_bytes().splitlines()
    named = (Path(os.fsdecode(line.strip())) for line in lines if line.strip().endswith(os.fsencode(out.name)))
    paths = (file.parent / path for path in named if path.name == out.name)
    return any(path.is_file() and out.samefile(path) for path in paths)


def _check_writable(out: Path) -> None:
    if not out.parent.is_dir():
        raise QconvError(f"The folder {out.parent} does not exist.", "create it, or choose another output.")
    if out.is_dir():
        raise QconvError(f"{out} is a folder.", "name a file as the output.")
    if out.exists() and not out.is_file():
        raise QconvError(f"{out} is a device or a pipe, which cannot be replaced.", "name a file as the output.")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise QconvError(f"The folder {out.parent} cannot be written to.", "choose another output.")


def remove_stale_folders(out: Path) -> None:
    """Remove the folders beside `out` that no living process holds a lock on."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*{STAGING_SUFFIX}"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        lock = _lock_of(folder, out)
        with contextlib.suppress(OSError, NotImplementedError):
            lock.acquire(blocking=False)
            try:
                _restore_backup(folder, out)
            finally:
                _remove(folder, lock)


def temporary_path() -> Path:
    """A path among the system's temporary files for a model without a path of its own."""
    return Path(tempfile.gettempdir()) / "qconv-model.onnx"


def sync_file(path: Path) -> None:
    """Flush a file to the disk."""
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs what may be written to
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    # not every file system can sync a folder; the rename is atomic all the same
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def convert_os_errors(out: Path) -> Iterator[None]:
    """Turn an OSError into a QconvError about the output."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise QconvError(f"No space is left for {out}.", "free some, or choose another output.") from None
        raise QconvError(f"{out} cannot be written: {error.strerror}.", "choose another output.") from None


def _restore_backup(folder: Path, out: Path) -> None:
    """Put a folder back that a killed run has moved aside without putting a new one in its place."""
    old = folder / f"{out.name}{BACKUP_SUFFIX}"
    if old.is_dir() and not out.exists():
        old.rename(out)


T = TypeVar("T")

R = TypeVar("R")

WORKER_PREFIX = "qconv-ahead"
"""Prefix of the names of threads."""


def prefetch(
    work: Callable[[T], R], items: Iterable[T], *, workers: int, depth: int
) -> Generator[Future[R], None, None]:
    """Yield the futures of work(item) in order, at most `depth` of them submitted and not yet taken.

    items is read in the caller's own thread. Closing the generator stops the threads, and closes items, which may have
    threads of its own. Where an error has left it to the garbage collector, that can happen in one of these threads,
    which cannot wait for itself.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix=WORKER_PREFIX)
    try:
        pending: deque[Future[R]] = deque()
        for item in items:
            if len(pending) == depth:
                yield pending.popleft()
            pending.append(pool.submit(work, item))
        while pending:
            yield pending.popleft()
    finally:
        pool.shutdown(wait=not threading.current_thread().name.startswith(WORKER_PREFIX), cancel_futures=True)
        if isinstance(items, Generator):
            items.close()


ForeignCheck = Callable[[Path], str | None]
"""Returns a name in a folder that is not of an earlier result; None where all are."""


@contextlib.contextmanager
def replace_folder_atomically(out: Path, foreign: ForeignCheck) -> Iterator[Path]:
    """A folder to be filled, which takes the place of `out` and all that is in it at the end, or never.

    Raises QconvError where what is there by then is no earlier result.
    """
    place = Path(os.path.realpath(out))
    with locked_folder(place) as hidden, convert_os_errors(out):
        new, old = hidden / place.name, hidden / f"{place.name}{BACKUP_SUFFIX}"
        new.mkdir()
        yield new
        for path in new.iterdir():
            sync_file(path)
        _refuse_foreign(out, place, foreign)
        try:
            if place.is_dir():
                new.chmod(place.stat().st_mode & 0o7777)
                os.rename(place, old)
            os.rename(new, place)
        except BaseException:
            if old.exists() and not place.exists():
                os.rename(old, place)
            raise
        sync_folder(place.parent)


def check_output_folder(out: Path, foreign: ForeignCheck) -> None:
    """Raise QconvError where no folder can be written at `out`; remove what killed runs left there."""
    place = Path(os.path.realpath(out))
    with convert_os_errors(out):
        if place.exists() and not place.is_dir():
            raise QconvError(f"{out} is a file.", "name a folder as the output.")
        if not place.parent.is_dir():
            raise QconvError(f"The folder {out.parent} does not exist.", "create it, or choose another output.")
        if not os.access(place.parent, os.W_OK | os.X_OK):
            raise QconvError(f"The folder {place.parent} cannot be written to.", "choose another output.")
        if Path.cwd().is_relative_to(place):
            raise QconvError(f"{out} is the current folder, or holds it, and would be replaced.", "name a new folder.")
        remove_stale_folders(place)
        _refuse_foreign(out, place, foreign)


def refuse_path_inside(out: Path, path: Path | None, what: str) -> None:
    """Raise QconvError where a file lies in the folder `out`, which is to hold one result alone."""
    if path is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
        raise QconvError(f"{what} {path} lies in the output {out}.", "choose another output.")


def _refuse_foreign(out: Path, place: Path, foreign: ForeignCheck) -> None:
    name = foreign(place) if place.is_dir() else None
    if name is not None:
        fact = f"{out} holds files that are no earlier result, such as {name}."
        raise QconvError(fact, "name a new folder: files of two kinds are not mixed.")


class ArrayStore:
    """Holds arrays until they are read: up to `limit` bytes in memory, others in files, removed on close."""

    def __init__(self, limit: int) -> None:
        self.limit, self.in_memory, self._files = limit, 0, 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def close(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, array: NDArray[Any]) -> StoredArray:
        """Hold an array, which must not change any more."""
        if self.in_memory + array.nbytes <= self.limit:
            self.in_memory += array.nbytes
            return StoredArray(self, array.shape, array.dtype, array, None)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="qconv-", ignore_cleanup_errors=True)
        path = Path(self._folder.name) / f"{self._files}"
        self._files += 1
        try:
            np.ascontiguousarray(array).tofile(path)
        except OSError:
            place = tempfile.gettempdir()
            fact = f"No space is left in {place} for tensors between two layers."
            raise QconvError(fact, "free some, set TMPDIR, or pass fewer --samples or --effort fast.") from None
        return StoredArray(self, array.shape, array.dtype, None, path)


class StoredArray:
    """One array that a store holds."""

    def __init__(
        self,
        store: ArrayStore,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        array: NDArray[Any] | None,
        path: Path | None,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._store, self._array, self._path = store, array, path

    def get(self) -> NDArray[Any]:
        """Read the array."""
        if self._array is not None:
            return self._array
        assert self._path is not None
        return np.fromfile(self._path, self.dtype).reshape(self.shape)

    def drop(self) -> None:
        """Drop the array."""
        if self._array is not None:
            self._store.in_memory -= self._array.nbytes
            self._array = None
        elif self._path is not None:
            self._path.unlink(missing_ok=True)


class StoredArrays(Sequence[NDArray[Any]]):
    """A sequence of stored arrays, read one at a time."""

    def __init__(self, held: Sequence[StoredArray]) -> None:
        self.held = list(held)

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: Any) -> Any:
        return self.held[index].get()

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (one.get() for one in self.held)

    @property
    def is_empty(self) -> bool:
        """Whether no array has any element."""
        return not any(math.prod(one.shape) for one in self.held)


ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")


class UnpackedTooLargeError(ValueError):
    """An archive that unpacks to more than what is read of it can need."""

    def __init__(self, size: int, most: int) -> None:
        super().__init__(f"unpacks to {format_bytes(size)}, more than the {format_bytes(most)} that are read")


def check_unpacked_size(archive: zipfile.ZipFile, most: int) -> None:
    """Raise UnpackedTooLargeError where all members together hold more than `most` bytes."""
    size = sum(member.file_size for member in archive.infolist())
    if size > most:
        raise UnpackedTooLargeError(size, most)


def read_member(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """The array of a member in NumPy's .npy format. Raises ValueError, KeyError and what zipfile raises."""
    size = archive.getinfo(name).file_size
    with archive.open(name) as file:
        return read_npy(file, size)


def read_npy_shape(file: IO[bytes]) -> tuple[int, ...]:
    """The shape in the header of an open .npy file. Raises ValueError."""
    return _read_npy_header(file)[0]


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    return shape, dtype


def read_npy(file: IO[bytes], size: int) -> NDArray[Any]:
    """The array of an open .npy file of `size` bytes, which its header must not claim to exceed. Raises ValueError."""
    shape, dtype = _read_npy_header(file)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"its header speaks of {format_bytes(math.prod(shape) * dtype.itemsize)}, which are not there")
    file.seek(0)
    return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
