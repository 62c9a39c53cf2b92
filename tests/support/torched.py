"""A network in ONNX Runtime and in PyTorch, for tests that compare the two. Importing it needs torch."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from qconv.ir.model import Model, ir
from qconv.training.network import TorchNetwork, to_arrays
from tests.support.models import loaded, op_types, random_feeds, run

torch.set_num_threads(1)  # tests run side by side


def as_it_is(proto: onnx.ModelProto) -> Model:
    """A model whose dequantizers of constants are not computed on loading."""
    return Model(ir.from_proto(proto))


def outputs(network: TorchNetwork, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
    """All outputs of the model by name."""
    return dict(zip(network.outputs, to_arrays(network.run(network.on_arrays(feeds)).values()), strict=True))


def check(kind: str, proto: onnx.ModelProto, tolerance: float = 1e-5) -> None:
    """Both give the same for random numbers; `kind` is among what is run."""
    model = as_it_is(proto)
    assert kind in op_types(model).split()
    feeds = random_feeds(proto)
    expected, found = run(proto, feeds), outputs(TorchNetwork(model), feeds)
    assert list(found) == list(expected)
    for name, reference in expected.items():
        assert found[name].shape == reference.shape, name
        np.testing.assert_allclose(found[name], reference.astype(np.float64), rtol=tolerance, atol=tolerance)


def check_gradient(proto: onnx.ModelProto) -> None:
    """The gradient of all outputs is what small steps tell, in double precision along random directions."""
    network = TorchNetwork(loaded(proto))
    network.constants = {name: x.double() if x.dtype == torch.float32 else x for name, x in network.constants.items()}
    feeds = [torch.from_numpy(x).double().requires_grad_() for x in random_feeds(proto).values()]

    def function(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(network.run(dict(zip(network.inputs, given, strict=True))).values())

    torch.manual_seed(0)
    assert torch.autograd.gradcheck(function, feeds, fast_mode=True)
