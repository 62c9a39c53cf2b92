"""Networks that give whole numbers, drawn at random: their outputs agree to a share, and have no dB anywhere."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from qconv import Recipe
from qconv.analysis.compare import compare_on_images
from qconv.analysis.diagnose import DiagnosisRequest, diagnose
from qconv.analysis.evaluate import evaluate
from qconv.analysis.evaluation import EvaluationOptions
from qconv.config.data_options import DataOptions
from qconv.ir.files import Source
from qconv.pipeline.quantize import quantize
from qconv.report.text import format_diagnosis, format_evaluation
from qconv.report.text_compare import format_comparison
from qconv.reporter import Reporter
from qconv.runtime.session import Session
from tests.support.models import network

DRAWS = int(os.environ.get("QCONV_DRAWS", "10"))

HEADS = {
    "argmax": "y = ArgMax<axis=1, keepdims=0>(s)",
    "bytes": "a = ArgMax<axis=1>(s) y = Cast<to=2>(a)",
    "topk": "v, y = TopK<axis=1>(s, two)",
    "bool": "y = Greater(s, zero)",
    "rounded": "t = Mul(s, ten) u = Round(t) y = Cast<to=6>(u)",
    "both": "y = ArgMax<axis=1, keepdims=0>(s)",
}
MAPS = ("argmax", "bytes", "both")
"""Heads that say a class of every place."""
CONSTANTS = {"two": np.array([2]), "zero": np.float32(0), "ten": np.float32(10)}


def draw(seed: int) -> tuple[onnx.ModelProto, str]:
    rng = np.random.default_rng(seed)
    head = list(HEADS)[seed % len(HEADS)]
    body = "c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) s = Conv(r, v1) " + HEADS[head]
    weights = {
        "w": (rng.normal(size=(6, 3, 3, 3)) / 4).astype(np.float32),
        "v1": (rng.normal(size=(5, 6, 1, 1)) / 2).astype(np.float32),
    }
    used = {name: np.asarray(value) for name, value in CONSTANTS.items() if f"{name})" in body}
    return network(body, (1, 3, 6, 6), ("y", "s") if head == "both" else ("y",), **weights, **used), head


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    rng = np.random.default_rng(0)
    for index in range(16):
        np.save(folder / f"{index:02}.npy", rng.normal(size=(3, 6, 6)).astype(np.float32))
    return folder


@pytest.mark.parametrize("seed", range(DRAWS))
def test_whole_numbers_agree_to_a_share(seed: int, samples: Path, tmp_path: Path) -> None:
    """NumPy's share of equal numbers is the oracle; the float output beside them keeps its dB."""
    proto, head = draw(seed)
    source, out = Source(str(tmp_path / "f.onnx"), tmp_path / "f.onnx"), tmp_path / "q.onnx"
    (tmp_path / "f.onnx").write_bytes(proto.SerializeToString())
    data = DataOptions((str(samples),), samples=None)
    quantize(source, out, Recipe(threads=1, effort="fast", equalize=False), data)
    sessions = [Session(str(path), threads=1) for path in (tmp_path / "f.onnx", out)]
    same = []
    for path in sorted(samples.iterdir()):
        want, got = (session.run(["y"], {"x": np.load(path)[None]})[0] for session in sessions)
        same.append((want == got).mean())
    found = evaluate(Source(str(out), out), EvaluationOptions(data, source, threads=1))
    compared = compare_on_images(source, Source(str(out), out), data, Reporter(), 1).compared
    for outputs in (found.outputs, compared.outputs):
        assert outputs[0].agreement == pytest.approx(np.mean(same))
        measured = ["agreement", "float_miou"] if head in MAPS else ["agreement"]
        assert [score.name for score in outputs[0].scores] == measured
        assert (len(outputs) > 1) == (head == "both")
        assert all(output.sqnr_db is not None for output in outputs[1:])
    texts = format_evaluation(found, verbose=False), format_comparison(compared, verbose=False)
    share = f"{100 * np.mean(same):.2f}"
    if head == "both":
        assert "SQNR of the outputs" in texts[1]
    else:
        assert "SQNR" not in texts[0]
        assert share in texts[0]
        assert f"Agreement of the outputs: {share}%." in texts[1].replace("\n", " ")
    assert compared.predicted_db is not None
    assert any(row.output_share for row in compared.layers)


def test_diagnose_speaks_of_points(samples: Path, tmp_path: Path) -> None:
    """The gain of a remedy on whole numbers is no number of dB."""
    path = tmp_path / "f.onnx"
    path.write_bytes(draw(0)[0].SerializeToString())
    asked = {"calib": (str(samples),), "samples": 12, "weight_bits": 2, "edge_bits": 2, "threads": 1, "effort": "fast"}
    found = diagnose(DiagnosisRequest(Source(str(path), path), asked)).diagnosis
    text = format_diagnosis(found, verbose=False).replace("\n", " ")
    assert "agreement" in found.conclusion  # what is worth its cost is weighed by times, which are not the same twice
    assert " dB" not in found.conclusion
    assert "SQNR" not in text
