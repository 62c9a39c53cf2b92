"""The normalisation inside the model.

Oracle: ONNX Runtime on the original model, fed with pixels that numpy normalised as `qconv manual preprocessing` says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image

from qconv.config.choices import Scheme, WeightGranularity
from qconv.config.data_options import (
    PRESETS,
    Color,
    DataOptions,
    Layout,
    Preprocessing,
    PreprocessingOptions,
    ResizeFilter,
)
from qconv.config.recipe import Recipe, make_request
from qconv.data.loader import DataLoader
from qconv.errors import Change, Finding, QconvError, Skipped
from qconv.ir.files import Source
from qconv.ir.model import Model
from qconv.passes import fold
from qconv.passes.embed_preprocessing import embed_preprocessing
from qconv.pipeline.quantize import quantize
from qconv.reporter import Reporter
from qconv.results.quantize import Report
from qconv.runtime.session import Session
from tests.support.libraries import MOVES_CODES, ZERO_POINTS, needs, skip_without
from tests.support.models import Constant, ints, loaded, network, statistics

RGB = (3, 12, 10)  # channels, height, width
WHOLE = {"scale": 1.0, "mean": (120.0, 110.0, 99.0), "std": (58.0, 57.0, 60.0)}  # means that are pixels
ALIKE = {"scale": 1.0, "mean": (127.0,), "std": (128.0,)}
IMAGENET = {name: getattr(PRESETS["imagenet"], name) for name in ("scale", "mean", "std")}
TF = {name: getattr(PRESETS["tf"], name) for name in ("scale", "mean", "std")}
NORMS = {"whole": WHOLE, "alike": ALIKE, "imagenet": IMAGENET, "tf": TF}
SAME = "pads=[1,1,1,1]"


def prep(norm: dict[str, Any], layout: Layout = Layout.NCHW, *, color: Color = Color.RGB) -> Preprocessing:
    _, height, width = RGB
    base = Preprocessing(
        "raw", "the test", color, 1.0, (0.0,), (1.0,), layout, "exact", ResizeFilter.BILINEAR, (height, width), False
    )
    return replace(base, **norm)


def pixels(count: int = 2, shape: Sequence[int] = RGB) -> NDArray[np.uint8]:
    """Random pixels (N, C, H, W), the extremes among them."""
    found = np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)
    found[:, :, 0, :2] = 0, 255
    return found


def in_layout(array: NDArray[Any], layout: Layout) -> NDArray[Any]:
    return np.ascontiguousarray(array if layout is Layout.NCHW else array.transpose(0, 2, 3, 1))


def by_numpy(raw: NDArray[np.uint8], norm: dict[str, Any]) -> NDArray[np.float32]:
    mean, std = (np.asarray(norm[name], np.float32).reshape(-1, 1, 1) for name in ("mean", "std"))
    return (raw.astype(np.float32) * np.float32(norm["scale"]) - mean) / std


class Embedded:
    """A network before and after, on the same pictures."""

    def __init__(
        self, proto: onnx.ModelProto, norm: dict[str, Any], layout: Layout, own: Layout = Layout.NCHW, **more: Any
    ) -> None:
        self.model: Model = loaded(proto)
        fold.run_float_passes(self.model)
        self.findings: list[Finding] = embed_preprocessing(self.model, prep(norm, own, **more), layout)
        self.proto = self.model.proto()
        onnx.checker.check_model(self.proto, full_check=True)
        shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
        raw = pixels(shape[0] or 2, (shape[1 if own is Layout.NCHW else 3], *RGB[1:]))
        kind = helper.tensor_dtype_to_np_dtype(proto.graph.input[0].type.tensor_type.elem_type)
        name = proto.graph.input[0].name
        session = Session(proto.SerializeToString(), optimize=False, threads=1)
        floats = by_numpy(raw, norm) if kind != np.uint8 else raw
        self.want = session.run_all({name: in_layout(floats, own).astype(kind)})
        self.got, self.fast = (
            Session(self.proto.SerializeToString(), optimize=optimize, threads=1).run_all(
                {name: in_layout(raw, layout)}
            )
            for optimize in (False, True)
        )

    @property
    def ops(self) -> list[str]:
        return [node.op_type for node in self.model.nodes()]

    def assert_equal(self, margin: int = 0) -> None:
        """All outputs equal up to float rounding; `margin`: but for so many rows and columns at each border."""
        for want, got, fast in zip(self.want, self.got, self.fast, strict=True):
            assert got.dtype == want.dtype
            cut = slice(margin, -margin or None)
            inner = (..., cut, cut) if want.ndim == 4 else ...
            tolerance = 2e-5 * max(np.abs(want).max(), 1)
            assert np.abs(got[inner] - want[inner]).max() <= tolerance
            assert np.abs(fast[inner] - want[inner]).max() <= tolerance


W, B = {"w": (4, 3, 3, 3)}, {"w": (4, 3, 3, 3), "b": (4,)}
FIRST_CONVS: dict[str, tuple[str, dict[str, Constant]]] = {
    "padded": (f"y = Conv<{SAME}>(x, w, b)", B),
    "no bias": (f"y = Conv<{SAME}>(x, w)", W),
    "valid": ("y = Conv(x, w, b)", B),
    "named valid": ('y = Conv<auto_pad="VALID">(x, w, b)', B),
    "uneven pads": ("y = Conv<pads=[0,1,2,3], strides=[2,1]>(x, w, b)", B),
    "dilated": ("y = Conv<pads=[2,3,2,3], dilations=[2,3]>(x, w)", W),
    "same": ('y = Conv<auto_pad="SAME_UPPER", strides=[2,3]>(x, w, b)', B),
    "same lower": ('y = Conv<auto_pad="SAME_LOWER", strides=[3,1]>(x, w, b)', B),
    "same, large steps": ('y = Conv<auto_pad="SAME_UPPER", strides=[4,5]>(x, w, b)', B),
    "even kernel": ('y = Conv<auto_pad="SAME_LOWER">(x, w)', {"w": (4, 3, 2, 4)}),
    "depthwise": (f"y = Conv<group=3, {SAME}>(x, w, b)", {"w": (6, 1, 3, 3), "b": (6,)}),
    "normalised behind": (
        f"c = Conv<{SAME}>(x, w) y = BatchNormalization(c, gamma, beta, mean, var)",
        W | statistics(4),
    ),
    "pad in front": ("p = Pad(x, widths) y = Conv(p, w, b)", B | {"widths": ints(0, 0, 1, 2, 0, 0, 0, 1)}),
}
CHANGES_TYPE = ("Cast", "Sub", "Div", "Mul", "Add")


def _skip_wrong_steps(body: str) -> None:
    if body == "same, large steps":
        skip_without("onnxruntime", "1.20", "older ones pad where steps are larger than kernels, and should not")


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("norm", ["whole", "alike"])
@pytest.mark.parametrize("body", FIRST_CONVS)
def test_a_first_conv_takes_pixels(body: str, norm: str, layout: Layout) -> None:
    """Means that are pixels: exact at the border, too."""
    _skip_wrong_steps(body)
    text, numbers = FIRST_CONVS[body]
    found = Embedded(network(text, ("N", *RGB), **numbers), NORMS[norm], layout)
    found.assert_equal()
    assert not set(found.ops) & set(CHANGES_TYPE)
    assert [type(finding) for finding in found.findings] == [Change]
    if norm == "alike":
        assert "Pad" not in found.ops


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("norm", ["imagenet", "tf"])
def test_padding_is_rounded_to_a_whole_pixel(norm: str, layout: Layout) -> None:
    """Equal inside; at the border at most half a pixel times all weights of an output apart."""
    found = Embedded(network(f"y = Conv<{SAME}>(x, w, b)", ("N", *RGB), **B), NORMS[norm], layout)
    found.assert_equal(margin=1)
    weight = np.abs(loaded(network("y = Conv(x, w)", **W)).graph.initializers["w"].const_value.numpy()).sum((0, 2, 3))
    gain = NORMS[norm]["scale"] / np.asarray(NORMS[norm]["std"])
    assert np.abs(found.got[0] - found.want[0]).max() <= (weight * gain).sum() / 2
    (change,) = found.findings
    assert isinstance(change, Change)
    assert change.what.endswith("[124, 116, 104]" if norm == "imagenet" else "[128, 128, 128]")
    assert ("Pad" in found.ops) == (norm == "imagenet")


TURNED = "t = Transpose<perm=[0,3,1,2]>(x) "
OWN: dict[str, tuple[str, dict[str, Constant]]] = {
    "sub and mul": ("a = Sub(x, k) m = Mul(a, l) ", {"k": np.float32([1, 2, 0.5]).reshape(3, 1, 1), "l": 0.5}),
    "div": ("m = Div(x, l) ", {"l": -3.0}),
    "constant first": ("m = Sub(l, x) ", {"l": 0.5}),
    "statistics": ("m = BatchNormalization(x, gamma, beta, mean, var) ", statistics(3)),
}


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("own", OWN)
def test_what_the_network_does_to_its_input_goes_along(own: str, layout: Layout) -> None:
    """Unpadded, so that no pixel need stand for zero."""
    text, numbers = OWN[own]
    found = Embedded(network(f"{text}y = Conv(m, w, b)", ("N", *RGB), **B, **numbers), WHOLE, layout)
    found.assert_equal()
    assert not set(found.ops) & set(CHANGES_TYPE)


@pytest.mark.parametrize("layout", Layout)
def test_networks_that_normalise_themselves(layout: Layout) -> None:
    """Raw pixels in, a padded Conv behind: folding alone cannot take the shift, pixels can."""
    proto = network(
        f"a = Sub(x, k) m = Div(a, l) y = Conv<{SAME}>(m, w, b)",
        ("N", *RGB),
        k=np.float32([120, 110, 99]).reshape(1, 3, 1, 1),
        l=58.0,
        **B,
    )
    found = Embedded(proto, {"scale": 1.0, "mean": (0.0,), "std": (1.0,)}, layout)
    found.assert_equal()
    assert not set(found.ops) & set(CHANGES_TYPE)


@pytest.mark.parametrize("norm", ["whole", "alike"])
@pytest.mark.parametrize("layout", Layout)
def test_channels_last(norm: str, layout: Layout) -> None:
    """A network that turns its input itself turns pixels, or nothing if they come as its layers want them."""
    proto = network(f"{TURNED}y = Conv<{SAME}>(t, w, b)", ("N", *RGB[1:], 3), **B)
    found = Embedded(proto, NORMS[norm], layout, own=Layout.NHWC)
    found.assert_equal()
    assert found.ops.count("Transpose") == (layout is Layout.NHWC)


def test_channels_last_with_its_own_normalisation() -> None:
    """Constants lie along the last axis there."""
    proto = network(
        f"a = Sub(x, k) m = Mul(a, l) t = Transpose<perm=[0,3,1,2]>(m) y = Conv<{SAME}>(t, w, b)",
        ("N", *RGB[1:], 3),
        k=np.float32([120, 110, 99]),
        l=np.float32([0.1, 0.2, 0.3]),
        **B,
    )
    found = Embedded(proto, {"scale": 1.0, "mean": (0.0,), "std": (1.0,)}, Layout.NHWC, own=Layout.NHWC)
    found.assert_equal()
    assert not set(found.ops) & set(CHANGES_TYPE)


@pytest.mark.parametrize("layout", Layout)
def test_grey(layout: Layout) -> None:
    proto = network(f"y = Conv<{SAME}>(x, w)", ("N", 1, *RGB[1:]), w=(4, 1, 3, 3))
    found = Embedded(proto, {"scale": 1 / 255, "mean": (0.13,), "std": (0.31,)}, layout, color=Color.GREY)
    found.assert_equal(margin=1)
    assert "Pad" not in found.ops


@pytest.mark.parametrize("layout", Layout)
def test_grey_channels_moved_by_a_reshape(layout: Layout) -> None:
    """Exporters write so instead of a Transpose."""
    for batch, shape in (("N", ints(-1, 1, 12, 10)), (2, ints(2, 1, 12, 10))):
        proto = network(f"t = Reshape(x, s) y = Conv<{SAME}>(t, w)", (batch, 12, 10, 1), s=shape, w=(4, 1, 3, 3))
        norm = {"scale": 1.0, "mean": (33.0,), "std": (78.5,)}
        found = Embedded(proto, norm, layout, own=Layout.NHWC, color=Color.GREY)
        found.assert_equal()
        assert "Reshape" not in found.ops


def test_a_reshape_that_mixes_is_no_transpose() -> None:
    for shape in (ints(-1, 1, 10, 12), ints(-1, 2, 6, 10)):
        channels = int(shape[1])
        proto = network("t = Reshape(x, s) y = Conv(t, w)", ("N", 12, 10, 1), s=shape, w=(4, channels, 3, 3))
        norm = {"scale": 1 / 255, "mean": (0.13,), "std": (0.31,)}
        found = Embedded(proto, norm, Layout.NHWC, own=Layout.NHWC, color=Color.GREY)
        found.assert_equal()
        assert "Reshape" in found.ops


@pytest.mark.parametrize("layout", Layout)
def test_height_and_width_swapped(layout: Layout) -> None:
    proto = network("t = Transpose<perm=[0,1,3,2]>(x) y = Conv<pads=[0,1,2,3]>(t, w, b)", ("N", *RGB), **B)
    Embedded(proto, WHOLE, layout).assert_equal()


def test_a_branch_reads_the_pixels() -> None:
    """Bodies of If see the outer graph: what they read stays what it was."""
    body = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["then"])], "b", [], [helper.make_tensor_value_info("then", 1, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["else"])], "o", [], [helper.make_tensor_value_info("else", 1, None)]
    )
    proto = network(f"y = Conv<{SAME}>(x, w, b) z = Neg(x)", ("N", *RGB), ("y", "z"), flag=np.array(True), **B)
    proto.graph.node[1].CopyFrom(helper.make_node("If", ["flag"], ["z"], "choice", then_branch=body, else_branch=other))
    found = Embedded(proto, WHOLE, Layout.NHWC)
    found.assert_equal()
    assert "Cast" in found.ops


def test_two_convs_read_the_pixels() -> None:
    """Both pad, one more than the other."""
    body = f"c = Conv<{SAME}>(x, w, b) d = Conv<pads=[2,2,2,2]>(x, v) y = Concat<axis=1>(c, d)"
    found = Embedded(network(body, ("N", *RGB), v=(2, 3, 5, 5), **B), WHOLE, Layout.NHWC)
    found.assert_equal()
    assert len(found.findings) == 2


MIXED: dict[str, tuple[str, Sequence[str], dict[str, Constant]]] = {
    "max pool": (f"p = MaxPool<kernel_shape=[2,2]>(x) y = Conv<{SAME}>(p, w, b)", ("y",), B),
    "transposed conv": ("y = ConvTranspose<strides=[2,2]>(x, v)", ("y",), {"v": (3, 4, 2, 2)}),
    "added at the end": (f"c = Conv<{SAME}>(x, w) r = Relu(c) y = Add(r, x)", ("y",), {"w": (3, 3, 3, 3)}),
    "returned": (f"y = Conv<{SAME}>(x, w, b) z = Identity(x)", ("y", "z"), B),
    "clipped": (f"r = Relu(x) y = Conv<{SAME}>(r, w, b)", ("y",), B),
    "other constants": ("m = Mul(x, k) y = Conv(m, w, b)", ("y",), B | {"k": (12, 10)}),
}


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("norm", ["whole", "alike"])
@pytest.mark.parametrize("body", MIXED)
def test_other_readers_get_what_they_had(body: str, norm: str, layout: Layout) -> None:
    """In float, said so; where all channels are alike, as codes."""
    text, outputs, numbers = MIXED[body]
    found = Embedded(network(text, ("N", *RGB), outputs, **numbers), NORMS[norm], layout)
    found.assert_equal()
    told = [finding for finding in found.findings if isinstance(finding, Skipped)]
    assert ("Cast" in found.ops) == (norm == "whole") == bool(told)


def test_padding_that_no_pixel_stands_for() -> None:
    """A mean below black: no code for zero."""
    proto = network(f"y = Conv<{SAME}>(x, w, b)", ("N", *RGB), **B)
    found = Embedded(proto, {"scale": 1.0, "mean": (-5.0, 3.0, 7.0), "std": (1.0,)}, Layout.NCHW)
    found.assert_equal()
    (told,) = found.findings
    assert isinstance(told, Skipped)
    assert "which no pixel stands for" in told.why


def test_what_folding_can_move_is_moved() -> None:
    """Through a MaxPool into an unpadded Conv, and through a Flatten into a Gemm."""
    for body, numbers in (
        ("p = MaxPool<kernel_shape=[2,2]>(x) y = Conv(p, w, b)", B),
        ("f = Flatten(x) y = Gemm(f, g)", {"g": (360, 5)}),
    ):
        found = Embedded(network(body, (2, *RGB), **numbers), WHOLE, Layout.NHWC)
        found.assert_equal()
        assert not set(found.ops) & set(CHANGES_TYPE)
        assert all(isinstance(finding, Change) for finding in found.findings)


@pytest.mark.parametrize("own", Layout)
@pytest.mark.parametrize("layout", Layout)
def test_the_shape_of_the_input_stays_what_it_was(own: Layout, layout: Layout) -> None:
    """Exporters ask for it, to reshape the result."""
    shape = ("N", *RGB) if own is Layout.NCHW else ("N", *RGB[1:], 3)
    lead = "t = Identity(x) " if own is Layout.NCHW else TURNED
    body = f"{lead} s = Shape(x) u = Shape(t) y = Conv<{SAME}>(t, w, b)"
    found = Embedded(network(body, shape, ("y", "s", "u"), **B), WHOLE, layout, own=own)
    found.assert_equal()


def test_a_part_of_the_shape() -> None:
    body = f"s = Shape<start=1, end=-1>(x) u = Shape<start=-1>(x) y = Conv<{SAME}>(x, w, b)"
    Embedded(network(body, ("N", *RGB), ("y", "s", "u"), **B), WHOLE, Layout.NHWC).assert_equal()


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_other_floats(kind: int) -> None:
    """A float16 or float64 input behind which the network works in float32."""
    proto = network(f"h = Cast<to=1>(x) y = Conv<{SAME}>(h, w, b)", ("N", *RGB), **B)
    proto.graph.input[0].type.tensor_type.elem_type = kind
    found = Embedded(proto, ALIKE, Layout.NHWC)
    found.assert_equal()
    assert "Cast" not in found.ops


def test_a_network_in_double() -> None:
    proto = network("f = Flatten(x) y = MatMul(f, g)", ("N", *RGB), g=(360, 5))
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(float), tensor.name))
    found = Embedded(proto, WHOLE, Layout.NHWC)
    found.assert_equal()
    assert "Cast" in found.ops


@pytest.mark.parametrize("layout", Layout)
def test_networks_that_take_pixels_already(layout: Layout) -> None:
    """Their own Cast becomes the dequantizer."""
    body = f"h = Cast<to=1>(x) m = Mul(h, k) s = Sub(m, l) y = Conv<{SAME}>(s, w, b)"
    proto = network(body, ("N", *RGB), k=1 / 127.0, l=1.0, **B)
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    found = Embedded(proto, {"scale": 1.0, "mean": (0.0,), "std": (1.0,)}, layout)
    found.assert_equal()
    assert not set(found.ops) & set(CHANGES_TYPE)


def test_pixels_that_are_not_made_numbers_of_at_once() -> None:
    body = f"g = Gather<axis=1>(x, order) h = Cast<to=1>(g) y = Conv<{SAME}>(h, w, b)"
    proto = network(body, ("N", *RGB), order=ints(2, 1, 0), **B)
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    found = Embedded(proto, {"scale": 1.0, "mean": (0.0,), "std": (1.0,)}, Layout.NHWC)
    found.assert_equal()
    (told,) = found.findings
    assert isinstance(told, Skipped)


def test_the_name_of_an_open_batch_stays() -> None:
    proto = network(f"y = Conv<{SAME}>(x, w)", ("batch", 3, "high", "wide"), **W)
    model = loaded(proto)
    embed_preprocessing(model, prep(WHOLE), Layout.NHWC)
    (value,) = model.proto().graph.input
    found = value.type.tensor_type
    assert [d.dim_param or d.dim_value for d in found.shape.dim] == ["batch", "high", "wide", 3]
    assert found.elem_type == TensorProto.UINT8


def test_a_size_that_decides_on_the_padding_must_be_known() -> None:
    proto = network('y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w)', ("N", 3, "H", "W"), **W)
    for norm, type_of_finding in ((WHOLE, Skipped), (ALIKE, Change)):
        found = Embedded(proto, norm, Layout.NCHW)
        found.assert_equal()
        assert [type(finding) for finding in found.findings] == [type_of_finding]


def test_a_model_that_returns_its_input() -> None:
    proto = network("y = Conv(x, w)", ("N", *RGB), **W)
    proto.graph.output.append(proto.graph.input[0])
    with pytest.raises(QconvError, match="returns its input"):
        embed_preprocessing(loaded(proto), prep(WHOLE), Layout.NCHW)


# -- the whole story ---------------------------------------------------------------------------------------------------

BODY = f"""
    c = Conv<{SAME}, strides=[2,2]>(x, w, b) r = Relu(c) d = Conv<{SAME}>(r, v) e = Relu(d)
    p = GlobalAveragePool(e) f = Flatten(p) y = Gemm(f, g)
