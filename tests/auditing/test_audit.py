"""What ONNX Runtime makes of a file and why: rules on networks that break one each, names found again, times."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qconv.auditing.audit import FileAudit, audit_file
from qconv.config.data_options import DataOptions, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.pipeline.quantize import quantize
from qconv.report.text import format_audit as printed
from tests.support.libraries import needs
from tests.support.models import network

CIFAR = Path(__file__).parents[1] / "models" / "cifar_mobilenet.onnx"
PHOTOS = Path(__file__).parents[2] / "calib_samples"


class QDQ:
    """A Q/DQ network written by hand: x (1, 4, 8, 8), 8-bit codes in steps of 1/64."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def grid(self, scale: float, zero: int, dtype: type) -> tuple[str, str]:
        return self.constant(np.float32(scale)), self.constant(dtype(zero))

    def pair(self, x: str, scale: float = 1 / 64, zero: int = 128, dtype: type = np.uint8) -> str:
        grid = self.grid(scale, zero, dtype)
        return self.node("DequantizeLinear", self.node("QuantizeLinear", x, *grid), *grid)

    def weights(self, scale: float = 1 / 64, codes: NDArray | None = None) -> str:
        codes = np.random.default_rng(0).integers(-90, 91, (4, 4, 3, 3)).astype(np.int8) if codes is None else codes
        return self.node("DequantizeLinear", self.constant(codes), *self.grid(scale, 0, np.int8))

    def bias(self, scale: float = 1 / 64 / 64) -> str:
        return self.node("DequantizeLinear", self.constant(np.int32([1, 2, 3, 4])), *self.grid(scale, 0, np.int32))

    def conv(self, x: str, *more: str, name: str = "conv") -> str:
        return self.node("Conv", x, *more, name=name, pads=[1, 1, 1, 1])

    def examined(self, y: str, tmp_path: Path) -> FileAudit:
        ends = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in (("x", [1, 4, 8, 8]), (y, None))
        ]
        graph = helper.make_graph(self.nodes, "g", ends[:1], ends[1:], self.constants)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        path = tmp_path / "made.onnx"
        onnx.save(onnx.shape_inference.infer_shapes(proto), path)
        return audit_file(Source(str(path), path), threads=1, batch=None, size=None)


def island(found: FileAudit, node: str) -> tuple[str, str | None]:
    one = next(island for island in found.audit.islands if island.node == node)
    return one.rule, one.remedy


def test_a_layer_between_codes_runs_in_integers(tmp_path: Path) -> None:
    net = QDQ()
    found = net.examined(net.pair(net.conv(net.pair("x"), net.weights(), net.bias())), tmp_path)
    assert found.format == "Q/DQ"
    assert [(layer.node, layer.op) for layer in found.audit.layers if layer.op == "QLinearConv"] == [
        ("conv", "QLinearConv")
    ]
    assert found.audit.islands == ()


def test_an_output_without_a_quantizer(tmp_path: Path) -> None:
    net = QDQ()
    found = net.examined(net.conv(net.pair("x"), net.weights(), net.bias()), tmp_path)
    assert island(found, "conv")[0] == "graph-output"


def test_two_readers_and_no_quantizer(tmp_path: Path) -> None:
    net = QDQ()
    y = net.conv(net.pair("x"), net.weights(), net.bias())
    found = net.examined(net.node("Sub", net.pair(y), y, name="minus"), tmp_path)
    assert island(found, "conv")[0] == "several-readers"
    assert island(found, "minus")[0] == "no-kernel"


def test_float_weights(tmp_path: Path) -> None:
    net = QDQ()
    weight = net.constant(np.ones((4, 4, 3, 3), np.float32))
    found = net.examined(net.pair(net.conv("x", weight)), tmp_path)
    assert island(found, "conv")[0] == "float-input"
    net = QDQ()
    weight = net.constant(np.ones((4, 4, 3, 3), np.float32))
    out = net.node("Add", net.conv(net.pair("x"), net.weights(), net.bias()), net.constant(np.ones((), np.float32)))
    rule, remedy = island(net.examined(net.pair(net.node("Relu", out)), tmp_path), "conv")
    assert rule == "no-quantizer"
    assert remedy is not None


