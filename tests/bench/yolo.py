"""A detector in the style of YOLOv8: SiLU everywhere, blocks that split and join, a neck up and down, three heads.

No published weights: seeded He-normal draws, as no BatchNormalization is left. Input (1, 3, 256, 256), RGB / 255.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE = 256
WIDTHS = (16, 32, 64, 128)
CLASSES, BINS = 80, 16


class Builder:
    """Nodes and weights, tensor by tensor."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(seed)

    def node(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{op_type.lower()}_{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, name=names[0], **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, array: Any) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def conv(self, x: str, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, plain: bool = False) -> str:
        fan_in = inputs * kernel * kernel
        weight = self.constant(
            (self.rng.normal(size=(outputs, inputs, kernel, kernel)) * np.sqrt(2 / fan_in)).astype(np.float32)
        )
        bias = self.constant(self.rng.normal(0, 0.1, outputs).astype(np.float32))
        shape = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4}
        y = self.node("Conv", x, weight, bias, **shape)
        return y if plain else self.node("Mul", y, self.node("Sigmoid", y))

    def split_block(self, x: str, inputs: int, outputs: int, *, shortcut: bool) -> str:
        """C2f of YOLOv8 with one bottleneck."""
        half = outputs // 2
        y = self.conv(x, inputs, outputs)
        sizes = self.constant(np.int64([half, half]))
        kept, last = self.node("Split", y, sizes, outputs=2, axis=1)
        inner = self.conv(self.conv(last, half, half, 3), half, half, 3)
        inner = self.node("Add", last, inner) if shortcut else inner
        return self.conv(self.node("Concat", kept, last, inner, axis=1), 3 * half, outputs)

    def pooled(self, x: str, channels: int) -> str:
        """SPPF."""
        parts = [self.conv(x, channels, channels // 2)]
        for _ in range(3):
            parts.append(self.node("MaxPool", parts[-1], kernel_shape=[5, 5], pads=[2] * 4))
        return self.conv(self.node("Concat", *parts, axis=1), 2 * channels, channels)

    def doubled(self, x: str) -> str:
        scales = self.constant(np.float32([1, 1, 2, 2]))
        return self.node("Resize", x, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric")

    def head(self, x: str, channels: int) -> str:
        boxes = self.conv(self.conv(x, channels, 32, 3), 32, 4 * BINS, plain=True)
        scores = self.conv(self.conv(x, channels, 32, 3), 32, CLASSES, plain=True)
        shape = self.constant(np.int64([1, 4 * BINS + CLASSES, -1]))
        return self.node("Reshape", self.node("Concat", boxes, scores, axis=1), shape)


def write(path: Path, seed: int = 0) -> None:
    build, (a, b, c, d) = Builder(seed), WIDTHS
    x = build.conv("images", 3, a, 3, 2)
    x = build.split_block(build.conv(x, a, b, 3, 2), b, b, shortcut=True)
    fine = build.split_block(build.conv(x, b, c, 3, 2), c, c, shortcut=True)
    middle = build.split_block(build.conv(fine, c, d, 3, 2), d, d, shortcut=True)
    coarse = build.pooled(build.split_block(build.conv(middle, d, d, 3, 2), d, d, shortcut=True), d)
    up = build.split_block(build.node("Concat", build.doubled(coarse), middle, axis=1), 2 * d, d, shortcut=False)
    first = build.split_block(build.node("Concat", build.doubled(up), fine, axis=1), d + c, c, shortcut=False)
    down = build.node("Concat", build.conv(first, c, c, 3, 2), up, axis=1)
    second = build.split_block(down, c + d, d, shortcut=False)
    down = build.node("Concat", build.conv(second, d, d, 3, 2), coarse, axis=1)
    third = build.split_block(down, 2 * d, d, shortcut=False)
    found = [build.head(level, channels) for level, channels in ((first, c), (second, d), (third, d))]
    rows = build.node("Concat", *found, axis=2)
    boxes, scores = build.node("Split", rows, build.constant(np.int64([4 * BINS, CLASSES])), outputs=2, axis=1)
    build.nodes.append(helper.make_node("Sigmoid", [scores], ["scores"], name="scores"))
    build.nodes.append(helper.make_node("Identity", [boxes], ["boxes"], name="boxes"))
    cells = sum((SIDE // stride) ** 2 for stride in (8, 16, 32))
    graph = helper.make_graph(
        build.nodes,
        "yolo",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 3, SIDE, SIDE))],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, (1, 4 * BINS, cells)),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, (1, CLASSES, cells)),
        ],
        build.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
