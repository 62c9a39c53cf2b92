"""Lists the preprocessing hypotheses that a network may have been trained with, and measures how well each fits.

Hypotheses are published normalizations in either colour order, as far as facts and the user's word allow them.
Families that are no preset keep a network that was trained otherwise from being taken for a preset that is only near.
The misfit of a tensor is the mean over its channels of the squared Hellinger distance of two normal densities:

    H^2 = 1 - sqrt(2 sqrt(v v') / (v + v')) exp(-(m - m')^2 / (4 (v + v')))

(m, v): the reference, (m', v'): the images. It is 0 for equal densities and 1 for disjoint ones, so that no channel can
outweigh the others, as one with next to no variance would in a Kullback-Leibler divergence. Channels that were dead in
training are left out.

Confidence is how far the highest class score stands above the mean score, image by image (the maximum logit of
Hendrycks et al. 2022, Scaling out-of-distribution detection for real-world settings, made blind to what softmax is
blind to). On the networks at hand it finds the colour order from half the images that entropy takes. It compares ranges
badly: pixels that are too large make any network sure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.config.data_options import (
    LETTERBOX_OPTIONS,
    Color,
    Preprocessing,
    PreprocessingOptions,
    merge_options,
)
from qconv.data.evidence import PreprocessingFact, ReferenceStatistics
from qconv.data.preprocessing import InputSpec, resolve_preprocessing
from qconv.runtime.outputs import OutputKind
from qconv.runtime.session import Session

Array = NDArray[np.float64]

DEAD_VARIANCE_SHARE = 1e-4
"""Share of the median variance below which a channel counts as dead."""

SMALLEST_POSITIVE = 1e-30


class ChannelMoments:
    """Mean and mean square of each channel of the references' tensors, over all pictures added so far."""

    def __init__(self, references: Sequence[ReferenceStatistics]) -> None:
        self._references = references
        self._sums: list[Array] = []
        self.pictures = 0

    def add(self, found: Sequence[NDArray[np.float32]], pictures: int) -> None:
        """Add the outputs of `build_moments_model`, (N, C, 1, 1) each, of which the first `pictures` images count."""
        sums = [np.asarray(a[:pictures], np.float64).sum(axis=0).reshape(-1) for a in found]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums
        self.pictures += pictures

    @property
    def misfit(self) -> float:
        """The mean misfit over the references, 0 to 1."""
        pairs = zip(self._sums[::2], self._sums[1::2], strict=True)
        misfits = []
        for reference, (total, squares) in zip(self._references, pairs, strict=True):
            mean = total / self.pictures
            with np.errstate(invalid="ignore", over="ignore"):
                misfits.append(squared_hellinger(reference, mean, squares / self.pictures - mean**2))
        return sum(misfits) / len(misfits)


def squared_hellinger(reference: ReferenceStatistics, mean: Array, var: Array) -> float:
    """Squared Hellinger distance of the reference and the images, 0 to 1. mean, var: (C,); NaN counts as 1."""
    if mean.shape != reference.mean.shape:
        return 1.0
    live = reference.var >= DEAD_VARIANCE_SHARE * np.median(reference.var)
    stored, seen = reference.var[live], np.maximum(var[live], 0)
    with np.errstate(invalid="ignore", over="ignore"):
        both = stored + seen + SMALLEST_POSITIVE
        overlap = np.sqrt(2 * np.sqrt(stored * seen) / both)
        overlap *= np.exp(-((reference.mean[live] - mean[live]) ** 2) / (4 * both))
    return float(1 - np.nan_to_num(overlap, nan=0.0).mean())