def test_a_float_constant_beside_codes(tmp_path: Path) -> None:
    net = QDQ()
    y = net.pair(net.conv(net.pair("x"), net.weights(), net.bias()))
    scaled = net.node("Mul", y, net.constant(np.full((1, 4, 1, 1), 0.5, np.float32)), name="scaled")
    found = net.examined(net.pair(scaled), tmp_path)
    assert island(found, "scaled")[0] == "float-constant"


def test_a_clip_that_the_codes_reach_beyond(tmp_path: Path) -> None:
    """ReLU6 in steps of 6.5 / 255 stays; in steps of 6 / 255 it goes."""
    for top, kept in ((6.5, True), (6.0, False)):
        net = QDQ()
        y = net.conv(net.pair("x"), net.weights(), net.bias())
        clipped = net.node("Clip", y, net.constant(np.float32(0)), net.constant(np.float32(6)), name="clip")
        found = net.examined(net.pair(clipped, top / 255, 0), tmp_path)
        assert bool(found.audit.islands) is kept
        if kept:
            assert found.audit.islands[0].rule == "clip-range"


def test_a_relu_below_codes_of_both_signs(tmp_path: Path) -> None:
    net = QDQ()
    y = net.conv(net.pair("x"), net.weights(), net.bias())
    found = net.examined(net.pair(net.node("Relu", y, name="relu"), zero=128), tmp_path)
    assert found.audit.islands[0].rule == "relu-zero-point"


def test_codes_of_16_bits(tmp_path: Path) -> None:
    proto = network("c = Conv(x, w)  y = Relu(c)", (1, 3, 8, 8), w=(4, 3, 3, 3))
    np.save(tmp_path / "0.npy", np.random.default_rng(0).random((3, 8, 8), np.float32))
    _, data = quantize(
        Source("m", None, proto.SerializeToString()), None, Recipe(activation_bits=16), DataOptions((str(tmp_path),))
    )
    assert data is not None
    found = audit_file(Source("m", None, data), threads=1, batch=None, size=None)
    assert {i.rule for i in found.audit.islands if i.op == "Conv"} == {"types"}


def test_unequal_parameters_around_a_pool(tmp_path: Path) -> None:
    net = QDQ()
    pooled = net.node("MaxPool", net.pair("x"), name="pool", kernel_shape=[2, 2])
    found = net.examined(net.pair(pooled, 1 / 32), tmp_path)
    assert island(found, "pool")[0] == "parameters-differ"


def test_what_the_runtime_makes_of_several_is_called_after_the_last(tmp_path: Path) -> None:
    """x * Sigmoid(x) in float becomes one QuickGelu."""
    net = QDQ()
    net.node("Sigmoid", "x", name="gate")
    found = net.examined(net.pair(net.node("Mul", "x", "gate", name="silu")), tmp_path)
    assert [(layer.op, layer.node) for layer in found.audit.layers] == [("QuickGelu", "silu")]


@pytest.mark.parametrize(
    ("op_type", "attributes"), [("Tanh", {}), ("ReduceMean", {"axes": [2, 3]}), ("Elu", {}), ("HardSwish", {})]
)
def test_operators_without_a_kernel(op_type: str, attributes: dict[str, Any], tmp_path: Path) -> None:
    net = QDQ()
    found = net.examined(net.pair(net.node(op_type, net.pair("x"), name="odd", **attributes)), tmp_path)
    rule, remedy = island(found, "odd")
    assert rule == "no-kernel"
    assert (remedy is not None) is (op_type == "ReduceMean")


@pytest.mark.parametrize("copied", [False, True])
def test_a_pool_that_is_slow_on_codes_is_named(tmp_path: Path, copied: bool) -> None:
    """The runtime moves the quantizer to the front of the pool, past which a Sum of one tensor keeps it."""
    net = QDQ()
    weights = net.constant(np.random.default_rng(0).normal(size=(4, 4, 3, 3)).astype(np.float32))
    pooled = net.node("MaxPool", net.conv("x", weights), name="pool", kernel_shape=[3, 3], pads=[1] * 4)
    y = net.pair(net.node("Sum", pooled) if copied else pooled)
    found = net.examined(net.pair(net.conv(y, net.weights(), net.bias(), name="next")), tmp_path)
    assert [(node.node, node.rule) for node in found.audit.slow] == [] if copied else [("pool", "plain-layout")]
    assert ("slow in integers" in printed(found, verbose=False)) is not copied
    assert len(found.as_dict()["slow"]) == (0 if copied else 1)


