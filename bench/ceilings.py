"""What this machine can do at most, measured: what it reads, and what it multiplies."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

import device

CACHE_BYTES = 512 << 20  # above the last-level caches of today


@functools.cache
def read_gbytes_per_s() -> float:
    """A sum over more than the caches hold."""
    values = torch.ones(CACHE_BYTES, dtype=torch.float32, device=device.device())
    return 4 * CACHE_BYTES / min(device.seconds(values.sum) for _ in range(5)) / 1e9


def peak_gflops(dtype: torch.dtype) -> float | None:
    """A loop on registers, of the level that is in use; None without a C++ compiler. On a GPU, a
    large dense product of torch.

    Activations that are not bf16 are multiplied in fp32 on every level.
    """
    if device.on_gpu():
        return _dense(dtype)
    from lowbitcore import runtime  # not before: the peers' interpreter may lack it

    level = runtime.isa()
    if dtype != torch.bfloat16 and level in ("amx", "avx512_bf16"):
        level = "avx512"
    return _loop(level, runtime.num_threads())


@functools.cache
def _dense(dtype: torch.dtype) -> float:
    a = torch.randn(8192, 8192, device=device.device(), dtype=dtype)
    return 2 * 8192**3 / min(device.seconds(lambda: a @ a) for _ in range(5)) / 1e9


@functools.cache
def _loop(level: str, threads: int) -> float | None:
    compiler = shutil.which("c++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "peak"
        source = Path(__file__).with_name("peak.cpp")
        subprocess.run(
            [compiler, "-std=c++17", "-O3", "-pthread", source, "-o", program], check=True
        )
        done = subprocess.run(
            [program, level, str(threads)], capture_output=True, text=True, check=True
        )
    return float(done.stdout)
