"""A network taken from float to the file that runs, in memory, and what to ask of the result.

Oracles: ONNX Runtime on the float network, and on the quantized one with its optimizations off, which is what the
standard says the file means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from numpy.typing import NDArray

from qconv.auditing.audit import PlannedReasons, audit
from qconv.calibration.observer import export_observed_model, observe
from qconv.calibration.range_estimators import sketch_contents_for
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.errors import Finding
from qconv.ir import load, metadata, requirements
from qconv.ir.files import Source, declared_opset
from qconv.ir.packed_codes import pack_codes, packing_runtime
from qconv.passes import fold
from qconv.passes.compress_constants import compress_constants
from qconv.passes.requantize import convert_between_widths
from qconv.pipeline.prepare import plan_folded, runs_on_ort
from qconv.planning.plan import Plan
from qconv.planning.planner import make_plan, replan
from qconv.quantization.emit import emit
from qconv.quantization.parameters import Params, choose_params
from qconv.quantization.write_fast_forms import write_fast_forms
from qconv.results.quantize import Audit
from qconv.runtime.session import Session
from tests.support.libraries import skip_without
from tests.support.models import network

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
    """A network taken through the story in memory, without the file and its checks.

    placed: layers that are faster in float are left there, as the cost table says.
    """

    def __init__(
        self, proto: onnx.ModelProto, recipe: Recipe, samples: Sequence[Feeds], *, placed: bool = False
    ) -> None:
        self.float, self.recipe, self.samples = proto, recipe, samples
        copy = onnx.ModelProto.FromString(proto.SerializeToString())
        opset = requirements.needed_opset(recipe, declared_opset(copy))
        model, _ = load.load(copy, Source("the test's model", None, b""), opset=opset)
        fold.run_float_passes(model, for_ort=runs_on_ort(recipe))
        oldest = requirements.needed_runtime(model, recipe).split()[-1]
        skip_without("onnxruntime", oldest, "what is made here says so")
        whole = make_plan(model, recipe, TARGETS[recipe.target])
        self.plan: Plan = plan_folded(model, recipe, None) if placed else whole
        if convert_between_widths(model, self.plan):
            self.plan = replan(self.plan, model)
        observers = self.plan.observers(sketch_contents_for(recipe))
        sketches = {}
        if observers:
            with export_observed_model(model, observers) as runnable:
                sketches = observe(Session(runnable, threads=1), observers, samples)
        self.params: Params
        self.findings: list[Finding]
        self.params, self.findings = choose_params(self.plan, sketches, recipe)
        self.findings += emit(model, self.plan, self.params)
        self.findings += write_fast_forms(model, self.plan)
        self.findings += compress_constants(model)
        metadata.write_metadata(model, "0", recipe.as_dict(DataOptions()), None)
        self.model = model
        written = model.copy()
        if recipe.pack:
            pack_codes(written, recipe.oldest_runtime, recipe.packed_forms)
            skip_without("onnxruntime", packing_runtime(written) or "1.19", "this form of packed codes does")
        self.proto: onnx.ModelProto = written.proto()
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
    def optimized(self) -> Wiring:
        """What the runtime makes of the file."""
        return Wiring(self._optimized[1])

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


@cache
def net(**options: object) -> Quantized:
    return quantized(NET, pictures((2, 3, 8, 8)), **options)


def interface(value: onnx.ValueInfoProto) -> tuple[str, int, list[int | str]]:
    kind = value.type.tensor_type
    return value.name, kind.elem_type, [d.dim_param or d.dim_value for d in kind.shape.dim]
