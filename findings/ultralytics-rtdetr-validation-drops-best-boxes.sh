#!/usr/bin/env bash
# ultralytics 8.4.46: validation of an RT-DETR drops its best boxes, and keeps as many of its worst.
#
# RTDETRValidator sorts the queries of a picture by score, and then keeps those over the threshold `conf` by a mask that
# it took before it sorted: the mask says which queries are good, and picks places of the ranking. The number of boxes is
# right, so that nothing looks wrong, but a query that was low by its own place pulls out whatever was sorted to this
# place. That happens at the threshold of 0.001 that `val` has by itself, too, where one query in front of the others is
# below it: the best box of the picture is gone. RTDETRPredictor of the same package keeps the right ones, so that
# `predict` and `val` of one network disagree, and an mAP of this program may be too low a mark for others to meet. 8.3.240
# does the same; from 8.4.47 on the network itself sorts, and its rows have another form.
#
# torchvision, whose operators nothing here needs, is replaced by a stand-in, as its builds must match those of PyTorch.
#
# Seen on Python 3.11, for queries that lie side by side, each a number with its score:
#   0: 0.1, 1: 0.9, 2: 0.2, 3: 0.8 over 0.5
#     predict  1: 0.9, 3: 0.8
#     val      3: 0.8, 0: 0.1
#   0: 0.0005, 1: 0.9, 2: 0.8 over 0.001
#     predict  1: 0.9, 2: 0.8
#     val      2: 0.8, 0: 0.0005
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy==2.2.6 opencv-python-headless==4.12.0.88 pillow==13.0.0 PyYAML==6.0.4 2>/dev/null
"$place/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps ultralytics==8.4.46 2>/dev/null
cd "$place"
export YOLO_CONFIG_DIR=$place YOLO_OFFLINE=true YOLO_AUTOINSTALL=false YOLO_VERBOSE=false
"$place/venv/bin/python" - <<'PY'
import importlib.metadata
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.28.0" if name == "torchvision" else version(name)
sys.modules |= {name: MagicMock() for name in ("torchvision", "torchvision.ops", "torchvision.ops.roi_align")}

import torch
import ultralytics
from ultralytics.models.rtdetr import RTDETRPredictor, RTDETRValidator

assert ultralytics.__version__ == "8.4.46"
SIDE, WIDTH = 320, 0.1


def told(boxes, scores):
    """Which queries these are, by where they lie, and their scores."""
    middles = (boxes[:, 0] + boxes[:, 2]) / 2 / SIDE
    return ", ".join(f"{int(middle / WIDTH)}: {score:.4g}" for middle, score in zip(middles.tolist(), scores.tolist()))


def kept(scores, **options):
    """What a network with one class says, and what of it both programs keep. Options: of the validator."""
    rows = [[(place + 0.5) * WIDTH, 0.5, 0.08, 0.2, score] for place, score in enumerate(scores)]
    output = torch.tensor([rows])  # (1, Q, 4 + 1): centre and size in shares of the input, and a score for each class
    validator = RTDETRValidator(args={"imgsz": SIDE, **options})
    (found,) = validator.postprocess(output.clone())
    predictor = RTDETRPredictor(overrides={"imgsz": SIDE, "conf": validator.args.conf})
    predictor.batch, predictor.model = (["picture"],), SimpleNamespace(names={0: "thing"})
    (shown,) = predictor.postprocess(output.clone(), None, torch.zeros(1, 3, SIDE, SIDE))
    print(", ".join(f"{place}: {score}" for place, score in enumerate(scores)), "over", validator.args.conf)
    return told(shown.boxes.xyxy, shown.boxes.conf), told(found["bboxes"], found["conf"])


for scores, options, expected in (
    ([0.1, 0.9, 0.2, 0.8], {"conf": 0.5}, ("1: 0.9, 3: 0.8", "3: 0.8, 0: 0.1")),
    ([0.0005, 0.9, 0.8], {}, ("1: 0.9, 2: 0.8", "2: 0.8, 0: 0.0005")),
):
    got = kept(scores, **options)
    print(f"  predict  {got[0]}\n  val      {got[1]}")
    assert got == expected, "it changed"
PY
echo "as it was found"
