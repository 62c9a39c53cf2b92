"""This module renders a report page as one HTML file that opens offline; it is the only user of jinja2 and plotly.

Style, script, plotly.js, data as JSON and images as data URLs are inside. A content security policy forbids every
request. The same page gives the same bytes. Charts are drawn by report.js from the numbers of `_chart_data`. No name is
trusted: nodes and files may be called anything, `</script>` included.
"""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from typing import Any, Literal

from qconv.errors import QconvError, format_bytes, format_count
from qconv.report.text import format_trial_gain, format_trial_value
from qconv.results.comparison import Comparison, Diagnosis, LayerComparison, Sweep, ValueStatistics
from qconv.results.precision import PrecisionReport
from qconv.results.quantize import Audit, FloatNode, group_float_nodes
from qconv.results.sample_curve import SampleCurve, Spread
from qconv.results.scores import SHARE, Metric, find_score, format_value
from qconv.results.training import SynthesisResult
from qconv.results.trials import Trial, list_trial_metrics

Tone = Literal["good", "bad", "plain"]


@dataclass(frozen=True, slots=True)
class Tile:
    """A number at the top of a page. label: what it is of; value: with its unit; note: how it came about."""

    label: str
    value: str
    note: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True)
class PagePicture:
    """A small image. name: of the file that it is of; png: its bytes."""

    name: str
    png: bytes


@dataclass(frozen=True, slots=True)
class DrawnBox:
    """A box on a picture. points: its corners, in the picture's pixels. lost: whether the other model lacks it."""

    points: tuple[tuple[float, float], ...]
    label: str
    lost: bool = False


@dataclass(frozen=True, slots=True)
class PictureSide:
    """What one model says of a picture. overlay: PNG of translucent colours over all of it, empty for none."""

    boxes: tuple[DrawnBox, ...] = ()
    overlay: bytes = b""


@dataclass(frozen=True, slots=True)
class ComparedPicture:
    """A picture, with what the float model and the file say of it.

    size: width and height in pixels, in which boxes are. shown: left, top, width and height of the part that is shown.
    photo: JPEG of the whole. caption: how the two differ.
    """

    name: str
    size: tuple[int, int]
    shown: tuple[float, float, float, float]
    photo: bytes
    caption: str
    float_side: PictureSide
    file_side: PictureSide


@dataclass(frozen=True, slots=True)
class PictureComparison:
    """Pictures with what two models say of them, side by side, the worst first.

    key: "boxes" or "masks". lead: what is shown, in a sentence. legend: colours as CSS has them, and what they mean.
    """

    key: str
    lead: str
    pictures: tuple[ComparedPicture, ...]
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """The content of one page. What is None or empty has no place on it.

    Attributes:
        title, subtitle: Headings.
        tiles: Numbers at the top.
        verdict: One or two sentences.
        version: Of qconv.
        warnings: Of the run.
        compared: The comparison layer by layer.
        without: Why `compared` is None.
        shown: What both models say of pictures, side by side.
        audit: What runs in integers.
        fed: The preprocessing in words.
        contact: Images as the network got them.
        caption: About these images, or why there are none.
        command: The command that makes the page again.
        recipe: As JSON.
        changes: (step, what, how often).
        skipped: (where, why).
        precision: The curve of time and noise that the division into integers and float was chosen on.
        diagnosis, sweep, synthesis, study: The result of the command, for its own section.
    """

    title: str
    subtitle: str
    tiles: tuple[Tile, ...]
    verdict: str
    version: str
    warnings: tuple[str, ...] = ()
    compared: Comparison | None = None
    without: str = ""
    shown: tuple[PictureComparison, ...] = ()
    audit: Audit | None = None
    fed: str = ""
    contact: tuple[PagePicture, ...] = ()
    caption: str = ""
    command: str = ""
    recipe: str = ""
    changes: tuple[tuple[str, str, int], ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    precision: PrecisionReport | None = None
    diagnosis: Diagnosis | None = None
    sweep: Sweep | None = None
    synthesis: SynthesisResult | None = None
    study: SampleCurve | None = None


LIBRARIES = ("jinja2", "plotly")

MOST_LAYERS = 15

MOST_NAMED = 3

DIGITS = 6
"""Significant digits of a number in a chart, more than one can see."""

CAUSE_TITLES = {
    "channel-imbalance": "Channels of very different size",
    "weight-imbalance": "Layers of very different channels",
    "range-outlier": "Few values far from the rest",
    "dead-channels": "Channels that are always zero",
    "wide-concat": "Parts of unlike range share a scale",
    "gate": "Gates that multiply what they let through",
    "bias-overflow": "Biases too large for their scale",
    "saturation": "Sums that overflow on older CPUs",
    "low-bits": "Few bits",
    "preprocessing": "Pictures fed otherwise than in training",
    "few-pictures": "Too few pictures",
    "layer": "One layer",
    "bodies": "Layers in bodies of If, Loop and Scan",
}
"""Kinds of causes in words."""


def require_report_extra(what: str = "--report") -> None:
    """Raise QconvError where the extra is not installed. what: the option that asks for a page."""
    if any(find_spec(name) is None for name in LIBRARIES):
        raise QconvError(f"{what} needs {' and '.join(LIBRARIES)}.", "pip install 'qconv[report]'")


def render_page(page: Page) -> bytes:
    """Render the whole file, in UTF-8. Raises QconvError without the extra."""
    require_report_extra()
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read_asset),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(FILTERS)
    text = environment.get_template("report.html.j2").render(
        page=page,
        worst=[] if page.compared is None else _rank_layers(page.compared),
        shown=MOST_LAYERS,
        causes=CAUSE_TITLES,
        time=_time_by_kind(page.audit),
        islands=[] if page.audit is None else group_float_nodes(page.audit.islands),
        placed=[] if page.audit is None else group_float_nodes(page.audit.placed),
        named=MOST_NAMED,
        style=Markup(_read_asset("report.css")),
        script=Markup(_read_asset("report.js")),
        # in a script element nothing but `<` can end it, and in JSON an escape is as good
        data=Markup(json.dumps(_chart_data(page), allow_nan=False).replace("<", "\\u003c")),
        plotly=Markup(get_plotlyjs()) if _has_charts(page) else "",
    )
    return text.encode("utf-8", "backslashreplace")  # a file's name need not be UTF-8


