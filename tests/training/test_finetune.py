"""Quantization-aware training. Oracles: ONNX Runtime on the written file, and what a killed run must come to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image

from qconv.config.data_options import DataOptions
from qconv.config.recipe import make_request
from qconv.reporter import Reporter
from tests.support import labelled
from tests.support.libraries import runner
from tests.support.models import network

torch = pytest.importorskip("torch", reason="needs the extra: pip install 'qconv[torch]'")

from qconv.cli.main import cli
from qconv.config.choices import NAMED_RECIPES
from qconv.config.data_options import Layout, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.config.serialization import recipe_from_dict
from qconv.errors import QconvError
from qconv.ir import load
from qconv.ir.files import Source, read_proto
from qconv.ir.metadata import read_recipe
from qconv.pipeline.quantize import quantize
from qconv.results.training import FinetuneResult
from qconv.training.finetune import finetune
from qconv.training.network import TorchNetwork
from qconv.training.options import FinetuneOptions
from qconv.training.trainable import LearnedParameters, find_pairs_axis, find_sites

torch.set_num_threads(1)  # tests run side by side
BODY = (
    "a = Conv<pads=[1,1,1,1]>(x, w)  b = Relu(a)  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(b)"
    "  c = Conv<pads=[1,1,1,1]>(m, v)  d = Relu(c)  e = Conv(d, u)  s = Add(e, m)  r = Relu(s)"
    "  p = GlobalAveragePool(r)  f = Flatten(p)  y = Gemm(f, g)"
)
RAW = PreprocessingOptions(preset="unit")
PICTURES = 48


@cache
def float_bytes() -> bytes:
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 3, 3, 3), "v": (12, 8, 3, 3), "u": (8, 12, 1, 1), "g": (8, 5)}
    gain = {"w": 1.4, "v": 1.4, "u": 1.4, "g": 6.0}  # scores as far apart as those of a trained network
    weights = {
        name: (gain[name] * rng.normal(size=shape) / np.sqrt(np.prod(shape[1:] if name != "g" else shape[:1]))).astype(
            np.float32
        )
        for name, shape in shapes.items()
    }
    return bytes(network(BODY, ("N", 3, 12, 12), **weights).SerializeToString())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model, pictures, and the model quantized to few bits by the plainest recipe."""
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "net.onnx").write_bytes(float_bytes())
    for number in range(PICTURES):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (3, 3, 3)).repeat(4, axis=0).repeat(4, axis=1) + rng.normal(0, 12, (12, 12, 3))
        where = folder / "pictures" / f"class{number % 5}"
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(where / f"{number:02}.png")
    quantize(str(folder / "net.onnx"), folder / "net.w3a3.onnx", *few(folder))
    return folder


def few(folder: Path, **more: object) -> tuple[Recipe, DataOptions]:
    made: dict[str, object] = {
        "calib": (str(folder / "pictures"),), "weight_bits": 3, "activation_bits": 3, "effort": "fast",
        "preprocessing": RAW, "threads": 1,
    }  # fmt: skip
    return make_request({**made, **more})


def request(folder: Path, **more: object) -> FinetuneOptions:
    data = DataOptions((str(folder / "pictures"),), samples=None)
    made: dict[str, object] = {"epochs": 40, "batch": 12, "rate": 2e-2, "device": "cpu", "augment": False}
    made["threads"] = 1
    return FinetuneOptions(data, **{**made, **more})  # type: ignore[arg-type]


def source(path: Path) -> Source:
    return Source(str(path), path)


def outputs(path: Path, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def divergence(wanted: np.ndarray, said: np.ndarray) -> float:
    """Kullback and Leibler's, of softmaxes, on average."""
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (wanted.astype(np.float64), said))
    return float((p * np.log(p / q)).sum(axis=1).mean())


def all_pictures(folder: Path) -> np.ndarray:
    files = sorted((folder / "pictures").rglob("*.png"))
    return np.stack([np.asarray(Image.open(file), np.float32).transpose(2, 0, 1) / 255 for file in files])


@pytest.fixture(scope="module")
def trained(place: Path) -> tuple[FinetuneResult, Path]:
    out = place / "net.w3a3.qat.onnx"
    return finetune(source(place / "net.w3a3.onnx"), out, request(place)), out


