"""What a user may ask for, what is refused and in which words."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

from qconv.config.choices import Drop, LayerBits, Scheme, WeightGranularity, describe_type
from qconv.config.data_options import (
    PRESETS,
    Color,
    DataOptions,
    Layout,
    Preprocessing,
    PreprocessingOptions,
    Preset,
    ResizeFilter,
)
from qconv.config.recipe import RUN_ONLY_OPTIONS, Recipe, make_request
from qconv.config.serialization import command_line_options, recipe_from_dict, recipe_lines
from qconv.errors import QconvError
from qconv.ir.requirements import needed_opset

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("wrong", "names", "fix"),
    [
        ({"weight_bits": 1}, "--weight-bits 1", "2 to 8, or 16"),
        ({"weight_bits": 9}, "--weight-bits 9", "2 to 8, or 16"),
        ({"weight_bits": 32}, "--weight-bits 32", "2 to 8, or 16"),
        ({"activation_bits": 1}, "--activation-bits 1", "32 for weights only"),
        ({"activation_bits": 12}, "--activation-bits 12", "32 for weights only"),
        ({"edge_bits": 0}, "--edge-bits 0", "2 to 8"),
        ({"edge_bits": 32}, "--edge-bits 32", "2 to 8"),
        ({"samples": 0}, "--samples 0", "at least 1"),
        ({"batch": 0}, "--batch 0", "at least 1"),
        ({"block_size": 0}, "--block-size 0", "at least 1"),
        ({"target": "abacus"}, "--target abacus", "ort-cpu"),
        ({"seed": -1}, "--seed -1", "0 or more"),
        ({"threads": 0}, "--threads 0", "1 to 1024"),
        ({"pack": True}, "--pack with 8-bit weights", "--weight-bits 7"),
        ({"allow_matmul_nbits": True}, "--allow-matmul-nbits with --activation-bits 8", "weights alone"),
        (
            {"allow_matmul_nbits": True, "activation_bits": 32, "target": "openvino"},
            "--allow-matmul-nbits with --target openvino",
            "for ONNX Runtime",
        ),
        ({"stats": "s.npz", "batch": 4}, "--batch with --stats alone", "leave it out"),
        ({"stats": "s.npz", "effort": "best", "rounding": "nearest"}, "--effort best with nearest", "with --calib"),
        ({"min_agreement": 1.01}, "--min-agreement 1.01", "0 to 1"),
        ({"min_agreement": -0.5}, "--min-agreement -0.5", "0 to 1"),
        ({"min_agreement": NAN}, "--min-agreement nan", "0 to 1"),
        ({"min_boxes": 95}, "--min-boxes 95", "0 to 1"),
        ({"min_miou": -0.1}, "--min-miou -0.1", "0 to 1"),
        ({"min_sqnr": NAN}, "--min-sqnr nan", "dB"),
    ],
)
def test_impossible_wishes_are_refused(wrong: dict[str, Any], names: str, fix: str) -> None:
    with pytest.raises(QconvError) as caught:
        make_request(wrong)
    assert names in caught.value.message
    assert fix in caught.value.hint


@pytest.mark.parametrize("bits", [*range(2, 9), 16])
def test_all_widths_of_the_contract_are_accepted(bits: int) -> None:
    recipe = Recipe(weight_bits=bits, activation_bits=bits, edge_bits=bits, pack=bits <= 4)
    assert recipe.weight_bits == bits


def test_the_ends_of_ranges_are_accepted() -> None:
    recipe = Recipe(activation_bits=32, block_size=1, threads=1, min_agreement=0, min_sqnr=-3.0)
    assert recipe.with_data(DataOptions(samples=1, batch=1)) == recipe
    assert replace(recipe, min_agreement=1).min_agreement == 1


@pytest.mark.parametrize(
    ("wrong", "fact"),
    [
        ({"scale": 0.0}, "--scale is zero"),
        ({"scale": NAN}, "--scale has a value that is no finite number: nan"),
        ({"scale": -INF}, "--scale has a value that is no finite number: -inf"),
        ({"mean": (0.5, NAN, 0.5)}, "--mean has a value that is no finite number: nan"),
        ({"mean": ()}, "--mean is empty"),
        ({"std": ()}, "--std is empty"),
        ({"std": (1.0, 0.0, 1.0)}, "--std has a zero"),
        ({"std": (1.0, -0.0)}, "--std has a zero"),
        ({"std": (INF,)}, "--std has a value that is no finite number: inf"),
        ({"resize": 0}, "--resize 0 is not possible"),
        ({"resize": -5}, "--resize -5 is not possible"),
    ],
)
def test_impossible_preprocessing_is_refused_for_its_real_reason(wrong: dict[str, Any], fact: str) -> None:
    with pytest.raises(QconvError) as caught:
        PreprocessingOptions(**wrong)
    assert caught.value.message.startswith(fact)
    assert caught.value.hint


def test_negative_scale_mean_and_std_are_accepted() -> None:
    """1 - pixel / 255 makes black writing on white into white on black, as MNIST has it."""
    options = PreprocessingOptions(scale=-1 / 255, mean=(-1.0,), std=(-2.0, 1.0, 1.0), resize=1)
    assert options.mean == (-1.0,)


# -- as data -----------------------------------------------------------------------------------------------------------

FULL, IMAGES = (
    Recipe(
        weight_bits=4,
        weight_scheme=Scheme.ASYMMETRIC,
        weight_granularity=WeightGranularity.PER_BLOCK,
        pack=True,
        keep_float=("conv*",),
        keep_float_op=("Gemm", "Add"),
        opset=21,
        min_agreement=0.9,
        min_boxes=0.8,
        min_map=0.75,
        min_miou=0.7,
        min_sqnr=20.0,
        threads=2,
    ),
    DataOptions(
        ("a", "b"),
        glob="*.jpg",
        task="segment",
        preprocessing=PreprocessingOptions(
            preset="caffe", mean=(1.0, 2.0, 3.0), std=(4.0,), color=Color.BGR, layout=Layout.NHWC, resize=9, size=(7, 8)
        ),
    ),
)


def test_every_option_shapes_the_file_or_steers_the_run() -> None:
    """A field added later is written into the file, unless STEERING says that it changes nothing there."""
    names = {field.name for field in fields(Recipe)}
    gates = {"min_agreement", "min_boxes", "min_map", "min_miou", "min_sqnr"}
    steering = {"threads", *gates, "stats", "save_stats", "save_layer_bits"}
    assert steering == RUN_ONLY_OPTIONS <= names  # the contract: no path, no machine
    labels = {"labels", "label_map", "classes"}
    images = {field.name for field in fields(DataOptions)} - {"paths", "batch", "arrays", "decode"} - labels
    assert set(FULL.as_dict(IMAGES)) == (names - RUN_ONLY_OPTIONS) | images
    assert set(FULL.as_dict(IMAGES)["preprocessing"]) == {field.name for field in fields(PreprocessingOptions)}


def test_a_task_is_recorded_only_where_it_is_given() -> None:
    """Else recipes of files would differ from those before there was such an option."""
    assert "task" not in Recipe().as_dict(DataOptions())
    plain = Recipe().as_dict(DataOptions(("a",), task="classify"))
    assert plain["task"] == "classify"
    assert command_line_options(plain) == ["--task", "classify"]
    with pytest.raises(QconvError, match="--task find"):
        DataOptions(task="find")


def test_a_recipe_survives_json_unchanged() -> None:
    """Tuples are lists and enumerations plain strings already: what is reported is what is read back."""
    plain = FULL.as_dict(IMAGES)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["weight_granularity"] == "per-block"
    assert type(plain["weight_granularity"]) is str
    assert plain["keep_float_op"] == ["Gemm", "Add"]
    assert plain["preprocessing"]["size"] == [7, 8]
    assert type(plain["preprocessing"]["color"]) is str


def test_defaults_are_those_of_the_contract() -> None:
    """W8A8, weights symmetric per channel, activations asymmetric, 128 pictures: see the option reference."""
    plain = Recipe().as_dict(DataOptions())
    expected = {
        "samples": 128,
        "seed": 0,
        "weight_bits": 8,
        "activation_bits": 8,
        "weight_scheme": "symmetric",
        "activation_scheme": "asymmetric",
        "weight_granularity": "per-channel",
        "block_size": 32,
        "edge_bits": 8,
        "pack": False,
        "calibrator": "output-mse",
        "weight_calibrator": "max",
        "target": "ort-cpu",
        "opset": None,
    }
    assert {name: plain[name] for name in expected} == expected


# -- in words ----------------------------------------------------------------------------------------------------------

IMAGENET = Preprocessing(
    preset="imagenet",
    source="default for three channels",
    color=Color.RGB,
    scale=1 / 255,
    mean=PRESETS["imagenet"].mean,
    std=PRESETS["imagenet"].std,
    layout=Layout.NCHW,
    resize="auto",
    filter=ResizeFilter.BILINEAR,
    size=(224, 224),
    class_vector=True,
)


def test_imagenet_in_words() -> None:
    assert IMAGENET.in_words() == (
        "RGB (pixel x 1/255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225], NCHW 224x224, "
        "shorter side to 256, centre crop (unless already 224x224); default for three channels"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": (224, 448)}, "scaled to cover 256x512, centre crop (unless already 224x448)"),
        ({"size": (448, 224)}, "scaled to cover 512x256, centre crop (unless already 448x224)"),
        ({"class_vector": False}, "NCHW 224x224, stretched;"),
        ({"resize": "exact"}, "NCHW 224x224, stretched;"),
        ({"resize": "letterbox"}, "letterboxed; "),
        ({"resize": 300, "size": (200, 100)}, "NCHW 200x100, shorter side to 300, centre crop;"),
        ({"scale": 1.0}, "(pixel x 1 - ["),
        ({"scale": 1 / 127.5}, "(pixel x 1/127.5 - ["),
        ({"scale": -1 / 255}, "(pixel x -0.00392157 - ["),
        ({"scale": 2.0}, "(pixel x 2 - ["),
        ({"color": Color.BGR, "layout": Layout.NHWC}, "NHWC 224x224"),
        ({"color": Color.GREY, "mean": (0.5,), "std": (1.0,)}, "GREY (pixel x 1/255 - [0.5]) / [1]"),
    ],
)
def test_preprocessing_in_words(changes: dict[str, Any], words: str) -> None:
    assert words in replace(IMAGENET, **changes).in_words()


@pytest.mark.parametrize("size", [(224, 224), (224, 448), (448, 224), (100, 30)])
def test_the_words_for_auto_say_what_is_done(size: tuple[int, int]) -> None:
    """A picture of exactly the covering size named in the words is cropped, never scaled: its centre pixel stays."""
    from qconv.data.fitting import choose_scaled_size

    height, width = (round(side / 0.875) for side in size)
    assert choose_scaled_size((width, height), replace(IMAGENET, size=size)) == (width, height)
    words = replace(IMAGENET, size=size).in_words()
    assert f"to {height}, " in words if size[0] == size[1] else f"cover {height}x{width}" in words


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({"mean": (127.0,), "std": (128.0,)}, "-0.9922 to -0.9844"),  # (0 - 127) / 128, (1 - 127) / 128
        ({"scale": 1.0, "mean": (0.0, 0.0, 0.0), "std": (0.2, 0.25, 0.2)}, "0 to 1275"),  # 255 / 0.2
        ({"scale": 1e-4, "mean": (0.0,), "std": (1.0,)}, "0 to 0.0255"),
    ],
)
def test_numbers_that_speak_of_other_pixels_are_doubted(changes: dict[str, Any], ends: str) -> None:
    assert f"become {ends}," in replace(IMAGENET, **changes).doubt()


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_no_preset_is_doubted(preset: Preset) -> None:
    numbers = {name: getattr(preset, name) for name in ("scale", "mean", "std")}
    assert replace(IMAGENET, **numbers).doubt() == ""


def test_channels_follow_the_colour() -> None:
    assert (IMAGENET.channels, replace(IMAGENET, color=Color.GREY).channels) == (3, 1)


def test_preprocessing_is_written_in_full_and_survives_json() -> None:
    plain = replace(IMAGENET, resize="letterbox").as_dict()
    assert set(plain) == {field.name for field in fields(Preprocessing)}
    assert json.loads(json.dumps(plain)) == plain
    assert plain["size"] == [224, 224]


def test_plain_texts_are_fine_in_python() -> None:
    """One folder is no list of letters, and a word is as good as the member of that name."""
    recipe, data = Recipe(keep_float_op="Gemm", weight_granularity="per-block"), DataOptions("imgs")  # type: ignore[arg-type]
    assert (data.paths, recipe.keep_float_op) == (("imgs",), ("Gemm",))
    assert recipe.weight_granularity is WeightGranularity.PER_BLOCK
    with pytest.raises(QconvError, match="--weight-scheme odd is not possible"):
        Recipe(weight_scheme="odd")  # type: ignore[arg-type]


def test_preprocessing_options_take_plain_python() -> None:
    options = PreprocessingOptions(color="bgr", layout="nhwc", filter="bicubic", mean=0.5, std=[1, 2, 3])  # type: ignore[arg-type]
    assert (options.color, options.layout, options.filter) == (Color.BGR, Layout.NHWC, ResizeFilter.BICUBIC)
    assert (options.mean, options.std) == ((0.5,), (1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"color": "x"},
        {"layout": "x"},
        {"filter": "lanczos"},
        {"mean": "1,2,3"},
        {"scale": "1/255"},
        {"std": [None]},
        {"resize": 2.5},
        {"size": 32},
        {"size": "32x32"},
    ],
)
def test_preprocessing_of_wrong_types_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(QconvError, match=next(iter(wrong))):
        PreprocessingOptions(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"calib": None},
        {"samples": "8"},
        {"samples": 1.5},
        {"weight_bits": 8.0},
        {"batch": 2.5},
        {"seed": "a"},
        {"opset": "17"},
        {"threads": 1.5},
        {"min_sqnr": "x"},
        {"keep_float_op": 5},
        {"preprocessing": "imagenet"},
    ],
)
def test_recipes_of_wrong_types_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(QconvError, match=next(iter(wrong)).replace("_", "-")):
        make_request(wrong)


WRONG: dict[str, list[Any]] = {
    "True or False": ["yes", 1, 0.0, (True,), np.int64(1)],
    "a whole number": ["3", 8.0, True, (8,), np.float32(8), np.array([8, 8])],
    "a number": ["3", True, (0.5,), b"3", np.array([0.5]), 10**400],
    "a text": [5, True, ("x",), b"x", {"x": 1}],
    "a text, or several in a tuple": [5, (1,), None, b"x", {"x": 1}, [["x"]]],
    "a whole number, or several in a tuple": ["48", 4.0, "4", ["4"], (True,)],
    "a number, or several in a tuple": ["0.5", ["1"], (None,), [[1.0]]],
    "(a whole number, a whole number)": [32, "32x32", (32,), (1, 2, 3), (8.0, 8.0), (True, True)],
    "a text or a whole number": [2.5, True, ("exact",)],
    "(a text, LayerBits(...)), or several in a tuple": [("x", 4), {"x": 4}, "x", [("x", 4)], 3],
    "Drop(...)": ["sqnr:20", 0.1],
    "PreprocessingOptions(...)": ["imagenet", None],
    "object(...)": [],
}
"""What no field takes whose type is this, in the words of the error."""


def every_field() -> list[tuple[type, str, str]]:
    """Class, field, and its type in words, less None."""
    found = []
    for kind in (Recipe, DataOptions, PreprocessingOptions, LayerBits, Drop):
        for name, wanted in get_type_hints(kind).items():
            found.append((kind, name, describe_type(wanted).removesuffix(" or None")))
    return found


@pytest.mark.parametrize(("kind", "name", "words"), every_field())
def test_no_field_takes_a_value_of_another_type(kind: type, name: str, words: str) -> None:
    """Each by its annotation: one that is added later is held to it as well."""
    others = {"measure": "sqnr", "value": 1.0} if kind is Drop else {}
    told = "--preprocess" if name == "preset" else name.replace("_", "[-_]")
    for value in WRONG.get(words, [5, True, ("x",)]):  # of an enumeration, texts are looked at later
        with pytest.raises(QconvError, match=told) as caught:
            kind(**{**others, name: value})
        assert caught.value.hint.startswith(f"use {words}")


def test_what_stands_for_a_type_becomes_it() -> None:
    """Lists, one in place of several, paths and numpy's numbers, which no file could hold."""
    recipe = Recipe(
        weight_bits=np.int64(8),
        candidate_bits=[4, np.int8(8)],  # type: ignore[arg-type]
        target_size=np.float32(0.25),  # type: ignore[arg-type]
        keep_float={"b", "a"},  # type: ignore[arg-type]
        layer_bits=[["stem", LayerBits(np.int64(4))]],  # type: ignore[arg-type, list-item]
        equalize=np.True_,  # type: ignore[arg-type]
        save_layer_bits=Path("bits.toml"),  # type: ignore[arg-type]
        min_agreement=1,
    )
    assert recipe.candidate_bits == (4, 8)
    assert recipe.keep_float == ("a", "b")
    assert recipe.layer_bits == (("stem", LayerBits(4)),)
    assert (recipe.equalize, recipe.save_layer_bits, recipe.target_size) == (True, "bits.toml", 0.25)
    data = DataOptions(iter([Path("a"), "b"]), samples=np.int32(5), seed=np.uint8(1))  # type: ignore[arg-type]
    options = PreprocessingOptions(mean=np.array([1, 2, 3]), size=[8, np.int64(9)], resize=np.int64(8))  # type: ignore[arg-type]
    assert (data.paths, options.mean, options.size, options.resize) == (("a", "b"), (1.0, 2.0, 3.0), (8, 9), 8)
    kinds = {type(value) for made in (recipe, data, options) for value in vars_of(made)}
    assert not [kind for kind in kinds if kind.__module__ == "numpy"]
    json.dumps(recipe.as_dict(replace(data, preprocessing=options)))


