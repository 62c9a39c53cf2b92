"""Defines `DataOptions`: which images a command reads, and how a network is fed with them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconv.config.choices import NO_IMAGES, TASKS, as_json_value, as_texts, option_name, require, require_integer
from qconv.config.preprocessing import PreprocessingOptions

if TYPE_CHECKING:
    from qconv.data.dataset import ArraySamples


@dataclass(frozen=True, slots=True)
class DataOptions:
    """Which images are read, and how they are fed. Raises QconvError for values that cannot be.

    Attributes:
        paths: Folders, images, or text files with one path a line; none where statistics or no images are used.
        samples: The most images to read; None for all.
        batch: Images in a batch.
        seed: Of the draw of images, and of all else that is drawn at random.
        glob: What the name or path of a file must match; None for all files.
        preprocessing: What is said of how the network is fed.
        task: What the model is for, which decides what its outputs hold; "auto" finds it out.
        arrays: Samples that were given as arrays, which `paths` then only names.
    """

    paths: tuple[str, ...] = ()
    samples: int | None = 128
    batch: int = 1
    seed: int = 0
    glob: str | None = None
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    task: str = "auto"
    arrays: ArraySamples | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", as_texts(self.paths, "paths"))
        hint = f"pass Recipe(data_free=True) for no images; a folder of that name is ./{NO_IMAGES}."
        require(NO_IMAGES not in self.paths, f"paths with {NO_IMAGES!r}", hint)
        for name in ("samples", "batch", "seed"):
            if name != "samples" or self.samples is not None:
                require_integer(name, getattr(self, name))
        require(self.samples is None or self.samples >= 1, f"--samples {self.samples}", "use at least 1 picture.")
        require(self.batch >= 1, f"--batch {self.batch}", "use at least 1.")
        require(self.seed >= 0, f"--seed {self.seed}", "use 0 or more.")
        whole = isinstance(self.preprocessing, PreprocessingOptions)
        require(whole, f"preprocessing {self.preprocessing!r}", "pass PreprocessingOptions(preset=...).")
        require(self.task in TASKS, f"--task {self.task}", f"use one of {', '.join(TASKS)}.")

    @property
    def root(self) -> Path:
        """The first of the paths, in whose folders classes are looked for."""
        return Path(self.paths[0])

    def require_defaults(self, names: tuple[str, ...], told: str) -> None:
        """Raise QconvError where one of these options was given. told: why none can be, in the words of an error."""
        for part in fields(self):
            if part.name in names:
                idle = getattr(self, part.name) == part.default
                require(idle, f"{option_name(part.name)} {told}", "leave it out: no picture is read.")

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form of what shapes a file that is made with these images; their paths and batches do not.

        The task is in it where the user has named one.
        """
        unsaid = {"paths", "batch", "arrays", *(["task"] if self.task == "auto" else [])}
        return {name: value for name, value in as_json_value(self).items() if name not in unsaid}
