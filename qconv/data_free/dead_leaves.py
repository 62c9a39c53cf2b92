"""Generates images with the colours, edges and spectrum of photographs, for networks that come without images.

    random      leaves that fall on each other until nothing shows between them: discs whose radii r have the density
                r^-3, which look alike at any distance, each with a colour and a shade of its own, and 1 / f noise

Colours vary along the three directions that they do in photographs, brightness far more than the others. How bright and
how rich in contrast pictures are differs from one to the next. Such pictures bring the first layers of the networks at
hand within 0.01 to 0.10 of what their BatchNormalizations have stored (`squared_hellinger`), where noise alone comes
within 0.02 to 0.13. There are no things in them: what they show deep in a network is no more than a guess at what
photographs would.

Sources: leaves: Lee, Mumford and Huang 2001, Occlusion models for natural images. Directions of colours and their
deviations: Krizhevsky et al. 2012, ImageNet classification with deep convolutional neural networks, section 4.1, as
published with fb.resnet.torch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconv.config.data_options import Color, Preprocessing, PreprocessingOptions
from qconv.data.dataset import Listing
from qconv.data.loader import Batch, DataLoader
from qconv.data.preprocessing import (
    WHOLE_PIXEL_TYPES,
    InputSpec,
    arrange_pixels,
    cast_pixels,
    normalize_pixels,
    resolve_preprocessing,
)
from qconv.errors import QconvError
from qconv.ir.channel_stats import ChannelDistribution
from qconv.reporter import Reporter
from qconv.runtime.session import Session

Pixels = NDArray[np.uint8]
IMAGE_COUNT = 32
PIXEL_MEAN = np.array([123.675, 116.28, 103.53])
"""Mean of red, green and blue in photographs."""
COLOR_DIRECTIONS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
"""Principal directions of colours in photographs, one a column."""
COLOR_DEVIATIONS = 255 * np.array([0.4663, 0.1371, 0.0671])
"""Standard deviation along each direction: the square roots of 0.2175, 0.0188 and 0.0045."""
BETWEEN_IMAGES_SHARE = 0.5
"""Share of a pixel's deviation, a quarter of its variance, by which whole pictures differ."""
NOISE_SHARE = 0.1
"""Share of the noise in the variance of a picture."""
SHADING_STRENGTH, SHADING_BY_DIRECTION = 0.5, np.array([1.0, 0.3, 0.1])
"""Amplitude of the shading of a leaf, and its share in each direction of colours."""
MOST_LEAVES, BARE_SHARE = 4000, 0.002
TINY = float(np.finfo(np.float64).tiny)
CONTRAST_DEVIATION = 0.35
"""Deviation of the logarithm of pictures' contrasts."""


def draw_dead_leaves(rng: np.random.Generator, size: tuple[int, int], channels: int) -> Pixels:
    """Draw one dead-leaves image, (H, W, 3) in RGB or (H, W, 1) in grey."""
    fallen = _draw_leaves(rng, size)
    fallen = (fallen - fallen.mean(axis=(0, 1))) / np.maximum(fallen.std(axis=(0, 1)), TINY)
    noise = np.stack([_draw_pink_noise(rng, size) for _ in COLOR_DEVIATIONS], axis=-1)  # (H, W, 3)
    contrast = np.exp(rng.normal(-(CONTRAST_DEVIATION**2), CONTRAST_DEVIATION))
    own = contrast * (np.sqrt(1 - NOISE_SHARE) * fallen + np.sqrt(NOISE_SHARE) * noise)
    along = COLOR_DEVIATIONS * (
        BETWEEN_IMAGES_SHARE * rng.normal(size=len(COLOR_DEVIATIONS)) + np.sqrt(1 - BETWEEN_IMAGES_SHARE**2) * own
    )
    colours = PIXEL_MEAN + along @ COLOR_DIRECTIONS.T
    if channels == 1:
        colours = colours.mean(axis=-1, keepdims=True)
    found: Pixels = np.clip(np.rint(colours), 0, 255).astype(np.uint8)
    return found