def test_pairs_that_may_saturate(tmp_path: Path) -> None:
    """127 * 255 * 2 is 1.98 times what 16 bits hold; 60 * 255 * 2 fits; a depthwise kernel has no pairs."""
    for code, worst in ((127, 2 * 127 * 255 / 32767), (60, None)):
        net = QDQ()
        y = net.conv(net.pair("x"), net.weights(codes=np.full((4, 4, 3, 3), code, np.int8)), net.bias())
        found = net.examined(net.pair(y), tmp_path).audit.saturating
        assert [layer.worst for layer in found] == ([] if worst is None else [pytest.approx(worst)])
    net = QDQ()
    weight = net.weights(codes=np.full((4, 1, 3, 3), 127, np.int8))
    y = net.node("Conv", net.pair("x"), weight, net.bias(), pads=[1, 1, 1, 1], group=4)
    assert net.examined(net.pair(y), tmp_path).audit.saturating == ()


@pytest.mark.parametrize(
    ("shape", "group", "pairs"), [((4, 1, 3, 3), 1, True), ((8, 1, 3, 3), 4, True), ((4, 1, 3, 3), 4, False)]
)
def test_only_true_depthwise_kernels_have_no_pairs(
    shape: tuple[int, ...], group: int, pairs: bool, tmp_path: Path
) -> None:
    """One input channel alone, or two outputs for each, are multiplied in pairs like any other."""
    net = QDQ()
    weight = net.weights(codes=np.full(shape, 127, np.int8))
    x = net.pair("x") if group > 1 else net.pair(net.node("Conv", "x", net.constant(np.ones((1, 4, 1, 1), np.float32))))
    found = net.examined(net.pair(net.node("Conv", x, weight, name="conv", group=group)), tmp_path)
    assert bool([layer for layer in found.audit.saturating if layer.node == "conv"]) is pairs


def test_blocked_weights_are_the_reason(tmp_path: Path) -> None:
    net = own_file(tmp_path, weight_granularity="per-block", block_size=2)
    assert {i.rule for i in net.audit.islands if i.op == "Conv"} == {"blocked-weights"}


def own_file(tmp_path: Path, **options: Any) -> FileAudit:
    """A small network quantized by qconv."""
    proto = network("c = Conv(x, w)  r = Relu(c)  y = Conv(r, k)", (1, 3, 8, 8), w=(16, 3, 3, 3), k=(16, 16, 3, 3))
    samples = tmp_path / "samples"
    samples.mkdir(exist_ok=True)
    np.save(samples / "0.npy", np.random.default_rng(0).random((3, 8, 8), np.float32))
    _, data = quantize(
        Source("m", None, proto.SerializeToString()), None, Recipe(**options), DataOptions((str(samples),))
    )
    assert data is not None
    return audit_file(Source("m", None, data), threads=1, batch=None, size=None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target": "tensorrt"}, "written for tensorrt"),
        ({"activation_bits": 32}, "only weights are quantized"),
        ({"keep_float": ("y",)}, "kept float by --keep-float"),
        ({"keep_float_op": ("Conv",)}, None),
    ],
)
def test_the_recipe_in_the_file_is_a_reason(options: dict[str, Any], reason: str | None, tmp_path: Path) -> None:
    if reason is None:
        with pytest.raises(QconvError, match="nothing to quantize"):
            own_file(tmp_path, **options)
        return
    islands = own_file(tmp_path, **options).audit.islands
    assert any(reason in island.why and island.remedy is None for island in islands)


def test_widened_scales_are_claimed_only_where_they_are(tmp_path: Path) -> None:
    """No layer goes to float for its noise: on a CPU that saturates, those that could would go first."""
    files = {safe: own_file(tmp_path, saturation_safe=safe, float_budget=0) for safe in (None, True, False)}
    texts = {safe: printed(found, verbose=False) for safe, found in files.items()}
    assert "has widened" not in texts[False]
    assert "could saturate" in texts[False]
    assert "could saturate" not in texts[True]


