"""Prepares a float network for its quantization: read, load, find out how it is fed, fold, and plan.

Every command that quantizes, or tells what quantizing would do, starts here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from qconv.config.data_options import DataOptions, Preprocessing
from qconv.config.recipe import Recipe
from qconv.config.targets import TARGETS
from qconv.data.label_files import USE_EVALUATE
from qconv.errors import Change, Finding
from qconv.ir import load
from qconv.ir.early_check import check_early
from qconv.ir.files import (
    Source,
    declared_opset,
    external_data_files,
    file_bytes,
    hash_model,
    iter_tensors,
    metadata_of,
    read_proto,
    refuse_quantized,
)
from qconv.ir.model import Model
from qconv.ir.output_shapes import doubtful_outputs, settle_shapes
from qconv.ir.requirements import check_needs, needed_opset
from qconv.metrics.by_labels import open_data_labels
from qconv.metrics.demands import (
    demands_outputs,
    needs_labels,
    require_boxes,
    require_class_folders,
    require_measures,
)
from qconv.passes import fold
from qconv.pipeline.checks import check_places, require_layers, warn_of_unmatched_options
from qconv.pipeline.collect import CalibrationCache, CalibrationData, open_calibration_data
from qconv.planning.placement import choose_float_nodes
from qconv.planning.plan import Plan
from qconv.planning.planner import make_plan, replan
from qconv.reporter import Reporter


@dataclass(slots=True)
class Stopwatch:
    """Seconds that each step of a run took, by its name; what is done in several parts adds up."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Add the time of what is done inside to that of a step."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(slots=True)
class LoadedFloat:
    """A float network as it is loaded, and the images that it is fed with.

    Attributes:
        model: Upgraded to the opset that the recipe needs; not folded.
        data: The images, with the preprocessing that was said, or found out.
        size: Of its files, in bytes.
        digest: The hash of its files.
        findings: What was changed in loading.
    """

    model: Model
    data: CalibrationData
    size: int
    digest: str
    findings: list[Finding]


@dataclass(slots=True)
class Prepared:
    """A float network, ready to be quantized.

    Attributes:
        model: The folded network; it takes pixels where preprocessing is embedded.
        data: The images, as the network takes them.
        plan: What is quantized, and how.
        size: Of the float model's files, in bytes.
        digest: The hash of the float model's files.
        findings: What was changed, and what could not be.
    """

    model: Model
    data: CalibrationData
    plan: Plan
    size: int
    digest: str
    findings: list[Finding]


def load_float(
    source: Source,
    recipe: Recipe,
    data: DataOptions,
    reporter: Reporter,
    *,
    cache: CalibrationCache | None = None,
    written: Mapping[str, Path] | None = None,
    clock: Stopwatch | None = None,
    hold_back: bool = False,
) -> LoadedFloat:
    """Load a float model and find out how it is fed.

    Args:
        source: The model.
        recipe: Says for which target and types it is loaded, and may name statistics.
        data: The images, and what is said of how the network is fed.
        reporter: Hears of images that cannot be read, and of options that have no effect.
        cache: What runs before this one on the same model have found out.
        written: Places that will be written, by what they are for.
        clock: Takes the time of the steps "load" and "detect".
        hold_back: Whether some images, where there are enough, are kept from every choice, to check the result on.

    Raises:
        QconvError: Where the model is quantized already, images cannot feed it, or a place cannot be written.
    """
    clock = clock or Stopwatch()
    with clock.step("load"):
        proto = read_proto(source)
        files = external_data_files(proto, source)
        check_places(source, files, written or {}, [*data.paths, *([] if recipe.stats is None else [recipe.stats])])
        refuse_quantized(proto, source.name)
        size, digest = file_bytes(proto, source), hash_model(source, files)
        pictures = open_calibration_data(source, digest, recipe, data, reporter, hold_back=hold_back)
        pictures.cache = cache
        opened = None
        if needs_labels(recipe, data):
            opened = open_data_labels(data, pictures.paths, reporter.warn, USE_EVALUATE)
        counts = [prod(tensor.dims) for tensor in iter_tensors(proto.graph)]
        largest = None if proto.functions else max(counts, default=0)
        model, changes = load.load(proto, source, opset=needed_opset(recipe, declared_opset(proto), largest))
        check_needs(model, recipe)
    with clock.step("detect"):
        pictures.settle(model, recipe.threads)
        changes += _settle_output_shapes(model, pictures, source, recipe)
        if data.tasks.said or opened is not None or demands_outputs(recipe):
            network = pictures.describe_network(source, recipe.threads)
            require_measures(recipe, network)  # what is not there is better said before the work
            require_class_folders(recipe, data, pictures.paths, network)
            if opened is not None:
                pictures.fit_labels(opened, network, metadata_of(proto), reporter.warn)
            said = pictures.iter_float_outputs(source, recipe.threads)
            require_boxes(recipe, network, said, labelled=opened is not None and opened.tell_boxes)
        check_early(model, source)
    return LoadedFloat(model, pictures, size, digest, list(changes))


