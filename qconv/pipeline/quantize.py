"""This module quantizes a float model as a recipe says: it writes a verified file and returns a report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import qconv
from qconv import storage
from qconv.auditing.audit import PlannedReasons
from qconv.calibration.observer import Listener
from qconv.calibration.range_estimators import Range
from qconv.calibration.sketch import Sketch
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.config.serialization import format_layer_bits
from qconv.config.targets import TARGETS, Target
from qconv.data.loader import DataLoader
from qconv.errors import Change, Finding, Skipped, require_torch
from qconv.ir import files
from qconv.ir.files import Source
from qconv.ir.judged_tensors import find_judged_tensors
from qconv.ir.metadata import write_metadata
from qconv.ir.model import Model, is_tensor
from qconv.ir.original import open_original
from qconv.ir.requirements import needed_runtime
from qconv.metrics.demands import check_gates, require_extras
from qconv.metrics.labelled import tell_of_misfit
from qconv.metrics.network_outputs import NetworkOutputs
from qconv.metrics.output_parts import add_selected_parts
from qconv.passes.compress_constants import compress_constants
from qconv.passes.equalize import equalize_channels, equalize_without_data
from qconv.passes.requantize import give_readers_copies
from qconv.pipeline.checks import (
    advise,
    audit_staged,
    find_odd_tensors,
    find_tensors_of_pictures,
    pack_written,
    places_of,
    verify_staged,
    warn_of_all_float,
    warn_of_chance,
    warn_of_result,
    warn_of_uncorrected_biases,
    warn_of_vain_keep_float,
)
from qconv.pipeline.collect import CalibrationCache, CalibrationData
from qconv.pipeline.prepare import Prepared, Stopwatch, prepare
from qconv.planning.plan import Plan
from qconv.planning.planner import is_quantizable_layer, replan
from qconv.planning.work import measure_shares_in_float
from qconv.quantization.emit import emit
from qconv.quantization.layer_rounding import choose_rounding_effort
from qconv.quantization.parameters import make_tensor_rows
from qconv.quantization.write_fast_forms import write_fast_forms
from qconv.reporter import Reporter
from qconv.results.float_share import FloatShare
from qconv.results.precision import PrecisionReport
from qconv.results.quantize import Audit, MixedPrecision, OutputFact, Report, TensorRow, Verification
from qconv.runtime.benchmark import peak_rss_mb
from qconv.search.candidate import (
    FoldedNetwork,
    QuantizationSolution,
    SearchContext,
    round_second_order_in_place,
    round_to_nearest,
)
from qconv.search.division import found_bits
from qconv.search.gate_check import GateCheck
from qconv.search.local_noise import divide_by_statistics
from qconv.search.loudest_images import HeardOutputs
from qconv.search.mixed_precision import check_target_size, predict_recipe, search_bits
from qconv.search.output_gains import GainTrial
from qconv.search.precision_choice import DivisionCurve, HoldsGates
from qconv.search.tuned_ranges import tune_ranges

EQUALIZATION_IMAGES = 64
"""Pictures that channels are watched on, but for the best effort, which watches all."""


def quantize(
    source: Source | str | Path,
    out: str | Path | None,
    recipe: Recipe,
    data: DataOptions | None = None,
    reporter: Reporter | None = None,
    cache: CalibrationCache | None = None,
    *,
    advises: bool = True,
) -> tuple[Report, bytes | None]:
    """Quantize `source` as `recipe` says, with the images of `data`, and save the result at `out`.

    Args:
        source: The float model, or its path.
        out: Where the result goes; None keeps it in memory and returns its bytes.
        recipe: How to quantize.
        data: The images; None where the recipe needs none.
        reporter: Hears of warnings and of progress.
        cache: What runs before this one on the same model have found out.
        advises: Whether a warning of a poor result says what to do about it.

    Returns:
        The report, and the bytes of the result where `out` is None.

    Raises:
        QconvError: For anything the user can mend; then nothing is left behind.
    """
    started = time.perf_counter()
    source = source if isinstance(source, Source) else Source(str(source), Path(source))
    data, place = data or DataOptions(), None if out is None else Path(out)
    recipe = recipe.with_data(data)
    run = _QuantizationRun.of(source, recipe, data, (reporter or Reporter()).of_part(), cache, place)
    run.advice = advise(recipe.effort) if advises else ""
    run.calibrate()
    run.give_layers_their_own_inputs()
    run.place_by_measured_times()
    run.tune_ranges()
    solution, mixed = run.choose_numbers()
    rows = run.emit(solution)
    with run.clock.step("emit"):
        written, packed = pack_written(run.model, run.recipe, run.reporter)
    run.findings += packed
    with files.stage_model(written, place) as staged:
        checked, audited = run.check(staged, solution.plan)
        size, result = staged.size, staged.path.read_bytes() if place is None else None
        run.save_side_files(solution.plan)
        if place is not None:
            staged.commit(place)
    run.clock.seconds["total"] = time.perf_counter() - started
    return run.report(place, written, size, checked, audited, rows, mixed), result


@dataclass(slots=True)
class _QuantizationRun:
    """One run: what it is about, and what its steps have come to.

    Attributes:
        source: The float model.
        recipe: How to quantize; with the bits that were found, once they have been searched for.
        pictures: The images.
        model: The folded network, which becomes the quantized one.
        plan: What is quantized, and how.
        prepared: What the network and the images were found to be.
        sketches: What was seen of each tensor that is quantized.
        saved: The same of the network before it was equalized, where it is to be saved.
        set_ranges: Of activations, as the outputs gain from them.
        outputs: What the outputs of the float model hold.
        advice: Ends the warning of a poor result.
        in_float: Shares of work and of weights that stay in float, once it is known which do.
        precision: The curve that the division between integers and more precision was chosen on.
        curve: The divisions themselves, for a search that needs another.
        gains: Corrects those of layers, where that may help and can be measured.
        heard: What the float network said of the pictures while it was calibrated; None where nobody asks.
    """

    source: Source
    recipe: Recipe
    reporter: Reporter
    clock: Stopwatch
    prepared: Prepared
    model: Model
    pictures: CalibrationData
    plan: Plan
    findings: list[Finding]
    sketches: Mapping[str, Sketch] = field(default_factory=dict)
    saved: Mapping[str, Sketch] = field(default_factory=dict)
    set_ranges: Mapping[str, Range] = field(default_factory=dict)
    outputs: tuple[OutputFact, ...] = ()
    advice: str = ""
    in_float: tuple[float, float] = (0.0, 0.0)
    precision: PrecisionReport | None = None
    curve: DivisionCurve | None = None
    gains: GainTrial | None = None
    heard: HeardOutputs | None = None

    @classmethod
    def of(
        cls,
        source: Source,
        recipe: Recipe,
        data: DataOptions,
        reporter: Reporter,
        cache: CalibrationCache | None,
        place: Path | None,
    ) -> _QuantizationRun:
        """Prepare the network; what cannot be is said before the work. place: of the result, None for none."""
        if recipe.rounding == "reconstruct":
            require_torch("--rounding reconstruct")
        require_extras(recipe)
        clock, written = Stopwatch(), places_of(recipe, place)
        found = prepare(source, recipe, data, reporter, cache=cache, written=written, clock=clock, hold_back=True)
        with clock.step("plan"):
            if recipe.rounding == "reconstruct":
                from qconv.training.network import require_operators  # PyTorch is an extra

                require_operators(found.model)
            check_target_size(found.model, recipe, found.plan.floats)
        run = cls(source, recipe, reporter, clock, found, found.model, found.data, found.plan, [])
        run.findings += found.findings
        return run

    @property
    def target(self) -> Target:
        return TARGETS[self.recipe.target]

    @property
    def _network(self) -> NetworkOutputs:
        """What the outputs of the user's own model are."""
        return self.pictures.describe_network(self.source, self.recipe.threads)

    def calibrate(self) -> None:
        """Watch every tensor that a range is needed of, and equalize the network where that gains."""
        model, recipe, pictures = self.model, self.recipe, self.pictures
        with self.clock.step("calibrate"):
            # what is saved is of the network as it is, and serves other options, too, which may leave nothing in float
            if recipe.save_stats is not None:
                self.saved = pictures.sketches(model, [self.plan, self._plan_without_floats()], recipe)
        with self.clock.step("equalize"):
            balanced = self._equalize()
            self.findings += balanced
        with self.clock.step("calibrate"):
            moved = any(isinstance(finding, Change) for finding in balanced)
            if moved:  # constants are others now
                self.plan = replan(self.plan, model)
            plans = [self.plan, self._plan_without_floats()] if recipe.searches else [self.plan]
            self.sketches = (not moved and self.saved) or pictures.sketches(model, plans, recipe, self._make_listener())
            if pictures.data_free_statistics is not None:
                self.findings += pictures.data_free_statistics.findings
            for oddity in find_odd_tensors(self.sketches, find_tensors_of_pictures(model)):
                self.reporter.warn(oddity)

    def _make_listener(self) -> Listener | None:
        """What hears the outputs by which the search for ranges picks pictures; None where there is no such search."""
        judged = find_judged_tensors(self.model) if self.recipe.tune_ranges else []
        if self.pictures.feed is None or not judged or not all(map(is_tensor, judged)):
            return None
        parts = add_selected_parts(self._network.parts, self.model)
        self.heard = HeardOutputs([value.name or "" for value in judged], parts)
        return Listener(self.heard.names, self.heard.hear)

    def _plan_without_floats(self) -> Plan:
        return replan(self.plan, self.model, floats={}) if self.plan.floats else self.plan

    def _equalize(self) -> list[Finding]:
        """Channels are scaled where that is wanted and can be watched."""
        model, recipe, pictures = self.model, self.recipe, self.pictures
        if not recipe.equalize or (pictures.data_free_statistics is None and pictures.feed is None):
            return []
        likely = predict_recipe(model, recipe, self.plan.floats)
        plan = self.plan if likely == recipe else replan(self.plan, model, recipe=likely)
        if pictures.data_free_statistics is not None:
            watched = partial(pictures.data_free_statistics.channels, model)
            return equalize_without_data(model, plan, watched, pictures.data_free_statistics.imagined, recipe.threads)
        assert pictures.feed is not None
        most = None if recipe.effort == "best" else -(-EQUALIZATION_IMAGES // pictures.feed.batch)
        return equalize_channels(model, plan, pictures.feed, most, recipe.threads)

    def give_layers_their_own_inputs(self) -> None:
        """Readers that want other bits of a tensor than it has get one of their own."""
        with self.clock.step("plan"):
            copied = give_readers_copies(self.model, self.plan, self.sketches)
            self.plan, self.sketches = copied.plan, copied.sketches
            self.findings += copied.changes

    def place_by_measured_times(self) -> None:
        """Leave in float what runs faster there by the times of this machine, where that is asked for."""
        if not self.recipe.tune_latency:
            return
        from qconv.search.latency import tune_latency  # most runs measure no times

        model, recipe, pictures = self.model, self.recipe, self.pictures
        with self.clock.step("tune"):
            fastest = tune_latency(
                model, recipe, self.sketches, pictures.model_preprocessing, pictures.size, self.reporter
            )
            self.plan = replan(self.plan, model, floats=fastest.floats)
            self.findings.append(Change("tune", self.source.name, fastest.in_words()))

    def tune_ranges(self) -> None:
        """Set ranges of activations by what the outputs lose, and leave in float what is worth its time."""
        recipe, pictures = self.recipe, self.pictures
        if pictures.feed is None or not (recipe.tune_ranges or recipe.divides_by_statistics):
            return
        with self.clock.step("ranges"):
            folded = FoldedNetwork(self.model, self.plan, self.sketches, self.set_ranges)
            fed, parts = pictures.model_preprocessing, self._network.parts
            step = partial(tune_ranges, heard=self.heard) if recipe.tune_ranges else divide_by_statistics
            tuned = step(folded, recipe, pictures.feed, fed, parts, self.reporter, self._gate_check)
            self._take_over(tuned.folded)
            self.findings += tuned.findings
            self.precision, self.curve, self.gains = tuned.precision, tuned.curve, tuned.gains

    @property
    def _gate_check(self) -> HoldsGates | None:
        """Whether a model holds the gates on the images that it is fitted to; None where there are none."""
        if not self.recipe.is_gated or self.pictures.feed is None:
            return None
        original = open_original(self.source, self.recipe.threads, self.pictures.data.tasks)
        return GateCheck(self.recipe, original, self.pictures.feed, self.pictures.labels, self.reporter).holds

    def _take_over(self, folded: FoldedNetwork) -> None:
        """Go on with a network that was divided."""
        self.model, self.plan = folded.model, folded.plan
        self.sketches, self.set_ranges = folded.sketches, folded.set_ranges

    def choose_numbers(self) -> tuple[QuantizationSolution, MixedPrecision | None]:
        """Find all numbers that are written, and the bits of layers before that, where they are searched for."""
        folded = FoldedNetwork(self.model, self.plan, self.sketches, self.set_ranges)
        mixed = None
        if self.recipe.searches and self.pictures.feed is not None:
            with self.clock.step("search"):
                original = open_original(self.source, self.recipe.threads, self.pictures.data.tasks)
                context = SearchContext(
                    folded,
                    self.recipe,
                    self.pictures.data,
                    self.pictures.feed,
                    original,
                    self._network.parts,
                    self.pictures.labels,
                )
                searched = search_bits(context, self.reporter, self.curve)
                self.recipe, mixed, solution = searched.recipe, searched.report, searched.solution
                self._take_over(searched.folded)
                if searched.division is not None:
                    self.precision = searched.division.report
                    self.findings += searched.division.findings
        else:
            solution = self._round(folded)
        self.findings += solution.findings
        return solution, mixed

    def _round(self, folded: FoldedNetwork) -> QuantizationSolution:
        recipe, pictures = self.recipe, self.pictures
        with self.clock.step("params"):
            solution = round_to_nearest(folded, recipe)
            warn_of_uncorrected_biases(solution, recipe, self.reporter)
        if pictures.feed is None and pictures.data_free_statistics is None and recipe.effort != "fast":
            why = "statistics do not say how inputs go together; pass pictures, too"
            solution.findings.append(Skipped("round", "all layers", why))
        elif pictures.feed is not None and recipe.rounds_sequentially:
            with self.clock.step("round"):
                feeds = pictures.feed.take(choose_rounding_effort(solution.plan, recipe).pictures, "read again")
                round_second_order_in_place(solution, folded, recipe, feeds, pictures.data.seed, self.reporter)
        if self.gains is not None:
            with self.clock.step("gains"):
                self.gains.correct(solution, folded, recipe, self.reporter)
        return solution

    def emit(self, solution: QuantizationSolution) -> list[TensorRow]:
        """Make the quantized network of the folded one. Returns the rows of its tensors in the report."""
        model, recipe, pictures, plan = self.model, self.recipe, self.pictures, solution.plan
        self.in_float = measure_shares_in_float([node for node in model.nodes() if is_quantizable_layer(node)], plan)
        before = model.copy() if recipe.rounding == "reconstruct" else None
        with self.clock.step("emit"):
            rows = make_tensor_rows(plan, solution.params)
            self.findings += emit(model, plan, solution.params)
        if before is not None and pictures.feed is not None:
            with self.clock.step("reconstruct"):
                self.findings += self._reconstruct(before, pictures.feed)
        with self.clock.step("emit"):
            self.findings += write_fast_forms(model, plan)
            self.findings += compress_constants(model)
            said = recipe.as_dict(pictures.data)
            write_metadata(
                model, qconv.__version__, said, pictures.model_preprocessing, plan.brief_floats(), self.prepared.digest
            )
        return rows

    def _reconstruct(self, before: Model, feed: DataLoader) -> list[Finding]:
        """Learn codes block by block. before: the folded float network."""
        from qconv.training.reconstruct import MOST_IMAGES, reconstruct_blocks  # PyTorch is an extra

        fixed = next((spec.shape[0] for spec in feed.inputs if spec.shape and spec.shape[0]), None)
        feeds, seed = feed.take(MOST_IMAGES, "read again"), self.pictures.data.seed
        return reconstruct_blocks(self.model, before, self.recipe, feeds, fixed, seed, self.reporter)

    def check(self, staged: files.StagedModel, plan: Plan) -> tuple[Verification, Audit]:
        """Run the written file and read what the runtime makes of it, before it gets its name. Warn of what is odd."""
        pictures = self.pictures
        with self.clock.step("verify"):
            files.check_staged_model(staged)
            audited = audit_staged(staged, self.model, PlannedReasons.of(plan), pictures.runnable_loader)
            original = open_original(self.source, self.recipe.threads, pictures.data.tasks)
            self.outputs = tuple(output.fact for output in self._network.outputs)
            checked = verify_staged(staged, original, self.recipe, pictures, self.target)
            if pictures.labels is not None:
                pictures.labels.finish(self.reporter.warn)
                if checked.labelled is not None:
                    tell_of_misfit(checked.labelled.float_scores, checked.labelled.words, self.reporter.warn)
            warn_of_chance(self.model, self.source, pictures.runnable_loader, original, self.recipe, self.reporter)
        warn_of_vain_keep_float(plan, audited, self.reporter)
        warn_of_all_float(audited, self.target, self.reporter)
        warn_of_result(checked, (self.prepared.size, staged.size), self.advice, self.reporter)
        return checked, audited

    def save_side_files(self, plan: Plan) -> None:
        """Write the statistics and the bits of layers, where they are asked for. plan: of what was written."""
        recipe = self.recipe
        if recipe.save_stats is not None:
            self.pictures.save_statistics(self.saved, self.source, Path(recipe.save_stats))
        if recipe.save_layer_bits is not None:
            storage.write_atomically(Path(recipe.save_layer_bits), format_layer_bits(found_bits(recipe, plan)).encode())

    def report(
        self,
        place: Path | None,
        written: Model,
        size: int,
        checked: Verification,
        audited: Audit,
        rows: list[TensorRow],
        mixed: MixedPrecision | None,
    ) -> Report:
        """Put together what is told of the run. size: of the result, in bytes."""
        recipe, pictures, model = self.recipe, self.pictures, written
        return Report(
            version=qconv.__version__,
            output="-" if place is None else str(place),
            float_model=self.source.name,
            recipe=recipe.as_dict(pictures.data),
            preprocessing=None if pictures.model_preprocessing is None else pictures.model_preprocessing.as_dict(),
            preprocessing_words=pictures.description,
            float_bytes=self.prepared.size,
            quantized_bytes=size,
            opset=model.opset,
            ir_version=model.inner.ir_version,
            needs=needed_runtime(model, recipe),
            verify=checked,
            audit=audited,
            gates=check_gates(checked, recipe),
            warnings=self.reporter.warnings,
            time=self.clock.seconds,
            peak_rss_mb=peak_rss_mb(),
            findings=self.findings,
            tensors=rows,
            mixed=mixed,
            outputs=self.outputs,
            runner_up=pictures.detected.runner_up,
            margin=pictures.detected.margin,
            precision=self.precision,
            in_float=FloatShare(audited.float, audited.integer + audited.float, *self.in_float),
        )
