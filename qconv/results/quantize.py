"""This module holds what a run of `quantize` found as data: the object behind `--json`, the summary and the pages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from qconv.errors import Change, Finding, Skipped
from qconv.results.float_share import FloatShare
from qconv.results.gates import Gate
from qconv.results.precision import FOR_ACCURACY, PrecisionReport
from qconv.results.scores import (
    AGREEMENT,
    SQNR,
    TOP1,
    LabelledScores,
    Metric,
    Score,
    as_values,
    by_rank,
    value_of,
    worst_scores,
)

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class PartScore:
    """SQNR of a part of an output that means one thing, such as the boxes of a detector; None where nothing differs."""

    name: str
    sqnr_db: float | None

    @property
    def in_words(self) -> str:
        """The part with its number."""
        return f"{self.name} {SQNR.format(self.sqnr_db)}"


@dataclass(frozen=True, slots=True)
class OutputScore:
    """How near one output of the quantized model is to the float model's.

    Attributes:
        name: Of the output.
        scores: What was measured of it; nothing where it could not be compared.
        remark: What is odd about it; empty for most.
        kind: What it holds.
        parts: The same of what it is joined of, where that means more than one thing.
    """

    name: str
    scores: tuple[Score, ...]
    remark: str = ""
    kind: str = ""
    parts: tuple[PartScore, ...] = ()

    @property
    def sqnr_db(self) -> float | None:
        """None where both are equal, or nothing could be compared."""
        return value_of(self.scores, SQNR)

    @property
    def agreement(self) -> float | None:
        """None where the output holds no classes."""
        return value_of(self.scores, AGREEMENT)

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.remark and all(score.shows_no_difference for score in self.scores)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        parts = [_as_row(part) for part in self.parts]
        counts = {f"{score.name}_count": score.count for score in self.scores if score.count is not None}
        return {"name": self.name, "kind": self.kind, **as_values(self.scores), **counts, "parts": parts}


@dataclass(frozen=True, slots=True)
class OutputFact:
    """What an output of the float model holds, and why that is so.

    kind: as `OutputKind` of `runtime.outputs` calls it. task: that `--task` would call it; None for integers.
    """

    name: str
    kind: str
    task: str | None
    why: str

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return _as_row(self)

    @property
    def in_words(self) -> str:
        """The fact in words, for a line of the summary."""
        return f"{self.name}: {self.kind.replace('-', ' ')}, {self.why}"


@dataclass(frozen=True, slots=True)
class Verification:
    """The saved file, run against the user's float model on images of the calibration, or on those held back from it.

    Attributes:
        images: How many.
        outputs: The scores of each output.
        slowdown: Median time of one run, quantized over float, on this machine; None where not measured.
        slowdown_range: Its 10th and 90th percentile over images.
        held_back: Whether none of the images was fitted to.
        heads: The same of what is read from several outputs together, as detections are.
        labelled: How right both models are by labels; None where there are none.
    """

    images: int
    outputs: tuple[OutputScore, ...]
    slowdown: float | None = None
    slowdown_range: tuple[float, float] | None = None
    held_back: bool = False
    heads: tuple[OutputScore, ...] = ()
    labelled: LabelledScores | None = None

    @property
    def kind_of_images(self) -> str:
        """What the images are, in words."""
        return "pictures held back from calibration" if self.held_back else "calibration pictures"

    @property
    def slowdown_in_words(self) -> str:
        """The times of one run over the float model's, as a range: single readings on a busy machine tell nothing."""
        if self.slowdown_range is None:
            return ""
        low, high = self.slowdown_range
        return f"{low:.2f} to {high:.2f} times"

    @property
    def speed_in_words(self) -> str:
        """The same as speeds."""
        if self.slowdown_range is None:
            return ""
        low, high = self.slowdown_range
        return f"{1 / high:.2f} to {1 / low:.2f} times"

    def is_slower_by(self, factor: float) -> bool:
        """Whether nearly all runs took so many times as long as the float model's."""
        return self.slowdown_range is not None and self.slowdown_range[0] > factor

    @property
    def compared(self) -> tuple[OutputScore, ...]:
        """The outputs, and what is read from several together."""
        return (*self.outputs, *self.heads)

    @property
    def scores(self) -> tuple[Score, ...]:
        """The worst of all outputs, by metric."""
        return worst_scores(output.scores for output in self.compared)

    def value_of(self, metric: Metric) -> float | None:
        """The worst output's; None where no output has a number."""
        return value_of(self.scores, metric)

    @property
    def sqnr_db(self) -> float | None:
        """The lowest output's, in dB; None where all outputs are equal."""
        return self.value_of(SQNR)

    @property
    def agreement(self) -> float | None:
        """The lowest output's; None where no output is a class score."""
        return self.value_of(AGREEMENT)

    @property
    def equal(self) -> bool:
        """Whether something was compared, and nothing differs."""
        compared = [output for output in self.compared if not output.remark]
        return bool(compared) and all(output.equal for output in compared)

    @property
    def in_words(self) -> str:
        """The worst score of all outputs for each metric that has a number."""
        return ", ".join(score.in_words() for score in by_rank(self.scores) if score.value is not None)

    @property
    def differs(self) -> bool:
        """Whether something was compared, and is not equal."""
        return bool(self.scores) and not self.equal

    def reaches(self, metric: Metric, want: float) -> bool:
        """Whether the worst output is as good as that; without a number, whether outputs are equal and it has none."""
        got = self.value_of(metric)
        if got is None:
            return metric.equal is None and self.equal
        return metric.lost(want, got) <= 0


