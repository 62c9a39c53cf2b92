"""From a float network to the file that runs: plan, parameters, weights, bias, emit and shrink seen together.

Oracles: ONNX Runtime on the float network, and on the quantized one with its optimizations off, which is what the
standard says the file means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qconv.audit.audit import PlannedReasons, audit
from qconv.calibration.observer import export_observed_model, observe
from qconv.calibration.range_estimators import sketch_contents_for
from qconv.config.choices import Scheme, WeightGranularity
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.errors import Change, Finding
from qconv.ir import load, metadata
from qconv.ir.files import Source, declared_opset
from qconv.passes import fold
from qconv.passes.compress_constants import compress_constants
from qconv.pipeline.quantize import quantize
from qconv.planning.plan import Plan
from qconv.planning.planner import make_plan
from qconv.quantization.emit import emit
from qconv.quantization.parameters import Params, choose_params
from qconv.results.quantize import Audit
from qconv.runtime.session import Session
from tests.support.models import Constant, ints, loaded, network, run

SAME = "pads=[1,1,1,1]"
BATCHES = 4
Feeds = dict[str, NDArray[np.float32]]


@dataclass(slots=True, weakref_slot=True)
class Wiring:
    """A file as its nodes see it: who writes a tensor, who reads it, and the numbers of constants."""

    proto: onnx.ModelProto

    @property
    def writers(self) -> dict[str, onnx.NodeProto]:
        return {name: node for node in self.proto.graph.node for name in node.output}

    @property
    def constants(self) -> dict[str, NDArray]:
        return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in self.proto.graph.initializer}

    def readers(self, name: str) -> list[onnx.NodeProto]:
        return [node for node in self.proto.graph.node if name in node.input]

    def all(self, *op_types: str) -> list[onnx.NodeProto]:
        return [node for node in self.proto.graph.node if node.op_type in op_types]

    def count(self, *op_types: str) -> int:
        return len(self.all(*op_types))

    def parameters(self, name: str) -> tuple[NDArray, NDArray]:
        """Scale and zero point of the DequantizeLinear that writes `name`."""
        node = self.writers[name]
        if node.op_type == "Reshape":
            node = self.writers[node.input[0]]
        assert node.op_type == "DequantizeLinear"
        constants = self.constants
        return constants[node.input[1]], constants[node.input[2]]

    def codes(self, name: str) -> onnx.TensorProto:
        """The constant codes behind `name`."""
        node = self.writers[name]
        if node.op_type == "Reshape":
            node = self.writers[node.input[0]]
        return next(tensor for tensor in self.proto.graph.initializer if tensor.name == node.input[0])

    def real(self, name: str) -> NDArray:
        """The weights that codes behind `name`, per tensor, channel or block, stand for, along their first axis."""
        codes = onnx.numpy_helper.to_array(self.codes(name)).astype(np.float32)
        scale, zero = self.parameters(name)
        if scale.ndim == 2:  # of blocks along axis 1
            node = next(n for n in self.all("DequantizeLinear") if n.input[0] == self.codes(name).name)
            size = onnx.helper.get_node_attr_value(node, "block_size")
            scale, zero = (np.repeat(x, size, axis=1)[:, : codes.shape[1]] for x in (scale, zero))
        else:
            scale, zero = (x.reshape(-1, *[1] * (codes.ndim - 1)) for x in (scale, zero))
        return (codes - zero) * scale


class Quantized:
    """A network taken through the story in memory, without the file and its checks."""

    def __init__(self, proto: onnx.ModelProto, recipe: Recipe, samples: Sequence[Feeds]) -> None:
        self.float, self.recipe, self.samples = proto, recipe, samples
        copy = onnx.ModelProto.FromString(proto.SerializeToString())
        opset = metadata.needed_opset(recipe, declared_opset(copy))
        model, _ = load.load(copy, Source("the test's model", None, b""), opset=opset)
        fold.run_float_passes(model)
        self.plan: Plan = make_plan(model, recipe, TARGETS[recipe.target])
        taps = self.plan.taps(sketch_contents_for(recipe))
        sketches = {}
        if taps:
            with export_observed_model(model, taps) as runnable:
                sketches = observe(Session(runnable, threads=1), taps, samples)
        self.params: Params
        self.findings: list[Finding]
        self.params, self.findings = choose_params(self.plan, sketches, recipe)
        self.findings += emit(model, self.plan, self.params, pack=recipe.pack)
        self.findings += compress_constants(model)
        metadata.write_metadata(model, "0", recipe.as_dict(DataOptions()), None)
        self.model = model
        self.proto: onnx.ModelProto = model.proto()
        onnx.checker.check_model(self.proto, full_check=True)

    @property
    def wiring(self) -> Wiring:
        return Wiring(self.proto)

    @cached_property
    def expected(self) -> Feeds:
        """The float network's outputs, pictures side by side."""
        return joined(Session(self.float.SerializeToString(), threads=1), self.samples)

    @cached_property
    def got(self) -> Feeds:
        """The outputs as users see them."""
        return joined(Session(self.proto.SerializeToString(), threads=1), self.samples)

    @cached_property
    def meant(self) -> Feeds:
        """The outputs node by node, as the standard defines them."""
        return joined(Session(self.proto.SerializeToString(), optimize=False, threads=1), self.samples)

    @cached_property
    def _optimized(self) -> tuple[Audit, onnx.ModelProto]:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            Session(self.proto.SerializeToString(), threads=1, save_optimized=path)
            audited = audit(path, self.model, PlannedReasons.of(self.plan))
            return audited, onnx.load(str(path), load_external_data=False)

    @property
    def audit(self) -> Audit:
        return self._optimized[0]

    @property
    def runs(self) -> list[str]:
        """The operators that the runtime really runs."""
        return [node.op_type for node in self._optimized[1].graph.node]

    @property
    def islands(self) -> set[str]:
        return {island.op for island in self.audit.islands}

    def sqnr(self, name: str = "y") -> float:
        return sqnr(self.expected[name], self.got[name])

    def check(self, least: float = 30.0) -> Quantized:
        """The file means what it should, and the runtime does what the file means: both in dB. 8 bits give 30 to 50."""
        for name, reference in self.expected.items():
            assert self.got[name].shape == reference.shape
            assert self.got[name].dtype == reference.dtype
            assert sqnr(reference, self.meant[name]) >= least, name
            assert sqnr(self.meant[name], self.got[name]) >= least, name
        return self


def joined(session: Session, samples: Sequence[Feeds]) -> Feeds:
    results = [session.run_all(feeds) for feeds in samples]
    return {name: np.concatenate(parts) for name, *parts in zip(session.outputs, *results, strict=True)}


def sqnr(reference: NDArray, got: NDArray) -> float:
    noise = np.sum((reference.astype(np.float64) - got) ** 2)
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(np.sum(reference.astype(np.float64) ** 2) / noise))


def pictures(shape: Sequence[int] = (2, 3, 6, 6), seed: int = 0, low: float = -1.0, high: float = 1.0) -> list[Feeds]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.uniform(low, high, shape).astype(np.float32)} for _ in range(BATCHES)]


def quantized(proto: onnx.ModelProto, samples: Sequence[Feeds] | None = None, **options: object) -> Quantized:
    recipe = Recipe(**options)  # type: ignore[arg-type]
    if samples is None:
        samples = [
            {
                value.name: feeds["x"]
                for value in proto.graph.input
                for feeds in pictures([d.dim_value or 2 for d in value.type.tensor_type.shape.dim], seed)[:1]
            }
            for seed in range(BATCHES)
        ]
    return Quantized(proto, recipe, samples)


