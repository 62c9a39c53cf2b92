"""One reader for the integers behind a dequantizer. Oracle: the floats that ONNX Runtime makes of the same nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qconv.ir import load
from qconv.ir.files import Source
from qconv.ir.model import Model
from qconv.ir.stored_weights import read_dequantizer, read_quantized_weights
from qconv.quantizer import broadcast_parameter
from qconv.runtime.session import Session
from tests.support.models import network

CODES = np.random.default_rng(0).integers(-9, 9, (4, 6, 3, 3)).astype(np.int8)
FLAT = CODES.reshape(4, 54)
PER_CHANNEL = np.array([0.5, 0.25, 2, 1], np.float32)
SHAPE = np.array([4, 6, 3, 3])
AXES = (4, 1, 1, 1)

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "per-tensor": ("w = DequantizeLinear(q, s)", {"q": CODES, "s": 0.5}),
    "per-tensor with zero": ("w = DequantizeLinear(q, s, z)", {"q": CODES, "s": 0.5, "z": np.array(3, np.int8)}),
    "per-channel": (
        "w = DequantizeLinear <axis = 0> (q, s, z)",
        {"q": CODES, "s": PER_CHANNEL, "z": np.array([0, 1, -2, 3], np.int8)},
    ),
    "one channel's scale of one": ("w = DequantizeLinear <axis = 0> (q, s)", {"q": CODES[:1], "s": PER_CHANNEL[:1]}),
    "blocks": (
        "f = DequantizeLinear <axis = 1, block_size = 18> (q, s)  w = Reshape(f, t)",
        {"q": FLAT, "s": np.arange(1, 13, dtype=np.float32).reshape(4, 3), "t": SHAPE},
    ),
    "Cast and Mul": ("f = Cast <to = 1> (q)  w = Mul(f, s)", {"q": CODES, "s": PER_CHANNEL.reshape(AXES)}),
    "Cast, Sub and Mul": (
        "f = Cast <to = 1> (q)  g = Sub(f, z)  w = Mul(g, s)",
        {"q": CODES, "s": PER_CHANNEL.reshape(AXES), "z": np.array([0, 1, -2, 3], np.float32).reshape(AXES)},
    ),
    "scale first": ("f = Cast <to = 1> (q)  w = Mul(s, f)", {"q": CODES, "s": 0.5}),
}


def opened(body: str, constants: dict[str, Any]) -> tuple[Model, NDArray[np.float32]]:
    """The model of one layer, and the weights that the runtime computes for it."""
    opset = 21 if "block_size" in body else 17
    proto = network(f"{body}  y = Conv(x, w)", x=(1, 6, 5, 5), opset=opset, **constants)
    proto.ir_version = 10
    model = load.load_unchanged(onnx.ModelProto.FromString(proto.SerializeToString()), Source("m", None, b""))
    proto.graph.output.append(onnx.ValueInfoProto(name="w"))
    x = np.zeros((1, 6, 5, 5), np.float32)
    (floats,) = Session(proto.SerializeToString(), optimize=False).run(["w"], {"x": x})
    return model, floats


@pytest.mark.parametrize(("body", "constants"), FORMS.values(), ids=FORMS)
def test_what_is_read_is_what_the_runtime_computes(body: str, constants: dict[str, Any]) -> None:
    model, floats = opened(body, constants)
    found = read_quantized_weights(model.nodes()[-1])
    assert found is not None
    computed = (found.codes - found.zero) * found.scale
    np.testing.assert_array_equal(computed.reshape(floats.shape), floats)
    assert found.bits == 5  # from -9 to 8


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "floats": ("w = Identity(v)", {"v": CODES.astype(np.float32)}),
    "a Mul of two constants": ("w = Mul(v, s)", {"v": CODES.astype(np.float32), "s": 0.5}),
    "a scale an element": ("f = Cast <to = 1> (q)  w = Mul(f, s)", {"q": CODES, "s": (4, 6, 3, 3)}),
}


@pytest.mark.parametrize(("body", "constants"), OTHERS.values(), ids=OTHERS)
def test_other_weights_are_no_codes(body: str, constants: dict[str, Any]) -> None:
    model, _ = opened(body, constants)
    assert read_quantized_weights(model.nodes()[-1]) is None


@pytest.mark.parametrize(("zero", "kind"), [(None, np.int8), (np.array(-3, np.int8), np.int8)])
def test_parameters_of_a_tensor_with_one_scale(zero: Any, kind: type[np.integer[Any]]) -> None:
    body = "w = DequantizeLinear(q, s)" if zero is None else "w = DequantizeLinear(q, s, z)"
    model, floats = opened(body, {"q": CODES, "s": 0.5} | ({} if zero is None else {"z": zero}))
    found = read_dequantizer(model.nodes()[-1].inputs[1])
    params = None if found is None else found.tensor_params()
    assert params is not None
    assert params.zero_point.dtype == kind
    np.testing.assert_array_equal(params.dequantize(CODES), floats)
    several, _ = opened(*FORMS["per-channel"])
    made = read_dequantizer(several.nodes()[-1].inputs[1])
    assert made is not None
    assert made.tensor_params() is None


@pytest.mark.parametrize(
    ("shape", "size", "axis", "block"),
    [((4, 6), (), 0, 0), ((4, 6), (1,), 1, 0), ((4, 6), (6,), 1, 0), ((4, 6), (6,), -1, 0), ((4, 6), (4, 1), 0, 0),
     ((4, 6), (4, 2), 1, 4), ((4, 6), (4, 3), 1, 2), ((5, 3, 2), (5, 2, 2), 1, 2), ((4, 6), (1, 1), 1, 8),
     ((), (), 0, 0)],
)  # fmt: skip
def test_numpy_and_pytorch_broadcast_alike(
    shape: tuple[int, ...], size: tuple[int, ...], axis: int, block: int
) -> None:
    """Oracle: every element looks up its own number."""
    numbers = np.arange(1, np.prod(size, dtype=int) + 1, dtype=np.float32).reshape(size)
    wide = np.broadcast_to(broadcast_parameter(numbers, shape, axis, block), shape)
    torch = pytest.importorskip("torch", reason="needs the extra: pip install 'qconv[torch]'")
    from qconv.training.onnx_ops import broadcast_tensor

    torched = broadcast_tensor(torch.from_numpy(numbers), torch.zeros(shape), axis, block)
    np.testing.assert_array_equal(wide, np.broadcast_to(torched.numpy(), shape))
    for place in np.ndindex(shape):
        if numbers.size == 1:
            wanted = numbers.reshape(())[()]
        elif block:
            wanted = numbers[tuple(i // block if a == axis % len(shape) else i for a, i in enumerate(place))]
        else:
            wanted = numbers.reshape(-1)[place[axis]]
        assert wide[place] == wanted
