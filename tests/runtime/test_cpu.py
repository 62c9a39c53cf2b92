"""What a processor can do, from the kernel's own description."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconv.runtime.benchmark import detect_cpu, parse_cpu_flags, read_cpuinfo

XEON = """processor\t: 0
model name\t: Some Xeon
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\n"


def test_the_first_processor_counts(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(XEON)
    name, flags = read_cpuinfo(file)
    cpu = parse_cpu_flags("x86_64", name, flags)
    assert name == "Some Xeon"
    assert cpu.features == {"avx2": True, "avx512": True, "vnni": True, "amx_int8": False}
    assert cpu.saturates is False
    assert cpu.advice() == ""


@pytest.mark.parametrize("flag", ["avx512_vnni", "avx_vnni"])
def test_either_kind_of_vnni_will_do(flag: str) -> None:
    assert parse_cpu_flags("x86_64", "", {"avx2", flag}).saturates is False


def test_x86_without_vnni_saturates() -> None:
    """`vpmaddubsw` adds pairs in 16 bits."""
    cpu = parse_cpu_flags("x86_64", "old", {"avx2"})
    assert cpu.saturates is True
    assert "lacks VNNI" in cpu.advice()
    assert "has AVX2; lacks AVX512, VNNI, AMX" in cpu.in_words()


def test_arm_names_its_features_in_its_own_way(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(ARM)
    cpu = parse_cpu_flags("aarch64", *read_cpuinfo(file))
    assert cpu.features == {"neon": True, "dot_product": True, "i8mm": False}
    assert cpu.saturates is False
    assert cpu.advice() == ""


def test_arm_without_dot_product_is_advised() -> None:
    assert "dot product" in parse_cpu_flags("arm64", "", {"asimd"}).advice()


def test_what_is_not_known_is_said_to_be_so(tmp_path: Path) -> None:
    cpu = parse_cpu_flags("x86_64", *read_cpuinfo(tmp_path / "none"))
    assert set(cpu.features.values()) == {None}
    assert cpu.saturates is None
    assert "not known:" in cpu.in_words()


def test_this_machine_has_a_description() -> None:
    cpu = detect_cpu()
    assert cpu.cores >= 1
    assert cpu.name
