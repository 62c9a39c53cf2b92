"""qconv turns a float ONNX convolutional network and a folder of pictures into a quantized ONNX model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qconv.config.data_options import DataOptions
from qconv.config.preprocessing import PreprocessingOptions
from qconv.config.recipe import Recipe
from qconv.errors import QconvError

if TYPE_CHECKING:
    from qconv.pipeline.quantize import quantize

__version__ = "0.1.0"
__all__ = ["DataOptions", "PreprocessingOptions", "QconvError", "Recipe", "__version__", "quantize"]


def __getattr__(name: str) -> Any:
    # onnx and onnxruntime take a second to import; `qconv --help` needs neither
    if name == "quantize":
        from qconv.pipeline.quantize import quantize

        return quantize
    raise AttributeError(f"module 'qconv' has no attribute {name!r}")
