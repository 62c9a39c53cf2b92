"""What the results are held against. Nothing here asserts: a benchmark tells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.bench.cases import Case

MOST_TIMES_PEER = 1.05
SIZES = ((3e6, 0.30), (5e5, 0.32))  # float bytes over -> largest ratio
SIGNIFICANT = 0.05

Mark = dict[str, Any]


def marks(case: Case, found: dict[str, Any]) -> list[Mark]:
    """{"what", "got", "want", "held"} for everything that was measured."""
    own = found["qconv"]
    if own["status"] != 0:
        return [_mark("converts", f"status {own['status']}", "status 0", False)]
    rows = [_mark("converts", "status 0", "status 0", True)]
    if "shipped" in found:
        rows.extend(_shipped(found["shipped"]))
    rows.extend(_beside_peer(own, found["peer"]))
    rows.extend(_top1(case, own["accuracy"]))
    rows.extend(_size(own))
    left = own["coverage"]["should_be_integer"]
    rows.append(_mark("float nodes that could be integer", left, 0, left == 0))
    ratio = found.get("latency", {}).get("qconv/peer")
    if ratio:
        rows.append(_mark("latency / peer", ratio[1], MOST_TIMES_PEER, ratio[1] <= MOST_TIMES_PEER))
    for count, costs in found.get("cost", {}).items():
        for what in ("time", "memory"):
            if what in costs:
                got = costs[what]
                rows.append(_mark(f"{what} of {count} pictures", got["got"], got["most"], got["held"]))
    return rows


def _mark(what: str, got: Any, want: Any, held: bool) -> Mark:
    return {"what": what, "got": got, "want": want, "held": bool(held)}


def _shipped(shipped: dict[str, Any]) -> Iterator[Mark]:
    yield _mark("converts as shipped", f"status {shipped['status']}", "status 0", shipped["status"] == 0)
    if shipped["status"] == 0:
        left = shipped["coverage"]["should_be_integer"]
        yield _mark("float nodes as shipped", left, 0, left == 0)


def _beside_peer(own: dict[str, Any], peer: dict[str, Any]) -> Iterator[Mark]:
    for key, runs in (("", "accuracy"), (" (reference)", "reference")):
        if runs not in own or runs not in peer:
            continue
        for what in ("agreement", "sqnr_db"):
            got, want = own[runs][what], peer[runs][what]
            if want is None and (what == "agreement" or got is None):
                continue
            # no SQNR at all means that nothing differs
            held = got is None or (want is not None and got >= want)
            yield _mark(f"{what}{key} at least the peer's", got, want, held)


def _top1(case: Case, scored: dict[str, Any]) -> Iterator[Mark]:
    if case.most_lost is None:
        return
    lost = scored["top1"]["float"] - scored["top1"]["quantized"]
    held = lost <= case.most_lost + 1e-9
    if case.paired_test_excuses and not held:
        held = scored["flips"]["p_value"] >= SIGNIFICANT
    yield _mark("points of top-1 lost", lost, case.most_lost, held)


def _size(own: dict[str, Any]) -> Iterator[Mark]:
    size = own["bytes"] / own["size_ratio"]
    limit = next((most for over, most in SIZES if size > over), None)
    if limit is not None:
        yield _mark("size ratio", own["size_ratio"], limit, own["size_ratio"] <= limit)
