"""The functions of the Python package: one a command, with the words of the command line.

`import qconv` gives them; what they need is imported when they are called first. A model is a path, or the bytes of a
file. Images are a path or several, `DataOptions`, or any iterable of {input name: array}. What a function returns has
`as_dict()`, which is what `--json` prints. QconvError is raised for anything that the user can mend; where it names an
option, as `--weight-bits`, the argument or field of that name is meant.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from qconv import storage
from qconv.analysis import compare as analysis_compare
from qconv.analysis import diagnose as analysis_diagnose
from qconv.analysis import evaluate as analysis_evaluate
from qconv.analysis import inspect_float, inspect_quantized, sample_study
from qconv.analysis.evaluation import Evaluation, EvaluationOptions
from qconv.analysis.inspect_float import FloatModel
from qconv.analysis.inspect_quantized import QuantizedModel
from qconv.auditing import audit as runtime_audit
from qconv.auditing.audit import FileAudit
from qconv.calibration import statistics_file
from qconv.calibration.statistics_file import MergedStatistics
from qconv.config.choices import GATE_OPTIONS, SYNTHESIS_STEPS, as_texts, as_type, check_run_options, option_name
from qconv.config.data_options import LABEL_OPTIONS, DataOptions, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.config.serialization import request_fields
from qconv.data.dataset import ARRAYS_HINT, ArraySamples
from qconv.errors import QconvError, require_torch
from qconv.ir.files import Source, find_carried_size, read_proto
from qconv.pipeline import quantize as pipeline_quantize
from qconv.reporter import Reporter
from qconv.results.comparison import Comparison, Diagnosis
from qconv.results.quantize import Report
from qconv.results.sample_curve import SampleCurve
from qconv.results.training import FinetuneResult, SynthesisResult
from qconv.runtime import benchmark as runtime_benchmark
from qconv.runtime.benchmark import Benchmark, TimingConditions
from qconv.runtime.session import RUNTIME_VERSION

PathName = str | PathLike[str]
Model = PathName | bytes
Paths = PathName | Iterable[PathName]
Images = DataOptions | Paths | Iterable[Mapping[str, ArrayLike]]

COMPARED_IMAGES = 64

FIELDS_NOT_DIAGNOSED = (
    *("stats", "save_stats", "save_layer_bits", *GATE_OPTIONS),
    *("max_drop", "target_size", "candidate_bits", "tune_latency", "embed_preprocessing"),
)
"""Fields of a Recipe that a diagnosis has no use for."""

FIELDS_NOT_STUDIED = (
    *("stats", "save_stats", "save_layer_bits", *GATE_OPTIONS, "max_drop", "target_size"),
    *("candidate_bits", "candidate_activation_bits", "embed_preprocessing", "effort", "rounding"),
    *("equalize", "tune_ranges"),
)
"""Fields of a Recipe that a study of the number of images has no use for."""


def quantize(
    model: Model,
    output: PathName | None = None,
    recipe: Recipe | None = None,
    data: Images | None = None,
    reporter: Reporter | None = None,
) -> Report:
    """Quantize a float model with calibration images, and check the result.

    Args:
        model: The float model.
        output: The file of the result; None keeps it in memory, as `model_bytes` of what is returned.
        recipe: How to quantize; None for the defaults.
        data: The calibration images; None where the recipe needs none.
        reporter: Hears of warnings and of progress.
    """
    source, recipe = _source(model), _recipe(recipe)
    place = None if output is None else _output(output)
    with _opened(data, source) as images:
        report, file = pipeline_quantize.quantize(source, place, recipe, images, _run(reporter))
    report.model_bytes = file
    return report


def evaluate(
    model: Model,
    images: Images,
    *,
    against: Model | None = None,
    classes: PathName | None = None,
    label_offset: int = 0,
    labels: PathName | None = None,
    label_map: PathName | None = None,
    threads: int | None = None,
    min_agreement: float | None = None,
    min_boxes: float | None = None,
    min_map: float | None = None,
    min_miou: float | None = None,
    min_sqnr: float | None = None,
    min_top1: float | None = None,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Measure a model on labelled images, and against another one.

    Args:
        model: What is measured.
        images: Folders with a folder a class inside for top-1 and top-5; any other images need `against`. All are used,
            but of `DataOptions` as many as its `samples` says: 128 unless it is given, None for all.
        against: The model to compare with.
        classes: A file with the class folders in output order, one a line.
        label_offset: Added to the place in that list.
        labels: Of boxes or masks, a file or a folder: `qconv evaluate --schema` prints what is expected.
        label_map: A file that says which class of the model a label is.
        threads: Of ONNX Runtime; None for all cores.
        min_agreement, min_boxes, min_map, min_miou, min_top1: Gates, shares; all but the last are on what labels or
            `against` tell. `held` of the result says whether every one held.
        min_sqnr: Gate, in dB.
        reporter: Hears of warnings and of progress.
    """
    check_run_options(threads)
    source = _source(model)
    with _opened(images, source, None, needed="An evaluation") as data:
        request = EvaluationOptions(
            data,
            None if against is None else _source(against),
            as_type(classes, Path | None, "--classes"),
            label_offset,
            threads=threads,
            labels=as_type(labels, Path | None, "--labels"),
            label_map=as_type(label_map, Path | None, "--label-map"),
            min_agreement=min_agreement,
            min_boxes=min_boxes,
            min_map=min_map,
            min_miou=min_miou,
            min_sqnr=min_sqnr,
            min_top1=min_top1,
        )
        return analysis_evaluate.evaluate(source, request, _run(reporter))


