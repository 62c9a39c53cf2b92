"""Constants are stored once, and few values as a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qconv.analysis.inspect_quantized import inspect_quantized
from qconv.errors import Change, Finding, format_count
from qconv.ir.constants import expand_tables
from qconv.ir.files import Source
from qconv.ir.load import load_unchanged
from qconv.ir.model import constant_array
from qconv.passes.compress_constants import compress_constants
from tests.support.models import loaded, network, run
from tests.support.quantized import Wiring, pictures, quantized


def shrunk(proto: onnx.ModelProto) -> tuple[Wiring, list[Finding]]:
    """Shrink, and check that no bit of the outputs changes."""
    model = loaded(proto)
    findings = compress_constants(model)
    feeds = {
        value.name: pictures([d.dim_value for d in value.type.tensor_type.shape.dim])[0]["x"]
        for value in proto.graph.input
    }
    before, after = run(proto, feeds), run(model, feeds)
    for name, numbers in before.items():
        assert numbers.tobytes() == after[name].tobytes()
    onnx.checker.check_model(model.proto(), full_check=True)
    return Wiring(model.proto()), findings


def said(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(found.where, found.what) for found in findings if isinstance(found, Change) and found.step == "shrink"]


def many(seed: int, values: int = 1025) -> NDArray[np.float32]:
    """1025 numbers, 4100 bytes, of which `values` differ."""
    numbers = np.random.default_rng(seed).standard_normal(values).astype(np.float32)
    return numbers[np.arange(1025) % values]


def test_equal_constants_are_stored_once() -> None:
    body = "a = Mul(x, k) b = Mul(a, l) c = Mul(b, m) y = Sin(c)"
    wiring, findings = shrunk(network(body, x=(2, 1025), k=many(0), l=many(0), m=many(1)))
    assert len(wiring.constants) == 2
    assert said(findings) == [("l", "equal to k, stored once")]


def test_equal_numbers_of_other_shape_stay_two() -> None:
    wiring, findings = shrunk(
        network("a = Mul(x, k) y = Mul(a, l)", x=(2, 1025), k=many(0), l=many(0).reshape(1, 1025))
    )
    assert len(wiring.constants) == 2
    assert findings == []


def test_small_constants_are_left_alone() -> None:
    """4092 bytes."""
    numbers = np.zeros(1023, np.float32)
    wiring, findings = shrunk(network("a = Mul(x, k) y = Mul(a, l)", x=(2, 1023), k=numbers, l=numbers))
    assert set(wiring.constants) == {"k", "l"}
    assert findings == []


@pytest.mark.parametrize("values", [1, 2, 256])
def test_few_values_become_a_table(values: int) -> None:
    """One byte for each of 1025 numbers, and four for each value."""
    wiring, findings = shrunk(network("y = Mul(x, k)", x=(2, 1025), k=many(0, values)))
    assert sorted(tensor.nbytes for tensor in wiring.constants.values()) == sorted([4 * values, 1025])
    assert said(findings) == [("k", f"stored as {format_count(values, 'value')} and one byte an element")]


def test_too_many_values_stay_as_they_are() -> None:
    _, findings = shrunk(network("y = Mul(x, k)", x=(2, 1025), k=many(0, 257)))
    assert findings == []


def test_tables_tell_odd_numbers_apart() -> None:
    """-0.0 is not 0.0: 1 / -0.0 is minus infinity. NaN stays NaN."""
    odd = np.float32([0.0, -0.0, np.inf, -np.inf, np.nan])[np.arange(1025) % 5]
    wiring, _ = shrunk(network("a = Mul(x, zero) b = Add(a, k) y = Reciprocal(k)", x=(2, 1025), k=odd, zero=0.0))
    assert wiring.count("Gather") == 1
    (table,) = [tensor for tensor in wiring.constants.values() if tensor.dtype == np.float32 and tensor.size == 5]
    assert set(table.view(np.uint32).tolist()) == set(odd.view(np.uint32).tolist())


def test_a_table_with_two_readers_is_read_by_both() -> None:
    wiring, _ = shrunk(network("a = Mul(x, k) b = Sin(a) y = Add(b, k)", x=(2, 1025), k=many(0, 9)))
    assert wiring.count("Gather") == 1


def test_the_constants_of_a_quantized_network_shrink() -> None:
    """Anchors that a float operator behind the network divides by."""
    body = "c = Conv(x, w) f = Flatten(c) g = Gemm(f, v) h = Tanh(g) a = Mul(h, k) y = Sub(a, l)"
    k = many(0, 7)
    proto = network(body, w=(4, 3, 3, 3), v=(64, 1025), k=k, l=k.copy())
    result = quantized(proto)
    assert {f.step for f in result.findings if isinstance(f, Change)} >= {"shrink"}
    result.check(25)


def test_readers_put_the_numbers_back() -> None:
    numbers = many(0, 40)
    model = loaded(network("a = Mul(x, k) y = Mul(a, k)", x=(2, 1025), k=numbers))
    names = [node.op_type for node in model.nodes()]
    compress_constants(model)
    (constant,) = expand_tables(model)
    assert constant_array(constant).tobytes() == numbers.tobytes()
    assert [node.op_type for node in model.nodes()] == names
    assert len(model.graph.initializers) == 1
    onnx.checker.check_model(model.proto(), full_check=True)
    assert expand_tables(model) == []


def test_zero_points_in_a_table_are_read(tmp_path: Path) -> None:
    """More than a thousand channels with zero points of their own, which are floats where weights alone are codes."""
    proto = network("y = Conv(x, w)", x=(1, 2, 4, 4), w=(1100, 2, 3, 3))
    found = quantized(proto, pictures((1, 2, 4, 4)), activation_bits=32, weight_scheme="asymmetric")
    model = load_unchanged(found.proto, Source("it", None, b""))
    compress_constants(model)
    assert "Gather" in {node.op_type for node in model.nodes()}
    path = tmp_path / "model.onnx"
    path.write_bytes(model.proto().SerializeToString())
    (row,) = inspect_quantized(Source("it", path)).layers
    assert (row.scheme, row.granularity) == ("asymmetric", "per-channel")
