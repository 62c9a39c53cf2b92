"""The state of a training run in a file beside its output, from which the same command goes on."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qconv import storage
from qconv.training.training import Trainer

KEPT_EVERY = 20.0
"""Seconds between two states that are written, at least."""


class Kept:
    """The state of a run in a file beside the output."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = out.with_name(f".{out.name}.training"), fingerprint
        self._last = time.perf_counter()

    def read_into(self, trainer: Trainer, warn: Callable[[str], None]) -> int:
        """Go on where a run of the same options was left. Returns its step, 0 where there is none."""
        if not self.path.exists():
            return 0
        try:
            with np.load(self.path, allow_pickle=False) as file:
                state = {name: file[name] for name in file.files}
            if str(state["fingerprint"]) != self.fingerprint:
                warn(f"{self.path} is of a run with other options or pictures: it is not used.")
                return 0
            trainer.restore(state)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            warn(f"{self.path} is damaged, and not used.")
            return 0
        return trainer.step

    def write(self, trainer: Trainer, *, now: bool = False) -> None:
        """Unless the last one is young."""
        if now or time.perf_counter() - self._last >= KEPT_EVERY:
            content = io.BytesIO()
            np.savez(content, fingerprint=np.array(self.fingerprint), **trainer.state())  # type: ignore[arg-type]
            storage.write_atomically(self.path, content.getvalue())
            self._last = time.perf_counter()

    def forget(self) -> None:
        """The result is written."""
        self.path.unlink(missing_ok=True)