def vars_of(made: Any) -> list[Any]:
    """The values of its fields, and what is in those."""
    values = [getattr(made, part.name) for part in fields(made)]
    return values + [item for value in values if isinstance(value, tuple) for item in value]


@pytest.mark.parametrize(
    ("make", "fact", "fix"),
    [
        (lambda: PreprocessingOptions("nonsense"), "--preprocess nonsense", "use one of auto, imagenet"),
        (lambda: PreprocessingOptions(resize="foo"), "--resize foo", "auto, exact, letterbox or a number of pixels"),
        (lambda: PreprocessingOptions(size=(0, 8)), "--size 0x8", "at least 1x1"),
        (lambda: DataOptions(arrays=[{"x": [1]}]), "arrays in DataOptions", "in place of DataOptions"),  # type: ignore[arg-type]
        (lambda: Recipe(max_drop=Drop("loss", 1)), "--max-drop loss:1", "agreement:NUMBER"),
        (lambda: Recipe(target_size=NAN), "--target-size nan", "a share of float's size"),
        (lambda: Recipe(target_size=0.2, candidate_bits=()), "--candidate-bits ", "several of 2 to 8"),
    ],
)
def test_values_that_cannot_be_are_refused_when_they_are_made(make: Any, fact: str, fix: str) -> None:
    with pytest.raises(QconvError, match=fact) as caught:
        make()
    assert fix in caught.value.hint


