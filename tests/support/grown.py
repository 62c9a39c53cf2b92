"""Graphs that are grown node by node from a seed, for generators of whole families, and what qconv makes of one.

`Grower` adds nodes and seeded weights. `run_commands` runs the commands on a graph, in this process, and returns what
went wrong in words: an exception that is no QconvError, a refusal, a result that does not load or is far from float.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

import qconv
from qconv.config.recipe import Recipe
from qconv.errors import QconvError

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


class Grower:
    """A graph under construction. opset: of the standard operators; domains: others that it uses."""

    def __init__(self, seed: int, opset: int = 17, ir_version: int = 9) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset, self.ir_version = opset, ir_version
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.domains: set[str] = set()
        self.count = 0

    def name(self, hint: str) -> str:
        self.count += 1
        return f"{hint.lower()}_{self.count}"

    def choose(self, *options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def draw(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return int(self.rng.integers(low, high + 1))

    def input(self, shape: Sequence[int | str], name: str = "x", kind: int = FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, value: str, shape: Sequence[int | str | None] | None = None, kind: int = FLOAT) -> None:
        self.outputs.append(helper.make_tensor_value_info(value, kind, shape))

    def const(self, numbers: ArrayLike, hint: str = "k") -> str:
        array = np.asarray(numbers)
        name = self.name(hint)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        self.constants.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def ints(self, *numbers: int) -> str:
        return self.const(np.array(numbers, np.int64))

    def weights(self, *shape: int) -> NDArray[np.float32]:
        fan = math.prod(shape[1:]) or 1
        return (self.rng.standard_normal(shape) * np.sqrt(2 / fan)).astype(np.float32)

    def op(self, op_type: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add a node. Returns the name of its output, a list of them where there are several."""
        made = [self.name(op_type) for _ in range(outputs)]
        self.nodes.append(
            helper.make_node(op_type, inputs, made, self.name(f"n_{op_type}"), domain=domain, **attributes)
        )
        self.domains |= {domain} - {""}
        return made[0] if outputs == 1 else made

    def conv(self, x: str, channels: int, outputs: int, kernel: int = 3, **attributes: Any) -> str:
        weight = self.const(self.weights(outputs, channels, kernel, kernel), "w")
        bias = self.const(self.rng.standard_normal(outputs) * 0.1, "b")
        pads = [kernel // 2] * 4
        found: str = self.op("Conv", x, weight, bias, pads=pads, **attributes)
        return found

    def gemm(self, x: str, features: int, outputs: int) -> str:
        bias = self.const(self.rng.standard_normal(outputs) * 0.1, "b")
        found: str = self.op("Gemm", x, self.const(self.weights(outputs, features), "w"), bias, transB=1)
        return found

    def relu(self, x: str) -> str:
        found: str = self.op(self.choose("Relu", "Relu", "LeakyRelu", "HardSwish") if self.opset > 13 else "Relu", x)
        return found

    def body(
        self,
        nodes: Sequence[onnx.NodeProto],
        outputs: Sequence[tuple[str, int]],
        inputs: Sequence[tuple[str, int]] = (),
    ) -> onnx.GraphProto:
        """A body of If, Loop or Scan; names come with their types."""
        infos = [
            [helper.make_tensor_value_info(n, kind, [] if kind != FLOAT else None) for n, kind in ends]
            for ends in (inputs, outputs)
        ]
        return helper.make_graph(list(nodes), self.name("body"), *infos)

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "grown", self.inputs, self.outputs, self.constants)
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in sorted(self.domains))]
        return helper.make_model(graph, opset_imports=opsets, ir_version=self.ir_version)


@dataclass(frozen=True)
class Case:
    """A network of a family, and samples of its inputs: those to calibrate with, and others.

    refusals: parts of messages with which commands may refuse it. least_db: of a default run; None where rows that the
    data select make it chance.
    """

    proto: onnx.ModelProto
    calibration: list[dict[str, NDArray[Any]]]
    others: list[dict[str, NDArray[Any]]]
    refusals: tuple[str, ...] = ()
    least_db: float | None = 3.0


