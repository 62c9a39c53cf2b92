"""This module runs quantization-aware training: a quantized file is trained to say what its float model says.

The float model is the teacher (distillation). Some images are held out. On these both files are run by ONNX Runtime at
the end, and the trained one is written only if it is nearer to the float model, or right more often where labels are
learned from; otherwise the input is written unchanged. Every round leaves a checkpoint beside the output, from which
the same command resumes after it was killed.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qconv import storage
from qconv.auditing.audit import audit_file
from qconv.config.recipe import Recipe
from qconv.config.serialization import recipe_from_dict
from qconv.config.targets import TARGETS
from qconv.data.dataset import LabelOptions, find_classes, labels_of
from qconv.data.model_with_data import ModelWithData, open_models
from qconv.errors import QconvError
from qconv.ir import files, load
from qconv.ir.files import Source, external_data_files, file_bytes, find_teacher, hash_model, is_quantized, read_proto
from qconv.ir.metadata import read_recipe, write_finetuning
from qconv.ir.model import Model
from qconv.ir.packed_codes import pack_codes, unpack_codes
from qconv.metrics.comparison import ComparisonAccumulator
from qconv.metrics.demands import check_gates, demands_outputs, require_boxes, require_extras, require_measures
from qconv.metrics.network_outputs import describe_outputs
from qconv.passes.compress_constants import compress_constants
from qconv.reporter import Reporter
from qconv.results.quantize import Audit, Verification
from qconv.results.training import FinetuneResult, ValidationResult, ValidationScore
from qconv.runtime.benchmark import peak_rss_mb
from qconv.runtime.outputs import ModelOutput
from qconv.runtime.session import Session
from qconv.training.distillation import (
    VALIDATION_BATCH,
    Distillation,
    InMemoryDataset,
    TrainingInputs,
    distillation_loss,
    read_into_memory,
)
from qconv.training.network import TorchNetwork, resolve_device, run_deterministically, to_arrays
from qconv.training.options import FinetuneOptions
from qconv.training.trainable import LearnedParameters, find_sites
from qconv.training.trainer import Trainer, TrainingCheckpoint, TrainingSettings

RATE_FACTORS = {"weights": 1.0, "weight_scales": 0.1, "activation_scales": 0.1, "biases": 0.2}
"""Factors of the learning rate, which is that of weights in integer steps."""
HELD_OUT_SHARE, LEAST_HELD_OUT, MOST_HELD_OUT = 1 / 10, 32, 2000
FEWEST_IMAGES = 8
"""Pictures: less is nothing to learn from."""
CHECKPOINT_FORMAT = 2
"""Version of the checkpoint's format."""


def finetune(source: Source, out: Path, request: FinetuneOptions, reporter: Reporter | None = None) -> FinetuneResult:
    """Train the quantized model `source`, and write the better of both at `out`.

    Args:
        source: The quantized model.
        out: Where the result goes.
        request: The options of the run.
        reporter: Hears of progress and warnings.

    Returns:
        What was found, with the scores before and after.

    Raises:
        QconvError: The user can mend it. Nothing is left behind but the checkpoint that a later run resumes from.
    """
    started = time.perf_counter()
    reporter = (reporter or Reporter()).of_part()
    with run_deterministically(request.threads):
        if not is_quantized(read_proto(source)):
            raise QconvError(f"{source.name} is not quantized.", "quantize it with `qconv quantize` first.")
        teacher = request.teacher or find_teacher(source)
        _check_request(source, teacher, out, request)
        require_extras(request)
        setup = _TrainingSetup.of(source, teacher, request, reporter)
        before = setup.judged(source.runnable)
        rates = {kind: request.rate * factor for kind, factor in RATE_FACTORS.items()}
        batch = min(request.batch, len(setup.distillation.taught))
        trainer = Trainer(
            setup.distillation, TrainingSettings(request.epochs, batch, rates, request.augment, request.data.seed)
        )
        kept = TrainingCheckpoint(
            out, _fingerprint(source, teacher, setup.distillation.inputs.dataset, request, setup.device)
        )
        resumed = kept.read_into(trainer, reporter)
        _run_training(trainer, kept, reporter)
        setup.distillation.learned.restore(trainer.best)
        found = FinetuneResult(
            model=source.name,
            teacher=teacher.name,
            output=str(out),
            request=request,
            device=setup.device,
            torch=torch.__version__,
            words=setup.words,
            taught=len(setup.distillation.taught),
            held=len(setup.distillation.held),
            steps=trainer.steps,
            resumed=resumed,
            history=trainer.history,
            before=before,
            float_bytes=file_bytes(read_proto(teacher), teacher),
            warnings=reporter.warnings,
        )
        _write_better(setup, source, out, found, trainer.best_step)
        kept.forget()
    found.gates = check_gates(found.result.verify, request)
    found.seconds, found.peak_rss_mb = time.perf_counter() - started, peak_rss_mb()
    return found