def test_training_brings_the_file_nearer_to_the_float_model(place: Path, trained: tuple[FinetuneResult, Path]) -> None:
    """On all pictures, by ONNX Runtime and numpy alone."""
    found, out = trained
    x = all_pictures(place)
    wanted = outputs(place / "net.onnx", x)
    before, after = (divergence(wanted, outputs(path, x)) for path in (place / "net.w3a3.onnx", out))
    assert found.trained
    assert after < 0.7 * before
    assert found.after is not None
    assert found.after.mark.distance < found.before.mark.distance


def test_the_structure_stays(place: Path, trained: tuple[FinetuneResult, Path]) -> None:
    """Same nodes, names and types; codes of three bits; scales of biases are the products that kernels want."""
    before, after = onnx.load(place / "net.w3a3.onnx"), onnx.load(trained[1])
    onnx.checker.check_model(after)
    assert [(n.op_type, n.name) for n in after.graph.node] == [(n.op_type, n.name) for n in before.graph.node]
    own = {t.name: onnx.numpy_helper.to_array(t) for t in after.graph.initializer}
    for tensor in before.graph.initializer:
        assert own[tensor.name].dtype == onnx.numpy_helper.to_array(tensor).dtype
        assert own[tensor.name].shape == tuple(tensor.dims)
    codes = [array for name, array in own.items() if name.startswith(("v_codes", "u_codes"))]
    assert len(codes) == 2
    assert all(np.abs(array).max() <= 3 for array in codes)
    makers = {output: node for node in after.graph.node for output in node.output}
    convolutions = [node for node in after.graph.node if node.op_type == "Conv"]
    for node in convolutions:
        data, weight, bias = (makers[name] for name in node.input)
        np.testing.assert_array_equal(
            own[bias.input[1]], own[data.input[1]] * own[weight.input[1]]
        )  # exactly, or no integer kernel runs it
    assert "qconv.finetune" in {entry.key for entry in after.metadata_props}


def test_what_is_trained_is_what_is_written(place: Path, tmp_path: Path) -> None:
    """After any step: the network with what is learned says, to a rounding of floats, what the written file says."""
    path = place / "net.w3a3.onnx"
    model = load.load_unchanged(read_proto(source(path)), source(path))
    learned = LearnedParameters(find_sites(model, recipe_from_dict(read_recipe(model.inner.metadata_props))))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in learned.tensors:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
        learned.fit_pairs()
        x = all_pictures(place)
        expected = TorchNetwork(model).run({"x": torch.from_numpy(x), **learned.given()})["y"].numpy()
    learned.write(model)
    (tmp_path / "out.onnx").write_bytes(model.proto().SerializeToString())
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(tmp_path / "out.onnx"), options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - outputs(path, x)).max() > 0.01  # it did change


def test_nothing_learned_writes_the_same_numbers(place: Path) -> None:
    path = place / "net.w3a3.onnx"
    model = load.load_unchanged(read_proto(source(path)), source(path))
    before = {name: v.const_value.numpy().copy() for name, v in model.graph.initializers.items()}
    LearnedParameters(find_sites(model, recipe_from_dict(read_recipe(model.inner.metadata_props)))).write(model)
    after = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)


