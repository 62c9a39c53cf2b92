"""Bits layer by layer, as a file that people write: TOML, one table of globs of layers' names.

    [layers]
    "stem*" = 8                                         # bits of the weights
    "blocks.1.*" = { weights = 4, activations = 8 }     # and of the tensor that the layer reads
    "classifier" = "float"

The first glob that matches a layer counts, so exceptions stand above the rule. Names are those of the nodes of the
folded model, as the report has them. Globs are those of `fnmatch`: `*`, `?` and `[...]`; case counts.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qconv.config.choices import LayerBits
from qconv.config.tomlfile import read_toml
from qconv.errors import QconvError

TABLE, FLOAT = "layers", "float"
KEYS = ("weights", "activations")
EXAMPLE = 'write [layers] and below it lines as "stem*" = 8 or "head" = "float"'
Assignment = tuple[tuple[str, LayerBits], ...]


def read_layer_bits(path: Path) -> Assignment:
    """What the file says, in its order. Raises QconvError where it cannot be read or says no such thing."""
    content = read_toml(path, "--layer-bits", EXAMPLE)
    table = content.get(TABLE)
    if not isinstance(table, dict) or not table:
        raise QconvError(f"{path} has no table of layers.", f"{EXAMPLE}.")
    other = next((key for key in content if key != TABLE), None)
    if other is not None:
        raise QconvError(
            f"{path} has {other!r} beside its table of layers.", f"{EXAMPLE}; names with a dot need quotes."
        )
    return tuple((name, _bits(path, name, value)) for name, value in table.items())


def _bits(path: Path, name: str, value: Any) -> LayerBits:
    if value == FLOAT:
        return LayerBits(in_float=True)
    wishes = value if isinstance(value, dict) else {"weights": value}
    known = bool(wishes) and set(wishes) <= set(KEYS)
    if not known or not all(isinstance(bits, int) and not isinstance(bits, bool) for bits in wishes.values()):
        fix = 'use a number of bits, { weights = 4, activations = 8 } or "float"; names with a dot need quotes.'
        raise QconvError(f"{path} gives {name!r} the bits {_shown(value)}.", fix)
    found = LayerBits(**wishes)
    if found.impossible is not None:
        raise QconvError(f"{path} gives {name!r} {found.impossible}.", "use 2 to 8, or 16.")
    return found


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, Mapping) else json.dumps(value, default=str)


def as_toml(assignment: Iterable[tuple[str, LayerBits]]) -> str:
    """The text of a file that `read_layer_bits` reads back."""
    lines = [f"{json.dumps(pattern, ensure_ascii=False)} = {_value(bits)}" for pattern, bits in assignment]
    return "\n".join([f"[{TABLE}]", *lines]) + "\n"


def _value(bits: LayerBits) -> str:
    if bits.in_float:
        return f'"{FLOAT}"'
    if bits.activations is None and bits.weights is not None:
        return str(bits.weights)
    wishes = ((key, getattr(bits, key)) for key in KEYS)
    return "{ " + ", ".join(f"{key} = {wish}" for key, wish in wishes if wish is not None) + " }"


def exactly(name: str) -> str:
    """The glob that matches this name alone."""
    return glob.escape(name)
