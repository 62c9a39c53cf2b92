"""Makes networks of the YOLO families without their weights: exports of Ultralytics' own programs that find something.

python -m tests.bench.ultralytics_models FOLDER --images DIR [--only NAME]

Weights are random. Statistics of BatchNormalization are those of real pictures, so that every layer says something of
the picture. The last layers of the head are scaled: each class has logits of one mean and deviation, and the best score
of a picture lies between 0.1 and 0.9, as it does where a detector is sure of some pictures and not of others. Boxes
differ in size and shape. Everything behind the last layers, metadata too, is as the exporter writes it.

Needs packages that qconv does not: install them into an environment of their own, and run this file by its Python.

    pip install torch==2.13.0 numpy opencv-python-headless pyyaml matplotlib psutil requests polars scipy tqdm onnx \
        onnxruntime onnxslim
    pip install --no-deps ultralytics==8.4.190 ultralytics-thop yolov5==7.0.14

torchvision is not among them: Ultralytics asks for its version, and for nothing else on the way to an export.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import math
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0
PICTURES = 96
BATCH = 16
SCORES = (0.1, 0.9)
"""Best scores of the pictures with the least and the most sure one."""

BIN_SPREAD = 2.5
"""Deviation of the logits of a box's distances, where these are distributions."""

DISTANCES = (3.0, 0.7)
"""Mean and deviation of a box's distances in cells, where these are plain numbers."""


@dataclass(frozen=True)
class Network:
    """A network by Ultralytics' name of its configuration, with its number of classes and the size of its input.

    size: height and width. end_to_end: whether its head needs no suppression; the exporter takes the other one unless
    it is asked. changes: of the configuration, by key. head: arguments of the last layer.
    """

    configuration: str
    classes: int = 80
    size: tuple[int, int] = (320, 320)
    end_to_end: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    head: Sequence[Any] = ()


NETWORKS = {"yolo11n": Network("yolo11n.yaml"), "yolo26n": Network("yolo26n.yaml", end_to_end=True)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ultralytics_models", description=__doc__)
    parser.add_argument("folder", type=Path, help="where NAME.onnx are written")
    parser.add_argument("--images", type=Path, required=True, help="folder with pictures")
    parser.add_argument("--only", action="append", metavar="NAME", choices=NETWORKS, help="this network; repeatable")
    wanted = parser.parse_args()
    wanted.folder.mkdir(parents=True, exist_ok=True)
    for name, network in NETWORKS.items():
        if not wanted.only or name in wanted.only:
            pictures = read_pictures(wanted.images, network.size)
            path = wanted.folder / f"{name}.onnx"
            export(make(network, pictures), network, path)
            best = [best_score(outputs[0][0], network.classes) for outputs in run(path, pictures)]
            span = ", ".join(f"{number:.2f}" for number in np.percentile(best, [0, 25, 50, 75, 100]))
            print(f"{name}: best scores of {len(best)} pictures have the quartiles {span}")


@functools.cache
def import_ultralytics() -> Any:
    """The package, which is not allowed to install, download or ask anything, and sees no torchvision."""
    home = tempfile.mkdtemp(prefix="qconv-ultralytics-")
    os.environ |= {
        "YOLO_AUTOINSTALL": "false",
        "YOLO_OFFLINE": "true",
        "YOLO_CONFIG_DIR": home,
        "YOLO_VERBOSE": "false",
    }
    ask = importlib.metadata.version
    needed = f"0.{int(ask('torch').split('.')[1]) + 15}.0"
    importlib.metadata.version = lambda name: needed if name == "torchvision" else ask(name)
    import ultralytics

    return ultralytics


class AbsentClass(type):
    """The class of classes that are not there: each of their attributes is another one."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return AbsentClass(name, (), {})


class Absent(types.ModuleType):
    """A module that is not there: whatever is imported from it is a class that nothing calls."""

    __getattr__ = AbsentClass.__getattr__


class AbsentFinder(MetaPathFinder, Loader):
    """Imports torchvision and its parts as Absent, with what programs here call of it: suppression."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "torchvision.ops":
            from ultralytics.utils.nms import TorchNMS

            def batched_nms(boxes: Any, scores: Any, classes: Any, iou: float) -> Any:
                apart = classes[:, None].to(boxes) * (boxes.max() - boxes.min() + 1)
                return TorchNMS.nms(boxes + apart, scores, iou)

            module.nms, module.batched_nms = TorchNMS.nms, batched_nms  # type: ignore[attr-defined]


@functools.cache
def stand_in_for_torchvision() -> None:
    """Lets programs import torchvision, which is not there."""
    import_ultralytics()
    sys.meta_path.append(AbsentFinder())
    importlib.import_module("torchvision.ops")


def read_pictures(folder: Path, size: tuple[int, int]) -> Any:
    """Pictures of a folder as Ultralytics feeds them, (N, 3, *size), RGB from 0 to 1."""
    import_ultralytics()
    import cv2
    import torch
    from ultralytics.data.augment import LetterBox

    fit, found = LetterBox(size), []
    for path in sorted(folder.rglob("*.jpg"))[:PICTURES]:
        found.append(fit(image=cv2.imread(str(path)))[..., ::-1].transpose(2, 0, 1))
    return torch.from_numpy(np.ascontiguousarray(np.stack(found))).float() / 255


def make(network: Network, pictures: Any) -> Any:
    """The network in PyTorch, as `ultralytics.YOLO` or `RTDETR` holds it."""
    ultralytics = import_ultralytics()
    import torch

    torch.manual_seed(SEED)
    kind = ultralytics.RTDETR if "detr" in network.configuration else ultralytics.YOLO
    found = kind(network.configuration)
    layout = deepcopy(found.model.yaml) | {"nc": network.classes, **network.changes}
    layout["head"][-1][-1] = list(network.head) or layout["head"][-1][-1]
    inner = type(found.model)(layout, nc=network.classes, verbose=False)
    inner.names = {index: f"class {index}" for index in range(network.classes)}
    inner.task, inner.args = found.task, found.model.args
    found.model = inner
    set_statistics(inner, pictures, inner.predict)
    inner.end2end = network.end_to_end
    scale_head(inner, pictures)
    return found


def set_statistics(model: Any, pictures: Any, predict: Callable[[Any], Any]) -> None:
    """Sets the mean and the variance of every BatchNormalization to those of the pictures. predict: runs the model."""
    import torch

    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    model.train()
    with torch.no_grad():
        for batch in pictures.split(BATCH):
            predict(batch)
    for norm in norms:
        norm.momentum = 0.03
    model.eval()


def scale_head(model: Any, pictures: Any) -> None:
    """Scales the last layers of the head by what they say of the pictures."""
    head = model.model[-1]
    if not hasattr(head, "reg_max"):
        return scale_decoder(model, pictures)
    heads = head.one2one if head.end2end else head.one2many
    for role, branches in heads.items():
        layers = [branch if not hasattr(branch, "__getitem__") else branch[-1] for branch in branches]
        for layer in layers:
            seen = list(seen_by(layer, model, pictures)) if hasattr(layer, "weight") else []
            if seen:  # what is for training alone says nothing
                standardize(layer, seen)
        if role == "box_head":
            for layer in layers:
                spread_boxes(layer, distributions=head.reg_max > 1)
    spread_scores([branch[-1] for branch in heads["cls_head"]], model, pictures)
    return None


def scale_decoder(model: Any, pictures: Any) -> None:
    """The same for RT-DETR, whose last decoder layer says scores."""
    layer = model.model[-1].dec_score_head[-1]
    spread_scores([layer], model, pictures)


def seen_by(layer: Any, model: Any, pictures: Any) -> Iterator[Any]:
    """What a layer says of each batch."""
    import torch

    heard: list[Any] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: heard.append(output.detach()))
    with torch.no_grad():
        for batch in pictures.split(BATCH):
            heard.clear()
            model.predict(batch)
            yield from heard[-1:]
    hook.remove()


