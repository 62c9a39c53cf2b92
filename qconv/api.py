"""The functions of the Python package: one a command, with the words of the command line.

`import qconv` gives them; what they need is imported when they are called first. A model is a path, or the bytes of a
file. Pictures are a path or several, `DataOptions`, or any iterable of {input name: array}. What a function returns has
`as_dict()`, which is what `--json` prints. QconvError is raised for anything that the user can mend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from qconv.analysis import compare as analysis_compare
from qconv.analysis import diagnose as analysis_diagnose
from qconv.analysis import evaluate as analysis_evaluate
from qconv.analysis import inspect_float, inspect_quantized, sample_study
from qconv.analysis.inspect_float import FloatModel
from qconv.analysis.inspect_quantized import QuantizedModel
from qconv.auditing import audit as runtime_audit
from qconv.auditing.audit import FileAudit
from qconv.calibration import statistics_file
from qconv.calibration.statistics_file import MergedStatistics
from qconv.config.choices import SYNTHESIS_STEPS, check_run_options
from qconv.config.data_options import DataOptions, PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.config.serialization import request_fields
from qconv.data.dataset import ArraySamples
from qconv.errors import QconvError, require_torch
from qconv.ir.files import Source, read_proto
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
Images = DataOptions | PathName | Iterable[PathName] | Iterable[Mapping[str, ArrayLike]]

COMPARED_IMAGES = 64


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
        output: Where the result goes; None keeps it in memory, as `model_bytes` of what is returned.
        recipe: How to quantize; None for the defaults.
        data: The calibration images; None where the recipe needs none.
        reporter: Hears of warnings and of progress.
    """
    source = _source(model)
    with _opened(data, source) as images:
        report, file = pipeline_quantize.quantize(
            source, None if output is None else fspath(output), recipe or Recipe(), images, reporter
        )
    report.model_bytes = file
    return report


