"""A model with its pictures, for those who only look: how it is fed, and its outputs picture by picture.

What the user says counts first, then what the file's metadata tells, then how a model beside it is fed, then evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.preprocessing import AUTO, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.data import images
from qconv.data.detect import detect
from qconv.data.evidence import fact_of, told_by, told_of_float
from qconv.data.feed import DECODERS, Feed
from qconv.errors import QconvError
from qconv.ir import load
from qconv.ir.files import Source, is_quantized, metadata_of, open_original, read_proto
from qconv.runtime.session import Session

Outputs = list[NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Fed:
    """A model and its pictures."""

    session: Session
    feed: Feed
    words: str

    def batches(self, warn: Callable[[str], None], lost: Callable[[Path], None]) -> Iterator[tuple[Any, int]]:
        """What the model takes, with the number of pictures in it: a last short batch is filled up where it must be."""
        feed = self.feed
        fixed = bool(feed.inputs[0].shape) and feed.inputs[0].shape[0] is not None
        found = images.batches(
            feed.listing, feed.inputs, feed.preprocessing, batch=feed.batch, workers=DECODERS, warn=warn, lost=lost
        )
        for feeds in found:
            count = len(next(iter(feeds.values())))
            if fixed and count < feed.batch:
                feeds = {name: np.resize(array, (feed.batch, *array.shape[1:])) for name, array in feeds.items()}
            yield feeds, count

    def outputs(self, batches: Iterator[tuple[Any, int]]) -> Iterator[Outputs]:
        """All outputs of one picture after the other."""
        for feeds, count in batches:
            found = self.session.run_all(feeds)
            size = len(next(iter(feeds.values())))
            if size == 1:
                yield found
                continue
            for name, array in zip(self.session.outputs, found, strict=True):
                if not isinstance(array, np.ndarray) or not array.shape or len(array) != size:
                    fact = f"output {name} of {self.session.name} has no part for each picture of a batch."
                    fixed = self.feed.inputs[0].shape[0] is not None
                    raise QconvError(fact, "export the model with a batch of 1." if fixed else "pass --batch 1.")
            for index in range(count):
                yield [array[index : index + 1] for array in found]

    def takes_the_same_as(self, other: Fed) -> bool:
        """Whether both can be given the same arrays."""
        mine, its = self.feed, other.feed
        plain = [
            None if f.preprocessing is None else replace(f.preprocessing, source="", preset="") for f in (mine, its)
        ]
        names = [[(spec.name, spec.dtype, spec.shape) for spec in f.inputs] for f in (mine, its)]
        return plain[0] == plain[1] and names[0] == names[1] and mine.batch == its.batch


def side_by_side(
    own: Fed, other: Fed, warn: Callable[[str], None], lost: Callable[[Path], None]
) -> Iterator[tuple[Any, Any]]:
    """What both take, batch by batch; a last short one is filled up where it must be."""
    if own.takes_the_same_as(other):
        yield from ((feeds, feeds) for feeds, _ in own.batches(warn, lost))
        return
    its = other.batches(_nobody, lambda path: None)
    yield from ((mine, theirs) for (mine, _), (theirs, _) in zip(own.batches(warn, lost), its, strict=True))


def _opened(
    source: Source, recipe: Recipe, warn: Callable[[str], None], hint: PreprocessingOptions | None = None
) -> Fed:
    """A model with its preprocessing: said by the user, told by the file, as `hint` has it, or found out.

    hint: how the other model is fed, where this one should be fed alike.
    """
    proto = read_proto(source)
    session = open_original(source, recipe)
    carried, said = metadata_of(proto), recipe.preprocessing
    told, why = told_by(carried), "the file's metadata"
    if told is not None and told != told_of_float(carried):  # it takes pixels: all else is for the float model
        said = replace(said, preset=None, scale=None, mean=None, std=None, color=None, layout=None)
    if told is None:
        told, why = hint, "as the other model"
    if told is not None:
        # samples need none of it, which is no news where the user has said nothing
        quietly = _nobody if recipe.preprocessing == PreprocessingOptions() else warn
        feed = Feed.of(session, replace(recipe, preprocessing=_joined(said, told)), quietly, _nothing)
        if feed.preprocessing is not None and said == PreprocessingOptions():
            feed.preprocessing = replace(feed.preprocessing, source=why)
        return Fed(session, _checked(feed), _words(feed))
    feed = Feed.of(session, recipe, warn, _nothing)
    if feed.preprocessing is None or said.preset != AUTO:
        return Fed(session, _checked(feed), _words(feed))
    if is_quantized(proto):
        if fact_of(load.load_unchanged(proto, source), feed.inputs[0].dtype, feed.preprocessing.layout) is None:
            warn(
                f"how {source.name} was fed in training is not known, as a quantized file does not tell; it gets "
                f"{feed.preprocessing.preset}: --preprocess settles it, or --against with the float model."
            )
        return Fed(session, feed, _words(feed))
    model, _ = load.load(proto, source)
    detected = detect(model, session, feed, recipe.preprocessing, threads=recipe.threads)
    feed.preprocessing = detected.preprocessing
    for doubt in detected.doubts():
        warn(doubt)
    return Fed(session, feed, detected.in_words())


def opened(
    source: Source, against: Source | None, recipe: Recipe, warn: Callable[[str], None]
) -> tuple[Fed, Fed | None]:
    """The model and the other one. A quantized file is fed as the float model is, and either as its metadata says."""
    heard: set[str] = set()

    def once(text: str) -> None:
        if text not in heard:
            heard.add(text)
            warn(text)

    return _opened_both(source, against, recipe, once)


def _opened_both(
    source: Source, against: Source | None, recipe: Recipe, warn: Callable[[str], None]
) -> tuple[Fed, Fed | None]:
    if against is None:
        return _opened(source, recipe, warn), None
    proto = read_proto(source)
    carried = told_of_float(metadata_of(proto))
    other = _opened(against, recipe, warn, carried)
    hint = None
    if carried is None and is_quantized(proto) and other.feed.preprocessing is not None:
        fed = other.feed.preprocessing
        hint = PreprocessingOptions(
            fed.preset, fed.scale, fed.mean, fed.std, fed.color, None, fed.resize, fed.filter, fed.size
        )
    return _opened(source, recipe, warn, hint), other


def _joined(said: PreprocessingOptions, told: PreprocessingOptions) -> PreprocessingOptions:
    """What the user says wins; another preset also takes the place of the numbers that belong to the old one."""
    own = {part: getattr(said, part) for part in PreprocessingOptions.__dataclass_fields__}
    default = {part: getattr(PreprocessingOptions(), part) for part in own}
    changed = {part: wish for part, wish in own.items() if wish != default[part]}
    if "preset" in changed:
        told = replace(told, preset=None, scale=None, mean=None, std=None, color=None)
    return replace(told, **changed)


def _checked(feed: Feed) -> Feed:
    """Raise QconvError where bytes would have to hold normalised numbers."""
    (spec, *_), fed = feed.inputs, feed.preprocessing
    if fed is not None and spec.dtype == np.uint8 and not fed.keeps_pixels:
        fact = f"input '{spec.name}' takes uint8, in which pixels cannot be normalised."
        raise QconvError(fact, "leave the preprocessing options out, or pass --preprocess raw.")
    return feed


def _nobody(text: str) -> None:
    pass


def _words(feed: Feed) -> str:
    return "" if feed.preprocessing is None else feed.preprocessing.in_words()


def _nothing(stage: str, done: int, total: int) -> None:
    pass