@pytest.mark.parametrize(
    ("chosen", "options", "fact", "fix"),
    [
        ((8, 4), {}, "--candidate-activation-bits 4,8", "use 8 and one or both of 16 and float"),
        ((), {}, "--candidate-activation-bits ", "name 8 as well"),
        ((16, 32), {"target": "generic"}, "--candidate-activation-bits 16,float", "name 8 as well"),
        ((8, 32), {"activation_bits": 16}, "with --activation-bits 16", "leave one of them out"),
        ((8, 32), {"activation_bits": 32}, "with --activation-bits 32", "leave one of them out"),
        ((8, 16), {}, "8,16 with --target ort-cpu", "use 8,float: 16 bits run in float there"),
        ((8, 16, 32), {"target": "tensorrt"}, "8,16,float with --target tensorrt", "use 8,float: TensorRT takes int8"),
        ((8, 16), {"target": "openvino"}, "with --target openvino", "use 8,float: OpenVINO"),
        ((8, 32), {"data_free": True}, "8,float without pictures", "pass some with --calib"),
        ((8, 32), {"float_budget": 0.0}, "8,float with --float-budget 0", "leave one of them out"),
        ((8, 16), {"float_budget": 0.0, "target": "generic"}, "8,16 with --float-budget 0", "leave one of them out"),
    ],
)
def test_candidates_for_activations_that_cannot_be(
    chosen: tuple[int, ...], options: dict[str, Any], fact: str, fix: str
) -> None:
    with pytest.raises(QconvError) as caught:
        Recipe(candidate_activation_bits=chosen, **options)
    assert fact in caught.value.message
    assert fix in caught.value.hint


