"""The search for bits: what it writes keeps what was asked for, by measurements of one's own."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image

from qconv.config.choices import CANDIDATE_BITS, Drop, LayerBits
from qconv.config.data_options import DataOptions, PreprocessingOptions
from qconv.config.recipe import RUN_ONLY_OPTIONS, Recipe, make_request
from qconv.config.serialization import read_layer_bits
from qconv.data.dataset import find_files
from qconv.errors import Change, QconvError
from qconv.ir.files import Source
from qconv.pipeline.quantize import quantize
from qconv.quantization.layer_rounding import ROUNDING_EFFORTS
from qconv.report import console
from qconv.reporter import Reporter
from qconv.results.quantize import MixedPrecision, Report
from qconv.results.scores import AGREEMENT, SQNR, TOP1, value_of
from qconv.runtime.session import Session
from qconv.search.candidate import _choose_scoring_batches
from qconv.search.mixed_precision import _choose_best, predict_recipe
from qconv.search.sensitivity import BitAssignment
from tests.config.test_serialization import asked
from tests.support.models import loaded, network
from tests.test_pipeline import quantized

SAME = "pads=[1,1,1,1]"
NET = network(
    f"""
    c = Conv<{SAME}>(x, w) r = Relu(c) d = Conv<{SAME}>(r, v) e = Relu(d) m = MaxPool<kernel_shape=[2,2]>(e)
    h = Conv<{SAME}>(m, u) i = Relu(h) g = GlobalAveragePool(i) f = Flatten(g) y = Gemm(f, k)
    """,
    x=("N", 3, 8, 8),
    w=(8, 3, 3, 3),
    v=(16, 8, 3, 3),
    u=(8, 16, 3, 3),
    k=(8, 4),
)
COUNTS = {"c": 216, "d": 1152, "h": 1152, "y": 32}
TOTAL = sum(COUNTS.values())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 pictures in the folders of the classes that the float network gives them."""
    folder = tmp_path_factory.mktemp("pictures")
    session = Session(NET.SerializeToString(), threads=1)
    for name in "0123":
        (folder / name).mkdir()
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        scores = session.run_all({"x": fed(pixels)})[0]
        Image.fromarray(pixels).save(folder / str(scores.argmax()) / f"{number}.png")
    return folder


def fed(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32) / np.float32(255)


def request(pictures: Path, **options: Any) -> tuple[Recipe, DataOptions]:
    unit = PreprocessingOptions(preset="unit")
    fed = {"calib": (str(pictures),), "preprocessing": unit, "threads": 1, "rounding": "nearest"}
    return make_request({**fed, **options})


def searched(pictures: Path, **options: Any) -> tuple[Report, onnx.ModelProto, MixedPrecision]:
    report, result = quantized(NET, *request(pictures, **options))
    assert report.mixed is not None
    return report, result, report.mixed


def measured(
    result: onnx.ModelProto, pictures: Path | Sequence[Path], net: onnx.ModelProto = NET
) -> tuple[float, float]:
    """SQNR and agreement on all pictures."""
    paths = sorted(pictures.rglob("*.png")) if isinstance(pictures, Path) else pictures
    sessions = [Session(proto.SerializeToString(), threads=1) for proto in (net, result)]
    arrays = np.concatenate([fed(np.asarray(Image.open(path))) for path in paths])
    ref, got = (session.run_all({"x": arrays})[0].astype(np.float64) for session in sessions)
    sqnr = 10 * math.log10(np.sum(ref**2) / np.sum((ref - got) ** 2))
    return sqnr, float((ref.argmax(axis=1) == got.argmax(axis=1)).mean())


