"""Statistics in files: four shards give the bytes of one run, and another recipe needs no picture."""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest

from qconv.calibration import statistics_file
from qconv.calibration.sketch import SketchBuilder, SketchContents, TensorView
from qconv.cli.main import cli
from qconv.config.data_options import Color, DataOptions, PreprocessingOptions
from qconv.config.recipe import Recipe, make_request
from qconv.errors import QconvError
from qconv.pipeline.quantize import quantize
from tests.support.libraries import runner
from tests.support.models import network

BODY = "c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) d = Conv(r, v) p = GlobalAveragePool(d) y = Flatten(p)"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model, and a dozen pictures."""
    proto = network(BODY, x=("N", 3, 12, 12), w=(8, 3, 3, 3), v=(4, 8, 3, 3))
    onnx.save(proto, tmp_path / "m.onnx")
    (tmp_path / "imgs").mkdir()
    rng = np.random.default_rng(0)
    for index in range(12):
        np.save(tmp_path / "imgs" / f"{index}.npy", rng.standard_normal((3, 12, 12)).astype(np.float32))
    return tmp_path


def run(place: Path, **options: object) -> onnx.ModelProto:
    out = place / "out.onnx"
    options.setdefault("calib", (str(place / "imgs"),))
    quantize(place / "m.onnx", out, *make_request({"rounding": "nearest", **options}))
    return onnx.load(out)


def shards(place: Path, count: int = 4) -> list[str]:
    names = [f"{index}.npy" for index in range(12)]
    written = []
    for index, part in enumerate(np.array_split(names, count)):
        listed = place / f"list{index}.txt"
        listed.write_text("\n".join(f"imgs/{name}" for name in part))
        written.append(str(place / f"shard{index}.npz"))
        run(place, calib=(str(listed),), save_stats=written[-1], batch=1 + index)
    return written


def graph(proto: onnx.ModelProto) -> bytes:
    return proto.graph.SerializeToString(deterministic=True)


def test_four_shards_give_the_bytes_of_one_run(place: Path) -> None:
    """In whatever order they are added, and whatever batch each was run with."""
    run(place, save_stats=str(place / "all.npz"), batch=3)
    parts = shards(place)
    total, twice = statistics_file.merge_statistics(parts[::-1])
    assert twice == 0
    assert statistics_file.serialize_statistics(total) == (place / "all.npz").read_bytes()


@pytest.mark.parametrize("calibrator", ["minmax", "ema", "mean-extremes", "percentile", "entropy", "mse", "output-mse"])
def test_a_file_gives_what_pictures_give(place: Path, calibrator: str) -> None:
    direct = run(place, calibrator=calibrator, activation_bits=6, effort="fast")  # others look at pictures again
    run(place, save_stats=str(place / "s.npz"))
    from_file = run(
        place, calib=(), stats=str(place / "s.npz"), calibrator=calibrator, activation_bits=6, effort="fast"
    )
    assert graph(direct) == graph(from_file)


def test_saving_changes_nothing(place: Path) -> None:
    assert graph(run(place)) == graph(run(place, save_stats=str(place / "s.npz")))


def test_batch_and_order_change_no_byte(place: Path) -> None:
    out = place / "out.onnx"
    run(place, calibrator="mse")
    first = out.read_bytes()
    run(place, calibrator="mse", batch=4)
    assert out.read_bytes() == first
    other = place / "renamed"
    other.mkdir()
    for index, path in enumerate(sorted((place / "imgs").iterdir(), reverse=True)):
        (other / f"{index:02}.npy").write_bytes(path.read_bytes())
    run(place, calibrator="mse", calib=(str(other),))
    assert out.read_bytes() == first


def test_the_file_comes_back(place: Path) -> None:
    run(place, save_stats=str(place / "s.npz"))
    data = (place / "s.npz").read_bytes()
    assert statistics_file.serialize_statistics(statistics_file.parse_statistics(data, "s.npz")) == data
    found = statistics_file.read_statistics(place / "s.npz")
    assert (found.pictures, found.name, found.preprocessing) == (12, "m.onnx", None)
    assert np.load(place / "s.npz")["0/keys"].shape == (12,)


def test_without_pictures_nothing_is_measured(place: Path) -> None:
    run(place, save_stats=str(place / "s.npz"))
    report, _ = quantize(place / "m.onnx", place / "out.onnx", Recipe(stats=str(place / "s.npz")))
    assert report.verify.images == 0
    assert report.verify.sqnr_db is None
    assert report.audit.integer
    checked, _ = quantize(
        place / "m.onnx", place / "out.onnx", Recipe(stats=str(place / "s.npz")), DataOptions((str(place / "imgs"),))
    )
    assert checked.verify.images == 12


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_another_model_is_refused(place: Path) -> None:
    run(place, save_stats=str(place / "s.npz"))
    proto = network(BODY, x=("N", 3, 12, 12), w=(8, 3, 3, 3), v=(4, 8, 3, 3))
    proto.graph.initializer[0].raw_data = b"\0" * len(proto.graph.initializer[0].raw_data)
    onnx.save(proto, place / "other.onnx")
    with pytest.raises(QconvError, match=r"s\.npz is of another model \(m\.onnx\)"):
        quantize(place / "other.onnx", place / "out2.onnx", Recipe(stats=str(place / "s.npz")))
    assert not (place / "out2.onnx").exists()


def test_another_preprocessing_is_refused(place: Path) -> None:
    from PIL import Image

    (place / "pngs").mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (12, 12, 3), np.uint8)
        Image.fromarray(pixels).save(place / "pngs" / f"{index}.png")
    unit = PreprocessingOptions(preset="unit")
    run(place, calib=(str(place / "pngs"),), save_stats=str(place / "s.npz"), preprocessing=unit)
    known = {"stats": str(place / "s.npz")}
    for calib in ((), (str(place / "pngs"),)):
        with pytest.raises(QconvError, match=r"another preprocessing .mean .* and .*, std"):
            run(place, calib=calib, preprocessing=PreprocessingOptions(preset="imagenet"), **known)
        run(place, calib=calib, preprocessing=unit, **known)
        run(place, calib=calib, preprocessing=PreprocessingOptions(color=Color.RGB), **known)  # the rest is as it was
        report, _ = quantize(
            place / "m.onnx", place / "out.onnx", Recipe(rounding="nearest", **known), DataOptions(calib)
        )  # type: ignore[arg-type]
        assert report.preprocessing is not None
        assert report.preprocessing["preset"] == "unit"
    with pytest.raises(QconvError, match="ready-made samples"):
        run(place, **known)
    with pytest.raises(QconvError, match=r"another preprocessing .color rgb and bgr"):
        run(place, calib=(), preprocessing=PreprocessingOptions(color=Color.BGR), **known)


def test_tensors_that_were_not_watched_are_named(place: Path) -> None:
    run(place, save_stats=str(place / "s.npz"), keep_float=("c",))
    with pytest.raises(QconvError, match=r"s\.npz lacks 1 tensor .* such as x"):
        run(place, calib=(), stats=str(place / "s.npz"))


def test_shards_of_different_kinds_do_not_add_up(place: Path) -> None:
    parts = shards(place, 2)
    run(place, save_stats=str(place / "less.npz"), keep_float=("c",))
    with pytest.raises(QconvError, match="do not add up: they watched different tensors"):
        statistics_file.merge_statistics([parts[0], str(place / "less.npz")])


def damaged(data: bytes) -> list[bytes]:
    return [b"", b"PK", data[: len(data) // 2], data[:100] + b"\xff" * 50 + data[150:], b"x" * 1000]


def bomb() -> bytes:
    """A header as it should be, and 64 MB of zeros in 64 kB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", json.dumps({"schema": statistics_file.SCHEMA, "tensors": ["x"]}))
        with archive.open("0/lows.npy", "w", force_zip64=True) as file:
            file.write(bytes(1 << 26))
    return buffer.getvalue()


