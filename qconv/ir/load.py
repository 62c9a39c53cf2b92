"""This module loads an ONNX file as a model that the other passes can rely on.

After `load` the opset is at least 13, local functions are inlined, constants are initializers (no Constant nodes, no
constant subgraphs, none listed as an input), float16 has become float32 behind casts at the model's edge, every node
has a name and every value a shape as far as onnx can infer it. Bodies of If and Loop are left as they are.

Weights never pass through one protobuf: they are set aside while onnx's converter and shape inference work, so that
models beyond 2 GB load like others.

onnx-ir's common passes were tried in place of what is here, and do not serve (1.1.0):

- LiftConstantsToInitializersPass gives the same bytes for every model of the tests, but rewrites bodies as well, and
  raises ValueError or TypeError for attributes of an odd type or name and for outputs without a name.
- NameFixPass renames values, so that two values of one name pass unnoticed, and may rename outputs of the model.
- InlinePass and RemoveUnusedOpsetsPass work behind the conversion of the opset, which onnx does on protobuf and only
  without functions and unknown domains.
- RemoveInitializersFromInputsPass takes inputs away from bodies of Loop, too.
- ShapeInferencePass hides failures, which here end in an error that says what does not fit together.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import onnx

from qconv.config.targets import LOWEST_OPSET
from qconv.errors import Change, QconvError, format_count
from qconv.ir import legacy
from qconv.ir.constants import fold_constant_nodes, lift_constants
from qconv.ir.files import Source, declared_opset, iter_tensors, not_onnx_error
from qconv.ir.model import Model, attribute, input_of, ir
from qconv.ir.newest import lower_opset
from qconv.ir.node_order import iter_nodes
from qconv.ir.operators import operator
from qconv.ir.output_shapes import Shape, confirms, contradicts, set_doubtful, shape_of
from qconv.ir.precision import make_float32
from qconv.ir.rewriting import standard_op_type, title
from qconv.ir.runtime_types import complete_types, infer_shapes, settle_pools

SMALL_TENSOR = 1024  # bytes; smaller ones may be shapes or axes, which the converter needs to see


def load(proto: onnx.ModelProto, source: Source, *, opset: int = LOWEST_OPSET) -> tuple[Model, list[Change]]:
    """Load a model for the passes.

    Args:
        proto: The file's content. It is used up.
        source: Where it comes from, for messages and external data.
        opset: The lowest opset of the result; a higher one of the file stays.

    Returns:
        The model, and what was changed, as findings.

    Raises:
        QconvError: The file is damaged or no ONNX model, or onnx cannot raise its opset.
    """
    changes: list[Change] = []
    # ONNX Runtime's optimizer leaves dozens of unused imports; the converter stops at any it does not know.
    used = {node.domain for node in iter_nodes(proto.graph.node)} | {f.domain for f in proto.functions}
    for index in reversed(range(len(proto.opset_import))):
        if proto.opset_import[index].domain not in used | {"", "ai.onnx"}:
            del proto.opset_import[index]
    if proto.functions:
        from onnx import inliner

        changes.append(Change("load", source.name, f"{len(proto.functions)} local functions inlined"))
        proto = inliner.inline_local_functions(proto)
    sparse = _make_dense(proto.graph)
    if sparse:
        changes.append(Change("load", source.name, f"{sparse} sparse weights made dense"))
    external = any(t.data_location == onnx.TensorProto.EXTERNAL for t in iter_tensors(proto.graph))
    current = declared_opset(proto)
    legacy.modernize(proto)
    lower_opset(proto, source.name)
    if declared_opset(proto) < current:
        changes.append(Change("load", source.name, f"opset {current} written as {declared_opset(proto)}"))
    weights = detach_weights(proto)
    _check_axes(proto, source)
    if current < opset:
        proto = _convert_opset(proto, source, current, opset)
        changes.append(Change("load", source.name, f"opset {current} raised to {opset}"))
    changes += _settle_pools(proto, source)
    doubtful = _infer_shapes(proto, source)
    listed = _reattach_weights(proto, weights)
    if listed:
        changes.append(Change("load", source.name, f"{listed} weights listed as inputs made constants"))

    try:
        model_ir = ir.from_proto(proto)
    except Exception:  # whatever a damaged file trips over
        raise not_onnx_error(source) from None
    if external and source.path is not None:
        ir.external_data.set_base_dir(model_ir.graph, source.path.resolve().parent)
    model_ir.graph.name = model_ir.graph.name or "graph"
    _name_nodes(model_ir.graph)
    model = Model(model_ir, external)
    changes += lift_constants(model)
    changes += make_float32(model)
    changes += fold_constant_nodes(model)
    changes += _rewrite_operators(model)
    set_doubtful(model, doubtful)
    return model, changes


def _make_dense(graph: onnx.GraphProto) -> int:
    """Make sparse initializers and Constant nodes dense, as onnx-ir holds no others. Returns how many there were."""
    graph.initializer.extend(map(_to_dense, graph.sparse_initializer))
    count = len(graph.sparse_initializer)
    del graph.sparse_initializer[:]
    for node in iter_nodes(graph.node):
        for attr in node.attribute:
            if attr.HasField("sparse_tensor"):
                attr.CopyFrom(onnx.helper.make_attribute("value", _to_dense(attr.sparse_tensor)))
                count += 1
    return count


def _to_dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """Convert one sparse tensor; its indices have the shape (N,), flat, or (N, rank)."""
    values, indices = onnx.numpy_helper.to_array(sparse.values), onnx.numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return onnx.numpy_helper.from_array(dense, sparse.values.name)


def detach_weights(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Turn large initializers into inputs, so that onnx's C++ parts get a few kilobytes only. Returns them by name."""
    graph = proto.graph
    weights: dict[str, onnx.TensorProto] = {}
    kept = []
    inputs = {value.name for value in graph.input}
    for tensor in graph.initializer:
        if tensor.ByteSize() <= SMALL_TENSOR and tensor.data_location != onnx.TensorProto.EXTERNAL:
            kept.append(tensor)
            continue
        weights[tensor.name] = tensor
        if tensor.name not in inputs:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    small = [onnx.TensorProto.FromString(t.SerializeToString()) for t in kept]
    weights = {name: onnx.TensorProto.FromString(t.SerializeToString()) for name, t in weights.items()}
    del graph.initializer[:]
    graph.initializer.extend(small)
    return weights