def bits_in(report: Report) -> dict[str, int]:
    """Of the weights, by their layer."""
    rows = {row.why.removeprefix("weights of "): row.bits for row in report.tensors if row.kind == "weight"}
    assert all(isinstance(bits, int) for bits in rows.values())
    return rows  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("least", "rounding"), [(12.0, "nearest"), (20.0, "nearest"), (28.0, "nearest"), (22.0, "second-order")]
)
def test_the_sqnr_asked_for_is_kept_and_the_next_smaller_point_does_not_keep_it(
    pictures: Path, least: float, rounding: str
) -> None:
    report, result, mixed = searched(pictures, max_drop=Drop("sqnr", least), edge_bits=2, rounding=rounding)
    sqnr, _ = measured(result, pictures)
    assert sqnr >= least
    assert value_of(mixed.chosen.scores, SQNR) == pytest.approx(sqnr, abs=0.01)
    at = mixed.points.index(mixed.chosen)
    if at:
        below = mixed.points[at - 1]
        assert below.verified
        assert value_of(below.scores, SQNR) is not None
        assert value_of(below.scores, SQNR) < least
    assert mixed.chosen.size == pytest.approx(sum(COUNTS[n] * b for n, b in bits_in(report).items()) / (32 * TOTAL))
    assert report.time["search"] > 0


RESIDUAL = network(
    f"""
    c = Conv<{SAME}>(x, w) r = Relu(c) d = Conv<{SAME}>(r, v) s = Relu(d) a = Add(r, s)
    e = Conv<{SAME}>(a, v2) t = Relu(e) b = Add(a, t)
    g = GlobalAveragePool(b) f = Flatten(g) y = Gemm(f, k)
    """,
    x=("N", 3, 8, 8),
    w=(8, 3, 3, 3),
    v=0.2 * np.random.default_rng(1).standard_normal((8, 8, 3, 3)).astype(np.float32),
    v2=0.2 * np.random.default_rng(2).standard_normal((8, 8, 3, 3)).astype(np.float32),
    k=(8, 4),
)


@pytest.mark.parametrize("asked_for", [{"target_size": 0.13}, {"max_drop": Drop("sqnr", 12)}])
@pytest.mark.parametrize("rounding", ["nearest", "second-order"])
def test_what_is_written_is_what_was_measured(pictures: Path, asked_for: dict[str, Any], rounding: str) -> None:
    """Tensors of 4 bits that are rounded apart for layers, ranges set by the outputs, and channels scaled before."""
    wide = {"activation_bits": 4, "calibrator": "minmax", "tune_ranges": True}  # so that ranges gain from being cut
    report, result = quantized(RESIDUAL, *request(pictures, rounding=rounding, **wide, **asked_for))
    assert report.mixed is not None
    assert {"ranges", "plan"} <= {found.step for found in report.findings}
    sqnr, agreement = measured(result, pictures, RESIDUAL)
    assert value_of(report.mixed.chosen.scores, SQNR) == pytest.approx(sqnr, abs=1e-4)
    assert value_of(report.mixed.chosen.scores, AGREEMENT) == agreement
    changed = {found.where for found in report.findings if found.step == "round" and isinstance(found, Change)}
    assert bool(changed) == (rounding == "second-order")


