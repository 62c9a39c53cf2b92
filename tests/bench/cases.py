"""What is measured: models, pictures, how they are fed, how they are scored.

The preprocessing is written anew in plain Pillow and numpy, so that the benchmark is no mirror of qconv's own code.
Nothing heavy is imported: the bare inference script, which is timed from its start, imports this module.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]
REPOSITORY = Path(__file__).resolve().parents[2]
LETTERBOX_GREY = 114


@dataclass(frozen=True)
class Prep:
    """value = (pixel * scale - mean) / std after resizing; pixels 0 to 255.

    resize: "stretch" to the size, "crop": shorter side to size / 0.875, then the centre, or a letterbox, grey of 114
    beside the picture: "top-left", sides rounded down, or "center", sides rounded.
    """

    size: tuple[int, int]  # height, width
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    resize: str = "stretch"
    grey: bool = False
    bgr: bool = False

    def __call__(self, path: Path) -> Array:
        """One picture as a batch of one: (1, C, H, W)."""
        with Image.open(path) as opened:
            picture = self._fitted(opened.convert("L" if self.grey else "RGB"))
        pixels = np.asarray(picture, np.float32)
        pixels = pixels[None] if self.grey else pixels.transpose(2, 0, 1)  # (C, H, W)
        pixels = pixels[::-1] if self.bgr else pixels
        mean, std = (np.asarray(values, np.float32).reshape(-1, 1, 1) for values in (self.mean, self.std))
        return np.ascontiguousarray(((pixels * np.float32(self.scale) - mean) / std)[None], np.float32)

    def _fitted(self, picture: Image.Image) -> Image.Image:
        height, width = self.size
        if picture.size == (width, height):
            return picture
        if self.resize == "stretch":
            return picture.resize((width, height), Image.Resampling.BILINEAR)
        if self.resize != "crop":
            return self._letterboxed(picture)
        assert height == width, "crop is for square inputs"
        side = round(height / 0.875)
        wide, high = picture.size
        scaled = (side, side * high // wide) if wide < high else (side * wide // high, side)
        if scaled != picture.size:
            picture = picture.resize(scaled, Image.Resampling.BILINEAR)
        left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
        return picture.crop((left, top, left + width, top + height))

    def _letterboxed(self, picture: Image.Image) -> Image.Image:
        height, width = self.size
        ratio = min(width / picture.width, height / picture.height)
        centred = self.resize == "center"
        wide, high = (round(side * ratio) if centred else int(side * ratio) for side in picture.size)
        canvas = Image.new("RGB", (width, height), (LETTERBOX_GREY,) * 3)
        place = ((width - wide) // 2, (height - high) // 2) if centred else (0, 0)
        canvas.paste(picture.resize((wide, high), Image.Resampling.BILINEAR), place)
        return canvas


@dataclass(frozen=True)
class Case:
    """One model. `options` tell qconv the same preprocessing as `prep`.

    class_scores: axis 1 of every output holds class scores, so that agreement means something.
    light: a topology of the onnx package; scored on a copy with weights of its own (see light.py). made: written by
    yolo.py.
    cost: numbers of calibration pictures to measure time and memory of the whole command with.
    """

    name: str
    model: str
    prep: Prep
    options: tuple[str, ...]
    pictures: str = "imagenet"
    calibration: int = 128
    tests: int = 100
    labels: bool = False
    class_scores: bool = True
    light: bool = False
    made: bool = False
    cost: tuple[int, ...] = ()
    most_lost: float | None = None  # points of top-1
    paired_test_excuses: bool = False  # a loss of more points is held if a paired test sees no difference

    @property
    def trained(self) -> bool:
        """Whether its weights are those of a trained network."""
        return not (self.light or self.made)

    @property
    def calibration_folder(self) -> str:
        return f"images/{self.pictures}/calib"

    @property
    def test_folder(self) -> str:
        return f"images/{self.pictures}/test"


imagenet = partial(Prep, scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
signed = partial(Prep, mean=(127.0,), std=(128.0,))
tf = partial(Prep, scale=1 / 127.5, mean=(1.0,))
SIGNED_OPTIONS = ("--preprocess", "raw", "--mean", "127", "--std", "128")
TF_OPTIONS = ("--preprocess", "tf", "--resize", "exact")


def _light(name: str) -> Case:
    prep = imagenet((224, 224), resize="crop")
    options = ("--preprocess", "imagenet", "--resize", "256")
    return Case(f"light_{name}", f"light_{name}.onnx", prep, options, calibration=32, tests=200, light=True)


CASES: tuple[Case, ...] = (
    Case(
        "resnet20",
        "resnet20_cifar10.onnx",
        imagenet((32, 32)),
        ("--preprocess", "imagenet"),
        pictures="cifar10",
        tests=2000,
        labels=True,
        cost=(128,),
        most_lost=0.3,
    ),
    Case(
        "kerascnn",
        "kerascnn_cifar10.onnx",
        Prep((32, 32)),
        ("--preprocess", "raw"),
        pictures="cifar10",
        tests=2000,
        labels=True,
    ),
    Case(
        "mobilenetv2",
        "mobilenetv2_imagenet.onnx",
        imagenet((224, 224), resize="crop"),
        ("--preprocess", "imagenet"),
        tests=400,
        labels=True,
        cost=(128,),
        most_lost=0.5,
        paired_test_excuses=True,
    ),
    Case(
        "efficientnet_lite0",
        "efficientnet_lite0_imagenet.onnx",
        signed((224, 224), resize="crop"),
        SIGNED_OPTIONS,
        tests=400,
        labels=True,
        cost=(32, 64, 128),
        most_lost=0.5,
        paired_test_excuses=True,
    ),
    Case(
        "efficientnet_b0",
        "efficientnet_b0_binary.onnx",
        imagenet((224, 224), resize="crop"),
        ("--preprocess", "imagenet"),
        tests=400,
        class_scores=False,
    ),
    Case(
        "ultraface",
        "ultraface_rfb320.onnx",
        signed((240, 320)),
        (*SIGNED_OPTIONS, "--resize", "exact"),
        class_scores=False,
    ),
    Case("rapidocr_cls", "rapidocr_cls_v2.onnx", tf((48, 192)), (*TF_OPTIONS, "--size", "48x192"), tests=400),
    Case("deeplabv3", "deeplabv3_257_mv_gpu.onnx", tf((257, 257)), TF_OPTIONS),
    Case(
        "mnist",
        "mnist.onnx",
        Prep((28, 28), scale=1 / 255, grey=True),
        ("--preprocess", "unit", "--resize", "exact"),
        pictures="cifar10",
        tests=2000,
    ),
    Case(
        "yolo_silu",
        "yolo_silu.onnx",
        Prep((256, 256), scale=1 / 255),
        ("--preprocess", "unit", "--resize", "exact"),
        class_scores=False,
        made=True,
    ),
    *map(
        _light,
        ("bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet")
        + ("squeezenet", "vgg19", "zfnet512"),
    ),
)

yolo = partial(Case, pictures="coco", calibration=96, class_scores=False)
ULTRALYTICS_OPTIONS = ("--preprocess", "unit", "--resize", "letterbox")
TASK_CASES: tuple[Case, ...] = (
    yolo(
        "yolox_nano",
        "yolox_nano.onnx",
        Prep((416, 416), resize="top-left", bgr=True),
        (*("--preprocess", "raw", "--color", "bgr"), *("--resize", "letterbox", "--letterbox-align", "top-left")),
    ),
    yolo(
        "fastestdet",
        "fastestdet.onnx",
        Prep((352, 352), scale=1 / 255, bgr=True),
        ("--preprocess", "unit", "--color", "bgr", "--resize", "exact"),
    ),
    yolo("yolo11n", "yolo11n.onnx", Prep((320, 320), scale=1 / 255, resize="center"), ULTRALYTICS_OPTIONS),
    yolo("yolo26n", "yolo26n.onnx", Prep((320, 320), scale=1 / 255, resize="center"), ULTRALYTICS_OPTIONS),
)
"""Of `make bench-tasks` alone."""


def _seeded(name: str, side: int = 224) -> Case:
    prep = imagenet((side, side), resize="crop")
    return Case(name, f"{name}.onnx", prep, ("--preprocess", "imagenet"))


SEEDED: Mapping[str, tuple[str, Case]] = {
    "mobilenetv3": ("mobilenetv3_large_100", _seeded("mobilenetv3")),
    "seeded_b0": ("efficientnet_b0", _seeded("seeded_b0")),
    "mobilenetv4": ("mobilenetv4_conv_small", _seeded("mobilenetv4")),
    "repvit": ("repvit_m0_9", _seeded("repvit")),
    "fastvit": ("fastvit_t8", _seeded("fastvit", 256)),
    "convnext": ("convnext_tiny", _seeded("convnext")),
}
"""timm's name and the case of networks that `seeded_networks` makes; of `precision` alone."""