@dataclass(frozen=True, slots=True)
class _TrainingSetup:
    """Everything that a run works on.

    Attributes:
        model: The quantized model, trained in place.
        packed: Whether its codes were packed, which are unpacked here.
        distillation: Student, teacher and images in PyTorch.
        teacher: The float model in ONNX Runtime.
        threads: Of ONNX Runtime and PyTorch; None for all cores.
        optimize: Whether the quantized file is made for ONNX Runtime, whose optimizations then apply.
        device: Of PyTorch.
        words: The preprocessing of both models in words.
    """

    model: Model
    packed: bool
    distillation: Distillation
    teacher: Session
    threads: int | None
    optimize: bool
    device: str
    words: str

    @classmethod
    def of(
        cls,
        source: Source,
        teacher: Source,
        request: FinetuneOptions,
        reporter: Reporter,
    ) -> _TrainingSetup:
        """Open both models and read all images."""
        device = resolve_device(request.device)
        own, other = open_models(source, teacher, request.data, request.threads, reporter)
        assert other is not None
        _require_same_outputs(own, other)
        if demands_outputs(request):  # what is not there is better said before the work
            _require_measures(own.session.outputs, other, request)
        model, (floats, _) = load.load_unchanged(read_proto(source), source), load.load(read_proto(teacher), teacher)
        recipe, packed = recipe_from_dict(read_recipe(model.inner.metadata_props)), bool(unpack_codes(model).codes)
        learned = LearnedParameters(find_sites(model, recipe), device)
        networks = TorchNetwork(model, device), TorchNetwork(floats, device)
        words, fixed = other.words, other.feed.inputs[0].shape[0]
        dataset = read_into_memory(own, other, reporter)
        held, taught = _split_held_out(len(dataset), request)
        inputs = TrainingInputs(dataset, torch.device(device))
        outputs = _ordered_outputs(other.session, networks[0].outputs)
        distillation = Distillation.of(*networks, learned, inputs, taught, held, fixed, outputs)
        distillation = _add_labels(distillation, dataset, request)
        on_ort = recipe is None or TARGETS[recipe.target].on_ort
        return cls(model, packed, distillation, other.session, request.threads, on_ort, device, words)

    def judged(self, model: str | bytes) -> ValidationResult:
        """Score a file on the held-out images with ONNX Runtime."""
        session = Session(model, name="the quantized model", threads=self.threads, optimize=self.optimize)
        distillation, names, inputs = self.distillation, session.outputs, self.distillation.inputs
        comparison: ComparisonAccumulator | None = None
        right = places = pictures = 0
        distance = 0.0
        ((own, dtype, _),), ((its, _, _),) = session.inputs, self.teacher.inputs
        for part in distillation.parts(distillation.held, VALIDATION_BATCH):
            x = inputs.of(part)
            mine, theirs = to_arrays([inputs.for_student(x), inputs.for_teacher(x)])
            wanted, said = self.teacher.run(names, {its: theirs}), session.run(names, {own: mine.astype(dtype)})
            network = describe_outputs(self.teacher, {its: theirs}, wanted, names)
            comparison = comparison or ComparisonAccumulator.of(network)
            comparison.add(wanted, said)
            told = [[torch.from_numpy(np.asarray(array, np.float32)) for array in found] for found in (wanted, said)]
            hits, of = distillation.count_correct(part, *told)
            right, places, pictures = right + hits, places + of, pictures + len(part)
            distance += float(distillation_loss(distillation.kinds, *told)) * len(part)
        mark = ValidationScore(right / places if places else None, distance / pictures)
        assert comparison is not None  # some images are held out, always
        scores, heads = comparison.scores(spans=True), comparison.heads(spans=True)
        return ValidationResult(mark, Verification(len(distillation.held), scores, heads=heads))


def _write_better(setup: _TrainingSetup, source: Source, out: Path, found: FinetuneResult, best_step: int) -> None:
    """Write the trained file if it is better, else a copy of the input."""
    setup.distillation.learned.write(setup.model)
    told = {**found.request.as_dict(), "pictures": found.taught, "step": best_step}
    write_finetuning(setup.model, told)
    compress_constants(setup.model)
    if setup.packed:
        recipe = recipe_from_dict(read_recipe(setup.model.inner.metadata_props)) or Recipe()
        pack_codes(setup.model, recipe.oldest_runtime, recipe.packed_forms)
    with files.stage_model(setup.model, out) as staged:
        if best_step:
            files.check_staged_model(staged)
            found.after = setup.judged(str(staged.path))
            found.trained = found.after.mark.is_better(found.before.mark, found.before.mark)
        if found.trained:
            found.audit, found.bytes = _audit_file(Source(source.name, staged.path)), staged.size
            staged.commit(out)
            return
    assert source.path is not None
    found.audit, found.bytes = _audit_file(source), file_bytes(read_proto(source), source)
    storage.write_atomically(out, source.path.read_bytes())


