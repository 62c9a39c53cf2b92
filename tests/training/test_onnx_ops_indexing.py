"""Operators that move values about give in PyTorch what they give in ONNX Runtime, and hand gradients on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import onnx
import pytest

from tests.support.models import ints, loaded, network, random_feeds

torch = pytest.importorskip("torch", reason="needs the extra: pip install 'qconv[torch]'")

from qconv.errors import QconvError
from qconv.training.network import TorchNetwork
from qconv.training.onnx_ops import SHAPE_OPERATORS
from tests.support.torched import check, check_gradient, outputs

FIRST, LAST = -(2**63), 2**63 - 1
"""To the very first, to the very last."""
SLICES = {  # starts, ends, axes, steps
    "plain": ((1, 2), (4, 6), None, None),
    "axes": ((1, 0), (3, 5), (1, 3), None),
    "negative axes": ((1,), (4,), (-2,), None),
    "from behind": ((-3, -4), (-1, LAST), (2, 3), None),
    "steps": ((0, 1), (LAST, 6), (2, 3), (2, 3)),
    "backwards": ((-1,), (FIRST,), (3,), (-1,)),
    "backwards, by two": ((4, -1), (0, -6), (2, 3), (-2, -2)),
    "backwards, int32": ((LAST,), (-(2**31),), (-1,), (-1,)),
    "backwards from before the first": ((-100,), (FIRST,), (3,), (-1,)),
    "backwards to before the first": ((2,), (-100,), (3,), (-1,)),
    "beyond": ((-100, 2), (100, 50), (2, 3), None),
    "nothing": ((3,), (3,), (2,), None),
    "nothing, crossed": ((4,), (2,), (2,), None),
}
PADS = {  # begins and ends of four axes
    "plain": (0, 0, 1, 2, 0, 0, 3, 1),
    "all axes": (1, 0, 1, 2, 0, 2, 3, 1),
    "crop": (0, 0, -1, -2, 0, 0, -1, 0),
    "crop and pad": (0, 0, 1, -1, 0, 0, -2, 2),
}
COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
SCALES = {
    "up": (2.0, 3.0),
    "down": (0.5, 0.34),
    "crooked": (1.5, 0.7),
    "thirds": (1 / 3, 4 / 3),
    "tenths": (0.7, 0.6),
    "to one": (0.2, 1.0),
}
SIZES = {"up": (12, 20), "down": (3, 4), "crooked": (9, 7), "to one": (1, 13)}


def moving() -> Iterator[tuple[str, onnx.ModelProto]]:
    """`operator: what is special` and a model of it."""
    yield "Squeeze", network("y = Squeeze(x)", (1, 3, 1, 4))
    yield "Squeeze: axes", network("y = Squeeze(x, a)", (1, 3, 1, 4), a=ints(-2))
    yield "Squeeze: two axes", network("y = Squeeze(x, a)", (1, 3, 1, 4), a=ints(2, 0))
    yield "Unsqueeze", network("y = Unsqueeze(x, a)", (3, 4), a=ints(1))
    yield "Unsqueeze: several", network("y = Unsqueeze(x, a)", (3, 4), a=ints(-1, 0, 2))
    yield "Reshape", network("y = Reshape(x, s)", s=ints(2, 9, -1))
    yield "Reshape: copied sides", network("y = Reshape(x, s)", s=ints(0, -1, 0))
    yield (
        "Reshape: zeros",
        network("e = Slice(x, z, z) y = Reshape<allowzero=1>(e, s)", (4, 3), z=ints(0), s=ints(3, 0)),
    )
    for axis in (0, 1, 2, -1, 4):
        yield f"Flatten: {axis}", network(f"y = Flatten<axis={axis}>(x)")
    yield "Transpose", network("y = Transpose<perm=[0,2,3,1]>(x)")
    yield "Transpose: reversed", network("y = Transpose(x)")
    for name, parts in SLICES.items():
        named = {key: ints(*part) for key, part in zip("beas", parts, strict=True) if part is not None}
        read = 'b, e, "", s' if "s" in named and "a" not in named else ", ".join(named)
        yield f"Slice: {name}", network(f"y = Slice(x, {read})", (5, 6, 6, 7), **named)
    yield (
        "Slice: steps, no axes",
        network('y = Slice(x, b, e, "", s)', (4, 5), b=ints(0, 3), e=ints(4, 0), s=ints(2, -1)),
    )
    yield "Split", network("y, z = Split<axis=2>(x)", outputs=("y", "z"))
    yield "Split: uneven", network("y, z, u = Split<axis=-1>(x, s)", outputs=("y", "z", "u"), s=ints(1, 3, 2))
    body = "y, z = Split<axis=3, num_outputs=2>(x)"
    yield "Split: a short last part", network(body, (1, 2, 3, 5), outputs=("y", "z"), opset=18)
    yield "Concat", network("y = Concat<axis=1>(x, w, x)", w=(2, 2, 6, 6))
    yield "Concat: from behind", network("y = Concat<axis=-1>(w, x)", w=(2, 3, 6, 1))
    for name, ends in PADS.items():
        yield f"Pad: {name}", network("y = Pad(x, p)", p=ints(*ends))
        yield f"Pad: {name}, value", network("y = Pad(x, p, v)", p=ints(*ends), v=1.5)
    for mode, name in product(("reflect", "edge"), PADS):
        yield f"Pad: {mode}, {name}", network(f'y = Pad<mode="{mode}">(x, p)', p=ints(*PADS[name]))
    for mode in ("reflect", "edge"):
        yield f"Pad: {mode}, two axes", network(f'y = Pad<mode="{mode}">(x, p)', (3, 4), p=ints(1, 2, 0, 1))
    yield "Pad: wrap", network('y = Pad<mode="wrap">(x, p)', opset=19, p=ints(0, 1, 2, 1, 0, 0, 3, 2))
    yield "Pad: named axes", network("y = Pad(x, p, v, a)", opset=18, p=ints(1, 2, 0, 3), v=0.5, a=ints(-1, 1))
    yield "Pad: named axes, no value", network('y = Pad(x, p, "", a)', opset=18, p=ints(1, 2), a=ints(2))
    body = 'y = Pad<mode="edge">(x, p, "", a)'
    yield "Pad: named axes, edge", network(body, opset=18, p=ints(1, 2, 0, 3), a=ints(3, 2))
    for name, at in {"scalar": 1, "list": [2, 0], "from behind": [-1, 1], "table": [[0, 1], [-2, 2]]}.items():
        yield f"Gather: {name}", network("y = Gather<axis=1>(x, i)", i=np.array(at, np.int64))
    yield "Gather: int32, default axis", network("y = Gather(x, i)", i=np.array([-1], np.int32))
    yield "Gather: a side of a shape", network("s = Shape(x) n = Gather(s, i) y = Unsqueeze(n, i)", i=np.array(0))
    yield "Shape", network("y = Shape(x)")
    yield "Shape: part", network("y = Shape<start=1, end=-1>(x)")
    yield "Expand", network("y = Expand(x, s)", (3, 1), s=ints(2, 1, 4))
    yield "Tile", network("y = Tile(x, n)", (2, 3), n=ints(3, 2))
    yield "Expand: sides of one", network("y = Expand(x, s)", (2, 3, 4), s=ints(1, 1))
    for mode in ("DCR", "CRD"):
        yield f"DepthToSpace: {mode}", network(f'y = DepthToSpace<blocksize=2, mode="{mode}">(x)', (2, 12, 2, 3))
    yield "DepthToSpace: default", network("y = DepthToSpace<blocksize=3>(x)", (1, 18, 2, 1))
    yield "SpaceToDepth", network("y = SpaceToDepth<blocksize=2>(x)", (2, 3, 4, 6))
    yield from resizing()


def resizing() -> Iterator[tuple[str, onnx.ModelProto]]:
    modes = [("linear", 'mode="linear"')]
    modes += [(near, f'mode="nearest", nearest_mode="{near}"') for near in NEAREST]
    for (mode, attributes), coordinate in product(modes, COORDINATES):
        attributes += f', coordinate_transformation_mode="{coordinate}"'
        told = f"Resize: {mode}, {coordinate}"
        for name, factors in SCALES.items():
            scales = np.float32([1, 1, *factors])
            yield f"{told}, {name}", network(f"y = Resize<{attributes}>(x, , s)", (2, 3, 5, 10), s=scales)
        for name, sides in SIZES.items():
            sizes = ints(2, 3, *sides)
            yield f"{told}, {name} by sizes", network(f"y = Resize<{attributes}>(x, , , s)", (2, 3, 5, 10), s=sizes)
    yield "Resize: the same shape", network("y = Resize(x, , s)", (2, 3, 5, 9), s=np.float32([1, 1, 1.1, 1.1]))
    for near in (
        "round_prefer_floor",
        "round_prefer_ceil",
    ):  # 4 / (8 / 7) is 3.4999998 in single precision, 3.5 in truth
        attributes = f'nearest_mode="{near}", coordinate_transformation_mode="asymmetric"'
        body = f"y = Resize<{attributes}>(x, , , s)"
        yield f"Resize: {near}, almost a tie", network(body, (2, 3, 7, 14), s=ints(2, 3, 8, 19))
    yield "Resize: default", network("y = Resize(x, , s)", s=np.float32([1, 1, 2, 2]))
    body = 'y = Resize<mode="linear">(x, e, e, s)'
    yield "Resize: empty scales", network(body, opset=13, e=np.zeros(0, np.float32), s=ints(2, 3, 9, 4))
    yield "Resize: other axes", network("y = Resize(x, , s)", (2, 4, 6), s=np.float32([1, 2, 0.5]))


CASES = dict(moving())
SMOOTH = [name for name in CASES if "hape" not in name.split(":")[0] or name.startswith("Reshape")]
SMOOTH = [name for name in SMOOTH if name not in ("Reshape: zeros", "Gather: a side of a shape")]


def test_every_operator_has_a_case() -> None:
    assert {name.split(":")[0] for name in CASES} == set(SHAPE_OPERATORS)


@pytest.mark.parametrize("name", CASES)
def test_an_operator_gives_what_onnx_runtime_gives(name: str) -> None:
    check(name.split(":")[0], CASES[name])


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_slopes(name: str) -> None:
    check_gradient(CASES[name])


REFUSED = {
    "cubes": network('y = Resize<mode="cubic">(x, , s)', s=np.float32([1, 1, 2, 2])),
    "some axes": network("y = Resize<axes=[2,3]>(x, , s)", opset=18, s=np.float32([2, 2])),
    "a smoothed picture": network(
        'y = Resize<antialias=1, mode="linear">(x, , s)', opset=18, s=np.float32([1, 1, 0.5, 0.5])
    ),
    "a kept aspect": network(
        'y = Resize<keep_aspect_ratio_policy="not_larger">(x, , , s)', opset=18, s=ints(2, 3, 12, 7)
    ),
    "a crop": network(
        'y = Resize<coordinate_transformation_mode="tf_crop_and_resize">(x, r, s)',
        r=np.float32([0, 0, 0, 0, 1, 1, 1, 1]),
        s=np.float32([1, 1, 2, 2]),
    ),
    "places of another kind": network(
        'y = Resize<coordinate_transformation_mode="half_pixel_symmetric">(x, , s)',
        opset=19,
        s=np.float32([1, 1, 2, 2]),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_built_is_refused_by_name(name: str) -> None:
    network = TorchNetwork(loaded(REFUSED[name]))
    (node,) = REFUSED[name].graph.node
    with pytest.raises(QconvError, match=f"^{node.op_type} 'y' .*does not run in PyTorch"):
        outputs(network, random_feeds(REFUSED[name]))
