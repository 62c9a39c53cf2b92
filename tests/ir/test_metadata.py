"""What a file needs. Oracle: the notes on which ONNX Runtime takes which opset, measured on eight versions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qconv.config.choices import Scheme, WeightGranularity
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.errors import QconvError
from qconv.ir.metadata import (
    EQUALIZATION_KEY,
    read_equalization,
    round_log_scale,
    write_equalization,
    write_metadata,
)
from qconv.ir.requirements import needed_opset, needed_runtime
from tests.support.models import loaded, network


@pytest.mark.parametrize(
    ("options", "own", "needed"),
    [
        ({}, 7, 13),  # a scale for each channel
        ({}, 17, 17),  # never below the model's own
        ({"weight_bits": 4}, 17, 17),  # in 8-bit tensors
        ({"weight_bits": 4, "pack": True}, 17, 21),  # int4
        ({"weight_bits": 16}, 17, 21),
        ({"activation_bits": 16}, 17, 21),
        ({"activation_bits": 32}, 17, 17),
        ({"weight_granularity": WeightGranularity.PER_BLOCK}, 13, 21),
        ({"opset": 19}, 17, 19),
        ({"pack": True, "weight_bits": 4}, 22, 22),
    ],
)
def test_the_lowest_opset_that_the_types_need(options: dict[str, object], own: int, needed: int) -> None:
    assert needed_opset(Recipe(**options), own) == needed  # type: ignore[arg-type]


@pytest.mark.parametrize(("opset", "says"), [(16, "the model's own opset"), (99, "not known")])
def test_an_opset_that_cannot_be_is_refused(opset: int, says: str) -> None:
    with pytest.raises(QconvError, match=says):
        needed_opset(Recipe(opset=opset), 17)


@pytest.mark.parametrize(
    ("options", "opset", "oldest"),
    [
        ({}, 13, "1.8"),
        ({}, 17, "1.12"),
        ({}, 21, "1.19"),
        ({}, 22, "1.22"),
        ({}, 23, "1.24"),  # 1.23.2 loses a dequantizer of it
        ({}, 24, "1.24"),
        ({}, 25, "1.24"),
        ({}, 26, "1.25"),
        ({}, 27, "1.32"),
        ({"weight_scheme": Scheme.ASYMMETRIC}, 17, "1.28"),  # up to 1.26 zero points may not differ
        ({"weight_scheme": Scheme.ASYMMETRIC, "activation_bits": 32}, 17, "1.12"),
        ({"weight_scheme": Scheme.ASYMMETRIC, "weight_bits": 4, "edge_bits": 4}, 17, "1.12"),  # codes are moved
        ({"weight_scheme": Scheme.ASYMMETRIC, "weight_bits": 4}, 17, "1.28"),  # those of 8 bits cannot be
        ({"effort": "best", "weight_bits": 4}, 17, "1.12"),
        ({"effort": "best", "weight_bits": 4, "pack": True}, 21, "1.19"),  # they are unpacked to float
        ({"weight_scheme": Scheme.ASYMMETRIC, "weight_bits": 4, "pack": True}, 21, "1.28"),  # those of 8 bits are not
    ],
)
def test_the_oldest_runtime(options: dict[str, object], opset: int, oldest: str) -> None:
    model = loaded(network("y = Relu(x)", opset=opset))
    assert needed_runtime(model, Recipe(**options)) == f"onnxruntime >= {oldest}"  # type: ignore[arg-type]


@pytest.mark.parametrize(("opset", "ir"), [(13, 7), (17, 8), (19, 9), (21, 10), (23, 11), (26, 13)])
def test_the_ir_version_is_the_opsets_own(opset: int, ir: int) -> None:
    """By the table of releases in onnx's documentation."""
    model = loaded(network("y = Relu(x)", opset=opset))
    write_metadata(model, "1.2.3", Recipe(weight_bits=4, threads=3).as_dict(DataOptions()), None)
    proto = model.proto()
    assert proto.ir_version == ir
    carried = {entry.key: entry.value for entry in proto.metadata_props}
    assert carried["qconv.version"] == "1.2.3"
    recipe = json.loads(carried["qconv.recipe"])
    assert recipe["weight_bits"] == 4
    assert "threads" not in recipe


def test_what_is_done_to_channels_adds_up() -> None:
    """The oracle is each step, done to the numbers in turn."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 3)).astype(np.float32)
    moved, props = x, dict[str, str]()
    for step in range(6):
        u, shift = round_log_scale(rng.normal(size=5)), rng.normal(size=5).astype(np.float32)
        scales, shifts = ({"a": u}, {}) if step % 2 else ({}, {"a": shift})
        write_equalization(props, scales, shifts)
        own = np.exp(u).reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)
        moved = moved / own[0] if step % 2 else moved - own[1]
    np.testing.assert_allclose(read_equalization(props).moved("a", x), moved, rtol=1e-4, atol=1e-5)


def test_what_is_undone_is_not_told() -> None:
    props: dict[str, str] = {}
    for sign in (1, -1):
        write_equalization(props, {"a": sign * round_log_scale(np.full(3, 0.5))}, {})
    assert EQUALIZATION_KEY not in props