# -- qconv's own files -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers are left in float that gain little there: some are, whatever the committed table says."""
    out = tmp_path_factory.mktemp("demo") / "demo.onnx"
    data = DataOptions((str(PHOTOS),), preprocessing=PreprocessingOptions("imagenet", resize="exact"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qconv.planning.placement.FLOAT_MARGIN", 0.9)
        for name in ("LEAST_GAIN_SHARE", "LEAST_GAIN_US"):
            patch.setattr(f"qconv.planning.placement.{name}", -math.inf)
        quantize(CIFAR, out, Recipe(), data)
    return out


@needs("onnxruntime", "1.22", "older ones give nodes names of their own, or none")
def test_every_node_of_the_file_is_found_again(demo: Path) -> None:
    found = audit_file(Source(str(demo), demo), threads=1, batch=None, size=None)
    names = {node.name for node in onnx.load(demo).graph.node} | {n.name for n in onnx.load(CIFAR).graph.node}
    assert {layer.node for layer in found.audit.layers} <= names
    carried = {entry.key: entry.value for entry in onnx.load(demo).metadata_props}
    ((why, placed),) = json.loads(carried["qconv.placed"]).items()
    layers = [name for name in placed if "relu6" not in name]  # the runtime makes one node of both
    assert {island.node: island.why for island in found.audit.placed} == dict.fromkeys(layers, why)
    assert why == "faster in float"
    assert found.audit.islands == ()
    assert found.as_dict()["by_qconv"]


def test_times_add_up(demo: Path) -> None:
    audited = audit_file(Source(str(demo), demo), threads=1, batch=None, size=None).audit
    told = audited.as_dict()["us"]
    assert told["total"] == pytest.approx(told["integer"] + told["float"] + told["converting"])
    assert all(us >= 0 for us in told.values())
    assert sum(layer.us or 0 for layer in audited.layers if layer.runs == "integer") == pytest.approx(told["integer"])


def test_the_json_is_one_object(demo: Path) -> None:
    found = audit_file(Source(str(demo), demo), threads=1, batch=4, size=None).as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {"format", "integer", "float", "islands", "placed", "us", "saturating", "layers", "cpu"} <= set(found)


def test_saturation_safe_leaves_no_layer_that_could(tmp_path: Path) -> None:
    """Layers are in float by their times alone, so that all three files have the same in integers on every CPU."""
    counts = {}
    for safe in (None, True, False):
        recipe, data = (
            Recipe(saturation_safe=safe, float_budget=0),
            DataOptions((str(PHOTOS),), samples=8, preprocessing=PreprocessingOptions("imagenet", resize="exact")),
        )
        report, data = quantize(CIFAR, None, recipe, data)
        assert data is not None
        found = audit_file(Source("m", None, data), threads=1, batch=None, size=None).audit.saturating
        assert [layer.node for layer in found] == [layer.node for layer in report.audit.saturating]
        counts[safe] = sum(layer.outputs for layer in found)
    assert counts[True] == 0
    assert 0 < counts[None] <= counts[False]


def test_a_float_model_is_told_to_be_one() -> None:
    found = audit_file(Source(str(CIFAR), CIFAR), threads=1, batch=None, size=None)
    assert found.format == "float"
    assert found.audit.integer == 0
    assert "nothing is quantized" in printed(found, verbose=False).replace("\n", " ")  # a long path wraps it
    assert "islands" not in printed(found, verbose=False)


def test_integer_operators_in_the_file_are_told(tmp_path: Path) -> None:
    """QOperator: what ONNX Runtime itself writes of an optimized graph."""
    net = QDQ()
    weights = net.weights(codes=np.full((4, 4, 3, 3), 127, np.int8))
    net.examined(net.pair(net.conv(net.pair("x"), weights, net.bias())), tmp_path)
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "qoperator.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    ort.InferenceSession(str(tmp_path / "made.onnx"), options, providers=["CPUExecutionProvider"])
    path = tmp_path / "qoperator.onnx"
    found = audit_file(Source(str(path), path), threads=1, batch=None, size=None)
    assert found.format == "QOperator"
    assert [layer.outputs for layer in found.audit.saturating] == [4]
    assert "qconv writes Q/DQ" in " ".join(printed(found, verbose=False).split())
    assert found.audit.integer == 1


def test_what_does_not_load_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "no.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(QconvError):
        audit_file(Source(str(path), path), threads=1, batch=None, size=None)


def test_lines_have_80_columns(demo: Path) -> None:
    text = printed(audit_file(Source("demo.onnx", demo), threads=1, batch=None, size=None), verbose=False)
    assert max(map(len, text.splitlines())) <= 80