"""
WEIGHTS: dict[str, Constant] = {"w": (8, 3, 3, 3), "b": (8,), "v": (12, 8, 3, 3), "g": (12, 10)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """12 pictures with a different colour in each."""
    place = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        rng = np.random.default_rng(number)
        tint = rng.integers(0, 200, 3)
        Image.fromarray((tint + rng.integers(0, 56, (12, 10, 3))).astype(np.uint8)).save(place / f"{number:02}.png")
    return str(place)


def quantized(proto: onnx.ModelProto, folder: str, **options: Any) -> tuple[Report, onnx.ModelProto]:
    defaults = {"calib": (folder,), "embed_preprocessing": Layout.NHWC, "threads": 1, "rounding": "nearest"}
    settings = defaults | options
    report, data = quantize(Source("the model", None, proto.SerializeToString()), None, *make_request(settings))
    assert data is not None
    result = onnx.load_from_string(data)
    onnx.checker.check_model(result, full_check=True)
    return report, result


def from_folder(folder: str) -> NDArray[np.uint8]:
    """(N, H, W, C)"""
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(Path(folder).iterdir())])


def deep(x: Sequence[int | str] = ("N", *RGB)) -> onnx.ModelProto:
    return network(BODY, x, **WEIGHTS)


def sqnr(report: Report) -> float:
    assert report.verify.sqnr_db is not None
    return report.verify.sqnr_db


@needs("onnxruntime", "1.22", MOVES_CODES)
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_file_takes_pixels_and_agrees(folder: str, preset: str, layout: Layout) -> None:
    """As good as the file that takes floats; nothing is left in float; the report's SQNR is that of its definition."""
    options = PreprocessingOptions(preset=preset)
    plain, _ = quantized(deep(), folder, embed_preprocessing=None, preprocessing=options)
    report, result = quantized(deep(), folder, embed_preprocessing=layout, preprocessing=options, min_sqnr=-9.0)
    assert report.audit.float == 0
    assert sqnr(report) > sqnr(plain) - 1.5
    assert not {"QuantizeLinear", "Cast"} & {node.op_type for node in result.graph.node if "x" in node.input}
    shown = from_folder(folder)[..., :: -1 if PRESETS[preset].color is Color.BGR else 1]
    raw = np.ascontiguousarray(shown.transpose(0, 3, 1, 2))
    norm = {name: getattr(PRESETS[preset], name) for name in ("scale", "mean", "std")}
    (want,) = Session(deep().SerializeToString(), threads=1).run_all({"x": by_numpy(raw, norm)})
    (got,) = Session(result.SerializeToString(), threads=1).run_all({"x": in_layout(raw, layout)})
    noise = np.sum((want.astype(np.float64) - got) ** 2)
    assert sqnr(report) == pytest.approx(10 * np.log10(np.sum(want.astype(np.float64) ** 2) / noise), abs=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_bits": 4},
        {"weight_bits": 4, "pack": True, "edge_bits": 4},
        {"weight_bits": 16},
        {"edge_bits": 16},
        {"weight_granularity": WeightGranularity.PER_TENSOR},
        {"weight_granularity": WeightGranularity.PER_BLOCK, "block_size": 2},
        {"weight_scheme": Scheme.ASYMMETRIC},
        {"activation_scheme": Scheme.SYMMETRIC},
        {"activation_bits": 6},
        {"activation_bits": 4, "edge_bits": 2},
        {"activation_bits": 16},
        {"activation_bits": 32},
        {"opset": 21},
        {"keep_float": ("c",)},
        {"keep_float_op": ("Conv",)},
        {"batch": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("preset", ["imagenet", "tf"])
def test_every_recipe(folder: str, preset: str, options: dict[str, Any]) -> None:
    """About as good as without, and pixels have 8 bits and a step of one pixel throughout."""
    if options.get("weight_scheme") == "asymmetric":
        skip_without("onnxruntime", "1.28", ZERO_POINTS)
    options = {"preprocessing": PreprocessingOptions(preset=preset)} | options
    plain, _ = quantized(deep(), folder, embed_preprocessing=None, **options)
    report, result = quantized(deep(), folder, **options)
    assert sqnr(report) > sqnr(plain) - 3
    assert result.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    for row in report.tensors:
        if row.name == "x_pixels":
            assert (row.bits, row.scale) == (8, 1.0)
    assert "QuantizeLinear" not in {node.op_type for node in result.graph.node if "x" in node.input}
    if options.get("activation_bits", 8) == 8 and "edge_bits" not in options and options.get("weight_bits") != 16:
        islands = {island.op for island in report.audit.islands}
        assert not islands & set(CHANGES_TYPE)


# a ConvTranspose alone stays float: nothing would be left to quantize
@pytest.mark.parametrize("body", sorted((set(FIRST_CONVS) | set(MIXED)) - {"transposed conv"}))
def test_every_start_of_a_network(folder: str, body: str) -> None:
    """In integers up to the first layer where that is possible, and right everywhere."""
    _skip_wrong_steps(body)
    text, numbers = FIRST_CONVS.get(body) or (MIXED[body][0], MIXED[body][2])
    outputs = ("y",) if body in FIRST_CONVS else MIXED[body][1]
    proto = network(text, ("N", *RGB), outputs, **numbers)
    for preset in ("imagenet", "tf"):
        options = {"preprocessing": PreprocessingOptions(preset=preset)}
        plain, _ = quantized(proto, folder, embed_preprocessing=None, **options)
        report, _ = quantized(proto, folder, **options)
        if plain.verify.sqnr_db is not None:
            assert report.verify.sqnr_db is None or report.verify.sqnr_db > plain.verify.sqnr_db - 2
        if body in FIRST_CONVS:
            assert report.audit.float == 0


def test_float_work_that_is_left_is_counted_and_told(folder: str) -> None:
    """A MaxPool between a mean for each channel and a layer that pads."""
    proto = network(MIXED["max pool"][0], ("N", *RGB), **MIXED["max pool"][2])
    report, _ = quantized(proto, folder, preprocessing=PreprocessingOptions(preset="imagenet"))
    assert {"Cast", "Sub", "Div"} <= {island.op for island in report.audit.islands}
    (told,) = [finding for finding in report.findings if isinstance(finding, Skipped) and finding.step == "embed"]
    assert told.why == "normalised in float: MaxPool p reads the pixels"
    assert sqnr(report) > 30


def test_pools_and_cuts_work_on_pixels(folder: str) -> None:
    """What hands codes on keeps the pixels' own."""
    body = """
        p = MaxPool<kernel_shape=[2,2], strides=[1,1]>(x) q = Pad(p, widths) r = Relu(q) n = Clip(r, , top)
        c = Conv(n, w) y = Relu(c)
    """
    widths = ints(0, 0, 1, 1, 0, 0, 1, 1)
    proto = network(body, ("N", *RGB), widths=widths, top=0.5, **W)
    report, _ = quantized(proto, folder, preprocessing=PreprocessingOptions(**ALIKE, preset="raw"))
    assert report.audit.float == 0
    assert {row.name: row.zero_point for row in report.tensors if row.kind == "activation"}["p"] == 127
    assert sqnr(report) > 30


def test_pixels_cut_at_once(folder: str) -> None:
    """A Relu and a Pad right behind the input: on the codes themselves."""
    for lead in ("r = Relu(x)", "r = Clip(x, , top)", "r = Pad(x, widths)"):
        proto = network(
            f"{lead} m = MaxPool<kernel_shape=[2,2]>(r) c = Conv(m, w) y = Relu(c)",
            ("N", *RGB),
            top=0.5,
            widths=ints(0, 0, 1, 1, 0, 0, 1, 1),
            **W,
        )
        report, _ = quantized(
            proto, folder, embed_preprocessing="nchw", preprocessing=PreprocessingOptions(**ALIKE, preset="raw")
        )
        assert report.audit.float == 0
        assert sqnr(report) > 30


@needs("onnxruntime", "1.22", MOVES_CODES)
def test_slices_of_pixels_joined(folder: str) -> None:
    """A detector's first step: every second pixel becomes a channel."""
    body = """
        a = Slice(x, s00, end, axes, twos) b = Slice(x, s10, end, axes, twos)
        j = Concat<axis=1>(a, b) c = Conv<pads=[1,1,1,1]>(j, w) y = Relu(c)
    """
    proto = network(
        body,
        ("N", *RGB),
        s00=ints(0, 0),
        s10=ints(1, 0),
        end=ints(1000, 1000),
        axes=ints(2, 3),
        twos=ints(2, 2),
        w=(4, 6, 3, 3),
    )
    report, _ = quantized(proto, folder, preprocessing=PreprocessingOptions(preset="unit"))
    assert report.audit.float == 0
    assert sqnr(report) > 30


def test_pixels_joined_with_something_else(folder: str) -> None:
    """One scale for both: the pixels are rounded to it, as any tensor would be."""
    body = f"c = Conv<{SAME}>(x, w) d = Concat<axis=1>(x, c) y = Conv<{SAME}>(d, v)"
    proto = network(body, ("N", *RGB), w=(4, 3, 3, 3), v=(4, 7, 3, 3))
    plain, _ = quantized(proto, folder, embed_preprocessing=None, preprocessing=PreprocessingOptions(preset="unit"))
    report, _ = quantized(proto, folder, preprocessing=PreprocessingOptions(preset="unit"))
    assert sqnr(report) > sqnr(plain) - 1


def test_a_fixed_batch_and_grey(folder: str) -> None:
    proto = network(f"c = Conv<{SAME}>(x, w) y = Relu(c)", (4, 1, 12, 10), w=(4, 1, 3, 3))
    report, result = quantized(proto, folder, embed_preprocessing="nhwc")
    assert [d.dim_value for d in result.graph.input[0].type.tensor_type.shape.dim] == [4, 12, 10, 1]
    assert report.audit.float == 0
    assert report.verify.images == 12
    assert sqnr(report) > 30


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 18, 21])
def test_old_and_new_models(folder: str, opset: int) -> None:
    proto = network(f"c = Conv<{SAME}>(x, w) y = Relu(c)", (1, *RGB), opset=opset, **W)
    proto.ir_version = 3 if opset < 9 else 8 if opset < 21 else 10
    if opset < 9:
        for tensor in proto.graph.initializer:
            proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    report, result = quantized(proto, folder)
    assert report.audit.float == 0
    assert len(result.graph.input) == 1
    assert sqnr(report) > 30


