"""Makes references of the decoders of YOLO and DETR: outputs of networks, and what their own programs find in them.

python -m tests.bench.decoder_references_yolo --images DIR [--out DIR] [--only NAME]

Runs by the Python of an environment with the packages that `tests.bench.ultralytics_models` names, and with

    pip install --no-deps transformers==5.24.0 "setuptools<81"
    pip install --no-deps --no-build-isolation yolox==0.3.0 yolov7detect==1.0.1
    pip install loguru tabulate regex safetensors tokenizers huggingface_hub pandas seaborn gitpython

Each network has random weights, and BatchNormalization statistics of real pictures. It is small: 3 classes, 64x96
pixels. Networks of Ultralytics are run as its exporter writes them. Suppression is what the family evaluates with:

    Ultralytics 8.4    DetectionValidator.postprocess: all classes of a row, IoU 0.7, ProbIoU for rotated boxes
    YOLOv5, YOLOv7     non_max_suppression as in val.py: all classes of a row, IoU 0.6
    YOLOX              postprocess: the best class of a row, IoU 0.65; at a score that no second class reaches
    DETR, RT-DETR      transformers' post_process_object_detection
    RT-DETR, 8.3       RTDETRValidator.postprocess, for the form that Ultralytics wrote to 8.4.46: `rtdetr_scores` is
                       made where ultralytics==8.3.240 is the first on PYTHONPATH (without the folder tests that its
                       wheel brings), all others with 8.4

Prints what qconv makes of them: how many boxes there are, and by how much they differ.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.bench.ultralytics_models import (
    Network,
    export,
    make,
    read_pictures,
    run,
    set_statistics,
    stand_in_for_torchvision,
    standardize,
)
from tests.support.decoder_references import FOLDER, DecoderReference, differences

SIZE = (64, 96)
SIZE_OF_RTDETR = (128, 160)
"""With more cells than RT-DETR has queries."""

CLASSES = 3
LEAST = 0.1
MOST = 50
"""Rows of an end-to-end head, so that files stay small."""

TOLD = ("task", "names", "stride", "kpt_shape", "end2end", "imgsz", "head", "args")
"""What is kept of metadata."""

ULTRALYTICS = {
    "yolov8n": ("YOLOv8", Network("yolov8n.yaml", CLASSES, SIZE)),
    "yolov9t": ("YOLOv8", Network("yolov9t.yaml", CLASSES, SIZE)),
    "yolo11n": ("YOLOv8", Network("yolo11n.yaml", CLASSES, SIZE)),
    "yolo12n": ("YOLOv8", Network("yolo12n.yaml", CLASSES, SIZE)),
    "yolo11n-seg": ("YOLOv8", Network("yolo11n-seg.yaml", CLASSES, SIZE, head=("nc", 8, 64))),
    "yolo11n-pose": ("YOLOv8", Network("yolo11n-pose.yaml", 1, SIZE, changes={"kpt_shape": [5, 3]})),
    "yolo11n-pose2": ("YOLOv8", Network("yolo11n-pose.yaml", 1, SIZE, changes={"kpt_shape": [4, 2]})),
    "yolo11n-obb": ("YOLOv8", Network("yolo11n-obb.yaml", CLASSES, SIZE)),
    "yolo26n-suppressed": ("YOLOv8", Network("yolo26n.yaml", CLASSES, SIZE)),
    "yolov10n": ("YOLOv10/26", Network("yolov10n.yaml", CLASSES, SIZE, end_to_end=True)),
    "yolo26n": ("YOLOv10/26", Network("yolo26n.yaml", CLASSES, SIZE, end_to_end=True)),
    "yolo26n-seg": ("YOLOv10/26", Network("yolo26n-seg.yaml", CLASSES, SIZE, end_to_end=True, head=("nc", 8, 64))),
    "yolo26n-pose": (
        "YOLOv10/26",
        Network("yolo26n-pose.yaml", 1, SIZE, end_to_end=True, changes={"kpt_shape": [5, 3]}),
    ),
    "yolo26n-obb": ("YOLOv10/26", Network("yolo26n-obb.yaml", CLASSES, SIZE, end_to_end=True)),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.decoder_references_yolo", description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder with pictures")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--only", action="append", metavar="NAME", help="this one; repeatable")
    wanted = parser.parse_args()
    stand_in_for_torchvision()
    pictures = read_pictures(wanted.images, SIZE)
    old = version_of("ultralytics").startswith("8.3")
    for name, make_reference in MAKERS.items():
        if (not wanted.only or name in wanted.only) and old == (name == "rtdetr_scores"):
            reference = make_reference(pictures)
            reference.save(wanted.out / f"{name}.npz")
            print(f"{name}: {words_on(reference)}", flush=True)


def words_on(reference: DecoderReference) -> str:
    """How many boxes are published, and by how much qconv's differ from them."""
    try:
        most = differences(reference)
    except AssertionError as error:
        return f"differs: {error}"
    boxes = sum(len(found["scores"]) for found in reference.published)
    return f"{boxes} boxes; apart by {', '.join(f'{kind} {apart:.2g}' for kind, apart in most.items())}"


