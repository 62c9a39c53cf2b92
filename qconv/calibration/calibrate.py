"""From pictures to sketches: the float network runs once, its tensors are watched picture by picture.

A picture's key, by which sketches put pictures in order, is a hash of the extremes of all tensors on it: it depends on
what the picture does in the network, not on its name, its place or the batch that it came in.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.sketch import NOTHING, Sketch, Sketcher, View, Want, stride_for, upper_halves
from qconv.errors import QconvError
from qconv.ir import subgraph
from qconv.ir.model import Model
from qconv.runtime.session import Session
from qconv.storage import prefetch

KEY_BYTES = 8
AT_ONCE = 2
"""Batches that the network looks at at the same time. More would take more memory and hardly less time."""

T = TypeVar("T")


@dataclass(frozen=True)
class Tap:
    """A tensor to watch. What nobody asks for is not computed: reductions cost as much as the network itself.

    want: what is to be remembered beyond the extremes. never_negative: whether the graph says so; then its low counts
    as zero unseen, as every range holds zero. pooled: whether the network itself takes maximum and mean of each
    channel, and every stride-th pixel as a sample; for (N, C, H, W) that are never negative.
    """

    name: str
    want: Want = Want.CHANNELS
    never_negative: bool = False
    pooled: bool = False
    stride: int = 1

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """What the network returns for it."""
        if not self.pooled:
            return (self.name,)
        return subgraph.pooled_output_names(self.name)[: 3 if self._samples else 2]

    @cached_property
    def _samples(self) -> bool:
        return bool(self.want & (Want.BINS | Want.COLUMNS))

    @cached_property
    def _sums(self) -> bool:
        return Want.CHANNELS in self.want

    @cached_property
    def _by_channel(self) -> bool:
        return bool(self.want & (Want.CHANNELS | Want.COLUMNS))

    @property
    def pooling(self) -> subgraph.ChannelPooling | None:
        """What the network is to compute for it."""
        return subgraph.ChannelPooling(self.name, self.stride if self._samples else None) if self.pooled else None

    def view(self, seen: list[NDArray[Any]]) -> View:
        """What a sketch needs of one picture's outputs, (1, ...) each."""
        if self.pooled:
            highs, means, *sample = (array.reshape(array.shape[1], -1) for array in seen)
            return View(np.zeros_like(highs[:, 0]), highs[:, 0].copy(), means[:, 0].copy(), 1, *(sample or [NOTHING]))
        return self._view_of_all(seen[0])

    def _view_of_all(self, x: NDArray[Any]) -> View:
        """Of the whole tensor. One without elements counts as one zero; one of rank 0 or 1 as one channel."""
        if not x.size:
            x = np.zeros((1, 1), np.float32)
        by_channel = x.ndim > 1 and self._by_channel
        rows = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1) if by_channel else x.reshape(1, -1)
        highs = rows.max(axis=1)
        lows = np.zeros_like(highs) if self.never_negative else rows.min(axis=1)
        # einsum adds up twice as fast as sum, at 1e-5 of relative error
        sums = np.einsum("cx->c", rows) if self._sums else NOTHING.reshape(-1)
        sample = rows[:, :: stride_for(rows.size, rows.shape[1])] if self._samples else NOTHING
        return View(_float32(lows), _float32(highs), _float32(sums), rows.shape[1], sample)


def _float32(x: NDArray[Any]) -> NDArray[np.float32]:
    return x.astype(np.float32, copy=False)


def watch(session: Session, taps: Iterable[Tap], batches: Iterable[Mapping[str, NDArray[Any]]]) -> dict[str, Sketch]:
    """Run every batch once and sketch the tapped tensors, by their names.

    Raises QconvError where a tensor holds NaN or infinity: no range would be right.
    """
    taps = list(taps)
    sketchers, turn = _sketchers(taps), threading.Lock()

    def take(picture: Mapping[str, NDArray[Any]]) -> None:
        seen = _seen(taps, picture)
        with turn:
            seen.work_into(sketchers)

    for _ in _each(take, session, taps, batches):
        pass
    return _sketches(sketchers)


def watch_apart(
    session: Session, taps: Iterable[Tap], batches: Iterable[Mapping[str, NDArray[Any]]]
) -> Iterator[dict[str, Sketch]]:
    """Like `watch`, but every picture has sketches of its own. Added up they are those that `watch` gives."""
    taps = list(taps)

    def take(picture: Mapping[str, NDArray[Any]]) -> dict[str, Sketch]:
        sketchers = _sketchers(taps)
        _seen(taps, picture).work_into(sketchers)
        return _sketches(sketchers)

    yield from _each(take, session, taps, batches)


