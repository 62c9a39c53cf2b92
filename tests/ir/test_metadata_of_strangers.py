"""A file's metadata comes from anybody: whatever its `qconv.*` entries hold, no command ends in a traceback.

Oracle: the readers return what their types say or nothing, and every command ends with a result, with a QconvError, or
with a warning that names the entry.
"""

from __future__ import annotations

import base64
import json
import math
import tracemalloc
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qconv.cli.main import cli
from qconv.config.data_options import DataOptions, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.config.serialization import command_line_options, recipe_from_dict
from qconv.errors import QconvError
from qconv.ir import metadata
from tests.support.models import network

PREPROCESSING = {
    "preset": "imagenet",
    "source": "a test",
    "color": "rgb",
    "scale": 1 / 255,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "layout": "nchw",
    "resize": "auto",
    "filter": "bilinear",
    "size": [8, 8],
    "class_vector": True,
    "embedded": {"preset": "unit", "scale": 1 / 255, "mean": [0.0], "std": [1.0], "layout": "nchw"},
}


def record(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


def equalization() -> str:
    props: dict[str, str] = {}
    metadata.write_equalization(props, {"a": metadata.round_log_scale(np.full(3, 0.5))}, {"b": np.ones(2, np.float32)})
    return props[metadata.EQUALIZATION_KEY]


VALID: dict[str, str] = {
    metadata.VERSION_KEY: "1.2.3",
    metadata.RECIPE_KEY: json.dumps(Recipe(keep_float=("a*",)).as_dict(DataOptions(("x",)))),
    metadata.PREPROCESSING_KEY: json.dumps(PREPROCESSING),
    metadata.PLACED_KEY: json.dumps({"faster in float": ["a", "b"], "accuracy: 3 dB": ["c"]}),
    metadata.FLOAT_MODEL_KEY: "0" * 64,
    metadata.EQUALIZATION_KEY: equalization(),
    metadata.FINETUNING_KEY: json.dumps({"step": 3}),
}

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**19), 2**31])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", "purple", "none", "nchw", "per-block"])
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def mutated(draw: st.DrawFn, known: Mapping[str, Any]) -> str:
    """A valid object with some of its members replaced or left out."""
    found = dict(known)
    for name in draw(st.lists(st.sampled_from(sorted(found)), min_size=1, max_size=3)):
        if draw(st.booleans()):
            found[name] = draw(anything)
        else:
            found.pop(name, None)
    return json.dumps(found)


places = st.tuples(*[st.integers(-2, 9) | st.sampled_from([2**31, 2**63, 10**30])] * 2)
heads = st.dictionaries(
    st.sampled_from(["scales", "shifts", "else"]),
    anything | st.dictionaries(st.text(max_size=3), places | st.lists(scalars, max_size=3), max_size=3),
)
values = st.one_of(
    st.text(),
    anything.map(json.dumps),
    st.sampled_from(["[" * 100_000, "1" * 5000, '{"a":' * 5000, "NaN", ""]),
    mutated(json.loads(VALID[metadata.RECIPE_KEY])),
    mutated(PREPROCESSING),
    st.binary(max_size=40).map(record),
    st.tuples(heads, st.binary(max_size=40)).map(lambda both: record(json.dumps(both[0]).encode() + b"\n" + both[1])),
    st.sampled_from([*VALID.values()]),
)


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(VALID, values)))
def test_readers_take_whatever_stands_there(props: dict[str, str]) -> None:
    version = metadata.read_version(props)
    assert version is None or version.isascii()
    placed = metadata.read_placed_nodes(props)
    assert all(type(word) is str for word in (*placed, *placed.values()))
    "".join((*placed, *placed.values())).encode()
    recipe = metadata.read_recipe(props)
    assert type(recipe) is dict
    assert isinstance(recipe_from_dict(recipe), Recipe | None)
    "".join(command_line_options(recipe)).encode()
    shown = metadata.read_preprocessing_dict(props)
    json.dumps([recipe, shown], ensure_ascii=False).encode()
    for options in (metadata.read_preprocessing(props), metadata.read_float_preprocessing(props)):
        assert isinstance(options, PreprocessingOptions | None)
        assert options is None or (options.size is not None and 1 <= np.prod(options.size) <= metadata.MOST_PIXELS)
    moves = metadata.read_equalization(props)
    x = np.ones((1, 3, 2, 2), np.float32)
    with np.errstate(all="raise", under="ignore"):
        for name in (*moves.scales, *moves.shifts):
            moves.back(name, moves.moved(name, x))
    metadata.write_equalization(props, {"a": metadata.round_log_scale(np.full(3, 0.5))}, {})
    assert "a" in metadata.read_equalization(props).scales


