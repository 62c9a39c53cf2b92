"""Recipe: everything the user asked for, as types, frozen and validated once. No stringly option lives past it."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from os import PathLike
from typing import Any

from qconv.errors import QconvError
from qconv.targets import TARGETS


class Scheme(StrEnum):
    """Whether zero sits on a fixed code (symmetric) or where the range puts it (asymmetric)."""

    SYMMETRIC = "symmetric"
    ASYMMETRIC = "asymmetric"


class WeightGranularity(StrEnum):
    """How many weights share a scale."""

    PER_TENSOR = "per-tensor"
    PER_CHANNEL = "per-channel"
    PER_BLOCK = "per-block"


class Color(StrEnum):
    """Channel order that the network was trained with."""

    RGB = "rgb"
    BGR = "bgr"
    GREY = "grey"


class Layout(StrEnum):
    """Axis order of the network's input."""

    NCHW = "nchw"
    NHWC = "nhwc"


class Filter(StrEnum):
    """Interpolation used when a picture is resized."""

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


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
AUTO = "auto"
"""In place of a preset: find out which."""
LARGEST_INPUT = 1000.0
"""What no network is trained on; pixels as they are end at 255."""
PACKED_BITS = 4
"""Codes of up to so many bits can be stored two in a byte."""
CROP_SHARE = 0.875  # 224 of 256: the share of the shorter side that ImageNet evaluation keeps


@dataclass(frozen=True, slots=True)
class PreprocessingOptions:
    """What the user said about the pictures; None where the preset or the model decides.

    preset: a name in PRESETS, or "auto" (as None) to find out which fits the model.
    resize: "auto", "exact", "letterbox" or the shorter side in pixels, then the centre is cropped.
    size: (height, width) where the model leaves them open.
    """

    preset: str | None = AUTO
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    color: Color | None = None
    layout: Layout | None = None
    resize: str | int = "auto"
    filter: Filter = Filter.BILINEAR
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "preset", self.preset or AUTO)
        for name, kind in (("color", Color), ("layout", Layout), ("filter", Filter)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _member(kind, getattr(self, name), f"--{name}"))
        for name in ("mean", "std"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _numbers(getattr(self, name), f"--{name}"))
        if self.scale is not None:
            object.__setattr__(self, "scale", _numbers(self.scale, "--scale")[0])
        _require(isinstance(self.resize, str | int), f"--resize {self.resize}", "use a word or a number of pixels.")
        pair = isinstance(self.size, tuple) and len(self.size) == 2 and all(isinstance(n, int) for n in self.size)
        _require(self.size is None or pair, f"--size {self.size}", "use two whole numbers: height and width.")
        scale = None if self.scale is None else (self.scale,)
        for option, numbers in (("--scale", scale), ("--mean", self.mean), ("--std", self.std)):
            _require_numbers(option, numbers)
        if self.scale == 0:
            raise QconvError("--scale is zero: all pictures would look the same.", "give another number, as 1/255.")
        if self.std is not None and 0 in self.std:
            raise QconvError("--std has a zero: pixels cannot be divided by it.", "give a positive number a channel.")
        if isinstance(self.resize, int):
            _require(self.resize >= 1, f"--resize {self.resize}", "use at least 1 pixel.")


