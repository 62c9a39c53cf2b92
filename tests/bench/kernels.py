"""What operators cost in float and in integers: the table that placement goes by, measured once for a target.

    python -m tests.bench.kernels            print the table
    python -m tests.bench.kernels --write    and write it into qconv/config/cost_table.json

An operator's cost is what a chain of layers gains in time with each further one, in place: between convolutions in the
layout that the runtime gives them, conversions of layout included. Chains with and without it take turns, and the
median of the differences within a round counts. Several map sizes give a fixed part and a part per unit of work.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qconv.config.targets import read_cost_tables
from qconv.runtime.benchmark import detect_cpu

CHANNELS = (8, 16, 32, 64, 128, 256)
SIDES = (14, 56)
SHORT, LONG = 2, 6
ROUNDS = 15
TURN_S = 0.012
MOST_MACS = 3e8
SCALE, ZERO = 0.05, 128
TABLE = Path(__file__).resolve().parents[2] / "qconv" / "config" / "cost_table.json"


@dataclass
class Graph:
    """A model under construction; in integers every operator stands between quantizer and dequantizer."""

    integer: bool
    side: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def pair(self, x: str) -> str:
        grid = self.constant(np.float32(SCALE)), self.constant(np.uint8(ZERO))
        return self.node("DequantizeLinear", self.node("QuantizeLinear", x, *grid), *grid)

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        x = self.node(op_type, *inputs, **attributes)
        return self.pair(x) if self.integer else x

    def scalar(self) -> str:
        """A constant operand."""
        if not self.integer:
            return self.constant(np.float32(0.5))
        return self.node(
            "DequantizeLinear", self.constant(np.uint8(255)), self.constant(np.float32(0.5 / 255)), self._zero()
        )

    def _zero(self) -> str:
        return self.constant(np.uint8(0))

    def weights(self, shape: Sequence[int], axis: int) -> tuple[str, str]:
        """A layer's weights and bias."""
        drawn = self.rng.normal(size=shape) / np.sqrt(np.prod(shape) / shape[axis])
        weight = drawn.astype(np.float32)
        count = shape[axis]
        if not self.integer:
            return self.constant(weight), self.constant(np.zeros(count, np.float32))
        others = tuple(i for i in range(len(shape)) if i != axis)
        scale = (np.abs(weight).max(axis=others) / 127).astype(np.float32)
        wide = np.expand_dims(scale, others)
        codes = self.constant(np.rint(weight / wide).astype(np.int8))
        own = self.constant(scale), self.constant(np.zeros(count, np.int8))
        stored = self.node("DequantizeLinear", codes, *own, axis=axis)
        sums = self.constant((scale * np.float32(SCALE)).astype(np.float32)), self.constant(np.zeros(count, np.int32))
        bias = self.node("DequantizeLinear", self.constant(np.zeros(count, np.int32)), *sums, axis=0)
        return stored, bias

    def codes(self, x: str) -> str:
        """What the dequantizer of a tensor reads."""
        return next(node.input[0] for node in self.nodes if x in node.output)

    def dequantized(self, codes: str, scale: float = SCALE) -> str:
        grid = self.constant(np.float32(scale)), self.constant(np.uint8(ZERO))
        return self.node("DequantizeLinear", codes, *grid)

    def conv(self, x: str, inputs: int, outputs: int, kernel: int, group: int = 1, stride: int = 1) -> str:
        weights = self.weights((outputs, inputs // group, kernel, kernel), 0)
        shape = {"kernel_shape": [kernel, kernel], "pads": [kernel // 2] * 4, "strides": [stride] * 2}
        return self.op("Conv", x, *weights, group=group, **shape)

    def gemm(self, x: str, channels: int) -> str:
        return self.op("Gemm", x, *self.weights((channels, channels), 0), transB=1)

    def model(self, shape: Sequence[int], results: Sequence[str]) -> bytes:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results]
        graph = helper.make_graph(self.nodes, "g", [x], outputs, self.constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return bytes(made.SerializeToString())


Link = Callable[[Graph, str, int], str]
"""One link of a chain: (graph, tensor, channels) -> tensor of the same shape."""


def conv(kernel: int, group: Callable[[int], int] = lambda channels: 1) -> Link:
    return lambda graph, x, channels: graph.conv(x, channels, channels, kernel, group(channels))


POINTWISE = conv(1)
POOL: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1] * 4}


def after_conv(op_type: str, **attributes: Any) -> Link:
    return lambda graph, x, channels: graph.op(op_type, POINTWISE(graph, x, channels), **attributes)


def _joined(op_type: str) -> Link:
    return lambda graph, x, channels: graph.op(op_type, POINTWISE(graph, x, channels), x)


def _mul_constant(graph: Graph, x: str, channels: int) -> str:
    return graph.op("Mul", POINTWISE(graph, x, channels), graph.scalar())


def _divided(graph: Graph, x: str, channels: int) -> str:
    """By a constant; it has no integer kernel, multiplying has."""
    y = POINTWISE(graph, x, channels)
    return graph.op("Mul", y, graph.scalar()) if graph.integer else graph.op("Div", y, graph.scalar())


def _mul_broadcast(graph: Graph, x: str, channels: int) -> str:
    """A map times one number a channel, as squeeze-and-excite has it, the pooling included."""
    y = POINTWISE(graph, x, channels)
    return graph.op("Mul", y, graph.op("GlobalAveragePool", y))


def _hard_sigmoid(graph: Graph, x: str, channels: int) -> str:
    """On codes a sum: of what is read as steep as the line, and a constant."""
    y = POINTWISE(graph, x, channels)
    if not graph.integer:
        return graph.op("HardSigmoid", y, alpha=1 / 6, beta=0.5)
    (codes, *_) = graph.nodes[-1].input
    line = graph.node("DequantizeLinear", codes, graph.constant(np.float32(SCALE / 6)), graph.constant(np.uint8(ZERO)))
    return graph.op("Add", line, graph.scalar())


def _shuffled(graph: Graph, x: str, channels: int) -> str:
    side = graph.side
    split = graph.constant(np.int64([1, 4, channels // 4, side, side]))
    whole = graph.constant(np.int64([1, channels, side, side]))
    y = graph.op("Reshape", POINTWISE(graph, x, channels), split)
    return graph.op("Reshape", graph.op("Transpose", y, perm=[0, 2, 1, 3, 4]), whole)


def _gathered(graph: Graph, x: str, channels: int) -> str:
    """What becomes of a channel shuffle: one Gather of the channels in another order."""
    y = POINTWISE(graph, x, channels)
    order = np.arange(channels).reshape(4, -1).T.reshape(-1)
    return graph.op("Gather", y, graph.constant(order.astype(np.int64)), axis=1)


def _switching(graph: Graph, x: str, channels: int) -> str:
    """An integer layer and a float one: there and back again, past the copy that keeps the float layer float."""
    y = POINTWISE(graph, x, channels)
    inner = replace(graph, integer=False)
    y = POINTWISE(inner, y, channels)
    return graph.pair(graph.node("Sum", y)) if graph.integer else y


def _noisy(graph: Graph, x: str, channels: int) -> str:
    """A sum with numbers of its own: a MaxPool of codes takes longer where it cannot foretell which is the greatest."""
    noise = graph.rng.integers(0, 256, (1, channels, graph.side, graph.side))
    if not graph.integer:
        return graph.op("Add", x, graph.constant(((noise - ZERO) * SCALE).astype(np.float32)))
    grid = graph.constant(np.float32(SCALE)), graph.constant(np.uint8(ZERO))
    return graph.op("Add", x, graph.node("DequantizeLinear", graph.constant(noise.astype(np.uint8)), *grid))


def _pooled_noise(graph: Graph, x: str, channels: int) -> str:
    return graph.op("MaxPool", _noisy(graph, x, channels), **POOL)


def _transposed_noise(graph: Graph, x: str, channels: int) -> str:
    """A Transpose that no convolution stands before: the runtime does not work on another layout there."""
    side = graph.side
    split = graph.constant(np.int64([1, 4, channels // 4, side, side]))
    whole = graph.constant(np.int64([1, channels, side, side]))
    y = graph.op("Reshape", _noisy(graph, x, channels), split)
    return graph.op("Reshape", graph.op("Transpose", y, perm=[0, 2, 1, 3, 4]), whole)


def _padded_stem(inputs: int, kernel: int) -> Link:
    """A layer whose codes are padded to channels in fours."""

    def link(graph: Graph, x: str, channels: int) -> str:
        more = -inputs % 4
        if inputs == 3:
            wide = graph.node("Gather", graph.codes(x), graph.constant(np.int64([0, 1, 2, 1])), axis=1)
        else:
            widths = graph.constant(np.int64([0, 0, 0, 0, 0, more, 0, 0]))
            wide = graph.node("Pad", graph.codes(x), widths, graph.constant(np.uint8(ZERO)))
        return graph.conv(graph.dequantized(wide), inputs + more, channels, kernel)

    return link


def _subtracted(graph: Graph, x: str, channels: int) -> str:
    """On codes a sum, of which one is read with the negated scale."""
    y = POINTWISE(graph, x, channels)
    return graph.op("Add", y, graph.dequantized(graph.codes(x), -SCALE)) if graph.integer else graph.op("Sub", y, x)


def _halved(graph: Graph, x: str, channels: int) -> str:
    return graph.conv(x, channels, channels, 1, stride=2)


def _resized(graph: Graph, x: str, channels: int) -> str:
    """By two, nearest neighbour; codes in the file's layout, which a Reshape on either side keeps."""
    y = _halved(graph, x, channels)
    sides, same = graph.constant(np.float32([1, 1, 2, 2])), graph.constant(np.int64([0, 0, 0, -1]))
    fast = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    if not graph.integer:
        return graph.node("Resize", y, "", sides, **fast)
    made = graph.node("Resize", graph.node("Reshape", graph.codes(y), same), "", sides, **fast)
    return graph.dequantized(graph.node("Reshape", made, same))


def _space_to_depth(graph: Graph, x: str, channels: int) -> str:
    """Between layers; on codes the four parts of each block, joined."""
    y = POINTWISE(graph, x, channels)
    if not graph.integer:
        return graph.conv(graph.node("SpaceToDepth", y, blocksize=2), 4 * channels, channels, 1)
    axes, steps, ends = (graph.constant(np.int64(numbers)) for numbers in ([2, 3], [2, 2], [2**31, 2**31]))
    starts = [graph.constant(np.int64(place)) for place in itertools.product((0, 1), repeat=2)]
    parts = [graph.node("Slice", graph.codes(y), start, ends, axes, steps) for start in starts]
    joined = graph.dequantized(graph.node("Concat", *parts, axis=1))
    return graph.conv(joined, 4 * channels, channels, 1)


def _narrowed(graph: Graph, x: str, channels: int) -> str:
    """The layers around a SpaceToDepth, with as much work."""
    return graph.conv(graph.conv(x, channels, 4 * channels, 1, stride=2), 4 * channels, channels, 1)


def _silu(graph: Graph, x: str, channels: int) -> str:
    """x * Sigmoid(x), of which the runtime makes one operator in float."""
    y = POINTWISE(graph, x, channels)
    return graph.op("Mul", y, graph.op("Sigmoid", y))


def _pointwise_pair(graph: Graph, x: str, channels: int) -> str:
    return POINTWISE(graph, POINTWISE(graph, x, channels), channels)


@dataclass(frozen=True)
class Kind:
    """What is measured. base: the link without it; macs: work a pixel, None for elements.

    branches: links side by side, each pooled to one pixel, because they do not chain. flat: on vectors, not maps.
    bare: side by side, too, and without convolutions, whose layout the runtime would take over.
    instead: another form of the link in integers; the link's own time in integers then stands in the place of float's.
    """

    link: Link
    base: Link | None = POINTWISE
    macs: Callable[[int], int] | None = None
    branches: int | None = None
    flat: bool = False
    bare: bool = False
    sides: tuple[int, ...] = SIDES
    channels: tuple[int, ...] = CHANNELS
    instead: Link | None = None


def _stem(kernel: int, inputs: int = 3, sides: tuple[int, int] = (28, 112)) -> Kind:
    """The first layer, on pictures; what pools its result is counted as its own."""
    return Kind(
        lambda graph, x, channels: graph.conv(x, inputs, channels, kernel),
        base=None,
        macs=lambda channels: channels * inputs * kernel**2,
        branches=inputs,
        sides=sides,
        channels=(8, 16, 32, 64),
    )


def _padded(kernel: int, inputs: int) -> Kind:
    """A layer with `inputs` channels against one whose codes are padded to channels in fours."""
    bare = _stem(kernel, inputs)
    return replace(bare, instead=_padded_stem(inputs, kernel), channels=(16, 32, 64))


def _alone(link: Link, base: Link) -> Kind:
    return Kind(link, base, bare=True, sides=(14, 28, 56), channels=(16, 64))


def _dense(kernel: int) -> Kind:
    return Kind(conv(kernel), None, lambda channels: channels * channels * kernel**2)


def _depthwise(kernel: int) -> Kind:
    return Kind(conv(kernel, lambda channels: channels), None, lambda channels: channels * kernel**2)


def _grouped(kernel: int) -> Kind:
    return Kind(conv(kernel, lambda channels: 4), None, lambda channels: channels * channels * kernel**2 // 4)


def _of_elements(link: Link) -> Kind:
    return Kind(link, sides=(14, 28, 56), channels=(16, 64, 128))


GEMM = Kind(
    lambda graph, x, channels: graph.gemm(x, channels),
    base=None,
    macs=lambda channels: channels**2,
    flat=True,
    sides=(1,),
    channels=(16, 64, 256, 1024, 2048),
)

KINDS: dict[str, Kind] = {
    "Gemm": GEMM,
    "conv1": _dense(1),
    "conv3": _dense(3),
    "depthwise1": _depthwise(1),
    "depthwise3": _depthwise(3),
    "depthwise5": _depthwise(5),
    "depthwise7": _depthwise(7),
    "grouped1": _grouped(1),
    "grouped3": _grouped(3),
    "stem3": _stem(3),
    "stem7": _stem(7),
    "grey3": _stem(3, inputs=1, sides=(14, 56)),
    "grey5": _stem(5, inputs=1, sides=(14, 56)),
    "pad3_1": _padded(3, 1),
    "pad3_3": _padded(3, 3),
    "pad3_6": _padded(3, 6),
    "pad3_9": _padded(3, 9),
    "pad7_3": _padded(7, 3),
    "Resize": _alone(_resized, _halved),
    "SpaceToDepth": _alone(_space_to_depth, _narrowed),
    "Sub": _of_elements(_subtracted),
    "Add": _of_elements(_joined("Add")),
    "Mul": _of_elements(_joined("Mul")),
    "mul_constant": _of_elements(_mul_constant),
    "mul_broadcast": _of_elements(_mul_broadcast),
    "Sigmoid": _of_elements(after_conv("Sigmoid")),
    "silu": _of_elements(_silu),
    "LeakyRelu": _of_elements(after_conv("LeakyRelu", alpha=0.1)),
    "HardSigmoid": _of_elements(_hard_sigmoid),
    "Div": _of_elements(_divided),
    "MaxPool": _of_elements(after_conv("MaxPool", **POOL)),
    "max_pool_nchw": Kind(_pooled_noise, _noisy, bare=True, sides=(14, 28, 56), channels=(16, 64)),
    "AveragePool": _of_elements(after_conv("AveragePool", **POOL, count_include_pad=1)),
    "Transpose": _of_elements(_shuffled),
    "transpose_nchw": Kind(_transposed_noise, _noisy, bare=True, sides=(14, 28, 56), channels=(16, 64)),
    "Gather": _of_elements(_gathered),
    "switch": Kind(_switching, _pointwise_pair, sides=(14, 28, 56), channels=(16, 64, 128)),
}


def chain(kind: Kind, link: Link, channels: int, side: int, count: int, *, integer: bool) -> bytes:
    graph = Graph(integer, side)
    inputs = kind.branches or channels
    x = graph.pair("x") if integer else "x"
    if kind.branches or kind.bare:
        results = [graph.op("GlobalAveragePool", link(graph, x, channels)) for _ in range(count)]
        return graph.model((1, inputs, side, side), results)
    x = x if kind.flat else POINTWISE(graph, x, channels)
    for _ in range(count):
        x = link(graph, x, channels)
    if kind.flat:
        return graph.model((1, channels), [graph.gemm(x, channels)])
    return graph.model((1, channels, side, side), [POINTWISE(graph, x, channels)])


def microseconds(models: Sequence[bytes]) -> NDArray[np.float64]:
    """Of one run of each model, in each of some rounds: (rounds, models)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    sessions = [ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]) for model in models]
    shape = sessions[0].get_inputs()[0].shape
    feeds = {"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    return np.array([[_median_time(session, feeds) for session in sessions] for _ in range(ROUNDS)])


def _median_time(session: Any, feeds: dict[str, Any]) -> float:
    times: list[float] = []
    start = time.process_time()
    while len(times) < 4 or time.process_time() - start < TURN_S:
        before = time.process_time()
        session.run(None, feeds)
        times.append(1e6 * (time.process_time() - before))
    return float(np.median(times[1:]))


def link_cost(kind: Kind, channels: int, side: int) -> tuple[float, float]:
    """Microseconds of one link, less its base, in float and in integers: medians of differences within a round."""
    found = []
    for other in (False, True):
        integer, link = other or kind.instead is not None, kind.instead or kind.link if other else kind.link
        models = [chain(kind, link, channels, side, n, integer=integer) for n in (SHORT, LONG)]
        if kind.base is not None:
            models += [chain(kind, kind.base, channels, side, n, integer=integer) for n in (SHORT, LONG)]
        times = microseconds(models)
        own = times[:, 1] - times[:, 0]
        base = times[:, 3] - times[:, 2] if kind.base is not None else 0.0
        found.append(float(np.median(own - base)) / (LONG - SHORT))
    return found[0], found[1]


Costs = dict[int, tuple[float, float, float, float]]


def measured(name: str) -> Costs:
    """(fixed us, ns a unit of work) in float, then in integers, by channels."""
    kind = KINDS[name]
    macs = kind.macs
    if macs is None:
        points = [
            (channels, side, *link_cost(kind, channels, side)) for channels in kind.channels for side in kind.sides
        ]
        parts = [_fitted(points, column) for column in (2, 3)]
        return {channels: tuple(n for part in parts for n in part(channels)) for channels in CHANNELS}  # type: ignore[misc]
    found: Costs = {}
    for channels in kind.channels:
        if macs(channels) * kind.sides[-1] ** 2 > MOST_MACS:
            continue
        costs = [link_cost(kind, channels, side) for side in kind.sides]
        work = [macs(channels) * side**2 for side in kind.sides]
        (f_us, f_ns), (i_us, i_ns) = (_line(pair, work) for pair in zip(*costs, strict=True))
        found[channels // 4 if name.startswith("grouped") else channels] = (f_us, f_ns, i_us, i_ns)
    return found


def _line(costs: Sequence[float], work: Sequence[int]) -> tuple[float, float]:
    """Through the costs of two maps, or where that would start below zero, through the larger and nothing."""
    if len(costs) == 1:
        return 0.0, round(1000 * max(costs[0], 0.0) / work[0], 4)
    small, large = costs
    rate = max(large - small, 0.0) / (work[1] - work[0])
    fixed = small - rate * work[0]
    if fixed < 0:
        fixed, rate = 0.0, max(large, 0.0) / work[1]
    return round(fixed, 1), round(1000 * rate, 4)


def _fitted(points: Sequence[tuple[int, int, float, float]], column: int) -> Callable[[int], tuple[float, float]]:
    """t = a + b pixels + c elements, least squares of relative errors, none below zero; for C channels (a, c + b/C)."""
    side = np.array([point[1] for point in points])
    elements = side**2 * np.array([point[0] for point in points])
    terms = np.stack([np.ones(len(points)), side**2, elements], axis=1)
    times = np.array([point[column] for point in points])
    weight = 1 / np.maximum(np.abs(times), 2.0)
    best, error = np.zeros(3), np.inf
    for chosen in itertools.product((False, True), repeat=3):  # three terms: trying all sets is the simplest way
        use = np.flatnonzero(chosen)
        found = np.zeros(3)
        found[use] = np.linalg.lstsq(terms[:, use] * weight[:, None], times * weight, rcond=None)[0]
        left = float(np.sum(((terms @ found - times) * weight) ** 2))
        if found.min() >= 0 and left < error:
            best, error = found, left
    fixed, pixel, element = (float(number) for number in best)
    return lambda channels: (round(fixed, 1), round(1000 * (element + pixel / channels), 4))


def cpu_class() -> str:
    """What decides how fast integers are."""
    features = detect_cpu().features
    return next(name for name in ("vnni", "avx2", "dot_product", "neon") if features.get(name))


def written(found: dict[str, Costs]) -> str:
    """The file's text, with what was measured here in the place of an earlier table of such a CPU: a line a kind."""
    before = TABLE.read_text(encoding="utf-8")
    told = json.loads(before)
    here = f"{detect_cpu().in_words()}; ONNX Runtime {ort.__version__}"
    tables = read_cost_tables(before) | {cpu_class(): found}
    parts = []
    for cpu, table in sorted(tables.items()):
        lines = (
            f"  {json.dumps(kind)}: {json.dumps({str(channels): list(line) for channels, line in costs.items()})}"
            for kind, costs in table.items()
        )
        parts.append(f" {json.dumps(cpu)}: {{\n" + ",\n".join(lines) + "\n }")
    head = told | {"measured": dict(sorted((told["measured"] | {cpu_class(): here}).items()))}
    del head["costs"]
    top = "".join(f"{json.dumps(key)}: {json.dumps(value, indent=1)},\n" for key, value in head.items())
    return "{\n" + top + '"costs": {\n' + ",\n".join(parts) + "\n}\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kernels", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table into the package")
    parser.add_argument("--only", action="append", choices=list(KINDS), help="this kind, others stay as they are")
    wanted = parser.parse_args()
    print(f"{platform.machine()}, ONNX Runtime {ort.__version__}; us + ns x work: float, integers")
    tables = read_cost_tables(TABLE.read_text(encoding="utf-8"))
    found: dict[str, Costs] = dict(tables.get(cpu_class(), {})) if wanted.only else {}
    for name in wanted.only or KINDS:
        found[name] = measured(name)
        for channels, (f_us, f_ns, i_us, i_ns) in found[name].items():
            print(f"{name:18} C{channels:4}  {f_us:7.1f} + {f_ns:8.4f}  {i_us:7.1f} + {i_ns:8.4f}", flush=True)
    if wanted.write:
        TABLE.write_text(written(found), encoding="utf-8")


if __name__ == "__main__":
    main()
