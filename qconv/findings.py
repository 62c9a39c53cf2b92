"""What a pass did and what it refused to do: a refusal with a reason is data, and the report prints both."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Change:
    """`step` changed the node or tensor `where`: `what`."""

    step: str
    where: str
    what: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """`step` left the node or tensor `where` alone, and `why`."""

    step: str
    where: str
    why: str


Finding = Change | Skipped
