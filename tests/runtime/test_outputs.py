"""What outputs hold, told by small networks that end as real ones do, and what follows from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qconv.config.data_options import DataOptions
from qconv.config.tasks import Tasks
from qconv.data.loader import DataLoader
from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.ir.original import open_original
from qconv.reporter import Reporter
from qconv.runtime.output_origins import OutputOrigin
from qconv.runtime.outputs import ModelOutput, OutputKind
from qconv.runtime.session import Session
from tests.support.models import ints, network

SCORES, MAP, NUMBERS = OutputKind.CLASS_SCORES, OutputKind.CLASS_MAP, OutputKind.REGRESSION
IDS, VECTOR, POINTS = OutputKind.CLASS_IDS, OutputKind.EMBEDDING, OutputKind.KEYPOINTS

HEAD = "p = GlobalAveragePool(x) f = Flatten(p) "


def session(body: str, task: str = "auto", x: tuple[int | str, ...] = ("N", 3, 8, 8), **constants: object) -> Session:
    proto = network(body, x=x, outputs=("y",), **constants)  # type: ignore[arg-type]
    return open_original(Source("the test's model", None, proto.SerializeToString()), 1, Tasks(task))


def output(
    body: str, task: str = "auto", x: tuple[int | str, ...] = ("N", 3, 8, 8), **constants: object
) -> ModelOutput:
    (found,) = session(body, task, x, **constants).model_outputs
    return found


NORM = "s = Mul(e, e) t = ReduceSum<keepdims=1>(s, one) r = Sqrt(t) c = Max(r, small) y = Div(e, c)"


@pytest.mark.parametrize(
    ("body", "constants", "kind", "why"),
    [
        ("y = Gemm(f, w)", {"w": (3, 10)}, SCORES, "10 numbers a picture behind Gemm"),
        ("y = Gemm(f, w)", {"w": (3, 1)}, SCORES, "1 number"),
        ("g = Gemm(f, w) y = Softmax(g)", {"w": (3, 128)}, SCORES, "behind Softmax"),
        ("g = Gemm(f, w) e = Exp(g) t = ReduceSum<keepdims=1>(e, one) y = Div(e, t)", {"w": (3, 128)}, SCORES, "Softm"),
        ("g = Gemm(f, w) y = Relu(g)", {"w": (3, 10)}, SCORES, "behind Gemm"),
        ("g = MatMul(f, w) y = Add(b, g)", {"w": (3, 10), "b": (10,)}, SCORES, "behind MatMul"),
        ("g = Gemm(f, w) y = LpNormalization(g)", {"w": (3, 10)}, VECTOR, "L2 norm"),
        ("e = Gemm(f, w) r = ReduceL2<axes=[1]>(e) y = Div(e, r)", {"w": (3, 10)}, VECTOR, "L2 norm"),
        (f"e = Gemm(f, w) {NORM}", {"w": (3, 10), "small": 1e-9}, VECTOR, "L2 norm"),
        ("y = Gemm(f, w)", {"w": (3, 512)}, VECTOR, "power of two, 512"),
        (
            "g = Gemm(f, w) y = BatchNormalization(g, b, b, b, b)",
            {"w": (3, 10), "b": np.ones(10, np.float32)},
            VECTOR,
            "BatchNorm",
        ),
    ],
)
def test_vectors(body: str, constants: dict[str, object], kind: OutputKind, why: str) -> None:
    found = output(HEAD + body, one=ints(1), **constants)
    assert found.kind is kind, found.why
    assert why in found.why


@pytest.mark.parametrize(
    ("body", "constants", "kind"),
    [
        ("y = Conv(x, w)", {"w": (21, 3, 3, 3)}, MAP),
        ("y = Conv(x, w)", {"w": (3, 3, 1, 1)}, MAP),  # a classifier of pixels
        ("y = Conv<pads=[1, 1, 1, 1]>(x, w)", {"w": (3, 3, 3, 3)}, NUMBERS),  # a picture
        ("c = Conv<pads=[1, 1, 1, 1]>(x, w) y = Softmax<axis=1>(c)", {"w": (3, 3, 3, 3)}, MAP),
        ("c = Conv<strides=[2, 2], pads=[1, 1, 1, 1]>(x, w) y = Add(c, b)", {"w": (3, 3, 3, 3), "b": 1.0}, MAP),
        ("c = Conv<pads=[1, 1, 1, 1]>(x, w) y = Add(c, x)", {"w": (3, 3, 3, 3)}, NUMBERS),  # a residual
        ("c = Conv(x, w) y = Resize(c, , scales)", {"w": (3, 3, 1, 1), "scales": (1.0, 1.0, 2.0, 2.0)}, MAP),
        ("c = Conv(x, w) y = Sigmoid(c)", {"w": (1, 3, 3, 3)}, MAP),  # foreground or not
        (
            "c = Conv(x, w) t = Sigmoid(c) y = Resize(t, , scales)",
            {"w": (1, 3, 3, 3), "scales": (1.0, 1.0, 2.0, 2.0)},
            MAP,
        ),
        ("y = Conv(x, w)", {"w": (1, 3, 1, 1)}, MAP),  # logits of every pixel
        ("c = Conv(x, w) y = Relu(c)", {"w": (1, 3, 1, 1)}, NUMBERS),  # a depth
        ("y = Conv<pads=[1, 1, 1, 1]>(x, w)", {"w": (1, 3, 3, 3)}, NUMBERS),
        ("y = Conv<strides=[2, 2]>(x, w)", {"w": (1, 3, 1, 1)}, NUMBERS),  # a density, smaller than the picture
        ("a = Conv(x, w) b = Sigmoid(a) y = Concat<axis=1>(a, b)", {"w": (21, 3, 1, 1)}, NUMBERS),  # a detector's
        ("c = Conv(x, w) y = GlobalAveragePool(c)", {"w": (1000, 3, 1, 1)}, SCORES),
        ("c = Conv(x, w) y = GlobalAveragePool(c)", {"w": (1280, 3, 1, 1)}, VECTOR),  # pooled features
    ],
)
def test_maps(body: str, constants: dict[str, object], kind: OutputKind) -> None:
    constants = {name: np.array(c, np.float32) if name == "scales" else c for name, c in constants.items()}
    found = output(body, **constants)
    assert found.kind is kind, found.why


def test_three_channels_of_a_grey_picture_are_no_picture() -> None:
    body = "y = Conv<pads=[1, 1, 1, 1]>(x, w)"
    assert output(body, x=("N", 1, 8, 8), w=(3, 1, 3, 3)).kind is MAP


def test_channels_that_come_last_are_the_classes() -> None:
    """As tf2onnx writes a segmenter: axes change places at both ends."""
    body = "t = Transpose<perm=[0, 3, 1, 2]>(x) c = Conv(t, w) y = Transpose<perm=[0, 2, 3, 1]>(c)"
    found = output(body, x=("N", 8, 8, 3), w=(5, 3, 1, 1))
    assert (found.kind, found.axis, found.classes) == (MAP, 3, 5)


def test_other_types_and_shapes() -> None:
    assert output("y = ArgMax(x)").kind is OutputKind.INTEGER  # over pictures
    assert output("y = ArgMax<axis=3>(x)", x=("N", 4, 8, 8)).kind is OutputKind.INTEGER  # a column of each row
    assert output(f"{HEAD} y = ArgMax<axis=1>(f)").kind is OutputKind.INTEGER  # of a picture
    assert output("y = ReduceMean<axes=[2, 3]>(x)").kind is SCORES  # 3 numbers may be classes
    assert output("y = ReduceMean<axes=[3], keepdims=0>(x)").kind is NUMBERS
    chosen = "p = ReduceMax<axes=[1], keepdims=0>(f) z = NonZero(p) t = Transpose(z) y = GatherND(f, t)"
    assert output(f"f = Flatten(x) {chosen}").kind is NUMBERS  # rows by data are no pictures
    assert output(f"{HEAD} y = Gather<axis=1>(f, j)", j=np.array([0, 2])).kind is SCORES


@pytest.mark.parametrize("tail", ["", "axis", "bytes", "floats"])
def test_argmax_over_channels_gives_a_class_for_every_place(tail: str) -> None:
    body = f"a = ArgMax<axis=1, keepdims={int(tail == 'axis')}>(x) "
    body += f"y = Cast<to={2 if tail == 'bytes' else 1}>(a)" if tail in ("bytes", "floats") else "y = Identity(a)"
    found = output(body, x=("N", 5, 8, 6))
    assert (found.kind, found.fact.task) == (IDS, "segment")
    ids = np.arange(48).reshape((1, 1, 8, 6) if tail == "axis" else (1, 8, 6))
    assert found.seen(ids.shape).labels(ids).tolist() == ids.reshape(1, 8, 6).tolist()


def test_the_user_says_that_integers_are_classes_of_places() -> None:
    body = "r = Round(x) y = Cast<to=6>(r)"
    assert output(body, x=("N", 1, 8, 8)).kind is OutputKind.INTEGER
    assert output(body, "segment", x=("N", 1, 8, 8)).kind is IDS


@pytest.mark.parametrize(
    ("body", "below", "above"),
    [("y = Sigmoid(c)", 0.4, 0.6), ("y = Identity(c)", -0.1, 0.1), ("y = Clip(c, z, o)", 0.4, 0.6)],
)
def test_one_channel_says_foreground_above_its_threshold(body: str, below: float, above: float) -> None:
    """0.5 of what is a probability, 0 of logits."""
    constants = {"z": 0.0, "o": 1.0} if "Clip" in body else {}
    found = output(f"c = Conv(x, w) {body}", "segment", w=(1, 3, 3, 3), **constants).seen((1, 1, 1, 2))
    assert (found.kind, found.classes) == (MAP, 2)
    assert found.labels(np.float32([[[[below, above]]]])).tolist() == [[[0, 1]]]


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("output_iris", (1, 15), POINTS),
        ("eyes_contours_and_brows", (1, 213), POINTS),
        ("ld_landmarks", (1, 1, 1, 63), POINTS),
        ("faceLandmarks", (1, 68, 2), POINTS),
        ("kpts", (1, 17, 3), POINTS),
        ("joints", (1, 48), POINTS),
        ("keypoint_heatmaps", (1, 17, 64, 48), POINTS),
        ("heatmap", (1, 17, 64, 48), POINTS),
        ("heatmap", (1, 1, 64, 48), NUMBERS),  # a single one may be anything
        ("landmark_scores", (1, 68), SCORES),
        ("iris_class", (1, 4), SCORES),
        ("iris", (1, 3), SCORES),  # three flowers
        ("landmarks", (1, 67), SCORES),  # no multiple of 2 or 3
        ("contours", (1, 4, 64, 48), MAP),
        ("disjoint", (1, 48), SCORES),
        ("landms", (1, 16800, 10), NUMBERS),
        ("output", (1, 17, 64, 48), MAP),
    ],
)
def test_names_tell_keypoints(name: str, shape: tuple[int, ...], kind: OutputKind) -> None:
    found = ModelOutput(name, True, shape)
    assert found.kind is kind, found.why


def test_metadata_tell_keypoints() -> None:
    assert ModelOutput("output", True, (1, 17, 64, 48), metadata_task="pose").kind is POINTS
    assert ModelOutput("output", True, (1, 34), metadata_task="pose").kind is POINTS
    assert ModelOutput("output", True, (1, 34), metadata_task="classify").kind is SCORES
    assert "pose" in ModelOutput("output", True, (1, 34), metadata_task="pose").why


def test_a_softmax_makes_no_coordinates() -> None:
    proto = network(HEAD + "g = Gemm(f, w) joints = Softmax(g)", x=("N", 3, 8, 8), outputs=("joints",), w=(3, 4))
    (found,) = open_original(Source("the test's model", None, proto.SerializeToString()), 1).model_outputs
    assert found.kind is SCORES


def test_the_name_of_a_depth_is_no_foreground() -> None:
    origin = OutputOrigin(("Sigmoid", "Conv"), 9)
    for name, kind in (("alpha", MAP), ("disp_0", NUMBERS), ("depth", NUMBERS)):
        assert ModelOutput(name, True, (1, 1, 8, 8), (1, 3, 8, 8), origin).kind is kind
    assert ModelOutput("mask", True, (1, 1, 8, 8), (1, 1, 8, 8), OutputOrigin(("Conv",), 9)).kind is MAP


def test_quantized_files_are_told_as_float_ones_are() -> None:
    """Quantizers behind the layer, and weights behind a dequantizer, change nothing."""
    quantize = "q = QuantizeLinear(g, s, z) y = DequantizeLinear(q, s, z)"
    body = f"{HEAD} v = DequantizeLinear(w, s, z) g = Gemm(f, v) {quantize}"
    found = output(body, w=np.ones((3, 10), np.int8), s=0.1, z=np.array(0, np.int8))
    assert (found.kind, found.origin and found.origin.operators) == (SCORES, ("Gemm",))


def test_without_operators_the_shape_alone_tells() -> None:
    assert ModelOutput("y", True, (1, 512)).kind is SCORES
    assert ModelOutput("y", True, ()).seen((1, 10)).kind is SCORES
    assert ModelOutput("y", True, (1, 3, 64, 64)).kind is NUMBERS


@pytest.mark.parametrize(
    ("body", "w", "task", "kind"),
    [
        (HEAD + "y = Gemm(f, w)", (3, 512), "classify", SCORES),
        (HEAD + "y = Gemm(f, w)", (3, 10), "regress", NUMBERS),
        ("y = Conv(x, w)", (3, 3, 3, 3), "segment", MAP),
        ("y = Conv(x, w)", (21, 3, 3, 3), "regress", NUMBERS),
        ("y = Conv(x, w)", (1, 3, 3, 3), "segment", MAP),
        ("y = Conv(x, w)", (17, 3, 3, 3), "keypoints", POINTS),
        (HEAD + "y = Gemm(f, w)", (3, 10), "embed", VECTOR),
    ],
)
def test_the_user_settles_it(body: str, w: tuple[int, ...], task: str, kind: OutputKind) -> None:
    found = output(body, task, w=w)
    assert found.kind is kind
    assert found.why == f"--task {task}"


@pytest.mark.parametrize(("body", "task"), [("y = Relu(x)", "classify"), (HEAD + "y = Relu(f)", "segment")])
def test_a_task_that_no_output_can_hold(body: str, task: str) -> None:
    with pytest.raises(QconvError, match=f"--task {task} needs"):
        output(body, task)


@pytest.mark.parametrize(
    ("classes", "task", "cropped"), [(10, "auto", True), (512, "auto", False), (512, "classify", True)]
)
def test_an_embedding_gets_no_centre_crop(tmp_path: Path, classes: int, task: str, cropped: bool) -> None:
    from PIL import Image

    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    found = session(HEAD + "y = Gemm(f, w)", task, w=(3, classes))
    feed = DataLoader.of(found, DataOptions((str(tmp_path),)), Reporter())
    assert feed.preprocessing is not None
    assert ("centre crop" in feed.preprocessing.in_words()) is cropped
