"""Forms of a Q/DQ file that are for speed alone: written, found, and taken back.

    codes -> Pad of channels with the zero point -> DequantizeLinear -> Conv        weights with zeros for them
    codes (N, 3, H, W) -> Gather of channels 0, 1, 2, 1 -> DequantizeLinear -> Conv
    a - b as Add of a, and of b read with the negated scale
    LRN as a sum of squares and square roots, see `fast_normalization`
    AveragePool as a depthwise Conv, see `fast_pools`

Of three channels the second is there twice, and each of its weights on one side, with zero on the other. So no two
products are added in 16 bits that were not before, which on CPUs without VNNI saturates (`quantization.saturation`).
Those that are follow a row of kernel places with three channels each:

    0 1 | 2 0' | 1' 2'    at even places (0 1) (2 -), at odd ones (0 -) (2 1)

`pad_layer` writes the first, `take_back_fast_forms` takes back all, without a number changed. Whoever reads a
quantized file beside its float model, by tensors or by weights, takes them back first: then shapes and signs are those
of the float model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qconv.ir.fast_normalization import close_normalizations
from qconv.ir.fast_pools import layers_to_pools
from qconv.ir.model import Model, Node, Value, attribute, constant_array, dims, input_of, set_dims
from qconv.ir.rewriting import standard_op_type
from qconv.ir.stored_weights import Dequantizer, read_dequantizer

TWICE = [0, 1, 2, 1]
"""The channels of a padded layer that has three."""


def pad_layer(model: Model, conv: Node, inputs: int, made: dict[Value, Value] | None = None) -> bool:
    """Give a Conv of codes `inputs` input channels; False where its codes or weights are not stored so that it can.

    made: what was padded before, by what it was made of, so that layers that read one tensor share it.
    """
    data, weight = _read_both(conv)
    codes = None if weight is None else constant_array(weight.codes)
    if data is None or weight is None or codes is None or codes.ndim != 4 or data.zero is None or weight.zero is None:
        return False
    zero, zeros, more = constant_array(data.zero), constant_array(weight.zero), inputs - codes.shape[1]
    if more <= 0 or zero is None or zero.size != 1 or zeros is None or zeros.any():
        return False
    made = {} if made is None else made
    source = data.node.outputs[0]
    if source not in made:
        made[source] = _pad_codes(model, f"{conv.name}_channels", data, codes.shape[1], more)
    name = weight.node.outputs[0].name or ""
    wide = model.constant(weight.codes.name or "", _pad_weights(codes, more))
    own = _dequantizer_of(model, weight, wide, name, weight.node.outputs[0])
    model.insert_after(weight.node, own)
    model.set_input(conv, 0, made[source])
    model.set_input(conv, 1, own.outputs[0])
    _drop_unread(model, data.node, weight.node)
    return True


def keeps_pairs(inputs: int) -> bool:
    """Whether a padded layer adds only products in pairs that it adds without padding."""
    return inputs % 2 == 0 or inputs in (1, len(TWICE) - 1)


def _pad_weights(codes: NDArray[np.integer], more: int) -> NDArray[np.integer]:
    """Weights (O, I + more, kH, kW), those of the channel that is there twice on the side where its neighbour was."""
    outputs, inputs, *kernel = codes.shape
    wide = np.pad(codes, [(0, 0), (0, more), (0, 0), (0, 0)]).reshape(outputs, inputs + more, -1)
    if inputs + more == len(TWICE) == inputs + 1:
        wide[:, -1, 1::2] = wide[:, TWICE[-1], 1::2]
        wide[:, TWICE[-1], 1::2] = 0
    return wide.reshape(outputs, inputs + more, *kernel)


def _pad_codes(model: Model, name: str, data: Dequantizer, inputs: int, more: int) -> Value:
    """The codes of a tensor with further channels, dequantized."""
    source, zero = data.node.outputs[0], constant_array(data.zero)
    assert zero is not None
    if inputs + more == len(TWICE) == inputs + 1:
        order = model.constant("channel_order", np.array(TWICE, np.int64))
        pad = model.build("Gather", [data.codes, order], name=name, attributes={"axis": 1}, like=data.codes)
    else:
        widths = model.constant("channel_widths", np.array([0] * 5 + [more, 0, 0], np.int64))
        fill = data.zero if zero.ndim == 0 else model.constant("channel_fill", zero.reshape(()))
        pad = model.build("Pad", [data.codes, widths, fill], name=name, like=data.codes)
    sizes = dims(source)
    if sizes is not None and len(sizes) == 4 and sizes[1] is not None:
        set_dims(pad.outputs[0], [sizes[0], sizes[1] + more, *sizes[2:]])
    else:
        pad.outputs[0].shape = None
    own = _dequantizer_of(model, data, pad.outputs[0], f"{source.name}_padded", source)
    model.insert_after(data.node, pad, own)
    return own.outputs[0]


def _dequantizer_of(model: Model, known: Dequantizer, codes: Value, name: str, like: Value) -> Node:
    """A dequantizer of other codes with the parameters of a known one."""
    attributes = {"axis": known.axis} if attribute(known.node, "axis") is not None else {}
    inputs = [codes, *known.others]
    node = model.build("DequantizeLinear", inputs, name=name, attributes=attributes, like=like)
    node.outputs[0].shape = None if codes.shape is None else codes.shape.copy()
    return node


def take_back_fast_forms(model: Model) -> None:
    """Write a quantized model as it is without its fast forms, in place."""
    drop_channel_padding(model)
    close_normalizations(model)
    layers_to_pools(model)
    for node in model.nodes():
        made = read_dequantizer(input_of(node, 1)) if standard_op_type(node) == "Add" else None
        scale = None if made is None or made.at_load else constant_array(made.scale)
        if made is None or scale is None or scale.size != 1 or not scale.reshape(-1)[0] < 0:
            continue
        value = made.node.outputs[0]
        inputs = [made.codes, model.constant("scale", -scale), *([] if made.zero is None else [made.zero])]
        own = model.build("DequantizeLinear", inputs, name=f"{value.name}_plain", like=value)
        model.insert_after(made.node, own)
        model.become(node, "Sub", [node.inputs[0], own.outputs[0]])
        _drop_unread(model, made.node)


def drop_channel_padding(model: Model) -> dict[Node, int]:
    """Take back the channels that codes and weights of layers are padded with. Returns how many these layers had."""
    found = {}
    for node in model.nodes():
        if standard_op_type(node) == "Conv":
            data, weight = _read_both(node)
            pad = None if data is None else padding_of_channels(data.codes)
            codes = None if weight is None else constant_array(weight.codes)
            if data is None or weight is None or codes is None or pad is None or pad.inputs[0] is None:
                continue
            bare = _unpad_weights(pad, codes)
            if bare is not None:
                found[node] = codes.shape[1]
                _unpad_layer(model, node, data, weight, bare)
    return found


def _unpad_weights(pad: Node, codes: NDArray[np.integer]) -> NDArray[np.integer] | None:
    """The weights without further channels; None where the ones are not zero, or sums of the others have no code."""
    more = added_channels(pad)
    if not 0 < more < codes.shape[1]:
        return None
    bare = codes[:, :-more].astype(np.int32)
    if standard_op_type(pad) == "Gather":
        bare[:, TWICE[-1]] += codes[:, -1]
    elif codes[:, -more:].any():
        return None
    kept = np.iinfo(codes.dtype)
    return bare.astype(codes.dtype) if kept.min <= bare.min() and bare.max() <= kept.max else None


def padding_of_channels(codes: Value | None) -> Node | None:
    """The node that adds channels, and does nothing else, to the codes that it reads; None where there is none."""
    node = None if codes is None else codes.producer()
    return node if node is not None and added_channels(node) else None


def added_channels(pad: Node) -> int:
    """How many channels a Pad or Gather adds behind those of (N, C, H, W); 0 for what does anything else."""
    widths = constant_array(input_of(pad, 1))
    if standard_op_type(pad) == "Gather":
        twice = widths is not None and attribute(pad, "axis", 0) == 1 and widths.tolist() == TWICE
        return int(twice and (dims(pad.inputs[0]) or [])[1:2] == [len(TWICE) - 1])  # type: ignore[arg-type]
    if standard_op_type(pad) != "Pad" or attribute(pad, "mode", "constant") != "constant" or input_of(pad, 3):
        return 0
    if widths is None or widths.size != 8:
        return 0
    more = int(widths[5])
    return more if more > 0 and np.count_nonzero(widths) == 1 else 0


def _unpad_layer(model: Model, conv: Node, data: Dequantizer, weight: Dequantizer, codes: NDArray[np.integer]) -> None:
    pad = data.codes.producer()
    assert pad is not None
    assert pad.inputs[0] is not None
    bare, result = pad.inputs[0], data.node.outputs[0]
    known = next(
        (r for r in model.readers(bare) if r.op_type == "DequantizeLinear" and r.inputs[1] is data.scale), None
    )
    if known is None:
        known = _dequantizer_of(model, data, bare, f"{result.name}_bare", result)
        model.insert_before(pad, known)
    stored = model.constant(weight.codes.name or "", codes)
    own = _dequantizer_of(model, weight, stored, weight.node.outputs[0].name or "", weight.node.outputs[0])
    model.insert_after(weight.node, own)
    model.set_input(conv, 0, known.outputs[0])
    model.set_input(conv, 1, own.outputs[0])
    _drop_unread(model, data.node, weight.node, pad)


def _read_both(conv: Node) -> tuple[Dequantizer | None, Dequantizer | None]:
    """The dequantizers of a layer's data and of its weights."""
    found = (read_dequantizer(input_of(conv, index)) for index in (0, 1))
    data, weight = (made if made is None or not made.at_load else None for made in found)
    return data, weight


def _drop_unread(model: Model, *nodes: Node) -> None:
    """Remove nodes that nothing reads any more, each before what it reads."""
    for node in nodes:
        if node.graph is not None and not any(v.uses() or v.is_graph_output() for v in node.outputs):
            model.remove(node)
