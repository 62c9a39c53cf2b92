"""This module lets the quantized network learn from the float one: dataset in memory, augmentation and losses.

    class scores     KL(p || q) = sum over classes of p log(p / q), p = softmax of the float network's scores
    probabilities    the same, p and q as they are
    numbers          sum (y - x)^2 / sum (y - mean y)^2

each on average over images and positions, summed over outputs. Images are mirrored, shifted and mixed alike for both:
a teacher that answers to what it has not learned by heart tells more of itself. A model that normalises by itself gets
the same pixels, mirrored and shifted alike.

Sources: Hinton et al. 2015, arXiv 1503.02531, at temperature 1; Beyer et al. 2022, arXiv 2106.05237; mixing: Zhang et
al. 2018, arXiv 1710.09412.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qconv.config.data_options import Layout, Preprocessing
from qconv.data.model_with_data import ModelWithData
from qconv.data.preprocessing import InputSpec, layout_order
from qconv.errors import QconvError, format_shape
from qconv.metrics.classification import CLASS_KINDS
from qconv.reporter import Reporter
from qconv.results.training import ValidationScore
from qconv.runtime.outputs import ModelOutput, find_class_vector
from qconv.training.network import TorchNetwork
from qconv.training.trainable import LearnedParameters

SMALLEST_PROBABILITY = 1e-8
"""Floor of probabilities, and of the variance as a share, in the losses."""


def choose_loss(output: ModelOutput, said: Tensor) -> str:
    """The loss of an output: "numbers", or, where it holds classes, "probabilities" if these sum up to 1, or "scores".

    said: what the float network says on some pictures. Maps with their classes on another axis than 1 are numbers.
    """
    seen = output.seen(tuple(said.shape))
    if seen.kind not in CLASS_KINDS or seen.axis != 1 or said.shape[1] == 1:
        return "numbers"
    sums = said.sum(dim=1)
    whole = bool((said >= 0).all()) and bool((sums - 1).abs().max() < 1e-3)
    return "probabilities" if whole else "scores"


def distillation_loss(kinds: Sequence[str], wanted: Sequence[Tensor], said: Sequence[Tensor]) -> Tensor:
    """Compute the loss of the quantized network's outputs against the float network's, summed over outputs.

    Args:
        kinds: What each output holds, as `choose_loss` names it.
        wanted: The float network's outputs, (N, ...) each.
        said: The quantized network's outputs, of the same shapes.

    Returns:
        The loss, of shape ().
    """
    total = torch.zeros((), device=said[0].device)
    for kind, y, x in zip(kinds, wanted, said, strict=True):
        total = total + _LOSSES[kind](y.float(), x.float())
    return total


def label_loss(kind: str, said: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross entropy of class scores or probabilities `said`, (N, C), with labels (N,)."""
    said = said.flatten(1)
    logs = torch.log_softmax(said, dim=1) if kind == "scores" else torch.log(said.clamp_min(SMALLEST_PROBABILITY))
    return F.nll_loss(logs, labels)


def count_agreeing(kinds: Sequence[str], wanted: Sequence[Tensor], said: Sequence[Tensor]) -> tuple[int, int]:
    """Count the positions where both networks choose the same class, and all; (0, 0) without any class output."""
    equal = places = 0
    for kind, y, x in zip(kinds, wanted, said, strict=True):
        if kind != "numbers":
            same = y.argmax(dim=1) == x.argmax(dim=1)
            equal, places = equal + int(same.sum()), places + same.numel()
    return equal, places


def _divergence_of_scores(y: Tensor, x: Tensor) -> Tensor:
    p, q = torch.log_softmax(y, dim=1), torch.log_softmax(x, dim=1)
    return (p.exp() * (p - q)).sum(dim=1).mean()


def _divergence_of_probabilities(y: Tensor, x: Tensor) -> Tensor:
    p, q = torch.log(y.clamp_min(SMALLEST_PROBABILITY)), torch.log(x.clamp_min(SMALLEST_PROBABILITY))
    return (y * (p - q)).sum(dim=1).mean()


