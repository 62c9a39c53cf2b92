"""Planted faults: each is found and named, and the command that is recommended mends it, measured by other means."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import Result
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from PIL import Image

from qconv.analysis import trials
from qconv.analysis.diagnose import DiagnosisRequest, diagnose
from qconv.analysis.remedies import join_changes, merge_changes
from qconv.cli.main import cli
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.config.serialization import request_fields
from qconv.data.dataset import find_files
from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.pipeline import collect, quantize
from qconv.reporter import Reporter
from qconv.results.scores import AGREEMENT
from qconv.results.trials import Trial, pareto_mask
from tests.data.test_autodetect import colourful, fed, folder_of, trained_with
from tests.support import labelled
from tests.support.libraries import runner
from tests.support.models import network
from tests.support.scores import scores

ROOT = Path(__file__).parents[2]
CIFAR = ROOT / "tests" / "models" / "cifar_mobilenet.onnx"
COUNT = 40
PICTURE = ("N", 3, 8, 8)


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One turn is enough to have times; no test says anything on them."""
    monkeypatch.setattr(trials, "TIMING_ROUNDS", 1)


def drawn(seed: int, *shape: int) -> NDArray[np.float32]:
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return (numbers / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def plain() -> onnx.ModelProto:
    """Conv -> Relu -> Conv."""
    return network(
        "c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) k = Conv(r, u) y = Flatten(k)",
        x=PICTURE,
        w=drawn(1, 16, 3, 3, 3),
        b=drawn(2, 16, 1)[:, 0] / 10,
        u=drawn(3, 8, 16, 1, 1),
    )


def imbalanced() -> onnx.ModelProto:
    """The same, a channel scaled by 1000 and undone by the next layer."""
    scale = np.ones(16, np.float32)
    scale[3] = 1000
    return network(
        "c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) k = Conv(r, u) y = Flatten(k)",
        x=PICTURE,
        w=drawn(1, 16, 3, 3, 3) * scale.reshape(-1, 1, 1, 1),
        b=drawn(2, 16, 1)[:, 0] / 10 * scale,
        u=drawn(3, 8, 16, 1, 1) / scale.reshape(1, -1, 1, 1),
    )


def overflowing() -> onnx.ModelProto:
    """A channel whose bias is six orders of magnitude larger than its weights."""
    scale = np.ones(8, np.float32)
    scale[3] = 1e-6
    bias = drawn(2, 8, 1)[:, 0] / 10
    bias[3] = 3
    return network(
        "c = Conv<pads=[1,1,1,1]>(x, w, b) k = Conv(c, u) y = Flatten(k)",
        x=PICTURE,
        w=drawn(1, 8, 3, 3, 3) * scale.reshape(-1, 1, 1, 1),
        b=bias,
        u=drawn(3, 4, 8, 1, 2),
    )


def gated() -> onnx.ModelProto:
    """Convs with SiLU between them, whose channels differ a hundredfold: scales cannot pass the gate."""
    scale = np.exp(np.linspace(0, np.log(100), 16)).astype(np.float32)
    return network(
        "c = Conv<pads=[1,1,1,1]>(x, w) s = Sigmoid(c) m = Mul(c, s) d = Conv<pads=[1,1,1,1]>(m, v, b) r = Relu(d)"
        " k = Conv(r, u) y = Flatten(k)",
        x=PICTURE,
        w=drawn(1, 16, 3, 3, 3) * scale.reshape(-1, 1, 1, 1),
        v=4 * drawn(2, 16, 16, 3, 3) / scale.reshape(1, -1, 1, 1),
        b=drawn(7, 16, 1)[:, 0],
        u=drawn(5, 8, 16, 1, 1),
    )


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    folder = tmp_path / "samples"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for index in range(COUNT):
        np.save(folder / f"{index:02}.npy", rng.standard_normal((1, 3, 8, 8)).astype(np.float32))
    return folder


def saved(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return path


def invoked(*words: Any) -> Result:
    result = runner().invoke(cli, [str(word) for word in words])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result


def diagnosed(*words: Any) -> dict[str, Any]:
    found = json.loads(invoked("diagnose", *words, "--json").stdout)
    assert isinstance(found, dict)
    return found


def causes(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The first of each kind."""
    return {cause["kind"]: cause for cause in reversed(found["causes"])}


def unseen(count: int = 16) -> NDArray[np.float32]:
    return np.random.default_rng(99).standard_normal((count, 3, 8, 8)).astype(np.float32)


def decibel(model: Path, quantized: Path, x: NDArray[np.float32], given: NDArray[np.float32] | None = None) -> float:
    """SQNR of the outputs. given: what the quantized model gets instead of `x`."""
    runs = [
        InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": feed})[0].astype(np.float64)
        for path, feed in ((model, x), (quantized, x if given is None else given))
    ]
    return float(10 * np.log10(np.sum(runs[0] ** 2) / np.sum((runs[0] - runs[1]) ** 2)))


def by_command(found: dict[str, Any], out: Path) -> Path:
    """The file that the recommended command writes."""
    program, *words = shlex.split(found["recommended"])
    assert program == "qconv"
    invoked(*words, "-o", out, "-q")
    return out


def as_asked(model: Path, out: Path, *words: Any) -> Path:
    invoked("quantize", model, *words, "-o", out, "-q")
    return out


# -- planted faults ----------------------------------------------------------------------------------------------------


def test_a_channel_scaled_by_1000_is_named_and_scaled_back(tmp_path: Path, samples: Path) -> None:
    model = saved(imbalanced(), tmp_path)
    asked = ("--calib", samples, "--no-equalize", "--float-budget", "0")
    found = diagnosed(model, *asked)
    cause = causes(found)["channel-imbalance"]
    assert cause["where"] == ["r"]
    assert cause["handled"] is None
    assert "--no-equalize" not in found["recommended"]
    before = decibel(model, as_asked(model, tmp_path / "asked.onnx", *asked), unseen())
    after = decibel(model, by_command(found, tmp_path / "mended.onnx"), unseen())
    assert after > max(30, before + 10)


def test_what_equalization_mends_already_is_shown_by_leaving_it_out(tmp_path: Path, samples: Path) -> None:
    found = diagnosed(saved(imbalanced(), tmp_path), "--calib", samples)
    cause = causes(found)["channel-imbalance"]
    assert cause["handled"] == "equalization scales its channels"
    without = next(row for row in found["ladder"] if row["options"] == "--no-equalize")
    assert without["sqnr_db"] < found["ladder"][0]["sqnr_db"] - 10
    assert found["best"] == "as asked"
    assert found["conclusion"].startswith("Nothing needs mending")


def test_one_extreme_activation_is_named_and_cut_off(tmp_path: Path, samples: Path) -> None:
    first = find_files([str(samples)], pattern=None, samples=1, seed=0).paths[0]
    x = np.load(first)
    x[0, 0, 2, 2] = 100
    np.save(first, x)
    model, asked = saved(plain(), tmp_path), ("--calib", samples, "--calibrator", "minmax")
    found = diagnosed(model, *asked)
    assert causes(found)["range-outlier"]["where"] == ["x"]
    before = decibel(model, as_asked(model, tmp_path / "asked.onnx", *asked), unseen())
    after = decibel(model, by_command(found, tmp_path / "mended.onnx"), unseen())
    assert after > before + 5


def test_the_wrong_colour_order_is_named_and_set_right(tmp_path: Path) -> None:
    pictures = colourful()
    folder, model = folder_of(pictures, tmp_path / "pictures"), saved(trained_with("imagenet"), tmp_path)
    asked = ("--calib", folder, "--resize", "exact", "--preprocess", "imagenet", "--color", "bgr", "--effort", "fast")
    found = diagnosed(model, *asked)
    assert "--color rgb" in causes(found)["preprocessing"]["what"]
    assert "--color bgr" not in found["recommended"]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    right = fed(pictures, 1 / 255, mean, std, "rgb").astype(np.float32)
    wrong = fed(pictures, 1 / 255, mean[::-1], std[::-1], "bgr").astype(np.float32)
    before = decibel(model, as_asked(model, tmp_path / "asked.onnx", *asked), right, wrong)
    after = decibel(model, by_command(found, tmp_path / "mended.onnx"), right)
    assert after > before + 10
    rows = {row["name"]: row["sqnr_db"] for row in found["ladder"]}
    assert rows["fed as in training"] > rows["as asked"] + 10


def test_a_bias_that_overflows_is_named_and_taken_care_of(tmp_path: Path, samples: Path) -> None:
    model = saved(overflowing(), tmp_path)
    found = diagnosed(model, "--calib", samples)
    cause = causes(found)["bias-overflow"]
    assert cause["where"] == ["c"]
    assert "widened" in cause["handled"]
    # with scales as they usually are its code would be beyond int32
    weights = np.abs(drawn(1, 8, 3, 3, 3)[3]).max() * 1e-6 / 127
    pictures = max(np.abs(np.load(path)).max() for path in samples.iterdir())
    assert 3 / (weights * 2 * pictures / 255) > 2**31
    assert decibel(model, by_command(found, tmp_path / "mended.onnx"), unseen()) > 30


def test_a_gate_is_named_and_the_layers_beside_it_left_in_float(tmp_path: Path, samples: Path) -> None:
    model, asked = saved(gated(), tmp_path), ("--calib", samples, "--float-budget", "0")
    found = diagnosed(model, *asked)
    cause = causes(found)["gate"]
    assert cause["where"] == ["s"]
    assert cause["output_share"] > 0.5
    assert "--keep-float c --keep-float d" in found["recommended"]
    # of three layers the last, of 128 weights, has codes; with 16 bits ONNX Runtime multiplies them in float
    assert "--activation-bits 16" in found["recommended"]
    left = 1 - 8 * 16 / (16 * 3 * 9 + 16 * 16 * 9 + 8 * 16)
    assert (found["best_in_float"]["work"], found["best_in_float"]["weights"]) == pytest.approx((1, left))
    assert "That is most of the network, which is hardly quantized by this" in found["conclusion"]
    before = decibel(model, as_asked(model, tmp_path / "asked.onnx", *asked), unseen())
    after = decibel(model, by_command(found, tmp_path / "mended.onnx"), unseen())
    assert after > max(30, before + 10)


def test_two_calibration_pictures_are_too_few(tmp_path: Path) -> None:
    asked = ("--calib", ROOT / "calib_samples", "--resize", "exact", "--preprocess", "imagenet", "--effort", "fast")
    found = diagnosed(CIFAR, *asked, "--samples", 2)
    assert causes(found)["few-pictures"]["what"].startswith("2 pictures to calibrate with: SQNR is ")
    assert "--samples 64" in found["recommended"]
    rows = {row["name"]: row["sqnr_db"] for row in found["ladder"]}
    assert rows["more pictures"] > rows["as asked"] + 5
    assert found["unseen"] is True
    # the command makes the very file that was tried: the same draw from its beginning
    report = json.loads(invoked(*shlex.split(found["recommended"])[1:], "-o", tmp_path / "q.onnx", "--json").stdout)
    assert report["recipe"]["samples"] == 64
    assert report["size"]["quantized"] == next(r["size"] for r in found["ladder"] if r["name"] == "more pictures")


# -- what is printed ---------------------------------------------------------------------------------------------------


def test_of_a_sound_network_there_is_nothing_to_mend(tmp_path: Path, samples: Path) -> None:
    model = saved(plain(), tmp_path)
    found = diagnosed(model, "--calib", samples)
    assert found["best"] == "as asked"
    assert found["recommended"] == f"qconv quantize {model} --calib {samples}"
    first = found["ladder"][0]
    # all of its layers are quantized, and it is told beside the command how large the file is
    assert (found["best_in_float"]["work"], found["best_in_float"]["weights"]) == (0, 0)
    assert (found["best_size"], found["float_size"]) == (first["size"], model.stat().st_size)
    assert "0% of the multiplications and 0% of the weights in float, and takes" in found["conclusion"]
    # but for how many pictures were asked for, which the file tells
    assert abs(first["size"] - by_command(found, tmp_path / "q.onnx").stat().st_size) <= len("128")
    assert first["ms"] > 0
    assert found["float_ms"] > 0


def test_the_text_fits_a_terminal_and_its_command_can_be_pasted(tmp_path: Path, samples: Path) -> None:
    folder = tmp_path / "a name with blanks that is long enough to need a line of its own in any terminal"
    folder.mkdir()
    model = saved(imbalanced(), folder)
    text = invoked("diagnose", model, "--calib", samples, "--no-equalize", "--effort", "fast").stdout
    ladder = text[text.index("causes:") : text.index("options:")]
    assert max(map(len, ladder.splitlines())) <= 80
    command = text[text.index("recommended:") :].partition("\n")[2]
    words = subprocess.run(
        ["bash", "-c", f'qconv() {{ printf "%s\\n" "$@"; }}; {command}'], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words[:4] == ["quantize", str(model), "--calib", str(samples)]


def test_the_ladder_as_csv(tmp_path: Path, samples: Path) -> None:
    model = saved(plain(), tmp_path)
    text = invoked("diagnose", model, "--calib", samples, "--effort", "fast", "--csv", "-").stdout
    rows = list(csv.DictReader(io.StringIO(text)))
    assert rows[0]["name"] == "as asked"
    assert float(rows[0]["sqnr_db"]) > 20


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("model.onnx",), "--calib"),
        (("-", "--calib", "samples"), "standard input"),
        (("model.onnx", "--calib", "samples", "--calibrator", "minmax", "--percentile", "99"), "--percentile"),
        (("model.onnx", "--calib", "samples", "--csv", ""), "--csv"),
    ],
)
def test_usage(words: tuple[str, ...], says: str) -> None:
    result = runner().invoke(cli, ["diagnose", *words])
    assert result.exit_code == 2
    assert says in result.stderr


def test_pictures_of_ones_own_to_score_on(tmp_path: Path, samples: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for index, x in enumerate(unseen(5)):
        np.save(other / f"{index}.npy", x[None])
    found = diagnosed(saved(plain(), tmp_path), "--calib", samples, "--images", other, "--effort", "fast")
    assert found["pictures"] == 5
    assert found["unseen"] is True


def test_what_no_other_trial_beats() -> None:
    def trial(sqnr: float, size: int, ms: float) -> Trial:
        return Trial("", (), scores=scores(sqnr), size=size, ms=ms, ratio=(0.9 * ms, ms, 1.1 * ms))

    trials = [trial(30, 10, 1), trial(20, 10, 1), trial(40, 20, 1), trial(30, 5, 2), Trial("", (), failed="no")]
    assert pareto_mask(trials) == (True, False, True, True, False)


def test_what_is_timed_counts_only_beside_what_is_timed() -> None:
    ratios = ((0.9, 1.0, 1.1), None, (0.95, 1.05, 1.2))
    assert pareto_mask([Trial("", (), scores=scores(30), size=10, ratio=ratio) for ratio in ratios]) == (
        True,
        True,
        True,
    )
    assert pareto_mask([Trial("", (), size=10, ratio=(r, r, r)) for r in (1.0, 2.0)]) == (True, False)


def test_outputs_of_classes_alone_count_by_their_agreement() -> None:
    right, wrong = (Trial("", (), scores=scores(None, share), size=10, ranked_by=AGREEMENT) for share in (1.0, 0.5))
    assert pareto_mask((right, wrong)) == (True, False)
    assert right.equal
    assert wrong.task_db == pytest.approx(3.01, abs=0.01)


def test_defaults_come_back_with_a_remedy(tmp_path: Path, samples: Path) -> None:
    """What goes with no other calibrator, or with no better effort, is left out with the remedy."""
    asked = {"effort": "balanced", "rounding": "nearest", "keep_float": ("a",)}
    changes = join_changes({"keep_float": ("b",)}, {"effort": "best", "rounding": None})
    assert merge_changes(asked, changes) == {"effort": "best", "keep_float": ("a", "b")}
    assert join_changes(changes, {"keep_float": ("c", "b")})["keep_float"] == ("b", "c")
    x = np.load(samples / "00.npy")
    x[0, 0, 2, 2] = 300
    np.save(samples / "00.npy", x)
    asked = ("--effort", "fast", "--calibrator", "percentile", "--percentile", "99.999")
    assert diagnosed(saved(plain(), tmp_path), "--calib", samples, *asked)["ladder"]


def test_bits_from_a_file_stay_in_the_command(tmp_path: Path, samples: Path) -> None:
    bits = tmp_path / "bits.toml"
    bits.write_text("[layers]\nc = 4\nk = 3\n")
    model = saved(plain(), tmp_path)
    found = diagnosed(model, "--calib", samples, "--effort", "fast", "--layer-bits", bits)
    assert f"--layer-bits {bits}" in found["recommended"]
    assert "3 bits" in causes(found)["low-bits"]["what"]


def test_a_scalar_among_the_outputs(tmp_path: Path, samples: Path) -> None:
    proto = network(
        "c = Conv<pads=[1,1,1,1]>(x, w) y = Flatten(c) z = ReduceMean<keepdims=0>(c)",
        x=PICTURE,
        outputs=("y", "z"),
        w=drawn(1, 16, 3, 3, 3),
    )
    found = diagnosed(saved(proto, tmp_path), "--calib", samples, "--effort", "fast")
    assert found["ladder"][0]["sqnr_db"] is not None


def test_a_network_that_tells_nothing_accuses_nobody(tmp_path: Path) -> None:
    folder = folder_of(colourful(), tmp_path / "pictures")
    asked = ("--calib", folder, "--resize", "exact", "--preprocess", "unit", "--effort", "fast", "--size", "8x8")
    assert "preprocessing" not in causes(diagnosed(saved(plain(), tmp_path), *asked))


def test_pictures_calibrated_with_are_not_called_unseen(tmp_path: Path, samples: Path) -> None:
    asked = ("--calib", samples, "--images", samples, "--effort", "fast")
    assert diagnosed(saved(plain(), tmp_path), *asked)["unseen"] is False


def test_a_broken_picture_among_those_held_back(tmp_path: Path) -> None:
    folder = folder_of(colourful(25), tmp_path / "pictures")
    last = find_files([str(folder)], pattern=None, samples=25, seed=0).paths[-1]
    last.write_bytes(b"no picture")
    asked = ("--calib", folder, "--resize", "exact", "--preprocess", "imagenet", "--effort", "fast")
    assert diagnosed(saved(trained_with("imagenet"), tmp_path), *asked)["pictures"] == 4


def test_a_file_is_the_same_whatever_ran_before(tmp_path: Path, samples: Path) -> None:
    """What runs share changes no byte."""
    model, memory = saved(gated(), tmp_path), collect.CalibrationCache()
    data, known = DataOptions((str(samples),)), {"equalize": False}
    recipes = [Recipe(**known, keep_float=("d",)), Recipe(**known, effort="fast"), Recipe(**known)]
    for recipe in [*recipes, *recipes[::-1]]:
        _, shared = quantize.quantize(model, None, recipe, data, cache=memory)
        _, alone = quantize.quantize(model, None, recipe, data)
        assert shared == alone


def test_a_list_of_pictures_is_not_written_over(tmp_path: Path, samples: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"samples/{path.name}\n" for path in samples.iterdir()))
    before = listed.read_text()
    result = runner().invoke(
        cli, ["diagnose", str(saved(plain(), tmp_path)), "--calib", str(listed), "--csv", str(listed)]
    )
    assert result.exit_code == 1
    assert listed.read_text() == before


@pytest.mark.parametrize(("op", "gate"), [("HardSwish", "a"), ("Tanh", "t")])
def test_gates_of_other_kinds(tmp_path: Path, samples: Path, op: str, gate: str) -> None:
    body = {"HardSwish": "a = HardSwish(c) ", "Tanh": "p = Softplus(c) t = Tanh(p) a = Mul(c, t) "}[op]
    proto = network(
        f"c = Conv<pads=[1,1,1,1]>(x, w) {body} k = Conv(a, u) y = Flatten(k)",
        x=PICTURE,
        w=drawn(1, 16, 3, 3, 3),
        u=drawn(2, 8, 16, 1, 1),
    )
    found = diagnosed(saved(proto, tmp_path), "--calib", samples, "--effort", "fast")
    assert "gate" in causes(found), found["causes"]


def test_output_channels_on_one_scale(tmp_path: Path, samples: Path) -> None:
    model, asked = saved(imbalanced(), tmp_path), ("--calib", samples, "--weight-granularity", "per-tensor")
    found = diagnosed(model, *asked, "--effort", "fast")
    assert causes(found)["weight-imbalance"]["where"][0] == "c"
    assert any(row["options"] == "--weight-granularity per-channel" for row in found["ladder"])
    assert "per-tensor" not in found["recommended"] or "--equalize" in found["recommended"]


def test_bits_that_were_asked_for_are_kept_and_what_more_would_bring_is_told(tmp_path: Path, samples: Path) -> None:
    asked = ("--calib", samples, "--weight-bits", "4", "--edge-bits", "4", "--effort", "fast")
    found = diagnosed(saved(plain(), tmp_path), *asked)
    assert "--weight-bits 4" in found["recommended"]
    assert "With more bits than were asked for: cosine " in found["conclusion"]
    assert "--weight-bits 8" in found["conclusion"]


def test_pictures_fed_in_another_range(tmp_path: Path) -> None:
    """Whether the network wants RGB or BGR is not certain, but that it was not fed raw pixels is."""
    asked = ("--calib", ROOT / "calib_samples", "--resize", "exact", "--preprocess", "raw", "--effort", "fast")
    found = diagnosed(CIFAR, *asked)
    assert "--preprocess imagenet" in causes(found)["preprocessing"]["what"]
    assert "--preprocess imagenet" in found["recommended"]


def test_a_doubt_about_the_pictures_stands_beside_a_good_result() -> None:
    """Both models got what the options say, so that they agree; it may be wrong for both."""
    found = diagnosed(
        CIFAR, "--calib", ROOT / "calib_samples", "--resize", "exact", "--color", "bgr", "--effort", "fast"
    )
    assert "without being certain" in causes(found)["preprocessing"]["what"]
    assert found["conclusion"].startswith("Quantization needs no mending: ")
    assert "Find out how the network was fed" in found["conclusion"]


def test_few_pictures_are_enough_to_scale_a_channel_back(tmp_path: Path, samples: Path) -> None:
    """Their tail is not known, and yet no channel is taken to reach a thousand times what it showed."""
    model = saved(imbalanced(), tmp_path)
    asked = as_asked(model, tmp_path / "asked.onnx", "--calib", samples, "--samples", 8)
    assert decibel(model, asked, unseen()) > 30


def test_parts_of_unlike_range_on_one_scale(tmp_path: Path, samples: Path) -> None:
    """A detector's head: boxes in pixels beside scores."""
    proto = network(
        "c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) b = Conv(r, u) s = Conv(r, v) h = Concat<axis=1>(b, s)"
        " k = Conv(h, t) y = Flatten(k)",
        x=PICTURE,
        w=drawn(1, 16, 3, 3, 3),
        u=300 * drawn(2, 4, 16, 1, 1),
        v=drawn(3, 12, 16, 1, 1),
        t=drawn(4, 8, 16, 1, 1) * np.array([1 / 300] * 4 + [1] * 12, np.float32).reshape(1, 16, 1, 1),
    )
    model, asked = saved(proto, tmp_path), ("--calib", samples, "--no-equalize")
    found = diagnosed(model, *asked)
    assert causes(found)["wide-concat"]["where"] == ["h"]
    before = decibel(model, as_asked(model, tmp_path / "asked.onnx", *asked), unseen())
    assert decibel(model, by_command(found, tmp_path / "mended.onnx"), unseen()) > before + 10


def test_the_page_of_a_diagnosis(tmp_path: Path, samples: Path) -> None:
    pytest.importorskip("plotly")
    model, page = saved(imbalanced(), tmp_path), tmp_path / "page.html"
    found = diagnosed(model, "--calib", samples, "--no-equalize", "--effort", "fast", "--report", page)
    text = page.read_text()
    for told in ("Channels of very different size", "scale channels", "--equalize", "Layer by layer"):
        assert told in text
    assert html.escape(found["recommended"]) in text


def test_the_page_of_a_diagnosis_shows_masks_of_what_was_asked_for(tmp_path: Path) -> None:
    """By ONNX Runtime and argmax, of the file that `quantize` writes with the same options."""
    pytest.importorskip("plotly")
    model, page, out = tmp_path / "model.onnx", tmp_path / "page.html", tmp_path / "out.onnx"
    labelled.save(labelled.segmenter(), model)
    folders = tmp_path / "calib", tmp_path / "scored"
    for number, folder in enumerate(folders):
        folder.mkdir()
        rng = np.random.default_rng(number)
        for index in range(4):
            noise = rng.integers(0, 256, (labelled.SIDE, labelled.SIDE, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{index}.png")
    asked = (
        "--calib",
        folders[0],
        "--preprocess",
        "unit",
        "--weight-bits",
        "3",
        "--edge-bits",
        "3",
        "--effort",
        "fast",
    )
    invoked("diagnose", model, *asked, "--images", folders[1], "--report", page, "-q")
    as_asked(model, out, *asked)
    expected = []
    for path in sorted(folders[1].iterdir()):
        with Image.open(path) as picture:
            fed = (np.asarray(picture, np.float32) / 255).transpose(2, 0, 1)[None]
        own, other = (InferenceSession(str(file)).run(None, {"x": fed})[0].argmax(1) for file in (model, out))
        expected.append((float((own == other).mean()), path.name))
    assert min(expected)[0] < 1
    text = page.read_text()
    shown = re.findall(r'title="(\d\.png)">[^<]*</span>: ([\d.]+)% of pixels agree', text)
    assert shown == [(name, f"{100 * share:.1f}") for share, name in sorted(expected)]
    assert text.count('class="overlay"') == 2 * len(expected)


def test_pictures_that_do_not_fit_are_told(tmp_path: Path, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 8 that are held back 3 fill the memory that is kept for them: 768 bytes and their outputs of 2 kB each."""
    monkeypatch.setattr(trials, "SCORED_BYTES", 2 * (3 * 8 * 8 + 8 * 8 * 8) * 4 + 1)
    model, asked = saved(plain(), tmp_path), ("--calib", samples, "--effort", "fast")
    found = diagnosed(model, *asked)
    assert (found["pictures"], found["pictures_given"]) == (3, COUNT // 5)
    text = " ".join(invoked("diagnose", model, *asked).stdout.split())
    assert "scored on 3 of 8 pictures (more of them, with outputs, do not fit into memory)" in text
    monkeypatch.undo()
    found = diagnosed(model, *asked)
    assert (found["pictures"], found["pictures_given"]) == (COUNT // 5, COUNT // 5)


def test_scoring_shows_how_far_it_is(tmp_path: Path, samples: Path) -> None:
    """Every trial is scored picture by picture, and the outputs are compared so, which may take most of the time."""
    heard: list[tuple[str, int, int]] = []
    asked = request_fields(Recipe(effort="fast"), DataOptions((str(samples),)))
    source = Source("model.onnx", saved(plain(), tmp_path))
    found = diagnose(DiagnosisRequest(source, asked), Reporter(on_progress=lambda *told: heard.append(told)))
    pictures = found.diagnosis.pictures
    trials = [trial for trial in found.diagnosis.trials if not trial.failed]
    each = [(stage, done, pictures) for stage in ("score", "outputs") for done in range(1, pictures + 1)]
    assert all(heard.count(told) == (len(trials) if told[0] == "score" else 1) for told in each)


def test_more_effort_is_tried_where_only_more_bits_are_good(tmp_path: Path, samples: Path) -> None:
    asked = ("--calib", samples, "--weight-bits", "3", "--edge-bits", "3", "--effort", "fast")
    found = diagnosed(saved(plain(), tmp_path), *asked)
    rows = {row["options"]: row["sqnr_db"] for row in found["ladder"]}
    assert rows["--weight-bits 8"] > 30
    assert "--effort balanced" in rows
    assert "--weight-bits 3" in found["recommended"]


@pytest.mark.parametrize("command", ["quantize", "diagnose", "sweep"])
def test_a_trial_is_not_sent_to_the_diagnosis(tmp_path: Path, samples: Path, command: str) -> None:
    """Which it is a part of, or one of several results of."""
    model, few = saved(plain(), tmp_path), ("--weight-bits", "2", "--edge-bits", "2", "--effort", "fast")
    (tmp_path / "recipes.toml").write_text("[a]\n")
    more: dict[str, tuple[Any, ...]] = {
        "quantize": ("quantize", model, "-o", tmp_path / "q.onnx"),
        "diagnose": ("diagnose", model),
        "sweep": ("quantize", model, "--sweep", tmp_path / "recipes.toml"),
    }
    told = invoked(*more[command], "--calib", samples, *few).stderr
    assert "Warning: " in told
    assert "the result is far from the float model" in told or "little is left of the float model" in told
    assert ("`qconv diagnose` with the same options tells why" in told) == (command == "quantize")
    assert ("--effort balanced" in told) == (command == "quantize")


def test_channels_of_8_bits_take_no_bits_from_others(tmp_path: Path, samples: Path) -> None:
    asked = ("--calib", samples, "--recipe-name", "aciq-w4a4")
    found = diagnosed(saved(plain(), tmp_path), *asked)
    assert any("--weight-bits 8 --bit-allocation activations" in row["options"] for row in found["ladder"])


def test_embedding_comes_after_a_diagnosis() -> None:
    result = runner().invoke(cli, ["diagnose", "m.onnx", "--calib", "s", "--embed-preprocessing", "nchw"])
    assert result.exit_code == 2


def test_outputs_that_cannot_be_compared_are_not_called_equal(tmp_path: Path, samples: Path) -> None:
    """With two bits another number of places is above zero on every picture."""
    body = "c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) k = NonZero(r) t = Transpose(k) y = GatherND(r, t)"
    model = saved(network(body, x=PICTURE, w=drawn(1, 16, 3, 3, 3)), tmp_path)
    few = ("--weight-bits", "2", "--activation-bits", "2", "--edge-bits", "2")
    done = runner().invoke(cli, ["diagnose", str(model), "--calib", str(samples), *few])
    assert isinstance(done.exception, QconvError)
    assert "cannot be compared, so that nothing tells what helps." in str(done.exception)
    out = tmp_path / "q.onnx"
    invoked("quantize", model, "--calib", samples, *few, "-o", out)
    told = invoked("compare", model, out, "--images", samples).stdout
    assert "No output could be compared." in told
    assert "outputs: equal" not in told
