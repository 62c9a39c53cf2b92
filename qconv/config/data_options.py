"""Defines `DataOptions`: which images a command reads, and how a network is fed with them.

Presets of published preprocessing, what the user says, and both joined; pixels are computed in `data/preprocessing`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconv.config.choices import (
    NO_IMAGES,
    as_json_value,
    as_member,
    option_name,
    require,
    require_finite,
    require_range,
    require_size,
    take_types,
)
from qconv.config.tasks import Tasks
from qconv.errors import QconvError

if TYPE_CHECKING:
    from qconv.data.dataset import ArraySamples
else:
    ArraySamples = object  # data stands above, and types of fields are looked up


class Color(StrEnum):
    """Channel order that the network was trained with."""

    RGB = "rgb"
    BGR = "bgr"
    GREY = "grey"


class Layout(StrEnum):
    """Axis order of the network's input."""

    NCHW = "nchw"
    NHWC = "nhwc"


class ResizeFilter(StrEnum):
    """Interpolation used when a picture is resized."""

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


class LetterboxAlign(StrEnum):
    """Where a letterboxed picture lies in the network's input."""

    CENTER = "center"
    TOP_LEFT = "top-left"


@dataclass(frozen=True, slots=True)
class Preset:
    """A published normalisation: `(pixel * scale - mean) / std` on pixels 0 to 255."""

    color: Color
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


PRESETS: dict[str, Preset] = {
    "imagenet": Preset(Color.RGB, 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "tf": Preset(Color.RGB, 1 / 127.5, (1.0,), (1.0,)),
    "caffe": Preset(Color.BGR, 1.0, (103.939, 116.779, 123.68), (1.0,)),
    "unit": Preset(Color.RGB, 1 / 255, (0.0,), (1.0,)),
    "raw": Preset(Color.RGB, 1.0, (0.0,), (1.0,)),
}

LETTERBOX = "letterbox"

RESIZE_MODES = ("auto", "exact", LETTERBOX)
"""How the size is reached, where it is no shorter side in pixels."""

LETTERBOX_GREY = 114
"""The padding of the YOLO families."""

AUTO = "auto"
"""In place of a preset: find out which."""

LARGEST_PLAUSIBLE_INPUT = 1000.0
"""What no network is trained on; pixels as they are end at 255."""

CROP_SHARE = 0.875  # 224 of 256: the share of the shorter side that ImageNet evaluation keeps


@dataclass(frozen=True, slots=True)
class PreprocessingOptions:
    """What the user said about the pictures; None where the preset or the model decides.

    preset: a name in PRESETS, or "auto" (as None) to find out which fits the model.
    resize: "exact", "letterbox" or the shorter side in pixels, then the centre is cropped; "auto" as the model tells,
        or else as its outputs ask for.
    filter: None for bilinear, where the model tells no other.
    size: (height, width) where the model leaves them open.
    letterbox_align, letterbox_fill: where a letterboxed picture lies, and the grey beside it, 0 to 255; None for the
        centre and for LETTERBOX_GREY, where the model tells no others. Other ways of resizing have neither, see
        `require_letterbox`.
    """

    preset: str | None = AUTO
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    color: Color | None = None
    layout: Layout | None = None
    resize: str | int = "auto"
    filter: ResizeFilter | None = None
    size: tuple[int, int] | None = None
    letterbox_align: LetterboxAlign | None = None
    letterbox_fill: int | None = None

    def __post_init__(self) -> None:
        take_types(self, {"preset": "--preprocess"})
        object.__setattr__(self, "preset", self.preset or AUTO)
        kinds = {"color": Color, "layout": Layout, "filter": ResizeFilter, "letterbox_align": LetterboxAlign}
        for name, kind in kinds.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_member(kind, getattr(self, name), option_name(name)))
        known = (AUTO, *PRESETS)
        require(self.preset in known, f"--preprocess {self.preset}", f"use one of {', '.join(known)}.")
        require_size(self.size)
        scale = None if self.scale is None else (self.scale,)
        for option, numbers in (("--scale", scale), ("--mean", self.mean), ("--std", self.std)):
            require_finite(option, numbers)
        if self.scale == 0:
            raise QconvError("--scale is zero: all pictures would look the same.", "give another number, as 1/255.")
        if self.std is not None and 0 in self.std:
            raise QconvError("--std has a zero: pixels cannot be divided by it.", "give a positive number a channel.")
        if isinstance(self.resize, int):
            require(self.resize >= 1, f"--resize {self.resize}", "use at least 1 pixel.")
        else:
            fix = f"use {', '.join(RESIZE_MODES)} or a number of pixels."
            require(self.resize in RESIZE_MODES, f"--resize {self.resize}", fix)
        require_range("--letterbox-fill", self.letterbox_fill, 0, 255)
        for name in LETTERBOX_OPTIONS:
            idle = self.resize not in (AUTO, LETTERBOX) and getattr(self, name) is not None
            require(not idle, f"{option_name(name)} with --resize {self.resize}", "pass --resize letterbox with it.")

    @property
    def given(self) -> dict[str, Any]:
        """What the user has said, by the names of its parts."""
        return {part.name: value for part in fields(self) if (value := getattr(self, part.name)) != part.default}

    def name_beside(self, origin: str) -> str:
        """Where a preprocessing comes from, with the options that are given beside the preset. origin: in words."""
        own = [option_name(name) for name in self.given if name != "preset"]
        return f"{origin}, with {' and '.join(own)}" if own else origin


