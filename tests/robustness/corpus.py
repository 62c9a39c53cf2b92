"""Every backend test of the onnx package through `quantize`, `inspect` and `audit`, as it is and with constants.

    python -m tests.robustness.corpus [--shard 1/20] [--folder .corpus] [--limit 60] [NAME ...]

Each model is taken up to three times: as it is; with every input but the first frozen as a constant, so that layers
have weights; and frozen, between two layers with weights that hardly change anything, so that its operators meet
quantized tensors. Its own inputs are the sample for calibration. No command may end in a traceback or without an end,
and every result must load and run in ONNX Runtime. What has run is in FOLDER, and is not run again by the
same code.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx.backend.test.loader import load_model_tests

from tests.robustness.command import ENDS_WELL, Ending, run_command
from tests.robustness.record import Record, survive

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
"""Of `onnx.backend.test`; the kind "real" is whole networks, which `tests.bench.light` measures."""

OWN_PARTS = ("the quantized model", "a part of the model", "onnx's checker does not accept the result")
"""What an error is about that no user can mend."""


@dataclass(frozen=True, slots=True)
class Case:
    """A model with its inputs, by name; None where they are no arrays."""

    name: str
    model: onnx.ModelProto
    feeds: dict[str, NDArray[Any]] | None


def cases() -> Iterator[Case]:
    """All cases, in order, each in up to three variants."""
    for kind in KINDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cases with infinite numbers are computed here
            found = load_model_tests(kind=kind)
        for case in sorted(found, key=lambda case: case.name):
            model = case.model or onnx.load(Path(case.model_dir) / "model.onnx")
            constants = {tensor.name for tensor in model.graph.initializer}
            names = [value.name for value in model.graph.input if value.name not in constants]
            values = case.data_sets[0][0] if case.data_sets else _stored_inputs(Path(case.model_dir), model)
            feeds = _feeds(names, values)
            yield Case(f"{case.name}/as-is", model, feeds)
            if not feeds:
                continue
            first = {names[0]: feeds[names[0]]}
            frozen = _frozen(model, names[1:], feeds) if len(feeds) > 1 else model
            if frozen is not model:
                yield Case(f"{case.name}/frozen", frozen, first)
            if (framed := _between_layers(frozen, names[0], feeds[names[0]])) is not None:
                yield Case(f"{case.name}/between", framed, first)


def _stored_inputs(folder: Path, model: onnx.ModelProto) -> list[Any]:
    kinds = {value.name: value.type.WhichOneof("value") for value in model.graph.input}
    if any(kind != "tensor_type" for kind in kinds.values()):
        return []
    files = sorted((folder / "test_data_set_0").glob("input_*.pb"), key=lambda path: int(path.stem.split("_")[1]))
    return [onnx.numpy_helper.to_array(onnx.load_tensor(str(file))) for file in files]


def _feeds(names: list[str], values: list[Any]) -> dict[str, NDArray[Any]] | None:
    if len(names) != len(values) or not all(isinstance(x, np.ndarray | np.generic | int | float) for x in values):
        return None
    found = {name: np.asarray(value) for name, value in zip(names, values, strict=True)}
    return None if any(array.dtype.kind not in "fiub" for array in found.values()) else found


def _frozen(model: onnx.ModelProto, names: list[str], feeds: dict[str, NDArray[Any]]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    kept = [value for value in copy.graph.input if value.name not in names]
    del copy.graph.input[:]
    copy.graph.input.extend(kept)
    for name in names:
        tensor = onnx.numpy_helper.from_array(feeds[name], name)
        if tensor.data_type != kinds[name]:  # a type that NumPy lacks
            tensor = onnx.helper.make_tensor(name, kinds[name], feeds[name].shape, feeds[name].tobytes(), raw=True)
        copy.graph.initializer.append(tensor)
    return copy


def _between_layers(model: onnx.ModelProto, name: str, x: NDArray[Any]) -> onnx.ModelProto | None:
    """The model behind a layer that reads its input, with a layer behind each output; None where none can stand."""
    if x.dtype != np.float32 or not 2 <= x.ndim <= 5 or x.size == 0:
        return None
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph, inner = copy.graph, f"{name}_inner"
    for node in graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            return None  # bodies read the input by its name
        for index, read in enumerate(node.input):
            node.input[index] = inner if read == name else read
    before = _layer(graph, "before", name, inner, x.shape)
    behind = []
    for value in graph.output:
        sizes = [d.dim_value for d in value.type.tensor_type.shape.dim]
        is_float = value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        if is_float and 2 <= len(sizes) <= 5 and all(sizes) and value.name != name:
            made, value.name = value.name, f"{value.name}_behind"
            behind.append(_layer(graph, f"behind_{made}", made, value.name, sizes))
    graph.node.insert(0, before)
    graph.node.extend(behind)
    return copy


def _layer(graph: onnx.GraphProto, name: str, read: str, made: str, shape: Sequence[int]) -> onnx.NodeProto:
    """A MatMul over the last axis, or a Conv of 1x1 over axis 1, whose weights are nearly the identity."""
    convolves = len(shape) > 2
    size = shape[1] if convolves else shape[-1]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    weight = (np.eye(size) + rng.normal(0, 0.01, (size, size))).astype(np.float32)
    weight = weight.reshape(size, size, *[1] * (len(shape) - 2)) if convolves else weight
    graph.initializer.append(onnx.numpy_helper.from_array(weight, f"{name}_weight"))
    return onnx.helper.make_node("Conv" if convolves else "MatMul", [read, f"{name}_weight"], [made], name=name)


def run_case(case: Case, folder: Path, limit: float) -> dict[str, Any]:
    """Run the commands on a case. Returns what is recorded; `how` is that of the worst of them."""
    path, out, samples = folder / "model.onnx", folder / "out.onnx", folder / "samples"
    path.write_bytes(case.model.SerializeToString())
    samples.mkdir()
    if case.feeds is not None and len(case.feeds) == 1:
        np.save(samples / "sample.npy", next(iter(case.feeds.values())))
    elif case.feeds:
        np.savez(samples / "sample.npz", **case.feeds)
    calib: tuple[object, ...] = ("--calib", samples if case.feeds else "none", "--threads", "1", "--json")
    ends = {"inspect": run_command(("inspect", path, "--json"), limit), "audit": run_command(("audit", path), limit)}
    ends["quantize"] = quantized = run_command(("quantize", path, *calib, "-o", out), limit)
    if quantized.how in ("done", "gate"):
        ends["load"] = _load(out, case.feeds or {})
        ends["audit of the result"] = run_command(("audit", out), limit)
        ends["inspect of the result"] = run_command(("inspect", out), limit)
    if quantized.how == "error" and any(part in quantized.words for part in OWN_PARTS):
        ends["quantize"] = quantized = replace(quantized, how="does not load")
    bad = [f"{name}: {end.words}" for name, end in ends.items() if end.how not in ENDS_WELL]
    return {
        "how": next((end.how for end in ends.values() if end.how not in ENDS_WELL), quantized.how),
        "reason": quantized.reason,
        "words": " | ".join(bad) or quantized.words,
        "sqnr_db": _sqnr(quantized),
        "seconds": round(sum(end.seconds for end in ends.values()), 2),
    }


def _load(out: Path, feeds: dict[str, NDArray[Any]]) -> Ending:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(out), options, providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        if names <= feeds.keys():
            session.run(None, {name: feeds[name] for name in names})
    except Exception as error:  # the runtime raises a dozen types of its own
        return Ending("does not load", str(error)[:300])
    return Ending("done")


def _sqnr(quantized: Ending) -> float | None:
    if quantized.how != "done":
        return None
    found: float | None = json.loads(quantized.out)["verify"].get("sqnr_db")
    return found


def run_shard(record: Record, shard: tuple[int, int], limit: float, names: list[str]) -> None:
    """Run the cases of a shard that have not run. shard: its number from 1, and how many there are."""
    number, count = shard
    for index, case in enumerate(cases()):
        if index % count != number - 1 or (names and not any(name in case.name for name in names)):
            continue
        if record.begin(case.name):
            folder = Path(tempfile.mkdtemp(prefix="corpus_"))
            try:
                record.end(case.name, run_case(case, folder, limit))
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def show(record: Record) -> int:
    """Print how often each ending came, and what must not be. Returns the exit status."""
    for (how, reason), times in record.count("how", "reason").most_common():
        print(f"{times:5d}  {how:14s} {reason or ''}")
    bad = [entry for entry in record.ended.values() if entry["how"] not in ENDS_WELL]
    for entry in bad:
        print(f"{entry['how']}: {entry['item']}: {entry['words']}")
    print(f"{len(record.ended)} cases, {len(bad)} that must not end so.")
    return 1 if bad or not record.ended else 0


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only cases whose names hold one of these")
    parser.add_argument("--shard", default="1/1", help="K/N: every N-th case, from the K-th; default %(default)s")
    parser.add_argument(
        "--folder", type=Path, default=Path(".corpus"), help="where the record is kept; default %(default)s"
    )
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one command; default %(default)s")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.inside:
        status = survive("tests.robustness.corpus", sys.argv[1:])
        return status or show(Record(given.folder, "corpus"))
    number, count = map(int, given.shard.split("/"))
    run_shard(Record(given.folder, "corpus"), (number, count), given.limit, given.names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
