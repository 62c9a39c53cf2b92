"""Channels that codes are padded with, written and taken back. Oracle: ONNX Runtime on both."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.ir.fast_forms import drop_channel_padding, pad_layer
from qconv.ir.files import Source
from qconv.ir.load import load_unchanged
from qconv.ir.model import Model
from tests.support.models import network, random_feeds, run

CODES = """q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) k = DequantizeLinear<axis=0>(w, t, n)
           y = Conv<pads=[1,1,1,1]>(d, k)"""
CONSTANTS = {"s": np.float32(0.05), "z": np.array(100, np.uint8), "t": np.float32([0.01, 0.02]), "n": np.int8([0, 0])}


def model(body: str = CODES, **instead: object) -> Model:
    weights = np.random.default_rng(0).integers(-60, 60, (2, 3, 3, 3)).astype(np.int8)
    constants = {**CONSTANTS, "w": weights, **instead}
    proto = network(body, x=("N", 3, 6, 6), **constants)  # type: ignore[arg-type]
    return load_unchanged(proto, Source("the test's model", None, b""))


def conv_of(found: Model) -> object:
    return next(node for node in found.nodes() if node.op_type == "Conv")


def test_padded_and_back_is_the_same() -> None:
    bare, padded = model(), model()
    feeds = random_feeds(bare.proto())
    assert pad_layer(padded, conv_of(padded), 4)  # type: ignore[arg-type]
    assert [node.op_type for node in padded.nodes()].count("Gather") == 1
    expected = run(bare, feeds)["y"]
    np.testing.assert_allclose(run(padded, feeds)["y"], expected, rtol=1e-4, atol=1e-5)  # floats in another order
    assert list(drop_channel_padding(padded).values()) == [4]
    assert sorted(node.op_type for node in padded.nodes()) == sorted(node.op_type for node in bare.nodes())
    assert np.array_equal(run(padded, feeds)["y"], expected)


@pytest.mark.parametrize(("inputs", "padded"), [(1, 4), (2, 4), (3, 8), (6, 8)])
def test_other_channels_are_zero(inputs: int, padded: int) -> None:
    weights = np.random.default_rng(0).integers(-60, 60, (2, inputs, 3, 3)).astype(np.int8)
    proto = network(CODES, x=("N", inputs, 6, 6), w=weights, **CONSTANTS)
    bare, wide = (load_unchanged(proto, Source("the test's model", None, b"")) for _ in range(2))
    assert pad_layer(wide, conv_of(wide), padded)  # type: ignore[arg-type]
    assert [node.op_type for node in wide.nodes()].count("Pad") == 1
    feeds = random_feeds(proto)
    assert np.array_equal(run(wide, feeds)["y"], run(bare, feeds)["y"])
    assert list(drop_channel_padding(wide).values()) == [padded]
    assert np.array_equal(run(wide, feeds)["y"], run(bare, feeds)["y"])


def test_a_channel_that_is_there_twice_may_be_multiplied_by_more_than_a_code() -> None:
    """Then it stays: the sum of both weights has no code. So it may be behind `finetune`."""
    body = CODES.replace("(q, s, z) k", "(p, s, z) k").replace("d = Deq", "p = Gather<axis=1>(q, order) d = Deq")
    for size, left in ((60, 0), (70, 1)):
        found = model(body, w=np.full((2, 4, 3, 3), size, np.int8), order=np.int64([0, 1, 2, 1]))
        before = run(found, random_feeds(found.proto()))["y"]
        assert len(drop_channel_padding(found)) == 1 - left
        assert [node.op_type for node in found.nodes()].count("Gather") == left
        np.testing.assert_allclose(run(found, random_feeds(found.proto()))["y"], before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "instead",
    [
        {"n": np.int8([0, 3])},  # zero is another code, for which the kernel is another
        {"body": "y = Conv<pads=[1,1,1,1]>(x, w)", "w": (2, 3, 3, 3)},
        {"body": CODES.replace("k = DequantizeLinear<axis=0>(w, t, n)", "k = Cast<to=1>(w)")},
    ],
)
def test_what_is_not_stored_so_is_left_alone(instead: dict[str, object]) -> None:
    found = model(**instead)  # type: ignore[arg-type]
    before = [node.op_type for node in found.nodes()]
    assert not pad_layer(found, conv_of(found), 4)  # type: ignore[arg-type]
    assert drop_channel_padding(found) == {}
    assert [node.op_type for node in found.nodes()] == before


@pytest.mark.parametrize("more", [[0, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 1]])
def test_other_pads_of_codes_stay(more: list[int]) -> None:
    body = CODES.replace("(q, s, z) k", "(p, s, z) k").replace("d = Deq", "p = Pad(q, widths, z) d = Deq")
    weights = np.zeros((2, 3 + more[1] + more[5], 3, 3), np.int8)
    found = model(body, w=weights, widths=np.int64(more))
    assert drop_channel_padding(found) == {}


def test_channels_with_weights_stay() -> None:
    """A Pad that somebody else's network has, whose channel is multiplied by something."""
    body = CODES.replace("(q, s, z) k", "(p, s, z) k").replace("d = Deq", "p = Pad(q, widths, z) d = Deq")
    found = model(body, w=np.ones((2, 4, 3, 3), np.int8), widths=np.int64([0, 0, 0, 0, 0, 1, 0, 0]))
    assert drop_channel_padding(found) == {}