LETTERBOX_OPTIONS = ("letterbox_align", "letterbox_fill")
"""What is said of a letterbox alone."""

NO_LETTERBOX: dict[str, Any] = dict.fromkeys(LETTERBOX_OPTIONS)


def merge_options(said: PreprocessingOptions, told: PreprocessingOptions) -> PreprocessingOptions:
    """The user's options win over what is told; another preset also replaces the numbers of the old one.

    What is said of a letterbox is dropped where pictures are resized otherwise: `require_letterbox` refuses that.
    """
    changed = said.given
    if "preset" in changed:
        told = replace(told, preset=None, scale=None, mean=None, std=None, color=None)
    if "resize" in changed and said.resize != told.resize:
        told = replace(told, resize=said.resize, **NO_LETTERBOX)
    if told.resize not in (AUTO, LETTERBOX):
        changed |= NO_LETTERBOX
    return replace(told, **changed)


def require_letterbox(said: PreprocessingOptions, resize: str | int, why: str) -> None:
    """Raise QconvError where the user speaks of a letterbox, and pictures are not letterboxed.

    resize: how they are resized in the end. why: what says so, in words.
    """
    idle = " and ".join(option_name(name) for name in LETTERBOX_OPTIONS if getattr(said, name) is not None)
    if idle and resize != LETTERBOX:
        fact = f"{idle} is not possible: pictures are not letterboxed but resized by --resize {resize}, {why}."
        raise QconvError(fact, "pass --resize letterbox with it, or leave it out.")


