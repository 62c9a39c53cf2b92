"""Loads calibration images batch by batch as a network takes them.

The first few images stay in memory, so that checking a result need not decode them again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.choices import SAMPLE_SUFFIXES
from qconv.config.data_options import Color, DataOptions, Layout, Preprocessing, PreprocessingOptions
from qconv.data.batches import PixelCache, iter_batches
from qconv.data.dataset import Listing, list_samples, suffix_of
from qconv.data.preprocessing import (
    WHOLE_PIXEL_TYPES,
    InputSpec,
    cast_pixels,
    find_vain_normalization,
    layout_order,
    normalize_pixels,
    resolve_preprocessing,
)
from qconv.data.samples import split_whole_batches
from qconv.decoding.custom import load_decoder
from qconv.errors import QconvError
from qconv.reporter import Reporter
from qconv.runtime.session import Session

LEAST_DECODERS = 2

KEPT_IMAGES = 32

KEPT_BYTES = 32 * 2**20

FEWEST_TO_SPLIT, FEWEST_HELD_BACK, HELD_BACK_DIVISOR = 32, 8, 8
"""From so many pictures on some are held back, at least so many, and one of so many."""

Batch = dict[str, NDArray[Any]]


@dataclass(slots=True)
class DataLoader:
    """Loads preprocessed images. The first few stay in memory, so that checking the result need not decode them again.

    reporter: is told of each unreadable picture, and how many are done. pictures: what the longest pass decoded;
    lost: those that no pass could. raw: the layout of the uint8 pixels that are handed out instead of what the float
    network takes; None for the latter. cache: what passes have decoded; None where there is but one.
    """

    listing: Listing
    inputs: list[InputSpec]
    preprocessing: Preprocessing | None
    batch: int
    reporter: Reporter
    _kept: list[Batch] = field(default_factory=list)
    _passes: int = 0
    _read_to_the_end: bool = False
    pictures: int = 0
    lost: set[Path] = field(default_factory=set)
    raw: Layout | None = None
    cache: PixelCache | None = None

    @classmethod
    def of(
        cls,
        session: Session,
        data: DataOptions,
        reporter: Reporter,
        known: Preprocessing | None = None,
    ) -> DataLoader:
        """The loader of the images of `data` for the network in `session`. Raises QconvError where they do not fit.

        known: the preprocessing, where it is known already.
        """
        if data.decode is not None:
            load_decoder(data.decode)  # better said now than after hours
        inputs = [InputSpec(*found) for found in session.inputs]
        listing = list_samples(data)
        if inputs:
            listing = split_whole_batches(listing, inputs, data.samples)
        if not inputs:
            raise QconvError(f"{session.name} has no input, so no picture can be fed to it.", "export the model again.")
        preprocessing = None
        if any(path.suffix.lower() not in SAMPLE_SUFFIXES for path in listing.paths):
            if len(inputs) > 1:
                raise _several_inputs_error(session.name, inputs)
            preprocessing = known or resolve_preprocessing(
                data.preprocessing, inputs[0], class_vector=session.gives_class_scores
            )
            vain = find_vain_normalization(data.preprocessing, inputs[0])
            if vain and inputs[0].dtype in WHOLE_PIXEL_TYPES and preprocessing.keeps_pixels:
                kept = f"input '{inputs[0].name}' takes {inputs[0].dtype}, so pixels stay whole numbers"
                reporter.warn(f"{kept}, 0 to 255: {vain} is not used.")
        elif data.preprocessing != PreprocessingOptions():
            reporter.warn("preprocessing options are not used: .npy and .npz samples are taken as they are.")
        fixed = inputs[0].shape[0] if inputs[0].shape else None
        if fixed is not None and data.batch not in (1, fixed):
            reporter.warn(f"--batch {data.batch} is not used: the model's own batch is {fixed}.")
        return cls(listing, inputs, preprocessing, fixed or data.batch, reporter)

    def take_pixels(self, layout: Layout) -> Preprocessing:
        """Load uint8 pixels from now on. Returns the float network's preprocessing; raises QconvError for samples."""
        samples = [path for path in self.listing.paths if path.suffix.lower() in SAMPLE_SUFFIXES]
        if samples or self.preprocessing is None:
            first = self.listing.in_words(samples[0])
            fact = f"{first} is preprocessed already, so it is not known what --embed-preprocessing should embed."
            raise QconvError(fact, "pass pictures, or leave --embed-preprocessing out.")
        self.raw = layout
        self._kept.clear()  # what a pass before has kept is what the float network takes
        self._passes = 0
        self._read_to_the_end = False
        return self.preprocessing

    @property
    def fed(self) -> Preprocessing | None:
        """The preprocessing of the batches that are loaded."""
        if self.preprocessing is None or self.raw is None:
            return self.preprocessing
        return self.preprocessing.as_pixels(self.raw)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the batches that are loaded; None where these are no images."""
        if self.fed is not None:
            return self.fed.size
        batch = next(iter(self.iter_cached("calibrate")), None)
        shape = () if batch is None else next(iter(batch.values())).shape
        if len(shape) != 4:
            return None
        return shape[1:3] if shape[3] in (1, 3) and shape[1] not in (1, 3) else shape[2:]

    def as_float(self, feeds: Batch) -> Batch:
        """Convert a loaded batch to what the float network takes."""
        if self.preprocessing is None or self.raw is None:
            return feeds
        (spec,) = self.inputs
        pixels = feeds[spec.name].transpose(layout_order(self.raw, self.preprocessing.layout))
        return {spec.name: cast_pixels(normalize_pixels(pixels, self.preprocessing), spec.dtype)}

    def _specs(self) -> list[InputSpec]:
        """The inputs with the shapes that are loaded."""
        if self.preprocessing is None or self.raw is None:
            return self.inputs
        (spec,) = self.inputs
        shape = tuple(spec.shape[axis] for axis in layout_order(self.preprocessing.layout, self.raw))
        return [InputSpec(spec.name, np.dtype(np.uint8), shape)]

    def over(self, paths: Sequence[Path]) -> DataLoader:
        """A loader of other files with the same preprocessing."""
        whole = max(self.listing.whole, len(self.listing.paths))
        listing = replace(self.listing, paths=tuple(paths), whole=whole)
        return DataLoader(
            listing, self.inputs, self.preprocessing, self.batch, self.reporter, raw=self.raw, cache=self.cache
        )

    def split(self) -> tuple[DataLoader, DataLoader | None]:
        """The pictures to fit to, and those that are held back from every choice: the last eighth of the draw.

        FEWEST_HELD_BACK at least; none where there are fewer than FEWEST_TO_SPLIT pictures.
        """
        paths = self.listing.paths
        if len(paths) < FEWEST_TO_SPLIT:
            return self, None
        held = max(FEWEST_HELD_BACK, len(paths) // HELD_BACK_DIVISOR)
        return self.over(paths[:-held]), self.over(paths[-held:])

    @property
    def _batch_is_fixed(self) -> bool:
        return bool(self.inputs[0].shape) and self.inputs[0].shape[0] is not None

    def iter_batches(self, stage: str) -> Generator[Batch, None, None]:
        """Yield every image, in batches; a last short one only where the network takes it."""
        first_pass, self._passes = self._passes == 0, self._passes + 1
        total, done = len(self.listing.paths), 0
        found = iter_batches(
            self.listing,
            self._specs(),
            self.fed,
            batch=self.batch,
            workers=LEAST_DECODERS,
            reporter=self.reporter,
            lost=self.lost.add,
            cache=self.cache,
        )
        for feeds in found:
            count = count_images(feeds)
            if count < self.batch and self._batch_is_fixed:
                if done:
                    break  # pictures short of a batch: the others speak for them
                feeds = {name: np.resize(array, (self.batch, *array.shape[1:])) for name, array in feeds.items()}
            if first_pass:
                self._keep(feeds)
            self.pictures = max(self.pictures, done + count)
            self._read_to_the_end |= first_pass and done + count >= total  # nobody may ask for what is behind
            yield feeds
            done += count
            self.reporter.progress(stage, min(done, total), total)
        self._read_to_the_end |= first_pass

    def iter_paths(self) -> Iterator[Path]:
        """Yield the images of a pass that is under way, in its order: asked for one behind it, those that are lost."""
        yield from (path for path in self.listing.paths if path not in self.lost)

    def iter_pixels(self, prep: Preprocessing, most: int) -> Iterator[NDArray[np.uint8]]:
        """Yield up to `most` images as pixels (H, W, C), RGB or grey, in the size of `prep`: a fixed draw."""
        paths = sorted(path for path in self.listing.paths if suffix_of(path) not in SAMPLE_SUFFIXES)
        chosen = tuple(paths[i] for i in np.random.default_rng(0).permutation(len(paths))[:most])
        color = Color.GREY if prep.color is Color.GREY else Color.RGB
        plain = replace(prep, color=color, scale=1.0, mean=(0.0,), std=(1.0,), layout=Layout.NHWC)
        as_bytes = InputSpec("x", np.dtype(np.uint8), (None, None, None, None))
        listing = Listing(chosen, len(chosen), 0)
        for batch in iter_batches(listing, [as_bytes], plain, batch=1, workers=LEAST_DECODERS, reporter=Reporter()):
            yield batch["x"][0]

    def iter_cached(self, stage: str) -> Iterator[Batch]:
        """Yield the first images, at most KEPT_IMAGES and about KEPT_BYTES."""
        if not (self._is_full or self._read_to_the_end):  # no pass yet, or one that ended early
            self._kept.clear()
            self._passes = 0
            for _ in self.iter_batches(stage):
                if self._is_full:
                    break
        yield from self._kept

    def iter_first(self, stage: str) -> Iterator[Batch]:
        """Yield the first KEPT_IMAGES images, read again where they are too large for all to stay in memory."""
        if not self._is_full or sum(map(count_images, self._kept)) >= KEPT_IMAGES:
            yield from self.iter_cached(stage)
            return
        seen = 0
        with contextlib.closing(self.iter_batches(stage)) as batches:
            for feeds in batches:
                yield feeds
                seen += count_images(feeds)
                if seen >= KEPT_IMAGES:
                    return

    def take(self, count: int, stage: str) -> list[Batch]:
        """The first `count` images, and those that fill up their last batch."""
        found: list[Batch] = []
        with contextlib.closing(self.iter_batches(stage)) as batches:
            for feeds in batches:
                found.append(feeds)
                if sum(map(count_images, found)) >= count:
                    break
        return found

    @property
    def _is_full(self) -> bool:
        kept = sum(array.nbytes for feeds in self._kept for array in feeds.values())
        return sum(map(count_images, self._kept)) >= KEPT_IMAGES or kept >= KEPT_BYTES

    def _keep(self, feeds: Batch) -> None:
        if not self._is_full:
            self._kept.append(feeds)


def pick_evenly(batches: Sequence[Batch], pictures: int) -> list[Batch]:
    """Pick batches, evenly spread, that hold about so many images."""
    wanted = max(1, min(len(batches), round(pictures * len(batches) / max(1, sum(map(count_images, batches))))))
    return [batches[index * len(batches) // wanted] for index in range(wanted)]


def count_images(feeds: Mapping[str, NDArray[Any]]) -> int:
    """How many images a batch holds: the length of its first input."""
    return len(next(iter(feeds.values())))


def _several_inputs_error(name: str, inputs: list[InputSpec]) -> QconvError:
    names = ", ".join(spec.name for spec in inputs)
    return QconvError(
        f"{name} has {len(inputs)} inputs ({names}), which pictures alone cannot feed.",
        f"pass a folder of .npz files, each one sample with the arrays {names}.",
    )
