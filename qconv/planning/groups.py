"""Things that belong together, joined pair by pair."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Groups(Generic[T]):
    """A division of things into groups, at first each for itself."""

    def __init__(self) -> None:
        self._of: dict[T, set[T]] = {}

    def join(self, things: Iterable[T]) -> None:
        """Make one group of these and of the groups that they are in."""
        together: set[T] = set()
        for thing in things:
            together |= self._of.get(thing, {thing})
        for thing in together:
            self._of[thing] = together

    def in_order(self, order: Iterable[T]) -> list[tuple[T, ...]]:
        """The groups of more than one, each in this order."""
        place = {thing: index for index, thing in enumerate(order)}
        unique = {id(group): group for group in self._of.values() if len(group) > 1}
        return [tuple(sorted(group, key=place.__getitem__)) for group in unique.values()]