@dataclass(frozen=True, slots=True)
class FloatNode:
    """A node that stays float, or should. rule: a short name of the reason. us: of one run, where measured."""

    node: str
    op: str
    why: str
    remedy: str | None = None
    rule: str = "kept"
    us: float | None = None


def group_float_nodes(islands: Iterable[FloatNode]) -> list[list[FloatNode]]:
    """Group nodes of one operator and one reason, the group that takes most time first."""
    groups: dict[tuple[str, ...], list[FloatNode]] = {}
    for island in islands:
        # reasons that name neighbours are as many as there are nodes: the rule tells them apart
        # - but what is for accuracy is told from what is faster
        reason = island.why if FOR_ACCURACY in island.why else ""
        groups.setdefault((island.op, island.rule, island.remedy or "", reason), []).append(island)
    return sorted(groups.values(), key=lambda group: -sum(island.us or 0.0 for island in group))


@dataclass(frozen=True, slots=True)
class LayerTime:
    """A node of the optimized graph. node: its name in the file; runs: `integer` or `float`; us: microseconds a run."""

    node: str
    op: str
    runs: str
    us: float | None


@dataclass(frozen=True, slots=True)
class Saturation:
    """A layer that may overflow on a CPU that adds products in 16 bits.

    worst: what two products can reach, over what 16 bits hold. channels: outputs; outputs: those with such pairs.
    """

    node: str
    worst: float
    outputs: int
    channels: int


Microseconds = float


@dataclass(frozen=True, slots=True)
class Audit:
    """What the runtime really runs, node by node of its optimized graph.

    Attributes:
        integer, float: How many nodes run in integers and in float.
        islands: Float nodes, but for those of `placed`.
        placed: Nodes left in float because that is faster.
        layers: Times of nodes.
        total_us: Microseconds of one run of all nodes, conversions included; None where not measured.
        saturating: Layers that may overflow on some CPUs.
        slow: Nodes whose integer kernel takes far longer than float; they count as integer.
        on_codes: Nodes of the file that are computed on codes, or written otherwise for an integer kernel.
    """

    integer: int
    float: int
    islands: tuple[FloatNode, ...]
    placed: tuple[FloatNode, ...] = ()
    layers: tuple[LayerTime, ...] = ()
    total_us: Microseconds | None = None
    saturating: tuple[Saturation, ...] = ()
    slow: tuple[FloatNode, ...] = ()
    on_codes: tuple[FloatNode, ...] = ()

    def spent(self, runs: str) -> Microseconds | None:
        """Sum the microseconds of nodes that run in `integer` or in `float`."""
        return None if self.total_us is None else sum(layer.us or 0.0 for layer in self.layers if layer.runs == runs)

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        spent = None
        if self.total_us is not None:
            own, codes = self.spent("float") or 0.0, self.spent("integer") or 0.0
            spent = {"integer": codes, "float": own, "converting": self.total_us - own - codes, "total": self.total_us}
        return {
            "integer": self.integer,
            "float": self.float,
            "islands": [_as_row(island) for island in self.islands],
            "placed": [_as_row(island) for island in self.placed],
            "us": spent,
            "saturating": [_as_row(layer) for layer in self.saturating],
            "slow": [_as_row(node) for node in self.slow],
            "on_codes": [_as_row(node) for node in self.on_codes],
        }


@dataclass(frozen=True, slots=True)
class TensorRow:
    """A quantized tensor. bits, scale, zero_point: a number, a list, or None for float."""

    name: str
    kind: str
    bits: int | list[int] | None
    symmetric: bool | None
    granularity: str | None
    scale: Any
    zero_point: Any
    why: str