@dataclass(frozen=True, slots=True)
class EmbeddedNormalization:
    """A normalisation that a file does itself: `(pixel * scale - mean) / std`. layout: that of the float network."""

    preset: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: Layout


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The preprocessing in full, as it will be done: `(pixel * scale - mean) / std` after resizing.

    mean and std have one entry, or one a channel, in the channel order of `color`. size is (height, width).
    class_vector: the network's output is one score a class, which decides what "auto" resizing means.
    embedded: the normalisation that is inside the file, which then takes the pixels themselves, as uint8; else None.
    letterbox_align, letterbox_fill: for `resize` letterbox, and without effect on others.
    """

    preset: str
    source: str
    color: Color
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: Layout
    resize: str | int
    filter: ResizeFilter
    size: tuple[int, int]
    class_vector: bool
    embedded: EmbeddedNormalization | None = None
    letterbox_align: LetterboxAlign = LetterboxAlign.CENTER
    letterbox_fill: int = LETTERBOX_GREY

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return 1 if self.color is Color.GREY else 3

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of a batch of one, in this layout."""
        height, width = self.size
        return (1, self.channels, height, width) if self.layout is Layout.NCHW else (1, height, width, self.channels)

    @property
    def keeps_pixels(self) -> bool:
        """Whether pixels stay the numbers that they are."""
        return self.scale == 1 and not any(self.mean) and set(self.std) == {1.0}

    @property
    def as_options(self) -> PreprocessingOptions:
        """What a user would say to get this preprocessing."""
        said = {part.name: getattr(self, part.name) for part in fields(PreprocessingOptions)}
        return PreprocessingOptions(**(said if self.resize == LETTERBOX else {**said, **NO_LETTERBOX}))

    def as_pixels(self, layout: Layout) -> Preprocessing:
        """What is left to do in front of a file that normalises by itself and takes pixels in `layout`."""
        inside = EmbeddedNormalization(self.preset, self.scale, self.mean, self.std, self.layout)
        return replace(self, preset="raw", scale=1.0, mean=(0.0,), std=(1.0,), layout=layout, embedded=inside)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form; what is said of a letterbox is in it where there is one."""
        found = as_json_value(self)
        unused = () if self.resize == LETTERBOX else LETTERBOX_OPTIONS
        return {name: value for name, value in found.items() if name not in unused}

    def in_words(self) -> str:
        """One sentence for the summary."""
        height, width = self.size
        done = _format_formula(self.embedded or self)
        shape = f"{self.layout.upper()} {height}x{width}, {self._resize_in_words()}"
        if self.embedded is not None:
            return f"{self.color.upper()} pixels as they are, uint8 {shape}; inside the file: {done}; {self.source}"
        return f"{self.color.upper()} {done}, {shape}; {self.source}"

    def doubt(self) -> str:
        """Why these numbers can hardly be what the network was trained with; empty for most."""
        ends = [
            (level * self.scale - m) / s
            for level in (0.0, 255.0)
            for m, s in _mean_std_per_channel(self.mean, self.std)
        ]
        low, high = min(ends), max(ends)
        if high - low >= 0.1 and max(-low, high) <= LARGEST_PLAUSIBLE_INPUT and low <= 0 <= high:
            return ""
        return (
            f"pixels from 0 to 255 become {low:.4g} to {high:.4g}, which is unusual: --mean and --std speak of pixels "
            f"that are multiplied by --scale {self.scale:.6g} first (for pixels as they are, pass --scale 1)"
        )

    def _resize_in_words(self) -> str:
        usual = self.filter is ResizeFilter.BILINEAR
        return self._fitting_in_words() + ("" if usual else f", {self.filter} filter")

    def _fitting_in_words(self) -> str:
        if isinstance(self.resize, int):
            return f"shorter side to {self.resize}, centre crop"
        if self.resize == LETTERBOX:
            place = " to the top left" if self.letterbox_align is LetterboxAlign.TOP_LEFT else ""
            beside = "" if self.letterbox_fill == LETTERBOX_GREY else f", filled with {self.letterbox_fill}"
            return f"letterboxed{place}{beside}"
        if self.resize == "exact":
            return "stretched"
        if not self.class_vector:
            return "stretched"
        height, width = self.size
        least = tuple(round(side / CROP_SHARE) for side in self.size)
        wish = f"shorter side to {least[0]}" if height == width else f"scaled to cover {least[0]}x{least[1]}"
        return f"{wish}, centre crop (unless already {height}x{width})"


def _format_formula(done: Preprocessing | EmbeddedNormalization) -> str:
    mean, std = (", ".join(f"{v:.6g}" for v in values) for values in (done.mean, done.std))
    # 1/127.5 reads better than 0.00784314
    scale = f"1/{1 / done.scale:.6g}" if 0 < done.scale < 1 else f"{done.scale:.6g}"
    return f"(pixel x {scale} - [{mean}]) / [{std}]"


def _mean_std_per_channel(mean: tuple[float, ...], std: tuple[float, ...]) -> Iterator[tuple[float, float]]:
    """Mean and standard deviation of every channel, where either may be given for all."""
    count = max(len(mean), len(std))
    yield from zip(mean * (count // len(mean)), std * (count // len(std)), strict=True)


LABEL_OPTIONS = ("labels", "label_map", "classes")
"""What says how right models are, and shapes no file."""


@dataclass(frozen=True, slots=True)
class DataOptions:
    """Which images are read, and how they are fed. Raises QconvError for values that cannot be.

    Attributes:
        paths: Folders, images, or text files with one path a line; none where statistics or no images are used.
        samples: The most images to read; None for all. 128 by default, whichever function is given these options.
        batch: Images in a batch.
        seed: Of the draw of images, and of all else that is drawn at random.
        glob: What the name or path of a file must match; None for all files.
        preprocessing: What is said of how the network is fed.
        task: What the model is for, which decides what its outputs hold; "auto" finds it out. See `Tasks`.
        decode: FILE.py:FUNCTION that makes detections of the outputs.
        labels: Boxes or masks of the images, a file or a folder; None for none. `data.label_files` reads them.
        label_map: A file that says which class of the model each of these labels is.
        classes: A file with the classes in the order of the outputs: the names in labels, or, without such, the folders
            that images lie in, which are labels then.
        arrays: Set by functions that are given arrays, which `paths` then only names.
    """

    paths: tuple[str, ...] = ()
    samples: int | None = 128
    batch: int = 1
    seed: int = 0
    glob: str | None = None
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    task: str = "auto"
    decode: str | None = None
    labels: Path | None = None
    label_map: Path | None = None
    classes: Path | None = None
    arrays: ArraySamples | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        take_types(self, {"paths": "paths", "preprocessing": "preprocessing", "arrays": "arrays"})
        given = self.arrays is None or hasattr(self.arrays, "listing")
        require(given, "arrays in DataOptions", "pass them in place of DataOptions: [{'input': array}].")
        require("" not in self.paths, "paths with an empty text", "name folders or files.")
        hint = f"pass Recipe(data_free=True) for no images; a folder of that name is './{NO_IMAGES}', as a text."
        require(NO_IMAGES not in self.paths, f"paths with {NO_IMAGES!r}", hint)
        require(self.samples is None or self.samples >= 1, f"--samples {self.samples}", "use at least 1 picture.")
        require(self.batch >= 1, f"--batch {self.batch}", "use at least 1.")
        require(self.seed >= 0, f"--seed {self.seed}", "use 0 or more.")
        Tasks(self.task, self.decode)
        alone = self.label_map is not None and self.labels is None
        require(not alone, "--label-map without --labels", "name the labels that it is of.")

    @property
    def tasks(self) -> Tasks:
        """What is said of the model's outputs."""
        return Tasks(self.task, self.decode)

    def require_defaults(self, names: tuple[str, ...], told: str) -> None:
        """Raise QconvError where one of these options was given. told: why none can be, in the words of an error."""
        for part in fields(self):
            if part.name in names:
                idle = getattr(self, part.name) == part.default
                require(idle, f"{option_name(part.name)} {told}", "leave it out: no picture is read.")

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form of what shapes a file that is made with these images; their paths and batches do not.

        The task is in it where the user has named one.
        """
        unsaid = {"paths", "batch", "arrays", "decode", *LABEL_OPTIONS, *(["task"] if self.task == "auto" else [])}
        return {name: value for name, value in as_json_value(self).items() if name not in unsaid}
