"""Is a file ever slower than its float model? Draws networks of the kinds that were, and times both in turns.

    python -m tests.bench.families [--graphs 200] [--family pools] [--seed 0]

CPU time of one thread, medians over turns; a file that is slower is timed again with five times the turns, and counted
where it still is. Machines are noisy: what is within 3 % is no news.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort

from qconv.config.recipe import Recipe
from tests.support.models import ints, network
from tests.support.quantized import SAME, Quantized

POOLS = (
    "kernel_shape=[2,2], strides=[2,2]",
    "kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]",
    "kernel_shape=[3,3], pads=[1,1,1,1]",
)
TURNS, MOST_RATIO, TURN_S = 5, 1.03, 0.01


def pick(rng: np.random.Generator, *of: int) -> int:
    return int(rng.choice(of))


def draw_pools(rng: np.random.Generator) -> onnx.ModelProto:
    """A first layer that may be faster in float, a MaxPool, and layers behind it."""
    channels, kernel, side = pick(rng, 16, 24, 32, 48, 64), pick(rng, 3, 5, 7), pick(rng, 32, 64, 112)
    stride, deep = pick(rng, 1, 2), pick(rng, 16, 32, 64)
    activation = str(rng.choice(["Relu", "LeakyRelu<alpha=0.1>", "Sigmoid", "Identity"]))
    pool = f"MaxPool<{rng.choice(POOLS)}>"
    pads = ",".join([str(kernel // 2)] * 4)
    behind = bool(rng.integers(2))
    middle = f"p = {pool}(a) b = {activation}(p)" if behind else f"p = {activation}(a) b = {pool}(p)"
    return network(
        f"""a = Conv<strides=[{stride},{stride}], pads=[{pads}]>(x, w, k) {middle}
        c = Conv<{SAME}>(b, v) d = Relu(c) e = MaxPool<kernel_shape=[2,2], strides=[2,2]>(d) y = Conv<{SAME}>(e, u)""",
        x=(1, 3, side, side), w=(channels, 3, kernel, kernel), k=(channels,), v=(deep, channels, 3, 3),
        u=(deep, deep, 3, 3),
    )  # fmt: skip


def draw_shuffles(rng: np.random.Generator) -> onnx.ModelProto:
    """Units of ShuffleNet V2 in a row, behind a layer."""
    half, side, units = pick(rng, 8, 16, 24, 32, 48, 64), pick(rng, 14, 28, 44), pick(rng, 1, 2, 3)
    body, last = f"t0 = Conv<{SAME}>(x, w)", "t0"
    for i in range(units):
        body += f""" r{i} = Reshape({last}, five) s{i} = Transpose<perm=[0,2,1,3,4]>(r{i}) m{i} = Reshape(s{i}, four)
            a{i}, b{i} = Split<axis=1>(m{i}) c{i} = Conv(b{i}, p) d{i} = Relu(c{i})
            e{i} = Conv<group={half}, {SAME}>(d{i}, q) f{i} = Conv(e{i}, p) g{i} = Relu(f{i})
            u{i} = Concat<axis=1>(a{i}, g{i})"""
        last = f"u{i}"
    return network(
        f"{body} y = Conv({last}, v)",
        x=(1, 8, side, side), w=(2 * half, 8, 3, 3), p=(half, half, 1, 1), q=(half, 1, 3, 3), v=(16, 2 * half, 1, 1),
        five=ints(1, 2, half, side, side), four=ints(1, 2 * half, side, side),
    )  # fmt: skip


def draw_slopes(rng: np.random.Generator) -> onnx.ModelProto:
    """Residual blocks with PRelu, as face and hand networks have them."""
    channels, side, blocks = pick(rng, 16, 32, 64, 128), pick(rng, 8, 16, 32), pick(rng, 1, 2, 3)
    count = pick(rng, 1, channels)
    shape: tuple[int, ...] = (count, 1, 1)
    body, last = f"c = Conv<{SAME}>(x, w) t0 = PRelu(c, s)", "t0"
    for i in range(blocks):
        body += f""" a{i} = Conv({last}, p) b{i} = PRelu(a{i}, s) d{i} = Conv<group={channels}, {SAME}>(b{i}, q)
            e{i} = Conv(d{i}, p) f{i} = Add({last}, e{i}) u{i} = PRelu(f{i}, s)"""
        last = f"u{i}"
    return network(
        f"{body} y = Conv({last}, v)",
        x=(1, 3, side, side), w=(channels, 3, 3, 3), p=(channels, channels, 1, 1), q=(channels, 1, 3, 3),
        v=(16, channels, 1, 1), s=rng.uniform(0, 0.5, shape).astype(np.float32),
    )  # fmt: skip


FAMILIES: dict[str, Callable[[np.random.Generator], onnx.ModelProto]] = {
    "pools": draw_pools,
    "shuffles": draw_shuffles,
    "slopes": draw_slopes,
}


def time_ratio(float_model: bytes, file: bytes, feeds: dict[str, np.ndarray], turns: int) -> float:
    """CPU time of the file over the float model's, the median over turns."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    sessions = [
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]) for model in (float_model, file)
    ]
    ratios = []
    for turn in range(turns + 1):
        spent = []
        for session in sessions:
            session.run(None, feeds)
            runs, start, began = 0, time.process_time(), time.perf_counter()
            while runs < 3 or time.perf_counter() - began < TURN_S:
                session.run(None, feeds)
                runs += 1
            spent.append((time.process_time() - start) / runs)
        ratios += [spent[1] / spent[0]] if turn else []
    return float(np.median(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.families", description=__doc__)
    parser.add_argument("--graphs", type=int, default=200)
    parser.add_argument("--family", action="append", choices=list(FAMILIES))
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    for name in wanted.family or FAMILIES:
        ratios, slower = [], []
        for seed in range(wanted.seed, wanted.seed + wanted.graphs):
            proto = FAMILIES[name](np.random.default_rng(seed))
            shape = [size.dim_value for size in proto.graph.input[0].type.tensor_type.shape.dim]
            feeds = {"x": np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)}
            file = Quantized(proto, Recipe(), [feeds], placed=True).proto
            models = proto.SerializeToString(), file.SerializeToString()
            ratio = time_ratio(*models, feeds, TURNS)
            if ratio > MOST_RATIO:
                ratio = time_ratio(*models, feeds, 5 * TURNS)
            ratios.append(ratio)
            if ratio > MOST_RATIO:
                slower.append((round(ratio, 2), seed))
        found = f"median {np.median(ratios):.2f} of float's time, worst {max(ratios):.2f}"
        print(
            f"{name}: {len(slower)} of {len(ratios)} slower than float; {found}; {sorted(slower, reverse=True)[:10]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
