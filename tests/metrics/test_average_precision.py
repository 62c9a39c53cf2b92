"""mAP against pycocotools, on made-up labels and on the shared ones; intervals against resampled data sets."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from qconv.data.box_labels import BoxLabels
from qconv.decoding.boxes import NOTHING, Detections
from qconv.errors import QconvError
from qconv.metrics.average_precision import AveragePrecision, require_detect_extra
from qconv.metrics.similarity import iter_resamples
from qconv.results.scores import MAP, MAP50, find_score, value_of

pytest.importorskip("pycocotools", reason="needs pycocotools, of the extra qconv[test]")

Picture = tuple[Detections, BoxLabels]
CLASSES = 4


def made_up(seed: int, pictures: int = 12, *, odd: bool = True, ties: bool = True) -> list[Picture]:
    """Labels, and detections near some of them. odd: with crowds and ignored ones. ties: with equal scores."""
    rng = np.random.default_rng(seed)
    return [_picture(rng, odd, 1 if ties else 15) for _ in range(pictures)]


def _picture(rng: np.random.Generator, odd: bool, digits: int) -> Picture:
    count = int(rng.integers(0, 7))
    corner, size = rng.uniform(0, 300, (count, 2)), rng.uniform(5, 120, (count, 2))
    boxes, classes = np.concatenate([corner, corner + size], axis=1), rng.integers(0, CLASSES, count)
    crowd, ignored = rng.random(count) < 0.2 * odd, rng.random(count) < 0.2 * odd
    near = np.repeat(np.arange(count), rng.integers(0, 4, count))
    moved = boxes[near] + rng.normal(0, 3, (len(near), 4))
    moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
    wrong = rng.random(len(near)) < 0.15
    stray = rng.uniform(0, 300, (5, 2))
    sizes = np.array([[40, 40], [40, 40], [40, 40], [-40, 40], [2e5, 1e5]])  # turned inside out, and too large to count
    found = Detections.of(
        np.concatenate([moved, np.concatenate([stray, stray + sizes], axis=1)]),
        np.round(rng.uniform(0.01, 1, len(near) + 5), digits),
        np.concatenate([np.where(wrong, 0, classes[near]), rng.integers(0, CLASSES + 1, 5)]),
    )
    return found, BoxLabels.of(boxes, classes, crowd, ignored)


def by_pycocotools(pictures: Sequence[Picture]) -> tuple[float, float]:
    """mAP and mAP50; `ignored` is an area that no range of sizes takes in, as the program has no word for it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, (found, labels) in enumerate(pictures, 1):
        for (x, y, right, bottom), name, crowd, ignored in zip(
            labels.boxes, labels.classes, labels.crowd, labels.ignored, strict=True
        ):
            area = 1e12 if ignored and not crowd else (right - x) * (bottom - y)
            box = {"bbox": [x, y, right - x, bottom - y], "area": area, "iscrowd": int(crowd)}
            truth.append({"id": len(truth) + 1, "image_id": number, "category_id": int(name), **box})
        for (x, y, right, bottom), score, name in zip(found.boxes, found.scores, found.classes, strict=True):
            box = {"bbox": [x, y, right - x, bottom - y], "score": score}
            results.append({"image_id": number, "category_id": int(name), **box})
    expected = COCO()
    expected.dataset = {
        "images": [{"id": number} for number in range(1, len(pictures) + 1)],
        "annotations": truth,
        "categories": [{"id": number} for number in range(CLASSES + 1)],
        "info": {},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        expected.createIndex()
        judge = COCOeval(expected, expected.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[0]), float(judge.stats[1])


def measured(pictures: Sequence[Picture]) -> AveragePrecision:
    precision = AveragePrecision()
    for found, labels in pictures:
        precision.add(found, labels)
    return precision


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_equal_to_pycocotools(seed: int, odd: bool) -> None:
    """By the library to the last of 15 digits, the rest being how it divides; and under weights of 1."""
    pictures = made_up(seed, odd=odd)
    wanted = by_pycocotools(pictures)
    assert 0.05 < wanted[0] < wanted[1] < 0.95
    precision = measured(pictures)
    np.testing.assert_allclose(precision.measure(np.ones((1, len(pictures))))[0], wanted, rtol=0, atol=1e-12)
    pytest.importorskip("faster_coco_eval", reason="needs the extra: pip install 'qconv[detect]'")
    scores = precision.scores()
    got = value_of(scores, MAP), value_of(scores, MAP50)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("seed", range(4))
def test_weights_are_pictures_drawn_several_times(seed: int) -> None:
    """AP under weights is pycocotools' on the data set in which each picture stands as often."""
    pictures = made_up(seed, 9, ties=False)
    for weights in [*iter_resamples(len(pictures), 6)]:
        drawn = [picture for picture, times in zip(pictures, weights, strict=True) for _ in range(times)]
        got = measured(pictures).measure(weights[None].astype(np.float64))[0]
        np.testing.assert_allclose(got, by_pycocotools(drawn), rtol=0, atol=1e-12)


def test_a_hundred_boxes_of_a_class_in_a_picture() -> None:
    """The hundred and first finds nothing any more."""
    labels = BoxLabels.of([[0, 0, 9, 9]], [0])
    boxes = np.tile([50.0, 50, 60, 60], (120, 1))
    for place, wanted in ((99, 1 / 100), (100, 0)):
        boxes[:] = [50, 50, 60, 60]
        boxes[place] = [0, 0, 9, 9]
        found = Detections.of(boxes, np.linspace(0.9, 0.1, 120), np.zeros(120))
        np.testing.assert_allclose(measured([(found, labels)]).measure(np.ones((1, 1)))[0], [wanted] * 2)


def test_by_hand() -> None:
    """Of two labels one is found, behind a stray box: precision 1/2 at recalls up to 0.5, 51 of 101, at IoU limits
    up to 0.8; the box has 0.8 of the label's area."""
    labels = BoxLabels.of([[0, 0, 10, 10], [50, 50, 60, 60]], [0, 0])
    found = Detections.of([[80, 80, 90, 90], [0, 0, 10, 8]], [0.9, 0.8], [0, 0])
    at_one_limit = 0.5 * 51 / 101
    got = measured([(found, labels)]).measure(np.ones((1, 1)))[0]
    np.testing.assert_allclose(got, [at_one_limit * 7 / 10, at_one_limit], rtol=1e-12)


def test_intervals_and_paired_differences() -> None:
    """A model beside itself differs by nothing; beside one without its best boxes by more than chance."""
    pytest.importorskip("faster_coco_eval", reason="needs the extra: pip install 'qconv[detect]'")
    pictures = made_up(3, 30, odd=False)
    own = measured(pictures)
    score = find_score(own.scores(), MAP)
    assert score is not None
    assert score.value is not None
    assert score.interval is not None
    assert score.interval[0] < score.value < score.interval[1]
    same = find_score(own.differences(measured(pictures)), MAP)
    assert same is not None
    assert (same.value, same.interval) == (0, (0, 0))
    poor = measured([(found.select(found.scores < 0.4), labels) for found, labels in pictures])
    worse = find_score(poor.differences(own), MAP)
    assert worse is not None
    assert worse.interval is not None
    assert worse.value == value_of(poor.scores(), MAP) - score.value  # type: ignore[operator]
    assert worse.interval[1] < 0
    near = find_score(measured([(found.above(0.15), labels) for found, labels in pictures]).differences(own), MAP)
    assert near is not None
    assert near.interval is not None
    # both are drawn alike, so that what both find hard cancels
    assert near.interval[1] - near.interval[0] < (score.interval[1] - score.interval[0]) / 4


def test_nothing_found_and_nothing_to_find() -> None:
    pytest.importorskip("faster_coco_eval", reason="needs the extra: pip install 'qconv[detect]'")
    labels = BoxLabels.of([[0, 0, 9, 9]], [1])
    blind = measured([(NOTHING, labels)]).scores()
    assert [score.value for score in blind] == [0, 0]
    found = Detections.of([[0, 0, 9, 9]], [0.5], [1])
    assert [score.value for score in measured([(found, BoxLabels.of([], []))]).scores()] == [None, None]
    difficult = BoxLabels.of([[0, 0, 9, 9]], [1], ignored=[True])
    assert [score.value for score in measured([(found, difficult)]).scores()] == [None, None]


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(QconvError, match="mAP needs faster-coco-eval, which is not installed") as caught:
        require_detect_extra()
    assert "pip install 'qconv[detect]'" in caught.value.hint
