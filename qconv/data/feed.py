"""The calibration pictures as one network wants them, batch by batch, as often as they are needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.preprocessing import Color, Layout, Preprocessing, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.data import images
from qconv.data.listing import SAMPLE_SUFFIXES, Listing, find, suffix_of
from qconv.data.preprocess import InputSpec, layout_order, resolve
from qconv.errors import QconvError
from qconv.runtime.session import Session

DECODERS = 2
KEPT_PICTURES = 32
KEPT_BYTES = 32 * 2**20

Batch = dict[str, NDArray[Any]]


@dataclass(slots=True)
class Feed:
    """Pictures, preprocessed. The first few stay in memory, so that checking the result need not decode them again.

    warn hears of each unreadable picture once; progress of (stage, pictures done, pictures in all). pictures: how many
    the first pass has decoded; lost: those that no pass could. raw: the layout of the uint8 pixels that are handed out
    instead of what the float network takes; None for the latter.
    """

    listing: Listing
    inputs: list[InputSpec]
    preprocessing: Preprocessing | None
    batch: int
    warn: Callable[[str], None]
    progress: Callable[[str, int, int], None]
    _kept: list[Batch] = field(default_factory=list)
    _passes: int = 0
    pictures: int = 0
    lost: set[Path] = field(default_factory=set)
    raw: Layout | None = None

    @classmethod
    def of(
        cls,
        session: Session,
        recipe: Recipe,
        warn: Callable[[str], None],
        progress: Callable[[str, int, int], None],
        known: Preprocessing | None = None,
    ) -> Feed:
        """The pictures of `recipe` for the network in `session`. Raises QconvError where they cannot feed it.

        known: the preprocessing where it needs no finding out.
        """
        listing = find(recipe.calib, pattern=recipe.glob, samples=recipe.samples, seed=recipe.seed)
        inputs = [InputSpec(*found) for found in session.inputs]
        if not inputs:
            raise QconvError(f"{session.name} has no input, so no picture can be fed to it.", "export the model again.")
        preprocessing = None
        if any(path.suffix.lower() not in SAMPLE_SUFFIXES for path in listing.paths):
            if len(inputs) > 1:
                raise _several_inputs(session.name, inputs)
            preprocessing = known or resolve(recipe.preprocessing, inputs[0], class_vector=session.gives_class_vector)
        elif recipe.preprocessing != PreprocessingOptions():
            warn("preprocessing options are not used: .npy and .npz samples are taken as they are.")
        fixed = inputs[0].shape[0] if inputs[0].shape else None
        if fixed is not None and recipe.batch not in (1, fixed):
            warn(f"--batch {recipe.batch} is not used: the model's own batch is {fixed}.")
        return cls(listing, inputs, preprocessing, fixed or recipe.batch, warn, progress)

    def take_pixels(self, layout: Layout) -> Preprocessing:
        """Hand out uint8 pixels from now on. Returns how the float network is fed; raises QconvError for samples."""
        samples = [path for path in self.listing.paths if path.suffix.lower() in SAMPLE_SUFFIXES]
        if samples or self.preprocessing is None:
            fact = f"{samples[0]} is preprocessed already, so it is not known what --embed-preprocessing should embed."
            raise QconvError(fact, "pass pictures, or leave --embed-preprocessing out.")
        if self.inputs[0].dtype == np.uint8 and not self.preprocessing.keeps_pixels:
            fact = f"input '{self.inputs[0].name}' takes uint8, in which pixels cannot be normalised."
            raise QconvError(fact, "pass --preprocess raw: the network does the rest itself.")
        self.raw = layout
        return self.preprocessing

    @property
    def fed(self) -> Preprocessing | None:
        """What is done to a picture before it is handed out."""
        if self.preprocessing is None or self.raw is None:
            return self.preprocessing
        return self.preprocessing.as_pixels(self.raw)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of what is handed out; None where that is no picture."""
        if self.fed is not None:
            return self.fed.size
        batch = next(iter(self.few("calibrate")), None)
        shape = () if batch is None else next(iter(batch.values())).shape
        if len(shape) != 4:
            return None
        return shape[1:3] if shape[3] in (1, 3) and shape[1] not in (1, 3) else shape[2:]

    def as_float(self, feeds: Batch) -> Batch:
        """What was handed out, as the float network takes it."""
        if self.preprocessing is None or self.raw is None:
            return feeds
        (spec,) = self.inputs
        pixels = feeds[spec.name].transpose(layout_order(self.raw, self.preprocessing.layout))
        return {spec.name: images.as_type(images.normalised(pixels, self.preprocessing), spec.dtype)}

    def _specs(self) -> list[InputSpec]:
        """The inputs as they are fed."""
        if self.preprocessing is None or self.raw is None:
            return self.inputs
        (spec,) = self.inputs
        shape = tuple(spec.shape[axis] for axis in layout_order(self.preprocessing.layout, self.raw))
        return [InputSpec(spec.name, np.dtype(np.uint8), shape)]

    def over(self, paths: Sequence[Path]) -> Feed:
        """The same preprocessing for other files, of which nothing has been read yet."""
        whole = max(self.listing.whole, len(self.listing.paths))
        listing = replace(self.listing, paths=tuple(paths), whole=whole)
        return Feed(listing, self.inputs, self.preprocessing, self.batch, self.warn, self.progress)

    @property
    def _batch_is_fixed(self) -> bool:
        return bool(self.inputs[0].shape) and self.inputs[0].shape[0] is not None

    def all(self, stage: str) -> Generator[Batch, None, None]:
        """Every picture, in batches; a last short one only where the network takes it."""
        first_pass, self._passes = self._passes == 0, self._passes + 1
        total, done = len(self.listing.paths), 0
        found = images.batches(
            self.listing,
            self._specs(),
            self.fed,
            batch=self.batch,
            workers=DECODERS,
            warn=self.warn if first_pass else _silent,
            lost=self.lost.add,
        )
        for feeds in found:
            count = _pictures(feeds)
            if count < self.batch and self._batch_is_fixed:
                if done:
                    break  # pictures short of a batch: the others speak for them
                feeds = {name: np.resize(array, (self.batch, *array.shape[1:])) for name, array in feeds.items()}
            if first_pass:
                self.pictures += count
                self._keep(feeds)
            yield feeds
            done += count
            self.progress(stage, min(done, total), total)

    def drawn(self, prep: Preprocessing, most: int) -> Iterator[NDArray[np.uint8]]:
        """Up to `most` pictures as pixels (H, W, C), RGB or grey, in the size that prep asks for: a fixed draw."""
        paths = sorted(path for path in self.listing.paths if suffix_of(path) not in SAMPLE_SUFFIXES)
        chosen = tuple(paths[i] for i in np.random.default_rng(0).permutation(len(paths))[:most])
        color = Color.GREY if prep.color is Color.GREY else Color.RGB
        plain = replace(prep, color=color, scale=1.0, mean=(0.0,), std=(1.0,), layout=Layout.NHWC)
        as_bytes = InputSpec("x", np.dtype(np.uint8), (None, None, None, None))
        listing = Listing(chosen, len(chosen), 0)
        for batch in images.batches(listing, [as_bytes], plain, batch=1, workers=DECODERS, warn=_silent):
            yield batch["x"][0]

    def few(self, stage: str) -> Iterator[Batch]:
        """The first pictures, at most KEPT_PICTURES and about KEPT_BYTES."""
        if not self._kept:
            for _ in self.all(stage):
                if self._is_full:
                    break
        yield from self._kept

    def first(self, count: int, stage: str) -> list[Batch]:
        """The first `count` pictures, and what fills up their last batch."""
        found: list[Batch] = []
        with contextlib.closing(self.all(stage)) as batches:
            for feeds in batches:
                found.append(feeds)
                if sum(map(_pictures, found)) >= count:
                    break
        return found

    @property
    def _is_full(self) -> bool:
        kept = sum(array.nbytes for feeds in self._kept for array in feeds.values())
        return sum(map(_pictures, self._kept)) >= KEPT_PICTURES or kept >= KEPT_BYTES

    def _keep(self, feeds: Batch) -> None:
        if not self._is_full:
            self._kept.append(feeds)


def spread(batches: Sequence[Batch], pictures: int) -> list[Batch]:
    """Some of the batches, evenly spread, that hold about so many pictures."""
    wanted = max(1, min(len(batches), round(pictures * len(batches) / max(1, sum(map(_pictures, batches))))))
    return [batches[index * len(batches) // wanted] for index in range(wanted)]


def _pictures(feeds: Batch) -> int:
    return len(next(iter(feeds.values())))


def _silent(text: str) -> None:
    pass


def _several_inputs(name: str, inputs: list[InputSpec]) -> QconvError:
    names = ", ".join(spec.name for spec in inputs)
    return QconvError(
        f"{name} has {len(inputs)} inputs ({names}), which pictures alone cannot feed.",
        f"pass a folder of .npz files, each one sample with the arrays {names}.",
    )
