"""A file as it is, by whatever tool: what ONNX Runtime makes of it, and what each part costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qconv import save
from qconv.audit import Known, audit, profiled
from qconv.cpu import Cpu, this_cpu
from qconv.fileformat import placed_in
from qconv.load import as_it_is
from qconv.madeup import made_up
from qconv.report import Audit
from qconv.runtime import VERSION, Session
from qconv.source import Source, is_quantized, read

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
    """What was found of one file."""

    name: str
    format: str
    meaning: str
    by_qconv: bool
    audit: Audit
    cpu: Cpu
    threads: int
    version: str = VERSION

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        layers = [{"node": n.node, "op": n.op, "runs": n.runs, "us": n.us} for n in self.audit.layers]
        return {
            "schema": 1,
            "model": self.name,
            "format": self.format,
            "by_qconv": self.by_qconv,
            "onnxruntime": self.version,
            "threads": self.threads,
            "cpu": self.cpu.as_dict(),
            **self.audit.as_dict(),
            "layers": layers,
        }


def examine(source: Source, *, threads: int, batch: int | None, size: Sequence[int] | None) -> Examined:
    """Load, optimize, run and take apart. Raises QconvError for what does not load or run."""
    proto = read(source)
    kinds = {node.op_type for node in proto.graph.node}
    found = ((name, meaning) for name, begins, meaning in FORMATS if any(kind.startswith(begins) for kind in kinds))
    plain = ("weights only", FORMATS[-1][2]) if is_quantized(proto) else ("float", "nothing is quantized")
    name, meaning = next(found, plain)
    model = as_it_is(proto, source)
    with save.runnable(model, ()) as runnable, save.scratch(2 * save.total_bytes(model)) as folder:
        optimized = folder / "optimized.onnx"
        session = Session(
            runnable, name=source.name, threads=threads, save_optimized=optimized, profile=folder / "profile"
        )
        times = profiled(session, made_up(session, batch, size))
        audited = audit(optimized, model, Known(placed=placed_in(model)), times)
    by_qconv = "qconv.version" in model.inner.metadata_props
    return Examined(source.name, name, meaning, by_qconv, audited, this_cpu(), threads)
