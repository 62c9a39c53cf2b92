"""Observes the tensors of the float network on calibration images, and estimates the ranges of their channels.

The network runs once; every observed tensor gets a sketch. An image's key, by which sketches order images, is a hash
of the extremes of all tensors on it: it does not depend on the file's name, its place or its batch.

Channels that are scaled to fill a range have no headroom for other images, and some wake on one image in a hundred.
The largest values of single images give the headroom for UNSEEN_FACTOR times as many images, by Hill's estimate of a
Pareto tail:

    reach = x_1 * UNSEEN_FACTOR^xi   xi = mean over i < k of log(x_i / x_k),  x_1 >= x_2 >= ... the k largest of P

It is at most the largest channel's, and as large as that where fewer than k images wake the channel. With too few
images to tell, xi is 1, the tail of a distribution without a mean.
Source: Hill 1975, A Simple General Approach to Inference About the Tail of a Distribution; Weissman 1978.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.sketch import (
    NO_COLUMNS,
    Sketch,
    SketchBuilder,
    SketchContents,
    TensorView,
    pick_columns,
    sampling_stride,
    upper_halves,
)
from qconv.data.loader import count_images
from qconv.errors import QconvError
from qconv.ir import subgraph
from qconv.ir.model import Model
from qconv.runtime.session import Session
from qconv.storage import prefetch

KEY_BYTES = 8

CONCURRENT_BATCHES = 2
"""Batches that run at the same time. More would take more memory and hardly less time."""

T = TypeVar("T")


@dataclass(frozen=True)
class Observer:
    """A tensor to observe. Only what `want` asks for is computed: reductions cost as much as the network itself.

    want: what the sketch keeps beyond the extremes.
    never_negative: the graph says so; its low then counts as zero unseen, as every range holds zero.
    pooled: the network itself computes maximum and mean of each channel, and returns every stride-th pixel as a sample;
        for tensors (N, C, H, W) that are never negative.
    """

    name: str
    want: SketchContents = SketchContents.CHANNELS
    never_negative: bool = False
    pooled: bool = False
    stride: int = 1

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs that the network returns for this tensor."""
        if not self.pooled:
            return (self.name,)
        return subgraph.pooled_output_names(self.name)[: 3 if self._samples else 2]

    @cached_property
    def _samples(self) -> bool:
        return bool(self.want & (SketchContents.BINS | SketchContents.COLUMNS))

    @cached_property
    def _sums(self) -> bool:
        return SketchContents.CHANNELS in self.want

    @cached_property
    def _by_channel(self) -> bool:
        return bool(self.want & (SketchContents.CHANNELS | SketchContents.COLUMNS))

    @property
    def pooling(self) -> subgraph.ChannelPooling | None:
        """What the network computes for this tensor; None where it returns the tensor itself."""
        return subgraph.ChannelPooling(self.name, self.stride if self._samples else None) if self.pooled else None

    def view(self, seen: list[NDArray[Any]]) -> TensorView:
        """The view of one image that a sketch takes. seen: the image's `outputs`, (N, ...) each, N = 1 for most."""
        if not seen[0].size:
            return self._view_of_nothing(seen[0].shape)
        if self.pooled:
            highs, means, *sample = (_rows_of_channels(array) for array in seen)
            if highs.shape[1] == 1:  # one image; buffers are overwritten
                high, mean = highs[:, 0].copy(), means[:, 0].copy()
            else:
                high, mean = highs.max(axis=1), means.mean(axis=1)
            return TensorView(np.zeros_like(high), high, mean, 1, *(sample or [NO_COLUMNS]))
        return self._view_of_all(seen[0])

    def _view_of_nothing(self, shape: Sequence[int]) -> TensorView:
        """The view of a tensor without elements: one zero in each channel, which every range holds, and in no mean."""
        by_channel = len(shape) > 1 and shape[1] > 0 and self._by_channel
        view = self._view_of_all(np.zeros((1, shape[1] if by_channel else 1), np.float32))
        return replace(view, count=0)

    def _view_of_all(self, x: NDArray[Any]) -> TensorView:
        """The view of a whole tensor; rank 0 or 1 counts as one channel."""
        by_channel = x.ndim > 1 and self._by_channel
        rows = _rows_of_channels(x) if by_channel else x.reshape(1, -1)
        highs = rows.max(axis=1)
        lows = np.zeros_like(highs) if self.never_negative else rows.min(axis=1)
        # einsum adds up twice as fast as sum, at 1e-5 of relative error
        sums = np.einsum("cx->c", rows) if self._sums else NO_COLUMNS.reshape(-1)
        sample = rows[:, :: sampling_stride(rows.size, rows.shape[1])] if self._samples else NO_COLUMNS
        return TensorView(_as_float32(lows), _as_float32(highs), _as_float32(sums), rows.shape[1], sample)