def version_of(package: str) -> str:
    return importlib.metadata.version(package)


def as_tensor(array: Any) -> Any:
    import torch

    return torch.from_numpy(np.array(array))


# -- Ultralytics -------------------------------------------------------------------------------------------------------


def of_ultralytics(family: str, network: Network, pictures: Any) -> DecoderReference:
    """An export, and what DetectionValidator finds."""
    import onnx

    with tempfile.TemporaryDirectory(prefix="qconv-references-") as folder:
        path = Path(folder) / "network.onnx"
        export(make(network, pictures), network, path, **({"max_det": MOST} if network.end_to_end else {}))
        names = [output.name for output in onnx.load(path).graph.output]
        outputs = dict(zip(names, most_sure(list(run(path, pictures)), network), strict=True))
        metadata = {p.key: p.value for p in onnx.load(path).metadata_props if p.key in TOLD}
    by = f"ultralytics {version_of('ultralytics')}, DetectionValidator.postprocess"
    published = validated(outputs, metadata, network)
    return DecoderReference(family, by, LEAST, network.size, outputs, published, metadata)


def most_sure(runs: list[list[Any]], network: Network) -> list[Any]:
    """Outputs of the pictures with the highest score, as one batch: two, or one where rows are long."""
    columns = np.s_[..., 4] if network.end_to_end else np.s_[:, 4 : 4 + network.classes]
    best = [outputs[0][columns].max() for outputs in runs]
    chosen = np.argsort(best)[::-1][: 1 if network.head or network.changes else 2]
    return [np.concatenate([runs[index][place] for index in chosen]) for place in range(len(runs[0]))]


def validated(outputs: dict[str, Any], metadata: dict[str, str], network: Network) -> list[dict[str, Any]]:
    from ultralytics.models.yolo.detect.val import DetectionValidator
    from ultralytics.utils import ops

    task = metadata["task"]
    options = {"conf": LEAST, "iou": 0.7, "task": task, "max_det": 300, "single_cls": False, "agnostic_nms": False}
    validator = SimpleNamespace(args=SimpleNamespace(**options), nc=network.classes, end2end=network.end_to_end)
    found = []
    for index, result in enumerate(DetectionValidator.postprocess(validator, as_tensor(outputs["output0"]))):
        boxes, extra = result["bboxes"], result["extra"]
        image = {"boxes": boxes, "scores": result["conf"], "classes": result["cls"]}
        if task == "obb":
            corners = ops.xywhr2xyxyxyxy(np.concatenate([boxes, extra], axis=1))
            image |= {"corners": corners, "boxes": np.concatenate([corners.min(1), corners.max(1)], axis=1)}
        if task == "pose":
            points = extra.reshape(len(boxes), *network.changes["kpt_shape"]).numpy()
            visible = np.ones((*points.shape[:2], 3 - points.shape[2]), np.float32)
            image["keypoints"] = np.concatenate([points, visible], axis=-1)
        if task == "segment":
            prototypes = as_tensor(outputs["output1"][index])
            image["masks"] = ops.process_mask(prototypes, extra, boxes, network.size).bool()
        found.append({kind: np.asarray(array) for kind, array in image.items()})
    return found


