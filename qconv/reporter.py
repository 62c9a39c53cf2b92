"""Defines `Reporter`, through which a run tells its user what to beware of, and how far it has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Reporter:
    """Passes on what a run tells its user; without functions to pass it to, it only keeps the warnings.

    Attributes:
        on_warning: Takes the text of a warning, each text once a run.
        on_progress: Takes a stage, how much of it is done, and how much there is to do.
        warnings: All texts so far, in order; those of several runs that were given the same reporter.
    """

    on_warning: Callable[[str], None] | None = None
    on_progress: Callable[[str, int, int], None] | None = None
    warnings: list[str] = field(default_factory=list, init=False)

    def warn(self, text: str) -> None:
        """Tell what did not go as it should, unless that was told before."""
        if text in self.warnings:
            return
        self._tell(text)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Tell how far a stage has come."""
        if self.on_progress is not None:
            self.on_progress(stage, done, total)

    def of_part(self, name: str = "") -> Reporter:
        """Return a reporter that has warnings of its own and passes them on. name: what they begin with, if any."""
        told = (lambda text: self.warn(f"{name}: {text}")) if name else self.warn
        return Reporter(told, self.progress)

    def of_run(self) -> Reporter:
        """Return a reporter for one run, whose warnings are passed on whatever other runs have told."""
        return Reporter(self._tell, self.progress)

    def without_warnings(self) -> Reporter:
        """Return a reporter that passes on progress alone."""
        return Reporter(on_progress=self.progress)

    def without_progress(self) -> Reporter:
        """Return a reporter that passes on warnings alone."""
        return Reporter(self.warn)

    def _tell(self, text: str) -> None:
        self.warnings.append(text)
        if self.on_warning is not None:
            self.on_warning(text)
