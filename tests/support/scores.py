"""Scores of outputs, as a comparison gives them."""

from __future__ import annotations

from qconv.results.scores import AGREEMENT, SQNR, Interval, Score


def scores(
    sqnr: float | None = None, agreement: float | None = None, interval: Interval | None = None
) -> tuple[Score, ...]:
    """SQNR in dB, None for equal outputs, and the agreement with its interval where there is one."""
    found = (Score(SQNR, sqnr),)
    return found if agreement is None else (*found, Score(AGREEMENT, agreement, interval))
