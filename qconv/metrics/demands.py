"""What the user demands of a result, in which measure, and whether a network has that: gates and `--max-drop`.

A demand on a measure that the network cannot have is an error before the work, as soon as its outputs are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconv.config.choices import option_name
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.data.dataset import class_folders_of, find_classes
from qconv.decoding.head import Head
from qconv.errors import QconvError
from qconv.metrics.average_precision import require_detect_extra
from qconv.metrics.network_outputs import NO_DECODER_HINT, NetworkOutputs
from qconv.results.gates import Gate
from qconv.results.quantize import Verification
from qconv.results.scores import (
    AGREEMENT,
    BOXES,
    FLOAT_MAP,
    FLOAT_MIOU,
    MAP,
    MIOU,
    SQNR,
    TOP1,
    Metric,
    find_score,
    value_of,
)
from qconv.runtime.outputs import MAP_KINDS, ModelOutput, OutputKind, find_class_vector

GATES: Mapping[str, Metric] = {
    "min_agreement": AGREEMENT,
    "min_boxes": BOXES,
    "min_map": FLOAT_MAP,
    "min_miou": FLOAT_MIOU,
    "min_sqnr": SQNR,
    "min_top1": TOP1,
}
"""What options that end with status 3 ask for, by their fields."""

DROPS: Mapping[str, Metric] = {
    "agreement": AGREEMENT,
    "boxes": BOXES,
    "map": FLOAT_MAP,
    "miou": FLOAT_MIOU,
    "top1": TOP1,
    "sqnr": SQNR,
}
"""What `--max-drop` can be of."""


BY_LABELS: Mapping[Metric, Metric] = {FLOAT_MAP: MAP, FLOAT_MIOU: MIOU}
"""What labels measure in place of what is measured beside the float model."""


@dataclass(frozen=True, slots=True)
class Demanded:
    """What was measured of a demand: by labels where there are such, else beside the float model.

    metric: the measure that was taken. before: that of the float model; None where it has no bound, or labels gave it
    no number. got: that of the result; None where it has no number.
    """

    metric: Metric
    before: float | None
    got: float | None

    @classmethod
    def of(cls, metric: Metric, verification: Verification) -> Demanded:
        """What a measure that is demanded came to."""
        labelled, own = verification.labelled, BY_LABELS.get(metric, metric)
        found = None if labelled is None else find_score(labelled.scores, own)
        if labelled is None or found is None:
            return cls(metric, metric.equal, verification.value_of(metric))
        return cls(own, value_of(labelled.float_scores, own), found.value)

    def reaches(self, want: float, verification: Verification) -> bool:
        """Whether the result, which `verification` is of, is as good as that."""
        if not self.metric.by_labels:
            return verification.reaches(self.metric, want)
        return self.got is not None and self.metric.lost(want, self.got) <= 0


@dataclass(frozen=True, slots=True)
class OutputNeed:
    """What a measure needs of a network. what: in words. met: whether a network has it. fix: where it has not."""

    what: str
    met: Callable[[NetworkOutputs], bool]
    fix: str


def _tells_classes(output: ModelOutput) -> bool:
    """Whether agreement can be measured of an output: a single score tells no class."""
    if output.kind is OutputKind.CLASS_SCORES:
        return len(output.shape) < 2 or output.shape[1] != 1
    return output.kind in (*MAP_KINDS, OutputKind.INTEGER)


NEEDS_BOXES = OutputNeed("outputs that are read as boxes", lambda network: network.head is not None, NO_DECODER_HINT)

NUMBERLESS = frozenset({OutputKind.CLASS_IDS, OutputKind.INTEGER})
"""Kinds of outputs that have no SQNR."""

NEEDS: Mapping[Metric, OutputNeed] = {
    AGREEMENT: OutputNeed(
        "an output that is one score a class",
        lambda network: any(map(_tells_classes, network.outputs)),
        "ask for decibels, with --min-sqnr or --max-drop sqnr:DB, or say with --task what the outputs are.",
    ),
    BOXES: NEEDS_BOXES,
    FLOAT_MAP: NEEDS_BOXES,
    FLOAT_MIOU: OutputNeed(
        "an output that is a map of classes",
        lambda network: any(output.kind in MAP_KINDS for output in network.outputs),
        "pass --task segment where one is, or ask for decibels, with --min-sqnr or --max-drop sqnr:DB.",
    ),
    SQNR: OutputNeed(
        "an output of floats",
        lambda network: any(output.kind not in NUMBERLESS for output in network.outputs),
        "ask for a share of classes, with --min-agreement or --max-drop agreement:SHARE.",
    ),
}
"""Of measures that not every network has."""


def demanded_measures(asked: Any) -> dict[str, Metric]:
    """The measures that are demanded, each by the option that does so. asked: a Recipe, or what else has gates."""
    found = {option_name(name): metric for name, metric in GATES.items() if getattr(asked, name, None) is not None}
    if isinstance(asked, Recipe) and asked.max_drop is not None:
        found[f"--max-drop {asked.max_drop.measure}"] = DROPS[asked.max_drop.measure]
    return found


def require_extras(asked: Any) -> None:
    """Raise QconvError where a measure that is demanded needs what is not installed."""
    if FLOAT_MAP in demanded_measures(asked).values():
        require_detect_extra()


def demands_outputs(asked: Any) -> bool:
    """Whether a measure is demanded that not every network has. asked: see `demanded_measures`."""
    return any(metric in NEEDS for metric in demanded_measures(asked).values())


def require_measures(asked: Any, network: NetworkOutputs) -> None:
    """Raise QconvError where the network cannot have a measure that is demanded. asked: see `demanded_measures`."""
    for option, metric in demanded_measures(asked).items():
        need = NEEDS.get(metric)
        if need is not None and not need.met(network):
            holds = ", ".join(output.fact.in_words for output in network.outputs)
            raise QconvError(f"{option} needs {need.what}, and this model has none: {holds}.", need.fix)


def needs_labels(asked: Any, data: DataOptions) -> bool:
    """Whether labels are wanted: by the user, or by a demand. asked: see `demanded_measures`."""
    return data.labels is not None or data.classes is not None or _drops_top1(asked)


def _drops_top1(asked: Any) -> bool:
    return TOP1 in demanded_measures(asked).values()


def require_class_folders(asked: Any, data: DataOptions, paths: Sequence[Path], network: NetworkOutputs) -> None:
    """Raise QconvError where top-1 is demanded, and no class folders tell it. asked: see `demanded_measures`."""
    if not _drops_top1(asked):
        return
    if data.labels is not None:
        fact = f"--max-drop top1 needs pictures in class folders, and {data.labels} holds labels of another kind."
        raise QconvError(fact, "leave --labels out, or pass --max-drop map:SHARE or miou:SHARE, which they tell.")
    classes = find_classes(data, data.classes)
    folders = class_folders_of(paths, data) if classes is not None else []
    outputs = find_class_vector(network.outputs) is not None
    if classes is None or not outputs or None in folders:
        why = "the calibration pictures lie in a folder for each class" if outputs else "an output is"
        fact = f"--max-drop top1 is possible only where {why}{'' if outputs else ' one score a class'}."
        raise QconvError(fact, "pass --max-drop agreement:SHARE, which needs no labels.")


def require_boxes(
    asked: Any, network: NetworkOutputs, outputs: Iterable[Sequence[Any]], *, labelled: bool = False
) -> None:
    """Raise QconvError where boxes are demanded, and the float model shows none, beside which there is no number.

    Args:
        asked: See `demanded_measures`.
        network: What the outputs of the float model are.
        outputs: What it says of the pictures, batch by batch; read as far as the first box.
        labelled: Whether there are labels of boxes, by which mAP is measured.
    """
    needing = {BOXES} if labelled else {BOXES, FLOAT_MAP}
    option = next((name for name, metric in demanded_measures(asked).items() if metric in needing), None)
    head = network.head
    if option is None or head is None:
        return
    shown = (x for said in outputs for x in head.read(network.by_name(said), head.usual_score, reference=True))
    if not any(map(len, shown)):
        raise make_no_boxes_error(option, head)


def make_no_boxes_error(option: str, head: Head) -> QconvError:
    """Build the error for an option that needs boxes of the float model, which shows none."""
    fact = f"{option} needs boxes, and the float model shows none above {head.usual_score:g} on these pictures."
    return QconvError(fact, "pass pictures of what it finds, fed as in training, or ask for decibels.")


def check_gates(verification: Verification, asked: Any) -> list[Gate]:
    """The user's demands against what was measured.

    asked: has fields of GATES.
    """
    found = []
    for option, metric in GATES.items():
        want: float | None = getattr(asked, option, None)
        if want is not None:
            demanded = Demanded.of(metric, verification)
            held = demanded.reaches(want, verification)
            of_float = demanded.before if demanded.metric.by_labels else None
            found.append(Gate(option.replace("_", "-"), want, demanded.got, held, of_float))
    return found
