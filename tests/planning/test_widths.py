"""Which tensors have 16 bits beside others with 8. Oracle: networks of a few nodes, worked out by hand.

The last Conv writes codes, too, so that y is one of the tensors.
"""

from __future__ import annotations

from qconv.config.choices import LayerBits
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.ir.model import Model
from qconv.passes.requantize import convert_between_widths
from qconv.planning.plan import Plan
from qconv.planning.planner import make_plan, replan
from qconv.planning.widths import measure_precise_share
from qconv.results.precision import PreciseShare
from tests.support.models import Constant, loaded, network

V = (4, 4, 1, 1)
SILU = "a = Conv(x, w) g = Sigmoid(a) s = Mul(a, g) b = Conv(s, v) y = Conv(b, v)"


def planned(body: str, wide: str, recipe: Recipe | None = None, **constants: Constant) -> tuple[Model, Plan]:
    known = {"w": (4, 3, 1, 1), "v": V, **constants}
    used = {name: numbers for name, numbers in known.items() if f", {name}" in body}
    model = loaded(network(body, (1, 3, 4, 4), **used))
    recipe = recipe or Recipe(target="generic")
    return model, make_plan(model, recipe, TARGETS[recipe.target], wide=dict.fromkeys(wide.split(), "told so"))


def bits(plan: Plan) -> dict[str, int]:
    return {value.name or "": choice.spec.bits for value, choice in plan.activations.items() if choice.spec}


def divided(body: str, wide: str, **constants: Constant) -> tuple[dict[str, int], set[str]]:
    """The bits of all tensors once readers of unlike bits have their copies, and the ties."""
    model, plan = planned(body, wide, **constants)
    convert_between_widths(model, plan)
    plan = replan(plan, model)
    assert not convert_between_widths(model, plan)  # nothing is left to convert
    return bits(plan), {" ".join(value.name or "" for value in group) for group in plan.ties}


def test_a_tensor_has_the_bits_of_who_writes_it() -> None:
    """x is the caller's, so that it has those of its reader; a and g are written on 16 bits, s and b are not."""
    _, plan = planned(SILU, "a g")
    assert bits(plan) == {"x": 16, "a": 16, "g": 16, "s": 8, "b": 8, "y": 8}
    assert {node.name for node in plan.on_16_bits} == {"a", "g"}
    assert plan.kept.keys() == {"a", "g"}
    assert all(layer.weight.bits == 8 for layer in plan.layers)


def test_each_border_has_one_copy() -> None:
    """a has 16 bits, and Sigmoid and Mul read one copy of 8."""
    assert divided(SILU, "a")[0] == {"x": 16, "a": 16, "a_8_bits": 8, "g": 8, "s": 8, "b": 8, "y": 8}
    found, _ = divided(SILU, "s")
    narrow = dict.fromkeys(("x", "a", "g", "s_8_bits", "b", "y"), 8)
    assert found == {**narrow, "a_16_bits": 16, "g_16_bits": 16, "s": 16}


def test_without_such_nodes_the_plan_is_as_ever() -> None:
    model, plan = planned(SILU, "")
    assert set(bits(plan).values()) == {8}
    assert convert_between_widths(model, plan) == {}


def test_of_a_residual_add_with_unlike_writers_one_side_is_converted() -> None:
    body = "a = Conv(x, w) b = Conv(a, v) s = Add(a, b) y = Conv(s, v)"
    assert divided(body, "b s")[0] == {"x": 8, "a": 8, "a_16_bits": 16, "b": 16, "s": 16, "s_8_bits": 8, "y": 8}
    assert divided(body, "b")[0] == {"x": 8, "a": 8, "a_16_bits": 16, "b": 16, "b_8_bits": 8, "s": 8, "y": 8}


def test_a_concat_shares_parameters_with_a_copy_where_its_inputs_are_unlike() -> None:
    body = "a = Conv(x, w) b = Conv(x, w) c = Concat<axis=1>(a, b) y = Conv(c, u)"
    found, ties = divided(body, "a", u=(4, 8, 1, 1))
    assert found == {"x": 16, "x_8_bits": 8, "a": 16, "a_8_bits": 8, "b": 8, "c": 8, "y": 8}
    assert ties == {"a_8_bits b c"}
    found, ties = divided(body, "a c y", u=(4, 8, 1, 1))
    assert found == {"x": 16, "x_8_bits": 8, "a": 16, "b": 8, "b_16_bits": 16, "c": 16, "y": 16}
    assert ties == {"a b_16_bits c"}