@pytest.mark.parametrize("batch", [1, 2])
def test_points_are_judged_by_pictures_that_weights_were_not_rounded_on(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Of 16 pictures 4 are for the weights. The float network is right on all, so that what changes class is wrong."""
    few = {name: replace(effort, pictures=4) for name, effort in ROUNDING_EFFORTS.items()}
    monkeypatch.setattr("qconv.search.mixed_precision.ROUNDING_EFFORTS", few)
    options = {"rounding": "second-order", "batch": batch, "max_drop": Drop("top1", 0.1), "edge_bits": 2}
    _, result, mixed = searched(pictures, **options)
    paths = find_files((str(pictures),), pattern=None, samples=16, seed=0).paths
    sqnr, agreement = measured(result, paths[4:])
    assert value_of(mixed.chosen.scores, SQNR) == pytest.approx(sqnr, abs=1e-4)
    assert value_of(mixed.chosen.scores, AGREEMENT) == value_of(mixed.chosen.scores, TOP1) == agreement
    assert value_of(mixed.float_scores, TOP1) == 1
    assert measured(result, paths)[0] != pytest.approx(sqnr, abs=0.01)


@pytest.mark.parametrize(
    ("pictures_and_batch", "rounded_on", "expected_batches"),
    [
        ((16, 1), 0, range(16)),  # nearest codes are made on none
        ((26, 1), 18, [7, 15, *range(18, 26)]),
        ((16, 1), 9, [7, *range(9, 16)]),
        ((16, 1), 11, range(16)),  # 6 would be left
        ((20, 4), 3, [3, 4]),
        ((17, 4), 4, range(5)),  # 4 at most would be left
    ],
)
def test_unseen_pictures(pictures_and_batch: tuple[int, int], rounded_on: int, expected_batches: Sequence[int]) -> None:
    count, batch = pictures_and_batch
    feed = SimpleNamespace(listing=SimpleNamespace(paths=[Path()] * count), batch=batch)
    flattered = rounded_on > 0 and len(expected_batches) == -(-count // batch)
    assert _choose_scoring_batches(feed, rounded_on) == (list(expected_batches), flattered)  # type: ignore[arg-type]


@pytest.mark.parametrize("asked_for", [{"target_size": 0.13}, {"max_drop": Drop("sqnr", 20.0)}])
def test_progress_rises_to_its_end(pictures: Path, asked_for: dict[str, Any]) -> None:
    heard: list[tuple[str, int, int]] = []
    found = request(pictures, rounding="second-order", **asked_for)
    quantize(
        Source("m", None, NET.SerializeToString()), None, *found, Reporter(on_progress=lambda *step: heard.append(step))
    )
    for stage in ("layers", "search"):
        steps = [(done, total) for name, done, total in heard if name == stage]
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert len(steps) > 4
        assert steps[-1][0] == steps[-1][1]


def test_second_order_codes_need_fewer_bits(pictures: Path) -> None:
    """And at one size they keep more."""
    sizes = [
        searched(pictures, max_drop=Drop("sqnr", 22), edge_bits=2, rounding=rounding)[2].chosen.size
        for rounding in ("nearest", "second-order")
    ]
    assert sizes[1] < 0.9 * sizes[0]


def test_what_the_model_finds_much_worse_is_not_measured() -> None:
    """The last two points, and the same bits for all unless they have more than twice the noise."""
    steps = [BitAssignment((bits,), size, noise) for bits, size, noise in ((2, 10, 9.0), (3, 20, 3.0), (4, 30, 2.0))]
    for noise, tried in ((3.9, [1, 2, 3]), (4.1, [2, 3])):
        same, judge = BitAssignment((3,), 15, noise), FakeJudge([0, 5, 7, 6])
        points, chosen = _choose_best(judge, same, list(steps))  # type: ignore[arg-type]
        assert points.index(same) == 1
        assert judge.measured == tried
        assert (chosen, judge.kept) == (2, 2)


@dataclass
class FakeJudge:
    """Says these decibels of the points."""

    decibels: list[float]
    measured: list[int] = field(default_factory=list)
    kept: int = -1
    expected: int = 0

    def measure(self, points: list[BitAssignment], index: int) -> SimpleNamespace:
        self.measured.append(index)
        return SimpleNamespace(verified=SimpleNamespace(sqnr_db=self.decibels[index]))

    def keep(self, index: int) -> None:
        self.kept = index


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"target_size": 0.16, "edge_bits": 2}, 5),  # 5.12 bits
        ({"target_size": 0.16}, 4),  # of 2552 weights 248 have 8, which leaves 4.81 for the others
        ({"target_size": 0.05}, 2),  # too little
        ({"target_size": 0.5, "candidate_bits": (4, 6, 32)}, 6),
        ({"target_size": 0.16, "layer_bits": (("d", LayerBits(2)),)}, 6),  # 7.62 for h alone
        ({"max_drop": Drop("sqnr", 20.0)}, 5),  # in the middle
        ({"max_drop": Drop("sqnr", 20.0), "candidate_bits": (4, 32)}, 4),
        ({"weight_bits": 7}, 7),
    ],
)
def test_what_comes_before_a_search_reckons_with_the_bits_that_will_be_found(
    options: dict[str, Any], bits: int
) -> None:
    assert predict_recipe(loaded(NET), Recipe(**options), {}).weight_bits == bits


def test_the_curve_rises_and_the_model_is_near_what_is_measured(pictures: Path) -> None:
    """Of the weights alone: activations of 16 bits add nothing. Noises add up, in so small a network to 2.5 dB."""
    _, _, mixed = searched(pictures, max_drop=Drop("sqnr", 22), edge_bits=2, activation_bits=16)
    sizes = [point.size for point in mixed.points]
    modelled = [point.modelled_sqnr_db for point in mixed.points]
    assert sizes == sorted(sizes)
    assert all(a <= b for a, b in itertools.pairwise(modelled))  # type: ignore[operator]
    for point in mixed.points:
        if point.verified and point.modelled_sqnr_db is not None and 10 < point.modelled_sqnr_db < 35:
            assert value_of(point.scores, SQNR) == pytest.approx(point.modelled_sqnr_db, abs=2.5)


def test_agreement_and_top1(pictures: Path) -> None:
    """The folders are the float network's own classes: what is lost of one is lost of the other."""
    found = []
    for measure in ("agreement", "top1"):
        _, result, mixed = searched(pictures, max_drop=Drop(measure, 0.13), edge_bits=2, activation_bits=16)
        _, agreement = measured(result, pictures)
        assert agreement >= 0.87
        assert value_of(mixed.chosen.scores, AGREEMENT) == agreement
        assert value_of(mixed.float_scores, TOP1) == (1.0 if measure == "top1" else None)
        assert value_of(mixed.chosen.scores, TOP1) == (agreement if measure == "top1" else None)
        found.append(mixed.chosen.size)
    assert found[0] == found[1]


@pytest.mark.parametrize("size", [0.08, 0.125, 0.2])
def test_a_size_is_kept_and_used(pictures: Path, size: float) -> None:
    report, result, mixed = searched(pictures, target_size=size, edge_bits=2)
    taken = sum(COUNTS[name] * bits for name, bits in bits_in(report).items()) / (32 * TOTAL)
    assert taken == pytest.approx(mixed.chosen.size)
    assert size * 0.85 <= taken <= size
    assert mixed.chosen.verified
    # better than the same bits for all that fit
    (fewest,) = {bits for bits in CANDIDATE_BITS if bits / 32 <= size < (bits + 1) / 32} or {5}
    _, uniform = quantized(NET, *request(pictures, weight_bits=fewest, edge_bits=2))
    assert measured(result, pictures)[0] >= measured(uniform, pictures)[0] - 0.1


def test_both_at_once(pictures: Path) -> None:
    """The drop decides, the size bounds."""
    _, _, mixed = searched(pictures, max_drop=Drop("sqnr", 12), target_size=0.2, edge_bits=2)
    assert mixed.demand == "--max-drop sqnr:12 --target-size 0.2"
    assert all(point.size <= 0.2 for point in mixed.points)
    with pytest.raises(QconvError, match="No assignment keeps --max-drop sqnr:30") as caught:
        searched(pictures, max_drop=Drop("sqnr", 30), target_size=0.09, edge_bits=2)
    assert "dB" in caught.value.message


def test_edges_keep_their_bits_and_named_layers_theirs(pictures: Path) -> None:
    candidate_bits = (("d", LayerBits(5)), ("h", LayerBits(None, 6)))
    report, _, mixed = searched(pictures, target_size=0.15, layer_bits=candidate_bits)
    bits = bits_in(report)
    assert (bits["c"], bits["y"], bits["d"]) == (8, 8, 5)
    assert mixed.layers == 3
    assert {row.bits for row in report.tensors if row.name == "m"} == {6}  # the wish for what h reads stays
    assert mixed.chosen.size == pytest.approx(sum(COUNTS[n] * b for n, b in bits.items()) / (32 * TOTAL))


def test_float_can_be_chosen(pictures: Path) -> None:
    report, result, mixed = searched(
        pictures, max_drop=Drop("sqnr", 30), candidate_bits=(4, 32), edge_bits=2, activation_bits=8
    )
    floats = {name for name in COUNTS if name not in bits_in(report)}
    assert floats
    assert mixed.chosen.bits["32"] == len(floats)
    stored = {tensor.name for tensor in result.graph.initializer if len(tensor.dims) > 1 and tensor.data_type == 1}
    assert len(stored) == len(floats)
    assert measured(result, pictures)[0] >= 30


@pytest.mark.parametrize("rounding", ["nearest", "second-order"])
def test_what_was_found_can_be_saved_and_passed_back(tmp_path: Path, pictures: Path, rounding: str) -> None:
    """The same weights come of it; only the recipe in the file differs, which names the search."""
    path = tmp_path / "bits.toml"
    options = {"rounding": rounding, "equalize": False}  # which channels are scaled depends on the bits
    report, result, mixed = searched(pictures, target_size=0.13, save_layer_bits=str(path), **options)
    found = read_layer_bits(path)
    assert dict(found) == {name: LayerBits(bits) for name, bits in bits_in(report).items()}
    assert report.recipe["layer_bits"] == [
        [name, {"weights": bits.weights, "activations": None, "in_float": False}] for name, bits in found
    ]
    again, same = quantized(NET, *request(pictures, layer_bits=found, **options))
    assert again.mixed is None
    constants = [
        {t.name: numpy_helper.to_array(t).tobytes() for t in proto.graph.initializer} for proto in (result, same)
    ]
    assert constants[0] == constants[1]
    assert "save_layer_bits" in RUN_ONLY_OPTIONS
    assert mixed.as_dict()["points"][0].keys() == {
        "size", "modelled_sqnr_db", "verified", "sqnr_db", "agreement", "top1", "chosen", "bits",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "fact", "fix"),
    [
        ({"target_size": 0.05}, "is below what these bits can give", "--candidate-bits"),
        ({"max_drop": Drop("sqnr", 90)}, "No assignment keeps --max-drop sqnr:90", "larger drop"),
        ({"max_drop": Drop("sqnr", 20.0), "candidate_bits": (2,), "edge_bits": 2}, "with the most bits", "float"),
        ({"max_drop": Drop("sqnr", 9), "layer_bits": (("*", LayerBits(4)),)}, "no layer to choose bits for", "leave"),
    ],
)
def test_what_cannot_be_found(pictures: Path, options: dict[str, Any], fact: str, fix: str) -> None:
    with pytest.raises(QconvError) as caught:
        searched(pictures, **options)
    assert fact in caught.value.message
    assert fix in caught.value.hint