JSON_VALUES = (None, True, 5, -1, 10**400, math.nan, "text", "\ud800", [], {}, [[]], [{}], {"a": 1}, [1], [None])
JSON_VALUES += ([["a", {"weights": "x"}]], {"measure": "sqnr", "value": "x"}, {"measure": [], "value": {}})


@pytest.mark.parametrize("name", [*Recipe().as_dict(DataOptions(("x",))), "unknown"])
def test_a_recipe_of_other_types_is_none(name: str) -> None:
    for value in JSON_VALUES:
        for base in (Recipe().as_dict(DataOptions(("x",))), {"target": "nowhere"}):
            assert isinstance(recipe_from_dict({**base, name: value}), Recipe | None)
            assert all(type(word) is str for word in command_line_options({**base, name: value}))


@pytest.mark.parametrize("name", PREPROCESSING)
def test_a_preprocessing_of_other_types_is_none(name: str) -> None:
    for value in JSON_VALUES:
        props = {metadata.PREPROCESSING_KEY: json.dumps({**PREPROCESSING, name: value})}
        told = metadata.read_preprocessing(props), metadata.read_float_preprocessing(props)
        assert all(isinstance(options, PreprocessingOptions | None) for options in told)
        assert (None in told) == bool(metadata.describe_odd_metadata(props))


def test_what_qconv_writes_is_not_odd() -> None:
    assert metadata.describe_odd_metadata(VALID) == []
    assert metadata.describe_odd_metadata({}) == []
    own, inside = metadata.read_preprocessing(VALID), metadata.read_float_preprocessing(VALID)
    assert own is not None
    assert inside is not None
    assert (own.preset, own.mean, inside.preset, inside.mean) == ("imagenet", (0.485, 0.456, 0.406), "unit", (0.0,))


ODD: dict[str, tuple[str, str, str]] = {
    "a color": (metadata.PREPROCESSING_KEY, json.dumps({**PREPROCESSING, "color": "purple"}), "color purple"),
    "a preset": (metadata.PREPROCESSING_KEY, json.dumps({**PREPROCESSING, "preset": "mine"}), "mine"),
    "a size": (metadata.PREPROCESSING_KEY, json.dumps({**PREPROCESSING, "size": [1 << 20, 1 << 20]}), "1048576"),
    "a side": (metadata.PREPROCESSING_KEY, json.dumps({**PREPROCESSING, "resize": True}), "resize True"),
    "a mean": (metadata.PREPROCESSING_KEY, json.dumps({**PREPROCESSING, "mean": [1, 2]}), "mean"),
    "a part": (metadata.PREPROCESSING_KEY, "{}", "lacks 'preset'"),
    "a list": (metadata.RECIPE_KEY, "[]", "a list, not an object"),
    "no JSON": (metadata.RECIPE_KEY, "{", "no JSON"),
    "names": (metadata.PLACED_KEY, '{"why": [1]}', "names"),
    "a name": (metadata.PLACED_KEY, '{"why": "a"}', "names"),
    "numbers without reasons": (metadata.PLACED_KEY, '["a", 1]', "names"),
    "a version": (metadata.VERSION_KEY, "1\n2", "version"),
    "a list packed": (metadata.EQUALIZATION_KEY, record(b"[]\n"), "record"),
    "a cut record": (
        metadata.EQUALIZATION_KEY,
        base64.b64encode(zlib.compress(b"{}\n" + bytes(range(99)))[:-5]).decode(),
        "cut",
    ),
    "a place far off": (metadata.EQUALIZATION_KEY, record(b'{"scales":{"x":[0,%d]}}\n' % 10**30), "record"),
    "a start far off": (metadata.EQUALIZATION_KEY, record(b'{"shifts":{"x":[%d,1]}}\n' % 10**30), "record"),
    "NaN": (
        metadata.EQUALIZATION_KEY,
        record(b'{"shifts":{"b":[0,1]}}\n' + np.array([np.nan], "<f4").tobytes()),
        "record",
    ),
}


@pytest.mark.parametrize(("key", "text", "why"), ODD.values(), ids=ODD)
def test_what_is_odd_is_named(key: str, text: str, why: str) -> None:
    (found,) = metadata.describe_odd_metadata({**VALID, key: text})
    assert key in found
    assert why in found
    assert "--" not in found  # nobody has typed an option


