"""Families of networks that are odd in one way each, drawn from a seed: what `grown.run_commands` is run on.

python -m tests.support.families FAMILY COUNT [FIRST]      which graphs of a family fail, and how
"""

from __future__ import annotations

import collections
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from tests.support.grown import BOOL, FLOAT, INT64, Case, Grower, as_case, run_commands

SIDE = 8


def _start(seed: int, opset: int = 17, *, open_batch: bool | None = None) -> tuple[Grower, str, int]:
    """A picture, and a layer or two behind it. Returns the tensor (N, C, 8, 8) and C."""
    g = Grower(seed, opset)
    batch = "N" if (g.choose(False, True) if open_batch is None else open_batch) else 1
    x, channels = g.input([batch, 3, SIDE, SIDE]), g.choose(4, 8)
    t = g.relu(g.conv(x, 3, channels))
    if g.choose(False, True):
        t = g.relu(g.conv(t, channels, channels))
    return g, t, channels


def _finish(g: Grower, t: str, channels: int) -> Case:
    """One or two layers and an output behind (N, C, 8, 8)."""
    if g.choose(False, True):
        t = g.relu(g.conv(t, channels, channels))
    t = g.conv(t, channels, 4, g.choose(1, 3))
    g.output(t, [None, 4, SIDE, SIDE])
    return as_case(g)


# -- types that onnx does not infer ------------------------------------------------------------------------------------


