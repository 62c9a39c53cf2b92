"""Files that compute in float16 around int8 codes, as ModelOpt writes them, drawn at random: compared and inspected."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qconv.analysis.compare import compare_on_images
from qconv.analysis.inspect_quantized import inspect_quantized
from qconv.config.data_options import DataOptions
from qconv.ir.files import Source
from qconv.reporter import Reporter
from qconv.runtime.session import Session
from tests.support.quantized import sqnr

DRAWS = int(os.environ.get("QCONV_DRAWS", "10"))
SHAPE = [1, 3, 8, 8]


class Pair:
    """A float32 network and the file that another tool made of it: half, with quantizers of float16 scales."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.plain: list[onnx.NodeProto] = []
        self.half: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.codes = self.float_bytes = 0

    def store(self, name: str, array: np.ndarray) -> str:
        self.stored.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def both(self, kind: str, x: str, y: str, **attributes: object) -> None:
        self.plain.append(helper.make_node(kind, [x], [y], name=y, **attributes))
        self.half.append(helper.make_node(kind, [f"{x}_h"], [f"{y}_h"], name=y, **attributes))

    def layer(self, kind: str, x: str, y: str, weights: np.ndarray, scale: float | None) -> None:
        """scale: of what it reads; None leaves it in float16."""
        self.weights.append(numpy_helper.from_array(weights, f"{y}_w"))
        self.plain.append(helper.make_node(kind, [x, f"{y}_w"], [y], name=y))
        if scale is None:
            self.store(f"{y}_wh", weights.astype(np.float16))
            self.float_bytes += 2 * weights.size
            self.half.append(helper.make_node(kind, [f"{x}_h", f"{y}_wh"], [f"{y}_h"], name=y))
            return
        fixed = [self.store(f"{y}_s", np.float16(scale)), self.store(f"{y}_z", np.int8(0))]
        step = np.abs(weights).max() / 127
        codes = self.store(f"{y}_c", np.rint(weights / step).astype(np.int8))
        self.codes += weights.size
        its = [self.store(f"{y}_ws", np.float16(step)), self.store(f"{y}_wz", np.int8(0))]
        self.half += [
            helper.make_node("QuantizeLinear", [f"{x}_h", *fixed], [f"{y}_q"], name=f"{y}_q"),
            helper.make_node("DequantizeLinear", [f"{y}_q", *fixed], [f"{y}_d"], name=f"{y}_d"),
            helper.make_node("DequantizeLinear", [codes, *its], [f"{y}_wd"], name=f"{y}_wd"),
            helper.make_node(kind, [f"{y}_d", f"{y}_wd"], [f"{y}_h"], name=y),
        ]

    def write(self, y: str, folder: Path) -> tuple[Source, Source]:
        casts = [helper.make_node("Cast", ["x"], ["x_h"], name="into", to=TensorProto.FLOAT16)]
        casts += [helper.make_node("Cast", [f"{y}_h"], [y], name="out_of", to=TensorProto.FLOAT)]
        parts = (self.plain, self.weights), ([casts[0], *self.half, casts[1]], self.stored)
        sources = []
        for name, (nodes, tensors) in zip(("float.onnx", "half.onnx"), parts, strict=True):
            graph = helper.make_graph(
                nodes,
                "g",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
                [helper.make_tensor_value_info(y, TensorProto.FLOAT, [1, 5])],
                tensors,
            )
            proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
            (folder / name).write_bytes(proto.SerializeToString())
            sources.append(Source(str(folder / name), folder / name))
        return sources[0], sources[1]


def draw(seed: int, folder: Path) -> tuple[Source, Source, Pair]:
    pair, name, channels = Pair(seed), "x", 3
    for index in range(int(pair.rng.integers(1, 4))):
        out = int(pair.rng.integers(3, 9))
        weights = (pair.rng.normal(size=(out, channels, 3, 3)) / np.sqrt(9 * channels)).astype(np.float32)
        quantized = index == 0 or bool(pair.rng.integers(0, 2))
        pair.layer("Conv", name, f"conv{index}", weights, 0.03 if quantized else None)
        pair.both("Relu", f"conv{index}", f"relu{index}")
        name, channels = f"relu{index}", out
    pair.both("GlobalAveragePool", name, "pool")
    pair.both("Flatten", "pool", "flat")
    pair.layer("MatMul", "flat", "y", pair.rng.normal(size=(channels, 5)).astype(np.float32), None)
    return *pair.write("y", folder), pair


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    for index in range(4):
        np.save(folder / f"{index}.npy", np.random.default_rng(index).normal(size=SHAPE[1:]).astype(np.float32))
    return folder


@pytest.mark.parametrize("seed", range(DRAWS))
def test_float16_around_codes_is_compared_and_counted(seed: int, samples: Path, tmp_path: Path) -> None:
    source, other, pair = draw(seed, tmp_path)
    data = DataOptions((str(samples),), samples=None)
    found = compare_on_images(source, other, data, Reporter(), 1).compared
    pictures = [{"x": np.load(path)[None]} for path in sorted(samples.iterdir())]
    sessions = [Session(str(part.path), threads=1) for part in (source, other)]
    want, got = (np.concatenate([session.run_all(x)[0] for x in pictures]) for session in sessions)
    assert found.sqnr_db == pytest.approx(sqnr(want, got), abs=0.05)
    layers = {row.name for row in found.layers}
    assert {node.name for node in pair.plain if node.op_type in ("Conv", "MatMul")} <= layers
    told = inspect_quantized(other).as_dict()["size"]
    assert (told["codes"], told["float_weights"]) == (pair.codes, pair.float_bytes)
