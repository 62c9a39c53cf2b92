"""What do other runtimes make of packed codes? Prints a line for each runtime and form.

    python -m tests.bench.packed_forms [--model FLOAT.onnx] [--pictures DIR]

The network is quantized to weights of 4 and 2 bits and packed in every form. Each runtime that is installed here loads
each file in a process of its own and runs it on one picture; SQNR is against ONNX Runtime on the same file. Runtimes:
openvino, opencv-python-headless, MNN, iree-base-compiler with iree-base-runtime, pnnx with ncnn, onnx.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from tests.bench.cases import REPOSITORY

FORMS = {
    "int8 codes, opset 19": ("4", "--no-pack", "--opset", "19"),
    "int4, opset 21": ("4", "--pack"),
    "int2, opset 25": ("2", "--pack"),
    "bytes, opset 19": ("4", "--pack", "--needs", "1.22", "--opset", "19"),
    "bytes by int32, opset 19": ("4", "--pack", "--needs", "1.19", "--opset", "19"),
    "weights alone, int4": ("4", "--pack", "--activation-bits", "32"),
    "weights alone, bytes": ("4", "--pack", "--activation-bits", "32", "--needs", "1.22"),
}
MOST_SECONDS = 300

RUNTIMES = {
    "openvino": """
import openvino as ov
model = ov.Core().compile_model(ov.Core().read_model(path), "CPU")
y = model(x)[0]
infos = [n.get_rt_info() for n in model.get_runtime_model().get_ops()]
kinds = [(i["layerType"].astype(str), i["runtimePrecision"].astype(str)) for i in infos]
said = sum(k == "Convolution" and p in ("u8", "i8") for k, p in kinds), sum(k == "Convolution" for k, p in kinds)
note = f"{said[0]} of {said[1]} Convs in 8 bits"
""",
    "opencv-python-headless": """
import cv2
net = cv2.dnn.readNetFromONNX(path)
net.setInput(x)
y = net.forward()
""",
    "MNN": """
import subprocess, tempfile, MNN, os
out = os.path.join(tempfile.mkdtemp(), "m.mnn")
tool = os.path.join(os.path.dirname(sys.executable), "mnnconvert")
done = subprocess.run([tool, "-f", "ONNX", "--modelFile", path, "--MNNModel", out], capture_output=True, text=True)
if not os.path.exists(out): raise RuntimeError("mnnconvert writes no file")
net = MNN.nn.load_module_from_file(out, [name], [result])
given = MNN.expr.convert(MNN.expr.const(x, list(x.shape), MNN.expr.NCHW), MNN.expr.NC4HW4)
y = np.array(net.forward([given])[0].read())
""",
    "iree-base-compiler": """
import subprocess, tempfile, os
folder, here = tempfile.mkdtemp(), os.path.dirname(sys.executable)
mlir, vmfb = folder + "/m.mlir", folder + "/m.vmfb"
def tool(*words):
    done = subprocess.run([os.path.join(here, words[0]), *words[1:]], capture_output=True, text=True)
    if done.returncode: raise RuntimeError((done.stderr.strip().splitlines() or ["fails"])[0])
tool("iree-import-onnx", path, "-o", mlir)
device = "--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"
tool("iree-compile", mlir, *device, "-o", vmfb)
import iree.runtime as rt
module = rt.load_vm_flatbuffer_file(vmfb, driver="local-task")
names = [n for n in module.vm_module.function_names if not n.startswith("__") and "async" not in n]
y = np.asarray(module[names[0]](x).to_host())
note = f"{os.path.getsize(vmfb) >> 10} KB compiled"
""",
    "ncnn": """
import subprocess, os, shutil, tempfile, ncnn
folder = tempfile.mkdtemp(); copy = folder + "/m.onnx"; shutil.copy(path, copy)
tool = os.path.join(os.path.dirname(sys.executable), "pnnx")
subprocess.run([tool, copy, "inputshape=" + str(list(x.shape)).replace(" ", "")], capture_output=True, cwd=folder)
net = ncnn.Net()
if net.load_param(folder + "/m.ncnn.param") or net.load_model(folder + "/m.ncnn.bin"):
    raise RuntimeError("ncnn does not load what pnnx writes")
ex = net.create_extractor(); ex.input("in0", ncnn.Mat(x[0]))
y = np.array(ex.extract("out0")[1])
note = f"{os.path.getsize(folder + '/m.ncnn.bin') >> 10} KB"
""",
    "onnx": """
from onnx.reference import ReferenceEvaluator
y = ReferenceEvaluator(path).run(None, {name: x})[0]
""",
}

WORKER = """
import sys, numpy as np
path, name, result, given, wanted = sys.argv[1:]
x, want, note = np.load(given), np.load(wanted), ""
try:
{body}
except BaseException as error:
    print("no:", type(error).__name__, " ".join(str(error).split())[:110])
else:
    noise = float(np.sum((np.asarray(y, np.float64).reshape(want.shape) - want) ** 2))
    print("yes", f"{{10 * np.log10(float(np.sum(want.astype(np.float64) ** 2)) / max(noise, 1e-20)):.0f}} dB", note)
"""


def run_in(runtime: str, model: Path, x: np.ndarray, folder: Path) -> str:
    """What one runtime says of one file."""
    session = ort.InferenceSession(str(model))
    name, result = session.get_inputs()[0].name, session.get_outputs()[0].name
    given, wanted = folder / "x.npy", folder / "y.npy"
    np.save(given, x)
    np.save(wanted, session.run([result], {name: x})[0])
    body = "".join(f"    {line}\n" for line in RUNTIMES[runtime].strip().splitlines())
    words = [sys.executable, "-c", WORKER.format(body=body), str(model), name, result, str(given), str(wanted)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=MOST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"no: more than {MOST_SECONDS} s"
    said = [line for line in done.stdout.splitlines() if line.startswith(("yes", "no:"))]
    return said[-1] if said else f"no: ends with status {done.returncode}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(REPOSITORY / "tests" / "models" / "cifar_mobilenet.onnx"))
    parser.add_argument("--pictures", default=str(REPOSITORY / "calib_samples"))
    parser.add_argument("--preprocess", default="")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        for form, (bits, *options) in FORMS.items():
            out = folder / f"{form}.onnx".replace(" ", "_").replace(",", "")
            asked = [sys.executable, "-m", "qconv", "quantize", given.model, "--calib", given.pictures, "-o", str(out)]
            if given.preprocess:
                asked += ["--preprocess", given.preprocess]
            asked += ["--weight-bits", bits, "--edge-bits", bits, "--effort", "fast", "--quiet", *options]
            subprocess.run(asked, check=True, capture_output=True)
            proto = onnx.load(out)
            shape = [d.dim_value or 1 for d in proto.graph.input[0].type.tensor_type.shape.dim]
            for value in (*proto.graph.input, *proto.graph.output):
                value.type.tensor_type.shape.dim[0].ClearField("dim_param")
                value.type.tensor_type.shape.dim[0].dim_value = shape[0]
            onnx.save(proto, out)
            x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            for runtime in RUNTIMES:
                try:
                    version = importlib.metadata.version(runtime)
                except importlib.metadata.PackageNotFoundError:
                    continue
                print(f"{form:26s} {runtime} {version}: {run_in(runtime, out, x, folder)}", flush=True)


if __name__ == "__main__":
    main()