def unknown_types(seed: int) -> Case:
    """Operators of ONNX Runtime's own, sequences, GroupNormalization of opset 21, files that were optimized before."""
    g, t, c = _start(seed, 21 if seed % 4 == 0 else 17)
    for _ in range(g.draw(1, 3)):
        t = g.choose(*UNTYPED)(g, t, c)
        if g.choose(False, True):
            t = g.conv(t, c, c)
    case = _finish(g, t, c)
    if seed % 4 == 1:
        levels = ort.GraphOptimizationLevel
        level = (levels.ORT_ENABLE_BASIC, levels.ORT_ENABLE_EXTENDED, levels.ORT_ENABLE_ALL)[seed // 4 % 3]
        # at times no layer is left that ONNX knows
        return Case(_optimize(case.proto, level), case.calibration, case.others, ("othing to quantize",))
    return case


def _optimize(proto: onnx.ModelProto, level: ort.GraphOptimizationLevel) -> onnx.ModelProto:
    """What ONNX Runtime makes of a model, as people save it."""
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def _contrib(op_type: str) -> Callable[[Grower, str, int], str]:
    def add(g: Grower, t: str, c: int) -> str:
        made: str = g.op(op_type, t, domain="com.microsoft")
        return made

    return add


def _bias_gelu(g: Grower, t: str, c: int) -> str:
    last = g.op("Transpose", t, perm=[0, 2, 3, 1])
    last = g.op("BiasGelu", last, g.const(g.rng.standard_normal(c)), domain="com.microsoft")
    made: str = g.op("Transpose", last, perm=[0, 3, 1, 2])
    return made


def _fused_conv(g: Grower, t: str, c: int) -> str:
    weight, bias = g.const(g.weights(c, c, 3, 3)), g.const(g.rng.standard_normal(c))
    made: str = g.op("FusedConv", t, weight, bias, domain="com.microsoft", activation="Relu", pads=[1, 1, 1, 1])
    return made


def _fused_matmul(g: Grower, t: str, c: int) -> str:
    last = g.op("Transpose", t, perm=[0, 2, 3, 1])
    last = g.op("FusedMatMul", last, g.const(g.weights(c, c)), domain="com.microsoft", alpha=0.5)
    made: str = g.op("Transpose", last, perm=[0, 3, 1, 2])
    return made


def _skip_layer_norm(g: Grower, t: str, c: int) -> str:
    rows = g.op("Transpose", g.op("Reshape", t, g.ints(0, c, SIDE * SIDE)), perm=[0, 2, 1])
    scale, shift = g.const(np.ones(c)), g.const(np.zeros(c))
    rows = g.op("SkipLayerNormalization", rows, rows, scale, shift, domain="com.microsoft")
    made: str = g.op("Reshape", g.op("Transpose", rows, perm=[0, 2, 1]), g.ints(0, c, SIDE, SIDE))
    return made


def _group_norm(g: Grower, t: str, c: int) -> str:
    count = c if g.opset >= 21 else 2
    made: str
    if g.opset < 18:
        made = g.op("Elu", t)
    else:
        made = g.op("GroupNormalization", t, g.const(np.ones(count)), g.const(np.zeros(count)), num_groups=2)
    return made


def _chunk(g: Grower, t: str, c: int) -> str:
    pieces = g.op(
        "SplitToSequence", t, g.ints(c // 2, c // 2) if g.choose(False, True) else g.const(np.array(c // 2)), axis=1
    )
    first, second = (g.op("SequenceAt", pieces, g.const(np.array(place))) for place in (0, -1))
    if g.choose(False, True):
        first = g.conv(first, c // 2, c // 2)
    made: str = g.op("Concat", second, first, axis=1)
    return made


def _sequence(g: Grower, t: str, c: int) -> str:
    pieces = g.op("SequenceConstruct", t, g.relu(t))
    pieces = g.op("SequenceInsert", pieces, g.op("Sigmoid", t))
    if g.choose(False, True):
        pieces = g.op("SequenceErase", pieces, g.const(np.array(1)))
    joined = g.op("ConcatFromSequence", pieces, axis=1)
    count = len([n for n in g.nodes if n.op_type == "SequenceErase" and n.output[0] == pieces])
    made: str = g.conv(joined, c * (3 - count), c, 1)
    return made


def _sequence_from_body(g: Grower, t: str, c: int) -> str:
    branches = []
    for op_type in ("Relu", "Sigmoid"):
        names = [g.name("inside") for _ in range(2)]
        nodes = [
            helper.make_node(op_type, [t], [names[0]]),
            helper.make_node("SequenceConstruct", [names[0], t], [names[1]]),
        ]
        info = helper.make_tensor_sequence_value_info(names[1], FLOAT, None)
        branches.append(helper.make_graph(nodes, g.name("branch"), [], [info]))
    high = g.op("Greater", g.op("ReduceMean", t, keepdims=0), g.const(0.0))
    pieces = g.op("If", high, then_branch=branches[0], else_branch=branches[1])
    made: str = g.op("Add", g.op("SequenceAt", pieces, g.const(np.array(0))), t)
    return made


def _optional(g: Grower, t: str, c: int) -> str:
    made: str = g.op("OptionalGetElement", g.op("Optional", t))
    return made


UNTYPED = (
    *map(_contrib, ("Gelu", "FastGelu", "QuickGelu")),
    *(_bias_gelu, _fused_conv, _fused_matmul, _skip_layer_norm, _group_norm, _group_norm),
    *(_chunk, _chunk, _sequence, _sequence_from_body, _optional),
)


# -- shapes that depend on the data ------------------------------------------------------------------------------------


def data_shapes(seed: int) -> Case:
    """Rows or boxes picked out of a map by its numbers, and layers behind them; sometimes none on some pictures."""
    g, t, c = _start(seed, open_batch=False)
    places = SIDE * SIDE
    rows = g.op("Transpose", g.op("Reshape", t, g.ints(c, places)), perm=[1, 0])
    score = g.op("Reshape", g.conv(t, c, 1, 1), g.ints(places))
    picked, columns = g.choose(*PICKS)(g, rows, score, c)
    if g.choose(False, True):
        picked = g.op(g.choose("Mul", "Add"), picked, g.const(np.float32(g.choose(2.0, [3.0]))))
    hidden = g.draw(3, 8)
    if g.choose(False, True):
        picked = g.relu(g.gemm(picked, columns, hidden))
        columns = hidden
    if g.choose(False, False, True):
        picked = g.op("Softmax", picked, axis=1)
    if g.choose(False, False, True):
        picked = g.op("Concat", picked, picked, axis=g.choose(0, 1))
        columns *= 2 if g.nodes[-1].attribute[0].i else 1
    last = (
        g.gemm(picked, columns, 5)
        if g.choose(True, True, False)
        else g.op("MatMul", picked, g.const(g.weights(columns, 5)))
    )
    if g.choose(False, False, True):
        last = g.op("ReduceMax", last, axes=[1], keepdims=g.choose(0, 1))
    g.output(last, None)
    if g.choose(False, True):
        g.output(score, [places])
    if g.choose(False, True):
        g.output(g.conv(t, c, 2, 1), [1, 2, SIDE, SIDE])
    if g.choose(False, False, True):
        g.output(g.op("Shape", last), None, INT64)
    return as_case(g, "There is nothing to compare", least_db=None)


def _threshold(g: Grower, score: str) -> str:
    """Places above a number that some pictures reach often, seldom or never."""
    kind = g.draw(0, 4)
    if kind < 2:
        limit = g.op("ReduceMean", score, keepdims=1)
    else:
        limit = g.const(np.float32([0.0, 1.5, 2.5][kind - 2] if kind < 4 else 99.0))
    found: str = g.op("Greater", score, limit)
    return found


def _by_nonzero(g: Grower, rows: str, score: str, c: int) -> tuple[str, int]:
    keep = g.op("Reshape", g.op("NonZero", _threshold(g, score)), g.ints(-1))
    return g.op("Gather", rows, keep, axis=0), c


def _by_compress(g: Grower, rows: str, score: str, c: int) -> tuple[str, int]:
    return g.op("Compress", rows, _threshold(g, score), axis=0), c


def _by_gather_nd(g: Grower, rows: str, score: str, c: int) -> tuple[str, int]:
    keep = g.op("Transpose", g.op("NonZero", _threshold(g, score)), perm=[1, 0])
    return g.op("GatherND", rows, keep), c


def _by_suppression(g: Grower, rows: str, score: str, c: int) -> tuple[str, int]:
    boxes = g.op("Reshape", g.op("Slice", rows, g.ints(0), g.ints(4), g.ints(1)), g.ints(1, SIDE * SIDE, 4))
    scores = g.op("Reshape", g.op("Sigmoid", score), g.ints(1, 1, SIDE * SIDE))
    limits = (
        g.const(np.array([g.choose(5, 20)], np.int64)),
        g.const(np.float32([0.5])),
        g.const(np.float32([g.choose(0.3, 0.6, 0.9, 1.5)])),
    )
    kept = g.op("NonMaxSuppression", boxes, scores, *limits)
    keep = g.op("Reshape", g.op("Slice", kept, g.ints(2), g.ints(3), g.ints(1)), g.ints(-1))
    return g.op("Gather", rows, keep, axis=0), c


def _by_top_k(g: Grower, rows: str, score: str, c: int) -> tuple[str, int]:
    """As many rows as there are places with a high score, at most ten."""
    high = g.op("Cast", _threshold(g, score), to=INT64)
    most = g.op("Min", g.op("ReduceSum", high, g.ints(0), keepdims=1), g.ints(10))
    _, keep = g.op("TopK", score, most, outputs=2)
    return g.op("Gather", rows, keep, axis=0), c


def _by_unique(g: Grower, rows: str, score: str, c: int) -> tuple[str, int]:
    words = g.op("Cast", g.op("Mul", score, g.const(np.float32(4))), to=INT64)
    unique = g.op("Unique", words)
    keep = g.op("Mod", g.op("Abs", unique), g.ints(SIDE * SIDE))
    return g.op("Gather", rows, keep, axis=0), c


def _by_slice(g: Grower, rows: str, score: str, c: int) -> tuple[str, int]:
    high = g.op("ReduceSum", g.op("Cast", _threshold(g, score), to=INT64), g.ints(0), keepdims=1)
    return g.op("Slice", rows, g.ints(0), high, g.ints(0)), c


def _by_roi(g: Grower, rows: str, score: str, c: int) -> tuple[str, int]:
    """Patches of the map around picked places, each through a layer, and averaged."""
    keep = g.op("Reshape", g.op("NonZero", _threshold(g, score)), g.ints(-1))
    corner = g.op("Cast", g.op("Unsqueeze", g.op("Mod", keep, g.ints(4)), g.ints(1)), to=FLOAT)
    boxes = g.op(
        "Concat",
        corner,
        corner,
        g.op("Add", corner, g.const(np.float32(3))),
        g.op("Add", corner, g.const(np.float32(4))),
        axis=1,
    )
    batch = g.op("Mul", keep, g.ints(0))
    picture = g.op("Reshape", g.op("Transpose", rows, perm=[1, 0]), g.ints(1, c, SIDE, SIDE))
    patches = g.op("RoiAlign", picture, boxes, batch, output_height=3, output_width=3)
    patches = g.relu(g.conv(patches, c, c))
    return g.op("Flatten", g.op("GlobalAveragePool", patches)), c


PICKS = (_by_nonzero, _by_compress, _by_gather_nd, _by_suppression, _by_top_k, _by_unique, _by_slice, _by_roi)


# -- tensors of one axis, of none, and constants -----------------------------------------------------------------------


def one_axis(seed: int) -> Case:
    """Tensors of one axis, or of none, with constants, alone or behind and in front of layers."""
    g = Grower(seed)
    size = g.draw(2, 7)
    alone = seed % 3 == 0
    if alone:
        t = g.input([g.choose(size, size, "N")] if g.choose(True, True, False) else [size])
        size = g.inputs[0].type.tensor_type.shape.dim[0].dim_value or 1
    else:
        x = g.input([1, 3, SIDE, SIDE])
        t = g.conv(x, 3, size)
        if g.choose(False, False, True):
            t = g.op("ReduceMean", t, keepdims=0)
            size = 0
        else:
            t = (
                g.op("ReduceMean", t, axes=[0, 2, 3], keepdims=0)
                if g.choose(False, True)
                else g.op("Reshape", g.op("GlobalAveragePool", t), g.ints(-1))
            )
    for _ in range(g.draw(1, 5)):
        t, size = _step_along_one_axis(g, t, size)
    ending = g.draw(0, 3)
    if ending == 0 and size:
        t = g.gemm(g.op("Reshape", t, g.ints(1, -1)), size, 3)
    elif ending == 1 and size:
        t = g.op("MatMul", t, g.const(g.weights(size, 3)))
    g.output(t, None)
    # a tensor of one axis is taken for a batch
    return as_case(g, "othing to quantize", "part for each picture")


def _step_along_one_axis(g: Grower, t: str, size: int) -> tuple[str, int]:
    """One more operator behind a tensor of `size` numbers, 0 for none with an axis."""
    kind = g.draw(0, 11)
    constant = g.const(g.rng.uniform(0.5, 2, size or ()) if g.choose(True, True, False) else g.rng.uniform(0.5, 2))
    if kind < 4:
        op_type = ("Mul", "Div", "Add", "Sub")[kind]
        pair = [t, constant] if g.choose(True, True, False) or kind == 1 else [constant, t]
        return g.op(op_type, *pair), size
    if kind == 4:
        return g.op(g.choose("Max", "Min"), t, constant), size
    if kind == 5:
        return g.op(
            g.choose("Sigmoid", "Tanh", "Abs", "Exp"), g.op("Clip", t, g.const(np.float32(-3)), g.const(np.float32(3)))
        ), size
    if kind == 6:
        return g.relu(t), size
    if kind == 7 and size:
        return g.op("Concat", t, g.op("Add", t, constant), axis=0), 2 * size
    if kind == 8 and size > 1:
        return g.op("Slice", t, g.ints(0), g.ints(size - 1), g.ints(0)), size - 1
    if kind == 9 and size > 1:
        first, second = g.op("Split", t, g.ints(1, size - 1), outputs=2, axis=0)
        return g.op("Add", first, second), size - 1
    if kind == 10:
        return g.op("Mul", t, t), size
    if size:
        return g.op("Softmax", t, axis=0), size
    return g.op("Reshape", t, g.ints(1)), 1


# -- tensors of no elements --------------------------------------------------------------------------------------------


def empties(seed: int) -> Case:
    """Slices, parts of a Split and lists of places that are empty, with layers behind, joined again or returned."""
    g, t, c = _start(seed)
    empty, kind = g.choose(*EMPTY)(g, t, c)
    for _ in range(g.draw(0, 3)):
        empty = _step_of_nothing(g, empty, c, kind)
    if kind == "channels" and g.choose(True, True, False):
        t = g.op("Concat", *((empty, t) if g.choose(False, True) else (t, empty)), axis=1)
    elif kind == "places" and g.choose(True, True, False):
        t = g.op("Concat", *((empty, t) if g.choose(False, True) else (t, empty)), axis=2)
    else:
        g.output(empty, None)
    return _finish(g, t, c)


def _empty_slice(g: Grower, t: str, c: int) -> tuple[str, str]:
    return g.op("Slice", t, g.ints(c), g.ints(2 * c), g.ints(1)), "channels"


def _empty_places(g: Grower, t: str, c: int) -> tuple[str, str]:
    return g.op("Slice", t, g.ints(3), g.ints(3), g.ints(2)), "places"


def _empty_part(g: Grower, t: str, c: int) -> tuple[str, str]:
    sizes = g.ints(c, 0) if g.choose(False, True) else g.ints(0, c)
    parts = g.op("Split", t, sizes, outputs=2, axis=1)
    return parts[0 if g.constants[-1].raw_data[:1] == b"\x00" else 1], "channels"


def _empty_gather(g: Grower, t: str, c: int) -> tuple[str, str]:
    return g.op("Gather", t, g.const(np.zeros(0, np.int64)), axis=1), "channels"


def _empty_rows(g: Grower, t: str, c: int) -> tuple[str, str]:
    keep = g.op("Reshape", g.op("NonZero", g.op("Greater", t, g.const(np.float32(1e6)))), g.ints(-1))
    keep = g.op("Slice", keep, g.ints(0), g.ints(0))
    return g.op("Gather", t, keep, axis=2), "places"


EMPTY = (_empty_slice, _empty_places, _empty_part, _empty_gather, _empty_rows)


def _step_of_nothing(g: Grower, t: str, c: int, kind: str) -> str:
    """One more operator behind a tensor (N, 0, H, W) or (N, C, 0, W)."""
    made: str
    step = g.draw(0, 5)
    if step == 0:
        made = g.relu(t)
    elif step == 1:
        made = g.op(g.choose("Mul", "Add", "Div"), t, g.const(np.float32(2)))
    elif step == 2 and kind == "places":
        made = g.op("Mul", t, g.const(g.rng.uniform(1, 2, (c, 1, 1))))
    elif step == 3 and kind == "places":
        made = g.op("Transpose", g.op("Transpose", t, perm=[0, 2, 3, 1]), perm=[0, 3, 1, 2])
    elif step == 4:
        made = g.op("Concat", t, t, axis=1 if kind == "channels" else 2)
    else:
        made = g.op("Sigmoid", t)
    return made


# -- nodes out of order ------------------------------------------------------------------------------------------------


def out_of_order(seed: int) -> Case:
    """Nodes in any order, in bodies, too; some graphs with a cycle, which is refused."""
    g, t, c = _start(seed)
    for _ in range(g.draw(1, 3)):
        t = g.choose(_residual, _gate, _branch, _refining_loop)(g, t, c)
    case = _finish(g, t, c)
    proto = onnx.ModelProto.FromString(case.proto.SerializeToString())
    if seed % 5 == 4:
        first = next(node for node in proto.graph.node if node.op_type == "Conv" and node.input[0] != "x")
        first.input[0] = proto.graph.output[0].name
        _shuffle(g, proto.graph)
        return Case(proto, case.calibration, case.others, ("cycle",))
    _shuffle(g, proto.graph)
    return Case(proto, case.calibration, case.others)


def _shuffle(g: Grower, graph: onnx.GraphProto) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _shuffle(g, attribute.g)
    nodes = list(graph.node)
    order = g.rng.permutation(len(nodes))
    copies = [onnx.NodeProto.FromString(nodes[index].SerializeToString()) for index in order]
    del graph.node[:]
    graph.node.extend(copies)


def _residual(g: Grower, t: str, c: int) -> str:
    made: str = g.op("Add", t, g.conv(g.relu(g.conv(t, c, c)), c, c, 1))
    return made


def _gate(g: Grower, t: str, c: int) -> str:
    weight = g.conv(g.op("GlobalAveragePool", t), c, c, 1)
    made: str = g.op("Mul", t, g.op("Sigmoid", weight))
    return made


# -- outputs whose shape is declared wrong, or not at all --------------------------------------------------------------


def declared_shapes(seed: int) -> Case:
    """Outputs that are declared as scalars, with other ranks or sizes, or without a shape."""
    g, t, c = _start(seed)
    kinds = [g.choose(*DECLARED) for _ in range(g.draw(1, 2))]
    ends = [
        (g.conv(t, c, 4, 1), [1, 4, SIDE, SIDE]),
        (g.gemm(g.op("Flatten", g.op("GlobalAveragePool", t)), c, 6), [1, 6]),
    ]
    if g.choose(False, True):
        ends.reverse()
    hidden = g.draw(0, 2)
    for kind, (value, shape) in zip(kinds, ends, strict=False):
        end = (value, _hide_shape(g, value), _hide_rank(g, value, len(shape)))[hidden]
        g.output(end, kind(shape))
    return as_case(g)


def _hide_shape(g: Grower, t: str) -> str:
    """The same tensor behind a Reshape whose sizes no inference knows, as it does not add up floats."""
    sizes = g.op("Mul", g.op("Cast", g.op("Shape", t), to=FLOAT), g.const(np.float32(1)))
    hidden: str = g.op("Reshape", t, g.op("Cast", sizes, to=INT64))
    return hidden


def _hide_rank(g: Grower, t: str, axes: int) -> str:
    """The same tensor behind a Reshape to as many sizes as no inference knows."""
    sizes = g.op("Concat", g.op("Shape", t), g.ints(1), axis=0)
    kept = g.op("Compress", sizes, g.op("Greater", sizes, g.ints(0)), axis=0)
    hidden: str = g.op("Reshape", t, g.op("Slice", kept, g.ints(0), g.ints(axes)))
    return hidden


DECLARED: Sequence[Callable[[list[int]], list[int | str | None] | None]] = (
    lambda shape: [],
    lambda shape: None,
    lambda shape: [*shape, 1],
    lambda shape: list(shape[:-1]),
    lambda shape: [size + 1 for size in shape],
    lambda shape: ["n", 7, *shape[2:]],
    lambda shape: [1],
    lambda shape: list(shape),
)


# -- Resize along some axes --------------------------------------------------------------------------------------------


def resized_axes(seed: int) -> Case:
    """Resize with axes, by sizes or scales, between layers and transposes, with or without known shapes."""
    g, t, c = _start(seed, 18 if seed % 2 else 21)
    known = g.draw(0, 2)
    if known == 1:
        t = _hide_shape(g, t)
    elif known == 2 and g.opset >= 21:
        t = g.op("GroupNormalization", t, g.const(np.ones(c)), g.const(np.zeros(c)), num_groups=2)
    last = g.choose(False, True)
    if last:
        t = g.op("Transpose", t, perm=[0, 2, 3, 1])
        t = g.op("MatMul", t, g.const(g.weights(c, c)))
        if g.choose(False, True):
            t, last = g.op("Transpose", t, perm=[0, 3, 1, 2]), False
    side = g.choose(4, 6, 12, 16)
    axes = [1, 2] if last else g.choose([2, 3], [-2, -1], [3, 2], [2, -1])
    mode = g.choose("nearest", "linear", "cubic") if not last else g.choose("nearest", "linear")
    if g.choose(False, True):
        t = g.op("Resize", t, "", "", g.ints(side, side), mode=mode, axes=axes)
    else:
        t = g.op("Resize", t, "", g.const(np.float32([side / SIDE] * 2)), mode=mode, axes=axes)
    if last:
        t = g.op("Transpose", t, perm=[0, 3, 1, 2])
    t = g.relu(g.conv(t, c, c))
    g.output(g.conv(t, c, 4, 1), [None, 4, side, side])
    return as_case(g)


# -- layers inside bodies ----------------------------------------------------------------------------------------------


def bodies(seed: int) -> Case:
    """If, Loop and Scan with layers inside, nested, with weights of their own or tied, named alike or not at all."""
    g, t, c = _start(seed)
    for _ in range(g.draw(1, 2)):
        t = g.choose(_branch, _branch, _refining_loop, _scan_rows, _nested)(g, t, c)
        if g.choose(False, True):
            t = g.conv(t, c, c)
    case = _finish(g, t, c)
    # a Scan behind a Loop has no shape, and ONNX Runtime does not run it
    return Case(case.proto, case.calibration, case.others, ("the given model cannot be run",))


def _inner_conv(g: Grower, t: str, c: int, made: str) -> list[onnx.NodeProto]:
    """A layer as nodes of a body; its weight is an initializer outside, the one before's at times, or a Constant."""
    tied = [k.name for k in g.constants if list(k.dims) == [c, c, 3, 3]]
    weight = tied[-1] if tied and g.choose(False, True) else g.const(g.weights(c, c, 3, 3) * 0.5, "w")
    name = g.choose("Conv_1", "", g.name("inner"))
    return [helper.make_node("Conv", [t, weight], [made], name, pads=[1, 1, 1, 1])]


def _high(g: Grower, t: str) -> str:
    found: str = g.op("Greater", g.op("ReduceMean", t, keepdims=0), g.const(np.float32(g.choose(-9.0, 0.0, 0.3))))
    return found


def _branch(g: Grower, t: str, c: int) -> str:
    branches = []
    for op_type in ("Relu", g.choose("Identity", "Sigmoid")):
        inner, made = g.name("inner"), g.name("made")
        with_layer = op_type == "Relu" or g.choose(False, True)
        nodes = _inner_conv(g, t, c, inner) if with_layer else [helper.make_node("Neg", [t], [inner])]
        branches.append(g.body([*nodes, helper.make_node(op_type, [inner], [made])], [(made, FLOAT)]))
    if g.choose(False, True):
        branches.reverse()
    made = g.op("If", _high(g, t), then_branch=branches[0], else_branch=branches[1])
    return str(made)


def _nested(g: Grower, t: str, c: int) -> str:
    """An If whose branch holds another, whose branch holds a layer."""
    deep = []
    for _ in range(2):
        made = g.name("deep")
        deep.append(g.body(_inner_conv(g, t, c, made), [(made, FLOAT)]))
    high, result, other = _high(g, t), g.name("made"), g.name("other")
    inner = helper.make_node("If", [high], [result], then_branch=deep[0], else_branch=deep[1])
    branches = [g.body([inner], [(result, FLOAT)]), g.body([helper.make_node("Relu", [t], [other])], [(other, FLOAT)])]
    made = g.op("If", _high(g, t), then_branch=branches[0], else_branch=branches[1])
    return str(made)


def _refining_loop(g: Grower, t: str, c: int) -> str:
    state, go, index, delta, bent, after, on = (g.name(hint) for hint in ("state", "go", "i", "d", "t", "state", "on"))
    nodes = [
        *_inner_conv(g, state, c, delta),
        helper.make_node("Tanh", [delta], [bent]),
        helper.make_node("Add", [state, bent], [after]),
        helper.make_node("Identity", [go], [on]),
    ]
    step = g.body(nodes, [(on, BOOL), (after, FLOAT)], [(index, INT64), (go, BOOL), (state, FLOAT)])
    return str(g.op("Loop", g.const(np.array(g.draw(1, 3))), "", t, body=step))


def _scan_rows(g: Grower, t: str, c: int) -> str:
    """A Scan over the rows of the map, with a MatMul inside."""
    rows = g.op("Transpose", t, perm=[2, 0, 3, 1])  # (H, N, W, C)
    row, made = g.name("row"), g.name("made")
    weight = g.const(g.weights(c, c), "w")
    step = g.body(
        [helper.make_node("MatMul", [row, weight], [made], g.choose("MatMul_1", ""))], [(made, FLOAT)], [(row, FLOAT)]
    )
    return str(g.op("Transpose", g.op("Scan", rows, body=step, num_scan_inputs=1), perm=[1, 3, 0, 2]))


FAMILIES: dict[str, Callable[[int], Case]] = {
    family.__name__: family
    for family in (unknown_types, data_shapes, one_axis, empties, out_of_order, declared_shapes, resized_axes, bodies)
}


def _main(name: str, count: str, first: str = "0") -> None:
    kinds: collections.Counter[str] = collections.Counter()
    failed = 0
    for seed in range(int(first), int(first) + int(count)):
        case = FAMILIES[name](seed)
        found = run_commands(case, diagnose=seed % 4 == 0)
        failed += bool(found.wrong)
        kinds.update(f"{command}: {what}" for command, what in found.wrong.items())
        if found.wrong:
            print(seed, found.wrong, flush=True)
    print(f"{name}: {failed} of {count} graphs failed")
    for kind, times in kinds.most_common():
        print(f"  {times:4} {kind}")


if __name__ == "__main__":
    _main(*sys.argv[1:])