# -- the grid ----------------------------------------------------------------------------------------------------------

# 6 channels: blocks of 4 leave a short one.
NET = network(
    f"""
    c = Conv<{SAME}>(x, w1, b1) r = Relu(c)
    d = Conv<group=6, {SAME}>(r, w2, b2) e = Clip(d, zero, six)
    p = Conv(e, w3, b3) s = Add(p, r) t = Relu(s)
    m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(t)
    g = GlobalAveragePool(m) f = Flatten(g) y = Gemm<transB=1>(f, w4, b4)
    """,
    x=("N", 3, 8, 8),
    w1=(6, 3, 3, 3),
    b1=(6,),
    w2=(6, 1, 3, 3),
    b2=(6,),
    w3=(6, 6, 1, 1),
    b3=(6,),
    w4=(5, 6),
    b4=(5,),
    zero=0.0,
    six=6.0,
)
LAYERS = ("c", "d", "p", "y")
GRID = [
    (weight, activation, granularity, weight_bits, activation_bits, pack)
    for index, (weight, activation, granularity, weight_bits, activation_bits, pack) in enumerate(
        product(Scheme, Scheme, WeightGranularity, (2, 3, 4, 5, 8, 16), (2, 4, 8, 16, 32), (False, True))
    )
    if not (pack and weight_bits > 4) and (weight_bits == activation_bits == 8 or index % 7 == 0)
]


@cache
def net(**options: object) -> Quantized:
    return quantized(NET, pictures((2, 3, 8, 8)), **options)


@pytest.mark.parametrize(("weight", "activation", "granularity", "weight_bits", "activation_bits", "pack"), GRID)
def test_every_combination_means_what_it_says_and_runs(
    weight: Scheme,
    activation: Scheme,
    granularity: WeightGranularity,
    weight_bits: int,
    activation_bits: int,
    pack: bool,
) -> None:
    """The optimized graph is within a few steps of the plain one; the step is that of the last quantized tensor."""
    result = net(
        weight_scheme=weight,
        activation_scheme=activation,
        weight_granularity=granularity,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        pack=pack,
        block_size=4,
        edge_bits=2,
    )
    assert len(result.plan.layers) == len(LAYERS)
    got, meant = result.got["y"], result.meant["y"]
    if activation_bits == 32:
        np.testing.assert_allclose(got, meant, rtol=1e-4, atol=1e-4)
        return
    wiring = result.wiring
    gemm = next(node for node in wiring.proto.graph.node if node.name == "y")
    step, _ = wiring.parameters(gemm.input[0])
    reach = np.abs(onnx.numpy_helper.to_array(NET.graph.initializer[6])).sum(axis=1)  # of one step in every feature
    assert np.abs(got - meant).max() <= 2 * float(step) * reach.max() + 1e-4
    assert sqnr(meant, got) > 20


@pytest.mark.parametrize("granularity", WeightGranularity)
@pytest.mark.parametrize("scheme", Scheme)
def test_a_bit_of_the_weights_is_worth_6_db(granularity: WeightGranularity, scheme: Scheme) -> None:
    """Halving the step halves the error: 20 log10(2) = 6.02 dB."""
    measured = [
        net(
            weight_bits=bits,
            activation_bits=16,
            edge_bits=2,
            weight_granularity=granularity,
            weight_scheme=scheme,
            block_size=4,
        ).sqnr()
        for bits in (2, 3, 4, 5, 8)
    ]
    assert np.all(np.diff(measured) > 0), measured
    assert (measured[-1] - measured[1]) / 5 == pytest.approx(6.02, abs=1.5)


@pytest.mark.parametrize("scheme", Scheme)
def test_a_bit_of_the_activations_is_worth_6_db(scheme: Scheme) -> None:
    measured = [
        net(weight_bits=16, activation_bits=bits, edge_bits=2, activation_scheme=scheme).sqnr() for bits in (2, 4, 8)
    ]
    assert np.all(np.diff(measured) > 0), measured
    assert (measured[-1] - measured[-2]) / 4 == pytest.approx(6.02, abs=1.5)


def test_16_bits_are_as_good_as_float() -> None:
    assert net(weight_bits=16, activation_bits=16).sqnr() > 70
    assert net(weight_bits=16, activation_bits=32).sqnr() > 80


# -- 8 bits run in integers --------------------------------------------------------------------------------------------


def test_8_bits_leave_nothing_in_float() -> None:
    result = net()
    assert result.audit.islands == ()
    assert result.audit.integer >= 8
    assert not {"Conv", "FusedConv", "Gemm", "Add", "GlobalAveragePool"} & set(
        result.runs
    )  # MaxPool takes codes as it is
    assert result.runs.count("QLinearConv") == 3


CONCAT = network(
    f"a = Conv<{SAME}>(x, w1) b = Conv<{SAME}>(x, w2) c = AveragePool<kernel_shape=[3,3], {SAME}>(x) "
    "k = Concat<axis=1>(a, b, c) y = Conv(k, w3)",
    w1=(4, 3, 3, 3),
    w2=(2, 3, 3, 3),
    w3=(5, 9, 1, 1),
)


def test_a_concat_of_three_is_a_copy_of_codes() -> None:
    result = quantized(CONCAT).check()
    assert result.audit.islands == ()
    assert "Concat" in result.runs or "QLinearConcat" in result.runs
    (join,) = result.wiring.all("Concat")
    shared = {tuple(float(p) for p in result.wiring.parameters(name)) for name in join.input}
    assert len(shared) == 1
    assert shared == {tuple(float(p) for p in result.wiring.parameters(q)) for q in dequantized(result, join.output[0])}


def dequantized(result: Quantized, name: str) -> list[str]:
    """What a tensor is called behind its quantizer."""
    found = [name]
    for kind in ("QuantizeLinear", "Clip", "DequantizeLinear"):
        following = [node.output[0] for n in found for node in result.wiring.readers(n) if node.op_type == kind]
        found = following or found
    return found


# -- biases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation_bits", [4, 8, 16])
@pytest.mark.parametrize("granularity", [WeightGranularity.PER_TENSOR, WeightGranularity.PER_CHANNEL])
def test_the_bias_scale_is_the_product(granularity: WeightGranularity, activation_bits: int) -> None:
    """Exactly, as float32 numbers: ONNX Runtime ignores a scale that is a little off."""
    wiring = net(weight_granularity=granularity, activation_bits=activation_bits).wiring
    layers = wiring.all("Conv", "Gemm")
    assert len(layers) == len(LAYERS)
    for node in layers:
        data, _ = wiring.parameters(node.input[0])
        weight, _ = wiring.parameters(node.input[1])
        scale, zero = wiring.parameters(node.input[2])
        np.testing.assert_array_equal(scale, data * weight)
        assert scale.dtype == np.float32
        assert wiring.codes(node.input[2]).data_type == onnx.TensorProto.INT32
        assert not zero.any()


def test_blocks_leave_the_bias_float() -> None:
    """There is no one scale of the weights that it could share."""
    wiring = net(weight_granularity=WeightGranularity.PER_BLOCK, block_size=4).wiring
    for node in wiring.all("Conv", "Gemm"):
        assert wiring.constants[node.input[2]].dtype == np.float32


HUGE_BIAS = np.float32([3.0, 0.5, -3.0, 0.0])


