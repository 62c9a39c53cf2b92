"""What `compare`, `inspect` and `audit` say of files with 16 bits beside 8.

Oracle: NumPy's rounding of the float network's tensors, with the scales in the file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qconv.analysis.inspect_quantized import inspect_quantized
from qconv.auditing.audit import audit_file
from qconv.config.choices import LayerBits
from qconv.ir.files import Source
from qconv.planning.eligibility import NO_16_BIT_KERNEL
from tests.analysis.test_compare import compared, decibel, inputs, quantized, run, samples, saved
from tests.support.models import network
from tests.support.quantized import Wiring

__all__ = ["samples"]

WIDE = tuple((name, LayerBits(None, 16)) for name in "cgs")
OPTIONS = {"target": "generic", "effort": "fast", "equalize": False, "layer_bits": WIDE}


@pytest.fixture
def files(samples: Path) -> tuple[Path, Path]:
    """c has 16 bits; Sigmoid g reads it so, and two layers read one copy of 8. Returns float model and result."""
    body = """c = Conv(x, w) g = Sigmoid(c) s = Mul(c, g) d = Conv(c, u) e = Conv(c, v) f = Mul(d, e)
              h = Add(f, s) y = Conv(h, u)"""
    model = saved(network(body, x=("N", 3, 8, 8), w=(4, 3, 1, 1), u=(4, 4, 1, 1), v=(4, 4, 1, 1)), samples)
    return model, quantized(model, samples, **OPTIONS)


def test_a_conversion_is_a_row_of_its_own(files: tuple[Path, Path], samples: Path) -> None:
    found = compared(*files, samples)
    rows = {row.name: row for row in found.layers}
    assert found.unmatched == ()
    assert {row.name for row in found.layers if row.op == "Convert"} == {"c in 8 bits", "s in 8 bits"}
    assert [rows[name].as_dict()["bits"] for name in ("c", "c in 8 bits", "d")] == [16, 8, 8]
    assert rows["c in 8 bits"].weights is None  # the layer's own row has them
    scale, zero = (float(part) for part in Wiring(onnx.load(files[1])).parameters("c_8_bits_dq"))
    c = np.concatenate([run(files[0], x, "c")[0] for x in inputs(samples)])
    coded = (np.clip(np.rint(c / scale) + zero, 0, 255) - zero) * scale
    assert rows["c in 8 bits"].added_sqnr_db == pytest.approx(decibel(c, coded), abs=0.05)


def test_errors_of_both_roundings_reach_the_output(files: tuple[Path, Path], samples: Path) -> None:
    """That of 16 bits reaches whoever reads c, that of 8 bits the layers alone; together they explain the output."""
    found = compared(*files, samples)
    shares = {row.name: row.output_share or 0.0 for row in found.layers}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["c in 8 bits"] > 0.02
    assert found.predicted_db == pytest.approx(found.sqnr_db, abs=1.5)


def test_few_bits_of_layers_are_rows_too(samples: Path) -> None:
    """A stream of 8 bits that layers read with 4."""
    body = "a = Conv(x, w) r = Relu(a) k = Conv(r, u) c = Relu(k) d = Add(r, c) y = Conv(d, u)"
    model = saved(network(body, x=("N", 3, 8, 8), w=(4, 3, 1, 1), u=(4, 4, 1, 1)), samples)
    found = compared(model, quantized(model, samples, activation_bits=4, effort="fast", equalize=False), samples)
    assert found.unmatched == ()
    assert {row.name: row.as_dict()["bits"] for row in found.layers if row.op == "Convert"} == {"a in 4 bits": 4}


def test_16_bits_that_were_wanted_have_no_remedy(files: tuple[Path, Path]) -> None:
    """Quantizers and dequantizers, those of conversions among them, are no nodes in float."""
    found = audit_file(Source(str(files[1]), files[1]), threads=1, batch=1, size=None).audit
    wide = {island.node: (island.why, island.remedy, island.rule) for island in found.islands}
    assert wide == dict.fromkeys("cgs", (NO_16_BIT_KERNEL, None, "kept"))
    assert {layer.node for layer in found.layers if layer.runs == "integer"} == set("defhy")


def test_bits_of_what_layers_read_and_write_are_told(files: tuple[Path, Path]) -> None:
    rows = {row.name: row for row in inspect_quantized(Source(str(files[1]), files[1])).layers}
    assert {name: (row.input.bits, row.output.bits) for name, row in rows.items()} == {
        "c": (16, 16),
        "d": (8, 8),
        "e": (8, 8),
        "y": (8, 8),
    }
    assert {name for name, row in rows.items() if row.runs == "float"} == {"c"}
