"""What is remembered of one tensor. Oracle: NumPy over all numbers at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qconv.calibration.sketch import (
    MOST_COLUMNS,
    SAMPLED_ELEMENTS,
    Histogram,
    Sketch,
    SketchBuilder,
    SketchContents,
    TensorView,
    bin_edges,
    columns_per_image,
    make_histogram,
    sampling_stride,
)


def sketch(
    *pictures: NDArray[np.float32], want: SketchContents = SketchContents.ALL, keys: list[int] | None = None
) -> Sketch:
    """Pictures (C, X), each sampled whole."""
    gathered = SketchBuilder(want)
    for index, x in enumerate(pictures):
        key = index if keys is None else keys[index]
        gathered.add(TensorView(x.min(axis=1), x.max(axis=1), x.sum(axis=1), x.shape[1], x), key)
    return gathered.sketch()


def drawn(count: int, channels: int = 3, seed: int = 0) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((channels, 20)) * 3).astype(np.float32) for _ in range(count)]


def equal(one: Sketch, other: Sketch) -> bool:
    arrays = ("lows", "highs", "codes", "counts", "keys", "pictures", "column_keys", "columns")
    return (
        all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
        and np.array_equal(one.sums.limbs, other.sums.limbs)
        and one.count == other.count
    )


def test_extremes_means_and_pictures() -> None:
    pictures = drawn(5)
    found, x = sketch(*pictures), np.stack(pictures)
    assert found.lows.tolist() == x.min(axis=(0, 2)).tolist()
    assert found.highs.tolist() == x.max(axis=(0, 2)).tolist()
    assert (found.low, found.high) == (x.min(), x.max())
    np.testing.assert_allclose(found.means, x.mean(axis=(0, 2)), rtol=1e-5)
    assert found.pictures.tolist() == [[p.min(), p.max()] for p in pictures]


@given(st.floats(min_value=-(2.0**120), max_value=2.0**120, width=32))
def test_a_number_lies_in_its_bin(number: float) -> None:
    x = np.float32([number])
    low, high = bin_edges(sketch(x.reshape(1, 1)).codes)[:, 0]
    assert low <= x[0] <= high
    assert high - low <= max(abs(float(x[0])) / 128, 2.0**-133)


def test_bins_count_as_numpy_does() -> None:
    """What lies below the end of each bin."""
    x = np.concatenate([drawn(1, 1)[0].reshape(-1), np.float32([0, 0, 6, 6])])
    found = make_histogram(x)
    assert (np.diff(found.edges[0]) >= 0).all()
    assert (found.edges[0][1:] >= found.edges[1][:-1]).all()
    for right, below in zip(found.edges[1], np.cumsum(found.counts), strict=True):
        assert below in ((x < right).sum(), (x <= right).sum())


def test_joined_bins_hold_as_much() -> None:
    found = make_histogram(np.random.default_rng(0).laplace(size=5000).astype(np.float32))
    coarse = found.coarse(found.edges.max() / 64)
    assert coarse.counts.sum() == found.counts.sum()
    assert len(coarse.counts) < len(found.counts) / 3
    assert coarse.edges[0].min() == found.edges[0].min()
    assert (coarse.edges[0][1:] >= coarse.edges[1][:-1]).all()
    assert coarse.centres @ coarse.shares == pytest.approx(found.centres @ found.shares, abs=0.01)


def test_zero_keeps_a_bin_of_its_own() -> None:
    found = Histogram(np.float64([[-1e-3, 0, 0, 1e-3], [-1e-3, 0, 1e-30, 2e-3]]), np.array([1, 5, 2, 3])).coarse(1.0)
    assert 5 in found.counts


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_shards_add_up_to_the_whole(parts: int) -> None:
    """In any order; every part of the memory, bit for bit. More pictures than are worked in at once."""
    pictures = drawn(90)
    rng = np.random.default_rng(parts)
    keys = [int(k) for k in rng.integers(0, 2**63, size=90)]
    order = rng.permutation(90)
    shards = [
        sketch(*(pictures[i] for i in part), keys=[keys[i] for i in part]) for part in np.array_split(order, parts)
    ]
    total = shards[0]
    for shard in shards[1:]:
        total = shard.merge(total)
    assert equal(total, sketch(*pictures, keys=keys))


def test_columns_are_those_of_the_least_keys() -> None:
    pictures = drawn(MOST_COLUMNS + 20)
    keys = list(range(len(pictures)))[::-1]
    found = sketch(*pictures, keys=keys)
    assert found.column_keys.tolist() == list(range(MOST_COLUMNS))
    last = pictures[-1]  # of key 0; every column is one of its places, all channels side by side
    assert found.columns.shape == (MOST_COLUMNS, columns_per_image(3), 3)
    assert all(any(np.array_equal(column, last[:, at]) for at in range(20)) for column in found.columns[0])


def test_channels_that_change_with_the_picture_are_one() -> None:
    found = sketch(np.float32([[1, 2], [3, 4]]), np.float32([[5, 6]]), np.float32([[-1, 0], [7, 8]]))
    assert (found.lows.tolist(), found.highs.tolist()) == ([-1.0], [8.0])
    assert found.means.tolist() == [35 / 10]
    assert not found.columns.size


def test_what_nobody_wants_is_not_kept() -> None:
    found = sketch(*drawn(3), want=SketchContents.EXTREMES)
    assert (found.count, found.counts.size, found.columns.size) == (0, 0, 0)
    with pytest.raises(ValueError, match="no histogram"):
        found.histogram()


def test_memory_does_not_grow_with_the_pictures() -> None:
    """All but 24 bytes a picture. The histogram grows with what is new in them, up to a count for each bin."""

    def size(count: int) -> int:
        found = sketch(*drawn(100) * (count // 100), keys=list(range(count)))
        parts = (found.lows, found.highs, found.sums.limbs, found.codes, found.counts, found.column_keys, found.columns)
        return sum(part.nbytes for part in parts)

    assert size(400) == size(100)


@pytest.mark.parametrize(
    ("elements", "among"), [(100, 100), (96 * 112 * 112, 112 * 112), (10**6, 1), (3 * 224 * 224, 224)]
)
def test_strides_keep_about_the_sample_and_out_of_step(elements: int, among: int) -> None:
    stride = sampling_stride(elements, among)
    kept = -(-among // stride) * (elements // among)
    assert kept <= max(SAMPLED_ELEMENTS * 1.2, elements // among)
    assert stride == 1 or np.gcd(stride, among) == 1
