"""How PyTorch is to run: where, on how many threads, and the same every time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from qconv.errors import QconvError


@contextlib.contextmanager
def determined(threads: int | None) -> Iterator[None]:
    """PyTorch does the same every time, with so many threads; what it was set to before comes back."""
    before, exactly = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if threads is not None:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(exactly)


def device_of(wish: str) -> str:
    """The device of one of choices.DEVICES. Raises QconvError for a GPU that is not there."""
    if wish == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wish == "cuda" and not torch.cuda.is_available():
        raise QconvError("PyTorch finds no GPU.", "pass --device cpu, or install a build of PyTorch for it.")
    return wish
