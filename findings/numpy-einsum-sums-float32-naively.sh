#!/usr/bin/env bash
# numpy 2.2.6: einsum adds up float32 numbers into a few running totals, where sum along the same axis adds pairwise.
#
# `einsum("cx->c", x)` and `x.sum(axis=1)` are the same sums of the same rows. sum is right to some millionths, as its
# documentation on pairwise summation lets one expect. The running totals of einsum have rounding errors that grow with
# the length of the row: a constant row of 2048 x 2048 numbers, a channel of a large picture, is a quarter of a percent
# off, one of 4096 x 4096 a percent, some six hundred times as much as sum. Means for calibration that are taken by einsum, which is the faster of the
# two, inherit that, and nothing is said.
#
# Seen on Python 3.11, x86 with AVX2 (the errors depend on the width of its registers, so that only their size is held):
#   2048 einsum 0.0025 sum 0.0000041
#   4096 einsum 0.0099 sum 0.0000161
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.2.6 2>/dev/null
"$place/venv/bin/python" - <<'PY'
import numpy as np

assert np.__version__ == "2.2.6"
found = []
for side in (2048, 4096):
    rows = np.full((2, side * side), 0.1, np.float32)
    right = float(rows[0, 0]) * rows.shape[1]
    errors = [abs(float(sums[0]) / right - 1) for sums in (np.einsum("cx->c", rows), rows.sum(axis=1))]
    print(side, f"einsum {errors[0]:.4f} sum {errors[1]:.7f}")
    found.append(errors[0] > 1e-3 and errors[0] > 50 * errors[1])
assert all(found), "it changed"
PY
echo "as it was found"