def score_peaks(session: Session, batch: Mapping[str, NDArray[Any]], pictures: int) -> Array:
    """The confidence on the first `pictures` images of a batch: highest class score less the mean, (pictures,).

    What sums up to one counts as probabilities, and their logarithms as the scores; a single score has a second of 0
    beside it. Raises QconvError where the network cannot be run.
    """
    name = next(output.name for output in session.model_outputs if output.kind is OutputKind.CLASS_SCORES)
    (found,) = session.run([name], batch)
    if len(found) < pictures or not found.size:  # rows that the data select, which say nothing of a picture
        return np.zeros(pictures)
    scores = np.nan_to_num(np.asarray(found[:pictures], np.float64).reshape(pictures, -1))
    if scores.shape[1] == 1:
        scores = np.concatenate([scores, np.zeros_like(scores)], axis=1)
    elif scores.min() >= 0 and np.allclose(scores.sum(axis=1), 1, atol=1e-3):
        scores = np.log(np.maximum(scores, SMALLEST_POSITIVE))
    peak: Array = scores.max(axis=1) - scores.mean(axis=1)
    return peak


def shrunken_paired_t(differences: Array) -> float:
    """The paired t statistic of confidences, shrunken towards zero for few images.

    differences: (n,). Positive where they are positive on average.
    """
    n = len(differences)
    spread = float(differences.std(ddof=1)) if n > 1 else 0.0
    if not spread:
        return 0.0
    return float(differences.mean()) / spread * n / math.sqrt(n + 8)


SWAPPED_COLORS_PRIOR = -1.5
"""ln of how much rarer the other colour order is than the preset's own."""


@dataclass(frozen=True, slots=True)
class NormalizationFamily:
    """A normalisation that networks were trained with. options: as the command line takes them. prior: ln of how
    frequent it is beside the others."""

    name: str
    options: PreprocessingOptions
    prior: float = 0.0

    @property
    def settled_by(self) -> str:
        """The options that ask for it."""
        numbers = (("scale", self.options.scale), ("mean", self.options.mean), ("std", self.options.std))
        more = (f" --{name} {_format_mean_or_std(value)}" for name, value in numbers if value is not None)
        return f"--preprocess {self.options.preset}{''.join(more)}"


COLOR_FAMILIES: tuple[NormalizationFamily, ...] = (
    NormalizationFamily("imagenet", PreprocessingOptions("imagenet")),
    NormalizationFamily("tf", PreprocessingOptions("tf")),
    NormalizationFamily("caffe", PreprocessingOptions("caffe"), -0.5),
    NormalizationFamily("unit", PreprocessingOptions("unit")),
    NormalizationFamily("raw", PreprocessingOptions("raw")),
    NormalizationFamily("unit less 0.5", PreprocessingOptions("unit", mean=(0.5,)), -1.0),
    NormalizationFamily("raw less 127.5", PreprocessingOptions("raw", mean=(127.5,)), -1.0),
    NormalizationFamily("imagenet without std", PreprocessingOptions("imagenet", std=(1.0,)), -1.5),
)

GREY_FAMILIES: tuple[NormalizationFamily, ...] = (
    NormalizationFamily("unit", PreprocessingOptions("unit")),
    NormalizationFamily("tf", PreprocessingOptions("tf")),
    NormalizationFamily("raw", PreprocessingOptions("raw")),
    NormalizationFamily("MNIST's mean and std", PreprocessingOptions("unit", mean=(0.1307,), std=(0.3081,)), -0.5),
    NormalizationFamily("unit less 0.5", PreprocessingOptions("unit", mean=(0.5,)), -1.0),
)


def _format_mean_or_std(value: float | tuple[float, ...]) -> str:
    return ",".join(f"{v:.6g}" for v in (value if isinstance(value, tuple) else (value,)))