def small_weights() -> NDArray[np.float32]:
    """Channels 0 and 2 are a million times smaller than their bias."""
    weight = np.random.default_rng(0).uniform(-1, 1, (4, 3, 3, 3)).astype(np.float32)
    weight[[0, 2]] *= np.float32(1e-7)
    return weight


@pytest.mark.parametrize("granularity", WeightGranularity)
@pytest.mark.parametrize(
    ("weight_bits", "activation_bits"), [(8, 8), (4, 8), (8, 4), (16, 16), (8, 16), (16, 8), (8, 32)]
)
def test_a_bias_beyond_int32_keeps_its_value(
    granularity: WeightGranularity, weight_bits: int, activation_bits: int
) -> None:
    """3.0 / (s_x * s_w) is 10^11. The output of such a channel is the bias, whatever its weights become."""
    proto = network("y = Conv(x, w, b)", w=small_weights(), b=HUGE_BIAS)
    result = quantized(
        proto,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        edge_bits=2,
        weight_granularity=granularity,
        block_size=2,
    )
    step = 0.0 if activation_bits == 32 else float(result.wiring.parameters("y")[0])
    for found in (result.got["y"], result.meant["y"]):
        for channel in (0, 2):
            assert np.abs(found[:, channel] - HUGE_BIAS[channel]).max() <= 0.51 * step + 1e-5


def test_a_bias_beyond_int32_widens_its_own_channel_and_says_so() -> None:
    proto = network("y = Conv(x, w, b)", w=small_weights(), b=HUGE_BIAS)
    result = quantized(proto, activation_bits=7, edge_bits=7).check(25)  # 8 bits may widen for another reason
    (said,) = [f for f in result.findings if isinstance(f, Change) and "widened" in f.what]
    assert said.where == "y"
    assert said.what == "weight scale of 2 channels widened, so that the bias fits into int32"
    (layer,) = result.params.layers
    tightest = np.abs(small_weights()).max(axis=(1, 2, 3)) / 127
    assert (layer.weight.scale > tightest * 1.001).tolist() == [True, False, True, False]
    codes = onnx.numpy_helper.to_array(result.wiring.codes(result.wiring.all("Conv")[0].input[2]))
    assert np.abs(codes.astype(np.int64)).max() <= 2**30 * 1.001


def test_a_gemms_bias_beyond_int32_keeps_its_value() -> None:
    weight = np.random.default_rng(1).uniform(-1e-7, 1e-7, (5, 4)).astype(np.float32)
    proto = network("a = Relu(x) y = Gemm(a, w, b)", x=(2, 5), w=weight, b=HUGE_BIAS)
    for granularity in WeightGranularity:
        result = quantized(proto, weight_granularity=granularity, block_size=2)
        np.testing.assert_allclose(result.got["y"], result.expected["y"], atol=1e-5)
        np.testing.assert_allclose(result.meant["y"], result.expected["y"], atol=1e-5)


def test_a_dead_channel_gives_its_bias() -> None:
    weight = small_weights()
    weight[0] = 0
    result = quantized(network("y = Conv(x, w, b)", w=weight, b=HUGE_BIAS))
    step = float(result.wiring.parameters("y")[0])
    assert np.abs(result.got["y"][:, 0] - 3).max() <= 0.51 * step


@pytest.mark.parametrize("granularity", WeightGranularity)
def test_weights_that_are_all_zero(granularity: WeightGranularity) -> None:
    proto = network(
        "c = Conv(x, w, b) y = Conv(c, v)", w=np.zeros((4, 3, 3, 3), np.float32), b=HUGE_BIAS, v=(2, 4, 1, 1)
    )
    quantized(proto, weight_granularity=granularity).check()


# -- Relu and Clip -----------------------------------------------------------------------------------------------------


def clipped(low: float | None, high: float | None, gain: float, **options: object) -> Quantized:
    """Conv -> Clip -> Conv, the first Conv's output from -gain to gain."""
    constants: dict[str, Constant] = {"w": np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1) * np.float32(gain)}
    if low is not None:
        constants["low"] = low
    if high is not None:
        constants["high"] = high
    ends = f"{'low' if low is not None else ''}, {'high' if high is not None else ''}".rstrip(", ")
    body = f"c = Conv(x, w) a = Clip(c, {ends}) y = Conv(a, v)"
    return quantized(network(body, v=(4, 3, 1, 1), **constants), **options)


@pytest.mark.parametrize(
    ("low", "high", "gain", "removed"),
    [
        (0.0, 6.0, 4.0, True),  # values 0 to 4: never above 6
        (0.0, 6.0, 40.0, True),  # values 0 to 6: the codes end where the Clip does
        (-1.0, 1.0, 0.5, True),
        (0.0, None, 3.0, True),
        (1.0, 6.0, 20.0, False),  # the range holds zero, which is below 1
        (-6.0, -1.0, 20.0, False),
    ],
)
def test_a_clip_goes_where_the_codes_saturate_at_its_bounds(
    low: float | None, high: float | None, gain: float, removed: bool
) -> None:
    result = clipped(low, high, gain).check()
    assert result.wiring.count("Clip") == (0 if removed else 1)
    assert result.audit.islands == ()


def test_a_clip_stays_where_the_codes_reach_further() -> None:
    """Symmetric codes of -1 to 6 reach down to -6."""
    result = clipped(-1.0, 6.0, 20.0, activation_scheme=Scheme.SYMMETRIC).check()
    assert result.wiring.count("Clip") == 1
    assert result.audit.islands == ()


def test_a_relu_stays_where_its_result_shares_a_wider_range() -> None:
    """Joined with a tensor that has negative values, its codes can go below zero, and its values must not."""
    body = f"c = Conv<{SAME}>(x, w) r = Relu(c) d = Conv<{SAME}>(x, v) y = Concat<axis=1>(r, d)"
    result = quantized(network(body, w=(4, 3, 3, 3), v=(4, 3, 3, 3))).check()
    assert result.got["y"][:, :4].min() >= 0 > result.got["y"][:, 4:].min()
    assert result.meant["y"][:, :4].min() >= 0
    assert result.wiring.count("Relu") == 0
    assert result.wiring.count("Clip") == 1
    assert result.audit.islands == ()


@pytest.mark.parametrize("bits", [2, 4, 8, 16, 32])
def test_relu_returns_nothing_below_zero(bits: int) -> None:
    for scheme in Scheme:
        proto = network("c = Conv(x, w) y = Relu(c)", w=(4, 3, 3, 3))
        result = quantized(proto, activation_bits=bits, activation_scheme=scheme, edge_bits=2)
        assert result.got["y"].min() == 0
        assert result.sqnr() > (3 if bits == 2 else 15)


def test_a_layer_with_two_readers_shows_its_values_below_zero() -> None:
    body = "c = Conv(x, w) r = Relu(c) a = Conv(r, v) b = Conv(c, v) y = Add(a, b)"
    result = quantized(network(body, w=(4, 3, 3, 3), v=(4, 4, 1, 1))).check()
    assert result.audit.islands == ()


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_pad_works_on_codes(mode: str, bits: int) -> None:
    body = f'c = Conv(x, w) p = Pad<mode="{mode}">(c, widths) m = MaxPool<kernel_shape=[2,2]>(p) y = Conv(m, v)'
    proto = network(body, w=(4, 3, 3, 3), widths=ints(0, 0, 1, 1, 0, 0, 1, 1), v=(4, 4, 1, 1))
    for scheme in Scheme:
        quantized(proto, activation_bits=bits, activation_scheme=scheme).check(30 if bits > 4 else 12)


