"""Decides what each output of a model holds: class scores, a class map, numbers of a regression, or integers.

The decision is made once for an output, from its shape, its type and the operators that compute it, and says why.
Whoever needs it asks `Session.model_outputs`: the centre crop of pictures, agreement, top-1, the loss of training.

    integer         no floats
    class scores    one number a class for a picture: (N, C), with or without axes of 1 behind
    class map       one number a class for every place: (N, C, H, W), or (N, H, W, C) where the input has that layout
    detections      read together with others by a decoder, as boxes, scores or what belongs to them
    embedding       (N, D) of one length, or of features that no layer makes classes of
    keypoints       places in the picture
    regression      everything else in floats: a picture, a depth, an angle

An embedding has length 1 (an L2 norm), ends in BatchNormalization or in pooling, or has a width such as 512 that is no
count of classes. A picture has one or three channels as the input does, its size or a multiple, and no classifier of
pixels (Softmax, a 1x1 Conv, a Resize of scores) at its end.

What computes an output is found in the graph: from the output the way goes back through the operators that only move
values or quantize them, along the one input that is no constant, up to the last layer with weights, or to where two
tensors meet. An L2 norm and a softmax that exporters write as several operators are told by their division: x /
sqrt(sum x^2), and exp(x) / sum exp(x).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import prod
from typing import TYPE_CHECKING

from qconv.config.tasks import Tasks
from qconv.errors import QconvError, format_count, format_shape
from qconv.results.quantize import OutputFact

if TYPE_CHECKING:
    import onnx


Shape = tuple[int | None, ...]

NORMALIZING_OP = "LpNormalization"
"""How an L2 norm is called here, whatever operators compute it."""

SOFTMAX_OPS = frozenset({"Softmax", "LogSoftmax"})

LAYER_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

POOLING_OPS = frozenset({"GlobalAveragePool", "GlobalMaxPool", "AveragePool", "MaxPool", "ReduceMean", "ReduceMax"})

FEWEST_FEATURES = 64
"""Width from which on a power of two counts as a number of features, and any multiple of it behind a pooling."""


class OutputKind(StrEnum):
    """What the numbers of an output are."""

    CLASS_SCORES = "class-scores"
    CLASS_MAP = "class-map"
    DETECTIONS = "detections"
    EMBEDDING = "embedding"
    KEYPOINTS = "keypoints"
    REGRESSION = "regression"
    INTEGER = "integer"


KIND_OF_TASK = {
    "classify": OutputKind.CLASS_SCORES,
    "segment": OutputKind.CLASS_MAP,
    "regress": OutputKind.REGRESSION,
    "detect": OutputKind.DETECTIONS,
    "embed": OutputKind.EMBEDDING,
    "keypoints": OutputKind.KEYPOINTS,
}
"""What `--task` says of outputs."""


ANY_SHAPE = frozenset({OutputKind.REGRESSION, OutputKind.EMBEDDING, OutputKind.KEYPOINTS})
"""What an output of floats may be said to be, whatever its shape."""


@dataclass(frozen=True, slots=True)
class OutputOrigin:
    """What computes an output.

    operators: from the output back to the last layer with weights, or to where tensors meet; without those that only
        move values, and those that quantize. An L2 norm is called NORMALIZING_OP, and Exp over its sum Softmax.
    kernel: the number of places that the weights of this layer cover, 1 for a 1x1 Conv; None for other operators.
    """

    operators: tuple[str, ...] = ()
    kernel: int | None = None


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """An output with what it holds.

    floating: whether it is a tensor of floats. shape: None for each axis that the model leaves open.
    image: shape of the model's first input, () where it is unknown. origin: None where it is unknown.
    task: what the user says of the output, "auto" for nothing. detected: why it is read as detections, by the decoder
    that does so; empty where none does.
    """

    name: str
    floating: bool
    shape: Shape
    image: Shape = ()
    origin: OutputOrigin | None = None
    task: str = "auto"
    detected: str = ""

    def seen(self, shape: Sequence[int]) -> ModelOutput:
        """The output with the shape of an array that was seen of it."""
        return replace(self, shape=tuple(shape))

    @property
    def kind(self) -> OutputKind:
        """What the output holds."""
        return self._decide()[0]

    @property
    def why(self) -> str:
        """What speaks for this kind, in words."""
        return self._decide()[1]

    @property
    def fact(self) -> OutputFact:
        """The output as reports hold it."""
        kind, why = self._decide()
        task = next((task for task, its in KIND_OF_TASK.items() if its is kind), None)
        return OutputFact(self.name, kind, task, why)

    @property
    def axis(self) -> int:
        """The axis of classes: the last one of a map where the input has its channels last, else 1."""
        last = len(self.image) == 4 and self.image[3] in (1, 3) and self.image[1] not in (1, 3)
        return 3 if last and len(self.shape) == 4 and not self._is_vector else 1

    @property
    def classes(self) -> int:
        """How many classes it tells apart; 0 where it holds none, or the model leaves their number open."""
        holds = self.kind in (OutputKind.CLASS_SCORES, OutputKind.CLASS_MAP)
        return (self.shape[self.axis] or 0) if holds and len(self.shape) > self.axis else 0

    @property
    def _is_vector(self) -> bool:
        return len(self.shape) >= 2 and set(self.shape[2:]) <= {1}

    def _decide(self) -> tuple[OutputKind, str]:
        if self.detected:
            return OutputKind.DETECTIONS, self.detected
        if not self.floating:
            return OutputKind.INTEGER, "it holds no floats"
        told = KIND_OF_TASK.get(self.task)
        if told in ANY_SHAPE or (told and self._can_be(told)):
            return told, f"--task {self.task}"
        if not (self._can_be(OutputKind.CLASS_SCORES) or self._can_be(OutputKind.CLASS_MAP)):
            return OutputKind.REGRESSION, f"the shape {format_shape(self.shape)} has no axis of classes"
        why = self._why_features() or ("" if self._is_vector else self._why_picture())
        if why:
            return OutputKind.REGRESSION, why
        return self._decide_classes()

    def _can_be(self, kind: OutputKind) -> bool:
        """Whether the shape is possible for this kind."""
        if kind is OutputKind.CLASS_SCORES:
            return self._is_vector
        return len(self.shape) == 4 and not self._is_vector and self.shape[self.axis] != 1

    def _decide_classes(self) -> tuple[OutputKind, str]:
        width = self.shape[self.axis]
        count = "one number a class" if width is None else format_count(width, "number")
        kind, each = (
            (OutputKind.CLASS_SCORES, "a picture") if self._is_vector else (OutputKind.CLASS_MAP, "for every place")
        )
        end = next((op for op in self._operators if op in SOFTMAX_OPS | LAYER_OPS), "")
        return kind, f"{count} {each}{f' behind {end}' if end else ''}"

    @property
    def _operators(self) -> tuple[str, ...]:
        return () if self.origin is None else self.origin.operators

    def _why_features(self) -> str:
        """Why numbers along the axis of classes are features and no classes; empty where nothing says so."""
        last, width = next(iter(self._operators), ""), self.shape[self.axis]
        if last == NORMALIZING_OP:
            return "an L2 norm gives it length 1, as embeddings have"
        if SOFTMAX_OPS & set(self._operators) or width is None:
            return ""
        if self._is_vector and last == "BatchNormalization":
            return "it ends in BatchNormalization, as embeddings do"
        if last == "Concat" and not self._is_vector:
            return "it joins tensors of several layers along its channels"
        layers = [op for op in self._operators if op in LAYER_OPS]
        pooled = last in POOLING_OPS and (not layers or layers[0] == "Conv")
        if self._is_vector and pooled and width >= FEWEST_FEATURES and width % FEWEST_FEATURES == 0:
            return f"{width} pooled channels are features: no layer makes classes of them"
        if self.origin is not None and width >= FEWEST_FEATURES and width & (width - 1) == 0:
            return f"a power of two, {width}, is a number of features rather than of classes, and no Softmax follows"
        return ""

    def _why_picture(self) -> str:
        """Why a map is a picture and no classes; empty where it is none."""
        if self.shape[self.axis] != 3:
            return ""
        if SOFTMAX_OPS & set(self._operators):
            return ""
        channels, size = _channels_and_size(self.image)
        own = tuple(side for index, side in enumerate(self.shape) if index not in (0, self.axis))
        if self.image and channels is not None and channels != 3:
            return ""
        if any(have is not None and had is not None and have % had for have, had in zip(own, size, strict=False)):
            return ""  # smaller than the input, or no multiple of it
        last = next(iter(self._operators), "")
        if last == "Resize" and LAYER_OPS & set(self._operators):
            return ""  # of scores; a picture that is resized is convolved again
        if last in LAYER_OPS and self.origin is not None and self.origin.kernel == 1:
            return ""
        return "three channels of the input's size are a picture, and no classifier of pixels is at its end"


def _channels_and_size(image: Shape) -> tuple[int | None, Shape]:
    """The channels and the size of an input of four axes, with channels first or last; None and () for others."""
    if len(image) != 4:
        return None, ()
    last = image[3] in (1, 3) and image[1] not in (1, 3)
    return (image[3], image[1:3]) if last else (image[1], image[2:])


def find_class_vector(outputs: Sequence[ModelOutput]) -> int | None:
    """Which output is one score a class, of two classes or more: the first one; None where none is."""
    found = (i for i, o in enumerate(outputs) if o.kind is OutputKind.CLASS_SCORES and o.shape[o.axis] != 1)
    return next(found, None)


def require_tasks(model: str, outputs: Sequence[ModelOutput], tasks: Tasks) -> None:
    """Raise QconvError where `--task` names what no output can hold; detections are looked for in outputs seen."""
    for entry in tasks.task.split(","):
        name, _, task = entry.rpartition("=")
        meant = [output for output in outputs if not name or output.name == name]
        if not meant:
            known = ", ".join(output.name for output in outputs)
            raise QconvError(f"--task {entry}: {model} has no output {name!r}, but {known}.", "name one of these.")
        wanted = KIND_OF_TASK.get(task, OutputKind.DETECTIONS)
        if wanted is OutputKind.DETECTIONS or any(o.kind is wanted or not o.shape for o in meant):
            continue
        shapes = ", ".join(f"{output.name} is {format_shape(output.shape)}" for output in meant)
        needs = {
            OutputKind.CLASS_SCORES: "an output (N, C)",
            OutputKind.CLASS_MAP: "an output (N, C, H, W) of two classes or more",
        }.get(wanted, "an output of floats")
        raise QconvError(
            f"--task {entry} needs {needs}, but of {model} {shapes}.", "leave --task out, or name another."
        )


MOVING_OPS = frozenset(
    {"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast", "Dropout", "Slice"}
    | {"QuantizeLinear", "DequantizeLinear"}
)

NORM_OPS = frozenset({"Sqrt", "Clip", "Max", "Add", "Expand", "Reciprocal", "Pow", "Div", *MOVING_OPS})
"""What may lie between a sum of squares and the division by its root."""

MOST_STEPS = 64
"""Most steps back from an output."""


def find_output_origins(proto: onnx.ModelProto) -> dict[str, OutputOrigin]:
    """What computes each output of the graph, by its name."""
    graph = _Graph.of(proto.graph)
    return {output.name: graph.origin_of(output.name) for output in proto.graph.output}


@dataclass(slots=True)
class _Graph:
    """producers: the node behind each tensor. shapes: of the constants that are stored."""

    producers: dict[str, onnx.NodeProto]
    shapes: dict[str, tuple[int, ...]]
    constant: dict[str, bool]

    @classmethod
    def of(cls, graph: onnx.GraphProto) -> _Graph:
        producers = {name: node for node in graph.node for name in node.output}
        shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        shapes |= {tensor.values.name: tuple(tensor.dims) for tensor in graph.sparse_initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                shapes[node.output[0]] = tuple(node.attribute[0].t.dims)
        constant = dict.fromkeys(shapes, True)
        for node in graph.node:  # which stand in the order in which they run
            known = node.op_type == "Constant" or all(constant.get(name, not name) for name in node.input)
            known = known and (bool(node.input) or node.op_type == "Constant")
            constant |= dict.fromkeys(node.output, known)
        return cls(producers, shapes, constant)

    def origin_of(self, name: str) -> OutputOrigin:
        found: list[str] = []
        for node in self._back_from(name):
            kind = _plain_name(node)
            if kind in MOVING_OPS:
                continue
            data = self._data_of(node)
            if kind in ("Div", "Mul", "ReduceL2") and len(data) == 2:
                if any(self._is_norm(side) for side in data):
                    return OutputOrigin((*found, NORMALIZING_OP))
                if kind == "Div" and self._is_softmax(*data):
                    return OutputOrigin((*found, "Softmax"))
            found.append(kind)
            if kind in LAYER_OPS:
                return OutputOrigin(tuple(found), self._kernel_of(node))
        return OutputOrigin(tuple(found))

    def _back_from(self, name: str) -> Iterator[onnx.NodeProto]:
        """The nodes behind a tensor, as long as one input alone is no constant."""
        for _ in range(MOST_STEPS):
            node = self.producers.get(name)
            if node is None:
                return
            yield node
            data = self._data_of(node)
            if not data or (len(data) > 1 and _plain_name(node) not in {*MOVING_OPS, "Resize"}):
                return
            name = data[0]

    def _data_of(self, node: onnx.NodeProto) -> list[str]:
        return [name for name in node.input if name and not self.constant.get(name, False)]

    def _kernel_of(self, node: onnx.NodeProto) -> int | None:
        """How many places the weights of a convolution cover."""
        if _plain_name(node) not in ("Conv", "ConvTranspose"):
            return None
        stated = next((tuple(a.ints) for a in node.attribute if a.name == "kernel_shape"), None)
        if stated is not None:
            return int(prod(stated))
        name = next((n for n in node.input[1:] if len(self._stored_shape(n)) > 2), "")
        return prod(self._stored_shape(name)[2:]) if name else None

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        while name not in self.shapes and name in self.producers and self.producers[name].input:
            name = self.producers[name].input[0]
        return self.shapes.get(name, ())

    def _is_norm(self, name: str) -> bool:
        """Whether a tensor is the length of another one, or one over it."""
        rooted = False
        for node in self._back_from_norm(name):
            rooted = rooted or node.op_type in ("Sqrt", "Pow")
            if node.op_type == "ReduceL2":
                return True
            if node.op_type in ("ReduceSum", "ReduceSumSquare"):
                return rooted
            if node.op_type not in NORM_OPS:
                return False
        return False

    def _back_from_norm(self, name: str) -> Iterator[onnx.NodeProto]:
        for _ in range(MOST_STEPS):
            node = self.producers.get(name)
            if node is None:
                return
            yield node
            data = self._data_of(node)
            if not data:
                return
            name = data[0]

    def _is_softmax(self, above: str, below: str) -> bool:
        """Whether the division is one of Exp by its own sum."""
        exp, total = self.producers.get(above), self.producers.get(below)
        if exp is None or total is None or exp.op_type != "Exp" or total.op_type != "ReduceSum":
            return False
        return total.input[0] in exp.output


def _plain_name(node: onnx.NodeProto) -> str:
    """The operator that a kernel on integer codes stands for, and the operator itself of others."""
    name: str = node.op_type
    for prefix in ("QLinear", "QGemm"):
        if name.startswith(prefix):
            return "Gemm" if prefix == "QGemm" else name.removeprefix(prefix)
    return {"ConvInteger": "Conv", "MatMulInteger": "MatMul"}.get(name, name)
