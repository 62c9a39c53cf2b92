"""Accuracy that others have published for post-training quantization: ImageNet top-1 in %, as plain data.

Float baselines differ between sources, so drops are what compares. In the rows of few bits the first and last layer are
held at 8 bits, by all sources. ResNet-18 and -50 are relatives of ResNet-20 and no more: another data set, other sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

# whose row a network stands beside
BESIDE = {
    "ResNet-18": "resnet20",
    "ResNet-50": "resnet20",
    "MobileNetV2": "mobilenetv2",
    "EfficientNet-Lite0": "efficientnet_lite0",
}


@dataclass(frozen=True)
class Published:
    """`before` is the source's own float baseline; None where it gives none."""

    setting: str
    source: str
    method: str
    network: str
    quantized: float
    before: float | None
    granularity: str = "per-channel"

    @property
    def drop(self) -> float | None:
        """Points gained, so mostly below zero."""
        return None if self.before is None else round(self.quantized - self.before, 2)


KRISHNAMOORTHI = "Krishnamoorthi 2018, arXiv 1806.08342, table 3"
ADAROUND = "Nagel et al. 2020, table 7"
MQBENCH = "MQBench"
AIMET = "AIMET model zoo"
QDROP = "QDrop repository"
BANNER = "Banner et al. 2019, repository"
R18, R50, MV2, LITE0 = BESIDE

PUBLISHED: tuple[Published, ...] = (
    Published("W8A8", KRISHNAMOORTHI, "naive", R50, 75.0, 75.2, "per-tensor"),
    Published("W8A8", KRISHNAMOORTHI, "naive", MV2, 0.1, 71.9, "per-tensor"),
    Published("W8A8", KRISHNAMOORTHI, "symmetric", R50, 75.1, 75.2),
    Published("W8A8", KRISHNAMOORTHI, "symmetric", MV2, 69.8, 71.9),
    Published("W8A8", KRISHNAMOORTHI, "asymmetric", MV2, 69.7, 71.9),
    Published("W8A8", "Nagel et al. 2019, as quoted in AdaRound's table 7", "DFQ, no data", R18, 69.7, 69.68),
    Published("W8A8", "Nagel et al. 2019, as quoted in AdaRound's table 7", "DFQ, no data", MV2, 71.2, 71.72),
    Published("W8A8", "ZeroQ repository", "no data", R18, 71.43, 71.47),
    Published("W8A8", "ZeroQ repository", "no data", R50, 77.67, 77.72),
    Published("W8A8", "ZeroQ repository", "no data", MV2, 72.91, 73.03),
    Published("W8A8", MQBENCH, "MSE + EMA", R18, 70.88, 71.06),
    Published("W8A8", MQBENCH, "MSE + EMA", R50, 76.58, 76.63),
    Published("W8A8", MQBENCH, "MSE + EMA", MV2, 72.02, 72.68),
    Published("W8A8", AIMET, "PTQ", R18, 69.54, 69.75),
    Published("W8A8", AIMET, "PTQ", R50, 75.81, 76.14),
    Published("W8A8", AIMET, "PTQ", MV2, 71.14, 71.67),
    Published("W8A8", AIMET, "PTQ", LITE0, 75.36, 75.40),
    Published("W8A8", "NNCF model zoo, ONNX", "PTQ", R50, 74.63, 74.84),
    Published("W8A8", "NNCF model zoo, ONNX", "PTQ", MV2, 71.38, 71.87),
    Published("W8A8", "Sparsebit", "EMA", MV2, 69.71, 70.49),
    Published("W8A8", "Sparsebit", "MSE", LITE0, 75.15, None),
    Published("W8A8", "Sparsebit", "KL", LITE0, 31.1, None),
    Published("W8A8", "Sparsebit", "ACIQ", LITE0, 75.12, None),
    Published("W8A8", "Sony MCT", "real pictures", R18, 69.60, 69.86),
    Published("W8A8", "Sony MCT", "real pictures", MV2, 71.14, 71.89),
    Published("W4A8", MQBENCH, "nearest, min-max", R18, 52.25, 71.06),
    Published("W4A8", MQBENCH, "nearest, min-max", R50, 70.34, 76.63),
    Published("W4A8", MQBENCH, "nearest, min-max", MV2, 27.61, 72.68),
    Published("W4A8", ADAROUND, "AdaRound", R18, 68.55, 69.68),
    Published("W4A8", ADAROUND, "AdaRound", R50, 75.01, 76.07),
    Published("W4A8", ADAROUND, "AdaRound", MV2, 69.25, 71.72),
    Published("W4A8", AIMET, "AdaRound", R18, 69.1, 69.75),
    Published("W4A8", AIMET, "AdaRound", R50, 75.63, 76.14),
    Published("W4A8", AIMET, "AdaRound", LITE0, 74.46, 75.40),
    Published("W4A4", BANNER, "naive", R50, 62.15, 75.2),
    Published("W4A4", BANNER, "ACIQ, bit allocation, bias correction", R50, 73.33, 75.2),
    Published("W4A4", MQBENCH, "AdaRound", R18, 68.67, 71.06),
    Published("W4A4", MQBENCH, "BRECQ", R18, 68.52, 71.06),
    Published("W4A4", MQBENCH, "QDrop", R18, 68.84, 71.06),
    Published("W4A4", MQBENCH, "AdaRound", R50, 73.79, 76.63),
    Published("W4A4", MQBENCH, "BRECQ", R50, 74.66, 76.63),
    Published("W4A4", MQBENCH, "QDrop", R50, 74.98, 76.63),
    Published("W4A4", MQBENCH, "AdaRound", MV2, 65.74, 72.68),
    Published("W4A4", MQBENCH, "BRECQ", MV2, 67.23, 72.68),
    Published("W4A4", MQBENCH, "QDrop", MV2, 68.13, 72.68),
    Published("W4A4", QDROP, "QDrop", R18, 69.13, 71.06),
    Published("W4A4", QDROP, "QDrop", R50, 75.12, 77.00),
    Published("W4A4", QDROP, "QDrop", MV2, 67.83, 72.49),
    Published("W2A4", QDROP, "QDrop", R18, 64.38, 71.06),
    Published("W2A4", QDROP, "QDrop", R50, 70.31, 77.00),
    Published("W2A4", QDROP, "QDrop", MV2, 54.29, 72.49),
)


def beside(model: str, setting: str, granularity: str) -> list[Published]:
    """What stands beside a row of ours."""
    return [
        entry
        for entry in PUBLISHED
        if (BESIDE[entry.network], entry.setting, entry.granularity) == (model, setting, granularity)
    ]
