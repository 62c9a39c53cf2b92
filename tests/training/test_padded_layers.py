"""Files whose stem is padded with channels, trained and read beside their float model."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.models import network
from tests.support.quantized import SAME, Quantized, quantized

torch = pytest.importorskip("torch", reason="needs the extra: pip install 'qconv[torch]'")

from qconv.ir.stored_weights import read_quantized_weights
from qconv.runtime.session import Session
from qconv.training.network import TorchNetwork
from qconv.training.trainable import LearnedParameters, find_sites

torch.set_num_threads(1)


def stem() -> Quantized:
    body = f"c = Conv<{SAME}, strides=[2,2]>(x, w, b) r = Relu(c) y = Conv(r, v)"
    return quantized(network(body, x=("N", 3, 8, 8), w=(16, 3, 3, 3), b=(16,), v=(4, 16, 1, 1)))


def codes_of(result: Quantized) -> NDArray[np.int32]:
    weights = read_quantized_weights(next(node for node in result.model.nodes() if node.op_type == "Conv"))
    assert weights is not None
    return weights.codes


def test_training_computes_what_the_file_does() -> None:
    result = stem()
    assert codes_of(result).shape == (16, 4, 3, 3)
    learned = LearnedParameters(find_sites(result.model, result.recipe), "cpu")
    student = TorchNetwork(result.model)
    x = torch.from_numpy(np.concatenate([feeds["x"] for feeds in result.samples]))
    got = student.run({"x": x, **learned.given()})["y"]
    np.testing.assert_allclose(got.detach().numpy(), result.meant["y"], atol=0.02 * np.abs(result.meant["y"]).max())
    optimizer = torch.optim.Adam(list(learned.tensors), lr=0.5)
    before = codes_of(result)
    for _ in range(3):
        optimizer.zero_grad()
        (student.run({"x": x, **learned.given()})["y"] ** 2).mean().backward()
        optimizer.step()
        learned.hold()
    learned.write(result.model)
    assert (codes_of(result) != before).any()
    trained = Session(result.model.proto().SerializeToString(), optimize=False).run(["y"], {"x": x.numpy()})[0]
    learned_y = student.run({"x": x, **learned.given()})["y"].detach().numpy()
    np.testing.assert_allclose(learned_y, trained, atol=0.02 * np.abs(trained).max())