@needs("onnxruntime", "1.22", MOVES_CODES)
def test_an_open_size(folder: str) -> None:
    options = {"preprocessing": PreprocessingOptions(size=(9, 11))}
    report, result = quantized(deep(("N", 3, "H", "W")), folder, **options)
    assert report.audit.float == 0
    assert sqnr(report) > 20
    (got,) = Session(result.SerializeToString(), threads=1).run_all({"x": np.zeros((2, 20, 30, 3), np.uint8)})
    assert got.shape == (2, 10)


@needs("onnxruntime", "1.22", MOVES_CODES)
def test_float16(folder: str) -> None:
    proto = deep()
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype("f2"), tensor.name))
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    report, result = quantized(proto, folder)
    assert result.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    assert {island.op for island in report.audit.islands} <= {"Cast"}
    assert sum(node.op_type == "Cast" for node in result.graph.node) == 1  # the output's
    assert sqnr(report) > 20


def test_the_file_says_how_to_feed_it(folder: str) -> None:
    """What is left to do, and what is inside."""
    report, result = quantized(deep(), folder, preprocessing=PreprocessingOptions(preset="caffe", resize="exact"))
    told = {entry.key: entry.value for entry in result.metadata_props}
    carried = {key: json.loads(told[key]) for key in ("qconv.preprocessing", "qconv.recipe")}
    said = carried["qconv.preprocessing"]
    assert (said["preset"], said["color"], said["layout"], said["size"]) == ("raw", "bgr", "nhwc", [12, 10])
    assert (said["scale"], said["mean"], said["std"]) == (1.0, [0.0], [1.0])
    assert said["embedded"] == {
        "preset": "caffe",
        "scale": 1.0,
        "mean": [103.939, 116.779, 123.68],
        "std": [1.0],
        "layout": "nchw",
    }
    assert carried["qconv.recipe"]["embed_preprocessing"] == "nhwc"
    found = report.as_dict()["preprocessing"]
    assert {key: found[key] for key in said} == said
    assert "BGR pixels as they are, uint8 NHWC 12x10, stretched" in report.preprocessing_words
    assert "inside the file: (pixel x 1 - [103.939, 116.779, 123.68]) / [1]" in report.preprocessing_words


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("own", Layout)
def test_the_float_model_is_fed_the_same_bits(folder: str, own: Layout, preset: str, kind: type) -> None:
    """Whether its pictures come normalised or as pixels that are normalised afterwards."""
    shape = ("N", *RGB) if own is Layout.NCHW else ("N", *RGB[1:], 3)
    proto = network("y = Identity(x)", shape)
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    session = Session(proto.SerializeToString(), threads=1)
    data = DataOptions((folder,), batch=5, preprocessing=PreprocessingOptions(preset=preset))
    for layout in Layout:
        plain, raw = (DataLoader.of(session, data, Reporter(pytest.fail)) for _ in range(2))
        raw.take_pixels(layout)
        for want, given in zip(plain.iter_batches(""), raw.iter_batches(""), strict=True):
            assert given["x"].dtype == np.uint8
            assert given["x"].flags["C_CONTIGUOUS"]
            got = raw.as_float(given)["x"]
            assert (got.dtype, got.flags["C_CONTIGUOUS"]) == (np.dtype(kind), True)
            np.testing.assert_array_equal(got, want["x"])


