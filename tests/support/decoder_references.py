"""What networks gave for some pictures, and what their families' own programs found in it: files of a few kB.

`tests.bench.decoder_references_yolo` and `tests.bench.decoder_references_other` make them. They are read without the
packages that made them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qconv.decoding.boxes import Detections
from qconv.decoding.head import Head, NetworkFacts
from qconv.decoding.registry import find_head

FOLDER = Path(__file__).parents[1] / "decoding" / "references"
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))
SCORES_APART = 1e-3
"""By which the scores of one box may differ."""

Found = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class DecoderReference:
    """What a network gave, and what was found.

    family: of the decoder that must know it. program: that of the family, and its version. least: score that must be
    exceeded. size: height and width of the input. metadata: of the file, as far as it matters. outputs: of the network,
    by name; axis 0 is the pictures. published: of each picture what the program found, in pixels of the input: boxes
    (M, 4) by edges, scores, classes, and where there are such corners, keypoints (M, K, 2 or 3) and masks.
    """

    family: str
    program: str
    least: float
    size: tuple[int, int]
    outputs: Mapping[str, NDArray[Any]]
    published: Sequence[Found]
    metadata: Mapping[str, str]

    @property
    def facts(self) -> NetworkFacts:
        return NetworkFacts(self.outputs, self.size, self.metadata)

    @property
    def head(self) -> Head:
        """By the registry; raises AssertionError where the family is another."""
        head = find_head(self.facts)
        assert head is not None, "no decoder knows the outputs"
        assert head.family == self.family, f"taken for {head.family}: {head.why}"
        return head

    def without_metadata(self) -> DecoderReference:
        return replace(self, metadata={})

    def save(self, path: Path) -> None:
        about = {name: value for name, value in asdict(self).items() if name not in ("outputs", "published")}
        arrays = {f"output {name}": array for name, array in self.outputs.items()}
        for index, found in enumerate(self.published):
            arrays |= {f"published {index} {kind}": array for kind, array in found.items()}
        np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)

    @classmethod
    def load(cls, name: str) -> DecoderReference:
        outputs: dict[str, NDArray[Any]] = {}
        published: dict[int, dict[str, NDArray[Any]]] = {}
        with np.load(FOLDER / f"{name}.npz") as file:
            about = json.loads(str(file["about"]))
            for key in file.files:
                kind, _, rest = key.partition(" ")
                if kind == "output":
                    outputs[rest] = file[key]
                elif kind == "published":
                    index, _, part = rest.partition(" ")
                    published.setdefault(int(index), {})[part] = file[key]
        about["size"] = tuple(about["size"])
        return cls(**about, outputs=outputs, published=[published[index] for index in sorted(published)])


def found_in(boxes: ArrayLike, scores: ArrayLike, classes: ArrayLike, **more: ArrayLike) -> Found:
    """What a program found in a picture. more: corners, keypoints or masks."""
    kinds = {"boxes": boxes, "scores": scores, "classes": classes, **more}
    return {kind: np.asarray(array) for kind, array in kinds.items()}


def differences(reference: DecoderReference) -> dict[str, float]:
    """By how much what its decoder finds differs from what is published, kind by kind, at most over all pictures.

    Boxes, corners and keypoints differ in pixels, scores by their value, masks by the share of their pixels. Raises
    AssertionError where the decoder or the number of boxes is another, or a published box has none of its class and
    about its score.
    """
    most: dict[str, float] = {}
    everything = reference.head.read(reference.outputs, reference.least)
    for found, published in zip(everything, reference.published, strict=True):
        for kind, apart in largest_difference(found, published).items():
            most[kind] = max(apart, most.get(kind, 0.0))
    return most


def largest_difference(found: Detections, published: Found) -> dict[str, float]:
    """The same of one picture: each published box has one of those found, the nearest that is left."""
    places = _pair_up(found, published)
    apart = {}
    for kind in [kind for kind in published if kind != "classes"]:
        want, got = published[kind], np.asarray(getattr(found, kind))[places]
        got = got[..., : want.shape[-1]] if kind == "keypoints" else got
        assert got.shape == want.shape, f"{kind}: {got.shape}, but {want.shape}"
        if kind == "masks":
            apart[kind] = float((got != want).mean()) if got.size else 0.0
        else:
            apart[kind] = float(np.abs(got - want).max(initial=0.0))
    return apart


def _pair_up(found: Detections, published: Found) -> list[int]:
    """For each published box the place of the one that was found."""
    assert len(found) == len(published["scores"]), f"{len(found)} boxes, but {len(published['scores'])} published"
    left, places = np.ones(len(found), bool), []
    for box, score, kind in zip(published["boxes"], published["scores"], published["classes"], strict=True):
        alike = left & (found.classes == kind) & (np.abs(found.scores - score) < SCORES_APART)
        assert alike.any(), f"no box of class {kind} with the score {score:.3f}"
        apart = np.where(alike, np.abs(found.boxes - box).max(axis=1), np.inf)
        places.append(int(apart.argmin()))
        left[places[-1]] = False
    return places
