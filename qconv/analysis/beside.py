"""Two files and a folder of pictures: how both are fed, and what a comparison layer by layer finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qconv.analysis.compare import Progress, Question, compare
from qconv.config.recipe import Recipe
from qconv.data.loader import ModelWithData, iter_paired_batches, open_models
from qconv.errors import QconvError
from qconv.ir.files import Source
from qconv.results.comparison import Comparison


@dataclass(frozen=True, slots=True)
class Looked:
    """What was found, and how the float model was fed."""

    compared: Comparison
    fed: ModelWithData


def on_pictures(
    float_model: Source, model: Source, recipe: Recipe, warn: Callable[[str], None], progress: Progress
) -> Looked:
    """recipe: names the pictures (its `calib`), and how they are fed.

    Raises QconvError for what cannot be compared, or fed.
    """
    own, other = open_models(model, float_model, recipe, warn)
    assert other is not None
    missing = next((name for name in own.session.outputs if name not in other.session.outputs), None)
    if missing is not None:
        names = ", ".join(other.session.outputs)
        raise QconvError(f"{other.session.name} has no output {missing!r}, but {names}.", "compare like with like.")
    lost: set[Path] = set()
    told: set[str] = set()

    def once(text: str) -> None:
        if text not in told:
            told.add(text)
            warn(text)

    def feeds() -> Any:
        return ((its, mine) for mine, its in iter_paired_batches(own, other, once, lost.add))

    total = len(own.feed.listing.paths)
    question = Question(float_model, model, feeds, total, own.words, recipe.threads)
    found = compare(question, progress)
    return Looked(replace(found, images=total - len(lost)), other)