def test_measures_that_do_not_exist(tmp_path: Path, pictures: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in pictures.rglob("*.png"):
        (flat / path.name).write_bytes(path.read_bytes())
    with pytest.raises(QconvError, match="top1 is possible only where the calibration pictures lie"):
        searched(flat, max_drop=Drop("top1", 0.1))
    scalar = network(
        "c = Conv(x, w) d = Conv(c, v) y = GlobalAveragePool(d)", ("N", 3, 8, 8), w=(4, 3, 1, 1), v=(1, 4, 1, 1)
    )
    for measure in ("top1", "agreement"):
        with pytest.raises(QconvError, match="one score a class"):
            quantized(scalar, *request(pictures, max_drop=Drop(measure, 0.1)))


def test_the_result_does_not_depend_on_the_run(pictures: Path) -> None:
    source = Source("m", None, NET.SerializeToString())
    first, second = (quantize(source, None, *request(pictures, target_size=0.13))[1] for _ in range(2))
    assert first == second


# -- what is asked for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"max_drop": Drop("psnr", 1.0)}, "--max-drop psnr:1"),
        ({"max_drop": Drop("agreement", 1.5)}, "--max-drop agreement:1.5"),
        ({"max_drop": Drop("top1", -0.5)}, "--max-drop top1:-0.5"),
        ({"max_drop": Drop("sqnr", math.nan)}, "--max-drop sqnr:nan"),
        ({"max_drop": "agreement:1"}, "--max-drop 'agreement:1'"),
        ({"target_size": 0.0}, "--target-size 0"),
        ({"target_size": 1.5}, "--target-size 1.5"),
        ({"target_size": 0.2, "candidate_bits": ()}, "--candidate-bits"),
        ({"target_size": 0.2, "candidate_bits": (4, 9)}, "--candidate-bits 4,9"),
        ({"target_size": 0.2, "candidate_bits": (16,), "target": "openvino"}, "--candidate-bits 16"),
        ({"candidate_bits": (4, 8)}, "--candidate-bits without a search"),
        ({"target_size": 0.2, "calib": (), "stats": "s"}, "without pictures"),
        ({"target_size": 0.2, "tune_latency": True}, "--tune-latency with a search"),
        ({"target_size": 0.2, "weight_bits": 4}, "--weight-bits 4 with a search"),
        ({"target_size": 0.2, "rounding": "nearest", "bias_correction": "sequential"}, "sequential with a search"),
        ({"target_size": 0.2, "save_layer_bits": "-"}, "--save-layer-bits -"),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, Any], fact: str) -> None:
    with pytest.raises(QconvError) as caught:
        make_request({"calib": ("x",), **options})
    assert caught.value.message.startswith(fact) or fact in caught.value.message


