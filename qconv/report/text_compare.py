"""Formats what `compare` finds as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qconv.errors import format_count, format_some
from qconv.report.text import format_columns, shorten_path, wrap_text
from qconv.results.comparison import Comparison, LayerComparison
from qconv.results.quantize import OutputScore
from qconv.results.scores import BOXES, FLOAT_MAP, FLOAT_MIOU, SQNR, find_score, worst_scores

MOST_LAYERS = 20

HALF_OF_ERROR = 0.5

OF_TASKS = (BOXES, FLOAT_MAP, FLOAT_MIOU)
"""What detectors and segmenters are judged by, beside the float model."""


def format_comparison(found: Comparison, *, verbose: bool) -> str:
    """Format a comparison: the layers, those first that cost most at the outputs."""
    lines = [wrap_text(f"{found.model} beside {found.float_model}: {format_count(found.images, 'picture')}")]
    lines += [wrap_text(found.words)] if found.words else []
    lines += ["", wrap_text(_describe_outputs(found)), *map(wrap_text, _describe_tasks(found.outputs)), ""]
    rows = found.worst_first if verbose else found.worst_first[:MOST_LAYERS]
    cells = [
        ("part of", "own", "as it", "", "codes", "beyond", ""),
        ("error", "dB", "runs dB", "cosine", "used", "range", "layer"),
    ]
    lines.append(format_columns([*cells, *map(_layer_cells, rows)], "rrrrrrl"))
    if len(rows) < len(found.layers):
        lines.append(f"and {len(found.layers) - len(rows)} more: -v shows all")
    most = _describe_worst_layers(found)
    lines += [""] + ([wrap_text(most)] if most else [])
    told_of = "The float model has no tensor for {}: not compared.", "In bodies, float and not compared: {}."
    for told, names in zip(told_of, (found.unmatched, found.inside), strict=True):
        lines += [wrap_text(told.format(format_some(names)))] if names else []
    return "\n".join(lines).rstrip()


def _describe_outputs(found: Comparison) -> str:
    """How near the outputs are, and what the layers' own errors come to at them."""
    worst = worst_scores(output.scores for output in found.outputs)
    got = "equal" if found.sqnr_db is None else f"{found.sqnr_db:.1f} dB"
    told, place = f"SQNR of the outputs: {got}.", ""
    if not worst:
        told = "No output could be compared."
    elif find_score(worst, SQNR) is None:  # whole numbers, such as classes, have no noise
        told = f"{worst[0].metric.label.capitalize()} of the outputs: {worst[0].metric.format(worst[0].value, 2)}."
        place = ", in front of the whole numbers"
    sum_of = "equal" if found.predicted_db is None else f"{found.predicted_db:.1f} dB"
    added = f"The layers' own errors, each by itself and added up{place}: {sum_of}, on "
    return f"{told} {added}{format_count(found.predicted_on, 'picture')}."


def _describe_tasks(outputs: Iterable[OutputScore]) -> Iterator[str]:
    """Yield a line for each output with parts, or with boxes or a map of classes, of which SQNR says little."""
    for output in outputs:
        told = [score for score in output.scores if score.metric in OF_TASKS and score.value is not None]
        words = [score.in_words(score.metric.sentence) for score in told] + [part.in_words for part in output.parts]
        if words:
            yield f"{output.name}: {', '.join(words)}."


def _layer_cells(row: LayerComparison) -> tuple[str, ...]:
    values = row.values
    used, beyond = ("", "") if values is None else (f"{values.range_use:.0%}", f"{values.clipped:.2%}")
    share, cosine = (
        "" if number is None else f"{number:{how}}" for number, how in ((row.output_share, ".1%"), (row.cosine, ".4f"))
    )
    return (
        share,
        _format_decibel(row.added_sqnr_db),
        _format_decibel(row.sqnr_db),
        cosine,
        used,
        beyond,
        shorten_path(row.name),
    )


def _format_decibel(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"


def _describe_worst_layers(found: Comparison) -> str:
    """Describe how few layers make half of the error."""
    total = 0.0
    for count, row in enumerate(found.worst_first, 1):
        total += row.output_share or 0.0
        if total >= HALF_OF_ERROR:
            verb = "makes" if count == 1 else "make"
            return (
                f"{count} of {format_count(len(found.layers), 'layer')} {verb} {total:.0%} of the error at the outputs."
            )
    return ""
