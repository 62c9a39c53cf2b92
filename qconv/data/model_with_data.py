"""Opens models together with their input pipelines: `ModelWithData`, one model or two that are compared.

The preprocessing is taken from what the user says, then from the file's metadata, then from a model beside it, then
from evidence (`data.autodetect`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qconv.config.choices import option_name
from qconv.config.data_options import AUTO, DataOptions, PreprocessingOptions, merge_options, require_letterbox
from qconv.config.tasks import Tasks
from qconv.data.autodetect import detect_preprocessing
from qconv.data.batches import iter_batches
from qconv.data.evidence import find_fact, find_metadata_fact
from qconv.data.loader import LEAST_DECODERS, DataLoader, count_images
from qconv.errors import QconvError
from qconv.ir import load
from qconv.ir.files import Source, is_quantized, metadata_of, read_proto
from qconv.ir.metadata import describe_odd_metadata, read_float_preprocessing, read_preprocessing, read_recipe
from qconv.ir.original import open_original
from qconv.reporter import Reporter
from qconv.runtime.session import Session

OTHER_MODEL = "the other model"

NORMALIZING = ("preset", "scale", "mean", "std", "color", "layout")
"""Options that a file which takes pixels answers itself."""

Outputs = list[Any]
"""An array an output; lists where these are sequences, or of no part of a batch."""


@dataclass(frozen=True, slots=True)
class ModelWithData:
    """A model with its input pipeline. words: the preprocessing, in words."""

    session: Session
    feed: DataLoader
    words: str

    def batches(self, reporter: Reporter, lost: Callable[[Path], None]) -> Iterator[tuple[Any, int]]:
        """Yield batches with the number of their images: a last short batch is filled up where its size is fixed."""
        feed = self.feed
        fixed = bool(feed.inputs[0].shape) and feed.inputs[0].shape[0] is not None
        found = iter_batches(
            feed.listing,
            feed.inputs,
            feed.preprocessing,
            batch=feed.batch,
            workers=LEAST_DECODERS,
            reporter=reporter,
            lost=lost,
        )
        for feeds in found:
            count = count_images(feeds)
            if fixed and count < feed.batch:
                feeds = {name: np.resize(array, (feed.batch, *array.shape[1:])) for name, array in feeds.items()}
            yield feeds, count

    def outputs(self, batches: Iterator[tuple[Any, int]]) -> Iterator[Outputs]:
        """Yield all outputs, image by image; an empty list for those that a batch of several has one of.

        Raises QconvError where that are all of them.
        """
        for feeds, count in batches:
            found = self.session.run_all(feeds)
            size = count_images(feeds)
            if size == 1:
                yield found
                continue
            parted = [isinstance(array, np.ndarray) and array.shape[:1] == (size,) for array in found]
            if not any(parted):
                fact = f"no output of {self.session.name} has a part for each picture of a batch."
                fixed = self.feed.inputs[0].shape[0] is not None
                raise QconvError(fact, "export the model with a batch of 1." if fixed else "pass --batch 1.")
            for index in range(count):
                yield [x[index : index + 1] if whole else [] for x, whole in zip(found, parted, strict=True)]

    def takes_the_same_as(self, other: ModelWithData) -> bool:
        """Whether both models take the same arrays."""
        mine, its = self.feed, other.feed
        plain = [
            None if f.preprocessing is None else replace(f.preprocessing, source="", preset="") for f in (mine, its)
        ]
        names = [[(spec.name, spec.dtype, spec.shape) for spec in f.inputs] for f in (mine, its)]
        return plain[0] == plain[1] and names[0] == names[1] and mine.batch == its.batch


def iter_paired_batches(
    own: ModelWithData, other: ModelWithData, reporter: Reporter, lost: Callable[[Path], None]
) -> Iterator[tuple[Any, Any]]:
    """Yield the batches of both models; a last short one is filled up where its size is fixed."""
    if own.takes_the_same_as(other):
        yield from ((feeds, feeds) for feeds, _ in own.batches(reporter, lost))
        return
    its = other.batches(Reporter(), lambda path: None)
    yield from ((mine, theirs) for (mine, _), (theirs, _) in zip(own.batches(reporter, lost), its, strict=True))


def _open_model(
    source: Source,
    proto: Any,
    data: DataOptions,
    threads: int | None,
    reporter: Reporter,
    hint: PreprocessingOptions | None = None,
    carried_task: str = "auto",
    *,
    alone: bool = False,
) -> ModelWithData:
    """Open a model with its preprocessing: the user's, the file's, that of `hint`, or a detected one, in this order.

    proto: what is in the file. hint: preprocessing of the other model. carried_task: of either file, for users who say
    nothing of the task. alone: whether there is no other model that options may be for.
    """
    asked = data.task != "auto"
    tasks = data.tasks if asked else replace(data.tasks, task=carried_task)
    session = open_original(source, threads, tasks, required=asked)
    carried, said = metadata_of(proto), data.preprocessing
    settled = said.preset != AUTO or is_quantized(proto)
    odd = describe_odd_metadata(carried)
    for text in odd:
        reporter.warn(f"{source.name}: {text}")
    told, why = read_preprocessing(carried), "the file's metadata"
    if told is not None and told != read_float_preprocessing(carried):
        said = _without_normalization(said, source, reporter if alone else Reporter())
    if told is None:
        told, why = hint, OTHER_MODEL
    if told is None and settled and (fact := find_metadata_fact(carried)) is not None:
        told, why = fact.options, fact.why
    if told is not None and (feed := _feed_as_told(session, data, said, (told, why), reporter)) is not None:
        return ModelWithData(session, feed, _describe_loader(feed))
    feed = DataLoader.of(session, data, reporter.without_progress())
    if feed.preprocessing is not None and settled:
        require_letterbox(said, feed.preprocessing.resize, "the default, as the file tells no other")
    if feed.preprocessing is None or said.preset != AUTO:
        return ModelWithData(session, feed, _describe_loader(feed))
    if is_quantized(proto):
        if find_fact(load.load_unchanged(proto, source), feed.inputs[0].dtype, feed.preprocessing.layout) is None:
            reporter.warn(
                f"how {source.name} was fed in training is not known, as a quantized file does not tell; it gets "
                f"{feed.preprocessing.preset}: --preprocess settles it, or --against with the float model."
            )
        return ModelWithData(session, feed, _describe_loader(feed))
    model, _ = load.load(proto, source)
    detected = detect_preprocessing(model, session, feed, data.preprocessing, threads=threads)
    feed.preprocessing = detected.preprocessing
    for doubt in detected.doubts():
        if doubt not in odd:  # it was told above, with the name of the file
            reporter.warn(doubt)
    return ModelWithData(session, feed, detected.in_words())


def _feed_as_told(
    session: Session,
    data: DataOptions,
    said: PreprocessingOptions,
    source: tuple[PreprocessingOptions, str],
    reporter: Reporter,
) -> DataLoader | None:
    """The loader for a model that is fed as `source` tells, with the user's options over it.

    Args:
        session: The model's.
        data: The images, and all that the user says.
        said: What of it is for this model.
        source: Preprocessing, and where it comes from, in words.
        reporter: Hears of what is told and does not suit the model, which is ignored: then it is None.

    Raises:
        QconvError: What the user says does not suit the model, or speaks of a letterbox where there is none.
    """
    told, why = source
    # samples need none of it, which is no news where the user has said nothing
    quietly = Reporter() if data.preprocessing == PreprocessingOptions() else reporter.without_progress()
    try:
        feed = DataLoader.of(session, replace(data, preprocessing=merge_options(said, told)), quietly)
    except QconvError as error:
        DataLoader.of(session, data, Reporter())  # raises where the user is mistaken
        reporter.warn(f"{session.name} cannot be fed as {why} says, which is ignored: {error.message}")
        return None
    fed = feed.preprocessing
    if fed is not None:
        teller = f"the model beside {session.name}" if why == OTHER_MODEL else why
        require_letterbox(said, fed.resize, f"as {teller} says")
        if said.given.get("preset", fed.preset) == fed.preset:
            feed.preprocessing = replace(fed, source=_describe_source(said, why, fed.preset))
    return feed


def _without_normalization(said: PreprocessingOptions, source: Source, reporter: Reporter) -> PreprocessingOptions:
    """What is said of resizing, for a file that takes pixels: all else is for the float model, as `reporter` hears."""
    dropped = [name for name in NORMALIZING if name in said.given]
    if dropped:
        idle = " and ".join("--preprocess" if name == "preset" else option_name(name) for name in dropped)
        reporter.warn(f"{source.name} takes pixels and normalizes them itself: {idle} is not used.")
    return replace(said, preset=None, scale=None, mean=None, std=None, color=None, layout=None)


def open_models(
    source: Source, against: Source | None, data: DataOptions, threads: int | None, reporter: Reporter
) -> tuple[ModelWithData, ModelWithData | None]:
    """Open the model and the other one, by their metadata; a quantized file otherwise takes the float model's.

    Of both the same outputs hold the same: what a file that qconv wrote was made with counts for the other one, too.
    """
    proto = read_proto(source)
    if against is None:
        task = _find_carried_task(proto)
        return _open_model(source, proto, data, threads, reporter, None, task, alone=True), None
    other_proto = read_proto(against)
    task = _find_carried_task(proto, other_proto)
    carried = read_float_preprocessing(metadata_of(proto))
    other = _open_model(against, other_proto, data, threads, reporter, carried, task)
    hint = None
    if carried is None and is_quantized(proto) and other.feed.preprocessing is not None:
        fed = other.feed.preprocessing
        hint = replace(fed.as_options, layout=None)
    return _open_model(source, proto, data, threads, reporter, hint, task), other


def _find_carried_task(*protos: Any) -> str:
    """The task that the first of these models with a recipe was made with; "auto" where none says one."""
    told = (read_recipe(metadata_of(proto)).get("task") for proto in protos)
    return next((task for task in told if isinstance(task, str) and _is_task(task)), "auto")


def _is_task(text: str) -> bool:
    try:
        Tasks(text)
    except QconvError:
        return False
    return True


def _describe_source(said: PreprocessingOptions, why: str, preset: str) -> str:
    """Where a preprocessing comes from. why: what tells of it, but for the parts that are said. preset: its name."""
    told = f"as {why}" if why == OTHER_MODEL else why
    return said.name_beside(f"--preprocess {preset}" if "preset" in said.given else told)


def _describe_loader(feed: DataLoader) -> str:
    return "" if feed.preprocessing is None else feed.preprocessing.in_words()
