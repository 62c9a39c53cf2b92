"""Planted faults: each is found and named, and the command that is recommended mends it, measured by other means."""

from __future__ import annotations

import csv
import io
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from models import network
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from test_detect import colourful, fed, folder_of, trained_with

from qconv import proof
from qconv.cli import cli
from qconv.ladder import Trial, undominated
from qconv.listing import find

ROOT = Path(__file__).parents[1]
CIFAR = ROOT / "tests" / "models" / "cifar_mobilenet.onnx"
COUNT = 40
PICTURE = ("N", 3, 8, 8)


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One turn is enough to have times; no test says anything on them."""
    monkeypatch.setattr(proof, "ROUNDS", 1)


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
        u=drawn(3, 4, 8, 1, 1),
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
    result = CliRunner().invoke(cli, [str(word) for word in words])
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
    model, asked = saved(imbalanced(), tmp_path), ("--calib", samples, "--no-equalize")
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
    first = find([str(samples)], pattern=None, samples=1, seed=0).paths[0]
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
    model, asked = saved(gated(), tmp_path), ("--calib", samples)
    found = diagnosed(model, *asked)
    cause = causes(found)["gate"]
    assert cause["where"] == ["s"]
    assert cause["output_share"] > 0.5
    assert "--keep-float c --keep-float d" in found["recommended"]
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
    result = CliRunner().invoke(cli, ["diagnose", *words])
    assert result.exit_code == 2
    assert says in result.output


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
        return Trial("", (), sqnr_db=sqnr, size=size, ms=ms)

    trials = [trial(30, 10, 1), trial(20, 10, 1), trial(40, 20, 1), trial(30, 5, 2), Trial("", (), failed="no")]
    assert undominated(trials) == (True, False, True, True, False)
