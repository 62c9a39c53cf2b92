"""This module chooses the trial that a diagnosis recommends, and says in words what it came to and what it costs.

The most accurate one is sought first, where a doubling of time or size has to gain what a bit is worth. Among those
that are as good by what the task is judged by, as far as its interval tells them apart, the smallest is taken: the
fewest nodes in float, the smallest file, the least work in float. SQNR decides where these are the same. A trial that
leaves most of the network in float is taken only where no other one is good.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

from qconv.analysis.remedies import ENOUGH, POOR
from qconv.errors import format_bytes
from qconv.results.scores import SHARE
from qconv.results.trials import LEAST_GAIN_DB, Trial

DB_PER_BIT = 6.02
"""Gain of one more bit: a doubling of time or size has to gain as much."""
PLENTY_DB = 40.0
"""From here on more counts nothing."""
LEAST_SIZE = 0.01
"""Share of a file by which another one has to be smaller to be called so."""


def choose_trial(base: Trial, others: Sequence[Trial]) -> Trial:
    """Choose the trial to recommend. others: remedies beside `base`, in the order in which they were tried."""
    able = [trial for trial in others if not trial.failed]
    if any(is_good(trial) for trial in (base, *able) if not leaves_most_in_float(trial)):
        able = [trial for trial in able if not leaves_most_in_float(trial)]
    best, least = base, LEAST_GAIN_DB
    for trial in able:
        paid = DB_PER_BIT * (_count_doublings(trial, base) - _count_doublings(best, base))
        if trial.gain_over(best, PLENTY_DB) - paid > least:
            best, least = trial, 0.0
    smallest = best
    for trial in sorted((base, *able), key=lambda trial: trial.rank, reverse=True):
        if _is_as_good(trial, best) and _is_smaller(trial, smallest):
            smallest = trial
    return smallest


def is_good(trial: Trial) -> bool:
    """Whether a trial keeps enough of what its task is judged by: of decibels where that is no share."""
    decibel, share = ENOUGH
    if trial.failed:
        return False
    if trial.lost is None or trial.ranked_by is None or trial.ranked_by.unit != SHARE:
        return trial.noise_db >= decibel
    return trial.surely_lost <= share


def leaves_most_in_float(trial: Trial) -> bool:
    """Whether most of the network stays in float, which is then hardly quantized."""
    return trial.in_float is not None and trial.in_float.is_most


def _is_as_good(trial: Trial, best: Trial) -> bool:
    """Whether nothing that was measured tells a trial from the best one, but SQNR where there is more than that.

    Without labels a share is coarse, so that a poor SQNR tells more.
    """
    if trial.lost is None or best.lost is None:
        return best.gain_over(trial, PLENTY_DB) < LEAST_GAIN_DB
    poor = trial.labelled is None and trial.noise_db < POOR[0] and best.noise_db - trial.noise_db >= DB_PER_BIT
    return trial.surely_lost <= best.lost and not poor


def _is_smaller(trial: Trial, other: Trial) -> bool:
    """Whether a trial has fewer nodes in float, or as many in a smaller file, or less work in float."""
    one, its = trial.in_float, other.in_float
    if one is None or its is None:
        return False
    if one.nodes != its.nodes:
        return one.nodes < its.nodes
    if abs(trial.size - other.size) > LEAST_SIZE * other.size:
        return trial.size < other.size
    return one.work < its.work


def _count_doublings(trial: Trial, base: Trial) -> float:
    """How often size and time have doubled."""
    cost = max(0.0, log2(trial.size / base.size)) if trial.size and base.size else 0.0
    if trial.ms and base.ms:
        cost += max(0.0, log2(trial.ms / base.ms))
    return cost


def describe_trial(trial: Trial) -> str:
    """Describe what was measured of a trial."""
    told = ["outputs are equal"] if trial.equal else []
    return ", ".join([*told, *(score.in_words() for score in trial.scores if score.value is not None)])


def describe_cost(trial: Trial, float_bytes: int) -> str:
    """Say what a trial leaves in float, and how large its file gets. float_bytes: of the float model."""
    if trial.in_float is None:
        return ""
    size = f"{format_bytes(trial.size)}, {trial.size / float_bytes:.2f} of float"
    told = f" It leaves {trial.in_float.in_words} in float, and takes {size}."
    if leaves_most_in_float(trial):
        told += " That is most of the network, which is hardly quantized by this: nothing smaller was good enough."
    return told