def test_samples_have_no_preprocessing_to_embed(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.zeros(RGB, np.float32))
    with pytest.raises(QconvError, match="not known what --embed-preprocessing should embed"):
        quantized(deep(), str(tmp_path))
    Image.new("RGB", (10, 12)).save(tmp_path / "1.png")
    with pytest.raises(QconvError, match="not known what --embed-preprocessing should embed"):
        quantized(deep(), str(tmp_path))


def test_bytes_stay_pixels_whatever_is_said(folder: str) -> None:
    proto = network("h = Cast<to=1>(x) y = Conv(h, w)", ("N", *RGB), **W)
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    report, _ = quantized(proto, folder, preprocessing=PreprocessingOptions(preset="imagenet"))
    (warning,) = [text for text in report.warnings if "uint8" in text]
    assert (
        warning == "input 'x' takes uint8, so pixels stay whole numbers, 0 to 255: --preprocess imagenet is not used."
    )
    assert quantized(proto, folder)[0].audit.float == 0


def test_the_recipe_takes_a_word_or_a_layout() -> None:
    assert Recipe(embed_preprocessing="nhwc").embed_preprocessing is Layout.NHWC  # type: ignore[arg-type]
    with pytest.raises(QconvError, match="--embed-preprocessing hwc"):
        Recipe(embed_preprocessing="hwc")  # type: ignore[arg-type]
