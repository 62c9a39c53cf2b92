"""Layers whose codes are padded with channels. Oracle: the same file without them, in ONNX Runtime with and without its
optimizations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from qconv.config.choices import Scheme, WeightGranularity
from qconv.config.data_options import DataOptions, Layout, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.errors import Change
from qconv.ir.fast_forms import drop_channel_padding
from qconv.ir.files import Source
from qconv.pipeline.quantize import quantize
from qconv.quantization.saturation import pair_excess, widen_scales, worst_pair_ratio
from qconv.quantizer import PerChannel, QuantSpec
from qconv.runtime.session import Session
from tests.support.models import network
from tests.support.quantized import SAME, Feeds, Quantized, Wiring, joined, pictures, quantized

SEVEN_BITS: dict[str, object] = {"weight_bits": 7, "edge_bits": 7}
"""With them no sum of two products saturates, whichever weights are neighbours."""

HALVED = f"{SAME}, strides=[2,2]"


def stem(inputs: int = 3, outputs: int = 16, kernel: int = 3, side: int = 16, **options: object) -> Quantized:
    """Conv -> Relu -> Conv."""
    half = kernel // 2
    body = f"c = Conv<pads=[{half},{half},{half},{half}], strides=[2,2]>(x, w, b) r = Relu(c) y = Conv(r, v)"
    shapes = {"w": (outputs, inputs, kernel, kernel), "b": (outputs,), "v": (4, outputs, 1, 1)}
    proto = network(body, x=("N", inputs, side, side), **shapes)
    return quantized(proto, **{**SEVEN_BITS, **options})


def unpadded(result: Quantized) -> onnx.ModelProto:
    model = result.model.copy()
    assert drop_channel_padding(model)
    return model.proto()


def outputs_of(proto: onnx.ModelProto, samples: list[Feeds], *, optimize: bool) -> Feeds:
    return joined(Session(proto.SerializeToString(), optimize=optimize, threads=1), samples)


def assert_same_numbers(result: Quantized) -> None:
    """Bit for bit what the file means without the channels, however it is run."""
    for optimize in (False, True):
        bare = outputs_of(unpadded(result), list(result.samples), optimize=optimize)
        got = result.got if optimize else result.meant
        assert all(np.array_equal(bare[name], got[name]) for name in bare)


@pytest.mark.parametrize(("inputs", "padded"), [(3, 4), (5, 8), (6, 8), (7, 8), (9, 12)])
def test_channels_come_in_fours_and_change_no_number(inputs: int, padded: int) -> None:
    result = stem(inputs).check()
    assert [layer.padded for layer in result.plan.layers] == [padded, 0]
    assert result.audit.islands == ()
    assert result.runs.count("QLinearConv") == 2
    (pad,) = result.wiring.all("Pad", "Gather")
    how = [0, 1, 2, 1] if inputs == 3 else [0, 0, 0, 0, 0, padded - inputs, 0, 0]
    assert result.wiring.constants[pad.input[1]].tolist() == how
    conv = result.wiring.all("Conv")[0]
    weights = onnx.numpy_helper.to_array(result.wiring.codes(conv.input[1]))
    assert weights.shape == (16, padded, 3, 3)
    assert inputs == 3 or not weights[:, inputs:].any()
    assert_same_numbers(result)


@pytest.mark.parametrize("inputs", [3, 6])
def test_no_more_sums_saturate_than_without(inputs: int) -> None:
    """With weights of 8 bits as they are, scales as wide as the layer without needs them, on any CPU."""
    weights = np.abs(np.random.default_rng(0).normal(size=(16, inputs, 3, 3))).astype(np.float32)
    proto = network(f"c = Conv<{SAME}>(x, w) y = Relu(c)", x=(2, inputs, 8, 8), w=weights)
    result = quantized(proto, pictures((2, inputs, 8, 8), low=0.0, high=1.0))
    codes, bare = (first_codes(model) for model in (result.proto, unpadded(result)))
    assert worst_pair_ratio(codes, 0).max() <= worst_pair_ratio(bare, 0).max()
    assert worst_pair_ratio(bare, 0).max() > 0.9
    assert_same_numbers(result)


def first_codes(proto: onnx.ModelProto) -> NDArray[np.int8]:
    wiring = Wiring(proto)
    return onnx.numpy_helper.to_array(wiring.codes(wiring.all("Conv")[0].input[1]))


def test_a_weight_stands_where_its_neighbour_was() -> None:
    """Pairs of a row of three places, 0 1 | 2 0 | 1 2 | 0 1 | 2, are (0 1) (2 -), then (0 -) (2 1), and again."""
    codes = first_codes(stem(kernel=3).proto)
    even, odd = codes.reshape(16, 4, 9)[:, :, 0::2], codes.reshape(16, 4, 9)[:, :, 1::2]
    assert not even[:, 3].any()
    assert not odd[:, 1].any()
    assert odd[:, 3].any()


def test_what_is_done_is_told() -> None:
    result = stem()
    assert Change("pad", "c", "input padded to 4 channels on codes") in result.findings
    (told,) = result.audit.on_codes
    assert (told.node, told.rule) == ("c", "padded-channels")
    assert told.why.startswith("its 3 input channels are padded to 4")


@pytest.mark.parametrize(
    "options",
    [{"outputs": 8}, {"outputs": 20}, {"kernel": 7, "side": 96, "outputs": 64}, {"inputs": 4}, {"inputs": 13}],
)
def test_others_are_left_as_they_are(options: dict[str, int]) -> None:
    """Too few outputs, or not in eights, for the kernel; more work than it saves; channels in fours; not measured."""
    result = stem(**options)
    assert result.wiring.count("Pad", "Gather") == 0
    assert not any(layer.padded for layer in result.plan.layers)


@pytest.mark.parametrize(
    "options",
    [
        {"target": "generic"},
        {"target": "openvino"},
        {"activation_bits": 16, "weight_bits": 8},
        {"activation_bits": 32},
        {"weight_scheme": Scheme.ASYMMETRIC},
        {"weight_granularity": WeightGranularity.PER_BLOCK, "block_size": 2},
        {"keep_float": ("c",)},
    ],
)
def test_no_layer_is_padded_that_the_kernel_does_not_take(options: dict[str, object]) -> None:
    assert stem(**options).wiring.count("Pad", "Gather") == 0


@pytest.mark.parametrize(
    "options", [{"weight_bits": 4, "edge_bits": 4}, {"weight_granularity": WeightGranularity.PER_TENSOR}]
)
def test_weights_of_few_bits_and_of_one_scale_are_padded(options: dict[str, object]) -> None:
    result = stem(**options).check(15)
    assert result.wiring.count("Pad", "Gather") == 1
    assert_same_numbers(result)


def test_layers_that_read_one_tensor_share_its_padding() -> None:
    body = f"c = Conv<{SAME}>(x, w) d = Conv<{SAME}>(x, v) y = Add(c, d)"
    result = quantized(network(body, w=(16, 3, 3, 3), v=(16, 3, 3, 3)), **SEVEN_BITS).check()
    assert result.wiring.count("Pad", "Gather") == 1
    assert result.audit.islands == ()
    assert_same_numbers(result)


def test_who_else_reads_the_codes_reads_them_without() -> None:
    body = (
        f"c = Conv<{SAME}>(x, w) p = AveragePool<kernel_shape=[3,3], {SAME}>(x) j = Concat<axis=1>(c, p) y = Conv(j, v)"
    )
    result = quantized(network(body, w=(16, 3, 3, 3), v=(4, 19, 1, 1)), **SEVEN_BITS).check()
    assert result.wiring.count("Pad", "Gather") == 1
    assert result.audit.islands == ()
    assert_same_numbers(result)


def test_a_layer_in_the_middle_is_padded() -> None:
    """Six channels of another layer, whose codes the runtime has in NHWC."""
    body = f"a = Conv<{SAME}>(x, u) c = Conv<{SAME}>(a, w) r = Relu(c) y = Conv(r, v)"
    proto = network(body, x=(2, 4, 8, 8), u=(6, 4, 3, 3), w=(16, 6, 3, 3), v=(4, 16, 1, 1))
    result = quantized(proto, **SEVEN_BITS).check()
    assert [layer.padded for layer in result.plan.layers] == [0, 8, 0]
    assert result.audit.islands == ()
    assert_same_numbers(result)


@pytest.mark.parametrize("layout", [None, Layout.NCHW, Layout.NHWC])
def test_pixels_are_padded(layout: Layout | None, tmp_path: Path) -> None:
    """With its preprocessing in the model, whose input is uint8 then, in either order of axes."""
    for number in range(12):
        level = np.random.default_rng(number).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(level).save(tmp_path / f"{number}.png")
    proto = network(
        f"c = Conv<{HALVED}>(x, w) r = Relu(c) y = Conv(r, v)", x=("N", 3, 16, 16), w=(16, 3, 3, 3), v=(4, 16, 1, 1)
    )
    data = DataOptions((str(tmp_path),), preprocessing=PreprocessingOptions("imagenet"))
    recipe = Recipe(threads=1, embed_preprocessing=layout, saturation_safe=True)
    report, made = quantize(Source("the model", None, proto.SerializeToString()), None, recipe, data)
    assert made is not None
    assert report.audit is not None
    assert report.audit.islands == ()
    assert [found.rule for found in report.audit.on_codes if found.rule == "padded-channels"] == ["padded-channels"]
    for optimize in (False, True):  # any batch
        session = Session(made, optimize=optimize, threads=1)
        ((name, kind, shape),) = session.inputs
        full = [size if isinstance(size, int) else 3 for size in shape]
        assert session.run_all({name: np.zeros(full, kind)})[0].shape == (3, 4, 8, 8)


def test_neighbours_are_those_of_the_padded_weights() -> None:
    """Of five channels the last of a place and the first of the next are a pair, which eight channels keep apart."""
    weight = np.zeros((1, 5, 1, 2), np.float32)
    weight[0, 4, 0, 0] = weight[0, 0, 0, 1] = 1.27
    spec = QuantSpec(8, signed=True, symmetric=True, granularity=PerChannel(0))
    params = spec.from_range(np.float32([-1.27]), np.float32([1.27]))
    limits = np.zeros(5, np.int64), np.full(5, 255)
    assert widen_scales(params, weight, *limits, output_axis=0) is not params
    assert widen_scales(params, weight, *limits, output_axis=0, inputs=8) is params
    codes = params.quantize(weight)
    assert pair_excess(codes, *limits, output_axis=0)[0] > 1 > pair_excess(codes, *limits, output_axis=0, inputs=8)[0]
