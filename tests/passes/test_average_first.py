"""The oracle is ONNX Runtime: it runs the model before and after, its own optimizations off."""

from __future__ import annotations

import numpy as np
import pytest

from qconv.passes.fold import run_float_passes
from tests.support.models import loaded, network, op_types, random_feeds, run, statistics

X = (2, 32, 9, 8)
POOL = "kernel_shape=[2,2], strides=[2,2]"
CONV = "a = Conv(x, w, b)"
SIZES = {"w": (16, 32, 1, 1), "b": (16,)}

MOVED = {
    "transition": f"{CONV} y = AveragePool<{POOL}>(a)",
    "padded, zeros not counted": f"{CONV} y = AveragePool<{POOL}, pads=[1,0,0,1]>(a)",
    "padded by itself": f'{CONV} y = AveragePool<{POOL}, auto_pad="SAME_UPPER">(a)',
    "a last window that is cut off": f"{CONV} y = AveragePool<{POOL}, ceil_mode=1>(a)",
    "more behind it": f"{CONV} c = AveragePool<{POOL}>(a) y = Relu(c)",
}

STAYS = {
    "zeros counted": f"{CONV} y = AveragePool<{POOL}, pads=[1,1,1,1], count_include_pad=1>(a)",
    "an activation between": f"{CONV} c = Relu(a) y = AveragePool<{POOL}>(c)",
    "another reader": f"{CONV} c = AveragePool<{POOL}>(a) d = Relu(a) e = AveragePool<{POOL}>(d) y = Add(c, e)",
    "each place": f"{CONV} y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(a)",
    "strided": f"a = Conv<strides=[2,2]>(x, w, b) y = AveragePool<{POOL}>(a)",
    "padded layer": f"a = Conv<pads=[1,1,1,1]>(x, w, b) y = AveragePool<{POOL}>(a)",
}


@pytest.mark.parametrize("kind", MOVED)
def test_a_pool_moves_in_front_of_the_layer_that_it_reads(kind: str) -> None:
    proto = network(MOVED[kind], x=X, **SIZES)
    model = loaded(proto)
    run_float_passes(model)
    assert op_types(model).startswith("AveragePool Conv")
    assert [value.name for value in model.graph.outputs] == ["y"]
    feeds = random_feeds(proto)
    assert np.allclose(run(model, feeds)["y"], run(proto, feeds)["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", STAYS)
def test_a_pool_stays_where_its_average_is_another_or_nothing_is_saved(kind: str) -> None:
    model = loaded(network(STAYS[kind], x=X, **SIZES))
    run_float_passes(model)
    assert op_types(model).startswith("Conv")


def test_few_outputs_of_many_inputs_are_averaged_behind_the_layer() -> None:
    """To average 64 channels takes longer than to multiply four times as often, where there is one output."""
    model = loaded(network(f"a = Conv(x, w) y = AveragePool<{POOL}>(a)", x=(1, 64, 8, 8), w=(1, 64, 1, 1)))
    run_float_passes(model)
    assert op_types(model) == "Conv AveragePool"


def test_a_map_of_unknown_size_tells_nothing() -> None:
    model = loaded(network(f"{CONV} y = AveragePool<{POOL}>(a)", x=(1, 32, "H", "W"), **SIZES))
    run_float_passes(model)
    assert op_types(model) == "Conv AveragePool"


def test_a_layer_whose_results_are_known_keeps_its_pool_behind_it() -> None:
    """BatchNormalization says how the whole map spreads: averages spread less."""
    body = f"a = Conv(x, w) n = BatchNormalization(a, gamma, beta, mean, var) y = AveragePool<{POOL}>(n)"
    model = loaded(network(body, x=X, w=SIZES["w"], **statistics(16)))
    run_float_passes(model)
    assert op_types(model) == "Conv AveragePool"