def as_case(grown: Grower, *refusals: str, least_db: float | None = 3.0) -> Case:
    """Samples of normal numbers for a grown graph; open dimensions become 1."""
    return Case(grown.model(), draw_samples(grown, 16), draw_samples(grown, 4), refusals, least_db)


def draw_samples(grown: Grower, count: int) -> list[dict[str, NDArray[Any]]]:
    return [
        {
            info.name: grown.rng.standard_normal([d.dim_value or 1 for d in info.type.tensor_type.shape.dim]).astype(
                np.float32
            )
            for info in grown.inputs
        }
        for _ in range(count)
    ]


def require_declared_shapes(data: bytes, samples: Sequence[dict[str, NDArray[Any]]]) -> None:
    """Raises AssertionError where a file declares an output in a shape that it does not give. Oracle: ONNX Runtime."""
    proto = onnx.ModelProto.FromString(data)
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    for feeds in samples:
        for declared, array in zip(proto.graph.output, session.run(None, feeds), strict=True):
            sizes = [d.dim_value if d.HasField("dim_value") else None for d in declared.type.tensor_type.shape.dim]
            assert declared.type.tensor_type.HasField("shape")
            assert len(sizes) == array.ndim, f"{declared.name} is declared {sizes}, but is {array.shape}"
            assert all(size in (None, own) for size, own in zip(sizes, array.shape, strict=True))


@dataclass
class Outcome:
    """What went wrong with a case, by command, and what was measured: dB by effort, None for equal."""

    wrong: dict[str, str] = field(default_factory=dict)
    decibels: dict[str, float | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def run_commands(case: Case, *, diagnose: bool = True) -> Outcome:
    """Run the commands that a user would; see the module."""
    outcome, data = Outcome(), case.proto.SerializeToString()
    made: dict[str, bytes] = {}

    def attempt(command: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except QconvError as error:
            if not any(words in f"{error}" for words in case.refusals):
                outcome.wrong[command] = f"refused: {error}"
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            outcome.wrong[command] = (
                f"{type(error).__name__} at {place.filename.rsplit('/', 1)[-1]}:{place.lineno}: {error}"[:200]
            )
        return None

    attempt("inspect", lambda: qconv.inspect(data).as_dict())
    for effort in ("fast", "balanced"):
        report = attempt(
            effort, lambda effort=effort: qconv.quantize(data, None, Recipe(effort=effort, threads=1), case.calibration)
        )
        if report is not None:
            made[effort] = report.model_bytes
            attempt(f"declared {effort}", lambda file=made[effort]: require_declared_shapes(file, case.others))
            outcome.warnings += report.warnings
            scored = attempt(
                f"evaluate {effort}",
                lambda file=made[effort]: qconv.evaluate(file, case.others, against=data, threads=1),
            )
            if scored is not None:
                outcome.decibels[effort] = min(
                    (s.value for s in scored.worst if s.name == "sqnr_db" and s.value is not None), default=None
                )
    if "balanced" in made:
        attempt("compare", lambda: qconv.compare(data, made["balanced"], case.others, threads=1).as_dict())
        attempt("audit", lambda: qconv.audit(made["balanced"]).as_dict())
        attempt("inspect result", lambda: qconv.inspect(made["balanced"]).as_dict())
        if diagnose:
            attempt("diagnose", lambda: qconv.diagnose(data, Recipe(threads=1), case.calibration).as_dict())
    fast, full = (outcome.decibels.get(effort) for effort in ("fast", "balanced"))
    floor, much = case.least_db, 25.0  # dB from which on some more or less is chance
    if floor is not None and full is not None and full < min(much, max(floor, floor if fast is None else fast - 6)):
        outcome.wrong["quality"] = f"{full:.1f} dB, {fast} with --effort fast"
    return outcome