def rtdetr(pictures: Any) -> DecoderReference:
    """RT-DETR as it is exported, in the form of the version that is installed."""
    import torch
    from ultralytics.models.rtdetr.val import RTDETRValidator

    pictures = torch.nn.functional.interpolate(pictures, SIZE_OF_RTDETR)
    made = make(Network("rtdetr-resnet50.yaml", CLASSES, SIZE_OF_RTDETR), pictures)
    made.model.model[-1].export = True
    with torch.no_grad():
        rows = made.model.eval().predict(pictures[:2])
    new = rows.shape[2] == 6
    least = LEAST if new else 0.0  # 8.3.240 sorts rows and then drops those whose score was low before that
    size = list(SIZE_OF_RTDETR) if new else torch.tensor([SIZE_OF_RTDETR[1], SIZE_OF_RTDETR[0]] * 2)
    validator = SimpleNamespace(args=SimpleNamespace(conf=least, imgsz=size, max_det=300, classes=None))
    published = [
        {"boxes": found["bboxes"].numpy(), "scores": found["conf"].numpy(), "classes": found["cls"].numpy()}
        for found in RTDETRValidator.postprocess(validator, rows.clone())
    ]
    metadata = {"task": "detect", "names": str(made.model.names), "imgsz": str(list(SIZE_OF_RTDETR)), "stride": "32"}
    metadata |= {"head": "RTDETRDecoder"} if new else {}
    by = f"ultralytics {version_of('ultralytics')}, RTDETRValidator.postprocess"
    return DecoderReference("RT-DETR", by, least, SIZE_OF_RTDETR, {"output0": rows.numpy()}, published, metadata)


# -- other programs ----------------------------------------------------------------------------------------------------


def spread(layer: Any, model: Callable[[], object], means: Any, deviation: float) -> None:
    """Gives the channels of a layer these means and this deviation over all places of what `model` runs on."""
    import torch

    heard: list[Any] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: heard.append(output.detach()))
    with torch.no_grad():
        model()
        hook.remove()
        standardize(layer, heard)
        layer.weight *= deviation
        layer.bias.copy_(layer.bias * deviation + torch.as_tensor(np.resize(means, len(layer.bias))))


def yolov5(pictures: Any, kind: str) -> DecoderReference:
    """kind: "rows" for decoded boxes, "maps" for what the layers give, "seg" for decoded boxes and prototypes."""
    import torch
    import yaml
    import yolov5
    from yolov5.models.yolo import DetectionModel, SegmentationModel
    from yolov5.utils.general import non_max_suppression
    from yolov5.utils.segment.general import process_mask

    torch.manual_seed(0)
    segments, folder = kind == "seg", Path(yolov5.__file__).parent / "models"
    path = folder / "segment" / "yolov5n-seg.yaml" if segments else folder / "yolov5n.yaml"
    layout = yaml.safe_load(path.read_text())
    coefficients = 8 if segments else 0
    if segments:
        layout["head"][-1][-1] = ["nc", "anchors", coefficients, 64]
    model = (SegmentationModel if segments else DetectionModel)(layout, nc=CLASSES)
    set_statistics(SimpleNamespaceModel(model), pictures)
    head = model.model[-1]
    means = [0.0] * 4 + [-2.5] + [0.0] * (CLASSES + coefficients)
    for layer in head.m:
        spread(layer, lambda: model.eval()(pictures), means, 2.0)
    shown = pictures[: 1 if segments else 2]
    head.export = True
    with torch.no_grad():
        said = model.eval()(shown)
        rows, prototypes = said if segments else (said[0], None)
        head.export = False
        maps = model(shown)[-1]
    published = []
    for index, found in enumerate(non_max_suppression(rows.clone(), LEAST, 0.6, multi_label=True, nm=coefficients)):
        image = as_detections(found)
        if prototypes is not None:
            image["masks"] = process_mask(prototypes[index], found[:, 6:], found[:, :4], SIZE).bool().numpy()
        published.append(image)
    outputs = {"output0": rows.numpy()} | ({"output1": prototypes.numpy()} if segments else {})
    if kind == "maps":
        outputs = {f"map{index}": grid.numpy() for index, grid in enumerate(maps)}
    by = f"yolov5 {version_of('yolov5')}, non_max_suppression"
    metadata = {} if kind == "maps" else {"stride": "32", "names": str(dict(enumerate("abc")))}
    return DecoderReference("YOLOv5/v7", by, LEAST, SIZE, outputs, published, metadata)


