"""What ptxas makes of the CUDA kernels, and the report that shows all evidence."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ptxsim import static_evidence, toolchain
from ptxsim.checks import Checks

pytestmark = pytest.mark.skipif(
    toolchain.why_not_compiled() is not None, reason=str(toolchain.why_not_compiled())
)

SAMPLE = [("qgemm_nt", 4), ("qgemm_nn", 8), ("qgemm_grad_scales", 3), ("qgemm_nt_wgmma", 4)]
FAMILIES = (*toolchain.FAMILIES, *toolchain.WGMMA_FAMILIES)
ALL = [(family, bits) for family in FAMILIES for bits in toolchain.WIDTHS]
each_kernel = pytest.mark.parametrize(
    ("family", "bits"),
    [pytest.param(*one, marks=[] if one in SAMPLE else pytest.mark.full) for one in ALL],
)


@each_kernel
def test_registers_spills_warnings(family: str, bits: int) -> None:
    checks = Checks()
    architectures = (
        static_evidence.ARCHITECTURES if (family, bits) in SAMPLE[:1] else ("80", "90", "90a")
    )
    compiled = static_evidence.compile_all([family], [bits], architectures, checks)
    static_evidence.check_occupancy(compiled, checks)
    assert checks.total >= 10
    assert checks.failed == 0, checks.summary()


def test_every_kernel_is_parsed() -> None:
    _, said = toolchain.assemble(toolchain.ptx("qgemm_nt", 4), "80")
    kernels = static_evidence.parse_ptxas(said, "80")
    assert len(kernels) == said.count("Compiling entry function") >= 4
    assert all(20 < kernel.registers <= 255 for kernel in kernels)


def test_bad_news_is_noticed() -> None:
    """The checks can fail: a kernel that spills, and a warning of serialised instructions."""
    name = "_Z15qgemm_nt_kernelI6__halfLi4ELi1ELi1ELi1ELi4ELi4EEv"
    said = (
        f"ptxas info    : (C7513) Potential Performance Loss: wgmma serialized in '{name}'\n"
        f"ptxas info    : Compiling entry function '{name}' for 'sm_90'\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
    )
    assert len(static_evidence.warnings_of(said)) == 1
    (kernel,) = static_evidence.parse_ptxas(said, "90")
    assert (kernel.stack, kernel.spills, kernel.registers) == (16, 20, 255)
    assert kernel.geometry.op == "nt" and kernel.geometry.rows == 16


def test_main_loop_is_found() -> None:
    listing = """
.L_x_1:
        /*0000*/  MOV R1, R2 ;
        /*0010*/  @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0020*/  LDSM.16.M88.4 R4, [R8] ;
.L_x_3:
        /*0030*/  HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0040*/  HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/  @P1 BRA `(.L_x_2) ;
        /*0060*/  BRA `(.L_x_3) ;
"""
    assert static_evidence.find_main_loop(listing) == (4, 2)


@pytest.mark.skipif(toolchain.disassembler() is None, reason=toolchain.NO_DISASSEMBLER)
@each_kernel
def test_sass_main_loops(family: str, bits: int) -> None:
    """Each kernel has one main loop; its length is the report's business."""
    architectures = ("90a",) if family in toolchain.WGMMA_FAMILIES else ("80", "90")
    for loop in static_evidence.main_loops([(family, bits, a) for a in architectures]):
        assert loop.hmma % 8 == 0
        assert loop.instructions > loop.hmma


@pytest.mark.full
def test_report() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.ptxsim.report", "--quick"],
        cwd=toolchain.REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *_, last = done.stdout.splitlines()
    held, _, total, *_ = last.split()
    assert last == f"{held} of {total} checks hold" and held == total