def _relative_squared_error(y: Tensor, x: Tensor) -> Tensor:
    spread = (y - y.mean()).square().sum() if y.numel() > 1 else y.square().sum()
    return (y - x).square().sum() / (spread + SMALLEST_PROBABILITY * y.numel())


_LOSSES = {
    "scores": _divergence_of_scores,
    "probabilities": _divergence_of_probabilities,
    "numbers": _relative_squared_error,
}


MOST_BYTES_IN_MEMORY = 2**31
"""Bytes of pixels; more go to a temporary file."""


@dataclass(frozen=True, slots=True)
class InMemoryDataset:
    """All training images in memory.

    Attributes:
        numbers: uint8 pixels in the float model's layout, or samples as they are, (N, ...).
        prep: How pixels become the float model's input; None for samples.
        order: The axes of a batch of pixels as the quantized model takes them; None where it takes what the float model
        does. paths: Where each image came from, (N,).
    """

    numbers: NDArray[Any]
    prep: Preprocessing | None
    order: tuple[int, ...] | None
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.numbers)


def read_into_memory(
    own: ModelWithData,
    teacher: ModelWithData,
    reporter: Reporter,
) -> InMemoryDataset:
    """Read the images of two models that are fed with the same preprocessing.

    Raises:
        QconvError: The models are fed differently, or there is no room for the images.
    """
    feed = teacher.feed
    if len(feed.inputs) != 1:
        raise QconvError(
            f"{teacher.session.name} has {len(feed.inputs)} inputs, and training feeds one.",
            "quantization-aware training is for networks that read one picture.",
        )
    order = _axis_order(own, teacher)
    feed.reporter, feed.batch = reporter, 1
    # rows come one by one, whatever batch the model is fixed to
    (spec,) = feed.inputs
    feed.inputs = [InputSpec(spec.name, spec.dtype, (None, *spec.shape[1:]))]
    prep, paths = feed.preprocessing, feed.listing.paths
    if prep is not None:
        feed.take_pixels(prep.layout)
    numbers = None
    count = 0
    for batch in feed.iter_batches("read"):
        row = batch[spec.name]
        if numbers is None:
            numbers = _allocate((len(paths), *row.shape[1:]), row.dtype)
        if row.shape[1:] != numbers.shape[1:]:
            fact = f"samples differ in shape: {format_shape(row.shape[1:])} and {format_shape(numbers.shape[1:])}."
            raise QconvError(fact, "bring them to one shape.")
        numbers[count] = row[0]
        count += 1
    assert numbers is not None
    left = tuple(path for path in paths if path not in feed.lost)
    return InMemoryDataset(numbers[:count], prep, order, left)


def _axis_order(own: ModelWithData, teacher: ModelWithData) -> tuple[int, ...] | None:
    mine, its = own.feed.preprocessing, teacher.feed.preprocessing
    if own.takes_the_same_as(teacher):
        return None
    pixels = mine is not None and mine.keeps_pixels and own.feed.inputs[0].dtype.kind in "iu"
    if pixels and mine is not None and its is not None:
        plain = replace(its.as_pixels(mine.layout), preset="", source="", embedded=None)
        if plain == replace(mine, preset="", source="", embedded=None):
            return layout_order(its.layout, Layout(mine.layout))
    raise QconvError(
        f"{own.session.name} and {teacher.session.name} are fed with different inputs: {own.words}, and "
        f"{teacher.words}.",
        "pass the float model that it was made from with --teacher, and no preprocessing options.",
    )


def _allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size <= MOST_BYTES_IN_MEMORY:
        return np.empty(shape, dtype)
    try:
        file = tempfile.TemporaryFile(prefix="qconv-")  # noqa: SIM115  # gone with the array
        file.truncate(size)
        return np.memmap(file, dtype, "r+", shape=shape)
    except OSError:
        raise QconvError(
            f"No space is left in {tempfile.gettempdir()} for {size / 2**30:.1f} GiB of pictures.",
            "set TMPDIR to a larger disk, or use fewer pictures with --samples.",
        ) from None


Ints = NDArray[np.int64]

