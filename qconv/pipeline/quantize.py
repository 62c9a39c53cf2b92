"""This module quantizes a float model as a recipe says: it writes a verified file and returns a report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import qconv
from qconv import storage
from qconv.audit.audit import PlannedReasons, audit, profile_nodes
from qconv.calibration.sketch import Sketch
from qconv.config.choices import option_name
from qconv.config.data_options import DataOptions
from qconv.config.recipe import Recipe
from qconv.config.serialization import format_layer_bits
from qconv.config.targets import TARGETS, Target
from qconv.data.loader import DataLoader
from qconv.errors import Change, Finding, Skipped, require_torch
from qconv.ir import files, load
from qconv.ir.files import (
    Source,
    declared_opset,
    external_data_files,
    file_bytes,
    hash_model,
    open_original,
    read_proto,
    refuse_quantized,
)
from qconv.ir.metadata import needed_opset, needed_runtime, set_ir_version, write_metadata
from qconv.ir.model import Model
from qconv.metrics.comparison import check_gates, verify
from qconv.passes import fold
from qconv.passes.compress_constants import compress_constants
from qconv.passes.embed_preprocessing import embed_preprocessing
from qconv.passes.equalize import equalize_channels, equalize_without_data
from qconv.passes.requantize import describe_requantization, requantize_for_layers
from qconv.pipeline.checks import (
    _check_distinct_places,
    _describe_accuracy,
    _is_useless,
    check_output,
    find_odd_tensors,
    require_layers,
    warn_of_uncorrected_biases,
    warn_of_unmatched_options,
    warn_of_vain_keep_float,
)
from qconv.pipeline.collect import CalibrationCache, CalibrationData, open_calibration_data
from qconv.planning.placement import choose_float_nodes
from qconv.planning.plan import Plan
from qconv.planning.planner import make_plan
from qconv.quantization.emit import emit
from qconv.quantization.parameters import choose_activation_params, make_tensor_rows
from qconv.quantization.second_order import choose_rounding_effort
from qconv.reporter import Reporter
from qconv.results.quantize import Audit, OutputScore, Report, Verification
from qconv.runtime.benchmark import peak_rss_mb
from qconv.runtime.session import Session
from qconv.search.activation_ranges import SEARCH_BUDGETS, search_activation_ranges
from qconv.search.candidate import (
    FoldedNetwork,
    QuantizationSolution,
    SearchContext,
    round_second_order_in_place,
    round_to_nearest,
)
from qconv.search.latency import tune_latency
from qconv.search.mixed_precision import check_target_size, predict_recipe, search_bits

EQUALIZATION_IMAGES = 64
"""Pictures that channels are watched on, but for the best effort, which watches all."""

SLOWER_FACTOR = 1.05
"""Times of the float model from which on a result is called slower: less is noise."""


@dataclass(slots=True)
class _RunRecord:
    """What one run gathers on its way."""

    reporter: Reporter
    findings: list[Finding] = field(default_factory=list)
    time: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.time[name] = self.time.get(name, 0.0) + time.perf_counter() - start


def quantize(
    source: Source | str | Path,
    out: str | Path | None,
    recipe: Recipe,
    data: DataOptions | None = None,
    reporter: Reporter | None = None,
    memory: CalibrationCache | None = None,
) -> tuple[Report, bytes | None]:
    """Quantize `source` as `recipe` says, with the images of `data`, and save the result at `out`.

    Args:
        source: The float model, or its path.
        out: Where the result goes; None keeps it in memory and returns its bytes.
        recipe: How to quantize.
        data: The images; None where the recipe needs none.
        reporter: Hears of warnings and of progress.
        memory: Of runs before this one on the same model.

    Returns:
        The report, and the bytes of the result where `out` is None.

    Raises:
        QconvError: For anything the user can mend; then nothing is left behind.
    """
    started = time.perf_counter()
    data = data or DataOptions()
    recipe = recipe.with_data(data)
    if recipe.rounding == "reconstruct":
        require_torch("--rounding reconstruct")
    run = _RunRecord((reporter or Reporter()).of_part())
    source = source if isinstance(source, Source) else Source(str(source), Path(source))
    place = None if out is None else Path(out)

    with run.step("load"):
        proto = read_proto(source)
        if place is not None:
            check_output(source, place, external_data_files(proto, source))
        written = {} if place is None else {"the output": place}
        for option in ("save_stats", "save_layer_bits"):
            if getattr(recipe, option) is not None:
                path = Path(getattr(recipe, option))
                check_output(source, path, external_data_files(proto, source))
                written[option_name(option)] = path
        _check_distinct_places(written, [*data.paths, *([] if recipe.stats is None else [recipe.stats])])
        refuse_quantized(proto, source.name)
        float_bytes, made_from = file_bytes(proto, source), hash_model(source, external_data_files(proto, source))
        pictures = open_calibration_data(source, made_from, recipe, data, run.reporter)
        pictures.memory = memory
        model, changes = load.load(proto, source, opset=needed_opset(recipe, declared_opset(proto)))
        run.findings += changes
    with run.step("detect"):
        pictures.settle(model, recipe.threads)
    with run.step("fold"):
        run.findings += fold.run_float_passes(model)
        if recipe.embed_preprocessing is not None:
            fed, layout = pictures.take_pixels(recipe.embed_preprocessing), recipe.embed_preprocessing
            run.findings += embed_preprocessing(model, fed, layout, exact=recipe.activation_bits > 8)
    with run.step("plan"):
        if recipe.rounding == "reconstruct":
            from qconv.training.network import require_operators  # PyTorch is an extra

            require_operators(model)
        warn_of_unmatched_options(model, recipe, run.reporter)
        target = TARGETS[recipe.target]
        floats = {} if recipe.tune_latency else choose_float_nodes(model, recipe, pictures.fed)
        plan = make_plan(model, recipe, target, floats)
        require_layers(plan, source)
        check_target_size(model, recipe, floats)
        for doubt in pictures.detected.doubts():
            run.reporter.warn(doubt)
    with run.step("calibrate"):
        # what is saved is of the network as it is, and serves other options, too, which may leave nothing in float
        as_it_is: Mapping[str, Sketch] = {}
        if recipe.save_stats is not None:
            as_it_is = pictures.sketches(model, [plan, make_plan(model, recipe, target)], recipe)
    with run.step("equalize"):
        balanced = _equalize(
            model, make_plan(model, predict_recipe(model, recipe, floats), target, floats), recipe, pictures
        )
        run.findings += balanced
    with run.step("calibrate"):
        moved = any(isinstance(finding, Change) for finding in balanced)
        plans = [plan, make_plan(model, recipe, target)] if recipe.searches else [plan]
        sketches = as_it_is if as_it_is and not moved else pictures.sketches(model, plans, recipe)
        if pictures.unseen is not None:
            run.findings += pictures.unseen.findings
        for oddity in find_odd_tensors(sketches):
            run.reporter.warn(oddity)
    with run.step("plan"):
        apart = requantize_for_layers(model, plan)
        if apart:
            run.findings += describe_requantization(apart)
            sketches = {**sketches, **{copy: sketches[name] for name, copy in apart.items()}}
            plan = make_plan(model, recipe, target, floats)
    if recipe.tune_latency:
        with run.step("tune"):
            found_fastest = tune_latency(model, recipe, sketches, pictures.fed, pictures.size, run.reporter)
            floats = found_fastest.floats
            plan = make_plan(model, recipe, target, floats)
            run.findings.append(Change("tune", source.name, found_fastest.in_words()))
    factors: Mapping[str, float] = {}
    if recipe.tune_ranges and pictures.feed is not None:
        with run.step("ranges"):
            factors, told = _tune_ranges(model, plan, sketches, pictures.feed, recipe, run)
            run.findings += told
    mixed = None
    folded = FoldedNetwork(model, floats, sketches, factors)
    if recipe.searches and pictures.feed is not None:
        with run.step("search"):
            ground = SearchContext(folded, recipe, data, pictures.feed, open_original(source, recipe.threads))
            searched = search_bits(ground, run.reporter)
            recipe, mixed, settled = searched.recipe, searched.report, searched.settled
    else:
        settled = _choose_and_round(folded, recipe, pictures, run)
    plan, params = settled.plan, settled.params
    run.findings += settled.findings
    before = model.copy() if recipe.rounding == "reconstruct" else None
    with run.step("emit"):
        rows = make_tensor_rows(plan, params)
        run.findings += emit(model, plan, params, pack=recipe.pack)
    if before is not None and pictures.feed is not None:
        with run.step("reconstruct"):
            run.findings += _reconstruct(model, before, recipe, pictures, run.reporter)
    with run.step("emit"):
        run.findings += compress_constants(model)
        write_metadata(model, qconv.__version__, recipe.as_dict(data), pictures.fed, plan.placed, made_from)
    with files.stage_model(model, place) as staged:
        with run.step("verify"):
            files.check_staged_model(staged)
            audited = _audit_staged(staged, model, PlannedReasons.of(plan), pictures.shown)
            checked = _verify_staged(staged, open_original(source, recipe.threads), recipe, pictures, target)
        warn_of_vain_keep_float(plan, audited, run.reporter)
        for output in checked.outputs:
            if output.remark:
                run.reporter.warn(f"output {output.name}: {output.remark}.")
        if _is_useless(checked):
            what = f"little is left of the float model: {_describe_accuracy(checked)}"
            run.reporter.warn(f"{what}; `qconv diagnose` with the same options tells why.")
        if checked.slowdown is not None and checked.slowdown > SLOWER_FACTOR:
            run.reporter.warn(
                f"the quantized model ran {checked.slowdown:.2f} times as long as the float one on this machine."
            )
        size = staged.size
        result = staged.path.read_bytes() if place is None else None
        if recipe.save_stats is not None:
            pictures.save_statistics(as_it_is, source, Path(recipe.save_stats))
        if recipe.save_layer_bits is not None:
            storage.write_atomically(Path(recipe.save_layer_bits), format_layer_bits(recipe.layer_bits).encode())
        if place is not None:
            staged.commit(place)
    run.time["total"] = time.perf_counter() - started
    report = Report(
        version=qconv.__version__,
        output="-" if place is None else str(place),
        float_model=source.name,
        recipe=recipe.as_dict(data),
        preprocessing=None if pictures.fed is None else pictures.fed.as_dict(),
        preprocessing_words=pictures.words,
        float_bytes=float_bytes,
        quantized_bytes=size,
        opset=model.opset,
        ir_version=model.inner.ir_version,
        needs=needed_runtime(model, recipe),
        verify=checked,
        audit=audited,
        gates=check_gates(checked, recipe.min_agreement, recipe.min_sqnr),
        warnings=run.reporter.warnings,
        time=run.time,
        peak_rss_mb=peak_rss_mb(),
        findings=run.findings,
        tensors=rows,
        mixed=mixed,
        runner_up=pictures.detected.runner_up,
        margin=pictures.detected.margin,
    )
    return report, result


def _equalize(model: Model, plan: Plan, recipe: Recipe, pictures: CalibrationData) -> list[Finding]:
    """Channels are scaled where that is wanted and can be watched."""
    if not recipe.equalize:
        return []
    if pictures.unseen is not None:
        watched = partial(pictures.unseen.channels, model)
        return equalize_without_data(model, plan, watched, pictures.unseen.imagined, recipe.threads)
    if pictures.feed is None:
        return []
    most = None if recipe.effort == "best" else -(-EQUALIZATION_IMAGES // pictures.feed.batch)
    return equalize_channels(model, plan, pictures.feed, most, recipe.threads)


def _tune_ranges(
    model: Model, plan: Plan, sketches: Mapping[str, Sketch], feed: DataLoader, recipe: Recipe, run: _RunRecord
) -> tuple[dict[str, float], list[Change]]:
    """Factors on the ranges of activations, as the outputs gain from them."""
    params, _ = choose_activation_params(plan, sketches, recipe)
    looks = SEARCH_BUDGETS[recipe.effort]
    feeds = feed.first(looks.many, "read again")
    return search_activation_ranges(model, plan, params.activations, feeds, looks, recipe.threads, run.reporter)


def _choose_and_round(
    folded: FoldedNetwork, recipe: Recipe, pictures: CalibrationData, run: _RunRecord
) -> QuantizationSolution:
    """All numbers that are written."""
    with run.step("params"):
        settled = round_to_nearest(folded, recipe)
        warn_of_uncorrected_biases(settled, recipe, run.reporter)
    if pictures.feed is None and pictures.unseen is None and recipe.effort != "fast":
        why = "statistics do not say how inputs go together; pass pictures, too"
        settled.findings.append(Skipped("round", "all layers", why))
    elif pictures.feed is not None and recipe.walks:
        with run.step("round"):
            feeds = pictures.feed.first(choose_rounding_effort(settled.plan, recipe).pictures, "read again")
            round_second_order_in_place(settled, folded, recipe, feeds, pictures.data.seed, run.reporter)
    return settled


def _reconstruct(
    model: Model, before: Model, recipe: Recipe, pictures: CalibrationData, reporter: Reporter
) -> list[Finding]:
    from qconv.training.reconstruct import MOST_IMAGES, reconstruct_blocks  # PyTorch is an extra

    feed = pictures.feed
    assert feed is not None
    fixed = next((spec.shape[0] for spec in feed.inputs if spec.shape and spec.shape[0]), None)
    return reconstruct_blocks(
        model, before, recipe, feed.first(MOST_IMAGES, "read again"), fixed, pictures.data.seed, reporter
    )


def _audit_staged(staged: files.StagedModel, model: Model, known: PlannedReasons, feed: DataLoader | None) -> Audit:
    """What the runtime makes of the written file, and what that costs on one picture, with one thread."""
    with storage.scratch_folder(2 * staged.size) as folder:
        optimized = folder / "optimized.onnx"
        session = Session(
            str(staged.path),
            name="the quantized model",
            threads=1,
            save_optimized=optimized,
            profile=folder / "profile",
        )
        feeds = None if feed is None else next(iter(feed.few("verify")), None)
        return audit(optimized, model, known, None if feeds is None else profile_nodes(session, feeds))


def _verify_staged(
    staged: files.StagedModel, original: Session, recipe: Recipe, pictures: CalibrationData, target: Target
) -> Verification:
    """The written file, before it gets its name, against the float model's outputs.

    For another runtime it is run node by node, as the standard defines it, and its time tells nothing. On made-up
    pictures it is run to see that it gives numbers; how near these are tells nothing, either.
    """
    feed = pictures.shown
    if feed is None:
        return Verification(0, ())
    quantized = Session(str(staged.path), name="the quantized model", threads=recipe.threads, optimize=target.on_ort)
    gated = recipe.min_agreement is not None or recipe.min_sqnr is not None
    found = verify(original, quantized, feed.all("verify") if gated else feed.few("verify"), feed.as_float)
    if pictures.unseen is not None:
        odd = (OutputScore(o.name, None, None, o.remark) for o in found.outputs if o.remark)
        found = Verification(0, tuple(odd), found.slowdown, found.slowdown_range)
    # a network with a batch of its own may have seen some twice
    found = replace(found, images=min(found.images, feed.pictures))
    return found if target.on_ort else replace(found, slowdown=None, slowdown_range=None)


def write_folded_float(path: str | Path, out: str | Path) -> None:
    """Write the upgraded and folded float model, as it is before anything is quantized."""
    source = Source(str(path), Path(path))
    recipe = Recipe()
    proto = read_proto(source)
    model, _ = load.load(proto, source, opset=needed_opset(recipe, declared_opset(proto)))
    fold.run_float_passes(model)
    set_ir_version(model)  # and no more: whoever quantizes the file, it is not by this recipe
    with files.stage_model(model, Path(out)) as staged:
        staged.commit(Path(out))