def test_no_pair_of_products_gets_worse(place: Path, tmp_path: Path) -> None:
    """Of 8-bit weights that grow in training: two products still fit into 16 bits wherever they did."""
    path = tmp_path / "w8a8.onnx"
    quantize(str(place / "net.onnx"), path, *few(place, weight_bits=8, activation_bits=8, saturation_safe=True))
    model = load.load_unchanged(read_proto(source(path)), source(path))
    sites = find_sites(model, recipe_from_dict(read_recipe(model.inner.metadata_props)))
    learned = LearnedParameters(sites)
    with torch.no_grad():
        for tensor in learned.kinds["weights"].values():
            tensor *= 1.7
    learned.fit_pairs()
    learned.write(model)
    for site in sites.weights:
        axis = find_pairs_axis(site)
        assert axis is not None
        rows = np.moveaxis(site.codes.const_value.numpy().astype(np.int64), axis, 0)
        assert np.abs(rows).max() > 40
        if site.nodes[0].op_type == "Conv":
            rows = np.moveaxis(rows, 1, -1)
        rows = rows.reshape(len(rows), -1)
        first, second = rows[:, 0::2][:, : rows.shape[1] // 2], rows[:, 1::2]
        top = 255 * (np.maximum(first, 0) + np.maximum(second, 0))
        bottom = 255 * (np.minimum(first, 0) + np.minimum(second, 0))
        assert max(top.max(), -bottom.min()) <= 32767


def test_runs_are_alike(place: Path, tmp_path: Path) -> None:
    """The same options and pictures give the same bytes; another seed others."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        wish = request(place, epochs=4, augment=True)
        data = replace(wish.data, seed=seed)
        finetune(
            source(place / "net.w3a3.onnx"),
            tmp_path / f"{name}.onnx",
            replace(wish, data=data, teacher=source(place / "net.onnx")),
        )
    a, b, c = ((tmp_path / f"{name}.onnx").read_bytes() for name in "abc")
    assert a == b
    assert a != c


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_as_if_it_never_had_been(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qconv.training.trainer.SAVE_EVERY_SECONDS", 0.0)
    wish = request(place, epochs=12, augment=True)
    whole = tmp_path / "whole.onnx"
    finetune(source(place / "net.w3a3.onnx"), whole, wish)

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "train" and done == total // 2 + 1:
            raise Killed

    out = tmp_path / "out.onnx"
    with pytest.raises(Killed):
        finetune(source(place / "net.w3a3.onnx"), out, wish, Reporter(on_progress=kill))
    assert not out.exists()
    (kept,) = (path for path in tmp_path.iterdir() if path.name.startswith("."))
    found = finetune(source(place / "net.w3a3.onnx"), out, wish)
    assert 0 < found.resumed < found.steps
    assert out.read_bytes() == whole.read_bytes()
    assert not kept.exists()


def test_what_another_run_left_is_not_used(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qconv.training.trainer.SAVE_EVERY_SECONDS", 0.0)
    wish, out = request(place, epochs=24), tmp_path / "out.onnx"
    heard: list[str] = []
    for content in (None, b"no state"):
        if content is None:
            stop = Reporter(on_progress=lambda stage, done, total: _raise_at(stage, done, total))
            with pytest.raises(Killed):
                finetune(source(place / "net.w3a3.onnx"), out, wish, stop)
        else:
            (tmp_path / ".out.onnx.training").write_bytes(content)
        found = finetune(source(place / "net.w3a3.onnx"), out, replace(wish, rate=1e-2), Reporter(heard.append))
        assert found.resumed == 0
    assert any("other options" in text for text in heard)
    assert any("damaged" in text for text in heard)


def _raise_at(stage: str, done: int, total: int) -> None:
    if stage == "train" and done == total:
        raise Killed


def test_the_input_comes_back_where_nothing_is_better(place: Path, tmp_path: Path) -> None:
    """Training that ruins the network: a rate a thousand times too large."""
    out = tmp_path / "out.onnx"
    found = finetune(source(place / "net.w3a3.onnx"), out, request(place, rate=10.0, epochs=1))
    assert not found.trained
    assert out.read_bytes() == (place / "net.w3a3.onnx").read_bytes()
    assert found.result is found.before


def test_labels_are_learned_from(place: Path, tmp_path: Path) -> None:
    """Class folders have nothing to do with the float model here, so that only labels can lead to them."""
    wish = request(place, labels=True, epochs=60, batch=36, rate=5e-2)
    found = finetune(source(place / "net.w3a3.onnx"), tmp_path / "out.onnx", wish)
    losses = [row.loss for row in found.history]
    assert losses[-1] < losses[0]
    assert found.before.mark.right is not None
    again = finetune(source(place / "net.w3a3.onnx"), tmp_path / "other.onnx", replace(wish, labels=False))
    assert found.before.mark.right != again.before.mark.right  # one counts labels, the other the float model's classes


@pytest.mark.parametrize(
    "more",
    [
        {"weight_bits": 8, "activation_bits": 8},
        {"weight_bits": 2, "activation_bits": 4, "effort": "best"},
        {"weight_bits": 4, "activation_bits": 32},
        {"weight_bits": 4, "activation_bits": 4, "weight_granularity": "per-tensor"},
        {"weight_bits": 4, "activation_bits": 16},
        {"weight_bits": 4, "activation_bits": 8, "pack": True},
        {"weight_bits": 4, "activation_bits": 8, "weight_granularity": "per-block", "block_size": 4},
        {"recipe_name": "aciq"},
        {"embed_preprocessing": Layout.NHWC},
    ],
    ids=lambda more: " ".join(map(str, more.values())),
)
def test_every_kind_of_file_can_be_trained(place: Path, tmp_path: Path, more: dict[str, object]) -> None:
    """And what is written is what was judged in training: nearer than before, or unchanged."""
    if "recipe_name" in more:
        more = dict(NAMED_RECIPES["aciq-w4a4"])
    quant, out = tmp_path / "quant.onnx", tmp_path / "out.onnx"
    quantize(str(place / "net.onnx"), quant, *few(place, **more))
    found = finetune(source(quant), out, request(place, teacher=source(place / "net.onnx"), epochs=6))
    assert found.history
    if "pack" in more:
        for written in (quant, out):
            assert onnx.TensorProto.INT4 in {tensor.data_type for tensor in onnx.load(written).graph.initializer}
    if found.trained:
        assert found.after is not None
        assert found.after.mark.distance < found.before.mark.distance
        assert found.after.mark.right is None or found.after.mark.right >= (found.before.mark.right or 0.0)
        best = min(row.mark.distance for row in found.history if row.mark.right == found.after.mark.right)
        assert found.after.mark.distance == pytest.approx(best, rel=0.05, abs=1e-4)
    else:
        assert out.read_bytes() == quant.read_bytes()


def test_the_teacher_is_found_by_its_hash(place: Path, tmp_path: Path) -> None:
    for name in ("net.onnx", "net.w3a3.onnx"):
        shutil.copy(place / name, tmp_path / name)
    (tmp_path / "net.onnx").rename(tmp_path / "some other name.onnx")
    shutil.copytree(place / "pictures", tmp_path / "pictures")
    found = finetune(source(tmp_path / "net.w3a3.onnx"), tmp_path / "out.onnx", request(tmp_path, epochs=1))
    assert found.teacher == str(tmp_path / "some other name.onnx")
    (tmp_path / "some other name.onnx").write_bytes(b"changed")
    with pytest.raises(QconvError, match="not beside it"):
        finetune(source(tmp_path / "net.w3a3.onnx"), tmp_path / "out.onnx", request(tmp_path, epochs=1))


# -- the command -------------------------------------------------------------------------------------------------------


def invoke(*words: str) -> tuple[int, str, str]:
    found = runner().invoke(cli, ["finetune", *words], standalone_mode=False)
    if isinstance(found.exception, Exception) and not isinstance(found.exception, QconvError):
        code = getattr(found.exception, "exit_code", 1)
        return code, found.stdout, f"{found.exception}"
    if found.exception is not None:
        return 1, found.stdout, str(found.exception)
    return found.return_value or 0, found.stdout, found.stderr


def test_the_command_tells_what_training_brought(place: Path, tmp_path: Path) -> None:
    args = [str(place / "net.w3a3.onnx"), "--images", str(place / "pictures"), "--epochs", "10", "--batch", "12"]
    table = tmp_path / "history.csv"
    code, text, _ = invoke(*args, "-o", str(tmp_path / "a.onnx"), "--csv", str(table), "--learning-rate", "2e-2")
    assert code == 0
    assert "held back, by ONNX Runtime" in text
    lines = table.read_text().splitlines()
    assert lines[0] == "step,epoch,loss,held_distance,held_right,seconds"
    code, text, _ = invoke(
        *args, "-o", str(tmp_path / "b.onnx"), "--json", "--min-agreement", "1.0", "--min-sqnr", "90"
    )
    told = json.loads(text)
    assert code == 3
    assert [gate["held"] for gate in told["gates"]].count(False) >= 1
    assert told["pictures"] == {"taught": 36, "held": 12}
    assert told["steps"]["planned"] == 30


NO_LABELS = {"float": None, "float_held": None}
"""What gates tell of the float model where no labels do."""


def test_a_segmenter_is_judged_by_its_masks(tmp_path: Path) -> None:
    """A third of the bits are lost: no map is whole, and every gate but that on wholeness holds."""
    labelled.save(labelled.segmenter(), tmp_path / "net.onnx")
    folder = labelled.pictures(tmp_path / "pictures", 12)
    data = DataOptions((str(folder),), preprocessing=replace(RAW, resize="exact"))
    recipe = Recipe(threads=1, effort="fast", weight_bits=3, edge_bits=3, activation_bits=3)
    quantize(source(tmp_path / "net.onnx"), tmp_path / "net.w3a3.onnx", recipe, data)
    args = [str(tmp_path / "net.w3a3.onnx"), "--images", str(folder), "--epochs", "1"]
    code, text, _ = invoke(*args, "--json", "--min-miou", "1.0", "--min-agreement", "0.1")
    told = json.loads(text)
    written = told["after"] if told["trained"] else told["before"]
    assert code == 3
    assert told["gates"] == [
        {"name": "min-agreement", "want": 0.1, "got": written["agreement"], "held": True, **NO_LABELS},
        {"name": "min-miou", "want": 1.0, "got": written["float_miou"], "held": False, **NO_LABELS},
    ]
    assert 0.2 < written["float_miou"] <= written["agreement"] < 1
    code, text, _ = invoke(*args, "-o", str(tmp_path / "b.onnx"), "--min-miou", "0.1")
    assert code == 0
    rows = [line.split() for line in text.splitlines() if line[:1].isalpha()]
    names = [row[0] for row in rows if row[0] in ("mIoU", "agreement", "SQNR", "distance")]
    assert names == ["mIoU", "agreement", "SQNR", "distance"]
    (share,) = (row[1] for row in rows if row[0] == "mIoU")
    assert share == f"{100 * told['before']['float_miou']:.2f}%"


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["NET", "--images", "PICS"], 1, "is not quantized"),
        (["QUANT", "--images", "PICS", "--teacher", "QUANT"], 1, "is quantized itself"),
        (["QUANT", "--images", "PICS", "--teacher", "-"], 2, "several times"),
        (["QUANT", "--images", "PICS", "--classes", "x"], 2, "--labels"),
        (["QUANT", "--images", "PICS", "--holdout", "48"], 1, "too few"),
        (["QUANT", "--images", "PICS", "--device", "cuda"], 1, "no GPU"),
        (["QUANT", "--images", "PICS", "--samples", "4"], 1, "too few"),
        (["QUANT", "--images", "PICS", "-o", "QUANT"], 1, "written over"),
        (["QUANT", "--images", "nowhere"], 1, "does not exist"),
        (["QUANT", "--images", "PICS", "--min-miou", "1.1"], 2, "Use a share from 0 to 1"),
        (["QUANT", "--images", "PICS", "--min-miou", "0.5"], 1, "--min-miou needs an output that is a map of classes"),
        (["QUANT", "--images", "PICS", "--min-boxes", "0.5"], 1, "--min-boxes needs outputs that are read as boxes"),
    ],
)
def test_bad_input_is_told_of(place: Path, words: list[str], code: int, told: str) -> None:
    names = {"NET": "net.onnx", "QUANT": "net.w3a3.onnx", "PICS": "pictures"}
    before = sorted(place.iterdir())
    if told == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    got, _, text = invoke(*(str(place / names[word]) if word in names else word for word in words))
    assert got == code
    assert told in text
    assert sorted(place.iterdir()) == before


def test_a_signal_leaves_no_output(place: Path, tmp_path: Path) -> None:
    """A run that would never end, once it has kept a state."""
    out, kept = tmp_path / "out.onnx", tmp_path / ".out.onnx.training"
    words = [str(place / "net.w3a3.onnx"), "--images", str(place / "pictures"), "--epochs", "100000", "-o", str(out)]
    code = (
        "import sys; import qconv.training.trainer as trainer; from qconv.cli.main import run;"
        "trainer.MOST_RATE_CUTS = 10**9; trainer.SAVE_EVERY_SECONDS = 0.0;"
        f"sys.argv = {['qconv', 'finetune', *words]!r}; run()"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    while not kept.exists() and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, text = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM
    assert b"Traceback" not in text
    assert b"goes on from the last round" in text
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
