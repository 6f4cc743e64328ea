"""What the library runs on: instruction set, threads, devices."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from . import _C

__all__ = [
    "available_isas",
    "cmake_dir",
    "cuda_status",
    "force_isa",
    "isa",
    "num_threads",
    "set_num_threads",
]


def isa() -> str:
    """The instruction-set level in use: the fastest this CPU has, or what ``LOWBITCORE_ISA`` names.

    Raises:
        lowbitcore.Error: ``LOWBITCORE_ISA`` names a level that the build or the CPU lacks.
    """
    return _C.isa()


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


def cmake_dir() -> str:
    """The directory with ``lowbitcoreConfig.cmake``, for ``cmake -Dlowbitcore_DIR=...``.

    Raises:
        lowbitcore.Error: the installed package carries none.
    """
    for file in importlib.metadata.files("lowbitcore") or []:
        if file.name == "lowbitcoreConfig.cmake":
            return str(Path(str(file.locate())).resolve().parent)
    raise _C.Error("cmake_dir: this installation of lowbitcore has no CMake package")
