"""What the library runs on: instruction set, threads, devices."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import NamedTuple

import torch

from lowbitcore import _C

__all__ = [
    "CudaDevice",
    "available_isas",
    "cmake_dir",
    "cuda_devices",
    "cuda_status",
    "force_isa",
    "free_memory",
    "isa",
    "isa_reason",
    "num_threads",
    "resolve_device",
    "set_num_threads",
    "synchronize",
    "why_no_cuda",
]

# What the kernels are written for: cp.async, and mma.sync on bf16.
_OLDEST_ARCHITECTURE = (8, 0)


def isa() -> str:
    """The instruction-set level in use: the fastest this CPU has, or what ``LOWBITCORE_ISA`` names.

    Raises:
        lowbitcore.Error: ``LOWBITCORE_ISA`` names a level that the build or the CPU lacks.
    """
    return _C.isa()


def isa_reason() -> str:
    """Why :func:`isa` is in use."""
    if isa() == os.environ.get("LOWBITCORE_ISA"):
        return "forced by LOWBITCORE_ISA"
    fastest = isa() == available_isas()[-1]
    return "the fastest this CPU has" if fastest else "forced by the program"


def available_isas() -> list[str]:
    """The levels that this build holds and this CPU can run, slowest first."""
    return _C.available_isas()


def force_isa(name: str) -> str:
    """Use the level ``name`` from now on and return the level that was in use.

    Raises:
        lowbitcore.Error: the level is not in :func:`available_isas`.
    """
    previous = isa()
    _C.set_isa(name)
    return previous


def num_threads() -> int:
    """Threads of one operation. Unless set, OpenMP's setting (``OMP_NUM_THREADS``)."""
    return _C.get_num_threads()


def set_num_threads(count: int) -> None:
    """Use ``count`` threads from now on; 0 goes back to OpenMP's setting. Results do not change.

    Raises:
        ValueError: ``count`` is negative.
    """
    _C.set_num_threads(count)


def cuda_status() -> str:
    """One line on CUDA: its devices, or why there are none."""
    return _C.cuda_status()


class CudaDevice(NamedTuple):
    """A GPU, in torch's order. ``memory`` in bytes; ``why_not``: why there are no kernels for it,
    None where there are."""

    name: str
    architecture: str
    memory: int
    why_not: str | None


def cuda_devices() -> list[CudaDevice]:
    """The GPUs that torch sees."""
    if not torch.cuda.is_available():
        return []
    return list(map(_cuda_device, range(torch.cuda.device_count())))


def _cuda_device(index: int) -> CudaDevice:
    found = torch.cuda.get_device_properties(index)
    architecture = f"sm_{found.major}{found.minor}"
    why_not = None
    if not _works():
        why_not = f"CUDA is {cuda_status()}"
    elif (found.major, found.minor) < _OLDEST_ARCHITECTURE:
        why_not = f"kernels need sm_80 or newer, this is {architecture}"
    elif said := _C.cuda_why_not(index):
        why_not = f"this build's kernels do not run on {architecture}: {said}"
    return CudaDevice(found.name, architecture, found.total_memory, why_not)


def _works() -> bool:
    """Whether this build has kernels and its CUDA runtime accepts the driver."""
    return cuda_status().startswith("built; devices")


def _index(device: torch.device) -> int:
    """Of "cuda" that of the current GPU."""
    if device.index is not None:
        return device.index
    return torch.cuda.current_device() if torch.cuda.is_initialized() else 0


def why_no_cuda(index: int = 0) -> str | None:
    """Why GPU number ``index`` cannot be computed on; None where it can."""
    if cuda_status().startswith("not built"):
        return f"CUDA is {cuda_status()}"
    if torch.version.cuda is None:
        return f"this torch, {torch.__version__}, has no CUDA"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return f"torch sees no GPU (CUDA is {cuda_status()})"
    if index >= count:
        return f"torch sees {count} GPUs"
    device = _cuda_device(index)
    return None if device.why_not is None else f"{device.name}: {device.why_not}"


def resolve_device(device: str | torch.device) -> torch.device:
    """The device called "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: it is not one of these, or cannot be computed on; says why.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"resolve_device: device: expected cpu or cuda, got {device}")
    if found.type == "cuda" and (why_not := why_no_cuda(_index(found))) is not None:
        raise ValueError(f"resolve_device: device: expected cpu, got {device}: {why_not}")
    return found


def synchronize() -> None:
    """Wait until the GPU has done what it was given, if one is in use; for measuring time."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def free_memory(device: torch.device) -> int:
    """Bytes on a device that nothing uses now."""
    if device.type == "cuda":
        # torch's allocator keeps freed memory, which the driver counts as used.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cmake_dir() -> str:
    """The directory with ``lowbitcoreConfig.cmake``, for ``cmake -Dlowbitcore_DIR=...``.

    Raises:
        lowbitcore.Error: the installed package carries none.
    """
    for file in importlib.metadata.files("lowbitcore") or []:
        if file.name == "lowbitcoreConfig.cmake":
            return str(Path(str(file.locate())).resolve().parent)
    raise _C.Error("cmake_dir: this installation of lowbitcore has no CMake package")