def _reattach_weights(proto: onnx.ModelProto, weights: dict[str, onnx.TensorProto]) -> int:
    """Undo `detach_weights`; no initializer stays listed as an input. Returns how many the file itself had listed."""
    graph = proto.graph
    graph.initializer.extend(weights.values())
    constant = {tensor.name for tensor in graph.initializer}
    keep = [value for value in graph.input if value.name not in constant]
    listed = len(graph.input) - len(keep) - len(weights)
    saved = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in keep]
    del graph.input[:]
    graph.input.extend(saved)
    return max(listed, 0)


def _convert_opset(proto: onnx.ModelProto, source: Source, current: int, opset: int) -> onnx.ModelProto:
    """Raise the opset by onnx's version converter, which drops metadata: they are put back."""
    from onnx import version_converter

    metadata, functions = list(proto.metadata_props), proto.functions
    assert not functions
    resized = legacy.find_resizing(proto)
    if proto.ir_version < 4:
        # Before IR 4 every initializer was an input too, and the converter insists on it.
        listed = {value.name for value in proto.graph.input}
        for tensor in proto.graph.initializer:
            if tensor.name not in listed:
                proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        converted = version_converter.convert_version(proto, opset)
    except Exception as error:  # the converter raises whatever its C++ side throws
        raise QconvError(
            f"{source.name} uses opset {current}, and onnx cannot raise it to {opset}: {_plain_reason(error)}",
            f"export the model again at opset {LOWEST_OPSET} or later, the oldest that needs no raising.",
        ) from None
    del converted.metadata_props[:]
    converted.metadata_props.extend(metadata)
    converted.ir_version = max(proto.ir_version, 7)
    legacy.restore_resizing(converted, resized)
    return converted