BRANCHED: Mapping[str, tuple[str, Case]] = {
    "mobileone_branched": ("mobileone_s0", _seeded("mobileone_branched")),
    "repvgg_branched": ("repvgg_a0", _seeded("repvgg_branched")),
    "repvit_branched": ("repvit_m0_9", _seeded("repvit_branched")),
    "fastvit_branched": ("fastvit_t8", _seeded("fastvit_branched", 256)),
}
"""The same of networks in the form that they are trained in, with branches; of `branches` alone."""

BY_NAME: Mapping[str, Case] = {
    case.name: case for case in (*CASES, *TASK_CASES, *(case for _, case in (*SEEDED.values(), *BRANCHED.values())))
}


def light_file(case: Case) -> Path:
    """The model as the onnx package ships it, found without importing onnx."""
    spec = importlib.util.find_spec("onnx")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "backend/test/data/light" / case.model


def default_data() -> Path:
    """$QCONV_DATA, or shared/data beside the checkout."""
    return Path(os.environ.get("QCONV_DATA") or REPOSITORY.parent / "shared" / "data")


def require_data(data: Path) -> None:
    """Exit with an error where the folder of models and pictures is none."""
    missing = next((path for path in (data / "models", data / "images") if not path.is_dir()), None)
    if missing is not None:
        hint = "pass --data DIR or set QCONV_DATA: it holds models/ and images/."
        sys.exit(f"Error: {missing} does not exist.\nHint:  {hint}")


def pictures(folder: Path, count: int) -> list[Path]:
    """`count` pictures of a folder, or all if fewer: a seeded draw, the same on every machine."""
    found = sorted((p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg")), key=Path.as_posix)
    order = np.random.default_rng(0).permutation(len(found))[:count]
    return [found[i] for i in order]


def label(path: Path, folder: Path) -> int:
    """The rank of the picture's class folder: in classes.txt if there is one, else in alphabetical order."""
    listing = folder / "classes.txt"
    if listing.exists():
        names = listing.read_text("utf-8").split()
    else:
        names = sorted(p.name for p in folder.iterdir() if p.is_dir())
    return names.index(path.parent.name)


def linked(paths: list[Path], folder: Path) -> Path:
    """A folder of links to `paths` that keep their order, so that every tool is given the same pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, path in enumerate(paths):
        link = folder / f"{index:04}_{path.name}"
        if link.resolve() != path.resolve():
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
    return folder