def _read_asset(name: str) -> str:
    return files("qconv.report").joinpath(name).read_text("utf-8")


def _has_charts(page: Page) -> bool:
    drawn = (page.compared, page.precision, page.sweep, page.synthesis, page.study)
    return any(part is not None for part in drawn)


def _rank_layers(compared: Comparison) -> list[tuple[int, LayerComparison]]:
    """List layers with their index in running order, the worst first."""
    places = {id(row): place for place, row in enumerate(compared.layers)}
    return [(places[id(row)], row) for row in compared.worst_first]


def _time_by_kind(audit: Audit | None) -> list[tuple[str, float, float]]:
    """List (how nodes ran, microseconds, share), where times were measured."""
    spent = None if audit is None else audit.as_dict()["us"]
    if not spent or not spent["total"]:
        return []
    return [(kind, spent[kind], max(0.0, spent[kind]) / spent["total"]) for kind in ("integer", "float", "converting")]


# -- what report.js draws ----------------------------------------------------------------------------------------------


def _chart_data(page: Page) -> dict[str, Any]:
    """Collect the numbers that report.js draws, JSON-ready."""
    compared, sweep = page.compared, page.sweep
    return {
        "layers": [] if compared is None else [_layer_data(row) for row in compared.layers],
        "worst": _rank_layers(compared)[0][0] if compared is not None and compared.layers else None,
        "precision": None if page.precision is None else _precision_data(page.precision),
        "sweep": None if sweep is None else _sweep_data(sweep),
        "synthesis": None if page.synthesis is None else _synthesis_data(page.synthesis),
        "study": None if page.study is None else _study_data(page.study),
    }


def _layer_data(row: LayerComparison) -> dict[str, Any]:
    return {
        "name": row.name,
        "op": row.op,
        "tensor": row.tensor,
        "input": row.input,
        "own": _round_number(row.added_sqnr_db),
        "runs": _round_number(row.sqnr_db),
        "cosine": _round_number(row.cosine),
        "share": _round_number(row.output_share),
        "values": _values_data(row.values),
        "weights": _values_data(row.weights),
    }


def _values_data(values: ValueStatistics | None) -> dict[str, Any] | None:
    if values is None:
        return None
    return {
        "bits": values.bits,
        "low": _round_number(values.low),
        "high": _round_number(values.high),
        "clipped": _round_number(values.clipped),
        "use": _round_number(values.range_use),
        "edges": [_round_number(edge) for edge in values.bars.edges],
        "counts": list(values.bars.counts),
    }


def _precision_data(curve: PrecisionReport) -> dict[str, Any]:
    points = [
        {
            "time": _round_number(point.time),
            "db": _round_number(point.corrected_db),
            "nodes": point.nodes,
            "measured": point.measured_db is not None,
            "chosen": point.chosen,
        }
        for point in curve.points
    ]
    return {"float": _round_number(curve.float_time), "points": points}


def _sweep_data(sweep: Sweep) -> dict[str, Any]:
    rows = zip(sweep.trials, sweep.best, strict=True)
    trials = [{**_trial_data(trial), "best": best} for trial, best in rows if not trial.failed]
    return {
        "float": {"size": sweep.float_bytes, "ms": _round_number(sweep.float_ms)},
        "metrics": [_metric_data(metric) for metric in list_trial_metrics(sweep.trials)],
        "trials": trials,
    }