@pytest.mark.parametrize(
    ("options", "fact", "fix"),
    [
        ({"float_budget": 1.5}, "--float-budget 1.5", "a share from 0 to 1"),
        ({"activation_bits": 32}, "with --activation-bits 32", "in place of 8 bits"),
        ({"activation_bits": 4}, "with --activation-bits 4", "in place of 8 bits"),
        ({"candidate_activation_bits": (8,)}, "with --candidate-activation-bits 8", "name float as well"),
        ({"layer_bits": (("a", LayerBits(None, 32)),)}, "with these bits of layers", "which nodes have more"),
        ({"data_free": True}, "without pictures", "pass some with --calib"),
        ({"stats": "s.npz"}, "with --stats", "leave one of them out"),
        ({"tune_ranges": False}, "without --tune-ranges", "pass --tune-ranges as well"),
        ({"calibrator": "minmax"}, "without --tune-ranges", "pass --tune-ranges as well"),
        ({"weight_granularity": "per-block"}, "where layers do not run in integers", "not in blocks"),
    ],
)
def test_a_budget_that_nothing_is_spent_of_is_refused_by_its_cause(
    options: dict[str, Any], fact: str, fix: str
) -> None:
    """Each can be left as it is with a budget of 0."""
    with pytest.raises(QconvError) as caught:
        Recipe(**{"float_budget": 0.2, **options})
    assert fact in caught.value.message
    assert fix in caught.value.hint
    Recipe(**{**options, "float_budget": 0.0})


