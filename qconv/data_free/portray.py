"""From what is told of a tensor (told.py) to what a sketch would have remembered of it, so that all calibrators work.

Every channel takes the values of a cut-off normal variable at as many equally probable places, in an order of its own,
and reaches FARTHEST deviations away from its mean. Nothing is drawn by chance but the orders, by the tensor's name.
"""

from __future__ import annotations

import zlib

import numpy as np

from qconv.calibration.observer import ChannelRanges
from qconv.calibration.sketch import MOST_COLUMNS, ExactSum, Sketch, columns_per_image, count_bins
from qconv.data_free.told import reach
from qconv.ir.channel_stats import ChannelDistribution, normal_quantiles
from qconv.ir.model import Value, clip_bounds

SAMPLES = 2**18
FEWEST, MOST = 64, 4096
"""Values of each channel in the histogram."""
BINDING = 3.0
"""Deviations that a bound must be away to be out of a channel's reach."""
ABSORBED = 3.0
"""Deviations below the mean that values are taken never to reach where a channel is lowered, as in DFQ."""


def sketched(name: str, found: ChannelDistribution) -> Sketch:
    """The sketch of a tensor of this name."""
    channels = found.mean.size
    low, high = (end.astype(np.float32) for end in reach(found))
    sums = ExactSum.zeros(channels)
    sums.add(found.mean.astype(np.float32)[None])
    values = found.at(normal_quantiles(min(max(FEWEST, SAMPLES // channels), MOST))).astype(np.float32)
    count = MOST_COLUMNS * columns_per_image(channels)
    order = np.random.default_rng(zlib.crc32(name.encode())).permuted(
        np.broadcast_to(normal_quantiles(count)[:, None], (count, channels)), axis=0
    )
    columns = found.at(order).astype(np.float32).reshape(MOST_COLUMNS, columns_per_image(channels), channels)
    keys = np.arange(MOST_COLUMNS, dtype=np.uint64)
    ends = np.array([[low.min(), high.max()]], np.float32)
    return Sketch(low, high, sums, 1, *count_bins(values), keys[:1], ends, keys, columns)


def channels_of(found: ChannelDistribution, value: Value) -> ChannelRanges:
    """The same for whoever scales channels. Behind a Clip low and high are those that it leaves next to nothing of."""
    assert found.std is not None
    low, high = reach(found)
    lowest, highest, floor = np.minimum(low, 0.0), np.maximum(high, 0.0), found.at(np.array([-ABSORBED]))[0]
    node = value.producer()
    if node is not None and clip_bounds(node) is not None:
        mean, std = found.origin
        low, high = mean - BINDING * std, mean + BINDING * std
    return ChannelRanges(low, high, lowest, highest, floor, found.mean, found.std**2)
