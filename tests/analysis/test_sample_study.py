"""How many pictures are enough. Oracles: `quantize`, ONNX Runtime and numpy; sums of sketches; hand-made curves."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from qconv.analysis import sample_study
from qconv.analysis.sample_study import StudyRequest, study_samples
from qconv.calibration.observer import Observer, export_observed_model, observe, observe_each_image
from qconv.calibration.sketch import Sketch, SketchContents
from qconv.calibration.statistics_file import open_sketch_spool, sketch_to_arrays
from qconv.config.data_options import DataOptions, Layout, Preprocessing, PreprocessingOptions
from qconv.config.recipe import Recipe, make_request
from qconv.data.images import load_pixels
from qconv.errors import QconvError
from qconv.pipeline import quantize
from qconv.results.sample_curve import CurvePoint, SampleCurve, counts_up_to
from qconv.results.scores import AGREEMENT, SQNR
from qconv.runtime.session import Session
from tests.support.models import loaded, network
from tests.support.scores import scores

BODY = "c = Conv(x, w)  r = Relu(c)  p = GlobalAveragePool(r)  f = Flatten(p)  y = Gemm(f, g)"
RAW = PreprocessingOptions(preset="raw")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(network(BODY, ("N", 3, 8, 8), w=(4, 3, 3, 3), g=(4, 10)).SerializeToString())
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """15 pictures of random pixels, brighter ones among darker ones."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(15):
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 20 + 16 * number, (8, 8, 3), np.uint8)).save(folder / f"{number:02}.png")
    return folder


def request(pictures: Path, **more: object) -> tuple[Recipe, DataOptions]:
    known = {"calib": (str(pictures),), "preprocessing": RAW, "threads": 1, "rounding": "nearest"}
    return make_request({**known, **more})


def rows(paths: list[Path]) -> np.ndarray:
    """Raw pixels, (N, 3, 8, 8)."""
    return np.stack([np.asarray(Image.open(path), np.float32).transpose(2, 0, 1) for path in paths])


@pytest.mark.parametrize("calibrator", ["minmax", "mean-extremes", "mse", "output-mse"])
def test_points_of_the_first_draw_are_what_quantize_makes(
    model: Path, pictures: Path, tmp_path: Path, calibrator: str
) -> None:
    """Scored anew with ONNX Runtime and numpy, on the pictures that come after all others in the draw."""
    curve = study_samples(model, *request(pictures, calibrator=calibrator), StudyRequest(draws=2, holdout=4))
    draw = np.random.default_rng(0).permutation(15)
    files = sorted(pictures.iterdir())
    x = rows([files[index] for index in draw[11:]])
    expected = ort.InferenceSession(str(model)).run(None, {"x": x})[0].astype(np.float64)
    assert curve.counts == [1, 2, 5, 10, 11]
    for point in (point for point in curve.points if point.seed == 0):
        out = tmp_path / "q.onnx"
        plain = {"calibrator": calibrator, "equalize": False, "tune_ranges": False}
        quantize.quantize(str(model), out, *request(pictures, samples=point.pictures, **plain))
        got = ort.InferenceSession(str(out)).run(None, {"x": x})[0].astype(np.float64)
        sqnr = 10 * math.log10((expected**2).sum() / ((expected - got) ** 2).sum())
        assert point.value_of(SQNR) == pytest.approx(sqnr, rel=1e-9)
        assert point.value_of(AGREEMENT) == (expected.argmax(1) == got.argmax(1)).mean()


def test_every_draw_but_of_all_pictures(model: Path, pictures: Path) -> None:
    curve = study_samples(model, *request(pictures), StudyRequest(draws=3, holdout=4))
    assert Counter(point.pictures for point in curve.points) == {1: 3, 2: 3, 5: 3, 10: 3, 11: 1}
    assert (curve.pictures, curve.scored, curve.draws) == (11, 4, 3)
    assert sorted(curve.seconds.values()) == list(curve.seconds.values())


def test_a_larger_set_holds_the_smaller_ones() -> None:
    """Draws differ, and each is a permutation; the first is the order of reading."""
    orders = [sample_study._order_images(20, 7, draw) for draw in range(4)]
    assert orders[0] == list(range(20))
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_sketches_grow_by_the_new_pictures_only() -> None:
    """Every picture of a draw is taken from the shelf once; the sum is that of the pictures so far."""
    taken: list[int] = []

    class Counting:
        def get(self, index: int) -> dict[str, Sketch]:
            taken.append(index)
            return {"x": sketches[index]}

    sketches = [found["x"] for found in apart(6)]
    grown = dict(sample_study._accumulate_sketches(Counting(), [3, 1, 5, 0, 2, 4], [1, 2, 5]))  # type: ignore[arg-type]
    assert taken == [3, 1, 5, 0, 2]
    for count, found in grown.items():
        assert sorted(found["x"].keys) == sorted(sketches[index].keys[0] for index in taken[:count])


