"""A network with one tensor that 8 bits are too few for, where two cheap layers in float mend all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from tests.support.models import network

SAME = "pads=[1,1,1,1]"
BODY = f"""a = Conv(x, w, k) b = Relu(a) c = Conv(b, d) e = Conv<{SAME}>(c, p) f = Relu(e)
           g = Conv<{SAME}>(f, q) h = Relu(g) y = Conv<{SAME}>(h, r)"""
SHAPE = (3, 24, 24)


def loud(common: float, more: str = "", output: str = "y") -> onnx.ModelProto:
    """c has differences of channels of b, all of which have `common` in common; the layers behind take most time.

    more: further nodes, which end in `output`.
    """
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> NDArray[np.float32]:
        return rng.normal(size=shape).astype(np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))

    pairs = np.zeros((8, 16, 1, 1), np.float32)
    pairs[range(8), range(0, 16, 2)], pairs[range(8), range(1, 16, 2)] = 1, -1
    return network(
        f"{BODY} {more}",
        ("N", *SHAPE),
        (output,),
        w=weights(16, 3, 1, 1),
        k=np.full(16, common, np.float32),
        d=pairs,
        p=weights(32, 8, 3, 3),
        q=weights(64, 32, 3, 3),
        r=weights(64, 64, 3, 3),
    )


def write_samples(folder: Path, count: int = 24) -> Path:
    """Inputs as .npy files in a new folder."""
    folder.mkdir()
    for number in range(count):
        np.save(folder / f"{number:02}.npy", np.random.default_rng(number).normal(size=SHAPE).astype(np.float32))
    return folder
