"""A file as it is, by whatever tool: what ONNX Runtime makes of it, and what each part costs."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qconv import storage
from qconv.audit.audit import Known, audit, profiled
from qconv.config.targets import TARGETS
from qconv.ir import files, subgraph
from qconv.ir.files import Source, is_quantized, read_proto
from qconv.ir.load import load_unchanged
from qconv.ir.metadata import read_placed_nodes, read_recipe
from qconv.ir.model import Model
from qconv.planning.planner import KEPT_FLOAT_BY_OPTION
from qconv.results.quantize import Audit
from qconv.runtime.benchmark import Cpu, detect_cpu
from qconv.runtime.session import RUNTIME_VERSION, Session, make_random_inputs

FORMATS = (
    ("QOperator", ("QLinear", "QGemm"), "integer operators in the file itself; qconv writes Q/DQ, which every runtime "
     "can take apart again, and ONNX Runtime fuses into these same operators"),
    ("dynamic", ("DynamicQuantizeLinear", "ConvInteger", "MatMulInteger"), "ranges are found anew at every run"),
    ("Q/DQ", ("QuantizeLinear",), "operators between quantizers and dequantizers"),
    ("weights only", ("DequantizeLinear",), "codes for weights, arithmetic in float"),
)  # fmt: skip
"""Name, what its operators begin with, and what it means; the first that is found counts."""


@dataclass(frozen=True, slots=True)
class Examined:
    """What was found of one file. recipe: of a file by qconv, empty for others.

    widened: whether qconv has widened weight scales until no pair of products overflowed on its pictures.
    """

    name: str
    format: str
    meaning: str
    widened: bool
    recipe: dict[str, Any]
    audit: Audit
    cpu: Cpu
    threads: int
    version: str = RUNTIME_VERSION

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        layers = [{"node": n.node, "op": n.op, "runs": n.runs, "us": n.us} for n in self.audit.layers]
        return {
            "schema": 1,
            "model": self.name,
            "format": self.format,
            "by_qconv": bool(self.recipe),
            "onnxruntime": self.version,
            "threads": self.threads,
            "cpu": self.cpu.as_dict(),
            **self.audit.as_dict(),
            "layers": layers,
        }


def format_of(proto: Any) -> tuple[str, str]:
    """What a file is, by FORMATS, and what that means."""
    kinds = {node.op_type for node in proto.graph.node}
    found = ((name, meaning) for name, begins, meaning in FORMATS if any(kind.startswith(begins) for kind in kinds))
    plain = ("weights only", FORMATS[-1][2]) if is_quantized(proto) else ("float", "nothing is quantized")
    return next(found, plain)


def examine(source: Source, *, threads: int, batch: int | None, size: Sequence[int] | None) -> Examined:
    """Load, optimize, run and take apart. Raises QconvError for what does not load or run."""
    proto = read_proto(source)
    name, meaning = format_of(proto)
    model = load_unchanged(proto, source)
    with (
        subgraph.runnable_with_outputs(model, ()) as runnable,
        storage.scratch_folder(2 * files.total_weight_bytes(model)) as folder,
    ):
        optimized = folder / "optimized.onnx"
        session = Session(
            runnable, name=source.name, threads=threads, save_optimized=optimized, profile=folder / "profile"
        )
        times = profiled(session, make_random_inputs(session, batch, size))
        recipe = read_recipe(model)
        audited = audit(optimized, model, _known(model, recipe), times)
    target = TARGETS.get(str(recipe.get("target")))
    widened = target is not None and target.pairs and recipe.get("saturation_safe") is not False
    return Examined(source.name, name, meaning, widened, recipe, audited, detect_cpu(), threads)


def _known(model: Model, recipe: Mapping[str, Any]) -> Known:
    """What qconv had decided when it wrote the file; nothing for others."""
    placed = read_placed_nodes(model)
    how = "as measured by --tune-latency" if recipe.get("tune_latency") else "by qconv's cost table"
    kept = dict.fromkeys(placed, f"faster in float, {how}")
    for node in model.nodes():
        if any(fnmatch.fnmatchcase(node.name or "", glob) for glob in recipe.get("keep_float", ())):
            kept[node.name or ""] = KEPT_FLOAT_BY_OPTION
        elif node.op_type in recipe.get("keep_float_op", ()):
            kept[node.name or ""] = f"{KEPT_FLOAT_BY_OPTION}-op"
    target = TARGETS.get(str(recipe.get("target")))
    whole = ""
    if target is not None and not target.on_ort:
        whole = f"written for {target.name}: ONNX Runtime's CPU provider wants quantizers elsewhere"
    elif recipe.get("activation_bits") == 32:
        whole = "only weights are quantized"
    return Known(kept, placed, whole)
