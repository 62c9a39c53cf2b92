"""This module finds out why a network loses accuracy and what mends it: causes with evidence, remedies carried out.

The preprocessing comes first, then the number of images, as nothing else can be told from the wrong ones; each that is
mended is the ground for what follows. Then the network is quantized as it was asked for and compared layer by layer
(`compare`); `causes` reads that, `remedies` says what may help, and every remedy goes through the whole pipeline by
itself, those that gain once more together. All are scored on held-out images.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qconv import storage
from qconv.analysis import causes
from qconv.analysis.causes import FEW_IMAGES, GENERALIZATION_GAP_DB, MANY_IMAGES, DiagnosisEvidence
from qconv.analysis.compare import ComparisonRequest, ComparisonRun, compare
from qconv.analysis.recommendation import PLENTY_DB, choose_trial, describe_cost, describe_trial, leaves_most_in_float
from qconv.analysis.remedies import (
    ENOUGH,
    POOR,
    REPEATABLE_FIELDS,
    Remedy,
    find_remedies,
    format_options,
    join_changes,
    merge_changes,
    suggest_more_bits,
    suggest_more_effort,
    try_request,
)
from qconv.analysis.trials import HeldOutImages, TrialRun, TrialRunner, hold_out_images, open_held_labels
from qconv.config import serialization
from qconv.config.choices import GATE_OPTIONS, option_name
from qconv.config.data_options import LABEL_OPTIONS, PRESETS, DataOptions, Preprocessing, PreprocessingOptions
from qconv.config.recipe import make_request
from qconv.config.serialization import format_option
from qconv.data.autodetect import CERTAIN_MARGIN, SHAPE_OPTIONS, detect_preprocessing, is_same_preprocessing
from qconv.data.label_files import NAME_IMAGES
from qconv.data.loader import DataLoader
from qconv.data.model_with_data import ModelWithData
from qconv.errors import QconvError, format_count
from qconv.ir import load
from qconv.ir import metadata as ir_metadata
from qconv.ir.files import Source, file_bytes, metadata_of, read_proto, refuse_quantized
from qconv.ir.original import open_original
from qconv.pipeline.collect import CalibrationCache
from qconv.pipeline.prepare import prepare
from qconv.reporter import Reporter
from qconv.results.comparison import Cause, Comparison, Diagnosis
from qconv.results.scores import SHARE, value_of
from qconv.results.trials import LEAST_GAIN_DB, Trial
from qconv.runtime.benchmark import detect_cpu
from qconv.runtime.session import Session

LEAST_GAIN_OF_BITS_DB = 3.0
"""Gain that more bits than were asked for must have to be mentioned."""


@dataclass(frozen=True, slots=True)
class DiagnosisRequest:
    """What is to be diagnosed.

    Attributes:
        source: The float model.
        asked: Fields of the Recipe as they were given, before any of them follows from others.
        images: Images to score on; empty: held out from the calibration images.
        layer_bits: The file that asked["layer_bits"] was read from, for the command that is recommended.
    """

    source: Source
    asked: Mapping[str, Any]
    images: tuple[str, ...] = ()
    layer_bits: str | None = None


@dataclass(frozen=True, slots=True)
class DiagnosisRun:
    """A diagnosis. looked: the comparison of the recipe that remedies were measured against."""

    diagnosis: Diagnosis
    looked: ComparisonRun


def diagnose(case: DiagnosisRequest, reporter: Reporter | None = None) -> DiagnosisRun:
    """Find what costs accuracy and what mends it. Raises QconvError for anything that the user can mend."""
    reporter = (reporter or Reporter()).of_part()
    proto = read_proto(case.source)
    refuse_quantized(proto, case.source.name)
    size = file_bytes(proto, case.source)
    del proto
    with storage.scratch_folder(8 * size) as folder:
        return _DiagnosisRunner(case, reporter, folder, size).diagnosis()


@dataclass(frozen=True, slots=True, eq=False)
class _RemedyAttempt:
    """A trial, the fields of its recipe, and how they differ from those asked for."""

    made: TrialRun
    fields: Mapping[str, Any]
    remedy: Remedy

    @property
    def trial(self) -> Trial:
        return self.made.trial


@dataclass(slots=True)
class _DiagnosisRunner:
    """One diagnosis.

    Attributes:
        float_bytes: Of the float model.
        found: Causes so far.
        attempts: Trials so far, first that of the recipe asked for.
        changes: What mends the images, on top of which all else is tried.
    """

    case: DiagnosisRequest
    reporter: Reporter
    folder: Path
    float_bytes: int
    cache: CalibrationCache = field(default_factory=CalibrationCache)
    found: list[Cause] = field(default_factory=list)
    attempts: list[_RemedyAttempt] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)

    def diagnosis(self) -> DiagnosisRun:
        asked = {**self.case.asked, **dict.fromkeys(GATE_OPTIONS)}
        recipe, data = make_request(asked)
        session = open_original(self.case.source, recipe.threads, data.tasks)
        held = hold_out_images(session, data, self.case.images, self.reporter)
        opened = open_held_labels(data, held, self.reporter, self.case.images, NAME_IMAGES)
        asked |= dict.fromkeys(LABEL_OPTIONS)  # runs measure nothing by them: their files are scored here
        asked["samples"] = min(data.samples or held.most, held.most)
        recipe, data = make_request(asked)
        rather = self._feed(session, held.feed, data, recipe.threads)
        said = held.feed.over(held.feed.listing.paths)
        held.feed.preprocessing = rather or said.preprocessing
        proof = TrialRunner.of(self.case.source, held.feed, session, self.reporter, self.cache, opened)
        if rather is not None:
            proof.feed_otherwise(said)
        base = self._try(proof, asked, Remedy("as asked", {}, ()))
        if base.made.failure is not None:
            raise base.made.failure
        if not base.trial.scores:
            fact = f"The outputs of {self.case.source.name} cannot be compared, so that nothing tells what helps."
            raise QconvError(fact, "pass --labels, or a model that ends where the data select what it returns.")
        proof.reporter = self.reporter.without_warnings()  # the others would warn of the same
        if rather is not None:
            proof.feed_otherwise(held.feed)
            changes = {"preprocessing": _to_preprocessing_options(rather, data.preprocessing)}
            mend = Remedy("fed as in training", changes, ("preprocessing",))
            base = self._mended(proof, asked, base, mend, always=True)
        base = self._enough_pictures(proof, asked, base, held)
        compared = self._remedies(proof, asked, base)
        proof.reporter = self.reporter
        float_ms = proof.timed(recipe.threads, held.feed.size)
        best = self._best(base)
        found = Diagnosis(
            model=self.case.source.name,
            pictures=proof.scored.pictures,
            unseen=held.unseen,
            causes=tuple(self.found),
            trials=tuple(attempt.trial for attempt in self.attempts),
            best=best.trial,
            recommended=self._command(best),
            conclusion=self._conclusion(best) + describe_cost(best.trial, self.float_bytes),
            float_ms=float_ms,
            float_bytes=self.float_bytes,
            given=proof.scored.given,
            warnings=self.reporter.warnings,
        )
        own, other = (ModelWithData(model, held.feed, compared.words) for model in (session, base.made.open()))
        return DiagnosisRun(found, ComparisonRun(compared, own, other))

    # -- pictures ------------------------------------------------------------------------------------------------------

    def _feed(self, session: Session, feed: DataLoader, data: DataOptions, threads: int | None) -> Preprocessing | None:
        """Set the preprocessing that the options say. Returns what the evidence says instead, where it is certain."""
        model, _ = load.load(read_proto(self.case.source), self.case.source)
        said = data.preprocessing
        calibration = DataLoader.of(session, data, Reporter())
        own = detect_preprocessing(model, session, calibration, said, threads=threads)
        feed.preprocessing = calibration.preprocessing = own.preprocessing
        freely = PreprocessingOptions(**{name: getattr(said, name) for name in SHAPE_OPTIONS})
        if own.preprocessing is None or freely == said:
            return None
        calibration = DataLoader.of(session, replace(data, preprocessing=freely), Reporter())
        found = detect_preprocessing(model, session, calibration, freely, threads=threads)
        if (
            not found.evident
            or found.preprocessing is None
            or is_same_preprocessing(own.preprocessing, found.preprocessing)
        ):
            return None
        asks = " ".join(format_option("preprocessing", _to_preprocessing_options(found.preprocessing, said)))
        sure = own.against or (found.margin or 0.0) >= CERTAIN_MARGIN
        told = "and not for the options given" if sure else "rather than for the options given, without being certain"
        self.found.append(Cause("preprocessing", ("the pictures",), f"the model speaks for {asks}, {told}"))
        return found.preprocessing if sure else None

    def _enough_pictures(
        self, proof: TrialRunner, asked: Mapping[str, Any], base: _RemedyAttempt, held: HeldOutImages
    ) -> _RemedyAttempt:
        """Find out whether there are few images, or others lose much more than those of the calibration."""
        used, report = asked["samples"], base.made.report
        fitted = report is not None and not report.verify.held_back
        seen, unseen = report.verify.sqnr_db if report is not None and fitted else None, base.trial.sqnr_db
        gap = seen - unseen if held.unseen and seen is not None and unseen is not None else 0.0
        if used >= FEW_IMAGES and (gap < GENERALIZATION_GAP_DB or used >= MANY_IMAGES):
            return base
        what = f"{format_count(used, 'picture')} to calibrate with"
        if gap >= GENERALIZATION_GAP_DB:
            what += f": SQNR is {seen:.1f} dB on them and {unseen:.1f} dB on others"
        more = min((DataOptions().samples or 0), held.most)
        if more <= used:
            what += "; there are no more here, so add some of the kind that the network will see"
        self.found.append(Cause("few-pictures", ("the pictures",), what))
        if more <= used:
            return base
        return self._mended(proof, asked, base, Remedy("more pictures", {"samples": more}, ("few-pictures",)))

    def _mended(
        self,
        proof: TrialRunner,
        asked: Mapping[str, Any],
        base: _RemedyAttempt,
        remedy: Remedy,
        *,
        always: bool = False,
    ) -> _RemedyAttempt:
        """Try a remedy; return the fields with it, where it helps or is right in any case."""
        attempt = self._try(proof, asked, remedy)
        failed = attempt.made.failure is not None
        if failed or not (always or attempt.trial.gain_over(base.trial) >= LEAST_GAIN_DB):
            return base
        self.changes |= remedy.changes
        return attempt

    # -- the network ---------------------------------------------------------------------------------------------------

    def _remedies(self, proof: TrialRunner, asked: Mapping[str, Any], base: _RemedyAttempt) -> Comparison:
        """Find causes in the network and try what mends them. Returns the network layer by layer."""
        evidence = self._evidence(proof, base)
        self.found += causes.find_causes(evidence)
        gaining: list[tuple[tuple[float, float], Remedy]] = []

        def attempt(tried: Iterable[Remedy]) -> None:
            for remedy in tried:
                request = try_request(base.fields, remedy.changes)
                known = [(attempt.made.recipe, attempt.made.data) for attempt in self.attempts]
                if request is not None and request not in known:
                    trial = self._try(proof, asked, remedy).trial
                    gains = trial.gain_over(base.trial) >= LEAST_GAIN_DB
                    if gains and not (remedy.undoes or leaves_most_in_float(trial)):
                        gaining.append((trial.rank, remedy))

        worth_it = [cause for cause in self.found if cause.kind != "layer" or is_short_of(self._so_far, ENOUGH)]
        attempt(find_remedies(worth_it, evidence))
        if is_short_of(self._so_far, ENOUGH):
            attempt(suggest_more_effort(evidence.recipe))
        ranked = [remedy for _, remedy in sorted(gaining, key=lambda pair: pair[0], reverse=True)]
        if len(ranked) > 1:
            attempt([_combine_remedies(ranked)])
        if is_short_of(self._so_far, POOR):
            best = max(self.attempts, key=lambda known: (not known.remedy.undoes, known.trial.rank))
            so_far = {} if best is base else best.remedy.changes
            more = suggest_more_bits(best.made.recipe)
            attempt(Remedy(remedy.name, join_changes(so_far, remedy.changes), remedy.causes) for remedy in more)
        return evidence.compared

    @property
    def _so_far(self) -> Trial:
        """The most accurate trial that keeps the bits that were asked for, and quantizes most where one does."""
        able = [known.trial for known in self.attempts if not self._gives_up_bits(known)]
        return max(able, key=lambda trial: (not leaves_most_in_float(trial), trial.rank))

    def _try(self, proof: TrialRunner, asked: Mapping[str, Any], remedy: Remedy) -> _RemedyAttempt:
        """Carry a remedy out, on top of what mends the images. Its options are those to add to the given ones."""
        changes = join_changes(self.changes, remedy.changes)
        fields = merge_changes(asked, changes)
        out = self.folder / f"{len(self.attempts)}.onnx"
        made = proof.carry_out(remedy.name, *make_request(fields), out, format_options(changes), remedy.causes)
        self.attempts.append(_RemedyAttempt(made, fields, remedy))
        return self.attempts[-1]

    def _evidence(self, proof: TrialRunner, base: _RemedyAttempt) -> DiagnosisEvidence:
        """Collect all that causes are found from, of the run that remedies are measured against."""
        source, recipe, report = self.case.source, base.made.recipe, base.made.report
        assert report is not None
        quiet = self.reporter.without_warnings()
        found = prepare(source, recipe, base.made.data, quiet, cache=self.cache, hold_back=True)
        sketches = found.data.sketches(found.model, [found.plan], recipe)
        quantized = Source(str(base.made.path), base.made.path)

        def feeds() -> Iterator[Any]:
            return ((batch, batch) for batch, _ in proof.scored.batches)

        request = ComparisonRequest(
            source,
            quantized,
            feeds,
            proof.scored.pictures,
            found.data.description,
            recipe.threads,
            found.data.data.tasks,
        )
        compared = compare(request, self.reporter)
        equalization = ir_metadata.read_equalization(metadata_of(read_proto(quantized)))
        saturates = detect_cpu().saturates is True
        return DiagnosisEvidence(found.model, found.plan, recipe, report, sketches, equalization, compared, saturates)

    # -- what comes of it ----------------------------------------------------------------------------------------------

    def _best(self, base: _RemedyAttempt) -> _RemedyAttempt:
        """Choose what to recommend: no remedy that shows what a default is worth, or gives up what was asked for."""
        tried = self.attempts[self.attempts.index(base) + 1 :]
        wanted = [known for known in tried if not (known.remedy.undoes or self._gives_up_bits(known))]
        best = choose_trial(base.trial, [known.trial for known in wanted])
        return next(known for known in (base, *wanted) if known.trial is best)

    def _gives_up_bits(self, attempt: _RemedyAttempt) -> bool:
        """Whether a trial takes 8 bits or more where fewer were asked for, which a user has reasons for."""
        asked, got = self.attempts[0].made.recipe, attempt.made.recipe
        pairs = ((asked.weight_bits, got.weight_bits), (asked.activation_bits, got.activation_bits))
        return any(wish < min(8, bits) for wish, bits in pairs)

    def _command(self, best: _RemedyAttempt) -> str:
        """Compose the command to type, with the user's images and paths."""
        asked, fields = self.case.asked, dict(best.fields)
        if "samples" not in self.changes:
            fields["samples"] = asked.get("samples", (DataOptions().samples or 0))
        calib = [word for place in asked["calib"] for word in ("--calib", place)]
        recipe, data = make_request(fields)
        said = serialization.command_line_options(recipe.as_dict(data))
        if self.case.layer_bits is not None:
            said += ["--layer-bits", self.case.layer_bits]
        labels = () if self.case.images else LABEL_OPTIONS  # those of other pictures, which quantize does not take
        steering = [
            word for name in ("decode", *labels, "batch", "threads") for word in _format_given_option(name, asked)
        ]
        return shlex.join(["qconv", "quantize", self.case.source.name, *calib, *said, *steering])

    def _conclusion(self, best: _RemedyAttempt) -> str:
        first, trial = self.attempts[0].trial, best.trial
        got = describe_trial(trial)
        if best is self.attempts[0]:
            if not is_short_of(trial, ENOUGH):
                open_causes = self._but()
                verdict = "Quantization needs no mending" if open_causes else "Nothing needs mending"
                return f"{verdict}: {got}.{open_causes}"
            worst = next((cause for cause in self.found if not (cause.handled or cause.harmless)), None)
            likely = "" if worst is None else f" The most likely cause: {worst.kind}, {worst.what}."
            return f"No remedy that was tried is worth its cost: {got}.{self._but() or likely}"
        gained = []
        if first.lost is not None and trial.lost is not None and round(100 * (first.lost - trial.lost), 1):
            gained.append(f"{100 * (first.lost - trial.lost):+.1f} points")
        if trial.sqnr_db is not None and first.sqnr_db is not None:
            gained.append(f"{trial.sqnr_db - first.sqnr_db:+.1f} dB")
        more = f", {' and '.join(gained)} beside what was asked for" if gained else ""
        others = [score for score in first.scores if score.unit == SHARE and score.metric != first.ranked_by]
        for score in others:
            was, now = score.value, value_of(trial.scores, score.metric)
            if was is not None and now is not None and score.metric.lost(was, now) > 0:
                more += f", whose {score.in_words(f'{score.metric.label} was {{}}')}, which may be chance"
        return f"Best is {trial.name}: {got}{more}.{self._but()}"

    def _but(self) -> str:
        """Describe what no recommended remedy takes care of."""
        kinds = {cause.kind for cause in self.found}
        told = ""
        if "preprocessing" in kinds and "preprocessing" not in self.changes:
            told += " Find out how the network was fed in training: both models got what the options say."
        if "few-pictures" in kinds and "samples" not in self.changes:
            told += " More pictures would tell more."
        richer = [attempt.trial for attempt in self.attempts if self._gives_up_bits(attempt)]
        most = max(richer, key=lambda trial: trial.rank, default=None)
        if most is not None and most.gain_over(self._so_far, PLENTY_DB) >= LEAST_GAIN_OF_BITS_DB:
            told += f" With more bits than were asked for: {describe_trial(most)} ({most.typed})."
        return told


