"""What a gate says of a result, and of a float model that does not have as much itself."""

from __future__ import annotations

import pytest

from qconv.results.gates import Gate


@pytest.mark.parametrize(
    ("of_float", "float_held", "told"),
    [
        (None, None, "Gate fell short: --min-map 0.5, got 0.25."),
        (0.5, True, "Gate fell short: --min-map 0.5, got 0.25; the float model has 0.5."),
        (
            0.49,
            False,
            "Gate fell short: --min-map 0.5, got 0.25; the float model itself has 0.49 on these pictures, so that no "
            "quantized file can be expected to reach it.",
        ),
    ],
)
def test_what_falls_short_is_told_beside_the_float_model(
    of_float: float | None, float_held: bool | None, told: str
) -> None:
    gate = Gate("min-map", 0.5, 0.25, held=False, of_float=of_float)
    assert gate.as_error == told
    assert gate.as_dict() == {
        "name": "min-map",
        "want": 0.5,
        "got": 0.25,
        "held": False,
        "float": of_float,
        "float_held": float_held,
    }
    assert gate.in_words.startswith("--min-map 0.5: fell short")
    assert ("no quantized file" in gate.in_words) == (float_held is False)


def test_what_holds_needs_no_excuse() -> None:
    """The float model may have less by chance."""
    assert Gate("min-map", 0.5, 0.51, held=True, of_float=0.4).in_words == "--min-map 0.5: held"


def test_no_number() -> None:
    assert Gate("min-boxes", 0.5, None, held=False).as_error == "Gate fell short: --min-boxes 0.5, got no such measure."
