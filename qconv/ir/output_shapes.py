"""Sets the shapes of outputs that a file declares wrong, or not at all, from what a run returns.

Exporters write an output as a scalar, with the sizes of another input, or without a shape, which runtimes take and
onnx's checker does not. `load` finds those of which inference says another thing, or nothing; a run decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from qconv.ir.data_shapes import find_data_shaped
from qconv.ir.model import Model, Value, constant_array, dims, get_note, is_tensor, set_dims, set_note

_NOTE = "doubtful shape"

Shape = tuple[int | None, ...]


def shape_of(kind: onnx.TypeProto) -> Shape | None:
    """The shape of a tensor type with None for open axes; None for an unknown rank and for other types."""
    if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.tensor_type.shape.dim)


def contradicts(shape: Shape, other: Shape) -> bool:
    """Whether no tensor can have both shapes."""
    apart = (a != b for a, b in zip(shape, other, strict=False) if a is not None and b is not None)
    return len(shape) != len(other) or any(apart)


def confirms(inferred: Shape, declared: Shape) -> bool:
    """Whether inference knows all that is declared, and says the same."""
    sizes = zip(declared, inferred, strict=False)
    return len(declared) == len(inferred) and all(own is None or own == its for own, its in sizes)


def set_doubtful(model: Model, shapes: Mapping[str, Shape | None]) -> None:
    """Note outputs whose shape is not sure, by name, with what the file declares of each."""
    for value in model.graph.outputs:
        name = value.name or ""
        if name in shapes and is_tensor(value):
            set_note(value, _NOTE, (shapes[name],))


def doubtful_outputs(model: Model) -> list[str]:
    """The names of outputs whose shape a run has to tell."""
    return [value.name or "" for value in model.graph.outputs if get_note(value, _NOTE) is not None]


def forget_doubtful(model: Model) -> None:
    """Take the shapes of doubtful outputs away, where no run tells them."""
    for value in model.graph.outputs:
        if get_note(value, _NOTE) is not None:
            set_dims(value, None)


def settle_shapes(model: Model, seen: Mapping[str, Sequence[tuple[int, ...]]]) -> list[str]:
    """Set the shapes of doubtful outputs. seen: of the arrays that several runs gave, by name.

    What is declared or inferred stays where all arrays have it. Else the rank is theirs, and so is each size that none
    of them contradicts, unless the model or the data leave it open. Returns the names of those that changed.
    """
    fixed = all(None not in (dims(value) or (None,)) for value in model.graph.inputs if constant_array(value) is None)
    shaped = find_data_shaped(model)
    changed = []
    for value in model.graph.outputs:
        note, shapes = get_note(value, _NOTE), seen.get(value.name or "", ())
        if note is None or not shapes or len({len(shape) for shape in shapes}) > 1:
            continue
        own = dims(value)
        known = [shape for shape in (None if own is None else tuple(own), *note) if shape is not None]
        agreed = next((shape for shape in known if not any(contradicts(shape, other) for other in shapes)), None)
        if agreed is None:
            agreed = _common_sizes(shapes) if fixed and value not in shaped else (None,) * len(shapes[0])
        set_dims(value, agreed)
        _forget(value)
        if agreed != note[0]:
            changed.append(value.name or "")
    return changed


def _forget(value: Value) -> None:
    set_note(value, _NOTE, None)


def _common_sizes(shapes: Sequence[tuple[int, ...]]) -> Shape:
    return tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True))