def _audit_file(source: Source) -> Audit:
    return audit_file(source, threads=1, batch=None, size=None).audit


# -- before ------------------------------------------------------------------------------------------------------------


def _check_request(source: Source, teacher: Source, out: Path, request: FinetuneOptions) -> None:
    """Check the output path and the model before any work."""
    proto = read_proto(teacher)
    if is_quantized(proto):
        raise QconvError(f"{teacher.name} is quantized itself.", "pass the float model with --teacher.")
    storage.check_output_path(out)
    files = [path for path in (source.path, teacher.path, *external_data_files(proto, teacher)) if path is not None]
    storage.refuse_overwriting_inputs(out, [*files, *request.data.paths])
    if external_data_files(read_proto(source), source):
        fact = f"{source.name} keeps weights in another file."
        raise QconvError(fact, "training is for models of less than 2 GB in one file.")


def _require_same_outputs(own: ModelWithData, other: ModelWithData) -> None:
    missing = next((name for name in own.session.outputs if name not in other.session.outputs), None)
    if missing is not None:
        names = ", ".join(other.session.outputs)
        fact = f"{other.session.name} has no output {missing!r}, but {names}."
        raise QconvError(fact, "pass the float model that it was made from with --teacher.")


def _require_measures(names: Sequence[str], teacher: ModelWithData, request: FinetuneOptions) -> None:
    """Raise QconvError where a gate is on what these outputs of the float model do not have on the pictures."""
    batches = (feeds for feeds, _ in teacher.batches(Reporter(), lambda path: None))
    for feeds in batches:
        said = teacher.session.run(names, feeds)
        network = describe_outputs(teacher.session, feeds, said, names)
        require_measures(request, network)
        others = (teacher.session.run(names, more) for more in batches)
        require_boxes(request, network, itertools.chain([said], others))
        return


def _split_held_out(count: int, request: FinetuneOptions) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Count the images to hold out and to learn from; the order of the images is drawn already."""
    share = min(max(int(HELD_OUT_SHARE * count), min(LEAST_HELD_OUT, count // 4)), MOST_HELD_OUT)
    held = share if request.holdout is None else request.holdout
    if count < FEWEST_IMAGES or count - held < 1 or held < 1:
        fact = f"{count} pictures are too few to train on and to hold {held} back."
        raise QconvError(fact, f"pass {FEWEST_IMAGES} or more, or fewer to --holdout.")
    return np.arange(held), np.arange(held, count)


def _ordered_outputs(teacher: Session, names: Sequence[str]) -> tuple[ModelOutput, ...]:
    """What the outputs of the float model hold, in the order of the student's."""
    known = {output.name: output for output in teacher.model_outputs}
    return tuple(known[name] for name in names)


def _add_labels(distillation: Distillation, dataset: InMemoryDataset, request: FinetuneOptions) -> Distillation:
    if not request.labels:
        return distillation
    classes = find_classes(request.data, request.classes)
    asked = LabelOptions(request.label_offset, asked=True)
    return distillation.with_labels(labels_of(dataset.paths, request.data, classes, asked, distillation.classes))


def _fingerprint(
    source: Source, teacher: Source, dataset: InMemoryDataset, request: FinetuneOptions, device: str
) -> str:
    """Hash all that a run depends on, so that a checkpoint of another run is recognised."""
    found = hashlib.sha256()
    for part in (source, teacher):
        found.update(hash_model(part, external_data_files(read_proto(part), part)).encode())
    kept = (
        CHECKPOINT_FORMAT,
        request.as_dict(),
        request.holdout,
        device,
        dataset.prep,
        dataset.order,
        [path.name for path in dataset.paths],
    )
    found.update(repr(kept).encode())
    found.update(np.ascontiguousarray(dataset.numbers).data)
    return found.hexdigest()


# -- while it lasts ----------------------------------------------------------------------------------------------------


def _run_training(trainer: Trainer, kept: TrainingCheckpoint, reporter: Reporter) -> None:
    try:
        trainer.run(lambda done, total: reporter.progress("train", done, total), lambda: kept.write(trainer))
    except SystemExit:
        if kept.path.exists():
            reporter.warn("stopped: the same command goes on from the last round that was kept.")
        raise
