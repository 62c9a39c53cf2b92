"""What the table of operators says of each, held against ONNX's own reference implementation, one row a case."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from qconv.ir.operators import OPERATORS, ChannelEffect, WeightedRule, operator, with_

X = np.random.default_rng(0).normal(0, 4, (1, 4, 6, 6)).astype(np.float32)
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "AveragePool": {"kernel_shape": [2, 2]},
    "MaxPool": {"kernel_shape": [2, 2]},
    "Transpose": {"perm": [0, 2, 3, 1]},
    "DepthToSpace": {"blocksize": 2},
    "Concat": {"axis": 1},
    "Resize": {"mode": "nearest"},
}
EXTRA: dict[str, list[NDArray[Any]]] = {
    "Reshape": [np.array([1, -1])],
    "Squeeze": [np.array([0])],
    "Unsqueeze": [np.array([0])],
    "Expand": [np.array([3, 1, 1, 1, 1])],
    "Tile": [np.array([1, 2, 1, 3])],
    "Slice": [np.array([1]), np.array([3]), np.array([1])],
    "Resize": [np.repeat(np.float32([0, 1]), 4), np.array([1, 1, 2, 2], np.float32)],
}


def computed(op_type: str, x: NDArray[np.float32], **attributes: Any) -> NDArray[np.float32]:
    """What ONNX's reference makes of x, and of constants that leave most of it as it is."""
    extra = EXTRA.get(op_type, [])
    names = ["x", *(f"c{i}" for i in range(len(extra)))]
    node = onnx.helper.make_node(op_type, names, ["y"], **{**ATTRIBUTES.get(op_type, {}), **attributes})
    inputs = [onnx.helper.make_tensor_value_info("x", 1, None)]
    outputs = [onnx.helper.make_tensor_value_info("y", 1, None)]
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in zip(names[1:], extra, strict=True)]
    graph = onnx.helper.make_graph([node], "g", inputs, outputs, constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    (y,) = ReferenceEvaluator(model).run(None, {"x": x})
    return np.asarray(y)


@pytest.mark.parametrize("op_type", sorted(with_(homogeneous=True)))
def test_homogeneous_operators_hand_factors_on(op_type: str) -> None:
    np.testing.assert_allclose(computed(op_type, 4 * X), 4 * computed(op_type, X), rtol=1e-6)


@pytest.mark.parametrize("op_type", sorted(with_(moves_values=True)))
def test_a_monotone_function_may_go_before_what_moves_values(op_type: str) -> None:
    before, behind = computed(op_type, np.maximum(X, 0)), np.maximum(computed(op_type, X), 0)
    np.testing.assert_array_equal(before, behind)
    assert set(computed(op_type, X).ravel()) <= set(X.ravel())


@pytest.mark.parametrize("op_type", sorted(with_(rearranges=True)))
def test_what_rearranges_keeps_every_number(op_type: str) -> None:
    np.testing.assert_array_equal(np.sort(computed(op_type, X), None), np.sort(X, None))


@pytest.mark.parametrize("op_type", sorted(name for name, row in OPERATORS.items() if row.output_range))
def test_no_result_is_beyond_the_range(op_type: str) -> None:
    low, high = operator(op_type).output_range or (0, 0)
    found = computed(op_type, X)
    assert low <= found.min()
    assert found.max() <= high


GIVEN: dict[str, list[dict[str, float]]] = {
    "HardSigmoid": [{}, {"alpha": 1 / 6, "beta": 0.5}],
    "LeakyRelu": [{}, {"alpha": 0.3}],
}
FUNCTIONS = [(name, given) for name, row in OPERATORS.items() if row.function for given in GIVEN.get(name, [{}])]


@pytest.mark.parametrize(("op_type", "given"), FUNCTIONS)
def test_functions_are_those_of_onnx(op_type: str, given: dict[str, float]) -> None:
    row = operator(op_type)
    assert row.function is not None
    assert row.effect is ChannelEffect.FUNCTION
    found = row.function(given.get)(X.astype(np.float64))
    np.testing.assert_allclose(found, computed(op_type, X, **given), rtol=1e-5, atol=1e-6)
    if row.saturates is not None:
        low, high = row.saturates(given.get) or (0, 0)
        ends = row.function(given.get)(np.array([low, -1e3, high, 1e3]))
        assert abs(ends[0] - ends[1]) < 1e-3
        assert abs(ends[2] - ends[3]) < 1e-3


GATES = [(name, given) for name, row in OPERATORS.items() if row.cutoff for given in GIVEN.get(name, [{}])]


@pytest.mark.parametrize(("op_type", "given"), GATES)
def test_gates_are_closed_up_to_the_cutoff(op_type: str, given: dict[str, float]) -> None:
    row = operator(op_type)
    assert row.cutoff is not None
    cutoff = row.cutoff(given.get)
    assert cutoff is not None
    x = np.array([cutoff - 5, cutoff, cutoff + 0.1], np.float32)
    product = computed(op_type, x, **given) * (1 if row.gates_itself else x)
    np.testing.assert_allclose(product[:2], 0, atol=1e-6)
    assert abs(product[2]) > 1e-3


def test_a_falling_gate_has_no_cutoff() -> None:
    row = operator("HardSigmoid")
    assert row.cutoff is not None
    assert row.saturates is not None
    assert row.cutoff({"alpha": -0.2}.get) is None
    assert row.saturates({"alpha": -0.2}.get) is None


QUANTIZED = [name for name, row in OPERATORS.items() if row.rule is not None]


@pytest.mark.parametrize("op_type", QUANTIZED)
def test_what_can_be_quantized_can_be_trained(op_type: str) -> None:
    pytest.importorskip("torch", reason="needs the extra: pip install 'qconv[torch]'")
    from qconv.training.network import OPERATORS as TORCH_OPERATORS

    assert op_type in TORCH_OPERATORS


@pytest.mark.parametrize("op_type", sorted(OPERATORS))
def test_a_row_fits_together(op_type: str) -> None:
    row = operator(op_type)
    assert row.absorbs_activation or not row.moves_values
    assert not (row.gates and row.gates_itself)
    assert (row.function is None) == (row.effect is not ChannelEffect.FUNCTION)
    assert (row.effect is ChannelEffect.LAYER) == isinstance(row.rule, WeightedRule)
    assert row.saturates is None or row.function is not None
    assert row.remedy is None or row.rule is None or row.made_of_others
    assert onnx.defs.has(op_type) or op_type == "Swish"  # of opset 24: onnx 1.18 has none


def test_other_operators_have_an_empty_row() -> None:
    assert operator("Unheard") == operator("") == type(operator(""))()


def test_the_table_needs_no_numpy() -> None:
    code = "import sys, qconv.ir.operators; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