def test_candidates_for_activations_are_chosen_by_pictures() -> None:
    for options, told in (
        ({"stats": "s.npz"}, "8,float with --stats"),
        ({"effort": "fast", "target": "tensorrt"}, "8,float without --tune-ranges"),
        ({"tune_ranges": False}, "8,float without --tune-ranges"),
        ({"calibrator": "minmax"}, "8,float without --tune-ranges"),
    ):
        with pytest.raises(QconvError, match=told):
            Recipe(candidate_activation_bits=(8, 32), **options)
    assert Recipe(candidate_activation_bits=(8, 32), effort="fast").divides_by_statistics
    Recipe(candidate_activation_bits=(8, 32), effort="fast", tune_ranges=True)
    assert Recipe(candidate_activation_bits=(8,), data_free=True).high_precision is None  # nothing is chosen


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, 32),
        ({"target": "generic"}, None),
        ({"target": "tensorrt"}, None),
        ({"target": "generic", "float_budget": 0.1}, 32),
        ({"target": "openvino", "float_budget": 0.0}, None),
        ({"target": "tensorrt", "candidate_activation_bits": (8, 32)}, 32),
        ({"layer_bits": (("a", LayerBits(4)),)}, 32),
        ({"layer_bits": (("a", LayerBits(None, 32)),)}, None),
        ({"layer_bits": (("a", LayerBits(None, 32)),), "candidate_activation_bits": (8, 32)}, 32),
        ({"target": "generic", "candidate_activation_bits": (8, 16)}, 16),
        ({"target": "generic", "candidate_activation_bits": (32, 8, 16)}, 16),
        ({"target": "generic", "candidate_activation_bits": (8,)}, None),
        ({"activation_bits": 4}, None),
        ({"activation_bits": 16}, None),
    ],
)
def test_what_loud_tensors_get_in_place_of_8_bits(options: dict[str, Any], wanted: int | None) -> None:
    assert Recipe(**options).high_precision == wanted