def test_statistics_are_not_unpacked_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_file, "MOST_UNPACKED_BYTES", 1 << 25)
    data = bomb()
    tracemalloc.start()
    try:
        with pytest.raises(QconvError, match=r"s.npz unpacks to 67.11 MB, more than the 33.55 MB"):
            statistics_file.parse_statistics(data, "s.npz")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_want_of_memory_is_not_called_damage(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise MemoryError

    run(place, save_stats=str(place / "s.npz"))
    monkeypatch.setattr(statistics_file, "_read_sketch", full)
    with pytest.raises(QconvError, match="more memory than there is"):
        statistics_file.read_statistics(place / "s.npz")


def test_what_is_no_statistics_is_refused(place: Path) -> None:
    run(place, save_stats=str(place / "s.npz"))
    for data in damaged((place / "s.npz").read_bytes()):
        with pytest.raises(QconvError, match="holds no statistics of qconv"):
            statistics_file.parse_statistics(data, "s.npz")
    with pytest.raises(QconvError, match="cannot be read"):
        statistics_file.read_statistics(place / "nowhere.npz")


@pytest.mark.parametrize("part", ["lows", "keys", "pictures", "columns", "sums"])
def test_parts_of_another_shape_are_refused(place: Path, part: str) -> None:
    run(place, save_stats=str(place / "s.npz"))
    with zipfile.ZipFile(place / "s.npz") as old, zipfile.ZipFile(place / "t.npz", "w") as new:
        for name in old.namelist():
            if name != f"0/{part}.npy":
                new.writestr(name, old.read(name))
        with new.open(f"0/{part}.npy", "w") as file:
            np.lib.format.write_array(file, np.zeros((5, 5, 5), np.float32))
    with pytest.raises(QconvError, match="holds no statistics"):
        statistics_file.read_statistics(place / "t.npz")


CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a huge count": lambda parts: parts.update(count=np.array([2**63 - 1])),
    "a negative count": lambda parts: parts.update(count=-parts["count"]),
    "a count of one": lambda parts: parts.update(count=np.array([1])),  # the mean is the sum
    "huge sums": lambda parts: parts["sums"].__setitem__(-1, 2**62),
    "sums beyond their digits": lambda parts: parts["sums"].__setitem__(0, 2**40),
    "extremes the wrong way round": lambda parts: parts.update(lows=parts["highs"] + 1),
    "an infinite extreme": lambda parts: parts["highs"].__setitem__(0, np.inf),
    "huge bins": lambda parts: parts["counts"].__setitem__(0, 2**60),
}


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_numbers_that_contradict_each_other_are_refused(place: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """No pictures can have given them: they would be taken for ranges and means without a word."""
    run(place, save_stats=str(place / "s.npz"))
    found = statistics_file.read_statistics(place / "s.npz")
    name = next(name for name, sketch in found.sketches.items() if sketch.count and abs(sketch.means).max() > 0.2)
    parts = {part: np.array(array) for part, array in statistics_file.sketch_to_arrays(found.sketches[name]).items()}
    change(parts)
    found = replace(found, sketches={**found.sketches, name: statistics_file.sketch_from_arrays(parts)})
    with pytest.raises(QconvError, match="holds no statistics"):
        statistics_file.parse_statistics(statistics_file.serialize_statistics(found), "s.npz")


def test_sums_of_large_maps_are_not_refused() -> None:
    """Float32 sums of a plane of one number are off by some tenths of a percent, which no range hides."""
    view = TensorView(
        lows=np.float32([0.1]),
        highs=np.float32([0.1]),
        sums=np.float32([0.1 * 2048**2 * (1 + 5e-3)]),
        count=2048**2,
        sample=np.full((1, 8), 0.1, np.float32),
    )
    builder = SketchBuilder(SketchContents.ALL)
    builder.add(view, key=1)
    found = statistics_file.Statistics("m", "m.onnx", None, None, {"x": builder.sketch()})
    assert statistics_file.parse_statistics(statistics_file.serialize_statistics(found), "s.npz").sketches["x"].count


def test_another_schema_is_told(place: Path) -> None:
    run(place, save_stats=str(place / "s.npz"))
    with zipfile.ZipFile(place / "s.npz") as old, zipfile.ZipFile(place / "t.npz", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data.replace(b'"schema": 1', b'"schema": 9') if name == "header.json" else data)
    with pytest.raises(QconvError, match="another version"):
        statistics_file.read_statistics(place / "t.npz")


# -- the command line --------------------------------------------------------------------------------------------------


def call(*arguments: str) -> tuple[int, str]:
    done = runner().invoke(cli, list(arguments), standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return int(done.return_value or 0), done.stdout


def test_merge_stats_says_what_it_did(place: Path) -> None:
    parts = shards(place, 3)
    status, text = call("merge-stats", *parts, "-o", str(place / "sum.npz"), "--json")
    assert status == 0
    found = json.loads(text)
    assert (found["pictures"], found["repeated"], found["tensors"]) == (12, 0, 4)
    assert statistics_file.read_statistics(place / "sum.npz").pictures == 12


def test_a_sum_needs_a_file(place: Path) -> None:
    with pytest.raises(click.UsageError, match="cannot be written to standard output"):
        call("merge-stats", *shards(place, 2), "-o", "-")


def test_pictures_that_come_twice_are_told(place: Path) -> None:
    parts = shards(place, 3)
    _, text = call("merge-stats", parts[0], parts[1], parts[0], "-o", str(place / "sum.npz"), "--json", "--quiet")
    assert json.loads(text)["repeated"] == 4


@pytest.mark.parametrize("option", [{"samples": 5}, {"seed": 1}, {"glob": "*.png"}])
def test_options_of_pictures_need_pictures(option: dict[str, object]) -> None:
    with pytest.raises(QconvError, match="with --stats alone"):
        make_request({"stats": "s.npz", **option})
    make_request({"stats": "s.npz", "calib": ("imgs",), **option})


def test_where_nothing_is_seen_nothing_is_saved(place: Path) -> None:
    with pytest.raises(QconvError, match="nothing for --save-stats"):
        run(place, save_stats=str(place / "s.npz"), activation_bits=32)
    assert not (place / "s.npz").exists()


def test_nothing_is_written_where_a_file_is_bad(place: Path) -> None:
    (place / "bad.npz").write_bytes(b"no")
    before = sorted(place.iterdir())
    with pytest.raises(QconvError, match=r"bad\.npz"):
        call("merge-stats", str(place / "bad.npz"), "-o", str(place / "sum.npz"))
    with pytest.raises(QconvError, match=r"bad\.npz"):
        call("quantize", str(place / "m.onnx"), "--stats", str(place / "bad.npz"))
    assert sorted(place.iterdir()) == before


def test_statistics_are_not_written_where_the_model_is(place: Path) -> None:
    for target in ("m.onnx", "out.onnx"):
        with pytest.raises(QconvError, match=r"model itself|both the output"):
            run(place, save_stats=str(place / target))
    assert onnx.load(place / "m.onnx").graph.node


def test_all_that_can_be_wanted_is_saved(place: Path) -> None:
    """Of what layers read; a histogram of everything."""
    run(place, save_stats=str(place / "s.npz"))
    sketches = statistics_file.read_statistics(place / "s.npz").sketches
    assert all(sketch.counts.any() for sketch in sketches.values())
    for name in ("x", "r"):
        assert sketches[name].columns.size
        assert sketches[name].count
