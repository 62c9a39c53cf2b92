"""The story: a float model, a recipe and pictures go in, a checked quantized file and a report come out."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

import qconv
from qconv import fold, images, load, save
from qconv.audit import audit, tensor_rows
from qconv.calibrate import Statistics, watch
from qconv.emit import emit
from qconv.errors import QconvError
from qconv.findings import Finding
from qconv.graph import Model
from qconv.params import choose_params
from qconv.plan import Plan, make_plan
from qconv.recipe import Preprocessing, Recipe, Scheme, WeightGranularity
from qconv.report import Report
from qconv.runtime import Session
from qconv.shrink import shrink
from qconv.targets import IR_VERSIONS, RUNTIMES, TARGETS
from qconv.verify import gates, verify

VERIFIED_IMAGES = 32
DECODERS = 2


@dataclass(slots=True)
class Listener:
    """Who hears about a run while it lasts. progress: (stage, pictures done, pictures in all)."""

    warn: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None


@dataclass(slots=True)
class _Run:
    """What one run gathers on its way."""

    listener: Listener
    warnings: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    time: dict[str, float] = field(default_factory=dict)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.listener.warn(text)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.time[name] = self.time.get(name, 0.0) + time.perf_counter() - start


def quantize(
    source: load.Source | str | Path, out: str | Path | None, recipe: Recipe, listener: Listener | None = None
) -> tuple[Report, bytes | None]:
    """Quantize `source` as `recipe` says and save the result at `out`.

    out: None keeps the result in memory and returns its bytes. Raises QconvError for anything the user can mend; then
    nothing is left behind.
    """
    started = time.perf_counter()
    run = _Run(listener or Listener())
    if not isinstance(source, load.Source):
        source = load.Source(str(source), Path(source))
    place = None if out is None else Path(out)
    _check_output(source, place)

    with run.step("load"):
        listing = images.find(recipe.calib, pattern=recipe.glob, samples=recipe.samples, seed=recipe.seed)
        proto = load.read(source)
        load.refuse_quantized(proto, source.name)
        original = Session(source.runnable, name=source.name, threads=recipe.threads)
        pictures = _Pictures.of(original, listing, recipe, run)
        model, changes = load.load(proto, source, opset=needed_opset(recipe, proto_opset(proto)))
        run.findings += changes
    with run.step("fold"):
        run.findings += fold.fold(model)
    with run.step("plan"):
        plan = make_plan(model, recipe, TARGETS[recipe.target])
        if not plan.layers:
            raise QconvError(
                f"{source.name} has nothing to quantize: no Conv or Gemm with constant weights.", _NOTHING_HINT
            )
    with run.step("calibrate"):
        statistics = _calibrate(model, plan, recipe, pictures)
    with run.step("params"):
        params, found = choose_params(plan, statistics, recipe.calibrator)
        run.findings += found
        rows = tensor_rows(plan, params)
    with run.step("emit"):
        run.findings += emit(model, plan, params, pack=recipe.pack)
        run.findings += shrink(model)
        _describe(model, recipe, pictures.preprocessing)
    with save.staged(model, place) as staged:
        with run.step("verify"):
            check(staged.path)
            optimized = staged.folder / "optimized.onnx"
            name = "the quantized model"
            quantized = Session(str(staged.path), name=name, threads=recipe.threads, save_optimized=optimized)
            shown = None if _has_gates(recipe) else VERIFIED_IMAGES
            checked = verify(original, quantized, pictures.batches("verify", shown), batch=recipe.batch)
        report = Report(
            version=qconv.__version__,
            output=str(place) if place is not None else "-",
            float_model=source.name,
            recipe=recipe.as_dict(),
            preprocessing=None if pictures.preprocessing is None else pictures.preprocessing.as_dict(),
            preprocessing_words="" if pictures.preprocessing is None else pictures.preprocessing.in_words(),
            float_bytes=float_bytes(source, model),
            quantized_bytes=staged.size,
            opset=model.opset,
            ir_version=model.inner.ir_version,
            needs=needs(model, recipe),
            verify=checked,
            audit=audit(optimized, plan),
            gates=gates(checked, recipe.min_agreement, recipe.min_sqnr),
            findings=run.findings,
            tensors=rows,
        )
        if checked.slowdown is not None and checked.slowdown > 1:
            run.warn(f"the quantized model ran {checked.slowdown:.2f} times as long as the float one on this machine.")
        if place is None:
            result: bytes | None = staged.path.read_bytes()
        else:
            result = None
            staged.commit(place)
    report.warnings = run.warnings
    report.time = {**run.time, "total": time.perf_counter() - started}
    report.peak_rss_mb = peak_rss_mb()
    return report, result


_NOTHING_HINT = "check --keep-float and --keep-float-op, and that the model is a network with weights."


def _check_output(source: load.Source, out: Path | None) -> None:
    if out is None:
        return
    if source.path is not None and out.exists() and source.path.exists() and out.samefile(source.path):
        raise QconvError(f"The output {out} is the model itself.", "choose another output with -o.")
    save.check_place(out)


@dataclass(slots=True)
class _Pictures:
    """The calibration pictures as the network wants them, to be read as often as needed."""

    listing: images.Listing
    inputs: list[images.InputSpec]
    preprocessing: Preprocessing | None
    recipe: Recipe
    run: _Run
    passes: int = 0

    @classmethod
    def of(cls, session: Session, listing: images.Listing, recipe: Recipe, run: _Run) -> _Pictures:
        inputs = [images.InputSpec(*found) for found in session.inputs]
        preprocessing = None
        if any(path.suffix.lower() not in images.SAMPLE_SUFFIXES for path in listing.paths):
            if len(inputs) > 1:
                raise several_inputs(session.name, inputs)
            vector = any(len(shape) == 2 for shape in session.output_shapes)
            preprocessing = images.resolve(recipe.preprocessing, inputs[0], class_vector=vector)
        return cls(listing, inputs, preprocessing, recipe, run)

    @property
    def batch(self) -> int:
        """The recipe's batch, or the one that the model was exported for."""
        fixed = self.inputs[0].shape[0] if self.inputs[0].shape else None
        return fixed or self.recipe.batch

    def batches(self, stage: str, limit: int | None = None) -> Iterator[dict[str, NDArray[Any]]]:
        """All pictures, or the first `limit`. Warns of each unreadable one on the first pass alone."""
        paths = self.listing.paths if limit is None else self.listing.paths[:limit]
        total = len(paths)
        listing = images.Listing(paths, self.listing.found, self.listing.ignored)
        warn = _silent if self.passes else self.run.warn
        self.passes += 1
        found = images.batches(listing, self.inputs, self.preprocessing, batch=self.batch, workers=DECODERS, warn=warn)
        done = 0
        for feeds in found:
            yield feeds
            done += len(next(iter(feeds.values())))
            self.run.listener.progress(stage, min(done, total), total)


