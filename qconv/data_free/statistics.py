"""Makes calibration statistics without images: sketches and channel ranges from propagated BatchNorm statistics.

Every channel takes the values of a clipped normal variable at equally probable places, in an order of its own, and
reaches REACH_DEVIATIONS deviations away from its mean. Nothing is random but the orders, which follow from the
tensor's name. Tensors without such statistics are observed on generated images where the user asked for that; else
they are an error.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

import numpy as np
from numpy.typing import NDArray

from qconv.calibration.observer import (
    ChannelRanges,
    Observer,
    estimate_channel_ranges,
    observe,
    open_observed_session,
    view_channels,
)
from qconv.calibration.sketch import MOST_COLUMNS, ExactSum, Sketch, columns_per_image, count_bins
from qconv.config.choices import NO_IMAGES
from qconv.config.data_options import Preprocessing
from qconv.data.loader import Batch
from qconv.data_free.dead_leaves import (
    IMAGE_COUNT,
    GeneratedImageLoader,
    network_input_distribution,
)
from qconv.data_free.propagation import MOST_GUESSED_IN_A_ROW, channel_bounds, propagate_stats
from qconv.errors import Change, QconvError, format_count, format_some
from qconv.ir.channel_stats import ChannelDistribution, normal_quantiles
from qconv.ir.files import Source
from qconv.ir.layers import INPUTS_FIRST, input_means_of, read_layer, set_input_means
from qconv.ir.model import Model, Value, clip_bounds
from qconv.ir.operators import operator
from qconv.ir.rewriting import EditRefused, standard_op_type
from qconv.ir.rewriting import data_input as read_from

SAMPLES_PER_TENSOR = 2**18

FEWEST_PER_CHANNEL, MOST_PER_CHANNEL = 64, 4096
"""The number of values that each channel adds to the histogram."""

BINDING_DEVIATIONS = 3.0
"""Distance in deviations at which a bound is out of a channel's reach."""

ABSORBED_DEVIATIONS = 3.0
"""Deviations below the mean that bias absorption takes for the least value, as DFQ does."""