def test_a_record_is_not_unpacked_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty kilobytes that would be sixty megabytes."""
    monkeypatch.setattr(metadata, "MOST_UNPACKED_BYTES", 1 << 20)
    props = {metadata.EQUALIZATION_KEY: record(bytes(1 << 26))}
    tracemalloc.start()
    try:
        assert not metadata.read_equalization(props)
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()
    assert "it unpacks to more than 1 MiB" in metadata.describe_odd_metadata(props)[0]


# -- commands ----------------------------------------------------------------------------------------------------------

BAD_VALUES = ("", "\x00", "[" * 100_000, "null", "3", '"text"', "[]", '[[],{"a":1}]', "{}", '{"keep_float":3}', "AAAA")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("strangers")
    images = place / "imgs"
    images.mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(images / f"{index}.png")
    onnx.save(
        network(
            "c = Conv(x, w)  r = Relu(c)  p = GlobalAveragePool(r)  f = Flatten(p)  y = Gemm(f, v)",
            x=(1, 3, 8, 8),
            w=(4, 3, 3, 3),
            v=(4, 5),
        ),
        place / "float.onnx",
    )
    made = run(place, "quantize", "float.onnx", "--calib", "imgs", "-o", "int8.onnx", "--effort", "fast")
    assert made.exit_code == 0, made.output
    return place


def run(place: Path, *words: str) -> Any:
    paths = [str(place / word) if "." in word or word == "imgs" else word for word in words]
    return CliRunner().invoke(cli, paths)


def with_metadata(place: Path, name: str, entries: Mapping[str, str]) -> str:
    proto = onnx.load(place / name)
    known = {entry.key: entry.value for entry in proto.metadata_props} | dict(entries)
    onnx.helper.set_model_props(proto, known)
    onnx.save(proto, place / f"odd_{name}")
    return f"odd_{name}"


COMMANDS: dict[str, Callable[[str, str], tuple[str, ...]]] = {
    "audit": lambda odd, odd_float: ("audit", odd),
    "inspect": lambda odd, odd_float: ("inspect", odd),
    "compare": lambda odd, odd_float: ("compare", "float.onnx", odd, "--images", "imgs"),
    "evaluate": lambda odd, odd_float: ("evaluate", odd, "--images", "imgs", "--against", "float.onnx"),
    "quantize": lambda odd, odd_float: (
        ("quantize", odd_float, "--calib", "imgs", "-o", "out.onnx", "--effort", "fast")
    ),
}


@pytest.mark.parametrize("value", BAD_VALUES, ids=range(len(BAD_VALUES)))
def test_commands_take_whatever_stands_there(folder: Path, value: str) -> None:
    entries = dict.fromkeys(VALID, value)
    odd, odd_float = (with_metadata(folder, name, entries) for name in ("int8.onnx", "float.onnx"))
    for name, words in COMMANDS.items():
        found = run(folder, *words(odd, odd_float))
        assert found.exception is None or isinstance(found.exception, QconvError | SystemExit), (name, found.exception)
        assert found.exit_code in (0, 1), (name, found.output)


@pytest.mark.parametrize(
    "part", [{"color": "purple"}, {"color": "grey", "mean": [0.5], "std": [1.0]}, {"size": [9, 9]}]
)
def test_a_preprocessing_that_cannot_be_is_ignored_and_told(folder: Path, part: dict[str, Any]) -> None:
    told = {**PREPROCESSING, "embedded": None, **part}
    odd, odd_float = (
        with_metadata(folder, name, {metadata.PREPROCESSING_KEY: json.dumps(told)})
        for name in ("int8.onnx", "float.onnx")
    )
    for name in ("evaluate", "quantize"):
        found = run(folder, *COMMANDS[name](odd, odd_float))
        assert found.exit_code == 0, (name, found.output, found.exception)
        if name == "evaluate" or "size" not in part:  # the network's own size wins
            assert "ignored" in found.output, (name, found.output)


def test_what_is_ignored_is_told_once(folder: Path) -> None:
    odd = with_metadata(folder, "float.onnx", {metadata.PREPROCESSING_KEY: "{}"})
    found = run(folder, "evaluate", odd, "--images", "imgs", "--against", "int8.onnx")
    assert "qconv.preprocessing is odd" in found.output, found.output
    assert " ".join(found.output.split()).count("qconv.preprocessing is odd") == 1


def test_control_characters_of_a_stranger_do_not_reach_the_terminal(folder: Path) -> None:
    """They could write over what was printed before, or set the title of the window."""
    recipe = json.loads(VALID[metadata.RECIPE_KEY]) | {"keep_float": ["\x1b[2J\x9b1m"]}
    odd = with_metadata(folder, "int8.onnx", {metadata.RECIPE_KEY: json.dumps(recipe)})
    found = run(folder, "inspect", odd)
    assert "\\x1b[2J\\x9b1m" in found.output
    assert not {"\x1b", "\x9b"} & set(found.output)


def test_names_without_reasons_are_those_of_older_files() -> None:
    """Which left nothing in float but for times."""
    assert metadata.read_placed_nodes({metadata.PLACED_KEY: '["a", "b"]'}) == dict.fromkeys("ab", "faster in float")
