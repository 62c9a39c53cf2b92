"""Defines `Recipe`, the complete and validated request of one quantization.

A recipe is frozen, and validated once when it is made: first each option by itself, then which options go together
(`recipe_checks`). Each check raises a QconvError that names the way out. No string option is interpreted after that.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from enum import StrEnum
from typing import Any

from qconv.config.choices import (
    ACTIVATION_BITS,
    BLOCK_SIZE,
    CANDIDATE_BITS,
    COMMON_RUNTIME,
    DROP_MEASURES,
    FALLBACKS,
    FEW_BITS,
    FEW_BITS_CALIBRATOR,
    FLOAT_BITS,
    GATE_OPTIONS,
    NO_IMAGES,
    OPTION_CHOICES,
    PERCENTILE,
    WEIGHT_BITS,
    WIDE_BITS,
    Drop,
    LayerBits,
    Scheme,
    WeightGranularity,
    as_json_value,
    as_member,
    as_texts,
    check_run_options,
    option_name,
    require,
    take_types,
)
from qconv.config.data_options import DataOptions, Layout
from qconv.config.recipe_checks import (
    check_allocation,
    check_bias_correction,
    check_candidate_activation_bits,
    check_data,
    check_data_free,
    check_float_budget,
    check_layer_bits,
    check_packing,
    check_statistics,
    check_target,
    check_weights_alone,
    format_bits,
)
from qconv.config.targets import TARGETS, parse_runtime

RUN_ONLY_OPTIONS = frozenset({"threads", *GATE_OPTIONS, "stats", "save_stats", "save_layer_bits"})
"""Options that change the run, but no byte of the file."""

NO_OWN_BITS = LayerBits()
"""What is said of a layer that no glob names."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is quantized; `DataOptions` says with which images. The defaults are those of target `ort-cpu`.

    stats, save_stats: files of statistics to read instead of pictures, and to write. layer_bits: globs of
    layers' names, each with the bits of those that it matches; the first match counts. max_drop, target_size: search
    for the bits of each layer's weights, see `mixed`: the cheapest that keep the drop, the best of so large a share of
    float's size. candidate_bits: those to choose from, 32 for float; None without a search.
    candidate_activation_bits: those that a tensor may have in place of 8 where these lose too much, 32 for float; None
    for what `high_precision` says. save_layer_bits: file to
    write what was found into. bit_allocation: whose channels get bits of their own, those of the layer or tensor on
    average, see `allocation`. bias_correction: by which means of what layers read the bias takes back what rounding the
    weights does to means: those on the pictures, in the float network (measured) or behind layers that are quantized
    already (sequential, and with second-order rounding always), or those that BatchNormalization tells, where it does.
    empty for measured, or analytic where there are no pictures; it is never empty afterwards. calibrator: empty for
    output-mse, or minmax where there are no pictures and activations are quantized; it is never empty afterwards.
    weight_scheme: None for symmetric; with effort best, where the target takes it, asymmetric for weights of up to
    FEW_BITS bits: then it stays None. activation_scheme: None for the target's own; it is never None afterwards.
    saturation_safe: see `quantize_layer`. equalize: scale channels of the float network where its quantization gains;
    takes a second pass over the pictures. None: where there are pictures, unless effort is fast; it is never None
    afterwards. tune_ranges: choose ranges of activations by what the outputs lose, see `ranges`; None: where there are
    pictures, unless effort is fast or a calibrator is given; it is never None afterwards. rounding: None for
    second-order, or nearest where no pictures are looked at again; it is never None after `with_data`, and before that
    only with `stats`. float_budget: the share of the all-integer
    time that may be spent on float for accuracy; None for FLOAT_BUDGET. For targets without costs, the
    share of activations that may have more than 8 bits; None for PRECISE_SHARE. scale_gates: scale
    channels of loud gates, each behind a depthwise layer of its own, where outputs gain. tune_latency: place layers by
    times that are measured on this machine, see `tune`. embed_preprocessing: the layout of the uint8 pixels that the
    result takes and normalises by itself; None: it takes what the float network takes. pack: store codes of up to
    7 bits at their bits, see `packed_codes`. needs: the ONNX Runtime that the result has to run in, as 1.23; None for
    any. allow_matmul_nbits: let ONNX Runtime round what a MatMul reads whose weights alone are quantized.
    data_free: no picture is looked at, BatchNormalization tells what tensors are like, see `told`. fallback: made-up
    pictures that are watched for what it does not tell, "random" ones; None: that is an error.
    Raises QconvError for values that do not go together.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    weight_scheme: Scheme | None = None
    activation_scheme: Scheme | None = None
    weight_granularity: WeightGranularity = WeightGranularity.PER_CHANNEL
    block_size: int = BLOCK_SIZE
    edge_bits: int = 8
    layer_bits: tuple[tuple[str, LayerBits], ...] = ()
    max_drop: Drop | None = None
    target_size: float | None = None
    candidate_bits: tuple[int, ...] | None = None
    candidate_activation_bits: tuple[int, ...] | None = None
    pack: bool = False
    needs: str | None = None
    allow_matmul_nbits: bool = False
    calibrator: str = ""
    percentile: float | None = None
    weight_calibrator: str = "max"
    effort: str = "balanced"
    rounding: str | None = None
    bit_allocation: str = "none"
    bias_correction: str = ""
    target: str = "ort-cpu"
    saturation_safe: bool | None = None
    equalize: bool | None = None
    tune_ranges: bool | None = None
    tune_latency: bool = False
    float_budget: float | None = None
    scale_gates: bool = False
    keep_float: tuple[str, ...] = ()
    keep_float_op: tuple[str, ...] = ()
    opset: int | None = None
    embed_preprocessing: Layout | None = None
    min_agreement: float | None = None
    min_boxes: float | None = None
    min_map: float | None = None
    min_miou: float | None = None
    min_sqnr: float | None = None
    threads: int | None = None
    stats: str | None = None
    save_stats: str | None = None
    save_layer_bits: str | None = None
    data_free: bool = False
    fallback: str | None = None

    def __post_init__(self) -> None:
        self._take_types()
        self._check_numbers()
        check_layer_bits(self)
        check_weights_alone(self)
        self._check_search()
        check_data_free(self)
        if not self.calibrator:
            told = self.data_free and self.activation_bits < 32
            self._take("calibrator", "minmax" if told else FEW_BITS_CALIBRATOR)
        near = self.effort == "fast" or self.data_free
        if self.rounding is None and (near or self.stats is None):  # with statistics it depends on the images
            self._take("rounding", "nearest" if near else "second-order")
        if not self.bias_correction:
            self._take("bias_correction", "analytic" if self.data_free else "measured")
        for name, known in OPTION_CHOICES.items():
            if name != "rounding" or self.rounding is not None:
                self._require_one_of(name, known, f"use one of {', '.join(known)}.")
        self._require_one_of("fallback", (None, *FALLBACKS), f"use {' or '.join(FALLBACKS)}.")
        idle = self.effort == "best" and self.rounding == "nearest"
        hint = "pass --rounding second-order, or leave --effort out; named recipes take nearest codes."
        if self.stats is not None:
            hint = "leave --effort out, or pass pictures with --calib: statistics alone give nearest codes."
        require(not idle, "--effort best with nearest codes", hint)
        if self.rounding is not None:
            check_bias_correction(self)
        check_allocation(self)
        self._check_percentile()
        self._resolve_image_options()
        check_statistics(self)
        check_target(self)
        check_candidate_activation_bits(self)
        check_float_budget(self)
        check_packing(self)

    @property
    def runs_in_integers(self) -> bool:
        """Whether layers run on codes of 8 bits, for which costs are known, or such as lie in them."""
        whole = self.weight_granularity is not WeightGranularity.PER_BLOCK
        return whole and self.bits_of_activations == {8} and max(self.bits_of_weights) <= 8

    @property
    def divides_by_statistics(self) -> bool:
        """Whether what stays in float for accuracy is chosen by calibration's statistics, from their histograms.

        Where a target has no times, they choose too little that helps.
        """
        watched = self.calibrator == FEW_BITS_CALIBRATOR and self.stats is None and not self.data_free
        watched = watched and TARGETS[self.target].costs is not None
        wanted = self.high_precision is not None and self.float_budget != 0
        return watched and wanted and self.effort == "fast" and not self.tune_ranges

    def bits_of(self, name: str) -> LayerBits:
        """What `layer_bits` says of the layer of this name: its first glob that matches."""
        return next((bits for glob, bits in self.layer_bits if fnmatch.fnmatchcase(name, glob)), NO_OWN_BITS)

    def scheme_of_weights(self, bits: int) -> Scheme:
        """The scheme of weights with so many bits."""
        return self.weight_scheme or (Scheme.ASYMMETRIC if bits <= FEW_BITS else Scheme.SYMMETRIC)

    def has_zero_points(self, bits: int) -> bool:
        """Whether weights with so many bits have zero points in the file that are not 0."""
        return self.scheme_of_weights(bits) is Scheme.ASYMMETRIC and not self.moves_zero(bits)

    def moves_zero(self, bits: int) -> bool:
        """Whether codes of weights with so many bits are stored with zero at code 0, whatever their scheme."""
        room = bits <= FEW_BITS and not self.allocates_weights
        return room and TARGETS[self.target].moves_zero

    @property
    def packed_forms(self) -> frozenset[str]:
        """The forms of packed codes that the target takes."""
        return TARGETS[self.target].packed_forms

    @property
    def oldest_runtime(self) -> tuple[int, int]:
        """The oldest ONNX Runtime that the file may need, as (1, 30)."""
        return COMMON_RUNTIME if self.needs is None else parse_runtime(self.needs)

    @property
    def bits_of_weights(self) -> frozenset[int]:
        """All that the weights of layers can have."""
        own = {bits.weights for _, bits in self.layer_bits if bits.weights is not None}
        own |= {bits for bits in self.candidate_bits or () if bits < FLOAT_BITS}
        return frozenset({self.weight_bits, max(self.weight_bits, self.edge_bits), *own})

    @property
    def bits_of_activations(self) -> frozenset[int]:
        """All that the tensors between layers can have; 32 where they stay float."""
        own = {bits.activations or FLOAT_BITS for _, bits in self.layer_bits} - {FLOAT_BITS}
        own |= {WIDE_BITS} if self.high_precision == WIDE_BITS else set()
        return frozenset({self.activation_bits, *own})

    @property
    def high_precision(self) -> int | None:
        """What a tensor gets where 8 bits lose too much: WIDE_BITS, or FLOAT_BITS; None where 8 bits it is.

        Of both, 16 bits. Unasked it is float, as 16 bits take opset 21: where the target has costs or a budget is
        given, and `layer_bits` do not say already which nodes have more than 8.
        """
        if self.activation_bits != 8:
            return None
        chosen = self.candidate_activation_bits
        if chosen is None:
            known = TARGETS[self.target].costs is not None or bool(self.float_budget)
            divided = any(bits.activations in (WIDE_BITS, FLOAT_BITS) for _, bits in self.layer_bits)
            chosen = (8, FLOAT_BITS) if known and not divided else (8,)
        return next((bits for bits in (WIDE_BITS, FLOAT_BITS) if bits in chosen), None)

    @property
    def allocates_weights(self) -> bool:
        """Whether output channels of a layer have bits of their own."""
        return self.bit_allocation in ("weights", "both")

    @property
    def allocates_activations(self) -> bool:
        """Whether channels of the tensors between layers have bits of their own."""
        return self.bit_allocation in ("activations", "both")

    @property
    def measures_means(self) -> bool:
        """Whether biases take back what the means of layers' inputs tell, as calibration saw them."""
        return self.bias_correction in ("measured", "sequential") and self.rounding == "nearest"

    @property
    def rounds_sequentially(self) -> bool:
        """Whether layers are looked at one after the other, the layers before quantized already."""
        return self.rounding != "nearest" or self.bias_correction == "sequential"

    @property
    def corrects_gains(self) -> bool:
        """Whether scales and biases may take back what quantization does to outputs of layers, as it was measured."""
        return self.rounding != "reconstruct" and self.bias_correction in ("measured", "sequential")

    @property
    def searches(self) -> bool:
        """Whether bits of layers are searched for."""
        return self.max_drop is not None or self.target_size is not None

    @property
    def is_gated(self) -> bool:
        """Whether the result must reach some measure."""
        return any(getattr(self, name) is not None for name in GATE_OPTIONS)

    def _take(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _take_types(self) -> None:
        """Plain texts become what they stand for."""
        take_types(self, {"layer_bits": "layer_bits"})
        for name in ("stats", "save_stats", "save_layer_bits"):
            if getattr(self, name) is not None:
                require(getattr(self, name) != "-", self._told(name), "name a file.")
        require(self.target in TARGETS, f"--target {self.target}", f"use {' or '.join(TARGETS)}.")
        few = self.effort == "best" and Scheme.ASYMMETRIC in TARGETS[self.target].weight_schemes
        if self.weight_scheme is None and (not few or self.allocates_weights):
            self._take("weight_scheme", Scheme.SYMMETRIC)
        if self.activation_scheme is None:
            self._take("activation_scheme", TARGETS[self.target].default_scheme)
        kinds: dict[str, type[StrEnum]] = {
            "weight_scheme": Scheme,
            "activation_scheme": Scheme,
            "weight_granularity": WeightGranularity,
            "embed_preprocessing": Layout,
        }
        for name, kind in kinds.items():
            if getattr(self, name) is not None:
                self._take(name, as_member(kind, getattr(self, name), option_name(name)))

    def _check_numbers(self) -> None:
        self._require_one_of("weight_bits", WEIGHT_BITS, "use 2 to 8, or 16.")
        self._require_one_of("activation_bits", ACTIVATION_BITS, "use 2 to 8, 16, or 32 for weights only.")
        self._require_one_of("edge_bits", WEIGHT_BITS, "use 2 to 8, or 16.")
        require(self.block_size >= 1, self._told("block_size"), "use at least 1.")
        if self.candidate_activation_bits is not None:
            self._take("candidate_activation_bits", tuple(sorted(set(self.candidate_activation_bits))))
        check_run_options(self.threads, self)

    def _resolve_image_options(self) -> None:
        """What looks at pictures again is chosen here, where it was not asked for."""
        own = self.calibrator == FEW_BITS_CALIBRATOR and self.bit_allocation in ("none", "weights")
        own = own and self.activation_bits < 32 and not self.data_free
        for name, wanted in (("equalize", True), ("tune_ranges", own)):
            if getattr(self, name) is None:
                self._take(name, wanted and self.effort != "fast" and self.stats is None)

    def _told(self, name: str) -> str:
        """An option and what is asked of it."""
        return f"{option_name(name)} {getattr(self, name)}"

    def _require_one_of(self, name: str, known: Collection[Any], fix: str) -> None:
        require(getattr(self, name) in known, self._told(name), fix)

    def _check_search(self) -> None:
        if not self.searches:
            fact = "--candidate-bits without a search"
            require(self.candidate_bits is None, fact, "pass --max-drop or --target-size as well.")
            return
        hint = "leave it out: a search chooses from --candidate-bits."
        require(self.weight_bits == 8, f"--weight-bits {self.weight_bits} with a search for bits", hint)
        if self.max_drop is not None:
            drop = self.max_drop
            known = drop.measure in DROP_MEASURES
            require(known, f"--max-drop {drop}", f"use {', '.join(f'{name}:NUMBER' for name in DROP_MEASURES)}.")
            possible = math.isfinite(drop.value) and (drop.measure == "sqnr" or 0 <= drop.value <= 1)
            require(possible, f"--max-drop {drop}", f"use {DROP_MEASURES[drop.measure]}.")
        if self.target_size is not None:
            size = self.target_size
            require(0 < size <= 1, f"--target-size {size:g}", "use a share of float's size, such as 0.16.")
        chosen = CANDIDATE_BITS if self.candidate_bits is None else self.candidate_bits
        accepted = TARGETS[self.target].weight_bits | {FLOAT_BITS}
        possible = bool(chosen) and set(chosen) <= accepted
        fact = f"--candidate-bits {format_bits(chosen)}"
        require(possible, fact, "use several of 2 to 8, 16 and float, as the target takes them.")
        self._take("candidate_bits", tuple(sorted(set(chosen))))
        require(
            not self.tune_latency, "--tune-latency with a search for bits", "search first, then pass what is found."
        )

    def _check_percentile(self) -> None:
        """Only one calibrator has a share; an option without effect would mislead."""
        if self.calibrator != "percentile":
            fact = f"--percentile with --calibrator {self.calibrator}"
            require(self.percentile is None, fact, "pass --calibrator percentile, or leave it out.")
            return
        share = PERCENTILE if self.percentile is None else self.percentile
        require(50 < share <= 100, f"--percentile {share:g}", "use more than 50, up to 100.")
        self._take("percentile", share)

    def with_data(self, data: DataOptions) -> Recipe:
        """The recipe with what follows from these images. Raises QconvError where they do not go together."""
        recipe = self
        if self.rounding is None:
            recipe = replace(self, rounding="second-order" if data.paths else "nearest")
        check_data(recipe, data)
        return recipe

    def as_dict(self, data: DataOptions) -> dict[str, Any]:
        """JSON-ready form of all that shapes the file: what only steers the run (threads, gates) stays out.

        data: the images that it is made with.
        """
        found = data.as_dict()
        preprocessing = found.pop("preprocessing")
        for name, value in as_json_value(self).items():
            if name == "embed_preprocessing":
                found["preprocessing"] = preprocessing
            if name not in RUN_ONLY_OPTIONS:
                found[name] = value
        return found


def make_request(fields: Mapping[str, Any]) -> tuple[Recipe, DataOptions]:
    """The recipe and the images of options by their names on the command line; NO_IMAGES among those in `calib` is one.

    Raises QconvError for options that do not go together.
    """
    said = dict(fields)
    paths = as_texts(said.pop("calib", ()), "--calib")
    images = {part.name: said.pop(part.name) for part in dataclass_fields(DataOptions) if part.name in said}
    if NO_IMAGES in paths:
        said["data_free"] = True
    data = DataOptions(tuple(path for path in paths if path != NO_IMAGES), **images)
    return Recipe(**said).with_data(data), data