MOST_SHIFTED = 1 / 8
"""Largest shift of an image, as a share of its side."""

MOST_MIXED = 1 / 2
"""Largest share of another image that is mixed in."""

VALIDATION_BATCH = 64
"""Images per run in validation."""


class TrainingInputs:
    """Batches of an in-memory dataset, as tensors for both networks."""

    def __init__(self, dataset: InMemoryDataset, device: torch.device) -> None:
        self.dataset, self.device = dataset, device
        prep = dataset.prep
        if prep is not None:
            shape = (1, -1, 1, 1) if prep.layout is Layout.NCHW else (1, 1, 1, -1)
            self._mean, self._std = (
                torch.tensor(numbers, dtype=torch.float32, device=device).reshape(shape)
                for numbers in (prep.mean, prep.std)
            )

    def of(self, chosen: NDArray[np.int64], rng: np.random.Generator | None = None, *, mix: bool = True) -> Tensor:
        """Load a batch, (n, ...), pixels or samples.

        Args:
            chosen: Indices of the images.
            rng: Draws mirroring, shifts and mixing; None leaves images as they are.
            mix: Whether images are mixed with each other.
        """
        x = torch.from_numpy(np.ascontiguousarray(self.dataset.numbers[chosen])).to(self.device)
        if rng is None:
            return x
        x = self._shaken(x, rng)
        return self._mixed(x, rng) if mix else x

    def _shaken(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        """Mirror and shift images at random. Samples may be anything, and stay."""
        prep, count = self.dataset.prep, len(x)
        if prep is None:
            return x
        rows, columns = (2, 3) if prep.layout is Layout.NCHW else (1, 2)
        mirrored = torch.from_numpy(rng.random(count) < 1 / 2).to(self.device)
        x = torch.where(mirrored.reshape(-1, 1, 1, 1), x.flip(columns), x)
        for axis in (rows, columns):
            most = int(MOST_SHIFTED * x.shape[axis])
            x = _shift_images(x, axis, rng.integers(-most, most + 1, count))
        return x

    def _mixed(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        """Replace a part of half the images by a part of another, on which the teacher is less certain (CutMix)."""
        drawn = rng.uniform(0, MOST_MIXED, len(x)) * (rng.random(len(x)) < 1 / 2)
        share = torch.from_numpy(drawn.astype(np.float32)).to(self.device)
        share = share.reshape([-1] + [1] * (x.ndim - 1))
        other = torch.from_numpy(rng.permutation(len(x))).to(self.device)
        mixed = (1 - share) * x + share * x[other]
        return mixed if self.dataset.prep is None else torch.round(mixed)

    def for_teacher(self, x: Tensor) -> Tensor:
        """Convert a batch to the float network's input."""
        prep = self.dataset.prep
        return x if prep is None else (x.float() * prep.scale - self._mean) / self._std

    def for_student(self, x: Tensor) -> Tensor:
        """Convert a batch to the quantized network's input."""
        return self.for_teacher(x) if self.dataset.order is None else x.permute(*self.dataset.order).float()


def _shift_images(x: Tensor, axis: int, by: NDArray[np.int64]) -> Tensor:
    """Shift each image along an axis, repeating its border."""
    places = np.clip(np.arange(x.shape[axis]) + by[:, None], 0, x.shape[axis] - 1)
    index = torch.from_numpy(places).to(x.device)
    shape = [1] * x.ndim
    shape[0], shape[axis] = index.shape
    return torch.gather(
        x, axis, index.reshape(shape).expand(*[len(by) if i == 0 else s for i, s in enumerate(x.shape)])
    )


@dataclass(frozen=True, slots=True)
class Distillation:
    """A student network, its teacher, and the images that it learns from and is validated on.

    Attributes:
        student: The quantized network.
        teacher: The float network.
        learned: The parameters of the student that are trained.
        inputs: The images.
        taught: Indices of the images that are learned from.
        held: Indices of the held-out images.
        fixed: The batch size that the networks are fixed to; None where they take any.
        kinds: What each output holds, as `choose_loss` names it.
        vector: Index of the output with one score a class; None where none has.
        classes: The number of classes of that output.
        labels: The classes of all images, (N,); None to learn from the teacher alone.
    """

    student: TorchNetwork
    teacher: TorchNetwork
    learned: LearnedParameters
    inputs: TrainingInputs
    taught: Ints
    held: Ints
    fixed: int | None
    kinds: tuple[str, ...]
    vector: int | None
    classes: int
    labels: Ints | None = None

    @classmethod
    def of(
        cls,
        student: TorchNetwork,
        teacher: TorchNetwork,
        learned: LearnedParameters,
        inputs: TrainingInputs,
        taught: Ints,
        held: Ints,
        fixed: int | None,
        outputs: Sequence[ModelOutput],
    ) -> Distillation:
        """Set up distillation; outputs: what the student's outputs hold."""
        first = np.resize(held, fixed or min(len(held), VALIDATION_BATCH))
        found = cls(student, teacher, learned, inputs, taught, held, fixed, (), None, 0)
        teacher_outputs = found.teacher_outputs(inputs.of(first))
        kinds = tuple(map(choose_loss, outputs, teacher_outputs))
        vector = find_class_vector([o.seen(tuple(y.shape)) for o, y in zip(outputs, teacher_outputs, strict=True)])
        classes = 0 if vector is None else int(teacher_outputs[vector].shape[1])
        return cls(student, teacher, learned, inputs, taught, held, fixed, kinds, vector, classes)

    def with_labels(self, labels: Ints | None) -> Distillation:
        """Return a copy that learns from labels as well."""
        return replace(self, labels=labels)

    def teacher_outputs(self, x: Tensor) -> list[Tensor]:
        """Run the teacher on a batch. Returns its outputs in the student's order."""
        with torch.no_grad():
            found = self.teacher.run({self.teacher.inputs[0]: self.inputs.for_teacher(x)}, self.student.outputs)
        return list(found.values())

    def student_outputs(self, x: Tensor, given: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the student on a batch, with the learned parameters `given` by name. Returns its outputs."""
        return list(self.student.run({self.student.inputs[0]: self.inputs.for_student(x), **given}).values())

    def loss(self, part: Ints, rng: np.random.Generator | None) -> Tensor:
        """Compute the loss of a batch of images, by their indices; rng draws the augmentation."""
        x = self.inputs.of(part, rng, mix=self.labels is None)
        said = self.student_outputs(x, self.learned.given())
        loss = distillation_loss(self.kinds, self.teacher_outputs(x), said)
        if self.labels is None or self.vector is None:
            return loss
        scores = said[self.vector]
        return loss + label_loss(self.kinds[self.vector], scores, torch.from_numpy(self.labels[part]).to(scores.device))

    def parts(self, chosen: Ints, most: int) -> Iterator[Ints]:
        """Split indices into batches of at most `most`; those of networks with a fixed batch are filled up."""
        size = self.fixed or most
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            yield part if self.fixed is None else np.resize(part, size)

    def validate(self) -> ValidationScore:
        """Validate the student on the held-out images."""
        equal = places = pictures = 0
        total = 0.0
        with torch.no_grad():
            given = self.learned.given()
            for part in self.parts(self.held, VALIDATION_BATCH):
                x = self.inputs.of(part)
                wanted, said = self.teacher_outputs(x), self.student_outputs(x, given)
                hits, of = self.count_correct(part, wanted, said)
                equal, places, pictures = equal + hits, places + of, pictures + len(part)
                total += float(distillation_loss(self.kinds, wanted, said)) * len(part)
        return ValidationScore(equal / places if places else None, total / pictures)

    def count_correct(self, part: Ints, wanted: list[Tensor], said: list[Tensor]) -> tuple[int, int]:
        """Count the positions where the student is right, by labels or by the teacher's class, and all positions."""
        if self.labels is None or self.vector is None:
            return count_agreeing(self.kinds, wanted, said)
        hits = said[self.vector].flatten(1).argmax(dim=1).cpu().numpy() == self.labels[part]
        return int(hits.sum()), len(part)
