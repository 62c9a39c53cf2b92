"""What `diagnose` and `quantize --sweep` print for people to read, in 80 columns: causes, and tables of trials."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence

from qconv.errors import format_count
from qconv.report.printing import COLUMNS, columns, wrapped
from qconv.results.comparison import Cause, Diagnosis, Sweep, Trial

NAMED = 2
LEAST_SHARE = 0.01
INDENT = "  "


def diagnosis(found: Diagnosis, *, verbose: bool) -> str:
    """The causes, the ladder, and what to type."""
    lines = [wrapped(f"{found.model}: {_scored_on(found.pictures, found.unseen)}"), ""]
    open_ones = [cause for cause in found.causes if not (cause.handled or cause.harmless)]
    handled = [cause for cause in found.causes if cause.handled]
    harmless = [cause for cause in found.causes if cause.harmless]
    groups = (("causes:", open_ones), ("taken care of already:", handled), ("also seen:", harmless))
    for title, causes in groups:
        if causes:
            lines += [title, *(line for cause in causes for line in _cause(cause, verbose=verbose)), ""]
    if not open_ones:
        lines += ["causes: none that nothing takes care of", ""]
    lines.append(ladder(found.trials, found.float_ms, found.trials[0]))
    lines += ["", wrapped(found.conclusion), "", "recommended:", _command(found.recommended)]
    return "\n".join(lines)


def sweep(found: Sweep, *, verbose: bool) -> str:
    """The recipes with what each costs; those that no other one beats are marked."""
    lines = [wrapped(f"{found.model}: {_scored_on(found.pictures, found.unseen)}"), ""]
    marks = ["*" if best else "" for best in found.best]
    lines.append(ladder(found.trials, found.float_ms, None, marks))
    lines += [
        "",
        wrapped("* no other recipe is as good in accuracy, size and time, and better in one of them."),
    ]
    written = [out for trial, out in zip(found.trials, found.outputs, strict=True) if not trial.failed]
    lines += ["", *(written if verbose else [_all_of(written)])]
    return "\n".join(lines)


def _all_of(written: Sequence[str]) -> str:
    more = f" and {len(written) - 1} more beside it" if len(written) > 1 else ""
    return f"written: {written[0]}{more}"


def _scored_on(pictures: int, unseen: bool) -> str:
    how = "none of them calibrated with" if unseen else "calibrated with, too"
    return f"scored on {format_count(pictures, 'picture')}, {how}"


def _cause(cause: Cause, *, verbose: bool) -> Iterator[str]:
    share = "" if cause.share is None else f", {_part(cause.share)} of the error at the outputs"
    yield _hanging(f"{INDENT}{cause.kind}{share}", 4)
    yield _hanging(f"    {cause.what}", 4)
    names = cause.where if verbose else cause.where[:NAMED]
    more = "" if len(names) == len(cause.where) else f" and {len(cause.where) - len(names)} more"
    yield _hanging(f"    where: {', '.join(names)}{more}", 6)
    if cause.handled:
        yield _hanging(f"    {cause.handled}", 4)


def _part(share: float) -> str:
    return "under 1%" if share < LEAST_SHARE else f"{share:.0%}"


def ladder(
    trials: Sequence[Trial], float_ms: float | None, first: Trial | None, marks: Sequence[str] | None = None
) -> str:
    """A row a trial. first: what gains are told against, None for no such column; marks: in front of each row."""
    timed = float_ms is not None
    head = [
        ("", "SQNR", "" if first is None else "gain", "agree-", "", "size", "time of" if timed else "", ""),
        ("", "dB", "" if first is None else "dB", "ment %", "(95 %)", "kB", "float's" if timed else "", "recipe"),
    ]
    rows = []
    failures = []
    for trial, mark in zip(trials, marks or [""] * len(trials), strict=True):
        if trial.failed:
            failures.append(_hanging(f"{trial.name} failed: {trial.failed}", 2))
            continue
        rows.append(
            (
                mark,
                _decibel(trial),
                _gain(trial, first),
                "" if trial.agreement is None else f"{100 * trial.agreement:.1f}",
                "" if trial.agreement_interval is None else "({:.0f}..{:.0f})".format(*_percent(trial)),
                f"{trial.size / 1e3:.0f}",
                "" if trial.ratio is None or not timed else f"{trial.ratio[1]:.2f}",
                trial.name,
            )
        )
    lines = [columns([*head, *rows], "rrrrlrrl")]
    told = [_hanging(f"{trial.name}: {trial.typed}", 2) for trial in trials if trial.options]
    if told and first is not None:
        lines += ["", "options:", *told]
    return "\n".join([*lines, *failures])


def _decibel(trial: Trial) -> str:
    return "equal" if trial.equal else "" if trial.sqnr_db is None else f"{trial.sqnr_db:.1f}"


def _percent(trial: Trial) -> tuple[float, float]:
    low, high = trial.agreement_interval or (0.0, 0.0)
    return 100 * low, 100 * high


def _gain(trial: Trial, first: Trial | None) -> str:
    if first is None or first is trial or first.sqnr_db is None or trial.sqnr_db is None:
        return ""
    gain = round(trial.sqnr_db - first.sqnr_db, 1)
    return f"{gain + 0.0:+.1f}"  # no -0.0


def _hanging(text: str, indent: int) -> str:
    return textwrap.fill(text, COLUMNS, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _command(text: str) -> str:
    """To be pasted: words stay whole, and a line that is not the last ends in a backslash."""
    lines = [""]
    for word in map(shlex.quote, shlex.split(text)):
        if lines[-1] and len(lines[-1]) + len(word) > COLUMNS - 3:
            lines.append(" " * 4)
        lines[-1] += f" {word}" if lines[-1].strip() else word
    return " \\\n".join(lines)