def _metric_data(metric: Metric) -> dict[str, Any]:
    """Collect what a chart needs to name and scale its values."""
    return {"name": metric.name, "heading": metric.heading, "sign": metric.sign, "factor": metric.factor}


def _trial_data(trial: Trial) -> dict[str, Any]:
    """Collect scores and intervals by the name of the metric; no interval where it was not measured."""
    return {
        "name": trial.name,
        "scores": {score.name: _round_number(score.value) for score in trial.scores},
        "intervals": {score.name: list(map(_round_number, score.interval)) for score in trial.scores if score.interval},
        "size": trial.size,
        "ms": _round_number(trial.ms),
    }


def _synthesis_data(found: SynthesisResult) -> dict[str, Any]:
    layers = [
        {"name": x.name, "before": _round_number(x.before), "after": _round_number(x.after)} for x in found.layers
    ]
    return {"loss": [_round_number(number) for number in found.loss], "layers": layers}


def _study_data(curve: SampleCurve) -> dict[str, Any]:
    """Collect draws and spreads by the name of the metric. What has no number, as dB of equal outputs, is null."""
    return {
        "pictures": curve.pictures,
        "enough": curve.enough,
        "metrics": [_metric_data(metric) for metric in curve.metrics],
        "draws": [
            {
                "pictures": point.pictures,
                "seed": point.seed,
                **{metric.name: _round_number(point.value_of(metric)) for metric in curve.metrics},
            }
            for point in curve.points
        ],
        "spread": [
            {"pictures": n, **{metric.name: _spread_data(curve.spread(metric, n)) for metric in curve.metrics}}
            for n in curve.counts
        ],
    }


def _spread_data(spread: Spread | None) -> list[float | None] | None:
    """Return the worst draw, the median and the best; None where one of them is not finite."""
    return None if spread is None or not all(map(math.isfinite, spread)) else list(map(_round_number, spread))


def _round_number(number: float | None) -> float | None:
    """Round to DIGITS; None for what is not finite, which neither JSON nor a chart can hold."""
    return None if number is None or not math.isfinite(number) else float(f"{number:.{DIGITS}g}")


# -- filters -----------------------------------------------------------------------------------------------------------


def shorten_middle(text: str, most: int = 46) -> str:
    """Cut the middle out of a long name: both of its ends tell layers apart."""
    front = (most - 1) // 3
    return text if len(text) <= most else f"{text[:front]}\u2026{text[front + 1 - most :]}"


def format_decibel(value: float | None, empty: str = "equal") -> str:
    """Format dB with one digit; a word where nothing differs."""
    return empty if value is None else f"{value:.1f}"


def format_trial_span(trial: Trial, metric: Metric) -> str:
    """The interval of a share, in percent; empty for others."""
    score = find_score(trial.scores, metric)
    if score is None or score.interval is None or metric.unit != SHARE:
        return ""
    low, high = (round(100 * end) for end in score.interval)
    return f"{low} to {high}"


def format_percent(share: float | None, digits: int = 1) -> str:
    """Format a share as `12.3%`; empty where not measured."""
    return "" if share is None else f"{share:.{digits}%}"


def make_data_url(picture: bytes) -> str:
    """Encode a PNG or a JPEG as a data URL inside the page."""
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{b64encode(picture).decode()}"


def format_points(points: Sequence[tuple[float, float]]) -> str:
    """Write corners as SVG's `points`, to a tenth of a pixel."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def count_others(names: Sequence[str], named: int = MOST_NAMED) -> str:
    """Say `and 3 more` for the names beyond the first `named`."""
    return f"and {len(names) - named} more" if len(names) > named else ""


def time_share(islands: Sequence[FloatNode], audit: Audit) -> float | None:
    """Return the nodes' share of the time of a run; None where not measured."""
    return sum(island.us or 0.0 for island in islands) / audit.total_us if audit.total_us else None


def list_study_cells(curve: SampleCurve, count: int) -> list[str]:
    """Format the worst draw, the median and the best of `count` images, in every metric."""
    spreads = ((metric, curve.spread(metric, count)) for metric in curve.metrics)
    return [format_value(metric, value) for metric, spread in spreads for value in spread or (None,) * 3]


FILTERS = {
    "drawn": list_study_cells,
    "middle": shorten_middle,
    "decibel": format_decibel,
    "percent": format_percent,
    "data_url": make_data_url,
    "points": format_points,
    "others": count_others,
    "spent": time_share,
    "counted": format_count,
    "sized": format_bytes,
    "metrics": list_trial_metrics,
    "valued": lambda trial, metric: format_trial_value(metric, trial),
    "spanned": format_trial_span,
    "gained": lambda trial, first, metric: format_trial_gain(metric, first, trial),
}
