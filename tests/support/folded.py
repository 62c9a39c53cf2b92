"""The float network as it is before anything is quantized, as a file: for tests and benchmarks."""

from __future__ import annotations

from pathlib import Path

from qconv.config.recipe import Recipe
from qconv.ir import files, load
from qconv.ir.files import Source, declared_opset, read_proto
from qconv.ir.metadata import needed_opset, set_ir_version
from qconv.passes import fold


def write_folded_float(path: str | Path, out: str | Path) -> None:
    """Write the upgraded and folded float model."""
    source = Source(str(path), Path(path))
    proto = read_proto(source)
    model, _ = load.load(proto, source, opset=needed_opset(Recipe(), declared_opset(proto)))
    fold.run_float_passes(model)
    set_ir_version(model)  # and no more: whoever quantizes the file, it is not by this recipe
    with files.stage_model(model, Path(out)) as staged:
        staged.commit(Path(out))
