"""The story of synthesized pictures: a float model goes in, a folder of pictures comes out that it takes for those that
it was trained on, by what its BatchNormalizations remember (dream.py).

Each picture is there twice: `000.png` to look at, and `000.npy`, the very numbers that the network gets of it. In a
folder both have one stem, so that only the picture is read (listing.py): how it is fed is then known to all that is
made of it.
SET tells what the set is of, and that it may be replaced by another.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qconv.config.preprocessing import AUTO, Preprocessing, ResizeFilter
from qconv.config.recipe import Recipe
from qconv.config.serialization import format_option
from qconv.data import images
from qconv.data.autodetect import DetectedPreprocessing, detect_without_images
from qconv.data_free.dead_leaves import GeneratedImageLoader, draw_dead_leaves_set
from qconv.errors import QconvError
from qconv.ir import load
from qconv.ir.files import Source, external_data_files, hash_model, read_proto, refuse_quantized
from qconv.ir.model import Model
from qconv.report import plot
from qconv.results.training import GOOD_MATCH, POOR_MATCH, BatchNormMatch, SynthesisResult
from qconv.runtime.benchmark import peak_rss_mb
from qconv.runtime.session import Session
from qconv.storage import check_output_folder, refuse_path_inside, replace_folder_atomically
from qconv.training.dream import Dream, batch_of
from qconv.training.options import SynthesisOptions
from qconv.training.remembered import Remembered
from qconv.training.torchgraph import Network, require_operators
from qconv.training.torchrun import determined, device_of

SET = "synthesized.json"
KINDS = ("png", "npy")
NAMED = 3

Pixels = NDArray[np.uint8]


@dataclass(slots=True)
class Listener:
    """Who hears about a run while it lasts. progress: (stage, done, in all)."""

    warn: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None


@dataclass(frozen=True, slots=True)
class Made:
    """pixels: (N, H, W, 3) in RGB, or (N, H, W, 1)."""

    found: SynthesisResult
    pixels: Pixels


def synthesize(source: Source, out: Path, wishes: SynthesisOptions, listener: Listener | None = None) -> Made:
    """Make pictures for the float model `source`, and put them into the folder `out`.

    Raises QconvError for anything the user can mend; then nothing is left behind.
    """
    started = time.perf_counter()
    listener = listener or Listener()
    warnings: list[str] = []

    def warn(text: str) -> None:
        warnings.append(text)
        listener.warn(text)

    _check(source, out)
    with determined(wishes.threads):
        proto = read_proto(source)
        refuse_quantized(proto, source.name)
        hashed = hash_model(source, external_data_files(proto, source))
        model, _ = load.load(proto, source)
        require_operators(model)
        remembered = Remembered.of(model, source.name)
        if remembered.doubt:
            warn(remembered.doubt)
        fed = _Fed.of(model, source, wishes)
        prep = fed.detected.preprocessing
        assert prep is not None
        for doubt in fed.detected.doubts():
            warn(doubt)
        if fed.batch is not None and wishes.batch not in (None, fed.batch):
            warn(f"--batch {wishes.batch} is not used: the model's own batch is {fed.batch}.")
        batch = fed.batch or min(wishes.batch or batch_of(prep), wishes.count)
        device = device_of(wishes.device)
        pixels = draw_dead_leaves_set(prep, wishes.count, batch, wishes.seed)
        dream = Dream(Network(model, device), prep, remembered.wanted, pixels, batch)
        before = dream.look()
        dream.run(wishes.steps, lambda done, total: listener.progress("synthesize", done, total))
        after = dream.look()
    layers = tuple(
        BatchNormMatch(node.name or "", reference.name, reference.mean.size, *distances)
        for node, reference, *distances in zip(remembered.nodes, remembered.wanted, before, after, strict=True)
    )
    found = SynthesisResult(
        model=source.name,
        digest=hashed,
        output=str(out),
        wishes=wishes,
        preprocessing=prep,
        words=fed.detected.in_words(),
        # the pictures have the network's size already
        options=tuple(
            format_option("preprocessing", replace(wishes.preprocessing, resize="auto", filter=ResizeFilter.BILINEAR))
        ),
        piped=source.path is None,
        batch=batch,
        layers=layers,
        loss=tuple(dream.loss),
        torch=torch.__version__,
        device=device,
        warnings=warnings,
    )
    _judge(found, warn)
    pixels = dream.pixels[: wishes.count]
    with replace_folder_atomically(out, foreign_in) as folder:
        _write(folder, pixels, prep, fed.dtype, found)
    found.seconds, found.peak_rss_mb = time.perf_counter() - started, peak_rss_mb()
    return Made(found, pixels)


def foreign_in(folder: Path) -> str | None:
    """A name in a folder that is not of a set that was made here, None where all are, or none is there."""
    names = set(os.listdir(folder))
    try:
        count = int(json.loads((folder / SET).read_text("utf-8"))["pictures"])
    except (OSError, ValueError, KeyError, TypeError):
        count = 0
    ours = {SET, *(f"{stem}.{kind}" for stem in stems(count) for kind in KINDS)} if count else set()
    return min(names - ours, default=None)


def stems(count: int) -> list[str]:
    """The names of so many pictures, without their ends."""
    digits = max(3, len(str(count - 1)))
    return [f"{number:0{digits}}" for number in range(count)]


def _check(source: Source, out: Path) -> None:
    """Said before the work."""
    check_output_folder(out, foreign_in)
    for path in (source.path, *external_data_files(read_proto(source), source)):
        refuse_path_inside(out, path, "The model")


@dataclass(frozen=True, slots=True)
class _Fed:
    """How the network is fed. dtype: that it takes. batch: None where that is open."""

    detected: DetectedPreprocessing
    dtype: np.dtype[Any]
    batch: int | None

    @classmethod
    def of(cls, model: Model, source: Source, wishes: SynthesisOptions) -> _Fed:
        """Found out on made-up pictures. Raises QconvError where that cannot be: not all inputs are pictures."""
        session = Session(source.runnable, name=source.name, threads=wishes.threads)
        recipe = Recipe(data_free=True, preprocessing=wishes.preprocessing, threads=wishes.threads)
        try:
            imagined = GeneratedImageLoader.like(session, recipe)
        except QconvError as error:
            asks = "--size" in error.hint or "leave" in error.hint
            other = "synthesize is for networks of one input, a picture of 1 or 3 channels: calibrate with samples."
            raise QconvError(error.message, error.hint if asks else other) from None
        (spec,) = imagined.inputs
        detected = detect_without_images(model, session, imagined, wishes.preprocessing, threads=wishes.threads)
        prep = detected.preprocessing
        if spec.dtype == np.uint8 and prep is not None and not prep.keeps_pixels:
            fact = f"{source.name} takes bytes, which cannot hold what the preprocessing makes of pixels."
            raise QconvError(fact, "pass --preprocess raw.")
        return cls(detected, spec.dtype, spec.shape[0])


def _judge(found: SynthesisResult, warn: Callable[[str], None]) -> None:
    """Tell of statistics that were not matched."""
    more = "more --iterations may help"
    if found.after > GOOD_MATCH:
        auto = "" if found.wishes.preprocessing.preset != AUTO else ", as may another --preprocess"
        warn(
            f"the pictures are not like those of training: statistics are {found.after:.2f} apart on average, where "
            f"dozens of photographs come to 0.04; {more}{auto}."
        )
    far = [layer for layer in found.worst_first if layer.after > POOR_MATCH]
    if far:
        names = ", ".join(layer.name for layer in far[:NAMED])
        others = f" and {len(far) - NAMED} more" if len(far) > NAMED else ""
        warn(f"{names}{others}: statistics were not matched ({far[0].after:.2f} apart); {more}.")


def _write(folder: Path, pixels: Pixels, prep: Preprocessing, dtype: np.dtype[Any], found: SynthesisResult) -> None:
    for stem, picture in zip(stems(len(pixels)), pixels, strict=True):
        (folder / f"{stem}.png").write_bytes(plot.picture(picture))
        values = images.cast_pixels(images.normalize_pixels(images.arrange_pixels(picture, prep), prep), dtype)
        np.save(folder / f"{stem}.npy", values)
    (folder / SET).write_text(json.dumps(found.of_the_set(), allow_nan=False, indent=1) + "\n", "utf-8")
