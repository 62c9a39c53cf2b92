"""What the results are held against. Nothing here asserts: a benchmark tells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.bench.cases import Case
from tests.bench.coverage import SHOULD_BE_INTEGER

MOST_TIMES_PEER = 1.03
MOST_TIMES_FLOAT = 1.03  # as fast, but for noise
SIZES = ((3e6, 0.30), (5e5, 0.32))  # float bytes over -> largest ratio
SIGNIFICANT = 0.05
LINEAR = 1.5  # a later picture takes at most this many times as long as an earlier one, noise included
FLAT = 1.1  # memory with the most pictures over that with the fewest

Mark = dict[str, Any]


def marks(case: Case, found: dict[str, Any]) -> list[Mark]:
    """{"what", "got", "want", "held"} for everything that was measured."""
    own = found["qconv"]
    if own["status"] != 0:
        return [mark("converts", f"status {own['status']}", "status 0", False)]
    rows = [mark("converts", "status 0", "status 0", True)]
    if "shipped" in found:
        rows.extend(_shipped(found["shipped"]))
    rows.extend(_beside_peer(own, found["peer"]))
    rows.extend(_top1(case, own["accuracy"]))
    rows.extend(_size(own))
    rows.append(_integers("all integer that can be", own))
    for key in ("latency", "latency of 2 threads"):
        times = found.get(key, {})
        if "qconv/peer" in times:
            ratio = times["qconv/peer"][1]
            rows.append(mark(f"{key} / peer's", ratio, MOST_TIMES_PEER, ratio <= MOST_TIMES_PEER))
        if "float/qconv" in times:
            ratio = 1 / times["float/qconv"][1]
            rows.append(mark(f"{key} / float's", ratio, MOST_TIMES_FLOAT, ratio <= MOST_TIMES_FLOAT))
    rows.extend(_cost(found.get("cost", {})))
    return rows


def mark(what: str, got: Any, want: Any, held: bool) -> Mark:
    return {"what": what, "got": got, "want": want, "held": bool(held)}


def _shipped(shipped: dict[str, Any]) -> Iterator[Mark]:
    yield mark("converts as shipped", f"status {shipped['status']}", "status 0", shipped["status"] == 0)
    if shipped["status"] == 0:
        yield _integers("all integer that can be, as shipped", shipped)


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
            yield mark(f"{what}{key} at least the peer's", got, want, held)


def _top1(case: Case, scored: dict[str, Any]) -> Iterator[Mark]:
    if case.most_lost is None:
        return
    lost = scored["top1"]["float"] - scored["top1"]["quantized"]
    held = lost <= case.most_lost + 1e-9
    if case.paired_test_excuses and not held:
        held = scored["flips"]["p_value"] >= SIGNIFICANT
    yield mark("points of top-1 lost", lost, case.most_lost, held)


def _integers(what: str, converted: dict[str, Any]) -> Mark:
    left = converted["coverage"]["should_be_integer"]
    if converted["report"]["audit"]["placed"]:  # then only what is float without having been chosen for it
        islands = converted["report"]["audit"]["islands"]
        left = [f"{island['op']} {island['node']}" for island in islands if island["op"] in SHOULD_BE_INTEGER]
    return mark(what, f"{len(left)} float: {', '.join(left)}" if left else "0 float", "0 float", not left)


def _cost(by_count: dict[str, Any]) -> Iterator[Mark]:
    for count, costs in by_count.items():
        for what in ("time", "memory"):
            if what in costs:
                got = costs[what]
                yield mark(f"{what} of {count} pictures", got["got"], got["most"], got["held"])
    runs = {int(count): costs["qconv"] for count, costs in by_count.items() if costs["qconv"]}
    if len(runs) < 3:
        return
    few, some, many = sorted(runs)
    paces = [(runs[b]["seconds"] - runs[a]["seconds"]) / (b - a) for a, b in ((few, some), (some, many))]
    yield mark("seconds a picture stay", paces[1], LINEAR * paces[0], paces[1] <= LINEAR * paces[0])
    most = FLAT * runs[few]["rss_mb"]
    yield mark("memory stays flat", runs[many]["rss_mb"], most, runs[many]["rss_mb"] <= most)


def _size(own: dict[str, Any]) -> Iterator[Mark]:
    size = own["bytes"] / own["size_ratio"]
    limit = next((most for over, most in SIZES if size > over), None)
    if limit is not None:
        yield mark("size ratio", own["size_ratio"], limit, own["size_ratio"] <= limit)