def test_pad_with_axes_works_on_codes() -> None:
    body = "c = Conv(x, w) p = Pad(c, widths, , axes) m = MaxPool<kernel_shape=[2,2]>(p) y = Conv(m, v)"
    proto = network(body, opset=18, w=(4, 3, 3, 3), widths=ints(1, 2, 0, 1), axes=ints(2, 3), v=(4, 4, 1, 1))
    assert quantized(proto).check().audit.islands == ()


# -- fewer bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_fewer_bits_still_run_in_integers(bits: int) -> None:
    """Codes in bytes, held to 2^b - 1 by an integer Clip that the Conv's kernel does not mind.

    Those that no layer reads have all 8 bits.
    """
    result = net(activation_bits=bits, edge_bits=2)
    wiring = result.wiring
    assert result.runs.count("QLinearConv") == 3
    assert not {"Conv", "FusedConv", "Gemm"} & set(result.runs)
    quantizers = wiring.all("QuantizeLinear")
    assert quantizers
    for node in quantizers:
        (reader,) = wiring.readers(node.output[0])
        if reader.op_type == "DequantizeLinear":
            assert not {"Conv", "Gemm"} & {found.op_type for found in wiring.readers(reader.output[0])}
            continue
        assert reader.op_type == "Clip"
        low, high = (wiring.constants[name] for name in reader.input[1:])
        assert low.dtype == high.dtype == np.uint8
        assert int(low) >= 0
        assert int(high) <= 2**bits - 1
    assert max(codes_of(result)) == 2**bits - 1


def codes_of(result: Quantized) -> set[int]:
    """Every code of activations that layers read on the samples."""
    probe = onnx.ModelProto.FromString(result.proto.SerializeToString())
    constants, wiring = result.wiring.constants, result.wiring
    read = {
        node.input[0]
        for node in wiring.all("DequantizeLinear")
        if {"Conv", "Gemm"} & {reader.op_type for reader in wiring.readers(node.output[0])}
    } - set(constants)
    kind = {np.dtype(np.uint8): onnx.TensorProto.UINT8, np.dtype(np.uint16): onnx.TensorProto.UINT16}
    for name in sorted(read):
        node = next(n for n in result.wiring.all("DequantizeLinear") if n.input[0] == name)
        probe.graph.output.append(onnx.helper.make_tensor_value_info(name, kind[constants[node.input[2]].dtype], None))
    session = Session(probe.SerializeToString(), optimize=False, threads=1)
    return {int(c) for feeds in result.samples for a in session.run(sorted(read), feeds) for c in np.unique(a)}