def is_short_of(trial: Trial, wish: tuple[float, float]) -> bool:
    """Whether a trial has less SQNR, or has surely lost more of what its task is judged by. wish: dB, and a share."""
    decibel, share = wish
    return trial.noise_db < decibel or trial.surely_lost > share


def _combine_remedies(ranked: Sequence[Remedy]) -> Remedy:
    """Combine as many remedies as do not contradict each other, the best ones first."""
    changes: dict[str, Any] = {}
    kinds: list[str] = []
    for remedy in ranked:
        if not (changes.keys() & remedy.changes.keys()) - REPEATABLE_FIELDS:
            changes = join_changes(changes, remedy.changes)
            kinds += remedy.causes
    return Remedy("these together", changes, tuple(dict.fromkeys(kinds)))


def _to_preprocessing_options(fed: Preprocessing, said: PreprocessingOptions) -> PreprocessingOptions:
    """Return options that give the pixel values of `fed`; the rest as it was said."""
    preset = PRESETS[fed.preset]
    swapped = fed.color is not preset.color and fed.channels == 3
    mean, std = (numbers[::-1] if swapped else numbers for numbers in (preset.mean, preset.std))
    return replace(
        said,
        preset=fed.preset,
        color=fed.color,
        scale=None if fed.scale == preset.scale else fed.scale,
        mean=None if fed.mean == mean else fed.mean,
        std=None if fed.std == std else fed.std,
    )


def _format_given_option(name: str, asked: Mapping[str, Any]) -> tuple[str, ...]:
    value = asked.get(name)
    return (
        ()
        if value is None or value == (DataOptions().batch if name == "batch" else None)
        else (option_name(name), str(value))
    )
