"""What this processor can do for integer networks, and what memory a run took on this machine.

Two kinds of instruction decide whether 8 bits pay: wide vectors (AVX2, AVX512, NEON), and a product of bytes that adds
up four at a time in 32 bits (VNNI on x86, DotProd and I8MM on ARM). An x86 without VNNI adds pairs in 16 bits, which
saturates.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

X86 = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "vnni": ("avx512_vnni", "avx_vnni"),
    "amx_int8": ("amx_int8",),
}
ARM = {"neon": ("asimd", "advsimd", "neon"), "dot_product": ("asimddp", "feat_dotprod"), "i8mm": ("i8mm", "feat_i8mm")}
X86_MACHINES = frozenset({"x86_64", "amd64", "i386", "i686"})
SAID = {
    "avx2": "AVX2",
    "avx512": "AVX512",
    "vnni": "VNNI",
    "amx_int8": "AMX",
    "neon": "NEON",
    "dot_product": "dot product",
    "i8mm": "I8MM",
}


@dataclass(frozen=True, slots=True)
class Cpu:
    """One processor. features: what matters here, each with whether it is there; None where that cannot be found out.

    cores: those that this process may use.
    """

    name: str
    machine: str
    cores: int
    features: dict[str, bool | None]

    @property
    def saturates(self) -> bool | None:
        """Whether products of u8 and s8 are added in 16 bits; None where that is not known."""
        if self.machine not in X86_MACHINES:
            return False
        vnni = self.features["vnni"]
        return None if vnni is None else not vnni

    def as_dict(self) -> dict[str, object]:
        """What `--json` prints."""
        return {"name": self.name, "machine": self.machine, "cores": self.cores, "features": self.features}

    def in_words(self) -> str:
        """One line: the name, what is there and what is not."""
        parts = []
        for there, word in ((True, "has"), (False, "lacks"), (None, "not known:")):
            found = [SAID[name] for name, has in self.features.items() if has is there]
            if found:
                parts.append(f"{word} {', '.join(found)}")
        return f"{self.name}, {self.cores} cores; {'; '.join(parts) or 'no feature of it is known'}"

    def advice(self) -> str:
        """What that means for integer networks; empty where all is well."""
        if self.saturates:
            return (
                "this CPU lacks VNNI: it multiplies 8 bits no faster than AVX2 allows, and adds pairs of products in "
                "16 bits, which saturates where weights are large"
            )
        if self.features.get("dot_product") is False:
            return "this CPU lacks the dot product instructions: expect little from 8 bits"
        return ""


def this_cpu() -> Cpu:
    """Of the machine that this runs on. Sources: /proc/cpuinfo, on macOS sysctl."""
    machine = platform.machine().lower()
    name, flags = described(Path("/proc/cpuinfo")) if platform.system() != "Darwin" else _from_sysctl()
    return cpu_of(machine, name, flags)


def cpu_of(machine: str, name: str, flags: set[str]) -> Cpu:
    """From the kernel's own names of features. An empty set tells nothing."""
    table = X86 if machine in X86_MACHINES else ARM
    features = {feature: bool(flags.intersection(names)) if flags else None for feature, names in table.items()}
    return Cpu(name or machine or "unknown", machine, _cores(), features)


def described(cpuinfo: Path) -> tuple[str, set[str]]:
    """Name and flags of the first processor in Linux' own description; empty where there is none."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return "", set()
    found = {key.strip().lower(): text.strip() for key, _, text in (line.partition(":") for line in reversed(lines))}
    return found.get("model name", ""), set((found.get("flags") or found.get("features") or "").lower().split())


def _from_sysctl() -> tuple[str, set[str]]:
    done = subprocess.run(["sysctl", "-a"], capture_output=True, text=True, check=False)
    found = dict(line.partition(": ")[::2] for line in done.stdout.splitlines())
    words = f"{found.get('machdep.cpu.features', '')} {found.get('machdep.cpu.leaf7_features', '')}".lower().split()
    on = {
        key.rpartition(".")[2].lower() for key, text in found.items() if key.startswith("hw.optional.") and text == "1"
    }
    return found.get("machdep.cpu.brand_string", ""), {*words, *on}


def _cores() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def peak_rss_mb() -> float | None:
    """The largest resident memory of this process so far; None where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration):  # what getrusage tells on Linux may be the parent's
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return round(int(line.split()[1]) / 2**10, 1)
    if sys.platform == "win32":
        peak = _peak_working_set()
        return None if peak is None else round(peak / 2**20, 1)
    try:
        import resource  # not every system has it
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def _peak_working_set() -> int | None:
    """What Windows calls it: bytes, from GetProcessMemoryInfo (psapi.h, PROCESS_MEMORY_COUNTERS)."""
    import ctypes

    class Counters(ctypes.Structure):
        _fields_ = [
            ("cb", ctypes.c_uint32),
            ("PageFaultCount", ctypes.c_uint32),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            ("others", ctypes.c_size_t * 7),
        ]

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    try:
        kernel: Any = ctypes.CDLL("kernel32")
        kernel.GetCurrentProcess.restype = ctypes.c_void_p
        process = ctypes.c_void_p(kernel.GetCurrentProcess())
        told = kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)
    except (OSError, AttributeError):
        return None
    return int(counters.PeakWorkingSetSize) if told else None
