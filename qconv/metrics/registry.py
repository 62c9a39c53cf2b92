"""Says what is measured of which outputs. A new metric is a class like `similarity.Sqnr`, and a line here.

Reports, JSON, CSV and pages print whatever is measured: none of them names a metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from qconv.metrics.classification import Agreement, ClassAgreement
from qconv.metrics.similarity import Cosine, Sqnr
from qconv.results.scores import AGREEMENT, SQNR, TOP1, TOP5, Metric, Score
from qconv.runtime.outputs import ModelOutput, OutputKind


class PairMetric(Protocol):
    """Adds up what one output of two models is like, batch by batch."""

    def update(self, reference: NDArray[Any], got: NDArray[Any]) -> None:
        """Take in a batch; both arrays are of one shape."""

    def score(self, *, spans: bool) -> Score | None:
        """What was measured, None where it says nothing. spans: with its interval, each batch taken for one draw."""


MetricsOfKind = Mapping[OutputKind, tuple[Callable[[ModelOutput], PairMetric], ...]]

VERIFIED: MetricsOfKind = {
    OutputKind.CLASS_SCORES: (Sqnr, Agreement),
    OutputKind.CLASS_MAP: (Sqnr, Agreement),
    OutputKind.REGRESSION: (Sqnr,),
    OutputKind.INTEGER: (Agreement,),
}
"""What every check and every candidate of a search is measured by."""

EVALUATED: MetricsOfKind = {
    OutputKind.CLASS_SCORES: (Sqnr, Agreement, ClassAgreement, Cosine),
    OutputKind.CLASS_MAP: (Sqnr, Agreement, ClassAgreement, Cosine),
    OutputKind.REGRESSION: (Sqnr, Cosine),
    OutputKind.INTEGER: (Sqnr, Agreement, Cosine),
}
"""What `evaluate --against` measures."""

LABELLED: Mapping[Metric, int] = {TOP1: 1, TOP5: 5}
"""What labels measure: how many of the best classes may hold the label."""

GATES: Mapping[str, Metric] = {"min_agreement": AGREEMENT, "min_sqnr": SQNR}
"""What options that end with status 3 ask for, by the field of Recipe."""

DROPS: Mapping[str, Metric] = {"agreement": AGREEMENT, "top1": TOP1, "sqnr": SQNR}
"""What `--max-drop` can be of."""
