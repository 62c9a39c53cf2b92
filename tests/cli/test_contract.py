"""Options and JSON keys that scripts rely on are still there."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from qconv.cli.main import cli
from tests.support.contract import CONTRACT, json_keys, lost_keys, missing, option_lists

BEFORE = json.loads(CONTRACT.read_text("utf-8"))


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Commands set handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_every_command_has_the_options_that_it_had() -> None:
    assert list(missing(BEFORE["options"], option_lists(cli))) == []


def test_every_json_key_is_still_printed(tmp_path: Path) -> None:
    for name, keys in json_keys(cli, tmp_path):
        assert (name, lost_keys(BEFORE["json"][name], keys)) == (name, [])


def test_what_goes_is_seen() -> None:
    now = copy.deepcopy(BEFORE["options"])
    del now["audit"]["options"]["size"]
    now["quantize"]["options"]["samples"]["default"] = 64
    now["quantize"]["options"]["calibrator"]["choices"].remove("mse")
    now["quantize"]["options"]["recipe"] = {"names": ["--recipe"]}
    assert list(missing(BEFORE["options"], now)) == [
        "/quantize/options/samples/default: 128 became 64",
        "/quantize/options/calibrator/choices: mse",
        "/audit/options/size",
    ]


def test_a_key_that_goes_is_seen() -> None:
    before = ["a", "a.[].b", "a.[].c", "d", "d.e"]
    assert lost_keys(before, {"a", "a.[].b", "d", "f"}) == ["a.[].c"]  # d is null in this run
    assert lost_keys(before, {"a", "d"}) == []
    assert lost_keys(before, {"a", "f"}) == ["d"]