def standardize(layer: Any, seen: list[Any]) -> None:
    """Changes a layer so that each of its channels has mean 0 and deviation 1 over all places."""
    import torch

    values = torch.cat([batch.transpose(0, 1).flatten(1) for batch in seen], dim=1)
    gain = 1 / values.std(dim=1).clamp(min=1e-6)
    with torch.no_grad():
        layer.weight *= gain.reshape(-1, *[1] * (layer.weight.ndim - 1))
        layer.bias.copy_((layer.bias - values.mean(dim=1)) * gain)


def spread_boxes(layer: Any, *, distributions: bool) -> None:
    import torch

    mean, spread = (0.0, BIN_SPREAD) if distributions else DISTANCES
    with torch.no_grad():
        layer.weight *= spread
        layer.bias.copy_(layer.bias * spread + mean)


def spread_scores(layers: list[Any], model: Any, pictures: Any) -> None:
    """Changes the last layers of classes so that best scores of the pictures span SCORES."""
    import torch

    every = [list(seen_by(layer, model, pictures)) for layer in layers]
    best = torch.stack([torch.cat([batch.flatten(1).amax(1) for batch in seen]) for seen in every]).amax(0)
    low, high = (math.log(score / (1 - score)) for score in SCORES)
    gain = float((high - low) / (best.max() - best.min()))
    with torch.no_grad():
        for layer in layers:
            layer.weight *= gain
            layer.bias.copy_((layer.bias - best.max()) * gain + high)


def export(made: Any, network: Network, path: Path, **options: Any) -> None:
    """Writes an ONNX file by Ultralytics' exporter. options: of its `export`."""
    with tempfile.TemporaryDirectory(prefix="qconv-export-") as folder:
        made.model.pt_path = made.ckpt_path = str(Path(folder) / "network.pt")
        options |= {"nms": False} if network.end_to_end else {}
        written = made.export(format="onnx", imgsz=list(network.size), verbose=False, **options)
        shutil.move(written, path)


def run(path: Path, pictures: Any) -> Iterator[list[Any]]:
    """What a file says of each picture."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    for picture in pictures:
        yield session.run(None, {"images": picture[None].numpy()})


def best_score(output: Any, classes: int) -> float:
    """Of one picture's rows, in the form that the exporter gives them."""
    rows_of_boxes = output.shape[0] > output.shape[1]
    return float(output[:, 4].max() if rows_of_boxes else output[4 : 4 + classes].max())


if __name__ == "__main__":
    main()
