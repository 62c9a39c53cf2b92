"""Defines `Tasks`: what the user says that a model's outputs are, with `--task` and `--decode`."""

from __future__ import annotations

from dataclasses import dataclass

from qconv.config.choices import require, take_types

TASKS = ("auto", "classify", "detect", "segment", "regress", "embed", "keypoints")
"""What a model is for; auto finds it out, output by output."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """What the user says of a model's outputs: `--task` and `--decode`. Raises QconvError for what cannot be.

    task: One of TASKS for all outputs, or OUTPUT=TASK for single ones, with commas between them.
    decode: FILE.py:FUNCTION, which makes detections of the outputs; None for a decoder that qconv knows.
    """

    task: str = "auto"
    decode: str | None = None

    def __post_init__(self) -> None:
        take_types(self, {"task": "--task", "decode": "--decode"})
        fix = f"use one of {', '.join(TASKS)}, or OUTPUT=TASK with commas between several."
        seen: set[str] = set()
        for entry in self.task.split(","):
            output, equals, task = entry.rpartition("=")
            require(task in TASKS and bool(output or not equals), f"--task {self.task}", fix)
            both = f"--task {self.task} with two tasks for {output or 'all outputs'}"
            require(output not in seen, both, "give one of them.")
            seen.add(output)
        if self.decode is not None:
            file, _, function = self.decode.rpartition(":")
            right = file.endswith(".py") and function.isidentifier()
            require(right, f"--decode {self.decode}", "name a file and a function in it: FILE.py:FUNCTION.")
            other = next(
                (name for name in self.task.split(",") if name not in ("auto", "detect") and "=" not in name), None
            )
            require(other is None, f"--decode with --task {other}", "leave one of them out: a decoder finds boxes.")

    def of(self, output: str) -> str:
        """The task of an output."""
        found = "auto"
        for entry in self.task.split(","):
            name, _, task = entry.rpartition("=")
            if name == output:
                return task
            if not name:
                found = task
        return found

    @property
    def said(self) -> bool:
        """Whether the user has said anything."""
        return self != NO_TASKS


NO_TASKS = Tasks()
"""Where the user has said nothing."""
