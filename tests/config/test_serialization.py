"""Bits layer by layer: the file, what is refused, and that every wish reaches weights and tensors."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest

from qconv.cli.quantize import quantize as quantize_command
from qconv.cli.recipe_options import collect_fields, make_request_of_fields
from qconv.config.choices import LayerBits
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.config.serialization import escape_glob, format_layer_bits, read_layer_bits
from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.pipeline.quantize import quantize
from qconv.planning.eligibility import NO_16_BIT_KERNEL
from qconv.planning.planner import KEPT_FLOAT_BY_LAYER_BITS
from qconv.reporter import Reporter
from tests.planning.test_plan import Planned
from tests.support.models import network
from tests.support.quantized import NET, quantized
from tests.test_pipeline import deep
from tests.test_pipeline import quantized as whole

EXAMPLE = """
[layers]
"stem*" = 8
"blocks.1.*" = { weights = 4, activations = 8 }
"classifier" = "float"
"""
FOUR, EIGHT = LayerBits(4), LayerBits(8)


def written(folder: Path, text: str) -> Path:
    path = folder / "bits.toml"
    path.write_text(text, "utf-8")
    return path


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    found = read_layer_bits(written(tmp_path, EXAMPLE))
    assert found == (("stem*", EIGHT), ("blocks.1.*", LayerBits(4, 8)), ("classifier", LayerBits(in_float=True)))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    wishes = (LayerBits(4), LayerBits(None, 6), LayerBits(3, 5), LayerBits(in_float=True), LayerBits(4, 32))
    names = ("a.b", 'say "x"', escape_glob("odd[0]*"), "été\t", "in float")
    assignment = tuple(zip(names, wishes, strict=True))
    assert read_layer_bits(written(tmp_path, format_layer_bits(assignment))) == assignment


def test_a_name_taken_exactly_matches_itself_alone() -> None:
    recipe = Recipe(layer_bits=((escape_glob("odd[0]*"), FOUR),))
    assert recipe.bits_of("odd[0]*") == FOUR
    assert recipe.bits_of("odd0") == recipe.bits_of("odd[0]more") == LayerBits()


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("[layers", "is no TOML"),
        ("", "has no table of layers"),
        ("[layers]\n", "has no table of layers"),
        ("layers = 4", "has no table of layers"),
        ("[layer]\na = 4", "has no table of layers"),
        ("[layers]\na = 4\n[more]\nb = 4", "has 'more' beside"),
        ("[layers]\na = 4.0", "gives 'a' the bits 4.0"),
        ("[layers]\na = true", "gives 'a' the bits true"),
        ('[layers]\na = "four"', "gives 'a' the bits \"four\""),
        ("[layers]\na = {}", "gives 'a' the bits {}"),
        ("[layers]\na.b = 4", "gives 'a' the bits {'b': 4}"),  # a name with a dot lacks its quotes
        ("[layers]\na = 1979-05-27", "gives 'a' the bits"),
        ("[layers]\na = [4]", "gives 'a' the bits [4]"),
        (f"[layers]\na = {'9' * 5000}", "a number has more than 64 bits"),
        (f"[layers]\na = [{{b = 0x{'f' * 6000}}}]", "a number has more than 64 bits"),
    ],
)
def test_files_that_say_no_such_thing(tmp_path: Path, text: str, fact: str) -> None:
    with pytest.raises(QconvError) as caught:
        read_layer_bits(written(tmp_path, text))
    assert fact in caught.value.message
    assert caught.value.hint


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(QconvError, match="cannot be read"):
            read_layer_bits(path)
    (tmp_path / "noise").write_bytes(b"\xff\xfe")
    with pytest.raises(QconvError, match="it is no text"):
        read_layer_bits(tmp_path / "noise")


@pytest.mark.parametrize(
    ("bits", "options", "fact"),
    [
        (LayerBits(9), {}, "weights of 9 bits"),
        (LayerBits(1), {}, "weights of 1 bits"),
        (LayerBits(None, 24), {}, "activations of 24 bits"),
        (LayerBits(None, 32), {"activation_bits": 32}, "beside --activation-bits 32"),
        (LayerBits(4, 8), {"activation_bits": 32}, "beside --activation-bits 32"),
        (LayerBits(4, 4), {"target": "tensorrt"}, "activations of 4 bits and --target tensorrt"),
        (LayerBits(16), {"target": "openvino"}, "weights of 16 bits and --target openvino"),
    ],
)
def test_bits_that_cannot_be(bits: LayerBits, options: dict[str, object], fact: str) -> None:
    with pytest.raises(QconvError) as caught:
        Recipe(layer_bits=(("stem", bits),), **options)  # type: ignore[arg-type]
    assert fact in caught.value.message
    assert "'stem'" in caught.value.message


def test_what_is_no_assignment() -> None:
    for wrong in (("stem", FOUR), ([("stem", FOUR)],), (("stem", 4),)):
        with pytest.raises(QconvError, match="layer_bits"):
            Recipe(layer_bits=wrong)  # type: ignore[arg-type]


# -- the plan ----------------------------------------------------------------------------------------------------------

CHAIN = network(
    "c = Conv(x, w) d = Conv(c, v) e = Conv(d, v) f = Conv(e, v) y = Conv(f, v)", w=(4, 3, 3, 3), v=(4, 4, 1, 1)
)


def test_the_first_glob_that_matches_counts() -> None:
    wishes = (("d", LayerBits(3)), ("[de]", LayerBits(5)), ("*", LayerBits(6)))
    planned = Planned(CHAIN, Recipe(layer_bits=wishes))
    assert [planned.layer(name).weight.bits for name in "cdefy"] == [6, 3, 5, 6, 6]


def test_without_a_wish_the_recipe_holds_and_a_wish_goes_before_edge_bits() -> None:
    planned = Planned(CHAIN, Recipe(weight_bits=4, activation_bits=4, layer_bits=(("c", LayerBits(2, 3)),)))
    assert [planned.layer(name).weight.bits for name in "cdefy"] == [2, 4, 4, 4, 8]
    assert [planned.bits(name) for name in ("x", "c", "d", "e", "f")] == [3, 4, 4, 4, 8]


def test_a_tensor_takes_the_most_that_its_readers_want() -> None:
    proto = network(
        "c = Conv(x, w) d = Conv(c, v) e = Conv(c, v) s = Add(d, e) y = Conv(s, v)", w=(4, 3, 3, 3), v=(4, 4, 1, 1)
    )
    for wishes, bits in ((((5, 3), 5)), ((3, 6), 6), ((3, None), 8)):
        chosen = tuple((name, LayerBits(4, wish)) for name, wish in zip("de", wishes, strict=True))
        assert Planned(proto, Recipe(layer_bits=chosen)).bits("c") == bits


def test_tensors_that_are_tied_take_the_most_of_all() -> None:
    proto = network(
        "c = Conv(x, w) m = MaxPool<kernel_shape=[2,2]>(c) d = Conv(m, v) e = Conv(c, v) f = Conv(d, v) y = Conv(e, v)",
        outputs=("f", "y"),
        w=(4, 3, 3, 3),
        v=(4, 4, 1, 1),
    )
    planned = Planned(proto, Recipe(layer_bits=(("d", LayerBits(None, 3)), ("e", LayerBits(None, 6)))))
    assert planned.ties == {"c m"}
    assert planned.bits("c") == planned.bits("m") == 6


def test_float_is_float_and_says_who_wanted_it() -> None:
    planned = Planned(CHAIN, Recipe(layer_bits=(("[de]", LayerBits(in_float=True)),)))
    assert planned.layers == "c f y"
    assert planned.kept("d") == planned.kept("e") == KEPT_FLOAT_BY_LAYER_BITS


@pytest.mark.parametrize("wish", [LayerBits(in_float=True), LayerBits(None, 32)])
def test_float_is_for_any_node(wish: LayerBits) -> None:
    proto = network("a = Conv(x, w) b = Relu(a) y = Conv(b, v)", w=(4, 3, 3, 3), v=(4, 4, 1, 1))
    planned = Planned(proto, Recipe(layer_bits=(("b", wish),)))
    assert planned.absorbed == {}
    assert planned.kept("b") == KEPT_FLOAT_BY_LAYER_BITS


def test_a_layer_on_float_keeps_its_weights_as_codes() -> None:
    planned = Planned(CHAIN, Recipe(layer_bits=(("d", LayerBits(4, 32)), ("e", LayerBits(in_float=True)))))
    assert planned.layers == "c d f y"
    assert (planned.layer("d").data, planned.layer("d").weight.bits) == (None, 4)


def test_codes_of_16_bits_say_why_they_run_in_float() -> None:
    planned = Planned(CHAIN, Recipe(layer_bits=(("e", LayerBits(None, 16)),)))
    assert planned.kept("e") == NO_16_BIT_KERNEL


# -- the file that comes of it -----------------------------------------------------------------------------------------


def test_codes_keep_to_the_bits_of_their_layer() -> None:
    """Weights normal, so that the outermost code 2^(b-1) - 1 is reached; tensors end at 2^b - 1 by a Clip."""
    wishes = (("c", LayerBits(8, 8)), ("d", LayerBits(3, 4)), ("p", LayerBits(5, 6)))
    result = quantized(NET, layer_bits=wishes)
    for layer, bits in (("c", 8), ("d", 3), ("p", 5)):
        (node,) = (node for node in result.proto.graph.node if node.name == layer)
        codes = onnx.numpy_helper.to_array(result.wiring.codes(node.input[1]))
        assert np.abs(codes).max() == 2 ** (bits - 1) - 1
    limits = {int(result.wiring.constants[node.input[2]]) for node in result.wiring.all("Clip")}
    assert limits == {15, 63}
    result.check(least=8.0)


def test_weights_of_16_bits_beside_others() -> None:
    wide = quantized(NET, layer_bits=(("d", LayerBits(16, 16)),)).check()
    assert wide.proto.opset_import[0].version == 21


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(QconvError, match="--pack"):
        Recipe(pack=True, layer_bits=(("d", LayerBits(8)),))


def test_the_file_carries_the_assignment(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    for index in range(3):
        np.save(folder / f"{index}.npy", np.random.default_rng(index).random((1, 3, 8, 8), np.float32))
    recipe, data = Recipe(layer_bits=(("d", LayerBits(4, 6)),), equalize=False), DataOptions((str(folder),))
    report, result = whole(deep(), recipe, data)
    carried = json.loads({entry.key: entry.value for entry in result.metadata_props}["qconv.recipe"])
    wanted = [["d", {"weights": 4, "activations": 6, "in_float": False}]]
    assert carried["layer_bits"] == report.recipe["layer_bits"] == wanted
    assert {row.name: row.bits for row in report.tensors if row.kind == "weight"} == {"w": 8, "v": 4, "g": 8}
    assert {row.bits for row in report.tensors if row.name == "r"} == {6}


def test_globs_that_match_no_layer_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    np.save(folder / "0.npy", np.ones((1, 3, 8, 8), np.float32))
    heard: list[str] = []
    recipe, data = (
        Recipe(layer_bits=(("d", FOUR), ("conv9", FOUR), ("r", FOUR)), threads=1),
        DataOptions((str(folder),)),
    )
    quantize(Source("m", None, deep().SerializeToString()), None, recipe, data, Reporter(heard.append))
    told = [text for text in heard if "--layer-bits" in text]
    assert told == [f"--layer-bits: {name!r} matches no layer of the folded model." for name in ("conv9", "r")]


# -- the command line --------------------------------------------------------------------------------------------------


def asked(*options: object) -> Recipe:
    """The recipe of `qconv quantize m --calib x OPTIONS`."""
    with quantize_command.make_context("quantize", ["m", "--calib", "x", *map(str, options)]) as context:
        return make_request_of_fields(collect_fields(context.params))[0]


def test_the_option_reads_the_file(tmp_path: Path) -> None:
    found = asked("--layer-bits", written(tmp_path, EXAMPLE))
    assert found.layer_bits[1] == ("blocks.1.*", LayerBits(4, 8))
    assert tomllib.loads(format_layer_bits(found.layer_bits)) == tomllib.loads(EXAMPLE)
    with pytest.raises(QconvError, match="cannot be read"):
        asked("--layer-bits", tmp_path / "none.toml")
    with pytest.raises(QconvError, match="9 bits"):
        asked("--layer-bits", written(tmp_path, "[layers]\na = 9"))


def test_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "bits.toml"
    path.write_text("[layers]\na = 4", "utf-8-sig")
    assert read_layer_bits(path) == (("a", LayerBits(4)),)


def test_nests_without_end_are_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(QconvError, match="nested too deeply"):
        read_layer_bits(Path(written(tmp_path, "x = " + "[" * 5000 + "]" * 5000)))


def test_a_line_that_comes_too_late_is_told(tmp_path: Path) -> None:
    proto = deep()
    samples = tmp_path / "s"
    samples.mkdir()
    for number in range(4):
        np.save(samples / f"{number}.npy", np.random.default_rng(number).random((3, 8, 8)).astype(np.float32))
    lines = (("*", LayerBits(4)), ("d", LayerBits(8)), ("nowhere", LayerBits(8)))
    report, _ = whole(proto, Recipe(layer_bits=lines, effort="fast"), DataOptions((str(samples),)))
    assert any("'d' matches no layer that a line above it does not" in text for text in report.warnings)
    assert any("'nowhere' matches no layer of the folded model" in text for text in report.warnings)
