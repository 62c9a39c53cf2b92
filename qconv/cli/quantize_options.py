"""The options of `quantize`, which recipes name as well."""

from __future__ import annotations

import click

from qconv.cli.option_types import BitsType, DropType, make_choice
from qconv.cli.options import (
    combine_options,
    common_options,
    csv_option,
    decode_option,
    make_gate_options,
    preprocessing_options,
    report_option,
)
from qconv.config.choices import (
    BIAS_CORRECTIONS,
    BIT_ALLOCATIONS,
    BLOCK_SIZE,
    CALIBRATOR_NAMES,
    CANDIDATE_BITS,
    COMMON_RUNTIME,
    EFFORTS,
    FALLBACKS,
    FLOAT_BUDGET,
    NAMED_RECIPES,
    PERCENTILE,
    PRECISE_SHARE,
    ROUNDINGS,
    WEIGHT_CALIBRATORS,
    Scheme,
    WeightGranularity,
)
from qconv.config.data_options import Layout
from qconv.config.targets import TARGETS

quantize_options = combine_options(
    click.option(
        "--calib",
        multiple=True,
        metavar="DIR|FILE|none",
        help="Calibration pictures: a folder, or a file with one path a line; repeatable; or none: see "
        "`qconv manual data-free`.",
    ),
    click.option(
        "--fallback",
        type=click.Choice(FALLBACKS),
        help="With --calib none: made-up pictures to watch what no BatchNormalization tells of.  [default: an error]",
    ),
    click.option(
        "-o", "--output", metavar="OUT", help="Result; '-' is standard output.  [default: MODEL.w8a8.onnx by its bits]"
    ),
    csv_option,
    report_option,
    click.option(
        "--recipe",
        metavar="FILE.toml|QUANT",
        help="Take options from a file, or from a model that qconv wrote; those that are given as well win.",
    ),
    click.option("--save-recipe", metavar="FILE.toml", help="Also write the options into a file, for --recipe."),
    click.option(
        "--sweep",
        metavar="RECIPES.toml",
        help="Make one result of each recipe in the file, beside each other: see `qconv manual sweep`.",
    ),
    click.option(
        "--samples",
        default=128,
        show_default=True,
        metavar="N",
        type=click.IntRange(1),
        help="Pictures to use; all if fewer.",
    ),
    click.option("--batch", default=1, show_default=True, metavar="N", type=click.IntRange(1), help="Pictures a run."),
    click.option(
        "--seed", default=0, show_default=True, metavar="N", type=click.IntRange(0), help="Of the draw of pictures."
    ),
    click.option("--glob", "pattern", metavar="PATTERN", help="Use only pictures whose name or path matches."),
    click.option("--weight-bits", default=8, show_default=True, metavar="2..8|16", type=int, help="Bits of weights."),
    click.option(
        "--activation-bits", default=8, show_default=True, metavar="2..8|16|32", type=int, help="32: only weights."
    ),
    click.option(
        "--weight-scheme",
        type=make_choice(Scheme),
        help="Symmetric: zero is the middle code.  "
        "[default: symmetric, but asymmetric with --effort best and up to 6 bits]",
    ),
    click.option(
        "--activation-scheme",
        type=make_choice(Scheme),
        help="Symmetric: zero is the middle code, or the lowest where nothing is negative.  "
        "[default: asymmetric, or what the target takes]",
    ),
    click.option(
        "--weight-granularity",
        default="per-channel",
        show_default=True,
        type=make_choice(WeightGranularity),
        help="What shares a scale.",
    ),
    click.option(
        "--block-size",
        metavar="N",
        type=click.IntRange(1),
        help=f"Input channels that share a scale, for per-block.  [default: {BLOCK_SIZE}]",
    ),
    click.option(
        "--edge-bits",
        default=8,
        show_default=True,
        metavar="2..8|16",
        type=int,
        help="Least bits of the first and last layer.",
    ),
    click.option(
        "--layer-bits",
        metavar="FILE.toml",
        help="Bits of single layers, by globs of their names: see `qconv manual bits`.",
    ),
    click.option(
        "--max-drop",
        type=DropType(),
        help="Search for the fewest bits of each layer that lose no more: agreement:0.01, boxes:0.01, map:0.005, "
        "miou:0.005, top1:0.005 or sqnr:25.",
    ),
    click.option(
        "--target-size",
        type=float,
        metavar="R",
        help="Search for the best bits of each layer whose weights take this share of float's size.",
    ),
    click.option(
        "--candidate-bits",
        type=BitsType(),
        help=f"What such a search may choose from.  [default: {','.join(map(str, CANDIDATE_BITS))}]",
    ),
    click.option(
        "--candidate-activation-bits",
        type=BitsType(),
        help="What a tensor between layers may have where 8 bits lose too much; target generic takes 16 as well as "
        "float.  [default: 8,float for target ort-cpu, else 8]",
    ),
    click.option(
        "--save-layer-bits",
        metavar="FILE.toml",
        help="Also write bits and nodes in float as they were found, for --layer-bits.",
    ),
    click.option(
        "--pack/--no-pack",
        default=False,
        help="Store weights of 7 bits or fewer at their bits: the smallest file, as fast and with the same outputs, "
        "but slower to load.",
    ),
    click.option(
        "--needs",
        metavar="ORT-VERSION",
        help="The oldest ONNX Runtime that has to run the result, 1.19 or newer; --pack stores codes so that it can. "
        "The summary tells which the result needs, often an older one.  "
        f"[default: {'.'.join(map(str, COMMON_RUNTIME))} for --pack]",
    ),
    click.option(
        "--allow-matmul-nbits/--no-allow-matmul-nbits",
        default=False,
        help="With --activation-bits 32: let ONNX Runtime make MatMulNBits of MatMul, and of Gemm without transB, "
        "which keeps their codes in memory, but also rounds what they read; else they run as exact floats.",
    ),
    click.option(
        "--calibrator",
        type=click.Choice(CALIBRATOR_NAMES),
        help="How activations get ranges.  [default: output-mse, but minmax for --calib none]",
    ),
    click.option(
        "--percentile",
        type=float,
        metavar="P",
        help=f"Share of values inside the range, for --calibrator percentile.  [default: {PERCENTILE}]",
    ),
    click.option(
        "--weight-calibrator",
        type=click.Choice(WEIGHT_CALIBRATORS),
        default="max",
        show_default=True,
        help="How weights get ranges: their largest value, or what clips them at the least error.",
    ),
    click.option(
        "--effort",
        type=click.Choice(EFFORTS),
        default="balanced",
        show_default=True,
        help="How much time goes into accuracy: see `qconv manual effort`.",
    ),
    click.option(
        "--rounding",
        type=click.Choice(ROUNDINGS),
        help="Which way each weight rounds.  [default: second-order, but nearest for --effort fast]",
    ),
    click.option(
        "--bit-allocation",
        type=click.Choice(BIT_ALLOCATIONS),
        default="none",
        show_default=True,
        help="Whose channels get bits of their own, by the width of their ranges, with the same mean.",
    ),
    click.option(
        "--bias-correction",
        type=click.Choice(BIAS_CORRECTIONS),
        help="Whether biases take back what rounding the weights does to means: as calibration saw them, layer after "
        "layer, or as BatchNormalization tells them.  [default: measured, but analytic for --calib none]",
    ),
    click.option(
        "--recipe-name",
        type=click.Choice(list(NAMED_RECIPES)),
        help="A published recipe: sets several of these options; those that are given as well win.",
    ),
    click.option("--save-stats", metavar="FILE", help="Also write what was seen of the activations into a file."),
    click.option(
        "--stats", metavar="FILE", help="Take that from a file; --calib is then only for checking the result."
    ),
    click.option(
        "--target",
        default="ort-cpu",
        show_default=True,
        type=click.Choice(list(TARGETS)),
        help="What will run the result: see `qconv manual targets`.",
    ),
    click.option(
        "--equalize/--no-equalize",
        default=None,
        help="Scale channels of the float network so that less is lost in rounding; it computes the same.  "
        "[default: unless --effort is fast]",
    ),
    click.option(
        "--tune-ranges/--no-tune-ranges",
        default=None,
        help="Choose ranges of activations by what the network's outputs lose.  "
        "[default: unless --effort is fast or a --calibrator is given]",
    ),
    click.option(
        "--tune-latency/--no-tune-latency",
        default=False,
        help="Choose what stays in float by timing it on this machine, not by the committed cost table.",
    ),
    click.option(
        "--float-budget",
        type=float,
        metavar="0..1",
        help="Share of the all-integer time that may be spent on float for accuracy; of other targets than ort-cpu, "
        "the share of activations that may have more than 8 bits; 0 for none.  "
        f"[default: {FLOAT_BUDGET}, with --tune-ranges or --effort fast; {PRECISE_SHARE} beside "
        "--candidate-activation-bits for others]",
    ),
    click.option(
        "--scale-gates/--no-scale-gates",
        default=False,
        help="Scale the channels of the SiLU gates that make most of the noise at the outputs, each behind a depthwise "
        "layer of its own, where that gains; the float network computes the same.",
    ),
    click.option(
        "--saturation-safe/--no-saturation-safe",
        default=None,
        help="7-bit weights where an x86 CPU without VNNI could overflow, for any picture; or never.  "
        "[default: where it would on the calibration pictures]",
    ),
    click.option(
        "--keep-float", multiple=True, metavar="NODE-GLOB", help="Leave nodes whose name matches in float; repeatable."
    ),
    click.option(
        "--keep-float-op", multiple=True, metavar="TYPE", help="Leave operators of this type in float; repeatable."
    ),
    click.option(
        "--opset", type=int, metavar="N", help="Opset of the result.  [default: the lowest that model and types need]"
    ),
    click.option(
        "--embed-preprocessing",
        type=make_choice(Layout),
        help="Write the normalisation into the result, which then takes uint8 pixels in this layout.",
    ),
    click.option(
        "--labels",
        metavar="FILE|DIR",
        help="Boxes or masks of the pictures, by which mAP or mIoU of both models are told, and gates and --max-drop, "
        "if there are some, measure: see `qconv evaluate --schema`.",
    ),
    click.option("--label-map", metavar="FILE.toml", help="Which class of the model each of these labels is."),
    click.option(
        "--classes",
        metavar="FILE",
        help="The names of classes in --labels, in output order, one a line; without --labels the class folders of the "
        "pictures, by which top-1 is told.",
    ),
    make_gate_options("by --labels or "),
    preprocessing_options,
    decode_option,
    common_options,
)