def test_candidates_of_16_bits_ask_for_the_opset_that_has_them() -> None:
    """QuantizeLinear takes uint16 from opset 21 on."""
    recipe = Recipe(target="generic", candidate_activation_bits=(8, 16))
    assert needed_opset(recipe, 17) == 21
    assert needed_opset(replace(recipe, candidate_activation_bits=(8, 32)), 17) == 17
    with pytest.raises(QconvError, match="--opset 17 is below what these types need"):
        needed_opset(replace(recipe, opset=17), 13)


def test_candidates_for_activations_are_said_as_they_were_typed() -> None:
    recipe = Recipe(target="generic", candidate_activation_bits=(8, 16, 32))
    carried = recipe.as_dict(DataOptions())
    assert command_line_options(carried) == ["--candidate-activation-bits", "8,16,float", "--target", "generic"]
    assert recipe_from_dict(json.loads(json.dumps(carried))) == recipe
    assert recipe_lines(carried)["candidate-activation-bits"] == "8,16,float"


def test_a_path_is_as_good_as_its_text() -> None:
    assert DataOptions(Path("imgs")).paths == ("imgs",)  # type: ignore[arg-type]


def test_a_percentile_belongs_to_its_calibrator() -> None:
    assert Recipe(calibrator="percentile").percentile == 99.99
    assert Recipe(calibrator="percentile", percentile=99).percentile == 99
    assert Recipe().percentile is None
    with pytest.raises(QconvError, match="--percentile with --calibrator mse"):
        Recipe(calibrator="mse", percentile=99.0)
    with pytest.raises(QconvError, match="--percentile 50 is not possible"):
        Recipe(calibrator="percentile", percentile=50)