def _rows_of_channels(x: NDArray[Any]) -> NDArray[Any]:
    """(N, C, ...) as (C, N * ...)."""
    alone = len(x) == 1  # no axis to move, which takes longer than what is done with most tensors
    return x.reshape(x.shape[1], -1) if alone else np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)


def _as_float32(x: NDArray[Any]) -> NDArray[np.float32]:
    return x.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class Listener:
    """Hears in one pass with observers what the network says. hear: takes the tensors of these names and the images.

    It is called batch by batch, in order.
    """

    names: Sequence[str]
    hear: Callable[[list[NDArray[Any]], int], None]


def observe(
    session: Session,
    observers: Iterable[Observer],
    batches: Iterable[Mapping[str, NDArray[Any]]],
    listener: Listener | None = None,
) -> dict[str, Sketch]:
    """Run every batch once and sketch the observed tensors, by their names.

    Raises QconvError where a tensor holds NaN or infinity: no range would be right.
    """
    observers = list(observers)
    sketchers, turn = _make_builders(observers), threading.Lock()

    def take(picture: Mapping[str, NDArray[Any]]) -> None:
        seen = _view_image(observers, picture)
        with turn:
            seen.work_into(sketchers)

    for _ in _map_images(take, session, observers, batches, listener):
        pass
    return _build_sketches(sketchers)


def observe_each_image(
    session: Session, observers: Iterable[Observer], batches: Iterable[Mapping[str, NDArray[Any]]]
) -> Iterator[dict[str, Sketch]]:
    """Yield the sketches of each image alone. Merged they are those that `observe` returns."""
    observers = list(observers)

    def take(picture: Mapping[str, NDArray[Any]]) -> dict[str, Sketch]:
        sketchers = _make_builders(observers)
        _view_image(observers, picture).work_into(sketchers)
        return _build_sketches(sketchers)

    yield from _map_images(take, session, observers, batches)


def _map_images(
    take: Callable[[Mapping[str, NDArray[Any]]], T],
    session: Session,
    observers: list[Observer],
    batches: Iterable[Mapping[str, NDArray[Any]]],
    listener: Listener | None = None,
) -> Iterator[T]:
    """Yield take(outputs by name) of every image, in order. listener: hears of each batch before its images.

    `session.at_once` batches run at the same time, each in a thread of its own: a runtime whose threads wait for each
    other at every node, and then for Python to take what they found, takes half as long again.
    """
    inputs = {name for name, _, _ in session.inputs}
    outputs = [name for observer in observers if observer.name not in inputs for name in observer.outputs]
    heard = [] if listener is None else [name for name in listener.names if name not in inputs]
    outputs += [name for name in heard if name not in outputs]

    def run(batch: Mapping[str, NDArray[Any]]) -> tuple[list[T], list[NDArray[Any]], int]:
        seen = {**batch, **dict(zip(outputs, session.run_into_buffers(outputs, batch), strict=True))}
        count = count_images(batch)
        said = [] if listener is None else [np.array(seen[name]) for name in listener.names]  # buffers are used again
        return [take(picture) for picture in _split_batch(seen, count)], said, count

    with contextlib.closing(prefetch(run, batches, workers=session.at_once, depth=session.at_once + 1)) as found:
        for future in found:
            taken, said, count = future.result()
            if listener is not None:
                listener.hear(said, count)
            yield from taken


def _make_builders(observers: list[Observer]) -> dict[str, SketchBuilder]:
    return {observer.name: SketchBuilder(observer.want) for observer in observers}


def _build_sketches(sketchers: Mapping[str, SketchBuilder]) -> dict[str, Sketch]:
    return {name: _build_sketch(sketcher, name) for name, sketcher in sketchers.items()}


@dataclass(frozen=True, slots=True)
class _ImageViews:
    """The views of all observed tensors on one image. halves: upper 16 bits of the samples."""

    key: int
    views: dict[str, TensorView]
    halves: dict[str, NDArray[np.uint16]]

    def work_into(self, sketchers: Mapping[str, SketchBuilder]) -> None:
        for name, view in self.views.items():
            sketchers[name].add(view, self.key, self.halves[name])


