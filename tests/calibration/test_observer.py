"""What is seen of tensors while pictures pass. Oracle: NumPy over all pictures at once."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from qconv.calibration.observer import Observer, export_observed_model, observe
from qconv.calibration.sketch import Sketch, SketchBuilder, SketchContents
from qconv.errors import QconvError
from qconv.runtime.session import Session
from tests.support.models import loaded, network


def session(body: str, *outputs: str, **constants: tuple[int, ...] | float) -> Session:
    proto = network(body, x=("N", 3, 6, 6), outputs=outputs, **constants)
    return Session(proto.SerializeToString(), threads=1)


def batches(*sizes: int) -> list[dict[str, NDArray[np.float32]]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((size, 3, 6, 6)).astype(np.float32)} for size in sizes]


def same(one: Sketch, other: Sketch) -> bool:
    parts = ("lows", "highs", "count", "codes", "counts", "keys", "pictures", "column_keys", "columns")
    equal = all(np.array_equal(getattr(one, part), getattr(other, part)) for part in parts)
    return equal and np.array_equal(one.sums.limbs, other.sums.limbs)


def make_observers(*names: str) -> list[Observer]:
    return [Observer(name) for name in names]


def test_extremes_of_every_channel_over_all_batches() -> None:
    """Of the input, which is no output of the network, and of an inner tensor."""
    found = batches(2, 1, 4)
    runner = session("c = Conv(x, w)", "c", w=(5, 3, 3, 3))
    sketches = observe(runner, make_observers("x", "c"), found)
    x = np.concatenate([batch["x"] for batch in found])
    (c,) = runner.run(["c"], {"x": x})
    for name, numbers in (("x", x), ("c", c)):
        np.testing.assert_allclose(sketches[name].lows, numbers.min(axis=(0, 2, 3)), rtol=1e-5)
        np.testing.assert_allclose(sketches[name].highs, numbers.max(axis=(0, 2, 3)), rtol=1e-5)
        assert sketches[name].low == sketches[name].lows.min()
        assert sketches[name].high == sketches[name].highs.max()


def test_only_what_a_tap_asks_for_is_kept() -> None:
    """Of a whole tensor: its extremes. Of one that is never negative: zero for its low."""
    found = batches(2, 1)
    x = np.concatenate([batch["x"] for batch in found])
    runner = session("y = Relu(x)", "y")
    overall, relu = Observer("x", SketchContents.EXTREMES), Observer("y", never_negative=True)
    sketches = observe(runner, [overall, relu], found)
    assert (sketches["x"].low, sketches["x"].high) == (x.min(), x.max())
    assert sketches["x"].lows.shape == (1,)
    assert sketches["x"].count == 0
    assert sketches["y"].lows.tolist() == [0.0, 0.0, 0.0]
    assert sketches["y"].highs.tolist() == x.max(axis=(0, 2, 3)).tolist()


def test_every_picture_has_its_own_extremes() -> None:
    found = batches(2, 1, 3)
    x = np.concatenate([batch["x"] for batch in found]).reshape(6, -1)
    seen = observe(session("y = Relu(x)", "y"), [Observer("x")], found)["x"].pictures
    assert sorted(seen.tolist()) == sorted(np.stack([x.min(axis=1), x.max(axis=1)], axis=1).tolist())


def test_batches_and_order_do_not_matter() -> None:
    """Bit for bit, of everything that is remembered."""
    proto = network("c = Conv(x, w) r = Relu(c) y = MaxPool<kernel_shape=[2,2]>(r)", x=("N", 3, 6, 6), w=(5, 3, 3, 3))
    model = loaded(proto)
    pictures = [batch["x"] for batch in batches(*[1] * 16)]
    wanted = [
        Observer("x", SketchContents.ALL),
        Observer("c", SketchContents.ALL),
        Observer("r", SketchContents.ALL, never_negative=True, pooled=True, stride=2),
    ]

    def seen(size: int, order: NDArray[np.integer]) -> dict[str, Sketch]:
        feeds = [{"x": np.concatenate([pictures[i] for i in part])} for part in np.split(order, 16 // size)]
        with export_observed_model(model, wanted) as runnable:
            return observe(Session(runnable, threads=1), wanted, feeds)

    one = seen(1, np.arange(16))
    for size, order in ((8, np.arange(16)), (1, np.arange(16)[::-1]), (4, np.random.default_rng(1).permutation(16))):
        other = seen(size, order)
        assert all(same(one[name], other[name]) for name in ("x", "c", "r"))


def test_the_sample_is_a_part_of_the_elements() -> None:
    """All of a small tensor; every other pixel of one that the network samples."""
    found = batches(3)
    model = loaded(network("y = Relu(x)", x=("N", 3, 6, 6)))
    wanted = [
        Observer("x", SketchContents.BINS),
        Observer("y", SketchContents.BINS, never_negative=True, pooled=True, stride=2),
    ]
    with export_observed_model(model, wanted) as runnable:
        sketches = observe(Session(runnable, threads=1), wanted, found)
    assert sketches["x"].counts.sum() == 3 * 3 * 36
    assert sketches["y"].counts.sum() == 3 * 3 * 9
    kept = np.maximum(found[0]["x"], 0)[:, :, ::2, ::2]
    histogram = sketches["y"].histogram()
    assert histogram.counts[0] == (kept == 0).sum()


@pytest.mark.parametrize(
    ("shapes", "lows"),
    [
        ([(), ()], [0.0]),  # one number
        ([(4,), (2,)], [0.0]),  # no channels
        ([(2, 3), (1, 3)], [0.0, 1.0, 2.0]),
        ([(1, 3, 2), (1, 5, 2)], [0.0]),  # axis 1 grows with the picture
        ([(0, 4), (2, 4)], [0.0] * 4),  # nothing detected on the first picture: zero, which every range holds
        ([(0, 4), (0, 4)], [0.0] * 4),
        ([(1, 0, 5), (1, 0, 5)], [0.0]),
    ],
)
def test_tensors_of_all_shapes(shapes: list[tuple[int, ...]], lows: list[float]) -> None:
    """Counting up from 0 along each tensor, one a picture."""
    arrays = [np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for shape in shapes]
    sketcher = SketchBuilder(SketchContents.ALL)
    for key, x in enumerate(arrays):
        sketcher.add(Observer("x", SketchContents.ALL).view([x]), key)
    assert sketcher.sketch().lows.tolist() == lows
    assert sketcher.sketch().high == max((float(a.max()) for a in arrays if a.size), default=0.0)


def test_a_picture_without_rows_counts_in_no_mean() -> None:
    sketcher = SketchBuilder(SketchContents.ALL)
    for key, x in enumerate([np.float32([[1, 2], [3, 4]]), np.zeros((0, 2), np.float32), np.float32([[8, 0]])]):
        sketcher.add(Observer("x", SketchContents.ALL).view([x]), key)
    np.testing.assert_allclose(sketcher.sketch().means, [4, 2])
    assert sketcher.sketch().columns.shape[2] == 2


def test_rows_that_the_network_pools() -> None:
    """Patches (M, C, H, W), as many as the data select: extremes and means are over all of them. Oracle: NumPy."""
    patches = np.random.default_rng(0).uniform(0, 9, (5, 3, 4, 4)).astype(np.float32)
    observer = Observer("x", SketchContents.ALL, never_negative=True, pooled=True, stride=2)
    pooled = [reduce(patches, axis=(2, 3), keepdims=True) for reduce in (np.max, np.mean)]
    sketcher = SketchBuilder(SketchContents.ALL)
    sketcher.add(observer.view([*pooled, patches[:, :, ::2, ::2]]), 0)
    found = sketcher.sketch()
    np.testing.assert_array_equal(found.highs, patches.max(axis=(0, 2, 3)))
    np.testing.assert_allclose(found.means, patches.mean(axis=(0, 2, 3)), rtol=1e-6)


def test_means_of_every_channel() -> None:
    """Over all pictures, however they were batched."""
    found = batches(2, 3)
    runner = session("y = Relu(x)", "y")
    expected = np.maximum(np.concatenate([batch["x"] for batch in found]), 0).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(observe(runner, make_observers("y"), found)["y"].means, expected, rtol=1e-5)


def test_pools_in_the_network_give_the_same_statistics() -> None:
    """Maxima exactly, means to float rounding; the tensor itself is not returned."""
    proto = network("c = Conv(x, w) r = Relu(c) y = MaxPool<kernel_shape=[2,2]>(r)", x=("N", 3, 6, 6), w=(5, 3, 3, 3))
    model, found = loaded(proto), batches(2, 1, 4)
    results = []
    for pooled in (True, False):
        wanted = [Observer("r", never_negative=True, pooled=pooled)]
        with export_observed_model(model, wanted) as runnable:
            runner = Session(runnable, threads=1)
            assert ("r" in runner.outputs) is not pooled
            results.append(observe(runner, wanted, found)["r"])
    pools, whole = results
    assert pools.highs.tolist() == whole.highs.tolist()
    assert pools.lows.tolist() == [0.0] * 5
    np.testing.assert_allclose(pools.means, whole.means, rtol=1e-5)


def test_a_pool_lets_no_nan_through() -> None:
    """The maximum of NaN and a number may be the number."""
    model, wanted = loaded(network("y = Relu(x)", x=("N", 3, 6, 6))), [Observer("y", never_negative=True, pooled=True)]
    found = batches(2)
    found[0]["x"][0, 1, 2, 3] = np.nan
    with export_observed_model(model, wanted) as runnable, pytest.raises(QconvError, match="NaN or infinite"):
        observe(Session(runnable, threads=1), wanted, found)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_have_no_range_are_named(bad: float) -> None:
    found = batches(1, 1)
    found[0]["x"][0, 1, 2, 3] = bad
    with pytest.raises(QconvError, match="Tensor 'y' holds NaN or infinite values"):
        observe(session("y = Mul(x, k)", "y", k=2.0), make_observers("y"), found)
