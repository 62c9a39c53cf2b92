"""A page as one HTML file that opens offline: the door to jinja2 and plotly, which are an extra.

The template brings everything along: style, script, plotly.js, data as JSON, pictures as data URLs. A policy in its
head forbids the browser every request. The same page gives the same bytes: there is no clock and no random name in it.
Charts are drawn by report.js from the numbers that `_data` hands over, so that they can follow light and dark.

It will not trust a name: nodes and files may be called anything, `</script>` included.
"""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from qconv.errors import QconvError, format_bytes, format_count
from qconv.report.shown import Page
from qconv.results.comparison import Comparison, LayerComparison, Sweep, Trial, ValueStatistics
from qconv.results.quantize import Audit, FloatNode, group_float_nodes
from qconv.results.training import SynthesisResult

LIBRARIES = ("jinja2", "plotly")
WORST = 15
NAMED = 3
DIGITS = 6
"""Of a number in a chart, which is more than the eye has."""
CAUSES = {
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
}
"""Kinds of causes in words."""


def require() -> None:
    """Raise QconvError where the extra is not installed."""
    if any(find_spec(name) is None for name in LIBRARIES):
        raise QconvError(f"--report needs {' and '.join(LIBRARIES)}.", "pip install 'qconv[report]'")


def render(page: Page) -> bytes:
    """The whole file, in UTF-8. Raises QconvError without the extra."""
    require()
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(FILTERS)
    text = environment.get_template("report.html.j2").render(
        page=page,
        worst=[] if page.compared is None else _ranked(page.compared),
        shown=WORST,
        causes=CAUSES,
        time=_time(page.audit),
        islands=[] if page.audit is None else group_float_nodes(page.audit.islands),
        placed=[] if page.audit is None else group_float_nodes(page.audit.placed),
        named=NAMED,
        style=Markup(_text("report.css")),
        script=Markup(_text("report.js")),
        # in a script element nothing but `<` can end it, and in JSON an escape is as good
        data=Markup(json.dumps(_data(page), allow_nan=False).replace("<", "\\u003c")),
        plotly=Markup(get_plotlyjs()) if _has_charts(page) else "",
    )
    return text.encode("utf-8", "backslashreplace")  # a file's name need not be UTF-8


def _text(name: str) -> str:
    return files("qconv.report").joinpath(name).read_text("utf-8")


def _has_charts(page: Page) -> bool:
    return page.compared is not None or page.sweep is not None or page.synthesis is not None


def _ranked(compared: Comparison) -> list[tuple[int, LayerComparison]]:
    """Layers, the worst first, with their places in the order of running."""
    places = {id(row): place for place, row in enumerate(compared.layers)}
    return [(places[id(row)], row) for row in compared.worst_first]


def _time(audit: Audit | None) -> list[tuple[str, float, float]]:
    """(how it ran, microseconds, share), where that was measured."""
    spent = None if audit is None else audit.as_dict()["us"]
    if not spent or not spent["total"]:
        return []
    return [(kind, spent[kind], max(0.0, spent[kind]) / spent["total"]) for kind in ("integer", "float", "converting")]


# -- what report.js draws ----------------------------------------------------------------------------------------------


def _data(page: Page) -> dict[str, Any]:
    compared, sweep = page.compared, page.sweep
    return {
        "layers": [] if compared is None else [_layer(row) for row in compared.layers],
        "worst": _ranked(compared)[0][0] if compared is not None and compared.layers else None,
        "sweep": None if sweep is None else _sweep(sweep),
        "synthesis": None if page.synthesis is None else _synthesis(page.synthesis),
    }


def _layer(row: LayerComparison) -> dict[str, Any]:
    return {
        "name": row.name,
        "op": row.op,
        "tensor": row.tensor,
        "input": row.input,
        "own": _short(row.added_sqnr_db),
        "runs": _short(row.sqnr_db),
        "cosine": _short(row.cosine),
        "share": _short(row.output_share),
        "values": _values(row.values),
        "weights": _values(row.weights),
    }


def _values(values: ValueStatistics | None) -> dict[str, Any] | None:
    if values is None:
        return None
    return {
        "bits": values.bits,
        "low": _short(values.low),
        "high": _short(values.high),
        "clipped": _short(values.clipped),
        "use": _short(values.range_use),
        "edges": [_short(edge) for edge in values.bars.edges],
        "counts": list(values.bars.counts),
    }


def _sweep(sweep: Sweep) -> dict[str, Any]:
    rows = zip(sweep.trials, sweep.best, strict=True)
    trials = [{**_trial(trial), "best": best} for trial, best in rows if not trial.failed]
    return {"float": {"size": sweep.float_bytes, "ms": _short(sweep.float_ms)}, "trials": trials}


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "name": trial.name,
        "sqnr": _short(trial.sqnr_db),
        "agreement": _short(trial.agreement),
        "interval": None if trial.agreement_interval is None else list(map(_short, trial.agreement_interval)),
        "size": trial.size,
        "ms": _short(trial.ms),
    }


def _synthesis(found: SynthesisResult) -> dict[str, Any]:
    layers = [{"name": x.name, "before": _short(x.before), "after": _short(x.after)} for x in found.layers]
    return {"loss": [_short(number) for number in found.loss], "layers": layers}


def _short(number: float | None) -> float | None:
    """JSON has no infinity, and no chart a place for it."""
    return None if number is None or not math.isfinite(number) else float(f"{number:.{DIGITS}g}")


# -- filters -----------------------------------------------------------------------------------------------------------


def middle(text: str, most: int = 46) -> str:
    """A long name without its middle: both of its ends tell layers apart."""
    front = (most - 1) // 3
    return text if len(text) <= most else f"{text[:front]}\u2026{text[front + 1 - most :]}"


def decibel(value: float | None, empty: str = "equal") -> str:
    """One digit, and a word where nothing differs."""
    return empty if value is None else f"{value:.1f}"


def percent(share: float | None, digits: int = 1) -> str:
    """`12.3%`; nothing where it was not measured."""
    return "" if share is None else f"{share:.{digits}%}"


def data_url(png: bytes) -> str:
    """A picture inside the page."""
    return f"data:image/png;base64,{b64encode(png).decode()}"


def others(names: Sequence[str], named: int = NAMED) -> str:
    """`and 3 more`, of names of which the first are said."""
    return f"and {len(names) - named} more" if len(names) > named else ""


def spent(islands: Sequence[FloatNode], audit: Audit) -> float | None:
    """Their share of the time of a run; None where that was not measured."""
    return sum(island.us or 0.0 for island in islands) / audit.total_us if audit.total_us else None


FILTERS = {
    "middle": middle,
    "decibel": decibel,
    "percent": percent,
    "data_url": data_url,
    "others": others,
    "spent": spent,
    "counted": format_count,
    "sized": format_bytes,
}
