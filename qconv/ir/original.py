"""Opens the user's own model in ONNX Runtime, as it is, or as it is loaded where the runtime does not take it so.

The runtime refuses opsets 1 to 6, layers in float64, and operators of the newest opsets that it has no kernels for.
What `load` makes of such a model computes the same, and is the reference then.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from qconv.config.tasks import NO_TASKS, Tasks
from qconv.errors import QconvError
from qconv.ir.files import Source, external_data_files, full_proto, parse_proto, read_proto
from qconv.ir.legacy import is_legacy
from qconv.ir.load import load
from qconv.ir.node_order import sort_nodes
from qconv.runtime.output_origins import OutputOrigin, find_output_origins
from qconv.runtime.outputs import require_tasks
from qconv.runtime.session import Session

Stamp = tuple[int, int] | None
"""Size and time of a file."""


def open_original(
    source: Source, threads: int | None, tasks: Tasks = NO_TASKS, *, required: bool = True, optimize: bool = True
) -> Session:
    """The user's own model, as it is, with what its outputs hold.

    optimize: False runs its nodes one by one. required: the user asks for the tasks, not a file's metadata: raises
    QconvError where no output can hold that.
    Raises QconvError where the runtime does not load the model, nor what is made of it.
    """
    stat = None if source.path is None else source.path.stat()
    stamp = None if stat is None else (stat.st_size, stat.st_mtime_ns)
    origins = _read_origins(source, stamp)
    said: dict[str, Any] = {
        "name": source.name,
        "threads": threads,
        "origins": origins,
        "tasks": tasks,
        "optimize": optimize,
    }
    try:
        session = Session(source.runnable, **said)
    except QconvError:
        instead = _in_order(source) or _load_runnable(source, stamp)
        if instead is None:
            raise
        session = Session(instead, **said)
    if required:
        require_tasks(session.name, session.model_outputs, tasks)
    return session


@functools.lru_cache(maxsize=8)
def _read_origins(source: Source, stamp: Stamp) -> Mapping[str, OutputOrigin]:
    """What computes the outputs, found once for a file that a run opens several times."""
    return find_output_origins(read_proto(source))


def _in_order(source: Source) -> bytes | None:
    """The file with its nodes in order, as bodies must have them; None where they are, or weights lie apart."""
    proto = parse_proto(source)
    sorted_now = sort_nodes(proto, source.name) and not external_data_files(proto, source)
    return proto.SerializeToString() if sorted_now else None


@functools.lru_cache(maxsize=1)
def _load_runnable(source: Source, stamp: Stamp) -> bytes | None:
    """The file as `load` makes it, where the runtime takes that; None where it does not.

    Raises QconvError for a file of opset 1 to 6 that cannot be raised: what is the matter with it is known then.
    """
    proto = read_proto(source)
    old = is_legacy(proto)
    try:
        model, _ = load(proto, source)
        instead: bytes = full_proto(model).SerializeToString()
        Session(instead, name=source.name, threads=1)
    except QconvError:
        if old:
            raise
        return None
    except Exception:  # whatever a damaged file trips over; the runtime has said what it makes of it
        return None
    return instead