def evaluate(
    model: Model,
    images: Images,
    *,
    against: Model | None = None,
    classes: PathName | None = None,
    label_offset: int = 0,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> analysis_evaluate.Evaluation:
    """Measure a model on labelled images, and against another one. All images are used, unless `DataOptions` says less.

    Args:
        model: What is measured.
        images: A folder with a folder a class inside for top-1 and top-5; any other images need `against`.
        against: The model to compare with.
        classes: A file with the class folders in output order, one a line.
        label_offset: Added to the place in that list.
        threads: Of ONNX Runtime; None for all cores.
        reporter: Hears of warnings and of progress.
    """
    check_run_options(threads)
    source = _source(model)
    with _opened(images, source, None) as data:
        wishes = analysis_evaluate.EvaluationOptions(
            data,
            None if against is None else _source(against),
            None if classes is None else Path(classes),
            label_offset,
            threads=threads,
        )
        return analysis_evaluate.evaluate(source, wishes, reporter)


def compare(
    float_model: Model,
    model: Model,
    images: Images,
    *,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> Comparison:
    """Compare a quantized model with its float model layer by layer, on 64 images if not said otherwise."""
    check_run_options(threads)
    sources = _source(float_model), _source(model)
    with _opened(images, sources[0], COMPARED_IMAGES) as data:
        return analysis_compare.compare_on_images(*sources, data, reporter or Reporter(), threads).compared


def diagnose(
    model: Model,
    recipe: Recipe | None = None,
    data: Images | None = None,
    *,
    images: Sequence[PathName] = (),
    reporter: Reporter | None = None,
) -> Diagnosis:
    """Find out why a model loses accuracy when it is quantized with this recipe, and try what mends it.

    Args:
        model: The float model.
        recipe: How it is quantized; None for the defaults.
        data: The calibration images.
        images: Where images to score on lie; empty to hold back some of the others.
        reporter: Hears of warnings and of progress.
    """
    source = _source(model)
    with _opened(data, source) as options:
        if not options.paths:
            raise QconvError("A diagnosis without images is not possible.", "pass some as data: it scores on them.")
        asked = request_fields((recipe or Recipe()).with_data(options), options)
        case = analysis_diagnose.DiagnosisRequest(source, asked, _names(images))
        return analysis_diagnose.diagnose(case, reporter).diagnosis


def inspect(model: Model, target: str = "ort-cpu") -> FloatModel | QuantizedModel:
    """Report what is in a model. target: of the default run that a float model is looked at for."""
    source = _source(model)
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
    *models: PathName,
    batch: int | None = None,
    size: tuple[int, int] | None = None,
    rounds: int = 24,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> Benchmark:
    """Time models in turns, each against the first, with made-up input.

    Args:
        models: Files: each runs in a process of its own.
        batch: Images a run; None for the model's own, or 1.
        size: Height and width of images, where a model leaves them open.
        rounds: Turns that each model gets.
        threads: Of ONNX Runtime; None for all cores.
        reporter: Hears of progress.
    """
    conditions = TimingConditions(threads, batch, size, rounds)
    return runtime_benchmark.benchmark(_names(models), conditions, version=RUNTIME_VERSION, reporter=reporter)


def study_samples(
    model: Model,
    recipe: Recipe | None = None,
    data: Images | None = None,
    *,
    seeds: int = 3,
    holdout: int | None = None,
    images: Sequence[PathName] = (),
    reporter: Reporter | None = None,
) -> SampleCurve:
    """Measure how many calibration images a model needs.

    Args:
        model: The float model.
        recipe: How it is quantized, with effort `fast`; None for that with all else as by default.
        data: The calibration images.
        seeds: Draws of each number of images.
        holdout: Images to score on; None for a fifth, at most 64.
        images: Where those lie; empty to hold back some of the others.
        reporter: Hears of warnings and of progress.
    """
    recipe = recipe or Recipe(effort="fast")
    if recipe.effort != "fast":
        raise QconvError(f"A study with effort {recipe.effort} is not possible.", 'pass Recipe(effort="fast").')
    source = _source(model)
    with _opened(data, source) as options:
        wishes = sample_study.StudyRequest(seeds, holdout, _names(images))
        return sample_study.study_samples(source, recipe, options, wishes, reporter)


def merge_stats(files: Sequence[PathName], output: PathName, reporter: Reporter | None = None) -> MergedStatistics:
    """Add up statistics that `Recipe(save_stats=...)` wrote of parts of a set of images, into the file `output`."""
    return statistics_file.merge_files(_names(files), Path(output), reporter or Reporter())


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
    min_sqnr: float | None = None,
    reporter: Reporter | None = None,
) -> FinetuneResult:
    """Train a quantized model to say what its float model says of images. Needs the extra `torch`.

    The arguments are the options of `qconv finetune`. All images are used, unless `DataOptions` says less.
    """
    require_torch("qconv.finetune")
    from qconv.training import finetune as training
    from qconv.training.options import FinetuneOptions

    check_run_options(threads, min_agreement, min_sqnr)
    source = _source(quant)
    with _opened(images, source, None) as data:
        wishes = FinetuneOptions(
            data,
            None if teacher is None else _source(teacher),
            labels,
            None if classes is None else Path(classes),
            label_offset,
            epochs,
            batch,
            learning_rate,
            holdout,
            augment,
            device,
            threads,
            min_agreement,
            min_sqnr,
        )
        return training.finetune(source, Path(output), wishes, reporter)


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
    reporter: Reporter | None = None,
) -> SynthesisResult:
    """Make calibration images from a float model alone, in the folder `output`. Needs the extra `torch`.

    The arguments are the options of `qconv synthesize`.
    """
    require_torch("qconv.synthesize")
    from qconv.training import synthesize as synthesis
    from qconv.training.options import SynthesisOptions

    check_run_options(threads)
    wishes = SynthesisOptions(preprocessing or PreprocessingOptions(), count, batch, iterations, seed, threads, device)
    return synthesis.synthesize(_source(model), Path(output), wishes, reporter).found


def _names(paths: Sequence[PathName]) -> tuple[str, ...]:
    return tuple(fspath(path) for path in paths)


def _source(model: Model) -> Source:
    if isinstance(model, bytes):
        return Source("the given model", None, model)
    return Source(fspath(model), Path(model))


@contextlib.contextmanager
def _opened(
    images: Images | None, source: Source, samples: int | None = DataOptions().samples
) -> Iterator[DataOptions]:
    """What the functions of the packages take.

    Args:
        images: As they were given.
        source: The model that takes them.
        samples: How many of a path's images are read, where that is not said.
    """
    if images is None or isinstance(images, DataOptions):
        yield images or DataOptions()
        return
    if isinstance(images, str | PathLike):
        yield DataOptions((fspath(images),), samples)
        return
    whole: list[Any] | Iterable[Any] = images if not isinstance(images, Sequence) else list(images)
    if isinstance(whole, list) and whole and all(isinstance(item, str | PathLike) for item in whole):
        yield DataOptions(_names(whole), samples)
        return
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in read_proto(source).graph.input}
    with contextlib.closing(ArraySamples(whole, ranks)) as arrays:
        yield DataOptions((arrays.name,), None, arrays=arrays)
