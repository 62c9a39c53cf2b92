"""What outputs are once they were seen: detections by a known decoder, or by the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qconv.config.tasks import Tasks
from qconv.decoding.boxes import Detections
from qconv.decoding.head import Head
from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.ir.original import open_original
from qconv.metrics.network_outputs import NetworkOutputs, describe_outputs
from qconv.runtime.outputs import ModelOutput, OutputKind
from tests.support.models import network

DECODER = "def boxes(outputs):\n    return [[0, 0, 4, 4, float(outputs['y'].max() > -9), 2]]\n"


def described(tasks: Tasks, x: tuple[int, ...] = (1, 3, 8, 8)) -> NetworkOutputs:
    """Of a network that is a segmenter by its look."""
    proto = network("y = Conv(x, w)", x=x, outputs=("y",), w=(5, 3, 1, 1))
    session = open_original(Source("the test's model", None, proto.SerializeToString()), 1, tasks)
    feeds = {"x": np.zeros(x, np.float32)}
    return describe_outputs(session, feeds, session.run_all(feeds))


def test_the_users_own_decoder_takes_the_place_of_all_others(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(DECODER)
    found = described(Tasks(decode=f"{file}:boxes"))
    assert found.outputs[0].kind is OutputKind.DETECTIONS
    assert f"{file}:boxes reads them" in found.outputs[0].why
    assert found.head is not None
    (detections,) = found.head.read({"y": np.zeros((1, 5, 8, 8))}, 0.1)
    assert detections.boxes.tolist() == [[0, 0, 4, 4]]


def test_detections_of_a_batch_are_read_once() -> None:
    """The first number of a picture says how many boxes it has."""
    calls: list[float] = []

    def decode(arrays: Sequence[NDArray[Any]], least: float) -> list[Detections]:
        calls.append(least)
        counts = [int(picture.ravel()[0]) for picture in arrays[0]]
        return [Detections(np.zeros((n, 4)), np.ones(n), np.zeros(n, np.int64)) for n in counts]

    output = ModelOutput("y", True, (None, 3))
    heard = NetworkOutputs((output,), Head("test", "", ("y",), decode, (8, 8))).hear([np.array([[1, 0, 0], [2, 0, 0]])])
    assert not calls  # whoever wants none pays for none
    assert [len(found) for found in heard.detections] == [1, 2]
    second = heard.of_picture(1)
    assert (second.by_name["y"].tolist(), [len(found) for found in second.detections]) == ([[2, 0, 0]], [2])
    assert calls == [0.001]
    assert NetworkOutputs((output,)).hear([np.zeros((1, 3))]).of_picture(0).detections == ()


def test_without_one_nothing_is_detected() -> None:
    found = described(Tasks())
    assert found.head is None
    assert found.outputs[0].kind is OutputKind.CLASS_MAP


def test_a_task_of_an_output_counts_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(DECODER)
    found = described(Tasks("y=segment", f"{file}:boxes"))
    assert found.head is not None
    assert found.outputs[0].kind is OutputKind.CLASS_MAP


def test_a_detector_that_nobody_knows_is_told_of_the_option() -> None:
    with pytest.raises(QconvError, match="no decoder knows the outputs") as told:
        described(Tasks("detect"))
    assert "--decode" in told.value.hint
