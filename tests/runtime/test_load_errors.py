"""What the runtime refuses, in one sentence, with a hint that helps: each model is refused for one reason alone."""

from __future__ import annotations

import onnx.parser
import pytest

from qconv.errors import QconvError
from qconv.runtime.session import OWN_HINT, Session

PICTURES = "float[1,3,8,8]"


def model(body: str, inputs: str = f"{PICTURES} x", opset: int = 17, imports: str = "", version: int = 8) -> bytes:
    text = f'<ir_version: {version}, opset_import: ["" : {opset}{imports}]> g ({inputs}) => ({PICTURES} y) {{ {body} }}'
    return onnx.parser.parse_model(text).SerializeToString()


DOUBLES = "double[1,3,8,8] x, double[4,3,3,3] w"
REFUSED = {
    "custom": (model("y = acme.Foo(x)", imports=', "acme": 1'), "operator acme:Foo", "without custom operators"),
    "unknown": (model("y = Foo(x)"), "operator Foo, which opset 17 does not have", "a domain of its own"),
    "newer": (model("y = Gelu(x)"), "operator Gelu, which opset 17 does not have", "at an opset that has it"),
    "old": (
        model("y = Mul<broadcast=1,axis=1>(x, w)", f"{PICTURES} x, float[3] w", 6, version=3),
        r"no kernel for Mul\(6\)",
        "lower opset from 7 on",
    ),
    "old kernel": (
        model("c = GlobalAveragePool(x) y = Cast<to=1>(c)", "double[1,3,8,8] x"),
        r"no kernel for GlobalAveragePool\(1\)",
        "in float32",
    ),
    "double": (model("c = Conv(x, w) y = Cast<to=1>(c)", DOUBLES), r"no kernel for Conv\(11\)", "in float32"),
    "future": (model("y = Relu(x)", opset=99), "cannot load", "lower opset"),
    "ir": (model("y = Relu(x)", version=99), "Unsupported model IR version: 99", "lower ir_version"),
    "types": (model("y = Mul(x, d)", f"{PICTURES} x, double[1] d"), "bound to different types", "by a Cast"),
    "dangling": (model("y = Add(x, nothing)"), "Node input 'nothing' is not", "computed nowhere"),
    "cycle": (model("a = Add(x, b) b = Relu(a) y = Relu(b)"), "not acyclic", "its own result"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_the_hint_is_for_what_is_the_matter(kind: str) -> None:
    data, says, hint = REFUSED[kind]
    with pytest.raises(QconvError, match=says) as caught:
        Session(data, name="net.onnx")
    assert hint in caught.value.hint
    assert "net.onnx" in caught.value.message
    assert "/onnxruntime" not in caught.value.message
    assert ".cc:" not in caught.value.message
    assert ("another opset" in caught.value.hint) is False


def test_of_a_model_that_was_made_here_the_file_is_not_blamed() -> None:
    for name in ("a part of the model", "the quantized model", "the folded float model"):
        with pytest.raises(QconvError) as caught:
            Session(REFUSED["cycle"][0], name=name)
        assert caught.value.hint == OWN_HINT