@dataclass(frozen=True, slots=True)
class Embedded:
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
    """

    preset: str
    source: str
    color: Color
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: Layout
    resize: str | int
    filter: Filter
    size: tuple[int, int]
    class_vector: bool
    embedded: Embedded | None = None

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return 1 if self.color is Color.GREY else 3

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a batch of one, in this layout."""
        height, width = self.size
        return (1, self.channels, height, width) if self.layout is Layout.NCHW else (1, height, width, self.channels)

    @property
    def keeps_pixels(self) -> bool:
        """Whether pixels stay the numbers that they are."""
        return self.scale == 1 and not any(self.mean) and set(self.std) == {1.0}

    def as_pixels(self, layout: Layout) -> Preprocessing:
        """What is left to do in front of a file that normalises by itself and takes pixels in `layout`."""
        inside = Embedded(self.preset, self.scale, self.mean, self.std, self.layout)
        return replace(self, preset="raw", scale=1.0, mean=(0.0,), std=(1.0,), layout=layout, embedded=inside)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return dict(_plain(self))

    def in_words(self) -> str:
        """One sentence for the summary."""
        height, width = self.size
        done = _formula(self.embedded or self)
        shape = f"{self.layout.upper()} {height}x{width}, {self._resize_in_words()}"
        if self.embedded is not None:
            return f"{self.color.upper()} pixels as they are, uint8 {shape}; inside the file: {done}; {self.source}"
        return f"{self.color.upper()} {done}, {shape}; {self.source}"

    def doubt(self) -> str:
        """Why these numbers can hardly be what the network was trained with; empty for most."""
        ends = [(level * self.scale - m) / s for level in (0.0, 255.0) for m, s in _channels(self.mean, self.std)]
        low, high = min(ends), max(ends)
        if high - low >= 0.1 and max(-low, high) <= LARGEST_INPUT and low <= 0 <= high:
            return ""
        return (
            f"pixels from 0 to 255 become {low:.4g} to {high:.4g}, which is unusual: --mean and --std speak of pixels "
            f"that are multiplied by --scale {self.scale:.6g} first (for pixels as they are, pass --scale 1)"
        )

    def _resize_in_words(self) -> str:
        if isinstance(self.resize, int):
            return f"shorter side to {self.resize}, centre crop"
        if self.resize != "auto":
            return "stretched" if self.resize == "exact" else "letterboxed"
        if not self.class_vector:
            return "stretched"
        height, width = self.size
        least = tuple(round(side / CROP_SHARE) for side in self.size)
        wish = f"shorter side to {least[0]}" if height == width else f"scaled to cover {least[0]}x{least[1]}"
        return f"{wish}, centre crop (unless already {height}x{width})"


def _formula(done: Preprocessing | Embedded) -> str:
    mean, std = (", ".join(f"{v:.6g}" for v in values) for values in (done.mean, done.std))
    # 1/127.5 reads better than 0.00784314
    scale = f"1/{1 / done.scale:.6g}" if 0 < done.scale < 1 else f"{done.scale:.6g}"
    return f"(pixel x {scale} - [{mean}]) / [{std}]"


MOST_THREADS = 1024
BLOCK_SIZE = 32

# Options that change the run, or where its pictures lie, but no byte of the file.
STEERING = frozenset(
    {"threads", "min_agreement", "min_sqnr", "calib", "batch", "stats", "save_stats", "save_layer_bits"}
)

CALIBRATORS = ("minmax", "ema", "mean-extremes", "percentile", "entropy", "mse", "output-mse", "aciq")
PERCENTILE = 99.99
WEIGHT_CALIBRATORS = ("max", "mse", "aciq")
ROUNDINGS = ("nearest", "second-order")
EFFORTS = ("fast", "balanced", "best")
BIT_ALLOCATIONS = ("none", "weights", "activations", "both")
CHANNEL_CALIBRATORS = ("minmax", "aciq")
"""Calibrators that know a range for each channel of a tensor."""
BIAS_CORRECTIONS = ("measured", "analytic", "none")
RECIPES: dict[str, dict[str, Any]] = {
    "aciq-w4a4": {
        "weight_bits": 4,
        "activation_bits": 4,
        "calibrator": "aciq",
        "weight_calibrator": "aciq",
        "bit_allocation": "both",
        "bias_correction": "measured",
        "rounding": "nearest",
        "equalize": False,
        "tune_ranges": False,
    },
}
"""Published recipes by name: fields of Recipe. `aciq-w4a4`: Banner et al. 2019, arXiv 1810.05723."""


CALIBRATOR = "output-mse"
WEIGHT_BITS = frozenset({*range(2, 9), 16})
ACTIVATION_BITS = WEIGHT_BITS | {32}