def test_an_effort_that_would_change_nothing_is_refused() -> None:
    with pytest.raises(QconvError, match="--effort best with nearest codes"):
        Recipe(effort="best", rounding="nearest")
    assert Recipe(effort="best").rounding == "second-order"


def test_a_search_rounds_as_its_result_would_be_rounded_without_it() -> None:
    search = {"target_size": 0.2}
    assert {effort: Recipe(effort=effort, **search).rounding for effort in ("fast", "balanced", "best")} == {  # type: ignore[arg-type]
        "fast": "nearest",
        "balanced": "second-order",
        "best": "second-order",
    }
    assert Recipe(rounding="nearest", **search).rounding == "nearest"  # type: ignore[arg-type]


def test_statistics_alone_round_to_the_nearest_and_images_beside_them_do_not() -> None:
    """What the recipe leaves open with statistics follows from the images, once these are known."""
    recipe = Recipe(stats="s.npz")
    assert recipe.rounding is None
    assert recipe.with_data(DataOptions()).rounding == "nearest"
    assert recipe.with_data(DataOptions(("imgs",))).rounding == "second-order"
    with pytest.raises(QconvError, match="--rounding second-order with --stats alone"):
        Recipe(stats="s.npz", rounding="second-order").with_data(DataOptions())


def test_the_recipe_of_a_file_has_its_keys_in_the_order_of_the_contract() -> None:
    """Images that shape the file stand first, how they are fed in front of what is embedded of that."""
    keys = list(Recipe().as_dict(DataOptions(("imgs",))))
    assert keys[:4] == ["samples", "seed", "glob", "weight_bits"]
    assert keys[keys.index("preprocessing") + 1] == "embed_preprocessing"
    assert not {"paths", "batch"} & set(keys)


def test_all_images_are_no_number() -> None:
    assert DataOptions(samples=None).samples is None
    with pytest.raises(QconvError, match="--samples 0 is not possible"):
        DataOptions(samples=0)
