#!/usr/bin/env bash
# ncnn 1.0.20261020: NanoDet of its Python model_zoo takes pictures in landscape format only.
#
# The program has to know how many columns of cells there are. For a picture that, padded, is wider than high it divides
# the number of cells by the rows. For all others it divides the number of classes, 80, so that 40 rows have two columns
# each. At the default size of 320 that ends in an IndexError for square pictures and those in portrait format, also for
# 319 x 305, which padding makes square. At a size of 64 there are fewer cells than classes, and no error: the boxes of
# a square picture come out at other places, and nothing is said.
#
# A network in ncnn's own format stands in for the one that the package would download: it shows the cell of 32 pixels
# that is bright as a thing of 64 pixels.
#
# Seen, of pictures by width and height, boxes by left, top, width and height (what sticks out is cut in part;
# the last one lies around the bright cell if left and top are 0 and 16):
#   320 x 256 at 320: [144, 80, 64, 64]
#   320 x 320 at 320: IndexError, of 80 places
#   256 x 320 at 320: IndexError, of 80 places
#   319 x 305 at 320: IndexError, of 80 places
#   64 x 64 at 64, bright from (0, 32) to (32, 64): [48, 0, 16, 64]
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check ncnn==1.0.20261020 numpy==2.2.6 \
  opencv-python-headless==4.12.0.88 portalocker==3.2.0 requests==2.32.5 tqdm==4.67.1 2>/dev/null
cd "$place"
"$place/venv/bin/python" - <<'PY'
from pathlib import Path

import ncnn
import numpy as np
from ncnn.model_zoo import nanodet

assert ncnn.__version__ == "1.0.20261020"
CLASSES, BINS, CELL = 80, 8, 32
"""CELL: in pixels; cells of other sizes see nothing."""


def write_network():
    """For each size of cells a Convolution for the scores, and one for the distances, one cell to all four sides."""
    ends = {8: ("792", "795"), 16: ("814", "817"), 32: ("836", "839")}
    lines, numbers = ["Input input 0 1 input.1", "Split split 1 6 input.1 i0 i1 i2 i3 i4 i5"], []

    def layers(start, end, side, weights, biases, last):
        outputs = len(biases)
        size = f"0={outputs} 1={side} 3={side} 5=1 6={weights.size}"
        lines.append(f"Convolution c{end} 1 1 {start} a{end} {size}")
        lines.append(f"{last} d{end} 1 1 a{end} b{end}")
        lines.append(f"Reshape e{end} 1 1 b{end} r{end} 0=-1 1={outputs}")
        lines.append(f"Permute f{end} 1 1 r{end} {end} 0=1")
        numbers.extend([np.zeros(1), weights.ravel(), biases])

    for place, (side, (scores, distances)) in enumerate(ends.items()):
        weights = np.zeros((CLASSES, 3, side, side))
        weights[0] = 4 / (3 * side * side) * (side == CELL)
        layers(f"i{2 * place}", scores, side, weights, np.full(CLASSES, -6.0), "Sigmoid")
        logits = np.tile(np.where(np.arange(BINS) == 1, 20.0, -20.0), 4)
        layers(f"i{2 * place + 1}", distances, side, np.zeros((4 * BINS, 3, side, side)), logits, "Noop")
    Path("nanodet_m.param").write_text("\n".join(["7767517", f"{len(lines)} 31", *lines, ""]))
    Path("nanodet_m.bin").write_bytes(np.concatenate(numbers).astype("<f4").tobytes())


def found(width, height, size, row, column):
    """What the program says of a picture in which one cell is bright."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[CELL * row : CELL * (row + 1), CELL * column : CELL * (column + 1)] = 255
    try:
        things = nanodet.NanoDet(target_size=size)(picture)
    except IndexError as error:
        return f"IndexError, of {str(error).split()[-1]} places"
    boxes = [[round(float(number)) for number in (o.rect.x, o.rect.y, o.rect.w, o.rect.h)] for o in things]
    return ", ".join(map(str, boxes))


write_network()
nanodet.get_model_file = lambda name: name  # the files just written
for case, expected in {
    (320, 256, 320, 3, 5): "[144, 80, 64, 64]",
    (320, 320, 320, 3, 5): "IndexError, of 80 places",
    (256, 320, 320, 5, 3): "IndexError, of 80 places",
    (319, 305, 320, 3, 5): "IndexError, of 80 places",
    (64, 64, 64, 1, 0): "[48, 0, 16, 64]",
}.items():
    width, height, size, row, column = case
    got = found(*case)
    bright = f", bright from ({CELL * column}, {CELL * row}) to ({CELL * (column + 1)}, {CELL * (row + 1)})"
    print(f"{width} x {height} at {size}{bright if size == 64 else ''}: {got}")
    assert got == expected, "it changed"
PY
echo "as it was found"
