"""Weights and activations of fewer than 8 bits in the file that runs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qconv.config.choices import Scheme, WeightGranularity
from qconv.runtime.session import Session
from tests.support.quantized import Quantized, net


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_fewer_bits_still_run_in_integers(bits: int) -> None:
    """Codes in bytes, held to 2^b - 1 by an integer Clip that the Conv's kernel does not mind.

    Those that no layer reads have all 8 bits.
    """
    result = net(activation_bits=bits, edge_bits=2)
    wiring = result.wiring
    assert result.runs.count("QLinearConv") == 3
    assert not {"Conv", "FusedConv", "Gemm"} & set(result.runs)
    quantizers = wiring.all("QuantizeLinear")
    assert quantizers
    for node in quantizers:
        (reader,) = wiring.readers(node.output[0])
        if reader.op_type == "DequantizeLinear":
            assert not {"Conv", "Gemm"} & {found.op_type for found in wiring.readers(reader.output[0])}
            continue
        assert reader.op_type == "Clip"
        low, high = (wiring.constants[name] for name in reader.input[1:])
        assert low.dtype == high.dtype == np.uint8
        assert int(low) >= 0
        assert int(high) <= 2**bits - 1
    assert max(codes_of(result)) == 2**bits - 1


def codes_of(result: Quantized) -> set[int]:
    """Every code of activations that layers read on the samples."""
    probe = onnx.ModelProto.FromString(result.proto.SerializeToString())
    constants, wiring = result.wiring.constants, result.wiring
    read = {
        node.input[0]
        for node in wiring.all("DequantizeLinear")
        if {"Conv", "Gemm"} & {reader.op_type for reader in wiring.readers(node.output[0])}
    } - set(constants)
    kind = {np.dtype(np.uint8): onnx.TensorProto.UINT8, np.dtype(np.uint16): onnx.TensorProto.UINT16}
    for name in sorted(read):
        node = next(n for n in result.wiring.all("DequantizeLinear") if n.input[0] == name)
        probe.graph.output.append(onnx.helper.make_tensor_value_info(name, kind[constants[node.input[2]].dtype], None))
    session = Session(probe.SerializeToString(), optimize=False, threads=1)
    return {int(c) for feeds in result.samples for a in session.run(sorted(read), feeds) for c in np.unique(a)}


@pytest.mark.parametrize("target", ["ort-cpu", "generic"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("scheme", Scheme)
def test_weight_codes_keep_to_their_bits(bits: int, scheme: Scheme, target: str) -> None:
    """Symmetric codes are narrow: 2 bits are ternary. Asymmetric ones of few bits are moved, all of a channel alike."""
    wiring = net(weight_bits=bits, edge_bits=2, weight_scheme=scheme, target=target).wiring
    top = 2 ** (bits - 1) - 1
    moved = scheme is Scheme.ASYMMETRIC and target == "ort-cpu" and bits <= 6
    zeros = set()
    for node in wiring.all("Conv", "Gemm"):
        codes = onnx.numpy_helper.to_array(wiring.codes(node.input[1])).astype(int)
        _, zero = wiring.parameters(node.input[1])
        assert wiring.codes(node.input[1]).data_type == onnx.TensorProto.INT8
        zeros |= set(zero.reshape(-1).tolist())
        if moved:
            rows = codes.reshape(len(codes), -1)
            assert max(int(np.ptp(rows, axis=1).max()), *np.abs(rows).max(axis=1)) <= 2**bits - 1
            assert bits < 4 or np.abs(codes).max() > top + 1
        else:
            assert codes.max() <= top
            assert codes.min() >= (-top if scheme is Scheme.SYMMETRIC else -top - 1)
    assert (zeros == {0}) == (moved or scheme is Scheme.SYMMETRIC)


@pytest.mark.parametrize("granularity", WeightGranularity)
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_moved_codes_stand_for_the_same_weights(granularity: WeightGranularity, bits: int) -> None:
    options = {"weight_bits": bits, "edge_bits": 2, "weight_scheme": "asymmetric", "weight_granularity": granularity}
    moved, plain = (net(block_size=4, target=target, **options).wiring for target in ("ort-cpu", "generic"))
    layers = zip(moved.all("Conv", "Gemm"), plain.all("Conv", "Gemm"), strict=True)
    assert len(plain.all("Conv", "Gemm")) > 2
    for one, other in layers:
        np.testing.assert_array_equal(moved.real(one.input[1]), plain.real(other.input[1]))


def test_the_best_effort_gives_weights_of_few_bits_all_codes() -> None:
    """Asymmetric; those of 8 bits, such as the first and the last layer's, are not, nor are those of other efforts."""
    few = {"weight_bits": 4, "edge_bits": 8}
    for options, chosen in (({"effort": "best"}, False), ({}, True), ({"effort": "best", "target": "tensorrt"}, True)):
        result = net(**few, **options)
        assert {(x.weight.bits, x.weight.symmetric) for x in result.plan.layers} == {(4, chosen), (8, True)}
    assert all(x.weight.symmetric for x in net(effort="best", weight_scheme="symmetric", weight_bits=4).plan.layers)