def _settle_output_shapes(model: Model, pictures: CalibrationData, source: Source, recipe: Recipe) -> list[Change]:
    """Set the shapes of outputs that the file declares wrong, or not at all, from a run."""
    doubtful = doubtful_outputs(model)
    if not doubtful:
        return []
    changed = settle_shapes(model, pictures.shapes_of_outputs(source, recipe.threads, doubtful))
    what = "its declared shape is not what a run gives: set from the run"
    return [Change("load", f"output {name}", what, what) for name in changed]


def prepare(
    source: Source,
    recipe: Recipe,
    data: DataOptions,
    reporter: Reporter,
    *,
    cache: CalibrationCache | None = None,
    written: Mapping[str, Path] | None = None,
    clock: Stopwatch | None = None,
    hold_back: bool = False,
) -> Prepared:
    """Load, fold and plan a float model. Arguments and errors are those of `load_float`.

    Raises:
        QconvError: Also where nothing would be quantized.
    """
    clock = clock or Stopwatch()
    loaded = load_float(source, recipe, data, reporter, cache=cache, written=written, clock=clock, hold_back=hold_back)
    model, pictures = loaded.model, loaded.data
    with clock.step("fold"):
        findings = loaded.findings + fold.run_float_passes(model, for_ort=runs_on_ort(recipe))
        if recipe.embed_preprocessing is not None:
            from qconv.passes.embed_preprocessing import embed_preprocessing  # most runs have no need of it

            fed, layout = pictures.take_pixels(recipe.embed_preprocessing), recipe.embed_preprocessing
            findings += embed_preprocessing(model, fed, layout, exact=recipe.activation_bits > 8)
    with clock.step("plan"):
        warn_of_unmatched_options(model, recipe, reporter)
        plan = plan_folded(model, recipe, pictures.model_preprocessing)
        require_layers(plan, source)
        for doubt in pictures.detected.doubts():
            reporter.warn(doubt)
    return Prepared(model, pictures, plan, loaded.size, loaded.digest, findings)


def runs_on_ort(recipe: Recipe) -> bool:
    """Whether the file is for ONNX Runtime's CPU provider, and its activations are codes."""
    return TARGETS[recipe.target].costs is not None and recipe.activation_bits <= 8


def plan_folded(model: Model, recipe: Recipe, fed: Preprocessing | None) -> Plan:
    """Plan a folded network, with what is faster in float left there. fed: what it takes, None where that is not known.

    Where times will be measured (`tune_latency`), no table of costs is asked.
    """
    whole = make_plan(model, recipe, TARGETS[recipe.target])
    floats = {} if recipe.tune_latency else choose_float_nodes(model, recipe, fed, whole)
    return replan(whole, model, floats=floats) if floats else whole
