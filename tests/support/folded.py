"""The float network as it is before anything is quantized: for tests and benchmarks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from qconv.config.recipe import Recipe
from qconv.errors import Change
from qconv.ir import files, load
from qconv.ir.files import Source, declared_opset, read_proto
from qconv.ir.metadata import set_ir_version
from qconv.ir.model import Model
from qconv.ir.requirements import needed_opset
from qconv.passes import fold
from tests.support.models import loaded, random_feeds, run


def write_folded_float(path: str | Path, out: str | Path) -> None:
    """Write the upgraded and folded float model."""
    source = Source(str(path), Path(path))
    proto = read_proto(source)
    model, _ = load.load(proto, source, opset=needed_opset(Recipe(), declared_opset(proto)))
    fold.run_float_passes(model)
    set_ir_version(model)  # and no more: whoever quantizes the file, it is not by this recipe
    with files.stage_model(model, Path(out)) as staged:
        staged.commit(Path(out))


def folded(proto: onnx.ModelProto, tolerance: float = 2e-5) -> Model:
    """Fold, check that numbers, names and shapes stay, and that a second fold finds nothing to do.

    tolerance: of the numbers, as a share of the largest.
    """
    model = loaded(proto)
    fold.run_float_passes(model)
    feeds = random_feeds(proto)
    before, after = run(proto, feeds), run(model, feeds)
    assert list(before) == list(after)
    for name, numbers in before.items():
        assert after[name].shape == numbers.shape
        np.testing.assert_allclose(after[name], numbers, rtol=0, atol=tolerance * np.abs(numbers).max())
    assert not [finding for finding in fold.run_float_passes(model) if isinstance(finding, Change)]
    onnx.checker.check_model(model.proto(), full_check=True)
    return model