def compare(
    float_model: Model,
    model: Model,
    images: Images,
    *,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> Comparison:
    """Compare a quantized model with its float model layer by layer.

    Args:
        float_model: The float model.
        model: The quantized model.
        images: Of paths 64 images are used, of arrays all, of `DataOptions` as many as its `samples` says: 128 unless
            it is given.
        threads: Of ONNX Runtime; None for all cores.
        reporter: Hears of warnings and of progress.
    """
    check_run_options(threads)
    threads = as_type(threads, int | None, "--threads")
    sources = _source(float_model), _source(model)
    with _opened(images, sources[0], COMPARED_IMAGES, needed="A comparison", labels=False) as data:
        return analysis_compare.compare_on_images(*sources, data, _run(reporter), threads).compared


def diagnose(
    model: Model,
    recipe: Recipe | None = None,
    data: Images | None = None,
    *,
    images: Paths = (),
    reporter: Reporter | None = None,
) -> Diagnosis:
    """Find out why a model loses accuracy when it is quantized with this recipe, and try what mends it.

    Args:
        model: The float model.
        recipe: How it is quantized; None for the defaults.
        data: The calibration images.
        images: One path or several of images to score on; empty to hold back some of the others.
        reporter: Hears of warnings and of progress.
    """
    source, recipe, others = _source(model), _recipe(recipe), as_texts(images, "images")
    _require_usual(recipe, FIELDS_NOT_DIAGNOSED, "a diagnosis")
    with _opened(data, source, needed="A diagnosis") as options:
        asked = request_fields(recipe.with_data(options), options)
        case = analysis_diagnose.DiagnosisRequest(source, asked, others)
        return analysis_diagnose.diagnose(case, _run(reporter)).diagnosis


def inspect(model: Model, target: str = "ort-cpu") -> FloatModel | QuantizedModel:
    """Report what is in a model. target: of the default run that a float model is looked at for."""
    source, target = _source(model), Recipe(target=target).target  # which knows all targets
    if inspect_quantized.is_quantized_file(read_proto(source)):
        return inspect_quantized.inspect_quantized(source)
    return inspect_float.inspect_float(source, target)


def audit(
    model: Model, *, batch: int | None = None, size: tuple[int, int] | None = None, threads: int = 1
) -> FileAudit:
    """Report what ONNX Runtime runs in integers and in float, and why.

    Args:
        model: What is run.
        batch: Images a run; None for the model's own, or 1.
        size: Height and width of images, where the model leaves them open.
        threads: Of ONNX Runtime.
    """
    return runtime_audit.audit_file(_source(model), threads=threads, batch=batch, size=size)


def benchmark(
    *models: Model,
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    rounds: int = 24,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> Benchmark:
    """Time models in turns, each against the first, with made-up input.

    Args:
        models: Each runs in a process of its own, which reads its file; bytes lie in a temporary one until then.
        batch: Images a run; None for the model's own, or 1.
        size: Height and width of images, where a model leaves them open; None for those that a file by qconv was made
            with.
        rounds: Turns that each model gets.
        threads: Of ONNX Runtime; None for all cores.
        reporter: Hears of progress.
    """
    sources = [_source(model) for model in models]
    conditions = TimingConditions(threads, batch, size, rounds)
    if size is None:
        conditions = replace(conditions, size=find_carried_size(sources))
    names = [source.name for source in sources]
    with contextlib.ExitStack() as stack:
        paths = [stack.enter_context(_file(source)) for source in sources]
        return runtime_benchmark.benchmark(
            paths, conditions, version=RUNTIME_VERSION, reporter=_run(reporter), names=names
        )


def study_samples(
    model: Model,
    recipe: Recipe | None = None,
    data: Images | None = None,
    *,
    seeds: int = 3,
    holdout: int | None = None,
    images: Paths = (),
    reporter: Reporter | None = None,
) -> SampleCurve:
    """Measure how many calibration images a model needs.

    Args:
        model: The float model.
        recipe: How it is quantized, with effort `fast`; None for that with all else as by default.
        data: The calibration images.
        seeds: Draws of each number of images.
        holdout: Images to score on; None for a fifth, at most 64.
        images: One path or several of those; empty to hold back some of the others.
        reporter: Hears of warnings and of progress.
    """
    recipe = _recipe(Recipe(effort="fast") if recipe is None else recipe)
    if recipe.effort != "fast":
        raise QconvError(f"A study with effort {recipe.effort} is not possible.", 'pass Recipe(effort="fast").')
    _require_usual(recipe, FIELDS_NOT_STUDIED, "a study")
    source = _source(model)
    request = sample_study.StudyRequest(seeds, holdout, as_texts(images, "images"))
    with _opened(data, source, needed="A study", labels=False) as options:
        recipe = recipe.with_data(options)
        return sample_study.study_samples(source, recipe, options, request, _run(reporter))


def merge_stats(files: Paths, output: PathName, reporter: Reporter | None = None) -> MergedStatistics:
    """Add up statistics that `Recipe(save_stats=...)` wrote of parts of a set of images, into the file `output`."""
    names = as_texts(files, "files")
    if not names:
        raise QconvError("There are no statistics to add up.", "pass files that Recipe(save_stats=...) wrote.")
    return statistics_file.merge_files(names, Path(_output(output)), _run(reporter))


def finetune(
    quant: PathName,
    images: Images,
    output: PathName,
    *,
    teacher: PathName | None = None,
    labels: bool = False,
    classes: PathName | None = None,
    label_offset: int = 0,
    epochs: int = 20,
    batch: int = 64,
    learning_rate: float = 4e-3,
    holdout: int | None = None,
    augment: bool = True,
    device: str = "auto",
    threads: int | None = None,
    min_agreement: float | None = None,
    min_boxes: float | None = None,
    min_map: float | None = None,
    min_miou: float | None = None,
    min_sqnr: float | None = None,
    reporter: Reporter | None = None,
) -> FinetuneResult:
    """Train a quantized model to say what its float model says of images. Needs the extra `torch`.

    The arguments are the options of `qconv finetune`. All images are used, but of `DataOptions` as many as its
    `samples` says: 128 unless it is given, None for all.
    """
    require_torch("qconv.finetune")
    from qconv.training import finetune as training
    from qconv.training.options import FinetuneOptions

    source, place = _source_of_file(quant), Path(_output(output))
    with _opened(images, source, None, needed="Training", labels=False) as data:
        request = FinetuneOptions(
            data,
            None if teacher is None else _source_of_file(teacher),
            labels,
            as_type(classes, Path | None, "--classes"),
            label_offset,
            epochs,
            batch,
            learning_rate,
            holdout,
            augment,
            device,
            threads,
            min_agreement,
            min_boxes,
            min_map,
            min_miou,
            min_sqnr,
        )
        return training.finetune(source, place, request, _run(reporter))


def synthesize(
    model: Model,
    output: PathName,
    *,
    count: int = 128,
    batch: int | None = None,
    iterations: int = SYNTHESIS_STEPS,
    seed: int = 0,
    preprocessing: PreprocessingOptions | None = None,
    threads: int | None = None,
    device: str = "auto",
    task: str = "auto",
    reporter: Reporter | None = None,
) -> SynthesisResult:
    """Make calibration images from a float model alone, in the folder `output`. Needs the extra `torch`.

    The arguments are the options of `qconv synthesize`.
    """
    require_torch("qconv.synthesize")
    from qconv.training import synthesize as synthesis
    from qconv.training.options import SynthesisOptions

    fed = PreprocessingOptions() if preprocessing is None else preprocessing
    request = SynthesisOptions(fed, count, batch, iterations, seed, threads, device, task)
    return synthesis.synthesize(_source(model), Path(_output(output)), request, _run(reporter)).found


def _source(model: Model) -> Source:
    if isinstance(model, bytes | bytearray | memoryview):
        return Source("the given model", None, bytes(model))
    if not isinstance(model, str | PathLike):
        raise QconvError(f"{type(model).__name__} is no model.", "pass the path of a file, or its bytes.")
    return _source_of_file(model)


def _source_of_file(model: PathName) -> Source:
    name: str = as_type(model, str, "model")
    if not name:
        raise QconvError("An empty text is no model.", "pass the path of a file.")
    return Source(name, Path(name))


@contextlib.contextmanager
def _file(source: Source) -> Iterator[str]:
    """The path of a model's file: a temporary one where its bytes were given."""
    if source.data is None:
        yield source.name
        return
    read_proto(source)  # says what is no model better than ONNX Runtime, which names the temporary file
    with storage.scratch_folder(len(source.data)) as folder:
        path = folder / "model.onnx"
        path.write_bytes(source.data)
        yield str(path)


def _output(output: PathName) -> str:
    name: str = as_type(output, str, "output")
    if name in ("", "-"):
        raise QconvError(f"output {name!r} is not possible.", "name a file or folder, such as './-' for that name.")
    return name


def _recipe(recipe: Recipe | None) -> Recipe:
    return as_type(recipe, Recipe | None, "recipe") or Recipe()


def _run(reporter: Reporter | None) -> Reporter:
    """The reporter of one call."""
    return (as_type(reporter, Reporter | None, "reporter") or Reporter()).of_run()


def _require_usual(recipe: Recipe, names: Iterable[str], where: str) -> None:
    """Raise QconvError for fields with another value than by default, which would have no effect."""
    usual = Recipe(effort=recipe.effort)
    for name in names:
        if getattr(recipe, name) != getattr(usual, name):
            raise QconvError(f"{option_name(name)} is not possible in {where}.", "leave it out of the recipe.")


@contextlib.contextmanager
def _opened(
    images: Images | None,
    source: Source,
    samples: int | None = DataOptions().samples,
    needed: str = "",
    *,
    labels: bool = True,
) -> Iterator[DataOptions]:
    """What the functions of the packages take.

    Args:
        images: As they were given.
        source: The model that takes them.
        samples: How many of a path's images are read, where that is not said.
        needed: What cannot do without images.
        labels: Whether it measures by labels of them.
    """
    data = DataOptions() if images is None else images
    if isinstance(data, str | PathLike):
        data = DataOptions(as_texts(data, "images"), samples)
    if isinstance(data, DataOptions):
        if needed and not data.paths:
            fact, fix = f"{needed} without images is not possible.", "pass a folder of pictures, arrays or DataOptions."
            raise QconvError(fact, fix)
        said = next((name for name in LABEL_OPTIONS if getattr(data, name) is not None), None)
        if said is not None and not labels:
            fact = f"{needed} with {option_name(said)} is not possible."
            raise QconvError(fact, "leave it out of DataOptions: qconv.evaluate measures by labels.")
        yield data
        return
    if isinstance(data, bytes | Mapping) or not isinstance(data, Iterable):
        raise QconvError(f"{type(data).__name__} is neither a path nor a list of samples.", ARRAYS_HINT)
    items: Iterator[object] = iter(data)
    first = list(itertools.islice(items, 1))
    if first and isinstance(first[0], str | PathLike):
        # a set is kept as one, as its order is another in every process
        paths = as_texts(data if isinstance(data, Set) else [*first, *items], "images")
        yield DataOptions(paths, samples)
        return
    whole: Iterator[Any] = itertools.chain(first, items)
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in read_proto(source).graph.input}
    with contextlib.closing(ArraySamples(whole, ranks)) as arrays:
        yield DataOptions((arrays.name,), None, arrays=arrays)
