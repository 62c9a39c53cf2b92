"""These checks warn of options without effect and of odd tensors, refuse unsafe places and models without layers, and
run the written file.

An odd tensor is all zero, constant or vanishingly small on the calibration data: it may differ on other images, and
then its range is a matter of luck.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from qconv import storage
from qconv.auditing.audit import PlannedReasons, audit, profile_nodes
from qconv.calibration.sketch import Sketch
from qconv.config.choices import option_name
from qconv.config.recipe import Recipe
from qconv.config.targets import Target
from qconv.data.loader import DataLoader
from qconv.errors import Finding, QconvError, Skipped, format_some
from qconv.ir import files
from qconv.ir.chance import describe_random_nodes
from qconv.ir.data_shapes import find_data_dependent
from qconv.ir.fast_pools import is_window
from qconv.ir.files import Source
from qconv.ir.model import Model, dims
from qconv.ir.original import open_original
from qconv.ir.packed_codes import NOTHING_TO_PACK, describe_packing, iter_codes, pack_codes
from qconv.metrics.comparison import describe_differing_runs, verify
from qconv.pipeline.collect import CalibrationData
from qconv.planning.eligibility import may_become_nbits
from qconv.planning.plan import Plan
from qconv.planning.planner import KEPT_FLOAT_BY_OPTION, is_quantizable_layer
from qconv.quantizer import SMALLEST_SCALE
from qconv.reporter import Reporter
from qconv.results.precision import FOR_ACCURACY
from qconv.results.quantize import Audit, OutputScore, Verification
from qconv.results.scores import AGREEMENT, BOXES
from qconv.runtime.session import Session
from qconv.search.candidate import QuantizationSolution


def warn_of_unmatched_options(model: Model, recipe: Recipe, reporter: Reporter) -> None:
    """Warn of options that no node meets: a misspelt name or type keeps nothing float."""
    names = [node.name or "" for node in model.nodes()]
    types = {node.op_type for node in model.nodes()}
    for pattern in recipe.keep_float:
        if not fnmatch.filter(names, pattern):
            reporter.warn(f"--keep-float {pattern} matches no node of the folded model.")
    layers = {node.name or "" for node in model.nodes() if is_quantizable_layer(node)}
    left = set(names)
    for pattern, bits in recipe.layer_bits:
        kind, known = ("node", left) if bits.names_any_node else ("layer", left & layers)
        if not any(fnmatch.fnmatchcase(name, pattern) for name in (names if bits.names_any_node else layers)):
            reporter.warn(f"--layer-bits: {pattern!r} matches no {kind} of the folded model.")
        elif not any(fnmatch.fnmatchcase(name, pattern) for name in known):
            reporter.warn(
                f"--layer-bits: {pattern!r} matches no {kind} that a line above it does not: exceptions stand first."
            )
        left -= {name for name in left if fnmatch.fnmatchcase(name, pattern)}
    for op_type in recipe.keep_float_op:
        if op_type not in types:
            reporter.warn(f"--keep-float-op {op_type}: the folded model has no such operator.")
    if recipe.allow_matmul_nbits and not any(map(may_become_nbits, model.nodes())):
        why = "ONNX Runtime makes MatMulNBits of MatMul, and of Gemm without transB, and the folded model has none"
        reporter.warn(f"--allow-matmul-nbits changes nothing: {why}.")


def warn_of_vain_keep_float(plan: Plan, audited: Audit, reporter: Reporter) -> None:
    """Warn of --keep-float in vain: what only moves or cuts values works on whatever its neighbours are."""
    found = {island.node for island in (*audited.islands, *audited.placed)}
    # an activation takes over the wish for the layer that it is fused into
    found |= {name for name, layer in plan.activation_of.items() if layer in plan.kept}
    vain = [name for name, kept in plan.kept.items() if kept.why.startswith(KEPT_FLOAT_BY_OPTION) and name not in found]
    if vain:
        named = format_some(vain, 1)
        reporter.warn(f"--keep-float changes nothing for {named}: it runs as its neighbours do, or not at all.")


def pack_written(model: Model, recipe: Recipe, reporter: Reporter) -> tuple[Model, list[Finding]]:
    """A quantized network as it is written: itself, or a copy with packed codes, which nothing else here reads."""
    if not recipe.pack:
        return model, []
    written = model.copy()
    packed = pack_codes(written, recipe.oldest_runtime, recipe.packed_forms)
    if not packed:
        reporter.warn(f"--pack changes nothing: {NOTHING_TO_PACK}.")
        return written, []
    whole = {found.codes.name or "": codes.size for node, found, codes in iter_codes(written) if not is_window(node)}
    edges = f", first and last by --edge-bits {recipe.edge_bits}" if recipe.edge_bits > recipe.weight_bits else ""
    return written, describe_packing(packed, whole, edges)


def warn_of_uncorrected_biases(solution: QuantizationSolution, recipe: Recipe, reporter: Reporter) -> None:
    """Warn where no bias is corrected: an exporter may have folded all that BatchNormalization could tell of means."""
    unknown = sum(isinstance(finding, Skipped) and finding.step == "bias" for finding in solution.findings)
    if recipe.bias_correction == "analytic" and unknown == len(solution.plan.layers):
        instead = "" if recipe.data_free else "; the pictures do with --bias-correction measured"
        none = "--bias-correction analytic corrects no layer"
        reporter.warn(f"{none}: none reads what a BatchNormalization tells the mean of{instead}.")


def require_layers(plan: Plan, source: Source) -> None:
    """Raise QconvError where nothing would be quantized."""
    if not plan.layers:
        raise QconvError(
            f"{source.name} has nothing to quantize: no Conv, Gemm or MatMul with constant weights is left.",
            "check --keep-float and --keep-float-op, and that the model is a network with weights.",
        )


ROUNDING_TOLERANCE = 1e-5
"""Relative error of a sum of float32 numbers, about."""


def find_tensors_of_pictures(model: Model) -> set[str]:
    """The names of the tensors that show what pictures hold: no zero state of an LSTM, and none without elements."""
    return {value.name or "" for value in find_data_dependent(model) if 0 not in (dims(value) or ())}


def find_odd_tensors(sketches: Mapping[str, Sketch], of_pictures: Collection[str]) -> list[str]:
    """A warning for each kind of oddity, naming the first tensor that shows it.

    sketches: by the tensors' names. of_pictures: those that depend on pictures; others are what they are.
    """
    found: dict[str, list[str]] = {}
    for name, sketch in sketches.items():
        what = _describe_oddity(sketch) if name in of_pictures else ""
        if what:
            found.setdefault(what, []).append(name)
    return [
        f"tensor {names[0]!r}{f' (and {len(names) - 1} more)' if len(names) > 1 else ''} {what}: "
        "check that they and the preprocessing are what the network was made for."
        for what, names in found.items()
    ]


def _describe_oddity(sketch: Sketch) -> str:
    largest = max(abs(sketch.low), abs(sketch.high))
    if largest == 0:
        return "is zero everywhere on these pictures"
    if largest < SMALLEST_SCALE:
        return "holds numbers too small for float32 on these pictures, and becomes zero"
    if sketch.low == sketch.high or _is_constant(sketch):
        return "is one and the same number everywhere on these pictures"
    return ""


def _is_constant(sketch: Sketch) -> bool:
    """Whether the mean of each channel is its largest value, and that is the same in all. The low may be unseen."""
    high = sketch.high
    return bool(
        sketch.count
        and (sketch.highs == high).all()
        and (np.abs(sketch.means - high) <= ROUNDING_TOLERANCE * abs(high)).all()
    )


def places_of(recipe: Recipe, place: Path | None) -> dict[str, Path]:
    """All places that a run writes, by what they are for."""
    written = {} if place is None else {"the output": place}
    for option in ("save_stats", "save_layer_bits"):
        if getattr(recipe, option) is not None:
            written[option_name(option)] = Path(getattr(recipe, option))
    return written


def check_places(source: Source, data: set[Path], written: Mapping[str, Path], read: Sequence[str]) -> None:
    """Refuse to write two files at one place, or over anything that is read.

    data: the model's own data files. written: places, by what they are for. read: images, lists of them, statistics.
    """
    for path in written.values():
        check_output(source, path, data)
    for (one, path), (other, same) in itertools.combinations(written.items(), 2):
        if path.resolve() == same.resolve():
            raise QconvError(f"{path} is both {one} and {other}.", "choose two names.")
    for path in written.values():
        storage.refuse_overwriting_inputs(path, read)


def check_output(source: Source, out: Path, data: set[Path]) -> None:
    """Refuse to write over what is read. data: the model's own data files."""
    storage.check_output_path(out)
    for path in (source.path, *data):
        if path is not None and out.exists() and path.exists() and out.samefile(path):
            what = "the model itself" if path == source.path else "a data file of the model"
            raise QconvError(f"The output {out} is {what}.", "choose another output with -o.")