def test_what_so_few_pictures_cannot_tell_is_warned_of(pictures: Path) -> None:
    """16 pictures: one is 0.0625 of them."""
    heard: list[str] = []
    for share in (0.05, 0.0, 0.07):
        found = request(pictures, max_drop=Drop("agreement", share), candidate_bits=(8, 32), edge_bits=8)
        report, _ = quantize(Source("m", None, NET.SerializeToString()), None, *found)
        assert report.mixed is not None
        assert report.mixed.pictures == report.mixed.as_dict()["pictures"] == 16
        heard.append(" ".join(report.warnings))
    assert ["less than one of the 16 pictures" in text for text in heard] == [True, False, False]
    found = request(pictures, target_size=0.2, rounding="second-order", samples=6)
    report, _ = quantize(Source("m", None, NET.SerializeToString()), None, *found)
    assert any("which flatters" in text for text in report.warnings)


def test_options() -> None:
    found = asked("--max-drop", "sqnr:25dB", "--candidate-bits", "8,4,float", "--target-size", "0.3")
    assert found.max_drop == Drop("sqnr", 25.0)
    assert found.candidate_bits == (4, 8, 32)
    assert found.target_size == 0.3
    assert asked("--max-drop", "agreement:1/100").max_drop == Drop("agreement", 0.01)
    assert asked("--max-drop", "top1:0.005").candidate_bits == CANDIDATE_BITS
    for wrong in (("--max-drop", "0.01"), ("--max-drop", "sqnr:"), ("--candidate-bits", "4;8"), ("--max-drop", "x:1")):
        with pytest.raises(click.UsageError):
            asked(*wrong, "--target-size", "0.3")


