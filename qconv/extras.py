"""Packages that only some commands need, and what to install where they are missing."""

from __future__ import annotations

import importlib

from qconv.errors import QconvError


def require_torch(what: str) -> None:
    """Raise QconvError where PyTorch is not installed, or cannot be loaded. what: that needs it, as in a sentence."""
    try:
        importlib.import_module("torch")
    except ModuleNotFoundError as error:
        why = "is not installed" if error.name == "torch" else f"cannot be loaded: {error}"
    except (ImportError, OSError) as error:
        why = f"cannot be loaded: {error}"
    else:
        return
    raise QconvError(
        f"{what} needs PyTorch, which {why.rstrip('.')}.",
        "install the extra: pip install 'qconv[torch]' "
        "(without a GPU: pip install torch --index-url https://download.pytorch.org/whl/cpu first).",
    )
