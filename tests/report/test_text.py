"""Tables and wrapped text for people: the same in a pipe as on a terminal."""

from __future__ import annotations

import pytest

from qconv.report.text import format_columns, wrap_text


def test_columns_are_flush_and_two_blanks_apart() -> None:
    rows = [("layer", "", "share", "kind"), ("/features/0", "", "1.5%", "Conv"), ("x", "", "98.5%", "")]
    assert format_columns(rows, "llrl").splitlines() == [
        "layer        share  kind",
        "/features/0   1.5%  Conv",
        "x            98.5%",
    ]


def test_names_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """No markup, no colour, no cut at the width of a terminal; wide characters take two columns, a tab up to eight."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    long = "conv/" * 200
    rows = [("[bold]a[/]", "1"), ("\u5c64", "22"), ("a\tb", "3"), (":smile:", "4"), (long, "5")]
    lines = format_columns(rows, "lr").splitlines()
    assert [line.split() for line in lines] == [[*name.split(), number] for name, number in rows]
    assert lines[1].index("22") == 1000 + 2 - 1  # one less: two columns, one character
    assert lines[-1].endswith("   5")


def test_words_are_never_broken() -> None:
    path = "/a/very-long/" * 10
    assert wrap_text(f"written to {path} and more", 4).splitlines() == ["written to", f"    {path}", "    and more"]