def test_a_pool_works_on_the_bits_that_it_is_told() -> None:
    body = "a = Conv(x, w) m = MaxPool<kernel_shape=[2,2]>(a) y = Conv(m, v)"
    assert divided(body, "m y") == ({"x": 8, "a": 8, "a_16_bits": 16, "m": 16, "y": 16}, {"a_16_bits m"})
    assert divided(body, "a m") == ({"x": 16, "a": 16, "m": 16, "m_8_bits": 8, "y": 8}, {"a m"})


def test_an_absorbed_activation_goes_with_its_layer() -> None:
    model, plan = planned("a = Conv(x, w) r = Relu(a) b = Conv(r, v) y = Conv(b, v)", "a")
    assert bits(plan) == {"x": 16, "r": 16, "b": 8, "y": 8}
    assert convert_between_widths(model, plan) == {"r": "r_8_bits"}
    assert replan(plan, model).kept.keys() == {"a", "r"}


def test_a_constant_of_both_kinds_of_nodes_becomes_two() -> None:
    model, plan = planned("a = Conv(x, w) b = Mul(a, k) c = Mul(b, k) y = Conv(c, v)", "b", k=2.0)
    convert_between_widths(model, plan)
    plan = replan(plan, model)
    assert {value.name: spec.bits for value, spec in plan.constants.items()} == {"k": 8, "k_16_bits": 16}


def test_few_bits_of_other_layers_stay() -> None:
    recipe = Recipe(target="generic", layer_bits=(("y", LayerBits(None, 4)), ("a", LayerBits(None, 16))))
    _, plan = planned("a = Conv(x, w) b = Conv(a, v) y = Conv(b, v)", "", recipe)
    assert bits(plan) == {"x": 16, "a": 16, "b": 4, "y": 8}
    assert plan.wide == {}


def test_where_all_tensors_have_16_bits_no_node_is_another() -> None:
    model, plan = planned(SILU, "a", Recipe(target="generic", activation_bits=16))
    assert not plan.on_16_bits
    assert convert_between_widths(model, plan) == {}


def test_replan_hands_wide_nodes_on() -> None:
    model, plan = planned(SILU, "a g")
    assert replan(plan, model).wide == plan.wide == {"a": "told so", "g": "told so"}
    assert bits(replan(plan, model, wide={})) == dict.fromkeys(bits(plan), 8)


SHAPES = {"x": (1, 3, 4, 4), **dict.fromkeys("agsby", (1, 4, 4, 4))}


def test_the_share_of_16_bits() -> None:
    """x has 3 x 16 elements, the others 4 x 16: of 6 tensors and 23 x 16 elements, x, a and g are wide."""
    model, plan = planned(SILU, "a g")
    whole = replan(plan, model, wide={})
    assert measure_precise_share(plan, whole, SHAPES) == PreciseShare(3, 6, (3 + 4 + 4) / 23)
    assert measure_precise_share(plan, whole, SHAPES).tensors == 0.5
    assert measure_precise_share(whole, whole, {}) == PreciseShare(0, 6, 0.0)


def test_copies_are_tensors_of_the_size_of_what_they_copy() -> None:
    """x and a are wide, and a's copy is not: 2 of 7 tensors, 7 of 27."""
    model, plan = planned(SILU, "a")
    whole = replan(plan, model, wide={})
    convert_between_widths(model, plan)
    assert measure_precise_share(replan(plan, model), whole, SHAPES) == PreciseShare(2, 7, 7 / 27)


def test_the_share_in_float() -> None:
    """The Mul is in float: s is quantized for b all the same; with b in float, too, s and b are not: 8 of 23."""
    model, plan = planned(SILU, "")
    floats = replan(plan, model, floats={"s": "told so", "b": "told so"})
    assert measure_precise_share(replan(plan, model, floats={"s": "told so"}), plan, SHAPES).count == 0
    assert measure_precise_share(floats, plan, SHAPES) == PreciseShare(1, 6, 4 / 23)