@dataclass(frozen=True, slots=True)
class LayerBits:
    """Bits of a layer's weights, and of the tensor that it reads; None for the recipe's own.

    in_float: the layer stays float, and no bits are its.
    """

    weights: int | None = None
    activations: int | None = None
    in_float: bool = False


DROPS = {"agreement": "a share from 0 to 1", "top1": "a share from 0 to 1", "sqnr": "decibels"}
CANDIDATE_BITS = (2, 3, 4, 5, 6, 8)
FLOAT_BITS = 32


@dataclass(frozen=True, slots=True)
class Drop:
    """What bits may cost on the calibration pictures.

    measure: "agreement" or "top1", and value the share that may be lost; "sqnr", and value the least dB.
    """

    measure: str
    value: float

    def __str__(self) -> str:
        return f"{self.measure}:{self.value:g}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What `quantize` is asked to do. The defaults are those of target `ort-cpu`.

    calib: folders, or text files with one path a line; may be empty where `stats` is given, else an error at the door,
    not here. stats, save_stats: files of statistics to read instead of pictures, and to write.
    layer_bits: globs of layers' names, each with the bits of those that it matches; the first match counts.
    max_drop, target_size: search for the bits of each layer's weights, see `mixed`: the cheapest that keep the drop,
    the best of so large a share of float's size. candidate_bits: those to choose from, 32 for float; None without a
    search. save_layer_bits: file to write what was found into.
    bit_allocation: whose channels get bits of their own, those of the layer or tensor on average, see `allocation`.
    bias_correction: by which means of what layers read the bias takes back what rounding the weights does to means:
    those on the pictures, or those that BatchNormalization tells, where it does.
    activation_scheme: None for the target's own; it is never None afterwards. saturation_safe: see `quantize_layer`.
    equalize: scale channels of the float network where its quantization gains; takes a second pass over the pictures.
    None: where there are pictures, unless effort is fast; it is never None afterwards.
    tune_ranges: choose ranges of activations by what the outputs lose, see `ranges`; None: where there are pictures,
    unless effort is fast or a calibrator is given; it is never None afterwards.
    tune_latency: place layers by times that are measured on this machine, see `tune`.
    embed_preprocessing: the layout of the uint8 pixels that the result takes and normalises by itself; None: it takes
    what the float network takes.
    Raises QconvError for values that do not go together.
    """

    calib: tuple[str, ...] = ()
    samples: int = 128
    batch: int = 1
    seed: int = 0
    glob: str | None = None
    weight_bits: int = 8
    activation_bits: int = 8
    weight_scheme: Scheme = Scheme.SYMMETRIC
    activation_scheme: Scheme | None = None
    weight_granularity: WeightGranularity = WeightGranularity.PER_CHANNEL
    block_size: int = BLOCK_SIZE
    edge_bits: int = 8
    layer_bits: tuple[tuple[str, LayerBits], ...] = ()
    max_drop: Drop | None = None
    target_size: float | None = None
    candidate_bits: tuple[int, ...] | None = None
    pack: bool = False
    calibrator: str = CALIBRATOR
    percentile: float | None = None
    weight_calibrator: str = "max"
    effort: str = "balanced"
    rounding: str | None = None
    bit_allocation: str = "none"
    bias_correction: str = "measured"
    target: str = "ort-cpu"
    saturation_safe: bool | None = None
    equalize: bool | None = None
    tune_ranges: bool | None = None
    tune_latency: bool = False
    keep_float: tuple[str, ...] = ()
    keep_float_op: tuple[str, ...] = ()
    opset: int | None = None
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    embed_preprocessing: Layout | None = None
    min_agreement: float | None = None
    min_sqnr: float | None = None
    threads: int | None = None
    stats: str | None = None
    save_stats: str | None = None
    save_layer_bits: str | None = None

    def __post_init__(self) -> None:
        for name in ("calib", "keep_float", "keep_float_op"):
            object.__setattr__(self, name, _texts(getattr(self, name), f"--{name.replace('_', '-')}"))
        for name in ("samples", "batch", "seed", "weight_bits", "activation_bits", "block_size", "edge_bits"):
            _require_whole(name, getattr(self, name))
        for name in ("opset", "threads"):
            if getattr(self, name) is not None:
                _require_whole(name, getattr(self, name))
        for name in ("min_agreement", "min_sqnr"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _numbers(getattr(self, name), f"--{name.replace('_', '-')}")[0])
        _require(
            isinstance(self.preprocessing, PreprocessingOptions),
            f"preprocessing {self.preprocessing!r}",
            "pass PreprocessingOptions(preset=...).",
        )
        _require(self.target in TARGETS, f"--target {self.target}", f"use {' or '.join(TARGETS)}.")
        if self.activation_scheme is None:
            object.__setattr__(self, "activation_scheme", TARGETS[self.target].default_scheme)
        for name, kind in (
            ("weight_scheme", Scheme),
            ("activation_scheme", Scheme),
            ("weight_granularity", WeightGranularity),
        ):
            object.__setattr__(self, name, _member(kind, getattr(self, name), f"--{name.replace('_', '-')}"))
        if self.embed_preprocessing is not None:
            layout = _member(Layout, self.embed_preprocessing, "--embed-preprocessing")
            object.__setattr__(self, "embed_preprocessing", layout)
        _require(self.weight_bits in WEIGHT_BITS, f"--weight-bits {self.weight_bits}", "use 2 to 8, or 16.")
        _require(
            self.activation_bits in ACTIVATION_BITS,
            f"--activation-bits {self.activation_bits}",
            "use 2 to 8, 16, or 32 for weights only.",
        )
        _require(self.edge_bits in WEIGHT_BITS, f"--edge-bits {self.edge_bits}", "use 2 to 8, or 16.")
        self._check_layer_bits()
        self._check_search()
        _require(self.samples >= 1, f"--samples {self.samples}", "use at least 1 picture.")
        _require(self.batch >= 1, f"--batch {self.batch}", "use at least 1.")
        _require(self.block_size >= 1, f"--block-size {self.block_size}", "use at least 1.")
        _require(
            self.calibrator in CALIBRATORS, f"--calibrator {self.calibrator}", f"use one of {', '.join(CALIBRATORS)}."
        )
        _require(
            self.weight_calibrator in WEIGHT_CALIBRATORS,
            f"--weight-calibrator {self.weight_calibrator}",
            f"use one of {', '.join(WEIGHT_CALIBRATORS)}.",
        )
        _require(self.effort in EFFORTS, f"--effort {self.effort}", f"use one of {', '.join(EFFORTS)}.")
        if self.rounding is None:
            object.__setattr__(self, "rounding", "nearest" if self.effort == "fast" else "second-order")
        _require(self.rounding in ROUNDINGS, f"--rounding {self.rounding}", f"use one of {', '.join(ROUNDINGS)}.")
        idle = self.effort == "best" and self.rounding == "nearest"
        hint = "pass --rounding second-order, or leave --effort out; named recipes take nearest codes."
        _require(not idle, "--effort best with nearest codes", hint)
        for name, known in (("bit_allocation", BIT_ALLOCATIONS), ("bias_correction", BIAS_CORRECTIONS)):
            fact = f"--{name.replace('_', '-')} {getattr(self, name)}"
            _require(getattr(self, name) in known, fact, f"use one of {', '.join(known)}.")
        self._check_allocation()
        self._check_percentile()
        gated = self.min_agreement is not None or self.min_sqnr is not None
        _require(
            not gated or bool(self.calib) or self.stats is None,
            "A gate with --stats alone",
            "pass pictures to measure on with --calib.",
        )
        for name in ("samples", "seed", "glob") if self.stats is not None and not self.calib else ():
            default = next(part.default for part in fields(self) if part.name == name)
            idle = getattr(self, name) == default
            _require(idle, f"--{name} with --stats alone", "leave it out: no picture is read.")
        _require(self.stats is None or self.save_stats is None, "--stats with --save-stats", "copy the file instead.")
        for name in ("stats", "save_stats", "save_layer_bits"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, str(getattr(self, name)))
        own = self.calibrator == CALIBRATOR and self.bit_allocation in ("none", "weights")
        for name, wanted in (("equalize", True), ("tune_ranges", own)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, wanted and self.effort != "fast" and self.stats is None)
            fact = f"--{name.replace('_', '-')} with --stats"
            hint = "it looks at pictures again, which statistics are not: leave one of them out."
            _require(not getattr(self, name) or self.stats is None, fact, hint)
        self._check_target()
        _require(self.seed >= 0, f"--seed {self.seed}", "use 0 or more.")
        _require(
            self.threads is None or 1 <= self.threads <= MOST_THREADS,
            f"--threads {self.threads}",
            f"use 1 to {MOST_THREADS}.",
        )
        _require(
            not self.pack or min(self.bits_of_weights) <= PACKED_BITS,
            f"--pack with {self.weight_bits}-bit weights",
            "packing stores int4: pass --weight-bits 4 or fewer, for some layers at least.",
        )
        _require(
            self.min_agreement is None or 0 <= self.min_agreement <= 1,
            f"--min-agreement {self.min_agreement}",
            "use a share from 0 to 1.",
        )
        _require(
            self.min_sqnr is None or math.isfinite(self.min_sqnr), f"--min-sqnr {self.min_sqnr}", "use a number of dB."
        )

    @property
    def runs_in_integers(self) -> bool:
        """Whether layers run on codes of 8 bits, for which costs are known, or such as lie in them."""
        whole = not self.pack and self.weight_granularity is not WeightGranularity.PER_BLOCK
        return whole and self.bits_of_activations == {8} and max(self.bits_of_weights) <= 8

    def bits_of(self, name: str) -> LayerBits:
        """What `layer_bits` says of the layer of this name: its first glob that matches."""
        return next((bits for glob, bits in self.layer_bits if fnmatch.fnmatchcase(name, glob)), LayerBits())

    @property
    def bits_of_weights(self) -> frozenset[int]:
        """All that the weights of layers can have."""
        own = {bits.weights for _, bits in self.layer_bits if bits.weights is not None}
        own |= {bits for bits in self.candidate_bits or () if bits < FLOAT_BITS}
        return frozenset({self.weight_bits, max(self.weight_bits, self.edge_bits), *own})

    @property
    def bits_of_activations(self) -> frozenset[int]:
        """All that the tensors between layers can have; 32 where they stay float."""
        own = {bits.activations for _, bits in self.layer_bits if bits.activations is not None}
        return frozenset({self.activation_bits, *own})

    @property
    def allocates_weights(self) -> bool:
        """Whether output channels of a layer have bits of their own."""
        return self.bit_allocation in ("weights", "both")

    @property
    def allocates_activations(self) -> bool:
        """Whether channels of the tensors between layers have bits of their own."""
        return self.bit_allocation in ("activations", "both")

    @property
    def searches(self) -> bool:
        """Whether bits of layers are searched for."""
        return self.max_drop is not None or self.target_size is not None

    def _check_search(self) -> None:
        if not self.searches:
            for name in ("candidate_bits", "save_layer_bits"):
                fact = f"--{name.replace('_', '-')} without a search"
                _require(getattr(self, name) is None, fact, "pass --max-drop or --target-size as well.")
            return
        if self.max_drop is not None:
            drop = self.max_drop
            known = isinstance(drop, Drop) and drop.measure in DROPS
            _require(known, f"--max-drop {drop}", f"use {', '.join(f'{name}:NUMBER' for name in DROPS)}.")
            value = _numbers(drop.value, "--max-drop")[0]
            possible = math.isfinite(value) and (drop.measure == "sqnr" or 0 <= value <= 1)
            _require(possible, f"--max-drop {drop}", f"use {DROPS[drop.measure]}.")
            object.__setattr__(self, "max_drop", Drop(drop.measure, value))
        if self.target_size is not None:
            size = _numbers(self.target_size, "--target-size")[0]
            _require(0 < size <= 1, f"--target-size {size:g}", "use a share of float's size, such as 0.16.")
            object.__setattr__(self, "target_size", size)
        chosen = CANDIDATE_BITS if self.candidate_bits is None else self.candidate_bits
        whole = isinstance(chosen, tuple) and all(type(bits) is int for bits in chosen)
        accepted = TARGETS[self.target].weight_bits | {FLOAT_BITS}
        possible = whole and bool(chosen) and set(chosen) <= accepted
        shown = ",".join("float" if bits == FLOAT_BITS else str(bits) for bits in chosen)
        _require(
            possible, f"--candidate-bits {shown}", "use several of 2 to 8, 16 and float, as the target takes them."
        )
        object.__setattr__(self, "candidate_bits", tuple(sorted(set(chosen))))
        _require(bool(self.calib), "A search for bits without pictures", "pass pictures to measure on with --calib.")
        _require(
            not self.tune_latency, "--tune-latency with a search for bits", "search first, then pass what is found."
        )

    def _check_allocation(self) -> None:
        told = f"--bit-allocation {self.bit_allocation} with"
        if self.allocates_weights:
            _require(self.weight_bits <= 8, f"{told} --weight-bits {self.weight_bits}", "use 2 to 8.")
            whole = self.weight_granularity is not WeightGranularity.PER_CHANNEL
            fact = f"{told} --weight-granularity {self.weight_granularity}"
            _require(not whole, fact, "use per-channel: bits go with scales.")
            _require(not self.pack, f"{told} --pack", "leave one of them out: int4 holds no more than 4 bits.")
        if self.allocates_activations:
            _require(self.activation_bits <= 8, f"{told} --activation-bits {self.activation_bits}", "use 2 to 8.")
            fact = f"{told} --calibrator {self.calibrator}"
            known = " or ".join(CHANNEL_CALIBRATORS)
            _require(self.calibrator in CHANNEL_CALIBRATORS, fact, f"use {known}, which know a range for each channel.")
            fact = f"{told} --target {self.target}"
            whole = TARGETS[self.target].inputs_only
            _require(not whole, fact, "use ort-cpu or generic: others take one scale a tensor.")

    def _check_layer_bits(self) -> None:
        entries = self.layer_bits
        paired = isinstance(entries, tuple) and all(isinstance(entry, tuple) and len(entry) == 2 for entry in entries)
        fix = "pass pairs of a glob and LayerBits(weights=4)."
        _require(paired and all(isinstance(bits, LayerBits) for _, bits in entries), f"layer_bits {entries!r}", fix)
        for glob, bits in entries:
            told = f"--layer-bits: {glob!r} with"
            if bits.weights is not None:
                _require(bits.weights in WEIGHT_BITS, f"{told} weights of {bits.weights} bits", "use 2 to 8, or 16.")
            if bits.activations is not None:
                fact = f"{told} activations of {bits.activations} bits"
                _require(bits.activations in WEIGHT_BITS, fact, "use 2 to 8, or 16.")
                fact = f"{told} activations of {bits.activations} bits beside --activation-bits 32"
                _require(self.activation_bits != 32, fact, "leave one of them out: 32 quantizes weights alone.")

    def _check_target(self) -> None:
        """What the target would reject is better said before the work."""
        target = TARGETS[self.target]
        for glob, bits in self.layer_bits:
            for kind, wish, takes in (
                ("weights", bits.weights, target.weight_bits),
                ("activations", bits.activations, target.activation_bits),
            ):
                fact = f"--layer-bits: {glob!r} with {kind} of {wish} bits and --target {self.target}"
                _require(wish is None or wish in takes, fact, f"{target.why}.")
        demands: tuple[tuple[str, Any, Collection[Any]], ...] = (
            ("weight-bits", self.weight_bits, target.weight_bits),
            ("edge-bits", self.edge_bits, target.weight_bits),
            ("activation-bits", self.activation_bits, target.activation_bits),
            ("weight-scheme", self.weight_scheme, target.weight_schemes),
            ("activation-scheme", self.activation_scheme, target.activation_schemes),
            ("weight-granularity", self.weight_granularity, target.granularities),
            ("pack", self.pack, {False, target.packs}),
            ("embed-preprocessing", self.embed_preprocessing, {None, *(Layout if target.takes_pixels else ())}),
        )
        for option, value, accepted in demands:
            given = f"--{option}" if value is True else f"--{option} {value}"
            _require(value in accepted, f"{given} with --target {self.target}", f"{target.why}.")
        tunable = target.costs is not None and self.runs_in_integers
        hint = "it is for target ort-cpu and layers that can run in integers: weights of 2 to 8 bits, activations of 8."
        _require(tunable or not self.tune_latency, "--tune-latency with these options", hint)
        if self.saturation_safe is not None:
            option = "--saturation-safe" if self.saturation_safe else "--no-saturation-safe"
            _require(target.pairs, f"{option} with --target {self.target}", "leave it out: x86 CPUs are meant.")
            integers = self.activation_bits <= 8 and self.weight_bits <= 8  # of most layers
            _require(integers, f"{option} with these bits", "leave it out: products are of float then.")

    def _check_percentile(self) -> None:
        """Only one calibrator has a share; an option without effect would mislead."""
        if self.calibrator != "percentile":
            fact = f"--percentile with --calibrator {self.calibrator}"
            _require(self.percentile is None, fact, "pass --calibrator percentile, or leave it out.")
            return
        share = _numbers(PERCENTILE if self.percentile is None else self.percentile, "--percentile")[0]
        _require(50 < share <= 100, f"--percentile {share:g}", "use more than 50, up to 100.")
        object.__setattr__(self, "percentile", share)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form of all that shapes the file: what only steers the run (threads, gates) stays out."""
        return {name: value for name, value in _plain(self).items() if name not in STEERING}