POOR_LOSS = 0.05
"""What may be lost by labels without a warning."""

SLOWER_FACTOR = 1.05
"""Times of the float model from which on a result is called slower: less is noise."""


def advise(effort: str) -> str:
    """What to do about a result that is far from the float model. effort: that was made."""
    more = "--effort balanced may do better, and " if effort == "fast" else ""
    return f"; {more}`qconv diagnose` with the same options tells why"


def warn_of_result(checked: Verification, sizes: tuple[int, int], advice: str, reporter: Reporter) -> None:
    """Warn of odd outputs, of a result that is of no use, and of one slower or larger than the float model.

    sizes: bytes of the float model's files, and of the result's. advice: ends what is said of a poor result; may be
    empty.
    """
    for output in checked.outputs:
        if output.remark:
            reporter.warn(f"output {output.name}: {output.remark}.")
    if any(score.metric == BOXES and score.value is None for score in checked.scores):
        reporter.warn("the float model shows no box on these pictures, so that none can be compared.")
    # a few pictures between two classes move an agreement, which says little beside other measures
    decisive = [score for score in checked.scores if score.metric != AGREEMENT] or list(checked.scores)
    labelled = checked.labelled
    if labelled is not None and labelled.pair is not None and labelled.lost is not None:
        before, after = labelled.pair
        if after < before / 2:
            reporter.warn(f"little is left of the float model: {labelled.in_words}{advice}.")
        elif labelled.lost > POOR_LOSS:
            reporter.warn(f"the result is far from the float model: {labelled.in_words}{advice}.")
    elif any(score.is_useless for score in checked.scores):
        reporter.warn(f"little is left of the float model: {checked.in_words}{advice}.")
    elif any(score.is_poor for score in decisive):
        reporter.warn(f"the result is far from the float model: {checked.in_words}{advice}.")
    if checked.is_slower_by(SLOWER_FACTOR):
        reporter.warn(f"the quantized model ran {checked.slowdown_in_words} as long as the float one on this machine.")
    before, after = sizes
    if after > before:
        reporter.warn(f"the quantized model is larger than the float one: {after:,} bytes for {before:,}.")