class SimpleNamespaceModel:
    """A model of YOLOv5 or YOLOX under the names of Ultralytics' models."""

    def __init__(self, model: Any) -> None:
        self.modules, self.train, self.eval, self.predict = model.modules, model.train, model.eval, model


def as_detections(found: Any) -> dict[str, Any]:
    """Rows of box, score, class and more, by kind."""
    rows = np.array(found)
    return {"boxes": rows[:, :4], "scores": rows[:, 4], "classes": rows[:, 5]}


def yolov7(pictures: Any) -> DecoderReference:
    """The last layer of YOLOv7, with its anchors, on random maps."""
    import torch
    from yolov7.models.yolo import Detect
    from yolov7.utils.general import non_max_suppression

    torch.manual_seed(0)
    anchors = [12, 16, 19, 36, 40, 28], [36, 75, 76, 55, 72, 146], [142, 110, 192, 243, 459, 401]
    head, strides = Detect(CLASSES, anchors, (16, 16, 16)).eval(), (8, 16, 32)
    head.stride = torch.tensor([float(stride) for stride in strides])
    maps = [torch.randn(2, 16, SIZE[0] // stride, SIZE[1] // stride) for stride in strides]
    for layer, grid in zip(head.m, maps, strict=True):
        spread(layer, lambda layer=layer, grid=grid: layer(grid), [0.0] * 4 + [-4.0] + [0.0] * CLASSES, 2.0)
    with torch.no_grad():
        rows = head(list(maps))[0]
    published = [as_detections(f) for f in non_max_suppression(rows.clone(), LEAST, 0.6, multi_label=True)]
    by = f"yolov7detect {version_of('yolov7detect')}, Detect and non_max_suppression"
    return DecoderReference("YOLOv5/v7", by, LEAST, SIZE, {"output": rows.numpy()}, published, {})


def yolox(pictures: Any, *, decoded: bool) -> DecoderReference:
    import torch
    from yolox.models import YOLOPAFPN, YOLOX, YOLOXHead
    from yolox.utils import postprocess

    torch.manual_seed(0)
    backbone, head = YOLOPAFPN(0.33, 0.25, depthwise=True), YOLOXHead(CLASSES, 0.25, depthwise=True)
    model = YOLOX(backbone, head)
    feed = pictures * 255
    with torch.no_grad():
        set_statistics(SimpleNamespaceModel(backbone), feed)
        head.train()  # its own layers, on what the backbone gives
        for batch in feed.split(16):
            for level, x in enumerate(backbone(batch)):
                stem = head.stems[level](x)
                head.cls_convs[level](stem)
                head.reg_convs[level](stem)
    model.eval()
    for layers, means in ((head.obj_preds, [-2.5]), (head.cls_preds, [-3.0]), (head.reg_preds, [0.0, 0.0, 0.7, 0.7])):
        for layer in layers:
            spread(layer, lambda: model(feed), means, 0.5 if len(means) == 4 else 3.0)
    with torch.no_grad():
        rows = model(feed)
        scores = rows[..., 4:5] * rows[..., 5:]
        first, second = scores.topk(2).values.amax(1).unbind(1)
        chosen = (first - second).argsort(descending=True)[:2]
        feed, rows = feed[chosen], rows[chosen]
        least = float(second[chosen].max())  # no row has two classes above it
        published = []
        for found in postprocess(rows.clone(), CLASSES, least, 0.65):
            scores = found[:, 4:5] * found[:, 5:6]
            published.append(as_detections(torch.cat([found[:, :4], scores, found[:, 6:]], 1)))
        head.decode_in_inference = decoded
        given = model(feed)
    by = f"yolox {version_of('yolox')}, postprocess"
    return DecoderReference("YOLOX", by, least, SIZE, {"output": given.numpy()}, published, {})


def detr(pictures: Any) -> DecoderReference:
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor

    config = DetrConfig(**small_transformer(), num_queries=20)
    return of_transformers("DETR", DetrForObjectDetection, DetrImageProcessor, config, pictures)


def rtdetr_pair(pictures: Any) -> DecoderReference:
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor, RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1] * 4, layer_type="basic", out_indices=[2, 3, 4]
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        num_labels=CLASSES,
        num_queries=30,
        encoder_in_channels=[24, 32, 48],
        encoder_hidden_dim=32,
        d_model=32,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        decoder_in_channels=[32] * 3,
        decoder_layers=1,
        decoder_attention_heads=4,
        encoder_attention_heads=4,
    )
    return of_transformers("RT-DETR", RTDetrForObjectDetection, RTDetrImageProcessor, config, pictures)


