"""This module compares a quantized network with its float model layer by layer on the same images.

Besides both networks, the quantized one is run cut at every point and fed with float tensors: the error that a layer
adds by itself.

    received SQNR = 10 log10(sum f^2 / sum (f - q)^2)         q: in the quantized network
    added SQNR    = the same with q made of float tensors
    output share  = N_l / sum of all N                        N_l = sum over outputs of sum (y - y_l)^2 / sum y^2

y_l: outputs of the float network with the error of layer l alone. Were these independent and small, the outputs' SQNR
would be -10 log10(sum of N_l): Lin et al. 2016, arXiv 1511.06393, equation 7. Equalized channels are compared in the
float model's units. Weights are compared in units of the quantized ones.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconv.analysis.point_comparison import (
    Arrays,
    PointTally,
    make_layer_row,
    match_points,
)
from qconv.analysis.weight_comparison import compare_weights
from qconv.config.data_options import DataOptions
from qconv.config.serialization import recipe_from_dict
from qconv.config.tasks import NO_TASKS, Tasks
from qconv.data.loader import Batch, count_images
from qconv.data.model_with_data import ModelWithData, iter_paired_batches, open_models
from qconv.errors import QconvError, format_count, format_some
from qconv.ir import load, subgraph
from qconv.ir import metadata as ir_metadata
from qconv.ir.data_shapes import find_data_shaped
from qconv.ir.fast_forms import take_back_fast_forms
from qconv.ir.files import Source, holds_codes, is_quantized, metadata_of, read_proto
from qconv.ir.judged_tensors import find_judged_tensors
from qconv.ir.layers import layers_inside
from qconv.ir.model import Model, Value
from qconv.ir.original import open_original
from qconv.ir.output_shapes import forget_doubtful
from qconv.ir.packed_codes import unpack_codes
from qconv.ir.precision import make_float32
from qconv.ir.rewriting import title
from qconv.ir.stepwise import MovedOutputs
from qconv.ir.tensor_matching import ComparisonPoint, TensorPair, add_error_inputs, find_comparison_points
from qconv.metrics.comparison import ComparisonAccumulator
from qconv.metrics.network_outputs import NetworkOutputs, describe_outputs
from qconv.metrics.output_parts import Parts, add_selected_parts, relative_noise, sum_errors
from qconv.passes import fold
from qconv.pipeline.prepare import runs_on_ort
from qconv.reporter import Reporter
from qconv.results.comparison import Comparison
from qconv.runtime.session import Session

HISTOGRAM_SAMPLES = 2**15
"""Values of a tensor that its histogram is made of, about."""

MOST_EFFECT_RUNS = 1000
"""Most runs of the float network to measure what single errors do at the outputs, but for FEWEST images."""

FEWEST_EFFECT_IMAGES, MOST_EFFECT_IMAGES = 2, 16


@dataclass(frozen=True, slots=True)
class ComparisonRequest:
    """What is compared.

    Attributes:
        float_model, model: The files.
        feeds: Returns the batches of the float model and of the quantized one, as often as it is called.
        pictures: How many images these are.
        words: The preprocessing in words.
        threads: Of ONNX Runtime; None for all cores.
        effect_runs: Most runs to measure what single errors do at the outputs, but for FEWEST images.
    """

    float_model: Source
    model: Source
    feeds: Callable[[], Iterator[tuple[Batch, Batch]]]
    pictures: int
    words: str
    threads: int | None = None
    tasks: Tasks = NO_TASKS
    effect_runs: int = MOST_EFFECT_RUNS


def compare(request: ComparisonRequest, reporter: Reporter | None = None) -> Comparison:
    """Compare two models layer by layer.

    Raises:
        QconvError: The second model is not quantized, or nothing in it corresponds to the first.
    """
    original, quantized = _load_models(request)
    reporter = reporter or Reporter()
    equalization = ir_metadata.read_equalization(quantized.inner.metadata_props)
    found = find_comparison_points(quantized, original)
    with contextlib.ExitStack() as stack:
        networks = _LoadedNetworks.of(request, original, quantized, found, equalization, stack)
        if all(pair.point.input for pair in networks.pairs):
            fact = f"No layer of {request.model.name} is found in {request.float_model.name}."
            raise QconvError(fact, "pass the float model that it was made from, first.")
        tallies = networks.look(request, reporter)
        whole = networks.whole(request, reporter)
        compared = whole.all_scores()
        noise, seen = networks.effects(request, whole.network.parts, reporter)
    total = sum(noise.values())
    nodes = {node.name: node for node in original.nodes()}
    rows = []
    for pair in (pair for pair in networks.pairs if tallies[pair.point].batches):
        layer, share = pair.point.layer, None if not total else noise.get(pair.point, 0.0) / total
        weights = None if layer is None else compare_weights(layer, nodes.get(layer.name), equalization)
        rows.append(make_layer_row(pair, tallies[pair.point], share, weights))
    unmatched = [point.name for point in found if point not in tallies]
    empty = [point.name for point in found if point in tallies and not tallies[point].batches]
    if empty:
        reporter.warn(
            f"not compared, as on no picture it has rows, and those of the float model: {format_some(empty)}."
        )
    for output in compared:
        if output.remark:
            reporter.warn(f"output {output.name}: {output.remark}.")
    _tell_of_pictures_apart({pair.point.name: tallies[pair.point] for pair in networks.pairs}, reporter)
    predicted = None if total <= 0 else -10 * math.log10(total)
    return Comparison(
        request.float_model.name,
        request.model.name,
        request.pictures,
        request.words,
        tuple(rows),
        tuple(unmatched),
        compared,
        predicted,
        seen,
        tuple(f"{layer.op_type} {title(layer)}" for node in quantized.nodes() for layer in layers_inside(node)),
    )


def _tell_of_pictures_apart(tallies: Mapping[str, PointTally], reporter: Reporter) -> None:
    """Warn of tensors whose shapes differ between the two networks on some pictures, as the data select their rows."""
    apart = [name for name, tally in tallies.items() if tally.apart]
    if apart:
        count, most = format_count(len(apart), "tensor"), max(tallies[name].apart for name in apart)
        reporter.warn(
            f"{count} had another shape in the quantized network on up to {format_count(most, 'batch')}, which leaves "
            f"these out of their comparison: the data select what is in {apart[0]}."
        )


def _load_models(request: ComparisonRequest) -> tuple[Model, Model]:
    """Load both models: a file by qconv is compared with the folded float model, others with it as it is."""
    proto = read_proto(request.model)
    if not holds_codes(proto):
        fact = f"{request.model.name} is not quantized."
        raise QconvError(fact, "pass the float model first, and the quantized one behind it.")
    float_proto = read_proto(request.float_model)
    if is_quantized(float_proto):
        fact = f"{request.float_model.name}, given as the float model, is quantized."
        hint = "pass the float model first; `qconv evaluate MODEL --against OTHER` measures two quantized ones."
        raise QconvError(fact, hint)
    if any(node.op_type.startswith("QLinear") or node.op_type == "ConvInteger" for node in proto.graph.node):
        fact = f"{request.model.name} holds integer operators, between which there is nothing to compare."
        raise QconvError(fact, "write it with quantizers and dequantizers (Q/DQ), which all tools can.")
    carried = metadata_of(proto)
    ours = ir_metadata.VERSION_KEY in carried
    quantized = load.load_unchanged(proto, request.model)
    unpack_codes(quantized)
    take_back_fast_forms(quantized)
    if not ours:  # tools that compute in float16 around quantizers; parts of the network are fed with float32 here
        make_float32(quantized)
    original, _ = load.load(float_proto, request.float_model)
    if ours:
        recipe = recipe_from_dict(ir_metadata.read_recipe(carried))
        fold.run_float_passes(original, for_ort=recipe is None or runs_on_ort(recipe))
    for model in (original, quantized):
        forget_doubtful(model)
    return original, quantized


@dataclass(slots=True)
class _LoadedNetworks:
    """Sessions of the networks.

    inputs: of the cut network, by the point that they stand for. selects: whether the data select rows of tensors.
    """

    original: Model
    quantized: Model
    equalization: ir_metadata.EqualizationRecord
    pairs: list[TensorPair]
    watched: Session
    real: Session
    cut: Session
    inputs: dict[ComparisonPoint, str]
    selects: bool
    threads: int | None

    @classmethod
    def of(
        cls,
        request: ComparisonRequest,
        original: Model,
        quantized: Model,
        found: Sequence[ComparisonPoint],
        equalization: ir_metadata.EqualizationRecord,
        stack: contextlib.ExitStack,
    ) -> _LoadedNetworks:
        candidates = list(dict.fromkeys(value for point in found for value in point.candidates))

        def session(model: Model, tensors: Sequence[Value], name: str) -> Session:
            wanted = [value.name or "" for value in tensors]
            runnable = stack.enter_context(subgraph.runnable_with_outputs(model, wanted))
            return Session(runnable, name=name, threads=request.threads, integer_kernels=False)

        watched = session(original, [v for v in candidates if not v.is_graph_input()], request.float_model.name)
        tapped = [point.value for point in found] + [point.codes for point in found if point.codes is not None]
        real = session(quantized, tapped, request.model.name)
        pairs = match_points(found, _first_tensors(request, watched, candidates, real, found), equalization)
        cut = quantized.copy()
        own = {value.name: value for node in cut.nodes() for value in node.outputs}
        inputs: dict[ComparisonPoint, str] = {}
        for pair in pairs:
            values = [own[value.name] for value in pair.point.values]
            opened = cut.feed_readers(values[0], f"{values[0].name}_float")
            for other in values[1:]:
                cut.redirect(other, opened)
            inputs[pair.point] = opened.name or ""
        fed = session(cut, [pair.point.value for pair in pairs], request.model.name)
        taken = {pair.tensor.name or "" for pair in pairs}
        watched = session(original, [v for v in candidates if v.name in taken and not v.is_graph_input()], watched.name)
        selects = bool(find_data_shaped(quantized))
        return cls(original, quantized, equalization, pairs, watched, real, fed, inputs, selects, request.threads)

    def look(self, request: ComparisonRequest, reporter: Reporter) -> dict[ComparisonPoint, PointTally]:
        """Run all images through all three networks."""
        tallies = {pair.point: PointTally() for pair in self.pairs}
        each = max(64, HISTOGRAM_SAMPLES // max(1, request.pictures))
        done = 0
        for plain, feeds in request.feeds():
            floats = self._floats(plain)
            names = [pair.point.value.name or "" for pair in self.pairs]
            codes = [pair.point.codes.name or "" for pair in self.pairs if pair.point.codes is not None]
            got = dict(zip([*names, *codes], self.real.run([*names, *codes], feeds), strict=True))
            isolated_outputs = self._isolated_outputs(feeds, floats)
            for pair in self.pairs:
                name = pair.point.value.name or ""
                tallies[pair.point].add(
                    pair,
                    floats[pair.tensor.name or ""],
                    got,
                    isolated_outputs.get(name),
                    self.equalization,
                    each,
                )
            done += count_images(feeds)
            reporter.progress("compare", min(done, request.pictures), request.pictures)
        return tallies

    def whole(self, request: ComparisonRequest, reporter: Reporter) -> ComparisonAccumulator:
        """Compare the outputs of both files as they are, with the runtime's optimizations."""
        both = [
            open_original(source, self.threads, request.tasks, required=False)
            for source in (request.float_model, request.model)
        ]
        comparison: ComparisonAccumulator | None = None
        done = 0
        for floats, feeds in request.feeds():
            expected = both[0].run_all(floats)
            comparison = comparison or ComparisonAccumulator.of(describe_outputs(both[0], floats, expected))
            comparison.add(expected, both[1].run(both[0].outputs, feeds))
            done += count_images(feeds)
            reporter.progress("outputs", min(done, request.pictures), request.pictures)
        return comparison or ComparisonAccumulator.of(NetworkOutputs(both[0].model_outputs))

    def effects(
        self, request: ComparisonRequest, parts: Parts, reporter: Reporter
    ) -> tuple[dict[ComparisonPoint, float], int]:
        """Measure what each layer's own error does at the outputs, over the power of each part, and on how many images.

        parts: of outputs that hold more than one thing.
        """
        outputs, parts = find_judged_tensors(self.original), add_selected_parts(parts, self.original)
        judged = [value.name or "" for value in outputs]
        model, names, results = add_error_inputs(self.original, self.quantized, self.pairs, outputs)
        name = request.float_model.name
        moved = MovedOutputs.of(model, list(names.values()), results, name=name, threads=self.threads)
        wanted = min(MOST_EFFECT_IMAGES, max(FEWEST_EFFECT_IMAGES, request.effect_runs // len(self.pairs)))
        sums: dict[ComparisonPoint, NDArray[np.float64] | float] = {pair.point: 0.0 for pair in self.pairs}
        seen = 0
        for plain, feeds in request.feeds():
            floats = self._floats(plain)
            ranks = {names[pair.point]: floats[pair.tensor.name or ""].ndim for pair in self.pairs}
            float_outputs = moved.start(
                {**plain, **{n: np.zeros((1,) * rank, np.float32) for n, rank in ranks.items()}}
            )
            isolated_outputs = self._isolated_outputs(feeds, floats)
            for place, pair in enumerate(self.pairs):
                error = self._own_error(pair, isolated_outputs, floats)
                moved_to = float_outputs if error is None else moved.by(names[pair.point], error)
                sums[pair.point] = sums[pair.point] + sum_errors(parts, judged, float_outputs, moved_to)
                reporter.progress("effects", seen * len(self.pairs) + place + 1, wanted * len(self.pairs))
            seen += count_images(feeds)
            if seen >= wanted:
                break
        reporter.progress("effects", wanted * len(self.pairs), wanted * len(self.pairs))
        noises = {point: relative_noise(np.asarray(own)) if seen else 0.0 for point, own in sums.items()}
        return noises, min(seen, request.pictures)

    def _own_error(self, pair: TensorPair, isolated_outputs: Arrays, floats: Arrays) -> NDArray[Any] | None:
        """The error that a layer adds by itself, in the float network's units; None where there is none to inject."""
        name, got = pair.tensor.name or "", isolated_outputs.get(pair.point.value.name or "")
        if pair.point.copy or got is None or got.shape != floats[name].shape:
            return None
        error = np.asarray(self.equalization.back(name, got) - floats[name])  # a number where there are no axes
        return error if np.isfinite(error).all() else None

    def _floats(self, feeds: Batch) -> dict[str, NDArray[Any]]:
        return {**feeds, **dict(zip(self.watched.outputs, self.watched.run_all(feeds), strict=True))}

    def _isolated_outputs(self, feeds: Batch, floats: Arrays) -> Arrays:
        """Run every layer on float tensors; returns the results in the quantized network's units, by name.

        Nothing where tensors do not go together, as the data select other rows for those that are not fed.
        """
        fed = {
            self.inputs[pair.point]: self.equalization.moved(pair.tensor.name or "", floats[pair.tensor.name or ""])
            for pair in self.pairs
        }
        needed = {name for name, _, _ in self.cut.inputs}
        names = [pair.point.value.name or "" for pair in self.pairs]
        try:
            found = self.cut.run(names, {name: x for name, x in {**feeds, **fed}.items() if name in needed})
        except QconvError:
            if not self.selects:
                raise
            return {}
        return dict(zip(names, found, strict=True))


def _run_outputs(session: Session, values: Sequence[Value], feeds: Batch) -> dict[str, NDArray[Any]]:
    names = [value.name or "" for value in values if not value.is_graph_input()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _run_points(
    session: Session, found: Sequence[ComparisonPoint], feeds: Batch
) -> dict[ComparisonPoint, NDArray[Any]]:
    names = [point.value.name or "" for point in found]
    return dict(zip(found, session.run(names, feeds), strict=True))


MATCHED_ON = 8
"""Batches that are looked at, at most, for one on which the tensors of both networks have the same shapes."""


def _first_tensors(
    request: ComparisonRequest,
    watched: Session,
    candidates: Sequence[Value],
    real: Session,
    found: Sequence[ComparisonPoint],
) -> Iterator[tuple[Arrays, Mapping[ComparisonPoint, NDArray[Any]]]]:
    """Yield the candidates by name, and the tensors of the points, batch by batch."""
    batches = iter(request.feeds())
    first = next(batches, None)
    if first is None:
        raise QconvError("There is no picture to compare on.", "check --images.")
    for floats, feeds in itertools.islice(itertools.chain([first], batches), MATCHED_ON):
        yield {**floats, **_run_outputs(watched, candidates, floats)}, _run_points(real, found, feeds)


@dataclass(frozen=True, slots=True)
class ComparisonRun:
    """A comparison, and both models with their data. fed: the float model."""

    compared: Comparison
    fed: ModelWithData
    quantized: ModelWithData


def compare_on_images(
    float_model: Source,
    model: Source,
    data: DataOptions,
    reporter: Reporter,
    threads: int | None = None,
    *,
    effect_runs: int = MOST_EFFECT_RUNS,
) -> ComparisonRun:
    """Compare two models on a folder of images.

    Args:
        float_model, model: The files.
        data: The images, and their preprocessing.
        threads: Of ONNX Runtime; None for its own choice.
        reporter: Hears of progress and warnings.
        effect_runs: As in `ComparisonRequest`.

    Raises:
        QconvError: The models cannot be compared, or the images not be fed.
    """
    own, other = open_models(model, float_model, data, threads, reporter)
    assert other is not None
    missing = next((name for name in own.session.outputs if name not in other.session.outputs), None)
    if missing is not None:
        names = ", ".join(other.session.outputs)
        raise QconvError(f"{other.session.name} has no output {missing!r}, but {names}.", "compare like with like.")
    lost: set[Path] = set()

    def feeds() -> Any:
        return ((its, mine) for mine, its in iter_paired_batches(own, other, reporter, lost.add))

    total = len(own.feed.listing.paths)
    request = ComparisonRequest(float_model, model, feeds, total, own.words, threads, own.session.tasks, effect_runs)
    found = compare(request, reporter)
    return ComparisonRun(replace(found, images=total - len(lost)), other, own)
