"""Collects calibration statistics: from images, from a statistics file, or from BatchNormalization."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.calibration import statistics_file
from qconv.calibration.observer import Listener, Observer, observe, open_observed_session
from qconv.calibration.range_estimators import sketch_contents_for
from qconv.calibration.sketch import Sketch, SketchContents
from qconv.config.data_options import (
    DataOptions,
    Layout,
    Preprocessing,
    PreprocessingOptions,
    merge_options,
    require_letterbox,
)
from qconv.config.recipe import Recipe
from qconv.data.autodetect import DetectedPreprocessing, detect_preprocessing, detect_without_images
from qconv.data.batches import PixelCache
from qconv.data.loader import Batch, DataLoader
from qconv.data.preprocessing import InputSpec, resolve_preprocessing
from qconv.data_free.dead_leaves import GeneratedImageLoader
from qconv.data_free.statistics import DataFreeStatistics
from qconv.decoding.boxes import LEAST_SCORE
from qconv.errors import QconvError, require_torch
from qconv.ir.files import Source, total_weight_bytes
from qconv.ir.model import Model
from qconv.ir.original import open_original
from qconv.metrics.by_labels import DataLabels, Labels
from qconv.metrics.comparison import LabelledBatches
from qconv.metrics.labelled import Warn
from qconv.metrics.network_outputs import NetworkOutputs, describe_outputs
from qconv.planning.plan import Plan
from qconv.reporter import Reporter
from qconv.runtime.outputs import find_class_vector
from qconv.runtime.session import Session, make_random_inputs

MOST_CACHED_NETWORKS = 4
ANY_SIZE = (256, 256)
"""Height and width of random numbers where statistics of samples are all that is known, and the network takes any."""

MOST_SHAPES_SEEN = 4
"""Batches that tell the shapes of outputs whose declared one is doubtful."""
LARGEST_CACHED_BYTES = 2**30
"""Bytes of a network's weights."""


@dataclass(slots=True)
class CalibrationCache:
    """What several runs on one float model need to find out only once, where they read the same pictures.

    detected: how it is fed, by what the user says and the pictures. sketches: all that any calibrator could want, by
    the network as folding and equalization left it, the pictures, and the tensors that were watched together, since
    which parts of a picture are kept depends on all of them. The newest KEPT_NETWORKS stay.
    """

    detected: dict[str, DetectedPreprocessing] = field(default_factory=dict)
    sketches: dict[str, dict[str, Sketch]] = field(default_factory=dict)

    def known_as(self, model: Model, observers: Sequence[Observer], data: DataOptions, feed: DataLoader) -> str | None:
        """The key of what such a pass sees; None for a network too large to be told from others."""
        if total_weight_bytes(model) > LARGEST_CACHED_BYTES:
            return None
        network = hashlib.sha256(model.proto().SerializeToString()).hexdigest()
        return f"{network} {feed.fed} {feed.batch} {_describe_draw(data, feed)} {observers}"

    def keep(self, name: str, sketches: dict[str, Sketch]) -> None:
        """Remember what a pass has seen, and forget the oldest."""
        self.sketches[name] = sketches
        while len(self.sketches) > MOST_CACHED_NETWORKS:
            del self.sketches[next(iter(self.sketches))]


def _describe_draw(data: DataOptions, feed: DataLoader) -> str:
    """Which pictures are read, and how the user says they are fed."""
    drawn = data.paths, data.glob, data.samples, data.seed, len(feed.listing.paths)
    return repr((*drawn, data.preprocessing, data.tasks))