def _silent(text: str) -> None:
    pass


def several_inputs(name: str, inputs: list[images.InputSpec]) -> QconvError:
    """The error for a network that pictures alone cannot feed."""
    names = ", ".join(spec.name for spec in inputs)
    return QconvError(
        f"{name} has {len(inputs)} inputs ({names}), which pictures alone cannot feed.",
        f"pass a folder of .npz files, each one sample with the arrays {names}.",
    )


def _calibrate(model: Model, plan: Plan, recipe: Recipe, pictures: _Pictures) -> dict[str, Statistics]:
    names = [value.name or "" for value in plan.watched()]
    if not names:
        return {}
    with save.runnable(model, names) as runnable:
        session = Session(runnable, name="the folded float model", threads=recipe.threads)
        return watch(session, names, pictures.batches("calibrate"))


def check(path: Path) -> None:
    """onnx's own checker on the written file."""
    import onnx

    onnx.checker.check_model(str(path), full_check=False)


def _has_gates(recipe: Recipe) -> bool:
    return recipe.min_agreement is not None or recipe.min_sqnr is not None


def proto_opset(proto: Any) -> int:
    """The standard opset that a protobuf model imports."""
    return next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)


def needed_opset(recipe: Recipe, own: int) -> int:
    """The lowest opset that holds the model and the types that the recipe needs."""
    new_types = (
        recipe.pack
        or 16 in (recipe.weight_bits, recipe.activation_bits, recipe.edge_bits)
        or recipe.weight_granularity is WeightGranularity.PER_BLOCK
    )
    needed = max(own, 21 if new_types else load.LOWEST_OPSET)
    if recipe.opset is None:
        return needed
    if recipe.opset < needed:
        what = "the model's own opset" if needed == own else "what these types need"
        raise QconvError(
            f"--opset {recipe.opset} is below {what} ({needed}).", f"pass --opset {needed} or leave it out."
        )
    if recipe.opset not in IR_VERSIONS:
        raise QconvError(f"--opset {recipe.opset} is not known.", f"use {load.LOWEST_OPSET} to {max(IR_VERSIONS)}.")
    return recipe.opset


def needs(model: Model, recipe: Recipe) -> str:
    """The oldest ONNX Runtime that runs the file right."""
    version = RUNTIMES.get(model.opset, RUNTIMES[max(RUNTIMES)])
    if recipe.weight_scheme is Scheme.ASYMMETRIC and recipe.activation_bits < 32:
        version = "1.28"  # earlier ones refuse per-channel zero points that differ
    return f"onnxruntime >= {version}"


def _describe(model: Model, recipe: Recipe, preprocessing: Preprocessing | None) -> None:
    """Recipe, preprocessing and version travel in the file; nothing that differs from run to run does."""
    model.inner.ir_version = IR_VERSIONS.get(model.opset, max(IR_VERSIONS.values()))
    carried = {"qconv.version": qconv.__version__, "qconv.recipe": json.dumps(recipe.as_dict(), sort_keys=True)}
    if preprocessing is not None:
        carried["qconv.preprocessing"] = json.dumps(preprocessing.as_dict(), sort_keys=True)
    model.inner.metadata_props.update(carried)


def float_bytes(source: load.Source, model: Model) -> int:
    """Size of the float model, its data file included."""
    if source.path is None:
        return len(source.data or b"")
    size = source.path.stat().st_size
    return size + (save.total_bytes(model) if model.external else 0)


def peak_rss_mb() -> float:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def folded_float(path: str | Path, out: str | Path) -> None:
    """Write the upgraded and folded float model, as it is before anything is quantized."""
    source = load.Source(str(path), Path(path))
    model, _ = load.load(load.read(source), source)
    fold.fold(model)
    model.inner.ir_version = IR_VERSIONS.get(model.opset, max(IR_VERSIONS.values()))
    with save.staged(model, Path(out)) as staged:
        staged.commit(Path(out))