def _check_axes(proto: onnx.ModelProto, source: Source) -> None:
    """Raises QconvError for a convolution whose input has not as many axes as its weights.

    Only for those that leave kernel_shape to their weights: the libraries look at the others themselves, whatever their
    version.
    """
    from onnx import shape_inference

    if not any(map(_is_unspoken, iter_nodes(proto.graph.node))):
        return
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.value_info[:]
    found = list(filter(_is_unspoken, iter_nodes(copy.graph.node)))
    ranks = {tensor.name: len(tensor.dims) for tensor in copy.graph.initializer} | legacy.ranks_of(copy.graph.input)
    for node in found:
        node.attribute.append(onnx.helper.make_attribute("kernel_shape", [1] * max(ranks.get(node.input[1], 4) - 2, 1)))
    try:
        graph = shape_inference.infer_shapes(copy, data_prop=True).graph
    except Exception:  # it is told of where shapes are inferred for good
        return
    ranks |= legacy.ranks_of((*graph.input, *graph.value_info))
    for node in found:
        pictures, weights = (ranks.get(name) for name in node.input[:2])
        if pictures is not None and weights is not None and pictures != weights:
            raise QconvError(
                f"{source.name} does not fit together: {node.op_type} {node.name or node.output[0]!r} has weights of "
                f"{weights} axes and an input of {pictures}.",
                "check it with onnx.checker, or export it again.",
            )


def _is_unspoken(node: onnx.NodeProto) -> bool:
    """Whether it is a convolution that leaves the size of its kernel to its weights."""
    kinds = node.domain in ("", "ai.onnx") and node.op_type in ("Conv", "ConvTranspose") and len(node.input) > 1
    return kinds and all(attribute.name != "kernel_shape" for attribute in node.attribute)


def _settle_pools(proto: onnx.ModelProto, source: Source) -> list[Change]:
    """Write pads of pools out where onnx and the runtime count places in two ways."""
    plain = onnx.ModelProto()
    plain.CopyFrom(proto)
    _forget_shapes(plain)
    with _telling_what_does_not_fit(source):
        settled = settle_pools(plain)
    for node, own in zip(proto.graph.node, plain.graph.node, strict=True) if settled else ():
        node.CopyFrom(own)
    told = f"pads of {format_count(settled, 'pool')} written out"
    return [Change("load", source.name, told)] if settled else []


def _forget_shapes(proto: onnx.ModelProto) -> None:
    """Drop the shapes that a file says, but for those of inputs."""
    del proto.graph.value_info[:]
    for output in proto.graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")


def _infer_shapes(proto: onnx.ModelProto, source: Source) -> dict[str, Shape | None]:
    """Let onnx infer shapes; stale ones in the file are dropped first, but those of outputs that may be right.

    Returns the outputs of which the file declares more than is inferred, or another thing, with what that is.
    """
    declared = [onnx.TypeProto.FromString(output.type.SerializeToString()) for output in proto.graph.output]
    _forget_shapes(proto)
    inferred = _infer(proto, source)
    doubtful: dict[str, Shape | None] = {}
    for output, said, found in zip(proto.graph.output, declared, inferred.graph.output, strict=True):
        own, its = shape_of(said), shape_of(found.type)
        if its is None or (own is not None and not confirms(its, own)):
            doubtful[output.name] = own
        output.type.CopyFrom(said if its is None or (own is not None and not contradicts(own, its)) else found.type)
    if any(o.type != f.type for o, f in zip(proto.graph.output, inferred.graph.output, strict=True)):
        inferred = _infer(proto, source)  # what reads an output knows what is declared of it
    proto.graph.value_info.extend(inferred.graph.value_info)
    complete_types(proto)
    return doubtful


def _infer(proto: onnx.ModelProto, source: Source) -> onnx.ModelProto:
    with _telling_what_does_not_fit(source):
        return infer_shapes(proto)


@contextlib.contextmanager
def _telling_what_does_not_fit(source: Source) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a C++ exception of no fixed type
        raise QconvError(
            f"{source.name} does not fit together: {_first_line(error)}",
            "check it with onnx.checker, or export it again.",
        ) from None


