"""Two models by labels, batch by batch: `tests/cli/test_quantize_labels.py` has the forms of labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qconv.config.data_options import DataOptions
from qconv.errors import QconvError
from qconv.metrics.by_labels import LabelledPair, Labels, add_batch, open_data_labels
from qconv.metrics.classification import ClassMeasure
from qconv.metrics.demands import Demanded, check_gates
from qconv.metrics.network_outputs import BatchOutputs, NetworkOutputs
from qconv.results.quantize import OutputScore, Verification
from qconv.results.scores import (
    BOXES,
    FLOAT_MAP,
    FLOAT_MIOU,
    MAP,
    MIOU,
    SQNR,
    TOP1,
    LabelledScores,
    Metric,
    Score,
    value_of,
)
from qconv.runtime.outputs import ModelOutput
from tests.support.cli import picture

PATHS = tuple(Path(f"{number}.png") for number in range(5))
CLASSES = (0, 1, 2, 3, 0)
NETWORK = NetworkOutputs((ModelOutput("y", True, (None, 4)),))


def labels() -> Labels:
    known = dict(zip(PATHS, CLASSES, strict=True))
    return Labels("hand", lambda: ClassMeasure("y", known), known.keys())


def said(*classes: int) -> BatchOutputs:
    return NETWORK.hear([np.eye(4, dtype=np.float32)[list(classes)]])


def test_a_pair_by_hand() -> None:
    """Float is right on 4 of 5 pictures, the other one on 2. The last batch is filled up, which counts nothing."""
    pair = LabelledPair.of(labels())
    pair.add(PATHS[:3], 3, said(0, 1, 2), said(0, 0, 0))
    pair.add(PATHS[3:], 3, said(3, 3, 3), said(1, 0, 0))
    found = pair.scores()
    assert found is not None
    assert (found.pictures, found.pair, found.metric) == (5, (0.8, 0.4), TOP1)
    assert found.lost == pytest.approx(0.4)
    assert value_of(found.differences, TOP1) == pytest.approx((1 - 3) / 5)
    assert found.in_words == "top-1 80.00 -> 40.00 by labels"
    assert found.as_dict()["float"] == {"top1": 0.8}
    again = LabelledPair.of(labels(), pair.reference)  # a measure of the float model serves any number
    add_batch(again.own, PATHS[:3], 3, said(0, 1, 2))
    add_batch(again.own, PATHS[3:], 2, said(3, 0))
    assert again.scores().pair == (0.8, 1.0)  # type: ignore[union-attr]


def test_nothing_measured() -> None:
    assert LabelledPair.of(labels()).scores() is None


def test_an_output_of_a_whole_batch() -> None:
    with pytest.raises(QconvError, match="output y has no part for each picture") as caught:
        add_batch(labels().start(), PATHS[:2], 2, said(0, 1, 2))
    assert "--batch 1" in caught.value.hint


def test_pictures_without_labels_among_those_that_are_checked() -> None:
    labels().require_some([Path("x"), PATHS[0]])
    with pytest.raises(QconvError, match="none of the 1 pictures"):
        labels().require_some([Path("x")])


def test_class_folders_are_labels_where_they_are_asked_for(tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / f"c{number % 2}" / f"{number}.png", number)
    names = tmp_path / "names.txt"
    names.write_text("c1\nother\nc0\nlast\n")
    paths = sorted(tmp_path.rglob("*.png"))
    opened = open_data_labels(DataOptions((str(tmp_path),), classes=names), paths, print, "")
    measure = opened.fit(NETWORK, {}, None, print).start()
    assert isinstance(measure, ClassMeasure)
    assert [measure.labels[path] for path in paths] == [2, 2, 0, 0]


def verification(metric: Metric | None = None, before: float = 0.0, after: float | None = 0.0) -> Verification:
    own = (Score(SQNR, 20.0), Score(FLOAT_MAP, 0.9), Score(FLOAT_MIOU, 0.8), Score(BOXES, 0.7))
    by_labels = None
    if metric is not None:
        by_labels = LabelledScores("hand", 1, (Score(metric, after),), (Score(metric, before),), ())
    return Verification(1, (OutputScore("y", own),), labelled=by_labels)


@pytest.mark.parametrize(
    ("metric", "labelled", "expected"),
    [
        (FLOAT_MAP, None, (FLOAT_MAP, 1.0, 0.9)),
        (FLOAT_MAP, (MAP, 0.35, 0.34), (MAP, 0.35, 0.34)),
        (FLOAT_MAP, (MIOU, 0.35, 0.34), (FLOAT_MAP, 1.0, 0.9)),  # labels of masks tell nothing of boxes
        (FLOAT_MIOU, (MIOU, 0.35, 0.36), (MIOU, 0.35, 0.36)),
        (BOXES, (MAP, 0.35, 0.34), (BOXES, 1.0, 0.7)),
        (SQNR, (MAP, 0.35, 0.34), (SQNR, None, 20.0)),
        (TOP1, (TOP1, 0.9, 0.8), (TOP1, 0.9, 0.8)),
    ],
)
def test_demands_are_met_by_labels_where_these_tell(
    metric: Metric, labelled: tuple[Metric, float, float] | None, expected: tuple[Metric, float | None, float]
) -> None:
    found = Demanded.of(metric, verification() if labelled is None else verification(*labelled))
    assert (found.metric, found.before, found.got) == expected


class Asked:
    """What has gates."""

    min_map = 0.5


def test_gates_by_labels() -> None:
    """Beside float 0.9 is enough; by labels 0.34 is not, and no number is not either."""
    assert [gate.held for gate in check_gates(verification(), Asked)] == [True]
    for after in (0.34, None):
        (gate,) = check_gates(verification(MAP, 0.35, after), Asked)
        assert (gate.got, gate.held, gate.of_float) == (after, False, 0.35)
    assert check_gates(verification(), Asked)[0].of_float is None  # beside itself it has all