def _each(
    take: Callable[[Mapping[str, NDArray[Any]]], T],
    session: Session,
    taps: list[Tap],
    batches: Iterable[Mapping[str, NDArray[Any]]],
) -> Iterator[T]:
    """take(what the network returns, by name) for every picture, in order.

    As many batches at once as the session is for, each in a thread of its own: a runtime whose threads wait for each
    other at every node, and then for Python to take what they found, takes half as long again.
    """
    inputs = {name for name, _, _ in session.inputs}
    outputs = [name for tap in taps if tap.name not in inputs for name in tap.outputs]

    def run(batch: Mapping[str, NDArray[Any]]) -> list[T]:
        seen = {**batch, **dict(zip(outputs, session.run_into_buffers(outputs, batch), strict=True))}
        return [take(picture) for picture in _apart(seen, len(next(iter(batch.values()))))]

    with contextlib.closing(prefetch(run, batches, workers=session.at_once, depth=session.at_once + 1)) as found:
        for taken in found:
            yield from taken.result()


def _sketchers(taps: list[Tap]) -> dict[str, Sketcher]:
    return {tap.name: Sketcher(tap.want) for tap in taps}


def _sketches(sketchers: Mapping[str, Sketcher]) -> dict[str, Sketch]:
    return {name: _sketch(sketcher, name) for name, sketcher in sketchers.items()}


@dataclass(frozen=True, slots=True)
class _Seen:
    """All tensors on one picture."""

    key: int
    views: dict[str, View]
    halves: dict[str, NDArray[np.uint16]]

    def work_into(self, sketchers: Mapping[str, Sketcher]) -> None:
        for name, view in self.views.items():
            sketchers[name].add(view, self.key, self.halves[name])


@np.errstate(over="ignore", invalid="ignore")  # infinite values are refused
def _seen(taps: list[Tap], picture: Mapping[str, NDArray[Any]]) -> _Seen:
    views = {tap.name: tap.view([picture[name] for name in tap.outputs]) for tap in taps}
    # all tensors at once: a call for each of them would take longer than what it computes
    lows, highs = (np.concatenate(e) for e in zip(*((v.lows, v.highs) for v in views.values()), strict=True))
    starts = np.cumsum([0, *(len(view.lows) for view in views.values())])[:-1]
    extremes = np.stack([np.minimum.reduceat(lows, starts), np.maximum.reduceat(highs, starts)], axis=1)
    finite = np.isfinite(extremes)
    if not finite.all():
        raise _not_finite(taps[int(np.argmin(finite)) // 2].name)
    key = int.from_bytes(hashlib.blake2b(extremes.tobytes(), digest_size=KEY_BYTES).digest())
    halves = upper_halves(np.concatenate([view.sample.reshape(-1) for view in views.values()]))
    ends = np.cumsum([view.sample.size for view in views.values()])[:-1]
    return _Seen(key, views, dict(zip(views, np.split(halves, ends), strict=True)))


def _apart(seen: Mapping[str, NDArray[Any]], count: int) -> Iterator[Mapping[str, NDArray[Any]]]:
    """One picture after the other. What does not have one part for each picture counts whole with each."""
    if count == 1:
        yield seen
        return
    parts = {name: _parts(array, count) for name, array in seen.items()}
    for index in range(count):
        yield {name: found[index] for name, found in parts.items()}


def _parts(array: NDArray[Any], count: int) -> list[NDArray[Any]]:
    if not array.ndim or len(array) % count:
        return [array] * count
    return np.split(array, count)


def _sketch(sketcher: Sketcher, name: str) -> Sketch:
    try:
        return sketcher.sketch()
    except ValueError:  # a maximum pool may swallow NaN, a mean cannot
        raise _not_finite(name) from None


def _not_finite(name: str) -> QconvError:
    return QconvError(
        f"Tensor {name!r} holds NaN or infinite values on these pictures.",
        "check the preprocessing options, the float model on one picture, and its weights.",
    )


@contextlib.contextmanager
def tapped(model: Model, taps: Iterable[Tap]) -> Iterator[str | bytes]:
    """The model as ONNX Runtime takes it, which returns what `watch` wants to see."""
    taps = list(taps)
    pools = [tap.pooling for tap in taps if tap.pooling is not None]
    with subgraph.runnable_with_outputs(model, [tap.name for tap in taps if not tap.pooled], pools) as runnable:
        yield runnable


def observer(model: Model, taps: Iterable[Tap], threads: int | None) -> Session:
    """The network in a session for `watch`. The model may be dropped: the session has its own copy of all weights."""
    with tapped(model, taps) as runnable:
        return Session(runnable, name="the folded float model", threads=threads, at_once=AT_ONCE)