def load_unchanged(proto: onnx.ModelProto, source: Source) -> Model:
    """Load a model as it is, but for names of nodes and inferred types. `proto` is used up."""
    weights = detach_weights(proto)
    _check_axes(proto, source)
    doubtful: dict[str, Shape | None] = {}
    with contextlib.suppress(QconvError):
        doubtful = _infer_shapes(proto, source)
    _reattach_weights(proto, weights)
    try:
        model_ir = ir.from_proto(proto)
    except Exception:  # whatever a damaged file trips over
        raise not_onnx_error(source) from None
    external = any(t.data_location == onnx.TensorProto.EXTERNAL for t in weights.values())
    if external and source.path is not None:
        ir.external_data.set_base_dir(model_ir.graph, source.path.resolve().parent)
    _name_nodes(model_ir.graph)
    model = Model(model_ir, external)
    set_doubtful(model, doubtful)
    return model


def infer_shapes_at(model: Model, name: str, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Infer the shapes of all tensors, by name, when the input `name` has `shape`, as far as onnx can."""
    proto = model.proto()
    detach_weights(proto)
    for value in proto.graph.input:
        if value.name == name:
            sides = value.type.tensor_type.shape
            del sides.dim[:]
            for side in shape:
                sides.dim.add().dim_value = side
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = infer_shapes(proto).graph
    found: dict[str, tuple[int, ...]] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            found[value.name] = tuple(dim.dim_value for dim in dims)
    return found


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _plain_reason(error: Exception) -> str:
    """What the converter says, without places of its source code."""
    text = re.sub(r"^\S+\.(?:h|cc):\d+: \w+(?:\(\))?: ", "", _first_line(error))
    text = re.sub(r"^Assertion `.*?` failed: ", "", text)
    missing = re.match(r"No Adapter From Version \$?(\d+) for (\w+)", text)
    unknown = re.match(r"Op '%s' has no registered schema.*%lld\.?([A-Za-z]+)\d*$", text)
    if missing:
        return f"it has no rule for {missing[2]} of opset {missing[1]}."
    if text == "_Map_base::at":  # onnx up to 1.18 looks its rules up without a word
        return "it does not know one of its operators."
    return f"it does not know the operator {unknown[1]}." if unknown else text


def _name_nodes(graph: ir.Graph) -> None:
    """Name every node, by its first output where it has no name: reports and the audit refer to nodes by name."""
    taken: set[str] = set()
    for index, node in enumerate(graph):
        wish = node.name or (node.outputs[0].name if node.outputs else "") or f"{node.op_type}_{index}"
        name, count = wish, 1
        while name in taken:
            count += 1
            name = f"{wish}_{count}"
        node.name = name
        taken.add(name)


def _rewrite_operators(model: Model) -> list[Change]:
    """Operators whose row in the table says how become others that do the same."""
    changes = []
    for node in model.nodes():
        rewrite, x = operator(standard_op_type(node)).rewrite, input_of(node, 0)
        if rewrite is None or x is None or x.dtype is None:
            continue
        made: list[ir.Node] = []
        result = rewrite(partial(_build_before, model, node, made), x, partial(attribute, node))
        model.insert_before(node, *made)
        model.take_over(node.outputs[0], result)
        model.remove(node)
        what = f"{node.op_type} made of {', '.join(part.op_type for part in made)}"
        changes.append(Change("load", title(node), what, what))
    return changes


def _build_before(
    model: Model, node: ir.Node, made: list[ir.Node], op_type: str, *inputs: ir.Value | float
) -> ir.Value:
    """A part of what `node` is made of, which goes to `made`; numbers become constants of the type of its input."""
    x = node.inputs[0]
    assert x is not None
    assert x.dtype is not None
    dtype, name = x.dtype.numpy(), f"{title(node)}_{op_type.lower()}"
    values = [v if isinstance(v, ir.Value) else model.constant(f"{name}_by", np.asarray(v, dtype)) for v in inputs]
    made.append(model.build(op_type, values, name=name, like=x))
    return made[-1].outputs[0]