def draw_dead_leaves_set(prep: Preprocessing, count: int, batch: int, seed: int) -> Pixels:
    """Draw `count` images and as many more as fill the last batch, (N, H, W, 3) in RGB or (N, H, W, 1) in grey."""
    rng = np.random.default_rng(seed)
    return np.stack([draw_dead_leaves(rng, prep.size, prep.channels) for _ in range(-(-count // batch) * batch)])


def _draw_leaves(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float64]:
    """Draw leaves from the top one down, (H, W, 3); gaps between the last ones stay zero."""
    height, width = size
    least, most = max(1.0, max(size) / 64), max(size) / 1.5
    found, bare = np.zeros((height, width, 3)), np.ones(size, bool)
    for _ in range(MOST_LEAVES):
        if bare.mean() < BARE_SHARE:
            break
        share = rng.random()
        radius = 1 / np.sqrt(share / most**2 + (1 - share) / least**2)
        y, x = rng.random(2) * size
        colour, slope = rng.normal(size=3), rng.normal(size=2) * SHADING_STRENGTH / (2 * radius)
        rows, columns = (
            slice(max(0, int(at - radius)), min(side, int(at + radius) + 2)) for at, side in ((y, height), (x, width))
        )
        dy, dx = np.arange(rows.start, rows.stop)[:, None] - y, np.arange(columns.start, columns.stop)[None] - x
        shown = (dy * dy + dx * dx < radius * radius) & bare[rows, columns]
        shade = (dy * slope[0] + dx * slope[1])[shown]
        found[rows, columns][shown] = colour + shade[:, None] * SHADING_BY_DIRECTION
        bare[rows, columns][shown] = False
    return found


def _draw_pink_noise(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float64]:
    """Draw 1 / f noise of mean 0 and deviation 1, (H, W)."""
    height, width = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    found = np.fft.irfft2(np.fft.rfft2(rng.normal(size=size)) / frequency, s=size)
    return np.asarray(found / max(float(found.std()), TINY))


def pixel_distribution(channels: int) -> ChannelDistribution:
    """The distribution of the pixels of photographs, by channel in RGB, or in grey."""
    mean = PIXEL_MEAN if channels == 3 else np.full(channels, PIXEL_MEAN.mean())
    std = (
        np.sqrt((COLOR_DIRECTIONS**2) @ (COLOR_DEVIATIONS**2))
        if channels == 3
        else np.full(channels, COLOR_DEVIATIONS[0] / np.sqrt(3))
    )
    return ChannelDistribution(mean, std, True, np.zeros(channels), np.full(channels, 255.0))


def network_input_distribution(prep: Preprocessing) -> ChannelDistribution:
    """The distribution of a network's input with this preprocessing, in its own order of channels."""
    found = pixel_distribution(prep.channels)
    if prep.color is Color.BGR:
        found = found.of(np.arange(prep.channels)[::-1])
    mean, std = (np.broadcast_to(np.array(numbers), prep.channels) for numbers in (prep.mean, prep.std))
    return found.scaled(prep.scale / std, -mean / std)


@dataclass(slots=True)
class GeneratedImageLoader(DataLoader):
    """Loads generated images as a network takes them, the same ones in every run."""

    @classmethod
    def like(cls, session: Session, said: PreprocessingOptions) -> GeneratedImageLoader:
        """The loader for the network in `session`. Raises QconvError where its input is no image.

        said: how the network is fed, by the user.
        """
        inputs = [InputSpec(*found) for found in session.inputs]
        if len(inputs) != 1:
            names = ", ".join(spec.name for spec in inputs) or "none"
            fact = f"{session.name} has {len(inputs)} inputs ({names}), and no picture tells what they hold."
            raise QconvError(fact, "pass a folder of .npz samples with --calib instead of none.")
        try:
            prep = resolve_preprocessing(said, inputs[0], class_vector=session.gives_class_scores)
        except QconvError as error:
            raise QconvError(error.message, error.hint.replace("instead of pictures", "to --calib, not none")) from None
        batch = (inputs[0].shape[0] if inputs[0].shape else None) or 1
        return cls(Listing((), 0, 0), inputs, prep, batch, Reporter())

    def iter_pixels(self, prep: Preprocessing, most: int) -> Iterator[Pixels]:
        """See `DataLoader.iter_pixels`."""
        rng = np.random.default_rng(0)
        for _ in range(most):
            yield draw_dead_leaves(rng, prep.size, prep.channels)

    def iter_batches(self, stage: str) -> Generator[Batch, None, None]:
        """IMAGE_COUNT dead-leaves images, in whole batches."""
        fed = self.fed
        assert fed is not None
        yield from self.these(self.iter_pixels(fed, -(-IMAGE_COUNT // self.batch) * self.batch))

    def these(self, pictures: Iterable[Pixels]) -> Generator[Batch, None, None]:
        """Batch images (H, W, 3) in RGB or (H, W, 1) as the network takes them, in whole batches."""
        (spec,), fed = self._specs(), self.fed
        assert fed is not None
        rows = []
        for found in pictures:
            ordered = arrange_pixels(found, fed)
            as_they_are = fed.keeps_pixels and spec.dtype in WHOLE_PIXEL_TYPES
            rows.append(
                ordered.astype(spec.dtype, copy=False)
                if as_they_are
                else cast_pixels(normalize_pixels(ordered, fed), spec.dtype)
            )
            if len(rows) == self.batch:
                self.pictures += len(rows)
                feeds = {spec.name: np.stack(rows)}
                self._keep(feeds)
                yield feeds
                rows = []
