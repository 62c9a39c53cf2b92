"""Arrays that are held until they are read again: in memory up to a limit, in temporary files beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.errors import QconvError


class Store:
    """Where arrays are put. limit: bytes that stay in memory. The folder goes when the store is closed."""

    def __init__(self, limit: int) -> None:
        self.limit, self.in_memory, self._files = limit, 0, 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def close(self) -> None:
        """Drop what lies in files."""
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, array: NDArray[Any]) -> Held:
        """Hold an array, which must not change any more."""
        if self.in_memory + array.nbytes <= self.limit:
            self.in_memory += array.nbytes
            return Held(self, array.shape, array.dtype, array, None)
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
        return Held(self, array.shape, array.dtype, None, path)


class Held:
    """One array that a store holds."""

    def __init__(
        self, store: Store, shape: tuple[int, ...], dtype: np.dtype[Any], array: NDArray[Any] | None, path: Path | None
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._store, self._array, self._path = store, array, path

    def get(self) -> NDArray[Any]:
        """Its numbers."""
        if self._array is not None:
            return self._array
        assert self._path is not None
        return np.fromfile(self._path, self.dtype).reshape(self.shape)

    def drop(self) -> None:
        """Let go of it."""
        if self._array is not None:
            self._store.in_memory -= self._array.nbytes
            self._array = None
        elif self._path is not None:
            self._path.unlink(missing_ok=True)


class Arrays(Sequence[NDArray[Any]]):
    """Held arrays, read one at a time."""

    def __init__(self, held: Sequence[Held]) -> None:
        self.held = list(held)

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: Any) -> Any:
        return self.held[index].get()

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (one.get() for one in self.held)
