"""CenterNet in other forms, and what is none."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.decoding.centernet import find_peaks, match
from qconv.decoding.head import NetworkFacts
from tests.support.decoder_references import DecoderReference


def test_logits_give_the_same_boxes() -> None:
    made = DecoderReference.load("centernet")
    shares = made.outputs["hm"].clip(1e-6, 1 - 1e-6).astype(np.float64)
    logits = {**made.outputs, "hm": np.log(shares / (1 - shares))}
    heads = [match(NetworkFacts(outputs, made.size)) for outputs in (made.outputs, logits)]
    assert heads[0] is not None
    assert heads[1] is not None
    (plain,), (raw,) = heads[0].read(made.outputs, 0.3), heads[1].read(logits, 0.3)
    assert raw.boxes == pytest.approx(plain.boxes)
    assert raw.scores == pytest.approx(plain.scores, abs=1e-5)


def test_names_tell_offsets_that_stand_first() -> None:
    made = DecoderReference.load("centernet").outputs
    head = match(NetworkFacts({"hm": made["hm"], "offset": made["reg"], "size": made["wh"]}, (256, 384)))
    assert head is not None
    assert head.outputs == ("hm", "size", "offset")


def test_of_equal_neighbours_both_are_peaks() -> None:
    assert find_peaks(np.array([[[0.1, 0.5, 0.5], [0.1, 0.1, 0.1]]])).tolist() == [
        [[False, True, True], [False, False, False]]
    ]


def test_other_maps_are_none() -> None:
    made = DecoderReference.load("centernet").outputs
    assert match(NetworkFacts(made, (512, 768))) is None  # maps of an eighth
    assert match(NetworkFacts({**made, "reg": made["reg"][:, :1]}, (256, 384))) is None