@np.errstate(over="ignore", invalid="ignore")  # infinite values are refused
def _view_image(observers: list[Observer], picture: Mapping[str, NDArray[Any]]) -> _ImageViews:
    views = {observer.name: observer.view([picture[name] for name in observer.outputs]) for observer in observers}
    # all tensors at once: a call for each of them would take longer than what it computes
    lows, highs = (np.concatenate(e) for e in zip(*((v.lows, v.highs) for v in views.values()), strict=True))
    starts = np.cumsum([0, *(len(view.lows) for view in views.values())])[:-1]
    extremes = np.stack([np.minimum.reduceat(lows, starts), np.maximum.reduceat(highs, starts)], axis=1)
    finite = np.isfinite(extremes)
    if not finite.all():
        raise _not_finite_error(observers[int(np.argmin(finite)) // 2].name)
    key = int.from_bytes(hashlib.blake2b(extremes.tobytes(), digest_size=KEY_BYTES).digest())
    halves = upper_halves(np.concatenate([view.sample.reshape(-1) for view in views.values()]))
    ends = np.cumsum([view.sample.size for view in views.values()])[:-1]
    return _ImageViews(key, views, dict(zip(views, np.split(halves, ends), strict=True)))


def _split_batch(seen: Mapping[str, NDArray[Any]], count: int) -> Iterator[Mapping[str, NDArray[Any]]]:
    """Split outputs (N, ...) by image. An array whose axis 0 is no multiple of `count` counts whole with each image."""
    if count == 1:
        yield seen
        return
    parts = {name: _split_array(array, count) for name, array in seen.items()}
    for index in range(count):
        yield {name: found[index] for name, found in parts.items()}


def _split_array(array: NDArray[Any], count: int) -> list[NDArray[Any]]:
    if not array.ndim or len(array) % count:
        return [array] * count
    return np.split(array, count)


def _build_sketch(sketcher: SketchBuilder, name: str) -> Sketch:
    try:
        return sketcher.sketch()
    except ValueError:  # a maximum pool may swallow NaN, a mean cannot
        raise _not_finite_error(name) from None


def _not_finite_error(name: str) -> QconvError:
    return QconvError(
        f"Tensor {name!r} holds NaN or infinite values on these pictures.",
        "check the preprocessing options, the float model on one picture, and its weights.",
    )


@contextlib.contextmanager
def export_observed_model(
    model: Model, observers: Iterable[Observer], heard: Iterable[str] = ()
) -> Iterator[str | bytes]:
    """The model as ONNX Runtime takes it, with the outputs that `observe` needs. heard: names of a listener."""
    observers = list(observers)
    pools = [observer.pooling for observer in observers if observer.pooling is not None]
    with subgraph.runnable_with_outputs(
        model, [*(observer.name for observer in observers if not observer.pooled), *heard], pools
    ) as runnable:
        yield runnable


def open_observed_session(
    model: Model, observers: Iterable[Observer], threads: int | None, heard: Iterable[str] = ()
) -> Session:
    """A session for `observe`. The model may be dropped: the session has its own copy of all weights."""
    with export_observed_model(model, observers, heard) as runnable:
        return Session(runnable, name="the folded float model", threads=threads, at_once=CONCURRENT_BATCHES)


Float64 = NDArray[np.float64]

UNSEEN_FACTOR, TAIL_SHARE = 10.0, 0.125
"""For how many times as many images ranges hold; k as a share of the images."""

FEWEST_IMAGES, FEWEST_IN_TAIL = 24, 8
"""The fewest images that tell of a tail, and the least k: by 3 of 24 some channels out of thousands seem to have hardly
any, and such channels of EfficientNet-Lite0, scaled to fill their ranges, cost it 4 dB."""

LEAST_RANGE_SHARE = 0.1
"""Share of a tensor's mean range that a channel counts at least."""

PRIOR_SAMPLES = 8
"""Samples that the prior of a channel's variance, which its range gives, counts as."""


@dataclass(frozen=True, slots=True, eq=False)
class ChannelRanges:
    """Ranges and moments of every channel of a tensor, (C,) each.

    low, high: extremes on all images.
    lowest, highest: extremes to expect on other images; zero lies between them.
    floor: the least value to expect of a channel that always keeps away from zero.
    mean, spread: mean and variance; None where no columns were asked for.
    reach: the largest magnitude to expect, however small it is beside those of other channels; None where not known.
    """

    low: Float64
    high: Float64
    lowest: Float64
    highest: Float64
    floor: Float64
    mean: Float64 | None
    spread: Float64 | None
    reach: Float64 | None = None

    def lowered(self, shift: Float64) -> ChannelRanges:
        """The ranges of the channels after subtracting `shift`, (C,)."""
        highest = np.maximum(self.highest - shift, 0.0)
        mean = None if self.mean is None else self.mean - shift
        low, high, floor = self.low - shift, self.high - shift, self.floor - shift
        return replace(self, low=low, high=high, highest=highest, floor=floor, mean=mean)


class SeenChannels(Protocol):
    """What one image shows of the channels of a tensor: a ChannelView, or a Sketch of that image alone."""

    @property
    def lows(self) -> NDArray[np.float32]:
        """The least value of each channel, (C,)."""

    @property
    def highs(self) -> NDArray[np.float32]:
        """The largest value of each channel, (C,)."""

    @property
    def means(self) -> Float64:
        """The mean of each channel, (C,)."""

    @property
    def columns(self) -> NDArray[np.float32]:
        """All channels at a few places, (..., C); none where none were asked for."""


@dataclass(frozen=True, slots=True)
class ChannelView:
    """See SeenChannels: what a sketch has of channels, without what lets sketches add up, which takes far longer."""

    lows: NDArray[np.float32]
    highs: NDArray[np.float32]
    means: Float64
    columns: NDArray[np.float32]


def view_channels(
    session: Session, observers: Iterable[Observer], batches: Iterable[Mapping[str, NDArray[Any]]]
) -> Iterator[dict[str, ChannelView]]:
    """Yield what each image shows of the channels of the observed tensors, all of which want CHANNELS.

    Raises QconvError where a tensor holds NaN or infinity.
    """
    observers = list(observers)

    def take(picture: Mapping[str, NDArray[Any]]) -> dict[str, ChannelView]:
        return _view_channels(observers, picture)

    yield from _map_images(take, session, observers, batches)


@np.errstate(over="ignore", invalid="ignore")  # infinite values are refused
def _view_channels(observers: list[Observer], picture: Mapping[str, NDArray[Any]]) -> dict[str, ChannelView]:
    found = {}
    for observer in observers:
        view = observer.view([picture[name] for name in observer.outputs])
        columns = pick_columns(view.sample) if SketchContents.COLUMNS in observer.want else NO_COLUMNS
        means = view.sums.astype(np.float64) / max(view.count, 1)
        found[observer.name] = ChannelView(view.lows, view.highs, means, columns)
    # all tensors at once, as above; a mean tells of NaN that a maximum pool has swallowed
    numbers = [x for view in found.values() for x in (view.lows, view.highs, view.means)]
    if not np.isfinite(np.concatenate(numbers)).all():
        bad = next(index for index, x in enumerate(numbers) if not np.isfinite(x).all())
        raise _not_finite_error(observers[bad // 3].name)
    return found


def estimate_channel_ranges(pictures: Iterable[Mapping[str, SeenChannels]]) -> dict[str, ChannelRanges]:
    """Channel ranges by tensor, from what single images show. Leaves out tensors whose channels vary in number."""
    kept: dict[str, list[SeenChannels]] = {}
    for views in pictures:
        for name, view in views.items():
            kept.setdefault(name, []).append(view)
    return {name: _estimate_ranges(found) for name, found in kept.items() if len({s.lows.size for s in found}) == 1}


def _estimate_ranges(found: Sequence[SeenChannels]) -> ChannelRanges:
    lows, highs = (np.stack(ends).astype(np.float64) for ends in zip(*((s.lows, s.highs) for s in found), strict=True))
    low, high = lows.min(axis=0), highs.max(axis=0)
    lowest, highest, floor = -extrapolate_tail(-lows), extrapolate_tail(highs), high - extrapolate_tail(high - lows)
    reach = extrapolate_tail(np.maximum(highs, -lows), least_share=0.0)
    if not found[0].columns.size:
        return ChannelRanges(low, high, lowest, highest, floor, None, None, reach)
    columns = np.concatenate([s.columns.reshape(-1, low.size) for s in found]).astype(np.float64)
    width, spread = (highest - lowest) ** 2, columns.var(axis=0)
    by_range = width * (spread.mean() / max(width.mean(), np.finfo(np.float64).tiny))
    count = len(columns)
    spread = (count * spread + PRIOR_SAMPLES * by_range) / (count + PRIOR_SAMPLES)
    return ChannelRanges(low, high, lowest, highest, floor, np.mean([s.means for s in found], axis=0), spread, reach)


def extrapolate_tail(extremes: Float64, least_share: float = LEAST_RANGE_SHARE) -> Float64:
    """The reach of each channel on other images, (C,), zero or more.

    extremes: (P, C), the largest of each image. least_share: of the mean of all channels, that each reaches at least.
    """
    ordered = np.sort(np.maximum(extremes, 0.0), axis=0)[::-1]
    most = ordered[0].max(initial=0.0)
    if len(ordered) < FEWEST_IMAGES:
        return np.asarray(np.where(ordered[0] > 0, np.minimum(ordered[0] * UNSEEN_FACTOR, most), most))
    if most == 0:
        return np.full(ordered.shape[1], most)
    top = ordered[: max(FEWEST_IN_TAIL, int(TAIL_SHARE * len(ordered)))]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        index = np.log(top[:-1] / top[-1]).mean(axis=0)
        found = np.where(top[-1] > 0, ordered[0] * UNSEEN_FACTOR**index, most)
    return np.asarray(np.minimum(np.maximum(found, least_share * ordered[0].mean()), most))
