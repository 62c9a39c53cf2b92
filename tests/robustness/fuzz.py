"""Damaged files through every command that reads them, by seed.

    python -m tests.robustness.fuzz [--seeds 0-99] [--examples 100] [--folder .fuzz]

hypothesis draws what is damaged and how: bytes, fields of the protobuf, external data, metadata, statistics, samples,
recipes. No command may end in a traceback or without an end, take more than MOST_BYTES of memory, or leave a file
behind that it did not finish. What is found is shrunk and kept in FOLDER, a line a seed; a seed that has run is not run
again by the same code. `FOLDER/last` holds the files of the last example, in case the process dies of them.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from PIL import Image

from tests.robustness.command import ENDS_WELL, run_command
from tests.robustness.record import Record, survive
from tests.support.models import network

MOST_BYTES = 2**30
ADDRESS_SPACE = 2**34
"""A limit for the process, so that a model that asks for a terabyte does not take the machine with it."""

LIMIT = 60.0
"""Seconds for one command."""

FAST = ("--effort", "fast", "--threads", "1", "--preprocess", "unit", "--quiet")

WEIGHTS = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 1, 3, 3), "w3": (8, 8, 1, 1), "w4": (8, 4)}

BODY = """
    c1 = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w1, b1)  r1 = Relu(c1)
    c2 = Conv<pads=[1,1,1,1], group=8>(r1, w2)  r2 = Relu(c2)
    c3 = Conv(r2, w3)  s = Add(c3, r1)  p = GlobalAveragePool(s)  f = Flatten(p)  y = MatMul(f, w4)