@dataclass(frozen=True, slots=True)
class SizePoint:
    """One assignment of bits to layers on the Pareto front of size and noise.

    size: of all weights, codes packed bit by bit, over float's. modelled_sqnr_db: of the weights alone, by noises that
    add up; None for infinite. scores: measured where it was `verified`. bits: how many layers have so many of them; 32
    for float.
    """

    size: float
    modelled_sqnr_db: float | None
    verified: bool
    scores: tuple[Score, ...]
    chosen: bool
    bits: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        row = _as_row(self)
        del row["scores"]
        return {**row, **as_values(self.scores, told=(SQNR, AGREEMENT, TOP1))}


@dataclass(frozen=True, slots=True)
class MixedPrecision:
    """What a search for bits found.

    Attributes:
        demand: In words.
        layers: How many bits were chosen for.
        pictures: Images that points were measured on.
        float_scores: Of the float model by labels.
        points: Ascending in size.
    """

    demand: str
    layers: int
    pictures: int
    float_scores: tuple[Score, ...]
    points: tuple[SizePoint, ...]

    @property
    def chosen(self) -> SizePoint:
        """The point that was written."""
        return next(point for point in self.points if point.chosen)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {
            "demand": self.demand,
            "layers": self.layers,
            "pictures": self.pictures,
            "float_top1": value_of(self.float_scores, TOP1),
            "float_labels": as_values(self.float_scores, told=()),
            "points": [point.as_dict() for point in self.points],
        }


@dataclass(slots=True)
class Report:
    """Everything that one `quantize` did and measured. model_bytes: the result, where it has no file."""

    version: str
    output: str
    float_model: str
    recipe: dict[str, Any]
    preprocessing: dict[str, Any] | None
    preprocessing_words: str
    float_bytes: int
    quantized_bytes: int
    opset: int
    ir_version: int
    needs: str
    verify: Verification
    audit: Audit
    gates: list[Gate] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    time: dict[str, float] = field(default_factory=dict)
    peak_rss_mb: float | None = None
    findings: list[Finding] = field(default_factory=list)
    tensors: list[TensorRow] = field(default_factory=list)
    mixed: MixedPrecision | None = None
    outputs: tuple[OutputFact, ...] = ()
    runner_up: str | None = None
    margin: float | None = None
    in_float: FloatShare | None = None
    precision: PrecisionReport | None = None
    model_bytes: bytes | None = field(default=None, repr=False)

    @property
    def held(self) -> bool:
        """Whether every gate held."""
        return all(gate.held for gate in self.gates)

    @property
    def ratio(self) -> float:
        """Bytes of the quantized model over bytes of the float one."""
        return self.quantized_bytes / self.float_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        verify = self.verify
        changes = [f for f in self.findings if isinstance(f, Change)]
        skipped = [f for f in self.findings if isinstance(f, Skipped)]
        return {
            "schema": SCHEMA,
            "version": self.version,
            "output": self.output,
            "float": self.float_model,
            "recipe": self.recipe,
            # the runner-up and its distance are known only where the preprocessing was found out
            "preprocessing": self.preprocessing
            and {**self.preprocessing, "runner_up": self.runner_up, "margin": self.margin},
            "size": {"float": self.float_bytes, "quantized": self.quantized_bytes, "ratio": round(self.ratio, 4)},
            "opset": self.opset,
            "ir_version": self.ir_version,
            "needs": self.needs,
            "outputs": [fact.as_dict() for fact in self.outputs],
            "verify": {
                "images": verify.images,
                "held_back": verify.held_back,
                **as_values(verify.scores),
                "outputs": [output.as_dict() for output in verify.outputs],
                "heads": [head.as_dict() for head in verify.heads],
                "labels": None if verify.labelled is None else verify.labelled.as_dict(),
            },
            "audit": self.audit.as_dict(),
            "gates": [g.as_dict() for g in self.gates],
            "mixed": None if self.mixed is None else self.mixed.as_dict(),
            "precision": None if self.precision is None else self.precision.as_dict(),
            "warnings": self.warnings,
            "time": {name: round(seconds, 3) for name, seconds in self.time.items()},
            "peak_rss_mb": self.peak_rss_mb,
            "changes": [{"step": c.step, "where": c.where, "what": c.what} for c in changes],
            "skipped": [_as_row(s) for s in skipped],
            "tensors": [_as_row(t) for t in self.tensors],
        }


def _as_row(thing: Any) -> dict[str, Any]:
    return {name: getattr(thing, name) for name in thing.__dataclass_fields__}
