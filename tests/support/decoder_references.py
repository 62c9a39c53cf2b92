"""What heads gave for a picture, and the boxes that their own published programs made of it: files of a few kB.

Rows of an output are its boxes or cells. Those that say nothing are all alike in these files: the published program was
run on outputs that were thinned so, and not on those of the network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.head import Head, NetworkFacts
from qconv.decoding.registry import find_head

REFERENCES = Path(__file__).parents[1] / "decoding" / "references"

Array = NDArray[Any]


@dataclass(frozen=True)
class DecoderReference:
    """outputs: of the network, for one picture, by name. boxes: (M, 4) in pixels of its input, by edges. least: score
    that the program asked for. keypoints: (M, K, 2), without entries where there are none."""

    program: str
    size: tuple[int, int]
    least: float
    outputs: dict[str, Array]
    boxes: Array
    scores: Array
    classes: Array
    keypoints: Array = field(default_factory=lambda: np.zeros((0, 0, 2)))


def as_rows(array: Array) -> Array:
    """An output of one picture with a row a box or cell: (A, D) of (1, A, D), (1, A, 1, D) or (1, D, H, W)."""
    if array.ndim == 4 and array.shape[2] > 1:
        return array[0].reshape(array.shape[1], -1).T
    return array.reshape(-1, array.shape[-1])


def from_rows(rows: Array, shape: tuple[int, ...]) -> Array:
    """The output of this shape again."""
    return (rows.T if len(shape) == 4 and shape[2] > 1 else rows).reshape(shape)


def thin(array: Array, kept: Array, *, exact: bool = False) -> Array:
    """The output with all rows that are not kept alike. kept: (A,). exact: in numbers of 32 bits, and not of 16."""
    rows = as_rows(array).astype(np.float32 if exact else np.float16)
    rows[~kept] = rows[np.argmin(kept)]
    return from_rows(rows.astype(np.float32), array.shape)


def write(path: Path, made: DecoderReference) -> None:
    parts: dict[str, Array] = {}
    for name, array in made.outputs.items():
        rows = as_rows(array)
        index = np.flatnonzero((rows != rows[-1]).any(axis=1))
        parts[f"output {name}"] = np.array(array.shape)
        parts[f"index {name}"] = index.astype(np.int32)
        short = rows.astype(np.float16)
        rows = short if np.array_equal(short, rows) else rows
        parts[f"rest {name}"], parts[f"rows {name}"] = rows[-1], rows[index]
    found = {"boxes": made.boxes, "scores": made.scores, "classes": made.classes, "keypoints": made.keypoints}
    told = {"program": np.array(made.program), "size": np.array(made.size), "least": np.array(made.least)}
    np.savez_compressed(path, **parts, **{name: np.asarray(array) for name, array in found.items()}, **told)


def read(name: str) -> DecoderReference:
    with np.load(REFERENCES / f"{name}.npz") as stored:
        outputs = {}
        for key in stored.files:
            kind, _, output = key.partition(" ")
            if kind == "output":
                shape = tuple(int(n) for n in stored[key])
                rest = stored[f"rest {output}"].astype(np.float32)
                rows = np.tile(rest, (int(np.prod(shape)) // len(rest), 1))
                rows[stored[f"index {output}"]] = stored[f"rows {output}"]
                outputs[output] = from_rows(rows, shape)
        found = {name: stored[name] for name in ("boxes", "scores", "classes", "keypoints")}
        height, width = (int(side) for side in stored["size"])
        return DecoderReference(str(stored["program"]), (height, width), float(stored["least"]), outputs, **found)


def check_reference(name: str, family: str) -> None:
    """The registry knows the outputs of a reference, and its decoder finds the published program's boxes.

    All of them and no other, of the same classes, within half a pixel and a thousandth of the score; points too.
    """
    made = read(name)
    head = find_head(NetworkFacts(made.outputs, made.size))
    assert head is not None
    assert head.family == family
    assert head.size == made.size
    (found,) = head.read(made.outputs, made.least)
    assert len(found) == len(made.boxes) > 0
    for place, box in enumerate(made.boxes):
        alike = (found.classes == made.classes[place]) & (np.abs(found.scores - made.scores[place]) < 1e-3)
        apart = np.where(alike, np.abs(found.boxes - box).max(axis=1), np.inf)
        assert apart.min() <= 0.5
        if made.keypoints.size:
            assert found.keypoints is not None
            assert np.abs(found.keypoints[apart.argmin(), :, :2] - made.keypoints[place]).max() <= 0.5
    check_parts(head, made.outputs)


def check_parts(head: Head, outputs: dict[str, Array]) -> None:
    """The parts of an output are all of it, and none is in two of them."""
    for name, parts in head.parts.items():
        counted = np.zeros(outputs[name].shape, int)
        for part in parts:
            part.of(counted)[...] += 1
        assert (counted == 1).all(), name
