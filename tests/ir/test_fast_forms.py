"""Channels that codes are padded with, written and taken back. Oracle: ONNX Runtime on both, bit for bit."""

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
    assert [node.op_type for node in padded.nodes()].count("Pad") == 1
    expected = run(bare, feeds)["y"]
    assert np.array_equal(run(padded, feeds)["y"], expected)
    assert list(drop_channel_padding(padded).values()) == [4]
    assert sorted(node.op_type for node in padded.nodes()) == sorted(node.op_type for node in bare.nodes())
    assert np.array_equal(run(padded, feeds)["y"], expected)


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
