"""Runs models in ONNX Runtime, and turns its errors into a QconvError that says what to do.

This is the only module that imports onnxruntime. `Session` loads one model and runs it, quietly; `make_random_inputs`
gives inputs to models that are run for their time and not for their results.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qconv.config.tasks import NO_TASKS, Tasks
from qconv.errors import QconvError, format_shape
from qconv.runtime.output_origins import OutputOrigin
from qconv.runtime.outputs import ModelOutput, OutputKind

ELEMENT_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(uint16)": np.uint16,
    "tensor(int16)": np.int16,
    "tensor(uint32)": np.uint32,
    "tensor(int32)": np.int32,
    "tensor(uint64)": np.uint64,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}

FLOAT_TYPES = frozenset({"tensor(float)", "tensor(float16)", "tensor(double)", "tensor(bfloat16)"})

RUNTIME_VERSION: str = ort.__version__

OLDEST_OPSET = 7
"""The oldest one that ONNX Runtime runs."""

FATAL_ONLY = 4

KERNEL_TIME_SUFFIX = "_kernel_time"


class _Inference(ort.InferenceSession):  # type: ignore[misc]
    """Without a second try, which prints errors to stdout; that may be carrying the result.

    Newer ones take a word for that, older ones set it whatever they are told.
    """

    @property
    def _enable_fallback(self) -> bool:
        return False

    @_enable_fallback.setter
    def _enable_fallback(self, wish: bool) -> None:
        pass


@dataclass(slots=True)
class _OutputBuffers:
    """Output buffers for inputs of one shape."""

    key: tuple[Any, ...]
    io: ort.IOBinding
    buffers: list[NDArray[Any]]


class Session:
    """One loaded model.

    model: a path or the file's bytes. optimize: False runs the nodes one by one, as the standard defines them.
    threads: None for as many as the machine has. at_once: how many runs shall share them, each with its part; fewer
    where there are fewer threads. save_optimized: where to write the graph that will really run. alone: no other
    session takes turns with it, so its threads may spin while they wait for each other, as the runtime's default is.
    profile: the beginning of the name of a file for the times of single nodes, written by `node_times`.
    integer_kernels: False computes between dequantizers and quantizers in float, with all other optimizations.
    origins: what computes the outputs, where that is known; tasks: what the user says of the model. Both decide
    what outputs hold.
    Raises QconvError where ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: str | bytes,
        *,
        name: str = "the model",
        optimize: bool = True,
        threads: int | None = None,
        at_once: int = 1,
        save_optimized: Path | None = None,
        alone: bool = False,
        profile: Path | None = None,
        integer_kernels: bool = True,
        origins: Mapping[str, OutputOrigin] | None = None,
        tasks: Tasks = NO_TASKS,
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = FATAL_ONLY
        options.enable_mem_pattern = False
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
        if at_once > 1:
            threads = threads or os.cpu_count() or 1
            at_once = min(at_once, threads)
            threads //= at_once
        if threads is not None:
            options.intra_op_num_threads = threads
        self.at_once = at_once
        # Sessions take turns; a pool that spins after its turn would slow the next one.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not alone:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not integer_kernels:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
        if save_optimized is not None:
            options.optimized_model_filepath = str(save_optimized)
            # weights beside it: only the graph is of interest, and a protobuf holds no more than 2 GB
            data = f"{save_optimized.name}.data"
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data)
        self.name = name
        if isinstance(model, str) and not _is_utf8(model):
            model = Path(model).read_bytes()
        try:
            self._session = _Inference(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime raises a dozen types of its own
            raise _load_error(name, error) from None
        self.outputs: list[str] = [output.name for output in self._session.get_outputs()]
        self._own = threading.local()
        self.tasks = tasks
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.model_outputs = self._describe_outputs(origins or {}, tasks)

    def _describe_outputs(self, origins: Mapping[str, OutputOrigin], tasks: Tasks) -> tuple[ModelOutput, ...]:
        image = next((_open_shape(value.shape) for value in self._session.get_inputs()), ())
        task = self.metadata.get("task", "")
        return tuple(
            ModelOutput(
                o.name, o.type in FLOAT_TYPES, _open_shape(o.shape), image, origins.get(o.name), tasks.of(o.name), task
            )
            for o in self._session.get_outputs()
        )

    @property
    def output_types(self) -> dict[str, tuple[str, tuple[int | None, ...]]]:
        """Type in the runtime's word, such as `tensor(float)`, and shape of each output; () for unknown ranks, too."""
        return {
            output.name: (output.type, tuple(d if isinstance(d, int) and d >= 0 else None for d in output.shape))
            for output in self._session.get_outputs()
        }

    @property
    def gives_class_scores(self) -> bool:
        """Whether an output holds class scores, one or more a picture."""
        return any(output.kind is OutputKind.CLASS_SCORES for output in self.model_outputs)

    @property
    def inputs(self) -> list[tuple[str, np.dtype[Any], tuple[int | None, ...]]]:
        """Name, element type and shape (None where open) of every input.

        Raises QconvError for an input that is no tensor of numbers.
        """
        found = []
        for value in self._session.get_inputs():
            if value.type not in ELEMENT_TYPES:
                raise QconvError(
                    f"Input {value.name!r} of {self.name} is a {value.type}, not a picture.",
                    "export the model without its decoding step.",
                )
            found.append((value.name, np.dtype(ELEMENT_TYPES[value.type]), _open_shape(value.shape)))
        return found

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The named outputs. Raises QconvError where the input does not suit the model."""
        if not outputs:  # to the runtime an empty list means all of them
            return []
        try:
            found = self._session.run(list(outputs), dict(feeds))
        except Exception as error:  # as above
            if "zero point of per-channel filter must be same" in str(error):
                raise QconvError(
                    f"{self.name} has weights whose channels have zero points of their own, for which ONNX Runtime "
                    f"{RUNTIME_VERSION} is too old.",
                    "install onnxruntime 1.28 or newer, or quantize with --weight-scheme symmetric.",
                ) from None
            raise QconvError(
                f"{self.name} cannot be run on these pictures: {_runtime_message(error)}",
                "check --size, --layout and --batch against the model's input.",
            ) from None
        # a tensor without axes comes as a number
        return [np.asarray(array) if isinstance(array, np.generic) else array for array in found]

    def run_all(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """All outputs, in the model's order."""
        return self.run(self.outputs, feeds)

    def node_times(self) -> dict[str, tuple[str, list[float]]]:
        """Operator and times in us of every run so far, by node name in the optimized graph. Ends profiling."""
        file = Path(self._session.end_profiling())
        events = json.loads(file.read_text())
        file.unlink()
        found: dict[str, tuple[str, list[float]]] = {}
        for event in events:
            name, kernel, _ = event["name"].partition(KERNEL_TIME_SUFFIX)
            if event.get("cat") == "Node" and kernel:
                found.setdefault(name, (event["args"]["op_name"], []))[1].append(float(event["dur"]))
        return found

    def run_into_buffers(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Like `run`, but the arrays are overwritten by the next call from the same thread.

        Fresh memory for dozens of large tensors at every run costs as much as a third of the network.
        """
        key = (tuple(outputs), *((name, array.shape, array.dtype) for name, array in feeds.items()))
        binding: _OutputBuffers | None = getattr(self._own, "binding", None)
        if binding is None or binding.key != key:
            found = self.run(outputs, feeds)
            self._own.binding = binding = _OutputBuffers(key, self._session.io_binding(), found)
            for name, buffer in zip(outputs, found, strict=True):
                binding.io.bind_output(name, "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
            return found
        for name, array in feeds.items():
            binding.io.bind_cpu_input(name, np.ascontiguousarray(array))
        try:
            self._session.run_with_iobinding(binding.io)
        except Exception:  # a tensor whose shape depends on the data no longer fits its buffer
            self._own.binding = None
            return self.run(outputs, feeds)
        return binding.buffers


def _is_utf8(path: str) -> bool:
    """Whether ONNX Runtime and onnx take this path; file systems allow any bytes in names."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _open_shape(shape: Sequence[int | str | None]) -> tuple[int | None, ...]:
    return tuple(d if isinstance(d, int) and d > 0 else None for d in shape)


OWN_MODELS = ("a part of", "the folded float model", "the quantized model", "the first layers")
"""How models are called that qconv has made: where the runtime refuses one, the user's file is not to blame."""

OWN_HINT = "this is a fault of qconv, not of the file: report it; --effort fast or --keep-float NODE may get by."

LOAD_HINTS: Mapping[str, str] = {
    "Unsupported model IR version": "install a newer onnxruntime, or export with a lower ir_version.",
    "guarantees* support for models stamped": "install a newer onnxruntime, or export at a lower opset.",
    "Type Error": "make its element types agree where this says, by a Cast, and export it again.",
    "not acyclic": "export it again: a node must not read what depends on its own result.",
    "is not a graph input, initializer, or output": "export it again: what this node reads is computed nowhere.",
}
"""What to do, by what the runtime says."""


def _load_error(name: str, error: Exception) -> QconvError:
    text = str(error)
    unknown = re.search(r"([\w.]*:?\w+)\(-?\d+\) is not a registered function/op", text)
    if unknown:
        return QconvError(
            f"{name} uses the operator {unknown[1]}, which ONNX Runtime does not have.",
            "export the model without custom operators, for example without its pre- and postprocessing.",
        )
    absent = re.search(r"No Op registered for (\w+) with domain_version of (\d+)", text)
    if absent:
        return QconvError(
            f"{name} uses the operator {absent[1]}, which opset {absent[2]} does not have.",
            "export the model at an opset that has it; an operator of one's own needs a domain of its own, too.",
        )
    missing = re.search(r"Could not find an implementation for (\w+)\((\d+)\)", text)
    if missing:
        return QconvError(
            f"ONNX Runtime {RUNTIME_VERSION} has no kernel for {missing[1]}({missing[2]}) of {name}, or none for its "
            "element types.",
            f"export the model in float32, or at a lower opset from {OLDEST_OPSET} on; a newer onnxruntime may have "
            "the kernel, too.",
        )
    hint = next((hint for what, hint in LOAD_HINTS.items() if what in text), "check the file, or export it again.")
    if name.startswith(OWN_MODELS):
        hint = OWN_HINT
    return QconvError(f"ONNX Runtime cannot load {name}: {_runtime_message(error)}", hint)


def _runtime_message(error: Exception) -> str:
    """The runtime's own words without its error codes and source locations."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    text = re.sub(r"^\S*/onnxruntime/\S+ .*?\)(?: const)? (?=[A-Z])", "", text.strip())
    text = re.sub(r"\S*/onnxruntime/\S+\s*", "", text)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)[:300]


INPUT_SEED = 0


def make_random_inputs(session: Session, batch: int | None, size: Sequence[int] | None) -> dict[str, NDArray[Any]]:
    """Random arrays for every input: normal numbers, or pixels.

    batch: None for the model's own, or 1. size: height and width, where the model leaves them open. Raises QconvError
    where a shape stays open, and where memory does not hold the arrays.
    """
    rng = np.random.default_rng(INPUT_SEED)
    shapes = [_closed_shape(session.name, name, shape, batch, size) for name, _, shape in session.inputs]
    try:
        return {
            name: _random_array(rng, dtype, shape)
            for (name, dtype, _), shape in zip(session.inputs, shapes, strict=True)
        }
    except (MemoryError, ValueError):  # ValueError: more elements than can be counted
        fact = f"{session.name} does not fit into memory with this input."
        raise QconvError(fact, "try a smaller --batch or --size.") from None


def _closed_shape(
    model: str, name: str, shape: tuple[int | None, ...], batch: int | None, size: Sequence[int] | None
) -> tuple[int, ...]:
    wanted = list(shape)
    if wanted:
        if batch is not None and wanted[0] not in (None, batch):
            raise QconvError(f"{model} takes batches of {wanted[0]}, not {batch}.", "leave --batch out.")
        wanted[0] = wanted[0] or batch or 1
    if len(wanted) == 4:
        first = 1 if wanted[3] in (1, 3) and wanted[1] not in (1, 3) else 2
        sides = wanted[first : first + 2]
        if size is not None and any(side not in (None, want) for side, want in zip(sides, size, strict=True)):
            given, own = format_shape(tuple(size)), format_shape(tuple(sides))
            raise QconvError(f"{model} takes pictures of {own}, not {given}.", "leave --size out.")
        if size is not None:
            wanted[first : first + 2] = sides = list(size)
        channel = 3 if first == 1 else 1
        if wanted[channel] is None and None not in sides:
            wanted[channel] = 3
    if None in wanted:
        raise QconvError(
            f"Input {name!r} of {model} has the open shape {format_shape(shape)}.",
            "pass --size HxW, for example --size 224x224."
            if len(shape) == 4
            else "only batch and size of pictures can be left open.",
        )
    return tuple(side for side in wanted if side is not None)


def _random_array(rng: np.random.Generator, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if dtype.kind == "f":
        return rng.normal(size=shape).astype(dtype)
    highest = 255 if dtype == np.uint8 or (dtype.kind in "iu" and dtype.itemsize > 1 and len(shape) == 4) else 1
    return rng.integers(0, highest, shape, endpoint=True).astype(dtype)
