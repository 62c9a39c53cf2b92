"""Gelus that are written out: forms that are found, against ONNX Runtime's own fusion; and what becomes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.ir.files import Source
from qconv.ir.gelu import GELU_REASON, find_gelus, halves_gelu
from qconv.passes.fold import run_float_passes
from qconv.pipeline.quantize import quantize
from qconv.runtime.session import Session
from tests.support.models import loaded, network

CONSTANTS = {
    **{"r": np.float32([2**0.5]), "i": np.float32([0.5**0.5]), "one": np.float32([1]), "half": np.float32([0.5])},
    **{
        "third": np.float32([1 / 3]),
        "short": np.float32([1.4142]),
        "cut": np.float32([1.4141]),
        "two": np.float32([2]),
    },
    "halves": np.array([0.5**0.5], np.float16).astype(np.float32),
}
WEIGHTS = {"w": (4, 3, 3, 3), "v": (4, 4, 3, 3)}
SHAPE = (1, 3, 8, 8)
ERF = "a = Conv(x, w) d = Div(a, r) e = Erf(d) p = Add(e, one) "
LAST = ERF + "m = Mul(a, p) g = Mul(m, half) y = Conv(g, v)"
FORMS = {
    "halved last": LAST,
    "halved last, other sides": ERF.replace("Add(e, one)", "Add(one, e)")
    + "m = Mul(p, a) g = Mul(half, m) y = Conv(g, v)",
    "halved first": ERF + "m = Mul(a, half) g = Mul(m, p) y = Conv(g, v)",
    "short constant": LAST.replace("Div(a, r)", "Div(a, short)"),
}
UNKNOWN_TO_THE_RUNTIME = {
    "multiplied": LAST.replace("Div(a, r)", "Mul(a, i)"),
    "multiplied, other sides": LAST.replace("Div(a, r)", "Mul(i, a)"),
    "halved between": ERF + "m = Mul(p, half) g = Mul(a, m) y = Conv(g, v)",
    "divided by 2": LAST.replace("Mul(m, half)", "Div(m, two)"),
    "first divided by 2": ERF + "m = Div(a, two) g = Mul(m, p) y = Conv(g, v)",
    "divided by 2 between": ERF + "m = Div(p, two) g = Mul(a, m) y = Conv(g, v)",
    "a constant cut off": LAST.replace("Div(a, r)", "Div(a, cut)"),
    "a constant of 16 bits": LAST.replace("Div(a, r)", "Mul(a, halves)"),
    "multiplied, halved first": ERF.replace("Div(a, r)", "Mul(a, i)") + "m = Mul(a, half) g = Mul(m, p) y = Conv(g, v)",
}
OTHERS = {
    "another factor": LAST.replace("half", "third"),
    "another root": LAST.replace("Div(a, r)", "Div(a, one)"),
    "divided the other way": LAST.replace("Div(a, r)", "Div(r, a)"),
    "divided the other way at last": LAST.replace("Mul(m, half)", "Div(two, m)"),
    "no half": ERF + "g = Mul(a, p) y = Conv(g, v)",
    "of two tensors": LAST.replace("Mul(a, p)", "Mul(d, p)"),
    "with another reader": LAST.replace("y = Conv(g, v)", "z = Add(g, p) y = Conv(z, v)"),
    "squared": ERF + "m = Mul(p, p) g = Mul(m, half) y = Conv(g, v)",
}


def made(body: str) -> onnx.ModelProto:
    return network(body, x=SHAPE, **CONSTANTS, **WEIGHTS)


def run(data: bytes, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)
    return np.asarray(Session(data, threads=1).run(["y"], {"x": x})[0])


def fused(data: bytes, tmp_path: Path) -> int:
    """The number of Gelus that ONNX Runtime makes."""
    Session(data, threads=1, save_optimized=tmp_path / "optimized.onnx")
    return [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node].count("Gelu")


@pytest.mark.parametrize("form", FORMS)
def test_what_the_runtime_fuses_is_found(form: str, tmp_path: Path) -> None:
    proto = made(FORMS[form])
    assert fused(proto.SerializeToString(), tmp_path) == 1
    (gelu,) = find_gelus(loaded(proto))
    assert [node.name for node in gelu.nodes] == [*"dep", "m", "g"] or {node.name for node in gelu.nodes} == set(
        "depmg"
    )
    assert gelu.data.name == "a"


@pytest.mark.parametrize("form", OTHERS)
def test_other_sums_are_none(form: str, tmp_path: Path) -> None:
    proto = made(OTHERS[form])
    assert fused(proto.SerializeToString(), tmp_path) == 0
    model = loaded(proto)
    assert find_gelus(model) == []
    assert not any(halves_gelu(model, node) for node in model.nodes())


@pytest.mark.parametrize("form", [*FORMS, *UNKNOWN_TO_THE_RUNTIME])
def test_float_passes_leave_one_that_the_runtime_knows(form: str, tmp_path: Path) -> None:
    """Its half is not folded into the layer behind it, and forms that are unknown are written as one that is known."""
    proto = made({**FORMS, **UNKNOWN_TO_THE_RUNTIME}[form])
    assert fused(proto.SerializeToString(), tmp_path) == (form in FORMS)
    model = loaded(proto)
    run_float_passes(model, for_ort=True)
    data = model.proto().SerializeToString()
    assert fused(data, tmp_path) == 1
    assert run(data) == pytest.approx(run(proto.SerializeToString()), abs=2e-5 if "constant" not in form else 5e-3)


def test_a_half_of_something_else_is_folded() -> None:
    model = loaded(made(OTHERS["squared"]))
    run_float_passes(model, for_ort=True)
    assert [node.op_type for node in model.nodes()].count("Mul") == 1


@pytest.mark.parametrize("form", [*FORMS, *UNKNOWN_TO_THE_RUNTIME])
def test_a_quantized_network_has_it_as_one_operator(form: str, tmp_path: Path) -> None:
    """Behind codes, too, where ONNX Runtime gives each reader a dequantizer of its own."""
    proto = made({**FORMS, **UNKNOWN_TO_THE_RUNTIME}[form])
    rng = np.random.default_rng(1)
    (tmp_path / "samples").mkdir()
    for index in range(8):
        np.save(tmp_path / "samples" / f"{index}.npy", rng.normal(size=SHAPE[1:]).astype(np.float32))
    recipe = Recipe(threads=1, effort="fast", float_budget=0.0)
    report, result = quantize(
        Source("m", None, proto.SerializeToString()), None, recipe, DataOptions((str(tmp_path / "samples"),))
    )
    assert result is not None
    nodes = onnx.load_from_string(result).graph.node
    layer = next(node for node in nodes if node.op_type == "Conv")
    assert any(node.op_type == "QuantizeLinear" and node.input[0] == layer.output[0] for node in nodes)
    assert fused(result, tmp_path) == 1
    assert report.audit.integer == 2
    assert all(island.why != GELU_REASON for island in report.audit.islands)  # one operator that the runtime made
