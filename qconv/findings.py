"""What a pass did and what it refused to do: a refusal with a reason is data, and the report prints both."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Change:
    """`step` changed the node or tensor `where`: `what`.

    kind: the same without names, so that a summary can count equal changes; `what` itself where it has none.
    """

    step: str
    where: str
    what: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """`step` left the node or tensor `where` alone, and `why`."""

    step: str
    where: str
    why: str


Finding = Change | Skipped