def sketch_distribution(name: str, found: ChannelDistribution) -> Sketch:
    """The sketch of a tensor with this distribution. name: seeds the order of values."""
    channels = found.mean.size
    low, high = (end.astype(np.float32) for end in channel_bounds(found))
    sums = ExactSum.zeros(channels)
    sums.add(found.mean.astype(np.float32)[None])
    values = found.at(
        normal_quantiles(min(max(FEWEST_PER_CHANNEL, SAMPLES_PER_TENSOR // channels), MOST_PER_CHANNEL))
    ).astype(np.float32)
    count = MOST_COLUMNS * columns_per_image(channels)
    order = np.random.default_rng(zlib.crc32(name.encode())).permuted(
        np.broadcast_to(normal_quantiles(count)[:, None], (count, channels)), axis=0
    )
    columns = found.at(order).astype(np.float32).reshape(MOST_COLUMNS, columns_per_image(channels), channels)
    keys = np.arange(MOST_COLUMNS, dtype=np.uint64)
    ends = np.array([[low.min(), high.max()]], np.float32)
    return Sketch(low, high, sums, 1, *count_bins(values), keys[:1], ends, keys, columns)


def ranges_of_distribution(found: ChannelDistribution, value: Value) -> ChannelRanges:
    """The channel ranges of a tensor with this distribution. Behind a Clip, low and high are those before it."""
    assert found.std is not None
    low, high = channel_bounds(found)
    lowest, highest, floor = np.minimum(low, 0.0), np.maximum(high, 0.0), found.at(np.array([-ABSORBED_DEVIATIONS]))[0]
    node = value.producer()
    if node is not None and clip_bounds(node) is not None:
        mean, std = found.origin
        low, high = mean - BINDING_DEVIATIONS * std, mean + BINDING_DEVIATIONS * std
    return ChannelRanges(low, high, lowest, highest, floor, found.mean, found.std**2)


FINDING_STEP = "told"

WIDENING_FACTORS = {"random": 2.0, "synthesized": 1.0}
"""Factor on ranges observed on generated images, by --fallback. Random ones show no objects; synthesized ones bring
BatchNormalizations to the statistics of training."""


"""Tensors that an error names at most."""


Synthesizer = Callable[[Preprocessing, int | None, int], NDArray[np.uint8]]
"""Makes at least so many images (N, H, W, C) for a network with this preprocessing and, where it is fixed, batch size.

It is passed in, as it needs PyTorch, which only `qconv.training` imports.
"""


@dataclass(slots=True)
class DataFreeStatistics:
    """The source of statistics in place of images.

    source: the user's file.
    imagined: the generated images.
    fallback: which images to observe tensors without propagated statistics on; None for none.
    synthesize: called where `fallback` is "synthesized" and such a tensor exists.
    findings: where the statistics of the last call come from, tensor by tensor.
    """

    source: Source
    imagined: GeneratedImageLoader
    fallback: str | None
    threads: int | None
    synthesize: Synthesizer
    findings: list[Change] = field(default_factory=list)
    _synthesized: NDArray[np.uint8] | None = None

    def known(self, model: Model) -> dict[Value, ChannelDistribution | str]:
        """The distribution of every tensor of a folded model, or why it is not known."""
        return propagate_stats(
            model, {value: _distribution_of_input(value, self.imagined) for value in model.graph.inputs}
        )

    def pictures(self, stage: str) -> Iterable[Batch]:
        """The batches to observe tensors without propagated statistics on. stage: for progress.

        Raises QconvError where pictures cannot be synthesized.
        """
        if self.fallback != "synthesized":
            return self.imagined.iter_batches(stage)
        if self._synthesized is None:
            fed = self.imagined.fed
            assert fed is not None
            self._synthesized = self.synthesize(fed, self.imagined.inputs[0].shape[0], IMAGE_COUNT)
        return self.imagined.these(self._synthesized)

    def sketches(self, model: Model, observers: Sequence[Observer]) -> dict[str, Sketch]:
        """The sketches of these tensors. Raises QconvError where some have no statistics and there is no fallback."""
        known_of = self.known(model)
        _set_missing_means(model, known_of)
        found = {value.name or "": known for value, known in known_of.items()}
        missing = self._missing(observers, found)
        seen = {}
        if missing:
            seen = observe(open_observed_session(model, missing, self.threads), missing, self.pictures("calibrate"))
            ends = {value.name or "": _hard_bounds(value) for value in known_of}
            wider = WIDENING_FACTORS[self.fallback or "random"]
            seen = {name: _widen_sketch(sketch, wider, *ends[name]) for name, sketch in seen.items()}
        self.findings = []
        for observer in observers:
            known = found.get(observer.name, "")
            if isinstance(known, ChannelDistribution):
                seen[observer.name] = sketch_distribution(observer.name, known)
            self._tell(observer.name, known)
        return seen

    def channels(self, model: Model, observers: Sequence[Observer]) -> dict[str, ChannelRanges]:
        """The channel ranges of these tensors; leaves out tensors without statistics where there is no fallback."""
        known = self.known(model)
        by_name = {value.name or "": found for value, found in known.items()}
        told_of = {
            value.name or "": ranges_of_distribution(f, value)
            for value, f in known.items()
            if isinstance(f, ChannelDistribution)
        }
        missing = (
            [observer for observer in observers if not isinstance(by_name.get(observer.name), ChannelDistribution)]
            if self.fallback
            else []
        )
        if missing:
            seen = view_channels(
                open_observed_session(model, missing, self.threads), missing, self.pictures("equalize")
            )
            told_of |= estimate_channel_ranges(seen)
        wanted = {observer.name for observer in observers}
        return {name: found for name, found in told_of.items() if name in wanted}

    def _missing(self, observers: Sequence[Observer], found: dict[str, ChannelDistribution | str]) -> list[Observer]:
        missing = [observer for observer in observers if not isinstance(found.get(observer.name), ChannelDistribution)]
        if missing and self.fallback is None:
            shown = format_some([repr(observer.name) for observer in missing])
            why = found.get(missing[0].name)
            told_of = f"{format_count(len(missing), 'tensor')} of {len(observers)} that need a range: {shown}"
            raise QconvError(
                f"{self.source.name} says nothing of {told_of} ({why or 'nothing leads there'}).",
                f"--calib {NO_IMAGES} lives on BatchNormalizations: export the model before they are folded, pass "
                "pictures, or pass --fallback random, or synthesized, to watch made-up ones.",
            )
        return missing

    def _tell(self, tensor: str, known: ChannelDistribution | str | None) -> None:
        why = ""
        if not isinstance(known, ChannelDistribution):
            kind_of, why = f"ranges by {self.fallback} pictures", f": {known or 'nothing tells of it'}"
        elif known.guesses > MOST_GUESSED_IN_A_ROW:
            kind_of = "range by what pixels can be"
        elif known.guesses:
            kind_of, why = "ranges guessed by weights", ": no BatchNormalization follows the layer in front"
        else:
            kind_of = "ranges by what BatchNormalization says"
        self.findings.append(Change(FINDING_STEP, tensor, f"{kind_of.replace('ranges', 'range')}{why}", kind_of))


def _hard_bounds(value: Value) -> tuple[float, float]:
    """The bounds that no value of a tensor exceeds, on any image."""
    node = value.producer()
    bounds = None if node is None else operator(standard_op_type(node)).output_range or clip_bounds(node)
    return bounds or (-inf, inf)


def _widen_sketch(sketch: Sketch, times: float, least: float, most: float) -> Sketch:
    """Widen the extremes of a sketch made on generated images, within bounds."""
    lows, highs = (np.clip(times * ends, least, most).astype(np.float32) for ends in (sketch.lows, sketch.highs))
    return replace(sketch, lows=np.minimum(lows, sketch.lows), highs=np.maximum(highs, sketch.highs))


def _set_missing_means(model: Model, known: Mapping[Value, ChannelDistribution | str]) -> None:
    """Note the input means of layers that `set_batchnorm_means` has left without, from the distributions."""
    for node in model.nodes():
        found = known.get(read_from(node), "") if standard_op_type(node) in INPUTS_FIRST else ""
        try:
            fits = isinstance(found, ChannelDistribution) and found.mean.size == read_layer(node).inputs
        except EditRefused:
            continue
        sure = isinstance(found, ChannelDistribution) and not found.guesses  # pixels may be of anything
        if (
            isinstance(found, ChannelDistribution)
            and fits
            and sure
            and standard_op_type(node) != "MatMul"
            and isinstance(input_means_of(node), str)
        ):
            set_input_means(node, found.mean)


def _distribution_of_input(value: Value, imagined: GeneratedImageLoader) -> ChannelDistribution:
    """The distribution of an input of the network."""
    prep = imagined.preprocessing
    assert prep is not None
    return replace(network_input_distribution(prep), guesses=MOST_GUESSED_IN_A_ROW + 1)