@pytest.mark.parametrize("target", ["ort-cpu", "generic"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("scheme", Scheme)
def test_weight_codes_keep_to_their_bits(bits: int, scheme: Scheme, target: str) -> None:
    """Symmetric codes are narrow: 2 bits are ternary. Asymmetric ones of few bits are moved, all of a channel alike."""
    wiring = net(weight_bits=bits, edge_bits=2, weight_scheme=scheme, target=target).wiring
    top = 2 ** (bits - 1) - 1
    moved = scheme is Scheme.ASYMMETRIC and target == "ort-cpu" and bits <= 6
    zeros = set()
    for node in wiring.all("Conv", "Gemm"):
        codes = onnx.numpy_helper.to_array(wiring.codes(node.input[1])).astype(int)
        _, zero = wiring.parameters(node.input[1])
        assert wiring.codes(node.input[1]).data_type == onnx.TensorProto.INT8
        zeros |= set(zero.reshape(-1).tolist())
        if moved:
            rows = codes.reshape(len(codes), -1)
            assert max(int(np.ptp(rows, axis=1).max()), *np.abs(rows).max(axis=1)) <= 2**bits - 1
            assert bits < 4 or np.abs(codes).max() > top + 1
        else:
            assert codes.max() <= top
            assert codes.min() >= (-top if scheme is Scheme.SYMMETRIC else -top - 1)
    assert (zeros == {0}) == (moved or scheme is Scheme.SYMMETRIC)


@pytest.mark.parametrize("granularity", WeightGranularity)
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_moved_codes_stand_for_the_same_weights(granularity: WeightGranularity, bits: int) -> None:
    options = {"weight_bits": bits, "edge_bits": 2, "weight_scheme": "asymmetric", "weight_granularity": granularity}
    moved, plain = (net(block_size=4, target=target, **options).wiring for target in ("ort-cpu", "generic"))
    layers = zip(moved.all("Conv", "Gemm"), plain.all("Conv", "Gemm"), strict=True)
    assert len(plain.all("Conv", "Gemm")) > 2
    for one, other in layers:
        np.testing.assert_array_equal(moved.real(one.input[1]), plain.real(other.input[1]))


def test_the_best_effort_gives_weights_of_few_bits_all_codes() -> None:
    """Asymmetric; those of 8 bits, such as the first and the last layer's, are not, nor are those of other efforts."""
    few = {"weight_bits": 4, "edge_bits": 8}
    for options, chosen in (({"effort": "best"}, False), ({}, True), ({"effort": "best", "target": "tensorrt"}, True)):
        result = net(**few, **options)
        assert {(x.weight.bits, x.weight.symmetric) for x in result.plan.layers} == {(4, chosen), (8, True)}
    assert all(x.weight.symmetric for x in net(effort="best", weight_scheme="symmetric", weight_bits=4).plan.layers)
    packed = net(**few, effort="best", pack=True).wiring
    assert {packed.codes(n.input[1]).data_type for n in packed.all("Conv")} > {onnx.TensorProto.INT4}


@pytest.mark.parametrize("granularity", WeightGranularity)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packed_weights_are_int4_at_opset_21(granularity: WeightGranularity, bits: int) -> None:
    packed = net(weight_bits=bits, edge_bits=2, pack=True, weight_granularity=granularity, block_size=4)
    plain = net(weight_bits=bits, edge_bits=2, weight_granularity=granularity, block_size=4)
    for node in packed.wiring.all("Conv", "Gemm"):
        assert packed.wiring.codes(node.input[1]).data_type == onnx.TensorProto.INT4
    assert packed.proto.opset_import[0].version == 21
    assert packed.proto.ir_version == 10
    assert packed.proto.ByteSize() < plain.proto.ByteSize() + 300
    np.testing.assert_array_equal(packed.meant["y"], plain.meant["y"])  # the same numbers, stored smaller


@pytest.mark.parametrize(
    ("own", "options", "needed"),
    [
        (11, {}, 13),
        (13, {}, 13),
        (17, {"weight_bits": 4}, 17),
        (17, {"activation_bits": 32}, 17),
        (17, {"weight_bits": 4, "pack": True}, 21),
        (17, {"weight_bits": 16}, 21),
        (17, {"activation_bits": 16}, 21),
        (17, {"weight_granularity": WeightGranularity.PER_BLOCK}, 21),
        (22, {}, 22),
        (17, {"opset": 19}, 19),
    ],
)
def test_the_opset_is_the_models_own_or_the_lowest_needed(own: int, options: dict[str, object], needed: int) -> None:
    proto = network("c = Conv(x, w) r = Relu(c) y = Conv(r, v)", opset=own, w=(4, 3, 3, 3), v=(4, 4, 1, 1))
    proto.ir_version = 10
    result = quantized(proto, **options).check(10)
    assert result.proto.opset_import[0].version == needed


# -- shapes of networks ------------------------------------------------------------------------------------------------

KINDS: dict[str, onnx.ModelProto] = {
    "gemm": network("c = Gemm(x, w, b) r = Relu(c) y = Gemm(r, v)", x=(2, 12), w=(12, 8), b=(8,), v=(8, 4)),
    "transposed gemm": network(
        "c = Gemm<transB=1>(x, w, b) r = Relu(c) y = Gemm<transB=1>(r, v)", x=(2, 12), w=(8, 12), b=(8,), v=(4, 8)
    ),
    "matmul and add": network(
        "m = MatMul(x, w) c = Add(m, b) r = Relu(c) n = MatMul(r, v) y = Add(u, n)",
        x=(2, 12),
        w=(12, 8),
        b=(8,),
        v=(8, 4),
        u=(4,),
    ),
    "matmul of three axes": network(
        "m = MatMul(x, w) c = Add(m, b) r = Relu(c) y = MatMul(r, v)", x=(2, 5, 12), w=(12, 8), b=(8,), v=(8, 4)
    ),
    "matmul of two activations": network(
        "a = MatMul(x, w) b = MatMul(x, v) t = Transpose<perm=[0,2,1]>(b) s = MatMul(a, t) y = MatMul(s, u)",
        x=(2, 5, 12),
        w=(12, 8),
        v=(12, 8),
        u=(5, 4),
    ),
    "conv of sequences": network(
        "c = Conv<pads=[1,1]>(x, w, b) r = Relu(c) y = Conv(r, v)", x=(2, 3, 9), w=(6, 3, 3), b=(6,), v=(4, 6, 1)
    ),
    "conv of volumes": network(
        "c = Conv(x, w, b) r = Relu(c) y = Conv(r, v)", x=(2, 3, 4, 5, 5), w=(6, 3, 2, 3, 3), b=(6,), v=(4, 6, 1, 1, 1)
    ),
    "grouped": network(
        "c = Conv<group=2>(x, w, b) y = Conv(c, v)", x=(2, 4, 6, 6), w=(6, 2, 3, 3), b=(6,), v=(4, 6, 1, 1)
    ),
    "depthwise with a multiplier": network("c = Conv<group=3>(x, w) y = Conv(c, v)", w=(6, 1, 3, 3), v=(4, 6, 1, 1)),
    "without bias": network("c = Conv(x, w) y = Conv(c, v)", w=(6, 3, 3, 3), v=(4, 6, 1, 1)),
    "dilated": network("c = Conv<dilations=[2,2]>(x, w, b) y = Conv(c, v)", w=(6, 3, 3, 3), b=(6,), v=(4, 6, 1, 1)),
    "strided": network("c = Conv<strides=[2,2]>(x, w, b) y = Conv(c, v)", w=(6, 3, 3, 3), b=(6,), v=(4, 6, 1, 1)),
    "auto pad": network(
        'c = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w, b) y = Conv(c, v)', w=(6, 3, 3, 3), b=(6,), v=(4, 6, 1, 1)
    ),
    "open sizes": network("c = Conv(x, w) y = Conv(c, v)", x=("N", 3, "H", "W"), w=(6, 3, 1, 1), v=(4, 6, 1, 1)),
    "shared weights": network(
        f"c = Conv<{SAME}>(x, w, b) r = Relu(c) d = Conv<{SAME}>(r, w, b) y = Conv(d, w, b)", w=(3, 3, 3, 3), b=(3,)
    ),
    "shared weights and data": network(
        "c = Conv(x, w) s = Mul(x, k) d = Conv(s, w) y = Add(c, d)", w=(3, 3, 3, 3), k=4.0
    ),
    "a constant for a layer and an addition": network(
        "c = Conv(x, w, b) d = Add(c, k) e = Mul(d, k) y = Conv(e, k)", w=(1, 3, 3, 3), b=(1,), k=(1, 1, 1, 1)
    ),
    "two readers": network(
        "c = Conv(x, w) a = Conv(c, v) b = Conv(c, u) y = Add(a, b)", w=(6, 3, 3, 3), v=(4, 6, 1, 1), u=(4, 6, 1, 1)
    ),
    "returned inside": network(
        "c = Conv(x, w) r = Relu(c) y = Conv(r, v)", outputs=("r", "y"), w=(6, 3, 3, 3), v=(4, 6, 1, 1)
    ),
    "returned before its activation": network(
        "c = Conv(x, w) r = Relu(c) y = Conv(r, v)", outputs=("y", "c"), w=(6, 3, 3, 3), v=(4, 6, 1, 1)
    ),
    "returned twice": network(
        "c = Conv(x, w) m = MaxPool<kernel_shape=[2,2]>(c) y = Conv(m, v)",
        outputs=("c", "m", "y"),
        w=(6, 3, 3, 3),
        v=(4, 6, 1, 1),
    ),
    "returned from a float operator": network(
        "c = Conv(x, w) t = Tanh(c) y = Conv(t, v)", outputs=("t", "y"), w=(6, 3, 3, 3), v=(4, 6, 1, 1)
    ),
    "returned input": network("y = Conv(x, w) z = Identity(x)", outputs=("y", "z"), w=(6, 3, 3, 3)),
    "a network of one conv": network("y = Conv(x, w, b)", w=(6, 3, 3, 3), b=(6,)),
    "pool first": network("m = MaxPool<kernel_shape=[2,2]>(x) y = Conv(m, w)", w=(6, 3, 3, 3)),
    "split": network(
        "c = Conv(x, w) a, b = Split<axis=1>(c) d = Conv(a, v) y = Concat<axis=1>(d, b)",
        outputs=("y", "b"),
        w=(6, 3, 3, 3),
        v=(4, 3, 1, 1),
    ),
    "channel shuffle": network(
        "c = Conv(x, w) a = Reshape(c, five) b = Transpose<perm=[0,2,1,3,4]>(a) d = Reshape(b, four) y = Conv(d, v)",
        w=(6, 3, 3, 3),
        v=(4, 6, 1, 1),
        five=ints(0, 2, 3, 4, 4),
        four=ints(0, 6, 4, 4),
    ),
    "upsampling": network(
        'c = Conv(x, w) a = Resize<mode="nearest">(c, , k) b = DepthToSpace<blocksize=2>(a) y = Conv(b, v)',
        w=(8, 3, 3, 3),
        v=(4, 2, 1, 1),
        k=np.float32([1, 1, 2, 2]),
    ),
    "linear upsampling": network(
        'c = Conv(x, w) a = Resize<mode="linear">(c, , k) y = Conv(a, v)',
        w=(8, 3, 3, 3),
        v=(4, 8, 1, 1),
        k=np.float32([1, 1, 2, 2]),
    ),
    "transposed": network(
        "c = Conv(x, w) r = Relu(c) a = ConvTranspose<strides=[2,2]>(r, v, b) y = Conv(a, u)",
        w=(8, 3, 3, 3),
        v=(8, 4, 2, 2),
        b=(4,),
        u=(4, 4, 1, 1),
    ),
    "squeeze and excite": network(
        "c = Conv(x, w) g = GlobalAveragePool(c) s = Conv(g, v) t = Sigmoid(s) m = Mul(c, t) y = Conv(m, u)",
        w=(6, 3, 3, 3),
        v=(6, 6, 1, 1),
        u=(4, 6, 1, 1),
    ),
    "hard squeeze and excite": network(
        "c = Conv(x, w) g = GlobalAveragePool(c) s = Conv(g, v) t = HardSigmoid(s) m = Mul(c, t) y = Conv(m, u)",
        w=(6, 3, 3, 3),
        v=(6, 6, 1, 1),
        u=(4, 6, 1, 1),
    ),
    "silu": network("c = Conv(x, w) s = Sigmoid(c) m = Mul(c, s) y = Conv(m, v)", w=(6, 3, 3, 3), v=(4, 6, 1, 1)),
    "hard swish": network("c = Conv(x, w) h = HardSwish(c) y = Conv(h, v)", w=(6, 3, 3, 3), v=(4, 6, 1, 1)),
    "leaky": network("c = Conv(x, w) h = LeakyRelu<alpha=0.1>(c) y = Conv(h, v)", w=(6, 3, 3, 3), v=(4, 6, 1, 1)),
    "scores": network(
        "c = Conv(x, w) g = GlobalAveragePool(c) f = Flatten(g) l = Gemm(f, v) y = Softmax(l)", w=(6, 3, 3, 3), v=(6, 4)
    ),
    "a constant beside": network(
        "c = Conv(x, w) d = Add(c, k) e = Concat<axis=1>(d, more) y = Conv(e, v)",
        w=(6, 3, 3, 3),
        k=(1, 6, 1, 1),
        more=(2, 2, 4, 4),
        v=(4, 8, 1, 1),
    ),
    "dense": network(
        f"""a = Conv<{SAME}>(x, w1) b = Relu(a) c = Concat<axis=1>(x, b) d = Conv<{SAME}>(c, w2) e = Relu(d)
            f = Concat<axis=1>(c, e) y = Conv(f, w3)""",
        w1=(4, 3, 3, 3),
        w2=(4, 7, 3, 3),
        w3=(4, 11, 1, 1),
    ),
    "attention": network("c = Conv(x, w) s = Softmax<axis=1>(c) y = Conv(s, v)", w=(6, 3, 3, 3), v=(4, 6, 1, 1)),
    "hard swish in small parts": network(
        "c = Conv(x, w) a = Add(c, three) b = Clip(a, zero, six) d = Mul(c, b) e = Div(d, six) y = Conv(e, v)",
        w=(6, 3, 3, 3),
        v=(4, 6, 1, 1),
        zero=0.0,
        three=3.0,
        six=6.0,
    ),
    "a relu beside": network("r = Relu(x) a = Conv(x, w) b = Conv(r, v) y = Add(a, b)", w=(4, 3, 3, 3), v=(4, 3, 3, 3)),
    "joined with itself": network(
        "c = Conv(x, w) k = Concat<axis=1>(c, c) y = Conv(k, v)", w=(6, 3, 3, 3), v=(4, 12, 1, 1)
    ),
    "pieces in another order": network(
        "c = Conv(x, w) p, q = Split<axis=1>(c) k = Concat<axis=1>(q, p) y = Conv(k, v)", w=(6, 3, 3, 3), v=(4, 6, 1, 1)
    ),
    "backwards": network(
        "c = Conv(x, w) k = Slice(c, from, to, axes, steps) y = Conv(k, v)",
        w=(6, 3, 3, 3),
        v=(4, 6, 1, 1),
        **{"from": ints(-1), "to": ints(-9), "axes": ints(3), "steps": ints(-1)},
    ),
    "one row": network(
        "c = Conv(x, w) r = Gather<axis=2>(c, row) u = Unsqueeze(r, two) y = Conv(u, v)",
        w=(6, 3, 3, 3),
        v=(4, 6, 1, 1),
        row=np.array(1),
        two=ints(2),
    ),
    "pool of sequences": network(
        "c = Conv(x, w) m = MaxPool<kernel_shape=[2]>(c) y = Conv(m, v)", x=(2, 3, 9), w=(6, 3, 3), v=(4, 6, 1)
    ),
    "maximum": network(
        "c = Conv(x, w) m = ReduceMax<axes=[2,3], keepdims=0>(c) y = Gemm(m, v)", w=(6, 3, 3, 3), v=(6, 4)
    ),
    "residual to itself": network("c = Conv(x, w) a = Add(c, c) y = Conv(a, v)", w=(6, 3, 3, 3), v=(4, 6, 1, 1)),
    "gather": network(
        "c = Conv(x, w) a = Gather<axis=1>(c, rows) y = Conv(a, v)", w=(6, 3, 3, 3), rows=ints(0, 5, 2), v=(4, 3, 1, 1)
    ),
    "dropped out": network(
        "c = Conv(x, w) d = Dropout(c) i = Identity(d) y = Conv(i, v)", w=(6, 3, 3, 3), v=(4, 6, 1, 1)
    ),
}
# 16 bits and weights only run in float; packed weights, too.
WAYS: dict[str, dict[str, object]] = {
    "8 bits": {},
    "symmetric, per tensor": {
        "activation_scheme": Scheme.SYMMETRIC,
        "weight_granularity": WeightGranularity.PER_TENSOR,
    },
    "asymmetric": {"weight_scheme": Scheme.ASYMMETRIC},
    "7 bits": {"weight_bits": 7, "activation_bits": 7, "edge_bits": 7},
    "16 bits": {"weight_bits": 16, "activation_bits": 16},
    "blocks": {"weight_granularity": WeightGranularity.PER_BLOCK, "block_size": 4},
    "packed blocks": {
        "weight_granularity": WeightGranularity.PER_BLOCK,
        "block_size": 2,
        "weight_bits": 4,
        "pack": True,
    },
    "weights only": {"activation_bits": 32},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_networks_of_all_kinds(kind: str, way: str) -> None:
    """Right in every way of storing it; names, types and shapes of inputs and outputs stay."""
    proto = KINDS[kind]
    bits = WAYS[way].get("weight_bits", 8)
    result = quantized(proto, **WAYS[way]).check(10 if bits == 4 else 20 if bits == 7 else 25)
    for before, after in (
        (proto.graph.input, result.proto.graph.input),
        (proto.graph.output, result.proto.graph.output),
    ):
        assert [interface(value) for value in before] == [interface(value) for value in after]


def interface(value: onnx.ValueInfoProto) -> tuple[str, int, list[int | str]]:
    kind = value.type.tensor_type
    return value.name, kind.elem_type, [d.dim_param or d.dim_value for d in kind.shape.dim]


# What stays float in 8 bits, on purpose.
ISLANDS = {
    "returned from a float operator": {"Tanh"},
    "returned input": {"Identity"},
    "linear upsampling": {"Resize"},
    "transposed": {"ConvTranspose"},
    "hard squeeze and excite": {"HardSigmoid"},
    "hard swish": {"HardSigmoid", "Mul"},  # what the runtime makes of HardSwish
    "scores": {"Softmax"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_8_bits_run_in_integers(kind: str) -> None:
    result = quantized(KINDS[kind])
    ours = {"FusedConv": "Conv", "FusedGemm": "Gemm", "HardSigmoid": "HardSigmoid"}
    found = {ours.get(op, op) for op in result.islands} - {"Transpose"}
    assert found <= ISLANDS.get(kind, set())


def test_dynamic_batch_runs_at_every_size() -> None:
    session = Session(net().proto.SerializeToString(), threads=1)
    for size in (1, 3, 7):
        (y,) = session.run_all(pictures((size, 3, 8, 8))[0])
        assert y.shape == (size, 5)
    value = net().proto.graph.input[0]
    assert interface(value) == ("x", onnx.TensorProto.FLOAT, ["N", 3, 8, 8])


def test_shared_weights_are_stored_once() -> None:
    result = quantized(KINDS["shared weights"], weight_bits=7, edge_bits=7)
    inputs = {node.input[1] for node in result.wiring.all("Conv")}
    assert len(inputs) == 1


def test_a_tensor_has_one_quantizer() -> None:
    """Two of them on one tensor would keep the integer kernel away."""
    for kind in ("two readers", "returned inside", "dense", "squeeze and excite"):
        wiring = quantized(KINDS[kind]).wiring
        read = [node.input[0] for node in wiring.all("QuantizeLinear")]
        assert len(read) == len(set(read))


def test_kept_layers_stay_exactly_as_they_were() -> None:
    proto = network("c = Conv(x, w) r = Relu(c) y = Conv(r, v)", w=(4, 3, 3, 3), v=(4, 4, 1, 1))
    result = quantized(proto, keep_float=("y",)).check()
    (kept,) = [node for node in result.wiring.all("Conv") if node.name == "y"]
    np.testing.assert_array_equal(result.wiring.constants[kept.input[1]], Wiring(proto).constants["v"])
    assert result.audit.islands
    assert result.audit.islands[0].why == "kept float by --keep-float"


PAIRED = {
    "Conv": network("y = Conv(x, w)", x=(2, 8, 6, 6), w=(8, 8, 3, 3)),
    "grey picture": network("y = Conv(x, w)", x=(2, 1, 6, 6), w=(8, 1, 3, 3)),
    "depthwise with a multiplier": network("y = Conv<group=4>(x, w)", x=(2, 4, 6, 6), w=(8, 1, 3, 3)),
    "Gemm": network("g = Gemm(x, w) y = Relu(g)", x=(2, 8), w=(8, 8)),
}


@pytest.mark.parametrize("granularity", [WeightGranularity.PER_TENSOR, WeightGranularity.PER_CHANNEL])
@pytest.mark.parametrize("kind", PAIRED)
def test_pairs_of_products_fit_into_16_bits(kind: str, granularity: WeightGranularity) -> None:
    """Every 8-bit layer that no depthwise kernel runs, with codes up to 255 everywhere: see qconv/saturation.py."""
    proto = onnx.ModelProto.FromString(PAIRED[kind].SerializeToString())
    (stored,) = proto.graph.initializer
    weight = np.random.default_rng(0).uniform(0.8, 1, stored.dims).astype(np.float32)
    stored.CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    ends = [{"x": np.full(shape, end, np.float32)} for end in (0.0, 1.0)]
    (layer,) = quantized(proto, ends, weight_granularity=granularity).params.layers
    codes = layer.codes.astype(np.int64)
    rows = codes.T if codes.ndim == 2 else np.moveaxis(codes, 1, -1).reshape(len(codes), -1)
    even = rows[:, : rows.shape[1] // 2 * 2]
    assert (255 * np.abs(even[:, 0::2] + even[:, 1::2])).max() <= 32767


def test_one_matrix_is_a_network() -> None:
    """Nothing but its input needs to be watched."""
    quantized(network("y = Gemm(x, w, b)", x=(2, 5), w=(5, 4), b=(4,))).check()


# -- numbers by hand ---------------------------------------------------------------------------------------------------


def test_one_conv_by_hand() -> None:
    """x from 0 to 255 in steps of 1, weights 1 and -2 of one channel each: every code is the number itself."""
    weight = np.float32([127, -64]).reshape(2, 1, 1, 1)
    proto = network("y = Conv(x, w)", x=(1, 1, 16, 16), w=weight)
    x = np.arange(256, dtype=np.float32).reshape(1, 1, 16, 16)
    result = quantized(proto, [{"x": x}], calibrator="minmax")
    wiring = result.wiring
    (conv,) = wiring.all("Conv")
    scale, zero = wiring.parameters(conv.input[0])
    assert (float(scale), int(zero)) == (1.0, 0)
    scales, _ = wiring.parameters(conv.input[1])
    np.testing.assert_array_equal(scales, np.float32([127 / 127, 64 / 127]))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(wiring.codes(conv.input[1])).ravel(), [127, -127])
    scale, zero = wiring.parameters("y")
    step = (255 * 127 + 255 * 64) / 255  # 191
    assert (float(scale), int(zero)) == (step, 85)  # -255 * 64 / 191 = -85.4
    expected = np.clip(np.rint(result.expected["y"] / 191) + 85, 0, 255)
    np.testing.assert_array_equal(np.rint(result.got["y"] / step + 85), expected)


def test_the_mean_stays_where_weights_are_coarse() -> None:
    """Bias correction: 3-bit weights move a channel's mean by much more than what is left of it."""
    weight = np.random.default_rng(3).uniform(0, 1, (4, 8, 1, 1)).astype(np.float32)
    proto = network("y = Conv(x, w)", x=(8, 8, 6, 6), w=weight)
    samples = pictures((8, 8, 6, 6), low=0.0)
    result = quantized(proto, samples, weight_bits=3, edge_bits=2, activation_bits=16)
    moved = np.abs((result.got["y"] - result.expected["y"]).mean(axis=(0, 2, 3)))
    codes = result.params.layers[0]
    error = weight - codes.weight.dequantize(codes.codes)
    mean = np.concatenate([feeds["x"] for feeds in samples]).mean(axis=(0, 2, 3))
    uncorrected = np.abs(np.einsum("oi,i->o", error[:, :, 0, 0], mean))
    assert uncorrected.max() > 0.05
    assert moved.max() < 1e-3


# -- shrink ------------------------------------------------------------------------------------------------------------


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
    assert said(findings) == [("k", f"stored as {values} values and one byte an element")]


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


# -- through the front door --------------------------------------------------------------------------------------------


def test_the_whole_story_agrees_with_its_parts(tmp_path: Path) -> None:
    """The file that `quantize` writes from samples on disk gives what the parts gave, bit for bit."""
    (tmp_path / "calib").mkdir()
    samples = pictures((1, 3, 8, 8))
    for index, feeds in enumerate(samples):
        np.save(tmp_path / "calib" / f"{index}.npy", feeds["x"][0])
    onnx.save(NET, tmp_path / "net.onnx")
    recipe, data = Recipe(threads=1, effort="fast"), DataOptions((str(tmp_path / "calib"),))
    report, _ = quantize(tmp_path / "net.onnx", tmp_path / "out.onnx", recipe, data)
    assert (report.audit.float, report.opset) == (0, 17)
    written = joined(Session(str(tmp_path / "out.onnx"), optimize=False, threads=1), samples)
    parts = quantized(NET, samples)
    np.testing.assert_array_equal(written["y"], parts.meant["y"])
    assert report.verify.sqnr_db == pytest.approx(parts.sqnr(), abs=0.01)
    assert report.quantized_bytes == (tmp_path / "out.onnx").stat().st_size


# -- what ONNX Runtime would do on its own -----------------------------------------------------------------------------

CHAIN_OF_THREE = "a = Conv(x, w) r = Relu(a) b = {node} s = Relu(b) y = Conv(s, u)"
TINY = np.random.default_rng(0).normal(size=(4, 4, 3, 3)).astype(np.float32) * 1e-4
LARGE = np.float32([3, 4, 5, 6]) * 1000


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("node", ["Conv(r, v, k)", "ConvTranspose<strides=[2,2]>(r, v, k)"])
def test_layers_between_codes_that_stay_float_are_left_alone(node: str, bits: int) -> None:
    """ONNX Runtime 1.32 rounds the weights of such a layer to one int8 scale, and lets its bias overflow."""
    proto = network(CHAIN_OF_THREE.format(node=node), x=(1, 3, 10, 10), w=(4, 3, 3, 3), v=TINY, k=LARGE, u=(4, 4, 3, 3))
    result = quantized(proto, keep_float=("b",), weight_bits=bits, activation_bits=bits).check(45 if bits == 8 else 80)
    assert any(name in result.runs for name in ("Conv", "FusedConv", "ConvTranspose"))
    reasons = {island.node: island.why for island in result.audit.islands}
    assert reasons["b"] == "kept float by --keep-float"


@pytest.mark.parametrize("between", ["MaxPool<kernel_shape=[2,2]>", "Transpose<perm=[0,1,3,2]>", "Relu"])
@pytest.mark.parametrize("node", ["Conv(r, v, k)", "AveragePool<kernel_shape=[2,2]>(r)"])
def test_what_moves_values_lets_no_quantizer_up(node: str, between: str) -> None:
    """ONNX Runtime takes a quantizer to the front of a MaxPool or Transpose, and would find the kept node there."""
    body = f"a = Conv(x, w) r = Relu(a) b = {node} s = {between}(b) y = Conv(s, u)"
    numbers = {"v": TINY, "k": LARGE} if "Conv" in node else {}
    proto = network(body, x=(1, 3, 12, 12), w=(4, 3, 3, 3), u=(4, 4, 3, 3), **numbers)
    result = quantized(proto, keep_float=("b",)).check()
    assert "b" in {island.node for island in result.audit.islands}


@pytest.mark.parametrize("node", ["Add(r, r)", "AveragePool<kernel_shape=[2,2]>(r)", "Sigmoid(r)"])
def test_a_wish_for_float_holds_for_operators_without_weights(node: str) -> None:
    proto = network(CHAIN_OF_THREE.format(node=node), x=(1, 3, 10, 10), w=(4, 3, 3, 3), u=(4, 4, 3, 3))
    result = quantized(proto, keep_float=("b",)).check()
    assert result.audit.float >= 1
    assert "kept float by --keep-float" in {island.why for island in result.audit.islands}


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("kernel_shape=[2,2], strides=[2,2], ceil_mode=1, count_include_pad=1", 9),
        ("kernel_shape=[3,3], strides=[2,2], ceil_mode=1, count_include_pad=1", 10),
        ("kernel_shape=[3,3], strides=[2,2], ceil_mode=1, count_include_pad=1, pads=[1,1,1,1]", 10),
        ("kernel_shape=[3,3], strides=[2,2], ceil_mode=1, pads=[1,1,1,1]", 10),
        ("kernel_shape=[3,3], strides=[2,2], count_include_pad=1, pads=[1,1,1,1]", 10),
        ("kernel_shape=[2,2], dilations=[2,2]", 9),
    ],
)
def test_average_pools_divide_by_the_same_numbers(attributes: str, size: int) -> None:
    body = f"c = Conv<{SAME}>(x, w) a = AveragePool<{attributes}>(c) y = Conv(a, v)"
    quantized(network(body, x=(1, 3, size, size), opset=19, w=(4, 3, 3, 3), v=(4, 4, 1, 1))).check()


def test_a_mean_that_cancels_runs() -> None:
    """ONNX Runtime refuses to multiply by 256 or more: the map's step over the mean's step and the map's size."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 3, 3, 3))
    weight = (weight - weight.mean((2, 3), keepdims=True)).astype(np.float32)  # all that it writes sums to zero
    body = "a = Conv<pads=[2,2,2,2]>(x, w) p = GlobalAveragePool(a) y = Conv(p, u)"
    x = np.zeros((1, 3, 10, 10), np.float32)
    x[:, :, 3:7, 3:7] = rng.normal(size=(3, 4, 4))
    result = quantized(network(body, x=(1, 3, 10, 10), w=weight, u=(4, 4, 1, 1)), [{"x": x}])
    assert np.isfinite(result.got["y"]).all()
    np.testing.assert_allclose(result.got["y"], result.meant["y"], atol=1e-3)


def test_constants_shared_by_data_and_bounds() -> None:
    """One number is added, and is the bound of a Clip; one list is multiplied with, and is a Resize's scales."""
    body = (
        "c = Conv(x, w) r = Relu(c) a = Add(r, c) e = Mul(a, one) b = Clip(e, zero, one) y = Conv(b, v) z = Conv(e, v)"
    )
    numbers = {"w": (4, 3, 3, 3), "v": (4, 4, 1, 1), "one": 1.0, "zero": 0.0}
    quantized(network(body, outputs=("y", "z"), **numbers)).check(25)
    body = 'c = Conv(x, w) m = Resize<mode="nearest">(c, , k) d = Mul(m, k) y = Conv(d, v)'
    scales = np.float32([1, 1, 2, 2])
    quantized(network(body, x=(1, 3, 4, 4), w=(4, 3, 3, 3), k=scales, v=(4, 4, 1, 1))).check()


def test_a_mask_is_no_data() -> None:
    """What is added to shut positions out of a Softmax would leave one code for everything else."""
    mask = np.zeros((1, 4, 4, 4), np.float32)
    mask[:, :, :, 2:] = -1e9
    body = "c = Conv(x, w) a = Add(c, mask) s = Softmax<axis=-1>(a) y = Conv(s, v)"
    result = quantized(network(body, x=(1, 3, 6, 6), w=(4, 3, 3, 3), mask=mask, v=(4, 4, 1, 1))).check(25)
    assert "Add" in result.islands


def test_a_matmul_knows_nothing_of_single_channels() -> None:
    """Axis 1 of (N, S, K) is no channel, not even where S = K: pairs must fit for all codes."""
    rng = np.random.default_rng(1)
    x = rng.uniform(0, 0.05, (8, 64, 64)).astype(np.float32)
    x[:, 0] = 1
    weight = rng.uniform(0.8, 1, (64, 16)).astype(np.float32)
    result = quantized(
        network("c = MatMul(x, w) r = Relu(c) y = MatMul(r, v)", x=(8, 64, 64), w=weight, v=(16, 8)), [{"x": x}]
    )
    codes = result.params.layers[0].codes.astype(np.int64)
    assert (255 * np.abs(codes[0::2] + codes[1::2])).max() <= 32767


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"keep_float_op": ("Conv",)}, "kept float by --keep-float-op"),
        ({"activation_bits": 32}, "only weights are quantized"),
        ({"activation_bits": 16}, "codes of 16 bits have no integer kernel"),
        (
            {"weight_granularity": WeightGranularity.PER_BLOCK},
            "weights with a scale for each block have no integer kernel",
        ),
        ({"weight_bits": 4, "edge_bits": 4, "pack": True}, "packed weights are unpacked to float"),
    ],
)
def test_every_convolution_in_float_says_why(options: dict[str, object], why: str) -> None:
    """Under its own name, however ONNX Runtime calls the node it made of it."""
    found = {island.node: island.why for island in net(**options).audit.islands}
    assert {name: found.get(name) for name in "cdp"} == dict.fromkeys("cdp", why)


def test_what_follows_a_result_in_float_is_counted_as_float() -> None:
    """QGemm without a quantizer behind it gives floats, so the Softmax works on floats."""
    body = "c = Conv(x, w) r = Relu(c) f = Flatten(r) g = Gemm(f, v) y = Softmax(g)"
    result = quantized(network(body, x=(2, 3, 6, 6), w=(4, 3, 3, 3), v=(64, 5)))
    assert "QGemm" in result.runs
    assert [(island.op, island.why) for island in result.audit.islands] == [
        ("Softmax", "behind the last layer with weights, where float keeps precision and costs little")
    ]