"""


def write_base(folder: Path) -> None:
    """Write one valid file of each kind."""
    proto = network(BODY, x=("N", 3, 8, 8), **WEIGHTS)
    onnx.save(proto, folder / "float.onnx")
    onnx.save(
        network(BODY, x=("N", 3, 8, 8), **WEIGHTS),
        folder / "external.onnx",
        save_as_external_data=True,
        location="external.data",
        size_threshold=0,
    )
    pictures, samples = folder / "pictures", folder / "samples"
    pictures.mkdir()
    samples.mkdir()
    rng = np.random.default_rng(0)
    for index in range(3):
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{index}.png")
        np.savez(samples / f"{index}.npz", x=rng.normal(size=(3, 8, 8)).astype(np.float32))
    stats, recipe = folder / "seen.npz", folder / "recipe.toml"
    run = (
        ("quantize", folder / "float.onnx", "--calib", pictures, "-o", folder / "quantized.onnx", *FAST)
        + ("--save-stats", stats, "--save-recipe", recipe),
        ("quantize", folder / "float.onnx", "--calib", pictures, "-o", folder / "packed.onnx", *FAST)
        + ("--weight-bits", "4", "--weight-granularity", "per-block", "--pack"),
    )
    for arguments in run:
        ending = run_command(arguments)
        assert ending.how == "done", ending


def commands(name: str, place: Path) -> list[tuple[object, ...]]:
    """The commands that read a file of this name."""
    whole, pictures, out = place / "float.onnx", place / "pictures", place / "out.onnx"
    path = place / name
    quantize = ("quantize", "-o", out, *FAST)
    found: dict[str, list[tuple[object, ...]]] = {
        "model": [
            ("inspect", path, "--quiet"),
            ("audit", path, "--quiet"),
            (*quantize, path, "--calib", pictures),
            ("quantize", path, "-o", out, "--calib", pictures, "--threads", "1", "--quiet"),
            (*quantize, path, "--calib", "none"),
            ("evaluate", path, "--images", pictures, "--threads", "1", "--quiet"),
            ("diagnose", path, "--calib", pictures, "--preprocess", "unit", "--threads", "1", "--quiet"),
        ],
        "quantized": [
            ("inspect", path, "--quiet"),
            ("audit", path, "--quiet"),
            ("compare", whole, path, "--images", pictures, "--threads", "1", "--quiet"),
            ("evaluate", path, "--images", pictures, "--against", whole, "--threads", "1", "--quiet"),
            ("quantize", whole, "--calib", pictures, "--recipe", path, "-o", out, "--threads", "1", "--quiet"),
        ],
        "stats": [
            (*quantize, whole, "--stats", path),
            ("merge-stats", path, place / "again.npz", "-o", place / "out.npz", "--quiet"),
        ],
        "sample": [(*quantize, whole, "--calib", place / "samples")],
        "picture": [(*quantize, whole, "--calib", pictures)],
        "recipe": [(*quantize, whole, "--calib", pictures, "--recipe", path)],
    }
    return found[KINDS[name]]


KINDS = {
    "float.onnx": "model",
    "external.onnx": "model",
    "external.data": "data",
    "quantized.onnx": "quantized",
    "packed.onnx": "quantized",
    "seen.npz": "stats",
    "samples/1.npz": "sample",
    "pictures/1.png": "picture",
    "recipe.toml": "recipe",
}

# -- what is damaged, and how ---------------------------------------------------------------------------------------

Damage = Callable[[DataObject, bytes], bytes]

NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 7, 127, 128, 255, 2**15, 2**31 - 1, -(2**31), 2**40, 2**63 - 1, -(2**63)])
WORDS = st.sampled_from(
    ["", "x", "y", "w1", "Conv", "Loop", "\0", "a" * 300, "../../etc", "é\n", "qconv.recipe"]
) | st.text(st.characters(codec="utf-8"), max_size=12)
REALS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 1e38, float("inf"), float("-inf"), float("nan")]) | st.floats(
    width=32
)


def damage_bytes(data: DataObject, content: bytes) -> bytes:
    """Overwrite, insert, remove or double a run of bytes, or cut the file off."""
    found = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(found) - 1)))
        run = data.draw(st.binary(min_size=1, max_size=8))
        how = data.draw(st.sampled_from(["overwrite", "insert", "remove", "double", "cut"]))
        if how == "overwrite":
            found[at : at + len(run)] = run
        elif how == "insert":
            found[at:at] = run
        elif how == "remove":
            del found[at : at + data.draw(st.integers(1, 64))]
        elif how == "double":
            found[at:at] = found[at : at + data.draw(st.integers(1, 64))]
        else:
            del found[at:]
    return bytes(found)


def damage_fields(data: DataObject, content: bytes) -> bytes:
    """Change one to three fields of the protobuf, whatever they mean."""
    model = onnx.ModelProto.FromString(content)
    for _ in range(data.draw(st.integers(1, 3))):
        _damage_message(data, model)
    return model.SerializeToString()


def _damage_message(data: DataObject, message: Message) -> None:
    while True:
        fields = [field for field, _ in message.ListFields()]
        if not fields:
            return
        field = data.draw(st.sampled_from(fields), label="field")
        held = getattr(message, field.name)
        if not field.is_repeated:
            if field.type == FieldDescriptor.TYPE_MESSAGE and data.draw(st.integers(0, 9)):
                message = held
                continue
            _damage_single(data, message, field)
            return
        index = data.draw(st.integers(0, len(held) - 1), label="index")
        if field.type == FieldDescriptor.TYPE_MESSAGE and data.draw(st.integers(0, 4)):
            message = held[index]
            continue
        _damage_repeated(data, held, index, field)
        return


def _damage_single(data: DataObject, message: Message, field: FieldDescriptor) -> None:
    if field.type == FieldDescriptor.TYPE_MESSAGE or data.draw(st.integers(0, 4)) == 0:
        message.ClearField(field.name)
        return
    _set(lambda value: setattr(message, field.name, value), _drawn(data, field))


def _damage_repeated(data: DataObject, held: Any, index: int, field: FieldDescriptor) -> None:
    is_message = field.type == FieldDescriptor.TYPE_MESSAGE
    how = data.draw(st.sampled_from(["remove", "double", "swap", "set"]), label="how")
    if how == "remove":
        del held[index]
    elif how == "double":
        held.extend([held[index]])
    elif how == "swap" or is_message:
        values = list(held)
        other = data.draw(st.integers(0, len(values) - 1))
        if is_message:
            values = [type(value).FromString(value.SerializeToString()) for value in values]
        values[index], values[other] = values[other], values[index]
        del held[:]
        held.extend(values)
    else:
        _set(lambda value: held.__setitem__(index, value), _drawn(data, field))


def _set(put: Callable[[Any], None], value: Any) -> None:
    try:
        put(value)
    except (ValueError, TypeError):  # no such number in an enumeration, or too large for the field
        return


def _drawn(data: DataObject, field: FieldDescriptor) -> Any:
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return data.draw(REALS)
    if field.type == FieldDescriptor.TYPE_STRING:
        return data.draw(WORDS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return data.draw(st.binary(max_size=64))
    return data.draw(NUMBERS | st.integers(0, 32))


def damage_metadata(data: DataObject, content: bytes) -> bytes:
    """Change what the file says of itself."""
    model = onnx.ModelProto.FromString(content)
    if not model.metadata_props:
        return damage_fields(data, content)
    entry = data.draw(st.sampled_from(list(model.metadata_props)))
    text = bytearray(entry.value.encode())
    at = data.draw(st.integers(0, max(0, len(text) - 1)))
    text[at : at + data.draw(st.integers(0, 12))] = data.draw(
        st.sampled_from([b"", b"null", b"[]", b"{}", b'"', b"1e999", b"-1", b"9" * 40, b"NaN", b"true", b"[[[["])
    )
    entry.value = text.decode("utf-8", "replace")
    return model.SerializeToString()


def damage_external(data: DataObject, content: bytes) -> bytes:
    """Change where a tensor says that its numbers lie."""
    model = onnx.ModelProto.FromString(content)
    tensors = [tensor for tensor in model.graph.initializer if tensor.external_data]
    if not tensors:
        return damage_fields(data, content)
    tensor = data.draw(st.sampled_from(tensors))
    entry = data.draw(st.sampled_from(list(tensor.external_data)))
    if data.draw(st.booleans()):
        entry.key = data.draw(st.sampled_from(["location", "offset", "length", "checksum", "", "basepath"]))
    entry.value = data.draw(
        WORDS
        | NUMBERS.map(str)
        | st.sampled_from(["external.data", "external.onnx", "./external.data", "missing", "1e3", "0x10"])
    )
    return model.SerializeToString()


def damage_arrays(data: DataObject, content: bytes) -> bytes:
    """Change an array of an .npz: its numbers, type or shape; remove it, or rename it."""
    place = Path(tempfile.mkdtemp(prefix="fuzz_npz_"))
    try:
        (place / "a.npz").write_bytes(content)
        with np.load(place / "a.npz", allow_pickle=False) as held:
            arrays: dict[str, Any] = {name: x for name, x in held.items() if isinstance(x, np.ndarray)}
        name = data.draw(st.sampled_from(sorted(arrays)))
        x = arrays.pop(name)
        how = data.draw(st.sampled_from(["remove", "rename", "type", "shape", "numbers", "empty", "text"]))
        if how == "rename":
            arrays[data.draw(st.sampled_from(["", "a", name + "2", *sorted(arrays)[:3]]))] = x
        elif how == "type":
            arrays[name] = _cast(x, data.draw(st.sampled_from(["f8", "f4", "i8", "u1", "?", "c8", "f2", "S3", "U2"])))
        elif how == "shape":
            arrays[name] = np.resize(x, data.draw(st.lists(st.integers(0, 5), max_size=5)))
        elif how == "numbers":
            arrays[name] = _with_number(x, data.draw(REALS | NUMBERS), data.draw(st.integers(0, 10**6)))
        elif how == "empty":
            arrays[name] = x.reshape(-1)[:0]
        elif how == "text":
            arrays[name] = np.array(data.draw(WORDS))
        np.savez(place / "b.npz", **arrays)
        return (place / "b.npz").read_bytes()
    finally:
        shutil.rmtree(place)


def _cast(x: np.ndarray, kind: str) -> np.ndarray:
    try:
        with np.errstate(all="ignore"):
            return x.astype(kind)
    except (ValueError, TypeError):
        return np.zeros(x.shape, kind)


def _with_number(x: np.ndarray, number: float, at: int) -> np.ndarray:
    y = x.copy()
    if y.size and y.dtype.kind in "fiu":
        try:
            with np.errstate(all="ignore"):
                y.reshape(-1)[at % y.size] = number
        except (OverflowError, ValueError):
            return y
    return y


def damage_header(data: DataObject, content: bytes) -> bytes:
    """Let the header of the first array in an .npz claim a huge shape. The checksum of the entry is left wrong."""
    at = content.find(b"'shape': (")
    if at < 0:
        return damage_bytes(data, content)
    sizes = data.draw(st.sampled_from([b"(9999999999,", b"(1000000, 10", b"(-1,)       "]))
    return content[: at + 9] + sizes + content[at + 9 + len(sizes) :]


WAYS: Mapping[str, tuple[Damage, ...]] = {
    "model": (damage_bytes, damage_fields, damage_fields, damage_fields, damage_external),
    "quantized": (damage_bytes, damage_fields, damage_fields, damage_metadata, damage_metadata),
    "stats": (damage_bytes, damage_arrays, damage_arrays, damage_header),
    "sample": (damage_bytes, damage_arrays, damage_header),
    "picture": (damage_bytes,),
    "data": (damage_bytes,),
    "recipe": (damage_bytes,),
}

# -- one example ----------------------------------------------------------------------------------------------------


def try_once(data: DataObject, base: Path, last: Path) -> str:
    """Damage a file and run a command on it. Returns how that ended. Raises AssertionError with what must not be."""
    name = data.draw(st.sampled_from(sorted(KINDS)), label="file")
    damage = data.draw(st.sampled_from(WAYS[KINDS[name]]))
    content = damage(data, (base / name).read_bytes())
    shutil.rmtree(last, ignore_errors=True)
    shutil.copytree(base, last)
    shutil.copy(base / "seen.npz", last / "again.npz")
    (last / name).write_bytes(content)
    read = "external.onnx" if name == "external.data" else name
    arguments = data.draw(st.sampled_from(commands(read, last)), label="command")
    before = _listing(last)
    (last.parent / "last.json").write_text(json.dumps([str(argument) for argument in arguments]))
    ending = run_command(arguments, LIMIT)
    told = f"{damage.__name__} of {name}, {' '.join(map(str, arguments))}: "
    assert ending.how in ENDS_WELL, told + f"{ending.how}: {ending.words}"
    made = _listing(last) - before
    allowed = {"out.onnx", "out.npz", "out.onnx.data"} if ending.how in ("done", "gate") else set()
    assert made <= allowed, told + f"left {sorted(made - allowed)}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak <= MOST_BYTES, told + f"took {peak / 2**20:.0f} MiB"
    return ending.how


def _listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def run_seed(number: int, examples: int, base: Path, last: Path) -> dict[str, Any]:
    """Run as many examples from this seed. Returns what is recorded."""
    ends: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.data())
    def example(data: DataObject) -> None:
        ends[try_once(data, base, last)] += 1

    try:
        example()
    except AssertionError as fault:
        return {"how": "fault", "words": str(fault)[:900]}
    except BaseExceptionGroup as faults:
        return {"how": "fault", "words": " || ".join(str(fault)[:500] for fault in faults.exceptions)}
    return {"how": "done", "words": "", "ends": ends}


def run_seeds(record: Record, seeds: range, examples: int) -> None:
    """Run the seeds that have not run."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, resource.getrlimit(resource.RLIMIT_AS)[1]))
    base = Path(tempfile.mkdtemp(prefix="fuzz_"))
    try:
        write_base(base)
        for number in seeds:
            item = f"{number} x {examples}"
            if record.begin(item):
                record.end(item, run_seed(number, examples, base, record.path.parent / "last"))
    finally:
        shutil.rmtree(base, ignore_errors=True)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0-99", help="A-B, both included, or one; default %(default)s")
    parser.add_argument("--examples", type=int, default=100, help="of each seed; default %(default)s")
    parser.add_argument(
        "--folder", type=Path, default=Path(".fuzz"), help="where the record is kept; default %(default)s"
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given_options = parser.parse_args()
    first, _, last = given_options.seeds.partition("-")
    if not given_options.inside:
        status = survive("tests.robustness.fuzz", sys.argv[1:])
        record = Record(given_options.folder, "fuzz")
        bad = [entry for entry in record.ended.values() if entry["how"] != "done"]
        for entry in bad:
            print(f"seed {entry['item']}: {entry['how']}: {entry['words']}")
        ends = sum((Counter(entry.get("ends", {})) for entry in record.ended.values()), Counter())
        print(f"{len(record.ended)} seeds, {sum(ends.values())} examples {dict(ends)}, {len(bad)} seeds with faults.")
        return status or (1 if bad else 0)
    given_options.folder.mkdir(parents=True, exist_ok=True)
    run_seeds(Record(given_options.folder, "fuzz"), range(int(first), int(last or first) + 1), given_options.examples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
