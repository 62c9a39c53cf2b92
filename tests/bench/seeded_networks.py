"""Makes classifiers of timm without their weights: networks that say something of pictures, from a seed alone.

    python -m tests.bench.seeded_networks FOLDER --images DIR [--only NAME]

Kernels are drawn as He et al. 2015 draw them, with variance 2 / fan-in; gammas of BatchNormalization are log-normal,
betas normal, as spread as in trained networks. Layer scales and gammas that training starts from next to nothing are as
others. Statistics of BatchNormalization are those of real pictures. Branches that are one kernel in the published
inference form (RepViT, FastViT) are merged, but for the networks called `branched`, which are as they are trained.

Three things are not as plain draws, since networks that nobody has trained amplify whatever they are given. In channels
that hardly ever fire, or whose gate is shut on nearly all pictures, statistics blow up the one picture that does not:
by 500 in EfficientNet-B0. So betas have a mean above 0, and kernels of squeeze-and-excite are scaled by GATE. And the
last layer reads the features along which pictures differ most, COMPONENTS of them, each class another mixture of mean 0
and deviation 1, as a trained one would: classes drawn at random have hardly more of the picture than of noise in them.

Needs packages that qconv does not: install them into an environment of their own, and run this file by its Python.

    pip install torch==2.13.0 numpy onnx onnxruntime pillow pyyaml safetensors huggingface_hub
    pip install --no-deps timm==1.0.31

torchvision is not among them: timm imports it for what classifiers never call.
"""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.cases import BRANCHED, SEEDED, Case, pictures
from tests.bench.ultralytics_models import AbsentFinder, set_statistics, standardize

MADE = {**SEEDED, **BRANCHED}
SEED = 0
PICTURES = 128
OPSET = 17
SPREAD = 0.35
"""Deviation of log gamma, and of beta: 0.19 to 0.42, and 0.34 to 0.82 of gamma, in four trained networks (ResNet-20,
MobileNetV2, EfficientNet-Lite0 and B0), medians over their layers."""

MEAN_BETA = 0.5
GATE, SQUEEZE = 0.25, ".se."
COMPONENTS = 8

LAYER_SCALE = ".gamma"
"""What timm calls layer scales; those of normalizations are called weight."""


class AbsentTorchvision(AbsentFinder):
    """Imports torchvision as a module of classes that nothing calls."""

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to fill in."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.seeded_networks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="where NAME.onnx are written")
    parser.add_argument("--images", type=Path, required=True, help="folder with pictures")
    parser.add_argument("--only", action="append", metavar="NAME", choices=MADE, help="this network; repeatable")
    wanted = parser.parse_args()
    wanted.folder.mkdir(parents=True, exist_ok=True)
    for name, (architecture, case) in MADE.items():
        if not wanted.only or name in wanted.only:
            fed = read_pictures(wanted.images, case)
            network, raw = make(architecture, fed, merged=name in SEEDED)
            path = wanted.folder / case.model
            export(network, fed[:1], path)
            said = run(path, fed)
            print(f"{name}: {describe(raw)} by random classes; {agreement(network, fed, said)}")


def read_pictures(folder: Path, case: Case) -> Any:
    """Pictures of a folder as the case feeds them, (N, 3, H, W)."""
    import torch

    return torch.from_numpy(np.concatenate([case.prep(path) for path in pictures(folder, PICTURES)]))


def make(architecture: str, fed: Any, *, merged: bool) -> tuple[Any, Any]:
    """The network in PyTorch by timm's name, and what it says of the pictures before its last layer is made.

    merged: its branches are one kernel each.
    """
    sys.meta_path.append(AbsentTorchvision())
    import timm
    import torch

    torch.manual_seed(SEED)
    network = timm.create_model(architecture, pretrained=False)
    draw_weights(network)
    set_statistics(network, fed, network)
    raw = said_of(network, fed)
    read_components(network, fed)
    if merged:
        timm.utils.reparameterize_model(network, inplace=True)
    return network, raw


def draw_weights(network: Any) -> None:
    """Draws kernels, gammas and betas, and sets layer scales to 1."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(LAYER_SCALE):
                parameter.fill_(1.0)
        for name, module in network.named_modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                torch.nn.init.kaiming_normal_(module.weight)
                module.weight *= GATE if SQUEEZE in name else 1.0
            elif isinstance(module, _BatchNorm):
                module.weight.normal_(0, SPREAD).exp_()
                module.bias.normal_(MEAN_BETA, SPREAD)


def read_components(network: Any, fed: Any) -> None:
    """Makes the last layers, of which RepViT has two, mixtures of the features' principal components."""
    import torch

    heads = [m for m in network.modules() if isinstance(m, torch.nn.Linear) and m.out_features == network.num_classes]
    heard: dict[Any, list[Any]] = {head: [] for head in heads}
    hooks = [
        head.register_forward_pre_hook(lambda module, inputs: heard[module].append(inputs[0].detach()))
        for head in heads
    ]
    said_of(network, fed)
    for hook in hooks:
        hook.remove()
    for head, seen in heard.items():
        features = torch.cat(seen)  # (N, features)
        _, _, components = torch.linalg.svd(features - features.mean(dim=0), full_matrices=False)
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.out_features, COMPONENTS) @ components[:COMPONENTS])
            standardize(head, [head(features)])


def said_of(network: Any, fed: Any) -> Any:
    """The logits of all pictures, (N, classes)."""
    import torch

    with torch.no_grad():
        return torch.cat([network(batch) for batch in fed.split(16)]).numpy()


def export(network: Any, picture: Any, path: Path) -> None:
    """Writes an ONNX file by PyTorch's tracing exporter, which keeps BatchNormalizations where it may not optimize."""
    import torch

    torch.onnx.export(
        network,
        (picture,),
        path,
        input_names=["input"],
        output_names=["logits"],
        opset_version=OPSET,
        training=torch.onnx.TrainingMode.PRESERVE,
        dynamo=False,
    )


def run(path: Path, fed: Any) -> Any:
    """What a file says of the pictures, (N, classes)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return np.concatenate([session.run(None, {"input": picture[None].numpy()})[0] for picture in fed])


def describe(logits: Any) -> str:
    """How much of the power of logits differs between pictures."""
    varying = np.square(logits - logits.mean(axis=0)).mean() / np.square(logits).mean()
    return f"{100 * varying:.1f} % of the logits' power differs between pictures"


def agreement(network: Any, fed: Any, said: Any) -> str:
    """The largest difference between the network in PyTorch and its file."""
    return f"the file differs by {np.abs(said_of(network, fed) - said).max():.1e}"


if __name__ == "__main__":
    main()
