"""Decides which class of the model a label of boxes is: by a map, its name, the order of ids, or its number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qconv.data.label_files import Key, LabelRequest, ModelClasses, read_label_map
from qconv.errors import QconvError, format_count, format_some

MAP_HINT = "say which class each label is: --label-map FILE, or list the model's classes with --classes FILE."


@dataclass(frozen=True, slots=True)
class LabelKeys:
    """What labels call their classes.

    Attributes:
        counts: Boxes of each class that occurs.
        names: Of classes, where the labels tell them.
        ids: Of all classes, in their order, where the order alone tells the model's class; else empty.
        numbered: Whether an id is the number of the model's class.
    """

    counts: Mapping[Key, int]
    names: Mapping[Key, str] = field(default_factory=dict)
    ids: tuple[Key, ...] = ()
    numbered: bool = False

    def in_words(self, key: Key) -> str:
        """A class as people read it."""
        return f"{self.names[key]!r}" if key in self.names else str(key)


def number_classes(
    labels: LabelKeys, request: LabelRequest, model: ModelClasses, warn: Callable[[str], None]
) -> dict[Key, int]:
    """The model's class of each label that has one.

    warn: hears of classes that are left out, with their boxes.

    Raises:
        QconvError: None is known, or one is beyond the model's classes.
    """
    known = model.named_by(request)
    if request.label_map is not None:
        numbers = _by_map(labels, request, known)
    elif known.names and labels.names and (by_name := _by_name(labels, known, warn)) is not None:
        if request.offset and request.classes is None:
            fact = "--label-offset is not used: labels and model name their classes."
            raise QconvError(fact, "leave it out, or list names in another order with --classes FILE.")
        numbers = by_name
    else:
        numbers = _by_number(labels, request, known)
    odd = next((key for key in labels.counts if key in numbers and not _is_class(numbers[key], known.count)), None)
    if odd is not None:
        beyond = f"the model has {known.count}" if known.count is not None else "that is none"
        fact = f"{request.path} has boxes of {labels.in_words(odd)}, class {numbers[odd]}, but {beyond}."
        raise QconvError(fact, MAP_HINT)
    left = {key: count for key, count in labels.counts.items() if key not in numbers}
    if left and len(left) == len(labels.counts):
        some = format_some([labels.in_words(key) for key in left])
        raise QconvError(f"No label in {request.path} is a class of the model's: {some}.", MAP_HINT)
    if left and request.label_map is None:
        some = format_some([labels.in_words(key) for key in left])
        boxes = format_count(sum(left.values()), "box")
        warn(f"{boxes} of classes that the model does not have are left out: {some}.")
    return numbers


def _is_class(number: int, count: int | None) -> bool:
    return number >= 0 and (count is None or number < count)


def _by_map(labels: LabelKeys, request: LabelRequest, known: ModelClasses) -> dict[Key, int]:
    assert request.label_map is not None
    if request.offset and request.classes is None:
        fact = "--label-offset is not used: --label-map says which class each label is."
        raise QconvError(fact, "leave one of them out.")
    told = read_label_map(request.label_map, known)
    keys = {key: name for key in labels.counts for name in (labels.names.get(key), str(key)) if name in told}
    found = {key: told[name] for key, name in keys.items()}
    return {key: number for key, number in found.items() if number is not None}


def _by_name(labels: LabelKeys, known: ModelClasses, warn: Callable[[str], None]) -> dict[Key, int] | None:
    """None where numbers are to be believed rather than names."""
    numbers = {name: number for number, name in known.names.items()}
    found = {key: numbers[name] for key, name in labels.names.items() if name in numbers}
    if labels.numbered and len(found) < len(labels.names):
        odd = next(name for name in labels.names.values() if name not in numbers)
        warn(f"classes of the labels go by their numbers: the model names no class {odd!r}.")
        return None
    return found


def _by_number(labels: LabelKeys, request: LabelRequest, known: ModelClasses) -> dict[Key, int]:
    if labels.numbered:
        return {key: key + request.offset for key in labels.counts if isinstance(key, int)}
    if not labels.ids:
        fact = f"{request.path} names its classes, but the names of the model's are not known."
        raise QconvError(fact, MAP_HINT)
    classes = len(labels.ids) + request.offset
    if known.count not in (None, classes):
        more = f", shifted by {request.offset}," if request.offset else ""
        fact = f"{request.path} has {len(labels.ids)} categories{more} and the model {known.count} classes"
        raise QconvError(f"{fact}, so that their order tells nothing.", MAP_HINT)
    return {key: rank + request.offset for rank, key in enumerate(labels.ids)}
