"""Which places a Slice keeps. Oracle: ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from qconv.ir.rewriting import sliced_channels
from qconv.runtime.session import Session
from tests.support.models import loaded

LARGEST = 2**63 - 1
COUNT = 6


@pytest.mark.parametrize("step", [-3, -2, -1, 1, 2])
@pytest.mark.parametrize("end", [-LARGEST - 1, -LARGEST, -100, -7, -6, -1, 0, 3, 6, 100, 2**31 - 1, LARGEST])
@pytest.mark.parametrize("start", [-100, -7, -6, -1, 0, 2, 5, 6, 100])
def test_a_slice_keeps_what_the_runtime_keeps(start: int, end: int, step: int) -> None:
    numbers = {"starts": [start], "ends": [end], "axes": [1], "steps": [step]}
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("Slice", ["x", *numbers], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, COUNT))],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, None))],
            [helper.make_tensor(name, TensorProto.INT64, [1], value) for name, value in numbers.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    x = np.arange(COUNT, dtype=np.float32)[None]
    (kept,) = Session(proto.SerializeToString(), optimize=False).run_all({"x": x})
    assert sliced_channels(loaded(proto).nodes()[0], COUNT).tolist() == kept[0].astype(int).tolist()