def apart(count: int) -> list[dict[str, Sketch]]:
    """Sketches of as many random pictures, each by itself, of the input and of a tensor that the network pools."""
    proto = network("c = Conv(x, w) r = Relu(c) y = MaxPool<kernel_shape=[2,2]>(r)", ("N", 3, 6, 6), w=(5, 3, 3, 3))
    observers = [Observer("x", SketchContents.ALL), Observer("r", SketchContents.ALL, never_negative=True, pooled=True)]
    rng = np.random.default_rng(0)
    batches = [{"x": rng.standard_normal((1, 3, 6, 6)).astype(np.float32)} for _ in range(count)]
    with export_observed_model(loaded(proto), observers) as runnable:
        session = Session(runnable, threads=1)
    found = list(observe_each_image(session, observers, batches))
    together = observe(session, observers, batches)
    for name, whole in together.items():
        total = found[0][name]
        for other in found[1:]:
            total = total.merge(other[name])
        require_equal(total, whole)
    return found


def require_equal(one: Sketch, other: Sketch) -> None:
    for left, right in zip(sketch_to_arrays(one).values(), sketch_to_arrays(other).values(), strict=True):
        np.testing.assert_array_equal(left, right)


def test_sketches_of_single_pictures_add_up_to_those_of_all() -> None:
    assert len(apart(5)) == 5


def test_the_shelf_gives_back_what_was_put() -> None:
    """In any order, bit for bit."""
    found = apart(4)
    with open_sketch_spool() as kept:
        for sketches in found:
            kept.put(sketches)
        assert len(kept) == 4
        for index in (2, 0, 3, 1):
            back = kept.get(index)
            assert list(back) == list(found[index])
            for name, sketch in back.items():
                require_equal(sketch, found[index][name])


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(QconvError, match=r"temporary files, .* is full"), open_sketch_spool():
        pass


