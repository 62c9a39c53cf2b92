"""Several recipes on the same pictures: each goes through the whole pipeline, all are scored and timed alike.

Pictures to score on are held back, as in a diagnosis. How pictures are fed is found out once, and what is seen of a
float network once for all recipes that quantize it; equalization may make a network of its own for a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qconv.analysis.proof import Proof, held_back
from qconv.config.recipe import Recipe
from qconv.ir.files import (
    Source,
    external_data_files,
    file_bytes,
    hash_model,
    open_original,
    read_proto,
    refuse_quantized,
)
from qconv.ir.load import load
from qconv.pipeline.checks import check_output
from qconv.pipeline.collect import CalibrationCache, open_calibration_data
from qconv.pipeline.quantize import Listener
from qconv.results.comparison import Sweep


@dataclass(frozen=True, slots=True)
class Entry:
    """A recipe with its name, where its file goes, and the options that make it, beyond those that all share."""

    name: str
    recipe: Recipe
    out: Path
    options: tuple[str, ...] = ()


def sweep(source: Source, entries: Sequence[Entry], listener: Listener | None = None) -> Sweep:
    """Carry all recipes out, in their order. They must read the same pictures.

    A recipe that fails is a trial that says why; the others go on. Raises QconvError where none can be carried out.
    """
    listener = listener or Listener()
    told: set[str] = set()

    def warn(text: str) -> None:
        if text not in told:
            told.add(text)
            listener.warn(text)

    heard = Listener(warn, listener.progress)
    proto = read_proto(source)
    refuse_quantized(proto, source.name)
    for entry in entries:
        check_output(source, entry.out, external_data_files(proto, source))
    shared = entries[0].recipe
    session = open_original(source, shared)
    held = held_back(session, shared, (), heard)
    del session
    shared = replace(shared, samples=min(shared.samples, held.most))
    memory = CalibrationCache()
    made_from = hash_model(source, external_data_files(proto, source))
    pictures = open_calibration_data(source, made_from, shared, Listener().warn, listener.progress)
    pictures.memory = memory
    pictures.settle(load(proto, source)[0], shared)
    held.feed.preprocessing = pictures.preprocessing
    if shared.embed_preprocessing is not None:
        held.feed.take_pixels(shared.embed_preprocessing)
    proof = Proof.of(source, held.feed, shared, heard, memory)
    for done, entry in enumerate(entries):
        listener.progress("recipes", done, len(entries))
        recipe = replace(entry.recipe, samples=shared.samples)
        proof.listener = Listener(partial(_warn_of, entry.name, warn), listener.progress)
        proof.carry_out(entry.name, recipe, entry.out, entry.options)
    failures = [made.failure for made in proof.made if made.failure is not None]
    if len(failures) == len(entries):
        raise failures[0]
    proof.listener = heard
    float_ms = proof.timed(shared.threads, held.feed.size)
    trials, outputs = tuple(made.trial for made in proof.made), tuple(str(entry.out) for entry in entries)
    return Sweep(
        source.name,
        file_bytes(read_proto(source), source),
        float_ms,
        proof.scored.pictures,
        held.unseen,
        trials,
        outputs,
    )


def _warn_of(recipe: str, warn: Callable[[str], None], text: str) -> None:
    warn(f"{recipe}: {text}")
