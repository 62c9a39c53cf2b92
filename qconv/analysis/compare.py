"""A quantized network beside the float one, layer by layer, on the same pictures.

Three networks see every picture: the float one, the quantized one, and the quantized one cut at every point (pairs.py),
where it is fed with the float network's tensors. What the last one makes of them is the error that each layer adds by
itself, with its weights, its bias and the codes of its result.

    received SQNR = 10 log10(sum f^2 / sum (f - q)^2)         q: in the quantized network
    added SQNR    = the same with q made of float tensors
    output share  = N_l / sum of all N                        N_l = sum over outputs of sum (y - y_l)^2 / sum y^2

y_l: outputs of the float network where the result of layer l alone has the error that it adds. Were these errors
independent and small, the outputs' SQNR would be -10 log10(sum of N_l): Lin et al. 2016, arXiv 1511.06393, equation 7,
measured at the outputs instead of added up over layers, as a residual stream thins out what a branch adds.

Channels that equalization scaled are compared in the float model's units, as the file tells them (moved.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.analysis.weighed import bars_of, beside
from qconv.data.loader import Batch
from qconv.errors import QconvError
from qconv.ir import load, subgraph
from qconv.ir import metadata as ir_metadata
from qconv.ir.files import Source, is_quantized, metadata_of, read_proto
from qconv.ir.model import Model, Value, is_tensor
from qconv.ir.tensor_matching import ComparisonPoint, TensorPair, add_error_inputs, find_comparison_points
from qconv.metrics.comparison import compute_sqnr_db
from qconv.passes import fold
from qconv.results.comparison import Comparison, LayerComparison, ValueStatistics
from qconv.runtime.session import Session

Progress = Callable[[str, int, int], None]
Arrays = Mapping[str, NDArray[Any]]
SAMPLES = 2**15
"""Numbers of a tensor that its histogram is made of, about."""
RUNS = 1000
"""Of the float network to find out what single errors do at the outputs, at most, but for FEWEST pictures."""
FEWEST, MOST = 2, 16
LARGEST = 1e200
"""Power of what holds NaN or infinity: what can still be added up."""
SMALL = 1e-12
"""Share of the signal's power that a difference of float arithmetic alone may have."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is compared. feeds: what the float model and the quantized one take, batch by batch, as often as it is
    asked for. pictures: how many these are. words: how they are fed."""

    float_model: Source
    model: Source
    feeds: Callable[[], Iterator[tuple[Batch, Batch]]]
    pictures: int
    words: str
    threads: int | None = None


def compare(question: Question, progress: Progress = lambda stage, done, total: None) -> Comparison:
    """Raises QconvError where the second model is not quantized, or nothing in it can be found in the first."""
    original, quantized = _models(question)
    moves = ir_metadata.read_equalization(quantized.inner.metadata_props)
    found = find_comparison_points(quantized, original)
    outputs = [value for value in original.graph.outputs if is_tensor(value)]
    with contextlib.ExitStack() as stack:
        bench = _Bench.of(question, original, quantized, found, moves, stack)
        if all(pair.point.input for pair in bench.pairs):
            fact = f"No layer of {question.model.name} is found in {question.float_model.name}."
            raise QconvError(fact, "pass the float model that it was made from, first.")
        tallies = bench.look(question, progress)
        straight = bench.whole(question)
        noise, seen = bench.effects(question, outputs, progress)
    total = sum(noise.values())
    nodes = {node.name: node for node in original.nodes()}
    rows = []
    for pair in bench.pairs:
        layer, share = pair.point.layer, None if not total else noise.get(pair.point, 0.0) / total
        weights = None if layer is None else beside(layer, nodes.get(layer.name), moves)
        rows.append(_row(pair, tallies[pair.point], share, weights))
    unmatched = [point.name for point in found if point not in tallies]
    predicted = None if total <= 0 else -10 * math.log10(total)
    return Comparison(
        question.float_model.name,
        question.model.name,
        question.pictures,
        question.words,
        tuple(rows),
        tuple(unmatched),
        straight.scores(spans=True),
        predicted,
        seen,
    )


def _models(question: Question) -> tuple[Model, Model]:
    """Both as they are compared: a file by qconv beside what folding makes of the float model, others as they are."""
    proto = read_proto(question.model)
    if not is_quantized(proto):
        fact = f"{question.model.name} is not quantized."
        raise QconvError(fact, "pass the float model first, and the quantized one behind it.")
    if any(node.op_type.startswith("QLinear") or node.op_type == "ConvInteger" for node in proto.graph.node):
        fact = f"{question.model.name} holds integer operators, between which there is nothing to compare."
        raise QconvError(fact, "write it with quantizers and dequantizers (Q/DQ), which all tools can.")
    ours = "qconv.version" in metadata_of(proto)
    quantized = load.load_unchanged(proto, question.model)
    original, _ = load.load(read_proto(question.float_model), question.float_model)
    if ours:
        fold.run_float_passes(original)
    return original, quantized


@dataclass(slots=True)
class _Tally:
    """What was seen of a point."""

    signal: float = 0.0
    received: float = 0.0
    added: float = 0.0
    product: float = 0.0
    power: float = 0.0
    count: int = 0
    clipped: int = 0
    codes: NDArray[np.int64] | None = None
    sample: list[NDArray[np.float32]] = field(default_factory=list)


@dataclass(slots=True)
class _Bench:
    """The networks, loaded. inputs: of the cut network, by the point that they stand for."""

    original: Model
    quantized: Model
    moves: ir_metadata.EqualizationRecord
    pairs: list[TensorPair]
    watched: Session
    real: Session
    cut: Session
    inputs: dict[ComparisonPoint, str]
    threads: int | None

    @classmethod
    def of(
        cls,
        question: Question,
        original: Model,
        quantized: Model,
        found: Sequence[ComparisonPoint],
        moves: ir_metadata.EqualizationRecord,
        stack: contextlib.ExitStack,
    ) -> _Bench:
        candidates = list(dict.fromkeys(value for point in found for value in point.candidates))

        def session(model: Model, tensors: Sequence[Value], name: str) -> Session:
            wanted = [value.name or "" for value in tensors]
            runnable = stack.enter_context(subgraph.runnable_with_outputs(model, wanted))
            return Session(runnable, name=name, threads=question.threads, integer_kernels=False)

        watched = session(original, [v for v in candidates if not v.is_graph_input()], question.float_model.name)
        tapped = [point.value for point in found] + [point.codes for point in found if point.codes is not None]
        real = session(quantized, tapped, question.model.name)
        first = next(question.feeds(), None)
        if first is None:
            raise QconvError("There is no picture to compare on.", "check --images.")
        floats, feeds = first
        pairs = list(
            _paired(found, {**floats, **_run(watched, candidates, floats)}, _run_values(real, found, feeds), moves)
        )
        cut = quantized.copy()
        own = {value.name: value for node in cut.nodes() for value in node.outputs}
        inputs: dict[ComparisonPoint, str] = {}
        for pair in pairs:
            values = [own[value.name] for value in pair.point.values]
            opened = cut.feed_readers(values[0], f"{values[0].name}_float")
            for other in values[1:]:
                cut.redirect(other, opened)
            inputs[pair.point] = opened.name or ""
        fed = session(cut, [pair.point.value for pair in pairs], question.model.name)
        taken = {pair.tensor.name or "" for pair in pairs}
        watched = session(original, [v for v in candidates if v.name in taken and not v.is_graph_input()], watched.name)
        return cls(original, quantized, moves, pairs, watched, real, fed, inputs, question.threads)

    def look(self, question: Question, progress: Progress) -> dict[ComparisonPoint, _Tally]:
        """All pictures through all three networks."""
        tallies = {pair.point: _Tally() for pair in self.pairs}
        each = max(64, SAMPLES // max(1, question.pictures))
        done = 0
        for plain, feeds in question.feeds():
            floats = self._floats(plain)
            names = [pair.point.value.name or "" for pair in self.pairs]
            codes = [pair.point.codes.name or "" for pair in self.pairs if pair.point.codes is not None]
            got = dict(zip([*names, *codes], self.real.run([*names, *codes], feeds), strict=True))
            alone = dict(zip(names, self._alone(feeds, floats), strict=True))
            for pair in self.pairs:
                name = pair.point.value.name or ""
                _take(tallies[pair.point], pair, floats[pair.tensor.name or ""], got, alone[name], self.moves, each)
            done += len(next(iter(feeds.values())))
            progress("compare", min(done, question.pictures), question.pictures)
        return tallies

    def whole(self, question: Question) -> Comparison:
        """The outputs of both files as they are, in the runtime's own way."""
        both = [Session(s.runnable, name=s.name, threads=self.threads) for s in (question.float_model, question.model)]
        comparison = Comparison.of(both[0].outputs)
        for floats, feeds in question.feeds():
            comparison.add(both[0].run_all(floats), both[1].run(both[0].outputs, feeds))
        return comparison

    def effects(
        self, question: Question, outputs: Sequence[Value], progress: Progress
    ) -> tuple[dict[ComparisonPoint, float], int]:
        """What the error that each layer adds does at the outputs, over their power, and on how many pictures."""
        model, names, results = add_error_inputs(self.original, self.quantized, self.pairs, outputs)
        with subgraph.runnable_with_outputs(model, ()) as runnable:
            session = Session(runnable, name=question.float_model.name, threads=self.threads)
        wanted = min(MOST, max(FEWEST, RUNS // len(self.pairs)))
        nothing = {name: np.zeros((), np.float32) for name in names.values()}
        noise: dict[ComparisonPoint, dict[int, float]] = {pair.point: {} for pair in self.pairs}
        power: dict[int, float] = {}
        seen = 0
        for plain, feeds in question.feeds():
            floats = self._floats(plain)
            straight = session.run(results, {**plain, **nothing})
            for index, y in enumerate(straight):
                if y.dtype.kind == "f":
                    power[index] = power.get(index, 0.0) + _power(y)
            alone = self._alone(feeds, floats)
            for place, (pair, got) in enumerate(zip(self.pairs, alone, strict=True)):
                if pair.point.copy:
                    continue
                name = pair.tensor.name or ""
                error = np.asarray(self.moves.back(name, got) - floats[name])  # a number where there are no axes
                if not np.isfinite(error).all():
                    continue
                moved_to = session.run(results, {**plain, **nothing, names[pair.point]: error})
                for index, (y, other) in enumerate(zip(straight, moved_to, strict=True)):
                    if index in power:
                        known = noise[pair.point]
                        known[index] = known.get(index, 0.0) + _power(other - y)
                progress("effects", seen * len(self.pairs) + place + 1, wanted * len(self.pairs))
            seen += len(next(iter(feeds.values())))
            if seen >= wanted:
                break
        progress("effects", wanted * len(self.pairs), wanted * len(self.pairs))
        return {
            point: sum(n / power[index] for index, n in found.items() if power[index] > 0)
            for point, found in noise.items()
        }, min(seen, question.pictures)

    def _floats(self, feeds: Batch) -> dict[str, NDArray[Any]]:
        return {**feeds, **dict(zip(self.watched.outputs, self.watched.run_all(feeds), strict=True))}

    def _alone(self, feeds: Batch, floats: Arrays) -> list[NDArray[Any]]:
        """What every layer makes of float tensors, in the units of the quantized network."""
        fed = {
            self.inputs[pair.point]: self.moves.moved(pair.tensor.name or "", floats[pair.tensor.name or ""])
            for pair in self.pairs
        }
        needed = {name for name, _, _ in self.cut.inputs}
        names = [pair.point.value.name or "" for pair in self.pairs]
        return self.cut.run(names, {name: x for name, x in {**feeds, **fed}.items() if name in needed})


def _run(session: Session, values: Sequence[Value], feeds: Batch) -> dict[str, NDArray[Any]]:
    names = [value.name or "" for value in values if not value.is_graph_input()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _run_values(
    session: Session, found: Sequence[ComparisonPoint], feeds: Batch
) -> dict[ComparisonPoint, NDArray[Any]]:
    names = [point.value.name or "" for point in found]
    return dict(zip(found, session.run(names, feeds), strict=True))


def _paired(
    found: Sequence[ComparisonPoint],
    floats: Arrays,
    got: Mapping[ComparisonPoint, NDArray[Any]],
    moves: ir_metadata.EqualizationRecord,
) -> Iterator[TensorPair]:
    """Every point with the candidate that it is nearest to; without those where no shape fits."""
    for point in found:
        q = got[point]
        away = {}
        for value in point.candidates:
            name = value.name or ""
            x = floats.get(name)
            if x is not None and x.shape == q.shape and x.dtype.kind == q.dtype.kind == "f":
                away[value] = _power(moves.moved(name, x) - q) / max(_power(q), SMALL)
        if away:
            yield TensorPair(point, min(away, key=lambda value: away[value]))


def _power(x: NDArray[Any]) -> float:
    """Sum of squares; LARGEST where that is no number."""
    flat = x.reshape(-1).astype(np.float32, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        found = float(np.dot(flat, flat))
        if not math.isfinite(found):
            found = float(np.sum(flat.astype(np.float64) ** 2))
    return found if math.isfinite(found) else LARGEST


def _take(
    tally: _Tally,
    pair: TensorPair,
    reference: NDArray[Any],
    got: Arrays,
    alone: NDArray[Any],
    moves: ir_metadata.EqualizationRecord,
    each: int,
) -> None:
    name, point = pair.tensor.name or "", pair.point
    q = moves.back(name, got[point.value.name or ""])
    tally.signal += _power(reference)
    tally.received += _power(q - reference)
    tally.added += _power(moves.back(name, alone) - reference)
    with np.errstate(over="ignore", invalid="ignore"):
        tally.product += float(np.dot(q.reshape(-1), reference.reshape(-1)))
    tally.power += _power(q)
    if point.grid is None or point.codes is None:
        return
    own = moves.moved(name, reference).reshape(-1)
    half = point.grid.scale / 2
    tally.count += own.size
    tally.clipped += int(np.count_nonzero((own < point.grid.low - half) | (own > point.grid.high + half)))
    tally.sample.append(own[:: max(1, own.size // each)].copy())
    codes = got[point.codes.name or ""].reshape(-1).astype(np.int64) - point.grid.least
    last = point.grid.most - point.grid.least
    counted = np.bincount(np.clip(codes, 0, last), minlength=last + 1)
    tally.codes = counted if tally.codes is None else tally.codes + counted


def _row(pair: TensorPair, tally: _Tally, share: float | None, weights: ValueStatistics | None) -> LayerComparison:
    point, values = pair.point, None
    if point.grid is not None and tally.codes is not None:
        numbers = np.concatenate(tally.sample)
        values = ValueStatistics(
            point.grid.bits,
            point.grid.low,
            point.grid.high,
            tally.clipped / max(1, tally.count),
            float(np.count_nonzero(tally.codes)) / tally.codes.size,
            bars_of(numbers, point.grid.low, point.grid.high),
        )
    known = bool(tally.signal and tally.power) and math.isfinite(tally.product)
    return LayerComparison(
        name=point.name,
        op=point.op,
        tensor=pair.tensor.name or "",
        sqnr_db=_decibel(tally.signal, tally.received),
        added_sqnr_db=None if point.copy else _decibel(tally.signal, tally.added),
        cosine=tally.product / math.sqrt(tally.signal) / math.sqrt(tally.power) if known else None,
        output_share=share,
        values=values,
        weights=weights,
        input=point.input,
    )


def _decibel(signal: float, noise: float) -> float | None:
    return None if noise <= SMALL * signal else compute_sqnr_db(signal, noise)
