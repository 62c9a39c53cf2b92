"""What networks gave for some pictures, and what the programs of their families made of it; read and written as .npz.

`tests.bench.decoder_references` makes them. They are read without the packages that made them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.decoding.boxes import Detections
from qconv.decoding.head import NetworkFacts

FOLDER = Path(__file__).parents[1] / "decoding" / "references" / "yolo"

KINDS = ("boxes", "scores", "classes", "corners", "keypoints", "masks")


@dataclass(frozen=True)
class Reference:
    """outputs: of the network, by name. published: of each picture, what is found, by KINDS.

    family: of the decoder that must know it. by: the program and its version. least: score that must be exceeded.
    size: height and width of the input. metadata: of the file, as far as it matters.
    """

    family: str
    by: str
    least: float
    size: tuple[int, int]
    outputs: dict[str, NDArray[Any]]
    published: list[dict[str, NDArray[Any]]]
    metadata: dict[str, str]

    @property
    def facts(self) -> NetworkFacts:
        return NetworkFacts(self.outputs, self.size, self.metadata)

    def without_metadata(self) -> Reference:
        return replace(self, metadata={})

    def save(self, path: Path) -> None:
        about = {name: value for name, value in asdict(self).items() if name not in ("outputs", "published")}
        arrays = {f"output {name}": array for name, array in self.outputs.items()}
        for index, found in enumerate(self.published):
            for kind, array in found.items():
                arrays[f"published {index} {kind}"] = array
        np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)

    @classmethod
    def load(cls, path: Path) -> Reference:
        outputs: dict[str, NDArray[Any]] = {}
        published: dict[int, dict[str, NDArray[Any]]] = {}
        with np.load(path) as file:
            about = json.loads(str(file["about"]))
            for key in file.files:
                kind, _, rest = key.partition(" ")
                if kind == "output":
                    outputs[rest] = file[key]
                elif kind == "published":
                    index, _, name = rest.partition(" ")
                    published.setdefault(int(index), {})[name] = file[key]
        about["size"] = tuple(about["size"])
        return cls(**about, outputs=outputs, published=[published[index] for index in sorted(published)])


def largest_difference(found: Detections, published: dict[str, NDArray[Any]]) -> dict[str, float]:
    """By how much numbers differ, kind by kind; raises AssertionError where boxes, classes or masks are others.

    Boxes, corners and keypoints differ in pixels, scores by their value, masks by the share of their pixels.
    """
    mine, theirs = _in_order(found), published
    order = np.lexsort((theirs["boxes"][:, 0], theirs["classes"], -theirs["scores"]))
    assert len(mine) == len(order), f"{len(mine)} boxes, but {len(order)} published"
    apart = {}
    for kind in theirs:
        got, want = np.asarray(getattr(mine, kind)), theirs[kind][order]
        assert got.shape == want.shape, f"{kind}: {got.shape}, but {want.shape}"
        if kind == "classes":
            assert (got == want).all()
        elif kind == "masks":
            apart[kind] = float((got != want).mean()) if got.size else 0.0
        else:
            apart[kind] = float(np.abs(got - want).max(initial=0.0))
    return apart


def _in_order(found: Detections) -> Detections:
    return found.select(np.lexsort((found.boxes[:, 0], found.classes, -found.scores.astype(np.float32))))
