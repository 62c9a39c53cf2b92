"""This module synthesizes calibration images from the BatchNormalization statistics of a float model.

    loss = mean over layers and channels of ((m - mean)^2 + (s - std)^2) / std^2  +  CLASS_LOSS_WEIGHT * cross entropy

m and s are mean and deviation of a BatchNormalization's input, mean and std its stored ones (ZeroQ, Cai et al. 2020,
arXiv 2001.00281); VARIANCE_FLOOR of a layer's mean variance is added to every std^2. They are taken over the whole set:
each batch is moved while what was last seen of the others stands still. So they do not depend on the batch, images may
differ from each other as photographs do, and a network that takes one image at a time is served as well.

No BatchNormalization knows how far the last features of an image go that shows one thing alone. Where the network gives
class scores, each image is drawn to a class of its own (DeepInversion, Yin et al. 2020, arXiv 1912.08795); no label and
no name of a class is needed.

Adam (Kingma and Ba 2015) moves the pixels, 0 to 255, by rates that fall along a half cosine. The priors of
DeepInversion are in the step, not in the loss, so that no gradient is too strong for them: after each step differences
between neighbours fade, small ones more than edges (Perona and Malik 1990), and values are clamped to 0..255. Random
shifts and mirrors (a few dozen steps do not suffice for them) and a penalty on outliers (which real networks have) are
left out, as images became no better to calibrate with.

Each image is written as PNG, and as .npy with what the network gets of it; `synthesized.json` marks the folder as one
that may be replaced.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qconv.config.choices import SYNTHESIS_STEPS
from qconv.config.data_options import (
    AUTO,
    NO_LETTERBOX,
    Color,
    Layout,
    Preprocessing,
    PreprocessingOptions,
)
from qconv.config.serialization import format_option
from qconv.config.tasks import Tasks
from qconv.data.autodetect import DetectedPreprocessing, detect_without_images
from qconv.data.evidence import ReferenceStatistics, batchnorm_statistics, is_measured
from qconv.data.images import encode_png
from qconv.data.preprocessing import arrange_pixels, cast_pixels, normalize_pixels
from qconv.data_free.dead_leaves import GeneratedImageLoader, draw_dead_leaves_set
from qconv.errors import QconvError, format_count, format_some
from qconv.ir import load
from qconv.ir.files import Source, external_data_files, hash_model, read_proto, refuse_quantized
from qconv.ir.layers import INPUTS_FIRST
from qconv.ir.model import Model, Node, input_of
from qconv.ir.original import open_original
from qconv.reporter import Reporter
from qconv.results.training import GOOD_MATCH, POOR_MATCH, BatchNormMatch, SynthesisResult
from qconv.runtime.benchmark import peak_rss_mb
from qconv.runtime.outputs import find_class_vector
from qconv.storage import check_output_folder, refuse_path_inside, replace_folder_atomically
from qconv.training.network import TorchNetwork, half_cosine, require_operators, resolve_device, run_deterministically
from qconv.training.options import SynthesisOptions

FEW_LAYERS_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class BatchNormTargets:
    """The BatchNormalization statistics that images are to match.

    Attributes:
        nodes: BatchNormalizations that have seen training, in running order, one per tensor.
        wanted: The statistics that each has stored of its input.
        doubt: A sentence on why these say less than they should, or nothing.
    """

    nodes: tuple[Node, ...]
    wanted: tuple[ReferenceStatistics, ...]
    doubt: str

    @classmethod
    def of(cls, model: Model, name: str) -> BatchNormTargets:
        """Collect the statistics of a float model as it is loaded. name: of the user's file.

        Raises:
            QconvError: The model has no BatchNormalization with statistics of training.
        """
        nodes: dict[str, Node] = {}
        wanted = []
        for node in model.nodes():
            read = input_of(node, 0)
            if node.op_type != "BatchNormalization" or read is None or not read.name or read.name in nodes:
                continue
            statistics = batchnorm_statistics(node)
            if statistics is not None and is_measured(*statistics) and statistics[1].any():
                nodes[read.name] = node
                wanted.append(ReferenceStatistics(read.name, *statistics, stored=True))
        if not wanted:
            raise QconvError(
                f"{name} has no BatchNormalization that remembers what training showed it: there is nothing to match.",
                "export the model before they are folded (torch.onnx.export with training=TrainingMode.PRESERVE), "
                "or calibrate with pictures.",
            )
        layers = sum(node.op_type in INPUTS_FIRST for node in model.nodes())
        told = f"{format_count(len(wanted), 'BatchNormalization')} for {format_count(layers, 'layer')}"
        few = len(wanted) < FEW_LAYERS_SHARE * layers
        doubt = f"the network has but {told}: pictures are like those of training only as far as these tell."
        return cls(tuple(nodes.values()), tuple(wanted), doubt if few else "")

    def match(self, before: Sequence[float], after: Sequence[float]) -> tuple[BatchNormMatch, ...]:
        """Describe how near each layer came: its distances before and after."""
        return tuple(
            BatchNormMatch(node.name or "", reference.name, reference.mean.size, *distances)
            for node, reference, *distances in zip(self.nodes, self.wanted, before, after, strict=True)
        )


LEARNING_RATE = 16.0
"""Levels that a pixel moves in the first step."""

LEAST_RATE_SHARE = 0.02
"""Share of the learning rate in the last step."""

BETAS = (0.9, 0.99)

TINY = 1e-16

SMOOTHING_SHARE = 0.4
"""Share of the difference from its neighbours that a pixel loses in the first step, less as rates fall."""

EDGE_LEVELS = 60.0
"""Levels of difference that fade half as much as small ones do."""

CLASS_LOSS_WEIGHT = 0.005
"""Weight of the cross entropy, so weak that statistics hardly notice."""

VARIANCE_FLOOR = 1e-3
"""Share of a layer's mean variance that is added to every channel's."""

PIXELS_PER_BATCH, MOST_PER_BATCH = 16 * 224 * 224, 64
"""Pixels of a batch, and the most images in it."""


class ImageOptimizer:
    """A set of images that is optimized by gradients.

    Where an output of the network holds class scores, images are drawn to classes.

    Args:
        network: The float network, of one input.
        prep: How pixels become its input.
        wanted: The statistics to match, of tensors that BatchNormalizations read.
        pixels: The images to start from, (N, H, W, 3) in RGB or (N, H, W, 1); N in whole batches.
        batch: Images in one run of the network.
        scores: The output of class scores; None where there is none.

    Attributes:
        loss: The mean distance of statistics at each step.
    """

    def __init__(
        self,
        network: TorchNetwork,
        prep: Preprocessing,
        wanted: Sequence[ReferenceStatistics],
        pixels: NDArray[np.uint8],
        batch: int,
        scores: str | None = None,
    ) -> None:
        self._network, self._prep, self._device = network, prep, network.device
        self._names = [reference.name for reference in wanted]
        self._means = [self._of(reference.mean) for reference in wanted]
        variances = [self._of(reference.var) for reference in wanted]
        self._floors = [VARIANCE_FLOOR * variance.mean() for variance in variances]
        self._refs = [variance + floor for variance, floor in zip(variances, self._floors, strict=True)]
        start = torch.from_numpy(pixels).to(self._device, torch.float32).permute(0, 3, 1, 2)
        self._batches = [part.contiguous().requires_grad_() for part in start.split(batch)]
        self._adam = torch.optim.Adam(self._batches, lr=LEARNING_RATE, betas=BETAS, eps=TINY, foreach=False)
        self._seen: list[list[tuple[Tensor, Tensor]]] = []
        self.loss: list[float] = []
        self._scores = None
        self._scores = self._with_gradients(scores)

    def _of(self, numbers: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(numbers.astype(np.float32)).to(self._device)

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The images as they are now, (N, H, W, C)."""
        pixels = torch.cat([batch.detach() for batch in self._batches])
        found: NDArray[np.uint8] = pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()
        return found

    def look(self) -> list[float]:
        """Measure every layer's distance of statistics over the whole set; 0 where they are those stored.

        Raises:
            QconvError: What the network computes is NaN, infinite or beyond float32.
        """
        with torch.no_grad():
            self._seen = [self._moments(self._read(batch)[0]) for batch in self._batches]
            found = [float(distance) for distance in self._distances(*self._whole())]
        if not all(map(math.isfinite, found)):
            name = next(name for name, number in zip(self._names, found, strict=True) if not math.isfinite(number))
            fact = f"'{name}', or what its BatchNormalization has stored of it, is NaN, infinite or beyond float32."
            raise QconvError(fact, "check the float model, and --preprocess.")
        return found

    def run(self, steps: int, progress: Callable[[int, int], None]) -> None:
        """Optimize all images for so many steps, and round them to whole levels. `look` comes first."""
        for step in range(steps):
            share = LEAST_RATE_SHARE + (1 - LEAST_RATE_SHARE) * half_cosine(step, steps)
            losses = [self._move(index, share) for index in range(len(self._batches))]
            self.loss.append(float(np.mean(losses)))
            progress(step + 1, steps)
        with torch.no_grad():
            for batch in self._batches:
                batch.round_()

    def _move(self, index: int, share: float) -> float:
        """Optimize one batch by one step, at this share of the first step's rate. Returns the loss before it."""
        pixels = self._batches[index]
        read, scores = self._read(pixels)
        with torch.no_grad():
            self._seen[index] = self._moments(read)
        means, squares = ([tensor.requires_grad_() for tensor in moments] for moments in self._whole())
        loss = torch.stack(self._distances(means, squares)).mean()
        slopes = torch.autograd.grad(loss, [*means, *squares])
        with torch.no_grad():
            pulls = [
                torch.addcmul(
                    _broadcast_channels(slopes[place], tensor),
                    tensor,
                    _broadcast_channels(2 * slopes[place + len(read)], tensor),
                )
                for place, tensor in enumerate(read)
            ]
        if scores is not None:
            read, pulls = (
                [*read, CLASS_LOSS_WEIGHT * self._doubt(scores, index)],
                [*pulls, torch.ones((), device=self._device)],
            )
        # tensors that no pixel reaches have nothing to say
        reached = [(tensor, pull) for tensor, pull in zip(read, pulls, strict=True) if tensor.requires_grad]
        (gradient,) = torch.autograd.grad([t for t, _ in reached], pixels, [pull for _, pull in reached])
        self._step(pixels, gradient, share)
        return float(loss.detach())

    def _step(self, pixels: Tensor, gradient: Tensor, share: float) -> None:
        """Apply Adam's step to one batch, then the priors. Batches without a gradient stay as they are."""
        for group in self._adam.param_groups:
            group["lr"] = share * LEARNING_RATE
        pixels.grad = gradient
        self._adam.step()
        pixels.grad = None
        with torch.no_grad():
            pixels.add_(share * SMOOTHING_SHARE * smoothing_step(pixels)).clamp_(0, 255)

    # -- statistics ----------------------------------------------------------------------------------------------------

    def _read(self, pixels: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Run the network on pixels (N, C, H, W). Returns the BatchNormalizations' inputs, and the class scores."""
        (name,) = self._network.inputs
        wanted = self._names if self._scores is None else [*self._names, self._scores]
        found = self._network.run({name: normalise_pixels(pixels, self._prep)}, wanted)
        return [found[name] for name in self._names], None if self._scores is None else found[self._scores]

    def _with_gradients(self, output: str | None) -> str | None:
        """The output of class scores, where pixels change them."""
        if output is None:
            return None
        (name,), pixels = self._network.inputs, self._batches[0]
        scores = self._network.run({name: normalise_pixels(pixels, self._prep)}, [output])[output]
        return output if scores.requires_grad and scores.shape[0] == len(pixels) and scores.shape[1] > 1 else None

    def _doubt(self, scores: Tensor, index: int) -> Tensor:
        """Compute the mean cross entropy of every image with a class of its own: all classes in turn."""
        scores = scores.flatten(1)
        count = scores.shape[1]
        first = index * len(self._batches[0])
        own = torch.arange(first, first + len(scores), device=self._device) * _class_stride(count) % count
        sums = scores.detach().sum(1)
        if bool((scores.detach() >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all()):
            return F.nll_loss(scores.clamp_min(TINY).log(), own)  # probabilities already
        return F.cross_entropy(scores, own)

    @staticmethod
    def _moments(read: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Compute mean and mean square of every channel, (C,) both, for each tensor."""
        found = []
        for tensor in read:
            axes = [axis for axis in range(tensor.ndim) if axis != 1]
            count = tensor.numel() / tensor.shape[1]
            # the norm needs no tensor of squares
            found.append((tensor.mean(axes), torch.linalg.vector_norm(tensor, dim=axes).square() / count))
        return found

    def _whole(self) -> tuple[list[Tensor], list[Tensor]]:
        """Average the moments over all batches, which are of one size."""
        layers = list(zip(*self._seen, strict=True))
        return tuple([torch.stack([part[which] for part in layer]).mean(0) for layer in layers] for which in (0, 1))  # type: ignore[return-value]

    def _distances(self, means: Sequence[Tensor], squares: Sequence[Tensor]) -> list[Tensor]:
        """Compute the distance of each layer's statistics from the stored ones, as in the loss."""
        found = []
        for mean, square, stored, ref, floor in zip(means, squares, self._means, self._refs, self._floors, strict=True):
            std = ((square - mean * mean).clamp_min(0) + floor).sqrt()
            found.append((((mean - stored) ** 2 + (std - ref.sqrt()) ** 2) / ref).mean())
        return found


def optimize_images(
    source: Source,
    prep: Preprocessing,
    fixed: int | None,
    count: int,
    threads: int | None,
    reporter: Reporter,
    scores: str | None,
) -> NDArray[np.uint8]:
    """Synthesize images for the float model `source`, on the CPU.

    Args:
        source: The float model.
        prep: Its preprocessing.
        fixed: The batch size of the network; None where it takes any.
        count: Images to make.
        threads: Of PyTorch; None for all cores.
        reporter: Hears of progress and warnings.
        scores: Its output of class scores; None where there is none.

    Returns:
        Images, (N, H, W, C) in RGB or grey, in whole batches.

    Raises:
        QconvError: The network has no statistics of training.
    """
    with run_deterministically(threads):
        model, _ = load.load(read_proto(source), source)
        remembered = BatchNormTargets.of(model, source.name)
        size = fixed or min(choose_batch_size(prep), count)
        pixels = draw_dead_leaves_set(prep, count, size, 0)
        optimizer = ImageOptimizer(TorchNetwork(model), prep, remembered.wanted, pixels, size, scores)
        optimizer.look()
        optimizer.run(SYNTHESIS_STEPS, lambda done, total: reporter.progress("synthesize", done, total))
        return optimizer.pixels


def choose_batch_size(prep: Preprocessing) -> int:
    """Choose how many images a network runs at once, where it takes any number."""
    height, width = prep.size
    return max(1, min(PIXELS_PER_BATCH // (height * width), MOST_PER_BATCH))


def _class_stride(classes: int) -> int:
    """Choose a step that comes to all classes in turn, far apart: neighbours are often alike."""
    return next(step for step in range(round(0.618 * classes), classes + 1) if math.gcd(step, classes) == 1)


def _broadcast_channels(channels: Tensor, tensor: Tensor) -> Tensor:
    """Spread per-channel derivatives of a mean, (C,), over the values of `tensor` (N, C, ...)."""
    count = tensor.numel() / tensor.shape[1]
    return (channels / count).reshape([1, -1] + [1] * (tensor.ndim - 2))


def normalise_pixels(pixels: Tensor, prep: Preprocessing) -> Tensor:
    """Convert pixels (N, C, H, W), RGB or grey, to the network's input as data.preprocessing does, with gradients."""
    mean, std = (torch.tensor(numbers, device=pixels.device).reshape(1, -1, 1, 1) for numbers in (prep.mean, prep.std))
    ordered = pixels.flip(1) if prep.color is Color.BGR else pixels
    values = (ordered * prep.scale - mean) / std
    return values if prep.layout is Layout.NCHW else values.permute(0, 2, 3, 1)


def smoothing_step(pixels: Tensor) -> Tensor:
    """Average every pixel's differences (N, C, H, W) from its four neighbours, edges weighted less."""
    wide = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    total = torch.zeros_like(pixels)
    for down, right in ((0, 1), (2, 1), (1, 0), (1, 2)):
        apart = wide[:, :, down : down + pixels.shape[2], right : right + pixels.shape[3]] - pixels
        total += apart / (1 + (apart / EDGE_LEVELS) ** 2)
    return total / 4


SET_FILE = "synthesized.json"

FILE_SUFFIXES = ("png", "npy")


Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class SynthesizedImages:
    """The result of a run. pixels: (N, H, W, 3) in RGB, or (N, H, W, 1)."""

    found: SynthesisResult
    pixels: Pixels


def synthesize(
    source: Source, out: Path, request: SynthesisOptions, reporter: Reporter | None = None
) -> SynthesizedImages:
    """Synthesize images for the float model `source`, and write them into the folder `out`.

    Raises QconvError for anything the user can mend; then nothing is left behind.
    """
    started = time.perf_counter()
    reporter = (reporter or Reporter()).of_part()
    _check_request(source, out)
    with run_deterministically(request.threads):
        proto = read_proto(source)
        refuse_quantized(proto, source.name)
        hashed = hash_model(source, external_data_files(proto, source))
        model, _ = load.load(proto, source)
        require_operators(model)
        remembered = BatchNormTargets.of(model, source.name)
        fed = _InputFormat.of(model, source, request)
        prep = fed.detected.preprocessing
        assert prep is not None
        for doubt in filter(None, (remembered.doubt, *fed.detected.doubts())):
            reporter.warn(doubt)
        if fed.batch is not None and request.batch not in (None, fed.batch):
            reporter.warn(f"--batch {request.batch} is not used: the model's own batch is {fed.batch}.")
        batch = fed.batch or min(request.batch or choose_batch_size(prep), request.count)
        device = resolve_device(request.device)
        pixels = draw_dead_leaves_set(prep, request.count, batch, request.seed)
        optimizer = ImageOptimizer(TorchNetwork(model, device), prep, remembered.wanted, pixels, batch, fed.scores)
        before = optimizer.look()
        optimizer.run(request.steps, lambda done, total: reporter.progress("synthesize", done, total))
        after = optimizer.look()
    found = SynthesisResult(
        model=source.name,
        digest=hashed,
        output=str(out),
        request=request,
        preprocessing=prep,
        words=fed.detected.in_words(),
        options=tuple(format_option("preprocessing", _without_resizing(request.preprocessing))),
        piped=source.path is None,
        batch=batch,
        layers=remembered.match(before, after),
        loss=tuple(optimizer.loss),
        torch=torch.__version__,
        device=device,
        warnings=reporter.warnings,
    )
    _warn_of_unmatched(found, reporter)
    pixels = optimizer.pixels[: request.count]
    with replace_folder_atomically(out, find_foreign_file) as folder:
        _write_images(folder, pixels, prep, fed.dtype, found)
    found.seconds, found.peak_rss_mb = time.perf_counter() - started, peak_rss_mb()
    return SynthesizedImages(found, pixels)


def find_foreign_file(folder: Path) -> str | None:
    """Return a name in a folder that does not belong to a set made here; None where all do, or it is absent."""
    names = set(os.listdir(folder))
    try:
        count = int(json.loads((folder / SET_FILE).read_text("utf-8"))["pictures"])
    except (OSError, ValueError, KeyError, TypeError):
        count = 0
    ours = {SET_FILE, *(f"{stem}.{kind}" for stem in make_stems(count) for kind in FILE_SUFFIXES)} if count else set()
    return min(names - ours, default=None)


def make_stems(count: int) -> list[str]:
    """Return the names of so many images, without suffixes."""
    digits = max(3, len(str(count - 1)))
    return [f"{number:0{digits}}" for number in range(count)]


def _check_request(source: Source, out: Path) -> None:
    """Check the output folder before any work."""
    check_output_folder(out, find_foreign_file)
    for path in (source.path, *external_data_files(read_proto(source), source)):
        refuse_path_inside(out, path, "The model")


@dataclass(frozen=True, slots=True)
class _InputFormat:
    """The network's input. dtype: its type. batch: its batch size; None where that is open. scores: the output of
    class scores; None where there is none."""

    detected: DetectedPreprocessing
    dtype: np.dtype[Any]
    batch: int | None
    scores: str | None

    @classmethod
    def of(cls, model: Model, source: Source, request: SynthesisOptions) -> _InputFormat:
        """Find the preprocessing on generated images. Raises QconvError where not all inputs are images."""
        session = open_original(source, request.threads, Tasks(request.task))
        try:
            imagined = GeneratedImageLoader.like(session, request.preprocessing)
        except QconvError as error:
            asks = "--size" in error.hint or "leave" in error.hint
            other = "synthesize is for networks of one input, a picture of 1 or 3 channels: calibrate with samples."
            raise QconvError(error.message, error.hint if asks else other) from None
        (spec,) = imagined.inputs
        detected = detect_without_images(model, session, imagined, request.preprocessing, threads=request.threads)
        vector = find_class_vector(session.model_outputs)
        return cls(detected, spec.dtype, spec.shape[0], None if vector is None else session.outputs[vector])


def _without_resizing(said: PreprocessingOptions) -> PreprocessingOptions:
    """The same for pictures that have the network's size already."""
    return replace(said, resize="auto", filter=None, **NO_LETTERBOX)


def _warn_of_unmatched(found: SynthesisResult, reporter: Reporter) -> None:
    """Tell of statistics that were not matched."""
    more = "more --iterations may help"
    if found.after > GOOD_MATCH:
        auto = "" if found.request.preprocessing.preset != AUTO else ", as may another --preprocess"
        reporter.warn(
            f"the pictures are not like those of training: statistics are {found.after:.2f} apart on average, where "
            f"dozens of photographs come to 0.04; {more}{auto}."
        )
    far = [layer for layer in found.worst_first if layer.after > POOR_MATCH]
    if far:
        names = format_some([layer.name for layer in far])
        reporter.warn(f"{names}: statistics were not matched ({far[0].after:.2f} apart); {more}.")


def _write_images(
    folder: Path, pixels: Pixels, prep: Preprocessing, dtype: np.dtype[Any], found: SynthesisResult
) -> None:
    """Write each image as PNG and as the network's input, and the file that marks the folder."""
    for stem, picture in zip(make_stems(len(pixels)), pixels, strict=True):
        (folder / f"{stem}.png").write_bytes(encode_png(picture))
        values = cast_pixels(normalize_pixels(arrange_pixels(picture, prep), prep), dtype)
        np.save(folder / f"{stem}.npy", values)
    (folder / SET_FILE).write_text(json.dumps(found.of_the_set(), allow_nan=False, indent=1) + "\n", "utf-8")
