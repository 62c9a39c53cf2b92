"""Packages that only some commands need, and what to install where they are missing."""

from __future__ import annotations

import importlib.util

from qconv.errors import QconvError


def require_torch(what: str) -> None:
    """Raise QconvError where PyTorch is not installed. what: that needs it, as a sentence begins."""
    if importlib.util.find_spec("torch") is None:
        raise QconvError(
            f"{what} needs PyTorch, which is not installed.",
            "install the extra: pip install 'qconv[torch]' "
            "(without a GPU: pip install torch --index-url https://download.pytorch.org/whl/cpu first).",
        )
