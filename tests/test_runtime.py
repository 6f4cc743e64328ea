"""Choice of instruction set, threads, and how levels are kept apart in the library."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowbitcore import Error, runtime


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_fastest_level_is_the_default() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "LOWBITCORE_ISA"}
    code = "from lowbitcore import runtime; print(runtime.isa(), runtime.isa_reason(), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [runtime.available_isas()[-1], "the fastest this CPU has"]


@pytest.mark.parametrize("level", runtime.available_isas())
def test_environment_forces_a_level(level: str) -> None:
    code = "from lowbitcore import runtime; print(runtime.isa(), runtime.isa_reason(), sep='\\n')"
    done = run_python(code, LOWBITCORE_ISA=level)
    assert done.stdout.splitlines() == [level, "forced by LOWBITCORE_ISA"]


def test_unknown_level_is_an_error_that_lists_the_known() -> None:
    done = run_python("from lowbitcore import runtime; runtime.isa()", LOWBITCORE_ISA="mmx")
    assert done.returncode != 0
    assert re.search(r"LOWBITCORE_ISA: expected a level .*\(.*scalar.*\), got mmx", done.stderr)
    with pytest.raises(Error, match="got mmx"):
        runtime.force_isa("mmx")


def test_force_isa_returns_the_previous_level() -> None:
    before = runtime.isa()
    assert runtime.force_isa("scalar") == before
    assert runtime.isa() == "scalar"
    if len(runtime.available_isas()) > 1:
        assert runtime.isa_reason() == "forced by the program"
    assert runtime.force_isa(before) == "scalar"


def test_threads() -> None:
    default = runtime.num_threads()
    runtime.set_num_threads(3)
    assert runtime.num_threads() == 3
    runtime.set_num_threads(0)
    assert runtime.num_threads() == default
    for wrong in (-1, 1025):
        with pytest.raises(ValueError, match=f"num_threads: expected 0 to 1024, got {wrong}"):
            runtime.set_num_threads(wrong)
    done = run_python(
        "from lowbitcore import runtime; print(runtime.num_threads())", OMP_NUM_THREADS="1"
    )
    assert done.stdout.strip() == "1"


def test_gptq_takes_as_many_threads_as_are_set() -> None:
    done = run_python(
        """if True:
        import os, numpy, torch
        from lowbitcore import ops, runtime
        hessian = torch.from_numpy(numpy.eye(416, dtype="float32"))  # by torch it starts threads
        for count in (1, 3):
            runtime.set_num_threads(count)
            before = len(os.listdir("/proc/self/task"))
            ops.gptq_factorize(hessian)
            print(len(os.listdir("/proc/self/task")) - before)
        """,
        OMP_NUM_THREADS="2",
    )
    assert done.stdout.split() == ["0", "2"], done.stderr


def test_one_openmp_runtime_is_shared_with_torch() -> None:
    """Two would fight for the cores: each keeps its idle threads spinning."""
    done = run_python(
        "import torch, lowbitcore as lbc; torch.rand(512, 512) @ torch.rand(512, 512)\n"
        "q = lbc.ops.quantize_rtn(torch.rand(256, 256), bits=4, group_size=64)\n"
        "import os; print(len(os.listdir('/proc/self/task')))",
        OMP_NUM_THREADS="4",
    )
    alone = run_python(
        "import torch; torch.rand(512, 512) @ torch.rand(512, 512)\n"
        "import os; print(len(os.listdir('/proc/self/task')))",
        OMP_NUM_THREADS="4",
    )
    assert int(done.stdout) == int(alone.stdout)


def about_library(tool: str, *arguments: str) -> str:
    """What a tool of binutils prints on the installed static library."""
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool} (binutils)")
    library = Path(runtime.cmake_dir()).parents[1] / "liblowbitcore.a"
    return subprocess.run(
        [tool, *arguments, str(library)], capture_output=True, text=True, check=True
    ).stdout


def members_of_library(tool: str, *arguments: str) -> dict[str, str]:
    """The same, of each kernels_<level>.o in it."""
    return {
        match[1]: member
        for member in re.split(r"\n(?=\S+\.o:)", about_library(tool, *arguments))
        if (match := re.match(r"\s*kernels_(\w+)\.cpp", member))
    }


def test_levels_share_no_code() -> None:
    """Each kernels_*.o exports one function and nothing weak, so that linking cannot mix levels."""
    kernels = members_of_library("nm", "--demangle", "--defined-only")
    assert set(runtime.available_isas()) <= set(kernels)
    for isa, member in kernels.items():
        symbols = re.findall(r"^\S+ ([A-Zu]) (.*)$", member, flags=re.MULTILINE)
        # The reference to the exception handler of C++ is data, the same in every object.
        exported = [name for _, name in symbols if name != "DW.ref.__gxx_personality_v0"]
        assert exported == [f"lowbitcore::{isa}_backend()"]


def test_no_host_puts_its_eigen_in_the_place_of_ours() -> None:
    """Templates of one name are one to the linker, whatever version and flags made them."""
    symbols = about_library("nm")
    assert "16lowbitcore_eigen" in symbols
    assert "5Eigen" not in symbols


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")
def test_levels_use_their_instructions() -> None:
    """Also those of levels that this machine cannot run; and none of a higher level."""
    code = members_of_library("objdump", "--disassemble", "--no-show-raw-insn")
    instructions = ["vfmadd", "%zmm", "vdpbf16ps", "tdpbf16ps"]
    levels = ["avx2", "avx512", "avx512_bf16", "amx"]
    for level, own in zip(levels, instructions, strict=True):
        assert own in code[level], level
        # "tdpbf16ps" is no part of "vdpbf16ps".
        for higher in instructions[levels.index(level) + 1 :]:
            assert higher not in code[level], (level, higher)
    assert "%ymm" not in code["scalar"]