def small_transformer() -> dict[str, Any]:
    from transformers import ResNetConfig

    stages = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1] * 4, "layer_type": "basic"}
    return {
        "backbone_config": ResNetConfig(**stages, out_features=["stage4"]),
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "num_labels": CLASSES,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    }


def of_transformers(family: str, kind: Any, processor: Any, config: Any, pictures: Any) -> DecoderReference:
    """The decoder's weights are large and its results scaled, since queries differ by little without training.

    The class for no object, where there is one, is the highest of most queries, and most boxes lie inside the picture.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and any(part in name for part in ("decoder", "query", "bbox")):
                weight.normal_(0, 0.3)
        said = model(pixel_values=pictures[:2])
        logits = enlarged(said.logits) * 2
        logits[..., -1] += 3.0 if family == "DETR" else 0.0
        said.logits = logits
        said.pred_boxes = (enlarged(said.pred_boxes.logit()) + torch.tensor([0.0, 0.0, -2.0, -2.0])).sigmoid()
    published = processor.post_process_object_detection(None, said, LEAST, [SIZE] * 2)
    outputs = {"logits": logits.numpy(), "pred_boxes": said.pred_boxes.numpy()}
    by = f"transformers {transformers.__version__}, {processor.__name__}.post_process_object_detection"
    found = [
        {"boxes": one["boxes"].numpy(), "scores": one["scores"].numpy(), "classes": one["labels"].numpy()}
        for one in published
    ]
    return DecoderReference(family, by, LEAST, SIZE, outputs, found, {})


def enlarged(values: Any) -> Any:
    """Values (N, Q, C) with mean 0 and deviation 1 in each of C columns."""
    return (values - values.mean((0, 1))) / values.std((0, 1))


MAKERS: dict[str, Callable[[Any], DecoderReference]] = {
    **{name: functools.partial(of_ultralytics, *of) for name, of in ULTRALYTICS.items()},
    "rtdetr_scores": rtdetr,
    "rtdetr_classes": rtdetr,
    "yolov5n": functools.partial(yolov5, kind="rows"),
    "yolov5n-maps": functools.partial(yolov5, kind="maps"),
    "yolov5n-seg": functools.partial(yolov5, kind="seg"),
    "yolov7": yolov7,
    "yolox": functools.partial(yolox, decoded=True),
    "yolox-raw": functools.partial(yolox, decoded=False),
    "detr": detr,
    "rtdetr_pair": rtdetr_pair,
}


if __name__ == "__main__":
    main()
