"""qconv turns a float ONNX convolutional network and a folder of pictures into a quantized ONNX model.

The names in `__all__` are public; all modules inside the package are private, and may move in any version.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qconv.analysis.evaluation import Evaluation
    from qconv.api import (
        audit,
        benchmark,
        compare,
        diagnose,
        evaluate,
        finetune,
        inspect,
        merge_stats,
        quantize,
        study_samples,
        synthesize,
    )
    from qconv.config.choices import Drop, LayerBits
    from qconv.config.data_options import DataOptions, PreprocessingOptions
    from qconv.config.recipe import Recipe
    from qconv.config.targets import TARGETS, Target
    from qconv.errors import QconvError
    from qconv.reporter import Reporter
    from qconv.results.comparison import Comparison, Diagnosis
    from qconv.results.quantize import Report

__version__ = "0.1.0"

__all__ = [
    "TARGETS",
    "Comparison",
    "DataOptions",
    "Diagnosis",
    "Drop",
    "Evaluation",
    "LayerBits",
    "PreprocessingOptions",
    "QconvError",
    "Recipe",
    "Report",
    "Reporter",
    "Target",
    "__version__",
    "audit",
    "benchmark",
    "compare",
    "diagnose",
    "evaluate",
    "finetune",
    "inspect",
    "merge_stats",
    "quantize",
    "study_samples",
    "synthesize",
]

_PLACES = {
    "TARGETS": "config.targets",
    "Comparison": "results.comparison",
    "DataOptions": "config.data_options",
    "Diagnosis": "results.comparison",
    "Drop": "config.choices",
    "Evaluation": "analysis.evaluation",
    "LayerBits": "config.choices",
    "PreprocessingOptions": "config.data_options",
    "QconvError": "errors",
    "Recipe": "config.recipe",
    "Report": "results.quantize",
    "Reporter": "reporter",
    "Target": "config.targets",
}
"""Where names are, but for functions, which are in `api`."""


def __getattr__(name: str) -> Any:
    # onnx and onnxruntime take a second to import; `qconv --help` needs neither
    if name not in __all__:
        raise AttributeError(f"module 'qconv' has no attribute {name!r}")
    return getattr(import_module(f"qconv.{_PLACES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