def test_the_summary_shows_what_was_tried(pictures: Path) -> None:
    report, _, mixed = searched(pictures, max_drop=Drop("sqnr", 20), edge_bits=2)
    stream = io.StringIO()
    console.show_report(report, stream, verbose=False)
    lines = stream.getvalue().splitlines()
    assert any(line.startswith("bits ") and "by --max-drop sqnr:20" in line for line in lines)
    assert sum("weights alone by the model" in line for line in lines) == sum(point.verified for point in mixed.points)
    assert report.as_dict()["mixed"] == mixed.as_dict()


def test_packing_goes_with_a_search(pictures: Path) -> None:
    wide = network(
        f"c = Conv<{SAME}>(x, w) r = Relu(c) d = Conv<{SAME}>(r, v) e = Relu(d) y = Conv<{SAME}>(e, u)",
        x=("N", 3, 8, 8), w=(96, 3, 5, 5), v=(32, 96, 3, 3), u=(48, 32, 3, 3),
    )  # fmt: skip
    found, data = request(pictures, target_size=0.13, pack=True, edge_bits=2)
    report, result = quantized(wide, found, data)
    stored = {tensor.name for tensor in result.graph.initializer}
    for layer, bits in bits_in(report).items():
        assert (f"{'wvu'['cdy'.index(layer)]}_codes" in stored) is (bits == 8)
    assert min(bits_in(report).values()) < 8
    assert sum(finding.step == "pack" for finding in report.findings) > 0
    with pytest.raises(QconvError, match="--pack"):
        replace(found, candidate_bits=(8, 16))


@pytest.mark.parametrize(("size", "vain"), [(0.3, True), (0.16, False)])
def test_packing_that_changes_nothing_is_told(pictures: Path, size: float, vain: bool) -> None:
    report, _ = quantized(RESIDUAL, *request(pictures, target_size=size, pack=True, candidate_bits=(4, 8)))
    assert any("--pack changes nothing" in warning for warning in report.warnings) is vain
