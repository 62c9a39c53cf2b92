"""Files in TOML that users write: read, with errors that say what to do."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from qconv.errors import QconvError


def read_toml(path: Path, option: str, example: str) -> dict[str, Any]:
    """The content. option: that named the file. example: what to write, in words, without a full stop.

    Raises QconvError where it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise QconvError(f"{path} cannot be read: {error.strerror}.", f"check the path of {option}.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        why = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "it is no text"
        why = "it is nested too deeply" if isinstance(error, RecursionError) else why
        raise QconvError(f"{path} is no TOML: {why}.", f"{example}.") from None
