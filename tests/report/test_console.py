"""What the summary says of changes and of nodes in float by choice, and `-v` of the curve that they were chosen on."""

from __future__ import annotations

import io

import pytest

from qconv.errors import Change, Skipped
from qconv.report.console import show_report
from qconv.results.precision import PrecisionPoint, PrecisionReport
from qconv.results.quantize import Audit, FloatNode, Report, Verification

FASTER = FloatNode("stem", "Conv", "faster in float: 5 us against 9 by the cost table", rule="placed")
PRECISE = tuple(FloatNode(f"Conv_{n}", "Conv", "accuracy: 6.2 dB for 4% of the time", rule="placed") for n in (41, 44))
CURVE = PrecisionReport(
    (
        PrecisionPoint(1.0, 9.04, 10.0, 10.0, 0),
        PrecisionPoint(1.04, 15.5, 16.2, 16.2, 2, chosen=True),
        PrecisionPoint(1.5, 40.0, 40.5, None, 1),
    ),
    1.7,
    16,
    apart=True,
)


def printed(
    placed: tuple[FloatNode, ...],
    curve: PrecisionReport | None = None,
    *,
    findings: tuple[Change | Skipped, ...] = (),
    verbose: bool = False,
) -> list[str]:
    report = Report(
        version="1.2.3",
        output="out.onnx",
        float_model="m.onnx",
        recipe={"target": "ort-cpu"},
        preprocessing=None,
        preprocessing_words="",
        float_bytes=400,
        quantized_bytes=100,
        opset=17,
        ir_version=8,
        needs="onnxruntime >= 1.20",
        verify=Verification(0, ()),
        audit=Audit(10, len(placed), (), placed),
        time={"total": 1.0},
        precision=curve,
        findings=list(findings),
    )
    stream = io.StringIO()
    show_report(report, stream, verbose=verbose)
    return stream.getvalue().splitlines()


def test_what_is_faster_and_what_is_for_accuracy_have_lines_of_their_own() -> None:
    lines = [line for line in printed((FASTER, *PRECISE)) if line.startswith("float ")]
    codes = ", the weights among them are codes all the same"
    assert [" ".join(line.split()) for line in lines] == [
        f"float faster: stem{codes}",
        f"float accuracy: Conv_41, Conv_44: 6.2 dB for 4% of the time{codes}",
    ]


def titled(findings: list[Change | Skipped], title: str) -> list[str]:
    return [line[12:].strip() for line in printed((), findings=tuple(findings)) if line.startswith(title)]


@pytest.mark.parametrize("count", [8, 9, 10, 12])
def test_what_is_left_out_of_the_summary_is_counted(count: int) -> None:
    """Codes that were packed have lines of their own, however many other changes there are."""
    changes = [Change("simplify", f"n{n}", f"change {n}") for n in range(count)]
    found = [*changes, *changes[:1], Change("pack", "4 bits", "codes of 3 layers stored with 4 bits each")]
    lines = titled(found, "changed")
    assert lines[0] == "2 x change 0"
    last = [f"and {count - 8} more kinds, which -v tells"] if count > 9 else ["change 8"]
    assert lines[8:] == (last if count > 8 else [])
    assert titled(found, "packed") == ["codes of 3 layers stored with 4 bits each"]
    skipped = [Skipped("simplify", f"n{n}", f"reason {n}") for n in range(count)]
    assert len(titled(skipped, "left alone")) == min(count, 9)


def test_one_kind_alone_has_one_line() -> None:
    for placed in ((FASTER,), PRECISE):
        assert len([line for line in printed(placed) if line.startswith("float ")]) == 1
    assert not [line for line in printed(()) if line.startswith("float ")]


def test_the_curve_is_printed_with_v_alone() -> None:
    assert not [line for line in printed(PRECISE, CURVE) if line.startswith("precision")]
    lines = [line for line in printed(PRECISE, CURVE, verbose=True) if line.startswith("precision")]
    assert [" ".join(line.split()) for line in lines] == [
        "precision divisions, their times over that of all integers; all in float 1.700:",
        "precision time 1.000, 0 more nodes in float, 10.0 dB (by noises alone 9.0, measured 10.0)",
        "precision time 1.040, 2 more nodes in float, 16.2 dB (by noises alone 15.5, measured 16.2); taken",
        "precision time 1.500, 1 more node in float, 40.5 dB (by noises alone 40.0)",
    ]
    assert not [line for line in printed(PRECISE, None, verbose=True) if line.startswith("precision")]