def _channels(mean: tuple[float, ...], std: tuple[float, ...]) -> Iterator[tuple[float, float]]:
    """Mean and standard deviation of every channel, where either may be given for all."""
    count = max(len(mean), len(std))
    yield from zip(mean * (count // len(mean)), std * (count // len(std)), strict=True)


def _require_whole(name: str, value: object) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    _require(whole, f"--{name.replace('_', '-')} {value!r}", "use a whole number.")


def _numbers(value: Any, option: str) -> tuple[float, ...]:
    """One number or several, as floats."""
    try:
        return tuple(
            float(v) for v in (value if isinstance(value, Iterable) and not isinstance(value, str) else [value])
        )
    except (TypeError, ValueError):
        raise QconvError(f"{option} {value!r} is not possible.", "use numbers.") from None


def _texts(value: Any, option: str) -> tuple[str, ...]:
    """One text or path, or several."""
    if isinstance(value, str | PathLike):
        return (str(value),)
    _require(isinstance(value, Iterable), f"{option} {value!r}", "use a text, or several in a tuple.")
    return tuple(map(str, value))


def _member(kind: type[StrEnum], value: str, option: str) -> StrEnum:
    """The member that is spelt like `value`: plain texts are fine for those who write Python."""
    _require(value in list(kind), f"{option} {value}", f"use {' or '.join(kind)}.")
    return kind(value)


def _plain(thing: Any) -> Any:
    if hasattr(thing, "__dataclass_fields__"):
        return {f.name: _plain(getattr(thing, f.name)) for f in fields(thing)}
    if isinstance(thing, tuple):
        return [_plain(item) for item in thing]
    return str(thing) if isinstance(thing, StrEnum) else thing


def _require(condition: bool, fact: str, fix: str) -> None:
    if not condition:
        raise QconvError(f"{fact} is not possible.", fix)


def _require_numbers(option: str, numbers: tuple[float, ...] | None) -> None:
    if numbers is None:
        return
    if not numbers:
        raise QconvError(f"{option} is empty.", "give one number, or one a channel.")
    odd = next((number for number in numbers if not math.isfinite(number)), None)
    if odd is not None:
        raise QconvError(f"{option} has a value that is no finite number: {odd}.", "give one number, or one a channel.")