@dataclass(slots=True)
class CalibrationData:
    """What is known of the pictures, and through which door more of it comes.

    data: what the user says of the pictures. feed: None where none are given. known: the statistics in a file, None
    where none is given. detected: how the float network is fed. model: the hash of its bytes, where statistics are read
    or written. session: the user's own model, until it is known how to feed it. pixels: the layout of
    the pixels that the model takes instead, None where it takes what the float network does. cache: what runs before
    this one have found out. data_free_statistics: what there is in place of pictures, None where they or statistics are
    given. held: pictures that nothing is fitted to, on which the result is checked; None where there are few. network:
    what the outputs of the user's model are, once that was asked for. labels: of the pictures; None without any.
    """

    data: DataOptions
    feed: DataLoader | None
    known: statistics_file.Statistics | None
    detected: DetectedPreprocessing
    model: str
    session: Session | None
    pixels: Layout | None = None
    cache: CalibrationCache | None = None
    data_free_statistics: DataFreeStatistics | None = None
    held: DataLoader | None = None
    network: NetworkOutputs | None = None
    labels: Labels | None = None

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How the float network is fed."""
        return self.detected.preprocessing

    def settle(self, model: Model, threads: int | None) -> None:
        """Find out how the network is fed, where that is not known. model: as loaded, not yet folded."""
        session, self.session = self.session, None  # it runs again when the result is checked, and is large
        if self.data_free_statistics is not None:
            assert session is not None
            made_up = self.data_free_statistics.imagined
            said = self.data.preprocessing
            self.detected = detect_without_images(model, session, made_up, said, threads=threads)
            made_up.preprocessing = self.detected.preprocessing
        if self.feed is None or self.known is not None:
            return
        assert session is not None
        remembered = {} if self.cache is None else self.cache.detected
        draw = _describe_draw(self.data, self.feed)
        if draw not in remembered:
            said = self.data.preprocessing
            remembered[draw] = detect_preprocessing(model, session, self.feed, said, threads=threads)
        self.detected = remembered[draw]
        for loader in self._loaders:
            loader.preprocessing = self.detected.preprocessing

    def shapes_of_outputs(
        self, source: Source, threads: int | None, names: Sequence[str]
    ) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Run the user's own model on the first batches, or on random numbers.

        names: of outputs that are tensors. Returns their shapes, of each batch.
        """
        session, loader = open_original(source, threads, self.data.tasks), self.runnable_loader
        if loader is None:
            is_open = any(None in shape[1:] for _, _, shape in session.inputs)
            size = self.size or (ANY_SIZE if is_open else None)
            batches: Iterable[Batch] = [make_random_inputs(session, None, size)]
        else:
            batches = islice(loader.iter_cached("load"), MOST_SHAPES_SEEN)
        runs = [[array.shape for array in session.run(names, feeds)] for feeds in batches]
        return dict(zip(names, zip(*runs, strict=True), strict=True))

    def describe_network(self, source: Source, threads: int | None) -> NetworkOutputs:
        """What the outputs of the user's own model are, by a run on the first batch; found once.

        Raises QconvError where the user's own decoder fails on it, or no decoder reads what they say are detections.
        """
        if self.network is None:
            session, loader = open_original(source, threads, self.data.tasks), self.runnable_loader
            batch = None if loader is None else next(iter(loader.iter_cached("load")), None)
            if loader is None or batch is None:
                return NetworkOutputs(session.model_outputs)
            feeds = loader.as_float(batch)
            self.network = describe_outputs(session, feeds, found := session.run_all(feeds))
            if self.data.decode is not None and self.network.head is not None:
                self.network.head.read(self.network.by_name(found), LEAST_SCORE, reference=True)
        return self.network

    def iter_float_outputs(self, source: Source, threads: int | None) -> Iterator[list[Any]]:
        """Yield what the user's own model says of what the result can be run on, batch by batch."""
        session, loader = open_original(source, threads, self.data.tasks), self.runnable_loader
        if loader is not None:
            with contextlib.closing(loader.iter_batches("load")) as batches:
                for batch in batches:
                    yield session.run_all(loader.as_float(batch))

    def fit_labels(self, opened: DataLabels, network: NetworkOutputs, metadata: Mapping[str, str], warn: Warn) -> None:
        """Take over labels as they suit the network. Raises QconvError where they do not."""
        self.labels = opened.fit(network, metadata, self.preprocessing, warn)
        if self.runnable_loader is not None:
            self.labels.require_some(self.runnable_loader.listing.paths)

    def labelled_batches(self, loader: DataLoader) -> LabelledBatches | None:
        """The labels of what a pass of this loader yields; None without any."""
        return None if self.labels is None else LabelledBatches(self.labels, loader.iter_paths())

    def take_pixels(self, layout: Layout) -> Preprocessing:
        """Speak of uint8 pixels from now on. Returns how the float network is fed; raises QconvError for samples."""
        for loader in self._loaders:
            loader.take_pixels(layout)
        if self.preprocessing is None:
            fact = "The statistics are of ready-made samples, so it is not known what to embed."
            raise QconvError(fact, "pass pictures, or leave --embed-preprocessing out.")
        self.pixels = layout
        return self.preprocessing

    @property
    def runnable_loader(self) -> DataLoader | None:
        """What the result can be run on: pictures, those held back where some are, or made-up ones.

        None where there are but statistics.
        """
        if self.data_free_statistics is not None:
            return self.data_free_statistics.imagined
        return self.feed if self.held is None else self.held

    @property
    def paths(self) -> tuple[Path, ...]:
        """All pictures that are looked at, those held back among them."""
        return tuple(path for loader in (self.feed, self.held) if loader is not None for path in loader.listing.paths)

    @property
    def _loaders(self) -> list[DataLoader]:
        imagined = None if self.data_free_statistics is None else self.data_free_statistics.imagined
        return [loader for loader in (self.feed, self.held, imagined) if loader is not None]

    @property
    def model_preprocessing(self) -> Preprocessing | None:
        """The preprocessing of what the model takes: of pixels, where it is given these."""
        if self.preprocessing is None or self.pixels is None:
            return self.preprocessing
        return self.preprocessing.as_pixels(self.pixels)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of what the model takes; None where that is no picture, or nothing is fed."""
        if self.model_preprocessing is not None:
            return self.model_preprocessing.size
        return None if self.feed is None else self.feed.size

    @property
    def description(self) -> str:
        """How the model is fed, in words for the summary."""
        return replace(self.detected, preprocessing=self.model_preprocessing).in_words()

    def sketches(
        self, model: Model, plans: Sequence[Plan], recipe: Recipe, listener: Listener | None = None
    ) -> Mapping[str, Sketch]:
        """The sketches of all tensors that any of the plans needs. Raises QconvError where the file lacks some.

        listener: hears what the network says of all pictures, where it runs for this.
        """
        every = recipe.save_stats is not None or self.cache is not None
        want = SketchContents.ALL if every else sketch_contents_for(recipe)
        found: dict[str, Observer] = {}
        means = (
            recipe.measures_means
            and self.data_free_statistics is None
            and self.known is None
            and recipe.save_stats is None
        )
        for observer in (
            t for plan in plans for t in (*plan.observers(want), *(plan.float_observers() if means else ()))
        ):
            known = found.get(observer.name, observer)
            found[observer.name] = replace(observer, want=observer.want | known.want)
        observers = list(found.values())
        if self.known is not None:
            statistics_file.require_same_pixels(self.known, recipe.stats or "", self.pixels)
            statistics_file.require_observed_tensors(
                self.known, recipe.stats or "", [observer.name for observer in observers]
            )
            return self.known.sketches
        if self.data_free_statistics is not None:
            return self.data_free_statistics.sketches(model, observers)
        if not observers and recipe.save_stats is not None:
            raise QconvError("There is nothing for --save-stats to save: no activation is quantized.", "leave it out.")
        if not observers or self.feed is None:
            return {}
        name = None if self.cache is None else self.cache.known_as(model, observers, self.data, self.feed)
        if self.cache is not None and name in self.cache.sketches:
            return self.cache.sketches[name]
        names = () if listener is None else listener.names
        session = open_observed_session(model, observers, recipe.threads, names)
        seen = observe(session, observers, self.feed.iter_batches("calibrate"), listener)
        if self.cache is not None and name is not None:
            self.cache.keep(name, seen)
        return seen

    def save_statistics(self, sketches: Mapping[str, Sketch], source: Source, out: Path) -> None:
        """Write the statistics that were seen. Raises QconvError where that is impossible."""
        name = "" if source.path is None else source.path.name
        found = statistics_file.Statistics(
            self.model, name, statistics_file.preprocessing_to_dict(self.preprocessing), self.pixels, sketches
        )
        statistics_file.write_statistics(found, out)


def open_calibration_data(
    source: Source,
    model: str,
    recipe: Recipe,
    data: DataOptions,
    reporter: Reporter,
    *,
    hold_back: bool = False,
) -> CalibrationData:
    """The pictures of `data` and the statistics that `recipe` names. model: the hash of the float model's bytes.

    hold_back: keep some pictures to check the result on, where there are enough; with statistics nothing is fitted to
    the ranges of pictures, so that all are used. Raises QconvError where they are not for this model.
    """
    session = open_original(source, recipe.threads, data.tasks)
    if recipe.data_free:
        if recipe.fallback == "synthesized":
            require_torch("--fallback synthesized")
        vector = find_class_vector(session.model_outputs)
        scores = None if vector is None else session.outputs[vector]
        synthesize = partial(_synthesize_images, source, recipe.threads, reporter, scores)
        data_free_statistics = DataFreeStatistics(
            source, GeneratedImageLoader.like(session, data.preprocessing), recipe.fallback, recipe.threads, synthesize
        )
        return CalibrationData(
            data,
            None,
            None,
            DetectedPreprocessing(data_free_statistics.imagined.preprocessing),
            "",
            session,
            data_free_statistics=data_free_statistics,
        )
    if recipe.stats is None:
        seen, held = DataLoader.of(session, data, reporter), None
        seen.cache = PixelCache()
        if hold_back:
            seen, held = seen.split()
        fed = DetectedPreprocessing(seen.preprocessing)
        return CalibrationData(data, seen, None, fed, model, session, held=held)
    found, path = statistics_file.read_statistics(recipe.stats), recipe.stats
    statistics_file.require_same_model(found, path, model=model, name=source.name)
    known = None if found.preprocessing is None else statistics_file.preprocessing_from_dict(found.preprocessing)
    if data.preprocessing != PreprocessingOptions():
        said = data.preprocessing if known is None else merge_options(data.preprocessing, known.as_options)
        wanted = resolve_preprocessing(said, InputSpec(*session.inputs[0]), class_vector=session.gives_class_scores)
        require_letterbox(data.preprocessing, wanted.resize, f"as the statistics in {path} were made")
        statistics_file.require_same_preprocessing(found, path, statistics_file.preprocessing_to_dict(wanted))
    feed = DataLoader.of(session, data, reporter, known) if data.paths else None
    if feed is not None:
        feed.cache = PixelCache()
        statistics_file.require_same_preprocessing(
            found, path, statistics_file.preprocessing_to_dict(feed.preprocessing)
        )
    return CalibrationData(data, feed, found, DetectedPreprocessing(known), model, None)


def _synthesize_images(
    source: Source,
    threads: int | None,
    reporter: Reporter,
    scores: str | None,
    fed: Preprocessing,
    batch: int | None,
    count: int,
) -> NDArray[np.uint8]:
    """See `qconv.training.synthesize.optimize_images`."""
    from qconv.training.synthesize import optimize_images  # PyTorch is an extra

    return optimize_images(source, fed, batch, count, threads, reporter, scores)
