"""Few bits for what layers read, 8 for what goes on: streams keep what no layer rounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.ir.files import Source
from qconv.passes.requantize import requantize_for_layers
from qconv.pipeline.quantize import quantize
from qconv.planning.planner import make_plan
from tests.support.models import loaded, network, run

EYE = np.eye(2, dtype=np.float32).reshape(2, 2, 1, 1)
STREAM = "a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Add(b, c) e = Conv(d, w) y = Conv(e, w)"


def split(body: str, **options: object) -> tuple[dict[str, str], dict[str, int]]:
    """What is read twice, and the bits of all tensors then."""
    used = {"w": EYE, "v": 0 * EYE}
    model = loaded(network(body, (1, 2, 4, 4), **{name: x for name, x in used.items() if f", {name})" in body}))
    before = run(model, {"x": np.ones((1, 2, 4, 4), np.float32)})
    recipe = Recipe(**{"activation_bits": 4, **options})  # type: ignore[arg-type]
    found = requantize_for_layers(model, make_plan(model, recipe, TARGETS["ort-cpu"]))
    np.testing.assert_array_equal(run(model, {"x": np.ones((1, 2, 4, 4), np.float32)})["y"], before["y"])
    plan = make_plan(model, recipe, TARGETS["ort-cpu"])
    return found, {value.name or "": choice.spec.bits for value, choice in plan.activations.items() if choice.spec}


def test_a_stream_has_eight_bits_and_its_layers_few() -> None:
    found, bits = split(STREAM)
    assert set(found) == {"b"}
    assert (bits["b"], bits[found["b"]], bits["c"], bits["d"], bits["e"]) == (8, 4, 8, 4, 8)  # e: of the last layer


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (STREAM, {"activation_bits": 8}),
        ("a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Conv(c, w) y = Conv(d, w)", {}),  # nobody else reads
        ("a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Conv(b, w) e = Add(c, d) y = Conv(e, w)", {}),
    ],
)
def test_what_only_layers_read_is_rounded_once(body: str, options: dict[str, object]) -> None:
    assert split(body, **options)[0] == {}


def test_what_the_model_returns_keeps_its_bits() -> None:
    model = loaded(network("a = Conv(x, w) b = Relu(a) c = Conv(b, w) y = Conv(c, w)", (1, 2, 4, 4), ("y", "b"), w=EYE))
    assert set(requantize_for_layers(model, make_plan(model, Recipe(activation_bits=4), TARGETS["ort-cpu"]))) == {"b"}


def test_noise_of_few_bits_stays_out_of_the_stream(tmp_path: Path) -> None:
    """The branch adds nothing, so that d is b but for 8-bit codes; rounded to 3 bits y would have less than 25 dB."""
    body = "a = Conv(x, w) b = Relu(a) k = Conv(b, v) c = Relu(k) d = Add(b, c) y = Conv(d, w)"
    proto = network(body, (1, 2, 4, 4), w=EYE, v=0 * EYE)
    rng = np.random.default_rng(0)
    for number in range(16):
        np.save(tmp_path / f"{number:02}.npy", rng.uniform(0, 1, (2, 4, 4)).astype(np.float32))
    recipe, data = Recipe(threads=1, activation_bits=3), DataOptions((str(tmp_path),))
    report, _ = quantize(Source("m", None, proto.SerializeToString()), None, recipe, data)
    sqnr = report.verify.outputs[0].sqnr_db
    assert sqnr is not None
    assert sqnr > 40
    assert any(finding.where == "b" for finding in report.findings if finding.step == "plan")
    report, _ = quantize(Source("m", None, proto.SerializeToString()), None, replace(recipe, edge_bits=3), data)
    few = report.verify.outputs[0].sqnr_db
    assert few is not None
    assert few < 25  # the last layer reads 3 bits