@dataclass(slots=True)
class PreprocessingCandidate:
    """A preprocessing hypothesis with its scores.

    prior: ln of how frequent it is. fit: ln of its probability by the first layers' statistics, but for a constant;
    lead: the confidence's part of the score. peaks: confidence on each image, see `score_peaks`.
    """

    family: str
    settled_by: str
    preprocessing: Preprocessing
    prior: float
    moments: ChannelMoments
    fit: float
    swapped: bool = False
    lead: float = 0.0
    peaks: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name in the report."""
        return f"{self.family} in {self.preprocessing.color.upper()}" if self.swapped else self.family

    @property
    def score(self) -> float:
        """ln of its probability by all evidence, but for a constant."""
        return self.fit + self.lead

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The numbers that distinguish two candidates."""
        prep = self.preprocessing
        wide = (tuple(np.broadcast_to(np.array(v), prep.channels).tolist()) for v in (prep.mean, prep.std))
        return (prep.color, prep.scale, *wide)

    def is_twin_of(self, other: PreprocessingCandidate) -> bool:
        """Whether only the colour order differs."""
        return self.family == other.family and self.preprocessing.color is not other.preprocessing.color


def invert_candidate(candidate: PreprocessingCandidate, known: Sequence[ReferenceStatistics]) -> PreprocessingCandidate:
    """The candidate with black for white, which is no family: (255 - pixel) in place of the pixel."""
    prep = candidate.preprocessing
    mean = tuple(m - 255 * prep.scale for m in prep.mean)
    return PreprocessingCandidate(
        "inverted", "", replace(prep, scale=-prep.scale, mean=mean), 0.0, ChannelMoments(known), 0.0
    )


@dataclass(frozen=True, slots=True)
class CandidateSpace:
    """What all candidates share: the network's input, the resizing, and the reference statistics.

    shape: what the user says of resizing.
    """

    spec: InputSpec
    default: Preprocessing
    known: Sequence[ReferenceStatistics]
    shape: PreprocessingOptions

    def candidates(self, fact: PreprocessingFact | None, said: dict[str, Any]) -> list[PreprocessingCandidate]:
        """The candidates: the families that a fact leaves possible, with the user's options put over all of them."""
        families = COLOR_FAMILIES if self.default.channels == 3 else GREY_FAMILIES
        if "preset" in said:
            chosen = PreprocessingOptions(said["preset"])
            options = chosen if fact is None else merge_options(chosen, fact.options)
            families = (NormalizationFamily(said["preset"], options),)
        elif fact is not None:
            families = (NormalizationFamily(str(fact.options.preset), fact.options),)
        found: dict[tuple[Any, ...], PreprocessingCandidate] = {}
        for family in families:
            for candidate in self._orders(family, said):
                found.setdefault(candidate.numbers, candidate)
        return list(found.values())

    def _orders(self, family: NormalizationFamily, said: dict[str, Any]) -> list[PreprocessingCandidate]:
        """The family in its own colour order and, unless that is settled, in the other."""
        options = replace(family.options, **{**self._shape(family), **said})
        own = self._candidate(family, options, swapped=False)
        if options.color is not None or self.default.channels == 1 or "preset" in said:
            return [own]
        other = Color.RGB if own.preprocessing.color is Color.BGR else Color.BGR
        return [own, self._candidate(family, replace(options, color=other), swapped=True)]

    def _shape(self, family: NormalizationFamily) -> dict[str, Any]:
        """The options on resizing; a fact may set them where the user has not."""
        prep, merged = self.default, merge_options(self.shape, family.options)
        shape = {name: getattr(merged, name) for name in ("resize", "filter", *LETTERBOX_OPTIONS)}
        shape |= {"layout": prep.layout, "size": prep.size}
        return shape | ({"color": None} if prep.channels == 1 else {})

    def _candidate(
        self, family: NormalizationFamily, options: PreprocessingOptions, *, swapped: bool
    ) -> PreprocessingCandidate:
        prep = resolve_preprocessing(options, self.spec, class_vector=self.default.class_vector)
        settled_by = family.settled_by + (f" --color {prep.color}" if swapped else "")
        prior = family.prior + (SWAPPED_COLORS_PRIOR if swapped else 0.0)
        return PreprocessingCandidate(family.name, settled_by, prep, prior, ChannelMoments(self.known), prior, swapped)
