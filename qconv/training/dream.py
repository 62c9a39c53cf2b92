"""Pictures that a network's BatchNormalizations take for those of training: pixels, moved along gradients.

    loss = mean over layers and channels of ((m - mean)^2 + (s - std)^2) / std^2  +  SURE * cross entropy of classes

m and s are mean and deviation of what a BatchNormalization reads, mean and std those that it has stored (ZeroQ, Cai
et al. 2020, arXiv 2001.00281); FLOOR of a layer's mean variance is added to every std^2. They are taken over the whole
set: each batch is moved while what was last seen of the others stands still. So they do not depend on the batch,
pictures may differ from each other as photographs do, and a network that takes one picture at a time is served as well.

No BatchNormalization knows how far the last features of a picture go that shows one thing alone. Where the network
gives class scores each picture is drawn to a class of its own (Yin et al. 2020, DeepInversion, arXiv 1912.08795), so
weakly that statistics hardly notice; no label and no name of a class is needed.

Adam (Kingma and Ba 2015) moves the pixels themselves, 0 to 255, by rates that fall along a half cosine. The priors of
DeepInversion are in the step, not in the loss, so that no gradient is too strong for them: after each, differences
between neighbours fade, small ones more than edges (Perona and Malik 1990), and what leaves the range comes back to its
end.

Left out, as pictures became no better to calibrate with: random shifts and mirrors (a few dozen steps do not suffice
for them), and a penalty on values far from the mean, which real networks have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qconv.config.choices import SYNTHESIS_STEPS
from qconv.config.preprocessing import Color, Layout, Preprocessing
from qconv.data.evidence import ReferenceStatistics
from qconv.data_free.dead_leaves import draw_dead_leaves_set
from qconv.errors import QconvError
from qconv.ir import load
from qconv.ir.files import Source, read_proto
from qconv.training.remembered import Remembered
from qconv.training.torchgraph import Network
from qconv.training.torchrun import determined

RATE = 16.0
"""Levels that a pixel moves by in the first step."""
LEAST_RATE = 0.02
"""Share of it in the last one."""
BETAS = (0.9, 0.99)
TINY = 1e-16
FADE = 0.4
"""Share of the difference from its neighbours that a pixel loses in the first step, less as rates fall."""
EDGE = 60.0
"""Levels of difference that fade half as much as small ones do."""
SURE = 0.005
FLOOR = 1e-3
"""Share of the mean variance that counts for channels with next to none."""

PIXELS, MOST = 16 * 224 * 224, 64
"""Of a batch, and the most pictures of it."""


class Dream:
    """A set of pictures on its way.

    network: the float network, of one input. wanted: what the tensors that its BatchNormalizations read should look
    like. pixels: what to begin with, (N, H, W, 3) in RGB or (N, H, W, 1); N in whole batches. loss: the distance of
    statistics, step by step. Where an output holds a score a class, pictures are drawn to classes.
    """

    def __init__(
        self,
        network: Network,
        prep: Preprocessing,
        wanted: Sequence[ReferenceStatistics],
        pixels: NDArray[np.uint8],
        batch: int,
    ) -> None:
        self._network, self._prep, self._device = network, prep, network.device
        self._scores: str | None = None
        self._names = [reference.name for reference in wanted]
        self._means = [self._of(reference.mean) for reference in wanted]
        variances = [self._of(reference.var) for reference in wanted]
        self._floors = [FLOOR * variance.mean() for variance in variances]
        self._refs = [variance + floor for variance, floor in zip(variances, self._floors, strict=True)]
        self._pixels = torch.from_numpy(pixels).to(self._device, torch.float32).permute(0, 3, 1, 2).contiguous()
        self._first, self._second = torch.zeros_like(self._pixels), torch.zeros_like(self._pixels)
        self._parts = [slice(start, start + batch) for start in range(0, len(pixels), batch)]
        self._seen: list[list[tuple[Tensor, Tensor]]] = []
        self.loss: list[float] = []
        self._scores = self._output_of_scores()

    def _of(self, numbers: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(numbers.astype(np.float32)).to(self._device)

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The pictures as they are now, (N, H, W, C)."""
        found: NDArray[np.uint8] = self._pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()
        return found

    def look(self) -> list[float]:
        """The distance of every layer, over the whole set; 0 where statistics are those stored.

        Raises QconvError where what the network computes is no number.
        """
        with torch.no_grad():
            self._seen = [self._moments(self._read(self._pixels[part])[0]) for part in self._parts]
            found = [float(distance) for distance in self._distances(*self._whole())]
        if not all(map(math.isfinite, found)):
            name = next(name for name, number in zip(self._names, found, strict=True) if not math.isfinite(number))
            fact = f"'{name}', or what its BatchNormalization has stored of it, is NaN, infinite or beyond float32."
            raise QconvError(fact, "check the float model, and --preprocess.")
        return found

    def run(self, steps: int, progress: Callable[[int, int], None]) -> None:
        """Move all pictures so many times, and round them to whole levels. `look` comes first."""
        for step in range(steps):
            share = LEAST_RATE + (1 - LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps))
            losses = [self._move(index, step, share) for index in range(len(self._parts))]
            self.loss.append(float(np.mean(losses)))
            progress(step + 1, steps)
        self._pixels = self._pixels.round()

    def _move(self, index: int, step: int, share: float) -> float:
        """One step of one batch, at this share of the first one's rate. Returns the loss before it."""
        part = self._parts[index]
        pixels = self._pixels[part].clone().requires_grad_()
        read, scores = self._read(pixels)
        with torch.no_grad():
            self._seen[index] = self._moments(read)
        means, squares = ([tensor.requires_grad_() for tensor in moments] for moments in self._whole())
        loss = torch.stack(self._distances(means, squares)).mean()
        slopes = torch.autograd.grad(loss, [*means, *squares])
        with torch.no_grad():
            pulls = [
                torch.addcmul(_along(slopes[place], tensor), tensor, _along(2 * slopes[place + len(read)], tensor))
                for place, tensor in enumerate(read)
            ]
        if scores is not None:
            read, pulls = [*read, SURE * self._doubt(scores, part)], [*pulls, torch.ones((), device=self._device)]
        # tensors that no pixel reaches have nothing to say
        reached = [(tensor, pull) for tensor, pull in zip(read, pulls, strict=True) if tensor.requires_grad]
        (gradient,) = torch.autograd.grad([t for t, _ in reached], pixels, [pull for _, pull in reached])
        with torch.no_grad():
            self._pixels[part] = self._stepped(part, gradient, step, share)
        return float(loss.detach())

    def _stepped(self, part: slice, gradient: Tensor, step: int, share: float) -> Tensor:
        """Adam's step, then the priors."""
        first, second = self._first[part], self._second[part]
        first.lerp_(gradient, 1 - BETAS[0])
        second.lerp_(gradient * gradient, 1 - BETAS[1])
        mean, square = first / (1 - BETAS[0] ** (step + 1)), second / (1 - BETAS[1] ** (step + 1))
        moved = self._pixels[part] - share * RATE * mean / (square.sqrt() + TINY)
        return (moved + share * FADE * faded(moved)).clamp(0, 255)

    # -- statistics ----------------------------------------------------------------------------------------------------

    def _read(self, pixels: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """What the BatchNormalizations read of pixels (N, C, H, W), RGB or grey, and the class scores."""
        (name,) = self._network.inputs
        wanted = self._names if self._scores is None else [*self._names, self._scores]
        found = self._network.run({name: normalised(pixels, self._prep)}, wanted)
        return [found[name] for name in self._names], None if self._scores is None else found[self._scores]

    def _output_of_scores(self) -> str | None:
        """The first output of one number a class for each picture: floats, which have gradients."""
        (name,), pixels = self._network.inputs, self._pixels[self._parts[0]].clone().requires_grad_()
        for output, scores in self._network.run({name: normalised(pixels, self._prep)}).items():
            if scores.ndim == 2 and scores.shape[0] == len(pixels) and scores.shape[1] > 1 and scores.requires_grad:
                return output
        return None

    def _doubt(self, scores: Tensor, part: slice) -> Tensor:
        """Mean cross entropy of every picture with a class of its own: all classes in turn."""
        count = scores.shape[1]
        own = torch.arange(part.start, part.stop, device=self._device) * _stride(count) % count
        sums = scores.detach().sum(1)
        if bool((scores.detach() >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all()):
            return F.nll_loss(scores.clamp_min(TINY).log(), own)  # probabilities already
        return F.cross_entropy(scores, own)

    @staticmethod
    def _moments(read: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Mean and mean square of every channel, (C,) both, tensor by tensor."""
        found = []
        for tensor in read:
            axes = [axis for axis in range(tensor.ndim) if axis != 1]
            count = tensor.numel() / tensor.shape[1]
            # the norm needs no tensor of squares
            found.append((tensor.mean(axes), torch.linalg.vector_norm(tensor, dim=axes).square() / count))
        return found

    def _whole(self) -> tuple[list[Tensor], list[Tensor]]:
        """The same of the whole set: batches are of one size."""
        layers = list(zip(*self._seen, strict=True))
        return tuple([torch.stack([part[which] for part in layer]).mean(0) for layer in layers] for which in (0, 1))  # type: ignore[return-value]

    def _distances(self, means: Sequence[Tensor], squares: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for mean, square, stored, ref, floor in zip(means, squares, self._means, self._refs, self._floors, strict=True):
            std = ((square - mean * mean).clamp_min(0) + floor).sqrt()
            found.append((((mean - stored) ** 2 + (std - ref.sqrt()) ** 2) / ref).mean())
        return found


def dreamt(
    source: Source,
    prep: Preprocessing,
    fixed: int | None,
    count: int,
    threads: int | None,
    progress: Callable[[str, int, int], None],
) -> NDArray[np.uint8]:
    """Pictures for the float model `source`, on the CPU, (N, H, W, C) in RGB or grey, in whole batches of its own.

    fixed: the batch of the network, None where it takes any. Raises QconvError where it remembers nothing of training.
    """
    with determined(threads):
        model, _ = load.load(read_proto(source), source)
        remembered = Remembered.of(model, source.name)
        size = fixed or min(batch_of(prep), count)
        dream = Dream(Network(model), prep, remembered.wanted, draw_dead_leaves_set(prep, count, size, 0), size)
        dream.look()
        dream.run(SYNTHESIS_STEPS, lambda done, total: progress("synthesize", done, total))
        return dream.pixels


def batch_of(prep: Preprocessing) -> int:
    """Pictures that a run of the network takes, where it takes any number."""
    height, width = prep.size
    return max(1, min(PIXELS // (height * width), MOST))


def _stride(classes: int) -> int:
    """A step that comes to all classes in turn, far apart: neighbours are often alike."""
    return next(step for step in range(round(0.618 * classes), classes + 1) if math.gcd(step, classes) == 1)


def _along(channels: Tensor, tensor: Tensor) -> Tensor:
    """Numbers (C,), spread over what they are the mean of, with the axes of `tensor` (N, C, ...)."""
    count = tensor.numel() / tensor.shape[1]
    return (channels / count).reshape([1, -1] + [1] * (tensor.ndim - 2))


def normalised(pixels: Tensor, prep: Preprocessing) -> Tensor:
    """Pixels (N, C, H, W), RGB or grey, as images.py makes them the network's input, with gradients."""
    mean, std = (torch.tensor(numbers, device=pixels.device).reshape(1, -1, 1, 1) for numbers in (prep.mean, prep.std))
    ordered = pixels.flip(1) if prep.color is Color.BGR else pixels
    values = (ordered * prep.scale - mean) / std
    return values if prep.layout is Layout.NCHW else values.permute(0, 2, 3, 1)


def faded(pixels: Tensor) -> Tensor:
    """The mean difference of every pixel (N, C, H, W) from its four neighbours, less of those that make an edge."""
    wide = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    total = torch.zeros_like(pixels)
    for down, right in ((0, 1), (2, 1), (1, 0), (1, 2)):
        apart = wide[:, :, down : down + pixels.shape[2], right : right + pixels.shape[3]] - pixels
        total += apart / (1 + (apart / EDGE) ** 2)
    return total / 4