def test_every_picture_is_decoded_once(model: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To calibrate with, or to score on; never both, whatever the number of points.

    How the network is fed is found out before, on pixels as they are.
    """
    seen: Counter[str] = Counter()
    decode = load_pixels

    def counting(path: Path, prep: Preprocessing) -> object:
        seen[path.name] += prep.layout is Layout.NCHW
        return decode(path, prep)

    monkeypatch.setattr("qconv.data.batches.load_pixels", counting)
    study_samples(model, *request(pictures), StudyRequest(draws=3))
    assert dict(seen) == {f"{number:02}.png": 1 for number in range(15)}


def test_the_float_network_runs_once_a_picture(model: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: Counter[str] = Counter()
    for name in ("run", "run_into_buffers"):
        real = getattr(Session, name)

        def counting(self: Session, outputs: object, feeds: object, real: object = real) -> object:
            runs[self.name] += 1
            return real(self, outputs, feeds)  # type: ignore[operator]

        monkeypatch.setattr(Session, name, counting)
    curve = study_samples(model, *request(pictures), StudyRequest(draws=2, holdout=3))
    assert runs[str(model)] == 3
    assert runs["the folded float model"] - 1 == 12  # the first finds out the sizes of the buffers through `run`
    assert runs["the quantized model"] == 3 * len(curve.points)


def test_samples_bound_the_pictures_to_calibrate_with(model: Path, pictures: Path) -> None:
    curve = study_samples(model, *request(pictures, samples=6), StudyRequest(draws=1))
    assert (curve.counts, curve.scored) == ([1, 2, 5, 6], 3)


def test_pictures_to_score_on_from_another_folder(model: Path, pictures: Path, tmp_path: Path) -> None:
    """None is held back then; the result is that of holding back the same ones."""
    other = tmp_path / "other"
    other.mkdir()
    draw, files = np.random.default_rng(0).permutation(15), sorted(pictures.iterdir())
    for index in draw[11:]:
        files[index].rename(other / files[index].name)
    (other / "list.txt").write_text("\n".join(files[index].name for index in draw[:11]))
    curve = study_samples(model, *request(pictures), StudyRequest(draws=1, images=(str(other),)))
    assert (curve.pictures, curve.scored, curve.scored_on) == (11, 4, (str(other),))


def test_few_large_pictures_are_kept(model: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture takes 808 bytes: 8x8x3 pixels and ten scores as float32. Two reach the bound."""
    monkeypatch.setattr(sample_study, "SCORED_BYTES", 1600)
    curve = study_samples(model, *request(pictures), StudyRequest(draws=1, holdout=5))
    assert curve.scored == 2
    assert any("scored on 2 of 5 pictures" in text for text in curve.warnings)


def test_ready_made_samples(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    for number in range(6):
        np.save(folder / f"{number}.npy", np.random.default_rng(number).standard_normal((3, 8, 8)).astype(np.float32))
    curve = study_samples(model, Recipe(), DataOptions((str(folder),)), StudyRequest(draws=1))
    assert curve.preprocessing is None
    assert curve.counts == [1, 2, 5]


@pytest.mark.parametrize(
    ("study", "keep", "options", "message"),
    [
        (StudyRequest(), 1, {}, "holds 1 picture: one to calibrate with and one to score on"),
        (StudyRequest(holdout=15), 15, {}, "--holdout 15 leaves none of the 15 pictures"),
        (StudyRequest(), 15, {"activation_bits": 32}, "Nothing depends on the number of pictures"),
        (StudyRequest(), 15, {"keep_float_op": ("Conv", "Gemm")}, "nothing to quantize"),
        (StudyRequest(), 15, {"bias_correction": "sequential"}, "is not possible in a study"),
    ],
)
def test_what_cannot_be_studied(
    model: Path, pictures: Path, study: StudyRequest, keep: int, options: dict[str, object], message: str
) -> None:
    for path in sorted(pictures.iterdir())[keep:]:
        path.unlink()
    with pytest.raises(QconvError, match=message):
        study_samples(model, *request(pictures, **options), study)


# -- reading the curve -------------------------------------------------------------------------------------------------


def curve(*points: tuple[int, float | None, float | None], scored: int = 100) -> SampleCurve:
    """Of (pictures, dB, agreement); draws are numbered as they come."""
    seen: Counter[int] = Counter()
    found = []
    for count, sqnr, agreement in points:
        found.append(CurvePoint(count, seen[count], scores(sqnr, agreement)))
        seen[count] += 1
    seconds = {count: 0.1 * count for count, _, _ in points}
    return SampleCurve(
        "1", "model.onnx", {"calibrator": "minmax"}, None, found, max(seen.values()), scored, (), seconds
    )


def test_counts() -> None:
    assert counts_up_to(1) == [1]
    assert counts_up_to(10) == [1, 2, 5, 10]
    assert counts_up_to(128) == [1, 2, 5, 10, 20, 50, 100, 128]
    assert counts_up_to(1000) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


def decibels(*values: tuple[int, float]) -> SampleCurve:
    return curve(*((count, value, 1.0) for count, value in values))


@pytest.mark.parametrize(
    ("found", "enough"),
    [
        (decibels((1, 20), (2, 29.6), (2, 30), (5, 30), (10, 30)), 2),
        (decibels((1, 20), (2, 29.4), (2, 30), (5, 30), (10, 30)), 5),  # the worst draw of two is 0.6 dB below
        (decibels((1, 20), (2, 30), (5, 29), (5, 29), (20, 30)), None),  # it falls again
        (decibels((1, 20), (2, 30), (5, 29), (5, 31), (20, 30)), 2),  # one draw is no fall
        (decibels((1, 20), (2, 30), (8, 30), (8, 30), (8, 30), (10, 31)), 2),  # all of them were lucky
        (decibels((5, 20), (8, 30), (10, 30)), None),  # eight of ten are nearly all
        (decibels((1, 30)), None),
        (curve((1, None, 0.8), (2, None, 0.9), (5, None, 0.9), (10, None, 0.9)), 2),  # classes alone: +- 0.03
        (curve((1, 20, 1.0), (2, None, 1.0), (5, None, 1.0)), 2),  # no noise at all is the best
        (curve((1, None, None), (5, None, None)), None),
    ],
)
def test_enough(found: SampleCurve, enough: int | None) -> None:
    assert found.enough == enough


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (decibels((1, 20), (2, 30), (5, 30)), "2 pictures are enough here: the worst draw is at most 0.5 dB below"),
        (decibels((1, 30), (2, 30)), "1 picture is enough here"),
        (decibels((1, 20), (2, 30.9), (5, 30)), "below the level of sets of 3 to 5."),  # half a decibel or so is luck
        (decibels((1, 20), (2, 25), (5, 30)), "still rises at 5 pictures: the worst draw of 2 is 5 dB below"),
        (decibels((1, 33), (2, 31), (5, 30)), "More than 1 cost 3 dB: rare extremes widen the ranges"),
        (decibels((1, 30)), "1 picture says nothing of more"),
        (curve((1, None, 0.5), (3, None, 0.9)), "the worst draw of 1 is 40.0 points of agreement below"),
    ],
)
def test_the_curve_in_words(found: SampleCurve, words: str) -> None:
    assert words in found.in_words()
    assert ("rare extremes" in found.in_words()) is ("rare extremes" in words)