def warn_of_all_float(audited: Audit, target: Target, reporter: Reporter) -> None:
    """Warn of a result of which accuracy has left nothing in integers, as far as ONNX Runtime's audit tells."""
    if target.on_ort and not audited.integer and any(FOR_ACCURACY in node.why for node in audited.placed):
        what = "for accuracy nothing runs in integers: the file is smaller than the float model, and no faster"
        reporter.warn(f"{what}; --float-budget 0 takes the fastest division.")


def audit_staged(staged: files.StagedModel, model: Model, known: PlannedReasons, feed: DataLoader | None) -> Audit:
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
        feeds = None if feed is None else next(iter(feed.iter_cached("verify")), None)
        return audit(optimized, model, known, None if feeds is None else profile_nodes(session, feeds))


def verify_staged(
    staged: files.StagedModel, original: Session, recipe: Recipe, pictures: CalibrationData, target: Target
) -> Verification:
    """The written file, before it gets its name, against the float model's outputs.

    For another runtime it is run node by node, as the standard defines it, and its time tells nothing. On made-up
    pictures it is run to see that it gives numbers; how near these are tells nothing, either.
    """
    feed = pictures.runnable_loader
    if feed is None:
        return Verification(0, ())
    quantized = Session(str(staged.path), name="the quantized model", threads=recipe.threads, optimize=target.on_ort)
    whole = recipe.is_gated or pictures.labels is not None
    batches = feed.iter_batches("verify") if whole else feed.iter_first("verify")
    found = verify(original, quantized, batches, feed.as_float, pictures.labelled_batches(feed))
    if pictures.data_free_statistics is not None:
        odd = (OutputScore(o.name, (), o.remark, o.kind) for o in found.outputs if o.remark)
        found = Verification(0, tuple(odd), found.slowdown, found.slowdown_range)
    # a network with a batch of its own may have seen some twice
    found = replace(found, images=min(found.images, feed.pictures), held_back=pictures.held is not None)
    return found if target.on_ort else replace(found, slowdown=None, slowdown_range=None)


def warn_of_chance(
    model: Model, source: Source, feed: DataLoader | None, original: Session, recipe: Recipe, reporter: Reporter
) -> None:
    """Say by how much the float model differs from itself, where it draws at random.

    model: loaded. source: the user's own model, which `original` runs. feed: what it is run on; None for nothing.
    """
    what = describe_random_nodes(model)
    if what and feed is not None:
        plain = partial(open_original, source, recipe.threads, optimize=False)
        differing = describe_differing_runs(what, original, plain, map(feed.as_float, feed.iter_cached("verify")))
        if differing:
            reporter.warn(differing)
